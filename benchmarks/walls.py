"""Walls: does attention help a U-Net that sees little of an ambiguous room, and one that sees all of it?

python benchmarks/walls.py                                    all rooms and nets, 5 seeds: hours
python benchmarks/walls.py --ambiguity 1 --halvings 2         one of them
python benchmarks/walls.py --long                             four times the steps
"""
from functools import lru_cache, partial

import torch
from fastai.callback import schedule  # noqa: F401  gives `Learner` its `fit_one_cycle`
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.layers import ConvLayer
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Dice
from fastai.torch_core import TensorImage, TensorMask
from fastai.vision.augment import Brightness, Contrast, Flip
from fasttransform import Pipeline
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.walls.rooms import render_room
from torch import nn
from torch.nn import functional as F

from study import compare, options

N,N_VALID,SIZE,BS = 400,100,96,8     # rooms to train on and to validate on, others in each seed; pixels a side; rooms a batch
EPOCHS,LONG,LR = 8,32,2e-3           # 400 and 1600 steps
AMBIGUITY = 0.,.5,1.                 # of `make_rooms`
HALVINGS = 2,3,5                     # of the U-Net
CHANNELS = 16,32,64,64,64            # of its maps, from the first halving on

class SmallUNet(nn.Module):
    "A plain U-Net of some halvings that answers at half the size, and is enlarged: the layer stands behind `middle`, on the deepest map"
    def __init__(self, halvings):
        super().__init__()
        chs = CHANNELS[:halvings]
        self.stem = ConvLayer(3, chs[0], stride=2)
        self.encoder = nn.ModuleList(nn.Sequential(ConvLayer(a, b, stride=2), ConvLayer(b, b)) for a,b in zip(chs, chs[1:]))
        self.middle = nn.Sequential(ConvLayer(chs[-1], chs[-1]))
        self.decoder = nn.ModuleList(ConvLayer(a+b, a) for a,b in zip(chs[-2::-1], chs[:0:-1]))
        self.head = nn.Sequential(ConvLayer(chs[0], chs[0]), nn.Conv2d(chs[0], 2, 1))

    def forward(self, x):
        skips = [self.stem(x)]
        for stage in self.encoder: skips.append(stage(skips[-1]))
        y = self.middle(skips.pop())
        for stage in self.decoder:
            skip = skips.pop()
            y = stage(torch.cat([skip, F.interpolate(y, size=skip.shape[2:])], 1))
        return F.interpolate(self.head(y), size=x.shape[2:], mode='bilinear')

@lru_cache(maxsize=1)     # 90 MB; all arms of a seed have the same
def rooms(seed, n, size, ambiguity):
    "Pictures, values 0 to 1, and masks of rooms"
    drawn = [render_room((seed, i), size, ambiguity=ambiguity) for i in range(n)]
    return [(TensorImage(torch.from_numpy(p).permute(2, 0, 1)/255.), TensorMask(torch.from_numpy(m).long())) for p,m in drawn]

def data(seed, n, n_valid, size, ambiguity):
    "Rooms of a seed, mirrored and re-lit for training"
    items = rooms(1000+seed, n+n_valid, size, ambiguity)     # the pilots and the main job have rooms of small seeds
    train = DataLoader(items[n_valid:], bs=BS, shuffle=True, drop_last=True, after_batch=Pipeline([Flip(), Brightness(.2), Contrast(.2)]))
    return DataLoaders(train, DataLoader(items[:n_valid], bs=25))

def make(dls, halvings): return Learner(dls, SmallUNet(halvings), loss_func=CrossEntropyLossFlat(axis=1), metrics=Dice())

ARMS = {'attention':'attention', 'gamma from 0':SelfAttention, 'uniform':'uniform', 'context':'context', 'conv3':'conv3'}

def run(args, ambiguity, halvings, epochs, arms, experiment='walls', where='middle'):
    "The runs of `arms` on some rooms with some net; all experiments on these share a record, so that none is trained twice"
    n,n_valid,size = (16,4,48) if args.smoke else (N,N_VALID,SIZE)
    if args.smoke: epochs = 1
    setting = dict(ambiguity=ambiguity, halvings=halvings, size=size, steps=epochs*(n//BS))
    name = f"walls-ambiguity{ambiguity:g}-{halvings}halvings-{setting['steps']}steps"
    return compare(args, experiment, name, setting, partial(data, n=n, n_valid=n_valid, size=size, ambiguity=ambiguity),
                   partial(make, halvings=halvings), where=where, arms=arms, epochs=epochs, lr=LR, gamma=1.)

def main(argv=None):
    p = options(__doc__, seeds=5)
    p.add_argument('--ambiguity', type=float, nargs='+', default=AMBIGUITY, help='of the rooms (%(default)s)')
    p.add_argument('--halvings', type=int, nargs='+', choices=HALVINGS, default=HALVINGS, help='of the U-Net (%(default)s)')
    p.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS), help='beside `none`; more can be trained later (all)')
    p.add_argument('--long', action='store_true', help=f'{LONG*N//BS} steps in place of {EPOCHS*N//BS}')
    args = p.parse_args(argv)
    for ambiguity in args.ambiguity:
        for halvings in args.halvings: run(args, ambiguity, halvings, LONG if args.long else EPOCHS, {a:ARMS[a] for a in args.arms})

if __name__ == '__main__': main()
