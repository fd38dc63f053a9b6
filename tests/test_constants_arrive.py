"""Every constant of both scripts, set to an unusual value, arrives where it counts."""
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from recording import CHANNELS, DATA, IMAGENET, ask, layers, loaded, normalisation, rates, scales, whitened
from torch import nn
from torchvision.transforms.functional import normalize

import ex3_convnet
import ex3_pretrained
from datasets.augment import Affine, ColorJitter, Cutout, Flip, Greyscale
from ex3_convnet import augmentations

pytestmark = pytest.mark.usefixtures('cheap')


def augmentation(number, key):
    return lambda run: getattr(run.batches.augmentations[number], key)


BOTH = {  # constant -> (an unusual value, where it must be found); a third: what is found, if not that value
    'data': ('else', lambda run: run.given.load[0]),
    'data_root': (Path('somewhere'), lambda run: run.given.load[1]),
    'num_training': (333, lambda run: run.given.load[2]),
    'num_validation': (44, lambda run: run.given.load[3]),
    'results': (None, lambda run: run.folder.parts[-1], 'seed7'),  # below a folder of the test's own: `ask`
    'seeds': ((7,), lambda run: (run.seed,)),
    'num_classes': (7, lambda run: layers(run.network, nn.Linear)[-1].out_features, 12),  # as in the data
    'num_epochs': (30, lambda run: run.num_epochs),
    'batch_size': (33, lambda run: (run.batches.batch_size, len(run.batches), run.batches.shuffle), (33, 15, True)),
    'learning_rate': (0.012, lambda run: (rates(run, 12), run.optimizer.param_groups[-1]['lr']), ([0.012], 0.012)),
    'learning_rate_decay': (0.7, lambda run: None, None),  # without one-cycle, below
    'reg': (0.03, lambda run: {group['weight_decay'] for group in run.optimizer.param_groups}, {0.03}),
    'optimizer': ('SGD', lambda run: type(run.optimizer).__name__),
    'schedule': ('one-cycle', lambda run: rates(run, 0, 30), [0, 0]),
    'warmup': (0.4, lambda run: rates(run, 6, 12, 21), [0.006, 0.012, 0.006]),
    'label_smoothing': (0.15, lambda run: run.label_smoothing),
    'ema_decay': (0.6, lambda run: run.ema_decay),
    'patience': (9, lambda run: run.patience),
    'flip': (0.31, lambda run: run.batches.augmentations[0], Flip(0.31)),
    'crop_padding': (3, augmentation(1, 'padding')),
    'cutout': (6, lambda run: run.batches.augmentations[-1], Cutout(6)),
    'device': ('cuda:3', lambda run: run.given.device),
    'precision': ('bf16', lambda run: (run.precision, run.evaluated_in), ('bf16', 'bf16')),
}
SCRIPTS = {
    ex3_convnet: ('Q1', BOTH | {
        'normalisation': ('channels', normalisation, CHANNELS),
        'input_size': (3, lambda run: run.network.features[0].in_channels),
        'hidden_size': ((5, 4, 6, 3, 7), lambda run: tuple(c.out_channels for c in layers(run.network, nn.Conv2d))),
        'norm_layer': ('BN', lambda run: len(layers(run.network, nn.BatchNorm2d)), 5),
        'dropout': (0.35, lambda run: [layer.p for layer in layers(run.network, nn.Dropout)], [0.35] * 4),
        'whiten': (True, whitened),
        'freeze_at': (0.45, lambda run: run.freeze_at),
        'crop_border': ('reflect', augmentation(1, 'mode')),
        **{key: (value, augmentation(2, key))
           for key, value in dict(degrees=7.0, translate=0.05, scale=0.15, shear=4.0).items()},
        **{key: (value, augmentation(3, key))
           for key, value in dict(brightness=0.11, contrast=0.12, saturation=0.13, hue=0.04).items()},
        'greyscale': (0.17, lambda run: run.batches.augmentations[4:-1], (Greyscale(0.17),))}),
    ex3_pretrained: ('best', BOTH | {
        'mode': ('fine-tuned', lambda run: sorted(scales(run)), ['classifier', 'features']),
        'weights': (None, loaded, True),
        'layer_config': ((512, 6), lambda run: tuple(layer.in_features for layer in layers(run.network, nn.Linear))),
        'backbone_lr_scale': (0.4, scales, {'features': 0.4, 'classifier': 1.0})}),
}


