"A trained model is never lost, files are whole or not there, and whatever goes wrong is one sentence"
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from urllib.error import URLError

import matplotlib.figure
import numpy as np
import pytest
import torch
from fastai.learner import Learner, load_learner
from PIL import Image
from processes import started

from fastai_selfattn import __version__
from fastai_selfattn.__main__ import COMMANDS
from fastai_selfattn.bench.commands import bench_main
from fastai_selfattn.bench.loggers import bench_logging_main
from fastai_selfattn.shell import NotWritten, in_one_sentence, uninterrupted, whole_file
from fastai_selfattn.walls import commands, rooms, run
from fastai_selfattn.walls.commands import recolor_main, walls_main
from fastai_selfattn.walls.rooms import make_rooms

TINY = '--epochs 1 --bs 4 --size 32'.split()
ALL = {'table.csv', 'gamma.png', 'predictions.png', 'attention.png', 'recolored.png', 'explorer.html', 'export.pkl', 'report.md'}

@pytest.fixture(autouse=True)
def interruptible():
    "Ctrl-C arrives, also where pytest runs in the background, which ignores it"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.fixture(scope='module')
def data(tmp_path_factory): return make_rooms(tmp_path_factory.mktemp('data')/'rooms', n=8, size=(40, 56), seed=3)

def names(folder): return {f.name for f in folder.iterdir()}

@contextmanager
def largest_file(size):
    "The disk takes files up to `size` bytes"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

def one_sentence(capfd, command, says):
    out, err = capfd.readouterr()
    assert re.fullmatch(f'{command}: .*{says}.*\n', err), err
    assert 'Traceback' not in out
    return out

def disk_full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')


# --- files ---

def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    file = tmp_path/'a.bin'
    file.write_bytes(b'old'*1000)
    file.chmod(0o640)
    with pytest.raises(NotWritten, match='a.bin'), largest_file(500), whole_file(file) as f: f.write_bytes(b'new'*1000)
    assert file.read_bytes() == b'old'*1000 and names(tmp_path) == {'a.bin'}
    with pytest.raises(KeyboardInterrupt), whole_file(file) as f:
        f.write_bytes(b'half')
        raise KeyboardInterrupt
    assert file.read_bytes() == b'old'*1000 and names(tmp_path) == {'a.bin'}
    with whole_file(file) as f: f.write_bytes(b'new')
    assert file.read_bytes() == b'new' and names(tmp_path) == {'a.bin'} and file.stat().st_mode & 0o777 == 0o640

def test_a_link_stays_a_link(tmp_path):
    (tmp_path/'store').mkdir()
    (tmp_path/'link.txt').symlink_to(tmp_path/'store'/'real.txt')
    with whole_file(tmp_path/'link.txt') as f: f.write_text('x')
    assert (tmp_path/'link.txt').is_symlink() and (tmp_path/'store'/'real.txt').read_text() == 'x'

def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    "Nor is /dev/null, where Python may"
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(NotWritten, match='a device or a pipe'), whole_file(tmp_path/'pipe') as f: f.write_text('x')
    assert (tmp_path/'pipe').is_fifo() and [p.name for p in tmp_path.iterdir()] == ['pipe']

def test_ctrl_c_waits_for_the_end_of_a_block_and_then_comes():
    did = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            for _ in range(3): signal.raise_signal(signal.SIGINT)
            did.append(1)
    assert did == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- selfattn-walls ---

@pytest.mark.parametrize('stop', [disk_full, KeyboardInterrupt])
def test_rooms_that_cannot_be_written_leave_no_folder(tmp_path, monkeypatch, capfd, stop):
    made, save = [], Image.Image.save
    def failing(self, file, *args, **kwargs):
        made.append(file)
        if len(made) == 7: stop() if stop is disk_full else signal.raise_signal(signal.SIGINT)
        return save(self, file, *args, **kwargs)
    monkeypatch.setattr(Image.Image, 'save', failing)
    status = walls_main([*TINY, '--n-rooms', '8', '--out', str(tmp_path/'a'/'b')])
    assert (status, names(tmp_path)) == ((1, set()) if stop is disk_full else (130, set()))
    one_sentence(capfd, 'selfattn-walls', 'cannot write the rooms .*No space left' if stop is disk_full else 'stopped')

