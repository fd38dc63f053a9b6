"""Which run it is: its constants, the content of its data and files. Two runs of the same identity are the same run."""
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.cifar10 import Data
from lab.constants import Constants, slug
from lab.files import DamagedFile, reading, write_atomically

# Constants that do not change what a run is. `data` does, by its content; `data_root` only says where it was found.
NOT_IDENTITY = ('experiment', 'results', 'seeds', 'device', 'data_root')
# What runs did that were made before these constants existed.
ADDED_LATER = {'normalisation': 'half', 'whiten': False, 'freeze_at': 1.0, 'crop_border': 'zeros'}


def identity(config: Constants, data: Data, known_by: Mapping[str, Any]) -> dict[str, Any]:
    """The constants that say which run it is, as JSON gives them back. known_by: replaces files by their content."""
    constants = {key: value for key, value in vars(config).items() if key not in NOT_IDENTITY}
    return json.loads(json.dumps(constants | {'data': f'SHA256 {data.content}'} | dict(known_by), default=str))


def read_identity(folder: Path) -> dict[str, Any]:
    """What a run's config.json holds. Raises DamagedFile."""
    with reading(folder / 'config.json'):
        return dict(json.loads((folder / 'config.json').read_text()))


def difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs first between two identities; '' if nothing does. A precision of 'auto' fits any."""
    for key in now | there:
        before, after = there.get(key, ADDED_LATER.get(key)), now.get(key)
        if before != after and (key, after) != ('precision', 'auto'):
            return ('the images or labels are not the same' if key == 'data'
                    else f'{key} is {before} there and {after} now')
    return ''


def seed_folders(folder: Path, run: str = '*') -> list[tuple[int, Path]]:
    """(seed, folder) of each run below an experiment's folder, and of no 'seed0 copy'."""
    return [(int(seed), path) for path in sorted(folder.glob(f'{run}/seed*'))
            if (seed := path.name.removeprefix('seed')).isdecimal()]


def choose_folder(base: Path, identities: Mapping[str, dict]) -> Path:
    """Of base, base-2, base-3 ... the first that holds these runs, else the first that holds no others."""
    base.mkdir(parents=True, exist_ok=True)
    numbers = {int(match[1]) for path in base.parent.iterdir()
               if (match := re.fullmatch(rf'{re.escape(base.name)}-([1-9]\d*)', path.name))}
    unused = next(n for n in itertools.count(2) if n not in numbers)
    free, others = None, {}
    for folder in [base, *(base.parent / f'{base.name}-{n}' for n in sorted(numbers | {unused}))]:
        begun = [(run, path) for run in identities for _, path in seed_folders(folder, slug(run))
                 if any((path / name).exists() for name in ('config.json', 'checkpoint.pt', 'result.json'))]
        others[folder] = next((f'{run}: {text}' for run, path in begun
                               if (text := difference(read_identity(path), identities[run]))), '')
        if begun and not others[folder]:
            break
        if not begun:
            free = free or folder
    else:
        folder = free
    for passed, text in itertools.takewhile(lambda other: other[0] != folder, others.items()):
        if text:
            print(f'{passed} holds runs with other constants ({text}); it is left alone, using the next folder')
    folder.mkdir(exist_ok=True)
    return folder


def claim(folder: Path, now: dict[str, Any]) -> None:
    """Write a run's config.json, unless it is there."""
    if not (folder / 'config.json').exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / 'config.json', json.dumps(now, indent=1) + '\n')


def same_runs(results: Path, now: dict[str, Any], seed: int | None = None) -> Iterator[Path]:
    """The folders of finished runs of this identity below `results`, whichever experiment they belong to."""
    for found, path in seed_folders(results, '*/*'):
        try:
            if (seed in (None, found) and (path / 'result.json').exists()
                    and not difference(read_identity(path), now)):
                yield path
        except DamagedFile:
            continue  # of another experiment: not ours to complain about


def recorded_precision(folder: Path, run: str, others: Iterable[Path] = ()) -> tuple[str, Path] | None:
    """(precision, where it stands) of a run that was begun in `folder`, else of its other runs, else of `others`."""
    begun = [path for pattern in (slug(run), '*') for _, path in seed_folders(folder, pattern)
             if (path / 'config.json').exists()]
    for path in itertools.chain(begun, others):
        with reading(path / 'config.json'):
            return read_identity(path)['precision'], path
    return None
