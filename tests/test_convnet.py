"""The ConvNet script: every constant arrives, every row is what its name says, every picture shows the results."""
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import CHANNELS, DATA, HALF, TINY, ask, layers, normalisation, rates, seeded
from torch import nn
from torchvision.transforms.functional import normalize

import ex3_convnet
from datasets import cifar10
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from ex3_convnet import QUESTIONS, Config, PrintModelSize, augmentations
from models.convnet import ConvNet, whiten_first_layer

pytestmark = pytest.mark.usefixtures('cheap')


def whitened(run):
    """Whether the first layer starts as its seed makes it, or whitened for the first 4,000 normalised images."""
    weight, mean, std = run.network.features[0].weight, *normalisation(run)
    oracle = seeded(run)
    if torch.equal(weight, oracle.features[0].weight):
        return False
    whiten_first_layer(oracle, torch.stack([normalize(image / 255, mean, std) for image in DATA.train.images[:4000]]))
    torch.testing.assert_close(weight, oracle.features[0].weight, rtol=1e-3, atol=1e-5)
    return True


def facts(run):
    """What a run is, of what its parts were given."""
    norms, (group, *_) = layers(run.network, nn.BatchNorm2d), run.optimizer.param_groups
    return dict(
        norm='BN' if len(norms) == 5 else norms, dropout=[layer.p for layer in layers(run.network, nn.Dropout)],
        augmentations=run.batches.augmentations, normalisation=normalisation(run), whitened=whitened(run),
        batch_size=run.batches.batch_size, num_epochs=run.num_epochs, optimizer=type(run.optimizer).__name__,
        reg=group.get('weight_decay'), rates=rates(run), label_smoothing=run.label_smoothing, ema_decay=run.ema_decay,
        patience=run.patience, freeze_at=run.freeze_at)


# --- constants arrive ---------------------------------------------------------------------------------------

ARRIVES = {  # constant -> (an unusual value, where it must be found); a third: what is found, if not that value
    'data': ('else', lambda run: run.given.load[0]),
    'data_root': (Path('somewhere'), lambda run: run.given.load[1]),
    'num_training': (333, lambda run: run.given.load[2]),
    'num_validation': (44, lambda run: run.given.load[3]),
    'normalisation': ('channels', normalisation, CHANNELS),
    'results': ('', lambda run: run.folder.parts[-4:], ('ex3_convnet', 'Q1', 'ConvNet', 'seed7')),
    'seeds': ((7,), lambda run: (run.seed,)),
    'input_size': (3, lambda run: run.network.features[0].in_channels),
    'num_classes': (7, lambda run: run.network.classifier.out_features, 12),  # as in the data
    'hidden_size': ((5, 4, 6, 3, 7), lambda run: tuple(conv.out_channels for conv in layers(run.network, nn.Conv2d))),
    'norm_layer': ('BN', lambda run: facts(run)['norm']),
    'dropout': (0.35, lambda run: facts(run)['dropout'], [0.35] * 4),
    'num_epochs': (30, lambda run: run.num_epochs),
    'batch_size': (33, lambda run: (run.batches.batch_size, len(run.batches), run.batches.shuffle), (33, 15, True)),
    'learning_rate': (0.012, lambda run: (rates(run, 12), run.optimizer.param_groups[0]['lr']), ([0.012], 0.012)),
    'learning_rate_decay': (0.7, lambda run: None, None),  # without one-cycle, below
    'reg': (0.03, lambda run: run.optimizer.param_groups[0]['weight_decay']),
    'optimizer': ('SGD', lambda run: type(run.optimizer).__name__),
    'schedule': ('one-cycle', lambda run: rates(run, 0, 30), [0, 0]),
    'warmup': (0.4, lambda run: rates(run, 6, 12, 21), [0.006, 0.012, 0.006]),
    'label_smoothing': (0.15, lambda run: run.label_smoothing),
    'ema_decay': (0.6, lambda run: run.ema_decay),
    'patience': (9, lambda run: run.patience),
    'whiten': (True, whitened),
    'freeze_at': (0.45, lambda run: run.freeze_at),
    'flip': (0.31, lambda run: run.batches.augmentations[0], Flip(0.31)),
    'crop_padding': (3, lambda run: run.batches.augmentations[1].padding),
    'crop_border': ('reflect', lambda run: run.batches.augmentations[1], Crop(3, 'reflect')),
    **{key: (value, lambda run, key=key: getattr(run.batches.augmentations[2], key)) for key, value in (
        ('degrees', 7.0), ('translate', 0.05), ('scale', 0.15), ('shear', 4.0))},
    **{key: (value, lambda run, key=key: getattr(run.batches.augmentations[3], key)) for key, value in (
        ('brightness', 0.11), ('contrast', 0.12), ('saturation', 0.13), ('hue', 0.04))},
    'greyscale': (0.17, lambda run: run.batches.augmentations[4], Greyscale(0.17)),
    'cutout': (6, lambda run: run.batches.augmentations[5:], (Cutout(6),)),
    'device': ('cuda:3', lambda run: run.given.device),
    'precision': ('bf16', lambda run: (run.precision, run.evaluated_in), ('bf16', 'bf16')),
}


