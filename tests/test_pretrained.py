"""The transfer-learning script: constants, rows and results as in test_convnet.py, features, weights not to be had."""
from dataclasses import fields, replace
from http.client import BadStatusLine
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recording import DATA, IMAGENET, ask, layers, normalisation, rates, small_vgg, truth
from tiny import pretrained
from torch import nn
from torchvision.models import VGG11_BN_Weights
from torchvision.transforms.functional import normalize

import ex3_pretrained
import models.features
from datasets.augment import Crop, Cutout, Flip
from ex3_pretrained import QUESTIONS, Config
from lab.files import read_csv
from lab.progress import Progress
from lab.results import Result
from models.features import FeatureBatches
from models.vgg import VggModel
from optimizers import make_optimizer
from training import decay, fit, seed_everything

pytestmark = pytest.mark.usefixtures('cheap')


@pytest.fixture
def weights(tmp_path, monkeypatch):
    return small_vgg(monkeypatch, tmp_path)


def loaded(run):
    """Whether the convolutional part starts from the file."""
    state = torch.load(run.folder.parents[3] / 'vgg.pt')
    return all(torch.equal(run.network.state_dict()[key], tensor) for key, tensor in state.items())


def scales(run):
    """Part of the network -> the factor on its learning rate; what is left out does not train."""
    names = {id(parameter): name.split('.')[0] for name, parameter in run.model.named_parameters()}
    return {names[id(p)]: group['scale'] for group in run.optimizer.param_groups for p in group['params']}


def facts(run):
    (group, *_), batches = run.optimizer.param_groups, run.batches
    augmentations = f'features, flip {batches.flip}' if isinstance(batches, FeatureBatches) else batches.augmentations
    return dict(loaded=loaded(run), scales=scales(run), augmentations=augmentations, batch_size=batches.batch_size,
                num_epochs=run.num_epochs, optimizer=type(run.optimizer).__name__, reg=group['weight_decay'],
                label_smoothing=run.label_smoothing, ema_decay=run.ema_decay, patience=run.patience,
                freeze_at=run.freeze_at, layers=[layer.in_features for layer in layers(run.network, nn.Linear)])


# --- constants arrive ---------------------------------------------------------------------------------------

ARRIVES = {  # constant -> (an unusual value, where it must be found); a third: what is found, if not that value
    'data': ('else', lambda run: run.given.load[0]),
    'data_root': (Path('somewhere'), lambda run: run.given.load[1]),
    'num_training': (333, lambda run: run.given.load[2]),
    'num_validation': (44, lambda run: run.given.load[3]),
    'results': (None, lambda run: run.folder.parts[-4:], ('ex3_pretrained', 'best', 'best', 'seed7')),
    'seeds': ((7,), lambda run: (run.seed,)),
    'num_classes': (7, lambda run: run.network.classifier[-1].out_features, 12),  # as in the data
    'mode': ('fine-tuned', lambda run: sorted(scales(run)), ['classifier', 'features']),
    'weights': (None, loaded, True),
    'layer_config': ((512, 6), lambda run: tuple(facts(run)['layers'])),
    'num_epochs': (30, lambda run: run.num_epochs),
    'batch_size': (33, lambda run: (run.batches.batch_size, len(run.batches), run.batches.shuffle), (33, 15, True)),
    'learning_rate': (0.012, lambda run: rates(run, 12), [0.012]),
    'learning_rate_decay': (0.7, lambda run: None, None),  # without one-cycle, below
    'backbone_lr_scale': (0.4, scales, {'features': 0.4, 'classifier': 1.0}),
    'reg': (0.03, lambda run: {group['weight_decay'] for group in run.optimizer.param_groups}, {0.03}),
    'optimizer': ('SGD', lambda run: type(run.optimizer).__name__),
    'schedule': ('one-cycle', lambda run: rates(run, 0, 30), [0, 0]),
    'warmup': (0.4, lambda run: rates(run, 6, 12, 21), [0.006, 0.012, 0.006]),
    'label_smoothing': (0.15, lambda run: run.label_smoothing),
    'ema_decay': (0.6, lambda run: run.ema_decay),
    'patience': (9, lambda run: run.patience),
    'flip': (0.31, lambda run: run.batches.augmentations[0], Flip(0.31)),
    'crop_padding': (3, lambda run: run.batches.augmentations[1], Crop(3)),
    'cutout': (6, lambda run: run.batches.augmentations[2:], (Cutout(6),)),
    'device': ('cuda:3', lambda run: run.given.device),
    'precision': ('bf16', lambda run: (run.precision, run.evaluated_in), ('bf16', 'bf16')),
}


