"`selfattn-bench-logging`: what is timed is the logger, and one file is written where it was told"
import time

import pandas as pd
import pytest
import torch

from fastai_selfattn.bench import loggers as bench_logging
from fastai_selfattn.bench.loggers import bench_logging_main, logging_cost
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.map_logger import AttentionMapLogger

TINY = ['--n-rooms', '16', '--size', '32', '--bs', '4', '--epochs', '2', '--threads', '1']

@pytest.mark.parametrize('slow,event', [(GammaLogger, 'before_step'), (GammaLogger, '_see'), (AttentionMapLogger, 'after_epoch')])
def test_time_in_the_logger_is_seen(monkeypatch, slow, event):
    "A logger made slower by a hundredth of a second where it works: at least that much more is in it"
    fast = getattr(slow, event)
    def slower(self, *args):
        time.sleep(.02)
        return fast(self, *args)
    monkeypatch.setattr(slow, event, slower)
    df = logging_cost(n_rooms=16, size=32, bs=4, epochs=2)
    assert df.logger.tolist() == ['GammaLogger'] * 2 + ['AttentionMapLogger'] * 2 and df.epoch.tolist() == [1, 2, 1, 2]
    assert (df.share == df.in_logger / df.seconds).all() and (df.share < 1).all() and (df.in_logger > 0).all()
    assert (df[df.logger == slow.__name__].in_logger > .02).all()

def test_the_command_writes_one_file_with_the_circumstances(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert bench_logging_main([*TINY, '--out', str(tmp_path/'results')]) == 0
    file, = (tmp_path/'results').iterdir()
    assert file.name.startswith('logging-16rooms-32px-bs4-torch') and file.name.endswith('-1threads.csv')
    df = pd.read_csv(file)
    assert len(df) == 4 and {'machine', 'torch', 'fastai', 'package version', 'date'} <= set(df.columns) and (df.threads == 1).all()
    said = capsys.readouterr().out
    assert f'{df.share[:2].median():.2%}' in said and 'GammaLogger' in said and 'AttentionMapLogger' in said and str(file) in said
    before = file.read_bytes()
    assert bench_logging_main([*TINY, '--out', str(tmp_path/'results')]) == 2 and file.read_bytes() == before
    assert 'use --overwrite' in capsys.readouterr().err and torch.get_num_threads() == threads

def test_bad_input_and_ctrl_c_write_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path/'file').write_text('')
    assert bench_logging_main([*TINY, '--out', str(tmp_path/'file')]) == 2 and 'cannot make --out' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: bench_logging_main(['--n-rooms', '3'])
    assert e.value.code == 2 and 'must be 16 or more' in capsys.readouterr().err
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(bench_logging, 'logging_cost', stop)
    assert bench_logging_main([*TINY, '--out', str(tmp_path/'new')]) == 130 and not list((tmp_path/'new').iterdir())
