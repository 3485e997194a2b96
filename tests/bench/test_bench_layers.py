"The benchmark from outside: what it compares, what it refuses, what it writes. No test asserts a time."
import importlib.util
import io
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import fastai.layers
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from fastai_selfattn.bench import layers as bench; from fastai_selfattn.attention import ops
from fastai_selfattn.bench.layers import (Shape, attention_cost, bench_main, bench_shape, bench_table, check_layers, parse_contestants, peak_extra,
                                   plot_bench)

SAME = [n for n,c in bench._contestants.items() if c.same]
SHAPE = Shape(2, 24, 5, 7)
@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

has_proc = pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason="peak memory is measured on Linux")

@pytest.fixture
def quick(monkeypatch):
    "A small matrix for the rate of the machine, and one round"
    monkeypatch.setattr(bench, 'rate_meter', lambda meter=bench.rate_meter: meter(64))

def args(out, *more): return ['--shapes', '1,16,5x6 1,16,7x9', '--contestants', 'ours,fastai', '--seconds', '.01', '--out', str(out), *more]

def csvs(folder): return sorted(folder.rglob('*.csv'))


# --- what is compared ---

@pytest.mark.parametrize('by_hand', [False, True])
def test_all_give_the_answer_of_fastai(by_hand):
    layers,x = bench._prepare(SHAPE, SAME)
    assert check_layers(layers, x, layers['fastai'], by_hand) == {}

def test_weights_are_shared_and_attention_is_on():
    layers,_ = bench._prepare(SHAPE, SAME)
    first = layers['fastai'].state_dict()
    for layer in layers.values():
        for k,v in layer.state_dict().items(): torch.testing.assert_close(v, first[k], rtol=1e-4, atol=1e-5)
    assert first['gamma'] == .5

def test_backends_are_used(monkeypatch):
    used = []
    for name in ('math', 'tiled', 'sdpa'):
        def spy(*args, f=ops._backends[name], name=name): return used.append(name) or f(*args)
        monkeypatch.setitem(ops._backends, name, spy)
    layers,x = bench._prepare(SHAPE, ['ours tiled', 'ours math', 'ours sdpa'])
    for layer in layers.values(): bench._step(layer, x)
    assert used == ['tiled', 'math', 'sdpa']

class Altered(fastai.layers.SelfAttention):
    "fastai's layer with a mistake that only its output, or only a gradient, shows"
    def __init__(self, n_channels, where):
        super().__init__(n_channels)
        self.where = where
    def forward(self, x):
        y = super().forward(x)
        if self.where == 'the output': return y + 1e-2
        wrong = x if self.where == 'the gradient of x' else self.get_parameter(self.where.split()[-1])
        extra = 1e-2*wrong.sum()
        return y + (extra-extra.detach())

@pytest.mark.parametrize('where', ['the output', 'the gradient of x', 'the gradient of query.0.weight_orig', 'the gradient of gamma'])
@pytest.mark.parametrize('by_hand', [False, True])
def test_check_bites(where, by_hand):
    layers,x = bench._prepare(SHAPE, ['fastai'])
    bad = Altered(24, where)
    bad.load_state_dict(layers['fastai'].state_dict())
    assert f"{where} differs from fastai's" in check_layers({'bad': bad}, x, layers['fastai'], by_hand)['bad']

def test_check_does_not_take_nan():
    with pytest.raises(ValueError, match='differs'): bench._compare({'a': torch.tensor([np.nan])}, {'a': torch.ones(1)})

def test_what_differs_is_not_timed(monkeypatch, quick, tmp_path, capsys):
    monkeypatch.setitem(bench._contestants, 'F.sdpa', bench._Contestant(lambda c: Altered(c, 'the output')))
    df = bench_shape(SHAPE, ['F.sdpa', 'fastai'], .01, memory=False).set_index('contestant')
    assert df.loc['F.sdpa', 'median ms'].isna().all() and df.loc['F.sdpa', 'note'].str.startswith('not timed: the output differs').all()
    assert df.loc['fastai', 'median ms'].notna().all()
    assert bench_main(args(tmp_path, '--no-memory', '--contestants', 'F.sdpa,fastai')) == 1
    assert 'not timed' in capsys.readouterr().out

