"Parameters come and go in a Learner: groups, states, freezing, saving and loading in any order, distributed training"
import inspect
import re
from functools import partial

import fastai.layers
import pytest
import torch
from conftest import named, train_in_processes
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai.torch_core import params, set_seed
import fastai.callback.all  # noqa: F401  patches `Learner`
from torch import nn

from fastai_selfattn import learner  # noqa: F401  patches `Learner`
from fastai.distributed import DistributedTrainer
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.optim import AttentionHooks, AttentionSplitter, inserted_layers
from fastai_selfattn.attention.layers import PooledSelfAttention2d
from fastai_selfattn.placement.sites import attention_sites


from test_insert import data, fit, gammas, ids, flat, learn_state, make, net, own, predict, same, split, tree, use, values

@pytest.mark.parametrize('existing', [True, False])
def test_attention_trains_in_the_frozen_body(existing):
    "`1` lies in the first group, `3` in the second; the third is the head"
    learn = make(splitter=split)
    if existing: learn.freeze(), fit(learn)
    learn.insert_attention(['1', '3'])
    if not existing: learn.freeze()
    assert len(learn.opt.param_lists) == 3 and learn.opt.frozen_idx == 2 and ids(own(learn)) <= ids(learn.opt.param_lists[-1]) and all(p.requires_grad for p in own(learn))
    weights = {k: v.clone() for k, v in learn.model.named_parameters()}
    fit(learn, 2)
    moved = {k for k, v in learn.model.named_parameters() if not torch.equal(v, weights[k])}
    assert all(gammas(learn)) and {'6.weight', '1.3.gamma', '3.2.gamma', '1.3.value.0.weight_orig'} <= moved
    assert not moved & {'0.weight', '1.0.weight', '2.weight', '3.0.weight'}


def test_freeze_unfreeze_freeze_to():
    learn = make(splitter=split)
    learn.insert_attention(['1', '3'])
    def trained(): return {k for k, p in learn.model.named_parameters() if p.requires_grad and not k.startswith(('1.1.', '1.3', '3.2'))}
    for act, want in ((learn.freeze, {'6.weight', '6.bias'}), (learn.unfreeze, {f'{k}.{w}' for k in ('0', '1.0', '2', '3.0', '6') for w in ('weight', 'bias')}),
                      (lambda: learn.freeze_to(1), {f'{k}.{w}' for k in ('2', '3.0', '6') for w in ('weight', 'bias')}), (lambda: learn.freeze_to(-2), {f'{k}.{w}' for k in ('2', '3.0', '6') for w in ('weight', 'bias')})):
        act()
        assert trained() == want and all(p.requires_grad for p in own(learn))


@pytest.mark.parametrize('lr,want', [(slice(1e-4, 1e-2), [1e-4, 1e-3, 1e-2]), (slice(1e-2), [1e-3, 1e-3, 1e-2]), ([1e-4, 2e-4, 3e-4], [1e-4, 2e-4, 3e-4])], ids=named)
def test_learning_rates_of_groups(lr, want):
    learn = make(splitter=split)
    learn.insert_attention('1')
    fit(learn, 1, lr)
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx(want) and ids(own(learn)) <= ids(learn.opt.param_lists[2])


def test_fine_tune():
    learn = make(splitter=split)
    learn.insert_attention('1')
    seen = []
    class Look(Callback):
        def before_fit(self): seen.append((self.opt.frozen_idx, self.opt.hypers[-1]['lr'], all(p.requires_grad for p in own(learn))))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-2, cbs=Look())
    assert [(f, a) for f, _, a in seen] == [(2, True), (0, True)] and gammas(learn)[0]


