"The wall job from outside: data sets good and bad, repainting, and the two commands"
import os
import re
import signal
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import root
from PIL import Image
from processes import python, started

from fastai_selfattn.walls import commands as walls
from fastai_selfattn.walls.rooms import make_rooms
from fastai_selfattn.walls.train import evaluate_walls, small_encoder, wall_learner
from fastai_selfattn.walls.data import mask_of, open_mask, open_photo, rooms_dls, split_walls, wall_dls, wall_items
from fastai_selfattn.walls.paint import recolor, wall_probability
from fastai_selfattn.walls.commands import recolor_main, walls_main
from fastai_selfattn.walls.report import plot_predictions, plot_recolored

TINY = '--epochs 1 --bs 4 --size 32'.split()

@pytest.fixture(scope='module')
def rooms(tmp_path_factory): return make_rooms(tmp_path_factory.mktemp('data')/'rooms', n=13, size=(40, 56), seed=3)

@pytest.fixture(scope='module')
def finished(tmp_path_factory, rooms):
    "A finished run, and what it printed"
    out = tmp_path_factory.mktemp('runs')/'run'
    with redirect_stdout(said := StringIO()): assert walls_main([*TINY, '--data', str(rooms), '--out', str(out)]) == 0
    return out, said.getvalue()

@pytest.fixture
def data(tmp_path):
    "A small data set of several sizes and formats, to be spoiled"
    d, rng = tmp_path/'data', np.random.default_rng(0)
    for sub in ('images', 'masks'): (d/sub).mkdir(parents=True)
    for i in range(7):
        h, w = 30 + 3*i, 50 - 2*i
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(d/'images'/f'p{i}.{"jpg" if i % 2 else "png"}')
        Image.fromarray(np.uint8(rng.integers(0, 2, (h, w)))).save(d/'masks'/f'p{i}.png')
    return d

def nothing_new(folder):
    before = sorted(folder.rglob('*'))
    return lambda: sorted(folder.rglob('*')) == before


# --- reading ---

def test_photo_is_turned_as_its_exif_says(tmp_path):
    a = np.zeros((20, 30, 3), np.uint8); a[:5] = 255                  # bright above
    exif = Image.Exif(); exif[0x0112] = 6                             # stored turned: rotate 90 degrees clockwise to view
    Image.fromarray(a).save(tmp_path/'p.jpg', exif=exif, quality=100)
    upright = np.asarray(open_photo(tmp_path/'p.jpg'))
    assert upright.shape == (30, 20, 3) and upright[:, -4:].min() > 200 and upright[:, :10].max() < 50
    assert np.array_equal(upright, np.asarray(open_photo(Image.open(tmp_path/'p.jpg'))))

@pytest.mark.parametrize('mode', ['L', 'P', 'RGB', 'RGBA', 'LA', '1', 'I;16'])
def test_any_kind_of_mask(tmp_path, mode):
    want = np.arange(35).reshape(5, 7) % 3 == 1
    grey = Image.fromarray(np.uint8(want * 255))
    if mode == 'P': img = Image.fromarray(np.uint8(want)); img.putpalette([9, 9, 9, 200, 0, 0])
    elif mode == 'I;16': img = Image.fromarray(np.uint16(want * 700))
    else: img = grey.convert(mode)
    img.save(tmp_path/'m.png')
    assert np.array_equal(open_mask(tmp_path/'m.png'), want)

def test_wall_code_and_jpeg_masks(tmp_path):
    codes = np.arange(35, dtype=np.uint8).reshape(5, 7) % 4
    Image.fromarray(codes).save(tmp_path/'m.png')
    assert np.array_equal(open_mask(tmp_path/'m.png', 2), codes == 2)
    with pytest.raises(ValueError, match='the codes 1, 2, 3'): open_mask(tmp_path/'m.png')
    half = np.zeros((32, 32), np.uint8); half[:, 11:] = 255
    Image.fromarray(half).save(tmp_path/'m.jpg', quality=60)
    assert (np.asarray(Image.open(tmp_path/'m.jpg'))[:, :11] > 0).any()              # JPEG does blur the zeros
    assert np.array_equal(open_mask(tmp_path/'m.jpg'), half > 0)
    for f in ('m.jpg', 'rgb.png'):
        Image.fromarray(half).convert('RGB').save(tmp_path/'rgb.png')
        with pytest.raises(ValueError, match='cannot hold the wall code 2'): open_mask(tmp_path/f, 2)

