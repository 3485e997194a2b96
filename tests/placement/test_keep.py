"Attention in a file of its own, into the same model again; training nothing but attention"
import copy, pickle, warnings
import pytest, timm, torch
from conftest import named
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.layers import NormType
from fastai.learner import Learner
from fastai.optimizer import ranger
from fastai.vision.gan import GANLearner, basic_critic, basic_generator
from fastai.vision.models.unet import DynamicUnet
from safetensors import safe_open
from torch import nn

from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.keep import load_attention, save_attention
from fastai_selfattn.placement.optim import inserted_layers
from fastai_selfattn.placement.only import OnlyAttention, train_all, train_attention_only
import fastai_selfattn.learner  # noqa: F401

X = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(3))

class Net(nn.Module):
    def __init__(self, c=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.mid = nn.Conv2d(24, 24, 3, padding=1)
        self.out = nn.Conv2d(24, c, 3, 2, 1)
        self.head = nn.Linear(c, 2)
    def forward(self, x): return self.head(self.out(self.mid(self.stem(x))).mean((2, 3)))

def net(seed=1, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs)

def learner(path='.', model=None, **kwargs):
    data = [(torch.randn(3, 12, 20), i % 2) for i in range(8)]
    dls = DataLoaders(*(DataLoader(data, bs=4, num_workers=0) for _ in range(2)))
    return Learner(dls, model or net(), loss_func=nn.CrossEntropyLoss(), path=path, **kwargs)

def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2)

WAYS = [dict(where=['stem', 'out'], reduction=2, heads=2), dict(where='mid', how='replace', gamma=.4), dict(where='mid', norm_type=None, unit=True, learn_scale=True, scale=2.),
        dict(where='stem.1', layer=PooledSelfAttention2d, norm_type=NormType.Weight), dict(where='out', layer=PaperSelfAttention, softmax=False), dict(where='stem', layer=SimpleSelfAttention, sym=True)]

@pytest.mark.parametrize('way', WAYS, ids=str)
@pytest.mark.parametrize('with_learner', [True, False])
def test_into_the_same_model_again(tmp_path, way, with_learner):
    learn = learner()
    paths = insert_attention(learn, size=(12, 20), **way)
    for m in inserted_layers(learn.model).values(): nn.init.constant_(m.gamma, .3)
    fit(learn)
    around = {k: t.clone() for k, t in learn.model.state_dict().items() if not any(k.startswith(f'{p}.') for p in paths)}
    fname = save_attention(learn if with_learner else learn.model, tmp_path/'a')
    assert fname == tmp_path/'a.safetensors' and [f.name for f in tmp_path.iterdir()] == ['a.safetensors']
    with safe_open(fname, 'pt') as f: assert sorted(f.keys()) == sorted(k for k in learn.model.state_dict() if any(k.startswith(f'{p}.') for p in paths))
    other = learner(model=net(2))
    other.model.load_state_dict(around, strict=way.get('how') != 'replace')
    if way.get('how') == 'replace': other.model.mid.load_state_dict(inserted_layers(learn.model)['mid'].attention_place.old[0].state_dict())
    if with_learner: other.create_opt()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert load_attention(other if with_learner else other.model, fname) == paths
    for a, b in zip(inserted_layers(learn.model).values(), inserted_layers(other.model).values()):
        assert type(a) is type(b) and repr(a) == repr(b) and a.attention_place.how == b.attention_place.how and a.attention_place.site.path == b.attention_place.site.path
    assert torch.equal(learn.model.eval()(X), other.model.eval()(X))
    if with_learner:                                # and the optimizer trains it
        assert {p for m in inserted_layers(other.model).values() for p in m.parameters()} <= {p for g in other.opt.param_lists for p in g}
        before = [m.gamma.clone() for m in inserted_layers(other.model).values()]
        fit(other)
        assert all(a != m.gamma for a, m in zip(before, inserted_layers(other.model).values()))
    remove_attention(other.model)
    assert list(other.model.state_dict()) == list(net().state_dict())

