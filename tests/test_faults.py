"""Faults injected into whole experiments: interruptions, full disks, too little memory, divergence, bugs.

What is asked every time: one message and no traceback, nothing lost that existed, and the same command, started again
when the fault is gone, ends like a run that never met it.
"""
import itertools
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tiny import RUN, assert_refused, assert_same_outcome, at_call, contents, convnet, outcome, pretrained, results_of

import ex3_convnet
import ex3_pretrained
import training
from datasets import cifar10
from lab import checkpoint, experiment, files
from lab.constants import slug
from lab.history import History
from lab.progress import Progress
from models.weights import WeightsUnavailable

pytestmark = pytest.mark.usefixtures('cheap')
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize('number, owner, name, call, epochs', [
    (SIGINT, cifar10, 'split', 1, 0), (SIGTERM, training, 'set_learning_rate', 5, 0),
    (SIGINT, training, 'set_learning_rate', 15, 1), (SIGTERM, training, 'evaluate', 3, 2),
    (SIGINT, checkpoint, 'save_tensors', 2, 3), (SIGTERM, training, 'infer', 4, 3),
    (SIGINT, experiment, 'plot_curves', 1, 3),
], ids=['reading data', 'first epoch', 'second epoch', 'validating', 'writing a checkpoint', 'testing', 'plotting'])
def test_an_interrupted_run_keeps_its_whole_epochs_and_continues(tmp_path, whole, monkeypatch, capsys, number, owner,
                                                                 name, call, epochs):
    handlers = [signal.getsignal(each) for each in (SIGINT, SIGTERM)]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, lambda: os.kill(os.getpid(), number))
        assert convnet(tmp_path) == 128 + number
    assert capsys.readouterr().err == '\nInterrupted. Run the same command again to continue.\n'
    assert [signal.getsignal(each) for each in (SIGINT, SIGTERM)] == handlers  # a notebook's next cell needs them
    left = {path.name for path in (tmp_path / RUN).glob('*')}
    if epochs:
        assert {'history.csv', 'curves.png', 'best.pt'} < left and left & {'checkpoint.pt', 'result.json'}
        assert len(History.read(tmp_path / RUN / 'history.csv').epochs) == epochs  # none of the one under way
    else:
        assert left <= {'config.json'}
    assert convnet(tmp_path) == 0
    assert capsys.readouterr().out.count('images/s') == 3 - epochs  # a line an epoch: none is trained twice
    assert_same_outcome(tmp_path, whole)


@pytest.mark.parametrize('first, second', [(SIGINT, SIGINT), (SIGTERM, SIGINT)])
def test_a_second_signal_does_not_break_the_writing_that_the_first_one_causes(tmp_path, monkeypatch, first, second):
    with monkeypatch.context() as patch:
        at_call(patch, training, 'set_learning_rate', 15, lambda: os.kill(os.getpid(), first))
        at_call(patch, checkpoint, 'save_tensors', 2, lambda: os.kill(os.getpid(), second))
        assert convnet(tmp_path) == 128 + first
    assert (tmp_path / RUN / 'checkpoint.pt').exists()


