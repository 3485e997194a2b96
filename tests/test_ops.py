"`ops` against the plain formula, over shapes, dtypes and memory layouts that the lessons do not show"
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from fastai_selfattn import ops
from fastai_selfattn.ops import attend, attention_weights


def plain(q, k, v, scale=1.): return F.softmax(scale * (q @ k.mT), dim=-1) @ v

def inputs(bs, nq, nk, d, dv, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(bs, n, ch, generator=g, dtype=dtype).requires_grad_() for n, ch in ((nq, d), (nk, d), (nk, dv))]

def rel(a, b): return ((a - b).norm() / b.norm().clamp_min(1)).item()     # absolute where the truth is (nearly) zero

def compare(qkv, scale, tol):
    o, want = attend(*qkv, scale), plain(*qkv, scale)
    do = torch.randn_like(want)
    assert o.shape == want.shape and o.dtype == want.dtype
    assert rel(o, want) < tol
    for a, b in zip(torch.autograd.grad(o, qkv, do), torch.autograd.grad(want, qkv, do)): assert rel(a, b) < tol


@pytest.fixture(params=[(512, 1024), (5, 7), (1, 1), (64, 3)], ids=str)
def tile(request, monkeypatch):
    monkeypatch.setattr(ops, '_TILE_Q', request.param[0])
    monkeypatch.setattr(ops, '_TILE_K', request.param[1])


@pytest.mark.parametrize('bs,nq,nk,d,dv', [(2, 11, 13, 3, 5), (1, 1, 1, 1, 1), (3, 1, 17, 2, 7), (2, 19, 1, 3, 2)])
def test_any_tile_is_exact_in_float64(tile, bs, nq, nk, d, dv): compare(inputs(bs, nq, nk, d, dv), .7, 1e-10)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 1300), st.integers(1, 1300), st.integers(1, 5), st.integers(1, 6), st.floats(.1, 3))
def test_any_shape_is_exact_in_float64(bs, nq, nk, d, dv, scale): compare(inputs(bs, nq, nk, d, dv), scale, 1e-10)


@pytest.mark.parametrize('n', [37, 1025, 2500])
def test_float32_against_float64_truth(n):
    qkv = inputs(2, n, n, 8, 24)
    single = [t.detach().float().requires_grad_() for t in qkv]
    do = torch.randn(2, n, 24, dtype=torch.float64)
    want, got = plain(*qkv), attend(*single)
    assert rel(got.double(), want) < 1e-5
    for a, b in zip(torch.autograd.grad(got, single, do.float()), torch.autograd.grad(want, qkv, do)): assert rel(a.double(), b) < 1e-5


@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision_computes_logits_in_float32(dtype, tol):
    qkv = [t.detach().to(dtype).requires_grad_() for t in inputs(2, 600, 1100, 16, 5)]
    wide = [t.detach().double().requires_grad_() for t in qkv]
    got, want = attend(*qkv), plain(*wide)
    assert got.dtype == dtype and rel(got.double(), want) < tol
    for a, b in zip(torch.autograd.grad(got.sum(), qkv), torch.autograd.grad(want.sum(), wide)):
        assert a.dtype == dtype and rel(a.double(), b) < 3 * tol


def test_float16_logits_beyond_its_range():
    q = torch.full((1, 3, 4), 200., dtype=torch.float16)        # logits of 160,000; float16 ends at 65,504
    assert attend(q, q, torch.ones_like(q)).isfinite().all()


def test_autocast_leaves_float32_exact():
    qkv = inputs(1, 700, 700, 8, 8, torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        o, w = attend(*qkv), attention_weights(*qkv[:2], [3])
    assert o.dtype == w.dtype == torch.float32
    assert rel(o, plain(*qkv)) < 1e-5 and rel(w @ qkv[2], o[:, 3:4]) < 1e-5


@pytest.mark.parametrize('top', [1e4, -1e4])
def test_huge_logits_stay_finite(top):
    q, k, v = inputs(2, 520, 1030, 1, 3)
    with torch.no_grad(): q.copy_(torch.where(torch.arange(520).view(1, -1, 1) % 2 == 0, 100., 1.)); k[:, 7] = top / 100; k[:, 1029] = top / 100
    compare((q, k, v), 1., 1e-10)
    qkv = [t.detach().float().requires_grad_() for t in (q, k, v)]
    o = attend(*qkv)
    o.sum().backward()
    assert all(t.isfinite().all() for t in (o, *[t.grad for t in qkv]))
    assert rel(o.double(), plain(q, k, v)) < 1e-4


def test_empty_batch_and_no_query_pixels():
    for bs, nq in ((0, 7), (2, 0)):
        qkv = inputs(bs, nq, 5, 3, 4)
        o = attend(*qkv)
        o.sum().backward()
        assert o.shape == (bs, nq, 4) and all((t.grad == 0).all() for t in qkv)
        assert attention_weights(*qkv[:2], []).shape == (bs, 0, 5)


def test_non_contiguous_inputs_and_gradients():
    q, k, v = (t.detach().mT.contiguous().mT.requires_grad_() for t in inputs(2, 530, 1100, 3, 5))
    assert not q.is_contiguous()
    o, want = attend(q, k, v), plain(q, k, v)
    do = torch.randn(2, 5, 530, dtype=torch.float64).mT
    for a, b in zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do)): assert rel(a, b) < 1e-10
    expanded = torch.ones(1, 1, 1, dtype=torch.float64).expand(2, 530, 5).requires_grad_()
    assert torch.equal(torch.autograd.grad(attend(q, k, v).sum(), v)[0], torch.autograd.grad((attend(q, k, v) * expanded).sum(), v)[0])


