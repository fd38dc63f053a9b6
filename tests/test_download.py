"""datasets/get_datasets.sh against a server on this machine, with a small archive in place of CIFAR-10."""
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

SCRIPT = Path(__file__).parent.parent / 'datasets' / 'get_datasets.sh'
TOOLS = ['bash', 'dirname', 'md5sum', 'md5', 'tar', 'gzip', 'mkdir', 'mv', 'rm', 'sleep']

pytestmark = pytest.mark.skipif(os.name == 'nt' or not shutil.which('bash'), reason='needs bash, not Windows')


def md5(data):
    return hashlib.md5(data).hexdigest()


FILES = {name: random.Random(name).randbytes(50_000) for name in ('data_batch_1', 'test_batch', 'batches.meta')}


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

    def __init__(self, body):
        super().__init__(('127.0.0.1', 0), Handler)
        self.body = body
        self.status = 200
        self.supports_ranges = True
        self.cuts = []  # the next answers end after so many bytes
        self.requests = []
        self.bytes_sent = 0
        self.url = f'http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, range_header = self.server, self.headers.get('Range')
        server.requests.append(range_header)
        start, size = 0, len(server.body)
        if range_header and server.supports_ranges:
            start = int(re.fullmatch(r'bytes=(\d+)-', range_header)[1])
        if server.status != 200:
            self.send_error(server.status)
            return
        if start >= size:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{size}')
        elif start:
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{size - 1}/{size}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(max(size - start, 0)))
        self.end_headers()
        part = server.body[start:][:server.cuts.pop(0) if server.cuts else None]
        self.wfile.write(part)
        server.bytes_sent += len(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server(ARCHIVE) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Course:
    """A copy of the script in a folder of its own, run with nothing on the PATH but what it may use."""

    def __init__(self, folder, client):
        self.datasets = folder / 'my course' / 'datasets'
        self.data = self.datasets / 'cifar-10-batches-py'
        self.archive = self.datasets / 'cifar-10-python.tar.gz'
        self.elsewhere = folder / 'elsewhere'
        self.bin = folder / 'bin'
        for new in (self.datasets, self.elsewhere, self.bin):
            new.mkdir(parents=True)
        for tool in filter(shutil.which, [*TOOLS, client]):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.script = Path(shutil.copy(SCRIPT, self.datasets))
        self.environment = {  # no proxy, no .curlrc
            'PATH': str(self.bin),
            'HOME': str(self.elsewhere),
            'CIFAR10_MD5': md5(ARCHIVE),
        }

    def replace_tool(self, name, commands):
        (self.bin / name).unlink()
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

    def check_data(self):
        assert self.left() == {self.data.name}
        assert {path.name: path.read_bytes() for path in self.data.iterdir()} == FILES


@pytest.fixture(params=['curl', 'wget'])
def course(request, tmp_path):
    if not shutil.which(request.param):
        pytest.skip(f'{request.param} is not installed')
    course = Course(tmp_path, request.param)
    course.replace_tool('sleep', 'exit 0')  # nobody needs to wait here before the next try
    return course


def test_the_checksum_is_torchvisions():
    assert re.findall(r'\b[0-9a-f]{32}\b', SCRIPT.read_text()) == [CIFAR10.tgz_md5]


def test_download_started_in_another_folder_leaves_the_data_and_nothing_else(course, server):
    status, output, errors = course.run(server.url)
    assert status == 0, errors
    assert f'CIFAR-10 is in {course.data}.' in output
    assert errors.count('\n') <= 1, 'a progress bar, where there is no terminal'
    assert server.requests == [None]
    course.check_data()


def test_a_folder_that_is_there_is_left_alone_without_a_request(course, server):
    course.data.mkdir()
    (course.data / 'test_batch').write_bytes(b'of torchvision, or changed')
    status, output, _ = course.run(server.url)
    assert status == 0 and 'already' in output and 'delete that folder' in output and output.count('\n') == 1
    assert server.requests == [] and (course.data / 'test_batch').read_bytes() == b'of torchvision, or changed'


def test_transfer_that_breaks_off_is_resumed_in_the_same_run(course, server):
    server.cuts = [60_000, 40_000]
    assert course.run(server.url)[0] == 0
    assert server.requests == [None, 'bytes=60000-', 'bytes=100000-']
    assert server.bytes_sent == len(server.body)
    course.check_data()


def test_later_run_resumes_what_an_earlier_one_did_not_finish(course, server):
    server.cuts = [30_000] * 3
    status, _, errors = course.run(server.url)
    assert status == 1
    assert 'Run this again to resume' in errors
    assert course.left() == {course.archive.name}
    assert course.archive.read_bytes() == server.body[:90_000]

    assert course.run(server.url)[0] == 0
    assert server.requests[3:] == ['bytes=90000-']
    assert server.bytes_sent == len(server.body)
    course.check_data()


def test_partial_archive_is_no_obstacle_if_the_server_cannot_resume(course, server):
    server.supports_ranges = False
    course.archive.write_bytes(server.body[:60_000])
    assert course.run(server.url)[0] == 0
    course.check_data()


@pytest.mark.parametrize('supports_ranges', [True, False])
@pytest.mark.parametrize('size', [60_000, None, 1_000_000], ids=['shorter', 'as long', 'longer'])
def test_archive_with_wrong_content_is_downloaded_from_the_start(course, server, supports_ranges, size):
    server.supports_ranges = supports_ranges
    course.archive.write_bytes(b'?' * (size or len(server.body)))
    status, output, errors = course.run(server.url)
    assert status == 0, errors
    assert 'starting over' in output
    course.check_data()


def test_archive_put_there_by_hand_is_unpacked_without_a_request(course, server):
    course.archive.write_bytes(server.body)
    assert course.run(server.url)[0] == 0
    assert server.requests == []
    course.check_data()


def test_download_with_a_wrong_checksum_is_deleted(course, server):
    server.body = server.body[:-1] + b'?'
    status, _, errors = course.run(server.url)
    assert status == 1
    assert 'wrong checksum' in errors and 'try another URL' in errors
    assert len(server.requests) == 1
    assert course.left() == set()


def test_http_error_is_reported_at_once(course, server):
    server.status = 404
    status, _, errors = course.run(server.url)
    assert status == 1
    assert '404' in errors and 'mirror' in errors
    assert len(server.requests) == 1
    assert course.left() == set()


def test_http_error_does_not_cost_the_partial_archive(course, server):
    server.status = 404
    course.archive.write_bytes(server.body[:60_000])
    assert course.run(server.url)[0] == 1
    assert course.archive.read_bytes() == server.body[:60_000]


def test_missing_server_fails_within_seconds(course):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{unused.getsockname()[1]}/cifar-10-python.tar.gz'
    course.replace_tool('sleep', f'echo $1 >> "{course.bin}/pauses"')
    start = time.monotonic()
    status, _, errors = course.run(url)
    seconds = time.monotonic() - start + sum(map(int, (course.bin / 'pauses').read_text().split()))
    assert status == 1
    assert f'could not download {url}' in errors
    assert course.left() == set()
    assert seconds < 10


@pytest.mark.parametrize('content', ['no archive', 'an archive of other files', 'a disk that fills up'])
def test_archive_that_cannot_be_unpacked_leaves_no_data(course, server, content):
    if content == 'no archive':
        server.body = b'no archive'
    elif content == 'an archive of other files':
        server.body = pack('other-folder')
    else:
        course.replace_tool('tar', 'mkdir .unpacking/cifar-10-batches-py; exit 2')
    course.environment['CIFAR10_MD5'] = md5(server.body)
    status, _, errors = course.run(server.url)
    assert status == 1 and 'could not unpack' in errors
    assert course.left() == {course.archive.name}  # its checksum is right: keep it for the next run


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
def test_anything_but_one_url_shows_the_usage(course, arguments):
    status, _, errors = course.run(*arguments)
    assert status == 1
    assert 'usage: datasets/get_datasets.sh [URL]' in errors


def test_without_curl_and_wget_the_script_says_what_to_install(tmp_path):
    course = Course(tmp_path, 'neither')
    status, _, errors = course.run()
    assert status == 1
    assert 'curl or wget is needed' in errors
