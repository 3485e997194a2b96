"Two processes have the gradients of one, with inserted attention, also while gamma is 0 and with checkpointed activations."
import torch
from conftest import train_in_processes

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
