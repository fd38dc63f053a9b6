#!/usr/bin/env python3
"""Exercise 3, questions 1 to 3: a ConvNet on CIFAR-10.

Edit the constants below, run `python ex3_convnet.py`, look at the plots whose paths it prints at the end.
Every constant is also a command-line option: `python ex3_convnet.py --experiment Q2a --num-epochs 5`.
"""
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from datasets.batches import Batches
from datasets.cifar10 import Data
from lab.answers import accuracies, best_accuracies, confusion, mistakes
from lab.constants import Question, lists_as_tuples, read_constants
from lab.errors import ends_in_a_sentence
from lab.experiment import Experiment
from lab.pictures import plot_gallery
from lab.plots import plot_against, plot_best_and_latest, plot_strengths
from lab.results import SETS, accuracy
from lab.run import Run
from models.convnet import ConvNet, weights_init, whiten_first_layer
from optimizers import make_optimizer
from training import evaluate_kept, fit, make_schedule, seed_everything
from utils import PrintModelSize, VisualizeFilter

__all__ = ['Config', 'ConvNet', 'PrintModelSize', 'QUESTIONS', 'VisualizeFilter', 'main', 'weights_init']

CHANNEL_MEAN, CHANNEL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images


@dataclass(frozen=True)
@lists_as_tuples
class Config:
    """A ConvNet on CIFAR-10: questions 1 to 3 of the exercise. Each option is a constant at the top of the script."""
    experiment: str = 'Q1'  # Q1, Q2a, Q2b, Q3a, Q3a-strength, Q3b, fast, best or ingredients

    # Data
    data: str = 'auto'  # 'auto' (CIFAR-10, or shapes if it cannot be downloaded), 'cifar10', 'shapes' or a folder
    data_root: Path = Path(__file__).parent / 'datasets'  # where CIFAR-10 is, or is downloaded to
    num_training: int = 49000  # images to train on, of 50,000
    num_validation: int = 1000  # images to validate on: the last of the training set, at most a fifth of it
    normalisation: Literal['half', 'channels'] = 'half'  # mean and std: 0.5, or those of CIFAR-10's three channels
    results: Path = Path('results')  # folder of all plots, tables and weights
    seeds: tuple[int, ...] = (0,)  # 0 1 2 repeats every run; tables show mean ± std (Q2b sets its own)

    # Model
    input_size: int = 3  # channels of an image: red, green, blue
    num_classes: int = 10  # replaced by the number of classes in the data
    hidden_size: tuple[int, ...] = (128, 512, 512, 512, 512)  # filters per block
    norm_layer: Literal['BN'] | None = None  # None or BN, batch norm (Q2a)
    dropout: float = 0.0  # dropout probability between the blocks, 0 to 0.9 (Q3b)

    # Training
    num_epochs: int = 20  # 20 for Q1 and Q2a; the other questions set their own
    batch_size: int = 200  # images per step
    learning_rate: float = 2e-3  # initial (decay) or peak (one-cycle)
    learning_rate_decay: float = 0.95  # per-epoch factor (decay)
    reg: float = 0.001  # weight decay (Adam, SGD; Muon has none)
    optimizer: Literal['Adam', 'SGD', 'Muon'] = 'Adam'  # SGD has Nesterov momentum 0.9; Muon learns most per epoch
    schedule: Literal['decay', 'one-cycle'] = 'decay'  # one-cycle: up to learning_rate, then down to zero
    warmup: float = 0.2  # fraction of the epochs spent warming up (one-cycle)
    label_smoothing: float = 0.0  # 0.1 spreads a tenth of the target over all classes
    ema_decay: float = 0.0  # 0.99: validate and keep a moving average over about 100 steps
    patience: int | None = None  # stop after this many epochs without a better one; None never stops (Q2b)
    whiten: bool = False  # start the first layer from filters that decorrelate the images
    freeze_at: float = 1.0  # fraction of the epochs after which the first block stays as it is

    # Augmentation, drawn independently for every image (Q3a)
    flip: float = 0.0  # probability of a horizontal flip (try 0.5)
    crop_padding: int = 0  # shift by up to this many pixels (try 4)
    crop_border: Literal['zeros', 'reflect'] = 'zeros'  # what comes into view: black, or the image mirrored
    degrees: float = 0.0  # rotate by up to this many degrees (try 10)
    translate: float = 0.0  # shift by up to this fraction of the image (try 0.1)
    scale: float = 0.0  # zoom by up to this fraction (try 0.1)
    shear: float = 0.0  # shear by up to this many degrees (try 5)
    brightness: float = 0.0  # multiply by 1 - brightness to 1 + brightness (try 0.3)
    contrast: float = 0.0  # likewise (try 0.3)
    saturation: float = 0.0  # likewise (try 0.3)
    hue: float = 0.0  # turn the hue by up to this fraction of the colour circle (try 0.05)
    greyscale: float = 0.0  # probability of a grey image (try 0.2)
    cutout: int = 0  # side of a blanked square (try 8)

    # Machine
    device: str = 'auto'  # 'auto' (a CUDA GPU, else the CPU) or a torch device: cpu, cuda, cuda:1
    precision: Literal['auto', 'fp32', 'bf16'] = 'auto'  # auto: bf16 where it is faster, else fp32


