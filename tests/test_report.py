"""The report: its parts end to end on the shapes, its words kept, its tables made from the summaries."""
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ex3_convnet
import ex3_pretrained
import training
from lab.constants import read_constants
from lab.files import read_csv, to_csv
from lab.results import Result
from models.convnet import ConvNet
from report import dropout_and_batch_norm, make
from report.dropout_and_batch_norm import estimate_statistics
from report.make import PARTS, Options, Part, arguments, constants_in, fill, main

pytestmark = pytest.mark.usefixtures('cheap')

# braces must survive
TEXT = 'Words.\n\n<!-- overview: --><!-- end -->\n\nQ1 {}\n\n<!-- Q1: num_epochs=7 -->\nold\n<!-- end -->\n\nEnd.\n'
TINY = 'num_training=60 num_validation=20 batch_size=20 num_epochs=1 hidden_size=4,4,4,4,4 device=cpu precision=fp32'


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The arguments of a report of one tiny part, and the report's path."""
    monkeypatch.setattr(make, 'PARTS', {'Q1': Part(ex3_convnet, 'Q1', ('curves', 'filters'), TINY)})
    path = tmp_path / 'report' / 'README.md'
    path.parent.mkdir()
    path.write_text(TEXT)
    return ['--scale', 'cpu', '--parts', 'Q1', '--data', 'shapes', '--results', str(tmp_path / 'results'),
            '--report', str(path)], path


def test_a_report_shows_finished_runs_keeps_the_words_adds_seeds_and_never_replaces_full_scale_by_less(
        tiny, tmp_path, monkeypatch):
    argv, path = tiny
    results, trained, fit = tmp_path / 'results', [], training.fit
    monkeypatch.setattr(ex3_convnet, 'fit', lambda *a, **k: trained.append(k['seed']) or edit() or fit(*a, **k))

    def edit():  # while it trains
        path.write_text('New. ' + path.read_text(encoding='utf-8'), encoding='utf-8')
    assert fill(TEXT, path.parent).count('*Not run yet.*') == 1
    line = arguments(make.PARTS['Q1'], TINY, ())
    assert ex3_convnet.main([*line, '--data', 'shapes', '--results', str(results)]) == main(argv) == 0
    text = path.read_text(encoding='utf-8')
    assert text.startswith('New. Words.\n\n<!-- overview:  -->') and text.endswith('<!-- end -->\n\nEnd.\n')
    assert 'old' not in text and f'<!-- Q1: {TINY} -->' in text and 'Q1 {}' in text
    assert ('    python ex3_convnet.py --experiment Q1 --num-training 60 --num-validation 20 --batch-size 20 '
            '--num-epochs 1 --hidden-size 4 4 4 4 4 --device cpu --precision fp32 --seeds 0\n') in text
    assert '**Reduced scale**: built-in shapes (not CIFAR-10), 60 training, 20 validation, 60 test images.' in text
    assert f'**reduced**: {TINY}' in text and '| ConvNet |     1 |' in text
    assert re.findall(r'!\[.*\]\((.*)\)', text) == ['Q1-curves.png', 'Q1-filters.png']
    assert {file.name for file in path.parent.iterdir()} == {'README.md', 'Q1.csv', 'Q1-epochs.csv', 'Q1-curves.png',
                                                             'Q1-filters.png'}

    assert main([*argv, '--seeds', '0', '1']) == 0
    text = path.read_text(encoding='utf-8')
    assert trained == [0, 1] and '--seeds 0 1\n' in text and '±' in text and text.startswith('New. New. Words.')
    epochs = read_csv(make.RunEpoch, path.parent / 'Q1-epochs.csv')
    assert [(epoch.run, epoch.seed, epoch.epoch) for epoch in epochs] == [('ConvNet', 0, 1), ('ConvNet', 1, 1)]
    assert epochs[1].val_accuracy == read_csv(Result, path.parent / 'Q1.csv')[1].best_val_accuracy
    assert epochs[0].train_loss != epochs[1].train_loss

    full = fill(text, path.parent, {'Q1': ''})
    path.write_text(full, encoding='utf-8')
    assert 'Full scale: built-in shapes' in full and 'reduced' not in full.lower()
    shutil.rmtree(results)
    assert main(argv) == 0
    assert path.read_text(encoding='utf-8') == full and not results.exists()


def test_the_newest_folder_of_this_very_experiment_is_collected_and_no_picture_of_another(tmp_path):
    for age, name in ((30, 'Q1-2'), (20, 'Q1'), (10, 'Q1-strength')):  # the last is the newest, but another experiment
        folder = tmp_path / 'ex3_convnet' / name
        folder.mkdir(parents=True)
        (folder / 'curves.png').write_text(name)
        (folder / 'summary.csv').write_text(to_csv(Result, [Result(name, 0)]))
        os.utime(folder / 'summary.csv', (10**9 - age, 10**9 - age))
    for picture in ('curves', 'filters'):
        (tmp_path / f'Q1-{picture}.png').write_text('of an earlier report')
    make.collect('Q1', Options(results=tmp_path, report=tmp_path / 'README.md'))
    assert [result.run for result in read_csv(Result, tmp_path / 'Q1.csv')] == ['Q1']
    assert (tmp_path / 'Q1-curves.png').read_text() == 'Q1' and not (tmp_path / 'Q1-filters.png').exists()