@pytest.fixture(scope='module')
def unusual(cheap):
    options = []
    for key, (value, *_) in ARRIVES.items():
        if value is not None:
            options += [f'--{key.replace("_", "-")}', *map(str, value if isinstance(value, tuple) else [value])]
    (run,) = ask(ex3_pretrained, 'best', *options).runs
    return run


@pytest.mark.parametrize('key', [field.name for field in fields(Config) if field.name != 'experiment'])
def test_every_constant_arrives_where_it_counts(unusual, key):
    value, observe, *expected = ARRIVES[key]  # a KeyError: a new constant, to be added above
    assert observe(unusual) == (expected[0] if expected else value)


def test_what_only_other_choices_use_arrives_too():
    (run,) = ask(ex3_pretrained, 'Q4a', '--learning-rate-decay', '0.7', '--precision', 'bf16', '--flip', '0.4').runs
    assert rates(run, 0, 1, 2.9) == pytest.approx([1e-3, 0.7e-3, 0.49e-3])
    assert run.batches.flip == 0.4 and run.given.extracted[3] == 'bf16'
    (run,) = ask(ex3_pretrained, 'best', '--mode', 'scratch', '--backbone-lr-scale', '0.4').runs
    assert scales(run) == {'features': 1.0, 'classifier': 1.0} and not loaded(run)  # nothing pretrained to spare


def test_the_defaults_are_the_handouts():
    c = Config()
    assert (c.layer_config, c.num_epochs, c.batch_size, c.learning_rate) == ((512, 256), 30, 200, 1e-3)
    assert (c.learning_rate_decay, c.reg, c.flip, c.weights) == (0.99, 0.0, 0.5, 'imagenet')
    assert (c.experiment, c.data, c.num_training, c.num_validation, c.device) == ('Q4b', 'auto', 49000, 1000, 'auto')


@pytest.mark.parametrize('wrong', [
    ['--mode', 'half'], ['--batch-size', '1'], ['--num-training', '1'], ['--layer-config', '100', '10'],
    ['--experiment', 'Q1'], ['--mode', 'scratch', '--experiment', 'Q4b'], ['--weights', '/no/such/file']], ids=str)
def test_constants_that_make_no_sense_are_one_sentence_and_status_2(tmp_path, weights, wrong, capsys):
    assert pretrained(tmp_path / 'results', '--weights', weights, *wrong) == 2
    assert capsys.readouterr().err.count('\n') == 1 and not (tmp_path / 'results').exists()


# --- every row is what its name says ------------------------------------------------------------------------

FROZEN = dict(
    loaded=True, scales={'classifier': 1.0}, augmentations='features, flip 0.5', batch_size=200, num_epochs=30,
    optimizer='Adam', reg=0.0, label_smoothing=0.0, ema_decay=0.0, patience=None, freeze_at=1.0, layers=[512, 256])
TUNED = FROZEN | dict(scales={'features': 1.0, 'classifier': 1.0}, augmentations=(Flip(0.5),))
ROWS = {
    'Q4a': {'frozen': FROZEN}, 'Q4b': {'frozen': FROZEN, 'fine-tuned': TUNED, 'scratch': TUNED | dict(loaded=False)},
    'best': {'best': TUNED | dict(
        scales={'features': 0.3, 'classifier': 1.0}, optimizer='SGD', reg=5e-4, label_smoothing=0.1, ema_decay=0.99,
        augmentations=(Flip(0.5), Crop(4)))}}
PICTURES = {'Q4a': {'accuracy'}, 'Q4b': {'accuracy', 'filters', 'mistakes', 'confusion'}, 'best': {'accuracy'}}


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_row_is_what_its_name_says(name):
    runs = ask(ex3_pretrained, name).runs
    assert {run.label.removesuffix(', seed 0'): facts(run) for run in runs} == ROWS[name]
    for run in runs:
        epochs = (0, 0.5, 1, 5, 29.5)
        curve = (np.interp(epochs, [0, 6, 30], [0, 0.05, 0]) if name == 'best'
                 else [1e-3 * 0.99 ** int(epoch) for epoch in epochs])
        assert rates(run, *epochs) == pytest.approx(list(curve), abs=1e-8)
        assert torch.equal(run.network.classifier[0].weight, runs[0].network.classifier[0].weight)  # the same start


