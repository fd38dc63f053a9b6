"""From a table of runs to folders: precedence, identity, resuming, summaries."""
import csv
import json
import statistics

import experiment
import pytest
import torch
from experiment import Result, mean_std, parse, read_summary, slug, summary_table
from filelock import FileLock

from datasets import cifar10
from ex3_convnet import EXPERIMENTS, QUESTIONS, RANGES, Config, main, script
from models.convnet import ConvNet

TINY = ['--data', 'shapes', '--num-training', '60', '--num-validation', '20', '--batch-size', '20',
        '--hidden-size', '4', '4', '4', '4', '4', '--device', 'cpu', '--precision', 'fp32']


@pytest.fixture
def run(tmp_path, capsys):
    """run('--experiment', 'Q2a', ...) -> (exit status, what it printed, its errors); results go to tmp_path."""
    def run_main(*options):
        status = main([*TINY, '--results', str(tmp_path), *options])
        return status, *capsys.readouterr()
    return run_main


def parse_convnet(*options):
    return parse(script(), list(options))


# --- constants ----------------------------------------------------------------------------------------------


def test_constants_are_overridden_by_the_row_and_the_row_by_the_command_line():
    assert parse_convnet()[1]['ConvNet'].num_epochs == Config().num_epochs == 20
    assert parse_convnet('--experiment', 'Q2b')[1]['batch norm'].num_epochs == 50
    rows = parse_convnet('--experiment', 'Q2b', '--num-epochs', '1', '--seeds', '3', '4')[1]
    assert [(c.num_epochs, c.norm_layer, c.seeds) for c in rows.values()] == [(1, None, (3, 4)), (1, 'BN', (3, 4))]


def test_a_compared_constant_cannot_be_fixed_on_the_command_line():
    with pytest.raises(ValueError, match='Q3b compares values of dropout'):
        parse_convnet('--experiment', 'Q3b', '--dropout', '0.3')
    with pytest.raises(ValueError, match='norm_layer'):
        parse_convnet('--experiment', 'Q2a', '--norm-layer', 'BN')


def test_every_row_of_every_experiment_passes_its_own_check():
    assert QUESTIONS.keys() == EXPERIMENTS.keys()
    for name, rows in EXPERIMENTS.items():
        assert parse_convnet('--experiment', name)[1].keys() == rows.keys()
        assert len({slug(run) for run in rows}) == len(rows)


@pytest.mark.parametrize('key', [key for key, kind in Config.__annotations__.items()
                                 if any(number in str(kind) for number in ('int', 'float'))])
def test_every_number_has_a_range(key):
    assert key in RANGES


@pytest.mark.parametrize('option, value', [
    ('dropout', '1.5'), ('dropout', '-0.1'), ('batch-size', '0'), ('num-epochs', '0'), ('learning-rate', 'nan'),
    ('learning-rate', 'inf'), ('num-training', '0'), ('experiment', 'Q9'), ('reg', '-1'), ('seeds', '-1'),
    ('hidden-size', '0'), ('input-size', '1'), ('patience', '0')])
def test_a_constant_out_of_range_is_named_with_its_range(run, tmp_path, option, value):
    status, _, errors = run(f'--{option}', value)
    assert status == 2 and errors.count('\n') == 1
    assert errors.startswith(f'ex3_convnet: error: {option.replace("-", "_")} must be ')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('options', [['--no-such-option', '1'], ['--norm-layer', 'GN'], ['--num-epochs', 'many']])
def test_what_is_no_option_or_of_the_wrong_type_ends_with_status_2(options):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2


@pytest.mark.parametrize('options', [['--hidden-size', '4', '4', '4', '4', '4', '4'], ['--hidden-size'], ['--seeds'],
                                     ['--device', 'tpu'], ['--data', 'nowhere']])
def test_other_wrong_input_is_one_message_and_status_2(run, tmp_path, options):
    status, _, errors = run(*options)
    assert status == 2 and errors.count('\n') == 1 and list(tmp_path.iterdir()) == []


def test_a_results_folder_that_cannot_be_created_is_one_message(run, tmp_path):
    (tmp_path / 'file').write_text('')
    status, _, errors = run('--results', str(tmp_path / 'file' / 'results'))
    assert status == 2 and 'file' in errors and errors.count('\n') == 1


# --- folders and resuming -----------------------------------------------------------------------------------


