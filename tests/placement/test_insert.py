"Attention into a model and out again: not a bit of a prediction changes, a Learner goes on as its user expects, and what fails leaves no trace"
import copy
import warnings
import pickle
import random
from collections import OrderedDict
from functools import partial

import fastai.layers
import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import named
from fastai.data.core import Datasets
from fastai.layers import ConvLayer, ResBlock
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.torch_core import params, set_seed
import fastai.callback.all  # noqa: F401  patches `Learner`
from fastai.vision.learner import create_timm_model, create_unet_model
from fastai.vision.models import resnet18
from fastai.vision.models.xresnet import xresnet18
from fastcore.foundation import L
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from fastai_selfattn.placement import insert as insert_module
from fastai_selfattn import learner  # noqa: F401  patches `Learner`
from fastai_selfattn.placement import optim as optim_module
from fastai_selfattn.attention.kinds import attention_status
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.keep import load_attention, save_attention
from fastai_selfattn.placement.optim import inserted_layers
from fastai_selfattn.placement.skips import LetGo
from timm.layers import EcaModule
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.cbam import CbamModule
from timm.layers.non_local_attn import NonLocalAttn
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.placement.sites import attention_sites
from fastai_selfattn.walls.train import small_encoder

SIZE = (32, 40)

def image(bs=2, size=SIZE, seed=9): return torch.randn(bs, 3, *size, generator=torch.Generator().manual_seed(seed))

def out(model, x):
    y = model(x)
    return y['out'] if isinstance(y, dict) else y

@torch.no_grad()
def predict(model, x): return out(model.eval(), x)

def use(model, gamma=.5):
    for m in inserted_layers(model).values(): nn.init.constant_(m.gamma, gamma)
    return model

def unet(arch=small_encoder, **kwargs):
    torch.manual_seed(4)
    return create_unet_model(arch, 2, SIZE, pretrained=False, **kwargs)

class Plain(nn.Module):
    "A CNN with attributes, a module that is called twice, and one that is there twice"
    def __init__(self):
        super().__init__()
        self.stem = ConvLayer(3, 24, stride=2)
        self.block = ResBlock(1, 24, 24)
        self.twice = nn.Conv2d(24, 24, 3, padding=1)
        self.again = self.twice
        self.down = nn.Conv2d(24, 40, 3, 2, 1)
        self.drop = nn.Dropout(.5)
        self.norm = nn.BatchNorm2d(40)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 3))

    def forward(self, x): return self.head(self.norm(self.drop(self.down(self.twice(self.twice(self.block(self.stem(x)))).relu()))))

def plain(seed=4):
    torch.manual_seed(seed)
    return Plain()

class Block(nn.ModuleDict):
    "As torchvision's dense block: goes over its own children"
    def forward(self, x):
        xs = [x]
        for m in self.values(): xs.append(m(torch.cat(xs, 1)))
        return torch.cat(xs, 1)

def dense():
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Block(dict(a=nn.Conv2d(8, 4, 3, padding=1), b=nn.Sequential(nn.Conv2d(12, 4, 3, padding=1), nn.ReLU()))), nn.Conv2d(16, 2, 1))

def deeplab():
    "torchvision's DeepLab on a tiny backbone"
    backbone = nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()))
    return DeepLabV3(IntermediateLayerGetter(backbone, {'2': 'out'}), DeepLabHead(24, 3))

MODELS = {
    'plain': (plain, ['stem', 'block', 'twice', 'down', 'norm']),
    'unet': (unet, ['encoder.0', 'encoder.1', 'layers.0.2.1', 'middle', 'decoder.*', 'layers.4.conv1']),
    'dense': (dense, ['1', '1.b.0']),
    'resnet': (partial(torchvision.models.ResNet, BasicBlock, (2, 1, 1, 1), num_classes=3), ['relu', 'layer1.0', 'layer1.1.conv1', 'layer2', 'layer3.0.downsample']),
    'deeplab': (deeplab, ['backbone.1', 'backbone.2.0', 'classifier.0', 'classifier.0.convs.1']),
    'densenet': (partial(torchvision.models.DenseNet, 8, (2, 3), 16, num_classes=3), ['features.denseblock1', 'features.transition1', 'features.relu0', 'features.denseblock2.denselayer3']),
    'convnext': (partial(timm.create_model, 'convnext_atto', num_classes=3, depths=(1, 1, 2, 1), dims=(16, 24, 40, 48)), ['stem', 'stages.0', 'stages.1.blocks.0.conv_dw']),
    'efficientnet': (partial(timm.create_model, 'efficientnet_lite0', num_classes=3), ['bn1', 'blocks.1', 'blocks.2.0', 'blocks.3.0.bn1']),
    'timm body': (lambda: create_timm_model('resnet18', 3, pretrained=False)[0], ['0.model.layer1', '0.model.layer2.0', '0.model.act1']),
    'xresnet': (partial(xresnet18, n_out=3, widen=.25), ['2', '4.0', '5', '5.1.convpath', '6.0.convpath.0']),
    '1d': (lambda: nn.Sequential(nn.Conv1d(3, 24, 5), nn.ReLU(), nn.Conv1d(24, 16, 3, 2)), ['1', '2']),
    '3d': (lambda: nn.Sequential(nn.Conv3d(3, 24, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv3d(24, 16, 3, 2, 1)), ['0', '2'])}
SIZES = {'1d': (57,), '3d': (6, 14, 10)}

def made(name):
    make, where = MODELS[name]
    size = SIZES.get(name, SIZE)
    torch.manual_seed(4)
    model = make()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .5, 1.5)     # some start at 0, and let nothing through
    return model, where, size, image(size=size)

LET_GO = 'let go of skips'     # stays in a U-Net for good

