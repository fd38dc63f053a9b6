"""From a table of runs to folders: parsing constants, seeds, resuming, the lock, summaries and comparison plots.

Shared by the two scripts, which say what the constants are, which runs are compared and what one run builds.
"""
import csv
import difflib
import io
import itertools
import json
import math
import re
import signal
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import tyro
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from training import (
    History,
    decay,
    evaluate,
    fit,
    load_tensors,
    make_optimizer,
    one_cycle,
    reading,
    seed_everything,
)
from utils import (
    PrintModelSize,
    describe_device,
    is_out_of_memory,
    pick_device,
    pick_precision,
    plot_curves,
    write_atomically,
)

# Constants that do not change what a run is. `data_root` only says where `data` was found: a moved clone goes on.
NOT_IDENTITY = ('results', 'seeds', 'device', 'data_root')

# Constants left out of a title's second line: the first line has them, or they do not change what a run is.
SHOWN_OTHERWISE = ('experiment', 'data', 'weights', 'num_training', 'num_classes', 'precision', *NOT_IDENTITY)

# Ranges of the constants that both scripts have, ends included.
RANGES = {
    'num_training': (1, 10**9), 'num_validation': (1, 10**9), 'seeds': (0, 2**31), 'num_classes': (2, 10**6),
    'num_epochs': (1, 10**5), 'batch_size': (1, 5000), 'learning_rate': (1e-9, 100), 'learning_rate_decay': (1e-3, 1),
    'reg': (0, 10), 'warmup': (0, 0.9), 'label_smoothing': (0, 0.9), 'ema_decay': (0, 0.99999), 'patience': (1, 10**5),
    'flip': (0, 1), 'crop_padding': (0, 31), 'cutout': (0, 32),
}


class NotRun(Exception):
    """Raised by `build` when a run cannot be done here, while others can."""


class Task(NamedTuple):
    """What one run trains: made by the script's `build(config, data)`."""
    model: nn.Module
    groups: list[dict]  # parameter groups for `make_optimizer`
    train: Any  # `Batches`, shuffled and augmented
    evaluation: dict[str, Any]  # 'train', 'val', 'test' -> `Batches`, complete and as they are
    seconds: float = 0.0  # spent on what training would otherwise do: a frozen backbone's features


@dataclass
class Result:
    """A row of summary.csv. Accuracies in [0, 1], in evaluation mode, on the complete sets; None where unknown."""
    run: str
    seed: int
    status: str = 'finished'  # or what went wrong
    data: str = ''
    training_images: int = 0
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


@dataclass
class Experiment:
    """An experiment and what is known of it so far: what the script's `figures` gets."""
    title: str
    folder: Path
    rows: dict[str, Any]  # run -> its constants
    identities: dict[str, dict]  # run -> what its config.json holds
    data: dict[str, Any]  # run -> its data
    device: torch.device
    sizes_shown: set[int] = field(default_factory=set)
    results: list[Result] = field(default_factory=list)
    histories: dict[str, list[History]] = field(default_factory=dict)

    def add(self, result: Result, history: History) -> None:
        """Remember how a run ended, in the order of the table whatever the order in which they ran."""
        order = list(self.rows).index
        self.results = sorted([*self.results, result], key=lambda one: (order(one.run), one.seed))
        if history.epochs:
            self.histories.setdefault(result.run, []).append(history)
            self.histories = dict(sorted(self.histories.items(), key=lambda one: order(one[0])))

    def run_folder(self, run: str, seed: int) -> Path:
        return self.folder / slug(run) / f'seed{seed}'

    def finished(self) -> list[tuple[str, int]]:
        """The (run, seed) that need not be done again."""
        return [(run, int(seed)) for run in self.rows
                for path in sorted(self.folder.glob(f'{slug(run)}/seed*/result.json'))
                if (seed := path.parent.name.removeprefix('seed')).isdecimal()]  # and no 'seed0 copy'

    def statistic(self, column: str) -> tuple[list[float], list[float]]:
        """Mean and standard deviation over seeds, in percent, of an accuracy of `Result`: one value a trained run."""
        values = [[100 * accuracy for result in self.results
                   if result.run == run and (accuracy := getattr(result, column)) is not None]
                  for run in self.histories]
        return ([statistics.mean(v) if v else math.nan for v in values],
                [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values])

    def load(self, model: nn.Module, run: str, seed: int, which: str = 'best') -> nn.Module:
        """Load the best or the last weights of a run into `model`."""
        path = self.run_folder(run, seed) / f'{which}.pt'
        with reading(path):
            model.load_state_dict(load_tensors(path, self.device))
        return model


