"""Options of the tests."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported: thousands of tiny steps gain nothing by more


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=6, help='how often tests/test_kill.py kills a training (default: 6)')
