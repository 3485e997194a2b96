"`create_unet_model` and `unet_learner` against fastai's: the same U-Net but for the layer, checkpoints both ways, errors that leave no trace"
import copy
import inspect
import pickle
import re
from functools import partial

import fastai.layers
from fastai.callback.core import Callback
import pytest
from conftest import named
import timm
import torch
import torchvision
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import FuncSplitter, Normalize, get_image_files
from fastai.layers import ConvLayer
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fastai.vision import learner as fastai_learner
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import vision_learner
from fastai.vision.models import resnet18, resnet34, xresnet
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastai_selfattn import learner as learner_module  # noqa: F401  patches `Learner`
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.optim import inserted_layers
from fastai_selfattn.attention.layers import PooledSelfAttention2d, SelfAttention
from fastai_selfattn.attention.kinds import attention_layers
from fastai_selfattn.walls.rooms import make_rooms
from fastai_selfattn.placement.sites import attention_sites
from fastai_selfattn.placement.unet import create_unet_model, unet_learner
from fastai_selfattn.walls.data import open_mask

SIZE = (32, 48)

def encoder(pretrained=False):
    "Halves the map five times"
    chs = (3, 8, 16, 24, 32, 40)
    return nn.Sequential(*[ConvLayer(a, b, stride=2) for a, b in zip(chs, chs[1:])], nn.AdaptiveAvgPool2d(1))

def shallow(pretrained=False):
    "Two changes of size, so two blocks"
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

def flat(pretrained=False): return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.AdaptiveAvgPool2d(1))

def no_download(pretrained=False): raise OSError('no network')

def interrupted(pretrained=False): raise KeyboardInterrupt

META = {'cut': None, 'split': fastai_learner.default_split, 'stats': imagenet_stats}     # what fastai knows of a pretrained encoder

@pytest.fixture
def known(monkeypatch):
    for arch in (encoder, shallow, no_download, interrupted): monkeypatch.setitem(fastai_learner.model_meta, arch, META)

def mask_of(f): return open_mask(f.parent.parent / 'masks' / f.name)

@pytest.fixture(scope='module')
def rooms(tmp_path_factory): return make_rooms(tmp_path_factory.mktemp('unet') / 'rooms', 6, SIZE)

@pytest.fixture
def dls(rooms):
    block = DataBlock((ImageBlock, MaskBlock(['other', 'wall'])), get_items=lambda p: sorted(get_image_files(p / 'images')), get_y=mask_of,
                      splitter=FuncSplitter(lambda f: f.stem >= 'room_0004'))
    return block.dataloaders(rooms, bs=2, num_workers=0)

def unet(f=create_unet_model, arch=encoder, self_attention=True, seed=3, **kwargs):
    torch.manual_seed(seed)
    return f(arch, 2, SIZE, pretrained=False, self_attention=self_attention, **kwargs)

def learner(dls, f=unet_learner, self_attention=True, gamma=.7, arch=encoder, **kwargs):
    set_seed(3)
    dls.train.rng.seed(5)
    learn = f(dls, arch, self_attention=self_attention, **{'pretrained': False, **kwargs})
    if self_attention: nn.init.constant_(learn.model.layers[5].conv2[-1].gamma, gamma)
    return learn

def fit(learn, n=2, lr=1e-2):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr)
    return learn

def preds(learn):
    with learn.no_bar(): return learn.get_preds()[0]

def step(model):
    "A training step; `model` still holds what backward needed"
    model.train()(torch.randn(2, 3, *SIZE)).pow(2).mean().backward()
    with torch.no_grad():
        for p in model.parameters(): p -= .01 * p.grad

def same(a, b): return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize('arch', [resnet18, resnet34])
def test_place_and_keys_in_a_resnet(arch):
    ours, theirs = unet(arch=arch), unet(fastai_learner.create_unet_model, arch)
    assert list(attention_layers(ours)) == ['layers.5.conv2.2'] == [n for n, m in theirs.named_modules() if isinstance(m, fastai.layers.SelfAttention)]
    assert not any(isinstance(m, fastai.layers.SelfAttention) for m in ours.modules())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize('self_attention', [True, False])
