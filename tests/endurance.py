"""What people do with attention in a Learner, in any order and for long: `scripts/endure.py` runs it for hours, test_endurance.py for seconds.

A shadow knows what each step may change; after each step everything else must be as it was, to the bit."""
import copy
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import Datasets
from fastai.layers import ConvLayer, NormType, ResBlock
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD, Adam, Lookahead, ranger
from fastai.torch_core import params
from hypothesis import note, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from formulas import written_out
from torch import Tensor, nn

import fastai_selfattn.learner  # noqa: F401  patches `Learner`
from fastai_selfattn.attention.kinds import attention_layers, attention_off, attention_status
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.attention.ops import attend, attention_backend
from fastai_selfattn.placement.keep import load_attention, save_attention
from fastai_selfattn.placement.only import OnlyAttention
from fastai_selfattn.placement.optim import AttentionHooks, AttentionSplitter, inserted_layers
from fastai_selfattn.placement.unet import create_unet_model
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.record import AttentionRecorder

SIZE = 22, 34
COUNTS = Counter()     # how often each step did its work, and how often it was refused


# --- two small models

class CNN(nn.Module):
    "With a module under two names that is called twice, a norm, dropout, and modules that are no `Sequential`"
    def __init__(self):
        super().__init__()
        self.stem = ConvLayer(3, 8, stride=2)
        self.block = ResBlock(1, 8, 8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.twice
        self.same = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, 2, 1)
        self.drop = nn.Dropout(.5)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x): return self.head(self.norm(self.drop(self.down(self.same(self.twice(self.again(self.block(self.stem(x)))).relu())))))

def cnn():
    torch.manual_seed(4)
    return CNN()

def encoder(pretrained=False, weights=None):
    "As `small_encoder`, and smaller, since a sequence takes as long as its copies and files do"
    stages = [nn.Sequential(ConvLayer(a, b, stride=2), ResBlock(1, b, b)) for a,b in ((6,8), (8,12), (12,16))]
    return nn.Sequential(ConvLayer(3, 6, stride=2), *stages, nn.AdaptiveAvgPool2d(1))

def unet():
    torch.manual_seed(4)
    return create_unet_model(encoder, 2, SIZE, pretrained=False)

def cnn_groups(model): return [params(nn.ModuleList(m)) for m in ((model.stem,model.block), (model.twice,model.same,model.down), (model.norm,model.head))]

def unet_groups(model): return [params(model[0]), params(model[1:])]

PLACES = {cnn:['stem', 'block', 'block.convpath', 'twice', 'again', 'same', 'down', 'norm', 'head', 'stem.0', 'stem.1'],
          unet:['middle', 'encoder.1', 'encoder.3', 'decoder.1', 'decoder.*', 'layers.4.conv1', 'layers.5.conv2', 'layers.0.2']}
GROUPS = {cnn:cnn_groups, unet:unet_groups}
LAYERS = [{}, dict(reduction=2, heads=2), dict(norm_type=None, pool=2), dict(norm_type=NormType.Weight, unit=True, learn_scale=True, scale=2.),
          dict(softmax=False), dict(layer=PooledSelfAttention2d, reduction=2), dict(layer=PaperSelfAttention), dict(layer=SimpleSelfAttention),
          dict(layer=SimpleSelfAttention, sym=True)]

X = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(9))

def mean_square(out, y): return (out.float().mean((1, 2, 3))-y.float()).square().mean()

def picture(i): return X[i%2]+i

def number(i): return i%2

def loaders(): return Datasets(range(4), [[picture], [number]], splits=[[*range(4)], [0, 1]]).dataloaders(bs=2, num_workers=0, device=torch.device('cpu'))


# --- what there is, read without the package's help where that can be

def state(model): return {k:v.detach().clone() for k,v in nn.Module.state_dict(model).items()}

def same(a, b):
    "Equal tensors, where NaN equals NaN: training may overflow"
    if a.dtype != b.dtype or a.shape != b.shape: return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())

def may_overflow(args, features):
    "Whether three of these `features`, multiplied, are beyond float32: without a softmax that is infinite, and times a gamma of 0 NaN"
    return ('softmax' in args or args.get('layer') is SimpleSelfAttention) and float(features.abs().max()) > 1e9

def equal(a, b): return list(a) == list(b) and all(same(v, b[k]) for k,v in a.items())

def plain_state(model):
    "The state dict of `model` as it would be without inserted attention; its keys sorted"
    inserted = {p:m for p,m in model.named_modules(remove_duplicate=False) if hasattr(m, 'attention_place')}
    found = {k:v for k,v in state(model).items() if not any(k.startswith(f'{p}.') for p in inserted)}
    for m in inserted.values():
        for old in m.attention_place.old: found |= {f'{m.attention_place.site.path}.{k}':v for k,v in state(old).items()}
    return dict(sorted(found.items()))