@pytest.mark.parametrize('where', ['s2', ['s2', 's1', 's2.b1.conv1']], ids=str)
def test_layers_that_a_hook_sends_for_from_further_down(tmp_path, where):
    "timm's RegNet stages go over their children"
    torch.manual_seed(1)
    model = timm.create_model('regnetx_002', num_classes=3)
    other = copy.deepcopy(model)
    paths = insert_attention(model, where, size=64, gamma=.5)
    assert any(p.startswith('s2.b1.attention') for p in paths)
    assert sorted(load_attention(other, save_attention(model, tmp_path/'a'))) == sorted(paths)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert sorted(remove_attention(other)) == sorted(paths)

def body(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()), nn.Conv2d(16, 16, 3, 1, 1))

@pytest.mark.parametrize('how,where', [('append', ['1', '2']), ('replace', '2')])
def test_a_model_built_around_a_body_with_attention(tmp_path, how, where):
    def wrapped(insert):
        torch.manual_seed(2)
        inside = body()
        if insert: insert_attention(inside, where, how, size=32, gamma=.5)
        torch.manual_seed(3)
        return DynamicUnet(inside, 2, (32, 32)).eval()
    model, x = wrapped(True), torch.randn(1, 3, 32, 32)
    paths = list(inserted_layers(model))
    fname = save_attention(model, tmp_path/'a')
    for other in (wrapped(False), wrapped(True)):
        assert load_attention(other, fname) == paths
        assert torch.equal(other(x), model(x)) and remove_attention(other, paths) == paths
    host = paths[0] if how == 'replace' else paths[0].rpartition('.')[0]
    for name in (host, paths[0], [where[0] if how == 'append' else where]):     # by its module today, itself, or the name that it was given
        assert remove_attention(wrapped(True), name) == paths[:1]

class Derived(SelfAttention): pass

class Warmer(SelfAttention):
    "Keeps an option by another name"
    def __init__(self, n_channels, warmth=1.):
        super().__init__(n_channels)
        self._warmth = warmth
    def forward(self, x): return super().forward(x*self._warmth)/self._warmth

class Droops(SelfAttention):
    "Takes options on to a part, and knows one size of map"
    def __init__(self, n_channels, **options):
        super().__init__(n_channels)
        self.bend, self.cells = nn.LeakyReLU(**options), nn.Parameter(torch.ones(6, 10))
    def forward(self, x): return super().forward(self.bend(x-.5)*self.cells)

@pytest.mark.parametrize('layer,kept,lost', [(Warmer, {}, dict(warmth=3.)), (Droops, {}, dict(negative_slope=.5))], ids=['warmer', 'droops'])
def test_options_that_a_layer_does_not_tell_are_not_lost(layer, kept, lost, tmp_path):
    model, other = net(), net()
    insert_attention(model, 'stem', layer=layer, size=(12, 20), **lost)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f'{layer.__name__} at stem.3 computes something else .*attribute of the same name'): save_attention(model, tmp_path/'a.st')
    assert not list(tmp_path.iterdir()) and torch.get_rng_state().equal(state) and inserted_layers(model)['stem.3'].gamma == 0
    remove_attention(model)
    insert_attention(model, 'stem', layer=layer, size=(12, 20), **kept)
    with torch.no_grad(): inserted_layers(model)['stem.3'].gamma.fill_(.7)
    load_attention(other, save_attention(model, tmp_path/'a.st'))
    assert torch.equal(model.eval()(X), other.eval()(X))

def test_into_a_model_that_has_the_layers_only_numbers_are_loaded(tmp_path):
    model = net()
    insert_attention(model, ['stem', 'out'], size=(12, 20))
    fname = save_attention(model, tmp_path/'a.st')
    layers, want = inserted_layers(model), model.stem[3].query[0].weight_orig.clone()
    with torch.no_grad(): model.stem[3].query[0].weight_orig.zero_()
    assert load_attention(model, fname) == list(layers) and inserted_layers(model) == layers and torch.equal(model.stem[3].query[0].weight_orig, want)
    remove_attention(model, 'out')
    with pytest.raises(ValueError, match='has other attention inserted, at stem.3; .* it at stem.3, out.*take it out first'): load_attention(model, fname)

