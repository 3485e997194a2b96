"`ops` against the plain formula, over shapes, dtypes and memory layouts that the lessons do not show"
import math
import threading

import numpy as np
import pytest
import torch
from conftest import Largest, named
from formulas import rel
from hypothesis import given, settings, strategies as st
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastai_selfattn.attention import ops, tiles
from fastai_selfattn.attention.ops import AttentionStats, attend, attention_backend, attention_stats, attention_weights, dot_attend


def plain(q, k, v, scale=1.): return F.softmax(scale * (q @ k.mT), dim=-1) @ v

def plain_dot(q, k, v, scale=1.): return scale * (q @ k.mT) @ v

def inputs(bs, nq, nk, d, dv, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(bs, n, ch, generator=g, dtype=dtype).requires_grad_() for n, ch in ((nq, d), (nk, d), (nk, dv))]


def compare(qkv, scale, tol, f=attend, truth=plain):
    o, want = f(*qkv, scale), truth(*qkv, scale)
    do = torch.randn_like(want)
    assert o.shape == want.shape and o.dtype == want.dtype
    assert rel(o, want) < tol
    for a, b in zip(torch.autograd.grad(o, qkv, do), torch.autograd.grad(want, qkv, do)): assert rel(a, b) < tol

def as_leaves(ts, dtype): return [t.detach().to(dtype).requires_grad_() for t in ts]

LAYOUTS = dict(rows=lambda t: t, channels=lambda t: t.mT.contiguous().mT, sliced=lambda t: torch.stack([t, t], -1)[..., 0],
               batch_last=lambda t: t.movedim(0, 2).contiguous().movedim(2, 0), expanded=lambda t: t[:, :1].expand(t.shape), one_image=lambda t: t[:1].expand(t.shape))

def laid(ts, layouts): return [LAYOUTS[how](t.detach()).requires_grad_() for t, how in zip(ts, layouts)]


@pytest.fixture
def tiled():
    with attention_backend('tiled'): yield

@pytest.fixture(params=[(512, 512, 1), (5, 7, 2), (1, 1, 3), (64, 3, 1), (2, 3, 4)], ids=named)
def tile(request, monkeypatch, tiled):
    rows, cols, threads = request.param
    for name, value in dict(ROWS=rows, COLS=cols, FEWEST=1, _threads=lambda t: threads).items(): monkeypatch.setattr(tiles, name, value)


@pytest.mark.parametrize('bs,nq,nk,d,dv', [(2, 11, 13, 3, 5), (1, 1, 1, 1, 1), (3, 1, 17, 2, 7), (2, 19, 1, 3, 2), (11, 3, 2, 4, 5), (7, 2, 3, 1, 1)])
def test_any_tile_is_exact_in_float64(tile, bs, nq, nk, d, dv): compare(inputs(bs, nq, nk, d, dv), .7, 1e-10)


@settings(deadline=None, max_examples=200)
@given(*[st.integers(1, 2000)] * 5, st.integers(1, 70))
def test_a_tile_is_bounded_and_splits_only_single_images(bs, rows, cols, tile_rows, tile_cols, threads):
    tb, n, tr, tc = tiles.tile(bs, rows, cols, (tile_rows, tile_cols), threads=threads)
    area = tile_rows * tile_cols
    assert 1 <= tb <= bs and 1 <= tr <= rows and 1 <= tc <= cols and tb * n * tr * tc <= max(8, threads) * area
    assert 1 <= n <= threads and (n == 1 or n * tiles.FEWEST <= rows)     # no thread for a few rows
    assert n == 1 or tb == 1
    assert tb == 1 or (tr == rows and tc == cols)
    assert n == 1 or tr < rows                                           # side by side are parts of one image
    assert tb == bs or (tb + 1) * rows * cols > 8 * area or n * tr * tc < rows * cols or n > 1     # no smaller than need be

@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2000), st.integers(1, 70), st.integers(1, 600))
def test_tiles_side_by_side_cover_every_row_once(n, n_tiles, rows):
    seen = torch.zeros(1, n, 1)
    for start, here, n_here in tiles._cuts(n, n_tiles, rows):
        cut = tiles._cut(seen, start, here, n_here)
        assert cut.shape == (n_here, here//n_here, 1) and n_here in (1, n_tiles)
        assert here//n_here <= rows or here < n_tiles     # what is left over
        cut += 1
    assert (seen == 1).all()


layouts = st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3)

@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 1300), st.integers(1, 1300), st.integers(1, 5), st.integers(1, 6), st.floats(.1, 3), layouts, st.sampled_from(['auto', 'tiled']), st.integers(1, 5))
def test_any_shape_and_layout_is_exact_in_float64(bs, nq, nk, d, dv, scale, layouts, backend, threads):
    with pytest.MonkeyPatch.context() as m, attention_backend(backend):
        m.setattr(tiles, '_threads', lambda t: threads)
        compare(laid(inputs(bs, nq, nk, d, dv), layouts), scale, 1e-10)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 90), st.integers(1, 5), st.integers(1, 6), layouts,
       st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]), st.sampled_from(['math', 'tiled']))
def test_any_dtype_and_layout_against_float64(bs, nq, nk, d, dv, layouts, dtype_tol, backend):
    dtype, tol = dtype_tol
    qkv = laid([t.to(dtype) for t in inputs(bs, nq, nk, d, dv)], layouts)
    wide = as_leaves(qkv, torch.float64)
    with attention_backend(backend): got = attend(*qkv)
    assert got.dtype == dtype and rel(got.double(), plain(*wide)) < tol
    for a, b in zip(torch.autograd.grad(got.sum(), qkv), torch.autograd.grad(plain(*wide).sum(), wide)): assert a.dtype == dtype and rel(a.double(), b) < 3 * tol


