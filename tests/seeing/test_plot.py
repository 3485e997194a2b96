"What lands on the axes, where, and that nothing else is touched"
import io
import warnings
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import named
import torch
from fastai.layers import ConvLayer
from fastai.torch_core import TensorImage
from fastai.vision.learner import create_unet_model
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.transforms import Bbox
from torch import nn

from fastai_selfattn.seeing.chart import plot_attention_stats, plot_gamma, plot_sites
from fastai_selfattn.seeing.plot import plot_attention, show_attention, show_attention_growth, show_receptive_field
from fastai_selfattn.placement.sites import Site, attention_sites
from watched import top_weight

H, W = 33, 50

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


@pytest.mark.parametrize('lead', [(), (1,), (3,)], ids=named)
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


@pytest.mark.parametrize('im,m', [(image(2, 3), amap()), (image()[0], amap()), (image(3), amap()[None]), (image(3), amap().flatten())], ids=named)
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
                                   (history('gamma').drop(columns='step'), r"got 4 rows of \['epoch', 'gamma'\]"),
                                   (history('gamma').assign(gamma=np.nan), r"got 4 rows of \['step', 'epoch', 'gamma'\], all without a value")])
def test_nothing_to_draw_is_an_error_and_no_figure_is_made(h, got):
    with pytest.raises(ValueError, match='`history` must have rows, a column `step` and columns `gamma...`, ' + got): plot_gamma(h)
    assert not plt.get_fignums()


# --- plot_attention: edges

@pytest.mark.parametrize('value,vmax', [(0., None), (np.nan, None), (np.inf, None), (.1, 0)], ids=named)
def test_a_map_without_a_strongest_cell_is_drawn(value, vmax):
    ax = plot_attention(image(), torch.full((3, 5), value), (7, 20), vmax=vmax)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ax.figure.canvas.draw()
    assert ax.images[-1].get_clim() == (0, 1) and np.isfinite(ax.images[-1].get_alpha()).all()


def test_what_is_not_a_number_is_blue_and_leaves_the_scale_alone():
    m = torch.full((2, 2), .25)
    m[0, 1] = torch.nan
    fig = plt.figure(figsize=(5, 3.3), dpi=100)
    ax = plot_attention(torch.zeros(H, W), m, (H - 1, 0), fig.add_axes((0, 0, 1, 1)), alpha=1)
    assert ax.images[-1].get_clim() == (0, 1)
    fig.canvas.draw()
    drawn = np.asarray(fig.canvas.buffer_rgba())[..., :3] / 255
    np.testing.assert_allclose(drawn[50, 450], to_rgba('#56b4e9')[:3], atol=.01)
    np.testing.assert_allclose(drawn[50, 50], plt.get_cmap('magma')(1.)[:3], atol=.01)


@pytest.mark.parametrize('point', [(-1, 0), (H, 0), (0, W), (0, -1), (20, 40, 1), (3,)], ids=named)
def test_a_point_off_the_image_is_named_and_no_figure_is_made(point):
    n = 2
    field = spots(point=point)
    for draw in (lambda: plot_attention(image(), amap(), point), lambda: show_attention(image(3)[None], {'a': amap()[None, None]}, [point]),
                 lambda: show_attention_growth(image(), [amap()] * n, point), lambda: show_receptive_field(image(), field)):
        with pytest.raises(ValueError, match=rf'point \({point[0]},.*\) is not on the image of 33x50 pixels: give \(row, col\) from \(0, 0\) to \(32, 49\)'): draw()
    assert not plt.get_fignums()


def test_markers_at_the_border_are_drawn_whole():
    fig = plt.figure(figsize=(5, 5), dpi=100)
    ax = fig.add_axes((.25, .25, .5, .5))
    plot_attention(torch.zeros(40, 40), torch.zeros(4, 4), (0, 0), ax)
    fig.canvas.draw()
    drawn = np.asarray(fig.canvas.buffer_rgba())[..., :3].mean(-1)
    outside = drawn[105:125, 105:160]               # above the corner at (125, 125)
    assert (outside < 128).sum() > 20


def test_another_norm():
    ax = plot_attention(image(), amap(), (7, 20), norm=LogNorm(.1, 10), alpha=1)
    m = amap() * 15
    assert ax.images[-1].get_clim() == (.1, 10)
    np.testing.assert_allclose(ax.images[-1].get_alpha(), .2 + .8 * (m.log10() + 1) / 2, rtol=1e-4)


# --- plot_gamma: other columns

@pytest.mark.parametrize('what,label', [('gamma', 'gamma'), ('grad', 'gradient of gamma'), ('change', 'share of the features that attention changes')])
@pytest.mark.parametrize('names', [('',), ('_0', '_1')], ids=len)
def test_what_is_drawn_of_a_history(what, label, names):
    columns = [k + n for k in ('gamma', 'grad', 'change') for n in names]
    h = history(*columns, 'gammas', 'gradient', 'changed', 'grads_0')         # these only begin alike
    ax = plot_gamma(h, what=what)
    assert [line.get_label() for line in ax.lines[1:]] == [what + n for n in names] and ax.get_ylabel().replace('\n', ' ') == label
    for line, n in zip(ax.lines[1:], names): np.testing.assert_array_equal(line.get_xydata(), h[['step', what + n]])
    own = mpl.figure.Figure().subplots()
    assert plot_gamma(h, own, what) is own and plot_gamma(h, ax=own, what=what) is own


def test_steps_without_a_value_do_not_break_a_line():
    h = history('grad_0', 'grad_1', n=9)
    h.loc[h['step'] % 3 > 0, 'grad_0'] = np.nan
    _, a, b = plot_gamma(h, what='grad').lines
    assert a.get_xdata().tolist() == [0, 3, 6] and b.get_xdata().tolist() == list(range(9))


