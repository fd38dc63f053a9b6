#!/usr/bin/env python3
"""Exercise 3, question 4: transfer learning with VGG11 and batch norm.

Edit the constants below, run `python ex3_pretrained.py`, look at the plots whose paths it prints at the end.
Every constant is also a command-line option: `python ex3_pretrained.py --experiment Q4a --num-epochs 5`.
"""
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from datasets.augment import Crop, Cutout, Flip
from datasets.batches import Batches, Split
from datasets.cifar10 import Data
from lab.answers import best_accuracies, confusion, mistakes
from lab.constants import Question, lists_as_tuples, read_constants
from lab.errors import ends_in_a_sentence
from lab.experiment import Experiment
from lab.plots import plot_accuracies
from lab.results import SETS
from lab.run import Run
from models.features import FeatureBatches, extract_features
from models.vgg import VggModel
from models.weights import WeightsUnavailable, fingerprint
from optimizers import make_optimizer
from training import evaluate_kept, fit, make_schedule, seed_everything
from utils import PrintModelSize, VisualizeFilter

__all__ = ['Config', 'PrintModelSize', 'QUESTIONS', 'VggModel', 'VisualizeFilter', 'main']

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RANGES = {'num_training': (2, 10**9), 'batch_size': (2, 5000)}  # batch norm over one example has no variance


@dataclass(frozen=True)
@lists_as_tuples
class Config:
    """VGG11 with batch norm on CIFAR-10: question 4. Each option is a constant at the top of the script."""
    experiment: str = 'Q4b'  # Q4a, Q4b or best

    # Data
    data: str = 'auto'  # 'auto' (CIFAR-10, or shapes if it cannot be downloaded), 'cifar10', 'shapes' or a folder
    data_root: Path = Path(__file__).parent / 'datasets'  # where CIFAR-10 is, or is downloaded to
    num_training: int = 49000  # images to train on, of 50,000
    num_validation: int = 1000  # images to validate on: the last of the training set, at most a fifth of it
    results: Path = Path('results')  # folder of all plots, tables and weights
    seeds: tuple[int, ...] = (0,)  # 0 1 2 repeats every run; tables show mean ± std

    # Model
    num_classes: int = 10  # replaced by the number of classes in the data
    mode: Literal['frozen', 'fine-tuned', 'scratch'] = 'frozen'  # what trains: the new layers, all, all from scratch
    weights: str = 'imagenet'  # what frozen and fine-tuned start from: 'imagenet' or the path of a state dict
    layer_config: tuple[int, int] = (512, 256)  # inputs of the two new layers; the first is given by the network

    # Training
    num_epochs: int = 30
    batch_size: int = 200  # images per step
    learning_rate: float = 1e-3  # initial (decay) or peak (one-cycle)
    learning_rate_decay: float = 0.99  # per-epoch factor (decay)
    backbone_lr_scale: float = 1.0  # fine-tuned: factor on the learning rate of the pretrained layers
    reg: float = 0.0  # weight decay
    optimizer: Literal['Adam', 'SGD'] = 'Adam'  # SGD has Nesterov momentum 0.9
    schedule: Literal['decay', 'one-cycle'] = 'decay'  # one-cycle: up to learning_rate, then down to zero
    warmup: float = 0.2  # fraction of the epochs spent warming up (one-cycle)
    label_smoothing: float = 0.0  # 0.1 spreads a tenth of the target over all classes
    ema_decay: float = 0.0  # 0.99: validate and keep a moving average over about 100 steps
    patience: int | None = None  # stop after this many epochs without a better one; None never stops

    # Augmentation, drawn independently for every image
    flip: float = 0.5  # probability of a horizontal flip
    crop_padding: int = 0  # shift by up to this many pixels (try 4)
    cutout: int = 0  # side of a blanked square (try 8)

    # Machine
    device: str = 'auto'  # 'auto' (a CUDA GPU, else the CPU) or a torch device: cpu, cuda, cuda:1
    precision: Literal['auto', 'fp32', 'bf16'] = 'auto'  # auto: bf16 where it is faster, else fp32


# A question's runs, one per row: what differs from the constants above. The command line wins over a row.
QUESTIONS = {
    'Q4a': Question('how well do two new layers classify on top of frozen features?', {
        'frozen': dict(mode='frozen')}),
    'Q4b': Question('frozen, fine-tuned or from scratch: how do the curves and the accuracies compare?', {
        'frozen': dict(mode='frozen'), 'fine-tuned': dict(mode='fine-tuned'), 'scratch': dict(mode='scratch')}),
    'best': Question('how far does fine-tuning go?', {
        'best': dict(mode='fine-tuned', optimizer='SGD', schedule='one-cycle', learning_rate=0.05,
                     backbone_lr_scale=0.3, reg=5e-4, label_smoothing=0.1, ema_decay=0.99, crop_padding=4)}),
}


