"""The report: its parts end to end on the shapes, its words kept, its tables made from the summaries."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import ex3_convnet
import ex3_pretrained
import training
from lab.constants import read_constants
from lab.files import read_csv, to_csv
from lab.results import Result
from report import make
from report.make import PARTS, Options, Part, arguments, fill, main

# braces must survive
TEXT = ('Words.\n\n<!-- overview: -->\n<!-- end -->\n\nQ1 {}\n\n'
        '<!-- Q1: num_epochs=7 -->\n\nold\n\n<!-- end -->\n\nEnd.\n')
TINY = 'num_training=60 num_validation=20 batch_size=20 num_epochs=1 hidden_size=4,4,4,4,4 device=cpu precision=fp32'


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The arguments of a report of one tiny part, and the report's path."""
    monkeypatch.setattr(Figure, 'savefig', lambda _figure, file, **_: file.write(b'a picture'))
    monkeypatch.setattr(make, 'PARTS', {'Q1': Part(ex3_convnet, 'Q1', ('curves', 'filters'), TINY)})
    path = tmp_path / 'report' / 'README.md'
    path.parent.mkdir()
    path.write_text(TEXT)
    return ['--scale', 'cpu', '--parts', 'Q1', '--data', 'shapes', '--results', str(tmp_path / 'results'),
            '--report', str(path)], path


def test_a_report_shows_command_conditions_table_and_pictures_and_keeps_the_words(tiny):
    argv, path = tiny
    assert main(argv) == 0
    text = path.read_text(encoding='utf-8')
    assert text.startswith('Words.\n\n<!-- overview:  -->') and text.endswith('<!-- end -->\n\nEnd.\n')
    assert 'old' not in text and f'<!-- Q1: {TINY} -->' in text and 'Q1 {}' in text
    command = ('    python ex3_convnet.py --experiment Q1 --num-training 60 --num-validation 20 --batch-size 20 '
               '--num-epochs 1 --hidden-size 4 4 4 4 4 --device cpu --precision fp32 --seeds 0\n')
    assert command in text
    assert ('**Reduced scale**: built-in shapes (not CIFAR-10), 60 training, 20 validation, 1,000 test images.' in text)
    assert f'**reduced**: {TINY}' in text and '| ConvNet |     1 |' in text
    assert text.count('![') == 2
    for picture in ('curves', 'filters'):
        assert f'(Q1-{picture}.png)' in text and (path.parent / f'Q1-{picture}.png').exists()


def test_finished_runs_are_taken_seeds_are_added_and_less_never_replaces_full_scale(tiny, tmp_path, monkeypatch):
    argv, path = tiny
    results, trained, fit = tmp_path / 'results', [], training.fit
    monkeypatch.setattr(ex3_convnet, 'fit', lambda *a, **k: trained.append(k['seed']) or fit(*a, **k))
    line = arguments(make.PARTS['Q1'], TINY, ())
    assert ex3_convnet.main([*line, '--data', 'shapes', '--results', str(results)]) == main(argv) == 0
    first = path.read_text(encoding='utf-8')
    assert main(argv) == 0
    assert (path.read_text(encoding='utf-8'), trained) == (first, [0])
    assert main([*argv, '--seeds', '0', '1']) == 0
    text = path.read_text(encoding='utf-8')
    assert trained == [0, 1] and '--seeds 0 1\n' in text and '±' in text

    full = fill(text, path.parent, {'Q1': ''})
    path.write_text(full, encoding='utf-8')
    assert 'Full scale: built-in shapes' in full and 'reduced' not in full
    shutil.rmtree(results)
    assert main(argv) == 0
    assert path.read_text(encoding='utf-8') == full and not results.exists()


def test_the_newest_folder_of_this_very_experiment_is_collected_and_no_picture_of_another(tiny, tmp_path, monkeypatch):
    argv, path = tiny
    assert main(argv) == 0
    results = tmp_path / 'results' / 'ex3_convnet'
    for age, name in ((30, 'Q1-2'), (20, 'Q1'), (10, 'Q1-strength')):  # the last is the newest, but another experiment
        if not (results / name).exists():
            shutil.copytree(results / 'Q1', results / name)
        summary = results / name / 'summary.csv'
        summary.write_text(summary.read_text().replace('ConvNet,', f'{name},'))
        stamp = summary.stat().st_mtime - age
        os.utime(summary, (stamp, stamp))
    (results / 'Q1' / 'filters.png').unlink()
    make.collect('Q1', make.tyro.cli(Options, args=argv))
    assert [result.run for result in read_csv(Result, path.parent / 'Q1.csv')] == ['Q1']
    assert (path.parent / 'Q1-curves.png').exists() and not (path.parent / 'Q1-filters.png').exists()