def test_unknown_what():
    with pytest.raises(ValueError, match="`what` must be one of gamma, grad, change, got 'lr'"): plot_gamma(history('lr'), what='lr')
    with pytest.raises(ValueError, match=r'columns `grad...`, got 4 rows'): plot_gamma(history('gamma'), what='grad')
    assert not plt.get_fignums()


def looks(lines): return [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]

def test_many_lines_differ_in_more_than_colour():
    "Neighbours have another style, and no two of 28 are alike"
    lines = plot_gamma(history(*[f'gamma_{i}' for i in range(28)])).lines[1:]
    assert len(set(looks(lines))) == 28 and all(a.get_linestyle() != b.get_linestyle() for a, b in zip(lines, lines[1:]))
    axs = plot_attention_stats(stats([f'l{i}' for i in range(9)]))
    for lines in (axs[0].lines[1:], axs[1].lines): assert len({line.get_marker() for line in lines}) == len(set(looks(lines))) == 9


@pytest.mark.parametrize('n', [3, 4, 12])
def test_a_legend_of_many_layers_covers_no_line_and_is_not_cut(n):
    names = [f'encoder.{i}.a.long.name' for i in range(n)]
    for ax in (plot_gamma(history(*['gamma_' + s for s in names])), plot_attention_stats(stats(names))[0]):
        ax.figure.canvas.draw()
        legend, box = ax.get_legend().get_window_extent(), ax.get_window_extent()
        if n > 3: assert legend.y0 >= box.y1 - 1
        assert legend.x0 >= 0 and legend.x1 <= ax.figure.bbox.width and legend.y1 <= ax.figure.bbox.height and box.height > 150


# --- plot_attention_stats

def stats(names=('middle', 'decoder.1'), epochs=4): return pd.DataFrame([dict(epoch=e, layer=n, picture=p, gamma=0., entropy_share=1 - (i + 1) * e / 50 + p / 10, distance=10. * (i + 1) + e + p)
                                                                       for e in range(epochs) for p in (-1, 1) for i, n in enumerate(names)])

def test_stats_are_averaged_and_drawn_by_layer():
    axs = plot_attention_stats(stats())
    uniform, *entropy = axs[0].lines
    assert axs.shape == (2,) and set(uniform.get_ydata()) == {1} and uniform.is_dashed() and [t.get_text() for t in axs[0].texts] == ['uniform']
    for i, (a, b) in enumerate(zip(entropy, axs[1].lines)):
        assert a.get_xdata().tolist() == b.get_xdata().tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(a.get_ydata(), [1 - (i + 1) * e / 50 for e in range(4)])
        np.testing.assert_allclose(b.get_ydata(), [10 * (i + 1) + e for e in range(4)])
        assert a.get_color() == b.get_color() and a.get_marker() == b.get_marker()
    assert len(entropy) == len(axs[1].lines) == 2 and [t.get_text() for t in axs[0].get_legend().get_texts()] == ['middle', 'decoder.1']
    assert [ax.get_ylabel() for ax in axs] == ['entropy, share of log n', 'mean distance in pixels'] and [ax.get_xlabel() for ax in axs] == ['epoch'] * 2
    assert axs[1].get_ylim()[0] == 0 and axs[0].figure is axs[1].figure


def test_stats_in_any_order_and_with_gaps():
    df = stats(('a',)).sample(frac=1, random_state=3)
    df.loc[df['epoch'] == 2, 'distance'] = np.nan
    axs = plot_attention_stats(df)
    assert axs[0].lines[1].get_xdata().tolist() == [0, 1, 2, 3] and axs[1].lines[0].get_xdata().tolist() == [0, 1, 3] and axs[0].get_legend() is None
    assert all(t == int(t) for t in axs[0].get_xticks())


@pytest.mark.parametrize('df', [stats().head(0), stats().drop(columns='layer'), stats().drop(columns='distance'), pd.DataFrame()], ids=['no rows', 'no layer', 'no distance', 'empty'])
def test_stats_that_are_not_there_are_named_and_no_figure_is_made(df):
    with pytest.raises(ValueError, match=rf'the columns epoch, layer, entropy_share, distance, got {len(df)} rows of'): plot_attention_stats(df)
    assert not plt.get_fignums()


# --- show_attention

POINTS = [(7, 20), (0, 49), (32, 0)]

def images(bs=2, channels=3): return torch.rand(bs, channels, H, W, generator=torch.Generator().manual_seed(8))

def maps(bs=2, n=3):
    gen = torch.Generator().manual_seed(9)
    def some(h, w, peak): return (peak * torch.rand(bs, n, h * w, generator=gen)).softmax(-1).view(bs, n, h, w)
    return {'body.2': some(3, 5, 1.), 'body.5': some(5, 7, 20.), 'head.attn': some(2, 3, 3.)}

def strongest(m): return m.max().item() * m.shape[-2] * m.shape[-1]

def strong(m):
    "The top of the colour scale of maps `m`, in averages"
    return max(map(top_weight, m.flatten(0, -3).tolist())) * m.shape[-2] * m.shape[-1]

def heading(ax): return ' '.join(ax.texts[0].get_text().splitlines())

def bars(fig): return [ax for ax in fig.axes if ax.get_label() == '<colorbar>']

def badges(ax): return {t.get_text(): t.xy for t in ax.texts[1:]}


