"""The transfer-learning script: three modes, constants that arrive, the features, and weights that cannot be had."""
from dataclasses import replace
from http.client import BadStatusLine

import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from torchvision.models import VGG11_BN_Weights

import ex3_pretrained
from datasets import cifar10
from datasets.augment import Crop, Cutout, Flip
from ex3_pretrained import QUESTIONS, Config, main, make_batches, make_feature_batches, make_model
from lab.files import read_csv
from lab.progress import Progress
from lab.results import Result
from models import weights as weights_module
from models.features import FeatureBatches
from models.vgg import VggModel
from optimizers import make_optimizer
from training import fit, make_step, seed_everything

TORCHVISION = VGG11_BN_Weights.IMAGENET1K_V1.transforms()  # its mean and std are the oracle


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    monkeypatch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))


@pytest.fixture
def data():
    return cifar10.load('shapes', None, 24, 6)


def options(tmp_path, *more):
    return ['--data', 'shapes', '--num-training', '24', '--num-validation', '6', '--batch-size', '12', '--layer-config',
            '512', '8', '--num-epochs', '1', '--precision', 'fp32', '--device', 'cpu', '--results', str(tmp_path),
            *more]


def kept(tmp_path, run, name='best', experiment='Q4b'):
    return torch.load(tmp_path / 'ex3_pretrained' / experiment / run / 'seed0' / f'{name}.pt', weights_only=True)


def results_of(tmp_path, experiment):
    return read_csv(Result, tmp_path / 'ex3_pretrained' / experiment / 'summary.csv')


# --- three modes --------------------------------------------------------------------------------------------


def test_three_modes_move_exactly_what_they_should(tmp_path, weights):
    assert main(options(tmp_path, '--weights', str(weights))) == 0
    loaded = torch.load(weights)
    for name in ('best', 'last'):
        frozen, tuned, scratch = (kept(tmp_path, run, name) for run in ('frozen', 'fine-tuned', 'scratch'))
        assert all(torch.equal(frozen[key], tensor) for key, tensor in loaded.items())  # statistics included
        assert [key for key, tensor in loaded.items() if torch.equal(tuned[key], tensor)] == []
        assert (scratch['features.0.weight'] - loaded['features.0.weight']).abs().mean() > 0.01
        model = VggModel(10, fine_tune=True, pretrained=False, layer_config=(512, 8))
        model.load_state_dict(frozen)  # complete, although only the head was trained
    head = sum(tensor.numel() for key, tensor in frozen.items() if key.startswith('classifier') and 'running' not in key
               and 'tracked' not in key)
    assert [(r.run, r.trainable == head, r.trainable == r.parameters) for r in results_of(tmp_path, 'Q4b')] == [
        ('frozen', True, False), ('fine-tuned', False, True), ('scratch', False, True)]
    assert {p.name for p in (tmp_path / 'ex3_pretrained' / 'Q4b').glob('*.png')} == {
        'curves.png', 'accuracy.png', 'filters.png', 'mistakes.png', 'confusion.png'}


def test_a_frozen_backbone_that_runs_live_does_not_move(tmp_path, weights):
    assert main(options(tmp_path, '--weights', str(weights), '--experiment', 'Q4a', '--crop-padding', '2',
                        '--learning-rate', '0.1')) == 0
    found, loaded = kept(tmp_path, 'frozen', 'last', 'Q4a'), torch.load(weights)
    assert all(torch.equal(found[key], tensor) for key, tensor in loaded.items())  # its batch norm neither


def test_the_same_seed_gives_all_modes_the_same_head(weights):
    heads = []
    for mode in ('frozen', 'fine-tuned', 'scratch'):
        seed_everything(0)
        heads.append(make_model(Config(mode=mode, weights=str(weights)), torch.device('cpu')).classifier)
    assert all(torch.equal(head[0].weight, heads[0][0].weight) for head in heads[1:])


def test_the_rows_are_the_assignments():
    c = Config()
    assert (c.layer_config, c.num_epochs, c.batch_size, c.learning_rate) == ((512, 256), 30, 200, 1e-3)
    assert (c.learning_rate_decay, c.reg, c.flip, c.experiment, c.weights) == (0.99, 0.0, 0.5, 'Q4b', 'imagenet')
    rows = {name: {run: Config(**row) for run, row in question.rows.items()} for name, question in QUESTIONS.items()}
    assert rows['Q4a'] == {'frozen': Config(mode='frozen')}
    assert rows['Q4b'] == {mode: Config(mode=mode) for mode in ('frozen', 'fine-tuned', 'scratch')}
    assert rows['best']['best'].mode == 'fine-tuned'


# --- constants arrive ---------------------------------------------------------------------------------------


