"Nets that keep their channels last: true channels and maps by each net's own word, and attention over height and width"
import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video.swin_transformer import SwinTransformer3d

from fastai_selfattn.attention.kinds import attention_layers
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.sites import attention_sites

class Do(nn.Module):
    "Does with a map whatever is wanted; its children are called by it"
    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for name, part in parts.items(): self.add_module(name, part)
    def forward(self, x): return self.f(self, x)

def swin(**kwargs): return SwinTransformer([4, 4], 24, [1, 2], [2, 3], [3, 3], num_classes=5, **kwargs)
def swin_v2(): return swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
def timms(name, **kwargs): return timm.create_model(name, num_classes=5, img_size=(48, 64), embed_dim=24, depths=(1, 2), num_heads=(2, 3), **kwargs)

models = dict(                      # model, size of the image, where, channels, map
    swin=(swin, (48, 80), 'features.3', 48, (6, 10)),
    swin_padded=(swin, (52, 80), 'features.1', 24, (13, 20)),
    swin_block=(swin, (48, 80), 'features.3.0', 48, (6, 10)),
    swin_v2=(swin_v2, (48, 80), 'features.2', 48, (6, 10)),
    swin_3d=(lambda: SwinTransformer3d([2, 4, 4], 24, [1, 2], [2, 3], [2, 3, 3], num_classes=5), (6, 32, 48), 'features.2', 48, (3, 4, 6)),
    timm=(lambda: timms('swin_tiny_patch4_window7_224', window_size=4), (48, 64), 'layers.1', 48, (6, 8)),
    timm_v2=(lambda: timms('swinv2_tiny_window8_256', window_size=4), (48, 64), 'layers.0', 24, (12, 16)),
    mambaout=(lambda: timm.create_model('test_mambaout', num_classes=5), (64, 96), 'stages.1', 32, (8, 12)),
)

def made(name):
    torch.manual_seed(3)
    f, size, where, c, side = models[name]
    return f().eval(), torch.randn(2, 3, *size), where, c, side

@pytest.mark.parametrize('name', models)
def test_true_channels_and_map(name):
    model, x, where, c, side = made(name)
    site = attention_sites(model, x).every[where]
    assert (site.channels, site.map, site.axis, site.reason, site.note) == (c, side, len(side)+1, '', 'channels last')

