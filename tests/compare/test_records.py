"The file of a comparison: whole at any moment, and never of two minds about its settings."
import json, os
from functools import partial
from pathlib import Path
import pytest, torch
from fastai.metrics import Dice
from conftest import named, root, run
from fastai_selfattn.compare import records
from fastai_selfattn.compare.records import Records, describe, read_records

def settings(fit='2 epochs', **arms): return dict(common={'fit': fit}, arms={'none': 'nothing', **arms})

def filled(path, n=2):
    book = Records(settings(attention='A'), path)
    for seed in range(n): book.add(dict(seed=seed, arm='attention', loss=.1+.2*seed))
    return book

def test_numbers_come_back_bit_by_bit(tmp_path):
    book = filled(tmp_path/'r.json')
    assert Records(settings(attention='A'), tmp_path/'r.json').runs == book.runs
    assert book.find(1, 'attention')['loss'] == .1+.2

def test_nan_is_null(tmp_path):
    book = Records(settings(), tmp_path/'r.json')
    book.add(dict(seed=0, arm='none', loss=float('nan'), metrics={'a': float('inf')}, start=[1., float('nan')]))
    held = json.loads((tmp_path/'r.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))
    assert held['runs'] == [dict(seed=0, arm='none', loss=None, metrics={'a': None}, start=[1., None])] == book.runs

@pytest.mark.parametrize('other,words', [(settings(fit='3 epochs'), 'fit was 2 epochs and is now 3 epochs'), (settings(attention='B'), "the arm 'attention' was A and is now B"),
                                         (dict(common={'fit': '2 epochs', 'lr': '1'}, arms={}), 'lr was None and is now 1'), (dict(common={}, arms={}), 'fit was 2 epochs and is now None')], ids=named)
def test_other_settings_are_refused_by_name(tmp_path, other, words):
    filled(tmp_path/'r.json')
    before = (tmp_path/'r.json').read_bytes()
    with pytest.raises(ValueError, match=words): Records(other, tmp_path/'r.json')
    assert (tmp_path/'r.json').read_bytes() == before

def test_arms_may_be_added_and_left_out(tmp_path):
    filled(tmp_path/'r.json')
    book = Records(settings(conv3='C'), tmp_path/'r.json')
    book.add(dict(seed=0, arm='conv3', loss=1.))
    held,runs = read_records(tmp_path/'r.json')
    assert list(held['arms']) == ['none', 'attention', 'conv3'] and len(runs) == 3

@pytest.mark.parametrize('where', ['write', 'fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError('full'), KeyboardInterrupt()], ids=['full disk', 'Ctrl-C'])
def test_interruption_leaves_a_whole_file(tmp_path, monkeypatch, where, error):
    book = filled(tmp_path/'r.json')
    before = (tmp_path/'r.json').read_bytes()
    def fail(*args, **kwargs): raise error
    if where == 'write':
        plain = open
        def half(*args, **kwargs):
            f = plain(*args, **kwargs)
            def write(text):
                type(f).write(f, text[:len(text)//2])
                raise error
            return type('Half', (), dict(__enter__=lambda s: s, __exit__=lambda s, *e: f.close(), write=staticmethod(write)))()
        monkeypatch.setattr(records, 'open', half, raising=False)
    else: monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)): book.add(dict(seed=7, arm='none', loss=1.))
    monkeypatch.undo()
    assert (tmp_path/'r.json').read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['r.json']

@pytest.mark.parametrize('text', ['', '{"a": ', '{"a": 1}', '[1]'])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    (tmp_path/'r.json').write_text(text)
    with pytest.raises(ValueError, match='r.json'): Records(settings(), tmp_path/'r.json')
    assert (tmp_path/'r.json').read_text() == text

def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match='no folder'): Records(settings(), tmp_path/'a'/'r.json')

def test_a_folder_that_takes_nothing_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    "As on a read-only disk, where `os.access` says no to root too"
    Records(settings(), tmp_path/'r.json')
    monkeypatch.setattr('os.access', lambda folder, mode: (folder, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ValueError, match='cannot write to the folder'): Records(settings(), tmp_path/'r.json')

code = '''
from functools import partial
from fastai_selfattn.compare.records import describe
def make(dls, names={'a', 'b', 'c'}): return [x for x in dls if x in {'u', 'v', 'w'}]
def outer(k): return lambda x: k*make(x)
print(describe([make, outer(3), partial(make, names=2), True, 'a', {'k': (1, 2.5)}, {'z', 'y'}]))
'''

def test_described_alike_in_other_processes():
    "Sets are not in the same order in every process, and line numbers do not count"
    import sys
    said = {run(sys.executable, '-W', 'ignore', '-c', lines+code, cwd=root, PYTHONHASHSEED=seed) for lines,seed in (('', '1'), ('\n# a comment\n', '2'))}
    assert len(said) == 1 and 'make #' in said.pop()

def test_described_by_what_they_do():
    def f(k, d=1): return lambda x, y=d: x+k
    ways = [f(1), f(2), f(1, 2), lambda x: x+1, lambda x: x-1, lambda x: len(x), lambda x: sum(x), lambda x: [i+1 for i in x], lambda x: [i+2 for i in x]]
    assert len({describe(w) for w in ways}) == len(ways)
    assert describe(f(1)) == describe(f(1))

class Loss:
    def __init__(self, factor, hidden=0, weight=None): self.factor, self.sum, self.weight = factor, hidden, weight

def test_objects_are_told_by_what_they_were_made_with(tmp_path):
    def data(seed, folder): pass
    at = lambda x: describe(partial(data, folder=x))
    assert at(Path('a')) == at('a') != at(Path('b'))
    assert describe(Loss(1.)) == 'Loss(factor=1.0, weight=None)' == describe(Loss(1., hidden=3)) != describe(Loss(2.))
    assert describe(Loss(1., weight=torch.tensor([1., 2.]))) != describe(Loss(1., weight=torch.tensor([1., 3.])))
    assert describe(lambda: Loss) != describe(lambda x=Loss(1.): x) != describe(lambda x=Loss(2.): x)
    assert describe(Dice()) == describe(used := Dice()) and not used.reset()
    used.inter, used.union = 3., 4.                                    # what it counts is no setting
    assert describe(Dice()) == describe(used) != describe(Dice(axis=2))

@pytest.mark.parametrize('held', [dict(runs=[]), dict(settings={})], ids=str)
def test_a_file_without_its_parts_is_none_of_ours(tmp_path, held):
    (tmp_path/'r.json').write_text(json.dumps(dict(what=records._kind) | held))
    with pytest.raises(ValueError, match='does not hold results of a comparison'): read_records(tmp_path/'r.json')
