"The layers against fastai's and the formulas written out, over layouts, dtypes, options, copies, compilers and faults"
import contextlib
import copy
import inspect
import io
import math
import pickle
import shutil
from types import SimpleNamespace

import fastai.layers
import numpy as np
import pytest
import torch
from conftest import Largest, named
from fastai.layers import NormType
from fastai.torch_core import TensorImage, apply_init
from hypothesis import given, settings, strategies as st
from formulas import rel, weight, written_out
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastai_selfattn.attention import ops
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.attention.ops import attention_backend

SOFTMAX = [SelfAttention, PooledSelfAttention2d, PaperSelfAttention]
ALL = [*SOFTMAX, SimpleSelfAttention]
OURS = {'SelfAttention': SelfAttention, 'PooledSelfAttention2d': PooledSelfAttention2d, 'SimpleSelfAttention': SimpleSelfAttention}
NORMS = [NormType.Spectral, NormType.Weight, None]
close = torch.testing.assert_close

each = pytest.mark.parametrize('cls', ALL, ids=lambda c: c.__name__)
each_softmax = pytest.mark.parametrize('cls', SOFTMAX, ids=lambda c: c.__name__)
each_norm = pytest.mark.parametrize('norm_type', NORMS, ids=named)
def takes(cls, size): return cls is not PooledSelfAttention2d or len(size) == 2

FASTAI = [('SelfAttention', {}), ('PooledSelfAttention2d', {}), ('SimpleSelfAttention', {}), ('SimpleSelfAttention', dict(ks=3))]
each_fastai = pytest.mark.parametrize('name,kwargs', FASTAI, ids=named)

def with_gamma(layer, gamma=.7):
    nn.init.constant_(layer.gamma, gamma)
    return layer

def pair(c=24, steps=3, dtype=torch.float32, name='SelfAttention', **kwargs):
    "fastai's layer after some power iterations, and ours with its state dict"
    torch.manual_seed(7)
    theirs, ours = with_gamma(getattr(fastai.layers, name)(c, **kwargs)).to(dtype), OURS[name](c, **kwargs).to(dtype)
    for _ in range(steps): theirs(torch.randn(2, c, 4, 6, dtype=dtype))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours

def copied_steps(model, x, n=2, lr=1e-3):
    "`model` after training steps, its last graph still alive"
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(n):
        opt.zero_grad()
        y = model(x)
        y.square().mean().backward()
        opt.step()
    return model(x)

def results(f, layer, x, seed=1):
    "Output and the gradients of input and parameters"
    y = f(x)
    g = torch.Generator().manual_seed(seed)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype))]

def same_state(a, b, **tol):
    assert list(a) == list(b)
    for name in a: close(a[name], b[name], msg=lambda m: f'{name}: {m}', **(tol or dict(rtol=0, atol=0)))

def state(layer):
    "The state dict as it is, without settling"
    own = lambda m: (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))
    return {f'{path}.{name}'.strip('.'): t.detach().clone() for path, m in layer.named_modules() for name, t in own(m)}

def use(layer):
    with torch.no_grad(): layer(torch.randn(1, layer.n_channels, 3, 3).to(layer.gamma))
    return layer

SHAPES = [(2, 24, 7), (2, 24, 5, 7), (1, 24, 2, 3, 5), (3, 24, 1, 1), (2, 24, 37, 31)]
EVEN = [(2, 24, 4, 6), (1, 24, 2, 2), (3, 24, 10, 14), (1, 24, 38, 26), (2, 8, 6, 4), (2, 17, 4, 6), (1, 40, 6, 2)]


# as fastai's

FASTAI_TAKES = [(n, k, s) for n, k in FASTAI for s in EVEN + SHAPES * (n != 'PooledSelfAttention2d')]      # fastai's pooled layer fails on others: see below

@pytest.mark.parametrize('name,kwargs,shape', FASTAI_TAKES, ids=named)
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_same_results_and_gradients_as_fastai(name, kwargs, shape, train):
    theirs, ours = pair(shape[1], dtype=torch.float64, name=name, **kwargs)
    theirs.train(train), ours.train(train)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for a, b in zip(results(theirs, theirs, x), results(ours, ours, x)): assert a.shape == b.shape and rel(b, a) < 1e-10
    same_state(theirs.state_dict(), ours.state_dict(), rtol=1e-9, atol=1e-12)       # power iteration went the same way


@each_fastai
def test_several_training_steps_give_the_weights_of_fastai(name, kwargs):
    theirs, ours = pair(dtype=torch.float64, name=name, **kwargs)
    start = state(ours)
    opts = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (theirs, ours)]
    for _ in range(5):
        x = torch.randn(2, 24, 10, 6, dtype=torch.float64)
        for m, opt in zip((theirs, ours), opts):
            opt.zero_grad()
            m(x).pow(2).mean().backward()
            opt.step()
    same_state(theirs.state_dict(), ours.state_dict(), rtol=1e-6, atol=1e-8)
    assert all((v - start[k]).abs().max() > 1e-3 for k, v in ours.named_parameters())
    ours.eval(), theirs.eval()
    assert rel(ours(x), theirs(x)) < 1e-8


