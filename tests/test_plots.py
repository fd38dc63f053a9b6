"""Plots and pictures, asked for what they draw."""
import io
import math
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

import lab.figure
import lab.pictures
import lab.plots
from lab.figure import Title, new_figure, own_style, save_figure
from lab.pictures import plot_confusion, plot_gallery, plot_mistakes
from lab.plots import Accuracy, plot_accuracies, plot_against, plot_best_and_latest, plot_curves, plot_strengths

NAN = Accuracy(math.nan, math.nan)


class History(dict):
    """As `fit` returns it: lists by column and the best epoch."""
    def __init__(self, val_accuracy, val_loss=None, train_loss=None, best=None):
        count = len(val_accuracy)
        super().__init__(epoch=list(range(1, count + 1)), val_accuracy=val_accuracy, val_loss=val_loss or [1.0] * count,
                         train_loss=train_loss or [0.5] * count, train_accuracy=[0.9] * count)
        self.best = SimpleNamespace(epoch=best or 1 + int(np.argmax(val_accuracy)))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures = []
    for module in (lab.plots, lab.pictures):
        monkeypatch.setattr(module, 'save_figure',
                            lambda figure, path: figures.append(figure) or save_figure(figure, path))
    return figures


def lines(panel):
    """label -> points, of the lines that have one."""
    return {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines() if line.get_label()[0] != '_'}


def texts(artist):
    """Everything that is written anywhere in a figure or a panel."""
    return [text.get_text() for text in artist.findobj(matplotlib.text.Text) if text.get_text()]


def bars(container):
    """An errorbar container -> (points, [(low, high) of each error bar])."""
    dots, _, (segments,) = container
    axis = 1 if container.has_yerr else 0
    return dots.get_xydata().tolist(), [tuple(segment[:, axis]) for segment in segments.get_segments()]


# --- titles and settings ------------------------------------------------------------------------------------


HARSH = {'text.usetex': True, 'font.family': 'no such font', 'axes.formatter.use_mathtext': True, 'savefig.dpi': 7,
         'text.parse_math': True, 'savefig.bbox': 'tight', 'axes.grid': False}


@pytest.mark.parametrize('words', ['$HOME/a_b$', '$\\frac{$', 'a^{b_c', '100% $5', '猫的文件夹', 'fil\udce9', ' '],
                         ids=ascii)
def test_no_name_and_no_setting_of_the_user_can_break_a_picture(tmp_path, words):
    title, values = Title(words, words, words), {words: {'training': Accuracy(90, 1), 'validation': Accuracy(80, 1)}}
    images, labels, logits = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), torch.eye(2).flip(0)
    with warnings.catch_warnings(), matplotlib.rc_context(HARSH):
        warnings.simplefilter('error')
        paths = [plot_curves({words: [History([0.5, 0.6])]}, tmp_path / '1.png', title),
                 plot_accuracies(values, tmp_path / '2.png', title),
                 plot_mistakes(images, labels, logits, [words, words], tmp_path / '3.png', title),
                 plot_confusion(labels, logits, [words, words], tmp_path / '4.png', title),
                 plot_gallery({words: images.float()}, tmp_path / '5.png', title)]
    assert all(imread(path).shape[1] > 300 for path in paths)  # not seven dots an inch


def test_settings_of_the_user_are_as_before_afterwards(tmp_path):
    with matplotlib.rc_context({'font.size': 31}):
        plot_curves({'a': [History([0.5])]}, tmp_path / 'c.png', '')
        assert matplotlib.rcParams['font.size'] == 31


@own_style()
def test_a_title_is_three_parts_of_falling_size_above_the_panels_and_never_wider_than_the_figure():
    title = Title('Q1: how well does it do? ' * 9, '/'.join(['a_very_long_folder_name'] * 30), '宽' * 300)
    figure = new_figure(6, 3, title)
    figure.subplots()
    figure.draw_without_rendering()
    question, data, changed = figure.texts
    for text, words in zip(figure.texts, title, strict=True):
        assert ''.join(text.get_text().split()) == ''.join(words.split())  # wrapped, nothing lost
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert question.get_fontsize() > data.get_fontsize() and question.get_fontweight() == 'bold'
    assert question.get_window_extent().y0 > data.get_window_extent().y1 > changed.get_window_extent().y1
    assert changed.get_window_extent().y0 > figure.axes[0].get_tightbbox().y1


