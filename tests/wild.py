"What a shell or a notebook may hand to the commands and to the explorer, right and wrong; `scripts/endure.py --fuzz` tries thousands"
import io
import os
import re
import tempfile
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from endurance import COUNTS
from fastai.data.block import DataBlock, RegressionBlock
from fastai.learner import Learner
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.bench.commands import bench_main
from fastai_selfattn.bench.loggers import bench_logging_main
from fastai_selfattn.seeing.explorer import _data, attention_explorer
from fastai_selfattn.walls.commands import recolor_main, walls_main
from fastai_selfattn.walls.data import wall_dls, wall_items
from fastai_selfattn.walls.rooms import make_rooms, render_room
from fastai_selfattn.walls.train import small_encoder, wall_learner

@contextmanager
def inside(folder):
    "`contextlib.chdir`, which is new in Python 3.11"
    before = Path.cwd()
    os.chdir(folder)
    try: yield
    finally: os.chdir(before)


# --- commands

class Reached(BaseException): "The work itself begins, which takes long: all that was given is taken"

def reached(*args, **kwargs): raise Reached

NUMBERS = ('0', '1', '2', '3', '8', '16', '32', '33', '-1', '-0', '1e3', '0.5', '.5', '1.5', 'nan', 'inf', '-inf', '1e400', '9'*12, '9'*40,
           '', ' ', 'x', '0x10', '8 8', '٣', '½')
NAMES = ('', '.', '..', 'new', 'a/b', 'taken', 'taken/x', 'file.txt', 'file.txt/x', '/dev/null/x', 'x'*300, 'é😀', '-', 'new\nline',
         " 'quoted' ", '$HOME', '*')
DATA = 'data','half','photos','empty','nowhere','file.txt'
PHOTOS = ('photos/a.png', 'photos/b.jpg', os.fsdecode(b'photos/caf\xe9.png'), 'photos/two\nlines.png', 'photos/broken.jpg',
          'photos/text.png', 'photos', 'nowhere.png', 'photos/a.png', 'file.txt', 'model.pkl')

def may_come(s):
    "No shell hands on a zero, of `--out=--` argparse makes a list before Python 3.13, and nobody else's folders are written to"
    return '\0' not in s and s != '--' and not s.startswith('/') and '../' not in s

numbers = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.integers(-3, 100).map(str), st.text(max_size=3).filter(may_come))
names = st.one_of(st.sampled_from(NAMES), st.text(max_size=6).filter(may_come))

def one_of(*values):
    "One of the `values`, or any name"
    return st.one_of(st.sampled_from(values), names)

OPTIONS = {     # command -> option -> values, None for a flag
    'selfattn-walls': {
        '--no-attention':None, '--compare':None, '--data':one_of(*DATA), '--out':names, '--mask-suffix':names,
        '--arch':one_of('small', 'resnet18', 'resnet43', 'vit_b_16', 'Small'),
        '--wall-code':numbers, '--ignore':numbers, '--n-rooms':numbers, '--ambiguity':numbers, '--size':numbers, '--epochs':numbers,
        '--bs':numbers, '--lr':numbers, '--seeds':numbers, '--gamma':numbers, '--seed':numbers},
    'selfattn-recolor': {
        '--mask':None, '--overwrite':None, '--out':names,
        '--model':one_of('model.pkl', 'model.pkl', 'model.pkl', 'file.txt', 'odd.pkl', 'nowhere.pkl'),
        '--color':one_of('teal', '#7aa6c2', '#123', 'rgb(1,2,3)', 'hsl(0,0%,50%)', '#12345', '#7aa6c2ff', 'transparent', 'teall')},
    'selfattn-bench': {
        '--gpu':None, '--dry':None, '--memory':None, '--no-memory':None, '--overwrite':None,
        '--out':names, '--threads':numbers, '--seconds':numbers,
        '--shapes':one_of('table', 'sides', 'all', '1,8,4', '1,8,4x5 2,8,3', '8', '1,8', '1,8,0', '1,8,4x', '-1,8,4', '9,9,9,9'),
        '--contestants':one_of('*', 'ours', 'fastai', 'ours*,fastai', 'nobody', ',', 'ours,,fastai', '[', 'our s')},
    'selfattn-bench-logging': {
        '--overwrite':None, '--out':names, '--n-rooms':numbers, '--size':numbers, '--bs':numbers, '--epochs':numbers, '--threads':numbers}}
MAINS = {'selfattn-walls':walls_main, 'selfattn-recolor':recolor_main,
         'selfattn-bench':bench_main, 'selfattn-bench-logging':bench_logging_main}
USUAL = {'selfattn-walls': ['--n-rooms','16','--size','32'], 'selfattn-recolor': ['--model','model.pkl','--color','teal','--out','new']}
WORK = ('walls.commands.make_rooms', 'walls.commands.train_walls', 'walls.commands.compare_walls', 'bench.commands.bench_shape',
        'bench.gpu.run_jobs', 'bench.loggers.make_rooms')