def tree(model):
    "All that a model is made of"
    return ([(n, id(m), m.training, type(m)) for n, m in model.named_modules(remove_duplicate=False)], [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
            {(n, k): [(i, id(h)) for i, h in v.items() if i != LET_GO] for n, m in model.named_modules() for k, v in vars(m).items() if 'hook' in k and isinstance(v, dict) and {*v} - {LET_GO}})

def values(model): return {k: v.clone() for k, v in nn.Module.state_dict(model).items()}

def same(a, b): return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


# --- append

@pytest.mark.parametrize('name', MODELS)
def test_not_a_bit_changes_and_keys_stay(name):
    model, where, size, x = made(name)
    twin = made(name)[0]
    assert torch.equal(predict(model, x), predict(twin, x))
    keys = list(model.state_dict())
    model.train()
    names = insert_attention(model, where, size=size)
    assert len(names) == len(inserted_layers(model)) >= len(where) and set(names) == set(inserted_layers(model))
    assert [k for k in model.state_dict() if k in keys] == keys and {k for k in model.state_dict() if k not in keys and not k.startswith('again')} == {f'{n}.{k}' for n in names for k in model.get_submodule(n).state_dict()}
    for m in (model.train(), twin.train()):
        torch.manual_seed(7)
        m.y = out(m, x)
    assert torch.equal(model.y, twin.y) and torch.equal(predict(model, x), predict(twin, x))     # running statistics moved alike
    assert not torch.equal(predict(use(model), x), predict(twin, x))


@pytest.mark.parametrize('name', MODELS)
def test_each_layer_is_in_the_way_and_learns(name):
    model, where, size, x = made(name)
    names = insert_attention(model, where, size=size)
    use(model).train()
    out(model, x).float().pow(2).mean().backward()
    for n, m in inserted_layers(model).items():
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (m.gamma, m.value[0].weight_orig)), n
    base = predict(model, x)
    for n in names:
        nn.init.constant_(model.get_submodule(n).gamma, 3.)
        assert not torch.equal(predict(model, x), base), n
        nn.init.constant_(model.get_submodule(n).gamma, .5)


@pytest.mark.parametrize('name', MODELS)
def test_taking_out_gives_back_the_model(name):
    model, where, size, x = made(name)
    before, state, y = tree(model), values(model), predict(model, x)
    model.train()
    modes = [m.training for m in model.modules()]
    names = insert_attention(model, where, size=size)
    assert sorted(remove_attention(model)) == sorted(names)
    assert [m.training for m in model.modules()] == modes and same(values(model), state)
    model.eval()
    after = tree(model)
    assert [n for n, *_ in after[0]] == [n for n, *_ in before[0]] and [i for _, i, *_ in after[0]] == [i for _, i, *_ in before[0]] and after[1:] == before[1:]
    assert torch.equal(predict(model, x), y)


@pytest.mark.parametrize('name', ['plain', 'dense', 'resnet', 'densenet', 'efficientnet', 'xresnet'])
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_go_on(name, copied):
    model, where, size, x = made(name)
    insert_attention(model, where, size=size)
    use(model).train()
    out(model, x).float().pow(2).mean().backward()
    model.zero_grad()
    y = predict(model, x)
    twin = copied(model)
    assert torch.equal(predict(twin, x), y) and list(inserted_layers(twin)) == list(inserted_layers(model))
    for n, m in inserted_layers(twin).items(): nn.init.constant_(m.gamma, 2.)
    assert torch.equal(predict(model, x), y) and not torch.equal(predict(twin, x), y)
    for m in twin.modules():                         # hooks that come after unpickling, under whatever number
        for _ in range(3): m.register_forward_hook(lambda *args: None)
    z = predict(use(twin), x)
    assert (z - y).abs().max() < 1e-4     # a watched layer calls its convs one by one
    remove_attention(twin)
    assert list(twin.state_dict()) == list(made(name)[0].state_dict()) and len(inserted_layers(model)) >= len(where)


def test_keys_where_fastai_would():
    ours, theirs = unet(resnet18), unet(resnet18, self_attention=True)
    assert insert_attention(ours, True, size=SIZE) == ['layers.5.conv2.2']
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    use(ours), nn.init.constant_(theirs.layers[5].conv2[2].gamma, .5)
    x = image()
    assert (predict(ours, x) - predict(theirs, x)).abs().max() < 1e-5


@pytest.mark.parametrize('where,how,stage', [('encoder.0', 'append', 'encoder.0'), ('encoder.2', 'append', 'encoder.2'), ('encoder.3', 'append', 'encoder.3'), ('layers.0.0.2', 'replace', 'encoder.0')])
def test_a_skip_reads_what_attention_made(where, how, stage):
    model, x = unet(), image()
    stages = [s.name for s in attention_sites(model, SIZE) if s.name.startswith('encoder')]
    insert_attention(model, where, how, size=SIZE)
    layer, = inserted_layers(use(model)).values()
    seen = []
    block = [m for m in model.layers if hasattr(m, 'shuf')][len(model.sfs) - 1 - stages.index(stage)]          # the skips, from the bottom up
    handles = [layer.register_forward_hook(lambda m, args, out: seen.append(out)), block.register_forward_pre_hook(lambda m, args: seen.append(m.hook.stored))]
    predict(model, x)
    for h in handles: h.remove()
    assert seen[0] is seen[1]
    want = predict(model, x)
    nn.init.constant_(layer.gamma, 1.)
    assert not torch.equal(predict(model, x), want)


def test_handles_of_hooks_on_a_replaced_module_still_work():
    model, seen = plain(), []
    handle = model.twice.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    model.again = nn.Identity()
    insert_attention(model, 'twice', 'replace', size=SIZE)
    seen.clear()
    predict(model, image())
    assert seen == ['SelfAttention'] * 2
    handle.remove()
    predict(model, image())
    assert len(seen) == 2
    model.twice.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    remove_attention(model)
    predict(model, image())
    assert seen[2:] == ['Conv2d'] * 2


def test_a_module_called_twice_has_attention_twice():
    model, calls = plain(), []
    assert attention_sites(model, SIZE).every['twice'].calls == 2
    name, = insert_attention(model, 'twice', size=SIZE)
    model.get_submodule(name).register_forward_hook(lambda *args: calls.append(1))
    predict(model, image())
    assert calls == [1, 1]


# --- the new layer fits its place

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_precision_of_the_place(dtype):
    model, x = plain().to(dtype).eval(), image().to(dtype)
    y = predict(model, x)
    names = insert_attention(model, ['stem', 'down'], size=SIZE)
    assert {t.dtype for n in names for t in model.get_submodule(n).state_dict().values()} == {dtype} and torch.equal(predict(model, x), y)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model, x = unet().eval(), image()
    with torch.autocast('cpu', dtype):
        y = predict(model, x)
        insert_attention(model, ['encoder.1', 'decoder.1'], size=SIZE)
        assert torch.equal(predict(model, x), y)
        use(model).train()(x).float().square().mean().backward()
    for m in inserted_layers(model).values(): assert m.gamma.dtype == torch.float32 and m.gamma.grad.isfinite() and m.gamma.grad.item()


