"""What the exercise asks to see of a network: its size (Q1b) and its filters (Q1c)."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from lab.figure import INK, Title, new_figure, own_style, save_figure


def PrintModelSize(model: nn.Module, disp: bool = True) -> int:
    """Number of parameters of the model; `disp` prints them layer by layer, trainable and total (Q1b)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if disp:
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for name, layer in model.named_modules():
            if own := sum(parameter.numel() for parameter in layer.parameters(recurse=False)):
                print(f'{name:<14} {type(layer).__name__:<12} {own:>12,}')
        print(f'{"trainable":<27} {trainable:>12,}')
        print(f'{"total":<27} {total:>12,}')
    return total


def VisualizeFilter(model: nn.Module, path: str | Path | None = None, *, before: nn.Module | None = None,
                    titles: Sequence[str] | None = None, title: Title | str = '', change: bool = False) -> np.ndarray:
    """Tile the 3x3 colour filters of the first layer into one image in true colours (Q1c).

    before: a second network, drawn on the left (Q1c: the same one before training). titles: one for each network,
    from left to right. All filters share one scale, on which mid-grey is zero. change: `before` is the same network
    before training, so a third panel shows what training added, on a scale of its own. Saves a picture when given a
    path. Returns the filters as an image, (height, width, 3) floats in [0, 1]: one, or before | gap | after.
    Raises ValueError where two networks' filters differ in number or size, for filters of other than one or three
    channels, for a path that does not end in .png, and for change=True without `before`.
    """
    filters = [_first_filters(network) for network in ([model] if before is None else [before, model])]
    if change and before is None:
        raise ValueError('change=True needs the same network before training: pass it as `before`')
    if filters[0].shape != filters[-1].shape:
        raise ValueError(f'`before` needs filters of the same number and size: {tuple(filters[0].shape)} before, '
                         f'{tuple(filters[-1].shape)} after')
    if path is not None and Path(path).suffix.lower() != '.png':
        raise ValueError(f'path must end in .png, got {str(path)!r}')
    limit = max(f.abs().max().item() for f in filters) or 1.0
    if path is not None:
        titles = titles or ([''] if before is None else ['before training', 'after training'])
        _save_filters(filters, limit, titles, Path(path), title, change)
    images = [_tile(f / (2 * limit) + 0.5) for f in filters]
    gap = np.ones_like(images[0][:, :3])
    return images[0] if before is None else np.concatenate([images[0], gap, images[1]], axis=1)


@own_style()
def _save_filters(filters: Sequence[Tensor], limit: float, titles: Sequence[str], path: Path, title: Title | str,
                  change: bool) -> None:
    """Draw the filters of each network beside each other, then the change from the first to the last."""
    columns = 16 if len(filters) == 1 else 8  # two or three tall panels fit beside each other
    panels = [(name, weights, limit, f'grey is 0, the ends of each colour are ±{limit:.2f}')
              for name, weights in zip(titles, filters, strict=True)]
    if change:
        moved = filters[-1] - filters[0]
        largest, share = moved.abs().max().item(), moved.norm() / filters[0].norm()
        panels.append(('the change: after minus before', moved, largest or 1.0,
                       f'own scale: grey is 0, the ends are ±{largest:.2g}\n'
                       f'(largest change); norm {share:.0%} of that before'))
    height, width, _ = _tile(filters[0], columns).shape
    each = 8 if len(panels) == 1 else 11 / len(panels)  # inches
    figure = new_figure(each * len(panels), each * height / width + 0.7, title)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, weights, scale, note) in zip(grid, panels, strict=True):
        axes.imshow(_tile(weights / (2 * scale) + 0.5, columns), interpolation='nearest')
        axes.set(title=name, xticks=[], yticks=[])
        axes.set_xlabel(note, fontsize=9, color=INK)
        axes.spines[:].set_visible(False)
    save_figure(figure, path)


def _first_filters(model: nn.Module) -> Tensor:
    """(N, 3, k, k) float weights of the first convolution; one channel is shown as grey."""
    weight = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).weight.detach().float().cpu()
    if weight.shape[1] not in (1, 3):
        raise ValueError(f'filters of 1 or 3 channels can be shown, these have {weight.shape[1]}')
    return weight.expand(-1, 3, -1, -1)


def _tile(filters: Tensor, columns: int = 16) -> np.ndarray:
    """(N, 3, k, k) in [0, 1] -> (rows (k + 1) + 1, columns (k + 1) + 1, 3): filter by filter, a white line between."""
    count, channels, height, width = filters.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    image = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), dtype=np.float32)
    for i, picture in enumerate(filters.permute(0, 2, 3, 1).numpy()):  # matplotlib wants the channels last
        top, left = 1 + i // columns * (height + 1), 1 + i % columns * (width + 1)
        image[top:top + height, left:left + width] = picture
    return image
