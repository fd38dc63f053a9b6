"""The benchmark's arithmetic against numbers worked out by hand, its two ways against each other, and a tiny run."""
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import ex3_convnet
from benchmarks import tables, usual_script
from benchmarks import training_speed as speed
from datasets.batches import Batches
from ex3_pretrained import VggModel
from lab.history import Epoch, History
from models.convnet import ConvNet

PUBLISHED = json.loads((Path(speed.__file__).parent / 'results' / 'AMD-EPYC-2-threads.json').read_text())
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


def test_the_published_page_is_what_its_numbers_give():
    readme = Path(speed.__file__).with_name('README.md').read_text(encoding='utf-8')
    assert ' '.join(tables.table(PUBLISHED).split()) in ' '.join(readme.split())


def test_bars_are_medians_their_whiskers_reach_from_the_smallest_to_the_largest(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, file, **_: figures.append(figure) or file.write(b'a picture'))
    tables.plot(PUBLISHED, tmp_path / 'speed.png')
    for panel, (name, case) in zip(figures[0].axes, PUBLISHED['cases'].items(), strict=True):
        speeds = [case['ways'][way]['images_per_second'] for way in tables.WAYS]
        assert panel.get_title(loc='left').startswith(name)
        assert [label.get_text() for label in panel.get_yticklabels()] == list(tables.WAYS)
        assert [bar.get_width() for bar in panel.patches] == [median(values) for values in speeds]
        whiskers = [[x for x, _ in segment] for segment in panel.collections[0].get_segments()]
        assert whiskers == [pytest.approx([min(values), max(values)]) for values in speeds]
        ratio = median(tables.ratios(speeds[2], speeds[0]))
        assert panel.texts[2].get_text().endswith(f'({ratio:.1f}x)')


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


def test_memory_is_the_growth_while_a_way_is_made_and_trains_twice(tmp_path, monkeypatch):
    peaks, runs = iter([100, 350]), []  # before the way is made, after it has trained
    monkeypatch.setattr(speed, 'peak_resident_memory', lambda: next(peaks))
    monkeypatch.setattr(speed, 'project', lambda *_: speed.Way(lambda: runs.append(1) or 1.0, 2.0))
    options = speed.Options(steps=1, batch_size=4)
    assert (speed.growth('ConvNet', speed.PROJECT, options, 'fp32', tmp_path), runs) == (250, [1, 1])


def test_the_peak_of_this_process_is_read_in_bytes():
    if not speed.STATUS.exists():
        pytest.skip('the peak memory of a process is read from /proc, which only Linux has')
    assert 10e6 < speed.peak_resident_memory() < 1e12


def test_the_project_is_timed_by_its_own_history_and_trains_as_the_constants_say(tmp_path, monkeypatch):
    called = []
    epochs = [Epoch(1, 0.1, 1.0, 0.5, 1.0, 0.5, 2.0, 77.0)]
    monkeypatch.setattr(speed, 'fit', lambda *a, **k: called.append((a, k)) or History(epochs))
    config = speed.configure(speed.CASES['ConvNet'], speed.Options(batch_size=4), load(), 'bf16', tmp_path)
    assert speed.project(ex3_convnet, config, load(), CPU).run() == 77.0
    (_, batches, _, optimizer, schedule, _), options = called[0]
    assert (batches.batch_size, options['num_epochs'], options['precision']) == (4, 1, 'bf16')
    assert (schedule(0), schedule(1)) == (config.learning_rate, config.learning_rate * config.learning_rate_decay)
    assert optimizer.param_groups[0]['weight_decay'] == config.reg


# --- the whole ----------------------------------------------------------------------------------------------


def test_a_tiny_run_prints_a_table_and_writes_numbers_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))
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


def test_the_usual_script_trains_with_the_defaults_of_torch_and_counts_its_images_per_second(monkeypatch, tmp_path):
    monkeypatch.setattr(usual_script, 'time', Clock())
    models, states, losses, forward, item = [], [], [], ConvNet.forward, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, 'item', lambda self: (self.requires_grad and losses.append(self)) or item(self))
    monkeypatch.setattr(ConvNet, 'forward', lambda self, x: models.append(self) or states.append(
        (self.training, torch.backends.cudnn.benchmark)) or forward(self, x))
    config = speed.configure(speed.CASES['ConvNet'], speed.Options(batch_size=4), load(steps=3), 'fp32', tmp_path)
    way = usual_script.usual(ex3_convnet, config, load(steps=3), CPU)
    before = models[0].classifier.weight.clone()
    del states[:]  # of counting the FLOP
    torch.backends.cudnn.benchmark = True
    assert way.run() == 12 / 2.0
    assert states == [(True, False)] * 3 and len(losses) == 3  # the loss is read at every step
    assert not torch.equal(models[0].classifier.weight, before)


def test_the_usual_script_shuffles_and_its_workers_stay(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(usual_script, 'DataLoader', lambda _images, size, **options: made.append((size, options)))
    config = speed.configure(speed.CASES['ConvNet'], speed.Options(batch_size=4), load(), 'fp32', tmp_path)
    for workers in (0, 3):
        usual_script.usual(ex3_convnet, config, load(), CPU, workers)
    assert made == [(4, dict(shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0))
                    for workers in (0, 3)]


def test_the_fastest_workers_are_those_of_the_second_run():
    speeds = {2: iter([9.0, 1.0]), 4: iter([1.0, 3.0]), 8: iter([1.0, 2.0])}  # the first run starts them
    count, way = speed.fastest_workers(lambda count: speed.Way(lambda: next(speeds[count]), count))
    assert (count, way.flops) == (4, 4)


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
    monkeypatch.setattr(speed, 'STATUS', tmp_path)
    monkeypatch.setattr(speed, 'ProcessPoolExecutor', lambda *_: nullcontext(SimpleNamespace(
        submit=lambda growth, name, way, *_: SimpleNamespace(result=lambda: f'peak of {way}'))))
    case = speed.measure('ConvNet', speed.Options(repetitions=2), load(), CPU, 'bf16', tmp_path)
    assert runs == ['usual', 'project'] + ['usual', 'workers', 'project'] * 2
    assert [(way['images_per_second'], way['precision'], way['peak_memory'], way['workers'])
            for way in case['ways'].values()] == [
        ([1.0, 1.0], 'fp32', 'peak of usual script', 0), ([1.0, 1.0], 'fp32', None, 2),
        ([1.0, 1.0], 'bf16', 'peak of this project', 0)]
    assert case['ceiling'] == dict(fp32=[1.0, 1.0], bf16=[2.0, 2.0], copy=[3.0, 3.0])
