"`plot_attention`, `plot_gamma` and `plot_sites`: what lands on the axes, where, and that nothing else is touched"
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.layers import ConvLayer
from fastai.torch_core import TensorImage
from fastai.vision.learner import create_unet_model
from matplotlib.colors import to_rgba
from torch import nn

from fastai_selfattn.plot import plot_attention, plot_gamma, plot_sites
from fastai_selfattn.sites import Site, attention_sites

H, W = 33, 50

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def amap(h=3, w=5, seed=4): return torch.rand(h, w, generator=torch.Generator().manual_seed(seed)).flatten().softmax(0).view(h, w)

def image(*lead): return torch.rand(*lead, H, W, generator=torch.Generator().manual_seed(6))

def history(*names, n=4): return pd.DataFrame({'step': range(n), 'epoch': np.arange(n) / 3, **{name: np.linspace(0, (i + 1) / 10, n) for i, name in enumerate(names)}})


def state():
    ax = plt.gca()
    return plt.get_fignums(), ax, len(ax.images), len(ax.lines), dict(mpl.rcParams)

@pytest.mark.parametrize('draw', [lambda ax: plot_attention(image(3), amap(), (7, 20), ax), lambda ax: plot_gamma(history('gamma'), ax), lambda ax: plot_gamma(history('gamma_1', 'gamma_2'), ax)])
def test_draws_into_the_ax_given_and_nowhere_else(draw):
    fig, ax = plt.subplots()
    plt.figure()                                    # another one is the current one
    before = state()
    assert draw(ax) is ax and len(ax.lines) > 0
    assert state() == before and fig.axes == [ax]
    own = mpl.figure.Figure().subplots()            # one that pyplot does not know
    assert draw(own) is own and state() == before


@pytest.mark.parametrize('draw,size', [(lambda: plot_attention(image(3), amap(), (7, 20)), W / H), (lambda: plot_gamma(history('gamma')), 2)])
def test_makes_one_figure_if_no_ax_is_given(draw, size):
    taken = plt.figure().gca()
    ax = draw()
    assert ax is not taken and len(plt.get_fignums()) == 2 and ax.figure.axes == [ax] and not taken.lines
    w, h = ax.figure.get_size_inches()
    assert w / h == pytest.approx(size)


@pytest.mark.parametrize('lead', [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize('kind', [lambda t: t, TensorImage, lambda t: t.double(), lambda t: t.clone().requires_grad_()], ids=['float32', 'TensorImage', 'float64', 'with gradient'])
def test_image_map_and_marker_are_where_they_belong(lead, kind):
    im, m = kind(image(*lead)), kind(amap())
    ax = plot_attention(im, m, (7, 20), alpha=.4)
    below, above = ax.images
    np.testing.assert_allclose(below.get_array(), image(*lead).reshape(-1, H, W).mean(0), rtol=1e-6)
    np.testing.assert_allclose(above.get_array(), amap() * 15, rtol=1e-6)
    assert tuple(below.get_extent()) == tuple(above.get_extent()) == (-.5, W - .5, H - .5, -.5)
    assert (below.get_cmap().name, below.get_clim()) == ('gray', (0, 1))
    np.testing.assert_allclose(above.get_alpha(), .4 * (.2 + .8 * amap() / amap().max()), rtol=1e-5)      # the image shows through where there is little
    assert above.get_clim() == (0, pytest.approx(amap().max().item() * 15))
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[20, 7]]] * 2      # x is the column
    assert ax.get_xlim() == (-.5, W - .5) and ax.get_ylim() == (H - .5, -.5) and not ax.axison


def test_each_cell_covers_its_part_of_the_image():
    "Drawn: the one cell that has all the weight is bright exactly there"
    m = torch.zeros(3, 5)
    m[2, 1] = 1.
    fig = plt.figure(figsize=(5, 3.3), dpi=100)
    ax = fig.add_axes((0, 0, 1, 1))
    plot_attention(torch.zeros(H, W), m, (0, W - 1), ax, alpha=1)
    ax.lines[1].remove(), ax.lines[0].remove()
    fig.canvas.draw()
    bright = np.asarray(fig.canvas.buffer_rgba())[..., :3].mean(-1) > 128
    rows, cols = np.nonzero(bright)
    np.testing.assert_allclose([rows.min(), rows.max() + 1, cols.min(), cols.max() + 1], [220, 330, 100, 200], atol=2)
    assert bright.mean() == pytest.approx(1 / 15, abs=.005)


def test_one_colour_scale_for_several():
    fig, axs = plt.subplots(1, 2)
    for ax, seed in zip(axs, (1, 2)):
        plot_attention(image(), amap(seed=seed), (0, 0), ax, vmax=1.1, alpha=.5)
        m = amap(seed=seed) * 15
        assert ax.images[-1].get_clim() == (0, 1.1) and 1.1 < m.max()
        np.testing.assert_allclose(ax.images[-1].get_alpha(), .5 * (.2 + .8 * (m / 1.1).clamp(max=1)), rtol=1e-5)


