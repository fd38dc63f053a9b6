"""Training speed: its arithmetic against numbers worked out by hand, its two ways against each other, a tiny run."""
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ex3_convnet
from benchmarks import tables, usual_script
from benchmarks import training_speed as speed
from datasets.batches import Batches
from ex3_pretrained import IMAGENET_MEAN
from lab.history import Epoch, History
from models.convnet import ConvNet

RESULTS = Path(speed.__file__).parent / 'results'
PUBLISHED = sorted(set(RESULTS.rglob('*.json')) - set(RESULTS.rglob('curves.json')))
CPU = torch.device('cpu')


def load(steps=1, data=None):
    return speed.load_data(speed.Options(data=data, batch_size=4), steps)


def made(make, case, folder, *workers, steps=1, precision='fp32'):
    """One way to train a case, on four images a step, the ConvNet with few filters."""
    script, constants = speed.CASES[case]
    small = speed.Case(script, constants | (dict(hidden_size=(8, 8)) if script is ex3_convnet else {}))
    config = speed.configure(small, speed.Options(batch_size=4), load(steps), precision, folder)
    return make(script, config, load(steps), CPU, *workers)


@pytest.mark.parametrize('norm_layer', [None, 'BN'])
def test_flops_are_those_worked_out_by_hand(norm_layer):
    first = 32 * 32 * 27 * 128  # multiply-adds: pixels x (3x3 pixels of 3 channels) x filters
    forward = (first + 16 * 16 * (9 * 128) * 512 + (8 * 8 + 4 * 4 + 2 * 2) * (9 * 512) * 512 + 512 * 10)
    by_hand = 2 * (3 * forward - first)  # backward: gradients of weights and of inputs, but not of the images
    model = ConvNet(3, [128, 512, 512, 512, 512], 10, norm_layer)
    assert speed.training_flops(model, torch.randn(2, 3, 32, 32)) == pytest.approx(by_hand, rel=0.01)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('path', PUBLISHED, ids=lambda path: path.stem)
def test_the_published_page_and_a_picture_are_what_the_numbers_give(path, drawn, tmp_path):
    readme = Path(speed.__file__).with_name('README.md').read_text(encoding='utf-8')
    record = json.loads(path.read_text())
    assert ' '.join(tables.table(record).split()) in ' '.join(readme.split())
    tables.plot(record, tmp_path / 'speed.png')
    for panel, case in zip(drawn[0].axes, record['cases'].values(), strict=True):
        speeds = [case['ways'][way]['images_per_second'] for way in tables.WAYS]
        whiskers = [[x for x, _ in segment] for segment in panel.collections[0].get_segments()]
        assert whiskers == [pytest.approx([min(values), max(values)]) for values in speeds]
        assert panel.texts[2].get_text().endswith(f'({median(tables.ratios(speeds[2], speeds[0])):.1f}x)')


def test_speeds_are_compared_with_what_the_machine_does_in_their_own_precision():
    way = {'flops_per_image': 6.0, 'images_per_second': [10, 20, 60], 'precision': 'bf16'}
    case = {'ways': {'this project': way}, 'ceiling': {'fp32': [1, 1, 1], 'bf16': [120, 480, 1200]}}
    assert tables.utilisation(case, 'this project') == pytest.approx(0.3)  # the median of 1/2, 1/4 and 3/10


# --- the two ways -------------------------------------------------------------------------------------------


def test_the_usual_script_sees_the_same_numbers_as_the_project_and_shuffles_and_its_workers_stay(monkeypatch, tmp_path):
    loaders = []
    monkeypatch.setattr(usual_script, 'DataLoader', lambda *arguments, **options: loaders.append((arguments, options)))
    for workers in (0, 3):
        made(usual_script.usual, 'ConvNet', tmp_path, workers)
    (images, batch_size), _ = loaders[0]
    usual, labels = zip(*(images[i] for i in range(len(images))), strict=True)
    expected, expected_labels = next(iter(Batches(load().train, 4)))
    torch.testing.assert_close(torch.stack(usual), expected)
    assert (list(labels), batch_size) == (expected_labels.tolist(), 4)
    assert [options for _, options in loaders] == [
        dict(shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0) for workers in (0, 3)]


FLIP = 'RandomHorizontalFlip(p=0.5)'
ALL = ['RandomCrop(size=(32, 32), padding=4)', FLIP, 'ColorJitter(brightness=(0.7, 1.3), contrast=(0.7, 1.3), '
       'saturation=(0.7, 1.3), hue=(-0.05, 0.05))']


@pytest.mark.parametrize('name, steps, mean, trains, adam', [
    ('ConvNet, batch norm, flip + crop + jitter', ALL, (0.5,) * 3, True, dict(lr=2e-3, weight_decay=1e-3)),
    ('VGG11_bn, frozen', [FLIP], IMAGENET_MEAN, False, dict(lr=1e-3, weight_decay=0))])
