"The whole: it finds what is known to help, goes on after any interruption as if there had been none, and leaves the user's things alone."
import json, random
from functools import partial
import numpy as np
import pytest, torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy, mae
from fastai.vision.learner import vision_learner
from conftest import named
from fastai_selfattn import all as everything
from fastai_selfattn.compare import compare
from fastai_selfattn.compare.compare import compare_attention
from fastai_selfattn.compare.results import Comparison
from fastai_selfattn.placement.unet import unet_learner
from fastai_selfattn.walls.train import small_encoder
from torch import nn

def look_up(seed, n=400, size=10, kinds=3):
    "Rows of pixels in three kinds; the first three show a number each, and each pixel shall give the number of its kind"
    g = torch.Generator().manual_seed(seed)
    numbers,kind = torch.rand(n, kinds, generator=g),torch.randint(kinds, (n, size), generator=g)
    kind[:, :kinds] = torch.arange(kinds)
    y = numbers.gather(1, kind)[:, None]
    shown = (torch.arange(size) < kinds).float().expand(n, 1, size)
    return list(zip(torch.cat([F.one_hot(kind, kinds).float().mT, y*shown, shown], 1), y))

def rows(seed, n=400):
    items = look_up(seed, n)
    return DataLoaders(DataLoader(items[n//5:], bs=16, shuffle=True), DataLoader(items[:n//5], bs=n//5))

def few(seed): return rows(seed, 40)     # two batches to train on

def net(dls): return Learner(dls, nn.Sequential(nn.Conv1d(5, 24, 1), nn.Conv1d(24, 1, 1)), loss_func=MSELossFlat(), metrics=mae)

settings = dict(where='0', arms=['attention', 'conv3'], epochs=1, lr=.1, gamma=1., norm_type=None)

def numbers(c): return [{k: v for k,v in r.items() if k not in ('ms', 'seconds')} for r in sorted(c.records, key=lambda r: (r['seed'], r['arm']))]

def test_what_is_known_to_help():
    "Each pixel has to look its number up: attention helps, by its maps, and a conv of the same size does not"
    c = compare_attention(rows, net, **settings | dict(arms=['attention', 'uniform'], epochs=5), seeds=3)
    assert c.sentence.startswith('Attention helps: mae is better by')
    assert 'Its maps matter' in c.sentence and 'better in 3 of 3' in c.sentence
    assert (c.differences('attention').sign, c.differences('attention', 'uniform').sign) == (1, 1)
    t = c.table
    assert t.loc['attention', 'mae'] < .6*t.loc['none', 'mae'] and t.loc['attention', 'parameters'] == t.loc['uniform', 'parameters'] > 0
    assert t.loc['attention', 'change'] > .05

def test_what_is_known_to_be_nothing():
    "Two arms that are the same net give the same numbers, and nothing is claimed"
    c = compare_attention(few, net, '0', {'nothing': nn.Identity}, seeds=3, epochs=1)
    assert c.differences('nothing').gains == (0., 0., 0.)
    assert c.sentence.startswith('These 3 seeds cannot tell whether nothing helps')
    assert any('hardly used' in note for note in c.notes)

class Stop:
    "Stands in for `compare.run`: after so many runs it fails as a user or the machine might"
    def __init__(self, n, error): self.n,self.error,self.plain = n,error,compare.run
    def __call__(self, *args, **kwargs):
        if not self.n: raise self.error
        self.n -= 1
        return self.plain(*args, **kwargs)

@pytest.mark.parametrize('n,error', [(1, KeyboardInterrupt()), (4, RuntimeError('power cut'))], ids=['Ctrl-C', 'error'])
def test_goes_on_as_if_uninterrupted(tmp_path, monkeypatch, n, error):
    whole = compare_attention(few, net, **settings, seeds=2)
    path = tmp_path/'r.json'
    with monkeypatch.context() as m:
        m.setattr(compare, 'run', Stop(n, error))
        with pytest.raises(type(error)): compare_attention(few, net, **settings, seeds=2, path=path)
    assert len(json.loads(path.read_text())['runs']) == n
    resumed = compare_attention(few, net, **settings, seeds=2, path=path)
    assert numbers(resumed) == numbers(whole) == numbers(Comparison.load(path))
    assert resumed.sentence == whole.sentence

def test_seeds_and_arms_are_added(tmp_path, monkeypatch):
    path,calls = tmp_path/'r.json',[]
    def counting(recipe, dls, seed, arm, *args, plain=compare.run):
        calls.append((seed, arm.name))
        return plain(recipe, dls, seed, arm, *args)
    monkeypatch.setattr(compare, 'run', counting)
    few_arms = settings | dict(arms=['attention'])
    compare_attention(few, net, **few_arms, seeds=[3], path=path)
    assert calls == [(3, 'none'), (3, 'attention')]
    compare_attention(few, net, **settings, seeds=[3, 5], path=path)
    assert calls[2:] == [(3, 'conv3'), (5, 'none'), (5, 'attention'), (5, 'conv3')]
    c = compare_attention(few, net, **few_arms, seeds=[5], path=path)
    assert len(calls) == 6 and c.arms == ['none', 'attention'] and c.runs.seed.tolist() == [5, 5]

def test_one_start_is_made_again_when_all_is_there(tmp_path):
    class Counted:
        made = []
        def __call__(self, seed):
            self.made.append(seed)
            return few(seed)
    for _ in range(2): compare_attention(Counted(), net, **settings, seeds=2, path=tmp_path/'r.json')
    assert Counted.made == [0, 1, 0]     # the last to see whether it is still what was recorded

def other_net(dls): return Learner(dls, nn.Sequential(nn.Conv1d(5, 16, 1), nn.Conv1d(16, 1, 1)), loss_func=MSELossFlat(), metrics=mae)

@pytest.mark.parametrize('change,words', [
    (dict(epochs=2), r'training was fit_one_cycle\(1, 0.1\) and is now fit_one_cycle\(2, 0.1\)'), (dict(lr=.2), 'training was'), (dict(fit='fit'), 'training was'),
    (dict(gamma=0.), "the arm 'attention' was"), (dict(where='1'), "the arm 'attention' was"), (dict(how='replace', where='1'), "the arm 'attention' was"),
    (dict(arch=other_net), 'make was'), (dict(dls=lambda seed: few(seed)), 'data was')], ids=named)
def test_other_settings_are_refused(tmp_path, change, words):
    given = dict(dls=few, arch=net, **settings, seeds=1, path=tmp_path/'r.json')
    compare_attention(**given)
    before = (tmp_path/'r.json').read_bytes()
    with pytest.raises(ValueError, match=words): compare_attention(**given | change)
    assert (tmp_path/'r.json').read_bytes() == before

def test_changed_data_behind_the_same_function_is_refused(tmp_path, monkeypatch):
    compare_attention(few, net, **settings, seeds=1, path=tmp_path/'r.json')
    plain = look_up
    monkeypatch.setitem(globals(), 'look_up', lambda seed, n: plain(seed+1, n))
    with pytest.raises(ValueError, match='seed 0: the (training|validation) data of'):
        compare_attention(few, net, **settings | dict(arms=['attention', 'conv1']), seeds=1, path=tmp_path/'r.json')

def test_the_users_data_and_random_numbers_are_as_before():
    dls = few(0)
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    rng,state = dls.train.rng,dls.train.rng.getstate()
    c = compare_attention(dls, net, **settings, seeds=2)
    here = torch.rand(3).tolist(),random.random(),np.random.rand()
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    assert here == (torch.rand(3).tolist(),random.random(),np.random.rand())
    assert dls.train.rng is rng and rng.getstate() == state
    assert any('share one split' in n for n in c.notes)
    assert not any('share one split' in n for n in compare_attention(few, net, **settings, seeds=1).notes)

def test_several_places():
    def deep(dls): return Learner(dls, nn.Sequential(nn.Conv1d(5, 16, 1), nn.Conv1d(16, 24, 1), nn.Conv1d(24, 1, 1)), loss_func=MSELossFlat(), metrics=mae)
    c = compare_attention(few, deep, {'early': '0', 'both': ['0', '1']}, ['attention', 'conv1'], seeds=2, epochs=1)
    assert c.arms == ['none', 'attention at early', 'conv1 at early', 'attention at both', 'conv1 at both']
    first,both = c.sentence.splitlines()
    assert 'ttention at early' in first and 'ttention at both' in both
    params = c.table.parameters
    assert params['attention at both'] > params['attention at early'] > params['none'] == 0
    assert sum(r['arm'] == 'none' for r in c.records) == 2     # once a seed, for both places

def test_a_failed_arm_is_not_hidden(tmp_path):
    class Bad(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
        def forward(self, x): return x*self.w if not self.training else x*self.w*float('nan')
    for _ in range(2): c = compare_attention(few, net, '0', {'bad': Bad, 'attention': 'attention'}, seeds=2, epochs=1, path=tmp_path/'r.json')
    assert 'Nothing can be said of bad' in c.sentence and 'It failed in 2 of 2 seeds.' in c.sentence
    assert c.table.loc['bad', 'failed'] == 2 and c.table.loc['attention', 'failed'] == 0
    assert any('Bad failed in seed 1: its training loss became nan' in n for n in c.notes)
    c.plot()

@pytest.mark.parametrize('change,error,words', [
    (dict(dls=3), TypeError, 'DataLoaders or a function'), (dict(dls=lambda seed: seed), TypeError, 'must give DataLoaders'), (dict(arch=3), TypeError, 'function of DataLoaders'),
    (dict(where='middel'), ValueError, 'no site matches'), (dict(where={}), ValueError, 'several places'), (dict(arms=['unifrom']), ValueError, 'Did you mean'),
    (dict(seeds=0), ValueError, '1 or more'), (dict(epochs=None), ValueError, 'give `epochs`'), (dict(fit=lambda learn: None), ValueError, 'leave `epochs`'),
    (dict(fit='train'), TypeError, 'name of a method'), (dict(metric='dice'), ValueError, 'no metric'), (dict(layer=3), TypeError, '`layer` must be'),
    (dict(heads=5), ValueError, 'does not fit'), (dict(layer=nn.Identity, gamma=1., arms=['attention', 'uniform']), ValueError, 'does not fit'), (dict(how='before'), ValueError, '`how` must be')], ids=named)
def test_what_does_not_fit_is_said_before_training(tmp_path, monkeypatch, change, error, words):
    monkeypatch.setattr(compare, 'run', lambda *args: pytest.fail('it trained'))
    with pytest.raises(error, match=words): compare_attention(**dict(dls=few, arch=net, **settings, seeds=1, path=tmp_path/'r.json') | change)
    assert not list(tmp_path.iterdir())

def test_unknown_direction_is_asked_for_before_training(monkeypatch):
    def wobble(p, y): return (p-y).mean()
    def make(dls): return Learner(dls, net(dls).model, loss_func=MSELossFlat(), metrics=wobble)
    c = compare_attention(few, make, **settings, seeds=1, lower_is_better=True)
    assert c.metric == 'wobble' and c.lower_is_better
    monkeypatch.setattr(compare, 'run', lambda *args: pytest.fail('it trained'))
    with pytest.raises(ValueError, match='Give `lower_is_better'): compare_attention(few, make, **settings, seeds=1)

def test_quiet_without_a_terminal(capsys):
    compare_attention(few, net, **settings, seeds=1)
    out,err = capsys.readouterr()
    assert out == err == ''

def pictures(n=12, side=64, masks=True):
    g = torch.Generator().manual_seed(0)
    xs = torch.rand(n, 3, side, side, generator=g)
    ys = (xs[:, 0] > .5).long() if masks else torch.randint(2, (n,), generator=g)
    items = list(zip(xs, ys))
    dls = DataLoaders(TfmdDL(items[4:], bs=4, shuffle=True, num_workers=0), TfmdDL(items[:4], bs=4, num_workers=0))
    dls.c = 2
    return dls

def test_unet_with_fastais_place():
    given = dict(pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1), normalize=False)
    c = compare_attention(pictures(), small_encoder, arms=['attention'], seeds=1, fit=lambda learn: learn.fit(1, 1e-3), learner_args=given)
    assert c.metric == 'loss' and c.table.loc['attention', 'parameters'] > 0

def test_classifier():
    given = dict(pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(), metrics=accuracy, normalize=False)
    c = compare_attention(pictures(masks=False), small_encoder, max_side=4, where='0.*', arms=['attention'], seeds=1, fit='fine_tune', epochs=1,
                          learner=vision_learner, learner_args=given)
    assert c.metric == 'accuracy' and not c.lower_is_better and set(c.runs.arm) == {'none', 'attention'}

def test_names_for_users(): assert everything.compare_attention is compare_attention and everything.Comparison is Comparison


def own(dls, pretrained=False): return None
def anything(*args, **kwargs): return None

def test_architectures_are_told_from_functions_of_data():
    from torchvision.models import resnet18, swin_t
    from fastai.vision.models.xresnet import xresnet18
    from fastai_selfattn.compare.compare import _is_architecture, _maker
    for arch in (resnet18, swin_t, xresnet18, small_encoder, 'resnet18'): assert _is_architecture(arch), arch
    for func in (own, anything, net, lambda dls: None, partial(unet_learner, arch=resnet18), nn.Linear, 3): assert not _is_architecture(func), func
    with pytest.raises(TypeError, match='`arch` must be an architecture'): _maker(3, unet_learner, None)
    for given in ((vision_learner, None), (unet_learner, dict(metrics=accuracy))):
        with pytest.raises(ValueError, match='leave them out'): _maker(net, *given)
    assert _maker(net, unet_learner, None) is net


def test_what_is_meant_for_the_learner_is_not_said_of_the_layer():
    with pytest.raises(ValueError, match=r'`pretrained` is an argument of `unet_learner`, not of the layer: give `learner_args=dict\(pretrained=...\)`'):
        compare_attention(few, small_encoder, epochs=1, pretrained=False, gamma=1.)

WIDTH = 24

def wide(dls): return Learner(dls, nn.Sequential(nn.Conv1d(5, WIDTH, 1), nn.Conv1d(WIDTH, 1, 1)), loss_func=MSELossFlat(), metrics=mae)

@pytest.mark.parametrize('seeds', [2, 3, [5]], ids=['finished', 'one more', 'another'])
def test_a_global_that_changed_is_seen_whatever_is_left_to_train(monkeypatch, tmp_path, seeds):
    fname = tmp_path/'g.json'
    args = few, wide
    compare_attention(*args, **settings | dict(arms=['attention']), seeds=2, path=fname)
    held = fname.read_bytes()
    assert len(compare_attention(*args, **settings | dict(arms=['attention']), seeds=2, path=fname).records) == 4
    monkeypatch.setitem(globals(), 'WIDTH', 32)
    with pytest.raises(ValueError, match='the start weights of .* give another `path`'):
        compare_attention(*args, **settings | dict(arms=['attention']), seeds=seeds, path=fname)
    assert fname.read_bytes() == held

@pytest.mark.parametrize('wrong,error,says', [(dict(lr=0), ValueError, '`lr` must be a number, more than 0'), (dict(lr=-1), ValueError, '`lr` must be a number, more than 0'),
    (dict(lr='a'), TypeError, '`lr` must be a number'), (dict(lr=slice(0, 1e-3)), ValueError, '`lr` must be a number, more than 0'),
    (dict(lr=slice('a')), TypeError, '`lr` must be a number'), (dict(lower_is_better='x'), TypeError, '`lower_is_better` must be True, False or None')], ids=str)
def test_numbers_that_cannot_be_are_refused_before_training(wrong, error, says):
    with pytest.raises(error, match=says): compare_attention(few, net, **settings | wrong, seeds=1)

def test_plot_takes_axes():
    c = compare_attention(few, net, **settings | dict(arms=['attention']), seeds=1)
    with pytest.raises(TypeError, match='`ax` must be an `Axes`'): c.plot('x')

def test_learning_rates_may_be_a_slice(tmp_path):
    args = settings | dict(arms=['attention'], lr=slice(1e-4, 1e-2), fit='fit_one_cycle', path=tmp_path/'r.json')
    assert compare_attention(few, net, **args, seeds=1).metric
    with pytest.raises(ValueError, match='another setting: training was'): compare_attention(few, net, **args | dict(lr=slice(1e-5, 1e-2)), seeds=1)