def test_same_seed_same_parameters_and_next_random_number(self_attention):
    theirs, drawn = unet(fastai_learner.create_unet_model, self_attention=self_attention), torch.rand(3)
    ours, drawn_after = unet(self_attention=self_attention), torch.rand(3)
    assert same(dict(theirs.named_parameters()), dict(ours.named_parameters())) and torch.equal(drawn, drawn_after)
    assert [m.training for m in theirs.modules()] == [m.training for m in ours.modules()]


def test_same_seed_same_learner(dls):
    theirs, drawn = learner(dls, fastai_learner.unet_learner), torch.rand(3)
    ours, drawn_after = learner(dls), torch.rand(3)
    assert same(dict(theirs.model.named_parameters()), dict(ours.model.named_parameters())) and torch.equal(drawn, drawn_after)


def test_without_attention_it_is_fastais(dls):
    set_seed(3); default = create_unet_model(encoder, 2, SIZE, pretrained=False)
    ours, theirs = unet(self_attention=False), unet(fastai_learner.create_unet_model, self_attention=False)
    for model in (default, ours): assert not attention_layers(model) and str(model) == str(theirs) and same(model.state_dict(), theirs.state_dict())
    ours, theirs = (fit(learner(dls, f, self_attention=False)) for f in (unet_learner, fastai_learner.unet_learner))
    assert torch.equal(preds(ours), preds(theirs)) and not attention_layers(ours.model)


@pytest.mark.parametrize('saved_by,loaded_by', [(fastai_learner.unet_learner, unet_learner), (unet_learner, fastai_learner.unet_learner)], ids=['theirs to ours', 'ours to theirs'])
def test_checkpoints_go_both_ways(dls, tmp_path, saved_by, loaded_by):
    one = fit(learner(dls, saved_by, path=tmp_path))
    one.save('trained')
    other = learner(dls, loaded_by, gamma=0., path=tmp_path)
    assert (preds(other) - preds(one)).abs().max() > 1e-2
    with other.no_bar(): other.load('trained', strict=True)
    assert (preds(other) - preds(one)).abs().max() < 1e-5
    nn.init.zeros_(other.model.layers[5].conv2[-1].gamma)
    assert (preds(other) - preds(one)).abs().max() > 1e-3          # attention takes part in what was compared


def test_export_and_load_learner(dls, tmp_path):
    learn = fit(learner(dls, path=tmp_path))
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    dl, items = loaded.dls.test_dl, dls.valid_ds.items
    with learn.no_bar(), loaded.no_bar():
        got, want = loaded.get_preds(dl=dl(items, num_workers=0))[0], learn.get_preds(dl=learn.dls.test_dl(items, num_workers=0))[0]
    assert want.shape == (2, 2, *SIZE) and torch.equal(got, want) and list(attention_layers(loaded.model)) == ['layers.5.conv2.2']


def test_block_copies_right_after_a_training_step():
    "The graph of the step is still there, and fastai's layer cannot be copied then"
    ours, theirs = unet(), unet(fastai_learner.create_unet_model)
    for model in (ours, theirs): step(model)
    twin = copy.deepcopy(ours.layers[5].conv2)
    assert same(twin.state_dict(), ours.layers[5].conv2.state_dict()) and not any(a is b for a, b in zip(twin.parameters(), ours.layers[5].conv2.parameters()))
    with pytest.raises(RuntimeError, match='deepcopy'): copy.deepcopy(theirs.layers[5].conv2)


def looked(model, x=None):
    "What `model` predicts"
    with torch.no_grad(): return model.eval()(torch.randn(2, 3, *SIZE) if x is None else x)

@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: AveragedModel(m).module], ids=['deepcopy', 'ema'])
def test_new_model_copies(copied):
    "fastai's layer cannot be copied then, since the U-Net was run once while it was made"
    model, x = unet(), torch.randn(2, 3, *SIZE)
    assert torch.equal(looked(copied(model), x), looked(model, x))


