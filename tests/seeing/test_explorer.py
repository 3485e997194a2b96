"`attention_explorer`: what the page holds, what it shows in a real browser, that it loads nothing, and that a failure leaves the disk as it was"
import base64
import copy
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import fastai.layers
import matplotlib
import numpy as np
import pytest
import torch
from conftest import contents, named
from fastai.data.block import DataBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock
from PIL import Image
from torch import nn

from fastai_selfattn.seeing.explorer import Explorer, _data, _off, _outline, _page, _rounded, attention_explorer
from fastai_selfattn.attention.layers import PooledSelfAttention2d, SelfAttention
from fastai_selfattn.quiet import eval_mode
from fastai_selfattn.seeing.pictures import pictures
from fastai_selfattn.seeing.scale import Averages
from fastai_selfattn.seeing.record import AttentionRecorder
from fastai_selfattn.walls.rooms import render_room
from watched import top_weight

H, W = 36, 60
EVIL = '</script><img src=x onerror="window.ran=1"> \'"&amp; {{title}} {{data}} \u2028\u2029 Küche 🛋 ' + 'long'*20
EVIL_FILE = '<img src=x onerror="window.ran=1">&lt; \'Küche\'.png'
EVIL_LAYER = '</script><b onclick="window·ran=1">'      # a module's name has no full stop


class Net(nn.Module):
    "Heads, pooling with windows left over, both layers of fastai's, and a smaller map"
    def __init__(self, seed=0, **names):
        super().__init__()
        torch.manual_seed(seed)
        self.heads = SelfAttention(24, reduction=2, heads=2)
        self.pooled = PooledSelfAttention2d(24, reduction=2, pool=4)       # windows of 4 on 18x30: 5x8
        self.fastai, self.fastai_pooled = fastai.layers.SelfAttention(24), fastai.layers.PooledSelfAttention2d(24)
        self.small = SelfAttention(16, reduction=2)                        # on 6x10
        self.stem, self.down = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 16, 3, 3)
        for i, m in enumerate((self.heads, self.pooled, self.fastai, self.fastai_pooled, self.small)): nn.init.constant_(m.gamma, .3 - .15*i)
        with torch.no_grad():
            for _ in range(20): self(torch.randn(2, 3, H, W))              # singular vectors settle
    def forward(self, x):
        x = 4*self.stem(x)
        for m in (self.heads, self.pooled, self.fastai, self.fastai_pooled): x = m(x)
        return self.small(self.down(x))

LAYERS = ['heads', 'pooled', 'fastai', 'fastai_pooled', 'small']
POINTS = [(0, 0), (35, 59), (17, 31), (34, 2)]

def learner(folder, model, names=('a.png', 'b.png', 'c.png', 'd.png'), size=(H, W)):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names): Image.fromarray(render_room(i, size)[0]).save(folder / name)
    dls = DataBlock((ImageBlock, RegressionBlock), get_items=lambda p: [p / n for n in names], get_y=lambda f: 0., splitter=lambda items: (range(len(items)), range(len(items))),
                    batch_tfms=Normalize.from_stats(*imagenet_stats)).dataloaders(folder, bs=len(names), num_workers=0)
    return Learner(dls, model, loss_func=nn.MSELoss(), path=folder)

@pytest.fixture(scope='module')
def learn(tmp_path_factory): return learner(tmp_path_factory.mktemp('explorer') / 'pictures', Net())

@pytest.fixture(scope='module')
def other(): return Net(seed=1)

@pytest.fixture(scope='module')
def page(learn, other, tmp_path_factory):
    "Three pictures, two models of five layers each"
    return attention_explorer(learn, fname=tmp_path_factory.mktemp('page') / 'page.html', others={'before': other}, label='after', max_n=3, title='Rooms')

@pytest.fixture(scope='module')
def recorded(learn, other):
    "What the recorder sees at POINTS, by label"
    def look(model):
        with torch.no_grad(), eval_mode(model), AttentionRecorder(model, POINTS) as rec: model(pictures(learn, max_n=3).x)
        return rec
    return {'after': look(learn.model), 'before': look(other)}

def data_of(page): return _data(Path(page).read_text(encoding='utf-8'))

def row(layer, picture, point):
    "A row of the map and its statistics, from what the page holds, written out"
    seen, (h, w), (kh, kw), d, heads = layer['pictures'][picture], layer['map'], layer['keys'], layer['d'], layer['heads']
    q, k = (np.frombuffer(base64.b64decode(seen[which]), '<i2').astype(float).reshape(heads, -1, d) for which in ('queries', 'keys'))
    logits = seen['scale'] * k @ q[:, point[0]*h//H*w + point[1]*w//W, :, None]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True)).mean(0).reshape(kh, kw)


# --- what the file holds

def test_maps_from_the_file_are_those_of_the_recorder(page, recorded):
    data = data_of(page)
    assert [m['label'] for m in data['models']] == ['after', 'before'] and [p['name'] for p in data['pictures']] == ['a.png', 'b.png', 'c.png']
    assert 0 < page.off < 1e-3
    peaks = []
    for m in data['models']:
        rec = recorded[m['label']]
        assert [layer['name'] for layer in m['layers']] == LAYERS
        for layer in m['layers']:
            maps = rec.maps[layer['name']]
            assert (layer['gamma'], layer['pool']) == (rec.gammas[layer['name']], rec.pools[layer['name']]) and tuple(layer['keys']) == maps.shape[2:]
            np.testing.assert_allclose(layer['changes'], rec.changes[layer['name']], rtol=1e-6)
            for i in range(3):
                for j, point in enumerate(POINTS): np.testing.assert_allclose(row(layer, i, point), maps[i, j], atol=page.off + 1e-5, rtol=0)
            peaks.append(maps.max().item() * maps[0, 0].numel())
    assert min(peaks) > 1.5 and max(peaks) > 20                  # maps that say something
    assert [(tuple(x['map']), tuple(x['keys']), x['heads']) for x in data['models'][0]['layers']] == [((18, 30), (18, 30), 2), ((18, 30), (5, 8), 1), ((18, 30), (18, 30), 1), ((18, 30), (9, 15), 1), ((6, 10), (6, 10), 1)]


def test_the_difference_on_the_page_is_the_largest_one():
    torch.manual_seed(2)
    q, k = 3*torch.randn(2, 40, 6), 3*torch.randn(2, 50, 6)
    (q16, qs), (k16, ks) = _rounded(q), _rounded(k)
    exact, rounded = ((a.double() @ b.double().mT).softmax(-1).mean(0) for a, b in ((q, k), (q16*qs, k16*ks)))
    assert _off(q, k, q16, k16, qs*ks) == pytest.approx((exact - rounded).abs().max().item(), rel=1e-3)
    coarse = _off(q, k, (q16.float()/256).round()*256, k16, qs*ks)
    assert coarse > 50*_off(q, k, q16, k16, qs*ks)               # eight bits would be seen


@pytest.mark.parametrize('t', [torch.zeros(3, 4), torch.full((2, 2), 1e-30), torch.tensor([[-7., 7.]]), torch.tensor([[3e30, 1.]])], ids=['zero', 'small', 'ends', 'large'])
def test_rounding_keeps_to_16_bits(t):
    ints, scale = _rounded(t)
    assert ints.dtype == torch.int16 and scale > 0
    np.testing.assert_allclose(ints.double()*scale, t.double(), atol=scale/2*1.0001)


def test_what_is_rounded_and_by_how_much_is_said(page):
    said = data_of(page)['exact']
    assert 'query and key vector, rounded to 16-bit whole numbers' in said and f'the largest difference in a weight was {page.off:.1g}' in said and f'{H}×{W} pixels' in said


def test_size_of_a_page_for_two_layers_of_512_channels(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 512, 4, 4), SelfAttention(512), SelfAttention(512))
    page = attention_explorer(learner(tmp_path / 'pictures', model, size=(128, 128)), fname=tmp_path / 'page.html')
    data = data_of(page)
    assert len(data['pictures']) == 4 and [(x['map'], x['d']) for x in data['models'][0]['layers']] == [([32, 32], 64)]*2
    assert 2.5e6 < page.path.stat().st_size < 5e6


