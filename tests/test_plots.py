"""Plots and pictures, asked for what they draw."""
import math
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from lab.figure import Title, new_figure, own_style, save_figure
from lab.history import Epoch, History
from lab.pictures import plot_confusion, plot_gallery, plot_mistakes
from lab.plots import Accuracy, plot_accuracies, plot_against, plot_best_and_latest, plot_curves, plot_strengths
from utils import VisualizeFilter


def history(val_accuracy, val_loss=(1.0,) * 99, train_loss=(0.5,) * 99):
    """As `fit` returns it; the training accuracy is 90 % throughout."""
    rows = enumerate(zip(train_loss, val_loss, val_accuracy, strict=False), 1)
    return History([Epoch(i, 0.1, train, 0.9, val, accuracy, 1.0, 1.0) for i, (train, val, accuracy) in rows])


def lines(panel):
    """label -> points, of the lines that have one."""
    return {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines() if line.get_label()[0] != '_'}


def texts(artist):
    """Everything that is written anywhere in a figure or a panel."""
    return [text.get_text() for text in artist.findobj(matplotlib.text.Text) if text.get_text()]


def bars(panel):
    """label -> (its row or its x, the value, the two ends of its error bar) of each dot with error bars."""
    found = {}
    for container in panel.containers:
        dots, _, (segments,) = container
        value, place = (1, 0) if container.has_yerr else (0, 1)
        found[container.get_label()] = [
            (point[place] if value else round(point[place]), point[value], *segment[:, value])
            for point, segment in zip(dots.get_xydata(), segments.get_segments(), strict=True) if len(segment)]
    return found


HARSH = {'text.usetex': True, 'font.family': 'no such font', 'axes.formatter.use_mathtext': True, 'savefig.dpi': 7,
         'text.parse_math': True, 'savefig.bbox': 'tight', 'font.size': 31}
NAMES = ['$HOME/a_b$', '$\\frac{$', 'a^{b_c', '100% $5', '猫的文件夹', 'fil\udce9', ' ']


def test_no_name_and_no_setting_of_the_user_can_break_a_picture_and_settings_are_kept(tmp_path):
    values = {name: {'training': Accuracy(90, 1), 'validation': Accuracy(80, 1)} for name in NAMES}
    images, labels, logits = torch.zeros(7, 3, 8, 8, dtype=torch.uint8), torch.arange(7), torch.eye(7).flip(0)
    with warnings.catch_warnings(), matplotlib.rc_context(HARSH):
        warnings.simplefilter('error')
        paths = [plot_curves({name: [history([0.5, 0.6])] for name in NAMES}, tmp_path / '1.png', Title(*NAMES[:3])),
                 plot_accuracies(values, tmp_path / '2.png', Title(*NAMES[3:6])),
                 plot_mistakes(images, labels, logits, NAMES, tmp_path / '3.png', Title(*NAMES[4:])),
                 plot_confusion(labels, logits, NAMES, tmp_path / '4.png', NAMES[0]),
                 plot_gallery({name: images[:2].float() for name in NAMES}, tmp_path / '5.png', NAMES[1])]
        assert matplotlib.rcParams['font.size'] == 31
    widths = [imread(path).shape[1] for path in paths]
    assert widths[0] == 11 * 110 and min(widths) > 300  # eleven inches, neither cut nor of seven dots each


@own_style()
def test_a_title_is_three_parts_above_the_panels_and_never_wider_than_the_figure():
    title = Title('Q1: how well does it do? ' * 9, '/'.join(['a_very_long_folder_name'] * 30), '宽' * 300)
    figure = new_figure(6, 3, title)
    figure.subplots()
    figure.draw_without_rendering()
    top = figure.bbox.y1
    for text, words in zip(figure.texts, title, strict=True):
        box = text.get_window_extent()
        assert ''.join(text.get_text().split()) == ''.join(words.split())  # wrapped, nothing lost
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= top
        top = box.y0
    assert figure.axes[0].get_tightbbox().y1 < top