def unusual(script):
    name, table = SCRIPTS[script]
    options = []
    for key, (value, *_) in table.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            options += [f'--{key.replace("_", "-")}', *map(str, values)]
    (run,) = ask(script, name, *options).runs
    return run


@pytest.mark.parametrize('script, key', [(script, field.name) for script in SCRIPTS for field in fields(script.Config)
                                         if field.name != 'experiment'])
def test_every_constant_arrives_where_it_counts(script, key):
    value, observe, *expected = SCRIPTS[script][1][key]  # a KeyError: a new constant, to be added above
    assert observe(unusual(script)) == (expected[0] if expected else value)


@pytest.mark.parametrize('script', SCRIPTS)
def test_what_only_other_choices_use_arrives_too(script):
    for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
        optimizer = ['--optimizer', 'Muon'] if script is ex3_convnet else []
        name, options = SCRIPTS[script][0], ['--learning-rate', '0.01', '--learning-rate-decay', '0.7', *optimizer]
        (run,) = ask(script, name, '--schedule', 'decay', '--precision', precision, *options).runs
        assert rates(run, 0, 1, 2.9) == pytest.approx([0.01, 0.007, 0.0049])
        assert not optimizer or run.optimizer.dtype == dtype
    (run,) = ask(ex3_pretrained, 'best', '--mode', 'scratch', '--backbone-lr-scale', '0.4').runs
    assert scales(run) == {'features': 1.0, 'classifier': 1.0} and not loaded(run)  # nothing pretrained to spare


@pytest.mark.parametrize('key, kind', [
    *[(key, Affine) for key in ('degrees', 'translate', 'scale', 'shear')],
    *[(key, ColorJitter) for key in ('brightness', 'contrast', 'saturation', 'hue')]])
def test_each_augmentation_works_alone(key, kind):
    assert augmentations(ex3_convnet.Config(**{key: 0.25})) == [kind(**{key: 0.25})]


@pytest.mark.parametrize('script, mean_std', [(ex3_convnet, CHANNELS), (ex3_pretrained, IMAGENET)])
def test_a_model_is_selected_on_validation_and_all_images_are_evaluated_as_they_are(script, mean_std):
    run = unusual(script)
    assert torch.equal(run.batches.split.images, DATA.train.images) and list(run.evaluation) == ['train', 'val', 'test']
    for part, batches in ('val', run.val), *run.evaluation.items():
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        torch.testing.assert_close(images, normalize(getattr(DATA, part).images / 255, *mean_std))
        assert torch.equal(labels, getattr(DATA, part).labels)
    assert torch.tensor(normalisation(run)).tolist() == torch.tensor(mean_std).tolist()


def test_the_defaults_are_the_handouts():
    for script, expected in (
            (ex3_convnet, dict(experiment='Q1', input_size=3, hidden_size=(128, 512, 512, 512, 512), num_epochs=20,
                               learning_rate=2e-3, learning_rate_decay=0.95, reg=0.001, norm_layer=None)),
            (ex3_pretrained, dict(experiment='Q4b', layer_config=(512, 256), num_epochs=30, learning_rate=1e-3,
                                  learning_rate_decay=0.99, reg=0.0, flip=0.5, weights='imagenet'))):
        expected |= dict(data='auto', num_training=49000, num_validation=1000, num_classes=10, batch_size=200)
        assert {key: getattr(script.Config(), key) for key in expected} == expected
        rows = [row for question in script.QUESTIONS.values() for row in question.rows.values()]
        assert not {key for row in rows for key in row} & {'data', 'num_training', 'num_validation', 'hidden_size'}
