"`GammaLogger` and `AttentionMapLogger`: right numbers and maps where they belong, training as without them, and a `Learner` as good as new however it ends"
import copy, json, os, random, shutil, tempfile, warnings
from pathlib import Path
from types import SimpleNamespace

import fastai.callback.fp16 as fp16
import fastai.layers
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback import schedule  # noqa: F401  gives `Learner` its `lr_find`
from fastai.callback.core import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException,
                                  FetchPredsCallback)
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TrackerCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.layers import ConvLayer
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import mae, mse
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, RandomErasing
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import create_unet_model
from hypothesis import given, strategies as st
from PIL import Image
from torch import nn

from conftest import contents, named, train_in_processes
from fastai_selfattn.seeing import gamma_logger, map_logger
from fastai_selfattn.seeing.gamma_logger import GammaLogger, mend_wandb
from fastai_selfattn.seeing.map_logger import AttentionMapLogger
from fastai_selfattn.attention.kinds import short_names
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention
from fastai_selfattn.seeing.record import AttentionRecorder
from fastai_selfattn.attention.kinds import attention_layers
from fastai_selfattn.placement.unet import unet_learner
from fastai_selfattn.walls.data import rooms_dls
from fastai_selfattn.walls.train import small_encoder

COLUMNS, GRADS, CHANGES = (['%s_0' % k, '%s_2' % k] for k in ('gamma', 'grad', 'change'))

PICTURES = torch.randn(19, 8, 3, 5, generator=torch.Generator().manual_seed(2))
def picture(i): return PICTURES[i]
def target(i): return PICTURES[i].flip(-1)

def pixels(): return nn.Sequential(SelfAttention(8), nn.Conv2d(8, 8, 1), SelfAttention(8), nn.Dropout(.1))
def one(): return nn.Sequential(nn.Conv2d(8, 8, 1), SelfAttention(8))
def none(): return nn.Conv2d(8, 8, 1)

def learner(path, *cbs, make=pixels, metrics=(), logger=GammaLogger):
    "Three steps an epoch; a table that `rows` of the learner collects"
    set_seed(7)
    dls = Datasets(range(19), [[picture], [target]], splits=(range(12), range(12, 19))).dataloaders(bs=4, num_workers=0)
    learn = Learner(dls, make(), loss_func=MSELossFlat(), cbs=[*([logger()] if logger else []), *cbs], metrics=list(metrics), path=path)
    learn.remove_cb(ProgressCallback)
    learn.rows = []
    learn.logger = learn.rows.append
    return learn

def fit(learn, n=2, **kwargs):
    learn.fit(n, .01, **kwargs)
    return learn

def gammas(learn): return [m.gamma.item() for m in attention_layers(learn.model).values()]

def clean(model): return not model._forward_pre_hooks and not any(m._forward_hooks or 'forward' in vars(m) for m in model.modules())

class Spy(Callback):
    "Gamma after every training step and epoch, before the first too"
    order = 90
    def __init__(self): self.steps, self.epochs = [], []
    def before_fit(self):
        if not self.steps: self.steps.append(gammas(self.learn))
    def after_batch(self):
        if self.training: self.steps.append(gammas(self.learn))
    def after_epoch(self): self.epochs.append(gammas(self.learn))

class RaiseAt(Callback):
    "Raise `error` the `n`-th time that `event` comes"
    order = 95
    def __init__(self, error, event, n=1): self.error, self.n = error, n; setattr(self, event, self.count)
    def count(self):
        self.n -= 1
        if not self.n: raise self.error


# --- short names

part = st.text('ab01', min_size=1, max_size=2)

@given(st.lists(st.lists(part, min_size=1, max_size=5).map('.'.join), min_size=2, max_size=6, unique=True))
def test_short_names_tell_paths_apart(paths):
    names = short_names(paths)
    assert len(set(names)) == len(names) == len(paths) and all(names)
    assert all(f'.{n}.' in f'.{p}.' for n, p in zip(names, paths))
    split = [n.split('.') for n in names]
    for i in (0, -1): assert len({s[i] for s in split}) > 1 or min(map(len, split)) == 1      # no shorter ones to be had


@pytest.mark.parametrize('paths,want', [([], []), (['layers.5.conv2.2'], ['']), (['a.1.x', 'a.2.x'], ['1', '2']), (['a.1', 'a.1.1'], ['1', '1.1']),
                                        (['', '0'], ['', '0']), (['a.b', 'c.b.b', 'd.b'], ['a', 'c.b', 'd'])])
def test_short_names_by_hand(paths, want): assert short_names(paths) == want


# --- the table

def values_by_name(learn, row=-1): return dict(zip(learn.recorder.metric_names, learn.rows[row]))

@pytest.mark.parametrize('make,names,recorder,metrics', [
    (one, ['gamma'], {}, ()), (pixels, COLUMNS, {}, (mae, mse)), (pixels, COLUMNS, dict(add_time=False), ()), (one, ['gamma'], dict(add_time=False), (mae,)),
    (pixels, COLUMNS, dict(train_metrics=True), (mae, mse)), (pixels, COLUMNS, dict(train_metrics=True, add_time=False), (mae,)),
    (pixels, COLUMNS, dict(train_metrics=True, valid_metrics=False), (mae, mse))], ids=named)
def test_columns_and_values_line_up(tmp_path, make, names, recorder, metrics):
    tables = []
    for logger in (None, GammaLogger):
        learn = learner(tmp_path, make=make, metrics=metrics, logger=logger)
        learn.remove_cb(Recorder).add_cb(Recorder(**recorder))
        spy = Spy()
        fit(learn, 3, cbs=[CSVLogger(), spy])
        tables.append([[values_by_name(learn, i) for i in range(3)], list(learn.recorder.metric_names), [list(v) for v in learn.recorder.values]])
        assert all(len(r) == len(learn.recorder.metric_names) for r in learn.rows)
    (plain, plain_names, plain_values), (rows, cols, values) = tables
    time = ['time'] if recorder.get('add_time', True) else []
    assert cols == [n for n in plain_names if n != 'time'] + names + time
    for before, after, want in zip(plain, rows, spy.epochs):
        assert [after[n] for n in names] == want
        for n in set(plain_names) - {'time'}: assert after[n] == before[n]
    assert values == [v + g for v, g in zip(plain_values, spy.epochs)]
    csv = pd.read_csv(tmp_path / 'history.csv')
    assert list(csv.columns) == cols
    np.testing.assert_allclose(csv[names].to_numpy(), spy.epochs, rtol=1e-6)


def test_trackers_and_model_saver_can_watch_gamma(tmp_path):
    tracker, spy = TrackerCallback('gamma_2', comp=np.less), Spy()
    learn = learner(tmp_path, SaveModelCallback('gamma_2', comp=np.less), tracker, spy)
    nn.init.constant_(learn.model[2].gamma, .5)
    fit(learn, 2)
    learn.opt.set_hypers(lr=0)
    best = min(g[1] for g in spy.epochs)
    assert tracker.best == best == learn.model[2].gamma.item()             # loaded at the end
    stop = learner(tmp_path, EarlyStoppingCallback('gamma_0', min_delta=1e9, patience=2))
    fit(stop, 5)
    assert len(stop.rows) == 3 and list(stop.gamma_logger.history.step) == list(range(10))


# --- history

def test_history_is_gamma_after_each_step(tmp_path):
    learn = learner(tmp_path, spy := Spy())
    for n, epochs in ((2, 2), (1, 3)):                                     # and goes on
        fit(learn, n)
        history = learn.gamma_logger.history
        assert list(history.columns) == ['step', 'epoch', *COLUMNS, *GRADS, *CHANGES] and history[GRADS + CHANGES].isna().all(axis=1).tolist() == [True] + [False] * (len(history) - 1)
        assert history.step.tolist() == list(range(3 * epochs + 1))
        np.testing.assert_allclose(history.epoch, np.arange(3 * epochs + 1) / 3)
        assert history[COLUMNS].values.tolist() == spy.steps
    assert spy.steps[0] == [0, 0] and len({tuple(s) for s in spy.steps}) == 10


def test_history_before_training(tmp_path): assert len(learner(tmp_path).gamma_logger.history) == 0


def test_step_0_is_what_was_there_before(tmp_path):
    learn = learner(tmp_path)
    nn.init.constant_(learn.model[2].gamma, .25)
    assert fit(learn, 1).gamma_logger.history.loc[0, COLUMNS].tolist() == [0, .25] != gammas(learn)


def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}

def same(a, b): return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())

