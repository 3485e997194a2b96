"`upgrade_attention` and `take_over`: fastai's layers of any age and copies of them turned into ours, what is only alike left alone, nothing else touched"
import copy
import functools
import gc
import pickle
import re
import types

import fastai.layers
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.hook import Hook
from fastai.data.block import DataBlock
from fastai.data.transforms import FuncSplitter, get_image_files
from fastai.layers import ConvLayer, NormType
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed
from fastai.vision import learner as fastai_learner
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.models import xresnet
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from conftest import Largest, named
from fastai_selfattn.attention import layers; from fastai_selfattn.placement import upgrade
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.attention.kinds import attention_layers
from fastai_selfattn.walls.rooms import make_rooms
from fastai_selfattn.placement.unet import create_unet_model
from fastai_selfattn.placement.upgrade import Upgrade, take_over, upgrade_attention
from fastai_selfattn.walls.data import open_mask

pytestmark = pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated:FutureWarning', 'ignore:load_learner.*pickle:UserWarning', 'ignore:.*zero-element')
C, SIZE, MAP = 16, (32, 48), (6, 10)
FASTAI = {fastai.layers.SelfAttention: SelfAttention, fastai.layers.PooledSelfAttention2d: PooledSelfAttention2d, fastai.layers.SimpleSelfAttention: SimpleSelfAttention}
by_class = pytest.mark.parametrize('cls', FASTAI, ids=lambda c: c.__name__)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(1)

# --- copies of fastai's layers, as they stand in other people's projects

