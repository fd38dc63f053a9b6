"""Minutes until a test accuracy: the arithmetic by hand, and a tiny run."""
import json

import pytest
from matplotlib.figure import Figure

import ex3_convnet
from benchmarks import time_to_accuracy as bench
from lab.history import History

CURVE = [(2.0, 70.0), (4.0, 81.0), (6.0, 79.0), (8.0, 86.0)]


def test_minutes_are_those_at_the_end_of_the_first_epoch_that_reaches_a_level():
    assert [bench.minutes_until(level, CURVE) for level in (70, 75, 80, 85, 88)] == [2, 4, 4, 8, None]
    assert bench.cumulated([60, 120, 30]) == [1, 3, 3.5]
    cells = [cell.strip() for cell in bench.table({'fast': CURVE}).splitlines()[2].strip('|').split('|')]
    assert cells == ['fast', '4', '4', '8', '–', '86.0 % after 8']


def test_a_tiny_run_measures_on_the_test_images_and_times_the_usual_script_by_its_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))
    speed = tmp_path / 'speed.json'
    speed.write_text(json.dumps({'cases': {'ConvNet': {'ways': {'usual script': {'images_per_second': [9, 10, 30]}}}}}))
    seen, fit = [], ex3_convnet.fit
    monkeypatch.setattr(ex3_convnet, 'fit', lambda *a, **k: seen.append(a[2]) or fit(*a, **k))
    arguments = ['--data', 'shapes', '--num-epochs', '2', '--hidden-size', '4', '4', '--speed', str(speed), '--device',
                 'cpu', '--precision', 'fp32', '--results', str(tmp_path / 'out')]
    for _ in range(2):  # the second time nothing is trained
        assert bench.main(arguments) == 0
    assert [len(val.split) for val in seen] == [1000, 1000]  # of fast and of Q1: the test images
    curves = json.loads((tmp_path / 'out' / 'curves.json').read_text())['curves']
    assert list(curves) == ['this project, fast', 'this project, Q1', 'usual script']
    history = History.read(tmp_path / 'out' / 'Q1' / 'seed0' / 'history.csv')
    assert [accuracy for _, accuracy in curves['usual script']] == [100 * a for a in history['val_accuracy']]
    assert [minutes for minutes, _ in curves['usual script']] == pytest.approx([160 / 60, 320 / 60])  # 1,600 images
    assert [minutes for minutes, _ in curves['this project, Q1']] == pytest.approx(bench.cumulated(history['seconds']))