@pytest.mark.skipif(not importlib.util.find_spec('timm'), reason="timm is not installed")
def test_timm_is_other_mathematics(quick):
    df = bench_shape(SHAPE, ['timm NonLocalAttn', 'fastai'], .01, memory=False).set_index('contestant')
    timm = df.loc['timm NonLocalAttn']
    assert timm['note'].str.contains('other mathematics').all()
    assert timm[['median ms', 'ratio to fastai']].notna().all(axis=None) and timm[['floor ms', 'times over floor']].isna().all(axis=None)

def test_without_timm(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert parse_contestants() == SAME == parse_contestants('*')
    with pytest.raises(ValueError, match='pip install timm'): parse_contestants('timm NonLocalAttn')


# --- cost, rounds ---

class Count(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts multiply-add pairs of matrix products, twice each, and what goes through a softmax"
    ops = exps = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out,name = func(*args, **(kwargs or {})),func.overloadpacket.__name__
        if name in ('bmm', 'mm'): self.ops += 2*out.numel()*args[0].shape[-1]
        if name == '_softmax': self.exps += out.numel()
        if name == 'convolution': self.ops += 2*out.numel()*args[1][0].numel()
        return out

@pytest.mark.parametrize('shape', [Shape(2, 24, 5, 7), Shape(3, 16, 4, 9)])
def test_cost_is_what_fastai_computes(shape):
    layers,x = bench._prepare(shape, ['fastai'])
    with Count() as count: bench._step(layers['fastai'].eval(), x)
    ops,exps = attention_cost(shape)
    small = 2*sum(2*c[0].weight_orig.numel() for c in (layers['fastai'].query, layers['fastai'].key, layers['fastai'].value))    # spectral norm
    assert ops <= count.ops <= ops+small and count.exps == exps

def test_rounds(quick):
    layers,x = bench._prepare(SHAPE, ['ours', 'fastai'])
    forward,both = bench._rounds(layers, x, seconds=.01)
    for t in (forward, both):
        assert len(t) >= 3 and set(t) == {'floor', 'ours', 'fastai'} and (t > 0).all(axis=None)
    assert x.grad is None
    assert len(bench._rounds(layers, x, seconds=.5)[0]) > 3

def test_ratio_is_within_rounds():
    t = pd.DataFrame(dict(floor=[1., 1., 4.], fastai=[2., 2., 8.], ours=[1., 9., 4.]))
    assert bench._time_columns(t, 'ours', True)['ratio to fastai'] == .5 and t['ours'].median()/t['fastai'].median() == 2
    assert bench._time_columns(t, 'ours', True)['times over floor'] == 1 and 'times over floor' not in bench._time_columns(t, 'ours', False)
    assert 'ratio to fastai' not in bench._time_columns(t.drop(columns='fastai'), 'ours', True)


# --- memory ---

def test_no_proc_gives_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, '_proc', tmp_path)
    mib,note = peak_extra('ours', SHAPE)
    assert np.isnan(mib) and 'clear_refs' in note

@pytest.mark.parametrize('after,ok', [(101_000, True), (150_000, False)])
def test_reset_that_does_nothing_gives_no_number(monkeypatch, tmp_path, after, ok):
    (tmp_path/'clear_refs').touch()
    (tmp_path/'status').write_text(f"VmHWM:\t  {after} kB\nVmRSS:\t  100000 kB\n")
    monkeypatch.setattr(bench, '_proc', tmp_path)
    if ok: assert bench._reset_peak() == 100_000/1024
    else:
        with pytest.raises(SystemExit, match='does not reset'): bench._reset_peak()

@pytest.mark.parametrize('rc,err,note', [(-9, '', 'killed by signal 9'), (1, 'a\nlast line\n', 'last line')])
@has_proc
def test_child_that_dies(monkeypatch, rc, err, note):
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: subprocess.CompletedProcess(a, rc, '', err))
    mib,why = peak_extra('ours', SHAPE)
    assert np.isnan(mib) and note in why

