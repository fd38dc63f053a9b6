"""The training loop: one step, `fit`, `evaluate`, and the checkpoints that let a killed run continue."""
import copy
import csv
import io
import math
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from utils import autocast, first_sentence, is_out_of_memory, plot_curves, write_atomically

SECONDS_BETWEEN_CHECKPOINTS = 10


# --- what is remembered of a run ----------------------------------------------------------------------------


@dataclass
class Epoch:
    """A row of history.csv. Losses are means over examples (cross entropy, no label smoothing)."""
    epoch: int
    learning_rate: float  # of the epoch's first step
    train_loss: float  # during the epoch, in training mode, on augmented images
    train_accuracy: float
    val_loss: float  # after it, in evaluation mode
    val_accuracy: float
    seconds: float  # training alone
    images_per_second: float


@dataclass
class History:
    """What happened, epoch by epoch."""
    epochs: list[Epoch] = field(default_factory=list)
    diverged: str = ''  # 'epoch 3, step 17' where the loss stopped being a number

    def __getitem__(self, column: str) -> list:
        """history['val_loss'] -> one value an epoch."""
        return [getattr(epoch, column) for epoch in self.epochs]

    @property
    def best(self) -> Epoch:
        """The epoch of highest validation accuracy; of equals, of lowest validation loss."""
        return max(self.epochs, key=lambda epoch: (epoch.val_accuracy, -epoch.val_loss))

    def stopped_early(self, patience: int | None) -> bool:
        """Whether the best epoch lies `patience` epochs back (Q2b); never for None."""
        return bool(self.epochs) and patience is not None and self.epochs[-1].epoch - self.best.epoch >= patience

    def to_csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(Epoch)], lineterminator='\n')
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in self.epochs)
        return text.getvalue()

    @classmethod
    def read(cls, path: Path) -> 'History':
        """Read history.csv. Raises ValueError when it is damaged."""
        with reading(path), path.open(newline='') as file:
            return cls([Epoch(**{f.name: f.type(row[f.name]) for f in fields(Epoch)}) for row in csv.DictReader(file)])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or foreign file makes its reader raise into one message, a ValueError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f'{path} is missing, damaged or not of this run ({type(error).__name__}: '
                         f'{first_sentence(error)}): delete {path.parent} to train this run again') from error


# --- learning rate, optimiser, averaging --------------------------------------------------------------------


def decay(learning_rate: float, learning_rate_decay: float) -> Callable[[float], float]:
    """Epochs done -> learning rate, multiplied by `learning_rate_decay` after each epoch."""
    return lambda epochs: learning_rate * learning_rate_decay ** int(epochs)


def one_cycle(learning_rate: float, num_epochs: int, warmup: float = 0.2) -> Callable[[float], float]:
    """Epochs done -> learning rate: up to its peak in a share `warmup` of the run, then straight down to zero."""
    peak = warmup * num_epochs
    return lambda epochs: learning_rate * min(epochs / peak if peak else 1, (num_epochs - epochs) / (num_epochs - peak))


def make_optimizer(name: str, groups: list[dict], learning_rate: float, reg: float) -> Optimizer:
    """'Adam' or 'SGD' (Nesterov momentum 0.9), weight decay `reg`.

    groups: parameter groups with 'params' and optionally 'scale', a factor on the learning rate.
    """
    device = groups[0]['params'][0].device
    on_cuda = device.type == 'cuda'  # there the step is one graph, and a graph reads its learning rate from a tensor
    groups = [{'scale': 1.0, 'lr': torch.tensor(learning_rate, device=device) if on_cuda else learning_rate, **group}
              for group in groups]
    if name == 'Adam':
        return torch.optim.Adam(groups, weight_decay=reg, fused=True, capturable=on_cuda)
    if name == 'SGD':
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=reg, fused=True)
    raise ValueError(f"optimizer must be 'Adam' or 'SGD', got {name!r}")


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group['lr'], Tensor):
            group['lr'].fill_(learning_rate * group['scale'])
        else:
            group['lr'] = learning_rate * group['scale']


