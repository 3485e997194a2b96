"Attention into a model and out again: not a bit of a prediction changes, a Learner goes on as its user expects, and what fails leaves no trace"
import copy
import inspect
import os
import pickle
import re
import subprocess
from functools import partial

import fastai.layers
import pytest
import timm
import torch
import torchvision
from conftest import bin_dir
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import Datasets
from fastai.layers import ConvLayer, ResBlock
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai.torch_core import params, set_seed
import fastai.callback.all  # noqa: F401  patches `Learner`
from fastai.vision.learner import create_timm_model, create_unet_model
from fastai.vision.models import resnet18
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from fastai_selfattn.placement import insert as insert_module
from fastai_selfattn import learner  # noqa: F401  patches `Learner`
from fastai_selfattn.seeing.callbacks import GammaLogger
from fastai_selfattn.placement import optim as optim_module
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.optim import AttentionHooks, AttentionSplitter, inserted_layers
from fastai_selfattn.placement.skips import LetGo
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention
from fastai_selfattn.placement.sites import attention_sites

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

def unet(**kwargs):
    torch.manual_seed(4)
    return create_unet_model(resnet18, 2, SIZE, pretrained=False, **kwargs)

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
    'unet': (unet, ['encoder.0', 'encoder.1', 'layers.0.5.1', 'middle', 'decoder.*', 'layers.4.conv1']),
    'dense': (dense, ['1', '1.b.0']),
    'resnet': (torchvision.models.resnet18, ['relu', 'layer1.0', 'layer1.1.conv1', 'layer2', 'layer3.0.downsample']),
    'deeplab': (deeplab, ['backbone.1', 'backbone.2.0', 'classifier.0', 'classifier.0.convs.1']),
    'densenet': (partial(torchvision.models.DenseNet, 8, (2, 3), 16, num_classes=3), ['features.denseblock1', 'features.transition1', 'features.relu0', 'features.denseblock2.denselayer3']),
    'convnext': (partial(timm.create_model, 'convnext_atto', num_classes=3), ['stem', 'stages.0', 'stages.1.blocks.0.conv_dw']),
    'efficientnet': (partial(timm.create_model, 'efficientnet_lite0', num_classes=3), ['bn1', 'blocks.1', 'blocks.2.0', 'blocks.3.0.bn1']),
    'timm body': (lambda: create_timm_model('resnet18', 3, pretrained=False)[0], ['0.model.layer1', '0.model.layer2.0', '0.model.act1']),
    'xresnet': (partial(xresnet18, n_out=3), ['2', '4.0', '5', '5.1.convpath', '6.0.convpath.0']),
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
    ours, theirs = unet(), unet(self_attention=True)
    assert insert_attention(ours, True, size=SIZE) == ['layers.5.conv2.2']
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    use(ours), nn.init.constant_(theirs.layers[5].conv2[2].gamma, .5)
    x = image()
    assert (predict(ours, x) - predict(theirs, x)).abs().max() < 1e-5


@pytest.mark.parametrize('where,how', [('encoder.0', 'append'), ('encoder.2', 'append'), ('encoder.3', 'append'), ('encoder.0', 'replace')])
def test_a_skip_reads_what_attention_made(where, how):
    model, x = unet(), image()
    stages = [s.name for s in attention_sites(model, SIZE) if s.name.startswith('encoder')]
    insert_attention(model, where, how, size=SIZE)
    layer, = inserted_layers(use(model)).values()
    seen = []
    block = [m for m in model.layers if hasattr(m, 'shuf')][len(model.sfs) - 1 - stages.index(where)]          # the skips, from the bottom up
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
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
                                        (fastai.layers.SelfAttention, {}), (lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU()), {})], ids=str)
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
                                             (SelfAttention, dict(heads=2), '`heads=2` must divide'), (SelfAttention, dict(colour='red'), 'TypeError: .*colour'), (SelfAttention, dict(reduction=0), '`reduction` must be 1 or more')], ids=str)
@pytest.mark.parametrize('how', ['append', 'replace'])
def test_a_layer_that_does_not_fit(layer, args, says, how):
    model = plain() if how == 'append' else nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, 1, 1))
    before = tree(model)
    where = 'stem' if how == 'append' else '1'
    with pytest.raises(ValueError, match=says if how == 'append' else says.replace('stem', '1')): insert_attention(model, where, how, layer=layer, size=SIZE, **args)
    assert tree(model) == before


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


