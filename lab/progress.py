"""What a run shows while it trains: a bar, one line per epoch, the time to come, its curves."""
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lab.errors import drawn
from lab.figure import Title
from lab.history import History
from lab.plots import plot_curves

STEPS_BETWEEN_EVENTS = 20  # on a GPU, where every look at its progress costs a wait
PATIENCE_OF_A_PERSON = 20 * 60  # seconds, after which something quicker is suggested


class Progress:
    """What one run shows. label: 'plain, seed 0'; later_epochs: of the runs after it, for the estimate of the time;
    sooner: what to try where that is long.
    """

    def __init__(self, label: str = '', title: Title | str = '', later_epochs: int = 0, sooner: str = ''):
        self.label, self.title, self.later_epochs, self.sooner = label, title, later_epochs, sooner
        self.bar = None

    def start(self, num_epochs: int, epochs_done: int, images_per_epoch: int) -> None:
        """Open the bar; `images_per_epoch` are those that are trained on."""
        if epochs_done:
            print(f'{self.label}: continues after epoch {epochs_done}')
        self.num_epochs, self.images_per_epoch, self.estimated = num_epochs, images_per_epoch, False
        self.bar = tqdm(total=num_epochs * images_per_epoch, initial=epochs_done * images_per_epoch, desc=self.label,
                        unit=' images', unit_scale=True, dynamic_ncols=True, disable=None, leave=False)

    def steps(self, batches: Iterable, epoch: int, losses: Tensor, correct: Tensor) -> Iterator:
        """The batches of an epoch, the bar moving with them.

        On a GPU it moves every twenty steps, up to the event before the last one: the GPU never runs dry, and never
        more than forty steps of work are queued, so that Ctrl-C is obeyed soon.
        """
        start, events = time.perf_counter(), []
        for step, batch in enumerate(batches, 1):
            yield batch
            size = len(batch[1])
            if losses.device.type == 'cpu':
                self.bar.set_postfix_str(f'epoch {epoch}/{self.num_epochs}, loss {losses[:step].mean():.3f}, '
                                         f'accuracy {correct[:step].mean() / size:.1%}', refresh=False)
                self.bar.update(size)
            elif losses.device.type == 'cuda' and step % STEPS_BETWEEN_EVENTS == 0:
                events.append(torch.cuda.Event())
                events[-1].record(torch.cuda.current_stream(losses.device))
                if len(events) > 1:
                    events[-2].synchronize()
                    self.bar.set_postfix_str(f'epoch {epoch}/{self.num_epochs}', refresh=False)
                    self.bar.update(STEPS_BETWEEN_EVENTS * size)
            if not self.estimated and losses.device.type == 'cpu' and step == min(10, len(losses)):
                self._estimate(epoch, (time.perf_counter() - start) / step, step, size)

    def _estimate(self, epoch: int, seconds_per_step: float, step: int, batch_size: int) -> None:
        """The time to come, as soon as it is known; on a CPU, how to see something sooner where it is long."""
        steps_per_epoch = self.images_per_epoch / batch_size
        epochs_left = self.num_epochs - epoch + 1 - step / steps_per_epoch
        epoch_seconds = seconds_per_step * steps_per_epoch
        tqdm.write(f'{self.label}: {self._time_to_come(epoch_seconds, epochs_left)}')
        quick = 3 * 5000 * seconds_per_step / batch_size  # seconds
        if epoch_seconds * (epochs_left + self.later_epochs) > max(PATIENCE_OF_A_PERSON, 3 * quick):
            tqdm.write(f'To see something sooner: {self.sooner}--num-training 5000 --num-epochs 3, which takes about '
                       f'{duration(quick)} per run.')
        self.estimated = True

    def end_epoch(self, history: History) -> None:
        """One line per epoch."""
        last = history.epochs[-1]
        self.bar.set_postfix_str(f'epoch {last.epoch}/{self.num_epochs}, loss {last.train_loss:.3f}, '
                                 f'accuracy {last.train_accuracy:.1%}', refresh=False)
        self.bar.update(last.epoch * self.images_per_epoch - self.bar.n)
        tqdm.write(f'{self.label}: epoch {last.epoch:>3}/{self.num_epochs}  loss {last.train_loss:.3f}  '
                   f'training {last.train_accuracy:6.1%}  validation {last.val_accuracy:6.1%}  '
                   f'{last.seconds:.1f} s, {last.images_per_second:,.0f} images/s, '
                   f'{self._time_to_come(last.seconds, self.num_epochs - last.epoch)}')

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def draw(self, history: History, folder: Path) -> None:
        """curves.png of the run."""
        if drawn(plot_curves, {self.label: [history]}, folder / 'curves.png', self.title) is None:
            with suppress(OSError):
                (folder / 'curves.png').unlink()  # rather none than an old one

    def _time_to_come(self, epoch_seconds: float, epochs_left: float) -> str:
        """'5 min left', '5 min left, 12 min in all': of this run, and with the runs after it."""
        text = f'{duration(epoch_seconds * epochs_left)} left'
        in_all = epoch_seconds * (epochs_left + self.later_epochs)
        return text + (f', {duration(in_all)} in all' if self.later_epochs else '')


def duration(seconds: float) -> str:
    """8.0 -> '8 s', 5300.0 -> '1 h 28 min'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{minutes // 60} h {minutes % 60:02} min' if minutes >= 60 else f'{minutes} min'