def bare(ni, no, ks=1, ndim=1, norm=lambda conv: conv, **kwargs): return norm((nn.Conv1d, nn.Conv2d)[ndim - 1](ni, no, ks, padding=ks // 2, bias=kwargs.pop('bias', False), **kwargs))

def v1(ni, no, ks=1, ndim=1): return bare(ni, no, ks, ndim, spectral_norm)
def new_spectral(ni, no, ks=1, ndim=1): return bare(ni, no, ks, ndim, parametrizations.spectral_norm)
def old_weight(ni, no, ks=1, ndim=1): return bare(ni, no, ks, ndim, weight_norm)
def new_weight(ni, no, ks=1, ndim=1): return bare(ni, no, ks, ndim, parametrizations.weight_norm)

class OwnConvLayer(nn.Sequential):
    "fastai's `ConvLayer`, copied too"
    def __init__(self, ni, no, ks=1, ndim=1): super().__init__(v1(ni, no, ks, ndim))

class Glance(nn.Module):
    "A copy of fastai's `SelfAttention`; what others do otherwise is said in subclasses"
    names = 'query', 'key', 'value'
    def __init__(self, c=C, conv=v1, d=None, gamma=(1,)):
        super().__init__()
        d = c // 8 if d is None else d
        for name in self.names: setattr(self, name, conv(c, c if name == 'value' else d))
        self.gamma = nn.Parameter(torch.zeros(gamma))
    def weights(self, f, g): return F.softmax(f.mT @ g, 1)
    def blend(self, o, x): return self.gamma * o + x
    def forward(self, x):
        n = x.flatten(2)
        return self.blend((self.value(n) @ self.weights(self.query(n), self.key(n))).view_as(x), x)

class PooledGlance(nn.Module):
    "A copy of fastai's `PooledSelfAttention2d`"
    def __init__(self, c=C, conv=v1, gamma=(1,)):
        super().__init__()
        self.query, self.key, self.value, self.out = (conv(a, b, ndim=2) for a, b in ((c, c // 8), (c, c // 8), (c, c // 2), (c // 2, c)))
        self.gamma = nn.Parameter(torch.zeros(gamma))
    def forward(self, x):
        g, h = (F.max_pool2d(conv(x), 2).flatten(2) for conv in (self.key, self.value))
        o = h @ F.softmax(self.query(x).flatten(2).mT @ g, -1).mT
        return self.gamma * self.out(o.unflatten(2, x.shape[2:])) + x

class Correlated(nn.Module):
    "A copy of fastai's `SimpleSelfAttention`, whose name says nothing"
    def __init__(self, c=C, conv=v1, gamma=(1,), ks=1):
        super().__init__()
        self.conv = conv(c, c, ks)
        self.gamma = nn.Parameter(torch.zeros(gamma))
    def forward(self, x):
        n = x.flatten(2)
        return self.gamma * (n @ n.mT @ self.conv(n)).view_as(x) + x

class Reordered(Glance): names = 'value', 'key', 'query'

class Stashing(Glance):
    "Has more attributes than it needs"
    scale = 1.
    def weights(self, f, g): return F.dropout(F.softmax(self.scale * f.mT @ g, 1), 0., self.training)

class Careful(Glance):
    "Softmax in float32 whatever the map has, here of large products"
    def __init__(self):
        super().__init__(conv=bare)
        for conv in (self.query, self.key): nn.init.normal_(conv.weight)
    def weights(self, f, g): return F.softmax((f.mT @ g).float(), 1).type_as(f)

class Showing(Glance):
    "Keeps its weights, with their graph, to be looked at"
    def weights(self, f, g):
        self.shown = super().weights(f, g)
        return self.shown

class Written(Glance):
    "Runs in float32 only"
    def weights(self, f, g): return super().weights(f, g) @ torch.eye(f.shape[2])

class AttentionConv(nn.Conv1d):
    "A part whose name looks like attention"
def attention_conv(ni, no): return AttentionConv(ni, no, 1, bias=False)

COPIES = {Glance: SelfAttention, PooledGlance: PooledSelfAttention2d, Correlated: SimpleSelfAttention}

# --- what is like these, and is not the same

class OtherAxis(Glance):
    def weights(self, f, g): return F.softmax(f.mT @ g, 2)
class Scaled(Glance):
    def weights(self, f, g): return F.softmax(f.mT @ g / f.shape[1]**.5, 1)
class Dropping(Glance):
    def weights(self, f, g): return F.dropout(super().weights(f, g), .3, self.training)
class Swapped(Glance):
    def weights(self, f, g): return super().weights(g, f)
class Sigmoid(Glance):
    def weights(self, f, g): return torch.sigmoid(f.mT @ g)
class Unweighted(Glance):
    def weights(self, f, g): return f.mT @ g
class Undefined(Glance):
    def weights(self, f, g): return super().weights(f, g).sub(2).sqrt()
class Minus(Glance):
    def blend(self, o, x): return x - self.gamma * o
class Squared(Glance):
    def blend(self, o, x): return x + self.gamma**2 * o
class Positive(Glance):
    def blend(self, o, x): return x + self.gamma.abs() * o
class Capped(Glance):
    def blend(self, o, x): return x + self.gamma.clamp(-1, 1) * o
class Convex(Glance):
    def blend(self, o, x): return (1 - self.gamma) * x + self.gamma * o
class NoResidual(Glance):
    def blend(self, o, x): return self.gamma * o
class Tuple(Glance):
    def forward(self, x): return super().forward(x), None
class Raising(Glance):
    def forward(self, x): raise KeyError('mask')
class Masked(Glance):
    def forward(self, x, mask): return super().forward(x) * mask
class InPlace(Glance):
    def forward(self, x): return x.copy_(super().forward(x))

class Proj(Glance):
    names = 'query', 'key', 'value', 'proj'
    def blend(self, o, x): return super().blend(self.proj(o.flatten(2)[:, :2]).mean() * o, x)
class Temperature(Glance):
    def __init__(self): super().__init__(); self.temperature = nn.Parameter(torch.ones(1))
class Counting(Glance):
    def __init__(self): super().__init__(); self.register_buffer('steps', torch.zeros(3))
class FixedGamma(Glance):
    def __init__(self): super().__init__(); del self.gamma; self.register_buffer('gamma', torch.tensor([.4]))
class NoGamma(Glance):
    def __init__(self): super().__init__(); self.gamma = None
class Narrow(Glance):
    def __init__(self): super().__init__(); self.key = v1(C, 3)
class HalfValues(Glance):
    def __init__(self): super().__init__(); self.value = v1(C, C // 2)
    def blend(self, o, x): return super().blend(torch.cat([o, o], 1), x)
    def forward(self, x):
        n = x.flatten(2)
        return self.blend((self.value(n) @ self.weights(self.query(n), self.key(n))).unflatten(2, x.shape[2:]), x)
class Activated(Glance):
    def __init__(self): super().__init__(); self.value = nn.Sequential(self.value, nn.ReLU())
class Causal(Glance):
    def __init__(self): super().__init__(); self.value = nn.Linear(C, C, bias=False)
class PooledOtherAxis(PooledGlance):
    def forward(self, x):
        g, h = (F.max_pool2d(conv(x), 2).flatten(2) for conv in (self.key, self.value))
        return self.gamma * self.out((h @ F.softmax(self.query(x).flatten(2).mT @ g, 1).mT).unflatten(2, x.shape[2:])) + x
class PooledAveraged(PooledGlance):
    def forward(self, x):
        g, h = (F.avg_pool2d(conv(x), 2).flatten(2) for conv in (self.key, self.value))
        return self.gamma * self.out((h @ F.softmax(self.query(x).flatten(2).mT @ g, -1).mT).unflatten(2, x.shape[2:])) + x
class AttentionMean(Correlated):
    def forward(self, x):
        n = x.flatten(2)
        return self.gamma * (n @ n.mT @ self.conv(n) / n.shape[2]).view_as(x) + x
class CircularAttention(Correlated):
    def __init__(self): super().__init__(ks=3); self.conv.padding_mode, self.conv._reversed_padding_repeated_twice = 'circular', [1, 1]

class Extended(fastai.layers.SimpleSelfAttention):
    "Of fastai's, but for its parts and its name"
    def __init__(self): super().__init__(C); self.more = nn.Identity()

class Named(nn.Module):
    "Nothing but a name that looks like attention"
    def __init__(self): super().__init__(); self.fc = nn.Conv2d(C, C, 1)
    def forward(self, x): return self.fc(x)
Named.__name__ = 'SelfAttention'

def stretched(**kwargs): return lambda ni, no, ks=1, ndim=1: bare(ni, no, ks, ndim, **kwargs)

def patched():
    "fastai's own layer with a forward of its own"
    layer = fastai.layers.SelfAttention(C)
    layer.forward = types.MethodType(OtherAxis.forward, layer)
    layer.weights, layer.blend = types.MethodType(OtherAxis.weights, layer), types.MethodType(OtherAxis.blend, layer)
    return layer

def zeroed(cls, *names):
    "A layer without norm whose convs `names` are still zero, or almost"
    layer = cls(conv=bare)
    for name in names: nn.init.normal_(getattr(layer, name).weight, std=0. if name == 'value' else 1e-5)
    return layer

OTHER, RUN = 'different by', 'does not run'
DIFFERENT = {                                                     # what it is -> (how to make it, what the reason must say)
    **{c.__name__: (c, OTHER) for c in (OtherAxis, Scaled, Dropping, Swapped, Sigmoid, Unweighted, Undefined, Minus, Squared, Positive, Capped, Convex, NoResidual,
                                        PooledOtherAxis, PooledAveraged, AttentionMean)},
    **{c.__name__: (c, RUN) for c in (Tuple, Raising, Masked)},
    'raising says': (Raising, "KeyError: 'mask'"), 'patched': (patched, OTHER),
    'other axis, logits near 0': (lambda: zeroed(OtherAxis, 'query'), OTHER), 'other axis, values 0': (lambda: zeroed(OtherAxis, 'value'), 'nothing to compare'), 'InPlace': (InPlace, 'it changes the map that it is given'),
    'Proj': (Proj, 'its parts are query, key, value, proj'), 'Extended': (Extended, 'its parts are conv, more, not'), 'Temperature': (Temperature, 'its own parameters are gamma, temperature'),
    'Counting': (Counting, 'its own parameters are gamma, steps'), 'NoGamma': (NoGamma, 'its own parameters are none'),
    'FixedGamma': (FixedGamma, 'gamma'), 'two gammas': (lambda: Glance(gamma=(C, 1, 1)), 'gamma'),
    'Narrow': (Narrow, 'its key has out_channels=3, where SelfAttention has 2'), 'HalfValues': (HalfValues, 'its value has out_channels=8, where SelfAttention has 16'),
    'queries of 7': (lambda: Glance(20, bare, d=7), 'its query has out_channels=7'), 'queries of none': (lambda: Glance(6, bare), 'out_channels=0|channels'),
    'Activated': (Activated, 'its Sequential is not a conv of 1 dimension'), 'Causal': (Causal, 'its Linear is not a conv of 1 dimension'),
    'bias': (lambda: Glance(conv=stretched(bias=True)), 'its conv has a bias, groups, a stride or a dilation'),
    'groups': (lambda: Glance(conv=stretched(groups=2)), 'a bias, groups'), 'stride': (lambda: Glance(conv=stretched(stride=2)), 'a stride'),
    'dilation': (lambda: Glance(conv=stretched(dilation=2)), 'a dilation'),
    'wide': (lambda: Glance(conv=lambda ni, no, ks=1: v1(ni, no, 3)), r'its query has kernel_size=\(3,\), where SelfAttention has \(1,\)'),
    'padded': (lambda: Glance(conv=lambda ni, no: nn.Conv1d(ni, no, 1, padding=1, bias=False)), r'its query has padding=\(1,\)'),
    '2d': (lambda: Glance(conv=lambda ni, no: v1(ni, no, ndim=2)), 'its Conv2d is not a conv of 1 dimension$'),
    '1d out': (lambda: PooledGlance(conv=lambda ni, no, ndim: v1(ni, no)), 'its Conv1d is not a conv of 2 dimensions'),
    'even': (lambda: AttentionMean(ks=2), '`ks` must be odd'),
    'only a name': (Named, 'its own parameters are none, not one gamma'),
    'MultiheadAttention': (lambda: nn.MultiheadAttention(C, 2), r'MultiheadAttention: its own parameters are in_proj_weight, in_proj_bias'),
}

# --- models around a layer, and what they do

def net(*attention, gamma=.7, c=C, seed=4):
    "A small CNN with `attention` on maps of half the image's side, its gammas not 0, its statistics and singular vectors as after some batches"
    torch.manual_seed(seed)
    model = nn.Sequential(ConvLayer(3, c, stride=2), *[nn.Sequential(m, nn.BatchNorm2d(c)) for m in attention], nn.Conv2d(c, 2, 1))
    with torch.no_grad(): [model(image(seed=i)) for i in range(9)]
    return set_gammas(model, gamma)

def set_gammas(model, gamma=.7):
    for i, m in enumerate(m for m in model.modules() if isinstance(getattr(m, 'gamma', None), nn.Parameter)):
        nn.init.constant_(m.gamma, (gamma if not isinstance(m, (fastai.layers.SimpleSelfAttention, SimpleSelfAttention, Correlated)) else .02 * gamma) * (-1)**i)
    return model

def stripped(model):
    "`model` without the graphs that keep it from being copied"
    for m in model.modules():
        if 'weight' in vars(m): m.weight = m.weight.detach()     # what the hook of a norm left there
    return model

def twin(model): return copy.deepcopy(stripped(model))
def pickled(model): return pickle.loads(pickle.dumps(model))

def image(*size, seed=7, bs=2): return torch.randn(bs, 3, *(size or (12, 20)), generator=torch.Generator().manual_seed(seed))

def deeds(model, x):
    "What a copy of `model` makes of `x`: in eval mode, in two training steps, with gradients, and the buffers afterwards"
    model, res = twin(model), {}
    for i, training in enumerate((False, True, True)):
        a = x.clone().requires_grad_()
        y = model.train(training)(a)
        grads = torch.autograd.grad(y.float().pow(2).mean(), [a, *model.parameters()])
        res |= {f'{i} y': y.detach(), f'{i} x': grads[0]} | {f'{i} {n}': g for (n, _), g in zip(model.named_parameters(), grads[1:])}
    return res | {f'buffer {n}': b for n, b in model.named_buffers()}

def apart(a, b):
    "The largest difference of two such results, relative to the largest value of each; a tenth of it in gradients, where more is added up"
    assert list(a) == list(b)
    scale = {k: max(v.float().abs().max().item(), 1e-3 * max(w.float().abs().max().item() for j, w in b.items() if j[0] == k[0])) for k, v in b.items()}
    return max((a[k].float() - b[k].float()).abs().max().item() / scale[k] * (1 if k[2:] == 'y' or k[0] == 'b' else .1) for k in b)

def upgraded(model, n=1, tol=2e-5, x=None):
    "Upgrade `model` and see that it does as before, and that this would have been seen; what was said"
    x = image() if x is None else x
    names, parameters, keys, before = [n for n, _ in model.named_parameters()], list(model.parameters()), list(model.state_dict()), deeds(model, x)
    state, modes = {k: t.clone() for k, t in model.state_dict().items()}, [m.training for m in model.modules()]
    without = twin(model)
    for m in without.modules():
        if isinstance(getattr(m, 'gamma', None), nn.Parameter): nn.init.zeros_(m.gamma)
    assert apart(deeds(without, x), before) > 50 * tol
    res = upgrade_attention(model)
    assert len(res.upgraded) == n == len([m for m in model.modules() if isinstance(m, layers._Attention)]) and not res.left
    assert [n for n, _ in model.named_parameters()] == names and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert apart(deeds(model, x), before) < tol
    return res

def snapshot(model):
    "All that an upgrade that does nothing must leave: modules, values, modes, gradients, the random state"
    return ([(n, id(m), m.training) for n, m in model.named_modules()], [(k, id(v), v.clone()) for k, v in (*model.named_parameters(), *model.named_buffers())],
            [(k, p.requires_grad, p.grad, p.dtype) for k, p in model.named_parameters()], torch.get_rng_state())

def equal(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (tuple, list)) else a == b

def steps(model, n=1):
    "Training steps; `model` still holds what the last backward needed"
    for i in range(n):
        model.train()(image(seed=i)).pow(2).mean().backward()
        with torch.no_grad():
            for p in model.parameters(): p -= .01 * p.grad
            model.zero_grad()
    return model


# --- fastai's layers in a live model

@by_class
def test_live_model(cls, capsys):
    model = net(cls(C))
    res = upgraded(model)
    ours = FASTAI[cls]
    assert res == Upgrade({'1.0': ours.__name__}, {}) and type(model[1][0]) is ours
    assert capsys.readouterr().out == f'1.0: now {ours.__name__} of this package\n'
    assert model[1][0].n_channels == C and model[1][0].norm_type == NormType.Spectral


@by_class
def test_after_training(cls):
    upgraded(set_gammas(steps(net(cls(C)), 3), -.4))


@by_class
@pytest.mark.parametrize('c', [8, 20, 63, 100])
def test_any_number_of_channels(cls, c):
    if cls is fastai.layers.PooledSelfAttention2d and c == 63: c = 62
    model = net(cls(c), c=c)
    upgraded(model)
    with torch.no_grad(): assert model(image()).shape == (2, 2, 6, 10)


@pytest.mark.parametrize('ks,sym', [(3, False), (5, False), (1, True)])
def test_simple_with_kernel_and_sym(ks, sym):
    "fastai's `sym` has no effect, and its results are kept"
    model = net(fastai.layers.SimpleSelfAttention(C, ks=ks, sym=sym))
    upgraded(model)
    assert (model[1][0].ks, model[1][0].sym) == (ks, False)


def settled(cls, seed=0):
    "A layer with singular vectors as after training, in which rounding makes little difference"
    torch.manual_seed(seed)
    layer = cls(C)
    with torch.no_grad():
        for _ in range(30): layer(torch.randn(1, C, 4, 4))
    return layer

@by_class
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-9), (torch.float16, 8e-3), (torch.bfloat16, 6e-2)], ids=named)
def test_dtypes(cls, dtype, tol):
    layer, x = settled(cls).to(dtype), torch.randn(2, C, *MAP, dtype=torch.float64).to(dtype)
    model = set_gammas(nn.Sequential(layer))
    before = {t: twin(model).train(t)(x).detach() - x for t in (False, True)}
    assert upgrade_attention(model).upgraded == {'0': FASTAI[cls].__name__}
    for training, want in before.items():
        y = twin(model).train(training)(x)
        assert y.dtype == dtype and want.abs().max() > .05 and (y.detach() - x - want).abs().max() < tol * want.abs().max()
    assert all(p.dtype == dtype for p in model.parameters())


@by_class
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=named)
def test_new_layers_in_half_precision_are_known_too(cls, dtype):
    "Their singular vectors are still far off, so products are large, and rounding shows"
    model = nn.Sequential()
    for seed in range(20):
        torch.manual_seed(seed)
        model.append(cls(64 if seed % 2 else C).to(dtype))
    assert upgrade_attention(model).left == {}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=named)
@pytest.mark.parametrize('cls', [OtherAxis, Scaled, Dropping, Minus], ids=lambda c: c.__name__)
def test_what_is_different_is_so_in_half_precision(cls, dtype):
    assert not upgrade_attention(nn.Sequential(cls().to(dtype))).upgraded


@by_class
def test_channels_last(cls):
    model, x = net(cls(C)).to(memory_format=torch.channels_last), image().contiguous(memory_format=torch.channels_last)
    upgraded(model, x=x)
    y = model[0](x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous() and model[1][0](y).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('cls', [c for c in FASTAI if c is not fastai.layers.SimpleSelfAttention], ids=lambda c: c.__name__)
def test_far_less_memory(cls):
    n, model, x = 64 * 64, nn.Sequential(cls(8)), torch.randn(1, 8, 64, 64, requires_grad=True)
    pairs = n * n // 4 if cls is fastai.layers.PooledSelfAttention2d else n * n
    with Largest() as before: model(x).sum().backward()
    assert before.numel >= pairs
    upgrade_attention(model)
    with Largest() as after: model(x).sum().backward()
    assert 0 < after.numel < pairs / 3


# --- fastai's learners and exports

def encoder(pretrained=False):
    "Halves the map five times"
    chs = (3, 8, 16, 24, 32, 40)
    return nn.Sequential(*[ConvLayer(a, b, stride=2) for a, b in zip(chs, chs[1:])], nn.AdaptiveAvgPool2d(1))

def mask_of(f): return open_mask(f.parent.parent / 'masks' / f.name)
def held_out(f): return f.stem >= 'room_0004'
def pictures(path): return sorted(get_image_files(path / 'images'))

@pytest.fixture(scope='module')
def rooms(tmp_path_factory): return make_rooms(tmp_path_factory.mktemp('upgrade') / 'rooms', 6, SIZE)

@pytest.fixture
def dls(rooms):
    block = DataBlock((ImageBlock, MaskBlock(['other', 'wall'])), get_items=pictures, get_y=mask_of, splitter=FuncSplitter(held_out))
    return block.dataloaders(rooms, bs=2, num_workers=0)

def learner(dls, **kwargs):
    set_seed(3)
    learn = fastai_learner.unet_learner(dls, encoder, pretrained=False, self_attention=True, **kwargs)
    nn.init.constant_(learn.model.layers[5].conv2[-1].gamma, .7)
    return learn

def fit(learn, n=2, seed=5):
    set_seed(seed)
    learn.dls.train.rng.seed(seed)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, wd=.1)
    return torch.stack(list(learn.recorder.losses))

def preds(learn, **kwargs):
    with learn.no_bar(): return learn.get_preds(**kwargs)[0]

PLACE = 'layers.5.conv2.2'

def test_learner_goes_on_with_its_optimizer(dls):
    "Training after the upgrade is that of a twin without it, step by step, with the averages that Adam had"
    ours, theirs, forgetful = (learner(dls) for _ in range(3))
    assert torch.equal(fit(ours), fit(theirs)) and torch.equal(fit(forgetful), torch.stack(list(theirs.recorder.losses)))
    opt, values = ours.opt, ours.model.get_submodule(PLACE).value[0].weight_orig
    state = ours.opt.state[values]['sqr_avg']
    assert upgrade_attention(ours) == Upgrade({PLACE: 'SelfAttention'}, {})
    assert ours.model.get_submodule(PLACE).value[0].weight_orig is values and ours.opt is opt and opt.state[values]['sqr_avg'] is state
    forgetful.create_opt()
    before, want = values.detach().clone(), fit(theirs, seed=6)
    torch.testing.assert_close(fit(ours, seed=6), want, rtol=1e-4, atol=1e-5)
    assert (fit(forgetful, seed=6) - want).abs().max() > 1e-3                                   # the averages matter
    assert ours.opt is opt and opt.state[values]['step'] == 8 and (values - before).abs().max() > 1e-3
    for (name, a), b in zip(ours.model.get_submodule(PLACE).named_parameters(), theirs.model.get_submodule(PLACE).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_optimizer_state_by_order(dls, tmp_path):
    "fastai saves an optimizer's state in the order of the parameters, and so it loads into the upgraded learner"
    theirs = learner(dls, path=tmp_path)
    fit(theirs, 1)
    theirs.save('trained')
    ours = learner(dls, path=tmp_path)
    upgrade_attention(ours)
    ours.create_opt()
    ours.load('trained', with_opt=True, strict=True)
    pairs = list(zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True))
    for (name, a), b in pairs: assert torch.equal(a, b) and torch.equal(ours.opt.state[a]['grad_avg'], theirs.opt.state[b]['grad_avg']), name
    assert (preds(ours) - preds(theirs)).abs().max() < 1e-5


def test_export(dls, tmp_path):
    "An `export.pkl` of fastai's, upgraded once loaded, predicts the same; exported again it needs no upgrade, and fastai loads its weights"
    theirs = learner(dls, path=tmp_path)
    fit(theirs)
    theirs.export()
    ours, items = load_learner(tmp_path / 'export.pkl'), dls.valid_ds.items
    def predict(learn): return preds(learn, dl=learn.dls.test_dl(items, num_workers=0))
    want = predict(ours)
    assert upgrade_attention(ours) == Upgrade({PLACE: 'SelfAttention'}, {})
    assert want.shape == (2, 2, *SIZE) and (predict(ours) - want).abs().max() < 1e-5
    ours.export(tmp_path / 'again.pkl')
    again = load_learner(tmp_path / 'again.pkl')
    assert torch.equal(predict(again), predict(ours)) and not upgrade_attention(again).upgraded and list(attention_layers(again.model)) == [PLACE]
    theirs.model.load_state_dict(again.model.state_dict(), strict=True)
    assert (predict(theirs) - want).abs().max() < 1e-5
    nn.init.zeros_(again.model.get_submodule(PLACE).gamma)
    assert (predict(again) - want).abs().max() > 1e-3                                           # attention takes part in what was compared


def xres(**kwargs):
    model = xresnet.xresnet18(sa=1, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.ones_(m.weight)                               # else what attention sees is 0
    return model

def looks(model, x, training):
    "The output in eval mode, or with that of batch norm only"
    model.eval()
    if training:
        for m in model.modules():
            if isinstance(m, (nn.Conv1d, layers._Attention, fastai.layers.SimpleSelfAttention)): m.training = True
    with torch.no_grad(): return twin(model)(x)

@pytest.mark.parametrize('sym', [False, True])
@pytest.mark.parametrize('around', ['alone', 'unet'])
def test_xresnet(sym, around):
    torch.manual_seed(3)
    model = xres(sym=sym) if around == 'alone' else fastai_learner.create_unet_model(lambda pretrained: xres(sym=sym), 2, SIZE, pretrained=False, self_attention=True, cut=-4)
    paths = [n for n, m in model.named_modules() if isinstance(m, tuple(FASTAI))]
    x = image(*SIZE)
    with torch.no_grad(): model.train()(x)                                                        # settles batch norm
    for m in model.modules():
        if isinstance(m, fastai.layers.SimpleSelfAttention): nn.init.constant_(m.gamma, 3e-3)
        elif isinstance(m, fastai.layers.SelfAttention): nn.init.constant_(m.gamma, .7)
    before, without = {t: looks(model, x, t) for t in (False, True)}, twin(model)
    for path in paths: nn.init.zeros_(without.get_submodule(path).gamma)
    res = upgrade_attention(model)
    assert res == Upgrade(dict(zip(paths, ['SimpleSelfAttention', 'SelfAttention'])), {}) and len(paths) == (1 if around == 'alone' else 2)
    assert not any(isinstance(m, tuple(FASTAI)) for m in model.modules())
    for training, want in before.items():
        scale = want.abs().max()
        assert (looks(model, x, training) - want).abs().max() < 2e-4 * scale     # float32 through a whole U-Net; 5e-5 was seen on an Intel CPU, less on an AMD
        assert (looks(without, x, training) - want).abs().max() > 1e-2 * scale
    assert not any(m.sym for m in model.modules() if isinstance(m, SimpleSelfAttention))


# --- old layers

def old_fastai(cls):
    "A layer of fastai v1: the same class and forward, with bare convs"
    layer = cls(C)
    for name, part in list(layer.named_children()):
        if isinstance(part, ConvLayer): setattr(layer, name, v1(part[0].in_channels, part[0].out_channels, ndim=len(part[0].kernel_size)))
    return layer

YOUNG = ['_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks_with_kwargs', '_backward_pre_hooks', '_is_full_backward_hook',
         '_state_dict_pre_hooks', '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks', '_non_persistent_buffers_set']

def strip(module):
    "Take what PyTorch did not have in 2018 out of `module` alone"
    for name in YOUNG: vars(module).pop(name, None)
    return module

@by_class
def test_layers_of_fastai_v1(cls):
    model = net(old_fastai(cls))
    if cls is fastai.layers.SelfAttention: assert '1.0.query.weight_orig' in model.state_dict() and '1.0.query.0.weight_orig' not in model.state_dict()
    upgraded(model)
    assert type(model[1][0]) is FASTAI[cls]
    steps(model)
    assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())


@by_class
def test_unpickled_from_an_old_pytorch(cls):
    "Each module of the pickle lacks what PyTorch did not have then; unpickling restores some"
    model = net(old_fastai(cls))
    want = twin(model).eval()(image())
    for m in model.modules(): strip(m)
    model = pickled(model)
    assert upgrade_attention(model).upgraded == {'1.0': FASTAI[cls].__name__}
    assert (model.eval()(image()) - want).abs().max() < 2e-5 * want.abs().max()
    steps(model)
    assert not torch.equal(model.eval()(image()), want)


@by_class
@pytest.mark.parametrize('missing', ['each', *YOUNG])
def test_layers_that_lack_newer_attributes(cls, missing):
    "What is not there is not asked for, and ours has it"
    model = net(old_fastai(cls))
    want = twin(model).eval()(image())
    vars(model[1][0]).pop(missing, None) if missing != 'each' else strip(model[1][0])
    assert upgrade_attention(model).upgraded == {'1.0': FASTAI[cls].__name__}
    assert vars(model[1][0]).keys() >= set(YOUNG)
    model[1][0].register_forward_hook(lambda m, args, kwargs, y: None, with_kwargs=True)
    assert (model.eval()(image()) - want).abs().max() < 2e-5 * want.abs().max()


# --- copies

@pytest.mark.parametrize('cls', COPIES, ids=lambda c: c.__name__)
@pytest.mark.parametrize('conv', [bare, v1, OwnConvLayer, new_spectral, old_weight, new_weight], ids=lambda f: f.__name__)
def test_copies_are_upgraded(cls, conv):
    model = net(cls(conv=conv))
    upgraded(model)
    layer = model[1][0]
    assert type(layer) is COPIES[cls]
    assert layer.norm_type == {v1: NormType.Spectral, OwnConvLayer: NormType.Spectral, old_weight: NormType.Weight}.get(conv)
    assert torch.equal(copy.deepcopy(steps(model))[1][0].gamma, layer.gamma)


@pytest.mark.parametrize('cls', COPIES, ids=lambda c: c.__name__)
def test_gamma_of_another_shape(cls):
    model = net(cls(gamma=()))
    upgraded(model)
    assert model[1][0].gamma.shape == ()
    assert upgrade_attention(net(cls(gamma=(1, 1, 1)))).left == {'1.0': f'{cls.__name__}: its gamma has shape (1, 1, 1), not (1,) or ()'}


def test_copies_in_another_order():
    "The state dict and the optimizer's state go by this order"
    model = net(Reordered())
    upgraded(model)
    assert [n for n, _ in model[1][0].named_children()] == ['value', 'key', 'query']
    assert [k for k in model[1][0].state_dict() if 'orig' in k] == ['value.weight_orig', 'key.weight_orig', 'query.weight_orig']


@pytest.mark.parametrize('make', [Stashing, Showing, Careful, Written, lambda: Glance(conv=attention_conv), lambda: Glance(d=4), lambda: Glance(d=1), lambda: Correlated(ks=3), lambda: fastai.layers.SelfAttention(C),
                                  lambda: type('Sub', (fastai.layers.SelfAttention,), {})(C)], ids=['more attributes', 'showing', 'float32 softmax', 'float32', 'names of parts', 'd=4', 'd=1', 'ks=3', 'theirs', 'subclass'])
def test_more_that_is_the_same(make):
    torch.manual_seed(2)
    model = nn.Sequential(make())
    nn.init.constant_(model[0].gamma, -.03)
    x = torch.randn(2, C, *MAP)
    want = model.eval()(x)                               # some hold a graph now
    res = upgrade_attention(model)
    assert len(res.upgraded) == 1 and not res.left
    assert (want - x).abs().max() > 1e-2 and (model(x) - want).abs().max() < 1e-5 * want.abs().max()


def test_pruned_convs_stay_pruned():
    layer = fastai.layers.SelfAttention(C)
    layer.value = bare(C, C)
    prune.l1_unstructured(layer.value, 'weight', .5)
    model = net(layer)
    upgraded(model)
    steps(model, 2)
    with torch.no_grad(): model(image())
    assert (model[1][0].value.weight == 0).sum() == C * C / 2


def test_a_conv_with_circular_borders_keeps_them():
    torch.manual_seed(1)
    model = set_gammas(net(CircularAttention())).eval()
    want = model(image())
    assert upgrade_attention(model).upgraded == {'1.0': 'SimpleSelfAttention'} and model[1][0].conv.padding_mode == 'circular'
    assert (model(image()) - want).abs().max() < 1e-5 * want.abs().max()
    model[1][0].conv.padding_mode = 'zeros'     # tells the two apart
    assert (model(image()) - want).abs().max() > 1e-3 * want.abs().max()


def test_upgraded_layers_can_be_fused():
    for conv in (v1, old_weight):
        model = net(Glance(conv=conv)).eval()
        upgrade_attention(model)
        want = model(image())
        assert (fuse_attention(model)(image()) - want).abs().max() < 1e-5 * want.abs().max() and '1.0.query.weight' in model.state_dict()


@pytest.mark.parametrize('what', DIFFERENT)
def test_what_is_different_is_left_alone(what, capsys):
    make, says = DIFFERENT[what]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Identity(), make())
    before, name = snapshot(model), type(model[1]).__name__
    res = upgrade_attention(model)
    assert not res.upgraded and list(res.left) == ['1'] and re.search(says, res.left['1']), res
    assert res.left['1'].startswith(f'{name}: ') and capsys.readouterr().out == f'1: left alone, {res.left["1"]}\n'
    assert equal(before, snapshot(model))


