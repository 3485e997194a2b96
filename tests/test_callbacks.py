"`GammaLogger`: right numbers in the right columns, nothing else changed, and a `Learner` as good as new however training ends"
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException, Callback, FetchPredsCallback
from fastai.callback import schedule  # noqa: F401  gives `Learner` its `lr_find`
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TrackerCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import Datasets
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import MSELossFlat
from fastai.metrics import mae, mse
from fastai.torch_core import set_seed
from hypothesis import given, strategies as st
from torch import nn

from fastai_selfattn.callbacks import GammaLogger, short_names
from fastai_selfattn.layers import SelfAttention

COLUMNS = ['gamma_0', 'gamma_2']

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

def gammas(learn): return [m.gamma.item() for m in learn.model.modules() if isinstance(m, SelfAttention)]

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
    (pixels, COLUMNS, dict(train_metrics=True, valid_metrics=False), (mae, mse))], ids=str)
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
        assert list(history.columns) == ['step', 'epoch', *COLUMNS]
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


def test_training_is_the_same_bit_by_bit(tmp_path):
    runs = []
    for logger in (None, GammaLogger):
        learn = fit(learner(tmp_path, logger=logger), 2)
        runs.append([*state(learn).values(), torch.stack(list(learn.recorder.losses)), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


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
    assert history.step.tolist() == list(range(len(history))) and len(history) == max(steps, 1) + 3 and not history.isna().any(axis=None)
    assert len(learn.validate()) == 1


def test_a_batch_left_out_is_a_step_without_a_change(tmp_path):
    learn = fit(learner(tmp_path, RaiseAt(CancelBatchException(), 'before_batch', 2)), 1)
    history = learn.gamma_logger.history[COLUMNS].values.tolist()
    assert len(history) == 4 and history[1] == history[2] != history[3] == gammas(learn)


def test_gradient_accumulation(tmp_path):
    learn = fit(learner(tmp_path, GradientAccumulation(n_acc=8), spy := Spy()))
    assert learn.gamma_logger.history[COLUMNS].values.tolist() == spy.steps and 1 < len({tuple(s) for s in spy.steps}) < len(spy.steps) == 7


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
    assert history.gamma_4.isna().tolist() == [True] * 4 + [False] * 3 and history.iloc[-1, 2:].tolist() == gammas(learn)


def test_added_for_one_fit_and_taken_off(tmp_path):
    learn = learner(tmp_path, logger=None)
    logger = GammaLogger()
    fit(learn, 1, cbs=logger), fit(learn, 1)
    assert not hasattr(learn, 'gamma_logger') and list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'time'] and len(learn.rows[-1]) == 4
    fit(learn, 1, cbs=logger)
    assert logger.history.step.tolist() == list(range(7)) and list(logger.history.iloc[-1, 2:]) == gammas(learn)


def test_history_is_a_copy(tmp_path):
    learn = fit(learner(tmp_path), 1)
    learn.gamma_logger.history.loc[:, 'gamma_0'] = 5.
    assert learn.gamma_logger.history.gamma_0.iloc[-1] == gammas(learn)[0] != 5


def test_export_keeps_logger_and_history(tmp_path):
    learn = fit(learner(tmp_path))
    learn.logger = print
    history = learn.gamma_logger.history
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    assert loaded.gamma_logger.history.equals(history) and loaded.gamma_logger.learn is loaded
    loaded.dls, loaded.logger = learn.dls, learn.rows.append
    fit(loaded, 1)
    assert loaded.gamma_logger.history.step.tolist() == list(range(10)) and loaded.gamma_logger.history.iloc[-1, 2:].tolist() == gammas(loaded)
    assert learn.gamma_logger.history.equals(history)
