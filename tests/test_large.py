"A picture predicted by windows is predicted as a whole is, in the memory that was stated."
import copy, math
import numpy as np
import fastai.callback.all  # noqa: F401
import fastai.layers
import pytest, torch
import torch.nn.functional as F
from conftest import named
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from fastai.losses import BaseLoss, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchLoader

import fastai_selfattn.large as large
import fastai_selfattn.windows as windows
from fastai_selfattn.attention.layers import PooledSelfAttention2d, SelfAttention
from fastai_selfattn.attention.ops import attention_backend
from fastai_selfattn.export import Deployed
from fastai_selfattn.large import Peak, predict_large
from fastai_selfattn.placement.unet import unet_learner
from fastai_selfattn.walls.data import rooms_dls
from fastai_selfattn.walls.train import small_encoder

class Net(nn.Module):
    "Halves the map, attends, halves, attends, doubles twice, with a skip; it sees more to the left than to the right"
    def __init__(self, *more):
        super().__init__()
        self.down, self.first = nn.Conv2d(3, 6, 4, 2, 1), SelfAttention(6, 2, gamma=.9)
        self.second = nn.Sequential(nn.MaxPool2d(2), nn.ReplicationPad2d((2, 0, 1, 0)), nn.Conv2d(6, 8, (2, 3)), PooledSelfAttention2d(8, 2, gamma=-.8))
        self.up, self.more = nn.Upsample(scale_factor=2), nn.Sequential(*more)
        self.last = nn.Sequential(nn.Conv2d(14, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(2, 3, 3, padding=1))

    def forward(self, x):
        x = self.first(self.down(x)).relu()
        return self.last(torch.cat([x, self.more(self.up(self.second(x)))], 1))

def learner(net=None, loss=None):
    torch.manual_seed(4)
    dl = TorchLoader([(torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.long))]*2, 2)
    net = net or Net()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.running_mean), nn.init.uniform_(m.running_var, .5, 2)
    return Learner(DataLoaders(dl, dl), net, loss_func=loss or CrossEntropyLossFlat(axis=1))

def test_a_file_for_a_model_of_one_channel_is_read_in_grey(tmp_path):
    net = Net()
    net.down = nn.Conv2d(1, 6, 4, 2, 1)
    learn = learner(net)
    dl = TorchLoader([(torch.rand(1, 8, 8), torch.zeros(8, 8, dtype=torch.long))]*2, 2)
    learn.dls = DataLoaders(dl, dl)
    image = Image.fromarray(picture(24, 32, torch.uint8).permute(1, 2, 0).numpy())
    image.save(tmp_path/'picture.png')
    grey = torch.from_numpy(np.array(image.convert('L')))[None]
    for given in (tmp_path/'picture.png', image, grey):
        torch.testing.assert_close(predict_large(learn, given, progress=False), whole(learn, grey/255.), atol=2e-6, rtol=1e-5)

class Whole(SelfAttention):
    "Holds n x n, whatever it is told"
    def forward(self, x):
        with attention_backend('math'): return super().forward(x)

class WholePooled(PooledSelfAttention2d):
    def forward(self, x):
        with attention_backend('math'): return super().forward(x)

