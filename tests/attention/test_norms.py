"Convs that make their own normalised weight: PyTorch's numbers to the last bit, and none of the trouble of its hooks."
import copy, pickle
import pytest, torch
import torch.nn.functional as F
from fastai.layers import ConvLayer, NormType
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

from conftest import Largest, named
from fastai_selfattn.attention import norms
from fastai_selfattn.attention.layers import SelfAttention, fuse_attention
from fastai_selfattn.attention.norms import bake, normed_conv, settle, without_hook

pytestmark = pytest.mark.filterwarnings('ignore:.*weight_norm.*deprecated')
hooks = {NormType.Spectral: spectral_norm, NormType.Weight: weight_norm}
each_norm = pytest.mark.parametrize('norm_type', [NormType.Spectral, NormType.Weight], ids=['spectral', 'weight'])

def pair(norm_type, cls=nn.Conv1d, ni=24, no=5, ks=1, **kwargs):
    "A conv with PyTorch's hook and a copy that makes its own weight, in the same state"
    def make():
        torch.manual_seed(7)
        return hooks[norm_type](cls(ni, no, ks, **kwargs))
    theirs, ours = make(), make()
    without_hook(ours, settled=True)
    return theirs, ours

def pixels(conv): return torch.randn(2, conv.in_channels, *(5, 7)[:len(conv.kernel_size)])


@each_norm
@pytest.mark.parametrize('kwargs', [dict(), dict(bias=False), dict(ks=3, padding=1), dict(cls=nn.Conv2d, bias=False), dict(cls=nn.Conv2d, ks=3), dict(groups=5, no=10, ni=20)], ids=str)
def test_trained_side_by_side_they_stay_equal(norm_type, kwargs):
    theirs, ours = pair(norm_type, **kwargs)
    assert 'weight' not in vars(ours) and not ours._forward_pre_hooks and type(ours).__module__ == norms.__name__
    assert list(theirs.state_dict()) == list(ours.state_dict())
    is_exact = norm_type == NormType.Spectral and not ours.is_matrix()
    tol = dict(rtol=0, atol=0) if is_exact else dict(rtol=1e-5, atol=1e-6)     # PyTorch has a kernel for the other norm, ours a product for a matrix
    optims = [torch.optim.SGD(c.parameters(), lr=.05) for c in (theirs, ours)]
    for training in (True, True, False, True):
        x = pixels(ours)
        outs = [c.train(training)(x) for c in (theirs, ours)]
        torch.testing.assert_close(*outs, **tol)
        for out, opt in zip(outs, optims):
            opt.zero_grad()
            out.square().mean().backward()
            opt.step()
        for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values()): torch.testing.assert_close(a, b, msg=lambda m: f'{name}: {m}', **tol)

def test_two_steps_before_a_backward_pass():
    "The vectors move in place; the graph of the first step must not see it"
    theirs, ours = pair(NormType.Spectral)
    x = pixels(ours)
    for c in (theirs, ours): (c(x).square().sum() + c(x).exp().mean()).backward()
    assert torch.equal(theirs.weight_orig.grad, ours.weight_orig.grad) and ours.weight_orig.grad.abs().max() > .01

@each_norm
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=['copy', 'pickle'])
def test_copies_in_mid_step(norm_type, copied):
    _, ours = pair(norm_type)
    y = ours(x := pixels(ours))
    twin = copied(ours)
    y.sum().backward()
    assert type(twin) is type(ours) and torch.equal(twin.eval()(x), ours.eval()(x))
    assert next(ours.parameters()).grad.abs().max() > .01
    assert twin.weight.data_ptr() != ours.weight.data_ptr()

@each_norm
def test_undo_gives_the_very_conv_back(norm_type):
    torch.manual_seed(3)
    conv = hooks[norm_type](nn.Conv1d(24, 5, 1))
    seen = []
    handle = conv.register_forward_hook(lambda *args: seen.append(1))
    before, x = {k: (v, dict(v) if isinstance(v, dict) else None) for k, v in vars(conv).items()}, torch.randn(2, 24, 7)
    undo = without_hook(conv)
    conv(x)
    undo()
    assert type(conv) is nn.Conv1d and list(vars(conv)) == list(before)
    for k, (v, inside) in before.items(): assert vars(conv)[k] is v and (inside is None or dict(v) == inside)
    conv(x)
    handle.remove()
    conv(x)
    assert len(seen) == 2

class Own(nn.Conv1d): pass

@pytest.mark.parametrize('make', [lambda: nn.Linear(3, 4), lambda: spectral_norm(Own(3, 4, 1)), lambda: spectral_norm(nn.Conv1d(3, 4, 1), dim=1),
                                  lambda: spectral_norm(weight_norm(nn.Conv1d(3, 4, 1)), 'weight_v'), lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv1d(3, 4, 1)), lambda: nn.Conv3d(3, 4, 1)],
                         ids=['linear', 'subclass', 'other dim', 'two norms', 'parametrization', '3d'])
