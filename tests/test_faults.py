"""Faults injected into whole experiments: interruptions, full disks, damaged files, divergence, senseless constants.

What is asked every time: one message and no traceback, nothing lost that existed, and the same command, started again
when the fault is gone, ends like a run that never met it.
"""
import io
import itertools
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny import TINY, TINY_NET, assert_same_outcome, contents, outcome
from torchvision.datasets import CIFAR10

import ex3_convnet
import ex3_pretrained
import experiment
import models.vgg
import training
import utils
from datasets import cifar10, shapes

RUN = Path('ex3_convnet/Q1/ConvNet/seed0')


@pytest.fixture(scope='module', autouse=True)
def cheap():
    """Few images, drawn once, pictures that are not drawn, no waiting for the disk: hundreds run here."""
    few = {seed: shapes.make_shapes(n, seed) for seed, n in ((0, 300), (1, 60))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, 'make_shapes', lambda _n, seed: few[seed])
        patch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))
        patch.setattr(os, 'fsync', lambda _file: None)
        yield


def convnet(results: Path, *options: object) -> int:
    return ex3_convnet.main([*TINY, *TINY_NET, '--results', str(results), *map(str, options)])


@pytest.fixture(scope='module')
def whole(tmp_path_factory, cheap):
    """The results of an experiment that met no fault."""
    folder = tmp_path_factory.mktemp('whole')
    assert convnet(folder) == 0
    return folder


@pytest.fixture(scope='module')
def unfinished(tmp_path_factory, cheap):
    """The results of an experiment that was interrupted in its third epoch."""
    folder = tmp_path_factory.mktemp('unfinished')
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, training.TrainingStep, '__call__', 25, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert convnet(folder) == 130
    return folder