def test_too_large_is_skipped_and_says_so(monkeypatch, quick):
    "Room for ours, none for n x n: ours is checked by hand and timed, fastai's is not started"
    shape = Shape(1, 8, 33, 40)
    monkeypatch.setattr(bench, '_available', lambda: 3*bench._need('ours', shape, True))
    assert bench._need('fastai', shape, False) > bench._available()
    started = []
    monkeypatch.setattr(bench, 'peak_extra', lambda name, *a: started.append(name) or (1., ''))
    monkeypatch.setattr(fastai.layers.SelfAttention, 'forward', lambda *a: pytest.fail("fastai's layer ran"))
    df = bench_shape(shape, ['ours', 'fastai'], .01).set_index('contestant')
    assert set(started) == {'ours'}
    assert df.loc['ours', 'median ms'].notna().all() and (df.loc['ours', 'note'] == '').all()
    assert df.loc['fastai', ['median ms', 'extra MiB', 'ratio to fastai']].isna().all(axis=None)
    assert df.loc['fastai', 'note'].str.match(r'skipped: needs about .* GiB').all()

def test_fastai_at_65536_pixels_needs_48_GiB():
    assert 47 < bench._need('fastai', Shape(1, 64, 256, 256), True)/2**30 < 50


# --- table and pictures ---

def rows(**cols):
    base = {'shape': '1,64,16x16', 'n': 256, 'contestant': 'ours', 'pass': 'forward', 'median ms': 1., 'ratio to fastai': .5, 'floor ms': .5,
            'times over floor': 2., 'extra MiB': 3.}
    return pd.DataFrame([base | dict(zip(cols, v)) for v in zip(*cols.values())])

def test_table_keeps_order_and_values():
    df = rows(contestant=['ours', 'fastai']*2, shape=['1,64,9x9']*2 + ['1,64,16x16']*2, **{'median ms': [1., 2., 3., np.nan]})
    df = pd.concat([df, df.assign(**{'pass': 'forward+backward', 'median ms': df['median ms']*10})])
    table = bench_table(df)
    assert list(table.index) == [('1,64,9x9', 'ours'), ('1,64,9x9', 'fastai'), ('1,64,16x16', 'ours'), ('1,64,16x16', 'fastai')]
    np.testing.assert_equal(table['forward+backward']['ms'].to_numpy(), [10, 20, 30, np.nan])
    np.testing.assert_equal(table['forward']['MiB'].to_numpy(), [3]*4)

def test_plot_draws_one_family():
    df = rows(shape=['8,512,16x16', '1,64,32x32', '1,64,16x16', '1,64,8x8'], n=[256, 1024, 256, 64], **{'median ms': [9., 3., 2., np.nan]})
    ax = plot_bench(df, which='forward')
    line,floor = ax.lines
    assert line.get_xydata().tolist() == [[256, 2], [1024, 3]] and '1,64' in ax.get_title()
    assert [t.get_text() for t in ax.get_xticklabels()] == ['16²', '32²']
    assert plot_bench(df, 'extra MiB', 'forward', ax=ax) is ax
    with pytest.raises(ValueError, match='nothing to draw'): plot_bench(df)


# --- the command ---

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The result of the command, memory included, on fastai's layer, and what it printed"
    out = tmp_path_factory.mktemp('bench')/'new'/'results'
    with pytest.MonkeyPatch.context() as m, redirect_stdout(io.StringIO()) as printed:
        m.setattr(bench, 'rate_meter', lambda meter=bench.rate_meter: meter(64))
        assert bench_main(args(out, '--threads', '1', '--shapes', '1,8,50x60', '--contestants', 'fastai')) == 0
    f, = csvs(out)
    return f,pd.read_csv(f),printed.getvalue()

