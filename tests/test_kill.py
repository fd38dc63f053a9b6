"""SIGKILL at random moments: a training started again until it is done ends like one that was never interrupted.

    pytest tests/test_kill.py -s --kills 100
"""
import functools
import os
import random
import time
from collections import Counter
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from tiny import assert_same_outcome, start, train_in_child, unix

import ex3_convnet
import training
from datasets import cifar10
from lab import checkpoint, errors, experiment, files, progress, run

OPTIONS = ['--experiment', 'Q2b', '--seeds', '0', '--ema-decay', '0.5', '--dropout', '0.1']
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
    """The child: a whole experiment."""
    for phase, calls in ANNOUNCED.items():
        for owner, name in calls:
            setattr(owner, name, announcing(getattr(owner, name), functools.partial(announcements.send, phase)))
    train_in_child(folder, Path(f'{folder}.log'), *OPTIONS)


def announcing(function, announce):
    def call(*args, **kwargs):
        announce()
        return function(*args, **kwargs)
    return call


def run_and_kill(folder: Path, phase: str, number: int, delay: float) -> tuple[Counter, bool]:
    """Train; kill `delay` seconds after the phase began for the `number`th time -> (phases begun, was it killed?)."""
    receiver, sender = Pipe(duplex=False)
    child = start(train, folder, sender)
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


@unix
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