def test_large_pictures_are_made_smaller_and_flat_ones_are_grey(tmp_path):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Conv2d(3, 8, 1), SelfAttention(8))
    data = data_of(attention_explorer(learner(tmp_path / 'pictures', model), torch.rand(1, 3, 300, 900), tmp_path / 'page.html'))
    picture, = data['pictures']
    kind, raw = picture['src'].split(';base64,')
    assert (picture['h'], picture['w']) == (300, 900) and kind in ('data:image/jpeg', 'data:image/png')
    with Image.open(BytesIO(base64.b64decode(raw))) as im: assert im.size == (512, 171)


def test_gamma_and_change_that_are_no_numbers(learn, tmp_path):
    model = Net()
    with torch.no_grad(): model.small.gamma.fill_(math.nan)
    layer = data_of(attention_explorer(learner(tmp_path / 'pictures', model), fname=tmp_path / 'page.html', max_n=1))['models'][0]['layers'][-1]
    assert layer['gamma'] is None and layer['changes'] == [None] and layer['pictures'][0]['queries']
    with pytest.raises(ValueError): _page('t', math.nan)         # which no browser would read


def test_layers_and_items_are_chosen(learn, tmp_path):
    data = data_of(attention_explorer(learn, [learn.dls.valid_ds.items[2]], tmp_path / 'page.html', layers=['fastai*', 'small']))
    assert [x['name'] for x in data['models'][0]['layers']] == ['fastai', 'fastai_pooled', 'small'] and [p['name'] for p in data['pictures']] == ['c.png']
    second = nn.Sequential(nn.Conv2d(3, 8, 4, 4), SelfAttention(8))      # other names, and a Learner
    data = data_of(attention_explorer(learn, fname=tmp_path / 'two.html', max_n=1, others={'second': Learner(learn.dls, second, loss_func=nn.MSELoss())}))
    assert [[x['name'] for x in m['layers']] for m in data['models']] == [LAYERS, ['1']]


def test_each_learner_reads_its_own_predictions(learn, tmp_path):
    "Two classes by the larger, or one by its sign"
    def of(n, loss):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), SelfAttention(8), nn.Conv2d(8, n, 1)).eval()
        x = torch.stack([learn.dls.valid_ds[i][0] for i in range(2)]) if isinstance(learn.dls.valid_ds[0][0], torch.Tensor) else learn.dls.one_batch()[0]
        with torch.no_grad(): net[-1].bias.sub_(net(x.float()).mean((0, 2, 3)))
        return Learner(learn.dls, net, loss_func=loss)
    two, one = of(2, nn.CrossEntropyLoss()), of(1, nn.BCEWithLogitsLoss())
    def outlines(l, **others): return [m['outlines'] for m in data_of(attention_explorer(l, fname=tmp_path / 'page.html', max_n=2, overwrite=True, others=others))['models']]
    alone = [*outlines(two), *outlines(one)]
    assert all(any(o and o['path'] for o in a) for a in alone)
    assert outlines(two, other=one) == alone and outlines(one, other=two) == alone[::-1]


def test_the_models_stay_as_they_were(learn, other, tmp_path):
    def state(): return [[m.training for m in n.modules()] for n in (learn.model, other)], [{k: v.clone() for k, v in n.state_dict().items()} for n in (learn.model, other)], torch.get_rng_state(), \
        [(name, k, list(v)) for n in (learn.model, other) for name, m in n.named_modules() for k, v in vars(m).items() if 'hook' in k and v]
    learn.model.train(), other.eval()
    modes, params, rng, hooks = state()
    attention_explorer(learn, fname=tmp_path / 'page.html', max_n=2, others={'other': other})
    now = state()
    assert now[0] == modes and now[3] == hooks and torch.equal(now[2], rng)
    for a, b in zip(params, now[1]): assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- safety of the file

class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.title, self._in = [], '', None
        self.feed(text), self.close()
    def handle_starttag(self, tag, attrs): self.tags.append((tag, tuple(attrs))); self._in = tag
    def handle_endtag(self, tag): self._in = None
    def handle_data(self, data):
        if self._in == 'title': self.title += data

@pytest.fixture(scope='module')
def evil(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('evil')
    model = nn.Sequential()
    for name, m in (('stem', nn.Conv2d(3, 16, 4, 4)), (EVIL_LAYER, SelfAttention(16)), ('second', SelfAttention(16))): model.add_module(name, m)
    return attention_explorer(learner(tmp / 'pictures', model, [EVIL_FILE, 'b.png']), fname=tmp / 'page.html', others={EVIL + '2': copy.deepcopy(model)}, label=EVIL, title=EVIL)

def test_no_name_becomes_code(page, evil):
    plain, bad = (Tags(Path(p).read_text(encoding='utf-8')) for p in (page, evil))
    assert bad.tags == plain.tags and len(plain.tags) > 20 and bad.title == EVIL
    data = data_of(evil)
    assert (data['title'], data['models'][1]['label'], data['models'][0]['layers'][0]['name'], data['pictures'][0]['name']) == (EVIL, EVIL + '2', EVIL_LAYER, EVIL_FILE)
    raw = re.search(r'<script id="data".*?>(.*?)</script>', Path(evil).read_text(encoding='utf-8'))[1]
    assert not set('<>&') & set(raw) and raw.isascii()

def test_names_that_are_no_unicode(tmp_path):
    name = os.fsdecode(b'caf\xe9')
    page = _page(name, dict(name=name)).encode()                # would raise
    assert _data(page.decode()) == dict(name=name)

def test_nothing_in_the_file_points_outside(page, evil):
    text = Path(page).read_text(encoding='utf-8')
    code = re.sub(r'(<script id="data"[^>]*>).*?</script>', '', text)
    assert "default-src 'none'" in code and len(code) < 60_000
    assert not re.search(r'://|[\'"(]//|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import\(|serviceWorker|localStorage|cookie|eval\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write', code)
    links = [(tag, k, v) for p in (page, evil) for tag, attrs in Tags(Path(p).read_text(encoding='utf-8')).tags for k, v in attrs if k in ('src', 'href', 'srcset', 'action', 'data', 'poster', 'background')]
    assert set(links) == {('link', 'href', 'data:,')}
    assert all(p['src'].startswith('data:image/') for p in data_of(page)['pictures'])


# --- writing

@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'old.html').write_text('mine')
    (tmp_path / 'folder.html').mkdir()
    return tmp_path

class Line(nn.Module):
    "Attention along a flattened map"
    def __init__(self):
        super().__init__()
        self.at = SelfAttention(8)
        self.stem = nn.Conv2d(3, 8, 4, 4)
    def forward(self, x): return self.at(self.stem(x).flatten(2))

def broken():
    net = Net()
    with torch.no_grad(): net.stem.weight.fill_(math.inf)
    return net

