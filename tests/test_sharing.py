"""Several processes on one experiment: every run is trained once, and the last one to finish has the whole table.

    pytest tests/test_sharing.py --kills 100
"""
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from filelock import FileLock
from matplotlib.figure import Figure
from tiny import RUN, TINY, TINY_NET, assert_same_outcome, at_call, convnet
from tqdm import tqdm

import ex3_convnet
import training
from lab import checkpoint, experiment
from lab.constants import Question
from lab.files import read_csv
from lab.progress import Progress
from lab.results import Result

unix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL and no forkserver')


def train(options: list[str], log: Path, pause: float) -> None:
    """The child. `pause`: seconds between choosing a folder and claiming it, in which another process may choose."""
    checkpoint.SECONDS_BETWEEN_SAVES = checkpoint.TIMES_AS_LONG = experiment.SECONDS_BETWEEN_TABLES = 0
    tqdm.set_lock(threading.RLock())  # its own lock is a system resource that a killed process leaves behind
    Figure.savefig = describe
    choose = experiment.choose_folder
    experiment.choose_folder = lambda *arguments: (choose(*arguments), time.sleep(pause))[0]
    with open(log, 'a', buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(ex3_convnet.main([*TINY, *TINY_NET, *options]))


def describe(figure: Figure, file, **_) -> None:
    """In place of a PNG: what its lines show."""
    shown = [[axes.get_ylabel(), [list(map(float, line.get_ydata())) for line in axes.lines]] for axes in figure.axes]
    file.write(json.dumps(shown).encode())


def start(results: Path, log: Path, *options: str, pause: float = 0.0) -> multiprocessing.Process:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['ex3_convnet'])  # torch is imported once, not for every child
    child = context.Process(target=train, args=(['--results', str(results), *options], log, pause))
    child.start()
    return child


def end(children: list[multiprocessing.Process]) -> list[int]:
    """Their exit statuses."""
    for child in children:
        child.join(timeout=200)
        child.kill()  # if it hangs
        child.join()
    return [child.exitcode for child in children]


@unix
def test_four_processes_train_every_run_once_and_kills_lose_nothing(tmp_path, request):
    runs, alone, rng, left = 8, tmp_path / 'alone', random.Random(0), request.config.getoption('--kills')
    options = ['--experiment', 'Q3a', '--num-epochs', '2']
    assert end([start(alone, tmp_path / 'alone.log', *options)]) == [0]
    while left > 0:
        shared = tmp_path / f'shared{left}'
        logs = [shared.with_suffix(f'.{i}.log') for i in range(4)]
        children, killed = [start(shared, log, *options) for log in logs], 0
        for _ in range(6):
            time.sleep(rng.uniform(0, 0.6))
            i = rng.randrange(4)
            children[i].kill()
            children[i].join()
            killed += children[i].exitcode != 0  # it may have been done
            children[i] = start(shared, logs[i], *options)
        text = '\n'.join(log.read_text() for log in logs if log.exists())
        assert end(children) == [0] * 4, text
        text = '\n'.join(log.read_text() for log in logs)
        assert runs <= text.count('epoch   2/2') <= runs + killed  # a kill may come between training and the result
        assert 2 * runs <= text.count('images/s') <= 2 * runs + killed
        assert_same_outcome(shared, alone)  # the table of the last one to finish is that of a single process,
        for path in alone.rglob('curves.png'):  # and so are its pictures
            assert (shared / path.relative_to(alone)).read_bytes() == path.read_bytes(), path
        left -= max(killed, 1)


@unix
def test_processes_that_start_at_once_share_a_folder_if_and_only_if_their_constants_are_the_same(tmp_path):
    sizes, logs = ['20', '40', '20'], [tmp_path / f'{i}.log' for i in range(3)]
    assert end([start(tmp_path, log, '--experiment', 'Q2a', '--num-epochs', '1', '--batch-size', size, pause=1)
                for size, log in zip(sizes, logs, strict=True)]) == [0] * 3
    assert '\n'.join(log.read_text() for log in logs).count('epoch   1/1') == 4
    folders = sorted((tmp_path / 'ex3_convnet').iterdir())
    assert [folder.name for folder in folders] == ['Q2a', 'Q2a-2']
    found = [{json.loads(path.read_text())['batch_size'] for path in folder.rglob('config.json')} for folder in folders]
    assert sorted(found, key=min) == [{20}, {40}]
    for folder in folders:
        assert [result.run for result in read_csv(Result, folder / 'summary.csv')] == ['plain', 'batch norm']