def test_folders_that_were_there_stay(tmp_path, monkeypatch):
    (tmp_path/'a').mkdir()
    monkeypatch.setattr(rooms, 'render_room', disk_full)
    assert walls_main([*TINY, '--n-rooms', '8', '--out', str(tmp_path/'a'/'b'/'c')]) == 1 and names(tmp_path) == {'a'} and not names(tmp_path/'a')

def test_a_model_that_ran_away_is_kept_and_the_run_ends_well(tmp_path, data, capfd):
    assert walls_main([*TINY, '--lr', '1000', '--data', str(data), '--out', str(tmp_path/'run')]) == 0
    report = (tmp_path/'run'/'report.md').read_text()
    assert isinstance(load_learner(tmp_path/'run'/'export.pkl'), Learner)
    assert 'use a lower --lr' in capfd.readouterr().out and 'use a lower --lr' in report
    for name in ALL - names(tmp_path/'run'): assert f'No {name}: ' in report

def test_each_picture_for_itself(tmp_path, data, monkeypatch, capfd):
    "One that cannot be drawn, one that cannot be written, and the others"
    monkeypatch.setattr(commands, 'plot_recolored', lambda *a: 1/0)
    save = matplotlib.figure.Figure.savefig
    def failing(self, file, **k):
        save(self, file, **k)
        if self.axes[0].get_title() == 'image': disk_full()
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', failing)
    out = tmp_path/'run'
    assert walls_main([*TINY, '--data', str(data), '--out', str(out)]) == 1
    said = one_sentence(capfd, 'selfattn-walls', f'cannot write predictions.png to {out}: No space left on device; the model is {out}/export.pkl')
    assert 'no recolored.png: division by zero' in said and names(out) == ALL - {'predictions.png', 'recolored.png'}
    report = (out/'report.md').read_text()
    assert 'No recolored.png: division by zero' in report and 'No predictions.png: No space left on device' in report

