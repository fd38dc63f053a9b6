"""The ConvNet of questions 1 to 3."""
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def weights_init(module: nn.Module) -> None:
    """Initialise a linear layer as the handout does: weights N(0, 1e-3), bias 0. For `model.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 1e-3)
        nn.init.zeros_(module.bias)


class ConvNet(nn.Module):
    """Blocks of conv 3x3 -> (batch norm) -> max pool 2x2 -> ReLU, dropout between them, one linear layer.

    input_size: channels of the images; hidden_layers: filters of each block, one to five of them,
    since every block halves the 32x32 image; norm_layer: None or 'BN' (Q2a); dropout: p (Q3b).
    """

    def __init__(self, input_size: int, hidden_layers: Sequence[int], num_classes: int,
                 norm_layer: Literal['BN'] | None = None, dropout: float = 0.0):
        super().__init__()
        if not 1 <= len(hidden_layers) <= 5:
            raise ValueError(f'hidden_layers (the constant hidden_size) must name one to five blocks, since each '
                             f'halves the 32x32 image, got {len(hidden_layers)}')
        if norm_layer not in (None, 'BN'):
            raise ValueError(f"norm_layer must be None or 'BN', got {norm_layer!r}")
        blocks = []
        for filters_in, filters in zip([input_size, *hidden_layers], hidden_layers, strict=False):
            if blocks and dropout > 0:
                blocks.append(nn.Dropout(dropout))  # between blocks: after the ReLU of the one before
            blocks.append(nn.Conv2d(filters_in, filters, kernel_size=3, stride=1, padding=1))
            if norm_layer == 'BN':
                blocks.append(nn.BatchNorm2d(filters))
            blocks += [nn.MaxPool2d(kernel_size=2, stride=2), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*blocks)
        side = 32 // 2 ** len(hidden_layers)
        self.classifier = nn.Linear(hidden_layers[-1] * side * side, num_classes)
        self.apply(weights_init)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) normalised images -> (B, num_classes) logits."""
        x = self.features(images)  # (B, 512, 1, 1)
        return self.classifier(x.flatten(1))


@torch.no_grad()
def whiten_first_layer(model: nn.Module, images: Tensor) -> None:
    """Start the first convolution from filters whose responses to these images are uncorrelated.

    images: (N, 3, 32, 32), normalised. The filters are the principal components of the images' patches, each divided
    by its standard deviation; then their negatives; then random rotations of them, as many as the layer has room for.
    All are scaled together to the norm that the weights had. As in K. Jordan's cifar10-airbench (2024), where the
    patches are 2x2.
    """
    weight = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).weight  # (filters, 3, 3, 3)
    patches = F.unfold(images, weight.shape[2:])  # (N, 27, 900)
    mean = patches.mean((0, 2))
    covariance = (patches @ patches.mT).mean(0) / patches.shape[2] - mean.outer(mean)
    variances, components = torch.linalg.eigh(covariance.cpu())  # in columns, the smallest variance first
    whitening = (components / (variances + 0.01).sqrt()).T.flip(0)  # without 0.01, mere noise would become as strong
    filters = torch.cat([whitening, -whitening])
    while len(filters) < len(weight):
        rotation, _ = torch.linalg.qr(torch.randn_like(covariance, device='cpu'))
        filters = torch.cat([filters, rotation @ whitening])
    filters = filters[:len(weight)].view(weight.shape).to(weight.device)
    weight.copy_(filters * (weight.norm() / filters.norm()))
