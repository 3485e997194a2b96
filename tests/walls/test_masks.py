"Masks are read right or refused with a reason; folders and photos are taken as they are"
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastai_selfattn.walls.commands import walls_main
from fastai_selfattn.walls.data import mask_of, true_wall, wall_dls, wall_items
from fastai_selfattn.walls.masks import SeveralCodes, open_mask
from fastai_selfattn.walls.paint import recolor
from fastai_selfattn.walls.pictures import open_photo
from fastai_selfattn.walls.train import evaluate_walls, wall_learner

H, W = 48, 64
shape = np.zeros((H, W), bool)
shape[10:20, 15:45] = True                     # 300 pixels of 3072

def grey(v=255): return Image.fromarray(np.uint8(shape) * np.uint8(v))

def palette(idx, colours):
    img = Image.fromarray(np.uint8(idx))
    img.putpalette(np.uint8(colours).ravel().tolist())
    return img

def rgba(colour, alpha): return Image.fromarray(np.concatenate([np.broadcast_to(colour, (H, W, 3)), alpha[..., None]], -1).astype(np.uint8))

black, white = [0, 0, 0], [255, 255, 255]
coloured = np.where(shape[..., None], [200, 0, 60], 0).astype(np.uint8)
smooth = Image.new('L', (4 * W, 4 * H))
ImageDraw.Draw(smooth).ellipse((37, 41, 170, 150), fill=255)
smooth = np.array(smooth.resize((W, H), Image.Resampling.LANCZOS))

# file name -> picture, options of `save`; all mean `shape`
RIGHT = {
    'one.png': (grey(1), {}), 'white.png': (grey(), {}), 'white.bmp': (grey(), {}), 'bits.png': (grey().convert('1'), {}), 'white.gif': (grey(), {}),
    'sixteen.png': (Image.fromarray(np.uint16(shape) * 700), {}), 'int.tif': (Image.fromarray(np.int32(shape) * 70000), {}),
    'float.tif': (Image.fromarray(np.float32(shape)), {}), 'lzw.tif': (grey(), {'compression': 'tiff_lzw'}), 'g4.tif': (grey().convert('1'), {'compression': 'group4'}),
    'rgb.png': (grey().convert('RGB'), {}), 'red.png': (Image.fromarray(coloured), {}), 'rgba.png': (grey().convert('RGBA'), {}), 'la.png': (grey().convert('LA'), {}),
    'cmyk.tif': (grey().convert('RGB').convert('CMYK'), {}), 'jpeg.jpg': (grey(), {'quality': 75}), 'exact.webp': (grey().convert('RGB'), {'lossless': True}),
    'exact1.webp': (grey(1).convert('RGB'), {'lossless': True}),
    'voc.png': (palette(shape * 15, [black] + [[i * 9, 128, 0] for i in range(15)]), {}),
    # seen wrong before
    'adaptive.png': (palette(~shape, [white, black]), {}), 'adaptive2.png': (palette(np.where(shape, 1, 2), [[9, 9, 9], white, black]), {}),
    'alpha.png': (rgba(black, shape * 255), {}), 'alpha_white.png': (rgba(white, shape * 200), {}), 'alpha_both.png': (rgba(coloured, shape * 255), {}),
    'grey_alpha.png': (Image.merge('LA', [Image.new('L', (W, H), 77), grey()]), {}),
    'lossy.webp': (grey().convert('RGB'), {'quality': 50}), 'lossy.tif': (grey(), {'compression': 'jpeg'}),
}

@pytest.mark.parametrize('name', RIGHT)
def test_what_is_clear_is_read_pixel_for_pixel(tmp_path, name):
    img, how = RIGHT[name]
    img.save(tmp_path/name, **how)
    got = open_mask(tmp_path/name)
    assert got.dtype == np.uint8 and np.array_equal(got, shape)

def test_all_kinds_in_one_folder(tmp_path):
    for d in ('images', 'masks'): (tmp_path/d).mkdir()
    for name, (img, how) in RIGHT.items():
        img.save(tmp_path/'masks'/f'{name.replace(".", "_")}.{name.split(".")[1]}', **how)
        Image.new('RGB', (W, H)).save(tmp_path/'images'/f'{name.replace(".", "_")}.png')
    said = []
    items = wall_items(tmp_path, say=said.append)
    assert len(items) == len(RIGHT) and all(np.array_equal(true_wall(f), shape) for f in items)
    assert len(said) == 1 and said[0].startswith('3 of the masks have soft edges or were saved with loss')

