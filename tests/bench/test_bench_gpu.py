"`selfattn-bench --gpu` without a GPU: its dry form, the kernels' stand-ins, the answers that a table gives, and what it refuses."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from test_cuda import kernels  # noqa: F401
from fastai_selfattn.attention.ops import attend
from fastai_selfattn.bench import choices, commands, gpu, ways
from fastai_selfattn.bench.choices import error_table, gpu_answers, plot_gpu, ratios
from fastai_selfattn.bench.commands import bench_main
from fastai_selfattn.bench.gpu import CASES, DRY, DTYPES, ERRORS, FAR, FULL, NEAR_0, Job, all_jobs, run_job, run_jobs
from fastai_selfattn.bench.ways import WAYS, Way
from fastai_selfattn.shell import Failed

def errors(way, dtype='float32', shape='2,36,6x7', case=NEAR_0):
    row = run_job(Job('error', dtype, shape, way, case), 'cpu', 0)
    assert not row['note'], row['note']
    return [row[e] for e in ERRORS]

# One measurement

@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('way', ['fastai', 'plain', 'ours', 'tiled 1024x512', 'tiled 2048x2048', 'sdpa flash 128', 'sdpa math'])
def test_ways_of_a_cpu_are_right(way, case): assert max(errors(way, case=case)) < 2e-5

class Wrong(torch.autograd.Function):
    "Attention whose output is right, and one of its gradients is not"
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return attend(q, k, v)
    @staticmethod
    def backward(ctx, do):
        with torch.enable_grad():
            qkv = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            dq, dk, dv = torch.autograd.grad(attend(*qkv), qkv, do)
        return dq, 1.01*dk, dv

def test_an_error_is_seen_where_it_is(monkeypatch):
    monkeypatch.setitem(WAYS, 'wrong', Way(Wrong.apply))
    monkeypatch.setitem(WAYS, 'scaled', Way(lambda q, k, v: attend(q, k, v, .9)))
    o, dq, dk, dv = errors('wrong')
    assert max(o, dq, dv) < 1e-5 and dk == pytest.approx(.01, rel=1e-3)
    assert min(errors('scaled')) > 1e-3

@pytest.mark.parametrize('way,ran,heads', [('fused', 'fused', 1), ('fused 128', 'fused', 2), ('flash', 'flash', 2)])
@pytest.mark.parametrize('case', CASES)
def test_kernels_by_their_stand_ins(way, ran, heads, case, kernels, monkeypatch):
    seen, op = [], '_scaled_dot_product_efficient_attention' if ran == 'fused' else '_scaled_dot_product_flash_attention'
    real = getattr(kernels, op).default
    monkeypatch.setattr(kernels, op, SimpleNamespace(default=lambda q, *a, **k: seen.append(q.shape[1]) or real(q, *a, **k)))
    job = Job('error', 'float16', '1,200,6x7', way, case)
    row = run_job(job, 'cpu', 0)
    assert row['ran'] == ran and seen == [heads] and kernels.calls == [f'{ran} forward', f'{ran} backward'] and row['case'] == case
    assert max(row[e] for e in ERRORS) < 3e-3 or case == FAR and max(row[e] for e in ERRORS) < .1

def test_the_far_case_is_below_what_cudnn_bears():
    for shape in gpu.parse_shapes(FULL.errors):
        for dtype in DTYPES.values():
            q, k, *_ = gpu.random_maps(shape, dtype, 'cpu', FAR)
            lse = (q.double() @ k.double().mT).logsumexp(-1)
            assert lse.max() < -88.7 and shape.n % 128 == 64

def test_a_time_has_both_passes_and_says_what_ran():
    for way, ran in (('ours', 'math'), ('our layer', 'math'), ('tiled 2048x2048', 'tiled'), ('fastai layer', '')):
        row = run_job(Job('time', 'bfloat16', '1,24,5x7', way), 'cpu', 0)
        assert row['note'] == '' and row['ran'] == ran and row['forward ms'] > 0 and row['both ms'] > 0 and row['rounds'] >= 3 and row['n'] == 35
        assert np.isnan(row['peak MiB'])          # which only a GPU's allocator tells

