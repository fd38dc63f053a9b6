"""The training loop against a slow loop written by hand, and what it keeps."""
import copy
import csv
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import training
from datasets.augment import Flip
from datasets.cifar10 import Batches, Split
from models.convnet import ConvNet
from training import Average, Epoch, History, decay, evaluate, fit, make_optimizer, one_cycle, seed_everything


def make_split(count: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
                 torch.randint(0, 4, (count,), generator=generator))


TRAIN, VAL = make_split(50), make_split(30, seed=1)


def make_run(folder, *, dropout=0.0, optimizer='Adam', learning_rate=2e-3, seed=3, **options):
    """A tiny run -> (history, model)."""
    folder.mkdir(exist_ok=True)
    seed_everything(seed)
    model = ConvNet(3, [4, 4, 4, 4, 4], 4, 'BN', dropout)
    train = Batches(TRAIN, 20, augmentations=[Flip(0.5)])
    options = dict(num_epochs=3, schedule=decay(learning_rate, 0.5)) | options
    history = fit(model, train, Batches(VAL, 20), make_optimizer(optimizer, [dict(params=list(model.parameters()))],
                                                                 learning_rate, 1e-3),
                  seed=seed, folder=folder, **options)
    return history, model


def weights(path):
    return torch.load(path, weights_only=True)


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def numbers(history):
    """All of a history that does not depend on the clock."""
    return [(e.epoch, e.learning_rate, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy)
            for e in history.epochs]


# --- one step and one epoch ---------------------------------------------------------------------------------


def test_fit_equals_a_loop_written_by_hand(tmp_path):
    history, model = make_run(tmp_path)
    seed_everything(3)
    slow = ConvNet(3, [4, 4, 4, 4, 4], 4, 'BN')
    optimizer = torch.optim.Adam(slow.parameters(), lr=2e-3, weight_decay=1e-3)
    train = Batches(TRAIN, 20, augmentations=[Flip(0.5)])
    for epoch in range(1, 4):
        seed_everything(3, epoch)
        optimizer.param_groups[0]['lr'] = 2e-3 * 0.5 ** (epoch - 1)
        losses, right = [], 0
        for index in train.shuffled():
            images, labels = train.batch(index)
            logits = slow.train()(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            right += (logits.argmax(1) == labels).sum().item()
        with torch.no_grad():
            logits = slow.eval()((VAL.images / 255 - 0.5) / 0.5)
        row = history.epochs[epoch - 1]
        assert row.learning_rate == 2e-3 * 0.5 ** (epoch - 1)
        assert row.train_loss == pytest.approx(sum(losses) / 2, rel=1e-4)  # a mean over examples, not over 200 again
        assert row.train_accuracy == pytest.approx(right / 40)
        assert row.val_loss == pytest.approx(F.cross_entropy(logits, VAL.labels).item(), rel=1e-4)
        assert row.val_accuracy == pytest.approx((logits.argmax(1) == VAL.labels).float().mean().item())
    for key, tensor in slow.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-3, atol=1e-5)


def test_evaluation_counts_every_example_and_restores_the_mode():
    model = ConvNet(3, [4] * 5, 4, 'BN', dropout=0.5).train()
    loss, accuracy = evaluate(model, Batches(VAL, 7))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()((VAL.images / 255 - 0.5) / 0.5)
    assert loss == pytest.approx(F.cross_entropy(logits, VAL.labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == VAL.labels).float().mean().item())
    assert model.training


def test_label_smoothing_trains_but_the_plain_loss_is_reported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    train = Batches(TRAIN, 50)
    optimizer = make_optimizer('SGD', [dict(params=list(model.parameters()))], 1e-3, 0)
    images, labels = train.batch(torch.arange(50))
    expected = copy.deepcopy(model)
    F.cross_entropy(expected(images), labels, label_smoothing=0.2).backward()
    loss, correct = training.TrainingStep(model, train, optimizer, label_smoothing=0.2)(torch.arange(50))
    torch.testing.assert_close(model[1].weight.grad, expected[1].weight.grad)
    torch.testing.assert_close(loss, F.cross_entropy(expected(images), labels).detach())
    assert correct == (expected(images).argmax(1) == labels).sum()