def hooks(model):
    "Module path and table -> ids of hooks"
    return {(n,k):[id(h) for h in v.values()] for n,m in model.named_modules() for k,v in vars(m).items() if 'hook' in k and isinstance(v, dict) and v}

def n_hooks(model): return sum(map(len, hooks(model).values()))

def kinds(learn): return Counter(type(cb).__name__ for cb in learn.cbs)

def flags(model): return {n:p.requires_grad for n,p in model.named_parameters()}

def plainly(x):
    "What can be compared, of what an optimizer or a callback holds"
    if isinstance(x, Tensor): return x.dtype,tuple(x.shape),x.detach().double().nan_to_num(1.2345).sum().item()
    if isinstance(x, dict): return {k:plainly(v) for k,v in x.items()}
    if isinstance(x, (list,tuple)): return [plainly(v) for v in x]
    return x

def opt_state(opt):
    inner = getattr(opt, 'opt', opt)
    return [[id(p) for p in g] for g in opt.param_lists],plainly(list(opt.hypers)),{id(p):plainly(s) for p,s in inner.state.items() if s},opt.frozen_idx

def files(folder): return {f.relative_to(folder).as_posix():f.read_bytes() for f in Path(folder).rglob('*') if f.is_file()}

def everything(learn, folder):
    "All that a call that fails, or only looks, must leave as it is"
    model = learn.model
    tensors = *model.named_parameters(),*model.named_buffers()
    return dict(modules=[(n, id(m), m.training) for n,m in model.named_modules(remove_duplicate=False)], flags=flags(model),
                tensors={k:id(v) for k,v in tensors}, versions={k:v._version for k,v in tensors}, numbers=plainly(state(model)),
                hooks=hooks(model), places={n:m.attention_place.how for n,m in inserted_layers(model).items()}, callbacks=[id(cb) for cb in learn.cbs], named=sorted(k for k,v in vars(learn).items() if isinstance(v, Callback)),
                splitter=learn.splitter, opt=learn.opt and opt_state(learn.opt), files=files(folder),
                on=[torch.is_grad_enabled(), torch.is_autocast_enabled('cpu')])

def differences(a, b): return {k:(a[k], b[k]) for k in a if a[k] != b[k]}

@contextmanager
def unchanged(learn, folder, but=()):
    before = everything(learn, folder)
    yield
    changed = differences(before, everything(learn, folder))
    for k in but: changed.pop(k, None)
    assert not changed, f"{', '.join(changed)} changed: {changed}"

@torch.no_grad()
def predict(model):
    "In eval mode, every module's mode put back"
    modes = [(m, m.training) for m in model.modules()]
    try: return model.eval()(X.to(next(model.parameters()).dtype)).clone()
    finally:
        for m,mode in modes: m.training = mode

class Fault(Exception): pass

class FaultAt(Callback):
    "Training breaks off"
    def __init__(self, event): self.event = event
    def __call__(self, event_name):
        if event_name == self.event: raise Fault

def quietly(f, *args, **kwargs):
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)

def fit(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3, **kwargs)


# --- layers and `attend` on any input

DTYPES = {torch.float16:3e-2, torch.bfloat16:2e-1, torch.float32:2e-4, torch.float64:1e-9}     # with the largest error
BACKENDS = 'auto','math','tiled','sdpa'
STRANGE = float('nan'),float('inf'),-float('inf'),1e30,-3e38

def laid(t, how):
    "The same numbers, otherwise in memory"
    if how == 'channels last': return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == 'sliced': return torch.stack([t, t], -1)[...,0]
    if how == 'reversed': return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    return t

LAYOUTS = st.sampled_from(['rows', 'channels last', 'sliced', 'reversed'])

@st.composite
def layer_cases(draw):
    "Class, arguments, shape of the map, dtype, layout, backend, whether it trains, and a number for the second picture"
    cls = draw(st.sampled_from([SelfAttention, PooledSelfAttention2d, PaperSelfAttention, SimpleSelfAttention]))
    args = dict(norm_type=draw(st.sampled_from([NormType.Spectral, NormType.Weight, None])))
    if cls is SimpleSelfAttention: args |= dict(sym=draw(st.booleans()))
    else:
        args |= dict(reduction=draw(st.integers(1, 9)), heads=draw(st.integers(1, 3)), unit=draw(st.booleans()), gamma=draw(st.sampled_from([.7, -1.9])))
        if cls is not PooledSelfAttention2d: args |= dict(pool=draw(st.integers(1, 3)), softmax=draw(st.booleans()))
    maps = st.lists(st.integers(1, 5), min_size=1, max_size=3)
    shape = draw(st.integers(0, 3)),draw(st.integers(1, 9)),*draw(st.one_of(maps, maps, st.lists(st.integers(0, 5), min_size=0, max_size=4)))
    return dict(cls=cls, args=args, shape=shape, dtype=draw(st.sampled_from([*DTYPES])), how=draw(LAYOUTS), backend=draw(st.sampled_from(BACKENDS)),
                trains=draw(st.booleans()), strange=draw(st.sampled_from([None, *STRANGE])), seed=draw(st.integers(0, 99)))

