"""Curves and accuracies as PNG; pictures of images are in pictures.py."""
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lab.figure import COLOURS, INK, Title, new_figure, own_style, printable, save_figure

DASHED = (0, (4, 2))
LOOKS = {'training': dict(color=COLOURS[0], marker='o', markerfacecolor='white'),
         'validation': dict(color=COLOURS[1], marker='o'), 'test': dict(color=COLOURS[2], marker='D')}
SYMBOLS = {'training': '○', 'validation': '●', 'test': '◆'}
ERRORS = 'Error bars: ± one standard deviation over seeds; with one seed, one standard error of the evaluated images.'


class Accuracy(NamedTuple):
    """In percent; the mean is NaN where a run has none."""
    mean: float
    error: float  # over seeds, or the standard error of the evaluated set


def colours(count: int) -> list:
    """`count` colours, as distinct as possible; from nine on a scale from dark to light, in the order of the runs."""
    return list(COLOURS[:count]) if count <= len(COLOURS) else list(colormaps['viridis'](np.linspace(0, 0.93, count)))


# --- curves -------------------------------------------------------------------------------------------------


@own_style()
def plot_curves(runs: Mapping[str, Sequence[Any]], path: Path, title: Title | str) -> Path:
    """Loss and accuracy against the epoch, all runs overlaid: run -> one `History` per seed.

    Dashed is training, solid validation; a dot marks the best epoch of each seed; up to four runs have a band of one
    standard deviation over seeds. Every loss is inside the axis, but for a spike that `_limit_losses` may cut and mark.
    """
    runs = {name: histories for name, histories in runs.items() if any(len(history['epoch']) for history in histories)}
    figure = new_figure(11, max(4.2, 0.2 * len(runs) + 1), title)
    loss, accuracy = figure.subplots(1, 2)
    many, longest, ends, drawn = len(runs) > 4, 1, [], []
    banded = not many and any(len(histories) > 1 for histories in runs.values())
    for colour, (name, histories) in zip(colours(len(runs)), runs.items(), strict=True):
        for panel, quantity, scale in ((loss, 'loss', 1), (accuracy, 'accuracy', 100)):
            for part, dashes in (('train', DASHED), ('val', '-')):
                seeds = [scale * np.array(history[f'{part}_{quantity}'], dtype=float) for history in histories]
                mean, deviation = _mean_std(seeds)
                epochs = np.arange(1, 1 + len(mean))
                panel.plot(epochs, mean, linestyle=dashes, color=colour, alpha=0.6 if many and part == 'train' else 1,
                           linewidth=(1.1 if many else 1.4) if part == 'train' else 1.8, label=f'{name} {part}',
                           marker='o' if len(mean) == 1 else None, markerfacecolor='white' if part == 'train' else None)
                if banded and len(histories) > 1:
                    panel.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.2,
                                       linewidth=0)
                if panel is loss:
                    drawn.append((colour, mean, deviation if banded else 0 * deviation))
            panel.plot([history.best.epoch for history in histories],
                       [values[history.best.epoch - 1] for history, values in zip(histories, seeds, strict=True)],
                       'o', color=colour, markersize=6 if len(histories) == 1 else 4, markeredgecolor='white')
        longest = max(longest, len(mean))
        ends.append((name, colour, len(mean), mean[-1]))
    for panel, label in ((loss, 'loss (cross entropy)'), (accuracy, 'accuracy (%)')):
        panel.set(xlabel='epoch', title=label)
        panel.set_xlim(*(0.5, 1.5) if longest == 1 else (max(0.2, 1 - longest / 40), 1.01 * longest))
        panel.xaxis.set_major_locator(MaxNLocator('auto', integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    spikes = _limit_losses(loss, drawn)
    _name_ends(accuracy, ends, longest)
    _key(figure, longest, max(map(len, runs.values()), default=1), banded, spikes)
    return save_figure(figure, path)


def _mean_std(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation (0 for a single curve) at each epoch, over the curves that go so far."""
    table = np.ma.masked_all((len(curves), max(map(len, curves))))
    for row, curve in zip(table, curves, strict=True):
        row[:len(curve)] = np.ma.masked_invalid(curve)
    mean, count = table.mean(0), table.count(0)
    return mean.filled(np.nan), np.sqrt(((table - mean) ** 2).sum(0).filled(0) / np.maximum(count - 1, 1))


def _limit_losses(panel: Axes, drawn: Sequence[tuple[Any, np.ndarray, np.ndarray]]) -> list[float]:
    """The loss axis from zero to the largest loss. Returns the values of the spikes above it, each marked with ▲.

    A spike is the highest value of a curve if the next one is below a third of it, so never the last of a curve and
    never a rise; it is cut only if it is more than three times all other values of the figure.
    """
    spikes, rest = [], [0.0]
    for colour, mean, deviation in drawn:
        values = np.nan_to_num(mean, nan=0.0)
        highest = int(values.argmax())
        if highest + 1 < len(values) and mean[highest + 1] < values[highest] / 3:  # never before a NaN
            spikes.append((values[highest], highest + 1, colour))
            values, deviation = np.delete(values, highest), np.delete(deviation, highest)
        rest.append(float((values + deviation).max()))
    top = max(rest)
    top = max([top, *(value for value, *_ in spikes if value <= 3 * top)])
    cut = [spike for spike in spikes if spike[0] > top]
    panel.set_ylim(0, 1.05 * top or 1)
    for _, epoch, colour in cut:
        panel.plot(epoch, 1.02 * top, '^', color=colour, markersize=8, zorder=5)
    return [value for value, *_ in cut]


def _name_ends(panel: Axes, ends: Sequence[tuple[str, Any, int, float]], longest: int) -> None:
    """Name the runs right of the panel, each as near as the others allow to the height of its last value."""
    low, high = panel.get_ylim()
    ends = sorted((end for end in ends if end[0] and np.isfinite(end[3])), key=lambda end: end[3])
    gap = min(0.2 / (panel.figure.get_figheight() - 1.5), 1 / max(1, len(ends)))
    free = [(value - low) / (high - low) - gap * i for i, (*_, value) in enumerate(ends)]
    order = range(len(ends))  # isotonic regression: the nearest places that keep the order and the gap
    fitted = [max(min(np.mean(free[j:k + 1]) for k in order[i:]) for j in order[:i + 1]) for i in order]
    for i, (name, colour, epoch, value) in enumerate(ends):
        place = np.clip(fitted[i], 0, 1 - gap * order[-1]) + gap * i
        line = '-' if epoch == longest > 1 else ':'  # a solid one would look like further epochs
        panel.annotate(textwrap.shorten(printable(name), 40, placeholder=' …'), (epoch, value), (1.07, place),
                       textcoords='axes fraction', va='center', fontsize=9,
                       arrowprops=dict(arrowstyle='-', color=colour, linewidth=1.6, linestyle=line,
                                       relpos=(0, 0.5), shrinkA=2, shrinkB=0))


def _key(figure: Figure, longest: int, seeds: int, banded: bool, spikes: Sequence[float]) -> None:
    """Below the panels: how training, validation, the best epoch, bands and cut spikes are drawn."""
    training, validation = [dict(marker='o', linestyle='', markerfacecolor='white'), dict(marker='o', linestyle='')
                            ] if longest == 1 else [dict(linestyle=DASHED, linewidth=1.4), dict(linewidth=1.8)]
    handles = [Line2D([], [], color=INK, label='training (during the epoch)', **training),
               Line2D([], [], color=INK, label='validation', **validation)]
    if longest > 1:
        handles.append(Line2D([], [], color=INK, linestyle='', marker='o', markersize=6 if seeds == 1 else 4,
                              label='best epoch' if seeds == 1 else 'best epoch of each seed'))
    if banded:
        handles.append(Patch(color=INK, alpha=0.2, linewidth=0, label='± one standard deviation over seeds'))
    if spikes:
        handles.append(Line2D([], [], color=INK, linestyle='', marker='^', markersize=8, label=(
            f'above the axis: {"up to " if len(spikes) > 1 else ""}{max(spikes):.3g}')))
    figure.legend(handles=handles, loc='outside lower left', ncols=min(4, len(handles)))


# --- accuracies ---------------------------------------------------------------------------------------------


def _dots(panel: Axes, places: Sequence[float], accuracies: Sequence[Accuracy], name: str, *,
          horizontal: bool = False, **look: Any) -> None:
    """Accuracies with error bars: above `places`, joined from left to right, or beside them. NaN is left out."""
    means, errors = ([getattr(one, field) for one in accuracies] for field in Accuracy._fields)
    errors = np.nan_to_num(errors)
    look = dict(label=name, markersize=6, linewidth=1.4) | LOOKS.get(name, dict(color=INK, marker='s')) | look
    if horizontal:
        panel.errorbar(means, places, xerr=errors, linestyle='', **look)
    else:
        order = np.argsort(places, kind='stable')
        panel.errorbar(np.take(places, order), np.take(means, order), yerr=errors[order], **look)


def _ticks(values: Sequence[float], most: int) -> list[float]:
    """The values from left to right, leaving out those within 1/`most` of their range of the last one kept."""
    kept = []
    for value in sorted(values):
        if not kept or value - kept[-1] > (max(values) - min(values)) / most:
            kept.append(value)
    return kept


def _number(accuracy: Accuracy | None) -> str:
    if accuracy is None or not np.isfinite(accuracy.mean):
        return '–'
    return f'{accuracy.mean:.1f} ± {accuracy.error:.1f}' if np.isfinite(accuracy.error) else f'{accuracy.mean:.1f}'


def _name_rows(panel: Axes, names: Sequence[str]) -> None:
    """One row per name, the first on top."""
    panel.set_yticks(range(len(names)), [textwrap.fill(printable(name), 32, max_lines=2, placeholder=' …')
                                           for name in names])
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.tick_params(axis='y', length=0)


def _legend(figure: Figure, panel: Axes | None, note: str) -> None:
    """Below the panels, where it covers nothing: a note and, of a panel that is given, what is drawn how."""
    entries = panel.get_legend_handles_labels() if panel else ([], [])
    figure.legend(*entries, loc='outside lower left', ncols=4 if figure.get_figwidth() > 7 else 2, title=note,
                  title_fontsize=8, alignment='left')


@own_style()
def plot_accuracies(rows: Mapping[str, Mapping[str, Accuracy]], path: Path, title: Title | str) -> Path:
    """Accuracies of each run's sets as dots with error bars on an axis as wide as the data, the numbers beside them.

    rows: run -> {'training': ..., 'validation': ..., maybe 'test': ...}, one row per run, the first on top.
    """
    sets = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = new_figure(9.5, 0.36 * len(rows) + 1.1, title)
    panel = figure.subplots()
    for column, name in enumerate(sets):
        shift = 0.16 * (column - (len(sets) - 1) / 2)  # or one set's error bar would lie on another's
        there = [(row, sets_of_run[name]) for row, sets_of_run in enumerate(rows.values()) if name in sets_of_run]
        _dots(panel, [row + shift for row, _ in there], [accuracy for _, accuracy in there], name, horizontal=True)
        beside = dict(xycoords=panel.get_yaxis_transform(), textcoords='offset points', ha='center',
                      annotation_clip=False)
        colour = LOOKS.get(name, {}).get('color', INK)
        panel.annotate(f'{SYMBOLS.get(name, "■")} {name}', (1, -0.5), (50 + 86 * column, 5), color=colour,
                       fontweight='bold', **beside)
        for row, accuracies in enumerate(rows.values()):
            panel.annotate(_number(accuracies.get(name)), (1, row), (50 + 86 * column, 0), va='center', **beside)
    _name_rows(panel, list(rows))
    panel.set_xlabel('accuracy (%)')
    panel.xaxis.set_major_locator(MaxNLocator('auto', steps=[1, 2, 5, 10]))
    _legend(figure, None, ERRORS)
    return save_figure(figure, path)


@own_style()
def plot_best_and_latest(rows: Mapping[str, Mapping[str, tuple[Accuracy, Accuracy]]], path: Path,
                         title: Title | str) -> Path:
    """Q2b: run -> {'training': (best, latest), ...}: one panel per set, a run's best and latest joined by a line.

    All panels have the same scale, so that equally long lines are equal differences.
    """
    sets = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = new_figure(11, 0.62 * len(rows) + 1.4, title)
    panels = figure.subplots(1, len(sets), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, sets, strict=True):
        pairs = [(row, sets_of_run[name]) for row, sets_of_run in enumerate(rows.values()) if name in sets_of_run]
        for row, pair in pairs:
            panel.plot([accuracy.mean for accuracy in pair], [row - 0.08, row + 0.08], color='#bbbbbb', linewidth=3,
                       zorder=1)
            if all(np.isfinite(accuracy.mean) for accuracy in pair):
                panel.annotate(f'{pair[0].mean:.1f} → {pair[1].mean:.1f}',
                               ((pair[0].mean + pair[1].mean) / 2, row - 0.08), (0, 8), textcoords='offset points',
                               ha='center', va='bottom', fontsize=9)
        for which, look in enumerate((dict(marker='o', color=COLOURS[1]),
                                      dict(marker='s', color=COLOURS[0], markerfacecolor='white'))):
            _dots(panel, [row + (-0.08, 0.08)[which] for row, _ in pairs], [pair[which] for _, pair in pairs],
                  ('best on validation', 'latest')[which], horizontal=True, **look)
        panel.set(title=name, xlabel='accuracy (%)')
        _name_rows(panel, list(rows))
    middles = [sum(panel.get_xlim()) / 2 for panel in panels]
    half = 1.1 * max([1, *(np.diff(panel.get_xlim())[0] / 2 for panel in panels)])
    for panel, middle in zip(panels, middles, strict=True):
        right = min(middle + half, max(100.5, panel.get_xlim()[1]))  # no room for accuracies that cannot be
        panel.set_xlim(right - 2 * half, right)
    _legend(figure, panels[0], f'Numbers: best → latest. {ERRORS}')
    return save_figure(figure, path)


@own_style()
def plot_strengths(panels: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[Accuracy]]]],
                   level: Mapping[str, Accuracy], path: Path, title: Title | str) -> Path:
    """Q3a-strength: accuracy against the strength, a panel per augmentation; `level` is what a run without any reaches.

    panels: augmentation -> (strengths, {'training': one accuracy per strength, 'validation': ...}).
    """
    columns = min(4, max(1, len(panels)))
    lines = -(-len(panels) // columns) or 1
    figure = new_figure(max(6.5, 2.7 * columns), 2.7 * lines + 0.5, title)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for (augmentation, (strengths, series)), axes in zip(panels.items(), grid, strict=False):
        for name, accuracy in level.items():
            axes.axhline(accuracy.mean, color=LOOKS.get(name, {}).get('color', INK), linestyle=':', linewidth=1.4,
                         label=f'{name}, without augmentation')
        for name, accuracies in series.items():
            _dots(axes, strengths, accuracies, name)
        axes.set(title=augmentation, xlabel='strength', xticks=_ticks(strengths, 6))
        axes.margins(x=0.12)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel('accuracy (%)')
    for axes in list(grid):
        axes.set_visible(False)
    _legend(figure, figure.axes[0], ERRORS)
    return save_figure(figure, path)


@own_style()
def plot_against(x: Sequence[float], series: Mapping[str, Sequence[Accuracy]], path: Path, title: Title | str, *,
                 xlabel: str, chance: float) -> Path:
    """Accuracies against a number, with the accuracy of guessing in percent as a line (Q3b)."""
    figure = new_figure(7.5, 4.3, title)
    panel = figure.subplots()
    for name, accuracies in series.items():
        _dots(panel, x, accuracies, name)
    panel.axhline(chance, color=INK, linestyle=':', linewidth=1.4, label=f'chance: {chance:.3g}%')
    panel.set(xlabel=xlabel, ylabel='accuracy (%)', xticks=_ticks(x, 16), ylim=(0, None))
    _legend(figure, panel, ERRORS)
    return save_figure(figure, path)
