#!/usr/bin/env python3
"""Q3b, why a large p fails: its best models on the test images, their batch norm statistics estimated anew.

    python report/dropout_and_batch_norm.py --data FOLDER    # and the options with which Q3b was run

In training, dropout raises the variance of what batch norm sees; in evaluation there is no dropout, and the statistics
of training do not fit (X. Li et al., 2018, https://arxiv.org/abs/1801.05134). The weights stay as they are: only the
statistics are estimated anew, over all training images, once with dropout, for comparison, and once without.
"""
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ex3_convnet import PICTURES, QUESTIONS, Config, make_batches, make_model, train
from lab.constants import read_constants
from lab.device import autocast
from lab.errors import ends_in_a_sentence
from lab.experiment import Experiment
from lab.results import markdown_table
from training import evaluate, seed_everything


@ends_in_a_sentence
def main(argv: Sequence[str] = ()) -> int:
    """Train what is not finished of Q3b, then print the table; returns the exit status."""
    name, rows = read_constants('ex3_convnet', Config(), QUESTIONS, [*argv, '--experiment', 'Q3b'])
    for config in rows.values():
        make_model(config, torch.device('meta'))  # refuses what cannot be built before anything is trained
    with Experiment('ex3_convnet', name, QUESTIONS[name], rows, Config()) as experiment:
        for run in experiment.runs():
            train(run)
        status = experiment.conclude(PICTURES[name])
    table = [['test accuracy', 'as trained', 'estimated with dropout', 'without']]
    for result in experiment.results:
        config, data = experiment.rows[result.run], experiment.data[result.run]
        if config.dropout and result.best_epoch:
            model, (_, evaluation) = make_model(config, experiment.device), make_batches(config, data)
            experiment.load(model, result)
            accuracies = [evaluate(model, evaluation['test'], config.precision)[1]]
            for dropout in (config.dropout, 0.0):
                seed_everything(result.seed)
                estimate_statistics(model, evaluation['train'], dropout, config.precision)
                accuracies.append(evaluate(model, evaluation['test'], config.precision)[1])
            table.append([f'{result.run}, seed {result.seed}', *(f'{accuracy:.1%}' for accuracy in accuracies)])
    print(f'\n{markdown_table(table)}')
    return status


def estimate_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], dropout: float,
                        precision: str = 'fp32') -> None:
    """Set batch norm's running statistics to the mean over `batches`, with this dropout probability."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    with autocast(next(model.parameters()).device, precision):
        update_bn(batches, model)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
