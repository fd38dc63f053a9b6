"""A row per run and seed, and the tables made of them."""
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lab.plots import Accuracy

SETS = {'train': 'training', 'val': 'validation', 'test': 'test'}


@dataclass
class Result:
    """A row of summary.csv. Accuracies in [0, 1], in evaluation mode, on the complete sets; None where unknown."""
    run: str  # the name of its row
    seed: int
    status: str = 'finished'  # 'diverged' or 'not run'
    reason: str = ''  # where and why it diverged or could not run
    data: str = ''
    training_images: int = 0
    validation_images: int = 0
    test_images: int = 0
    device: str = ''
    precision: str = ''
    parameters: int | None = None
    trainable: int | None = None
    epochs: int = 0
    best_epoch: int | None = None
    best_train_accuracy: float | None = None
    best_val_accuracy: float | None = None
    best_test_accuracy: float | None = None
    last_train_accuracy: float | None = None
    last_val_accuracy: float | None = None
    last_test_accuracy: float | None = None
    seconds: float = 0.0  # of training

    def images(self, part: str) -> int:
        """How many images 'train', 'val' or 'test' has."""
        return getattr(self, f'{SETS[part]}_images')


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy in [0, 1] measured on `count` images: half of Wilson's interval, which is not 0 at 100 %."""
    return math.sqrt(accuracy * (1 - accuracy) / count + 1 / (4 * count ** 2)) / (1 + 1 / count)


def mean_std(values: Iterable[float | None], form: str = '.1f', scale: float = 1.0) -> str:
    """[0.81, 0.83] with scale 100 -> '82.0 ± 1.4': mean and sample standard deviation; one value stands alone."""
    numbers = [value * scale for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return '–'
    text = f'{statistics.mean(numbers):{form}}'
    return f'{text} ± {statistics.stdev(numbers):{form}}' if len(numbers) > 1 else text


def accuracy(results: Iterable[Result], run: str, which: str, part: str) -> Accuracy:
    """Of a run's 'best' or 'last' model on 'train', 'val' or 'test', in percent, for plots.

    Its error is the sample deviation over seeds; of a single seed, the standard error of the evaluated images.
    """
    same = [(value, result.images(part)) for result in results if result.run == run
            and (value := getattr(result, f'{which}_{part}_accuracy')) is not None]
    if not same:
        return Accuracy(math.nan, math.nan)
    values = [100 * value for value, _ in same]
    return Accuracy(statistics.mean(values), statistics.stdev(values) if len(same) > 1
                    else 100 * standard_error(*same[0]))


def summary_table(results: Sequence[Result]) -> str:
    """A Markdown table, one line per run: mean ± standard deviation over its seeds, accuracies in percent."""
    lines = [['run', 'seeds', 'trained / all parameters', 'epochs', 'best epoch', 'best: train', 'val', 'test',
              'latest: train', 'val', 'test', 'seconds']]
    for run in dict.fromkeys(result.run for result in results):
        same = [result for result in results if result.run == run]
        failed = next((result.status for result in same if result.status != 'finished'), '')
        size = next((f'{r.trainable:,} / {r.parameters:,}' for r in same if r.parameters), '–')
        lines.append([f'{run} ({failed})' if failed else run, str(len(same)), size,
                      mean_std([r.epochs for r in same], '.0f'), mean_std([r.best_epoch for r in same], '.0f'),
                      *(mean_std([getattr(r, f'{which}_{part}_accuracy') for r in same], scale=100)
                        for which in ('best', 'last') for part in SETS),
                      mean_std([r.seconds for r in same], '.0f')])
    return markdown_table(lines)


def summary(results: Sequence[Result]) -> str:
    """The table, and how much of a difference is chance."""
    known = [result for result in results if result.best_val_accuracy is not None]
    if not known:
        return summary_table(results)
    count = min(result.validation_images for result in known)
    error = 100 * standard_error(statistics.mean(result.best_val_accuracy for result in known), count)
    return (f'{summary_table(results)}\n\nAccuracies in percent. With {count:,} validation images, one standard error '
            f'of a validation accuracy is {error:.1f} points, and of the difference between two of them at most '
            f'{math.sqrt(2) * error:.1f}, since both see the same images: smaller differences may be chance.')


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells -> a Markdown table that is readable as text, too; the first line is the head, numbers stand right."""
    head, *body = lines
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruler = [f'{"-" * (width - 1)}{":" if i else "-"}' for i, width in enumerate(widths)]
    return '\n'.join('| ' + ' | '.join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(
        zip(line, widths, strict=True))) + ' |' for line in (head, ruler, *body))
