"""Swatches: what can find the colour of a surface at another place?

python benchmarks/swatches.py            5 seeds, 500 steps: about half an hour on one core
python benchmarks/swatches.py --long     1500 steps
"""
from functools import cache, partial

import numpy as np
import torch
from fastai.layers import ConvLayer
from fastai.learner import Learner, Metric
from fastai.losses import MSELossFlat
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.walls.swatches import SwatchNet, SwatchPSNR, psnr, swatch_dls, swatch_errors, swatch_example, swatch_mask, swatch_weights
from torch import nn
from torch.nn import functional as F

from study import compare, options

N,N_VALID,SIZE = 1000,100,40     # pictures to train on, another thousand in each seed; to validate on, the same in all; pixels a side
EPOCHS,LONG,LR = 4,12,4e-3       # 500 and 1500 steps of 8 pictures; the learning rate is the pilot's, the same for all arms
DISTANCES = (0,6,12,18,24,60)    # pixels to the own swatch
PAINTS = (2,3,4,5,6,7,8)         # paints of a picture
LARGE = 64,96                    # pixels a side of larger pictures, on which nothing is trained
LARGE_N = 12                     # so many of them

class Hourglass(nn.Module):
    "A U-Net as a residual block, `halvings` deep, so that its bottleneck sees the whole map: a rival of another kind"
    def __init__(self, nc, halvings=3):
        super().__init__()
        self.downs = nn.ModuleList(ConvLayer(nc, nc, stride=2) for _ in range(halvings))
        self.ups = nn.ModuleList(ConvLayer(nc, nc) for _ in range(halvings))
        self.last = nn.Conv2d(nc, nc, 1, bias=False)
        nn.init.zeros_(self.last.weight)     # it starts as the identity, as the other rivals do

    def forward(self, x):
        skips = [x]
        for down in self.downs: skips.append(down(skips[-1]))
        y = skips.pop()
        for up in self.ups:
            skip = skips.pop()
            y = up(F.interpolate(y, size=skip.shape[2:])) + skip
        return x + self.last(y)

@cache
def _facts(n_valid, size):
    "Distance to the own swatch and number of paints, of all pixels of the validation pictures that no swatch shows"
    df = swatch_errors(SwatchNet(), [swatch_example(i, size=size) for i in range(n_valid)])
    return df['distance'].to_numpy(),df['paints'].to_numpy()

class PSNROf(Metric):
    "PSNR over some of the pixels that no swatch shows"
    def __init__(self, name, chosen): self._name,self.chosen = name,chosen
    def reset(self): self.mse = []
    def accumulate(self, learn):
        off = (learn.pred.detach() - learn.y).as_subclass(torch.Tensor).square().mean(1)
        self.mse.append(off[~swatch_mask(learn.xb[0])].numpy())
    @property
    def value(self): return psnr(np.concatenate(self.mse)[self.chosen].mean()) if self.chosen.any() else None
    @property
    def name(self): return self._name

class OfModel(Metric):
    "A number of the model itself, None if it has no attention and the number is about that"
    def __init__(self, name, func): self._name,self.func = name,func
    def reset(self): self.model = None
    def accumulate(self, learn): self.model = learn.model
    @property
    def value(self): return self.func(self.model)
    @property
    def name(self): return self._name

def _examples(n, size): return [swatch_example(i, size=size) for i in range(n)]

def _large(model, n, size): return psnr(swatch_errors(model, _examples(n, size))['mse'].mean())

def _attention(model): return [m for m in model.modules() if isinstance(m, SelfAttention)]

def _gamma(model): return next((m.gamma.item() for m in _attention(model)), None)

def _own_swatch(model, n, size): return swatch_weights(model, _examples(n, size))['own_swatch'].mean() if _attention(model) else None

def metrics(n_valid, size, large):
    distance,paints = _facts(n_valid, size)
    yield SwatchPSNR()
    for a,b in zip(DISTANCES, DISTANCES[1:]): yield PSNROf(f'psnr_{a}_to_{b}_px', (distance >= a) & (distance < b))
    for k in PAINTS: yield PSNROf(f'psnr_{k}_paints', paints == k)
    for side in large: yield OfModel(f'psnr_at_{side}_px', partial(_large, n=LARGE_N, size=side))
    yield OfModel('gamma', _gamma)
    yield OfModel('own_swatch', partial(_own_swatch, n=min(n_valid, 20), size=size))

def data(seed, n, n_valid, size): return swatch_dls('flat', n, size, seed=seed, n_valid=n_valid)

def make(dls, n_valid, size, large):
    return Learner(dls, SwatchNet(), loss_func=MSELossFlat(), metrics=list(metrics(n_valid, size, large)))

def train(learn, epochs, lr):
    "One cycle; the metrics wait until it is over, as some take seconds"
    metrics,learn.metrics = learn.metrics,[]
    learn.fit_one_cycle(epochs, lr)
    learn.metrics = metrics

ARMS = {'attention':'attention', 'gamma from 0':SelfAttention, 'uniform':'uniform', 'context':'context', 'conv3':'conv3', 'hourglass':Hourglass}

def run(args, experiment, arms, epochs=EPOCHS, where='middle', lr=LR):
    "The runs of `arms`; the arms of all experiments on these pictures share a record for each learning rate, so that none is trained twice"
    n,n_valid,size,large = (16,4,24,(32,)) if args.smoke else (N,N_VALID,SIZE,LARGE)
    if args.smoke: epochs = 1
    setting = dict(form='flat', size=size, steps=epochs*(n//8)) | ({} if lr == LR else {'lr':lr})
    name = f"swatches-{setting['steps']}steps" + ('' if lr == LR else f'-lr{lr:g}')
    return compare(args, experiment, name, setting, partial(data, n=n, n_valid=n_valid, size=size),
                   partial(make, n_valid=n_valid, size=size, large=large), where=where, arms=arms,
                   fit=partial(train, epochs=epochs, lr=lr), gamma=1.)

def main(argv=None):
    p = options(__doc__, seeds=5)
    p.add_argument('--long', action='store_true', help=f'{LONG*N//8} steps in place of {EPOCHS*N//8}')
    args = p.parse_args(argv)
    return run(args, 'swatches', ARMS, LONG if args.long else EPOCHS)

if __name__ == '__main__': main()
