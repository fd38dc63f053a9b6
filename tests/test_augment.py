"""Each augmentation against torchvision's functional transform or a slow loop; what is random, and how."""
import inspect
import itertools
from functools import partial

import pytest
import torch
import torchvision.transforms.v2.functional as oracle
from tiny import OnMeta
from torch.testing import assert_close

from datasets import augment
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale

each_augmentation = pytest.mark.parametrize('aug', [
    Flip(0.5), Crop(4), Crop(2, 'reflect'), Affine(20, 0.1, 0.2, 15), Cutout(8), ColorJitter(0.4, 0.4, 0.4, 0.2),
    Greyscale(0.5)], ids=lambda aug: type(aug).__name__)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(batch=12, height=21, width=28):
    """`batch` images of noise, whose lack of symmetry hides no mistake, then nine of the extreme colours."""
    noise = torch.rand(batch, 3, height, width, generator=seeded(1))
    colours = torch.tensor([*itertools.product((0.0, 1.0), repeat=3), (0.5, 0.5, 0.5)])
    return torch.cat((noise, colours.view(-1, 3, 1, 1).expand(-1, -1, height, width)))


def slow_crop(image, x, y, padding, mode):
    padded = oracle.pad(image, [padding], fill=0, padding_mode='constant' if mode == 'zeros' else mode)
    return padded[:, y:y + image.shape[1], x:x + image.shape[2]]


def slow_affine(image, angle, translate_x, translate_y, scale, shear):
    # fill is left at None, which is black: fill=0 would multiply the blended border by its weight again
    return oracle.affine(image, angle, [translate_x, translate_y], scale, [shear, 0.0],
                         oracle.InterpolationMode.BILINEAR)


def slow_cutout(image, x, y, size):
    left, top = x - size // 2, y - size // 2
    image = image.clone()
    image[:, max(0, top):top + size, max(0, left):left + size] = 0.5
    return image


SLOW = {'crop': slow_crop, 'affine': slow_affine, 'cutout': slow_cutout, 'adjust_brightness': oracle.adjust_brightness,
        'adjust_contrast': oracle.adjust_contrast, 'adjust_saturation': oracle.adjust_saturation,
        'adjust_hue': oracle.adjust_hue}


@pytest.mark.parametrize('aug, steps', [
    (Crop(1), dict(crop=[(0, 2), (0, 2)])),
    (Crop(4, 'reflect'), dict(crop=[(0, 8), (0, 8)])),
    (Affine(180, 0.25, 0.5, 40), dict(affine=[(-180, 180), (-7, 7), (-5.25, 5.25), (0.5, 1.5), (-40, 40)])),
    (Affine(degrees=10), dict(affine=[(-10, 10), (0, 0), (0, 0), (1, 1), (0, 0)])),
    *((Cutout(size), dict(cutout=[(0, 27), (0, 20)])) for size in (1, 7, 8, 70)),
    (ColorJitter(brightness=1.5), dict(adjust_brightness=[(0, 2.5)])),
    (ColorJitter(contrast=1.5), dict(adjust_contrast=[(0, 2.5)])),
    (ColorJitter(saturation=1.5), dict(adjust_saturation=[(0, 2.5)])),
    (ColorJitter(hue=0.5), dict(adjust_hue=[(-0.5, 0.5)])),
    (ColorJitter(0.4, 0.3, 0.2, 0.1), dict(adjust_brightness=[(0.6, 1.4)], adjust_contrast=[(0.7, 1.3)],
                                           adjust_saturation=[(0.8, 1.2)], adjust_hue=[(-0.1, 0.1)]))],
    ids=lambda value: '' if isinstance(value, dict) else str(value))
def test_each_image_draws_its_own_parameters_of_the_whole_range_and_equals_a_slow_loop(monkeypatch, aug, steps):
    calls, drawn = [], []

    def spied(name, function):
        signature = inspect.signature(function)

        def call(*arguments, **options):
            calls.append((name, list(signature.bind(*arguments, **options).arguments.values())[1:]))
            return function(*arguments, **options)
        return call
    for name in SLOW:
        monkeypatch.setattr(augment, name, spied(name, getattr(augment, name)))
    images = expected = random_images(400)
    augmented = aug(images, seeded())
    assert [name for name, _ in calls] == list(steps)
    for name, parameters in calls:
        rows = zip(expected, *(parameter.tolist() if isinstance(parameter, torch.Tensor) else
                               itertools.repeat(parameter, len(images)) for parameter in parameters), strict=True)
        expected = torch.stack([SLOW[name](*row) for row in rows])
        for parameter, (low, high) in zip(parameters, steps[name], strict=False):  # without sizes and modes
            assert_fills(parameter, low, high)
            drawn += [parameter.double()] if low < high else []
    assert_close(augmented, expected, atol=1e-5, rtol=0)
    assert (torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))).abs().max() < 0.25  # five standard errors


def assert_fills(values, low, high):
    """Different, inside [low, high], near both ends, and centred."""
    margin = 0.05 * (high - low)
    assert low - 1e-6 <= values.min() <= low + margin and high - margin <= values.max() <= high + 1e-6
    assert abs(values.double().mean() - (low + high) / 2) <= 1.5 * margin
    assert not values.is_floating_point() or low == high or len(values.unique()) > 0.9 * len(values)


@pytest.mark.parametrize('p', [0, 0.1, 0.5, 1])
@pytest.mark.parametrize('kind, change', [
    (Flip, oracle.horizontal_flip), (Greyscale, partial(oracle.rgb_to_grayscale, num_output_channels=3))])
def test_a_share_p_of_the_images_is_changed_as_by_torchvision(kind, change, p):
    images = torch.rand(10_000, 3, 3, 4, generator=seeded(1))
    augmented = kind(p)(images, seeded())
    changed = (augmented != images).flatten(1).any(1)
    assert abs(changed.float().mean() - p) <= 4 * (p * (1 - p) / 10_000) ** 0.5  # four standard errors
    assert_close(augmented[changed], change(images[changed]), atol=1e-6, rtol=0)


@each_augmentation
def test_a_batch_follows_from_its_images_and_the_generator_alone(aug):
    images, generator = random_images(), seeded(3)
    before, first = images.clone(), aug(images, generator)
    assert torch.equal(images, before)
    assert first.shape == images.shape and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1 + 1e-6
    wide = images.repeat_interleave(2, dim=3)
    for same_images in (images, images.to(memory_format=torch.channels_last), wide[:, :, :, ::2]):
        assert_close(aug(same_images, seeded(3)), first, atol=1e-6, rtol=0)
    assert not torch.equal(first, aug(images, generator)) and not torch.equal(first, aug(images, seeded(4)))
    assert aug(images[:1], generator).shape == images[:1].shape


@pytest.mark.parametrize('aug', [Crop(0), Crop(0, 'reflect'), Affine(), ColorJitter(), Cutout(0)], ids=str)
def test_zero_strength_changes_nothing(aug):
    images = random_images()
    assert_close(aug(images, seeded()), images, atol=1e-5, rtol=0)


@each_augmentation
def test_nothing_depends_on_values_and_nothing_is_made_on_another_device(aug):
    images = torch.empty(5, 3, 32, 32, device='meta')
    with OnMeta():  # as a CUDA graph demands
        assert aug(images, seeded()).shape == images.shape
