"""What the experiments of the study share: their options, runs that resume, and a csv file that grows

An experiment is a script beside this one, such as `python benchmarks/swatches.py`. `PROTOCOL.md` says what was settled beforehand.
"""
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import pandas as pd
import torch
from fastai_selfattn.bench.measure import circumstances
from fastai_selfattn.compare.compare import compare_attention
from fastai_selfattn.files import whole_file

RESULTS = Path(__file__).parent/'results'

def options(doc, seeds):
    "A parser with what each experiment can be told"
    p = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=seeds, metavar='N', help='seeds 0 to N-1 (%(default)s)')
    p.add_argument('--out', type=Path, default=RESULTS, metavar='DIR', help='folder for the csv file; what is there is gone on with')
    p.add_argument('--smoke', action='store_true', help='a few tiny steps, to see that everything runs; give another --out')
    return p

def _here():
    "Torch and machine, as in the names of the other results"
    release,_,_ = torch.__version__.partition('+')
    cpu = re.sub('[^a-z0-9]+', '-', circumstances()['machine'].lower()).strip('-')
    return f'torch{release}-{cpu}-{torch.get_num_threads()}threads'

def csv_file(out, experiment): return out/f'study-{experiment}-{_here()}.csv'

def record_file(out, name): return out/'records'/f'{name}-{_here()}.json'

def _rows(found, setting):
    "A row for each run of a comparison"
    for run in found.records:
        what = {**setting, 'arm':run['arm'], 'layer':found.settings['arms'][run['arm']], 'seed':run['seed']}
        seen = {k:run[k] for k in ('loss','parameters','change','ms','held','seconds','failed')}
        yield what | run['metrics'] | seen | {'training':found.settings['common']['training']} | circumstances()

def add_rows(file, rows, keys):
    "Add the rows that are new to a csv file; those that are there stay, with the date that they have"
    new = pd.DataFrame(list(rows))
    df = pd.concat([pd.read_csv(file), new], ignore_index=True) if file.exists() else new
    same = df[keys].astype(str).duplicated()
    with whole_file(file) as f: df[~same].to_csv(f, index=False, float_format='%.6g')

def compare(args, experiment, record, setting, dls, make, **kwargs):
    "`compare_attention` seed by seed, with its runs in a record, to resume from, and in the csv file of the experiment"
    path,file = record_file(args.out, record),csv_file(args.out, experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        found = compare_attention(dls, make, seeds=[seed], path=path, **kwargs)
        add_rows(file, _rows(found, setting), [*setting,'arm','seed'])
        scores = ', '.join(f"{r['arm']} {r['metrics'][found.metric] or 0:.4g}" for r in found.records)
        print(f"{experiment} {' '.join(map(str, setting.values()))}, seed {seed}: {scores}", flush=True)
    found = compare_attention(dls, make, seeds=args.seeds, path=path, **kwargs)
    print(f'{found}\n\nwritten: {file}\n', flush=True)
    return found