# A question's runs, one per row: what differs from the constants above. The command line wins over a row.
Q2B = dict(num_epochs=50, seeds=(0, 1, 2))  # several repetitions
Q3 = dict(norm_layer='BN', num_epochs=30)
FLIP, CROP = dict(flip=0.5), dict(crop_padding=4)
AFFINE = dict(degrees=10, translate=0.1, scale=0.1, shear=5)
JITTER = dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)
GREY = dict(greyscale=0.2)
FAST = dict(
    norm_layer='BN', num_epochs=8, batch_size=500, optimizer='Muon', learning_rate=0.15, reg=0, schedule='one-cycle',
    warmup=0.1, label_smoothing=0.1, whiten=True, freeze_at=0.3, normalisation='channels', flip=0.5, crop_padding=2,
    crop_border='reflect')
BEST = FAST | dict(num_epochs=30, crop_padding=4, cutout=8)  # more epochs, more augmentation; a GPU has time for 100
QUESTIONS = {
    'Q1': Question('how well does the plain ConvNet classify, how large is it, what do its first filters look like?', {
        'ConvNet': {}}),
    'Q2a': Question('what does batch norm change in the loss curves and the accuracy?', {
        'plain': dict(norm_layer=None), 'batch norm': dict(norm_layer='BN')}),
    'Q2b': Question('is the model that was best on validation better than the latest, with and without batch norm?', {
        'plain': Q2B | dict(norm_layer=None), 'batch norm': Q2B | dict(norm_layer='BN')}),
    'Q3a': Question('which geometric and colour augmentations help?', {
        'none': Q3, 'flip': Q3 | FLIP, 'crop': Q3 | CROP, 'flip + crop': Q3 | FLIP | CROP, 'affine': Q3 | AFFINE,
        'colour jitter': Q3 | JITTER, 'greyscale': Q3 | GREY, 'all': Q3 | FLIP | CROP | AFFINE | JITTER | GREY}),
    'Q3a-strength': Question('how strong should an augmentation be?', {
        'none': Q3,
        **{f'crop_padding {n}': Q3 | dict(crop_padding=n) for n in (2, 4, 8)},
        **{f'degrees {n}': Q3 | dict(degrees=n) for n in (5, 15, 30)},
        **{f'translate {x}': Q3 | dict(translate=x) for x in (0.05, 0.1, 0.2)},
        **{f'jitter {x}': Q3 | dict(brightness=x, contrast=x, saturation=x, hue=round(x / 6, 3))
           for x in (0.1, 0.3, 0.5)}}),
    'Q3b': Question('which dropout probability between the blocks is right?', {
        f'p = {p / 10}': Q3 | dict(dropout=p / 10) for p in range(10)}),
    'fast': Question('how accurate is this very network after a few epochs?', {'fast': FAST}),
    'best': Question('how far does this very network go?', {'best': BEST}),
    'ingredients': Question('what does each ingredient of the best recipe bring?', {
        'all': BEST,
        'SGD': BEST | dict(optimizer='SGD', reg=5e-4),
        'Adam with decay': BEST | dict(optimizer='Adam', schedule='decay', learning_rate=2e-3, reg=0.001),
        'no flip': BEST | dict(flip=0),
        'no crop': BEST | dict(crop_padding=0),
        'black borders': BEST | dict(crop_border='zeros'),
        'no cutout': BEST | dict(cutout=0),
        'no label smoothing': BEST | dict(label_smoothing=0),
        'no whitening': BEST | dict(whiten=False),
        'nothing frozen': BEST | dict(freeze_at=1.0),
        'mean and std 0.5': BEST | dict(normalisation='half'),
        'no batch norm': BEST | dict(norm_layer=None)}),
}