def test_a_row_for_each_picture_and_layer():
    ims, ms = images(), maps()
    axs = show_attention(ims, ms, POINTS)
    assert axs.shape == (6, 4) and len(plt.get_fignums()) == 1
    for row, (i, name) in zip(axs, [(i, name) for i in range(2) for name in ms]):
        np.testing.assert_allclose(row[0].images[0].get_array(), ims[i].permute(1, 2, 0))
        assert heading(row[0]) == f'picture {i}, {name} query pixels' and badges(row[0]) == {str(k): (c, r) for k, (r, c) in enumerate(POINTS)}
        assert [line.get_xydata().tolist() for line in row[0].lines] == [[[c, r]] for r, c in POINTS for _ in range(2)]
        for k, ax in enumerate(row[1:]):
            np.testing.assert_allclose(ax.images[0].get_array(), ims[i].mean(0), rtol=1e-5)
            np.testing.assert_allclose(ax.images[1].get_array(), ms[name][i, k] * ms[name][i, k].numel(), rtol=1e-5)
            assert ax.lines[-1].get_xydata().tolist() == [list(POINTS[k][::-1])] and ax.get_title() == f'{k}: pixel {POINTS[k]}'
            assert ax.get_aspect() == 1 and ax.images[1].get_cmap().name == 'magma'
            assert ax.images[1].get_clim() == (0, pytest.approx(max(2, strong(ms[name][i]))))      # one scale for each picture in a layer
    assert strongest(ms['body.2']) < 2 and len(bars(axs[0, 0].figure)) == 6
    tops = [(strong(m[i]), strongest(m[i])) for i in range(2) for m in ms.values()]
    assert {bar.get_ylabel() for bar in bars(axs[0, 0].figure)} == {'attention,\n1 = average'}
    assert [bar.get_yticklabels()[-1].get_text() for bar, (top, most) in zip(bars(axs[0, 0].figure), tops) if most > max(2, top)] == [f'to {most:.3g}' for top, most in tops if most > max(2, top)]
    assert [bar.get_ylim()[1] for bar in bars(axs[0, 0].figure)] == pytest.approx([max(2, top) for top, _ in tops])
    axs = show_attention(ims, ms, POINTS, scale='layer')
    assert all(ax.images[1].get_clim() == (0, pytest.approx(max(2, strongest(ms[name])))) for row, name in zip(axs, [*ms] * 2) for ax in row[1:])


def nine(single=118.):
    "Three pictures with three maps of 24x24 cells each, spots that reach 2.5 to 3.1 averages, and in one map a single cell in the corner"
    rows, cols = torch.meshgrid(torch.arange(24), torch.arange(24), indexing='ij')
    m = torch.stack([torch.stack([.6 + (1.9 + .3*k)*torch.exp(-((rows - r)**2 + (cols - 3*k - 5)**2) / 18) for r in (4, 11, 19)]) for k in range(3)])
    m[1, 2, 23, 0] = single
    return m / 576

@pytest.mark.parametrize('single', [118., 1e4])
def test_a_single_cell_leaves_every_map_its_colours(single):
    "Six of nine maps were plain grey in a real run: one cell of one picture had taken the whole scale"
    m, ims = nine(single), torch.rand(3, 3, 48, 48)
    axs = show_attention(ims, {'a.1': m}, [(8, 8), (22, 22), (40, 8)])
    def colours(ax): return ax.images[1].norm(np.asarray(ax.images[1].get_array()))
    for row in axs:
        for ax in row[1:]: assert np.sort(colours(ax).ravel())[-20:].min() > .6 and np.ptp(np.sort(colours(ax).ravel())[:-1]) > .5
    said = [(bar._colorbar.extend, [t.get_text() for t in bar.get_yticklabels() if t.get_text().startswith('to ')]) for bar in bars(axs[0, 0].figure)]
    assert said == [('neither', []), ('max', [f'to {single:.3g}']), ('neither', [])]
    alone = show_attention(ims, {'a.1': m}, [(8, 8), (22, 22), (40, 8)], pictures=1, queries=2, ax=plt.figure().subplots())
    assert alone.images[1].get_clim()[1] == pytest.approx(strong(m[1:2, 2:])) and strong(m[1:2, 2:]) < 3


def test_peaks_of_200_averages_and_what_stands_around_them():
    "As in paint by swatch: a few cells take nearly all, on one scale with a map that is nearly even"
    m = torch.full((1, 2, 32, 32), .1)
    m[0, 0, 4:6, 7:9], m[0, 0, 3, 7:9], m[0, 1] = 200., 10., 1.
    m[0, 1, 8:12, 8:12] = 3.
    axs = show_attention(torch.rand(1, 3, 64, 64), {'a.1': m / 1024}, [(9, 9), (40, 40)])
    norm = axs[0, 1].images[1].norm
    assert norm.vmax == pytest.approx(200) and axs[0, 2].images[1].get_clim() == (0, norm.vmax)
    none, little, average, three, halo, half, peak = map(float, norm([0, .1, 1, 3, 10, 100, 200]))
    assert none == 0 and little < .05 and average > .18 and three > average + .12 and .5 < halo < .6 and .85 < half < .95 and peak == pytest.approx(1)
    np.testing.assert_allclose(norm.inverse(norm([.1, 1, 30, 200])), [.1, 1, 30, 200], rtol=1e-6)
    (bar,) = bars(axs[0, 0].figure)
    axs[0, 0].figure.canvas.draw()
    assert [t for t in bar.get_yticks() if 0 <= t <= 200] == [0, 1, 3, 10, 30, 100]


@pytest.mark.parametrize('top', [2, 6])
def test_low_scales_are_linear(top):
    norm = plot_attention(image(), amap(), (7, 20), vmax=top).images[-1].norm
    np.testing.assert_allclose(norm([0, .5, 1, top]), np.array([0, .5, 1, top]) / top)


