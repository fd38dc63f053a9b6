"""The training loop: `fit`, one epoch of it, one step of that, `evaluate`, learning rates."""
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from datasets.batches import Batches
from lab.checkpoint import Average, Checkpoint
from lab.cuda_graph import Step, replayed
from lab.device import autocast
from lab.files import load_tensors, reading, save_tensors
from lab.history import Epoch, History
from lab.progress import Progress
from optimizers import set_learning_rate

Schedule = Callable[[float], float]  # epochs done, with fractions -> learning rate


def fit(model: nn.Module, batches: Batches, val: Batches, optimizer: Optimizer, schedule: Schedule, folder: Path, *,
        num_epochs: int, seed: int, precision: str = 'fp32', patience: int | None = None, label_smoothing: float = 0.0,
        ema_decay: float = 0.0, freeze_at: float = 1.0, progress: Progress | None = None) -> History:
    """Train `model`; keep history.csv, curves.png, best.pt and last.pt in `folder`; continue a run begun there.

    patience: stop when the best epoch lies that many epochs back; ema_decay: validate and keep averaged weights;
    freeze_at: fraction of the epochs after which the first block no longer trains.
    A loss that is not finite ends the run: see `History.diverged`. On KeyboardInterrupt the epoch in progress is
    discarded, all before it saved. Raises DamagedFile for a checkpoint that cannot be read, OSError when the
    folder cannot be written.
    """
    average = Average(model, ema_decay) if ema_decay else None
    train_step = make_step(model, optimizer, precision, label_smoothing, average)
    progress = progress or Progress()
    with Checkpoint(folder, model, optimizer, average, progress) as checkpoint:
        history = checkpoint.history  # of an interrupted run, or empty
        progress.start(num_epochs, len(history.epochs), len(batches) * batches.batch_size)
        for epoch in range(len(history.epochs) + 1, num_epochs + 1):
            if history.stopped_early(patience):  # Q2b
                break
            if epoch > round(freeze_at * num_epochs) and next(model.parameters()).requires_grad:
                model.features[:2].requires_grad_(False)  # no backward pass through the largest images any more
                train_step = make_step(model, optimizer, precision, label_smoothing, average)  # another CUDA graph
            seed_everything(seed, epoch)  # so that an epoch can be repeated exactly
            start = time.perf_counter()
            losses, accuracy = train_epoch(model, batches, optimizer, schedule, train_step, epoch, progress)
            seconds = time.perf_counter() - start
            val_loss, val_accuracy = evaluate(checkpoint.judged, val, precision)
            if where := first_not_finite(losses, val_loss):
                history.diverged = f'epoch {epoch}, {where}'
                break
            history.epochs.append(Epoch(
                epoch, schedule(epoch - 1), sum(losses) / len(losses), accuracy, val_loss, val_accuracy, seconds,
                len(batches) * batches.batch_size / seconds))
            progress.end_epoch(history)
            checkpoint.end_epoch()
    return history


def train_epoch(model: nn.Module, batches: Batches, optimizer: Optimizer, schedule: Schedule, train_step: Step,
                epoch: int, progress: Progress) -> tuple[list[float], float]:
    """Once over the training images -> (mean loss of every step, accuracy in [0, 1])."""
    losses = torch.zeros(len(batches), device=batches.device)
    correct = torch.zeros(len(batches), device=batches.device)
    model.train()
    for step, (images, labels) in enumerate(progress.steps(batches, epoch, losses, correct)):
        set_learning_rate(optimizer, schedule(epoch - 1 + step / len(batches)))
        losses[step], correct[step] = train_step(images, labels)
    return losses.tolist(), correct.mean().item() / batches.batch_size  # waits for the GPU, once per epoch


def make_step(model: nn.Module, optimizer: Optimizer, precision: str = 'fp32', label_smoothing: float = 0.0,
              average: Average | None = None) -> Step:
    """The training step: (images, labels) -> (mean loss, number classified right), as tensors on the device."""
    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(images.device, precision):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if average:
            average.update()
        with torch.no_grad():
            plain_loss = F.cross_entropy(logits, labels) if label_smoothing else loss.detach()
            return plain_loss, (logits.argmax(1) == labels).sum()

    on_cuda = next(model.parameters()).device.type == 'cuda'
    return replayed(step, optimizer) if on_cuda else step


@torch.no_grad()
def infer(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str = 'fp32') -> tuple[Tensor, Tensor]:
    """(logits (N, classes) float, labels (N,)) of every example of `batches`, in evaluation mode."""
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with autocast(images.device, precision):
            logits.append(model(images).float())
        labels.append(targets)
    model.train(was_training)
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]],
             precision: str = 'fp32') -> tuple[float, float]:
    """(mean loss, accuracy in [0, 1]) over every example of `batches`, in evaluation mode."""
    logits, labels = infer(model, batches, precision)
    return F.cross_entropy(logits, labels).item(), accuracy(logits, labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """(N, classes), (N,) -> the share of examples whose largest logit is that of their label."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def evaluate_kept(model: nn.Module, history: History, folder: Path, evaluation: dict[str, Batches], precision: str,
                  label: str = '') -> dict[str, float]:
    """Evaluate the best and the latest model of a run on every set (Q2b): {'best_train_accuracy': 0.93, ...}.

    Keeps the best model's logits on the test images in test_logits.pt. A run that diverged has no latest model, and
    without a whole epoch no best one. `model` ends up with the weights evaluated last. Raises DamagedFile.
    """
    accuracies = {}
    kept = [] if not history.epochs else ['best'] if history.diverged else ['best', 'last']
    for which in kept:
        if which == 'last' and history.best is history.epochs[-1]:  # the same weights
            return accuracies | {key.replace('best', 'last'): value for key, value in accuracies.items()}
        with reading(folder / f'{which}.pt'):
            model.load_state_dict(load_tensors(folder / f'{which}.pt', next(model.parameters()).device))
        for part, batches in evaluation.items():
            bar = tqdm(batches, f'{label}: {which} model, {part} images', disable=None, leave=False)
            logits, labels = infer(model, bar, precision)
            accuracies[f'{which}_{part}_accuracy'] = accuracy(logits, labels)
            if (which, part) == ('best', 'test'):
                save_tensors({'logits': logits, 'labels': labels}, folder / 'test_logits.pt')
    return accuracies


def first_not_finite(losses: list[float], val_loss: float) -> str:
    """'step 17', 'validation' or '' where all losses are finite."""
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            return f'step {step}'
    return '' if math.isfinite(val_loss) else 'validation'


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed all generators from (seed, epoch); epoch 0 is the initialisation. So nothing random needs storing."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


# --- learning rates -----------------------------------------------------------------------------------------


def make_schedule(name: str, learning_rate: float, learning_rate_decay: float, num_epochs: int,
                  warmup: float) -> Schedule:
    """The schedule 'decay' or 'one-cycle'."""
    return (one_cycle(learning_rate, num_epochs, warmup) if name == 'one-cycle'
            else decay(learning_rate, learning_rate_decay))


def decay(learning_rate: float, learning_rate_decay: float) -> Schedule:
    """The learning rate is multiplied by `learning_rate_decay` after each epoch."""
    return lambda epochs: learning_rate * learning_rate_decay ** int(epochs)


def one_cycle(learning_rate: float, num_epochs: int, warmup: float = 0.2) -> Schedule:
    """Up to the peak in a fraction `warmup` of the run, then straight down to zero."""
    peak = warmup * num_epochs
    return lambda epochs: learning_rate * min(epochs / peak if peak else 1, (num_epochs - epochs) / (num_epochs - peak))
