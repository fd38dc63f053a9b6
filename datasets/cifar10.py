"""Where the images come from, how they are split, and how batches are made of them on the training device."""
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from datasets import shapes

SECONDS_TO_ANSWER = 10  # a server silent for longer is given up
HOW_TO_DOWNLOAD = 'run datasets/get_datasets.sh (a mirror may be faster: datasets/get_datasets.sh URL)'


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64, on one device."""
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> 'Split':
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> 'Split':
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, split."""
    name: str  # the constant `data`, resolved: 'cifar10', 'shapes' or the absolute path of a folder
    source: str  # for titles and results
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...] = ()  # what a user must be told

    def to(self, device: torch.device) -> 'Data':
        return replace(self, **{part: getattr(self, part).to(device) for part in ('train', 'val', 'test')})


def load(data: str, data_root: Path, num_training: int, num_validation: int) -> Data:
    """Load and split what the constant `data` names: 'auto', 'cifar10', 'shapes' or an image folder.

    'auto' is CIFAR-10 if it is in `data_root` or can be downloaded, else the shapes. Raises ValueError when CIFAR-10
    is asked for and cannot be had, or is there and damaged, and for an image folder that does not fit.
    """
    name, source, notes = data, 'CIFAR-10', []
    if data in ('auto', 'cifar10'):
        try:
            classes, pool, test = _load_cifar10(data_root)
            name = 'cifar10'
        except RuntimeError as error:
            if data == 'cifar10' or (data_root / CIFAR10.base_folder).exists():
                raise ValueError(str(error)) from error
            name, notes = 'shapes', [f'NOT CIFAR-10, but ten classes of drawn shapes. {error}.']
    if name == 'shapes':
        source, classes = 'built-in shapes (not CIFAR-10)', shapes.CLASSES
        pool, test = Split(*shapes.make_shapes(2000, seed=0)), Split(*shapes.make_shapes(1000, seed=1))
    elif name != 'cifar10':
        root = Path(data).expanduser().resolve()
        if not root.is_dir():
            raise ValueError(f"data must be 'auto', 'cifar10', 'shapes' or a folder with train/<class>/* and "
                             f"test/<class>/*, but there is no folder {data}")
        name, source = str(root), root.name
        classes, pool, test, notes = _load_folder(root)
    train, val = split(pool, num_training, num_validation)
    return Data(name, source, tuple(classes), train, val, test, tuple(notes))


