"""The two networks against the numbers of the handout and against torchvision."""
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import models.vgg
from ex3_convnet import ConvNet, PrintModelSize
from ex3_pretrained import VggModel
from models.convnet import whiten_first_layer

HIDDEN = [128, 512, 512, 512, 512]


# --- ConvNet ------------------------------------------------------------------------------------------------


def test_convnet_has_the_handouts_number_of_parameters_and_they_are_printed_layer_by_layer(capsys):
    assert PrintModelSize(ConvNet(3, HIDDEN, 10, 'BN'), disp=False) == 7_682_826
    assert capsys.readouterr().out == ''
    model = ConvNet(3, HIDDEN, 10)
    model.features[0].requires_grad_(False)
    assert PrintModelSize(model) == 7_678_474
    numbers = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert numbers == ['3,584', '590,336', '2,359,808', '2,359,808', '2,359,808', '5,130', '7,674,890', '7,678,474']


def test_blocks_are_conv_norm_pool_relu_with_dropout_only_between_blocks():
    layers = ConvNet(3, [4] * 5, 10, 'BN', dropout=0.3).features
    block = [nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU]
    assert [type(layer) for layer in layers] == (block + [nn.Dropout]) * 4 + block
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0.3}


def test_plain_convnet_equals_functional_ops():
    model = ConvNet(3, [4, 5, 6, 7, 8], 10).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.double)
    x = images
    for conv in (layer for layer in model.features if isinstance(layer, nn.Conv2d)):
        x = F.relu(F.max_pool2d(F.conv2d(x, conv.weight, conv.bias, padding=1), 2, 2))
    assert x.shape == (3, 8, 1, 1)
    torch.testing.assert_close(model(images), x.flatten(1) @ model.classifier.weight.T + model.classifier.bias)


@pytest.mark.parametrize('norm_layer', [None, 'BN'])
@pytest.mark.parametrize('hidden', [[4], [4, 4, 4], [4] * 5])
def test_convnet_of_one_to_five_blocks_takes_a_single_image_in_training_and_evaluation(norm_layer, hidden):
    model = ConvNet(3, hidden, 7, norm_layer)
    for mode in (True, False):
        assert model.train(mode)(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_linear_layer_starts_small_with_zero_bias():
    torch.manual_seed(0)
    classifier = ConvNet(3, HIDDEN, 10).classifier
    assert 0.8e-3 < classifier.weight.std() < 1.2e-3
    assert not classifier.bias.any()


# --- VGG, with few filters but where they are counted -------------------------------------------------------


def test_vgg_has_the_stated_number_of_parameters_torchvisions_layers_and_a_new_head():
    with torch.device('meta'):  # sizes without values
        model = VggModel(10, fine_tune=True, pretrained=False)
        body = torchvision.models.vgg11_bn().features
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert PrintModelSize(model, disp=False) == 9_360_394
    assert PrintModelSize(model.classifier, disp=False) == 134_410
    assert [type(layer) for layer in model.classifier] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    shapes = [{key: tensor.shape for key, tensor in part.state_dict().items()} for part in (model.features, body)]
    assert shapes[0] == shapes[1]


def test_vgg_features_equal_torchvisions_network_with_the_same_weights(weights):
    model = VggModel(10, fine_tune=False, weights=weights).eval()
    oracle = models.vgg.make_layers(models.vgg.cfgs['A'], batch_norm=True).eval()
    oracle.load_state_dict({key.removeprefix('features.'): tensor for key, tensor in torch.load(weights).items()})
    images = torch.randn(2, 3, 32, 32)
    features = oracle(images).flatten(1)
    assert features.shape == (2, 512) and features.std() > 0
    torch.testing.assert_close(model.extract(images), features)
    for inputs in (images, features):
        torch.testing.assert_close(model(inputs), model.classifier(features))
    assert model(images[:1]).shape == (1, 10)


@pytest.mark.parametrize('fine_tune', [True, False])
def test_fine_tune_means_that_everything_trains_and_its_absence_that_the_head_alone_does(weights, fine_tune):
    model = VggModel(10, fine_tune, weights=weights).train()
    assert all(layer.training for layer in model.classifier.modules())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())
    assert {layer.training for layer in model.features.modules()} == {fine_tune}
    assert {parameter.requires_grad for parameter in model.features.parameters()} == {fine_tune}
    assert not any(layer.training for layer in model.eval().modules())


def test_scratch_starts_with_torchvisions_initialisation(monkeypatch):
    monkeypatch.setattr(models.vgg, 'cfgs', {'A': [64, 'M', 128, 'M', 256, 'M', 64, 'M', 512, 'M']})
    torch.manual_seed(0)
    for layer in VggModel(10, fine_tune=True, pretrained=False).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            std = (2 / (layer.out_channels * 9)) ** 0.5 if isinstance(layer, nn.Conv2d) else 0.01
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()


@pytest.mark.parametrize('make, words', [
    (lambda: ConvNet(3, [], 10), 'one to five blocks'), (lambda: ConvNet(3, [4] * 6, 10), 'one to five blocks'),
    (lambda: ConvNet(3, [4], 10, 'GN'), "norm_layer must be None or 'BN'"),
    (lambda: VggModel(10, fine_tune=False, pretrained=False), 'fine_tune=False needs pretrained=True'),
    (lambda: VggModel(10, True, False, layer_config=(100, 10)), r'layer_config must be \(512, hidden\)')])
def test_a_network_that_cannot_be_built_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- the whitened start of the first layer ------------------------------------------------------------------


def whitened(filters, count=20):
    """A first layer's (filters, 3, 3, 3) weights, whitened for images (count, 3, 32, 32), and these images."""
    torch.manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.5, -0.3, 0.4]])  # of the channels
    images = torch.einsum('ij,njhw->nihw', mixing, F.avg_pool2d(torch.randn(count, 3, 36, 36), 5, 1) * 5) + 0.3
    model = ConvNet(3, [filters, 4], 10, 'BN').to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whiten_first_layer(model, images)
    weight = model.features[0].weight
    assert [name for name in before if not torch.equal(model.state_dict()[name], before[name])] == ['features.0.weight']
    assert weight.norm().item() == pytest.approx(before['features.0.weight'].norm().item(), rel=1e-5)
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.requires_grad
    return weight.detach(), images


def test_the_first_responses_are_uncorrelated_and_equally_strong_but_for_weak_components():
    weight, images = whitened(27, count=200)
    found = torch.cov(F.conv2d(images, weight).transpose(0, 1).flatten(1).double())
    patches = torch.cov(F.unfold(images, 3).transpose(0, 1).flatten(1).double())
    variances = torch.linalg.eigvalsh(patches).flip(0)
    expected = variances / (variances + 0.01)
    assert expected[-1] < 0.9 and expected[0] > 0.99  # or else nothing is tested
    torch.testing.assert_close(found / found[0, 0], (expected / expected[0]).diag(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize('filters', [5, 32, 128])
def test_negatives_follow_and_then_rotations_of_the_same_filters_as_far_as_there_is_room(filters):
    weight = whitened(filters)[0].flatten(1)
    first, negatives, rotated, others = (weight[i:i + 27] for i in (0, 27, 54, 81))
    assert len(weight) == filters and torch.equal(negatives, -first[:len(negatives)])
    if filters == 128:
        torch.testing.assert_close(rotated.T @ rotated, first.T @ first, rtol=1e-3, atol=1e-3)  # rotated = R @ first
        assert not torch.allclose(rotated, others)