@pytest.mark.parametrize('layer,most', [(Whole(64, gamma=.9), 2**28), (WholePooled(64, pool=8, gamma=.9), 2**28)], ids=['whole', 'pooled'])
def test_what_a_layer_holds_for_each_pair_counts(layer, most):
    assert large._attending(SelfAttention(64), 64, 2**16)[1] < most
    net = nn.Sequential(nn.Conv2d(3, 64, 2, 2), layer, nn.ConvTranspose2d(64, 3, 2, 2))
    with pytest.raises(ValueError, match='needs at least') as e: predict_large(learner(net), picture(512, 512), max_bytes=most, progress=False)
    n = 256**2
    assert int(str(e.value).split('at least ')[1].split(' bytes')[0].replace(',', '')) > 4*n*(n//64 if isinstance(layer, WholePooled) else n)

def test_a_layer_is_tried_within_the_memory_that_is_stated():
    net = nn.Sequential(nn.Conv2d(3, 256, 16, 16), SelfAttention(256, gamma=.9), nn.ConvTranspose2d(256, 3, 16, 16))
    learn, x = learner(net), picture(64, 64)
    with pytest.raises(ValueError, match='needs at least') as e: predict_large(learn, x, max_bytes=large.tiles.LEAST, progress=False)
    least = int(str(e.value).split('at least ')[1].split(' bytes')[0].replace(',', ''))
    with Peak() as peak: predict_large(learn, x, max_bytes=least, progress=False)
    assert peak.most <= least + 2*sum(p.nbytes for p in net.parameters())     # of the copy, while its norms are baked

def test_an_image_that_is_not_read_yet_stays_as_it_is(tmp_path):
    Image.fromarray(picture(24, 32, torch.uint8).permute(1, 2, 0).numpy()).save(tmp_path/'picture.png')
    image = Image.open(tmp_path/'picture.png')
    cls = type(image)
    got = predict_large(learner(), image, progress=False)
    torch.testing.assert_close(got, predict_large(learner(), tmp_path/'picture.png', progress=False))
    assert type(image) is cls and image.convert('L').size == (32, 24)

def picture(h, w, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return torch.rand(3, h, w, generator=g) if dtype == torch.float32 else torch.randint(0, 256, (3, h, w), generator=g, dtype=dtype)

def whole(learn, x, output='probs'):
    with torch.no_grad(): return Deployed(learn, output)(x[None])[0]

@pytest.mark.parametrize('output', ['probs', 'classes', 'raw'])
@pytest.mark.parametrize('width', [12, 20, 96])
def test_windows_are_exact(monkeypatch, width, output):
    learn, x, widths = learner(), picture(44, 92), []
    monkeypatch.setattr(large, '_fit', lambda *args: widths.append(width) or (width, 2**20))
    got = predict_large(learn, x, output=output, progress=False)
    assert widths and got.shape == ((44, 92) if output == 'classes' else (3, 44, 92))
    torch.testing.assert_close(got, whole(learn, x, output), atol=2e-6, rtol=1e-5)

def test_a_smaller_margin_is_not_exact(monkeypatch):
    learn, x = learner(), picture(44, 92)
    look = windows.look_at(Deployed(learn).model, 3)
    monkeypatch.setattr(large, '_fit', lambda *args: (12, 2**20))
    def off(margin):
        monkeypatch.setattr(large, 'look_at', lambda model, c, f=large.look_at: f(model, c)._replace(margin=margin))
        try: return (predict_large(learn, x, progress=False)-whole(learn, x)).abs().max()
        finally: monkeypatch.undo(), monkeypatch.setattr(large, '_fit', lambda *args: (12, 2**20))
    assert look.unit == 4 and off(look.margin) < 2e-6
    with pytest.raises(ValueError, match='windows cannot be exact'): off(look.margin//4)     # which is tried before
    monkeypatch.setattr(large, '_check_windows', lambda *args: None)
    assert off(look.margin//4) > 1e-4

@pytest.mark.parametrize('where', ['decoder.0', ['encoder.2', 'decoder.1']], ids=named)
def test_a_unet_is_exact_and_stays_within_memory(where):
    torch.manual_seed(3)
    learn = unet_learner(rooms_dls(4, 32, bs=2), small_encoder, pretrained=False, self_attention=where, gamma=1., n_out=2)
    x, most = picture(128, 2048), 90_000_000
    with Peak() as a_whole: want = whole(learn, x)
    with Peak() as windows: got = predict_large(learn, x, most, progress=False)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    weights = sum(p.numel()*4 for p in learn.model.parameters())
    assert windows.most <= most + 2*weights < a_whole.most     # a copy, and the baked weights

def test_a_layer_is_what_counts_where_the_map_is_wide():
    learn, x = learner(nn.Sequential(SelfAttention(3, 1, gamma=.5), nn.Conv2d(3, 2, 1))), picture(48, 80)
    with pytest.raises(ValueError, match='at least ([0-9,]+) bytes') as e: predict_large(learn, x, 100_000, progress=False)
    least = int(e.value.args[0].split('at least ')[1].split()[0].replace(',', ''))
    with pytest.raises(ValueError, match='at least'): predict_large(learn, x, least-20_000, progress=False)
    with Peak() as peak: assert predict_large(learn, x, least+20_000, progress=False).shape == (2, 48, 80)
    assert least/3 < peak.most < least+20_000

def test_sides_that_are_no_multiple_are_extended_and_cut():
    learn, x = learner(), picture(43, 90)
    got = predict_large(learn, x, progress=False)
    assert got.shape == (3, 43, 90)
    torch.testing.assert_close(got, whole(learn, nn.functional.pad(x[None], (0, 2, 0, 1), mode='replicate')[0])[:, :43, :90], atol=2e-6, rtol=1e-5)

class Pads(nn.Module):
    "Pads to multiples of `n`, of 4 cells, and cuts the result"
    def __init__(self, n, mode):
        super().__init__()
        self.n, self.mode, self.body = n, mode, nn.Sequential(nn.Conv2d(3, 8, 4, 4), SelfAttention(8, gamma=1.), nn.ConvTranspose2d(8, 3, 4, 4))
    def forward(self, x):
        h, w = x.shape[2:]
        return self.body(nn.functional.pad(x, (0, -w%self.n, 0, -h%self.n), mode=self.mode))[..., :h, :w]

@pytest.mark.parametrize('mode', ['constant', 'replicate', 'reflect'])
@pytest.mark.parametrize('n', [4, 8, 16, 64])
def test_a_model_that_pads_by_itself_has_a_larger_unit(n, mode, monkeypatch):
    learn, x = learner(Pads(n, mode)), picture(64, 128)
    assert windows.look_at(Deployed(learn).model, 3).unit == n
    monkeypatch.setattr(large, '_fit', lambda *args: (n, 2**20))
    torch.testing.assert_close(predict_large(learn, x, progress=False), whole(learn, x), atol=2e-6, rtol=1e-5)
    if mode == 'replicate': torch.testing.assert_close(predict_large(learn, x[:, :44, :100], progress=False), whole(learn, x[:, :44, :100]), atol=2e-6, rtol=1e-5)

@pytest.mark.parametrize('net,size', [(lambda: nn.Sequential(nn.Conv2d(3, 8, 32, 32), SelfAttention(8), nn.ConvTranspose2d(8, 150, 32, 32)), 512),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 32, 32), SelfAttention(8), nn.Conv2d(8, 2048, 1), nn.PixelShuffle(32)), 1025)], ids=['many classes', 'odd sides'])
def test_all_that_is_held_counts(net, size):
    learn, x = learner(net()), picture(size, size)
    with pytest.raises(ValueError, match='needs at least') as e: predict_large(learn, x, max_bytes=20_000, progress=False)
    least = int(str(e.value).split('at least ')[1].split(' bytes')[0].replace(',', ''))
    with Peak() as peak: predict_large(learn, x, max_bytes=least, progress=False)
    assert peak.most <= least + 2*sum(p.nbytes for p in learn.model.parameters())

def test_files_images_and_bytes(tmp_path):
    learn, x = learner(), picture(24, 36, torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(x.permute(1, 2, 0).numpy()))
    image.save(tmp_path/'room.png')
    want = whole(learn, x/255)
    for given in (x, x/255, image, tmp_path/'room.png', str(tmp_path/'room.png')):
        torch.testing.assert_close(predict_large(learn, given, progress=False), want, atol=2e-6, rtol=1e-5)

def test_normalisation_is_inside():
    learn = learner()
    dl = TorchLoader([(TensorImage(torch.rand(3, 8, 8)), torch.zeros(8, 8, dtype=torch.long))]*2, 2)
    learn.dls = DataLoaders(dl, dl)
    learn.dls.after_batch = type('Pipe', (), dict(fs=[Normalize.from_stats([.2, .3, .4], [.5, .6, .7], cuda=False)]))()
    x = picture(24, 36)
    got, without = predict_large(learn, x, progress=False), predict_large(learner(), x, progress=False)
    torch.testing.assert_close(got, whole(learn, x), atol=2e-6, rtol=1e-5)
    assert (got-without).abs().max() > .01

@pytest.mark.parametrize('net,reach', [(nn.Conv2d(3, 2, 3, padding=1), 1), (nn.Conv2d(3, 2, (1, 7), padding=(0, 3)), 3), (nn.Conv2d(3, 2, (9, 1), padding=(4, 0)), 4),
    (nn.Sequential(nn.Conv2d(3, 2, 3, padding=5, dilation=5), nn.Conv2d(2, 2, 3, padding=1)), 6), (nn.Sequential(nn.ReplicationPad2d((3, 0, 0, 0)), nn.Conv2d(3, 2, (1, 4))), 3), (nn.Identity(), 0)], ids=named)
def test_reach(net, reach): assert max(windows._reach(net, 4, 3, dim) for dim in (2, 3)) == reach

def test_the_learner_and_random_numbers_stay_as_they_were():
    learn = learner().to_fp32() if hasattr(Learner, 'to_fp32') else learner()
    learn.model.train()
    before, state = {k: v.clone() for k, v in learn.model.state_dict().items()}, torch.get_rng_state()
    predict_large(learn, picture(24, 36), progress=False)
    assert torch.get_rng_state().equal(state) and learn.model.training
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items()) and 'forward' not in vars(learn.model.first)

