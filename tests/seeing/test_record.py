"`record` against the formula: maps and statistics of the very pass that was watched, by any layer, and nothing changed by watching"
import contextlib
import copy
import math
import random
import threading

import fastai.layers
import numpy as np
import pytest
import torch
from conftest import Largest, named
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from fastai.vision.models import resnet18
from hypothesis import given, settings, strategies as st
from formulas import written_out
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel
from watched import POINTS, SIZES, as_it_was, close, hooks, images, marked, mixed, net, stance_is_forced, to_marked, with_gamma

from fastai_selfattn.placement.insert import insert_attention
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention
from fastai_selfattn.attention.ops import AttentionStats
from fastai_selfattn.attention.kinds import attention_layers, attention_off, choose_layers, has_map
from fastai_selfattn.quiet import bare_model
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.seeing.points import cells_of
from fastai_selfattn.seeing.record import AttentionRecorder, change_share
from fastai_selfattn.placement.unet import create_unet_model

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
    "Every row, (bs, *map, *map); of a pooled layer of fastai's (bs, *map, *pooled map)"
    if isinstance(layer, fastai.layers.PooledSelfAttention2d):
        q, k = (F.conv2d(x, weight(c, steps)[..., None, None]) for c in (layer.query, layer.key))
        k = k.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
        return F.softmax(q.flatten(2).mT @ k.flatten(2), dim=-1).unflatten(1, q.shape[2:]).unflatten(-1, k.shape[2:])
    p = x.flatten(2)
    b = F.softmax((weight(layer.key, steps) @ p).mT @ (weight(layer.query, steps) @ p), dim=-1)
    return b.unflatten(1, x.shape[2:]).unflatten(-1, x.shape[2:])

