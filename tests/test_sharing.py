"""Several processes on one experiment: every run is trained once, and the last one to finish has the whole table.

    pytest tests/test_sharing.py --kills 100
"""
import json
import multiprocessing
import random
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest
from filelock import FileLock
from matplotlib.figure import Figure
from tiny import RUN, assert_same_outcome, at_call, convnet, results_of, start, train_in_child, unix

import ex3_convnet
import training
from lab import checkpoint, experiment
from lab.constants import Question
from lab.progress import Progress

OPTIONS = ['--experiment', 'Q2a', '--num-epochs', '1']


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'ex3_convnet' / 'Q2a'


def runs_of(folder: Path) -> list[str]:
    """The runs in the table."""
    return [result.run for result in results_of(folder)]


def describe(figure: Figure, file, **_) -> None:
    """In place of a PNG: what its lines show."""
    shown = [[axes.get_ylabel(), [list(map(float, line.get_ydata())) for line in axes.lines]] for axes in figure.axes]
    file.write(json.dumps(shown).encode())


# --- several processes --------------------------------------------------------------------------------------


def train(results: Path, log: Path, pause: float, *options: str) -> None:
    """The child. `pause`: seconds between choosing a folder and claiming it, in which another process may choose."""
    Figure.savefig, experiment.SECONDS_BETWEEN_TABLES = describe, 0
    choose = experiment.choose_folder
    experiment.choose_folder = lambda *arguments: (choose(*arguments), time.sleep(pause))[0]
    train_in_child(results, log, *options)


def end(children: list[multiprocessing.Process]) -> list[int]:
    """Their exit statuses."""
    for child in children:
        child.join(timeout=600)
        child.kill()  # if it hangs
        child.join()
    return [child.exitcode for child in children]


@unix
def test_four_processes_train_every_run_once_and_kills_lose_nothing(tmp_path, request):
    runs, alone, rng, left = 8, tmp_path / 'alone', random.Random(0), request.config.getoption('--kills')
    options = ['--experiment', 'Q3a', '--num-epochs', '2']
    assert end([start(train, alone, tmp_path / 'alone.log', 0, *options)]) == [0]
    while left > 0:
        shared = tmp_path / f'shared{left}'
        logs = [shared.with_suffix(f'.{i}.log') for i in range(4)]
        children, killed = [start(train, shared, log, 0, *options) for log in logs], 0
        for _ in range(6):
            time.sleep(rng.uniform(0, 0.6))
            i = rng.randrange(4)
            children[i].kill()
            children[i].join()
            killed += children[i].exitcode != 0  # it may have been done
            children[i] = start(train, shared, logs[i], 0, *options)
        statuses, text = end(children), '\n'.join(log.read_text() for log in logs)
        assert statuses == [0] * 4, text
        assert runs <= text.count('epoch   2/2') <= runs + killed  # a kill may come between training and the result
        assert 2 * runs <= text.count('images/s') <= 2 * runs + killed
        assert_same_outcome(shared, alone)  # the table of the last one to finish is that of a single process,
        for path in alone.rglob('curves.png'):  # and so are its pictures
            assert (shared / path.relative_to(alone)).read_bytes() == path.read_bytes(), path
        left -= max(killed, 1)


@unix
def test_processes_that_start_at_once_share_a_folder_if_and_only_if_their_constants_are_the_same(tmp_path, folder):
    logs = {tmp_path / 'first.log': '20', tmp_path / 'second.log': '40', tmp_path / 'third.log': '20'}
    assert end([start(train, tmp_path, log, 0.3, *OPTIONS, '--batch-size', size) for log, size in logs.items()]) == [
        0] * 3
    assert ''.join(log.read_text() for log in logs).count('epoch   1/1') == 4
    folders = [folder, folder.with_name('Q2a-2')]
    found = [{json.loads(path.read_text())['batch_size'] for path in folder.rglob('config.json')} for folder in folders]
    assert sorted(found, key=min) == [{20}, {40}]
    assert [runs_of(folder) for folder in folders] == [['plain', 'batch norm']] * 2


# --- what others do meanwhile, in this process --------------------------------------------------------------


