"""Features of a frozen backbone, computed once (Q4a): it always maps an image to the same features."""
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from tqdm import tqdm

from datasets.batches import Batches, Split
from datasets.cifar10 import Data
from lab.device import autocast
from models.vgg import VggModel


class FeatureBatches(Batches):
    """Batches of features: `split.images` is (N, 2, 512) float, of each image and of its mirror image.

    Without the mirror image, (N, 1, 512), nothing is flipped. flip: probability of the mirror image, when shuffled.
    """

    def __init__(self, split: Split, batch_size: int = 500, *, flip: float = 0.0, shuffle: bool = False):
        super().__init__(split, batch_size, shuffle=shuffle)
        self.flip = flip

    def inputs(self, images: Tensor) -> Tensor:
        """(B, 2, 512) -> (B, 512): of the image or, in training, perhaps of its mirror image."""
        if not self.shuffle:
            return images[:, 0]
        mirrored = torch.rand(len(images), device=self.device) < self.flip  # as `Flip` draws it
        return torch.where(mirrored[:, None], images[:, -1], images[:, 0])


@lru_cache(maxsize=2)  # the seeds of one experiment share them; two, as one row may flip and another not
def extract_features(weights: str, data: Data, batches_of: Callable[[Split], Batches], precision: str,
                     mirrored: bool) -> tuple[dict[str, Split], float]:
    """(features by part, the seconds that those for training took).

    'train' -> (N, 2, 512) and labels, of images and mirror images, or (N, 1, 512) where none will be mirrored;
    'val' and 'test' -> (N, 1, 512).
    """
    device = data.train.images.device
    model = VggModel(2, fine_tune=False, weights=weights).to(device, memory_format=torch.channels_last).eval()
    features = {}
    for part in ('train', 'val', 'test'):
        start, split = time.perf_counter(), getattr(data, part)
        views = [_extract(model, batches_of(split), precision, part)]
        if part == 'train' and mirrored:
            mirror_images = replace(split, images=split.images.flip(-1))
            views.append(_extract(model, batches_of(mirror_images), precision, f'{part}, mirrored'))
        features[part] = replace(split, images=torch.stack(views, dim=1))
        if part == 'train':
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    return features, seconds


@torch.no_grad()
def _extract(model: VggModel, batches: Batches, precision: str, title: str) -> Tensor:
    """The (N, 512) float features of all images."""
    bar = tqdm(batches, f'features: {title}', disable=None, leave=False)
    with autocast(batches.device, precision):
        return torch.cat([model.extract(images).float() for images, _ in bar])
