"""What a run leaves while it trains: history, averages, checkpoints; and files that are whole or not there."""
import os
from types import SimpleNamespace

import pytest
import torch
from test_training import assert_same_tensors, load, make_model, make_run

from lab import checkpoint
from lab.checkpoint import Checkpoint
from lab.files import write_atomically
from lab.history import Epoch, History
from lab.progress import Progress
from optimizers import make_optimizer

pytestmark = pytest.mark.usefixtures('cheap')


def interrupted_run(folder, monkeypatch, **options):
    """Two whole epochs of four, and a checkpoint: Ctrl-C comes when the third is trained, but not yet whole."""
    def interrupt(progress, history):
        if len(history.epochs) == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Progress, 'end_epoch', interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_run(folder, num_epochs=4, **options)
    assert len(History.read(folder / 'history.csv').epochs) == 2
    assert {path.name for path in folder.iterdir()} == {'history.csv', 'curves.png', 'best.pt', 'checkpoint.pt'}


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    write_atomically(path, b'old')

    def full(*_):
        raise OSError(28, 'No space left on device')
    for name in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match='No space left on device.*file'):
                write_atomically(path, 'new')
        assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]
    write_atomically(path, 'new ± \udcff')
    assert path.read_bytes() == 'new ± \\udcff'.encode()


@pytest.mark.parametrize('options', [
    dict(dropout=0.3), dict(optimizer='SGD', ema_decay=0.9), dict(optimizer='Muon', freeze_at=0.25, ema_decay=0.9)],
    ids=['Adam and dropout', 'SGD and averaging', 'Muon and a first block that no longer trains'])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, options):
    whole, _ = make_run(tmp_path / 'whole', num_epochs=4, **options)
    folder, progress = tmp_path / 'parts', Progress()
    interrupted_run(folder, monkeypatch, **options)
    state = load(folder / 'checkpoint.pt')
    for group in state['optimizer']['param_groups']:
        group |= dict(lr=torch.tensor(0.7), capturable=True)  # as a GPU leaves them
    torch.save(state, folder / 'checkpoint.pt')
    torch.rand(7)  # whatever else happens in the process
    resumed, _ = make_run(folder, num_epochs=4, progress=progress, **options)
    for column in ('epoch', 'learning_rate', 'train_loss', 'train_accuracy', 'val_loss', 'val_accuracy'):
        assert resumed[column] == whole[column], column
    for name in ('best.pt', 'last.pt'):
        assert_same_tensors(load(folder / name), load(tmp_path / 'whole' / name))
    assert progress.bar.n == 2 * 40  # images done before; it is not shown here, so it did not move
    (folder / 'curves.png').unlink()  # as a kill just before drawing leaves it
    assert make_run(folder, num_epochs=4, **options)[0] == resumed == History.read(folder / 'history.csv')
    assert (folder / 'curves.png').exists()


def test_checkpoints_are_apart_by_ten_seconds_or_twenty_times_what_saving_takes(tmp_path, monkeypatch):
    now, takes, saved = [0.0], [0.1], []

    def save(_value, path):
        now[0] += takes[0] * (path.name == 'checkpoint.pt')
        saved.append(path.name)
    monkeypatch.setattr(checkpoint, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(checkpoint, 'save_tensors', save)
    model = make_model()
    with Checkpoint(tmp_path, model, make_optimizer('SGD', model, 0.1), None, Progress()) as kept:
        def saves_after(seconds):
            now[0] += seconds
            saved.clear()
            kept.history.epochs.append(Epoch(len(kept.history.epochs) + 1, 0.1, 1, 0.5, 1, 0.5, 1, 1))
            kept.end_epoch()
            return saved == ['best.pt', 'checkpoint.pt']  # in this order: the checkpoint is what counts
        assert [saves_after(seconds) for seconds in (9, 2, 9, 2)] == [False, True, False, True]
        takes[0] = 3.0
        assert [saves_after(seconds) for seconds in (11, 50, 9, 2)] == [True, False, False, True]
    assert saved == ['best.pt', 'checkpoint.pt', 'last.pt']  # and the last epoch, which is saved, not again
