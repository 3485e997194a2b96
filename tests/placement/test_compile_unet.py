"A U-Net trains compiled as it does eagerly, after one call."
import fastai.callback.all  # noqa: F401
import pytest, torch

from fastai_selfattn.placement.compiled import compile_unet
from fastai_selfattn.placement.unet import unet_learner
from fastai_selfattn.walls.data import rooms_dls
from fastai_selfattn.walls.train import small_encoder

pytestmark = pytest.mark.filterwarnings('ignore')

def learner():
    torch.manual_seed(3)
    learn = unet_learner(rooms_dls(8, 64, bs=2), small_encoder, pretrained=False, self_attention='decoder.2', gamma=.7, n_out=2)
    return learn

def step(learn, x, y):
    "Loss, gradients and buffers of one training step"
    loss = learn.loss_func(learn.model.train()(x), y)
    loss.backward()
    return [loss, *(p.grad for p in learn.model.parameters() if p.grad is not None), *learn.model.buffers()]

def test_compiled_training_is_training(counts):
    eager, learn = learner(), compile_unet(learner(), backend='aot_eager', fullgraph=True)
    assert list(learn.model.state_dict()) == list(eager.model.state_dict())
    x, y = (t.as_subclass(torch.Tensor) for t in learn.dls.train.one_batch())
    got, want = step(learn, x, y), step(eager, x, y)
    assert len(got) == len(want) > 100
    for a, b in zip(got, want): torch.testing.assert_close(a, b.as_subclass(torch.Tensor), atol=1e-4, rtol=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.recorder.values) == 1

def test_the_compiled_code_runs(counts):
    learn = compile_unet(learner(), backend=counts)
    with learn.no_bar(): learn.get_preds(ds_idx=1)
    assert counts.compiled == 1 and counts.ran >= 1

def test_only_learners_compile():
    with pytest.raises(TypeError, match='must be a Learner'): compile_unet(torch.nn.Linear(2, 2))

@pytest.mark.parametrize('options', [dict(colour=3), dict(backend='none such')])
def test_options_that_nobody_knows_change_nothing(options):
    learn = learner()
    modules, cbs = [id(m) for m in learn.model.modules()], list(learn.cbs)
    with pytest.raises(Exception, match='colour|none such'): compile_unet(learn, **options)
    assert [id(m) for m in learn.model.modules()] == modules and list(learn.cbs) == cbs
