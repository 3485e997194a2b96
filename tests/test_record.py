"`AttentionRecorder` against the formula: the right rows of `beta`, of the very pass that was watched, and nothing changed by watching"
import contextlib
import copy

import fastai.layers
import numpy as np
import pytest
import torch
from conftest import Largest
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from fastai_selfattn.layers import SelfAttention
from fastai_selfattn.record import AttentionRecorder, _cells, attention_layers

SIZES = {1: (42,), 2: (30, 42), 3: (6, 18, 30)}     # maps of a half and of a sixth of each side
POINTS = {1: [(0,), (41,), (17,)], 2: [(0, 0), (29, 41), (13, 31)], 3: [(0, 0, 0), (5, 17, 29), (2, 7, 23)]}

def net(nd=2):
    "Attention twice; its `u` and `v` are random, as loaded ones may be, so that each power iteration moves the weights"
    torch.manual_seed(5)
    conv, pool, norm = {1: (nn.Conv1d, nn.MaxPool1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.MaxPool3d, nn.BatchNorm3d)}[nd]
    model = nn.Sequential(conv(3, 24, 3, 2, 1), SelfAttention(24), nn.Dropout(.3), pool(3), conv(24, 8, 1), SelfAttention(8), norm(8))
    for layer, c in zip(attention_layers(model).values(), (24, 8)):
        layer.load_state_dict(fastai.layers.SelfAttention(c).state_dict())
        nn.init.constant_(layer.gamma, .7)
    return model

def images(nd=2, bs=2, seed=9): return torch.randn(bs, 3, *SIZES[nd], generator=torch.Generator().manual_seed(seed))

@contextlib.contextmanager
def inputs(model):
    "What goes into each attention layer"
    seen = {}
    def hook(name):
        def look(m, args): seen[name] = args[0].detach()
        return look
    handles = [m.register_forward_pre_hook(hook(name)) for name, m in attention_layers(model).items()]
    try: yield seen
    finally:
        for h in handles: h.remove()

def weight(conv, steps=0):
    "The spectrally normalised weight written out, after more power iterations"
    w, u, v = conv[0].weight_orig.detach().flatten(1), conv[0].weight_u, conv[0].weight_v
    for _ in range(steps):
        v = F.normalize(w.mT @ u, dim=0)
        u = F.normalize(w @ v, dim=0)
    return w / (u @ w @ v)

def beta(layer, x, steps=0):
    "Every row, (bs, *map, *map)"
    p = x.flatten(2)
    b = F.softmax((weight(layer.key, steps) @ p).mT @ (weight(layer.query, steps) @ p), dim=-1)
    return b.unflatten(1, x.shape[2:]).unflatten(-1, x.shape[2:])

def hooks(model):
    return {(name, k): list(v) for name, m in model.named_modules() for k, v in vars(m).items() if 'hook' in k and v}


