"""Starting: from which gamma, and with which logits, does attention learn to paint by swatch?

python benchmarks/starting.py     3 seeds, 500 steps; runs of benchmarks/swatches.py are taken from there
"""
from functools import partial

from fastai_selfattn.attention.layers import SelfAttention

from study import options
from swatches import run

class FastGamma(SelfAttention):
    "Gamma from 0, with ten times the effect: under Adam, as if its learning rate were ten times as large"
    def forward(self, x): return x + 10*(super().forward(x)-x)

class NoDecay(SelfAttention):
    "Gamma from 0, without weight decay"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = self.gamma     # a name that fastai spares the decay

ARMS = {
    'attention':'attention',     # gamma from 1
    'gamma from 0':SelfAttention,
    'gamma from 0.1':partial(SelfAttention, gamma=.1),
    'gamma from 0, x10':FastGamma,
    'gamma from 0, no decay':NoDecay,
    'unit, learned scale':partial(SelfAttention, gamma=1., unit=True, scale=10., learn_scale=True),
    'learned scale':partial(SelfAttention, gamma=1., learn_scale=True),
    'logits x0.2':partial(SelfAttention, gamma=1., scale=.2),
    'logits x4':partial(SelfAttention, gamma=1., scale=4.),
    'no spectral norm':partial(SelfAttention, gamma=1., norm_type=None)}

def main(argv=None): return run(options(__doc__, seeds=3).parse_args(argv), 'starting', ARMS)

if __name__ == '__main__': main()