def test_timm_is_left_alone():
    non_local = pytest.importorskip('timm.layers').NonLocalAttn
    model = nn.Sequential(non_local(C), nn.TransformerEncoderLayer(C, 2, 24))
    before = snapshot(model)
    res = upgrade_attention(model)
    assert not res.upgraded and list(res.left) == ['0', '1.self_attn'] and res.left['0'].startswith('NonLocalAttn: its own parameters are none') and equal(before, snapshot(model))


def test_what_is_different_does_not_stop_the_others(capsys):
    model = nn.Sequential(OtherAxis(), fastai.layers.SelfAttention(C), FixedGamma(), Glance(6, bare), Raising(), Glance(24))
    res = upgrade_attention(model)
    assert res.upgraded == {'1': 'SelfAttention', '5': 'SelfAttention'} and list(res.left) == ['0', '2', '3', '4']
    assert [l.partition(':')[0] for l in capsys.readouterr().out.splitlines()] == ['1', '5', '0', '2', '3', '4']


def test_within_what_is_left_alone():
    "A block that is named after attention and holds a layer of fastai's"
    block = type('AttentionBlock', (nn.Sequential,), {})
    model = nn.Sequential(block(nn.Conv2d(C, C, 1), fastai.layers.SelfAttention(C)))
    res = upgrade_attention(model)
    assert res.upgraded == {'0.1': 'SelfAttention'} and res.left['0'].startswith('AttentionBlock: ') and type(model[0][1]) is SelfAttention
    assert upgrade_attention(block(fastai.layers.SelfAttention(C))) == Upgrade({'0': 'SelfAttention'}, {})