def test_an_interruption_while_the_last_epoch_is_drawn_loses_nothing(tmp_path, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_call(patch, Progress, 'draw', 1, lambda: os.kill(os.getpid(), SIGINT))
        assert convnet(tmp_path) == 130
    assert capsys.readouterr().err == '\nInterrupted. Run the same command again to continue.\n'
    assert convnet(tmp_path) == 0 and 'images/s' not in capsys.readouterr().out
    assert_same_outcome(tmp_path, whole)


def test_a_thread_that_gets_no_signals_trains_as_well(tmp_path, whole):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(convnet, tmp_path).result() == 0
    assert_same_outcome(tmp_path, whole)


# --- no room, no permission, no memory, no weights ----------------------------------------------------------


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
@pytest.mark.parametrize('name, epochs', [
    ('seed0/history.csv', 3), ('seed0/curves.png', None), ('seed0/best.pt', 2), ('seed0/checkpoint.pt', 2),
    ('seed0/last.pt', 3), ('seed0/test_logits.pt', 3), ('seed0/result.json', 3), ('Q1/summary.csv', None),
    ('Q1/summary.md', None), ('Q1/curves.png', None), ('Q1/filters.png', None)])
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
    if epochs:
        assert len(torch.load(tmp_path / RUN / 'checkpoint.pt', weights_only=True)['epochs']) == epochs
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_whatever_drawing_raises_is_a_line_and_pictures_are_drawn_the_next_time(tmp_path, whole, monkeypatch, capsys):
    def refuse(_figure, _file, **_options):
        raise RuntimeError('no such glyph')
    with monkeypatch.context() as patch:
        patch.setattr(Figure, 'savefig', refuse)
        assert convnet(tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 5 and all('could not be drawn' in line and 'no such glyph' in line for line in lines)
    assert convnet(tmp_path) == 0 and 'images/s' not in capsys.readouterr().out
    assert_same_outcome(tmp_path, whole)


def others_have_open(patch, name, times=math.inf):
    """As on Windows: no file of this name can be replaced or deleted, `times` times or always."""
    replace, unlink, calls = os.replace, Path.unlink, itertools.count(1)

    def refuse(path):
        if str(path).replace(os.sep, '/').endswith(name) and next(calls) <= times:
            raise PermissionError(13, 'used by another process', str(path))
    patch.setattr(os, 'replace', lambda source, target: (refuse(target), replace(source, target)))
    patch.setattr(Path, 'unlink', lambda path, **options: (refuse(path), unlink(path, **options)))
    patch.setattr(files.time, 'sleep', lambda _seconds: None)


def test_a_virus_scanner_that_looks_at_each_file_first_is_not_noticed(tmp_path, whole, monkeypatch):
    others_have_open(monkeypatch, '', times=3)
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_a_picture_open_elsewhere_ends_no_training(tmp_path, whole, monkeypatch, capsys):
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / 'curves.png').write_text('old')
    with monkeypatch.context() as patch:
        others_have_open(patch, 'seed0/curves.png')
        assert convnet(tmp_path) == 0
    assert 'could not be drawn by plot_curves (PermissionError' in capsys.readouterr().err
    (tmp_path / RUN / 'curves.png').unlink()
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


@pytest.mark.parametrize('name', ['seed0/history.csv', 'Q1/summary.csv'])
def test_a_table_open_elsewhere_ends_only_what_is_trained(tmp_path, whole, monkeypatch, capsys, name):
    monkeypatch.setattr(checkpoint, 'SECONDS_BETWEEN_SAVES', 0)
    monkeypatch.setattr(checkpoint, 'TIMES_AS_LONG', 0)
    monkeypatch.setattr(experiment, 'SECONDS_BETWEEN_TABLES', -1)
    with monkeypatch.context() as patch:
        others_have_open(patch, name)
        status = convnet(tmp_path, '--seeds', 0, 1)
        output = capsys.readouterr()
        assert status == 2 and name in output.err and 'run the same command again' in output.err
        assert output.out.count('images/s') == (3 if 'history' in name else 6)  # of the first run, or of both
    assert convnet(tmp_path) == 0
    assert 'images/s' not in capsys.readouterr().out


def test_a_finished_run_that_is_damaged_does_not_end_what_is_still_to_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, 'SECONDS_BETWEEN_TABLES', -1)
    assert convnet(tmp_path) == 0
    (tmp_path / RUN / 'history.csv').write_text('damaged')
    capsys.readouterr()
    status = convnet(tmp_path, '--seeds', 1, 2)
    output = capsys.readouterr()
    assert status == 2 and 'history.csv' in output.err and output.out.count('images/s') == 6


def test_a_run_that_cannot_be_copied_from_another_question_is_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*_arguments):
        raise OSError(28, 'No space left on device')
    assert convnet(tmp_path) == 0
    monkeypatch.setattr(os, 'link', full)
    monkeypatch.setattr(shutil, 'copy2', full)
    capsys.readouterr()
    status = convnet(tmp_path, '--experiment', 'Q2a')
    assert_refused(status, capsys, 'could not be copied to', 'No space left', '--results')
    assert not list(tmp_path.rglob('.seed0.tmp'))


@pytest.mark.parametrize('blocked', [Path('.'), RUN], ids=str)
def test_a_file_where_a_folder_should_be_is_named_and_stays(tmp_path, capsys, blocked):
    path = tmp_path / 'results' / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('precious')
    assert_refused(convnet(tmp_path / 'results'), capsys, path, '--results')
    assert path.read_text() == 'precious'


def gpu_fails(_folder, patch):
    def fail(*_):
        raise RuntimeError('CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure` in https://...')
    patch.setattr(checkpoint, 'save_tensors', fail)  # nor can any tensor be read from it any more
    fail()


