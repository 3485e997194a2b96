"A trained Learner written in three formats predicts the same in a process that has neither fastai nor this package."
import gc, logging, json, os, threading, warnings
import fastai.callback.all  # noqa: F401
import numpy as np
import pytest, torch
from conftest import Largest, named
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ShowGraphCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, MSELossFlat
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.augment import Brightness, RandomResizedCropGPU, aug_transforms
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IntToFloatTensor, Normalize
from fasttransform import Pipeline, Transform
from fastai.vision.models import resnet18
from PIL import Image
from processes import python
from torch import nn

import fastai_selfattn.export as export_module
from fastai_selfattn.attention.layers import SelfAttention
from fastai_selfattn.attention.ops import attention_backend
from fastai_selfattn.export import Deployed, to_onnx, to_program, to_torchscript
from fastai_selfattn.placement.unet import unet_learner
from fastai_selfattn.walls.data import rooms_dls
from fastai_selfattn.walls.train import small_encoder

pytestmark = pytest.mark.filterwarnings('ignore')

def timm_resnet(pretrained=False):
    import timm
    return timm.create_model('resnet10t', pretrained=pretrained)

ELSEWHERE = '''
import functools, sys, numpy as np, onnxruntime, torch

@functools.cache
def runs(f):
    if f.endswith('.onnx'):
        session = onnxruntime.InferenceSession(f)
        return lambda x: session.run(None, {'picture': x})[0]
    model = torch.export.load(f).module() if f.endswith('.pt2') else torch.jit.load(f)
    return lambda x: model(torch.tensor(x)).numpy()

for i, f in enumerate(sys.argv[1:]): np.save(f'{i}.y.npy', runs(f)(np.load(f'{i}.x.npy')))
assert not {'fastai', 'fastai_selfattn'} & set(sys.modules)
'''

def elsewhere(folder, *pairs):
    "What files in `folder` make of pictures, pairs of a name and (bs, c, h, w), run in another process"
    for i, (_, x) in enumerate(pairs): np.save(folder/f'{i}.x.npy', np.asarray(x, np.float32))
    python(ELSEWHERE, *[name for name, _ in pairs], folder=folder)
    return [np.load(folder/f'{i}.y.npy') for i in range(len(pairs))]

def wall_finder(arch, size):
    torch.manual_seed(3)
    learn = unet_learner(rooms_dls(8, size, bs=2), arch, self_attention=True, pretrained=False, n_out=2)
    for m in learn.model.modules():
        if isinstance(m, SelfAttention): nn.init.constant_(m.gamma, .7)
    return learn

def read(files): return np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files]).transpose(0, 3, 1, 2)/255

def predicted(learn, dls, files):
    with learn.no_bar(): return learn.get_preds(dl=dls.test_dl(files))[0]

def write_traced_once(learn, folder, monkeypatch):
    "The program and the ONNX file of a Learner; tracing a U-Net twice would take seconds more and give the same program"
    program = to_program(learn, folder/'model.pt2')
    def traced(*args):
        assert args == (learn, None, None, 'probs', True)
        return program
    with monkeypatch.context() as m:
        m.setattr(export_module, 'to_program', traced)
        to_onnx(learn, folder/'model.onnx')

@pytest.mark.parametrize('size', [(8, 12), [8, 12], np.array([8, 12])], ids=str)
def test_sizes_are_two_numbers_of_any_kind(size):
    assert export_module._example(wall_finder(small_encoder, 16), size).shape[-2:] == (8, 12)

@pytest.mark.slow
@pytest.mark.parametrize('arch,larger', [(small_encoder, 256), (resnet18, None), (timm_resnet, None)], ids=named)
def test_every_format_predicts_as_the_learner(arch, larger, one_registry, tmp_path, monkeypatch):
    "Traced with two pictures of 64x64, and run on three, and on larger ones; TorchScript is for one size"
    pytest.importorskip('onnxruntime')
    learn = wall_finder(arch, 64)
    pairs, wants = [], []
    for dls, size in [(learn.dls, 64)] + ([(rooms_dls(8, larger, bs=2), larger)] if larger else []):
        files = list(dls.train_ds.items[:3])
        x, want = read(files), predicted(learn, dls, files).numpy()
        assert len(files) == 3 and x.shape[2:] == (size, size) and np.ptp(want[:, 0]) > .1 and np.abs(want[0]-want[1]).max() > .01
        to_torchscript(learn, tmp_path/f'{size}.pt', size=size)
        pairs += [(name, x) for name in ('model.pt2', 'model.onnx', f'{size}.pt')]
        wants += [want]*3
    if larger:     # sides that differ
        x = torch.rand(1, 3, 96, 160)
        with torch.no_grad(): want = Deployed(learn)(x).numpy()
        pairs += [(name, x) for name in ('model.pt2', 'model.onnx')]
        wants += [want]*2
    write_traced_once(learn, tmp_path, monkeypatch)
    for (name, x), got, want in zip(pairs, elsewhere(tmp_path, *pairs), wants):
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=f'{name} {x.shape}')
    assert np.array_equal(predicted(learn, learn.dls, learn.dls.train_ds.items[:3]), wants[0])