@pytest.mark.parametrize('args', [dict(scale=10.), dict(softmax=False), dict(pool=2), dict(heads=3), dict(unit=True), dict(layer=Derived)], ids=str)
def test_layers_of_other_options_are_other_layers(args, tmp_path):
    a, b = net(), net()
    insert_attention(a, 'stem', size=(12, 20), **args), insert_attention(b, 'stem', size=(12, 20))
    fname, before = save_attention(a, tmp_path/'a.st'), {k: v.clone() for k, v in b.state_dict().items()}
    with pytest.raises(ValueError, match='has other attention inserted'): load_attention(b, fname)
    assert all(v.equal(before[k]) for k, v in b.state_dict().items())

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_in_the_precision_and_mode_of_the_model(tmp_path, dtype):
    model = net()
    insert_attention(model, 'mid', size=(12, 20))
    fname = save_attention(model, tmp_path/'a')
    other = net().to(dtype).eval()
    with pytest.warns(UserWarning, match='weights around the attention are not those'): load_attention(other, fname)
    assert {p.dtype for p in other.parameters()} == {dtype} and not any(m.training for m in other.modules())

def state(model): return [(k, id(t), t.clone()) for k, t in model.state_dict(keep_vars=True).items()], [(n, id(m), list(m._forward_hooks)) for n, m in model.named_modules()]

def same(a, b): return a[1] == b[1] and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a[0], b[0], strict=True))

@pytest.mark.parametrize('make,says', [(lambda: net(c=20), r'by other names or in other shapes'), (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), 'it has no module mid'), (lambda: nn.Sequential(net()), 'it has no module mid')])
def test_another_model_is_refused_and_stays(tmp_path, make, says):
    model = net()
    insert_attention(model, 'mid', size=(12, 20))
    fname, other = save_attention(model, tmp_path/'a'), make()
    before = state(other)
    with pytest.raises(ValueError, match=f'belongs to another model, a Net with 13 tensors of .*{says}'): load_attention(other, fname)
    assert same(state(other), before)

def test_a_failure_on_the_way_changes_nothing(tmp_path, monkeypatch):
    learn = learner()
    insert_attention(learn, ['stem', 'mid'])
    fname, other = save_attention(learn, tmp_path/'a'), learner()
    other.create_opt()
    before, groups = state(other.model), [list(map(id, g)) for g in other.opt.param_lists]
    monkeypatch.setattr('fastai_selfattn.placement.keep.watch', lambda learn, undo: 1/0)
    with pytest.raises(ZeroDivisionError): load_attention(other, fname)
    assert same(state(other.model), before) and [list(map(id, g)) for g in other.opt.param_lists] == groups

class Mine(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)
    def forward(self, x): return x + self.conv(x)

def test_a_class_that_is_not_known(tmp_path):
    model = net()
    insert_attention(model, 'mid', layer=Mine, size=(12, 20))
    fname = save_attention(model, tmp_path/'a')
    with pytest.raises(ValueError, match='Mine, a class that is not known.*register_attention'): load_attention(net(), fname)
    load_attention(other := net(), fname, layer=Mine)
    assert torch.equal(other.eval()(X), model.eval()(X))

def says_x(c): return 'x'
def a_conv(c): return nn.Conv2d(c, c, 1)

@pytest.mark.parametrize('layer,error,says', [(3, TypeError, '`layer` must be a class of layers.*got 3'), (Mine(24), TypeError, '`layer` must be a class of layers'), (says_x, ValueError, 'says_x made no layer for mid.attention: TypeError: it gave a str'),
                                              (lambda: 0, ValueError, 'made no layer for mid.attention: TypeError'), (a_conv, ValueError, 'for mid.attention is not as the one that was saved')], ids=named)
