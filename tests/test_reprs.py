"What is given back says what it holds, in a line that can be read."
import pandas as pd
import torch
from torch import nn

from fastai_selfattn.all import AttentionInterpretation, AttentionRecorder, SelfAttention, attention_stats
from fastai_selfattn.seeing.field import ReceptiveField

def test_stats():
    "Four pixels in a row, 10 apart; all weight of the only query pixel lies on the third"
    at = 10.*torch.arange(4)[:, None]
    logits = torch.tensor([0., 0., 200., 0.]).view(1, 4, 1)
    said = repr(attention_stats(torch.ones(1, 1, 1), logits, at[:1], at, torch.tensor([0])))
    assert said == 'AttentionStats of query pixels (1, 1), means: entropy 0, entropy_share 0, distance 20, itself 0, largest 1'

def test_receptive_field():
    said = repr(ReceptiveField(torch.zeros(6, 8), torch.zeros(6, 8), .25, .125, .9, (2, 5)))
    assert said == "ReceptiveField of pixel (2, 5) in an image of 6x8: 90% of the gradient's energy lies in 25.0% of the pixels with attention, in 12.5% without"

def test_recorder():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), SelfAttention(16, pool=2))
    rec = AttentionRecorder(model, [(1, 2), (3, 0)])
    assert repr(rec) == 'AttentionRecorder of 1: nothing recorded yet'
    with rec, torch.no_grad(): model(torch.randn(3, 3, 6, 10))
    assert repr(rec) == 'AttentionRecorder: 1 has maps of 3 pictures and 2 query pixels, 3x5 cells'

def test_interpretation():
    df = pd.DataFrame(dict(picture=[0, 1, 0, 1, 0, 1], layer=list('aabbcc'), loss=[1., 2.]*3, loss_off=[2., 4.]*3, gain=[1., 2.]*3))
    assert repr(AttentionInterpretation(None, None, df)) == 'AttentionInterpretation, 3 layers in 2 pictures, means: loss 1.5, loss_off 3, gain 1.5'