@pytest.mark.parametrize('fault, words', [
    (lambda folder, _: shutil.rmtree(folder / RUN), [RUN, '--results']),
    (lambda *_: torch.empty(2 ** 60), ['out of memory', 'batch_size']),
    (gpu_fails, ['the GPU failed', 'CUDA error: unspecified launch failure)', 'same command again', '--device cpu'])],
    ids=['folder gone', 'memory', 'GPU'])
def test_what_goes_wrong_in_an_epoch_is_one_message_and_the_run_continues(tmp_path, whole, monkeypatch, capsys, fault,
                                                                          words):
    with monkeypatch.context() as patch:
        at_call(patch, training, 'set_learning_rate', 15, lambda: fault(tmp_path, patch))
        assert_refused(convnet(tmp_path), capsys, *words)
    assert convnet(tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_a_run_whose_weights_cannot_be_had_any_more_keeps_what_it_has(tmp_path, weights, monkeypatch):
    def offline(*_):
        raise WeightsUnavailable('no network')
    at_call(monkeypatch, training, 'set_learning_rate', 15, lambda: os.kill(os.getpid(), SIGINT))
    assert pretrained(tmp_path, '--weights', weights, '--experiment', 'Q4a') == 130
    run = tmp_path / 'ex3_pretrained/Q4a/frozen/seed0'
    before = contents(run)
    monkeypatch.setattr(ex3_pretrained, 'make_model', offline)
    assert pretrained(tmp_path, '--weights', weights, '--experiment', 'Q4a') == 1
    assert contents(run) == before and 'checkpoint.pt' in before


@pytest.mark.parametrize('bug, kind', [
    (lambda: torch.ones(2) @ torch.ones(3), RuntimeError), (lambda: dict([(1, 2, 3)]), ValueError),
    (lambda: torch.nn.Conv2d(3, 4, 3, groups=2), ValueError)], ids=['torch', 'python', 'raised by torch'])
def test_a_bug_is_not_disguised_as_a_users_error(tmp_path, monkeypatch, bug, kind):
    monkeypatch.setattr(training, 'train_epoch', lambda *_: bug())
    with pytest.raises(kind):
        convnet(tmp_path)


def test_a_picture_of_ones_own_that_does_not_return_its_path_is_named(tmp_path, monkeypatch, capsys):
    def mine(_experiment):
        pass
    monkeypatch.setattr(ex3_convnet, 'PICTURES', {'Q1': [mine]})
    assert convnet(tmp_path) == 1
    assert 'by mine (TypeError: it does not return its path)' in capsys.readouterr().err


# --- divergence ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name, seeds, value, steps, epochs', [  # steps: counted over all runs, ten an epoch
    ('Q2a', [0], math.nan, [15], [1, 3]), ('Q2b', [0], math.inf, [15, 21], [1, 0]),
    ('Q1', [0, 1], math.nan, [1], [0, 3]), ('Q1', [0, 1], math.nan, [1, 11], [0, 0])])
def test_divergence_ends_its_run_and_the_others_go_on(tmp_path, monkeypatch, capsys, name, seeds, value, steps, epochs):
    make_step, calls = training.make_step, itertools.count(1)

    def make_spoilt_step(*arguments):
        def spoilt(images, labels):
            loss, correct = step(images, labels)
            return (loss * value if next(calls) in steps else loss), correct
        step = make_step(*arguments)
        return spoilt
    folder, options = tmp_path / 'ex3_convnet' / name, ['--experiment', name, '--seeds', *seeds]
    with monkeypatch.context() as patch:
        patch.setattr(training, 'make_step', make_spoilt_step)
        assert convnet(tmp_path, *options) == 1
    output, results = capsys.readouterr(), results_of(folder)
    where = f'diverged in epoch {steps[0] // 10 + 1}, step {steps[0] % 10}, '
    assert where in output.err and 'lower learning_rate (0.002)' in output.err and '(diverged)' in output.out
    assert [result.epochs for result in results] == epochs
    for result in results:
        run = folder / slug(result.run) / f'seed{result.seed}'
        assert result.status == ('finished' if result.epochs == 3 else 'diverged')
        assert (run / 'best.pt').exists() == (run / 'curves.png').exists() == (result.epochs > 0)
        assert (result.best_test_accuracy is not None) == (result.epochs > 0)
        assert (run / 'last.pt').exists() == (result.last_test_accuracy is not None) == (result.epochs == 3)
    before = outcome(tmp_path)
    assert convnet(tmp_path, *options) == 1  # again: the same, and nothing is trained
    again = capsys.readouterr()
    assert again.err == output.err and 'images/s' not in again.out and outcome(tmp_path) == before