@each_fastai
def test_state_dict_goes_both_ways_strictly(name, kwargs):
    theirs, ours = getattr(fastai.layers, name)(40, **kwargs), OURS[name](40, **kwargs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    copy_of_ours = copy.deepcopy(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    same_state(theirs.state_dict(), ours.state_dict())
    x = torch.randn(2, 40, 4, 6)
    with_gamma(theirs), with_gamma(ours)
    assert rel(theirs.eval()(x), ours.eval()(x)) < 1e-5
    copy_of_ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(copy_of_ours.eval()(x), ours(x))


@each_fastai
def test_same_seed_same_weights_as_fastai(name, kwargs):
    torch.manual_seed(3); theirs = getattr(fastai.layers, name)(24, **kwargs)
    torch.manual_seed(3); ours = OURS[name](24, **kwargs)
    for n, p in ours.named_parameters(): assert torch.equal(p, theirs.state_dict()[n])


@pytest.mark.parametrize('name', OURS)
def test_constructors_begin_with_the_arguments_of_fastai(name):
    theirs, ours = (list(inspect.signature(c).parameters.values()) for c in (getattr(fastai.layers, name), OURS[name]))
    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours][:len(theirs)]
    assert all(p.default is not p.empty for p in ours[len(theirs):])


@each
def test_options_default_to_what_fastai_does(cls):
    softmax = dict(reduction=8, heads=1, pool=2 if cls is PooledSelfAttention2d else 1, softmax=True, scale=1., unit=False, learn_scale=False)
    want = dict(norm_type=NormType.Spectral, gamma=0.) | (dict(ks=1, sym=False) if cls is SimpleSelfAttention else softmax)
    assert {p.name: p.default for p in list(inspect.signature(cls).parameters.values())[1:]} == want
    layer = cls(24)
    assert list(layer.gamma) == [0] and {k: v for k, v in want.items() if k != 'gamma'} == {k: getattr(layer, k) for k in want if k != 'gamma'}


@pytest.mark.parametrize('cls,shape', [(c, s) for c in ALL for s in SHAPES if takes(c, s[2:])], ids=named)
def test_identity_while_gamma_is_0(cls, shape):
    x = torch.randn(shape)
    assert torch.equal(cls(24)(x), x)


# right where fastai's fail

@pytest.mark.parametrize('size', [(5, 7), (4, 7), (5, 6), (1, 1), (1, 2), (3, 1), (37, 31)], ids=named)
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_pooled_on_odd_and_tiny_maps(size, train):
    theirs, ours = pair(dtype=torch.float64, name='PooledSelfAttention2d')
    x = torch.randn(2, 24, *size, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError): theirs(x)
    ours.train(train)(x)
    ours.eval()
    for a, b in zip(results(ours, ours, x), results(lambda x: written_out(ours, x), ours, x)): assert rel(a, b) < 1e-10


@pytest.mark.parametrize('c', range(1, 8))
@each
def test_few_channels(cls, c):
    layer, x = with_gamma(cls(c)).double().eval(), torch.randn(2, c, 3, 5, dtype=torch.float64, requires_grad=True)
    use(layer)
    for a, b in zip(results(layer, layer, x), results(lambda x: written_out(layer, x), layer, x)): assert rel(a, b) < 1e-10
    if cls is not SimpleSelfAttention: assert layer.query[0].out_channels == layer.key[0].out_channels == 1


@each_norm
@pytest.mark.parametrize('size', [(7,), (2, 3), (5, 7), (2, 3, 5)], ids=named)
def test_sym_is_symmetric(norm_type, size):
    x = torch.randn(2, 13, *size, dtype=torch.float64, requires_grad=True)
    layer = use(SimpleSelfAttention(13, sym=True, norm_type=norm_type, gamma=.7).double().eval())
    for a, b in zip(results(layer, layer, x), results(lambda x: written_out(layer, x), layer, x)): assert rel(a, b) < 1e-10
    eye = torch.eye(13, dtype=torch.float64)[None]          # x x^T W x is W where x is the identity
    w = layer(eye) - eye
    assert rel(w, w.mT) < 1e-12 and w.norm() > .1
    plain = SimpleSelfAttention(13, norm_type=norm_type, gamma=.7).double().eval()
    plain.load_state_dict(layer.state_dict())
    assert rel(plain(x), layer(x)) > 1e-3


@pytest.mark.parametrize('size', [(3,), (5, 7), (2, 3, 5), (53,)], ids=named)
@pytest.mark.parametrize('fmt', ['contiguous', 'channels_last'])
def test_simple_takes_the_cheaper_order(size, fmt):
    c, n = 19, int(np.prod(size))
    layer, x = use(SimpleSelfAttention(c, gamma=.7).eval()), torch.randn(2, *size, c).movedim(-1, 1)
    if fmt == 'contiguous': x = x.contiguous()
    with FlopCounterMode(display=False) as flops: layer(x)
    conv, by_pixels, by_channels = 2 * 2 * n * c * c, 2 * 2 * n * n * 2 * c, 2 * 2 * 2 * n * c * c
    assert by_pixels != by_channels and flops.get_total_flops() - conv == pytest.approx(min(by_pixels, by_channels), abs=4 * c * c)      # and sigma


# PaperSelfAttention

@each_norm
@pytest.mark.parametrize('softmax', [True, False])
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_merge_gives_the_same_outputs(norm_type, softmax, train):
    torch.manual_seed(2)
    paper = PaperSelfAttention(24, reduction=5, norm_type=norm_type, gamma=-.7, softmax=softmax).double()
    for size in ((7,), (5, 7), (2, 3, 5)): copied_steps(paper, torch.randn(2, 24, *size, dtype=torch.float64))
    paper.train(train)
    before, modes, rng = state(paper), [m.training for m in paper.modules()], torch.get_rng_state()
    merged = paper.merge()
    same_state(state(paper), before)
    assert modes == [m.training for m in paper.modules()] and torch.equal(rng, torch.get_rng_state())
    assert type(merged) is SelfAttention and merged.training == train and merged.gamma.dtype == torch.float64 and merged.norm_type == norm_type
    assert list(merged.state_dict()) == list(SelfAttention(24, norm_type=norm_type).state_dict())
    assert not {id(p) for p in merged.parameters()} & {id(p) for p in paper.parameters()}
    merged.eval(), paper.eval()
    for size in ((11,), (5, 7), (3, 2, 5)):
        x = torch.randn(2, 24, *size, dtype=torch.float64, requires_grad=True)
        a, b = ([y, *torch.autograd.grad(y.pow(2).sum(), x)] for y in (merged(x), paper(x)))
        for p, q in zip(a, b): assert rel(p, q) < 1e-12
    if norm_type == NormType.Spectral: close(torch.linalg.matrix_norm(weight(merged.value[0]), 2), torch.tensor(1., dtype=torch.float64), rtol=1e-12, atol=0)


@each_norm
def test_merged_layer_stays_equal_over_a_training_forward(norm_type):
    torch.manual_seed(2)
    paper, x = PaperSelfAttention(24, norm_type=norm_type, gamma=.7).double(), torch.randn(2, 24, 5, 7, dtype=torch.float64)
    for _ in range(300): paper(x)                   # the power iteration has arrived
    merged = paper.merge()
    for _ in range(2): assert rel(merged(x), paper(x)) < 1e-10


def test_merge_before_the_first_forward_pass_and_in_float32():
    paper, x = PaperSelfAttention(24, gamma=.7), torch.randn(2, 24, 5, 7)
    merged = paper.merge()
    assert merged.gamma.dtype == torch.float32 and rel(merged.eval()(x), paper.eval()(x)) < 1e-6


def orthogonal(layer):
    "`out` reads the channels that `value` leaves at zero"
    with torch.no_grad(): layer.value[0].weight_orig[1:] = 0; layer.out[0].weight_orig[:, :1] = 0
    return layer

def zeroed(layer):
    use(layer), nn.init.zeros_(layer.out[0].weight_orig)
    return layer

def biased(layer):
    layer.value[0].bias = nn.Parameter(torch.ones(3))
    return layer

def watched(layer):
    layer.out.register_forward_hook(lambda *args: None)
    return layer

@pytest.mark.parametrize('make,says', [
    (lambda: PaperSelfAttention(64, heads=2), 'heads=2'), (lambda: PaperSelfAttention(24, pool=3), 'pool=3'), (lambda: biased(PaperSelfAttention(24)), 'plain convs'),
    (lambda: watched(PaperSelfAttention(24)), 'plain convs'), (lambda: orthogonal(PaperSelfAttention(24)), 'zero everywhere'), (lambda: zeroed(PaperSelfAttention(24)), 'zero everywhere')],
    ids=['heads', 'pool', 'bias', 'watched', 'orthogonal', 'zero'])
def test_what_cannot_be_merged_is_named(make, says):
    with pytest.raises(ValueError, match=says): make().merge()


# options

OPTIONS = [dict(reduction=1), dict(reduction=3), dict(reduction=24), dict(reduction=100), dict(reduction=4, heads=2), dict(reduction=4, heads=3), dict(reduction=2, heads=12), dict(pool=1), dict(pool=2), dict(pool=3),
           dict(pool=9), dict(gamma=-1.5), dict(gamma=2), dict(softmax=False), dict(reduction=2, heads=4, pool=2, gamma=.3), dict(softmax=False, pool=2, reduction=6, heads=2)]

@each_softmax
@each_norm
@pytest.mark.parametrize('options', OPTIONS, ids=named)
def test_options_against_the_formula(cls, norm_type, options):
    torch.manual_seed(1)
    layer = use(cls(24, **dict(gamma=.7) | options, norm_type=norm_type).double().eval())
    assert layer.gamma == torch.tensor(options.get('gamma', .7), dtype=torch.float32) and layer.query[0].out_channels == max(1, 24 // options.get('reduction', 8))
    for size in ((5, 7),) if cls is PooledSelfAttention2d else ((7,), (5, 7), (2, 3, 5)):
        x = torch.randn(2, 24, *size, dtype=torch.float64, requires_grad=True)
        for a, b in zip(results(layer, layer, x), results(lambda x: written_out(layer, x), layer, x)): assert rel(a, b) < 1e-10


@each_norm
@pytest.mark.parametrize('gamma', [0., -.7])
def test_options_of_simple_against_the_formula(norm_type, gamma):
    layer, x = use(SimpleSelfAttention(13, norm_type=norm_type, gamma=gamma).double().eval()), torch.randn(2, 13, 5, 7, dtype=torch.float64, requires_grad=True)
    for a, b in zip(results(layer, layer, x), results(lambda x: written_out(layer, x), layer, x)): assert rel(a, b) < 1e-10


@each
@pytest.mark.parametrize('norm_type,keys', [(NormType.Spectral, ['weight_orig', 'weight_u', 'weight_v']), (NormType.Weight, ['weight_g', 'weight_v']), (None, ['weight'])], ids=named)
def test_state_dict_keys_of_each_norm(cls, norm_type, keys):
    convs = ['conv'] if cls is SimpleSelfAttention else ['query.0', 'key.0', 'value.0'] + ['out.0'] * (cls is not SelfAttention)
    assert sorted(cls(24, norm_type=norm_type).state_dict()) == sorted(['gamma', *[f'{c}.{k}' for c in convs for k in keys]])


@each_norm
@each
def test_same_weights_trained_alike_in_all_norms(cls, norm_type):
    "The norm is trained through: gradients are those of the normalised weight, in training mode too"
    layer, x = cls(16, norm_type=norm_type, gamma=.7).double(), torch.randn(2, 16, 3, 5, dtype=torch.float64, requires_grad=True)
    layer(x)
    twin = copy.deepcopy(layer)
    got = results(layer, layer, x)
    twin(x)
    for a, b in zip(got, results(lambda x: written_out(twin, x), twin, x)): assert rel(a, b) < 1e-10


def test_any_integer_will_do(): assert SelfAttention(np.int64(24), heads=np.int32(3)).query[0].in_channels == 24

BAD = [(dict(n_channels=0), ValueError, '`n_channels` must be 1 or more, got 0'), (dict(n_channels=-8), ValueError, '`n_channels` must be'), (dict(n_channels=8.), TypeError, '`n_channels` must be a whole number, 1 or more, got 8.0'),
       (dict(n_channels='8'), TypeError, '`n_channels` must be'), (dict(n_channels=True), TypeError, '`n_channels` must be'), (dict(reduction=0), ValueError, '`reduction` must be 1 or more'), (dict(reduction=2.), TypeError, '`reduction` must be a whole number'),
       (dict(heads=0), ValueError, '`heads` must be'), (dict(heads=None), TypeError, '`heads` must be'), (dict(heads=2), ValueError, 'must divide the 3 query channels'), (dict(pool=0), ValueError, '`pool` must be'),
       (dict(pool=(2, 2)), TypeError, '`pool` must be'), (dict(norm_type=NormType.Batch), ValueError, '`norm_type` must be .*got <NormType.Batch'), (dict(norm_type='spectral'), ValueError, "got 'spectral'"), (dict(norm_type=True), ValueError, '`norm_type` must'),
       (dict(gamma='0'), TypeError, '`gamma` must be a number'), (dict(gamma=math.nan), ValueError, '`gamma` must be finite'), (dict(gamma=-math.inf), ValueError, '`gamma` must be finite'), (dict(gamma=None), TypeError, '`gamma` must be'), (dict(gamma=True), TypeError, '`gamma` must be'), (dict(softmax=1), TypeError, '`softmax` must be True or False'), (dict(softmax=None), TypeError, '`softmax`')]
BAD_SIMPLE = [(dict(n_in=0), ValueError, '`n_in` must be'), (dict(n_in=2.5), TypeError, '`n_in` must be'), (dict(ks=0), ValueError, '`ks` must be'), (dict(ks=2), ValueError, '`ks` must be odd.*got 2'), (dict(ks=3.), TypeError, '`ks` must be'),
              (dict(ks=3, sym=True), ValueError, 'needs `ks=1`'), (dict(sym=None), TypeError, '`sym` must be'), (dict(norm_type=NormType.Batch), ValueError, '`norm_type` must'), (dict(gamma='0'), TypeError, '`gamma` must be')]

@pytest.mark.parametrize('cls,kwargs,error,says', [(c, *b) for c in SOFTMAX for b in BAD] + [(SimpleSelfAttention, *b) for b in BAD_SIMPLE], ids=lambda a: getattr(a, '__name__', None) or str(a))
def test_bad_options_are_named_before_anything_is_made(cls, kwargs, error, says):
    rng = torch.get_rng_state()
    with pytest.raises(error, match=says): cls(**{('n_in' if cls is SimpleSelfAttention else 'n_channels'): 24} | kwargs)
    assert torch.equal(rng, torch.get_rng_state())


def test_channels_that_heads_do_not_divide():
    with pytest.raises(ValueError, match='4 query channels .* and the 17 value channels'): PooledSelfAttention2d(34, heads=4)
    assert PooledSelfAttention2d(34, reduction=17, heads=1).query[0].out_channels == 2


# maps, memory formats, dtypes

VIEWS = dict(contiguous=lambda t: t, channels_last=lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1), batch_last=lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0), transposed=lambda t: t.mT.contiguous().mT,
             strided=lambda t: t.repeat_interleave(2, -1)[..., ::2], every_other_channel=lambda t: t.repeat_interleave(2, 1)[:, ::2], part_of_channels_last=lambda t: torch.cat([t, t], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, :t.shape[1]],
             expanded_batch=lambda t: t[:1].expand(t.shape), expanded_map=lambda t: t[..., :1].expand(t.shape), expanded_channels=lambda t: t[:, :1].expand(t.shape))