def at_call(patch, owner, name, number, action):
    """Let call `number` (1, 2, ...) of a function begin with something else."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)
    patch.setattr(owner, name, call)


def assert_refused(status, capsys, *words):
    """Status 2 and one line that says what is wrong."""
    errors = capsys.readouterr().err
    assert status == 2
    assert errors.count('\n') == 1 and ': error: ' in errors
    assert [word for word in words if str(word) not in errors] == [], errors


# --- Ctrl-C, SIGTERM, two processes -------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['Ctrl-C', 'SIGTERM'])
@pytest.mark.parametrize('owner, name, call, epochs', [
    (cifar10, 'split', 1, 0), (training.TrainingStep, '__call__', 5, 0), (training.TrainingStep, '__call__', 15, 1),
    (training, 'evaluate', 3, 2), (training, 'save_tensors', 2, 3), (experiment, 'evaluate', 1, 3),
    (experiment, 'plot_curves', 1, 3),
], ids=['reading data', 'first epoch', 'second epoch', 'validating', 'writing a checkpoint', 'testing', 'plotting'])
def test_an_interrupted_run_keeps_its_whole_epochs_and_continues(tmp_path, whole, monkeypatch, capsys, number, owner,
                                                                 name, call, epochs):
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, lambda: os.kill(os.getpid(), number))
        assert convnet(tmp_path) == 128 + number
    assert capsys.readouterr().err == '\nInterrupted. Nothing finished is lost: the same command continues.\n'
    left = {path.name for path in (tmp_path / RUN).glob('*')}
    if epochs:
        assert {'history.csv', 'curves.png', 'best.pt'} < left and left & {'checkpoint.pt', 'result.json'}
        assert len(training.History.read(tmp_path / RUN / 'history.csv').epochs) == epochs  # none of the one under way
    else:
        assert left <= {'config.json'}
    assert convnet(tmp_path) == 0
    assert capsys.readouterr().out.count('images/s') == 3 - epochs  # a line an epoch: none is trained twice
    assert_same_outcome(tmp_path, whole)


def test_a_second_ctrl_c_does_not_break_the_writing_that_the_first_one_causes(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, training.TrainingStep, '__call__', 15, lambda: os.kill(os.getpid(), signal.SIGINT))
        at_call(patch, training, 'save_tensors', 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert convnet(tmp_path) == 130
    assert (tmp_path / RUN / 'checkpoint.pt').exists()
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_a_second_process_is_refused_and_sigterm_ends_the_first_with_143(tmp_path, capsys):
    options = [*TINY, *TINY_NET, '--num-epochs', '100000', '--results', str(tmp_path)]
    with subprocess.Popen([sys.executable, ex3_convnet.__file__, *options], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as first:
        try:
            assert any('epoch   3/' in line for line in first.stdout)
            assert_refused(ex3_convnet.main(options), capsys, 'another process', '--results')
            first.terminate()
            _, errors = first.communicate(timeout=60)
        finally:
            first.kill()
    assert first.returncode == 143
    assert errors == '\nInterrupted. Nothing finished is lost: the same command continues.\n'
    assert (tmp_path / RUN / 'checkpoint.pt').exists() and (tmp_path / RUN / 'best.pt').exists()


# --- no room, no permission ---------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
@pytest.mark.parametrize('name, epochs', [
    ('seed0/history.csv', 2), ('seed0/curves.png', 2), ('seed0/best.pt', 2), ('seed0/checkpoint.pt', 2),
    ('seed0/last.pt', 3), ('seed0/result.json', 3), ('Q1/summary.csv', None), ('Q1/summary.md', None),
    ('Q1/curves.png', None), ('Q1/filters.png', None)])
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_continues_when_there_is_room(
        tmp_path, whole, monkeypatch, capsys, name, epochs):
    def open_on_a_full_disk(path, mode):
        return open('/dev/full' if str(path).endswith(f'{name}.tmp') else path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(training, 'SECONDS_BETWEEN_CHECKPOINTS', 0)
        at_call(patch, training, '_report', 3, lambda: patch.setattr(utils, 'open', open_on_a_full_disk, raising=False))
        assert_refused(convnet(tmp_path), capsys, 'No space left', name, 'the same command continues')
    assert not list(tmp_path.rglob('*.tmp'))
    if epochs:
        checkpoint = torch.load(tmp_path / RUN / 'checkpoint.pt', weights_only=True)
        assert len(checkpoint['epochs']) == epochs
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_a_limit_on_the_size_of_files_is_one_message_and_raising_it_is_enough(tmp_path, whole, capsys):
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # best.pt fits, checkpoint.pt does not
    try:
        status = convnet(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(status, capsys, 'File too large', 'checkpoint.pt')
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


@pytest.mark.parametrize('blocked', [Path('.'), *list(RUN.parents)[::-1][1:], RUN], ids=str)
def test_a_file_where_a_folder_should_be_is_named_and_stays(tmp_path, whole, capsys, blocked):
    path = tmp_path / 'results' / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('precious')
    assert_refused(convnet(tmp_path / 'results'), capsys, path, '--results')
    assert path.read_text() == 'precious'
    path.unlink()
    assert convnet(tmp_path / 'results') == 0
    assert_same_outcome(tmp_path / 'results', whole)


def test_a_folder_that_disappears_while_training_is_named(tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_call(patch, training, '_report', 2, lambda: shutil.rmtree(tmp_path / RUN))
        assert_refused(convnet(tmp_path), capsys, tmp_path / RUN)
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_too_little_memory_is_one_message_and_the_run_continues_with_more(tmp_path, whole, monkeypatch, capsys):
    def allocate():
        torch.empty(2 ** 60)
    with monkeypatch.context() as patch:
        at_call(patch, training.TrainingStep, '__call__', 15, allocate)
        assert_refused(convnet(tmp_path), capsys, 'out of memory', 'batch_size')
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


# --- damaged and malicious files ----------------------------------------------------------------------------


class Malicious:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def rewrite(change):
    """-> a damage to a file: a change of its bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flip_bit(content: bytes, bit: int) -> bytes:
    return content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:]