def test_large_pictures_are_saved_in_256_colours_that_are_nearly_the_same(tmp_path):
    y, x = np.mgrid[:1:330j, :1:330j]
    image = np.stack([x, y, 1 - x], 2) * 0.9 + np.random.default_rng(0).uniform(0, 0.05, (330, 330, 3))
    figure = new_figure(3, 3, '')
    figure.figimage(image)  # pixel by pixel, in the lower left corner
    saved = imread(save_figure(figure, tmp_path / 'large.png'))[-330:, :330, :3]
    assert np.abs(saved - image).mean() < 0.03 and len(np.unique(saved.reshape(-1, 3), axis=0)) <= 256


# --- curves -------------------------------------------------------------------------------------------------


def test_curves_draw_each_run_in_its_colour_and_mark_its_best_epoch(tmp_path, drawn):
    plain = history([0.4, 0.6, 0.5], val_loss=[1.5, 1.2, 1.3], train_loss=[2.0, 1.0, 0.4])
    plot_curves({'plain': [plain], 'batch norm': [history([0.7, 0.7], [1.0, 0.9])]}, tmp_path / 'c.png', 'Q2a')
    loss, accuracy = drawn[0].axes
    assert lines(loss)['plain train'] == [[1, 2.0], [2, 1.0], [3, 0.4]]
    assert lines(loss)['plain val'] == [[1, 1.5], [2, 1.2], [3, 1.3]]
    np.testing.assert_allclose(lines(accuracy)['plain val'], [[1, 40], [2, 60], [3, 50]])
    np.testing.assert_allclose(lines(accuracy)['plain train'], [[1, 90], [2, 90], [3, 90]])
    dots = [line.get_xydata() for line in accuracy.get_lines() if line.get_marker() == 'o']
    np.testing.assert_allclose(np.concatenate(dots), [[2, 60], [2, 70]])  # the best epoch is what the history says
    (key,) = drawn[0].legends
    shown = {text.get_text(): line for text, line in zip(key.get_texts(), key.legend_handles, strict=True)}
    shown |= {line.get_label(): line for line in accuracy.get_lines()}
    assert shown['plain train'].is_dashed() and shown['training (during the epoch)'].is_dashed()
    assert not shown['plain val'].is_dashed() and not shown['validation'].is_dashed()
    low, high = accuracy.get_ylim()
    for name in accuracy.texts:  # the runs', each at the height of its last value
        line = shown[f'{name.get_text()} val']
        assert name.arrow_patch.get_edgecolor() == matplotlib.colors.to_rgba(line.get_color())
        assert name.xyann[1] == pytest.approx((line.get_ydata()[-1] - low) / (high - low))
    left, right = loss.get_xlim()
    assert [tick for tick in loss.get_xticks() if left <= tick <= right] == [1, 2, 3]


def test_curves_of_several_seeds_are_their_mean_with_a_band_and_a_dot_for_each_seed(tmp_path, drawn):
    seeds = [history([0.4, 0.6], val_loss=[3, 1.5]), history([0.6, 0.7, 0.9], val_loss=[1, math.nan, 1])]
    plot_curves({'plain': seeds}, tmp_path / 'c.png', '')
    loss, accuracy = drawn[0].axes
    np.testing.assert_allclose(lines(accuracy)['plain val'], [[1, 50], [2, 65], [3, 90]])  # of those that go so far
    assert lines(loss)['plain val'] == [[1, 2], [2, 1.5], [3, 1]]  # and of those that are numbers
    for panel, mean, deviation in ((accuracy, 50, 200 ** 0.5), (loss, 2, 2 ** 0.5)):  # the sample's deviation
        band = panel.collections[1].get_paths()[0].vertices
        first = band[band[:, 0] == 1, 1]
        assert (first.min(), first.max()) == pytest.approx((mean - deviation, mean + deviation))
        assert first.max() < panel.get_ylim()[1]
    (dots,) = [line.get_xydata() for line in accuracy.get_lines() if line.get_marker() == 'o']
    np.testing.assert_allclose(dots, [[2, 60], [3, 90]])
    assert '± one standard deviation over seeds' in texts(drawn[0])


@pytest.mark.parametrize('losses, cut', [
    ([2.0, 1.5, 2.0, 4.0, 8.0], False),  # overfitting
    ([2.0, 1.5, 1.2, 1.1, 40.0], False),  # the last one may be the beginning of anything
    ([2.0, 30.0, 25.0, 1.5, 1.2], False),  # two epochs
    ([2.0, 5.0, 1.5, 1.2, 1.1], False),  # not far above the rest
    ([2.0, math.inf, math.nan, 1.2, 1.1], False),
    ([2.0, 30.0, 1.5, 1.2, 1.1], True), ([30.0, 2.0, 1.5, 1.2, 1.1], True)])
