"Rooms: the same seed the same room, masks that agree with geometry, and a disk left as it was"
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastai_selfattn.walls.rooms as R
from fastai_selfattn.walls.rooms import make_rooms, render_room


def tree(path): return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(Path(path).rglob('*'))}


# --- the same seed, the same room

def test_same_seed_same_room_whatever_numpy_did():
    np.random.seed(1)
    a = render_room(11, 40)
    np.random.seed(2)
    state = np.random.get_state()[1].copy()
    b = render_room(np.int64(11), (40, 40))
    assert (state == np.random.get_state()[1]).all()      # and we leave it alone
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all()

def test_seeds_differ():
    pictures = {render_room(s, 16)[0].tobytes() for s in (0, 1, 2, (0, 1), (1, 0), (1, 2))}
    assert len(pictures) == 6

def test_same_room_in_another_process_and_no_heavy_imports():
    code = ("import sys, hashlib; from fastai_selfattn.walls.rooms import render_room; p,m = render_room(5, (24, 40));"
            "print(hashlib.sha1(p.tobytes() + m.tobytes()).hexdigest(), 'torch' in sys.modules, 'fastai' in sys.modules)")
    root = Path(R.__file__).parent.parent
    out = [subprocess.run([sys.executable, '-c', code], cwd=root, env={**os.environ, 'PYTHONHASHSEED': h}, capture_output=True,
                          text=True, check=True).stdout.split() for h in '12']
    assert out[0] == out[1] and out[0][1:] == ['False', 'False']

@pytest.mark.parametrize('size,shape', [(8, (8, 8)), (33, (33, 33)), ((48, 65), (48, 65)), ([65, 48], (65, 48)), ((20, 80), (20, 80))])
def test_sizes(size, shape):
    picture,mask = render_room(4, size)
    assert picture.shape == (*shape, 3) and picture.dtype == np.uint8 and picture.flags.c_contiguous
    assert mask.shape == shape and mask.dtype == bool
    assert 0 < mask.mean() < 1 and picture.std() > 5

def test_size_changes_the_pixels_not_the_room():
    for seed in range(5):
        small,large = render_room(seed, (27, 36))[1],render_room(seed, (135, 180))[1]   # 5 times: centres coincide
        assert (large[2::5,2::5] == small).mean() > .995


# --- masks and geometry

AHEAD = R._Camera(np.array([1., 0, 1]), np.pi/2, 0., 0., np.pi/2)

def plain(size=(2, 2, 2)):
    "A room without furniture, walls of material 0, all else of material 1"
    room = R._Room(size, np.random.default_rng(0))
    wall,other = (R._material(room, np.array([.8, .6, .4]), wall=w) for w in (True, False))
    room.faces = [wall]*4 + [other]*2
    return room,other

@pytest.mark.parametrize('h,w', [(60, 60), (40, 60), (60, 40)])
def test_mask_of_an_empty_cube(h, w):
    "The far wall is seen within half a unit, beyond it x against y decides"
    picture,mask = R._photo(plain()[0], AHEAD, h, w, np.random.default_rng(0))
    x,y = np.meshgrid((np.arange(w) + .5)*2 - w, (np.arange(h) + .5)*2 - h)
    x,y = abs(x)/max(h, w),abs(y)/max(h, w)
    sure = x != y
    assert (mask == ((np.maximum(x, y) < .5) | (x > y)))[sure].all()

def test_window_and_box_are_not_wall():
    room,other = plain()
    full = R._photo(room, AHEAD, 240, 240, np.random.default_rng(0))[1]
    room.grid(3, (.5, 1, 1.5, 1.5), other)                      # on the far wall, 1 x .5 of the 4 x 4 metres seen there
    window = R._photo(room, AHEAD, 240, 240, np.random.default_rng(0))[1]
    assert (full & ~window).mean() == pytest.approx(1/32, abs=2e-3) and not (window & ~full).any()
    room.box((.5, 1, 0), (1.5, 2, 1), other)                    # its top at eye level, its front 1 x 1 of the 2 x 2 metres seen there
    both = R._photo(room, AHEAD, 240, 240, np.random.default_rng(0))[1]
    assert (window & ~both).mean() == pytest.approx(1/8, abs=2e-3)   # all of the far wall's lower half; the rest of the front hides floor

