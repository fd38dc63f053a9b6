"""VGG11 with batch norm for transfer learning (question 4; Simonyan and Zisserman, 2014)."""
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from models.weights import load_features


class VggModel(nn.Module):
    """The convolutional part of torchvision's vgg11_bn, and two new fully connected layers.

    fine_tune: True trains the whole network, False only the new layers (the handout's flag meant the
    opposite). pretrained: start the convolutional part from `weights`, else from torchvision's random
    initialisation. layer_config: inputs of the first new layer (512, as the convolutions give) and of the
    second. weights: 'imagenet', or the path of a state dict (see `load_features`).
    Raises ValueError for arguments or weights that do not fit, WeightsUnavailable when offline.
    """

    def __init__(self, n_class: int, fine_tune: bool, pretrained: bool = True, *,
                 layer_config: Sequence[int] = (512, 256), weights: str | Path = 'imagenet'):
        super().__init__()
        if not (fine_tune or pretrained):
            raise ValueError('fine_tune=False needs pretrained=True: a frozen random backbone learns nothing')
        if len(layer_config) != 2 or layer_config[0] != 512:
            raise ValueError(f'layer_config must be (512, hidden): the convolutions give 512 features, '
                             f'got {tuple(layer_config)}')
        self.fine_tune = fine_tune
        self.features = make_layers(cfgs['A'], batch_norm=True)
        features_in, hidden = layer_config
        self.classifier = nn.Sequential(
            nn.Linear(features_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, n_class))
        self.apply(_torchvision_init)
        if pretrained:
            self.features.load_state_dict(load_features(weights, like=self.features.state_dict()))
        self.features.requires_grad_(fine_tune)

    def extract(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) normalised images -> (B, 512) features."""
        return self.features(images).flatten(1)  # five poolings leave 1x1, so flatten keeps a batch of one

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) normalised images, or (B, 512) features of `extract` -> (B, n_class) logits."""
        return self.classifier(self.extract(x) if x.ndim == 4 else x)

    def train(self, mode: bool = True) -> 'VggModel':
        super().train(mode)
        if not self.fine_tune:
            self.features.eval()  # frozen batch norm must not keep learning statistics
        return self


def _torchvision_init(module: nn.Module) -> None:
    """The initialisation torchvision gives its VGG, which `make_layers` alone does not include."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)
