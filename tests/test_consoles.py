"""What a run shows, on consoles that cannot show it, and where nobody reads it: no run is lost."""
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tiny import RUN, TINY, TINY_NET, assert_same_outcome, convnet, make_images

import ex3_convnet
from lab import progress
from lab.progress import Progress

NAME = '猫 – ±'


class Window(io.TextIOBase):
    """A strict console with a progress bar, no file, as IDLE has it. Encoding None: as io.StringIO, which takes all."""
    encoding = ''

    def __init__(self, encoding: str | None):
        self.encoding, self.text = encoding, ''

    def write(self, text: str) -> int:
        self.text += text.encode(self.encoding or 'utf-8').decode(self.encoding or 'utf-8')
        return len(text)

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8', None])
def test_a_console_shows_what_it_can_and_the_rest_escaped(tmp_path, cheap, monkeypatch, encoding):
    def escaped(word):
        return word.encode(encoding or 'utf-8', 'backslashreplace').decode(encoding or 'utf-8')

    monkeypatch.setattr(sys, 'stdout', output := Window(encoding))
    monkeypatch.setattr(sys, 'stderr', errors := Window(encoding))
    images = make_images(tmp_path / NAME)
    assert convnet(tmp_path / NAME, '--data', images, '--batch-size', 5, '--num-epochs', 1, '--seeds', 0, 1) == 0
    lines = output.text.splitlines()
    assert [line for line in lines if line.startswith(f'data: {escaped(NAME)}, 2 classes')]
    assert [line for line in lines if line.startswith('| ConvNet') and f' {escaped("±")} ' in line]
    assert [line for line in lines if escaped(NAME) in line and line.endswith('confusion.png')]
    assert '\rConvNet, seed 0: 100%' in errors.text  # the bar
    assert convnet(tmp_path, '--data', tmp_path / '猫的') == 2
    assert errors.text.splitlines()[-1].endswith(escaped('猫的'))
    assert convnet(tmp_path, '--num-epoch', 3) == 2
    assert 'error: Unrecognized options: --num-epoch, 3: did you mean --num-epochs?' in errors.text.splitlines()[-1]
    with pytest.raises(SystemExit, match='^0$'):
        convnet(tmp_path, '--help')
    assert escaped('±') in output.text.partition('--seeds')[2]


def closed_stream():
    with open(os.devnull, 'w') as stream:
        return stream


def pipe_without_a_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, 'w')


@pytest.mark.parametrize('open_stream', [lambda: None, closed_stream, pipe_without_a_reader],
                         ids=['none, as under pythonw', 'closed', 'no reader'])
def test_what_nobody_can_read_ends_no_run(tmp_path, whole, monkeypatch, open_stream):
    streams = {name: open_stream() for name in ('stdout', 'stderr')}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        assert convnet(tmp_path) == 0
    for stream in filter(None, streams.values()):
        stream.close()  # as Python does at its end: what is still buffered must not raise
    assert_same_outcome(tmp_path, whole)


@pytest.mark.parametrize('seconds, later, lines', [
    (0.6, 10, ['40 min left, 4 h 00 min in all', 'To see something sooner: --experiment fast, or --num-training 5000 '
               '--num-epochs 3, which takes about 90 s per run.']),
    (0.1, 0, ['7 min left'])])
def test_the_time_to_come_is_said_once_and_what_is_sooner_where_it_is_long(monkeypatch, capsys, seconds, later, lines):
    now, losses = [0.0], torch.zeros(2000)
    monkeypatch.setattr(progress, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    shown = Progress('', later_epochs=later, sooner='--experiment fast, or ')
    shown.start(num_epochs=2, epochs_done=0, images_per_epoch=200_000)
    shown.bar = Mock()
    for epoch in (1, 2):
        for _ in shown.steps([(None, range(100))] * 30, epoch, losses, losses):
            now[0] += seconds  # a step of 100 images
    assert capsys.readouterr().out.splitlines() == [f': {lines[0]}', *lines[1:]]
    assert sum(call.args[0] for call in shown.bar.update.call_args_list) == 2 * 30 * 100


# --- real processes ------------------------------------------------------------------------------------------


BUFFERED = os.environ | {'PYTHONUNBUFFERED': ''}  # as Python does where nobody asks for more


def command(results: Path | str, *options: object) -> list[str]:
    return [ex3_convnet.__file__, *TINY, *TINY_NET, '--results', str(results), *map(str, options)]


@pytest.mark.skipif(sys.platform != 'linux', reason='where names of files are bytes, and the C locale is ASCII')
def test_nothing_in_a_name_a_locale_or_a_matplotlibrc_loses_a_run(tmp_path):
    name = os.fsdecode('$a_b$ 猫 '.encode() + b'caf\xe9')  # mathematics, no glyph, Latin-1
    make_images(tmp_path / name)
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.family: no such font\n')
    environment = BUFFERED | {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': '',
                              'MATPLOTLIBRC': str(tmp_path)}
    script = command(name, '--data', name, '--batch-size', 5)
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', *script], cwd=tmp_path, env=environment,
                          capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b'')
    folder = tmp_path / name / RUN.parents[1]
    assert {path.stem for path in folder.glob('*.png')} == {'curves', 'filters', 'mistakes', 'confusion'}
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in folder.rglob('*.png'))
    assert '$a_b$' in (folder / 'summary.md').read_text(encoding='utf-8')


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no nohup')
def test_under_nohup_a_log_shows_each_line_at_once_and_the_run_outlives_its_terminal_until_it_is_stopped(tmp_path):
    log = tmp_path / 'log'
    script = ['nohup', sys.executable, *command(tmp_path, '--num-epochs', 100_000)]
    with log.open('w') as file, subprocess.Popen(script, env=BUFFERED, stdin=subprocess.DEVNULL, stdout=file,
                                                 stderr=file) as process:
        def wait_for_another_epoch():
            seen, deadline = log.read_text().count('images/s'), time.monotonic() + 120
            while log.read_text().count('images/s') == seen and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        wait_for_another_epoch()
        process.send_signal(signal.SIGHUP)
        wait_for_another_epoch()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert log.read_text().endswith('\nInterrupted. Run the same command again to continue.\n')
    assert '\r' not in log.read_text()  # no bar
    assert (tmp_path / RUN / 'checkpoint.pt').exists()
