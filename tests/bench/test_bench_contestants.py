"Who is compared, and that who gives another answer is found"
import importlib.util

import numpy as np
import pytest
import torch

from bench_samples import SAME, SHAPE, Altered
from fastai_selfattn.attention import ops
from fastai_selfattn.bench.contestants import _difference, check_layers, parse_contestants, prepare_layers

@pytest.mark.parametrize('by_hand', [False, True])
def test_all_give_the_answer_of_fastai(by_hand):
    layers,x = prepare_layers(SHAPE, SAME)
    assert check_layers(layers, x, layers['fastai'], by_hand) == {}

def test_weights_are_shared_and_attention_is_on():
    layers,_ = prepare_layers(SHAPE, SAME)
    first = layers['fastai'].state_dict()
    for name,layer in layers.items():
        if name == 'ours fused': continue     # its plain weights are those that it was loaded with, normalised
        for k,v in layer.state_dict().items(): torch.testing.assert_close(v, first[k], rtol=1e-4, atol=1e-5)
    assert first['gamma'] == .5

def test_backends_are_used(monkeypatch):
    used = []
    for name in ('math', 'tiled', 'sdpa'):
        def spy(*args, f=ops._backends[name], name=name): return used.append(name) or f(*args)
        monkeypatch.setitem(ops._backends, name, spy)
    layers,x = prepare_layers(SHAPE, ['ours tiled', 'ours math', 'ours sdpa'])
    with torch.no_grad():
        for layer in layers.values(): layer(x)
    assert used == ['tiled', 'math', 'sdpa']

@pytest.mark.parametrize('where', ['the output', 'the gradient of x', 'the gradient of query.0.weight_orig', 'the gradient of gamma'])
@pytest.mark.parametrize('by_hand', [False, True])
def test_check_bites(where, by_hand):
    layers,x = prepare_layers(SHAPE, ['fastai'])
    bad = Altered(24, where)
    bad.load_state_dict(layers['fastai'].state_dict())
    assert f"{where} differs from fastai's" in check_layers({'bad': bad}, x, layers['fastai'], by_hand)['bad']

def test_only_a_fused_layer_has_weights_that_are_not_compared():
    layers,x = prepare_layers(SHAPE, SAME)
    names = {n:{k for k,_ in layer.named_parameters()} for n,layer in layers.items()}
    assert {n for n in SAME if names[n] != names['fastai']} == {'ours fused'}
    assert names['ours fused'] - names['fastai'] == {f'{n}.0.weight' for n in ('query', 'key', 'value')}
    with torch.no_grad(): layers['ours fused'].value[0].weight[3] *= 1.1
    assert 'the output differs' in check_layers({'ours fused': layers['ours fused']}, x, layers['fastai'])['ours fused']

def test_check_does_not_take_nan():
    assert 'differs' in _difference({'a': torch.tensor([np.nan])}, {'a': torch.ones(1)})

def test_check_names_only_who_is_wrong():
    layers,x = prepare_layers(SHAPE, ['ours', 'fastai'])
    bad = Altered(24, 'the output')
    bad.load_state_dict(layers['fastai'].state_dict())
    assert list(check_layers({'ours': layers['ours'], 'bad': bad}, x, layers['fastai'])) == ['bad']

def test_without_timm(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert parse_contestants() == SAME == parse_contestants('*')
    assert parse_contestants('ours,timm*') == ['ours']
    with pytest.raises(ValueError, match='pip install timm'): parse_contestants('timm NonLocalAttn')
