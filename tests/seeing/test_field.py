"`field` against what is known on paper, in one to three dimensions; nothing changes by looking"
import contextlib
import itertools

import numpy as np
import pytest
import torch
from conftest import named
from fastai.torch_core import TensorImage
from fastai.vision.models.unet import DynamicUnet
from torch import nn
from watched import POINTS, SIZES, as_it_was, close, hooks, images, marked, mixed, net, same, stance_is_forced, to_marked, with_gamma

from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.walls.train import small_encoder

def test_receptive_field_on_paper():
    model = nn.Sequential(nn.Conv2d(1, 1, 2, 2, bias=False), with_gamma(SelfAttention(1, norm_type=None), 0.))
    model[0].weight.data.copy_(torch.tensor([[1., 2], [3, -4]]))
    for point, block in (((5, 2), (4, 2)), ((0, 9), (0, 8)), ((2, 3), (2, 2))):
        field = receptive_field(model, images(size=(6, 10))[:, :1], point)
        want = torch.zeros(6, 10)
        want[block[0]:block[0] + 2, block[1]:block[1] + 2] = torch.tensor([[1., 4], [9, 16]]) / 30
        close(field.on, want), close(field.off, want)
        assert field.point == point and field.share == .9 and field.area_on == field.area_off == 3 / 60
    for share, pixels in ((.5, 1), (16.5 / 30, 2), (24.9 / 30, 2), (25.1 / 30, 3), (28.9 / 30, 3), (29.1 / 30, 4), (.9999, 4)):
        assert receptive_field(model, torch.randn(3, 1, 6, 10), share=share).area_off == pixels / 60
    field = receptive_field(model, torch.randn(1, 1, 6, 10))
    assert field.point == (3, 5) and field.on.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]      # the middle


def test_receptive_field_of_a_one_hot_attention():
    layer, x = to_marked(), marked(at=(4, 7))
    for gamma, area in ((1., 2), (-.2, 1)):
        nn.init.constant_(layer.gamma, gamma)
        field = receptive_field(layer, x, (1, 3), channel=2)
        on, off = torch.zeros(6, 10), torch.zeros(6, 10)
        off[1, 3], on[1, 3], on[4, 7] = 1, 1 / (1 + gamma**2), gamma**2 / (1 + gamma**2)
        close(field.on, on), close(field.off, off)
        assert field.area_on == area / 60 and field.area_off == 1 / 60
    assert receptive_field(layer, x, (1, 3), channel=2, share=.97).area_on == 2 / 60


def test_receptive_field_of_convs_grows_to_the_whole_picture():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), SelfAttention(16, gamma=1.), nn.Conv2d(16, 4, 3, padding=1))
    field = receptive_field(model, images(size=(15, 20)), (7, 4))
    box = torch.zeros(15, 20, dtype=torch.bool)
    box[5:10, 2:7] = True
    assert torch.equal(field.off > 0, box) and (field.on > 0).all() and field.on.shape == (15, 20)
    for energy in field[:2]: assert energy.dtype == torch.float32 and energy.sum().item() == pytest.approx(1, rel=1e-5) and not energy.requires_grad
    assert field.area_off <= 25 / 300


def test_receptive_field_of_only_some_layers():
    model = nn.Sequential(to_marked(), to_marked())
    x = marked()
    some, every = (receptive_field(model, x, (1, 3), 2, layers=l) for l in ('1', None))
    assert torch.equal(some.on, every.on) and every.off[1, 3] == 1 and some.off[4, 7] > .4


def test_the_channel_is_the_largest_of_each_image_with_attention():
    conv = nn.Conv2d(3, 3, (1, 3), padding=(0, 1), groups=3, bias=False)
    conv.weight.data.zero_()[0, 0, 0, 0] = 1                       # of channel 0 the left neighbour
    conv.weight.data[2, 0, 0, 1] = 1
    x = marked()
    x[0, 2, 1, 3], x[0, 2, 4, 7] = .2, 1.                          # channel 0 is 1, channel 2 is 1.2 with attention and .2 without
    field = receptive_field(nn.Sequential(to_marked(), conv), x, (1, 3))
    assert field.off[1, 3] == 1 and field.on[1, 3].item() == pytest.approx(.5)
    both = nn.Sequential(with_gamma(SelfAttention(1, norm_type=None), 0.), nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False))
    both[1].weight.data.copy_(torch.tensor([[10., 0, 0], [0, 0, -1.]])[:, None, None])
    x = torch.ones(2, 1, 3, 5)
    x[1] = -1                                                      # image 0: channel 0, ten times as steep; image 1: channel 1
    field = receptive_field(both, x, (1, 2))
    assert field.on[1, 1] == field.on[1, 3] == .5
    assert receptive_field(both, x, (1, 2), channel=1).on[1, 3] == 1 == receptive_field(both, x, (1, 2), channel=np.int64(0)).on[1, 1]