@pytest.mark.parametrize('opt_func', [Adam, partial(SGD, mom=.9), ranger, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['adam', 'sgd', 'ranger', 'wrapped'])
@pytest.mark.parametrize('splitter', [split, None], ids=['groups', 'one group'])
def test_an_optimizer_goes_on(opt_func, splitter):
    "It keeps what it knows of the old parameters, and takes the same steps on them as it would have"
    learn, plain = (fit(make(opt_func, splitter), 2) for _ in range(2))
    opt = learn.opt
    before = {id(p): {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for p, s in getattr(opt, 'opt', opt).state.items() if s}
    assert before
    learn.insert_attention(['1', '3'])
    assert learn.opt is opt and {id(p): {k: v for k, v in s.items()} for p, s in getattr(opt, 'opt', opt).state.items() if id(p) in before and s}.keys() == before.keys()
    for p, s in getattr(opt, 'opt', opt).state.items():
        for k, v in before.get(id(p), {}).items(): assert torch.equal(s[k], v) if isinstance(v, torch.Tensor) else s[k] == v
    assert sum(map(len, opt.param_lists)) == len(list(learn.model.parameters()))
    for m in inserted_layers(learn.model).values(): m.gamma.requires_grad_(False)          # then attention stays out, and the rest must go as without it
    for l in (learn, plain):
        set_seed(12)
        l.dls.train.rng.seed(1)
        fit(l, 2)
    for k, v in plain.model.named_parameters(): assert torch.equal(v, learn.model.get_parameter(k)), k
    for m in inserted_layers(learn.model).values(): m.gamma.requires_grad_(True)
    fit(learn, 2)
    assert all(gammas(learn))
    learn.remove_attention()
    assert [len(g) for g in learn.opt.param_lists] == [len(g) for g in plain.opt.param_lists] and [[k for k, p in learn.model.named_parameters() if id(p) == id(q)] for g in learn.opt.param_lists for q in g] == [[k for k, p in plain.model.named_parameters() if id(p) == id(q)] for g in plain.opt.param_lists for q in g]
    fit(learn)


@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['adam', 'ranger', 'wrapped'])
def test_an_optimizer_forgets_what_is_gone(opt_func):
    "A conv in the middle of a group goes, and comes back; ranger keeps a second list of weights, in the order of the first"
    learn = fit(make(opt_func, split), 2)
    def slow(): return {id(p): w for g, h in zip(learn.opt.param_lists, learn.opt.slow_weights) for p, w in zip(g, h, strict=True)} if opt_func is ranger else {}
    before, kept = slow(), ids(learn.model[3].parameters())
    learn.insert_attention('2', 'replace')                     # the conv of `3` comes after it in the second group
    assert all(slow()[i] is w for i, w in before.items() if i in kept)
    fit(learn, 2)
    learn.remove_attention()
    assert ids(getattr(learn.opt, 'opt', learn.opt).state) <= ids(learn.model.parameters()) and len(slow()) in (0, len(before))
    fit(learn, 2)


def test_a_built_optimizer_as_opt_func():
    model = net()
    learn = Learner(data(), model, loss_func=nn.CrossEntropyLoss(), opt_func=OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=.1)))
    learn.insert_attention('1')
    fit(learn, 2)
    assert gammas(learn)[0] and ids(own(learn)) <= ids(learn.opt.param_lists[-1])


def test_a_custom_splitter_and_frozen_weights():
    "The splitter leaves out what is frozen by hand; that must stay in the optimizer"
    learn = fit(make(splitter=lambda m: [[p for p in params(m[:2]) if p.requires_grad], params(m[2:])]))
    learn.model[0].weight.requires_grad_(False)
    learn.insert_attention('1')
    assert id(learn.model[0].weight) in ids(learn.opt.param_lists[0]) and ids(own(learn)) <= ids(learn.opt.param_lists[1]) and not learn.model[0].weight.requires_grad