@pytest.mark.slow
def test_onnx_of_other_sizes(one_registry, tmp_path):
    "Of a net that has a class for each pixel; U-Nets are above"
    pytest.importorskip('onnxruntime')
    learn, _ = classifier(CrossEntropyLossFlat(axis=1), nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), SelfAttention(16, gamma=1.), nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 1))
    to_onnx(learn, tmp_path/'model.onnx', output='classes')
    x = torch.rand(1, 3, 96, 160)
    got, = elsewhere(tmp_path, ('model.onnx', x))
    with torch.no_grad(): want = Deployed(learn, 'classes')(x)
    assert got.shape == (1, 96, 160) and (got == want.numpy()).mean() > .999 and len(np.unique(got)) > 1

def pictures_dls(normalize=True, n=8):
    "Pictures of three classes"
    rng = np.random.default_rng(0)
    ims = [PILImage.create(rng.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(n)]
    tfms = [Normalize.from_stats([.2, .3, .4], [.5, .6, .7])] if normalize else []
    block = DataBlock((ImageBlock, CategoryBlock(['a', 'b', 'c'])), get_x=lambda i: ims[i], get_y=lambda i: 'abc'[i % 3], batch_tfms=tfms)
    return block.dataloaders(list(range(n)), bs=2, num_workers=0), ims

def classifier(loss, *layers, normalize=True):
    torch.manual_seed(5)
    dls, ims = pictures_dls(normalize)
    layers = layers or (nn.Conv2d(3, 16, 3, 2), nn.ReLU(), SelfAttention(16, gamma=1.), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    return Learner(dls, nn.Sequential(*layers), loss_func=loss), ims

@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('output', ['probs', 'classes', 'raw'])
def test_outputs_are_those_of_predict(output, normalize):
    learn, ims = classifier(CrossEntropyLossFlat(), normalize=normalize)
    x = torch.tensor(np.stack([np.asarray(i) for i in ims[:3]]).transpose(0, 3, 1, 2)/255, dtype=torch.float32)
    got = Deployed(learn, output)(x)
    for i, y in enumerate(got):
        with learn.no_bar(): _, label, probs = learn.predict(ims[i])
        if output == 'probs': torch.testing.assert_close(y, probs.as_subclass(torch.Tensor))
        elif output == 'classes': assert y == label
        else: torch.testing.assert_close(y.softmax(0), probs.as_subclass(torch.Tensor)), y.sum() != 1

@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), BCEWithLogitsLossFlat(thresh=.7), CrossEntropyLossFlat(), FocalLossFlat()], ids=lambda l: type(l).__name__)
def test_classes_are_decoded_from_what_the_activation_gives(loss):
    "Logits of 0.1 to 0.8 are probabilities of 0.52 to 0.69, on the other side of a threshold of 0.5 or 0.7"
    learn, _ = classifier(loss, nn.AdaptiveAvgPool2d(1), nn.Flatten(), normalize=False)
    x = torch.tensor([[.1, .3, .8], [.2, .9, -.5]])[..., None, None].expand(-1, -1, 6, 5)
    want = loss.decodes(loss.activation(x[:, :, 0, 0]))
    assert Deployed(learn, 'classes')(x).equal(want) and (want.dtype != torch.bool or not want.equal(x[:, :, 0, 0] > loss.thresh))

class Log(Transform):
    order = 95
    def encodes(self, x:TensorImage): return torch.log1p(x)

class Turn(Transform):
    "The channels"
    order = 50
    def encodes(self, x:TensorImage): return x[:, [2, 1, 0]]

class Grey(Transform):
    order = 50
    def encodes(self, x:TensorImage): return x.mean(1, keepdim=True).expand_as(x)

class Posterize(Transform):
    "Of bytes, which come before `IntToFloatTensor`"
    def encodes(self, x:TensorImage): return x & 0b11000000

class Fit(Transform):
    "What was normalised"
    order = 200
    def encodes(self, x:TensorImage): return x.clamp(0, 1)

