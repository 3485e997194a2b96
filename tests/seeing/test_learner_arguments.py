"What is no argument of the tools to look with is said at once"
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from fastai_selfattn.attention.ops import attention_backend
from fastai_selfattn.files import whole_file
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.seeing.interpret import AttentionInterpretation
from fastai_selfattn.seeing.map_logger import AttentionMapLogger
from fastai_selfattn.seeing.record import AttentionRecorder
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

@pytest.mark.parametrize('make,says', [(lambda m: AttentionRecorder(m, points=3, seed='a'), '`seed` must be a whole number'), (lambda m: AttentionMapLogger(items=3), '`items` must be pictures.*got int'),
    (lambda m: AttentionMapLogger(items=np.zeros((2, 3, 4))), r'`items` must be pictures.*\(2, 3, 4\)')], ids=range(3))
def test_what_cannot_be_used_is_said_when_it_is_made(make, says, learn):
    with pytest.raises(TypeError, match=says): make(learn.model)

def test_layers_by_name_and_other_arguments_of_interpretation():
    learn = swatch_learner(swatch_dls(n=20))
    path, = learn.insert_attention('down')
    assert path != 'down'
    logger = AttentionMapLogger()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-5, cbs=logger)
    interp = AttentionInterpretation.from_learner(learn, layers=['down'])
    assert set(interp.top(layer='down').layer) == {path} and len(interp.top(layer='down').picture) and logger.maps('down')[0] == path
    logger.show_growth(layer='down')
    with pytest.raises(ValueError, match='no attention layer'): interp.top(layer='nowhere')
    with pytest.raises(ValueError, match='no attention layer'): logger.maps('nowhere')
    with pytest.raises(TypeError, match='`largest` must be True or False, got str'): interp.top(largest='no')
    with pytest.raises(TypeError, match='`axs` must be an `Axes`'): interp.plot_top(axs=3)
    with pytest.raises(ValueError, match='`axs` must be an array of 3x2 axes'): interp.plot_top(axs=plt.figure().subplots(2))
    plt.close('all')