def test_a_full_disk_during_training_does_not_end_it(tmp_path, data, monkeypatch, capfd):
    written = []
    @contextmanager
    def failing(file):
        with whole_file(file) as f: yield f
        written.append(file.name)
        if written.count('table.csv') > 1 and file.name == 'table.csv': disk_full()
    monkeypatch.setattr(run, 'whole_file', failing)
    assert walls_main(['--epochs', '2', *TINY[2:], '--data', str(data), '--out', str(tmp_path/'run')]) == 1
    one_sentence(capfd, 'selfattn-walls', 'cannot write table.csv to .*; the model is .*export.pkl')
    assert written.count('table.csv') == 3 and 'export.pkl' in written

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A folder of its own for temporary files"
    (tmp_path/'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'temporary'))
    return tmp_path/'temporary'

def test_a_model_that_finds_no_room_goes_elsewhere(tmp_path, data, monkeypatch, capfd, elsewhere):
    export, out = Learner.export, tmp_path/'run'
    def failing(self, fname):
        if out in Path(fname).parents:
            Path(fname).write_bytes(b'half')
            raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534')
        return export(self, fname)
    monkeypatch.setattr(Learner, 'export', failing)
    assert walls_main([*TINY, '--data', str(data), '--out', str(out)]) == 1
    _, err = capfd.readouterr()
    assert names(out) == ALL - {'export.pkl'} and isinstance(load_learner(re.search(r'the model is (\S+export.pkl)\n', err)[1]), Learner)
    folder, = elsewhere.iterdir()
    assert names(folder) == {'export.pkl'}

def test_no_room_anywhere_is_one_sentence(tmp_path, data, capfd, elsewhere):
    with largest_file(2**20): assert walls_main([*TINY, '--data', str(data), '--out', str(tmp_path/'run')]) == 1
    one_sentence(capfd, 'selfattn-walls', 'cannot write the model .*run/export.pkl: PyTorch could not write')
    assert names(tmp_path/'run') == {'table.csv'} and not names(elsewhere)

def test_ctrl_c_while_drawing_keeps_the_model(tmp_path, data, monkeypatch, capfd):
    monkeypatch.setattr(commands, 'plot_recolored', lambda *a: signal.raise_signal(signal.SIGINT))
    out = tmp_path/'run'
    assert walls_main([*TINY, '--data', str(data), '--out', str(out)]) == 130
    one_sentence(capfd, 'selfattn-walls', f'stopped; the model is {out}/export.pkl, the table is {out}/table.csv')
    assert names(out) == {'table.csv', 'export.pkl', 'predictions.png'} and isinstance(load_learner(out/'export.pkl'), Learner)

def test_ctrl_c_while_the_model_is_written_waits(tmp_path, data, monkeypatch, capfd):
    export = Learner.export
    def interrupted(self, fname):
        signal.raise_signal(signal.SIGINT)
        return export(self, fname)
    monkeypatch.setattr(Learner, 'export', interrupted)
    assert walls_main([*TINY, '--data', str(data), '--out', str(tmp_path/'run')]) == 130
    one_sentence(capfd, 'selfattn-walls', 'stopped; the model is .*export.pkl')
    assert isinstance(load_learner(tmp_path/'run'/'export.pkl'), Learner)

@pytest.mark.parametrize('error,status,says', [(KeyboardInterrupt, 130, 'stopped'), (torch.OutOfMemoryError('CUDA out of memory\nmore'), 1, 'training broke down: CUDA out of memory')])
def test_training_that_ends_early_leaves_the_model_so_far(tmp_path, data, monkeypatch, capfd, error, status, says):
    epochs = []
    def failing(self):
        epochs.append(self.epoch)
        if self.epoch == 1: raise error
    monkeypatch.setattr(run.RunTable, 'before_epoch', failing, raising=False)
    out = tmp_path/'run'
    assert walls_main(['--epochs', '3', *TINY[2:], '--data', str(data), '--out', str(out)]) == status
    one_sentence(capfd, 'selfattn-walls', f'{says}; the table so far is in {out}/table.csv, the model so far in {out}/export.pkl')
    assert names(out) == {'table.csv', 'export.pkl'} and len((out/'table.csv').read_text().splitlines()) == 2


# --- selfattn-recolor ---

@pytest.fixture(scope='module')
def model(tmp_path_factory, data):
    out = tmp_path_factory.mktemp('runs')/'run'
    assert walls_main([*TINY, '--data', str(data), '--out', str(out)]) == 0
    return str(out/'export.pkl')

@pytest.fixture
def paint(model, tmp_path):
    "Call the command for photos in `tmp_path`"
    for i in range(3): Image.fromarray(np.random.default_rng(i).integers(0, 255, (90, 70, 3), dtype=np.uint8)).save(tmp_path/f'p{i}.png')
    def call(*options, photos=('p0.png', 'p1.png', 'p2.png')):
        return recolor_main(['--model', model, '--color', 'teal', '--out', str(tmp_path/'new'), *options, *(str(tmp_path/p) for p in photos)])
    return call

def test_a_photo_whose_name_is_no_text(paint, tmp_path, capfd):
    name, out = os.fsdecode(b'caf\xe9.png'), TextIOWrapper(BytesIO(), encoding='utf-8', errors='strict')
    Image.new('RGB', (40, 30)).save(tmp_path/name)
    with redirect_stdout(out): assert paint(photos=(name,)) == 0
    assert br'new/caf\udce9-008080.png: ' in out.buffer.getvalue() and out.errors == 'strict' and capfd.readouterr().err == ''
    assert paint(photos=(name,)) == 2
    one_sentence(capfd, 'selfattn-recolor', r'.*caf\\udce9-008080\.png exists: use --overwrite.*')

def test_overwrite_keeps_the_old_picture_when_the_disk_is_full(paint, tmp_path, capfd):
    assert paint('--mask') == 0
    before = {f: f.read_bytes() for f in (tmp_path/'new').iterdir()}
    with largest_file(1000): assert paint('--mask', '--overwrite') == 1
    one_sentence(capfd, 'selfattn-recolor', 'cannot write .*p0-008080.png: File too large; .*p1-.*p2-.*')
    assert before == {f: f.read_bytes() for f in (tmp_path/'new').iterdir()}

def test_a_photo_and_its_mask_come_together_and_others_are_done(paint, tmp_path, monkeypatch, capfd):
    save, masks = Image.Image.save, []
    def failing(self, file, *args, **kwargs):
        masks.extend([1]*(self.mode == 'L'))
        if self.mode == 'L' and len(masks) == 2: disk_full()
        return save(self, file, *args, **kwargs)
    monkeypatch.setattr(Image.Image, 'save', failing)
    assert paint('--mask') == 1
    one_sentence(capfd, 'selfattn-recolor', 'cannot write .*p1.*: No space left on device')
    assert names(tmp_path/'new') == {'p0-008080.png', 'p0-mask.png', 'p2-008080.png', 'p2-mask.png'}

def test_ctrl_c_leaves_whole_pictures(paint, tmp_path, monkeypatch, capfd):
    done = []
    def interrupted(*args):
        done.append(1)
        if len(done) == 2: signal.raise_signal(signal.SIGINT)
        return probability(*args)
    probability = commands.wall_probability     # of every photo, also of one in which the model finds no wall
    monkeypatch.setattr(commands, 'wall_probability', interrupted)
    assert paint() == 130
    one_sentence(capfd, 'selfattn-recolor', 'stopped')
    assert names(tmp_path/'new') == {'p0-008080.png'}

def test_a_new_picture_is_not_written_over_what_is_given(paint, tmp_path, capfd):
    assert paint(photos=['p0.png']) == 0
    (tmp_path/'new'/'p0-008080.png').rename(tmp_path/'p0-008080.png')
    assert paint('--overwrite', '--out', str(tmp_path), photos=['p0.png', 'p0-008080.png']) == 2
    one_sentence(capfd, 'selfattn-recolor', 'which is given too')

def test_a_folder_that_takes_no_files_is_told_before_anything_is_done(paint, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Path, 'touch', lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EROFS, 'Read-only file system')))
    assert paint() == 2
    one_sentence(capfd, 'selfattn-recolor', 'cannot write into --out .*: Read-only file system')

