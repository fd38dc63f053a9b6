"""The ConvNet script: every constant arrives, every row is what its name says, every picture shows the results."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ex3_convnet
from datasets.augment import Affine, ColorJitter, Crop, Cutout, Flip, Greyscale
from ex3_convnet import QUESTIONS, Config, PrintModelSize, augmentations, main, make_model
from lab import answers
from lab.files import read_csv
from lab.results import Result
from models.convnet import ConvNet
from training import seed_everything

TINY = ['--data', 'shapes', '--num-training', '60', '--num-validation', '20', '--batch-size', '20', '--num-epochs', '1',
        '--hidden-size', '4', '4', '4', '4', '4', '--device', 'cpu', '--precision', 'fp32']


def rows(name):
    return {run: Config(**row) for run, row in QUESTIONS[name].rows.items()}


# --- constants arrive ---------------------------------------------------------------------------------------

UNUSUAL = dict(
    data='shapes', num_training=70, num_validation=30, normalisation='channels', seeds=(5,),
    hidden_size=(3, 4, 5, 6, 7), norm_layer='BN', dropout=0.25, num_epochs=3, batch_size=15, learning_rate=0.007,
    reg=0.02, optimizer='SGD', schedule='one-cycle', warmup=0.4,
    label_smoothing=0.15, ema_decay=0.8, patience=7, whiten=True, freeze_at=0.6,
    flip=0.3, crop_padding=3, crop_border='reflect', degrees=7.0, translate=0.05, scale=0.15, shear=4.0,
    brightness=0.11, contrast=0.12, saturation=0.13, hue=0.04, greyscale=0.17, cutout=6, device='cpu', precision='bf16')
ELSEWHERE = {'experiment', 'data_root', 'results', 'input_size', 'num_classes', 'learning_rate_decay'}  # tested below


@pytest.fixture
def fitted(monkeypatch):
    """Every call of `fit` in the script: its arguments, after it has run."""
    calls, fit = [], ex3_convnet.fit

    def spy(model, batches, val, optimizer, schedule, folder, **options):
        calls.append(dict(model=model, batches=batches, val=val, optimizer=optimizer, schedule=schedule, folder=folder,
                          first=model.features[0].weight.detach().clone(), **options))
        return fit(model, batches, val, optimizer, schedule, folder, **options)
    monkeypatch.setattr(ex3_convnet, 'fit', spy)
    return calls


def options_of(constants):
    options = []
    for key, value in constants.items():
        values = [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
        options += [f'--{key.replace("_", "-")}', *values]
    return options


def test_every_constant_has_an_unusual_value_here():
    assert set(UNUSUAL) | ELSEWHERE == set(Config.__annotations__)
    assert [key for key, value in UNUSUAL.items() if value == getattr(Config(), key)] == []


def test_every_constant_reaches_what_it_is_for(tmp_path, fitted, monkeypatch):
    evaluated, evaluate_kept = [], ex3_convnet.evaluate_kept
    monkeypatch.setattr(ex3_convnet, 'evaluate_kept', lambda *a: evaluated.append(a) or evaluate_kept(*a))
    assert main([*options_of(UNUSUAL), '--results', str(tmp_path)]) == 0
    (call,) = fitted
    for key in ('num_epochs', 'precision', 'patience', 'label_smoothing', 'ema_decay', 'freeze_at'):
        assert call[key] == UNUSUAL[key], key
    assert call['seed'] == 5 and call['folder'] == tmp_path / 'ex3_convnet' / 'Q1' / 'ConvNet' / 'seed5'
    assert [layer.out_channels for layer in call['model'].modules() if isinstance(layer, nn.Conv2d)] == [3, 4, 5, 6, 7]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in call['model'].modules()) == 5
    assert [layer.p for layer in call['model'].modules() if isinstance(layer, nn.Dropout)] == [0.25] * 4
    assert call['batches'].augmentations == (
        Flip(0.3), Crop(3, 'reflect'), Affine(7.0, 0.05, 0.15, 4.0), ColorJitter(0.11, 0.12, 0.13, 0.04),
        Greyscale(0.17), Cutout(6))
    assert (call['batches'].batch_size, call['batches'].shuffle, len(call['batches'].split)) == (15, True, 70)
    assert len(call['val'].split) == 30 and not call['val'].shuffle
    group, = call['optimizer'].param_groups
    assert isinstance(call['optimizer'], torch.optim.SGD) and (group['weight_decay'], group['momentum']) == (0.02, 0.9)
    assert [call['schedule'](x) for x in (0.6, 1.2, 2.1, 3)] == pytest.approx([0.0035, 0.007, 0.0035, 0])
    model, _, folder, evaluation, precision, _ = evaluated[0]
    assert (model, folder, precision) == (call['model'], call['folder'], 'bf16')
    assert {part: len(batches.split) for part, batches in evaluation.items()} == {'train': 70, 'val': 30, 'test': 1000}
    images = evaluation['train'].split.images[:1]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((.4914, .4822, .4465), (.2470, .2435, .2616)))
    for batches in (call['val'], *evaluation.values()):  # never augmented, normalised as the training images
        assert batches.augmentations == ()
        torch.testing.assert_close(batches.inputs(images), (images / 255 - mean) / std)
    seed_everything(5)
    unwhitened = make_model(Config(hidden_size=(3, 4, 5, 6, 7), norm_layer='BN', dropout=0.25), torch.device('cpu'))
    assert not torch.equal(call['first'], unwhitened.features[0].weight)


@pytest.mark.parametrize('options, rates', [
    ([], [2e-3, 2e-3 * 0.5, 2e-3 * 0.25]), (['--learning-rate-decay', '1'], [2e-3] * 3)])
def test_the_decay_and_the_seed_arrive(tmp_path, fitted, options, rates):
    assert main([*TINY, '--learning-rate-decay', '0.5', *options, '--results', str(tmp_path)]) == 0
    assert [fitted[0]['schedule'](epoch) for epoch in range(3)] == pytest.approx(rates)
    seed_everything(0)
    expected = make_model(Config(hidden_size=(4,) * 5), torch.device('cpu'))
    assert torch.equal(fitted[0]['first'], expected.features[0].weight)


def test_defaults_are_the_handouts():
    c = Config()
    assert (c.input_size, c.num_classes, c.hidden_size) == (3, 10, (128, 512, 512, 512, 512))
    assert (c.num_epochs, c.batch_size, c.learning_rate, c.learning_rate_decay, c.reg) == (20, 200, 2e-3, 0.95, 0.001)
    assert (c.num_training, c.num_validation, c.norm_layer, c.dropout) == (49000, 1000, None, 0.0)
    assert (c.optimizer, c.schedule, c.normalisation, c.whiten, c.freeze_at) == ('Adam', 'decay', 'half', False, 1.0)
    assert augmentations(c) == []


# --- every row is what its name says ------------------------------------------------------------------------


def test_q1_and_q2_compare_networks_with_the_same_hyper_parameters():
    assert rows('Q1') == {'ConvNet': Config()}
    assert rows('Q2a') == {'plain': Config(), 'batch norm': Config(norm_layer='BN')}
    for run, norm_layer in (('plain', None), ('batch norm', 'BN')):
        assert rows('Q2b')[run] == Config(norm_layer=norm_layer, num_epochs=50, seeds=(0, 1, 2), patience=None)


@pytest.mark.parametrize('run, kinds', [
    ('none', []), ('flip', [Flip]), ('crop', [Crop]), ('flip + crop', [Flip, Crop]), ('affine', [Affine]),
    ('colour jitter', [ColorJitter]), ('greyscale', [Greyscale]),
    ('all', [Flip, Crop, Affine, ColorJitter, Greyscale])])
def test_q3a_augments_as_the_rows_say(run, kinds):
    row = rows('Q3a')[run]
    assert [type(augmentation) for augmentation in augmentations(row)] == kinds
    assert 20 <= row.num_epochs <= 30 and row.norm_layer == 'BN' and row.dropout == 0


def test_strengths_are_those_of_their_names():
    for run, row in rows('Q3a-strength').items():
        name, _, strength = run.rpartition(' ')
        expected = {'': [], 'crop_padding': [Crop(row.crop_padding)], 'degrees': [Affine(degrees=row.degrees)],
                    'translate': [Affine(translate=row.translate)],
                    'jitter': [ColorJitter(row.brightness, row.contrast, row.saturation, row.hue)]}[name]
        value = row.brightness if name == 'jitter' else getattr(row, name) if name else 'none'
        assert augmentations(row) == expected and str(value) == strength
        assert row.brightness == row.contrast == row.saturation == pytest.approx(6 * row.hue)


def test_dropout_covers_all_probabilities_without_augmentation():
    found = rows('Q3b')
    assert [row.dropout for row in found.values()] == pytest.approx([0, .1, .2, .3, .4, .5, .6, .7, .8, .9])
    assert [f'p = {row.dropout}' for row in found.values()] == list(found)
    assert all(augmentations(row) == [] and 20 <= row.num_epochs <= 30 for row in found.values())


def test_fast_and_best_keep_the_architecture_and_ingredients_leave_out_one_thing_each():
    for name, epochs in (('fast', 8), ('best', 30)):
        row = rows(name)[name]
        assert row.num_epochs == epochs and row.optimizer == 'Muon'
        assert PrintModelSize(make_model(row, torch.device('meta')), disp=False) == 7_682_826
    best = QUESTIONS['best'].rows['best']
    changed = {run: {key for key in row if row[key] != best.get(key)}
               for run, row in QUESTIONS['ingredients'].rows.items()}
    assert changed.pop('SGD') == {'optimizer', 'reg'} and changed.pop('all') == set()
    assert changed.pop('Adam with decay') == {'optimizer', 'schedule', 'learning_rate', 'reg'}
    assert all(len(keys) == 1 for keys in changed.values())
    assert len({str(keys) for keys in changed.values()}) == len(changed)


# --- pictures and whole experiments -------------------------------------------------------------------------

PICTURES = {'Q1': {'filters', 'mistakes', 'confusion'}, 'Q2a': {'mistakes', 'confusion'}, 'Q2b': {'best_and_latest'},
            'Q3a': {'accuracy', 'gallery'}, 'Q3a-strength': {'accuracy'}, 'Q3b': {'dropout'},
            'fast': {'mistakes', 'confusion'}, 'best': {'mistakes', 'confusion'}, 'ingredients': {'accuracy'}}


@pytest.fixture
def drawn(monkeypatch):
    """What the script's and the shared pictures are given: name of the plot -> its arguments."""
    given = {}

    def spy_on(module, name):
        plot = getattr(module, name)

        def spy(*arguments, **options):
            given[name] = arguments, options
            return plot(*arguments, **options)
        monkeypatch.setattr(module, name, spy)
    for module in (ex3_convnet, answers):
        for name in dir(module):
            if name.startswith('plot_') or name == 'VisualizeFilter':
                spy_on(module, name)
    return given


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_experiment_runs_to_its_pictures_which_show_its_results(name, tmp_path, capsys, drawn):
    assert main([*TINY, '--experiment', name, '--seeds', '0', '--results', str(tmp_path)]) == 0
    folder = tmp_path / 'ex3_convnet' / name
    assert {path.stem for path in folder.glob('*.png')} == PICTURES[name] | {'curves'}
    results = {result.run: result for result in read_csv(Result, folder / 'summary.csv')}
    assert list(results) == list(QUESTIONS[name].rows)

    def percent(run, column):
        return pytest.approx(100 * getattr(results[run], column))
    if name == 'Q2b':
        for run, sets in drawn['plot_best_and_latest'][0][0].items():
            for label, part in (('training', 'train'), ('validation', 'val'), ('test', 'test')):
                best, latest = sets[label]
                assert best.mean == percent(run, f'best_{part}_accuracy')
                assert latest.mean == percent(run, f'last_{part}_accuracy')
    if name in ('Q3a', 'ingredients'):
        for run, sets in drawn['plot_accuracies'][0][0].items():
            assert sets['training'].mean == percent(run, 'best_train_accuracy')
            assert sets['validation'].mean == percent(run, 'best_val_accuracy')
    if name == 'Q3a':
        shown = drawn['plot_gallery'][0][0]
        assert [run for run, images in shown.items() if torch.equal(images, shown['none'])] == ['none']
    if name == 'Q3b':
        (x, series, *_), options = drawn['plot_against']
        assert x == pytest.approx([p / 10 for p in range(10)]) and options['chance'] == 10
        assert [value.mean for value in series['validation']] == [percent(run, 'best_val_accuracy') for run in results]
    if name == 'Q3a-strength':
        panels, level = drawn['plot_strengths'][0][:2]
        assert panels['degrees'][0] == [5, 15, 30] and len(panels) == 4
        assert panels['degrees'][1]['training'][1].mean == percent('degrees 15', 'best_train_accuracy')
        assert level['validation'].mean == percent('none', 'best_val_accuracy')
    if name == 'Q1':
        (after, _), options = drawn['VisualizeFilter']
        seed_everything(0)
        before = make_model(Config(hidden_size=(4,) * 5), torch.device('cpu')).features[0].weight
        assert options['change'] and torch.equal(options['before'].features[0].weight, before)
        best = torch.load(folder / 'ConvNet' / 'seed0' / 'best.pt')['features.0.weight']
        assert torch.equal(after.features[0].weight, best) and not torch.equal(best, before)
        images, labels, logits, classes, *_ = drawn['plot_mistakes'][0]
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        assert accuracy == pytest.approx(results['ConvNet'].best_test_accuracy) and len(images) == 1000
        assert 'star' in classes and np.array_equal(drawn['plot_confusion'][0][1], logits)


def test_what_the_command_line_changed_stands_in_the_title(tmp_path):
    assert main([*TINY, '--experiment', 'Q2a', '--results', str(tmp_path)]) == 0
    title = (tmp_path / 'ex3_convnet' / 'Q2a' / 'summary.md').read_text().split('|')[0]
    assert 'built-in shapes (not CIFAR-10): 60 training, 20 validation, 1,000 test images' in title
    assert 'hidden_size=(4, 4, 4, 4, 4), num_epochs=1' in title
    assert 'norm_layer' not in title  # that is the row's own


def test_the_model_size_is_printed_once_per_size(tmp_path, capsys):
    assert main([*TINY, '--experiment', 'Q3b', '--results', str(tmp_path)]) == 0
    assert capsys.readouterr().out.count('\ntotal ') == 1


def test_importing_the_scripts_starts_nothing_and_needs_no_pyplot():
    code = ('import ex3_convnet, ex3_pretrained, sys, torch; '
            'assert "matplotlib.pyplot" not in sys.modules and not torch.cuda.is_initialized()')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120,
                          cwd=Path(ex3_convnet.__file__).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert ex3_convnet.ConvNet is ConvNet