def test_headings_say_what_attention_adds():
    changes = {'body.2': torch.tensor([.013, .2]), 'head.attn': torch.tensor([.4, .0049])}
    axs = show_attention(images(), maps(), POINTS, gammas={'head.attn': .013}, changes=changes)
    does = ['body.2, attention changes the features by 1%', 'body.5', 'head.attn, gamma 0.013, attention changes the features by 40%',
            'body.2, attention changes the features by 20%', 'body.5', 'head.attn, gamma 0.013, attention does nothing here: it changes the features by 0.5%']
    assert [heading(ax) for ax in axs[:, 0]] == [f'picture {i//3}, {said} query pixels' for i, said in enumerate(does)]
    axs = show_attention(images(), maps(), POINTS, 'head', pictures=1, queries=0, changes=changes)     # `changes` of the picture that is chosen
    assert 'by 0.5%' in heading(axs[0, 0])
    ax = show_attention(images(), maps(), POINTS, 'head', pictures=1, queries=0, changes=changes, ax=plt.figure(figsize=(2.5, 2)).subplots())
    assert 'attention does nothing here: it changes the features by 0.5%' in ' '.join(ax.get_title().splitlines()) and max(map(len, ax.get_title().splitlines())) < 40


@pytest.mark.parametrize('scale', ['all', 3., 100])
def test_one_scale_for_all(scale):
    ms = maps(n=1)
    axs = show_attention(images(), ms, POINTS[:1], scale=scale)
    top = max(map(strongest, ms.values())) if scale == 'all' else scale
    assert all(ax.images[1].get_clim() == (0, pytest.approx(top)) for ax in axs[:, 1:].flat)
    (bar,) = bars(axs[0, 0].figure)
    assert bar.get_ylim() == (0, pytest.approx(top)) and bar._colorbar.extend == ('max' if scale == 3. else 'neither')       # an arrow where colours are cut off
    assert [line.get_ydata()[0] for line in bar.lines] == [1]


def test_maps_that_are_not_numbers_leave_the_scale_to_the_others():
    ms = maps()
    ms['body.5'][0, 0] = torch.nan
    top = strongest(ms['body.5'].nan_to_num(0))
    for axs in (show_attention(images(), ms, POINTS, 'body.5', scale='layer')[:, 1:], show_attention_growth(image(), ms['body.5'][0], (7, 20))[None]):
        assert all(ax.images[1].get_clim() == (0, pytest.approx(top)) for ax in axs.flat)
        assert np.isfinite(axs[0, 0].images[1].get_alpha()).all()
        top = max(2, strongest(ms['body.5'][:1].nan_to_num(0)))
    assert show_attention_growth(image(), torch.full((2, 3, 5), torch.nan), (7, 20))[0].images[1].get_clim() == (0, 2)


def test_one_layer_has_one_bar_over_what_is_chosen():
    ms = maps()
    axs = show_attention(images(), ms, POINTS, 'body.5', queries=[2], pictures=1)
    (bar,) = bars(axs[0, 0].figure)
    assert bar.get_ylim()[1] == pytest.approx(strong(ms['body.5'][1:, 2:])) != strong(ms['body.5']) and axs.shape == (1, 2)


@pytest.mark.parametrize('layers,want', [('body.2', ['body.2']), ('body.*', ['body.2', 'body.5']), (['head.attn', 'body.[2-4]'], ['body.2', 'head.attn']), (['*', 'body.2'], ['body.2', 'body.5', 'head.attn']), (('*.*5',), ['body.5'])], ids=named)
def test_choice_of_layers(layers, want):
    axs = show_attention(images(), maps(), POINTS, layers, pictures=0)
    assert [heading(ax) for ax in axs[:, 0]] == [f'picture 0, {n} query pixels' for n in want]


def test_a_name_is_meant_as_it_stands_before_it_is_a_pattern():
    m = maps()['body.2']
    assert show_attention(images(), {'layers[0]': m, 'layers0': m}, POINTS, 'layers[0]').shape == (4, 4)       # fits both
    with pytest.raises(ValueError, match='no layer BODY.2'): show_attention(images(), maps(), POINTS, 'BODY.2')


@pytest.mark.parametrize('chosen,want', [(1, [1]), ([1, 0], [1, 0]), (-1, [1]), (torch.tensor([0]), [0]), (np.array([1]), [1]), (range(2), [0, 1]), (None, [0, 1])], ids=named)
def test_choice_of_pictures_and_points(chosen, want):
    ims, ms = images(), maps(n=2)
    axs = show_attention(ims, ms, POINTS[:2], 'body.5', pictures=chosen)
    assert [heading(ax) for ax in axs[:, 0]] == [f'picture {i}, body.5 query pixels' for i in want]
    for row, i in zip(axs, want):
        np.testing.assert_allclose(row[0].images[0].get_array(), ims[i].permute(1, 2, 0))
        np.testing.assert_allclose(row[1].images[0].get_array(), ims[i].mean(0), rtol=1e-5)
        np.testing.assert_allclose(row[1].images[1].get_array(), ms['body.5'][i, 0] * 35, rtol=1e-5)
    axs = show_attention(ims, ms, POINTS[:2], 'body.5', queries=chosen)
    assert [ax.get_title() for ax in axs[0, 1:]] == [f'{i}: pixel {POINTS[i]}' for i in want] and list(badges(axs[0, 0])) == [str(i) for i in want]
    for ax, i in zip(axs[0, 1:], want):
        np.testing.assert_allclose(ax.images[1].get_array(), ms['body.5'][0, i] * 35, rtol=1e-5)
        assert ax.lines[-1].get_xydata().tolist() == [list(POINTS[i][::-1])]
    assert [line.get_xydata().tolist() for line in axs[0, 0].lines[1::2]] == [[list(POINTS[i][::-1])] for i in want]


def test_headings():
    ms = maps()
    axs = show_attention(images(), ms, POINTS, pictures=1, titles=['a.png', 'b.png'], gammas={'body.2': -.01234, 'body.5': 0.}, pools={'body.5': 2, 'body.2': 1})
    assert [heading(ax) for ax in axs[:, 0]] == [f'b.png, {s} query pixels' for s in ('body.2, gamma -0.0123', 'body.5, gamma 0, pooled 2x2', 'head.attn')]