def test_paints_are_numbers_of_materials_and_what_shines_has_none():
    room,other = plain()
    lamp = R._material(room, np.array([.9, .9, .9]), glow=1.)
    room.grid(3, (.5, 1, 1.5, 1.5), lamp)
    picture,mask,paint = R._photo(room, AHEAD, 40, 60, np.random.default_rng(0), paints=True)
    assert paint.dtype == np.int16 and paint.shape == (40, 60)
    assert (paint[mask] == 0).all() and set(paint[~mask]) == {-1, other}
    assert paint[17,30] == -1 and paint[12,30] == 0 and paint[39,30] == other     # the lamp, wall above it, floor

@pytest.mark.parametrize('seed,size', [(3, 32), ((1, 2), (48, 65))])
def test_asking_for_paints_changes_nothing(seed, size):
    picture,mask,paint = render_room(seed, size, paints=True)
    plain = render_room(seed, size)
    assert len(plain) == 2 and (plain[0] == picture).all() and (plain[1] == mask).all()
    assert not set(paint[mask]) & set(paint[~mask]) and len(set(paint[~mask])) > 1

def test_left_is_left():
    room,other = plain()
    room.grid(3, (0, 0, .5, 2), other)      # x < .5 is at the left of a camera that looks along y
    mask = R._photo(room, AHEAD, 80, 80, np.random.default_rng(0))[1]
    assert not mask[40,22] and mask[40,58]

@pytest.mark.parametrize('seed', [0, 1, 2])
def test_trace_agrees_with_one_ray_at_a_time(seed):
    rng = np.random.default_rng(seed)
    room = R._make_room(rng)
    cam = R._view(room, rng, 30, 40)
    t,p,axis,box,face = R._trace(room, cam, 30, 40)
    d = R._rays(cam, 30, 40).astype(float)
    for k in rng.integers(0, 1200, 150):
        best = min(((room.size[i] if d[i,k] > 0 else 0) - cam.eye[i])/d[i,k] for i in range(3))
        for lo,hi in room.boxes:
            ts = [sorted(((lo[i] - cam.eye[i])/d[i,k], (hi[i] - cam.eye[i])/d[i,k])) for i in range(3)]
            near,far = max(a for a,_ in ts),min(b for _,b in ts)
            if near + 1e-5 < far and 0 < near < best: best = near
        assert t[k] == pytest.approx(best, rel=1e-3, abs=1e-3)
        assert p[:,k] == pytest.approx(cam.eye + best*d[:,k], abs=1e-2)

@pytest.mark.parametrize('seed', range(4))
def test_skipping_rows_skips_nothing(seed, monkeypatch):
    fast = render_room(seed, (60, 80))
    monkeypatch.setattr(R, '_rows', lambda cam, axes, boxes, h, w: np.tile([0, h*w], (len(boxes), 1)))
    plain = render_room(seed, (60, 80))
    assert (fast[0] == plain[0]).all() and (fast[1] == plain[1]).all()

def test_furniture_is_where_it_can_be():
    "Boxes lie in the room, no box holds the camera, what is claimed on a face does not overlap"
    for seed in range(40):
        rng = np.random.default_rng(seed)
        room = R._make_room(rng)
        cam = R._view(room, rng, 32, 32)
        for lo,hi in room.boxes:
            assert (np.array(lo) >= -.05).all() and (np.array(hi) <= room.size + .05).all() and (np.array(lo) < hi).all()
            assert any(not lo[i] - .3 < cam.eye[i] < hi[i] + .3 for i in range(3))
        for rects in room.taken:
            for a,b in itertools.combinations(rects, 2):
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]

