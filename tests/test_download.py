"""datasets/get_datasets.sh against a server on this machine, with a small archive in place of CIFAR-10."""
import hashlib
import http.server
import io
import os
import random
import shutil
import signal
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

SCRIPT = Path(__file__).parent.parent / 'datasets' / 'get_datasets.sh'
TOOLS = ['bash', 'dirname', 'md5sum', 'md5', 'tar', 'gzip', 'mkdir', 'mv', 'rm']
CONTENT = random.Random(0).randbytes(150_000)

pytestmark = pytest.mark.skipif(os.name == 'nt' or not shutil.which('bash'), reason='needs bash, not Windows')


def pack(folder):
    """The bytes of a tar.gz that holds CONTENT in a folder."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode='w:gz') as tar:
        member = tarfile.TarInfo(f'{folder}/test_batch')
        member.size = len(CONTENT)
        tar.addfile(member, io.BytesIO(CONTENT))
    return buffer.getvalue()


ARCHIVE = pack('cifar-10-batches-py')


class Handler(http.server.BaseHTTPRequestHandler):
    """Leads from / to /to, and sends `course.body` from where it is asked to, if it `resumes`."""

    def do_GET(self):
        course, start = self.server.course, int(self.headers.get('Range', 'bytes=0-')[6:-1])
        if self.path == '/':
            status, headers, part = 302, ['Location: /to'], b''
        else:
            course.starts.append(start)
            start, size = start if course.resumes else 0, len(course.body)
            status, part = course.status or (416 if start >= size else 206 if start else 200), course.body[start:]
            headers = [f'Content-Length: {len(part)}']
            headers += [f'Content-Range: bytes {f"{start}-{size - 1}" if part else "*"}/{size}'] if start else []
            part = part[:course.cuts.pop(0) if course.cuts else None]
        self.wfile.write('\r\n'.join([f'HTTP/1.0 {status} Said so', *headers, '', '']).encode() + part)


class Course:
    """A copy of the script in a folder of its own, run in another with nothing on the PATH but what it may use.

    The server's next answers end after the bytes of `cuts`; `starts`: where the requests began.
    """

    def __init__(self, folder, client, port):
        self.body = self.expected = ARCHIVE
        self.status, self.resumes, self.cuts, self.starts = None, True, [], []
        self.datasets, self.elsewhere, self.bin = folder / 'my course/datasets', folder / 'elsewhere', folder / 'bin'
        self.data, self.archive = (self.datasets / name for name in ('cifar-10-batches-py', 'cifar-10-python.tar.gz'))
        for new in (self.datasets, self.elsewhere, self.bin):
            new.mkdir(parents=True)
        for tool in filter(shutil.which, [*TOOLS, client]):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.replace_tool('sleep', f'echo $1 >> "{self.bin}/pauses"')  # nobody waits here before the next try
        self.script, self.url = shutil.copy(SCRIPT, self.datasets), f'http://127.0.0.1:{port}/'

    def replace_tool(self, name, commands):
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f'#!/bin/sh\n{commands}\n')
        (self.bin / name).chmod(0o755)

    def run(self, *arguments, left=(), status=1):
        """Leaves only these files, beside the script, and this exit status -> what it printed, what it complained."""
        environment = {'PATH': str(self.bin), 'HOME': str(self.elsewhere),  # no proxy, no .curlrc
                       'CIFAR10_MD5': hashlib.md5(self.expected).hexdigest()}
        done = subprocess.run([self.script, *(arguments or [self.url])], env=environment, cwd=self.elsewhere,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
                              start_new_session=True)
        assert not list(self.elsewhere.iterdir()), 'something was written to the current folder'
        assert {*self.datasets.iterdir()} == {Path(self.script), *left} and done.returncode == status, done.stderr
        return done.stdout, done.stderr

    def succeeds(self):
        """Leaves the data and nothing else -> what it printed."""
        output, errors = self.run(left=[self.data], status=0)
        assert (self.data / 'test_batch').read_bytes() == CONTENT
        assert f'CIFAR-10 is in {self.data}.' in output and '#' not in errors, 'a progress bar without a terminal'
        return output


@pytest.fixture(params=['curl', 'wget'])
def course(request, tmp_path):
    if not shutil.which(request.param):
        pytest.skip(f'{request.param} is not installed')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.course = Course(tmp_path, request.param, server.server_port)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.course
        server.shutdown()
        thread.join()


def test_the_address_and_the_checksum_are_torchvisions():
    assert f':-{CIFAR10.url}}}' in SCRIPT.read_text() and f':-{CIFAR10.tgz_md5}}}' in SCRIPT.read_text()


def test_a_transfer_that_breaks_off_is_resumed_in_the_same_run_and_in_a_later_one(course):
    course.cuts = [30_000, 20_000, 10_000, 50_000]
    assert 'Run this again to resume' in course.run(left=[course.archive])[1]
    assert course.archive.read_bytes() == ARCHIVE[:60_000]
    (course.datasets / '.unpacking').mkdir()  # of a run that was killed
    course.succeeds()
    assert course.starts == [0, 30_000, 50_000, 60_000, 110_000]


def test_a_folder_that_is_there_is_left_alone_without_a_request(course):
    course.data.mkdir()
    (course.data / 'changed').touch()
    output, _ = course.run(left=[course.data], status=0)
    assert 'already' in output and 'delete that folder' in output
    assert course.starts == [] and list(course.data.iterdir()) == [course.data / 'changed']


@pytest.mark.parametrize('resumes', [True, False])
@pytest.mark.parametrize('there', [b'?' * 60_000, b'?' * len(ARCHIVE), b'?' * 1_000_000, ARCHIVE[:60_000], ARCHIVE],
                         ids=['wrong and short', 'wrong', 'wrong and long', 'short', 'whole'])
def test_an_archive_that_is_there_is_used_where_it_can_be(course, resumes, there):
    course.resumes = resumes
    course.archive.write_bytes(there)
    assert 'could not be resumed: starting over' in course.succeeds() or there[:1] != b'?'
    assert (course.starts == []) == (there == ARCHIVE)


def test_a_download_that_fails_says_why_at_once_and_leaves_only_what_can_be_resumed(course):
    course.body = ARCHIVE[:-1] + b'?'
    errors = course.run()[1]
    assert 'wrong checksum' in errors and 'try another URL' in errors and course.starts == [0]
    course.status = 404
    assert '404' in course.run()[1]
    course.archive.write_bytes(ARCHIVE[:60_000])
    errors = course.run(left=[course.archive])[1]
    assert '404' in errors and 'mirror' in errors and course.starts == [0, 0, 60_000]
    assert 'could not download http://127.0.0.1:1/' in course.run('http://127.0.0.1:1/', left=[course.archive])[1]
    assert sum(map(int, (course.bin / 'pauses').read_text().split())) < 8  # seconds until a missing server is given up
    assert course.archive.read_bytes() == ARCHIVE[:60_000]


@pytest.mark.parametrize('body, tar, status', [
    (b'no archive', None, 1), (pack('other-folder'), None, 1),
    (ARCHIVE, 'mkdir .unpacking/cifar-10-batches-py; exit 2', 1),  # the disk is full
    (ARCHIVE, 'mkdir .unpacking/half; kill -INT 0; /bin/sleep 20', 130),
    (ARCHIVE, 'mkdir .unpacking/half; kill -TERM 0; /bin/sleep 20', -15)],
    ids=['no archive', 'other files', 'full disk', 'Ctrl-C', 'SIGTERM'])
def test_unpacking_that_fails_or_is_interrupted_leaves_no_data(course, body, tar, status):
    if status == 130 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        pytest.skip('started in a way that ignores this signal, and so does what it starts')
    course.body = course.expected = body
    if tar:
        course.replace_tool('tar', tar)
    errors = course.run(left=[course.archive], status=status)[1]  # its checksum is right: for the next run
    assert 'could not unpack' in errors or status != 1


def test_wrong_arguments_show_the_usage_and_a_missing_tool_is_named(tmp_path):
    course = Course(tmp_path, 'neither', 1)
    for arguments in (['--help'], ['cifar-10-python.tar.gz'], ['http://127.0.0.1:1/a', 'b']):
        assert 'usage: datasets/get_datasets.sh [URL]' in course.run(*arguments)[1]
    assert 'curl or wget is needed' in course.run()[1]
