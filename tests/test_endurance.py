"What people do in any order (`scripts/endure.py` runs it for hours), a failure at any call of the package, layers on any input, and what stays in memory"
import copy
import gc
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from endurance import COUNTS, FUZZED, X, Endurance, Fault, cnn, cnn_groups, differences, everything, fit, loaders, mean_square, quietly
from fastai.layers import NormType
from fastai.learner import Learner
from formulas import written_out
from hypothesis import HealthCheck, Phase, example, given, seed, settings, strategies as st
from hypothesis.stateful import run_state_machine_as_test
from torch import nn

import fastai_selfattn
from fastai_selfattn.attention.kinds import attention_off
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.attention.ops import attend, attention_backend
from fastai_selfattn.placement.keep import load_attention, save_attention
from fastai_selfattn.placement.optim import inserted_layers
from fastai_selfattn.placement.upgrade import upgrade_attention
from fastai_selfattn.seeing.explorer import attention_explorer
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.map_logger import AttentionMapLogger
from fastai_selfattn.seeing.record import AttentionRecorder


# --- what people do, in any order

def test_a_few_sequences():
    how = settings(max_examples=4, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(seed(11)(Endurance), settings=how)
    assert sum(COUNTS.values()) > 20


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

@pytest.fixture(scope='module')
def learners(tmp_path_factory):
    path = tmp_path_factory.mktemp('learners')
    made = {how:fitted(path, *([how] if how != None else [])) for how in (None,'append','replace')}
    with torch.no_grad():
        other = copy.deepcopy(made['append'])
        for m in inserted_layers(other.model).values(): m.gamma.add_(1)
    for name in ('there','before'): quietly(save_attention, other, path/name)
    return made

def prepared(learners, name):
    how,f = DONE[name]
    learn = copy.deepcopy(learners[how])
    if name in ('all','only_again'): quietly(only, learn)
    return learn,f

def failures(learners, name):
    "The first and last call of each function of the package that `name` makes fails; what changed then, by that function, and how many were tried"
    learn,f = prepared(learners, name)
    with FailsAt() as calls: quietly(f, learn)
    found,ends = {},calls.ends()
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

@pytest.mark.parametrize('name', DONE)
def test_a_failure_at_any_step_changes_nothing(learners, name):
    found,n = failures(learners, name)
    assert not found and n > 2


# --- layers and `attend` on any input

@pytest.mark.parametrize('what', FUZZED)
def test_any_input(what):
    cases,check = FUZZED[what]
    @seed(3)
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(cases)
    def fuzz(case): check(**case)
    fuzz()


# --- what stays in memory

def alive():
    "How many tensors there are, and how many numbers they have"
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor,nn.Parameter)]
    return len(tensors),sum(t.numel() for t in tensors)

@pytest.mark.parametrize('what', ['train', 'record', 'insert and remove', 'save and load'])
def test_nothing_stays_in_memory(learners, what):
    "After the third time as after the sixth"
    learn = copy.deepcopy(learners['append'])
    def again():
        if what == 'train': quietly(fit, learn, 1)
        elif what == 'record': recorded(learn), switched_off(learn)
        elif what == 'insert and remove': quietly(lambda: (learn.remove_attention(), learn.insert_attention(['block','same'])))
        else: quietly(lambda: (save_attention(learn, learn.path/'again'), load_attention(learn, learn.path/'again.safetensors')))
    def several(): return [again() for _ in range(3)] and alive()
    first = several()
    assert several() == first
