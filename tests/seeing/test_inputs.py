"What models and data look like as people bring them: pairs, dicts, tables beside pictures, half precision, sizes that differ, data sets of PyTorch"
import re
import sys
import warnings
from collections import namedtuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, DiceLoss
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchLoader, Dataset, IterableDataset
from watched import close, hooks, with_gamma

import fastai_selfattn.learner  # noqa: F401  the methods of a Learner
from fastai_selfattn.attention.kinds import attention_off
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.placement.insert import insert_attention
from fastai_selfattn.placement.sites import attention_sites
from fastai_selfattn.quiet import each_tensor, for_model, picture_tensors, rows, tensors
from fastai_selfattn.seeing.explorer import _data, attention_explorer
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.interpret import AttentionInterpretation
from fastai_selfattn.seeing.map_logger import AttentionMapLogger
from fastai_selfattn.seeing.pictures import pictures
from fastai_selfattn.seeing.record import AttentionRecorder

def picture(seed, h=20, w=28): return torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))
def target(seed, h=20, w=28): return torch.randint(0, 2, (h, w), generator=torch.Generator().manual_seed(seed))

class Encoder(nn.Sequential):
    "Sharp maps, which differ by picture"
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), with_gamma(SelfAttention(8)))
        nn.init.constant_(self[0].weight[:, 0], .5)
        self[0].weight.data *= 8

class Two(nn.Module):
    def __init__(self): super().__init__(); self.encoder, self.head = Encoder(), nn.Conv2d(16, 2, 1)
    def both(self, a, b): return self.encoder(a), self.encoder(b)
    def forward(self, a, b): return F.interpolate(self.head(torch.cat(self.both(a, b), 1)), a.shape[2:])
class InOneBatch(Two):
    def both(self, a, b): return self.encoder(torch.cat([a, b])).chunk(2)
class Pair(Two):
    def forward(self, ab): return super().forward(*ab)
class FromDict(Two):
    def forward(self, d): return super().forward(d['left'], d['right'])
class WithTable(Two):
    def both(self, a, b): y = self.encoder(a); return y, y * b.mean()
    def forward(self, table, a): return F.interpolate(self.head(torch.cat(self.both(a, table), 1)), a.shape[2:])

def fastais(data, bs): return DataLoaders(DataLoader(data, bs=bs, shuffle=True), DataLoader(data, bs=bs))
def torchs(data, bs): return DataLoaders(TorchLoader(data, bs, shuffle=True), TorchLoader(data, bs))

def learner(model, data, bs=2, loaders=fastais, n_inp=None, loss=None, cbs=()):
    torch.manual_seed(2)
    dls = loaders(data, bs)
    if n_inp: dls.n_inp = n_inp
    return Learner(dls, model(), loss_func=loss or CrossEntropyLossFlat(axis=1), cbs=list(cbs))

lefts, rights, targets = [picture(i) for i in range(5)], [picture(9 + i) for i in range(5)], [target(i) for i in range(5)]
KINDS = {'two inputs': (Two, lambda a, b, y: (a, b, y), 2), 'one batch': (InOneBatch, lambda a, b, y: (a, b, y), 2), 'pair': (Pair, lambda a, b, y: ((a, b), y), None),
         'dict': (FromDict, lambda a, b, y: (dict(left=a, right=b), y), None)}

@pytest.fixture(params=[(k, l) for k in KINDS for l in (fastais, torchs)], ids=lambda p: f'{p[0]}, {p[1].__name__}')
def of_pairs(request):
    (model, example, n_inp), loaders = KINDS[request.param[0]], request.param[1]
    return learner(model, list(map(example, lefts, rights, targets)), loaders=loaders, n_inp=n_inp)

def own_map(encoder, x, points=((3, 20),)):
    with torch.no_grad(), AttentionRecorder(encoder.eval(), list(points)) as rec: encoder(x)
    return rec