def test_every_constant_reaches_what_it_is_for(tmp_path, weights, monkeypatch):
    calls = []

    def spy(*arguments, **given):
        calls.append((arguments, given))
        return fit(*arguments, **given)
    monkeypatch.setattr(ex3_pretrained, 'fit', spy)
    assert main(options(
        tmp_path, '--experiment', 'best', '--weights', str(weights), '--seeds', '3', '--num-epochs', '2',
        '--learning-rate', '0.02', '--backbone-lr-scale', '0.25', '--reg', '0.03', '--warmup', '0.5',
        '--label-smoothing', '0.3', '--ema-decay', '0.6', '--patience', '4', '--flip', '0.2', '--crop-padding', '3',
        '--cutout', '5', '--precision', 'bf16')) == 0
    ((model, batches, val, optimizer, schedule, folder), given), = calls
    given.pop('progress')
    assert given == dict(num_epochs=2, seed=3, precision='bf16', patience=4, label_smoothing=0.3, ema_decay=0.6)
    assert folder.name == 'seed3' and model.classifier[0].out_features == 8
    assert batches.augmentations == (Flip(0.2), Crop(3), Cutout(5)) and batches.batch_size == 12
    assert (len(batches.split), len(val.split), val.augmentations) == (24, 6, ())
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group['scale'], group['weight_decay']) for group in optimizer.param_groups} == {(0.25, 0.03), (1.0, 0.03)}
    slow = {id(p) for group in optimizer.param_groups if group['scale'] == 0.25 for p in group['params']}
    assert slow == {id(p) for p in model.features.parameters()}
    assert [schedule(x) for x in (0.5, 1, 1.5, 2)] == pytest.approx([0.01, 0.02, 0.01, 0])


@pytest.mark.parametrize('mode, scales', [('fine-tuned', {0.5, 1.0}), ('scratch', {1.0})])
def test_only_a_pretrained_backbone_learns_more_slowly(tmp_path, weights, monkeypatch, mode, scales):
    seen = []
    monkeypatch.setattr(ex3_pretrained, 'fit', lambda *a, **k: seen.append(a[3]) or fit(*a, **k))
    assert main(options(tmp_path, '--experiment', 'best', '--mode', mode, '--weights', str(weights),
                        '--backbone-lr-scale', '0.5')) == 0
    assert {group['scale'] for group in seen[0].param_groups} == scales


def test_images_are_normalised_as_torchvision_does_for_these_weights(data):
    batches, evaluation = make_batches(Config(mode='fine-tuned', flip=0), data)
    images = data.train.images[:4]
    expected = torchvision.transforms.functional.normalize(images / 255, TORCHVISION.mean, TORCHVISION.std)
    for each in (batches, *evaluation.values()):
        torch.testing.assert_close(each.inputs(images), expected)
    assert batches.shuffle and not any(each.shuffle for each in evaluation.values())


# --- features of a frozen backbone --------------------------------------------------------------------------


def losses(model, batches):
    step = make_step(model.train(), make_optimizer('Adam', model, 1e-3))
    result = []
    for epoch in (1, 2):
        seed_everything(0, epoch)
        result += [step(images, labels)[0].item() for images, labels in batches]
    return result


def test_features_give_the_losses_of_the_live_backbone_on_the_same_flips(weights, data):
    config, found = Config(mode='frozen', weights=str(weights), batch_size=12, precision='fp32'), []
    for batches in (make_feature_batches(config, data)[0], make_batches(config, data)[0]):
        seed_everything(0)
        found.append(losses(make_model(config, torch.device('cpu')), batches))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_features_are_those_of_the_plain_and_the_mirrored_image(weights, data):
    model = VggModel(2, fine_tune=False, weights=weights).eval()
    config = Config(mode='frozen', weights=str(weights), batch_size=12, precision='fp32')
    batches, evaluation, seconds = make_feature_batches(config, data)
    images = torchvision.transforms.functional.normalize(data.train.images / 255, TORCHVISION.mean, TORCHVISION.std)
    with torch.no_grad():
        for view, oracle in enumerate((images, images.flip(3))):
            torch.testing.assert_close(batches.split.images[:, view], model.extract(oracle), rtol=1e-3, atol=1e-4)
    assert torch.equal(batches.split.labels, data.train.labels) and seconds > 0
    assert evaluation['val'].split.images.shape == (6, 1, 512)  # validation images are never mirrored
    inputs, _ = next(iter(evaluation['train']))
    assert torch.equal(inputs, batches.split.images[:, 0])
    assert make_feature_batches(replace(config, flip=0.0), data)[0].split.images.shape == (24, 1, 512)


def test_the_time_for_the_features_counts_as_training(tmp_path, weights, monkeypatch):
    make = ex3_pretrained.make_feature_batches
    monkeypatch.setattr(ex3_pretrained, 'make_feature_batches', lambda *a: (*make(*a)[:2], 1000.0))
    assert main(options(tmp_path, '--experiment', 'Q4a', '--weights', str(weights))) == 0
    (result,) = results_of(tmp_path, 'Q4a')
    assert 1000 < result.seconds < 1100


