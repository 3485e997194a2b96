"`quiet`: a look at somebody's model or data leaves no trace, whatever happens during the look"
import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo  # so that there is something to be eager about
from conftest import named
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn
from torch.nn.parallel import DataParallel
from torch.utils.data import DataLoader as TorchLoader, IterableDataset, RandomSampler
from watched import as_it_was, images, mixed, same, stance_is_forced

from fastai_selfattn.quiet import (as_before, bare_model, check_whole, eagerly, eval_mode, first_tensor, model_and_learner, one_batch,
                                   random_kept, unchanged, undisturbed)

ENDS = [None, ValueError, KeyboardInterrupt]     # how a look ends

def draws(): return random.random(), np.random.rand(), torch.rand(1).item()

def seed(n=3): random.seed(n), np.random.seed(n), torch.manual_seed(n)

def states(): return random.getstate(), [np.array(x).tolist() for x in np.random.get_state()], torch.get_rng_state().tolist()

def ended(end, context, look):
    "Run `look` inside `context`, and end it with the error `end`"
    if end is None:
        with context as got: return look(got)
    with pytest.raises(end, match='enough'):
        with context as got:
            look(got)
            raise end('enough')


# which model

def test_the_model_inside_any_nest_of_wrappers():
    compiled = partial(torch.compile, backend='eager')
    net = nn.Conv2d(3, 5, 1)
    assert bare_model(net) is net
    for wrapped in (compiled(net), DataParallel(net), DataParallel(compiled(net)), compiled(DataParallel(DataParallel(net)))): assert bare_model(wrapped) is net
    whole = nn.Sequential(DataParallel(net))
    assert bare_model(whole) is whole     # a wrapper inside stays


def test_a_model_or_a_learner():
    net = nn.Conv2d(3, 5, 1)
    learn = Learner(DataLoaders([], []), net, loss_func=nn.MSELoss())
    assert model_and_learner(net) == (net, None) and model_and_learner(learn) == (net, learn)
    wrapped = DataParallel(net)
    assert model_and_learner(wrapped)[0] is wrapped
    learn.model = 'resnet18'
    for bad, kind in ((learn, 'str'), (None, 'NoneType'), (nn.Conv2d, 'type'), ([net], 'list')):
        with pytest.raises(TypeError, match=f'`model` must be an nn.Module or a Learner, got {kind}'): model_and_learner(bad)


# modes

@pytest.mark.parametrize('end', ENDS, ids=named)
@pytest.mark.parametrize('context', [eval_mode, as_before, unchanged, undisturbed], ids=lambda f: f.__name__)
def test_every_submodule_gets_its_own_mode_back(context, end):
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(5).eval(), nn.Dropout()), nn.Sequential(nn.Linear(5, 7)).eval())
    net[2][0].train()
    modes = [m.training for m in net.modules()]
    assert modes == [True, True, True, False, True, False, True]
    def look(got):
        assert got is net and not any(m.training for m in net.modules())
        net[1][0].train()     # whoever looks may change modes too
    ended(end, context(net), look)
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize('end', ENDS, ids=named)
def test_the_eager_stance_ends_with_the_look(end):
    def inside(_): assert stance_is_forced()
    ended(end, eagerly(), inside)
    assert not stance_is_forced()
    with eagerly(), eagerly(): pass
    assert not stance_is_forced()


# weights that a norm with hooks has made

@pytest.mark.parametrize('end', ENDS, ids=named)
@pytest.mark.parametrize('context', [as_before, unchanged, undisturbed], ids=lambda f: f.__name__)
def test_made_weights_are_the_very_ones_that_were_there(context, end):
    model = mixed().train()
    model(images(size=(32, 48))).square().mean().backward()
    model[2].eval()
    before = as_it_was(model)
    made = [m.weight for m in model.modules() if 'weight' in vars(m)]
    assert sum(w.requires_grad for w in made) > 8
    ended(end, context(model), lambda m: m(images(size=(32, 48), seed=4)))
    same(before, as_it_was(model))
    assert all(a is b for a, b in zip(made, [m.weight for m in model.modules() if 'weight' in vars(m)]))


# random numbers