@pytest.mark.parametrize('is_known', [False, True])
def test_what_makes_no_layer_is_refused(tmp_path, layer, error, says, is_known):
    model = net()
    insert_attention(model, 'mid', size=(12, 20), **{} if is_known else dict(layer=Mine))
    fname, other = save_attention(model, tmp_path/'a'), net()
    before, random = state(other), torch.get_rng_state()
    if is_known and error is ValueError: assert load_attention(other, fname, layer=layer) == ['mid.attention']     # it is not called
    else:
        with pytest.raises(error, match=says): load_attention(other, fname, layer=layer)
        assert same(state(other), before)
    assert torch.equal(torch.get_rng_state(), random)

def test_a_folder_of_the_same_name(tmp_path):
    model = net()
    insert_attention(model, 'mid', size=(12, 20))
    save_attention(model, tmp_path/'a')
    (tmp_path/'a').mkdir()
    assert load_attention(net(), tmp_path/'a') == ['mid.attention']

def test_what_cannot_be_kept_is_named_and_the_file_of_before_stays(tmp_path, monkeypatch):
    model = net()
    with pytest.raises(ValueError, match='no inserted attention in this Net.*learn.save'): save_attention(model, tmp_path/'a')
    insert_attention(model, 'mid', size=(12, 20))
    fname = save_attention(model, tmp_path/'a')
    before = fname.read_bytes()
    model.mid.attention.query = nn.Sequential(nn.Conv1d(24, 7, 1))
    with pytest.raises(ValueError, match='other parameters than one made with its default options'): save_attention(model, fname)
    remove_attention(model)
    insert_attention(model, 'mid', size=(12, 20))
    def full(self, data): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('pathlib.Path.write_bytes', full)
    with pytest.raises(OSError, match='No space'): save_attention(model, fname)
    assert fname.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ['a.safetensors']

def test_other_files_are_named(tmp_path):
    (tmp_path/'a').write_bytes(b'no such thing')
    with pytest.raises(ValueError, match='no safetensors file'): load_attention(net(), tmp_path/'a')
    with pytest.raises(FileNotFoundError): load_attention(net(), tmp_path/'b')

def test_fused_layers_are_kept_fused(tmp_path):
    model = net()
    insert_attention(model, 'mid', size=(12, 20), gamma=.5)
    fuse_attention(model)
    load_attention(other := net(), save_attention(model, tmp_path/'a'))
    assert torch.equal(other.eval()(X), model.eval()(X)) and other.mid.attention.norm_type is None


# learn.load, learn.train_attention_only

def test_learn_load_that_fails_changes_nothing(tmp_path):
    "PyTorch takes over what fits before it says that something does not"
    learn, other = learner(tmp_path), learner(tmp_path, net(2))
    insert_attention(learn, 'stem')
    learn.save('with')
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    assert not torch.equal(before['mid.weight'], learn.model.mid.weight)
    with pytest.raises(RuntimeError, match='this model has not'): other.load('with')
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())

@pytest.mark.parametrize('way', [dict(where=['stem', 'mid']), dict(where='mid', layer=SimpleSelfAttention)], ids=str)
def test_learn_load_says_what_to_do(tmp_path, way):
    learn = learner(tmp_path)
    paths = insert_attention(learn, **way)
    learn.save('with')
    with pytest.raises(RuntimeError, match=rf"with was saved with attention at {', '.join(sorted(paths))}, which this model has not: insert it first.*`load_attention`"): learner(tmp_path).load('with')
    learner(tmp_path).load('with', strict=False, with_opt=False)
    again = learner(tmp_path, net(2))
    insert_attention(again, **way)
    again.load('with')
    assert torch.equal(again.model.eval()(X), learn.model.eval()(X))
    learner(tmp_path).save('before')
    with pytest.raises(RuntimeError, match=rf"before was saved without attention at {', '.join(sorted(paths))}, which this model has: load it into a model without"): again.load('before')
    again.load('before', strict=False, with_opt=False)
    assert torch.equal(again.model.mid.weight, learner(tmp_path).model.mid.weight)
    with pytest.raises(RuntimeError, match='^Error') as e: learner(tmp_path).save('plain'), learner(tmp_path, net(c=20)).load('plain')
    assert 'attention' not in str(e.value)

