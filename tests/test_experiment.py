"""Folders and identity: what is continued, what is skipped, what is taken over, what begins a new folder."""
import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

import training
from datasets import cifar10
from ex3_convnet import QUESTIONS, Config, main
from lab import experiment
from lab.constants import Question
from lab.files import read_csv
from lab.identity import NOT_IDENTITY
from lab.results import Result
from models.convnet import ConvNet

TINY = ['--data', 'shapes', '--num-training', '60', '--num-validation', '20', '--batch-size', '20',
        '--hidden-size', '4', '4', '4', '4', '4', '--device', 'cpu']
PRECISE = [*TINY, '--precision', 'fp32', '--num-epochs', '1']


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    monkeypatch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))


@pytest.fixture
def run(tmp_path, capsys):
    """run('--experiment', 'Q2a', ...) -> (exit status, what it printed, its errors); results go to tmp_path."""
    def run_main(*options):
        status = main([*PRECISE, '--results', str(tmp_path), *options])
        return status, *capsys.readouterr()
    return run_main


def results_of(tmp_path, name):
    return read_csv(Result, tmp_path / 'ex3_convnet' / name / 'summary.csv')


def change_data(monkeypatch, change):
    """Let every load give other data from now on."""
    load = cifar10.load

    def load_changed(*arguments):
        return change(load(*arguments))
    monkeypatch.setattr(cifar10, 'load', load_changed)


# --- one experiment -----------------------------------------------------------------------------------------


def test_a_run_prints_its_conditions_and_keeps_its_constants(run, tmp_path):
    status, out, _ = run('--experiment', 'Q2a')
    folder = tmp_path / 'ex3_convnet' / 'Q2a'
    assert status == 0
    for text in ('60 training, 20 validation and 1,000 test images', 'precision: fp32', '| batch norm', str(folder)):
        assert text in out
    config = json.loads((folder / 'plain' / 'seed0' / 'config.json').read_text())
    assert config.keys() == set(Config.__annotations__) - set(NOT_IDENTITY)
    data = cifar10.load('shapes', tmp_path, 60, 20)
    assert (config['data'], config['precision'], config['num_epochs']) == (f'SHA256 {data.content}', 'fp32', 1)
    page = (folder / 'summary.md').read_text()
    assert page.startswith(f'# Q2a: {QUESTIONS["Q2a"].text}') and '](curves.png)' in page and '](confusion.png)' in page


def test_running_again_repeats_nothing_and_further_seeds_are_added(run, tmp_path):
    run()
    history = tmp_path / 'ex3_convnet' / 'Q1' / 'ConvNet' / 'seed0' / 'history.csv'
    before = history.read_text(), history.stat().st_mtime_ns
    for seeds in (['0', '5'], ['2']):
        status, out, _ = run('--seeds', *seeds)
        assert status == 0 and f'ConvNet, seed 0: already finished, skipped (delete {history.parent} to train' in out
        assert f'seed {seeds[-1]}: epoch   1/1' in out and 'seed 0: epoch' not in out
    assert (history.read_text(), history.stat().st_mtime_ns) == before
    assert [result.seed for result in results_of(tmp_path, 'Q1')] == [0, 2, 5]


def test_other_constants_get_a_folder_of_their_own_and_both_can_be_continued(run, tmp_path):
    run()
    status, out, _ = run('--num-epochs', '2')
    assert status == 0 and 'num_epochs is 1 there and 2 now' in out
    for epochs, name in ((1, 'Q1'), (2, 'Q1-2')):
        status, out, _ = run('--num-epochs', str(epochs))
        assert 'already finished' in out and str(tmp_path / 'ex3_convnet' / name / 'summary.csv') in out
        assert results_of(tmp_path, name)[0].epochs == epochs
    assert sorted(path.name for path in (tmp_path / 'ex3_convnet').iterdir()) == ['Q1', 'Q1-2']


@pytest.mark.parametrize('change', [
    lambda data: replace(data, content='relabelled'), None], ids=['content', 'num_training'])