def test_images_are_normalised_as_imagenets_and_only_those_to_train_on_are_augmented():
    _, run, _ = ask(ex3_pretrained, 'Q4b').runs
    for part, batches in ('val', run.val), *run.evaluation.items():
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        torch.testing.assert_close(images, normalize(getattr(DATA, part).images / 255, *IMAGENET))
        assert torch.equal(labels, getattr(DATA, part).labels)
    assert torch.equal(run.batches.split.images, DATA.train.images)
    assert normalisation(run) == tuple(map(tuple, IMAGENET))


# --- features -----------------------------------------------------------------------------------------------


def test_features_are_those_of_every_image_and_to_train_on_also_of_its_mirror_image():
    (run,) = ask(ex3_pretrained, 'Q4a').runs
    for part, batches in ('train', run.batches), ('val', run.val), *run.evaluation.items():
        split, found = getattr(DATA, part), batches.split
        views = [split.images, split.images.flip(3)][:2 if part == 'train' else 1]
        assert found.images.shape[1] == len(views) and torch.equal(found.labels, split.labels)
        with torch.no_grad():
            for i, view in enumerate(views):
                expected = run.network.eval().extract(normalize(view / 255, *IMAGENET))
                torch.testing.assert_close(found.images[:, i], expected, rtol=1e-3, atol=1e-4)
        if batches is not run.batches:  # those to evaluate on are never mirrored
            assert torch.equal(torch.cat([features for features, _ in batches]), found.images[:, 0])


@pytest.mark.parametrize('options, expected', [
    (['--flip', '0'], (510, 1, 512)), (['--crop-padding', '4'], (Flip(0.5), Crop(4))),
    (['--cutout', '6', '--flip', '0'], (Cutout(6),))], ids=str)
def test_other_augmentation_runs_the_backbone_live_and_none_needs_no_mirror_images(options, expected):
    (run,) = ask(ex3_pretrained, 'Q4a', *options).runs
    cached = isinstance(run.batches, FeatureBatches)
    assert (run.batches.split.images.shape if cached else run.batches.augmentations) == expected
    assert set(scales(run)) == {'classifier'} and (not cached or run.batches.flip == 0)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_features_are_computed_in_the_precision_asked_for_and_kept_in_fp32(weights, monkeypatch, precision):
    seen, extract = set(), VggModel.extract
    monkeypatch.setattr(VggModel, 'extract', lambda *a: seen.add(torch.is_autocast_enabled('cpu')) or extract(*a))
    batches, *_ = ex3_pretrained.make_feature_batches(Config(weights=str(weights), precision=precision), DATA)
    assert seen == {precision == 'bf16'} and batches.split.images.dtype == torch.float32


def test_training_on_features_equals_training_with_the_live_backbone_on_the_same_flips(tmp_path, weights):
    config, histories = Config(weights=str(weights), num_classes=12, batch_size=100), []
    for make in (ex3_pretrained.make_feature_batches, ex3_pretrained.make_batches):
        seed_everything(0)
        model = ex3_pretrained.make_model(config, torch.device('cpu'))
        batches, evaluation, *_ = make(config, DATA)
        folder = tmp_path / make.__name__
        folder.mkdir()
        histories.append(fit(model, batches, evaluation['val'], make_optimizer('Adam', model, 1e-2), decay(1e-2, 0.9),
                             folder, num_epochs=2, seed=3))
    for column in ('train_loss', 'train_accuracy', 'val_loss'):
        assert histories[0][column] == pytest.approx(histories[1][column], rel=1e-4), column


