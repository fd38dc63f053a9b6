"""An experiment of seconds, for tests that break it, and the comparison of what two of them leave."""
import csv
import itertools
import json
import multiprocessing
import os
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import ex3_convnet
import ex3_pretrained
from datasets import shapes
from lab import checkpoint
from lab.files import read_csv
from lab.results import Result

TINY = ['--data', 'shapes', '--num-training', '200', '--num-validation', '40', '--batch-size', '20',
        '--num-epochs', '3', '--device', 'cpu', '--precision', 'fp32']
TINY_NET = ['--hidden-size', '4', '4', '4', '4', '4']
TIMED = ('seconds', 'images_per_second')


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, locks apart -> what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*'))
            if path.is_file() and '.locks' not in path.parts}


def outcome(folder: Path) -> dict:
    """The same, without what the clock and the drawing decide."""
    return {name: _untimed(Path(name), content) for name, content in contents(folder).items()}


def _untimed(path: Path, content: bytes) -> object:
    if path.suffix == '.csv':
        return [[value for key, value in row.items() if key not in TIMED]
                for row in csv.DictReader(content.decode().splitlines())]
    if path.name == 'result.json':
        return {key: value for key, value in json.loads(content).items() if key not in TIMED}
    if path.name == 'summary.md':
        return [line.rsplit('|', 2)[0] if line.endswith('|') else line for line in content.decode().splitlines()]
    if path.suffix == '.png':  # whole, but drawn anew: matplotlib may place the same numbers a part of a pixel away
        return content[:8], content[-12:]
    return content


def assert_same_outcome(folder: Path, reference: Path) -> None:
    found, expected = outcome(folder), outcome(reference)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


RUN = Path('ex3_convnet/Q1/ConvNet/seed0')


def results_of(folder: Path) -> list[Result]:
    """The rows of an experiment's table."""
    return read_csv(Result, folder / 'summary.csv')


def convnet(results: Path, *options: object) -> int:
    return ex3_convnet.main([*TINY, *TINY_NET, '--results', str(results), *map(str, options)])


def pretrained(results: Path, *options: object) -> int:
    return ex3_pretrained.main([*TINY, '--layer-config', '512', '4', '--results', str(results), *map(str, options)])


def at_call(patch, owner, name, number, action):
    """Let call `number` (1, 2, ...) of a function begin with something else."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)
    patch.setattr(owner, name, call)


def assert_refused(status, capsys, *words):
    """Status 2 and one line that says what is wrong."""
    errors = capsys.readouterr().err
    assert status == 2
    assert errors.count('\n') == 1 and ': error: ' in errors
    assert [word for word in words if str(word) not in errors] == [], errors


def make_images(root: Path) -> Path:
    """An image folder of two classes: six training images and two test images each, as JPEG."""
    rng = np.random.default_rng(0)
    for name in ('train/ant', 'train/bee', 'test/ant', 'test/bee'):
        (root / name).mkdir(parents=True)
        for i in range(6 if 'train' in name else 2):
            Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(root / name / f'{i}.jpg')
    return root


class OnMeta(TorchDispatchMode):
    """What is computed stays on the device 'meta', whose tensors have no values: to read one is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == 'meta', function
        return result


# --- in a process of its own, which can be killed -----------------------------------------------------------

unix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL and no forkserver')


def start(target, *arguments: object) -> multiprocessing.Process:
    """A process that calls `target`."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['ex3_convnet'])  # torch is imported once, not for every child
    child = context.Process(target=target, args=arguments)
    child.start()
    return child


def train_in_child(results: Path, log: Path, *options: str) -> None:
    """Called in the child: an experiment of few images, with a checkpoint after every epoch."""
    checkpoint.SECONDS_BETWEEN_SAVES = checkpoint.TIMES_AS_LONG = 0
    tqdm.set_lock(threading.RLock())  # its own lock is a system resource that a killed process leaves behind
    make_shapes = shapes.make_shapes
    shapes.make_shapes = lambda n, seed: make_shapes(n // 8, seed)
    with open(log, 'a', buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(convnet(results, *options))
