"""What each question of the ConvNet script asks to see shows what its networks do, each of which is evaluated here."""
import statistics

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


def means(accuracies):
    return [accuracy.mean for accuracy in accuracies]


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_experiment_ends_with_its_pictures_and_the_accuracies_of_its_networks(name):
    asked = ask(ex3_convnet, name)
    assert asked.status == 0
    assert {path.stem for path in asked.folder.glob('*.png')} == PICTURES[name] | {'curves'}
    results = read_csv(Result, asked.folder / 'summary.csv')
    for which in ('best', 'last'):
        for part in ('train', 'val', 'test'):
            for run, values in truth(ex3_convnet, name, which, part).items():
                found = [100 * getattr(r, f'{which}_{part}_accuracy') for r in results if r.run == run]
                assert found == pytest.approx(values), (run, which, part)
    assert {r.seconds for r in results} == {3.0}  # of two epochs of 1.5


def test_filters_are_those_of_the_seed_before_and_of_the_best_epoch_after():
    asked = ask(ex3_convnet, 'Q1')
    (after, path), options = asked.drawn['VisualizeFilter']
    before, (run,) = options['before'].features[0].weight, asked.runs
    best = torch.load(run.folder / 'best.pt')['features.0.weight']
    assert torch.equal(before, seeded(run).features[0].weight) and options['change']
    assert torch.equal(after.features[0].weight, best) and not torch.equal(before, best)


@pytest.mark.parametrize('name', ['Q1', 'Q2a', 'fast', 'best'])
def test_mistakes_and_confusion_are_those_of_the_first_runs_best_network_on_the_test_images(name):
    asked = ask(ex3_convnet, name)
    images, labels, logits, classes, *_ = asked.drawn['plot_mistakes'][0]
    row, (value, *_) = next(iter(truth(ex3_convnet, name, 'best', 'test').items()))
    assert torch.equal(images, DATA.test.images) and torch.equal(labels, DATA.test.labels) and classes == DATA.classes
    assert 100 * (logits.argmax(1) == labels).float().mean().item() == pytest.approx(value)
    confusion = asked.drawn['plot_confusion'][0]
    assert torch.equal(confusion[0], labels) and torch.equal(confusion[1], logits) and confusion[2] == classes
    assert f'{row}, seed 0, best model' in str(asked.drawn['plot_mistakes'][0][-1])


def test_best_and_latest_are_not_swapped_and_are_means_over_seeds():
    asked = ask(ex3_convnet, 'Q2b')
    rows = asked.drawn['plot_best_and_latest'][0][0]
    assert list(rows) == ['plain', 'batch norm'] and list(rows['plain']) == ['training', 'validation', 'test']
    for i, which in enumerate(('best', 'last')):
        for name, part in (('training', 'train'), ('validation', 'val'), ('test', 'test')):
            for run, values in truth(ex3_convnet, 'Q2b', which, part).items():
                assert len(set(values)) > 1
                assert rows[run][name][i] == pytest.approx((statistics.mean(values), statistics.stdev(values)))


@pytest.mark.parametrize('name', ['Q3a', 'ingredients'])
def test_accuracies_are_those_of_the_best_networks(name):
    rows = ask(ex3_convnet, name).drawn['plot_accuracies'][0][0]
    for label, part in (('training', 'train'), ('validation', 'val')):
        assert {run: [row[label].mean] for run, row in rows.items()} == {
            run: pytest.approx(values) for run, values in truth(ex3_convnet, name, 'best', part).items()}


def test_strengths_have_a_panel_each_and_the_level_without():
    panels, level, *_ = ask(ex3_convnet, 'Q3a-strength').drawn['plot_strengths'][0]
    assert {name: x for name, (x, _) in panels.items()} == {
        'crop padding': [2, 4, 8], 'degrees': [5, 15, 30], 'translate': [0.05, 0.1, 0.2], 'jitter': [0.1, 0.3, 0.5]}
    for label, part in (('training', 'train'), ('validation', 'val')):
        none, *others = truth(ex3_convnet, 'Q3a-strength', 'best', part).values()
        assert [level[label].mean] == pytest.approx(none)
        found = [mean for _, series in panels.values() for mean in means(series[label])]
        assert found == pytest.approx(sum(others, []))


def test_accuracy_is_drawn_against_the_dropout_that_the_networks_had():
    (x, series, *_), options = ask(ex3_convnet, 'Q3b').drawn['plot_against']
    assert x == pytest.approx([p / 10 for p in range(10)]) and options['chance'] == pytest.approx(100 / 12)
    for label, part in (('training', 'train'), ('validation', 'val')):
        assert means(series[label]) == pytest.approx(sum(truth(ex3_convnet, 'Q3b', 'best', part).values(), []))


def test_each_row_of_the_gallery_shows_versions_of_the_same_images_as_it_trains_on_them():
    gallery = ask(ex3_convnet, 'Q3a').drawn['plot_gallery'][0][0]
    images = torch.stack([DATA.train.images[i // 3] / 255 for i in range(9)])
    assert list(gallery) == list(QUESTIONS['Q3a'].rows) and torch.equal(gallery['none'], images)
    for name, row in gallery.items():
        generator, expected = torch.Generator().manual_seed(0), images
        for augmentation in augmentations(Config(**QUESTIONS['Q3a'].rows[name])):
            expected = augmentation(expected, generator)
        assert torch.equal(row, expected) and torch.equal(row, images) == (name == 'none'), name
