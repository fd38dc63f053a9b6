"""The transfer-learning script: three modes, the cache of features, and weights that cannot be had."""
from dataclasses import replace
from http.client import BadStatusLine

import pytest
import torch
import torchvision
from experiment import read_summary

import ex3_pretrained
import training
from datasets import cifar10
from ex3_pretrained import Config, build, main
from models import weights as weights_module
from models.vgg import VggModel
from training import TrainingStep, make_optimizer, seed_everything


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """The path of a state dict of torchvision's own initialisation."""
    torch.manual_seed(5)
    model = VggModel(10, fine_tune=True, pretrained=False)
    path = tmp_path_factory.mktemp('weights') / 'vgg.pt'
    torch.save({key: tensor for key, tensor in model.state_dict().items() if key.startswith('features.')}, path)
    return path


@pytest.fixture(scope='module')
def data():
    return cifar10.load('shapes', None, 24, 6)


def options(tmp_path, *more):
    return ['--data', 'shapes', '--num-training', '24', '--num-validation', '6', '--batch-size', '12',
            '--num-epochs', '1', '--precision', 'fp32', '--results', str(tmp_path), *more]


@pytest.fixture
def few_test_images(monkeypatch):
    """A forward pass of VGG over 1,000 test images takes seconds."""
    load = cifar10.load

    def load_few(*arguments):
        data = load(*arguments)
        return replace(data, test=data.test[:12])
    monkeypatch.setattr(cifar10, 'load', load_few)


def kept(tmp_path, run, name='best', experiment='Q4b'):
    path = tmp_path / 'ex3_pretrained' / experiment / run / 'seed0' / f'{name}.pt'
    return torch.load(path, weights_only=True)


def test_three_modes_move_exactly_what_they_should(tmp_path, weights, few_test_images):
    assert main(options(tmp_path, '--weights', str(weights))) == 0
    loaded = torch.load(weights)
    for name in ('best', 'last'):
        frozen, tuned, scratch = (kept(tmp_path, run, name) for run in ('frozen', 'fine-tuned', 'scratch'))
        assert all(torch.equal(frozen[key], tensor) for key, tensor in loaded.items())  # statistics included
        same = [key for key, tensor in loaded.items() if torch.equal(tuned[key], tensor)]
        assert same == []
        assert (scratch['features.0.weight'] - loaded['features.0.weight']).abs().mean() > 0.01
        model = VggModel(10, fine_tune=True, pretrained=False)
        model.load_state_dict(frozen)  # complete, although only the head was trained
    results = read_summary(tmp_path / 'ex3_pretrained' / 'Q4b' / 'summary.csv')
    assert [(r.run, r.trainable, r.parameters) for r in results] == [
        ('frozen', 134_410, 9_360_394), ('fine-tuned', 9_360_394, 9_360_394), ('scratch', 9_360_394, 9_360_394)]
    assert {p.name for p in (tmp_path / 'ex3_pretrained' / 'Q4b').glob('*.png')} == {
        'curves.png', 'accuracy.png', 'filters.png'}


def test_the_same_seed_gives_all_modes_the_same_head(weights, data):
    heads = []
    for mode in ('frozen', 'fine-tuned', 'scratch'):
        seed_everything(0)
        heads.append(ex3_pretrained.make_model(Config(mode=mode, weights=str(weights)), torch.device('cpu')).classifier)
    for head in heads[1:]:
        assert torch.equal(head[0].weight, heads[0][0].weight)


def losses(task, model, seed=0):
    optimizer = make_optimizer('Adam', [dict(params=list(model.classifier.parameters()))], 1e-3, 0.0)
    step = TrainingStep(model.train(), task.train, optimizer)
    result = []
    for epoch in (1, 2):
        seed_everything(seed, epoch)
        result += [step(index)[0].item() for index in task.train.shuffled()]
    return result


def test_cached_features_give_the_losses_of_the_live_backbone_on_the_same_flips(weights, data):
    config = Config(mode='frozen', weights=str(weights), batch_size=12)
    seed_everything(0)
    cached = build(config, data)
    seed_everything(0)
    live = build(replace(config, flip=0.5), data)
    live = live._replace(train=ex3_pretrained.normalised(data.train, 12, [ex3_pretrained.Flip(0.5)]))
    assert isinstance(cached.train, ex3_pretrained.FeatureBatches)
    torch.testing.assert_close(losses(cached, cached.model), losses(live, live.model), rtol=1e-4, atol=1e-5)


