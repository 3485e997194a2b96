"""Where, for walls: what does attention gain at each place of a U-Net, and what does it cost there?

python benchmarks/where_walls.py     5 seeds, 400 steps, ambiguous rooms, three halvings
"""
from study import options
from walls import EPOCHS, run

PLACES = ('stem','encoder.0','middle','decoder.0','decoder.1'),('encoder.0','decoder.0')     # one each; and a pair

def main(argv=None):
    singles,pair = PLACES
    where = {p:p for p in singles} | {' and '.join(pair):list(pair)}
    return run(options(__doc__, seeds=5).parse_args(argv), 1., 3, EPOCHS, ['attention'], 'where_walls', where)

if __name__ == '__main__': main()
