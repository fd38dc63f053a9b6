"""The CUDA graph of the training step and the progress of a GPU, imitated on the CPU."""
import itertools
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from recording import noise
from test_training import assert_same_tensors
from torch import nn

from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from datasets.batches import Batches
from lab.checkpoint import Average
from lab.cuda_graph import replayed
from lab.history import Epoch, History
from lab.progress import Progress
from models.convnet import ConvNet
from optimizers import make_optimizer, set_learning_rate
from training import make_step, seed_everything

AUGMENTATIONS = [Flip(0.5), Crop(4), Affine(10, 0.1, 0.1, 5), ColorJitter(0.3, 0.3, 0.3, 0.05), Greyscale(0.2),
                 Cutout(8)]
WAITS = []  # (the stream that waited, the stream it waited for), of all tests: the stream is made once


# --- a training with everything on, here and on a GPU -------------------------------------------------------


def make_training(device='cpu', optimizer='Adam', precision='fp32'):
    """What ten steps need: on CUDA `step` is replayed as a graph, `ordinary` never is."""
    seed_everything(0)
    model = ConvNet(3, [8] * 5, 12, 'BN', dropout=0.2).to(device, memory_format=torch.channels_last).train()
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):  # before batch norm, a bias's gradient is rounding, which Adam would magnify
            layer.bias.requires_grad_(False)
    optimizer, average = make_optimizer(optimizer, model, 1e-3, 1e-3, precision=precision), Average(model, 0.9)
    step = make_step(model, optimizer, precision, 0.1, average)
    batches = Batches(noise(320, 0).to(torch.device(device)), 32, augmentations=AUGMENTATIONS, shuffle=True)
    return SimpleNamespace(model=model, average=average, optimizer=optimizer, batches=batches, step=step,
                           ordinary=step if device == 'cpu' else step.step)


def take(training, step, count):
    """Take the first `count` steps of an epoch, the learning rate changing at each -> [(loss, number right), ...]."""
    seed_everything(0, 1)
    results = []
    for i, (images, labels) in zip(range(count), training.batches, strict=False):
        set_learning_rate(training.optimizer, 2e-3 / (i + 1))
        results.append([value.clone() for value in step(images, labels)])  # the graph's next replay overwrites them
    return [(loss.item(), correct.item()) for loss, correct in results]


def state_of(training):
    """Weights, statistics, averages and the optimiser's moments and counts."""
    state = dict(training.model.state_dict()) | {'updates': training.average.updates}
    state |= {f'average {key}': tensor for key, tensor in training.average.model.state_dict().items()}
    for i, moments in training.optimizer.state_dict()['state'].items():
        state |= {f'{key} {i}': tensor for key, tensor in moments.items() if tensor is not None}
    return {key: tensor.detach().double().clone() for key, tensor in state.items()}


# --- a graph imitated ---------------------------------------------------------------------------------------


class Graph:
    """Keeps what was captured, which runs nothing; `replay` runs it on the tensors that it was captured with."""

    def replay(self):
        for result, value in zip(self.results, self.step(*self.inputs), strict=True):
            result.copy_(value)


class Capture:
    """torch.cuda.graph: to leave it after an error of CUDA fails, which hides the real reason behind another."""
    current, generator_usable = None, True  # after any error, the next random number would be one, too

    def __init__(self, graph, stream):
        assert stream.name == 'own'
        self.graph = graph

    def __enter__(self):
        Capture.current, Capture.generator_usable = self.graph, False

    def __exit__(self, kind, error, traceback):
        Capture.current, Capture.generator_usable = None, error is None
        if isinstance(error, RuntimeError):
            raise RuntimeError('CUDA error: operation failed due to a previous error during capture\nCompile with ...')


@pytest.fixture
def fake_cuda(monkeypatch):
    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: WAITS.append((name, other.name)))

    generator = SimpleNamespace(clone_state=lambda: True, manual_seed=lambda seed: None,
                                graphsafe_set_state=lambda state: setattr(Capture, 'generator_usable', state))
    fakes = dict(Stream=lambda device: stream('own'), current_stream=lambda device: stream('current'), CUDAGraph=Graph,
                 stream=lambda stream: nullcontext(), graph=Capture, default_generators=defaultdict(lambda: generator))
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    WAITS.clear()


def imitate(training, fails=None):
    """(the step of a training, replayed as an imitated graph; a list of what each call of the step did)."""
    done = []

    def step(images, labels):
        graph = Capture.current
        done.append('capture' if graph else 'step')
        if not graph:
            return training.ordinary(images, labels)
        assert all(parameter.grad is None for parameter in training.model.parameters())  # they will live in its memory
        if fails:
            raise fails
        graph.step, graph.inputs = training.ordinary, (images, labels)
        graph.results = torch.zeros(()), torch.zeros((), dtype=int)
        return graph.results
    return replayed(step, training.optimizer), done


