"Each arm is what it says: uniform maps, one context for all pixels, as many parameters as attention."
from functools import partial
import pytest, torch
from conftest import named
from fastai_selfattn.attention.kinds import attention_layers, layer_weights
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention
from fastai_selfattn.compare.arms import CONTROLS, AsLarge, GlobalContext, ResidualConv, Uniform, find_arms
from fastai_selfattn.placement.insert import insert_attention
from fastai_selfattn.placement.sites import Site
from torch import nn

sizes = {1: (9,), 2: (5, 7), 3: (3, 4, 5)}

def site(c, ndim=2): return Site('here', 'here', c, sizes[ndim])

def n_params(layer): return sum(p.numel() for p in layer.parameters())

@pytest.mark.parametrize('c', [40, 48, 56, 64, 100, 128, 256, 384])
@pytest.mark.parametrize('args', [{}, dict(reduction=4), dict(heads=4, pool=2)], ids=named)
def test_as_many_parameters_as_attention(c, args):
    if c//8 % args.get('heads', 1) or c % args.get('heads', 1): args = {}
    arms = find_arms(['attention', 'context', 'conv3', 'conv1', 'uniform'], partial(SelfAttention, **args))
    wanted = n_params(SelfAttention(c, **args))
    for name in ('context', 'conv3', 'conv1'): assert abs(n_params(arms[name].layer(c, site(c)))/wanted-1) < .1, name
    assert n_params(arms['uniform'].layer(c, site(c))) == wanted

@pytest.mark.parametrize('ndim', sizes)
def test_all_arms_on_maps_of_any_dimension(ndim):
    x = torch.randn(2, 24, *sizes[ndim])
    for name,arm in find_arms(CONTROLS[1:], SelfAttention).items():
        if not arm.layer: continue
        layer = arm.layer(24, site(24, ndim))
        assert layer(x).shape == x.shape
        assert torch.equal(layer(x), x), f'{name} does not start as the identity'
        layer(x).square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters()), f'{name} does not learn'

@pytest.mark.parametrize('make,ndim', [(SelfAttention, 1), (SelfAttention, 2), (SelfAttention, 3), (PaperSelfAttention, 2), (PooledSelfAttention2d, 2),
                                      (partial(SelfAttention, heads=3, pool=2, norm_type=None), 3)], ids=named)
def test_uniform_maps(make, ndim):
    torch.manual_seed(0)
    layer,x = Uniform(make)(24, site(24, ndim)),torch.randn(2, 24, *sizes[ndim])
    nn.init.constant_(layer.gamma, 1.)
    attention = make(24)
    attention.load_state_dict(layer.state_dict())
    for mode in (True, False):
        w = layer_weights(layer.train(mode), x, [0, 2])
        assert torch.allclose(w, torch.full_like(w, 1/w[0, 0, 0].numel()))
        assert not torch.allclose(layer_weights(attention.train(mode), x, [0, 2]), w, rtol=1e-2)     # the input bites
    added = (layer(x)-x).flatten(2)
    assert torch.allclose(added, added[:, :, :1].expand_as(added), atol=1e-5)
    assert not torch.allclose((attention(x)-x).flatten(2), added, rtol=1e-3)

def test_uniform_has_attentions_parameters_and_start():
    states = []
    for arm in find_arms(['attention', 'uniform'], partial(SelfAttention, gamma=1.)).values():
        if not arm.layer: continue
        torch.manual_seed(3)
        states.append(arm.layer(24, **({} if arm.name == 'attention' else {'site': site(24)})).state_dict())
    a,u = states
    assert a.keys() == u.keys() and all(torch.equal(a[k], u[k]) for k in a)

def test_uniform_gives_the_mean_of_the_values():
    layer,x = Uniform(partial(SelfAttention, gamma=.5, norm_type=None))(16, site(16)),torch.randn(2, 16, 5, 7)
    values = torch.einsum('oc,bchw->bohw', layer.value[0].weight[:, :, 0], x)
    assert torch.allclose(layer(x), x+.5*values.mean((2, 3), keepdim=True), atol=1e-5)

@pytest.mark.parametrize('make', [SimpleSelfAttention, partial(SelfAttention, softmax=False), nn.Identity], ids=named)
def test_no_uniform_maps_where_there_is_no_softmax_of_ours(make):
    with pytest.raises(ValueError, match="cannot be made uniform: leave the arm 'uniform' out"): Uniform(make)(16, site(16))

def test_context_adds_one_vector_to_all_pixels_and_depends_on_all():
    block,x = GlobalContext(12, 5),torch.randn(2, 12, 5, 7)
    nn.init.normal_(block.transform[-1].weight)
    added = (block(x)-x).flatten(2)
    assert torch.allclose(added, added[:, :, :1].expand_as(added), atol=1e-5)
    other = x.clone()
    other[0, :, 4, 6] += 3
    moved = (block(other)-other).flatten(2)
    assert not torch.allclose(moved[0], added[0], atol=1e-3) and torch.allclose(moved[1], added[1], atol=1e-6)

def test_conv3_sees_neighbours_and_conv1_does_not():
    for ks,reach in ((3, 1), (1, 0)):
        block = ResidualConv(12, 4, ks).eval()
        nn.init.normal_(block.convs[-1][0].weight)
        x = torch.randn(1, 12, 9, 9, requires_grad=True)
        block(x)[0, :, 4, 4].sum().backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert (rows.min(), rows.max()) == (4-reach, 4+reach)

def test_matching_draws_no_random_numbers_more():
    "What is made to count parameters leaves the random numbers alone"
    make = AsLarge(ResidualConv, SelfAttention)
    torch.manual_seed(0)
    a = make(40, site(40))
    torch.manual_seed(0)
    b = ResidualConv(40, 5)
    assert torch.equal(a.convs[0][0].weight, b.convs[0][0].weight)

def test_all_go_where_attention_goes():
    for arm in find_arms(CONTROLS[1:], SelfAttention).values():
        if not arm.layer: continue
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 40, 3))
        paths = insert_attention(model, ['0', '1'], layer=arm.layer, size=(21, 15))
        assert len(paths) == 2 and list(attention_layers(model)) == paths

@pytest.mark.parametrize('arms,error,words', [
    (['unifrom'], ValueError, "Did you mean 'uniform'"), ('attention', TypeError, 'a list of names'), ([], ValueError, 'nothing to compare'),
    (['none'], ValueError, 'nothing to compare'), ({'uniform': SelfAttention}, ValueError, 'is taken'), ({'wide': 'conv3'}, ValueError, 'has that name'),
    ({'a at b': SelfAttention}, TypeError, "without ' at '"), ({'mine': 3}, TypeError, '`layer` must be')], ids=named)
def test_arms_that_are_none(arms, error, words):
    with pytest.raises(error, match=words): find_arms(arms, SelfAttention)