@pytest.mark.parametrize('trained', [False, True])
def test_lr_find_adds_nothing(tmp_path, trained):
    found = []
    for logger in (None, GammaLogger):
        learn = learner(tmp_path, logger=logger)
        if trained: fit(learn)
        before, weights, n = learn.gamma_logger.history if logger else None, state(learn), len(learn.rows)
        found.append(learn.lr_find(num_it=11, show_plot=False).valley)
    assert found[0] == found[1] and learn.gamma_logger.history.equals(before) and same(state(learn), weights) and len(learn.rows) == n
    fit(learn, 1)
    assert len(learn.gamma_logger.history) == max(len(before), 1) + 3 and values_by_name(learn)['gamma_0'] == gammas(learn)[0]


@pytest.mark.parametrize('trained', [False, True])
def test_validate_and_get_preds_as_without(tmp_path, trained):
    results = []
    for logger in (None, GammaLogger):
        learn = learner(tmp_path, logger=logger, metrics=[mae])
        if trained: fit(learn)
        before = learn.gamma_logger.history if logger else None
        results.append([list(learn.validate()), *learn.get_preds(), *learn.get_preds(with_loss=True), list(learn.validate(ds_idx=1)), *learn.tta()])
        if logger: assert learn.gamma_logger.history.equals(before)
        assert len(learn.rows) == 2 * trained
    plain, logged = results
    assert len(plain[0]) == len(logged[0]) == 2 and plain[0] == logged[0] and len(plain) == len(logged) == 9
    for a, b in zip(plain, logged): assert a == b if isinstance(a, list) else torch.equal(a, b)


def test_predictions_fetched_while_training(tmp_path):
    "As fastai's W&B callback does each epoch: it takes the `Recorder` off for that time"
    fetch = FetchPredsCallback()
    learn = fit(learner(tmp_path, fetch, spy := Spy()))
    assert [list(r)[3:5] for r in learn.rows] == spy.epochs and fetch.preds[0].shape == (7, 8, 3, 5)
    assert learn.gamma_logger.history[COLUMNS].values.tolist() == spy.steps


# --- training that ends early

EVENTS = ['before_fit', 'before_epoch', 'before_batch', 'after_backward', 'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch']

@pytest.mark.parametrize('error', [ZeroDivisionError('oh'), KeyboardInterrupt(), CancelFitException()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', EVENTS)
def test_learner_is_as_good_as_new_however_training_ends(tmp_path, error, event):
    learn = learner(tmp_path)
    metrics, cbs = list(learn.metrics), list(learn.cbs)
    bad = RaiseAt(error, event, 2 if event != 'before_fit' else 1)
    if isinstance(error, CancelFitException): fit(learn, 3, cbs=bad)
    else:
        with pytest.raises(type(error)): fit(learn, 3, cbs=bad)
    assert list(learn.metrics) == metrics and list(learn.cbs) == cbs
    assert len(learn.validate()) == 1 and learn.get_preds()[0].shape == (7, 8, 3, 5)
    steps = len(learn.gamma_logger.history)
    learn.rows.clear()
    fit(learn, 1, cbs=CSVLogger())
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', *COLUMNS, 'time']
    assert [values_by_name(learn)[c] for c in COLUMNS] == gammas(learn) and len(learn.rows) == 1
    history = learn.gamma_logger.history
    assert history.step.tolist() == list(range(len(history))) and len(history) == max(steps, 1) + 3 and not history[COLUMNS].isna().any(axis=None) and not history.tail(3).isna().any(axis=None)
    assert clean(learn.model)
    assert len(learn.validate()) == 1


@pytest.mark.parametrize('order', [-5, 95])
@pytest.mark.parametrize('n', [1, 2])
def test_a_batch_left_out_is_a_step_without_a_change(tmp_path, order, n):
    bad = RaiseAt(CancelBatchException(), 'before_batch', n)
    bad.order = order
    learn = fit(learner(tmp_path, bad), 1)
    history = learn.gamma_logger.history
    values = history[COLUMNS].values.tolist()
    assert len(values) == 4 and [i for i in (1, 2, 3) if values[i] == values[i - 1]] == [n] and values[3] == gammas(learn)
    assert history[GRADS + CHANGES].isna().all(axis=1).tolist() == history[GRADS + CHANGES].isna().any(axis=1).tolist() == [i in (0, n) for i in range(4)]


@pytest.mark.parametrize('cancel,event', [(CancelTrainException(), 'before_batch'), (CancelEpochException(), 'before_batch'), (CancelEpochException(), 'before_epoch'), (CancelValidException(), 'before_validate')],
                         ids=lambda c: c if isinstance(c, str) else type(c).__name__)
def test_an_epoch_cut_short(tmp_path, cancel, event):
    "The row of that epoch lacks what fastai lacks, those after it are whole"
    rows = []
    for logger in (None, GammaLogger):
        learn = fit(learner(tmp_path, RaiseAt(cancel, event, 2), logger=logger), 4)
        rows.append([list(r) for r in learn.rows])
    assert len(rows[0]) == len(rows[1]) == 4
    for a, b in zip(*rows):
        assert [x for x in b[:-1] if x not in a] == b[len(a) - 1:-1]               # after all that fastai logs
        assert len(b) - len(a) in (0, 2)
    assert len(rows[1][-1]) == 6 and rows[1][-1][3:5] == gammas(learn)


# --- models without attention, models that change, files

def test_model_without_attention_warns_once_a_fit_and_trains(tmp_path):
    learn, plain = learner(tmp_path, make=none), learner(tmp_path, make=none, logger=None)
    for n in (1, 2):
        with pytest.warns(UserWarning, match='no attention layer in this model') as seen: fit(learn, 2)
        assert len([w for w in seen if 'GammaLogger' in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(learn.get_preds()) == 2
    fit(plain, 2), fit(plain, 2)
    assert list(learn.recorder.metric_names) == list(plain.recorder.metric_names) and len(learn.gamma_logger.history) == 0
    assert [list(r)[:-1] for r in learn.rows] == [list(r)[:-1] for r in plain.rows] and same(state(learn), state(plain))


def test_no_warning_where_nothing_is_logged_anyway(tmp_path):
    learn = learner(tmp_path, make=none)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.validate()
        learn.lr_find(num_it=11, show_plot=False)


def test_layers_are_those_of_the_model_at_the_start_of_each_fit(tmp_path):
    learn = fit(learner(tmp_path), 1)
    learn.model.append(SelfAttention(8))
    learn.create_opt()
    fit(learn, 1)
    assert list(learn.recorder.metric_names)[3:-1] == ['gamma_0', 'gamma_2', 'gamma_4']
    history = learn.gamma_logger.history
    assert history.gamma_4.isna().tolist() == [True] * 4 + [False] * 3 and history.iloc[-1, 2:5].tolist() == gammas(learn)


def test_added_for_one_fit_and_taken_off(tmp_path):
    learn = learner(tmp_path, logger=None)
    logger = GammaLogger()
    fit(learn, 1, cbs=logger), fit(learn, 1)
    assert not hasattr(learn, 'gamma_logger') and list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'time'] and len(learn.rows[-1]) == 4
    fit(learn, 1, cbs=logger)
    assert logger.history.step.tolist() == list(range(7)) and logger.history[COLUMNS].iloc[-1].tolist() == gammas(learn)


def test_history_is_a_copy(tmp_path):
    learn = fit(learner(tmp_path), 1)
    history = learn.gamma_logger.history
    history['gamma_0'] = 5.
    assert learn.gamma_logger.history.gamma_0.iloc[-1] == gammas(learn)[0]


def test_export_keeps_logger_and_history(tmp_path):
    learn = fit(learner(tmp_path))
    learn.logger = print
    history = learn.gamma_logger.history
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    assert loaded.gamma_logger.history.equals(history) and loaded.gamma_logger.learn is loaded
    loaded.dls, loaded.logger = learn.dls, learn.rows.append
    fit(loaded, 1)
    assert loaded.gamma_logger.history.step.tolist() == list(range(10)) and loaded.gamma_logger.history[COLUMNS].iloc[-1].tolist() == gammas(loaded)
    assert learn.gamma_logger.history.equals(history)


# --- gradient and change, against a loop written by hand

def ours(): return nn.Sequential(SelfAttention(8), nn.Conv2d(8, 8, 1), SelfAttention(8))
def others(): return nn.Sequential(PaperSelfAttention(8), nn.Conv2d(8, 8, 1), PooledSelfAttention2d(8))
def without_softmax(): return nn.Sequential(SelfAttention(8, softmax=False), nn.Conv2d(8, 8, 1), SimpleSelfAttention(8))
def fastais(): return nn.Sequential(fastai.layers.SelfAttention(8), nn.Conv2d(8, 8, 1), fastai.layers.PooledSelfAttention2d(8))
def fastais_simple(): return nn.Sequential(fastai.layers.SimpleSelfAttention(8), nn.Conv2d(8, 8, 1), nn.Identity(), fastai.layers.SelfAttention(8))

BATCHES = [(PICTURES[i:i + 4].repeat(1, 1, 2, 2)[..., :6, :8].contiguous(), PICTURES[i:i + 4].repeat(1, 1, 2, 2)[..., :6, 1:9].contiguous()) for i in range(0, 12, 4)]

def plain(make, *cbs, **kwargs):
    "A Learner that takes `BATCHES` in order with plain SGD; both gammas away from 0"
    set_seed(3)
    dl = DataLoader([(x, y) for b in BATCHES for x, y in zip(*b)], bs=4)
    learn = Learner(DataLoaders(dl, dl), start(make()), loss_func=MSELossFlat(), opt_func=SGD, cbs=[GammaLogger(**kwargs), *cbs])
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    return learn

def start(model):
    for m, g in zip(attention_layers(model).values(), (.5, -.25)): nn.init.constant_(m.gamma, g)
    return model

def by_hand(make, n=1, acc=1, clip=None, cast=False, lr=.01):
    "Rows of gamma, gradient and change of two layers in a model of layers one after the other, from autograd and the inputs and outputs of the layers"
    set_seed(3)
    model = start(make()).train()
    layers, rows = list(attention_layers(model).values()), []
    opt = torch.optim.SGD(model.parameters(), lr)
    for i, (x, y) in enumerate(BATCHES * n):
        change = []
        with torch.autocast('cpu', torch.bfloat16, enabled=cast):
            for m in model:
                out = m(x)
                if m in layers: change.append(((out.double() - x.double()).flatten(1).norm(dim=1) / x.double().flatten(1).norm(dim=1)).mean().item())
                x = out
        (F.mse_loss(x.float(), y) / acc).backward()
        grad = [np.nan, np.nan]
        if (i + 1) % acc == 0:
            if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
            grad = [m.gamma.grad.item() for m in layers]
            opt.step(), opt.zero_grad()
        rows.append([m.gamma.item() for m in layers] + grad + change)
    return np.array(rows)

def logged(learn): return learn.gamma_logger.history.iloc[:, 2:].to_numpy()

def check(found, want, **tol):
    assert found.shape == want.shape and np.isfinite(want[:, 4:]).all() and (np.abs(want[:, 4:]) > 1e-3).all()
    np.testing.assert_allclose(found, want, **{'rtol': 1e-4, 'atol': 1e-7, **tol})

@pytest.mark.parametrize('make', [ours, others, without_softmax, fastais, fastais_simple], ids=lambda f: f.__name__)
def test_gamma_gradient_and_change_are_those_of_autograd_and_of_the_layers(make):
    learn, lr = plain(make), 1e-5 if make is fastais_simple else .01     # weights that are dot products grow with the map
    learn.fit(2, lr)
    short = short_names(attention_layers(learn.model))
    assert list(learn.gamma_logger.history.columns) == ['step', 'epoch', *(f'{k}_{s}' for k in ('gamma', 'grad', 'change') for s in short)]
    found = logged(learn)
    assert found[0, :2].tolist() == [.5, -.25] and np.isnan(found[0, 2:]).all()
    check(found[1:], by_hand(make, 2, lr=lr))
    assert clean(learn.model)


def test_change_is_the_mean_over_the_batch_of_gamma_o_over_x():
    "A layer with known output: the norms can be done on paper"
    class Half(SelfAttention):
        def forward(self, x): return x + self.gamma * x.flip(-1).abs()
    learn = plain(lambda: nn.Sequential(Half(8)))
    learn.fit(1, 0.)
    np.testing.assert_allclose(learn.gamma_logger.history.change[1:], .5, rtol=1e-6)


@pytest.mark.parametrize('every,steps', [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 2, 4, 6]), (4, [0, 4]), (7, [0])])
def test_every(every, steps):
    learn = plain(ours, every=every)
    learn.fit(1, .01), learn.fit(1, .01)
    history = learn.gamma_logger.history
    assert history.step.tolist() == steps and len(learn.recorder.values[-1]) == 4
    np.testing.assert_allclose(history.epoch, np.array(steps) / 3)
    if len(steps) > 1: check(logged(learn)[1:], by_hand(ours, 2)[[s - 1 for s in steps[1:]]])


def test_gradient_accumulation():
    "Where no step was made there is no gradient; where one was, it is that of all batches before it"
    learn = plain(ours, GradientAccumulation(n_acc=8))
    for _ in range(2): learn.fit(1, .01)     # fastai begins to count anew with each fit, but keeps the gradient
    history = learn.gamma_logger.history
    assert history[GRADS].isna().values.tolist() == [[i not in (2, 5)] * 2 for i in range(7)]
    learn = plain(ours, GradientAccumulation(n_acc=8))
    learn.fit(2, .01)
    want = by_hand(ours, 2, acc=2)
    assert np.isnan(want[::2, 2:4]).all() and not np.isnan(want[1::2]).any()
    check(logged(learn)[1:], want)


def test_clipped_gradients():
    learn = plain(ours, GradientClip(.05))
    learn.fit(1, .01)
    want = by_hand(ours, clip=.05)
    assert (np.abs(by_hand(ours)[:, 2]) > 1.2 * np.abs(want[:, 2])).all()
    check(logged(learn)[1:], want)


@pytest.fixture
def on_cpu(monkeypatch):
    "fastai's mixed precision, on the CPU"
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kw: torch.amp.GradScaler('cpu', init_scale=1024., **kw))
    monkeypatch.setattr(fp16, 'autocast', lambda device, dtype: torch.autocast('cpu', dtype=torch.bfloat16))

