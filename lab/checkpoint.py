"""What a run leaves while it trains, so that it can be killed and continued: history.csv, best.pt, checkpoint.pt."""
import copy
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lab.files import each_tensor, load_tensors, reading, save_tensors, to_csv, write_atomically
from lab.history import Epoch, History
from lab.progress import Progress

SECONDS_BETWEEN_SAVES = 10  # at least,
TIMES_AS_LONG = 20  # and this many times as long as a save takes


class Average:
    """Exponential moving average of a model's weights and, at the same rate, of its batch norm statistics.

    torch's AveragedModel copies its step count to the GPU at every update, which waits for the GPU; this does not.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.pairs = [(average, current) for average, current in
                      zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
                      if average.is_floating_point()]
        self.updates = torch.zeros((), device=self.pairs[0][0].device)

    def update(self) -> None:
        """Take in the model's weights; over fewer steps at first, so that the random start is soon forgotten."""
        step_size = (torch.full_like(self.updates, 9) / (10 + self.updates)).clamp(min=1 - self.decay)
        for average, current in self.pairs:
            average.lerp_(current, step_size)
        self.updates += 1


class Checkpoint:
    """Continues an interrupted run, keeps its best weights, and saves the last whole epoch, whatever ends the `with`.

    with Checkpoint(folder, model, optimizer, average, progress) as checkpoint:
        checkpoint.history  # of an interrupted run, or empty; the loop appends to it
        checkpoint.judged   # the network that is validated and kept: the model, or the average of its weights
        checkpoint.end_epoch()

    Raises DamagedFile for a checkpoint that cannot be read, OSError when the folder cannot be written.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: Optimizer, average: Average | None,
                 progress: Progress):
        self.folder, self.model, self.optimizer, self.average = folder, model, optimizer, average
        self.judged = average.model if average else model
        self.progress = progress
        self.history, self.best = History(), None
        self.unsaved, self.saved_at, self.saving_takes = None, time.monotonic(), 0.0

    def __enter__(self) -> 'Checkpoint':
        if (self.folder / 'checkpoint.pt').exists():
            with reading(self.folder / 'checkpoint.pt'):
                self._load(load_tensors(self.folder / 'checkpoint.pt', next(self.model.parameters()).device))
            self._show(self.history)  # a kill may have come before it
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.progress.close()
        if self.unsaved:
            try:
                self._save()
            except KeyboardInterrupt:
                if self.unsaved:
                    self._save()
                raise
        if kind is None and self.history.epochs:
            self._write_history(self.history)
            if not self.history.diverged:
                save_tensors(self.judged.state_dict(), self.folder / 'last.pt')

    def end_epoch(self) -> None:
        """Remember the epoch that the history ends with; save it, unless that was done a moment ago."""
        if self.history.best is self.history.epochs[-1]:
            self.best = _clone(self.judged.state_dict())
        self.unsaved = {
            'best': self.best, 'epochs': [asdict(epoch) for epoch in self.history.epochs],
            **_clone({'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                      'average': self.average and self.average.model.state_dict(),
                      'updates': self.average and self.average.updates})}
        if time.monotonic() - self.saved_at > max(SECONDS_BETWEEN_SAVES, TIMES_AS_LONG * self.saving_takes):
            self._save()

    def _save(self) -> None:
        """Everything there is at the end of an epoch: first what counts, then what people look at."""
        start = time.monotonic()
        saved = History([Epoch(**epoch) for epoch in self.unsaved['epochs']])
        save_tensors(self.unsaved['best'], self.folder / 'best.pt')
        save_tensors(self.unsaved, self.folder / 'checkpoint.pt')
        self.unsaved = None
        self._show(saved)
        self.saved_at = time.monotonic()
        self.saving_takes = self.saved_at - start

    def _show(self, history: History) -> None:
        """Write history.csv, unless another program has it open, and draw curves.png."""
        with suppress(PermissionError):  # Excel, on Windows; at the end of the run it must be written
            self._write_history(history)
        self.progress.draw(history, self.folder)

    def _write_history(self, history: History) -> None:
        write_atomically(self.folder / 'history.csv', to_csv(Epoch, history.epochs))

    def _load(self, state: dict) -> None:
        self.judged.load_state_dict(state['best'])  # only to see that it fits, too
        if self.average:
            self.average.model.load_state_dict(state['average'])
            self.average.updates.copy_(state['updates'])
        self.model.load_state_dict(state['model'])
        own = [{key: group[key] for key in ('lr', 'capturable') if key in group}
               for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state['optimizer'])
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)  # how this device wants them: the checkpoint may come from another
        self.best, self.history = state['best'], History([Epoch(**epoch) for epoch in state['epochs']])


def _clone(state: Any) -> Any:
    return each_tensor(lambda tensor: tensor.detach().clone(), state)
