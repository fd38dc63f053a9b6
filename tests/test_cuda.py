"""On CUDA the whole training step is one graph: the same training as without it. Skipped where there is no GPU.

With and without a graph the same kernels run in the same order on the same random numbers. With cuDNN's
deterministic algorithms the two differ by the rounding of the few sums that the GPU adds up in any order:
a thousandth is allowed for losses, and a hundredth, relative to the largest, for what ten steps make of weights.
"""
import warnings

import pytest
import torch
from torch import nn

import ex3_convnet
import training
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from datasets.cifar10 import Batches, Split
from models.convnet import ConvNet
from training import Average, TrainingStep, decay, fit, make_optimizer, seed_everything, set_learning_rate
from utils import pick_device, pick_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU: the graph of the step cannot run')

DEVICE = 'cuda'
RTOL = 1e-3  # of losses
AUGMENTATIONS = [Flip(0.5), Crop(4), Affine(10, 0.1, 0.1, 5), ColorJitter(0.3, 0.3, 0.3, 0.05), Greyscale(0.2),
                 Cutout(8)]
EVERYTHING = dict(dropout=0.2, augmentations=AUGMENTATIONS, label_smoothing=0.1, ema_decay=0.9)
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


def make_split(count: int, device: str = DEVICE) -> Split:
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
                 torch.randint(0, 10, (count,), generator=generator)).to(torch.device(device))


def make_model(hidden=(32, 64, 64, 64, 64), dropout=0.0, device=DEVICE) -> ConvNet:
    seed_everything(0)
    model = ConvNet(3, hidden, 10, 'BN', dropout)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):  # before batch norm, a bias's gradient is rounding, which Adam would magnify
            layer.bias.requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)


def make_step(use_graph=True, *, precision='fp32', optimizer='Adam', dropout=0.0, augmentations=(), ema_decay=0.0,
              label_smoothing=0.0) -> TrainingStep:
    model = make_model(dropout=dropout).train()
    train = Batches(make_split(640), 64, augmentations=augmentations)
    return TrainingStep(model, train, make_optimizer(optimizer, [dict(params=list(model.parameters()))], 1e-3, 1e-3),
                        precision=precision, label_smoothing=label_smoothing, use_graph=use_graph,
                        average=Average(model, ema_decay) if ema_decay else None)


def losses_of(step: TrainingStep, count: int) -> list[float]:
    """Of the first `count` steps of an epoch, the learning rate changing at each."""
    seed_everything(0, 1)
    losses = []
    for i, index in zip(range(count), step.train.shuffled(), strict=False):
        set_learning_rate(step.optimizer, 2e-3 / (i + 1))
        if step.average:
            step.average.set_step(i)
        loss, _ = step(index)
        losses.append(loss.clone())  # the graph's next replay overwrites it
    return [loss.item() for loss in losses]


def state_of(step: TrainingStep) -> dict[str, torch.Tensor]:
    """Weights, statistics, averages and the optimiser's moments and counts."""
    state = dict(step.model.state_dict())
    if step.average:
        state |= {f'average {key}': value for key, value in step.average.model.state_dict().items()}
    for i, moments in step.optimizer.state_dict()['state'].items():
        state |= {f'{key} {i}': value for key, value in moments.items()}
    return {key: value.detach().double().clone() for key, value in state.items()}


def skip_without(precision: str) -> None:
    if precision == 'bf16' and pick_precision('auto', torch.device(DEVICE))[0] != 'bf16':
        pytest.skip('this GPU has no bf16')


# --- with and without a graph -------------------------------------------------------------------------------


