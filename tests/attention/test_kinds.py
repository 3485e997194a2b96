"Attention layers that nobody here wrote, or that are written out here, in every tool that looks at attention."
import copy
import math

import fastai.layers
import pytest
import torch
from fastai.callback import progress  # noqa: F401  gives `Learner` its `no_bar`
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from timm.layers import EcaModule
from timm.layers.non_local_attn import NonLocalAttn
from timm.layers.cbam import CbamModule
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import nn
from torch.nn import functional as F

from fastai_selfattn import learner as learner_module  # noqa: F401  patches `Learner`
from fastai_selfattn.attention import kinds
from fastai_selfattn.attention.kinds import (attention_layers, attention_off, attention_status, choose_layers, gamma_of, has_map, has_vectors, layer_vectors,
                                             layer_weights, one_number, path_matches, pool_of, register_attention)
from fastai_selfattn.attention.layers import PooledSelfAttention2d, SelfAttention, SimpleSelfAttention
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.seeing.explorer import attention_explorer
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.interpret import AttentionInterpretation
from fastai_selfattn.seeing.map_logger import AttentionMapLogger
from fastai_selfattn.seeing.record import AttentionRecorder

C, H, W = 16, 10, 14     # channels and size of the map; the image is twice as large
close = torch.testing.assert_close

@pytest.fixture(autouse=True)
def only_ours(monkeypatch):
    "What a test registers is gone after it"
    monkeypatch.setattr(kinds, '_kinds', dict(kinds._kinds))

def pixels(x): return x.flatten(2).mT     # (bs, n, c)

def on_map(t, x): return t.unflatten(-2, x.shape[2:])     # (..., n, d) -> (..., h, w, d)


class MapMHA(nn.Module):
    "`nn.MultiheadAttention` around a map"
    def __init__(self, c, heads=4):
        super().__init__()
        self.attn,self.gamma = nn.MultiheadAttention(c, heads, batch_first=True),nn.Parameter(torch.tensor([.5]))

    def forward(self, x):
        p = pixels(x)
        return x + self.gamma*self.attn(p, p, p, need_weights=False)[0].mT.reshape(x.shape)

def mha_vectors(layer, x):
    q,k,_ = F.linear(pixels(x), layer.attn.in_proj_weight, layer.attn.in_proj_bias).chunk(3, -1)
    q,k = (on_map(t.unflatten(-1, (layer.attn.num_heads,-1)).movedim(2, 1), x) for t in (q,k))
    return q/q.shape[-1]**.5,k

