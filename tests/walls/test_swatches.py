"Paint by swatch: pictures whose answer is in them, marks that tell right from wrong, and a net that sees little"
import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from torch import nn

import fastai_selfattn.walls.swatches as S
from fastai_selfattn.all import AttentionRecorder, SelfAttention, attention_explorer, attention_layers, insert_attention
from fastai_selfattn.walls.rooms import render_room
from fastai_selfattn.walls.swatches import (ColourConv, SwatchNet, SwatchPSNR, psnr, swatch_dls, swatch_errors, swatch_example, swatch_learner, swatch_mask,
                                            swatch_weights, weight_on)

FORMS = [('flat', 40), ('flat', 17), ('rooms', 48)]


# --- paints and swatches

def test_mixed_paints_are_as_light_as_asked():
    rng = np.random.default_rng(0)
    paint,grey = rng.random((7, 3)),rng.random(7)
    mixed = S._mixed(paint, grey)
    assert mixed@S._luma == pytest.approx(grey, abs=1e-6) and mixed.min() >= 0 and mixed.max() <= 1
    for p,m in zip(paint, mixed): assert np.linalg.matrix_rank(np.stack([p, m, np.ones(3)]), tol=1e-6) == 2     # paint, mixture, and white or black: one plane

def test_paints_of_a_picture_are_strong_and_tell_themselves_apart_by_lightness():
    for seed in range(30):
        paints = S._paints(np.random.default_rng(seed), 2 + seed%7)
        light = np.sort(paints@S._luma)
        assert np.diff(light).min() > .4*.76/len(paints) - 1e-6 and .12 < light[0] and light[-1] < .88
        assert np.ptp(paints, 1).min() > .2

def test_swatch_lies_where_there_is_most_room():
    paint = np.zeros((20, 31), int)
    paint[:,10:] = 1
    paint[3:6,14:25] = 2      # 3 high: no disc fits, so all is in the middle row
    for seed in range(5):
        swatch = S._swatches(paint, np.random.default_rng(seed))
        for k,n in ((0, 29), (1, 29)): assert (swatch & (paint == k)).sum() == n
        rows,cols = np.nonzero(swatch & (paint == 2))
        assert set(rows) == {3, 4, 5} and 5 <= (rows == 4).sum() <= 7
    places = {tuple(np.argwhere(S._swatches(paint, np.random.default_rng(s)) & (paint == 1))[0]) for s in range(8)}
    assert len(places) > 4


# --- examples

@pytest.mark.parametrize('form,size', FORMS)
def test_the_picture_says_all_that_the_target_needs(form, size):
    for seed in range(12):
        e = swatch_example(seed, form, size)
        assert [a.shape for a in e] == [(size, size, 3), (size, size, 3), (size, size), (size, size)]
        assert [a.dtype for a in e] == [np.uint8, np.uint8, np.int8, bool]
        spread = np.ptp(e.picture, 2)
        assert ((spread > 0) == e.swatch).all() and spread[e.swatch].min() >= 8
        assert (e.picture[e.swatch] == e.target[e.swatch]).all()
        assert set(e.paint[e.swatch]) == set(e.paint[e.paint >= 0]) and len(set(e.paint[e.swatch])) >= 1
        assert not np.ptp(e.target, 2)[e.paint < 0].any()

def test_flat_surfaces_have_one_colour_each_and_noisy_grey():
    for seed in range(12):
        e = swatch_example(seed)
        assert (e.paint >= 0).all()
        for k in np.unique(e.paint):
            hidden = (e.paint == k) & ~e.swatch
            assert not np.ptp(e.target[e.paint == k], 0).any()
            grey = e.picture[hidden][:,0]/255.
            if hidden.sum() > 150: assert grey.std() == pytest.approx(.04, rel=.25) and grey.mean() == pytest.approx((e.target[hidden][0]/255.)@S._luma, abs=.015)

