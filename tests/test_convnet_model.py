"""The whitening start of the first layer against the statistics that it is made from."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.convnet import ConvNet, whiten_first_layer


def correlated_images(count=200):
    """Blurred noise with unequal, correlated channels and a mean that is not zero."""
    noise = torch.randn(count, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.5, -0.3, 0.4]])
    return torch.einsum('ij,njhw->nihw', mixing, F.avg_pool2d(noise, 5, 1) * 5) + 0.3


def whitened(filters=128, seed=0, images=None):
    torch.manual_seed(seed)
    model = ConvNet(3, [filters, 4], 10)
    norm = model.features[0].weight.norm().item()
    whiten_first_layer(model, correlated_images() if images is None else images)
    return model.features[0].weight.detach(), norm


def covariance(weight, images):
    responses = F.conv2d(images, weight)
    return torch.cov(responses.transpose(0, 1).flatten(1).double()).float()


def test_the_first_responses_are_uncorrelated_and_equally_strong():
    images = correlated_images() * 30  # so strong that 0.01 is nothing beside their smallest variance
    found = covariance(whitened(images=images)[0][:27], images)
    torch.testing.assert_close(found / found.diag().mean(), torch.eye(27), rtol=0, atol=0.03)


def test_weak_components_are_held_back():
    weight, _ = whitened()
    found, images = covariance(weight[:27], correlated_images()), correlated_images()
    patches = torch.cov(F.unfold(images, 3).transpose(0, 1).flatten(1).double()).float()
    variances = torch.linalg.eigvalsh(patches).flip(0)
    expected = variances / (variances + 0.01)
    assert expected[-1] < 0.9  # or else nothing is tested
    torch.testing.assert_close(found.diag() / found[0, 0], expected / expected[0], rtol=0.01, atol=0)


def test_negatives_follow_and_then_rotations_of_the_same_filters():
    weight, norm = whitened()
    assert torch.equal(weight[27:54], -weight[:27])
    assert weight.norm().item() == pytest.approx(norm, rel=1e-5)
    first, rotated = weight[:27].flatten(1), weight[54:81].flatten(1)
    torch.testing.assert_close(rotated.T @ rotated, first.T @ first, rtol=1e-3, atol=1e-3)  # rotated = rotation @ first
    assert not torch.allclose(weight[54:81], weight[81:108])


@pytest.mark.parametrize('filters', [1, 27, 32, 54, 55])
def test_any_number_of_filters_is_filled(filters):
    weight, _ = whitened(filters)
    assert weight.shape == (filters, 3, 3, 3) and weight.flatten(1).norm(dim=1).min() > 0


def test_the_same_seed_gives_the_same_filters():
    assert torch.equal(whitened(seed=1)[0], whitened(seed=1)[0])
    assert not torch.equal(whitened(seed=1)[0], whitened(seed=2)[0])


def test_nothing_but_the_first_convolutions_weights_changes():
    torch.manual_seed(0)
    model = ConvNet(3, [8, 4], 10, 'BN').to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whiten_first_layer(model, correlated_images(20))
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == [
        'features.0.weight']
    assert isinstance(model.features[0].weight, nn.Parameter)
    assert model.features[0].weight.is_contiguous(memory_format=torch.channels_last)
