"`learn.plot_gamma`, `learn.show_attention` and the names that `all` gives: what is drawn is what the model saw, and the model stays as it was"
import importlib
import pkgutil
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import named
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import FuncSplitter, Normalize, get_image_files
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Brightness, Flip, Resize
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import Learner
from PIL import Image
from torch import nn
from torch.nn import functional as F

import fastai_selfattn as package
import fastai_selfattn.all as everything
from fastai_selfattn import learner as learner_module
from fastai_selfattn.seeing.effect import change_in_words
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.map_logger import AttentionMapLogger
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.seeing.pictures import pictures as shown
from fastai_selfattn.seeing.record import AttentionRecorder
from fastai_selfattn.attention.kinds import attention_layers
from fastai_selfattn.walls.rooms import make_rooms
from fastai_selfattn.walls.data import open_mask

SIZE, POINTS = (30, 42), [(0, 41), (29, 0), (13, 31), (7, 7)]

@pytest.fixture(scope='module')
def rooms(tmp_path_factory): return make_rooms(tmp_path_factory.mktemp('learner') / 'rooms', 7, SIZE)

def mask_of(f): return open_mask(f.parent.parent / 'masks' / f.name)
def pictures(path): return sorted(get_image_files(path / 'images'))
def held_out(f): return f.stem >= 'room_0004'

class Net(nn.Module):
    "Attention on maps of a half and of a sixth of the image's side"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), SelfAttention(16), nn.MaxPool2d(3), nn.Dropout(.5), SelfAttention(16))
        self.head = nn.Conv2d(16, 2, 1)
        for m, gamma in zip(attention_layers(self).values(), (.7, -.2)): nn.init.constant_(m.gamma, gamma)
    def forward(self, x): return F.interpolate(self.head(self.body(x)), x.shape[2:])

def make(rooms, *cbs, batch_tfms=None, size=None):
    set_seed(8)
    tfms = [Flip(p=.5), Brightness(.5, p=1.), Normalize.from_stats(*imagenet_stats)] if batch_tfms is None else batch_tfms
    block = DataBlock((ImageBlock, MaskBlock(['other', 'wall'])), get_items=pictures, get_y=mask_of, splitter=FuncSplitter(held_out),
                      item_tfms=Resize(size, method='squish') if size else None, batch_tfms=tfms)
    return Learner(block.dataloaders(rooms, bs=2, num_workers=0), Net(), loss_func=nn.CrossEntropyLoss(), cbs=list(cbs), path=rooms)

def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2)
    return learn

def pixels(f, size=None):
    with Image.open(f) as im: return np.asarray(im.convert('RGB').resize(size[::-1]) if size else im.convert('RGB'), dtype=np.float32) / 255

def maps(axs): return [[np.asarray(ax.images[-1].get_array()) for ax in row[1:]] for row in axs]

def modes(learn): return [m.training for m in learn.model.modules()]

def hooks(model): return {(name, k): list(v) for name, m in model.named_modules() for k, v in vars(m).items() if 'hook' in k and v}


# --- plot_gamma

def test_plot_gamma_draws_the_history(rooms):
    learn = fit(make(rooms, GammaLogger()), 2)
    ax = plt.figure().gca()
    before = plt.get_fignums()
    assert learn.plot_gamma(ax) is ax and plt.get_fignums() == before
    history = learn.gamma_logger.history
    assert [line.get_label() for line in ax.lines[1:]] == ['gamma_2', 'gamma_5']
    for line in ax.lines[1:]: np.testing.assert_array_equal(line.get_xydata(), history[['step', line.get_label()]])
    assert learn.plot_gamma() is not ax and len(plt.get_fignums()) == len(before) + 1     # other tests may have left some open


def test_plot_gamma_without_logger_or_training(rooms):
    learn = make(rooms)
    with pytest.raises(ValueError, match=r'no `GammaLogger`: make it with `cbs=GammaLogger\(\)`'): learn.plot_gamma()
    learn.add_cb(GammaLogger())
    with pytest.raises(ValueError, match='`history` must have rows'): learn.plot_gamma()
    assert not plt.get_fignums()
    assert len(fit(learn).plot_gamma().lines) == 3
    learn.remove_cb(GammaLogger)
    with pytest.raises(ValueError, match='no `GammaLogger`'): learn.plot_gamma()


