"Time and memory of one shape: what is timed, what is not, and why. No test asserts a time."
import importlib.util
import subprocess

import fastai.layers
import numpy as np
import pandas as pd
import pytest

from bench_samples import SHAPE, Altered, has_proc, quick  # noqa: F401
from fastai_selfattn.bench import measure
from fastai_selfattn.bench.contestants import CONTESTANTS, Contestant, prepare_layers
from fastai_selfattn.bench.cost import Shape
from fastai_selfattn.bench.measure import bench_shape, peak_extra

def test_what_differs_is_not_timed(monkeypatch, quick):
    monkeypatch.setitem(CONTESTANTS, 'F.sdpa', Contestant(lambda c: Altered(c, 'the output')))
    df = bench_shape(SHAPE, ['F.sdpa', 'fastai'], .01, memory=False).set_index('contestant')
    assert df.loc['F.sdpa', 'median ms'].isna().all() and df.loc['F.sdpa', 'note'].str.startswith('not timed: the output differs').all()
    assert df.loc['fastai', 'median ms'].notna().all()

def test_what_ran_stands_in_every_row_of_ours(quick):
    "`ours` takes tiles where the map is large; the others have no backend"
    df = bench_shape(Shape(1, 8, 29, 29), ['ours', 'ours math', 'ours sdpa', 'fastai'], .01, memory=False).set_index('contestant')
    assert df.groupby('contestant')['ran'].unique().map(list).to_dict() == {'ours': ['tiled'], 'ours math': ['math'], 'ours sdpa': ['sdpa'], 'fastai': ['']}

@pytest.mark.skipif(not importlib.util.find_spec('timm'), reason="timm is not installed")
def test_timm_is_other_mathematics(quick):
    df = bench_shape(SHAPE, ['timm NonLocalAttn', 'fastai'], .01, memory=False).set_index('contestant')
    timm = df.loc['timm NonLocalAttn']
    assert timm['note'].str.contains('other mathematics').all()
    assert timm[['median ms', 'ratio to fastai']].notna().all(axis=None) and timm[['floor ms', 'times over floor']].isna().all(axis=None)


# --- rounds ---

def test_rounds(quick):
    layers,x = prepare_layers(SHAPE, ['ours', 'fastai'])
    forward,both = measure._rounds(layers, x, seconds=.01)
    for t in (forward, both):
        assert len(t) >= 3 and set(t) == {'products', 'exponentials', 'ours', 'fastai'} and (t > 0).all(axis=None)
    assert x.grad is None
    assert len(measure._rounds(layers, x, seconds=.5)[0]) > 3

def test_ratio_is_within_rounds():
    t = pd.DataFrame(dict(products=[.75, .75, 3.], exponentials=[.25, .25, 1.], fastai=[2., 2., 8.], ours=[1., 9., 4.]))
    assert measure._time_columns(t, 'ours', True)['ratio to fastai'] == .5 and t['ours'].median()/t['fastai'].median() == 2
    assert measure._time_columns(t, 'ours', True)['times over floor'] == 1 and 'times over floor' not in measure._time_columns(t, 'ours', False)
    assert 'ratio to fastai' not in measure._time_columns(t.drop(columns='fastai'), 'ours', True)


# --- memory ---

def test_no_proc_gives_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, '_proc', tmp_path)
    mib,note = peak_extra('ours', SHAPE)
    assert np.isnan(mib) and 'clear_refs' in note

@pytest.mark.parametrize('after,ok', [(101_000, True), (150_000, False)])
def test_reset_that_does_nothing_gives_no_number(monkeypatch, tmp_path, after, ok):
    (tmp_path/'clear_refs').touch()
    (tmp_path/'status').write_text(f"VmHWM:\t  {after} kB\nVmRSS:\t  100000 kB\n")
    monkeypatch.setattr(measure, '_proc', tmp_path)
    if ok: assert measure._reset_peak() == 100_000/1024
    else:
        with pytest.raises(SystemExit, match='does not reset'): measure._reset_peak()

@pytest.mark.parametrize('rc,err,note', [(-9, '', 'killed by signal 9'), (1, 'a\nlast line\n', 'last line'), (1, '', 'unknown')])
@has_proc
def test_child_that_dies(monkeypatch, rc, err, note):
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: subprocess.CompletedProcess(a, rc, '', err))
    mib,why = peak_extra('ours', SHAPE)
    assert np.isnan(mib) and note in why

def test_too_large_is_skipped_and_says_so(monkeypatch, quick):
    "Room for ours, none for n x n: ours is checked by hand and timed, fastai's is not started"
    shape = Shape(1, 8, 33, 40)
    monkeypatch.setattr(measure, '_available', lambda: 3*measure._need('ours', shape, True))
    assert measure._need('fastai', shape, False) > measure._available()
    started = []
    monkeypatch.setattr(measure, 'peak_extra', lambda name, *a: started.append((name, *a)) or (1., ''))
    monkeypatch.setattr(fastai.layers.SelfAttention, 'forward', lambda *a: pytest.fail("fastai's layer ran"))
    df = bench_shape(shape, ['ours', 'fastai'], .01).set_index('contestant')
    threads = df['threads'].iloc[0]
    assert started == [('ours', shape, False, threads), ('ours', shape, True, threads)]
    assert df.loc['ours', 'median ms'].notna().all() and (df.loc['ours', 'note'] == '').all()
    assert df.loc['fastai', ['median ms', 'extra MiB', 'ratio to fastai']].isna().all(axis=None)
    assert df.loc['fastai', 'note'].str.match(r'skipped: needs about .* GiB').all()

def test_fastai_at_65536_pixels_needs_48_GiB():
    assert 47 < measure._need('fastai', Shape(1, 64, 256, 256), True)/2**30 < 50
