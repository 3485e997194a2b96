"Two processes have the gradients of one, with inserted attention, also while gamma is 0, with checkpointed activations, and with weights in parts."
import pytest
import torch
from conftest import root, train_in_processes
from processes import python

TRAIN = '''
import os, sys, torch
from fastai.vision.all import *
from fastai_selfattn.all import *
from torch.utils.checkpoint import checkpoint

class Keep(Callback):
    def before_step(self):
        grads = {n.removeprefix('module.'): p.grad.clone() for n,p in self.model.named_parameters() if p.grad is not None}
        torch.save(grads, f"{how}-{os.environ.get('RANK', 'one')}.pt")

def train(how):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()), nn.Conv2d(8, 4, 1))
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(3, 6, 7, generator=g), torch.randn(4, 6, 7, generator=g)) for _ in range(8)]
    bs = 8//int(os.environ.get('WORLD_SIZE', 1))
    learn = Learner(DataLoaders(DataLoader(data, bs=bs), DataLoader(data, bs=bs)), net, loss_func=MSELossFlat(), opt_func=SGD, lr=.1, cbs=[GammaLogger(), Keep()])
    learn.insert_attention('0', gamma=0. if how == 'zero' else .5)
    if how == 'checkpoint':
        block = learn.model[0]
        inner = block.forward
        block.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    with learn.distrib_ctx(sync_bn=False, cpu=True) if 'RANK' in os.environ else nullcontext(): learn.fit(1)

from contextlib import nullcontext
for how in ('plain', 'zero', 'checkpoint'): train(how)
'''

def test_gradients_and_logs_of_two_processes(tmp_path):
    for n in (1, 2):
        said = train_in_processes(tmp_path, TRAIN, n)
        assert said.count('train_loss') == 3     # a table for each of the trainings, of one process only
    for how in ('plain', 'zero', 'checkpoint'):
        one, first, second = (torch.load(tmp_path/f'{how}-{who}.pt') for who in ('one', '0', '1'))
        assert one.keys() == first.keys() == second.keys() and len(one) == 10 and one['0.3.gamma'].abs() > 1e-3
        assert (one['0.3.query.0.weight_orig'].abs().max() > 1e-3) == (how != 'zero')
        for name, grad in one.items():
            torch.testing.assert_close(first[name], grad, atol=1e-6, rtol=1e-4)
            assert second[name].equal(first[name])


SHARDED = '''
import sys, torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastai_selfattn.attention.layers import PooledSelfAttention2d, SelfAttention

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), SelfAttention(16, gamma=.7), PooledSelfAttention2d(16, gamma=.3), nn.Conv2d(16, 2, 1))

def train(net, x, y):
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(3):
        (net(x)-y).square().mean().backward()
        opt.step()
        opt.zero_grad()

init_process_group('gloo')
rank,n = torch.distributed.get_rank(),torch.distributed.get_world_size()
mesh = init_device_mesh('cpu', (n,))
g = torch.Generator().manual_seed(1)
x,y = torch.randn(4, 3, 11, 30, generator=g),torch.randn(4, 2, 11, 30, generator=g)
for how in sys.argv[1:]:
    one,parts = net(),net()
    train(one, x, y)
    convs = [getattr(parts[i], name) for i in (2, 3) for name in ('query', 'key', 'value')]
    for m in dict(model=[], layers=[parts[2], parts[3]], convs=convs)[how.removesuffix(' saved')]: fully_shard(m, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    if how.endswith('saved'): parts.state_dict()
    train(parts, x[rank::n], y[rank::n])
    for a,b in zip(parts.parameters(), one.parameters()): torch.testing.assert_close(a.full_tensor(), b, atol=1e-5, rtol=1e-4)
    for a,b in zip(parts.buffers(), one.buffers()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.no_grad(): torch.testing.assert_close(parts.eval()(x), one.eval()(x), atol=1e-5, rtol=1e-4)
    print(how)
destroy_process_group()
'''

def test_weights_in_parts_over_two_processes(tmp_path):
    pytest.importorskip('torch.distributed.fsdp')
    how = ['model', 'layers', 'convs', 'model saved']
    said = python(SHARDED, *how, folder=tmp_path, n=2, OMP_NUM_THREADS='1', PYTHONPATH=str(root))
    assert [said.count(f'{h}\n') for h in how] == [2, 2, 2, 2]
