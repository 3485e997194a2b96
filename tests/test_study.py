"The scripts of the study run, resume, and write csv files that say what was run"
import importlib

import fastai_selfattn.learner  # noqa: F401  gives `Learner` its `insert_attention`
import pandas as pd
import pytest
from conftest import root

SCRIPTS = {'swatches':7, 'starting':11, 'replacing':5, 'rates':4, 'where':7, 'where_walls':7, 'walls':4, 'gan':7, 'swatch_rooms':4}     # arms of each

@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(root/'benchmarks')
    return importlib.import_module

@pytest.mark.parametrize('name', SCRIPTS)
def test_smoke_trains_whole_study(script, tmp_path, name):
    few = ['--ambiguity', '1', '--halvings', '2', '--arms', 'attention', 'gamma from 0', 'uniform'] if name == 'walls' else []
    args = ['--smoke', '--seeds', '1', '--out', str(tmp_path), *few]
    script(name).main(args)
    file, = tmp_path.glob('study-*.csv')
    df = pd.read_csv(file)
    each = df.groupby('lr') if name == 'rates' else [(None, df)]
    assert file.name.startswith(f'study-{name}-torch') and len(each) == (4 if name == 'rates' else 1)
    for _,runs in each: assert len(runs) == runs['arm'].nunique() == SCRIPTS[name]
    assert {'steps','layer','seed','loss','training','machine','torch','fastai','package version','date'} <= set(df)
    assert df['failed'].isna().all() and df['loss'].notna().all() and (df['steps'] == (3 if name == 'gan' else 2)).all()
    before = file.read_bytes()
    script(name).main(args)
    assert file.read_bytes() == before      # nothing trained anew

def test_gamma_is_spared_the_decay_in_one_start_only(script):
    decayed = {}
    for name in ('gamma from 0','gamma from 0, no decay'):
        learn = script('swatches').make(script('swatches').data(0, 16, 4, 24), 4, 24, (32,))
        learn.insert_attention('middle', layer=script('starting').ARMS[name])
        learn.create_opt()
        gamma, = (m.gamma for m in learn.model.modules() if hasattr(m, 'gamma'))
        decayed[name] = learn.opt.state[gamma].get('do_wd', True)
    assert decayed == {'gamma from 0':True, 'gamma from 0, no decay':False}

def test_experiments_on_the_same_pictures_share_runs(script, tmp_path):
    study = script('study')
    a,b = script('swatches').ARMS,script('starting').ARMS
    assert {'attention','gamma from 0'} <= a.keys() & b.keys() and all(a[k] is b[k] for k in a.keys() & b.keys())
    assert study.record_file(tmp_path, 'x').parent == tmp_path/'records'

def test_rows_are_added_and_those_that_are_there_stay(script, tmp_path):
    study,file = script('study'),tmp_path/'x.csv'
    row = dict(size=24, arm='none', seed=0, psnr=1/3, date='2026-01-01')
    study.add_rows(file, [row], ['size','arm','seed'])
    study.add_rows(file, [row | {'date':'2027-01-01', 'psnr':9.}, row | {'seed':1, 'more':2}, row | {'size':48}], ['size','arm','seed'])
    df = pd.read_csv(file)
    assert df[['size','seed']].values.tolist() == [[24,0],[24,1],[48,0]] and df['date'].tolist() == ['2026-01-01']*3
    assert df['psnr'].tolist() == pytest.approx([1/3]*3, abs=1e-6) and df['more'].isna().tolist() == [True,False,True]
