"""The ConvNet script, question by question, on the shapes."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiment import read_summary

import ex3_convnet
from datasets import cifar10
from ex3_convnet import EXPERIMENTS, Config, augmentations, build, main

TINY = ['--data', 'shapes', '--num-training', '60', '--num-validation', '20', '--batch-size', '20', '--num-epochs', '1',
        '--hidden-size', '4', '4', '4', '4', '4', '--precision', 'fp32']
PICTURES = {'Q1': {'curves', 'filters'}, 'Q2a': {'curves'}, 'Q2b': {'curves', 'best_against_latest'},
            'Q3a': {'curves', 'accuracy', 'gallery'}, 'Q3a-strength': {'curves', 'accuracy'},
            'Q3b': {'curves', 'dropout'}, 'best': {'curves'}, 'ingredients': {'curves', 'accuracy'}}


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_experiment_runs_to_its_pictures(name, tmp_path, capsys):
    assert main([*TINY, '--experiment', name, '--seeds', '0', '--results', str(tmp_path)]) == 0
    folder = tmp_path / 'ex3_convnet' / name
    assert {path.stem for path in folder.glob('*.png')} == PICTURES[name]
    printed = capsys.readouterr().out
    assert all(str(folder / f'{picture}.png') in printed for picture in PICTURES[name])
    assert [result.run for result in read_summary(folder / 'summary.csv')] == list(EXPERIMENTS[name])


def test_several_seeds_give_rows_of_their_own_and_one_line_with_a_deviation(tmp_path, capsys):
    assert main([*TINY, '--experiment', 'Q2a', '--seeds', '0', '1', '--results', str(tmp_path)]) == 0
    results = read_summary(tmp_path / 'ex3_convnet' / 'Q2a' / 'summary.csv')
    assert [(r.run, r.seed) for r in results] == [('plain', 0), ('plain', 1), ('batch norm', 0), ('batch norm', 1)]
    assert (tmp_path / 'ex3_convnet' / 'Q2a' / 'summary.md').read_text().count('±') >= 2


def test_what_the_command_line_changed_stands_in_the_title(tmp_path, capsys):
    assert main([*TINY, '--experiment', 'Q2a', '--results', str(tmp_path)]) == 0
    title = (tmp_path / 'ex3_convnet' / 'Q2a' / 'summary.md').read_text().split('\n\n')[0]
    assert 'built-in shapes (not CIFAR-10), 60 training images' in title
    assert 'hidden_size=(4, 4, 4, 4, 4), num_epochs=1' in title
    assert 'norm_layer' not in title  # that is the row's own


def test_importing_the_scripts_starts_nothing_and_needs_no_pyplot():
    code = ('import ex3_convnet, ex3_pretrained, sys, torch; '
            'assert "matplotlib.pyplot" not in sys.modules and not torch.cuda.is_initialized()')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120,
                          cwd=Path(ex3_convnet.__file__).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_help_names_every_constant(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f'--{key.replace("_", "-")}' in text for key in Config.__annotations__)


def test_defaults_are_the_handouts():
    c = Config()
    assert (c.input_size, c.num_classes, c.hidden_size) == (3, 10, (128, 512, 512, 512, 512))
    assert (c.num_epochs, c.batch_size, c.learning_rate, c.learning_rate_decay, c.reg) == (20, 200, 2e-3, 0.95, 0.001)
    assert (c.num_training, c.num_validation, c.norm_layer, c.dropout) == (49000, 1000, None, 0.0)
    assert augmentations(c) == []


def test_only_training_batches_are_augmented():
    data = cifar10.load('shapes', None, 60, 20)
    task = build(Config(hidden_size=(4,), flip=0.5, crop_padding=4, hue=0.1), data)
    assert len(task.train.augmentations) == 3
    assert all(batches.augmentations == () for batches in task.evaluation.values())
    assert {part: len(b.split) for part, b in task.evaluation.items()} == {'train': 60, 'val': 20, 'test': 1000}


def test_best_keeps_the_architecture_and_the_number_of_parameters():
    (row,) = EXPERIMENTS['best'].values()
    model = ex3_convnet.make_model(Config(**row), torch.device('cpu'))
    assert ex3_convnet.PrintModelSize(model, disp=False) == 7_682_826


def test_dropout_experiment_covers_all_probabilities_without_augmentation():
    rows = [Config(**row) for row in EXPERIMENTS['Q3b'].values()]
    assert [row.dropout for row in rows] == pytest.approx([0, .1, .2, .3, .4, .5, .6, .7, .8, .9])
    assert all(augmentations(row) == [] and row.num_epochs == 30 for row in rows)