@pytest.mark.parametrize('n', [37, 1025, 2500])
def test_float32_against_float64_truth(tiled, n):
    qkv = inputs(2, n, n, 8, 24)
    single = as_leaves(qkv, torch.float32)
    do = torch.randn(2, n, 24, dtype=torch.float64)
    want, got = plain(*qkv), attend(*single)
    assert rel(got.double(), want) < 1e-5
    for a, b in zip(torch.autograd.grad(got, single, do.float()), torch.autograd.grad(want, qkv, do)): assert rel(a.double(), b) < 1e-5


@pytest.mark.parametrize('backend', ['math', 'tiled'])
@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=named)
def test_half_precision_computes_logits_in_float32(dtype, tol, backend):
    qkv = as_leaves(inputs(2, 600, 1100, 16, 5), dtype)
    wide = as_leaves(qkv, torch.float64)
    with attention_backend(backend): got, want = attend(*qkv), plain(*wide)
    assert got.dtype == dtype and rel(got.double(), want) < tol
    for a, b in zip(torch.autograd.grad(got.sum(), qkv), torch.autograd.grad(want.sum(), wide)):
        assert a.dtype == dtype and rel(a.double(), b) < 3 * tol


@pytest.mark.parametrize('backend', ['math', 'tiled'])
def test_float16_logits_beyond_its_range(backend):
    q = torch.full((1, 3, 4), 200., dtype=torch.float16)        # logits of 160,000; float16 ends at 65,504
    with attention_backend(backend): assert attend(q, q, torch.ones_like(q)).isfinite().all()


@pytest.mark.parametrize('dtype,lse_dtype', [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)], ids=named)
def test_log_sum_exp_is_float32_at_least(dtype, lse_dtype):
    q, k, v = (t.detach().to(dtype) for t in inputs(2, 7, 1100, 3, 5))
    o, lse = tiles.attend_op(q, k, v, .7)
    kc = k.double() - k.double().mean(1, keepdim=True)
    want = (.7 * q.double() @ kc.mT).logsumexp(-1, keepdim=True)
    assert o.dtype == dtype and lse.dtype == lse_dtype and (lse.double() * torch.tensor(2.).log() - want).abs().max() < 1e-5


def test_autocast_leaves_float32_exact():
    for n in (70, 700):
        qkv = inputs(1, n, n, 8, 40, torch.float32)
        with torch.autocast('cpu', dtype=torch.bfloat16): o, w, p = attend(*qkv), attention_weights(*qkv[:2], [3]), dot_attend(*qkv, 1 / n)
        assert o.dtype == w.dtype == p.dtype == torch.float32
        assert rel(o, plain(*qkv)) < 1e-5 and rel(w @ qkv[2], o[:, 3:4]) < 1e-5 and rel(p, plain_dot(*qkv, 1 / n)) < 1e-5


@pytest.mark.parametrize('top', [1e4, -1e4])
def test_huge_logits_stay_finite(top):
    q, k, v = inputs(2, 520, 1030, 1, 3)
    with torch.no_grad(): q.copy_(torch.where(torch.arange(520).view(1, -1, 1) % 2 == 0, 100., 1.)); k[:, 7] = top / 100; k[:, 1029] = top / 100
    compare((q, k, v), 1., 1e-10)
    qkv = as_leaves((q, k, v), torch.float32)
    o = attend(*qkv)
    o.sum().backward()
    assert all(t.isfinite().all() for t in (o, *[t.grad for t in qkv]))
    assert rel(o.double(), plain(q, k, v)) < 1e-4


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('size', [10., 60., 300., 3000.])
def test_weights_too_small_to_count(monkeypatch, tiled, size, threads):
    "Logits as far apart as 2^-126 and further: as exact as any, and no weight that slows a processor down"
    monkeypatch.setattr(tiles, '_threads', lambda t: threads)
    q, k, v = inputs(1, 700, 1300, 4, 3)
    with torch.no_grad(): q *= size
    qkv, do = as_leaves((q, k, v), torch.float32), torch.randn(1, 700, 3)
    deep = []
    monkeypatch.setattr(tiles, '_accumulate', lambda acc, a, b, first, f=tiles._accumulate: deep.append((0 < b.abs()) & (b.abs() < 2**-126)) or f(acc, a, b, first))
    o, want = attend(*qkv), plain(q, k, v)
    assert deep and not any(d.any() for d in deep) and rel(o.double(), want) < 3e-6 * max(10, size)
    for a, b in zip(torch.autograd.grad(o, qkv, do), torch.autograd.grad(want, (q, k, v), do.double())): assert rel(a.double(), b) < 3e-5 * max(10, size)
    assert not any(d.any() for d in deep)

@pytest.mark.parametrize('size', [30., 300., 3000.])
def test_statistics_of_sharp_maps(size):
    q, k = (t.detach() for t in inputs(2, 41, 1300, 4, 3)[:2])
    where = places(41, 1300, 2)
    compare_stats(attention_stats(q * size, k, *where), plain_stats(q * size, k, *where), 1e-10, torch.float64)
    where = [t.float() if t.is_floating_point() else t for t in where]
    want = plain_stats((q * size).float().double(), k.float().double(), *where)
    compare_stats(attention_stats((q * size).float(), k.float(), *where), want, 2e-4, torch.float32)

