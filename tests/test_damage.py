"""Damaged, foreign and malicious files, and constants that make no sense: one sentence, nothing lost or executed."""
import io
import itertools
import pickle
import random
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny import RUN, TINY, TINY_NET, assert_refused, assert_same_outcome, contents, convnet, make_images, pretrained
from torchvision.datasets import CIFAR10

import ex3_convnet
import ex3_pretrained
from lab import files
from lab.constants import RANGES

pytestmark = pytest.mark.usefixtures('cheap')


# --- damaged and malicious files -----------------------------------------------------------------------------


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
            with files.reading(path):
                state = files.load_tensors(path)
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


# --- damaged data --------------------------------------------------------------------------------------------


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


def test_an_image_folder_trains(tmp_path, capsys):
    assert convnet(tmp_path / 'results', '--data', make_images(tmp_path / 'images')) == 0
    assert '2 classes; 10 training, 2 validation and 4 test images' in capsys.readouterr().out


@pytest.mark.parametrize('damage, words', [
    (lambda root: DAMAGES['half'](root / 'train/bee/3.jpg'), ['train/bee/3.jpg', 'replace or delete it']),
    (lambda root: DAMAGES['without its end'](root / 'test/ant/1.jpg'), ['test/ant/1.jpg', 'replace or delete it']),
    (lambda root: DAMAGES['a web page'](root / 'test/ant/1.jpg'), ['test/ant/1.jpg', 'replace or delete it']),
    (lambda root: (root / 'train/cow').mkdir(), ['train/cow', 'no images']),
    (lambda root: [shutil.rmtree(root / part / 'bee') for part in ('train', 'test')], ['two classes', 'ant']),
    (lambda root: (root / 'test/bee').rename(root / 'test/wasp'), ['same classes', 'bee, wasp']),
    (lambda root: shutil.rmtree(root / 'test'), ['no folder', 'test']),
    (lambda root: [path.unlink() for path in root.glob('train/*/[2-5].jpg')], ['at least 5', 'there are 4']),
], ids=['truncated', 'truncated at the end', 'no image', 'empty class', 'one class', 'other classes',
        'no test images', 'four images'])
def test_a_damaged_image_folder_is_explained(tmp_path, capsys, damage, words):
    root = make_images(tmp_path / 'images')
    damage(root)
    assert_refused(convnet(tmp_path / 'results', '--data', root), capsys, *words)


# --- damaged weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('damage', [*TENSOR_DAMAGES, 'one bit', 'missing'])
def test_damaged_weights_are_named_and_nothing_is_executed(tmp_path, weights, capsys, damage):
    one_bit = rewrite(lambda content: flip_bit(content, 4 * len(content)))
    (TENSOR_DAMAGES | {'one bit': one_bit, 'missing': Path.unlink})[damage](weights)
    assert_refused(pretrained(tmp_path / 'results', '--weights', weights), capsys, weights)
    assert not (tmp_path / 'executed').exists()
    assert not list((tmp_path / 'results').rglob('*.pt'))


# --- constants -----------------------------------------------------------------------------------------------

CHEAP = {'num_epochs': 2, 'num_training': 60, 'num_classes': 1000}  # upper ends that run for moments only
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
    low, high = (RANGES | getattr(script, 'RANGES', {}))[constant]
    whole_number = 'int' in str(script.Config.__annotations__[constant])
    if wrong:
        return rng.choice([low - 1, 2 * high + 1, 'nan', 'inf', '-inf', 'x', '', low + 0.5 if whole_number else 'True'])
    high = CHEAP.get(constant, high)
    return rng.choice([low, high, rng.randint(low, high) if whole_number else rng.uniform(low, high)])


@pytest.mark.parametrize('script', [ex3_convnet, ex3_pretrained], ids=['convnet', 'pretrained'])
def test_constants_give_a_run_or_a_message_and_never_a_traceback(tmp_path, weights, capsys, script):
    rng = random.Random(0)
    constants = [field.name for field in fields(script.Config) if field.name in RANGES or field.name in WORDS]
    cheap = [*TINY, '--num-epochs', '1', *(TINY_NET if script is ex3_convnet else ['--weights', str(weights)])]
    for number in range(40):
        chosen = rng.sample(constants, rng.randint(1, 8))
        wrong = rng.choice(chosen) if rng.random() < 0.5 else None
        options = ['--experiment', 'best' if 'mode' in chosen else rng.choice(['best', *script.QUESTIONS][:2])]
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