@pytest.mark.parametrize('which', [0, 1])
def test_every_tool_shows_the_picture_that_was_chosen_of_a_pair(of_pairs, which, tmp_path):
    learn, shown = of_pairs, torch.stack((lefts, rights)[which][:2])
    want = own_map(learn.model.encoder, shown)
    assert not torch.allclose(want.maps['2'], own_map(learn.model.encoder, torch.stack((rights, lefts)[which][:2])).maps['2'], atol=1e-3)   # they can be told apart
    p = pictures(learn, max_n=2, which=which)
    assert torch.equal(p.x, shown) and torch.equal(p.images, shown)
    with torch.no_grad(), AttentionRecorder(learn.model.eval(), [(3, 20)], which=which) as rec: p.through(learn.model)
    close(rec.maps['encoder.2'], want.maps['2'], rtol=1e-4, atol=1e-6)
    close(rec.stats['encoder.2'].distance, want.stats['2'].distance, rtol=1e-4, atol=1e-4)
    axs = learn.show_attention(points=[(3, 20)], max_n=2, which=which)
    for i in range(2): close(torch.as_tensor(np.asarray(axs[i, 1].images[-1].get_array())), want.maps['2'][i, 0] * 140, rtol=1e-4, atol=1e-5)
    page = _data(attention_explorer(learn, fname=tmp_path/'a.html', which=which, max_n=2).path.read_text())
    close(torch.tensor(page['models'][0]['layers'][0]['changes']), want.changes['2'], rtol=1e-4, atol=1e-6)
    logger = AttentionMapLogger(points=[(3, 20)], max_n=2, which=which)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., wd=0., cbs=logger)
    close(logger.maps()[3][0], want.maps['2'], rtol=1e-4, atol=1e-6)


def test_a_pair_is_shown_in_other_tools_too(of_pairs):
    learn = of_pairs
    assert (10, 14) in [s.map for s in learn.attention_sites()]
    interp = AttentionInterpretation.from_learner(learn, which=1)
    want = own_map(learn.model.encoder, torch.stack(rights))
    close(torch.tensor(interp.df.distance), want.stats['2'].distance.flatten(1).mean(1).double(), rtol=1e-4, atol=1e-4)
    assert interp.plot_top(k=2).shape == (2, 2)
    assert learn.show_receptive_field(which=1).shape == (2,)
    assert len(learn.attention_effect().rows) == 3


def test_the_receptive_field_is_that_of_the_chosen_picture():
    "The second picture goes through no layer that looks around, so it has one pixel"
    class Uneven(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), with_gamma(SelfAttention(8)), nn.Conv2d(8, 1, 1)), nn.Conv2d(3, 1, 1)
        def forward(self, a, b): return self.a(a) + self.b(b)
    model, x = Uneven(), (torch.rand(2, 3, 12, 17), torch.rand(2, 3, 12, 17))
    assert receptive_field(model, x, which=1).area_on == 1 / 204 < receptive_field(model, x).area_on
    with pytest.raises(ValueError, match='`which` must be below 2, the number of images in `x`, got 2'): receptive_field(model, x, which=2)


def test_a_picture_beside_a_table(tmp_path):
    learn = learner(WithTable, [(torch.rand(4), a, y) for a, y in zip(lefts, targets)], n_inp=2)
    p = pictures(learn, max_n=2)
    assert torch.equal(p.x, torch.stack(lefts[:2]))
    assert learn.show_attention().shape == (2, 4) and len(_data(attention_explorer(learn, fname=tmp_path/'a.html').path.read_text())['pictures']) == 2
    assert 'image 3x20x28 (one image of the data)' in learn.attention_sites().title
    with pytest.raises(ValueError, match='`which` must be below 1, the number of pictures in an input, got 1'): pictures(learn, which=1)


def test_inputs_may_be_given_as_the_model_takes_them():
    learn = learner(Two, list(zip(lefts, rights, targets)), n_inp=2)
    given = torch.stack(rights[:2]), torch.stack(lefts[:2])
    p = pictures(learn, given, which=1)
    assert torch.equal(p.x, given[1]) and torch.equal(p.batches[0][0], given[0]) and p.names == ['picture 0', 'picture 1']
    assert learn.show_attention(given).shape == (2, 4)
    pairs = learner(FromDict, [(dict(left=a, right=b), y) for a, b, y in zip(lefts, rights, targets)])
    assert torch.equal(pictures(pairs, dict(left=given[0], right=given[1])).x, given[0])