def test_what_fails_is_a_row_that_says_why(monkeypatch):
    def fails(q, k, v):
        import warnings
        warnings.warn('too odd for it (Triggered internally at x.cpp:1)')
        raise RuntimeError('no kernel\nC++ trace')
    monkeypatch.setitem(WAYS, 'fails', Way(fails))
    row = run_job(Job('time', 'float32', '1,24,5x7', 'fails'), 'cpu', 0)
    assert row['note'] == 'RuntimeError: no kernel too odd for it' and 'both ms' not in row
    assert 'it runs on CUDA' in run_job(Job('error', 'float16', '1,24,5x7', 'flash', FAR), 'cpu', 0)['note']

def test_all_is_planned_once_errors_first_and_what_compiles_last():
    jobs = all_jobs(FULL, list(WAYS))
    assert len(set(jobs)) == len(jobs) and {j.way for j in jobs} == set(WAYS) and {j.dtype for j in jobs} == set(DTYPES)
    quick = [j.kind for j in jobs if not WAYS[j.way].compiles]
    assert quick == sorted(quick) and not any(WAYS[j.way].compiles for j in jobs[:len(quick)])
    assert not any(WAYS[j.way].is_layer for j in jobs if j.kind == 'error') and '2,256,128x128' in {j.shape for j in jobs}

# Processes

JOBS = [Job('time', 'float32', '1,16,3x5', way) for way in ('fastai', 'flex', 'plain', 'sdpa math', 'ours')]
def others(name, code): return f'''
import os, time
from fastai_selfattn.bench import gpu, ways
gpu.WAYS['{name}'] = ways.Way(lambda q, k, v: {code})
print('noise')
gpu.work()'''

def test_a_process_that_dies_costs_one_row(monkeypatch):
    monkeypatch.setattr(gpu, '_CODE', others('flex', 'os.kill(os.getpid(), 11)'))
    rows = list(run_jobs(JOBS, 'cpu', 100))
    assert [r['way'] for r in rows] == [j.way for j in JOBS] and all(r['note'] or r['both ms'] > 0 for r in rows)
    assert [r['note'] for r in rows] == ['', 'took the process with it: ended by signal 11', '', '', '']

def test_a_process_that_hangs_is_ended_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(gpu, '_CODE', others('fastai', 'time.sleep(1000)'))
    assert [r['note'] for r in run_jobs(JOBS, 'cpu', 5)] == ['not measured: the 5 s were up']*5

def test_a_process_that_does_not_start_is_said_once(monkeypatch):
    monkeypatch.setattr(gpu, '_CODE', 'raise ImportError("no such module")')
    with pytest.raises(Failed, match='did not start: ImportError: no such module'): list(run_jobs(JOBS, 'cpu', 60))

# Answers

def row(way, dtype, n, ms, c=256, kind='time', **more):
    return {'kind': kind, 'dtype': dtype, 'shape': f'2,{c},1x{n}', 'n': n, 'case': NEAR_0, 'way': way, 'both ms': ms, 'peak MiB': np.nan, 'note': '', **dict.fromkeys(ERRORS, np.nan), **more}

def table(times, worse=None, **more):
    "Times by way and n, in both half precisions; errors of 1e-3, but for those of `worse`"
    rows = [row(way, d, n, ms, **more) for way, by_n in times.items() for d in ('float16', 'bfloat16') for n, ms in by_n.items()]
    rows += [row(way, d, 576, np.nan, kind='error', **dict.fromkeys(ERRORS, 1e-3) | (worse or {}).get(way, {})) for way in times for d in ('float16', 'bfloat16')]
    return pd.DataFrame(rows)

def test_ratios_are_of_the_same_map_and_dtype():
    df = pd.DataFrame([row('a', 'float16', 64, 2.), row('b', 'float16', 64, 8.), row('a', 'bfloat16', 64, 3.), row('b', 'bfloat16', 64, 1.), row('a', 'float16', 256, 5.), row('b', 'float32', 256, 7.), row('a', 'float32', 256, 7.)])
    assert ratios(df, 'a', 'b').to_dict() == {('float16', 64, '2,256,1x64'): .25, ('bfloat16', 64, '2,256,1x64'): 3.}
    assert choices.mean_ratio(pd.Series([.5, 2., 4., 1/4])) == pytest.approx(1)