def test_number_of_paints_and_pairings_differ():
    paints = [len(set(swatch_example(i).paint.flat)) for i in range(60)]
    assert min(paints) <= 3 and max(paints) == 8
    middle = [e.target[e.paint == e.paint[20,20]][0] for e in map(swatch_example, range(60))]
    assert np.corrcoef(np.ptp(middle, 1), np.array(middle)@S._luma)[0,1] < .5 and len({tuple(m) for m in middle}) == 60

def test_a_room_is_painted_in_its_own_colours_and_the_rest_stays_grey():
    e,(photo,_,material) = swatch_example(3, 'rooms', 48),render_room(3, 48, paints=True)
    assert (e.target[e.paint >= 0] == photo[e.paint >= 0]).all()
    for k in set(e.paint[e.paint >= 0]): assert len(set(material[e.paint == k])) == 1 and (e.paint == k).mean() >= .02
    assert (e.paint[material == -1] == -1).all()

def test_a_paint_without_colour_gets_no_swatch():
    target = np.full((9, 12, 3), 200, np.uint8)
    target[:,6:] = 90,120,60
    target[:,6] = 100                                    # a grey edge of the coloured paint
    grey,paint = np.full((9, 12), 77, np.uint8),np.repeat([0, 1], 6)[None].repeat(9, 0)
    new,_,numbers,swatch = S._without_dull(target, grey, paint, np.ones((9, 12), bool))
    assert (numbers[:,:6] == -1).all() and (new[:,:6] == 77).all() and not swatch[:,:6].any()
    assert (numbers[:,6:] == 1).all() and (new[:,6:] == target[:,6:]).all() and swatch[:,7:].all() and not swatch[:,6].any()

def test_same_seed_same_example_that_nobody_can_spoil():
    a = swatch_example(5)
    S._example.cache_clear()
    assert all((p == q).all() for p,q in zip(a, swatch_example(np.int64(5))))
    with pytest.raises(ValueError): a.picture[0,0] = 0

@pytest.mark.parametrize('kw,error,match', [(dict(form='round'), ValueError, "'flat' or 'rooms', got 'round'"), (dict(seed=-1), ValueError, 'seed'),
    (dict(seed='7'), TypeError, "'7'"), (dict(size=15), ValueError, '16 or more'), (dict(size=40.), TypeError, '40.0')])
def test_bad_examples(kw, error, match):
    with pytest.raises(error, match=match): swatch_example(**{'seed':0, **kw})


# --- DataLoaders and metric

@pytest.fixture(scope='module')
def dls(): return swatch_dls(n=10, n_valid=5, size=20, bs=4)

def as_tensor(a): return torch.tensor(np.array(a)).permute(2, 0, 1)/255

def test_items_are_seeds_and_none_is_in_both_parts(dls):
    assert list(dls.train_ds.items) == list(range(1000, 1010)) and list(dls.valid_ds.items) == list(range(5))
    other = swatch_dls(n=10, n_valid=7, size=20, bs=4, seed=3)
    assert list(other.train_ds.items) == list(range(1030, 1040)) and list(other.valid_ds.items) == list(range(7))
    x,y = dls.valid.one_batch()
    for i in range(4):
        e = swatch_example(i, size=20)
        assert torch.allclose(x[i].cpu(), as_tensor(e.picture)) and torch.allclose(y[i].cpu(), as_tensor(e.target))
        assert (swatch_mask(x)[i].cpu().numpy() == e.swatch).all()

@pytest.mark.parametrize('kw,error,match', [(dict(n=3), ValueError, 'batch of 8 cannot be filled from 3'), (dict(n_valid=1001), ValueError, '1000 or less'),
    (dict(n=0), ValueError, '`n`'), (dict(seed=-1), ValueError, '`seed`'), (dict(form='walls'), ValueError, 'walls'), (dict(size='big'), TypeError, 'size')])
def test_bad_dls(kw, error, match):
    with pytest.raises(error, match=match): swatch_dls(**kw)

class Halves(nn.Module):
    "Halves all; has a parameter, as a Learner needs one"
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(.5))
    def forward(self, x): return x*self.by