@pytest.mark.parametrize('threads', [1, 2])
def test_each_thread_has_a_tile_of_its_own(monkeypatch, tiled, threads):
    "One large image as a batch of as many matrices, forward and backward"
    shapes, before = [], torch.get_num_threads()
    monkeypatch.setattr(tiles, '_product', lambda a, b, block, f=tiles._product: shapes.append((len(a), a.shape[1], b.shape[2])) or f(a, b, block))
    torch.set_num_threads(threads)
    try:
        o = attend(*(qkv := inputs(1, 3072, 2048, 3, 5, torch.float32)))
        forward = len(shapes)
        o.sum().backward()
    finally: torch.set_num_threads(before)
    assert set(shapes) == {(threads, 512, 512)}
    assert (forward, len(shapes) - forward) == (6*4//threads, 2*6*4//threads)     # each tile once, in the backward pass for two products

def test_the_bound_below_which_weights_are_nothing(tiled):
    "2^-90 of the largest counts, 2^-101 does not; nor does it in a gradient, and NaN is no small number"
    k = torch.tensor([0., 1.])[None, :, None].repeat(1, 300, 1)
    for logit, counts in ((90, True), (101, False), (125, False), (1000, False)):
        q = torch.full((1, 3, 1), logit*math.log(2))
        q, v = q.requires_grad_(), torch.where(k == 0, 1e20, 0.).requires_grad_()
        o = attend(q, k, v)
        assert ((o > 0) == counts).all() and o.isfinite().all()
        o.sum().backward()
        assert ((v.grad[k == 0] > 0) == counts).all() and (v.grad[k == 1] > 0).all()
    assert attend(torch.tensor([[[1000.], [math.nan]]]), k, k).isnan().flatten().tolist() == [False, True]


def test_rows_that_need_a_maximum_beside_rows_that_do_not(tiled):
    "The first tile is bounded by the lengths, the second is not, the third is again"
    q, k, v = inputs(1, 2900, 1300, 2, 3)
    with torch.no_grad(): q[:, 1024:2048] *= 300
    compare((q, k, v), 1., 1e-10)
    qkv = as_leaves((q, k, v), torch.float32)
    assert rel(attend(*qkv).double(), plain(q, k, v)) < 1e-4


def test_a_common_part_of_all_keys_costs_no_digits(tiled):
    "Logits of 1e5 that all keys share cancel in the softmax; a float32 of that size has two digits after the point"
    q, k, v = inputs(2, 1100, 1300, 3, 5, torch.float32)
    q, k, v = (q + 50).detach(), (k + 1000).detach(), v.detach()
    want = plain(q.double(), k.double(), v.double())
    assert rel(attend(q, k, v).double(), want) < 5e-6 and rel(plain(q, k, v).double(), want) > 5e-5


@pytest.mark.parametrize('size', [1., 1e6, 1e30])
def test_large_values_do_not_overflow(tiled, size):
    "The largest sums of `exp` times value that go without a maximum"
    k = torch.linspace(-1, 1, 4000).sign()[None, :, None]
    for logit in (1., 30., 68., 70.):
        o = attend(torch.full((1, 3, 1), logit), k, torch.full((1, 4000, 2), size))
        assert o.isfinite().all() and rel(o/size, torch.ones_like(o)) < 1e-4


@pytest.mark.parametrize('n', [13, 1500])
def test_nan_in_a_query_row_stays_in_its_row(tiled, n):
    q, k, v = (t.detach() for t in inputs(2, n, n, 3, 4))
    want = plain(q, k, v)
    q[1, 5, 2] = torch.nan
    o = attend(q, k, v)
    assert o[1, 5].isnan().all()
    o[1, 5] = want[1, 5]
    assert rel(o, want) < 1e-10


@pytest.mark.parametrize('backend', ['auto', 'math', 'tiled', 'sdpa'])
@pytest.mark.parametrize('bs,nq', [(0, 7), (2, 0), (0, 0)])
def test_empty_batch_and_no_query_pixels(bs, nq, backend):
    with attention_backend(backend):
        for f in (attend, dot_attend):
            qkv = inputs(bs, nq, 5, 3, 4)
            o = f(*qkv)
            o.sum().backward()
            assert o.shape == (bs, nq, 4) and all((t.grad == 0).all() for t in qkv)
    assert attention_weights(*qkv[:2], []).shape == (bs, 0, 5)


@pytest.mark.parametrize('n', [7, 530])
def test_output_lies_as_the_values_do(n):
    q, k, v = (t.detach() for t in inputs(2, n, n + 570, 3, 5))
    for f in (attend, dot_attend):
        assert f(q, k, v).stride() == (5 * n, 5, 1) and f(q, k, LAYOUTS['channels'](v)).stride() == (5 * n, 1, n)


def test_gradients_that_are_strided_or_expanded(tiled):
    q, k, v = inputs(2, 530, 1100, 3, 5)
    o, want = attend(q, k, v), plain(q, k, v)
    for do in (torch.randn(2, 5, 530, dtype=torch.float64).mT, torch.randn(1, 530, 1, dtype=torch.float64).expand(2, 530, 5), torch.ones(1, 1, 1, dtype=torch.float64).expand(2, 530, 5)):
        for a, b in zip(torch.autograd.grad(o, (q, k, v), do, retain_graph=True), torch.autograd.grad(want, (q, k, v), do, retain_graph=True)): assert rel(a, b) < 1e-10


def test_some_inputs_need_no_gradient(tiled):
    q, k, v = inputs(1, 9, 7, 3, 2)
    for t in (q, k, v):
        frozen = [x if x is t else x.detach() for x in (q, k, v)]
        assert rel(torch.autograd.grad(attend(*frozen).sum(), t)[0], torch.autograd.grad(plain(*frozen).sum(), t)[0]) < 1e-10


@pytest.mark.parametrize('tile,scale', [((512, 512, 1), 1.), ((5, 7, 2), .3), ((1, 1, 3), .3), ((64, 3, 1), 1.)], indirect=['tile'], ids=named)
def test_gradcheck_and_gradgradcheck(tile, scale):
    qkv = inputs(2, 5, 8, 3, 2)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, scale), qkv)
    assert torch.autograd.gradgradcheck(lambda *a: attend(*a, scale), qkv)