def test_large_pictures_are_saved_in_fewer_colours_that_are_nearly_the_same(tmp_path):
    y, x = np.mgrid[:1:250j, :1:250j]
    image = np.stack([x, y, 1 - x], 2) * 0.9 + np.random.default_rng(0).uniform(0, 0.03, (250, 250, 3))
    figure = new_figure(8, 8, '')
    figure.set_layout_engine('none')  # which moves the image a little from one drawing to the next
    figure.subplots().imshow(image, interpolation='nearest')
    path = save_figure(figure, tmp_path / 'large.png')
    with own_style():
        figure.savefig(full := io.BytesIO())
    assert path.stat().st_size < 150_000 < full.tell()
    full.seek(0)
    assert np.abs(imread(path)[..., :3] - imread(full)[..., :3]).mean() < 0.03
    assert list(tmp_path.iterdir()) == [path]


# --- curves -------------------------------------------------------------------------------------------------


def test_curves_draw_each_run_and_mark_its_best_epoch(tmp_path, drawn):
    plain = History([0.4, 0.6, 0.5], val_loss=[1.5, 1.2, 1.3], train_loss=[2.0, 1.0, 0.4])
    plot_curves({'plain': [plain], 'batch norm': [History([0.7, 0.6], best=2)]}, tmp_path / 'c.png', 'Q2a')
    loss, accuracy = drawn[0].axes
    assert lines(loss)['plain train'] == [[1, 2.0], [2, 1.0], [3, 0.4]]
    assert lines(loss)['plain val'] == [[1, 1.5], [2, 1.2], [3, 1.3]]
    np.testing.assert_allclose(lines(accuracy)['batch norm val'], [[1, 70], [2, 60]])
    np.testing.assert_allclose(lines(accuracy)['plain train'], [[1, 90], [2, 90], [3, 90]])
    styles = {line.get_label(): line.is_dashed() for line in accuracy.get_lines()}
    assert styles['plain train'] and not styles['plain val']
    key = {text.get_text(): handle for text, handle in zip(drawn[0].legends[0].get_texts(),
                                                           drawn[0].legends[0].legend_handles, strict=True)}
    assert key['training (during the epoch)'].is_dashed() and not key['validation'].is_dashed()
    dots = [line.get_xydata() for line in accuracy.get_lines() if line.get_marker() == 'o']
    np.testing.assert_allclose(np.concatenate(dots), [[2, 60], [2, 60]])  # the best epoch is what the history says
    assert {'plain', 'batch norm', 'epoch', 'loss (cross entropy)', 'accuracy (%)', 'Q2a'} <= {*texts(drawn[0])}
    colours = {text.get_text(): text.arrow_patch.get_edgecolor() for text in accuracy.texts}
    for line in accuracy.get_lines():
        if line.get_label()[0] != '_':
            assert matplotlib.colors.to_rgba(line.get_color()) == colours[line.get_label().rsplit(' ', 1)[0]]


def test_curves_of_several_seeds_are_their_mean_with_a_band_and_a_dot_for_each_seed(tmp_path, drawn):
    plot_curves({'plain': [History([0.4, 0.6]), History([0.6, 0.7, 0.9])]}, tmp_path / 'c.png', '')
    accuracy = drawn[0].axes[1]
    np.testing.assert_allclose(lines(accuracy)['plain val'], [[1, 50], [2, 65], [3, 90]])  # of those that go so far
    band = accuracy.collections[1].get_paths()[0].vertices
    first = band[band[:, 0] == 1, 1]
    assert (first.min(), first.max()) == pytest.approx((50 - 200 ** 0.5, 50 + 200 ** 0.5))  # the sample's deviation
    (dots,) = [line.get_xydata() for line in accuracy.get_lines() if line.get_marker() == 'o']
    np.testing.assert_allclose(dots, [[2, 60], [3, 90]])
    assert '± one standard deviation over seeds' in texts(drawn[0]) and len(accuracy.collections) == 2