def test_whole_model_copies_after_training_and_looking():
    model, x = unet(), torch.randn(2, 3, *SIZE)
    step(model)
    want = looked(model, x)
    twin = copy.deepcopy(model)
    step(model)
    assert torch.equal(looked(twin, x), want) and not torch.equal(looked(model, x), want)


def test_moving_average_of_the_weights():
    model, x = unet(), torch.randn(2, 3, *SIZE)
    step(model)
    looked(model)
    ema = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.75))
    for i in range(3):
        step(model)
        nn.init.constant_(model.layers[5].conv2[-1].gamma, i)
        ema.update_parameters(model)
    assert ema.module.layers[5].conv2[-1].gamma.item() == pytest.approx(.75 * (.75 * 0 + .25 * 1) + .25 * 2)      # the first is copied
    by_hand = unet()
    by_hand.load_state_dict(ema.module.state_dict(), strict=True)
    assert torch.equal(looked(by_hand, x), looked(ema.module, x))


@pytest.mark.parametrize('arch,says', [(shallow, r'gives only 2: .* Places there are: decoder.0 \(layers.4.conv2, 28 channels\), decoder.1 \(layers.5.conv2, 11 channels\)'),
                                       (flat, 'gives only 0: .* There is no block')])
def test_no_place_is_an_error_of_both(dls, arch, says):
    with pytest.raises(ValueError, match=says): unet(arch=arch)
    with pytest.raises(ValueError, match=says): learner(dls, arch=arch)
    assert not attention_layers(unet(arch=arch, self_attention=False))


def test_the_remedy_in_the_message_works():
    with pytest.raises(ValueError) as e: unet(arch=shallow)
    remedy = re.search(r"`self_attention='(.+)'`", str(e.value))[1]
    model = unet(arch=shallow, self_attention=remedy)
    assert list(attention_layers(model)) == ['layers.4.conv2.2']
    step(model)
    assert model.layers[4].conv2[2].gamma.item() != 0


def tfms(dls): return [list(dl.after_batch.fs) for dl in dls.loaders]

@pytest.mark.parametrize('arch,kwargs,error', [(shallow, {}, ValueError), (no_download, {}, OSError), (interrupted, {}, KeyboardInterrupt),
                                               (encoder, dict(no_such_argument=1), TypeError), (encoder, dict(cbs=object()), Exception)])
@pytest.mark.parametrize('self_attention', [True, False])
def test_dls_are_as_before_after_failing(dls, known, arch, kwargs, error, self_attention):
    before = tfms(dls)
    assert not any(isinstance(t, Normalize) for ts in before for t in ts)
    if arch is not shallow or self_attention:
        with pytest.raises(error): unet_learner(dls, arch, pretrained=True, self_attention=self_attention, **kwargs)
        assert all(a is b for now, then in zip(tfms(dls), before, strict=True) for a, b in zip(now, then, strict=True))
    unet_learner(dls, encoder, pretrained=True, self_attention=True)
    assert [sum(isinstance(t, Normalize) for t in ts) for ts in tfms(dls)] == [1, 1]     # as fastai does it, once for each


def test_normalisation_that_was_there_stays(dls, known):
    dls.add_tfms([Normalize.from_stats(*imagenet_stats)], 'after_batch')
    before = tfms(dls)
    with pytest.raises(ValueError): unet_learner(dls, shallow, pretrained=True, self_attention=True)
    assert all(a is b for now, then in zip(tfms(dls), before, strict=True) for a, b in zip(now, then, strict=True))


@pytest.mark.parametrize('flag', [None, 1, 0, [], [3], 2.5], ids=named)
def test_self_attention_must_be_a_place(dls, flag):
    for f, data in ((create_unet_model, (2, SIZE)), (unet_learner, ())):
        args = (encoder, *data) if data else (dls, encoder)
        with pytest.raises(TypeError, match=re.escape(f'got {flag[0] if flag == [3] else flag!r}')): f(*args, pretrained=False, self_attention=flag)


