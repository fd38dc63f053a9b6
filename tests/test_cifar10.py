"""Loading, splitting and batches: nothing lost, nothing mixed up, nothing augmented that must not be."""
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms.functional import to_pil_image

from datasets import cifar10
from datasets.augment import Crop, Flip
from datasets.cifar10 import Batches, Split, load, split


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A small data set in the official layout, its checksums made known to torchvision. Pixels count upwards."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums = {}
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        content = {'data': rng.integers(0, 256, (20, 3072), dtype=np.uint8), 'labels': list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = calculate_md5(folder / name)
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class {i}' for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, 'train_list', [[f'data_batch_{i}', sums[f'data_batch_{i}']] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', sums['test_batch']]])
    monkeypatch.setattr(CIFAR10, 'meta', dict(filename='batches.meta', key='label_names',
                                              md5=calculate_md5(folder / 'batches.meta')))
    return tmp_path


def make_folder(root: Path, classes=('ant', 'bee'), train=6, test=3, size=(32, 32)) -> Path:
    """An image folder: every image one colour, red its class, green its number."""
    for part, count in (('train', train), ('test', test)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = torch.zeros(3, *size, dtype=torch.uint8)
                image[0], image[1] = 100 * label, 10 * i
                to_pil_image(image).save(root / part / name / f'{i:04}.png')
    return root


# --- sources ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('data', ['auto', 'cifar10'])
def test_official_data_keeps_its_order_and_is_split_from_the_end(official, data):
    result = load(data, official, num_training=30, num_validation=10)
    oracle = CIFAR10(official, train=True)
    assert (result.name, result.source, len(result.classes)) == ('cifar10', 'CIFAR-10', 10)
    assert np.array_equal(result.train.images.permute(0, 2, 3, 1), oracle.data[:30])
    assert np.array_equal(result.val.images.permute(0, 2, 3, 1), oracle.data[-10:])
    assert result.val.labels.tolist() == oracle.targets[-10:]
    assert len(result.test) == 20


def test_auto_takes_the_shapes_when_there_is_no_data_and_no_network(tmp_path, no_network):
    result = load('auto', tmp_path, 49000, 1000)
    assert (result.name, len(result.train), len(result.val), len(result.test)) == ('shapes', 1600, 400, 1000)
    assert 'NOT CIFAR-10' in result.notes[0] and 'get_datasets.sh' in result.notes[0]


def test_cifar10_without_network_is_an_error_that_says_what_to_do(tmp_path, no_network):
    with pytest.raises(ValueError, match='get_datasets.sh'):
        load('cifar10', tmp_path, 49000, 1000)


@pytest.mark.parametrize('data', ['auto', 'cifar10'])
def test_damaged_data_is_an_error_and_never_replaced_by_shapes(official, no_network, data):
    path = official / CIFAR10.base_folder / 'data_batch_3'
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='damaged.*get_datasets.sh'):
        load(data, official, 49000, 1000)


def test_the_network_gets_a_timeout_only_while_downloading(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(CIFAR10, 'download', lambda self: seen.append(socket.getdefaulttimeout()))
    load('auto', tmp_path, 100, 100)
    assert seen == [cifar10.SECONDS_TO_ANSWER] and socket.getdefaulttimeout() is None


def test_folder_images_keep_their_labels_and_are_shuffled_once(tmp_path):
    root = make_folder(tmp_path, train=20)
    first, second = load(str(root), tmp_path, 1000, 8), load(str(root), tmp_path, 1000, 8)
    assert first.classes == ('ant', 'bee') and first.source == root.name and first.name == str(root.resolve())
    for part in (first.train, first.val, first.test):
        assert torch.equal(part.images[:, 0, 0, 0], (100 * part.labels).to(torch.uint8))
    assert torch.equal(first.train.images, second.train.images)
    assert len(set(first.val.labels.tolist())) == 2  # the files are sorted by class, the images no more
    seen = torch.cat([first.train.images, first.val.images])[:, :2, 0, 0].tolist()
    assert sorted(seen) == [[red, 10 * i] for red in (0, 100) for i in range(20)]


def test_images_of_another_size_are_resized_and_it_is_said(tmp_path):
    result = load(str(make_folder(tmp_path, size=(40, 50))), tmp_path, 100, 2)
    assert result.train.images.shape[1:] == (3, 32, 32) and result.notes == ('18 of 18 images resized to 32x32',)
    assert torch.equal(result.test.images[:, 0, 5, 5], (100 * result.test.labels).to(torch.uint8))


def test_grey_png_and_jpeg_images_are_read_as_rgb(tmp_path):
    root = make_folder(tmp_path)
    grey = torch.full((1, 32, 32), 77, dtype=torch.uint8)
    to_pil_image(grey).save(root / 'test' / 'ant' / 'a.png')
    to_pil_image(grey).save(root / 'test' / 'ant' / 'b.JPG')
    result = load(str(root), tmp_path, 100, 2)
    assert (result.test.images == 77).flatten(1).all(1).sum() == 2


@pytest.mark.parametrize('spoil, message', [
    (lambda root: [p.unlink() for p in (root / 'train' / 'bee').iterdir()], 'bee holds no'),
    (lambda root: (root / 'test' / 'cow').mkdir() or make_folder(root / 'x'), 'cow holds no'),
    (lambda root: (root / 'train' / 'bee').rename(root / 'train' / 'wasp'), 'bee, wasp'),
    (lambda root: (root / 'test').rename(root / 'tests'), 'no folder'),
    (lambda root: (root / 'train' / 'ant' / '0001.png').write_bytes(b'\x89PNG'), '0001.png cannot be read'),
], ids=['empty class', 'empty extra class', 'other classes', 'no test', 'unreadable'])
def test_a_folder_that_does_not_fit_is_explained(tmp_path, spoil, message):
    root = make_folder(tmp_path / 'images')
    spoil(root)
    with pytest.raises(ValueError, match=message):
        load(str(root), tmp_path, 100, 2)


def test_a_folder_needs_two_classes_and_five_training_images(tmp_path):
    with pytest.raises(ValueError, match='two classes'):
        load(str(make_folder(tmp_path / 'a', classes=('ant',))), tmp_path, 100, 2)
    with pytest.raises(ValueError, match='at least 5'):
        load(str(make_folder(tmp_path / 'b', train=2)), tmp_path, 100, 2)


@pytest.mark.parametrize('data', ['nowhere', ''])
def test_a_path_that_is_no_folder_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='data must be|no folder'):
        load(data, tmp_path, 100, 2)


