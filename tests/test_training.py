"""The training loop against a slow loop written by hand, and what it keeps."""
import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import training
from datasets.augment import Flip
from datasets.batches import Batches, Split
from lab.history import Epoch, History
from lab.progress import Progress
from models.convnet import ConvNet
from models.vgg import VggModel
from optimizers import make_optimizer
from training import decay, evaluate, evaluate_kept, fit, make_schedule, make_step, one_cycle, seed_everything


def make_split(count: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
                 torch.randint(0, 4, (count,), generator=generator))


pytestmark = pytest.mark.usefixtures('cheap')

TRAIN, VAL, TEST = make_split(50), make_split(30, seed=1), make_split(23, seed=2)


def make_model(seed=3, dropout=0.0):
    seed_everything(seed)
    return ConvNet(3, [4, 4, 4, 4, 4], 4, 'BN', dropout)


def make_run(folder, *, dropout=0.0, optimizer='Adam', learning_rate=2e-3, seed=3, **options):
    """A tiny run -> (history, model)."""
    folder.mkdir(exist_ok=True)
    model = make_model(seed, dropout)
    train = Batches(TRAIN, 20, augmentations=[Flip(0.5)], shuffle=True)
    options = dict(num_epochs=3, schedule=decay(learning_rate, 0.5)) | options
    history = fit(model, train, Batches(VAL, 20), make_optimizer(optimizer, model, learning_rate, 1e-3), seed=seed,
                  folder=folder, **options)
    return history, model


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def numbers(history):
    """All of a history that does not depend on the clock."""
    return [(e.epoch, e.learning_rate, e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy)
            for e in history.epochs]


# --- a loop written by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [
    dict(schedule=decay(2e-3, 0.5)), dict(schedule=one_cycle(2e-3, 3, 0.4)), dict(ema_decay=0.7),
    dict(label_smoothing=0.2, dropout=0.3), dict(optimizer='SGD', learning_rate=0.01, schedule=decay(0.01, 0.9)),
    dict(optimizer='Muon', schedule=one_cycle(0.05, 3, 0.4), ema_decay=0.8, label_smoothing=0.1),
], ids=['decay', 'one-cycle', 'averaging', 'label smoothing and dropout', 'SGD', 'Muon and the rest'])
def test_fit_equals_a_loop_written_by_hand(tmp_path, options):
    history, model = make_run(tmp_path, **options)
    schedule, smoothing = options.get('schedule', decay(2e-3, 0.5)), options.get('label_smoothing', 0)
    slow = make_model(dropout=options.get('dropout', 0))
    make = {'SGD': lambda: torch.optim.SGD(slow.parameters(), momentum=0.9, nesterov=True, weight_decay=1e-3),
            'Adam': lambda: torch.optim.Adam(slow.parameters(), weight_decay=1e-3),
            'Muon': lambda: make_optimizer('Muon', slow, 1.0)}
    optimizer = make[options.get('optimizer', 'Adam')]()
    train = Batches(TRAIN, 20, augmentations=[Flip(0.5)], shuffle=True)
    average, steps = copy.deepcopy(slow), 0
    for epoch in range(1, 4):
        seed_everything(3, epoch)
        losses, right = [], 0
        for i, (images, labels) in enumerate(train):
            for group in optimizer.param_groups:
                group['lr'] = schedule(epoch - 1 + i / 2) * group.get('scale', 1)  # two steps per epoch
            logits = slow.train()(images)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels, label_smoothing=smoothing).backward()
            optimizer.step()
            losses.append(F.cross_entropy(logits, labels).item())  # the plain loss is what is reported
            right += (logits.argmax(1) == labels).sum().item()
            part = max(1 - options.get('ema_decay', 0), 9 / (10 + steps)) if 'ema_decay' in options else 1
            for mean, current in zip(average.state_dict().values(), slow.state_dict().values(), strict=True):
                mean.copy_(mean + part * (current - mean) if mean.is_floating_point() else current)
            steps += 1
        with torch.no_grad():
            logits = average.eval()((VAL.images / 255 - 0.5) / 0.5)
        row = history.epochs[epoch - 1]
        assert row.learning_rate == pytest.approx(schedule(epoch - 1))
        assert row.train_loss == pytest.approx(sum(losses) / 2, rel=1e-4)  # a mean over examples, not over 200 again
        assert row.train_accuracy == pytest.approx(right / 40)
        assert row.val_loss == pytest.approx(F.cross_entropy(logits, VAL.labels).item(), rel=1e-4)
        assert row.val_accuracy == pytest.approx((logits.argmax(1) == VAL.labels).float().mean().item())
    for found, expected in ((model.state_dict(), slow), (load(tmp_path / 'last.pt'), average)):
        for key, tensor in expected.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(found[key], tensor, rtol=2e-3, atol=2e-5, msg=key)


