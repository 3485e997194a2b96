"`plot_attention` and `plot_gamma`: what lands on the axes, where, and that nothing else is touched"
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import TensorImage

from fastai_selfattn.plot import plot_attention, plot_gamma

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