# --- show_attention

@pytest.mark.parametrize('n,points', [(3, POINTS), (2, POINTS[:1]), (1, None)], ids=named)
def test_maps_are_those_of_a_recorder_on_the_same_batch(rooms, n, points):
    learn = fit(make(rooms))
    axs = learn.show_attention(max_n=n, points=points)
    placed = points or [(7, 10), (15, 21), (22, 31)]
    assert axs.shape == (2 * n, len(placed) + 1) and len(plt.get_fignums()) == 1
    x = torch.stack([torch.tensor(pixels(f)).permute(2, 0, 1) for f in learn.dls.valid_ds.items[:n]])
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in imagenet_stats)
    with torch.no_grad(), AttentionRecorder(learn.model.eval(), placed) as rec: learn.model((x - mean) / std)
    rows = [(i, name) for i in range(n) for name in ('body.2', 'body.5')]
    for row, (i, name) in zip(axs, rows):
        want = rec.maps[name]
        said = ' '.join(' '.join(t.get_text() for t in row[0].texts).split())
        assert f'{name}, gamma {rec.gammas[name]:.3g}, {change_in_words(rec.changes[name][i].item())}' in said
        assert len({ax.images[-1].get_clim() for ax in row[1:]}) == 1      # one scale for each picture in a layer
        assert [ax.get_title().partition('pixel')[2] for ax in row[1:]] == [f' {p}' for p in placed]
        for ax, point, amap in zip(row[1:], placed, want[i]):
            np.testing.assert_allclose(ax.images[-1].get_array(), amap * amap.numel(), rtol=1e-3, atol=1e-4)
            assert ax.lines[-1].get_xydata().tolist() == [list(point[::-1])]
    if len(placed) > 1: assert len({row[1].images[-1].get_clim() for row in axs}) > 1


@pytest.mark.parametrize('tfms', [None, [], [Normalize.from_stats(*imagenet_stats)]], ids=['augmented', 'plain', 'normalised'])
@pytest.mark.parametrize('size', [None, (18, 24)], ids=named)
def test_the_picture_shown_is_that_of_the_file(rooms, tfms, size):
    learn = make(rooms, batch_tfms=tfms, size=size)
    files = learn.dls.train_ds.items[1:3]
    axs = learn.show_attention(files, points=[(3, 5)])
    for row, f in zip(axs, [f for f in files for _ in range(2)]):
        shown, below = (np.asarray(ax.images[0].get_array()) for ax in row)
        assert shown.shape == (*(size or SIZE), 3)
        np.testing.assert_allclose(below, shown.mean(-1), atol=1e-5)
        if size: want = np.asarray(PILImage.create(f).resize(size[::-1], resample=Image.Resampling.BILINEAR), dtype=np.float32) / 255
        else: want = pixels(f)
        np.testing.assert_allclose(shown, want, atol=1.5 / 255)


@pytest.mark.parametrize('given', [lambda fs: fs, lambda fs: [str(f) for f in fs], lambda fs: tuple(fs), lambda fs: [PILImage.create(f) for f in fs], lambda fs: np.array(fs, dtype=object)],
                         ids=['paths', 'strings', 'tuple', 'pictures', 'array'])
def test_ways_to_give_pictures(rooms, given):
    learn = make(rooms)
    files = list(learn.dls.valid_ds.items[:2])
    for a, b in zip(maps(learn.show_attention(given(files), points=POINTS)), maps(learn.show_attention(max_n=2, points=POINTS))): np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('points', [torch.tensor(POINTS), [np.array(p).tolist() for p in POINTS], [tuple(np.array(p)) for p in POINTS]], ids=['tensor', 'lists', 'numpy'])
def test_ways_to_give_points(rooms, points):
    axs = make(rooms).show_attention(max_n=1, points=points)
    assert [ax.get_title() for ax in axs[0, 1:]] == [f'{i}: pixel {p}' for i, p in enumerate(POINTS)]


def test_the_same_whatever_the_random_state_and_mode(rooms):
    learn = fit(make(rooms))
    drawn = []
    for seed, train in ((1, True), (2, False), (3, True)):
        set_seed(seed)
        learn.model.train(train)
        drawn.append(maps(learn.show_attention(max_n=2, points=POINTS)))
    for other in drawn[1:]:
        for a, b in zip(drawn[0], other): np.testing.assert_array_equal(a, b)


