"""An experiment: its folder, the runs still to do, what is known of the others, its table and its pictures."""
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from datasets import cifar10
from datasets.cifar10 import Data
from lab.constants import Constants, Question, differences, slug, typed
from lab.device import describe_device, pick_device, pick_precision
from lab.errors import drawn
from lab.figure import Title
from lab.files import DamagedFile, load_tensors, reading, to_csv, write_atomically
from lab.history import History
from lab.identity import NOT_IDENTITY, choose_folder, claim, identity, recorded_precision, same_runs, seed_folders
from lab.notebook import show
from lab.plots import Accuracy, plot_curves
from lab.progress import Progress
from lab.results import Result, accuracy, summary
from lab.run import Run, read_finished

SECONDS_BETWEEN_TABLES = 60  # while runs are still to come

# Constants left out of a title's third line: its second line has them, or they do not change what a run is.
SHOWN_OTHERWISE = ('data', 'weights', 'num_training', 'num_validation', 'num_classes', 'precision', *NOT_IDENTITY)

Picture = Callable[['Experiment'], Path]


class Experiment:
    """The runs of a question.

    with Experiment('ex3_convnet', name, question, rows, Config()) as experiment:
        for run in experiment.runs():  # those that are not finished yet
            ...                        # train it, then run.finish(...)
        return experiment.conclude(pictures)

    rows: run -> its constants, as `read_constants` gives them; constants: those at the top of the script;
    known_by: run -> constants that are known by their content, such as the hash of a file; weights: run -> the name of
    those it starts from, for people; sooner: what else to try where training takes long. Several processes can share
    an experiment: a run is locked while it trains, and each process takes the next one that nobody has. Raises
    ValueError for constants, data or a device that cannot be had.
    """

    def __init__(self, script: str, name: str, question: Question, rows: Mapping[str, Constants],
                 constants: Constants, *, known_by: Mapping[str, Mapping[str, Any]] | None = None,
                 weights: Mapping[str, str] | None = None, sooner: str = ''):
        self.name, self.question, self.rows, self.constants = name, question, dict(rows), constants
        self.weights, self.sooner = dict(weights or {}), sooner
        first = next(iter(rows.values()))
        print(f'{name}: {question.text}')
        for run, config in rows.items():
            print(f'  {run}: {differences(config, constants, NOT_IDENTITY) or "the constants"}')
        self.device = pick_device(first.device)
        self.data = self._load_data()
        self.everywhere = Path(first.results) / script
        self.identities = {run: identity(config, self.data[run], (known_by or {}).get(run, {}))
                           for run, config in self.rows.items()}
        self.shared = FileLock(self.everywhere / name / '.locks' / 'shared')  # for what all processes read and write
        with self.shared:
            self.folder = choose_folder(self.everywhere / name, self.identities)
            self._settle_precision()
            for run, seed in self.jobs():  # at once, so that a process with other constants takes another folder
                claim(self.run_folder(run, seed), self.identities[run])
        self.results: list[Result] = []
        self.histories: dict[str, list[History]] = {}
        self.not_run: dict[tuple[str, int], Result] = {}
        self.elsewhere: set[tuple[str, int]] = set()
        self.sizes: set[int] = set()  # of networks that were printed
        self.picture_failed, self.tabled_at = False, time.monotonic()

    def __enter__(self) -> 'Experiment':
        self.held = ExitStack()  # the lock of the run in progress
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.held.close()

    # --- what there is before training ----------------------------------------------------------------------

    def _load_data(self) -> dict[str, Data]:
        """run -> its data on the device, each loaded once; `num_classes` follows the data."""
        loaded, data = {}, {}
        for run, config in self.rows.items():
            wanted = (config.data, config.data_root, config.num_training, config.num_validation)
            if wanted not in loaded:
                loaded[wanted] = cifar10.load(*wanted).to(self.device)
                introduce(loaded[wanted], config.num_classes)
            data[run] = loaded[wanted]
            self.rows[run] = replace(config, num_classes=len(data[run].classes))
        return data

    def source(self, *runs: str) -> str:
        """What runs learn from: 'CIFAR-10, ImageNet weights'."""
        data = ' / '.join(dict.fromkeys(self.data[run].source for run in runs))
        weights = ' / '.join(dict.fromkeys(self.weights[run] for run in runs if run in self.weights))
        return f'{data}, {weights} weights' if weights else data

    def _settle_precision(self) -> None:
        """What 'auto' means: as the run was begun, or is finished for another question, else the faster one here."""
        recorded = {run: recorded_precision(self.folder, run, same_runs(self.everywhere, self.identities[run]))
                    for run, config in self.rows.items() if config.precision == 'auto'}
        first = next(filter(None, recorded.values()), None)  # what is compared has one precision
        used: dict[str, tuple[str, str]] = {}
        for run, config in self.rows.items():
            wanted, why = config.precision, 'as asked'
            if wanted == 'auto' and first:
                wanted, path = recorded[run] or first
                why = f'as in {path}'
            if wanted not in used:
                used[wanted] = pick_precision(wanted, self.device, why)
            precision = used['auto'][0] if wanted == 'auto' else wanted
            self.rows[run] = replace(config, precision=precision)
            self.identities[run]['precision'] = precision
        print(f'device: {describe_device(self.device)}; precision: '
              + ', '.join(f'{precision} ({reason})' for precision, reason in used.values()))

    @property
    def title(self) -> Title:
        """The question, the data and their sizes, and what was changed, so that no reduced run looks like the full."""
        sizes = [' / '.join(dict.fromkeys(f'{len(getattr(data, part)):,}' for data in self.data.values()))
                 for part in ('train', 'val', 'test')]
        changed = dict.fromkeys(
            differences(config, typed(replace(self.constants, **self.question.rows[run])), SHOWN_OTHERWISE)
            for run, config in self.rows.items())
        return Title(f'{self.name}: {self.question.text}',
                     f'{self.source(*self.rows)}: {sizes[0]} training, {sizes[1]} validation, {sizes[2]} test images',
                     ' / '.join(filter(None, changed)))

    def title_of(self, result: Result) -> Title:
        """The title of a picture of one network."""
        question, data, changed = self.title
        return Title(question, f'{data}\n{result.run}, seed {result.seed}, best model', changed)

    # --- runs -----------------------------------------------------------------------------------------------

    def runs(self) -> Iterator[Run]:
        """The runs that neither this nor another process has finished or is working on, each locked while it trains."""
        skipped: set[tuple[str, int]] = set()
        while (run := self._next(skipped)) is not None:
            yield run
            if run.result.status == 'not run':
                self.not_run[run.name, run.seed] = run.result
                print(f'{run.label}: not run: {run.result.reason}', file=sys.stderr)
                with self.shared:
                    if {path.name for path in run.folder.glob('*')} == {'config.json'}:
                        shutil.rmtree(run.folder)  # it was never begun: other weights may take its place
            self.held.close()
            skipped.add((run.name, run.seed))
            if self._to_do() and time.monotonic() - self.tabled_at > SECONDS_BETWEEN_TABLES:
                with self.shared, suppress(OSError, DamagedFile):  # open in Excel, say: at the end it must be written
                    self._collect()
                    self._tabulate()

    def _next(self, skipped: set[tuple[str, int]]) -> Run | None:
        """The next run that nobody has, locked; None if there is none."""
        self.elsewhere = set()
        for name, seed in self.jobs():
            folder, label = self.run_folder(name, seed), f'{name}, seed {seed}'
            if (folder / 'result.json').exists():
                if (name, seed) not in skipped:
                    print(f'{label}: already finished, skipped (delete {folder} to train it again)')
                    skipped.add((name, seed))
                continue
            if (name, seed) in skipped:
                continue
            try:
                lock = FileLock(self.folder / '.locks' / f'{slug(name)}-seed{seed}')
                self.held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                self.elsewhere.add((name, seed))
                continue
            if not (folder / 'result.json').exists():  # another process may have finished it just now
                run = self._run(name, seed)
                same = same_runs(self.everywhere, self.identities[name], seed)
                with self.shared:
                    finished = next((path for path in same if run.take_over(path)), None)
                    if finished is None:
                        claim(folder, self.identities[name])
                        return run
                print(f'{label}: already trained for {finished.parents[1].name} (delete {finished}, too, to train it '
                      f'again)')
                skipped.add((name, seed))
            self.held.close()
        return None

    def jobs(self) -> list[tuple[str, int]]:
        """(run, seed): those that are finished, also of seeds of earlier calls, and those that are asked for."""
        finished = [(name, seed) for name in self.rows
                    for seed, path in seed_folders(self.folder, slug(name)) if (path / 'result.json').exists()]
        seeds = dict.fromkeys(seed for config in self.rows.values() for seed in config.seeds)
        asked = [(name, seed) for seed in seeds for name, config in self.rows.items() if seed in config.seeds]
        return [job for job in finished if job not in asked] + asked

    def run_folder(self, name: str, seed: int) -> Path:
        return self.folder / slug(name) / f'seed{seed}'

    def _to_do(self) -> list[tuple[str, int]]:
        return [(name, seed) for name, seed in self.jobs() if (name, seed) not in self.not_run
                and not (self.run_folder(name, seed) / 'result.json').exists()]

    def _run(self, name: str, seed: int) -> Run:
        config = self.rows[name]
        later = [self.rows[other] for other, another in self._to_do() if (other, another) != (name, seed)]
        alike = all(getattr(row, key, None) == getattr(config, key, None)
                    for row in later for key in ('mode', 'hidden_size'))  # else their epochs take another time
        progress = Progress(f'{name}, seed {seed}', self.title, sum(row.num_epochs for row in later) if alike else 0,
                            self.sooner)
        return Run(name, seed, config, self.data[name], self.source(name), self.run_folder(name, seed),
                   self.device, progress, self.sizes)

    # --- what there is afterwards ---------------------------------------------------------------------------

    def conclude(self, pictures: Sequence[Picture] = ()) -> int:
        """Write and print the table, draw the curves and `pictures`; returns the exit status: 0, or 1 if any failed."""
        with self.shared:  # of several processes, the last one has everything
            self._collect()
            made = self._tabulate()
            if self.histories:
                made += [drawn(picture, self) for picture in pictures]
            plots = [path for path in made if path]
            self.picture_failed |= len(plots) < len(made)
            self._write_page()
        print(f'\n{summary(self.results)}\n')
        print('\n'.join(map(str, [self.folder / 'summary.md', self.folder / 'summary.csv', *plots])))
        for name, seed in sorted(self.elsewhere & set(self._to_do())):
            print(f'{name}, seed {seed}: being trained by another process, which adds it to the table')
        failed = [result for result in self.results if result.status != 'finished']
        for result in failed:
            print(f'{result.run}, seed {result.seed}: {result.status} {result.reason}', file=sys.stderr)
        show(plots)
        return 1 if failed or self.picture_failed else 0

    def _collect(self) -> None:
        """Read what is finished, in the order of the table."""
        order, found = list(self.rows).index, dict(self.not_run)
        self.histories = {}
        for name, seed in sorted(self.jobs(), key=lambda job: (order(job[0]), job[1])):
            folder = self.run_folder(name, seed)
            if (folder / 'result.json').exists():
                (folder / 'checkpoint.pt').unlink(missing_ok=True)
                found[name, seed], history = read_finished(folder)
                if history.epochs:
                    self.histories.setdefault(name, []).append(history)
                if history.epochs and not (folder / 'curves.png').exists():
                    drawing = drawn(plot_curves, {f'{name}, seed {seed}': [history]}, folder / 'curves.png', self.title)
                    self.picture_failed |= drawing is None
        self.results = [found[job] for job in sorted(found, key=lambda job: (order(job[0]), job[1]))]

    def _tabulate(self) -> list[Path | None]:
        """Write summary.csv and draw curves.png of all runs."""
        self.tabled_at = time.monotonic()
        write_atomically(self.folder / 'summary.csv', to_csv(Result, self.results))
        self._write_page()
        return [drawn(plot_curves, self.histories, self.folder / 'curves.png', self.title)] if self.histories else []

    def _write_page(self) -> None:
        """summary.md: the question, the table and the pictures that there are."""
        question, *rest = filter(None, self.title)
        plots = sorted(self.folder.glob('*.png'), key=lambda path: (path.stem != 'curves', path.name))
        pictures = [f'![{path.stem}]({path.name})' for path in plots]
        page = '\n\n'.join([f'# {question}', *rest, summary(self.results), *pictures])
        write_atomically(self.folder / 'summary.md', f'{page}\n')

    # --- what pictures ask ----------------------------------------------------------------------------------

    def accuracy(self, run: str, which: str, part: str) -> Accuracy:
        """Of a run's 'best' or 'last' model on 'train', 'val' or 'test', over its seeds, in percent."""
        return accuracy(self.results, run, which, part)

    def first_result(self, *runs: str) -> Result:
        """The first result, of these runs or of all, that has a trained network."""
        return next(result for result in self.results if result.best_epoch and result.run in (runs or self.rows))

    def load(self, model: nn.Module, result: Result) -> nn.Module:
        """Load the best weights of a run into `model`. Raises DamagedFile."""
        with reading(self.run_folder(result.run, result.seed) / 'best.pt'):
            model.load_state_dict(self.read_tensors(result, 'best.pt'))
        return model

    def read_tensors(self, result: Result, name: str) -> dict[str, torch.Tensor]:
        """best.pt, last.pt or test_logits.pt of a run. Raises DamagedFile."""
        path = self.run_folder(result.run, result.seed) / name
        with reading(path):
            return load_tensors(path, self.device)


def introduce(data: Data, num_classes: int) -> None:
    """Print what is trained on, and what a user must know about it."""
    print(f'data: {data.source}, {len(data.classes)} classes; {len(data.train):,} training, {len(data.val):,} '
          f'validation and {len(data.test):,} test images')
    if data.banner:
        print(f'{"*" * 100}\n{data.banner}\n{"*" * 100}')
    for note in data.notes:
        print(f'data: {note}')
    if num_classes != len(data.classes):
        print(f'num_classes: using {len(data.classes)}, as in the data, instead of {num_classes}')