@pytest.mark.parametrize('kwargs,error,says', [
    (dict(arch='resnet18'), TypeError, "`arch` must be a function that makes an encoder.*got 'resnet18'"), (dict(arch=encoder()), TypeError, '`arch` must be .*got a Sequential'), (dict(arch=['resnet18']), TypeError, '`arch` must be'),
    (dict(n_out='2'), TypeError, "`n_out` must be whole numbers, got '2'"), (dict(n_out=2.), TypeError, 'got 2.0'), (dict(n_out=True), TypeError, 'got True'), (dict(n_out=None), TypeError, '`n_out` .* got None'),
    (dict(img_size=32), ValueError, r'`img_size` must be \(h, w\).*got 32'), (dict(img_size=(3, 32, 32)), ValueError, '`img_size` must be'), (dict(img_size='32'), ValueError, '`img_size` must be'), (dict(img_size=(32., 32)), TypeError, '`img_size` must be whole numbers, got 32.0')], ids=str)
@pytest.mark.parametrize('self_attention', [True, False, 'middle'])
def test_what_makes_no_unet_is_refused(dls, kwargs, error, says, self_attention):
    before, random = tfms(dls), torch.get_rng_state()
    with pytest.raises(error, match=says): create_unet_model(**dict(arch=encoder, n_out=2, img_size=SIZE) | kwargs, self_attention=self_attention, pretrained=False)
    if 'img_size' in kwargs or kwargs.get('n_out', 2) is None: return     # which a Learner has from its data
    with pytest.raises(error, match=says): unet_learner(dls, **dict(arch=encoder) | kwargs, self_attention=self_attention, pretrained=False)
    if 'n_out' in kwargs:
        with pytest.raises(error, match=says): unet_learner(dls, encoder, True, kwargs['n_out'], self_attention=self_attention, pretrained=False)
    assert tfms(dls) == before and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize('n_out,size', [(torch.tensor(2), SIZE), (2, list(SIZE)), (2, torch.Size(SIZE)), (2, torch.tensor(SIZE))], ids=str)
def test_numbers_that_fastai_takes(n_out, size):
    for f in (fastai_learner.create_unet_model, create_unet_model): assert f(encoder, n_out, size, pretrained=False)(torch.randn(1, 3, *SIZE)).shape == (1, 2, *SIZE)


def test_attention_of_the_encoder_is_left_alone():
    sa = lambda model: [(n, type(m)) for n, m in model.named_modules() if isinstance(m, (fastai.layers.SelfAttention, fastai.layers.SimpleSelfAttention))]
    arch = lambda pretrained: xresnet.xresnet18(sa=1)
    ours, theirs = (unet(f, arch, cut=-4) for f in (create_unet_model, fastai_learner.create_unet_model))
    assert [n for n, _ in sa(theirs)] == [n for n, _ in sa(ours)] + [n for n, m in ours.named_modules() if isinstance(m, SelfAttention)] == list(attention_layers(ours)) and len(sa(ours)) == 1
    arch = lambda pretrained: nn.Sequential(ConvLayer(3, 8), fastai.layers.SelfAttention(8), *list(encoder())[1:-1], nn.AdaptiveAvgPool2d(1))
    ours = unet(arch=arch)
    assert sa(ours) == [('layers.0.1', fastai.layers.SelfAttention)] and list(attention_layers(ours)) == ['layers.0.1', 'layers.5.conv2.2']


def test_arguments_as_fastais(dls, known, tmp_path):
    assert unet_learner(dls, encoder, False, 5, True, self_attention=True).model(torch.randn(1, 3, *SIZE)).shape == (1, 5, *SIZE)      # normalize, n_out, pretrained
    assert not any(isinstance(t, Normalize) for ts in tfms(dls) for t in ts)
    unet_learner(dls, encoder, True, self_attention=True)
    assert all(any(isinstance(t, Normalize) for t in ts) for ts in tfms(dls))
    model = create_unet_model(encoder, 3, SIZE, False, None, None, 4, blur=True, last_cross=False, y_range=(0, 1), self_attention=True)
    out = model(torch.randn(2, 4, *SIZE))
    assert out.shape == (2, 3, *SIZE) and 0 < out.min() < out.max() < 1


