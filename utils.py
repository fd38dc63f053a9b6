"""Device, precision, model size, files written whole, and every picture the scripts save."""
import ctypes
import io
import os
import platform
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn import functional as F

# --- device and precision ---------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """'auto' (CUDA, else CPU) or any torch device that works here. Raises ValueError for one that does not.

    Also has cuDNN search for the fastest algorithms or, on a CPU, freed memory kept.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # every kind of device raises something else where it is missing
        raise ValueError(f"device must be 'auto' or a torch device that is here, got {name!r} "
                         f'({first_sentence(error)})') from error
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = True  # every step has the same shapes: worth a search
    if device.type == 'cpu':
        keep_freed_memory()
    return torch.device('cpu') if device.type == 'cpu' else device  # tensors saved on cpu:1 could not be loaded


def keep_freed_memory() -> None:
    """Let glibc reuse a step's memory in the next one instead of giving it back to the system.

    Fresh pages from the system must be zeroed first, which takes up to a tenth of a training step. Other C libraries
    have no such switch: nothing happens.
    """
    mmap_max, trim_threshold = -4, -1  # of glibc's malloc.h
    with suppress(AttributeError, OSError, TypeError):  # macOS and musl; Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def first_sentence(error: Exception) -> str:
    """Of its message: torch's go on for pages."""
    return re.split(r'\. |\n', str(error).strip())[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what an error was about, in the words of the CPU, of CUDA, cuBLAS and cuDNN."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in (
        'allocate memory', 'out of memory', 'ALLOC_FAILED', 'unable to find an engine'))


def describe_device(device: torch.device) -> str:
    """'NVIDIA H200', or the processor's name and the number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line.split(':', 1)[1].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith('model name')]
        name = names[0] if names else name
    return f'{name}, {torch.get_num_threads()} threads' if device.type == 'cpu' else f'{device.type} ({name})'


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """'auto', 'fp32' or 'bf16' -> ('fp32' or 'bf16', the reason, for people)."""
    if name != 'auto':
        return name, 'as asked'
    if device.type == 'cuda':
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ('bf16', 'native on this GPU') if native else ('fp32', 'this GPU has no bf16')
    if device.type != 'cpu' or not _cpu_has_bf16():
        return 'fp32', 'no native bf16 instructions'
    # Some processors have the instructions and gain nothing by them, so the choice is measured.
    error, faster = _try_bf16()
    if error > 0.05:
        return 'fp32', f'bf16 is wrong by {error:.0%} here'
    return ('bf16' if faster > 1.25 else 'fp32'), f'bf16 runs at {faster:.1f} times the speed of fp32 here'


def _cpu_has_bf16() -> bool:
    """AVX512-BF16 or AMX on x86; on Arm what oneDNN says."""
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ('x86_64', 'amd64'):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _try_bf16() -> tuple[float, float]:
    """A convolution of the ConvNet forward and backward: (relative error of bf16, its speed over that of fp32).

    In turns and on one thread, so that what else the machine does touches both alike.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 128, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    weight = (torch.randn(512, 128, 3, 3, generator=generator) / 34).to(memory_format=torch.channels_last)
    weight.requires_grad_()
    gradients, seconds = {}, {'fp32': [], 'bf16': []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(7):
        for precision, times in seconds.items():
            start = time.perf_counter()
            with autocast(images.device, precision):
                loss = F.conv2d(images, weight, padding=1).float().square().mean()
            (gradients[precision],) = torch.autograd.grad(loss, weight)
            times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    error = (gradients['bf16'] - gradients['fp32']).norm() / gradients['fp32'].norm()
    return error.item(), float(np.median(np.divide(seconds['fp32'], seconds['bf16'])))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes: bf16 autocast, or nothing. No cache of cast weights: each is used once."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16', cache_enabled=False)


# --- files ------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write the whole file or leave the old one: no crash and no full disk ever leaves a part of it."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say which file
        raise


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; returns the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    write_atomically(path, buffer.getvalue())
    return path


# --- Q1b and Q1c: what the network is made of ---------------------------------------------------------------


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
                    titles: Sequence[str] | None = None, title: str = '') -> np.ndarray:
    """Tile the 3x3 colour filters of the first layer into one image in true colours (Q1c).

    before: a second network, drawn on the left (Q1c: the same one before training). titles: one for each network,
    from left to right. All filters share one scale, on which mid-grey is zero. Saves a picture when given a path.
    Returns what it drew: (height, width, 3) floats in [0, 1].
    """
    filters = [_first_filters(network) for network in ([model] if before is None else [before, model])]
    limit = max(f.abs().max().item() for f in filters) or 1.0
    images = [_tile(f / (2 * limit) + 0.5) for f in filters]
    if path is not None:
        height, width, _ = images[0].shape
        figure = Figure(figsize=(7 * len(images), 7 * height / width + 1.2), layout='constrained')
        _set_title(figure, f'Filters of the first layer\n{title}')
        titles = titles or (['before training', 'after training'] if before is not None else [''])
        panels = figure.subplots(1, len(images), squeeze=False)[0]
        for panel, image, name in zip(panels, images, titles, strict=True):
            panel.imshow(image, interpolation='nearest')
            panel.set_title(name)
            panel.axis('off')
        figure.supxlabel(f'mid-grey is 0, the ends of each colour are ±{limit:.2f}', fontsize=9)
        save_figure(figure, Path(path))
    gap = np.ones_like(images[0][:, :3])
    return images[0] if before is None else np.concatenate([images[0], gap, images[1]], axis=1)


