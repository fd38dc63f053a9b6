"""The training loop against a slow loop written by hand, and what it keeps."""
import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from recording import noise
from torch import nn
from torch.nn import functional as F

import training
from datasets.augment import Flip
from datasets.batches import Batches
from lab.progress import Progress
from models.convnet import ConvNet
from models.vgg import VggModel
from optimizers import make_optimizer
from training import decay, evaluate_kept, fit, make_schedule, make_step, one_cycle, seed_everything

pytestmark = pytest.mark.usefixtures('cheap')

TRAIN, VAL, TEST = noise(50, 0), noise(30, 1), noise(23, 2)  # of twelve classes


def make_model(dropout=0.0):
    seed_everything(3)
    return ConvNet(3, [4, 4, 4, 4, 4], 12, 'BN', dropout)


def make_run(folder, *, model=None, dropout=0.0, optimizer='Adam', learning_rate=2e-3, batch_size=20, **options):
    """A tiny run, on the device of its model -> (history, model)."""
    folder.mkdir(exist_ok=True)
    model = model or make_model(dropout)
    device = next(model.parameters()).device
    train = Batches(TRAIN.to(device), batch_size, augmentations=[Flip(0.5)], shuffle=True)
    options = dict(num_epochs=3, schedule=decay(learning_rate, 0.5), seed=3) | options
    history = fit(model, train, Batches(VAL.to(device), 20), make_optimizer(optimizer, model, learning_rate, 0.1),
                  folder=folder, **options)
    return history, model


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def logits_of(model, split):
    """By hand, of the images as they are."""
    with torch.no_grad():
        return model.eval()((split.images / 255 - 0.5) / 0.5)


def share_right(logits, labels):
    return pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-6)


# --- a loop written by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize('options, rate', [
    (dict(schedule=make_schedule('decay', 2e-3, 0.5, 3, 0.4)), lambda epochs: 2e-3 * 0.5 ** int(epochs)),
    (dict(schedule=make_schedule('one-cycle', 2e-3, 0.5, 3, 0.4), label_smoothing=0.2, dropout=0.3),
     lambda epochs: 2e-3 * min(epochs / 1.2, (3 - epochs) / 1.8)),
    (dict(optimizer='SGD', schedule=decay(0.01, 0.9), ema_decay=0.3), lambda epochs: 0.01 * 0.9 ** int(epochs)),
    (dict(optimizer='Muon', schedule=one_cycle(0.05, 3, 0.0), label_smoothing=0.1, ema_decay=0.8, freeze_at=0.6),
     lambda epochs: 0.05 * (3 - epochs) / 3),
], ids=['as it comes', 'one-cycle, label smoothing and dropout', 'SGD and averaging', 'Muon and the rest'])
def test_fit_equals_a_loop_written_by_hand(tmp_path, options, rate):
    history, model = make_run(tmp_path, **options)
    slow, smoothing = make_model(options.get('dropout', 0)), options.get('label_smoothing', 0)
    optimizer = {'SGD': lambda: torch.optim.SGD(slow.parameters(), momentum=0.9, nesterov=True, weight_decay=0.1),
                 'Adam': lambda: torch.optim.Adam(slow.parameters(), weight_decay=0.1),
                 'Muon': lambda: make_optimizer('Muon', slow, 1.0)}[options.get('optimizer', 'Adam')]()
    train = Batches(TRAIN, 20, augmentations=[Flip(0.5)], shuffle=True)
    average, steps = copy.deepcopy(slow), 0
    for epoch in range(1, 4):
        seed_everything(3, epoch)
        slow.features[:2].requires_grad_('freeze_at' not in options or epoch < 3)  # 0.6 of three epochs are two
        losses, right = [], 0
        for i, (images, labels) in enumerate(train):
            for group in optimizer.param_groups:
                group['lr'] = rate(epoch - 1 + i / 2) * group.get('scale', 1)  # two steps per epoch
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
        row, logits = history.epochs[epoch - 1], logits_of(average, VAL)
        assert row.learning_rate == pytest.approx(rate(epoch - 1))
        assert row.train_loss == pytest.approx(sum(losses) / 2, rel=1e-4)
        assert row.train_accuracy == pytest.approx(right / 40)
        assert row.val_loss == pytest.approx(F.cross_entropy(logits, VAL.labels).item(), rel=1e-4)
        assert row.val_accuracy == share_right(logits, VAL.labels)
    for found, expected in ((model.state_dict(), slow), (load(tmp_path / 'last.pt'), average)):
        for key, tensor in expected.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(found[key], tensor, rtol=2e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize('precision, dtype', [('fp32', torch.float32), ('bf16', torch.bfloat16)])
def test_the_forward_pass_alone_is_in_the_precision_asked_for(tmp_path, precision, dtype, monkeypatch):
    seen, forward = [], ConvNet.forward

    def spy(self, images):
        logits = forward(self, images)
        seen.append((self.training, logits.dtype, torch.is_grad_enabled()))
        return logits
    monkeypatch.setattr(ConvNet, 'forward', spy)
    history, model = make_run(tmp_path, num_epochs=1, precision=precision)
    accuracies = evaluate_kept(model, history, tmp_path, {'test': Batches(TEST)}, precision)
    assert accuracies['best_test_accuracy'] == accuracies['last_test_accuracy'] and model.training  # as it was before
    assert seen == [(True, dtype, True)] * 2 + [(False, dtype, False)] * 3  # of testing once: best is latest
    images, labels = next(iter(Batches(TRAIN, 20)))
    loss, _ = make_step(model, make_optimizer('SGD', model, 0.1), precision)(images, labels)
    kept = [load(tmp_path / 'test_logits.pt')['logits'], *load(tmp_path / 'last.pt').values()]
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in (loss, *kept))


