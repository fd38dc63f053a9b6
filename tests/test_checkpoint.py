"""What a run leaves while it trains: history, averages, checkpoints; and files that are whole or not there."""
import csv
import os
from types import SimpleNamespace

import pytest
import torch
from test_training import assert_same_tensors, load, make_model, make_run, numbers
from torch import nn

from lab import checkpoint
from lab.checkpoint import Average, Checkpoint
from lab.files import write_atomically
from lab.history import Epoch, History
from lab.progress import Progress, duration
from optimizers import make_optimizer

pytestmark = pytest.mark.usefixtures('cheap')

# --- files, histories, averages -----------------------------------------------------------------------------


@pytest.mark.parametrize('content', ['new ± \udcff', b'new'])
def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch, content):
    path = tmp_path / 'file'
    write_atomically(path, 'old')

    def full(*_):
        raise OSError(28, 'No space left on device')
    for name in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match='No space left on device.*file'):
                write_atomically(path, content)
        assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else 'new ± \\udcff'.encode())


def test_history_csv_has_a_row_per_epoch_and_reads_back(tmp_path):
    history, _ = make_run(tmp_path)
    rows = list(csv.DictReader((tmp_path / 'history.csv').open()))
    assert list(rows[0]) == ['epoch', 'learning_rate', 'train_loss', 'train_accuracy', 'val_loss', 'val_accuracy',
                             'seconds', 'images_per_second']
    assert [row['epoch'] for row in rows] == ['1', '2', '3']
    assert History.read(tmp_path / 'history.csv') == history
    assert (tmp_path / 'curves.png').exists()


def make_history(*validation):
    return History([Epoch(i, 0.1, 1.0, 0.5, loss, accuracy, 1.0, 10.0)
                    for i, (accuracy, loss) in enumerate(validation, 1)])


@pytest.mark.parametrize('validation, best', [
    ([(0.5, 1.0), (0.7, 2.0), (0.6, 0.1)], 2),  # accuracy decides, not loss
    ([(0.5, 1.0), (0.7, 2.0), (0.7, 1.5)], 3),  # of equals the lower loss
    ([(0.7, 1.0), (0.7, 1.0)], 1)])
def test_best_is_highest_accuracy_then_lowest_loss(validation, best):
    assert make_history(*validation).best.epoch == best


@pytest.mark.parametrize('patience, stopped', [(None, False), (1, True), (2, True), (3, False)])
def test_patience_counts_epochs_since_the_best(patience, stopped):
    assert make_history((0.5, 1.0), (0.7, 1.0), (0.6, 1.0), (0.6, 1.0)).stopped_early(patience) is stopped


def test_average_equals_the_formula_for_weights_and_batch_norm_statistics():
    model = nn.BatchNorm1d(1)
    average = Average(model, decay=0.9)
    weight, mean = 1.0, 0.0
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
        average.update()
        part = max(0.1, 9 / (10 + step))
        weight, mean = weight + part * (step - weight), mean + part * (-step - mean)
    assert average.model.weight.item() == pytest.approx(weight, rel=1e-4)
    assert average.model.running_mean.item() == pytest.approx(mean, rel=1e-4)
    assert model.weight.item() == 199


@pytest.mark.parametrize('seconds, text', [(8.04, '8 s'), (90, '90 s'), (305, '5 min'), (5300, '1 h 28 min')])
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [
    {}, dict(dropout=0.3), dict(optimizer='SGD', ema_decay=0.9), dict(optimizer='Muon', freeze_at=0.25, ema_decay=0.9)])
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, options):
    whole, _ = make_run(tmp_path / 'whole', num_epochs=4, **options)

    def stop_in_the_third(progress, history):
        if len(history.epochs) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(Progress, 'end_epoch', stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / 'parts', num_epochs=4, **options)
    monkeypatch.undo()
    assert len(History.read(tmp_path / 'parts' / 'history.csv').epochs) == 2  # the third was not whole
    assert {'best.pt', 'curves.png', 'checkpoint.pt'} <= {path.name for path in (tmp_path / 'parts').iterdir()}
    torch.rand(7)  # whatever else happens in the process
    resumed, _ = make_run(tmp_path / 'parts', num_epochs=4, **options)
    assert numbers(resumed) == numbers(whole)
    for name in ('best.pt', 'last.pt'):
        assert_same_tensors(load(tmp_path / 'parts' / name), load(tmp_path / 'whole' / name))


def test_checkpoints_are_apart_by_ten_seconds_or_twenty_times_what_saving_takes(tmp_path, monkeypatch):
    now, takes = [0.0], [0.1]

    def save(_value, path):
        now[0] += takes[0] * (path.name == 'checkpoint.pt')
        saved.append(path.name)
    monkeypatch.setattr(checkpoint, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(checkpoint, 'save_tensors', save)
    model, saved = make_model(), []
    with Checkpoint(tmp_path, model, make_optimizer('SGD', model, 0.1), None, Progress()) as kept:
        def saves_after(seconds):
            now[0] += seconds
            saved.clear()
            kept.history.epochs.append(Epoch(len(kept.history.epochs) + 1, 0.1, 1, 0.5, 1, 0.5, 1, 1))
            kept.end_epoch()
            return saved == ['best.pt', 'checkpoint.pt']
        assert [saves_after(seconds) for seconds in (9, 2, 9, 2)] == [False, True, False, True]
        takes[0] = 3.0
        assert [saves_after(seconds) for seconds in (11, 50, 9, 2)] == [True, False, False, True]
        saves_after(1)
    assert saved == ['best.pt', 'checkpoint.pt', 'last.pt']  # the last epoch always


def test_a_checkpoint_keeps_the_weights_of_its_epoch_whatever_trains_on(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, 0.5)
    with Checkpoint(tmp_path, model, make_optimizer('SGD', model, 0.1), average, Progress()) as kept:
        assert kept.judged is average.model
        for value, accuracy in ((1.0, 0.5), (2.0, 0.7), (3.0, 0.6)):
            nn.init.constant_(model.weight, value)
            nn.init.constant_(average.model.weight, -value)
            kept.history.epochs.append(Epoch(int(value), 0.1, 1, 0.5, 1, accuracy, 1, 1))
            kept.end_epoch()
        nn.init.constant_(model.weight, 9.0)  # of an epoch that was not finished
    saved = load(tmp_path / 'checkpoint.pt')
    assert (saved['model']['weight'], saved['average']['weight'], saved['best']['weight']) == (3, -3, -2)
    assert load(tmp_path / 'best.pt')['weight'] == -2