def test_evaluation_counts_every_example_and_restores_the_mode():
    model = ConvNet(3, [4] * 5, 4, 'BN', dropout=0.5).train()
    loss, accuracy = evaluate(model, Batches(VAL, 7))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()((VAL.images / 255 - 0.5) / 0.5)
    assert loss == pytest.approx(F.cross_entropy(logits, VAL.labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == VAL.labels).float().mean().item())
    assert model.training


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_forward_pass_is_in_the_precision_asked_for_in_training_and_evaluation(tmp_path, precision, monkeypatch):
    seen = []
    forward = ConvNet.forward

    def spy(self, images):
        logits = forward(self, images)
        seen.append((self.training, logits.dtype, torch.is_autocast_enabled('cpu')))
        return logits
    monkeypatch.setattr(ConvNet, 'forward', spy)
    history, model = make_run(tmp_path, num_epochs=1, precision=precision)
    assert len(seen) == 4
    evaluate_kept(model, history, tmp_path, {'test': Batches(TEST)}, precision)
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    assert set(seen) == {(mode, dtype, precision == 'bf16') for mode in (True, False)} and len(seen) == 5
    assert all(tensor.dtype != torch.bfloat16 for tensor in load(tmp_path / 'last.pt').values())


def test_the_step_reports_mean_loss_and_number_of_right_answers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    (images, labels), = Batches(TRAIN, 50)
    logits = copy.deepcopy(model)(images)
    loss, correct = make_step(model, make_optimizer('SGD', model, 0.0))(images, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels).detach())
    assert correct == (logits.argmax(1) == labels).sum()


def test_a_frozen_backbone_run_live_keeps_its_weights_and_statistics_and_its_head_learns(tmp_path, weights):
    seed_everything(0)
    model = VggModel(4, fine_tune=False, weights=weights)
    before = copy.deepcopy(model.state_dict())
    fit(model, Batches(TRAIN, 20, shuffle=True), Batches(VAL), make_optimizer('Adam', model, 1e-2), decay(1e-2, 1),
        tmp_path, num_epochs=2, seed=0, ema_decay=0.5)
    for state in (model.state_dict(), load(tmp_path / 'last.pt')):
        changed = {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}
        assert {'classifier.0.weight', 'classifier.1.running_mean', 'classifier.3.weight'} <= changed
        assert not [key for key in changed if key.startswith('features.')]


