"""An experiment of seconds, for tests that break it, and the comparison of what two of them leave."""
import csv
import json
from pathlib import Path

TINY = ['--data', 'shapes', '--hidden-size', '4', '4', '4', '4', '4', '--num-training', '200', '--num-validation', '40',
        '--batch-size', '20', '--num-epochs', '3', '--device', 'cpu', '--precision', 'fp32']
TIMED = ('seconds', 'images_per_second')


def outcome(folder: Path) -> dict:
    """Every file below `folder` -> its content, byte for byte, except for what the clock decides."""
    return {str(path.relative_to(folder)): _untimed(path) for path in sorted(folder.rglob('*')) if path.is_file()}


def _untimed(path: Path) -> object:
    if path.suffix == '.csv':
        return [[value for key, value in row.items() if key not in TIMED] for row in csv.DictReader(path.open())]
    if path.name == 'result.json':
        return {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMED}
    if path.name == 'summary.md':
        return [line.rsplit('|', 2)[0] for line in path.read_text().splitlines()]  # its last column: seconds
    return path.read_bytes()


def assert_same_outcome(folder: Path, reference: Path) -> None:
    found, expected = outcome(folder), outcome(reference)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
