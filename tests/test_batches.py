"""Batches: nothing lost, nothing mixed up, nothing augmented that must not be."""
import pytest
import torch

from datasets.augment import Crop, Flip
from datasets.batches import Batches, Split


@pytest.fixture
def numbered():
    """50 images; each pixel of image i is i, and so is its label."""
    numbers = torch.arange(50)
    return Split(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous(), numbers)


@pytest.fixture
def noise():
    return Split(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.arange(50))


def test_evaluation_sees_every_image_once_in_order_and_never_augmented(noise):
    batches = Batches(noise, 20)
    images, labels = zip(*batches, strict=True)
    assert [len(part) for part in labels] == [20, 20, 10] and len(batches) == 3
    assert torch.equal(torch.cat(labels), noise.labels)
    torch.testing.assert_close(torch.cat(images), (noise.images / 255 - 0.5) / 0.5)
    with pytest.raises(AssertionError, match='only training images'):
        Batches(noise, 20, augmentations=[Flip(0.5)])


@pytest.mark.parametrize('batch_size, sizes', [(20, [20, 20]), (25, [25, 25]), (50, [50]), (80, [50])])
def test_training_drops_an_incomplete_last_batch_unless_it_is_the_only_one(numbered, batch_size, sizes):
    batches = Batches(numbered, batch_size, shuffle=True)
    assert [len(labels) for _, labels in batches] == sizes and len(batches) == len(sizes)


def test_an_epoch_is_a_new_permutation_that_follows_from_the_seed(numbered):
    def epochs(seed):
        torch.manual_seed(seed)
        batches = Batches(numbered, 10, shuffle=True)
        return [torch.cat([labels for _, labels in batches]) for _ in range(2)]
    (first, second), (again, _) = epochs(0), epochs(0)
    assert torch.equal(first.sort().values, torch.arange(50))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_the_order_is_drawn_first_and_each_batchs_augmentation_just_before_it(noise):
    augmentations = [Flip(0.5), Crop(4)]
    torch.manual_seed(3)
    expected = []
    for index in torch.randperm(50)[:40].split(20):
        images = noise.images[index].float() / 255
        for augmentation in augmentations:
            images = augmentation(images, None)
        expected.append(((images - 0.5) / 0.5, index, torch.rand(1)))  # what dropout might draw in between
    torch.manual_seed(3)
    batches = Batches(noise, 20, augmentations=augmentations, shuffle=True)
    for (images, labels), (wanted, index, drawn) in zip(batches, expected, strict=True):
        assert torch.equal(images, wanted) and torch.equal(labels, noise.labels[index])
        assert torch.equal(torch.rand(1), drawn)


def test_labels_stay_with_their_images_and_each_channel_is_normalised(numbered):
    batches = Batches(numbered, 10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2), augmentations=[Flip(0.5)], shuffle=True)
    for images, labels in batches:
        assert images.is_contiguous(memory_format=torch.channels_last)
        for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.4), (0.3, 0.2))):
            torch.testing.assert_close(images[:, channel, 3, 4], (labels / 255 - mean) / std)


def test_augmentation_draws_anew_for_each_image_and_each_step(noise):
    images = noise.images[:1].expand(40, -1, -1, -1)
    batches = Batches(Split(images, torch.zeros(40, dtype=torch.long)), 40, augmentations=[Crop(4)], shuffle=True)
    (first, _), (second, _) = (next(iter(batches)) for _ in range(2))
    assert len(first.unique(dim=0)) > 20 and not torch.equal(first, second)


def test_a_subclass_can_make_its_own_inputs(numbered):
    class Doubled(Batches):
        def inputs(self, images):
            return 2 * images[:, 0, 0, 0].float()
    for inputs, labels in Doubled(numbered, 20, shuffle=True):
        assert torch.equal(inputs, 2 * labels.float())
