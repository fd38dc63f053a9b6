"""On CUDA the training step is one graph: the same training as without it. Skipped where there is no GPU.

With and without a graph the same kernels run in the same order on the same random numbers. With cuDNN's
deterministic algorithms the two differ by the rounding of the few sums that the GPU adds up in any order:
a thousandth is allowed for losses, and a hundredth, relative to the largest, for what ten steps make of weights.
"""
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from recording import noise
from test_checkpoint import interrupted_run
from test_graph import AUGMENTATIONS, make_training, state_of, take
from test_training import make_run

import ex3_convnet
from datasets.batches import Batches
from lab.device import MEMORY_TO_SEARCH, pick_device, pick_precision
from lab.progress import Progress
from models.convnet import ConvNet
from optimizers import make_optimizer, set_learning_rate
from training import decay, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU: the graph of the step cannot run')

RTOL = 1e-3  # of losses
OPTIMIZERS = ['Adam', 'SGD', 'Muon']
CONTEXT = 0.5e9  # bytes that CUDA takes for itself


@pytest.fixture(autouse=True)
def deterministic():
    """The same algorithms with and without a graph; cuDNN's search may choose others each time."""
    pick_device('cuda')
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(params=['fp32', 'bf16'])
def precision(request):
    if request.param == 'bf16' and pick_precision('auto', torch.device('cuda'))[0] != 'bf16':
        pytest.skip('this GPU has no bf16')
    return request.param


def allow(size):
    """Let PyTorch have that many bytes, as on a smaller GPU."""
    share = size / torch.cuda.get_device_properties('cuda').total_memory
    if share > 1:
        pytest.skip('this GPU has less memory')
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)


# --- with and without a graph -------------------------------------------------------------------------------


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('steps', [4, 10])  # the fourth captures: after it, four steps are done, no more and no fewer
def test_losses_state_and_random_numbers_equal_those_without_a_graph(precision, optimizer, steps):
    without, graph = make_training('cuda', optimizer, precision), make_training('cuda', optimizer, precision)
    expected = take(without, without.ordinary, steps)
    random_state = torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # nobody is shown any
        found = take(graph, graph.step, steps)
    assert isinstance(graph.step.graph, torch.cuda.CUDAGraph)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=RTOL)
    assert all(abs(ours[1] - theirs[1]) <= 2 for ours, theirs in zip(found, expected, strict=True))
    state, expected_state = state_of(graph), state_of(without)
    assert state.keys() == expected_state.keys()
    for key, tensor in expected_state.items():
        counted = key.startswith(('step', 'count', 'updates')) or key.endswith('num_batches_tracked')
        allowed = 0 if counted else (RTOL if steps == 4 else 10 * RTOL) * tensor.abs().max().item()
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=allowed, msg=lambda text, key=key: f'{key}: {text}')


def test_no_step_waits_for_the_gpu_and_the_bar_moves_all_the_same(monkeypatch):
    training, progress, moved = make_training('cuda'), Progress('run'), []
    take(training, training.step, 4)
    progress.start(1, 0, 50 * 32)
    monkeypatch.setattr(progress, 'bar', SimpleNamespace(update=moved.append, set_postfix_str=lambda *_, **__: None))
    losses, correct = torch.zeros(50, device='cuda'), torch.zeros(50, device='cuda')
    batches = itertools.chain.from_iterable([training.batches] * 5)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for step, (images, labels) in enumerate(progress.steps(batches, 1, losses, correct)):
            set_learning_rate(training.optimizer, 1e-3 / (step + 1))
            losses[step], correct[step] = training.step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert losses.isfinite().all() and losses.all() and moved == [20 * 32]


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(capsys):
    """With the same random numbers: torch's generator has to survive the capture that failed."""
    without, training = make_training('cuda'), make_training('cuda')

    def waiting(images, labels):
        loss, correct = training.ordinary(images, labels)
        loss.item()  # which no graph can hold
        return loss, correct
    training.step.step = waiting
    expected, found = take(without, without.ordinary, 8), take(training, training.step, 8)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=RTOL)
    assert capsys.readouterr().out.count('could not be captured as a CUDA graph') == 1


# --- whole runs, and memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('before, after', [('cuda', 'cuda'), ('cpu', 'cuda'), ('cuda', 'cpu')])
def test_an_interrupted_run_continues_on_any_device(tmp_path, monkeypatch, before, after, optimizer):
    def options(device):
        return dict(model=make_training(device).model, optimizer=optimizer, batch_size=10, freeze_at=0.75,
                    ema_decay=0.9)
    interrupted_run(tmp_path / 'parts', monkeypatch, **options(before))
    resumed, _ = make_run(tmp_path / 'parts', num_epochs=4, **options(after))
    assert resumed['epoch'] == [1, 2, 3, 4]
    assert {weight.device.type for weight in torch.load(tmp_path / 'parts' / 'last.pt').values()} == {'cpu'}
    if before == after:  # equal but for rounding
        whole, _ = make_run(tmp_path / 'whole', num_epochs=4, **options(after))
        for column in ('train_loss', 'val_loss'):
            assert resumed[column] == pytest.approx(whole[column], rel=10 * RTOL), column


@pytest.mark.parametrize('size', [4e9, MEMORY_TO_SEARCH])
def test_the_convnet_at_batch_200_fits_a_small_gpu_and_the_smallest_on_which_cudnn_searches(tmp_path, precision, capsys,
                                                                                          size):
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = size >= MEMORY_TO_SEARCH, False  # as in a run
    allow(size - CONTEXT)
    torch.cuda.reset_peak_memory_stats()
    model = ConvNet(3, (128, 512, 512, 512, 512), 12, 'BN').to('cuda', memory_format=torch.channels_last)
    train, val = noise(1200, 0).to(torch.device('cuda')), noise(1000, 1).to(torch.device('cuda'))
    fit(model, Batches(train, 200, augmentations=AUGMENTATIONS, shuffle=True), Batches(val, 500),
        make_optimizer('Adam', model, 2e-3, 1e-3), decay(2e-3, 0.95), tmp_path, num_epochs=1, seed=0,
        precision=precision, ema_decay=0.99)
    assert 'could not be captured' not in capsys.readouterr().out
    assert torch.cuda.max_memory_reserved() < size


def test_too_little_memory_is_one_message_that_names_the_constant_to_lower(tmp_path, capsys):
    allow(1e9)
    status = ex3_convnet.main(['--data', 'shapes', '--batch-size', '1500', '--num-epochs', '1', '--device', 'cuda',
                               '--results', str(tmp_path)])
    assert status == 2
    assert 'batch_size' in capsys.readouterr().err.splitlines()[-1]
