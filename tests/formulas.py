"The layers as their formulas say, written out."
import torch
from torch.nn import functional as F

from fastai_selfattn.attention.layers import PooledSelfAttention2d, SimpleSelfAttention


def rel(a, b): return ((a - b).norm() / b.norm().clamp_min(1)).item()     # absolute where the truth is (nearly) zero

def weight(conv, steps=0):
    "The normalised weight of a conv written out, (out, in); under spectral norm after more power iterations"
    if hasattr(conv, 'weight_g'): return (conv.weight_g * conv.weight_v / conv.weight_v.flatten(1).norm(dim=1).view_as(conv.weight_g)).flatten(1)
    if not hasattr(conv, 'weight_u'): return conv.weight.flatten(1)
    w, u, v = conv.weight_orig.flatten(1), conv.weight_u, conv.weight_v
    for _ in range(steps):
        v = F.normalize(w.detach().mT @ u, dim=0)
        u = F.normalize(w.detach() @ v, dim=0)
    return w / (u @ w @ v)

def max_pooled(t, pool, size):
    t = t.unflatten(2, size)
    for dim in range(2, t.dim()): t = torch.stack([part.amax(dim) for part in t.split(pool, dim)], dim)
    return t.flatten(2)

def written_out(layer, x, weights=False):
    "The formula of each layer with its weights of now"
    p = x.flatten(2)
    if isinstance(layer, SimpleSelfAttention):
        w = weight(layer.conv)
        if layer.sym: w = (w + w.mT) / 2
        return x + layer.gamma * (p @ p.mT @ (w @ p)).view(x.shape)
    asks, answers = ('query', 'key') if isinstance(layer, PooledSelfAttention2d) else ('key', 'query')
    q, k, v = (weight(getattr(layer, name)[0]) @ p for name in (asks, answers, 'value'))
    k, v = (max_pooled(t, layer.pool, x.shape[2:]) for t in (k, v))
    q, k = (t.chunk(layer.heads, 1) for t in (q, k))
    if layer.unit: q, k = ([F.normalize(t, dim=1) for t in ts] for ts in (q, k))
    logits = [qh.mT @ kh for qh, kh in zip(q, k)]
    beta = [l.softmax(-1) if layer.softmax else l / v.shape[2] for l in logits]
    if weights: return torch.stack(beta, 1)
    o = torch.cat([vh @ b.mT for vh, b in zip(v.chunk(layer.heads, 1), beta)], 1)
    if hasattr(layer, 'out'): o = weight(layer.out[0]) @ o
    return x + layer.gamma * o.view(x.shape)