def test_save_and_load_in_either_order(tmp_path):
    "Optimizer first, then attention, in two steps; or attention first"
    one = make(splitter=split, path=tmp_path)
    fit(one)
    one.insert_attention('3'), one.insert_attention('1')
    fit(one, 2)
    one.save('x')
    other = make(splitter=split, path=tmp_path)
    other.insert_attention(['1', '3'])
    other.load('x')
    assert same(values(one.model), values(other.model))
    names = {id(p): k for l in (one, other) for k, p in l.model.named_parameters()}
    a, b = ([{names[id(p)]: l.opt.state[p] for p in g} for g in l.opt.param_lists] for l in (one, other))
    for g, h in zip(a, b):
        assert list(g) == list(h)
        for k in g: assert g[k].keys() == h[k].keys() and all(torch.equal(v, h[k][s]) if isinstance(v, torch.Tensor) else v == h[k][s] for s, v in g[k].items()), k
    with pytest.raises(RuntimeError, match='1.3.gamma'): make(splitter=split, path=tmp_path).load('x')


def test_export_and_load_learner(tmp_path):
    learn = make(splitter=split, path=tmp_path)
    learn.insert_attention(['1', '3']), learn.insert_attention('2', 'replace')
    fit(learn, 2)
    learn.export('e.pkl')
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path / 'e.pkl')
    x = torch.randn(3, 3, 12, 14)
    assert torch.equal(predict(loaded.model, x), predict(learn.model, x)) and isinstance(loaded.splitter, AttentionSplitter)
    assert len(loaded.remove_attention()) == 3 and list(loaded.model.state_dict()) == list(net().state_dict()) and loaded.splitter is split
    assert torch.equal(loaded.model[2].weight, net()[2].weight)
    fit(learn)                                                                               # exporting leaves a Learner that trains


def test_lr_find_summary_and_gamma_logger(capsys):
    learn = make(splitter=split, cbs=GammaLogger())
    learn.insert_attention(['1', '3'])
    state = values(learn.model)
    with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items() if not k.endswith(('_u', '_v', 'num_batches_tracked'))) and not any(gammas(learn))
    with learn.no_bar(): summary = str(learn.summary())
    assert sum(p.numel() for n, p in learn.model.named_parameters() if 'gamma' not in n) == int(re.search(r'Total params: ([\d,]+)', summary)[1].replace(',', '')) and 'AttentionHooks' in summary     # fastai counts what lies in leaves
    fit(learn)
    assert list(learn.gamma_logger.history.columns[2:4]) == ['gamma_1.3', 'gamma_3.2'] and (learn.gamma_logger.history.iloc[-1, 2:4] == gammas(learn)).all()


@pytest.mark.parametrize('to', [lambda l: l.to_fp16(), lambda l: l.add_cb(MixedPrecision(amp_mode='bf16')), lambda l: l.to_channelslast(use_amp=False)], ids=['fp16', 'bf16', 'channels last'])
@pytest.mark.parametrize('first', [True, False])
def test_precision_and_memory_format_of_training(to, first):
    learn = make(splitter=split)
    if first: to(learn)
    learn.insert_attention('1', layer=PooledSelfAttention2d), learn.insert_attention('3')
    if not first: to(learn)
    fit(learn, 2)
    assert all(gammas(learn))
    if hasattr(learn, 'channels_last'): assert learn.model.get_submodule('1.3').value[0].weight_orig.stride()[-1] > 1


def zero(pred, y): return 0 * pred.sum()

@pytest.mark.parametrize('decays', [False, True])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_gamma_decays_as_weights_do(decays, when):
    "As with `self_attention=True`, which is fastai's training. The loss has no gradient, so only weight decay moves a weight"
    learn = make(SGD, split, wd_bn_bias=decays)
    learn.loss_func = zero
    if when == 'after': fit(learn)
    learn.insert_attention('1')
    use(learn.model)
    bias, weight = learn.model[6].bias.detach().clone(), learn.model.get_parameter('1.3.value.0.weight_orig').detach().clone()
    fit(learn, 1, .1, wd=.5)
    assert gammas(learn)[0] == pytest.approx(.5 * .95**4) and torch.allclose(learn.model.get_parameter('1.3.value.0.weight_orig'), weight * .95**4)
    assert torch.equal(learn.model[6].bias, bias) == (not decays)


