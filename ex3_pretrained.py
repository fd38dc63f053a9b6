#!/usr/bin/env python3
"""Exercise 3, question 4: transfer learning with VGG11 and batch norm.

Edit the constants below, run `python ex3_pretrained.py`, look at the plots whose paths it prints at the end.
Every constant is a command-line option, too: `python ex3_pretrained.py --experiment Q4a --num-epochs 5`.
"""
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import experiment
from datasets import cifar10
from datasets.augment import Crop, Cutout, Flip
from models.vgg import VggModel
from models.weights import WeightsUnavailable
from utils import VisualizeFilter, autocast, plot_bars

__all__ = ['Config', 'EXPERIMENTS', 'VggModel', 'main']

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Config:
    """VGG11 with batch norm on CIFAR-10: question 4. Each option is a constant at the top of the script."""
    experiment: str = 'Q4b'  # Q4a, Q4b or best: see EXPERIMENTS below

    # Data
    data: str = 'auto'  # 'auto' (CIFAR-10, or shapes if it cannot be had), 'cifar10', 'shapes' or an image folder
    data_root: Path = Path(__file__).parent / 'datasets'  # where CIFAR-10 is, or is downloaded to
    num_training: int = 49000  # images to train on, of 50,000
    num_validation: int = 1000  # images to validate on, taken from the end; a fifth of the images at most
    results: Path = Path('results')  # folder of all plots, tables and weights
    seeds: tuple[int, ...] = (0,)  # one run each; several give mean and standard deviation: 0 1 2

    # Model
    num_classes: int = 10  # follows the data where that has another number
    mode: Literal['frozen', 'fine-tuned', 'scratch'] = 'frozen'  # what trains: the new layers, all, all from scratch
    weights: str = 'imagenet'  # what frozen and fine-tuned start from: 'imagenet' or the path of a state dict
    layer_config: tuple[int, int] = (512, 256)  # inputs of the two new layers; the first is given by the network

    # Training
    num_epochs: int = 30
    batch_size: int = 200  # images a step
    learning_rate: float = 1e-3  # at the start with decay, at the peak with one-cycle
    learning_rate_decay: float = 0.99  # factor an epoch, for schedule decay
    backbone_lr_scale: float = 1.0  # fine-tuned: factor on the learning rate of the pretrained layers
    reg: float = 0.0  # weight decay
    optimizer: Literal['Adam', 'SGD'] = 'Adam'  # SGD has Nesterov momentum 0.9
    schedule: Literal['decay', 'one-cycle'] = 'decay'  # one-cycle: up to learning_rate, then down to zero
    warmup: float = 0.2  # share of the epochs that one-cycle climbs
    label_smoothing: float = 0.0  # 0.1 spreads a tenth of the target over all classes
    ema_decay: float = 0.0  # 0.99 keeps averaged weights, over about 100 steps; 0 keeps the weights as they are
    patience: int | None = None  # stop after that many epochs without a better one; None never stops

    # Augmentation, anew for every image of every batch
    flip: float = 0.5  # probability of a horizontal flip
    crop_padding: int = 0  # shift by up to so many pixels: 4
    cutout: int = 0  # side of a blanked square: 8

    # Machine
    device: str = 'auto'  # 'auto' (a CUDA GPU, else the CPU) or a torch device: cpu, cuda, cuda:1
    precision: Literal['auto', 'fp32', 'bf16'] = 'auto'  # auto: bf16 where it is faster, else fp32


RANGES = experiment.RANGES | {
    'layer_config': (1, 10**5), 'backbone_lr_scale': (0, 100),
    'num_training': (2, 10**9), 'batch_size': (2, 5000),  # batch norm over one example has no variance
}

QUESTIONS = {
    'Q4a': 'how well do two new layers classify on top of frozen features?',
    'Q4b': 'frozen, fine-tuned or from scratch: how do the curves and the accuracies compare?',
    'best': 'how far does fine-tuning go?',
}