@pytest.mark.parametrize('more, cached', [([], True), (['--crop-padding', '4'], False), (['--cutout', '4'], False)])
def test_other_augmentation_than_a_flip_runs_the_backbone_live(tmp_path, weights, monkeypatch, more, cached):
    seen = []
    monkeypatch.setattr(ex3_pretrained, 'fit', lambda *a, **k: seen.append(a[1]) or fit(*a, **k))
    assert main(options(tmp_path, '--experiment', 'Q4a', '--weights', str(weights), *more)) == 0
    assert isinstance(seen[0], FeatureBatches) == cached


def test_a_frozen_run_interrupted_in_the_middle_continues_as_if_nothing_had_happened(tmp_path, weights, monkeypatch):
    arguments = ['--experiment', 'Q4a', '--weights', str(weights), '--num-epochs', '3']
    assert main(options(tmp_path / 'whole', *arguments)) == 0
    end_epoch = Progress.end_epoch

    def stop(progress, history):
        end_epoch(progress, history)
        if len(history.epochs) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Progress, 'end_epoch', stop)
        assert main(options(tmp_path / 'parts', *arguments)) == 130
    assert main(options(tmp_path / 'parts', *arguments)) == 0
    for name in ('best', 'last'):
        first, second = (kept(tmp_path / folder, 'frozen', name, 'Q4a') for folder in ('whole', 'parts'))
        assert all(torch.equal(first[key], second[key]) for key in first)


# --- weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))


def test_without_weights_the_scratch_run_goes_on_and_the_others_are_reported(tmp_path, offline, weights, capsys):
    assert main(options(tmp_path)) == 1
    errors = capsys.readouterr().err
    url = VGG11_BN_Weights.IMAGENET1K_V1.url
    assert url in errors and str(tmp_path / 'hub' / 'checkpoints') in errors and 'vgg11_bn-6002323d.pth' in errors
    assert [result.status for result in results_of(tmp_path, 'Q4b')] == ['not run', 'not run', 'finished']


@pytest.mark.parametrize('downloaded', [True, False])
def test_runs_that_lacked_weights_are_made_up_for_once_they_are_there(tmp_path, offline, weights, monkeypatch, capsys,
                                                                     downloaded):
    shown = []
    monkeypatch.setattr(ex3_pretrained, 'VisualizeFilter', lambda *_, before, titles, **__: shown.append(
        (before is not None, titles)) or tmp_path)
    assert main(options(tmp_path)) == 1
    if downloaded:
        monkeypatch.setattr(weights_module, '_imagenet_file', lambda: weights)
    assert main(options(tmp_path, *([] if downloaded else ['--weights', str(weights)]))) == 0
    assert 'scratch, seed 0: already finished, skipped' in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()] == ['Q4b']
    assert shown == [(False, ['scratch']), (True, ['frozen (as pretrained)', 'scratch'])]
    assert [result.run for result in results_of(tmp_path, 'Q4b')] == ['frozen', 'fine-tuned', 'scratch']


def test_weights_are_known_by_their_content_and_stand_in_every_title(tmp_path, weights, capsys):
    arguments = options(tmp_path, '--experiment', 'Q4a', '--weights')
    assert main([*arguments, str(weights)]) == 0
    copy = tmp_path / 'moved.pt'
    copy.write_bytes(weights.read_bytes())
    assert main([*arguments, str(copy)]) == 0
    assert 'frozen, seed 0: already finished, skipped' in capsys.readouterr().out
    torch.save({key: tensor * 1.1 for key, tensor in torch.load(weights).items()}, copy)
    assert main([*arguments, str(copy)]) == 0
    assert {folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()} == {'Q4a', 'Q4a-2'}
    assert 'moved weights' in (tmp_path / 'ex3_pretrained' / 'Q4a-2' / 'summary.md').read_text()


def test_a_proxy_that_talks_nonsense_counts_as_offline(tmp_path, offline, weights, monkeypatch, capsys):
    def nonsense(*_args, **_kwargs):
        raise BadStatusLine('GARBAGE')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', nonsense)
    assert main(options(tmp_path, '--experiment', 'Q4a')) == 1
    assert 'could not be downloaded' in capsys.readouterr().err


@pytest.mark.parametrize('wrong', [['--mode', 'half'], ['--batch-size', '1'], ['--layer-config', '100', '10'],
                                   ['--experiment', 'Q1'], ['--mode', 'scratch', '--experiment', 'Q4b'],
                                   ['--weights', '/no/such/file']])
def test_wrong_constants_are_status_2_and_one_sentence(tmp_path, wrong, capsys):
    assert main(options(tmp_path, *wrong)) == 2
    assert capsys.readouterr().err.count('\n') == 1 and list(tmp_path.iterdir()) == []
