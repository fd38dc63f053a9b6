"""Constants, the rows of an experiment and the command line -> the checked constants of every run."""
import difflib
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import tyro
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

Config = TypeVar('Config', bound='Constants')


class Constants(Protocol):
    """The constants that both scripts have and that this folder reads."""
    experiment: str
    data: str
    data_root: Path
    num_training: int
    num_validation: int
    results: Path
    seeds: tuple[int, ...]
    num_classes: int
    num_epochs: int
    learning_rate: float
    device: str
    precision: str


# Of every number among the constants, ends included.
RANGES = {
    'num_training': (1, 10**9), 'num_validation': (1, 10**9), 'seeds': (0, 2**31), 'input_size': (3, 3),
    'num_classes': (2, 10**6), 'hidden_size': (1, 4096), 'layer_config': (1, 10**5), 'dropout': (0, 0.95),
    'num_epochs': (1, 10**5), 'batch_size': (1, 5000), 'learning_rate': (1e-9, 100), 'learning_rate_decay': (1e-3, 1),
    'backbone_lr_scale': (0, 100), 'reg': (0, 10), 'warmup': (0, 0.9), 'label_smoothing': (0, 0.9),
    'ema_decay': (0, 0.99999), 'patience': (1, 10**5), 'freeze_at': (0, 1), 'flip': (0, 1), 'crop_padding': (0, 31),
    'degrees': (0, 180), 'translate': (0, 1), 'scale': (0, 0.9), 'shear': (0, 80), 'brightness': (0, 1),
    'contrast': (0, 1), 'saturation': (0, 1), 'hue': (0, 0.5), 'greyscale': (0, 1), 'cutout': (0, 32),
}


def lists_as_tuples(kind: type) -> type:
    """Class decorator: a constant edited to a list, [128, 512], becomes a tuple, because dataclasses refuse lists."""
    for key, value in list(vars(kind).items()):
        if isinstance(value, list):
            setattr(kind, key, tuple(value))
    return kind


@dataclass(frozen=True)
class Question:
    """What an experiment asks, and its runs: name -> the constants that differ from those at the top of the script."""
    text: str
    rows: Mapping[str, Mapping[str, Any]]


def read_constants(script: str, constants: Config, questions: Mapping[str, Question],
                   argv: Sequence[str], ranges: Mapping[str, tuple[float, float]] | None = None,
                   ) -> tuple[str, dict[str, Config]]:
    """(the experiment's name, run -> its constants), all checked. Constants < row < command line.

    ranges: where a script's are narrower than RANGES.
    Raises ValueError for what makes no sense, SystemExit for --help.
    """
    _check_class(type(constants))

    def read(row: Mapping[str, Any]) -> Config:
        config = _parse(script, typed(replace(constants, **row)), argv)
        return replace(config, **{key: Path(os.path.expanduser(path)) for key, path in vars(config).items()
                                  if isinstance(path, Path)})

    name = read({}).experiment
    if name not in questions:
        raise ValueError(f'experiment must be one of {", ".join(questions)}, got {name!r}')
    if first := next((one for one in questions if re.fullmatch(rf'{re.escape(one)}-\d+', name)), ''):
        raise ValueError(f"{name} is also the name of {first}'s next results folder: rename it")
    table = _check_table(name, questions[name], {one.name for one in fields(constants)})
    rows = {run: read(row) for run, row in table.items()}
    for config in rows.values():
        _check_ranges(config, RANGES | dict(ranges or {}))
    _check_compared(name, constants, table, rows)
    return name, rows


def differences(config: Any, constants: Any, hidden: Sequence[str]) -> str:
    """What a row or the command line has changed, but for `hidden`: "norm_layer='BN', num_epochs=5"."""
    return ', '.join(f'{key}={(Path(value).name if isinstance(value, str) else value)!r}'
                     for key, value in vars(config).items() if key not in hidden and value != getattr(constants, key))


def slug(run: str) -> str:
    """A run's name -> its folder: 'flip + crop' -> 'flip+crop', 'p = 0.1' -> 'p=0.1', 'batch norm' -> 'batch-norm'."""
    return re.sub(r'[^\w.+=]+', '-', re.sub(r' ([+=]) ', r'\1', run))


def _parse(script: str, default: Config, argv: Sequence[str]) -> Config:
    """The command line over `default`; ValueError, one sentence, where tyro would print a box of lines."""
    try:
        with redirect_stderr(io.StringIO()) as box:
            return tyro.cli(type(default), args=list(argv), default=default, prog=f'{script}.py')
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        text = re.sub(r'\x1b\[\d*m', '', box.getvalue())  # without a terminal's colours
        text = '\n'.join(line.strip('│╭╮╰╯─ ') for line in text.splitlines()[1:])
        lines = re.sub('^-+$', '', text, flags=re.M).strip().splitlines()  # the box of a console that is not UTF-8
        message = ' '.join(lines[:lines.index('')] if '' in lines else lines)
        if wrong := re.match(r"(?:Error parsing|Missing value for argument|.* for argument) '?(--[\w-]+)", message):
            option = wrong[1]
            given = re.findall(rf'{re.sub("-", "[-_]", option)}(?![\w-])(.*?)(?= --|$)', ' '.join(argv))
            kind = get_type_hints(type(default))[option[2:].replace('-', '_')]
            message = f'{option} must be {_meant(kind)}, got {"".join(given[-1:]).lstrip(" =")!r}'
        elif near := re.search(r'Perhaps you meant: (--[\w-]+)', ' '.join(filter(None, lines))):
            message += f': did you mean {near[1]}?'
        raise ValueError(f'{message} (all options: python {script}.py --help)') from None


