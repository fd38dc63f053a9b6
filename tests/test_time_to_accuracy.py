"""Minutes until an accuracy: the arithmetic by hand, the published table, and a tiny run of two recipes."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ex3_convnet
import training
from benchmarks import time_to_accuracy as bench
from datasets import cifar10
from lab.constants import Question
from lab.history import History

BENCHMARKS = Path(bench.__file__).parent


def test_minutes_are_those_at_the_end_of_the_first_epoch_that_reaches_a_level():
    curve = [(2.0, 70.0), (4.0, 81.0), (6.0, 79.0), (8.0, 86.0), (10.0, 84.0)]
    assert [bench.minutes_until(level, curve) for level in (70, 75, 80, 85, 88)] == [2, 4, 4, 8, None]
    assert bench.cumulated([60, 120, 30]) == [1, 3, 3.5]
    cells = [cell.strip() for cell in bench.table({'fast': curve}).splitlines()[2].strip('|').split('|')]
    assert cells == ['fast', '4', '4', '8', '–', '84.0 % after 10']
    soon = [(minutes / 60, accuracy) for minutes, accuracy in curve]  # as many seconds: a GPU
    assert bench.table({'fast': soon}) == bench.table({'fast': curve}).replace('minutes', 'seconds')
    assert bench.table({'fast': soon, 'Q1': curve}).startswith('| minutes')


def test_every_recipe_is_drawn_and_named(tmp_path, drawn):
    names = [*ex3_convnet.QUESTIONS, 'usual script']
    bench.plot({name: [(1.0, 70.0)] for name in names}, tmp_path / 'minutes.png', 'fast')
    (legend,) = [panel.get_legend() for panel in drawn[0].axes]
    assert [text.get_text() for text in legend.get_texts()] == names


@pytest.mark.parametrize('page', ['README.md', 'benchmarks/README.md'])
def test_the_published_minutes_are_what_the_curves_give(page):
    record = json.loads((BENCHMARKS / 'results' / 'time_to_accuracy' / 'curves.json').read_text())
    text = (BENCHMARKS.parent / page).read_text(encoding='utf-8')
    cells, shown = (re.sub(r'[\s|:-]+', ' ', words) for words in (bench.table(record['curves']), text))
    assert cells in shown


def test_recipes_are_timed_on_test_images_and_the_usual_script_by_the_ratio_of_speeds(
        tmp_path, monkeypatch, capsys, cheap, drawn):
    for name in ('fast', 'Q1'):
        (row,) = ex3_convnet.QUESTIONS[name].rows.values()
        tiny = Question('?', {name: row | {'hidden_size': (4, 4), 'num_epochs': 2}})
        monkeypatch.setitem(ex3_convnet.QUESTIONS, name, tiny)
    measured, out = tmp_path / 'speed.json', tmp_path / 'out'
    ways = {'usual script': {'images_per_second': [10, 20, 10]}, 'this project': {'images_per_second': [20, 50, 40]}}
    measured.write_text(json.dumps({'precision': 'fp32', 'cases': {'ConvNet': {'ways': ways}}}))
    evaluated, trained, fit = [], [], ex3_convnet.fit
    monkeypatch.setattr(ex3_convnet, 'fit', lambda *a, **k: evaluated.append(a[2].split.images) or trained.append(
        (k['num_epochs'], k['precision'], k['seed'])) or fit(*a, **k))
    arguments = ['--data', 'shapes', '--speed', str(measured), '--device', 'cpu', '--results', str(out)]
    for faster in ('fp32', 'bf16'):  # the precision of what was begun stays
        monkeypatch.setattr(bench, 'pick_precision', lambda *_, faster=faster: (faster, ''))
        assert bench.main(arguments) == 0
    assert trained == [(2, 'fp32', 0), (2, 'fp32', 0)]  # of fast and of Q1: the second time nothing is trained
    test = cifar10.load('shapes', tmp_path, 49000, 1000).test
    assert all(torch.equal(images, test.images) for images in evaluated)

    history = History.read(out / 'Q1' / 'seed0' / 'history.csv')
    accuracies = [100 * accuracy for accuracy in history['val_accuracy']]
    minutes = [2.5 * m for m in bench.cumulated(history['seconds'])]  # the median of 2, 2.5 and 4
    curves = {name: list(map(tuple, curve))
              for name, curve in json.loads((out / 'curves.json').read_text())['curves'].items()}
    assert list(curves) == ['this project, fast', 'this project, Q1', 'usual script']
    assert curves['this project, Q1'] == list(zip(bench.cumulated(history['seconds']), accuracies, strict=True))
    assert curves['usual script'] == [pytest.approx(point) for point in zip(minutes, accuracies, strict=True)]
    lines = {line.get_label(): line.get_xydata() for line in drawn[-1].axes[0].lines}
    assert drawn[-1].axes[0].get_xlabel() == 'seconds of training'
    for name, curve in curves.items():
        assert lines[name] == pytest.approx(np.array(curve) * [60, 1])
    printed = capsys.readouterr().out
    assert 'The usual script was not trained' in printed and '2.50 times' in printed and 'one seed' in printed
    assert printed.count(', fp32') == 2 and ', bf16' not in printed
    assert 'data: built-in shapes (not CIFAR-10), 10 classes' in printed

    assert bench.main([*arguments, '--recipes', 'fast', '--speed', 'nowhere.json']) == 0  # which only Q1 needs
    assert 'usual script' not in capsys.readouterr().out and len(trained) == 2
    other = ['--recipes', 'Q1', '--num-epochs', '1']  # constants: another folder
    assert bench.main([*arguments, *other]) == 2
    assert 'was measured in fp32, not in bf16' in capsys.readouterr().err and len(trained) == 2
    assert bench.main([*arguments, *other, '--precision', 'fp32']) == 0
    assert trained[2:] == [(1, 'fp32', 0)] and (tmp_path / 'out-2' / 'Q1' / 'seed0').exists()
    assert 'num_epochs=1' in capsys.readouterr().out


def test_a_recipe_that_diverges_is_no_table(tmp_path, monkeypatch, capsys, cheap):
    tiny = Question('?', {'fast': {'hidden_size': (4, 4), 'num_epochs': 2}})
    monkeypatch.setitem(ex3_convnet.QUESTIONS, 'fast', tiny)
    calls = iter(['', 'step 3'])
    monkeypatch.setattr(training, 'first_not_finite', lambda *_: next(calls))
    arguments = ['--data', 'shapes', '--recipes', 'fast', '--device', 'cpu', '--results', str(tmp_path)]
    for _ in range(2):
        assert bench.main(arguments) == 2
        output = capsys.readouterr()
        assert 'fast: diverged in epoch 2, step 3' in output.err and '| minutes' not in output.out


@pytest.mark.parametrize('wrong, message', [
    (['--recipes', 'faster'], 'got faster'), (['--recipes'], 'got none'), (['--num-epochs', '0'], 'at least 1, got 0'),
    (['--speed', 'nowhere.json'], 'nowhere.json does not hold the speed')])
def test_what_is_not_there_is_one_sentence(wrong, message, capsys):
    assert bench.main(['--device', 'cpu', *wrong]) == 2
    assert message in capsys.readouterr().err
