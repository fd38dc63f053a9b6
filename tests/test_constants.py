"""Constants, rows and the command line: precedence, types, ranges, and one sentence for what makes no sense."""
import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tiny import assert_refused, convnet, pretrained

import ex3_convnet
import ex3_pretrained
from lab.constants import RANGES, Question, read_constants


def read(*options, script=ex3_convnet, **edited):
    """run -> its constants, where those at the top of the script have been edited."""
    return read_constants(script.__name__, script.Config(**edited), script.QUESTIONS, options,
                          getattr(script, 'RANGES', None))[1]


def test_constants_are_overridden_by_the_row_and_the_row_by_the_command_line():
    def epochs(*options, **edited):
        return [config.num_epochs for config in read(*options, **edited).values()]
    assert epochs() == [20] and epochs(num_epochs=30) == [30]
    assert epochs('--num-epochs', '1', num_epochs=30) == [1]
    assert epochs('--experiment', 'Q2b', num_epochs=30) == [50, 50]
    assert epochs('--experiment', 'Q2b', '--num-epochs', '1') == [1, 1]
    rows = read('--seeds', '3', '4', experiment='Q2b', hidden_size=[4, 4], data_root='here')  # as people write them
    assert [(c.norm_layer, c.seeds, c.hidden_size, c.data_root) for c in rows.values()] == [
        (norm, (3, 4), (4, 4), Path('here')) for norm in (None, 'BN')]
    home = read('--data-root=~/data', results='~/results')['ConvNet']  # no shell expands these
    assert (home.data_root, home.results) == (Path.home() / 'data', Path.home() / 'results')


@pytest.mark.parametrize('script, constant, value', [
    (ex3_convnet, 'hidden_size', [4, 8]), (ex3_convnet, 'seeds', [0, 1]), (ex3_pretrained, 'layer_config', [512, 8])])
def test_a_constant_may_be_edited_to_a_list_as_the_handout_has_it(script, constant, value):
    rows = read_edited(script, rf'(    {constant}: .* = )\(.*?\)', rf'\g<1>{value}')
    assert {getattr(config, constant) for config in rows.values()} == {tuple(value)}


def test_an_edit_that_would_go_unnoticed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match='the constant batch_size needs its type: write batch_size: int = 20$'):
        read_edited(ex3_convnet, 'batch_size: int = 200', 'batch_size = 20')
    monkeypatch.setattr(ex3_convnet.Config, 'batch_size', 10)  # in a notebook
    with pytest.raises(ValueError, match='the option --batch-size$'):
        read()


def test_numbers_of_numpy_are_numbers(monkeypatch):
    rows = {str(p): dict(dropout=p, crop_padding=np.int64(2), hidden_size=(np.int64(4),)) for p in np.arange(2) / 4}
    monkeypatch.setitem(ex3_convnet.QUESTIONS, 'Q1', Question('?', rows))
    assert [(config.dropout, config.crop_padding, config.hidden_size) for config in read().values()] == [
        (0, 2, (4,)), (0.25, 2, (4,))]


@pytest.mark.parametrize('question', [
    {'a': {}}, Question('?', {}), Question('?', {0.1: dict(dropout=0.1)}), Question('?', {'a': None}),
    Question('?', {'': {}}), Question('?', [{}])], ids=repr)
def test_a_question_of_another_form_is_shown_what_one_looks_like(monkeypatch, question):
    monkeypatch.setitem(ex3_convnet.QUESTIONS, 'mine', question)
    with pytest.raises(ValueError, match=r"^mine must be a question .* such as Question\("):
        read('--experiment', 'mine')


def test_a_question_is_not_named_like_another_ones_second_folder(monkeypatch):
    monkeypatch.setitem(ex3_convnet.QUESTIONS, 'Q1-2', Question('?', {'a': {}}))
    with pytest.raises(ValueError, match="Q1-2 is also the name of Q1's next results folder"):
        read('--experiment', 'Q1-2')


def test_a_row_may_repeat_what_is_a_constant_anyway(monkeypatch):
    rows = {'Adam': {}, 'SGD': dict(schedule='decay', hidden_size=[*ex3_convnet.Config().hidden_size], optimizer='SGD')}
    monkeypatch.setitem(ex3_convnet.QUESTIONS, 'Q1', Question('?', rows))
    assert [config.schedule for config in read().values()] == ['decay', 'decay']
    assert [config.schedule for config in read('--schedule', 'one-cycle').values()] == ['one-cycle', 'one-cycle']
    with pytest.raises(ValueError, match='Q1 compares values of optimizer'):
        read('--optimizer', 'SGD')


def read_edited(script, pattern, replacement):
    """run -> its constants, where the source of the script has been edited."""
    source, count = re.subn(pattern, replacement, Path(script.__file__).read_text(encoding='utf-8'))
    edited = {'__name__': script.__name__, '__file__': script.__file__}
    exec(compile(source, script.__file__, 'exec'), edited)
    assert count == 1
    return read_constants(script.__name__, edited['Config'](), edited['QUESTIONS'], [])[1]


def test_options_in_a_call_may_be_one_text_or_values(tmp_path, capsys):
    assert_refused(ex3_convnet.main('--experiment Q1 --num-epochs 0'), capsys, 'num_epochs must be between')
    assert_refused(ex3_convnet.main(['--num-epochs', 0, '--results', tmp_path]), capsys, 'num_epochs must be between')