class Overflow(Callback):
    order = 0
    def after_backward(self):
        if self.train_iter == 1: self.learn.model[2].gamma.grad.fill_(float('inf'))

def test_mixed_precision(on_cpu):
    learn = plain(ours, fp16.MixedPrecision())
    learn.fit(2, .01)
    check(logged(learn)[1:], by_hand(ours, 2, cast=True), rtol=.02, atol=1e-5)
    with pytest.raises(AssertionError): check(logged(learn)[1:], by_hand(ours, 2), rtol=1e-4)     # it was mixed precision


def test_a_step_that_is_skipped_for_infinite_gradients(on_cpu):
    learn = plain(ours, fp16.MixedPrecision(), Overflow())
    learn.fit(1, .01)
    history = learn.gamma_logger.history
    assert history[GRADS].isna().values.tolist() == [[True] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert history[COLUMNS].iloc[1].tolist() == history[COLUMNS].iloc[2].tolist() != history[COLUMNS].iloc[3].tolist() and not history[CHANGES][1:].isna().any(axis=None)


def test_mixed_precision_and_accumulation(on_cpu):
    learn = plain(ours, fp16.MixedPrecision(), GradientAccumulation(n_acc=8), GradientClip(.05))
    learn.fit(2, .01)
    check(logged(learn)[1:], by_hand(ours, 2, acc=2, clip=.05, cast=True), rtol=.02, atol=1e-5)


def test_a_frozen_layer_has_no_gradient(tmp_path):
    learn = learner(tmp_path)
    learn.model[0].requires_grad_(False)
    history = fit(learn, 1).gamma_logger.history
    assert list(history.columns) == ['step', 'epoch', *COLUMNS, 'grad_2', *CHANGES] and (history.gamma_0 == 0).all()


@pytest.mark.parametrize('kwargs,match', [(dict(every=0), 'every'), (dict(every=1.5), 'every'), (dict(every=True), 'every'), (dict(history=[1]), 'history.*list'), (dict(history=pd.DataFrame({'a': [1]})), r"history.*\['a'\]")])
def test_gamma_logger_refuses(kwargs, match):
    with pytest.raises((TypeError, ValueError), match=match): GammaLogger(**kwargs)


# --- Ctrl-C, wherever it comes

class Stops(nn.Module):
    "Passes on what it gets, but for the `n`-th call, or its backward pass"
    def __init__(self, n=0, backward=False):
        super().__init__()
        self.n, self.backward = n, backward
    def forward(self, x):
        if not self.training: return x
        self.n -= 1
        if self.n: return x
        if not self.backward: raise KeyboardInterrupt
        if x.requires_grad: x.register_hook(self.stop)
        return x
    def stop(self, grad): raise KeyboardInterrupt

class Data:
    "Twelve pictures; reading the `n`-th one is interrupted, once"
    def __init__(self): self.n = 0
    def __len__(self): return 12
    def new_empty(self): return Data()
    def __getitem__(self, i):
        self.n -= 1
        if not self.n: raise KeyboardInterrupt
        return picture(i), target(i)

@pytest.mark.parametrize('own', [False, True])
@pytest.mark.parametrize('where', ['forward', 'backward', 'data', 'before_batch'])
def test_ctrl_c_leaves_nothing_on_the_model(tmp_path, where, own):
    data, loggers = Data(), [GammaLogger(), AttentionMapLogger(PICTURES[:2], points=[(1, 2)])]
    dl = DataLoader(data, bs=4, num_workers=0)
    model = nn.Sequential(SelfAttention(8), Stops(2 if where in ('forward', 'backward') else 0, where == 'backward'), SelfAttention(8))
    if own: model.forward = mine = lambda x: nn.Sequential.forward(model, x) * 2
    learn = Learner(DataLoaders(dl, dl), model, loss_func=MSELossFlat(), path=tmp_path, cbs=loggers)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    if where == 'data': learn('before_fit'), setattr(data, 'n', 6)
    cbs = [RaiseAt(KeyboardInterrupt(), 'before_batch', 2)] if where == 'before_batch' else []
    with pytest.raises(KeyboardInterrupt): learn.fit(1, .01, cbs=cbs)
    steps = loggers[0].history.step.tolist()
    assert steps == [0, 1] and loggers[1].maps()[1] == [0]
    if where == 'before_batch':                         # nobody is told; the next call of the model, a copy or a file do as well as ever
        learn.export()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            loaded = load_learner(tmp_path / 'export.pkl')
        for m in (copy.deepcopy(model), loaded.model, model):
            m.eval()(PICTURES[:2])
            assert own or clean(m)
    if own:
        assert vars(model)['forward'] is mine
        del model.forward
    assert clean(model)
    learn.fit(2, .01)
    assert loggers[0].history.step.tolist() == list(range(8)) and loggers[1].maps()[1] == [0, 1, 2] and clean(model)


# --- resumed, wrapped, compiled, copied

@pytest.mark.parametrize('history', [False, True])
def test_resumed_in_a_new_learner(tmp_path, history):
    old = fit(learner(tmp_path), 3)
    old.gamma_logger.history.to_csv(tmp_path / 'gamma.csv', index=False)
    logger = GammaLogger(history=pd.read_csv(tmp_path / 'gamma.csv') if history else None)
    maps = AttentionMapLogger(PICTURES[:1], every=2)
    new = learner(tmp_path, logger, maps, spy := Spy(), logger=None)
    new.model.load_state_dict(old.model.state_dict())
    fit(new, 5, start_epoch=3)
    found, known = logger.history, old.gamma_logger.history
    if history:
        pd.testing.assert_frame_equal(found[:10], known, check_dtype=False)
        assert found.step.tolist() == list(range(16)) and found[COLUMNS][10:].values.tolist() == spy.steps[1:]
        np.testing.assert_allclose(found.epoch, np.arange(16) / 3)
    else:
        assert found.step.tolist() == list(range(7)) and found[COLUMNS].values.tolist() == spy.steps
        np.testing.assert_allclose(found.epoch, 3 + np.arange(7) / 3)
    assert maps.maps()[1] == [3, 4, 5] and len(new.rows) == 5


def test_a_history_that_ends_within_an_epoch_goes_on_where_training_does(tmp_path):
    known = fit(learner(tmp_path), 2).gamma_logger.history[:6]
    logger = GammaLogger(history=known)
    fit(learner(tmp_path, logger, logger=None), 4, start_epoch=2)
    np.testing.assert_allclose(logger.history.epoch, [*np.arange(6) / 3, *(2 + np.arange(1, 7) / 3)])


def test_data_parallel(tmp_path):
    runs = []
    for wrap in (lambda m: m, nn.DataParallel):
        learn = learner(tmp_path, AttentionMapLogger(PICTURES[:2]), make=ours)
        learn.model = wrap(learn.model)
        fit(learn, 1)
        runs.append((learn.gamma_logger.history, learn.attention_map_logger.maps(), learn.attention_map_logger.stats))
        assert clean(learn.model)
    pd.testing.assert_frame_equal(runs[0][0], runs[1][0])
    pd.testing.assert_frame_equal(runs[0][2], runs[1][2])
    assert runs[0][1][:3] == runs[1][1][:3] and torch.equal(runs[0][1][3], runs[1][1][3])


@pytest.mark.parametrize('how', ['function', 'method', 'forward'])
def test_compiled_model(tmp_path, how):
    def train(*cbs):
        torch._dynamo.reset()
        graphs = []
        def backend(graph, inputs):
            graphs.append(graph)
            return graph
        learn = learner(tmp_path, *cbs, make=ours, logger=None)
        start(learn.model).state_dict()                   # settled, which would be a graph of its own
        if how == 'function': learn.model = torch.compile(learn.model, backend=backend)
        elif how == 'method': learn.model.compile(backend=backend)
        else: learn.model.forward = torch.compile(learn.model.forward, backend=backend)
        fit(learn, 2)
        return learn, len(graphs)
    plain, n = train()
    with pytest.warns(UserWarning, match='cannot be seen inside a compiled model') as seen: learn, m = train(GammaLogger(), AttentionMapLogger(PICTURES[:2]))
    assert n and m == n and len([w for w in seen if 'GammaLogger' in str(w.message)]) == 1 and same(state(plain), state(learn))
    history = learn.gamma_logger.history
    assert list(history.columns) == ['step', 'epoch', *COLUMNS, *GRADS] and not history[1:].isna().any(axis=None) and history[COLUMNS].iloc[-1].tolist() == gammas(learn)
    assert learn.attention_map_logger.maps()[1] == [0, 1, 2]
    eager = fit(learner(tmp_path, make=lambda: start(ours())), 2).gamma_logger.history
    np.testing.assert_allclose(history[COLUMNS + GRADS], eager[COLUMNS + GRADS], rtol=1e-4, atol=1e-7)


def test_the_model_can_be_copied_and_the_learner_exported_after_training(tmp_path):
    learn = fit(learner(tmp_path, AttentionMapLogger(PICTURES[:2])))
    learn.logger = print
    x = PICTURES[:3]
    twin = copy.deepcopy(learn.model).eval()
    assert torch.equal(twin(x), learn.model.eval()(x)) and clean(twin)
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    assert torch.equal(loaded.model.eval()(x), twin(x)) and torch.equal(loaded.attention_map_logger.maps()[3], learn.attention_map_logger.maps()[3])
    assert loaded.attention_map_logger.stats.equals(learn.attention_map_logger.stats)


def test_exported_untrained(tmp_path):
    learn = learner(tmp_path, AttentionMapLogger())
    learn.logger = print
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    assert len(loaded.validate(dl=learn.dls.valid)) == 1 and loaded.get_preds(dl=learn.dls.valid)[0].shape == (7, 8, 3, 5)


DISTRIBUTED = '''
import json, os, torch
from test_loggers import *
maps = AttentionMapLogger(max_n=1, path='maps')
learn = segment([Path(f) for f in json.loads(Path('files.json').read_text())], Path('.'), GammaLogger(), maps)
with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, 2), fit(learn, 1)
rank = os.environ['RANK']
history = learn.gamma_logger.history
Path(f'{rank}.json').write_text(json.dumps(dict(names=list(learn.recorder.metric_names), history=history.iloc[1:, 2:6].values.tolist(), columns=list(history.columns),
                                               seen=[s.epoch for s in maps._seen], files=[f['file'] for f in maps._files], clean=clean(learn.model), gammas=gammas(learn))))
'''

def test_two_processes(tmp_path, files):
    (tmp_path / 'files.json').write_text(json.dumps([str(f) for f in files]))
    train_in_processes(tmp_path, DISTRIBUTED, beside=__file__)
    one, two = (json.loads((tmp_path / f'{i}.json').read_text()) for i in (0, 1))
    assert one['names'] == two['names'] == ['epoch', 'train_loss', 'valid_loss', 'gamma_1', 'gamma_4', 'time']
    assert one['columns'] == two['columns'] and one['history'] == two['history'] and one['history'][-1][:2] == one['gammas'] == two['gammas'] and one['clean'] and two['clean']
    assert one['seen'] == [0, 1, 2, 3] and not two['seen'] and not two['files']
    assert set(one['files']) | {'index.csv'} | {f'growth-{i}-picture-0.{e}' for i in LAYERS for e in ('png', 'gif')} == set(contents(tmp_path / 'maps'))


# --- maps: a small segmenter of pictures in files

SIDE = (10, 14)

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    g = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(g.integers(0, 256, (*SIDE, 3), dtype=np.uint8)).save(folder / f'{i}.png')
        Image.fromarray(g.integers(0, 2, SIDE, dtype=np.uint8)).save(folder / f'mask_{i}.png')
    return [folder / f'{i}.png' for i in range(10)]

def mask(f): return f.with_name(f'mask_{f.name}')

class Draws(nn.Module):
    "Draws a random number in eval mode too, as dropout for estimates of uncertainty does; no gradient is wanted there"
    def forward(self, x):
        assert self.training or not torch.is_grad_enabled()
        return x + 1e-3 * torch.randn(1)

def segmenter(): return nn.Sequential(ConvLayer(3, 8), SelfAttention(8), nn.Dropout2d(.2), nn.MaxPool2d(2), PooledSelfAttention2d(8), nn.Upsample(SIDE), nn.Conv2d(8, 2, 1), Draws())
def segmenter_of_fastai(): return nn.Sequential(ConvLayer(3, 8), fastai.layers.SelfAttention(8), nn.Dropout2d(.2), fastai.layers.PooledSelfAttention2d(8), nn.Conv2d(8, 2, 1))
LAYERS = ['1', '4']

def segment(files, path, *cbs, make=segmenter, tfms=True):
    "Two shuffled, augmented batches an epoch"
    set_seed(5)
    block = DataBlock((ImageBlock, MaskBlock(['wall', 'room'])), get_y=mask, splitter=IndexSplitter([8, 9]),
                      batch_tfms=[*([Flip(), RandomErasing(1., max_count=2)] if tfms else []), Normalize.from_stats([.5, .4, .3], [.2, .3, .25], cuda=False)])
    dls = block.dataloaders(files, bs=4, num_workers=0, device=torch.device('cpu'))
    learn = Learner(dls, make(), loss_func=CrossEntropyLossFlat(axis=1), cbs=list(cbs), path=path)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    return learn

class Maps(Callback):
    "What an `AttentionRecorder` sees in the model before training and after each epoch"
    order = 55
    def __init__(self, x, points): self.x, self.points, self.seen = x, points, []
    def look(self):
        model = copy.deepcopy(self.learn.model).eval()
        with torch.no_grad(), AttentionRecorder(model, self.points) as rec: model(self.x)
        self.seen.append(rec)
    def before_fit(self):
        if not self.seen: self.look()
    def after_epoch(self): self.look()

def x_of(learn, files): return learn.dls.test_dl(files, num_workers=0).one_batch()[0].as_subclass(torch.Tensor)

def as_expected(logger, spy, epochs):
    for name in LAYERS:
        found, at, gamma, maps = logger.maps(name)
        assert (found, at) == (name, epochs) and gamma == [spy.seen[e].gammas[name] for e in epochs]
        torch.testing.assert_close(maps, torch.stack([spy.seen[e].maps[name] for e in epochs]), rtol=1e-5, atol=1e-7)
        assert not torch.equal(maps[0], maps[-1])

@pytest.mark.parametrize('every,fits,epochs', [(1, (2, 1), [0, 1, 2, 3]), (2, (5,), [0, 2, 4, 5]), (3, (2, 4), [0, 2, 3, 6]), (9, (2,), [0, 2])])
def test_maps_are_those_of_a_recorder_on_the_model_of_that_epoch(tmp_path, files, every, fits, epochs):
    logger, points = AttentionMapLogger(points=[(0, 13), (7, 2)], every=every), [(0, 13), (7, 2)]
    learn = segment(files, tmp_path, logger)
    learn.add_cb(spy := Maps(x_of(learn, files[8:]), points))
    for n in fits: learn.fit(n, .01)
    assert len(spy.seen) == sum(fits) + 1
    as_expected(logger, spy, epochs)
    assert logger.maps()[0] == '1' and logger.maps('4')[3].shape == (len(epochs), 2, 2, 3, 4) and clean(learn.model)
    stats = logger.stats
    assert stats.epoch.tolist() == [e for e in epochs for _ in range(4)] and stats.layer.tolist() == ['1', '1', '4', '4'] * len(epochs) and stats.picture.tolist() == [0, 1] * 2 * len(epochs)
    for row in stats.itertuples():
        rec = spy.seen[row.epoch]
        want = rec.stats[row.layer]
        np.testing.assert_allclose([row.gamma, row.change, row.entropy, row.entropy_share, row.distance],
                                   [rec.gammas[row.layer], rec.changes[row.layer][row.picture], *(t[row.picture].mean() for t in (want.entropy, want.entropy_share, want.distance))], rtol=1e-5, atol=1e-7)


def test_early_stopping_ends_with_a_record(tmp_path, files):
    logger = AttentionMapLogger(every=10)
    learn = segment(files, tmp_path, logger, EarlyStoppingCallback(min_delta=1e9, patience=2))
    learn.add_cb(spy := Maps(x_of(learn, files[8:]), 'center'))
    learn.fit(9, .01)
    assert logger.maps()[1] == [0, 3]
    as_expected(logger, spy, [0, 3])


def test_layers_and_random_points(tmp_path, files):
    logger = AttentionMapLogger(points=3, layers='4', max_n=1, seed=4)
    learn = segment(files, tmp_path, logger)
    learn.fit(1, .01)
    points = logger._seen[0].points
    with torch.no_grad(), AttentionRecorder(learn.model.eval(), points) as rec: learn.model(x_of(learn, files[8:9]))
    torch.testing.assert_close(logger.maps()[3][1], rec.maps['4'], rtol=1e-5, atol=1e-7)
    assert len(set(points)) == 3 and logger._seen[1].points == points and list(logger._seen[0].maps) == ['4'] and logger.maps()[3].shape == (2, 1, 3, 3, 4)


def test_own_pictures_are_denormalised_and_any_may_be_given(tmp_path, files):
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 255 for f in files])
    for items, want in ((None, pixels[8:]), (files[:3], pixels[:3]), ([str(files[2])], pixels[2:3]), ([PILImage.create(files[4])], pixels[4:5]), (files[1], pixels[1:2])):
        logger = AttentionMapLogger(items)
        segment(files, tmp_path, logger).fit(1)
        torch.testing.assert_close(logger.pictures.images, want, rtol=0, atol=.0041)     # fastai rounds down
        assert logger.maps()[3].shape[:2] == (2, len(want))
    assert logger.pictures.names == ['1.png']
    learn = segment(files, tmp_path, logger := AttentionMapLogger(x := torch.randn(2, 3, 8, 6)))
    learn.fit(1)
    assert torch.equal(logger.pictures.x, x) and logger.maps()[3].shape == (2, 2, 1, 8, 6)


