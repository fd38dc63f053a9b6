"""Augmentation of whole batches, on the device that holds them: every image draws its own parameters (Q3a).

    augment = Crop(padding=4)
    images = augment(images, generator)  # (B, 3, H, W) float32 in [0, 1] -> same; the input is not modified

An augmentation is a small value. Printed, it shows its strengths; called, it draws the parameters of B images
from `generator` (on the images' device; None: torch's own) and hands them to a function without randomness: `crop`,
`affine`, `adjust_hue` ... These compute what torchvision's functional transforms compute for one image.

Nothing here waits for the GPU or copies to it, and no shape depends on what was drawn.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# ---- geometry ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flip:
    """(B, 3, H, W) float in [0, 1] -> same, each image mirrored left to right with probability p."""
    p: float = 0.5

    def __call__(self, images: Tensor, generator: Generator | None) -> Tensor:
        return torch.where(_per_image(_chosen(self.p, images, generator)), images.flip(3), images)


@dataclass(frozen=True)
class Crop:
    """(B, 3, H, W) float in [0, 1] -> same, each image shifted by up to `padding` pixels in x and in y.

    The border that comes into view is black, as with torchvision's RandomCrop(32, padding=4), the standard
    for CIFAR-10; with mode 'reflect' it shows the image mirrored at its edge.
    """
    padding: int = 4
    mode: Literal['zeros', 'reflect'] = 'zeros'

    def __call__(self, images: Tensor, generator: Generator | None) -> Tensor:
        x = _randint(2 * self.padding + 1, images, generator)
        y = _randint(2 * self.padding + 1, images, generator)
        return crop(images, x, y, self.padding, self.mode)


def crop(images: Tensor, x: Tensor, y: Tensor, padding: int, mode: str = 'zeros') -> Tensor:
    """The H x W window of each padded image from column x and row y on: int (B,), 0..2*padding."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding), 'constant' if mode == 'zeros' else mode)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, y, x, H, W): a view of every crop
    return windows[torch.arange(batch, device=images.device), :, y, x]


@dataclass(frozen=True)
class Affine:
    """(B, 3, H, W) float in [0, 1] -> same, each image sheared, scaled, rotated and moved, black outside.

    Drawn uniformly: the rotation from ±degrees, the translation from ±translate of the width and of the
    height, the scale from 1 ± scale, the shear along x from ±shear degrees.
    """
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __call__(self, images: Tensor, generator: Generator | None) -> Tensor:
        height, width = images.shape[2:]
        return affine(
            images,
            angle=_uniform(-self.degrees, self.degrees, images, generator),
            translate_x=_uniform(-self.translate * width, self.translate * width, images, generator),
            translate_y=_uniform(-self.translate * height, self.translate * height, images, generator),
            scale=_uniform(1 - self.scale, 1 + self.scale, images, generator),
            shear=_uniform(-self.shear, self.shear, images, generator),
        )


def affine(images: Tensor, angle: Tensor, translate_x: Tensor, translate_y: Tensor, scale: Tensor,
           shear: Tensor) -> Tensor:
    """Shear, scale and rotate each image about its centre, then move it. Parameters (B,), degrees and pixels.

    A positive angle turns clockwise, a positive translation moves right or down. Bilinear.
    """
    height, width = images.shape[2:]
    angle, shear = angle.deg2rad(), shear.deg2rad()
    cos, sin, tan, translate_x, translate_y = (
        value.view(-1, 1, 1) for value in (angle.cos() / scale, angle.sin() / scale, shear.tan(),
                                           translate_x, translate_y))

    # Walk from each output pixel, measured from the image's centre, back to the place in the input it shows.
    # Step by step: the matrix product in F.affine_grid would be rounded to TF32 or bf16 where these are on.
    x = torch.arange(width, device=images.device) - (width - 1) / 2 - translate_x  # (B, 1, W)
    y = torch.arange(height, device=images.device).view(-1, 1) - (height - 1) / 2 - translate_y  # (B, H, 1)
    x, y = cos * x + sin * y, cos * y - sin * x  # (B, H, W) each
    x = x + tan * y
    grid = torch.stack((x * (2 / width), y * (2 / height)), dim=3)  # ±1 are the outer edges of the image
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