@pytest.mark.parametrize('script, options, edited, words', [
    (ex3_convnet, ['--experiment', 'Q2a', '--norm-layer', 'BN'], {}, 'Q2a compares values of norm_layer'),
    (ex3_convnet, [], dict(experiment='Q3a', flip=0.5), 'Q3a compares values of flip'),
    (ex3_convnet, ['--experiment', 'Q3a', '--degrees', '10'], {}, 'Q3a compares values of degrees'),
    (ex3_pretrained, ['--experiment', 'Q4a', '--mode', 'scratch'], {}, 'Q4a compares values of mode')])
def test_what_is_compared_cannot_be_made_the_same_in_every_run(script, options, edited, words):
    with pytest.raises(ValueError, match=words):
        read(*options, script=script, **edited)


def ranges_of(script) -> dict[str, tuple[float, float]]:
    """The ends of every number among its constants."""
    numbers = [constant.name for constant in fields(script.Config) if re.search('int|float', str(constant.type))]
    return {key: (RANGES | getattr(script, 'RANGES', {}))[key] for key in numbers}


@pytest.mark.parametrize('script, name', [(ex3_convnet, 'Q1'), (ex3_pretrained, 'Q4a')])
def test_what_is_outside_its_range_is_refused(script, name):
    kinds = {constant.name: str(constant.type) for constant in fields(script.Config)}
    for number, (key, (low, high)) in enumerate(ranges_of(script).items()):
        value = [low - 1, 2 * high + 1, math.nan if 'float' in kinds[key] else -high][number % 3]
        values = (value,) * (2 if key == 'layer_config' else 1) if 'tuple' in kinds[key] else value
        with pytest.raises(ValueError, match=f'^{key} must be between '):
            read(script=script, experiment=name, **{key: values})


@pytest.mark.parametrize('end', [0, 1], ids=['lowest', 'highest'])
@pytest.mark.parametrize('script, train', [(ex3_convnet, convnet), (ex3_pretrained, pretrained)],
                         ids=['convnet', 'pretrained'])
def test_all_numbers_at_the_ends_of_their_ranges_train_or_diverge(tmp_path, cheap, weights, capsys, script, train, end):
    values = {key: ends[end] for key, ends in ranges_of(script).items()} | {
        'num_epochs': 1, 'num_training': 60, 'hidden_size': 8 ** end, 'num_classes': 1000, 'layer_config': '512 1'}
    options = [word for key in values.keys() & ranges_of(script) for word in (
        f'--{key.replace("_", "-")}', *str(values[key]).split())]
    options += ['--weights', weights, '--mode', 'fine-tuned'] if train is pretrained else []
    status, errors = train(tmp_path, '--experiment', 'best', *options), capsys.readouterr().err
    assert status == 0 or status == 1 and 'diverged' in errors, errors


@pytest.mark.parametrize('options, sentence', [
    ('--num-epoch 3', 'Unrecognized options: --num-epoch, 3: did you mean --num-epochs? (all options: python '
                      'ex3_convnet.py --help)\n'),
    ('--num_epochs=2.5 --flip 1', "--num-epochs must be a whole number, got '2.5'"),
    ('--num-epochs --flip 1', "--num-epochs must be a whole number, got ''"),
    ('--hidden-size 4 b --flip 1', "--hidden-size must be whole numbers, such as (1, 2), got '4 b'"),
    ('--learning-rate 1 --learning-rate -x --learning-rate-decay 1', "--learning-rate must be a number, got '-x'"),
    ('--optimizer AdamW', "--optimizer must be 'Adam' or 'SGD' or 'Muon', got 'AdamW'"),
    ('--seeds', 'seeds must be between 0 and 2,147,483,648, got ()'),
    ('--experiment Q9', 'experiment must be one of Q1, Q2a, '),
    ('--hidden-size 4 4 4 4 4 4', 'hidden_layers (the constant hidden_size) must name one to five blocks')])
def test_an_option_that_makes_no_sense_is_one_sentence_before_anything_is_written(tmp_path, capsys, options, sentence):
    assert_refused(convnet(tmp_path, *options.split()), capsys, f'ex3_convnet: error: {sentence}')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('row, words', [
    (dict(optimizer='AdamW'), "optimizer must be 'Adam' or 'SGD' or 'Muon', got 'AdamW'"),
    (dict(patience=2.5), 'patience must be a whole number or None, got 2.5'), (dict(dropout=True), 'got True'),
    (dict(hidden_size=(4, True)), 'got (4, True)'), (dict(hidden_size=(4, 2.0)), 'got (4, 2.0)'),
    (dict(whiten=1), 'whiten must be True or False, got 1'),
    (dict(norm='BN'), 'did you mean norm_layer'), (dict(device='cpu'), 'device, which is not'),
    (dict(dropout=1), 'dropout must be between'), (dict(), 'share the folder a+b')])
def test_a_row_that_makes_no_sense_is_named(tmp_path, monkeypatch, capsys, row, words):
    rows = {'a + b': {}, 'other' if row else 'A+B': row}
    monkeypatch.setitem(ex3_convnet.QUESTIONS, 'Q1', Question('?', rows))
    assert_refused(convnet(tmp_path), capsys, words)
    assert list(tmp_path.iterdir()) == []