@pytest.mark.parametrize('tfms,says', [([Log()], 'transform Log changes'), ([Turn()], 'transform Turn changes'), ([Grey()], 'transform Grey changes'),
    ([Posterize()], 'transform Posterize changes'), ([Fit()], 'transform Fit changes'), ([IntToFloatTensor(div=127)], 'transform IntToFloatTensor changes'),
    (aug_transforms(), None), (aug_transforms(size=24), None), ([RandomResizedCropGPU(24)], None), ([Brightness(.9, 1.)], None)], ids=lambda v: 'x'.join(type(t).__name__ for t in v or []) if isinstance(v, list) else '')
def test_what_changes_pictures_at_validation_is_no_secret(tfms, says):
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: pictures_dls()[1][i], get_y=lambda i: 'abc'[i % 3], batch_tfms=[*tfms, Normalize.from_stats([.2, .3, .4], [.5, .6, .7])])
    learn = Learner(block.dataloaders(list(range(8)), bs=2, num_workers=0), nn.Conv2d(3, 2, 1), loss_func=CrossEntropyLossFlat())
    state = torch.get_rng_state()
    if says:
        with pytest.raises(ValueError, match=says): Deployed(learn)
    else: Deployed(learn)
    assert torch.get_rng_state().equal(state)

class Invert(Transform):
    order = 50
    def encodes(self, x:TensorImageBW): return 1-x

def test_pictures_are_of_the_class_that_would_be_read(tmp_path):
    "A transform for pictures in black and white is seen where there is no data too"
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=a_or_b, batch_tfms=[Invert()])
    for name in ('a.png', 'b.png'): Image.new('L', (12, 8), 90).save(tmp_path/name)
    files = [tmp_path/'a.png', tmp_path/'b.png']*2
    learn = Learner(block.dataloaders(files, bs=2, num_workers=0), nn.Conv2d(1, 2, 1), loss_func=CrossEntropyLossFlat())
    learn.export(tmp_path/'learn.pkl')
    for l in (learn, load_learner(tmp_path/'learn.pkl')):
        with pytest.raises(ValueError, match='transform Invert changes'): Deployed(l)

def a_or_b(f): return f.stem

class Other(Normalize):
    "Of another formula"
    def encodes(self, x:TensorImage): return (x-self.mean)/self.std*2

class Same(Normalize): "A subclass that changes nothing"

def normalize(cls=Normalize): return cls(torch.tensor([.2, .3, .4])[None, :, None, None], torch.tensor([.5, .6, .7])[None, :, None, None])

def tensor_learner(kind, tfms):
    "A Learner of batches of class `kind`, and pictures before transforms"
    pictures = torch.rand(4, 3, 10, 12, generator=torch.Generator().manual_seed(1))
    dl = DataLoader([(x.as_subclass(kind), torch.tensor(0)) for x in pictures], bs=2)
    dl.after_batch = Pipeline(tfms)
    dl.after_batch.split_idx = 1
    torch.manual_seed(0)
    return Learner(DataLoaders(dl, dl), nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), loss_func=CrossEntropyLossFlat()), pictures

@pytest.mark.parametrize('kind', [TensorImage, torch.Tensor], ids=named)
@pytest.mark.parametrize('cls', [Normalize, Same], ids=named)
def test_normalisation_is_what_pictures_of_their_class_get(kind, cls):
    "fastai's `Normalize` leaves plain tensors alone"
    learn, pictures = tensor_learner(kind, [normalize(cls)])
    x = pictures if kind is torch.Tensor else (pictures-torch.tensor([.2, .3, .4])[:, None, None])/torch.tensor([.5, .6, .7])[:, None, None]
    with torch.no_grad(): torch.testing.assert_close(Deployed(learn)(pictures), learn.model.eval()(x).softmax(-1))

@pytest.mark.parametrize('tfms', [lambda: [normalize(), normalize()], lambda: [normalize(Other)]], ids=['two', 'other'])
def test_another_normalisation_is_refused(tfms):
    with pytest.raises(ValueError, match='one `Normalize` alone'): Deployed(tensor_learner(TensorImage, tfms())[0])
    Deployed(tensor_learner(torch.Tensor, tfms())[0])

class Sized(nn.Module):
    "What depends on the size of a picture"
    def __init__(self, f):
        super().__init__()
        self.conv, self.f = nn.Conv2d(3, 4, 3, padding=1), f
    def forward(self, x): return self.f(self.conv(x))