# --- where

@pytest.mark.parametrize('where,max_side,want', [
    (True, None, ['layers.5.conv2.2']), ('middle', None, ['layers.3.2']), ('decoder.[02]', None, ['layers.4.conv2.2', 'layers.6.conv2.2']), ('layers.6', None, ['layers.6.attention']),
    ('layers.0.*.1.conv2', None, [f'layers.0.{i}.1.conv2.attention' for i in (4, 5, 6, 7)]), (['middle', True, 'encoder.1'], None, ['layers.3.2', 'layers.5.conv2.2', 'layers.0.4.2']),
    (None, 3, ['layers.0.6.2', 'layers.4.conv2.2']), ('decoder.*', 5, ['layers.4.conv2.2', 'layers.5.conv2.2']), (lambda s: s.channels == 128, None, ['layers.0.5.2'])], ids=str)
def test_where(where, max_side, want):
    model = unet()
    assert insert_attention(model, where, max_side=max_side, size=(32, 32) if max_side == 3 else SIZE) == want and set(inserted_layers(model)) == set(want)


@pytest.mark.parametrize('where,error,says', [('decoder.7', ValueError, 'no site matches .decoder.7.'), (['middle', 'nothing.*'], ValueError, 'no site matches .nothing'), (lambda s: False, ValueError, 'no site matches'),
                                              (3, TypeError, '`where` must be'), (None, ValueError, 'give `where`, `max_side` or `side`'), ([], TypeError, '`where` must be'), (False, TypeError, '`where` must be')], ids=str)
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


@pytest.mark.parametrize('where,says', [('layers.7.conv1', 'makes 96 channels out of 192'), ('encoder.2', r'makes 128 channels out of 64'), ('layers.0.3', r'makes a map of 8x10 out of 16x20 \(a stride or a pooling\)'), ('layers.0.0', 'makes 64 channels out of 3')])
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

@pytest.mark.parametrize('where,gone', [('middle', 1), ('layers.3', 1), ('layers.3.2', 1), ('decoder.*', 2), (['middle', True], 2), (lambda s: s.channels < 100, 1), (None, 4)], ids=str)
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
    assert remove_attention(model, max_side=4) == ['layers.3.2'] and list(inserted_layers(model)) == ['layers.0.4.2']


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

STEPS = ['_make', '_append', '_replace', 'let_go', '_check_runs', 'watch', 'regroup', '_groups', '_set_lists', '_forget', '_welcome', '_report']

def where_is(step): return insert_module if hasattr(insert_module, step) else optim_module

@pytest.mark.parametrize('step,at', [(s, at) for s in STEPS for at in (1, -1, 2)])
@pytest.mark.parametrize('how', ['append', 'replace'])
def test_a_failure_at_any_step_of_inserting(monkeypatch, step, at, how):
    error = KeyboardInterrupt() if at == -1 else Fault('on purpose')
    learn = fitted(split=True)
    learn.freeze(), fit(learn)
    before, known = tree(learn.model), flat(learn_state(learn))
    monkeypatch.setattr(where_is(step), step, failing(getattr(where_is(step), step), at, error))
    try: insert_attention(learn, ['1', '3'], how)
    except (Fault, ValueError, KeyboardInterrupt) as e: assert e is error or e.__cause__ is error
    else:
        assert (step, how) in [('_append', 'replace'), ('_replace', 'append')] or at == 2 and step in STEPS[3:]
        return
    assert tree(learn.model) == before and flat(learn_state(learn)) == known


@pytest.mark.parametrize('step,at', [(s, at) for s in ('_take_out', 'watch', 'regroup', '_groups', '_set_lists', '_forget', '_welcome', '_report') for at in (1, -1, 2, -2)])
@pytest.mark.parametrize('how', ['append', 'replace'])
def test_a_failure_at_any_step_of_removing(monkeypatch, step, at, how):
    learn = fitted(split=True)
    insert_attention(learn, ['1', '3'], how)
    learn.freeze(), fit(learn)
    before, known = tree(learn.model), flat(learn_state(learn))
    monkeypatch.setattr(where_is(step), step, failing(getattr(where_is(step), step), at, Fault()))
    if abs(at) == 2 and step != '_take_out': return
    with pytest.raises(Fault): remove_attention(learn)
    assert tree(learn.model) == before and flat(learn_state(learn)) == known
    monkeypatch.undo()
    fit(learn)
    remove_attention(learn)