def test_precision_of_each_place_where_a_model_mixes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 16, 3)))
    model[1].double()
    model[1].register_forward_pre_hook(lambda m, args: (args[0].double(),))
    a, b = insert_attention(model, ['0', '1'], size=(9, 11))
    assert (model.get_submodule(a).gamma.dtype, model.get_submodule(b).gamma.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize('channels_last', [True, False])
def test_memory_format_of_the_model(channels_last):
    model = plain()
    if channels_last: model.to(memory_format=torch.channels_last)
    name, = insert_attention(model, 'block', layer=PooledSelfAttention2d, size=SIZE)
    assert (model.get_submodule(name).query[0].weight_orig.stride()[-1] > 1) == channels_last
    x = image().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert model.stem(x).is_contiguous(memory_format=torch.channels_last) == channels_last == use(model).block(model.stem(x)).is_contiguous(memory_format=torch.channels_last)


def test_mode_of_the_place():
    model = plain().train()
    model.block.eval(), model.norm.eval()
    names = insert_attention(model, ['stem', 'block', 'down', 'norm'], size=SIZE)
    modes = {n.split('.')[0]: {m.training for m in model.get_submodule(n).modules()} for n in names}
    assert modes == dict(stem={True}, block={False}, down={True}, norm={False}) and model.training and not model.block.training and model.head.training


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: not run here')
def test_device_of_the_place():
    model = plain().cuda()
    name, = insert_attention(model, 'stem', size=SIZE)
    assert {t.device.type for t in model.get_submodule(name).state_dict().values()} == {'cuda'}


def test_device_is_that_of_the_map():
    "Seen without a GPU: the layer is made for the device that the site tells"
    site = attention_sites(plain(), SIZE).every['stem']._replace(device=torch.device('meta'))
    made, is_identity = insert_module._make(lambda c: nn.Conv2d(c, c, 1), site, nn.Identity(), False, {})
    assert made.weight.device.type == 'meta' and is_identity is None


def test_a_new_layer_is_normalised_from_the_start():
    model = plain().eval()
    name, = insert_attention(model, 'stem', size=SIZE)
    predict(model, image())
    for part in ('query', 'key', 'value'): assert torch.linalg.matrix_norm(model.get_submodule(name).get_submodule(part)[0].weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize('layer,args', [(SelfAttention, dict(reduction=4, heads=2)), (PooledSelfAttention2d, dict(pool=3)), (PaperSelfAttention, {}), (SimpleSelfAttention, {}), (partial(SelfAttention, reduction=4, heads=2), {}),
                                        (fastai.layers.SelfAttention, {}), (lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU()), {})], ids=named)
def test_any_layer(layer, args):
    model = plain()
    names = insert_attention(model, ['block', 'down'], layer=layer, size=SIZE, **args)
    assert [model.get_submodule(n).attention_place.site.channels for n in names] == [24, 40]
    for k, v in args.items(): assert all(getattr(model.get_submodule(n), k) == v for n in names)
    predict(model, image())
    assert remove_attention(model) == names


def not_a_module(c): return 3
def too_few(c): return nn.Conv2d(c, c - 1, 1)
def smaller(c): return nn.MaxPool2d(2)
def pair(c): return nn.LSTM(4, 4)
def wants_64(c): return nn.Conv2d(64, 64, 1)

@pytest.mark.parametrize('layer,args,says', [(not_a_module, {}, 'it gave a int, not a module'), (too_few, {}, r'it makes \(1, 23, 16, 20\) out of \(1, 24, 16, 20\)'), (smaller, {}, r'it makes \(1, 24, 8, 10\)'),
                                             (pair, {}, 'LSTM|tuple|RuntimeError|pair'), (wants_64, {}, 'wants_64 does not fit at stem .24 channels, map 16x20.: RuntimeError'),
                                             (SelfAttention, dict(heads=2), '`heads=2` must divide'), (SelfAttention, dict(colour='red'), 'TypeError: .*colour'), (SelfAttention, dict(reduction=0), '`reduction` must be 1 or more')], ids=named)
@pytest.mark.parametrize('how', ['append', 'replace'])
def test_a_layer_that_does_not_fit(layer, args, says, how):
    model = plain() if how == 'append' else nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, 1, 1))
    before = tree(model)
    where = 'stem' if how == 'append' else '1'
    with pytest.raises(ValueError, match=says if how == 'append' else says.replace('stem', '1')): insert_attention(model, where, how, layer=layer, size=SIZE, **args)
    assert tree(model) == before


def draws(): return random.random(), np.random.rand(), torch.rand(1).item()

def only_24(c):
    draws()
    if c != 24: raise ValueError('only 24')
    return SelfAttention(c)

@pytest.mark.parametrize('where,layer', [('down', only_24), (['stem', 'down'], only_24), ('stem', too_few), ('stem', lambda c: cropped(5)(c)), (['stem', 'head.0'], SelfAttention)], ids=named)
def test_what_is_refused_draws_no_random_numbers(where, layer):
    model = plain()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    want = draws()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    with pytest.raises(ValueError): insert_attention(model, where, layer=layer, size=SIZE)
    assert draws() == want


def test_too_few_channels_for_fastais_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match='SelfAttention does not fit at 1'): insert_attention(model, '1', layer=fastai.layers.SelfAttention, size=SIZE)
    insert_attention(model, '1', size=SIZE)


def test_pooled_layers_say_that_they_want_a_2d_map():
    model = MODELS['1d'][0]()
    with pytest.raises(ValueError, match=r'PooledSelfAttention2d does not fit at 1 \(24 channels, map 53\).*2d map'): insert_attention(model, '1', layer=PooledSelfAttention2d, size=57)


@pytest.mark.parametrize('layer', [None, 3, 'SelfAttention', SelfAttention(24)], ids=['none', 'int', 'str', 'module'])
def test_layer_must_be_a_class(layer):
    model = plain()
    before = tree(model)
    with pytest.raises((TypeError, ValueError)): insert_attention(model, 'stem', layer=layer, size=SIZE)
    assert tree(model) == before


# --- a part in TorchScript