@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ALL), st.integers(1, 3), st.integers(1, 17), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from(list(VIEWS)), st.sampled_from(['auto', 'tiled']), st.booleans())
def test_any_map_in_any_memory_format(cls, bs, c, size, view, backend, plain):
    if cls is PooledSelfAttention2d:
        size, view = (size * 2)[:2], view.replace('expanded_map', 'expanded_batch')     # where pixels tie, a maximum has no single gradient
    layer = use(cls(c, gamma=.7).double().eval())
    if not plain:
        for m in layer.children(): m.register_forward_hook(lambda *args: None)
    x = VIEWS[view](torch.randn(bs, c, *size, dtype=torch.float64)).requires_grad_()
    with attention_backend(backend): got = results(layer, layer, x)
    strides = [[step for step, side in zip(t.stride(), x.shape) if side > 1] for t in (got[0], torch.empty_like(x))]
    if 'expanded' not in view: assert strides[0] == strides[1]         # dense as `x` or contiguous, by PyTorch's own rule; an expanded map has no layout to keep
    for a, b in zip(got, results(lambda x: written_out(layer, x), layer, x)): assert rel(a, b) < 1e-9


FORMATS = [(torch.contiguous_format, (7,)), (torch.contiguous_format, (5, 7)), (torch.channels_last, (5, 7)), (torch.channels_last, (37, 31)), (torch.channels_last_3d, (2, 3, 5))]

@pytest.mark.parametrize('cls,fmt,size', [(c, *f) for c in ALL for f in FORMATS if takes(c, f[1])], ids=named)
def test_memory_format_is_kept_and_does_not_matter(cls, fmt, size):
    layer, x = use(cls(24, gamma=.7).eval()), torch.randn(2, 24, *size)
    want, y = layer(x), layer(x.to(memory_format=fmt))
    assert y.is_contiguous(memory_format=fmt) and rel(y, want) < 1e-5
    if fmt != torch.contiguous_format: assert not y.is_contiguous()


@pytest.mark.parametrize('cls', [SelfAttention, PaperSelfAttention], ids=lambda c: c.__name__)
@pytest.mark.parametrize('fmt', [torch.contiguous_format, torch.channels_last], ids=named)
def test_maps_are_not_copied_on_the_way(cls, fmt):
    layer, x = use(cls(24, gamma=.7).eval()), torch.randn(2, 24, 37, 31).to(memory_format=fmt)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as prof: layer(x)
    copies = [e for e in prof.events() if e.name == 'aten::copy_' and np.prod(e.input_shapes[0]) >= x.numel()]
    assert not copies


@each
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=named)
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_plain_dtypes_against_float64(cls, dtype, tol, train):
    torch.manual_seed(4)
    layer = use(cls(24, norm_type=None, gamma=.25)).to(dtype).train(train)
    x = (torch.randn(2, 24, 5, 7) / 2).to(dtype).requires_grad_()
    wide, xw = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    for a, b in zip(results(layer, layer, x), results(lambda x: written_out(wide, x), wide, xw)): assert a.dtype == dtype and ((a.double() - b).norm() / b.norm()) < 5 * tol


@each
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=named)
def test_a_converted_layer_trains_in_its_dtype(cls, dtype):
    layer = cls(24, gamma=.7).to(dtype)
    y = copied_steps(layer, torch.randn(2, 24, 5, 7).to(dtype))
    assert y.dtype == dtype and y.isfinite().all() and all(v.dtype == dtype and v.isfinite().all() for v in layer.state_dict().values())


@each
@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=named)
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_autocast(cls, dtype, tol, train):
    layer = use(cls(24, gamma=.7)).train(train)
    twin, x = copy.deepcopy(layer), torch.randn(2, 24, 9, 7, requires_grad=True)
    with torch.autocast('cpu', dtype=dtype): y = layer(x)
    got = [y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])]
    want = twin(x)
    assert y.dtype == torch.float32
    for a, b in zip(got, [want, *torch.autograd.grad(want.sum(), [x, *twin.parameters()])]): assert a.dtype == torch.float32 and ((a - b).norm() / b.norm().clamp_min(1e-3)) < 10 * tol
    assert rel(y, want) < tol


@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=named)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('ndim', [1, 2, 3])
@pytest.mark.parametrize('options', [dict(), dict(heads=2, unit=True, learn_scale=True), dict(softmax=False, norm_type=None), dict(norm_type=NormType.Weight, scale=.5)], ids=str)
def test_autocast_of_pooled_maps(options, ndim, channels_last, dtype, tol):
    "Of every dimension, forward and backward; what some poolings give under autocast on a CPU is float32"
    layer, x = SelfAttention(16, pool=2, gamma=.7, **options).eval(), torch.randn(2, 16, *(5, 7, 4)[:ndim])
    if channels_last and ndim > 1: x = x.to(memory_format=torch.channels_last if ndim == 2 else torch.channels_last_3d)
    want = layer(x)
    with torch.autocast('cpu', dtype=dtype): y = layer(x)
    y.square().sum().backward()
    assert y.dtype == torch.float32 and rel(y, want) < tol
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())

def test_autocast_is_no_worse_than_in_fastai():
    theirs, ours = pair()
    x = torch.randn(2, 24, 9, 7)
    with torch.autocast('cpu', dtype=torch.bfloat16): y, want = ours.eval()(x), theirs.eval()(x)
    exact = ours(x)
    assert y.dtype == want.dtype and (y - exact).norm() <= 1.1 * (want - exact).norm()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=named)
@each_softmax
def test_logits_beyond_the_range_of_half_precision(cls, dtype):
    layer = cls(24, norm_type=None, gamma=.5).to(dtype)
    with torch.no_grad():
        for m in (layer.query, layer.key): m[0].weight.fill_(8.)
    y = layer(torch.full((1, 24, 3, 5), 2., dtype=dtype))         # 3 * 384**2 = 442,368
    assert y.isfinite().all()


