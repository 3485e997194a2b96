"What attention does for the score: three validations that leave no trace."
import copy, random
import fastai.layers
import numpy as np
import pytest, torch
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Metric
from fastai.metrics import mae
from torch import nn

from fastai_selfattn.all import AttentionMapLogger, GammaLogger, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, attention_uniform
from fastai_selfattn.seeing.effect import AttentionEffect, attention_effect, change_in_words
from fastai_selfattn.seeing.interpret import AttentionInterpretation
from fastai_selfattn.seeing.map_logger import _file

X = torch.randn(14, 3, 6, 10, generator=torch.Generator().manual_seed(1))

def net(gamma=1., layer=SelfAttention):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), layer(16), nn.ReLU(), nn.Conv2d(16, 3, 1)).eval()
    nn.init.constant_(model[1].gamma, gamma)
    return model

def learner(model, tmp_path, **kwargs):
    y = X.flip(-1)
    dls = DataLoaders.from_dsets([*zip(X[:9], y[:9])], [*zip(X[9:], y[9:])], bs=2, num_workers=0, device='cpu')
    return Learner(dls, model, loss_func=nn.functional.mse_loss, metrics=[mae], path=tmp_path, **kwargs)


@pytest.mark.parametrize('layer', [SelfAttention, PooledSelfAttention2d, fastai.layers.SelfAttention, fastai.layers.PooledSelfAttention2d, lambda c: SelfAttention(c, heads=2, reduction=4, unit=True, scale=9.)],
                         ids=['ours', 'ours pooled', 'fastai', 'fastai pooled', 'heads'])
def test_uniform_maps(layer):
    layer = net(layer=layer)[1].requires_grad_(False)
    x = 3 * torch.randn(2, 16, 6, 10)
    before = layer(x)
    with attention_uniform(nn.Sequential(layer)): y = layer(x)
    added = y - x
    assert (added - added[..., :1, :1]).abs().max() < 1e-4 < 1e-2 < (before - y).abs().max()
    assert torch.equal(layer(x), before) and not layer.query._forward_hooks

def test_uniform_undone_after_an_error_and_refused_where_there_is_no_softmax():
    model = net()
    with pytest.raises(RuntimeError, match='mine'), attention_uniform(model): raise RuntimeError('mine')
    assert not model[1].query._forward_hooks
    for layer in (SimpleSelfAttention(16), SelfAttention(16, softmax=False)):
        both = nn.Sequential(SelfAttention(16), layer)
        with pytest.raises(ValueError, match='1 .*cannot be made uniform'), attention_uniform(both): pass
        assert not both[0].query._forward_hooks
        with attention_uniform(both, '0'): assert both[0].query._forward_hooks

def test_three_rows_by_hand(tmp_path):
    learn = learner(net(), tmp_path)
    effect = learn.attention_effect()
    x, y = X[9:], X[9:].flip(-1)
    def score(model):
        with torch.no_grad(): out = model(x)
        return [nn.functional.mse_loss(out, y).item(), (out - y).abs().mean().item()]
    on, off, mean = net(), net(gamma=0.), net()
    with torch.no_grad():
        mean[1].query = nn.Sequential(nn.Conv1d(16, 2, 1, bias=False))
        mean[1].query[0].weight.zero_()
        given = on[0](x)
        change = (on[1](given) - given).flatten(1).norm(dim=1) / given.flatten(1).norm(dim=1)
    assert effect.table.index.tolist() == ['on', 'off', 'uniform maps'] and effect.table.columns.tolist() == ['valid_loss', 'mae']
    for row, model in zip(effect.table.values, (on, off, mean)): assert row == pytest.approx(score(model), rel=1e-4)
    assert len({round(v, 6) for v in effect.table['mae']}) == 3
    assert effect.changes == {'1': pytest.approx(change.mean().item(), rel=1e-4)}
    assert effect.used and f"valid_loss with attention on {effect.table['valid_loss'].iloc[0]:.4g}" in effect.sentence and effect.sentence in effect._repr_html_()

