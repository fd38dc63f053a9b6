"""Which run it is: its constants, the content of its data and files. Two runs of the same identity are the same run."""
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.cifar10 import Data
from lab.constants import Constants, slug
from lab.files import DamagedFile, reading

# Constants that do not change what a run is. `data` does, by its content; `data_root` only says where it was found.
NOT_IDENTITY = ('experiment', 'results', 'seeds', 'device', 'data_root')


def identity(config: Constants, data: Data, known_by: Mapping[str, Any]) -> dict[str, Any]:
    """The constants that say which run it is, as JSON gives them back. known_by: replaces files by their content."""
    return _as_json({key: value for key, value in vars(config).items() if key not in NOT_IDENTITY}
                    | {'data': f'SHA256 {data.content}'} | dict(known_by))


def read_identity(path: Path, defaults: Constants) -> dict[str, Any]:
    """What a config.json holds; a constant that did not exist yet had its default. Raises DamagedFile."""
    with reading(path):
        recorded = dict(json.loads(path.read_text()))
    return _as_json({key: value for key, value in vars(defaults).items() if key not in NOT_IDENTITY}) | recorded


def difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs first between two identities; '' if nothing does. A precision of 'auto' fits any."""
    for key in now | there:
        if there.get(key) != now.get(key) and (key, now.get(key)) != ('precision', 'auto'):
            return ('the images or labels are not the same' if key == 'data'
                    else f'{key} is {there.get(key)} there and {now.get(key)} now')
    return ''


def choose_folder(base: Path, identities: Mapping[str, dict], defaults: Constants) -> Path:
    """The first of base, base-2, base-3 ... that is new or holds these runs."""
    for n in itertools.count(1):
        folder = base if n == 1 else base.with_name(f'{base.name}-{n}')
        folder.mkdir(parents=True, exist_ok=True)
        different = (f'{run}: {text}' for run, now in identities.items()
                     for path in sorted(folder.glob(f'{slug(run)}/seed*/config.json'))
                     if (text := difference(read_identity(path, defaults), now)))
        if not (text := next(different, '')):
            return folder
        print(f'{folder} holds runs with other constants ({text}); it is left alone, using the next folder')


def same_runs(results: Path, now: dict[str, Any], defaults: Constants, seed: int | None = None) -> Iterator[Path]:
    """The folders of finished runs of this identity below `results`, whichever experiment they belong to."""
    for path in sorted(results.glob(f'*/*/seed{"*" if seed is None else seed}/config.json')):
        try:
            if (path.parent / 'result.json').exists() and not difference(read_identity(path, defaults), now):
                yield path.parent
        except DamagedFile:
            continue  # of another experiment: not ours to complain about


def recorded_precision(folder: Path, run: str, others: Iterator[Path]) -> tuple[str, Path] | None:
    """(precision, where it stands) of a run that was begun in `folder`, else of its other runs, else of `others`."""
    begun = [path.parent for pattern in (slug(run), '*')
             for path in sorted(folder.glob(f'{pattern}/seed*/config.json'))]
    for path in itertools.chain(begun, others):
        with reading(path / 'config.json'):
            return json.loads((path / 'config.json').read_text())['precision'], path
    return None


def _as_json(constants: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(constants, default=str))