def test_every_loss_is_inside_the_axis_but_for_one_spike_that_is_marked(tmp_path, drawn, losses, cut):
    plot_curves({'a': [history([0.5] * 5, losses, [2.0, 1.0, 0.5, 0.2, 0.1])]}, tmp_path / 'c.png', '')
    loss = drawn[0].axes[0]
    low, high = loss.get_ylim()
    marks = [line.get_xydata()[0] for line in loss.get_lines() if line.get_marker() == '^']
    finite = {epoch: value for epoch, value in enumerate(losses, 1) if math.isfinite(value)}
    outside = [epoch for epoch, value in finite.items() if not low <= value <= high]
    assert low == 0 and outside == [epoch for epoch, _ in marks] and len(marks) == cut
    assert high < 1.1 * max(value for value in finite.values() if value <= high)  # no empty room
    assert any('above the axis' in text for text in texts(drawn[0])) == cut and all(place < high for _, place in marks)


def test_thirteen_runs_have_thirteen_colours_and_names_that_neither_overlap_nor_cover_curves(tmp_path, drawn):
    runs = {f'run {i}': [history([0.5, 0.8 + i / 1000])] for i in range(13)}
    plot_curves(runs, tmp_path / 'c.png', '')
    drawn[0].draw_without_rendering()
    accuracy = drawn[0].axes[1]
    assert len({str(line.get_color()) for line in accuracy.get_lines()}) == 13
    names = sorted(accuracy.texts, key=lambda text: text.xyann[1])
    assert [text.get_text() for text in names] == list(runs)  # the most accurate on top
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in names]
    assert all(above.y0 >= below.y1 - 3 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(accuracy.bbox.x1 < box.x0 and box.x1 <= drawn[0].bbox.x1 for box in boxes)
    assert names[0].xyann[1] >= 0 and names[-1].xyann[1] <= 1.01  # beside the panel


# --- accuracies ---------------------------------------------------------------------------------------------

SERIES = {'training': [Accuracy(99, 0.5), Accuracy(90, 0)], 'validation': [Accuracy(80, 1.5), Accuracy(83, math.nan)]}
BARS = {'training': [(0, 99, 98.5, 99.5), (1, 90, 90, 90)], 'validation': [(0, 80, 78.5, 81.5), (1, 83, 83, 83)]}
NONE = Accuracy(math.nan, math.nan)


def test_accuracies_are_dots_with_error_bars_one_row_a_run_with_the_first_on_top(tmp_path, drawn):
    rows = {run: {part: series[i] for part, series in SERIES.items()} for i, run in enumerate(('none', 'flip'))}
    plot_accuracies(rows | {'crop': {'test': NONE}}, tmp_path / 'a.png', 'Q3a')
    (panel,) = drawn[0].axes
    assert bars(panel) == BARS | {'test': []}
    assert [label.get_text() for label in panel.get_yticklabels()] == ['none', 'flip', 'crop']
    assert panel.get_ylim()[0] > panel.get_ylim()[1]  # the first on top
    assert 77 < panel.get_xlim()[0] < 78.5 and 99.5 < panel.get_xlim()[1] < 101  # as wide as the data
    assert [dots[0].get_markerfacecolor() == 'white' for dots in panel.containers] == [True, False, False]
    assert {'99.0 ± 0.5', '83.0', '○ training', '● validation', '◆ test'} <= {*texts(panel)}
    assert texts(panel).count('–') == 5  # crop has none, the others no test


def test_best_and_latest_are_joined_in_a_panel_for_each_set_on_one_scale(tmp_path, drawn):
    pairs = zip(*SERIES.values(), strict=True)
    rows = {run: {'validation': pair, 'test': (NONE, Accuracy(50, 1))} for run, pair in zip('ab', pairs, strict=True)}
    plot_best_and_latest(rows, tmp_path / 'b.png', 'Q2b')
    validation, test = drawn[0].axes
    assert [panel.get_title('left') for panel in drawn[0].axes] == ['validation', 'test']
    assert bars(validation) == {'best on validation': BARS['training'], 'latest': BARS['validation']}
    joined = [line.get_xdata().tolist() for line in validation.get_lines() if line.get_linewidth() == 3]
    assert joined == [[99, 80], [90, 83]]
    assert {'99.0 → 80.0', '90.0 → 83.0', 'a', 'b', 'best on validation', 'latest'} <= {*texts(drawn[0])}
    assert np.diff(validation.get_xlim()) == pytest.approx(np.diff(test.get_xlim()))
    for panel, low, high in ((validation, 78.5, 99.5), (test, 49, 51)):  # error bars included
        assert panel.get_xlim()[0] < low and high < panel.get_xlim()[1]


def test_accuracies_against_strengths_and_p_are_on_one_scale_with_the_level_without_and_chance(tmp_path, drawn):
    level = {'training': Accuracy(98, 0), 'validation': Accuracy(78, 1)}
    panels = {'crop': ((0, 1), SERIES), 'jitter': ((0.1, 0.3), {'validation': [Accuracy(50, 1)] * 2})}
    plot_strengths(panels, level, tmp_path / 's.png', 'Q3a')
    crop, jitter = drawn[0].axes
    assert bars(crop) == BARS and bars(jitter) == {'validation': [(0.1, 50, 49, 51), (0.3, 50, 49, 51)]}
    assert (crop.get_title('left'), jitter.get_title('left')) == ('crop', 'jitter')
    assert tuple(jitter.get_xticks()) == (0.1, 0.3) and jitter.get_ylim() == crop.get_ylim()
    levels = {label: points[0][1] for label, points in lines(jitter).items() if 'without' in label}
    assert levels == {'training, without augmentation': 98, 'validation, without augmentation': 78}

    plot_strengths({f'augmentation {i}': ((0, 1), SERIES) for i in range(5)}, level, tmp_path / 's.png', 'Q3a')
    assert [panel.get_visible() for panel in drawn[1].axes] == [True] * 5 + [False] * 3

    plot_against([0.0, 1.0], SERIES, tmp_path / 'd.png', 'Q3b', xlabel='dropout probability p', chance=10)
    (panel,) = drawn[2].axes
    assert bars(panel) == BARS
    assert lines(panel)['chance: 10%'] == [[0, 10], [1, 10]] and panel.get_ylim()[0] == 0


# --- images -------------------------------------------------------------------------------------------------


def test_gallery_shows_each_image_in_its_colours_beside_its_name(tmp_path, drawn):
    images = torch.rand(2, 3, 32, 32)
    plot_gallery({'none': images, 'flip': images.flip(3)}, tmp_path / 'g.png', 'Q3a')
    rows = {panel.get_yticklabels()[0].get_text(): panel.images[0].get_array() for panel in drawn[0].axes}
    np.testing.assert_allclose(rows['none'][:, :32], images[0].permute(1, 2, 0))
    np.testing.assert_allclose(rows['flip'][:, 34:], images[1].flip(2).permute(1, 2, 0))


def test_mistakes_are_the_surest_first_with_given_class_probability_and_true_class(tmp_path, drawn):
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 1, 2])
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.04, 0.05, 0.91], [0.0005, 0.999, 0.0005]]).log()
    for right, count in ((labels, 24), (labels, 1), (logits.argmax(1), 24)):
        plot_mistakes(images, right, logits, ['cat', 'dog', '海' * 20], tmp_path / 'm.png', 'Q1', count=count)
    shown, first, none = [[panel for panel in figure.axes if panel.images] for figure in drawn]
    assert [panel.get_title() for panel in shown] == ['dog >99%', '海海海海海海… 91%', 'cat 60%']
    assert [panel.texts[0].get_text() for panel in shown] == ['is: 海海海海海海海…', 'is: dog', 'is: dog']
    for panel, i in zip(shown, (3, 2, 1), strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), images[i].permute(1, 2, 0))
    assert any('3 of 4 test images' in text for text in texts(drawn[0]))
    assert [panel.get_title() for panel in first] == ['dog >99%']
    assert not none and 'No mistake.' in texts(drawn[2])