# --- learning rate, optimisers, averaging -------------------------------------------------------------------


def test_decay_multiplies_once_an_epoch():
    rate = decay(2e-3, 0.95)
    assert [rate(0), rate(0.99), rate(1), rate(19.5)] == pytest.approx([2e-3, 2e-3, 2e-3 * 0.95, 2e-3 * 0.95 ** 19])


@pytest.mark.parametrize('warmup', [0.0, 0.2, 0.5])
def test_one_cycle_climbs_to_its_peak_and_ends_at_zero(warmup):
    rate = one_cycle(0.1, 10, warmup)
    assert rate(10 * warmup) == pytest.approx(0.1) and rate(10) == pytest.approx(0)
    assert rate(5 * (1 + warmup)) == pytest.approx(0.05)  # half of the way down
    assert warmup == 0 or rate(5 * warmup) == pytest.approx(0.05)  # half of the way up


@pytest.mark.parametrize('name, oracle', [
    ('Adam', lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)),
    ('SGD', lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=0.1))])
def test_optimisers_equal_the_plain_ones(name, oracle):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    first, second = make_optimizer(name, [dict(params=[ours])], 0.01, 0.1), oracle([theirs])
    for _ in range(5):
        for parameter, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            parameter.pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_each_parameter_group_gets_its_own_learning_rate():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = make_optimizer('SGD', [dict(params=[parameters[0]]), dict(params=[parameters[1]], scale=0.1)], 1.0, 0)
    training.set_learning_rate(optimizer, 0.5)
    assert [group['lr'] for group in optimizer.param_groups] == [0.5, 0.05]


def test_average_equals_the_formula_for_weights_and_batch_norm_statistics():
    model = nn.BatchNorm1d(1)
    average = Average(model, decay=0.9)
    weight, mean = 1.0, 0.0
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
        average.set_step(step)
        average.update()
        part = max(0.1, 9 / (10 + step))
        weight, mean = weight + part * (step - weight), mean + part * (-step - mean)
    assert average.model.weight.item() == pytest.approx(weight, rel=1e-4)
    assert average.model.running_mean.item() == pytest.approx(mean, rel=1e-4)
    assert model.weight.item() == 199


def test_averaged_weights_are_what_is_validated_and_kept(tmp_path):
    history, model = make_run(tmp_path, ema_decay=0.9)
    kept = ConvNet(3, [4] * 5, 4, 'BN')
    kept.load_state_dict(weights(tmp_path / 'last.pt'))
    assert not torch.equal(kept.features[0].weight, model.features[0].weight)
    assert evaluate(kept, Batches(VAL, 20)) == (history.epochs[-1].val_loss, history.epochs[-1].val_accuracy)


# --- best, latest, patience ---------------------------------------------------------------------------------


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


def scripted_validation(monkeypatch, accuracies):
    """Let validation give these accuracies, one an epoch; returns the weights it was given."""
    seen = []

    def fake(model, *_):
        seen.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return 1.0, accuracies[len(seen) - 1]
    monkeypatch.setattr(training, 'evaluate', fake)
    return seen


def test_best_and_last_hold_the_weights_of_their_epochs(tmp_path, monkeypatch):
    seen = scripted_validation(monkeypatch, [0.1, 0.8, 0.3, 0.4])
    history, _ = make_run(tmp_path, num_epochs=4)
    assert history.best.epoch == 2
    assert_same_tensors(weights(tmp_path / 'best.pt'), seen[1])
    assert_same_tensors(weights(tmp_path / 'last.pt'), seen[3])


