"`selfattn-bench` from outside: what it refuses, what it writes, what it draws. No test asserts a time."
import io
import subprocess
from contextlib import redirect_stdout

import numpy as np
import pandas as pd
import pytest
import torch

from bench_samples import Altered, has_proc, quick, small_meter  # noqa: F401
from processes import extra
from fastai_selfattn.bench import commands, measure
from fastai_selfattn.bench.commands import bench_main, bench_table, plot_bench
from fastai_selfattn.bench.contestants import CONTESTANTS, Contestant

def args(out, *more): return ['--shapes', '1,16,5x6 1,16,7x9', '--contestants', 'ours,fastai', '--seconds', '.01', '--out', str(out), *more]

def csvs(folder): return sorted(folder.rglob('*.csv'))


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

def test_table_says_what_ran_where_it_is_known():
    df = rows(contestant=['ours', 'fastai'], ran=['tiled', ''])
    df = pd.concat([df, df.assign(**{'pass': 'forward+backward'})])
    assert bench_table(df)['', 'ran'].to_dict() == {('1,64,16x16', 'ours'): 'tiled', ('1,64,16x16', 'fastai'): ''}
    assert ('', 'ran') not in bench_table(df.drop(columns='ran'))          # of files of earlier versions

def test_plot_draws_one_family():
    df = rows(shape=['8,512,16x16', '1,64,32x32', '1,64,16x16', '1,64,8x8'], n=[256, 1024, 256, 64], **{'median ms': [9., 3., 2., np.nan]})
    ax = plot_bench(df, which='forward')
    line,floor = ax.lines
    assert line.get_xydata().tolist() == [[256, 2], [1024, 3]] and '1,64' in ax.get_title()
    assert [t.get_text() for t in ax.get_xticklabels()] == ['16²', '32²']
    assert plot_bench(df, 'extra MiB', 'forward', ax=ax) is ax
    with pytest.raises(ValueError, match='nothing to draw'): plot_bench(df)


def test_maps_that_are_not_square_are_named_by_both_sides():
    df = rows(shape=['1,64,9x8', '1,64,16x16'], n=[72, 256])
    assert [t.get_text() for t in plot_bench(df, which='forward').get_xticklabels()] == ['9x8', '16²']


# --- the command ---

class FirstStarted:
    "Stands in for `subprocess.run`: memory is measured once in a Python that was started, then in forked ones, which is faster by the imports"
    def __init__(self): self.plain,self.started = subprocess.run,0
    def __call__(self, args, **kwargs):
        if '-c' not in args: return self.plain(args, **kwargs)
        self.started += 1
        if self.started == 1: return self.plain(args, **kwargs)
        said = extra(*args[5:])     # after python -W ignore -c code
        return subprocess.CompletedProcess(args, isinstance(said, str), str(said), str(said))

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The result of the command, memory included, on fastai's layer, and what it printed"
    out = tmp_path_factory.mktemp('bench')/'new'/'results'
    with pytest.MonkeyPatch.context() as m, redirect_stdout(io.StringIO()) as printed:
        m.setattr(measure, 'rate_meter', small_meter)
        m.setattr(subprocess, 'run', start := FirstStarted())
        assert bench_main(args(out, '--threads', '1', '--shapes', '1,8,50x60', '--contestants', 'fastai')) == 0
        assert start.started == 2
    f, = csvs(out)
    return f,pd.read_csv(f),printed.getvalue()

def test_csv(finished):
    f,df,printed = finished
    assert f.name.startswith(f"layers-custom-float32-torch{torch.__version__.split('+')[0]}-") and f.name.endswith('-1threads.csv')
    assert list(df.columns) == measure.COLUMNS
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

def test_what_differs_is_status_1(monkeypatch, quick, tmp_path, capsys):
    monkeypatch.setitem(CONTESTANTS, 'F.sdpa', Contestant(lambda c: Altered(c, 'the output')))
    assert bench_main(args(tmp_path, '--no-memory', '--contestants', 'F.sdpa,fastai')) == 1
    assert 'not timed' in capsys.readouterr().out