# One row a run: what differs from the constants above.
EXPERIMENTS = {
    'Q4a': {'frozen': dict(mode='frozen')},
    'Q4b': {'frozen': dict(mode='frozen'), 'fine-tuned': dict(mode='fine-tuned'), 'scratch': dict(mode='scratch')},
    'best': {'best': dict(
        mode='fine-tuned', optimizer='SGD', schedule='one-cycle', learning_rate=0.05, backbone_lr_scale=0.3, reg=5e-4,
        label_smoothing=0.1, ema_decay=0.99, crop_padding=4)},
}


def check(config: Config) -> None:
    """Raise ValueError for a constant that cannot be meant."""
    experiment.check_ranges(config, RANGES)
    if config.layer_config[0] != 512:
        raise ValueError(f'layer_config must begin with 512, the features that the convolutions give, '
                         f'got {config.layer_config}')
    if config.mode != 'scratch' and config.weights != 'imagenet' and not Path(config.weights).expanduser().is_file():
        raise ValueError(f"weights must be 'imagenet' or the path of a state dict, but there is no file "
                         f'{config.weights}')


def load_data(config: Config) -> cifar10.Data:
    """The images of the constants `data`, `num_training` and `num_validation`; ValueError if they cannot be had."""
    cached_features.cache_clear()  # those of an earlier experiment are not needed any more
    data = cifar10.load(config.data, config.data_root, config.num_training, config.num_validation)
    weights = 'ImageNet' if config.weights == 'imagenet' else Path(config.weights).stem
    return replace(data, source=f'{data.source}, {weights} weights')  # so that every plot and table names them


def identity(config: Config) -> dict:
    """The constants that say which run it is: weights by their content, wherever they lie; from scratch, none."""
    weights = config.weights
    if config.mode == 'scratch':
        weights = ''
    elif weights != 'imagenet':
        with Path(weights).expanduser().open('rb') as file:
            weights = f'SHA256 {hashlib.file_digest(file, "sha256").hexdigest()}'
    return asdict(config) | {'weights': weights}


def make_model(config: Config, device: torch.device) -> VggModel:
    """The network in one of its three modes, its weights channels last in memory."""
    model = VggModel(config.num_classes, fine_tune=config.mode != 'frozen', pretrained=config.mode != 'scratch',
                     layer_config=config.layer_config, weights=config.weights)
    return model.to(device, memory_format=torch.channels_last)


def build(config: Config, data: cifar10.Data) -> experiment.Task:
    """What one run trains and on what: only the training batches are augmented."""
    try:
        model = make_model(config, data.train.images.device)
    except WeightsUnavailable as error:
        raise experiment.NotRun(str(error)) from error
    groups = [dict(params=list(model.classifier.parameters()))]
    if config.mode != 'frozen':
        scale = config.backbone_lr_scale if config.mode == 'fine-tuned' else 1.0
        groups.append(dict(params=list(model.features.parameters()), scale=scale))
    augmentations = [augmentation for strength, augmentation in (
        (config.flip, Flip(config.flip)), (config.crop_padding, Crop(config.crop_padding)),
        (config.cutout, Cutout(config.cutout))) if strength]
    if config.mode == 'frozen' and not (config.crop_padding or config.cutout):
        features, seconds = cached_features(config.weights, config.precision, data, config.flip > 0)
        train = FeatureBatches(features['train'], config.batch_size, flip=config.flip)
        evaluation = {part: FeatureBatches(split) for part, split in features.items()}
        return experiment.Task(model, groups, train, evaluation, seconds)
    train = normalised(data.train, config.batch_size, augmentations)
    evaluation = {part: normalised(getattr(data, part)) for part in ('train', 'val', 'test')}
    return experiment.Task(model, groups, train, evaluation)


def normalised(split: cifar10.Split, batch_size: int = 500, augmentations: Sequence = ()) -> cifar10.Batches:
    """Batches with ImageNet's mean and standard deviation, as the pretrained layers expect them."""
    return cifar10.Batches(split, batch_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, augmentations=augmentations)