@pytest.mark.parametrize('f,program,onnx', [
    (lambda x: x+torch.linspace(0, 1, x.shape[3]), 'bs h', 'bs h'),                                 # fixed, though a symbol stands there
    (lambda x: x*int(x.shape[2]), 'bs w', 'bs w'),
    (lambda x: x/(x.shape[2]*x.shape[3])**.5 if x.shape[2]*x.shape[3] == 480 else x, 'bs', 'bs'),   # one guard over both
    (lambda x: x+nn.functional.interpolate(nn.functional.adaptive_avg_pool2d(x, 3), size=x.shape[2:]), 'bs h w', 'bs'),
    (lambda x: x+nn.functional.adaptive_avg_pool2d(x, 1), 'bs h w', 'bs h w'),
    (lambda x: x+nn.functional.interpolate(nn.functional.max_pool2d(x, 2), scale_factor=2), 'bs h w', 'bs h w')],
    ids=['linspace', 'int', 'area', 'pool to 3', 'pool to 1', 'even'])
def test_sides_are_open_where_other_numbers_give_the_right_answer(f, program, onnx, one_registry, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    learn, _ = classifier(nn.CrossEntropyLoss(), Sized(f), normalize=False)
    to_program(learn, tmp_path/'m.pt2', size=(20, 24)), to_onnx(learn, tmp_path/'m.onnx', size=(20, 24))
    torch.export.load(tmp_path/'m.pt2', extra_files=(extra := {'about.json': ''}))
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    about = [json.loads(t)['dynamic'] for t in (extra['about.json'], session.get_modelmeta().custom_metadata_map['about'])]
    assert about == [program.split(), onnx.split()]
    sides = [20, 24]
    assert [s if isinstance(s, int) else 'open' for s in session.get_inputs()[0].shape[2:]] == [n if side not in onnx else 'open' for n, side in zip(sides, 'hw')]
    for h, w in ((20, 24), (40, 24), (20, 48), (26, 30)):
        if (h == 20 or 'h' in onnx) and (w == 24 or 'w' in onnx):
            x = torch.rand(3, 3, h, w)
            with torch.no_grad(): np.testing.assert_allclose(session.run(None, {'picture': x.numpy()})[0], Deployed(learn)(x), atol=1e-5)

def test_sides_are_closed_where_a_guard_cannot_be_read():
    learn, _ = classifier(nn.CrossEntropyLoss(), Sized(lambda x: x), normalize=False)
    program, x = to_program(learn, size=20), torch.rand(2, 3, 20, 20)
    assert export_module._dynamic(program, x) == ['bs', 'h', 'w']
    program._guards_code = ["L['x'].stride()[0] == 1"]
    assert export_module._dynamic(program, x) == []

def test_a_module_may_be_called_as_a_pooling_is(one_registry, tmp_path):
    net = nn.Sequential()
    net.adaptive_pool = nn.Conv2d(3, 2, 1)
    to_onnx(classifier(nn.CrossEntropyLoss(), net, normalize=False)[0], tmp_path/'m.onnx')

def test_normalisation_that_cannot_be_tried_stays(monkeypatch):
    "As of pictures on another device than its numbers"
    learn, pictures = tensor_learner(TensorImage, [normalize()])
    want = Deployed(learn)(pictures)
    def fails(self, x, *args, f=Normalize.__call__, **kwargs):
        if len(x) == 1: raise RuntimeError('Expected all tensors to be on the same device')
        return f(self, x, *args, **kwargs)
    monkeypatch.setattr(Normalize, '__call__', fails)
    assert Deployed(learn)(pictures).equal(want)

def test_files_written_inside_autocast_hold_none_of_it(one_registry, tmp_path):
    learn, x = attentive((12, 16))
    with torch.autocast('cpu', torch.bfloat16):
        program = to_program(learn, tmp_path/'m.pt2', size=(12, 16))
        to_torchscript(learn, tmp_path/'m.pt', size=(12, 16)), to_onnx(learn, tmp_path/'m.onnx', size=(12, 16))
    with torch.no_grad():
        want = Deployed(learn)(x)
        for f in (program.module(), torch.export.load(tmp_path/'m.pt2').module(), torch.jit.load(tmp_path/'m.pt')): torch.testing.assert_close(f(x), want, atol=1e-5, rtol=1e-4)

def test_weights_of_a_large_onnx_file_have_its_name(one_registry, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip('onnxruntime')
    from torch.onnx._internal.exporter import _onnx_program
    monkeypatch.setattr(_onnx_program, '_LARGE_MODEL_THRESHOLD', 0)
    learn, x = attentive((12, 16))
    for _ in range(2):     # over one that is there too
        to_onnx(learn, tmp_path/'m.onnx')
        assert sorted(f.name for f in tmp_path.iterdir()) == ['m.onnx', 'm.onnx.data']
    (tmp_path/'moved').mkdir()
    for f in ('m.onnx', 'm.onnx.data'): (tmp_path/f).rename(tmp_path/'moved'/f)
    got, = onnxruntime.InferenceSession(tmp_path/'moved'/'m.onnx').run(None, dict(picture=x.numpy()))
    with torch.no_grad(): torch.testing.assert_close(torch.tensor(got), Deployed(learn)(x), atol=1e-4, rtol=1e-4)

def test_onnx_names_the_packages_that_it_needs(tmp_path, monkeypatch):
    learn, _ = classifier(CrossEntropyLossFlat())
    monkeypatch.setattr(export_module, 'find_spec', lambda name: name != 'onnxscript')
    with pytest.raises(ImportError, match='pip install onnx onnxscript'): to_onnx(learn, tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())

def test_batches_of_something_else_than_pictures(tmp_path):
    dl = DataLoader([(torch.rand(3, 8), torch.tensor(0))]*4, bs=2)
    learn = Learner(DataLoaders(dl, dl), nn.Conv1d(3, 2, 1), loss_func=CrossEntropyLossFlat())
    for write in (to_program, to_onnx, to_torchscript):
        with pytest.raises(ValueError, match=r'pictures \(bs, c, h, w\) are wanted, a batch of this Learner\'s is \(2, 3, 8\)'): write(learn, tmp_path/'m')

def test_pictures_of_one_channel(tmp_path):
    "Also of a Learner without data"
    dls, _ = pictures_dls()
    learn = Learner(dls, nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), loss_func=CrossEntropyLossFlat())
    learn.dls = dls.new_empty()
    learn.dls.valid.after_batch = learn.dls.train.after_batch = Pipeline([])
    extra = {'about.json': ''}
    to_program(learn, tmp_path/'model.pt2', size=12)
    torch.export.load(tmp_path/'model.pt2', extra_files=extra)
    assert json.loads(extra['about.json'])['picture'] == 'float32 (bs, 1, h, w), values 0 to 1'

def test_about_names_what_is_there():
    "The classes of masks stand elsewhere than those of labels"
    _, ims = pictures_dls()
    block = DataBlock((ImageBlock, MaskBlock(['floor', 'wall'])), get_x=lambda i: ims[i], get_y=lambda i: np.zeros((20, 24), np.uint8))
    learn = Learner(block.dataloaders(list(range(8)), bs=2, num_workers=0), nn.Conv2d(3, 2, 1), loss_func=CrossEntropyLossFlat(axis=1))
    assert json.loads(export_module._about(learn, 'probs', torch.rand(1, 3, 8, 9), []))['classes'] == ['floor', 'wall']
    assert export_module._names([['a', 'b'], ['c', 1]]) == [['a', 'b'], ['c', '1']] and export_module._names(None) is None
    plain, _ = classifier(nn.CrossEntropyLoss())
    assert Deployed(plain).output == 'raw' and Deployed(classifier(MSELossFlat())[0]).output == 'raw'
    with pytest.raises(ValueError, match='has no `decodes`'): Deployed(classifier(MSELossFlat())[0], 'classes')

@pytest.mark.parametrize('name', ['tiled', 'auto'])
def test_a_file_needs_no_package_whatever_backend_was_asked_for(name, tmp_path):
    learn, x = attentive((12, 16))
    with attention_backend(name): program = to_program(learn, size=(12, 16))
    assert 'fastai_selfattn' not in str(program.graph)
    with torch.no_grad(): torch.testing.assert_close(program.module()(x), Deployed(learn)(x), atol=1e-5, rtol=1e-4)

class Branch(nn.Module):
    def forward(self, x): return x if x.mean() > .5 else -x

def test_torchscript_does_not_hide_a_branch(tmp_path):
    learn, _ = classifier(CrossEntropyLossFlat(), Branch(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), normalize=False)
    with pytest.raises(ValueError, match='depends on the numbers of a picture'): to_torchscript(learn, tmp_path/'model.pt')
    assert not list(tmp_path.iterdir())

class Two(nn.Module):
    def forward(self, x): return x, x

class Fails(nn.Module):
    def forward(self, x): raise IndexError('an error of its own')

@pytest.mark.parametrize('layer,write,error,says', [
    (Branch, to_program, ValueError, 'cannot record this model as a program .*numbers'), (Branch, to_onnx, ValueError, 'as a program'),
    *((Two, write, ValueError, "must give one tensor, .* gives a tuple") for write in (to_program, to_onnx, to_torchscript)),
    *((Fails, write, IndexError, 'an error of its own') for write in (to_program, to_onnx, to_torchscript))], ids=named)
def test_a_model_that_cannot_be_recorded_is_one_sentence(layer, write, error, says, tmp_path):
    learn, _ = classifier(CrossEntropyLossFlat(), *((layer(),) if layer is Two else (layer(), nn.AdaptiveAvgPool2d(1), nn.Flatten())), normalize=False)
    with pytest.raises(error, match=says) as raised: write(learn, tmp_path/'model.pt2')
    assert '\n' not in str(raised.value) and not list(tmp_path.iterdir())

class Locked(nn.Identity):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

def test_a_model_that_cannot_be_copied(tmp_path):
    learn, _ = classifier(CrossEntropyLossFlat(), Locked(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), normalize=False)
    for write in (to_program, to_onnx, to_torchscript):
        with pytest.raises(ValueError, match=r'must be something that can be copied, and this Sequential cannot: TypeError: .*lock'): write(learn, tmp_path/'model')
    assert not list(tmp_path.iterdir())

class OfTwo(nn.Module):
    "A loss of a model with two outputs, whose activation chooses"
    def forward(self, out, y): return nn.functional.cross_entropy(out[0], y)
    def activation(self, out): return out[0].softmax(-1)
    def decodes(self, out): return out.argmax(-1)

def test_the_activation_may_choose_among_outputs(tmp_path):
    learn, _ = classifier(OfTwo(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Two(), normalize=False)
    for write in (to_program, to_onnx, to_torchscript): write(learn, tmp_path/'model')
    assert to_program(learn, output='classes').module()(torch.rand(2, 3, 20, 24)).shape == (2,)

class Scales(Callback):
    def before_batch(self): self.learn.xb = (self.xb[0]*2,)

class Trains(Callback):
    run_valid = False
    def before_batch(self): pass

class Counts(Callback):
    def after_batch(self): pass

@pytest.mark.parametrize('cbs,said', [([Scales()], 'what Scales may do'), ([Trains(), Counts(), MixUp(), ShowGraphCallback()], None)], ids=named)
def test_callbacks_that_change_batches_stay_behind_and_it_is_said(cbs, said):
    learn, _ = classifier(CrossEntropyLossFlat())
    learn.add_cbs(cbs)
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        Deployed(learn)
    assert [said in str(w.message) for w in got] == ([True] if said else [])

class Calibrated(CrossEntropyLossFlat):
    "With a temperature that is learned"
    def __init__(self): super().__init__(); self.temperature = nn.Parameter(torch.tensor(2.))
    def activation(self, x): return (x/self.temperature).softmax(-1)

class CalibratedModule(nn.Module):
    def __init__(self): super().__init__(); self.temperature = nn.Parameter(torch.tensor(2.))
    def forward(self, x, y): return nn.functional.cross_entropy(x/self.temperature, y)
    def activation(self, x): return (x/self.temperature).softmax(-1)

@pytest.mark.parametrize('loss', [Calibrated, CalibratedModule], ids=named)
def test_a_loss_may_have_learned_numbers(loss, tmp_path):
    learn, _ = classifier(loss(), normalize=False)
    x = torch.rand(2, 3, 20, 24)
    with torch.no_grad(): want = (learn.model.eval()(x)/2).softmax(-1)
    to_torchscript(learn, tmp_path/'m.pt')
    for f in (to_program(learn).module(), torch.jit.load(tmp_path/'m.pt')): torch.testing.assert_close(f(x), want, atol=1e-5, rtol=1e-4)
    assert learn.loss_func.temperature.requires_grad and not Deployed(learn)(x).requires_grad

class Keeps(nn.Module):
    def forward(self, x):
        self.last = x
        return x

@pytest.mark.parametrize('layers', [lambda: (Keeps(),), lambda: (nn.utils.spectral_norm(nn.Conv2d(16, 16, 1)),), lambda: (nn.utils.weight_norm(nn.Conv2d(16, 16, 1)),)], ids=['kept', 'spectral', 'weight'])
def test_after_a_pass_whose_graph_is_kept(layers):
    learn, _ = classifier(CrossEntropyLossFlat(), nn.Conv2d(3, 16, 3, 2), *layers(), SelfAttention(16, gamma=1.), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3), normalize=False)
    x = torch.rand(2, 3, 20, 24)
    learn.model.train()(x)
    model = learn.model.eval()
    with torch.no_grad(): want = model(x).softmax(-1)
    learn.model.train()(x)
    kept = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    assert any(t.grad_fn is not None for t in kept)
    got = Deployed(learn)(x)
    assert all(a is b for a, b in zip(kept, [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]))
    if isinstance(learn.model[1], Keeps): torch.testing.assert_close(got, want)
    else: torch.testing.assert_close(got, want, atol=.05, rtol=.05)     # the power iteration went one step

class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 3)
        self.attention = nn.utils.spectral_norm(nn.MultiheadAttention(16, 2, batch_first=True), name='in_proj_weight')
        self.gru = nn.utils.weight_norm(nn.GRU(16, 16, batch_first=True), 'weight_hh_l0')
    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.last(self.gru(self.attention(x, x, x, need_weights=False)[0])[0].mean(1))