ERRORS = {
    'no Learner': (lambda p: dict(learn=Net()), TypeError, '`learn` must be a Learner, got Net'),
    'no file name': (lambda p: dict(fname=3), TypeError, '`fname` must be the name of a file, got int'),
    'not html': (lambda p: dict(fname=p / 'page'), ValueError, r'must end in \.html'),
    'no folder': (lambda p: dict(fname=p / 'none' / 'page.html'), ValueError, r'no folder .*none to write page\.html into: make it first'),
    'a folder': (lambda p: dict(fname=p / 'folder.html', overwrite=True), ValueError, 'is a folder'),
    'exists': (lambda p: dict(fname=p / 'old.html'), ValueError, r'old\.html exists, and no explorer wrote it: use `overwrite=True`'),
    'others no dict': (lambda p: dict(others=[Net()]), TypeError, '`others` must be a dict, label -> model or Learner, got list'),
    'other no model': (lambda p: dict(others={'x': 3}), TypeError, "the model 'x' must be an nn.Module or a Learner, got int"),
    'label no str': (lambda p: dict(others={3: Net()}), TypeError, 'the label of a model must be a str, got 3'),
    'same label': (lambda p: dict(others={'model': Net()}), ValueError, "two models have the label 'model'"),
    'title': (lambda p: dict(title=3), TypeError, '`title` must be a str, got int'),
    'no items': (lambda p: dict(items=[]), ValueError, 'no pictures'),
    'no layer of that name': (lambda p: dict(layers='none*'), ValueError, r"'model': no attention layer none\*: there are heads, pooled"),
    'no attention': (lambda p: dict(others={'plain': nn.Conv2d(3, 3, 1)}), ValueError, "'plain': no attention layer"),
    'no softmax': (lambda p: dict(others={'dot': nn.Sequential(nn.Conv2d(3, 8, 1), SelfAttention(8, softmax=False))}), ValueError, "'dot': 1: no map is known, since weights are dot products"),
    'a head that no layer has': (lambda p: dict(head=2), ValueError, '`head` must be at most 1, the last head of a layer here, got 2'),
    'a line': (lambda p: dict(others={'line': Line()}), ValueError, "layer at of 'line' sees a 1d map: an explorer shows 2d maps"),
    'infinite': (lambda p: dict(others={'broken': broken()}), ValueError, "layer heads of 'broken' has query or key vectors that are not finite on picture 1"),
    'fails inside': (lambda p: dict(others={'bad': nn.Sequential(nn.Conv2d(3, 5, 1), SelfAttention(8))}), ValueError, '`x` must be'),
}

@pytest.mark.parametrize('what', ERRORS)
def test_mistakes_are_told_and_nothing_is_written(what, learn, folder):
    args, error, says = ERRORS[what]
    before = contents(folder)
    with pytest.raises(error, match=says): attention_explorer(**{'learn': learn, 'fname': folder / 'page.html', 'max_n': 1, **args(folder)})
    assert contents(folder) == before and sorted(p.name for p in folder.iterdir()) == ['folder.html', 'old.html']

@pytest.mark.parametrize('where', ['replace', 'open'])
def test_a_failure_while_writing_leaves_the_disk_as_it_was(where, learn, folder, monkeypatch):
    real = Path.open
    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *exc): self.f.close()
        def write(self, text):
            self.f.write(text[:100])
            raise OSError('no space left')
    def full(self, *args, **kwargs): return Full(real(self, *args, **kwargs)) if self.name.startswith('.') else real(self, *args, **kwargs)
    def fail(*args): raise OSError('no space left')
    monkeypatch.setattr(Path, where, full if where == 'open' else fail)
    with pytest.raises(OSError, match='no space left'): attention_explorer(learn, fname=folder / 'old.html', max_n=1, layers='small', overwrite=True)
    assert contents(folder) == {'old.html': b'mine'}

def test_a_page_is_replaced_if_asked_for(learn, folder, monkeypatch):
    monkeypatch.chdir(folder)
    page = attention_explorer(learn, fname='old.html', max_n=1, layers='small', overwrite=True)
    assert contents(folder).keys() == {'old.html'} and data_of(page)['title'] == 'What attention sees'
    Path('new').touch()
    assert Path('old.html').stat().st_mode == Path('new').stat().st_mode         # readable for whom any new file is


def test_what_is_given_back(page, tmp_path):
    assert isinstance(page, Explorer) and os.fspath(page) == str(page.path) and re.fullmatch(r'Explorer: page\.html, [\d.]+ MB', repr(page))
    frame, = Tags(page._repr_html_()).tags
    assert frame[0] == 'iframe' and dict(frame[1])['srcdoc'] == page.path.read_text(encoding='utf-8') and dict(frame[1])['sandbox'] == 'allow-scripts allow-downloads'
    gone = Explorer(tmp_path / 'gone.html')
    assert gone._repr_html_() is None and repr(gone) == 'Explorer: gone.html, no longer there'


# --- in a browser

def no_browser(why):
    if os.environ.get('SELFATTN_NEEDS_BROWSER') == '1': pytest.fail(why)
    pytest.skip(why)

@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    "A headless Chromium"
    chromium, chromedriver = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None), shutil.which('chromedriver')
    if not (chromium and chromedriver): no_browser('no chromium and chromedriver: on Debian, apt-get install chromium chromium-driver')
    try: from selenium import webdriver
    except ImportError: no_browser('no selenium: pip install selenium')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for arg in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'disable-quic', 'no-first-run', 'disable-background-networking', 'disable-component-update', 'disable-sync',
                'disable-ipc-flooding-protection',     # a test gives hundreds of addresses in a row
                f'user-data-dir={tmp_path_factory.mktemp("chromium")}'): options.add_argument('--' + arg)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromedriver))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()