def test_shadow_under_a_board():
    room = R._Room((4, 4, 3), np.random.default_rng(0))
    room.box((1.5, 1.5, .7), (2.5, 2.5, .75), 0)
    lamp,points = np.array([2, 2, 1.75], np.float32),np.array([(2, 2, 0), (.2, .2, 0), (2, 2, .75), (2, 3.9, 1.)], np.float32).T
    assert R._shadow(room, lamp, points - lamp[:,None]) == pytest.approx([0, 1, 1, 1], abs=1e-3)


# --- the rule of the data set

def test_wall_share_spreads():
    shares = np.array([render_room((9, i), 32)[1].mean() for i in range(120)])
    assert .36 < shares.mean() < .52 and shares.std() > .07
    assert ((shares > .2) & (shares < .78)).mean() > .97

def test_mean_colour_does_not_tell_wall():
    "The nearest colours of other rooms vote little better than always saying `not wall`"
    def pixels(seeds):
        c,y = zip(*[(p[4::8,4::8].reshape(-1, 3), m[4::8,4::8].ravel()) for p,m in (render_room((8, s), 48) for s in seeds)])
        return np.concatenate(c).astype(np.float32),np.concatenate(y)
    (c,y),(c2,y2) = pixels(range(120)),pixels(range(120, 170))
    d = (c*c).sum(1) - 2*c2@c.T
    right = ((y[np.argpartition(d, 31, 1)[:,:31]].mean(1) > .5) == y2).mean()
    assert right < max(y2.mean(), 1 - y2.mean()) + .1

def test_paints_of_a_room_are_its_own():
    "No paint of the walls' families is given to the other things of the same room"
    for seed in range(50): assert R._paint(np.random.default_rng(seed), (3, 4))[1] not in (3, 4)

# --- ambiguous rooms

def inside(seed, **kwargs): return R._make_room(np.random.default_rng(seed), **kwargs)

def panels(room):
    "Rectangles on the four walls that are neither wall nor as low or as high as a skirting board, a door or a wall"
    return [(face, r) for face,r,m in room.decals if face < 4 and not room.mats[m].wall and r[1] >= .1 and r[3] < room.size[2]-.15 and r[3]-r[1] >= .8]

def test_without_ambiguity_nothing_is_drawn_for_it():
    room = R._Room((3, 4, 2.5), np.random.default_rng(5))
    before = room.rng.bit_generator.state
    assert not any(R._unclear(room) for _ in range(20)) and room.rng.bit_generator.state == before
    for seed in range(4):
        a,b = inside(seed),inside(seed, ambiguity=0.)
        assert a.decals == b.decals and a.rng.bit_generator.state == b.rng.bit_generator.state

def test_ambiguous_rooms_have_panels_and_plain_furniture():
    counts = []
    for ambiguity in (0., .5, 1.):
        rooms = [inside(seed, ambiguity=ambiguity) for seed in range(30)]
        books = sum(m.pattern%len(R._PATTERNS) == R._PATTERNS.index('books') for room in rooms for m in room.mats)
        counts.append((sum(len(panels(room)) for room in rooms), -books))
    (p0,b0),(p5,b5),(p1,b1) = counts
    assert p0+50 < p5 < p1-9 and b0 < b5 < b1 == 0

