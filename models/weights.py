"""Pretrained weights of VGG11_bn: found or downloaded, read, and their place in the file recognised by structure."""
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import VGG11_BN_Weights

from datasets.cifar10 import network_timeout
from lab.device import first_sentence, is_out_of_memory
from lab.files import load_tensors

STATE_DICT = 'torch.save(model.state_dict(), path)'


class WeightsUnavailable(Exception):
    """The ImageNet weights are neither in torch's cache nor can they be downloaded."""


def fingerprint(weights: str | Path) -> str:
    """'imagenet', or 'SHA256 ...' of the file's content. Raises ValueError when there is no such file."""
    return 'imagenet' if weights == 'imagenet' else f'SHA256 {_sha256(_existing(weights))}'


def load_features(weights: str | Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The convolutional part of a state dict: the tensors with the names and shapes of `like`, whatever is around it.

    weights: 'imagenet' or a path. The state dict may lie within others (as in a trainer's checkpoint), and all its
    names may begin with the same words, such as `features.` or `module.`. Raises ValueError in one sentence when the
    file is damaged, of another kind, or does not hold exactly one such part.
    """
    path = _imagenet_file() if weights == 'imagenet' else _existing(weights)
    found = _find(_read(path), like, path)
    # The official file is older than batch norm's counter of batches, which only a cumulative average needs.
    state = {key: torch.zeros_like(t) for key, t in like.items() if key.endswith('num_batches_tracked')} | found
    if unfit := [key for key in like if not _is_weight(key, state[key])]:
        raise ValueError(f'{path} cannot be used: {len(unfit)} of its {len(like)} tensors, the first {unfit[0]}, '
                         f'hold NaN, infinity or a negative variance, or are not ordinary floating-point numbers')
    return {key: state[key].to(tensor.dtype) for key, tensor in like.items()}


# --- reading ------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """What torch.save wrote, checked as far as its format allows. Raises ValueError that says what the file is."""
    try:
        with warnings.catch_warnings(action='ignore'):  # the messages below say it
            if zipfile.is_zipfile(path):
                return load_tensors(path)
            return torch.load(path, map_location='cpu', weights_only=True)  # from before torch 1.6: no checksums
    except Exception as error:  # whatever a damaged or foreign file makes torch.load raise
        if is_out_of_memory(error):
            raise
        raise ValueError(f'{path} {_diagnosis(path, error)}') from error


def _diagnosis(path: Path, error: Exception) -> str:
    """What a file is that torch.load refuses, and what to do: the rest of a sentence."""
    with path.open('rb') as file:
        start = file.read(512)
    names: list[str] = []
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        names = [name.partition('/')[2] for name in archive.namelist()]
    if path.suffix in ('.onnx', '.h5', '.hdf5', '.keras') or start.startswith(b'\x89HDF'):
        return f'belongs to another library (ONNX or Keras): what is needed is a state dict, {STATE_DICT}'
    if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < path.stat().st_size:
        return ('is a safetensors file, which torch.load cannot read: convert it, '
                'torch.save(safetensors.torch.load_file(path), new_path)')
    if start.lstrip().startswith((b'<', b'version https://git-lfs')):
        return 'is a web page or a Git LFS pointer, not weights: download the file that it leads to'
    if 'constants.pkl' in names:
        return f'is a TorchScript archive: load it with torch.jit.load and save its state dict, {STATE_DICT}'
    if names and 'data.pkl' not in names:
        return f'is a zip archive that torch.save did not write: what is needed is a state dict, {STATE_DICT}'
    saved = start.startswith((b'\x80', b'PK'))  # by pickle and older torch, or by torch
    if saved and isinstance(error, pickle.UnpicklingError):
        return ('holds more than tensors and plain values (a whole model, perhaps, or settings), which could execute '
                f'anything: where you trust it, load it in Python and save only its state dict, {STATE_DICT}')
    if saved or not start:
        return f'is empty, cut short or damaged ({first_sentence(error)}): download it again'
    return f'was not written by torch.save: what is needed is a state dict, {STATE_DICT}'


# --- finding ------------------------------------------------------------------------------------------------


def _find(content: Any, like: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of `like` in what was read, by `like`'s names. Raises ValueError unless they are there once."""
    needed = {key: tensor.shape for key, tensor in like.items() if not key.endswith('num_batches_tracked')}
    places, nearest = [], (0, '', '')  # nearest: how many tensors fit, where, the first that does not
    for name, state in _state_dicts(content, ''):
        first = next(iter(needed))
        # All names in `state` that end like the first one, cut there, are the candidates for what precedes all names.
        for prefix in [key.removesuffix(first) for key in state if key == first or key.endswith(f'.{first}')]:
            wrong = [key for key, shape in needed.items()
                     if prefix + key not in state or state[prefix + key].shape != shape]
            if not wrong:
                places.append((name + prefix, {key: state[prefix + key] for key in like if prefix + key in state}))
            nearest = max(nearest, (len(needed) - len(wrong), name + prefix, wrong[0] if wrong else ''))
    if len(places) > 1 and not all(_equal(places[0][1], found) for _, found in places[1:]):
        raise ValueError(f'{path} holds the convolutional part of vgg11_bn {len(places)} times, with different values '
                         f'({", ".join(repr(place) for place, _ in places)}): save only the one to start from')
    if not places:
        count, place, wrong = nearest
        what = (f'only {count} of its {len(needed)} tensors, beginning with {place!r}, fit; {place + wrong} is missing '
                f'or of another shape' if count else _describe(content))
        raise ValueError(f'{path} does not hold the convolutional part of vgg11_bn ({len(needed)} tensors named '
                         f'0.weight ... {next(reversed(needed))} after a common beginning): {what}')
    return places[0][1]


def _state_dicts(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(its place, its tensors) of each dictionary that holds tensors, up to three deep."""
    if isinstance(value, Mapping) and depth <= 3:
        tensors = {key: tensor for key, tensor in value.items() if isinstance(key, str) and isinstance(tensor, Tensor)}
        if tensors:
            yield name, tensors
        for key, inner in value.items():
            yield from _state_dicts(inner, f'{name}{key}: ', depth + 1)


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(_is_weight(key, tensor) and _is_weight(key, second[key])
               and torch.equal(tensor.double(), second[key].double())
               for key, tensor in first.items() if not key.endswith('num_batches_tracked'))


def _describe(content: Any) -> str:
    """What was found instead, in a few words."""
    tensors = [key for _, state in _state_dicts(content, '') for key in state]
    if tensors:
        return f'found {len(tensors)} tensors of another network ({", ".join(tensors[:3])} ...)'
    if isinstance(content, Mapping):
        return f'found no tensors, only {", ".join(map(repr, list(content)[:5])) or "an empty dictionary"}'
    return f'found a {type(content).__name__} instead of a state dict'


def _is_weight(key: str, tensor: Tensor) -> bool:
    """Whether a tensor can be what its name says."""
    dense = tensor.layout == torch.strided and tensor.device.type == 'cpu'
    if not dense or key.endswith('num_batches_tracked'):
        return dense and not tensor.is_complex()
    return (tensor.is_floating_point() and bool(tensor.float().isfinite().all())
            and not (key.endswith('running_var') and bool((tensor.float() < 0).any())))


# --- files --------------------------------------------------------------------------------------------------


def _existing(weights: str | Path) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"weights must be 'imagenet' or the path of a state dict, but there is no file {path}")
    return path


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _imagenet_file() -> Path:
    """The official weights in torch's cache, downloaded if need be (507 MB), their hash verified."""
    url = VGG11_BN_Weights.IMAGENET1K_V1.url
    name = url.rsplit('/', 1)[-1]
    digest = name.removesuffix('.pth').rsplit('-', 1)[-1]  # torchvision names a file by its SHA256's first digits
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with network_timeout():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError, HTTPException) as error:
            raise WeightsUnavailable(f'the ImageNet weights could not be downloaded ({error}). Fetch {url} and put '
                                     f'it, named {name}, into {path.parent}; or name a file with --weights') from error
    if not (found := _sha256(path)).startswith(digest):
        raise ValueError(f'{path} is damaged: its SHA256 begins with {found[:len(digest)]}, not {digest}. '
                         f'Delete it and run again')
    return path
