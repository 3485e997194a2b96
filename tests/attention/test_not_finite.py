"Inputs with a number that is not finite: every backend gives what the formula gives, forward and, where that is defined, backward"
import itertools, math
import pytest, torch
from torch.nn import functional as F

from fastai_selfattn.attention import tiles
from fastai_selfattn.attention.ops import attend, attention_backend

shapes = [(2, 5, 7, 3, 5), (1, 1, 1, 4, 4), (2, 530, 1030, 3, 5), (1, 4, 3, 2, 2), (3, 2, 600, 1, 3)]     # bs, nq, nk, d, dv
numbers = [math.inf, -math.inf, math.nan]

def plain(q, k, v, scale): return F.softmax(scale * (q @ k.mT), dim=-1) @ v

def inputs(shape, seed, dtype=torch.float32):
    "Random ones; the queries of odd seeds are positive, so that a key of -inf has weight 0 everywhere"
    bs, nq, nk, d, dv = shape
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(bs, n, c, generator=g, dtype=dtype) for n, c in ((nq, d), (nk, d), (nk, dv)))
    return [q.abs() if seed % 2 else q, k, v], g

def with_grads(f, qkv, do):
    qkv = [t.clone().requires_grad_() for t in qkv]
    o = f(*qkv, .7)
    return o.detach(), torch.autograd.grad(o, qkv, do)

def same_where_finite(got, want): torch.testing.assert_close(got[want.isfinite()], want[want.isfinite()], rtol=2e-4, atol=2e-4)

def check(backend, qkv, do):
    want, want_grads = with_grads(plain, qkv, do)
    with attention_backend(backend): got, grads = with_grads(attend, qkv, do)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4, equal_nan=True)
    for a, b in zip(grads, want_grads): same_where_finite(a, b)
    return want, want_grads

@pytest.mark.parametrize('backend', ['auto', 'math', 'tiled', 'sdpa'])
@pytest.mark.parametrize('which', range(3), ids='qkv')
@pytest.mark.parametrize('number', numbers)
@pytest.mark.parametrize('shape', shapes, ids=str)
def test_one_number_that_is_not_finite(backend, which, number, shape):
    "5 inputs each, of the largest 2, 792 in all; the formula leaves finite numbers in some of them"
    some = False
    for seed in range(2 if shape[1] == 530 else 5):
        qkv, g = inputs(shape, seed)
        t = qkv[which].view(-1)
        t[torch.randint(len(t), (1,), generator=g)] = number
        want, _ = check(backend, qkv, torch.randn(*shape[:2], shape[4], generator=g))
        some |= bool(want.isfinite().any())
    assert some or shape[0] == 1     # the other images are whole

@pytest.mark.parametrize('backend', ['auto', 'math', 'tiled', 'sdpa'])
def test_a_key_of_minus_infinity_is_as_if_it_were_not_there(backend):
    (q, k, v), g = inputs((2, 530, 1030, 3, 5), 1)
    k[0, 700], do = -math.inf, torch.randn(2, 530, 5, generator=g)
    there = torch.arange(1030) != 700
    _, want = with_grads(plain, [q[:1], k[:1, there], v[:1, there]], do[:1])
    o, (_, dk, dv) = check(backend, [q, k, v], do)
    assert o.isfinite().all()
    with attention_backend(backend): got = with_grads(attend, [q, k, v], do)
    torch.testing.assert_close(got[0][:1], plain(q[:1], k[:1, there], v[:1, there], .7), rtol=1e-4, atol=1e-4)
    for name, a, b in zip(('dk', 'dv'), got[1][1:], want[1:]): torch.testing.assert_close(a[:1, there], b, rtol=1e-3, atol=1e-4, msg=name)
    assert not got[1][1][0, 700].any() and not got[1][2][0, 700].any()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_in_every_dtype(dtype):
    for number, which in itertools.product(numbers, range(3)):
        qkv, g = inputs((2, 530, 1030, 3, 5), 1, torch.float64)
        qkv = [t.to(dtype) for t in qkv]
        qkv[which][1, 17, 2] = number
        want = plain(*[t.double() for t in qkv], .7)
        with attention_backend('tiled'): got = attend(*qkv, .7)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        fine = want.isfinite()
        torch.testing.assert_close(got[fine].double(), want[fine], rtol=2e-2, atol=2e-2)

@pytest.mark.parametrize('backend', ['math', 'tiled'])
def test_keys_whose_sum_is_too_large_for_float32(backend):
    "Each is finite, and so are the logits"
    (q, k, v), g = inputs((2, 530, 1030, 1, 5), 1)
    k[1], q[1] = 1e36*(2+k[1]/k[1].abs().max()), 1e-36*q[1]
    assert k.sum(1).isinf().any() and plain(q, k, v, .7).isfinite().all()
    do = torch.randn(2, 530, 5, generator=g)
    want = [plain(q, k, v, .7), *with_grads(plain, [q, k, v], do)[1]]
    with attention_backend(backend): o, grads = with_grads(attend, [q, k, v], do)
    for a, b in zip((o, *grads), want):
        for image in range(2): assert (a[image]-b[image]).abs().max() < 1e-4*b[image].abs().max()

def test_without_looking_whether_rows_are_safe(monkeypatch):
    "As on a GPU: a maximum for every row, the same numbers"
    monkeypatch.setattr(tiles, 'on_cpu', lambda t: False)
    for number, which in itertools.product(numbers, range(3)):
        qkv, g = inputs((2, 530, 1030, 3, 5), 1)
        qkv[which][1, 17, 2] = number
        check('tiled', qkv, torch.randn(2, 530, 5, generator=g))