class Browser:
    "A page, and what a person does with it"
    def __init__(self, driver): self.driver = driver

    def cdp(self, command, **args): return self.driver.execute_cdp_cmd(command, args)

    def open(self, page, width=1200, height=1000, mobile=False, ratio=1, dark=False):
        self.cdp('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=ratio, mobile=mobile)
        self.cdp('Emulation.setTouchEmulationEnabled', enabled=mobile)
        self.cdp('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
        for kind in ('browser', 'performance'): self.driver.get_log(kind)
        self.driver.get(Path(page).resolve().as_uri())
        self.driver.execute_async_script('const done = arguments[0]; explorer.ready.then(done)')
        return self

    def js(self, code, *args): return self.driver.execute_script(code, *args)
    def frame(self): self.driver.execute_async_script('const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))')
    def state(self): return self.js('return explorer.state()')
    def stats(self, name='a'): return self.js('return explorer.stats(arguments[0])', name)
    def select(self, **what):
        self.js('explorer.select(arguments[0])', what)
        self.frame()
    def weights(self, name='a'):
        h, w, values = self.js('const [h, w, v] = explorer.weights(arguments[0]); return [h, w, Array.from(v)]', name)
        return np.array(values).reshape(h, w)
    def find(self, css): return self.driver.find_element('css selector', css)
    def all(self, css): return self.driver.find_elements('css selector', css)
    def canvas(self, name='a'): return self.all('canvas')['ab'.index(name)]
    def table(self, name='a'):
        rows = [r.text for r in self.all('.panel')['ab'.index(name)].find_elements('css selector', 'tr')]
        keys = self.js('return Array.from(document.querySelectorAll(".panel")[arguments[0]].querySelectorAll("th"), e => e.textContent)', 'ab'.index(name))
        return {k: r[len(k):].strip() for k, r in zip(keys, rows)}
    def drawn(self, name='a'):
        "Pixels of the canvas, (h, w, rgb)"
        uri = self.js('return document.querySelectorAll("canvas")[arguments[0]].toDataURL()', 'ab'.index(name))
        return np.asarray(Image.open(BytesIO(base64.b64decode(uri.split(',')[1]))).convert('RGB')).astype(int)

    def at(self, point, name='a'):
        "Where a pixel of the picture is, from the middle of the canvas"
        size = self.canvas(name).size
        return round((point[1] + .5)*size['width']/W - size['width']/2), round((point[0] + .5)*size['height']/H - size['height']/2)

    def actions(self):
        from selenium.webdriver import ActionChains
        return ActionChains(self.driver, duration=0)

    def click(self, point, name='a'):
        self.actions().move_to_element_with_offset(self.canvas(name), *self.at(point, name)).click().perform()
        self.frame()

    def keys(self, *keys):
        self.actions().send_keys(*keys).perform()
        self.frame()

    def choose(self, label, option):
        from selenium.webdriver.support.ui import Select
        Select(next(s for s in self.all('select') if s.find_element('xpath', '..').get_attribute('textContent').startswith(label))).select_by_visible_text(option)
        self.frame()

    def complaints(self): return [e['message'] for e in self.driver.get_log('browser')]

@pytest.fixture
def browser(driver):
    b = Browser(driver)
    yield b
    complaints = b.complaints()
    driver.get('about:blank')
    assert not complaints


def close(weights, rec, layer, picture, point, page, i=None):
    want = rec.maps[layer][picture, POINTS.index(point) if i is None else i]
    assert weights.shape == want.shape
    np.testing.assert_allclose(weights, want, atol=page.off + 1e-5, rtol=0)


def test_a_click_shows_the_map_of_the_recorder(browser, page, recorded):
    browser.open(page)
    for layer, name in enumerate(LAYERS):
        browser.select(a=dict(model=0, layer=layer), picture=layer % 3)
        seen = []
        for point in POINTS:
            browser.click(point)
            seen.append(browser.weights())
            assert browser.state()['point'] == list(point)
            close(seen[-1], recorded['after'], name, layer % 3, point, page)
        assert all(abs(a - b).max() > 10*page.off for a, b in zip(seen, seen[1:]))


def test_statistics_are_those_of_the_recorder(browser, page, recorded):
    browser.open(page)
    for label, model in (('after', 0), ('before', 1)):
        for layer, name in enumerate(LAYERS):
            for j, point in enumerate(POINTS):
                browser.select(a=dict(model=model, layer=layer), picture=1, point=point)
                want = recorded[label].stats[name]
                h, w = want.entropy.shape[1:]
                want = {k: v[1, point[0]*h//H, point[1]*w//W].item() for k, v in want._asdict().items()}
                got = browser.stats()
                assert got.keys() == want.keys()
                for k in want: assert got[k] == pytest.approx(want[k], rel=1e-3, abs=page.off + 1e-5), (k, name)


def test_the_table_says_gamma_change_statistics_and_pooling(browser, page, recorded):
    browser.open(page)
    rec, point = recorded['after'], (17, 31)
    browser.select(a=dict(model=0, layer=1), picture=2, point=point)
    table, stats = browser.table(), browser.stats()
    number = lambda s: float(re.match(r'[−\d.]+', s)[0].replace('−', '-'))
    assert number(table['gamma']) == pytest.approx(rec.gammas['pooled'], rel=.01)
    assert number(table['adds to its feature map']) == pytest.approx(100*rec.changes['pooled'][2].item(), rel=.01) and table['adds to its feature map'].endswith('% of its norm')
    assert number(table['entropy, share of uniform']) == pytest.approx(stats['entropy'], rel=.01) and number(table['entropy, share of uniform'].split(', ')[1]) == pytest.approx(100*stats['entropy_share'], rel=.01)
    assert number(table['mean distance']) == pytest.approx(stats['distance'], rel=.01) and table['mean distance'].endswith('px')
    assert number(table['on the query pixel’s own cell']) == pytest.approx(100*stats['itself'], rel=.01)
    assert number(table['largest weight']) == pytest.approx(100*stats['largest'], rel=.01) and number(table['largest weight'].split(', ')[1]) == pytest.approx(40*stats['largest'], rel=.01)
    assert table['feature map'] == '18×30 cells' and table['keys'] == 'pooled 4×4, so 5×8 cells'
    browser.select(a=dict(model=0, layer=0))
    assert browser.table()['feature map'] == '18×30 cells, means of 2 heads' and 'keys' not in browser.table()
    browser.select(a=dict(model=0, layer=4))
    assert browser.table()['gamma'].startswith('−0.3')          # a negative gamma is shown as such


@pytest.mark.parametrize('layer', [1, 4], ids=['pooled', 'small'])
def test_colours_are_where_the_weights_are(browser, page, layer):
    browser.open(page)
    browser.select(compare=False, opacity=1, a=dict(model=0, layer=layer), point=(35, 59), picture=0)
    weights, seen = browser.weights(), browser.drawn()
    (mh, mw), pool = ((18, 30), 4) if layer == 1 else ((6, 10), 1)
    norm = Averages(0, max(2, top_weight(weights.tolist())*weights.size))
    checked = 0
    for row, col in np.ndindex(mh, mw):                          # each cell of the map lies in one window
        y, x, w = (row + .5)/mh, (col + .5)/mw, weights[row//pool, col//pool]
        if y > .8 and x > .8: continue                           # the ring
        t = min(1, float(norm(w*weights.size)))
        alpha, magma = .2 + .8*t, np.array(matplotlib.colormaps['magma'](round(255*t))[:3])*255
        r, g, b = seen[int(y*len(seen)), int(x*seen.shape[1])] - alpha*magma
        assert max(r, g, b) - min(r, g, b) < 4, (row, col)       # what is left is grey
        assert -3 < r < (1 - alpha)*255 + 3
        checked += 1
    assert checked >= .9*mh*mw and weights.max() > 1.5*np.median(weights)


def test_ring_and_cell_mark_the_query_pixel(browser, page):
    browser.open(page)
    browser.select(compare=False, opacity=0, a=dict(model=0, layer=4), point=(20, 14), picture=0)
    seen = browser.drawn()
    browser.select(point=(3, 50))
    changed = np.argwhere(abs(browser.drawn() - seen).max(-1) > 30) / [len(seen), seen.shape[1]]
    here = changed[changed[:, 1] < .5]
    lo, hi = here.min(0), here.max(0)
    np.testing.assert_allclose([lo[0], hi[0], lo[1], hi[1]], [3/6, 4/6, 2/10, 3/10], atol=.025)      # row 20 of 36 is in cell 3 of 6, column 14 of 60 in cell 2 of 10


def test_the_picture_is_as_strong_as_the_opacity_says(browser, page):
    browser.open(page)
    spread = {}
    for opacity in (0, .5, 1):
        browser.select(opacity=opacity, a=dict(model=0, layer=0))
        pixels = browser.drawn()
        spread[opacity] = (pixels.max(-1) - pixels.min(-1)).mean()
    assert spread[0] < 1 < spread[.5] < spread[1]                # grey, then ever more colour


def test_dragging_takes_the_map_along(browser, page, recorded):
    browser.open(page).select(compare=True, a=dict(model=0, layer=0), b=dict(model=1, layer=0))
    canvas = browser.canvas()
    x, y = browser.at((10, 10))
    browser.actions().move_to_element_with_offset(canvas, x, y).click_and_hold().perform()
    browser.frame()
    assert browser.state()['point'] == [10, 10]
    seen = [browser.weights()]
    for point in ((12, 20), (17, 31)):
        dx, dy = browser.at(point)
        browser.actions().move_to_element_with_offset(canvas, dx, dy).perform()
        browser.frame()
        assert browser.state()['point'] == list(point)
        seen.append(browser.weights())
    close(seen[-1], recorded['after'], 'heads', 0, (17, 31), page)
    close(browser.weights('b'), recorded['before'], 'heads', 0, (17, 31), page)          # the other panel follows
    assert all(abs(a - b).max() > 10*page.off for a, b in zip(seen, seen[1:]))
    browser.actions().move_to_element_with_offset(browser.find('h1'), 0, 0).perform()      # above the canvas: the nearest pixel
    browser.frame()
    assert browser.state()['point'][0] == 0
    browser.actions().release().perform()
    browser.actions().move_to_element_with_offset(canvas, x, y).perform()
    browser.frame()
    assert browser.state()['point'][0] == 0                      # let go


def test_a_click_in_b_counts_too(browser, page, recorded):
    browser.open(page).select(compare=True, b=dict(model=1, layer=3))
    browser.click((34, 2), 'b')
    assert browser.state()['point'] == [34, 2]
    close(browser.weights('b'), recorded['before'], 'fastai_pooled', 0, (34, 2), page)


def test_keyboard(browser, page):
    from selenium.webdriver import Keys
    browser.open(page).select(compare=False, a=dict(model=0, layer=4), point=(0, 0))      # cells of 6x6 pixels
    def after(*keys):
        browser.keys(*keys)
        return browser.state()
    assert after(Keys.ARROW_DOWN)['point'] == [8, 0] and after(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)['point'] == [8, 14]
    assert after(Keys.ARROW_UP)['point'] == [2, 14] and after(Keys.ARROW_UP)['point'][0] == 2 and after(Keys.ARROW_LEFT)['point'] == [2, 8]
    assert after(*[Keys.ARROW_DOWN]*9)['point'][0] == 32
    assert [after(k)['picture'] for k in 'nn' 'n' 'p' '2' '9' '1'] == [1, 2, 0, 2, 1, 1, 0]
    assert after('l')['a'] == dict(model=0, layer=0) and after('m')['a'] == dict(model=1, layer=0)
    assert after('c')['compare'] and browser.canvas('b').is_displayed()
    b = browser.state()['b']
    assert after('L')['b'] == dict(model=b['model'], layer=(b['layer'] + 1) % 5) and browser.state()['a'] == dict(model=1, layer=0)
    assert after('M')['b']['model'] == 1 - b['model']
    assert not after('c')['compare'] and not browser.canvas('b').is_displayed()
    assert after('+', '+')['opacity'] == .85 and after('-')['opacity'] == .8 and after(*'-'*30)['opacity'] == 0
    before = browser.state()
    browser.actions().key_down(Keys.CONTROL).send_keys('c').key_up(Keys.CONTROL).perform()
    browser.frame()
    assert browser.state() == before and after('x', 'q', Keys.HOME) == before


def test_keys_leave_a_select_alone(browser, page):
    browser.open(page)
    before = browser.state()
    browser.js('document.querySelectorAll("select")[1].focus()')
    browser.keys('n', 'c', '+')
    assert {k: v for k, v in browser.state().items() if k not in 'ab'} == {k: v for k, v in before.items() if k not in 'ab'}
    browser.js('document.activeElement.blur()')
    browser.keys('n')
    assert browser.state()['picture'] == 1


def test_a_cell_is_left_by_each_arrow_however_pixels_and_cells_fall(browser, tmp_path):
    "Maps of 5x7 cells and of 40x66, larger than the picture, on 36x60 pixels"
    from selenium.webdriver import Keys
    model = nn.Sequential(nn.AdaptiveAvgPool2d((5, 7)), nn.Conv2d(3, 8, 1), SelfAttention(8), nn.Upsample((40, 66)), SelfAttention(8))
    browser.open(attention_explorer(learner(tmp_path / 'pictures', model), fname=tmp_path / 'page.html', max_n=1))
    browser.select(a=dict(model=0, layer=0), point=(0, 0))
    rows = []
    for _ in range(6):
        rows.append(browser.state()['point'][0]*5//H)
        browser.keys(Keys.ARROW_DOWN)
    assert rows == [0, 1, 2, 3, 4, 4]
    browser.select(a=dict(model=0, layer=1), point=(0, 0))
    browser.keys(*[Keys.ARROW_RIGHT]*70)
    assert browser.state()['point'] == [0, 59] and browser.weights().shape == (40, 66)


def test_layers_models_and_pictures_are_chosen_by_hand(browser, page, recorded):
    browser.open(page)
    browser.click((17, 31))
    assert browser.state()['a'] == dict(model=0, layer=4) and browser.state()['b'] == dict(model=1, layer=4) and browser.state()['compare']
    browser.choose('layer in A', 'fastai · 18×30')
    close(browser.weights(), recorded['after'], 'fastai', 0, (17, 31), page)
    browser.choose('model in A', 'before')
    close(browser.weights(), recorded['before'], 'fastai', 0, (17, 31), page)            # the layer of the same name
    browser.choose('layer in B', 'pooled · 18×30')
    close(browser.weights('b'), recorded['before'], 'pooled', 0, (17, 31), page)
    browser.choose('model in B', 'after')
    close(browser.weights('b'), recorded['after'], 'pooled', 0, (17, 31), page)
    thumbs = browser.all('#pictures button')
    assert [t.text for t in thumbs] == ['a.png', 'b.png', 'c.png'] and len({t.location['y'] for t in thumbs}) == 1      # side by side
    thumbs[2].click()
    browser.frame()
    close(browser.weights(), recorded['before'], 'fastai', 2, (17, 31), page)
    assert [t.get_attribute('aria-pressed') for t in thumbs] == ['false', 'false', 'true']
    left, right = (browser.canvas(name).rect for name in 'ab')
    assert left['y'] == right['y'] and right['x'] >= left['x'] + left['width']
    browser.find('#compare').click()
    browser.frame()
    assert not browser.canvas('b').is_displayed() and browser.canvas('a').size['width'] >= left['width']


def test_one_layer_alone_is_not_compared(browser, learn, tmp_path):
    browser.open(attention_explorer(learn, fname=tmp_path / 'page.html', max_n=1, layers='small'))
    browser.keys('c')
    assert not browser.state()['compare'] and not browser.canvas('b').is_displayed() and not browser.find('#compare').is_displayed() and not browser.find('#pictures').is_displayed()
    assert [s.is_displayed() for s in browser.all('select')] == [False, True, False] + [False]*3


@pytest.mark.parametrize('layers', [(0, 4), (4, 0)], ids=named)
def test_one_colour_scale(browser, page, layers):
    browser.open(page).select(compare=True, a=dict(model=0, layer=layers[0]), b=dict(model=0, layer=layers[1]), point=(20, 30))
    tops = lambda: [float(e.text) for e in browser.all('.ticks span:last-child') if e.is_displayed()]
    own, maps = tops(), [browser.weights(name) for name in 'ab']
    assert own == [pytest.approx(max(2, top_weight(m.tolist())*m.size), rel=.01) for m in maps] and own[0] != own[1]
    browser.find('#same').click()
    browser.frame()
    assert tops() == [max(own)]*2 and browser.state()['same']
    browser.select(compare=False)
    assert tops()[0] == own[0] and not browser.find('#same').is_displayed()


def test_opacity_by_hand(browser, page):
    from selenium.webdriver import Keys
    browser.open(page)
    browser.find('#opacity').send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    browser.frame()
    assert browser.state()['opacity'] == .65 and browser.state()['point'] == [18, 30]     # the arrow did not move the query pixel


@pytest.mark.parametrize('dark', [False, True])
def test_dark_mode(browser, page, dark):
    browser.open(page, dark=dark)
    light = lambda: sum(map(int, re.findall(r'\d+', browser.find('body').value_of_css_property('background-color'))[:3])) > 380
    assert browser.state()['theme'] == ('dark' if dark else 'light') and light() is not dark
    browser.find('#theme').click()
    browser.frame()
    assert browser.state()['theme'] == ('light' if dark else 'dark') and light() is dark
    text, card = (browser.find('.panel td').value_of_css_property(p) for p in ('color', 'background-color'))
    assert text != card
    browser.find('#theme').click()
    browser.frame()
    assert light() is not dark
    browser.cdp('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='light' if dark else 'dark')])
    browser.frame()
    assert light() is dark                                       # follows the system


def test_heads(browser, learn, page, recorded):
    browser.open(page).select(a=dict(model=0, layer=0), point=(17, 31), picture=1, compare=False)
    close(browser.weights(), recorded['after'], 'heads', 1, (17, 31), page)
    seen = {}
    for head in range(2):
        browser.choose('head in A', f'head {head}')
        with torch.no_grad(), eval_mode(learn.model), AttentionRecorder(learn.model, [(17, 31)], 'heads', head=head) as rec: learn.model(pictures(learn, max_n=3).x)
        close(browser.weights(), rec, 'heads', 1, (17, 31), page, 0)
        assert browser.table()['feature map'] == f'18×30 cells, head {head} of 2' and browser.state()['a']['head'] == head
        assert browser.stats()['distance'] == pytest.approx(rec.stats['heads'].distance[1, 8, 15].item(), rel=1e-3)
        seen[head] = browser.weights()
    assert abs(seen[0] - seen[1]).max() > 10*page.off
    browser.js('document.activeElement.blur()')
    browser.keys('h')
    assert 'head' not in browser.state()['a']
    browser.keys('h')
    assert browser.state()['a']['head'] == 0
    browser.choose('layer in A', 'pooled · 18×30')
    assert 'head' not in browser.state()['a'] and not browser.find('label.head').is_displayed()
    assert browser.js('try { explorer.select({a:{model:0, layer:0, head:2}}) } catch (e) { return e.name }') == 'RangeError'


def test_the_size_of_a_map_is_that_of_the_picture(browser, tmp_path):
    torch.manual_seed(0)
    data = [(torch.rand(3, *side), torch.rand(16, *side)) for side in ((12, 20), (20, 12))]
    dls = DataLoaders(*(DataLoader(data, bs=1) for _ in range(2)))
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 16, 1), SelfAttention(16, gamma=1.)), loss_func=nn.MSELoss())
    browser.open(attention_explorer(learn, fname=tmp_path/'a.html', max_n=2).path)
    for picture, size in ((0, '12×20'), (1, '20×12'), (0, '12×20')):
        browser.select(picture=picture)
        assert browser.table()['feature map'] == f'{size} cells'
        assert browser.js("return [...document.querySelectorAll('option')].map(o => o.textContent)").count(f'1 · {size}') >= 1


def test_the_head_to_begin_with(browser, learn, tmp_path):
    browser.open(attention_explorer(learn, fname=tmp_path / 'page.html', max_n=1, layers=['heads'], head=1))
    assert browser.state()['a'] == dict(model=0, layer=0, head=1)
    with pytest.raises(ValueError, match='at most 0'): attention_explorer(learn, fname=tmp_path / 'none.html', max_n=1, layers=['pooled'], head=1)


def test_a_view_is_shared_by_its_address(browser, page):
    browser.open(page)
    assert browser.js('return location.hash') == ''
    want = dict(picture=2, point=[5, 41], a=dict(model=1, layer=0, head=1), b=dict(model=0, layer=3), compare=False, same=True, opacity=.35)
    browser.select(**want)
    browser.driver.execute_async_script('setTimeout(arguments[0], 400)')
    address = browser.js('return location.href')
    browser.driver.get('about:blank')
    browser.driver.get(address)
    browser.driver.execute_async_script('const done = arguments[0]; explorer.ready.then(done)')
    assert {k: browser.state()[k] for k in want} == want
    browser.js('location.hash = "#picture=1&point=7,8"')
    browser.driver.execute_async_script('setTimeout(arguments[0], 50)')
    assert browser.state()['picture'] == 1 and browser.state()['point'] == [7, 8] and browser.state()['opacity'] == .35
    before = browser.state()
    for bad in ('#picture=9', '#picture=x&point=a,b&opacity=%', '#a=7.0&b=0.9', '#a=0.0.5', '#point=3', '#colour=1&<img src=x>'):
        browser.js('location.hash = arguments[0]', bad)
        browser.driver.execute_async_script('setTimeout(arguments[0], 50)')
        assert browser.state() == before, bad


def wild(rng, n=600):
    "Addresses and keys, each with something odd in it or nothing"
    odd = ['', '-1', '-7', '35', '36', '59', '60', '1e9', '1e999', '-0', 'NaN', '0.5', '1.5', 'x', '%', '%zz', '%00', '🛋', '__proto__', 'constructor', 'a.b', '0.0.0.0', '1,', ',', '0,0,0', '<b>', 'undefined', '99'*99]
    some = lambda: rng.choice(odd) if rng.random() < .4 else str(rng.integers(0, 4))
    values = dict(picture=some, point=lambda: f'{some()},{some()}', a=lambda: '.'.join(some() for _ in range(rng.integers(1, 4))), compare=some, same=some, opacity=some)
    values |= dict(b=values['a'], **{'__proto__': some})
    keys = ['ArrowUp', 'ArrowLeft', 'ArrowRight', 'n', 'p', 'h', 'l', 'm', 'c', '+', '-', '=', '0', '1', '9', 'F5', 'Dead', 'constructor', 'N', 'é']
    for _ in range(n):
        if rng.random() < .5: yield dict(hash='#' + '&'.join(f'{k}={values[k]()}' for k in rng.choice([*values], rng.integers(0, 5))))
        else: yield dict(key=str(rng.choice(keys)), shiftKey=bool(rng.integers(2)))

WILD = """
const [inputs, done] = arguments, bad = [];
const failed = e => bad.push(`${e.message || e.reason}`);
addEventListener('error', failed), addEventListener('unhandledrejection', failed);
const run = async () => {
  await explorer.ready;
  for (const [i, input] of inputs.entries()) {
    if ('hash' in input) { location.hash = input.hash; dispatchEvent(new Event('hashchange')); }
    else document.body.dispatchEvent(new KeyboardEvent('keydown', {...input, bubbles:true, cancelable:true}));
    if (i % 8 === 0) await new Promise(requestAnimationFrame);
    const s = explorer.state(), fine = i => Number.isInteger(i) && i >= 0;
    if (![s.picture, ...s.point, s.a.model, s.a.layer, s.b.model, s.b.layer].every(fine) || !(s.opacity >= 0 && s.opacity <= 1)) bad.push(`${JSON.stringify(input)}: ${JSON.stringify(s)}`);
    for (const name of 'ab') {
      const [h, w, weights] = explorer.weights(name), sum = weights.reduce((a, b) => a + b, 0);
      if (weights.length !== h*w || !(Math.abs(sum - 1) < 1e-4)) bad.push(`${JSON.stringify(input)}: weights of ${name} sum to ${sum}`);
    }
  }
};
run().catch(failed).then(() => done(bad));
"""

def test_any_address_and_any_key(browser, page):
    browser.open(page)
    assert browser.driver.execute_async_script(WILD, list(wild(np.random.default_rng(4)))) == []
    browser.keys('c')     # it is still there for whoever comes next
    assert isinstance(browser.state()['compare'], bool)


def test_saved_as_a_png(browser, page, tmp_path):
    browser.open(page, ratio=1).select(compare=True, point=(17, 31), picture=1)
    browser.cdp('Page.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path))
    browser.find('#save').click()
    for _ in range(50):
        if (tmp_path / 'attention-b-17-31.png').exists(): break
        browser.driver.execute_async_script('setTimeout(arguments[0], 100)')
    with Image.open(tmp_path / 'attention-b-17-31.png') as im: pixels = np.asarray(im.convert('RGB')).astype(int)
    assert pixels.shape == (2*(252 + 166), 2*(3*440 + 20), 3)    # three pictures of 420x252, at twice the size
    def part(i): return pixels[184:184 + 504, 2*(20 + i*440):2*(20 + i*440 + 420)]
    def colour(p): return (p.max(-1) - p.min(-1)).mean()
    assert colour(part(0)) > 5 and abs(part(1) - part(2)).mean() > 3 and all(part(i).std() > 10 for i in range(3))
    small = np.asarray(Image.fromarray(part(1).astype('u1')).resize((60, 36), Image.Resampling.BOX)).astype(int)
    seen = np.asarray(Image.fromarray(browser.drawn().astype('u1')).resize((60, 36), Image.Resampling.BOX)).astype(int)
    assert abs(small - seen).mean() < 4                          # the very map


class Halves(nn.Module):
    "Predicts class 1 in the right part of a picture, and looks at it"
    def __init__(self):
        super().__init__()
        self.stem, self.at = nn.Conv2d(3, 8, 6, 6), SelfAttention(8)
    def forward(self, x):
        self.at(self.stem(x))
        right = (torch.arange(x.shape[3]) >= 45).float().expand(len(x), *x.shape[2:])
        return torch.stack([1 - right, right], 1)

def test_the_picture_in_colour_with_the_prediction_as_an_outline(browser, tmp_path):
    learn = learner(tmp_path / 'pictures', Halves())
    learn.loss_func = nn.CrossEntropyLoss()
    page = attention_explorer(learn, fname=tmp_path / 'page.html', max_n=1)
    assert data_of(page)['models'][0]['outlines'] == [dict(path=f'M45 0V{H}', h=H, w=W)]
    browser.open(page).select(point=(3, 3))
    uri = browser.js('return document.querySelector(".photo canvas").toDataURL()')
    photo = np.asarray(Image.open(BytesIO(base64.b64decode(uri.split(',')[1]))).convert('RGB')).astype(int)
    x = round(45/W*photo.shape[1])
    assert photo[:, x-1:x+1].max(1).min() > 200                  # a white line from top to bottom, in black
    assert (photo[:, x-2:x+3].min(1).max(-1) < 90).mean() > .9 and 'prediction' in browser.find('.photo').text and 'a.png' in browser.find('.photo').text
    assert (photo.max(-1) - photo.min(-1)).mean() > 10 and photo.shape[:2] == browser.drawn().shape[:2]
    canvas = browser.find('.photo canvas')
    browser.actions().move_to_element_with_offset(canvas, round(.4*canvas.size['width']), 0).click().perform()
    browser.frame()
    np.testing.assert_allclose(browser.state()['point'], [18, 54], atol=1)      # a click there counts too


@pytest.mark.parametrize('mask', [torch.zeros(3, 4), torch.tensor([[0, 1, 0], [2, 2, 1]]), torch.randint(0, 3, (17, 23), generator=torch.Generator().manual_seed(1))], ids=['flat', 'small', 'random'])
def test_outlines_are_the_borders_between_classes(mask):
    o, between = _outline(mask.int()), set()
    for x, y, kind, to in re.findall(r'M(\d+) (\d+)([HV])(\d+)', o['path']):
        x, y, to = int(x), int(y), int(to)
        between |= {((y-1, c), (y, c)) for c in range(x, to)} if kind == 'H' else {((r, x-1), (r, x)) for r in range(y, to)}
    h, w = mask.shape
    cells = [((r, c), (r+dr, c+dc)) for r in range(h) for c in range(w) for dr, dc in ((0, 1), (1, 0)) if r+dr < h and c+dc < w]
    assert between == {(a, b) for a, b in cells if mask[a] != mask[b]} and (o['h'], o['w']) == (h, w)


def test_a_large_outline_is_made_smaller():
    mask = (torch.arange(900) >= 600).int().expand(700, -1)
    assert _outline(mask) == dict(path='M150 0V175', h=175, w=225)


def squeezed(folder, shape):
    from fastai.vision.augment import Resize
    folder.mkdir()
    Image.fromarray(render_room(1, shape)[0]).save(folder / 'a.png')
    dls = DataBlock((ImageBlock, RegressionBlock), get_items=lambda p: [p / 'a.png'], get_y=lambda f: 0., splitter=lambda items: ([0], [0]), item_tfms=Resize(36, method='squish')).dataloaders(folder, bs=1, num_workers=0)
    return Learner(dls, nn.Sequential(nn.Conv2d(3, 8, 6, 6), SelfAttention(8)), loss_func=nn.MSELoss(), path=folder)

@pytest.mark.parametrize('shape', [(60, 150), (150, 60)], ids=['wide', 'tall'])
def test_pictures_that_were_squeezed_have_their_own_shape(browser, tmp_path, shape):
    page = attention_explorer(squeezed(tmp_path / 'pictures', shape), fname=tmp_path / 'page.html')
    picture, = data_of(page)['pictures']
    assert (picture['h'], picture['w']) == (36, 36) and picture['shape'][0] / picture['shape'][1] == pytest.approx(shape[0]/shape[1], rel=.03)
    with Image.open(BytesIO(base64.b64decode(picture['src'].split(',')[1]))) as im: assert im.height / im.width == pytest.approx(shape[0]/shape[1], rel=.1)
    browser.open(page)
    for css in ('.panel canvas', '.photo canvas'):
        size = browser.find(css).size
        assert size['height'] / size['width'] == pytest.approx(shape[0]/shape[1], rel=.03)
    canvas = browser.find('.panel canvas')
    browser.actions().move_to_element_with_offset(canvas, round(canvas.size['width']/4), round(-canvas.size['height']/4)).click().perform()
    browser.frame()
    np.testing.assert_allclose(browser.state()['point'], [9, 27], atol=1)


def test_each_map_says_what_it_is_worth(browser, learn, tmp_path):
    idle = Net(seed=1)
    with torch.no_grad(): idle.heads.gamma.fill_(1e-5)
    browser.open(attention_explorer(learn, fname=tmp_path / 'page.html', max_n=1, layers='heads', others={'idle': idle})).select(compare=True)
    said = [e.text for e in browser.all('.said')]
    data = data_of(tmp_path / 'page.html')['models']
    assert said[0] == f'gamma 0.3: attention changes the features by {data[0]["layers"][0]["changes"][0]:.0%}' and said[1].endswith(': attention does nothing here: it changes the features by 0.0%')
    assert ['nothing' in e.get_attribute('class') for e in browser.all('.said')] == [False, True]


def test_places_come_before_paths(learn, tmp_path):
    from fastai_selfattn.placement.insert import Place
    from fastai_selfattn.placement.sites import Site
    model = copy.deepcopy(learn.model)
    model.heads.attention_place, model.small.attention_place = Place(Site('decoder.1', 'heads', 24), 'replace'), Place(Site('small', 'small', 16), 'replace')
    data = data_of(attention_explorer(learner(tmp_path / 'pictures', model), fname=tmp_path / 'page.html', max_n=1))
    assert [x['site'] for x in data['models'][0]['layers']] == ['decoder.1', '', '', '', '']

def test_places_are_shown_before_paths(browser, learn, tmp_path):
    from fastai_selfattn.placement.insert import Place
    from fastai_selfattn.placement.sites import Site
    model = copy.deepcopy(learn.model)
    model.heads.attention_place = Place(Site('decoder.1', 'heads', 24), 'replace')
    browser.open(attention_explorer(learner(tmp_path / 'pictures', model), fname=tmp_path / 'page.html', max_n=1))
    assert browser.js('return document.querySelector(".layer option").textContent') == 'decoder.1 (heads) · 18×30'


@pytest.mark.parametrize('compare', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('width', [820, 1100])
def test_it_fits_its_frame(browser, page, tmp_path, width, compare):
    host = tmp_path / 'host.html'
    host.write_text(f'<!doctype html><meta charset="utf-8"><script>window.explorer = {{ready: Promise.resolve()}}</script>{page._repr_html_()}', encoding='utf-8')
    browser.open(host, width, 1000)
    browser.driver.switch_to.frame(browser.find('iframe'))
    browser.driver.execute_async_script('const done = arguments[0], wait = () => window.explorer ? explorer.ready.then(done) : setTimeout(wait, 20); wait()')
    browser.select(compare=compare)
    for _ in range(5): browser.frame()
    high, inside, across, wide = browser.js('const e = document.documentElement; return [e.scrollHeight, innerHeight, e.scrollWidth, e.clientWidth]')
    assert across <= wide and (high <= inside or width < 900 and compare)      # with three pictures in two rows it scrolls
    assert browser.canvas().size['height'] >= 130
    browser.driver.switch_to.default_content()


def test_names_are_shown_as_they_are_and_do_not_run(browser, evil):
    browser.open(evil)
    shown = lambda css: browser.js('return Array.from(document.querySelectorAll(arguments[0]), e => e.textContent)', css)
    assert shown('h1') == [EVIL] and browser.driver.title.split() == EVIL.split() and shown('#pictures span') == [EVIL_FILE, 'b.png']
    assert shown('select')[0] == EVIL + EVIL + '2' and shown('.panel:first-child .pick .layer option') == [EVIL_LAYER + ' · 9×15', 'second · 9×15']
    assert not browser.all('img[src="x"]') and not browser.all('main b[onclick]') and len(browser.all('img')) == 2 and browser.js('return window.ran') is None
    browser.choose('layer in A', EVIL_LAYER + ' · 9×15')
    browser.click((17, 31))
    browser.find('#compare').click()
    browser.frame()
    assert EVIL_LAYER in browser.canvas().get_attribute('aria-label') and browser.js('return window.ran') is None
    assert browser.js('return document.documentElement.scrollWidth <= innerWidth')


def requests(driver):
    events = [json.loads(e['message'])['message'] for e in driver.get_log('performance')]
    return [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']

def test_nothing_is_loaded_from_anywhere(driver, page):
    browser = Browser(driver).open(page)
    browser.click((3, 3)), browser.keys('n', 'l', 'c', 'm'), browser.find('#theme').click()
    urls = requests(driver)
    assert page.path.resolve().as_uri() in urls and {u for u in urls if not u.startswith('data:')} == {page.path.resolve().as_uri()}
    assert not browser.complaints()
    blocked = driver.execute_async_script('''
const done = arguments[0], seen = [];
document.addEventListener('securitypolicyviolation', e => { seen.push(e.effectiveDirective); if (seen.length === 4) done(seen.sort()); });
new Image().src = 'http://127.0.0.1:9/x.png';
fetch('http://127.0.0.1:9/').catch(() => 0);
document.head.appendChild(Object.assign(document.createElement('script'), {src: 'http://127.0.0.1:9/x.js'}));
document.head.appendChild(Object.assign(document.createElement('link'), {rel: 'stylesheet', href: 'http://127.0.0.1:9/x.css'}));''')
    assert blocked == ['connect-src', 'img-src', 'script-src-elem', 'style-src-elem']       # even if something tried
    browser.complaints(), driver.get('about:blank')


@pytest.mark.parametrize('compare', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('width', [360, 390])
def test_on_a_phone(browser, page, evil, recorded, width, compare):
    for p in (evil, page):
        browser.open(p, width, 800, mobile=True, ratio=2)
        assert not browser.state()['compare']                    # there is room for one
        browser.select(compare=compare)
        assert browser.js('return [innerWidth, document.documentElement.scrollWidth]') == [width, width]
    small = [e.text for e in browser.all('button, select') if e.is_displayed() and e.size['height'] < 36]
    assert not small
    assert browser.js('const c = document.querySelector("canvas"); return c.width === Math.round(2*c.clientWidth) && Math.abs(c.clientHeight/c.clientWidth - arguments[0]) < .02', H/W)
    browser.js('window.scrollTo(0, document.querySelector("canvas").getBoundingClientRect().top - 100)')
    box = browser.js('const b = document.querySelector("canvas").getBoundingClientRect(); return [b.left, b.top, b.width, b.height]')
    def touch(kind, *point):
        browser.cdp('Input.dispatchTouchEvent', type=kind, touchPoints=[dict(x=box[0] + (c + .5)*box[2]/W, y=box[1] + (r + .5)*box[3]/H) for r, c in point])
        browser.frame()
        return browser.state()['point']
    scrolled = browser.js('return scrollY')
    near = lambda got, want: np.testing.assert_allclose(got, want, atol=1)
    near(touch('touchStart', (5, 50)), (5, 50))
    near(touch('touchMove', (12, 40)), (12, 40))
    near(touch('touchMove', (33, 30)), (33, 30))
    near(touch('touchEnd'), (33, 30))
    assert browser.js('return scrollY') == scrolled              # the page does not scroll away under the finger
    h, w = browser.weights().shape
    assert (h, w) == (6, 10)
    browser.select(point=(17, 31))
    close(browser.weights(), recorded['after'], 'small', 0, (17, 31), page)


def test_live_in_a_notebook(browser, page, recorded, tmp_path):
    host = tmp_path / 'host.html'
    host.write_text(f'<!doctype html><meta charset="utf-8"><script>window.explorer = {{ready: Promise.resolve()}}; window.secret = 1</script>{page._repr_html_()}', encoding='utf-8')
    browser.open(host)
    browser.driver.switch_to.frame(browser.find('iframe'))
    browser.driver.execute_async_script('const done = arguments[0], wait = () => window.explorer ? explorer.ready.then(done) : setTimeout(wait, 20); wait()')
    browser.select(point=(17, 31), a=dict(model=0, layer=0))
    close(browser.weights(), recorded['after'], 'heads', 0, (17, 31), page)
    assert browser.drawn().std() > 5                             # pictures can be read there
    assert browser.js('try { return parent.secret } catch (e) { return e.name }') == 'SecurityError'
    browser.driver.switch_to.default_content()


def test_it_can_be_read_aloud(browser, page):
    browser.open(page).select(point=(3, 4))
    label = browser.canvas().get_attribute('aria-label')
    assert 'a.png' in label and 'small' in label and 'after' in label and 'row 3, column 4' in label and browser.canvas().get_attribute('tabindex') == '0'
    names = browser.js('return Array.from(document.querySelectorAll("button, select, input"), e => (e.getAttribute("aria-label") || e.textContent || e.closest("label")?.textContent || "").trim())')
    assert all(names) and len(names) >= 10
    assert browser.js('return new Promise(done => setTimeout(() => done(document.getElementById("status").textContent), 800))').startswith('a.png, query pixel row 3, column 4: largest weight')
    said = browser.find('footer').text
    assert 'A map is not an explanation.' in said and 'gamma' in said and 'rounded to 16-bit whole numbers' in said


def test_what_cannot_be_chosen_is_told(browser, page):
    browser.open(page)
    before = browser.state()
    for what in (dict(picture=3), dict(a=dict(model=2)), dict(b=dict(model=0, layer=5)), dict(picture='a'), dict(colour=1)):
        assert browser.js('try { explorer.select(arguments[0]) } catch (e) { return e.name }', what) == 'RangeError', what
    assert browser.state() == before


def test_a_file_that_is_cut_short_says_so(driver, page, tmp_path):
    text = page.path.read_text(encoding='utf-8')
    at = text.index('</script>\n<script>\n\'use strict\'')
    (tmp_path / 'cut.html').write_text(text[:at - 1000] + text[at:], encoding='utf-8')
    driver.get((tmp_path / 'cut.html').as_uri())
    trouble = driver.find_element('id', 'trouble')
    assert trouble.is_displayed() and 'This page does not work here' in trouble.text
    driver.get_log('browser'), driver.get('about:blank')


def test_without_a_browser_the_tests_say_so(monkeypatch):
    monkeypatch.delenv('SELFATTN_NEEDS_BROWSER', raising=False)
    with pytest.raises(pytest.skip.Exception, match='no chromium'): no_browser('no chromium')
    monkeypatch.setenv('SELFATTN_NEEDS_BROWSER', '1')
    with pytest.raises(pytest.fail.Exception, match='no chromium'): no_browser('no chromium')


def test_the_stated_error_is_the_largest_of_all_pictures(tmp_path, monkeypatch):
    "One picture whose vectors are rounded badly among others: the page states its error, wherever it comes"
    from fastai_selfattn.seeing import explorer
    learn = learner(tmp_path / "pictures", Net())
    real = explorer._off
    for bad in range(3):
        calls = iter(range(99))
        monkeypatch.setattr(explorer, '_off', lambda *args: .5 if next(calls) == bad else real(*args))
        assert attention_explorer(learn, fname=tmp_path / f'page{bad}.html', max_n=3, layers='small').off == .5

def test_a_page_of_its_own_is_replaced_and_no_other_file(tmp_path):
    learn = learner(tmp_path / "pictures", Net())
    first = attention_explorer(learn, fname=tmp_path / 'page.html', max_n=1, layers='small').path.read_bytes()
    attention_explorer(learn, fname=tmp_path / 'page.html', max_n=2, layers='small')
    assert (tmp_path / 'page.html').read_bytes() != first
    (tmp_path / 'other.html').write_text('<html>mine</html>')
    with pytest.raises(ValueError, match='exists, and no explorer wrote it'): attention_explorer(learn, fname=tmp_path / 'other.html', max_n=1)
    assert (tmp_path / 'other.html').read_text() == '<html>mine</html>'
