"`selfattn-walls --compare`: several nets of each kind, gone on with after a stop, never mixed with those of other settings."
import json
import pytest
from fastai_selfattn.walls import versus
from fastai_selfattn.walls.commands import walls_main

TINY = '--compare --n-rooms 12 --size 32 --epochs 1 --bs 4'.split()

def said(capsys): return ' '.join(capsys.readouterr())

@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp('versus')/'run'
    assert walls_main([*TINY, '--seeds', '2', '--gamma', '1', '--out', str(out)]) == 0
    return out

def runs(out): return json.loads((out/'compare.json').read_text())['runs']

def test_all_arms_with_every_seed(compared):
    assert {f.name for f in compared.iterdir()} >= {'compare.json', 'compare.md', 'compare.png', 'rooms'}
    assert {(r['arm'], r['seed']) for r in runs(compared)} >= {(arm, s) for arm in ('none', 'attention', 'uniform', 'context', 'conv3') for s in (0, 1)}
    assert 'attention' in (compared/'compare.md').read_text() and 'seeds' in (compared/'compare.md').read_text()
    assert '"gamma": 1.0' in (compared/'compare.json').read_text() or 'gamma=1.0' in (compared/'compare.json').read_text()

def test_goes_on_with_its_own_and_with_nothing_else(compared, capsys):
    before = runs(compared)
    assert walls_main([*TINY, '--seeds', '3', '--gamma', '1', '--out', str(compared)]) == 0
    after = runs(compared)
    assert after[:len(before)] == before and len(after) == len(before)*3//2
    assert walls_main([*TINY, '--seeds', '3', '--gamma', '.5', '--out', str(compared)]) == 2
    assert runs(compared) == after and 'selfattn-walls: ' in said(capsys)
    for other in (['--ambiguity', '1'], ['--seed', '5'], ['--n-rooms', '13']):     # the rooms that are there were made otherwise
        assert walls_main([*TINY, '--seeds', '3', '--gamma', '1', *other, '--out', str(compared)]) == 2
        assert runs(compared) == after and '12 rooms of seed 0, ambiguity 0' in said(capsys)

def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path/'mine.txt').write_text('x')
    assert walls_main([*TINY, '--out', str(tmp_path)]) == 2
    assert [f.name for f in tmp_path.iterdir()] == ['mine.txt'] and 'exists' in said(capsys)

def test_stopped(tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        (tmp_path/'run'/'compare.json').write_text('{}')
        raise KeyboardInterrupt
    monkeypatch.setattr(versus, 'compare_attention', stop)
    assert walls_main([*TINY, '--out', str(tmp_path/'run')]) == 130
    assert f"--out {tmp_path/'run'}" in said(capsys)

def test_stopped_before_anything_was_measured(tmp_path, capsys, monkeypatch):
    "Nothing is left that the same command would stumble over"
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(versus, 'compare_attention', stop)
    for _ in range(2):
        assert walls_main([*TINY, '--out', str(tmp_path/'new'/'run')]) == 130
        assert said(capsys).strip().endswith('selfattn-walls: stopped') and not list(tmp_path.iterdir())

@pytest.mark.parametrize('args,says', [(['--compare', '--no-attention'], '--no-attention'), (['--seeds', '3'], '--seeds is for --compare'), (['--compare', '--seeds', '0'], '--seeds')])
def test_what_does_not_go_together(args, says, capsys):
    with pytest.raises(SystemExit) as e: walls_main(args)
    assert e.value.code == 2 and says in said(capsys)