def option(key, value):
    values = [] if value is True else value if isinstance(value, tuple) else [value]
    return [f'--{key.replace("_", "-")}', *map(str, values)]


@pytest.fixture(scope='module')
def unusual(cheap):
    options = [word for key, (value, *_) in ARRIVES.items() if key != 'results' for word in option(key, value)]
    (run,) = ask(ex3_convnet, 'Q1', *options).runs
    return run


@pytest.mark.parametrize('key', [field.name for field in fields(Config) if field.name != 'experiment'])
def test_every_constant_arrives_where_it_counts(unusual, key):
    value, observe, *expected = ARRIVES[key]  # a KeyError: a new constant, to be added above
    assert observe(unusual) == (expected[0] if expected else value)


def test_what_only_other_choices_use_arrives_too():
    for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
        (run,) = ask(ex3_convnet, 'Q1', '--optimizer', 'Muon', '--learning-rate-decay', '0.7', '--precision', precision,
                     '--learning-rate', '0.01').runs
        assert run.optimizer.dtype == dtype and rates(run, 0, 1, 2.9) == pytest.approx([0.01, 0.007, 0.0049])


@pytest.mark.parametrize('key, kind', [
    *[(key, Affine) for key in ('degrees', 'translate', 'scale', 'shear')],
    *[(key, ColorJitter) for key in ('brightness', 'contrast', 'saturation', 'hue')]])
def test_each_augmentation_works_alone(key, kind):
    assert augmentations(Config(**{key: 0.25})) == [kind(**{key: 0.25})]


def test_a_model_is_selected_on_validation_and_all_images_are_evaluated_as_they_are(unusual):
    assert torch.equal(unusual.batches.split.images, DATA.train.images)
    for part, batches in ('val', unusual.val), *unusual.evaluation.items():
        split = getattr(DATA, part)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        torch.testing.assert_close(images, normalize(split.images / 255, *CHANNELS))
        assert torch.equal(labels, split.labels)
    assert list(unusual.evaluation) == ['train', 'val', 'test']


# --- every row is what its name says ------------------------------------------------------------------------

PLAIN = dict(
    norm=[], dropout=[], augmentations=(), normalisation=HALF, whitened=False, batch_size=200, num_epochs=20,
    optimizer='Adam', reg=0.001, rates='decay', label_smoothing=0.0, ema_decay=0.0, patience=None, freeze_at=1.0)
NORM = PLAIN | dict(norm='BN')
NORM30 = NORM | dict(num_epochs=30)
AFFINE, JITTER = Affine(10, 0.1, 0.1, 5), ColorJitter(0.3, 0.3, 0.3, 0.05)
FAST = NORM | dict(
    normalisation=CHANNELS, whitened=True, batch_size=500, num_epochs=8, optimizer='Muon', reg=None,
    rates='one-cycle', label_smoothing=0.1, freeze_at=0.3, augmentations=(Flip(0.5), Crop(2, 'reflect')))
