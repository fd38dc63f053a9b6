"""What a user can cause ends in one sentence and an exit status, never in a traceback."""
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from lab.device import first_sentence, gpu_failure, is_out_of_memory, memory_advice
from lab.files import DamagedFile

Main = Callable[[Sequence[str]], int]


def ends_in_a_sentence(main: Main) -> Main:
    """Decorator: `main` returns an exit status, whatever a user does.

    0: nothing failed; 1: a run diverged or could not be done, or a picture could not be drawn; 2: wrong input, no room,
    no memory, a GPU that fails; 130 or 143: interrupted. What only a bug can cause still raises. `argv` may be one
    text, or hold numbers and paths.
    """
    @functools.wraps(main)
    def wrapped(argv: Sequence[str] = ()) -> int:
        name = Path(main.__globals__['__file__']).stem
        with redirect_stdout(Console(sys.stdout)), redirect_stderr(Console(sys.stderr)):
            words = argv.split() if isinstance(argv, str) else argv  # in a notebook: main('--seeds 0 1')
            try:
                with _signals_as_exceptions():
                    return main([str(word) for word in words])
            except KeyboardInterrupt as stop:
                print('\nInterrupted. Run the same command again to continue.', file=sys.stderr)
                return 128 + (stop.args[0] if stop.args else signal.SIGINT)
            except ValueError as error:  # what a user can cause and can fix
                if not _is_refusal(error):
                    raise
                message = str(error)
            except OSError as error:  # no space, no permission, a file where a folder should be
                message = (f'{error}: fix this or choose another folder with --results, then run the same command '
                           f'again')
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    message = memory_advice(error)
                elif failure := gpu_failure(error):
                    message = (f'the GPU failed ({failure}): run the same command again to continue, in a notebook '
                               f'after restarting its kernel; if it fails again, try --device cpu')
                else:
                    raise
            print(f'{name}: error: {message}', file=sys.stderr)
            return 2
    return wrapped


def _is_refusal(error: ValueError) -> bool:
    """Whether a `raise` statement of this project is its origin: Python and torch raise ValueError for bugs, too."""
    origin, project = traceback.extract_tb(error.__traceback__)[-1], Path(__file__).parents[1]
    is_ours = Path(origin.filename).is_relative_to(project) and 'site-packages' not in origin.filename  # as in .venv
    return is_ours and (origin.line or '').startswith('raise ')


def drawn(draw: Callable[..., Path], *arguments: Any, **options: Any) -> Path | None:
    """draw(...) -> the picture's path; a picture that cannot be drawn or written is one line and None."""
    try:
        path = draw(*arguments, **options)
        if path is None:
            raise TypeError('it does not return its path')
        return path
    except DamagedFile:
        raise
    except Exception as error:  # training is saved: nothing that drawing raises may end it
        print(f'A picture could not be drawn by {draw.__name__} ({type(error).__name__}: {first_sentence(error)}); '
              f'everything else is written.', file=sys.stderr)
        return None


class Console:
    """A stream for text that never fails: what it cannot show it shows escaped, and what nobody reads is dropped.

    Consoles without a `±`, pipes whose reader has left, and no console at all must not end a training of hours.
    """

    def __init__(self, stream: TextIO | None):
        is_open = stream is not None and not getattr(stream, 'closed', False)
        self.stream = stream if is_open else open(os.devnull, 'w')  # noqa: SIM115
        if hasattr(self.stream, 'reconfigure'):
            self.stream.reconfigure(line_buffering=True)  # a log shows each line at once

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, 'encoding', None) or 'utf-8'
        self._try(self.stream.write, text.encode(encoding, 'backslashreplace').decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, operation: Callable, *arguments: str) -> None:
        try:
            operation(*arguments)
        except (OSError, ValueError):  # the reader has left; the stream is closed
            try:
                with open(os.devnull, 'w') as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())  # what is buffered goes there at exit
            except (OSError, ValueError):
                self.stream = open(os.devnull, 'w')  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once: a second one does not break the writing the first one causes."""
    def interrupt(number: int, _frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
