"""On CUDA the training step is one graph: the same training as without it. Skipped where there is no GPU.

With and without a graph the same kernels run in the same order on the same random numbers. With cuDNN's
deterministic algorithms the two differ by the rounding of the few sums that the GPU adds up in any order:
a thousandth is allowed for losses, and a hundredth, relative to the largest, for what ten steps make of weights.
"""
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ex3_convnet
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from datasets.batches import Batches, Split
from lab.checkpoint import Average
from lab.device import pick_device, pick_precision
from lab.progress import Progress
from models.convnet import ConvNet
from optimizers import make_optimizer, set_learning_rate
from training import decay, fit, make_step, seed_everything

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU: the graph of the step cannot run')

DEVICE = 'cuda'
RTOL = 1e-3  # of losses
AUGMENTATIONS = [Flip(0.5), Crop(4), Affine(10, 0.1, 0.1, 5), ColorJitter(0.3, 0.3, 0.3, 0.05), Greyscale(0.2),
                 Cutout(8)]
EVERYTHING = dict(dropout=0.2, augmentations=AUGMENTATIONS, label_smoothing=0.1, ema_decay=0.9)
OPTIMIZERS = ['Adam', 'SGD', 'Muon']
SMALL_GPU = 3.5e9  # bytes: 4 GB, less what the CUDA context takes


@pytest.fixture(autouse=True)
def deterministic():
    """The same algorithms with and without a graph; cuDNN's search may choose others each time."""
    pick_device(DEVICE)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def make_split(count, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
                 torch.randint(0, 10, (count,), generator=generator)).to(torch.device(device))


def make_model(hidden=(32, 64, 64, 64, 64), dropout=0.0, device=DEVICE):
    seed_everything(0)
    model = ConvNet(3, hidden, 10, 'BN', dropout)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):  # before batch norm, a bias's gradient is rounding, which Adam would magnify
            layer.bias.requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)


def make_training(graph=True, *, precision='fp32', optimizer='Adam', dropout=0.0, augmentations=(), ema_decay=0.0,
                  label_smoothing=0.0):
    """Everything that a step needs; `step` is replayed as a graph or not."""
    model = make_model(dropout=dropout).train()
    average = Average(model, ema_decay) if ema_decay else None
    optimizer = make_optimizer(optimizer, model, 1e-3, 1e-3, precision=precision)
    step = make_step(model, optimizer, precision, label_smoothing, average)
    return SimpleNamespace(model=model, average=average, optimizer=optimizer, step=step if graph else step.step,
                           batches=Batches(make_split(640), 64, augmentations=augmentations, shuffle=True))


def losses_of(training, count):
    """Of the first `count` steps of an epoch, the learning rate changing at each."""
    seed_everything(0, 1)
    losses = []
    for i, (images, labels) in zip(range(count), training.batches, strict=False):
        set_learning_rate(training.optimizer, 2e-3 / (i + 1))
        losses.append(training.step(images, labels)[0].clone())  # the graph's next replay overwrites it
    return [loss.item() for loss in losses]


def state_of(training):
    """Weights, statistics, averages and the optimiser's moments and counts."""
    state = dict(training.model.state_dict())
    if training.average:
        state |= {f'average {key}': value for key, value in training.average.model.state_dict().items()}
        state['updates'] = training.average.updates
    for i, moments in training.optimizer.state_dict()['state'].items():
        state |= {f'{key} {i}': value for key, value in moments.items() if value is not None}
    return {key: value.detach().double().clone() for key, value in state.items()}


