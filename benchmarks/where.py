"""Where: what does attention gain at each place of the swatch net, and what does it cost there?

python benchmarks/where.py     3 seeds, 500 steps
"""
from study import options
from swatches import run

PLACES = ('stem','down','middle','up.0','up'),('down','middle')     # one each; and a pair

def main(argv=None):
    singles,pair = PLACES
    where = {p:p for p in singles} | {' and '.join(pair):list(pair)}
    return run(options(__doc__, seeds=3).parse_args(argv), 'where', ['attention'], where=where)

if __name__ == '__main__': main()
