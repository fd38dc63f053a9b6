"""SIGKILL at random moments: a training started again until it is done ends like one that was never interrupted.

    pytest tests/test_kill.py -s --kills 100
"""
import functools
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tiny import TINY, TINY_NET, assert_same_outcome
from tqdm import tqdm

import ex3_convnet
import training
from datasets import cifar10
from lab import checkpoint, errors, experiment, files, progress, run

OPTIONS = [*TINY, *TINY_NET, '--experiment', 'Q2b', '--seeds', '0', '--ema-decay', '0.5', '--dropout', '0.1']
EPOCHS = 6  # two runs of three

# What a training is doing, as far as a kill is concerned: the calls that the child announces.
ANNOUNCED = {
    'reading data': [(cifar10, 'load')],
    'building': [(ex3_convnet, 'make_model')],
    'loading a checkpoint': [(checkpoint, 'load_tensors')],
    'training': [(training, 'set_learning_rate')],
    'evaluating': [(training, 'infer')],
    'plotting': [(errors, 'drawn'), (experiment, 'drawn'), (progress, 'drawn')],
    'writing': [(module, 'write_atomically') for module in (checkpoint, experiment, files, run)] + [(os, 'fsync')],
    'moving into place': [(os, 'replace')],
    'deleting a checkpoint': [(Path, 'unlink')],
}


def train(folder: Path, announcements: Connection) -> None:
    """The child: a whole experiment, with a checkpoint after every epoch."""
    checkpoint.SECONDS_BETWEEN_SAVES = checkpoint.TIMES_AS_LONG = 0
    tqdm.set_lock(threading.RLock())  # its own lock is a system resource that a killed process leaves behind
    for phase, calls in ANNOUNCED.items():
        for owner, name in calls:
            setattr(owner, name, announcing(getattr(owner, name), functools.partial(announcements.send, phase)))
    with open(f'{folder}.log', 'a', buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        sys.exit(ex3_convnet.main([*OPTIONS, '--results', str(folder)]))


def announcing(function, announce):
    def call(*args, **kwargs):
        announce()
        return function(*args, **kwargs)
    return call


def run_and_kill(folder: Path, phase: str, number: int, delay: float) -> tuple[Counter, bool]:
    """Train; kill `delay` seconds after the phase began for the `number`th time -> (phases begun, was it killed?)."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['ex3_convnet'])  # torch is imported once, not for every child
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=train, args=(folder, sender))
    child.start()
    sender.close()
    begun = Counter(['starting'])
    try:
        while begun[phase] < number:
            begun[receiver.recv()] += 1
        time.sleep(delay)
        child.kill()
    except EOFError:  # it ended before
        pass
    child.join()
    assert child.exitcode in (0, -9), Path(f'{folder}.log').read_text()
    return begun, child.exitcode != 0


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL and no forkserver')
def test_a_training_killed_at_any_moment_ends_like_one_never_interrupted(tmp_path, request):
    begun, _ = run_and_kill(tmp_path / 'whole', 'never', number=1, delay=0)
    rng = random.Random(0)
    killed, experiments, continued = Counter(), 0, 0
    while killed.total() < request.config.getoption('--kills'):
        experiments += 1
        folder, kills, was_killed = tmp_path / f'killed{experiments}', 0, True
        while was_killed:
            # first in training, where a restart has to continue, then anywhere
            phase = rng.choice(['starting', *ANNOUNCED]) if kills else 'training'
            number = rng.randint(1, max(1, begun[phase]))
            _, was_killed = run_and_kill(folder, phase, number, delay=rng.choice([0, rng.uniform(0, 0.02)]))
            kills += was_killed
            killed[phase] += was_killed
        assert_same_outcome(folder, tmp_path / 'whole')
        log = Path(f'{folder}.log').read_text()
        assert EPOCHS <= log.count('images/s') <= EPOCHS + kills  # a line an epoch: a kill costs the one under way
        continued += log.count('continues after epoch')
    assert continued
    print(f'\n{killed.total()} kills and as many restarts in {experiments} experiments: nothing lost. Killed while')
    print('\n'.join(f'{count:>5} {phase}' for phase, count in (+killed).most_common()))