class Mean(nn.Module):
    def forward(self, x): return x - x.mean((2, 3), keepdim=True)

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = SelfAttention(3, 1)
    def forward(self, x): return self.layer(self.layer(x))

class OfTokens(nn.Module):
    def __init__(self, attends=True): super().__init__(); self.layer, self.attends = SelfAttention(3, 1), attends
    def forward(self, x): return self.layer(x.flatten(2)).view_as(x) if self.attends else x

@pytest.mark.parametrize('net,says', [(OfTokens(), 'layer sees .1, 3, 65536. and no map'), (OfTokens(False), 'none of the attention layers runs in a pass: layer'), (Net(Mean()), 'windows cannot be exact'), (Net(nn.InstanceNorm2d(8)), 'windows cannot be exact'),
    (nn.Sequential(nn.AdaptiveAvgPool2d(1), SelfAttention(3, 1), nn.Upsample(256)), 'windows cannot be exact'), (Twice(), 'layer runs more than once'),
    (nn.Sequential(nn.Conv2d(3, 8, 1), fastai.layers.SelfAttention(8)), 'learn.upgrade_attention'), (nn.Sequential(nn.Conv2d(3, 8, 1)), 'no attention layer'),
    (nn.Sequential(SelfAttention(3, 1), nn.Conv2d(3, 2, 1, 2)), "map of the picture's size")], ids=lambda v: v if isinstance(v, str) else '')
