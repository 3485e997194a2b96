"Runs of a seed share their weights, batches and random numbers, and leave no trace."
import random
from functools import partial
import numpy as np
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.metrics import AvgMetric, mae
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.compare.arms import find_arms
from fastai_selfattn.compare.runs import Held, Recipe, build, run, sketch, undone
from torch import nn

def noisy(b):
    "Augmentation that draws from all generators"
    x,y = b
    return x + torch.rand(()) + random.random() + np.random.rand(), y

class Restless(nn.Module):
    "A layer that draws random numbers in each forward pass"
    def __init__(self, c):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, c))
    def forward(self, x):
        random.random(), np.random.rand(), torch.rand(5)
        return x + 0*self.w.sum()

class Spy(Callback):
    "Notes the start weights, and each training batch as it goes into the model"
    order = 90
    def __init__(self, seen): self.seen = seen
    def before_fit(self): self.seen.setdefault('weights', {k: v.clone() for k,v in self.learn.model.state_dict().items()})     # `validate` comes here too
    def before_batch(self):
        if self.training: self.seen.setdefault('batches', []).append(self.learn.xb[0].clone())

def some_dls(augment=noisy):
    xs = torch.randn(21, 3, 6, 7, generator=torch.Generator().manual_seed(5))
    items = list(zip(xs, xs.flip(3)))
    return DataLoaders(DataLoader(items, bs=4, shuffle=True, after_batch=augment), DataLoader(items[:9], bs=9))

def make(dls, seen=None):
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Dropout(.3), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    return Learner(dls, net, loss_func=MSELossFlat(), metrics=mae, cbs=[] if seen is None else Spy(seen))

def train(learn): learn.fit_one_cycle(2, 1e-2)

arms = find_arms({n: n for n in ('attention', 'uniform', 'context', 'conv3', 'conv1')} | {'restless': Restless}, partial(SelfAttention, gamma=1.))
recipe = Recipe(make, train)

def spied(arm, seed, dls):
    seen = {}
    run(Recipe(partial(make, seen=seen), train), dls, seed, arms[arm], '4')
    return seen

def numbers(res): return {k: v for k,v in res.items() if k not in ('ms', 'seconds') and v == v}

@pytest.fixture(scope='module')
def plain():
    torch.manual_seed(99)
    return spied('none', 3, some_dls())

@pytest.mark.parametrize('arm', [a for a in arms if a != 'none'])
def test_arms_of_a_seed_start_alike_and_see_the_same(plain, arm):
    "Bit by bit: the weights of everything else, and all batches in their order with their augmentation"
    torch.manual_seed(7)
    random.seed(7)
    seen = spied(arm, 3, some_dls())
    weights = {k: v for k,v in seen['weights'].items() if k in plain['weights']}
    assert weights.keys() == plain['weights'].keys() and len(seen['weights']) > len(weights)
    assert all(torch.equal(v, plain['weights'][k]) for k,v in weights.items())
    assert len(seen['batches']) == len(plain['batches']) == 12
    assert all(torch.equal(a, b) for a,b in zip(seen['batches'], plain['batches']))

def test_epochs_and_steps_differ(plain):
    "Random numbers that are set anew are not the same in each step"
    assert len({b.sum().item() for b in plain['batches']}) == 12

def test_seeds_differ(plain):
    seen = spied('none', 4, some_dls())
    assert not torch.equal(seen['weights']['0.weight'], plain['weights']['0.weight'])
    assert not torch.equal(seen['batches'][0], plain['batches'][0])

def test_the_layers_differ_by_seed():
    "And attention starts from the same weights as its uniform twin"
    a,b,u = (spied(arm, seed, some_dls())['weights'] for arm,seed in (('attention', 0), ('attention', 1), ('uniform', 0)))
    [key] = [k for k in a if k.endswith('value.0.weight_orig')]
    assert torch.equal(a[key], u[key]) and not torch.equal(a[key], b[key])

def test_done_again_is_the_same():
    dls = some_dls()
    first = run(recipe, dls, 2, arms['attention'], '4')
    torch.manual_seed(1)
    assert numbers(run(recipe, dls, 2, arms['attention'], '4')) == numbers(first)
    assert numbers(run(recipe, dls, 2, arms['none'], '4'))['loss'] != first['loss']

class Grows:
    "A pipeline of transforms, as far as fastai's learners change it"
    def __init__(self): self.fs = ['a']
    def __call__(self, b): return noisy(b)

def stays_as_it_was(dls, act, error=None):
    "Random numbers, loaders and pipelines go on after `act` as if it had not been"
    torch.manual_seed(11), random.seed(12), np.random.seed(13)
    rng,state = dls.train.rng,dls.train.rng.getstate()
    if error:
        with pytest.raises(error): act()
    else: act()
    here = torch.rand(3).tolist(),random.random(),np.random.rand()
    torch.manual_seed(11), random.seed(12), np.random.seed(13)
    assert here == (torch.rand(3).tolist(),random.random(),np.random.rand())
    assert dls.train.rng is rng and rng.getstate() == state
    assert dls.train.after_batch.fs == ['a']

def add_tfm(dls):
    dls.train.after_batch.fs = dls.train.after_batch.fs + ['Normalize']
    return make(dls)

@pytest.mark.parametrize('error', [None, KeyboardInterrupt, RuntimeError])
def test_no_trace(error):
    dls = some_dls(Grows())
    def stop(learn):
        learn.fit(1)
        if error: raise error
    stays_as_it_was(dls, lambda: run(Recipe(add_tfm, stop), dls, 0, arms['attention'], '4'), error)