def off_image(learn): learn.show_attention(points=[(0, 42)])
def no_points(learn): learn.show_attention(points=[])
def works(learn): learn.show_attention(max_n=1)
def missing_file(learn): learn.show_attention(['missing.png'])
def fails_in_forward(learn):
    learn.model.head = nn.Conv2d(5, 2, 1)
    learn.show_attention(max_n=1)

@pytest.mark.parametrize('act,error', [(works, None), (off_image, ValueError), (no_points, ValueError), (missing_file, FileNotFoundError), (fails_in_forward, RuntimeError)])
@pytest.mark.parametrize('trained', [True, False])
def test_the_model_stays_as_it_was(rooms, act, error, trained):
    learn = fit(make(rooms)) if trained else make(rooms)
    learn.model.train()
    learn.model.body[1].eval(), learn.model.body[4].eval(), learn.model.body[2].query.eval()      # as if frozen
    learn.model.head.weight.requires_grad_(False)
    learn.model.state_dict()
    before, mode, hooked = {k: v.clone() for k, v in learn.model.state_dict().items()}, modes(learn), hooks(learn.model)
    if error:
        with pytest.raises(error): act(learn)
        assert not plt.get_fignums()
    else: act(learn)
    assert modes(learn) == mode and len(set(mode)) == 2 and hooks(learn.model) == hooked and torch.is_grad_enabled()
    if act is not fails_in_forward:
        for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
        assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def test_points_off_the_picture_are_named_with_its_size(rooms):
    with pytest.raises(ValueError, match=r'point \(18, 0\) is not on the image of 18x24 pixels'): make(rooms, size=(18, 24)).show_attention(points=[(18, 0)])
    with pytest.raises(ValueError, match='whole image pixels, got 3'): make(rooms).show_attention(points=(3, 4))


def test_no_pictures_and_no_attention(rooms):
    learn = make(rooms)
    for kwargs in (dict(items=[]), dict(max_n=0)):
        with pytest.raises(ValueError, match='no pictures to show'): learn.show_attention(**kwargs)
    learn.model = nn.Conv2d(3, 2, 1)
    with pytest.raises(ValueError, match='no attention layer in this Conv2d'): learn.show_attention()
    assert not plt.get_fignums()


def test_after_export_on_files(rooms, tmp_path):
    learn = fit(make(rooms, GammaLogger()))
    files, learn.path = list(learn.dls.valid_ds.items), tmp_path
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    for a, b in zip(maps(loaded.show_attention(files, POINTS)), maps(learn.show_attention(files, POINTS))): np.testing.assert_array_equal(a, b)
    assert [line.get_xydata().tolist() for line in loaded.plot_gamma().lines[1:]] == [line.get_xydata().tolist() for line in learn.plot_gamma().lines[1:]]
    with pytest.raises(ValueError, match='no pictures to show'): loaded.show_attention()