DAMAGES = {
    'empty': rewrite(lambda content: b''),
    'half': rewrite(lambda content: content[:len(content) // 2]),
    'without its end': rewrite(lambda content: content[:-30]),
    'garbage': rewrite(lambda content: random.Random(0).randbytes(3000)),
    'a web page': rewrite(lambda content: b'<html>404 not found</html>'),
    'a folder': lambda path: path.unlink() or path.mkdir(),
}
TENSOR_DAMAGES = DAMAGES | {
    'no state dict': lambda path: torch.save([1, 2], path),
    'another network': lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    'malicious': lambda path: torch.save({'model': Malicious(path.with_name('executed'))}, path),
    'malicious, old format': lambda path: torch.save({'model': Malicious(path.with_name('executed'))}, path,
                                                     _use_new_zipfile_serialization=False),
    'malicious pickle': lambda path: path.write_bytes(pickle.dumps(Malicious(path.with_name('executed')), protocol=2)),
}


@pytest.mark.parametrize('damage', TENSOR_DAMAGES.values(), ids=TENSOR_DAMAGES)
def test_a_damaged_checkpoint_is_named_and_nothing_else_is_lost(tmp_path, unfinished, whole, capsys, damage):
    results = shutil.copytree(unfinished, tmp_path / 'results')
    damage(results / RUN / 'checkpoint.pt')
    before = contents(results)
    assert_refused(convnet(results), capsys, results / RUN / 'checkpoint.pt', f'delete {results / RUN} to train')
    assert contents(results) == before  # and nothing was executed
    shutil.rmtree(results / RUN)
    assert convnet(results) == 0
    assert_same_outcome(results, whole)


@pytest.mark.parametrize('name, damage', [
    *itertools.product(['config.json', 'history.csv', 'result.json'], DAMAGES),
    *itertools.product(['best.pt'], TENSOR_DAMAGES), ('best.pt', 'missing'), ('history.csv', 'missing'),
    ('result.json', 'another type')])
def test_a_damaged_file_of_a_finished_run_is_named_and_nothing_else_is_lost(tmp_path, whole, capsys, name, damage):
    results = shutil.copytree(whole, tmp_path / 'results')
    another_type = rewrite(lambda content: content.replace(b'"finished"', b'5'))
    (TENSOR_DAMAGES | {'missing': Path.unlink, 'another type': another_type})[damage](results / RUN / name)
    before = contents(results)
    assert_refused(convnet(results), capsys, results / RUN, name, f'delete {results / RUN} to train')
    assert contents(results) == before


def test_a_copy_of_a_runs_folder_beside_it_is_left_alone(tmp_path, whole):
    results = shutil.copytree(whole, tmp_path / 'results')
    shutil.copytree(results / RUN, (results / RUN).with_name('seed0 copy'))
    assert convnet(results) == 0
    shutil.rmtree((results / RUN).with_name('seed0 copy'))
    assert_same_outcome(results, whole)


@pytest.mark.parametrize('kind', ['malicious', 'malicious, old format', 'malicious pickle'])
def test_the_malicious_files_would_execute_if_they_were_loaded_without_care(tmp_path, kind):
    TENSOR_DAMAGES[kind](tmp_path / 'file.pt')
    with suppress(RuntimeError):  # what it executed first is none of torch's files
        torch.load(tmp_path / 'file.pt', weights_only=False)
    assert (tmp_path / 'executed').exists()


def test_no_flipped_bit_in_a_checkpoint_goes_unnoticed(tmp_path, unfinished):
    content = (unfinished / RUN / 'checkpoint.pt').read_bytes()
    path, rng = tmp_path / 'checkpoint.pt', random.Random(0)
    noticed = 0
    for _ in range(200):
        path.write_bytes(flip_bit(content, rng.randrange(8 * len(content))))
        try:
            with training.reading(path):
                state = training.load_tensors(path)
            torch.save(state, copy := io.BytesIO())
            assert copy.getvalue() == content  # it was a bit without a meaning, between the tensors
        except ValueError:
            noticed += 1
    assert noticed > 100


@pytest.mark.parametrize('name', ['history.csv', 'result.json'])
def test_no_flipped_bit_in_a_text_file_ends_in_a_traceback(tmp_path, whole, name):
    results, rng = shutil.copytree(whole, tmp_path / 'results'), random.Random(0)
    content = (results / RUN / name).read_bytes()
    statuses = []
    for _ in range(25):
        (results / RUN / name).write_bytes(flip_bit(content, rng.randrange(8 * len(content))))
        statuses.append(convnet(results))
    assert {2} <= set(statuses) <= {0, 1, 2}  # 0: another digit; 1: 'finished' misspelt


# --- damaged data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('data', ['auto', 'cifar10'])
@pytest.mark.parametrize('damage', ['empty', 'garbage', 'malicious pickle'])
def test_damaged_cifar10_is_named_with_the_remedy_and_never_executed(tmp_path, no_network, capsys, data, damage):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta']:
        (folder / name).touch()
        TENSOR_DAMAGES[damage](folder / name)
    before = contents(folder)
    status = convnet(tmp_path / 'results', '--data', data, '--data-root', tmp_path)
    assert_refused(status, capsys, 'damaged', tmp_path, 'datasets/get_datasets.sh')
    assert contents(folder) == before and not (tmp_path / 'results').exists()


def make_images(root: Path) -> Path:
    """An image folder of two classes: six training images and two test images each, as JPEG."""
    rng = np.random.default_rng(0)
    for name in ('train/ant', 'train/bee', 'test/ant', 'test/bee'):
        (root / name).mkdir(parents=True)
        for i in range(6 if 'train' in name else 2):
            Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(root / name / f'{i}.jpg')
    return root


def test_an_image_folder_trains(tmp_path, capsys):
    assert convnet(tmp_path / 'results', '--data', make_images(tmp_path / 'images')) == 0
    assert '2 classes; 10 training, 2 validation and 4 test images' in capsys.readouterr().out


@pytest.mark.parametrize('damage, words', [
    (lambda root: DAMAGES['half'](root / 'train/bee/3.jpg'), ['train/bee/3.jpg', 'replace or delete it']),
    (lambda root: DAMAGES['without its end'](root / 'test/ant/1.jpg'), ['test/ant/1.jpg', 'replace or delete it']),
    (lambda root: DAMAGES['a web page'](root / 'test/ant/1.jpg'), ['test/ant/1.jpg', 'replace or delete it']),
    (lambda root: DAMAGES['a folder'](root / 'test/ant/1.jpg'), ['test/ant/1.jpg', 'replace or delete it']),
    (lambda root: (root / 'train/cow').mkdir(), ['train/cow', 'no png or jpg']),
    (lambda root: [shutil.rmtree(root / part / 'bee') for part in ('train', 'test')], ['two classes', 'ant']),
    (lambda root: (root / 'test/bee').rename(root / 'test/wasp'), ['same classes', 'bee, wasp']),
    (lambda root: shutil.rmtree(root / 'test'), ['no folder', 'test']),
    (lambda root: [path.unlink() for path in root.glob('train/*/[2-5].jpg')], ['at least 5', 'there are 4']),
], ids=['truncated', 'truncated at the end', 'no image', 'a folder', 'empty class', 'one class', 'other classes',
        'no test images', 'four images'])
def test_a_damaged_image_folder_is_explained(tmp_path, capsys, damage, words):
    root = make_images(tmp_path / 'images')
    damage(root)
    assert_refused(convnet(tmp_path / 'results', '--data', root), capsys, *words)


@pytest.mark.parametrize('encode', [
    lambda grey: grey.convert('RGB'), lambda grey: grey.convert('RGBA'), lambda grey: grey.convert('LA'),
    lambda grey: grey.convert('P'), lambda grey: Image.fromarray(np.array(grey, dtype=np.uint16) * 257),
], ids=['RGB', 'RGBA', 'grey with alpha', 'palette', '16 bits'])
def test_every_kind_of_png_gives_the_same_pixels(tmp_path, encode):
    pixels = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    encode(Image.fromarray(pixels)).save(tmp_path / 'image.png')
    images, resized = cifar10._read_images([tmp_path / 'image.png'], 'reading')
    assert resized == 0
    assert (images == torch.from_numpy(pixels)).all()


# --- damaged weights ----------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A VGG11 with few filters in place of the real one, and the path of weights for it."""
    monkeypatch.setattr(models.vgg, 'cfgs', {'A': [4, 'M', 4, 'M', 4, 4, 'M', 4, 4, 'M', 4, 512, 'M']})
    features = models.vgg.make_layers(models.vgg.cfgs['A'], batch_norm=True)
    torch.save(torch.nn.ModuleDict({'features': features}).state_dict(), tmp_path / 'weights.pt')
    return tmp_path / 'weights.pt'


def pretrained(results: Path, *options: object) -> int:
    return ex3_pretrained.main([*TINY, '--layer-config', '512', '4', '--results', str(results), *map(str, options)])


@pytest.mark.parametrize('damage', [*TENSOR_DAMAGES, 'one bit', 'missing'])
def test_damaged_weights_are_named_and_nothing_is_executed(tmp_path, weights, capsys, damage):
    one_bit = rewrite(lambda content: flip_bit(content, 4 * len(content)))
    (TENSOR_DAMAGES | {'one bit': one_bit, 'missing': Path.unlink})[damage](weights)
    assert_refused(pretrained(tmp_path / 'results', '--weights', weights), capsys, weights)
    assert not (tmp_path / 'executed').exists()
    assert not list((tmp_path / 'results').rglob('*.pt'))


# --- divergence ---------------------------------------------------------------------------------------------


def spoil_loss(patch, *steps, value=math.nan):
    """Let the loss of these training steps, counted from 1 over all runs, be `value`."""
    step, calls = training.TrainingStep.__call__, itertools.count(1)

    def call(self, index):
        loss, correct = step(self, index)
        return (loss * value if next(calls) in steps else loss), correct
    patch.setattr(training.TrainingStep, '__call__', call)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('name', ['Q2a', 'Q2b'])
def test_divergence_ends_its_run_and_the_others_go_on(tmp_path, monkeypatch, capsys, name, value):
    folder = tmp_path / 'ex3_convnet' / name
    with monkeypatch.context() as patch:
        spoil_loss(patch, 15, value=value)
        assert convnet(tmp_path, '--experiment', name, '--seeds', 0) == 1
    output = capsys.readouterr()
    for words in ('plain, seed 0: diverged in epoch 2, step 5', 'learning_rate (0.002)', 'reg', 'optimizer'):
        assert words in output.err
    assert '| plain (diverged in epoch 2)' in output.out
    assert (folder / 'plain/seed0/best.pt').exists() and not (folder / 'plain/seed0/last.pt').exists()
    assert len(training.History.read(folder / 'plain/seed0/history.csv').epochs) == 1
    plain, norm = experiment.read_summary(folder / 'summary.csv')
    assert (plain.status[:25], plain.epochs, plain.last_test_accuracy) == ('diverged in epoch 2, step', 1, None)
    assert plain.best_test_accuracy is not None
    assert (norm.status, norm.epochs) == ('finished', 3)
    before = outcome(tmp_path)
    assert convnet(tmp_path, '--experiment', name, '--seeds', 0) == 1  # again: the same, and nothing is trained
    again = capsys.readouterr()
    assert again.err == output.err and 'images/s' not in again.out
    assert outcome(tmp_path) == before


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name, steps', [  # ten steps an epoch
    ('Q1', [1]), ('Q1', [15]), ('Q1', [1, 11]), ('Q2b', [1, 11]), ('Q2b', [15, 21])])
