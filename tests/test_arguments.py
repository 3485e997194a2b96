"Whatever is given for an argument, a call does its work or says in words of this package what is wrong"
import copy
import traceback
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from wild import Net

from fastai_selfattn import all as ours



ODD = [None, True, False, 0, -1, 3, 2.5, float('nan'), float('inf'), '', 'x', '*', '[', '\udce9', b'bytes', (), [], {}, set(), object(),
       int, nn.Conv2d, np.int64(1), np.array([1, 2]), Path('.'), [None],
       [(1,)], [(1, 2, 3)], [(1.5, 2)], [(-1, 0)], [(99, 99)], (5, 5), (0, 0), [True], ['x'], [0], [-1], [99]]

q, k, v = (torch.rand(1, n, d, generator=torch.Generator().manual_seed(1)) for n, d in ((6, 4), (8, 4), (8, 5)))
x = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(2))
net = Net().eval()
with ours.AttentionRecorder(net, 2) as rec, torch.no_grad(): net(x)
field = ours.receptive_field(net, x)
history = pd.DataFrame(dict(step=[1, 2], gamma=[0., .1]))
stats = rec.df.assign(epoch=0)
amap = rec.maps['small'][0, 0]

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

def given(where='0', **kwargs):
    model = plain()
    ours.insert_attention(model, where, **{'size': 24, **kwargs})
    return model

def records(**kwargs):
    with ours.AttentionRecorder(**{'model': net, **kwargs}), torch.no_grad(): net(x)

def within(manager):
    def run(**kwargs):
        with manager(**kwargs), torch.no_grad(): net(x)
    return run

def attends(**kwargs):
    with ours.attention_backend(**kwargs): ours.attend(q, k, v)

def layer(cls):
    def make(**kwargs): return cls(**kwargs)(torch.rand(1, 8, 4, 4))
    return make

LAYER = dict(n_channels=8, reduction=2, heads=1, pool=1, norm_type=None, gamma=0., softmax=True, scale=1., unit=False, learn_scale=False)
CALLS = {      # name -> function, and arguments that are right
    'attend': (ours.attend, dict(q=q, k=k, v=v, scale=1., max_bytes=10**6)),
    'attention_backend': (attends, dict(name='auto', max_bytes=10**6)),
    'attention_weights': (ours.attention_weights, dict(q=q, k=k, rows=[1], scale=1., softmax=True)),
    'dot_attend': (ours.dot_attend, dict(q=q, k=k, v=v, scale=1.)),
    'which_backend': (ours.which_backend, dict(q=q, k=k, v=v)),
    'SelfAttention': (layer(ours.SelfAttention), LAYER),
    'PooledSelfAttention2d': (layer(ours.PooledSelfAttention2d), LAYER | dict(pool=2)),
    'SimpleSelfAttention': (layer(ours.SimpleSelfAttention), dict(n_in=8, ks=1, sym=False, norm_type=None, gamma=0.)),
    'fuse_attention': (lambda model: ours.fuse_attention(copy.deepcopy(model)), dict(model=net)),
    'attention_layers': (ours.attention_layers, dict(model=net)),
    'attention_status': (ours.attention_status, dict(model=net)),
    'attention_off': (within(ours.attention_off), dict(model=net, layers=None)),
    'attention_uniform': (within(ours.attention_uniform), dict(model=net, layers=None)),
    'attention_sites': (ours.attention_sites, dict(model=net, size=24, layer=ours.SelfAttention)),
    'insert_attention': (given, dict(where='0', how='append', layer=ours.SelfAttention, max_side=None, size=24, side=None, reduction=2)),
    'inserted_layers': (ours.inserted_layers, dict(model=net)),
    'remove_attention': (lambda **kwargs: ours.remove_attention(given(), **kwargs), dict(where=None, max_side=None, side=None)),
    'upgrade_attention': (ours.upgrade_attention, dict(model=net)),
    'save_attention': (lambda **kwargs: ours.save_attention(given(), **kwargs), dict(fname='new')),
    'load_attention': (lambda **kwargs: ours.load_attention(plain(), **kwargs), dict(fname='there', layer=None)),
    'AttentionRecorder': (records, dict(model=net, points='center', layers=None, stats=True, seed=0, vectors=False, image_size=None,
                                        which=0, head=None)),
    'receptive_field': (ours.receptive_field, dict(model=net, x=x, point=None, channel=None, module=None, layers=None, share=.9, which=0)),
    'GammaLogger': (ours.GammaLogger, dict(every=1)),
    'AttentionMapLogger': (ours.AttentionMapLogger, dict(items=None, points='center', every=1, path=None, layers=None, max_n=1, which=0)),
    'plot_attention': (ours.plot_attention, dict(image=x[0], amap=amap, point=(1, 1), ax=None, vmax=None, norm=None, shape=None)),
    'plot_attention_stats': (ours.plot_attention_stats, dict(stats=stats, ax=None)),
    'plot_gamma': (ours.plot_gamma, dict(history=history, ax=None, what='gamma')),
    'plot_sites': (ours.plot_sites, dict(sites=ours.attention_sites(net, size=24), chosen=None, ax=None)),
    'show_attention': (ours.show_attention, dict(
        images=x[:1], maps={'small': rec.maps['small'][:1, :1]}, points=rec.points[:1], layers=None, pictures=None, queries=None,
        titles=None, gammas=None, pools=None, scale='picture', ax=None, imsize=1., changes=None, places=None, head=None, shapes=None,
        masks=None)),
    'show_attention_growth': (ours.show_attention_growth, dict(image=x[0], maps=amap[None], point=(1, 1), labels=None,
                                                               max_n=2, ax=None, imsize=1., shape=None)),
    'show_receptive_field': (ours.show_receptive_field, dict(image=x[0], field=field, ax=None, imsize=1., shape=None))}

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('arguments')
    ours.save_attention(given(), folder/'there')
    return folder

def said_by(e):
    "The file that raised `e`"
    return traceback.extract_tb(e.__traceback__)[-1].filename

@pytest.mark.parametrize('name,argument', [(name, a) for name, (_, args) in CALLS.items() for a in args])
def test_any_value(name, argument, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    call, args = CALLS[name]
    call(**args)
    for odd in ODD:
        try: call(**args | {argument: odd})
        except (ValueError, TypeError, OSError) as e:
            assert isinstance(e, OSError) or 'fastai_selfattn' in said_by(e), (odd, said_by(e), e)
        plt.close('all')