BEST = FAST | dict(num_epochs=30, augmentations=(Flip(0.5), Crop(4, 'reflect'), Cutout(8)))


def augmented(*augmentations):
    return NORM30 | dict(augmentations=augmentations)


ROWS = {
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
        **{f'jitter {x}': augmented(ColorJitter(x, x, x, x / 6)) for x in (0.1, 0.3, 0.5)}},
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
        'no batch norm': BEST | dict(norm=[])},
}


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_row_is_what_its_name_says(name):
    runs, seeds = ask(ex3_convnet, name).runs, [0, 1, 2] if name == 'Q2b' else [0]  # several repetitions
    jobs = [(row, seed) for seed in seeds for row in ROWS[name]]
    assert [(run.label, run.seed) for run in runs] == [(f'{row}, seed {seed}', seed) for row, seed in jobs]
    for run, (row, _) in zip(runs, jobs, strict=True):
        expected, end = ROWS[name][row], run.num_epochs
        epochs = (0, 0.5, 1, 5, end - 0.5)
        curve = ([2e-3 * 0.95 ** int(epoch) for epoch in epochs] if expected['rates'] == 'decay'
                 else np.interp(epochs, [0, 0.1 * end, end], [0, 0.15, 0]).tolist())
        assert facts(run) == expected | dict(rates=pytest.approx(curve, abs=1e-8)), row


def test_the_defaults_and_every_row_keep_the_handouts_network():
    c = Config()
    assert (c.input_size, c.num_classes, c.hidden_size) == (3, 10, (128, 512, 512, 512, 512))
    assert (c.experiment, c.data, c.num_training, c.num_validation, c.device) == ('Q1', 'auto', 49000, 1000, 'auto')
    changed = {key for question in QUESTIONS.values() for row in question.rows.values() for key in row}
    assert not changed & {'hidden_size', 'num_classes', 'num_training', 'num_validation', 'data'}


# --- the script ---------------------------------------------------------------------------------------------


def test_the_size_of_the_network_is_printed_once_per_experiment_and_size():
    (network,) = ask(ex3_convnet, 'Q3b').printed
    assert PrintModelSize(network, disp=False) == PrintModelSize(ConvNet(3, TINY, 12, 'BN'), disp=False)
    assert len(ask(ex3_convnet, 'Q2a').printed) == 2


def test_importing_the_scripts_starts_nothing_and_needs_no_pyplot():
    code = ('import ex3_convnet, ex3_pretrained, sys, torch; '
            'assert "matplotlib.pyplot" not in sys.modules and not torch.cuda.is_initialized()')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120,
                          cwd=Path(ex3_convnet.__file__).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert ex3_convnet.ConvNet is ConvNet


def test_the_network_before_training_is_the_same_for_the_same_seed_and_whitened_if_asked():
    data = cifar10.load('shapes', None, 60, 20)
    first, second, other, plain = (
        ex3_convnet.initial_model(ex3_convnet.Config(hidden_size=(32,), whiten=whiten), data, seed).features[0].weight
        for whiten, seed in ((True, 0), (True, 0), (True, 1), (False, 0)))
    assert torch.equal(first, second) and not torch.equal(first, plain) and not torch.equal(first, other)
    with torch.no_grad():  # the first 27 filters: what they answer to the images' patches is uncorrelated
        images = ex3_convnet.make_batches(ex3_convnet.Config(), data)[1]['train'].inputs(data.train.images)
        answers = torch.nn.functional.conv2d(images, first[:27]).transpose(0, 1).flatten(1)
    covariance = answers.cov()
    assert (covariance - covariance.diag().diag()).abs().max() < 0.05 * covariance.diag().max()