# --- splitting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pool, training, validation, expected', [
    (50000, 49000, 1000, (49000, 1000)), (50000, 100, 1000, (100, 1000)), (2000, 49000, 1000, (1600, 400)),
    (50, 100, 5, (45, 5)), (5, 5, 5, (4, 1))])
def test_split_takes_validation_from_the_end_and_never_more_than_a_fifth(pool, training, validation, expected):
    numbers = torch.arange(pool)
    train, val = split(Split(numbers, numbers), training, validation)
    assert (len(train), len(val)) == expected
    assert torch.equal(train.labels, numbers[:expected[0]]) and torch.equal(val.labels, numbers[pool - expected[1]:])


# --- batches ------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered():
    """50 images; each pixel of image i is i, and so is its label."""
    numbers = torch.arange(50)
    return Split(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous(), numbers)


def test_evaluation_sees_every_image_once_and_in_order(numbered):
    batches = list(Batches(numbered, 20))
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    assert torch.equal(torch.cat([labels for _, labels in batches]), numbered.labels)


def test_training_drops_an_incomplete_last_batch_unless_it_is_the_only_one(numbered):
    def sizes(batches):
        return [len(index) for index in batches.shuffled()]
    assert sizes(Batches(numbered, 20)) == [20, 20]
    assert sizes(Batches(numbered, 50)) == sizes(Batches(numbered, 80)) == [50]


def test_an_epoch_is_a_permutation_that_follows_from_the_generator(numbered):
    def epoch(seed):
        return torch.cat(list(Batches(numbered, 10).shuffled(torch.Generator().manual_seed(seed))))
    assert torch.equal(epoch(0).sort().values, torch.arange(50))
    assert torch.equal(epoch(0), epoch(0)) and not torch.equal(epoch(0), epoch(1))


def test_labels_stay_with_their_images_and_pixels_are_normalised(numbered):
    batches = Batches(numbered, 10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2), augmentations=[Flip(0.5)])
    for index in batches.shuffled():
        images, labels = batches.batch(index)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.4), (0.3, 0.2))):
            torch.testing.assert_close(images[:, channel, 3, 4], (labels / 255 - mean) / std)


def test_validation_images_are_never_augmented():
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    batches = Batches(Split(images, torch.zeros(30, dtype=torch.long)), 10, augmentations=[Flip(1.0), Crop(8)])
    seen = torch.cat([inputs for inputs, _ in batches])
    torch.testing.assert_close(seen, (images / 255 - 0.5) / 0.5)
    assert not torch.equal(batches.batch(torch.arange(10))[0], seen[:10])  # training images are


def test_augmentation_draws_anew_for_each_image_and_each_step(numbered):
    images = torch.rand(1, 3, 32, 32).mul(255).to(torch.uint8).expand(40, -1, -1, -1)
    batches = Batches(Split(images, torch.zeros(40, dtype=torch.long)), 40, augmentations=[Crop(4)])
    first, second = (batches.batch(torch.arange(40))[0] for _ in range(2))
    assert len(first.unique(dim=0)) > 20 and not torch.equal(first, second)
