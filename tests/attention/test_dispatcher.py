"What PyTorch's compiled dispatcher said to scripts/check_dispatcher.py, held against the choice of this package. The script itself needs a CUDA build and minutes: a maintainer runs it."
import runpy

import pytest
import torch

from conftest import root
from fastai_selfattn.attention import cuda
from fastai_selfattn.bench.ways import WAYS

script = runpy.run_path(str(root/'scripts/check_dispatcher.py'))
changes, newest_table, read, summary, COLUMNS = (script[n] for n in ('changes', 'newest_table', 'read', 'summary', 'COLUMNS'))
ROWS = [dict(zip(COLUMNS, row)) for row in read(newest_table())]
OURS = [r for r in ROWS if r['question'] == 'ours']

def test_all_was_asked_on_every_capability():
    asked = {c: {tuple(r.values())[1:5] for r in ROWS if r['capability'] == str(c)} for c in script['CAPABILITIES']}
    assert len({frozenset(a) for a in asked.values()}) == 1 and len(ROWS) == len(asked) * len(asked[90]) > 1200

@pytest.mark.parametrize('capability', script['CAPABILITIES'])
def test_the_choice_is_what_the_table_says(capability):
    "So a changed rule in `cuda.choose` needs a new table"
    for r in OURS:
        if r['capability'] != str(capability): continue
        qkv = [torch.empty(2, 1000, int(c), dtype=getattr(torch, r['dtype']), device='meta') for c in (r['d'], r['d'], r['dv'])]
        ask = lambda q, k, v, name: '' if name in r['accepted'].split() else 'no'  # noqa: B023
        assert cuda.choose(*qkv, ask=ask, capability=divmod(capability, 10))[0] == r['runs'], r

def test_the_memory_efficient_kernel_takes_all_that_we_hand_it():
    refused = {(r['capability'], r['dtype']) for r in OURS if 'fused' not in r['accepted'].split()}
    assert refused == {('75', 'bfloat16')}

def test_every_way_of_the_gpu_bench_runs_on_an_h100_in_half_precision():
    "But for cuDNN's, which takes no values of 256 channels in training"
    bench = {(r['question'], r['dv']): r['runs'] for r in ROWS if r['capability'] == '90' and r['dtype'] == 'float16' and r['question'].startswith('bench: ')}
    assert {q.removeprefix('bench: ') for q, _ in bench} == {n for n, w in WAYS.items() if not (w.is_layer or w.compiles)}
    assert {k for k, v in bench.items() if v != 'runs'} == {('bench: sdpa cudnn', '256')}

def test_why_we_never_leave_the_choice_to_pytorch():
    "Maps with their channels first are n x n on every GPU, and so are odd channels in half precision"
    assert {r['runs'] for r in ROWS if r['question'] in ('channels', 'parts of channels')} == {'n x n'}
    assert {r['runs'] for r in ROWS if (r['d'], r['dtype'], r['question']) == ('12', 'float16', 'training')} == {'n x n'}
    assert {r['runs'] for r in ROWS if (r['d'], r['dv'], r['dtype'], r['question']) == ('16', '128', 'float16', 'training')} == {'efficient', 'cudnn'}

def test_a_changed_answer_is_said():
    row = ('90', 'training', 'float16', '16', '128')
    before, after = [(*row, 'efficient', 'efficient'), ('75', *row[1:], '', 'n x n')], [(*row, 'cudnn efficient', 'cudnn'), ('100', *row[1:], 'flash', 'flash')]
    assert changes(before, before) == []
    assert changes(before, after) == ['90 training float16 16 128: accepted by efficient, efficient -> accepted by cudnn efficient, cudnn',
                                      '75 training float16 16 128: accepted by none, n x n -> not asked', '100 training float16 16 128: not asked -> accepted by flash, flash']

def test_the_table_to_read_has_a_column_a_capability():
    first, *lines = summary([tuple(r.values()) for r in ROWS])
    assert first.split() == [f'sm{c}' for c in script['CAPABILITIES']] and len(lines)*6 == len(ROWS)
    assert next(l for l in lines if l.startswith('training float16 (16, 128)')).split()[-6:] == ['efficient']*3 + ['cudnn']*2 + ['efficient']

def test_the_newest_release_is_a_number_not_a_word(tmp_path, monkeypatch):
    monkeypatch.setitem(newest_table.__globals__, 'TABLES', tmp_path)
    assert newest_table() is None
    for release in ('2.9.1', '2.14.1', '2.10.0'): (tmp_path/f'dispatcher-torch{release}.csv').touch()
    assert newest_table().name == 'dispatcher-torch2.14.1.csv'

def test_what_is_written_is_compared_with_what_was_there(tmp_path, monkeypatch, capsys):
    main, before = script['main'], ('90', 'training', 'float16', '16', '128', 'efficient', 'efficient')
    for name, value in dict(TABLES=tmp_path, ROOT=tmp_path, CAPABILITIES=(90,), all_rows=lambda: iter([(*before[:6], 'cudnn')])).items(): monkeypatch.setitem(main.__globals__, name, value)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    release = torch.__version__.partition('+')[0]
    script['write'](tmp_path/f'dispatcher-torch{release}.csv', [before])
    assert main(['--write']) == 1 and '1 of 1 answers differ' in capsys.readouterr().out
    assert main([]) == 0 and '0 of 1 answers differ' in capsys.readouterr().out