def test_pictures_and_masks_are_matched_by_stem(data):
    (data/'masks'/'p0.extra.png').write_bytes((data/'masks'/'p1.png').read_bytes())     # no picture has this stem
    items = wall_items(data)
    assert [f.name for f in items] == ['p0.png', 'p1.jpg', 'p2.png', 'p3.jpg', 'p4.png', 'p5.jpg', 'p6.png']
    assert [mask_of(f).name for f in items] == [f'p{i}.png' for i in range(7)]

@pytest.mark.parametrize('spoil,says', [
    (lambda d: (d/'masks'/'p3.png').unlink(), 'p3.jpg has no mask'),
    (lambda d: [f.unlink() for f in (d/'images').iterdir()], 'no pictures in .*images'),
    (lambda d: (d/'images').rename(d/'pictures'), 'no folder .*images'),
    (lambda d: Image.new('L', (9, 8), 1).save(d/'masks'/'p2.png'), 'p2.png has 9x8 pixels, its picture .*p2.png has 46x36'),
    (lambda d: (d/'images'/'p4.png').write_bytes((d/'images'/'p4.png').read_bytes()[:900]), 'cannot read .*p4.png as a picture'),
    (lambda d: (d/'masks'/'p4.png').write_text('no picture'), 'cannot read .*p4.png as a mask'),
    (lambda d: (d/'images'/'p1.png').write_bytes((d/'images'/'p0.png').read_bytes()), 'p1.jpg and p1.png .* share a stem'),
    (lambda d: [Image.new('L', open_photo(f).size).save(mask_of(f)) for f in (d/'images').iterdir()], 'no wall in any mask'),
])
def test_what_is_wrong_with_a_folder_is_said(data, spoil, says, capfd, monkeypatch, tmp_path):
    spoil(data)
    with pytest.raises(ValueError, match=says): wall_items(data)
    monkeypatch.chdir(tmp_path)
    same = nothing_new(tmp_path)
    assert walls_main([*TINY, '--data', str(data)]) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch(f'selfattn-walls: .*{says}.*\n', err) and same()

def test_split_is_by_seed_and_leaves_nothing_out():
    items = list(range(41))
    a, b, other = split_walls(items, 5), split_walls(items, 5), split_walls(items, 6)
    assert a == b != other and sorted(sum(a, [])) == items and [len(p) for p in a] == [29, 6, 6]
    assert [len(p) for p in split_walls(items[:4])] == [2, 1, 1]
    with pytest.raises(ValueError, match='3 pictures are too few'): split_walls(items[:3])

def test_batches(rooms):
    train, valid, _ = split_walls(wall_items(rooms))
    dls = wall_dls(train, valid, size=32, bs=3)
    x, y = dls.one_batch()
    assert x.shape == (3, 3, 32, 32) and y.shape == (3, 32, 32) and set(y.unique().tolist()) == {0, 1}
    with pytest.raises(ValueError, match='a batch of 10 cannot be filled from 9'): wall_dls(train, valid, bs=10)


# --- figures and paint ---

def test_figures_are_those_of_the_pixels(rooms):
    train, valid, test = split_walls(wall_items(rooms))
    learn = wall_learner(wall_dls(train, valid, size=32, bs=4))
    figures = evaluate_walls(learn, test + valid)
    p = torch.stack([learn.model.eval()(x).argmax(1) for x, in [learn.dls.test_dl([f], bs=1, num_workers=0).one_batch() for f in test + valid]]).flatten()
    y = torch.cat([y for _, y in learn.dls.test_dl(test + valid, with_labels=True, num_workers=0)]).flatten()
    inter = (p * y).sum().item()
    assert figures['dice'] == pytest.approx(2 * inter / (p.sum() + y.sum()).item(), abs=1e-6)
    assert figures['wall_iou'] == pytest.approx(inter / ((p + y) > 0).sum().item(), abs=1e-6)
    assert figures['all_wall_dice'] == pytest.approx(2 * y.sum().item() / (len(y) + y.sum().item()), abs=1e-6)

def test_small_encoder_has_fastais_place_and_no_pretrained_weights():
    from fastai_selfattn.attention.kinds import attention_layers
    from fastai_selfattn.placement.unet import create_unet_model
    assert list(attention_layers(create_unet_model(small_encoder, 2, (32, 48), pretrained=False, self_attention=True))) == ['layers.5.conv2.2']
    with pytest.raises(ValueError, match='no pretrained weights'): small_encoder(pretrained=True)