def test_a_folder_is_taken_with_all_its_runs_before_the_first_one_is_trained(tmp_path, monkeypatch, cheap):
    def other():
        with monkeypatch.context() as patch:
            rows = {'plain': {}, 'batch norm': dict(norm_layer='BN', dropout=0.1)}  # differs in what is still to come
            patch.setitem(ex3_convnet.QUESTIONS, 'Q2a', Question('?', rows))
            assert convnet(tmp_path, '--experiment', 'Q2a', '--num-epochs', 1) == 0
    at_call(monkeypatch, training, 'train_epoch', 1, other)
    assert convnet(tmp_path, '--experiment', 'Q2a', '--num-epochs', 1) == 0
    dropout = [json.loads((tmp_path / 'ex3_convnet' / name / 'batch-norm/seed0/config.json').read_text())['dropout']
               for name in ('Q2a', 'Q2a-2')]
    assert dropout == [0, 0.1]


@pytest.mark.parametrize('busy', [['plain'], ['plain', 'batch-norm']])
def test_who_finds_runs_in_other_hands_says_so_and_ends_with_what_is_there(tmp_path, capsys, cheap, busy):
    options, folder = ['--experiment', 'Q2a', '--num-epochs', 1], tmp_path / 'ex3_convnet' / 'Q2a'
    names = ['plain', 'batch norm']
    with ExitStack() as held:
        for name in busy:
            held.enter_context(FileLock(folder / '.locks' / f'{name}-seed0'))
        assert convnet(tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert [f'{name}, seed 0: being trained by another process' in printed for name in names] == [True, len(busy) == 2]
    assert [result.run for result in read_csv(Result, folder / 'summary.csv')] == names[len(busy):]
    assert convnet(tmp_path, *options) == 0  # the other one is gone, its run is not finished: it is trained here
    assert [result.run for result in read_csv(Result, folder / 'summary.csv')] == names


def test_a_run_that_others_finish_meanwhile_is_in_the_table_and_not_called_unfinished(tmp_path, monkeypatch, capsys,
                                                                                      cheap):
    folder, lock = tmp_path / 'ex3_convnet' / 'Q2a', ExitStack()
    assert convnet(tmp_path, '--experiment', 'Q2a', '--num-epochs', 1) == 0
    result = folder / 'plain' / 'seed0' / 'result.json'
    result.rename(folder / 'aside')
    lock.enter_context(FileLock(folder / '.locks' / 'plain-seed0'))
    at_call(monkeypatch, experiment.Experiment, 'conclude', 1, lambda: (folder / 'aside').rename(result))
    capsys.readouterr()
    with lock:
        assert convnet(tmp_path, '--experiment', 'Q2a', '--num-epochs', 1) == 0
    assert 'another process' not in capsys.readouterr().out
    assert [result.run for result in read_csv(Result, folder / 'summary.csv')] == ['plain', 'batch norm']


def test_curves_that_a_kill_left_behind_the_weights_are_drawn_when_the_run_continues(tmp_path, monkeypatch, cheap):
    def die():
        raise SystemExit
    monkeypatch.setattr(checkpoint, 'SECONDS_BETWEEN_SAVES', 0)
    monkeypatch.setattr(checkpoint, 'TIMES_AS_LONG', 0)
    monkeypatch.setattr(Figure, 'savefig', describe)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_call(patch, Progress, 'draw', 3, die)
        convnet(tmp_path)
    assert convnet(tmp_path) == 0
    loss, *_ = json.loads((tmp_path / RUN / 'curves.png').read_text())
    assert max(map(len, loss[1])) == 3  # epochs


@unix
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_and_leaves_a_checkpoint(tmp_path, number):
    log, deadline = tmp_path / 'log', time.monotonic() + 120
    child = start(tmp_path, log, '--experiment', 'Q1', '--num-epochs', '100000')
    while not log.exists() or 'epoch   3/' not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, number)
    assert end([child]) == [128 + number]
    assert log.read_text().endswith('\nInterrupted. Run the same command again to continue.\n')
    assert (tmp_path / RUN / 'checkpoint.pt').exists() and (tmp_path / RUN / 'best.pt').exists()
