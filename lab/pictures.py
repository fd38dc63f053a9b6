"""Pictures of images: the gallery of augmentations, a network's worst mistakes and its confusion matrix, as PNG."""
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
from matplotlib import colormaps
from torch import Tensor

from lab.figure import COLOURS, INK, Title, new_figure, own_style, printable, save_figure


@own_style()
def plot_gallery(rows: Mapping[str, Tensor], path: Path, title: Title | str) -> Path:
    """Rows of images: name -> (K, 3, H, W) float in [0, 1]."""
    columns = len(next(iter(rows.values())))
    figure = new_figure(0.95 * columns + 1.3, 0.97 * len(rows), title)
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, (name, images) in zip(panels, rows.items(), strict=True):
        height = images.shape[2]
        row = np.ones((height, columns * (images.shape[3] + 2) - 2, 3), dtype=np.float32)
        for i, image in enumerate(images.float().clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()):
            left = i * (image.shape[1] + 2)
            row[:, left:left + image.shape[1]] = image
        panel.imshow(row, interpolation='nearest')
        panel.set(xticks=[])
        panel.set_yticks([(height - 1) / 2], [textwrap.fill(printable(name), 18)])
        panel.tick_params(length=0, labelsize=11)
        panel.grid(False)
        panel.spines[:].set_visible(False)
    return save_figure(figure, path)


@own_style()
def plot_mistakes(images: Tensor, labels: Tensor, logits: Tensor, classes: Sequence[str], path: Path,
                  title: Title | str, *, count: int = 24) -> Path:
    """The mistakes that the network is surest of: image, what it says with its probability, what is right.

    images: (N, 3, H, W) uint8; labels: (N,) int; logits: (N, C) float.
    """
    probabilities, given = logits.detach().float().cpu().softmax(1).max(1)
    images, labels = images.cpu(), labels.cpu()
    wrong = (given != labels).nonzero().flatten()
    worst = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:count].tolist()
    columns = 8
    lines = max(1, -(-len(worst) // columns))
    figure = new_figure(11, 1.75 * lines + 0.3 if worst else 1.2, title)
    figure.supxlabel(f'{len(wrong):,} of {len(labels):,} test images get a wrong class'
                     + ('; here are the surest: above what the network says, with its probability, below what is right'
                        if worst else ''), fontsize=9, color=INK)
    if not worst:
        figure.text(0.5, 0.4 * 1.2 / figure.get_figheight(), 'No mistake.', fontsize=13, ha='center')
        return save_figure(figure, path)
    for panel, i in zip(figure.subplots(lines, columns, squeeze=False).flat, [*worst, *[None] * columns], strict=False):
        panel.axis('off')
        if i is not None:
            panel.imshow(images[i].permute(1, 2, 0).numpy(), interpolation='nearest')
            panel.set_title(f'{_short(classes[given[i]], 14)} {_percent(probabilities[i].item())}', fontsize=9,
                            color=COLOURS[1], pad=3, loc='center')
            panel.text(0.5, -0.03, f'is: {_short(classes[labels[i]], 16)}', fontsize=9, ha='center', va='top',
                       transform=panel.transAxes)
    return save_figure(figure, path)


def _percent(probability: float) -> str:
    """As a whole number, but never 100 % for what is less."""
    return '>99%' if probability > 0.995 else f'{probability:.0%}'


def _short(name: str, characters: int) -> str:
    """Cut to a width in characters, of which Chinese ones take two."""
    name = printable(name)
    widths = np.cumsum([1 + (east_asian_width(character) in 'WF') for character in name])
    return name if widths[-1] <= characters else name[:(widths < characters).sum()] + '…'


@own_style()
def plot_confusion(labels: Tensor, logits: Tensor, classes: Sequence[str], path: Path, title: Title | str) -> Path:
    """Of each true class (a row), the share in percent that is given each class; right of it the class's accuracy.

    labels: (N,) int; logits: (N, C) float. The mistakes have a colour scale of their own, or the right answers, by
    far the most, would leave them pale.
    """
    count = len(classes)
    pairs = labels.cpu() * count + logits.detach().cpu().argmax(1)
    matrix = pairs.bincount(minlength=count**2).reshape(count, count).double().numpy()
    totals = matrix.sum(1, keepdims=True)
    percent = 100 * np.divide(matrix, totals, out=np.full_like(matrix, np.nan), where=totals > 0)
    right = np.eye(count, dtype=bool)
    mistakes = np.where(right, np.nan, percent)
    limit = max(1.0, np.nanmax(mistakes, initial=0))

    side = min(max(3.6, 0.48 * count), 12)
    figure = new_figure(side + 2.5, side + 1, title)
    panel = figure.subplots()
    shades = colormaps['Oranges'].with_extremes(bad='#eeeeee')
    image = panel.imshow(mistakes, cmap=shades, vmin=0, vmax=limit, interpolation='nearest')
    panel.grid(False)
    room = 0.75 * 72 * side / count  # of a row, in points
    size = 9 if count <= 20 else max(5, room)
    named = range(0, count, max(1, math.ceil(5 / room)))  # of very many classes, as many as there is room for
    names = [_short(classes[i], 18) for i in named]
    panel.set_xticks(named, names, rotation=45 if count <= 20 else 90, fontsize=size,
                     ha='right' if count <= 20 else 'center', rotation_mode='anchor' if count <= 20 else 'default')
    panel.set_yticks(named, names, fontsize=size)
    panel.set(xlabel='class given by the network', ylabel='true class')
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    if count <= 20:
        for (row, column), value in np.ndenumerate(percent):
            if value > 0:
                panel.text(column, row, f'{value:.0f}' if value >= 0.95 else f'{value:.1g}', ha='center', va='center',
                           fontsize=size, fontweight='bold' if row == column else None,
                           color='white' if row != column and value > 0.6 * limit else 'black')
    for row in named:
        accuracy = f'{percent[row, row]:.1f}%' if totals[row, 0] else 'no image'
        panel.annotate(accuracy, (1.01, row), xycoords=panel.get_yaxis_transform(), fontsize=size, va='center')
    panel.annotate('accuracy', (1.01, 1), (0, 6), xycoords='axes fraction', textcoords='offset points', fontsize=9,
                   fontweight='bold')
    if count > 20:
        bar = figure.colorbar(image, shrink=0.4, pad=0.08)
        bar.set_label('mistakes (% of the true class)')
    figure.supxlabel(f'Percent of each true class; {matrix.trace() / max(1, matrix.sum()):.1%} of all '
                     f'{int(matrix.sum()):,} images are right.\n'
                     'Right answers are grey; of the mistakes, the darker the more frequent.',
                     fontsize=8, color=INK)
    return save_figure(figure, path)
