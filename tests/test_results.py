"""The rows of summary.csv and the tables made of them, against numbers worked out by hand."""
import math
from dataclasses import replace

import pytest

from lab.files import read_csv, to_csv
from lab.results import Result, accuracy, mean_std, standard_error, summary, summary_table

RESULT = Result('plain', 0, data='CIFAR-10', training_images=1600, validation_images=400, test_images=1000,
                parameters=10, trainable=8, epochs=4, best_epoch=2, best_train_accuracy=0.91, best_val_accuracy=0.72,
                best_test_accuracy=0.73, last_train_accuracy=0.99, last_val_accuracy=0.64, last_test_accuracy=0.65,
                seconds=12.4)


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_mean_and_deviation_are_the_samples():
    assert mean_std([0.81, 0.84, 0.82], scale=100) == '82.3 ± 1.5'  # sqrt((1.33² + 1.67² + 0.33²) / 2) = 1.53
    assert (mean_std([0.5], scale=100), mean_std([None, 0.5], scale=100), mean_std([])) == ('50.0', '50.0', '–')


@pytest.mark.parametrize('share, count, expected', [
    (0.5, 1000, 0.015796), (0.8, 1000, 0.012646), (1.0, 100, 0.00495), (0.0, 100, 0.00495)])
def test_the_standard_error_is_wilsons_and_never_zero(share, count, expected):
    z, n = 1, count
    interval = math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)  # half of it
    assert standard_error(share, count) == pytest.approx(interval) == pytest.approx(expected, rel=1e-3)


def test_the_table_shows_what_was_used_and_keeps_best_and_latest_apart():
    head, _, line = summary_table([RESULT]).splitlines()
    assert dict(zip(cells(head)[3:5], cells(line)[3:5], strict=True)) == {'epochs': '4', 'best epoch': '2'}
    assert cells(line) == ['plain', '1', '8 / 10', '4', '2', '91.0', '72.0', '73.0', '99.0', '64.0', '65.0', '12']
    assert cells(head)[5:11] == ['best: train', 'val', 'test', 'latest: train', 'val', 'test']


def test_seeds_share_a_line_and_what_failed_is_named():
    results = [RESULT, replace(RESULT, seed=1, best_test_accuracy=0.83), Result('other', 0, status='diverged')]
    table = summary_table(results).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    assert cells(table[2])[:2] == ['plain', '2'] and cells(table[2])[7] == '78.0 ± 7.1'
    assert cells(table[3])[:2] == ['other (diverged)', '1'] and cells(table[3])[5] == '–'


def test_the_summary_says_what_is_chance():
    text = summary([RESULT]).replace('\n', ' ')
    error = 100 * standard_error(0.72, 400)
    assert f'With 400 validation images, one standard error of a validation accuracy is {error:.1f} points' in text
    assert f'difference between two of them {math.sqrt(2) * error:.1f}' in text


def test_a_plotted_accuracy_has_the_deviation_over_seeds_or_the_error_of_its_images():
    several = [RESULT, replace(RESULT, seed=1, best_val_accuracy=0.76, last_val_accuracy=0.70)]
    assert accuracy(several, 'plain', 'best', 'val') == pytest.approx((74, 8 ** 0.5))
    assert accuracy(several, 'plain', 'last', 'val') == pytest.approx((67, 18 ** 0.5))
    assert accuracy([RESULT], 'plain', 'best', 'test') == pytest.approx((73, 100 * standard_error(0.73, 1000)))
    assert accuracy([RESULT], 'plain', 'last', 'train') == pytest.approx((99, 100 * standard_error(0.99, 1600)))
    assert math.isnan(accuracy([RESULT], 'other', 'best', 'val').mean)


def test_summary_csv_reads_back(tmp_path):
    results = [RESULT, Result('other, "quoted"', 3, status='not run', reason='no weights')]
    (tmp_path / 's.csv').write_text(to_csv(Result, results), encoding='utf-8')
    assert read_csv(Result, tmp_path / 's.csv') == results