def test_changed_data_begins_the_next_folder_and_says_why(run, tmp_path, monkeypatch, change):
    run()
    if change:
        change_data(monkeypatch, change)
    status, out, _ = run(*([] if change else ['--num-training', '40']))
    assert status == 0 and 'already finished' not in out
    assert ('the images or labels are not the same' if change else 'num_training is 60 there and 40 now') in out
    assert sorted(path.name for path in (tmp_path / 'ex3_convnet').iterdir()) == ['Q1', 'Q1-2']


def test_an_unfinished_run_is_not_continued_on_changed_data(run, tmp_path, monkeypatch):
    run('--num-epochs', '2')
    folder = tmp_path / 'ex3_convnet' / 'Q1' / 'ConvNet' / 'seed0'
    (folder / 'result.json').unlink()
    change_data(monkeypatch, lambda data: replace(data, content='more images'))
    _, out, _ = run('--num-epochs', '2')
    assert 'continues after' not in out and 'Q1-2' in out


def test_device_results_and_data_root_are_not_part_of_what_a_run_is(run, tmp_path):
    run()
    assert 'already finished' in run('--device', 'auto', '--data-root', '/nowhere')[1]


def test_a_constant_that_did_not_exist_yet_counts_as_its_default(run, tmp_path):
    run()
    path = tmp_path / 'ex3_convnet' / 'Q1' / 'ConvNet' / 'seed0' / 'config.json'
    config = json.loads(path.read_text())
    del config['freeze_at']
    path.write_text(json.dumps(config))
    assert 'already finished' in run()[1]
    assert 'freeze_at is 1.0 there and 0.5 now' in run('--freeze-at', '0.5')[1]


@pytest.mark.parametrize('finished', [True, False])
def test_auto_precision_is_what_the_folder_has_whatever_is_faster_today(tmp_path, capsys, monkeypatch, finished):
    arguments = [*TINY, '--num-epochs', '1', '--results', str(tmp_path)]
    for precision, other in (('bf16', 'fp32'), ('fp32', 'bf16')):
        path = tmp_path / precision
        monkeypatch.setattr(experiment, 'pick_precision', lambda *_, p=precision: (p, ''))
        assert main([*arguments, '--results', str(path)]) == 0
        if not finished:
            (path / 'ex3_convnet/Q1/ConvNet/seed0/result.json').unlink()
        monkeypatch.setattr(experiment, 'pick_precision', lambda *_, p=other: (p, ''))
        assert main([*arguments, '--results', str(path), '--seeds', '0', '1']) == 0
        assert [result.precision for result in results_of(path, 'Q1')] == [precision] * 2
        assert [folder.name for folder in (path / 'ex3_convnet').iterdir()] == ['Q1']
        if finished:  # and another question takes the same run over
            assert main([*arguments, '--results', str(path), '--experiment', 'Q2a']) == 0
            assert 'plain, seed 0: already trained for Q1' in capsys.readouterr().out
            assert {result.precision for result in results_of(path, 'Q2a')} == {precision}


def test_a_copy_of_a_runs_folder_beside_it_is_left_alone(run, tmp_path):
    run()
    folder = tmp_path / 'ex3_convnet' / 'Q1' / 'ConvNet' / 'seed0'
    shutil.copytree(folder, folder.with_name('seed0 copy'))
    assert run()[0] == 0 and len(results_of(tmp_path, 'Q1')) == 1


def test_the_network_follows_the_number_of_classes(run):
    status, out, _ = run('--num-classes', '7')
    assert status == 0 and 'num_classes: using 10, as in the data, instead of 7' in out


def test_rows_may_differ_in_their_data(run, tmp_path, monkeypatch):
    monkeypatch.setitem(QUESTIONS, 'Q1', Question('?', {str(n): dict(num_training=n) for n in (40, 60)}))
    arguments = [option for option in PRECISE if option not in ('--num-training', '60')]
    assert main([*arguments, '--results', str(tmp_path)]) == 0
    assert [result.training_images for result in results_of(tmp_path, 'Q1')] == [40, 60]


# --- a run is what it is, whichever question asks -----------------------------------------------------------