def test_a_new_layers_norms_are_treated_as_fastai_treats_norms():
    learn = make(splitter=split)
    learn.freeze(), fit(learn)
    learn.insert_attention('1', layer=lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)))
    norm = learn.model.get_submodule('1.3')[1]
    assert learn.opt.state[norm.weight]['do_wd'] is False and learn.opt.state[norm.weight]['force_train'] is True


def test_removing_gives_back_the_learner():
    learn = make(splitter=split)
    learn.freeze(), fit(learn)
    before, known = tree(learn.model), flat(learn_state(learn))
    for how in ('append', 'replace'):
        learn.insert_attention(['1', '3'], how)
        learn.remove_attention('3')
        assert isinstance(learn.splitter, AttentionSplitter) and any(isinstance(cb, AttentionHooks) for cb in learn.cbs)
        learn.remove_attention()
        assert tree(learn.model) == before and learn.splitter is split and not any(isinstance(cb, AttentionHooks) for cb in learn.cbs) and not hasattr(learn, 'attention_hooks')
        assert [[id(p) for p in g] for g in learn.opt.param_lists] == [[id(p) for p in g] for g in split(learn.model)] and ids(learn.opt.state) == ids(learn.model.parameters())
        if how == 'append': assert flat(learn_state(learn)) == known
    fit(learn)


@pytest.mark.parametrize('frozen', [True, False])
def test_a_conv_that_comes_back_is_frozen_as_its_group(frozen):
    learn = make(splitter=split)
    learn.unfreeze()
    learn.insert_attention('1', 'replace')
    if frozen: learn.freeze()
    learn.remove_attention()
    assert learn.model[1][0].weight.requires_grad == (not frozen) and learn.model[1][1].weight.requires_grad      # norms of a frozen body train
    assert id(learn.model[1][0].weight) in ids(learn.opt.param_lists[0]) and learn.opt.state[learn.model[1][1].weight] == dict(do_wd=False, force_train=True)


def test_a_model_insertion_before_the_learner_trains_too():
    model = net()
    insert_attention(model, ['1', '3'], size=(12, 14))
    learn = fit(Learner(data(), model, loss_func=nn.CrossEntropyLoss()), 2)
    assert all(gammas(learn))


def test_the_learners_own_data_say_the_size():
    learn = make()
    learn.insert_attention('1')
    assert inserted_layers(learn.model)['1.3'].attention_place.site.map == (6, 7) and learn.attention_sites().title == 'Places for attention in Sequential, image 3x12x14 (one image of the data)'
    learn.remove_attention()
    learn.insert_attention('1', size=(20, 22))
    assert inserted_layers(learn.model)['1.3'].attention_place.site.map == (10, 11)


def test_methods_of_a_learner_are_the_functions():
    for name, f in dict(attention_sites=attention_sites, insert_attention=insert_attention, remove_attention=remove_attention).items():
        ours, theirs = (list(inspect.signature(g).parameters.values())[1:] for g in (getattr(Learner, name), f))
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_the_same_training_with_and_without_a_look():
    a, b = make(), make()
    for _ in range(2): b.attention_sites()
    for l in (a, b): fit(l, 2)
    assert same(values(a.model), values(b.model))


def test_synchronised_norms_keep_their_attention():
    "Distributed training exchanges norm layers for others, without their hooks"
    learn = make()
    learn.insert_attention('1.1')
    use(learn.model)
    x = torch.randn(2, 3, 12, 14)
    y = predict(learn.model, x)
    learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    assert not torch.equal(predict(learn.model, x), y)
    learn('before_fit')
    assert torch.equal(predict(learn.model, x), y)
    learn('before_fit'), learn.remove_attention()
    assert not any(m._forward_hooks for m in learn.model.modules())


DISTRIBUTED = '''
import os, torch
from test_optim import *
learn = make(splitter=split)
learn.insert_attention(['1','3'])
with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, 2)
learn.save(f"rank{os.environ['RANK']}") if os.environ['RANK'] == '0' else torch.save(learn.model.state_dict(), learn.path/'rank1.pth')
'''