def listing(*folders): return {f: contents(f) for f in folders}

@pytest.fixture
def alone(tmp_path, monkeypatch):
    "The current folder, the folder of temporary files and home, all empty and below `tmp_path`"
    for name in ('cwd', 'tmp', 'home'): (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / 'cwd')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    for name in ('TMPDIR', 'TEMP', 'TMP'): monkeypatch.setenv(name, str(tmp_path / 'tmp'))
    monkeypatch.setattr(tempfile, 'tempdir', None)
    return tmp_path

def test_nothing_is_written_or_drawn_unless_asked_for(alone, files):
    before, figures = listing(alone, files[0].parent), plt.get_fignums()
    logger = AttentionMapLogger()
    segment(files, alone / 'cwd', GammaLogger(), logger).fit(2)
    assert len(logger.maps()[1]) == 3 and listing(alone, files[0].parent) == before and plt.get_fignums() == figures


def test_folder(alone, files):
    points = [(0, 13), (7, 2)]
    logger = AttentionMapLogger(points=points, every=2, path='a/maps')
    learn = segment(files, alone / 'cwd', logger)
    learn.fit(3, .01)
    folder, figures = alone / 'cwd/a/maps', plt.get_fignums()
    def look(epochs):
        index = pd.read_csv(folder / 'index.csv', dtype={'layer': str})
        want = [(e, l, p) for e in epochs for l in LAYERS for p in (0, 1)]
        assert list(index[['epoch', 'layer', 'picture']].itertuples(index=False, name=None)) == want
        assert index.name.tolist() == [files[8 + p].name for _, _, p in want] and set(index.points) == {'(0, 13) (7, 2)'}
        np.testing.assert_allclose(index.gamma, [logger.maps(l)[2][epochs.index(e)] for e, l, _ in want], rtol=1e-6)
        growth = {f'growth-{l}-picture-{p}' for l in LAYERS for p in (0, 1)}
        assert set(contents(alone / 'cwd')) == {f'a/maps/{f}' for f in [*index.file, 'index.csv', *(f'{g}.{e}' for g in growth for e in ('png', 'gif'))]} and index.file.is_unique
        for f in index.file:
            with Image.open(folder / f) as image: assert image.format == 'PNG' and np.asarray(image).std() > 10
        for g in growth:
            with Image.open(folder / f'{g}.gif') as gif: assert gif.format == 'GIF' and gif.is_animated and gif.n_frames == len(epochs)
            with Image.open(folder / f'{g}.png') as image: assert image.format == 'PNG' and image.width > image.height
        assert len({(folder / f).read_bytes() for f in index.file}) == len(index)
        return contents(folder)
    first = look([0, 2, 3])
    assert not contents(alone / 'tmp') and not contents(alone / 'home')
    before = contents(alone)
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=4, show_plot=False)
    assert {k: v for k, v in contents(alone).items()} == before and logger.maps()[1] == [0, 2, 3]
    learn.fit(1, .01)
    second = look([0, 2, 3, 4])
    assert all(second[k] == v for k, v in first.items() if k.startswith('epoch')) and plt.get_fignums() == figures


