"""GAN: do generator and critic draw better digits with attention? Wasserstein GAN with gradient penalty, 8x8 digits of scikit-learn

python benchmarks/gan.py     5 seeds, 3000 steps of the critic
"""
from functools import cache, partial
from itertools import chain, repeat

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Metric
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn

from study import compare, options

STEPS,CRITIC,LR,BS = 3000,3,5e-4,32     # steps of the critic; of them for each of the generator; learning rate of both; digits a batch
NOISE,PENALTY,FEATURES = 32,10,20       # numbers that a digit is drawn from; weight of the gradient penalty; numbers of the feature space
N_VALID = 500

class GAN(nn.Module):
    "Generator and critic as one model: real digits (bs, 1, 8, 8) in, the critic's scores of as many drawn ones out"
    def __init__(self, c=32):
        super().__init__()
        up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2*c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())
        start = nn.Sequential(nn.Linear(NOISE, 2*c*16), nn.Unflatten(1, (2*c,4,4)), nn.BatchNorm2d(2*c), nn.ReLU())
        self.generator = nn.Sequential(start, up, nn.Sequential(nn.Conv2d(c, 1, 3, padding=1), nn.Sigmoid()))
        first,second = (nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.LeakyReLU(.2)) for a,b,stride in ((1,c,1), (c,2*c,2)))
        self.critic = nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(2*c*16, 1)))

    def drawn(self, n): return self.generator(torch.randn(n, NOISE))

    def forward(self, x): return self.critic(self.drawn(len(x)))

@cache
def _digits(): return (torch.from_numpy(load_digits().images).float()/16)[:,None]

@cache
def _features(): return PCA(FEATURES, random_state=0).fit(_digits().flatten(1).numpy())     # of all digits, fixed once and for all

def _moments(x):
    f = _features().transform(x.flatten(1).numpy())
    return f.mean(0),np.cov(f.T)

def frechet(a, b):
    "Frechet distance between digits and digits, in the fixed feature space"
    (m,c),(m2,c2) = _moments(a),_moments(b)
    return float(((m-m2)**2).sum() + np.trace(c + c2 - 2*sqrtm(c@c2).real))

class Frechet(Metric):
    "Frechet distance of as many drawn digits to those of validation"
    def reset(self): self.real = []
    def accumulate(self, learn): self.real.append(learn.xb[0].as_subclass(torch.Tensor))
    @property
    def value(self):
        real = torch.cat(self.real)
        with torch.no_grad(): return frechet(self.model.drawn(len(real)), real)
    @property
    def name(self): return 'frechet'
    def __init__(self, model): self.model = model

def _penalty(critic, real, fake):
    "How far the critic's slope is from 1 between real and drawn digits"
    x = fake.lerp(real, torch.rand(len(real), 1, 1, 1)).requires_grad_()
    slope, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1)-1).square().mean()

def train(learn, steps, lr):
    "`steps` steps of the critic, and one of the generator after every few"
    gan = learn.model.train()
    g,c = (torch.optim.Adam(m.parameters(), lr, betas=(.5,.9)) for m in (gan.generator, gan.critic))
    batches = chain.from_iterable(repeat(learn.dls.train))
    for i in range(1, steps+1):
        real = next(batches)[0].as_subclass(torch.Tensor)
        with torch.no_grad(): fake = gan.drawn(len(real))
        (gan.critic(fake).mean() - gan.critic(real).mean() + PENALTY*_penalty(gan.critic, real, fake)).backward()
        c.step(), gan.zero_grad()
        if i%CRITIC: continue
        (-gan(real).mean()).backward()
        g.step(), gan.zero_grad()

def data(seed, n_valid):
    "The digits, split anew in each seed"
    order = torch.randperm(len(_digits()), generator=torch.Generator().manual_seed(seed))
    items = [(x,0.) for x in _digits()[order]]
    return DataLoaders(DataLoader(items[n_valid:], bs=BS, shuffle=True, drop_last=True), DataLoader(items[:n_valid], bs=n_valid))

def make(dls):
    gan = GAN()
    return Learner(dls, gan, loss_func=lambda scores,_: -scores.mean(), metrics=Frechet(gan))

def main(argv=None):
    args = options(__doc__, seeds=5).parse_args(argv)
    steps,n_valid = (CRITIC,40) if args.smoke else (STEPS,N_VALID)
    where = {'generator and critic':['generator.1','critic.0'], 'generator':'generator.1', 'critic':'critic.0'}     # maps of 8x8
    return compare(args, 'gan', f'gan-{steps}steps', dict(steps=steps), partial(data, n_valid=n_valid), make, where=where,
                   arms=['attention','uniform'], fit=partial(train, steps=steps, lr=LR), metric='frechet', lower_is_better=True, gamma=1.)

if __name__ == '__main__': main()