@pytest.mark.parametrize('fails, why', [
    (None, ''),
    (RuntimeError('operation not permitted when stream is capturing'), '(RuntimeError: CUDA error: operation failed'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), '(out of memory)'),
    (ValueError('no'), '(ValueError: no)')])
def test_the_fourth_step_is_captured_and_training_goes_on_as_without_a_graph_even_if_that_fails(
        fake_cuda, capsys, fails, why):
    expected, found = make_training(), make_training()
    step, done = imitate(found, fails)
    assert take(found, step, 7) == take(expected, expected.step, 7)
    assert_same_tensors(state_of(found), state_of(expected))
    assert done == ['step'] * 3 + ['capture'] + ['step'] * (4 if fails else 0)  # a replay calls nothing
    assert list(WAITS) == [('own', 'current'), ('current', 'own')] * 7
    assert Capture.generator_usable
    printed = capsys.readouterr().out
    assert printed.count('could not be captured as a CUDA graph') == printed.count('\n') == bool(fails)
    assert why in printed


def test_ctrl_c_while_capturing_passes_through(fake_cuda):
    training = make_training()
    with pytest.raises(KeyboardInterrupt):
        take(training, imitate(training, fails=KeyboardInterrupt())[0], 7)


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_only_steps_on_cuda_become_a_graph(device):
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=SimpleNamespace(type=device))]))
    assert isinstance(make_step(model, None), replayed) == (device == 'cuda')


# --- the bar and the time to come ---------------------------------------------------------------------------


def bar_of(progress, device, monkeypatch):
    """An epoch's 65 batches of 7 pass, and it ends -> what the bar, the events and the batches did, in order."""
    done, numbers = [], itertools.count(1)

    def event():
        number = next(numbers)
        return SimpleNamespace(record=lambda stream: done.append(f'record {number}, {stream}'),
                               synchronize=lambda: done.append(f'wait for {number}'))
    monkeypatch.setattr(torch.cuda, 'Event', event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda on: on.type)  # of the run's GPU, not of the first one
    progress.start(2, 0, 65 * 7)
    progress.bar = SimpleNamespace(n=280, update=lambda images: done.append(f'bar {images}'),
                                   set_postfix_str=lambda text, refresh: done.append(text))
    losses, correct = ((torch.zeros(65), torch.zeros(65)) if device == 'cpu' else
                       [SimpleNamespace(device=SimpleNamespace(type=device))] * 2)  # to read these is an error
    for number, _ in enumerate(progress.steps([(None, range(7))] * 65, 1, losses, correct)):
        done.append(f'batch {number + 1}')
        if device == 'cpu':
            losses[number], correct[number] = 0.5, 3.5
    progress.end_epoch(History([Epoch(1, 0.1, 0.4, 0.6, 1.0, 0.5, 1.0, 455.0)]))
    return done


def test_on_a_gpu_the_bar_moves_every_twenty_steps_and_at_most_forty_are_queued(monkeypatch):
    done = bar_of(Progress('run'), 'cuda', monkeypatch)
    assert [entry for entry in done if not entry.startswith('batch')] == [
        'record 1, cuda', 'record 2, cuda', 'wait for 1', 'epoch 1/2', 'bar 140',
        'record 3, cuda', 'wait for 2', 'epoch 1/2', 'bar 140', 'epoch 1/2, loss 0.400, accuracy 60.0%', 'bar 175']
    assert [done[done.index(f'record {n}, cuda') - 1] for n in (1, 2, 3)] == ['batch 20', 'batch 40', 'batch 60']


def test_on_the_cpu_the_bar_moves_at_every_step_and_after_ten_the_time_to_come_is_told(monkeypatch, capsys):
    clock = iter(range(0, 10**6, 30))  # each look at it takes half a minute: three seconds for each of ten steps
    monkeypatch.setattr('lab.progress.time', SimpleNamespace(perf_counter=lambda: next(clock)))
    done = bar_of(Progress('run', later_epochs=370, sooner='--experiment fast, or '), 'cpu', monkeypatch)
    assert done.count('bar 7') == 65 and done.count('epoch 1/2, loss 0.500, accuracy 50.0%') == 65
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == 'run: 6 min left, 20 h 08 min in all'  # 195 s an epoch: 1.85 epochs, and 370 more
    assert second == ('To see something sooner: --experiment fast, or --num-training 5000 --num-epochs 3, which takes '
                      'about 1 h 47 min per run.')