def test_a_module_that_is_not_called_as_a_whole():
    "The sites are found in a run; what then does not come to pass is an error, not a layer that does nothing"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.runs = nn.Conv2d(3, 8, 3), 0
        def forward(self, x):
            self.runs += 1
            return self.conv(x) if self.runs == 1 else self.conv.forward(x)
    model = Net()
    with pytest.raises(ValueError, match='conv is called 1 times in a forward pass, but attention there 0 times'): insert_attention(model, 'conv', size=SIZE)
    assert not inserted_layers(model) and not model.conv._forward_hooks


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


@pytest.mark.parametrize('existing', [True, False])
def test_attention_trains_in_the_frozen_body(existing):
    "`1` lies in the first group, `3` in the second; the third is the head"
    learn = make(splitter=split)
    if existing: learn.freeze(), fit(learn)
    learn.insert_attention(['1', '3'])
    if not existing: learn.freeze()
    assert len(learn.opt.param_lists) == 3 and learn.opt.frozen_idx == 2 and ids(own(learn)) <= ids(learn.opt.param_lists[-1]) and all(p.requires_grad for p in own(learn))
    weights = {k: v.clone() for k, v in learn.model.named_parameters()}
    fit(learn, 2)
    moved = {k for k, v in learn.model.named_parameters() if not torch.equal(v, weights[k])}
    assert all(gammas(learn)) and {'6.weight', '1.3.gamma', '3.2.gamma', '1.3.value.0.weight_orig'} <= moved
    assert not moved & {'0.weight', '1.0.weight', '2.weight', '3.0.weight'}


def test_freeze_unfreeze_freeze_to():
    learn = make(splitter=split)
    learn.insert_attention(['1', '3'])
    def trained(): return {k for k, p in learn.model.named_parameters() if p.requires_grad and not k.startswith(('1.1.', '1.3', '3.2'))}
    for act, want in ((learn.freeze, {'6.weight', '6.bias'}), (learn.unfreeze, {f'{k}.{w}' for k in ('0', '1.0', '2', '3.0', '6') for w in ('weight', 'bias')}),
                      (lambda: learn.freeze_to(1), {f'{k}.{w}' for k in ('2', '3.0', '6') for w in ('weight', 'bias')}), (lambda: learn.freeze_to(-2), {f'{k}.{w}' for k in ('2', '3.0', '6') for w in ('weight', 'bias')})):
        act()
        assert trained() == want and all(p.requires_grad for p in own(learn))


@pytest.mark.parametrize('lr,want', [(slice(1e-4, 1e-2), [1e-4, 1e-3, 1e-2]), (slice(1e-2), [1e-3, 1e-3, 1e-2]), ([1e-4, 2e-4, 3e-4], [1e-4, 2e-4, 3e-4])], ids=str)
def test_learning_rates_of_groups(lr, want):
    learn = make(splitter=split)
    learn.insert_attention('1')
    fit(learn, 1, lr)
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx(want) and ids(own(learn)) <= ids(learn.opt.param_lists[2])


def test_fine_tune():
    learn = make(splitter=split)
    learn.insert_attention('1')
    seen = []
    class Look(Callback):
        def before_fit(self): seen.append((self.opt.frozen_idx, self.opt.hypers[-1]['lr'], all(p.requires_grad for p in own(learn))))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-2, cbs=Look())
    assert [(f, a) for f, _, a in seen] == [(2, True), (0, True)] and gammas(learn)[0]


