"""Which images are used, CIFAR-10 or what stands in for it, and how they are split."""
import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10

from datasets import shapes
from datasets.batches import Split
from datasets.folder import load_folder, some_of

SECONDS_TO_ANSWER = 10  # a server silent for longer is given up
HERE = Path(__file__).resolve().parent  # where get_datasets.sh unpacks


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, split."""
    source: str  # for titles and results
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    content: str  # what identifies the images and labels, see `content_of`
    banner: str = ''  # what no one must miss: that this is not CIFAR-10, though it was meant to be
    notes: tuple[str, ...] = ()  # what else a user should know, a line each

    def to(self, device: torch.device) -> 'Data':
        return replace(self, **{part: getattr(self, part).to(device) for part in ('train', 'val', 'test')})


def load(data: str, data_root: Path, num_training: int, num_validation: int) -> Data:
    """Load and split what the constant `data` names: 'auto', 'cifar10', 'shapes' or an image folder.

    'auto' is CIFAR-10 if it is in `data_root` or can be downloaded, else the shapes. Raises ValueError when CIFAR-10
    is asked for and cannot be had, or is there and damaged, and for an image folder that does not fit.
    """
    name, source, content, banner, notes = data, 'CIFAR-10', '', '', []
    if data in ('auto', 'cifar10', 'shapes') and Path(data, 'train').is_dir():
        notes.append(f'{data} is not the image folder {data}: for that, set data to ./{data}')
    if data in ('auto', 'cifar10'):
        try:
            classes, pool, test = _load_cifar10(data_root)
            name = 'cifar10'
        except RuntimeError as error:
            if data == 'cifar10' or (data_root / CIFAR10.base_folder).exists():
                raise ValueError('; '.join([str(error), *notes])) from error
            name, banner = 'shapes', f'NOT CIFAR-10, but ten classes of drawn shapes. {error}.'
    if name == 'shapes':
        source, classes = 'built-in shapes (not CIFAR-10)', shapes.CLASSES
        pool, test = Split(*shapes.make_shapes(2000, seed=0)), Split(*shapes.make_shapes(1000, seed=1))
        content = hashlib.sha256(f'{shapes.VERSION}, {len(pool)} and {len(test)} images'.encode()).hexdigest()
    elif name != 'cifar10':
        root = Path(data).expanduser().resolve()
        if not root.is_dir():
            raise ValueError(f"data must be 'auto', 'cifar10', 'shapes' or a folder with train/<class>/* and "
                             f"test/<class>/*, but there is no folder {data}")
        for folder in (root, root / CIFAR10.base_folder):
            _refuse_cifar10_itself(folder)
        source = root.name
        classes, pool, test, notes = load_folder(root)
    train, val = split(pool, num_training, num_validation)
    notes += _remarks(classes, pool, train, val)
    return Data(source, tuple(classes), train, val, test, content or content_of(classes, pool, test), banner,
                tuple(notes))


def split(pool: Split, num_training: int, num_validation: int) -> tuple[Split, Split]:
    """(train, val): val the last `num_validation` images, a fifth at most; train the first `num_training` others."""
    num_validation = min(num_validation, len(pool) // 5)
    if num_validation == 0:
        raise ValueError(f'at least 5 training images are needed, because a fifth is held out for validation; '
                         f'there are {len(pool)}')
    rest = len(pool) - num_validation
    return pool[:min(num_training, rest)], pool[rest:]


def content_of(classes: Sequence[str], pool: Split, test: Split) -> str:
    """SHA256 of the class names and of all decoded images and labels: equal only for the same data, wherever it is."""
    digest = hashlib.sha256(ascii(tuple(classes)).encode())
    for part in (pool, test):
        digest.update(ascii(tuple(part.images.shape)).encode())
        for tensor in (part.images, part.labels):
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def _remarks(classes: Sequence[str], pool: Split, train: Split, val: Split) -> list[str]:
    """What a user should know of the split: images that are not used, and classes it hardly reaches."""
    remarks = []
    if (used := len(train) + len(val)) < len(pool):
        remarks.append(f'{used:,} of {len(pool):,} training images are used (num_training = {len(train):,}, '
                       f'num_validation = {len(val):,})')
    for few, part, images, enough in (('no', 'training', train, 1), ('few', 'validation', val, 5)):
        counts = torch.bincount(images.labels, minlength=len(classes)).tolist()
        if rare := [f'{name} ({count})' for name, count in zip(classes, counts, strict=True) if count < enough]:
            remarks.append(f'{few} {part} images of {some_of(rare, 10)}: raise num_{part} or add images')
    return remarks


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


def _load_cifar10(root: Path) -> tuple[Sequence[str], Split, Split]:
    """Read CIFAR-10 from `root`, checksums verified; download it if need be. Raises RuntimeError saying what to do."""
    _refuse_cifar10_itself(root)
    try:
        train = CIFAR10(root, train=True)
    except RuntimeError:
        damaged = (root / CIFAR10.base_folder).exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / 'cifar-10-download.lock'), network_timeout():  # the others find it downloaded
                train = CIFAR10(root, train=True, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            state = f'is damaged in {root}' if damaged else f'is not in {root}'
            remedy = f'delete {root / CIFAR10.base_folder}, then ' if damaged else ''
            remedy += 'run datasets/get_datasets.sh (a mirror may be faster: datasets/get_datasets.sh URL)'
            if root.resolve() != HERE:
                remedy += f' and set data_root to {HERE}, where it unpacks'
            raise RuntimeError(f'CIFAR-10 {state} and could not be downloaded ({error}): {remedy}') from error
    pool, test = (Split(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
                  for part in (train, CIFAR10(root, train=False)))
    return train.classes, pool, test


def _refuse_cifar10_itself(folder: Path) -> None:
    if os.path.isfile(folder / 'data_batch_1'):  # no error where one may not look
        raise ValueError(f"{folder} is CIFAR-10 itself: set data to 'cifar10' and data_root to {folder.parent}, "
                         f'the folder that holds {CIFAR10.base_folder}')


@contextmanager
def network_timeout() -> Iterator[None]:
    """Give up a server that stays silent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_ANSWER)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