@pytest.mark.parametrize('f', [attend, dot_attend])
def test_gradcheck_and_gradgradcheck_without_tiles(f):
    qkv = inputs(2, 5, 8, 3, 2)
    assert torch.autograd.gradcheck(f, qkv) and torch.autograd.gradgradcheck(f, qkv)


def test_gradient_penalty_is_that_of_the_plain_formula(tiled):
    qkv = inputs(2, 530, 1100, 3, 4)
    def penalty(f):
        gs = torch.autograd.grad(f(*qkv).pow(2).sum(), qkv, create_graph=True)
        return torch.autograd.grad(sum((g.norm() - 1)**2 for g in gs), qkv)
    for a, b in zip(penalty(attend), penalty(plain)): assert rel(a, b) < 1e-9


def test_third_derivatives_are_those_of_the_plain_formula(tiled):
    qkv = inputs(2, 5, 7, 3, 2)
    def third(f):
        y = f(*qkv, .7).pow(2).sum()
        for _ in range(2): y = sum(g.pow(2).sum() for g in torch.autograd.grad(y, qkv, create_graph=True))
        return torch.autograd.grad(y, qkv)
    for a, b in zip(third(attend), third(plain)): assert rel(a, b) < 1e-9


@pytest.mark.parametrize('backend', ['auto', 'math', 'tiled', 'sdpa'])
@pytest.mark.parametrize('bs,nq,nk', [(3, 17, 23), (2, 530, 1100)])
def test_all_backends_agree(backend, bs, nq, nk):
    with attention_backend(backend): compare(inputs(bs, nq, nk, 3, 5), .7, 1e-10)


@pytest.mark.parametrize('backend', ['math', 'tiled', 'sdpa'])
def test_a_backend_runs_when_asked_for(backend, monkeypatch):
    ran = []
    monkeypatch.setitem(ops._backends, backend, lambda q, k, v, scale: ran.append(backend) or v)
    large = inputs(1, 3, 785, 2, 2) if backend == 'math' else inputs(1, 3, 3, 2, 2)     # for which 'auto' takes another
    with attention_backend(backend): attend(*large)
    attend(*large)
    assert ran == [backend]


@pytest.mark.parametrize('bs,nq,nk,dv,want', [(1, 2000, 784, 392, 'math'), (1, 2, 785, 600, 'tiled'), (1, 2049, 512, 255, 'tiled'), (1, 2048, 512, 255, 'math'), (2, 1025, 512, 255, 'tiled'), (3, 5, 7, 2, 'math')])
def test_auto_holds_only_maps_that_are_small(bs, nq, nk, dv, want, monkeypatch):
    "At most 28x28 keys, and beta no larger than two feature maps or than 1024 x 1024"
    ran = []
    for name in ('math', 'tiled'): monkeypatch.setitem(ops._backends, name, lambda *a, name=name: ran.append(name))
    attend(*inputs(bs, nq, nk, 3, dv))
    assert ran == [want]


def test_backends_nest_and_are_restored_after_an_exception():
    with attention_backend('math'):
        with pytest.raises(KeyError):
            with attention_backend('tiled'):
                assert ops._backend == 'tiled'
                raise KeyError
        assert ops._backend == 'math'
        with pytest.raises(ValueError, match="one of auto, math, tiled, fused, flash, sdpa; got 'plain'"):
            with attention_backend('plain'): pass
        assert ops._backend == 'math'
    assert ops._backend == 'auto'


def test_the_same_bits_each_run(tiled):
    def run():
        qkv = inputs(3, 530, 1100, 3, 5, torch.float32)
        return [o := attend(*qkv), *torch.autograd.grad(o.pow(2).sum(), qkv)]
    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_no_tensor_of_nq_by_nk():
    for f, few in ((attend, True), (plain, False)):
        qkv = inputs(1, 4099, 4001, 3, 5, torch.float32)
        with Largest() as largest: f(*qkv).sum().backward()
        assert (largest.numel <= 4099 * 4001 / 8) == few


def orders(bs, nq, nk, d, dv): return nq * nk * (d + dv) * 2 * bs, (nq + nk) * d * dv * 2 * bs

@pytest.mark.parametrize('shape', [(2, 3, 5, 7, 11), (2, 41, 53, 7, 11), (3, 41, 2, 13, 7), (3, 2, 41, 5, 7)], ids=named)
@pytest.mark.parametrize('layout', ['rows', 'channels'])
def test_dot_attend_is_exact_in_the_cheaper_order(shape, layout):
    qkv = laid(inputs(*shape), ['rows', 'rows', layout])
    compare(qkv, .7, 1e-10, dot_attend, plain_dot)
    with FlopCounterMode(display=False) as flops: dot_attend(*qkv)
    by_pixels, by_channels = orders(*shape)
    assert by_pixels != by_channels and flops.get_total_flops() == min(by_pixels, by_channels)

@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.floats(.1, 3), layouts)
def test_dot_attend_over_shapes_and_layouts(bs, nq, nk, d, dv, scale, layouts): compare(laid(inputs(bs, nq, nk, d, dv), layouts), scale, 1e-10, dot_attend, plain_dot)

