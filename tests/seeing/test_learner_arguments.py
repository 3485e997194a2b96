"What is no argument of the tools to look with is said at once"
import numpy as np
import pytest, torch
from fastai_selfattn.attention.ops import attention_backend
from fastai_selfattn.files import whole_file
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.seeing.interpret import AttentionInterpretation
from fastai_selfattn.walls.swatches import swatch_dls, swatch_learner
import fastai_selfattn.learner  # noqa: F401

@pytest.fixture(scope='module')
def learn(): return swatch_learner(swatch_dls(n=20))

@pytest.mark.parametrize('look,error,says', [
    (lambda l, p: l.show_attention(scale=None), ValueError, "`scale` must be 'picture'"), (lambda l, p: l.show_attention(scale=True), ValueError, '`scale` must be'),
    (lambda l, p: l.show_attention(scale=float('inf')), ValueError, '`scale` must be'), (lambda l, p: l.show_attention(np.zeros((40, 40, 3))), TypeError, r'got an array \(40, 40, 3\)'),
    (lambda l, p: receptive_field(l.model, torch.rand(1, 5, 40, 40), channel=1.5), TypeError, '`channel` must be a whole number'),
    (lambda l, p: receptive_field(l.model, torch.rand(1, 5, 40, 40), share='a'), TypeError, '`share` must be a number'),
    (lambda l, p: AttentionInterpretation.from_learner(l.model), TypeError, '`learn` must be a Learner'), (lambda l, p: AttentionInterpretation.from_learner(l, ds_idx=7), ValueError, '`ds_idx` must be below 2'),
    (lambda l, p: attention_backend(['x']).__enter__(), ValueError, '`name` must be one of'),
    (lambda l, p: whole_file(p).__enter__(), IsADirectoryError, 'give the name of a file in it')], ids=range(10))
def test_what_is_no_argument_is_said(look, error, says, learn, tmp_path):
    with pytest.raises(error, match=says): look(learn, tmp_path)
    assert not list(tmp_path.iterdir())