def test_a_folder_that_is_gone_stays_gone_in_validation(tmp_path, files):
    learn = segment(files, tmp_path, AttentionMapLogger(path=tmp_path / 'maps', max_n=1, layers='1'))
    learn.fit(1)
    shutil.rmtree(tmp_path / 'maps')
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=4, show_plot=False)
    assert not (tmp_path / 'maps').exists()


def test_overlays_show_the_map_and_the_point(tmp_path, files):
    "The same picture drawn by `show_attention` from what a recorder sees"
    from fastai_selfattn.seeing.plot import show_attention
    logger = AttentionMapLogger(points=[(7, 2)], max_n=1, layers='4', path=tmp_path / 'maps')
    learn = segment(files, tmp_path, logger)
    learn.add_cb(spy := Maps(x_of(learn, files[8:9]), [(7, 2)]))
    learn.fit(1, .01)
    with Image.open(tmp_path / 'maps/epoch-001-4-picture-0.png') as image: found = np.asarray(image)
    rec = spy.seen[1]
    fig = plt.figure(figsize=(found.shape[1] / 100, found.shape[0] / 100), dpi=100, layout='constrained')
    show_attention(logger.pictures.images, rec.maps, rec.points, '4', 0, titles=['8.png'], gammas=rec.gammas, pools=rec.pools, changes=rec.changes, shapes=logger.pictures.shapes, ax=fig.subplots(1, 2, squeeze=False))
    fig.canvas.draw()
    want = np.asarray(fig.canvas.buffer_rgba())[..., :3]
    plt.close(fig)
    assert found.shape == want.shape and np.abs(found.astype(int) - want).mean() < .5