def test_what_is_not_known_stays_as_it_is(make):
    conv = make()
    before = vars(conv).copy()
    without_hook(conv)
    assert vars(conv) == before and not isinstance(conv, norms._Conv)

def sigma(conv): return torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2).item()

def test_settled_once_and_known_to_the_conv():
    torch.manual_seed(5)
    one, two = normed_conv(40, 24)[0], normed_conv(40, 24)[0]
    assert torch.equal(one.weight, one.weight_orig) and abs(sigma(one) - 1) > .05     # raw until it is used
    nn.init.constant_(one.weight, .5)
    assert (one.weight_orig == .5).all()
    one.eval()(torch.randn(1, 40, 3))
    assert sigma(one) == pytest.approx(1, abs=1e-3)
    two.load_state_dict(one.state_dict())
    assert two._settled and torch.equal(two.weight_u, one.weight_u)
    del (sd := one.state_dict())['weight_v']
    two.load_state_dict(sd, strict=False)
    assert not two._settled
    settle(nn.Sequential(two))
    assert sigma(two) == pytest.approx(1, abs=1e-3)

def test_a_checkpoint_with_the_vectors_of_one_conv_of_two():
    torch.manual_seed(5)
    model, other = (nn.Sequential(normed_conv(40, 24), normed_conv(24, 40)) for _ in range(2))
    sd = {k: v for k, v in other.state_dict().items() if not k.startswith('1.0.weight_') or k.endswith('orig')}
    model.load_state_dict(sd, strict=False)
    assert [c[0]._settled for c in model] == [True, False]
    model.eval()(torch.randn(1, 40, 3))
    assert torch.equal(model[0][0].weight_u, other[0][0].weight_u) and sigma(model[1][0]) == pytest.approx(1, abs=2e-3)

@pytest.mark.parametrize('norm_type', [NormType.Spectral, NormType.Weight, None], ids=named)
@pytest.mark.parametrize('ndim', [1, 2])
def test_same_draws_as_fastai_and_checkpoints_both_ways(norm_type, ndim):
    made = []
    for make in (normed_conv, lambda *args: ConvLayer(24, 5, ks=1, ndim=ndim, norm_type=norm_type, act_cls=None, bias=False)):
        torch.manual_seed(1)
        made.append((make(24, 5, ndim, norm_type), torch.rand(1)))
    (ours, r1), (theirs, r2) = made
    assert torch.equal(r1, r2) and isinstance(ours, ConvLayer)
    for (k, a), (l, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True): assert k == l and torch.equal(a, b)
    x = torch.randn(2, 24, *(5, 7)[:ndim])
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(theirs.train()(x), ours.train()(x))

@pytest.mark.parametrize('norm_type', [NormType.Spectral, NormType.Weight], ids=named)
def test_baked(norm_type):
    torch.manual_seed(1)
    layer = normed_conv(24, 5, norm_type=norm_type).eval()
    want = copy.deepcopy(layer)(x := torch.randn(2, 24, 7))
    bake(layer[0])
    assert torch.equal(layer(x), want) and list(layer.state_dict()) == ['0.weight'] and layer[0].weight.requires_grad
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(copy.deepcopy(layer)(x), want) and isinstance(pickle.loads(pickle.dumps(layer)), ConvLayer)

def test_layout_is_kept_and_nothing_is_copied():
    conv = normed_conv(24, 5, norm_type=None)[0]
    last = torch.randn(2, 35, 24).mT
    y = conv(last)
    assert y.stride(1) == 1
    torch.testing.assert_close(y, F.conv1d(last.contiguous(), conv.weight))
    assert conv(last.contiguous()).is_contiguous()
    single = conv(last[0])     # not a batch: PyTorch's way
    torch.testing.assert_close(single, y[0])

@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.*torch.jit.*deprecated')
@pytest.mark.parametrize('train', [False, True])
def test_a_trace_does_not_see_the_settling(train):
    torch.manual_seed(1)
    layer, x = normed_conv(24, 5).train(train), torch.randn(2, 24, 7)
    traced = torch.jit.trace(layer, x, check_trace=not train)
    assert 'power_iteration' not in str(traced.inlined_graph)
    if not train: torch.testing.assert_close(traced(x), layer(x))
    assert sigma(layer[0]) == pytest.approx(1, abs=1e-3)


def test_steps_and_eps_of_the_hook_are_kept():
    def make():
        torch.manual_seed(7)
        return spectral_norm(nn.Conv1d(24, 5, 1), n_power_iterations=3, eps=1.)     # so large that it counts
    theirs, ours = make(), make()
    without_hook(ours, settled=True)
    x = pixels(ours)
    for _ in range(2):
        y = ours(x)
        assert y.isfinite().all() and torch.equal(y, theirs(x)) and torch.equal(ours.weight_u, theirs.weight_u)
    assert ours.weight_u.norm() < .9 and torch.equal(copy.deepcopy(ours).eval()(x), theirs.eval()(x))

