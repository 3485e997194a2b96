import functools, gc, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import settings
from processes import python

# Neither torch nor fastai is imported here: the process that only hands out tests to those of pytest-xdist need not wait for them.

root = Path(__file__).resolve().parent.parent
bin_dir = Path(sys.executable).parent

def pytest_configure(config):
    "A GPU is there for `pytest -m cuda` alone: fastai would take it in every test"
    if not config.option.markexpr.startswith('cuda'): os.environ['CUDA_VISIBLE_DEVICES'] = ''

def contents(folder):
    "Bytes of each file below `folder`, but for Python's own caches"
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

def changed(before, after): return sorted(k for k in before.keys()|after.keys() if before.get(k) != after.get(k))

def run(*args, cwd, **env):
    "Run a command in `cwd`; fail with its output if it fails"
    res = subprocess.run([str(a) for a in args], cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env={**os.environ, **env})
    if res.returncode: pytest.fail(f"{' '.join(map(str, args))}\n{res.stdout[-20000:]}", pytrace=False)
    return res.stdout

_ON_CPUS = """
import torch
import fastai.distributed as distributed

def broadcast(self, t, rank):     # the order of a shuffled batch, which fastai sends through a GPU
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

distributed.DistributedDL._broadcast = broadcast
"""

def train_in_processes(folder, script, n=2, beside=None):
    "What `script` prints in `folder`, run by `n` processes that train together on CPUs; it can import the modules `beside` a test"
    pytest.importorskip('accelerate', reason='fastai trains on several processes with accelerate, which is not installed')
    path = [root, root/'tests'] + ([Path(beside).parent] if beside else [])
    return python(_ON_CPUS+script, folder=folder, n=n, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(map(str, path)))

def project_files():
    "Every file of the project: what git tracks or would add"
    out = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=root)
    return sorted({f for f in out.split('\0') if f and (root/f).is_file()})

def copy_project(dest):
    for f in project_files():
        (dest/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/f, dest/f)
    return dest

# One thread for each process of pytest-xdist, and for what it starts, so that they do not wait for each other; and in CI the same examples every time.
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
settings.register_profile('ci', derandomize=True, deadline=None)
if os.environ.get('CI'): settings.load_profile('ci')

# Why a test is slow, and how its name or file says so. `pytest -m "not slow"` leaves these out.
SLOW = {'compiles, or exports to another format': r'compil|onnx|tensorboard|weights_and_biases|test_layers::\w*export|test_export',
        'starts processes': r'process|distributed|console_script|installed|wheel|ctrl_c|entry_points|pretrained|same_run|bench_loggers|test_csv|::\w*command|'
                            r'only_learner_patches|imported_by_the_module|repainted_at_its_own',
        'measures memory': r'memory|streamed|peak|no_tensor_of',
        'breaks off at each of many steps': r'failure_at_any_step|interrupted|hooks_and_handles|however_training_ends|nothing_is_left_behind',
        'trains or builds whole U-Nets': r'test_unet::|test_compare::|test_generators|fastais_own|unet\]|the_whole_journey|any_order|orders|whole_study|optimizer_goes_on',
        'trains with data of every kind, and draws and films what it sees': r'test_loggers|test_inputs|test_learner::\w*(to_give|shown|drawing|stays|export|whatever|same_batch)',
        'runs whole commands': r'test_walls|test_failures|test_versus|test_bench_commands|test_masks::test_a_run',
        "goes through other libraries' models": r'test_(insert|upgrade|sites|axes)::.*(resnet|densenet|convnext|efficientnet|timm|deeplab)|'
                                                r'test_upgrade::test_xresnet',
        'lays out many figures': r'titles_neither|looks_right|test_plot::\w*(axes|tensors|choice|a_row|legend|headings)',
        "proves derivatives in double precision, or operators by PyTorch's own checks": r'gradcheck|promise_to_torch',
        'tries many combinations': r'one_number_that|options_against_the_formula|mean_colour|wall_share|watched_layers|into_the_same_model|half_precision_are|'
                                   r'under_autocast|test_insert::test_(remove_)?where|func_transforms|any_value|any_shape_and_layout|float64_truth|budget_reaches',
        'runs a whole page': r'test_notebooks'}

def pytest_addoption(parser, pluginmanager):
    "`pytest -p no:xdist`, for a debugger say, runs in one process: the options of pytest-xdist in pyproject.toml mean nothing then"
    if pluginmanager.hasplugin('xdist'): return
    for option in ('--numprocesses', '--maxprocesses', '--dist'): parser.addoption(option, help='of pytest-xdist, which is not in use')

def pytest_collection_modifyitems(items):
    for item in items:
        name = f'{item.path.stem}::{item.name}'
        if {'browser','driver'} & {*item.fixturenames} or any(re.search(r, name) for r in SLOW.values()): item.add_marker(pytest.mark.slow)

@pytest.fixture(scope='session', autouse=True)
def heap():
    "What the imports made stays: the garbage collector, which some tests call, need not go through a million objects each time"
    import fastai.callback.all  # noqa: F401  gives `Learner` `no_bar`, `fit_one_cycle` and the like, whichever test comes first
    gc.collect()
    gc.freeze()

@pytest.fixture(autouse=True)
def no_figures_left():
    "Whichever test comes next may count figures"
    yield
    if pyplot := sys.modules.get('matplotlib.pyplot'): pyplot.close('all')

def named(value):
    "The id of a parameter, without addresses in memory, which would differ between the processes of pytest-xdist"
    return re.sub(r' at 0x[0-9a-f]+', '', str(value))

@pytest.fixture
def checkout(tmp_path):
    "A copy of the project to run tools in"
    return copy_project(tmp_path/'checkout')

@pytest.fixture(scope='session')
def one_registry():
    "PyTorch gathers its ONNX operators anew at each export, for a second; with this once"
    registry = pytest.importorskip('torch.onnx._internal.exporter._registration').ONNXRegistry
    with pytest.MonkeyPatch.context() as m:
        m.setattr(registry, 'from_torchlib', staticmethod(functools.cache(registry.from_torchlib)))
        yield

class Counts:
    "A backend that counts the graphs it compiled and how often they ran"
    def __init__(self): self.compiled = self.ran = 0
    def __call__(self, graph, example):
        self.compiled += 1
        def run(*args):
            self.ran += 1
            return graph.forward(*args)
        return run

@pytest.fixture
def counts():
    from torch._dynamo import reset
    reset()
    yield Counts()
    reset()

class Largest:
    "Remembers the most float32 elements that any allocation had, inside custom operators and in backward passes too"
    numel = 0
    def __enter__(self):
        from torch.profiler import ProfilerActivity, profile
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exc):
        self._profile.__exit__(*exc)
        self.numel = max((e.self_cpu_memory_usage for e in self._profile.events()), default=0) // 4