@pytest.mark.parametrize('saved_as_jpeg_before', [False, True])
def test_soft_edges_are_wall_where_brighter_than_half(tmp_path, saved_as_jpeg_before):
    Image.fromarray(smooth).save(tmp_path/'m.jpg', quality=70)
    now = np.array(Image.open(tmp_path/'m.jpg')) if saved_as_jpeg_before else smooth
    Image.fromarray(now).save(tmp_path/'m.png')
    assert len(np.unique(now)) > 20 and np.array_equal(open_mask(tmp_path/'m.png'), now > 127)
    Image.fromarray(now.astype(np.uint16) * 257).save(tmp_path/'m16.png')
    Image.fromarray(now.astype(np.float32) / 255).save(tmp_path/'f.tif')
    for f in ('m16.png', 'f.tif'): assert np.array_equal(open_mask(tmp_path/f), now > 127)

classes = np.where(shape, 1, np.arange(H)[:, None] // 12 + 3)       # 1 is wall, 3 to 6 the rest
ignoring = np.where(shape, 1, np.where(np.arange(W) > 55, 255, 0))

@pytest.mark.parametrize('img,codes', [(classes, {1, 3, 4, 5, 6}), (ignoring, {1, 255}), (np.where(shape, 2, 1), {1, 2}), (np.where(shape, 255, 100), {100, 255}),
                                       (np.random.default_rng(0).integers(0, 256, (H, W)), set(range(1, 256))), (np.where(np.arange(W) > 60, 255, np.uint8(shape) * 33), {33, 255})])
def test_several_codes_are_listed(tmp_path, img, codes):
    Image.fromarray(np.uint8(img)).save(tmp_path/'m.png')
    with pytest.raises(SeveralCodes) as e: open_mask(tmp_path/'m.png')
    assert e.value.codes == codes and '--wall-code' in str(e.value)
    code = min(codes)
    assert np.array_equal(open_mask(tmp_path/'m.png', code), img == code)

@pytest.mark.parametrize('name,img,how,says', [
    ('nan.tif', Image.fromarray(np.where(shape, 1, np.where(np.arange(W) > 61, np.nan, 0)).astype(np.float32)), {}, '96 pixels that are no finite numbers'),
    ('p.png', palette(shape, [[200, 180, 170], [90, 10, 10]]), {}, 'index 0 is not its darkest colour'),
    ('many.png', Image.fromarray(np.stack([shape * 200, classes * 30, shape * 0], -1).astype(np.uint8)), {}, 'colours beside black'),
    ('two.png', rgba(coloured, np.broadcast_to(np.arange(W) > 20, (H, W)) * 255), {}, 'another in its transparency'),
    ('codes.jpg', Image.fromarray(np.uint8(classes)), {'quality': 95}, 'was saved with loss and is not black and white'),
    ('photo.jpg', Image.fromarray(np.uint8(np.hypot(*np.mgrid[:H, :W]) * 3)), {}, 'was saved with loss and is not black and white'),
    ('paint.jpg', Image.fromarray(np.where(shape[..., None], [255, 0, 0], [0, 255, 0]).astype(np.uint8)), {}, 'colour picture saved with loss')])
def test_what_is_not_clear_is_refused_with_the_reason(tmp_path, name, img, how, says):
    img.save(tmp_path/name, **how)
    with pytest.raises(ValueError, match=says): open_mask(tmp_path/name)

def test_an_index_can_be_said_where_colours_do_not_tell(tmp_path):
    palette(shape, [[200, 180, 170], [90, 10, 10]]).save(tmp_path/'p.png')
    assert np.array_equal(open_mask(tmp_path/'p.png', 1), shape) and np.array_equal(open_mask(tmp_path/'p.png', 0), ~shape)

@pytest.mark.parametrize('name', ['lossy.webp', 'jpeg.jpg', 'rgb.png', 'alpha.png', 'lossy.tif'])
@pytest.mark.parametrize('option', ['code', 'ignore'])
def test_codes_are_not_looked_for_where_none_can_be(tmp_path, name, option):
    img, how = RIGHT[name]
    img.save(tmp_path/name, **how)
    with pytest.raises(ValueError, match='cannot hold the (wall|ignore) code 2'): open_mask(tmp_path/name, **{option: 2})


# --- what is not labelled ---

def folder_of(path, masks, images=None, size=(W, H)):
    for d in ('images', 'masks'): (path/d).mkdir(parents=True, exist_ok=True)
    for i, m in enumerate(masks):
        Image.fromarray(np.uint8(m)).save(path/'masks'/f'p{i}.png')
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path/'images'/f'p{i}.png')
    return path