@pytest.mark.parametrize('compiled', [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(1, m[0].in_channels, *SIZE))], ids=['script', 'trace'])
@pytest.mark.parametrize('holder', [nn.Sequential, lambda m: Block(dict(a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(16, 8, 1), c=m))], ids=['sequential', 'goes over its children'])
def test_a_part_in_torchscript(compiled, holder):
    torch.manual_seed(4)
    c_in, c_out = (8, 8) if holder is nn.Sequential else (24, 32)
    part = compiled(nn.Sequential(nn.Conv2d(c_in, 8, 3, padding=1), nn.ReLU()).eval())
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), holder(part), nn.Conv2d(c_out, 8, 1)).eval()
    path, x = '1.' + list(model[1]._modules)[-1], image()
    before, y = tree(model), predict(model, x)
    sites = attention_sites(model, SIZE)
    assert not sites.every[path].reason and [s.name for s in sites][::len(sites)-1] == ['0', '2']
    with pytest.raises(ValueError, match=rf"nothing can be put behind .*\({path}\), a TorchScript module: .*how='replace'"): insert_attention(model, path, size=SIZE)
    assert tree(model) == before
    for where, how in [('0', 'append'), ('1', 'append')] + [(path, 'replace')]*(c_in == 8):
        names = insert_attention(model, where, how, size=SIZE)
        assert how == 'replace' or predict(model, x).equal(y)
        assert remove_attention(model) == names and predict(model, x).equal(y) and tree(model) == before


# --- where

@pytest.mark.parametrize('where,max_side,want', [
    (True, None, ['layers.5.conv2.2']), ('middle', None, ['layers.3.2']), ('decoder.[02]', None, ['layers.4.conv2.2', 'layers.6.conv2.2']), ('layers.6', None, ['layers.6.attention']),
    ('layers.0.*.0.0', None, [f'layers.0.{i}.0.0.attention' for i in (1, 2, 3, 4)]), (['middle', True, 'encoder.1'], None, ['layers.3.2', 'layers.5.conv2.2', 'layers.0.1.2']),
    (None, 3, ['layers.0.3.2', 'layers.4.conv2.2']), ('decoder.*', 5, ['layers.4.conv2.2', 'layers.5.conv2.2']), (lambda s: s.channels == 64, None, ['layers.0.2.2'])], ids=named)
def test_where(where, max_side, want):
    model = unet()
    assert insert_attention(model, where, max_side=max_side, size=(32, 32) if max_side == 3 else SIZE) == want and set(inserted_layers(model)) == set(want)


@pytest.mark.parametrize('size,names', [(SIZE, ['middle', 'encoder.1']), ((64, 64), ['decoder.1'])])
def test_sites_of_the_table_go_in_and_out(size, names):
    model, other = unet(), unet()
    sites = attention_sites(model, size)
    paths = insert_attention(model, [sites[n] for n in names], size=size)
    assert paths == insert_attention(other, names, size=size)
    for path in paths: assert remove_attention(model, attention_sites(model, size).every[path]) == [path]
    insert_attention(model, L(names), size=size)
    with pytest.raises(TypeError, match='`where` is a Sequential: give the path'): remove_attention(model, model.layers[0])
    assert sorted(remove_attention(model, [sites[n] for n in names])) == sorted(paths)


@pytest.mark.parametrize('where,error,says', [('decoder.7', ValueError, 'no site matches .decoder.7.'), (['middle', 'nothing.*'], ValueError, 'no site matches .nothing'), (lambda s: False, ValueError, 'no site matches'),
                                              (3, TypeError, '`where` must be'), (None, ValueError, 'give `where`, `max_side` or `side`'), ([], TypeError, '`where` must be'), (False, TypeError, '`where` must be')], ids=named)
def test_where_that_means_nothing_shows_the_table(where, error, says):
    model = unet()
    before = tree(model)
    with pytest.raises(error, match=says) as e: insert_attention(model, where, size=SIZE)
    assert tree(model) == before
    if says.startswith('no site'): assert 'decoder.3' in str(e.value) and 'layers.7.conv2' in str(e.value)


def test_true_needs_fastais_place():
    for model in (plain(), create_unet_model(lambda pretrained: nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1), nn.AdaptiveAvgPool2d(1)), 2, SIZE, pretrained=False)):
        with pytest.raises(ValueError, match='third-to-last block'): insert_attention(model, True, size=SIZE)


def test_what_a_pattern_leaves_out_is_said(capsys):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert insert_attention(model, '?', size=(9, 11)) == ['0.attention', '1.attention']
    assert capsys.readouterr().out == ("Inserted SelfAttention behind 0 (0.attention, 8 channels, 7x9); 1 (1.attention, 8 channels, 5x7). "
                                       "Left out: 2 (one pixel: nothing to attend to), 3 (gives (1, 8), not a map of 2 dimensions)\n")
    with pytest.raises(ValueError, match="no attention fits at '2': one pixel"): insert_attention(model, '2', size=(9, 11))


@pytest.mark.parametrize('how,line', [('append', 'Inserted SelfAttention behind twice (twice.attention, 24 channels, 16x20)\n'), ('replace', 'Inserted SelfAttention in place of twice (24 channels, 16x20)\n')])
def test_one_line_says_what_was_done(how, line, capsys):
    model = plain()
    del model.again
    insert_attention(model, 'twice', how, size=SIZE)
    assert capsys.readouterr().out == line
    remove_attention(model)
    assert capsys.readouterr().out == line.replace('Inserted SelfAttention behind', 'Removed attention from').replace('Inserted SelfAttention in place of', 'Removed attention from')


@pytest.mark.parametrize('first,second', [('stem', 'stem'), ('stem', 'stem.2'), ('stem.2', 'stem'), ('block', 'block.act'), ('down', 'drop')])
def test_twice_at_one_place(first, second):
    "Also by another name for the same map (in eval mode dropout gives what it gets)"
    model = plain()
    insert_attention(model, first, size=SIZE)
    before = tree(model)
    with pytest.raises(ValueError, match='has SelfAttention already'): insert_attention(model, second, size=SIZE)
    assert tree(model) == before
    with pytest.raises(ValueError, match='very same map|SelfAttention already'): insert_attention(plain(), [first, second] if first != second else ['block', 'block.act'], size=SIZE)


def test_not_where_fastais_own_attention_is():
    with pytest.raises(ValueError, match='decoder.1 .layers.5.conv2. has SelfAttention already'): insert_attention(unet(self_attention=True), 'decoder.1', size=SIZE)
    model = unet()
    assert len(insert_attention(model, ['decoder.1', 'layers.5.conv2', 'decoder.[1]'], size=SIZE)) == 1       # one place by three names


# --- replace

