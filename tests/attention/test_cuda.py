"""The GPU's way without a GPU: the operators over stand-ins that refuse what PyTorch's kernels refuse and return what they return.
Tests marked `cuda` need a GPU, and are skipped elsewhere. They have not run yet: no GPU was at hand."""
import itertools
from types import SimpleNamespace

import pytest, torch
from formulas import rel
from conftest import named
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_selfattn.attention import cuda, ops, tiles
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.attention.ops import Ran, attend, attention_backend, which_backend

KERNELS = ['fused', 'flash']

def plain(q, k, v, scale=1.): return F.softmax(scale * (q @ k.mT), -1) @ v

# Stand-ins

def refuse(*ts, one_width=False):
    "What the kernels refuse: sdp_utils.cpp and kernel_forward.h of PyTorch 2.14.1"
    for t in ts:
        a = 4 if t.dtype == torch.float32 else 8
        if t.dim() != 4 or t.dtype == torch.float64: raise RuntimeError(f'dim or dtype of {t.shape}, {t.dtype}')
        if t.stride(-1) != 1 or t.shape[-1] % a or any(s % a for s in t.stride()[:-1]): raise RuntimeError(f'{t.shape}, {t.stride()}')
        if t.storage_offset()*t.element_size() % 16: raise RuntimeError(f'offset {t.storage_offset()}')
    if one_width and (len({t.shape[-1] for t in ts}) > 1 or ts[0].shape[-1] > 256 or ts[0].dtype == torch.float32): raise RuntimeError('flash')

def rows_first(t): return torch.empty(t.transpose(1, 2).shape, dtype=t.dtype).transpose(1, 2).copy_(t)     # (bs, n, heads, channels) in memory

def weights_and_lse(q, k, scale):
    s = scale*q.float() @ k.float().mT
    lse = s.logsumexp(-1)
    return (s-lse[..., None]).exp(), lse