def test_what_is_not_labelled_is_out_of_loss_and_figures(tmp_path):
    items = wall_items(folder_of(tmp_path, [ignoring] * 6), ignore=255)
    assert np.array_equal(true_wall(items[0], ignore=255), np.where(ignoring == 255, 255, shape))
    assert np.array_equal(true_wall(items[0], 1, 255), true_wall(items[0], ignore=255))
    dls = wall_dls(items[:4], items[4:], size=32, bs=4, ignore=255)
    learn = wall_learner(dls)
    x, y = dls.valid.one_batch()
    assert set(y.unique().tolist()) == {0, 1, 255}
    with torch.no_grad(): pred = learn.model.eval()(x)
    y, keep = y.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor) != 255
    p, t = pred.as_subclass(torch.Tensor).movedim(1, -1)[keep], y[keep]
    assert learn.validate(dl=dls.valid)[0] == pytest.approx(torch.nn.functional.cross_entropy(p, t).item(), rel=1e-5)
    figures, q = evaluate_walls(learn, items[4:]), p.argmax(-1)
    assert figures['dice'] == pytest.approx(2 * (q * t).sum().item() / (q + t).sum().item())
    assert figures['wall_iou'] == pytest.approx((q * t).sum().item() / ((q + t) > 0).sum().item())
    s = t.float().mean().item()
    assert figures['all_wall_dice'] == pytest.approx(2 * s / (1 + s)) and s > y.eq(1).float().mean() * 1.05

@pytest.mark.parametrize('masks,options,says', [
    ([classes] * 4, [], 'hold the codes 1, 3, 4, 5, 6: say which is wall'),
    ([ignoring] * 4, [], 'hold the codes 1, 255: say which is wall'),
    ([shape * 2, shape * 3] * 2, [], 'hold the codes 2, 3: say which is wall'),
    ([shape * 0 + 1] * 4, [], 'every pixel of every mask .* is wall: they hold the code 1'),
    ([shape * 0] * 4, [], 'no wall in any mask'),
    ([classes] * 4, ['--wall-code', '2'], 'no pixel has the code 2, they hold the codes 1, 3, 4, 5, 6'),
    ([ignoring] * 4, ['--wall-code', '1', '--ignore', '1'], '--ignore and --wall-code are the same')])
def test_a_folder_that_is_not_clear_is_refused_before_anything_runs(tmp_path, masks, options, says, capfd):
    folder_of(tmp_path/'data', masks)
    try: status = walls_main(['--data', str(tmp_path/'data'), *options, '--out', str(tmp_path/'run')])
    except SystemExit as e: status = e.code
    assert status == 2 and not (tmp_path/'run').exists()
    assert re.fullmatch(f'selfattn-walls: .*{says}.*\n', capfd.readouterr().err)

def test_a_run_with_codes_and_unlabelled_pixels(tmp_path, capfd):
    folder_of(tmp_path/'data', [ignoring] * 6)
    (tmp_path/'data'/'masks').rename(tmp_path/'data'/'labels')
    for f in (tmp_path/'data'/'labels').iterdir(): f.rename(f.with_stem(f.stem + '_P'))
    assert walls_main(['--data', str(tmp_path/'data'), *'--ignore 255 --mask-suffix _P --epochs 1 --bs 4 --size 32 --no-attention'.split(), '--out', str(tmp_path/'run')]) == 0
    assert '| --ignore | 255 |' in (tmp_path/'run'/'report.md').read_text()


# --- folders as they are ---

@pytest.mark.parametrize('name', ['masks', 'labels', 'annotations'])
@pytest.mark.parametrize('below', ['', 'train/kitchen'])
def test_folders_of_other_names_and_depth(tmp_path, name, below):
    for d in ('images', name): (tmp_path/d/below).mkdir(parents=True)
    for i in range(3):
        Image.new('RGB', (W, H)).save(tmp_path/'images'/below/f'p{i}.png')
        grey().save(tmp_path/name/below/f'p{i}.png')
    items = wall_items(tmp_path)
    assert [mask_of(f) for f in items] == [tmp_path/name/below/f'p{i}.png' for i in range(3)]

def test_the_same_name_in_two_folders_is_two_pictures(tmp_path):
    for i, d in enumerate(('a', 'b')):
        for top in ('images', 'masks'): (tmp_path/top/d).mkdir(parents=True)
        Image.new('RGB', (W, H)).save(tmp_path/'images'/d/'p.png')
        (grey() if d == 'a' else Image.fromarray(np.uint8(~shape))).save(tmp_path/'masks'/d/'p.png')
    a, b = wall_items(tmp_path)
    assert np.array_equal(true_wall(a), shape) and np.array_equal(true_wall(b), ~shape)

