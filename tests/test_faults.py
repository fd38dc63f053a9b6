"""Faults injected into whole experiments: interruptions, full disks, too little memory, divergence.

What is asked every time: one message and no traceback, nothing lost that existed, and the same command, started again
when the fault is gone, ends like a run that never met it.
"""
import itertools
import math
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import RUN, assert_refused, assert_same_outcome, at_call, convnet, outcome, pretrained

import training
from datasets import cifar10
from lab import checkpoint, experiment, files
from lab.history import History
from lab.progress import Progress
from lab.results import Result

pytestmark = pytest.mark.usefixtures('cheap')


# --- Ctrl-C, SIGTERM, two processes --------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=['Ctrl-C', 'SIGTERM'])
@pytest.mark.parametrize('owner, name, call, epochs', [
    (cifar10, 'split', 1, 0), (training, 'set_learning_rate', 5, 0), (training, 'set_learning_rate', 15, 1),
    (training, 'evaluate', 3, 2), (checkpoint, 'save_tensors', 2, 3), (training, 'infer', 4, 3),
    (experiment, 'plot_curves', 1, 3),
], ids=['reading data', 'first epoch', 'second epoch', 'validating', 'writing a checkpoint', 'testing', 'plotting'])
def test_an_interrupted_run_keeps_its_whole_epochs_and_continues(tmp_path, whole, monkeypatch, capsys, number, owner,
                                                                 name, call, epochs):
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, lambda: os.kill(os.getpid(), number))
        assert convnet(tmp_path) == 128 + number
    assert capsys.readouterr().err == '\nInterrupted. Run the same command again to continue.\n'
    left = {path.name for path in (tmp_path / RUN).glob('*')}
    if epochs:
        assert {'history.csv', 'curves.png', 'best.pt'} < left and left & {'checkpoint.pt', 'result.json'}
        assert len(History.read(tmp_path / RUN / 'history.csv').epochs) == epochs  # none of the one under way
    else:
        assert left <= {'config.json'}
    assert convnet(tmp_path) == 0
    assert capsys.readouterr().out.count('images/s') == 3 - epochs  # a line an epoch: none is trained twice
    assert_same_outcome(tmp_path, whole)


def test_a_second_ctrl_c_does_not_break_the_writing_that_the_first_one_causes(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, training, 'set_learning_rate', 15, lambda: os.kill(os.getpid(), signal.SIGINT))
        at_call(patch, checkpoint, 'save_tensors', 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert convnet(tmp_path) == 130
    assert (tmp_path / RUN / 'checkpoint.pt').exists()
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


# --- no room, no permission ----------------------------------------------------------------------------------


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
        patch.setattr(checkpoint, 'SECONDS_BETWEEN_SAVES', 0)
        patch.setattr(checkpoint, 'TIMES_AS_LONG', 0)
        at_call(patch, Progress, 'end_epoch', 3,
                lambda: patch.setattr(files, 'open', open_on_a_full_disk, raising=False))
        status = convnet(tmp_path)
    if name.endswith('.png'):  # what is trained is whole: a picture is a line, and is drawn the next time
        assert status == 1 and 'No space left' in capsys.readouterr().err
    else:
        assert_refused(status, capsys, 'No space left', name, 'run the same command again')
    assert not list(tmp_path.rglob('*.tmp'))
    if epochs and not name.endswith('.png'):
        assert len(torch.load(tmp_path / RUN / 'checkpoint.pt', weights_only=True)['epochs']) == epochs
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
        at_call(patch, Progress, 'end_epoch', 2, lambda: shutil.rmtree(tmp_path / RUN))
        assert_refused(convnet(tmp_path), capsys, tmp_path / RUN)
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_too_little_memory_is_one_message_and_the_run_continues_with_more(tmp_path, whole, monkeypatch, capsys):
    def allocate():
        torch.empty(2 ** 60)
    with monkeypatch.context() as patch:
        at_call(patch, training, 'set_learning_rate', 15, allocate)
        assert_refused(convnet(tmp_path), capsys, 'out of memory', 'batch_size')
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_pictures_that_cannot_be_drawn_are_lines_and_are_drawn_the_next_time(tmp_path, whole, monkeypatch, capsys):
    def refuse(_figure, _file, **_options):
        raise RuntimeError('no such glyph')
    with monkeypatch.context() as patch:
        patch.setattr(Figure, 'savefig', refuse)
        assert convnet(tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 5 and all('could not be drawn' in line and 'no such glyph' in line for line in lines)
    drawn = {name for name in outcome(whole) if name.endswith(('.png', 'summary.md'))}  # a page shows what there is
    assert {name: content for name, content in outcome(tmp_path).items() if name not in drawn} == {
        name: content for name, content in outcome(whole).items() if name not in drawn}
    assert convnet(tmp_path) == 0 and 'images/s' not in capsys.readouterr().out
    assert_same_outcome(tmp_path, whole)


# --- divergence ----------------------------------------------------------------------------------------------


def spoil_loss(patch, *steps, value=math.nan):
    """Let the loss of these training steps, counted from 1 over all runs, be `value`."""
    make_step, calls = training.make_step, itertools.count(1)

    def make_spoilt_step(*arguments):
        step = make_step(*arguments)

        def spoilt(images, labels):
            loss, correct = step(images, labels)
            return (loss * value if next(calls) in steps else loss), correct
        return spoilt
    patch.setattr(training, 'make_step', make_spoilt_step)


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
    assert '| plain (diverged)' in output.out
    assert (folder / 'plain/seed0/best.pt').exists() and not (folder / 'plain/seed0/last.pt').exists()
    assert len(History.read(folder / 'plain/seed0/history.csv').epochs) == 1
    plain, norm = files.read_csv(Result, folder / 'summary.csv')
    assert (plain.status, plain.reason[:18], plain.epochs) == ('diverged', 'in epoch 2, step 5', 1)
    assert plain.last_test_accuracy is None
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
    results = files.read_csv(Result, tmp_path / 'ex3_convnet' / name / 'summary.csv')
    assert len(results) == 2 and [result for result in results if result.status == 'diverged']
    assert '(diverged)' in (tmp_path / 'ex3_convnet' / name / 'summary.md').read_text()


def test_a_learning_rate_that_is_much_too_high_diverges_and_is_named(tmp_path, capsys):
    assert convnet(tmp_path, '--optimizer', 'SGD', '--learning-rate', 100) == 1
    assert 'lower learning_rate (100)' in capsys.readouterr().err


# --- repeating -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_results_whatever_ran_before_in_the_process(tmp_path, whole, weights):
    assert pretrained(tmp_path / 'other', '--weights', weights, '--experiment', 'Q4a') == 0
    assert convnet(tmp_path / 'other', '--seeds', 3, '--dropout', 0.5, '--flip', 0.5, '--precision', 'bf16') == 0
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert convnet(tmp_path / 'results') == 0
    assert_same_outcome(tmp_path / 'results', whole)