def _first_filters(model: nn.Module) -> Tensor:
    """(N, 3, k, k) float weights of the first convolution."""
    weight = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).weight
    return weight.detach().float().cpu()


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


# --- plots ------------------------------------------------------------------------------------------------

Statistic = tuple[Sequence[float], Sequence[float]]  # means and standard deviations


def plot_curves(runs: Mapping[str, Sequence], path: Path, title: str) -> Path:
    """Loss and accuracy against the epoch, all runs overlaid: run -> one `History` a seed.

    Dashed is training, solid validation; a dot marks the best epoch; a band, with up to four runs, is
    one standard deviation over seeds.
    """
    figure = Figure(figsize=(11, 4.6), layout='constrained')
    _set_title(figure, f'{title}\ndashed: training (during the epoch), solid: validation, dot: best epoch')
    panels = figure.subplots(1, 2)
    for color, (name, histories) in zip(_colors(len(runs)), runs.items(), strict=True):
        epochs = range(1, 1 + max(len(history['epoch']) for history in histories))
        curves = {f'{part}_{quantity}': _mean_std([scale * np.array(history[f'{part}_{quantity}'])
                                                   for history in histories])
                  for part in ('train', 'val') for quantity, scale in (('loss', 1), ('accuracy', 100))}
        best = max(range(len(epochs)), key=lambda i: (curves['val_accuracy'][0][i], -curves['val_loss'][0][i]))
        for panel, quantity in zip(panels, ('loss', 'accuracy'), strict=True):
            for part, style in (('train', '--'), ('val', '-')):
                mean, deviation = curves[f'{part}_{quantity}']
                panel.plot(epochs, mean, style, color=color, linewidth=1.6 if part == 'val' else 1.1,
                           marker='.' if len(epochs) == 1 else None, label=name if part == 'val' else None)
                if len(histories) > 1 and len(runs) <= 4:  # more bands would hide each other and the lines
                    panel.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
            panel.plot(epochs[best], curves[f'val_{quantity}'][0][best], 'o', color=color, markersize=6)
    for panel, label in zip(panels, ('loss (cross entropy)', 'accuracy (%)'), strict=True):
        panel.set(xlabel='epoch', ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    if losses := [history['train_loss'] for histories in runs.values() for history in histories]:
        # Show all losses from the start, but do not let one spike of the validation flatten the other curves.
        top = panels[0].get_ylim()[1]
        panels[0].set_ylim(0, min(top, 2 * max(map(max, losses))))
    if any(runs):
        panels[1].legend(loc='center left', bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return save_figure(figure, path)


def _mean_std(curves: Sequence[np.ndarray]) -> Statistic:
    """Mean and sample standard deviation at each epoch, over the curves that go so far."""
    table = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(table, curves, strict=True):
        row[:len(curve)] = curve
    mean, count = np.nanmean(table, 0), np.isfinite(table).sum(0)
    return mean, np.sqrt(np.nansum((table - mean) ** 2, 0) / np.maximum(count - 1, 1))


def plot_against(x: Sequence[float], series: Mapping[str, Statistic], path: Path, title: str, xlabel: str) -> Path:
    """Accuracies in percent against a number, with error bars where there are several seeds (Q3b)."""
    figure = Figure(figsize=(7.5, 4.8), layout='constrained')
    panel = figure.subplots()
    for color, (name, (means, deviations)) in zip(_colors(len(series)), series.items(), strict=True):
        panel.errorbar(x, means, yerr=deviations if any(deviations) else None, marker='o', capsize=3, color=color,
                       label=name)
    panel.set(xlabel=xlabel, ylabel='accuracy (%)', xticks=x)
    _set_title(figure, title)
    panel.grid(alpha=0.3)
    panel.legend()
    return save_figure(figure, path)


def plot_bars(names: Sequence[str], series: Mapping[str, Statistic], path: Path, title: str) -> Path:
    """Groups of bars of accuracies in percent, one group a name; the axis begins near the smallest."""
    figure = Figure(figsize=(max(7.5, 0.6 * len(names) * len(series)), 4.8), layout='constrained')
    panel = figure.subplots()
    width = 0.8 / len(series)
    for i, (color, (name, (means, deviations))) in enumerate(zip(_colors(len(series)), series.items(), strict=True)):
        places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
        bars = panel.bar(places, means, width, yerr=deviations if any(deviations) else None, capsize=3, color=color,
                         label=name)
        panel.bar_label(bars, fmt='%.1f', padding=2, fontsize=8)
    lowest = np.nanmin([np.subtract(*statistic) for statistic in series.values()])
    highest = np.nanmax([np.add(*statistic) for statistic in series.values()])
    margin = max(1.0, 0.15 * (highest - lowest))
    bottom = max(0, lowest - 2 * margin)
    panel.set(ylabel=f'accuracy (%), from {bottom:.0f}' if bottom else 'accuracy (%)', ylim=(bottom, highest + margin))
    panel.set_xticks(range(len(names)), names, rotation=20 if len(names) > 6 else 0)
    _set_title(figure, title)
    panel.grid(axis='y', alpha=0.3)
    panel.set_axisbelow(True)
    panel.legend(loc='center left', bbox_to_anchor=(1.01, 0.5))
    return save_figure(figure, path)


def plot_gallery(rows: Mapping[str, Tensor], path: Path, title: str) -> Path:
    """Rows of images: name -> (K, 3, 32, 32) float in [0, 1]."""
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.0 * columns + 2, 1.05 * len(rows) + 0.6), layout='constrained')
    _set_title(figure, title)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha='right', va='center')
    return save_figure(figure, path)


def _set_title(figure: Figure, title: str) -> None:
    """The title, its lines broken where they would not fit."""
    width = int(11.5 * figure.get_figwidth())  # about 11.5 characters fit into an inch
    figure.suptitle('\n'.join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=11)


def _colors(count: int) -> list:
    """As many colours as are needed, as different as can be."""
    return list(colormaps['tab10'].colors[:count] if count <= 10
                else colormaps['viridis'](np.linspace(0, 0.95, count)))