def test_divergence_of_any_runs_in_any_epoch_leaves_a_whole_summary(tmp_path, monkeypatch, name, steps):
    spoil_loss(monkeypatch, *steps)
    assert convnet(tmp_path, '--experiment', name, '--seeds', *([0, 1] if name == 'Q1' else [0])) == 1
    results = experiment.read_summary(tmp_path / 'ex3_convnet' / name / 'summary.csv')
    assert len(results) == 2 and [result for result in results if result.status.startswith('diverged')]
    assert '(diverged in epoch ' in (tmp_path / 'ex3_convnet' / name / 'summary.md').read_text()


def test_a_learning_rate_that_is_much_too_high_diverges_and_is_named(tmp_path, capsys):
    assert convnet(tmp_path, '--optimizer', 'SGD', '--learning-rate', 100) == 1
    assert 'lower learning_rate (100)' in capsys.readouterr().err


# --- constants ----------------------------------------------------------------------------------------------

CHEAP = {'num_epochs': 2, 'num_training': 60}  # upper ends that run for seconds only
WORDS = {  # what is no number, or several -> right and wrong values
    'data': (['shapes'], ['nowhere', '/dev/null']), 'device': (['cpu'], ['tpu', 'meta', 'hpu', 'cuda:99', '']),
    'hidden_size': (['1', '2 3', '4 4 4 4 4'], ['', '0 4', '4 4 4 4 4 4', '5000', 'x']),
    'layer_config': (['512 1', '512 9'], ['512', '511 9', '512 0', '512 x', '512 9 9']),
    'mode': (['frozen', 'fine-tuned', 'scratch'], ['Frozen']), 'norm_layer': (['None', 'BN'], ['GN', '0']),
    'optimizer': (['Adam', 'SGD'], ['adam', '']), 'precision': (['fp32', 'bf16'], ['fp16', '32']),
    'schedule': (['decay', 'one-cycle'], ['cosine']),
    'seeds': (['0', '7 7', '2147483648'], ['', '-1', '1.5', '2147483649']),
}


