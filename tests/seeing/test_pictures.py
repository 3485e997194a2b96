"`pictures`: what the model takes and what people see, of any data, and training goes on as without"
import random

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import named
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders, TfmdLists
from fastai.data.load import DataLoader
from fastai.data.transforms import ColReader, IndexSplitter, IntToFloatTensor, Normalize, ToTensor
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import TensorImage
from fastai.vision.augment import Brightness, Flip, Resize
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock
from fastcore.basics import fastuple
from PIL import Image
from torch import nn
from watched import close

from fastai_selfattn.seeing.pictures import pictures, predicted_classes

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(4)
    names = [path / f'{i:02}.png' for i in range(9)]
    for f in names: Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).save(f)
    return names

def label(f): return 'ab'[int(f.stem) % 2]

def learner(files, get_x=None, source=None, valid=range(5, 9), tfms=(Flip(p=.5), Brightness(.5, p=1.)), **kwargs):
    block = DataBlock((ImageBlock, CategoryBlock), get_y=kwargs.pop('get_y', label), get_x=get_x, splitter=IndexSplitter(list(valid)), batch_tfms=[*tfms, Normalize.from_stats(*imagenet_stats)])
    dls = block.dataloaders(files if source is None else source, bs=2, num_workers=0, **kwargs)
    return Learner(dls, nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), loss_func=nn.CrossEntropyLoss())

def original(f): return torch.from_numpy(np.array(Image.open(f).convert('RGB'))).permute(2, 0, 1) / 255

def check(p, names):
    "Pictures are those of the files `names`, and `x` is what the model takes"
    want = torch.stack([original(f) for f in names])
    assert type(p.x) is type(p.images) is torch.Tensor and p.images.device.type == 'cpu' and p.images.dtype == torch.float32
    assert p.images.shape == p.x.shape == want.shape and (p.images - want).abs().max() < 1.001 / 255 and 0 <= p.images.min() and p.images.max() <= 1
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in imagenet_stats)
    close(p.x, (want - mean) / std, rtol=1e-3, atol=1e-3)
    return p

def test_pictures_of_the_validation_set_and_of_files(files):
    learn = learner(files)
    p = check(pictures(learn), files[5:8])
    assert p.items == files[5:8] and p.names == ['05.png', '06.png', '07.png']
    assert repr(p) == 'Pictures, 3 of 3x20x28, in 1 pass: 05.png, 06.png, 07.png'
    assert len(check(pictures(learn, max_n=99), files[5:]).items) == 4                       # more than there are
    p = check(pictures(learn, [files[7], str(files[0])], max_n=1), [files[7], files[0]])
    assert p.names == ['07.png', '00.png'] and p.items == [files[7], str(files[0])]
    for one in (files[3], str(files[3])): assert check(pictures(learn, one), [files[3]]).names == ['03.png']
    for one in (PILImage.create(files[2]), Image.open(files[2])):
        p = check(pictures(learn, one), [files[2]])
        assert p.names == ['picture 0'] and p.items == [one]
    p = check(pictures(learn, [PILImage.create(f) for f in files[1:4]]), files[1:4])
    assert p.names == ['picture 0', 'picture 1', 'picture 2']


def test_pictures_of_a_batch_as_the_model_takes_it(files):
    learn = learner(files)
    x = pictures(learn).x
    for batch in (x, TensorImage(x)):
        p = check(pictures(learn, batch, max_n=1), files[5:8])
        assert torch.equal(p.x, x) and p.names == ['picture 0', 'picture 1', 'picture 2'] and len(p.items) == 3
    for bad, says in ((x[0], r'must be \(bs, channels, h, w\), got \(3, 20, 28\)'), (x[..., None], r'\(3, 3, 20, 28, 1\)')):
        with pytest.raises(ValueError, match=says): pictures(learn, bad)


def test_pictures_of_a_table(files):
    df = pd.DataFrame(dict(name=[f.name for f in files], label=[label(f) for f in files]))
    learn = learner(files, get_x=ColReader('name', pref=f'{files[0].parent}/'), get_y=ColReader('label'), source=df)
    p = check(pictures(learn, max_n=2), files[5:7])
    assert p.names == ['picture 0', 'picture 1'] and [row['name'] for row in p.items] == ['05.png', '06.png']
    p = check(pictures(learn, df.iloc[[8, 1]]), [files[8], files[1]])
    assert [row['name'] for row in p.items] == ['08.png', '01.png']


def test_no_pictures(files):
    learn = learner(files, valid=[])
    with pytest.raises(ValueError, match='no pictures to show.*give `items`'): pictures(learn)
    check(pictures(learn, files[:2]), files[:2])
    learn = learner(files)
    for kwargs in (dict(items=[]), dict(max_n=0), dict(items=[], max_n=0), dict(items=pictures(learn).x[:0])):
        with pytest.raises(ValueError, match='no pictures to show'): pictures(learn, **kwargs)