class Thaws(Callback):
    "As fastai's trainer of GANs does at every switch, and callbacks that unfreeze after some epochs"
    def __init__(self, event): setattr(self, event, self.thaw)
    def thaw(self):
        self.learn.unfreeze()
        self.learn.model.requires_grad_(True).train(self.training)

@pytest.mark.parametrize('event', ['before_epoch', 'before_batch', 'after_pred', 'after_batch', 'before_validate'])
@pytest.mark.parametrize('clip', [False, True])
def test_who_thaws_in_the_middle_trains_no_more(event, clip, tmp_path):
    learn = learner(tmp_path)
    learn.insert_attention(['stem', 'out'], gamma=.5)
    fit(learn)
    learn.train_attention_only()
    inserted = list(inserted_layers(learn.model))
    before = {k: t.clone() for k, t in learn.model.state_dict().items()}
    learn.add_cbs([Thaws(event), *[GradientClip(.1)]*clip])
    fit(learn)
    moved = {k for k, t in learn.model.state_dict().items() if not torch.equal(t, before[k])}
    if event in ('before_batch', 'after_pred'): moved -= {k for k in moved if 'running' in k or 'tracked' in k}     # modes are changed after ours
    assert moved and all(k.startswith(tuple(f'{p}.' for p in inserted)) for k in moved)

def test_only_the_attention_of_a_gan_trains():
    class Noise:
        def __len__(self): return 8
        def __getitem__(self, i): return torch.randn(10), torch.randn(3, 32, 32)
    gan = GANLearner.wgan(DataLoaders.from_dsets(Noise(), Noise(), bs=2, device='cpu', num_workers=0), basic_generator(32, 3, in_sz=10, n_features=16), basic_critic(32, 3, n_features=16), clip=None)
    gan.insert_attention('critic.1', gamma=.5)
    gan.train_attention_only()
    path, = inserted_layers(gan.model)
    before = {k: t.clone() for k, t in gan.model.state_dict().items()}
    with gan.no_bar(), gan.no_logging(): gan.fit(1, 1e-3)
    moved = {k for k, t in gan.model.named_parameters() if not torch.equal(t, before[k])}
    assert moved and all(k.startswith(f'{path}.') for k in moved)

def test_only_attention_trains(tmp_path, capsys):
    learn = learner(tmp_path)
    learn.model.mid.bias.requires_grad_(False)
    fit(learn)
    learn.insert_attention(['stem', 'out'], gamma=.5)
    inserted, flags = list(inserted_layers(learn.model)), {n: p.requires_grad for n, p in learn.model.named_parameters()}
    inside = lambda n: any(n.startswith(f'{p}.') for p in inserted)
    capsys.readouterr()
    learn.train_attention_only()
    n, total = (sum(p.numel() for k, p in learn.model.named_parameters() if which(k)) for which in (inside, lambda k: True))
    assert capsys.readouterr().out == f'Training {n:,} of {total:,} parameters ({n/total:.2%}): attention at stem, out\n' and 0 < n < total
    for act in (lambda: fit(learn), lambda: (learn.unfreeze(), fit(learn)), lambda: (learn.freeze(), fit(learn))):
        before = {k: t.clone() for k, t in learn.model.state_dict().items()}
        act()
        for k, t in learn.model.state_dict().items():
            if not inside(k): assert torch.equal(t, before[k]), k
        assert all(not torch.equal(p, before[k]) for k, p in learn.model.named_parameters() if inside(k) and not k.endswith('gamma') or k.endswith('gamma'))
    learn.train_all()
    assert {n: p.requires_grad for n, p in learn.model.named_parameters()} == flags and not any(isinstance(cb, OnlyAttention) for cb in learn.cbs)
    before = {k: t.clone() for k, t in learn.model.state_dict().items()}
    fit(learn)
    assert not torch.equal(learn.model.stem[0].weight, before['stem.0.weight']) and not torch.equal(learn.model.stem[1].running_mean, before['stem.1.running_mean'])
    with pytest.raises(ValueError, match='nothing to undo'): learn.train_all()

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(24, 24, 1), nn.Parameter(torch.ones(1))
    def forward(self, x): return self.gamma*self.conv(x)