@pytest.mark.parametrize('opt_func', [Adam, partial(SGD, mom=.9), ranger, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['adam', 'sgd', 'ranger', 'wrapped'])
@pytest.mark.parametrize('splitter', [split, None], ids=['groups', 'one group'])
def test_an_optimizer_goes_on(opt_func, splitter):
    "It keeps what it knows of the old parameters, and takes the same steps on them as it would have"
    learn, plain = (fit(make(opt_func, splitter), 2) for _ in range(2))
    opt = learn.opt
    before = {id(p): {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for p, s in getattr(opt, 'opt', opt).state.items() if s}
    assert before
    learn.insert_attention(['1', '3'])
    assert learn.opt is opt and {id(p): {k: v for k, v in s.items()} for p, s in getattr(opt, 'opt', opt).state.items() if id(p) in before and s}.keys() == before.keys()
    for p, s in getattr(opt, 'opt', opt).state.items():
        for k, v in before.get(id(p), {}).items(): assert torch.equal(s[k], v) if isinstance(v, torch.Tensor) else s[k] == v
    assert sum(map(len, opt.param_lists)) == len(list(learn.model.parameters()))
    for m in inserted_layers(learn.model).values(): m.gamma.requires_grad_(False)          # then attention stays out, and the rest must go as without it
    for l in (learn, plain):
        set_seed(12)
        l.dls.train.rng.seed(1)
        fit(l, 2)
    for k, v in plain.model.named_parameters(): assert torch.equal(v, learn.model.get_parameter(k)), k
    for m in inserted_layers(learn.model).values(): m.gamma.requires_grad_(True)
    fit(learn, 2)
    assert all(gammas(learn))
    learn.remove_attention()
    assert [len(g) for g in learn.opt.param_lists] == [len(g) for g in plain.opt.param_lists] and [[k for k, p in learn.model.named_parameters() if id(p) == id(q)] for g in learn.opt.param_lists for q in g] == [[k for k, p in plain.model.named_parameters() if id(p) == id(q)] for g in plain.opt.param_lists for q in g]
    fit(learn)


@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['adam', 'ranger', 'wrapped'])
def test_an_optimizer_forgets_what_is_gone(opt_func):
    "A conv in the middle of a group goes, and comes back; ranger keeps a second list of weights, in the order of the first"
    learn = fit(make(opt_func, split), 2)
    def slow(): return {id(p): w for g, h in zip(learn.opt.param_lists, learn.opt.slow_weights) for p, w in zip(g, h, strict=True)} if opt_func is ranger else {}
    before, kept = slow(), ids(learn.model[3].parameters())
    learn.insert_attention('2', 'replace')                     # the conv of `3` comes after it in the second group
    assert all(slow()[i] is w for i, w in before.items() if i in kept)
    fit(learn, 2)
    learn.remove_attention()
    assert ids(getattr(learn.opt, 'opt', learn.opt).state) <= ids(learn.model.parameters()) and len(slow()) in (0, len(before))
    fit(learn, 2)


def test_a_built_optimizer_as_opt_func():
    model = net()
    learn = Learner(data(), model, loss_func=nn.CrossEntropyLoss(), opt_func=OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=.1)))
    learn.insert_attention('1')
    fit(learn, 2)
    assert gammas(learn)[0] and ids(own(learn)) <= ids(learn.opt.param_lists[-1])


def test_a_custom_splitter_and_frozen_weights():
    "The splitter leaves out what is frozen by hand; that must stay in the optimizer"
    learn = fit(make(splitter=lambda m: [[p for p in params(m[:2]) if p.requires_grad], params(m[2:])]))
    learn.model[0].weight.requires_grad_(False)
    learn.insert_attention('1')
    assert id(learn.model[0].weight) in ids(learn.opt.param_lists[0]) and ids(own(learn)) <= ids(learn.opt.param_lists[1]) and not learn.model[0].weight.requires_grad


def test_save_and_load_in_either_order(tmp_path):
    "Optimizer first, then attention, in two steps; or attention first"
    one = make(splitter=split, path=tmp_path)
    fit(one)
    one.insert_attention('3'), one.insert_attention('1')
    fit(one, 2)
    one.save('x')
    other = make(splitter=split, path=tmp_path)
    other.insert_attention(['1', '3'])
    other.load('x')
    assert same(values(one.model), values(other.model))
    names = {id(p): k for l in (one, other) for k, p in l.model.named_parameters()}
    a, b = ([{names[id(p)]: l.opt.state[p] for p in g} for g in l.opt.param_lists] for l in (one, other))
    for g, h in zip(a, b):
        assert list(g) == list(h)
        for k in g: assert g[k].keys() == h[k].keys() and all(torch.equal(v, h[k][s]) if isinstance(v, torch.Tensor) else v == h[k][s] for s, v in g[k].items()), k
    with pytest.raises(RuntimeError, match='1.3.gamma'): make(splitter=split, path=tmp_path).load('x')


