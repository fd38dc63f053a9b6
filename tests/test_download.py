"""datasets/get_datasets.sh against a server on this machine, with a small archive in place of CIFAR-10."""
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

SCRIPT = Path(__file__).parent.parent / 'datasets' / 'get_datasets.sh'
TOOLS = ['bash', 'dirname', 'md5sum', 'md5', 'tar', 'gzip', 'mkdir', 'mv', 'rm']
FILES = {name: random.Random(name).randbytes(50_000) for name in ('data_batch_1', 'test_batch', 'batches.meta')}

pytestmark = pytest.mark.skipif(os.name == 'nt' or not shutil.which('bash'), reason='needs bash, not Windows')


def pack(folder):
    """The bytes of a tar.gz that holds FILES in a folder; about 150,000."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode='w:gz') as tar:
        for name, data in FILES.items():
            member = tarfile.TarInfo(f'{folder}/{name}')
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


ARCHIVE = pack('cifar-10-batches-py')


class Server(http.server.ThreadingHTTPServer):
    """Sends `body`; remembers each request's Range header (or None), and how many bytes it sent in all."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.body, self.status, self.supports_ranges = ARCHIVE, 200, True
        self.cuts = []  # the next answers end after so many bytes
        self.requests, self.bytes_sent = [], 0
        self.url = f'http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get('Range')
        server.requests.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted and server.supports_ranges else 0
        size = len(server.body)
        self.send_response(416 if start >= size else 206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {"*" if start >= size else f"{start}-{size - 1}"}/{size}')
        self.send_header('Content-Length', str(max(size - start, 0)))
        self.end_headers()
        part = server.body[start:][:server.cuts.pop(0) if server.cuts else None]
        self.wfile.write(part)
        server.bytes_sent += len(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Course:
    """A copy of the script in a folder of its own, run with nothing on the PATH but what it may use."""

    def __init__(self, folder, client):
        self.datasets, self.elsewhere, self.bin = folder / 'my course/datasets', folder / 'elsewhere', folder / 'bin'
        self.data, self.archive = (self.datasets / name for name in ('cifar-10-batches-py', 'cifar-10-python.tar.gz'))
        for new in (self.datasets, self.elsewhere, self.bin):
            new.mkdir(parents=True)
        for tool in filter(shutil.which, [*TOOLS, client]):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.replace_tool('sleep', f'echo $1 >> "{self.bin}/pauses"')  # nobody waits here before the next try
        self.script = Path(shutil.copy(SCRIPT, self.datasets))
        self.environment = {'PATH': str(self.bin), 'HOME': str(self.elsewhere)}  # no proxy, no .curlrc
        self.expect(ARCHIVE)

    def expect(self, archive):
        self.environment['CIFAR10_MD5'] = hashlib.md5(archive).hexdigest()

    def replace_tool(self, name, commands):
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f'#!/bin/sh\n{commands}\n')
        (self.bin / name).chmod(0o755)

    def start(self, *arguments):
        return subprocess.Popen(
            [self.script, *arguments], env=self.environment, cwd=self.elsewhere, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)

    def run(self, *arguments):
        """(exit status, standard output, standard error)"""
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=30)
        return process.returncode, output, errors

    def left(self):
        """The names of what is in the datasets folder beside the script."""
        assert not list(self.elsewhere.iterdir()), 'something was written to the current folder'
        return {path.name for path in self.datasets.iterdir()} - {self.script.name}

    def succeeds(self, url):
        """Runs, and leaves the data and nothing else. Returns standard output and error."""
        status, output, errors = self.run(url)
        assert status == 0, errors
        assert self.left() == {self.data.name}
        assert {path.name: path.read_bytes() for path in self.data.iterdir()} == FILES
        return output, errors

    def fails(self, url, *words, left=()):
        """Runs, says these words and leaves only these files."""
        status, _, errors = self.run(url)
        assert status == 1 and all(word in errors for word in words), errors
        assert self.left() == {path.name for path in left}


@pytest.fixture(params=['curl', 'wget'])
def course(request, tmp_path):
    if not shutil.which(request.param):
        pytest.skip(f'{request.param} is not installed')
    return Course(tmp_path, request.param)


def test_the_checksum_is_torchvisions():
    assert re.findall(r'\b[0-9a-f]{32}\b', SCRIPT.read_text()) == [CIFAR10.tgz_md5]


def test_download_started_in_another_folder_leaves_the_data_and_nothing_else(course, server):
    output, errors = course.succeeds(server.url)
    assert f'CIFAR-10 is in {course.data}.' in output and server.requests == [None]
    assert errors.count('\n') <= 1, 'a progress bar, where there is no terminal'