def test_a_conv_of_a_unet_block_is_replaced_and_comes_back():
    model, x = unet().eval(), image()
    y, state, old = predict(model, x), values(model), model.layers[5].conv2
    assert insert_attention(model, 'decoder.1', 'replace', layer=PooledSelfAttention2d, size=SIZE) == ['layers.5.conv2']
    assert isinstance(model.layers[5].conv2, PooledSelfAttention2d) and not any(p is q for p in old.parameters() for q in model.parameters()) and not any(k.startswith('layers.5.conv2.0') for k in model.state_dict())
    assert not torch.equal(predict(model, x), y)
    assert remove_attention(model, 'decoder.1') == ['layers.5.conv2'] and model.layers[5].conv2 is old
    assert same(values(model), state) and torch.equal(predict(model, x), y)


def test_the_old_conv_follows_where_the_model_went():
    model = plain()
    model.again = nn.Identity()
    weight = model.twice.weight.detach().clone()
    insert_attention(model, 'twice', 'replace', size=SIZE)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model.double().train())))
    twin.twice.eval()
    for m in (model, twin): remove_attention(m)
    assert torch.equal(twin.twice.weight, weight.double()) and torch.equal(model.twice.weight, weight.double()) and (model.twice.training, twin.twice.training) == (True, False)
    assert model.twice.weight.dtype == twin.twice.weight.dtype == torch.float64


@pytest.mark.parametrize('where,says', [('layers.7.conv1', 'makes 36 channels out of 72'), ('encoder.2', r'makes 64 channels out of 32'), ('encoder.4', r'makes a map of 1x2 out of 2x3 \(a stride or a pooling\)'), ('layers.0.0', 'makes 16 channels out of 3')])
def test_what_attention_cannot_replace(where, says):
    model = unet()
    before = tree(model)
    with pytest.raises(ValueError, match=f'cannot replace .*{says}'): insert_attention(model, where, 'replace', size=SIZE)
    assert tree(model) == before


def test_more_that_attention_cannot_replace():
    class Two(nn.Module):
        def forward(self, x, y): return x + y
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.two = nn.Conv2d(3, 8, 3), Two()
        def forward(self, x): return self.two(self.conv(x), self.conv(x))
    with pytest.raises(ValueError, match='takes something else than one map'): insert_attention(Net(), 'two', 'replace', size=SIZE)
    with pytest.raises(ValueError, match='one module under the paths twice, again'): insert_attention(plain(), 'twice', 'replace', size=SIZE)
    with pytest.raises(ValueError, match='both block and block.convpath.0 inside it'): insert_attention(plain(), ['block', 'block.convpath.0'], 'replace', size=SIZE)
    for how in ('insert', None, 1):
        with pytest.raises(ValueError, match="`how` must be 'append' or 'replace'"): insert_attention(plain(), 'stem', how, size=SIZE)


# --- out again

@pytest.mark.parametrize('where,gone', [('middle', 1), ('layers.3', 1), ('layers.3.2', 1), ('decoder.*', 2), (['middle', True], 2), (lambda s: s.channels < 100, 1), (None, 4)], ids=named)
def test_remove_where(where, gone):
    model = unet()
    names = insert_attention(model, ['middle', 'encoder.1', 'decoder.1', 'decoder.2'], size=SIZE)
    out = remove_attention(model, where)
    assert len(out) == gone and set(out) < set(names) or gone == 4 and set(out) == set(names)
    assert set(inserted_layers(model)) == set(names) - set(out)
    with pytest.raises(ValueError): remove_attention(model, where) if gone < 4 else remove_attention(model)


def test_remove_by_side():
    model = unet()
    insert_attention(model, ['middle', 'encoder.1'], size=SIZE)
    assert remove_attention(model, max_side=4) == ['layers.3.2'] and list(inserted_layers(model)) == ['layers.0.1.2']


def test_removing_what_is_not_there():
    with pytest.raises(ValueError, match='no inserted attention in this Plain'): remove_attention(plain())
    with pytest.raises(ValueError, match='no inserted attention in this Plain'): remove_attention(plain(), 'stem')
    model = plain()
    insert_attention(model, 'stem', size=SIZE)
    with pytest.raises(ValueError, match='no site matches .block.'): remove_attention(model, 'block')
    with pytest.raises(TypeError, match='must be an nn.Module or a Learner, got int'): remove_attention(3)
    with pytest.raises(TypeError, match='must be an nn.Module or a Learner, got int'): insert_attention(3, 'x')


def test_attention_that_came_with_the_model_goes_only_by_name():
    model, without = unet(self_attention=True), unet()
    with pytest.raises(ValueError, match='no inserted attention .* layers.5.conv2.2'): remove_attention(model)
    insert_attention(model, 'middle', size=SIZE)
    assert remove_attention(model) == ['layers.3.2']
    assert remove_attention(model, 'decoder.1') == ['layers.5.conv2.2'] and list(model.state_dict()) == list(without.state_dict())


def test_a_layer_that_was_taken_out_knows_nothing_of_its_place():
    model = plain()
    name, = insert_attention(model, 'stem', size=SIZE)
    layer = model.get_submodule(name)
    remove_attention(model)
    assert not hasattr(layer, 'attention_place')


def test_out_of_a_model_that_became_part_of_another():
    body = plain()
    del body.head
    body.forward = lambda x: body.down(body.block(body.stem(x)))
    body = nn.Sequential(body.stem, body.block, body.down)
    insert_attention(body, ['0', '1'], size=SIZE)
    model = nn.Sequential(body, nn.ReLU())
    keys = [k for k in model.state_dict() if 'attention' not in k and not k.startswith('0.0.3')]
    assert remove_attention(model) == ['0.0.3', '0.1.attention'] and list(model.state_dict()) == keys and not any(m._forward_hooks for m in model.modules())


# --- what fails leaves no trace

class Fault(Exception): pass

def failing(f, at, error):
    "`f`, which fails when it is called for the `at`-th time, before or after doing its work"
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == at: raise error
        res = f(*args, **kwargs)
        if len(calls) == -at: raise error
        return res
    return wrapped

def learn_state(learn):
    opt = learn.opt
    return (learn.splitter, list(learn.cbs), opt and [[id(p) for p in g] for g in opt.param_lists], opt and opt.hypers, opt and sorted((id(p), {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}) for p, s in opt.state.items() if s),
            [p.requires_grad for p in learn.model.parameters()], getattr(learn, 'attention_hooks', None))

def flat(state): return repr(state)

STEPS = ['_make', '_append', '_replace', 'let_go', '_run', '_check_calls', 'watch', 'regroup', '_groups', '_set_lists', '_forget', '_welcome', '_report']

def where_is(step): return insert_module if hasattr(insert_module, step) else optim_module

def frozen(how=None):
    "A Learner that was fitted, with attention if that went in by `how`, and then fitted with a frozen body"
    learn = fitted(split=True)
    if how: insert_attention(learn, ['1', '3'], how)
    learn.freeze()
    return fit(learn)