def test_csv(finished):
    f,df,printed = finished
    assert f.name.startswith(f"layers-custom-float32-torch{torch.__version__.split('+')[0]}-") and f.name.endswith('-1threads.csv')
    assert list(df.columns) == bench._columns
    assert df[['contestant', 'pass']].values.tolist() == [['fastai', 'forward'], ['fastai', 'forward+backward']]
    assert (df[['shape', 'n', 'threads', 'torch']] == ['1,8,50x60', 3000, 1, torch.__version__]).all(axis=None)
    assert df[['machine', 'cores', 'os', 'python', 'fastai', 'package version', 'date', 'median ms', 'floor ms']].notna().all(axis=None)
    assert (df['median ms'] >= df['min ms']).all() and (df['rounds'] >= 3).all() and (df['ratio to fastai'] == 1).all()
    assert str(f) in printed and '1,8,50x60 fastai' in printed

@has_proc
def test_peak_is_that_of_the_matrices(finished):
    _,df,_ = finished
    if df['note'].notna().any(): pytest.skip(df['note'][0])
    forward,both = df['extra MiB']/(4*3000**2/2**20)
    assert 1.8 < forward < 2.6 and 2.8 < both < 3.8

def test_never_overwrites_silently(quick, tmp_path, capsys, monkeypatch):
    run = args(tmp_path, '--no-memory')
    assert bench_main(run) == 0
    f, = csvs(tmp_path)
    assert f.with_suffix('.png').stat().st_size > 10_000
    f.write_text('mine')
    with monkeypatch.context() as m:
        m.setattr(bench, 'bench_shape', lambda *a: pytest.fail("measured before it looked"))
        assert bench_main(run) == 2
        assert bench_main([*run, '--seconds', '.02']) == 2
    assert '--overwrite' in capsys.readouterr().err and f.read_text() == 'mine'
    assert bench_main([*run, '--overwrite']) == 0
    assert len(pd.read_csv(f)) == 8

def test_each_configuration_has_its_file(tmp_path):
    def name(*a): return bench._result_file(bench._bench_parser().parse_args(['--out', str(tmp_path), *a]))
    names = {name(), name('--shapes', 'sides'), name('--shapes', 'all'), name('--shapes', '1,8,5'), name('--threads', '63')}
    assert len(names) == 5 and all(f.parent == tmp_path for f in names)

def test_threads_are_put_back(quick, tmp_path):
    before = torch.get_num_threads()
    assert bench_main(args(tmp_path, '--no-memory', '--threads', str(before+1))) == 0
    assert torch.get_num_threads() == before
    assert (pd.read_csv(*csvs(tmp_path))['threads'] == before+1).all()

def test_stopped_keeps_what_is_done(monkeypatch, quick, tmp_path, capsys):
    done = []
    def stop(shape, *a, f=bench.bench_shape):
        if done: raise KeyboardInterrupt
        return done.append(shape) or f(shape, *a)
    monkeypatch.setattr(bench, 'bench_shape', stop)
    assert bench_main(args(tmp_path, '--no-memory')) == 130
    assert set(pd.read_csv(*csvs(tmp_path))['shape']) == {'1,16,5x6'} and 'stopped' in capsys.readouterr().err

@pytest.mark.parametrize('more,says', [
    (['--shapes', 'tables'], 'bs,c,side'), (['--shapes', '1,7,16'], '8 channels'), (['--shapes', '1,8,0'], 'no 0'), (['--shapes', ' '], 'no shapes'),
    (['--contestants', 'ours,xformers'], "no contestant 'xformers'"), (['--contestants', ''], 'no contestant'),
    (['--seconds', '0'], 'more than 0'), (['--seconds', 'nan'], 'more than 0'), (['--threads', '-1'], 'more than 0'), (['--threads', '1.5'], 'invalid int'),
    (['--nonsense'], 'unrecognized')])
def test_bad_arguments(monkeypatch, tmp_path, capsys, more, says):
    monkeypatch.setattr(bench, 'bench_shape', lambda *a: pytest.fail('measured'))
    try: status = bench_main(args(tmp_path/'new', *more))
    except SystemExit as e: status = e.code
    err = capsys.readouterr().err
    assert status == 2 and says in err and err.startswith('selfattn-bench: ') and len(err.splitlines()) == 1
    assert not (tmp_path/'new').exists()

def test_out_that_cannot_be_made(tmp_path, capsys):
    (tmp_path/'file').touch()
    assert bench_main(args(tmp_path/'file')) == 2
    assert 'cannot make --out' in capsys.readouterr().err