def test_export_and_load_learner(tmp_path):
    learn = make(splitter=split, path=tmp_path)
    learn.insert_attention(['1', '3']), learn.insert_attention('2', 'replace')
    fit(learn, 2)
    learn.export('e.pkl')
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'e.pkl')
    x = torch.randn(3, 3, 12, 14)
    assert torch.equal(predict(loaded.model, x), predict(learn.model, x)) and isinstance(loaded.splitter, AttentionSplitter)
    assert len(loaded.remove_attention()) == 3 and list(loaded.model.state_dict()) == list(net().state_dict()) and loaded.splitter is split
    assert torch.equal(loaded.model[2].weight, net()[2].weight)
    fit(learn)                                                                               # exporting leaves a Learner that trains


def test_lr_find_summary_and_gamma_logger(capsys):
    learn = make(splitter=split, cbs=GammaLogger())
    learn.insert_attention(['1', '3'])
    state = values(learn.model)
    with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items() if not k.endswith(('_u', '_v', 'num_batches_tracked'))) and not any(gammas(learn))
    with learn.no_bar(): summary = str(learn.summary())
    assert sum(p.numel() for n, p in learn.model.named_parameters() if 'gamma' not in n) == int(re.search(r'Total params: ([\d,]+)', summary)[1].replace(',', '')) and 'AttentionHooks' in summary     # fastai counts what lies in leaves
    fit(learn)
    assert list(learn.gamma_logger.history.columns[2:4]) == ['gamma_1.3', 'gamma_3.2'] and (learn.gamma_logger.history.iloc[-1, 2:4] == gammas(learn)).all()


@pytest.mark.parametrize('to', [lambda l: l.to_fp16(), lambda l: l.add_cb(MixedPrecision(amp_mode='bf16')), lambda l: l.to_channelslast(use_amp=False)], ids=['fp16', 'bf16', 'channels last'])
@pytest.mark.parametrize('first', [True, False])
def test_precision_and_memory_format_of_training(to, first):
    learn = make(splitter=split)
    if first: to(learn)
    learn.insert_attention('1', layer=PooledSelfAttention2d), learn.insert_attention('3')
    if not first: to(learn)
    fit(learn, 2)
    assert all(gammas(learn))
    if hasattr(learn, 'channels_last'): assert learn.model.get_submodule('1.3').value[0].weight_orig.stride()[-1] > 1


def zero(pred, y): return 0 * pred.sum()

@pytest.mark.parametrize('decays', [False, True])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_gamma_decays_as_weights_do(decays, when):
    "As with `self_attention=True`, which is fastai's training. The loss has no gradient, so only weight decay moves a weight"
    learn = make(SGD, split, wd_bn_bias=decays)
    learn.loss_func = zero
    if when == 'after': fit(learn)
    learn.insert_attention('1')
    use(learn.model)
    bias, weight = learn.model[6].bias.detach().clone(), learn.model.get_parameter('1.3.value.0.weight_orig').detach().clone()
    fit(learn, 1, .1, wd=.5)
    assert gammas(learn)[0] == pytest.approx(.5 * .95**4) and torch.allclose(learn.model.get_parameter('1.3.value.0.weight_orig'), weight * .95**4)
    assert torch.equal(learn.model[6].bias, bias) == (not decays)


def test_a_new_layers_norms_are_treated_as_fastai_treats_norms():
    learn = make(splitter=split)
    learn.freeze(), fit(learn)
    learn.insert_attention('1', layer=lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)))
    norm = learn.model.get_submodule('1.3')[1]
    assert learn.opt.state[norm.weight]['do_wd'] is False and learn.opt.state[norm.weight]['force_train'] is True