def test_distributed_training(tmp_path):
    train_in_processes(tmp_path, DISTRIBUTED, beside=__file__)
    one, two = (torch.load(tmp_path / f, weights_only=False) for f in ('models/rank0.pth', 'rank1.pth'))
    one = one['model']
    assert one['1.3.gamma'].item() and one['3.2.gamma'].item() and all(torch.equal(one[k], two[k]) for k in one if 'running' not in k and 'num_batches' not in k)


# --- after a file was loaded

STEPS = {'save and load': lambda l: (l.save('a'), l.load('a')), 'export': lambda l: l.export(l.path / 'e.pkl'), 'fit': fit, 'freeze': lambda l: l.freeze(), 'unfreeze': lambda l: l.unfreeze(),
         'insert': lambda l: l.insert_attention('3') if '3.2' not in inserted_layers(l.model) else None, 'replace': lambda l: l.insert_attention('2', 'replace') if '2' not in inserted_layers(l.model) else None,
         'remove': lambda l: l.remove_attention() if inserted_layers(l.model) else None}

FIRST = ['save and load', 'export', 'insert', 'replace']
OPTIMIZERS = dict(adam=Adam, sgd=partial(SGD, mom=.9), ranger=ranger, wrapped=partial(OptimWrapper, opt=torch.optim.AdamW))

# each optimizer with each first and with each second step, and each first with each second
@pytest.mark.parametrize('first,second,optimizer', [(first, second, list(OPTIMIZERS)[(i + j)%4]) for i, first in enumerate(FIRST) for j, second in enumerate(STEPS)])
def test_any_order(first, second, optimizer, tmp_path):
    "fastai leaves a plain dict for the optimizer's state when it loads one, and a new parameter was a KeyError there"
    learn = fit(make(OPTIMIZERS[optimizer], split, path=tmp_path))
    for name in (first, second, 'insert', 'fit', 'save and load', 'remove', 'fit', 'replace', 'freeze', 'fit', 'export', 'remove', 'unfreeze', 'fit', 'save and load', 'fit'):
        STEPS[name](learn)
        assert ids(p for g in learn.opt.param_lists for p in g) == ids(learn.model.parameters()), name
    assert list(learn.model.state_dict()) == list(net().state_dict())


class Exchange(Callback):
    "What `DistributedTrainer` with `sync_bn` does to norm layers, when it does it"
    order = DistributedTrainer.order
    def before_fit(self): self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)

def test_training_with_exchanged_norms():
    "`1.1` is a norm layer, which is exchanged and loses its hook; gamma must move"
    learn = make(splitter=split, cbs=Exchange())
    path, = learn.insert_attention('1.1')
    fit(learn, 2)
    assert type(learn.model[1][1]) is nn.SyncBatchNorm and path == '1.1.attention' and gammas(learn)[0]
    x = torch.randn(2, 3, 12, 14)
    y = predict(learn.model, x)
    nn.init.zeros_(learn.model[1][1].attention.gamma)
    assert not torch.equal(predict(learn.model, x), y)


def test_gamma_trains_alike_with_fastais_flag():
    "A layer that came with the model, and one that was inserted: the same groups but for their order, the same flags"
    learn = make(splitter=split)
    learn.insert_attention('1')
    fit(learn)
    assert learn.opt.state[own(learn)[0]].get('do_wd', True) and learn.opt.state[learn.model[1][1].weight]['do_wd'] is False


def test_a_module_that_comes_back_brings_no_old_gradient():
    "fastai steps wherever there is a gradient, be it of zeros, also in a frozen group; and the next backward pass would add to it"
    learn = make(splitter=split)
    fit(learn)
    conv = learn.model[2]
    assert conv.weight.grad is not None
    learn.insert_attention('2', 'replace', size=(12, 14))
    for p in learn.model.parameters(): p.grad = None
    learn.freeze()
    learn.remove_attention('2')
    assert learn.model[2] is conv and conv.weight.grad is None and not conv.weight.requires_grad
    before = conv.weight.clone()
    fit(learn)
    assert torch.equal(conv.weight, before)