class Kernels:
    "Both kernels, in place of `torch.ops.aten`"
    def __init__(self):
        self.calls = []
        for name in ('efficient', 'flash'):
            for end in ('', '_backward'): setattr(self, f'_scaled_dot_product_{name}_attention{end}', SimpleNamespace(default=getattr(self, f'{name}{end}')))

    def efficient(self, q, k, v, bias, with_lse, dropout, causal, *, scale):
        refuse(q, k, v)
        self.calls.append('fused forward')
        p, lse = weights_and_lse(q, k, scale)
        padded = torch.full((*lse.shape[:2], -(-lse.shape[2]//32)*32), torch.nan)
        padded[..., :lse.shape[2]] = lse
        seed = torch.empty((), dtype=torch.int64)
        return rows_first((p @ v.float()).to(v.dtype)), padded, seed, seed

    def flash(self, q, k, v, dropout, causal, debug, *, scale):
        refuse(q, k, v, one_width=True)
        self.calls.append('flash forward')
        p, lse = weights_and_lse(q, k, scale)
        return rows_first((p @ v.float()).to(v.dtype)), lse, None, None, q.shape[2], k.shape[2], None, None, None

    def grads(self, do, q, k, v, o, lse, scale):
        dtypes = [t.dtype for t in (q, k, v)]
        q, k, v, do, o = (t.float() for t in (q, k, v, do, o))
        p = (scale*q @ k.mT - lse[..., None]).exp()
        ds = p*(do @ v.mT - (do*o).sum(-1, keepdim=True))
        return [t.to(d) for t, d in zip((scale*(ds @ k), scale*(ds.mT @ q), p.mT @ do), dtypes)]

    def efficient_backward(self, do, q, k, v, bias, o, lse, seed, offset, dropout, mask, causal, *, scale):
        refuse(q, k, v, do, o)
        if lse.shape[2] % 32 or not lse.is_contiguous() or lse.dtype != torch.float32: raise RuntimeError('lse')
        self.calls.append('fused backward')
        return *self.grads(do, q, k, v, o, lse[..., :q.shape[2]], scale), None

    def flash_backward(self, do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale):
        refuse(q, k, v, do, o, one_width=True)
        if lse.shape != q.shape[:3] or not lse.is_contiguous() or (max_q, max_k) != (q.shape[2], k.shape[2]): raise RuntimeError('lse')
        self.calls.append('flash backward')
        return tuple(self.grads(do, q, k, v, o, lse, scale))

@pytest.fixture
def kernels(monkeypatch):
    "CPU tensors go the GPU's way"
    here = Kernels()
    monkeypatch.setattr(cuda, 'aten', here)
    monkeypatch.setattr(tiles, 'on_cpu', lambda t: False)
    monkeypatch.setattr(tiles, 'forward_tiles', ops._attend_cuda)     # what the operators call; `ops` has the loops themselves
    monkeypatch.setattr(tiles, 'backward_tiles', ops._grad_cuda)
    monkeypatch.setattr(cuda, 'refused', lambda q, k, v, name: 'float64' if v.dtype == torch.float64 else '' if q.numel() and v.numel() else 'empty')
    return here

LAYOUTS = ['rows', 'channels', 'split channels', 'split rows']

def laid(layout, bs, n, m, d, dv, dtype=torch.float64, device='cpu'):
    def made(*shape): return torch.randn(shape).to(device, dtype)     # whole: a view that is copied is no view any more
    if layout == 'rows': return [made(bs, n, d), made(bs, m, d), made(bs, m, dv)]
    if layout == 'channels': return [made(bs, d, n).mT, made(bs, d, m).mT, made(bs, dv, m).mT]
    if layout == 'split channels': return [p.mT for p in made(bs, 2*d+dv, n).split([d, d, dv], 1)]
    return [*made(bs, n, 2*d+dv).split([d, d, dv], 2)]

@pytest.mark.parametrize('name,dtype,tol', [('fused', torch.float32, 1e-5), ('fused', torch.float16, 3e-3), ('fused', torch.bfloat16, 2e-2), ('flash', torch.float16, 3e-3), ('flash', torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('c', [1, 3, 12, 64, 100, 200, 288, 512])
def test_a_kernel_gets_what_it_takes_and_the_result_is_right(name, dtype, tol, layout, c, kernels):
    torch.manual_seed(c)
    q, k, v = (t.requires_grad_() for t in laid(layout, 2, 70, 45, max(1, c//8), c, dtype))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with attention_backend(name) as ran: o = attend(q, k, v, .7)
    want, do = plain(*wide, .7), torch.randn(o.shape).to(dtype)
    with attention_backend(name): got = torch.autograd.grad(o, (q, k, v), do)
    assert kernels.calls == [f'{name} forward', f'{name} backward'] and [r.backend for r in ran] == [name]
    assert o.dtype == dtype and o.is_contiguous() and o.shape == want.shape and rel(o.double(), want) < tol
    for a, b, t in zip(got, torch.autograd.grad(want, wide, do.double()), (q, k, v)): assert a.dtype == dtype and a.shape == t.shape and rel(a.double(), b) < 3*tol

@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('bs,n,m', [(1, 1, 1), (1, 1, 40), (3, 33, 1), (2, 64, 96)])
@pytest.mark.parametrize('offset', [0, 1, 5])
def test_odd_sides_strides_and_offsets(name, bs, n, m, offset, kernels):
    "Sides of 1, whose strides can be anything, and memory that does not begin at a multiple of 16 bytes"
    dtype = torch.float16
    def odd(n, c): return torch.randn(bs*n*c + 64).to(dtype)[offset:offset+bs*n*c].view(bs, n, c).as_strided((bs, n, c), (n*c if bs > 1 else 7, c if n > 1 else 3, 1), offset)
    q, k, v = odd(n, 8), odd(m, 8), odd(m, 64)
    with attention_backend(name): o = attend(q, k, v)
    assert rel(o.double(), plain(q.double(), k.double(), v.double())) < 3e-3

@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('scale', [1., .3, -.7, 0.])
def test_any_scale(name, scale, kernels):
    dtype = torch.float16 if name == 'flash' else torch.float32
    q, k, v = (t.requires_grad_() for t in laid('channels', 2, 37, 45, 3, 24, dtype))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with attention_backend(name): got = torch.autograd.grad(attend(q, k, v, scale).square().sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(plain(*wide, scale).square().sum(), wide)): assert rel(a.double(), b) < (1e-2 if name == 'flash' else 1e-5)

@pytest.mark.parametrize('first,then', [('fused', 'tiled'), ('tiled', 'fused'), ('flash', 'tiled'), ('tiled', 'flash')])
def test_forward_and_backward_may_go_different_ways(first, then, kernels):
    "The log-sum-exp means the same on each, though keys lie far from 0"
    dtype = torch.float16 if 'flash' in (first, then) else torch.float32
    q, k, v = laid('rows', 2, 70, 45, 8, 64, dtype)
    k = k+5
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    for t in (q, k, v): t.requires_grad_()
    with attention_backend(first): o = attend(q, k, v)
    with attention_backend(then): got = torch.autograd.grad(o.square().sum(), (q, k, v))
    assert kernels.calls == [f'{first} forward' if first != 'tiled' else f'{then} backward']
    for a, b in zip(got, torch.autograd.grad(plain(*wide).square().sum(), wide)): assert rel(a.double(), b) < (2e-2 if dtype == torch.float16 else 2e-5)

@pytest.mark.parametrize('name', ['fused', 'tiled'])
def test_second_derivatives_vmap_autocast_and_layers(name, kernels):
    qkv = [t.requires_grad_() for t in laid('channels', 2, 70, 45, 12, 100, torch.float32)]
    wide = [t.detach().double().requires_grad_() for t in qkv]
    def penalty(f, ts): return torch.autograd.grad(sum(g.square().sum() for g in torch.autograd.grad(f(*ts).square().sum(), ts, create_graph=True)), ts)
    with attention_backend(name):
        for a, b in zip(penalty(attend, qkv), penalty(plain, wide)): assert rel(a.double(), b) < 1e-4
        q, k, v = (torch.randn(3, 2, n, c) for n, c in ((40, 8), (30, 8), (30, 64)))
        loss = lambda f: lambda *a: f(*a).square().sum()
        for a, b in zip(vmap(grad(loss(attend), (0, 1, 2)))(q, k, v), vmap(grad(loss(plain), (0, 1, 2)))(q, k, v)): assert rel(a, b) < 1e-4
        layer, x = SelfAttention(24, gamma=.5), torch.randn(2, 24, 5, 7)
        want = layer.eval()(x)
        with torch.autocast('cpu', torch.bfloat16): y = layer(x)
        assert y.dtype == torch.float32 and rel(y, want) < 3e-2
    assert bool(kernels.calls) == (name == 'fused')
    with attention_backend('math'): assert rel(layer(x), want) < 1e-5

def test_a_number_that_is_not_finite(kernels):
    for number, which in itertools.product((torch.inf, -torch.inf, torch.nan), range(3)):
        qkv = laid('rows', 2, 70, 45, 8, 64, torch.float32)
        qkv[which][1, 17, 2] = number
        with attention_backend('fused'): o = attend(*qkv)
        torch.testing.assert_close(o, plain(*qkv), rtol=1e-4, atol=1e-4, equal_nan=True)

@pytest.mark.parametrize('bs,n', [(0, 5), (2, 0)])
def test_nothing_to_do_is_done_by_tiles(bs, n, kernels, monkeypatch):
    qkv = [torch.randn(bs, m, c, requires_grad=True) for m, c in ((n, 8), (5, 8), (5, 16))]
    monkeypatch.setattr(ops, '_choose', lambda q, k, v: ('fused', ''))
    o = attend(*qkv)
    o.sum().backward()
    assert o.shape == (bs, n, 16) and not kernels.calls

# Tiles elsewhere than on a CPU

class Count(TorchDispatchMode):
    "How often the CPU asks a tensor for a number: on a GPU each time it waits"
    waits = steps = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.waits += f.overloadpacket is torch.ops.aten._local_scalar_dense
        self.steps += 1
        return f(*args, **(kwargs or {}))

def test_tiles_elsewhere_never_wait_and_are_few(monkeypatch):
    qkv = laid('channels', 1, 2100, 2100, 2, 4, torch.float32)
    do, counts = torch.randn(1, 2100, 4), []
    for here in (True, False):
        monkeypatch.setattr(tiles, 'on_cpu', lambda t: here)
        with Count() as count:
            o, lse = tiles.forward_tiles(*qkv, 1.)
            grads = tiles.backward_tiles(*qkv, o, lse, do, 1.)
        counts.append(count)
        if not here: assert all(t.is_contiguous() for t in (o, lse, *grads))
    assert counts[0].waits and not counts[1].waits and counts[1].steps < counts[0].steps
    assert rel(o.double(), plain(*[t.double() for t in qkv])) < 1e-5

@pytest.mark.parametrize('layout', LAYOUTS)
def test_tiles_elsewhere_are_exact(layout, monkeypatch):
    monkeypatch.setattr(tiles, 'on_cpu', lambda t: False)
    monkeypatch.setattr(tiles, 'most', lambda t: (7, 5))
    q, k, v = (t.requires_grad_() for t in laid(layout, 2, 37, 45, 3, 11))
    q2 = 300*q.detach()                    # logits that need a maximum
    with attention_backend('tiled'):
        for qq in (q, q2.requires_grad_()):
            got, want = attend(qq, k, v), plain(qq, k, v)
            assert rel(got, want) < 1e-10
            for a, b in zip(torch.autograd.grad(got.square().sum(), (qq, k, v)), torch.autograd.grad(want.square().sum(), (qq, k, v))): assert rel(a, b) < 1e-9
            def pen(f): return torch.autograd.grad(sum(g.square().sum() for g in torch.autograd.grad(f(qq, k, v).square().sum(), (qq, k, v), create_graph=True)), (qq, k, v))
            for a, b in zip(pen(attend), pen(plain)): assert rel(a, b) < 1e-8

# What PyTorch promises

def test_signatures_of_pytorchs_kernels():
    "Called by name, by position: whoever changes them breaks us"
    schema = lambda name: str(getattr(torch.ops.aten, name).default._schema).partition('::')[2]
    assert schema('_scaled_dot_product_efficient_attention') == '_scaled_dot_product_efficient_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, *, float? scale=None) -> (Tensor output, Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)'
    assert schema('_scaled_dot_product_efficient_attention_backward') == '_scaled_dot_product_efficient_attention_backward(Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor attn_bias, Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, float dropout_p, bool[4] grad_input_mask, bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)'
    assert schema('_scaled_dot_product_flash_attention') == '_scaled_dot_product_flash_attention(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)'
    assert schema('_scaled_dot_product_flash_attention_backward') == '_scaled_dot_product_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)'

def form(t): return tuple(t.shape), [s for s, n in zip(t.stride(), t.shape) if n > 1], t.dtype     # of a side of 1 the stride can be anything

@pytest.mark.parametrize('name', KERNELS)
def test_stand_ins_give_what_pytorch_says_of_its_kernels(name, kernels):
    q, v = (torch.randn(2, 70, c).half() for c in (12, 200))
    heads = cuda._heads(q, q, v, name)
    args = (None, True, 0., False) if name == 'fused' else (0., False, False)
    op = '_scaled_dot_product_efficient_attention' if name == 'fused' else '_scaled_dot_product_flash_attention'
    mine = getattr(kernels, op).default(*heads, *args, scale=1.)
    with FakeTensorMode():
        on_gpu = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device='cuda') for t in heads]
        theirs = getattr(torch.ops.aten, op).default(*on_gpu, *args, scale=1.)
    for a, b in zip(mine[:2], theirs[:2]): assert form(a)[0::2] == form(b)[0::2]
    assert mine[1].stride() == theirs[1].stride()

@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('c', [3, 64, 200])
def test_our_operators_promise_what_the_kernels_give(name, layout, c, kernels):
    "`torch.compile` believes the fake ones, strides included"
    qkv = laid(layout, 2, 70, 70, max(1, c//8), c, torch.float16)
    with attention_backend(name):
        o, lse = ops._attend_cuda(*qkv, .7)
        do = torch.randn(2, c, 70).half().mT
        got = [o, lse, *ops._grad_cuda(*qkv, o, lse, do, .7)]
    with attention_backend('tiled'): tiled = [*ops._attend_cuda(*qkv, .7), *ops._grad_cuda(*qkv, o, lse, do, .7)]
    with FakeTensorMode():
        fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device='cuda') for t in qkv]
        fo, flse = tiles.attend_op(*fake, .7)
        promised = [fo, flse, *tiles.grad_op(*fake, fo, flse, torch.empty_like(fo), .7)]
    assert list(map(form, got)) == list(map(form, promised)) == list(map(form, tiled))

# The choice

def shaped(dtype, bs=2, n=1024, c=64, device='meta'): return [torch.empty(bs, n, ch, dtype=dtype, device=device) for ch in (max(1, c//8), max(1, c//8), c)]

yes, no = lambda *a: '', lambda q, k, v, name: f'{name}: too odd'

@pytest.mark.parametrize('dtype,capability,ask,want,why', [
    (torch.float16, (9, 0), yes, 'fused', 'memory-efficient kernel takes it'), (torch.bfloat16, (8, 6), yes, 'fused', 'takes it'), (torch.float16, (7, 5), yes, 'fused', 'takes it'),
    (torch.bfloat16, (7, 5), no, 'tiled', 'refuses: fused: too odd'), (torch.float32, (9, 0), yes, 'tiled', 'not measured'), (torch.float32, (8, 0), yes, 'fused', 'takes it'),
    (torch.float32, (8, 0), no, 'tiled', 'refuses'), (torch.float64, (9, 0), yes, 'tiled', 'float64; more than')], ids=named)
def test_the_choice(dtype, capability, ask, want, why):
    name, reason = cuda.choose(*shaped(dtype), ask=ask, capability=capability)
    assert name == want and why in reason

def test_the_formula_holds_a_bounded_map_and_only_where_nothing_else_runs():
    for n, want in ((724, 'math'), (725, 'tiled')): assert cuda.choose(*shaped(torch.float64, 2, n))[0] == want and cuda.small(*shaped(torch.float64, 2, n)[:2]) == (want == 'math')
    assert cuda.choose(*shaped(torch.float16, 2, 0))[0] == 'math'
    assert cuda.choose(*shaped(torch.float16, 2, 5), ask=no)[0] == 'tiled'          # not n x n in half precision

def test_deterministic_algorithms(monkeypatch):
    for bs, want in ((2, 'tiled'), (64, 'fused')):
        monkeypatch.setattr(cuda, 'is_deterministic', lambda: True)
        assert cuda.choose(*shaped(torch.float16, bs, 64), ask=yes)[0] == want

def test_flash_is_off_until_it_is_measured(monkeypatch):
    assert not cuda.FLASH
    monkeypatch.setattr(cuda, 'FLASH', True)
    assert cuda.choose(*shaped(torch.float16), ask=yes)[0] == 'flash' and cuda.choose(*shaped(torch.float32), ask=yes, capability=(8, 0))[0] == 'fused'
    assert cuda.choose(*shaped(torch.float16), ask=lambda q, k, v, name: '' if name == 'fused' else 'no')[0] == 'fused'

@pytest.mark.parametrize('name', KERNELS)
def test_the_forms_that_pytorch_is_asked_about_are_those_that_the_kernel_gets(name):
    for c, layout in itertools.product((3, 64, 200), LAYOUTS):
        qkv = laid(layout, 2, 70, 70, max(1, c//8), c, torch.float16)
        for a, b in zip(cuda._forms(*qkv, name), cuda._heads(*qkv, name)):
            assert a.shape == b.shape and a.dtype == b.dtype and a.stride(-1) == b.stride(-1) == 1 and a.untyped_storage().nbytes() == 2*a.shape[-1]
            refuse(a)

@pytest.mark.parametrize('shapes,reason', [((2, 2, 2), ''), ((2, 2, 4), 'last dimension')])
def test_pytorch_gives_its_reasons_and_nothing_reaches_the_screen(shapes, reason, capfd, recwarn):
    "Its kernel for a CPU asks for one width too"
    forms = [torch.empty(1, 1, 5, c) for c in shapes]
    why = cuda._why('flash', *forms)
    assert reason in why and 'because' not in why and 'disabled' not in why and (why == 'PyTorch does not say why') == (not reason)
    assert not recwarn.list and capfd.readouterr() == ('', '')

def test_a_kernel_that_is_switched_off_is_refused_for_that():
    before = torch.backends.cuda.mem_efficient_sdp_enabled()
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try: assert cuda._why('fused', *[torch.empty(1, 1, 5, 8)]*3) == 'it is switched off in `torch.backends.cuda`'
    finally: torch.backends.cuda.enable_mem_efficient_sdp(before)

def test_a_kernel_asked_for_by_name_elsewhere_is_refused():
    for name in KERNELS:
        with attention_backend(name) as ran, pytest.raises(ValueError, match=f"'{name}' does not take these tensors: it runs on CUDA, and these are on cpu"): attend(*laid('rows', 1, 5, 7, 3, 4))
        assert not ran

def test_which_backend_and_the_list_of_calls():
    large, small = laid('rows', 1, 800, 800, 3, 4), laid('rows', 2, 5, 7, 3, 4, torch.float32)
    with attention_backend() as outer:
        attend(*large)
        with attention_backend('sdpa') as inner: attend(*small)
        attend(*small)
    attend(*small)
    assert [r.backend for r in outer] == ['tiled', 'sdpa', 'math'] and inner == [outer[1]]
    assert outer[1] == Ran('sdpa', 'asked for by `attention_backend`', 'cpu', torch.float32, 2, 5, 7, 3, 4)
    assert which_backend(*large) == outer[0][:2] == ('tiled', 'more than 784 keys') and which_backend(*small)[0] == 'math'
    assert which_backend(*[t.to('meta') for t in small]) == ('math', 'no kernel is known for meta; 1,048,576 weights or fewer')
    with pytest.raises(ValueError, match='same channels'): which_backend(large[0], large[2], large[2])
    assert not ops._lists

# On a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: not run here')

@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('c', [12, 64, 200, 512])
@pytest.mark.parametrize('name', ['auto', 'tiled', 'fused', 'flash'])
def test_on_a_gpu(name, c, layout, dtype, tol):
    q, k, v = (t.requires_grad_() for t in laid(layout, 2, 576, 576, max(1, c//8), c, dtype, 'cuda'))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    no = cuda.refused(q, k, v, name) if name in KERNELS else ''
    if name == 'fused' and dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0): assert not no
    if no: pytest.skip(no)
    if (name, dtype) == ('fused', torch.float32): tol = 3e-5     # three products of TF32 for one of float32
    with attention_backend(name):     # the backward pass too
        o = attend(q, k, v, .7)
        do = torch.randn_like(o)
        got, want = torch.autograd.grad(o, (q, k, v), do), plain(*wide, .7)
    assert o.is_contiguous() and rel(o.double(), want) < tol
    for a, b in zip(got, torch.autograd.grad(want, wide, do.double())): assert rel(a.double(), b) < 3*tol

@pytest.mark.cuda
@on_gpu
def test_the_choice_does_not_wait_for_the_gpu():
    qkv = laid('channels', 2, 576, 576, 8, 64, torch.float16, 'cuda')
    attend(*qkv)
    torch.cuda.set_sync_debug_mode('error')
    try: which_backend(*qkv), attend(*qkv)
    finally: torch.cuda.set_sync_debug_mode('default')