def test_a_standard_output_that_fails_is_one_sentence(capfd):
    @in_one_sentence('example')
    def broken(argv): raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
    assert broken() == 1
    one_sentence(capfd, 'example', 'cannot write to the standard output: Broken pipe')

@pytest.mark.parametrize('share', [0., .9])
def test_photos_of_every_kind_with_a_wall_and_without(paint, tmp_path, monkeypatch, capfd, share):
    monkeypatch.setattr(commands, 'wall_probability', lambda learn, photo: torch.full(photo.size[::-1], share))
    rgb = Image.open(tmp_path/'p0.png')
    rgba = rgb.convert('RGBA')
    rgba.putalpha(rgb.getchannel(1))
    kinds = {f'{c}.tif': (rgb, {'compression': c}) for c in ('tiff_lzw', 'tiff_deflate', 'packbits', 'jpeg', 'raw')}
    kinds |= {'g4.tiff': (rgb.convert('1'), {'compression': 'group4'}), 'rgba.png': (rgba, {}), 'alpha.tif': (rgba, {'compression': 'tiff_lzw'}), 'alpha.webp': (rgba, {'lossless': True}),
              'lab.tif': (rgb.convert('LAB'), {}), 'cmyk.jpg': (rgb.convert('CMYK'), {}), 'palette.png': (rgb.quantize(16), {}), 'b.bmp': (rgb, {})}
    for name, (img, how) in kinds.items(): img.save(tmp_path/name, **how)
    assert paint(photos=kinds) == 0
    assert capfd.readouterr().out.count('100% wall' if share else 'no wall found, picture unchanged') == len(kinds)
    for name in kinds:
        new = tmp_path/'new'/f'{Path(name).stem}-008080{Path(name).suffix.replace(".bmp", ".png")}'
        if not share and name != 'b.bmp': assert new.read_bytes() == (tmp_path/name).read_bytes()
        if 'rgba' in name or 'alpha' in name: assert np.array_equal(Image.open(new).getchannel('A'), rgba.getchannel('A'))


# --- manners ---

def process(command, *args, **kw):
    code = f'import sys; sys.argv[0] = {command!r}; from fastai_selfattn.__main__ import start; print("starting", flush=True); sys.exit(start({command!r}))'
    return subprocess.Popen([sys.executable, '-c', code, *args], stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kw)      # ignored where pytest runs in the background

