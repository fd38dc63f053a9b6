#!/usr/bin/env python3
"""Exercise 3, questions 1 to 3: a ConvNet on CIFAR-10.

Edit the constants below, run `python ex3_convnet.py`, look at the plots whose paths it prints at the end.
Every constant is a command-line option, too: `python ex3_convnet.py --experiment Q2a --num-epochs 5`.
"""
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import experiment
from datasets import cifar10
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from models.convnet import ConvNet, weights_init
from utils import PrintModelSize, VisualizeFilter, plot_against, plot_bars, plot_gallery

__all__ = ['Config', 'ConvNet', 'EXPERIMENTS', 'PrintModelSize', 'VisualizeFilter', 'main', 'weights_init']


@dataclass(frozen=True)
class Config:
    """A ConvNet on CIFAR-10: questions 1 to 3 of the exercise. Each option is a constant at the top of the script."""
    experiment: str = 'Q1'  # Q1, Q2a, Q2b, Q3a, Q3a-strength, Q3b, best or ingredients: see EXPERIMENTS below

    # Data
    data: str = 'auto'  # 'auto' (CIFAR-10, or shapes if it cannot be had), 'cifar10', 'shapes' or an image folder
    data_root: Path = Path(__file__).parent / 'datasets'  # where CIFAR-10 is, or is downloaded to
    num_training: int = 49000  # images to train on, of 50,000
    num_validation: int = 1000  # images to validate on, taken from the end; a fifth of the images at most
    results: Path = Path('results')  # folder of all plots, tables and weights
    seeds: tuple[int, ...] = (0,)  # one run each; several give mean and deviation: 0 1 2 (Q2b sets its own)

    # Model
    input_size: int = 3  # channels of an image: red, green, blue
    num_classes: int = 10  # follows the data where that has another number
    hidden_size: tuple[int, ...] = (128, 512, 512, 512, 512)  # filters of each block (round brackets here)
    norm_layer: Literal['BN'] | None = None  # None or BN, batch norm (Q2a)
    dropout: float = 0.0  # p between the blocks, 0 to 0.9 (Q3b)

    # Training
    num_epochs: int = 20  # 20 for Q1 and Q2a; the other questions set their own
    batch_size: int = 200  # images a step
    learning_rate: float = 2e-3  # at the start with decay, at the peak with one-cycle
    learning_rate_decay: float = 0.95  # factor an epoch, for schedule decay
    reg: float = 0.001  # weight decay
    optimizer: Literal['Adam', 'SGD'] = 'Adam'  # SGD has Nesterov momentum 0.9
    schedule: Literal['decay', 'one-cycle'] = 'decay'  # one-cycle: up to learning_rate, then down to zero
    warmup: float = 0.2  # share of the epochs that one-cycle climbs
    label_smoothing: float = 0.0  # 0.1 spreads a tenth of the target over all classes
    ema_decay: float = 0.0  # 0.99 keeps averaged weights, over about 100 steps; 0 keeps the weights as they are
    patience: int | None = None  # stop after that many epochs without a better one; None never stops (Q2b)

    # Augmentation, anew for every image of every batch (Q3a)
    flip: float = 0.0  # probability of a horizontal flip: 0.5
    crop_padding: int = 0  # shift by up to so many pixels: 4
    degrees: float = 0.0  # rotate by up to so many degrees: 10
    translate: float = 0.0  # shift by up to this share of the image: 0.1
    scale: float = 0.0  # zoom by up to this share: 0.1
    shear: float = 0.0  # shear by up to so many degrees: 5
    brightness: float = 0.0  # factor from 1 - brightness to 1 + brightness: 0.3
    contrast: float = 0.0  # likewise: 0.3
    saturation: float = 0.0  # likewise: 0.3
    hue: float = 0.0  # turn the hue by up to this share of the circle: 0.05
    greyscale: float = 0.0  # probability of a grey image: 0.2
    cutout: int = 0  # side of a blanked square: 8

    # Machine
    device: str = 'auto'  # 'auto' (a CUDA GPU, else the CPU) or a torch device: cpu, cuda, cuda:1
    precision: Literal['auto', 'fp32', 'bf16'] = 'auto'  # auto: bf16 where it is faster, else fp32


RANGES = experiment.RANGES | {
    'input_size': (3, 3), 'hidden_size': (1, 4096), 'dropout': (0, 0.95), 'degrees': (0, 180), 'translate': (0, 1),
    'scale': (0, 0.9), 'shear': (0, 80), 'brightness': (0, 1), 'contrast': (0, 1), 'saturation': (0, 1),
    'hue': (0, 0.5), 'greyscale': (0, 1),
}

