#!/usr/bin/env python3
"""Minutes (on a GPU seconds) until 75, 80, 85, 88 % of the test images are right: `fast` beside the usual script.

    python benchmarks/time_to_accuracy.py --data FOLDER

Each recipe is trained once, with the test images in place of the validation images: nothing is chosen by them, since
the recipes are fixed. The same command continues what was interrupted. The usual script is not trained: it has the
assignment's constants, as Q1 has, so its accuracies are those of Q1, and its minutes are those of Q1 times the ratio of
their speeds, which training_speed.py has measured.
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import tyro

import ex3_convnet
from benchmarks.tables import PROJECT, USUAL, ratios
from datasets import cifar10
from lab.constants import slug
from lab.device import describe_device, pick_device, pick_precision
from lab.errors import ends_in_a_sentence
from lab.experiment import introduce
from lab.figure import Title, new_figure, own_style, save_figure
from lab.files import write_atomically
from lab.history import History
from lab.identity import choose_folder, claim, identity, recorded_precision
from lab.plots import colours
from lab.progress import Progress
from lab.results import markdown_table
from lab.run import Run, read_finished

LEVELS = (75, 80, 85, 88)  # percent of the test images
ADVICE = 'run benchmarks/training_speed.py on this machine, or name its JSON file with --speed'
Curve = Sequence[tuple[float, float]]  # for each epoch: minutes of training until its end, test accuracy in percent


@dataclass(frozen=True)
class Options:
    """Train recipes of ex3_convnet.py and print the minutes, or seconds, until each test accuracy."""
    data: str = 'auto'  # as in the scripts
    recipes: tuple[str, ...] = ('fast', 'Q1')  # questions of ex3_convnet.py, of which the first run is trained
    speed: Path | None = None  # a JSON file of training_speed.py, for the usual script; None: that of this device
    num_epochs: int | None = None  # for a quick look; None: as the recipe has it
    device: str = 'auto'
    precision: Literal['auto', 'fp32', 'bf16'] = 'auto'
    results: Path = Path('results') / 'time_to_accuracy'


@ends_in_a_sentence
def main(argv: Sequence[str] = ()) -> int:
    """Train what is not finished, print the table, write JSON and a picture; returns the exit status."""
    options = tyro.cli(Options, args=list(argv), prog='benchmarks/time_to_accuracy.py')
    if not options.recipes or not {*options.recipes} <= {*ex3_convnet.QUESTIONS}:
        raise ValueError(f'recipes must be of {", ".join(ex3_convnet.QUESTIONS)}; got '
                         f'{", ".join(options.recipes) or "none"}')
    if options.num_epochs is not None and options.num_epochs < 1:
        raise ValueError(f'num_epochs must be at least 1, got {options.num_epochs}')
    device = pick_device(options.device)
    speed = options.speed or Path(__file__).parent / 'results' / f'{slug(describe_device(device))}.json'
    ratio, measured_in = usual_ratio(speed) if 'Q1' in options.recipes else (None, None)
    constants = ex3_convnet.Config()
    data = cifar10.load(options.data, constants.data_root, constants.num_training, constants.num_validation).to(device)
    introduce(data, len(data.classes))
    data = replace(data, val=data.test)  # what is evaluated after each epoch
    given = {'num_epochs': options.num_epochs} if options.num_epochs else {}
    configs = {recipe: replace(constants, **next(iter(ex3_convnet.QUESTIONS[recipe].rows.values())) | given,
                               num_classes=len(data.classes), precision=options.precision)
               for recipe in options.recipes}
    folder = choose_folder(options.results, {recipe: identity(config, data, {}) for recipe, config in configs.items()})
    precision = options.precision
    if precision == 'auto':  # as it was begun, else the faster one
        recorded = recorded_precision(folder, options.recipes[0])
        precision = recorded[0] if recorded else pick_precision('auto', device)[0]
    if measured_in and precision != measured_in:  # on another processor of the same name, say
        raise ValueError(f'{speed} was measured in {measured_in}, not in {precision}: {ADVICE}')
    curves: dict[str, Curve] = {}
    for recipe, config in configs.items():
        history = train(Run(recipe, 0, replace(config, precision=precision), data, data.source,
                            folder / slug(recipe) / 'seed0', device, Progress(f'{recipe}, on the test images'), set()))
        accuracies = [100 * accuracy for accuracy in history['val_accuracy']]
        minutes = cumulated(history['seconds'])
        curves[f'this project, {recipe}'] = list(zip(minutes, accuracies, strict=True))
        if recipe == 'Q1':
            curves['usual script'] = list(zip([ratio * m for m in minutes], accuracies, strict=True))
    time, _ = unit(curves)
    title = Title(f'How many {time} until the test images are recognised?',
                  f'{data.source}: {len(data.train):,} training, {len(data.test):,} test images, one seed; '
                  f'{describe_device(device)}, {precision}', f'num_epochs={options.num_epochs}' if given else '')
    note = (f'The usual script was not trained: its accuracies are those of Q1, its {time} {ratio:.2f} times those of '
            f'Q1, the ratio of their speeds.') if 'usual script' in curves else ''
    print(f'{" · ".join(filter(None, title))}\n\n{table(curves)}\n\n{note}')
    write_atomically(folder / 'curves.json', json.dumps({'title': title, 'note': note, 'curves': curves}, indent=1))
    print(f'\n{folder / "curves.json"}\n{plot(curves, folder / "time_to_accuracy.png", title)}')
    return 0


def usual_ratio(path: Path) -> tuple[float, str]:
    """(speed of Q1 over that of the usual script, precision of Q1), as training_speed.py measured them.

    Raises ValueError for a file that does not say so.
    """
    try:
        record = json.loads(path.read_text())
        speeds = [record['cases']['ConvNet']['ways'][way]['images_per_second'] for way in (PROJECT, USUAL)]
        return median(ratios(*speeds)), record['precision']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} does not hold the speed of the usual script ({type(error).__name__}): '
                         f'{ADVICE}') from error


def train(run: Run) -> History:
    """Train a run, or what is left of it. Raises ValueError where it diverged."""
    claim(run.folder, identity(run.config, run.data, {}))
    if not (run.folder / 'result.json').exists():
        ex3_convnet.train(run)
    result, history = read_finished(run.folder)
    if result.status != 'finished':
        raise ValueError(f'{run.name}: {result.status} {result.reason}')
    return history


def cumulated(seconds: Sequence[float]) -> list[float]:
    """Seconds of each epoch -> minutes until its end."""
    return [sum(seconds[:epoch + 1]) / 60 for epoch in range(len(seconds))]


def minutes_until(level: float, curve: Curve) -> float | None:
    """The end of the first epoch after which at least `level` percent are right; None if there is none."""
    return next((minutes for minutes, accuracy in curve if accuracy >= level), None)


def unit(curves: dict[str, Curve]) -> tuple[str, int]:
    """('minutes', 1), or ('seconds', 60) where all is over in five minutes: what is shown, how many are a minute."""
    return ('minutes', 1) if max(curve[-1][0] for curve in curves.values()) >= 5 else ('seconds', 60)


def table(curves: dict[str, Curve]) -> str:
    """Minutes or seconds until each level, as Markdown."""
    time, per_minute = unit(curves)
    lines = [[f'{time} until', *(f'{level} %' for level in LEVELS), 'at the end']]
    for name, curve in curves.items():
        reached = [minutes_until(level, curve) for level in LEVELS]
        lines.append([name, *('–' if minutes is None else f'{per_minute * minutes:.0f}' for minutes in reached),
                      f'{curve[-1][1]:.1f} % after {per_minute * curve[-1][0]:.0f}'])
    return markdown_table(lines)


@own_style()
def plot(curves: dict[str, Curve], path: Path, title: Title) -> Path:
    """Test accuracy against minutes, or seconds, of training."""
    time, per_minute = unit(curves)
    figure = new_figure(8, 4, title)
    panel = figure.subplots()
    for colour, (name, curve) in zip(colours(len(curves)), curves.items(), strict=True):
        minutes, accuracies = zip(*curve, strict=True)
        panel.plot([per_minute * m for m in minutes], accuracies, marker='o', markersize=4, color=colour, label=name)
    panel.set(xlabel=f'{time} of training', ylabel='test accuracy (%)', xlim=(0, None))
    for level in LEVELS:
        panel.axhline(level, color='#bbbbbb', linewidth=0.8, linestyle=':')
    panel.legend()
    return save_figure(figure, path)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