class Average:
    """Exponential moving average of a model's weights and, with the same weights, of its batch norm statistics."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.pairs = [(average, current) for average, current in
                      zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
                      if average.is_floating_point()]
        self.step_size = torch.ones((), device=self.pairs[0][0].device)

    def set_step(self, step: int) -> None:
        """Average over fewer steps at first, so that the random start is soon forgotten."""
        self.step_size.fill_(max(1 - self.decay, 9 / (10 + step)))

    def update(self) -> None:
        for average, current in self.pairs:
            average.lerp_(current, self.step_size)


# --- one step -----------------------------------------------------------------------------------------------


class TrainingStep:
    """Batch, forward, backward, update. On CUDA the whole of it is replayed as one graph from the fourth call on.

    The first three calls are ordinary steps on the stream of the capture: they let cuDNN choose its algorithms and
    the optimiser create its state. Capturing runs nothing, so weights, statistics and random state are those of a
    run without a graph.
    """

    def __init__(self, model: nn.Module, train, optimizer: Optimizer, *, precision: str = 'fp32',
                 label_smoothing: float = 0.0, average: Average | None = None, use_graph: bool = True):
        self.model, self.train, self.optimizer, self.average = model, train, optimizer, average
        self.precision, self.label_smoothing = precision, label_smoothing
        self.device = train.device
        self.use_graph = use_graph and self.device.type == 'cuda'
        self.calls, self.graph = 0, None
        if self.use_graph:
            self.stream = _capture_stream(self.device)

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Train on the images `index` (B,); returns the mean loss and the number classified right, as tensors.

        On CUDA the next call overwrites them.
        """
        if not self.use_graph:
            return self._step(index)
        self.calls += 1
        if self.calls == 1:
            self.index = torch.empty_like(index)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.index.copy_(index)
            if self.calls <= 3:
                with warnings.catch_warnings():
                    warnings.filterwarnings('ignore', message='.*capturable=True')  # it will be captured soon
                    self.result = self._step(self.index)
            else:
                if self.graph is None:
                    self.optimizer.zero_grad(set_to_none=True)  # so that gradients live in the graph's memory
                    self.graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graph, stream=self.stream):
                        self.result = self._step(self.index)
                self.graph.replay()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return self.result

    def _step(self, index: Tensor) -> tuple[Tensor, Tensor]:
        inputs, labels = self.train.batch(index)
        with autocast(self.device, self.precision):
            logits = self.model(inputs).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.average:
            self.average.update()
        with torch.no_grad():
            plain_loss = F.cross_entropy(logits, labels) if self.label_smoothing else loss.detach()
            return plain_loss, (logits.argmax(1) == labels).sum()


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]],
             precision: str = 'fp32') -> tuple[float, float]:
    """(mean loss, accuracy in [0, 1]) over every example of `batches`, in evaluation mode."""
    was_training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for inputs, labels in batches:
        with autocast(inputs.device, precision):
            logits = model(inputs).float()
        loss = loss + F.cross_entropy(logits, labels, reduction='sum')  # tensors: read once, at the end
        correct = correct + (logits.argmax(1) == labels).sum()
        count += len(labels)
    model.train(was_training)
    return loss.item() / count, correct.item() / count


# --- the loop -----------------------------------------------------------------------------------------------


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed all generators from (seed, epoch); epoch 0 is the initialisation. So nothing random needs storing."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def fit(model: nn.Module, train, val, optimizer: Optimizer, schedule: Callable[[float], float], *, num_epochs: int,
        seed: int, folder: Path, precision: str = 'fp32', patience: int | None = None, label_smoothing: float = 0.0,
        ema_decay: float = 0.0, title: str = '', source: str = '', epochs_to_come: int = 0) -> History:
    """Train `model` and keep history.csv, curves.png, best.pt and last.pt in `folder`; continue a run begun there.

    train, val: `Batches`; schedule: epochs done (with fractions) -> learning rate; patience: stop when the best
    epoch lies that many epochs back; ema_decay: validate and keep averaged weights; title, source: the run and its
    data, for people; epochs_to_come: of later runs, for the estimate of the time.
    A loss that is not finite ends the run: see `History.diverged`. On KeyboardInterrupt the epoch under way is
    discarded, all before it written. Raises ValueError for a checkpoint that cannot be read, OSError when the
    folder cannot be written.
    """
    average = Average(model, ema_decay) if ema_decay else None
    judged = average.model if average else model  # what is validated and kept
    step = TrainingStep(model, train, optimizer, precision=precision, label_smoothing=label_smoothing, average=average)
    history, best = History(), None
    checkpoint = folder / 'checkpoint.pt'
    if checkpoint.exists():
        best, history = _load_checkpoint(checkpoint, model, judged, optimizer)
        print(f'{title}: continues after epoch {len(history.epochs)}')

    def snapshot() -> dict:
        return {'best': best, 'epochs': [asdict(epoch) for epoch in history.epochs],
                **_clone({'model': model.state_dict(), 'average': average and average.model.state_dict(),
                          'optimizer': optimizer.state_dict()})}

    def save(state: dict) -> None:
        """Everything there is at the end of an epoch; the checkpoint last, as it is what a restart believes."""
        done = History([Epoch(**epoch) for epoch in state['epochs']])
        write_atomically(folder / 'history.csv', done.to_csv())
        plot_curves({title: [done]}, folder / 'curves.png', source)
        save_tensors(state['best'], folder / 'best.pt')
        save_tensors(state, checkpoint)

    images_an_epoch = len(train) * train.batch_size
    state, saved_at = None, time.monotonic()  # the end of the last epoch, where it is not saved yet
    bar = tqdm(total=num_epochs * images_an_epoch, initial=len(history.epochs) * images_an_epoch, desc=title,
               unit=' images', unit_scale=True, dynamic_ncols=True, disable=None, leave=False)
    first_epoch = len(history.epochs) + 1
    model.train()
    try:
        for epoch in range(first_epoch, num_epochs + 1):
            if history.stopped_early(patience):
                break
            seed_everything(seed, epoch)
            losses = torch.zeros(len(train), device=train.device)
            correct = torch.zeros(len(train), device=train.device)
            start = time.perf_counter()
            for i, index in enumerate(train.shuffled()):
                progress = epoch - 1 + i / len(train)
                set_learning_rate(optimizer, schedule(progress))
                if average:
                    average.set_step(round(progress * len(train)))
                losses[i], correct[i] = step(index)
                if train.device.type == 'cpu':  # on a GPU, showing it would mean waiting for it
                    bar.set_postfix_str(f'epoch {epoch}/{num_epochs}, loss {losses[:i + 1].mean():.3f}, '
                                        f'accuracy {correct[:i + 1].mean() / train.batch_size:.1%}', refresh=False)
                    bar.update(train.batch_size)
                    if i + 1 == min(10, len(train)) and epoch == first_epoch:
                        epochs_left = num_epochs - epoch + 1 - (i + 1) / len(train)
                        a_epoch = (time.perf_counter() - start) / (i + 1) * len(train)
                        tqdm.write(f'{title}: {_time_to_come(a_epoch, epochs_left, epochs_to_come)}')
            step_losses = losses.tolist()  # waits for the GPU, once an epoch
            seconds = time.perf_counter() - start
            bad_step = next((i for i, loss in enumerate(step_losses, 1) if not math.isfinite(loss)), None)
            val_loss, val_accuracy = evaluate(judged, val, precision)
            if bad_step or not math.isfinite(val_loss):
                history.diverged = f'epoch {epoch}, ' + (f'step {bad_step}' if bad_step else 'validation')
                break
            history.epochs.append(Epoch(
                epoch, schedule(epoch - 1), sum(step_losses) / len(train), correct.mean().item() / train.batch_size,
                val_loss, val_accuracy, seconds, images_an_epoch / seconds))
            if history.best.epoch == epoch:
                best = _clone(judged.state_dict())
            if train.device.type != 'cpu':
                bar.set_postfix_str(f'epoch {epoch}/{num_epochs}, loss {history.epochs[-1].train_loss:.3f}, '
                                    f'accuracy {history.epochs[-1].train_accuracy:.1%}', refresh=False)
                bar.update(images_an_epoch)
            _report(history, num_epochs, epochs_to_come, title)
            state = snapshot()
            if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                save(state)
                state, saved_at = None, time.monotonic()
        if state:  # here and not only below, so that Ctrl-C while it is written causes another try
            save(state)
            state = None
    finally:  # the end of the training, Ctrl-C, a full disk: whatever it was, the last whole epoch is kept
        bar.close()
        if state:
            save(state)
    if best is not None and not history.diverged:
        save_tensors(judged.state_dict(), folder / 'last.pt')
    return history