@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)], ids=named)
def test_dot_attend_rounds_half_precision_only_at_the_end(dtype, tol):
    q, k, v = (t.detach() for t in inputs(1, 41, 4001, 5, 3))
    qkv = as_leaves((q / 100, k + 1, v + 1), dtype)             # times 1/nk that is below what float16 can say in full
    wide = as_leaves(qkv, torch.float64)
    got, want = dot_attend(*qkv, 1 / 4001), plain_dot(*wide, 1 / 4001)
    assert got.dtype == dtype and ((got.double() - want).norm() / want.norm()).item() < tol


OPS = dict(rows=lambda v: v, channels=LAYOUTS['channels'], sliced=LAYOUTS['sliced'])

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=named)
@pytest.mark.parametrize('layout', list(OPS))
def test_custom_operators_keep_what_they_promise_to_torch(layout, dtype):
    q, k, v = (t.detach().to(dtype) for t in inputs(2, 13, 11, 3, 5))
    v = OPS[layout](v)
    o, lse = tiles.attend_op(q, k, v, .7)
    for op, args in ((tiles.attend_op, (q, k, v, .7)), (tiles.grad_op, (q, k, v, o, lse, OPS[layout](torch.randn_like(o)), .7))):
        assert set(torch.library.opcheck(op, args).values()) == {'SUCCESS'}


def test_func_transforms_of_the_tiled_kernel(tiled):
    q, k, v = (t.detach() for t in inputs(2, 5, 7, 3, 4))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    loss = lambda f: lambda *a: f(*a, .7).pow(2).sum()
    close(grad(loss(attend), (0, 1, 2))(q, k, v), grad(loss(plain), (0, 1, 2))(q, k, v))
    close(grad(lambda *a: grad(loss(attend))(*a).pow(2).sum(), (0, 1, 2))(q, k, v), grad(lambda *a: grad(loss(plain))(*a).pow(2).sum(), (0, 1, 2))(q, k, v))
    close(jacrev(attend, (0, 1, 2))(q, k, v), jacrev(plain, (0, 1, 2))(q, k, v))
    qs, ks, vs = torch.stack([q, q + 1, q * 2]), torch.stack([k, -k, k + 2], 1), torch.stack([v, v + 1, -v], -1)
    for args, dims in (((qs, ks, vs), (0, 1, 3)), ((q, ks, v), (None, 1, None)), ((qs, k, vs), (0, None, 3))):
        for f in (lambda *a: attend(*a, .7), lambda *a: grad(loss(attend), (0, 1, 2))(*a)):
            g = (lambda *a: plain(*a, .7)) if f(q, k, v)[0].dim() == 2 else grad(loss(plain), (0, 1, 2))
            close(vmap(f, dims)(*args), vmap(g, dims)(*args))
    close(vmap(vmap(lambda q: attend(q, k, v)))(qs[None]), vmap(vmap(lambda q: plain(q, k, v)))(qs[None]))


@pytest.mark.parametrize('f', [lambda a: jvp(attend, a, a), lambda a: jacfwd(attend)(*a), lambda a: jvp(grad(lambda *a: attend(*a).sum()), a, a)], ids=['jvp', 'jacfwd', 'jvp of grad'])
def test_forward_mode_says_what_to_do(tiled, f):
    a = tuple(t.detach() for t in inputs(2, 5, 7, 3, 4))
    with pytest.raises(NotImplementedError, match=r"reverse mode.*attention_backend\('math'\)"): f(a)
    with attention_backend('math'): f(a)


def test_forward_mode_of_the_formula():
    a = tuple(t.detach() for t in inputs(2, 5, 7, 3, 4))
    with attention_backend('math'): torch.testing.assert_close(jacfwd(attend)(*a), jacrev(plain)(*a))


def test_weights_are_rows_of_beta():
    q, k, v = inputs(3, 20, 31, 4, 2)
    beta = F.softmax(.5 * (q @ k.mT), -1)
    rows = torch.tensor([19, 0, 7, 7])
    w = attention_weights(q, k, rows, scale=.5)
    torch.testing.assert_close(w, beta[:, rows])
    torch.testing.assert_close(attention_weights(q, k, rows, scale=.5, softmax=False), .5 * (q @ k.mT)[:, rows])
    for dtype in (torch.bfloat16, torch.float16):
        w, (qw, kw) = attention_weights(q.to(dtype), k.to(dtype), [0]), (t.to(dtype).float() for t in (q, k))
        assert w.dtype == torch.float32 and rel(w, F.softmax(qw[:, :1] @ kw.mT, -1)) < 1e-6


def test_tensor_subclasses_are_read_as_tensors():
    from fastai.torch_core import TensorImage
    qkv = inputs(1, 6, 6, 3, 2, torch.float32)
    for f in (attend, dot_attend):
        o = f(*[TensorImage(t) for t in qkv])
        assert type(o) is torch.Tensor and torch.equal(o, f(*qkv))
    w = attention_weights(*[TensorImage(t) for t in qkv[:2]], [3])
    assert type(w) is torch.Tensor and torch.equal(w, attention_weights(*qkv[:2], [3]))


