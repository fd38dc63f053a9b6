"""Options and a fixture of the tests."""
import functools
import os
import signal
import socket

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported: thousands of tiny steps gain nothing by more

import torch
from matplotlib.figure import Figure
from tiny import at_call, convnet

import models.vgg
import training
from datasets import shapes
from lab import answers


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=6, help='how often tests/test_kill.py kills a training (default: 6)')


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture(scope='module')
def cheap():
    """Few images, drawn once, pictures that are not drawn, no waiting for the disk: hundreds run here."""
    few = {seed: shapes.make_shapes(n, seed) for seed, n in ((0, 300), (1, 60))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, 'make_shapes', lambda _n, seed: few[seed])
        patch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))
        patch.setattr(answers, 'plot_mistakes', functools.partial(answers.plot_mistakes, count=1))
        patch.setattr(os, 'fsync', lambda _file: None)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved, to look into."""
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, file, **_: figures.append(figure) or file.write(b'a picture'))
    return figures


@pytest.fixture(scope='module')
def whole(tmp_path_factory, cheap):
    """The results of an experiment that met no fault."""
    folder = tmp_path_factory.mktemp('whole')
    assert convnet(folder) == 0
    return folder


@pytest.fixture(scope='module')
def unfinished(tmp_path_factory, cheap):
    """The results of an experiment that was interrupted in its third epoch."""
    folder = tmp_path_factory.mktemp('unfinished')
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, training, 'set_learning_rate', 25, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert convnet(folder) == 130
    return folder


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A VGG11 with few filters in place of the real one, and the path of weights for it."""
    monkeypatch.setattr(models.vgg, 'cfgs', {'A': [4, 'M', 4, 'M', 4, 4, 'M', 4, 4, 'M', 4, 512, 'M']})
    features = models.vgg.make_layers(models.vgg.cfgs['A'], batch_norm=True)
    torch.save(torch.nn.ModuleDict({'features': features}).state_dict(), tmp_path / 'weights.pt')
    return tmp_path / 'weights.pt'