def test_features_are_those_of_the_plain_and_the_mirrored_image(weights, data):
    model = VggModel(2, fine_tune=False, weights=weights).eval()
    features, _ = ex3_pretrained.cached_features(str(weights), 'fp32', data, True)
    images = (data.train.images.float() / 255 - torch.tensor(ex3_pretrained.IMAGENET_MEAN).view(3, 1, 1)
              ) / torch.tensor(ex3_pretrained.IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        for view, oracle in enumerate((images, images.flip(3))):
            torch.testing.assert_close(features['train'].images[:, view], model.extract(oracle), rtol=1e-3, atol=1e-4)
    assert torch.equal(features['train'].labels, data.train.labels)
    assert features['val'].images.shape == (6, 1, 512)  # validation images are never mirrored


def test_without_a_flip_no_mirrored_features_are_made(weights, data):
    config = Config(mode='frozen', weights=str(weights), batch_size=12, flip=0.0)
    cached = build(config, data)
    assert cached.train.split.images.shape == (24, 1, 512)
    inputs, _ = cached.train.batch(torch.arange(3))
    assert torch.equal(inputs, cached.train.split.images[:3, 0])


def test_other_augmentation_runs_the_backbone_live(weights, data):
    task = build(Config(mode='frozen', weights=str(weights), crop_padding=4), data)
    assert not isinstance(task.train, ex3_pretrained.FeatureBatches)
    assert len(task.train.augmentations) == 2 and task.evaluation['val'].augmentations == ()


def test_the_backbone_can_learn_more_slowly_than_the_head(weights, data):
    groups = build(Config(mode='fine-tuned', weights=str(weights), backbone_lr_scale=0.1), data).groups
    assert [group.get('scale', 1.0) for group in groups] == [1.0, 0.1]
    assert sum(p.numel() for group in groups for p in group['params']) == 9_360_394


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))


def test_without_weights_the_scratch_run_goes_on_and_the_others_are_reported(tmp_path, offline, few_test_images,
                                                                            capsys):
    assert main(options(tmp_path)) == 1
    errors = capsys.readouterr().err
    url = torchvision.models.VGG11_BN_Weights.IMAGENET1K_V1.url
    assert url in errors and str(tmp_path / 'hub' / 'checkpoints') in errors and 'vgg11_bn-6002323d.pth' in errors
    results = read_summary(tmp_path / 'ex3_pretrained' / 'Q4b' / 'summary.csv')
    assert [result.status.split(':')[0] for result in results] == ['not run', 'not run', 'finished']


@pytest.mark.parametrize('downloaded', [True, False])
def test_runs_that_lacked_weights_are_made_up_for_once_they_are_there(tmp_path, offline, weights, few_test_images,
                                                                     monkeypatch, capsys, downloaded):
    assert main(options(tmp_path)) == 1
    if downloaded:
        monkeypatch.setattr(weights_module, '_imagenet_file', lambda: weights)
    assert main(options(tmp_path, *([] if downloaded else ['--weights', str(weights)]))) == 0
    assert 'scratch, seed 0: finished before, not repeated' in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()] == ['Q4b']


def test_weights_are_known_by_their_content(tmp_path, weights, few_test_images, capsys):
    arguments = options(tmp_path, '--experiment', 'Q4a', '--weights')
    assert main([*arguments, str(weights)]) == 0
    copy = tmp_path / 'moved.pt'
    copy.write_bytes(weights.read_bytes())
    assert main([*arguments, str(copy)]) == 0
    assert 'frozen, seed 0: finished before, not repeated' in capsys.readouterr().out
    torch.save({key: tensor * 1.1 for key, tensor in torch.load(weights).items()}, copy)
    assert main([*arguments, str(copy)]) == 0
    assert {folder.name for folder in (tmp_path / 'ex3_pretrained').iterdir()} == {'Q4a', 'Q4a-2'}
    summary = (tmp_path / 'ex3_pretrained' / 'Q4a-2' / 'summary.md').read_text()
    assert 'moved weights' in summary.splitlines()[0]  # every plot and table says what was started from