@dataclass(frozen=True)
class Cutout:
    """(B, 3, H, W) float in [0, 1] -> same, with one square of each image erased (DeVries & Taylor 2017).

    Erased is mid-grey, 0.5: with mean 0.5 the normalisation turns it into 0. Any pixel can be the centre of
    the size x size square, so it may stick out over the edge of the image.
    """
    size: int = 8

    def __call__(self, images: Tensor, generator: Generator | None) -> Tensor:
        height, width = images.shape[2:]
        x, y = _randint(width, images, generator), _randint(height, images, generator)
        return cutout(images, x, y, self.size)


def cutout(images: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """The images with 0.5 in a square centred on column x, row y: int (B,). If even, it lies up and left."""
    height, width = images.shape[2:]
    column = torch.arange(width, device=images.device) - _per_image(x - size // 2)  # 0..size-1 in the square
    row = torch.arange(height, device=images.device).view(-1, 1) - _per_image(y - size // 2)
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)  # (B, 1, H, W)
    return images.masked_fill(inside, 0.5)


# ---- colour ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColorJitter:
    """(B, 3, H, W) float in [0, 1] -> same, each image changed in brightness, contrast, saturation and hue.

    The first three by factors drawn uniformly from [max(0, 1 - x), 1 + x], the hue by a part of the colour
    circle from ±hue (0.5 is halfway round). Always in this order; torchvision's ColorJitter shuffles it.
    """
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, images: Tensor, generator: Generator | None) -> Tensor:
        for adjust, strength in ((adjust_brightness, self.brightness), (adjust_contrast, self.contrast),
                                 (adjust_saturation, self.saturation)):
            if strength:
                images = adjust(images, _uniform(max(0, 1 - strength), 1 + strength, images, generator))
        if self.hue:
            images = adjust_hue(images, _uniform(-self.hue, self.hue, images, generator))
        return images


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Each image times its factor (B,): 0 gives black, 1 the image itself."""
    return (images * _per_image(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Each image's distance from its own mean grey times its factor (B,): 0 gives that grey, 1 the image."""
    mean = greyscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return mean.lerp(images, _per_image(factor)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Each pixel's distance from its own grey times the image's factor (B,): 0 gives greys, 1 the image."""
    return greyscale(images).lerp(images, _per_image(factor)).clamp(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Each image with its colours turned by shift (B,) of the colour circle, by way of HSV."""
    red, green, blue = images.split(1, dim=1)
    value, lowest = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - lowest
    divisor = chroma.clamp(min=1e-12)  # greys have no hue, and 0 / 0 would be nan
    hue = torch.where(value == red, (green - blue) / divisor,
                      torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4))

    # The circle in sixths: red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5. Once round it, each channel
    # fades during one sixth, stays low for two, rises during one and stays high for two. Red begins to fade
    # at 1, green at 3, blue at 5: `place` is the way gone since then.
    place = (hue + 6 * _per_image(shift) - torch.arange(1, 6, 2, device=images.device).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)  # (B, 3, H, W)


@dataclass(frozen=True)
class Greyscale:
    """(B, 3, H, W) float in [0, 1] -> same, each image without its colours with probability p."""
    p: float = 0.1

    def __call__(self, images: Tensor, generator: Generator | None) -> Tensor:
        return torch.where(_per_image(_chosen(self.p, images, generator)), greyscale(images), images)


def greyscale(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), red, green and blue weighted as the eye does (ITU-R BT.601)."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


# ---- one parameter for each image, (B,) on the images' device ----------------------------------------------


def _uniform(low: float, high: float, images: Tensor, generator: Generator | None) -> Tensor:
    return images.new_empty(len(images)).uniform_(low, high, generator=generator)


def _randint(high: int, images: Tensor, generator: Generator | None) -> Tensor:
    return torch.randint(high, (len(images),), device=images.device, generator=generator)


def _chosen(p: float, images: Tensor, generator: Generator | None) -> Tensor:
    return torch.rand(len(images), device=images.device, generator=generator) < p


def _per_image(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1, 1)  # broadcasts over channels, rows and columns
