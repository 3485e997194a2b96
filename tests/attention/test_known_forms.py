"The recipes of howto/known_forms against the formulas of the code bases they stand for, in float64"
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d

bs, c, h, w = 2, 20, 6, 10

def flat(t): return t.flatten(2)
def conv(weight, x): return F.conv2d(x, weight.view(*weight.shape[:2], 1, 1))
def normed(layer): return {n: m[0].weight.detach() / torch.linalg.matrix_norm(m[0].weight.detach().flatten(1), 2) for n, m in layer.named_children()}

@pytest.fixture
def x():
    torch.manual_seed(5)
    return torch.randn(bs, c, h, w, dtype=torch.float64)


def sagan_code(x, theta, phi, g, out, sigma):
    "sn_non_local_block_sim of brain-research/self-attention-gan, channels first; BigGAN-PyTorch's Attention under other names"
    q, k, v = conv(theta, x), F.max_pool2d(conv(phi, x), 2), F.max_pool2d(conv(g, x), 2)
    attn = torch.einsum('bdj,bdi->bji', flat(q), flat(k)).softmax(-1)
    attn_g = torch.einsum('bji,bci->bcj', attn, flat(v)).view(bs, -1, h, w)
    return x + sigma * conv(out, attn_g)

def test_sagan_code_is_the_pooled_layer(x):
    layer = PooledSelfAttention2d(c, gamma=-.7).double()
    for _ in range(200): layer(x)
    W = normed(layer)
    assert [tuple(m.shape[:2]) for m in W.values()] == [(2, 20), (2, 20), (10, 20), (20, 10)]
    torch.testing.assert_close(layer.eval()(x), sagan_code(x, W['query'], W['key'], W['value'], W['out'], -.7), rtol=1e-6, atol=1e-6)


def test_weights_of_biggan_find_their_spectral_norms(x):
    names = dict(theta='query', phi='key', g='value', o='out')
    shapes = dict(theta=(2, c), phi=(2, c), g=(10, c), o=(c, 10))
    state = {k: torch.randn(*s, 1, 1, dtype=torch.float64) for k, s in shapes.items()}
    layer = PooledSelfAttention2d(c).double().eval()
    layer(x)      # a layer that has run before must settle again
    left = layer.load_state_dict({f'{names[k]}.0.weight_orig': v for k, v in state.items()} | {'gamma': torch.tensor([.3])}, strict=False)
    assert not left.unexpected_keys
    W = {k: v / torch.linalg.matrix_norm(v.flatten(1), 2) for k, v in state.items()}
    torch.testing.assert_close(layer(x), sagan_code(x, *W.values(), .3), rtol=1e-4, atol=1e-4)


def non_local(softmax, pool=1):
    layer = PaperSelfAttention(c, reduction=2, norm_type=None, gamma=1., softmax=softmax, pool=pool)
    layer.out.append(nn.BatchNorm1d(c))
    nn.init.zeros_(layer.out[1].weight)
    return layer.double()

def block(x, layer, softmax, pool=1):
    "The non-local block of arXiv 1711.07971: eq. 3 (embedded Gaussian) or 4 (dot product), then eq. 6 with batch norm"
    def project(name):
        m = getattr(layer, name)[0]
        return conv(m.weight.detach(), x) + (0 if m.bias is None else m.bias.detach().view(-1, 1, 1))
    def sub(t): return flat(F.max_pool2d(t, pool) if pool > 1 else t)
    theta, phi, g = flat(project('key')), sub(project('query')), sub(project('value'))
    f = torch.einsum('bdj,bdi->bji', theta, phi)
    f = f.softmax(-1) if softmax else f / phi.shape[-1]
    W_y = torch.einsum('od,bdj->boj', layer.out[0].weight.detach()[..., 0], torch.einsum('bji,bdi->bdj', f, g))
    bn = layer.out[1]
    mean, var = W_y.mean((0, 2), keepdim=True), W_y.var((0, 2), keepdim=True, correction=0)
    return x + ((W_y - mean) / (var + bn.eps).sqrt() * bn.weight[:, None] + bn.bias[:, None]).view_as(x)

@pytest.mark.parametrize('softmax', [True, False])
@pytest.mark.parametrize('pool', [1, 2])
def test_non_local_block(x, softmax, pool):
    layer = non_local(softmax, pool)
    assert torch.equal(layer(x), x)
    nn.init.uniform_(layer.out[1].weight, .5, 2), nn.init.uniform_(layer.out[1].bias)
    torch.testing.assert_close(layer(x), block(x, layer, softmax, pool), rtol=1e-9, atol=1e-9)


def test_non_local_block_with_biases(x):
    layer = non_local(True)
    nn.init.ones_(layer.out[1].weight)
    for name in ('query', 'key', 'value'): getattr(layer, name)[0].bias = nn.Parameter(torch.randn(10, dtype=torch.float64))
    y = layer(x)
    torch.testing.assert_close(y, block(x, layer, True), rtol=1e-9, atol=1e-9)
    layer.key[0].bias = None      # the bias of the conv that asks matters
    assert (layer(x) - y).abs().max() > .01