def test_models_that_cannot_be(net, says):
    with pytest.raises(ValueError, match=says): predict_large(learner(net), picture(24, 36), progress=False)

@pytest.mark.parametrize('given,error,says', [(torch.rand(1, 3, 8, 8), ValueError, r'must be \(c, h, w\)'), (torch.rand(3, 0, 8), ValueError, r'must be \(c, h, w\)'),
    (torch.rand(3, 8, 8).double(), TypeError, 'float32'), (np.zeros((8, 8, 3)), TypeError, 'ndarray'),
    (torch.rand(4, 8, 8), ValueError, 'picture .* of 4 channels'), (torch.randint(256, (8, 9, 3), dtype=torch.uint8), ValueError, 'of 8 channels'),
    (255*torch.rand(3, 8, 8), ValueError, 'values 0 to 1'), (torch.full((3, 8, 8), -.1), ValueError, 'got -0.1'), (torch.full((3, 8, 8), math.nan), ValueError, 'nan')],
    ids=['batch', 'empty', 'double', 'array', 'alpha', 'channels last', 'to 255', 'normalised', 'nan'])
def test_pictures_that_cannot_be(given, error, says):
    with pytest.raises(error, match=says): predict_large(learner(), given, progress=False)

def test_too_few_bytes():
    for n, error in ((1000, ValueError), (1e9, TypeError)):
        with pytest.raises(error, match='16384 or more bytes'): predict_large(learner(), picture(24, 36), n)

class Bar:
    def __init__(self, gen, **kwargs): self.n, self.steps, self.comment, self.stopped = len(gen), [], '', False
    def update(self, i): self.steps.append((i, self.comment))
    def on_interrupt(self): self.stopped = True

def test_the_bar_moves_during_attention_too(monkeypatch):
    bars = []
    monkeypatch.setattr(large, 'progress_bar', lambda *args, **kwargs: bars.append(Bar(*args, **kwargs)) or bars[-1])
    monkeypatch.setattr(large, 'IN_NOTEBOOK', True)
    predict_large(learner(), picture(64, 96), 9_000_000)
    bar, = bars
    at, names = zip(*bar.steps)
    assert list(at) == sorted(at) and at[0] == 0 and at[-1] == bar.n == 500
    assert list(dict.fromkeys(names)) == ['windows up to first', 'attention of first', 'windows up to second.3', 'attention of second.3', 'windows to the prediction', '']
    assert len({i for i, name in bar.steps if name == 'attention of first'}) > 2
    assert not large.tiles.watchers
    predict_large(learner(), picture(24, 36), progress=False)
    assert len(bars) == 1

