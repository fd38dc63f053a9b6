"""The two networks against the numbers of the handout and against torchvision."""
import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import models.vgg
from ex3_convnet import ConvNet, PrintModelSize
from ex3_pretrained import VggModel

HIDDEN = [128, 512, 512, 512, 512]


# --- ConvNet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('norm_layer, expected', [(None, 7_678_474), ('BN', 7_682_826)])
def test_convnet_has_the_handouts_number_of_parameters(norm_layer, expected, capsys):
    assert PrintModelSize(ConvNet(3, HIDDEN, 10, norm_layer), disp=False) == expected
    assert capsys.readouterr().out == ''


def test_print_model_size_prints_every_layer_and_the_total(capsys):
    PrintModelSize(ConvNet(3, HIDDEN, 10))
    numbers = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert numbers == ['3,584', '590,336', '2,359,808', '2,359,808', '2,359,808', '5,130', '7,678,474', '7,678,474']


def test_blocks_are_conv_norm_pool_relu_with_dropout_only_between_blocks():
    kinds = [type(layer) for layer in ConvNet(3, [4] * 5, 10, 'BN', dropout=0.3).features]
    block = [nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU]
    assert kinds == (block + [nn.Dropout]) * 4 + block


def test_plain_convnet_equals_functional_ops():
    model = ConvNet(3, [4, 5, 6, 7, 8], 10).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.double)
    x = images
    for conv in (layer for layer in model.features if isinstance(layer, nn.Conv2d)):
        x = F.relu(F.max_pool2d(F.conv2d(x, conv.weight, conv.bias, padding=1), 2, 2))
    assert x.shape == (3, 8, 1, 1)
    torch.testing.assert_close(model(images), x.flatten(1) @ model.classifier.weight.T + model.classifier.bias)


def test_linear_layer_starts_small_with_zero_bias():
    torch.manual_seed(0)
    classifier = ConvNet(3, HIDDEN, 10).classifier
    assert 0.8e-3 < classifier.weight.std() < 1.2e-3
    assert not classifier.bias.any()


@pytest.mark.parametrize('hidden', [[4], [4, 4, 4]])
def test_fewer_blocks_leave_a_larger_image_to_the_linear_layer(hidden):
    assert ConvNet(3, hidden, 10)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize('arguments', [dict(hidden_layers=[]), dict(hidden_layers=[4] * 6), dict(norm_layer='GN')])
def test_convnet_refuses_what_it_cannot_build(arguments):
    with pytest.raises(ValueError, match='must'):
        ConvNet(**dict(input_size=3, hidden_layers=[4], num_classes=10) | arguments)


@pytest.mark.parametrize('norm_layer', [None, 'BN'])
def test_convnet_takes_one_image_in_training_and_evaluation(norm_layer):
    model = ConvNet(3, [4] * 5, 7, norm_layer)
    for mode in (True, False):
        assert model.train(mode)(torch.randn(1, 3, 32, 32)).shape == (1, 7)


# --- VGG, with few filters but where they are counted ---------------------------------------------------------


def test_vgg_has_the_stated_number_of_parameters_and_torchvisions_layers():
    with torch.device('meta'):  # sizes without values
        model = VggModel(10, fine_tune=True, pretrained=False)
        body = torchvision.models.vgg11_bn().features
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert PrintModelSize(model, disp=False) == 9_360_394
    assert PrintModelSize(model.classifier, disp=False) == 134_410
    shapes = [{key: tensor.shape for key, tensor in part.state_dict().items()} for part in (model.features, body)]
    assert shapes[0] == shapes[1]


def test_vgg_head_is_linear_norm_relu_linear(weights):
    model = VggModel(7, True, weights=weights, layer_config=(512, 100))
    assert [type(layer) for layer in model.classifier] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in model.classifier.parameters() if p.ndim == 2] == [(100, 512), (7, 100)]


def test_vgg_features_equal_torchvisions_network_with_the_same_weights(weights):
    model = VggModel(10, fine_tune=False, weights=weights).eval()
    oracle = models.vgg.make_layers(models.vgg.cfgs['A'], batch_norm=True).eval()
    oracle.load_state_dict({key.removeprefix('features.'): tensor for key, tensor in torch.load(weights).items()})
    images = torch.randn(2, 3, 32, 32)
    features = oracle(images)
    assert features.shape == (2, 512, 1, 1) and features.std() > 0
    torch.testing.assert_close(model.extract(images), features[:, :, 0, 0])
    for inputs in (images, model.extract(images)):
        torch.testing.assert_close(model(inputs), model.classifier(features[:, :, 0, 0]))
    assert model(images[:1]).shape == (1, 10)


def test_a_frozen_backbone_stays_in_evaluation_mode_and_needs_no_gradient(weights):
    model = VggModel(10, fine_tune=False, weights=weights).train()
    assert model.classifier.training and not any(layer.training for layer in model.features.modules())
    assert {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad} == {'classifier'}
    before = copy.deepcopy(model.features.state_dict())
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.features.state_dict().items())
    assert not model.eval().classifier.training


def test_fine_tune_means_that_everything_trains(weights):
    model = VggModel(10, fine_tune=True, weights=weights).train()
    assert all(p.requires_grad for p in model.parameters()) and all(layer.training for layer in model.modules())


def test_scratch_starts_with_torchvisions_initialisation(monkeypatch):
    monkeypatch.setattr(models.vgg, 'cfgs', {'A': [64, 'M', 128, 'M', 256, 'M', 64, 'M', 512, 'M']})
    torch.manual_seed(0)
    for layer in VggModel(10, fine_tune=True, pretrained=False).modules():
        if isinstance(layer, nn.Conv2d):
            std = (2 / (layer.out_channels * 9)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1) and not layer.bias.any()


@pytest.mark.parametrize('arguments, words', [
    (dict(fine_tune=False, pretrained=False), 'fine_tune=False needs pretrained=True'),
    (dict(fine_tune=True, pretrained=False, layer_config=(100, 10)), r'layer_config must be \(512, hidden\)')])
def test_vgg_refuses_what_it_cannot_build(arguments, words):
    with pytest.raises(ValueError, match=words):
        VggModel(10, **arguments)