def test_a_part_that_lacks_weights_does_not_stop_the_others(tiny, monkeypatch, tmp_path):
    argv, path = tiny

    def refuse(*_args, **_kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    less = 'num_training=24 num_validation=6 device=cpu precision=fp32'
    monkeypatch.setitem(make.PARTS, 'Q4a', Part(ex3_pretrained, 'Q4a', ('curves',), less))
    path.write_text(TEXT + '<!-- Q4a: --><!-- end -->\n')
    argv.insert(argv.index('Q1'), 'Q4a')
    assert main(argv) == 1
    text = path.read_text(encoding='utf-8')
    assert '| frozen (not run) |' in text and '| ConvNet |     1 |' in text


def test_an_error_ends_the_report_and_leaves_it_as_it_was(tiny, capsys):
    argv, path = tiny
    argv[argv.index('shapes')] = '/no/such/folder'
    assert main(argv) == 2
    assert path.read_text(encoding='utf-8') == TEXT and '/no/such/folder' in capsys.readouterr().err
    assert main(['--parts', 'Q9']) == 2
    assert "'Q9'" in capsys.readouterr().err


def test_a_part_that_has_not_run_says_so(tmp_path):
    text = fill(TEXT, tmp_path)
    assert '*Not run yet.*' in text and 'old' not in text and '<!-- Q1: num_epochs=7 -->' in text
    assert fill(text, tmp_path) == text


def test_full_scale_runs_the_scripts_own_seeds_then_three_and_the_times_add_up(tmp_path, monkeypatch):
    path, calls = tmp_path / 'README.md', []
    path.write_text('<!-- overview: --><!-- end --><!-- Q4a: num_epochs=3 --><!-- end --><!-- Q1: --><!-- end -->')
    results = [Result('frozen', seed, data='D', training_images=1, validation_images=2, test_images=3, device='GPU',
                      precision='bf16', seconds=seconds) for seed, seconds in ((0, 100), (7, 3560))]

    def script(argv):
        calls.append(argv)
        folder = tmp_path / 'ex3_pretrained' / 'Q4a'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'summary.csv').write_text(to_csv(Result, results))
        return 0
    monkeypatch.setattr(ex3_pretrained, 'main', script)
    (tmp_path / 'Q1.csv').write_text(to_csv(Result, [Result('ConvNet', 0, seconds=7200)]))
    rest = ['--data', 'D', '--weights', 'W', '--results', str(tmp_path)]
    assert main(['--parts', 'Q4a', *rest, '--report', str(path)]) == 0
    assert calls == [['--experiment', 'Q4a', *rest], ['--experiment', 'Q4a', '--seeds', '0', '1', '2', *rest]]
    text = path.read_text(encoding='utf-8')
    cells = {name.strip(): [cell.strip() for cell in line[:-1]]
             for name, *line in (row.split('|')[1:] for row in text.splitlines() if row.startswith('|'))}
    assert cells['Q4a'] == ['full', '2', '1 h 01 min', 'GPU, bf16'] and cells['Q1'][2] == '2 h 00 min'
    assert 'Training alone took 3 h 01 min.' in text and '<!-- Q4a:  -->' in text
    assert '--experiment Q4a --seeds 0 7\n' in text
    assert 'Full scale: D, 1 training, 2 validation, 3 test images.' in text


# Of each part with --scale cpu: epochs, filters of the first block, seeds. All of them have 49,000 training images.
SCALES = {
    'fast': (8, 128, (0, 1, 2)), 'Q1': (20, 128, (0,)), 'Q2a': (20, 128, (0,)), 'Q4a': (30, None, (0,)),
    'Q4b': (30, None, (0,)), 'best': (30, 128, (0,)), 'Q3a': (20, 32, (0,)), 'Q3b': (20, 32, (0,)),
    'Q3a-strength': (20, 32, (0,)), 'ingredients': (20, 32, (0,)), 'Q2b': (50, 64, (0, 1, 2)),
    'Q4-best': (3, None, (0,))}


def test_a_cpu_does_no_less_than_this():
    assert list(PARTS) == list(SCALES)
    for name, part in PARTS.items():
        _, rows = read_constants('script', part.script.Config(), part.script.QUESTIONS,
                                 arguments(part, part.reduced, part.seeds))
        for config in rows.values():
            filters = getattr(config, 'hidden_size', [None])[0]
            assert (config.num_epochs, filters, config.seeds, config.num_training) == (*SCALES[name], 49000), name


@pytest.mark.parametrize('reduced', [True, False], ids=['cpu', 'full'])
@pytest.mark.parametrize('name', PARTS)
def test_every_part_is_a_command_that_its_script_accepts(name, reduced):
    part = PARTS[name]
    line = arguments(part, part.reduced if reduced else '', (0, 1))
    experiment, rows = read_constants('script', part.script.Config(), part.script.QUESTIONS, line)
    assert part.script is (ex3_pretrained if name.startswith('Q4') else ex3_convnet)
    assert experiment == name.removeprefix('Q4-') and {config.seeds for config in rows.values()} == {(0, 1)}
    drawn = {picture.__name__ for picture in part.script.PICTURES.get(part.experiment, [])}
    files = {'accuracies': 'accuracy', 'strengths': 'accuracy', 'against_dropout': 'dropout'}
    assert set(part.pictures) <= {'curves'} | {files.get(picture, picture) for picture in drawn}


def test_the_published_report_has_all_parts_and_is_what_its_summaries_give():
    text = Options.report.read_text(encoding='utf-8')
    assert [name for name in PARTS if f'<!-- {name}: ' not in text] == []
    assert fill(text, Options.report.parent) == text
    links = re.findall(r'\]\(([^):#]+)\)', text)
    assert links and [link for link in links if not (Options.report.parent / link).exists()] == []


def test_published_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in Options.report.parent.glob('*.png')}
    assert max(sizes.values()) < 150_000 and sum(sizes.values()) < 3_000_000


def test_the_report_starts_as_a_script_of_its_own(tmp_path):
    done = subprocess.run([sys.executable, make.__file__, '--help'], capture_output=True, text=True, cwd=tmp_path,
                          timeout=120)
    assert done.returncode == 0 and '--parts' in done.stdout