def test_a_part_that_lacks_weights_does_not_stop_the_others_but_an_error_does(tiny, monkeypatch, tmp_path, capsys):
    def refuse(*_args, **_kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    less = 'num_training=24 num_validation=6 device=cpu precision=fp32'
    monkeypatch.setitem(make.PARTS, 'Q4a', Part(ex3_pretrained, 'Q4a', ('curves',), less))
    argv, path = tiny
    path.write_text(TEXT + '<!-- Q4a: --><!-- end -->\n')
    argv.insert(argv.index('Q1'), 'Q4a')
    assert main(argv) == 1
    text = path.read_text(encoding='utf-8')
    assert '| frozen (not run) |' in text and '| ConvNet |     1 |' in text

    argv[argv.index('shapes')] = '/no/such/folder'
    assert main(argv) == 2
    assert path.read_text(encoding='utf-8') == text and '/no/such/folder' in capsys.readouterr().err
    for wrong, words in (('--parts Q9', "'Q9'"), ('--parts Q1 Q4a --weights none.pt', 'there is no file none.pt'),
                         ('--parts Q1 --seeds 0 -1', 'seeds must be between')):  # before anything is trained
        assert main(['--report', str(path), *wrong.split()]) == 2
        assert words in capsys.readouterr().err


def test_what_could_not_be_run_replaces_nothing_and_does_not_count_as_full_scale(tiny, monkeypatch, tmp_path, capsys):
    argv, path = tiny
    folder = tmp_path / 'results' / 'ex3_convnet' / 'Q1'
    folder.mkdir(parents=True)
    (folder / 'summary.csv').write_text(to_csv(Result, [Result('ConvNet', 0, 'not run')]))
    options = Options(results=tmp_path / 'results', report=path)
    assert make.collect('Q1', options)  # where there is nothing better
    path.write_text(fill(TEXT, path.parent, {'Q1': ''}))
    monkeypatch.setattr(ex3_convnet, 'main', lambda _argv: 1)
    assert main(argv) == 1 and 'skipped' not in capsys.readouterr().out
    (path.parent / 'Q1.csv').write_text(finished := to_csv(Result, [Result('ConvNet', 0, best_test_accuracy=0.5)]))
    assert not make.collect('Q1', options) and (path.parent / 'Q1.csv').read_text() == finished
    path.write_text(fill(TEXT, path.parent, {'Q1': ''}))
    assert main(argv) == 0 and 'the report has it at full scale, skipped' in capsys.readouterr().out


def test_a_page_may_hold_comments_of_its_own_and_lack_blocks_but_no_end(tiny, capsys):
    argv, path = tiny
    (path.parent / 'Q1.csv').write_text(to_csv(Result, [Result('ConvNet', 0)]))
    own = TEXT.replace('Q1 {}', '<!-- a note: of my own -->').replace('Words.', '<!-- mine: 3 -->')
    assert '<!-- a note: of my own -->' in (text := fill(own, path.parent)) and '<!-- mine: 3 -->' in text
    assert '| Q1 ' not in fill(own.replace('Q1: num_epochs=7', 'mine: 3'), path.parent)
    path.write_text(TEXT.replace('<!-- overview: --><!-- end -->', '<!-- overview: -->'))
    assert main(argv) == 2 and 'overview: --> needs an <!-- end -->' in capsys.readouterr().err


def test_full_scale_runs_the_scripts_own_seeds_then_three_and_the_times_add_up(tmp_path, monkeypatch):
    path, calls = tmp_path / 'README.md', []
    blocks = ['overview: ', 'Q4a: num_epochs=3', 'Q1: ', 'Q2a: ']
    path.write_text(''.join(f'<!-- {block} --><!-- end -->' for block in blocks))
    monkeypatch.setitem(PARTS, 'Q4a', PARTS['Q4a']._replace(seeds=(0, 1), reduced='num_epochs=3'))
    results = [Result('frozen', seed, data='D', training_images=1, validation_images=2, test_images=3, device='GPU',
                      precision='bf16', seconds=seconds) for seed, seconds in ((0, 100), (7, 3560))]
    folder = tmp_path / 'ex3_pretrained' / 'Q4a'
    folder.mkdir(parents=True)
    (folder / 'summary.csv').write_text(to_csv(Result, results))
    monkeypatch.setattr(ex3_pretrained, 'main', lambda argv: calls.append(argv) or 0)
    (tmp_path / 'Q1.csv').write_text(to_csv(Result, [Result('ConvNet', 0, seconds=7200)]))
    (tmp_path / 'Q2a.csv').write_text(to_csv(Result, [Result('plain', 0, seconds=7200),  # the run of Q1
                                                      Result('batch norm', 0, seconds=3600)]))
    (tmp_path / 'W').touch()
    rest = ['--data', 'D', '--weights', str(tmp_path / 'W'), '--results', str(tmp_path)]
    assert main(['--parts', 'Q4a', *rest, '--report', str(path)]) == 0
    assert calls == [['--experiment', 'Q4a', *rest], ['--experiment', 'Q4a', '--seeds', '0', '1', '2', *rest]]
    text = path.read_text(encoding='utf-8')
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]
    assert ['Q4a', 'full', '2', '1 h 01 min', 'GPU, bf16'] in rows and ['Q1', 'full', '1', '2 h 00 min', ','] in rows
    assert 'Training alone took 4 h 01 min.' in text and '<!-- Q4a:  -->' in text
    assert '--experiment Q4a --seeds 0 7\n' in text  # the seeds that there are
    assert 'Full scale: D, 1 training, 2 validation, 3 test images.' in text