def test_an_experiment_writes_all_it_promises(run, tmp_path):
    status, out, _ = run('--experiment', 'Q2a', '--num-epochs', '2')
    assert status == 0
    folder = tmp_path / 'ex3_convnet' / 'Q2a'
    assert {p.name for p in folder.iterdir()} == {
        '.lock', 'curves.png', 'summary.csv', 'summary.md', 'plain', 'batch-norm'}
    for name in ('plain', 'batch-norm'):
        assert {p.name for p in (folder / name / 'seed0').iterdir()} == {
            'config.json', 'history.csv', 'curves.png', 'best.pt', 'last.pt', 'result.json'}
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    assert [row['run'] for row in rows] == ['plain', 'batch norm']
    assert all(row['data'] == 'built-in shapes (not CIFAR-10)' for row in rows)
    for text in ('60 training, 20 validation and 1,000 test images', 'precision: fp32', '| batch norm', str(folder)):
        assert text in out
    config = json.loads((folder / 'plain' / 'seed0' / 'config.json').read_text())
    assert config.keys() == set(Config.__annotations__) - {'results', 'seeds', 'device', 'data_root'}
    assert (config['data'], config['precision'], config['num_epochs']) == ('shapes', 'fp32', 2)


def test_running_again_repeats_nothing_and_further_seeds_are_added(run, tmp_path):
    run('--num-epochs', '1')
    history = tmp_path / 'ex3_convnet' / 'Q1' / 'ConvNet' / 'seed0' / 'history.csv'
    before = history.read_text(), history.stat().st_mtime_ns
    status, out, _ = run('--num-epochs', '1', '--seeds', '0', '5')
    assert status == 0 and 'seed 0: finished before' in out and 'seed 5: epoch   1/1' in out
    assert (history.read_text(), history.stat().st_mtime_ns) == before
    assert len(read_summary(tmp_path / 'ex3_convnet' / 'Q1' / 'summary.csv')) == 2


def test_other_constants_get_a_folder_of_their_own_and_both_can_be_continued(run, tmp_path):
    run('--num-epochs', '1')
    status, out, _ = run('--num-epochs', '2')
    assert status == 0 and 'num_epochs is 1 there and 2 now' in out
    folder = tmp_path / 'ex3_convnet'
    assert sorted(path.name for path in folder.iterdir()) == ['Q1', 'Q1-2']
    for epochs, name in ((1, 'Q1'), (2, 'Q1-2')):
        status, out, _ = run('--num-epochs', str(epochs))
        assert 'finished before' in out and f'{folder / name / "summary.csv"}' in out
        assert read_summary(folder / name / 'summary.csv')[0].epochs == epochs
    assert sorted(path.name for path in folder.iterdir()) == ['Q1', 'Q1-2']


def test_device_and_results_are_no_part_of_what_a_run_is(run, tmp_path):
    run('--num-epochs', '1')
    assert 'finished before' in run('--num-epochs', '1', '--device', 'auto')[1]


def test_a_folder_in_use_is_refused(run, tmp_path):
    run('--num-epochs', '1')
    with FileLock(tmp_path / 'ex3_convnet' / 'Q1' / '.lock'):
        status, _, errors = run('--num-epochs', '1')
        assert status == 2 and 'another process' in errors
        assert run('--num-epochs', '2')[0] == 0  # other constants, another folder


def test_the_network_follows_the_number_of_classes(run, tmp_path):
    status, out, _ = run('--num-epochs', '1', '--num-classes', '7')
    assert status == 0 and 'num_classes: 10 instead of 7' in out


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError('CUDA error: out of memory'), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'),
    RuntimeError('FIND was unable to find an engine to execute this computation')], ids=str)
def test_out_of_memory_names_the_constant_to_lower(run, monkeypatch, error):
    def exhausted(*_args, **_kwargs):
        raise error
    monkeypatch.setattr(experiment, 'fit', exhausted)
    status, _, errors = run()
    assert status == 2 and 'batch_size' in errors and errors.count('\n') == 1


def test_a_bug_is_not_disguised_as_a_users_error(run, monkeypatch):
    def bug(*_args, **_kwargs):
        raise RuntimeError('shapes do not match')
    monkeypatch.setattr(experiment, 'fit', bug)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        run()


