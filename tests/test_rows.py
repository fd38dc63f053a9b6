"""Every row of every question of both scripts is what its name says: the assignment, written down a second time."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import CHANNELS, HALF, TINY, ask, layers, loaded, normalisation, rates, scales, whitened
from torch import nn

import ex3_convnet
import ex3_pretrained
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from models.convnet import ConvNet
from models.features import FeatureBatches
from utils import PrintModelSize

pytestmark = pytest.mark.usefixtures('cheap')


def facts(run):
    """What a run is, of what its parts were given."""
    group, batches = run.optimizer.param_groups[0], run.batches
    found = dict(
        augmentations=f'features, flip {batches.flip}' if isinstance(batches, FeatureBatches) else
        batches.augmentations, batch_size=batches.batch_size, num_epochs=run.num_epochs, reg=group.get('weight_decay'),
        optimizer=type(run.optimizer).__name__, label_smoothing=run.label_smoothing, ema_decay=run.ema_decay,
        patience=run.patience, freeze_at=run.freeze_at)
    if isinstance(run.network, ConvNet):
        return found | dict(norms=len(layers(run.network, nn.BatchNorm2d)), normalisation=normalisation(run),
                            dropout=[layer.p for layer in layers(run.network, nn.Dropout)], whitened=whitened(run))
    return found | dict(loaded=loaded(run), scales=scales(run),
                        layers=[layer.in_features for layer in layers(run.network, nn.Linear)])


PLAIN = dict(
    norms=0, dropout=[], augmentations=(), normalisation=HALF, whitened=False, batch_size=200, num_epochs=20,
    optimizer='Adam', reg=0.001, rates='decay', label_smoothing=0.0, ema_decay=0.0, patience=None, freeze_at=1.0)
NORM = PLAIN | dict(norms=5)
NORM30 = NORM | dict(num_epochs=30)
AFFINE, JITTER = Affine(10, 0.1, 0.1, 5), ColorJitter(0.3, 0.3, 0.3, 0.05)
FAST = NORM | dict(
    normalisation=CHANNELS, whitened=True, batch_size=500, num_epochs=8, optimizer='Muon', reg=None,
    rates='one-cycle', label_smoothing=0.1, freeze_at=0.3, augmentations=(Flip(0.5), Crop(2, 'reflect')))
BEST = FAST | dict(num_epochs=30, augmentations=(Flip(0.5), Crop(4, 'reflect'), Cutout(8)))
FROZEN = dict(
    loaded=True, scales={'classifier': 1.0}, augmentations='features, flip 0.5', batch_size=200, num_epochs=30,
    optimizer='Adam', reg=0.0, label_smoothing=0.0, ema_decay=0.0, patience=None, freeze_at=1.0, layers=[512, 256],
    rates='decay')
TUNED = FROZEN | dict(scales={'features': 1.0, 'classifier': 1.0}, augmentations=(Flip(0.5),))


def augmented(*augmentations):
    return NORM30 | dict(augmentations=augmentations)


CONVNET = {
    'Q1': {'ConvNet': PLAIN},
    'Q2a': {'plain': PLAIN, 'batch norm': NORM},
    'Q2b': {'plain': PLAIN | dict(num_epochs=50), 'batch norm': NORM | dict(num_epochs=50)},
    'Q3a': {'none': NORM30, 'flip': augmented(Flip(0.5)), 'crop': augmented(Crop(4)),
            'flip + crop': augmented(Flip(0.5), Crop(4)), 'affine': augmented(AFFINE),
            'colour jitter': augmented(JITTER), 'greyscale': augmented(Greyscale(0.2)),
            'all': augmented(Flip(0.5), Crop(4), AFFINE, JITTER, Greyscale(0.2))},
    'Q3a-strength': {
        'none': NORM30, **{f'crop_padding {n}': augmented(Crop(n)) for n in (2, 4, 8)},
        **{f'degrees {n}': augmented(Affine(degrees=n)) for n in (5, 15, 30)},
        **{f'translate {x}': augmented(Affine(translate=x)) for x in (0.05, 0.1, 0.2)},
        'jitter 0.1': augmented(ColorJitter(0.1, 0.1, 0.1, 0.017)), 'jitter 0.3': augmented(JITTER),
        'jitter 0.5': augmented(ColorJitter(0.5, 0.5, 0.5, 0.083))},
    'Q3b': {f'p = {p / 10}': NORM30 | dict(dropout=[p / 10] * 4 if p else []) for p in range(10)},
    'fast': {'fast': FAST},
    'best': {'best': BEST},
    'ingredients': {
        'all': BEST, 'SGD': BEST | dict(optimizer='SGD', reg=5e-4),
        'Adam with decay': BEST | dict(optimizer='Adam', reg=0.001, rates='decay'),
        'no flip': BEST | dict(augmentations=(Crop(4, 'reflect'), Cutout(8))),
        'no crop': BEST | dict(augmentations=(Flip(0.5), Cutout(8))),
        'black borders': BEST | dict(augmentations=(Flip(0.5), Crop(4), Cutout(8))),
        'no cutout': BEST | dict(augmentations=(Flip(0.5), Crop(4, 'reflect'))),
        'no label smoothing': BEST | dict(label_smoothing=0.0), 'no whitening': BEST | dict(whitened=False),
        'nothing frozen': BEST | dict(freeze_at=1.0), 'mean and std 0.5': BEST | dict(normalisation=HALF),
        'no batch norm': BEST | dict(norms=0)},
}
PRETRAINED = {
    'Q4a': {'frozen': FROZEN},
    'Q4b': {'frozen': FROZEN, 'fine-tuned': TUNED, 'scratch': TUNED | dict(loaded=False)},
    'best': {'best': TUNED | dict(
        scales={'features': 0.3, 'classifier': 1.0}, optimizer='SGD', reg=5e-4, label_smoothing=0.1, ema_decay=0.99,
        augmentations=(Flip(0.5), Crop(4)), rates='one-cycle')},
}


@pytest.mark.parametrize('script, name, rows, decay, one_cycle', [
    *[(ex3_convnet, *rows, (2e-3, 0.95), (0.15, 0.1)) for rows in CONVNET.items()],
    *[(ex3_pretrained, *rows, (1e-3, 0.99), (0.05, 0.2)) for rows in PRETRAINED.items()]])
def test_every_row_is_what_its_name_says(script, name, rows, decay, one_cycle):
    runs, seeds = ask(script, name).runs, [0, 1, 2] if name == 'Q2b' else [0]  # several repetitions
    jobs = [(row, seed) for seed in seeds for row in rows]
    assert [(run.label, run.seed) for run in runs] == [(f'{row}, seed {seed}', seed) for row, seed in jobs]
    for run, (row, _) in zip(runs, jobs, strict=True):
        expected, end = dict(rows[row]), run.num_epochs
        epochs, (peak, warmup) = (0, 0.5, 1, 5, end - 0.5), one_cycle
        curve = ([decay[0] * decay[1] ** int(epoch) for epoch in epochs] if expected.pop('rates') == 'decay'
                 else np.interp(epochs, [0, warmup * end, end], [0, peak, 0]).tolist())
        assert facts(run) == expected and rates(run, *epochs) == pytest.approx(curve, abs=1e-8), row
        head = [network.classifier for network in (run.network, runs[0].network)]
        assert script is ex3_convnet or torch.equal(head[0][0].weight, head[1][0].weight)  # the same start


def test_what_the_strengths_share_with_the_augmentations_is_the_same_run():
    rows, strengths = (ex3_convnet.QUESTIONS[name].rows for name in ('Q3a', 'Q3a-strength'))
    for one, other in (('none', 'none'), ('crop', 'crop_padding 4'), ('colour jitter', 'jitter 0.3')):
        assert rows[one] == strengths[other]


def test_every_question_is_asked_here():
    assert list(CONVNET) == list(ex3_convnet.QUESTIONS) and list(PRETRAINED) == list(ex3_pretrained.QUESTIONS)


def test_the_size_of_the_network_is_printed_once_per_experiment_and_size():
    (network,) = ask(ex3_convnet, 'Q3b').printed
    assert PrintModelSize(network, disp=False) == PrintModelSize(ConvNet(3, TINY, 12, 'BN'), disp=False)
    assert len(ask(ex3_convnet, 'Q2a').printed) == 2


def test_importing_the_scripts_starts_nothing_and_needs_no_pyplot():
    code = ('import ex3_convnet, ex3_pretrained, sys, torch; '
            'assert "matplotlib.pyplot" not in sys.modules and not torch.cuda.is_initialized()')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120,
                          cwd=Path(ex3_convnet.__file__).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '') and ex3_convnet.ConvNet is ConvNet