@pytest.mark.parametrize('end', ENDS, ids=named)
@pytest.mark.parametrize('context', [random_kept, lambda: unchanged(nn.Dropout()), lambda: undisturbed(nn.Dropout())], ids=['random_kept', 'unchanged', 'undisturbed'])
def test_random_numbers_go_on_bit_for_bit(context, end):
    seed()
    np.random.standard_normal(), random.gauss(0, 1)     # both keep a second normal number for the next call
    before = states()
    def look(_):
        for _ in range(7): draws()
        np.random.standard_normal(3), random.gauss(0, 1), torch.randn(11)
        assert all(a != b for a, b in zip(states(), before))
    ended(end, context(), look)
    assert states() == before


def test_random_numbers_of_nested_looks():
    seed()
    with random_kept():
        first = draws()
        with random_kept(): second = draws()
        assert draws() == second != first
    assert draws() == first


# a pass that leaves no trace

class Remembers(nn.Module):
    "All that a module may change when it runs, in eval mode too"
    def __init__(self):
        super().__init__()
        self.calls, self.note, self.done = 0, 'never', False
        self.register_buffer('mean', torch.zeros(5))
        self.register_buffer('last', None)
        self.register_buffer('replaced', torch.arange(3.))

    def forward(self, x):
        self.calls += 1
        self.note, self.done, self.new = f'{self.calls} calls', True, 2.5
        self.mean += x.mean(0)
        self.last, self.replaced = x.detach(), torch.ones(3)
        return x + torch.randn(5)*random.random()*np.random.rand()

def memory(m):
    return {n: (id(b), None if b is None else b.tolist()) for n, b in m._buffers.items()}, {k: v for k, v in vars(m).items() if not k.startswith('_')}

@pytest.mark.parametrize('end', ENDS, ids=named)
@pytest.mark.parametrize('context', [unchanged, undisturbed], ids=lambda f: f.__name__)
def test_what_modules_remember_goes_back(context, end):
    net = nn.Sequential(nn.BatchNorm1d(5), Remembers())
    net[0].eval()
    before, x = [memory(m) for m in net], torch.randn(6, 5)
    ended(end, context(net), lambda m: m(x))
    assert [memory(m) for m in net] == before
    seed()
    with context(net): first = net(x)
    seed()
    with context(net): again = net(x)
    assert torch.equal(first, again) and net[1].calls == 0
    net(x)
    assert net[1].calls == 1 and net[1].new == 2.5 and net[1].mean.any()     # outside it does remember


@pytest.mark.parametrize('context', [unchanged, undisturbed], ids=lambda f: f.__name__)
def test_a_backward_pass_under_way_is_not_spoilt(context):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).train()
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 7, 9)
    loss, want = net(x).square().mean(), twin(x).square().mean()
    with context(net): net(x * 3)
    loss.backward(), want.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers()))


@pytest.mark.parametrize('context', [unchanged, undisturbed], ids=lambda f: f.__name__)
def test_numbers_that_are_none_stay_untouched(context):
    "Statistics of an overflow are NaN, which equals nothing, not even itself"
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).train()
    with torch.no_grad(): net[1].running_mean[2], net[1].running_var[3] = math.nan, math.inf
    before = [(id(b), b._version) for b in net.buffers()]
    with context(net): net(torch.randn(2, 3, 7, 9))
    assert [(id(b), b._version) for b in net.buffers()] == before
    with context(net) as m: m[1].running_mean[2] = 1.
    assert net[1].running_mean[2].isnan()