# --- lr_find, get_preds, errors

def test_lr_find_and_get_preds_record_nothing(tmp_path, files):
    loggers = [GammaLogger(), AttentionMapLogger(path=tmp_path / 'maps', max_n=1, layers='1')]
    learn = segment(files, tmp_path, *loggers)
    learn.lr_find(num_it=4, show_plot=False), learn.get_preds(), learn.validate()
    assert not len(loggers[0].history) and not loggers[1]._seen and not (tmp_path / 'maps').exists()
    learn.fit(1)
    learn.lr_find(num_it=4, show_plot=False), learn.get_preds(), learn.validate(), learn.get_preds(ds_idx=0)
    assert len(loggers[0].history) == 3 and loggers[1].maps()[1] == [0, 1] and clean(learn.model)


@pytest.mark.parametrize('kwargs,match', [(dict(every=0), '`every` must be 1 or more'), (dict(every=1.5), 'every'), (dict(every=True), 'every'), (dict(max_n=0), '`max_n` must be 1 or more'), (dict(points=None), 'points')])
def test_map_logger_refuses(kwargs, match):
    with pytest.raises((TypeError, ValueError), match=match): AttentionMapLogger(**kwargs)


@pytest.mark.parametrize('kwargs,match', [(dict(points=[(3, 14)]), r'\(3, 14\) is not on (an|the) image of 10x14'), (dict(points=[(1, 2, 3)]), 'not on'), (dict(points=[]), 'points'), (dict(points='corner'), 'points'),
                                          (dict(points=141), '141 different points'), (dict(layers='9'), 'no attention layer 9'), (dict(items=[]), 'no pictures'), (dict(items=[Path('none.png')]), 'none.png')], ids=named)
def test_errors_before_training_leave_learner_and_disk_as_they_were(tmp_path, files, kwargs, match):
    learn = segment(files, tmp_path, GammaLogger(), CSVLogger())
    (tmp_path / 'history.csv').write_text('of an earlier run')
    before, weights, cbs, seeds = contents(tmp_path), state(learn), list(learn.cbs), torch.get_rng_state()
    with pytest.raises((ValueError, FileNotFoundError), match=match): learn.fit(1, cbs=AttentionMapLogger(path=tmp_path / 'maps', **kwargs))
    assert contents(tmp_path) == before and same(state(learn), weights) and list(learn.cbs) == cbs and torch.equal(torch.get_rng_state(), seeds) and not hasattr(learn, 'attention_map_logger')
    assert clean(learn.model) and not len(learn.gamma_logger.history)
    learn.fit(1)


def test_never_over_other_maps(tmp_path, files):
    one, two = (AttentionMapLogger(path=tmp_path / 'maps', max_n=1, layers='1') for _ in range(2))
    (tmp_path / 'maps').mkdir()                       # an empty folder is fine
    learn = segment(files, tmp_path)
    learn.fit(1, cbs=one)
    before = contents(tmp_path)
    for path in (tmp_path / 'maps', str(tmp_path / 'maps'), tmp_path / 'maps/index.csv'):
        with pytest.raises(ValueError, match='new or empty folder'): AttentionMapLogger(path=path)
    with pytest.raises(ValueError, match='new or empty folder'): learn.fit(1, cbs=two)
    assert contents(tmp_path) == before


def test_model_without_attention_warns_once_and_has_no_maps(tmp_path, files):
    logger = AttentionMapLogger(path=tmp_path / 'maps')
    learn = segment(files, tmp_path, logger, make=lambda: nn.Conv2d(3, 2, 1))
    with pytest.warns(UserWarning, match='no attention layer in this model, so there are no maps') as seen: learn.fit(2)
    assert len([w for w in seen if 'AttentionMapLogger' in str(w.message)]) == 1 and not (tmp_path / 'maps').exists()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=4, show_plot=False)
    with pytest.raises(ValueError, match='nothing was recorded'): logger.maps()
    assert not len(logger.stats)


# --- looking at what was recorded

def test_growth_and_gif(tmp_path, files):
    logger = AttentionMapLogger(points=[(0, 13), (7, 2)])
    for f in (logger.maps, logger.show_growth, lambda: logger.save_gif(tmp_path / 'a.gif')):
        with pytest.raises(ValueError, match='nothing was recorded'): f()
    segment(files, tmp_path, logger).fit(3, .01)
    for kwargs, match in ((dict(layer='2'), "no attention layer '2': there are 1, 4"), (dict(picture=2), '`picture` must be 0 to 1, got 2'), (dict(point=-3), '`point` must be 0 to 1')):
        for f in (logger.show_growth, lambda **kw: logger.save_gif(tmp_path / 'a.gif', **kw)):
            with pytest.raises(ValueError, match=match): f(**kwargs)
    assert not (tmp_path / 'a.gif').exists()
    _, epochs, gamma, maps = logger.maps('4')
    axs = logger.show_growth(1, 1, '4', max_n=3)
    assert len(axs) == 3
    shown = [0, 2, 3] if '2' in axs[1].get_title() else [0, 1, 3]
    for ax, e in zip(axs, shown):
        assert f'epoch {e}' in ax.get_title() and f'gamma {gamma[e]:.3g}' in ax.get_title()
        np.testing.assert_allclose(ax.images[-1].get_array(), maps[e, 1, 1] * 12, rtol=1e-5)
        assert {tuple(line.get_xydata()[0]) for line in ax.lines} == {(2., 7.)}
    given = plt.subplots(1, 4)[1]
    assert logger.show_growth(ax=given)[0] is given[0]
    plt.close('all')
    logger.save_gif(tmp_path / 'a.gif', 1, 0, '1', seconds=.2), logger.save_gif(tmp_path / 'b.gif', 0, 1, '1')
    with Image.open(tmp_path / 'a.gif') as gif:
        times = [gif.seek(i) or gif.info['duration'] for i in range(gif.n_frames)]
        assert times == [200, 200, 200, 600] and gif.info['loop'] == 0
    assert (tmp_path / 'a.gif').read_bytes() != (tmp_path / 'b.gif').read_bytes()


# --- TensorBoard and Weights & Biases