def test_a_folder_is_taken_with_all_its_runs_before_the_first_one_is_trained(tmp_path, folder, monkeypatch, cheap):
    def other():
        with monkeypatch.context() as patch:
            rows = {'plain': {}, 'batch norm': dict(norm_layer='BN', dropout=0.1)}  # differs in what is still to come
            patch.setitem(ex3_convnet.QUESTIONS, 'Q2a', Question('?', rows))
            assert convnet(tmp_path, *OPTIONS) == 0
    at_call(monkeypatch, training, 'train_epoch', 1, other)
    assert convnet(tmp_path, *OPTIONS) == 0
    assert [json.loads((base / 'batch-norm/seed0/config.json').read_text())['dropout']
            for base in (folder, folder.with_name('Q2a-2'))] == [0, 0.1]


@pytest.mark.parametrize('busy', [['plain'], ['plain', 'batch-norm']])
def test_who_finds_runs_in_other_hands_says_so_and_ends_with_what_is_there(tmp_path, folder, capsys, cheap, busy):
    names = ['plain', 'batch norm']
    with ExitStack() as held:
        for name in busy:
            held.enter_context(FileLock(folder / '.locks' / f'{name}-seed0'))
        assert convnet(tmp_path, *OPTIONS) == 0
    printed = capsys.readouterr().out
    assert [f'{name}, seed 0: being trained by another process' in printed for name in names] == [True, len(busy) == 2]
    assert runs_of(folder) == names[len(busy):]
    assert convnet(tmp_path, *OPTIONS) == 0  # the other one is gone, its run is not finished: it is trained here
    assert runs_of(folder) == names


@pytest.mark.parametrize('is_busy', [True, False])
def test_a_run_that_others_finish_meanwhile_is_in_the_table_and_not_trained_again(tmp_path, folder, monkeypatch, capsys,
                                                                                  cheap, is_busy):
    assert convnet(tmp_path, *OPTIONS) == 0
    result, aside, lock = folder / 'plain/seed0/result.json', folder / 'aside', ExitStack()
    result.rename(aside)
    if is_busy:  # until the end; else until the lock is asked for, after that of the folder
        lock.enter_context(FileLock(folder / '.locks' / 'plain-seed0'))
    owner, name, call = (experiment.Experiment, 'conclude', 1) if is_busy else (FileLock, 'acquire', 2)
    at_call(monkeypatch, owner, name, call, lambda: aside.rename(result))
    capsys.readouterr()
    with lock:
        assert convnet(tmp_path, *OPTIONS) == 0
    printed = capsys.readouterr().out
    assert not [words for words in ('another process', 'images/s', 'already trained') if words in printed]
    assert runs_of(folder) == ['plain', 'batch norm']


def test_the_table_shows_what_is_finished_while_runs_are_still_to_come(tmp_path, folder, monkeypatch, cheap):
    found = []
    monkeypatch.setattr(experiment, 'Progress', Mock(wraps=Progress))
    monkeypatch.setattr(experiment, 'SECONDS_BETWEEN_TABLES', 0)
    at_call(monkeypatch, training, 'train_epoch', 2, lambda: found.extend(runs_of(folder)))
    assert convnet(tmp_path, *OPTIONS) == 0
    assert found == ['plain']
    assert [call.args[2] for call in experiment.Progress.call_args_list] == [1, 0]  # epochs of later runs


def test_curves_that_a_kill_left_behind_the_weights_are_drawn_when_the_run_continues(tmp_path, monkeypatch, cheap):
    def die():
        raise SystemExit
    monkeypatch.setattr(checkpoint, 'SECONDS_BETWEEN_SAVES', 0)
    monkeypatch.setattr(checkpoint, 'TIMES_AS_LONG', 0)
    monkeypatch.setattr(Figure, 'savefig', describe)
    at_call(monkeypatch, Progress, 'draw', 3, die)
    with pytest.raises(SystemExit):
        convnet(tmp_path)
    assert convnet(tmp_path) == 0
    loss, *_ = json.loads((tmp_path / RUN / 'curves.png').read_text())
    assert max(map(len, loss[1])) == 3  # epochs