# --- summaries ----------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_the_samples():
    values = [0.81, 0.84, 0.82]
    assert mean_std(values, scale=100) == f'{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}'
    assert (mean_std([0.5], scale=100), mean_std([None, 0.5], scale=100), mean_std([])) == ('50.0', '50.0', '–')


def test_summary_reads_back_and_its_table_has_a_line_a_run(tmp_path):
    results = [Result('plain', seed, parameters=10, trainable=8, epochs=2, best_epoch=1,
                      best_test_accuracy=0.5 + seed / 10) for seed in (0, 1)]
    results.append(Result('other', 0, status='diverged in epoch 1, step 2, where the loss was not a finite number'))
    table = summary_table(results).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    assert '55.0 ± 7.1' in table[2] and '8 / 10' in table[2]
    assert 'other (diverged in epoch 1)' in table[3]


def test_accuracies_of_the_summary_are_those_of_the_kept_weights(run, tmp_path):
    run('--num-epochs', '3', '--norm-layer', 'BN')
    folder = tmp_path / 'ex3_convnet' / 'Q1'
    (result,) = read_summary(folder / 'summary.csv')
    data = cifar10.load('shapes', tmp_path, 60, 20)
    model = ConvNet(3, [4] * 5, 10, 'BN').eval()
    for which in ('best', 'last'):
        model.load_state_dict(torch.load(folder / 'ConvNet' / 'seed0' / f'{which}.pt', weights_only=True))
        for part in ('train', 'val', 'test'):
            split = getattr(data, part)
            with torch.no_grad():
                right = (model((split.images / 255 - 0.5) / 0.5).argmax(1) == split.labels).float().mean().item()
            assert getattr(result, f'{which}_{part}_accuracy') == pytest.approx(right, abs=1e-6)
    assert len(data.test) == 1000


def test_rows_may_differ_in_their_data(run, tmp_path, monkeypatch):
    rows = {str(n): dict(num_training=n) for n in (40, 60)}
    monkeypatch.setitem(EXPERIMENTS, 'Q2a', rows)
    arguments = [option for option in TINY if option not in ('--num-training', '60')]
    assert main([*arguments, '--results', str(tmp_path), '--experiment', 'Q2a', '--num-epochs', '1']) == 0
    results = read_summary(tmp_path / 'ex3_convnet' / 'Q2a' / 'summary.csv')
    assert [result.training_images for result in results] == [40, 60]


# --- edited constants and tables ----------------------------------------------------------------------------


@pytest.mark.parametrize('edit, message', [
    (dict(optimizer='AdamW'), "optimizer must be 'Adam' or 'SGD', got 'AdamW'"), (dict(schedule='cosine'), 'schedule'),
    (dict(num_epochs=2.5), 'num_epochs must be int, got 2.5'), (dict(seeds=0), 'seeds'), (dict(flip='yes'), 'flip'),
    (dict(dropout=True), 'dropout'), (dict(norm='BN'), 'did you mean norm_layer'), (dict(device='cpu'), 'device')])
def test_a_row_that_cannot_be_meant_is_named(run, tmp_path, monkeypatch, edit, message):
    monkeypatch.setitem(EXPERIMENTS, 'Q1', {'ConvNet': edit})
    status, _, errors = run()
    assert status == 2 and message in errors and errors.count('\n') == 1 and list(tmp_path.iterdir()) == []


def test_a_list_is_as_good_as_a_tuple_and_a_new_experiment_needs_no_question(run, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, 'mine', {'small': dict(hidden_size=[4, 4])})
    arguments = [option for option in TINY if option not in ('--hidden-size', '4')]
    rows = parse(script(), [*arguments, '--experiment', 'mine'])[1]
    assert rows['small'].hidden_size == (4, 4)
    assert run('--experiment', 'mine', '--num-epochs', '1')[0] == 0


def test_runs_that_would_share_a_folder_are_refused(run, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, 'Q1', {'a + b': {}, 'A+B': dict(norm_layer='BN')})
    status, _, errors = run()
    assert status == 2 and 'a+b' in errors


def test_seeds_added_one_by_one_are_all_in_the_summary(run, tmp_path):
    for seed in ('0', '2', '1'):
        assert run('--num-epochs', '1', '--seeds', seed)[0] == 0
    assert sorted(r.seed for r in read_summary(tmp_path / 'ex3_convnet' / 'Q1' / 'summary.csv')) == [0, 1, 2]
