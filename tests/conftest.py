"""Options of the tests."""


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=6, help='how often tests/test_kill.py kills a training (default: 6)')