def test_nested_batches_are_moved_and_cut_with_their_classes():
    Named = namedtuple('Named', 'a b')
    class Own(dict): pass
    batch = Named([torch.zeros(5, 3, 8, 6), 'text'], Own(t=torch.arange(5), grid=torch.zeros(48, 2), none=None))
    got = rows(batch, slice(1, 3))
    assert type(got) is Named and type(got.b) is Own and got.a[1] == 'text' and got.b['none'] is None
    assert got.a[0].shape == (2, 3, 8, 6) and got.b['t'].tolist() == [1, 2] and got.b['grid'].shape == (48, 2)      # the grid is no row a picture
    assert len(batch.a[0]) == 5 and len(list(tensors(batch))) == 3 and picture_tensors(batch)[0] is batch.a[0]
    moved = for_model(nn.Conv2d(3, 4, 1).double(), batch)
    assert moved.a[0].dtype == torch.float64 and moved.b['t'].dtype == torch.int64 and batch.a[0].dtype == torch.float32
    assert each_tensor(lambda t: 1, batch) == Named([1, 'text'], dict(t=1, grid=1, none=None))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('given', ['data', 'batch'])
def test_places_in_models_of_several_pictures(kind, given):
    model, example, n_inp = KINDS[kind]
    learn = learner(model, list(map(example, lefts, rights, targets)), n_inp=n_inp)
    size = None if given == 'data' else learn.dls.one_batch()
    sites = attention_sites(learn, size)
    assert 'image 3x20x28' in sites.title
    path, = insert_attention(learn, 'encoder.0', size=size)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.model.get_submodule(path).gamma.item() != 0


def test_a_layer_that_the_optimizer_does_not_know_is_named(tmp_path):
    learn = learner(Pair, [((a, b), y) for a, b, y in zip(lefts, rights, targets)], cbs=[GammaLogger()])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        path, = insert_attention(learn.model.encoder, '0', size=20)
        with pytest.warns(UserWarning, match=f'not trained: {re.escape("encoder." + path)}, as the optimizer.*`learn.create_opt'): learn.fit(1)
        learn.create_opt()
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            learn.fit(1)
    assert learn.model.encoder.get_submodule(path).gamma.item() != 0


# precision

def plain(): return nn.Sequential(Encoder(), nn.Conv2d(8, 2, 1), nn.Upsample(scale_factor=2))

@pytest.mark.parametrize('dtype,tol', [(torch.float16, 2e-2), (torch.bfloat16, 1.5e-1), (torch.float64, 1e-5)], ids=str)
def test_models_in_their_own_precision(dtype, tol, tmp_path):
    learn = learner(plain, list(zip(lefts, targets)))
    want = own_map(learn.model[0], torch.stack(lefts[:2]))
    losses = AttentionInterpretation.from_learner(learn).df.loss
    field = receptive_field(learn.model, torch.stack(lefts[:2]))
    learn.model.to(dtype)
    axs = learn.show_attention(points=[(3, 20)], max_n=2)
    for i in range(2): close(torch.as_tensor(np.asarray(axs[i, 1].images[-1].get_array())).float(), want.maps['2'][i, 0] * 140, rtol=10 * tol, atol=10 * tol)
    page = _data(attention_explorer(learn, fname=tmp_path/'a.html', others={'other': plain()}, max_n=2).path.read_text())
    close(torch.tensor(page['models'][0]['layers'][0]['changes']), want.changes['2'], rtol=tol, atol=tol)
    close(receptive_field(learn.model, torch.stack(lefts[:2])).on, field.on, rtol=0, atol=tol)
    assert AttentionInterpretation.from_learner(learn).df.loss.to_numpy() == pytest.approx(losses.to_numpy(), abs=tol)
    assert len(learn.attention_sites()) and len(learn.attention_effect().rows) == 3
    assert next(learn.model.parameters()).dtype == dtype


def test_a_model_that_is_half_during_training_only(tmp_path):
    "A logger's pictures follow the precision that the model has when they are looked at"
    learn = learner(plain, list(zip([x.half() for x in lefts], targets)), loss=lambda pred, targ: F.cross_entropy(pred.float(), targ))
    logger = AttentionMapLogger(points=[(3, 20)], max_n=2)
    learn.model.half()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., wd=0., cbs=logger)
    close(logger.maps()[3][0], own_map(learn.model[0].float(), torch.stack(lefts[:2])).maps['2'], rtol=2e-2, atol=1e-3)


# pictures of different sizes

SIDES = (20, 28), (24, 18), (30, 22), (20, 28)
uneven = [(picture(i, *s), target(i, *s)) for i, s in enumerate(SIDES)]

