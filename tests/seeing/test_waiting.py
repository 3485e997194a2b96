"""Nothing is read from the device within a training step or a forward pass: on a GPU, to read a number is to wait for it.
On the meta device numbers cannot be read at all, so what runs there reads none."""
import pickle
import traceback
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.losses import MSELossFlat
from fastai.optimizer import SGD
from torch import Tensor, nn

from fastai_selfattn.attention.kinds import attention_layers
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention
from fastai_selfattn.attention.ops import attention_backend
from fastai_selfattn.seeing import gamma_logger
from fastai_selfattn.seeing.gamma_logger import GammaLogger, fetch
from fastai_selfattn.seeing.record import AttentionRecorder

def net(device='cpu'):
    torch.manual_seed(0)
    return nn.Sequential(SelfAttention(8, gamma=.3), nn.Conv2d(8, 8, 1), SimpleSelfAttention(8)).to(device)

def learner(*cbs, device='cpu', model=None):
    "Three steps an epoch"
    torch.manual_seed(1)
    xs = torch.randn(12, 8, 3, 5)
    dl = DataLoader(list(zip(xs, xs.flip(-1))), bs=4, num_workers=0, device=torch.device(device))
    learn = Learner(DataLoaders(dl, dl, device=torch.device(device)), model or net(device), loss_func=MSELossFlat(), opt_func=SGD, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.printed = []
    learn.logger = learn.printed.append
    return learn

class Steps(Callback):
    "Gamma after every step, read at once"
    order = 90
    def __init__(self): self.gammas, self.within = [], False
    def before_batch(self): self.within = True
    def after_batch(self):
        self.within = False
        if self.training: self.gammas.append([m.gamma.item() for m in attention_layers(self.learn.model).values()])

class Stop(Callback):
    "Ctrl-C in the fifth step"
    order = 95
    def after_batch(self):
        if self.training and self.train_iter == 5: raise KeyboardInterrupt

# The logger

@pytest.fixture
def no_autocast(monkeypatch): monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())     # which PyTorch has not on the meta device

@pytest.fixture
def meta(no_autocast):
    "A Learner on the meta device, without fastai's `Recorder`, which reads the loss"
    def make(*cbs):
        learn = learner(*cbs, device='meta')
        learn.remove_cb(Recorder)
        learn.recorder = SimpleNamespace(metric_names=['epoch'], add_time=False, log=[])
        return learn
    return make

def test_a_step_reads_nothing_and_the_end_of_an_epoch_does(meta):
    logger, done = GammaLogger(), []
    class Count(Callback):
        order = 90
        def after_batch(self): done.append(self.training)
    learn = meta(logger, Count())
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'): learn.fit(1, .1)
    assert done == [True]*3 and len(logger._rows) == 4
    assert all(isinstance(row[n], Tensor) and not row[n].requires_grad for row in logger._rows[1:] for n in ('gamma_0', 'gamma_2', 'grad_0', 'grad_2', 'change_0', 'change_2'))

def test_the_whole_fit_reads_only_where_it_fetches(meta, monkeypatch):
    seen = []
    monkeypatch.setattr(gamma_logger, 'fetch', lambda rows: seen.append(len(rows)))
    meta(GammaLogger()).fit(2, .1)
    assert seen == [4, 1, 3, 1]          # the rows of each epoch, and the row of the table

READS = 'item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__', '__index__'

def test_no_line_of_ours_reads_within_a_step(monkeypatch):
    steps, found, ours = Steps(), [], []
    for name in READS:
        def read(self, *args, real=getattr(Tensor, name), name=name, **kwargs):
            where = [f.filename for f in traceback.extract_stack(limit=12)]
            if any('fastai_selfattn/seeing' in f for f in where): (found if steps.within else ours).append(name)
            return real(self, *args, **kwargs)
        monkeypatch.setattr(Tensor, name, read)
    learner(GammaLogger(), steps).fit(2, .1)
    assert not found and 0 < len(ours) <= 4          # two tables, two epochs

