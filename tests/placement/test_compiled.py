"Models compiled by parts or in place: places inside are found and used, what was compiled is compiled anew, and a look compiles nothing"
import pytest
import torch
from fastai.layers import ConvLayer
from fastai.vision.learner import create_unet_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torchvision.models.resnet import BasicBlock

from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.sites import attention_sites

def net():
    torch.manual_seed(0)
    blocks = [nn.Sequential(BasicBlock(c, c), BasicBlock(c, c), nn.Conv2d(c, c+8, 3, 2, 1)) for c in (8, 16, 24)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks).eval()

def part(counter):
    model = net()
    model[2] = torch.compile(model[2], backend=counter)
    return model

def part_in_place(counter):
    model = net()
    model[2].compile(backend=counter)
    return model

def in_place(counter):
    model = net()
    model.compile(backend=counter)
    return model

def nested(counter):
    model = part(counter)
    model[2]._orig_mod[0] = torch.compile(model[2]._orig_mod[0], backend=counter)
    return model

ways = [part, part_in_place, in_place, nested]

@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()

@pytest.mark.parametrize('way', ways)
def test_places_are_those_of_the_model_before(way):
    got,want = (attention_sites(m, (20, 28)) for m in (way(CompileCounter()), net()))
    assert [(s.name, s.channels, s.map, s.reason) for s in got] == [(s.name, s.channels, s.map, s.reason) for s in want]

@pytest.mark.parametrize('way', ways)
def test_looking_compiles_nothing(way):
    counter = CompileCounter()
    model,x = way(counter),torch.randn(1, 3, 20, 28)
    y,n = model(x),counter.frame_count
    assert n > 0
    for _ in range(9): attention_sites(model, x)
    assert torch.equal(model(x), y) and counter.frame_count == n

@pytest.mark.parametrize('way,where', [(part, '2'), (part, '2.1.conv2'), (in_place, '3'), (part_in_place, '2.[01]'), (nested, '2.0')])
def test_in_and_out_after_it_ran(way, where):
    model,x = way(CompileCounter()),torch.randn(2, 3, 20, 28)
    y,keys = model(x),list(model.state_dict())
    paths = insert_attention(model, where, size=x)
    assert torch.equal(model(x), y)
    for p in paths: model.get_submodule(p).gamma.data.fill_(.8)
    eager = net()
    for p in insert_attention(eager, where, size=x): eager.get_submodule(p).gamma.data.fill_(.8)
    eager.load_state_dict({k.replace('_orig_mod.', ''):v for k,v in model.state_dict().items()})
    torch.testing.assert_close(model(x), eager(x))
    assert not torch.allclose(model(x), y)
    assert remove_attention(model, where) == paths
    assert torch.equal(model(x), y) and list(model.state_dict()) == keys

def test_the_model_was_compiled_as_a_whole_elsewhere():
    model,x = net(),torch.randn(2, 3, 20, 28)
    compiled = torch.compile(model, backend='eager')
    y = compiled(x)
    path, = insert_attention(model, '2.0', size=x)
    model.get_submodule(path).gamma.data.fill_(.8)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), y)

@pytest.mark.parametrize('way', [part, in_place])
def test_replaced(way):
    model,x = way(CompileCounter()),torch.randn(2, 3, 20, 28)
    y = model(x)
    path, = insert_attention(model, '2.1', 'replace', size=x)
    model.get_submodule(path).gamma.data.fill_(.8)
    z = model(x)
    assert not torch.allclose(z, y)
    remove_attention(model)
    assert torch.equal(model(x), y)

def test_parts_of_a_unet():
    torch.manual_seed(0)
    def arch(pretrained=False): return nn.Sequential(*[ConvLayer(a, b, stride=2) for a,b in ((3, 8), (8, 16), (16, 24), (24, 32))], nn.AdaptiveAvgPool2d(1))
    unet,x = create_unet_model(arch, 2, (48, 64), pretrained=False).eval(),torch.randn(1, 3, 48, 64)
    want = attention_sites(unet, x)
    unet.layers[0][2] = torch.compile(unet.layers[0][2], backend='eager')
    unet.layers[4] = torch.compile(unet.layers[4], backend='eager')
    got = attention_sites(unet, x)
    assert [(s.name, s.channels, s.map) for s in got] == [(s.name, s.channels, s.map) for s in want]
    y = unet(x)
    path, = insert_attention(unet, 'decoder.0', size=x)
    assert path == 'layers.4._orig_mod.conv2.2' and torch.equal(unet(x), y)
    unet.get_submodule(path).gamma.data.fill_(.8)
    assert not torch.allclose(unet(x), y)
