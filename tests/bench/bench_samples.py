"What the tests of the benchmark share: a small odd map, a layer with one mistake, and a machine that is measured quickly"
from pathlib import Path

import fastai.layers
import pytest

from fastai_selfattn.bench import measure
from fastai_selfattn.bench.contestants import CONTESTANTS
from fastai_selfattn.bench.cost import Shape, rate_meter

SAME = [n for n,c in CONTESTANTS.items() if c.same]
SHAPE = Shape(2, 24, 5, 7)

has_proc = pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason="peak memory is measured on Linux")

def small_meter(): return rate_meter(64)

@pytest.fixture
def quick(monkeypatch):
    "A small matrix for the rate of the machine"
    monkeypatch.setattr(measure, 'rate_meter', small_meter)

class Altered(fastai.layers.SelfAttention):
    "fastai's layer with a mistake that only its output, or only a gradient, shows"
    def __init__(self, n_channels, where):
        super().__init__(n_channels)
        self.where = where
    def forward(self, x):
        y = super().forward(x)
        if self.where == 'the output': return y + 1e-2
        wrong = x if self.where == 'the gradient of x' else self.get_parameter(self.where.split()[-1])
        extra = 1e-2*wrong.sum()
        return y + (extra-extra.detach())