@pytest.mark.parametrize('norm_type', [NormType.Spectral, NormType.Weight], ids=named)
@pytest.mark.parametrize('ks', [1, 3])
def test_baking_keeps_a_bias(norm_type, ks):
    theirs, ours = pair(norm_type, ks=ks)
    x = pixels(ours)
    before = ours.eval()(x)
    bake(ours)
    torch.testing.assert_close(ours(x), before, rtol=0, atol=0)
    assert ours.bias is not None and sorted(dict(ours.named_parameters())) == ['bias', 'weight'] and not list(ours.buffers())

@each_norm
def test_what_stays_hooked_is_baked_too(norm_type):
    torch.manual_seed(1)
    conv = hooks[norm_type](Own(24, 5, 1)).eval()
    (conv.weight_orig if norm_type == NormType.Spectral else conv.weight_v).requires_grad_(False)
    x = pixels(conv)
    want, model = conv(x), nn.Sequential(conv)
    assert norms.normed(model) == [conv]
    bake(conv)
    torch.testing.assert_close(conv(x), want)
    assert norms.normed(model) == [] and list(conv.state_dict()) == ['bias', 'weight'] and not conv.weight.requires_grad
    conv.load_state_dict(conv.state_dict())

@pytest.mark.filterwarnings('ignore')
def test_an_error_while_settling_under_a_trace_is_raised(monkeypatch):
    layer = normed_conv(24, 5).eval()
    def broken(conv): raise RuntimeError('broken')
    monkeypatch.setattr(norms, '_settle', broken)
    with pytest.raises(RuntimeError, match='broken'): torch.jit.trace(layer, torch.randn(2, 24, 7))
    assert not layer[0]._settled


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('layout', ['rows', 'columns', 'every other column'])
@pytest.mark.parametrize('bs,n', [(0, 20), (1, 20), (3, 20), (3, 5)])
def test_pixels_are_mixed_alike_in_every_layout_and_dtype(bs, n, layout, dtype):
    torch.manual_seed(3)
    x, w = torch.randn(bs, 6, n).to(dtype), torch.randn(4, 6).to(dtype)
    given = dict(rows=lambda: x.mT.contiguous().mT, columns=lambda: x, **{'every other column': lambda: x.repeat_interleave(2, 2)[..., ::2]})[layout]()
    got, want = norms.mix(w, given), torch.einsum('oc,bcn->bon', w.double(), x.double())
    assert got.dtype == dtype and (bs == 0 or (got.stride(1) == 1) == (layout == 'rows'))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=8*torch.finfo(dtype).eps)

@pytest.mark.parametrize('c,n', [(64, 9), (64, 64), (16, 100)])
def test_the_backward_pass_holds_nothing_larger_than_maps(c, n):
    x, w = torch.randn(32, c, n, requires_grad=True), torch.randn(c+c//4, c, requires_grad=True)
    with Largest() as largest: norms.mix(w, x).square().sum().backward()
    assert largest.numel <= 1.25*x.numel()

@each_norm
def test_a_norm_of_pytorch_on_a_conv_of_ours_without_one_is_baked(norm_type):
    torch.manual_seed(3)
    layer, x = SelfAttention(16, norm_type=None, gamma=1.), torch.randn(2, 16, 6, 6)
    hooks[norm_type](layer.value[0])
    layer(x)
    want = layer.eval()(x)
    fuse_attention(layer)
    torch.testing.assert_close(layer(x), want)
    assert not layer.value[0]._forward_pre_hooks and sorted(n for n, _ in layer.named_parameters()) == ['gamma', 'key.0.weight', 'query.0.weight', 'value.0.weight']

@pytest.mark.parametrize('factor', [1e-4, 1., 300.])
def test_a_norm_settles_under_autocast_as_without(factor):
    def made():
        torch.manual_seed(0)
        layer = SelfAttention(16, gamma=1.)
        for name in ('query', 'key', 'value'): getattr(layer, name)[0].weight_orig.data *= factor
        return layer
    a, b, x = made(), made(), torch.randn(1, 16, 5, 6)
    a(x)
    with torch.autocast('cpu', torch.float16): b(x)
    for m in ('query', 'key', 'value'):
        u, v = ([getattr(l, m)[0].weight_u for l in (a, b)], [getattr(l, m)[0].weight_v for l in (a, b)])
        torch.testing.assert_close(u[0].abs(), u[1].abs(), rtol=2e-2, atol=2e-3), torch.testing.assert_close(v[0].abs(), v[1].abs(), rtol=2e-2, atol=2e-3)