@pytest.mark.parametrize('loaders', [fastais, torchs])
def test_pictures_of_different_sizes_go_one_by_one(loaders, tmp_path):
    learn = learner(plain, uneven, bs=1, loaders=loaders)
    p = pictures(learn, max_n=4)
    assert [x.shape[-2:] for x in p.x] == list(SIDES) and all(torch.equal(x[0], t) and torch.equal(im, t) for x, im, (t, _) in zip(p.x, p.images, uneven))
    want = [own_map(learn.model[0], x[None], [(h//2, w//2)]) for (x, _), (h, w) in zip(uneven, SIDES)]
    axs = learn.show_attention(points='center', max_n=3)
    assert axs.shape == (3, 2)
    for ax, rec in zip(axs[:, 1], want): close(torch.as_tensor(np.asarray(ax.images[-1].get_array())), rec.maps['2'][0, 0] * rec.maps['2'].numel(), rtol=1e-4, atol=1e-5)
    page = _data(attention_explorer(learn, fname=tmp_path/'a.html', max_n=3).path.read_text())
    layer = page['models'][0]['layers'][0]
    assert [(v['h'], v['w']) for v in page['pictures']] == list(SIDES[:3]) and [v['of'] for v in layer['pictures']] == [dict(map=[h//2, w//2], keys=[h//2, w//2]) for h, w in SIDES[:3]]
    close(torch.tensor(layer['changes']), torch.cat([r.changes['2'] for r in want[:3]]), rtol=1e-4, atol=1e-6)
    logger = AttentionMapLogger(max_n=3, path=tmp_path/'maps')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., wd=0., cbs=logger)
    for m, rec in zip(logger.maps()[3], want): close(m[0], rec.maps['2'][0], rtol=1e-4, atol=1e-6)
    close(torch.tensor(logger.stats.distance[:3]), torch.stack([r.stats['2'].distance.mean() for r in want[:3]]).double(), rtol=1e-4, atol=1e-4)
    assert len(list((tmp_path/'maps').iterdir())) == 2*3 + 1 + 2*3 and logger.show_growth(picture=1).shape == (2,)
    assert learn.show_receptive_field().shape == (2,)
    interp = AttentionInterpretation.from_learner(learn)
    close(torch.tensor(interp.df.distance), torch.stack([r.stats['2'].distance.mean() for r in want]).double(), rtol=1e-4, atol=1e-4)
    axs = interp.plot_top(k=3)
    sides = [SIDES[i] for i in interp.top(k=3).picture]
    assert [ax.images[0].get_array().shape[:2] for ax in axs[:, 0]] == sides and all(ax.get_aspect() == 1 for ax in axs.flat)
    assert repr(pictures(learn, max_n=2)).startswith('Pictures, 2 of 3x') and 'in 2 passes: picture 0, picture 1' in repr(pictures(learn, max_n=2))


def test_axes_for_pictures_of_different_sizes():
    learn = learner(plain, uneven, bs=1)
    axs = plt.figure().subplots(2, 2)
    assert (learn.show_attention(points='center', max_n=2, ax=axs) == axs).all() and axs[1, 1].images[-1].get_array().shape == (12, 9)
    with pytest.raises(ValueError, match='one `ax` holds one map, and there are 2 pictures'): learn.show_attention(points='center', max_n=2, ax=plt.figure().subplots())


def test_given_pictures_of_different_sizes_too():
    "Though the loader makes larger batches, as of a Learner trained on pictures of one size"
    learn = learner(plain, list(zip(lefts, targets)), bs=2)
    p = pictures(learn, [uneven[1], uneven[2]])
    assert [x.shape[-2:] for x in p.x] == list(SIDES[1:3]) and len(p.parts()) == 2


# data sets of PyTorch

class Own(Dataset):
    def __init__(self, items): self.items = items
    def __len__(self): return 5
    def __getitem__(self, i): return lefts[i], targets[i]

@pytest.mark.parametrize('items', [[f'{i}.png' for i in range(5)], list(range(5)), {i: 'a' for i in range(5)}, lambda: 1, 'abcde', torch.arange(5)], ids=['files', 'numbers', 'dict', 'method', 'text', 'tensor'])
@pytest.mark.parametrize('loaders', [fastais, torchs])
def test_what_a_data_set_calls_items_is_its_own_affair(items, loaders):
    learn = learner(plain, Own(items), loaders=loaders)
    p = pictures(learn, max_n=2)
    assert torch.equal(p.x, torch.stack(lefts[:2])) and p.names == ['picture 0', 'picture 1']
    df = AttentionInterpretation.from_learner(learn).df
    assert df.picture.tolist() == [0, 1, 2, 3, 4]
    with torch.no_grad(): want = [F.cross_entropy(learn.model.eval()(a[None]), t[None]).item() for a, t in zip(lefts, targets)]
    assert df.loss.tolist() == pytest.approx(want, rel=1e-4)


def test_a_loader_of_pytorch_in_any_order_is_gone_through_in_order():
    learn = learner(plain, Own(()), loaders=torchs)
    want = AttentionInterpretation.from_learner(learn).df
    for dl in (TorchLoader(Own(()), 3, shuffle=True, drop_last=True), TorchLoader(Own(()), batch_sampler=[[4, 1], [0], [3, 2]])):
        torch.testing.assert_close(torch.tensor(AttentionInterpretation.from_learner(learn, dl=dl).df.loss), torch.tensor(want.loss), rtol=1e-5, atol=1e-6)
    interp = AttentionInterpretation.from_learner(learn, dl=TorchLoader(Own(()), 3, shuffle=True))
    left = interp.plot_top(k=1)[0, 0].images[-1].get_array()
    close(torch.as_tensor(np.asarray(left)).permute(2, 0, 1).float(), lefts[interp.top(k=1).picture.iloc[0]])
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(lefts, targets))
    with pytest.raises(TypeError, match='is a stream'): AttentionInterpretation.from_learner(learn, dl=TorchLoader(Stream(), 2))
    with pytest.raises(TypeError, match='`dl` must be a DataLoader'): AttentionInterpretation.from_learner(learn, dl=[1])
    with pytest.raises(ValueError, match='have no labels'): AttentionInterpretation.from_learner(learn, dl=TorchLoader(lefts, 2))


# 1d, 3d, and losses

@pytest.mark.parametrize('nd,size', [(1, (24,)), (3, (6, 8, 10))])
def test_interpretation_of_signals_and_volumes(nd, size):
    conv, pool = ((nn.Conv1d, nn.AdaptiveAvgPool1d), None, (nn.Conv3d, nn.AdaptiveAvgPool3d))[nd - 1]
    xs = [torch.rand(2, *size, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    model = lambda: nn.Sequential(conv(2, 8, 3, padding=1), with_gamma(SelfAttention(8)), pool(1), nn.Flatten(), nn.Linear(8, 2))
    learn = learner(model, [(x, i % 2) for i, x in enumerate(xs)], loss=CrossEntropyLossFlat())
    interp = AttentionInterpretation.from_learner(learn)
    with torch.no_grad(), AttentionRecorder(learn.model.eval(), None) as rec: learn.model(torch.stack(xs))
    distance = rec.stats['1'].distance
    assert interp.df.distance.tolist() == pytest.approx(distance.flatten(1).mean(1).tolist(), rel=1e-4)
    for i, (cell, cells) in enumerate(zip(interp.df.farthest, interp.df.cells)):
        assert cells == size and len(cell) == nd and distance[i][cell] == pytest.approx(distance[i].max().item(), rel=1e-4)
    with pytest.raises(ValueError, match=f'has maps of {nd} dimension.*only 2d ones can be drawn'): interp.plot_top()
    assert not plt.get_fignums()


class Combined:
    "As fastai's documentation builds it: no `reduction`"
    def __init__(self): self.cross_entropy, self.dice = CrossEntropyLossFlat(axis=1), DiceLoss(axis=1)
    def __call__(self, pred, targ): return self.cross_entropy(pred, targ) + self.dice(pred, targ)
class Deaf(Combined):
    reduction = 'mean'       # and does not listen
def no_reduction(pred, targ): return F.cross_entropy(pred, targ)

@pytest.mark.parametrize('loss', [Combined(), Deaf(), no_reduction, F.cross_entropy, nn.CrossEntropyLoss(), CrossEntropyLossFlat(axis=1)], ids=['combined', 'deaf', 'function', 'F', 'nn', 'fastai'])
@pytest.mark.parametrize('bs', [2, 5])
def test_any_loss_is_that_of_each_picture(loss, bs):
    learn = learner(plain, list(zip(lefts, targets)), loss=loss, bs=bs)
    df = AttentionInterpretation.from_learner(learn).df
    model = learn.model.eval()
    with torch.no_grad():
        on = [loss(model(a[None]), t[None]).item() for a, t in zip(lefts, targets)]
        with attention_off(model): off = [loss(model(a[None]), t[None]).item() for a, t in zip(lefts, targets)]
    assert df.loss.tolist() == pytest.approx(on, rel=1e-4) and df.loss_off.tolist() == pytest.approx(off, rel=1e-4) and len({*df.loss}) == 5


# files that are whole or as before

class Full(OSError): pass

@pytest.fixture
def logged(tmp_path):
    learn = learner(plain, list(zip(lefts, targets)))
    logger = AttentionMapLogger(points=[(3, 20)], max_n=2, path=tmp_path/'maps')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=logger)
    return learn, logger

@pytest.mark.parametrize('error', [Full, KeyboardInterrupt])
def test_an_old_gif_stays_when_the_new_one_breaks_off(logged, tmp_path, monkeypatch, error):
    old, save = tmp_path/'old.gif', Image.Image.save
    logged[1].save_gif(old)
    before = old.read_bytes()
    def half(self, fname, *args, **kwargs):
        save(self, fname, *args, **kwargs)
        with open(fname, 'r+b') as f: f.truncate(4)
        raise error
    monkeypatch.setattr(Image.Image, 'save', half)
    with pytest.raises(error): logged[1].save_gif(old)
    assert old.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {'old.gif', 'maps'}
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere to write a.gif into'): logged[1].save_gif(tmp_path/'nowhere'/'a.gif')
    logged[1].save_gif(old, point=0, picture=1)
    assert old.read_bytes() != before


def test_the_index_keeps_its_rows_when_a_write_breaks_off(logged, monkeypatch):
    import pandas as pd
    learn, logger = logged
    before = (logger.path/'index.csv').read_text()
    def half(self, fname, **kwargs):
        open(fname, 'w').write('fi')
        raise Full('no space left')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', half)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='cannot write to `path`, training goes on'): learn.fit(1, cbs=logger)
    assert (logger.path/'index.csv').read_text() == before and not list(logger.path.glob('.*'))
    monkeypatch.undo()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=logger)
    assert pd.read_csv(logger.path/'index.csv').epoch.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]      # the rows of the write that failed too


def test_each_growth_picture_for_itself(logged, tmp_path, monkeypatch):
    learn, logger = logged
    save, failed = Image.Image.save, []
    def first_fails(self, fname, *args, **kwargs):
        if not failed:
            failed.append(fname)
            raise Full('no space left')
        save(self, fname, *args, **kwargs)
    for p in logger.path.glob('growth*'): p.unlink()
    monkeypatch.setattr(Image.Image, 'save', first_fails)
    with pytest.warns(UserWarning, match='cannot write to `path`'): logger.after_fit()
    assert {p.name for p in logger.path.glob('growth*')} == {'growth-0.2-picture-0.gif', 'growth-0.2-picture-1.png', 'growth-0.2-picture-1.gif'}


# Ctrl-C at each line of the recorder's enter and exit

def test_ctrl_c_at_any_line_of_enter_and_exit_leaves_no_hook(counts):
    "All lines but the first of `__exit__`, which Python runs before anything can be guarded"
    import fastai_selfattn.seeing.record as record
    model, left = plain(), []
    before = hooks(model)
    def strike(n):
        seen = 0
        def trace(frame, event, arg):
            nonlocal seen
            if frame.f_code.co_filename != record.__file__ and not frame.f_code.co_filename.endswith('nn/modules/module.py'): return None
            if event == 'line':
                seen += 1
                if seen == n:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace
        rec = AttentionRecorder(model, [(3, 20)])
        sys.settrace(trace)
        try:
            with rec: pass
            return False
        except KeyboardInterrupt as e:
            frame = e.__traceback__
            while frame.tb_next: frame = frame.tb_next
            if hooks(model) != before: left.append((frame.tb_frame.f_code.co_name, frame.tb_lineno - frame.tb_frame.f_code.co_firstlineno))
            rec.__exit__()
            assert hooks(model) == before
            return True
        finally: sys.settrace(None)
    n = 1
    while strike(n): n += 1
    assert n > 60 and [name for name, line in left] in ([], ['__exit__']), left
    torch.compile(torch.sin, backend=counts)(torch.ones(3))
    assert counts.compiled     # compiled models do not run eagerly from here on