@pytest.mark.parametrize('ours,theirs', [(create_unet_model, fastai_learner.create_unet_model), (unet_learner, fastai_learner.unet_learner)])
def test_signature_shows_the_arguments_of_fastai(ours, theirs):
    shown, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert set(wanted) <= set(shown) and {'blur', 'n_out', 'self_attention'} <= set(shown)
    for name in set(wanted) - {'dls', 'arch', 'n_out', 'img_size'}: assert shown[name].default == wanted[name].default


def test_frozen_body_trains_our_gamma(dls, known):
    learn = learner(dls, gamma=0., pretrained=True)
    layer = learn.model.layers[5].conv2[-1]
    body, head = (learn.opt.all_params(n) for n in (slice(0, 1), slice(1, None)))
    assert isinstance(layer, SelfAttention) and learn.opt.frozen_idx == 1
    assert {id(p) for p in layer.parameters()} <= {id(p) for p, *_ in head} and not {id(p) for p in layer.parameters()} & {id(p) for p, *_ in body}
    convs = [m.weight.detach().clone() for m in learn.model.layers[0].modules() if isinstance(m, nn.Conv2d)]
    values = layer.value[0].weight_orig.detach().clone()
    fit(learn)
    assert layer.gamma.abs().item() > 1e-3 and not torch.equal(values, layer.value[0].weight_orig)
    for m, before in zip([m for m in learn.model.layers[0].modules() if isinstance(m, nn.Conv2d)], convs): assert torch.equal(m.weight, before)


def test_trains_like_fastai(dls):
    "From a checkpoint of fastai, with its singular vectors, the same steps"
    theirs = fit(learner(dls, fastai_learner.unet_learner), 1)
    ours = learner(dls)
    ours.model.load_state_dict(theirs.model.state_dict(), strict=True)
    losses = []
    for learn in (theirs, ours):
        set_seed(11)
        learn.create_opt()
        dls.train.rng.seed(5)
        fit(learn, 2, 1e-3)
        losses.append(torch.stack(list(learn.recorder.losses)))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert ours.model.layers[5].conv2[-1].gamma.item() == pytest.approx(theirs.model.layers[5].conv2[-1].gamma.item(), abs=1e-4) != .7


# --- any place

@pytest.mark.parametrize('where,kwargs,want', [
    ('decoder.0', {}, ['layers.4.conv2.2']), ('encoder.[12]', {}, ['layers.0.1.3', 'layers.0.2.3']), (['middle', True], {}, ['layers.3.2', 'layers.5.conv2.2']), (lambda s: s.channels == 41, {}, ['layers.6.conv2.2']),
    ('decoder.*', dict(max_side=6), ['layers.4.conv2.2', 'layers.5.conv2.2']), (False, dict(max_side=3), ['layers.0.3.3', 'layers.0.4.3', 'layers.3.2', 'layers.4.conv2.2']), ('decoder.1', dict(how='replace'), ['layers.5.conv2']),
    (True, dict(layer=PooledSelfAttention2d), ['layers.5.conv2.2']), (True, dict(how='replace'), ['layers.5.conv2']), ('middle', dict(layer=partial(SelfAttention, reduction=4)), ['layers.3.2'])], ids=named)
def test_any_place_at_construction(dls, where, kwargs, want):
    for model in (unet(self_attention=where, **kwargs), unet_learner(dls, encoder, pretrained=False, self_attention=where, **kwargs).model):
        assert list(inserted_layers(model)) == want and all(type(m) is kwargs.get('layer', SelfAttention) or m.reduction == 4 for m in inserted_layers(model).values())
        step(model)
        assert all(m.gamma.grad.item() for m in inserted_layers(model).values())
        assert sorted(remove_attention(model)) == sorted(want) and list(model.state_dict()) == list(unet(self_attention=False).state_dict())


def test_a_place_is_inserting_it_later():
    at_once, later = unet(self_attention=['middle', 'decoder.2']), unet(self_attention=False)
    insert_attention(later, ['middle', 'decoder.2'], size=SIZE)
    assert same(at_once.state_dict(), later.state_dict())
    x = torch.randn(2, 3, *SIZE)
    assert torch.equal(looked(at_once, x), looked(unet(self_attention=False), x))


