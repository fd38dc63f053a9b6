"""Several processes on one experiment: every run is trained once, and the last one to finish has the whole table."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from tiny import RUN, TINY, TINY_NET, assert_same_outcome

import ex3_convnet
from lab.constants import slug
from lab.files import read_csv
from lab.results import Result

SCRIPT = Path(ex3_convnet.__file__)
OPTIONS = [*TINY, *TINY_NET, '--experiment', 'Q3a']


def start(folder: Path, log: Path, *options: str) -> subprocess.Popen:
    with log.open('a') as file:
        return subprocess.Popen([sys.executable, str(SCRIPT), *OPTIONS, '--results', str(folder), *options],
                                stdout=file, stderr=subprocess.STDOUT)


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL')
def test_four_processes_train_every_run_once_and_kills_lose_nothing(tmp_path):
    runs = len(ex3_convnet.QUESTIONS['Q3a'].rows)
    alone, shared, logs = tmp_path / 'alone', tmp_path / 'shared', [tmp_path / f'{i}.log' for i in range(4)]
    assert start(alone, tmp_path / 'alone.log').wait(timeout=300) == 0
    processes = [start(shared, log) for log in logs]
    rng, killed = random.Random(0), 0
    for i in (0, 1):  # two of them die while they train, and are started again
        wait_for('epoch   1/3', logs[i])
        time.sleep(rng.uniform(0, 0.1))
        killed += processes[i].poll() is None
        processes[i].kill()
        processes[i].wait(timeout=60)
        processes[i] = start(shared, logs[i])
    assert [process.wait(timeout=300) for process in processes] == [0] * 4
    text = '\n'.join(log.read_text() for log in logs)
    assert runs <= text.count('epoch   3/3') <= runs + killed  # a kill may come between training and the result
    assert 3 * runs <= text.count('images/s') <= 3 * (runs + killed)
    assert_same_outcome(shared, alone)  # the table of the last one to finish is that of a single process


def test_who_finds_a_run_in_other_hands_says_so_and_ends_with_what_is_there(tmp_path, capsys):
    arguments = [*TINY, *TINY_NET, '--experiment', 'Q2a', '--num-epochs', '1', '--results', str(tmp_path)]
    folder = tmp_path / 'ex3_convnet' / 'Q2a'
    (folder / '.locks').mkdir(parents=True)
    with FileLock(folder / '.locks' / f'{slug("plain")}-seed0'):
        assert ex3_convnet.main(arguments) == 0
    assert 'plain, seed 0: being trained by another process' in capsys.readouterr().out
    assert [result.run for result in read_csv(Result, folder / 'summary.csv')] == ['batch norm']
    assert ex3_convnet.main(arguments) == 0  # the other one is gone, its run is not finished: it is trained here
    assert [result.run for result in read_csv(Result, folder / 'summary.csv')] == ['plain', 'batch norm']


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_end_a_process_and_leave_a_checkpoint(tmp_path, number, status):
    log = tmp_path / 'log'
    process = start(tmp_path, log, '--experiment', 'Q1', '--num-epochs', '100000')
    try:
        wait_for('epoch   3/', log)
        process.send_signal(number)
        assert process.wait(timeout=60) == status
    finally:
        process.kill()
    assert log.read_text().endswith('\nInterrupted. Run the same command again to continue.\n')
    assert (tmp_path / RUN / 'checkpoint.pt').exists() and (tmp_path / RUN / 'best.pt').exists()