@pytest.mark.parametrize('losses, cut', [
    ([2.0, 1.5, 2.0, 4.0, 8.0], False),  # overfitting
    ([2.0, 1.5, 1.2, 1.1, 40.0], False),  # the last one may be the beginning of anything
    ([2.0, 30.0, 25.0, 1.5, 1.2], False),  # two epochs
    ([2.0, 5.0, 1.5, 1.2, 1.1], False),  # not far above the rest
    ([2.0, 30.0, 1.5, 1.2, 1.1], True), ([30.0, 2.0, 1.5, 1.2, 1.1], True)])
def test_every_loss_is_inside_the_axis_but_for_one_spike_that_is_marked(tmp_path, drawn, losses, cut):
    plot_curves({'a': [History([0.5] * 5, losses, [2.0, 1.0, 0.5, 0.2, 0.1])]}, tmp_path / 'c.png', '')
    loss = drawn[0].axes[0]
    low, high = loss.get_ylim()
    marks = [line.get_xydata()[0] for line in loss.get_lines() if line.get_marker() == '^']
    outside = [epoch for epoch, value in enumerate(losses, 1) if not low <= value <= high]
    assert low == 0 and outside == [epoch for epoch, _ in marks] and len(marks) == cut
    assert ('above the axis: 30' in texts(drawn[0])) == cut
    assert all(low < place < high for _, place in marks)


def test_losses_that_are_not_finite_are_left_out(tmp_path, drawn):
    plot_curves({'a': [History([0.5] * 3, [2.0, math.inf, math.nan])]}, tmp_path / 'c.png', '')
    assert 2 < drawn[0].axes[0].get_ylim()[1] < 2.5


@pytest.mark.parametrize('epochs, ticks', [(1, [1]), (3, [1, 2, 3]), (20, [5, 10, 15, 20]), (50, [10, 20, 30, 40, 50])])
def test_ticks_are_at_round_epochs(tmp_path, drawn, epochs, ticks):
    plot_curves({'a': [History([0.5] * epochs)]}, tmp_path / 'c.png', '')
    for panel in drawn[0].axes:
        left, right = panel.get_xlim()
        assert [tick for tick in panel.get_xticks() if left <= tick <= right] == ticks