def _check_class(kind: type) -> None:
    """Raise ValueError for what stands in the class without being a constant: changing it would go unnoticed."""
    constants = {one.name: one.default for one in fields(kind)}
    for key, value in vars(kind).items():
        if key.startswith('_') or callable(value):
            continue
        if key not in constants:
            raise ValueError(f'the constant {key} needs its type: write {key}: {type(value).__name__} = {value!r}')
        if repr(value) != repr(constants[key]):
            raise ValueError(f'Config.{key} = {value!r} came too late to count: edit the script, or give main the '
                             f'option --{key.replace("_", "-")}')


def _check_table(name: str, question: Question, constants: set[str]) -> Mapping[str, Mapping]:
    """A question's rows; ValueError where it has none, one sets what is no constant of a run, or two share a folder."""
    table = getattr(question, 'rows', None)
    if not (isinstance(table, Mapping) and table and all(
            isinstance(run, str) and slug(run) and isinstance(row, Mapping) for run, row in table.items())):
        raise ValueError(f"{name} must be a question with rows that have names, such as Question('which dropout?', "
                         f"{{'none': {{}}, 'half': dict(dropout=0.5)}}), got {question!r}")
    allowed = constants - {'experiment', 'results', 'device'}
    for run, row in table.items():
        for key in row.keys() - allowed:
            near = difflib.get_close_matches(key, sorted(allowed), n=1, cutoff=0.4) if key not in constants else []
            raise ValueError(f'{name}: the row {run!r} sets {key}, which is not a constant of a run'
                             + (f': did you mean {near[0]}?' if near else ''))
    folders = Counter(slug(run).lower() for run in table)
    if (shared := folders.most_common(1)) and shared[0][1] > 1:
        raise ValueError(f'{name} has {shared[0][1]} runs that would share the folder {shared[0][0]}: give them names '
                         f'that differ more')
    return table


def _check_compared(name: str, constants: Config, table: Mapping[str, Mapping], rows: Mapping[str, Config]) -> None:
    """Raise ValueError where the command line or an edited constant has undone what a question compares."""
    meant = {run: typed(replace(constants, **row)) for run, row in table.items()}  # without the command line
    alike = len(set(map(repr, meant.values()))) < len(meant)  # a constant has made two rows the same run
    for key in dict.fromkeys(key for row in table.values() for key in row):
        values = {repr(getattr(config, key)) for config in rows.values()}
        compared = [getattr(config, key) for config in meant.values()] if not alike else [
            row.get(key) for row in table.values()]
        misnamed = any(run == getattr(meant[run], key) != getattr(rows[run], key) for run in rows)
        if misnamed or len(values) == 1 < len(set(map(repr, compared))):
            raise ValueError(f'{name} compares values of {key}, but the command line or the constants make it '
                             f'{values.pop()} in every run: leave {key} alone, or choose another experiment')


def typed(config: Config) -> Config:
    """The constants with lists as tuples, text as paths, NumPy's numbers as Python's; ValueError for a wrong type."""
    kinds = get_type_hints(type(config))

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        return value.item() if isinstance(value, np.generic) else value  # of np.linspace, say

    config = replace(config, **{key: Path(value) if kinds[key] is Path and isinstance(value, str) else plain(value)
                                for key, value in vars(config).items()})
    for key, value in vars(config).items():
        try:
            check_type(value, kinds[key], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            if kinds[key] is not bool and bool in map(type, value if isinstance(value, tuple) else [value]):
                raise TypeCheckError('True and False are no numbers')
        except TypeCheckError:
            raise ValueError(f'{key} must be {_meant(kinds[key])}, got {value!r}') from None
    return config


def _meant(kind: Any) -> str:
    """A constant's type in words: int -> 'a whole number', Literal['BN'] | None -> "'BN' or None"."""
    kinds = get_args(kind)
    if get_origin(kind) is Literal:
        return ' or '.join(map(repr, kinds))
    if get_origin(kind) is tuple:
        return 'whole numbers, such as (1, 2)' if ... in kinds else f'{len(kinds)} whole numbers'
    words = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'a string', Path: 'a path'}
    return ' or '.join(map(_meant, kinds)) or words.get(kind, 'None')


def _check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError for a number, or a number in a tuple, outside its range (NaN is outside)."""
    for key, (low, high) in ranges.items():
        value = getattr(config, key, None)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () or not all(low <= number <= high for number in numbers):
            raise ValueError(f'{key} must be between {low:,} and {high:,}, got {value}')