def test_ctrl_c_leaves_nothing(monkeypatch):
    bars = []
    monkeypatch.setattr(large, 'progress_bar', lambda *args, **kwargs: bars.append(Bar(*args, **kwargs)) or bars[-1])
    monkeypatch.setattr(large, 'IN_NOTEBOOK', True)
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(Bar, 'update', stop)
    with pytest.raises(KeyboardInterrupt): predict_large(learner(), picture(24, 36))
    from fastai_selfattn.attention import ops
    assert bars[0].stopped and not large.tiles.watchers and ops._max_bytes is None


# models of which windows cannot know where they are

class Coordinates(nn.Module):
    def forward(self, x):
        rows, cols = (torch.linspace(0, 1, n) for n in x.shape[2:])
        return torch.cat([x, (rows[:, None]+cols).expand(len(x), 1, -1, -1)], 1)

class Flip(nn.Module):
    def forward(self, x): return x + .5*x.flip(3)

class Corners(nn.Module):
    def forward(self, x): return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode='bilinear', align_corners=True)

@pytest.mark.parametrize('first', [nn.Sequential(Coordinates(), nn.Conv2d(4, 3, 1)), nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode='circular')), Flip(), Corners(),
                                   nn.Sequential(Coordinates(), nn.Conv2d(4, 3, 5, padding=2), Corners())], ids=['coordinates', 'circular', 'flip', 'corners', 'several'])
def test_what_depends_on_where_a_window_lies_is_refused(first):
    torch.manual_seed(1)
    learn = learner(nn.Sequential(first, Net()))
    with pytest.raises(ValueError, match='windows cannot be exact'): predict_large(learn, torch.rand(3, 96, 96), progress=False)

class Heat(BaseLoss):
    "A keypoint is a softmax over the picture"
    def __init__(self): super().__init__(nn.MSELoss, flatten=False, floatify=True)
    def activation(self, x): return x.flatten(2).softmax(-1).view_as(x)

@pytest.mark.parametrize('loss', [Heat, lambda: LabelSmoothingCrossEntropyFlat(axis=1)], ids=['heat', 'fastais slip'])
@pytest.mark.parametrize('output', ['probs', 'classes'])
def test_an_activation_that_looks_over_the_picture_is_refused(loss, output):
    "fastai's label smoothing takes the softmax over the last dimension, whatever `axis` is"
    learn, x = learner(loss=loss()), picture(48, 64)
    with pytest.raises(ValueError, match="use output='raw'|Use output='raw'|no `decodes`"): predict_large(learn, x, output=output, progress=False)
    assert predict_large(learn, x, output='raw', progress=False).equal(predict_large(learner(), x, output='raw', progress=False))

def test_autocast_changes_nothing():
    learn, x = learner(), picture(48, 64)
    want = predict_large(learn, x, progress=False)
    with torch.autocast('cpu', torch.bfloat16): assert predict_large(learn, x, progress=False).equal(want)

class Strided(nn.Module):
    def __init__(self, down, up):
        super().__init__()
        self.down, self.attention, self.up, self.out = down, SelfAttention(8, gamma=1.), up, nn.Conv2d(8, 2, 1)
    def forward(self, x): return self.out(self.up(self.attention(self.down(x)))[..., :x.shape[2], :x.shape[3]])

@pytest.mark.parametrize('down,up', [(nn.Conv2d(3, 8, 3, stride=3, padding=1), nn.Upsample(scale_factor=3)), (nn.Conv2d(3, 8, 3, stride=(2, 1), padding=1), nn.Upsample(scale_factor=(2, 1))),
                                     (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2)), nn.AvgPool2d(2))], ids=['a third', 'one side', 'larger'])
def test_maps_that_do_not_divide_the_picture_are_refused(down, up):
    with pytest.raises(ValueError, match='whose sides divide'): predict_large(learner(Strided(down, up)), torch.rand(3, 96, 96), progress=False)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_precisions_are_computed_in_float32(dtype):
    torch.manual_seed(1)
    learn, x = learner(Net()), picture(32, 48)
    learn.model.to(dtype)
    got = predict_large(learn, x, output='raw', progress=False)
    want = copy.deepcopy(learn.model).float().eval()(x[None]).detach()[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert next(learn.model.parameters()).dtype == dtype

@pytest.mark.parametrize('progress', ['x', None, 1], ids=str)
def test_progress_is_shown_or_not(progress):
    with pytest.raises(TypeError, match='`progress` must be True or False'): predict_large(learner(), picture(24, 36), progress=progress)