def test_recolor_by_hand():
    "linear light: paint * luminance / median luminance of the wall, blended with the probability along the edge of the wall"
    rng = np.random.default_rng(1)
    a = rng.integers(30, 220, (11, 13, 3), dtype=np.uint8)
    prob = torch.rand(11, 13, generator=torch.Generator().manual_seed(2))
    prob[5:9, 4:9] = .6                                               # (6, 6) and (7, 7) are inside
    out = np.asarray(recolor(Image.fromarray(a), prob, '#4080c0')).astype(int)
    lin = lambda c: np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4)
    light = lin(a / 255) @ [.2126, .7152, .0722]
    light = light / np.median(light[prob.numpy() > .5])
    for r, c in ((0, 0), (5, 7), (10, 12), (3, 4), (6, 6), (7, 7), (8, 6), (9, 2)):
        new = np.clip(lin(np.array([64, 128, 192]) / 255) * light[r, c], 0, 1)
        new = np.where(new <= .0031308, 12.92 * new, 1.055 * new**(1 / 2.4) - .055)
        wall = prob.numpy() > .5
        edge = not wall[max(r - 1, 0):r + 2, max(c - 1, 0):c + 2].all()
        alpha = wall[r, c] * (min(2 * prob[r, c].item() - .5, 1) if edge else 1)
        assert np.abs(out[r, c] - 255 * (alpha * new + (1 - alpha) * a[r, c] / 255)).max() <= 1

def test_recolor_keeps_what_is_not_wall():
    a = np.random.default_rng(0).integers(0, 255, (9, 8, 3), dtype=np.uint8)
    prob = torch.zeros(9, 8); prob[:, :3] = 1
    out = np.asarray(recolor(Image.fromarray(a), prob, 'teal'))
    assert np.array_equal(out[:, 3:], a[:, 3:]) and not np.array_equal(out[:, :3], a[:, :3])
    assert np.array_equal(np.asarray(recolor(Image.fromarray(a), prob * .4, 'teal')), a)
    with pytest.raises(ValueError, match=r'`prob` has shape \(8, 9\)'): recolor(Image.fromarray(a), prob.T, 'teal')


# --- the command selfattn-walls ---

def test_a_run_leaves_all_that_it_promises(finished, rooms):
    out, said = finished
    assert {f.name for f in out.iterdir()} == {'table.csv', 'gamma.png', 'predictions.png', 'attention.png', 'recolored.png', 'explorer.html', 'export.pkl', 'report.md'}
    assert list(pd.read_csv(out/'table.csv').columns) == ['epoch', 'train_loss', 'valid_loss', 'dice', 'wall_iou', 'gamma', 'time']
    for f in out.glob('*.png'): assert Image.open(f).convert('L').getextrema() != (255, 255)
    dice, everything = map(float, re.search(r'test Dice (\S+) \(calling everything wall: (\S+)\)', said).groups())
    gamma = float(re.search(r'gamma (\S+) \(layers.5.conv2.2\)', said)[1])
    assert gamma == pytest.approx(pd.read_csv(out/'table.csv').gamma.iloc[-1], abs=1e-4)
    assert f'selfattn-recolor --model {out}/export.pkl' in said
    report = (out/'report.md').read_text()
    assert f'Test Dice {dice:.3f}' in report and f'Dice of {everything:.3f}' in report and '| --size | 32 |' in report
    assert all((out/f).exists() for f in re.findall(r'\]\((.*?)\)', report)) and report.count('![') == 4

def test_the_command_in_a_shell_does_the_same(finished, rooms, tmp_path):
    script = Path(sys.executable).parent/'selfattn-walls'
    there = python(f'import runpy; runpy.run_path({str(script)!r}, run_name="__main__")', *TINY, '--data', rooms, '--out', tmp_path/'run', folder=tmp_path)
    out, said = finished
    end = lambda text: text[text.index('test Dice'):]
    assert end(there) == end(said).replace(str(out), str(tmp_path/'run'))
    assert sorted(f.name for f in (tmp_path/'run').iterdir()) == sorted(f.name for f in out.iterdir())