def test_a_run_that_another_question_trained_is_taken_over_and_named_as_here(run, tmp_path, monkeypatch):
    run('--flip', '0')
    monkeypatch.setattr(training, 'train_epoch', None)  # whatever trains fails
    monkeypatch.setitem(QUESTIONS, 'mine', Question('mine?', {'first': {}}))
    status, out, _ = run('--experiment', 'mine')
    assert status == 0 and 'first, seed 0: already trained for Q1' in out
    source, target = (tmp_path / 'ex3_convnet' / name / 'seed0' for name in ('Q1/ConvNet', 'mine/first'))
    (mine,), (first,) = results_of(tmp_path, 'mine'), results_of(tmp_path, 'Q1')
    assert mine.run == 'first' and replace(mine, run=first.run) == first
    for name in ('best.pt', 'last.pt', 'history.csv', 'config.json', 'test_logits.pt'):
        assert (source / name).read_bytes() == (target / name).read_bytes()
    assert (target / 'curves.png').exists() and json.loads((source / 'result.json').read_text())['run'] == 'ConvNet'


@pytest.mark.parametrize('spoil', [
    lambda folder: (folder / 'result.json').unlink(), lambda folder: (folder / 'best.pt').write_bytes(b'damaged'),
    lambda folder: (folder / 'last.pt').unlink(), lambda folder: (folder / 'history.csv').write_text('epoch\n'),
    lambda folder: (folder / 'result.json').write_text((folder / 'result.json').read_text().replace(
        '"finished"', '"diverged"')), lambda folder: (folder / 'config.json').write_text('{')],
    ids=['unfinished', 'weights', 'latest', 'history', 'diverged', 'config'])
def test_what_is_unfinished_diverged_or_damaged_is_not_taken_over(run, tmp_path, spoil):
    run()
    spoil(tmp_path / 'ex3_convnet' / 'Q1' / 'ConvNet' / 'seed0')
    status, out, _ = run('--experiment', 'Q2a')
    assert status == 0 and 'already trained' not in out and 'plain, seed 0: epoch   1/1' in out


@pytest.mark.parametrize('other', [['--seeds', '1'], ['--num-epochs', '2'], ['--dropout', '0.1']])
def test_only_the_same_seed_constants_and_data_are_the_same_run(run, other):
    run()
    assert 'already trained' not in run('--experiment', 'Q2a', *other)[1]


# --- how it ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError('CUDA error: out of memory'), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'),
    RuntimeError('FIND was unable to find an engine to execute this computation')], ids=str)
def test_out_of_memory_names_the_constant_to_lower(run, monkeypatch, error):
    def exhausted(*_args, **_kwargs):
        raise error
    monkeypatch.setattr(training, 'train_epoch', exhausted)
    status, _, errors = run()
    assert status == 2 and 'batch_size' in errors and errors.count('\n') == 1


def test_a_bug_is_not_disguised_as_a_users_error(run, monkeypatch):
    def bug(*_args, **_kwargs):
        raise RuntimeError('shapes do not match')
    monkeypatch.setattr(training, 'train_epoch', bug)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        run()


def test_accuracies_of_the_summary_are_those_of_the_kept_weights(run, tmp_path):
    run('--num-epochs', '4', '--norm-layer', 'BN', '--optimizer', 'Muon', '--learning-rate', '0.3')
    folder = tmp_path / 'ex3_convnet' / 'Q1'
    (row,) = csv.DictReader((folder / 'summary.csv').open())
    data, model, found = cifar10.load('shapes', tmp_path, 60, 20), ConvNet(3, [4] * 5, 10, 'BN').eval(), {}
    for which in ('best', 'last'):
        model.load_state_dict(torch.load(folder / 'ConvNet' / 'seed0' / f'{which}.pt', weights_only=True))
        for part in ('train', 'val', 'test'):
            split = getattr(data, part)
            with torch.no_grad():
                right = (model((split.images / 255 - 0.5) / 0.5).argmax(1) == split.labels).float().mean().item()
            found[which, part] = float(row[f'{which}_{part}_accuracy'])
            assert found[which, part] == pytest.approx(right, abs=1e-6)
    assert found['best', 'test'] != found['last', 'test'] and len(data.test) == 1000
