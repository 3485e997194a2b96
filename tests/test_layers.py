"`SelfAttention` against fastai's layer and the formula, over layouts, dtypes, copies and faults"
import copy
import io
import pickle

import fastai.layers
import numpy as np
import pytest
import torch
from conftest import Largest
from fastai.torch_core import TensorImage, apply_init
from torch import nn
from torch.nn import functional as F

from fastai_selfattn import layers
from fastai_selfattn.layers import SelfAttention


def with_gamma(layer, gamma=.7):
    nn.init.constant_(layer.gamma, gamma)
    return layer

def pair(c=24, steps=3, dtype=torch.float32):
    "fastai's layer after some power iterations, and ours with its state dict"
    torch.manual_seed(7)
    theirs, ours = with_gamma(fastai.layers.SelfAttention(c)).to(dtype), SelfAttention(c).to(dtype)
    for _ in range(steps): theirs(torch.randn(2, c, 5, dtype=dtype))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours

SHAPES = [(2, 24, 7), (2, 24, 5, 7), (1, 24, 2, 3, 5), (3, 24, 1, 1), (2, 24, 37, 31)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('train', [True, False])
def test_same_results_and_gradients_as_fastai(shape, train):
    theirs, ours = pair(dtype=torch.float64)
    theirs.train(train), ours.train(train)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grads = []
    for layer in (theirs, ours):
        y = layer(x)
        torch.manual_seed(1)
        grads.append([y] + list(torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))))
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values()):      # power iteration went the same way
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_several_training_steps_give_the_weights_of_fastai():
    theirs, ours = pair()
    opts = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (theirs, ours)]
    for _ in range(5):
        x = torch.randn(2, 24, 9, 5)
        for m, opt in zip((theirs, ours), opts):
            opt.zero_grad()
            m(x).pow(2).mean().backward()
            opt.step()
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_state_dict_goes_both_ways_strictly():
    theirs, ours = fastai.layers.SelfAttention(40), SelfAttention(40)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_same_seed_same_weights_as_fastai():
    torch.manual_seed(3); theirs = fastai.layers.SelfAttention(24)
    torch.manual_seed(3); ours = SelfAttention(24)
    for name, p in ours.named_parameters(): assert torch.equal(p, theirs.state_dict()[name])


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_identity_while_gamma_is_0(shape):
    x = torch.randn(shape)
    assert torch.equal(SelfAttention(24)(x), x)


@pytest.mark.parametrize('fmt,shape', [(torch.contiguous_format, (2, 24, 5, 7)), (torch.channels_last, (2, 24, 5, 7)), (torch.channels_last_3d, (2, 24, 2, 3, 5))], ids=str)
def test_memory_format_is_kept_and_does_not_matter(fmt, shape):
    layer, x = with_gamma(SelfAttention(24)).eval(), torch.randn(shape)
    want, y = layer(x), layer(x.to(memory_format=fmt))
    assert y.is_contiguous(memory_format=fmt)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_strided_input_gives_a_contiguous_map():
    layer, x = with_gamma(SelfAttention(24)).eval(), torch.randn(2, 24, 10, 14)
    y = layer(x[..., ::2, ::2])
    assert y.is_contiguous()
    torch.testing.assert_close(y, layer(x[..., ::2, ::2].contiguous()), rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast():
    theirs, ours = pair()
    x = torch.randn(2, 24, 9, 7)
    with torch.autocast('cpu', dtype=torch.bfloat16): y, want = ours.eval()(x), theirs.eval()(x)
    assert y.dtype == want.dtype
    exact = ours(x)
    assert (y - exact).abs().max() < .05 and (y - exact).norm() <= 1.1 * (want - exact).norm()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize('c', range(1, 9))
def test_few_channels(c):
    layer, x = with_gamma(SelfAttention(c)), torch.randn(2, c, 3, 5)
    layer.eval()(x).sum().backward()
    assert layer.query[0].weight_orig.shape == (1, c, 1)
    weights = {n: getattr(layer, n)[0].weight for n in ('query', 'key', 'value')}
    p = x.flatten(2)
    beta = F.softmax(F.conv1d(p, weights['query']).mT @ F.conv1d(p, weights['key']), dim=1)
    torch.testing.assert_close(layer(x), (.7 * F.conv1d(p, weights['value']) @ beta).view_as(x) + x, rtol=1e-4, atol=1e-5)


def norms(layer): return [torch.linalg.matrix_norm(m[0].weight.detach().flatten(1), 2).item() for m in (layer.query, layer.key, layer.value)]

def use(layer):
    with torch.no_grad(): layer(torch.randn(1, layer.query[0].in_channels, 3))
    return layer

def reinitialised():
    "As fastai does to the layers of a U-Net block after making them"
    layer = SelfAttention(64)
    before = layer.value[0].weight_orig.clone()
    apply_init(layer, nn.init.kaiming_normal_)
    assert not torch.equal(before, layer.value[0].weight_orig)
    return layer

def loaded_from_an_unused_one():
    layer = SelfAttention(64)
    layer.load_state_dict(SelfAttention(64).state_dict())
    return layer

@pytest.mark.parametrize('make', [lambda: SelfAttention(64), lambda: SelfAttention(5), reinitialised, loaded_from_an_unused_one,
                                  lambda: copy.deepcopy(SelfAttention(64)), lambda: pickle.loads(pickle.dumps(SelfAttention(64)))])
@pytest.mark.parametrize('train', [True, False])
def test_normalised_before_the_first_training_step(make, train):
    torch.manual_seed(11)
    assert norms(use(make().train(train))) == pytest.approx([1, 1, 1], abs=2e-3)

def test_fastai_is_not_normalised_there():
    "The fact that the test above stands on"
    assert max(norms(use(fastai.layers.SelfAttention(64).eval()))) > 2


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.optim.swa_utils.AveragedModel(m).module], ids=['deepcopy', 'pickle', 'ema'])
def test_copies_between_forward_and_backward(copied):
    layer, x = with_gamma(SelfAttention(24)), torch.randn(2, 24, 5, 7)
    for _ in range(2):
        y = layer(x)
        twin = copied(layer)
        y.sum().backward()
        assert torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))
        assert not any(a is b for a, b in zip(twin.parameters(), layer.parameters()))