class Script(NamedTuple):
    """What a script brings along."""
    name: str
    constants: type  # a frozen dataclass, a field a constant
    experiments: dict[str, dict[str, dict]]  # experiment -> run -> what differs from the constants
    questions: dict[str, str]  # experiment -> what it asks
    check: Callable[[Any], None]  # raises ValueError for constants that cannot be meant
    load_data: Callable[[Any], Any]  # constants -> `Data`
    build: Callable[[Any, Any], Task]  # constants, data -> what is trained; raises NotRun
    figures: Callable[[Experiment], list[Path]]  # draws what the question asks to see
    identity: Callable[[Any], dict] = asdict  # constants -> what decides whether two runs are the same


def run(script: Script, argv: Sequence[str] | None) -> int:
    """Run the experiment that the constants and the command line name; returns the exit status.

    0: all runs finished; 1: a run diverged or could not be done; 2: wrong input; 130 or 143: interrupted.
    """
    try:
        if hasattr(sys.stdout, 'reconfigure'):
            sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once, too
        with _signals_as_exceptions():
            return _run(script, argv)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print('\nInterrupted. Nothing finished is lost: the same command continues.', file=sys.stderr)
        return 128 + number
    except ValueError as error:  # what a user can cause, and can mend
        message = str(error)
    except OSError as error:  # no space, no permission, a file where a folder should be
        message = f'{error}: mend that or choose another folder with --results; the same command continues'
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = 'out of memory: lower the constant batch_size (for example to half), or close other programs'
    print(f'{script.name}: error: {message}', file=sys.stderr)
    return 2


def _run(script: Script, argv: Sequence[str] | None) -> int:
    name, rows = parse(script, argv)
    table = script.experiments[name]
    first = next(iter(rows.values()))
    print(f'{name}: {script.questions.get(name, "")}')
    for run, config in rows.items():
        print(f'  {run}: {_differences(config, script.constants()) or "the constants"}')
    device = pick_device(first.device)
    rows, data = _resolve(rows, device, script.load_data)
    seeds = dict.fromkeys(seed for config in rows.values() for seed in config.seeds)
    jobs = [(run, seed) for seed in seeds for run, config in rows.items() if seed in config.seeds]

    identities = {run: _identity(script.identity(config)) for run, config in rows.items()}
    with _claimed_folder(Path(first.results) / script.name / name, identities) as folder:
        sources = dict.fromkeys(each.source for each in data.values())
        sizes = dict.fromkeys(f'{len(each.train):,}' for each in data.values())
        title = f'{name} · {" / ".join(sources)}, {" / ".join(sizes)} training images'
        changed = {_differences(config, replace(script.constants(), **table[run]), SHOWN_OTHERWISE): None
                   for run, config in rows.items()}
        if text := ' / '.join(filter(None, changed)):  # so that nobody takes a reduced run for the whole
            title += f'\n{text}'
        experiment = Experiment(title, folder, rows, identities, data, device)
        jobs = [job for job in experiment.finished() if job not in jobs] + jobs  # seeds of earlier calls belong to it
        for i, (run, seed) in enumerate(jobs):
            done = experiment.finished()
            later = [job for job in jobs[i + 1:] if job not in done]
            result, history = _one_run(experiment, run, seed, script.build, later)
            experiment.add(result, history)
            if later and (run, seed) not in done:  # a picture for every run that was only read again takes too long
                _summarise(experiment)
        plots = _summarise(experiment)
        if experiment.histories:
            plots += script.figures(experiment)
    print(summary(experiment))
    print('\n'.join(['', *map(str, [folder / 'summary.csv', *plots])]))
    failed = [result for result in experiment.results if result.status != 'finished']
    for result in failed:
        print(f'{result.run}, seed {result.seed}: {result.status}', file=sys.stderr)
    return 1 if failed else 0