def test_psnr_is_that_of_hidden_pixels_over_all_batches(dls):
    "Five pictures in batches of four and one, so that a mean of means would be off"
    learn = Learner(dls, Halves(), loss_func=MSELossFlat(), metrics=SwatchPSNR())
    with learn.no_bar(), learn.no_logging(): found = learn.validate()[1]
    examples = [swatch_example(i, size=20) for i in range(5)]
    off = np.concatenate([((e.picture/510 - e.target/255)**2).mean(-1)[~e.swatch] for e in examples])
    assert found == pytest.approx(-10*np.log10(off.mean()), abs=1e-4)
    assert swatch_errors(learn, examples).mse.to_numpy() == pytest.approx(off, abs=1e-6)
    assert SwatchPSNR().name == 'psnr' and psnr(.001) == pytest.approx(30)


# --- the net

def test_conv_sees_colour_as_a_fourth_channel():
    torch.manual_seed(2)
    x,conv = torch.rand(2, 1, 5, 7).repeat(1, 3, 1, 1),ColourConv(11)
    x[1,0,3,2] += .1
    mask = torch.zeros(2, 1, 5, 7)
    mask[1,0,3,2] = 1
    weight = torch.cat([conv.picture[0].weight, conv.mask[0].weight], 1)
    assert torch.allclose(conv(x), torch.conv2d(torch.cat([x, mask], 1), weight, padding=1), atol=1e-6)

def test_the_net_sees_eight_pixels_to_each_side_and_attention_all():
    torch.manual_seed(0)
    model,x = SwatchNet().eval(),torch.rand(1, 3, 40, 40, requires_grad=True)
    def reach():
        x.grad = None
        for at in ((20, 20), (21, 21)): model(x)[0,:,at[0],at[1]].sum().backward()
        seen = x.grad[0].abs().sum(0).nonzero()
        return seen.min().item(),seen.max().item()
    first,last = reach()
    assert 20-9 <= first <= 20-7 and 21+7 <= last <= 21+9
    model.middle.append(SelfAttention(48, gamma=1.).eval())
    assert reach() == (0, 39)

def test_plain_net_is_small_and_takes_odd_sides():
    assert 60_000 < sum(p.numel() for p in SwatchNet().parameters()) < 70_000
    assert SwatchNet(16)(torch.rand(2, 3, 15, 22)).shape == (2, 3, 15, 22)

def test_insert_attention_goes_behind_the_middle(capsys):
    model = SwatchNet()
    before = set(model.state_dict())
    assert insert_attention(model, 'middle', size=20, gamma=1.) == ['middle.1']
    assert model.middle[1].gamma == 1 and model.middle[1].n_channels == 48 and before < set(model.state_dict())
    assert '10x10' in capsys.readouterr().out

def test_learners(dls):
    learn,plain = swatch_learner(dls, gamma=1., reduction=4),swatch_learner(dls, self_attention=False)
    assert list(attention_layers(learn.model)) == ['middle.1'] and not attention_layers(plain.model)
    assert learn.model.middle[1].gamma == 1 and hasattr(learn, 'gamma_logger') and not hasattr(plain, 'gamma_logger')
    with pytest.raises(TypeError, match='gamma: options of attention'): swatch_learner(dls, False, gamma=1.)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert len(learn.gamma_logger.history) == 3 and learn.recorder.metric_names[3] == 'psnr'

def test_tools_take_seeds(dls, tmp_path):
    learn = swatch_learner(dls, gamma=1.)
    axs = learn.show_attention([7], points=[(3, 16), (9, 2)])
    assert axs.shape == (1, 3)
    shown = axs[0,0].images[0].get_array()
    assert np.allclose(shown, swatch_example(7, size=20).picture/255)
    assert attention_explorer(learn, [7, 8], tmp_path/'a.html').path.exists()


# --- marks