def rows(b, points, image):
    "Of every row those of `points`, (bs, points, *map)"
    size = b.shape[1:1 + len(image)]
    return torch.stack([b[(slice(None), *[x * m // i for x, m, i in zip(p, size, image)])] for p in points], 1)

def saw_the_same(a, b):
    for field in ('maps', 'changes', 'stats', 'queries', 'keys'):
        x, y = getattr(a, field), getattr(b, field)
        assert x.keys() == y.keys(), field
        for n in x: close(x[n], y[n], rtol=1e-4, atol=1e-5, msg=lambda m: f'{field} of {n}: {m}')
    assert (a.gammas, a.sizes, a.pools) == (b.gammas, b.sizes, b.pools)


# maps

@pytest.mark.parametrize('nd', [1, 2, 3])
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_maps_are_rows_of_beta_of_this_very_pass(nd, train):
    model, x = net(nd).train(train), images(nd)
    with inputs(model) as seen, AttentionRecorder(model, POINTS[nd]) as rec: model(x)
    assert list(rec.maps) == ['1', '5'] and rec.gammas == {'1': pytest.approx(.7), '5': pytest.approx(.7)}
    for (name, maps), stride in zip(rec.maps.items(), (2, 6)):
        size = tuple(s // stride for s in SIZES[nd])
        assert maps.shape == (2, 3, *size) and rec.sizes[name] == size and rec.pools[name] == 1
        of = lambda steps: rows(beta(model[int(name)], seen[name], steps), POINTS[nd], SIZES[nd])
        close(maps, of(0), rtol=1e-4, atol=1e-6)
        close(maps.flatten(2).sum(-1), torch.ones(2, 3))
        if name == '1': assert (maps - of(1)).abs().max() > 1e-4        # one power iteration more would be seen


@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_maps_of_fastais_layers_are_rows_of_beta_of_this_very_pass(train):
    model, x, points = mixed().train(train), images(size=(32, 48)), [(0, 47), (31, 0), (13, 30)]
    own = {}                                                            # the weights that this very pass made
    def keep(m, args, out): own.setdefault(m, m.weight)
    convs = [model[int(i)].get_submodule(c)[0] for i in (2, 3, 9) for c in ('query', 'key', 'value')]
    handles = [c.register_forward_hook(keep) for c in convs]
    with inputs(model) as seen, AttentionRecorder(model, points) as rec: model(x)
    for h in handles: h.remove()
    assert list(rec.maps) == list(rec.stats) == ['1', '2', '3', '9'] and list(rec.changes) == ['1', '2', '3', '4', '5', '9']
    assert rec.sizes == {'1': (16, 24), '2': (16, 24), '3': (16, 24), '9': (8, 12)} and rec.pools == {'1': 1, '2': 1, '3': 2, '9': 1}
    for name in ('2', '3', '9'):
        maps, layer = rec.maps[name], model[int(name)]
        assert maps.shape == (2, 3, *((8, 12) if name in '39' else (16, 24)))
        close(maps, rows(beta(layer, seen[name]), points, (32, 48)), rtol=1e-4, atol=1e-6)
        close(maps.flatten(2).sum(-1), torch.ones(2, 3))
        if name == '2': assert (maps - rows(beta(layer, seen[name], 1), points, (32, 48))).abs().max() > 1e-4
    for c in convs: assert c.weight is own[c] and c.weight.requires_grad
    assert rec.gammas == {n: pytest.approx(m.gamma.item()) for n, m in attention_layers(model).items()}


@pytest.mark.parametrize('cls', [fastai.layers.SelfAttention, fastai.layers.PooledSelfAttention2d])
@pytest.mark.parametrize('name', ['query', 'key'])
def test_weights_and_modes_are_put_back_when_a_look_fails(cls, name):
    layer, calls, own = cls(16), [], {}
    def second(m, args, out):
        calls.append(m)
        if len(calls) == 2: raise KeyboardInterrupt
    def keep(m, args, out): own.setdefault(m, m.weight)
    for c in ('query', 'key', 'value'): layer.get_submodule(c)[0].register_forward_hook(keep)
    layer.get_submodule(name).register_forward_hook(second)
    layer.value.eval()
    modes = [m.training for m in layer.modules()]
    with pytest.raises(KeyboardInterrupt), AttentionRecorder(layer): layer(torch.randn(2, 16, 6, 4))
    assert len(calls) == 2 and len(own) == 3 and all(m.weight is w for m, w in own.items()) and modes == [m.training for m in layer.modules()]


@pytest.mark.parametrize('make', [lambda: SelfAttention(16), lambda: SelfAttention(16, reduction=4, heads=2, pool=3), lambda: PooledSelfAttention2d(16), lambda: PaperSelfAttention(16, reduction=4, heads=4)], ids=['plain', 'heads and pool', 'pooled', 'paper'])
@pytest.mark.parametrize('size', [(9, 14), (8, 5)], ids=named)
def test_heads_and_pools_are_as_the_layer_weighs(make, size):
    torch.manual_seed(2)
    image = tuple(2 * s for s in size)
    layer = with_gamma(make())
    model, points = nn.Sequential(nn.Conv2d(3, 16, 2, 2), layer), [(0, 0), (image[0] - 1, image[1] - 1), (5, 4), (4, 9)]
    for conv in ('query', 'key'): nn.init.normal_(getattr(layer, conv)[0].weight_orig)
    layer.gamma.data.fill_(1.)
    model[0].weight.data.mul_(6)
    with inputs(model) as seen, AttentionRecorder(model, points, vectors=True) as rec: model(images(size=image))
    b = written_out(layer, seen['1'], weights=True).detach()
    pooled = tuple(math.ceil(s / layer.pool) for s in size)
    cells = [r // 2 * size[1] + c // 2 for r, c in points]
    assert rec.maps['1'].shape == (2, 4, *pooled) and rec.pools == {'1': layer.pool} and rec.sizes == {'1': size}
    close(rec.maps['1'].flatten(2), b.mean(1)[:, cells], rtol=1e-4, atol=1e-6)
    assert rec.queries['1'].shape == (2, layer.heads, *size, 16 // layer.reduction // layer.heads) and rec.keys['1'].shape == (2, layer.heads, *pooled, 16 // layer.reduction // layer.heads)
    again = F.softmax(rec.queries['1'].flatten(2, 3) @ rec.keys['1'].flatten(2, 3).mT, -1)
    close(again, b, rtol=1e-4, atol=1e-6)
    compare_stats(rec.stats['1'], b, size, image, layer.pool)


def test_vectors_of_fastais_layers_give_the_maps():
    model, x = mixed().eval(), TensorImage(images(size=(32, 48)))
    with inputs(model) as seen, AttentionRecorder(model, None, stats=False, vectors=True) as rec: model(x)
    assert rec.maps == rec.stats == {} and list(rec.queries) == list(rec.keys) == ['1', '2', '3', '9']
    for n in rec.queries:
        q, k = rec.queries[n], rec.keys[n]
        assert type(q) is type(k) is torch.Tensor and q.dtype == k.dtype == torch.float32
        assert q.shape[1] == 1 and k.shape[2:-1] == tuple(s // rec.pools[n] for s in rec.sizes[n])
        close(F.softmax(q.flatten(2, 3) @ k.flatten(2, 3).mT, -1)[:, 0], beta(model[int(n)], seen[n].as_subclass(torch.Tensor)).flatten(3).flatten(1, 2), rtol=1e-4, atol=1e-6)


# points

@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 97), st.integers(1, 61), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=3))
def test_a_point_lands_in_the_cell_that_covers_it(sides):
    image, grid = [i for i, _, _ in sides], [m for _, m, _ in sides]
    point = [int(at * i) for i, _, at in sides]
    idx, = cells_of([point], image, grid)
    for x, i, m, cell in zip(point, image, grid, np.unravel_index(idx, grid)): assert cell * i <= x * m < (cell + 1) * i     # of the m-th parts of i pixels


@pytest.mark.parametrize('image,grid', [((30, 42), (5, 7)), ((31, 41), (5, 7)), ((9, 4), (9, 4)), ((4, 6), (8, 18))], ids=named)
def test_cells_share_out_the_image(image, grid):
    idxs = torch.tensor(cells_of([(r, c) for r in range(image[0]) for c in range(image[1])], image, grid)).view(image)
    want = F.interpolate(torch.arange(grid[0] * grid[1], dtype=torch.float64).view(1, 1, *grid), image, mode='nearest')[0, 0]
    assert torch.equal(idxs, want.long())


def seen_points(points, x=None, **kwargs):
    x = images() if x is None else x
    layer = SelfAttention(3)
    with AttentionRecorder(layer, points, **kwargs) as rec: layer(x)
    with AttentionRecorder(layer, rec.points, stats=False) as want: layer(x)
    assert torch.equal(rec.maps[''], want.maps[''])
    return rec.points

def test_points_that_the_recorder_chooses():
    assert seen_points('center') == [(15, 21)] and seen_points('center', images(3)) == [(3, 9, 15)]
    assert seen_points('grid') == [(r, c) for r in (5, 15, 25) for c in (7, 21, 35)]
    assert seen_points('grid', images(size=(1, 2))) == [(0, 0), (0, 1)]
    assert len(seen_points('grid', images(3))) == 27
    with AttentionRecorder(SelfAttention(3)) as rec: rec.model(images()), rec.model(images(size=(5, 9)))
    assert rec.points == [(2, 4)]                                       # of the last image


def test_random_points_have_a_seed_and_leave_the_global_state():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    x, layer = images(), net()
    def drawn(n, **kwargs):
        with AttentionRecorder(layer, n, stats=False, **kwargs) as rec: layer.eval()(x)
        assert rec.maps['1'].shape[1] == len(rec.points) == n
        return rec.points
    torch.set_rng_state(before[2])
    a = drawn(7)
    assert a == drawn(7) == drawn(np.int64(7), seed=0) and a != drawn(7, seed=1) and len(set(a)) == 7 and drawn(1260) != sorted(drawn(1260)) and len(set(drawn(1260))) == 1260
    assert {r < 15 for r, _ in drawn(40)} == {c < 21 for _, c in drawn(40)} == {True, False} and max(c for _, c in drawn(40)) > 29
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2] and torch.equal(torch.get_rng_state(), before[2])
    with pytest.raises(ValueError, match='1261 different points cannot be drawn from the image of 30x42 pixels'): drawn(1261)


@pytest.mark.parametrize('points', [torch.tensor([[13, 31], [29, 0]]), [np.int64([13, 31]).tolist(), (np.int32(29), 0)], ((13, 31), [29, 0])], ids=['tensor', 'numpy', 'tuple'])
def test_ways_to_give_points(points):
    model = net().eval()
    with AttentionRecorder(model, points) as rec: model(images())
    with AttentionRecorder(model, [(13, 31), (29, 0)]) as want: model(images())
    assert all(torch.equal(m, want.maps[n]) for n, m in rec.maps.items())


@pytest.mark.parametrize('points,says', [
    ([], r'at least one point.*got \[\]'), ('ab', "got 'ab'"), (torch.tensor(3), 'at least one point'), ({(0, 0)}, 'must be a list'), (0, 'got 0'), (-2, 'got -2'), (True, 'got True'), (2., r'got 2\.0'),
    ((3, 4), 'whole image pixels, got 3'), ([(0, 0), ()], r'got \(\)'), ([(1., 2)], r'got \(1.0, 2\)'), (torch.ones(2, 2), r'got \[1.0, 1.0\]'),
    ([(True, 0)], r'got \(True, 0\)'), ([('1', 0)], r"got \('1', 0\)"), (['ab'], "got 'ab'")], ids=named)
def test_bad_points_are_named(points, says):
    with pytest.raises(ValueError, match=says): AttentionRecorder(net(), points)


@pytest.mark.parametrize('point', [(30, 0), (0, 42), (-1, 0), (0, -1), (3,), (3, 4, 5), (41, 29)], ids=named)
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
    with AttentionRecorder(model, None, stats=False) as rec: model(images())
    assert rec.sizes == {'2': (1260,)} and rec.changes['2'].tolist() == [0, 0]
    with AttentionRecorder(model, [(400,)], image_size=(1260,)) as rec: model(images())
    assert rec.maps['2'].shape == (2, 1, 1260)


def test_no_image_among_the_arguments():
    class Stacks(nn.Module):
        def __init__(self): super().__init__(); self.attn = SelfAttention(3)
        def forward(self, xs): return self.attn(torch.stack(xs))
    model = Stacks()
    with pytest.raises((TypeError, ValueError), match='tensor'):
        with AttentionRecorder(model, [(0, 0)]): model(list(images()))
    with AttentionRecorder(model, None, stats=False) as rec: model(list(images()))
    assert list(rec.gammas) == ['attn'] and rec.maps == {}
    with AttentionRecorder(model, [(3, 4)], image_size=(30, 42)) as rec: model(list(images()))
    with AttentionRecorder(model.attn, [(3, 4)]) as want: model.attn(images())
    assert torch.equal(rec.maps['attn'], want.maps[''])


def test_a_generator_has_an_image_size():
    model, z = nn.Sequential(nn.Linear(5, 8 * 4 * 6), nn.Unflatten(1, (8, 4, 6)), with_gamma(SelfAttention(8)), nn.Upsample(scale_factor=3), nn.Conv2d(8, 3, 1)), torch.randn(2, 5)
    with AttentionRecorder(model, [(0, 17), (11, 4)], image_size=(12, 18)) as rec: image = model(z)
    assert image.shape[2:] == (12, 18) and rec.points == [(0, 17), (11, 4)]
    x = model[1](model[0](z))
    close(rec.maps['2'].flatten(2), model[2].attention_weights(x, [5, 3 * 6 + 1])[:, 0].flatten(2))
    compare_stats(rec.stats['2'], written_out(model[2], x, weights=True), (4, 6), (12, 18))
    for points in ([(0, 17)], 'center', 3):
        with pytest.raises(ValueError, match='give `image_size`'):
            with AttentionRecorder(model, points): model(z)


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
    close(rec.maps[name][:, 0], beta(layer, x)[:, 3, 4], rtol=1e-4, atol=1e-6)
    with_gamma(layer)
    with attention_off(model): off = model(**kwargs, x=x)
    assert torch.equal(off, x) and not torch.equal(model(**kwargs, x=x), x)


# statistics, gamma and change

def positions(size, image, pool=1):
    "Middles of the cells of a map in pixels of the image, of the pooled cells, and which pooled cell each cell is in; one by one"
    at = lambda cell: [(x + .5) * i / m for x, i, m in zip(cell, image, size)]
    cells = list(np.ndindex(*size))
    groups = {}
    for cell in cells: groups.setdefault(tuple(x // pool for x in cell), []).append(at(cell))
    pooled = sorted(groups)
    return torch.tensor([at(c) for c in cells]), torch.tensor([np.mean(groups[g], 0).tolist() for g in pooled]), [pooled.index(tuple(x // pool for x in c)) for c in cells]

def compare_stats(got, b, size, image, pool=1):
    "Statistics against the whole map `b`, (bs, heads, n, nk)"
    b = b.detach().double()
    q_at, k_at, own = (torch.as_tensor(t) for t in positions(size, image, pool))
    distance = (q_at[:, None] - k_at).square().sum(-1).sqrt().double()
    entropy = torch.special.entr(b).sum(-1)
    want = AttentionStats(entropy, entropy / math.log(b.shape[-1]), (b * distance).sum(-1), b[:, :, torch.arange(len(own)), own], b.amax(-1))
    assert isinstance(got, AttentionStats)
    for name, w in want._asdict().items(): close(getattr(got, name), w.mean(1).unflatten(-1, size).float(), rtol=1e-4, atol=1e-5, msg=lambda m: f'{name}: {m}')

@pytest.mark.parametrize('nd', [1, 2, 3])
def test_statistics_are_those_of_the_whole_map(nd):
    model = net(nd).train()
    model[0].weight.data.mul_(3)
    with inputs(model) as seen, AttentionRecorder(model, None) as rec: model(images(nd))
    assert rec.maps == {} and list(rec.stats) == ['1', '5']
    for name, stride in (('1', 2), ('5', 6)):
        size = tuple(s // stride for s in SIZES[nd])
        assert all(s.shape == (2, *size) and s.dtype == torch.float32 for s in rec.stats[name])
        compare_stats(rec.stats[name], beta(model[int(name)], seen[name]).flatten(1, nd).flatten(2)[:, None], size, SIZES[nd])
    assert rec.stats['1'].entropy_share.min() < .99


def test_statistics_of_fastais_layers_are_those_of_the_whole_map():
    model = mixed().train()
    with inputs(model) as seen, AttentionRecorder(model, None) as rec: model(images(size=(32, 48)))
    for n in ('2', '3', '9'): compare_stats(rec.stats[n], beta(model[int(n)], seen[n]).flatten(1, 2).flatten(2)[:, None], rec.sizes[n], (32, 48), rec.pools[n])


def test_answers_on_paper():
    layer = SelfAttention(8, norm_type=None)
    nn.init.zeros_(layer.key[0].weight)                                 # uniform
    with AttentionRecorder(layer, image_size=(30, 20)) as rec: layer(torch.randn(2, 8, 3, 2))     # cells of 10x10 pixels
    s, root = rec.stats[''], math.sqrt
    assert torch.allclose(rec.maps[''], torch.tensor(1 / 6))
    for got, want in ((s.entropy, math.log(6)), (s.entropy_share, 1.), (s.itself, 1 / 6), (s.largest, 1 / 6)): close(got, torch.full((2, 3, 2), want))
    close(s.distance[0, 0], torch.full((2,), 10 * (0 + 1 + 1 + root(2) + 2 + root(5)) / 6))
    close(s.distance[1, 1], torch.full((2,), 10 * (0 + 1 + 1 + 1 + 2 * root(2)) / 6))
    layer = to_marked()                                                 # one-hot
    with AttentionRecorder(layer, 'grid', image_size=(60, 50)) as rec: layer(marked())       # cells of 10x5 pixels
    s = rec.stats['']
    assert (rec.maps['']).argmax().item() == 47 and torch.equal(rec.maps[''].flatten(2).sum(-1), torch.ones(1, 9)) and s.largest.eq(1).all() and s.itself[0, 4, 7] == 1 and s.itself.gt(1e-30).sum() == 1
    assert s.entropy.abs().max() < 1e-30 and s.entropy_share.abs().max() < 1e-30 and not s.entropy.signbit().any()
    assert s.distance[0, 4, 7] < 1e-30 and s.distance[0, 4, 0] == 35 and s.distance[0, 0, 7] == 40 and s.distance[0, 1, 3].item() == pytest.approx(root(30**2 + 20**2))


def test_gamma_and_change_are_those_of_the_layer():
    model = mixed().eval()
    x = images(size=(32, 48))
    x[1] *= 2
    pairs = {}
    handles = [m.register_forward_hook(lambda m, args, out, n=n: pairs.update({n: (args[0], out)})) for n, m in attention_layers(model).items()]
    with AttentionRecorder(model, None, stats=False) as rec: model(x)
    for h in handles: h.remove()
    assert rec.maps == rec.stats == rec.queries == {} and list(rec.changes) == ['1', '2', '3', '4', '5', '9']
    for n, (before, after) in pairs.items():
        want = torch.tensor([((a - b).double().pow(2).sum().sqrt() / b.double().pow(2).sum().sqrt()).item() for b, a in zip(before, after)])
        close(rec.changes[n], want, rtol=1e-4, atol=1e-6)
        assert rec.changes[n].shape == (2,) and rec.changes[n].min() > 1e-3 and rec.gammas[n] == model[int(n)].gamma.item()
    for m in attention_layers(model).values(): nn.init.zeros_(m.gamma)
    with AttentionRecorder(model) as rec: model(x)
    assert all(c.tolist() == [0, 0] for c in rec.changes.values()) and set(rec.gammas.values()) == {0.}


def test_change_share_on_paper():
    x = torch.zeros(3, 2, 2, 3)
    x[0, 0, 0, 0], x[0, 1, 1, 2] = 3, 4
    x[2] = 1e-4
    out = x.clone()
    out[0, 1, 0, 1] = -2.5
    out[2, 0, 0] += 1e-4
    close(change_share(x, out), torch.tensor([.5, 0, .5]))
    got = change_share(torch.full((1, 1, 300, 300), 300., dtype=torch.float16), torch.full((1, 1, 300, 300), 301., dtype=torch.float16))     # the sum of squares overflows
    assert got.dtype == torch.float32 and got.item() == pytest.approx(1 / 300, rel=1e-3)


NO_MAP = dict(simple=lambda: SimpleSelfAttention(8), fastai=lambda: fastai.layers.SimpleSelfAttention(8), dot=lambda: SelfAttention(8, softmax=False), pooled=lambda: PooledSelfAttention2d(8, softmax=False))

@pytest.mark.parametrize('make', NO_MAP.values(), ids=NO_MAP)
def test_layers_without_a_softmax(make):
    layer = with_gamma(make(), .3)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), layer, with_gamma(SelfAttention(8), .1)).eval(), images(size=(8, 6))
    assert not has_map(layer) and has_map(model[2])
    with AttentionRecorder(model, [(3, 4)], vectors=True) as rec: model(x)
    for field in (rec.maps, rec.stats, rec.queries, rec.keys, rec.sizes, rec.pools): assert list(field) == ['2']
    assert rec.gammas == {'1': pytest.approx(.3), '2': pytest.approx(.1)} and list(rec.changes) == ['1', '2'] and rec.changes['1'].min() > 0
    with AttentionRecorder(model, None, '1', stats=False) as only: model(x)
    assert torch.equal(only.changes['1'], rec.changes['1']) and only.maps == {} and list(only.gammas) == ['1']
    df = rec.df.set_index('layer')
    assert df.loc['1', ['map', 'entropy']].isna().all() and df.loc['1', 'change'] > 0 and df.loc['2', 'map'] == '8x6'
    for kwargs in (dict(), dict(points=None), dict(points=[(0, 0)], stats=False), dict(points=None, stats=False, vectors=True)):
        for layers in ('1', ['2', '1'], '*'):
            with pytest.raises(ValueError, match='^1: no map is known, since weights are dot products without a softmax.*choose other `layers`, or ask with `points=None, stats=False`'):
                AttentionRecorder(model, layers=layers, **kwargs)
        with pytest.raises(ValueError, match='without a softmax'): AttentionRecorder(model[:2], **kwargs)          # there is nothing else
    with AttentionRecorder(model[:2], None, stats=False) as rec: rec.model(x)
    assert list(rec.changes) == ['1'] and list(rec.df.columns) == ['layer', 'gamma', 'change'] and rec.df.change[0] == pytest.approx(rec.changes['1'].mean().item())


def test_df_is_the_means():
    model = mixed()
    rec = AttentionRecorder(model)
    assert len(rec.df) == 0
    with rec: model(images(size=(32, 48)))
    df = rec.df.set_index('layer')
    assert list(df.index) == ['1', '2', '3', '4', '5', '9'] and list(df.columns) == ['map', 'pool', 'gamma', 'change', *AttentionStats._fields]
    assert df.loc['3', 'map'] == '16x24' and df.loc['9', 'map'] == '8x12' and df['pool'].dropna().tolist() == [1, 1, 2, 1] and df['gamma'].to_dict() == pytest.approx(rec.gammas)
    for n in rec.stats:
        assert df.loc[n, 'change'] == pytest.approx(rec.changes[n].mean().item())
        for f in AttentionStats._fields: assert df.loc[n, f] == pytest.approx(getattr(rec.stats[n], f).mean().item())
    with AttentionRecorder(net(3), None) as rec: rec.model(images(3))
    assert rec.df['map'].tolist() == ['3x9x15', '1x3x5']


def test_df_after_a_pass_that_failed():
    model = net().append(Fails(RuntimeError('no memory')))
    with pytest.raises(RuntimeError), AttentionRecorder(model) as rec: model(images())
    assert len(rec.df) == 0 and rec.maps == rec.changes == rec.stats == {}


# which layers

def test_layers_by_name_and_pattern():
    inner = lambda: nn.Sequential(nn.Conv2d(8, 8, 1), SelfAttention(8))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), SelfAttention(8), nn.ModuleDict(dict(a=inner(), ab=inner())), fastai.layers.SelfAttention(8))
    every = ['1', '2.a.1', '2.ab.1', '3']
    assert list(attention_layers(model)) == every == list(choose_layers(model)) == list(AttentionRecorder(model).layers)
    for layers, want in (('1', ['1']), ('*', ['1', '3']), ('2.*.1', every[1:3]), ('2.*', every[1:3]), ('2.a.1', ['2.a.1']), (['3', '?'], ['1', '3']), (('3', '2.a*.1'), every[1:]), ('2.[a].1', ['2.a.1'])):
        assert list(choose_layers(model, layers)) == want
    for layers, says in (('4.*', r'no attention layer 4\.\*: there are 1, 2\.a\.1, 2\.ab\.1, 3'), (['1', '2', '4'], 'no attention layer 2, 4: there are 1,'), ('0', 'no attention layer 0:'), ([], 'chosen: there are 1'), ('*.a.1.*', 'there are')):
        for f in (choose_layers, lambda m, l: AttentionRecorder(m, layers=l), lambda m, l: attention_off(m, l).__enter__()):
            with pytest.raises(ValueError, match=says): f(model, layers)
    for layers in (3, [1], {'1'}, lambda n: True, [None]):
        with pytest.raises(TypeError, match='names of attention layers'): choose_layers(model, layers)


def test_only_the_chosen_layers_are_looked_at():
    model = mixed()
    with AttentionRecorder(model, layers=['9', '2']) as rec: model(images(size=(32, 48)))
    for field in (rec.maps, rec.stats, rec.changes, rec.sizes): assert list(field) == ['2', '9']


def test_layers_by_the_name_of_their_site():
    model = create_unet_model(resnet18, 3, (32, 48), pretrained=False, self_attention=['decoder.1', 'decoder.0'])
    paths = list(attention_layers(model))
    assert len(paths) == 2
    for layers, want in (('decoder.1', paths[1:]), ('decoder.*', paths), (paths[0], paths[:1]), (['decoder.0', paths[1]], paths)): assert list(choose_layers(model, layers)) == want
    with pytest.raises(ValueError) as e: choose_layers(model, 'decoder.2')
    assert all(f'{p} (decoder.{i})' in str(e.value) for i, p in enumerate(paths))
    with torch.no_grad(), AttentionRecorder(model.eval(), [(31, 0), (0, 47)], 'decoder.1') as rec: model(images(size=(32, 48)))
    size = rec.sizes[paths[1]]
    assert list(rec.maps) == paths[1:] and rec.maps[paths[1]].shape == (2, 2, *size) and size == (4, 6)


def test_layers_that_were_inserted_in_place_of_another():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1))
    insert_attention(model, '1', how='replace', size=(8, 6))
    with AttentionRecorder(model, layers='1') as rec: model(images(size=(8, 6)))
    assert list(rec.maps) == list(attention_layers(model))


@pytest.mark.parametrize('model', [nn.Sequential(nn.Conv2d(3, 8, 1)), nn.ReLU()], ids=['Sequential', 'ReLU'])
def test_a_model_without_attention(model):
    assert attention_layers(model) == {}
    for f in (AttentionRecorder, lambda m: AttentionRecorder(m, None, stats=False), lambda m: attention_off(m).__enter__(), lambda m: receptive_field(m, images())):
        with pytest.raises(ValueError, match=f'no attention layer in this {type(model).__name__}: .*`insert_attention`'): f(model)


# nothing is changed by watching

def training_step(make, size, record):
    model = make().train()
    model[6].eval()
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    with AttentionRecorder(model, 5, vectors=True) if record else contextlib.nullcontext():
        y = model(images(size=size))
        y.pow(2).mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    opt.step()
    return [y.detach(), *grads, *model.state_dict().values(), model(images(size=size)).detach(), torch.get_rng_state()], [m.training for m in model.modules()]

@pytest.mark.parametrize('make,size', [(net, (30, 42)), (mixed, (32, 48)), (lambda: mixed(sym=True), (32, 48))], ids=['ours', "and fastai's", "fastai's sym"])
def test_a_training_step_is_the_same_bit_by_bit(make, size):
    (plain, modes), (watched, modes_after) = (training_step(make, size, r) for r in (False, True))
    assert len(plain) == len(watched) > 30 and all(torch.equal(a, b) for a, b in zip(plain, watched)) and modes == modes_after


@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_parameters_buffers_modes_and_grads_stay(train):
    def run(look):
        model, x = mixed(), images(size=(32, 48))
        model(x).square().mean().backward()
        model.train(train)
        model[2].query.eval(), model[4].requires_grad_(False)
        made = []
        for m in model.modules():
            if 'weight' in vars(m): m.register_forward_hook(lambda m, a, o: made.append((m, m.weight)))
        grads = [p.grad for p in model.parameters()]
        with AttentionRecorder(model, 'grid', vectors=True) if look else contextlib.nullcontext(): y = model(x)
        own = dict(reversed(made))
        assert all(m.weight is w for m, w in own.items() if m not in {c for l in (model[1], model[4]) for c in l.modules()}) and len(own) > 10
        assert all(a is p.grad for a, p in zip(grads, model.parameters()))
        return y, as_it_was(model)
    (y, a), (z, b) = run(False), run(True)
    assert torch.equal(y, z) and a[0]['modes'] == b[0]['modes'] and a[0]['requires'] == b[0]['requires']
    assert all(torch.equal(t, b[1][n]) for n, t in a[1].items()) and all(torch.equal(g[1], b[2][n][1]) for n, g in a[2].items() if g)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=named)
def test_autocast(dtype):
    model, x = net().eval(), images()
    with torch.autocast('cpu', dtype=dtype):
        want = model(x)
        with inputs(model) as seen, AttentionRecorder(model, POINTS[2]) as rec: got = model(x)
        q, k = (F.conv1d(seen['1'].flatten(2), getattr(model[1], n)[0].weight) for n in ('key', 'query'))
    assert q.dtype == dtype and torch.equal(got, want)
    b = F.softmax(q.float().mT @ k.float(), -1)
    close(rec.maps['1'].flatten(2), b[:, [0, 14 * 21 + 20, 6 * 21 + 15]], rtol=1e-4, atol=1e-6)
    compare_stats(rec.stats['1'], b[:, None], (15, 21), (30, 42))
    for maps in rec.maps.values():
        assert maps.dtype == torch.float32
        close(maps.sum((-2, -1)), torch.ones(2, 3), rtol=1e-5, atol=0)      # half precision is good for 1e-2 or 1e-3
    assert all(c.dtype == torch.float32 for c in rec.changes.values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=named)
def test_autocast_of_fastais_layers(dtype):
    model, x, points = mixed().train(), images(size=(32, 48)), [(0, 47), (13, 30)]
    outs = {}
    def keep(m, args, out): outs.setdefault(m, out.detach().float())
    for i in (2, 3):
        for c in (model[i].query, model[i].key): c.register_forward_hook(keep)
    with torch.autocast('cpu', dtype=dtype), AttentionRecorder(model, points) as rec: model(x)
    q, k = (outs[c].mT for c in (model[2].key, model[2].query))
    close(rec.maps['2'].flatten(2), F.softmax(q @ k.mT, -1)[:, [23, 6 * 24 + 15]], rtol=1e-3, atol=1e-5)
    q, k = outs[model[3].query].flatten(2).mT, F.max_pool2d(outs[model[3].key], 2).flatten(2)
    close(rec.maps['3'].flatten(2), F.softmax(q @ k, -1)[:, [23, 6 * 24 + 15]], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=named)
@pytest.mark.parametrize('mode', [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=['grad', 'no grad', 'inference'])
def test_results_are_float32_on_the_cpu_and_hold_no_graph(dtype, mode):
    model = mixed().to(dtype).eval()
    with mode(), AttentionRecorder(model, POINTS[2], vectors=True) as rec: model(images(size=(32, 48)).to(dtype).as_subclass(TensorImage))
    results = [t for field in (rec.maps, rec.queries, rec.keys, rec.changes) for t in field.values()] + [t for s in rec.stats.values() for t in s]
    assert len(results) == 4 * 3 + 6 + 4 * 5
    assert {(t.device.type, t.requires_grad, t.grad_fn, type(t), t.is_inference()) for t in results} == {('cpu', False, None, torch.Tensor, False)}
    assert {t.dtype for t in results if t.dim() > 1} == {torch.float32} and {type(g) for g in rec.gammas.values()} == {float}
    for t in results: t.mul_(2)                                         # they are the reader's own


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
@pytest.mark.parametrize('watch', [lambda m: AttentionRecorder(m, POINTS[2]), attention_off], ids=['AttentionRecorder', 'attention_off'])
def test_hooks_are_gone_however_it_ends(act, error, watch):
    model = net().eval()
    before, want = hooks(model), model(images())
    if watch is attention_off and act is point_off_image: error = None      # there it is any image
    with pytest.raises(error) if error else contextlib.nullcontext():
        with watch(model) as rec: act(model)
    del model[7:]
    assert hooks(model) == before and not stance_is_forced()
    kept = copy.deepcopy(getattr(rec, 'maps', {}))
    assert torch.equal(model(images()), want)
    if kept: assert list(rec.maps) == list(kept) and all(torch.equal(m, kept[n]) for n, m in rec.maps.items())

@pytest.mark.parametrize('watch', [lambda m: AttentionRecorder(m, POINTS[2]), attention_off], ids=['AttentionRecorder', 'attention_off'])
@pytest.mark.parametrize('nth', range(3))
def test_an_interrupt_while_entering_leaves_nothing(watch, nth, monkeypatch):
    model = net()
    before, register, calls = hooks(model), nn.Module.register_forward_hook, []
    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) > nth: raise KeyboardInterrupt
        return register(*args, **kwargs)
    monkeypatch.setattr(nn.Module, 'register_forward_hook', interrupted)
    w = watch(model)
    with pytest.raises(KeyboardInterrupt) if nth < 2 or isinstance(w, AttentionRecorder) else contextlib.nullcontext(), w: pass
    assert hooks(model) == before and not stance_is_forced() and calls
    monkeypatch.undo()
    if isinstance(w, AttentionRecorder):
        with w: model(images())                                         # and it can be used
        assert list(w.maps) == ['1', '5']
    assert hooks(model) == before


def test_nested_and_used_again():
    model, x = net().eval(), images()
    before = hooks(model)
    with AttentionRecorder(model, POINTS[2]) as outer:
        with AttentionRecorder(model, [(13, 31)]) as inner: model(x)
        seen = {n: m.clone() for n, m in inner.maps.items()}
        for n, m in seen.items(): assert torch.equal(m, outer.maps[n][:, 2:])
        model(x.flip(0))                                   # outer still looks, inner no more
        for n, m in seen.items(): assert torch.equal(m, inner.maps[n]) and not torch.equal(m, outer.maps[n][:, 2:])
        with pytest.raises(RuntimeError, match='recording already: make another one'), outer: pass
        model(x)                                            # and outer looks on
        for n, m in seen.items(): assert torch.equal(m, outer.maps[n][:, 2:])
        model(x.flip(0))
    with inner: model(x.flip(0))
    for n, m in inner.maps.items(): assert torch.equal(m, outer.maps[n][:, 2:])
    assert hooks(model) == before and not stance_is_forced()


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
    with AttentionRecorder(model, POINTS[2], vectors=True) as rec: model(x, True), model(x, False)
    for field in ('maps', 'gammas', 'changes', 'stats', 'queries', 'keys', 'sizes', 'pools'): assert getattr(rec, field) == {}      # not those of the pass before


# memory

class Passes:
    "Does not attend, so that only the look costs anything"
    def forward(self, x): return x
class Ours(Passes, SelfAttention): pass
class OursPooled(Passes, PooledSelfAttention2d): pass
class Theirs(Passes, fastai.layers.SelfAttention): pass
class TheirsPooled(Passes, fastai.layers.PooledSelfAttention2d): pass

def test_no_tensor_of_n_by_n():
    n, layer, x = 48 * 48, SelfAttention(16), torch.randn(1, 16, 48, 48)
    with Largest() as largest, AttentionRecorder(layer, [(i, 2 * i) for i in range(11)]): layer(x)
    with Largest() as whole: layer.attention_weights(x, range(n))
    assert largest.numel <= n * n / 8 and whole.numel >= n * n     # the measure sees it where it is


@pytest.mark.parametrize('cls', [Ours, OursPooled, Theirs, TheirsPooled])
def test_a_map_of_256_by_256_is_exact_and_no_more_than_its_size(cls):
    layer, x = cls(8), torch.randn(1, 8, 256, 256)
    with Largest() as largest, AttentionRecorder(layer, [(255, 0), (100, 200), (0, 31)], stats=False) as rec: layer(x)
    assert largest.numel <= 8 * 256**2                             # as many as the feature map
    assert rec.maps[''].shape == ((1, 3, 256, 256) if rec.pools[''] == 1 else (1, 3, 128, 128))
    close(rec.maps[''].sum((-2, -1)), torch.ones(1, 3))
    if cls in (Theirs, TheirsPooled):
        asks, answers = (layer.query, layer.key) if cls is TheirsPooled else (layer.key, layer.query)
        q, k = (F.conv2d(x, weight(c)[..., None, None]) for c in (asks, answers))
        k = F.max_pool2d(k, 2) if cls is TheirsPooled else k
        close(rec.maps[''][0], F.softmax((q[0, :, [255, 100, 0], [0, 200, 31]].T @ k[0].flatten(1)).double(), -1).float().view_as(rec.maps[''][0]), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize('cls', [Ours, TheirsPooled])
def test_statistics_of_a_large_map_are_streamed(cls):
    n, layer, x = 96 * 96, cls(8), torch.randn(1, 8, 96, 96)
    with Largest() as largest, AttentionRecorder(layer, None) as rec: layer(x)
    assert largest.numel <= 2**20 < n * n / 16 and all(s.shape == (1, 96, 96) for s in rec.stats[''])
    with AttentionRecorder(layer, [(95, 0), (40, 71)], stats=False) as some: layer(x)
    for p, w in zip(some.points, some.maps[''][0].double()):
        close(torch.special.entr(w).sum().float(), rec.stats[''].entropy[0][p], rtol=1e-4, atol=1e-4)
        close(w.max().float(), rec.stats[''].largest[0][p])


# wrappers

@pytest.mark.parametrize('wrap', [DataParallel, lambda m: DataParallel(torch.compile(m, backend='eager')), lambda m: torch.compile(m, backend='eager')], ids=['parallel', 'both', 'compiled'])
def test_names_are_those_inside_a_wrapper(wrap):
    model, x = net().eval(), images()
    with AttentionRecorder(model, POINTS[2]) as want: y = model(x)
    wrapped = wrap(model)
    assert bare_model(wrapped) is model and list(attention_layers(wrapped)) == ['1', '5']
    before = hooks(wrapped)
    with AttentionRecorder(wrapped, POINTS[2]) as rec: z = wrapped(x)
    saw_the_same(rec, want)
    assert torch.equal(y, z) and hooks(wrapped) == before
    with attention_off(wrapped, '1'): a = wrapped(x)
    with attention_off(model, '1'): b = model(x)
    assert torch.equal(a, b) and not torch.equal(a, y)


def test_the_wrapper_of_distributed_training_is_seen_through():
    model = net()
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    assert bare_model(wrapper) is model and list(choose_layers(wrapper, '5')) == ['5']


def replica(model):
    "A copy as `DataParallel` makes one for each GPU: parameters are plain tensors"
    copied = model._replicate_for_data_parallel()
    for n, m in model.named_children():
        copied._modules[n] = replica(m)
    for n, p in model._parameters.items():
        if p is None: copied._parameters[n] = None
        else: setattr(copied, n, p * 1)
    for n, b in model._buffers.items(): copied._buffers[n] = b.clone()
    return copied

class Shares(DataParallel):
    "Shares out the batch to copies, in threads, each on what the recorder takes for another device, the later ones first"
    def __init__(self, module, rec=None, ids=(0, 1, 2)):
        super().__init__(module)
        self.device_ids, self.rec = list(ids), rec
    def forward(self, x):
        outs, errors = {}, []
        def run(i, part):
            try: outs[i] = replica(self.module)(part)
            except BaseException as e: errors.append(e)
        for i, part in reversed(list(enumerate(x.chunk(len(self.device_ids))))):
            thread = threading.Thread(target=run, args=(i, part))
            thread.start(), thread.join()
            if self.rec:
                for parts in self.rec._parts.values():
                    if torch.device('cpu') in parts: parts[torch.device('cuda', self.device_ids[i])] = parts.pop(torch.device('cpu'))
        if errors: raise errors[0]
        return torch.cat([outs[i] for i in sorted(outs)])

@pytest.mark.parametrize('ids', [(0, 1, 2), (2, 0, 1), (10, 9, 3)], ids=named)
@pytest.mark.parametrize('make,size', [(net, (30, 42)), (mixed, (32, 48))], ids=['ours', "and fastai's"])
def test_a_batch_that_is_shared_out_is_put_together_in_order(make, size, ids):
    model, x = make().eval().double(), images(bs=7, size=size).double()     # parts of 3, 3 and 1; in float32 a batch of 1 may be rounded otherwise
    with AttentionRecorder(model, 'grid', vectors=True) as want: y = model(x)
    parallel = Shares(model, ids=ids)
    parallel.rec = AttentionRecorder(parallel, 'grid', vectors=True)
    with parallel.rec: z = parallel(x)
    close(z, y)
    saw_the_same(parallel.rec, want)
    assert parallel.rec.maps['1'].shape[0] == 7 and not any(m.requires_grad for m in parallel.rec.maps.values())
    assert all('module' not in n for n in parallel.rec.maps)
    outer = nn.Sequential(Shares(model, ids=ids))                   # the parallel part of a larger model
    outer[0].rec = AttentionRecorder(outer, 'grid')
    with outer[0].rec: outer(x)
    for n, m in outer[0].rec.maps.items(): close(m, want.maps[n.removeprefix('0.module.')])


def test_a_recorder_on_the_model_inside_a_parallel_one_says_so():
    model = net().eval()
    with pytest.raises(RuntimeError, match='run by a `DataParallel`: make the recorder for that'):
        with AttentionRecorder(model): Shares(model)(images(bs=3))
    assert not any(k == '_forward_pre_hooks' and n == '' for n, k in hooks(model))


def whole(model, backend): return torch.compile(model, backend=backend)
def in_place(model, backend):
    model.compile(backend=backend)
    return model
def inner_module(model, backend):
    model[1] = torch.compile(nn.Sequential(model[1], nn.ReLU()), backend=backend)
    return model
def inner_layer(model, backend):
    model[1] = torch.compile(model[1], backend=backend)
    return model
def inner_layer_in_place(model, backend):
    model[1].compile(backend=backend)
    return model
def inner_and_whole(model, backend): return torch.compile(inner_layer(model, backend), backend=backend)

COMPILE = [whole, in_place, inner_module, inner_layer, inner_layer_in_place, inner_and_whole]

@pytest.mark.parametrize('ran', [False, True], ids=['never ran', 'ran'])
@pytest.mark.parametrize('how', COMPILE)
def test_compiled_models_are_seen_as_they_are_written(how, ran, counts):
    model, x = net().eval(), images()
    if how is inner_module:
        plain = nn.Sequential(*model)
        plain[1] = nn.Sequential(model[1], nn.ReLU())
        names = ['1.0', '5']
    else: plain, names = nn.Sequential(*model), ['1', '5']
    with AttentionRecorder(plain, POINTS[2], vectors=True) as want: y = plain(x)
    with attention_off(plain, names[0]): off = plain(x)
    compiled = how(model, counts)
    assert list(attention_layers(compiled)) == names
    if ran:
        close(compiled(x), y)
        assert counts.ran
    before, made, n = hooks(compiled), counts.compiled, counts.ran
    with AttentionRecorder(compiled, POINTS[2], vectors=True) as rec: z = compiled(x)
    close(z, y)
    saw_the_same(rec, want)
    assert counts.ran == n and hooks(compiled) == before
    with attention_off(compiled, names[0]): close(compiled(x), off)
    assert counts.ran == n and counts.compiled == made
    close(compiled(x), y)
    assert counts.ran > n                                                   # the compiled code runs again
    if ran: assert counts.compiled == made and counts.ran == 2 * n          # and is the same


@pytest.mark.parametrize('how', [whole, in_place])
@pytest.mark.parametrize('ran', [False, True], ids=['never ran', 'ran'])
def test_a_compiled_layer_alone(how, ran, counts):
    layer, x = net()[1].eval(), torch.randn(2, 24, 5, 7)
    with AttentionRecorder(layer, 'grid') as want: y = layer(x)
    compiled = how(layer, counts)
    if ran: compiled(x)
    n = counts.ran
    with AttentionRecorder(compiled, 'grid') as rec: compiled(x)
    saw_the_same(rec, want)
    assert list(rec.maps) == [''] and counts.ran == n
    with attention_off(compiled): assert torch.equal(compiled(x), x)
    close(compiled(x), y)
    assert counts.ran > n and not torch.equal(y, x)


def test_a_function_that_is_compiled(counts):
    model, x = net().eval(), images()
    f = torch.compile(lambda x: model(x) + 1, backend=counts)
    y, n = f(x), counts.ran
    with AttentionRecorder(model) as rec: close(f(x), y)
    assert list(rec.maps) == ['1', '5'] and counts.ran == n
    f(x)
    assert counts.ran == 2 * n


# attention_off

@pytest.mark.parametrize('layers', [None, ['9', '2', '4'], '1'], ids=named)
def test_attention_off_is_gamma_zero(layers):
    model, x = mixed().eval(), images(size=(32, 48)).requires_grad_()
    before, y = as_it_was(model), model(x)
    zero = copy.deepcopy(mixed()).eval()
    zero.load_state_dict(model.state_dict())
    for m in choose_layers(zero, layers).values(): nn.init.zeros_(m.gamma)
    with attention_off(model, layers) as same_model:
        assert same_model is model
        off = model(x)
    close(off, zero(x))
    assert not torch.allclose(off, y)
    close(torch.autograd.grad(off.square().sum(), x)[0], torch.autograd.grad(zero(x).square().sum(), x)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), y) and hooks(model) == before[0]['hooks']


def test_attention_off_is_seen_by_a_recorder_and_undone_after_an_error():
    model, x = net().eval(), images()
    y = model(x)
    with attention_off(model), AttentionRecorder(model) as rec: model(x)
    assert [c.tolist() for c in rec.changes.values()] == [[0, 0]] * 2
    with pytest.raises(KeyboardInterrupt), attention_off(model):
        assert not torch.equal(model(x), y)
        raise KeyboardInterrupt
    assert torch.equal(model(x), y) and not stance_is_forced()
    with attention_off(model, '1'), attention_off(model, '5'): both = model(x)
    with attention_off(model): assert torch.equal(both, model(x))


def test_what_attention_off_passes_on_is_no_alias():
    layer, x = SelfAttention(8), torch.randn(2, 8, 5, 7)
    with attention_off(layer): y = layer(x)
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()      # an activation in place would change both


@pytest.mark.parametrize('size', [64, (0, 64), (6.4, 64), '64', ()], ids=named)
def test_image_size_is_checked_at_once(size):
    with pytest.raises(ValueError, match='`image_size` must be'): AttentionRecorder(net(), 'center', image_size=size)


def test_a_head_alone():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), SelfAttention(24, reduction=2, heads=3), SelfAttention(24, reduction=2, heads=3, pool=2))
    x, points = images(size=(22, 30)), [(3, 5), (20, 29)]
    def look(**kwargs):
        with torch.no_grad(), AttentionRecorder(model.eval(), points, **kwargs) as rec: model(x)
        return rec
    mean, heads = look(vectors=True), [look(head=i) for i in range(3)]
    for name in ('1', '2'):
        maps = [h.maps[name] for h in heads]
        close(sum(maps)/3, mean.maps[name])
        assert min((a - b).abs().max() for a, b in zip(maps, maps[1:])) > 1e-3
        q, k = mean.queries[name], mean.keys[name]
        for i, m in enumerate(maps):
            rows = (q[:, i].flatten(1, 2) @ k[:, i].flatten(1, 2).mT).softmax(-1)
            close(m.flatten(2), rows[:, [1*15 + 2, 10*15 + 14]], atol=1e-5, rtol=1e-4)
        close(sum(h.stats[name].distance for h in heads)/3, mean.stats[name].distance)
        assert (heads[0].stats[name].distance - heads[1].stats[name].distance).abs().max() > 1e-2

@pytest.mark.parametrize('head', [-1, 1.5, True, 'all'])
def test_what_is_no_head(head):
    with pytest.raises(ValueError, match='`head` must be the number of a head, counted from 0, or None'): AttentionRecorder(net(), head=head)

def test_a_head_that_a_layer_does_not_have():
    model = net()
    before = hooks(model)
    with pytest.raises(ValueError, match='no head 1 in a layer with 1, counted from 0'), AttentionRecorder(model, head=1): model(images())
    assert hooks(model) == before

def test_a_learner_is_recorded_by_its_model_and_left_without_hooks():
    model, x = net(), torch.randn(2, 3, 12, 20)
    learn, before = Learner(DataLoaders([], []), model, loss_func=F.mse_loss), hooks(model)
    with AttentionRecorder(learn) as rec: model(x)
    assert rec.model is model and [*rec.maps] and hooks(model) == before
    with pytest.raises(TypeError, match='an nn.Module or a Learner, got int'): AttentionRecorder(3)


def test_a_copy_made_while_recording_is_not_watched(tmp_path):
    "Copied, or saved, inside the block: what the copy does is not recorded, and the recorder goes on"
    model = nn.Sequential(nn.Conv2d(3, 16, 3), SelfAttention(16)).eval()
    x, other = torch.randn(2, 2, 3, 8, 8)
    with torch.no_grad(), AttentionRecorder(model) as rec:
        want = model(x)
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path/'model.pt')
        read = torch.load(tmp_path/'model.pt', weights_only=False)
        maps = rec.maps['1']
        for m in (twin, read): assert torch.equal(m(x), want) and not torch.equal(m(other), want)
        assert torch.equal(rec.maps['1'], maps)
        model(other)
        assert not torch.equal(rec.maps['1'], maps)
