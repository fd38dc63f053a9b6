"""Device, precision, files and pictures."""
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

import utils
from models.convnet import ConvNet
from training import Epoch, History
from utils import VisualizeFilter, pick_device, pick_precision, write_atomically


def picture(path):
    """A PNG -> (height, width, 3) floats in [0, 1]."""
    return imread(path)[..., :3]


# --- device and precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['tpu', 'meta', 'cuda:99', ''])
def test_a_device_that_does_not_work_here_is_refused(name):
    with pytest.raises(ValueError, match='device must be'):
        pick_device(name)


def test_auto_is_cuda_where_there_is_one_else_the_cpu():
    assert pick_device('auto').type == ('cuda' if torch.cuda.is_available() else 'cpu')


KEPT = """
import torch, utils
from benchmarks.training_speed import give_back_freed_memory

def resident():
    return next(1024 * int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS'))

for choose in (give_back_freed_memory, lambda: utils.pick_device('cpu'), give_back_freed_memory):
    choose()
    before = resident()
    torch.ones(2**26)  # 256 MB, used and freed
    print((resident() - before) >> 20)
"""


def test_freed_memory_is_kept_on_a_cpu():
    if 'glibc' not in platform.libc_ver() or not Path('/proc/self/status').exists():
        pytest.skip('only glibc can be told to keep freed memory')
    done = subprocess.run([sys.executable, '-c', KEPT], capture_output=True, text=True, timeout=120,
                          cwd=Path(utils.__file__).parent)  # a process of its own, with a heap of its own
    first, kept, last = map(int, done.stdout.split())
    assert kept > 200 and max(first, last) < 50


@pytest.mark.parametrize('native, error, faster, expected', [
    (True, 0.003, 3.0, 'bf16'), (True, 0.003, 0.6, 'fp32'), (True, 0.5, 3.0, 'fp32'), (False, 0.003, 3.0, 'fp32')])
def test_bf16_is_chosen_only_where_it_is_native_right_and_faster(monkeypatch, native, error, faster, expected):
    monkeypatch.setattr(utils, '_cpu_has_bf16', lambda: native)
    monkeypatch.setattr(utils, '_try_bf16', lambda: (error, faster))
    assert pick_precision('auto', torch.device('cpu'))[0] == expected
    assert pick_precision('bf16', torch.device('cpu'))[0] == 'bf16'


def test_the_trial_of_bf16_measures_a_small_error_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    error, faster = utils._try_bf16()
    assert 1e-4 < error < 0.05 and faster > 0  # bf16 has 8 bits: not exact, not wrong
    assert torch.get_num_threads() == threads