# --- Q4a: a frozen backbone maps an image always to the same features, so they are computed once --------------


class FeatureBatches(cifar10.Batches):
    """Batches of features: `split.images` is (N, 2, 512) float, of each image and of its mirror image.

    Without the mirror image, (N, 1, 512), nothing is flipped.
    """

    def __init__(self, split: cifar10.Split, batch_size: int = 500, flip: float = 0.0):
        super().__init__(split, batch_size)
        self.flip = flip

    def plain(self, images: Tensor) -> Tensor:
        return images[:, 0]

    def augmented(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        mirrored = torch.rand(len(images), device=self.device, generator=generator) < self.flip  # as `Flip` draws it
        return torch.where(mirrored[:, None], images[:, -1], images[:, 0])


@lru_cache(maxsize=2)  # the seeds of one experiment share them; two, as one row may flip and another not
def cached_features(weights: str, precision: str, data: cifar10.Data,
                    mirrored: bool) -> tuple[dict[str, cifar10.Split], float]:
    """(features by part, the seconds that those for training took).

    'train' -> (N, 2, 512) and labels, of images and mirror images, or (N, 1, 512) where none will be mirrored;
    'val' and 'test' -> (N, 1, 512).
    """
    device = data.train.images.device
    model = VggModel(2, fine_tune=False, weights=weights).to(device, memory_format=torch.channels_last).eval()
    features = {}
    for part in ('train', 'val', 'test'):
        start, split = time.perf_counter(), getattr(data, part)
        views = [extract(model, split, precision, part)]
        if part == 'train' and mirrored:
            views.append(extract(model, replace(split, images=split.images.flip(-1)), precision, f'{part}, mirrored'))
        features[part] = replace(split, images=torch.stack(views, dim=1))
        if part == 'train':
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    return features, seconds


@torch.no_grad()
def extract(model: VggModel, split: cifar10.Split, precision: str, title: str) -> Tensor:
    """The (N, 512) float features of a split."""
    batches = normalised(split)
    bar = tqdm(batches, f'features: {title}', disable=None, leave=False)
    with autocast(batches.device, precision):
        return torch.cat([model.extract(images).float() for images, _ in bar])


# --- what each question asks to see ---------------------------------------------------------------------------


def figures(done: experiment.Experiment) -> list[Path]:
    """Accuracies of the runs side by side, and the filters of the first layer; returns the paths."""
    runs = list(done.histories)
    series = {label: done.statistic(f'best_{part}_accuracy')
              for part, label in (('train', 'training'), ('val', 'validation'), ('test', 'test'))}
    paths = [plot_bars(runs, series, done.folder / 'accuracy.png', f'{done.title}\nbest model of a run')]
    shown = {}  # pretrained beside scratch: the first run of each
    for scratch in (False, True):
        run = next((run for run in runs if (done.rows[run].mode == 'scratch') == scratch), None)
        if run:
            config = done.rows[run]
            seed = next(result.seed for result in done.results if result.run == run and result.best_epoch)
            model = VggModel(config.num_classes, fine_tune=True, pretrained=False, layer_config=config.layer_config)
            shown[f'{run} (as pretrained)' if config.mode == 'frozen' else run] = done.load(model, run, seed)
    *before, after = shown.values()
    paths.append(done.folder / 'filters.png')
    VisualizeFilter(after, paths[-1], before=before[0] if before else None, titles=list(shown), title=done.title)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment of the constants and the command line; returns the exit status."""
    return experiment.run(script(), argv)


def script() -> experiment.Script:
    """What this script brings along."""
    return experiment.Script(
        Path(__file__).stem, constants=Config, experiments=EXPERIMENTS, questions=QUESTIONS, check=check,
        load_data=load_data, build=build, figures=figures, identity=identity)


if __name__ == '__main__':
    sys.exit(main())
