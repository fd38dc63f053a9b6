"""Batches: nothing lost, nothing mixed up, nothing augmented that must not be."""
from itertools import chain

import pytest
import torch
from torch.testing import assert_close

from datasets.augment import Crop, Flip
from datasets.batches import Batches, Split


@pytest.fixture
def noise():
    """50 images whose labels are their numbers."""
    return Split(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.arange(50))


def test_evaluation_sees_every_image_once_in_order_and_never_augmented(noise):
    batches = Batches(noise, 20)
    images, labels = zip(*batches, strict=True)
    assert [len(part) for part in labels] == [20, 20, 10] and len(batches) == 3
    assert torch.equal(torch.cat(labels), noise.labels)
    assert_close(torch.cat(images), (noise.images / 255 - 0.5) / 0.5)
    with pytest.raises(AssertionError, match='only training images'):
        Batches(noise, 20, augmentations=[Flip(0.5)])


@pytest.mark.parametrize('batch_size, sizes', [(20, [20, 20]), (25, [25, 25]), (50, [50]), (80, [50])])
def test_training_drops_an_incomplete_last_batch_unless_it_is_the_only_one(noise, batch_size, sizes):
    batches = Batches(noise, batch_size, shuffle=True)
    labels = [labels for _, labels in batches]
    assert [len(part) for part in labels] == sizes and len(batches) == len(sizes)
    assert len(torch.cat(labels).unique()) == sum(sizes)


def test_each_epoch_draws_its_order_first_and_each_batchs_augmentation_just_before_it(noise):
    augmentations = [Crop(4, 'reflect'), Flip(0.5), lambda images, _: images * images]
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.2)
    torch.manual_seed(3)
    expected = []
    for _ in range(2):
        for index in torch.randperm(50)[:40].split(20):
            images = noise.images[index].float() / 255
            for augmentation in augmentations:
                images = augmentation(images, None)
            for channel in range(3):
                images[:, channel] = (images[:, channel] - mean[channel]) / std[channel]
            expected.append((images, index, torch.rand(1)))  # what dropout might draw in between
    torch.manual_seed(3)
    batches = Batches(noise, 20, mean=mean, std=std, augmentations=augmentations, shuffle=True)
    for (images, labels), (wanted, index, drawn) in zip(chain(batches, batches), expected, strict=True):
        assert_close(images, wanted)
        assert torch.equal(labels, noise.labels[index]) and images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(torch.rand(1), drawn)