def test_stages_as_timm_says():
    model = timms('swin_tiny_patch4_window7_224', window_size=4)
    sites = attention_sites(model, (48, 64))
    got = [(sites.every[f['module']].channels, sites.every[f['module']].map) for f in model.feature_info]
    assert got == [(f['num_chs'], (48//f['reduction'], 64//f['reduction'])) for f in model.feature_info]

@pytest.mark.parametrize('name', models)
def test_attention_over_height_and_width(name):
    model, x, where, c, side = made(name)
    y, keys = model(x), list(model.state_dict())
    maps = []
    model.get_submodule(where).register_forward_hook(lambda m, args, out: maps.append(out))
    model(x)
    path, = insert_attention(model, where, size=x)
    assert torch.equal(model(x), y) and list(attention_layers(model)) == [path]
    layer = model.get_submodule(path)
    layer.gamma.data.fill_(.7)
    maps.clear()
    z = model(x)
    assert not torch.allclose(z, y)
    with torch.no_grad():     # by hand: pixels are all sides but the first and the last
        layer.gamma.fill_(0.)
        base = (maps.clear(), model(x), maps[0])[2].flatten(1, -2)
        q, k, v = (base @ p[0].weight.flatten(1).T for p in (layer.query, layer.key, layer.value))
        weights = (k @ q.mT).softmax(-1)
        layer.gamma.fill_(.7)
        maps.clear(), model(x)
        torch.testing.assert_close(maps[0].flatten(1, -2), .7*(weights @ v) + base, rtol=1e-4, atol=1e-4)
    for again in (copy.deepcopy, lambda m: m):
        torch.testing.assert_close(again(model)(x), z)
    model.train()(x).sum().backward()
    assert layer.query[0].weight_orig.grad.abs().sum() > 0
    remove_attention(model.eval())
    assert torch.equal(model(x), y) and list(model.state_dict()) == keys

def test_at_another_size_than_it_was_inserted_at():
    model, x, where, *_ = made('swin')
    insert_attention(model, where, size=x)
    y = swin().eval()
    y.load_state_dict(model.state_dict(), strict=False)
    other = torch.randn(1, 3, 64, 56)
    assert torch.equal(model(other), y(other))

def test_in_place_of_a_windows_attention_and_back():
    model, x, *_ = made('swin')
    y, keys = model(x), list(model.state_dict())
    path, = insert_attention(model, 'features.3.1.attn', 'replace', size=x)
    assert path == 'features.3.1.attn.attention' and list(attention_layers(model)) == [path]
    layer, ins = model.get_submodule(path), []
    model.features[3][1].norm1.register_forward_hook(lambda m, args, out: ins.append(out))
    model.features[3][1].attn.register_forward_hook(lambda m, args, out: ins.append(out))
    layer.gamma.data.fill_(-.4)
    z = model(x)
    torch.testing.assert_close(ins[1], layer(ins[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    ins.clear()
    for h in (model.features[3][1].norm1, model.features[3][1].attn): h._forward_hooks.clear()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), z)
    assert remove_attention(model) == [path]
    assert torch.equal(model(x), y) and list(model.state_dict()) == keys

def test_a_module_that_turns_the_map_is_not_replaced():
    model, x, *_ = made('swin')
    with pytest.raises(ValueError, match='moves the channels to another side'): insert_attention(model, 'permute', 'replace', size=x)

def test_what_follows_may_take_a_view():
    model = nn.Sequential(nn.Conv2d(3, 24, 3), Do(lambda m, x: m.f2(x.permute(0, 2, 3, 1)), f2=nn.Linear(24, 16)), Do(lambda m, x: x.view(len(x), -1)))
    x = torch.randn(2, 3, 9, 12)
    y = model(x)
    insert_attention(model, '1', size=x)
    assert torch.equal(model(x), y)

conv = nn.Conv2d(3, 24, 3, 2, 1)

@pytest.mark.parametrize('module,channels,side,axis', [
    (Do(lambda m, x: m.mix(x), mix=nn.Linear(14, 14)), 24, (10, 14), 1),                                       # over the columns, as nets for sound have it
    (Do(lambda m, x: m.norm(x), norm=nn.LayerNorm(14)), 24, (10, 14), 1),
    (Do(lambda m, x: m.norm(x.transpose(2, 3)).transpose(2, 3), norm=nn.LayerNorm(10)), 24, (10, 14), 1),
    (Do(lambda m, x: m.mix(x.permute(0, 2, 3, 1)), mix=nn.Linear(24, 14)), 14, (10, 14), 3),
    (Do(lambda m, x: x.movedim(1, -1) @ m.mix.weight.T, mix=nn.Linear(24, 14)), 14, (10, 14), 3),
    (Do(lambda m, x: m.mix(x.flatten(2).mT).mT.unflatten(-1, (10, 14)), mix=nn.Linear(24, 24)), 24, (10, 14), 1),   # tokens and back
    (Do(lambda m, x: m.mix(x.flatten(2).transpose(1, 2)).reshape(1, 10, 14, 24), mix=nn.Linear(24, 24)), 24, (10, 14), 3),
    (Do(lambda m, x: torch.einsum('bchw->bhwc', x)), 24, (10, 14), 3),                                         # by its letters
    (Do(lambda m, x: F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 0)).roll(1, 2).contiguous()), 24, (10, 15), 3),
    (Do(lambda m, x: x.transpose(1, 2)), 24, (10, 14), 2),
])
def test_where_channels_are(module, channels, side, axis):
    site = attention_sites(nn.Sequential(conv, module), (20, 28))['1']
    assert (site.channels, site.map, site.axis, site.reason) == (channels, side, axis, '')

@pytest.mark.parametrize('axis', [2, 3])
def test_channels_on_any_side(axis):
    model = nn.Sequential(conv, Do(lambda m, x: x.movedim(1, axis))).eval()
    x = torch.randn(2, 3, 20, 28)
    y = model(x)
    path, = insert_attention(model, '1', size=x)
    layer = model.get_submodule(path)
    layer.gamma.data.fill_(.6)
    torch.testing.assert_close(model(x), layer(y.movedim(axis, 1)).movedim(1, axis))

def windows(m, x): return m.mix(x.unflatten(2, (2, 5)).unflatten(4, (2, 7)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 5, 7, 24))

def back(m, x): return windows(m, x).reshape(-1, 2, 2, 5, 7, 24).permute(0, 1, 3, 2, 4, 5).reshape(-1, 10, 14, 24)

@pytest.mark.parametrize('f,reason', [
    (lambda m, x: m.mix(x.permute(2, 3, 0, 1)), 'gives (10, 14, 1, 24), where side 2 is the batch'),
    (windows, 'gives (4, 5, 7, 24), parts of a map of 10x14'),
    (lambda m, x: windows(m, x).reshape(1, 4, 35, 24), 'gives (1, 4, 35, 24), parts of a map of 10x14'),
    (back, ''),
])
def test_what_is_no_map_of_one_picture(f, reason):
    assert attention_sites(nn.Sequential(conv, Do(f, mix=nn.Linear(24, 24))), (20, 28))['1'].reason == reason

def test_called_with_channels_on_several_sides():
    shared = nn.GELU()
    model = nn.Sequential(conv, Do(lambda m, x: m.act(m.act(x).permute(0, 2, 3, 1)), act=shared))
    assert attention_sites(model, (20, 28)).every['1.act'].reason == 'called 2 times, with the channels on several sides'

def test_a_convnext_keeps_its_channels_in_sight():
    model = ConvNeXt([CNBlockConfig(24, 40, 1), CNBlockConfig(40, None, 1)], num_classes=5).eval()
    every = attention_sites(model, (32, 48)).every
    got = {p: (every[p].channels, every[p].map, every[p].axis) for p in ('features.0', 'features.1.0', 'features.1.0.block.3', 'features.3.0.block')}
    assert got == {'features.0': (24, (8, 12), 1), 'features.1.0': (24, (8, 12), 1), 'features.1.0.block.3': (96, (8, 12), 3), 'features.3.0.block': (40, (4, 6), 1)}
    x = torch.randn(2, 3, 32, 48)
    y = model(x)
    insert_attention(model, ['features.1.0.block.3', 'features.3.0'], size=x)
    assert torch.equal(model(x), y)

def test_tokens_are_no_map_and_shown_as_they_are():
    model = nn.Sequential(conv, Do(lambda m, x: m.norm(x.flatten(2).transpose(1, 2)), norm=nn.LayerNorm(24)))
    assert attention_sites(model, (20, 28))['1'].reason == 'gives (1, 140, 24), not a map of 2 dimensions'

def test_a_sequence_with_channels_last():
    model = nn.Sequential(nn.Conv1d(5, 24, 3, padding=1), Do(lambda m, x: x.mT), nn.TransformerEncoderLayer(24, 3, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 21)
    y, site = model(x), attention_sites(model, x)['2']
    assert (site.channels, site.map, site.axis) == (24, (21,), 2)
    insert_attention(model, '2', size=x)
    torch.testing.assert_close(model(x), y)

def test_the_look_leaves_no_mode_on():
    from torch.overrides import _get_current_function_mode
    before = _get_current_function_mode()
    with pytest.raises(ValueError): attention_sites(nn.Sequential(conv, nn.Linear(3, 4)), (20, 28))
    assert _get_current_function_mode() is before

class Turns(nn.Module):
    "Channels last, but for `f`, and a module that takes what comes"
    def __init__(self, f, from_conv):
        super().__init__()
        self.conv, self.norm, self.here, self.from_conv, self.f = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Identity(), from_conv, f
        self.w = nn.Parameter(torch.randn(8, 16))
    def forward(self, x):
        x = self.conv(x)
        return self.here(self.f(x if self.from_conv else self.norm(x.permute(0, 2, 3, 1)), self.w)).mean((1, 2))

@pytest.mark.parametrize('f,channels,size,axis', [
    (lambda x, w: torch.einsum('nchw->nhwc', x), 8, (6, 10), 3),
    (lambda x, w: torch.einsum('nchw, cd -> nhdw', x, w), 16, (6, 10), 2),
    (lambda x, w: x.clone().transpose_(1, 3), 8, (10, 6), 3)], ids=['einsum', 'einsum that makes channels', 'in place'])
def test_channels_are_followed_from_a_conv(f, channels, size, axis):
    site = attention_sites(Turns(f, True).eval(), (3, 6, 10)).match('here')[0]
    assert (site.channels, site.map, site.axis) == (channels, size, axis)

@pytest.mark.parametrize('f,axis', [(lambda x, w: torch.einsum('bhwc,cd->bhwd', x, w), 3), (lambda x, w: torch.einsum('bhwc,cd->bdhw', x, w), 1), (lambda x, w: x @ w, 3),
    (lambda x, w: torch.addmm(torch.zeros(16), x.reshape(-1, 8), w).view(*x.shape[:3], 16), 3), (lambda x, w: torch.cat([x, x], -1), 3)], ids=['einsum', 'einsum turned', 'product', 'addmm', 'cat'])
def test_channels_are_followed_from_a_norm(f, axis):
    site = attention_sites(Turns(f, False).eval(), (3, 6, 10)).match('here')[0]
    assert (site.channels, site.map, site.axis) == (16, (6, 10), axis)

@pytest.mark.parametrize('f', [lambda x, w: torch.tensordot(x, w, 1), lambda x, w: torch.bmm(x.flatten(1, 2), w.expand(len(x), -1, -1)).view(*x.shape[:3], 16),
    lambda x, w: (w.T @ x[..., None])[..., 0], lambda x, w: torch.stack([x, x], -1).flatten(3), lambda x, w: (x[..., None]*w).sum(-2)], ids=['tensordot', 'bmm', 'a column', 'stack', 'sum'])
def test_channels_that_are_lost_are_no_place(f):
    "They would be taken for those of side 1, rows of the map"
    with pytest.raises(ValueError, match=r'gives \(1, 6, 10, 16\), and on which side its channels are cannot be told'): insert_attention(Turns(f, False).eval(), 'here', size=(3, 6, 10))
    model = nn.Sequential(Turns(f, False), nn.Unflatten(1, (16, 1))).eval()
    assert 'here' not in [s.name for s in attention_sites(model, (3, 6, 10)) if not s.reason]