@pytest.mark.parametrize('nd', [1, 2, 3])
@pytest.mark.parametrize('train', [True, False])
def test_maps_are_rows_of_beta_of_this_very_pass(nd, train):
    model, x = net(nd).train(train), images(nd)
    with inputs(model) as seen, AttentionRecorder(model, POINTS[nd]) as rec: model(x)
    assert list(rec.maps) == ['1', '5'] and rec.gammas == {'1': pytest.approx(.7), '5': pytest.approx(.7)}
    for (name, maps), stride in zip(rec.maps.items(), (2, 6)):
        assert maps.shape == (2, 3, *[s // stride for s in SIZES[nd]])
        rows = lambda steps: torch.stack([beta(model[int(name)], seen[name], steps)[(slice(None), *[x // stride for x in p])] for p in POINTS[nd]], 1)
        torch.testing.assert_close(maps, rows(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps.flatten(2).sum(-1), torch.ones(2, 3))
        if name == '1': assert (maps - rows(1)).abs().max() > 1e-4        # one power iteration more would be seen


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 97), st.integers(1, 61), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=3))
def test_a_point_lands_in_the_cell_that_covers_it(sides):
    image, grid = [i for i, _, _ in sides], [m for _, m, _ in sides]
    point = [int(at * i) for i, _, at in sides]
    idx, = _cells([point], image, grid)
    for x, i, m, cell in zip(point, image, grid, np.unravel_index(idx, grid)): assert cell * i <= x * m < (cell + 1) * i     # of the m-th parts of i pixels


@pytest.mark.parametrize('image,grid', [((30, 42), (5, 7)), ((31, 41), (5, 7)), ((9, 4), (9, 4)), ((4, 6), (8, 18))], ids=str)
def test_cells_share_out_the_image(image, grid):
    idxs = torch.tensor(_cells([(r, c) for r in range(image[0]) for c in range(image[1])], image, grid)).view(image)
    want = F.interpolate(torch.arange(grid[0] * grid[1], dtype=torch.float64).view(1, 1, *grid), image, mode='nearest')[0, 0]
    assert torch.equal(idxs, want.long())


def training_step(record):
    model = net().train()
    model[3].eval()
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    with AttentionRecorder(model, POINTS[2]) if record else contextlib.nullcontext():
        y = model(images())
        y.pow(2).mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    opt.step()
    return [y.detach(), *grads, *model.state_dict().values(), torch.get_rng_state()], [m.training for m in model.modules()]

def test_a_training_step_is_the_same_bit_by_bit():
    (plain, modes), (watched, modes_after) = training_step(False), training_step(True)
    assert len(plain) == len(watched) > 30 and all(torch.equal(a, b) for a, b in zip(plain, watched)) and modes == modes_after


def test_bfloat16_autocast():
    model, x = net().eval(), images()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        want = model(x)
        with inputs(model) as seen, AttentionRecorder(model, POINTS[2]) as rec: got = model(x)
        q, k = (F.conv1d(seen['1'].flatten(2), getattr(model[1], n)[0].weight) for n in ('key', 'query'))
    assert q.dtype == torch.bfloat16 and torch.equal(got, want)
    rows = F.softmax(q.float().mT @ k.float(), -1)[:, [0, 14 * 21 + 20, 6 * 21 + 15]]
    torch.testing.assert_close(rec.maps['1'].flatten(2), rows, rtol=1e-4, atol=1e-6)
    for maps in rec.maps.values():
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(2, 3), rtol=1e-5, atol=0)      # bfloat16 is good for 1e-2


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_results_are_float32_and_hold_no_graph(dtype):
    model = net().to(dtype)
    with AttentionRecorder(model, POINTS[2]) as rec: model(images().to(dtype))
    assert {(m.dtype, m.device.type, m.requires_grad, m.grad_fn) for m in rec.maps.values()} == {(torch.float32, 'cpu', False, None)}
    assert {type(g) for g in rec.gammas.values()} == {float}


class Fails(nn.Module):
    def __init__(self, error): super().__init__(); self.error = error
    def forward(self, x): raise self.error

def succeed(model): model(images())
def fail_in_forward(model): model(torch.randn(2, 5, 30, 42))
def fail_after_attention(model): model.append(Fails(RuntimeError('no memory')))(images())
def interrupt(model): model.append(Fails(KeyboardInterrupt()))(images())
def fail_in_body(model): model(images()); raise IndexError
def point_off_image(model): model(images()[..., :20])

@pytest.mark.parametrize('act,error', [(succeed, None), (fail_in_forward, RuntimeError), (fail_after_attention, RuntimeError), (interrupt, KeyboardInterrupt),
                                       (fail_in_body, IndexError), (point_off_image, ValueError)])
def test_hooks_are_gone_however_it_ends(act, error):
    model = net().eval()
    before, want = hooks(model), model(images())
    with pytest.raises(error) if error else contextlib.nullcontext():
        with AttentionRecorder(model, POINTS[2]) as rec: act(model)
    del model[7:]
    assert hooks(model) == before
    kept = copy.deepcopy(rec.maps)
    assert torch.equal(model(images()), want)
    assert list(rec.maps) == list(kept) and all(torch.equal(m, kept[n]) for n, m in rec.maps.items())


def test_nested_and_used_again():
    model, x = net().eval(), images()
    before = hooks(model)
    with AttentionRecorder(model, POINTS[2]) as outer:
        with AttentionRecorder(model, [(13, 31)]) as inner: model(x)
        seen = {n: m.clone() for n, m in inner.maps.items()}
        for n, m in seen.items(): assert torch.equal(m, outer.maps[n][:, 2:])
        model(x.flip(0))                                   # outer still looks, inner no more
        for n, m in seen.items(): assert torch.equal(m, inner.maps[n]) and not torch.equal(m, outer.maps[n][:, 2:])
    with inner: model(x.flip(0))
    for n, m in inner.maps.items(): assert torch.equal(m, outer.maps[n][:, 2:])
    assert hooks(model) == before


def test_the_last_forward_pass_wins():
    model, x = net().eval(), images()
    with AttentionRecorder(model, POINTS[2]) as rec:
        model(images(bs=3, seed=1).repeat(1, 1, 2, 1))     # larger, and more of them
        assert rec.maps['5'].shape == (3, 3, 10, 7)
        nn.init.constant_(model[5].gamma, -.2)
        model(x)
    with AttentionRecorder(model, POINTS[2]) as once: model(x)
    assert all(torch.equal(m, rec.maps[n]) for n, m in once.maps.items()) and rec.gammas == once.gammas == {'1': pytest.approx(.7), '5': pytest.approx(-.2)}
    class Skips(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x, whole): return self.net(x) if whole else self.net[0](x)
    model = Skips()
    with AttentionRecorder(model, POINTS[2]) as rec: model(x, True), model(x, False)
    assert rec.maps == rec.gammas == {}                    # not those of the pass before


def test_no_tensor_of_n_by_n():
    n, layer, x = 48 * 48, SelfAttention(16), torch.randn(1, 16, 48, 48)
    with Largest() as largest, AttentionRecorder(layer, [(i, 2 * i) for i in range(11)]): layer(x)
    with Largest() as whole: layer.attention_weights(x, range(n))
    assert largest.numel <= n * n / 8 and whole.numel >= n * n     # the measure sees it where it is


class Around(nn.Module):
    "A model that calls its layer by place or by keyword"
    def __init__(self, keyword): super().__init__(); self.attn, self.keyword = SelfAttention(8), keyword
    def forward(self, flag=None, *, x): return self.attn(x=x) if self.keyword else self.attn(x)

@pytest.mark.parametrize('model,kwargs', [(Around(False), {}), (Around(False), dict(flag=None)), (Around(True), {}), (SelfAttention(8), {})],
                         ids=['model', 'model and flag', 'model and layer', 'the layer alone'])
def test_called_by_keyword(model, kwargs):
    x = torch.randn(2, 8, 5, 7)
    with AttentionRecorder(model, [(3, 4)]) as rec: model(**kwargs, x=x)
    (name, layer), = attention_layers(model).items()
    torch.testing.assert_close(rec.maps[name][:, 0], beta(layer, x)[:, 3, 4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('points', [torch.tensor([[13, 31], [29, 0]]), [np.int64([13, 31]).tolist(), (np.int32(29), 0)], ((13, 31), [29, 0])], ids=['tensor', 'numpy', 'tuple'])
def test_ways_to_give_points(points):
    model = net().eval()
    with AttentionRecorder(model, points) as rec: model(images())
    with AttentionRecorder(model, [(13, 31), (29, 0)]) as want: model(images())
    assert all(torch.equal(m, want.maps[n]) for n, m in rec.maps.items())


@pytest.mark.parametrize('points,says', [
    ([], 'at least one point, got'), (None, 'at least one point, got None'), ('ab', "got 'ab'"), (torch.tensor(3), 'at least one point'), ({(0, 0)}, 'must be a list'),
    ((3, 4), 'whole image pixels, got 3'), ([(0, 0), ()], r'got \(\)'), ([(1., 2)], r'got \(1.0, 2\)'), (torch.ones(2, 2), r'got \[1.0, 1.0\]'),
    ([(True, 0)], r'got \(True, 0\)'), ([('1', 0)], r"got \('1', 0\)"), (['ab'], "got 'ab'")], ids=str)
def test_bad_points_are_named(points, says):
    with pytest.raises(ValueError, match=says): AttentionRecorder(net(), points)


@pytest.mark.parametrize('point', [(30, 0), (0, 42), (-1, 0), (0, -1), (3,), (3, 4, 5), (41, 29)], ids=str)
def test_a_point_off_the_image_is_named_and_nothing_runs(point):
    model, x = net(), images()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'\) is not on the image of 30x42 pixels: give \(row, col\) from \(0, 0\) to \(29, 41\)') as e:
        with AttentionRecorder(model, [(0, 0), point]): model(x)
    assert str(point) in str(e.value)
    for n, v in model.state_dict().items(): assert torch.equal(v, before[n])


def test_a_map_that_points_cannot_be_placed_on():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), SelfAttention(8))
    with pytest.raises(ValueError, match=r'2 sees a map of size \(1260,\), the image has size \(30, 42\)'):
        with AttentionRecorder(model, [(0, 0)]): model(images())


def test_no_image_among_the_arguments():
    class Stacks(nn.Module):
        def __init__(self): super().__init__(); self.attn = SelfAttention(3)
        def forward(self, xs): return self.attn(torch.stack(xs))
    model = Stacks()
    with pytest.raises((TypeError, ValueError), match='tensor'):
        with AttentionRecorder(model, [(0, 0)]): model(list(images()))


@pytest.mark.parametrize('model', [nn.Sequential(nn.Conv2d(3, 8, 1)), nn.Sequential(fastai.layers.SelfAttention(8))], ids=['none', "only fastai's"])
def test_a_model_without_our_layer(model):
    assert attention_layers(model) == {}
    with pytest.raises(ValueError, match='no attention layer in this Sequential.*self_attention=True'): AttentionRecorder(model, [(0, 0)])