def test_receptive_field_inside_a_classifier():
    model = net().eval()
    classifier, x = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), images()
    before = hooks(classifier)
    with pytest.raises(ValueError, match=r'the output must be a map .*got \(2, 3\): name a `module` inside'): receptive_field(classifier, x)
    want, got = receptive_field(model, x, (3, 4)), receptive_field(classifier, x, (3, 4), module='0')
    assert torch.equal(want.on, got.on) and torch.equal(want.off, got.off) and want[2:] == got[2:]
    early = receptive_field(classifier, x, (3, 4), module='0.0')
    assert torch.equal(early.on, early.off) and early.on.nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (3, 4, 5)]
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.net, self.unused = model, nn.Conv2d(3, 3, 1)
        def forward(self, x): return self.net(x), x
    with pytest.raises(ValueError, match='got tuple: name a `module`'): receptive_field(Pair(), x)
    with pytest.raises(ValueError, match='must be a map'): receptive_field(Pair(), x, module='unused')
    assert torch.equal(receptive_field(Pair(), x, (3, 4), module='net').on, want.on)
    with pytest.raises(RuntimeError): receptive_field(classifier, torch.randn(2, 5, 30, 42), module='0')
    assert hooks(classifier) == before


@pytest.mark.parametrize('kwargs,error,says', [
    (dict(x=images()[0, 0]), TypeError, r'`x` must be a batch of images \(bs, c, h, w\), got \(30, 42\)'), (dict(x=[1]), TypeError, 'got list'),
    (dict(share=0), ValueError, '`share` must lie between 0 and 1, got 0'), (dict(share=1.), ValueError, 'got 1.0'), (dict(point=(30, 0)), ValueError, r'\(30, 0\) is not on the image of 30x42'),
    (dict(point=(1.5, 0)), ValueError, 'whole image pixels'), (dict(point=3), ValueError, 'got 3'), (dict(channel=8), ValueError, '`channel` must be 0 to 7, got 8'), (dict(channel=-1), ValueError, 'got -1'),
    (dict(layers='2'), ValueError, 'no attention layer 2: there are 1, 5'), (dict(module='9'), ValueError, 'no module 9 in this')], ids=named)
def test_bad_input_of_receptive_field_is_named_and_the_model_stays(kwargs, error, says):
    model = net().train()
    model(images())
    before = as_it_was(model)
    with pytest.raises(error, match=says): receptive_field(**(dict(model=model, x=images()) | kwargs))
    same(before, as_it_was(model))


def test_no_gradient_reaches_the_image():
    class Cuts(nn.Module):
        def forward(self, x): return x * 0
    with pytest.raises(ValueError, match=r'no gradient reaches the image from the output pixel at \(3, 4\)'): receptive_field(nn.Sequential(SelfAttention(3), Cuts()), images(), (3, 4))


@pytest.mark.parametrize('mode,exact', [(contextlib.nullcontext, True), (torch.no_grad, True), (torch.inference_mode, True), (lambda: torch.autocast('cpu', dtype=torch.bfloat16), False)], ids=['grad', 'no grad', 'inference', 'autocast'])
def test_receptive_field_changes_nothing(mode, exact):
    model, x = mixed(), images(size=(32, 48))
    model(x).square().mean().backward()
    model[2].eval(), model[4].requires_grad_(False)
    before, rng = as_it_was(model), torch.get_rng_state()
    want = receptive_field(model, x, (3, 4))
    with mode(): got = receptive_field(model, TensorImage(x), (3, 4))
    with mode(): given = TensorImage(x * 1) if mode is torch.inference_mode else x.requires_grad_()
    again = receptive_field(model, given, (3, 4))
    same(before, as_it_was(model))
    assert torch.equal(rng, torch.get_rng_state()) and x.grad is None and not stance_is_forced()
    tol = dict(rtol=1e-4, atol=1e-7) if exact else dict(rtol=.2, atol=1e-2)
    for a, b, c in zip(want[:2], got[:2], again[:2]):
        assert type(b) is torch.Tensor and not b.requires_grad
        close(b, a, **tol), close(c, a)
    assert (got.on - got.off).abs().max() > 1e-3


