"""The CUDA graph of the training step and the progress of a GPU, imitated on the CPU."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from datasets.batches import Batches, Split
from datasets.shapes import make_shapes
from lab.cuda_graph import replayed
from lab.progress import Progress
from models.convnet import ConvNet
from optimizers import make_optimizer, set_learning_rate
from training import make_step, seed_everything

WAITS = []  # (the stream that waited, the stream it waited for)


class Stream:
    def __init__(self, device, name='own'):
        self.name = name

    def wait_stream(self, other):
        WAITS.append((self.name, other.name))


class Graph:
    """Keeps what was captured, which runs nothing; `replay` runs it on the tensors that it was captured with."""

    def replay(self):
        for result, value in zip(self.results, self.step(*self.inputs), strict=True):
            result.copy_(value)


class Generator:
    """A capture that fails leaves it unusable: the next random number would be an error."""
    usable = True

    @staticmethod
    def clone_state():
        return Generator.usable

    @staticmethod
    def graphsafe_set_state(state):
        Generator.usable = state


class Capture:
    """torch.cuda.graph: leaving it fails if anything failed in it, which hides the real reason behind another."""
    current = None

    def __init__(self, graph, stream):
        assert stream.name == 'own'
        self.graph = graph

    def __enter__(self):
        Capture.current, Generator.usable = self.graph, False

    def __exit__(self, kind, error, traceback):
        Capture.current, Generator.usable = None, error is None
        if isinstance(error, Exception):
            raise RuntimeError('CUDA error: operation failed due to a previous error during capture\nCompile with ...')


@pytest.fixture
def fake_cuda(monkeypatch):
    for name, value in (('Stream', Stream), ('CUDAGraph', Graph), ('graph', Capture),
                        ('stream', lambda stream: nullcontext()),
                        ('current_stream', lambda device: Stream(device, 'current')),
                        ('default_generators', {None: Generator})):
        monkeypatch.setattr(torch.cuda, name, value)
    WAITS.clear()
    Generator.usable = True


def train(steps, *, graph, fails=None):
    """Train with or without a graph -> (what each step returned, the final weights, what each call did)."""
    seed_everything(0)
    model = ConvNet(3, [4, 4], 10, 'BN', dropout=0.3).train()
    optimizer = make_optimizer('Adam', model, 1e-3)
    step, done = make_step(model, optimizer), []

    def capturable(images, labels):
        if Capture.current is None:
            done.append('step')
            return step(images, labels)
        done.append('capture')
        assert all(parameter.grad is None for parameter in model.parameters())  # they will live in its memory
        if fails:
            raise fails
        graph = Capture.current
        graph.step, graph.inputs, graph.results = step, (images, labels), (torch.zeros(()), torch.zeros((), dtype=int))
        return graph.results

    call = replayed(capturable, optimizer) if graph else step
    results = []
    for i, (images, labels) in zip(range(steps), Batches(Split(*make_shapes(70, 0)), 10, shuffle=True), strict=False):
        set_learning_rate(optimizer, 1e-3 * (i + 1))
        loss, correct = call(images, labels)
        results.append((loss.item(), correct.item()))
    return results, model.state_dict(), done


def assert_same(found, expected):
    assert found[0] == expected[0]
    for key, tensor in expected[1].items():
        assert torch.equal(found[1][key], tensor), key


def test_three_ordinary_steps_then_one_capture_and_replays_that_train_as_ordinary_steps(fake_cuda, capsys):
    found = train(7, graph=True)
    assert_same(found, train(7, graph=False))
    assert found[2] == ['step'] * 3 + ['capture']  # and four replays, which call nothing
    assert WAITS == [('own', 'current'), ('current', 'own')] * 7
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('fails, why', [
    (RuntimeError('operation not permitted when stream is capturing'), 'RuntimeError: CUDA error: operation failed'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), 'out of memory'),
    (NotImplementedError(), 'RuntimeError: CUDA error')])
def test_a_capture_that_fails_costs_one_line_and_ordinary_steps_go_on(fake_cuda, capsys, fails, why):
    found = train(7, graph=True, fails=fails)
    assert_same(found, train(7, graph=False))
    assert found[2] == ['step'] * 3 + ['capture'] + ['step'] * 4 and Generator.usable
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and f'could not be captured as a CUDA graph ({why}' in printed


def test_ctrl_c_while_capturing_passes_through(fake_cuda):
    with pytest.raises(KeyboardInterrupt):
        train(7, graph=True, fails=KeyboardInterrupt())


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_only_steps_on_cuda_become_a_graph(device):
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=SimpleNamespace(type=device))]))
    assert isinstance(make_step(model, None), replayed) == (device == 'cuda')


def bar_of(progress, device, monkeypatch):
    """The epoch's 65 batches of 7 pass -> what the bar, the events and the batches did, in order."""
    done = []

    class Event:
        def __init__(self):
            self.number = len([entry for entry in done if entry.startswith('record')]) + 1

        def record(self):
            done.append(f'record {self.number}')

        def synchronize(self):
            done.append(f'wait for {self.number}')

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    progress.start(2, 0, 65 * 7)
    progress.bar = SimpleNamespace(update=lambda n: done.append(f'bar {n}'),
                                   set_postfix_str=lambda text, refresh: done.append(text))
    losses, correct = ((torch.full((65,), value) for value in (0.5, 3.5)) if device == 'cpu' else
                       [SimpleNamespace(device=SimpleNamespace(type=device))] * 2)  # to read these is an error
    for number, _ in enumerate(progress.steps([(None, range(7))] * 65, 1, losses, correct), 1):
        done.append(f'batch {number}')
    return done


def test_on_a_gpu_the_bar_moves_every_twenty_steps_and_at_most_forty_are_queued(monkeypatch):
    done = bar_of(Progress('run'), 'cuda', monkeypatch)
    assert [entry for entry in done if not entry.startswith('batch')] == [
        'record 1', 'record 2', 'wait for 1', 'epoch 1/2', 'bar 140', 'record 3', 'wait for 2', 'epoch 1/2', 'bar 140']
    assert [done[done.index(f'record {n}') - 1] for n in (1, 2, 3)] == ['batch 20', 'batch 40', 'batch 60']


def test_on_the_cpu_the_bar_moves_at_every_step_with_loss_and_accuracy(monkeypatch):
    done = bar_of(Progress('run'), 'cpu', monkeypatch)
    assert done.count('bar 7') == 65 and done.count('epoch 1/2, loss 0.500, accuracy 50.0%') == 65


def test_the_time_to_come_is_told_after_ten_steps_and_something_quicker_where_it_is_long(monkeypatch, capsys):
    clock = iter(range(0, 10**6, 30))  # each look at it takes half a minute: three seconds for each of ten steps
    monkeypatch.setattr('lab.progress.time', SimpleNamespace(perf_counter=lambda: next(clock)))
    bar_of(Progress('run', later_epochs=400, sooner='--experiment fast, or '), 'cpu', monkeypatch)
    first, second = capsys.readouterr().out.splitlines()
    assert first == 'run: 6 min left, 21 h 46 min in all'  # 195 s an epoch: 1.85 epochs, and 400 more
    assert second == ('To see something sooner: --experiment fast, or --num-training 5000 --num-epochs 3, which takes '
                      'about 1 h 47 min per run.')