def test_panels_leave_floor_and_ceiling_to_the_wall_and_have_two_paints():
    for seed in range(20):
        room = R._Room((4, 5, 2.6), np.random.default_rng(seed), 1.)
        room.mats = [None]*3
        R._panels(room, lambda: R._paint(room.rng, (3, 4))[0])
        assert room.decals and {m for *_,m in room.decals} <= {3,4}
        for face,(u0,v0,u1,v1),_ in room.decals: assert face < 4 and v0 >= .1 and v1 <= 2.4+1e-6 and u0 >= .05 and u1 <= (5,4)[face//2]-.05
        assert not any(m.wall for m in room.mats[3:])

def test_a_folder_of_ambiguous_rooms(tmp_path):
    path = make_rooms(tmp_path/'odd', 2, (24, 40), seed=6, ambiguity=1)
    for i in range(2):
        picture,mask = render_room((6, i), (24, 40), ambiguity=1.)
        assert (np.array(Image.open(path/f'images/room_000{i}.png')) == picture).all()
        assert (np.array(Image.open(path/f'masks/room_000{i}.png')) == mask*255).all()
        assert (picture != render_room((6, i), (24, 40))[0]).any()


# --- files

def test_round_trip_and_names(tmp_path):
    path = make_rooms(tmp_path/'a'/'b', 3, (24, 40), seed=6)
    assert path == tmp_path/'a'/'b'
    assert sorted(tree(path)) == ['images', *[f'images/room_000{i}.png' for i in range(3)], 'masks', *[f'masks/room_000{i}.png' for i in range(3)]]
    for i in range(3):
        picture,mask = render_room((6, i), (24, 40))
        saved,saved_mask = (Image.open(path/k/f'room_000{i}.png') for k in ('images', 'masks'))
        assert saved.mode == 'RGB' and saved_mask.mode == 'L'
        assert (np.array(saved) == picture).all() and (np.array(saved_mask) == mask*255).all()

def test_room_i_does_not_depend_on_n(tmp_path):
    few,many = tree(make_rooms(tmp_path/'few', 2, 16, seed=3)),tree(make_rooms(str(tmp_path/'many'), 5, 16, seed=3))
    other = tree(make_rooms(tmp_path/'other', 2, 16, seed=4))
    assert len(many) == 12 and all(many[k] == few[k] for k in few)
    assert all(other[k] != few[k] for k in few if k.startswith('images/'))

def test_empty_folders_are_fine(tmp_path):
    (tmp_path/'images').mkdir()
    (tmp_path/'keep.txt').write_text('x')
    assert len(tree(make_rooms(tmp_path, 1, 16))) == 5

@pytest.mark.parametrize('kind', ['images', 'masks'])
def test_never_overwrites(tmp_path, kind):
    (tmp_path/kind).mkdir()
    (tmp_path/kind/'mine.png').write_bytes(b'1')
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=kind): make_rooms(tmp_path, 2, 16)
    assert tree(tmp_path) == before

@pytest.mark.parametrize('kw,error,match', [
    (dict(n=0), ValueError, '1 or more'), (dict(n=-3), ValueError, '-3'), (dict(n=1.5), TypeError, '1.5'), (dict(n='2'), TypeError, 'int'),
    (dict(size=4), ValueError, '8 or more'), (dict(size=(16, 90)), ValueError, '4 times'), (dict(size=12.5), TypeError, '12.5'),
    (dict(size=(16, 16, 3)), TypeError, r'\(h, w\)'), (dict(size='128'), TypeError, 'int'), (dict(size=None), TypeError, 'None'),
    (dict(seed=-1), ValueError, '0 or more'), (dict(seed=.5), TypeError, '0.5'), (dict(seed=None), TypeError, 'None'), (dict(seed=()), ValueError, 'got'),
    (dict(ambiguity=-.1), ValueError, 'from 0 to 1'), (dict(ambiguity=1.5), ValueError, '1.5'), (dict(ambiguity=float('nan')), ValueError, 'nan'),
    (dict(ambiguity=True), TypeError, 'True'), (dict(ambiguity='1'), TypeError, 'number')])
def test_bad_arguments_write_nothing(tmp_path, kw, error, match):
    with pytest.raises(error, match=match): make_rooms(tmp_path/'new', **{'n': 1, 'size': 16, **kw})
    assert tree(tmp_path) == {}
    if 'n' not in kw:
        with pytest.raises(error, match=match): render_room(**{'seed': 0, 'size': 16, **kw})

def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fails(seed, size, **kwargs):
        if seed[-1] == 2: raise KeyboardInterrupt
        return render_room(seed, size, **kwargs)
    monkeypatch.setattr(R, 'render_room', fails)
    (tmp_path/'keep.txt').write_text('x')
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt): make_rooms(tmp_path, 4, 16)
    assert tree(tmp_path) == before
