"What a layer must compute, against what fastai's layer computes when it runs"
import pytest
import torch

from fastai_selfattn.bench.contestants import prepare_layers
from fastai_selfattn.bench.cost import Shape, attention_cost, floor_parts, parse_shapes, rate_meter

class Count(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts multiply-add pairs of matrix products, twice each, and what goes through a softmax"
    ops = exps = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out,name = func(*args, **(kwargs or {})),func.overloadpacket.__name__
        if name in ('bmm', 'mm'): self.ops += 2*out.numel()*args[0].shape[-1]
        if name == '_softmax': self.exps += out.numel()
        if name == 'convolution': self.ops += 2*out.numel()*args[1][0].numel()
        return out

@pytest.mark.parametrize('shape', [Shape(2, 24, 5, 7), Shape(3, 16, 4, 9)])
def test_cost_is_what_fastai_computes(shape):
    layers,x = prepare_layers(shape, ['fastai'])
    with Count() as count, torch.no_grad(): layers['fastai'].eval()(x)
    ops,exps = attention_cost(shape)
    small = 2*sum(2*c[0].weight_orig.numel() for c in (layers['fastai'].query, layers['fastai'].key, layers['fastai'].value))    # spectral norm
    assert ops <= count.ops <= ops+small and count.exps == exps

@pytest.mark.parametrize('shape', [Shape(2, 24, 5, 7), Shape(3, 16, 4, 9)])
def test_cost_of_both_passes_is_that_of_fastai_and_the_weights_anew(shape):
    "fastai's layer keeps the weights; one that does not multiplies q and k, and takes the exponentials, once more"
    bs,c,n = shape.bs,shape.c,shape.n
    layers,x = prepare_layers(shape, ['fastai'])
    convs = layers['fastai'].query,layers['fastai'].key,layers['fastai'].value
    with torch.no_grad(): weights = [conv(x.flatten(2)) for conv in convs]     # settled, not to be counted
    q,k,v = (torch.randn_like(w, requires_grad=True) for w in weights)
    with Count() as count: (v @ (q.mT @ k).softmax(1)).sum().backward()
    project = 3*2*bs*n*c*(2*c//8 + c)
    anew = 2*bs*n*n*(c//8)
    assert attention_cost(shape, backward=True) == (project + count.ops + anew, 2*count.exps)

@pytest.mark.parametrize('backward', [False, True])
def test_parts_of_the_floor(backward):
    ops,exps = attention_cost(Shape(2, 24, 5, 7), backward)
    assert floor_parts(Shape(2, 24, 5, 7), backward, (ops/3, exps/4)) == pytest.approx((3, 4))

def test_rates_are_measured_anew():
    rates = rate_meter(32)
    assert len({rates() for _ in range(5)}) > 1 and all(r > 0 for r in rates())

def test_shapes_by_name_and_by_hand():
    assert parse_shapes('table')[0] == Shape(8, 512, 16, 16) and parse_shapes('sides')[-1].n == 65536
    assert set(parse_shapes('all')) == {*parse_shapes('table'), *parse_shapes('sides')}
    assert parse_shapes('2,24,5x7 1,8,3 2,24,5x7') == [Shape(2, 24, 5, 7), Shape(1, 8, 3, 3)]
    assert parse_shapes(str(Shape(2, 24, 5, 7))) == [Shape(2, 24, 5, 7)]