def test_tensorboard(alone, files):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    loggers, spy = [GammaLogger(), AttentionMapLogger(every=2)], Spy()
    learn = segment(files, alone / 'cwd', *loggers, spy)
    learn.fit(3, .01, cbs=TensorBoardCallback(log_dir='board', trace_model=False, log_preds=False))
    assert {Path(f).parts[0] for f in contents(alone / 'cwd')} == {'board'} and not contents(alone / 'home')
    events = EventAccumulator(str(alone / 'cwd/board'), size_guidance=dict(scalars=0, images=0)).Reload()
    for i, name in enumerate(LAYERS):
        found = events.Scalars(f'gamma_{name}')
        assert [e.step for e in found] == [2, 4, 6]
        np.testing.assert_allclose([e.value for e in found], [g[i] for g in spy.epochs], rtol=1e-6)
        for f in files[8:]:
            images = events.Images(f'attention/{name}/{f.name}')
            assert [e.step for e in images] == [0, 4, 6] and len({e.encoded_image_string for e in images}) == 3
            assert all(e.encoded_image_string.startswith(b'\x89PNG') and e.width > e.height for e in images)
    assert len(events.Tags()['images']) == 4
    learn.lr_find(num_it=4, show_plot=False)
    assert {Path(f).parts[0] for f in contents(alone / 'cwd')} <= {'board', 'models'}


def records(file):
    "Records of a W&B run: a LevelDB log after a header of 7 bytes"
    from wandb.proto import wandb_internal_pb2 as pb
    data, at, part = file.read_bytes(), 7, b''
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768
        n, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
        part, at = part + data[at + 7:at + 7 + n], at + 7 + n
        if kind in (1, 4):               # whole, or the last part
            record = pb.Record()
            record.ParseFromString(part)
            yield record
            part = b''

def test_weights_and_biases(alone, files, monkeypatch):
    for k, v in dict(MODE='offline', DIR=alone / 'wandb_run', SILENT='true', CACHE_DIR=alone / 'wandb_cache', CONFIG_DIR=alone / 'wandb_config', DATA_DIR=alone / 'wandb_data').items(): monkeypatch.setenv(f'WANDB_{k}', str(v))
    (alone / 'wandb_run').mkdir()
    import fastai.callback.wandb, wandb
    monkeypatch.setattr(fastai.callback.wandb, 'init_args', fastai.callback.wandb.init_args)     # what the loggers mend is undone
    loggers, spy = [GammaLogger(), AttentionMapLogger(every=2, max_n=1)], Spy()
    learn = segment(files, alone / 'cwd', *loggers, spy)
    wandb.init(project='gamma', settings=wandb.Settings(console='off'))
    try:
        learn.fit(3, .01, cbs=fastai.callback.wandb.WandbCallback(log_preds=False))
        config = dict(wandb.run.config)
    finally:
        wandb.finish()
        wandb.teardown()
    file, = (alone / 'wandb_run').rglob('*.wandb')
    rows = [{i.key or '.'.join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in records(file) if r.HasField('history')]
    gamma = [[r['_step']] + [r[f'gamma_{name}'] for name in LAYERS] for r in rows if 'gamma_1' in r]
    np.testing.assert_allclose(gamma, [[s, *g] for s, g in zip((1, 3, 5), spy.epochs)], rtol=1e-6)
    for name in LAYERS:
        image = f'attention/{name}/8.png'
        images = [r for r in rows if f'{image}.path' in r]
        assert [r['_step'] for r in images] == [0, 3, 5] and {r[f'{image}._type'] for r in images} == {'image-file'}
        paths = [file.parent / 'files' / r[f'{image}.path'] for r in images]
        assert len({p.read_bytes() for p in paths}) == 3 and all(p.read_bytes().startswith(b'\x89PNG') for p in paths)
    assert config['batch size'] == learn.dls.bs and config['GammaLogger'] == dict(every=1)
    assert [r['_step'] for r in rows if 'raw_loss' in r] == list(range(6)) and sum(k.endswith('.png.path') for r in rows for k in r) == 6
    assert not contents(alone / 'cwd') and not contents(alone / 'home')


def test_wandb_is_mended_only_where_it_fails(monkeypatch):
    wandb = pytest.importorskip('fastai.callback.wandb')
    ours = SimpleNamespace(a=1)
    def broken(o): return vars(o)
    def whole(o): return getattr(o, '__dict__', {})
    for init_args, cbs, is_mended in ((whole, [wandb.WandbCallback()], False), (broken, [GammaLogger()], False), (broken, [wandb.WandbCallback()], True)):
        monkeypatch.setattr(wandb, 'init_args', init_args)
        mend_wandb(cbs)
        assert (wandb.init_args is not init_args) == is_mended
    assert wandb._format_config(dict(flag=True, n=8, name='cuda', none=None, ours=ours, list=[1])) == dict(flag=True, n=8, name='cuda', none=None, ours=dict(a=1, _name=ours), list=[1])
    assert wandb.init_args(SimpleNamespace(dls=1, model=2, cbs=3, lr=4)) == dict(lr=4)
    mended = wandb.init_args
    mend_wandb([wandb.WandbCallback()])
    assert wandb.init_args is mended                # once is enough


# --- training goes the same way with and without

def everything(learn):
    "What training leaves: losses, table, weights, the optimizer's state and where random numbers go on"
    opt = [v for s in learn.opt.state_dict()['state'] for v in s.values() if isinstance(v, torch.Tensor)]
    return [torch.stack([torch.as_tensor(l) for l in learn.recorder.losses]), torch.tensor([list(r)[:2] for r in learn.recorder.values]), *state(learn).values(), *opt,
            torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64)), torch.tensor(random.getstate()[1])]

def equal(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))

def board(folder):
    from fastai.callback.tensorboard import TensorBoardCallback
    return TensorBoardCallback(log_dir=folder, trace_model=False, log_preds=False)

@pytest.mark.parametrize('make', [segmenter, segmenter_of_fastai], ids=lambda f: f.__name__)
def test_training_is_the_same_bit_by_bit(tmp_path, files, make):
    def train(*cbs):
        learn = segment(files, tmp_path, *cbs, make=make)
        learn.fit(2, .01), learn.fit(1, .01)
        return everything(learn)
    plain = train()
    set_seed(6)
    assert not torch.equal(plain[-3], torch.get_rng_state()) and equal(plain, train())     # random numbers are drawn, and training can be repeated
    for cbs in ([GammaLogger()], [GammaLogger(every=2), AttentionMapLogger()], [AttentionMapLogger(files[:1], points=3, layers='*1' if make is segmenter else '3', path=tmp_path / 'maps'), GammaLogger()]): assert equal(plain, train(*cbs)), cbs
    assert equal(train(board(tmp_path / 'a')), train(board(tmp_path / 'b'), GammaLogger(), AttentionMapLogger(max_n=1)))
    learn = segment(files, tmp_path, make=make, tfms=False)
    learn.fit(3, .01)
    assert not equal(plain[:1], everything(learn)[:1])                                        # augmentation does something


def test_training_a_unet_is_the_same_bit_by_bit(tmp_path):
    def train(*cbs):
        set_seed(8)
        g = torch.Generator().manual_seed(0)
        data = [(torch.randn(3, 64, 64, generator=g), torch.randint(2, (64, 64), generator=g)) for _ in range(4)]
        dls = DataLoaders(DataLoader(data, bs=2, shuffle=True), DataLoader(data[:2], bs=2))
        model = create_unet_model(small_encoder, 2, (64, 64), pretrained=False, self_attention=True)
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(axis=1), cbs=list(cbs), path=tmp_path)
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda row: None
        learn.fit(2, 1e-3)
        return learn
    loggers = [GammaLogger(), AttentionMapLogger(torch.randn(1, 3, 64, 64), path=tmp_path / 'maps')]
    plain, learn = train(), train(*loggers)
    assert equal(everything(plain), everything(learn))
    assert len(attention_layers(learn.model)) == 1
    assert loggers[0].history.gamma.iloc[-1] == gammas(learn)[0] != 0 and not loggers[0].history[1:].isna().any(axis=None) and loggers[1].maps()[1] == [0, 1, 2]


def test_overlays_name_the_place_before_the_path(tmp_path, monkeypatch):
    drawn, draw = [], map_logger.show_attention
    def show(*args, **kwargs):
        axs = draw(*args, **kwargs)
        drawn.append(axs[0, 0].texts[0].get_text())
        return axs
    monkeypatch.setattr(map_logger, 'show_attention', show)
    learn = unet_learner(rooms_dls(8, 32, bs=4), small_encoder, pretrained=False, self_attention=True, n_out=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=AttentionMapLogger(max_n=1, path=tmp_path / 'maps'))
    assert len(drawn) == 2 and all('decoder.1 (layers.5.conv2.2)' in text for text in drawn)


# --- what fails outside does not end training

def no_space(*args, **kwargs): raise OSError(28, 'No space left on device')

