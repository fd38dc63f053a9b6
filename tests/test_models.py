"""The two networks against the numbers of the handout and against torchvision."""
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from ex3_convnet import ConvNet, PrintModelSize
from ex3_pretrained import VggModel

HIDDEN = [128, 512, 512, 512, 512]


@pytest.fixture(scope='module')
def vgg_file(tmp_path_factory):
    """A state dict as torchvision gives it, of random weights, without the classifier's 123 million."""
    with torch.device('meta'):
        full = torchvision.models.vgg11_bn(init_weights=False)
    generator = torch.Generator().manual_seed(1)
    state = {f'features.{key}': torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01
             if tensor.is_floating_point() else torch.tensor(7)
             for key, tensor in full.features.state_dict().items()}
    path = tmp_path_factory.mktemp('weights') / 'vgg.pth'
    torch.save(state, path)
    return path


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


# --- VGG ----------------------------------------------------------------------------------------------------


def test_vgg_has_the_stated_number_of_parameters(vgg_file):
    model = VggModel(10, fine_tune=False, weights=vgg_file)
    assert PrintModelSize(model, disp=False) == 9_360_394
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 134_410


def test_vgg_head_is_linear_norm_relu_linear():
    model = VggModel(7, True, pretrained=False, layer_config=(512, 100))
    assert [type(layer) for layer in model.classifier] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in model.classifier.parameters() if p.ndim == 2] == [(100, 512), (7, 100)]


def test_vgg_features_equal_torchvisions_network_with_the_same_weights(vgg_file):
    oracle = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs['A'], batch_norm=True).eval()
    oracle.load_state_dict({k.removeprefix('features.'): v for k, v in torch.load(vgg_file).items()})
    model = VggModel(10, fine_tune=False, weights=vgg_file).eval()
    images = torch.randn(2, 3, 32, 32)
    features = oracle(images)
    assert features.shape == (2, 512, 1, 1)
    torch.testing.assert_close(model.extract(images), features[:, :, 0, 0])
    torch.testing.assert_close(model(images), model.classifier(features[:, :, 0, 0]))
    assert model(images[:1]).shape == (1, 10)


def test_frozen_backbone_stays_in_evaluation_mode_and_needs_no_gradient(vgg_file):
    model = VggModel(10, fine_tune=False, weights=vgg_file).train()
    assert model.classifier.training and not any(layer.training for layer in model.features.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f'classifier.{name}' for name, _ in model.classifier.named_parameters()}


def test_fine_tune_means_that_everything_trains(vgg_file):
    model = VggModel(10, fine_tune=True, weights=vgg_file).train()
    assert all(p.requires_grad for p in model.parameters())
    assert all(layer.training for layer in model.modules())


def test_scratch_starts_with_torchvisions_initialisation():
    torch.manual_seed(0)
    model = VggModel(10, fine_tune=True, pretrained=False)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * 9
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1) and not layer.bias.any()
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1) and not layer.bias.any()


def test_a_frozen_random_backbone_is_refused():
    with pytest.raises(ValueError, match='pretrained'):
        VggModel(10, fine_tune=False, pretrained=False)