def test_some_inputs_need_no_gradient():
    q, k, v = inputs(1, 9, 7, 3, 2)
    for t in (q, k, v):
        frozen = [x if x is t else x.detach() for x in (q, k, v)]
        assert rel(torch.autograd.grad(attend(*frozen).sum(), t)[0], torch.autograd.grad(plain(*frozen).sum(), t)[0]) < 1e-10


@pytest.mark.parametrize('scale', [1., .3])
def test_gradcheck_and_gradgradcheck(tile, scale):
    qkv = inputs(2, 5, 8, 3, 2)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, scale), qkv)
    assert torch.autograd.gradgradcheck(lambda *a: attend(*a, scale), qkv)


def test_gradient_penalty_is_that_of_the_plain_formula():
    qkv = inputs(2, 530, 1100, 3, 4)
    def penalty(f):
        gs = torch.autograd.grad(f(*qkv).pow(2).sum(), qkv, create_graph=True)
        return torch.autograd.grad(sum((g.norm() - 1)**2 for g in gs), qkv)
    for a, b in zip(penalty(attend), penalty(plain)): assert rel(a, b) < 1e-9


def test_a_third_derivative_says_no():
    qkv = inputs(1, 4, 4, 2, 2)
    g, = torch.autograd.grad(attend(*qkv).pow(2).sum(), qkv[0], create_graph=True)
    g2, = torch.autograd.grad(g.pow(2).sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g2.sum().backward()


def test_weights_are_rows_of_beta():
    q, k, v = inputs(3, 20, 31, 4, 2)
    beta = F.softmax(.5 * (q @ k.mT), -1)
    rows = torch.tensor([19, 0, 7, 7])
    w = attention_weights(q, k, rows, scale=.5)
    torch.testing.assert_close(w, beta[:, rows])
    assert attention_weights(q.bfloat16(), k.bfloat16(), [0]).dtype == torch.float32


def test_tensor_subclasses_are_read_as_tensors():
    from fastai.torch_core import TensorImage
    qkv = inputs(1, 6, 6, 3, 2, torch.float32)
    o = attend(*[TensorImage(t) for t in qkv])
    assert type(o) is torch.Tensor and torch.equal(o, attend(*qkv))


@pytest.mark.parametrize('bad,error,says', [
    (lambda q, k, v: (q.tolist(), k, v), TypeError, 'must be a tensor, got list'),
    (lambda q, k, v: (q[0], k, v), ValueError, 'flatten a feature map'),
    (lambda q, k, v: (q.long(), k, v), TypeError, 'floating point, got torch.int64'),
    (lambda q, k, v: (q.to(torch.complex64), k, v), TypeError, 'floating point, got torch.complex64'),
    (lambda q, k, v: (q.half(), k, v), TypeError, 'share one dtype'),
    (lambda q, k, v: (q, k.to('meta'), v), TypeError, 'share one device'),
    (lambda q, k, v: (q[:1], k, v), ValueError, r'one batch size, got \[1, 2, 2\]'),
    (lambda q, k, v: (q[..., :2], k, v), ValueError, 'same channels, got 2 and 3'),
    (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError, '`k` is empty'),
    (lambda q, k, v: (q, k[:, :5], v), ValueError, 'one row a pixel each, got 5 and 7'),
])
def test_bad_input_is_named(bad, error, says):
    with pytest.raises(error, match=says): attend(*bad(*[t.detach() for t in inputs(2, 6, 7, 3, 4)]))


@pytest.mark.parametrize('rows,error', [([6], ValueError), ([-1], ValueError), ([[0]], ValueError), ([.5], TypeError), ([True], TypeError)])
def test_bad_rows_are_named(rows, error):
    q, k, _ = inputs(2, 6, 7, 3, 4)
    with pytest.raises(error, match='`rows` must'): attention_weights(q, k, rows)
