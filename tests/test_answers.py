"""What each question of the ConvNet script asks to see shows what its networks do, each of which is evaluated here."""
import statistics
from types import SimpleNamespace

import pytest
import torch
from recording import DATA, ask, seeded, truth

import ex3_convnet
from ex3_convnet import QUESTIONS, Config, augmentations
from lab.files import read_csv
from lab.results import Result

pytestmark = pytest.mark.usefixtures('cheap')

PICTURES = {'Q1': {'filters', 'mistakes', 'confusion'}, 'Q2a': {'mistakes', 'confusion'}, 'Q2b': {'best_and_latest'},
            'Q3a': {'accuracy', 'gallery'}, 'Q3a-strength': {'accuracy'}, 'Q3b': {'dropout'},
            'fast': {'mistakes', 'confusion'}, 'best': {'mistakes', 'confusion'}, 'ingredients': {'accuracy'}}
SETS = {'training': 'train', 'validation': 'val', 'test': 'test'}


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_experiment_ends_with_its_pictures_and_the_accuracies_of_its_networks(name):
    asked = ask(ex3_convnet, name)
    assert asked.status == 0
    assert {path.stem for path in asked.folder.glob('*.png')} == PICTURES[name] | {'curves'}
    results = read_csv(Result, asked.folder / 'summary.csv')
    for which in ('best', 'last'):
        for part in SETS.values():
            for run, values in truth(ex3_convnet, name, which, part).items():
                found = [100 * getattr(r, f'{which}_{part}_accuracy') for r in results if r.run == run]
                assert found == pytest.approx(values), (run, which, part)
    assert {r.seconds for r in results} == {3.0}  # of two epochs of 1.5


def test_filters_are_those_of_the_seed_before_and_of_the_best_epoch_after():
    asked = ask(ex3_convnet, 'Q1')
    (after, _), options = asked.drawn['VisualizeFilter']
    before, (run,) = options['before'].features[0].weight, asked.runs
    best = torch.load(run.folder / 'best.pt')['features.0.weight']
    assert torch.equal(before, seeded(run).features[0].weight) and options['change']
    assert torch.equal(after.features[0].weight, best) and not torch.equal(before, best)


@pytest.mark.parametrize('name', [name for name in PICTURES if 'mistakes' in PICTURES[name]])
def test_mistakes_and_confusion_are_those_of_the_first_runs_best_network_on_the_test_images(name):
    drawn = ask(ex3_convnet, name).drawn
    images, labels, logits, classes, _, title = drawn['plot_mistakes'][0]
    row, (value, *_) = next(iter(truth(ex3_convnet, name, 'best', 'test').items()))
    assert torch.equal(images, DATA.test.images) and torch.equal(labels, DATA.test.labels) and classes == DATA.classes
    assert 100 * (logits.argmax(1) == labels).float().mean().item() == pytest.approx(value)
    confusion = drawn['plot_confusion'][0]
    assert torch.equal(confusion[0], labels) and torch.equal(confusion[1], logits) and confusion[2] == classes
    assert confusion[-1] == title and f'{row}, seed 0, best model' in str(title)


def test_best_and_latest_are_not_swapped_and_are_means_over_seeds():
    rows = ask(ex3_convnet, 'Q2b').drawn['plot_best_and_latest'][0][0]
    for i, which in enumerate(('best', 'last')):
        for label, part in SETS.items():
            values = truth(ex3_convnet, 'Q2b', which, part)
            assert {run: row[label][i] for run, row in rows.items()} == {
                run: pytest.approx((statistics.mean(three), statistics.stdev(three))) for run, three in values.items()}


def test_a_seed_that_diverged_has_no_latest_model_so_that_neither_of_its_models_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(ex3_convnet, 'plot_best_and_latest', lambda rows, *_: rows)
    results = [Result('plain', seed, 'finished' if latest else 'diverged', best_test_accuracy=best,
                      last_test_accuracy=latest, test_images=100)
               for seed, (best, latest) in enumerate([(0.8, 0.7), (0.9, 0.8), (0.2, None)])]
    experiment = SimpleNamespace(results=results, histories={'plain': []}, folder=tmp_path, title='')
    best, latest = ex3_convnet.best_and_latest(experiment)['plain']['test']
    assert (best.mean, latest.mean) == pytest.approx((85, 75))


def means(name, label):
    """Of the best networks, evaluated here, in percent, in the order of the experiment's rows."""
    return pytest.approx(sum(truth(ex3_convnet, name, 'best', SETS[label]).values(), []))


@pytest.mark.parametrize('label', ['training', 'validation'])
def test_accuracies_are_those_of_the_best_networks_and_stand_at_what_these_had(label):
    for name in ('Q3a', 'ingredients'):
        rows = ask(ex3_convnet, name).drawn['plot_accuracies'][0][0]
        assert list(rows) == list(QUESTIONS[name].rows)
        assert [row[label].mean for row in rows.values()] == means(name, label)

    panels, level, *_ = ask(ex3_convnet, 'Q3a-strength').drawn['plot_strengths'][0]
    assert {name: x for name, (x, _) in panels.items()} == {
        'crop padding': [2, 4, 8], 'degrees': [5, 15, 30], 'translate': [0.05, 0.1, 0.2], 'jitter': [0.1, 0.3, 0.5]}
    shown = [level[label], *(accuracy for _, series in panels.values() for accuracy in series[label])]
    assert [accuracy.mean for accuracy in shown] == means('Q3a-strength', label)

    (x, series, *_), options = ask(ex3_convnet, 'Q3b').drawn['plot_against']
    assert x == pytest.approx([p / 10 for p in range(10)]) and options['chance'] == pytest.approx(100 / 12)
    assert [accuracy.mean for accuracy in series[label]] == means('Q3b', label)


def test_a_row_without_a_strength_is_left_out_of_the_picture_of_strengths(tmp_path, monkeypatch):
    monkeypatch.setattr(ex3_convnet, 'plot_strengths', lambda panels, *_: panels)
    experiment = SimpleNamespace(histories=dict.fromkeys(['none', 'crop_padding 2', 'flip + crop']), folder=tmp_path,
                                 title='', accuracy=lambda run, which, part: (run, part))
    assert ex3_convnet.strengths(experiment) == {'crop padding': ([2.0], {
        'training': [('crop_padding 2', 'train')], 'validation': [('crop_padding 2', 'val')]})}


def test_each_row_of_the_gallery_shows_versions_of_the_same_images_as_it_trains_on_them():
    gallery = ask(ex3_convnet, 'Q3a').drawn['plot_gallery'][0][0]
    images = torch.stack([DATA.train.images[i // 3] / 255 for i in range(9)])
    assert list(gallery) == list(QUESTIONS['Q3a'].rows) and torch.equal(gallery['none'], images)
    for name, row in gallery.items():
        generator, expected = torch.Generator().manual_seed(0), images
        for augmentation in augmentations(Config(**QUESTIONS['Q3a'].rows[name])):
            expected = augmentation(expected, generator)
        assert torch.equal(row, expected) and torch.equal(row, images) == (name == 'none'), name