def test_nothing_is_left_behind(tmp_path):
    learn = learner(net(gamma=.3), tmp_path, cbs=[GammaLogger(), CSVLogger(), SaveModelCallback(monitor='mae'), AttentionMapLogger(path=tmp_path / 'maps')])
    with learn.no_bar(): learn.fit(2, 1e-3)
    files = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    cbs, values, modes = list(learn.cbs), copy.deepcopy(learn.recorder.values), [m.training for m in learn.model.modules()]
    best, state, rows = learn.save_model.best, {k: v.clone() for k, v in learn.model.state_dict().items()}, len(learn.gamma_logger.history)
    rng = torch.get_rng_state()
    learn.attention_effect()
    assert torch.equal(torch.get_rng_state(), rng)
    assert learn.cbs == cbs and learn.recorder.values == values and [m.training for m in learn.model.modules()] == modes
    assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} == files and learn.save_model.best == best and len(learn.gamma_logger.history) == rows
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())
    assert not any(m._forward_hooks for m in learn.model.modules())
    with learn.no_bar(): learn.fit(1, 1e-3)

def test_an_error_inside_leaves_the_callbacks(tmp_path):
    learn = learner(net(), tmp_path, cbs=[GammaLogger()])
    cbs = list(learn.cbs)
    learn.loss_func = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError): learn.attention_effect()
    assert learn.cbs == cbs and not any(m._forward_hooks for m in learn.model.modules())

def test_words():
    assert 'does nothing here' in change_in_words(.0099) and 'does nothing' not in change_in_words(.01)
    effect = AttentionEffect([dict(attention='on', valid_loss=1.), dict(attention='off', valid_loss=1.)], {'a': .002, 'b': .3})
    assert effect.used and 'by 30%' in effect.sentence
    assert AttentionEffect(effect.rows, {'a': 0., 'b': .0004}).sentence == 'attention does nothing here: it changes the features by 0.0%.'
    assert AttentionEffect(effect.rows, {'a': .00999}).sentence == 'attention does nothing here: it changes the features by 0.9%.'     # 1.0% would count

def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match='no attention layer'): attention_effect(learner(nn.Conv2d(3, 3, 1), tmp_path))
    learn = learner(net(), tmp_path)
    with pytest.raises(ValueError, match='no attention layer.*7'): learn.attention_effect('7')
    learn.dls = DataLoaders(learn.dls.train)
    with pytest.raises(ValueError, match='no validation data'): learn.attention_effect()
    assert learn.attention_effect(dl=learn.dls.train).table.shape == (3, 2)

# data and metrics of all kinds

def test_an_empty_loader_is_no_data(tmp_path):
    learn = learner(net(), tmp_path)
    for make in (DataLoader, torch.utils.data.DataLoader):
        with pytest.raises(ValueError, match='give `dl`'): attention_effect(learn, dl=make([], 2))

class Value(Metric):
    def __init__(self, value, name='value'): self._value, self._name = value, name
    def reset(self): pass
    def accumulate(self, learn): pass
    @property
    def value(self): return self._value
    @property
    def name(self): return self._name

@pytest.mark.parametrize('value', [None, {'a': 1}, 'good', torch.ones(2), [1, 2]], ids=str)
def test_a_metric_that_is_no_number_is_nan(tmp_path, value):
    learn = learner(net(), tmp_path)
    learn.metrics = [Value(value), Value(.25, 'quarter')]
    t = attention_effect(learn).table
    assert t['value'].isna().all() and t['quarter'].eq(.25).all() and t['valid_loss'].notna().all()

