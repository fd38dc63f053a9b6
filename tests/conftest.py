"""Options and a fixture of the tests."""
import os
import socket

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported: thousands of tiny steps gain nothing by more


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=6, help='how often tests/test_kill.py kills a training (default: 6)')


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