def assert_close(found, expected, rtol):
    """Within rtol of the largest; what is counted is equal."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        counted = key.startswith(('step', 'count', 'updates')) or key.endswith('num_batches_tracked')
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0 if counted else rtol * tensor.abs().max().item(),
                                   msg=lambda text, key=key: f'{key}: {text}')


def skip_without(precision):
    if precision == 'bf16' and pick_precision('auto', torch.device(DEVICE))[0] != 'bf16':
        pytest.skip('this GPU has no bf16')


# --- with and without a graph -------------------------------------------------------------------------------


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('options', [{}, EVERYTHING], ids=['plain', 'everything'])
@pytest.mark.parametrize('steps', [4, 10])  # the fourth captures: after it, four steps are done, no more and no fewer
def test_losses_state_and_random_numbers_equal_those_without_a_graph(options, precision, optimizer, steps):
    skip_without(precision)
    without, graph = [make_training(use, precision=precision, optimizer=optimizer, **options) for use in (False, True)]
    losses, random_states = [], []
    for training in (without, graph):
        losses.append(losses_of(training, steps))
        random_states.append(torch.cuda.get_rng_state())
    assert losses[1] == pytest.approx(losses[0], rel=RTOL)
    assert len(set(losses[1])) == steps and isinstance(graph.step.graph, torch.cuda.CUDAGraph)
    assert torch.equal(*random_states)
    assert_close(state_of(graph), state_of(without), RTOL if steps == 4 else 10 * RTOL)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_changed_learning_rate_reaches_the_graph(optimizer):
    training = make_training(optimizer=optimizer)
    losses_of(training, 5)
    graph, (images, labels) = training.step.graph, next(iter(training.batches))
    if optimizer == 'Muon':  # scales its filters at any learning rate: once, then only rounding is left
        set_learning_rate(training.optimizer, 0.0)
        training.step(images, labels)
    parameters = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    weights = [parameter.detach().clone() for parameter in parameters]
    for learning_rate, changed in ((0.0, False), (0.01, True)):
        set_learning_rate(training.optimizer, learning_rate)
        training.step(images, labels)
        for before, now in zip(weights, parameters, strict=True):
            assert torch.allclose(before, now, rtol=1e-5, atol=1e-7) != changed
    assert training.step.graph is graph


@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_every_replay_draws_its_dropout_anew_and_a_seed_repeats_it(dropout):
    training = make_training(dropout=dropout)
    losses_of(training, 4)
    set_learning_rate(training.optimizer, 0.0)  # so that only what is random can change the loss
    images, labels = next(iter(training.batches))

    def replay(seed):
        seed_everything(seed)
        return [training.step(images, labels)[0].item() for _ in range(5)]
    first = replay(7)
    assert len(set(first)) == (5 if dropout else 1)
    assert replay(7) == pytest.approx(first, rel=1e-6)
    assert (replay(8) != pytest.approx(first, rel=1e-6)) == bool(dropout)


def test_augmentation_draws_anew_at_every_step_outside_the_graph():
    batches = make_training(augmentations=[Crop(4)]).batches
    rows = batches.split.images[:1].expand(64, -1, -1, -1)
    first, second = batches.inputs(rows), batches.inputs(rows)
    assert len(first.flatten(1).unique(dim=0)) > 20 and not torch.equal(first, second)


def test_the_graph_trains_on_the_images_it_is_given():
    training = make_training()
    losses_of(training, 4)
    set_learning_rate(training.optimizer, 0.0)
    batches = list(training.batches)
    replayed = [[value.item() for value in training.step(*batch)] for batch in batches]
    expected = [[value.item() for value in training.step.step(*batch)] for batch in batches]
    for found, wanted in zip(replayed, expected, strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=RTOL) and abs(found[1] - wanted[1]) <= 1
    assert len({loss for loss, _ in replayed}) == len(batches)


def test_no_step_waits_for_the_gpu_and_the_bar_moves_all_the_same(monkeypatch):
    training, progress, moved = make_training(**EVERYTHING), Progress('run'), []
    losses_of(training, 4)
    batches = Batches(make_split(3200), 64, augmentations=AUGMENTATIONS, shuffle=True)  # 50 steps
    progress.start(1, 0, 3200)
    monkeypatch.setattr(progress, 'bar', SimpleNamespace(update=moved.append, set_postfix_str=lambda *_, **__: None))
    losses, correct = torch.zeros(50, device=DEVICE), torch.zeros(50, device=DEVICE)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for step, (images, labels) in enumerate(progress.steps(batches, 1, losses, correct)):
            set_learning_rate(training.optimizer, 1e-3 / (step + 1))
            losses[step], correct[step] = training.step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert losses.isfinite().all() and losses.all() and moved == [20 * 64]


def test_no_warning_is_shown():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        losses_of(make_training(), 5)


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(capsys):
    """With the same random numbers: torch's generator has to survive the capture that failed."""
    expected = losses_of(make_training(graph=False, **EVERYTHING), 8)
    training = make_training(**EVERYTHING)
    ordinary = training.step.step

    def waiting(images, labels):
        loss, correct = ordinary(images, labels)
        loss.item()  # which no graph can hold
        return loss, correct
    training.step.step = waiting
    assert losses_of(training, 8) == pytest.approx(expected, rel=RTOL)
    assert capsys.readouterr().out.count('could not be captured as a CUDA graph') == 1