def fits_layer(cls, args, shape):
    "Whether such a layer takes such a map, by what its page says"
    if not 3 <= len(shape) <= 5 or 0 in shape[2:] or cls is PooledSelfAttention2d and len(shape) != 4: return False
    d = max(1, shape[1]//args.get('reduction', 8))
    dv = {PooledSelfAttention2d:max(1, shape[1]//2), PaperSelfAttention:d}.get(cls, shape[1])
    return not d%args.get('heads', 1) and not dv%args.get('heads', 1)

def check_layer(cls, args, shape, dtype, how, backend, trains, strange, seed):
    "A layer gives what the formula gives, or refuses; a picture that is strange changes no other"
    torch.manual_seed(seed)
    try: layer = cls(shape[1], **args).to(dtype).train(trains)
    except ValueError: return COUNTS.update(['layer: refused'])
    nn.init.constant_(layer.gamma, .7)
    x = torch.randn(shape).to(dtype)
    if strange is not None and shape[0] > 1 and x[1].numel(): x[1].view(-1)[-1] = strange
    x = laid(x, how)
    try:
        with attention_backend(backend): got = layer(x)
    except (ValueError,TypeError):
        assert not fits_layer(cls, args, shape)
        return COUNTS.update(['layer: refused'])
    assert fits_layer(cls, args, shape) and got.shape == x.shape and got.dtype == dtype
    if args.get('unit') and dtype.itemsize == 2: return COUNTS.update(['layer: not compared'])     # where a vector is as short as its rounding, it may point anywhere
    whole = [i for i in range(shape[0]) if i != 1 or strange is None]
    want = written_out(copy.deepcopy(layer).double(), x.double())
    assert not whole or (got.double()-want)[whole].abs().max() <= DTYPES[dtype]*(1+want[whole].abs().max())
    COUNTS.update(['layer'])

@st.composite
def attend_cases(draw):
    "Shapes from 0, also of several tiles, and how large numbers are"
    few,many = st.integers(0, 4),st.sampled_from([0, 1, 2, 3, 7, 511, 513, 1025])
    return dict(bs=draw(few), nq=draw(many), nk=draw(many), d=draw(few), dv=draw(few), dtype=draw(st.sampled_from([*DTYPES])), how=draw(LAYOUTS),
                backend=draw(st.sampled_from(BACKENDS)), scale=draw(st.sampled_from([0., 1., -.7, 1e-30, 30.])), size=draw(st.sampled_from([1., 1e-20, 30.])),
                seed=draw(st.integers(0, 99)))

def check_attend(bs, nq, nk, d, dv, dtype, how, backend, scale, size, seed):
    "`attend` gives what the formula in float64 gives, or refuses what has no pixel to attend to"
    g = torch.Generator().manual_seed(seed)
    q,k,v = (torch.randn(bs, n, c, generator=g, dtype=torch.float64) for n,c in ((nq,d), (nk,d), (nk,dv)))
    q,k,v = (laid(t.to(dtype), how) for t in (q*size, k, v))
    try:
        with attention_backend(backend): got = attend(q, k, v, scale)
    except ValueError:
        assert nk == 0
        return COUNTS.update(['attend: refused'])
    logits = scale*(q.double() @ k.double().mT)
    want = logits.softmax(-1) @ v.double()
    assert nk and got.shape == want.shape and got.dtype == dtype
    error = DTYPES[dtype]/10*(1+logits.abs().max() if logits.numel() else 1)     # a logit of 1000 has an error of a thousand roundings
    assert not want.numel() or (got.double()-want).abs().max() <= error*(1+want.abs().max())
    COUNTS.update(['attend'])

FUZZED = dict(layer=(layer_cases(), check_layer), attend=(attend_cases(), check_attend))


# --- a failure at any call of a function of the package

PACKAGE = str(Path(fastai_selfattn.__file__).parent)
CLEANING = '_leave','_unhook','_without','remove_quietly','__exit__'     # nothing can be put around what itself takes back

class FailsAt:
    "The `at`-th call of a named function of the package raises; `calls` are those that were made, by module and function"
    def __init__(self, at=0): self.at,self.calls = at,[]
    def __enter__(self):
        sys.setprofile(self)
        return self
    def __exit__(self, *exc): sys.setprofile(None)
    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event != 'call' or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith('<') or code.co_name in CLEANING: return
        self.calls.append(f'{Path(code.co_filename).stem}.{code.co_name}')
        if len(self.calls) == self.at: raise Fault

    def ends(self):
        "The first and the last call of each function"
        first,last = {},{}
        for at,name in enumerate(self.calls, 1):
            first.setdefault(name, at)
            last[name] = at
        return sorted({*first.values(), *last.values()})

def fitted(path, *how):
    learn = Learner(loaders(), cnn(), mean_square, splitter=cnn_groups, path=path, model_dir='.')
    if how: quietly(learn.insert_attention, ['block','same'], *how)
    quietly(fit, learn)
    learn.opt.zero_grad()
    for name in ('xb','yb','x','y','pred','loss','loss_grad'): vars(learn).pop(name, None)
    return learn

def recorded(learn):
    with torch.no_grad(), AttentionRecorder(learn.model, 2): learn.model(X)

def switched_off(learn):
    with torch.no_grad(), attention_off(learn): learn.model(X)

def only(learn): learn.train_attention_only('block')

# what is done -> to a Learner with attention put in so, or without (None); by which function
DONE = dict(insert=(None, lambda l: l.insert_attention(['block','same'])), replace=(None, lambda l: l.insert_attention('same', 'replace')),
            remove=('append', lambda l: l.remove_attention()), put_back=('replace', lambda l: l.remove_attention()),
            load=(None, lambda l: load_attention(l, l.path/'there.safetensors')), load_numbers=('append', lambda l: load_attention(l, l.path/'there.safetensors')),
            save=('append', lambda l: save_attention(l, l.path/'before')), only=('append', only), only_again=('append', lambda l: l.train_attention_only('same')), all=('append', lambda l: l.train_all()),
            record=('append', recorded), off=('append', switched_off), effect=('append', lambda l: l.attention_effect()),
            sites=('append', lambda l: l.attention_sites()), status=('append', lambda l: repr(l.attention_status())),
            upgrade=('append', lambda l: l.upgrade_attention()), fuse=('append', lambda l: fuse_attention(l.model)))

def learners_for_faults(path):
    "With attention by each way of `DONE`, and two files of other numbers for it"
    made = {how:fitted(path, *([how] if how else [])) for how in (None,'append','replace')}
    other = copy.deepcopy(made['append'])
    for m in inserted_layers(other.model).values(): m.gamma.data.add_(1)
    for name in ('there','before'): quietly(save_attention, other, path/name)
    return made

def prepared(learners, name):
    how,f = DONE[name]
    learn = copy.deepcopy(learners[how])
    if name in ('all','only_again'): quietly(only, learn)
    return learn,f

def failures(learners, name, most=None):
    "The first and last call of each function of the package that `name` makes fails, or `most` of them; what changed then, and how many were tried"
    learn,f = prepared(learners, name)
    with FailsAt() as calls: quietly(f, learn)
    found,ends = {},calls.ends()
    if most: ends = ends[::-1][::-(-len(ends)//most)]     # the last ones too, after which nothing is taken back any more
    for at in ends:
        learn,f = prepared(learners, name)
        before = everything(learn, learn.path)
        with FailsAt(at) as failing:
            try: quietly(f, learn)
            except Exception: pass
            else: continue     # it was no matter
        changed = differences(before, everything(learn, learn.path))
        changed.pop('versions', None)     # what is put back counts as written to
        if changed: found[f'{at} {failing.calls[-1]}'] = changed
    return found,len(ends)


# --- calls that are wrong

WRONG = dict(
    nowhere=lambda l: l.insert_attention('no such place'), nothing=lambda l: l.insert_attention([]), a_number=lambda l: l.insert_attention(3),
    how=lambda l: l.insert_attention(True, how='before'), no_layer=lambda l: l.insert_attention('**', layer=nn.ReLU()),
    a_layer_that_shrinks=lambda l: l.insert_attention('stem' if hasattr(l.model, 'stem') else 'middle', layer=lambda c: nn.MaxPool2d(2)),
    heads=lambda l: l.insert_attention('**', heads=7), option=lambda l: l.insert_attention('**', colour='red'),
    size=lambda l: l.insert_attention('**', size=(0, 5)), size_text=lambda l: l.insert_attention('**', size='large'),
    side=lambda l: l.insert_attention(side=1001), max_side=lambda l: l.insert_attention(max_side=-1),
    remove=lambda l: l.remove_attention('no such place'), remove_what=lambda l: l.remove_attention(3),
    only=lambda l: l.train_attention_only('no such layer'), only_what=lambda l: l.train_attention_only(3),
    off=lambda l: attention_off(l, 'no such layer').__enter__(), points=lambda l: AttentionRecorder(l.model, points='everywhere'),
    point=lambda l: AttentionRecorder(l.model, points=[(1.5, 2)]), head=lambda l: AttentionRecorder(l.model, head=-1),
    another_model=lambda l: load_attention(nn.Linear(2, 3), l.path/'attention.safetensors'),
    no_file=lambda l: load_attention(l, l.path/'folder'/'none.safetensors'), folder=lambda l: save_attention(l, l.path/'folder'/'none'),
    model=lambda l: attention_status('model'), sites=lambda l: l.attention_sites(size=(5, 'x')))
ERRORS = ValueError,TypeError,FileNotFoundError


# --- the machine

class Endurance(RuleBasedStateMachine):
    "A Learner to which everything happens; `numbers`, `flags`, `placed` and `written` say what must be true of it"

    @initialize(make=st.sampled_from([cnn, cnn, unet]), opt_func=st.sampled_from([Adam, partial(SGD, mom=.9), ranger]))
    def start(self, make, opt_func):
        self.temp = tempfile.TemporaryDirectory()
        self.path,self.make = Path(self.temp.name),make
        self.learn = Learner(loaders(), make(), mean_square, opt_func=opt_func, splitter=GROUPS[make], path=self.path, model_dir='.')
        self.numbers,self.flags,self.placed,self.written = plain_state(self.learn.model),flags(self.learn.model),{},{}
        self.n_hooks,self.only,self.saved,self.kept,self.copies = n_hooks(self.learn.model),None,None,None,[]
        self.last = 0
        self.drifts = False
        self.away = {}     # flags of what layers replaced

    def teardown(self):
        if hasattr(self, 'temp'): self.temp.cleanup()

    @property
    def model(self): return self.learn.model
    @property
    def is_float(self): return next(self.model.parameters()).dtype == torch.float32
    @property
    def any_placed(self): return bool(self.placed)

    def did(self, what): COUNTS[what] += 1

    def tries(self, what, f, *args, errors=ERRORS, ignores=(), **kwargs):
        "Call `f`; None if it is refused, which must have changed nothing"
        before = everything(self.learn, self.path)
        try: res = quietly(f, *args, **kwargs)
        except errors as e:
            changed = {k:v for k,v in differences(before, everything(self.learn, self.path)).items() if k not in ignores}
            assert not changed, f'{what} was refused ({e}), but {changed}'
            note(f'refused: {e}')
            COUNTS[f'{what}: refused'] += 1
            return None
        self.did(what)
        return res

    def trains(self, name):
        "Whether the group of a parameter that came to the optimizer trains"
        opt,p = self.learn.opt,self.model.get_parameter(name)
        if not opt: return any(name.startswith(f'{path}.') for path in self.placed) or self.away.get(name, True)     # attention is new
        i = next(i for i,g in enumerate(opt.param_lists) if any(q is p for q in g))
        return i >= opt.frozen_idx or i == len(opt.param_lists)-1 or bool(opt.state[p].get('force_train', False))

    def came(self):
        "Flags of the parameters that were not there before"
        now = flags(self.model)
        known = self.flags.keys() & now.keys()
        left = {n:f for n,f in self.flags.items() if n not in known}
        self.flags = {n:self.flags[n] if n in known else self.trains(n) for n in now}
        self.away = {n:f for n,f in (self.away|left).items() if n not in now}

    # places

    @rule(data=st.data(), how=st.sampled_from(['append', 'append', 'replace']), args=st.sampled_from(LAYERS), n=st.integers(1, 3))
    def insert(self, data, how, args, n):
        where = data.draw(st.lists(st.sampled_from(PLACES[self.make]), min_size=n, max_size=n, unique=True))
        before,there = predict(self.model),dict(self.placed)
        paths = self.tries(f'insert by {how}', self.learn.insert_attention, where, how, **args)
        if paths is None:
            assert how == 'replace' or self.placed or {'head','twice','again'} & {*where} or len(where) > 1 or args, f'{where} was refused'
            return
        assert not there.keys() & {*paths} and paths, paths
        self.placed |= {p:how for p in paths}
        self.came()
        if how == 'append' and not may_overflow(args, before):
            assert same(predict(self.model), before), 'predictions changed while gamma is 0'

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def remove(self, data):
        paths = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(sorted(self.placed)), min_size=1, max_size=3, unique=True)))
        gone = self.tries('remove', self.learn.remove_attention, paths)
        assert gone is not None and {*gone} == {*(paths or self.placed)}, f'{paths} and not {gone}'
        dtype = next(self.model.parameters()).dtype
        back = tuple(f'{p}.' for p in gone if self.placed.pop(p) == 'replace')     # in the precision that the model has by now
        self.numbers = {k:v.to(dtype) if v.is_floating_point() and k.startswith(back) else v for k,v in self.numbers.items()}
        self.came()

    @precondition(lambda self: self.placed)
    @rule(gamma=st.sampled_from([.5, -1.3, 0.]))
    def gammas(self, gamma):
        for m in inserted_layers(self.model).values(): nn.init.constant_(m.gamma, gamma)

    # training

    def trained(self):
        "Read the numbers again: those of parameters that are frozen must be as they were"
        now = plain_state(self.model)
        frozen = {n for n,f in flags(self.model).items() if not f and not self.drifts}
        for n in frozen & now.keys(): assert same(now[n], self.numbers[n]), f'{n} is frozen, and moved'
        assert list(now) == list(self.numbers)
        self.numbers = now

    def before_training(self):
        if not self.only: return
        chosen = [p for p in self.placed if self.only == 'all' or p in self.only]
        self.flags = {n:any(n.startswith(f'{p}.') for p in chosen) for n in self.flags}

    def felt(self, layer):
        "Whether gradients came to `layer`, though steps may be too small for its numbers, as behind a norm that starts at 0"
        known = getattr(self.learn.opt, 'opt', self.learn.opt).state
        return any(t.any() for p in layer.parameters() for t in known.get(p, {}).values() if isinstance(t, Tensor))

    @precondition(lambda self: self.is_float and self.trainable)
    @rule(logs=st.booleans())
    def train(self, logs):
        own = {p:state(m) for p,m in inserted_layers(self.model).items()}
        cbs = kinds(self.learn)
        quietly(fit, self.learn, cbs=[GammaLogger()] if logs else [])
        assert kinds(self.learn) == cbs
        self.before_training()
        self.trained()
        for p,m in inserted_layers(self.model).items():
            moved = [n for n,t in m.named_parameters() if not same(t, own[p][n])]     # gamma alone may be too large for its step
            burst = not all(t.isfinite().all() for t in (*own[p].values(), *self.numbers.values()))     # as after steps without a softmax:
            # what is NaN stays NaN, and a norm of infinite variance lets no gradient through
            if m.gamma.requires_grad: assert moved or burst or self.felt(m), f'{p} did not learn'
            else: assert 'gamma' not in moved or self.drifts, f'{p} is frozen, and moved'
        self.did('train')

    @precondition(lambda self: self.is_float and self.trainable)
    @rule(event=st.sampled_from(['before_fit', 'before_batch', 'after_pred', 'after_backward', 'after_step', 'before_validate', 'after_epoch', 'after_fit']))
    def training_breaks_off(self, event):
        cbs = kinds(self.learn)
        try: quietly(fit, self.learn, cbs=[GammaLogger(), FaultAt(event)])
        except Fault: pass
        assert kinds(self.learn) == cbs
        self.before_training()
        self.trained()
        self.did('training breaks off')

    @property
    def trainable(self): return not self.only or any(self.only == 'all' or p in self.only for p in self.placed)

    @rule(n=st.sampled_from([0, 1, -1]))
    def freeze_to(self, n):
        for p in self.model.parameters(): p.grad = None     # fastai steps wherever there is a gradient, be it of zeros, also where it is frozen
        self.learn.freeze_to(n)
        self.drifts = False
        self.flags = {name:self.trains(name) for name in flags(self.model)}
        self.did('freeze_to')

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def train_only(self, data):
        layers = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(sorted(self.placed)), min_size=1, max_size=2, unique=True)))
        before = self.flags if not self.only else {n:self.were.get(n, True) for n in self.flags}
        if self.only: self.away = {n:self.were.get(n, f) for n,f in self.away.items()}     # the call before is undone first
        quietly(self.learn.train_attention_only, layers)
        self.did('train_attention_only')
        self.were,self.only = before,layers or 'all'
        self.before_training()

    @rule()
    def train_all(self):
        done = self.tries('train_all', lambda: (self.learn.train_all(), 1))
        assert (done is not None) == bool(self.only)
        if not done: return
        self.flags,self.away = {n:self.were.get(n, True) for n in self.flags},{n:self.were.get(n, f) for n,f in self.away.items()}
        self.only = None

    # files and copies

    def wrote(self, *names):
        now = files(self.path)
        assert now.keys() == self.written.keys() | {*names}, f'{sorted(now)} on disk, {sorted(self.written)} and {names} expected'
        self.written |= {n:now[n] for n in names}

    @rule()
    def save(self):
        quietly(self.learn.save, 'learner')
        self.wrote('learner.pth')
        self.saved = state(self.model)
        self.did('save')

    @precondition(lambda self: self.saved)
    @rule(with_opt=st.booleans())
    def load(self, with_opt):
        fits = {k:v.shape for k,v in self.saved.items()} == {k:v.shape for k,v in state(self.model).items()}
        same_dtype = [v.dtype for v in self.saved.values()] == [v.dtype for v in state(self.model).values()]
        if not fits:
            assert self.tries('load', self.learn.load, 'learner', with_opt=with_opt, errors=(RuntimeError,), ignores=['versions']) is None
            return
        if not same_dtype: return
        quietly(self.learn.load, 'learner', with_opt=with_opt)
        assert equal(state(self.model), self.saved)
        self.numbers = plain_state(self.model)
        # Slow weights of before: fastai's `Lookahead` draws all towards them, also what has been frozen since. To freeze forgets them.
        self.drifts |= with_opt and isinstance(self.learn.opt, Lookahead)
        self.did('load')

    @rule(fname=st.sampled_from(['attention', 'attention.safetensors']))
    def keep(self, fname):
        if self.tries('save_attention', save_attention, self.learn, self.path/fname) is None: return self.check(not self.placed)
        self.wrote('attention.safetensors')
        self.kept = dict(self.placed),{p:state(m) for p,m in inserted_layers(self.model).items()},repr([*inserted_layers(self.model).values()])

    def check(self, truth): assert truth

    @precondition(lambda self: self.kept)
    @rule()
    def bring(self):
        placed,states,said = self.kept
        paths = self.tries('load_attention', load_attention, self.learn, self.path/'attention.safetensors')
        if paths is None: return self.check(self.placed)
        assert {*paths} == placed.keys() and (not self.placed or self.placed == placed)
        self.placed = dict(placed)
        self.came()
        layers = inserted_layers(self.model)
        assert repr([*layers.values()]) == said
        for p,m in layers.items():
            want = {k:v.to(m.state_dict()[k].dtype) for k,v in states[p].items()}
            assert equal(state(m), want), f'{p} has other numbers than were kept'

    def goes_on_as(self, learn, said):
        "The Learner is another one from now on, which predicts the same and shares nothing with it"
        before,old = predict(self.model),{v.data_ptr() for v in self.model.state_dict().values() if v.numel()}
        now = predict(learn.model)     # layers without a softmax can bring numbers to overflow
        assert same(now, before), f'{said} predicts otherwise'
        assert not old & {v.data_ptr() for v in learn.model.state_dict().values() if v.numel()}, f'{said} shares numbers'
        self.learn = learn
        self.did(said)

    @rule()
    def export(self):
        with unchanged(self.learn, self.path, but=['files','opt']): quietly(self.learn.export, self.path/'export.pkl')
        self.wrote('export.pkl')
        learn = quietly(load_learner, self.path/'export.pkl')
        learn.dls,learn.path,learn.model_dir = loaders(),self.path,'.'
        self.goes_on_as(learn, 'export')

    @rule()
    def deepcopy(self):
        self.learn.dls = loaders()     # after an epoch that broke off fastai holds a generator, and a batch with its graph
        for name in ('dl','xb','yb','x','y','pred','loss','loss_grad'): vars(self.learn).pop(name, None)
        if self.learn.opt: self.learn.opt.zero_grad()
        self.goes_on_as(copy.deepcopy(self.learn), 'deepcopy')

    @rule()
    def half_and_float(self):
        to = torch.float16 if self.is_float else torch.float32
        self.model.to(to)
        replaced = {k for m in inserted_layers(self.model).values() for old in m.attention_place.old
                    for k in (f'{m.attention_place.site.path}.{n}' for n in old.state_dict())}
        self.numbers = {k:v.to(to) if v.is_floating_point() and k not in replaced else v for k,v in self.numbers.items()}
        if self.learn.opt: self.learn.opt.clear_state()
        self.did('half and float')

    # looking

    @precondition(lambda self: self.placed)
    @rule(data=st.data(), points=st.sampled_from(['center', 'grid', 2, None]), stats=st.booleans())
    def a_pass_that_breaks_off(self, data, points, stats):
        "At a module drawn from all, or not at all"
        modules = [m for m in self.model.modules()]
        at = data.draw(st.integers(0, len(modules)-1))
        with unchanged(self.learn, self.path, but=['on']):
            def stop(*args): raise Fault
            handle = modules[at].register_forward_hook(stop)
            rec = self.tries('recorder', AttentionRecorder, self.model, points, stats=stats)
            try:
                if rec:
                    with torch.no_grad(), rec: predict(self.model)
            except Fault: self.did('recorder breaks off')
            finally: handle.remove()

    @precondition(lambda self: self.placed)
    @rule(data=st.data())
    def off(self, data):
        some = data.draw(st.one_of(st.none(), st.lists(st.sampled_from(sorted(self.placed)), min_size=1, max_size=2, unique=True)))
        with unchanged(self.learn, self.path):
            try:
                with attention_off(self.learn, some):
                    states = {r['path']:r['state'] for r in attention_status(self.model).rows}
                    assert {p for p,s in states.items() if s == 'off'} == {*(some or self.placed)}
                    raise Fault
            except Fault: self.did('off')

    @precondition(lambda self: self.placed and self.is_float)
    @rule()
    def merge_and_fuse(self):
        with unchanged(self.learn, self.path):
            before,twin = predict(self.model),copy.deepcopy(self.model)
            for path,m in attention_layers(twin).items():
                if isinstance(m, PaperSelfAttention) and m.softmax: twin.set_submodule(path, m.merge())
            torch.testing.assert_close(predict(twin), before, rtol=1e-3, atol=1e-4, equal_nan=True)
            if any(m.norm_type for m in attention_layers(twin).values()): torch.testing.assert_close(predict(fuse_attention(twin)), before, rtol=1e-3, atol=1e-4, equal_nan=True)
        self.did('merge and fuse')

    @rule(what=st.sampled_from(['sites', 'status', 'repr']))
    def look(self, what):
        with unchanged(self.learn, self.path):
            if what == 'sites': repr(self.learn.attention_sites())
            else: repr(self.learn.attention_status()), repr(self.model)

    @rule(what=st.sampled_from(sorted(WRONG)))
    def wrong(self, what):
        assert self.tries(f'wrong {what}', lambda: (WRONG[what](self.learn), 1)) is None, f'{what} was taken'

    # what is true after each step

    @invariant()
    def holds(self):
        if not hasattr(self, 'learn'): return
        model,learn = self.model,self.learn
        there = inserted_layers(model)
        assert {p:m.attention_place.how for p,m in there.items()} == self.placed
        now = plain_state(model)
        assert list(now) == list(self.numbers), f'names: {now.keys() ^ self.numbers.keys()}'
        changed = [k for k in now if not same(now[k], self.numbers[k])]
        assert not changed, f'numbers that changed: {changed}'
        assert flags(model) == self.flags, f'flags: { {n:f for n,f in flags(model).items() if self.flags.get(n) != f} }'
        own = sum(bool(m.attention_place.hooked) for m in there.values())
        assert n_hooks(model) == self.n_hooks+own, f'hooks: {n_hooks(model)}, not {self.n_hooks} and {own}: {hooks(model)}'
        assert sum(isinstance(cb, AttentionHooks) for cb in learn.cbs) == bool(there) and isinstance(learn.splitter, AttentionSplitter) == bool(there)
        assert sum(isinstance(cb, OnlyAttention) for cb in learn.cbs) == bool(self.only)
        if learn.opt:
            listed = [id(p) for g in learn.opt.param_lists for p in g]
            assert sorted(listed) == sorted(map(id, model.parameters())), 'the optimizer has other parameters than the model'
            assert {id(p) for p,s in getattr(learn.opt, 'opt', learn.opt).state.items() if s} <= {*listed}, 'the optimizer remembers what is gone'
        assert files(self.path) == self.written
        self.status()

    def status(self):
        rows = {r['path']:r for r in attention_status(self.learn).rows}
        assert rows.keys() == self.placed.keys()
        for p,r in rows.items():
            some = [f for n,f in self.flags.items() if n.startswith(f'{p}.')]
            assert r['state'] == 'on' and (r['origin'] == 'appended') == (self.placed[p] == 'append')
            assert r['trainable'] == ('yes' if all(some) else 'partly' if any(some) else 'no')

    @invariant()
    def predicts_as_its_shadow(self):
        "With attention off, as a new model with the same numbers in which what was replaced does nothing; every third time, since it takes long"
        if not hasattr(self, 'learn'): return
        self.last += 1
        if self.last%3: return
        shadow = self.make()
        dtype = next(self.model.parameters()).dtype
        shadow.to(dtype).load_state_dict(self.numbers)
        for p,how in self.placed.items():
            if how == 'replace': shadow.set_submodule(p, nn.Identity())
        want = predict(shadow)
        if not self.placed: assert same(predict(self.model), want)
        else:
            with attention_off(self.model): assert same(predict(self.model), want)
