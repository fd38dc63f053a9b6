"""The optimisers against torch's own and against slow loops in double precision."""
import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.convnet import ConvNet
from models.vgg import VggModel
from optimizers import Muon, make_optimizer, orthogonalise, set_learning_rate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(norm_layer='BN', filters=(16, 8, 8, 8, 8)):
    torch.manual_seed(0)
    return ConvNet(3, filters, 4, norm_layer).to(memory_format=torch.channels_last)


def set_gradients(model, seed):
    generator = seeded(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None


def train(model, optimizer, steps):
    for step in steps:
        set_gradients(model, step)
        set_learning_rate(optimizer, 0.15 / (1 + step))
        optimizer.step()


def names(model, group):
    return [name for name, parameter in model.named_parameters() if any(parameter is p for p in group['params'])]


# --- Adam and SGD -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, oracle', [
    ('Adam', lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, fused=True)),
    ('SGD', lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True))])
def test_adam_and_sgd_are_torchs(name, oracle):
    ours, theirs = make_model(), make_model()
    first, second = make_optimizer(name, ours, 0.01, 0.1), oracle(theirs.parameters())
    for step in range(3):
        for model, optimizer in ((ours, first), (theirs, second)):
            set_gradients(model, step)
            optimizer.step()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_without_scales_all_parameters_are_one_group_in_their_order():
    model = make_model()
    (group,) = make_optimizer('Adam', model, 0.01).param_groups
    assert all(a is b for a, b in zip(group['params'], model.parameters(), strict=True))


def test_parameters_whose_names_start_alike_share_their_own_learning_rate():
    model = VggModel(4, fine_tune=True, pretrained=False)
    optimizer = make_optimizer('SGD', model, 1.0, scales={'features.': 0.25})
    set_learning_rate(optimizer, 0.5)
    rates = {name: group['lr'] for group in optimizer.param_groups for name in names(model, group)}
    assert len(rates) == len(list(model.parameters()))
    assert all(rate == (0.125 if name.startswith('features.') else 0.5) for name, rate in rates.items())


@pytest.mark.parametrize('name', ['Adam', 'SGD', 'Muon'])
def test_frozen_parameters_are_left_out(name):
    model = make_model()
    model.features.requires_grad_(False)
    trained = [n for group in make_optimizer(name, model, 0.1).param_groups for n in names(model, group)]
    assert sorted(trained) == ['classifier.bias', 'classifier.weight']


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="optimizer must be 'Adam', 'SGD' or 'Muon', got 'RMSprop'"):
        make_optimizer('RMSprop', make_model(), 0.1)


@pytest.mark.parametrize('rate', [0.5, torch.tensor(0.5)])
def test_the_learning_rate_may_be_a_tensor_which_stays_the_same_object(rate):
    optimizer = torch.optim.SGD([dict(params=[nn.Parameter(torch.zeros(1))], lr=rate, scale=0.5)])
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]['lr'] == 0.25
    assert not isinstance(rate, torch.Tensor) or optimizer.param_groups[0]['lr'] is rate


# --- the orthogonal factor ----------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [(32, 27), (27, 32), (16, 144), (48, 48)], ids=str)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape, dtype):
    left, values, right = torch.linalg.svd(torch.randn(shape, generator=seeded()), full_matrices=False)
    values = torch.linspace(1, 0.1, len(values))
    found = left.T @ orthogonalise(left * values @ right, dtype=dtype) @ right.T  # diagonal, if they are the same
    assert found.diag().min() > 0.66 and found.diag().max() < 1.22
    assert (found - found.diag().diag()).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-4)


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonalise(torch.zeros(4, 9)), torch.zeros(4, 9))


# --- Muon ---------------------------------------------------------------------------------------------------