# --- what stays as it was

def test_modes_and_what_is_trained():
    for training in (False, True):
        model = net(fastai.layers.SelfAttention(C)).train(training)
        layer = model[1][0]
        layer.query.eval(), layer.value[0].train(not training)
        layer.key[0].weight_orig.requires_grad_(False)
        layer.gamma.requires_grad_(False)
        layer.value[0].weight_orig.grad = grad = torch.ones(C, C, 1)
        modes, trained = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        upgrade_attention(model)
        assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == trained and not all(trained) and type(model[1][0]) is SelfAttention
        assert model[1][0].value[0].weight_orig.grad is grad and grad.eq(1).all()


def test_parts_in_eval_mode_keep_their_vectors():
    def vectors(m): return [b.clone() for n, b in m.named_buffers() if n.endswith('_u')]
    model = net(fastai.layers.SelfAttention(C)).train()
    model[1][0].key.eval()
    theirs, before = twin(model), vectors(model)
    upgrade_attention(model)
    with torch.no_grad(): model(image()), theirs(image())
    assert [torch.equal(a, b) for a, b in zip(before, vectors(model))] == [False, True, False]
    for a, b in zip(vectors(model), vectors(theirs), strict=True): torch.testing.assert_close(a, b)


HOOKS = {                                   # how to register a hook, and what makes it fire
    'forward pre': (lambda l, f: l.register_forward_pre_hook(f), 'call'), 'forward': (lambda l, f: l.register_forward_hook(f), 'call'),
    'forward pre, kwargs': (lambda l, f: l.register_forward_pre_hook(f, with_kwargs=True), 'call'), 'forward, kwargs': (lambda l, f: l.register_forward_hook(f, with_kwargs=True), 'call'),
    'forward, always': (lambda l, f: l.register_forward_hook(f, always_call=True), 'fail'),
    'backward pre': (lambda l, f: l.register_full_backward_pre_hook(f), 'call'), 'backward': (lambda l, f: l.register_full_backward_hook(f), 'call'),
    'state dict pre': (lambda l, f: l.register_state_dict_pre_hook(f), 'save'), 'state dict': (lambda l, f: l.register_state_dict_post_hook(f), 'save'),
    'load pre': (lambda l, f: l.register_load_state_dict_pre_hook(f), 'load'), 'load': (lambda l, f: l.register_load_state_dict_post_hook(f), 'load'),
}

