"""What the scripts give to the parts of a run, recorded. Nothing trains: two random networks are kept instead."""
import copy
import inspect
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import VGG11_BN_Weights
from torchvision.transforms.functional import normalize

from datasets import cifar10
from datasets.batches import Split
from datasets.cifar10 import Data
from lab import answers, experiment
from lab.device import pick_device
from lab.files import save_tensors, to_csv, write_atomically
from lab.history import Epoch, History
from models import vgg
from models.convnet import ConvNet, whiten_first_layer
from training import seed_everything

TINY = (4, 3, 4, 3, 4)  # filters of each block
HALF = ((0.5,), (0.5,))
CHANNELS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of CIFAR-10's training images, as often published
IMAGENET = VGG11_BN_Weights.IMAGENET1K_V1.transforms().mean, VGG11_BN_Weights.IMAGENET1K_V1.transforms().std


def noise(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return Split(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
                 torch.randint(0, 12, (count,), generator=generator))


DATA = Data('noise', tuple('abcdefghijkl'), noise(510, 0), noise(40, 1), noise(50, 2), content='of noise')


def record(patch, script):
    """Record every run of a script: what `fit` got, by its parameters' names, the network as it was, the rest beside.

    Its loaded data are DATA. Returns (the runs, what each plot was given last: its name -> arguments, options).
    """
    runs, drawn, signature, evaluate_kept = [], {}, inspect.signature(script.fit), script.evaluate_kept
    given = SimpleNamespace()

    def load(*arguments):
        given.load = arguments
        return DATA

    def device(name):
        given.device = name
        return pick_device('cpu')

    def fit(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        run = SimpleNamespace(**bound.arguments, given=given)
        run.network = copy.deepcopy(run.model)
        runs.append(run)
        keep_random_networks(run.model, run.folder, seed=len(runs))
        return History.read(run.folder / 'history.csv')

    def evaluate(model, history, folder, evaluation, precision, label=''):
        runs[-1].evaluation, runs[-1].evaluated_in, runs[-1].label = evaluation, precision, label
        return evaluate_kept(model, history, folder, evaluation, precision, label)

    patch.setattr(cifar10, 'load', load)
    patch.setattr(experiment, 'pick_device', device)
    patch.setattr(script, 'fit', fit)
    patch.setattr(script, 'evaluate_kept', evaluate)
    if hasattr(script, 'extract_features'):
        extract = script.extract_features

        def extract_features(*arguments, **options):
            given.extracted = arguments
            features, given.seconds = extract(*arguments, **options)
            return features, given.seconds
        patch.setattr(script, 'extract_features', extract_features)
    for module in (script, answers):
        for name, plot in list(vars(module).items()):
            if name.startswith('plot_') or name == 'VisualizeFilter':
                patch.setattr(module, name, partial(keeping, plot, name, drawn))
    return runs, drawn


def keeping(plot, name, drawn, *arguments, **options):
    drawn[name] = arguments, options
    return plot(*arguments, **options)


def keep_random_networks(model, folder, seed):
    """As `fit` would leave them: the best of the first epoch, the latest of the second, and the history."""
    generator = torch.Generator().manual_seed(seed)
    for name in ('best', 'last'):
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, 0, 0.3, generator=generator)
        save_tensors(model.state_dict(), folder / f'{name}.pt')
    rows = [Epoch(epoch, 0.1, 1.0, 0.5, 1.0, accuracy, 1.5, 10.0) for epoch, accuracy in ((1, 0.4), (2, 0.3))]
    write_atomically(folder / 'history.csv', to_csv(Epoch, rows))


def percent(model, weights, split, mean, std):
    """The accuracy of a network with these weights, in percent, counted here."""
    model.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        right = model.eval()(normalize(split.images / 255, mean, std)).argmax(1) == split.labels
    return 100 * right.float().mean().item()


@cache
def ask(script, name, *options):
    """Record an experiment of a script, once -> its runs, what its plots were given, its folder and status."""
    results = TemporaryDirectory()
    with pytest.MonkeyPatch.context() as patch:
        runs, drawn, printed = *record(patch, script), []
        patch.setattr(script, 'PrintModelSize', printed.append)
        tiny = (['--hidden-size', *map(str, TINY)] if script.__name__ == 'ex3_convnet' else
                ['--weights', str(small_vgg(patch, Path(results.name)))])
        status = script.main(['--experiment', name, '--results', results.name, '--precision', 'fp32', *tiny, *options])
    return SimpleNamespace(runs=runs, drawn=drawn, status=status, printed=printed, results=results,
                           folder=Path(results.name) / script.__name__ / name)


def small_vgg(patch, folder):
    """Give VGG11 few filters; the path of a state dict for it, whose features differ from image to image."""
    patch.setattr(vgg, 'cfgs', {'A': [4, 'M', 4, 'M', 4, 4, 'M', 4, 4, 'M', 4, 512, 'M']})
    torch.manual_seed(5)
    features = vgg.make_layers(vgg.cfgs['A'], batch_norm=True)
    for layer in layers(features, nn.BatchNorm2d):
        layer.momentum = 1.0
    features(normalize(DATA.val.images / 255, *IMAGENET))  # its statistics are those of these images
    torch.save(nn.ModuleDict({'features': features}).state_dict(), folder / 'vgg.pt')
    return folder / 'vgg.pt'


@cache
def truth(script, name, which, part):
    """Run -> the accuracies of its seeds' 'best' or 'last' networks, in percent, counted here."""
    found = {}
    for run in ask(script, name).runs:
        mean_std = normalisation(run) if script.__name__ == 'ex3_convnet' else IMAGENET
        accuracy = percent(copy.deepcopy(run.network), run.folder / f'{which}.pt', getattr(DATA, part), *mean_std)
        found.setdefault(run.label.split(',')[0], []).append(accuracy)
    return found


# --- what a run is, of what its parts were given ------------------------------------------------------------


def layers(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def rates(run, *epochs):
    return [round(run.schedule(epoch), 9) for epoch in epochs or (0, 0.5, 1, 5, run.num_epochs - 0.5)]


def normalisation(run):
    """(mean, std) of all batches of a run."""
    (pair,) = {tuple(tuple(round(x, 6) for x in value.flatten().tolist()) for value in (batches.mean, batches.std))
               for batches in (run.batches, run.val, *run.evaluation.values())}
    return pair


def seeded(run):
    """The network of a run as its seed makes it."""
    seed_everything(run.seed)
    filters = [layer.out_channels for layer in layers(run.network, nn.Conv2d)]
    return ConvNet(3, filters, 12, 'BN' if layers(run.network, nn.BatchNorm2d) else None)


def whitened(run):
    """Whether the first layer starts as its seed makes it, or whitened for the first 4,000 normalised images."""
    weight, mean, std = run.network.features[0].weight, *normalisation(run)
    oracle = seeded(run)
    if torch.equal(weight, oracle.features[0].weight):
        return False
    whiten_first_layer(oracle, normalize(DATA.train.images[:4000] / 255, mean, std))
    torch.testing.assert_close(weight, oracle.features[0].weight, rtol=1e-3, atol=1e-5)
    return True


def loaded(run):
    """Whether VGG's convolutional part starts from the file."""
    state = torch.load(run.folder.parents[3] / 'vgg.pt')
    return all(torch.equal(run.network.state_dict()[key], tensor) for key, tensor in state.items())


def scales(run):
    """Part of the network -> the factor on its learning rate; what is left out does not train."""
    names = {id(parameter): name.split('.')[0] for name, parameter in run.model.named_parameters()}
    return {names[id(p)]: group['scale'] for group in run.optimizer.param_groups for p in group['params']}