def slow_muon(weight, gradients, rates):
    """The recipe in double precision, with singular values instead of matrix products."""
    weight, momentum = weight.double().flatten(1), 0
    filters, inputs = weight.shape
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient.double().flatten(1)
        momentum = 0.6 * momentum + gradient
        left, values, right = torch.linalg.svd(gradient + 0.6 * momentum, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
        weight = weight * filters ** 0.5 / weight.square().sum().sqrt()
        weight = weight - rate * max(1, filters / inputs) ** 0.5 * (left * values) @ right
    return weight


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize('shape', [(64, 3, 3, 3), (16, 16, 3, 3)], ids=str)  # more filters than inputs, and fewer
def test_muon_equals_the_formula(shape, dtype, tolerance):
    start, *gradients = torch.randn(4, *shape, generator=seeded())
    weight = nn.Parameter(start.clone().contiguous(memory_format=torch.channels_last))
    optimizer = Muon([weight], dtype=dtype)
    for gradient, rate in zip(gradients, (0.15, 0.1, 0.05), strict=True):
        weight.grad = gradient
        set_learning_rate(optimizer, rate)
        optimizer.step()
    expected = slow_muon(start, gradients, (0.15, 0.1, 0.05))
    error = (weight.flatten(1) - expected).norm() / (weight.flatten(1) - start.flatten(1)).norm()
    assert error < tolerance
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_rest_is_trained_as_torchs_adam_would():
    ours, theirs = make_model(), make_model()
    optimizer = make_optimizer('Muon', ours, 0.15)
    oracle = torch.optim.Adam([
        dict(params=[p for n, p in theirs.named_parameters() if p.ndim < 4 and n.endswith('bias')], lr=0.03),
        dict(params=[p for n, p in theirs.named_parameters() if p.ndim < 4 and n.endswith('weight')], lr=0.01)],
        betas=(0.9, 0.99))
    set_learning_rate(optimizer, 0.15)
    for step in range(4):
        for model, its in ((ours, optimizer), (theirs, oracle)):
            set_gradients(model, step)
            its.step()
    before = make_model().state_dict()
    for name, parameter in ours.named_parameters():
        layer = ours.get_submodule(name.rsplit('.', 1)[0])
        if not isinstance(layer, nn.Conv2d):
            torch.testing.assert_close(parameter, theirs.get_parameter(name))
        elif name.endswith('bias'):  # batch norm would take it away again
            assert torch.equal(parameter, before[name])
        else:
            assert not torch.equal(parameter, before[name])


def test_convolutions_without_batch_norm_train_their_biases():
    model = make_model(norm_layer=None)
    groups = make_optimizer('Muon', model, 0.15).param_groups
    assert sorted(n for group in groups for n in names(model, group)) == sorted(dict(model.named_parameters()))


@pytest.mark.parametrize('name', ['Adam', 'SGD', 'Muon'])
def test_a_resumed_optimiser_goes_on_bit_for_bit(name):
    whole, parts = make_model(), make_model()
    train(whole, make_optimizer(name, whole, 0.15), range(6))
    optimizer = make_optimizer(name, parts, 0.15)
    train(parts, optimizer, range(3))
    file = io.BytesIO()
    torch.save({'model': parts.state_dict(), 'optimizer': optimizer.state_dict()}, file)
    file.seek(0)
    state, resumed = torch.load(file, weights_only=True), make_model()
    optimizer = make_optimizer(name, resumed, 0.15)
    resumed.load_state_dict(state['model'])
    optimizer.load_state_dict(state['optimizer'])
    train(resumed, optimizer, range(3, 6))
    for mine, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_parameters_frozen_later_stay_as_they_are():
    model = make_model()
    optimizer = make_optimizer('Muon', model, 0.15)
    train(model, optimizer, range(2))
    model.features[:2].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2, 4))
    frozen = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert {'features.0.weight', 'features.1.weight', 'features.1.bias'} <= set(frozen)
    assert 'features.4.weight' not in frozen


def test_muon_reads_no_values_and_makes_nothing_on_another_device():
    """As a CUDA graph demands. Tensors on the device 'meta' have no values: to read one is an error."""
    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                assert not isinstance(tensor, torch.Tensor) or tensor.device.type == 'meta', function
            return result

    model = make_model().to('meta')
    optimizer = make_optimizer('Muon', model, 0.15)
    for group in optimizer.param_groups:
        group['lr'] = torch.tensor(0.1, device='meta')
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with OneDevice():
        for _ in range(2):
            optimizer.step()


def test_a_learning_rate_in_a_tensor_gives_the_same_steps():
    first, second = make_model(), make_model()
    optimizers = [make_optimizer('Muon', model, 0.15) for model in (first, second)]
    for group in optimizers[1].param_groups:
        group['lr'] = torch.tensor(group['lr'])
    for model, optimizer in zip((first, second), optimizers, strict=True):
        train(model, optimizer, range(3))
    for mine, expected in zip(second.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)
