"""The script that one would otherwise write: a DataLoader over PIL images, fp32, the loss read at every step."""
import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import ex3_convnet
import ex3_pretrained
from datasets.batches import Split
from datasets.cifar10 import Data
from lab.device import pick_device


class Way(NamedTuple):
    """One way to train a network."""
    run: Callable[[], float]  # train on every image once -> images per second
    flops: float  # of a training step, for each image
    features: dict[str, float] | None = None  # made once, before training: their 'images' and 'seconds'


def training_flops(model: nn.Module, inputs: Tensor) -> float:
    """Floating point operations of a training step for each of `inputs`: two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() / len(inputs)


class PilImages(Dataset):
    """Images as torchvision's CIFAR10 gives them: one by one, through PIL and the transforms."""

    def __init__(self, split: Split, transform: Callable):
        self.images, self.labels = split.images.permute(0, 2, 3, 1).cpu().numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def usual_transform(config: Any, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """torchvision's counterparts of the augmentations that `config` switches on."""
    steps = []
    if config.crop_padding:
        steps.append(transforms.RandomCrop(32, config.crop_padding))
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip(config.flip))
    if getattr(config, 'hue', 0):
        steps.append(transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def usual(script: ModuleType, config: Any, data: Data, device: torch.device, workers: int = 0) -> Way:
    """The loop of the handout: fp32 as PyTorch's defaults have it, and the loss read at every step."""
    mean, std = ((0.5,) * 3, (0.5,) * 3) if script is ex3_convnet else (
        ex3_pretrained.IMAGENET_MEAN, ex3_pretrained.IMAGENET_STD)
    # Workers stay from epoch to epoch, so that starting them is not measured; an epoch begins with empty queues.
    loader = DataLoader(PilImages(data.train, usual_transform(config, mean, std)), config.batch_size, shuffle=True,
                        drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    model = script.make_model(config, device).to(memory_format=torch.contiguous_format).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate,
                                 weight_decay=config.reg)

    def run() -> float:
        torch.backends.cudnn.benchmark = False  # both as they are by default, not as the project has them
        give_back_freed_memory()
        start = time.perf_counter()
        total_loss, correct = 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
        seconds = time.perf_counter() - start
        pick_device(str(device))  # as the project has them
        return len(loader) * config.batch_size / seconds

    return Way(run, training_flops(model, torch.randn(2, 3, 32, 32, device=device)))


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: the limits at which glibc arrives by itself."""
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1  # of glibc's malloc.h
    with suppress(AttributeError, OSError, TypeError):  # macOS and musl; Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 2**16)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)
        libc.malloc_trim(0)
