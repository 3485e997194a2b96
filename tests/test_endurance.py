"What people do in any order (`scripts/endure.py` runs it for hours), a failure at any call of the package, layers on any input, and what stays in memory"
import copy
import gc

import pytest
import torch
import wild
from endurance import COUNTS, DONE, FUZZED, Endurance, failures, fit, learners_for_faults, quietly, recorded, switched_off
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import nn

from fastai_selfattn.placement.keep import load_attention, save_attention


# --- what people do, in any order

def test_a_few_sequences():
    how = settings(max_examples=4, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    run_state_machine_as_test(seed(11)(Endurance), settings=how)
    assert sum(COUNTS.values()) > 20


# --- a failure at any call of a function of the package

@pytest.fixture(scope='module')
def learners(tmp_path_factory): return learners_for_faults(tmp_path_factory.mktemp('learners'))

@pytest.mark.parametrize('name', DONE)
def test_a_failure_at_any_step_changes_nothing(learners, name):
    "A few of them here; `scripts/endure.py --faults` goes through all"
    found,n = failures(learners, name, 12)
    assert not found and n > 2


# --- layers, `attend`, commands and the explorer on any input

@pytest.mark.parametrize('what', ALL := FUZZED|wild.FUZZED)
def test_any_input(what):
    cases,check = ALL[what]
    @seed(3)
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
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


# --- what the soak found

def test_the_others_train_on_when_one_of_the_layers_that_are_trained_alone_is_removed(learners):
    learn = copy.deepcopy(learners['append'])
    quietly(learn.train_attention_only)
    quietly(learn.remove_attention, 'block')
    quietly(fit, learn)
    assert {n.split('.')[0] for n,p in learn.model.named_parameters() if p.requires_grad} == {'same'}
    quietly(learn.remove_attention, 'same')
    with pytest.raises(ValueError, match='learn.train_all'): quietly(fit, learn)

def test_a_load_that_fails_leaves_the_learner_without_an_optimizer(learners):
    learn = copy.deepcopy(learners['append'])
    quietly(learn.save, 'with')
    quietly(learn.remove_attention)
    learn.opt = None
    numbers = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(RuntimeError, match='insert it first'): learn.load('with')
    with pytest.raises(FileNotFoundError): learn.load('nowhere')
    assert learn.opt is None and all(torch.equal(v, numbers[k]) for k,v in learn.model.state_dict().items())
