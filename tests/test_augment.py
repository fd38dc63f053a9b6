"""Each augmentation against torchvision's functional transform or a slow loop; what is random, and how."""
import itertools

import pytest
import torch
import torchvision.transforms.v2.functional as oracle
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from datasets import augment
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale

AUGMENTATIONS = [Flip(0.5), Crop(4), Crop(2, 'reflect'), Affine(20, 0.1, 0.2, 15), Cutout(8),
                 ColorJitter(0.4, 0.4, 0.4, 0.2), Greyscale(0.5)]
each_augmentation = pytest.mark.parametrize('aug', AUGMENTATIONS, ids=lambda aug: type(aug).__name__)
each_size = pytest.mark.parametrize('size', [(32, 32), (24, 24), (20, 28)], ids=str)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(batch=12, size=(32, 32)):
    """`batch` images of noise, whose lack of symmetry hides no mistake, then nine of the extreme colours."""
    noise = torch.rand(batch, 3, *size, generator=seeded(1))
    colours = torch.tensor([*itertools.product((0.0, 1.0), repeat=3), (0.5, 0.5, 0.5)])
    return torch.cat((noise, colours.view(-1, 3, 1, 1).expand(-1, -1, *size)))


def uniform(low, high, count, seed):
    return low + (high - low) * torch.rand(count, generator=seeded(seed))


def integers(low, high, count, seed):
    """From low to high, both included."""
    return torch.randint(low, high + 1, (count,), generator=seeded(seed))


def one_by_one(transform, images, *parameters):
    """The slow way: transform(image, its parameter, ...) for every image."""
    rows = zip(images, *(parameter.tolist() for parameter in parameters), strict=True)
    return torch.stack([transform(*row) for row in rows])


def spy(monkeypatch, *names):
    """Returns a list that fills with (name, args, kwargs) whenever one of these functions is called."""
    calls = []

    def spied(name, function):
        def call(images, *args, **kwargs):
            calls.append((name, args, kwargs))
            return function(images, *args, **kwargs)
        return call

    for name in names:
        monkeypatch.setattr(augment, name, spied(name, getattr(augment, name)))
    return calls


# ---- what is computed, given the parameters ----------------------------------------------------------------


@each_size
def test_affine_equals_torchvision_image_by_image(size):
    images = random_images(40, size)
    ranges = [(-180, 180), (-9, 9), (-9, 9), (0.5, 1.5), (-40, 40)]  # angle, translate x and y, scale, shear
    parameters = [uniform(low, high, len(images), seed) for seed, (low, high) in enumerate(ranges)]

    def slow(image, angle, translate_x, translate_y, scale, shear):
        # fill is left at None, which is black: fill=0 would multiply the blended border by its weight again
        return oracle.affine(image, angle, [translate_x, translate_y], scale, [shear, 0.0],
                             oracle.InterpolationMode.BILINEAR)

    expected = one_by_one(slow, images, *parameters)
    assert_close(augment.affine(images, *parameters), expected, atol=1e-5, rtol=0)


def test_affine_turns_clockwise_and_moves_right_and_down():
    images = random_images(2)[:2]
    zero, one = torch.zeros(2), torch.ones(2)
    turned = augment.affine(images, 90 * one, zero, zero, one, zero)
    assert_close(turned, images.rot90(-1, (2, 3)), atol=1e-5, rtol=0)
    moved = augment.affine(images, zero, 3 * one, 5 * one, one, zero)
    assert_close(moved[:, :, 5:, 3:], images[:, :, :-5, :-3], atol=1e-5, rtol=0)
    assert moved[:, :, :5].max() < 1e-5 and moved[:, :, :, :3].max() < 1e-5


@each_size
@pytest.mark.parametrize('padding', [1, 4])
@pytest.mark.parametrize('mode, oracles', [('zeros', 'constant'), ('reflect', 'reflect')])
def test_crop_equals_slicing_the_padded_image(size, padding, mode, oracles):
    images = random_images(30, size)
    x, y = (integers(0, 2 * padding, len(images), seed) for seed in (2, 3))

    def slow(image, x, y):
        padded = oracle.pad(image, [padding], fill=0, padding_mode=oracles)
        return padded[:, y:y + size[0], x:x + size[1]]

    assert torch.equal(augment.crop(images, x, y, padding, mode), one_by_one(slow, images, x, y))


def test_crop_pads_with_black_unless_told_otherwise_and_draws_the_same_for_both():
    images = random_images() + 1  # nothing in them is black
    black, reflected = Crop(4)(images, seeded()), Crop(4, 'reflect')(images, seeded())
    assert (black == 0).any() and not (reflected == 0).any()
    assert torch.equal(torch.where(black == 0, reflected, black), reflected)


