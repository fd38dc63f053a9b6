"""Files that are whole or not there, tensors read with care, and tables of dataclasses as CSV."""
import csv
import io
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from lab.device import first_sentence, is_out_of_memory


class DamagedFile(ValueError):
    """A file of a run that cannot be used; the message says what to delete."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write the whole file or leave the old one: no crash and no full disk ever leaves a part of it."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode(errors='backslashreplace') if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say which file
        raise


def _replace(source: Path, target: Path) -> None:
    """os.replace, which Windows refuses while another program has the target open: a virus scanner soon lets go."""
    for seconds in (0.1, 0.3, 1):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or foreign file makes its reader raise into one sentence, a DamagedFile."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, DamagedFile):
            raise
        raise DamagedFile(f'{path} is missing, damaged or from another run ({type(error).__name__}: '
                          f'{first_sentence(error)}): delete {path.parent} to train this run again') from error


# --- tensors ------------------------------------------------------------------------------------------------


def save_tensors(value: dict, path: Path) -> None:
    """torch.save, but whole or not at all, and of CPU tensors: what a GPU trained also loads where there is none."""
    buffer = io.BytesIO()
    torch.save(each_tensor(Tensor.cpu, value), buffer)
    write_atomically(path, buffer.getbuffer())


def each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Dicts and lists of tensors, however deep, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each_tensor(change, item) for key, item in value.items()}
    return [each_tensor(change, item) for item in value] if isinstance(value, list) else value


def load_tensors(path: Path, device: torch.device | str = 'cpu') -> Any:
    """torch.load of tensors and plain values only, the checksums verified. Raises whatever a damaged file causes."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch itself does not look at the checksums
            raise zipfile.BadZipFile(f'{damaged} fails its checksum')
    return torch.load(path, map_location=device, weights_only=True)


# --- tables -------------------------------------------------------------------------------------------------


def to_csv(kind: type, rows: Sequence[Any]) -> str:
    """Instances of the dataclass `kind` -> CSV, one column per field, None as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator='\n')
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read_csv(kind: type, path: Path) -> list[Any]:
    """What `to_csv` wrote -> instances of `kind`. Raises whatever a damaged file causes."""
    hints = get_type_hints(kind)
    with path.open(newline='', encoding='utf-8') as file:
        return [kind(**{field.name: _cell(row[field.name], hints[field.name]) for field in fields(kind)})
                for row in csv.DictReader(file)]


def _cell(cell: str, hint: Any) -> Any:
    types = get_args(hint) or (hint,)
    return None if cell == '' and type(None) in types else types[0](cell)
