"""What PyTorch's compiled dispatcher makes of attention on GPUs that are not here.

Run it when PyTorch is upgraded:  python scripts/check_dispatcher.py
It needs a CUDA build of PyTorch on Linux, and gcc; no GPU and no driver. Two small libraries (scripts/dispatcher/) answer what PyTorch asks
the CUDA runtime, as a GPU of a given compute capability would; tensors are fake, so PyTorch's own checks run, and no kernel does.
The answers are compared with tests/attention/dispatcher-torch<release>.csv, of the newest release that has one; `--write` writes that of this one.
The exit status is 0 if nothing changed, and 1 if something did, or a kernel gave something else than this package expects.

What is faithful on fake tensors: `torch.backends.cuda.can_use_*`, which operator `F.scaled_dot_product_attention` ends in, and shapes and strides
of the kernels' outputs. What is not: `torch._fused_sdp_choice`, which says MATH for every fake tensor. Nothing here says what a kernel computes, or how fast."""
import argparse, csv, json, os, subprocess, sys, tempfile, warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES, TABLES = ROOT/'scripts/dispatcher', ROOT/'tests/attention'
CAPABILITIES = 75, 80, 86, 90, 100, 120
COLUMNS = 'capability', 'question', 'dtype', 'd', 'dv', 'accepted', 'runs'

# The answers, asked for in a process of their own over the two libraries

def maps(layout, bs, n, d, dv, dtype, grad=False):
    "q, k and v, (bs, n, channels): rows; views of maps that have channels first; parts of one map"
    import torch
    def empty(*shape): return torch.empty(shape, device='cuda', dtype=dtype)
    if layout == 'rows': t = [empty(bs, n, c) for c in (d, d, dv)]
    elif layout == 'channels': t = [empty(bs, c, n).mT for c in (d, d, dv)]
    elif layout == 'parts of rows': t = empty(bs, n, 2*d+dv).split([d, d, dv], 2)
    else: t = [p.mT for p in empty(bs, 2*d+dv, n).split([d, d, dv], 1)]
    return [p.detach().requires_grad_(grad) for p in t]

def accepted(q, k, v):
    "Which kernels say that they take (bs, heads, n, channels)"
    import torch.backends.cuda as c
    from torch.nn.attention import SDPAParams
    p = SDPAParams(q, k, v, None, 0., False, False)
    asked = dict(cudnn=c.can_use_cudnn_attention, flash=c.can_use_flash_attention, efficient=c.can_use_efficient_attention)
    return ' '.join(name for name, can_use in asked.items() if can_use(p))

def runs(q, k, v):
    "The kernel that PyTorch's function ends in"
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    class Log(TorchDispatchMode):
        def __init__(self): super().__init__(); self.names = []
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.names.append(f.overloadpacket.__name__)
            return f(*args, **(kwargs or {}))
    with Log() as log: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.)
    fused = [n for n in log.names if n.startswith('_scaled_dot_product_')]
    return fused[0].removeprefix('_scaled_dot_product_').removesuffix('_attention') if fused else 'n x n'

def sdpa_rows():
    "What PyTorch's function does by itself"
    import torch
    half = torch.float16, torch.bfloat16
    def row(question, dtype, d, dv, layout='rows', bs=2, n=4096, grad=True):
        q, k, v = (t[:, None] for t in maps(layout, bs, n, d, dv, dtype, grad))
        return question, str(dtype)[6:], d, dv, accepted(q, k, v), runs(q, k, v)
    for dtype in (torch.float32, *half):
        for d, dv in ((8, 64), (12, 96), (16, 128), (32, 256), (36, 288), (48, 384), (64, 512), (64, 64), (128, 128), (256, 256), (512, 512)):
            for grad in (True, False): yield row('training' if grad else 'inference', dtype, d, dv, grad=grad)
        for layout in ('channels', 'parts of rows', 'parts of channels'):
            for d, dv in ((9, 72), (12, 96), (16, 128)): yield row(layout, dtype, d, dv, layout)
    yield row('training', torch.float64, 16, 128)
    for bs in (65535, 65536): yield row(f'{bs} images', torch.float16, 16, 128, bs=bs, n=16)
    for n in (0, 1): yield row(f'n = {n}', torch.float16, 16, 128, n=n)
    torch.use_deterministic_algorithms(True)
    for dv in (16, 128): yield row('deterministic', torch.float16, 16, dv)
    torch.use_deterministic_algorithms(False)