def test_headings_name_places_before_paths_and_the_head():
    axs = show_attention(images(), maps(), POINTS, pictures=0, places={'body.5': 'decoder.1'}, head=2, gammas={'body.5': .5})
    assert [heading(ax) for ax in axs[:, 0]] == [f'picture 0, {s} query pixels' for s in ('body.2, head 2', 'decoder.1 (body.5), head 2, gamma 0.5', 'head.attn, head 2')]


def test_pictures_that_were_squeezed_have_their_own_proportions():
    shapes = [(33, 100), (90, 50)]
    axs = show_attention(images(), maps(n=1), POINTS[:1], 'body.2', shapes=shapes)
    axs[0, 0].figure.canvas.draw()
    for row, (h, w) in zip(axs, shapes):
        for ax in row:
            box = ax.get_window_extent()
            assert box.height / box.width == pytest.approx(h / w, rel=.01)
            assert {tuple(im.get_extent()) for im in ax.images} == {(-.5, W - .5, H - .5, -.5)}      # coordinates stay pixels of the model's input
    for axs in (show_attention_growth(image(), maps()['body.2'][0], (7, 20), shape=(33, 100)), [plot_attention(image(), amap(), (7, 20), shape=(33, 100))]):
        axs[0].figure.canvas.draw()
        assert all(ax.get_window_extent().width / ax.get_window_extent().height == pytest.approx(100 / 33, rel=.01) for ax in axs)


def test_what_is_predicted_is_outlined_in_the_picture():
    masks = torch.zeros(2, H, W, dtype=torch.int)
    masks[1, 5:20, 10:30] = 2
    axs = show_attention(images(), maps(n=1), POINTS[:1], 'body.2', masks=masks)
    assert [len(ax.collections) for ax in axs.flat] == [0, 0, 2, 0]
    line = np.concatenate(axs[1, 0].collections[0].get_paths()[0].to_polygons())
    assert (line.min(0).tolist(), line.max(0).tolist()) == ([9.5, 4.5], [29.5, 19.5])
    assert axs[1, 0].get_xlim() == (-.5, W - .5) and axs[1, 0].get_ylim() == (H - .5, -.5)


def test_one_point_has_no_number():
    axs = show_attention(images(), maps(n=1), POINTS[:1], 'body.2')
    assert axs[0, 1].get_title() == 'pixel (7, 20)' and not badges(axs[0, 0])


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', [lambda t: t, TensorImage, lambda t: t.double(), lambda t: t.half(), lambda t: t.clone().requires_grad_()], ids=['float32', 'TensorImage', 'float64', 'half', 'with gradient'])
def test_kinds_of_tensors(kind, channels):
    ims, ms = kind(images(channels=channels)), {k: kind(m) for k, m in maps().items()}
    before = ims.clone(), {k: m.clone() for k, m in ms.items()}
    axs = show_attention(ims, ms, torch.tensor(POINTS), 'body.*', pictures=0)
    shown = axs[0, 0].images[0]
    np.testing.assert_allclose(np.asarray(shown.get_array()).reshape(H, W, channels), images(channels=channels)[0].permute(1, 2, 0), atol=1e-3)
    if channels == 1: assert shown.get_cmap().name == 'gray' and shown.get_clim() == (0, 1)
    np.testing.assert_allclose(axs[1, 2].images[1].get_array(), maps()['body.5'][0, 1] * 35, rtol=1e-2, atol=1e-2)
    assert axs[0, 1].get_title() == '0: pixel (7, 20)' and torch.equal(ims, before[0]) and all(torch.equal(m, before[1][k]) for k, m in ms.items())


CHOICES = [(dict(layers='tail.*'), r'no layer tail\.\*: there are body\.2, body\.5, head\.attn'), (dict(layers=['body.2', 'x', 'y']), 'no layer x, y: there are'), (dict(layers=[]), 'no layer chosen: there are body'),
           (dict(pictures=2), r'`pictures` must be among 0 to 1, got \[2\]'), (dict(pictures=[0, -3]), r'among 0 to 1, got \[0, -3\]'), (dict(pictures=[]), r'among 0 to 1, got \[\]'),
           (dict(queries=[3]), r'`queries` must be among 0 to 2, got \[3\]'), (dict(queries='a'), r"among 0 to 2, got \['a'\]"), (dict(scale='layers'), "`scale` must be 'picture', 'layer', 'all' or a number above 0, got 'layers'"), (dict(scale=0), 'got 0'), (dict(scale=-1.), r'got -1\.0')]

@pytest.mark.parametrize('kwargs,says', CHOICES, ids=named)
def test_a_choice_that_fits_nothing_says_what_there_is(kwargs, says):
    with pytest.raises(ValueError, match=says): show_attention(images(), maps(), POINTS, **kwargs)
    assert not plt.get_fignums()


@pytest.mark.parametrize('ims,ms,points,says', [(images(3), maps(), POINTS, r'got \(3, 3, 33, 50\) and \(2, 3, 3, 5\) for 3 points'), (images(), maps(), POINTS[:2], 'for 2 points'), (images()[0], maps(), POINTS, r'got \(3, 33, 50\)'),
                                              (images(), {'a': maps()['body.2'].flatten(2)}, POINTS, r'`maps` of a .* and \(2, 3, 15\)'), (images(), {}, POINTS, 'there are none'), (images(0), {'a': torch.zeros(0, 3, 2, 2)}, POINTS, '`pictures`: there are none'),
                                              (images(), {'a': torch.zeros(2, 0, 2, 2)}, [], '`queries`: there are none'), (images(), maps(), [(7, 20), (0, 50), (1, 1)], r'point \(0, 50\) is not on the image of 33x50')], ids=range(8))
