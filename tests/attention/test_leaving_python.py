"Layers traced, saved and exported by PyTorch's older ways, on maps large enough for tiles; run without this package."
import numpy as np
import pytest, torch
from processes import python
from torch import nn

from fastai_selfattn.all import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.slow]
LAYERS = {'plain': lambda: SelfAttention(16, gamma=.5), 'options': lambda: SelfAttention(16, 4, heads=2, pool=2, gamma=.5, unit=True, scale=5.), 'pooled': lambda: PooledSelfAttention2d(16, gamma=.5),
          'paper': lambda: PaperSelfAttention(16, gamma=.5), 'simple': lambda: SimpleSelfAttention(16, gamma=.02), 'dot products': lambda: SelfAttention(16, gamma=.5, softmax=False)}

def model_and_input(layer, size):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), LAYERS[layer]()).eval().requires_grad_(False)
    return model, torch.randn(2, 3, *size)

OTHER = '''
import sys, torch
for folder in sys.argv[1:]:
    x, want = torch.load(f'{folder}/io.pt')
    print(folder, (torch.jit.load(f'{folder}/traced.pt')(x) - want).abs().max().item())
assert 'fastai_selfattn' not in sys.modules
'''

def test_traced_saved_and_loaded_elsewhere(tmp_path):
    for size in ('5x7', '29x31'):     # 899 pixels: more than `auto` computes at once
        for layer in LAYERS:
            model, x = model_and_input(layer, map(int, size.split('x')))     # never ran: its norms settle outside of what is recorded
            folder = tmp_path/f"{layer.replace(' ', '-')}-{size}"
            folder.mkdir()
            torch.jit.trace(model, x).save(folder/'traced.pt')
            torch.save((x, model(x)), folder/'io.pt')
    folders = sorted(p.name for p in tmp_path.iterdir())
    said = dict(line.split() for line in python(OTHER, *folders, folder=tmp_path).splitlines() if len(line.split()) == 2)
    assert len(folders) == 2*len(LAYERS) and said.keys() == set(folders)
    assert {name: d for name, d in said.items() if float(d) >= 1e-5} == {}

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('layer', LAYERS)
def test_the_older_onnx_exporter(layer, fused, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = model_and_input(layer, (29, 31))
    want = model(x)
    if fused: fuse_attention(model)
    torch.onnx.export(model, (x,), tmp_path/'model.onnx', dynamo=False, opset_version=17, input_names=['x'])
    got, = onnxruntime.InferenceSession(tmp_path/'model.onnx').run(None, {'x': x.numpy()})
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-4 if layer == 'simple' else 1e-5)

def test_tensorboards_graph_of_a_fresh_unet(tmp_path):
    "fastai's `TensorBoardCallback` traces the model before its first training step"
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from fastai_selfattn.placement.unet import unet_learner
    from fastai_selfattn.walls.data import rooms_dls
    from fastai_selfattn.walls.train import small_encoder
    learn = unet_learner(rooms_dls(12, 32), small_encoder, pretrained=False, self_attention=True, n_out=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=TensorBoardCallback(tmp_path, log_preds=False))
    assert list(tmp_path.glob('events*')) and len(learn.recorder.values) == 1
