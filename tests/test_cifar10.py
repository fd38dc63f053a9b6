"""Loading and splitting: the right images in the right order, and no doubt about which they are."""
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_folder import make_folder
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from datasets import cifar10
from datasets.batches import Split
from datasets.cifar10 import content_of, load, split


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


@pytest.mark.parametrize('data', ['auto', 'cifar10'])
def test_official_data_keeps_its_order_and_is_split_from_the_end(official, data):
    result = load(data, official, num_training=30, num_validation=10)
    oracle = CIFAR10(official, train=True)
    assert (result.name, result.source, len(result.classes)) == ('cifar10', 'CIFAR-10', 10)
    assert np.array_equal(result.train.images.permute(0, 2, 3, 1), oracle.data[:30])
    assert np.array_equal(result.val.images.permute(0, 2, 3, 1), oracle.data[-10:])
    assert result.val.labels.tolist() == oracle.targets[-10:]
    assert len(result.test) == 20


def test_auto_takes_the_shapes_when_there_is_no_data_and_no_network_and_says_so(tmp_path, no_network):
    result = load('auto', tmp_path, 49000, 1000)
    assert (result.name, len(result.train), len(result.val), len(result.test)) == ('shapes', 1600, 400, 1000)
    assert result.banner.startswith('NOT CIFAR-10') and 'get_datasets.sh' in result.banner and result.notes == ()
    assert load('shapes', None, 49000, 1000).banner == ''  # that was asked for


def test_cifar10_without_network_is_an_error_that_says_what_helps(tmp_path, no_network, monkeypatch):
    with pytest.raises(ValueError, match=f'run datasets/get_datasets.sh .* and set data_root to {cifar10.HERE}, where'):
        load('cifar10', tmp_path, 49000, 1000)
    monkeypatch.setattr(cifar10, 'HERE', tmp_path)
    with pytest.raises(ValueError, match=r'get_datasets.sh URL\)$'):
        load('cifar10', tmp_path, 49000, 1000)


def test_a_folder_named_like_a_data_set_is_not_mistaken_for_it(tmp_path, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('cifar10', 'shapes'):
        make_folder(tmp_path / name)
    with pytest.raises(ValueError, match='for that, set data to ./cifar10$'):
        load('cifar10', tmp_path, 100, 100)
    assert load('./cifar10', tmp_path, 100, 100).name == str(tmp_path / 'cifar10')
    assert any(note.endswith('set data to ./shapes') for note in load('shapes', tmp_path, 100, 100).notes)


def test_the_folder_of_cifar10_itself_belongs_elsewhere_and_that_is_said(official):
    itself = official / CIFAR10.base_folder
    for data, data_root in ((itself, official), (official, official), ('cifar10', itself), ('auto', itself)):
        with pytest.raises(ValueError, match=f"set data to 'cifar10' and data_root to {official}, "):
            load(str(data), data_root, 100, 100)


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


def test_an_image_folder_is_named_by_its_path_and_split(tmp_path):
    result = load(str(make_folder(tmp_path / 'insects', train=25)), None, 1000, 10)
    assert (result.name, result.source) == (str(tmp_path / 'insects'), 'insects') and result.classes == ('ant', 'bee')
    assert (len(result.train), len(result.val), len(result.test)) == (40, 10, 6)
    for part in (result.train, result.val, result.test):
        assert torch.equal(part.images[:, 0, 0, 0].long(), 100 * part.labels)


@pytest.mark.parametrize('data', ['nowhere', ''])
def test_a_path_that_is_no_image_folder_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='data must be|no folder'):
        load(data, tmp_path, 100, 2)


def numbered(labels) -> Split:
    """Each pixel of image i is i."""
    numbers = torch.arange(len(labels)).to(torch.uint8)
    return Split(numbers.view(-1, 1, 1, 1).expand(-1, 3, 32, 32), torch.tensor(labels))


@pytest.mark.parametrize('labels, training, validation, notes', [
    ([0, 1, 2] * 25, 60, 15, []),
    ([0, 1, 2] * 25, 40, 15, ['55 of 75 training images are used (num_training = 40, num_validation = 15)']),
    ([2] + [0, 1] * 37, 60, 15, ['few validation images of cow (0): raise num_validation or add images']),
    ([0, 1, 2] * 25, 66, 9, ['few validation images of ant (3), bee (3), cow (3): '
                             'raise num_validation or add images']),
    ([0, 1] * 30 + [0, 1, 2] * 5, 60, 15, ['no training images of cow (0): raise num_training or add images']),
], ids=['nothing', 'unused', 'no validation images', 'hardly any', 'no training images'])
def test_what_the_split_leaves_out_is_said(tmp_path, monkeypatch, labels, training, validation, notes):
    monkeypatch.setattr(cifar10, 'load_folder',
                        lambda root: (('ant', 'bee', 'cow'), numbered(labels), numbered([0, 1, 2]), ['of the folder']))
    assert load(str(tmp_path), None, training, validation).notes == ('of the folder', *notes)


def test_content_is_that_of_all_images_labels_and_names_and_of_nothing_else(tmp_path):
    pool, test, classes = numbered([0, 1] * 5), numbered([1, 0]), ('ant', 'bee')
    content = content_of(classes, pool, test)
    # Of b"('ant', 'bee')", b'(10, 3, 32, 32)', pixels, labels of 8 bytes ...: must stay, as results are found by it.
    assert content == '145d15a07cdc3d54757029908e470b349fbbaf538b82fdfa562fd8fee9bd6712'
    assert content == content_of(list(classes), Split(pool.images.contiguous(), pool.labels), test)
    brighter = Split(test.images.clone(), test.labels)
    brighter.images[1, 2, 31, 31] += 1
    others = [(classes, pool, brighter), (classes, pool, numbered([0, 1])), (('ant', 'wasp'), pool, test),
              (classes, test, pool), (classes, pool[:9], test), (('antbee', ''), pool, test)]
    assert len({content, *(content_of(*other) for other in others)}) == 1 + len(others)
    first, second = make_folder(tmp_path / '1', train=25), make_folder(tmp_path / '2', train=25)
    assert load(str(first), None, 40, 10).content == load(str(second), None, 20, 5).content


# --- splitting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pool, training, validation, expected', [
    (50000, 49000, 1000, (49000, 1000)), (50000, 100, 1000, (100, 1000)), (2000, 49000, 1000, (1600, 400)),
    (50, 100, 5, (45, 5)), (5, 5, 5, (4, 1))])
def test_split_takes_validation_from_the_end_and_never_more_than_a_fifth(pool, training, validation, expected):
    numbers = torch.arange(pool)
    train, val = split(Split(numbers, numbers), training, validation)
    assert (len(train), len(val)) == expected
    assert torch.equal(train.labels, numbers[:expected[0]]) and torch.equal(val.labels, numbers[pool - expected[1]:])


def test_fewer_than_five_training_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match='at least 5 training images are needed, .*; there are 4$'):
        load(str(make_folder(tmp_path, train=2)), tmp_path, 100, 2)


def test_our_package_comes_before_an_installed_one_of_the_same_name(tmp_path):
    (tmp_path / 'datasets').mkdir()
    (tmp_path / 'datasets/__init__.py').touch()
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, '-c', 'import datasets; print(datasets.__file__)'], cwd=root, text=True,
                           capture_output=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)}, check=True).stdout
    assert Path(found.strip()) == root / 'datasets/__init__.py'