class Sabotage(Callback):
    order = 90
    def __init__(self, f): self.f = f
    def after_epoch(self):
        if self.epoch == 0: self.f()

def sabotaged(tmp_path, files, f, fragment):
    "Train three epochs, `f` called after the first; one warning, and training as without the logger"
    plain = segment(files, tmp_path)
    plain.fit(3, .01)
    plain = everything(plain)
    logger = AttentionMapLogger(path=tmp_path / 'maps', max_n=1, layers='4')
    learn = segment(files, tmp_path, GammaLogger(), logger, Sabotage(f))
    with pytest.warns(UserWarning, match=fragment) as seen: learn.fit(3, .01)
    assert len([w for w in seen if 'training goes on' in str(w.message)]) == 1 and equal(plain, everything(learn)) and clean(learn.model)
    return learn, logger

@pytest.mark.parametrize('what', ['save', 'to_csv'])
def test_a_full_disk(tmp_path, files, monkeypatch, what):
    def fill(): monkeypatch.setattr(*((Image.Image, 'save') if what == 'save' else (pd.DataFrame, 'to_csv')), no_space)
    learn, logger = sabotaged(tmp_path, files, fill, 'cannot write to `path`, training goes on: .*No space left')
    assert logger.maps()[1] == [0, 1, 2, 3]
    index = pd.read_csv(tmp_path / 'maps/index.csv')
    assert set(index.epoch) == {0, 1} and set(index.file) <= set(contents(tmp_path / 'maps'))
    monkeypatch.undo()
    learn.fit(1, .01)                                   # there is room again
    index = pd.read_csv(tmp_path / 'maps/index.csv')
    assert 4 in set(index.epoch) and set(index.file) <= set(contents(tmp_path / 'maps'))


def test_a_lost_folder(tmp_path, files):
    def lose():
        shutil.rmtree(tmp_path / 'maps')
        (tmp_path / 'maps').write_text('')
    learn, logger = sabotaged(tmp_path, files, lose, 'cannot write to `path`')
    assert logger.maps()[1] == [0, 1, 2, 3] and (tmp_path / 'maps').is_file()


def test_an_error_in_the_recorder(tmp_path, files, monkeypatch):
    class Broken(AttentionRecorder):
        def __exit__(self, *exc):
            super().__exit__(*exc)
            raise ZeroDivisionError('broken')
    learn, logger = sabotaged(tmp_path, files, lambda: monkeypatch.setattr(map_logger, 'AttentionRecorder', Broken), 'maps cannot be recorded, training goes on: broken')
    assert logger.maps()[1] == [0, 1]


def test_an_error_in_the_change_of_the_features(tmp_path, files, monkeypatch):
    def broken(x, out): raise ZeroDivisionError('broken')
    monkeypatch.setattr(gamma_logger, 'change_share', broken)
    learn = segment(files, tmp_path, GammaLogger())
    with pytest.warns(UserWarning, match='change of the features is not logged: broken') as seen: learn.fit(2, .01)
    assert len([w for w in seen if 'GammaLogger' in str(w.message)]) == 1
    plain = segment(files, tmp_path)
    plain.fit(2, .01)
    assert same(state(plain), state(learn)) and list(learn.gamma_logger.history.columns) == ['step', 'epoch', *(f'{k}_{n}' for k in ('gamma', 'grad') for n in LAYERS)]


def test_pictures_that_tensorboard_does_not_take(tmp_path, files, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter
    monkeypatch.setattr(SummaryWriter, 'add_image', no_space)
    logger = AttentionMapLogger(max_n=1)
    learn = segment(files, tmp_path, logger)
    with pytest.warns(UserWarning, match='no pictures for TensorBoard, training goes on: .*No space left') as seen: learn.fit(2, .01, cbs=board(tmp_path / 'board'))
    assert len([w for w in seen if 'AttentionMapLogger' in str(w.message)]) == 1 and logger.maps()[1] == [0, 1, 2]


@pytest.mark.parametrize('kwargs,error,says', [(dict(points='corner'), ValueError, "got 'corner'"), (dict(points=[(1.5, 2)]), ValueError, r'got \(1.5, 2\)'), (dict(points=0), ValueError, 'got 0'),
                                               (dict(layers=3), TypeError, '`layers` must be names'), (dict(layers=[3]), TypeError, '`layers` must be names')], ids=named)
def test_wrong_points_and_layers_are_named_at_construction(kwargs, error, says):
    with pytest.raises(error, match=says): AttentionMapLogger(**kwargs)


class Adds(nn.Module):
    "Adds `share` of the map to itself"
    def __init__(self, share):
        super().__init__()
        self.share,self.gamma = share,nn.Parameter(torch.ones(1))

    def forward(self, x): return x + self.share*self.gamma.detach()*x + 0*self.gamma

class Twice(nn.Module):
    "Calls one layer on all pictures, and again, with another share, on the first of them"
    def __init__(self):
        super().__init__()
        self.conv,self.attn = nn.Conv2d(3, 3, 1),Adds(.5)
        self.attn.attention_place = None

    def forward(self, x):
        x = self.conv(x)
        self.attn.share = .5
        y = self.attn(x)
        self.attn.share = .2
        return y + 0*self.attn(x[:1]).sum()

def test_change_of_a_layer_that_is_called_twice_in_a_step():
    "The mean over all calls and pictures: three at .5 and one at .2"
    data = [(torch.randn(3, 4, 6), torch.randn(3, 4, 6)) for _ in range(3)]
    learn = Learner(DataLoaders(DataLoader(data, bs=3), DataLoader(data, bs=3)), Twice(), loss_func=MSELossFlat(), cbs=GammaLogger())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.gamma_logger.history.change.iloc[-1] == pytest.approx((3*.5+.2)/4, rel=1e-4)

def test_two_gamma_loggers_add_one_column():
    learn = Learner(DataLoaders(DataLoader([(torch.randn(8, 3, 5),)*2]*4, bs=2), DataLoader([(torch.randn(8, 3, 5),)*2]*4, bs=2)), nn.Sequential(SelfAttention(8)),
                    loss_func=MSELossFlat(), cbs=GammaLogger())
    with learn.no_bar(), pytest.warns(UserWarning, match='another `GammaLogger`'): learn.fit(1, cbs=(second := GammaLogger()))
    assert list(learn.recorder.metric_names).count('gamma') == 1 and len(learn.recorder.values[-1]) == 3
    assert len(second.history) == 3 and len(next(cb for cb in learn.cbs if isinstance(cb, GammaLogger)).history) == 3

@pytest.mark.parametrize('frozen', ['gamma', 'all'])
def test_what_is_frozen_on_purpose_is_not_called_unknown(tmp_path, files, frozen):
    learn = segment(files, tmp_path, GammaLogger())
    layer = learn.model.get_submodule('1')
    for p in ([layer.gamma] if frozen == 'gamma' else layer.parameters()): p.requires_grad_(False)
    learn.create_opt()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1, .01)

def test_without_a_recorder_there_is_no_table_and_training_goes_on(tmp_path, files):
    learn = segment(files, tmp_path, GammaLogger())
    learn.remove_cb(Recorder)
    learn.fit(1, .01)
    assert len(learn.gamma_logger.history) > 1

def test_maps_go_where_they_were_told_to_when_the_folder_changes(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'other'/'maps').mkdir(parents=True)
    class Move(Callback):
        def after_epoch(self): os.chdir(tmp_path/'other')
    segment(files, tmp_path, AttentionMapLogger(path='maps'), Move()).fit(2, .01)
    assert len(list((tmp_path/'maps').iterdir())) > 4 and not list((tmp_path/'other'/'maps').iterdir())

@pytest.mark.parametrize('kwargs,error,says', [(dict(picture='a'), TypeError, '`picture` must be a whole number'), (dict(point='wall'), TypeError, '`point` must be a whole number'), (dict(picture=.5), TypeError, '`picture`'),
    (dict(seconds=-1), ValueError, '`seconds` must be from'), (dict(seconds=float('nan')), ValueError, '`seconds` must be from'), (dict(seconds=1e9), ValueError, '`seconds` must be from'), (dict(seconds='x'), TypeError, '`seconds`')], ids=str)
def test_growth_and_gif_check_what_they_get(tmp_path, files, kwargs, error, says):
    logger = AttentionMapLogger()
    segment(files, tmp_path, logger).fit(1, .01)
    with pytest.raises(error, match=says): logger.save_gif(tmp_path/'a.gif', **kwargs)
    if 'seconds' not in kwargs:
        with pytest.raises(error, match=says): logger.show_growth(**kwargs)
    assert not (tmp_path/'a.gif').exists()
    with pytest.raises(TypeError, match='`seed` must be a whole number'): AttentionMapLogger(seed='a')