def test_confusion_has_true_classes_as_rows_in_percent_and_their_accuracy_in_the_margin(tmp_path, drawn):
    labels, given = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 2, 1])
    plot_confusion(labels, torch.eye(3)[given], ['cat', 'dog', 'ship'], tmp_path / 'c.png', 'Q1')
    (panel,) = drawn[0].axes
    (image,) = panel.images
    np.testing.assert_allclose(np.ma.filled(image.get_array(), -1),
                               [[-1, 25, 0], [0, -1, 50], [-1, -1, -1]])  # the right ones and empty rows are grey
    assert image.get_clim() == (0, 50)  # up to the most frequent mistake
    cells = {text.get_position(): text.get_text() for text in panel.texts if not hasattr(text, 'xyann')}
    assert cells == {(0, 0): '75', (1, 0): '25', (1, 1): '50', (2, 1): '50'}  # (column, row)
    margin = {text.xy[1]: text.get_text() for text in panel.texts if hasattr(text, 'xyann') and '%' in text.get_text()}
    assert margin == {0: '75.0%', 1: '50.0%'} and 'no image' in texts(panel)
    assert [label.get_text() for label in panel.get_yticklabels()] == ['cat', 'dog', 'ship']
    assert (panel.get_xlabel(), panel.get_ylabel()) == ('class given by the network', 'true class')
    assert any('66.7% of all 6 images' in text for text in texts(drawn[0]))

    plot_confusion(torch.arange(30), torch.eye(30).roll(1, 1), list(map(str, range(30))), tmp_path / 'c.png', 'Q1')
    panel, bar = drawn[1].axes  # too many for numbers
    assert not [text for text in panel.texts if not hasattr(text, 'xyann')] and '%' in bar.get_ylabel()