def test_the_same_seed_gives_the_same_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for seed in (7, 7, 8): assert walls_main([*TINY, '--n-rooms', '8', '--seed', str(seed)]) == 0
    tables = [pd.read_csv(tmp_path/f'walls-run-{i}'/'table.csv').drop(columns='time') for i in (1, 2, 3)]       # new folders, one after the other
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])
    room = lambda i: (tmp_path/f'walls-run-{i}'/'rooms'/'images'/'room_0005.png').read_bytes()
    assert room(1) == room(2) != room(3)

def test_without_attention(tmp_path, rooms, capfd):
    assert walls_main([*TINY, '--data', str(rooms), '--no-attention', '--out', str(tmp_path/'run')]) == 0
    assert 'gamma' not in pd.read_csv(tmp_path/'run'/'table.csv') and 'gamma' not in capfd.readouterr().out
    assert not (tmp_path/'run'/'attention.png').exists() and 'Without attention' in (tmp_path/'run'/'report.md').read_text()

@pytest.mark.parametrize('args,says', [
    ('--data nowhere', 'no folder nowhere'),
    ('--arch resnet43', r'unknown --arch resnet43: did you mean .*resnet34'),
    ('--arch alexnet2 --n-rooms 8', 'unknown --arch alexnet2'),
    ('--arch vit_b_16 --n-rooms 8 --bs 2', 'no U-Net on --arch vit_b_16'),
    ('--arch resnet18 --out there', '--out there exists'),
    ('--n-rooms 8 --bs 7', 'a batch of 7 cannot be filled from 6'),
    ('--ambiguity 1.5', '--ambiguity must be 0 to 1, not 1.5'),
    ('--ambiguity nan', 'argument --ambiguity: must be 0 or more, got nan'),
    ('--data there --ambiguity 0', '--ambiguity is for the rooms that are made without --data'),
    ('--n-rooms 3', 'argument --n-rooms: must be 4 or more, got 3'),
    ('--size 8', 'must be 32 or more, got 8'),
    ('--epochs no', "invalid int value: 'no'"),
    ('--lr 0', 'must be 1e-08 or more'),
    ('--lr nan', 'must be 1e-08 or more'),
    ('--data there --n-rooms 9', 'give one of the two'),
    ('--wall-code 2', '--data, which is not given'),
    ('--pretrained --n-rooms 8 --bs 2', 'no pretrained weights'),
    ('--epoch 2', r'unrecognized arguments: --epoch 2: did you mean --epochs\?'),
    ('--what', 'unrecognized arguments: --what')])
def test_bad_options_are_one_line_and_leave_nothing(args, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'there').mkdir()
    same = nothing_new(tmp_path)
    try: code = walls_main(['--size', '32', *args.split()])
    except SystemExit as e: code = e.code
    out, err = capfd.readouterr()
    assert code == 2 and re.fullmatch(f'selfattn-walls: .*{says}.*\n', err), err
    assert same() and 'Traceback' not in out

def test_rooms_are_made_as_ambiguous_as_asked(tmp_path, monkeypatch, capfd):
    asked = []
    def make(path, *args):
        asked.append(args)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(walls, 'make_rooms', make)
    for more in ([], ['--ambiguity', '.25']): assert walls_main([*TINY, '--n-rooms', '8', '--seed', '7', *more, '--out', str(tmp_path/'run')]) == 1
    assert asked == [(8, 32, 7, 0.), (8, 32, 7, .25)]

def test_pretrained_is_asked_of_the_encoder_and_trained_as_a_whole(tmp_path, rooms, monkeypatch, capfd):
    asked = []
    def encoder(pretrained): asked.append(pretrained); return small_encoder()
    monkeypatch.setattr(walls, '_find_arch', lambda name: encoder)
    frozen = []
    monkeypatch.setattr(walls.Learner, 'fit_one_cycle', lambda self, *a, **k: frozen.append(self.opt.frozen_idx) or self.fit(1, cbs=k['cbs']))
    assert walls_main([*TINY, '--data', str(rooms), '--pretrained', '--out', str(tmp_path/'run')]) == 0
    assert asked == [True] and frozen == [0]