@each
def test_empty_batch(cls):
    layer, x = cls(24, gamma=.7), torch.randn(0, 24, 5, 7, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape


def test_tensor_image_stays_one():
    x = TensorImage(torch.randn(2, 24, 5, 7))
    for cls in ALL:
        y = with_gamma(cls(24))(x)
        assert type(y) is TensorImage and y.shape == x.shape


@pytest.mark.parametrize('x,error,says', [
    (torch.randn(2, 23, 5, 7), ValueError, r'must be .*got shape \(2, 23, 5, 7\)'),
    (torch.randn(2, 24), ValueError, r'must be \(bs, 24, ...\) with one to three map dimensions, got shape \(2, 24\)'),
    (torch.randn(2, 24, 2, 2, 2, 2), ValueError, 'one to three map dimensions'),
    (torch.randn(2, 24, 0, 7), ValueError, r'empty|\(2, 24, 0, 7\)'),
    (torch.ones(2, 24, 5, 7, dtype=torch.int32), TypeError, 'floating point, got torch.int32'),
    (torch.ones(2, 24, 5, 7, dtype=torch.bool), TypeError, 'floating point, got torch.bool'),
    (torch.randn(2, 24, 5, 7, dtype=torch.complex64), TypeError, 'must be real, got torch.complex64'),
    ([1.], TypeError, 'must be a tensor .*got list'), (None, TypeError, 'got NoneType')], ids=lambda a: str(getattr(a, 'shape', a)))
@each
def test_bad_input_is_named_and_nothing_moves(cls, x, error, says):
    layer = cls(24)
    before = state(layer)
    with pytest.raises(error, match=says): layer(x)
    if 'got shape' in says or error is TypeError: same_state(state(layer), before)


@pytest.mark.parametrize('shape', [(2, 24, 7), (2, 24, 3, 5, 7)], ids=named)
def test_pooled_takes_2d_maps_and_says_what_takes_others(shape):
    with pytest.raises(ValueError, match=r'2d map \(bs, 24, h, w\), got shape .*`SelfAttention\(..., pool=2\)`'): PooledSelfAttention2d(24)(torch.randn(shape))


@pytest.mark.parametrize('fmt', [torch.contiguous_format, torch.channels_last], ids=named)
@each_softmax
def test_no_tensor_of_n_by_n(cls, fmt):
    layer, x = cls(16, gamma=.7, pool=1), torch.randn(1, 16, 64, 64).to(memory_format=fmt)
    layer(x)
    with Largest() as largest: layer(x).sum().backward()
    assert largest.numel <= 64**4 / 8


def test_largest_sees_n_by_n_where_it_is():
    with Largest() as largest: fastai.layers.SelfAttention(16)(torch.randn(1, 16, 64, 64)).sum().backward()
    assert largest.numel == 64**4


# norms that are settled from the start, and loading

def norms(layer): return [torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2).item() for m in layer.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))]

def reinitialised(cls):
    "As fastai does to the layers of a U-Net block after making them"
    layer = cls(64)
    before = state(layer)
    apply_init(layer, nn.init.kaiming_normal_)
    assert any(not torch.equal(before[k], v) for k, v in state(layer).items())
    return layer

def loaded_from_an_unused_one(cls):
    layer = cls(64)
    layer.load_state_dict(cls(64).state_dict())
    return layer

def with_a_partial_checkpoint(cls):
    layer = cls(64)
    layer.load_state_dict({k: v for k, v in state(cls(64)).items() if k.endswith('_orig')}, strict=False)
    return layer

def after_a_checkpoint_that_did_not_fit(cls):
    layer = cls(64)
    with pytest.raises(RuntimeError, match='size mismatch'): layer.load_state_dict(cls(40).state_dict())
    return layer

@pytest.mark.parametrize('make', [lambda cls: cls(64), lambda cls: cls(5), reinitialised, loaded_from_an_unused_one, with_a_partial_checkpoint, after_a_checkpoint_that_did_not_fit, lambda cls: copy.deepcopy(cls(64)), lambda cls: pickle.loads(pickle.dumps(cls(64)))])
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
@each
def test_normalised_before_the_first_training_step(make, train, cls):
    torch.manual_seed(11)
    assert all(n == pytest.approx(1, abs=3e-3) for n in norms(use(make(cls).train(train))))

def test_fastai_is_not_normalised_there():
    "The fact that the test above stands on"
    layer = fastai.layers.SelfAttention(64).eval()
    with torch.no_grad(): layer(torch.randn(1, 64, 3))
    assert max(norms(layer)) > 2


@each
def test_state_dict_before_the_first_forward_pass_is_settled(cls):
    sd = cls(24).state_dict()
    for name in (k.removesuffix('_orig') for k in sd if k.endswith('_orig')):
        w = sd[name + '_orig'].flatten(1)
        assert sd[name + '_u'] @ w @ sd[name + '_v'] == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=3e-3)


@each
def test_loaded_vectors_are_taken_as_they_are(cls):
    "as those of fastai, random or not"
    layer, other = cls(24), state(cls(24))
    layer.load_state_dict(other)
    use(layer.eval())
    same_state(state(layer), other)


@each
def test_vectors_are_settled_only_once(cls):
    layer = use(cls(24))
    for m in layer.modules():
        if hasattr(m, 'weight_u'): m.weight_u.copy_(F.normalize(torch.randn_like(m.weight_u), dim=0))
    before = state(layer)
    use(layer.eval())
    same_state(state(layer), before)


@each
def test_a_loaded_partial_checkpoint_keeps_its_weights(cls):
    part, layer = cls(24).state_dict(), cls(24)
    for k in [k for k in part if k.endswith(('_u', '_v'))]: del part[k]
    missing, unexpected = layer.load_state_dict(part, strict=False)
    use(layer)
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in part.items()) and missing and all(k.endswith(('_u', '_v', '.weight')) for k in missing) and not unexpected


# copies

COPIES = dict(deepcopy=copy.deepcopy, pickle=lambda m: pickle.loads(pickle.dumps(m)), averaged=lambda m: torch.optim.swa_utils.AveragedModel(m, use_buffers=True).module, twice=lambda m: copy.deepcopy(copy.deepcopy(m)))

@each
@each_norm
@pytest.mark.parametrize('copied', COPIES.values(), ids=COPIES)
def test_copies_between_forward_and_backward(cls, norm_type, copied):
    layer, x = cls(24, gamma=.7, norm_type=norm_type), torch.randn(2, 24, 5, 7)
    for _ in range(2):
        y = layer(x)
        twin = copied(layer)
        y.sum().backward()
        same_state(state(twin), state(layer))
        assert torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


@each
@each_norm
@pytest.mark.parametrize('copied', COPIES.values(), ids=COPIES)
def test_copies_of_a_layer_that_never_ran(cls, norm_type, copied):
    layer, x = cls(24, gamma=.7, norm_type=norm_type), torch.randn(2, 24, 5, 7)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    copied(twin)


@each
@each_norm
def test_exponential_moving_averages_of_weights(cls, norm_type):
    "after the first step the average lies between start and now; it predicts and can be saved"
    timm = pytest.importorskip('timm.utils', reason='timm is not installed')
    model, x = nn.Sequential(cls(24, gamma=.7, norm_type=norm_type)), torch.randn(2, 24, 5, 7)
    copied_steps(model, x)
    emas = timm.ModelEmaV3(model, decay=.75), torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.75))
    start = state(model)
    emas[1].update_parameters(model)        # the first one copies
    y = copied_steps(model, x)
    now = state(model)
    emas[0].update(model), emas[1].update_parameters(model)
    y.sum().backward()
    for ema in emas:
        for name, p in ema.module.named_parameters(): close(p, .75 * start[name] + .25 * now[name])
        y = ema.eval()(x)
        assert y.isfinite().all() and torch.equal(copy.deepcopy(ema)(x), y) and torch.equal(pickle.loads(pickle.dumps(ema.module))(x), y)


@each
def test_whole_layer_through_torch_save(cls):
    layer, x, f = cls(24, gamma=.7), torch.randn(2, 24, 5, 7), io.BytesIO()
    y = copied_steps(layer, x)
    torch.save(layer, f)
    f.seek(0)
    assert torch.equal(torch.load(f, weights_only=False).eval()(x), layer.eval()(x))
    y.sum().backward()


@each
@each_norm
def test_two_forward_passes_before_one_backward(cls, norm_type):
    "loss = D(real) - D(fake): power iteration of the second pass must not spoil the graph of the first"
    layer = cls(24, gamma=.7, norm_type=norm_type)
    (layer(torch.randn(2, 24, 5, 7)).sum() - layer(torch.randn(2, 24, 5, 7)).sum()).backward()


# derivatives and transforms

@each
@each_norm
@pytest.mark.parametrize('backend', ['auto', 'tiled'])
def test_gradcheck_and_gradgradcheck(cls, norm_type, backend):
    torch.manual_seed(6)
    layer = use(cls(4, norm_type=norm_type, gamma=.7).double().eval())
    names, params = zip(*[(n, p.detach().clone().requires_grad_()) for n, p in layer.named_parameters()])
    f = lambda x, *ps: functional_call(layer, dict(zip(names, ps)), (x,))
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    with attention_backend(backend):
        assert torch.autograd.gradcheck(f, (x, *params), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (x, *params), fast_mode=True)


@each
@pytest.mark.parametrize('backend', ['auto', 'tiled'])
def test_the_same_bits_each_run(cls, backend):
    def run():
        torch.manual_seed(8)
        layer, x = cls(24, gamma=.7), torch.randn(2, 24, 37, 31)
        with attention_backend(backend): y = copied_steps(layer, x)
        return {'y': y.detach(), **state(layer)}
    same_state(run(), run())


@each
@each_norm
@pytest.mark.parametrize('backend', ['auto', 'tiled'])
def test_func_transforms(cls, norm_type, backend):
    "functional_call, grad, vmap over maps and over weights, per-sample gradients, jacrev"
    layer = use(cls(8, norm_type=norm_type, gamma=.7).double().eval())
    params, xs = {n: p.detach() for n, p in layer.named_parameters()}, torch.randn(3, 2, 8, 3, 5, dtype=torch.float64)
    call = lambda p, x: functional_call(layer, p, (x,))
    loss = lambda p, x: call(p, x).pow(2).sum()
    def by_autograd(x):
        ps = list(layer.parameters())
        return dict(zip(params, torch.autograd.grad(written_out(layer, x).pow(2).sum(), ps)))
    with attention_backend(backend):
        want = [by_autograd(x) for x in xs]
        same_state(grad(loss)(params, xs[0]), want[0], rtol=1e-9, atol=1e-9)
        same_state(vmap(grad(loss), (None, 0))(params, xs), {n: torch.stack([w[n] for w in want]) for n in params}, rtol=1e-9, atol=1e-9)
        close(vmap(layer)(xs), torch.stack([layer(x) for x in xs]))
        stacked = {n: torch.stack([p, p * .5]) for n, p in params.items()}
        ys = vmap(call, (0, None))(stacked, xs[0])
        for i in range(2): close(ys[i], call({n: p[i] for n, p in stacked.items()}, xs[0]))
        x = xs[0, :1, :, :2, :2]
        close(jacrev(lambda x: call(params, x))(x), torch.autograd.functional.jacobian(lambda x: written_out(layer, x), x))
    twin = copy.deepcopy(layer)                                    # nothing of a transform is left behind
    assert torch.equal(twin(x), layer(x)) and pickle.dumps(layer)