def test_true_can_be_taken_out(dls):
    for model in (unet(), learner(dls).model):
        assert remove_attention(model) == ['layers.5.conv2.2'] and list(model.state_dict()) == list(unet(self_attention=False).state_dict())


def test_true_stays_fastais_learner(dls, known):
    "Same groups, same splitter, no callback: weight decay acts on gamma too"
    ours, theirs = (learner(dls, f, pretrained=True) for f in (unet_learner, fastai_learner.unet_learner))
    assert ours.splitter is theirs.splitter and [type(cb) for cb in ours.cbs] == [type(cb) for cb in theirs.cbs]
    names = [{id(p): k for k, p in l.model.named_parameters()} for l in (ours, theirs)]
    a, b = ([[n[id(p)] for p in g] for g in l.opt.param_lists] for n, l in zip(names, (ours, theirs)))
    assert a == b and 'do_wd' not in ours.opt.state[ours.model.layers[5].conv2[2].gamma]


def test_a_checkpoint_fits_after_attention_came_and_went(dls, tmp_path):
    "The layer at fastai's place stays where a new optimizer has it; more attention comes behind"
    learn = fit(learner(dls, path=tmp_path), 1)
    names = {id(p): n for n, p in learn.model.named_parameters()}
    def order(l, names=names): return [[names.get(id(p), '') for p in g] for g in l.opt.param_lists]
    before = order(learn)
    learn.save('alone')
    learn.insert_attention('encoder.1')
    new = next(iter(m for p, m in inserted_layers(learn.model).items() if p != 'layers.5.conv2.2'))
    assert [[n for n in g if n] for g in order(learn)] == before and [id(p) for p in learn.opt.param_lists[-1][-len(list(new.parameters())):]] == [id(p) for p in new.parameters()]
    fit(learn, 1).save('both')
    other = learner(dls, path=tmp_path)
    other.insert_attention('encoder.1')
    fit(other.load('both'), 1)
    learn.remove_attention('encoder.1')
    assert order(learn) == before
    fit(learn.load('alone'), 1)
    fit(learner(dls, path=tmp_path).load('alone'), 1)


def test_a_state_in_another_order_is_refused(dls, tmp_path):
    fit(learner(dls, path=tmp_path), 1).save('true')
    set_seed(3)
    learn = unet_learner(dls, encoder, self_attention='decoder.1', pretrained=False, path=tmp_path)
    for trained in (False, True):
        if trained: fit(learn, 1)
        state, opt = {k: v.clone() for k, v in learn.model.state_dict().items()}, learn.opt
        known = opt and [dict(opt.state[p]) for g in opt.param_lists for p in g]
        with pytest.raises(ValueError, match='parameters in another order.*`with_opt=False`'): learn.load('true')
        assert learn.opt is opt and same(state, learn.model.state_dict())
        if trained: assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(known, [opt.state[p] for g in opt.param_lists for p in g]))
    fit(learn.load('true', with_opt=False), 1)


def test_loaders_without_pipelines():
    "fastai's plain ones, which its own function takes"
    x, y = torch.rand(4, 3, *SIZE), torch.zeros(4, *SIZE).long()
    data = DataLoaders(*(DataLoader([*zip(x, y)], bs=2, num_workers=0) for _ in range(2)))
    learn = unet_learner(data, encoder, self_attention=True, pretrained=False, n_out=2, normalize=False, loss_func=nn.CrossEntropyLoss())
    assert list(inserted_layers(fit(learn, 1).model)) == ['layers.5.conv2.2']


def test_a_place_in_the_frozen_encoder_trains(dls, known):
    learn = unet_learner(dls, encoder, self_attention='encoder.2', pretrained=True)
    layer, = inserted_layers(learn.model).values()
    before = learn.model.layers[0][1][0].weight.detach().clone()
    fit(learn)
    assert learn.opt.frozen_idx == 1 and layer.gamma.item() and torch.equal(learn.model.layers[0][1][0].weight, before)


