"""Swatches in rooms: is the colour of a surface found in a rendered room too?

python benchmarks/swatch_rooms.py            3 seeds, 500 steps: about half an hour on one core
python benchmarks/swatch_rooms.py --long     1500 steps
"""
from functools import partial

from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai_selfattn.walls.swatches import SwatchNet, SwatchPSNR, swatch_dls, swatch_example, swatch_weights

from study import compare, options
from swatches import EPOCHS, LONG, LR, N, N_VALID, OfModel, train

SIZE = 64     # pixels a side
ARMS = {'attention':'attention', 'uniform':'uniform', 'context':'context'}     # gamma from 1

def _gamma(model): return next((m.gamma.item() for m in model.modules() if hasattr(m, 'gamma')), None)

def _own_swatch(model, n, size):
    "Share of the weight on the swatch of the own paint, None without attention"
    if not any(hasattr(m, 'attention_weights') for m in model.modules()): return None
    return swatch_weights(model, [swatch_example(i, 'rooms', size) for i in range(n)])['own_swatch'].mean()

def data(seed, n, n_valid, size): return swatch_dls('rooms', n, size, seed=seed, n_valid=n_valid)

def make(dls, n_valid, size):
    metrics = [SwatchPSNR(), OfModel('gamma', _gamma), OfModel('own_swatch', partial(_own_swatch, n=min(n_valid, 20), size=size))]
    return Learner(dls, SwatchNet(), loss_func=MSELossFlat(), metrics=metrics)

def main(argv=None):
    p = options(__doc__, seeds=3)
    p.add_argument('--long', action='store_true', help=f'{LONG*N//8} steps in place of {EPOCHS*N//8}')
    args = p.parse_args(argv)
    n,n_valid,size,epochs = (16,4,24,1) if args.smoke else (N,N_VALID,SIZE,LONG if args.long else EPOCHS)
    setting = dict(form='rooms', size=size, steps=epochs*(n//8))
    return compare(args, 'swatch_rooms', f"swatch_rooms-{setting['steps']}steps", setting, partial(data, n=n, n_valid=n_valid, size=size),
                   partial(make, n_valid=n_valid, size=size), where='middle', arms=ARMS, fit=partial(train, epochs=epochs, lr=LR), gamma=1.)

if __name__ == '__main__': main()
