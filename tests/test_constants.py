"""Constants, rows and the command line: precedence, types, ranges, and one sentence for what makes no sense."""
import pytest

from ex3_convnet import QUESTIONS, Config, main
from lab.constants import RANGES, Question, read_constants, slug

TINY = ['--data', 'shapes', '--num-training', '60', '--num-validation', '20', '--batch-size', '20',
        '--hidden-size', '4', '4', '4', '4', '4', '--device', 'cpu', '--precision', 'fp32']


def read(*options):
    return read_constants('ex3_convnet', Config(), QUESTIONS, options)[1]


def test_constants_are_overridden_by_the_row_and_the_row_by_the_command_line():
    assert read()['ConvNet'].num_epochs == Config().num_epochs == 20
    assert read('--experiment', 'Q2b')['batch norm'].num_epochs == 50
    rows = read('--experiment', 'Q2b', '--num-epochs', '1', '--seeds', '3', '4')
    assert [(c.num_epochs, c.norm_layer, c.seeds) for c in rows.values()] == [(1, None, (3, 4)), (1, 'BN', (3, 4))]


@pytest.mark.parametrize('options, word', [
    (['--experiment', 'Q3b', '--dropout', '0.3'], 'Q3b compares values of dropout'),
    (['--experiment', 'Q2a', '--norm-layer', 'BN'], 'norm_layer')])
def test_a_compared_constant_cannot_be_fixed_on_the_command_line(options, word):
    with pytest.raises(ValueError, match=word):
        read(*options)


def test_an_edited_constant_that_makes_all_rows_alike_is_refused():
    with pytest.raises(ValueError, match='Q3a compares values of flip'):
        read_constants('ex3_convnet', Config(experiment='Q3a', flip=0.5), QUESTIONS, [])


@pytest.mark.parametrize('name', QUESTIONS)
def test_every_row_of_every_experiment_passes_the_checks(name):
    rows = read('--experiment', name)
    assert rows.keys() == QUESTIONS[name].rows.keys() and QUESTIONS[name].text.endswith('?')
    assert len({slug(run) for run in rows}) == len(rows)


@pytest.mark.parametrize('key', [key for key, kind in Config.__annotations__.items()
                                 if any(number in str(kind) for number in ('int', 'float'))])
def test_every_number_has_a_range(key):
    assert key in RANGES


@pytest.mark.parametrize('option, value', [
    ('dropout', '1.5'), ('dropout', '-0.1'), ('batch-size', '0'), ('num-epochs', '0'), ('learning-rate', 'nan'),
    ('learning-rate', 'inf'), ('num-training', '0'), ('experiment', 'Q9'), ('reg', '-1'), ('seeds', '-1'),
    ('hidden-size', '0'), ('input-size', '1'), ('patience', '0'), ('freeze-at', '2')])
def test_a_constant_out_of_range_is_named_with_its_range(tmp_path, capsys, option, value):
    assert main([*TINY, '--results', str(tmp_path), f'--{option}', value]) == 2
    errors = capsys.readouterr().err
    assert errors.count('\n') == 1 and list(tmp_path.iterdir()) == []
    assert errors.startswith(f'ex3_convnet: error: {option.replace("-", "_")} must be ')


@pytest.mark.parametrize('options, sentence', [
    ('--num-epoch 3', 'Unrecognized options: --num-epoch, 3: did you mean --num-epochs?'),
    ('nonsense', 'Unrecognized options: nonsense'),
    ('--num-epochs x', "--num-epochs must be a whole number, got 'x'"),
    ('--num_epochs=2.5 --flip 1', "--num-epochs must be a whole number, got '2.5'"),
    ('--num-epochs --flip 1', "--num-epochs must be a whole number, got ''"),
    ('--hidden-size 4 b --flip 1', "--hidden-size must be whole numbers, such as (1, 2), got '4 b'"),
    ('--patience never', "--patience must be a whole number or None, got 'never'"),
    ('--learning-rate 1 --learning-rate -x --learning-rate-decay 1', "--learning-rate must be a number, got '-x'"),
    ('--optimizer AdamW', "--optimizer must be 'Adam' or 'SGD' or 'Muon', got 'AdamW'")])
def test_a_mistyped_option_is_one_sentence(capsys, options, sentence):
    assert main(options.split()) == 2
    assert capsys.readouterr().err == (
        f'ex3_convnet: error: {sentence} (all options: python ex3_convnet.py --help)\n')


def test_too_many_blocks_are_refused_before_data_is_loaded(tmp_path, capsys):
    assert main(['--hidden-size', *'444444', '--results', str(tmp_path)]) == 2
    assert 'one to five blocks' in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('edit, message', [
    (dict(optimizer='AdamW'), "optimizer must be 'Adam' or 'SGD' or 'Muon', got 'AdamW'"),
    (dict(num_epochs=2.5), 'num_epochs must be a whole number, got 2.5'), (dict(flip='yes'), 'flip must be a number'),
    (dict(seeds=0), 'seeds must be whole numbers, such as (1, 2), got 0'), (dict(dropout=True), 'got True'),
    (dict(hidden_size=(4, True)), 'got (4, True)'), (dict(whiten=1), 'whiten must be True or False, got 1'),
    (dict(data_root=3), 'data_root must be a path, got 3'), (dict(norm='BN'), 'did you mean norm_layer'),
    (dict(device='cpu'), 'device, which is not')])
def test_a_row_that_makes_no_sense_is_named(tmp_path, monkeypatch, capsys, edit, message):
    monkeypatch.setitem(QUESTIONS, 'Q1', Question('?', {'ConvNet': edit}))
    assert main([*TINY, '--results', str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count('\n') == 1 and list(tmp_path.iterdir()) == []


def test_a_list_is_as_good_as_a_tuple(monkeypatch):
    monkeypatch.setitem(QUESTIONS, 'mine', Question('mine?', {'small': dict(hidden_size=[4, 4])}))
    assert read('--experiment', 'mine')['small'].hidden_size == (4, 4)


def test_runs_that_would_share_a_folder_are_refused(monkeypatch):
    monkeypatch.setitem(QUESTIONS, 'Q1', Question('?', {'a + b': {}, 'A+B': dict(norm_layer='BN')}))
    with pytest.raises(ValueError, match=r'a\+b'):
        read()


def test_help_names_every_constant(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f'--{key.replace("_", "-")}' in text for key in Config.__annotations__)
