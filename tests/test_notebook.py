"""In a real Jupyter kernel: pictures appear below the cell, and interrupting the kernel is Ctrl-C.

Skipped where nbclient and ipykernel are missing: nothing else needs them.
"""
import base64
from pathlib import Path
from textwrap import dedent

import pytest
from tiny import TINY, TINY_NET

import ex3_convnet

pytest.importorskip('ipykernel')
nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')

OPTIONS = [*TINY, *TINY_NET, '--results', 'RESULTS']
CELLS = {
    '%run': f'%run ex3_convnet.py {" ".join(OPTIONS)}',
    'interrupted': f'''
        import os, pytest, signal, sys, ex3_convnet, training
        sys.path.append('tests')
        from tiny import at_call
        at_call(pytest.MonkeyPatch(), training, 'set_learning_rate', 15, lambda: os.kill(os.getpid(), signal.SIGINT))
        ex3_convnet.main({[*OPTIONS, '--seeds', '1']})''',  # in the second epoch, as Jupyter interrupts a kernel
    'main': f'main({[*OPTIONS, "--seeds", "1"]})',  # of the script that %run ran
    'no options': '''
        assert '-f' in sys.argv, sys.argv  # the kernel's own option, not meant for the script
        edited = ex3_convnet.Config(batch_size=0)
        ex3_convnet.Config = lambda: edited
        ex3_convnet.main()''',
}


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    """Executes the cells one after the other: name -> outputs."""
    folder = tmp_path_factory.mktemp('notebook')
    sources = [dedent(cell.replace('RESULTS', folder.as_posix())) for cell in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources)))
    with pytest.MonkeyPatch.context() as patch:
        for name in ('IPYTHONDIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_CONFIG_DIR'):
            patch.setenv(name, str(folder / name))
        place = {'metadata': {'path': Path(ex3_convnet.__file__).parent}}
        nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, resources=place).execute()
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def printed(outputs, stream: str = 'stdout') -> str:
    return ''.join(output.text for output in outputs if output.output_type == 'stream' and output.name == stream)


def result(outputs) -> str | None:
    return next((output.data['text/plain'] for output in outputs if output.output_type == 'execute_result'), None)


@pytest.mark.parametrize('name, status, epochs', [('%run', None, 3), ('main', '0', 2)])
def test_the_pictures_of_an_experiment_appear_below_its_cell(cells, name, status, epochs):
    output = printed(cells[name])
    paths = [Path(line) for line in output.splitlines() if line.endswith('.png')]
    assert [path.stem for path in paths] == ['curves', 'filters', 'mistakes', 'confusion']
    shown = [base64.b64decode(output.data['image/png']) for output in cells[name]
             if output.output_type == 'display_data']
    assert len(shown) == 4 and all(picture.startswith(b'\x89PNG') for picture in shown)
    assert name == '%run' or shown == [path.read_bytes() for path in paths]  # it was the last one to draw there
    assert result(cells[name]) == status and output.count('images/s') == epochs
    assert printed(cells[name], 'stderr') == ''  # no bar, no warning


def test_interrupting_the_kernel_is_one_sentence_and_the_same_command_continues(cells):
    assert printed(cells['interrupted'], 'stderr') == '\nInterrupted. Run the same command again to continue.\n'
    assert result(cells['interrupted']) == '130'
    assert 'ConvNet, seed 1: continues after epoch 1' in printed(cells['main'])


def test_main_reads_its_own_arguments_and_none_of_the_kernel(cells):
    assert printed(cells['no options'], 'stderr').startswith('ex3_convnet: error: batch_size must be between')
    assert result(cells['no options']) == '2'