@each
def test_func_transforms_of_a_layer_that_never_ran(cls):
    for transform in (lambda f, x: grad(lambda x: f(x).sum())(x), lambda f, x: vmap(f)(x[None]), lambda f, x: f(x)):
        torch.manual_seed(3)
        layer, x = cls(8, gamma=.7), torch.randn(2, 8, 3, 5)
        params = dict(layer.named_parameters())
        transform(lambda x: functional_call(layer, params, (x,)), x)
        twin = copy.deepcopy(layer.eval())
        assert torch.equal(twin(x), layer(x)) and all(n == pytest.approx(1, abs=3e-3) for n in norms(twin))


@each_softmax
def test_forward_mode_says_what_to_do(cls):
    layer, x = use(cls(8, gamma=.7).eval()), torch.randn(1, 8, 2, 2)
    with attention_backend('tiled'), pytest.raises(NotImplementedError, match=r"reverse mode.*attention_backend\('math'\)"): jacfwd(layer)(x)
    with attention_backend('math'): close(jacfwd(layer)(x), jacrev(layer)(x), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize('side', [6, 40])
def test_shapes_on_the_meta_device(cls, side):
    "Where models are laid out before there is memory for them, as `torchinfo` and FSDP do; fastai's layer runs there too"
    with torch.device('meta'): made = cls(16)
    for layer in (made, cls(16).to('meta')):
        for train in (True, False):
            x = torch.rand(2, 16, side, side + 1, device='meta', requires_grad=True)
            y = layer.train(train)(x)
            y.sum().backward()
            assert y.shape == x.grad.shape == x.shape and y.device == layer.gamma.grad.device == x.device


# compilers

def compiled_as_eager(cls, backend, sizes=((5, 7), (5, 7), (6, 4)), **kwargs):
    "A fresh layer, compiled: training forwards and backwards, then eval mode, beside its twin; a second size is compiled anew, with open sizes, which takes longest"
    torch._dynamo.reset()
    torch.manual_seed(1)
    layer = cls(24, gamma=.7, **kwargs)
    twin, compiled = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend=backend)
    for train in (True, False):
        layer.train(train), twin.train(train)
        for size in sizes:
            x = torch.randn(2, 24, *size, requires_grad=True)
            for a, b in zip(results(compiled, layer, x), results(twin, twin, x)): assert rel(a, b) < 1e-4
            same_state(state(layer), state(twin), rtol=1e-4, atol=1e-5)
    copy.deepcopy(layer), pickle.dumps(layer)
    assert rel(layer(x), twin(x)) < 1e-5


@each
def test_compile_in_one_graph(cls): compiled_as_eager(cls, 'aot_eager', ((5, 7), (5, 7), (6, 4)) if cls is SelfAttention else ((5, 7), (5, 7)))

@pytest.mark.parametrize('kwargs', [dict(norm_type=NormType.Weight), dict(pool=2, reduction=4, heads=2), dict(norm_type=None, softmax=False)], ids=named)
def test_compile_options_in_one_graph(kwargs): compiled_as_eager(SelfAttention, 'aot_eager', sizes=((5, 7),), **kwargs)

tiles_compile = pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 14), reason='compiling the tiled kernel was tried on PyTorch 2.14 and 2.15 only')

@tiles_compile
def test_compile_the_tiled_kernel_in_one_graph():
    with attention_backend('tiled'): compiled_as_eager(SelfAttention, 'aot_eager', sizes=((3, 5, 2),))
    compiled_as_eager(SelfAttention, 'aot_eager', sizes=((29, 31), (37, 23)))

@tiles_compile
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_a_compiled_large_map_without_gradients(mode):
    "As every validation has it"
    layer, x = SelfAttention(8, gamma=1.).eval(), torch.rand(1, 8, 30, 34)
    with attention_backend('tiled'), mode(): assert rel(torch.compile(layer, backend='eager', fullgraph=True)(x), layer(x)) < 1e-6

@tiles_compile
@pytest.mark.skipif(not (shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')), reason='inductor compiles C++, and there is no C++ compiler here')
def test_compile_with_inductor():
    with attention_backend('tiled'): compiled_as_eager(SelfAttention, 'inductor', sizes=((5, 7),))


class Each(nn.Module):
    "What a layer of each class makes of a map: exported at once, since most of an export's time is the same for a small model and a large one"
    def __init__(self, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(use(cls(24, gamma=.7, **kwargs).eval()) for cls in ALL)
        self.eval()
    def forward(self, x): return [layer(x) for layer in self.layers]

@pytest.mark.parametrize('size', [(5, 7), (37, 31)], ids=named)
def test_export(size):
    layers, x = Each(), torch.randn(2, 24, *size)
    program = torch.export.export(layers, (x,))
    assert not any('fastai_selfattn' in str(n.target) for n in program.graph.nodes)
    for cls, got, want in zip(ALL, program.module()(x), layers(x), strict=True): assert rel(got, want) < 1e-6, cls


@each
def test_export_with_dynamic_batch_and_map_size(cls):
    if cls is PooledSelfAttention2d and tuple(map(int, torch.__version__.split('.')[:2])) < (2, 14): pytest.skip('PyTorch 2.9 makes a guard of the parity of a pooled side')
    layer = use(cls(24, gamma=.7).eval())
    program = torch.export.export(layer, (torch.randn(3, 24, 6, 8),), dynamic_shapes=({d: torch.export.Dim.AUTO for d in (0, 2, 3)},))
    assert not any('fastai_selfattn' in str(n.target) for n in program.graph.nodes)
    for shape in ((5, 24, 6, 8), (2, 24, 11, 13), (4, 24, 30, 26)):
        x = torch.randn(shape)
        assert rel(program.module()(x), layer(x)) < 1e-6


@pytest.mark.parametrize('kwargs', [{}, dict(norm_type=NormType.Weight)], ids=named)
def test_onnx(kwargs, one_registry, tmp_path):
    for name in ('onnx', 'onnxscript'): pytest.importorskip(name, reason=f'{name} is not installed')
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    layers, x = Each(**kwargs), torch.randn(2, 24, 5, 7)
    torch.onnx.export(layers, (x,), dynamo=True, verbose=False).save(tmp_path / 'layers.onnx')
    session = runtime.InferenceSession(tmp_path / 'layers.onnx')
    ys = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for cls, got, want in zip(ALL, ys, layers(x), strict=True): assert rel(torch.from_numpy(got), want) < 1e-5, cls


@each
def test_a_layer_that_never_ran_says_so_when_exported(cls):
    layer, x = cls(24, gamma=.7).eval(), torch.randn(2, 24, 5, 7)
    before = state(layer)
    with pytest.raises(RuntimeError, match='call the model once, then export'): torch.export.export(layer, (x,))
    same_state(state(layer), before)
    layer(x)
    torch.export.export(layer, (x,))


def test_onnx_of_a_layer_that_never_ran_says_so():
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    with pytest.raises(Exception) as e: torch.onnx.export(SelfAttention(24).eval(), (torch.randn(2, 24, 5, 7),), dynamo=True, verbose=False)
    assert 'call the model once, then export' in str(e.getrepr(chain=True)) and not ops.exporting()


# fuse_attention

def net(norm_type=NormType.Spectral):
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 24, 3), SelfAttention(24, gamma=.7, norm_type=norm_type), nn.ReLU(), nn.Sequential(PooledSelfAttention2d(24, gamma=-.5, norm_type=norm_type)), PaperSelfAttention(24, gamma=.9, norm_type=norm_type),
                         nn.BatchNorm2d(24), SimpleSelfAttention(24, sym=True, gamma=.01, norm_type=norm_type), SimpleSelfAttention(24, ks=3, gamma=.01, norm_type=norm_type))

@pytest.mark.parametrize('norm_type', [NormType.Spectral, NormType.Weight], ids=named)
@pytest.mark.parametrize('steps', [0, 2])
def test_fused_model_predicts_as_before(norm_type, steps):
    model, x = net(norm_type), torch.randn(2, 3, 9, 11)
    if steps: copied_steps(model, x, steps, lr=1e-6)
    frozen = [model[1].query[0], model[6].conv]
    for m in frozen: getattr(m, 'weight_orig' if norm_type == NormType.Spectral else 'weight_v').requires_grad_(False)
    model.eval()
    if steps:
        with torch.no_grad(): want = model(x)
    else: want = copy.deepcopy(model)(x)            # never ran itself
    assert fuse_attention(model) is model
    assert rel(model(x), want) < 1e-6
    plain = net(None).eval()
    assert list(model.state_dict()) == list(plain.state_dict()) and {m.norm_type for m in model.modules() if hasattr(m, 'norm_type')} == {None}
    assert [p for p in model.parameters() if not p.requires_grad] == [m.weight for m in frozen]
    plain.load_state_dict(model.state_dict(), strict=True)
    for twin in (plain, copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(twin(x), model(x))
    model.train()
    before = state(model[1])
    model(x).sum().backward()
    same_state(state(model[1]), before)             # nothing moves by itself any more
    assert model[1].value[0].weight.grad is not None and model[1].query[0].weight.grad is None


@each
def test_fused_layer_alone(cls):
    layer, x = cls(24, gamma=.7).double().eval(), torch.randn(2, 24, 5, 7, dtype=torch.float64)
    layer(x)
    want = layer(x)
    assert rel(fuse_attention(layer)(x), want) < 1e-12
    if cls is PaperSelfAttention: assert rel(layer.merge()(x), want) < 1e-12


@pytest.mark.parametrize('make,says', [(lambda: fuse_attention(net()), 'fused already'), (lambda: net(None), 'no attention layer with a norm'), (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 5, 1))), "none of this package's layers"),
                                       (lambda: nn.Sequential(fastai.layers.SelfAttention(24)), "none of this package's layers")], ids=['twice', 'no norm', 'no layer', "fastai's"])
