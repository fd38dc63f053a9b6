"""The benchmark's arithmetic against numbers worked out by hand, its two ways against each other, and a tiny run."""
import json

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import ex3_convnet
from benchmarks import tables, usual_script
from benchmarks import training_speed as speed
from datasets.batches import Batches
from ex3_pretrained import VggModel
from models.convnet import ConvNet

CPU = torch.device('cpu')


def load(steps=1, batch_size=4, data=None):
    return speed.load_data(speed.Options(data=data, batch_size=batch_size), steps)


# --- arithmetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('norm_layer', [None, 'BN'])
def test_flops_of_the_convnet_are_those_worked_out_by_hand(norm_layer):
    first = 32 * 32 * 27 * 128  # multiply-adds: pixels x (3x3 pixels of 3 channels) x filters
    forward = (first + 16 * 16 * (9 * 128) * 512 + (8 * 8 + 4 * 4 + 2 * 2) * (9 * 512) * 512 + 512 * 10)
    assert forward == pytest.approx(353e6, rel=0.01)
    by_hand = 2 * (3 * forward - first)  # backward: gradients of weights and of inputs, but not of the images
    model = ConvNet(3, [128, 512, 512, 512, 512], 10, norm_layer)
    assert speed.training_flops(model, torch.randn(2, 3, 32, 32)) == pytest.approx(by_hand, rel=0.01)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flops_of_the_frozen_vgg_head_are_those_worked_out_by_hand():
    head = VggModel(10, fine_tune=True, pretrained=False)
    first, second = 512 * 256, 256 * 10
    assert speed.training_flops(head, torch.randn(2, 512)) == 2 * (3 * (first + second) - first)


def test_a_spread_is_the_median_the_smallest_and_the_largest():
    assert tables.spread([3.0, 1.0, 2.0], '.1f') == '2.0 (1.0–3.0)'
    assert tables.spread([3.0], '.1f') == '3.0'


