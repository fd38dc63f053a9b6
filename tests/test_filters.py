"""The size of a network and the picture of its filters."""
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

import utils
from lab.figure import Title, save_figure
from utils import PrintModelSize, VisualizeFilter


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures = []
    monkeypatch.setattr(utils, 'save_figure',
                        lambda figure, path: figures.append(figure) or save_figure(figure, path))
    return figures


def convolution(weight):
    model = nn.Conv2d(3, len(weight), 3)
    model.weight = nn.Parameter(weight)
    return nn.Sequential(model)


@pytest.fixture
def pair():
    """A network before training and after it."""
    before = torch.randn(20, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    change = 0.1 * torch.randn(20, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return convolution(before), convolution(before + change), change


def filter_of(image, number, columns):
    """Filter `number` of a tiled image -> (3, 3, 3), height first."""
    row, column = divmod(number, columns)
    return image[1 + 4 * row:4 + 4 * row, 1 + 4 * column:4 + 4 * column]


def test_size_counts_every_parameter_once_and_says_which_train(capsys):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert PrintModelSize(model) == 112 + 8 + 10
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [['0', 'Conv2d', '112'], ['1', 'BatchNorm2d', '8'], ['2', 'Linear', '10'],
                       ['trainable', '18'], ['total', '130']]
    assert PrintModelSize(model, disp=False) == 130 and not capsys.readouterr().out


def test_filters_are_tiled_channel_last_in_rows_of_sixteen_on_one_scale():
    weight = torch.randn(128, 3, 3, 3)
    image = VisualizeFilter(convolution(weight))
    assert image.shape == (8 * 4 + 1, 16 * 4 + 1, 3)
    for number in (0, 15, 16, 127):
        expected = weight[number].permute(1, 2, 0) / (2 * weight.abs().max()) + 0.5
        np.testing.assert_allclose(filter_of(image, number, 16), expected, rtol=1e-5)
    assert (image[0] == 1).all() and (image[:, 4] == 1).all()


def test_before_is_left_and_after_right_on_one_scale(pair):
    before, _, _ = pair
    image = VisualizeFilter(convolution(2 * before[0].weight.detach()), before=before)
    left, right = image[:, :65], image[:, 68:]
    np.testing.assert_allclose(filter_of(right, 3, 16) - 0.5, 2 * (filter_of(left, 3, 16) - 0.5), atol=1e-6)


def test_all_zero_filters_are_grey(tmp_path):
    model = convolution(torch.zeros(5, 3, 3, 3))
    assert set(np.unique(VisualizeFilter(model, tmp_path / 'f.png', before=model, change=True))) == {0.5, 1.0}


def test_the_picture_shows_before_after_and_the_change_on_its_own_scale(tmp_path, drawn, pair):
    before, after, change = pair
    title = Title('Q1c: what do the filters look like?', 'shapes')
    VisualizeFilter(after, tmp_path / 'filters.png', before=before, change=True, title=title)
    panels = {panel.get_title('left'): panel for panel in drawn[0].axes}
    assert list(panels) == ['before training', 'after training', 'the change: after minus before']
    limit = max(network[0].weight.abs().max().item() for network in (before, after))
    for panel, weight, scale in zip(panels.values(), (before[0].weight, after[0].weight, change),
                                    (limit, limit, change.abs().max()), strict=True):
        for number in (0, 7, 8, 19):
            expected = weight[number].detach().permute(1, 2, 0) / (2 * scale) + 0.5
            np.testing.assert_allclose(filter_of(panel.images[0].get_array(), number, 8), expected, atol=1e-5)
    note = drawn[0].axes[2].get_xlabel()
    assert f'±{change.abs().max():.2g}' in note and f'{change.norm() / before[0].weight.norm():.0%}' in note
    assert f'±{limit:.2f}' in drawn[0].axes[0].get_xlabel() == drawn[0].axes[1].get_xlabel()
    assert [text.get_text() for text in drawn[0].texts] == [*title[:2]]
    assert imread(tmp_path / 'filters.png').shape[1] > 1000


def test_two_different_networks_have_their_names_and_no_change(tmp_path, drawn, pair):
    VisualizeFilter(pair[1], tmp_path / 'f.png', before=pair[0], titles=['fine-tuned', 'scratch'], title='Q4b')
    assert [panel.get_title('left') for panel in drawn[0].axes] == ['fine-tuned', 'scratch']


@pytest.mark.parametrize('before', [None, convolution(torch.ones(2, 3, 3, 3))])
def test_a_change_needs_the_same_network_before(pair, before):
    with pytest.raises(ValueError, match='same network before training'):
        VisualizeFilter(pair[1], before=before, change=True)
