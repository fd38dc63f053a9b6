"""The report: its parts end to end on the shapes, its words kept, its tables made from the summaries."""
import pytest
import torch
from experiment import parse

import ex3_convnet
import ex3_pretrained
import report
import training
from report import PARTS, Options, Part, arguments, fill, main

# braces must survive
TEXT = 'Words.\n\n<!-- overview: all -->\n<!-- end -->\n\nQ1 {}\n\n<!-- Q1: full -->\n\nold\n\n<!-- end -->\n\nEnd.\n'
TINY = ('--num-training 60 --num-validation 20 --batch-size 20 --num-epochs 1 --hidden-size 4 4 4 4 4 '
        '--device cpu --precision fp32')


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The arguments of a report of one tiny part, and the report's path."""
    monkeypatch.setattr(report, 'PARTS', {'Q1': Part(ex3_convnet, 'Q1', ('curves', 'filters'), TINY)})
    path = tmp_path / 'REPORT.md'
    path.write_text(TEXT)
    return ['--scale', 'cpu', '--parts', 'Q1', '--data', 'shapes', '--results', str(tmp_path / 'results'),
            '--report', str(path)], path


def test_a_report_shows_command_conditions_table_and_pictures_and_keeps_the_words(tiny):
    argv, path = tiny
    assert main(argv) == 0
    text = path.read_text(encoding='utf-8')
    assert text.startswith('Words.\n\n<!-- overview: all -->') and text.endswith('<!-- end -->\n\nEnd.\n')
    assert 'old' not in text and '<!-- Q1: cpu -->' in text and 'Q1 {}' in text
    assert f'    python ex3_convnet.py --experiment Q1 {TINY} --seeds 0\n' in text
    assert '**Reduced scale**: built-in shapes (not CIFAR-10), 60 training images.' in text
    assert f'**reduced**: `{TINY}`' in text
    assert '| ConvNet |     1 |' in text
    assert text.count('![') == 2
    for picture in ('curves', 'filters'):
        assert f'(report/Q1-{picture}.png)' in text and (path.parent / 'report' / f'Q1-{picture}.png').exists()


def test_a_report_made_again_trains_nothing_and_adds_seeds(tiny, monkeypatch):
    argv, path = tiny
    assert main(argv) == 0
    first, trained, fit = path.read_text(encoding='utf-8'), [], training.fit
    monkeypatch.setattr(ex3_convnet.experiment, 'fit', lambda *a, **k: trained.append(k['seed']) or fit(*a, **k))
    assert main(argv) == 0
    assert (path.read_text(encoding='utf-8'), trained) == (first, [])
    assert main([*argv, '--seeds', '0', '1']) == 0
    text = path.read_text(encoding='utf-8')
    assert trained == [1] and '--seeds 0 1\n' in text and '±' in text


def test_a_part_that_lacks_weights_does_not_stop_the_others(tiny, monkeypatch, tmp_path, capsys):
    argv, path = tiny

    def refuse(*_args, **_kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    less = '--num-training 24 --num-validation 6 --device cpu --precision fp32'
    monkeypatch.setitem(report.PARTS, 'Q4a', Part(ex3_pretrained, 'Q4a', ('curves',), less))
    path.write_text(TEXT + '<!-- Q4a: cpu --><!-- end -->\n')
    argv[argv.index('Q1')] = 'Q4a'
    argv.insert(argv.index('Q4a') + 1, 'Q1')
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
    assert '*Not run yet.*' in text and 'old' not in text
    assert fill(text, tmp_path) == text


@pytest.mark.parametrize('scale', ['full', 'cpu'])
@pytest.mark.parametrize('name', PARTS)
def test_every_part_is_a_command_that_its_script_accepts(name, scale, tmp_path):
    part = PARTS[name]
    (tmp_path / 'weights.pt').touch()
    weights = ['--weights', str(tmp_path / 'weights.pt')] if part.script is ex3_pretrained else []
    experiment, rows = parse(part.script.script(), [*arguments(part, scale, (0, 1)), *weights])
    assert experiment == part.experiment and {config.seeds for config in rows.values()} == {(0, 1)}


def test_all_parts_stand_in_the_report():
    text = Options.report.read_text(encoding='utf-8')
    assert [name for name in PARTS if f'<!-- {name}: ' not in text] == []


def test_the_published_report_is_what_its_summaries_give():
    text = Options.report.read_text(encoding='utf-8')
    assert fill(text, Options.report.parent / 'report') == text


def test_published_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (Options.report.parent / 'report').glob('*.png')}
    assert max(sizes.values()) < 150_000 and sum(sizes.values()) < 2_000_000