def test_gradients_and_precision_inside():
    net, x = nn.Linear(5, 7), torch.randn(3, 5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with undisturbed(net): assert net(x).dtype == torch.float32 and not net(x).requires_grad
        with unchanged(net): assert net(x).dtype == torch.bfloat16 and net(x).requires_grad
        assert net(x).dtype == torch.bfloat16
    with torch.inference_mode():
        with undisturbed(net): assert not net(x).is_inference()
        assert net(x).is_inference()


# a batch

def data(n, start=0): return [(torch.full((3, 4, 6), float(start + i)), torch.tensor(i % 2)) for i in range(n)]

def numbers(batch): return batch[0].flatten(1)[:, 0].tolist()

@pytest.mark.parametrize('end', [False, True], ids=['works', 'fails'])
@pytest.mark.parametrize('make', [lambda d: DataLoader(d, bs=3, shuffle=True), lambda d: TorchLoader(d, 3, shuffle=True),
                                  lambda d: TorchLoader(d, 3, shuffle=True, generator=torch.Generator().manual_seed(4)),
                                  lambda d: TorchLoader(d, 3, sampler=RandomSampler(d, generator=torch.Generator().manual_seed(4)))],
                         ids=["fastai's", "torch's", 'own generator', "sampler's generator"])
def test_what_is_drawn_next_does_not_change(make, end):
    class Items(list):
        fails = False
        def __getitem__(self, i):
            random.random(), np.random.rand(), torch.rand(2)     # as an augmentation does
            if self.fails: raise ValueError('no such item')
            return super().__getitem__(i)
    def epochs(look):
        seed()
        items = Items(data(11))
        dl, drawn = make(items), []
        for _ in range(2):
            if look:
                before, items.fails = states(), end
                if end:
                    with pytest.raises(ValueError, match='no such item'): one_batch(dl)
                else: assert len(numbers(one_batch(dl)[0])) == 3
                items.fails = False
                assert states() == before
            drawn += [numbers(b) for b in dl]
        return drawn, draws()
    want = epochs(False)
    assert epochs(True) == want and len(want[0]) == 8 and sorted(sum(want[0][:4], [])) == list(range(11)) != sum(want[0][:4], [])


def test_the_batch_is_of_validation_if_there_is_any():
    train, valid, more, none = (DataLoader(data(n, start), bs=4) for n, start in ((7, 0), (5, 100), (5, 200), (0, 0)))
    for loaders, first, size in (((train, valid), 100., 4), ((train, valid, more), 100., 4), ((train, none), 0., 4), ((train,), 0., 4)):
        batch, n = one_batch(DataLoaders(*loaders))
        assert numbers(batch)[0] == first and len(batch[0]) == size and n == 1
    assert one_batch(DataLoaders(none, none)) is None and one_batch(none) is None
    assert numbers(one_batch(train)[0]) == [0, 1, 2, 3]


def test_how_many_parts_go_into_a_model():
    x = torch.zeros(3, 2)
    for batch, n in (([x], 1), ((x, x), 1), ((x, x, x), 2), (x, 1)):
        got, inputs = one_batch([batch])
        assert inputs == n and torch.equal(got[0], x)
    dls = DataLoaders(DataLoader(data(4), bs=2), DataLoader(data(4), bs=2))
    dls.n_inp = 2
    assert one_batch(dls)[1] == 2


def test_a_stream_and_batches_that_are_no_tensors():
    class Stream(IterableDataset):
        def __iter__(self): return iter(data(5))
    assert numbers(one_batch(TorchLoader(Stream(), 2))[0]) == [0, 1]
    for bad, kind in ((dict(x=1), 'dict'), ('ab', 'str'), (['ab', 'cd'], 'list'), (None, 'NoneType')):
        with pytest.raises(TypeError, match=f'a batch must be tensors, got {kind}: give `size`'): one_batch([bad])


# arguments

def test_the_first_tensor():
    a, b = torch.zeros(2), nn.Parameter(torch.zeros(3))
    assert first_tensor((None, 3, b, a)) is b and first_tensor([np.zeros(2), a]) is a and first_tensor(([a], 'x')) is None and first_tensor(()) is None


@pytest.mark.parametrize('value,error', [(1, None), (np.int64(7), None), (np.uint8(2), None), (0, ValueError), (-3, ValueError), (True, TypeError), (2., TypeError), ('2', TypeError), (None, TypeError),
                                         (float('nan'), TypeError), (torch.tensor(2), TypeError)], ids=named)
def test_whole_numbers(value, error):
    if error is None:
        got = check_whole(n=value, k=5)
        assert got == [int(value), 5] and [type(i) for i in got] == [int, int]
    else:
        with pytest.raises(error, match=f'`n` must be {"a whole number, " * (error is TypeError)}1 or more, got'): check_whole(k=5, n=value)
    if error is ValueError: assert check_whole(value, n=value) == [value]


def test_whole_numbers_name_what_they_count():
    with pytest.raises(ValueError, match='`every` must be 3 or more steps, got 2'): check_whole(3, 'steps', every=2)
    assert check_whole() == []

@pytest.mark.parametrize('in_use', [True, False])
def test_random_numbers_of_gpus_in_use_are_kept_too(monkeypatch, in_use):
    "fastai's augmentation draws where the batch is"
    kept = []
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda i: f'state of {i}')
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, device: kept.append((state, device)))
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: in_use)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with random_kept(): pass
    assert kept == ([('state of 0', 0), ('state of 1', 1)] if in_use else [])
