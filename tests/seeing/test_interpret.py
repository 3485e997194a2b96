"`AttentionInterpretation`: each picture's own numbers, the loss with and without attention, the right order, and nothing changed"
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.block import DataBlock, RegressionBlock
from fastai.data.transforms import FuncSplitter, Normalize, get_image_files
from fastai.layers import SelfAttention as FastaiSelfAttention
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock, MaskBlock
from PIL import Image
from torch import nn
from torch.nn import functional as F

from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.interpret import AttentionInterpretation
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.seeing.record import AttentionRecorder
from fastai_selfattn.attention.kinds import attention_layers, attention_off
from fastai_selfattn.walls.rooms import make_rooms
from fastai_selfattn.walls.data import open_mask

SIZE = 30, 42

@pytest.fixture(scope='module')
def rooms(tmp_path_factory): return make_rooms(tmp_path_factory.mktemp('interpret') / 'rooms', 11, SIZE)

def mask_of(f): return open_mask(f.parent.parent / 'masks' / f.name)
def photos(path): return sorted(get_image_files(path / 'images'))
def held_out(f): return f.stem >= 'room_0004'

class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), SelfAttention(16), nn.MaxPool2d(3), nn.Dropout(.5), layer(16))
        self.head = nn.Conv2d(16, 2, 1)
        for m in attention_layers(self).values(): nn.init.constant_(m.gamma, 2.)
        nn.init.constant_(self.body[1].weight, 6.)       # sharp maps, which differ
    def forward(self, x): return F.interpolate(self.head(self.body(x)), x.shape[2:])

def make(rooms, *cbs, layer=SelfAttention):
    set_seed(8)
    block = DataBlock((ImageBlock, MaskBlock(['other', 'wall'])), get_items=photos, get_y=mask_of, splitter=FuncSplitter(held_out), batch_tfms=[Flip(p=.5), Normalize.from_stats(*imagenet_stats)])
    return Learner(block.dataloaders(rooms, bs=3, num_workers=0), Net(layer), loss_func=CrossEntropyLossFlat(axis=1), cbs=list(cbs), path=rooms)

def state(learn):
    return ({k: v.clone() for k, v in learn.model.state_dict().items()}, [m.training for m in learn.model.modules()],
            {(n, k): list(v) for n, m in learn.model.named_modules() for k, v in vars(m).items() if 'hook' in k and v}, {id(cb) for cb in learn.cbs}, torch.get_rng_state())

def unchanged(learn, before):
    after = state(learn)
    return all(torch.equal(v, after[0][k]) for k, v in before[0].items()) and before[1:4] == after[1:4] and torch.equal(before[4], after[4])


