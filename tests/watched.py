"Small models with attention, their images, and what a look at them must leave as it is"
import fastai.layers
import torch
from torch import nn

from fastai_selfattn.attention.kinds import attention_layers
from fastai_selfattn.attention.layers import SelfAttention, SimpleSelfAttention

SIZES = {1: (42,), 2: (30, 42), 3: (6, 18, 30)}     # maps of a half and of a sixth of each side
POINTS = {1: [(0,), (41,), (17,)], 2: [(0, 0), (29, 41), (13, 31)], 3: [(0, 0, 0), (5, 17, 29), (2, 7, 23)]}
close = torch.testing.assert_close

def with_gamma(layer, gamma=.7):
    nn.init.constant_(layer.gamma, gamma)
    return layer

def net(nd=2):
    "Attention twice; its `u` and `v` are random, as loaded ones may be, so that each power iteration moves the weights"
    torch.manual_seed(5)
    conv, pool, norm = {1: (nn.Conv1d, nn.MaxPool1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.MaxPool3d, nn.BatchNorm3d)}[nd]
    model = nn.Sequential(conv(3, 24, 3, 2, 1), SelfAttention(24), nn.Dropout(.3), pool(3), conv(24, 8, 1), SelfAttention(8), norm(8))
    for layer, c in zip(attention_layers(model).values(), (24, 8)):
        layer.load_state_dict(fastai.layers.SelfAttention(c).state_dict())
        with_gamma(layer)
    return model

def mixed(sym=False):
    "Ours and fastai's, with a softmax and without; of each but one, maps of 16x24 cells of an image of 32x48, and one of 8x12"
    torch.manual_seed(6)
    layers = [SelfAttention(16), fastai.layers.SelfAttention(16), fastai.layers.PooledSelfAttention2d(16), SimpleSelfAttention(16), fastai.layers.SimpleSelfAttention(16, sym=sym)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), *map(with_gamma, layers), nn.BatchNorm2d(16), nn.Dropout(.3), nn.MaxPool2d(2), with_gamma(fastai.layers.SelfAttention(16), -.4))
    for i in (4, 5): nn.init.constant_(model[i].gamma, 1e-4)
    with torch.no_grad(): model(images(size=(32, 48)))                  # the singular vectors are no longer random, and far from settled
    return model

def images(nd=2, bs=2, seed=9, size=None): return torch.randn(bs, 3, *(size or SIZES[nd]), generator=torch.Generator().manual_seed(seed))

def top_weight(a):
    "The largest of the weights `a`, rows of columns, where a cell counts for twice the strongest of its neighbours at most"
    def counted(r, c):
        around = [a[i][j] for i in range(max(0, r-1), min(len(a), r+2)) for j in range(max(0, c-1), min(len(a[0]), c+2)) if (i, j) != (r, c)]
        return min(a[r][c], 2*max(around))
    return max(counted(r, c) for r in range(len(a)) for c in range(len(a[0])))

def hooks(model):
    return {(name, k): list(v) for name, m in model.named_modules() for k, v in vars(m).items() if 'hook' in k and v}

def as_it_was(model):
    "All that a look must leave as it is"
    weights = {n: id(vars(m)['weight']) for n, m in model.named_modules() if 'weight' in vars(m)}
    state = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    grads = {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()}
    return dict(hooks=hooks(model), modes=[m.training for m in model.modules()], weights=weights, requires=[p.requires_grad for p in model.parameters()]), state, grads

def same(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys() and a[2].keys() == b[2].keys()
    assert all(torch.equal(t, b[1][n]) for n, t in a[1].items())
    for n, g in a[2].items(): assert g is b[2][n] is None or g[0] == b[2][n][0] and torch.equal(g[1], b[2][n][1])

def to_marked():
    "A layer by which every pixel attends to the one marked in channel 1, whose answer is its channel 2"
    layer = SelfAttention(3, reduction=3, norm_type=None, gamma=1.)
    for conv, channel, w in ((layer.key, 0, 100.), (layer.query, 1, 1.), (layer.value, 2, 1.)): conv[0].weight.data.zero_()[-1, channel] = w
    return layer

def marked(size=(6, 10), at=(4, 7), seed=3):
    "A picture (1, 3, *size) of ones, a mark, and data"
    x = torch.zeros(1, 3, *size)
    x[:, 0], x[0, 1, at[0], at[1]] = 1, 1
    x[:, 2] = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return x

def stance_is_forced():
    import torch._dynamo.eval_frame
    return torch._dynamo.eval_frame._stance.stance != 'default'