def test_each_command_in_a_process_tells_its_version():
    listed = subprocess.run([sys.executable, '-m', 'fastai_selfattn'], capture_output=True, text=True, check=True).stdout
    for command in COMMANDS:
        p = process(command, '--version', stdout=subprocess.PIPE)
        assert p.communicate() == (f'starting\n{command} {__version__}\n', '') and command in listed
    assert subprocess.run([sys.executable, '-m', 'fastai_selfattn', '--version'], capture_output=True, text=True).stdout == f'fastai-selfattn {__version__}\n'

@pytest.mark.parametrize('main,prog', [(walls_main, 'selfattn-walls'), (recolor_main, 'selfattn-recolor'), (bench_main, 'selfattn-bench'), (bench_logging_main, 'selfattn-bench-logging')])
def test_version_of_each_function(main, prog, capfd):
    with pytest.raises(SystemExit) as e: main(['--version'])
    assert e.value.code == 0 and capfd.readouterr().out == f'{prog} {__version__}\n'

@pytest.mark.parametrize('seconds', [.3, 2.5])
def test_ctrl_c_in_a_process_that_imports(tmp_path, seconds):
    p = process('selfattn-walls', '--out', str(tmp_path/'run'), stdout=subprocess.PIPE)
    assert p.stdout.readline() == 'starting\n'     # Python itself is up
    time.sleep(seconds)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=100)
    assert (p.returncode, err) == (130, 'selfattn-walls: stopped\n') and not (tmp_path/'run').exists()

def test_a_process_without_a_terminal_prints_a_line_for_each_epoch_and_no_warning(tmp_path, data):
    p = process('selfattn-walls', '--epochs', '3', *TINY[2:], '--data', str(data), '--out', str(tmp_path/'run'), stdout=subprocess.PIPE)
    out, err = p.communicate(timeout=300)
    assert (p.returncode, err) == (0, '') and len(re.findall('^epoch [012]  train_loss [0-9.]+  valid_loss', out, re.M)) == 3
    assert '\r' not in out and len(out) < 2000

def test_a_process_whose_output_goes_nowhere_says_so_before_it_trains(tmp_path, data):
    code = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); import sys; from fastai_selfattn.__main__ import start; sys.exit(start('selfattn-walls'))"
    p = started(code, *TINY, '--data', data, '--out', tmp_path/'run', folder=tmp_path, log=tmp_path/'log')
    p.join()
    assert (tmp_path/'log').read_text() == 'selfattn-walls: cannot write to the standard output: No space left on device\n'
    assert p.exitcode == 1 and names(tmp_path) == {'log'}

def test_an_output_that_breaks_off_while_training_costs_nothing(tmp_path, data, monkeypatch, capfd):
    "As of `| head -3`"
    class Pipe(StringIO):
        lines = 0
        def flush(self):
            self.lines += 1
            if self.lines > 1: raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
        def fileno(self): return os.open(os.devnull, os.O_WRONLY)
    with redirect_stdout(Pipe()): assert walls_main(['--epochs', '3', *TINY[2:], '--data', str(data), '--out', str(tmp_path/'run')]) == 1
    one_sentence(capfd, 'selfattn-walls', 'cannot write to the standard output: Broken pipe; the model is .*export.pkl')
    assert names(tmp_path/'run') == ALL and len((tmp_path/'run'/'table.csv').read_text().splitlines()) == 4

@pytest.mark.parametrize('error,says,status', [
    (URLError('no network'), 'cannot load the pretrained weights of --arch resnet18: <urlopen error no network>', 1),
    (MemoryError('Unable to allocate 9. GiB'), 'not enough memory (Unable to allocate 9. GiB): smaller pictures or batches take less', 1),
    (torch.OutOfMemoryError('CUDA out of memory. Tried'), 'not enough memory (CUDA out of memory. Tried): smaller pictures or batches take less', 1),
    (RuntimeError('mat1 and mat2'), 'no U-Net on --arch resnet18: mat1 and mat2', 2)], ids=['network', 'numpy', 'GPU', 'other'])
def test_a_unet_that_cannot_be_made(tmp_path, data, monkeypatch, capfd, error, says, status):
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr(commands, 'wall_learner', fails)
    assert walls_main(['--arch', 'resnet18', '--pretrained', '--data', str(data), '--bs', '4', '--size', '32', '--out', str(tmp_path/'run')]) == status
    assert capfd.readouterr().err == f'selfattn-walls: {says}\n' and not (tmp_path/'run').exists()