@st.composite
def command_cases(draw):
    "A command and its arguments: often such as work but for one, sometimes anything"
    command = draw(st.sampled_from([*OPTIONS]))
    argv = list(USUAL.get(command, [])) if draw(st.booleans()) else []
    for option in draw(st.lists(st.sampled_from([*OPTIONS[command]]), max_size=4)):
        values = OPTIONS[command][option]
        argv += [option] if values is None else [f'{option}={draw(values)}'] if draw(st.booleans()) else [option, draw(values)]
    if command == 'selfattn-recolor': argv += draw(st.lists(st.one_of(st.sampled_from(PHOTOS), st.sampled_from(PHOTOS), names), max_size=3))
    elif draw(st.integers(0, 9)) == 0: argv.append(draw(names))
    return dict(command=command, argv=argv)

def prepare(folder):
    "What the commands find where they run"
    for name in ('taken','empty','photos'): (folder/name).mkdir()
    (folder/'taken/mine').write_text('mine')
    (folder/'file.txt').write_text('no picture')
    for name in ('a.png', 'b.jpg', os.fsdecode(b'caf\xe9.png'), 'two\nlines.png'):
        Image.new('RGB', (40,32), (90,120,150)).save(folder/'photos'/name)
    (folder/'photos/broken.jpg').write_bytes((folder/'photos/b.jpg').read_bytes()[:300])
    (folder/'photos/text.png').write_text('no picture')
    make_rooms(folder/'data', 20, 32, 0)
    make_rooms(folder/'half', 20, 32, 0)
    for f in sorted((folder/'half/masks').iterdir())[::2]: f.unlink()
    items = wall_items(folder/'data')
    learn = wall_learner(wall_dls(items[:16], items[16:], 32, 4), small_encoder)
    learn.export(folder/'model.pkl')
    torch.save({'no':'Learner'}, folder/'odd.pkl')

def found(folder): return {p.relative_to(folder).as_posix():p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}

class Place:
    "A folder that is prepared once, and checked after each command"
    def __init__(self):
        self._kept = tempfile.TemporaryDirectory()
        self.path = Path(self._kept.name).resolve()/'here'     # so that `..` is a folder of our own too
        self.path.mkdir()
        prepare(self.path)
        self.before = found(self.path)

    def clear(self):
        "Take away what a command wrote"
        for p in sorted(self.path.rglob('*'), reverse=True):
            if p.relative_to(self.path).as_posix() not in self.before: p.rmdir() if p.is_dir() else p.unlink()

place = None     # made by the first check

def outcome(command, argv):
    "Exit status, or `Reached`, and what was said on the standard error"
    said = io.StringIO()
    with ExitStack() as stack:
        for name in WORK: stack.enter_context(mock.patch(f'fastai_selfattn.{name}', reached))
        out = io.TextIOWrapper(io.BytesIO())     # which, as a terminal, does not take everything
        for manager in (inside(place.path), redirect_stderr(said), redirect_stdout(out)): stack.enter_context(manager)
        try: status = MAINS[command](argv)
        except SystemExit as e: status = e.code
        except Reached: status = Reached
    return status,said.getvalue()

def check_command(command, argv):
    "It begins its work, or says in one line what is wrong, and has changed nothing"
    global place
    place = place or Place()
    try:
        status,said = outcome(command, argv)
        now = found(place.path)
        kept = {k:v for k,v in now.items() if k in place.before}
        assert kept == place.before, 'something that was there is changed'
        if status in (1,2):
            assert said.startswith(f'{command}: ') and len(said) > len(command)+12, said
            assert said.splitlines(keepends=True) == [said], said
            if status == 2: assert now == kept, sorted({*now}-{*kept})
        else: assert status in (0,None,Reached) and not said, (status, said)
        COUNTS.update(['command: refused' if status in (1,2) else 'command'])
    finally: place.clear()

# --- the explorer

EVIL = '</script><img src=x onerror="window.ran=1"> {{title}} {{data}} \u2028 \'"&amp; Küche 🛋'
ODD = (None, True, False, 0, -1, 3, 2.5, float('nan'), 10**30, '', b'bytes', (), [], {}, set(), object(), torch.zeros(0), torch.tensor(1),
       np.int64(1), Path('.'), EVIL, '\udce9')

class Net(nn.Module):
    "Attention of two heads, and of one on a smaller map"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem,self.heads = nn.Conv2d(3, 8, 3, 2, 1),SelfAttention(8, reduction=2, heads=2, gamma=.5)
        self.down,self.small = nn.Conv2d(8, 8, 3, 2, 1),SelfAttention(8, reduction=2, gamma=.5)
    def forward(self, x): return self.small(self.down(self.heads(self.stem(x))))

