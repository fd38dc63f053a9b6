"""The built-in shapes: what the offline runs and most tests learn from."""
import pytest
import torch

from datasets import shapes
from datasets.shapes import CLASSES, make_shapes


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    # drawing is many short operations: beside other work, two threads wait for each other in each
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def drawn(one_thread):
    return make_shapes(1000, seed=3)


def test_images_and_labels_have_the_form_of_cifar10(drawn):
    images, labels = drawn
    assert (images.shape, images.dtype) == ((1000, 3, 32, 32), torch.uint8)
    assert (labels.shape, labels.dtype) == ((1000,), torch.int64)
    assert len(CLASSES) == len(set(CLASSES)) == 10


@pytest.mark.parametrize('n', [1, 7, 23, 500, 501])
def test_any_number_is_drawn_with_balanced_classes(n):
    images, labels = make_shapes(n, seed=0)
    counts = labels.bincount(minlength=10)
    assert len(images) == n and counts.max() - counts.min() <= 1


def test_the_order_of_the_classes_is_random(drawn):
    assert not torch.equal(drawn[1], drawn[1].sort().values)
    assert drawn[1][:100].unique().numel() == 10


def test_a_seed_gives_the_same_images_and_another_seed_others(drawn):
    torch.rand(5)  # the global generator has no say
    again, other = make_shapes(1000, seed=3), make_shapes(1000, seed=4)
    assert torch.equal(drawn[0], again[0]) and torch.equal(drawn[1], again[1])
    assert not torch.equal(drawn[0], other[0]) and not torch.equal(drawn[1], other[1])


def test_no_two_images_are_alike(drawn):
    assert len(drawn[0].flatten(1).unique(dim=0)) == 1000


def test_a_mirror_image_of_a_shape_is_the_same_shape():
    x, y = torch.meshgrid(torch.linspace(-1.2, 1.2, 49), torch.linspace(-1.2, 1.2, 49), indexing='xy')
    for shape in shapes.SHAPES:
        inside = shape(x[None], y[None]) < 0
        assert 0.1 < inside.float().mean() < 0.6, shape.__name__
        assert (inside != (shape(-x[None], y[None]) < 0)).float().mean() < 0.01, shape.__name__


def test_the_shape_is_brighter_than_its_surroundings():
    labels = torch.full((200,), CLASSES.index('circle'))
    images = shapes.draw(labels, torch.Generator().manual_seed(0)).float().mean(1)
    assert images[:, 14:18, 14:18].mean() > images[:, :3].mean() + 25


def test_mean_colours_hint_at_the_class_but_do_not_give_it_away(drawn):
    images, labels = drawn
    colours = images.float().mean((2, 3))
    means = torch.stack([colours[:500][labels[:500] == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(colours[500:], means).argmin(1) == labels[500:]).float().mean()
    assert 0.2 < accuracy < 0.75