@pytest.mark.parametrize('optimizer', ['Adam', 'SGD'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('options', [{}, EVERYTHING], ids=['plain', 'everything'])
def test_first_ten_losses_and_all_state_equal_those_without_a_graph(options, precision, optimizer):
    skip_without(precision)
    states, losses, random_states = [], [], []
    for use_graph in (False, True):
        step = make_step(use_graph, precision=precision, optimizer=optimizer, **options)
        losses.append(losses_of(step, 10))
        states.append(state_of(step))
        random_states.append(torch.cuda.get_rng_state())
        assert (step.graph is not None) == use_graph
    assert losses[1] == pytest.approx(losses[0], rel=RTOL)
    assert len(set(losses[1])) == 10
    assert torch.equal(*random_states)
    assert states[0].keys() == states[1].keys()
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, rtol=0, atol=10 * RTOL * expected.abs().max().item(),
                                   msg=lambda text, key=key: f'{key}: {text}')


def test_capture_leaves_everything_as_it_would_be_without_it():
    """The fourth call captures: after it, four steps are done, no more and no fewer."""
    steps = [make_step(use_graph, **EVERYTHING) for use_graph in (False, True)]
    random_states = []
    for step in steps:
        losses_of(step, 4)
        random_states.append(torch.cuda.get_rng_state())
    assert torch.equal(*random_states)
    plain, captured = map(state_of, steps)
    for key, expected in plain.items():
        if key.startswith('step') or key.endswith('num_batches_tracked'):
            assert torch.equal(captured[key], expected), key
        else:
            torch.testing.assert_close(captured[key], expected, rtol=0, atol=RTOL * expected.abs().max().item(),
                                       msg=lambda text, key=key: f'{key}: {text}')


@pytest.mark.parametrize('optimizer', ['Adam', 'SGD'])
def test_a_changed_learning_rate_reaches_the_graph(optimizer):
    step = make_step(optimizer=optimizer)
    losses_of(step, 5)
    graph, index = step.graph, torch.arange(64, device=DEVICE)
    parameters = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    weights = [parameter.detach().clone() for parameter in parameters]
    for learning_rate, changed in ((0.0, False), (0.01, True)):
        set_learning_rate(step.optimizer, learning_rate)
        step(index)
        assert [not torch.equal(a, b) for a, b in zip(weights, parameters, strict=True)] == [changed] * len(weights)
    assert step.graph is graph


@pytest.mark.parametrize('options, differ', [({}, False), (dict(dropout=0.3), True)] + [
    (dict(augmentations=[augmentation]), True) for augmentation in AUGMENTATIONS], ids=str)
def test_every_replay_draws_anew_and_a_seed_repeats_it(options, differ):
    step = make_step(**options)
    losses_of(step, 4)
    set_learning_rate(step.optimizer, 0.0)  # so that only what is random can change the loss
    index = torch.arange(64, device=DEVICE)

    def replay(seed: int) -> list[float]:
        seed_everything(seed)
        return [step(index)[0].item() for _ in range(5)]
    first = replay(7)
    assert len(set(first)) == (5 if differ else 1)
    assert replay(7) == pytest.approx(first, rel=1e-6)
    assert (replay(8) != pytest.approx(first, rel=1e-6)) == differ


def test_the_graph_trains_on_the_images_it_is_given():
    step = make_step()
    losses_of(step, 4)
    set_learning_rate(step.optimizer, 0.0)
    indices = torch.arange(640, device=DEVICE).split(64)
    replayed = [[value.item() for value in step(index)] for index in indices]
    expected = [[value.item() for value in step._step(index)] for index in indices]
    for found, wanted in zip(replayed, expected, strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=RTOL)
        assert abs(found[1] - wanted[1]) <= 1
    assert len({loss for loss, _ in replayed}) == len(indices)


def test_no_step_waits_for_the_gpu():
    step = make_step(**EVERYTHING)
    losses_of(step, 4)
    losses = torch.zeros(3, device=DEVICE)
    indices = torch.arange(192, device=DEVICE).split(64)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for i, index in enumerate(indices):
            set_learning_rate(step.optimizer, 1e-3 / (i + 1))
            step.average.set_step(i)
            losses[i], _ = step(index)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert losses.isfinite().all() and losses.all()


def test_no_warning_is_shown():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        losses_of(make_step(), 5)


# --- whole runs ---------------------------------------------------------------------------------------------


def run(folder, *, device=DEVICE, num_epochs=4, optimizer='Adam'):
    """A tiny run with everything random in it -> its history."""
    folder.mkdir(exist_ok=True)
    model = make_model((8, 8, 8, 8, 8), dropout=0.2, device=device)
    train = Batches(make_split(200, device), 50, augmentations=[Flip(0.5), Crop(4)])
    return fit(model, train, Batches(make_split(100, device), 50),
               make_optimizer(optimizer, [dict(params=list(model.parameters()))], 1e-3, 1e-3), decay(1e-3, 0.9),
               num_epochs=num_epochs, seed=3, folder=folder, ema_decay=0.9)


def interrupted_run(folder, monkeypatch, **options):
    """Two whole epochs of four, and a checkpoint."""
    def stop(history, *_):
        if len(history.epochs) == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(training, '_report', stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, **options)
    assert (folder / 'checkpoint.pt').exists()


@pytest.mark.parametrize('optimizer', ['Adam', 'SGD'])
def test_resumed_run_equals_uninterrupted_run_within_rounding(tmp_path, monkeypatch, optimizer):
    whole = run(tmp_path / 'whole', optimizer=optimizer)
    interrupted_run(tmp_path / 'parts', monkeypatch, optimizer=optimizer)
    resumed = run(tmp_path / 'parts', optimizer=optimizer)
    assert resumed['epoch'] == whole['epoch'] == [1, 2, 3, 4]
    for column in ('train_loss', 'val_loss'):
        assert resumed[column] == pytest.approx(whole[column], rel=10 * RTOL), column


@pytest.mark.parametrize('optimizer', ['Adam', 'SGD'])
@pytest.mark.parametrize('before, after', [('cpu', 'cuda'), ('cuda', 'cpu')])
def test_a_run_continues_on_another_device(tmp_path, monkeypatch, before, after, optimizer):
    interrupted_run(tmp_path, monkeypatch, device=before, optimizer=optimizer)
    assert run(tmp_path, device=after, optimizer=optimizer)['epoch'] == [1, 2, 3, 4]


# --- memory -------------------------------------------------------------------------------------------------


def allow(size: float) -> None:
    """Let PyTorch have that many bytes, as on a smaller GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(DEVICE).total_memory))


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_convnet_at_batch_200_fits_a_gpu_of_4_gb(tmp_path, precision):
    skip_without(precision)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False  # as in a run
    allow(SMALL_GPU)
    torch.cuda.reset_peak_memory_stats()
    model = make_model((128, 512, 512, 512, 512))
    history = fit(model, Batches(make_split(1200), 200, augmentations=AUGMENTATIONS), Batches(make_split(1000), 500),
                  make_optimizer('Adam', [dict(params=list(model.parameters()))], 2e-3, 1e-3), decay(2e-3, 0.95),
                  num_epochs=1, seed=0, folder=tmp_path, precision=precision, ema_decay=0.99)
    assert len(history.epochs) == 1
    assert torch.cuda.max_memory_reserved() < SMALL_GPU


def test_too_little_memory_is_one_message_that_names_the_constant_to_lower(tmp_path, capsys):
    allow(1e9)
    status = ex3_convnet.main(['--data', 'shapes', '--batch-size', '1500', '--num-epochs', '1', '--device', DEVICE,
                               '--results', str(tmp_path)])
    assert status == 2
    assert 'batch_size' in capsys.readouterr().err.splitlines()[-1]
