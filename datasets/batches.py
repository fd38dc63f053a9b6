"""Images and labels on one device, and the batches made of them there."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


class Batches:
    """Batches of a split: `for images, labels in batches`, as with a DataLoader, on the device the split is on.

    shuffle=False, for evaluation: every image once, in order, never augmented, the last batch as small as it comes.
    shuffle=True, for training: a new random order each time; a last incomplete batch is dropped unless it is the only
    one. The order and the augmentations are drawn from torch's global generator, those of a batch just before it.
    mean, std: of the normalisation, one number or one per channel.
    """

    def __init__(self, split: Split, batch_size: int = 500, *, mean: float | Sequence[float] = 0.5,
                 std: float | Sequence[float] = 0.5, augmentations: Sequence = (), shuffle: bool = False):
        assert shuffle or not augmentations, 'only training images are augmented, and these are shuffled'
        self.split = split
        self.batch_size = min(batch_size, len(split))
        self.device = split.images.device
        self.augmentations = tuple(augmentations)
        self.shuffle = shuffle
        self.mean = torch.tensor(mean, device=self.device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(-1, 1, 1)

    def __len__(self) -> int:
        """How many batches iterating yields."""
        return (len(self.split) + (0 if self.shuffle else self.batch_size - 1)) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """-> images (B, 3, 32, 32) float and labels (B,) int64."""
        if self.shuffle:
            order = torch.randperm(len(self.split), device=self.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            rows = slice(start, start + self.batch_size)
            part = self.split[order[rows] if self.shuffle else rows]
            yield self.inputs(part.images), part.labels

    def inputs(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) uint8 -> augmented (if at all) and normalised float, channels last in memory."""
        images = images.float() / 255
        for augmentation in self.augmentations:
            images = augmentation(images, None)
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