@pytest.mark.parametrize('most', [1, 2, 100])
@pytest.mark.parametrize('every', [1, 2])
def test_the_numbers_are_those_of_every_step(most, every, monkeypatch):
    monkeypatch.setattr(gamma_logger, '_MOST_WAITING', most)
    logger, steps = GammaLogger(every), Steps()
    learner(logger, steps).fit(2, .1)
    history = logger.history
    assert history.step.tolist() == [0, *range(every, 7, every)]
    assert history[['gamma_0', 'gamma_2']].values[1:].tolist() == steps.gammas[every-1::every]
    assert (history.dtypes == float)[1:].all() and not logger._n_waiting

def test_ctrl_c_within_an_epoch_loses_no_number():
    logger, steps = GammaLogger(), Steps()
    learn = learner(logger, steps, Stop())
    with pytest.raises(KeyboardInterrupt): learn.fit(3, .1)
    assert logger._n_waiting == 2
    loaded = pickle.loads(pickle.dumps(logger))
    assert not any(isinstance(v, Tensor) for row in loaded._rows for v in row.values())
    assert loaded.history.equals(logger.history) and logger.history[['gamma_0', 'gamma_2']].values[1:].tolist() == steps.gammas

def test_numbers_of_several_dtypes_are_fetched_as_they_are():
    rows = [dict(step=i, a=torch.tensor(i/3), b=torch.tensor(i/3, dtype=torch.float64), c=torch.tensor(i/3).half(), d=float(i)) for i in range(3)]
    want = [{k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows]
    fetch(rows)
    assert rows == want
    fetch(rows)
    assert rows == want

# What ran

def test_the_logger_says_once_what_ran(capsys):
    logger = GammaLogger()
    learn = learner(logger)
    said = 'math on cpu in float32 (at most 784 keys, and the map is no larger than two feature maps)'
    learn.fit(1)
    assert logger.ran == said and capsys.readouterr().out == f'attention ran as {said}\n'
    learn.fit(1)
    assert capsys.readouterr().out == '' and logger.ran == said
    with attention_backend('tiled') as calls: learn.fit(1)
    assert logger.ran.startswith('tiled on cpu in float32 (asked for by') and 'attention ran as tiled' in capsys.readouterr().out
    assert {c.backend for c in calls} == {'tiled'}          # to listen changes nothing
    with learn.no_logging(): learn.fit(1)
    assert capsys.readouterr().out == '' and logger.ran == said

def test_nothing_is_said_of_layers_that_are_not_ours(capsys):
    import fastai.layers
    learn = learner(logger := GammaLogger(), model=nn.Sequential(fastai.layers.SelfAttention(8)))
    learn.fit(1)
    assert logger.ran == '' and capsys.readouterr().out == '' and len(logger.history) == 4

# The recorder

def all_kinds(device):
    torch.manual_seed(0)
    return nn.Sequential(SelfAttention(8, gamma=.3), PooledSelfAttention2d(8), SimpleSelfAttention(8), PaperSelfAttention(8)).to(device)

def test_a_recorded_pass_reads_nothing(no_autocast):
    rec = AttentionRecorder(all_kinds('meta'), points=[(1, 2), (3, 0)], vectors=True)
    rec.__enter__()
    for _ in range(2): rec.model(torch.empty(2, 8, 5, 7, device='meta'))
    rec._leave()
    assert {t.device.type for field in ('maps', 'changes', 'queries') for t in rec._found[field].values()} == {'meta'}
    assert rec._found['maps']['0'].shape == (2, 2, 5, 7) and set(rec._found['gammas']) == set('0123')
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'): rec.maps

def test_what_is_read_is_on_the_cpu_and_as_before():
    model, x = all_kinds('cpu'), torch.randn(2, 8, 5, 7)
    with AttentionRecorder(model, points=[(1, 2)]) as rec:
        model(x)
        inside = {n: m.clone() for n, m in rec.maps.items()}
        assert rec.gammas['0'] == pytest.approx(.3) and all(isinstance(g, float) for g in rec.gammas.values())
    assert set(inside) == set(rec.maps) and all(torch.equal(inside[n], rec.maps[n]) for n in inside) and rec.maps is rec.maps
    assert 'sums to 1' in type(rec).maps.__doc__

def test_gamma_is_that_of_the_pass():
    model = net()
    with AttentionRecorder(model) as rec:
        model(torch.randn(1, 8, 5, 7))
        with torch.no_grad(): model[0].gamma.fill_(9.)
    assert rec.gammas['0'] == pytest.approx(.3)