# --- filters -------------------------------------------------------------------------------------------------


def convolution(weight):
    """A network whose first layer has these filters, (N, 3, 3, 3)."""
    layer = nn.Conv2d(3, len(weight), 3)
    layer.weight = nn.Parameter(weight)
    return nn.Sequential(layer)


def assert_shows(image, weight, scale, columns):
    """An image of filters tiled in so many columns, `scale` the ends of each colour and a white line between."""
    assert (image[0] == 1).all() and (image[:, 4] == 1).all()
    for number in (0, columns - 1, columns, len(weight) - 1):
        row, column = divmod(number, columns)
        found = image[1 + 4 * row:4 + 4 * row, 1 + 4 * column:4 + 4 * column]
        np.testing.assert_allclose(found, weight[number].permute(1, 2, 0) / (2 * scale) + 0.5, atol=1e-5)


def test_filters_before_and_after_share_a_scale_and_the_change_has_its_own(tmp_path, drawn):
    torch.manual_seed(0)
    weights = torch.randn(20, 3, 3, 3), 3 * torch.randn(20, 3, 3, 3)
    limit, change = max(weight.abs().max() for weight in weights), weights[1] - weights[0]
    shown = (weights[0], limit), (weights[1], limit), (change, change.abs().max())
    before, after = map(convolution, weights)
    image = VisualizeFilter(after, tmp_path / 'f.png', before=before, change=True, title='Q1c')
    left, right = image[:, :65], image[:, 68:]
    assert_shows(left, *shown[0], columns=16)
    assert_shows(right, *shown[1], columns=16)
    panels = {panel.get_title('left'): panel for panel in drawn[0].axes}
    assert list(panels) == ['before training', 'after training', 'the change: after minus before']
    for panel, (weight, scale) in zip(panels.values(), shown, strict=True):
        assert_shows(panel.images[0].get_array(), weight, scale, columns=8)
        assert f'±{scale:.2g}' in panel.get_xlabel() or f'±{scale:.2f}' in panel.get_xlabel()
    assert f'{change.norm() / weights[0].norm():.0%} of that before' in panel.get_xlabel()
    grey = convolution(torch.zeros(5, 3, 3, 3))
    image = VisualizeFilter(grey, tmp_path / 'f.png', before=grey, titles=['fine-tuned', 'scratch'])
    assert [panel.get_title('left') for panel in drawn[1].axes] == ['fine-tuned', 'scratch']
    assert set(np.unique(image)) == {0.5, 1}


@pytest.mark.parametrize('before', [None, convolution(torch.ones(2, 3, 3, 3))])
def test_a_change_needs_the_same_network_before(before):
    with pytest.raises(ValueError, match='same network before training'):
        VisualizeFilter(convolution(torch.ones(5, 3, 3, 3)), before=before, change=True)
