"""The built-in stand-in for CIFAR-10: ten classes of drawn shapes, so that everything runs with no network.

Every image shows one shape of random place, size, rotation and colour on a cluttered background. A shape is a
signed distance: how far a point lies outside its outline (inside: negative). It is evaluated at the pixels of
all images at once; a mirror image of a shape is the same shape, so horizontal flips keep the label.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = 'built-in shapes 1'  # to be raised with every change: processors round differently, so pixels do not tell
SIDE = 32  # pixels, as in CIFAR-10
CHUNK = 500  # images drawn at once: some 25 MB of float32, whatever n is


# Signed distances: x, y (B, 32, 32) in the shape's own frame -> (B, 32, 32).
# Every shape about fills the unit circle.

def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 1, 0.8 - torch.hypot(x, y - 0.55))  # a disc less a disc


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * math.sqrt(0.75) + y / 2, -y) - 0.55  # x.abs(): one half-plane, two sides


def cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.3, torch.maximum(x, y) - 1)


def heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs() / 0.8, y / 0.8 + 0.2  # a square on its corner, and a half-disc on each of two of its sides
    corner, half_disc = (x + y.abs() - 1) / math.sqrt(2), torch.hypot(x - 0.5, y - 0.5) - math.sqrt(0.5)
    return 0.8 * torch.minimum(corner, half_disc)


def star(x: Tensor, y: Tensor) -> Tensor:
    # fold the plane into one tenth of the star, from the tip at (1, 0) to the notch: there it is a half-plane
    tenth = math.pi / 5
    angle = (torch.remainder(torch.atan2(x, y), 2 * tenth) - tenth).abs()
    x, y = torch.hypot(x, y) * torch.cos(tenth - angle), torch.hypot(x, y) * torch.sin(tenth - angle)
    notch_x, notch_y = 0.45 * math.cos(tenth), 0.45 * math.sin(tenth)
    return ((x - 1) * notch_y + y * (1 - notch_x)) / math.hypot(notch_y, 1 - notch_x)


def bars(x: Tensor) -> Tensor:
    """Endless bars across x, 0.4 wide and 0.4 apart."""
    return (torch.remainder(x, 0.8) - 0.4).abs() - 0.2


def stripes(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(bars(x), torch.hypot(x, y) - 1)


def chequers(x: Tensor, y: Tensor) -> Tensor:
    across, along = bars(x), bars(y)
    either_not_both = torch.maximum(torch.minimum(across, along), -torch.maximum(across, along))
    return torch.maximum(either_not_both, torch.hypot(x, y) - 1)


SHAPES = (circle, ring, crescent, square, triangle, cross, heart, star, stripes, chequers)
CLASSES = tuple(shape.__name__ for shape in SHAPES)


def make_shapes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """-> images (n, 3, 32, 32) uint8, labels (n,) int64: equally many of each class (give or take one), in
    random order. The same n and seed give the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % len(CLASSES))[torch.randperm(n, generator=generator)]
    return torch.cat([draw(chunk, generator) for chunk in labels.split(CHUNK)]), labels


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) int64 -> (B, 3, 32, 32) uint8, one image for each label."""
    n = len(labels)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(n, *size, generator=generator) * (high - low) + low

    def clouds(cells: int) -> Tensor:
        """(B, 3, 32, 32) in about [-1, 1]: random colours on a coarse grid, blended smoothly."""
        return F.interpolate(uniform(-1, 1, 3, cells, cells), size=SIDE, mode='bilinear', align_corners=True)

    def offsets(spread: float) -> tuple[Tensor, Tensor]:
        """Each pixel's position, in pixels, seen from a random point near the middle of its image."""
        pixel = torch.arange(SIDE) - (SIDE - 1) / 2
        return (pixel - uniform(-spread, spread, 1, 1)).expand(n, SIDE, SIDE), \
            (-pixel[:, None] - uniform(-spread, spread, 1, 1)).expand(n, SIDE, SIDE)

    def paint(image: Tensor, colour: Tensor, distance: Tensor) -> Tensor:
        coverage = (0.5 - distance).clamp(0, 1)[:, None]  # of each pixel: antialiasing
        return image + coverage * (colour - image)

    colour = uniform(0.2, 0.5, 3, 1, 1)
    foreground = colour + uniform(0.2, 0.5, 3, 1, 1)  # brighter: some contrast is always there, often little
    # The background's hue hints at the class, as sky and grass do in photographs: something to learn at once.
    place = (labels[:, None] / len(SHAPES) - torch.arange(3) / 3)[:, :, None, None]  # on the circle of hues
    background = colour + 0.3 * torch.cos(2 * math.pi * place)
    image = background + 0.12 * clouds(2) + 0.12 * clouds(6)

    size, angle = uniform(8, 13, 1, 1), uniform(-0.3, 0.3, 1, 1)
    x, y = offsets(spread=4)
    x, y = (x * angle.cos() + y * angle.sin()) / size, (y * angle.cos() - x * angle.sin()) / size
    distance = torch.empty(n, SIDE, SIDE)
    for label, shape in enumerate(SHAPES):
        chosen = labels == label
        distance[chosen] = shape(x[chosen], y[chosen])
    image = paint(image, foreground + 0.15 * clouds(2), distance * size)

    for _ in range(3):  # specks, which may hide a part of the shape
        image = paint(image, uniform(0, 1, 3, 1, 1), torch.hypot(*offsets(spread=16)) - uniform(1, 2.5, 1, 1))
    image = image + 0.05 * torch.randn(image.shape, generator=generator)
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