def test_ctrl_c_ends_cleanly_with_the_table_so_far(tmp_path, rooms):
    out = tmp_path/'run'
    p = started('import sys; from fastai_selfattn.walls.commands import walls_main; sys.exit(walls_main())',
                '--epochs', '500', '--bs', '4', '--size', '32', '--data', rooms, '--out', out, folder=tmp_path, log=tmp_path/'log')
    for _ in range(1200):
        time.sleep(.1)
        if p.exitcode is not None or (out/'table.csv').exists() and len((out/'table.csv').read_text().splitlines()) > 2: break
    os.kill(p.pid, signal.SIGINT)
    p.join(60)
    said = (tmp_path/'log').read_text()
    assert p.exitcode == 130 and 'Traceback' not in said and f'stopped; the table so far is in {out}/table.csv' in said
    table = pd.read_csv(out/'table.csv')
    assert len(table) >= 2 and table.gamma.notna().all()


def test_what_training_needs_of_fastai_is_imported_by_the_module_itself():
    "In a process that has imported nothing else"
    code = "import fastai_selfattn.walls.train; from fastai.learner import Learner; Learner.no_bar, Learner.fit_one_cycle"
    python(code, folder=root)

@pytest.mark.parametrize('rest', [10, 128, 250])
def test_a_wall_that_is_lit_unlike_the_rest_of_the_photo(rest):
    "The light is measured on the wall alone: a wall of one light gets the very paint, however dark or bright the room around it is"
    a = np.full((9, 16, 3), rest, dtype=np.uint8)
    a[:, :5] = 140                                    # less than half of the photo, so that a median of all would be that of the rest
    prob = torch.zeros(9, 16)
    prob[:, :5] = 1
    out = np.asarray(recolor(Image.fromarray(a), prob, '#4080c0')).astype(int)
    assert np.abs(out[:, :5] - [0x40, 0x80, 0xc0]).max() <= 1 and np.array_equal(out[:, 5:], a[:, 5:])


# --- the command selfattn-recolor ---

@pytest.fixture
def photo(tmp_path):
    "A phone's photo: larger than the model's pictures, lying on its side, with a note and a colour profile"
    from PIL import ImageCms
    from fastai_selfattn.walls.rooms import render_room
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x010F] = 'A phone'
    Image.fromarray(render_room(5, (150, 210))[0]).rotate(90, expand=True).save(tmp_path/'IMG_1.JPG', exif=exif, quality=95,
                                                          icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes())
    return tmp_path/'IMG_1.JPG'

def test_a_photo_is_repainted_at_its_own_resolution(finished, photo, tmp_path):
    assert recolor_main(['--model', str(finished[0]/'export.pkl'), '--color', '#7aa6c2', '--mask', '--out', str(tmp_path/'new'), str(photo)]) == 0
    assert {f.name for f in (tmp_path/'new').iterdir()} == {'IMG_1-7aa6c2.JPG', 'IMG_1-mask.png'}
    new, mask = Image.open(tmp_path/'new'/'IMG_1-7aa6c2.JPG'), Image.open(tmp_path/'new'/'IMG_1-mask.png')
    assert new.size == mask.size == (210, 150) and set(np.unique(mask)) <= {0, 255}
    assert new.getexif()[0x010F] == 'A phone' and new.getexif().get(0x0112, 1) == 1 and new.info['icc_profile'] == Image.open(photo).info['icc_profile']
    learn = walls._load(finished[0]/'export.pkl')
    prob = wall_probability(learn, photo)
    assert np.array_equal(np.asarray(mask) == 255, prob.numpy() > .5)
    assert np.abs(np.asarray(new).astype(int) - np.asarray(recolor(open_photo(photo), prob, '#7aa6c2'))).mean() < 4      # but for JPEG

def test_exported_model_predicts_as_the_learner_did(finished, rooms):
    a, b = (walls._load(finished[0]/'export.pkl') for _ in range(2))
    f = wall_items(rooms)[0]
    assert torch.equal(wall_probability(a, f), wall_probability(b, Image.open(f))) and wall_probability(a, f).shape == (40, 56)