def _resolve(rows: dict[str, Any], device: torch.device, load_data: Callable) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settle what 'auto' means and load what the runs need, each once: (run -> constants, run -> data)."""
    precisions, loaded, data = {}, {}, {}
    for run, config in rows.items():
        if config.precision not in precisions:
            precisions[config.precision], reason = pick_precision(config.precision, device)
            print(f'device: {describe_device(device)}; precision: {precisions[config.precision]} ({reason})')
        wanted = (config.data, config.data_root, config.num_training, config.num_validation,
                  getattr(config, 'weights', None))  # which its source names
        if wanted not in loaded:
            loaded[wanted] = load_data(config).to(device)
            _introduce(loaded[wanted], config)
        data[run] = loaded[wanted]
        rows = rows | {run: replace(config, data=data[run].name, num_classes=len(data[run].classes),
                                    precision=precisions[config.precision])}
    return rows, data


def _introduce(data: Any, config: Any) -> None:
    print(f'data: {data.source}, {len(data.classes)} classes; {len(data.train):,} training, '
          f'{len(data.val):,} validation and {len(data.test):,} test images')
    for note in data.notes:
        print(f'{"*" * 100}\n{note}\n{"*" * 100}')
    if config.num_classes != len(data.classes):
        print(f'num_classes: {len(data.classes)} instead of {config.num_classes}, as the data has')


# --- constants ----------------------------------------------------------------------------------------------


def parse(script: Script, argv: Sequence[str] | None) -> tuple[str, dict[str, Any]]:
    """(experiment's name, run -> its constants), all checked. Constants < row of the table < command line.

    Raises ValueError; options that do not exist or are of the wrong type end the program (tyro, exit status 2).
    """
    def read(row: dict) -> Any:
        default = _typed(replace(script.constants(), **row))
        return tyro.cli(script.constants, args=argv, default=default, prog=f'{script.name}.py')

    name = read({}).experiment
    if name not in script.experiments:
        raise ValueError(f'experiment must be one of {", ".join(script.experiments)}, got {name!r}')
    table = script.experiments[name]
    _check_table(name, table, {f.name for f in fields(script.constants)} - {'experiment', 'results', 'device'})
    rows = {run: read(row) for run, row in table.items()}
    for config in rows.values():
        script.check(config)
    for key in {key: None for row in table.values() for key in row}:
        compared = len({repr(row.get(key)) for row in table.values()}) > 1
        values = {repr(getattr(config, key)) for config in rows.values()}
        renamed = any(row.get(key) == run != getattr(rows[run], key) for run, row in table.items())
        if renamed or compared and len(values) == 1:
            raise ValueError(f'{name} compares values of {key}, but the command line or the constants make it '
                             f'{values.pop()} in every run: leave {key} alone, or choose another experiment')
    return name, rows


def _differences(config: Any, constants: Any, hidden: Iterable[str] = ('experiment', 'results', 'device', 'data_root'),
                 ) -> str:
    """What a row or the command line has changed, but for `hidden`: "norm_layer='BN', num_epochs=5"."""
    return ', '.join(f'{key}={(Path(value).name if isinstance(value, str) else value)!r}'
                     for key, value in vars(config).items() if key not in hidden and value != getattr(constants, key))


def _check_table(name: str, table: dict[str, dict], allowed: set[str]) -> None:
    """Raise ValueError for a row that sets what is no constant of a run, and for runs that would share a folder."""
    for run, row in table.items():
        for key in row.keys() - allowed:
            near = difflib.get_close_matches(key, sorted(allowed), n=1, cutoff=0.4)
            raise ValueError(f'EXPERIMENTS[{name!r}][{run!r}] sets {key}, which is no constant of a run'
                             + (f': did you mean {near[0]}?' if near else ''))
    folders = Counter(slug(run).lower() for run in table)
    if (shared := folders.most_common(1)) and shared[0][1] > 1:
        raise ValueError(f'EXPERIMENTS[{name!r}] has {shared[0][1]} runs that would share the folder {shared[0][0]}: '
                         f'give them names that differ more')


def _typed(config: Any) -> Any:
    """The constants as they were edited, lists as tuples; ValueError for one of a wrong type (tyro checks options)."""
    kinds = get_type_hints(type(config))
    config = replace(config, **{key: tuple(value) if isinstance(value, list) else Path(value) if kinds[key] is Path
                                else value for key, value in vars(config).items()})
    for key, value in vars(config).items():
        if not _fits(value, kinds[key]):
            choices = get_args(kinds[key])
            wanted = (' or '.join(map(repr, choices)) if get_origin(kinds[key]) is Literal
                      else getattr(kinds[key], '__name__', '') if not choices else str(kinds[key]))
            raise ValueError(f'{key} must be {wanted}, got {value!r}')
    return config


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type that an annotation names."""
    kinds = get_args(kind)
    if get_origin(kind) is Literal:
        return value in kinds
    if get_origin(kind) is tuple:
        fixed = kinds[-1] is not Ellipsis
        return isinstance(value, tuple) and all(_fits(v, kinds[0]) for v in value) and not (
            fixed and len(value) != len(kinds))
    if kinds:  # A | B
        return any(_fits(value, each) for each in kinds)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not isinstance(value, bool)


def check_ranges(config: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError for a number, or a number in a tuple, outside its range (ends included; NaN is outside)."""
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () or not all(low <= number <= high for number in numbers):
            raise ValueError(f'{key} must be between {low:g} and {high:g}, got {value}')


# --- folders ------------------------------------------------------------------------------------------------


def slug(run: str) -> str:
    """'flip + crop' -> 'flip+crop', 'p = 0.1' -> 'p=0.1', 'batch norm' -> 'batch-norm'."""
    return re.sub(r'[^\w.+=]+', '-', re.sub(r' ([+=]) ', r'\1', run))


@contextmanager
def _claimed_folder(base: Path, identities: dict[str, dict]) -> Iterator[Path]:
    """The first of base, base-2, base-3 ... that is new or holds these constants, locked for this process."""
    for n in itertools.count(1):
        folder = base if n == 1 else base.with_name(f'{base.name}-{n}')
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / '.lock')
        with suppress(Timeout):
            lock.acquire(timeout=0)
        difference = _difference(folder, identities)
        if not difference:
            break
        lock.release()
        print(f'{folder} holds runs with other constants ({difference}): they stay')
    if not lock.is_locked:
        raise ValueError(f'another process is working on {folder}: wait until it ends, or choose another folder '
                         f'with --results')
    try:
        yield folder
    finally:
        lock.release()


def _identity(constants: dict) -> dict:
    """The constants that say what a run is, as JSON gives them back."""
    return json.loads(json.dumps({k: v for k, v in constants.items() if k not in NOT_IDENTITY}, default=str))


def _difference(folder: Path, identities: dict[str, dict]) -> str:
    """What differs first between the constants in `folder` and these; '' if nothing does."""
    for run, identity in identities.items():
        for path in sorted(folder.glob(f'{slug(run)}/seed*/config.json')):
            with reading(path):
                there = dict(json.loads(path.read_text()))
            for key in identity | there:
                if there.get(key) != identity.get(key):
                    return f'{run}: {key} is {there.get(key)} there and {identity.get(key)} now'
    return ''


# --- one run ------------------------------------------------------------------------------------------------


def _one_run(experiment: Experiment, run: str, seed: int, build: Callable,
             later: Sequence[tuple[str, int]]) -> tuple[Result, History]:
    """Train, or continue, or read what was finished before; `later` is what is still to be done afterwards."""
    config, data, folder = experiment.rows[run], experiment.data[run], experiment.run_folder(run, seed)
    title = f'{run}, seed {seed}'
    if (folder / 'result.json').exists():
        (folder / 'checkpoint.pt').unlink(missing_ok=True)
        result, history = _read_finished(folder, run, seed)
        print(f'{title}: {result.status} before, not repeated')
        return result, history

    result = Result(run, seed, data=data.source, training_images=len(data.train),
                    device=describe_device(experiment.device), precision=config.precision)
    seed_everything(seed)
    try:
        task = build(config, data)
    except NotRun as reason:
        result.status = f'not run: {reason}'
        print(f'{title}: {result.status}', file=sys.stderr)
        return result, History()
    result.parameters = PrintModelSize(task.model, disp=False)
    result.trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    if result.trainable not in experiment.sizes_shown:
        PrintModelSize(task.model)
        experiment.sizes_shown.add(result.trainable)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / 'config.json', json.dumps(experiment.identities[run], indent=1) + '\n')
    schedule = (one_cycle(config.learning_rate, config.num_epochs, config.warmup) if config.schedule == 'one-cycle'
                else decay(config.learning_rate, config.learning_rate_decay))
    history = fit(task.model, task.train, task.evaluation['val'],
                  make_optimizer(config.optimizer, task.groups, config.learning_rate, config.reg), schedule,
                  num_epochs=config.num_epochs, seed=seed, folder=folder, precision=config.precision,
                  patience=config.patience, label_smoothing=config.label_smoothing, ema_decay=config.ema_decay,
                  title=title, source=experiment.title, epochs_to_come=_epochs_to_come(experiment, config, later))
    result.epochs, result.seconds = len(history.epochs), task.seconds + sum(history['seconds'])
    if history.diverged:
        result.status = (f'diverged in {history.diverged}, where the loss was not a finite number: lower learning_rate '
                         f'({config.learning_rate:g}), or look at reg, optimizer and precision')
    if history.epochs:
        result.best_epoch = history.best.epoch
        for which in ['best'] if history.diverged else ['best', 'last']:
            if which == 'last' and history.best.epoch == len(history.epochs):
                values = [getattr(result, f'best_{part}_accuracy') for part in task.evaluation]  # the same weights
            else:
                experiment.load(task.model, run, seed, which)
                values = [evaluate(task.model, tqdm(batches, f'{title}: {which} model, {part} images', disable=None,
                                                    leave=False), config.precision)[1]
                          for part, batches in task.evaluation.items()]
            for part, accuracy in zip(task.evaluation, values, strict=True):
                setattr(result, f'{which}_{part}_accuracy', accuracy)
    write_atomically(folder / 'result.json', json.dumps(asdict(result), indent=1) + '\n')
    (folder / 'checkpoint.pt').unlink(missing_ok=True)
    return result, history


def _epochs_to_come(experiment: Experiment, config: Any, later: Sequence[tuple[str, int]]) -> int:
    """Epochs of the later runs, for the estimate of the time; 0 where theirs take another time than this run's."""
    rows = [experiment.rows[run] for run, _ in later]
    alike = all(getattr(row, key, None) == getattr(config, key, None)
                for row in rows for key in ('mode', 'hidden_size'))
    return sum(row.num_epochs for row in rows) if alike else 0


def _read_finished(folder: Path, run: str, seed: int) -> tuple[Result, History]:
    """What a finished run left. Raises ValueError when it is damaged or does not fit together."""
    path = folder / 'result.json'
    with reading(path):
        result = Result(**json.loads(path.read_text()))
        if not all(isinstance(getattr(result, f.name), f.type) for f in fields(Result)):
            raise TypeError('a value is of another type')
    history = History.read(folder / 'history.csv') if result.epochs else History()
    with reading(path):
        best_epoch = history.best.epoch if history.epochs else None
        if (result.run, result.seed, result.epochs, result.best_epoch) != (run, seed, len(history.epochs), best_epoch):
            raise ValueError('it is of another run, or history.csv is not complete')
    return result, history


# --- summaries ----------------------------------------------------------------------------------------------


def _summarise(experiment: Experiment) -> list[Path]:
    """Write summary.csv, summary.md and, with histories, curves.png of all runs; returns the plots."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Result)], lineterminator='\n')
    writer.writeheader()
    writer.writerows(asdict(result) for result in experiment.results)
    write_atomically(experiment.folder / 'summary.csv', text.getvalue())
    write_atomically(experiment.folder / 'summary.md', f'{experiment.title}\n\n{summary(experiment)}\n')
    if not experiment.histories:
        return []
    return [plot_curves(experiment.histories, experiment.folder / 'curves.png', experiment.title)]


def read_summary(path: Path) -> list[Result]:
    """Read summary.csv."""
    with path.open(newline='', encoding='utf-8') as file:
        return [Result(**{f.name: _parse_cell(row[f.name], f.type) for f in fields(Result)})
                for row in csv.DictReader(file)]


def _parse_cell(cell: str, kind: Any) -> Any:
    if cell == '' and kind is not str:
        return None
    return cell if kind is str else int(cell) if 'int' in str(kind) else float(cell)


def mean_std(values: Iterable[float | None], form: str = '.1f', scale: float = 1.0) -> str:
    """[0.81, 0.83] with scale 100 -> '82.0 ± 1.4': mean and sample standard deviation; one value stands alone."""
    numbers = [value * scale for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return '–'
    text = f'{statistics.mean(numbers):{form}}'
    return f'{text} ± {statistics.stdev(numbers):{form}}' if len(numbers) > 1 else text


def summary(experiment: Experiment) -> str:
    """The table, and how much of a difference is chance."""
    text = summary_table(experiment.results)
    accuracies = [result.best_val_accuracy for result in experiment.results if result.best_val_accuracy is not None]
    if accuracies:
        p, n = statistics.mean(accuracies), min(len(data.val) for data in experiment.data.values())
        text += (f'\n\nAccuracies in percent. With {n:,} validation images, one standard error of a validation '
                 f'accuracy is {100 * math.sqrt(p * (1 - p) / n):.1f} points.')
    return text


def summary_table(results: Sequence[Result]) -> str:
    """A Markdown table, a line a run: mean ± standard deviation over its seeds, accuracies in percent."""
    head = ['run', 'seeds', 'trained / all parameters', 'epochs', 'best epoch', 'best: train', 'val', 'test',
            'latest: train', 'val', 'test', 'seconds']
    lines = [head]
    for run in dict.fromkeys(result.run for result in results):
        same = [result for result in results if result.run == run]
        failed = [result.status for result in same if result.status != 'finished']
        name = f'{run} ({re.split("[,:]", failed[0])[0]})' if failed else run
        size = next((f'{r.trainable:,} / {r.parameters:,}' for r in same if r.parameters), '–')
        lines.append([name, str(len(same)), size, mean_std([r.epochs for r in same], '.0f'),
                      mean_std([r.best_epoch for r in same], '.0f'),
                      *(mean_std([getattr(r, f'{which}_{part}_accuracy') for r in same], scale=100)
                        for which in ('best', 'last') for part in ('train', 'val', 'test')),
                      mean_std([r.seconds for r in same], '.0f')])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells -> a Markdown table that is readable as text, too; the first line is the head, numbers stand right."""
    head, *body = lines
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruler = [f'{"-" * (width - 1)}{":" if i else "-"}' for i, width in enumerate(widths)]
    return '\n'.join('| ' + ' | '.join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(
        zip(line, widths, strict=True))) + ' |' for line in (head, ruler, *body))


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once: a second one does not break the writing the first one causes."""
    def interrupt(number: int, _frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
