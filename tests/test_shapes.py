"""The built-in shapes: what the offline runs and most tests learn from."""
import pytest
import torch

from datasets import cifar10, shapes
from datasets.shapes import CLASSES, make_shapes


@pytest.fixture(scope='module')
def drawn():
    return make_shapes(1001, seed=3)  # in three parts


@pytest.mark.parametrize('n', [1, 23, 501])
def test_any_number_is_drawn_with_balanced_classes_in_random_order_that_follow_from_the_seed(n):
    images, labels = make_shapes(n, seed=0)
    counts = labels.bincount(minlength=10)
    assert images.shape == (n, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert len(labels) == n and len(counts) == len(set(CLASSES)) == 10 and counts.max() - counts.min() <= 1
    assert n == 1 or not torch.equal(labels, labels.sort().values) and labels[:100].unique().numel() == 10
    torch.rand(5)  # the global generator has no say
    again, other = make_shapes(n, seed=0), make_shapes(n, seed=1)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, other[0]) and (n == 1 or not torch.equal(labels, other[1]))


def test_a_mirror_image_of_a_shape_is_the_same_shape():
    x, y = torch.meshgrid(torch.linspace(-1.2, 1.2, 49), torch.linspace(-1.2, 1.2, 49), indexing='xy')
    for shape in shapes.SHAPES:
        inside = shape(x[None], y[None]) < 0
        assert 0.1 < inside.float().mean() < 0.6, shape.__name__
        assert (inside != (shape(-x[None], y[None]) < 0)).float().mean() < 0.01, shape.__name__


def test_every_class_is_recognised_by_its_mean_brightness_which_is_that_of_a_bright_shape(drawn):
    images, labels = drawn
    grey = images.float().mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    first, second = (torch.stack([part[which == label].mean(0) for label in range(10)])
                     for part, which in ((grey[:500], labels[:500]), (grey[500:], labels[500:])))
    nearest = torch.cdist(first.flatten(1), second.flatten(1)).argmin(1)
    assert (nearest == torch.arange(10)).sum() >= 7  # blurred, stripes and chequers are almost the same
    circle = first[CLASSES.index('circle')]
    assert circle[14:18, 14:18].mean() > circle[:3].mean() + 25


def test_mean_colours_hint_at_the_class_but_do_not_give_it_away(drawn):
    images, labels = drawn
    assert len(images.flatten(1).unique(dim=0)) == len(labels)
    colours = images.float().mean((2, 3))
    means = torch.stack([colours[:500][labels[:500] == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(colours[500:], means).argmin(1) == labels[500:]).float().mean()
    assert 0.2 < accuracy < 0.75


def test_the_shapes_of_a_version_are_the_same_on_every_processor_but_for_rounding():
    """Where this fails because the shapes are to look otherwise, raise shapes.VERSION, too."""
    images, labels = make_shapes(100, seed=0)
    assert shapes.VERSION == 'built-in shapes 1'
    assert images.double().mean((0, 2, 3)).tolist() == pytest.approx([111.1448, 106.5350, 111.1856], abs=0.005)
    assert labels[:10].tolist() == [4, 9, 3, 0, 1, 9, 7, 5, 3, 1]


def test_shapes_are_known_by_their_version_and_not_by_pixels_that_processors_round_differently(monkeypatch):
    def content(difference):
        monkeypatch.setattr(shapes, 'make_shapes', lambda n, seed: (
            torch.full((n // 100, 3, 32, 32), difference, dtype=torch.uint8), torch.zeros(n // 100).long()))
        return cifar10.load('shapes', None, 10, 4).content
    first = content(0)
    assert content(1) == first
    monkeypatch.setattr(shapes, 'VERSION', 'built-in shapes 2')
    assert content(0) != first