def _report(history: History, num_epochs: int, epochs_to_come: int, title: str) -> None:
    """One line an epoch."""
    last = history.epochs[-1]
    tqdm.write(f'{title}: epoch {last.epoch:>3}/{num_epochs}  loss {last.train_loss:.3f}  '
               f'training {last.train_accuracy:6.1%}  validation {last.val_accuracy:6.1%}  '
               f'{last.seconds:.1f} s, {last.images_per_second:,.0f} images/s, '
               f'{_time_to_come(last.seconds, num_epochs - last.epoch, epochs_to_come)}')


def _time_to_come(epoch_seconds: float, epochs_left: float, epochs_to_come: int) -> str:
    """'5 min left', '5 min left, 12 min in all': of this run, and with the runs after it."""
    text = f'{duration(epoch_seconds * epochs_left)} left'
    return text + (f', {duration(epoch_seconds * (epochs_left + epochs_to_come))} in all' if epochs_to_come else '')


def duration(seconds: float) -> str:
    """8.0 -> '8 s', 5300.0 -> '1 h 28 min'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{minutes // 60} h {minutes % 60:02} min' if minutes >= 60 else f'{minutes} min'


def _clone(value):
    """A copy of nested dicts and lists of tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    return [_clone(item) for item in value] if isinstance(value, list) else value


def save_tensors(value: dict, path: Path) -> None:
    """torch.save, but whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getbuffer())


def load_tensors(path: Path, device: torch.device | str = 'cpu') -> dict:
    """Read what `save_tensors` wrote, its checksums verified. To be called within `reading(path)`."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch itself does not look at the checksums
            raise zipfile.BadZipFile(f'{damaged} fails its checksum')
    return torch.load(path, map_location=device, weights_only=True)


def _load_checkpoint(path: Path, model: nn.Module, judged: nn.Module, optimizer: Optimizer) -> tuple[dict, History]:
    with reading(path):
        state = load_tensors(path, next(model.parameters()).device)
        judged.load_state_dict(state['best'])  # only to see that it fits, too
        if judged is not model:
            judged.load_state_dict(state['average'])
        model.load_state_dict(state['model'])
        own = [{key: group[key] for key in ('lr', 'capturable') if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(state['optimizer'])
        for group, options in zip(optimizer.param_groups, own, strict=True):
            group.update(options)  # how this device wants them: the checkpoint may come from another
        return state['best'], History([Epoch(**epoch) for epoch in state['epochs']])