@pytest.mark.parametrize('flash,worse,want', [
    ({64: 1., 256: .5}, {}, 'yes. flash takes 0.71 of the time of fused on 4 maps (0.50 to 1.00)'), ({64: 1., 256: .96}, {}, 'no. flash takes 0.98'),
    ({64: .5, 256: .5}, {'flash': {'error dq': 2.1e-3}}, 'no. flash takes 0.50'), ({64: .5, 256: .5}, {'flash': {'error dv': np.nan}}, 'no. flash takes 0.50'),
    ({64: .5, 256: .5}, {'flash': {'error dq': 1.9e-3}}, 'yes. flash takes 0.50'), ({}, {}, 'no answer')])
def test_flash_or_not(flash, worse, want):
    said = gpu_answers(table({'fused': {64: 1., 256: 1.}, 'flash': flash}, worse))[0]
    assert said.startswith(f'Flash in half precision (FLASH): {want}')
    assert ('its errors are missing, not finite, or more than 2 times' in said) == (bool(worse) and want.startswith('no'))

def test_wide_values_whole_or_not():
    "Only maps of more than 128 channels count: on others the two are the same"
    wide, narrow = ({'fused': {64: 1.}, 'fused 128': {64: ms}} for ms in (.8, .1))
    df = pd.concat([table(wide, c=256), table(narrow, c=128)])
    assert '(WIDTHS): yes. fused 128 takes 0.80 of the time of fused on 2 maps' in gpu_answers(df)[1]
    assert '(WIDTHS): no answer' in gpu_answers(table(narrow, c=128))[1]

@pytest.mark.parametrize('fused,fastai,want', [(1e-5, 6e-6, 'yes'), (1.3e-5, 6e-6, 'no'), (9e-7, 1e-7, 'yes'), (1e-5, np.nan, 'no')])
def test_the_kernel_in_float32_may_err_as_much_as_fastais_formula(fused, fastai, want):
    "Tiles centre the keys, and err by less than both"
    errors = {'fused': fused, 'fastai': fastai, 'tiled 2048x2048': 5e-7}
    rows = [row(way, 'float32', 64, ms) for way, ms in (('fused', .5), ('tiled 2048x2048', 1.))]
    rows += [row(way, 'float32', 576, np.nan, kind='error', **dict.fromkeys(ERRORS, e)) for way, e in errors.items()]
    assert f'The memory-efficient kernel in float32: {want}. fused takes 0.50' in gpu_answers(pd.DataFrame(rows))[4]

@pytest.mark.parametrize('plain,want', [
    ({64: .5, 256: .8, 1024: 2.}, 'up to n = 256. There plain takes 0.63'), ({64: .5, 256: 1., 1024: .5}, 'up to n = 64. There'), ({64: .5, 256: .5, 1024: .5}, 'up to n = 1,024. There'),
    ({64: 1.5, 256: .5, 1024: .5}, 'no. On the smallest maps plain takes 1.50 of the time of ours on 2 maps'), ({}, 'no answer')])
def test_plain_products_up_to_where(plain, want):
    said = gpu_answers(table({'ours': {64: 1., 256: 1., 1024: 1.}, 'plain': plain}))
    assert said[2].startswith(f'Plain products in float16 and bfloat16: {want}') and 'float32: no answer' in said[3]

def test_a_map_with_other_channels_can_forbid_plain_products():
    df = pd.concat([table({'ours': {64: 1., 256: 1.}, 'plain': {64: .5, 256: .5}}), table({'ours': {256: 1.}, 'plain': {256: 1.2}}, c=64)])
    assert 'up to n = 64' in gpu_answers(df)[2]

def test_the_table_of_errors_shows_nan_as_missing():
    df = pd.DataFrame([row('ours', 'float16', 576, np.nan, kind='error', **dict(zip(ERRORS, (1., 2., e, 4.)))) for e in (3., np.nan)] + [row('flash', 'float16', 576, np.nan, kind='error', **dict(zip(ERRORS, (1., 2., 9., 4.))))])
    t = error_table(df)['float16', NEAR_0]
    assert t['flash'] == 9 and np.isnan(t['ours'])