def test_norms_over_weights_of_other_names_are_made_plain():
    learn, _ = classifier(CrossEntropyLossFlat(), Attends(), normalize=False)
    x = torch.rand(2, 3, 20, 24)
    with torch.no_grad(): want = learn.model.eval()(x).softmax(-1)
    deployed = Deployed(learn)
    torch.testing.assert_close(deployed(x), want)
    assert {n for n, _ in deployed.named_parameters() if 'attention.' in n} == {f'model.0.attention.{n}' for n in ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias')}

@pytest.mark.parametrize('layer', [lambda x: nn.functional.dropout(x, .5), lambda x: x.mul_(2)], ids=['random', 'in place'])
def test_torchscript_of_what_draws_or_writes(layer, tmp_path):
    class Layer(nn.Module):
        def forward(self, x): return layer(x)
    learn, _ = classifier(CrossEntropyLossFlat(), Layer(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), normalize=False)
    state = torch.get_rng_state()
    to_torchscript(learn, tmp_path/'model.pt')
    assert torch.get_rng_state().equal(state)

def test_a_full_disk_is_not_the_models_fault(tmp_path, monkeypatch):
    learn, _ = classifier(CrossEntropyLossFlat())
    def full(self, data): raise OSError(28, 'No space left on device', str(self))
    monkeypatch.setattr('pathlib.Path.write_bytes', full)
    for write in (to_program, to_torchscript):
        with pytest.raises(OSError, match='No space left'): write(learn, tmp_path/'model')
    assert not list(tmp_path.iterdir())

def test_a_recorder_that_fails_is_one_sentence(tmp_path, monkeypatch):
    learn, _ = classifier(CrossEntropyLossFlat())
    def fails(*args, **kwargs): raise KeyError('first line\nsecond line')
    monkeypatch.setattr(export_module.torch.onnx, 'export', fails), monkeypatch.setattr(export_module.torch.jit, 'trace', fails)
    for write, form in ((to_onnx, 'ONNX'), (to_torchscript, 'TorchScript')):
        with pytest.raises(ValueError, match=f'as {form} .KeyError') as raised: write(learn, tmp_path/'model')
        assert isinstance(raised.value.__cause__, KeyError)
    assert not list(tmp_path.iterdir())

def test_a_program_of_any_name_is_written_without_a_word(tmp_path, caplog):
    learn, _ = classifier(CrossEntropyLossFlat())
    to_program(learn, tmp_path/'model')
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    with open(tmp_path/'model', 'rb') as f: torch.export.load(f)

def test_about(tmp_path):
    learn, _ = classifier(CrossEntropyLossFlat())
    to_program(learn, tmp_path/'model.pt2', output='classes'), to_torchscript(learn, tmp_path/'model.pt', size=(21, 30))
    files = dict.fromkeys(['about.json'])
    extra = {'about.json': ''}
    torch.export.load(tmp_path/'model.pt2', extra_files=extra)
    about = json.loads(extra['about.json'])
    assert about['size'] == [20, 24] and about['classes'] == ['a', 'b', 'c'] and about['prediction'] == 'classes'
    torch.jit.load(str(tmp_path/'model.pt'), _extra_files=files)
    assert json.loads(files['about.json'])['size'] == [21, 30] and json.loads(files['about.json'])['dynamic'] == ['bs']

def test_the_learner_stays_as_it_was():
    learn, ims = classifier(CrossEntropyLossFlat())
    learn.model.train(), learn.model[0].eval()
    modes = [m.training for m in learn.model.modules()]
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    state = torch.get_rng_state()
    Deployed(learn), to_program(learn)
    gc.collect()
    assert torch.get_rng_state().equal(state) and [m.training for m in learn.model.modules()] == modes
    after = learn.model.state_dict()
    assert list(after) == list(before) and all(after[k].equal(v) for k, v in before.items())
    assert all(p.requires_grad for p in learn.model.parameters())

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    learn, _ = classifier(CrossEntropyLossFlat())
    (tmp_path/'model.pt2').write_bytes(b'old')
    def half(program, f, **kwargs):
        f.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(export_module.torch.export, 'save', half)
    with pytest.raises(OSError): to_program(learn, tmp_path/'model.pt2')
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {'model.pt2': b'old'}

@pytest.mark.parametrize('kwargs,error,says', [
    (dict(output='softmax'), ValueError, "'probs', 'classes', 'raw'"), (dict(size=(8, 8, 8)), ValueError, r'one side or \(h, w\)'),
    (dict(size=0), ValueError, '1 or more pixels'), (dict(size=8.5), TypeError, 'whole number'),
    (dict(size=torch.tensor(8)), TypeError, r'whole number.*tensor\(8\)'), (dict(size='64'), TypeError, "whole number.*'64'")], ids=named)
def test_what_cannot_be(kwargs, error, says, tmp_path):
    learn, _ = classifier(CrossEntropyLossFlat())
    for write in (to_program, to_onnx, to_torchscript):
        with pytest.raises(error, match=says): write(learn, tmp_path/'model', **kwargs)
    assert not list(tmp_path.iterdir())

def test_what_no_learner_can_tell(tmp_path):
    learn, _ = classifier(MSELossFlat())
    with pytest.raises(TypeError, match='must be a Learner'): to_program(learn.model)
    with pytest.raises(FileNotFoundError, match='make it first'): to_program(learn, tmp_path/'no'/'model.pt2')
    empty = Learner(DataLoaders(DataLoader([], bs=1), DataLoader([], bs=1)), learn.model, loss_func=MSELossFlat())
    with pytest.raises(ValueError, match='give `size`'): to_program(empty)
    with pytest.raises(ValueError, match='no `decodes`'): Deployed(Learner(learn.dls, learn.model, loss_func=nn.CrossEntropyLoss()), 'classes')

PEAK = '''
import numpy as np, onnxruntime

def peak():
    "MiB; not `ru_maxrss`, which begins at that of the process that started this one"
    line = next(l for l in open('/proc/self/status') if l.startswith('VmHWM'))
    return int(line.split()[1])/2**10

session = onnxruntime.InferenceSession('model.onnx')
before = peak()
session.run(None, {'picture': np.zeros((1,3,96,96), np.float32)})
print(peak()-before)
'''

def attentive(size):
    "A net whose attention has one pixel for each of the picture's"
    torch.manual_seed(5)
    dls, _ = pictures_dls()
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), SelfAttention(16, gamma=1., scale=10.), nn.Conv2d(16, 3, 1))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(axis=1)), torch.rand(2, 3, *size)