def test_ratios_and_utilisation_are_taken_within_each_repetition():
    assert tables.ratios([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == [2.0, 3.0, 4.0]
    case = {'ways': {'a': dict(images_per_second=[2.0, 30.0, 8.0], flops_per_image=5, precision='bf16')},
            'ceiling': {'fp32': [1.0, 1.0, 1.0], 'bf16': [100.0, 1000.0, 200.0]}}
    assert tables.utilisation(case, 'a') == pytest.approx(0.15)  # of 0.10, 0.15 and 0.20


# --- the two ways -------------------------------------------------------------------------------------------


def test_the_usual_script_sees_the_same_numbers_as_the_project():
    data = load()
    transform = usual_script.usual_transform(ex3_convnet.Config(), (0.5,) * 3, (0.5,) * 3)
    images = usual_script.PilImages(data.train, transform)
    usual, labels = zip(*(images[i] for i in range(len(images))), strict=True)
    expected, expected_labels = next(iter(Batches(data.train, 4)))
    torch.testing.assert_close(torch.stack(usual), expected)
    assert list(labels) == expected_labels.tolist()


@pytest.mark.parametrize('name, kinds', [
    ('ConvNet, batch norm', ['ToTensor', 'Normalize']),
    ('ConvNet, batch norm, flip + crop + jitter', ['RandomCrop', 'RandomHorizontalFlip', 'ColorJitter', 'ToTensor',
                                                   'Normalize']),
    ('VGG11_bn, frozen', ['RandomHorizontalFlip', 'ToTensor', 'Normalize'])])
def test_the_usual_script_augments_as_the_constants_say(name, kinds, tmp_path):
    config = speed.configure(speed.CASES[name], speed.Options(), load(), 'fp32', tmp_path)
    transform = usual_script.usual_transform(config, (0.5,) * 3, (0.5,) * 3)
    assert [type(step).__name__ for step in transform.transforms] == kinds


def test_the_usual_script_is_contiguous_and_freezes_what_the_project_freezes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(usual_script, 'training_flops', lambda model, _: made.append(model) or 0)
    for name in ('ConvNet', 'VGG11_bn, frozen'):
        case = speed.CASES[name]
        speed.usual(case.script, speed.configure(case, speed.Options(), load(), 'fp32', tmp_path), load(), CPU)
    assert all(layer.weight.is_contiguous() for model in made for layer in model.modules()
               if isinstance(layer, nn.Conv2d))
    assert [next(model.features.parameters()).requires_grad for model in made] == [True, False]


def test_a_repetition_takes_as_many_images_as_its_steps():
    assert len(load(steps=3, batch_size=4).train) == 12
    assert len(load(steps=3, batch_size=4, data='shapes').train) == 12


def test_memory_is_counted_from_before_a_way_is_made(tmp_path):
    if not speed.STATUS.exists():
        pytest.skip('the peak memory of a process is read from /proc, which only Linux has')
    peak = speed.peak_resident_memory()
    assert 10e6 < peak < 1e12
    options = speed.Options(steps=1, batch_size=4)
    assert 0 <= speed.growth('ConvNet', speed.PROJECT, options, 'fp32', tmp_path) < 4e9
    assert speed.peak_resident_memory() >= peak


# --- the whole ----------------------------------------------------------------------------------------------


def test_a_tiny_run_prints_a_table_and_writes_numbers_and_a_plot(tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, file, **_: figures.append(figure) or file.write(b'a picture'))
    monkeypatch.setattr(speed, 'WORKERS', (1,))
    monkeypatch.setattr(speed, 'seconds_per_call', lambda *_: 1.0)
    narrow = speed.Case(ex3_convnet, dict(norm_layer='BN', hidden_size=(8, 8)))
    monkeypatch.setitem(speed.CASES, 'ConvNet, batch norm', narrow)
    cases = ['ConvNet, batch norm', 'VGG11_bn, frozen']
    assert speed.main(['--cases', *cases, '--steps', '1', '--repetitions', '1', '--batch-size', '4', '--no-memory',
                       '--device', 'cpu', '--precision', 'fp32', '--results', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    path, = tmp_path.glob('*.json')
    record = json.loads(path.read_text())
    assert list(record['cases']) == cases
    for case in record['cases'].values():
        assert list(case['ways']) == list(speed.WAYS)
        for way in case['ways'].values():
            assert len(way['images_per_second']) == 1 and way['images_per_second'][0] > 0 < way['flops_per_image']
        assert all(value > 0 for values in case['ceiling'].values() for value in values)
    assert record['cases']['VGG11_bn, frozen']['features']['images'] == 2 * 4
    assert record['cases']['ConvNet, batch norm']['features'] is None
    assert path.with_suffix('.png').read_bytes() == b'a picture'
    for panel, case in zip(figures[-1].axes, record['cases'].values(), strict=True):
        assert [label.get_text() for label in panel.get_yticklabels()] == list(speed.WAYS)
        assert [bar.get_width() for bar in panel.patches] == [
            way['images_per_second'][0] for way in case['ways'].values()]

    assert speed.main(['--table', str(path)]) == 0
    table = capsys.readouterr().out.strip()
    assert printed.startswith(table) and str(path) in printed
    assert all(f'| {name} ' in table for name in cases)


def test_an_unknown_case_is_one_message(capsys):
    assert speed.main(['--cases', 'ResNet']) == 2
    assert "'ResNet'" in capsys.readouterr().err


# --- the clock ----------------------------------------------------------------------------------------------


class Clock:
    """Every look at it is two seconds after the one before."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 2.0
        return self.now


def test_the_usual_script_counts_its_images_per_second_in_training_mode(monkeypatch, tmp_path):
    monkeypatch.setattr(usual_script, 'time', Clock())
    modes, forward = [], ConvNet.forward
    monkeypatch.setattr(ConvNet, 'forward', lambda self, x: modes.append(self.training) or forward(self, x))
    config = speed.configure(speed.CASES['ConvNet'], speed.Options(batch_size=4), load(steps=3), 'fp32', tmp_path)
    way = usual_script.usual(ex3_convnet, config, load(steps=3), CPU)
    assert way.run() == 12 / 2.0
    assert modes and all(modes)


def test_seconds_per_call_are_those_of_one_call(monkeypatch):
    monkeypatch.setattr(speed, 'time', Clock())
    calls = []
    assert speed.seconds_per_call(lambda: calls.append(1), CPU, at_least=0.3) == 2.0 / 2
    assert len(calls) == 3  # one to warm up, two that are timed


def test_the_ceiling_counts_two_operations_per_multiply_add_and_bytes_read_and_written(monkeypatch):
    monkeypatch.setattr(speed, 'MATRIX_SIDE', {'cpu': 64})
    monkeypatch.setattr(speed, 'COPY_LENGTH', 1000)
    products = []
    monkeypatch.setattr(speed, 'seconds_per_call', lambda call, _: products.append(call()) or 2.0)
    assert speed.measure_ceiling(CPU) == {'fp32': 64 ** 3, 'bf16': 64 ** 3, 'copy': 4000}
    assert [(tuple(one.shape), one.dtype) for one in products] == [
        ((64, 64), torch.float32), ((64, 64), torch.bfloat16), ((1000,), torch.float32)]


def test_every_way_warms_up_before_it_is_measured_and_ways_take_turns(monkeypatch, tmp_path):
    runs = []

    def fake(name):
        def make(*_arguments, **_options):
            return speed.Way(lambda: runs.append(name) or 1.0, 2.0)
        return make
    for name in ('usual', 'project'):
        monkeypatch.setattr(speed, name, fake(name))
    monkeypatch.setattr(speed, 'fastest_workers', lambda make: (2, fake('workers')()))
    monkeypatch.setattr(speed, 'measure_ceiling', lambda _: dict(fp32=1.0, bf16=2.0, copy=3.0))
    case = speed.measure('ConvNet', speed.Options(repetitions=2, memory=False), load(), CPU, 'fp32', tmp_path)
    assert runs == ['usual', 'project'] + ['usual', 'workers', 'project'] * 2
    assert case['ways'][speed.PROJECT]['images_per_second'] == [1.0, 1.0]