def test_filters_show_pretrained_beside_scratch_whichever_was_trained_first(tmp_path, offline, weights, few_test_images,
                                                                            monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(ex3_pretrained, 'VisualizeFilter', lambda *_, before, titles, **__: shown.append(
        (before is not None, titles)))
    assert main(options(tmp_path)) == 1
    assert main(options(tmp_path, '--weights', str(weights), '--seeds', '1')) == 0
    assert shown == [(False, ['scratch']), (True, ['frozen (as pretrained)', 'scratch'])]
    results = read_summary(tmp_path / 'ex3_pretrained' / 'Q4b' / 'summary.csv')
    assert list(dict.fromkeys(result.run for result in results)) == ['frozen', 'fine-tuned', 'scratch']


def test_a_proxy_that_talks_nonsense_counts_as_offline(tmp_path, offline, monkeypatch, capsys):
    def nonsense(*_args, **_kwargs):
        raise BadStatusLine('GARBAGE')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', nonsense)
    assert main(options(tmp_path, '--experiment', 'Q4a')) == 1
    assert 'could not be downloaded' in capsys.readouterr().err


@pytest.mark.parametrize('content', [b'garbage', None], ids=['garbage', 'missing'])
def test_weights_that_cannot_be_read_are_status_2(tmp_path, capsys, content):
    path = tmp_path / 'w.pth'
    if content:
        path.write_bytes(content)
    assert main(options(tmp_path, '--weights', str(path))) == 2
    errors = capsys.readouterr().err
    assert 'w.pth' in errors and errors.count('\n') == 1


@pytest.mark.parametrize('spoil', [
    lambda t: t.to_sparse(), lambda t: t.to('meta'), lambda t: t.int(), lambda t: t.bool(),
    lambda t: t.to(torch.complex64), lambda t: t * torch.nan, lambda t: t.double() * 1e300, lambda t: -t.abs() - 1],
    ids=['sparse', 'meta', 'integers', 'booleans', 'complex', 'nan', 'too large', 'negative'])
def test_tensors_that_are_no_weights_are_status_2(tmp_path, weights, capsys, spoil):
    path = tmp_path / 'spoilt.pt'
    state = torch.load(weights)
    torch.save(state | {'features.1.running_var': spoil(state['features.1.running_var'])}, path)
    assert main(options(tmp_path, '--experiment', 'Q4a', '--weights', str(path))) == 2
    errors = capsys.readouterr().err
    assert 'spoilt.pt' in errors and errors.count('\n') == 1
    assert not list(tmp_path.rglob('result.json'))


@pytest.mark.parametrize('wrong', [['--mode', 'half'], ['--batch-size', '1'], ['--layer-config', '100', '10'],
                                   ['--experiment', 'Q1'], ['--mode', 'scratch', '--experiment', 'Q4b']])
def test_wrong_constants_are_status_2(tmp_path, wrong, capsys):
    try:
        status = main(options(tmp_path, *wrong))
    except SystemExit as stop:
        status = stop.code
    assert status == 2


def test_defaults_are_the_handouts():
    c = Config()
    assert (c.layer_config, c.num_epochs, c.batch_size, c.learning_rate) == ((512, 256), 30, 200, 1e-3)
    assert (c.learning_rate_decay, c.reg, c.flip, c.experiment) == (0.99, 0.0, 0.5, 'Q4b')


def test_a_frozen_run_killed_in_the_middle_continues_as_if_nothing_had_happened(tmp_path, weights, few_test_images,
                                                                               monkeypatch, capsys):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    arguments = ['--experiment', 'Q4a', '--weights', str(weights), '--num-epochs', '3']
    assert main(options(whole, *arguments)) == 0
    report = training._report

    def stop(history, *more):
        report(history, *more)
        if len(history.epochs) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(training, '_report', stop)
    assert main(options(parts, *arguments)) == 130
    monkeypatch.setattr(training, '_report', report)
    assert main(options(parts, *arguments)) == 0
    for name in ('best', 'last'):
        first, second = (kept(folder, 'frozen', name, 'Q4a') for folder in (whole, parts))
        assert all(torch.equal(first[key], second[key]) for key in first)