def test_camvid_is_told_its_suffix_and_then_read(tmp_path):
    (tmp_path/'images').mkdir(), (tmp_path/'labels').mkdir()
    for stem in ('0001TP_006690', '0001TP_0066901'):
        Image.new('RGB', (W, H)).save(tmp_path/'images'/f'{stem}.png')
        Image.fromarray(np.uint8(classes)).save(tmp_path/'labels'/f'{stem}_P.png')
    with pytest.raises(ValueError, match='say --mask-suffix _P'): wall_items(tmp_path, 1)
    items = wall_items(tmp_path, 1, suffix='_P')
    assert np.array_equal(true_wall(items[0], 1, suffix='_P'), shape)

def test_what_is_no_picture_is_left_out_and_counted(tmp_path):
    folder_of(tmp_path, [shape] * 3)
    for f in ('images/Thumbs.db', 'images/notes.txt', 'masks/p0.json', 'images/clip.mpg', 'images/.hidden.png'): (tmp_path/f).write_text('no picture')
    grey().save(tmp_path/'masks'/'other.png')
    said = []
    assert [f.name for f in wall_items(tmp_path, say=said.append)] == ['p0.png', 'p1.png', 'p2.png']
    assert said == [f'3 files in {tmp_path}/images left out: no pictures', f'1 file in {tmp_path}/masks left out: no pictures', f'1 mask in {tmp_path}/masks left out: no picture of that name']

def test_masks_of_another_size_and_the_same_shape(tmp_path):
    half = shape[::2, ::2]
    folder_of(tmp_path, [half] * 3)
    said = []
    items = wall_items(tmp_path, say=said.append)
    assert np.array_equal(true_wall(items[0]), half.repeat(2, 0).repeat(2, 1)) and said == ['3 of the masks have another size than their picture and are resized (such as p0.png)']
    Image.fromarray(np.uint8(half[:, :-3])).save(tmp_path/'masks'/'p1.png')
    with pytest.raises(ValueError, match='p1.png has 29x24 pixels, its picture .*p1.png has 64x48'): wall_items(tmp_path)

def test_a_mask_of_another_size_beside_a_photo_that_lies_on_its_side(tmp_path):
    for d in ('images', 'masks'): (tmp_path/d).mkdir()
    exif = Image.Exif(); exif[0x0112] = 6
    Image.new('RGB', (H, W)).save(tmp_path/'images'/'p.jpg', exif=exif)      # 64 wide when upright
    Image.fromarray(np.uint8(shape[::2, ::2])).save(tmp_path/'masks'/'p.png')
    assert true_wall(wall_items(tmp_path, say=len)[0]).shape == (H, W)


# --- photos ---

ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)

@pytest.mark.parametrize('name,a', [('m.png', ramp.astype(np.uint16) * 257), ('m.tif', ramp.astype(np.uint16) * 257), ('i.tif', ramp.astype(np.int32) * 257), ('f.tif', ramp.astype(np.float32) / 255),
                                    ('f255.tif', ramp.astype(np.float32)), ('f16.tif', ramp.astype(np.float32) * 257), ('neg.tif', ramp.astype(np.float32) / 127.5 - 1)])
def test_photos_of_more_bits_are_scaled(tmp_path, name, a):
    Image.fromarray(a).save(tmp_path/name)
    assert np.array_equal(np.asarray(open_photo(tmp_path/name)), np.repeat(ramp[..., None], 3, -1))
    assert np.array_equal(np.asarray(open_photo(Image.open(tmp_path/name))), np.repeat(ramp[..., None], 3, -1))

def test_a_dark_photo_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(ramp.astype(np.uint16) // 3 * 257).save(tmp_path/'m.png')
    assert np.array_equal(np.asarray(open_photo(tmp_path/'m.png'))[..., 0], ramp // 3)

def test_transparency_is_kept():
    a = np.random.default_rng(0).integers(0, 255, (8, 32, 4), dtype=np.uint8)
    out = np.asarray(recolor(Image.fromarray(a), torch.ones(8, 32), 'teal'))
    assert out.shape == a.shape and np.array_equal(out[..., 3], a[..., 3])


# --- what is said is what is painted ---

def test_one_threshold():
    rng = np.random.default_rng(3)
    a = rng.integers(30, 220, (40, 60, 3), dtype=np.uint8)
    prob = torch.full((40, 60), .45)
    prob[5:18, 7:40] = .55
    out = np.asarray(recolor(Image.fromarray(a), prob, 'red'))
    changed = (out != a).any(-1)
    assert np.array_equal(changed, (prob > .5).numpy())
    inside = np.zeros((40, 60), bool)
    inside[6:17, 8:39] = True
    assert (out[inside][:, 2] == 0).all() and (out[changed & ~inside][:, 2] > 0).any()