def split(pool: Split, num_training: int, num_validation: int) -> tuple[Split, Split]:
    """(train, val): val the last `num_validation` images, a fifth at most; train the first `num_training` others."""
    num_validation = min(num_validation, len(pool) // 5)
    if num_validation == 0:
        raise ValueError(f'the training images must be at least 5, since a fifth of them validates; '
                         f'there are {len(pool)}')
    rest = len(pool) - num_validation
    return pool[:min(num_training, rest)], pool[rest:]


# --- sources ------------------------------------------------------------------------------------------------


def _load_cifar10(root: Path) -> tuple[Sequence[str], Split, Split]:
    """Read CIFAR-10 from `root`, checksums verified; download it if need be. Raises RuntimeError saying what to do."""
    try:
        train = CIFAR10(root, train=True)
    except RuntimeError:
        state = f'is damaged in {root}' if (root / CIFAR10.base_folder).exists() else f'is not in {root}'
        try:
            with _network_timeout():
                train = CIFAR10(root, train=True, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            raise RuntimeError(f'CIFAR-10 {state} and could not be downloaded ({error}): {HOW_TO_DOWNLOAD}') from error
    pool, test = (Split(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
                  for part in (train, CIFAR10(root, train=False)))
    return train.classes, pool, test


@contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_ANSWER)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _load_folder(root: Path) -> tuple[tuple[str, ...], Split, Split, list[str]]:
    """Read train/<class>/* and test/<class>/*; the training images in one fixed random order."""
    listed = {part: _list_images(root / part) for part in ('train', 'test')}
    classes = tuple(listed['train'])
    if classes != tuple(listed['test']):
        differing = sorted(set(classes) ^ set(listed['test']))
        raise ValueError(f'{root}: train and test must have the same classes, but {", ".join(differing)} '
                         f'{"is" if len(differing) == 1 else "are"} in one of them only')
    if len(classes) < 2:
        raise ValueError(f'{root}: at least two classes are needed, but there is only {classes[0]}')
    parts, resized = [], 0
    for name, folders in listed.items():
        images, count = _read_images([path for files in folders.values() for path in files], f'reading {name}')
        labels = torch.tensor([label for label, files in enumerate(folders.values()) for _ in files])
        parts.append(Split(images, labels))
        resized += count
    pool, test = parts
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    notes = [f'{resized:,} of {len(pool) + len(test):,} images resized to 32x32'] if resized else []
    return classes, pool[order], test, notes


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Class -> its image files, both sorted."""
    if not folder.is_dir():
        raise ValueError(f'an image folder holds train/<class>/* and test/<class>/*, but there is no folder {folder}')
    classes = {path.name: sorted(file for file in path.iterdir()
                                 if file.suffix.lower() in ('.png', '.jpg', '.jpeg') and file.name[0] != '.')
               for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith('.')}
    if not classes:
        raise ValueError(f'{folder} holds no class folders: put the images into {folder}/<class>/')
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(f'{folder / empty[0]} holds no png or jpg images: add some or delete the folder')
    return classes


def _read_images(paths: list[Path], title: str) -> tuple[Tensor, int]:
    """Decode files in parallel -> uint8 (N, 3, 32, 32) and how many had to be resized."""
    images = torch.empty(len(paths), 3, 32, 32, dtype=torch.uint8)

    def read(i: int) -> bool:
        try:
            with Image.open(paths[i]) as file:
                # 16 bits of grey, which `convert` would clip
                file = file.point(lambda grey: grey / 257) if file.mode.startswith('I') else file
                image = torch.from_numpy(np.array(file.convert('RGB'))).permute(2, 0, 1)
        except Exception as error:  # whatever a damaged image makes Pillow raise
            raise ValueError(f'{paths[i]} cannot be read ({error}): replace or delete it') from error
        resize = image.shape[1:] != (32, 32)
        if resize:
            image = F.interpolate(image[None].float(), (32, 32), mode='bilinear', antialias=True)[0].round()
        images[i] = image
        return resize

    executor = ThreadPoolExecutor()
    try:
        # In chunks: a task for each of 60,000 small images would cost more than decoding it.
        chunks = [range(i, min(i + 100, len(paths))) for i in range(0, len(paths), 100)]
        resized = 0
        with tqdm(total=len(paths), desc=title, unit=' images', disable=None, leave=False) as bar:
            for chunk, count in zip(chunks, executor.map(lambda chunk: sum(map(read, chunk)), chunks), strict=True):
                resized += count
                bar.update(len(chunk))
    finally:
        executor.shutdown(cancel_futures=True)  # an unreadable image or Ctrl-C does not wait for the rest
    return images, resized


# --- batches ------------------------------------------------------------------------------------------------


class Batches:
    """Batches of a split: normalised, and for training shuffled and augmented, on the device the split is on.

    Iterating gives every image once, in order, never augmented. `shuffled` and `batch` are for training.
    mean, std: of the normalisation, one number or one a channel.
    """

    def __init__(self, split: Split, batch_size: int = 500, *, mean: float | Sequence[float] = 0.5,
                 std: float | Sequence[float] = 0.5, augmentations: Sequence = ()):
        self.split = split
        self.batch_size = min(batch_size, len(split))
        self.device = split.images.device
        self.augmentations = tuple(augmentations)
        self.mean = torch.tensor(mean, device=self.device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(-1, 1, 1)

    def __len__(self) -> int:
        """Number of complete batches."""
        return len(self.split) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every example once, in order, the last batch as small as it comes; not augmented."""
        for start in range(0, len(self.split), self.batch_size):
            part = self.split[start:start + self.batch_size]
            yield self.plain(part.images), part.labels

    def shuffled(self, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Indices (B,) of one epoch's complete batches, in random order."""
        order = torch.randperm(len(self.split), device=self.device, generator=generator)
        yield from order[:len(self) * self.batch_size].split(self.batch_size)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Indices (B,) -> augmented, normalised images (B, 3, 32, 32) float and labels (B,)."""
        part = self.split[index]
        return self.augmented(part.images, generator), part.labels

    def plain(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) uint8 -> normalised float, channels last in memory."""
        return self._normalise(images.float() / 255)

    def augmented(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """The same, augmented in between."""
        images = images.float() / 255
        for augmentation in self.augmentations:
            images = augmentation(images, generator)
        return self._normalise(images)

    def _normalise(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
