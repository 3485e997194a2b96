"""Replacing: can attention stand in for a conv, as somebody might try who changes a net by hand?

python benchmarks/replacing.py     3 seeds, 500 steps on the pictures of benchmarks/swatches.py
"""
from functools import partial

from fastai.layers import ConvLayer
from fastai_selfattn.attention.layers import SelfAttention
from torch import nn

import swatches
from study import compare, options

def conv(nc): return ConvLayer(nc, nc)     # what stands in the middle of a `SwatchNet`

def conv_then_attention(nc): return nn.Sequential(conv(nc), SelfAttention(nc, gamma=1.))

ARMS = {     # what is put where the middle conv was; `none`: nothing
    'conv':conv,
    'attention':'attention',     # gamma from 1
    'gamma from 0':SelfAttention,
    'conv, then attention':conv_then_attention}

def make(dls, **kwargs):
    learn = swatches.make(dls, **kwargs)
    learn.model.middle = nn.Sequential(nn.Identity())
    return learn

def main(argv=None):
    args = options(__doc__, seeds=3).parse_args(argv)
    n,n_valid,size,large = (16,4,24,(32,)) if args.smoke else (swatches.N,swatches.N_VALID,swatches.SIZE,swatches.LARGE)
    epochs = 1 if args.smoke else swatches.EPOCHS
    setting = dict(form='flat', size=size, steps=epochs*(n//8))
    return compare(args, 'replacing', f"replacing-{setting['steps']}steps", setting, partial(swatches.data, n=n, n_valid=n_valid, size=size),
                   partial(make, n_valid=n_valid, size=size, large=large), where='middle', arms=ARMS,
                   fit=partial(swatches.train, epochs=epochs, lr=swatches.LR), gamma=1.)

if __name__ == '__main__': main()