def looked_into(folder):
    "A Learner of pictures, two of them named by whoever likes to break things"
    folder.mkdir()
    files = [folder/n for n in ('a.png','b.png','<b>&lt; \'Küche\'.png',os.fsdecode(b'caf\xe9.png'))]
    for i,f in enumerate(files): Image.fromarray(render_room(i, (24,32))[0]).save(f)
    block = DataBlock((ImageBlock, RegressionBlock), get_items=lambda _: files, get_y=lambda f: 0.,
                      splitter=lambda items: (range(4), range(4)))
    return Learner(block.dataloaders(folder, bs=2, num_workers=0), Net(), loss_func=nn.MSELoss(), path=folder)

class Look:
    "A Learner, and a folder to write into"
    def __init__(self):
        self._kept = tempfile.TemporaryDirectory()
        self.path = Path(self._kept.name).resolve()
        self.learn = looked_into(self.path/'pictures')
        files = self.learn.dls.valid_ds.items
        other = PILImage.create(files[0]),torch.rand(3, 20, 20)
        self.items = [files[0], str(files[1]), files[2], files[3], 0, 3, 4, -1, *other, 'nowhere.png', 'file.txt', *ODD]
        nan = Net()
        nn.init.constant_(nan.stem.weight, float('nan'))
        self.models = [Net(), self.learn, nan, nn.Conv2d(3, 3, 1), nn.Sequential(Net(), nn.Flatten()), *ODD]
        (self.path/'old.html').write_text('mine')
        (self.path/'folder.html').mkdir()
        (self.path/'file.txt').write_text('no picture')
        self.before = found(self.path)

look = None     # made by the first check

FNAMES = ('page.html', 'page.html', 'old.html', 'folder.html', 'none/page.html', 'page', '.html', 'a\0.html', 'x'*300+'.html', 'é\n.html',
          '/dev/null/x.html')
texts = st.one_of(st.text(max_size=8), st.just(EVIL))
any_odd = st.sampled_from(ODD)
some_layers = st.lists(st.one_of(st.sampled_from(['heads', 's*', 'x']), any_odd), max_size=3)
labels = st.one_of(texts, st.sampled_from(['model', 'before']), any_odd.filter(lambda o: getattr(type(o), '__hash__', None)))
# the values of `items` and `others` stand for those of `Look`, by number
numbers_of_items = st.lists(st.integers(0, 11+len(ODD)), max_size=3)
numbers_of_models = st.dictionaries(labels, st.integers(0, 4+len(ODD)), max_size=2)
EXPLORER = dict(     # argument -> values, beside any that are odd
    items=numbers_of_items, others=numbers_of_models, label=texts, title=texts, fname=st.sampled_from(FNAMES), overwrite=st.booleans(),
    layers=st.one_of(st.sampled_from(['heads', 'small', '*', 'none*', 'heads.*', '[', '']), some_layers, texts),
    max_n=st.integers(-1, 6), which=st.integers(-1, 2), head=st.integers(-1, 3))

@st.composite
def explorer_cases(draw):
    "Some of the arguments"
    names = draw(st.lists(st.sampled_from([*EXPLORER]), unique=True, max_size=4))
    return {name:draw(any_odd if draw(st.integers(0, 3)) == 0 else EXPLORER[name]) for name in names}

def check_explorer(**given):
    "It writes a page that holds what was given as text, or says what is wrong, and has changed nothing"
    global look
    look = look or Look()
    args = dict(given)
    if type(args.get('items')) is list: args['items'] = [look.items[i] for i in args['items']]
    if type(args.get('others')) is dict: args['others'] = {k:look.models[i] for k,i in args['others'].items()}
    before = {k:v.clone() for k,v in look.learn.model.state_dict().items()}
    try:
        with inside(look.path):
            try: page = attention_explorer(look.learn, **{'fname':'page.html', **args})
            except (ValueError,TypeError,OSError) as e:
                assert len(str(e)) > 12 and (not isinstance(e, OSError) or {'items','fname'} & {*given}), repr(e)
                assert found(look.path) == look.before
                return COUNTS.update(['explorer: refused'])
            text = Path(page).read_text(encoding='utf-8')
        data = _data(text)
        assert data['title'] == args.get('title', 'What attention sees') and len(data['models']) == 1+len(args.get('others') or {})
        raw = re.search(r'<script id="data".*?>(.*?)</script>', text, re.S)[1]
        assert not set('<>&') & set(raw) and raw.isascii()
        new = found(look.path)
        kept = {k:v for k,v in look.before.items() if k != 'old.html'}
        assert {k:new.get(k) for k in kept} == kept
        COUNTS.update(['explorer'])
    finally:
        assert all(torch.equal(v, before[k]) for k,v in look.learn.model.state_dict().items())
        for p in look.path.rglob('*'):
            if p.is_file() and p.relative_to(look.path).as_posix() not in look.before: p.unlink()
        (look.path/'old.html').write_text('mine')

FUZZED = dict(command=(command_cases(), check_command), explorer=(explorer_cases(), check_explorer))