@pytest.mark.parametrize('layer', [SelfAttention, FastaiSelfAttention], ids=lambda c: c.__module__)
def test_each_picture_has_its_own_numbers(rooms, layer):
    "Compared with one picture at a time, by hand"
    learn = make(rooms, GammaLogger(), layer=layer)
    learn.model.state_dict()
    before = state(learn)
    interp = AttentionInterpretation.from_learner(learn)
    assert unchanged(learn, before)
    files = list(learn.dls.valid_ds.items)
    assert sorted(zip(interp.df.picture, interp.df.layer)) == [(i, n) for i in range(7) for n in ('body.2', 'body.5')]
    model = learn.model.eval()
    for i, f in enumerate(files):
        x, y = learn.dls.test_dl([f], with_labels=True, num_workers=0).one_batch()
        x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor).long()
        with torch.no_grad():
            with AttentionRecorder(model, None) as rec: on = F.cross_entropy(model(x), y).item()
            with attention_off(model): off = F.cross_entropy(model(x), y).item()
        for name in ('body.2', 'body.5'):
            row, = interp.df[(interp.df.picture == i) & (interp.df.layer == name)].itertuples()
            s = rec.stats[name]
            np.testing.assert_allclose([row.loss, row.loss_off, row.gain], [on, off, off - on], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose([row.entropy, row.entropy_share, row.distance, row.itself, row.largest, row.change],
                                       [*(getattr(s, k).mean() for k in ('entropy', 'entropy_share', 'distance', 'itself', 'largest')), rec.changes[name].item()], rtol=1e-2, atol=1e-4)
            assert row.cells == tuple(s.distance.shape[1:])
            r, c = row.farthest
            assert s.distance[0, r, c] == pytest.approx(s.distance.max().item(), rel=1e-4)
            r, c = row.sharpest
            assert s.entropy[0, r, c] == pytest.approx(s.entropy.min().item(), rel=1e-3, abs=1e-4)
    assert interp.df.gain.abs().max() > 1e-3


@pytest.mark.parametrize('by,column,ascending', [('farthest', 'distance', False), ('sharpest', 'entropy_share', True), ('loss', 'gain', False)])
def test_the_order(rooms, by, column, ascending):
    interp = AttentionInterpretation.from_learner(make(rooms))
    for layer in ('body.2', 'body.5'):
        rows = interp.df[interp.df.layer == layer]
        assert interp.top(by, layer=layer)[column].tolist() == sorted(rows[column], reverse=not ascending)
        assert interp.top(by, 3, layer).picture.tolist() == interp.top(by, layer=layer).picture.tolist()[:3]
        assert interp.top(by, layer=layer, largest=False)[column].tolist() == sorted(rows[column], reverse=ascending)
    assert interp.top(by).layer.unique().tolist() == ['body.2']


@pytest.mark.parametrize('by', ['farthest', 'sharpest', 'loss'])
def test_plot_top_draws_the_pictures_and_their_maps(rooms, by):
    learn = make(rooms)
    interp = AttentionInterpretation.from_learner(learn)
    learn.model.state_dict()
    before = state(learn)
    axs = interp.plot_top(by, 3, 'body.5')
    assert axs.shape == (3, 2) and unchanged(learn, before)
    rows = interp.top(by, 3, 'body.5')
    for (left, right), row in zip(axs, rows.itertuples()):
        f = learn.dls.valid_ds.items[row.picture]
        p = learn.dls.test_dl([f], num_workers=0)
        x, = p.one_batch()
        np.testing.assert_allclose(left.images[0].get_array(), p.decode((x,))[0][0].permute(1, 2, 0).float() / 255, atol=1e-6)
        (r, c), (h, w) = (row.sharpest if by == 'sharpest' else row.farthest), row.cells
        point = int((r + .5) * SIZE[0] / h), int((c + .5) * SIZE[1] / w)
        with torch.no_grad(), AttentionRecorder(learn.model.eval(), [point], 'body.5') as rec: learn.model(x)
        np.testing.assert_allclose(right.images[-1].get_array(), rec.maps['body.5'][0, 0] * h * w, rtol=1e-3, atol=1e-4)
        assert right.lines[-1].get_xydata().tolist() == [[point[1], point[0]]]
        assert f'picture {row.picture}' in left.get_title() and f'{row.loss:.3g}' in left.get_title() and str(point) in right.get_title()
    assert len({ax.images[-1].get_clim() for ax in axs[:, 1]}) == 1


def test_plot_top_draws_squeezed_pictures_in_their_own_proportions(tmp_path):
    for i in range(2): Image.effect_noise((60, 20), 90).convert('RGB').save(tmp_path/f'{i}.png')
    block = DataBlock((ImageBlock, RegressionBlock), get_items=lambda p: sorted(p.glob('*.png')), get_y=lambda f: 0., splitter=lambda items: ([0, 1], [0, 1]), item_tfms=Resize(24, method='squish'))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), SelfAttention(16, gamma=1.), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1))
    interp = AttentionInterpretation.from_learner(Learner(block.dataloaders(tmp_path, bs=2, num_workers=0), model, loss_func=MSELossFlat()))
    axs = interp.plot_top(k=2)
    axs[0, 0].figure.draw_without_rendering()
    for ax in axs.flat:
        box = ax.get_window_extent()
        assert ax.images[0].get_array().shape[:2] == (24, 24) and box.height / box.width == pytest.approx(1 / 3, rel=.1)


def test_axes_that_are_given_are_used(rooms):
    interp = AttentionInterpretation.from_learner(make(rooms))
    axs = plt.figure().subplots(2, 2)
    before = plt.get_fignums()
    assert (interp.plot_top(k=2, axs=axs) == axs).all() and plt.get_fignums() == before and all(ax.images for ax in axs.flat)


