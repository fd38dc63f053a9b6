"""The transfer-learning script: features, results and pictures, and weights that are not to be had."""
from dataclasses import replace
from http.client import BadStatusLine
from types import SimpleNamespace

import pytest
import torch
from recording import DATA, IMAGENET, ask, scales, small_vgg, truth
from tiny import assert_refused, pretrained
from torchvision.models import VGG11_BN_Weights
from torchvision.transforms.functional import normalize

import ex3_pretrained
import models.features
from datasets.augment import Crop, Cutout, Flip
from ex3_pretrained import QUESTIONS, Config, make_model
from lab.files import read_csv
from lab.progress import Progress
from lab.results import Result
from models.features import FeatureBatches
from models.vgg import VggModel
from optimizers import make_optimizer
from training import decay, fit, seed_everything

pytestmark = pytest.mark.usefixtures('cheap')

PICTURES = {'Q4a': {'accuracy'}, 'Q4b': {'accuracy', 'filters', 'mistakes', 'confusion'}, 'best': {'accuracy'}}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    return small_vgg(monkeypatch, tmp_path)


def summary_of(results, name='Q4b'):
    return {result.run: result for result in read_csv(Result, results / 'ex3_pretrained' / name / 'summary.csv')}


@pytest.mark.parametrize('wrong', [
    ['--mode', 'half'], ['--batch-size', '1'], ['--num-training', '1'], ['--layer-config', '100', '10'],
    ['--experiment', 'Q1'], ['--mode', 'scratch', '--experiment', 'Q4b'], ['--weights', '/no/such/file'],
    ['--weights', 'damaged']], ids=str)
def test_what_makes_no_sense_is_one_sentence_and_status_2_and_leaves_no_trace(tmp_path, weights, wrong, capsys,
                                                                              monkeypatch):
    (tmp_path / 'damaged').write_bytes(weights.read_bytes()[:-30])
    monkeypatch.chdir(tmp_path)
    assert_refused(pretrained(tmp_path / 'results', '--weights', weights, *wrong), capsys)
    assert not (tmp_path / 'results').exists()


# --- features -----------------------------------------------------------------------------------------------


def test_features_are_those_of_every_image_and_to_train_on_also_of_its_mirror_image():
    (run,) = ask(ex3_pretrained, 'Q4a').runs
    for part, batches in ('train', run.batches), ('val', run.val), *run.evaluation.items():
        split, found = getattr(DATA, part), batches.split
        views = [split.images, split.images.flip(3)][:2 if part == 'train' else 1]
        assert found.images.shape[1] == len(views) and torch.equal(found.labels, split.labels)
        with torch.no_grad():
            for i, view in enumerate(views):
                expected = run.network.eval().extract(normalize(view / 255, *IMAGENET))
                torch.testing.assert_close(found.images[:, i], expected, rtol=1e-3, atol=1e-4)
        if batches is not run.batches:  # those to evaluate on are never mirrored
            assert torch.equal(torch.cat([features for features, _ in batches]), found.images[:, 0])


@pytest.mark.parametrize('options, expected', [
    (['--flip', '0'], (510, 1, 512)), (['--flip', '0.4', '--precision', 'bf16'], (510, 2, 512)),
    (['--crop-padding', '4'], (Flip(0.5), Crop(4))), (['--cutout', '6', '--flip', '0'], (Cutout(6),))], ids=str)