@pytest.fixture(scope='module')
def learners(): return {how: frozen(how) for how in (None, 'append', 'replace')}

def faults(steps, twice):
    "(step, when, how): each step with both, before and after its work; both calls of those that are made `twice`"
    for s in steps:
        for how in HOWS:
            if s not in twice: yield from ((s, at, how) for at in (1, -1))
            elif twice[s] in (how, None): yield from ((s, at, how) for at in (1, -1, 2, -2))

HOWS = 'append', 'replace'

@pytest.mark.parametrize('step,at,how', list(faults(STEPS, dict(_make=None, _append='append', _replace='replace'))))
def test_a_failure_at_any_step_of_inserting(monkeypatch, learners, step, at, how):
    error = KeyboardInterrupt() if at < 0 else Fault('on purpose')
    learn = copy.deepcopy(learners[None])
    before, known = tree(learn.model), flat(learn_state(learn))
    monkeypatch.setattr(where_is(step), step, failing(getattr(where_is(step), step), at, error))
    with pytest.raises((Fault, ValueError, KeyboardInterrupt)) as e: insert_attention(learn, ['1', '3'], how)
    assert error in (e.value, e.value.__cause__)
    assert tree(learn.model) == before and flat(learn_state(learn)) == known


@pytest.mark.parametrize('step,at,how', list(faults(['_take_out', 'watch', 'regroup', '_groups', '_set_lists', '_forget', '_welcome', '_report'], dict(_take_out=None))))
def test_a_failure_at_any_step_of_removing(monkeypatch, learners, step, at, how):
    learn = copy.deepcopy(learners[how])
    before, known = tree(learn.model), flat(learn_state(learn))
    monkeypatch.setattr(where_is(step), step, failing(getattr(where_is(step), step), at, Fault()))
    with pytest.raises(Fault): remove_attention(learn)
    assert tree(learn.model) == before and flat(learn_state(learn)) == known
    monkeypatch.undo()
    fit(learn)
    remove_attention(learn)


def test_a_module_that_is_not_called_as_a_whole():
    "The sites are found in a run; what then does not come to pass is an error, not a layer that does nothing"
    runs = []     # not in the model, where a look would put it back
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
        def forward(self, x):
            runs.append(1)
            return self.conv(x) if len(runs) == 1 else self.conv.forward(x)
    model = Net()
    with pytest.raises(ValueError, match='conv is called 1 times in a forward pass, but attention there 0 times'): insert_attention(model, 'conv', size=SIZE)
    assert not inserted_layers(model) and not model.conv._forward_hooks


def test_what_is_made_in_inference_mode_trains(tmp_path):
    model, other, fused = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)) for _ in range(3))
    with torch.inference_mode():
        insert_attention(model, '0', size=SIZE, gamma=.5)
        insert_attention(fused, '0', size=SIZE, gamma=.5)
        fuse_attention(fused)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # other weights
            load_attention(other, save_attention(model, tmp_path/'a'))
    for m in (model, other, fused):
        m.train()(torch.randn(2, 3, *SIZE)).square().mean().backward()
        assert all(not p.is_inference() and p.grad is not None for p in m.parameters())


def test_the_numbers_of_a_sequential_close_up():
    "Or the next `append` would take the name of the last, which would be lost"
    inside = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    model = nn.Sequential(inside)
    insert_attention(model, '0', size=SIZE)
    conv, last = nn.Conv2d(8, 8, 1), nn.Tanh()
    inside.append(conv)
    assert remove_attention(model) == ['0.2'] and list(inside._modules) == ['0', '1', '2'] and inside[2] is conv
    inside.append(last)
    assert list(inside) == [inside[0], inside[1], conv, last]
    x = torch.randn(1, 3, *SIZE)
    torch.testing.assert_close(model(x), last(conv(inside[1](inside[0](x)))))
    class Last(nn.Sequential):
        def forward(self, x): return super().forward(x)
    around = nn.Sequential(Last(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), nn.Conv2d(8, 4, 1))
    insert_attention(around, '0.0', size=SIZE)
    around[0][0].append(nn.Conv2d(8, 8, 1))
    path, = insert_attention(around, '0', size=SIZE, gamma=.5)
    assert path == '0.0.3.attention'     # on a hook that knows this path
    y = around(x)
    remove_attention(around, '0.0')
    torch.testing.assert_close(around(x), y)
    assert remove_attention(around) == [path]
    named = nn.Sequential(nn.Sequential(OrderedDict(a=nn.Conv2d(3, 8, 3), b=nn.ReLU())))
    insert_attention(named, '0', size=SIZE)
    named[0].add_module('c', nn.Tanh())
    remove_attention(named)
    assert list(named[0]._modules) == ['a', 'b', 'c']


def test_a_copied_layer_belongs_to_the_net_that_it_was_put_into():
    "Though it remembers that it hung on a hook elsewhere"
    class Calls(nn.Module):
        def __init__(self, attention): super().__init__(); self.conv, self.attention, self.last = nn.Conv2d(3, 8, 3), attention, nn.Conv2d(8, 8, 1)
        def forward(self, x): return self.last(self.attention(self.conv(x)))
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        def forward(self, x): return self.last(self.conv(x))
    first = Own()
    path, = insert_attention(first, 'conv', size=SIZE, gamma=.5)
    assert path == 'conv.attention'
    layer = first.get_submodule(path)
    x = torch.randn(2, 3, *SIZE)
    for model, at in ((nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(layer), nn.Conv2d(8, 8, 1)), '1'), (Calls(copy.deepcopy(layer)), 'attention')):
        want = model.eval()(x)
        row, = attention_status(model).rows
        if at == '1':
            assert not inserted_layers(model) and (row['path'], row['state'], row['origin']) == ('1', 'on', 'came with the model')
            with pytest.raises(ValueError, match='no inserted attention'): remove_attention(model)
        for path, layer in inserted_layers(model).items(): layer.attention_place.hang(model, path, layer)
        assert torch.equal(model(x), want)
        places = insert_attention(model, '2' if at == '1' else 'last', size=SIZE)
        for path, layer in inserted_layers(model).items(): layer.attention_place.hang(model, path, layer)
        assert torch.equal(model(x), want) and remove_attention(model, places) == places