def test_a_classifier_and_one_picture(rooms):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=pictures, get_y=lambda f: int(f.stem[-1]) % 2, splitter=FuncSplitter(held_out))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), SelfAttention(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    axs = Learner(block.dataloaders(rooms, bs=2, num_workers=0), model, loss_func=nn.CrossEntropyLoss()).show_attention(max_n=1, imsize=1.5)
    assert axs.shape == (1, 4) and 'layer 1, gamma 0' in ' '.join(t.get_text() for t in axs[0, 0].texts) and axs[0, 1].images[-1].get_array().shape == (15, 21)


# --- the names of `all`

# What functions in `all` give: documented where they are made, and never called by a user
GIVEN = {'AttentionEffect', 'AttentionStats', 'AttentionStatus', 'Deployed', 'Explorer', 'Place', 'Ran', 'ReceptiveField', 'Site', 'Sites', 'Turned', 'Upgrade'}
WINGS = [m.name for m in pkgutil.walk_packages(package.__path__, 'fastai_selfattn.') if re.search(r'\.(attention|placement|seeing|compare|export|large|quiet)\b', m.name)]

@pytest.mark.parametrize('module', WINGS)
def test_every_public_name_is_in_all(module):
    "Outside of the applications, what `__all__` lists is for users"
    public = importlib.import_module(module)
    for name in getattr(public, '__all__', []):
        assert (name in everything.__all__) != (name in GIVEN), name
        if name in everything.__all__: assert getattr(everything, name) is getattr(public, name)

def test_all_lists_nothing_else():
    lists = [set(getattr(importlib.import_module(m), '__all__', [])) for m in WINGS]
    assert set(everything.__all__) <= set().union(*lists)


def test_star_imports_after_fastai_give_ours():
    space = {}
    exec('from fastai.vision.all import *', space)
    theirs = set(space)
    replaced = {n: space[n] for n in everything.__all__ if n in space}
    exec('from fastai_selfattn.all import *', space)
    assert set(replaced) == {'unet_learner', 'create_unet_model', 'SelfAttention', 'PooledSelfAttention2d', 'SimpleSelfAttention'} and len(set(everything.__all__)) == len(everything.__all__)
    assert set(space) - theirs == set(everything.__all__) - set(replaced)
    for name in everything.__all__: assert space[name].__module__.startswith('fastai_selfattn.') and space[name] is not replaced.get(name)


def test_learner_gets_its_methods():
    assert Learner.plot_gamma.__module__ == Learner.show_attention.__module__ == learner_module.__name__
    assert everything.plot_gamma is not Learner.plot_gamma


# --- show_receptive_field, plot_attention_stats

def test_receptive_field_is_that_of_the_pictures(rooms):
    learn = fit(make(rooms))
    learn.model.train()
    before, mode = {k: v.clone() for k, v in learn.model.state_dict().items()}, modes(learn)
    axs = learn.show_receptive_field(max_n=2, point=(13, 31))
    assert axs.shape == (2,) and modes(learn) == mode and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    field = receptive_field(learn.model, shown(learn, max_n=2).x, (13, 31))
    for ax, area in zip(axs, (field.area_off, field.area_on)):
        assert f'{100 * area:.2g} %' in ax.get_title() or f'{100 * area:.0f} %' in ax.get_title()
        assert ax.lines[-1].get_xydata().tolist() == [[31, 13]]
    with pytest.raises(ValueError, match=r'point \(30, 0\) is not on the image of 30x42 pixels'): learn.show_receptive_field(point=(30, 0))


def test_attention_stats_are_those_of_the_logger(rooms):
    learn = make(rooms, logger := AttentionMapLogger(max_n=2))
    with pytest.raises(ValueError, match='no epochs|must have'): learn.plot_attention_stats()
    axs = fit(learn, 2).plot_attention_stats()
    for ax, column in zip(axs, ('entropy_share', 'distance')):
        for line, (name, want) in zip([l for l in ax.lines if len(l.get_xdata()) == 3], logger.stats.groupby('layer')): np.testing.assert_allclose(line.get_ydata(), want.groupby('epoch')[column].mean())
    with pytest.raises(ValueError, match='no `AttentionMapLogger`'): make(rooms).plot_attention_stats()


def test_plot_gamma_draws_what_is_asked_for(rooms):
    learn = fit(make(rooms, GammaLogger()), 2)
    for what in ('grad', 'change'):
        lines = [l for l in learn.plot_gamma(what=what).lines if len(l.get_xdata()) > 2]
        assert len(lines) == 2
        for line, name in zip(lines, ('2', '5')): np.testing.assert_array_equal(line.get_ydata(), learn.gamma_logger.history[f'{what}_{name}'].dropna())


def test_layers_scale_and_axes_go_to_the_drawing(rooms):
    learn = fit(make(rooms))
    axs = learn.show_attention(max_n=2, points=POINTS[:2], layers='body.5')
    assert axs.shape == (2, 3)
    assert {ax.images[-1].get_clim() for row in learn.show_attention(max_n=2, points=POINTS, scale=7.)[:, 1:] for ax in row} == {(0, 7)}
    ax = plt.figure().gca()
    before = plt.get_fignums()
    learn.show_attention(max_n=1, points='center', layers='body.5', ax=ax)
    assert plt.get_fignums() == before and ax.lines[-1].get_xydata().tolist() == [[21, 15]]