@pytest.mark.parametrize('is_replaced_first', [False, True])
def test_what_was_replaced_meanwhile_does_not_come_back_frozen(is_replaced_first):
    learn = learner()
    learn.model.mid.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in learn.model.named_parameters()}
    learn.insert_attention('stem')
    acts = [learn.train_attention_only, lambda: learn.insert_attention('mid', 'replace')]
    for act in acts[::-1] if is_replaced_first else acts: act()
    learn.train_all()
    learn.remove_attention()
    assert {n: p.requires_grad for n, p in learn.model.named_parameters()} == flags and not flags['mid.bias']

@pytest.mark.parametrize('acts', [('only', 'remove', 'all'), ('only', 'all', 'remove'), ('remove', 'only', 'all')], ids='-'.join)
@pytest.mark.parametrize('copied', [lambda l: l, copy.deepcopy, lambda l: pickle.loads(pickle.dumps(l))], ids=['same', 'copy', 'pickle'])
def test_what_was_frozen_and_replaced_stays_frozen(acts, copied):
    "`Scaled` has a `gamma` too, at the name that attention's has while it stands there"
    learn = learner()
    learn.model.mid = Scaled().requires_grad_(False)
    flags = {n: p.requires_grad for n, p in learn.model.named_parameters()}
    learn.insert_attention('stem')
    learn.insert_attention('mid', 'replace')
    for act in acts:
        dict(only=learn.train_attention_only, remove=lambda: learn.remove_attention('mid'), all=learn.train_all)[act]()
        if act == 'only': learn = copied(learn)
    now = {n: p.requires_grad for n, p in learn.model.named_parameters() if not n.startswith('stem.3')}
    assert now == flags and not flags['mid.gamma']

def test_when_the_attention_that_trained_alone_is_gone_predictions_go_on_and_training_says_what_to_do():
    learn = learner()
    learn.insert_attention(['stem', 'out'])
    learn.train_attention_only('stem')
    fit(learn)
    learn.remove_attention('stem')
    with learn.no_bar():
        learn.get_preds(), learn.validate()
        with pytest.raises(ValueError, match=r'stem.3 was to be trained.*`learn.train_all\(\)`'): fit(learn)
        learn.get_preds()
    learn.train_all()
    before = learn.model.head.weight.clone()
    fit(learn)
    assert not torch.equal(learn.model.head.weight, before)

@pytest.mark.parametrize('again', [False, True])
def test_all_trains_again_in_an_optimizer_that_was_made_while_only_attention_trained(again):
    learn = learner()
    learn.model.mid.bias.requires_grad_(False)
    learn.insert_attention(['stem', 'out'])
    learn.train_attention_only('stem' if again else None)
    fit(learn)
    if again: learn.train_attention_only('out'), fit(learn)
    learn.train_all()
    before = {n: p.clone() for n, p in learn.model.named_parameters()}
    fit(learn)
    assert [n for n, p in learn.model.named_parameters() if torch.equal(p, before[n])] == ['mid.bias']