def test_the_time_of_the_features_to_train_on_counts_as_training(weights, monkeypatch):
    clock = iter([10.0, 17.5, 100.0, 200.0, 300.0])
    monkeypatch.setattr(models.features, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    assert ex3_pretrained.make_feature_batches(Config(weights=str(weights)), replace(DATA))[2] == 7.5
    asked = ask(ex3_pretrained, 'Q4b')
    seconds = {result.run: result.seconds for result in read_csv(Result, asked.folder / 'summary.csv')}
    assert seconds == {'frozen': pytest.approx(3 + asked.runs[0].given.seconds), 'fine-tuned': 3, 'scratch': 3}


# --- results and pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_experiment_ends_with_its_pictures_and_the_accuracies_of_its_networks(name):
    asked = ask(ex3_pretrained, name)
    assert asked.status == 0
    assert {path.stem for path in asked.folder.glob('*.png')} == PICTURES[name] | {'curves'}
    results, shown = read_csv(Result, asked.folder / 'summary.csv'), asked.drawn['plot_accuracies'][0][0]
    for part, label in (('train', 'training'), ('val', 'validation'), ('test', 'test')):
        for which in ('best', 'last'):
            for run, (value,) in truth(ex3_pretrained, name, which, part).items():
                (result,) = [result for result in results if result.run == run]
                assert 100 * getattr(result, f'{which}_{part}_accuracy') == pytest.approx(value, abs=0.3)
                assert which == 'last' or shown[run][label].mean == pytest.approx(value, abs=0.3)


def test_filters_show_the_pretrained_ones_beside_those_from_scratch():
    asked = ask(ex3_pretrained, 'Q4b')
    (scratch, _), options = asked.drawn['VisualizeFilter']
    for model, run in ((options['before'], asked.runs[0]), (scratch, asked.runs[2])):
        assert torch.equal(model.features[0].weight, torch.load(run.folder / 'best.pt')['features.0.weight'])
    assert options['titles'] == ['frozen (as pretrained)', 'scratch']


def test_three_modes_train_exactly_what_they_should(tmp_path, weights):
    assert pretrained(tmp_path, '--weights', weights, '--experiment', 'Q4b') == 0
    state = torch.load(weights)
    for name in ('best', 'last'):
        frozen, tuned, scratch = (torch.load(tmp_path / f'ex3_pretrained/Q4b/{run}/seed0/{name}.pt')
                                  for run in ('frozen', 'fine-tuned', 'scratch'))
        assert all(torch.equal(frozen[key], tensor) for key, tensor in state.items())  # statistics included
        assert not [key for key, tensor in state.items() if torch.equal(tuned[key], tensor)]
        assert (scratch['features.0.weight'] - state['features.0.weight']).abs().mean() > 0.01
    results = read_csv(Result, tmp_path / 'ex3_pretrained/Q4b/summary.csv')
    head = 512 * 4 + 4 + 2 * 4 + 4 * 10 + 10
    assert [result.trainable for result in results] == [head, results[1].parameters, results[1].parameters]


def test_a_frozen_run_interrupted_in_the_middle_continues_as_if_nothing_had_happened(tmp_path, weights, monkeypatch):
    def stop_in_the_second(progress, history):
        if len(history.epochs) == 2:
            raise KeyboardInterrupt
    options = ['--experiment', 'Q4a', '--weights', weights]
    assert pretrained(tmp_path / 'whole', *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Progress, 'end_epoch', stop_in_the_second)
        assert pretrained(tmp_path / 'parts', *options) == 130
    assert pretrained(tmp_path / 'parts', *options) == 0
    for name in ('best', 'last'):
        first, second = (torch.load(tmp_path / folder / f'ex3_pretrained/Q4a/frozen/seed0/{name}.pt')
                         for folder in ('whole', 'parts'))
        assert all(torch.equal(first[key], second[key]) for key in first)


# --- weights that cannot be had, or have moved --------------------------------------------------------------


def statuses(tmp_path):
    return {r.run: r.status for r in read_csv(Result, tmp_path / 'ex3_pretrained/Q4b/summary.csv')}


def test_without_weights_only_scratch_runs_and_the_others_follow_later(tmp_path, weights, monkeypatch, capsys):
    def refuse(*_args, **_kwargs):
        raise BadStatusLine('a proxy that talks nonsense')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    assert pretrained(tmp_path) == 1
    errors = capsys.readouterr().err
    for words in (VGG11_BN_Weights.IMAGENET1K_V1.url, tmp_path / 'hub' / 'checkpoints', 'vgg11_bn-6002323d.pth',
                  'could not be downloaded', 'fine-tuned, seed 0: not run'):
        assert str(words) in errors
    assert statuses(tmp_path) == {'frozen': 'not run', 'fine-tuned': 'not run', 'scratch': 'finished'}
    assert pretrained(tmp_path, '--weights', weights) == 0
    assert 'scratch, seed 0: already finished, skipped' in capsys.readouterr().out
    assert set(statuses(tmp_path).values()) == {'finished'}
    assert [folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()] == ['Q4b']


def test_weights_are_known_by_their_content_and_named_in_the_title(tmp_path, weights, capsys):
    other, moved = tmp_path / 'other.pt', tmp_path / 'moved.pt'
    moved.write_bytes(weights.read_bytes())
    torch.save({key: tensor * 1.1 for key, tensor in torch.load(weights).items()}, other)
    for path, folders in ((weights, {'Q4a'}), (moved, {'Q4a'}), (other, {'Q4a', 'Q4a-2'})):
        assert pretrained(tmp_path, '--experiment', 'Q4a', '--weights', path) == 0
        assert {folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()} == folders
    assert capsys.readouterr().out.count('already finished, skipped') == 1
    assert 'other weights' in (tmp_path / 'ex3_pretrained/Q4a-2/summary.md').read_text()
