"""Rates: is a rival only held back by its learning rate? Four more rates for paint by swatch

python benchmarks/rates.py     3 seeds, 500 steps at each rate; the fifth, 4e-3, is that of benchmarks/swatches.py
"""
from study import options
from swatches import ARMS, run

RATES = 1e-3,2e-3,8e-3,1.6e-2
TRIED = 'attention','context','hourglass'     # beside `none`

def main(argv=None):
    args = options(__doc__, seeds=3).parse_args(argv)
    for lr in RATES: run(args, 'rates', {a:ARMS[a] for a in TRIED}, lr=lr)

if __name__ == '__main__': main()