def test_a_model_that_no_longer_runs_is_given_back():
    class Iterates(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        def forward(self, x):
            for m in self.children(): x = m(x).flatten(2) if isinstance(m, SelfAttention) else m(x)
            return x
    model = nn.Sequential(Iterates(), nn.Conv2d(8, 4, 3))
    before = tree(model)
    with pytest.raises(ValueError, match='0 is called 1 times in a forward pass, but attention there 2 times|no longer runs'): insert_attention(model, '0', size=SIZE)
    assert tree(model) == before


class Goes(nn.Module):
    "Goes over its children, as the stages of timm's RegNet do"
    def __init__(self, *children):
        super().__init__()
        for i, m in enumerate(children): self.add_module(f'b{i}', m)
    def forward(self, x):
        for m in self.children(): x = m(x)
        return x

@pytest.mark.parametrize('inner,path', [(lambda: nn.Conv2d(8, 8, 3), '0.b1.attention'), (lambda: Goes(nn.ReLU(), nn.Conv2d(8, 8, 3)), '0.b1.b1.attention')], ids=['once', 'twice'])
def test_modules_that_go_over_their_children_do_not_run_a_layer_twice(inner, path):
    torch.manual_seed(0)
    model = nn.Sequential(Goes(nn.Conv2d(3, 8, 3), inner()), nn.Conv2d(8, 4, 3)).eval()
    before, keys, x = tree(model), set(model.state_dict()), image()
    plain = model[0](x)
    assert insert_attention(model, '0', size=SIZE) == [path]
    layer = model.get_submodule(path)
    assert model[0](x).equal(plain)
    nn.init.constant_(layer.gamma, .5)
    assert model[0](x).equal(layer(plain)) and set(model.state_dict()) == keys | {f'{path}.{k}' for k in layer.state_dict()}
    assert predict(pickle.loads(pickle.dumps(model)), x).equal(predict(model, x))
    assert remove_attention(model, '0') == [path] and tree(model) == before

@pytest.mark.parametrize('step,at', [(step, at) for step, most in dict(_take_out=1, _append=2, _run=2, _check_calls=1).items() for n in range(most) for at in (n+1, -n-1)])
def test_a_failure_while_a_layer_is_kept_further_down(monkeypatch, step, at):
    error = KeyboardInterrupt() if at < 0 else Fault('on purpose')
    model = nn.Sequential(Goes(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 4, 3)).eval()
    before = tree(model)
    monkeypatch.setattr(where_is(step), step, failing(getattr(where_is(step), step), at, error))
    with pytest.raises((Fault, KeyboardInterrupt)): insert_attention(model, '0', size=SIZE)
    assert tree(model) == before

def test_the_stages_of_a_regnet():
    model = timm.create_model('regnetx_002', num_classes=2).eval()
    x = image(size=(64, 64))
    plain = predict(model, x)
    assert insert_attention(model, 's*', side=4, size=64) == ['s3.b4.attention'] and predict(model, x).equal(plain)
    learned = predict(use(model), x)
    model.set_grad_checkpointing(True)
    assert not learned.equal(plain) and predict(model, x).equal(learned)


# --- layers of others

class NonLocal(nn.Module):
    "The embedded Gaussian of arXiv 1711.07971, written out; `out` starts at 0"
    def __init__(self, c, zero=True):
        super().__init__()
        self.theta, self.phi, self.g, self.out = (nn.Conv2d(a, b, 1) for a, b in ((c, c//2), (c, c//2), (c, c//2), (c//2, c)))
        if zero: nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)
    def forward(self, x):
        t, p, g = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        return x + self.out((g @ (t.mT @ p).softmax(-1).mT).unflatten(2, x.shape[2:]))

def bottleneck(c, site): return BottleneckAttn(c, feat_size=site.map)

FOREIGN = {'NonLocalAttn': (NonLocalAttn, True), 'CbamModule': (CbamModule, False), 'EcaModule': (EcaModule, False), 'BottleneckAttn': (bottleneck, False), 'non-local': (NonLocal, True), 'not at zero': (partial(NonLocal, zero=False), False)}

@pytest.mark.parametrize('name', FOREIGN)
def test_layers_that_nobody_here_wrote(name, capsys):
    layer, is_identity = FOREIGN[name]
    model, x = plain(), image()
    y = predict(model, x)
    names = insert_attention(model, ['stem', 'block'], layer=layer, size=SIZE)
    assert torch.allclose(predict(model, x), y, rtol=0, atol=1e-6) == is_identity == (     # some give another memory format, and so other last bits
        'predictions change' not in capsys.readouterr().out)
    out(model.eval(), x).square().mean().backward()     # running statistics stay as they are
    assert all(p.grad is not None for n in names for p in model.get_submodule(n).parameters())
    assert remove_attention(model) == names and torch.equal(predict(model, x), y)


def test_a_layer_for_maps_of_one_size():
    "timm's `BottleneckAttn` is made for one; it was tried on 4x4, and refused where it fits"
    model = plain()
    name, = insert_attention(model, 'stem', layer=BottleneckAttn, feat_size=(16, 20), size=SIZE)
    assert isinstance(model.get_submodule(name), BottleneckAttn)
    with pytest.raises(ValueError, match=r'BottleneckAttn does not fit at block \(24 channels, map 16x20\): AssertionError'): insert_attention(plain(), 'block', layer=BottleneckAttn, feat_size=(8, 8), size=SIZE)


class Shrinks(nn.Module):
    "Keeps maps up to 4x4"
    def forward(self, x): return nn.functional.adaptive_avg_pool2d(x, [min(s, 4) for s in x.shape[2:]])

def test_a_layer_that_changes_large_maps_is_refused():
    with pytest.raises(ValueError, match=r'it makes \(1, 24, 4, 4\) out of \(1, 24, 16, 20\)'): insert_attention(plain(), 'stem', layer=lambda c: Shrinks(), size=SIZE)


def cropped(above):
    "Ours, with a `forward` that crops maps of more than `above` pixels a side"
    def make(c):
        layer = SelfAttention(c)
        layer.forward = lambda x: SelfAttention.forward(layer, x)[..., :above, :above]
        return layer
    return make

@pytest.mark.parametrize('above', [4, 15])
@pytest.mark.parametrize('how,where', [('append', 'stem'), ('append', 'block'), ('replace', 'block.1')])
def test_a_layer_of_ours_that_changes_large_maps_is_refused(how, where, above):
    "Ours is tried on 4x4 only, but the model is run with it"
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 24, 3, 2, 1), block=nn.Sequential(nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)), pool=nn.AdaptiveAvgPool2d(1))).eval()
    x = torch.randn(2, 3, 32, 40)
    y, keys, modules = model(x), list(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=rf'the layer at {where} makes 24x{above}x{above} out of 24x16x20, and attention must keep'):
        insert_attention(model, where, how, cropped(above), size=x)
    assert torch.equal(model(x), y) and list(model.state_dict()) == keys and list(model.modules()) == modules
    assert not any(m._forward_hooks for m in model.modules())
    insert_attention(model, where, how, cropped(20), size=x)