@pytest.mark.parametrize('change,says', [
    (lambda a: a | {'--model': 'nowhere.pkl'}, 'no model nowhere.pkl'),
    (lambda a: a | {'--model': a['photo']}, 'is not an exported Learner'),
    (lambda a: a | {'--color': 'wall-ish'}, 'unknown --color wall-ish'),
    (lambda a: a | {'photo': 'nowhere.jpg'}, 'cannot read nowhere.jpg'),
    (lambda a: a | {'photo': a['--model']}, 'cannot read .*export.pkl as a picture'),
    (lambda a: a | {'--out': a['photo']}, 'cannot make --out'),
    (lambda a: {k: v for k, v in a.items() if k != '--color'}, 'required: --color'),
])
def test_bad_input_of_recolor_is_one_line(change, says, finished, photo, tmp_path, capfd):
    args = change({'--model': str(finished[0]/'export.pkl'), '--color': 'teal', '--out': str(tmp_path/'new'), 'photo': str(photo)})
    same = nothing_new(tmp_path)
    try: code = recolor_main([*(s for k, v in args.items() if k != 'photo' for s in (k, v)), args['photo']])
    except SystemExit as e: code = e.code
    _, err = capfd.readouterr()
    assert code == 2 and re.fullmatch(f'selfattn-recolor: .*{says}.*\n', err), err
    assert same()

def test_pictures_are_not_overwritten_unless_told(finished, photo, tmp_path, capfd):
    args = ['--model', str(finished[0]/'export.pkl'), '--color', 'teal', '--out', str(tmp_path/'new')]
    assert recolor_main([*args, str(photo)]) == 0
    assert recolor_main([*args, str(photo)]) == 2 and 'exists: use --overwrite' in capfd.readouterr().err
    assert recolor_main([*args, '--overwrite', str(photo)]) == 0
    (tmp_path/'b').mkdir(); Image.open(photo).save(tmp_path/'b'/photo.name)
    assert recolor_main([*args, '--overwrite', str(photo), str(tmp_path/'b'/photo.name)]) == 2 and 'would both be written' in capfd.readouterr().err

def test_no_wall_is_said(finished, photo, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(walls, 'wall_probability', lambda learn, photo: torch.zeros(photo.size[::-1]))
    assert recolor_main(['--model', str(finished[0]/'export.pkl'), '--color', 'teal', '--out', str(tmp_path/'new'), str(photo)]) == 0
    assert 'no wall found, picture unchanged' in capfd.readouterr().out


def test_gamma_starts_where_it_is_told_and_the_report_says_what_attention_did(rooms, tmp_path):
    assert walls_main([*TINY, '--data', str(rooms), '--gamma', '.8', '--out', str(tmp_path/'run')]) == 0
    gamma = pd.read_csv(tmp_path/'run'/'table.csv')['gamma']
    assert gamma.iloc[0] == pytest.approx(.8, abs=.1)
    report = (tmp_path/'run'/'report.md').read_text()
    on, off, uniform = map(float, re.search(r'Dice ([\d.]+) \(on\), ([\d.]+) \(off\), ([\d.]+) \(uniform maps\): attention changes the features by \d+%', report).groups())
    assert on == pytest.approx(float(re.search(r'Test Dice ([\d.]+)', report)[1]), abs=1e-3) and max(on, off, uniform) <= 1

def test_without_attention_there_is_no_gamma_to_start(rooms, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: walls_main([*TINY, '--data', str(rooms), '--no-attention', '--gamma', '.8', '--out', str(tmp_path/'run')])
    assert e.value.code == 2 and '--gamma is for attention' in capsys.readouterr().err and not (tmp_path/'run').exists()

@pytest.mark.parametrize('color', [None, 5, (1, 2), (1, 2, 3, 4), (300, -5, 0), ('a', 'b', 'c')], ids=str)
def test_what_is_no_colour_is_refused(color):
    with pytest.raises(ValueError, match='`color` must be a colour'): recolor(Image.new('RGB', (3, 2)), torch.ones(2, 3), color)

def test_a_probability_is_a_tensor():
    with pytest.raises(TypeError, match='`prob` must be a tensor'): recolor(Image.new('RGB', (3, 2)), np.ones((2, 3)), 'teal')

def test_looking_for_walls_leaves_the_mode(finished, rooms):
    learn = walls._load(finished[0]/'export.pkl')
    learn.model.train()
    modes = [m.training for m in learn.model.modules()]
    wall_probability(learn, wall_items(rooms)[0])
    assert [m.training for m in learn.model.modules()] == modes and any(modes)

def test_no_pictures_is_said(finished):
    learn = walls._load(finished[0]/'export.pkl')
    for f in (plot_predictions, plot_recolored, evaluate_walls):
        with pytest.raises(ValueError, match='`items` is empty'): f(learn, [])

@pytest.mark.parametrize('bs', [0, -2])
def test_a_batch_has_pictures(bs):
    with pytest.raises(ValueError, match='`bs` must be 1 or more'): rooms_dls(8, bs=bs)