def test_removing_gives_back_the_learner():
    learn = make(splitter=split)
    learn.freeze(), fit(learn)
    before, known = tree(learn.model), flat(learn_state(learn))
    for how in ('append', 'replace'):
        learn.insert_attention(['1', '3'], how)
        learn.remove_attention('3')
        assert isinstance(learn.splitter, AttentionSplitter) and any(isinstance(cb, AttentionHooks) for cb in learn.cbs)
        learn.remove_attention()
        assert tree(learn.model) == before and learn.splitter is split and not any(isinstance(cb, AttentionHooks) for cb in learn.cbs) and not hasattr(learn, 'attention_hooks')
        assert [[id(p) for p in g] for g in learn.opt.param_lists] == [[id(p) for p in g] for g in split(learn.model)] and ids(learn.opt.state) == ids(learn.model.parameters())
        if how == 'append': assert flat(learn_state(learn)) == known
    fit(learn)


@pytest.mark.parametrize('frozen', [True, False])
def test_a_conv_that_comes_back_is_frozen_as_its_group(frozen):
    learn = make(splitter=split)
    learn.unfreeze()
    learn.insert_attention('1', 'replace')
    if frozen: learn.freeze()
    learn.remove_attention()
    assert learn.model[1][0].weight.requires_grad == (not frozen) and learn.model[1][1].weight.requires_grad      # norms of a frozen body train
    assert id(learn.model[1][0].weight) in ids(learn.opt.param_lists[0]) and learn.opt.state[learn.model[1][1].weight] == dict(do_wd=False, force_train=True)


def test_a_model_insertion_before_the_learner_trains_too():
    model = net()
    insert_attention(model, ['1', '3'], size=(12, 14))
    learn = fit(Learner(data(), model, loss_func=nn.CrossEntropyLoss()), 2)
    assert all(gammas(learn))


def test_the_learners_own_data_say_the_size():
    learn = make()
    learn.insert_attention('1')
    assert inserted_layers(learn.model)['1.3'].attention_place.site.map == (6, 7) and learn.attention_sites().title == 'Places for attention in Sequential, image 3x12x14 (one image of the data)'
    learn.remove_attention()
    learn.insert_attention('1', size=(20, 22))
    assert inserted_layers(learn.model)['1.3'].attention_place.site.map == (10, 11)


def test_methods_of_a_learner_are_the_functions():
    for name, f in dict(attention_sites=attention_sites, insert_attention=insert_attention, remove_attention=remove_attention).items():
        ours, theirs = (list(inspect.signature(g).parameters.values())[1:] for g in (getattr(Learner, name), f))
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_the_same_training_with_and_without_a_look():
    a, b = make(), make()
    for _ in range(2): b.attention_sites()
    for l in (a, b): fit(l, 2)
    assert same(values(a.model), values(b.model))


def test_synchronised_norms_keep_their_attention():
    "Distributed training exchanges norm layers for others, without their hooks"
    learn = make()
    learn.insert_attention('1.1')
    use(learn.model)
    x = torch.randn(2, 3, 12, 14)
    y = predict(learn.model, x)
    learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    assert not torch.equal(predict(learn.model, x), y)
    learn('before_fit')
    assert torch.equal(predict(learn.model, x), y)
    learn('before_fit'), learn.remove_attention()
    assert not any(m._forward_hooks for m in learn.model.modules())


DISTRIBUTED = '''
import os, torch
import fastai.distributed as distributed
from test_insert import *

def broadcast(self, t, rank):     # fastai's goes through a GPU
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

distributed.DistributedDL._broadcast = broadcast
learn = make(splitter=split)
learn.insert_attention(['1','3'])
with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, 2)
learn.save(f"rank{os.environ['RANK']}") if os.environ['RANK'] == '0' else torch.save(learn.model.state_dict(), learn.path/'rank1.pth')
'''

def test_distributed_training(tmp_path):
    pytest.importorskip('accelerate', reason='fastai trains on several processes with accelerate, which is not installed')
    (tmp_path / 'train.py').write_text(DISTRIBUTED)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.path.dirname(__file__)}
    res = subprocess.run([str(bin_dir / 'torchrun'), '--standalone', '--nproc_per_node', '2', 'train.py'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert not res.returncode, res.stderr[-3000:]
    one, two = (torch.load(tmp_path / f, weights_only=False) for f in ('models/rank0.pth', 'rank1.pth'))
    one = one['model']
    assert one['1.3.gamma'].item() and one['3.2.gamma'].item() and all(torch.equal(one[k], two[k]) for k in one if 'running' not in k and 'num_batches' not in k)


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