@pytest.mark.parametrize('bad,error,says', [
    (lambda q, k, v: (q.tolist(), k, v), TypeError, 'must be a tensor, got list'),
    (lambda q, k, v: (q[0], k, v), ValueError, 'flatten a feature map'),
    (lambda q, k, v: (q.long(), k, v), TypeError, 'floating point, got torch.int64'),
    (lambda q, k, v: (q.bool(), k, v), TypeError, 'floating point, got torch.bool'),
    (lambda q, k, v: (q, k.to(torch.complex64), v), TypeError, '`k` must be real, got torch.complex64'),
    (lambda q, k, v: (q.half(), k, v), TypeError, 'share one dtype'),
    (lambda q, k, v: (q, k.to('meta'), v), TypeError, 'share one device'),
    (lambda q, k, v: (q[:1], k, v), ValueError, r'one batch size, got \[1, 2, 2\]'),
    (lambda q, k, v: (q[..., :2], k, v), ValueError, 'same channels, got 2 and 3'),
    (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError, '`k` is empty'),
    (lambda q, k, v: (q, k[:, :5], v), ValueError, 'one row a pixel each, got 5 and 7'),
])
@pytest.mark.parametrize('f', [attend, dot_attend])
def test_bad_input_is_named(bad, error, says, f):
    with pytest.raises(error, match=says): f(*bad(*[t.detach() for t in inputs(2, 6, 7, 3, 4)]))

@pytest.mark.parametrize('bad,error,says', [(lambda q, k: (q[0], k), ValueError, 'flatten a feature map'), (lambda q, k: (q.long(), k), TypeError, 'floating point'), (lambda q, k: (q[..., :2], k), ValueError, 'same channels')])
def test_bad_input_of_attention_weights_is_named(bad, error, says):
    with pytest.raises(error, match=says): attention_weights(*bad(*[t.detach() for t in inputs(2, 6, 7, 3, 4)][:2]), [3])


@pytest.mark.parametrize('rows,error', [([6], ValueError), ([-1], ValueError), ([[0]], ValueError), (3, ValueError), ([.5], TypeError), ([True], TypeError),
                                        (None, TypeError), ('ab', TypeError), ([1j], TypeError)], ids=named)
def test_bad_rows_are_named(rows, error):
    q, k, _ = inputs(2, 6, 7, 3, 4)
    with pytest.raises(error, match='`rows` must'): attention_weights(q, k, rows)


# attention_stats

def plain_stats(q, k, q_at, k_at, own, scale=1.):
    "The formulas on the whole map"
    p, nk = F.softmax(scale * (q @ k.mT), -1), k.shape[1]
    distance = torch.stack([torch.stack([(a - b).square().sum().sqrt() for b in k_at]) for a in q_at]).to(p)
    entropy = torch.special.entr(p).sum(-1)
    itself = torch.stack([p[:, j, i] for j, i in enumerate(own)], 1)
    return AttentionStats(entropy, entropy / math.log(nk) if nk > 1 else torch.zeros_like(entropy), (p * distance).sum(-1), itself, p.amax(-1))

def places(nq, nk, dims, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(nq, dims, generator=g, dtype=dtype) * 50, torch.rand(nk, dims, generator=g, dtype=dtype) * 50, torch.randint(nk, (nq,), generator=g)

def compare_stats(got, want, tol, dtype):
    for name, w in want._asdict().items():
        g = getattr(got, name)
        assert g.shape == w.shape and g.dtype == dtype and not g.requires_grad
        assert (g.double() - w).abs().max() <= tol * max(1, w.abs().max()), name

@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 3), st.floats(.1, 3), st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2), st.sampled_from([(512, 512), (5, 7), (1, 1), (64, 3)]))
def test_statistics_are_those_of_the_whole_map(bs, nq, nk, d, dims, scale, layouts, tile):
    q, k = laid(inputs(bs, nq, nk, d, 1)[:2], layouts)
    with pytest.MonkeyPatch.context() as m:
        for name, size in zip(('ROWS', 'COLS'), tile): m.setattr(tiles, name, size)
        got = attention_stats(q, k, *places(nq, nk, dims), scale)
    compare_stats(got, plain_stats(q.detach(), k.detach(), *places(nq, nk, dims), scale), 1e-12, torch.float64)


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)], ids=named)
def test_statistics_of_half_precision_are_float32(dtype, tol):
    q, k = (t.detach().to(dtype) for t in inputs(2, 70, 90, 8, 1)[:2])
    for at in (torch.float64, torch.float32, torch.long):
        q_at, k_at, own = places(70, 90, 2)
        where = q_at.to(at), k_at.to(at), own.tolist()
        with torch.autocast('cpu', dtype=torch.bfloat16): got = attention_stats(q, k, *where)
        compare_stats(got, plain_stats(q.double(), k.double(), where[0].double(), where[1].double(), own), tol, torch.float32)


def test_statistics_with_answers_on_paper():
    at = torch.tensor([[0., 0], [0, 4], [3, 0]])
    s = attention_stats(torch.zeros(2, 3, 5), torch.randn(2, 3, 5), at, at, [0, 1, 2])
    for got, want in ((s.entropy, math.log(3)), (s.entropy_share, 1.), (s.itself, 1 / 3), (s.largest, 1 / 3)): torch.testing.assert_close(got, torch.full((2, 3), want))
    torch.testing.assert_close(s.distance, torch.tensor([[4 + 3, 4 + 5, 3 + 5.]]).expand(2, 3) / 3)
    q, k = torch.tensor([[[1000.]]]).expand(1, 3, 1), torch.tensor([[[0.], [1], [-1]]])            # all attend to the second
    s = attention_stats(q, k, at, at, torch.tensor([0, 1, 2]))
    assert s.entropy.tolist() == s.entropy_share.tolist() == [[0, 0, 0]] and not s.entropy.signbit().any()
    assert s.distance.tolist() == [[4, 0, 5]] and s.itself.tolist() == [[0, 1, 0]] and s.largest.tolist() == [[1, 1, 1]]
    s = attention_stats(torch.tensor([[[1.]]]), torch.tensor([[[0.], [math.log(3)]]]), at[:1], at[:2], [1])     # 1/4 and 3/4
    for got, want in zip(s, (math.log(4) - .75 * math.log(3), 2 - .75 * math.log2(3), 3., .75, .75)): assert got.item() == pytest.approx(want, rel=1e-6)
    s = attention_stats(torch.ones(1, 3, 1), torch.ones(1, 1, 1), at, at[:1], [0, 0, 0])           # one key only
    assert s.entropy.tolist() == s.entropy_share.tolist() == [[0, 0, 0]] and s.distance.tolist() == [[0, 4, 3]] and s.itself.eq(1).all()


