"""Minutes until a test accuracy: the arithmetic by hand, and a tiny run."""
import json

import pytest
import torch
from matplotlib.figure import Figure

import ex3_convnet
from benchmarks import time_to_accuracy as bench
from datasets import cifar10
from lab.constants import Question
from lab.history import History

CURVE = [(2.0, 70.0), (4.0, 81.0), (6.0, 79.0), (8.0, 86.0)]


def test_minutes_are_those_at_the_end_of_the_first_epoch_that_reaches_a_level():
    assert [bench.minutes_until(level, CURVE) for level in (70, 75, 80, 85, 88)] == [2, 4, 4, 8, None]
    assert bench.cumulated([60, 120, 30]) == [1, 3, 3.5]
    cells = [cell.strip() for cell in bench.table({'fast': CURVE}).splitlines()[2].strip('|').split('|')]
    assert cells == ['fast', '4', '4', '8', '–', '86.0 % after 8']


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments for tiny networks, and the evaluation sets and epochs of the runs that are trained."""
    for name in ('fast', 'Q1'):
        row, = ex3_convnet.QUESTIONS[name].rows.values()
        tiny_row = {name: {**row, 'hidden_size': (4, 4), 'num_epochs': 2}}
        monkeypatch.setitem(ex3_convnet.QUESTIONS, name, Question('?', tiny_row))
    speed = tmp_path / 'speed.json'
    speed.write_text(json.dumps({'cases': {'ConvNet': {'ways': {'usual script': {'images_per_second': [9, 10, 30]}}}}}))
    trained, fit = [], ex3_convnet.fit
    monkeypatch.setattr(ex3_convnet, 'fit',
                        lambda *a, **k: trained.append((a[2].split, k['num_epochs'])) or fit(*a, **k))
    return ['--data', 'shapes', '--speed', str(speed), '--device', 'cpu', '--results', str(tmp_path / 'out')], trained


def test_recipes_are_measured_on_the_test_images_and_the_usual_script_by_its_speed(tiny, tmp_path, monkeypatch, capsys):
    panels = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, file, **_: panels.append(figure.axes[0])
                        or file.write(b'a picture'))
    (arguments, trained), out = tiny, tmp_path / 'out'
    arguments += ['--precision', 'fp32']
    assert bench.main(arguments) == bench.main(arguments) == 0  # the second time nothing is trained
    test = cifar10.load('shapes', tmp_path, 49000, 1000).test
    assert [num_epochs for _, num_epochs in trained] == [2, 2]  # of fast and of Q1
    assert all(torch.equal(split.images, test.images) for split, _ in trained)
    written = json.loads((out / 'curves.json').read_text())['curves']
    curves = {name: list(map(tuple, curve)) for name, curve in written.items()}
    assert list(curves) == ['this project, fast', 'this project, Q1', 'usual script']
    history = History.read(out / 'Q1' / 'seed0' / 'history.csv')
    assert [accuracy for _, accuracy in curves['usual script']] == [100 * a for a in history['val_accuracy']]
    assert [minutes for minutes, _ in curves['usual script']] == pytest.approx([160 / 60, 320 / 60])  # 1,600 images
    assert [minutes for minutes, _ in curves['this project, Q1']] == pytest.approx(bench.cumulated(history['seconds']))
    printed = capsys.readouterr().out
    assert 'The usual script was not trained' in printed and 'at 10 images/s' in printed and 'one seed' in printed
    lines = {line.get_label(): line for line in panels[-1].lines if line.get_label() in curves}
    assert {name: list(map(tuple, line.get_xydata())) for name, line in lines.items()} == curves

    assert bench.main([*arguments, '--recipes', 'Q1', '--num-epochs', '1']) == 0  # other constants: another folder
    assert trained[-1][1] == 1 and (tmp_path / 'out-2' / 'curves.json').exists()
    assert 'num_epochs=1' in capsys.readouterr().out


def test_the_precision_of_what_was_begun_stays(tiny, tmp_path, monkeypatch):
    arguments, trained = tiny
    monkeypatch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))
    for faster in ('fp32', 'bf16'):
        monkeypatch.setattr(bench, 'pick_precision', lambda *_, faster=faster: (faster, ''))
        assert bench.main([*arguments, '--recipes', 'fast']) == 0
    assert len(trained) == 1 and not (tmp_path / 'out-2').exists()


@pytest.mark.parametrize('wrong, message', [
    (['--recipes', 'faster'], "got 'faster'"), (['--speed', 'nowhere.json'], 'nowhere.json does not hold the speed')])
def test_what_is_not_there_is_one_sentence(wrong, message, tiny, capsys):
    assert bench.main([*tiny[0], *wrong]) == 2
    assert message in capsys.readouterr().err