def test_other_augmentation_runs_the_backbone_live_and_none_needs_no_mirror_images(options, expected):
    (run,) = ask(ex3_pretrained, 'Q4a', *options).runs
    cached = isinstance(run.batches, FeatureBatches)
    assert (run.batches.split.images.shape if cached else run.batches.augmentations) == expected
    assert set(scales(run)) == {'classifier'}
    if cached:
        assert run.batches.flip == float(options[1]) and run.given.extracted[3] == ('bf16' if options[2:] else 'fp32')


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_features_are_computed_in_the_precision_asked_for_and_kept_in_fp32_and_their_time_is_taken(
        weights, monkeypatch, precision):
    seen, extract, clock = set(), VggModel.extract, iter([10.0, 17.5, 100.0, 200.0, 300.0])
    monkeypatch.setattr(VggModel, 'extract', lambda *a: seen.add(torch.is_autocast_enabled('cpu')) or extract(*a))
    monkeypatch.setattr(models.features, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    config = Config(weights=str(weights), precision=precision)
    batches, _, seconds = ex3_pretrained.make_feature_batches(config, replace(DATA))
    assert seen == {precision == 'bf16'} and batches.split.images.dtype == torch.float32
    assert seconds == 7.5  # of those to train on


def unfreeze_a_layer(config, device):
    model = make_model(config, device)
    next(reversed(list(model.features.parameters()))).requires_grad_(True)
    return model


@pytest.mark.parametrize('name, own', [
    ('augmentations', lambda _config: [Flip(0.5), Cutout(8)]), ('make_model', unfreeze_a_layer)])
def test_a_frozen_run_that_changes_its_images_or_trains_more_layers_does_not_use_features(tmp_path, weights,
                                                                                         monkeypatch, name, own):
    monkeypatch.setattr(ex3_pretrained, 'make_feature_batches', None)  # whatever computes features fails
    monkeypatch.setattr(ex3_pretrained, name, own)
    assert pretrained(tmp_path, '--weights', weights, '--experiment', 'Q4a') == 0


def test_training_on_features_equals_training_with_the_live_backbone_on_the_same_flips(tmp_path, weights):
    config, histories = Config(weights=str(weights), num_classes=12, batch_size=100), []
    for make in (ex3_pretrained.make_feature_batches, ex3_pretrained.make_batches):
        seed_everything(0)
        model = ex3_pretrained.make_model(config, torch.device('cpu'))
        batches, evaluation, *_ = make(config, DATA)
        folder = tmp_path / make.__name__
        folder.mkdir()
        histories.append(fit(model, batches, evaluation['val'], make_optimizer('Adam', model, 1e-2), decay(1e-2, 0.9),
                             folder, num_epochs=2, seed=3))
    for column in ('train_loss', 'train_accuracy', 'val_loss'):
        assert histories[0][column] == pytest.approx(histories[1][column], rel=1e-4), column


def test_each_seed_starts_from_another_network_and_trains_with_its_own():
    one, other = ask(ex3_pretrained, 'Q4a', '--seeds', '0', '1').runs
    weights = [next(module for module in run.network.classifier if hasattr(module, 'weight')).weight
               for run in (one, other)]
    assert not torch.equal(*weights) and (one.seed, other.seed) == (0, 1)


# --- results and pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_experiment_ends_with_its_pictures_and_the_accuracies_of_its_networks(name):
    asked = ask(ex3_pretrained, name)
    assert asked.status == 0
    assert {path.stem for path in asked.folder.glob('*.png')} == PICTURES[name] | {'curves'}
    results, shown = read_csv(Result, asked.folder / 'summary.csv'), asked.drawn['plot_accuracies'][0][0]
    for part, label in (('train', 'training'), ('val', 'validation'), ('test', 'test')):
        for which in ('best', 'last'):
            for run, (value,) in truth(ex3_pretrained, name, which, part).items():
                (result,) = [result for result in results if result.run == run]
                assert 100 * getattr(result, f'{which}_{part}_accuracy') == pytest.approx(value, abs=0.3)
                assert which == 'last' or shown[run][label].mean == pytest.approx(value, abs=0.3)
    preparing = dict(frozen=getattr(asked.runs[0].given, 'seconds', 0))  # its features
    assert all(result.seconds == pytest.approx(3 + preparing.get(result.run, 0)) for result in results)


def test_filters_show_the_pretrained_ones_beside_those_from_scratch():
    asked = ask(ex3_pretrained, 'Q4b')
    (scratch, _), options = asked.drawn['VisualizeFilter']
    for model, run in ((options['before'], asked.runs[0]), (scratch, asked.runs[2])):
        assert torch.equal(model.features[0].weight, torch.load(run.folder / 'best.pt')['features.0.weight'])
    assert options['titles'] == ['frozen (as pretrained)', 'scratch']


def test_three_modes_train_exactly_what_they_should_and_a_frozen_run_continues_bit_for_bit(
        tmp_path, weights, monkeypatch):
    def stop_in_the_second(progress, history):
        if len(history.epochs) == 2:
            raise KeyboardInterrupt

    def kept(results, run, name):
        return torch.load(results / f'ex3_pretrained/Q4b/{run}/seed0/{name}.pt')
    with monkeypatch.context() as patch:
        patch.setattr(Progress, 'end_epoch', stop_in_the_second)
        assert pretrained(tmp_path / 'parts', '--weights', weights) == 130
    for results in (tmp_path / 'whole', tmp_path / 'parts'):
        assert pretrained(results, '--weights', weights) == 0
    state = torch.load(weights)
    for name in ('best', 'last'):
        frozen, tuned, scratch = (kept(tmp_path / 'whole', run, name) for run in ('frozen', 'fine-tuned', 'scratch'))
        assert all(torch.equal(frozen[key], tensor) for key, tensor in state.items())  # statistics included
        assert not [key for key, tensor in state.items() if torch.equal(tuned[key], tensor)]
        assert (scratch['features.0.weight'] - state['features.0.weight']).abs().mean() > 0.01
        assert all(torch.equal(frozen[key], tensor) for key, tensor in kept(tmp_path / 'parts', 'frozen', name).items())
    head, everything = 512 * 4 + 4 + 2 * 4 + 4 * 10 + 10, summary_of(tmp_path / 'whole')['scratch'].parameters
    assert [result.trainable for result in summary_of(tmp_path / 'whole').values()] == [head, everything, everything]
    name = f'{weights.stem} weights'  # of which scratch makes no use
    sources = [result.data.partition(', ')[2] for result in summary_of(tmp_path / 'whole').values()]
    assert sources == [name, name, '']
    assert f', {name}: ' in (tmp_path / 'whole/ex3_pretrained/Q4b/summary.md').read_text()


# --- weights that cannot be had, or have moved --------------------------------------------------------------


def test_without_weights_only_scratch_runs_and_the_others_follow_later(tmp_path, weights, monkeypatch, capsys):
    def refuse(*_args, **_kwargs):
        raise BadStatusLine('a proxy that talks nonsense')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    assert pretrained(tmp_path) == 1
    errors = capsys.readouterr().err
    for words in (VGG11_BN_Weights.IMAGENET1K_V1.url, tmp_path / 'hub' / 'checkpoints', 'vgg11_bn-6002323d.pth',
                  'could not be downloaded', 'fine-tuned, seed 0: not run'):
        assert str(words) in errors
    assert [result.status for result in summary_of(tmp_path).values()] == ['not run', 'not run', 'finished']
    assert pretrained(tmp_path, '--weights', weights) == 0
    assert 'scratch, seed 0: already finished, skipped' in capsys.readouterr().out
    assert {result.status for result in summary_of(tmp_path).values()} == {'finished'}
    assert [folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()] == ['Q4b']


def test_weights_are_known_by_their_content_and_named_in_the_title(tmp_path, weights, capsys):
    other, moved = tmp_path / 'other.pt', tmp_path / 'moved.pt'
    moved.write_bytes(weights.read_bytes())
    torch.save({key: tensor * 1.1 for key, tensor in torch.load(weights).items()}, other)
    for path, folders in ((weights, {'Q4a'}), (moved, {'Q4a'}), (other, {'Q4a', 'Q4a-2'})):
        assert pretrained(tmp_path, '--experiment', 'Q4a', '--weights', path) == 0
        assert {folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()} == folders
    assert capsys.readouterr().out.count('already finished, skipped') == 1
    assert 'other weights' in (tmp_path / 'ex3_pretrained/Q4a-2/summary.md').read_text()