def our_rows():
    "What the package chooses, and whether each kernel takes what it is handed, forward and backward"
    import torch
    from fastai_selfattn.attention import cuda
    at = divmod(int(os.environ['SM']), 10)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for c in (1, 3, 8, 12, 24, 40, 64, 96, 100, 128, 200, 256, 288, 320, 384, 512, 1000):
            took, chosen, d = {'fused':True, 'flash':True}, set(), max(1, c//8)
            for layout in ('rows', 'channels', 'parts of rows', 'parts of channels'):
                q, k, v = maps(layout, 2, 1000, d, c, dtype)
                chosen.add(cuda.choose(q, k, v, capability=at)[0])
                for name in took: took[name] &= fits(cuda, q, k, v, name)
            yield 'ours', str(dtype)[6:], d, c, ' '.join(n for n, yes in took.items() if yes), ' '.join(sorted(chosen))

def fits(cuda, q, k, v, name):
    "Whether kernel `name` takes these; an error where it says so and does not, or gives other shapes than ours"
    if why := cuda.refused(q, k, v, name):
        if 'does not say' in why: raise RuntimeError(f'{name} is refused, and the reason is not found')
        return False
    o, lse = cuda.forward(q, k, v, 1., name)
    grads = cuda.backward(q, k, v, o, lse, o.clone(), 1., name)
    shapes = [tuple(t.shape) for t in (o, lse, *grads)]
    wanted = [tuple(v.shape), (*q.shape[:2], 1), *(tuple(t.shape) for t in (q, k, v))]
    if shapes != wanted: raise RuntimeError(f'{name}: {shapes} in place of {wanted}')
    return all(t.is_contiguous() for t in (o, lse, *grads))

def bench_rows():
    "Whether the ways of `selfattn-bench --gpu` run, forward and backward; its layers and FlexAttention cannot be made of fake tensors"
    import torch
    from functools import partial
    from fastai_selfattn.attention import cuda
    from fastai_selfattn.bench.ways import WAYS, prepare_way
    cuda.choose = partial(cuda.choose, capability=divmod(int(os.environ['SM']), 10))     # a device that is not there cannot be asked
    def answer(way, dtype, c):
        *qkv, do = maps('channels', 2, 576, c//8, c, dtype) + maps('channels', 2, 576, c, c, dtype)[:1]
        try:
            run, inputs = prepare_way(way, *qkv, (24, 24))
            with way.around():
                with torch.autocast('cuda', dtype, enabled=dtype != torch.float32): o = run()
                grads = torch.autograd.grad(o, inputs, do.to(o.dtype))
        except (RuntimeError, ValueError): return 'refused'
        if [o.shape, *(g.shape for g in grads)] != [do.shape, *(t.shape for t in inputs)]: raise RuntimeError(f'{way}: wrong shapes')
        return 'runs'
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for c in (36, 256):
            for name, way in WAYS.items():
                if not (way.is_layer or way.compiles): yield f'bench: {name}', str(dtype)[6:], c//8, c, '', answer(way, dtype, c)

def ask():
    "The rows of one capability, as JSON"
    warnings.simplefilter('ignore')
    sys.path.insert(0, str(ROOT))
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): print(json.dumps([(os.environ['SM'], *map(str, row)) for rows in (sdpa_rows, our_rows, bench_rows) for row in rows()]))

# The libraries

def cuda_headers():
    "Where the headers of the CUDA runtime are: in NVIDIA's package beside PyTorch's, or in Triton's"
    import torch
    site = Path(torch.__file__).parent.parent
    folders = sorted(site.glob('nvidia/*/include')), [site/'triton/backends/nvidia/include']
    for folder in sum(folders, []):
        if all((folder/name).exists() for name in ('cuda_runtime_api.h', 'crt/host_defines.h')): return folder
    sys.exit(f"no headers of the CUDA runtime below {site}: install a CUDA build of PyTorch with its packages, or triton")

def build(folder):
    "Compile both libraries into `folder`; what a process needs in its environment to run over them"
    include = cuda_headers()
    for source, library in (('cudart.c', 'cudart.so'), ('driver.c', 'libcuda.so.1')):
        subprocess.run(['gcc', '-shared', '-fPIC', '-w', f'-I{include}', SOURCES/source, '-o', folder/library], check=True)
    paths = [str(folder), *filter(None, [os.environ.get('LD_LIBRARY_PATH')])]
    return {**os.environ, 'LD_PRELOAD':str(folder/'cudart.so'), 'LD_LIBRARY_PATH':':'.join(paths), 'CUDA_VISIBLE_DEVICES':'0'}

def all_rows():
    "The answers of all capabilities"
    with tempfile.TemporaryDirectory() as tmp:
        env = build(Path(tmp))
        for capability in CAPABILITIES:
            res = subprocess.run([sys.executable, __file__, '--ask'], env={**env, 'SM':str(capability)}, capture_output=True, text=True)
            if res.returncode: sys.exit(f"capability {capability}: the process that asks failed\n{res.stderr[-3000:]}")
            yield from map(tuple, json.loads(res.stdout.splitlines()[-1]))

# The comparison

def newest_table():
    "The expected table of the newest PyTorch that has one"
    def release(file): return [int(i) for i in file.stem.removeprefix('dispatcher-torch').split('.')]
    return max(TABLES.glob('dispatcher-torch*.csv'), key=release, default=None)

def read(file):
    with file.open(newline='') as f: return [tuple(row) for row in csv.reader(f)][1:]

def write(file, rows):
    with file.open('w', newline='') as f: csv.writer(f, lineterminator='\n').writerows([COLUMNS, *rows])

def changes(before, after):
    "A line for each question whose answer differs, is new or is gone"
    before, after = ({row[:5]:row[5:] for row in rows} for rows in (before, after))
    def said(answer): return f"accepted by {answer[0] or 'none'}, {answer[1]}" if answer else 'not asked'
    return [f"{' '.join(key)}: {said(before.get(key))} -> {said(after.get(key))}" for key in before | after if before.get(key) != after.get(key)]

def summary(rows):
    "Lines to read: per question, dtype and channels, what runs on each capability"
    table = {}
    for capability, *key, _, what in rows: table.setdefault(tuple(key), {})[capability] = what
    yield f"{'':40}" + ''.join(f'sm{c:<11}' for c in CAPABILITIES)
    for (question, dtype, d, dv), by in table.items(): yield f"{question} {dtype} ({d}, {dv})".ljust(40) + ''.join(by[str(c)].ljust(13) for c in CAPABILITIES)

def main(argv=None):
    p = argparse.ArgumentParser(description="Compare what PyTorch's dispatcher makes of attention on GPUs with what is expected; needs a CUDA build, gcc, and no GPU")
    p.add_argument('--write', action='store_true', help="write the table of this PyTorch")
    p.add_argument('--ask', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.ask: return ask()
    import torch
    if not torch.version.cuda: sys.exit(f"PyTorch {torch.__version__} was built without CUDA: there is no dispatcher to ask")
    rows, expected = list(all_rows()), newest_table()
    before = read(expected) if expected else None     # which `--write` may replace
    print('\n'.join(summary(rows)))
    file = TABLES/f"dispatcher-torch{torch.__version__.partition('+')[0]}.csv"
    if args.write:
        write(file, rows)
        print(f'written: {file.relative_to(ROOT)}')
    if before is None: return 0
    found = changes(before, rows)
    print('\n'.join([f"{len(found)} of {len(rows)} answers differ from {expected.name}", *found]))
    return int(bool(found))

if __name__ == '__main__': sys.exit(main())