def test_pytorchs_loader_with_a_generator():
    xs = torch.randn(12, 3, 6, 7)
    g = torch.Generator().manual_seed(5)
    dl = torch.utils.data.DataLoader(list(zip(xs, xs)), batch_size=4, shuffle=True, generator=g)
    dl.one_batch = lambda: next(iter(dl))
    dls,state = DataLoaders(dl, dl),g.get_state()
    seen = []
    for arm in ('none', 'restless'):
        seen.append({})
        with undone(dls):
            learn,*_ = build(Recipe(partial(make, seen=seen[-1]), train), dls, 1, arms[arm], '4')
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert torch.equal(seen[0]['batches'][0], seen[1]['batches'][0])
    assert torch.equal(g.get_state(), state)

def test_nan_is_noted():
    res = run(recipe._replace(train=lambda learn: learn.fit(2, 1e30)), some_dls(), 0, arms['none'], '4')
    assert 'training loss became' in res['failed'] and res['metrics'].keys() == {'mae'} and res['loss'] != res['loss']

class NanAtLast(Callback):
    def after_fit(self): self.learn.model[0].weight.data.fill_(float('nan'))

def test_nan_of_validation_is_noted():
    res = run(recipe._replace(train=lambda learn: learn.fit(1, cbs=NanAtLast())), some_dls(), 0, arms['none'], '4')
    assert res['failed'] == 'its validation loss is nan'

def test_other_starts_are_refused():
    dls = some_dls()
    before = [run(recipe, dls, 0, arms['none'], '4')]
    wider = lambda dls: Learner(dls, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), loss_func=MSELossFlat(), metrics=mae)
    with pytest.raises(ValueError, match='start weights'): run(recipe._replace(make=wider), dls, 0, arms['conv3'], '0', before)
    other = some_dls()
    other.train.dataset[0] = other.train.dataset[1]     # may be in any batch
    small = DataLoaders(DataLoader(other.train.dataset[:17], bs=4, shuffle=True), other.valid)
    with pytest.raises(ValueError, match='numbers of batches'): run(recipe, small, 0, arms['conv3'], '4', before)
    moved = DataLoaders(some_dls().train, DataLoader([(x+1, y) for x,y in some_dls().valid.dataset], bs=9))
    with pytest.raises(ValueError, match='validation data'): run(recipe, moved, 0, arms['conv3'], '4', before)

def test_sketch_bears_rounding_but_no_change():
    t = torch.randn(1000, 7)
    for same in (t.clone(), t*(1+1e-7)): assert np.allclose(sketch([t]), sketch([same]), rtol=1e-6, atol=1e-6)
    changed = t.clone()
    changed[3, 2] += .1
    for other in (t.flip(0), t.mT.contiguous(), t*1.001, changed): assert not np.allclose(sketch([t]), sketch([other]), rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize('make,words', [(lambda dls: nn.Identity(), 'must give a Learner'), (lambda dls: make(some_dls()), 'must use the DataLoaders')], ids=['no Learner', 'other data'])
def test_makers_that_do_not_fit(make, words):
    with pytest.raises((TypeError, ValueError), match=words): run(recipe._replace(make=make), some_dls(), 0, arms['none'], '4')

def test_no_validation_data():
    with pytest.raises(ValueError, match='no validation data'): run(recipe, DataLoaders(some_dls().train), 0, arms['none'], '4')

def test_measures():
    dls = some_dls()
    none,attention = (run(recipe, dls, 0, arms[n], '4') for n in ('none', 'attention'))
    assert none['parameters'] == 0 and none['change'] != none['change']
    assert attention['parameters'] == sum(p.numel() for p in SelfAttention(16).parameters())
    assert attention['held'] > none['held'] > 0 and attention['change'] > .01 and attention['ms'] > 0

def test_held_counts_once_and_goes():
    model,x = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten()),torch.randn(2, 3, 6, 7)
    held = Held(model)
    with torch.no_grad(): model(x)
    model.eval()(x)
    assert held.mib != held.mib and 'forward' in vars(model)     # no training call yet
    model.train()(x)
    assert held.mib*2**20 == 4*84*(3+5) and 'forward' not in vars(model)

def test_held_goes_after_an_error():
    model = nn.Conv2d(3, 5, 3)
    Held(model)
    with pytest.raises(RuntimeError): model(torch.randn(1, 4, 6, 7))
    assert 'forward' not in vars(model)
    t = torch.randn(3, requires_grad=True)
    t.exp().sum().backward()     # no hook of ours is left in PyTorch

@pytest.mark.parametrize('cbs', [lambda: SaveModelCallback(monitor='mae'), lambda: EarlyStoppingCallback(monitor='mae'), lambda: ReduceLROnPlateau(monitor='mae')], ids=['save', 'stop', 'reduce'])
def test_callbacks_that_watch_a_metric_do_not_end_a_comparison(cbs, tmp_path):
    def tracked(dls):
        learn = make(dls)
        learn.path = tmp_path
        learn.add_cb(cbs())
        return learn
    plain, watched = (run(Recipe(f, train), some_dls(), 1, arms['attention'], '4') for f in (make, tracked))
    assert not watched['failed'] and np.isfinite(watched['loss']) and np.isfinite(watched['metrics']['mae'])
    if cbs().__class__ is EarlyStoppingCallback: assert watched['loss'] == plain['loss'] and watched['metrics'] == plain['metrics']

def test_metrics_of_one_name_are_numbered():
    def tenfold(p, t): return 10*mae(p, t)
    tenfold.__name__ = 'mae'
    def two(dls):
        learn = make(dls)
        learn.metrics = [AvgMetric(mae), AvgMetric(tenfold)]
        return learn
    m = run(Recipe(two, train), some_dls(), 1, arms['attention'], '4')['metrics']
    assert list(m) == ['mae', 'mae 2'] and m['mae 2'] > 5*m['mae'] > 0
