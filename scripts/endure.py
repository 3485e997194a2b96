"""What people do with attention in a Learner, in any order and for hours, until something is found: `tests/endurance.py` and `tests/wild.py`.

The suite runs little of it.

python scripts/endure.py --sequences 10000 --seed 0           hours: 1 to 5 s a sequence, on two busy cores
python scripts/endure.py --sequences 0 --faults               every function of the package fails once, in everything that is done with a Learner
python scripts/endure.py --sequences 0 --fuzz 10000 --seed 0  layers, `attend`, the commands and the explorer on any input

A run that was stopped goes on where it was when the same command is given again. What is found is made as small as it can be and printed;
it is kept, and tried first in the next run. Both are kept in the folder `.hypothesis`. The exit status is 1 if something was found."""
import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import run_state_machine_as_test

import endurance
import wild

AT_ONCE = 50     # sequences, each of these lots with a seed of its own

def lot(seed_, n, steps, folder):
    "Run `n` sequences; raises what is found, as small as it can be"
    how = settings(max_examples=n, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False,
                   database=DirectoryBasedExampleDatabase(folder/'found'))
    run_state_machine_as_test(seed(seed_)(endurance.Endurance), settings=how)

def faults():
    "Whether a failure left something changed"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        learners = endurance.learners_for_faults(Path(folder))
        for name in endurance.DONE:
            changed,n = endurance.failures(learners, name)
            print(f'{name}: {n} failures, {len(changed)} of them changed something', flush=True)
            for where,what in changed.items(): print(f"  {where}: {', '.join(what)}")
            found |= changed
    return bool(found)

def fuzz(seed_, n):
    "Run `n` inputs of each kind; raises what is found, as small as it can be"
    for what,(cases,check) in (endurance.FUZZED|wild.FUZZED).items():
        how = settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        seed(seed_)(how(given(cases)(lambda case: check(**case))))()
        print(f"{what}: {endurance.COUNTS[what]:,} inputs were right, {endurance.COUNTS[f'{what}: refused']:,} refused", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sequences', type=int, default=10000, help='how many sequences in all')
    parser.add_argument('--steps', type=int, default=30, help='most steps of a sequence')
    parser.add_argument('--seed', type=int, default=0, help='of the sequences')
    parser.add_argument('--faults', action='store_true', help='let each function of the package fail in turn, after the sequences')
    parser.add_argument('--fuzz', type=int, default=0, help='how many inputs of each kind, after that')
    parser.add_argument('--folder', type=Path, default=ROOT/'.hypothesis'/'endurance', help='where progress and what was found are kept')
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    progress = args.folder/f'seed{args.seed}-steps{args.steps}.json'
    progress.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(progress.read_text()) if progress.exists() else dict(sequences=0, counts={})
    endurance.COUNTS.update(known['counts'])
    start,done = time.time(),known['sequences']
    while done < args.sequences:
        n = min(AT_ONCE, args.sequences-done)
        lot(args.seed*1_000_000+done, n, args.steps, args.folder)
        done += n
        progress.write_text(json.dumps(dict(sequences=done, counts=endurance.COUNTS)))
        print(f'{done:,} of {args.sequences:,} sequences, {sum(endurance.COUNTS.values()):,} checked steps, {time.time()-start:.0f} s', flush=True)
    print('\n'.join(f'{n:8,} {what}' for what,n in sorted(endurance.COUNTS.items())))
    print(f'Nothing found in {done:,} sequences')
    if args.faults and faults(): sys.exit(1)
    if args.fuzz: fuzz(args.seed, args.fuzz)

if __name__ == '__main__': main()