@ends_in_a_sentence
def main(argv: Sequence[str] = ()) -> int:
    """Run the experiment that the constants and the options in `argv` name; returns the exit status."""
    name, rows = read_constants('ex3_pretrained', Config(), QUESTIONS, argv, RANGES)
    known_by = {}
    for run, config in rows.items():  # refuse what cannot be built before anything is trained
        from_file = config.mode != 'scratch' and config.weights != 'imagenet'
        VggModel(config.num_classes, fine_tune=True, pretrained=from_file, layer_config=config.layer_config,
                 weights=config.weights)
        known_by[run] = dict(weights='' if config.mode == 'scratch' else fingerprint(config.weights))
    weights = {run: 'ImageNet' if config.weights == 'imagenet' else Path(config.weights).stem
               for run, config in rows.items() if config.mode != 'scratch'}
    with Experiment('ex3_pretrained', name, QUESTIONS[name], rows, Config(), known_by=known_by,
                    weights=weights) as experiment:
        for run in experiment.runs():  # those that are not finished yet
            train(run)
        return experiment.conclude(PICTURES.get(name, [accuracies]))


def train(run: Run) -> None:
    """One run of an experiment: from its constants and data to the accuracies of its best and its latest model."""
    config = run.config
    seed_everything(run.seed)
    try:
        model = make_model(config, run.device)
    except WeightsUnavailable as error:  # offline: the runs from scratch go on
        return run.not_run(str(error))
    batches, evaluation, seconds = choose_batches(config, model, run.data)
    scales = {'features.': config.backbone_lr_scale} if config.mode == 'fine-tuned' else {}
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, config.reg, scales)
    schedule = make_schedule(config.schedule, config.learning_rate, config.learning_rate_decay, config.num_epochs,
                             config.warmup)
    if run.begin(model):  # of a size that was not printed yet
        PrintModelSize(model)
    history = fit(model, batches, evaluation['val'], optimizer, schedule, run.folder,
                  num_epochs=config.num_epochs, seed=run.seed, precision=config.precision, patience=config.patience,
                  label_smoothing=config.label_smoothing, ema_decay=config.ema_decay, progress=run.progress)
    run.finish(history, evaluate_kept(model, history, run.folder, evaluation, config.precision, run.label), seconds)


def make_model(config: Config, device: torch.device) -> VggModel:
    """The network in one of its three modes, its weights channels last in memory."""
    model = VggModel(config.num_classes, fine_tune=config.mode != 'frozen', pretrained=config.mode != 'scratch',
                     layer_config=config.layer_config, weights=config.weights)
    return model.to(device, memory_format=torch.channels_last)


def choose_batches(config: Config, model: VggModel, data: Data) -> tuple[Batches, dict[str, Batches], float]:
    """Batches of features where these never change (Q4a), else of images; and the seconds that features took."""
    is_frozen = not any(weight.requires_grad for weight in model.features.parameters())
    if is_frozen and all(isinstance(augmentation, Flip) for augmentation in augmentations(config)):
        return make_feature_batches(config, data)  # which holds each image and its mirror image, nothing else
    return *make_batches(config, data), 0.0


def make_batches(config: Config, data: Data) -> tuple[Batches, dict[str, Batches]]:
    """(shuffled, augmented batches to train on, complete sets to evaluate on as they are: 'train', 'val', 'test')."""
    batches = normalised(data.train, config.batch_size, augmentations=augmentations(config), shuffle=True)
    return batches, {part: normalised(getattr(data, part)) for part in SETS}


def augmentations(config: Config) -> list:
    """The augmentations whose constants are not zero, in the order in which they are applied."""
    chosen = []
    if config.flip:
        chosen.append(Flip(config.flip))
    if config.crop_padding:
        chosen.append(Crop(config.crop_padding))
    if config.cutout:
        chosen.append(Cutout(config.cutout))
    return chosen


def make_feature_batches(config: Config, data: Data) -> tuple[Batches, dict[str, Batches], float]:
    """Like `make_batches`, but of features; and the seconds that those for training took (Q4a).

    A frozen backbone always maps an image to the same features, so they are computed once: an epoch takes a moment.
    """
    features, seconds = extract_features(config.weights, data, normalised, config.precision, mirrored=config.flip > 0)
    batches = FeatureBatches(features['train'], config.batch_size, flip=config.flip, shuffle=True)
    return batches, {part: FeatureBatches(split) for part, split in features.items()}, seconds


def normalised(split: Split, batch_size: int = 500, **options) -> Batches:
    """Batches with ImageNet's mean and standard deviation, as the pretrained layers expect them."""
    return Batches(split, batch_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, **options)


# --- what each question asks to see -------------------------------------------------------------------------


def accuracies(experiment: Experiment) -> Path:
    """Accuracies of each run's best model on all three sets."""
    rows = {run: best_accuracies(experiment, run, tuple(SETS)) for run in experiment.histories}
    return plot_accuracies(rows, experiment.folder / 'accuracy.png', experiment.title)


def filters(experiment: Experiment) -> Path:
    """The first layer's filters, pretrained beside those from scratch: the first run of each."""
    shown = {}
    for scratch in (False, True):
        run = next((run for run in experiment.histories if (experiment.rows[run].mode == 'scratch') == scratch), None)
        if run:
            config = experiment.rows[run]
            model = VggModel(config.num_classes, fine_tune=True, pretrained=False, layer_config=config.layer_config)
            experiment.load(model.to(experiment.device), experiment.first_result(run))
            shown[f'{run} (as pretrained)' if config.mode == 'frozen' else run] = model
    *before, after = shown.values()
    path = experiment.folder / 'filters.png'
    VisualizeFilter(after, path, before=before[0] if before else None, titles=list(shown), title=experiment.title)
    return path


PICTURES = {'Q4a': [accuracies], 'Q4b': [accuracies, filters, mistakes, confusion], 'best': [accuracies]}


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
