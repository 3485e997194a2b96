"Batches of tensor subclasses, among them one whose `new_empty` is its own"
import pytest
import torch
from fastai.torch_core import TensorImage
from torch import nn
from torchvision.tv_tensors import Image

from fastai_selfattn.placement.insert import insert_attention
from fastai_selfattn.placement.sites import attention_sites

class Meta(torch.Tensor):
    "Like MONAI's `MetaTensor`: takes a shape in its `new_empty`, and nothing else"
    def new_empty(self, size, dtype=None, device=None, requires_grad=False): return type(self)(torch.empty(tuple(size), dtype=dtype or self.dtype))

@pytest.mark.parametrize('kind', [Meta, TensorImage, Image])
@pytest.mark.parametrize('several', [False, True])
def test_a_batch_of_a_subclass(kind, several):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1))
    x = torch.randn(2, 3, 20, 28).as_subclass(kind)
    size = [x, torch.zeros(2)] if several else x
    site = attention_sites(model, size)['2']
    assert (site.channels, site.map, site.dtype, site.reason) == (24, (10, 14), torch.float32, '')
    y = model(x)
    insert_attention(model, '2', size=size)
    assert torch.equal(model(x), y)