def test_training_stops_when_patience_is_over_and_never_without(tmp_path, monkeypatch):
    scripted_validation(monkeypatch, [0.8, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(make_run(tmp_path / 'a', num_epochs=6, patience=2)[0].epochs) == 3
    scripted_validation(monkeypatch, [0.8, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(make_run(tmp_path / 'b', num_epochs=6, patience=None)[0].epochs) == 6


def test_history_csv_has_a_row_an_epoch_and_reads_back(tmp_path):
    history, _ = make_run(tmp_path)
    rows = list(csv.DictReader((tmp_path / 'history.csv').open()))
    assert list(rows[0]) == ['epoch', 'learning_rate', 'train_loss', 'train_accuracy', 'val_loss', 'val_accuracy',
                             'seconds', 'images_per_second']
    assert [row['epoch'] for row in rows] == ['1', '2', '3']
    assert History.read(tmp_path / 'history.csv') == history
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


# --- repeating and resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [{}, dict(dropout=0.3), dict(optimizer='SGD', ema_decay=0.9)])
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, options):
    whole, _ = make_run(tmp_path / 'whole', num_epochs=4, **options)

    def stop_after_two(history, *_):
        if len(history.epochs) == 3:
            raise KeyboardInterrupt  # in the third epoch's report: two epochs are whole
    monkeypatch.setattr(training, '_report', stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / 'parts', num_epochs=4, **options)
    monkeypatch.undo()
    assert len(History.read(tmp_path / 'parts' / 'history.csv').epochs) == 2
    assert {'best.pt', 'curves.png', 'checkpoint.pt'} <= {path.name for path in (tmp_path / 'parts').iterdir()}
    torch.rand(7)  # whatever else happens in the process
    resumed, _ = make_run(tmp_path / 'parts', num_epochs=4, **options)
    assert numbers(resumed) == numbers(whole)
    for name in ('best.pt', 'last.pt'):
        assert_same_tensors(weights(tmp_path / 'parts' / name), weights(tmp_path / 'whole' / name))


def test_a_seed_gives_the_same_numbers_whatever_ran_before(tmp_path):
    first, _ = make_run(tmp_path / 'a', dropout=0.2)
    make_run(tmp_path / 'b', seed=4)
    torch.rand(11)
    assert numbers(make_run(tmp_path / 'c', dropout=0.2)[0]) == numbers(first)
    assert numbers(make_run(tmp_path / 'd', dropout=0.2, seed=4)[0]) != numbers(first)


def test_seeds_and_epochs_give_different_streams():
    def draw(*arguments):
        seed_everything(*arguments)
        return torch.rand(1).item()
    assert len({draw(seed, epoch) for seed in (0, 1, 4096, 2 ** 31) for epoch in range(50)}) == 200


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_good(tmp_path, monkeypatch):
    plain_step = training.TrainingStep.__call__
    calls = []

    def step(self, index):
        calls.append(index)
        loss, correct = plain_step(self, index)
        return (loss * math.nan if len(calls) == 6 else loss), correct  # two steps an epoch: the third's second
    monkeypatch.setattr(training.TrainingStep, '__call__', step)
    history, _ = make_run(tmp_path, num_epochs=5)
    assert history.diverged == 'epoch 3, step 2' and len(history.epochs) == 2
    assert len(History.read(tmp_path / 'history.csv').epochs) == 2
    assert (tmp_path / 'best.pt').exists() and not (tmp_path / 'last.pt').exists()


@pytest.mark.parametrize('seconds, text', [(8.04, '8 s'), (90, '90 s'), (305, '5 min'), (5300, '1 h 28 min')])
def test_durations_are_written_for_people(seconds, text):
    assert training.duration(seconds) == text


def test_a_checkpoint_of_another_device_does_not_bring_its_kind_of_learning_rate(tmp_path, monkeypatch):
    """On CUDA the learning rate is a tensor, which a graph reads; a run may go on where it was not begun."""
    make_run(tmp_path, num_epochs=1)
    model = ConvNet(3, [4] * 5, 4, 'BN')
    optimizer = make_optimizer('SGD', [dict(params=list(model.parameters()))], 1e-3, 0)
    state = {'model': model.state_dict(), 'best': model.state_dict(), 'average': None, 'epochs': [],
             'optimizer': optimizer.state_dict()}
    training.save_tensors(state, tmp_path / 'checkpoint.pt')
    optimizer.param_groups[0]['lr'] = torch.tensor(0.5)
    training._load_checkpoint(tmp_path / 'checkpoint.pt', model, model, optimizer)
    training.set_learning_rate(optimizer, 0.25)
    assert isinstance(optimizer.param_groups[0]['lr'], torch.Tensor) and optimizer.param_groups[0]['lr'] == 0.25
