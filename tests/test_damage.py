"""Damaged, foreign and malicious files: one sentence that says what to do, nothing lost, nothing executed."""
import pickle
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import RUN, assert_refused, assert_same_outcome, contents, convnet

pytestmark = pytest.mark.usefixtures('cheap')


class Malicious:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path.with_name('executed')), 'w')


def rewrite(change):
    """-> a damage to a file: a change of its bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


DAMAGES = {
    'missing': Path.unlink,
    'a folder': lambda path: path.unlink() or path.mkdir(),
    'empty': rewrite(lambda content: b''),
    'half': rewrite(lambda content: content[:len(content) // 2]),
    'garbage': rewrite(lambda content: random.Random(0).randbytes(3000)),
    'one bit': rewrite(flip_a_bit),
    'without its last row': rewrite(lambda content: b''.join(content.splitlines(keepends=True)[:-1])),
    'another type': rewrite(lambda content: content.replace(b'"finished"', b'5')),
    'another seed': rewrite(lambda content: content.replace(b'"seed": 0', b'"seed": 1')),
    'no state dict': lambda path: torch.save([1, 2], path),
    'another network': lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
}
MALICIOUS = {
    'malicious': lambda path: torch.save({'model': Malicious(path)}, path),
    'malicious, old format': lambda path: torch.save({'model': Malicious(path)}, path,
                                                     _use_new_zipfile_serialization=False),
    'malicious pickle': lambda path: path.write_bytes(pickle.dumps(Malicious(path), protocol=2)),
}
EVERYWHERE = ['a folder', 'empty', 'half', 'garbage']
OF_A_FINISHED_RUN = {
    'config.json': ['missing', *EVERYWHERE], 'history.csv': ['missing', 'without its last row', *EVERYWHERE],
    'result.json': ['another type', 'another seed', *EVERYWHERE], 'test_logits.pt': ['missing', 'half', 'malicious'],
    'best.pt': ['missing', 'one bit', 'another network', 'malicious'],
}


def refuses(results: Path, name: str, damage: str, capsys) -> None:
    (DAMAGES | MALICIOUS)[damage](results / RUN / name)
    before = contents(results)
    assert_refused(convnet(results), capsys, results / RUN, name, f'delete {results / RUN} to train')
    assert contents(results) == before  # and nothing was executed


@pytest.mark.parametrize('damage', [*EVERYWHERE, 'one bit', 'no state dict', 'another network', *MALICIOUS])
def test_a_damaged_checkpoint_is_named_and_nothing_else_is_lost(tmp_path, unfinished, capsys, damage):
    refuses(shutil.copytree(unfinished, tmp_path / 'results'), 'checkpoint.pt', damage, capsys)


@pytest.mark.parametrize('name, damage', [(name, damage) for name in OF_A_FINISHED_RUN
                                          for damage in OF_A_FINISHED_RUN[name]])
def test_a_damaged_file_of_a_finished_run_is_named_and_nothing_else_is_lost(tmp_path, whole, capsys, name, damage):
    refuses(shutil.copytree(whole, tmp_path / 'results'), name, damage, capsys)


def test_constants_that_are_lost_are_named_and_deleting_the_run_is_enough(tmp_path, unfinished, whole, capsys):
    results = shutil.copytree(unfinished, tmp_path / 'results')
    refuses(results, 'config.json', 'missing', capsys)
    shutil.rmtree(results / RUN)
    assert convnet(results) == 0
    assert_same_outcome(results, whole)


@pytest.mark.parametrize('damage', MALICIOUS)
def test_the_malicious_files_would_execute_if_they_were_loaded_without_care(tmp_path, damage):
    MALICIOUS[damage](tmp_path / 'file.pt')
    with suppress(RuntimeError):  # what it executed first is none of torch's files
        torch.load(tmp_path / 'file.pt', weights_only=False)
    assert (tmp_path / 'executed').exists()
