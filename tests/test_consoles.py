"""Consoles that cannot show what is printed, nobody who reads it, and names that no figure likes: no run is lost."""
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import RUN, TINY, TINY_NET, assert_same_outcome, convnet, make_images

import ex3_convnet

NAME = '猫 – ±'


class Terminal(io.TextIOWrapper):
    """Strict, as stdout is, and with a progress bar."""

    def __init__(self, encoding: str):
        super().__init__(io.BytesIO(), encoding)

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


class Window(io.TextIOBase):
    """A console as IDLE has it: no file, and strict for good."""
    encoding = ''

    def __init__(self, encoding: str):
        self.encoding, self.text = encoding, ''

    def write(self, text: str) -> int:
        self.text += text.encode(self.encoding).decode(self.encoding)
        return len(text)


@pytest.mark.parametrize('kind, encoding', [
    (Terminal, 'cp1252'), (Terminal, 'cp866'), (Terminal, 'ascii'), (Terminal, 'utf-8'), (Window, 'cp1252')])
def test_a_console_shows_what_it_can_and_the_rest_escaped(tmp_path, cheap, monkeypatch, kind, encoding):
    def escaped(word):
        return word.encode(encoding, 'backslashreplace').decode(encoding)

    monkeypatch.setattr(sys, 'stdout', output := kind(encoding))
    monkeypatch.setattr(sys, 'stderr', errors := kind(encoding))
    images = make_images(tmp_path / NAME)
    assert convnet(tmp_path / NAME, '--data', images, '--batch-size', 5, '--num-epochs', 1, '--seeds', 0, 1) == 0
    lines = output.text.splitlines()
    assert [line for line in lines if line.startswith(f'data: {escaped(NAME)}, 2 classes')]
    assert [line for line in lines if line.startswith('| ConvNet') and f' {escaped("±")} ' in line]
    assert [line for line in lines if escaped(NAME) in line and line.endswith('confusion.png')]
    assert kind is Window or '\rConvNet, seed 0: 100%' in errors.text  # the bar
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


def full_disk():
    return open('/dev/full', 'w') if os.path.exists('/dev/full') else pytest.skip('needs /dev/full')


@pytest.mark.parametrize('open_stream', [lambda: None, closed_stream, pipe_without_a_reader, full_disk],
                         ids=['none, as under pythonw', 'closed', 'no reader', 'full disk'])
def test_what_nobody_can_read_ends_no_run(tmp_path, whole, monkeypatch, open_stream):
    streams = [open_stream(), open_stream()]
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', streams[0])
        patch.setattr(sys, 'stderr', streams[1])
        assert convnet(tmp_path) == 0
        for stream in filter(None, streams):
            stream.close()  # as Python does at its end: what is still buffered must not raise
    assert_same_outcome(tmp_path, whole)


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


def test_a_reader_that_leaves_after_two_lines_does_not_end_the_run(tmp_path):
    with subprocess.Popen([sys.executable, *command(tmp_path)], env=BUFFERED, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # | head -2
        assert process.stdout.readline().startswith('Q1: ') and process.stdout.readline().startswith('  ConvNet: ')
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 0
    assert (tmp_path / RUN.parents[1] / 'confusion.png').exists()


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no nohup')
def test_a_log_shows_each_line_at_once_and_under_nohup_the_run_outlives_its_terminal(tmp_path):
    log, text, deadline = tmp_path / 'log', '', time.monotonic() + 120
    script = ['nohup', sys.executable, *command(tmp_path, '--num-epochs', 40)]
    with log.open('w') as file, subprocess.Popen(script, env=BUFFERED, stdin=subprocess.DEVNULL, stdout=file,
                                                 stderr=file) as process:
        while 'epoch   1/40' not in text and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            text = log.read_text()
        assert process.poll() is None and 'summary.md' not in text, text
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 0
    text = log.read_text()
    assert text.count('images/s') == 40 and text.endswith('confusion.png\n')
    assert '\r' not in text  # no bar