def test_what_does_not_fit_together_is_named_and_no_figure_is_made(ims, ms, points, says):
    with pytest.raises(ValueError, match=says): show_attention(ims, ms, points)
    assert not plt.get_fignums()


def test_one_ax_takes_one_map():
    ms = maps()
    fig, ax = plt.subplots()
    plt.figure()
    before = state()
    assert show_attention(images(), ms, POINTS, 'body.5', 1, 2, ax=ax, gammas={'body.5': .5}, pools={'body.5': 2}) is ax and state() == before
    np.testing.assert_allclose(ax.images[1].get_array(), ms['body.5'][1, 2] * 35, rtol=1e-5)
    assert ' '.join(ax.get_title().splitlines()) == 'picture 1, body.5, gamma 0.5, pooled 2x2, 2: pixel (32, 0)'
    assert ax.images[1].get_clim()[1] == bars(fig)[0].get_ylim()[1] == pytest.approx(strong(ms['body.5'][1:, 2:])) and len(fig.axes) == 2
    for kwargs, n, shape in ((dict(), 18, '6x4'), (dict(layers='body.2', queries=0), 2, '2x2'), (dict(layers='body.2', pictures=0), 3, '1x4')):
        with pytest.raises(ValueError, match=f'one `ax` holds one map, and {n} are chosen: choose one, or give an array of {shape} axes'): show_attention(images(), ms, POINTS, ax=ax, **kwargs)


@pytest.mark.parametrize('given', [lambda axs: axs, lambda axs: axs.tolist(), lambda axs: axs.ravel()], ids=['array', 'lists', 'flat'])
def test_an_array_of_axes_is_drawn_into_and_returned(given):
    fig, axs = plt.subplots(2, 4)
    plt.figure()
    before = state()
    got = show_attention(images(), maps(), POINTS, 'body.5', ax=given(axs))
    assert got.shape == (2, 4) and all(a is b for a, b in zip(got.flat, axs.flat)) and state() == before and len(fig.axes) == 10
    assert [len(ax.images) for ax in axs.flat] == [1, 2, 2, 2] * 2
    want = show_attention(images(), maps(), POINTS, 'body.5')
    for a, b in zip(got[:, 1:].flat, want[:, 1:].flat): np.testing.assert_array_equal(a.images[1].get_array(), b.images[1].get_array())


def test_titles_of_single_maps_beside_each_other_do_not_overlap():
    fig = mpl.figure.Figure((7, 3), layout='constrained')
    axs = fig.subplots(1, 3)
    for q, ax in enumerate(axs): show_attention(images(), {LONG: maps()['body.2']}, POINTS, pictures=0, queries=q, ax=ax, gammas={LONG: .1}, pools={LONG: 2})
    fig.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in axs]
    assert boxes[0].x0 >= 0 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:])) and boxes[-1].x1 <= fig.bbox.width and all(b.y1 <= fig.bbox.height + 1 for b in boxes)


@pytest.mark.parametrize('shape', [(4, 2), (2, 3), (3, 4), (7,)], ids=named)
def test_the_wrong_number_of_axes_is_an_error_before_anything_is_drawn(shape):
    axs = mpl.figure.Figure().subplots(*shape)
    with pytest.raises(ValueError, match=f"`ax` must be an array of 2x4 axes, a row for each picture and layer, .*; got {'x'.join(map(str, shape))}"): show_attention(images(), maps(), POINTS, 'body.5', ax=axs)
    assert not any(ax.images for ax in axs.flat)


def lines_of(text):
    "Where each line of a text that is flush left is drawn, in pixels"
    box, lines = text.get_window_extent(), text.get_text().splitlines()
    for i, line in enumerate(lines):
        new = text.figure.text(0, 0, line, fontsize=text.get_fontsize())
        width = new.get_window_extent().width
        new.remove()
        yield Bbox.from_bounds(box.x0, box.y1 - (i + 1) * box.height / len(lines), width, box.height / len(lines))

def titles(axs): return [box for ax in axs.flat for box in (lines_of(ax.texts[0]) if ax.texts else [ax.title.get_window_extent()])]

SHAPES = {'square': (64, 64), 'wide': (48, 160), 'tall': (160, 64), '3:2': (480, 720)}
LONG = 'layers.5.conv2.2.a.very.long.name.of.a.layer'