def test_a_frozen_backbone_run_live_keeps_its_weights_and_statistics_and_its_head_learns(tmp_path, weights):
    model = VggModel(12, fine_tune=False, weights=weights)
    before = copy.deepcopy(model.state_dict())
    make_run(tmp_path, model=model, num_epochs=2, ema_decay=0.5)
    for state in (model.state_dict(), load(tmp_path / 'last.pt')):
        changed = {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}
        assert {'classifier.0.weight', 'classifier.1.running_mean', 'classifier.3.weight'} <= changed
        assert not [key for key in changed if key.startswith('features.')]


def test_a_first_block_that_no_longer_trains_needs_a_new_step_with_the_same_options(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(training, 'make_step', lambda *given: made.append(given) or make_step(*given))
    make_run(tmp_path, num_epochs=4, freeze_at=0.5, label_smoothing=0.1, ema_decay=0.9, precision='bf16')
    assert len(made) == 2 and made[0] == made[1]  # a CUDA graph of the first would go on training the block


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
    progress = Progress('a run')
    history, _ = make_run(tmp_path, num_epochs=2, progress=progress)
    assert history['seconds'] == [2.5, 2.5]
    assert history['images_per_second'] == [16, 16]  # 40 of the 50 images: the last ten make no whole batch
    (to_come, first, _), row = capsys.readouterr().out.splitlines(), history.epochs[0]
    assert to_come.startswith('a run: ') and to_come.endswith(' left')  # told after ten steps, or here after all two
    assert first == (f'a run: epoch   1/2  loss {row.train_loss:.3f}  training {row.train_accuracy:6.1%}  '
                     f'validation  37.5%  2.5 s, 16 images/s, 2 s left')
    assert progress.bar.total == 2 * 40


def test_seeds_and_epochs_give_different_streams():
    def draw(*arguments):
        seed_everything(*arguments)
        return torch.rand(1).item()
    assert len({draw(seed, epoch) for seed in (0, 1, 4096, 2 ** 31) for epoch in range(50)}) == 200


# --- best, latest, patience, divergence ---------------------------------------------------------------------


def scripted_validation(monkeypatch, *results):
    """Let validation give these (loss, accuracy), one per epoch, and randomise its network; returns the weights."""
    seen = []

    def fake(model, *_):
        for parameter in model.parameters():
            nn.init.normal_(parameter)  # tiny networks hardly differ after so little training
        seen.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return results[len(seen) - 1]
    monkeypatch.setattr(training, 'evaluate', fake)
    return seen


def test_best_and_last_hold_the_weights_of_their_epochs_and_are_evaluated_as_what_they_are(tmp_path, monkeypatch):
    seen = scripted_validation(monkeypatch, (0.1, 0.3), (2.0, 0.8), (1.0, 0.8), (1.0, 0.8))
    history, model = make_run(tmp_path, num_epochs=4, ema_decay=0.5)
    assert_same_tensors(load(tmp_path / 'best.pt'), seen[2])  # highest accuracy, then lowest loss, then the first
    assert_same_tensors(load(tmp_path / 'last.pt'), seen[3])
    monkeypatch.undo()
    sets = {'train': TRAIN, 'val': VAL, 'test': TEST}
    found = evaluate_kept(model, history, tmp_path, {part: Batches(split, 9) for part, split in sets.items()}, 'fp32')
    expected, logits = {}, {}
    for (which, epoch), (part, split) in itertools.product((('best', 2), ('last', 3)), sets.items()):
        model.load_state_dict(seen[epoch])
        logits[which, part] = logits_of(model, split)
        expected[f'{which}_{part}_accuracy'] = share_right(logits[which, part], split.labels)
    assert found == expected and list(found.values())[:3] != list(found.values())[3:]
    kept = load(tmp_path / 'test_logits.pt')
    largest = logits['best', 'test'].abs().max().item()  # other batches are rounded otherwise, on some CPUs by more
    torch.testing.assert_close(kept['logits'], logits['best', 'test'], rtol=0, atol=1e-4 * largest)
    assert torch.equal(kept['labels'], TEST.labels)


@pytest.mark.parametrize('patience, epochs', [(0, 1), (2, 3), (None, 6)])
def test_training_stops_when_patience_is_over_and_never_without(tmp_path, monkeypatch, patience, epochs):
    scripted_validation(monkeypatch, (1.0, 0.8), *[(1.0, 0.1)] * 5)
    for _ in range(2):  # and not one epoch more where the run is continued
        assert len(make_run(tmp_path, num_epochs=6, patience=patience)[0].epochs) == epochs


@pytest.mark.parametrize('bad, epochs, where', [
    (2, 0, 'epoch 1, step 2'), (8, 2, 'epoch 3, step 2'), (9, 2, 'epoch 3, validation')])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tmp_path, monkeypatch, bad, epochs, where):
    calls, cross_entropy = itertools.count(1), F.cross_entropy  # per epoch two training steps and one validation

    def spoilt(*args, **kwargs):
        return cross_entropy(*args, **kwargs) * (math.nan if next(calls) == bad else 1)
    monkeypatch.setattr(F, 'cross_entropy', spoilt)
    history, model = make_run(tmp_path, num_epochs=5)
    assert history.diverged == where and len(history.epochs) == epochs
    assert {path.name for path in tmp_path.iterdir()} == (
        {'history.csv', 'curves.png', 'best.pt', 'checkpoint.pt'} if epochs else set())
    evaluated = evaluate_kept(model, history, tmp_path, {'test': Batches(TEST)}, 'fp32')
    assert list(evaluated) == (['best_test_accuracy'] if epochs else [])
