"""Plots, asked for what they draw; and what holds for every picture: titles, colours, names of any kind."""
import math
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lab.figure import Title, new_figure, own_style, save_figure
from lab.history import Epoch, History
from lab.pictures import plot_confusion, plot_gallery, plot_mistakes
from lab.plots import Accuracy, plot_accuracies, plot_against, plot_best_and_latest, plot_curves, plot_strengths


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


def test_names_of_a_hundred_characters_do_not_lie_on_each_other(tmp_path, drawn):
    names = [f'{i}: Adam with batch norm, {"a learning rate of 0.001, " * 4}' for i in 'ab']
    rows = {name: {'validation': Accuracy(80, 1)} for name in names}
    plot_accuracies(rows, tmp_path / 'a.png', 'Q3a')
    drawn[0].draw_without_rendering()
    first, second = [label.get_window_extent() for label in drawn[0].axes[0].get_yticklabels()]
    assert second.y1 <= first.y0 + 3


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


def test_values_in_any_order_are_joined_from_left_to_right_and_ticks_do_not_touch(tmp_path, drawn):
    places = [0.0, 0.5, 1.0, 0.02]
    plot_against(places, {'training': [Accuracy(100 * x, 1) for x in places]}, tmp_path / 'd.png', '', xlabel='p',
                 chance=10)
    plot_strengths({'crop': (places, {'training': [Accuracy(100 * x, 1) for x in places]})}, {}, tmp_path / 's.png', '')
    for figure in drawn:
        (panel,) = figure.axes
        assert [(x, y) for x, y, *_ in bars(panel)['training']] == [(x, 100 * x) for x in sorted(places)]
        assert list(panel.get_xticks()) == [0, 0.5, 1]


def test_no_legend_is_wider_than_its_figure(tmp_path, drawn):
    level = {'training': Accuracy(98, 0), 'validation': Accuracy(78, 1)}
    plot_strengths({'crop': ((0, 1), SERIES)}, level, tmp_path / 's.png', '')
    seeds = [history([0.5] * 5, [2.0, 3e4, 1.5, 1.2, 1.1], [2.0, 3e4, 0.5, 0.2, 0.1])] * 2
    plot_curves({'a': seeds}, tmp_path / 'c.png', '')
    for figure in drawn:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert figure.bbox.x0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= figure.bbox.x1
    assert 'above the axis: up to 3e+04' in texts(drawn[1])


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