def tensors(n=6, c=3, size=(20, 28)): return [(torch.rand(c, *size, generator=torch.Generator().manual_seed(i)), i % 2) for i in range(n)]

@pytest.mark.parametrize('loader', [lambda ds: DataLoader(ds, bs=4), lambda ds: torch.utils.data.DataLoader(ds, batch_size=4)], ids=["fastai's", "torch's"])
def test_pictures_of_plain_data_without_items(loader):
    learn = Learner(DataLoaders(loader(tensors(2)), loader(tensors()[1:])), learner_model(3), loss_func=nn.CrossEntropyLoss())
    p = pictures(learn)
    want = torch.stack([t for t, _ in tensors()[1:4]])
    assert torch.equal(p.x, want) and torch.equal(p.images, want) and p.names == ['picture 0', 'picture 1', 'picture 2']
    assert len(pictures(learn, max_n=99).names) == 4                                          # a batch
    p = pictures(learn, want[:2] * 7 - 3)                                                 # of any range: as wide as can be
    assert torch.equal(p.x, want[:2] * 7 - 3)
    for a, b in zip(p.images, want): close(a, (b - b.min()) / (b.max() - b.min()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='no pictures'): pictures(learn, max_n=0)

def learner_model(c): return nn.Sequential(nn.Conv2d(c, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

@pytest.mark.parametrize('c', [1, 2, 4, 7])
def test_pictures_of_any_number_of_channels(c):
    learn = Learner(DataLoaders(DataLoader(tensors(2, c), bs=2), DataLoader(tensors(5, c), bs=4)), learner_model(c), loss_func=nn.CrossEntropyLoss())
    p = pictures(learn)
    assert p.x.shape == (3, c, 20, 28) and p.images.shape == (3, 1, 20, 28)
    close(p.images, p.x.mean(1, keepdim=True))


@pytest.mark.parametrize('look', [lambda l, f: pictures(l), lambda l, f: pictures(l, f[:3]), lambda l, f: pictures(l, pictures(l).x), lambda l, f: pictures(l, max_n=99)], ids=['validation', 'files', 'tensor', 'all'])
@pytest.mark.parametrize('plain', [False, True], ids=['blocks', 'plain'])
def test_training_goes_on_as_without_pictures(files, look, plain):
    def batches(look):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        if plain:
            dls = DataLoaders(DataLoader(tensors(8), bs=2, shuffle=True), DataLoader(tensors(), bs=4))
            learn = Learner(dls, learner_model(3), loss_func=nn.CrossEntropyLoss())
        else: learn = learner(files)
        states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), learn.dls.train.rng.getstate())
        before = states()
        if look:
            look(learn, files)
            assert states() == before
        out = [b[0].clone() for b in learn.dls.train]
        if look: look(learn, files)
        return out + [b[0].clone() for b in learn.dls.train] + [b[0].clone() for b in learn.dls.valid] + [torch.rand(1), torch.tensor([random.random(), np.random.rand()])]
    want, got = batches(None), batches((lambda l, f: pictures(l)) if plain else look)
    assert len(want) == len(got) > 6 and all(torch.equal(a, b) for a, b in zip(want, got))


def test_pictures_want_a_validation_set():
    learn = Learner(DataLoaders(DataLoader([(torch.rand(3, 6, 8), 0)] * 4, bs=2)), learner_model(3), loss_func=nn.MSELoss())
    with pytest.raises(ValueError, match='no validation set'): pictures(learn)


@pytest.mark.parametrize('size', [(21, 13), (1, 1)], ids=named)
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.float16, torch.float64], ids=named)
def test_pictures_of_any_type_of_number(dtype, size):
    "Whole numbers are 0 to 255, fractions 0 to 1"
    want = torch.randint(20, 200, (2, 3, *size), generator=torch.Generator().manual_seed(0))
    x = want.to(dtype) / (255 if dtype.is_floating_point else 1)
    x = x.to(dtype)
    p = pictures(Learner(DataLoaders(DataLoader(tensors(2), bs=2), DataLoader(tensors(2), bs=2)), learner_model(3), loss_func=nn.CrossEntropyLoss()), x)
    assert p.x.dtype == dtype and torch.equal(p.x, x) and p.images.dtype == torch.float32
    close(p.images, want / 255, rtol=0, atol=1e-3)