@ends_in_a_sentence
def main(argv: Sequence[str] = ()) -> int:
    """Run the experiment that the constants and the options in `argv` name; returns the exit status."""
    name, rows = read_constants('ex3_convnet', Config(), QUESTIONS, argv)
    for config in rows.values():
        make_model(config, torch.device('meta'))  # refuses what cannot be built before anything is trained
    with Experiment('ex3_convnet', name, QUESTIONS[name], rows, Config(),
                    sooner='--experiment fast, or ' if name != 'fast' else '') as experiment:
        for run in experiment.runs():  # those that are not finished yet
            train(run)
        return experiment.conclude(PICTURES.get(name, []))


def train(run: Run) -> None:
    """One run of an experiment: from its constants and data to the accuracies of its best and its latest model."""
    config = run.config
    model = initial_model(config, run.data, run.seed)
    batches, evaluation = make_batches(config, run.data)
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, config.reg, precision=config.precision)
    schedule = make_schedule(config.schedule, config.learning_rate, config.learning_rate_decay, config.num_epochs,
                             config.warmup)
    if run.begin(model):  # of a size that was not printed yet
        PrintModelSize(model)  # Q1b
    history = fit(model, batches, evaluation['val'], optimizer, schedule, run.folder,  # Q1a, Q2
                  num_epochs=config.num_epochs, seed=run.seed, precision=config.precision, patience=config.patience,
                  label_smoothing=config.label_smoothing, ema_decay=config.ema_decay,
                  freeze_at=config.freeze_at, progress=run.progress)
    run.finish(history, evaluate_kept(model, history, run.folder, evaluation, config.precision, run.label))  # Q2b


def make_model(config: Config, device: torch.device) -> ConvNet:
    """The network, its weights channels last in memory, which convolutions prefer."""
    model = ConvNet(config.input_size, config.hidden_size, config.num_classes, config.norm_layer, config.dropout)
    return model.to(device, memory_format=torch.channels_last)


def initial_model(config: Config, data: Data, seed: int) -> ConvNet:
    """The network before training, the same for the same seed."""
    seed_everything(seed)
    model = make_model(config, data.train.images.device)
    if config.whiten:
        _, evaluation = make_batches(config, data)
        whiten_first_layer(model, evaluation['train'].inputs(data.train.images[:4000]))
    return model


def make_batches(config: Config, data: Data) -> tuple[Batches, dict[str, Batches]]:
    """(shuffled, augmented batches to train on, complete sets to evaluate on as they are: 'train', 'val', 'test')."""
    mean, std = (CHANNEL_MEAN, CHANNEL_STD) if config.normalisation == 'channels' else (0.5, 0.5)
    batches = Batches(data.train, config.batch_size, mean=mean, std=std, augmentations=augmentations(config),
                      shuffle=True)
    return batches, {part: Batches(getattr(data, part), mean=mean, std=std) for part in SETS}