@pytest.mark.parametrize('where,kwargs,says', [('decoder.9', {}, 'no site matches'), (True, dict(how='beside'), '`how` must be'), ('encoder.1', dict(how='replace'), 'cannot replace'), ('middle', dict(layer=partial(SelfAttention, heads=3)), '`heads=3`'),
                                               (False, dict(how='replace'), '`self_attention=False` inserts none'), (False, dict(layer=PooledSelfAttention2d), '`self_attention=False` inserts none'), (False, dict(max_side=0), 'no site matches')], ids=named)
def test_a_place_that_cannot_be(dls, known, where, kwargs, says):
    before = tfms(dls)
    with pytest.raises(ValueError, match=says): unet(self_attention=where, **kwargs)
    with pytest.raises(ValueError, match=says): unet_learner(dls, encoder, pretrained=True, self_attention=where, **kwargs)
    assert all(a is b for now, then in zip(tfms(dls), before, strict=True) for a, b in zip(now, then, strict=True))


@pytest.mark.parametrize('where,args', [('middle', dict(reduction=4)), (True, dict(reduction=4)), (['middle'], dict(layer=PooledSelfAttention2d, pool=3)), (False, dict(side=3, reduction=2))], ids=named)
def test_options_of_the_layer(dls, where, args):
    "As `insert_attention` takes them"
    for model in (unet(self_attention=where, **args), unet_learner(dls, encoder, pretrained=False, self_attention=where, blur=True, **args).model):
        found = inserted_layers(model).values()
        assert found and all(getattr(m, k) == v for m in found for k, v in args.items() if k not in ('layer', 'side'))
        assert 'side' not in args or all(max(m.attention_place.site.map) == 3 for m in found)


@pytest.mark.parametrize('where', [True, False, 'middle'])
def test_arguments_that_nobody_knows(dls, where):
    for call in (lambda **kwargs: unet(self_attention=where, **kwargs), lambda **kwargs: unet_learner(dls, encoder, pretrained=False, self_attention=where, **kwargs)):
        with pytest.raises(TypeError, match=r"neither fastai's `\w+` nor SelfAttention takes `reductoin`, `colour`"): call(reductoin=4, colour='red')
    if where is False:
        with pytest.raises(ValueError, match='give a place'): unet(self_attention=False, reduction=4)
    else: unet(self_attention=where, norm_type=None, padding_mode='zeros')     # fastai's, through its blocks
    with pytest.raises(ValueError, match="no site matches 'midle'. Did you mean 'middle'"): unet(self_attention='midle')


# --- skips are let go

class Copies(Callback):
    "A copy between forward and backward pass of each batch"
    def before_fit(self): self.copies = []
    def after_pred(self):
        if self.training: self.copies.append(copy.deepcopy(self.model))

@pytest.mark.parametrize('where', [True, False, 'encoder.1', 'decoder.0'])
def test_copies_in_the_middle_of_training(dls, where, tmp_path):
    "`deepcopy`, an average of the weights, pickles and exports; and the same training as without"
    ours, plain = (unet_learner(dls, encoder, pretrained=False, self_attention=where, path=tmp_path) for _ in range(2))
    plain.model.load_state_dict(ours.model.state_dict())
    for learn, cbs in ((ours, [Copies()]), (plain, [])):
        set_seed(7)
        dls.train.rng.seed(5)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
        if cbs: copies = cbs[0].copies
    assert same(ours.model.state_dict(), plain.model.state_dict()) and len(copies) == len(dls.train)
    x = torch.randn(2, 3, *SIZE)
    step(ours.model)
    twin, ema = copy.deepcopy(ours.model), AveragedModel(ours.model)
    for model in (twin, ema.module, pickle.loads(pickle.dumps(ours.model)) ): assert torch.equal(looked(model, x), looked(ours.model, x))
    step(ours.model)
    ema.update_parameters(ours.model)
    assert len(twin._forward_hooks) == len(ours.model._forward_hooks) == 1
    ours.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    step(loaded.model)
    copy.deepcopy(loaded.model)