@each_size
@pytest.mark.parametrize('erased', [1, 7, 8, 70])
def test_cutout_equals_erasing_a_clipped_square(size, erased):
    images = random_images(40, size)
    x, y = integers(0, size[1] - 1, len(images), 2), integers(0, size[0] - 1, len(images), 3)

    def slow(image, x, y):
        left, top = x - erased // 2, y - erased // 2
        image = image.clone()
        image[:, max(0, top):top + erased, max(0, left):left + erased] = 0.5
        return image

    assert torch.equal(augment.cutout(images, x, y, erased), one_by_one(slow, images, x, y))


@each_size
@pytest.mark.parametrize('name, low, high', [
    ('adjust_brightness', 0, 2.5), ('adjust_contrast', 0, 2.5), ('adjust_saturation', 0, 2.5),
    ('adjust_hue', -0.5, 0.5)])
def test_colour_adjustment_equals_torchvision_image_by_image(size, name, low, high):
    images = random_images(30, size)
    factor = uniform(low, high, len(images), 2)
    expected = one_by_one(getattr(oracle, name), images, factor)
    assert_close(getattr(augment, name)(images, factor), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('shift', [-0.5, -1 / 3, 0.0, 1 / 6, 0.5])
def test_hue_equals_torchvision_at_the_seams_of_the_colour_circle(shift):
    images = random_images(4)
    expected = oracle.adjust_hue(images, shift)
    assert_close(augment.adjust_hue(images, torch.full((len(images),), shift)), expected, atol=1e-5, rtol=0)


@each_size
def test_greyscale_equals_torchvision(size):
    images = random_images(size=size)
    assert_close(augment.greyscale(images), oracle.rgb_to_grayscale(images), atol=1e-6, rtol=0)
    assert_close(Greyscale(p=1)(images, seeded()), oracle.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


def test_color_jitter_equals_torchvision_in_its_fixed_order(monkeypatch):
    calls = spy(monkeypatch, 'adjust_brightness', 'adjust_contrast', 'adjust_saturation', 'adjust_hue')
    images = expected = random_images()
    jittered = ColorJitter(0.4, 0.4, 0.4, 0.2)(images, seeded())
    for name, (factor,), _ in calls:
        expected = one_by_one(getattr(oracle, name), expected, factor)
    assert [name for name, _, _ in calls] == ['adjust_brightness', 'adjust_contrast', 'adjust_saturation',
                                              'adjust_hue']
    assert_close(jittered, expected, atol=1e-5, rtol=0)


# ---- what is drawn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('aug, distinct', [
    (Flip(), 2), (Greyscale(0.5), 2), (Crop(4), 70), (Cutout(8), 170),
    (Affine(degrees=10), 200), (Affine(translate=0.1), 200), (Affine(scale=0.1), 200),
    (Affine(shear=10), 200), (ColorJitter(brightness=0.2), 200), (ColorJitter(contrast=0.2), 200),
    (ColorJitter(saturation=0.2), 200), (ColorJitter(hue=0.1), 200)], ids=str)
def test_every_image_draws_its_own_parameters(aug, distinct):
    copies = random_images(1)[:1].expand(200, -1, -1, -1)
    assert len({image.numpy().tobytes() for image in aug(copies, seeded())}) >= distinct


@pytest.mark.parametrize('p', [0.1, 0.5])
@pytest.mark.parametrize('kind', [Flip, Greyscale])
def test_chosen_share_of_images_is_p(kind, p):
    images = torch.rand(1, 3, 4, 4, generator=seeded()).expand(10_000, -1, -1, -1)
    changed = (kind(p)(images, seeded()) != images).flatten(1).any(1)
    assert abs(changed.float().mean() - p) < 4 * (p * (1 - p) / 10_000) ** 0.5  # four standard errors


def test_flip_with_p_1_mirrors_every_image():
    images = random_images()
    assert torch.equal(Flip(p=1)(images, seeded()), oracle.horizontal_flip(images))


def test_crop_offsets_are_uniform_over_their_whole_range(monkeypatch):
    calls = spy(monkeypatch, 'crop')
    Crop(padding=4)(torch.zeros(9 * 9 * 100, 3, 1, 1), seeded())
    _, (x, y, *_), _ = calls[0]
    counts = torch.bincount(9 * y + x, minlength=9 * 9)
    assert len(counts) == 9 * 9
    assert counts.min() > 50 and counts.max() < 150  # 100 each, standard deviation 10


def test_cutout_erases_at_most_its_square_and_less_at_the_edge():
    erased = Cutout(size=8)(torch.zeros(5_000, 3, 32, 32), seeded())[:, 0] == 0.5
    area, rows, columns = erased.sum((1, 2)), erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(area, rows * columns)  # a rectangle
    assert area.max() == 8 * 8 and rows.max() == columns.max() == 8
    assert area.min() == 4 * 4  # the centre in a corner
    at_edge = (erased[:, 0] | erased[:, -1]).any(1) | (erased[:, :, 0] | erased[:, :, -1]).any(1)
    assert (area[~at_edge] == 8 * 8).all() and area[at_edge].float().mean() < 8 * 8
    assert erased.any(0).all()  # no pixel is out of reach


