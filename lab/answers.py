"""Pictures that both scripts ask for, made of what is known of an experiment."""
from pathlib import Path

from lab.experiment import Experiment
from lab.pictures import plot_confusion, plot_mistakes
from lab.plots import Accuracy, plot_accuracies
from lab.results import SETS


def best_accuracies(experiment: Experiment, run: str, parts: tuple[str, ...] = ('train', 'val')) -> dict[str, Accuracy]:
    """'training' -> the accuracy of a run's best model, in percent, and so on."""
    return {SETS[part]: experiment.accuracy(run, 'best', part) for part in parts}


def accuracies(experiment: Experiment) -> Path:
    """accuracy.png: training and validation accuracy of each run's best model."""
    rows = {run: best_accuracies(experiment, run) for run in experiment.histories}
    return plot_accuracies(rows, experiment.folder / 'accuracy.png', experiment.title)


def mistakes(experiment: Experiment) -> Path:
    """mistakes.png: the most confident mistakes among the test images, of the first run's best model."""
    result = experiment.first_result()
    data, tested = experiment.data[result.run], experiment.read_tensors(result, 'test_logits.pt')
    return plot_mistakes(data.test.images.cpu(), tested['labels'], tested['logits'], data.classes,
                         experiment.folder / 'mistakes.png', experiment.title_of(result))


def confusion(experiment: Experiment) -> Path:
    """confusion.png: which class is taken for which, over all test images, by the first run's best model."""
    result = experiment.first_result()
    tested = experiment.read_tensors(result, 'test_logits.pt')
    return plot_confusion(tested['labels'], tested['logits'], experiment.data[result.run].classes,
                          experiment.folder / 'confusion.png', experiment.title_of(result))