QUESTIONS = {
    'Q1': 'how well does the plain ConvNet classify, how large is it, and what do its first filters look like?',
    'Q2a': 'what does batch norm change in the loss curves and the accuracy?',
    'Q2b': 'is the model that was best on validation better than the latest one, with and without batch norm?',
    'Q3a': 'which geometric and colour augmentations help?',
    'Q3a-strength': 'how strong should an augmentation be?',
    'Q3b': 'which dropout probability between the blocks is right?',
    'best': 'how far does this very network go?',
    'ingredients': 'what does each ingredient of the best recipe bring?',
}

# One row a run: what differs from the constants above. A row wins over an edited constant, the command line over both.
FLIP, CROP = dict(flip=0.5), dict(crop_padding=4)
AFFINE = dict(degrees=10, translate=0.1, scale=0.1, shear=5)
JITTER = dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)
GREY = dict(greyscale=0.2)
Q2B = dict(num_epochs=50, seeds=(0, 1, 2))  # several repetitions
Q3 = dict(norm_layer='BN', num_epochs=30, **{key: 0 for key in (FLIP | CROP | AFFINE | JITTER | GREY)}, cutout=0)
STRENGTHS = (
    {f'crop_padding {n}': dict(crop_padding=n) for n in (2, 4, 8)}
    | {f'degrees {n}': dict(degrees=n) for n in (5, 15, 30)}
    | {f'translate {x}': dict(translate=x) for x in (0.05, 0.1, 0.2)}
    | {f'jitter {x}': dict(brightness=x, contrast=x, saturation=x, hue=x / 6) for x in (0.1, 0.3, 0.5)})
BEST = dict(
    norm_layer='BN', num_epochs=100, optimizer='SGD', schedule='one-cycle', learning_rate=0.15, reg=5e-4,
    label_smoothing=0.1, ema_decay=0.99, **FLIP, **CROP, cutout=8)
EXPERIMENTS = {
    'Q1': {'ConvNet': {}},
    'Q2a': {'plain': dict(norm_layer=None), 'batch norm': dict(norm_layer='BN')},
    'Q2b': {'plain': Q2B | dict(norm_layer=None), 'batch norm': Q2B | dict(norm_layer='BN')},
    'Q3a': {
        'none': Q3, 'flip': Q3 | FLIP, 'crop': Q3 | CROP, 'flip + crop': Q3 | FLIP | CROP, 'affine': Q3 | AFFINE,
        'colour jitter': Q3 | JITTER, 'greyscale': Q3 | GREY, 'all': Q3 | FLIP | CROP | AFFINE | JITTER | GREY},
    'Q3a-strength': {'none': Q3} | {run: Q3 | row for run, row in STRENGTHS.items()},
    'Q3b': {f'p = {p / 10}': Q3 | dict(dropout=p / 10) for p in range(10)},
    'best': {'best': BEST},
    'ingredients': {
        'all': BEST, 'Adam with decay': BEST | dict(optimizer='Adam', schedule='decay', learning_rate=2e-3, reg=0.001),
        'no flip + crop': BEST | dict(flip=0, crop_padding=0), 'no cutout': BEST | dict(cutout=0),
        'no label smoothing': BEST | dict(label_smoothing=0), 'no averaging': BEST | dict(ema_decay=0),
        'no batch norm': BEST | dict(norm_layer=None, learning_rate=0.02)},
}


def check(config: Config) -> None:
    """Raise ValueError for a constant that cannot be meant."""
    experiment.check_ranges(config, RANGES)
    if len(config.hidden_size) > 5:
        raise ValueError(f'hidden_size must name one to five blocks, since each halves the 32x32 image, '
                         f'got {len(config.hidden_size)}')


def load_data(config: Config) -> cifar10.Data:
    """The images of the constants `data`, `num_training` and `num_validation`; ValueError if they cannot be had."""
    return cifar10.load(config.data, config.data_root, config.num_training, config.num_validation)


def augmentations(config: Config) -> list:
    """The augmentations whose constants are not zero, in the order in which they are applied."""
    chosen = []
    if config.flip:
        chosen.append(Flip(config.flip))
    if config.crop_padding:
        chosen.append(Crop(config.crop_padding))
    if config.degrees or config.translate or config.scale or config.shear:
        chosen.append(Affine(config.degrees, config.translate, config.scale, config.shear))
    if config.brightness or config.contrast or config.saturation or config.hue:
        chosen.append(ColorJitter(config.brightness, config.contrast, config.saturation, config.hue))
    if config.greyscale:
        chosen.append(Greyscale(config.greyscale))
    if config.cutout:
        chosen.append(Cutout(config.cutout))
    return chosen