@pytest.mark.parametrize('top', [1e4, -1e4, 1e30])
def test_statistics_of_huge_logits_stay_finite(top):
    q, k, at = torch.full((1, 3, 1), top), torch.tensor([[[1.], [2], [2], [-3]]]), torch.arange(4.)[:, None]
    for got in attention_stats(q, k, at[:3], at, [0, 1, 2]): assert got.isfinite().all()


def test_statistics_are_streamed():
    n, at = 3000, torch.rand(3000, 2)
    q, k, _ = inputs(2, n, n, 4, 1, torch.float32)
    with Largest() as largest: got = attention_stats(q, k, at, at, torch.arange(n))
    with Largest() as whole: F.softmax(q @ k.mT, -1)
    assert largest.numel <= 2**20 < n * n <= whole.numel
    rows = [0, 1234, n - 1]
    p = attention_weights(q.detach(), k.detach(), rows).double()
    torch.testing.assert_close(got.entropy[:, rows].double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.itself[:, rows].double(), p[:, range(3), rows], rtol=1e-4, atol=1e-9)


def test_statistics_of_empty_batches_and_of_tensor_subclasses():
    from fastai.torch_core import TensorImage
    q, k, _ = inputs(2, 6, 7, 3, 1, torch.float32)
    where = places(6, 7, 2)
    for got, want in zip(attention_stats(TensorImage(q), TensorImage(k), *where), attention_stats(q, k, *where)): assert type(got) is torch.Tensor and torch.equal(got, want)
    assert all(s.shape == (0, 6) for s in attention_stats(q[:0], k[:0], *where))
    assert all(s.shape == (2, 0) for s in attention_stats(q[:, :0], k, where[0][:0], *where[1:2], []))


@pytest.mark.parametrize('change,error,says', [
    (dict(q=torch.ones(6, 3)), ValueError, 'flatten a feature map'), (dict(k=torch.ones(2, 7, 4)), ValueError, 'same channels'), (dict(q=[1]), TypeError, 'must be a tensor'),
    (dict(q_at=torch.ones(5, 2)), ValueError, r'must be \(6, dims\) and \(7, dims\), a position for each pixel; got \(5, 2\) and \(7, 2\)'), (dict(k_at=torch.ones(7, 3)), ValueError, r'got \(6, 2\) and \(7, 3\)'),
    (dict(own=[0] * 5), ValueError, 'for each of the 6 query pixels, got 5'), (dict(own=[7] * 6), ValueError, r'must lie in 0\.\.6'), (dict(own=[-1] * 6), ValueError, 'must lie in'), (dict(own=[.5] * 6), TypeError, 'whole numbers')], ids=named)
def test_bad_input_of_attention_stats_is_named(change, error, says):
    args = dict(q=torch.ones(2, 6, 3), k=torch.ones(2, 7, 3), q_at=torch.ones(6, 2), k_at=torch.ones(7, 2), own=[0] * 6)
    with pytest.raises(error, match=says): attention_stats(**(args | change))


def test_one_long_key_among_short_ones():
    "The bound on logits comes from the longest key: the mean length of 600 keys would call these logits harmless, and their exponentials overflow"
    torch.manual_seed(7)
    q,k,v = torch.randn(2, 600, 8),.01*torch.randn(2, 600, 8),torch.randn(2, 600, 5)
    k[:, 123] = 300*q[:, 7]/q[:, 7].norm(dim=-1, keepdim=True)
    with attention_backend('math'): want = attend(q, k, v)
    with attention_backend('tiled'): got = attend(q, k, v)
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('max_bytes', [tiles.LEAST, 20_011, 100_003, 2**20, 2**40])
@pytest.mark.parametrize('bs,nq,nk,d,dv', [(1, 700, 613, 3, 5), (5, 61, 67, 4, 3), (2, 3, 1999, 2, 7)])
def test_any_budget_is_exact_and_kept(monkeypatch, max_bytes, bs, nq, nk, d, dv):
    sizes = []
    def spy(*args, f=tiles.tile, **kwargs):
        sizes.append(math.prod(size := f(*args, **kwargs)))
        return size
    monkeypatch.setattr(tiles, 'tile', spy)
    compare(inputs(bs, nq, nk, d, dv), .7, 1e-10, lambda *qkvs: attend(*qkvs, max_bytes=max_bytes))
    most = max_bytes//8     # float64
    if not sizes: return     # few enough weights for the formula
    forward, backward = sizes
    assert forward <= most and 2*backward <= most
    assert max_bytes == 2**40 or forward >= min(most, bs*nq*nk, 2**19)/4     # and made use of

