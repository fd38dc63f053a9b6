#!/usr/bin/env python3
"""Minutes of training until 75, 80, 85, 88 % of the test images are right: `fast` beside the usual script.

    python benchmarks/time_to_accuracy.py --data FOLDER

Each recipe is trained once, with the test images in place of the validation images: nothing is chosen by them, the
recipes are fixed. The same command continues what was interrupted. The usual script is the assignment's constants in
fp32: its accuracies are those of this project's run of Q1, its minutes are computed from the measured speed of the
usual script (benchmarks/results/), since the two train alike and differ in speed.
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
from datasets import cifar10
from lab.device import describe_device, pick_device, pick_precision
from lab.errors import ends_in_a_sentence
from lab.figure import COLOURS, Title, new_figure, own_style, save_figure
from lab.files import write_atomically
from lab.history import History
from lab.progress import Progress
from lab.results import markdown_table
from lab.run import Run

LEVELS = (75, 80, 85, 88)  # percent of the test images
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """Train recipes of ex3_convnet.py and print the minutes until each test accuracy."""
    data: str = 'auto'  # as in the scripts
    recipes: tuple[str, ...] = ('fast', 'Q1')  # questions of ex3_convnet.py, of which the first run is trained
    speed: Path = HERE / 'results' / 'AMD-EPYC-2-threads.json'  # the speed of the usual script, by training_speed.py
    num_epochs: int | None = None  # None: as the recipe has it
    hidden_size: tuple[int, ...] | None = None  # None: as the recipe has it
    device: str = 'auto'
    precision: Literal['auto', 'fp32', 'bf16'] = 'auto'
    results: Path = Path('results') / 'time_to_accuracy'


@ends_in_a_sentence
def main(argv: Sequence[str] = ()) -> int:
    """Train what is not finished, print the table, write JSON and a picture; returns the exit status."""
    options = tyro.cli(Options, args=list(argv), prog='benchmarks/time_to_accuracy.py')
    device = pick_device(options.device)
    precision, _ = pick_precision(options.precision, device)
    constants = ex3_convnet.Config()
    data = cifar10.load(options.data, constants.data_root, constants.num_training, constants.num_validation).to(device)
    images_per_second = median(json.loads(options.speed.read_text())['cases']['ConvNet']['ways']['usual script'][
        'images_per_second'])
    curves = {}
    for recipe in options.recipes:
        row = next(iter(ex3_convnet.QUESTIONS[recipe].rows.values()))
        given = {key: value for key in ('num_epochs', 'hidden_size') if (value := getattr(options, key)) is not None}
        config = replace(constants, **(row | given), num_classes=len(data.classes), precision=precision)
        run = Run(recipe, 0, config, replace(data, val=data.test), data.source, options.results / recipe / 'seed0',
                  device, Progress(f'{recipe}, on the test images'), set())
        run.folder.mkdir(parents=True, exist_ok=True)
        if not (run.folder / 'result.json').exists():
            ex3_convnet.train(run)
        history = History.read(run.folder / 'history.csv')
        accuracies = [100 * accuracy for accuracy in history['val_accuracy']]
        curves[f'this project, {recipe}'] = list(zip(cumulated(history['seconds']), accuracies, strict=True))
        if recipe == 'Q1':
            seconds = [epoch.seconds * epoch.images_per_second / images_per_second for epoch in history.epochs]
            curves['usual script'] = list(zip(cumulated(seconds), accuracies, strict=True))
    title = Title('How long until the test images are recognised?',
                  f'{data.source}: {len(data.train):,} training, {len(data.test):,} test images; '
                  f'{describe_device(device)}, {precision}; usual script: {images_per_second:.0f} images/s in fp32')
    print(table(curves))
    write_atomically(options.results / 'curves.json', json.dumps({'title': title, 'curves': curves}, indent=1) + '\n')
    print(f'\n{plot(curves, options.results / "time_to_accuracy.png", title)}')
    return 0


def cumulated(seconds: Sequence[float]) -> list[float]:
    """Seconds of each epoch -> minutes until its end."""
    return [sum(seconds[:epoch + 1]) / 60 for epoch in range(len(seconds))]


def minutes_until(level: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The end of the first epoch after which at least `level` percent are right; None if there is none."""
    return next((minutes for minutes, accuracy in curve if accuracy >= level), None)


def table(curves: dict[str, list[tuple[float, float]]]) -> str:
    """Minutes until each level, as Markdown."""
    lines = [['minutes until', *(f'{level} %' for level in LEVELS), 'at the end']]
    for name, curve in curves.items():
        reached = [minutes_until(level, curve) for level in LEVELS]
        lines.append([name, *('–' if minutes is None else f'{minutes:.0f}' for minutes in reached),
                      f'{curve[-1][1]:.1f} % after {curve[-1][0]:.0f}'])
    return markdown_table(lines)


@own_style()
def plot(curves: dict[str, list[tuple[float, float]]], path: Path, title: Title) -> Path:
    """Test accuracy against minutes of training."""
    figure = new_figure(8, 4, title)
    panel = figure.subplots()
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        minutes, accuracies = zip(*curve, strict=True)
        panel.plot(minutes, accuracies, marker='o', markersize=4, color=colour, label=name)
    panel.set(xlabel='minutes of training', ylabel='test accuracy (%)', xlim=(0, None))
    for level in LEVELS:
        panel.axhline(level, color='#bbbbbb', linewidth=0.8, linestyle=':')
    panel.legend(loc='lower right')
    return save_figure(figure, path)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
