"""Folders and identity: what is continued, what is skipped, what is taken over, what begins a new folder."""
import csv
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import assert_refused, convnet

import ex3_convnet
import training
from datasets import cifar10
from ex3_convnet import QUESTIONS, Config
from lab import experiment
from lab.constants import Question
from lab.files import read_csv
from lab.identity import NOT_IDENTITY
from lab.results import Result
from models.convnet import ConvNet

pytestmark = pytest.mark.usefixtures('cheap')


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run('--experiment', 'Q2a', ...) -> what it printed; results go to tmp_path, and it must succeed."""
    monkeypatch.setattr(ex3_convnet, 'PICTURES', {})  # the curves are enough here

    def run_main(*options):
        assert convnet(tmp_path, '--num-training', 60, '--num-validation', 20, '--num-epochs', 1, *options) == 0
        return capsys.readouterr().out
    return run_main


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'ex3_convnet'


def results_of(folder):
    return read_csv(Result, folder / 'summary.csv')


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith('.'))


# --- one experiment -----------------------------------------------------------------------------------------


def test_a_run_prints_its_conditions_and_keeps_its_constants(run, folder):
    out = run('--experiment', 'Q2a')
    for text in ('60 training, 20 validation and 60 test images', 'precision: fp32', '| batch norm', folder / 'Q2a'):
        assert str(text) in out
    config = json.loads((folder / 'Q2a/plain/seed0/config.json').read_text())
    assert config.keys() == set(Config.__annotations__) - set(NOT_IDENTITY)
    content = cifar10.load('shapes', folder, 60, 20).content
    assert (config['data'], config['precision'], config['num_epochs']) == (f'SHA256 {content}', 'fp32', 1)
    page = (folder / 'Q2a/summary.md').read_text()
    assert page.startswith(f'# Q2a: {QUESTIONS["Q2a"].text}') and '](curves.png)' in page


def test_running_again_repeats_nothing_and_further_seeds_are_added(run, folder):
    run()
    history = folder / 'Q1/ConvNet/seed0/history.csv'
    before = history.read_text(), history.stat().st_mtime_ns
    for seeds in ([0, 5], [2]):
        out = run('--seeds', *seeds)
        assert f'ConvNet, seed 0: already finished, skipped (delete {history.parent} to train' in out
        assert f'seed {seeds[-1]}: epoch   1/1' in out and 'seed 0: epoch' not in out
    assert (history.read_text(), history.stat().st_mtime_ns) == before
    assert [result.seed for result in results_of(folder / 'Q1')] == [0, 2, 5]


def test_other_constants_get_a_folder_of_their_own_and_both_can_be_continued(run, folder):
    run()
    assert 'num_epochs is 1 there and 2 now' in run('--num-epochs', 2)
    for epochs, name in ((1, 'Q1'), (2, 'Q1-2')):
        out = run('--num-epochs', epochs)
        assert 'already finished' in out and str(folder / name / 'summary.csv') in out
        assert results_of(folder / name)[0].epochs == epochs
    assert names(folder) == ['Q1', 'Q1-2']
    out = run('--num-epochs', 2, '--experiment', 'Q2a')
    assert 'plain, seed 0: already trained for Q1-2' in out


def test_what_says_where_and_how_is_not_part_of_what_a_run_is(run):
    run()
    assert 'already finished' in run('--device', 'auto', '--data-root', '/nowhere')


@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize('change', [
    lambda root: (root / 'train/ant/0.png').rename(root / 'train/bee/9.png'),
    lambda root: (root / 'train/ant/0.png').unlink(),
    lambda root: shutil.copy(root / 'train/ant/0.png', root / 'train/ant/9.png'),
    lambda root: Image.new('RGB', (32, 32)).save(root / 'test/ant/0.png')],
    ids=['relabelled', 'removed', 'added', 'another test image'])
def test_changed_data_begins_the_next_folder_and_continues_nothing(run, tmp_path, folder, change, finished):
    for i, name in enumerate(f'{part}/{name}' for part in ('train', 'test') for name in ('ant', 'bee')):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for j in range(6):
            Image.new('RGB', (32, 32), (60 * i, 40 * j, 99)).save(tmp_path / 'images' / name / f'{j}.png')
    run('--data', tmp_path / 'images', '--num-epochs', 2)
    if not finished:
        (folder / 'Q1/ConvNet/seed0/result.json').unlink()
    change(tmp_path / 'images')
    out = run('--data', tmp_path / 'images', '--num-epochs', 2)
    assert 'ConvNet: the images or labels are not the same' in out and names(folder) == ['Q1', 'Q1-2']
    assert 'already' not in out and 'continues after' not in out


def test_a_constant_that_did_not_exist_yet_counts_as_its_default(run, folder):
    run()
    path = folder / 'Q1/ConvNet/seed0/config.json'
    config = json.loads(path.read_text())
    del config['freeze_at']
    path.write_text(json.dumps(config))
    assert 'already finished' in run()
    assert 'freeze_at is 1.0 there and 0.5 now' in run('--freeze-at', 0.5)


@pytest.mark.parametrize('first, other', [('bf16', 'fp32'), ('fp32', 'bf16')])
@pytest.mark.parametrize('finished', [True, False])
def test_auto_precision_is_what_the_folder_has_whatever_is_faster_today(run, folder, monkeypatch, first, other,
                                                                        finished):
    options = ['--precision', 'auto', '--experiment', 'Q2a']
    monkeypatch.setattr(experiment, 'pick_precision', lambda *_: (first, ''))
    run(*options)
    if not finished:
        (folder / 'Q2a/plain/seed0/result.json').unlink()
    monkeypatch.setattr(experiment, 'pick_precision', lambda *_: (other, ''))
    run(*options, '--seeds', 0, 1)
    assert [result.precision for result in results_of(folder / 'Q2a')] == [first] * 4 and names(folder) == ['Q2a']
    assert {json.loads(path.read_text())['precision'] for path in folder.rglob('config.json')} == {first}
    assert 'ConvNet, seed 1: already trained for Q2a' in run('--precision', 'auto', '--seeds', 1)
    assert f'precision is {first} there and {other} now' in run('--precision', other, '--experiment', 'Q2a')


def test_a_copy_of_a_runs_folder_beside_it_is_left_alone(run, folder):
    run()
    shutil.copytree(folder / 'Q1/ConvNet/seed0', folder / 'Q1/ConvNet/seed0 copy')
    (folder / 'Q1/ConvNet/seed0 copy/config.json').write_text('{"num_epochs": 7}')
    assert 'already finished' in run() and len(results_of(folder / 'Q1')) == 1


@pytest.mark.parametrize('left', ['result.json', 'checkpoint.pt'])
def test_a_run_whose_constants_are_lost_is_neither_reported_nor_continued(run, tmp_path, folder, capsys, left):
    run()
    if left == 'checkpoint.pt':
        (folder / 'Q1/ConvNet/seed0/result.json').rename(folder / 'Q1/ConvNet/seed0/checkpoint.pt')
    (folder / 'Q1/ConvNet/seed0/config.json').unlink()
    assert_refused(convnet(tmp_path), capsys, folder / 'Q1/ConvNet/seed0/config.json', 'delete')


def test_the_network_follows_the_number_of_classes(run):
    assert 'num_classes: using 10, as in the data, instead of 7' in run('--num-classes', 7)


def test_rows_may_differ_in_their_data(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(QUESTIONS, 'Q1', Question('?', {'40': dict(num_validation=40), '60': dict(num_validation=60)}))
    options = ['--data', 'shapes', '--device', 'cpu', '--hidden-size', *'22222', '--num-epochs', 1]
    assert ex3_convnet.main([*map(str, options), '--results', str(tmp_path)]) == 0
    assert [(result.training_images, result.validation_images) for result in results_of(folder / 'Q1')] == [
        (260, 40), (240, 60)]  # what there was, not the 49,000 that were asked for


# --- a run is what it is, whichever question asks -----------------------------------------------------------


@pytest.mark.parametrize('links', [True, False], ids=['hard links', 'copies'])
def test_a_run_that_another_question_trained_is_taken_over_and_named_as_here(run, folder, monkeypatch, links):
    run()
    monkeypatch.setattr(training, 'train_epoch', None)  # whatever trains fails
    monkeypatch.setitem(QUESTIONS, 'mine', Question('mine?', {'first': {}}))
    if not links:
        monkeypatch.setattr(os, 'link', lambda *_: os.stat('/no such file'))
    assert 'first, seed 0: already trained for Q1' in run('--experiment', 'mine')
    source, target = (folder / name / 'seed0' for name in ('Q1/ConvNet', 'mine/first'))
    (mine,), (first,) = results_of(folder / 'mine'), results_of(folder / 'Q1')
    assert mine.run == 'first' and replace(mine, run=first.run) == first
    for name in ('best.pt', 'last.pt', 'history.csv', 'config.json', 'test_logits.pt'):
        assert (source / name).read_bytes() == (target / name).read_bytes()
        assert (source / name).samefile(target / name) == links
    assert (target / 'curves.png').exists() and json.loads((source / 'result.json').read_text())['run'] == 'ConvNet'


def test_each_run_is_taken_over_in_the_precision_that_it_has(run):
    run('--precision', 'bf16')
    run('--precision', 'fp32', '--norm-layer', 'BN')
    out = run('--experiment', 'Q2a', '--precision', 'auto')
    assert [f'{name}, seed 0: already trained for {there}\n' in out
            for name, there in (('plain', 'Q1'), ('batch norm', 'Q1-2'))] == [True, True]


@pytest.mark.parametrize('spoil', [
    lambda seed0: (seed0 / 'result.json').unlink(), lambda seed0: (seed0 / 'best.pt').write_bytes(b'damaged'),
    lambda seed0: (seed0 / 'last.pt').unlink(), lambda seed0: (seed0 / 'history.csv').write_text('epoch\n'),
    lambda seed0: (seed0 / 'result.json').write_text((seed0 / 'result.json').read_text().replace('finish', 'diverg')),
    lambda seed0: (seed0 / 'config.json').write_text('{')],
    ids=['unfinished', 'weights', 'latest', 'history', 'diverged', 'config'])
def test_what_is_unfinished_diverged_or_damaged_is_not_taken_over(run, folder, spoil):
    run()
    spoil(folder / 'Q1/ConvNet/seed0')
    out = run('--experiment', 'Q2a')
    assert 'already trained' not in out and 'plain, seed 0: epoch   1/1' in out


@pytest.mark.parametrize('other', [['--seeds', 1], ['--num-epochs', 2], ['--num-training', 40]])
def test_only_the_same_seed_constants_and_data_are_the_same_run(run, other):
    run()
    assert 'already trained' not in run('--experiment', 'Q2a', *other)


# --- how it ends --------------------------------------------------------------------------------------------


def test_a_bug_is_not_disguised_as_a_users_error(tmp_path, monkeypatch):
    def bug(*_args, **_kwargs):
        raise RuntimeError('shapes do not match')
    monkeypatch.setattr(training, 'train_epoch', bug)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        convnet(tmp_path)


def test_accuracies_of_the_summary_are_those_of_the_kept_weights(run, folder):
    run('--num-epochs', 3, '--norm-layer', 'BN', '--optimizer', 'Muon', '--learning-rate', 0.3)
    (row,) = csv.DictReader((folder / 'Q1/summary.csv').open())
    data, model, found = cifar10.load('shapes', folder, 60, 20), ConvNet(3, [4] * 5, 10, 'BN').eval(), {}
    for which in ('best', 'last'):
        model.load_state_dict(torch.load(folder / f'Q1/ConvNet/seed0/{which}.pt', weights_only=True))
        for part in ('train', 'val', 'test'):
            split = getattr(data, part)
            with torch.no_grad():
                right = (model((split.images / 255 - 0.5) / 0.5).argmax(1) == split.labels).float().mean().item()
            found[which, part] = float(row[f'{which}_{part}_accuracy'])
            assert found[which, part] == pytest.approx(right, abs=1e-6)
    assert all(found['best', part] != found['last', part] for part in ('train', 'val', 'test'))