# --- files --------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'a.txt'
    write_atomically(path, 'old')

    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(utils.os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        write_atomically(path, 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


# --- filters ------------------------------------------------------------------------------------------------


def test_filters_are_tiled_channel_last_in_rows_on_one_scale():
    model = ConvNet(3, [128], 10)
    weight = model.features[0].weight.data
    image = VisualizeFilter(model)
    assert image.shape == (8 * 4 + 1, 16 * 4 + 1, 3)
    limit = weight.abs().max()
    for number, (row, column) in {0: (0, 0), 15: (0, 15), 16: (1, 0), 127: (7, 15)}.items():
        for y in range(3):
            for x in range(3):
                expected = weight[number, :, y, x] / (2 * limit) + 0.5
                np.testing.assert_allclose(image[1 + 4 * row + y, 1 + 4 * column + x], expected, rtol=1e-5)
    assert (image[0] == 1).all() and (image[:, 4] == 1).all()


def test_filters_before_and_after_share_one_scale_and_are_saved(tmp_path):
    before, after = ConvNet(3, [128], 10), ConvNet(3, [128], 10)
    with torch.no_grad():
        after.features[0].weight.copy_(2 * before.features[0].weight)
    image = VisualizeFilter(after, tmp_path / 'filters.png', before=before, title='shapes')
    left, right = image[:, :65], image[:, 68:]
    filters = (left != 1).all(-1) & (right != 1).all(-1)
    np.testing.assert_allclose(right[filters] - 0.5, 2 * (left[filters] - 0.5), atol=1e-6)
    assert picture(tmp_path / 'filters.png').shape[1] > 1000


def test_all_zero_filters_are_grey():
    model = nn.Conv2d(3, 5, 3)
    nn.init.zeros_(model.weight)
    assert set(np.unique(VisualizeFilter(model))) == {0.5, 1.0}


# --- plots --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures = []
    save = utils.save_figure
    monkeypatch.setattr(utils, 'save_figure', lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def make_history(*accuracies):
    return History([Epoch(i, 0.1, 2.0 / i, 0.5, 1.0, accuracy, 1.0, 10.0) for i, accuracy in enumerate(accuracies, 1)])


def test_curves_overlay_runs_mark_the_best_epoch_and_name_the_data(tmp_path, drawn):
    utils.plot_curves({'plain': [make_history(0.4, 0.6, 0.5)], 'batch norm': [make_history(0.7, 0.6)]},
                      tmp_path / 'c.png', 'Q2a · built-in shapes')
    (figure,) = drawn
    loss, accuracy = figure.axes
    assert 'built-in shapes' in figure.get_suptitle()
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ['plain', 'batch norm']
    assert (loss.get_xlabel(), accuracy.get_ylabel()) == ('epoch', 'accuracy (%)')
    dots = [line.get_xydata().tolist() for line in accuracy.get_lines() if line.get_marker() == 'o']
    assert dots == [[[2, 60]], [[1, 70]]]
    assert all(tick == int(tick) for tick in accuracy.get_xticks())


def test_curves_of_several_seeds_are_their_mean_with_a_band(tmp_path, drawn):
    utils.plot_curves({'plain': [make_history(0.4, 0.6), make_history(0.6, 0.7, 0.9)]}, tmp_path / 'c.png', '')
    accuracy = drawn[0].axes[1]
    means = [line.get_ydata().tolist() for line in accuracy.get_lines() if line.get_linestyle() == '-']
    assert means[0] == pytest.approx([50, 65, 90])  # of those that go so far
    band = accuracy.collections[1].get_paths()[0].vertices  # of validation; the sample's deviation
    first = band[band[:, 0] == 1, 1]
    assert (first.min(), first.max()) == pytest.approx((50 - 200 ** 0.5, 50 + 200 ** 0.5))
    assert len(accuracy.collections) == 2  # a band for training and one for validation


def test_bars_and_lines_draw_the_numbers_they_are_given(tmp_path, drawn):
    series = {'training': ([90.0, 91.0], [1.0, 0.5]), 'validation': ([80.0, 82.0], [0.0, 0.0])}
    utils.plot_bars(['none', 'flip'], series, tmp_path / 'b.png', 'shapes')
    utils.plot_against([0.0, 0.5], series, tmp_path / 'l.png', 'shapes', 'p')
    bars, lines = (figure.axes[0] for figure in drawn)
    assert [bar.get_height() for bar in bars.patches] == [90, 91, 80, 82]
    assert bars.get_ylim()[0] < 80 and bars.get_ylim()[1] > 91.5
    assert lines.get_lines()[0].get_xydata().tolist() == [[0, 90], [0.5, 91]] and lines.get_xlabel() == 'p'


def test_gallery_shows_each_image_in_its_colours(tmp_path, drawn):
    images = torch.rand(2, 3, 32, 32)
    utils.plot_gallery({'none': images, 'flip': images.flip(3)}, tmp_path / 'g.png', 'shapes')
    shown = [panel.images[0].get_array() for panel in drawn[0].axes]
    assert len(shown) == 4
    np.testing.assert_allclose(shown[3], images[1].flip(2).permute(1, 2, 0))