def test_inputs_stay_as_they_were():
    im, m, h = image(3), amap(), history('gamma')
    plot_attention(im, m, (7, 20)), plot_gamma(h)
    assert torch.equal(im, image(3)) and torch.equal(m, amap()) and h.equals(history('gamma'))


@pytest.mark.parametrize('im,m', [(image(2, 3), amap()), (image()[0], amap()), (image(3), amap()[None]), (image(3), amap().flatten())], ids=str)
def test_shapes_that_do_not_fit_are_named_and_no_figure_is_made(im, m):
    with pytest.raises(ValueError, match=r'`image` must be .* and `amap` \(mh, mw\), got') as e: plot_attention(im, m, (0, 0))
    assert str(tuple(im.shape)) in str(e.value) and str(tuple(m.shape)) in str(e.value) and not plt.get_fignums()


@pytest.mark.parametrize('names', [('gamma',), ('gamma_4', 'gamma_5'), ('gamma_0', 'gamma_2', 'gamma_5.conv')], ids=len)
def test_a_line_for_each_layer(names):
    h = history(*names)
    ax = plot_gamma(h)
    zero, *lines = ax.lines
    assert set(zero.get_ydata()) == {0} and [line.get_label() for line in lines] == list(names)
    for line, name in zip(lines, names): np.testing.assert_array_equal(line.get_xydata(), h[['step', name]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('training step', 'gamma')
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(names) if len(names) > 1 else ax.get_legend() is None


@pytest.mark.parametrize('h,got', [(history('gamma', n=0), r"got 0 rows of \['step', 'epoch', 'gamma'\]"), (pd.DataFrame(), r'got 0 rows of \[\]'), (history(), 'got 4 rows'),
                                   (history('gamma').drop(columns='step'), r"got 4 rows of \['epoch', 'gamma'\]")])
def test_nothing_to_draw_is_an_error_and_no_figure_is_made(h, got):
    with pytest.raises(ValueError, match='`history` must have rows, a column `step` and columns `gamma...`, ' + got): plot_gamma(h)
    assert not plt.get_fignums()


# --- plot_sites ---

CNN = [Site('stem', 'stem', 16, (24, 40)), Site('body.0', 'body.0', 24, (12, 20), has='SelfAttention'), Site('body.1', 'body.1', 512, (6, 10)), Site('pool', 'pool', 512, (1, 1), reason='one pixel: nothing to attend to'), Site('fc', 'fc', reason='gives (1, 5)')]

def encoder(pretrained=False):
    chs = (3, 8, 16, 24, 32, 40)
    return nn.Sequential(*[ConvLayer(a, b, stride=2) for a, b in zip(chs, chs[1:])], nn.AdaptiveAvgPool2d(1))

@pytest.fixture(scope='module')
def unet(): return {sa: attention_sites(create_unet_model(encoder, 2, (64, 96), pretrained=False, self_attention=sa), (64, 96)) for sa in (True, False)}

def markers(ax):
    "Marker, whether filled, x and y of each site, from left to right"
    lines = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return [(line.get_marker(), to_rgba(line.get_markerfacecolor()) == to_rgba('C0'), line.get_xdata()[0], line.get_ydata()[0]) for line in lines]

def dashed(ax): return [tuple(int(x) for x in line.get_xdata()) for line in ax.lines if line.is_dashed()]

def filled(ax, sites): return [sites[int(x)].name for _, is_filled, x, _ in markers(ax) if is_filled]


def test_sites_are_drawn_at_the_side_of_their_map():
    ax = plot_sites(CNN)
    assert [(m, x, y) for m, _, x, y in markers(ax)] == [('o', 0, np.log2(40)), ('o', 1, np.log2(20)), ('o', 2, np.log2(10)), ('x', 3, 0)]      # the longest side; `fc` has no map
    assert [(t, label.get_text()) for t, label in zip(ax.get_yticks(), ax.get_yticklabels())] == [(np.log2(s), str(s)) for s in (1, 10, 20, 40)] and not len(ax.get_xticks()) and ax.get_ylabel() == 'side of the map'
    (path,) = [line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata()) == 4]
    assert path == [[i, np.log2(s)] for i, s in enumerate((40, 20, 10, 1))] and not dashed(ax)
    assert [t.get_text() for t in ax.texts] == [f'{s.name}, {s.channels} ch, {s.mib:.0f} MiB' if s.mib >= 1 else f'{s.name}, {s.channels} ch, <1 MiB' for s in CNN[:3]] + ['pool'] and '<1 MiB' in plot_sites([Site('a', 'a', 8, (5, 7))]).texts[0].get_text()
    assert [t.xy for t in ax.texts] == [(x, y) for _, _, x, y in markers(ax)]


def test_skips_join_encoder_and_decoder_of_the_same_map(unet):
    ax = plot_sites(unet[False])
    at = {s.name: i for i, s in enumerate(unet[False])}
    assert dashed(ax) == [(at[f'encoder.{i}'], at[f'decoder.{3-i}']) for i in range(4)]
    for i, j in dashed(ax): assert unet[False][i].map == unet[False][j].map
    assert len(markers(ax)) == len(ax.texts) == 10 and [t.get_text().splitlines()[:2] for t in ax.texts] == [[s.name, f'{s.channels} ch'] for s in unet[False]]
    other = [Site('encoder.0', 'a', 8, (6, 4)), Site('encoder.1', 'b', 8, (6, 5)), Site('middle', 'c', 8, (6, 4)), Site('decoder.0', 'd', 8, (6, 4))]
    assert dashed(plot_sites(other)) == [(0, 3)]                # not by side alone


@pytest.mark.parametrize('sa', [True, False])
def test_those_with_attention_are_filled_if_none_are_chosen(unet, sa):
    assert filled(plot_sites(unet[sa]), unet[sa]) == ['decoder.1']*sa and filled(plot_sites(CNN), CNN) == ['body.0']
    assert [t.get_text().splitlines()[0] for t in plot_sites(unet[sa]).texts if t.get_fontweight() == 'bold'] == ['decoder.1']*sa


@pytest.mark.parametrize('choose,want', [(lambda s: [], []), (lambda s: 'middle', ['middle']), (lambda s: ['decoder.3', 'encoder.0'], ['encoder.0', 'decoder.3']), (lambda s: s.match('*.[01]'), ['encoder.0', 'encoder.1', 'decoder.0', 'decoder.1']),
                                         (lambda s: [s['middle'], 'decoder.2'], ['middle', 'decoder.2']), (lambda s: s[:2], ['encoder.0', 'encoder.1']), (lambda s: {'middle'}, ['middle']),
                                         (lambda s: s['middle'], ['middle']), (lambda s: s.match(['layers.3', 'layers.5.conv2']), ['middle', 'decoder.1'])],
                         ids=['none', 'a name', 'names', 'matched', 'mixed', 'a slice', 'set', 'one site', 'chosen by path'])
def test_exactly_the_chosen_are_filled(unet, choose, want):
    "Though fastai's place has attention"
    ax = plot_sites(unet[True], choose(unet[True]))
    assert filled(ax, unet[True]) == want and [t.get_text().splitlines()[0] for t in ax.texts if t.get_fontweight() == 'bold'] == want
    assert len(markers(ax)) == 10 and all(m == 'o' for m, *_ in markers(ax))


def test_where_nothing_fits_there_is_a_cross_even_if_chosen():
    ax = plot_sites(CNN, ['stem', 'pool'])
    assert filled(ax, CNN) == ['stem'] and [m for m, *_ in markers(ax)] == ['o', 'o', 'o', 'x'] and ax.texts[3].get_text() == 'pool'


def test_other_models(unet):
    model = nn.Sequential(nn.Conv1d(2, 8, 3, 2), nn.MaxPool1d(2), nn.Flatten())
    sites = attention_sites(model, 64)
    ax = plot_sites(sites)
    assert [(m, y) for m, _, _, y in markers(ax)] == [('o', np.log2(31)), ('o', np.log2(15))]
    ax = plot_sites([s._replace(name=s.path) for s in unet[True]])           # a U-Net by its paths has no skips that it knows of
    assert not dashed(ax) and len(markers(ax)) == 10


@pytest.mark.parametrize('chosen', [None, ['middle']])
def test_sites_go_into_the_ax_given_and_nowhere_else(unet, chosen):
    fig, ax = plt.subplots()
    plt.figure()
    before = state()
    assert plot_sites(unet[True], chosen, ax) is ax and state() == before and fig.axes == [ax] and len(markers(ax)) == 10
    own = mpl.figure.Figure().subplots()
    assert plot_sites(unet[True], chosen, own) is own and state() == before
    new = plot_sites(unet[True], chosen)
    assert new is not plt.figure(2).gca() and len(plt.get_fignums()) == 3 and new.figure.axes == [new]


@pytest.mark.parametrize('sites,chosen,says', [(CNN[4:], None, 'nothing to draw: none of `sites` has a map'), ([], None, 'nothing to draw'), (CNN, ['stem', 'x', 'a'], r'no site a, x: there are stem, body\.0, body\.1, pool'), (CNN, 'body', 'no site body: there are stem'), (CNN, [3], 'no site 3')], ids=str)
def test_sites_that_are_not_there_are_named_and_no_figure_is_made(sites, chosen, says):
    with pytest.raises(ValueError, match=says): plot_sites(sites, chosen)
    assert not plt.get_fignums()