def test_peak_memory_of_onnx_with_a_large_map(one_registry, tmp_path):
    "n x n of 96x96 would be 324 MiB"
    pytest.importorskip('onnxruntime')
    if not os.path.exists('/proc/self/status'): pytest.skip('peak memory is read from /proc')
    learn, _ = attentive((96, 96))
    def measured(name):
        with attention_backend(name): to_onnx(learn, tmp_path/'model.onnx', size=24)     # the size that it is run at is another
        return float(python(PEAK, folder=tmp_path).split()[-1])
    assert measured('auto') < 100 < 300 < measured('math')

def test_blocks_of_rows_in_a_program_and_in_torchscript(tmp_path):
    learn, _ = attentive((24, 24))
    program = to_program(learn, size=24).module()
    for size in ((33, 37), (32, 40), (16, 16)):     # 1280 is five whole blocks, 256 is one
        x = torch.rand(2, 3, *size)
        with torch.no_grad(): want = Deployed(learn)(x)
        with Largest() as largest, torch.no_grad(): got = program(x)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        n = size[0]*size[1]
        assert largest.numel <= 2*256*max(n, 256), size     # of two pictures
        to_torchscript(learn, tmp_path/'model.pt', size=size)
        scripted = torch.jit.load(tmp_path/'model.pt')
        with torch.no_grad(): torch.testing.assert_close(scripted(x), want, atol=1e-5, rtol=1e-4)
        assert ('prim::Loop' in str(scripted.inlined_graph)) == (n > 1024), size

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_precisions_become_programs_of_float32(dtype):
    learn, x = attentive((16, 16))
    learn.model.eval()(x)
    learn.model.to(dtype)
    got = to_program(learn, size=16, output='raw').module()(x)
    assert got.dtype == torch.float32 and next(learn.model.parameters()).dtype == dtype
    torch.testing.assert_close(got, Deployed(learn, 'raw')(x), rtol=1e-4, atol=1e-4)

def test_dynamic_is_true_or_false():
    with pytest.raises(TypeError, match='`dynamic` must be True or False, got str'): to_program(None, dynamic='no')