@pytest.mark.parametrize('lo,hi,stretched', [(-.009, 1.009, False), (-.02, .5, True), (.5, 1.02, True), (0., .1, False), (-4., 9., True)])
def test_only_what_is_no_picture_is_stretched(lo, hi, stretched):
    x = torch.linspace(lo, hi, 2*3*5*7).view(2, 3, 5, 7)[torch.tensor([1, 0])]
    x[0], x[1] = (x[0] - x[0].min()) / (x[0].max() - x[0].min()) * (hi-lo) + lo, .5
    p = pictures(Learner(DataLoaders(DataLoader(tensors(2), bs=2), DataLoader(tensors(2), bs=2)), learner_model(3), loss_func=nn.CrossEntropyLoss()), x)
    close(p.images[0], (x[0] - lo) / (hi - lo) if stretched else x[0].clamp(0, 1))
    assert p.images[1].eq(.5).all() and p.images.min() >= 0 and p.images.max() <= 1     # each by itself


def test_a_picture_that_cannot_be_read_changes_nothing(files, tmp_path):
    learn = learner(files)
    learn.model.train(), learn.model[0].eval()
    (tmp_path/'no.png').write_bytes(b'no picture')
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), learn.dls.train.rng.getstate())
    before, modes, pipe = states(), [m.training for m in learn.model.modules()], list(learn.dls.valid.after_batch.fs)
    with pytest.raises(Exception, match='cannot identify image'): pictures(learn, [files[1], tmp_path/'no.png'])
    assert states() == before and [m.training for m in learn.model.modules()] == modes and list(learn.dls.valid.after_batch.fs) == pipe
    check(pictures(learn), files[5:8])


def test_pictures_come_to_the_device_of_the_model(files):
    learn = learner(files)
    learn.model.to('meta')
    p = pictures(learn)
    assert p.x.device.type == 'meta' and p.images.device.type == 'cpu' and p.x.shape == (3, 3, 20, 28)


def test_pictures_that_are_numbers_are_called_by_them(files):
    learn = learner(files, get_x=lambda i: files[i], get_y=lambda i: label(files[i]), source=list(range(len(files))))
    p = check(pictures(learn, [7, np.int64(2)]), [files[7], files[2]])
    assert p.names == ['picture 7', 'picture 2'] and p.items == [7, 2]


@pytest.mark.parametrize('tfms,shape', [(dict(item_tfms=Resize(24, method='squish')), (8, 24)), (dict(item_tfms=Resize((30, 24), method='squish')), (8, 24)), (dict(item_tfms=Resize(24, method='crop')), (24, 24)),
                                        (dict(item_tfms=Resize(24, method='pad', pad_mode='zeros')), (24, 24)), (dict(batch_tfms=Flip(size=24)), (8, 24)),
                                        (dict(item_tfms=Resize((12, 24), method='crop'), batch_tfms=Flip(size=36)), (18, 36)), (dict(item_tfms=Resize((12, 36), method='squish'), batch_tfms=Flip(size=36)), (12, 36)),
                                        (dict(), (20, 60))], ids=['squish', 'squish tall', 'crop', 'pad', 'batch', 'crop then batch', 'both', 'none'])
def test_squeezed_pictures_have_a_shape_of_their_own(tmp_path, tfms, shape):
    Image.new('RGB', (60, 20)).save(tmp_path / 'a.png')
    dls = DataBlock((ImageBlock, RegressionBlock), get_items=lambda p: [p / 'a.png'], get_y=lambda f: 0., splitter=lambda items: ([0], [0]), **tfms).dataloaders(tmp_path, bs=1, num_workers=0)
    learn = Learner(dls, nn.Conv2d(3, 3, 1), loss_func=nn.MSELoss())
    (h, w), = pictures(learn).shapes
    assert h / w == pytest.approx(shape[0] / shape[1], rel=.03) and pictures(learn, torch.rand(2, 3, 24, 30)).shapes == [(24, 30)]*2


LOSSES = {'flat': (CrossEntropyLossFlat(axis=1), 3, lambda o: o.argmax(1)), 'plain': (nn.CrossEntropyLoss(), 3, lambda o: o.argmax(1)), 'flat logits': (BCEWithLogitsLossFlat(), 1, lambda o: o[:, 0] > 0),
          'logits': (nn.BCEWithLogitsLoss(), 1, lambda o: o[:, 0] > 0), 'regression': (MSELossFlat(), 3, None), 'plain regression': (nn.MSELoss(), 1, None)}
@pytest.mark.parametrize('loss', LOSSES)
def test_classes_that_a_model_predicts(loss):
    loss_func, c, want = LOSSES[loss]
    out = torch.randn(2, c, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    got = predicted_classes(loss_func, out, (5, 7))
    assert got is None if want is None else torch.equal(got, want(out).int())
    assert predicted_classes(loss_func, out, (10, 14)) is None and predicted_classes(loss_func, out[:, :, 0, 0], (5, 7)) is None and predicted_classes(loss_func, (out, out), (5, 7)) is None