def test_the_picture_is_relative_to_fastai():
    fig = plot_gpu(table({'fastai': {64: 2., 256: 4.}, 'ours': {64: 1., 256: 8.}, 'flash': {256: 1.}}))
    assert [ax.get_title() for ax in fig.axes] == ['float16', 'bfloat16']          # one row: no memory was measured
    by_name = {l.get_label(): list(l.get_ydata()) for l in fig.axes[0].lines}
    assert by_name['ours'] == [.5, 2.] and by_name['flash'] == [.25] and [t.get_text() for t in fig.axes[0].get_xticklabels()] == ['2,256,1x64', '2,256,1x256']

# The command

def args(out, *more): return ['--gpu', '--dry', '--out', str(out), '--contestants', 'fastai,ours,fused', *more]

@pytest.fixture
def here(monkeypatch):
    "Measured in this process"
    monkeypatch.setattr(gpu, 'run_jobs', lambda jobs, device, seconds, threads: (run_job(j, device, 0) for j in jobs))

def test_the_dry_form_is_whole(here, tmp_path, capsys):
    assert bench_main(args(tmp_path/'new')) == 0
    f, = (tmp_path/'new').glob('*.csv')
    df, said = pd.read_csv(f), capsys.readouterr().out
    release = torch.__version__.replace('+', '-')
    assert f.name == f'gpu-dry-torch{release}-cpu.csv' and f.with_suffix('.png').stat().st_size > 10_000
    assert [tuple(j) for j in df[['kind', 'dtype', 'shape', 'way', 'case']].fillna('').itertuples(index=False)] == [tuple(j) for j in all_jobs(DRY, ['fastai', 'ours', 'fused'])]
    ran = df[df.way != 'fused']
    assert (df['torch'] == torch.__version__).all() and ran[ran.kind == 'time']['both ms'].gt(0).all() and ran[ran.kind == 'error'][list(ERRORS)].notna().all(axis=None)
    assert df[df.way == 'fused']['note'].str.contains('it runs on CUDA').all() and ran['note'].isna().all()
    for what in ('Largest relative error', 'Flash in half precision (FLASH): no answer', 'Plain products in float16 and bfloat16: ', str(f)): assert what in said

def test_stopped_in_the_middle_of_a_shape_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    def stopped(jobs, device, seconds, threads):
        for job in jobs[:20]: yield job._asdict() | {'n': 1, 'note': ''}
        raise KeyboardInterrupt
    monkeypatch.setattr(gpu, 'run_jobs', stopped)
    assert bench_main(args(tmp_path)) == 130
    f, = tmp_path.glob('*.csv')
    assert len(pd.read_csv(f)) == 20 and 'what was done is in' in capsys.readouterr().err

@pytest.mark.parametrize('argv,says', [
    (['--gpu'], 'PyTorch sees no GPU here'), (['--dry'], '--dry is a form of --gpu'), (['--gpu', '--dry', '--no-memory'], 'leave --no-memory out'), (['--gpu', '--dry', '--shapes', '1,7,5'], '8 channels'),
    (['--gpu', '--dry', '--contestants', 'ours,xformers'], "no contestant 'xformers' on a GPU"), (['--gpu', '--seconds', '0'], 'more than 0')])
def test_what_is_refused(argv, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(gpu, 'run_jobs', lambda *a: pytest.fail('measured'))
    monkeypatch.setattr(commands, 'bench_shape', lambda *a: pytest.fail('measured'))
    try: status = bench_main([*argv, '--out', str(tmp_path/'new')])
    except SystemExit as e: status = e.code
    err = capsys.readouterr().err
    assert status == 2 and says in err and len(err.splitlines()) == 1 and not (tmp_path/'new').exists()

def test_ways_leave_the_package_as_it_was():
    before = ways.tiles.most, dict(ways.cuda.WIDTHS)
    for name in ('tiled 1024x512', 'fused 128'):
        with pytest.raises(ZeroDivisionError), WAYS[name].around(): 1/0
    assert (ways.tiles.most, dict(ways.cuda.WIDTHS)) == before