def test_whole_layer_through_torch_save():
    layer, x, f = use(with_gamma(SelfAttention(24))), torch.randn(2, 24, 5, 7), io.BytesIO()
    torch.save(layer, f)
    f.seek(0)
    assert torch.equal(torch.load(f, weights_only=False).eval()(x), layer.eval()(x))


def test_tensor_image_stays_one():
    x = TensorImage(torch.randn(2, 24, 5, 7))
    y = with_gamma(SelfAttention(24))(x)
    assert type(y) is TensorImage and y.shape == x.shape


def test_two_forward_passes_before_one_backward():
    "loss = D(real) - D(fake): power iteration of the second pass must not spoil the graph of the first"
    layer = with_gamma(SelfAttention(24))
    (layer(torch.randn(2, 24, 5, 7)).sum() - layer(torch.randn(2, 24, 5, 7)).sum()).backward()


def test_query_key_is_a_look_only():
    layer, x = with_gamma(SelfAttention(24)), torch.randn(2, 24, 5, 7)
    use(layer)
    before, rng = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    q, k = layer.query_key(x)
    assert not q.requires_grad and q.shape == k.shape == (2, 35, 3)
    assert layer.training and layer.key.training and torch.equal(rng, torch.get_rng_state())
    for name, v in layer.state_dict().items(): assert torch.equal(v, before[name])
    with pytest.raises(ValueError): layer.query_key(x[:, :5])
    assert layer.training


def test_any_integer_will_do(): assert SelfAttention(np.int64(24)).query[0].in_channels == 24

@pytest.mark.parametrize('n,error', [(0, ValueError), (-8, ValueError), (8., TypeError), ('8', TypeError), (True, TypeError)])
def test_bad_n_channels_is_named(n, error):
    with pytest.raises(error, match='`n_channels` must be'): SelfAttention(n)


@pytest.mark.parametrize('x,error,says', [
    (torch.randn(2, 23, 5, 7), ValueError, r'must be \(bs, 24, ...\) .*got shape \(2, 23, 5, 7\)'),
    (torch.randn(2, 24), ValueError, 'at least one map dimension'),
    (torch.ones(2, 24, 5, dtype=torch.int32), TypeError, 'floating point, got torch.int32'),
    (torch.randn(2, 24, 5, dtype=torch.complex64), TypeError, 'floating point, got torch.complex64'),
    ([1.], TypeError, 'must be a tensor .*got list')])
def test_bad_input_is_named_and_nothing_moves(x, error, says):
    layer = SelfAttention(24)
    before = {k: v.clone() for k, v in nn.Module.state_dict(layer).items()}
    with pytest.raises(error, match=says): layer(x)
    for name, v in nn.Module.state_dict(layer).items(): assert torch.equal(v, before[name])


def test_no_tensor_of_n_by_n():
    n, found = 48 * 48, {}
    for cls in (fastai.layers.SelfAttention, layers.SelfAttention):
        layer, x = cls(16), torch.randn(1, 16, 48, 48)
        with Largest() as largest: layer(x).sum().backward()
        found[cls.__module__] = largest.numel
    assert found['fastai.layers'] >= n * n          # the measure sees it where it is
    assert found['fastai_selfattn.layers'] <= n * n / 8