def test_nothing_to_fuse_is_named_and_the_model_stays(make, says):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=says): fuse_attention(model)
    same_state(state(model), before)


# layers that are watched or changed

class LowRank(nn.Module):
    "As LoRA wraps a layer: nothing added at first"
    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Conv1d(24, 2, 1), nn.Conv1d(2, 3, 1)
        nn.init.zeros_(self.b.weight), nn.init.zeros_(self.b.bias)
    def forward(self, x): return self.base(x) + (self.b(self.a(x.flatten(2)))).view(len(x), 3, *x.shape[2:])

def convs(layer): return ['conv'] if isinstance(layer, SimpleSelfAttention) else ['query', 'key', 'value'] + ['out'] * hasattr(layer, 'out')

def inner(layer, name): return getattr(layer, name) if name == 'conv' else getattr(layer, name)[0]

WATCH = dict(forward=lambda m, saw: m.register_forward_hook(lambda *a: saw('forward')), pre=lambda m, saw: m.register_forward_pre_hook(lambda *a: saw('forward')), kwargs=lambda m, saw: m.register_forward_hook(lambda *a: saw('forward'), with_kwargs=True),
             backward=lambda m, saw: m.register_full_backward_hook(lambda *a: saw('backward')), backward_pre=lambda m, saw: m.register_full_backward_pre_hook(lambda *a: saw('backward')))

def patched(module, saw):
    "As libraries do that move weights around: another `forward` on the object"
    def forward(*args, old=module.forward): return saw('forward') or old(*args)
    module.forward = forward
    return SimpleNamespace(remove=lambda: vars(module).pop('forward', None))

@contextlib.contextmanager
def watching(layer, where, how, saw):
    if where == 'everywhere':
        mine = set(map(id, layer.modules()))
        register = {'forward': 'register_module_forward_hook', 'pre': 'register_module_forward_pre_hook', 'backward': 'register_module_full_backward_hook'}[how]
        handles = [getattr(nn.modules.module, register)(lambda m, *a: saw('backward' if how == 'backward' else 'forward') if id(m) in mine and isinstance(m, (nn.Conv1d, nn.Conv2d)) else None)]
    elif how == 'patched': handles = [patched(inner(layer, n) if where == 'conv' else getattr(layer, n), saw) for n in convs(layer)]
    else: handles = [WATCH[how](inner(layer, n) if where == 'conv' else getattr(layer, n), lambda what: saw(what)) for n in convs(layer)]
    try: yield len(convs(layer))
    finally:
        for h in handles: h.remove()

@pytest.mark.parametrize('cls,kwargs', [(c, k) for c in ALL for k in ({}, dict(norm_type=NormType.Weight))] + [(SimpleSelfAttention, dict(sym=True))], ids=named)
@pytest.mark.parametrize('where,how', [(w, h) for w in ('layer', 'conv') for h in (*WATCH, 'patched')] + [('everywhere', h) for h in ('forward', 'pre', 'backward')])
def test_watched_layers_give_the_same_and_each_hook_fires_once(cls, kwargs, where, how):
    torch.manual_seed(2)
    plain = cls(24, **kwargs, gamma=.7)
    plain.load_state_dict(state(cls(24, **kwargs, gamma=.7)))          # random u and v: each power iteration moves the weights
    plain = plain.double()
    layer, x = copy.deepcopy(plain), torch.randn(2, 24, 5, 7, dtype=torch.float64, requires_grad=True)
    seen = []
    with watching(layer, where, how, lambda what: seen.append(what)) as n:
        for step in range(1, 3):
            for a, b in zip(results(layer, layer, x), results(plain, plain, x)): assert rel(a, b) < 1e-10
            same_state(state(layer), state(plain), rtol=1e-10, atol=1e-12)
            if 'sym' not in kwargs: assert len(seen) == n * step and set(seen) == {how.removesuffix('_pre').replace('pre', 'forward').replace('kwargs', 'forward').replace('patched', 'forward')}
            if how != 'patched': copy.deepcopy(layer)
    layer.eval(), plain.eval()
    for a, b in zip(results(layer, layer, x), results(plain, plain, x)): assert rel(a, b) < 1e-10


@each
@pytest.mark.parametrize('shape', [(2, 24, 1, 1), (1, 24, 1, 1), (2, 24, 1, 5), (2, 24, 5, 7)], ids=str)
def test_the_memory_format_is_that_of_the_map(cls, shape):
    layer = cls(24, gamma=.7)
    for fmt in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape).contiguous(memory_format=fmt)
        if fmt is torch.contiguous_format: assert layer(x).stride() == x.stride()
        assert layer(x).is_contiguous(memory_format=fmt)