def test_a_folder_that_is_there_is_left_alone_without_a_request(course, server):
    course.data.mkdir()
    (course.data / 'test_batch').write_bytes(b'of torchvision, or changed')
    status, output, _ = course.run(server.url)
    assert status == 0 and 'already' in output and 'delete that folder' in output and output.count('\n') == 1
    assert server.requests == [] and (course.data / 'test_batch').read_bytes() == b'of torchvision, or changed'


def test_transfer_that_breaks_off_is_resumed_in_the_same_run(course, server):
    server.cuts = [60_000, 40_000]
    course.succeeds(server.url)
    assert server.requests == [None, 'bytes=60000-', 'bytes=100000-'] and server.bytes_sent == len(ARCHIVE)


def test_later_run_resumes_what_an_earlier_one_did_not_finish(course, server):
    server.cuts = [30_000] * 3
    course.fails(server.url, 'Run this again to resume', left=[course.archive])
    assert course.archive.read_bytes() == ARCHIVE[:90_000]
    course.succeeds(server.url)
    assert server.requests[3:] == ['bytes=90000-'] and server.bytes_sent == len(ARCHIVE)


def test_partial_archive_is_no_obstacle_if_the_server_cannot_resume(course, server):
    server.supports_ranges = False
    course.archive.write_bytes(ARCHIVE[:60_000])
    course.succeeds(server.url)


@pytest.mark.parametrize('supports_ranges', [True, False])
@pytest.mark.parametrize('size', [60_000, len(ARCHIVE), 1_000_000], ids=['shorter', 'as long', 'longer'])
def test_archive_with_wrong_content_is_downloaded_from_the_start(course, server, supports_ranges, size):
    server.supports_ranges = supports_ranges
    course.archive.write_bytes(b'?' * size)
    assert 'starting over' in course.succeeds(server.url)[0]


def test_archive_put_there_by_hand_is_unpacked_without_a_request(course, server):
    course.archive.write_bytes(ARCHIVE)
    course.succeeds(server.url)
    assert server.requests == []


def test_download_with_a_wrong_checksum_is_deleted(course, server):
    server.body = ARCHIVE[:-1] + b'?'
    course.fails(server.url, 'wrong checksum', 'try another URL')
    assert len(server.requests) == 1


@pytest.mark.parametrize('partial', [False, True])
def test_http_error_is_reported_at_once_and_does_not_cost_the_partial_archive(course, server, partial):
    server.status = 404
    if partial:
        course.archive.write_bytes(ARCHIVE[:60_000])
    course.fails(server.url, '404', 'mirror', left=[course.archive] if partial else [])
    assert len(server.requests) == 1
    assert not partial or course.archive.read_bytes() == ARCHIVE[:60_000]


def test_missing_server_fails_within_seconds(course):
    with Server() as unused:
        url = unused.url
    start = time.monotonic()
    course.fails(url, f'could not download {url}')
    assert time.monotonic() - start + sum(map(int, (course.bin / 'pauses').read_text().split())) < 10


@pytest.mark.parametrize('what', ['no archive', 'other files', 'full disk'])
def test_archive_that_cannot_be_unpacked_leaves_no_data(course, server, what):
    server.body = {'no archive': b'no archive', 'other files': pack('other-folder'), 'full disk': ARCHIVE}[what]
    course.expect(server.body)
    if what == 'full disk':
        course.replace_tool('tar', 'mkdir .unpacking/cifar-10-batches-py; exit 2')
    course.fails(server.url, 'could not unpack', left=[course.archive])  # its checksum is right: for the next run


@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_unpacking_leaves_nothing_half_done(course, server, sent):
    if signal.getsignal(sent) == signal.SIG_IGN:
        pytest.skip('started in a way that ignores this signal, and so does what it starts')
    course.replace_tool('tar', 'mkdir .unpacking/half; exec /bin/sleep 20')
    process = course.start(server.url)
    while process.poll() is None and not (course.datasets / '.unpacking' / 'half').exists():
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    process.communicate(timeout=10)
    assert process.returncode in (128 + sent, -sent)
    assert course.left() == {course.archive.name}


@pytest.mark.parametrize('arguments', [['--help'], ['cifar-10-python.tar.gz'], ['http://127.0.0.1:1/a', 'b']])
def test_anything_but_one_url_shows_the_usage(tmp_path, arguments):
    status, _, errors = Course(tmp_path, 'curl').run(*arguments)
    assert status == 1 and 'usage: datasets/get_datasets.sh [URL]' in errors


def test_without_curl_and_wget_the_script_says_what_to_install(tmp_path):
    assert 'curl or wget is needed' in Course(tmp_path, 'neither').run()[2]