def augmentations(config: Config) -> list:
    """The augmentations whose constants are not zero, in the order in which they are applied (Q3a)."""
    chosen = []
    if config.flip:
        chosen.append(Flip(config.flip))
    if config.crop_padding:
        chosen.append(Crop(config.crop_padding, config.crop_border))
    if config.degrees or config.translate or config.scale or config.shear:
        chosen.append(Affine(config.degrees, config.translate, config.scale, config.shear))
    if config.brightness or config.contrast or config.saturation or config.hue:
        chosen.append(ColorJitter(config.brightness, config.contrast, config.saturation, config.hue))
    if config.greyscale:
        chosen.append(Greyscale(config.greyscale))
    if config.cutout:
        chosen.append(Cutout(config.cutout))
    return chosen


# --- what each question asks to see -------------------------------------------------------------------------


def filters(experiment: Experiment) -> Path:
    """Q1c: the first layer's filters before and after training."""
    first, path = experiment.first_result(), experiment.folder / 'filters.png'
    config = experiment.rows[first.run]
    before = initial_model(config, experiment.data[first.run], first.seed)
    after = experiment.load(make_model(config, experiment.device), first)
    VisualizeFilter(after, path, before=before, change=True, title=experiment.title)
    return path


def best_and_latest(experiment: Experiment) -> Path:
    """Q2b: the two models of each run on the training, validation and test set, of the seeds that have both."""
    both = [result for result in experiment.results if result.status == 'finished']
    rows = {run: {name: (accuracy(both, run, 'best', part), accuracy(both, run, 'last', part))
                  for part, name in SETS.items()}
            for run in experiment.histories}
    return plot_best_and_latest(rows, experiment.folder / 'best_and_latest.png', experiment.title)


def strengths(experiment: Experiment) -> Path:
    """Q3a: accuracy against the strength of each augmentation."""
    panels = {}
    for run in experiment.histories:
        name, _, strength = run.rpartition(' ')
        if name and re.fullmatch(r'[\d.]+', strength):  # not 'none'
            x, series = panels.setdefault(name.replace('_', ' '), ([], {'training': [], 'validation': []}))
            x.append(float(strength))
            for label, value in best_accuracies(experiment, run).items():
                series[label].append(value)
    return plot_strengths(panels, best_accuracies(experiment, 'none'), experiment.folder / 'accuracy.png',
                          experiment.title)


def against_dropout(experiment: Experiment) -> Path:
    """Q3b: training and validation accuracy of the best models, in evaluation mode, against p."""
    runs = list(experiment.histories)
    series = {label: [best_accuracies(experiment, run)[label] for run in runs] for label in ('training', 'validation')}
    return plot_against([experiment.rows[run].dropout for run in runs], series, experiment.folder / 'dropout.png',
                        experiment.title, xlabel='dropout probability p',
                        chance=100 / experiment.rows[runs[0]].num_classes)


def gallery(experiment: Experiment) -> Path:
    """Q3a: rows of augmentations, columns of versions of the same images."""
    data = next(iter(experiment.data.values()))
    images = data.train.images[:3].repeat_interleave(3, 0).float() / 255
    rows = {}
    for run, config in experiment.rows.items():
        rows[run] = images
        generator = torch.Generator(experiment.device).manual_seed(0)
        for augmentation in augmentations(config):
            rows[run] = augmentation(rows[run], generator)
    return plot_gallery(rows, experiment.folder / 'gallery.png', experiment.title)


PICTURES = {
    'Q1': [filters, mistakes, confusion], 'Q2a': [mistakes, confusion], 'Q2b': [best_and_latest],
    'Q3a': [accuracies, gallery], 'Q3a-strength': [strengths], 'Q3b': [against_dropout],
    'fast': [mistakes, confusion], 'best': [mistakes, confusion], 'ingredients': [accuracies],
}


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