@pytest.mark.parametrize('threads', [1, 2])
def test_no_images_of_a_large_map(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert SelfAttention(16)(torch.randn(0, 16, 40, 40, requires_grad=True)).sum().backward() is None
    finally: torch.set_num_threads(before)

class Products(TorchFunctionMode):
    "How often a map is multiplied by a weight"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        with_weight = func in (F.conv1d, F.conv2d, F.linear) or func is torch.bmm and args[0].stride(0) == 0     # one weight for all images
        self.n += with_weight
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('cls', [SelfAttention, PooledSelfAttention2d, PaperSelfAttention])
@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels last'])
def test_three_convs_that_nobody_watches_are_one_product(cls, last):
    layer, x = cls(24, gamma=.7).eval(), torch.randn(2, 24, 5, 7)
    if last: x = x.to(memory_format=torch.channels_last)
    n_out = hasattr(layer, 'out')
    counts = {}
    for who in ('plain', 'watched'):
        with watching(layer, 'layer', 'forward', lambda what: None) if who == 'watched' else contextlib.nullcontext(), Products() as products: layer(x)
        counts[who] = products.n
    assert counts == dict(plain=1+n_out, watched=3+n_out)


@each
@pytest.mark.parametrize('is_watched', [True, False], ids=['watched', 'plain'])
def test_a_training_forward_is_one_power_iteration_and_eval_is_none(cls, is_watched):
    torch.manual_seed(2)
    layer = cls(24, gamma=.7)
    layer.load_state_dict(state(layer))
    before, x = copy.deepcopy(layer), torch.randn(2, 24, 5, 7)
    with watching(layer, 'layer', 'forward', lambda what: None) if is_watched else contextlib.nullcontext():
        for steps in (1, 2):
            with torch.no_grad(): layer(x)
            for n in convs(layer):
                w, u = inner(before, n).weight_orig.flatten(1), inner(before, n).weight_u
                for _ in range(steps): u = F.normalize(w @ F.normalize(w.mT @ u, dim=0), dim=0)
                close(inner(layer, n).weight_u, u, rtol=1e-4, atol=1e-5)
                close(inner(layer, n).weight.flatten(1), weight(inner(before, n), steps), rtol=1e-4, atol=1e-5)
            assert (inner(layer, convs(layer)[0]).weight_u - inner(before, convs(layer)[0]).weight_u).abs().max() > 1e-3
        moved = state(layer)
        with torch.no_grad(): layer.eval()(x)
        same_state(state(layer), moved)


def deeper(m): return nn.Sequential(nn.Identity(), m)

@pytest.mark.parametrize('cls,change', [(c, w) for c in ALL for w in (nn.Sequential, deeper)] + [(c, LowRank) for c in SOFTMAX], ids=lambda a: a.__name__)
def test_a_conv_in_another_module_is_called(cls, change):
    torch.manual_seed(2)
    plain = cls(24, gamma=.7).double()
    use(plain)
    layer, x, name = copy.deepcopy(plain), torch.randn(2, 24, 5, 7, dtype=torch.float64, requires_grad=True), convs(plain)[0]
    setattr(layer, name, change(getattr(layer, name)).double())
    for _ in range(2):
        y, want = layer(x), plain(x)
        assert rel(y, want) < 1e-10 and rel(*(torch.autograd.grad(t.pow(2).sum(), x)[0] for t in (y, want))) < 1e-10
    if change is LowRank:
        nn.init.ones_(layer.query.b.weight)
        assert rel(layer(x), plain(x)) > 1e-3
    copy.deepcopy(layer)


@pytest.mark.parametrize('change', [nn.Sequential, deeper])
def test_a_conv_of_sym_in_another_module_is_used_or_refused_by_name(change):
    plain = use(SimpleSelfAttention(24, sym=True, gamma=.7).eval())
    layer, x = copy.deepcopy(plain), torch.randn(2, 24, 5, 7)
    layer.conv = change(layer.conv)
    try: assert rel(layer(x), plain(x)) < 1e-5
    except (TypeError, ValueError, RuntimeError) as e: assert 'sym' in str(e)


@pytest.mark.parametrize('name', ['query', 'key', 'value', 'out'])
@pytest.mark.parametrize('cls', [PooledSelfAttention2d, PaperSelfAttention])
def test_what_is_appended_to_a_conv_layer_is_applied(cls, name):
    torch.manual_seed(2)
    layer, x = use(cls(24, gamma=.7).double().eval()), torch.randn(2, 24, 5, 7, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(getattr(layer, name)[0].out_channels, dtype=torch.float64)
    bn = (nn.BatchNorm2d if cls is PooledSelfAttention2d else nn.BatchNorm1d)(len(factor), eps=0).double()
    with torch.no_grad(): bn.weight.copy_(factor)
    scaled = copy.deepcopy(layer)
    getattr(layer, name).append(bn.eval())
    def formula(x):
        "A batch norm that only scales is a conv of scaled weight"
        conv = getattr(scaled, name)[0]
        w = weight(conv) * factor[:, None]
        twin = fuse_attention(copy.deepcopy(scaled))
        with torch.no_grad(): getattr(twin, name)[0].weight.copy_(w.view_as(getattr(twin, name)[0].weight))
        return written_out(twin, x)
    y, want = layer(x), formula(x)
    assert rel(y, want) < 1e-10 and rel(*(torch.autograd.grad(t.pow(2).sum(), x)[0] for t in (y, want))) < 1e-10


def test_a_bias_is_applied():
    layer, x = use(SelfAttention(24, gamma=.7).eval()), torch.randn(2, 24, 5, 7)
    want = layer(x)
    layer.value[0].bias = nn.Parameter(torch.arange(24.))
    close(layer(x), want + .7 * torch.arange(24.).view(24, 1, 1), rtol=1e-4, atol=1e-5)         # weights sum to 1


# attention_weights

@each_softmax
@each_norm
@pytest.mark.parametrize('options', [{}, dict(reduction=4, heads=3), dict(pool=2), dict(pool=3, reduction=4, heads=2), dict(softmax=False), dict(softmax=False, pool=2)], ids=named)
def test_attention_weights_are_rows_of_beta(cls, norm_type, options):
    torch.manual_seed(3)
    layer = use(cls(24, norm_type=norm_type, gamma=.7, **options).double())
    for size in ((5, 7),) if cls is PooledSelfAttention2d else ((7,), (5, 7), (2, 3, 5)):
        x, n = torch.randn(2, 24, *size, dtype=torch.float64), int(np.prod(size))
        layer(x)
        rows = [n - 1, 0, n // 2, 0]
        w = layer.attention_weights(x, rows)
        pooled = tuple(len(range(0, s, layer.pool)) for s in size)
        assert w.shape == (2, layer.heads, 4, *pooled) and not w.requires_grad
        close(w.flatten(3), written_out(layer, x, weights=True)[:, :, rows], rtol=1e-9, atol=1e-12)
        if layer.softmax: close(w.flatten(3).sum(-1), torch.ones(2, layer.heads, 4, dtype=torch.float64))
        assert torch.equal(layer.attention_weights(x, torch.tensor(rows)), w)


def test_attention_weights_give_the_output():
    layer, x = use(SelfAttention(24, reduction=4, heads=2, gamma=.7).double().eval()), torch.randn(2, 24, 5, 7, dtype=torch.float64)
    w, v = layer.attention_weights(x, range(35)).flatten(3), layer.value(x.flatten(2)).unflatten(1, (2, 12))
    assert rel((v @ w.mT).flatten(1, 2).view(x.shape) * layer.gamma + x, layer(x)) < 1e-12


@each_softmax
@pytest.mark.parametrize('modes', [{}, {'': False}, {'query': False}, {'key.0': False, 'value': False}], ids=named)
def test_attention_weights_are_a_look_only(cls, modes):
    layer, x = cls(24, gamma=.7), torch.randn(2, 24, 5, 7)
    layer.load_state_dict(state(cls(24, gamma=.7)))         # random u and v: a power iteration would be seen
    y = layer(x)
    for name, mode in modes.items(): layer.get_submodule(name).train(mode)
    flags, before, rng, attrs = {n: m.training for n, m in layer.named_modules()}, state(layer), torch.get_rng_state(), {n: m.weight.clone() for n, m in layer.named_modules() if hasattr(m, 'weight')}
    layer.attention_weights(x, [3, 34])
    with pytest.raises(ValueError): layer.attention_weights(x, [35])
    with pytest.raises(ValueError): layer.attention_weights(x[:, :5], [0])
    same_state(state(layer), before)
    assert flags == {n: m.training for n, m in layer.named_modules()} and torch.equal(rng, torch.get_rng_state())
    for n, w in attrs.items(): close(layer.get_submodule(n).weight, w, rtol=0, atol=0)
    y.sum().backward()


@each_softmax
@pytest.mark.parametrize('rows,error', [([35], ValueError), ([-1], ValueError), ([[0]], ValueError), (3, ValueError), ([.5], TypeError), ([True], TypeError)], ids=named)
def test_bad_rows_are_named(cls, rows, error):
    with pytest.raises(error, match='`rows` must'): cls(24).attention_weights(torch.randn(2, 24, 5, 7), rows)


def test_attention_weights_name_a_bad_map():
    with pytest.raises(TypeError, match='floating point'): SelfAttention(24).attention_weights(torch.ones(2, 24, 5, dtype=torch.long), [0])
    with pytest.raises(ValueError, match='2d map'): PooledSelfAttention2d(24).attention_weights(torch.randn(2, 24, 5), [0])


def test_attention_weights_of_half_precision_are_float32():
    for dtype in (torch.bfloat16, torch.float16):
        layer, x = use(SelfAttention(24).to(dtype)), torch.randn(2, 24, 5, 7, dtype=dtype)
        w = layer.attention_weights(x, [0, 17])
        assert w.dtype == torch.float32
        close(w.sum((-1, -2)), torch.ones(2, 1, 2))


# query_key_vectors

@each_softmax
@each_norm
@pytest.mark.parametrize('options', [{}, dict(reduction=4, heads=3), dict(pool=3, reduction=4, heads=2), dict(softmax=False, pool=2)], ids=named)
def test_query_and_key_vectors_give_beta(cls, norm_type, options):
    torch.manual_seed(3)
    layer = use(cls(24, norm_type=norm_type, **options).double())
    for size in ((5, 7),) if cls is PooledSelfAttention2d else ((7,), (5, 7), (2, 3, 5)):
        x = torch.randn(2, 24, *size, dtype=torch.float64)
        layer(x)
        q, k = layer.query_key_vectors(x)
        d = 24 // layer.reduction // layer.heads
        assert q.shape == (2, layer.heads, *size, d) and k.shape == (2, layer.heads, *[len(range(0, s, layer.pool)) for s in size], d) and not (q.requires_grad or k.requires_grad)
        logits = q.flatten(2, -2) @ k.flatten(2, -2).mT
        close(logits.softmax(-1) if layer.softmax else logits / k.flatten(2, -2).shape[2], written_out(layer, x, weights=True).detach(), rtol=1e-9, atol=1e-12)
        at = tuple(s // 2 for s in size)                                # and each vector is in the place of its pixel
        row = layer.attention_weights(x, [int(np.ravel_multi_index(at, size))])[:, :, 0].flatten(2)
        one = (k.flatten(2, -2) @ q[(slice(None), slice(None), *at)][..., None])[..., 0]
        close(one.softmax(-1) if layer.softmax else one / one.shape[-1], row, rtol=1e-9, atol=1e-12)


@each_softmax
def test_query_key_vectors_are_a_look_only(cls):
    layer, x = cls(24, gamma=.7), torch.randn(2, 24, 5, 7)
    layer.load_state_dict(state(layer))                                 # random u and v: a power iteration would be seen
    y = layer(x)
    layer.key.eval()
    flags, before, rng = {n: m.training for n, m in layer.named_modules()}, state(layer), torch.get_rng_state()
    for _ in range(2): layer.query_key_vectors(x)
    with pytest.raises(ValueError): layer.query_key_vectors(x[:, :5])
    with pytest.raises(TypeError): layer.query_key_vectors(x.long())
    same_state(state(layer), before)
    assert flags == {n: m.training for n, m in layer.named_modules()} and torch.equal(rng, torch.get_rng_state())
    y.sum().backward()


def test_query_and_key_of_a_known_layer():
    layer = SelfAttention(4, reduction=2, heads=2, pool=2, norm_type=None)
    with torch.no_grad():
        layer.key[0].weight.copy_(torch.tensor([[1., 0, 0, 0], [0, 2, 0, 0]])[..., None])       # fastai's `key` asks
        layer.query[0].weight.copy_(torch.tensor([[0., 0, 1, 0], [0, 0, 0, -1]])[..., None])
    x = torch.arange(24.).view(1, 4, 3, 2)
    q, k = layer.query_key_vectors(x)
    assert q[0, 0, ..., 0].tolist() == [[0, 1], [2, 3], [4, 5]] and q[0, 1, ..., 0].tolist() == [[12, 14], [16, 18], [20, 22]]
    assert k[0, 0, ..., 0].tolist() == [[15], [17]] and k[0, 1, ..., 0].tolist() == [[-18], [-22]]


@pytest.mark.parametrize('brings', ['query', 'key', 'value'])
def test_a_checkpoint_with_singular_vectors_of_one_conv(brings):
    "The convs whose vectors it lacks are settled before they are used"
    sd = SelfAttention(24).state_dict()
    sd = {k: 3*t if k.endswith('weight_orig') else t for k, t in sd.items() if not k.endswith(('_u', '_v')) or k.startswith(brings)}
    layer = SelfAttention(24).eval()
    for part in (layer.query, layer.key, layer.value):
        for b in part.buffers(): b.copy_(F.normalize(torch.ones_like(b), dim=0))     # far from any singular vector
    layer.load_state_dict(sd, strict=False)
    with torch.no_grad(): layer(torch.randn(1, 24, 5, 7))
    for part in (layer.query, layer.key, layer.value):
        assert torch.linalg.matrix_norm(part[0].weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-2)


@tiles_compile
def test_compiled_training_step_through_tiles():
    "More than 512 pixels, so that attention goes tile by tile, forward and backward"
    torch.manual_seed(3)
    layer,x = SelfAttention(16, gamma=.5),torch.randn(1, 16, 28, 28)
    with torch.no_grad(): layer(x)
    twin = copy.deepcopy(layer)
    want,got = layer(x),torch.compile(twin, backend='aot_eager', fullgraph=True)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for y in (want, got): y.square().sum().backward()
    for a, b in zip(layer.parameters(), twin.parameters()): torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


# scale and unit length

SCALED = [dict(scale=.2), dict(scale=7.), dict(unit=True), dict(unit=True, scale=10., learn_scale=True), dict(scale=3., learn_scale=True), dict(unit=True, scale=5., heads=2, reduction=4, pool=2),
          dict(softmax=False, scale=.3), dict(softmax=False, unit=True)]

def by_hand(layer, x):
    "The formula with the options `scale` and `unit`, head by head, n x n written out"
    given = x if layer._ndim == 2 else x.flatten(2)
    q, k, v = (getattr(layer, n)(given).flatten(2) for n in (layer._asks, layer._answers, 'value'))
    if layer.pool > 1: k, v = (F.max_pool2d(t.unflatten(2, x.shape[2:]), layer.pool, ceil_mode=True).flatten(2) for t in (k, v))
    outs, maps = [], []
    for a, b, c in zip(*(t.chunk(layer.heads, 1) for t in (q, k, v))):
        if layer.unit: a, b = a / a.square().sum(1, keepdim=True).sqrt(), b / b.square().sum(1, keepdim=True).sqrt()
        logits = (layer.log_scale.exp() if layer.learn_scale else layer.scale) * a.mT @ b
        maps.append(logits.softmax(-1) if layer.softmax else logits / logits.shape[-1])
        outs.append(c @ maps[-1].mT)
    o = torch.cat(outs, 1)
    if hasattr(layer, 'out'): o = layer.out(o.unflatten(2, x.shape[2:]) if layer._ndim == 2 else o).flatten(2)
    return x + layer.gamma * o.reshape(x.shape), torch.stack(maps, 1)

@pytest.mark.parametrize('options', SCALED, ids=str)
@each_softmax
def test_scale_and_unit_by_hand(cls, options):
    torch.manual_seed(6)
    options = {**options, 'pool': options.get('pool', 2 if cls is PooledSelfAttention2d else 1)}
    layer, x = use(cls(24, gamma=.7, norm_type=None, **options)), 2 * torch.randn(2, 24, 5, 7)
    want, maps = by_hand(layer, x)
    close(layer(x), want, rtol=1e-4, atol=1e-5)
    rows = [3, 34, 0]
    close(layer.attention_weights(x, rows).flatten(3), maps[:, :, rows], rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (layer(x), want))
    for a, b in zip(ours, theirs): close(a, b, rtol=1e-3, atol=1e-3)
    plain = cls(24, gamma=.7, norm_type=None, **{k: v for k, v in options.items() if k not in ('scale', 'unit', 'learn_scale')})
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != 'log_scale'})
    assert (plain(x) - want).abs().max() > 1e-3     # the option does something

@each_softmax
def test_default_scale_changes_no_key_and_no_bit(cls):
    torch.manual_seed(6)
    layer, x = use(cls(24, gamma=.7)), torch.randn(2, 24, 5, 7)
    same = cls(24, gamma=.7, scale=1., unit=False, learn_scale=False)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same(x), layer(x)) and 'log_scale' not in same.state_dict() and 'scale' not in repr(same).split('\n')[1]

def test_learned_scale_is_trained_and_stays_positive():
    torch.manual_seed(6)
    layer, x = SelfAttention(24, gamma=1., unit=True, scale=10., learn_scale=True), torch.randn(2, 24, 5, 7)
    opt = torch.optim.SGD([layer.log_scale], lr=100.)
    before = layer.log_scale.item()
    assert before == pytest.approx(math.log(10))
    layer(x).square().sum().backward()
    opt.step()
    assert layer.log_scale.item() != before and layer.log_scale.exp().item() >= 0
    assert copy.deepcopy(layer).log_scale.item() == layer.log_scale.item()

def test_unit_takes_pixels_of_zeros_and_short_ones_in_half_precision():
    layer = SelfAttention(24, gamma=1., unit=True, norm_type=None).half().requires_grad_(False)
    x = torch.zeros(1, 24, 3, 5, dtype=torch.half)
    assert torch.equal(layer(x), x)
    x[..., 1, 2] = 2e-4
    assert layer(x).isfinite().all()

@pytest.mark.parametrize('options', [dict(scale=3.), dict(unit=True, scale=10., learn_scale=True)], ids=str)
def test_merging_keeps_scale_and_unit(options):
    torch.manual_seed(6)
    layer, x = use(PaperSelfAttention(24, gamma=.7, **options)).eval(), 2 * torch.randn(2, 24, 5, 7)
    if 'learn_scale' in options: nn.init.constant_(layer.log_scale, math.log(17.))
    close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-5)
    fused = fuse_attention(copy.deepcopy(layer))
    close(fused(x), layer(x), rtol=1e-4, atol=1e-5)
    fused.load_state_dict(fused.state_dict())

