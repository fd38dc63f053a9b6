"""VisualizeFilter (Q1c): every filter in its place, in true colours, on a scale that is told."""
import numpy as np
import pytest
import torch
from torch import nn

from utils import VisualizeFilter


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


def test_filters_of_one_channel_are_grey_and_what_cannot_be_shown_or_written_is_refused(tmp_path):
    image = VisualizeFilter(nn.Sequential(nn.Conv2d(1, 20, 3)), tmp_path / 'f.png')
    assert image.shape[2] == 3 and (image == image[..., :1]).all()
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f'these have {channels}'):
            VisualizeFilter(nn.Sequential(nn.Conv2d(channels, 20, 3)))
    with pytest.raises(ValueError, match='must end in .png'):
        VisualizeFilter(convolution(torch.ones(5, 3, 3, 3)), tmp_path / 'f.pdf')


@pytest.mark.parametrize('number, change, message', [
    (None, True, 'same network before training'), (4, True, '4, 3, 3, 3.* before'), (4, False, '4, 3, 3, 3.* before')])
def test_a_change_needs_a_network_before_and_two_networks_filters_of_one_shape(tmp_path, number, change, message):
    before = None if number is None else convolution(torch.ones(number, 3, 3, 3))
    with pytest.raises(ValueError, match=message):
        VisualizeFilter(convolution(torch.ones(5, 3, 3, 3)), tmp_path / 'f.png', before=before, change=change)
    assert not (tmp_path / 'f.png').exists()
