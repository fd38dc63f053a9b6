"""Pretrained weights of VGG11_bn: found or downloaded, read and checked."""
import hashlib
import socket
import warnings
import zipfile
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import VGG11_BN_Weights


class WeightsUnavailable(Exception):
    """The ImageNet weights are neither in torch's cache nor can they be downloaded."""


def load_features(weights: str | Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `features.*` tensors of a state dict, the prefix removed, checked against names and shapes of `like`.

    weights: 'imagenet' or a path. Raises ValueError when the file is damaged or holds something else.
    """
    path = _imagenet_file() if weights == 'imagenet' else Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"weights must be 'imagenet' or the path of a state dict, but there is no file {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch itself does not look at the checksums
                    raise zipfile.BadZipFile(damaged)
        with warnings.catch_warnings(action='ignore'):  # the message below says it
            state = torch.load(path, map_location='cpu', weights_only=True)
        state = {key.removeprefix('features.'): tensor for key, tensor in state.items()
                 if key.startswith('features.') and isinstance(tensor, Tensor)}
    except Exception as error:  # whatever a damaged or foreign file makes torch.load raise
        raise ValueError(f'{path} is not a readable state dict ({type(error).__name__}): '
                         f'download it again or name another file') from error
    # The official file is older than batch norm's counter of batches, which only a cumulative average needs.
    state = {key: torch.zeros_like(t) for key, t in like.items() if key.endswith('num_batches_tracked')} | state
    if wrong := [key for key, tensor in like.items() if key not in state or tensor.shape != state[key].shape]:
        raise ValueError(f'{path} does not hold the convolutional part of vgg11_bn: features.{wrong[0]} and '
                         f'{len(wrong) - 1} more of its {len(like)} tensors are missing or of another shape')
    if unfit := [key for key in like if not _is_weight(key, state[key])]:
        raise ValueError(f'{path} cannot be used: features.{unfit[0]} and {len(unfit) - 1} more of its {len(like)} '
                         f'tensors hold NaN, infinity or a negative variance, or no floating-point numbers')
    return {key: state[key].to(tensor.dtype) for key, tensor in like.items()}


def _is_weight(key: str, tensor: Tensor) -> bool:
    """Whether a tensor can be what its name says."""
    dense = tensor.layout == torch.strided and tensor.device.type == 'cpu'
    if not dense or key.endswith('num_batches_tracked'):
        return dense and not tensor.is_complex()
    return (tensor.is_floating_point() and bool(tensor.float().isfinite().all())
            and not (key.endswith('running_var') and bool((tensor.float() < 0).any())))


def _imagenet_file() -> Path:
    """The official weights in torch's cache, downloaded if need be (507 MB), their hash verified."""
    url = VGG11_BN_Weights.IMAGENET1K_V1.url
    name = url.rsplit('/', 1)[-1]
    digest = name.removesuffix('.pth').rsplit('-', 1)[-1]  # torchvision names a file by its SHA256's first digits
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if not path.is_file():
        before = socket.getdefaulttimeout()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(10)  # a network that answers nothing is given up
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError, HTTPException) as error:
            raise WeightsUnavailable(f'the ImageNet weights could not be downloaded ({error}). Fetch {url} and put '
                                     f'it, named {name}, into {path.parent}; or name a file with --weights') from error
        finally:
            socket.setdefaulttimeout(before)
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if not found.startswith(digest):
        raise ValueError(f'{path} is damaged: its SHA256 begins with {found[:len(digest)]}, not {digest}. '
                         f'Delete it and run again')
    return path