def draw(rng: random.Random, script, constant: str, wrong: bool) -> str:
    """A value of a constant, right or wrong."""
    if constant in WORDS:
        return rng.choice(WORDS[constant][wrong])
    low, high = script.RANGES[constant]
    whole_number = 'int' in str(script.Config.__annotations__[constant])
    if wrong:
        return rng.choice([low - 1, 2 * high + 1, 'nan', 'inf', '-inf', 'x', '', low + 0.5 if whole_number else 'True'])
    high = CHEAP.get(constant, high)
    return rng.choice([low, high, rng.randint(low, high) if whole_number else rng.uniform(low, high)])


@pytest.mark.parametrize('script', [ex3_convnet, ex3_pretrained], ids=['convnet', 'pretrained'])
def test_constants_give_a_run_or_a_message_and_never_a_traceback(tmp_path, weights, capsys, script):
    rng = random.Random(0)
    constants = [field.name for field in fields(script.Config) if field.name in script.RANGES or field.name in WORDS]
    cheap = [*TINY, '--num-epochs', '1', *(TINY_NET if script is ex3_convnet else ['--weights', str(weights)])]
    for number in range(100):
        chosen = rng.sample(constants, rng.randint(1, 8))
        wrong = rng.choice(chosen) if rng.random() < 0.5 else None
        options = ['--experiment', 'best' if 'mode' in chosen else rng.choice(['best', *script.EXPERIMENTS][:2])]
        for constant in chosen:
            value = str(draw(rng, script, constant, constant == wrong))
            options += [f'--{constant.replace("_", "-")}', *value.split(' ')]
        try:
            status = script.main([*cheap, '--results', str(tmp_path / str(number)), *options])
        except SystemExit as stop:  # tyro's way to refuse what it cannot parse
            status = stop.code
        errors = capsys.readouterr().err
        assert status == 2 if wrong else status == 0 or status == 1 and 'diverged' in errors, (wrong, options, errors)
        assert status == 0 or errors.strip(), options


# --- repeating ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_results_whatever_ran_before_in_the_process(tmp_path, whole, weights):
    assert pretrained(tmp_path / 'other', '--weights', weights, '--experiment', 'Q4a') == 0
    assert convnet(tmp_path / 'other', '--seeds', 3, '--dropout', 0.5, '--flip', 0.5, '--precision', 'bf16') == 0
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert convnet(tmp_path / 'results') == 0
    assert_same_outcome(tmp_path / 'results', whole)
