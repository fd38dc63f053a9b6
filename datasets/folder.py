"""An image folder: train/<class>/** and test/<class>/**, whatever Pillow can read, as images of 32x32 pixels."""
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from datasets.batches import Split

# Formats that Pillow knows but cannot decode on every computer.
NOT_DECODED = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}


def load_folder(root: Path) -> tuple[tuple[str, ...], Split, Split, list[str]]:
    """-> classes, training images in one fixed random order, test images, and notes: what the user should know.

    Raises ValueError if the folders do not fit or cannot be read, and one that names the images that cannot be read.
    """
    files, left_out = {}, []
    for part in ('train', 'test'):
        try:
            files[part], others = _list_images(root / part)
        except OSError as error:  # a folder that may not be read
            raise ValueError(f'{error.filename} cannot be read ({error.strerror}): allow it, or name another folder '
                             f'with --data') from error
        left_out += others
    classes = tuple(files['train'])
    if classes != tuple(files['test']):
        differing = sorted(set(classes) ^ set(files['test']))
        raise ValueError(f'{root}: train and test must have the same classes, but {some_of(differing, 10)} '
                         f'{"is" if len(differing) == 1 else "are"} in one of them only')
    if len(classes) < 2:
        raise ValueError(f'{root}: at least two classes are needed, but there is only {classes[0]}')

    parts, resized, unreadable = [], 0, []
    for part, of_class in files.items():
        images, count, failed = _read_images([path for paths in of_class.values() for path in paths],
                                             f'reading {part}')
        labels = torch.tensor([label for label, paths in enumerate(of_class.values()) for _ in paths])
        parts.append(Split(images, labels))
        resized += count
        unreadable += failed
    if unreadable:
        raise ValueError(f'{some_of(unreadable, 10)} cannot be read: '
                         f'replace or delete {"it" if len(unreadable) == 1 else "them"}')
    pool, test = parts
    notes = []
    if resized:
        notes.append(f'{resized:,} of {len(pool) + len(test):,} images resized to 32x32')
    if left_out:
        notes.append(f'{len(left_out):,} files skipped (not images that Pillow can read, or in no class folder): '
                     f'{some_of([str(path.relative_to(root)) for path in left_out], 3)}')
    return classes, pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))], test, notes


def some_of(names: Sequence[str], most: int) -> str:
    """'ant, bee and 3 more': at most `most` of the names."""
    return ', '.join(names[:most]) + (f' and {len(names) - most:,} more' if len(names) > most else '')


# --- finding ------------------------------------------------------------------------------------------------


def _list_images(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Class -> its image files, and the files left out: all in an order that is the same on every computer."""
    if not folder.is_dir():
        raise ValueError(f'an image folder holds train/<class>/* and test/<class>/*, but there is no folder {folder}')
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in {*Image.OPEN, 'MPO'} - NOT_DECODED}  # MPO, a JPEG with a second image, is opened as JPEG
    classes, left_out = {}, []
    for path in sorted(folder.iterdir(), key=_order):
        if path.name.startswith('.'):
            continue
        if not path.is_dir():
            left_out.append(path)
            continue
        # Both ways to encode a letter like é, of which macOS and Linux prefer different ones, are the same class.
        images = classes.setdefault(normalize('NFC', path.name), [])
        for file in _files_below(path):
            (images if file.suffix.lower() in suffixes else left_out).append(file)
    if not classes:
        raise ValueError(f'{folder} holds no class folders: put the images into {folder}/<class>/')
    if empty := [str(folder / name) for name, images in classes.items() if not images]:
        raise ValueError(f'no images that Pillow can read are in {some_of(empty, 10)}: add some or delete the folder')
    return {name: sorted(images, key=_order) for name, images in classes.items()}, sorted(left_out, key=_order)


def _order(path: Path) -> tuple[list[str], Path]:
    return [normalize('NFC', part) for part in path.parts], path


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in the folder and its subfolders, links followed, nothing hidden."""
    def refuse(error: OSError) -> None:  # `os.walk` would skip a folder that cannot be read
        raise error

    seen = {folder.resolve()}
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        inside = {Path(place, name).resolve(): name for name in sorted(folders) if not name.startswith('.')}
        folders[:] = [name for target, name in inside.items() if target not in seen]  # links may meet, or lead back
        seen.update(inside)
        yield from (Path(place, name) for name in files if not name.startswith('.'))


# --- reading ------------------------------------------------------------------------------------------------


def _read_images(paths: list[Path], title: str) -> tuple[Tensor, int, list[str]]:
    """Decode files in parallel -> uint8 (N, 3, 32, 32), how many were resized, which are unreadable and why."""
    images = torch.empty(len(paths), 3, 32, 32, dtype=torch.uint8)
    unreadable = {}

    def read(i: int) -> bool:
        try:
            image = _decode(paths[i])
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged image makes Pillow raise
            reason = 'not an image' if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
            unreadable[i] = f'{paths[i]} ({reason})'
            return False
        resize = image.size != (32, 32)
        if resize:  # by Pillow, which counts in integers: the same pixels on every processor
            image = image.resize((32, 32), Image.Resampling.BILINEAR)
        images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
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
        executor.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return images, resized, [unreadable[i] for i in sorted(unreadable)]


def _decode(path: Path) -> Image.Image:
    """-> RGB, upright, transparent parts white."""
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(('I', 'F')):
            image = _eight_bits(image)
        elif image.mode in ('P', 'PA', 'LA', 'La', 'RGBA', 'RGBa') or 'transparency' in image.info:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (0 to 65535) or floating point (0 to 1, else 0 to 255), which Pillow would clip -> 8 bits."""
    grey = np.array(image)
    white = 65535 if image.mode.startswith('I') else 1 if grey.max() <= 1 else 255
    if not (grey.min() >= 0 and grey.max() <= white):  # NaN included
        raise ValueError(f'its pixels are not between 0 and {white}')
    if 'transparency' in image.info:
        grey[grey == image.info['transparency']] = white
    return Image.fromarray((grey / (white / 255)).round().astype(np.uint8))