def test_a_factory_gets_the_site_only_if_it_asks():
    seen = []
    def asks(c, site=None):
        seen.append(site)
        return SelfAttention(c)
    insert_attention(plain(), 'stem', layer=asks, size=SIZE)
    assert {(s.path, s.map, s.channels) for s in seen} == {('stem', (16, 20), 24)}
    seen.clear()
    insert_attention(plain(), 'stem', layer=partial(asks, site='mine'), size=SIZE)
    assert set(seen) == {'mine'}


def test_gamma_that_starts_elsewhere_is_said(capsys):
    insert_attention(plain(), 'stem', size=SIZE, gamma=.3)
    assert capsys.readouterr().out == 'Inserted SelfAttention behind stem (stem.3, 24 channels, 16x20). It does not start as the identity: predictions change\n'


def test_no_attention_into_attention_nor_around_it():
    model = plain()
    insert_attention(model, 'down', size=SIZE)
    for how in ('append', 'replace'):
        with pytest.raises(ValueError, match="no attention fits at 'down.attention.value.0': part of the attention layer down.attention"): insert_attention(model, 'down.attention.value.0', how, size=SIZE)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), nn.Conv2d(8, 8, 1)))
    insert_attention(model, '1.0', size=SIZE)
    with pytest.raises(ValueError, match=r'cannot replace 1, with inserted attention inside it \(1.0.2\)'): insert_attention(model, '1', 'replace', size=SIZE)
    assert remove_attention(model) == ['1.0.2']


def test_side_and_did_you_mean():
    model = unet()
    assert insert_attention(model, 'decoder.*', side=5, size=SIZE) == ['layers.5.conv2.2'] and remove_attention(model, side=5) == ['layers.5.conv2.2']
    with pytest.raises(ValueError, match="no site matches 'midle'. Did you mean 'middle'?"): insert_attention(model, 'midle', size=SIZE)


# --- a U-Net lets go of its skips

@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_a_unet_of_fastais_that_we_insert_into(copied):
    model, x, keys = unet(), image(), list(unet().state_dict())
    for _ in range(2): insert_attention(model, 'middle', size=SIZE), remove_attention(model)
    assert [type(h) for h in model._forward_hooks.values()] == [LetGo] and list(model.state_dict()) == keys
    insert_attention(model, 'middle', size=SIZE)
    loss = model.train()(x).square().mean()
    assert not any(s.stored is not None for s in model.sfs)
    twin = copied(model)
    loss.backward()
    assert torch.equal(predict(twin, x), predict(model, x))
    twin.train()(x).square().mean()
    assert len(twin._forward_hooks) == 1 and not any(s.stored is not None for s in twin.sfs)


def test_the_hook_goes_when_inserting_fails():
    model = unet()
    with pytest.raises(ValueError): insert_attention(model, 'middle', layer=not_a_module, size=SIZE)
    assert not model._forward_hooks and not model._forward_hooks_always_called


# --- a Learner

def net(seed=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()), nn.Conv2d(24, 24, 3, padding=1), nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))

def split(m): return [params(m[:2]), params(m[2:4]), params(m[4:])]

XS = torch.randn(16, 3, 12, 14, generator=torch.Generator().manual_seed(6))

def picture(i): return XS[i]
def brightness(i): return int(XS[i].mean() > 0)

def data(): return Datasets(range(16), [[picture], [brightness]], splits=[list(range(16)), list(range(8))]).dataloaders(bs=4, num_workers=0, device=torch.device('cpu'))

def make(opt_func=Adam, splitter=None, cbs=None, path=None, **kwargs):
    set_seed(3)
    return Learner(data(), net(), loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, cbs=cbs, path=path, **({'splitter': splitter} if splitter else {}), **kwargs)

def fit(learn, n=1, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn

def fitted(split=False, **kwargs): return fit(make(splitter=globals()['split'] if split else None, **kwargs))

def own(learn): return [p for m in inserted_layers(learn.model).values() for p in m.parameters()]

def gammas(learn): return [m.gamma.item() for m in inserted_layers(learn.model).values()]

def ids(ps): return {id(p) for p in ps}


# --- compiled, traced, exported

def test_compiled_before_and_after():
    model, x = net().eval(), torch.randn(2, 3, 12, 14)
    compiled = torch.compile(model, backend='eager')
    y = compiled(x)
    insert_attention(model, ['1', '2'], size=(12, 14))
    z = use(model)(x)
    assert not torch.allclose(z, y, atol=1e-4) and torch.allclose(compiled(x), z, atol=1e-6) and torch.allclose(torch.compile(model, backend='aot_eager')(x), z, atol=1e-6)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), z, atol=1e-6) and torch.allclose(torch.jit.trace(model, x)(x), z, atol=1e-6)
    remove_attention(model)
    assert torch.allclose(compiled(x), y, atol=1e-6)
    with pytest.raises(TypeError, match='_orig_mod'): insert_attention(compiled, '1', size=(12, 14))


@pytest.mark.parametrize('where', [True, 'decoder.1', lambda s: s.is_fastais, lambda s: s.channels == 160], ids=named)
def test_fastais_own_layer_is_taken_out(where, capsys):
    model = unet(self_attention=True)
    site, = (s for s in attention_sites(model, SIZE) if s.has)
    assert site.is_fastais and site.channels == 160
    assert remove_attention(model, where) == ['layers.5.conv2.2']
    assert capsys.readouterr().out == 'Removed attention from decoder.1 (layers.5.conv2.2, 160 channels)\n'
    assert list(model.state_dict()) == list(unet().state_dict())


@pytest.mark.parametrize('layer', [fastai.layers.SelfAttention, fastai.layers.PooledSelfAttention2d, partial(fastai.layers.SimpleSelfAttention, ks=1), SelfAttention, SimpleSelfAttention], ids=named)
def test_channels_of_a_layer_that_came_with_the_model(layer, capsys):
    model = nn.Sequential(nn.Conv2d(3, 24, 3), layer(24))
    assert remove_attention(model, lambda s: s.channels == 24) == ['1'] and '24 channels' in capsys.readouterr().out