def test_errors_know_distance_and_paints():
    paint = np.zeros((6, 9), np.int8)
    paint[:,5:],paint[5] = 3,-1
    swatch = np.zeros((6, 9), bool)
    swatch[1,1:4] = swatch[4,8] = True
    e = S.SwatchExample(np.zeros((6, 9, 3), np.uint8), np.full((6, 9, 3), 51, np.uint8), paint, swatch)
    df = swatch_errors(Halves(), [e, e])
    assert list(df.columns) == ['picture', 'paints', 'distance', 'mse'] and len(df) == 2*(54 - 4)
    assert (df.paints == 2).all() and df.mse.to_numpy() == pytest.approx(.04) and df.picture.value_counts().to_dict() == {0: 50, 1: 50}
    far = np.full((6, 9), 99.)
    far[~swatch] = df.distance[:50]
    assert far[0,2] == 1 and far[1,0] == 2 and far[4,6] == 2 and far[0,5] == 5 and np.isnan(far[5]).all()

def test_weight_on_counts_cells_that_show_any_of_the_mask():
    maps = torch.tensor([[[.1, .2, .3], [.05, .15, .2]], [[0, 1., 0], [0, 0, 0]]])
    mask = np.zeros((4, 9), bool)
    mask[1,5] = mask[2,6] = True                  # cells of 2 x 3 pixels: (0, 1) and (1, 2)
    assert weight_on(maps, mask).tolist() == pytest.approx([.4, 1])
    assert weight_on(maps[None,:,None], mask).shape == (1, 2, 1)

class Asks(nn.Module):
    "Attention in which every pixel looks for pictures' pixels of its own grey"
    def __init__(self, sharp):
        super().__init__()
        self.attention = SelfAttention(8, reduction=4, norm_type=None, gamma=1.)
        for conv in (self.attention.query[0], self.attention.key[0]):
            nn.init.zeros_(conv.weight)
            conv.weight.data[0,0],conv.weight.data[1,1] = sharp,sharp
    def forward(self, x):
        light = (x.mean(1) - .5)*torch.pi
        return self.attention(torch.stack([light.cos(), light.sin(), *[0*light]*6], 1))[:,:3]

def test_weights_mark_a_look_up_and_an_even_map():
    "Two paints and a third without a swatch; each cell is one pixel"
    e = S.SwatchExample(np.zeros((6, 10, 3), np.uint8), np.zeros((6, 10, 3), np.uint8), np.repeat(np.int8([0, 1, -1]), [3, 5, 2])[None].repeat(6, 0), np.zeros((6, 10), bool))
    e.picture[:] = np.choose(e.paint + 1, [240, 20, 130])[...,None]
    e.swatch[2,1] = e.swatch[1:3,6:8] = True
    even,found = (swatch_weights(Asks(sharp), [e, e]) for sharp in (0., 30.))
    assert list(even.columns) == ['layer', 'picture', 'own_swatch', 'even_swatch', 'own_paint', 'even_paint'] and list(even.layer) == ['attention']*2
    share = (18*1 + 30*4)/48/60,(18*18 + 30*30)/48/60         # of query pixels with paint 0 and 1
    assert even.own_swatch[0] == pytest.approx(share[0], abs=1e-6) and even.own_paint[1] == pytest.approx(share[1], abs=1e-6)
    assert found.even_swatch[0] == pytest.approx(share[0], abs=1e-6) and found.even_paint[0] == pytest.approx(share[1], abs=1e-6)
    assert found.own_paint[0] == pytest.approx(1, abs=1e-4) and found.own_swatch[0] == pytest.approx((18*1/18 + 30*4/30)/48, abs=1e-3)

def test_weights_agree_with_a_recorder(dls):
    torch.manual_seed(1)
    learn,e = swatch_learner(dls, gamma=1., norm_type=None),swatch_example(2, size=20)
    cells = [(2*i+1, 2*j+1) for i in range(10) for j in range(10)]
    with AttentionRecorder(learn.model.eval(), cells, stats=False) as rec, torch.no_grad(): learn.model(as_tensor(e.picture)[None])
    maps = rec.maps['middle.1'][0]
    on = [weight_on(m, e.swatch & (e.paint == e.paint[c])).item() for m,c in zip(maps, cells)]
    assert swatch_weights(learn, [e]).own_swatch[0] == pytest.approx(np.mean(on), abs=1e-5)