def make_model(config: Config, device: torch.device) -> nn.Module:
    """The network, its weights channels last in memory, as convolutions like them best."""
    model = ConvNet(config.input_size, config.hidden_size, config.num_classes, config.norm_layer, config.dropout)
    return model.to(device, memory_format=torch.channels_last)


def build(config: Config, data: cifar10.Data) -> experiment.Task:
    """What one run trains and on what: only the training batches are augmented."""
    model = make_model(config, data.train.images.device)
    train = cifar10.Batches(data.train, config.batch_size, augmentations=augmentations(config))
    evaluation = {part: cifar10.Batches(getattr(data, part)) for part in ('train', 'val', 'test')}
    return experiment.Task(model, [dict(params=list(model.parameters()))], train, evaluation)


# --- what each question asks to see -------------------------------------------------------------------------


def figures(done: experiment.Experiment) -> list[Path]:
    """Draw the pictures of one experiment's question; returns their paths."""
    name = next(iter(done.rows.values())).experiment
    draw = {'Q1': [filters], 'Q2b': [best_against_latest], 'Q3a': [bars, gallery], 'Q3a-strength': [bars],
            'Q3b': [against_dropout], 'ingredients': [bars]}
    return [picture(done) for picture in draw.get(name, [])]


def filters(done: experiment.Experiment) -> Path:
    """Q1c: the first layer's filters before and after training."""
    run, seed = next((result.run, result.seed) for result in done.results if result.best_epoch)
    experiment.seed_everything(seed)
    before = make_model(done.rows[run], done.device)
    after = done.load(make_model(done.rows[run], done.device), run, seed)
    path = done.folder / 'filters.png'
    VisualizeFilter(after, path, before=before, title=done.title)
    return path


def best_against_latest(done: experiment.Experiment) -> Path:
    """Q2b: the two models of each run on the training, validation and test set."""
    names, series = [], {'best on validation': ([], []), 'latest': ([], [])}
    for part, images in (('train', 'training'), ('val', 'validation'), ('test', 'test')):
        names += [f'{run},\n{images}' for run in done.histories]
        for which, statistic in zip(('best', 'last'), series.values(), strict=True):
            for so_far, values in zip(statistic, done.statistic(f'{which}_{part}_accuracy'), strict=True):
                so_far += values
    return plot_bars(names, series, done.folder / 'best_against_latest.png', done.title)


def bars(done: experiment.Experiment) -> Path:
    """Training and validation accuracy of each run's best model."""
    series = {'training': done.statistic('best_train_accuracy'), 'validation': done.statistic('best_val_accuracy')}
    return plot_bars(list(done.histories), series, done.folder / 'accuracy.png', f'{done.title}\nbest model of a run')


def gallery(done: experiment.Experiment) -> Path:
    """Q3a: rows of augmentations, columns of versions of the same images."""
    images = next(iter(done.data.values())).train.images[:3].repeat_interleave(3, 0).float() / 255
    rows = {}
    for run, config in done.rows.items():
        rows[run] = images
        generator = torch.Generator(done.device).manual_seed(0)
        for augmentation in augmentations(config):
            rows[run] = augmentation(rows[run], generator)
    return plot_gallery(rows, done.folder / 'gallery.png', f'{done.title}\nthree versions of three images')


def against_dropout(done: experiment.Experiment) -> Path:
    """Q3b: training and validation accuracy of the best models, in evaluation mode, against p."""
    return plot_against([done.rows[run].dropout for run in done.histories],
                        {'training': done.statistic('best_train_accuracy'),
                         'validation': done.statistic('best_val_accuracy')},
                        done.folder / 'dropout.png', f'{done.title}\nbest model of each run, evaluation mode',
                        'dropout probability p')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment of the constants and the command line; returns the exit status."""
    return experiment.run(script(), argv)


def script() -> experiment.Script:
    """What this script brings along."""
    return experiment.Script(
        Path(__file__).stem, constants=Config, experiments=EXPERIMENTS, questions=QUESTIONS, check=check,
        load_data=load_data, build=build, figures=figures)


if __name__ == '__main__':
    sys.exit(main())