def test_thirteen_runs_have_thirteen_colours_and_names_that_neither_overlap_nor_cover_curves(tmp_path, drawn):
    runs = {f'run {i}': [History([0.5, 0.8 + i / 1000])] for i in range(13)}
    plot_curves(runs, tmp_path / 'c.png', '')
    accuracy = drawn[0].axes[1]
    assert len({str(line.get_color()) for line in accuracy.get_lines()}) == 13
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in accuracy.texts]
    assert [text.get_text() for text in sorted(accuracy.texts, key=lambda text: text.xyann[1])] == list(runs)
    boxes.sort(key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 - 3 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(accuracy.bbox.x1 < box.x0 and box.x1 <= drawn[0].bbox.x1 for box in boxes)


# --- accuracies ---------------------------------------------------------------------------------------------


def test_accuracies_are_dots_with_error_bars_one_row_a_run_with_the_first_on_top(tmp_path, drawn):
    rows = {'none': {'training': Accuracy(99, 0.5), 'validation': Accuracy(80, 1.5), 'test': Accuracy(79, 0.25)},
            'flip': {'training': Accuracy(95, 0), 'validation': Accuracy(83, math.nan)}, 'crop': {'training': NAN}}
    plot_accuracies(rows, tmp_path / 'a.png', 'Q3a')
    (panel,) = drawn[0].axes
    training, validation, test = panel.containers
    dots, errors = bars(validation)
    assert [x for x, _ in dots] == [80, 83] and [round(y) for _, y in dots] == [0, 1]
    assert errors == [(78.5, 81.5), (83, 83)] and bars(test)[1] == [(78.75, 79.25)]
    assert [c.get_label() for c in panel.containers] == ['training', 'validation', 'test']
    assert training[0].get_markerfacecolor() == 'white' != validation[0].get_markerfacecolor()
    assert [label.get_text() for label in panel.get_yticklabels()] == ['none', 'flip', 'crop']
    assert panel.get_ylim()[0] > panel.get_ylim()[1]  # the first on top
    assert 77 < panel.get_xlim()[0] < 78.5 and 99.5 < panel.get_xlim()[1] < 101  # as wide as the data
    assert {'80.0 ± 1.5', '83.0', '79.0 ± 0.2', '○ training', '● validation', '◆ test'} <= {*texts(panel)}
    assert texts(panel).count('–') == 4  # crop has none, flip no test


def test_best_and_latest_are_joined_in_a_panel_for_each_set_on_one_scale(tmp_path, drawn):
    rows = {'plain': {'training': (Accuracy(90, 1), Accuracy(97, 2)), 'test': (Accuracy(80, 1), Accuracy(79, 1))},
            'batch norm': {'training': (Accuracy(99, 1), Accuracy(100, 0)), 'test': (NAN, NAN)}}
    plot_best_and_latest(rows, tmp_path / 'b.png', 'Q2b')
    training, test = drawn[0].axes
    assert [panel.get_title('left') for panel in drawn[0].axes] == ['training', 'test']
    best, latest = training.containers
    assert [x for x, _ in bars(best)[0]] == [90, 99] and [x for x, _ in bars(latest)[0]] == [97, 100]
    assert bars(latest)[1] == [(95, 99), (100, 100)]
    assert (best.get_label(), latest.get_label()) == ('best on validation', 'latest')
    joined = [line.get_xdata().tolist() for line in training.get_lines() if line.get_linewidth() == 3]
    assert joined == [[90, 97], [99, 100]]
    assert {'90.0 → 97.0', '80.0 → 79.0', 'plain', 'batch norm', 'best on validation', 'latest'} <= {*texts(drawn[0])}
    assert np.diff(training.get_xlim()) == pytest.approx(np.diff(test.get_xlim()))
    for panel, low, high in ((training, 89, 100), (test, 78, 81)):  # error bars included
        assert panel.get_xlim()[0] < low and high < panel.get_xlim()[1]


def test_strengths_have_a_panel_each_one_scale_and_the_level_without(tmp_path, drawn):
    series = {'training': [Accuracy(95, 1), Accuracy(92, 1)], 'validation': [Accuracy(81, 1), Accuracy(83, 2)]}
    level = {'training': Accuracy(99, 0), 'validation': Accuracy(78, 1)}
    plot_strengths({'crop': ((2, 4), series), 'jitter': ((0.1, 0.3), series)}, level, tmp_path / 's.png', 'Q3a')
    for panel, (name, strengths) in zip(drawn[0].axes, {'crop': (2, 4), 'jitter': (0.1, 0.3)}.items(), strict=False):
        assert panel.get_title('left') == name and tuple(panel.get_xticks()) == strengths
        assert bars(panel.containers[1]) == ([[strengths[0], 81], [strengths[1], 83]], [(80, 82), (81, 85)])
        levels = [y for label, ((_, y), _) in lines(panel).items() if 'without augmentation' in label]
        assert levels == [99, 78] and panel.get_ylim() == drawn[0].axes[0].get_ylim()


def test_accuracy_against_p_shows_both_sets_their_errors_and_chance(tmp_path, drawn):
    series = {'training': [Accuracy(99, 0), Accuracy(60, 1)], 'validation': [Accuracy(84, 2), Accuracy(58, 1)]}
    plot_against([0.0, 0.9], series, tmp_path / 'd.png', 'Q3b', xlabel='dropout probability p', chance=10)
    (panel,) = drawn[0].axes
    assert [c.get_label() for c in panel.containers] == ['training', 'validation']
    assert bars(panel.containers[1]) == ([[0, 84], [0.9, 58]], [(82, 86), (57, 59)])
    assert lines(panel)['chance: 10%'] == [[0, 10], [1, 10]] and panel.get_ylim()[0] == 0
    assert (panel.get_xlabel(), panel.get_ylabel()) == ('dropout probability p', 'accuracy (%)')


# --- images -------------------------------------------------------------------------------------------------


def test_gallery_shows_each_image_in_its_colours_beside_its_name(tmp_path, drawn):
    images = torch.rand(2, 3, 32, 32)
    plot_gallery({'none': images, 'flip': images.flip(3)}, tmp_path / 'g.png', 'Q3a')
    rows = {panel.get_yticklabels()[0].get_text(): panel.images[0].get_array() for panel in drawn[0].axes}
    np.testing.assert_allclose(rows['none'][:, :32], images[0].permute(1, 2, 0))
    np.testing.assert_allclose(rows['flip'][:, 34:], images[1].flip(2).permute(1, 2, 0))


def test_mistakes_are_the_surest_first_with_given_class_probability_and_true_class(tmp_path, drawn):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.04, 0.05, 0.91], [0.0005, 0.999, 0.0005]]).log()
    classes, title = ['cat', 'dog', 'ship'], Title('Q1')
    plot_mistakes(images, torch.tensor([0, 1, 1, 2]), logits, classes, tmp_path / 'm.png', title)
    shown = [panel for panel in drawn[0].axes if panel.images]
    assert [panel.get_title() for panel in shown] == ['dog >99%', 'ship 91%', 'cat 60%']
    assert [panel.texts[0].get_text() for panel in shown] == ['is: ship', 'is: dog', 'is: dog']
    for panel, i in zip(shown, (3, 2, 1), strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), images[i].permute(1, 2, 0))
    assert any('3 of 4 test images' in text for text in texts(drawn[0]))
    plot_mistakes(images, torch.tensor([0, 1, 1, 2]), logits, classes, tmp_path / 'm.png', title, count=1)
    assert [panel.get_title() for panel in drawn[1].axes if panel.images] == ['dog >99%']


