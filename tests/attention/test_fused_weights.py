"A fused model saves, loads and takes the weights of before fusing"
import copy
import pytest, torch
from conftest import named
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.layers import NormType
from fastai.learner import Learner
from torch import nn
from torch.nn.utils import parametrize, prune

from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention

norms = [NormType.Spectral, NormType.Weight]

def net(norm_type=NormType.Spectral, seed=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 24, 3), SelfAttention(24, gamma=.7, norm_type=norm_type), nn.Sequential(PooledSelfAttention2d(24, gamma=-.5, norm_type=norm_type)),
                         PaperSelfAttention(24, gamma=.9, norm_type=norm_type), nn.BatchNorm2d(24), SimpleSelfAttention(24, sym=True, gamma=.01, norm_type=norm_type),
                         SimpleSelfAttention(24, ks=3, gamma=.01, norm_type=norm_type))

def step(model, x, n=3):
    "Train, so that the singular vectors have moved and are not quite settled"
    opt = torch.optim.SGD(model.train().parameters(), 1e-6)
    for _ in range(n):
        model(x).square().mean().backward()
        opt.step(), opt.zero_grad()
    return model.eval()

@pytest.mark.parametrize('norm_type', norms, ids=named)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=named)
def test_weights_of_before_are_fused(norm_type, dtype):
    x = torch.randn(2, 3, 9, 11, dtype=dtype)
    trained, model = step(net(norm_type, 6).to(dtype), x), fuse_attention(net(norm_type).to(dtype)).eval()
    given = trained.state_dict()
    before = {k: t.clone() for k,t in given.items()}
    for assign in (False, True):
        model.load_state_dict(given, assign=assign)
        torch.testing.assert_close(model(x), trained(x), rtol=1e-5, atol=1e-6)
        assert list(model.state_dict()) == list(net(None).state_dict())
        assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
    assert given.keys() == before.keys() and all(torch.equal(given[k], before[k]) for k in given)     # what was given is as it was
    torch.testing.assert_close(model[1].value[0].weight, fuse_attention(copy.deepcopy(trained))[1].value[0].weight, rtol=1e-6, atol=1e-7)

@pytest.mark.parametrize('norm_type', norms, ids=named)
def test_fused_weights_into_a_model_that_is_not(norm_type):
    model, fused = net(norm_type), fuse_attention(net(norm_type, 6))
    before = {k: t.clone() for k,t in model[1].query.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"1\.query\.0 is fused in what is loaded and not here: call `fuse_attention\(model\)` first"): model.load_state_dict(fused.state_dict())
    assert all(torch.equal(t, before[k]) for k,t in model[1].query.state_dict().items())
    fuse_attention(model).load_state_dict(fused.state_dict())

def test_weights_of_another_shape_are_named():
    with pytest.raises(RuntimeError, match='weight_orig'): fuse_attention(nn.Sequential(SelfAttention(24))).load_state_dict(nn.Sequential(SelfAttention(16)).state_dict())

def test_a_conv_of_pytorch_with_a_hook_takes_them_too():
    layer = SelfAttention(24, gamma=.5)
    layer.value[0] = nn.utils.spectral_norm(nn.Conv1d(24, 24, 1, bias=False))
    x = torch.randn(2, 24, 35)
    trained, model = step(nn.Sequential(copy.deepcopy(layer)), x), fuse_attention(nn.Sequential(layer)).eval()
    given = trained.state_dict()
    model.load_state_dict(given)
    torch.testing.assert_close(model(x), trained(x), rtol=1e-5, atol=1e-6)

def learner(path, *cbs):
    data = [(torch.randn(3, 9, 11), i % 2) for i in range(8)]
    dls = DataLoaders(*(DataLoader(data, bs=4, num_workers=0) for _ in range(2)))
    model = nn.Sequential(net(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), path=path, cbs=cbs)

@pytest.mark.parametrize('with_opt', [True, False])
def test_learn_load_and_save_model_callback(tmp_path, with_opt):
    x = torch.randn(2, 3, 9, 11)
    learn = learner(tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-6)
    want = learn.model.eval()(x)
    learn.save('before', with_opt=with_opt)
    fuse_attention(learn.model)
    with torch.no_grad(): learn.model[0][1].value[0].weight.mul_(2)
    learn.load('before', with_opt=with_opt)
    torch.testing.assert_close(learn.model.eval()(x), want, rtol=1e-5, atol=1e-6)
    learn.save('after'), learn.load('after')
    again = learner(tmp_path, SaveModelCallback(monitor='train_loss', fname='best', with_opt=with_opt))
    fuse_attention(again.model)
    with again.no_bar(), again.no_logging(): again.fit(2, 1e-6)          # loads the best at the end
    fuse_attention((plain := learner(tmp_path)).model)
    plain.load('best', with_opt=False)
    torch.testing.assert_close(plain.model.eval()(x), again.model.eval()(x))
    learner(tmp_path).load('before')                                   # and a model that is not fused takes what it took

class Half(nn.Module):
    def forward(self, w): return w*.5

@pytest.mark.parametrize('change,says', [(lambda conv: parametrize.register_parametrization(conv, 'weight_orig', Half()), 'remove_parametrizations'), (lambda conv: prune.l1_unstructured(conv, 'weight_orig', .5), 'prune.remove')], ids=['parametrized', 'pruned'])
def test_weights_that_are_made_from_others_are_not_fused(change, says):
    model = net()
    x = torch.randn(2, 3, 9, 11)
    model(x)
    change(model[1].value[0])
    want, keys = model.eval()(x), list(model.state_dict())
    with pytest.raises(ValueError, match=says): fuse_attention(model)
    assert list(model.state_dict()) == keys and torch.equal(model(x), want)