@pytest.mark.parametrize('scale,error', [(0, ValueError), (-1., ValueError), (math.inf, ValueError), (math.nan, ValueError), (True, TypeError), ('8', TypeError), (None, TypeError)])
def test_bad_scales_are_named(scale, error):
    with pytest.raises(error, match='`scale` must be'): SelfAttention(24, scale=scale)


@pytest.mark.parametrize('cls,options', [(SelfAttention, dict(reduction=4)), (SelfAttention, dict(heads=3)), (SelfAttention, dict(pool=2)), (SelfAttention, dict(norm_type=None)), (SelfAttention, dict(softmax=False)),
    (SelfAttention, dict(scale=3.)), (SelfAttention, dict(unit=True)), (SelfAttention, dict(learn_scale=True)), (PooledSelfAttention2d, dict(pool=1)), (SimpleSelfAttention, dict(ks=3)), (SimpleSelfAttention, dict(sym=True))], ids=str)
def test_every_option_that_is_not_the_default_is_shown(cls, options):
    (name, value), = options.items()
    assert cls(24).extra_repr() == '24' and cls(24, **options).extra_repr() == f'24, {name}={value}'

def test_fusing_leaves_nothing_unfused():
    torch.manual_seed(2)
    layer, x = SelfAttention(24, gamma=.7).eval(), torch.randn(2, 24, 5, 7)
    class Own(nn.Conv1d): pass
    layer.value[0] = nn.utils.spectral_norm(Own(24, 24, 1, bias=False))
    layer.key[0].bias = nn.Parameter(torch.randn(3))
    want = layer(x)
    fused = fuse_attention(nn.Sequential(layer))
    close(fused(x), want, rtol=1e-5, atol=1e-6)
    assert sorted(k for k in fused.state_dict() if 'weight' in k or 'bias' in k) == ['0.key.0.bias', '0.key.0.weight', '0.query.0.weight', '0.value.0.weight']


WITHOUT_SOFTMAX = {'simple': (30, lambda: SimpleSelfAttention(24)), 'sym': (30, lambda: SimpleSelfAttention(24, sym=True)), 'dot': (400, lambda: SelfAttention(24, softmax=False))}

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('size,make', WITHOUT_SOFTMAX.values(), ids=WITHOUT_SOFTMAX)
def test_sums_without_a_softmax_may_exceed_half_precision_until_gamma_makes_them_small(size, make, dtype):
    torch.manual_seed(3)
    layer, x = make().to(dtype).eval(), (size*torch.randn(1, 24, 5, 7)).to(dtype)
    assert torch.equal(layer(x), x)                                   # gamma is 0, and 0 times inf were NaN
    nn.init.constant_(layer.gamma, 1e-3)
    want = written_out(copy.deepcopy(layer).double(), x.double())
    assert ((want-x.double())/layer.gamma.double()).abs().max() > 7e4
    got = layer(x)
    assert got.dtype == dtype and rel(got.double(), want) < (.01 if dtype == torch.float16 else .05)