def test_other_data_and_chosen_layers(rooms):
    learn = make(rooms)
    dl = learn.dls.test_dl(photos(rooms)[:2], with_labels=True, num_workers=0)
    interp = AttentionInterpretation.from_learner(learn, dl=dl, layers='body.5')
    assert interp.df.picture.tolist() == [0, 1] and set(interp.df.layer) == {'body.5'}
    whole = AttentionInterpretation.from_learner(learn, ds_idx=0)
    assert len(whole.df) == 8                    # four training pictures, though a batch of 3 would leave one out
    assert interp.df.loss.iloc[0] == pytest.approx(whole.df.loss.iloc[0], rel=1e-5)
    assert interp.df.loss_off.iloc[0] != whole.df.loss_off.iloc[0]      # with one layer switched off, and with both


def test_errors_come_with_what_to_do(rooms, tmp_path):
    learn = make(rooms)
    interp = AttentionInterpretation.from_learner(learn)
    for call, says in ((lambda: interp.top('nearest'), 'one of farthest, sharpest, loss'), (lambda: interp.top(k=0), '`k` must be 1 or more'),
                       (lambda: interp.top(layer='body.1'), 'there are body.2, body.5'), (lambda: AttentionInterpretation.from_learner(learn, layers='head'), 'no attention layer head')):
        with pytest.raises(ValueError, match=says): call()
    learn.path = tmp_path
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'export.pkl')
    with pytest.raises(ValueError, match='no pictures'): AttentionInterpretation.from_learner(loaded)
    learn.model = nn.Conv2d(3, 2, 1)
    with pytest.raises(ValueError, match='no attention layer'): AttentionInterpretation.from_learner(learn)


def test_an_error_on_the_way_leaves_no_hook(rooms):
    learn = make(rooms)
    learn.model.state_dict()
    learn.model.head = nn.Conv2d(5, 2, 1)
    before = state(learn)
    with pytest.raises(RuntimeError): AttentionInterpretation.from_learner(learn)
    assert unchanged(learn, before)

@pytest.mark.parametrize('kwargs,error,says', [(dict(axs=(1, 2)), ValueError, 'array of 3x2 axes'), (dict(axs=(5, 2)), ValueError, 'array of 3x2 axes'), (dict(axs=None), TypeError, 'an `Axes` of matplotlib'),
    (dict(imsize=0), ValueError, '`imsize` must be a number of inches'), (dict(imsize='a'), TypeError, '`imsize` must be a number of inches'), (dict(imsize=None), TypeError, '`imsize` must be')], ids=str)
def test_plot_top_checks_axes_and_size(rooms, kwargs, error, says):
    interp = AttentionInterpretation.from_learner(make(rooms))
    if 'axs' in kwargs: kwargs = dict(axs=plt.subplots(*kwargs['axs'], squeeze=False)[1] if kwargs['axs'] else 'here')
    before = plt.get_fignums()
    with pytest.raises(error, match=says): interp.plot_top(k=3, **kwargs)
    assert plt.get_fignums() == before
    plt.close('all')


def test_the_record_of_the_last_training_stays(rooms):
    "With what the Learner held, and nothing new"
    learn = make(rooms)
    def held():
        recorded = {k: list(v) for k, v in vars(learn.recorder).items() if isinstance(v, list)}
        return {k: id(v) for k, v in vars(learn).items() if k not in ('cbs', 'lock')}, recorded
    before = held()
    AttentionInterpretation.from_learner(learn)
    assert held() == before and not hasattr(learn, 'pred')
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-4)
    before = held()
    assert len(learn.recorder.values) == 2 and len(learn.recorder.losses)
    for dl in (None, learn.dls.train): AttentionInterpretation.from_learner(learn, dl=dl)
    assert held() == before
    learn.remove_cb(learn.recorder)
    assert len(AttentionInterpretation.from_learner(learn).df) == 14


def test_both_passes_see_the_same_pictures(rooms):
    "Also where the pipeline augments, as that of the training set does"
    learn = make(rooms)
    for m in attention_layers(learn.model).values(): nn.init.zeros_(m.gamma)
    class Noisy(torch.utils.data.Dataset):
        def __len__(self): return 3
        def __getitem__(self, i): return torch.rand(3, *SIZE), torch.zeros(SIZE, dtype=torch.long)
    loader = torch.utils.data.DataLoader(Noisy(), 2)
    for data in (dict(dl=loader), dict(ds_idx=0)): assert AttentionInterpretation.from_learner(learn, **data).df.gain.abs().max() < 1e-6