# --- whole runs ---------------------------------------------------------------------------------------------


def run(folder, *, device=DEVICE, optimizer='Adam'):
    """A tiny run with everything random in it -> its history."""
    folder.mkdir(exist_ok=True)
    model = make_model((8, 8, 8, 8, 8), dropout=0.2, device=device)
    train = Batches(make_split(200, device), 50, augmentations=[Flip(0.5), Crop(4)], shuffle=True)
    return fit(model, train, Batches(make_split(100, device), 50), make_optimizer(optimizer, model, 1e-3, 1e-3),
               decay(1e-3, 0.9), folder, num_epochs=4, seed=3, ema_decay=0.9, freeze_at=0.75)


def interrupted_run(folder, monkeypatch, **options):
    """Two whole epochs of four, and a checkpoint."""
    def stop(progress, history):
        if len(history.epochs) == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Progress, 'end_epoch', stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, **options)
    assert (folder / 'checkpoint.pt').exists()


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_resumed_run_equals_uninterrupted_run_within_rounding(tmp_path, monkeypatch, optimizer):
    whole = run(tmp_path / 'whole', optimizer=optimizer)
    interrupted_run(tmp_path / 'parts', monkeypatch, optimizer=optimizer)
    resumed = run(tmp_path / 'parts', optimizer=optimizer)
    assert resumed['epoch'] == whole['epoch'] == [1, 2, 3, 4]
    for column in ('train_loss', 'val_loss'):
        assert resumed[column] == pytest.approx(whole[column], rel=10 * RTOL), column


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('before, after', [('cpu', 'cuda'), ('cuda', 'cpu')])
def test_a_run_continues_on_another_device(tmp_path, monkeypatch, before, after, optimizer):
    interrupted_run(tmp_path, monkeypatch, device=before, optimizer=optimizer)
    assert run(tmp_path, device=after, optimizer=optimizer)['epoch'] == [1, 2, 3, 4]


# --- memory -------------------------------------------------------------------------------------------------


def allow(size):
    """Let PyTorch have that many bytes, as on a smaller GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(DEVICE).total_memory))


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_convnet_at_batch_200_fits_a_gpu_of_4_gb(tmp_path, precision, capsys):
    skip_without(precision)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False  # as in a run
    allow(SMALL_GPU)
    torch.cuda.reset_peak_memory_stats()
    model = make_model((128, 512, 512, 512, 512))
    train = Batches(make_split(1200), 200, augmentations=AUGMENTATIONS, shuffle=True)
    history = fit(model, train, Batches(make_split(1000), 500), make_optimizer('Adam', model, 2e-3, 1e-3),
                  decay(2e-3, 0.95), tmp_path, num_epochs=1, seed=0, precision=precision, ema_decay=0.99)
    assert len(history.epochs) == 1 and 'could not be captured' not in capsys.readouterr().out
    assert torch.cuda.max_memory_reserved() < SMALL_GPU


def test_too_little_memory_is_one_message_that_names_the_constant_to_lower(tmp_path, capsys):
    allow(1e9)
    status = ex3_convnet.main(['--data', 'shapes', '--batch-size', '1500', '--num-epochs', '1', '--device', DEVICE,
                               '--results', str(tmp_path)])
    assert status == 2
    assert 'batch_size' in capsys.readouterr().err.splitlines()[-1]
