"""The rows of summary.csv and the tables made of them, against numbers worked out by hand."""
import math
from dataclasses import replace

import pytest

from lab.results import Result, accuracy, standard_error, summary

RESULT = Result('plain', 0, data='CIFAR-10', training_images=1600, validation_images=400, test_images=1000,
                parameters=10, trainable=8, epochs=4, best_epoch=2, best_train_accuracy=0.91, best_val_accuracy=0.72,
                best_test_accuracy=0.73, last_train_accuracy=0.99, last_val_accuracy=0.64, last_test_accuracy=0.65,
                seconds=12.4)


@pytest.mark.parametrize('share, count, expected', [
    (0.5, 1000, 0.015796), (0.8, 1000, 0.012646), (1.0, 100, 0.00495), (0.0, 100, 0.00495)])
def test_the_standard_error_is_wilsons_and_never_zero(share, count, expected):
    assert standard_error(share, count) == pytest.approx(expected, rel=1e-3)


def test_the_summary_keeps_best_and_latest_apart_names_what_failed_and_says_what_is_chance():
    pair = [replace(RESULT, run='pair', best_test_accuracy=share) for share in (0.73, 0.83)]
    text = summary([RESULT, *pair, Result('other', 0, status='diverged', best_train_accuracy=0.0)])
    table, _, note = text.partition('\n\n')
    rows = table.splitlines()
    head, _, plain, seeds, other = [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]
    assert head[3:11] == ['epochs', 'best epoch', 'best: train', 'val', 'test', 'latest: train', 'val', 'test']
    assert plain == ['plain', '1', '8 / 10', '4', '2', '91.0', '72.0', '73.0', '99.0', '64.0', '65.0', '12']
    assert (seeds[:2], seeds[7]) == (['pair', '2'], '78.0 ± 7.1')  # the sample's deviation
    assert other[:2] == ['other (diverged)', '1'] and other[5:7] == ['0.0', '–']
    error = 100 * standard_error(0.72, 400)
    assert f'With 400 validation images, one standard error of a validation accuracy is {error:.1f} points' in note
    assert f'difference between two of them at most {math.sqrt(2) * error:.1f}' in note
    assert len({*map(len, rows)}) == 1  # readable as text, too


def test_a_plotted_accuracy_has_the_deviation_over_seeds_or_the_error_of_its_images():
    several = [RESULT, replace(RESULT, seed=1, best_val_accuracy=0.76, last_val_accuracy=0.70)]
    assert accuracy(several, 'plain', 'best', 'val') == pytest.approx((74, 8 ** 0.5))
    assert accuracy(several, 'plain', 'last', 'val') == pytest.approx((67, 18 ** 0.5))
    assert accuracy([RESULT], 'plain', 'best', 'test') == pytest.approx((73, 100 * standard_error(0.73, 1000)))
    assert accuracy([RESULT], 'plain', 'last', 'train') == pytest.approx((99, 100 * standard_error(0.99, 1600)))
    assert math.isnan(accuracy([RESULT], 'other', 'best', 'val').mean)