def cause(model, what):
    if what == 'call': model(image()).sum().backward()
    elif what == 'fail':
        with pytest.raises((RuntimeError, ValueError)): model[1][0](torch.randn(2, C + 1, *MAP))
    elif what == 'save': model.state_dict()
    else: model.load_state_dict({k: t.detach().clone() for k, t in (*model.named_parameters(), *model.named_buffers())})

@by_class
@pytest.mark.parametrize('kind', HOOKS)
def test_hooks_and_handles(cls, kind):
    "A hook of the old layer fires on the new one as it did, once, and its handle takes it out; without the old layer in memory"
    register, what = HOOKS[kind]
    seen, model = [], net(cls(C))
    def hook(module, *args): seen.append((module, *(len(a) if isinstance(a, (tuple, list, dict)) and what == 'call' else type(a).__name__ for a in args)))
    handle = register(model[1][0], hook)
    def fire():
        seen.clear()
        cause(model, what)
        return list(seen)
    before = fire()
    assert len(before) == 1 and before[0][0] is model[1][0]
    seen.clear()
    expected = before[0][1:]
    del before
    upgrade_attention(model)
    assert not seen                                      # the check was not seen
    gc.collect()
    after = fire()
    assert len(after) == 1 and after[0][0] is model[1][0] and type(model[1][0]) is FASTAI[cls] and after[0][1:] == expected
    copy.deepcopy(model)                                 # hooks that hold their layer hold one that is there
    handle.remove()
    assert not fire()
    assert not any(v for k, v in vars(model[1][0]).items() if 'hooks' in k)