def test_a_budget_reaches_backward_passes_that_run_later():
    q, k, v = inputs(1, 2100, 2000, 4, 4, torch.float32)
    for max_bytes in (2**16, 2**18):
        with attention_backend(max_bytes=max_bytes) as ran: o = attend(q, k, v)
        with Largest() as largest: o.square().sum().backward()
        assert ran[0].backend == 'tiled' and ops._max_bytes is None
        assert largest.numel*4 <= max(max_bytes, 2100*5*4), largest.numel

def test_second_derivatives_keep_to_a_budget(monkeypatch):
    rows = []
    monkeypatch.setattr(tiles, 'steps', lambda dim, size, *ts, f=tiles.steps: rows.append(size) or f(dim, size, *ts))
    qkv, got = inputs(2, 90, 80, 3, 4), []
    for max_bytes in (None, 2**19):
        with attention_backend('tiled', max_bytes): o = attend(*qkv)
        g, = torch.autograd.grad(o.square().sum(), qkv[0], create_graph=True)
        rows.clear()
        got.append(torch.autograd.grad(g.square().sum(), qkv))
    assert rows[0] == 2**19//8//12//(2*80)
    for a, b in zip(*got): assert rel(a, b) < 1e-10

def test_a_budget_forbids_the_formula():
    q, k, v = inputs(1, 100, 100, 3, 64, torch.float32)
    formula = 4*100*100*4
    for max_bytes, name in ((formula, 'math'), (formula-1, 'tiled')):
        with attention_backend(max_bytes=max_bytes) as ran: attend(q, k, v)
        assert ran[0].backend == name and (name == 'math' or f'needs {formula:,} bytes, `max_bytes` is {max_bytes:,}' in ran[0].why)
    with attention_backend('math', formula): attend(q, k, v)
    with attention_backend('math', formula-1), pytest.raises(ValueError, match=f'needs {formula:,} bytes'): attend(q, k, v)

@pytest.mark.parametrize('max_bytes,error', [(tiles.LEAST-1, ValueError), (-1, ValueError), (2.**20, TypeError), (True, TypeError), ('1 GiB', TypeError)])
def test_budgets_that_cannot_be(max_bytes, error):
    qkv = inputs(1, 5, 7, 3, 4)
    with pytest.raises(error, match='16384 or more bytes'): attend(*qkv, max_bytes=max_bytes)
    with pytest.raises(error, match='16384 or more bytes'):
        with attention_backend(max_bytes=max_bytes): pass
    with pytest.raises(ValueError, match="use 'auto' or 'tiled'"):
        with attention_backend('sdpa', 2**20): pass
    assert (ops._backend, ops._max_bytes, ops._lists) == ('auto', None, [])

def test_budgets_nest():
    with attention_backend('tiled', 2**20):
        with pytest.raises(ZeroDivisionError), attention_backend(max_bytes=2**17): 1/0
        assert (ops._backend, ops._max_bytes) == ('tiled', 2**20)
        attend(*inputs(1, 5, 7, 3, 4), max_bytes=2**15)
        assert (ops._backend, ops._max_bytes) == ('tiled', 2**20)

def test_blocks_of_two_threads_end_in_any_order():
    "One that began first and ends first takes its own away, and leaves nothing behind"
    begun, both = threading.Event(), threading.Event()
    def first():
        with attention_backend('tiled', 2**20): begun.set(), both.wait()
    thread = threading.Thread(target=first)
    thread.start(), begun.wait()
    with attention_backend('math'):
        both.set(), thread.join()
        assert (ops._backend, ops._max_bytes) == ('math', None)
    assert (ops._backend, ops._max_bytes, len(ops._asked)) == ('auto', None, 1)

@pytest.mark.parametrize('scale,says', [(None, 'got NoneType$'), ('1', 'got str$'), (torch.ones(4), 'got Tensor: multiply `q` by it'), (torch.nn.Parameter(torch.tensor(.5)), '.* gets gradients')], ids=str)
def test_a_scale_is_a_number(scale, says):
    "A tensor that is trained would get no gradient"
    with pytest.raises(TypeError, match=f'`scale` must be a number, {says}'): attend(*inputs(1, 5, 7, 3, 4), scale)

def test_a_scale_of_any_kind_of_number():
    qkv = inputs(1, 5, 7, 3, 4)
    for scale in (.5, np.float32(.5), torch.tensor(.5), torch.tensor([.5])): assert attend(*qkv, scale).equal(attend(*qkv, .5))
    assert attend(*qkv, True).equal(attend(*qkv))

def test_a_budget_in_compiled_code():
    "Its number is a constant of the graph, and another one is compiled anew"
    q, k, v = inputs(2, 530, 870, 3, 4, torch.float32)
    f = torch.compile(lambda *a: attend(*a).square().sum(), backend='aot_eager', fullgraph=True)
    sizes = []
    for max_bytes in (2**15, 2**16, None):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(tiles, 'tile', lambda *a, f=tiles.tile, **kw: sizes.append(f(*a, **kw)) or sizes[-1])
            with attention_backend(max_bytes=max_bytes): loss = f(q, k, v)
            loss.backward()
    assert [math.prod(s) for s in sizes] == [90*91, 64*64, 128*128, 90*91, 2*530*870, 2*870*530]

def test_gradients_asked_for_inside_autocast_are_exact_too():
    "PyTorch leaves autocast on in a backward pass that starts inside of it, as that of a gradient penalty does"
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, c, requires_grad=True) for n, c in ((70, 8), (45, 8), (45, 12)))
    def grads():
        with attention_backend('tiled'): o = attend(q, k+5, v, .7)
        first = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
    want = grads()
    with torch.autocast('cpu', torch.bfloat16): got = grads()
    for a, b in zip(want[0]+want[1], got[0]+got[1]): torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4*a.abs().max().item())
