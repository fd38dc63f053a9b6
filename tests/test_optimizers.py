"""The optimisers against torch's own and against a slow loop in double precision."""
from contextlib import nullcontext

import pytest
import torch
from tiny import OnMeta
from torch import nn

import training
from lab.checkpoint import Average
from models.convnet import ConvNet
from models.vgg import VggModel
from optimizers import make_optimizer, orthogonalise, set_learning_rate


def make_model(norm_layer='BN'):
    torch.manual_seed(0)
    return ConvNet(3, (16, 8, 8, 8, 8), 4, norm_layer).to(memory_format=torch.channels_last)


def train(model, optimizer, learning_rates=(0.15, 0.1, 0.05, 0.1)):
    for step, learning_rate in enumerate(learning_rates):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape)  # so small that a wrong epsilon shows
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()


def rates(model, optimizer):
    """Name of each parameter that is trained -> its learning rate."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group['lr'] for group in optimizer.param_groups for parameter in group['params']}


@pytest.mark.parametrize('name', ['Adam', 'SGD', 'Muon'])
def test_parameters_whose_names_start_alike_share_a_factor_on_their_learning_rate(name):
    model = VggModel(4, fine_tune=True, pretrained=False)
    plain, scaled = make_optimizer(name, model, 0.5), make_optimizer(name, model, 0.5, scales={'features.': 0.25})
    for optimizer in (plain, scaled):
        set_learning_rate(optimizer, 0.5)
    assert rates(model, scaled) == {key: rate * (0.25 if key.startswith('features.') else 1)
                                    for key, rate in rates(model, plain).items()}
    assert name == 'Muon' or rates(model, plain) == dict.fromkeys(dict(model.named_parameters()), 0.5)


def slow_muon(weight, gradients, learning_rates):
    """The recipe in double precision, with singular values instead of matrix products."""
    weight, momentum = weight.double().flatten(1), 0
    filters, inputs = weight.shape
    for gradient, rate in zip(gradients, learning_rates, strict=True):
        gradient = gradient.double().flatten(1)
        momentum = 0.6 * momentum + gradient
        left, values, right = torch.linalg.svd(gradient + 0.6 * momentum, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
        weight = weight * filters ** 0.5 / weight.square().sum().sqrt()
        weight = weight - rate * max(1, filters / inputs) ** 0.5 * (left * values) @ right
    return weight


@pytest.mark.parametrize('precision, least, most', [('fp32', 0, 1e-5), ('bf16', 1e-4, 0.01)])
@pytest.mark.parametrize('shape', [(64, 3, 3, 3), (16, 16, 3, 3)], ids=str)  # more filters than inputs, and fewer
def test_muon_equals_the_formula(shape, precision, least, most):
    torch.manual_seed(0)
    start, *gradients = torch.randn(4, *shape)
    model = nn.Conv2d(shape[1], shape[0], 3, bias=False).to(memory_format=torch.channels_last)
    model.weight.data.copy_(start)
    optimizer = make_optimizer('Muon', model, 1.0, precision=precision)
    for gradient, rate in zip(gradients, (0.15, 0.1, 0.05), strict=True):
        model.weight.grad = gradient
        set_learning_rate(optimizer, rate)
        optimizer.step()
    expected = slow_muon(start, gradients, (0.15, 0.1, 0.05))
    error = (model.weight.flatten(1) - expected).norm() / (expected - start.flatten(1)).norm()
    assert least < error < most
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonalise(torch.zeros(4, 9)), torch.zeros(4, 9))


def test_muon_trains_the_rest_as_torchs_adam_and_leaves_out_biases_before_batch_norm():
    ours, theirs, before = make_model(), make_model(), make_model()
    optimizer = make_optimizer('Muon', ours, 0.15)
    learning_rates = [torch.tensor(0.0) for _ in optimizer.param_groups]
    for group, tensor in zip(optimizer.param_groups, learning_rates, strict=True):
        group['lr'] = tensor  # which must stay: a CUDA graph knows only its place
    train(ours, optimizer)
    assert all(group['lr'] is tensor for group, tensor in zip(optimizer.param_groups, learning_rates, strict=True))
    kinds = {kind: [p for name, p in theirs.named_parameters() if name.endswith(kind)] for kind in ('bias', 'weight')}
    train(theirs, torch.optim.Adam([dict(params=kinds['bias'], scale=0.03 / 0.15),
                                    dict(params=kinds['weight'], scale=0.01 / 0.15)], betas=(0.9, 0.99)))
    for name, parameter in ours.named_parameters():
        if not isinstance(ours.get_submodule(name.rsplit('.', 1)[0]), nn.Conv2d):
            torch.testing.assert_close(parameter, theirs.get_parameter(name))
        else:
            assert torch.equal(parameter, before.get_parameter(name)) == name.endswith('bias')


def test_what_is_frozen_is_left_out_and_biases_that_no_batch_norm_follows_are_not():
    model = make_model(norm_layer=None)
    assert set(rates(model, make_optimizer('Muon', model, 0.15))) == set(dict(model.named_parameters()))
    model.features.requires_grad_(False)
    for name in ('Adam', 'SGD', 'Muon'):
        assert set(rates(model, make_optimizer(name, model, 0.1))) == {'classifier.bias', 'classifier.weight'}


def test_a_step_reads_no_values_and_makes_nothing_on_another_device(monkeypatch):
    monkeypatch.setattr(training, 'autocast', lambda *_: nullcontext())  # 'meta' has none
    model = make_model().to('meta')
    optimizer = make_optimizer('Muon', model, 0.15)
    for group in optimizer.param_groups:
        group['lr'] = torch.tensor(0.1, device='meta')
    step = training.make_step(model, optimizer, 'fp32', 0.1, Average(model, 0.9))
    images, labels = torch.empty(8, 3, 32, 32, device='meta'), torch.empty(8, dtype=torch.int64, device='meta')
    with OnMeta():  # as a CUDA graph demands
        for _ in range(2):
            step(images, labels)