def test_hooks_change_outputs_as_before():
    model, x = net(fastai.layers.SelfAttention(C)), image()
    model[1][0].register_forward_hook(lambda m, args, y: y.tanh())
    model[1][0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    want = model.eval()(x)
    upgrade_attention(model)
    assert (model(x) - want).abs().max() < 1e-5
    vars(model[1][0])['_forward_hooks'].clear()
    assert (model(x) - want).abs().max() > 1e-3


def test_hooks_of_the_parts_do_not_see_the_check():
    "Statistics that a hook collects are not of a map that nobody gave"
    model, seen = net(fastai.layers.SelfAttention(C), OtherAxis()), []
    watch = Watch(seen)
    for name, hook in (('1.0.query', watch), ('1.0.value.0', watch.method), ('1.0.key.0', functools.partial(watch)), ('2.0.key', lambda *args: watch(*args))): model.get_submodule(name).register_forward_hook(hook)
    upgrade_attention(model)
    assert not seen
    model(image())
    assert seen == [60] * 4


class Watch:
    "A hook with a state, which a copy of it writes into too"
    def __init__(self, seen): self.seen = seen
    def __deepcopy__(self, memo): return self
    def __call__(self, module, args, y): self.seen.append(args[0].shape[2:].numel())
    def method(self, module, args, y): self(module, args, y)

@by_class
def test_a_hook_that_holds_a_graph(cls):
    "As those of fastai do; it cannot be copied, and goes on"
    model = net(cls(C))
    hook = Hook(model[1][0], lambda m, args, y: y, detach=False)
    steps(model)
    assert upgrade_attention(model) == Upgrade({'1.0': FASTAI[cls].__name__}, {})
    old = hook.stored
    model(image())
    assert hook.stored is not old and hook.stored.grad_fn is not None
    hook.remove()
    assert not model[1][0]._forward_hooks


def attentive(pretrained=False):
    "An encoder with attention where the map gets smaller next, so that a U-Net takes its output through a hook on it"
    return nn.Sequential(ConvLayer(3, 8), fastai.layers.SelfAttention(8), *list(encoder())[1:-1], nn.AdaptiveAvgPool2d(1))

def test_attention_in_the_encoder_of_a_unet():
    torch.manual_seed(3)
    model, x = fastai_learner.create_unet_model(attentive, 2, SIZE, pretrained=False, self_attention=True), image(*SIZE)
    paths = [n for n, m in model.named_modules() if isinstance(m, fastai.layers.SelfAttention)]
    assert paths == ['layers.0.1', PLACE] and model.layers[0][1]._forward_hooks
    with torch.no_grad(): [model.train()(image(*SIZE, seed=i)) for i in range(9)]
    def out(gamma):
        for path in paths: nn.init.constant_(model.get_submodule(path).gamma, gamma)
        return model.eval()(x).detach()
    without, want = out(0.), out(.7)
    assert model.sfs.stored[-1].grad_fn is not None or any(s is not None and s.grad_fn is not None for s in model.sfs.stored)
    assert upgrade_attention(model).upgraded == dict.fromkeys(paths, 'SelfAttention')
    assert (model(x) - want).abs().max() < 3e-5 * want.abs().max() and (without - want).abs().max() > 1e-2 * want.abs().max()
    assert torch.equal(next(s for s in model.sfs.stored if s.shape[1] == 8), model.layers[0][1](model.layers[0][0](x)))


def test_attention_place():
    model = net(fastai.layers.SelfAttention(C), fastai.layers.SelfAttention(C))
    model[1][0].attention_place = place = object()
    upgrade_attention(model)
    assert model[1][0].attention_place is place and not hasattr(model[2][0], 'attention_place')


def test_what_was_inserted_can_be_removed():
    "`insert_attention` can put in fastai's layers; upgraded they come out again"
    model = net().eval()
    want, names = model(image()), [n for n, _ in model.named_modules()]
    path, = insert_attention(model, '0', layer=fastai.layers.SelfAttention, size=(12, 20))
    nn.init.constant_(model.get_submodule(path).gamma, .7)
    with_it = model(image())
    assert upgrade_attention(model).upgraded == {path: 'SelfAttention'}
    assert (model(image()) - with_it).abs().max() < 1e-5 < 1e-2 < (with_it - want).abs().max()
    assert remove_attention(model) == [path] and torch.equal(model(image()), want) and [n for n, _ in model.named_modules()] == names


@by_class
def test_the_check_touches_nothing(cls, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeded.append)
    for training in (False, True):
        model = net(cls(C), OtherAxis(), Dropping()).train(training)
        steps(model)
        for p in model.parameters(): p.grad = torch.ones_like(p)
        seeded.clear()
        values, rng = [(t, t.clone()) for t in (*model.parameters(), *model.buffers())], torch.get_rng_state()
        assert len(upgrade_attention(model).left) == 2
        assert torch.equal(torch.get_rng_state(), rng) and not seeded                           # `torch.manual_seed` seeds each GPU too
        assert all(a is b and torch.equal(a, was) for a, (b, was) in zip((*model.parameters(), *model.buffers()), values, strict=True))
        assert all(p.grad.eq(1).all() for p in model.parameters())


@pytest.mark.parametrize('training', [False, True])
def test_between_forward_and_backward(training):
    "A graph that is there can still be gone back through"
    model = net(fastai.layers.SelfAttention(C), OtherAxis()).train(training)
    def grads(m, loss): return torch.autograd.grad(loss, list(m.parameters()))
    copied = twin(model)
    want = grads(copied, copied(image()).sum())
    loss = model(image()).sum()
    upgrade_attention(model)
    for a, b in zip(grads(model, loss), want, strict=True): torch.testing.assert_close(a, b)


def test_a_shared_layer_is_replaced_everywhere():
    shared = fastai.layers.SelfAttention(C)
    model = net(shared, fastai.layers.SelfAttention(C), shared)
    model.head = nn.ModuleDict({'again': shared})
    parts = [model[1], model[3], model.head]
    res = upgrade_attention(model)
    assert type(model[1][0]) is SelfAttention and model[1][0] is model[3][0] is model.head['again'] is not model[2][0] and type(model[2][0]) is SelfAttention
    assert res.upgraded.keys() >= {'1.0', '2.0'} and [model[1], model[3], model.head] == parts
    assert not any(isinstance(m, tuple(FASTAI)) for m in model.modules())


def test_a_shared_layer_computes_the_same():
    shared = fastai.layers.SelfAttention(C)
    torch.manual_seed(4)
    model = set_gammas(nn.Sequential(shared, nn.Conv2d(C, C, 1), shared))
    x = torch.randn(2, C, *MAP)
    want = twin(model).train()(x)
    upgrade_attention(model)
    assert type(model[0]) is SelfAttention and (model(x) - want).abs().max() < 1e-5 * want.abs().max()


def test_layers_that_share_a_conv():
    one, other = fastai.layers.SelfAttention(C), fastai.layers.SelfAttention(C)
    other.value = one.value
    model = net(one, other)
    upgraded(model, 2)
    assert model[1][0].value is model[2][0].value


def test_averaged_and_parallel_models():
    for wrap in (nn.DataParallel, lambda m: AveragedModel(set_gammas(m.eval()))):
        model = net(settled(fastai.layers.SelfAttention))
        with torch.no_grad(): model.eval()(image())
        for m in model.modules():
            if 'weight' in vars(m): m.weight = m.weight.detach()
        wrapped = wrap(model)
        want = wrapped.eval()(image())
        assert upgrade_attention(wrapped).upgraded == {'module.1.0': 'SelfAttention'} and (wrapped(image()) - want).abs().max() < 1e-5


# --- what is said, and what it is asked for

def test_the_second_time_nothing_changes(capsys):
    model = net(fastai.layers.SelfAttention(C), fastai.layers.SimpleSelfAttention(C), PooledGlance(), OtherAxis())
    first = upgrade_attention(model)
    before = snapshot(model)
    capsys.readouterr()
    second = upgrade_attention(model)
    assert len(first.upgraded) == 3 and second == Upgrade({}, first.left) and list(second.left) == ['4.0'] and equal(before, snapshot(model))
    assert capsys.readouterr().out == f'4.0: left alone, {first.left["4.0"]}\n'


def test_ours_are_never_touched(capsys):
    model = net(SelfAttention(C), PooledSelfAttention2d(C), PaperSelfAttention(C), SimpleSelfAttention(C), SelfAttention(C, 4, heads=2, pool=2, softmax=False), SimpleSelfAttention(C, sym=True))
    model.append(create_unet_model(encoder, 2, SIZE, pretrained=False, self_attention=True))
    before, new = snapshot(model), [m._settled for m in model.modules() if hasattr(m, '_settled')]
    assert upgrade_attention(model) == Upgrade({}, {}) and equal(before, snapshot(model)) and len(new) == 19
    assert [m._settled for m in model.modules() if hasattr(m, '_settled')] == new
    assert capsys.readouterr().out == 'Nothing to upgrade in this Sequential\n'


def test_a_model_without_attention(capsys):
    for model in (nn.Conv2d(3, 8, 1), xresnet.xresnet18(), SelfAttention(C)):
        before = snapshot(model)
        assert upgrade_attention(model) == Upgrade({}, {}) and equal(before, snapshot(model))
        assert capsys.readouterr().out == f'Nothing to upgrade in this {type(model).__name__}\n'


def test_a_model_that_is_such_a_layer(dls):
    for make in (*(lambda c=c: c(C) for c in FASTAI), Glance, lambda: Learner(dls, fastai.layers.SelfAttention(C), loss_func=F.mse_loss)):
        model = make()
        module = model.model if isinstance(model, Learner) else model
        module.register_load_state_dict_pre_hook(lambda *args: None)
        before = snapshot(module)
        with pytest.raises(ValueError, match=f'`model` itself is a {type(module).__name__}, .*`nn.Sequential`, or call `take_over`'): upgrade_attention(model)
        gc.collect()
        module.load_state_dict(module.state_dict())
        assert equal(before, snapshot(module))
        assert len(upgrade_attention(nn.Sequential(module)).upgraded) == 1 and isinstance(take_over(module), layers._Attention)      # the remedies


@pytest.mark.parametrize('model', [None, 'model', 3, [nn.Identity()], fastai.layers.SelfAttention, {}], ids=named)
def test_not_a_model(model):
    with pytest.raises(TypeError, match=f'`model` must be an nn.Module or a Learner, got {type(model).__name__}'): upgrade_attention(model)


@by_class
@pytest.mark.parametrize('copied', [copy.deepcopy, pickled], ids=['deepcopy', 'pickle'])
def test_copies_of_the_upgraded_model(cls, copied):
    "Right after a training step of the old layer, and of the new one"
    model = net(cls(C))
    for _ in range(2):
        steps(model)
        upgrade_attention(model)
        other = copied(model)
        assert type(other[1][0]) is FASTAI[cls] and not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert torch.equal(other.eval()(image()), model.eval()(image()))
    steps(model)
    assert not torch.equal(other(image()), model.eval()(image()))


# --- failures

class Bomb(dict):
    "Children of a module, the first new one of which cannot be set"
    armed = True
    def __setitem__(self, name, child):
        if self.armed and isinstance(child, layers._Attention):
            self.armed = False
            raise KeyboardInterrupt
        super().__setitem__(name, child)

def two_layers():
    model = net(fastai.layers.SelfAttention(C), Glance()).train()
    model[1].eval()
    model[1][0].register_load_state_dict_pre_hook(must_be_there)
    return steps(model)

def must_be_there(layer, *args): assert type(layer) is fastai.layers.SelfAttention

def unchanged(model, before):
    gc.collect()
    model.load_state_dict(nn.Module.state_dict(model))                                          # a hook of the first layer watches this
    want = deeds(model, image())
    assert equal(before, snapshot(model))
    assert upgrade_attention(model).upgraded.keys() == {'1.0', '2.0'} and apart(deeds(model, image()), want) < 2e-5          # the next time it works

def test_interrupted_while_replacing():
    model = two_layers()
    before = snapshot(model)
    model[2].__dict__['_modules'] = Bomb(model[2]._modules)
    with pytest.raises(KeyboardInterrupt): upgrade_attention(model)
    model[2].__dict__['_modules'] = dict(model[2]._modules)
    unchanged(model, before)


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('call', range(5, 9))
def test_interrupted_while_checking(monkeypatch, error, call):
    "In any forward pass of ours for the second layer; each is run four times"
    model, calls, real = two_layers(), [], layers.SelfAttention.forward
    before = snapshot(model)
    def interrupted(self, x):
        calls.append(1)
        if len(calls) == call: raise error('stop')
        return real(self, x)
    monkeypatch.setattr(layers.SelfAttention, 'forward', interrupted)
    with pytest.raises(error): upgrade_attention(model)
    monkeypatch.undo()
    unchanged(model, before)


def test_interrupted_in_a_second_try(monkeypatch):
    "A layer that does not run in double precision is tried in its own"
    model, dtypes = net(fastai.layers.SelfAttention(C), Written()), []
    before = snapshot(model)
    def weights(self, f, g):
        dtypes.append(f.dtype)
        raise RuntimeError if f.dtype == torch.float64 else KeyboardInterrupt
    monkeypatch.setattr(Written, 'weights', weights)
    with pytest.raises(KeyboardInterrupt): upgrade_attention(model)
    monkeypatch.undo()
    assert dtypes[-1] == torch.float32
    unchanged(model, before)


@pytest.mark.parametrize('what', ['_on_parts_of', '_difference', '_looks_like_attention'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_failing_inside(monkeypatch, what, error):
    model, real, calls = two_layers(), getattr(upgrade, what), []
    before = snapshot(model)
    def failing(layer, *args):
        calls.append(layer)
        if isinstance(layer, Glance): raise error('broken')
        return real(layer, *args)
    monkeypatch.setattr(upgrade, what, failing)
    if (what, error) == ('_difference', RuntimeError): assert list(upgrade_attention(model).left) == ['2.0'] and type(model[2][0]) is Glance
    else:
        with pytest.raises(error): upgrade_attention(model)
        monkeypatch.undo()
        unchanged(model, before)
    assert any(isinstance(c, Glance) for c in calls)


def test_failing_to_print(monkeypatch):
    "As into a closed pipe"
    model = two_layers()
    before = snapshot(model)
    def closed(*args, **kwargs): raise BrokenPipeError
    monkeypatch.setattr('builtins.print', closed)
    with pytest.raises(BrokenPipeError): upgrade_attention(model)
    monkeypatch.undo()
    unchanged(model, before)


# --- take_over

@by_class
def test_take_over(cls):
    theirs = set_gammas(nn.Sequential(settled(cls)))[0].eval()
    parts, x = dict(theirs.named_children()), torch.randn(2, C, *MAP)
    want, rng, state = theirs(x), torch.get_rng_state(), {k: t.clone() for k, t in theirs.state_dict().items()}
    ours = take_over(theirs)
    assert type(ours) is FASTAI[cls] and type(theirs) is cls and not ours.training and torch.equal(torch.get_rng_state(), rng)
    assert dict(ours.named_children()) == parts == dict(theirs.named_children()) and ours.gamma is theirs.gamma
    assert all(torch.equal(t, state[k]) for k, t in ours.state_dict().items()) and list(ours.state_dict()) == list(state)
    assert (ours(x) - want).abs().max() < 1e-5 * want.abs().max() and torch.equal(theirs(x), want) and (want - x).abs().max() > .05
    assert take_over(cls(C).train()).training


@by_class
def test_take_over_and_settle(cls):
    "A layer that was never trained: the norms are exact from the first forward pass on"
    def sigmas(layer): return torch.stack([torch.linalg.matrix_norm((m.weight_orig / torch.dot(m.weight_u, m.weight_orig.flatten(1) @ m.weight_v)).flatten(1), 2) for m in layer.modules() if hasattr(m, 'weight_u')])
    torch.manual_seed(0)
    new = cls(C).eval()
    kept, made_right = take_over(twin(new)), take_over(twin(new), settled=False)
    assert torch.equal(sigmas(kept), sigmas(made_right)) and (sigmas(kept) - 1).abs().max() > .01      # not before
    for layer in (kept, made_right): layer(torch.randn(2, C, *MAP))
    assert (sigmas(made_right) - 1).abs().max() < 1e-4 and torch.equal(sigmas(kept), sigmas(new))

@pytest.mark.parametrize('what', [k for k, (_, says) in DIFFERENT.items() if not re.search(f'{OTHER}|{RUN}|KeyError|nothing to compare|changes the map', says)])
def test_take_over_says_what_does_not_fit(what):
    make, says = DIFFERENT[what]
    layer = make()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=says.replace('MultiheadAttention: ', '')): take_over(layer)
    assert equal(before, snapshot(layer))


def test_take_over_names_the_part():
    for name in ('key', 'value'):
        layer = Glance()
        setattr(layer, name, v1(C + 8, getattr(layer, name).out_channels))
        with pytest.raises(ValueError, match=f'its {name} has in_channels=24, where SelfAttention has 16'): take_over(layer)
    named = Named()
    named.gamma = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match='its parts are fc, not query, key and value'): take_over(named)