@pytest.mark.parametrize('name', PARTS)
def test_every_part_is_a_command_that_its_script_accepts_and_its_pictures_are_drawn(name):
    part = PARTS[name]
    assert part.script is (ex3_pretrained if name.startswith('Q4') else ex3_convnet)
    for constants in (part.reduced, ''):
        line = arguments(part, constants, (0, 1))
        experiment, rows = read_constants('script', part.script.Config(), part.script.QUESTIONS, line)
        assert experiment == name.removeprefix('Q4-') and {config.seeds for config in rows.values()} == {(0, 1)}
        for config in rows.values():  # a CPU does no less than this
            assert config.num_training == 49000 and getattr(config, 'hidden_size', [32])[0] >= 32
            assert config.num_epochs >= {'fast': 8, 'Q4-best': 3}.get(name, 20)
    drawn = {picture.__name__ for picture in part.script.PICTURES[part.experiment]}
    files = {'accuracies': 'accuracy', 'strengths': 'accuracy', 'against_dropout': 'dropout'}
    assert set(part.pictures) <= {'curves'} | {files.get(picture, picture) for picture in drawn}


def test_the_published_report_has_all_parts_and_small_pictures_and_is_what_its_summaries_give():
    text, folder = Options.report.read_text(encoding='utf-8'), Options.report.parent
    assert fill(text, folder) == text and PARTS.keys() <= constants_in(text).keys()
    links = re.findall(r'\]\(([^):#]+)\)', text)
    assert links and [link for link in links if not (folder / link).exists()] == []
    assert all(path.stat().st_size < 150_000 for path in folder.glob('*.png'))


def test_batch_norms_statistics_are_estimated_with_the_dropout_asked_for():
    torch.manual_seed(0)
    images, labels = torch.randn(200, 3, 32, 32), torch.zeros(200, dtype=torch.long)
    model = ConvNet(3, [8, 8], 10, 'BN', dropout=0.5)
    nn.init.normal_(model.classifier.weight)
    estimate_statistics(model, [(images, labels)], 0.0)
    without = model.eval()(images)
    torch.testing.assert_close(without, model.train()(images), rtol=1e-2, atol=1e-2)  # the batch's own, no dropout
    estimate_statistics(model, [(images, labels)], 0.5)
    assert (model.eval()(images) - without).norm() > 0.1 * without.norm()


def test_networks_that_cannot_be_built_are_refused_before_anything_is_written(tmp_path, capsys):
    options = ['--hidden-size', *'123456', '--data', 'shapes', '--results', str(tmp_path)]
    assert dropout_and_batch_norm.main(options) == 2
    assert 'one to five blocks' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_dropout_costs_through_batch_norm_is_a_table_of_the_runs_that_have_dropout(tmp_path, capsys):
    options = [*arguments(Part(ex3_convnet, 'Q3b', ()), TINY, ()), '--data', 'shapes', '--results', str(tmp_path)]
    assert dropout_and_batch_norm.main(options) == 0
    rows = re.findall(r'\| p = (0.\d), seed 0 +\|(.*)\|', capsys.readouterr().out.rpartition('as trained')[2])
    results = {result.run: result for result in read_csv(Result, tmp_path / 'ex3_convnet' / 'Q3b' / 'summary.csv')}
    assert [p for p, _ in rows] == [f'0.{n}' for n in range(1, 10)]
    for p, cells in rows:
        assert cells.split('|')[0].strip() == f'{results[f"p = {p}"].best_test_accuracy:.1%}'


@pytest.mark.parametrize('script', ['report/make.py', 'report/dropout_and_batch_norm.py',
                                    'benchmarks/training_speed.py', 'benchmarks/time_to_accuracy.py'])
def test_what_stands_in_a_folder_starts_as_a_script_of_its_own(script, tmp_path, monkeypatch, capsys):
    project = Path(make.__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path and Path(path).resolve() != project])
    monkeypatch.setattr(sys, 'argv', [script, '--help'])
    monkeypatch.delitem(sys.modules, 'ex3_convnet')  # to be found anew
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(project / script), run_name='__main__')
    assert not end.value.code and '--data' in capsys.readouterr().out