def test_seconds_and_images_per_second_are_those_of_training_alone(tmp_path, monkeypatch, capsys):
    now, train_epoch = [0.0], training.train_epoch

    def during(seconds, function):
        def call(*arguments):
            now[0] += seconds
            return function(*arguments)
        return call
    monkeypatch.setattr(training, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(training, 'train_epoch', during(2.5, train_epoch))
    monkeypatch.setattr(training, 'evaluate', during(100, lambda *_: (1.25, 0.375)))
    history, _ = make_run(tmp_path, num_epochs=2, progress=Progress('a run'))
    assert history['seconds'] == [2.5, 2.5]
    assert history['images_per_second'] == [16, 16]  # 40 of the 50 images: the last ten make no whole batch
    first = capsys.readouterr().out.splitlines()[-2]
    row = history.epochs[0]
    assert first == (f'a run: epoch   1/2  loss {row.train_loss:.3f}  training {row.train_accuracy:6.1%}  '
                     f'validation  37.5%  2.5 s, 16 images/s, 2 s left')


# --- learning rate, averaging, freezing ---------------------------------------------------------------------


def test_decay_multiplies_once_per_epoch():
    rate = make_schedule('decay', 2e-3, 0.95, 20, 0.2)
    assert [rate(0), rate(0.99), rate(1), rate(19.5)] == pytest.approx([2e-3, 2e-3, 2e-3 * 0.95, 2e-3 * 0.95 ** 19])


@pytest.mark.parametrize('warmup', [0.0, 0.2, 0.5])
def test_one_cycle_climbs_to_its_peak_and_ends_at_zero(warmup):
    rate = make_schedule('one-cycle', 0.1, 0.95, 10, warmup)
    assert rate(10 * warmup) == pytest.approx(0.1) and rate(10) == pytest.approx(0)
    assert rate(5 * (1 + warmup)) == pytest.approx(0.05)  # half of the way down
    assert warmup == 0 or rate(5 * warmup) == pytest.approx(0.05)  # half of the way up


def test_the_first_block_stays_as_it_is_after_its_share_of_the_epochs(tmp_path, monkeypatch):
    seen = scripted_validation(monkeypatch, [0.1, 0.2, 0.3, 0.4])
    make_run(tmp_path, num_epochs=4, freeze_at=0.5)
    first, second, third, fourth = seen
    for key in ('features.0.weight', 'features.1.weight', 'features.1.bias'):
        assert not torch.equal(first[key], second[key])
        assert torch.equal(second[key], third[key]) and torch.equal(third[key], fourth[key])
    assert not torch.equal(third['features.4.weight'], fourth['features.4.weight'])


# --- best, latest, patience ---------------------------------------------------------------------------------


def scripted_validation(monkeypatch, accuracies):
    """Let validation give these accuracies, one per epoch; returns the weights it was given."""
    seen = []

    def fake(model, *_):
        seen.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return 1.0, accuracies[len(seen) - 1]
    monkeypatch.setattr(training, 'evaluate', fake)
    return seen


def test_best_and_last_hold_the_weights_of_their_epochs_and_are_evaluated_as_what_they_are(tmp_path, monkeypatch):
    seen = scripted_validation(monkeypatch, [0.1, 0.8, 0.3, 0.4])
    history, model = make_run(tmp_path, num_epochs=4, learning_rate=0.5, optimizer='Muon', schedule=decay(0.5, 1))
    assert history.best.epoch == 2
    assert_same_tensors(load(tmp_path / 'best.pt'), seen[1])
    assert_same_tensors(load(tmp_path / 'last.pt'), seen[3])
    monkeypatch.undo()
    sets = {'train': TRAIN, 'val': VAL, 'test': TEST}
    found = evaluate_kept(model, history, tmp_path, {part: Batches(split, 9) for part, split in sets.items()}, 'fp32')
    expected, logits = {}, {}
    for (which, epoch), (part, split) in itertools.product((('best', 1), ('last', 3)), sets.items()):
        model.load_state_dict(seen[epoch])
        with torch.no_grad():
            logits[which, part] = model.eval()((split.images / 255 - 0.5) / 0.5)
        right = (logits[which, part].argmax(1) == split.labels).float().mean().item()
        expected[f'{which}_{part}_accuracy'] = pytest.approx(right, abs=1e-6)
    assert found == expected and len(found) == 6
    assert found['best_train_accuracy'] != found['last_train_accuracy']
    kept = load(tmp_path / 'test_logits.pt')
    torch.testing.assert_close(kept['logits'], logits['best', 'test'], rtol=1e-4, atol=1e-5)
    assert torch.equal(kept['labels'], TEST.labels)


@pytest.mark.parametrize('epochs, diverged, expected', [
    (0, 'epoch 1, step 2', []), (2, 'epoch 3, step 1', ['best']), (2, '', ['best', 'last'])])
def test_a_diverged_run_has_no_latest_model_and_equal_ones_are_evaluated_once(tmp_path, epochs, diverged, expected):
    _, model = make_run(tmp_path, num_epochs=1)
    (tmp_path / 'last.pt').unlink()
    history = History([Epoch(i + 1, 0.1, 1, 0.5, 1, i / 10, 1, 1) for i in range(epochs)], diverged)  # the last is best
    found = evaluate_kept(model, history, tmp_path, {'test': Batches(TEST)}, 'fp32')
    assert list(found) == [f'{which}_test_accuracy' for which in expected]
    assert len(set(found.values())) == bool(expected)


def test_training_stops_when_patience_is_over_and_never_without(tmp_path, monkeypatch):
    for patience, epochs in ((2, 3), (None, 6)):
        scripted_validation(monkeypatch, [0.8, 0.1, 0.2, 0.3, 0.4, 0.5])
        assert len(make_run(tmp_path / str(patience), num_epochs=6, patience=patience)[0].epochs) == epochs


# --- repeating, resuming, diverging -------------------------------------------------------------------------


def test_a_seed_gives_the_same_numbers_whatever_ran_before(tmp_path):
    first, _ = make_run(tmp_path / 'a', dropout=0.2)
    torch.rand(11)
    assert numbers(make_run(tmp_path / 'c', dropout=0.2)[0]) == numbers(first)
    assert numbers(make_run(tmp_path / 'd', dropout=0.2, seed=4)[0]) != numbers(first)


def test_seeds_and_epochs_give_different_streams():
    def draw(*arguments):
        seed_everything(*arguments)
        return torch.rand(1).item()
    assert len({draw(seed, epoch) for seed in (0, 1, 4096, 2 ** 31) for epoch in range(50)}) == 200


@pytest.mark.parametrize('where', ['epoch 3, step 2', 'epoch 3, validation'])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tmp_path, monkeypatch, where):
    calls, cross_entropy = itertools.count(1), F.cross_entropy
    bad = 8 if 'step' in where else 9  # per epoch two training steps and one validation

    def spoilt(*args, **kwargs):
        return cross_entropy(*args, **kwargs) * (math.nan if next(calls) == bad else 1)
    monkeypatch.setattr(F, 'cross_entropy', spoilt)
    history, _ = make_run(tmp_path, num_epochs=5)
    assert history.diverged == where and len(history.epochs) == 2
    assert len(History.read(tmp_path / 'history.csv').epochs) == 2
    assert (tmp_path / 'best.pt').exists() and not (tmp_path / 'last.pt').exists()
