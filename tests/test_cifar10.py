"""Loading and splitting: the right images in the right order, and no doubt about which they are."""
import os
import pickle
import socket
import subprocess
import sys
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from test_folder import make_folder
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from datasets import cifar10, shapes
from datasets.batches import Split
from datasets.cifar10 import content_of, load, split


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A small data set in the official layout, its checksums made known to torchvision."""
    rng = np.random.default_rng(0)
    files = {name: {'data': rng.integers(0, 256, (n, 3072), dtype=np.uint8), 'labels': rng.integers(0, 10, n).tolist()}
             for name, n in (('data_batch_1', 60), ('data_batch_2', 40), ('test_batch', 20))}
    files['batches.meta'] = {'label_names': [f'class {i}' for i in range(10)]}
    (tmp_path / CIFAR10.base_folder).mkdir()
    for name, content in files.items():
        (tmp_path / CIFAR10.base_folder / name).write_bytes(pickle.dumps(content))
    *train, test, meta = [[name, calculate_md5(tmp_path / CIFAR10.base_folder / name)] for name in files]
    monkeypatch.setattr(CIFAR10, 'train_list', train)
    monkeypatch.setattr(CIFAR10, 'test_list', [test])
    monkeypatch.setattr(CIFAR10, 'meta', dict(filename=meta[0], key='label_names', md5=meta[1]))
    return tmp_path


@pytest.fixture
def few_shapes(monkeypatch):
    """A fiftieth of the images, which are drawn in no time."""
    make_shapes = shapes.make_shapes
    monkeypatch.setattr(shapes, 'make_shapes', lambda n, seed: make_shapes(n // 50, seed))


@pytest.mark.parametrize('data', ['auto', 'cifar10'])
def test_official_data_keeps_its_order_and_is_split_from_the_end(official, data):
    result = load(data, official, num_training=30, num_validation=10)
    assert (result.source, result.banner) == ('CIFAR-10', '')
    assert result.classes == tuple(f'class {i}' for i in range(10))
    oracle, of_test = CIFAR10(official, train=True), CIFAR10(official, train=False)
    for part, data, targets in ((result.train, oracle.data[:30], oracle.targets[:30]),
                                (result.val, oracle.data[-10:], oracle.targets[-10:]),
                                (result.test, of_test.data, of_test.targets)):
        assert np.array_equal(part.images.permute(0, 2, 3, 1), data) and part.labels.tolist() == targets
    moved = result.to(torch.device('meta'))
    assert {tensor.device.type for part in (moved.train, moved.val, moved.test)
            for tensor in (part.images, part.labels)} == {'meta'}


def test_auto_takes_the_shapes_when_there_is_no_data_and_no_network_and_says_so(tmp_path, monkeypatch, few_shapes):
    seen, errors = [], [RuntimeError('corrupted'), IncompleteRead(b'')]

    def break_off(self):
        seen.append(socket.getdefaulttimeout())
        with pytest.raises(Timeout):  # another process waits, and finds it downloaded
            FileLock(tmp_path / 'cifar-10-download.lock').acquire(timeout=0)
        raise errors[len(seen) - 1]
    monkeypatch.setattr(CIFAR10, 'download', break_off)
    socket.setdefaulttimeout(60)
    try:
        for _ in errors:
            result = load('auto', tmp_path, 49000, 1000)
            assert result.banner.startswith('NOT CIFAR-10') and 'get_datasets.sh' in result.banner
        assert seen == [cifar10.SECONDS_TO_ANSWER] * 2 and socket.getdefaulttimeout() == 60
    finally:
        socket.setdefaulttimeout(None)
    assert (len(result.train), len(result.val), len(result.test)) == (32, 8, 20)
    assert result.source == 'built-in shapes (not CIFAR-10)' and result.classes == shapes.CLASSES
    assert len(torch.cat([part.images for part in (result.train, result.val, result.test)]).unique(dim=0)) == 60
    assert load('shapes', None, 49000, 1000).banner == ''  # that was asked for


def test_cifar10_that_is_missing_or_damaged_is_an_error_that_says_what_helps(official, no_network, monkeypatch):
    (official / 'empty').mkdir()
    with pytest.raises(ValueError, match='CIFAR-10 is not in .* run datasets/get_datasets.sh .* and set data_root to '
                                         f'{cifar10.HERE}, where'):
        load('cifar10', official / 'empty', 49000, 1000)
    path = official / CIFAR10.base_folder / 'data_batch_2'
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    monkeypatch.setattr(cifar10, 'HERE', official)
    for data in ('cifar10', 'auto'):  # never replaced by shapes
        with pytest.raises(ValueError, match=r'CIFAR-10 is damaged in .*: delete .*cifar-10-batches-py, then run '
                                             r'.*get_datasets.sh URL\)$'):
            load(data, official, 49000, 1000)


def test_a_folder_named_like_a_data_set_is_not_mistaken_for_it(tmp_path, no_network, monkeypatch, few_shapes):
    monkeypatch.chdir(tmp_path)
    for name in ('cifar10', 'shapes'):
        make_folder(tmp_path / name)
    with pytest.raises(ValueError, match='could not be downloaded.*for that, set data to ./cifar10$'):
        load('cifar10', tmp_path, 100, 100)
    assert load('./cifar10', tmp_path, 100, 100).classes == ('ant', 'bee')
    assert load('shapes', tmp_path, 100, 100).notes[0].endswith('set data to ./shapes')


def test_the_folder_of_cifar10_itself_belongs_elsewhere_and_that_is_said(official):
    itself = official / CIFAR10.base_folder
    for data, data_root in ((itself, official), (official, official), ('cifar10', itself), ('auto', itself)):
        with pytest.raises(ValueError, match=f"set data to 'cifar10' and data_root to {official}, "):
            load(str(data), data_root, 100, 100)


def test_an_image_folder_is_named_by_its_path_and_split(tmp_path, monkeypatch):
    make_folder(tmp_path / 'insects', train=25)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for data in ('insects', '~/insects', str(tmp_path / 'insects/train/..')):
        result = load(data, None, 1000, 10)
        assert result.source == 'insects'
    assert result.classes == ('ant', 'bee')
    assert (len(result.train), len(result.val), len(result.test)) == (40, 10, 6)
    for part in (result.train, result.val, result.test):
        assert torch.equal(part.images[:, 0, 0, 0].long(), 100 * part.labels)
    for data, words in (('nowhere', 'data must be .* no folder nowhere'), ('', 'no folder')):
        with pytest.raises(ValueError, match=words):
            load(data, tmp_path, 100, 2)


def numbered(labels) -> Split:
    """Each pixel of image i is i."""
    numbers = torch.arange(len(labels)).to(torch.uint8)
    return Split(numbers.view(-1, 1, 1, 1).expand(-1, 3, 32, 32), torch.tensor(labels))


@pytest.mark.parametrize('labels, training, validation, note', [
    ([0, 1, 2] * 25, 60, 15, None),
    ([0, 1, 2] * 25, 40, 15, '55 of 75 training images are used (num_training = 40, num_validation = 15)'),
    ([2] + [0, 1] * 37, 60, 15, 'few validation images of cow (0): raise num_validation or add images'),
    ([1, 0, 2] * 25, 62, 13, 'few validation images of ant (4), bee (4): raise num_validation or add images'),
    ([0, 1] * 30 + [0, 1, 2] * 5, 60, 15, 'no training images of cow (0): raise num_training or add images')])
def test_what_the_split_leaves_out_is_said(tmp_path, monkeypatch, labels, training, validation, note):
    monkeypatch.setattr(cifar10, 'load_folder',
                        lambda root: (('ant', 'bee', 'cow'), numbered(labels), numbered([0, 1, 2]), ['of the folder']))
    assert load(str(tmp_path), None, training, validation).notes == ('of the folder', *([note] if note else []))


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


@pytest.mark.parametrize('pool, training, validation, expected', [
    (50000, 49000, 1000, (49000, 1000)), (50000, 100, 1000, (100, 1000)), (2000, 49000, 1000, (1600, 400)),
    (50, 100, 5, (45, 5)), (5, 5, 5, (4, 1))])
def test_split_takes_validation_from_the_end_and_never_more_than_a_fifth(pool, training, validation, expected):
    numbers = torch.arange(pool)
    train, val = split(Split(numbers, numbers), training, validation)
    assert torch.equal(train.labels, numbers[:expected[0]]) and torch.equal(val.labels, numbers[pool - expected[1]:])
    with pytest.raises(ValueError, match='at least 5 training images are needed, .*; there are 4$'):
        split(Split(numbers[:4], numbers[:4]), training, validation)


def test_our_package_comes_before_an_installed_one_of_the_same_name(tmp_path):
    (tmp_path / 'datasets').mkdir()
    (tmp_path / 'datasets/__init__.py').touch()
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, '-c', 'import datasets; print(datasets.__file__)'], cwd=root, text=True,
                           capture_output=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)}, check=True).stdout
    assert Path(found.strip()) == root / 'datasets/__init__.py'