class NonLocal(nn.Module):
    "A non-local block, embedded Gaussian, with its last conv at zero (arXiv 1711.07971)"
    def __init__(self, c):
        super().__init__()
        self.theta,self.phi,self.g,self.out = (nn.Conv2d(i, o, 1) for i,o in ((c, c//2), (c, c//2), (c, c//2), (c//2, c)))
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x):
        q,k,v = (pixels(f(x)) for f in (self.theta, self.phi, self.g))
        return x + self.out(((q@k.mT).softmax(-1)@v).mT.unflatten(2, x.shape[2:]))

def nonlocal_vectors(layer, x): return tuple(f(x).movedim(1, -1)[:,None] for f in (layer.theta, layer.phi))

class CrissCross(nn.Module):
    "Each pixel attends to its row and its column (arXiv 1811.11721)"
    def __init__(self, c):
        super().__init__()
        self.query,self.key,self.gamma = nn.Conv2d(c, 4, 1),nn.Conv2d(c, 4, 1),nn.Parameter(torch.zeros(1))

    def weights(self, x):
        h,w = x.shape[2:]
        i = torch.arange(h*w)
        same = (i[:,None]//w == i[None]//w) | (i[:,None]%w == i[None]%w)
        return (pixels(self.query(x))@pixels(self.key(x)).mT).masked_fill(~same, -math.inf).softmax(-1)

    def forward(self, x): return x + self.gamma*(self.weights(x)@pixels(x)).mT.reshape(x.shape)

class Linear(nn.Module):
    "Linear attention with a gamma for each channel"
    def __init__(self, c):
        super().__init__()
        self.query,self.key,self.gamma = nn.Conv2d(c, 4, 1),nn.Conv2d(c, 4, 1),nn.Parameter(torch.linspace(-.5, .5, c)[:,None,None])

    def features(self, x): return tuple(F.elu(pixels(f(x)))+1 for f in (self.query, self.key))

    def forward(self, x):
        q,k = self.features(x)
        o = (q@(k.mT@pixels(x)))/(q@k.sum(1)[...,None])
        return x + self.gamma*o.mT.reshape(x.shape)

class Block(nn.Module):
    "A transformer block, without a gamma"
    def __init__(self, c):
        super().__init__()
        self.norm1,self.norm2,self.attn = nn.LayerNorm(c),nn.LayerNorm(c),nn.MultiheadAttention(c, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(c, 2*c), nn.GELU(), nn.Linear(2*c, c))

    def forward(self, x):
        p = pixels(x)
        n = self.norm1(p)
        p = p + self.attn(n, n, n, need_weights=False)[0]
        return (p + self.mlp(self.norm2(p))).mT.reshape(x.shape)

def block_vectors(layer, x):
    q,k,_ = F.linear(layer.norm1(pixels(x)), layer.attn.in_proj_weight, layer.attn.in_proj_bias).chunk(3, -1)
    q,k = (on_map(t.unflatten(-1, (2,-1)).movedim(2, 1), x) for t in (q,k))
    return q/q.shape[-1]**.5,k

def timm_nonlocal_vectors(layer, x): return tuple(f(x).movedim(1, -1)[:,None] for f in (layer.t, layer.p))

def row_weights(w, rows, x): return w[:,rows][:,None].unflatten(-1, x.shape[2:])     # (bs, n, n) -> (bs, 1, m, h, w)

def criss_cross_weights(layer, x, rows): return row_weights(layer.weights(x), rows, x)

def linear_weights(layer, x, rows):
    q,k = layer.features(x)
    w = q@k.mT
    return row_weights(w/w.sum(-1, keepdim=True), rows, x)

# class -> how it is made for C channels, and what is registered of it
WITH_VECTORS = {MapMHA: (MapMHA, dict(vectors=mha_vectors)), NonLocal: (NonLocal, dict(vectors=nonlocal_vectors, gamma=None)),
                Block: (Block, dict(vectors=block_vectors, gamma=None)), NonLocalAttn: (NonLocalAttn, dict(vectors=timm_nonlocal_vectors, gamma=None))}
WITH_WEIGHTS = {CrissCross: (CrissCross, dict(weights=criss_cross_weights)), Linear: (Linear, dict(weights=linear_weights))}
WITHOUT = {CbamModule: (CbamModule, {}), EcaModule: (EcaModule, {}), BottleneckAttn: (lambda c: BottleneckAttn(c, feat_size=(H, W)), {})}
with_map = pytest.mark.parametrize('cls', [*WITH_VECTORS, *WITH_WEIGHTS], ids=lambda c: c.__name__)
with_vectors = pytest.mark.parametrize('cls', WITH_VECTORS, ids=lambda c: c.__name__)
every = pytest.mark.parametrize('cls', [*WITH_VECTORS, *WITH_WEIGHTS, *WITHOUT], ids=lambda c: c.__name__)

def images(bs=2): return torch.randn(bs, 3, 2*H, 2*W, generator=torch.Generator().manual_seed(1))

def stem(): return nn.Sequential(nn.Conv2d(3, C, 3, 2, 1), nn.BatchNorm2d(C), nn.ReLU())

def model_with(cls, register=True):
    "A CNN with a layer of class `cls` put into it"
    make,how = (WITH_VECTORS | WITH_WEIGHTS | WITHOUT)[cls]
    if register and how: register_attention(cls, **how)
    torch.manual_seed(3)
    model = nn.Sequential(stem(), nn.Upsample(scale_factor=2), nn.Conv2d(C, 3, 3, padding=1)).eval()
    insert_attention(model, '0', layer=lambda c: make(c), size=(2*H, 2*W))
    return model

def learner(cls, *cbs):
    data = list(zip(images(8), images(8)))
    return Learner(DataLoaders(DataLoader(data[:4], bs=2), DataLoader(data[4:], bs=2)), model_with(cls), loss_func=MSELossFlat(), cbs=cbs)

def quietly_fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)


@every
def test_found_though_nobody_registered_it(cls):
    model = model_with(cls, register=False)
    path, = attention_layers(model)
    assert path == '0.3' and type(model.get_submodule(path)) is cls
    assert (gamma_of(model[0][3]) is not None) == (cls in (MapMHA, CrissCross, Linear)) and not has_map(model[0][3])
    with AttentionRecorder(model, None, stats=False) as rec: model(images())
    assert rec.changes[path].shape == (2,)
    with pytest.raises(ValueError, match='no map is known'): AttentionRecorder(model)

@every
def test_switched_off_is_taken_out(cls):
    model,x = model_with(cls),images()
    with torch.no_grad():
        on = model(x)
        with attention_off(model):
            off = model(x)
            assert attention_status(model).rows[0]['state'] == 'off'
        close(model(x), on)
        remove_attention(model)
        close(off, model(x))

@every
def test_status(cls):
    row, = attention_status(model_with(cls)).rows
    n = sum(p.numel() for p in (WITH_VECTORS | WITH_WEIGHTS | WITHOUT)[cls][0](C).parameters())
    assert (row['class'], row['parameters'], row['origin'], row['state'], row['trainable']) == (cls.__name__, n, 'appended', 'on', 'yes' if n else '-')
    assert row['map'] == ('softmax of vectors' if cls in WITH_VECTORS else 'row by row' if cls in WITH_WEIGHTS else 'none')

@every
def test_receptive_field(cls):
    model = model_with(cls)
    field = receptive_field(model, images(), (7, 9))
    close(field.on.sum(), torch.tensor(1.))
    if cls in (MapMHA, Block, Linear): assert (field.on > 0).sum() > (field.off > 0).sum()     # those that do more than nothing at the start
    copy.deepcopy(model)

@with_map
def test_recorded_maps_are_rows_of_the_map(cls):
    model,x = model_with(cls),images()
    with torch.no_grad(), AttentionRecorder(model, [(0, 0), (7, 9), (19, 27)]) as rec: model(x)
    maps = rec.maps['0.3']
    assert maps.shape == (2, 3, H, W)
    close(maps.sum((-2, -1)), torch.ones(2, 3))
    with torch.no_grad(): w = layer_weights(model[0][3], model[0][:3](x), [0, 3*W+4, 9*W+13])
    close(maps, w.mean(1))
    p,s = w[:, :, 1].flatten(2),rec.stats['0.3']     # statistics are means over the heads
    close(s.entropy[:, 3, 4], -torch.special.xlogy(p, p).sum(-1).mean(1), rtol=1e-4, atol=1e-5)
    at = torch.cartesian_prod(2*torch.arange(H)+1., 2*torch.arange(W)+1.)
    close(s.distance[:, 3, 4], (p*(at-at[3*W+4]).norm(dim=1)).sum(-1).mean(1), rtol=1e-4, atol=1e-4)
    close(s.itself[:, 3, 4], p[..., 3*W+4].mean(1))
    close(s.largest[:, 3, 4], p.amax(-1).mean(1))

def test_the_map_of_multihead_attention_is_its_own():
    model,x = model_with(MapMHA),images()
    with torch.no_grad(), AttentionRecorder(model, [(7, 9)], stats=False) as rec:
        model(x)
        p = pixels(model[0][:3](x))
        w = model[0][3].attn(p, p, p, need_weights=True)[1]
    close(rec.maps['0.3'][:, 0].flatten(1), w[:, 3*W+4])

@pytest.mark.parametrize('cls', WITH_WEIGHTS, ids=lambda c: c.__name__)
def test_the_map_explains_the_output(cls):
    "The registered weights are those that the layer uses: the output made of them is the layer's own"
    layer,x = WITH_WEIGHTS[cls][0](C),torch.randn(2, C, 5, 7)
    nn.init.constant_(layer.gamma, .7)
    register_attention(cls, **WITH_WEIGHTS[cls][1])
    w = layer_weights(layer, x, range(35))[:, 0].flatten(2)
    close(layer(x), x + layer.gamma*(w@pixels(x)).mT.reshape(x.shape))

@with_vectors
def test_explorer(cls, tmp_path):
    page = attention_explorer(learner(cls), fname=tmp_path/'page.html', max_n=2)
    assert page.off < 1e-3 and '"0.3"' in page.path.read_text(encoding='utf-8')

@pytest.mark.parametrize('cls', [*WITH_WEIGHTS, *WITHOUT], ids=lambda c: c.__name__)
def test_explorer_needs_vectors(cls, tmp_path):
    with pytest.raises(ValueError, match='no map|no query and key vectors'): attention_explorer(learner(cls), fname=tmp_path/'page.html')
    assert not any(tmp_path.iterdir())

@every
def test_gamma_logger(cls):
    learn = learner(cls, GammaLogger())
    quietly_fit(learn)
    history = learn.gamma_logger.history
    has_gamma = cls in (MapMHA, CrissCross, Linear)
    assert list(history.columns) == (['step', 'epoch', 'gamma', 'grad', 'change'] if has_gamma else ['step', 'epoch', 'change'])
    assert ('gamma' in learn.recorder.metric_names) == has_gamma
    if has_gamma: assert history.gamma.iloc[-1] == pytest.approx(one_number(gamma_of(learn.model[0][3])).item())
    if cls is Linear: assert history.gamma.iloc[0] == pytest.approx(torch.linspace(-.5, .5, C).square().mean().sqrt().item())

@with_map
def test_map_logger(cls):
    learn = learner(cls, logger := AttentionMapLogger(points=[(7, 9)], max_n=1))
    quietly_fit(learn)
    name,epochs,gammas,maps = logger.maps()
    assert (name, epochs, tuple(maps.shape)) == ('0.3', [0, 1], (2, 1, 1, H, W))
    assert [math.isnan(g) for g in gammas] == [WITH_VECTORS.get(cls, WITH_WEIGHTS.get(cls))[1].get('gamma', '') is None]*2
    logger.show_growth()

@with_map
def test_show_attention(cls):
    assert learner(cls).show_attention(max_n=2, points=[(7, 9)]).shape == (2, 2)

@with_map
def test_interpretation(cls):
    learn = learner(cls)
    interp = AttentionInterpretation.from_learner(learn)
    assert len(interp.df) == 4 and set(interp.df.layer) == {'0.3'}
    assert interp.df.entropy_share.between(0, 1.0001).all()


# --- registering

def test_a_subclass_is_of_the_same_kind_until_it_is_registered():
    class Ours(SelfAttention): pass
    assert has_vectors(Ours(C)) and pool_of(Ours(C, pool=2)) == 2
    register_attention(Ours, gamma=None)
    assert not has_map(Ours(C)) and gamma_of(Ours(C)) is None and has_map(SelfAttention(C))

def test_as_a_decorator():
    @register_attention(gamma='scale', pool=lambda layer: 3)
    class Own(nn.Module): scale = nn.Parameter(torch.tensor([2.]))
    assert gamma_of(Own()).item() == 2 and pool_of(Own()) == 3 and list(attention_layers(nn.Sequential(Own()))) == ['0']

@pytest.mark.parametrize('args,error,says', [
    ((nn.ReLU(),), TypeError, '`cls` must be a class of modules'), ((dict,), TypeError, '`cls` must be a class of modules'),
    ((MapMHA, 'vectors'), TypeError, '`vectors` must be a function or None'), ((MapMHA, mha_vectors, linear_weights), ValueError, 'not both'),
    ((MapMHA, None, None, 3), TypeError, '`gamma` must be a name'), ((MapMHA, None, None, 'gamma', 1.5), TypeError, '`pool` must be')], ids=lambda a: str(a)[:9].split()[0])
def test_what_cannot_be_registered(args, error, says):
    with pytest.raises(error, match=says): register_attention(*args)
    assert MapMHA not in kinds._kinds

@pytest.mark.parametrize('vectors', [lambda l, x: x, lambda l, x: (x, x), lambda l, x: (pixels(x), pixels(x)), lambda l, x: (on_map(pixels(x), x)[:, None], on_map(pixels(x), x)[:, None, ::3])],
                         ids=['one', 'maps', 'rows', 'other map'])
def test_vectors_of_another_shape_are_named(vectors):
    register_attention(MapMHA, vectors)
    with pytest.raises(ValueError, match='`vectors` of MapMHA must give'): layer_vectors(MapMHA(C), torch.randn(2, C, 9, 7))

def test_weights_with_the_sides_swapped_are_named():
    register_attention(CrissCross, weights=lambda layer, x, rows: criss_cross_weights(layer, x, rows).mT)
    with pytest.raises(ValueError, match=r'`weights` of CrissCross must give \(bs, heads, 2, \*map\)'): layer_weights(CrissCross(C), torch.randn(2, C, 5, 7), [0, 3])

def test_explorer_names_the_layers_it_leaves_out(tmp_path):
    learn = learner(CrissCross)
    insert_attention(learn, '2', layer=SelfAttention, size=(2*H, 2*W), gamma=.1)
    page = attention_explorer(learn, fname=tmp_path/'page.html', max_n=1).path.read_text(encoding='utf-8')
    assert 'Not shown, since there are no query and key vectors from which their maps could be made: 0.3.' in page

def test_receptive_field_leaves_nothing_in_fastais_own_unet():
    "fastai's `DynamicUnet` keeps its skips with their graph, which cannot be copied"
    from fastai.vision.learner import create_unet_model
    from fastai.vision.models import resnet18
    model = nn.Sequential(create_unet_model(resnet18, 2, (64, 64), pretrained=False), SelfAttention(2))
    receptive_field(model, torch.randn(1, 3, 64, 64))
    copy.deepcopy(model)

def test_a_part_of_a_registered_layer_is_no_layer_of_its_own():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = SelfAttention(C),SelfAttention(C)
    model = nn.Sequential(Two(), SelfAttention(C))
    assert list(attention_layers(model)) == ['0.a', '0.b', '1']
    register_attention(Two)
    assert list(attention_layers(model)) == ['0', '1']


# --- names and patterns

@pytest.mark.parametrize('pattern,fits', [('layers.5.conv2.2', True), ('layers.5.conv2.*', True), ('layers.5.*', False), ('layers.*', False), ('layers.**', True), ('**', True),
                                          ('**.2', True), ('layers.[45].conv?.2', True), ('LAYERS.5.conv2.2', False), ('', False)])
def test_patterns(pattern, fits): assert path_matches('layers.5.conv2.2', pattern) == fits

@pytest.mark.parametrize('layers', ['decoder', 'decoder.*', 'decoder.5.*', 'decoder.5.conv.1', 'decoder.5.conv', '**.1'])
def test_layers_are_named_by_path_and_by_place(layers):
    model = nn.ModuleDict(dict(decoder=nn.ModuleDict({'5': nn.ModuleDict(dict(conv=nn.Sequential(nn.Conv2d(3, C, 1), fastai.layers.SelfAttention(C))))})))
    if layers in ('decoder', 'decoder.*'):
        with pytest.raises(ValueError, match=r'no attention layer decoder.*: there are decoder\.5\.conv\.1'): choose_layers(model, layers)
    else: assert list(choose_layers(model, layers)) == ['decoder.5.conv.1']

def test_did_you_mean():
    with pytest.raises(ValueError, match=r"Did you mean '1\.attn'\?"): choose_layers(nn.Sequential(nn.ReLU(), nn.ModuleDict(dict(attn=SelfAttention(C)))), '1.atn')


# --- status

def test_status_of_a_learner_prints_and_displays():
    layers = SelfAttention(C), PooledSelfAttention2d(C, gamma=.25), SimpleSelfAttention(C), fastai.layers.SelfAttention(C)
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 3), *layers)
    for p in model[3].query.parameters(): p.requires_grad_(False)
    insert_attention(model, '0', how='append', size=12, layer=SelfAttention)
    learn = Learner(DataLoaders(DataLoader([0]), DataLoader([0])), model, loss_func=MSELossFlat())
    status = learn.attention_status()
    assert len(status) == 5 and 'Attention in Sequential' in repr(status) and '<table' in status._repr_html_()
    df = status.df().set_index('path')
    assert df.loc['3', 'gamma'] == .25 and df.loc['3', 'trainable'] == 'partly' and df.loc['4', 'map'] == 'none'
    assert df.loc['0.attention', 'origin'] == 'appended' and df.loc['5', 'origin'] == 'came with the model'

def test_status_says_what_was_replaced():
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 3, padding=1))
    insert_attention(model, '1', how='replace', size=12)
    assert attention_status(model).rows[0]['origin'] == 'in place of Conv2d'

def test_status_says_when_the_hook_is_gone():
    "As after `convert_sync_batchnorm`, which keeps the children of a batch norm and not its hooks"
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.norm = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        def forward(self, x): return self.norm(self.conv(x)).relu()
    model = Own().eval()
    path, = insert_attention(model, 'norm', size=(H, W), gamma=1.)
    assert attention_status(model).rows[0]['state'] == 'on' and attention_status(nn.DataParallel(model)).rows[0]['state'] == 'on'
    with attention_off(model): assert attention_status(model).rows[0]['state'] == 'off'
    model.norm.register_forward_hook(lambda m, args, out: out)
    assert attention_status(copy.deepcopy(model)).rows[0]['state'] == 'on'
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(attention_layers(model)) == [path] and attention_status(model).rows[0]['state'] == 'not in the path'
    model.norm.register_forward_hook(lambda m, args, out: out)
    assert attention_status(model).rows[0]['state'] == 'not in the path'