def test_the_usual_script_has_the_constants_of_the_project_but_not_its_memory_format(
        name, steps, mean, trains, adam, tmp_path, monkeypatch, weights):
    seen = []
    monkeypatch.setattr(usual_script, 'PilImages', lambda _, transform: seen.append(transform) or [0])
    monkeypatch.setattr(usual_script, 'training_flops', lambda model, _: seen.append(model) or 0)
    monkeypatch.setattr(torch.optim, 'Adam', lambda _, **options: seen.append(options))
    made(usual_script.usual, name, tmp_path)
    transform, options, model = seen
    assert [str(step) for step in transform.transforms[:-1]] == [*steps, 'ToTensor()']
    assert transform.transforms[-1].mean == mean and next(model.features.parameters()).requires_grad == trains
    assert options == adam
    assert all(layer.weight.is_contiguous() for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_the_project_is_timed_by_its_own_history_and_trains_as_the_constants_say(tmp_path, monkeypatch):
    called = []
    epochs = [Epoch(epoch, 0.1, 1.0, 0.5, 1.0, 0.5, 2.0, speed) for epoch, speed in ((1, 5.0), (2, 77.0))]
    monkeypatch.setattr(speed, 'fit', lambda *a, **k: called.append((a, k)) or History(epochs))
    assert made(speed.project, 'ConvNet', tmp_path, precision='bf16').run() == 77.0  # the first may capture a graph
    (_, batches, _, optimizer, schedule, _), options = called[0]
    assert (batches.batch_size, options['num_epochs'], options['precision']) == (4, 1, 'bf16')
    assert (schedule(0), schedule(1)) == (2e-3, pytest.approx(1.9e-3))
    assert optimizer.param_groups[0]['weight_decay'] == 1e-3
    few = replace(load(), classes=('ant', 'bee'))  # of an image folder, say
    config = speed.configure(speed.CASES['ConvNet'], speed.Options(batch_size=200), few, 'fp32', tmp_path)
    assert (config.num_classes, config.batch_size) == (2, 4)


def test_memory_is_the_growth_of_the_peak_while_a_way_is_made_and_trains_twice(tmp_path, monkeypatch):
    if speed.STATUS.exists():  # on Linux
        assert 10e6 < speed.peak_resident_memory() < 1e12  # bytes
    peaks, runs = iter([100, 350]), []  # before the way is made, after it has trained
    monkeypatch.setattr(speed, 'peak_resident_memory', lambda: next(peaks))
    monkeypatch.setattr(speed, 'project', lambda *_: speed.Way(lambda: runs.append(1) or 1.0, 2.0))
    options = speed.Options(steps=1, batch_size=4)
    assert (speed.growth('ConvNet', speed.PROJECT, options, 'fp32', tmp_path), runs) == (250, [1, 1])


def test_an_interruption_keeps_the_cases_that_are_measured(tmp_path, monkeypatch):
    def measure(name, *_):
        if name == 'VGG11_bn, frozen':
            raise KeyboardInterrupt
        return {'ways': {}}
    monkeypatch.setattr(speed, 'measure', measure)
    assert speed.main(['--device', 'cpu', '--precision', 'fp32', '--results', str(tmp_path)]) == 130
    path, = tmp_path.glob('*.json')
    assert list(json.loads(path.read_text())['cases']) == list(speed.CASES)[:3]


def test_a_tiny_run_prints_a_table_and_writes_numbers_and_a_plot(tmp_path, monkeypatch, capsys, cheap, drawn, weights):
    monkeypatch.setattr(speed, 'WORKERS', (1,))
    monkeypatch.setattr(speed, 'measure_ceiling', lambda *_: dict(fp32=1e9, copy=1e9))
    narrow = speed.Case(ex3_convnet, dict(norm_layer='BN', hidden_size=(8, 8)))
    monkeypatch.setitem(speed.CASES, 'ConvNet, batch norm', narrow)
    cases = ['ConvNet, batch norm', 'VGG11_bn, frozen']
    assert speed.main(['--cases', *cases, '--steps', '1', '--repetitions', '1', '--batch-size', '4', '--no-memory',
                       '--device', 'cpu', '--precision', 'fp32', '--results', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    path, = tmp_path.glob('*.json')
    record = json.loads(path.read_text())
    assert list(record['cases']) == cases and path.with_suffix('.png').read_bytes() == b'a picture'
    for case in record['cases'].values():
        assert [len(case['ways'][way]['images_per_second']) for way in speed.WAYS] == [1, 1, 1]
        assert all(way['images_per_second'][0] > 0 < way['flops_per_image'] for way in case['ways'].values())
    features = [case['features'] and case['features']['images'] for case in record['cases'].values()]
    assert features == [None, 2 * 4]  # each image and its mirror image
    assert speed.main(['--table', str(path)]) == 0
    table = capsys.readouterr().out.strip()
    assert printed.startswith(table) and str(path) in printed and all(f'| {name} ' in table for name in cases)
    assert ' GFLOP/s in fp32; a copy' in table  # of no other precision
    assert len(load(steps=3, data='shapes').train) == 12  # as many images as the steps take
    other = str(RESULTS / 'time_to_accuracy' / 'curves.json')
    for wrong, words in ((['--cases', 'ResNet'], 'got ResNet'), (['--cases'], 'got none'),
                         (['--table', 'none.json'], 'none.json'), (['--table', other], 'is not a JSON file'),
                         (['--repetitions', '0'], 'repetitions and steps must be at least 1'),
                         (['--steps', '0'], ', 0 and '), (['--batch-size', '1'], 'batch_size at least 2')):
        assert speed.main(wrong) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize('batch_size, steps, images', [(50, 4, 50), (2000, 1, 240)])
def test_what_is_written_are_the_steps_that_the_data_have_images_for(tmp_path, monkeypatch, batch_size, steps, images):
    for name in ('measure', 'table', 'plot'):
        monkeypatch.setattr(speed, name, lambda *_: '')
    assert speed.main(['--data', 'shapes', '--steps', '245', '--batch-size', str(batch_size), '--device', 'cpu',
                       '--precision', 'fp32', '--results', str(tmp_path)]) == 0
    path, = tmp_path.glob('*.json')
    record = json.loads(path.read_text())
    assert (record['steps'], record['batch_size']) == (steps, images)


# --- the clock ----------------------------------------------------------------------------------------------


class Clock:
    """Every look at it is two seconds after the one before."""
    now = 0.0

    def perf_counter(self):
        self.now += 2.0
        return self.now


def test_the_usual_script_trains_with_the_defaults_of_torch_and_counts_its_images_per_second(monkeypatch, tmp_path):
    monkeypatch.setattr(usual_script, 'time', Clock())
    models, seen, forward, item = [], [], ConvNet.forward, torch.Tensor.item
    monkeypatch.setattr(usual_script, 'give_back_freed_memory', lambda: seen.append('defaults'))
    monkeypatch.setattr(usual_script, 'pick_device', lambda _: seen.append("the project's"))
    monkeypatch.setattr(torch.Tensor, 'item', lambda self: (self.requires_grad and seen.append('loss')) or item(self))
    monkeypatch.setattr(ConvNet, 'forward', lambda self, x: models.append(self) or seen.append(
        (self.training, torch.backends.cudnn.benchmark)) or forward(self, x))
    way = made(usual_script.usual, 'ConvNet', tmp_path, steps=3)
    before = models[0].classifier.weight.clone()
    del seen[:]  # of counting the FLOP
    torch.backends.cudnn.benchmark = True
    assert way.run() == 12 / 2.0
    assert seen == ['defaults', *[(True, False), 'loss'] * 3, "the project's"]  # the loss is read at every step
    assert not torch.equal(models[0].classifier.weight, before)


def test_the_fastest_workers_are_those_of_the_second_run():
    speeds = {2: iter([9.0, 1.0]), 4: iter([1.0, 3.0]), 8: iter([1.0, 2.0])}  # the first run starts them
    count, way = speed.fastest_workers(lambda count: speed.Way(lambda: next(speeds[count]), count))
    assert (count, way.flops) == (4, 4)


def test_the_ceiling_counts_two_operations_per_multiply_add_and_bytes_read_and_written(monkeypatch):
    monkeypatch.setattr(speed, 'time', Clock())
    calls, products = [], []
    assert speed.seconds_per_call(lambda: calls.append(1), CPU, at_least=0.3) == 2.0 / 2
    assert len(calls) == 3  # one to warm up, two that are timed
    monkeypatch.setattr(speed, 'MATRIX_SIDE', {'cpu': 64})
    monkeypatch.setattr(speed, 'COPY_LENGTH', 1000)
    monkeypatch.setattr(speed, 'seconds_per_call', lambda call, _: products.append(call()) or 2.0)
    assert speed.measure_ceiling(CPU, 'bf16') == {'fp32': 64 ** 3, 'bf16': 64 ** 3, 'copy': 4000}
    assert [(tuple(one.shape), one.dtype) for one in products] == [
        ((64, 64), torch.float32), ((64, 64), torch.bfloat16), ((1000,), torch.float32)]
    assert torch.get_float32_matmul_precision() == 'highest'  # as before
    assert speed.measure_ceiling(CPU, 'fp32').keys() == {'fp32', 'copy'}  # emulated bf16 takes too long


def test_every_way_warms_up_before_it_is_measured_and_ways_take_turns(monkeypatch, tmp_path):
    def way(name):
        return speed.Way(lambda: runs.append(name) or 1.0, 2.0)
    runs = []
    monkeypatch.setattr(speed, 'usual', lambda *_: way('usual'))
    monkeypatch.setattr(speed, 'project', lambda *_: way('project'))
    monkeypatch.setattr(speed, 'fastest_workers', lambda _: (2, way('workers')))
    monkeypatch.setattr(speed, 'measure_ceiling', lambda *_: dict(fp32=1.0, bf16=2.0, copy=3.0))
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
