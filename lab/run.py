"""One run: its folder, its place among the others, how it ended."""
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn
from typeguard import check_type

from datasets.cifar10 import Data
from lab.constants import Constants
from lab.device import describe_device
from lab.files import DamagedFile, load_tensors, reading, write_atomically
from lab.history import History
from lab.progress import Progress
from lab.results import Result


@dataclass
class Run:
    """A row of an experiment with one seed, locked for this process while it trains."""
    name: str
    seed: int
    config: Constants
    data: Data
    source: str  # of its data and weights, for people
    folder: Path
    device: torch.device
    progress: Progress
    sizes: set[int]  # of the networks of this experiment so far
    result: Result | None = None

    @property
    def label(self) -> str:
        return f'{self.name}, seed {self.seed}'

    def begin(self, model: nn.Module) -> bool:
        """Note what is to be trained -> whether its size is a new one."""
        parameters = sum(weight.numel() for weight in model.parameters())
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self.result = self._new_result(parameters=parameters, trainable=trainable)
        is_new = trainable not in self.sizes
        self.sizes.add(trainable)
        return is_new

    def finish(self, history: History, accuracies: Mapping[str, float], seconds: float = 0.0) -> None:
        """Write how the run ended. accuracies: by column of `Result`; seconds: of preparations for training."""
        for column, accuracy in accuracies.items():
            setattr(self.result, column, accuracy)
        self.result.epochs, self.result.seconds = len(history.epochs), seconds + sum(history['seconds'])
        if history.epochs:
            self.result.best_epoch = history.best.epoch
        if history.diverged:
            self.result.status = 'diverged'
            self.result.reason = (f'in {history.diverged}, where the loss became NaN or infinite: lower learning_rate '
                                  f'({self.config.learning_rate:g}), or look at reg, optimizer and precision')
        write_atomically(self.folder / 'result.json', json.dumps(asdict(self.result), indent=1) + '\n')
        (self.folder / 'checkpoint.pt').unlink(missing_ok=True)

    def not_run(self, reason: str) -> None:
        """Note that the run cannot be done here; nothing is written, so that it is tried again."""
        self.result = self._new_result(status='not run', reason=reason)

    def _new_result(self, **values: Any) -> Result:
        return Result(self.name, self.seed, data=self.source, training_images=len(self.data.train),
                      validation_images=len(self.data.val), test_images=len(self.data.test),
                      device=describe_device(self.device), precision=self.config.precision, **values)

    def take_over(self, finished: Path) -> bool:
        """Take the folder of the same run of another experiment, unless it is damaged or did not go well."""
        try:
            self.result, _ = read_finished(finished)
            if self.result.status != 'finished':
                return False
            for name in ('best.pt', 'last.pt', 'test_logits.pt'):
                with reading(finished / name):
                    load_tensors(finished / name)
        except DamagedFile:
            return False
        copy = self.folder.with_name(f'.{self.folder.name}.tmp')  # hidden until it is complete
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(finished, copy, copy_function=_link_or_copy,
                            ignore=shutil.ignore_patterns('*.png', '*.tmp', 'checkpoint.pt'))
        except shutil.Error as error:  # a list of (from, to, reason)
            shutil.rmtree(copy, ignore_errors=True)
            raise OSError(f'{finished} could not be copied to {self.folder} ({error.args[0][0][2]})') from error
        self.result.run, self.result.data = self.name, self.source
        write_atomically(copy / 'result.json', json.dumps(asdict(self.result), indent=1) + '\n')
        shutil.rmtree(self.folder, ignore_errors=True)
        copy.rename(self.folder)
        return True


def _link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system has them: files are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_finished(folder: Path) -> tuple[Result, History]:
    """What a finished run left. Raises DamagedFile when it is damaged or does not fit together."""
    path = folder / 'result.json'
    with reading(path):
        result = Result(**json.loads(path.read_text()))
        hints = get_type_hints(Result)
        for field in fields(Result):
            check_type(getattr(result, field.name), hints[field.name])
    history = History.read(folder / 'history.csv') if result.epochs else History()
    with reading(path):
        best_epoch = history.best.epoch if history.epochs else None
        if (result.epochs, result.best_epoch, f'seed{result.seed}') != (len(history.epochs), best_epoch, folder.name):
            raise ValueError('it is from another run, or history.csv is not complete')
    return result, history