def test_no_mistake_is_said(tmp_path, drawn):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    plot_mistakes(images, torch.tensor([0, 1]), torch.eye(2), ['a', 'b'], tmp_path / 'm.png', 'Q1')
    assert 'No mistake.' in texts(drawn[0])


def test_confusion_has_true_classes_as_rows_in_percent_and_their_accuracy_in_the_margin(tmp_path, drawn):
    labels = torch.tensor([0] * 4 + [1] * 2)
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 2, 1]), 3).float()
    plot_confusion(labels, logits, ['cat', 'dog', 'ship'], tmp_path / 'c.png', 'Q1')
    (panel,) = drawn[0].axes
    np.testing.assert_allclose(np.ma.filled(panel.images[0].get_array(), -1),
                               [[-1, 25, 0], [0, -1, 50], [-1, -1, -1]])  # the right ones and empty rows are grey
    cells = {text.get_position(): text.get_text() for text in panel.texts if not hasattr(text, 'xyann')}
    assert cells == {(0, 0): '75', (1, 0): '25', (1, 1): '50', (2, 1): '50'}  # (column, row)
    margin = {text.xy[1]: text.get_text() for text in panel.texts if hasattr(text, 'xyann') and '%' in text.get_text()}
    assert margin == {0: '75.0%', 1: '50.0%'} and 'no image' in texts(panel)
    assert [label.get_text() for label in panel.get_yticklabels()] == ['cat', 'dog', 'ship']
    assert (panel.get_xlabel(), panel.get_ylabel()) == ('class given by the network', 'true class')
    assert any('66.7% of all 6 images' in text for text in texts(drawn[0]))


def test_confusion_of_many_classes_has_a_colour_bar_instead_of_numbers(tmp_path, drawn):
    labels = torch.arange(30)
    plot_confusion(labels, torch.eye(30).roll(1, 1), [f'class {i}' for i in range(30)], tmp_path / 'c.png', 'Q1')
    panel, bar = drawn[0].axes
    assert not [text for text in panel.texts if not hasattr(text, 'xyann')]
    assert bar.get_ylabel() == 'mistakes (% of the true class)'