def test_nothing_is_kept_after_a_pass():
    ours, theirs = unet(), unet(fastai_learner.create_unet_model)
    for model in (ours, theirs): model.train()(torch.randn(2, 3, *SIZE))
    assert all(h.stored is None for h in ours.sfs) and all(h.stored is not None and h.stored.grad_fn for h in theirs.sfs)
    ours.layers.append(nn.Conv2d(9, 9, 1))                 # the pass fails after the skips were stored
    with pytest.raises(RuntimeError): ours(torch.randn(2, 3, *SIZE))
    assert all(h.stored is None for h in ours.sfs)


def test_compiled():
    "Without fastai's last module, with which no U-Net of fastai's compiles"
    model, x = unet(self_attention='middle').eval(), torch.randn(2, 3, *SIZE)
    del model.layers[-1]
    with torch.no_grad(): assert torch.allclose(torch.compile(model, backend='eager')(x), model(x), atol=1e-5)


# --- encoders of timm and torchvision, as the how-to page makes them

def chain(*modules): return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1))

def timm_resnet18(pretrained=False): return timm.create_model('resnet18', pretrained=pretrained)

def convnext(pretrained=False):
    m = timm.create_model('convnext_atto', pretrained=pretrained, depths=(1, 1, 2, 1))
    return chain(m.stem, *m.stages)

def efficientnet(pretrained=False):
    m = timm.create_model('efficientnet_lite0', pretrained=pretrained)
    return chain(m.conv_stem, m.bn1, *m.blocks)

def mobilenet(pretrained=False): return chain(*torchvision.models.mobilenet_v3_small(weights=None).features)
def densenet(pretrained=False): return chain(*torchvision.models.DenseNet(8, (2, 2, 2), 16).features, nn.ReLU())

@pytest.mark.parametrize('arch,sizes', [(timm_resnet18, 4), (convnext, 3), (efficientnet, 4), (torchvision.models.resnet18, 4), (mobilenet, 4), (densenet, 3)], ids=lambda a: getattr(a, '__name__', a))
def test_encoders(dls, arch, sizes):
    model, x = unet(arch=arch, self_attention=False), torch.randn(2, 3, *SIZE)
    sites = attention_sites(model, SIZE)
    assert [s.name for s in sites] == [f'encoder.{i}' for i in range(sizes + 1)] + ['middle'] + [f'decoder.{i}' for i in range(sizes)] and not any(s.reason for s in sites if max(s.map) > 1)
    y, keys = looked(model, x), list(model.state_dict())
    insert_attention(model, ['encoder.1', True, 'decoder.[12]'], size=SIZE)
    assert torch.equal(looked(model, x), y) and len(inserted_layers(model)) == 3 + (sizes == 3)     # of four blocks `True` is `decoder.1`
    step(model)
    assert all(m.gamma.item() for m in inserted_layers(model).values())
    learn = unet_learner(dls, arch, self_attention=['encoder.1', True], pretrained=False)
    fit(learn, 1, 1e-3)
    assert all(m.gamma.item() for m in inserted_layers(learn.model).values())
    learn.remove_attention()
    assert list(learn.model.state_dict()) == keys


@pytest.mark.parametrize('arch', ['resnet18', resnet18], ids=['timm', 'torchvision'])
def test_vision_learner(rooms, arch):
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(get_image_files(p / 'images')), get_y=lambda f: int(f.stem[-1]) % 2, splitter=FuncSplitter(lambda f: f.stem >= 'room_0004')).dataloaders(rooms, bs=2, num_workers=0)
    learn = vision_learner(dls, arch, pretrained=False)
    before, keys = preds(learn), list(learn.model.state_dict())
    stages = [s.name for s in learn.attention_sites() if s.channels == 256]
    learn.insert_attention(stages[-1])
    assert torch.equal(preds(learn), before)
    learn.freeze()
    fit(learn, 1, 1e-3)
    assert [m.gamma.item() != 0 for m in inserted_layers(learn.model).values()] == [True]
    learn.remove_attention()
    assert list(learn.model.state_dict()) == keys