def test_metrics_of_one_name_have_a_column_each(tmp_path):
    learn = learner(net(), tmp_path)
    learn.metrics = [Value(1., 'a'), Value(2., 'a'), Value(3., 'attention'), Value(4., 'a')]
    effect = attention_effect(learn)
    assert list(effect.table) == ['valid_loss', 'a', 'a 2', 'attention 2', 'a 3'] and effect.table.iloc[0, 1:].tolist() == [1, 2, 3, 4]
    assert list(effect.table.index) == ['on', 'off', 'uniform maps'] and 'valid_loss with attention' in effect.sentence

def test_a_recorder_that_records_no_validation_is_no_matter(tmp_path):
    learn = learner(net(), tmp_path)
    learn.recorder.valid_metrics = False
    assert list(attention_effect(learn).table) == ['valid_loss', 'mae'] and learn.recorder.valid_metrics is False

@pytest.mark.parametrize('make', [DataLoader, torch.utils.data.DataLoader, lambda *args, **kwargs: torch.utils.data.DataLoader(*args, generator=torch.Generator(), **kwargs)], ids=['fastai', 'torch', 'torch with a generator'])
def test_all_ways_see_the_same_pictures(tmp_path, make):
    "Also of a loader as for training, which shuffles, augments and drops the last batch; it goes on as if nothing had been drawn"
    class Noisy(list):
        def __getitem__(self, i): x, y = super().__getitem__(i); return x + torch.rand(1), y + np.random.rand()
    def loader():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        return make(Noisy(zip(X, X.flip(-1))), 4, shuffle=True, drop_last=True)
    learn, dl = learner(net(gamma=0.), tmp_path), loader()
    t = attention_effect(learn, dl=dl).table
    assert (t == t.iloc[0]).all(axis=None)
    after, as_new = list(dl), list(loader())
    assert len(after) == 3 and all(torch.equal(a, b) for (a, _), (b, _) in zip(after, as_new, strict=True))

def test_no_learner_no_labels_and_no_loss_are_said(tmp_path):
    learn = learner(net(), tmp_path)
    with pytest.raises(TypeError, match='`learn` must be a Learner, got Sequential'): attention_effect(learn.model)
    for dl in (DataLoader(list(X), 2), torch.utils.data.DataLoader(X, 2)):
        with pytest.raises(ValueError, match='no labels.*give a `dl` with labels'): attention_effect(learn, dl=dl)
    learn.loss_func = None
    for look in (attention_effect, AttentionInterpretation.from_learner):
        with pytest.raises(ValueError, match='has no loss.*set `learn.loss_func`'): look(learn)


class Auxiliary(nn.Module):
    "Attends in training alone"
    def __init__(self, idle=('a',)): super().__init__(); self.conv, self.a, self.b, self.idle = nn.Conv2d(3, 16, 3, padding=1), SelfAttention(16, gamma=.5), SelfAttention(16, gamma=.5), idle; self.last = nn.Conv2d(16, 3, 1)
    def forward(self, x):
        x = self.conv(x)
        for name in 'ab':
            if self.training or name not in self.idle: x = getattr(self, name)(x)
        return self.last(x)

def test_attention_that_does_not_run_in_eval_mode_is_named(tmp_path):
    learn = learner(Auxiliary(('a', 'b')), tmp_path)
    for look in (learn.attention_effect, lambda: AttentionInterpretation.from_learner(learn), learn.show_attention):
        with pytest.raises(ValueError, match='no attention layer ran, in eval mode: a, b'): look()
    learn = learner(Auxiliary(), tmp_path)
    assert list(learn.attention_effect().changes) == ['b']
    with learn.no_bar(): found = AttentionInterpretation.from_learner(learn)
    assert set(found.df.layer) == {'b'} and sorted(found.df.picture) == list(range(5))

def test_any_name_of_a_module_makes_a_name_of_a_file():
    names = [_file(3, name, 0) for name in ('', 'a/b', 'a_b', 'a:b', 'läyer.1')]
    assert names == [f'epoch-003-{n}-picture-0.png' for n in ('model', 'a%2fb', 'a_b', 'a%3ab', 'läyer.1')]