# every two of shape, number of points, name and figure meet
@pytest.mark.parametrize('shape,n,name,own', [(shape, n, ('m', LONG)[(a + b)%2], bool((a//2 + b)%2)) for a, shape in enumerate(SHAPES) for b, n in enumerate([1, 3, 8])], ids=named)
def test_titles_neither_overlap_nor_are_cut_at_the_width_of_a_page(shape, n, name, own):
    h, w = SHAPES[shape]
    points = [(h - 1, w - 1), (0, 0), (0, w - 1), (h - 1, 0), (h // 2, w // 2), (h - 9, w - 9), (3, 3), (9, 9)][:n]
    ms = {s: torch.rand(1, n, 4, 6) for s in (name, name + '0')}
    ax = None if own else mpl.figure.Figure((7, 6) if n < 4 else (14, 6), layout='constrained').subplots(2, 1 + n, squeeze=False)
    axs = show_attention(torch.rand(1, 3, h, w), ms, points, gammas=dict.fromkeys(ms, -.0123), pools=dict.fromkeys(ms, 2), titles=['a_picture_with_a_long_name.png'], ax=ax)
    fig = axs[0, 0].figure
    if own: assert fig.get_size_inches()[0] <= 7.01
    fig.draw_without_rendering()
    boxes = titles(axs)
    for i, a in enumerate(boxes):
        assert a.x0 >= 0 and a.x1 <= fig.bbox.width and a.y0 >= 0 and a.y1 <= fig.bbox.height + 1
        assert not any(a.padded(-1).overlaps(b.padded(-1)) for b in boxes[i + 1:])
        assert not any(a.padded(-2).overlaps(ax.get_window_extent()) for ax in axs.flat)


# --- show_attention_growth

def grown(t=5): return torch.stack([amap(seed=i) for i in range(t)])

def test_growth_is_drawn_on_one_scale():
    axs = show_attention_growth(image(3), grown(), (7, 20), [f'epoch {i}\ngamma {i / 10}' for i in range(5)])
    assert axs.shape == (5,) and [ax.get_title() for ax in axs] == [f'epoch {i}\ngamma {i / 10}' for i in range(5)]
    for ax, m in zip(axs, grown()):
        np.testing.assert_allclose(ax.images[1].get_array(), m * 15, rtol=1e-5)
        assert ax.images[1].get_clim() == (0, pytest.approx(max(2, grown().max().item() * 15))) and ax.lines[-1].get_xydata().tolist() == [[20, 7]]
    (bar,) = bars(axs[0].figure)
    assert bar.get_ylabel() == 'attention,\n1 = average' and bar.get_ylim() == axs[0].images[1].get_clim()


@pytest.mark.parametrize('t,n,want', [(13, 8, [0, 2, 3, 5, 7, 9, 10, 12]), (9, 3, [0, 4, 8]), (8, 8, list(range(8))), (3, 8, [0, 1, 2]), (7, 2, [0, 6]), (5, 1, [4]), (1, 8, [0]), (100, 8, [0, 14, 28, 42, 57, 71, 85, 99])])
def test_at_most_n_are_drawn_the_first_and_the_last_among_them(t, n, want):
    axs = show_attention_growth(image(), grown(t), (7, 20), max_n=n)
    assert [ax.get_title() for ax in axs] == [str(i) for i in want] and len(axs[0].figure.axes) == len(want) + 1
    top = grown(t)[want].max().item() * 15
    for ax, i in zip(axs, want):
        np.testing.assert_allclose(ax.images[1].get_array(), grown(t)[i] * 15, rtol=1e-5)
        assert ax.images[1].get_clim()[1] == pytest.approx(max(2, top))


@pytest.mark.parametrize('shape', [(3,), (1, 3), (3, 1)], ids=named)
def test_growth_goes_into_the_axes_given(shape):
    fig, axs = plt.subplots(*shape)
    plt.figure()
    before = state()
    got = show_attention_growth(image(), list(grown(3)), (7, 20), ax=axs)
    assert got.shape == (3,) and all(a is b for a, b in zip(got, axs.flat)) and state() == before and len(fig.axes) == 4
    with pytest.raises(ValueError, match='`ax` must be an array of 2 axes, one for each map drawn; got'): show_attention_growth(image(), grown(5), (7, 20), max_n=2, ax=axs)
    with pytest.raises(ValueError, match='got one'): show_attention_growth(image(), grown(1), (7, 20), max_n=2, ax=axs.flat[0])


@pytest.mark.parametrize('args,says', [(([], (7, 20)), 'got 0 maps'), ((grown(), (7, 20), ['a']), '5 maps, max_n=8 and 1 labels'), ((grown(), (7, 20), None, 0), 'n=0'), ((amap(), (7, 20)), r'`amap` \(mh, mw\), got \(33, 50\) and \(5,\)')], ids=range(4))
def test_growth_that_cannot_be_drawn_makes_no_figure(args, says):
    with pytest.raises(ValueError, match=says): show_attention_growth(image(), *args)
    assert not plt.get_fignums()


# --- show_receptive_field

def spots(share=.9, point=(16, 25)):
    rows, cols = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    off, on = (torch.exp(-((rows - 16.1) ** 2 + (cols - 25.2) ** 2) / (2 * s ** 2)).double() for s in (2, 5))
    on[:, :10] += .01 + cols[:, :10] / 1e4
    return SimpleNamespace(off=off / off.sum(), on=on / on.sum(), area_off=.0413, area_on=.276, share=share, point=point)


def test_both_fields_on_one_scale_that_says_what_it_is():
    field = spots()
    axs = show_receptive_field(image(3), field)
    assert axs.shape == (2,) and [ax.get_title() for ax in axs] == ['attention off: 4.1 % of the picture\nholds 90 % of the gradient', 'attention on: 28 % of the picture\nholds 90 % of the gradient']
    top = field.off.max().item() * H * W
    for ax, energy in zip(axs, (field.off, field.on)):
        below, above = ax.images
        np.testing.assert_allclose(below.get_array(), image(3).mean(0), rtol=1e-5)
        np.testing.assert_allclose(above.get_array(), energy * H * W, rtol=1e-4, atol=1e-12)
        assert isinstance(above.norm, LogNorm) and above.get_clim() == (pytest.approx(top / 1e4), pytest.approx(top))
        assert ax.lines[-1].get_xydata().tolist() == [[25, 16]] and ax.get_xlim() == (-.5, W - .5) and ax.get_ylim() == (H - .5, -.5)
    (bar,) = bars(axs[0].figure)
    assert bar.get_ylabel() == 'gradient energy, 1 = average,\nlogarithmic scale' and bar.get_yscale() == 'log' and bar._colorbar.extend == 'min'


def outlines(ax): return [c for c in ax.collections if isinstance(c, mpl.contour.ContourSet)]

@pytest.mark.parametrize('share', [.5, .9])
def test_the_line_is_around_the_pixels_that_hold_the_share(share):
    field = spots(share)
    for ax, energy in zip(show_receptive_field(image(3), field), (field.off, field.on)):
        path = outlines(ax)[0].get_paths()[0]
        loops = path.to_polygons()
        centres = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).reshape(-1, 2)
        inside = np.any([mpl.path.Path(loop).contains_points(centres) for loop in loops], 0).reshape(H, W)
        inside = torch.from_numpy(inside)
        assert energy[inside].sum() >= share > energy[inside].sum() - energy[inside].min() and energy[inside].min() > energy[~inside].max()
        assert 'holds %d %%' % (100 * share) in ax.get_title()


@pytest.mark.parametrize('density', [.6, .9])
def test_the_line_around_specks_is_around_where_most_of_them_are(density):
    "Drawn around every speck it would be many times as long"
    field = spots()
    rows, cols = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    disc = (rows - 16) ** 2 + (cols - 25) ** 2 < 12 ** 2
    specks = torch.rand(H, W, generator=torch.Generator().manual_seed(1)) < torch.where(disc, density, .04)
    field.on = specks.double() / specks.sum()
    (line, _) = outlines(show_receptive_field(image(), field)[1])
    loops = line.get_paths()[0].to_polygons()
    big = max(loops, key=len)
    assert sum(np.hypot(*np.diff(loop, axis=0).T).sum() for loop in loops) < 2 * (H + W)
    np.testing.assert_allclose((big.min(0) + big.max(0)) / 2, [25, 16], atol=2.5)
    np.testing.assert_allclose(big.max(0) - big.min(0), 24, atol=5)


def test_lone_specks_still_have_a_line():
    field = spots()
    field.on = torch.zeros(H, W)
    field.on[2::4, 2::4] = 1 / 96
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ax = show_receptive_field(image(), field)[1]
    assert len(outlines(ax)[0].get_paths()[0].to_polygons()) == len(field.on.nonzero())


@pytest.mark.parametrize('area,says', [(1., '100 %'), (.0996, '10 %'), (.0994, '9.9 %'), (.0002, '0.02 %'), (.5, '50 %')])
def test_areas_are_written_as_percent(area, says):
    field = spots()
    field.area_on = torch.tensor(area)
    assert show_receptive_field(image(), field)[1].get_title().startswith(f'attention on: {says} of')


def test_energy_in_one_pixel_or_everywhere_or_nowhere():
    field = spots()
    field.off, field.on = torch.zeros(H, W), torch.full((H, W), 1 / (H * W))
    field.off[0, 0] = 1.
    axs = show_receptive_field(image(), field)
    (x0, y0), (x1, y1) = outlines(axs[0])[0].get_paths()[0].get_extents().get_points()
    np.testing.assert_allclose([x0, y0, x1, y1], [-.5, -.5, .5, .5])
    np.testing.assert_allclose(outlines(axs[1])[0].get_paths()[0].get_extents().get_points(), [[-.5, -.5], [W - .5, H - .5]])      # closes at the border
    for value in (0., torch.nan):
        field.off = field.on = torch.full((H, W), value)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            show_receptive_field(image(), field)[0].figure.canvas.draw()


def test_a_field_of_another_image_is_an_error():
    field = spots()
    with pytest.raises(ValueError, match=r'`field` must be of the image of 50x33 pixels, got \(33, 50\) and \(33, 50\)'): show_receptive_field(image().T, field)
    with pytest.raises(ValueError, match='array of 2 axes, without attention and with it; got 3'): show_receptive_field(image(), field, mpl.figure.Figure().subplots(1, 3))
    assert not plt.get_fignums()


# --- all of those that lay out several axes

SEVERAL = [lambda ax: show_attention(images(1), {'a': maps(1, 1)['body.2']}, POINTS[:1], ax=ax), lambda ax: show_attention_growth(image(), grown(2), (7, 20), ax=ax),
           lambda ax: show_receptive_field(image(3), spots(), ax=ax), lambda ax: plot_attention_stats(stats(), ax=ax)]

@pytest.mark.parametrize('draw', SEVERAL, ids=['attention', 'growth', 'field', 'stats'])
@pytest.mark.parametrize('layout', [None, 'constrained'])
def test_axes_of_a_figure_that_pyplot_does_not_know(draw, layout):
    plt.figure()
    before = state()
    axs = mpl.figure.Figure(layout=layout).subplots(1, 2)
    got = draw(axs)
    assert all(a is b for a, b in zip(got.flat, axs)) and state() == before and all(ax.images or ax.lines for ax in axs)
    axs[0].figure.savefig(io.BytesIO())
    plt.close()
    draw(mpl.figure.Figure(layout=layout).subplots(1, 2))
    assert not plt.get_fignums()                    # nor is one made where there was none
    plt.figure()
    before = state()
    sub = mpl.figure.Figure(layout=layout).subfigures(1, 2)[1].subplots(1, 2)
    assert draw(sub).flat[1] is sub[1] and state() == before


@pytest.mark.parametrize('draw', SEVERAL, ids=['attention', 'growth', 'field', 'stats'])
def test_a_new_figure_if_no_axes_are_given(draw):
    taken = plt.figure().gca()
    axs = draw(None)
    assert len(plt.get_fignums()) == 2 and {ax.figure for ax in axs.flat} == {plt.figure(plt.get_fignums()[1])} and not taken.images and not taken.lines
    with pytest.raises(ValueError, match='`ax` must be an array of'): draw([taken] * 3)
    assert not taken.images and not taken.lines


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


@pytest.mark.parametrize('sites,chosen,says', [(CNN[4:], None, 'nothing to draw: none of `sites` has a map'), ([], None, 'nothing to draw'), (CNN, ['stem', 'x', 'a'], r'no site a, x: there are stem, body\.0, body\.1, pool'), (CNN, 'body', 'no site body: there are stem'), (CNN, [3], 'no site 3')], ids=named)
def test_sites_that_are_not_there_are_named_and_no_figure_is_made(sites, chosen, says):
    with pytest.raises(ValueError, match=says): plot_sites(sites, chosen)
    assert not plt.get_fignums()