@pytest.mark.parametrize('compiled', ['in place', 'around'])
def test_a_compiled_model_sees_what_was_loaded(tmp_path, compiled):
    model = net().eval()
    other = copy.deepcopy(model)
    insert_attention(other, 'mid', gamma=1., size=(12, 20))
    save_attention(other, tmp_path/'a')
    if compiled == 'in place': model.compile(backend='eager')
    runs = model if compiled == 'in place' else torch.compile(model, backend='eager')
    with torch.no_grad():
        before = runs(X)
        load_attention(runs, tmp_path/'a')
        assert not torch.allclose(runs(X), before) and torch.allclose(runs(X), other.eval()(X), atol=1e-5)

def test_only_attention_trains_with_ranger():
    "Whose slow weights, which all weights are drawn to every sixth step, are those of before"
    learn = learner(opt_func=ranger)
    insert_attention(learn, 'stem')
    fit(learn, 2)                          # four steps
    learn.train_attention_only()
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    fit(learn, 2)
    assert {k for k, v in learn.model.named_parameters() if not torch.equal(v, before[k])} == {k for k in before if k.startswith('stem.3.')}

def test_only_some_attention_trains_and_the_file_holds_all_of_it(tmp_path):
    learn, plain = learner(tmp_path), copy.deepcopy(net())
    learn.insert_attention(['stem', 'out'], gamma=.5)
    learn.train_attention_only('stem'), learn.train_attention_only('out')          # the second call is in the place of the first
    fit(learn, 2)
    load_attention(plain, save_attention(learn, tmp_path/'a'))
    assert torch.equal(plain.eval()(X), learn.model.eval()(X))
    assert [p.requires_grad for p in inserted_layers(learn.model)['stem.3'].parameters()] == [False]*4
    with pytest.raises(ValueError, match='no attention layer'): learner().train_attention_only()
    model = net()
    learn = learner(model=model)
    learn.create_opt()
    insert_attention(model, 'mid', size=(12, 20))
    with pytest.raises(ValueError, match='the optimizer does not know all'): learn.train_attention_only()
    assert not any(isinstance(cb, OnlyAttention) for cb in learn.cbs)


@pytest.mark.parametrize('where,how', [('features.3', 'append'), ('features.3.0.norm1', 'replace')])
def test_channels_last(tmp_path, where, how):
    from torchvision.models.swin_transformer import SwinTransformer
    def swin():
        torch.manual_seed(1)
        return SwinTransformer([4, 4], 24, [1, 2], [2, 3], [3, 3], num_classes=5).eval()
    model, x = swin(), torch.randn(2, 3, 48, 80)
    paths = insert_attention(model, where, how, size=x)
    for layer in inserted_layers(model).values(): nn.init.constant_(layer.gamma, .7)
    save_attention(model, tmp_path/'a')
    again = swin()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_attention(again, tmp_path/'a.safetensors') == paths
    with torch.no_grad():
        want = model(x)
        assert again(x).equal(want) and not swin()(x).allclose(want)
    remove_attention(again)
    with torch.no_grad(): assert again(x).equal(swin()(x))

@pytest.mark.parametrize('layers', [None, 'stem'], ids=str)
def test_attention_that_is_inserted_meanwhile_trains_where_all_was_meant(layers):
    learn = learner()
    learn.insert_attention('stem', gamma=.5)
    learn.train_attention_only(layers)
    fit(learn)
    path, = learn.insert_attention('out', gamma=.5)
    new, conv = inserted_layers(learn.model)[path], learn.model.stem[0].weight.clone()
    fit(learn)
    assert (new.gamma.item() != .5) == (layers is None) and torch.equal(learn.model.stem[0].weight, conv)
    learn.train_all()
    fit(learn)
    assert new.gamma.item() != .5 and not torch.equal(learn.model.stem[0].weight, conv)

@pytest.mark.parametrize('act', [train_attention_only, train_all])
def test_only_a_learner_trains(act):
    model = net()
    insert_attention(model, 'mid', size=(12, 20))
    with pytest.raises(TypeError, match='`learn` must be a Learner, got Net'): act(model)