def test_receptive_field_of_a_compiled_model(counts):
    model, x = net().eval(), images()
    want = receptive_field(model, x, (3, 4))
    compiled = torch.compile(model, backend=counts)
    compiled(x)
    n = counts.ran
    got = receptive_field(compiled, x, (3, 4))
    close(got.on, want.on), close(got.off, want.off)
    close(receptive_field(compiled, x, (3, 4), module='5').off, receptive_field(model, x, (3, 4), module='5').off)
    assert counts.ran == n


def test_receptive_field_in_one_and_three_dimensions():
    for nd in (1, 3):
        model, point = net(nd).train(), POINTS[nd][1]
        field = receptive_field(model, images(nd), point)
        assert field.on.shape == SIZES[nd] and field.on.sum().item() == pytest.approx(1, rel=1e-5)
        assert field.off[tuple(point)] > 0 and field.off.ne(0).sum() < field.on.ne(0).sum()


@pytest.mark.parametrize('bs', [2, 5])
def test_each_image_counts_alike(bs):
    "however steep the model is at it"
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), SelfAttention(8, gamma=1.), nn.Conv2d(8, 3, 3, padding=1))
    x = images(bs=bs, size=(7, 11)) * 2.**torch.arange(bs).view(-1, 1, 1, 1)
    field, alone = receptive_field(model, x, (5, 2), 1), [receptive_field(model, x[i:i+1], (5, 2), 1) for i in range(bs)]
    for name in ('on', 'off'):
        each = torch.stack([getattr(f, name) for f in alone])
        close(getattr(field, name), each.mean(0))
        assert (each[0] - each[-1]).abs().max() > .01


class Noisy(nn.Module):
    "Draws in eval mode too, and counts"
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(3, 1, 1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.mean += x.detach().mean((0, 2, 3))[:, None, None]
        return x * torch.rand_like(x) + self.mean

def test_both_passes_draw_the_same_and_nothing_is_drawn():
    model, x, point = nn.Sequential(Noisy(), SelfAttention(3, reduction=1), nn.Conv2d(3, 2, 3, padding=1)), images(size=(7, 11)), (5, 2)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    field = receptive_field(model, x, point)
    assert torch.equal(field.on, field.off)                        # gamma is 0
    assert torch.equal(torch.get_rng_state(), before) and model[0].calls == 0 and not model[0].mean.any()
    assert torch.equal(receptive_field(model, x, point).on, field.on)
    torch.rand(1)
    assert not torch.equal(receptive_field(model, x, point).on, field.on)


class Fails(nn.Module):
    "Raises at the pass `at`, which `count` counts: a look would put back a number of the module's own"
    def __init__(self, at, error, count): super().__init__(); self.at, self.error, self.count = at, error, count
    def forward(self, x):
        if next(self.count) == self.at: raise self.error('enough')
        return x

@pytest.mark.parametrize('at,error', [(1, RuntimeError), (2, KeyboardInterrupt)], ids=['with attention', 'without'])
def test_a_pass_that_fails_leaves_the_model_as_it_was(at, error):
    model = nn.Sequential(*mixed().train(), Noisy(), Fails(at, error, count := itertools.count(1)))
    model[-2] = nn.Sequential(nn.Conv2d(16, 3, 1), Noisy())
    model[:-1](images(size=(32, 48))).square().mean().backward()
    model[2].eval(), model[4].query.eval() if hasattr(model[4], 'query') else model[4].eval()
    before, rng = as_it_was(model), torch.get_rng_state()
    assert len(set(before[0]['modes'])) == 2
    with pytest.raises(error, match='enough'): receptive_field(model, images(size=(32, 48)), (3, 4))
    same(before, as_it_was(model))
    assert next(count) == at+1 and torch.equal(rng, torch.get_rng_state()) and not stance_is_forced()


@pytest.mark.parametrize('ran', [False, True])
def test_skips_of_a_unet_are_those_of_before(ran):
    torch.manual_seed(0)
    unet = DynamicUnet(small_encoder()[:-1], 2, (64, 96), self_attention=True).eval()
    for h in unet.sfs: h.stored = None
    if ran: unet(images(bs=1, size=(64, 96)))
    before = [h.stored for h in unet.sfs]
    assert all((b is not None) == ran for b in before)
    for bad in (None, 99):
        with contextlib.nullcontext() if bad is None else pytest.raises(ValueError, match='`channel` must be 0 to 1, got 99'):
            receptive_field(unet, images(bs=1, size=(64, 96)), (60, 5), bad)
        assert all(h.stored is b for h, b in zip(unet.sfs, before))