def test_every_pixel_can_be_the_centre_of_a_cutout(monkeypatch):
    calls = spy(monkeypatch, 'cutout')
    Cutout(size=3)(torch.zeros(1_000, 3, 4, 6), seeded())
    _, (x, y, _), _ = calls[0]
    assert set(zip(x.tolist(), y.tolist(), strict=True)) == set(itertools.product(range(6), range(4)))


def test_affine_parameters_fill_their_ranges(monkeypatch):
    calls = spy(monkeypatch, 'affine')
    Affine(degrees=30, translate=0.25, scale=0.2, shear=10)(torch.zeros(2_000, 3, 4, 8), seeded())
    _, _, drawn = calls[0]
    assert_fills(drawn['angle'], -30, 30)
    assert_fills(drawn['translate_x'], -2, 2)  # a quarter of the width, 8
    assert_fills(drawn['translate_y'], -1, 1)  # a quarter of the height, 4
    assert_fills(drawn['scale'], 0.8, 1.2)
    assert_fills(drawn['shear'], -10, 10)


def test_color_jitter_factors_fill_their_ranges_and_stay_positive(monkeypatch):
    calls = spy(monkeypatch, 'adjust_brightness', 'adjust_contrast', 'adjust_saturation', 'adjust_hue')
    ColorJitter(brightness=0.4, contrast=1, saturation=1.5, hue=0.1)(torch.zeros(2_000, 3, 1, 1), seeded())
    ranges = [(0.6, 1.4), (0, 2), (0, 2.5), (-0.1, 0.1)]
    for (_, (factor,), _), (low, high) in zip(calls, ranges, strict=True):
        assert_fills(factor, low, high)


def assert_fills(values, low, high):
    """Inside [low, high], near both ends, and centred."""
    margin = 0.02 * (high - low)
    assert low - 1e-6 <= values.min() < low + margin
    assert high - margin < values.max() <= high + 1e-6
    assert abs(values.mean() - (low + high) / 2) < 1.5 * margin


# ---- what holds for all of them ----------------------------------------------------------------------------


@each_augmentation
def test_same_seed_gives_same_batch_and_another_seed_another(aug):
    images = random_images()
    first = aug(images, seeded(3))
    assert torch.equal(first, aug(images, seeded(3)))
    assert not torch.equal(first, aug(images, seeded(4)))


@each_augmentation
def test_successive_batches_are_augmented_differently(aug):
    images, generator = random_images(), seeded()
    assert not torch.equal(aug(images, generator), aug(images, generator))


@pytest.mark.parametrize('aug', [Flip(0), Crop(0), Crop(0, 'reflect'), Affine(), ColorJitter(), Greyscale(0),
                                 Cutout(0)], ids=str)
def test_zero_strength_changes_nothing(aug):
    images = random_images()
    assert_close(aug(images, seeded()), images, atol=1e-5, rtol=0)


@each_size
@each_augmentation
def test_shape_dtype_and_range_are_kept_and_the_input_is_not_modified(aug, size):
    images = random_images(size=size)
    before = images.clone()
    augmented = aug(images, seeded())
    assert augmented.shape == images.shape and augmented.dtype == torch.float32
    assert augmented.min() >= 0 and augmented.max() <= 1
    assert torch.equal(images, before)


@each_augmentation
def test_a_batch_of_one_image_works(aug):
    assert aug(random_images()[:1], seeded()).shape == (1, 3, 32, 32)


@each_augmentation
def test_memory_format_does_not_matter(aug):
    images = random_images()
    expected = aug(images, seeded())
    wide = images.repeat_interleave(2, dim=3)
    for same_images in (images.to(memory_format=torch.channels_last), wide[:, :, :, ::2]):
        assert_close(aug(same_images, seeded()), expected, atol=1e-6, rtol=0)


@each_augmentation
def test_nothing_depends_on_values_and_nothing_is_made_on_another_device(aug):
    """As a CUDA graph demands. Tensors on the device 'meta' have no values: to read one is an error."""
    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                assert tensor.device.type == 'meta', f'{function} made a tensor on {tensor.device}'
            return result

    images = torch.empty(5, 3, 32, 32, device='meta')
    with OneDevice():
        assert aug(images, seeded()).shape == images.shape


def test_repr_shows_the_strengths():
    assert [repr(aug) for aug in AUGMENTATIONS] == [
        'Flip(p=0.5)', "Crop(padding=4, mode='zeros')", "Crop(padding=2, mode='reflect')",
        'Affine(degrees=20, translate=0.1, scale=0.2, shear=15)',
        'Cutout(size=8)', 'ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)',
        'Greyscale(p=0.5)']
