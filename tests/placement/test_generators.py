"Generators, which take a vector: the dimension of maps is read from the maps"
import warnings

import pytest
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.optimizer import Adam
from fastai.torch_core import TensorImage
from fastai.vision.gan import GANLearner, basic_critic, basic_generator, generate_noise
from torch import nn

from fastai_selfattn.placement.insert import insert_attention
from fastai_selfattn.placement.sites import attention_sites

def sagan(): return nn.Sequential(nn.Linear(10, 24*12), nn.Unflatten(1, (24, 3, 4)), nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))
def upsampled(): return nn.Sequential(nn.Linear(10, 24*12), nn.Unflatten(1, (24, 3, 4)), nn.Upsample(scale_factor=2), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU())
def dcgan(): return nn.Sequential(nn.ConvTranspose2d(10, 24, (3, 4)), nn.ReLU(), nn.ConvTranspose2d(24, 16, 4, 2, 1))
def of_sound(): return nn.Sequential(nn.Linear(10, 24*7), nn.Unflatten(1, (24, 7)), nn.ConvTranspose1d(24, 16, 4, 2, 1), nn.ReLU(), nn.Conv1d(16, 1, 3, padding=1))
def of_volumes(): return nn.Sequential(nn.Linear(10, 24*24), nn.Unflatten(1, (24, 2, 3, 4)), nn.ConvTranspose3d(24, 16, 4, 2, 1))
def without_conv(): return nn.Sequential(nn.Linear(10, 24*12), nn.Unflatten(1, (24, 3, 4)), nn.Upsample(scale_factor=2), nn.BatchNorm2d(24))

@pytest.mark.parametrize('make,size,where,channels,side', [
    *[(sagan, size, '3', 16, (6, 8)) for size in (None, 10, (10,), (5, 10), torch.randn(5, 10), [torch.randn(5, 10), torch.randn(5, 3, 12, 16)])],
    (upsampled, None, '4', 16, (6, 8)), (upsampled, torch.randn(2, 10), '2', 24, (6, 8)),
    *[(dcgan, size, '2', 16, (6, 8)) for size in (None, (10, 1, 1), (5, 10, 1, 1), torch.randn(5, 10, 1, 1))], (dcgan, (10, 2, 1), '2', 16, (8, 8)),
    (of_sound, None, '3', 16, (14,)), (of_sound, torch.randn(4, 10), '3', 16, (14,)),
    (of_volumes, torch.randn(4, 10), '2', 16, (4, 6, 8)),
    (without_conv, torch.randn(4, 10), '3', 24, (6, 8)),
    (lambda: basic_generator(16, 3, in_sz=10, n_features=8), torch.randn(2, 10), '1', 16, (4, 4)),
])
def test_maps_of_a_generator(make, size, where, channels, side):
    torch.manual_seed(0)
    model = make().eval()
    site = attention_sites(model, size)[where]
    assert (site.channels, site.map, site.reason) == (channels, side, '')
    x = torch.randn(3, 10, *[1]*(2*(make is dcgan)))
    y = model(x)
    path, = insert_attention(model, where, size=size)
    assert torch.equal(model(x), y)
    model.get_submodule(path).gamma.data.fill_(.5)
    assert not torch.allclose(model(x), y)

def test_what_is_said():
    assert 'vector 10 (assumed: a vector, as 10 numbers go into the first layer; give `size` for another)' in repr(attention_sites(sagan()))
    with pytest.raises(ValueError, match=r'does not run on a vector of 11 \(one image of the batch\)'): attention_sites(sagan(), torch.randn(2, 11))
    with pytest.raises(ValueError, match='no conv|does not run'): attention_sites(nn.Sequential(nn.Linear(4, 5), nn.Flatten(0)), 7)

def test_a_classifier_that_names_its_head_first_takes_images():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head,self.body = nn.Linear(16, 5),nn.Conv2d(3, 16, 3, 4)
        def forward(self, x): return self.head(self.body(x).mean((2, 3)))
    assert 'image 3x224x224' in attention_sites(Net()).title
    assert attention_sites(Net(), 32)['body'].map == (8, 8) and attention_sites(Net(), (16, 20))['body'].map == (4, 5)

def test_convs_over_channels_are_no_maps():
    from timm.layers import EcaModule
    sites = attention_sites(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), EcaModule(16)), (20, 28))
    assert sites['3'].map == (16, 24) and 'not a map of 2 dimensions' in sites.every['3.conv'].reason

@pytest.mark.parametrize('fitted', [False, True])
def test_a_gan_learner(fitted):
    torch.manual_seed(0)
    ds = Datasets(range(14), [[lambda i: generate_noise(i, 10)], [lambda i: TensorImage(torch.rand(3, 16, 16))]])
    dls = DataLoaders.from_dsets(ds, ds, bs=2, device='cpu')
    learn = GANLearner.wgan(dls, basic_generator(16, 3, 10, 8), basic_critic(16, 3, 8), opt_func=Adam, show_img=False)
    def fit():
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(action='ignore'): learn.fit(1, 1e-2, wd=0)
    if fitted: fit()
    mode = learn.model.gen_mode
    sites = attention_sites(learn)
    assert [sites[n].map for n in ('generator.1', 'critic.0')] == [(4, 4), (8, 8)] and learn.model.gen_mode is mode
    assert attention_sites(learn.model.generator, learn.dls)['1'].channels == 16
    paths = insert_attention(learn, ['generator.1', 'critic.0'])
    fit()
    assert all(learn.model.get_submodule(p).gamma.abs() > 0 for p in paths)
