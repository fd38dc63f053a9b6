"""Folders and identity: what is continued, what is skipped, what is taken over, what begins a new folder."""
import json
import os
import shutil
from dataclasses import replace

import pytest
from tiny import RUN, convnet, make_images, results_of

import ex3_convnet
import training
from datasets import cifar10
from ex3_convnet import QUESTIONS, Config
from lab import experiment
from lab.constants import Question
from lab.identity import NOT_IDENTITY

pytestmark = pytest.mark.usefixtures('cheap')


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run('--experiment', 'Q2a', ...) -> what it printed; results go to tmp_path, and it must succeed."""
    monkeypatch.setattr(ex3_convnet, 'PICTURES', {})  # the curves are enough here
    monkeypatch.setitem(QUESTIONS, 'mine', Question('mine?', {'first': {}}))  # the run of Q1 under another name

    def run_main(*options):
        assert convnet(tmp_path, '--num-training', 60, '--num-validation', 20, '--num-epochs', 1, *options) == 0
        return capsys.readouterr().out
    return run_main


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'ex3_convnet'


# --- what is continued, what begins a new folder ------------------------------------------------------------


def test_a_run_prints_its_conditions_and_keeps_its_constants(run, folder):
    out = run('--experiment', 'Q2a', '--num-classes', 7)
    for text in ('60 training, 20 validation and 60 test images', 'precision: fp32', '| batch norm', folder / 'Q2a',
                 'num_classes: using 10, as in the data, instead of 7'):
        assert str(text) in out
    config = json.loads((folder / 'Q2a/plain/seed0/config.json').read_text())
    assert config.keys() == set(Config.__annotations__) - set(NOT_IDENTITY)
    content = cifar10.load('shapes', folder, 60, 20).content
    assert (config['data'], config['precision'], config['num_epochs']) == (f'SHA256 {content}', 'fp32', 1)
    page = (folder / 'Q2a/summary.md').read_text()
    assert page.startswith(f'# Q2a: {QUESTIONS["Q2a"].text}') and '](curves.png)' in page
    assert 'num_epochs=1' in page and 'norm_layer' not in page  # what was changed, but not what is compared


def test_a_list_in_a_row_is_not_shown_as_changed(run, folder, monkeypatch):
    monkeypatch.setitem(QUESTIONS, 'mine', Question('mine?', {'first': dict(hidden_size=[4] * 5)}))
    run('--experiment', 'mine')
    assert 'hidden_size' not in (folder / 'mine/summary.md').read_text()


def test_running_again_repeats_nothing_and_further_seeds_are_added(run, folder):
    run('--experiment', 'Q2a')
    seed0 = folder / 'Q2a/plain/seed0'
    shutil.copytree(seed0, seed0.with_name('seed0 copy'))  # as people do; it is left alone
    (seed0.with_name('seed0 copy') / 'config.json').write_text('{"num_epochs": 7}')
    (seed0 / 'checkpoint.pt').write_bytes(b'')  # a kill came between the result and its deletion
    before = (seed0 / 'history.csv').read_text()
    for seeds in ([0, 5], [2]):
        out = run('--experiment', 'Q2a', '--seeds', *seeds)
        assert f'plain, seed 0: already finished, skipped (delete {seed0} to train' in out
        assert f'seed {seeds[-1]}: epoch   1/1' in out and 'seed 0: epoch' not in out
    assert (seed0 / 'history.csv').read_text() == before and not (seed0 / 'checkpoint.pt').exists()
    assert [(result.run, result.seed) for result in results_of(folder / 'Q2a')] == [
        (name, seed) for name in ('plain', 'batch norm') for seed in (0, 2, 5)]


def test_other_constants_get_a_folder_of_their_own_and_both_can_be_continued(run, folder):
    run()
    assert 'num_epochs is 1 there and 2 now' in run('--num-epochs', 2)
    for epochs, name in ((1, 'Q1'), (2, 'Q1-2')):  # wherever the data are and whatever it runs on
        out = run('--num-epochs', epochs, '--device', 'auto', '--data-root', '/nowhere')
        assert 'already finished' in out and results_of(folder / name)[0].epochs == epochs
    assert not (folder / 'Q1-3').exists()


def test_a_run_is_continued_where_it_is_although_an_earlier_folder_has_become_free(run, folder):
    run()
    run('--num-epochs', 2)
    (folder / 'Q1-2/ConvNet/seed0/result.json').rename(folder / 'Q1-2/ConvNet/seed0/not yet')
    shutil.rmtree(folder / 'Q1')
    run('--num-epochs', 2)
    assert (folder / 'Q1-2/ConvNet/seed0/result.json').exists() and not list((folder / 'Q1').glob('ConvNet/*'))
    assert 'left alone' not in run('--num-epochs', 3) and (folder / 'Q1/ConvNet/seed0/result.json').exists()
    (folder / 'Q1-20261128').mkdir()  # a copy, as people name them
    (folder / 'Q1-2/ConvNet/seed0/config.json').write_text('damaged')
    assert 'already finished' in run('--num-epochs', 3)


def test_a_constant_that_a_run_did_not_have_yet_is_another_run_unless_it_is_known_what_the_run_did(run, folder):
    run('--flip', 0.5)
    path = folder.parent / RUN / 'config.json'
    config = json.loads(path.read_text())
    del config['freeze_at']
    path.write_text(json.dumps(config))
    assert 'already finished' in run('--flip', 0.5)
    assert 'freeze_at is 1.0 there and 0.5 now' in run('--flip', 0.5, '--freeze-at', 0.5)
    del config['cutout']  # as if it had been added since, to the script of a student
    path.write_text(json.dumps(config))
    assert 'cutout is None there and 0 now' in run('--flip', 0.5)


@pytest.mark.parametrize('finished', [True, False])
def test_changed_data_begins_the_next_folder_and_continues_nothing(run, tmp_path, folder, finished):
    images = make_images(tmp_path / 'images')
    options = ['--data', images, '--batch-size', 5]
    run(*options)
    if not finished:
        (tmp_path / RUN / 'result.json').rename(tmp_path / RUN / 'checkpoint.pt')  # its content is not read
    (images / 'train/ant/0.jpg').rename(images / 'train/bee/9.jpg')
    out = run(*options)
    assert 'ConvNet: the images or labels are not the same' in out and (folder / 'Q1-2').exists()
    assert 'already' not in out and 'continues after' not in out
    images.rename(tmp_path / 'moved')  # the same images elsewhere are the same run, under the name they have now
    assert 'already trained for Q1-2' in run(*options, '--data', tmp_path / 'moved', '--experiment', 'mine')
    assert [result.data for result in results_of(folder / 'mine')] == ['moved']


def test_rows_may_differ_in_their_data_and_seeds(run, folder, monkeypatch):
    rows = {'10': dict(num_validation=10), '12': dict(num_validation=12, seeds=(7, 8))}
    monkeypatch.setitem(QUESTIONS, 'Q1', Question('?', rows))
    monkeypatch.setattr(training, 'train_epoch', lambda *_: ([1.0], 0.5))
    assert ex3_convnet.main(['--data', 'shapes', '--hidden-size', '1', '--num-epochs', '1', '--device', 'cpu',
                             '--results', str(folder.parent)]) == 0
    assert [(r.seed, r.training_images, r.validation_images) for r in results_of(folder / 'Q1')] == [
        (0, 290, 10), (7, 288, 12), (8, 288, 12)]  # what there was, not the 49,000 that were asked for


# --- a run is what it is, whichever question asks -----------------------------------------------------------


@pytest.mark.parametrize('links', [True, False], ids=['hard links', 'copies'])
def test_a_run_that_another_question_trained_is_taken_over_and_named_as_here(run, folder, monkeypatch, links):
    run()
    monkeypatch.setattr(training, 'train_epoch', None)  # whatever trains fails
    if not links:
        monkeypatch.setattr(os, 'link', lambda *_: os.stat('/no such file'))
    assert 'first, seed 0: already trained for Q1 (delete ' in run('--experiment', 'mine')
    source, target = (folder / name / 'seed0' for name in ('Q1/ConvNet', 'mine/first'))
    (mine,), (first,) = results_of(folder / 'mine'), results_of(folder / 'Q1')
    assert mine.run == 'first' and replace(mine, run=first.run) == first
    for name in ('best.pt', 'last.pt', 'history.csv', 'config.json', 'test_logits.pt'):
        assert (source / name).read_bytes() == (target / name).read_bytes()
        assert (source / name).samefile(target / name) == links
    assert json.loads((source / 'result.json').read_text())['run'] == 'ConvNet'
    assert not (target / 'curves.png').samefile(source / 'curves.png')  # but drawn with another title


@pytest.mark.parametrize('spoil', [
    lambda seed0: (seed0 / 'result.json').unlink(), lambda seed0: (seed0 / 'best.pt').write_bytes(b'damaged'),
    lambda seed0: (seed0 / 'last.pt').unlink(), lambda seed0: (seed0 / 'history.csv').write_text('epoch\n'),
    lambda seed0: (seed0 / 'result.json').write_text((seed0 / 'result.json').read_text().replace('finish', 'diverg')),
    lambda seed0: (seed0 / 'config.json').write_text('{'), lambda seed0: (seed0 / 'test_logits.pt').write_bytes(b'')],
    ids=['unfinished', 'weights', 'latest', 'history', 'diverged', 'config', 'logits'])
def test_what_is_unfinished_diverged_or_damaged_is_not_taken_over(run, folder, spoil):
    run()
    spoil(folder.parent / RUN)
    out = run('--experiment', 'Q2a')
    assert 'already trained' not in out and 'plain, seed 0: epoch   1/1' in out
    assert 'first, seed 0: already trained for Q2a' in run('--experiment', 'mine')  # where it is well


@pytest.mark.parametrize('other', [['--seeds', 1], ['--num-epochs', 2], ['--num-training', 40]])
def test_only_the_same_seed_constants_and_data_are_the_same_run(run, other):
    run()
    assert 'already trained' not in run('--experiment', 'mine', *other)


@pytest.mark.parametrize('first, other, finished', [('bf16', 'fp32', True), ('fp32', 'bf16', False)])
def test_auto_precision_is_what_the_folder_has_whatever_is_faster_today(run, folder, monkeypatch, first, other,
                                                                        finished):
    options = ['--precision', 'auto', '--experiment', 'Q2a']
    monkeypatch.setattr(experiment, 'pick_precision', lambda *_: (first, ''))
    run(*options)
    if not finished:
        (folder / 'Q2a/plain/seed0/result.json').unlink()
    monkeypatch.setattr(experiment, 'pick_precision', lambda *_: (other, ''))
    run(*options, '--seeds', 0, 1)
    assert [result.precision for result in results_of(folder / 'Q2a')] == [first] * 4
    assert {json.loads(path.read_text())['precision'] for path in folder.rglob('config.json')} == {first}
    assert 'ConvNet, seed 1: already trained for Q2a' in run('--precision', 'auto', '--seeds', 1)
    assert f'precision is {first} there and {other} now' in run('--precision', other, '--experiment', 'Q2a')


def test_each_run_is_taken_over_and_continued_in_the_precision_that_it_has(run, folder):
    run('--precision', 'bf16')
    run('--precision', 'fp32', '--norm-layer', 'BN')
    for seed in (0, 1):
        out = run('--experiment', 'Q2a', '--precision', 'auto', '--seeds', seed)
        assert [f'{name}, seed 0: already trained for {there} (delete ' in out
                for name, there in (('plain', 'Q1'), ('batch norm', 'Q1-2'))] == [seed == 0] * 2
    assert [result.precision for result in results_of(folder / 'Q2a')] == ['bf16', 'bf16', 'fp32', 'fp32']