def test_never_overwrites_silently(quick, tmp_path, capsys, monkeypatch):
    run = args(tmp_path, '--no-memory')
    assert bench_main(run) == 0
    f, = csvs(tmp_path)
    assert f.with_suffix('.png').stat().st_size > 10_000
    f.write_text('mine')
    with monkeypatch.context() as m:
        m.setattr(commands, 'bench_shape', lambda *a: pytest.fail("measured before it looked"))
        assert bench_main(run) == 2
        assert bench_main([*run, '--seconds', '.02']) == 2
    assert '--overwrite' in capsys.readouterr().err and f.read_text() == 'mine'
    assert bench_main([*run, '--overwrite']) == 0
    assert len(pd.read_csv(f)) == 8

def test_each_configuration_has_its_file(tmp_path):
    def name(*a): return commands._result_file(commands._bench_parser().parse_args(['--out', str(tmp_path), *a]))
    names = {name(), name('--shapes', 'sides'), name('--shapes', 'all'), name('--shapes', '1,8,5'), name('--threads', '63')}
    assert len(names) == 5 and all(f.parent == tmp_path for f in names)

def test_threads_are_put_back(quick, tmp_path):
    before = torch.get_num_threads()
    assert bench_main(args(tmp_path, '--no-memory', '--threads', str(before+1))) == 0
    assert torch.get_num_threads() == before
    assert (pd.read_csv(*csvs(tmp_path))['threads'] == before+1).all()

def test_stopped_keeps_what_is_done(monkeypatch, quick, tmp_path, capsys):
    done = []
    def stop(shape, *a, f=commands.bench_shape):
        if done: raise KeyboardInterrupt
        return done.append(shape) or f(shape, *a)
    monkeypatch.setattr(commands, 'bench_shape', stop)
    assert bench_main(args(tmp_path, '--no-memory')) == 130
    assert set(pd.read_csv(*csvs(tmp_path))['shape']) == {'1,16,5x6'} and 'stopped' in capsys.readouterr().err

def test_stopped_before_the_first_shape_leaves_what_was_there(monkeypatch, quick, tmp_path, capsys):
    "Also with --overwrite: an older result stays, and is not said to be of this run"
    assert bench_main(args(tmp_path, '--no-memory')) == 0
    f, = csvs(tmp_path)
    before = f.read_bytes()
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(commands, 'bench_shape', stop)
    assert bench_main(args(tmp_path, '--no-memory', '--overwrite')) == 130
    assert 'nothing written' in capsys.readouterr().err and f.read_bytes() == before

@pytest.mark.parametrize('more,says', [
    (['--shapes', 'tables'], 'bs,c,side'), (['--shapes', '1,7,16'], '8 channels'), (['--shapes', '1,8,0'], 'no 0'), (['--shapes', ' '], 'no shapes'),
    (['--contestants', 'ours,xformers'], "no contestant 'xformers'"), (['--contestants', ''], 'no contestant'),
    (['--seconds', '0'], 'more than 0'), (['--seconds', 'nan'], 'more than 0'), (['--threads', '-1'], 'more than 0'), (['--threads', '1.5'], 'invalid int'),
    (['--nonsense'], 'unrecognized')])
def test_bad_arguments(monkeypatch, tmp_path, capsys, more, says):
    monkeypatch.setattr(commands, 'bench_shape', lambda *a: pytest.fail('measured'))
    try: status = bench_main(args(tmp_path/'new', *more))
    except SystemExit as e: status = e.code
    err = capsys.readouterr().err
    assert status == 2 and says in err and err.startswith('selfattn-bench: ') and len(err.splitlines()) == 1
    assert not (tmp_path/'new').exists()

def test_out_that_cannot_be_made(tmp_path, capsys):
    (tmp_path/'file').touch()
    assert bench_main(args(tmp_path/'file')) == 2
    assert 'cannot make --out' in capsys.readouterr().err
