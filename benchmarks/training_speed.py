#!/usr/bin/env python3
"""Images trained on per second: this project beside the script that one would otherwise write.

    python benchmarks/training_speed.py                       # random images: the speed does not depend on them
    python benchmarks/training_speed.py --data cifar10
    python benchmarks/training_speed.py --table benchmarks/results/X.json    # print the table of an earlier run

Everything is measured in one process and in turns, so that whatever else the machine does touches all alike.
benchmarks/README.md says what is compared, and what was tried.
"""
import ctypes
import io
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch
import torchvision
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import ex3_convnet
import ex3_pretrained
from datasets import cifar10
from experiment import markdown_table, slug
from training import decay, duration, fit, make_optimizer, seed_everything
from utils import describe_device, pick_device, pick_precision, save_figure, write_atomically

STEPS = {'cpu': 3, 'cuda': 245}  # of one repetition; 245 are an epoch of 49,000 images
REPETITIONS = 7
WORKERS = (2, 4, 8)  # of which the fastest is shown
MATRIX_SIDE = {'cpu': 2048, 'cuda': 8192}
COPY_LENGTH = 2 ** 26  # floats, more than any cache holds
STATUS = Path('/proc/self/status')
WAYS = USUAL, WITH_WORKERS, PROJECT = 'usual script', 'usual script, with workers', 'this project'


class Case(NamedTuple):
    """What is trained: the constants of a script that differ from its defaults."""
    script: ModuleType
    constants: dict[str, Any]


CASES = {
    'ConvNet': Case(ex3_convnet, {}),
    'ConvNet, batch norm': Case(ex3_convnet, dict(norm_layer='BN')),
    'ConvNet, batch norm, flip + crop + jitter': Case(
        ex3_convnet, dict(norm_layer='BN') | ex3_convnet.FLIP | ex3_convnet.CROP | ex3_convnet.JITTER),
    'VGG11_bn, frozen': Case(ex3_pretrained, dict(mode='frozen')),
    'VGG11_bn, fine-tuned': Case(ex3_pretrained, dict(mode='fine-tuned')),
}


@dataclass(frozen=True)
class Options:
    """Measure the speed of training, and of the machine."""
    data: str | None = None  # 'auto', 'cifar10', 'shapes' or an image folder, as in the scripts; None: random images
    cases: tuple[str, ...] = tuple(CASES)  # what to measure
    repetitions: int = REPETITIONS
    steps: int | None = None  # of one repetition; None: see STEPS
    batch_size: int = 200
    memory: bool = True  # measure peak memory, too; on the CPU in a process of its own for each way
    device: str = 'auto'
    precision: Literal['auto', 'fp32', 'bf16'] = 'auto'  # of this project; the usual script is fp32
    results: Path = Path(__file__).parent / 'results'
    table: Path | None = None  # print the table of this JSON file and measure nothing


class Way(NamedTuple):
    """One way to train a network."""
    run: Callable[[], float]  # train on every image once -> images per second
    flops: float  # of a training step, for each image
    features: dict[str, float] | None = None  # made once, before training: their 'images' and 'seconds'


# --- the usual script ---------------------------------------------------------------------------------------


class PilImages(Dataset):
    """Images as torchvision's CIFAR10 gives them: one by one, through PIL and the transforms."""

    def __init__(self, split: cifar10.Split, transform: Callable):
        self.images, self.labels = split.images.permute(0, 2, 3, 1).cpu().numpy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def usual_transform(config: Any, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """torchvision's counterparts of the augmentations that `config` switches on."""
    steps = []
    if config.crop_padding:
        steps.append(transforms.RandomCrop(32, config.crop_padding))
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip(config.flip))
    if getattr(config, 'hue', 0):
        steps.append(transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def usual(script: ModuleType, config: Any, data: cifar10.Data, device: torch.device, workers: int = 0) -> Way:
    """The loop of the handout: fp32 as PyTorch's defaults have it, and the loss read at every step."""
    mean, std = ((0.5,) * 3, (0.5,) * 3) if script is ex3_convnet else (
        ex3_pretrained.IMAGENET_MEAN, ex3_pretrained.IMAGENET_STD)
    # Workers stay from epoch to epoch, so that starting them is not measured; an epoch begins with empty queues.
    loader = DataLoader(PilImages(data.train, usual_transform(config, mean, std)), config.batch_size, shuffle=True,
                        drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    model = script.make_model(config, device).to(memory_format=torch.contiguous_format).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate,
                                 weight_decay=config.reg)

    def run() -> float:
        torch.backends.cudnn.benchmark = False  # both as they are by default, not as the project has them
        give_back_freed_memory()
        start = time.perf_counter()
        total_loss, correct = 0.0, 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
        seconds = time.perf_counter() - start
        pick_device(str(device))  # as the project has them again
        return len(loader) * config.batch_size / seconds

    return Way(run, training_flops(model, torch.randn(2, 3, 32, 32, device=device)))


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: the limits at which glibc arrives by itself."""
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1  # of glibc's malloc.h
    with suppress(AttributeError, OSError, TypeError):  # macOS and musl; Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 2**16)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)
        libc.malloc_trim(0)


# --- this project -------------------------------------------------------------------------------------------


def project(script: ModuleType, config: Any, data: cifar10.Data, device: torch.device) -> Way:
    """`fit` itself, timed by its own clock: what history.csv says of an epoch, without its validation."""
    task = script.build(config, data.to(device))
    optimizer = make_optimizer(config.optimizer, task.groups, config.learning_rate, config.reg)

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            history = fit(task.model, task.train, task.evaluation['val'], optimizer,
                          decay(config.learning_rate, config.learning_rate_decay), seed=0, folder=Path(folder),
                          num_epochs=2 if device.type == 'cuda' else 1,  # the first one captures the graph
                          precision=config.precision)
        return history['images_per_second'][-1]

    inputs, _ = task.train.batch(torch.arange(2, device=device))
    features = None
    if task.seconds:
        features = {'images': 2 * len(data.train), 'seconds': task.seconds}
    return Way(run, training_flops(task.model.train(), inputs), features)


def training_flops(model: nn.Module, inputs: Tensor) -> float:
    """Floating point operations of a training step for each of `inputs`: two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() / len(inputs)


# --- the machine --------------------------------------------------------------------------------------------


def seconds_per_call(function: Callable, device: torch.device, at_least: float = 0.3) -> float:
    """Of a function that is called until `at_least` seconds have passed."""
    calls, seconds = 1, 0.0
    function()  # warm-up
    while seconds < at_least:
        calls *= 2
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds / calls


def measure_ceiling(device: torch.device) -> dict[str, float]:
    """What the machine does at best: a large matrix product, FLOP/s in 'fp32' and 'bf16'; a large 'copy', bytes/s.

    On CUDA the fp32 product may round its inputs to TF32, as PyTorch's convolutions do by default.
    """
    side = MATRIX_SIDE.get(device.type, MATRIX_SIDE['cpu'])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    ceiling = {}
    for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        ceiling[precision] = 2 * side ** 3 / seconds_per_call(lambda m=matrix: m @ m, device)
    torch.set_float32_matmul_precision(before)
    source = torch.ones(COPY_LENGTH, device=device)
    target = torch.empty_like(source)
    ceiling['copy'] = 2 * source.nbytes / seconds_per_call(lambda: target.copy_(source), device)  # read and written
    return ceiling


# --- measuring ----------------------------------------------------------------------------------------------


def load_data(options: Options, steps: int) -> cifar10.Data:
    """As many training images as the steps of one repetition take, and a batch of others; on the CPU."""
    count, others = steps * options.batch_size, options.batch_size
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        parts = {part: cifar10.Split(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator),
                                     torch.randint(10, (n,), generator=generator))
                 for part, n in (('train', count), ('val', others), ('test', others))}
        return cifar10.Data('random', 'random images', tuple('0123456789'), **parts)
    constants = ex3_convnet.Config()
    data = cifar10.load(options.data, constants.data_root, constants.num_training, constants.num_validation)
    return replace(data, train=data.train[:count], val=data.val[:others], test=data.test[:others])


def configure(case: Case, options: Options, data: cifar10.Data, precision: str, folder: Path) -> Any:
    """The script's constants. VGG starts from random weights: its speed does not depend on them."""
    config = case.script.Config(batch_size=min(options.batch_size, len(data.train)), num_classes=len(data.classes),
                                precision=precision, **case.constants)
    if case.script is ex3_pretrained:
        path = folder / 'vgg.pth'
        if not path.exists():
            features = ex3_pretrained.VggModel(10, fine_tune=True, pretrained=False).features
            torch.save({f'features.{key}': tensor for key, tensor in features.state_dict().items()}, path)
        config = replace(config, weights=str(path))
    return config


def measure(name: str, options: Options, data: cifar10.Data, device: torch.device, precision: str,
            folder: Path) -> dict:
    """One case: the ways in turns, and the machine's ceiling between them; as numbers, for JSON."""
    case = CASES[name]
    config = configure(case, options, data, precision, folder)
    ways, memory = {}, {}
    for way, make in ((USUAL, usual), (PROJECT, project)):
        before = torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0
        seed_everything(0)
        ways[way] = make(case.script, config, data, device)
        ways[way].run()  # warm-up; cuDNN's search takes memory that training does not need
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
            ways[way].run()
            memory[way] = torch.cuda.max_memory_allocated(device) - before
    workers, ways[WITH_WORKERS] = fastest_workers(lambda count: usual(case.script, config, data, device, count))
    speeds, ceilings = {way: [] for way in WAYS}, []
    for _ in range(options.repetitions):
        ceilings.append(measure_ceiling(device))
        for way in WAYS:
            speeds[way].append(ways[way].run())
    if device.type == 'cpu' and options.memory and STATUS.exists():
        for way in (USUAL, PROJECT):
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as fresh:
                memory[way] = fresh.submit(growth, name, way, options, precision, folder).result()
    return {'ways': {way: {'images_per_second': speeds[way], 'flops_per_image': ways[way].flops,
                           'precision': precision if way == PROJECT else 'fp32', 'peak_memory': memory.get(way),
                           'workers': workers if way == WITH_WORKERS else 0} for way in WAYS},
            'ceiling': {key: [ceiling[key] for ceiling in ceilings] for key in ceilings[0]},
            'features': ways[PROJECT].features}


def fastest_workers(make: Callable[[int], Way]) -> tuple[int, Way]:
    """How many workers serve the usual script best, and that script with them."""
    tried = []
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'This DataLoader will create')  # more than there are cores: they are tried
        for count in WORKERS:
            way = make(count)
            way.run()  # starts them
            tried.append((way.run(), count, way))
    _, count, way = max(tried, key=lambda one: one[0])
    return count, way


def growth(name: str, way: str, options: Options, precision: str, folder: Path) -> int:
    """For a fresh process: bytes by which its peak grows when it makes a way and trains twice on every image."""
    data = load_data(options, options.steps or STEPS['cpu'])
    config = configure(CASES[name], options, data, precision, folder)
    before = peak_resident_memory()
    made = (usual if way == USUAL else project)(CASES[name].script, config, data, pick_device('cpu'))
    made.run()
    made.run()
    return peak_resident_memory() - before


def peak_resident_memory() -> int:
    """Bytes, of this process since it began; Linux only."""
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith('VmHWM'))


# --- showing ------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str) -> str:
    """'63.1 (62.0–64.2)': the median, the smallest and the largest."""
    if len(values) == 1:
        return format(values[0], form)
    return f'{median(values):{form}} ({min(values):{form}}–{max(values):{form}})'


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Within each repetition: what changes from one to the next cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def utilisation(case: dict, way: str) -> float:
    """Model FLOP utilisation: the FLOP/s of a way over those of a matrix product in the same precision."""
    one = case['ways'][way]
    return one['flops_per_image'] * median(ratios(one['images_per_second'], case['ceiling'][one['precision']]))


def table(record: dict) -> str:
    """The results as Markdown: the speeds, what limits them, the conditions."""
    speeds = [['images per second', USUAL, 'with workers', PROJECT, 'ratio', 'ratio to workers']]
    limits = [['', 'FLOP an image', 'of the ceiling: usual', 'project', 'epoch: usual', 'project', 'at the ceiling',
               'peak memory: usual', 'project']]
    notes = []
    for name, case in record['cases'].items():
        plain, workers, ours = (case['ways'][way] for way in WAYS)
        epoch = {way: record['epoch_images'] / median(one['images_per_second']) for way, one in case['ways'].items()}
        speeds.append([
            name, spread(plain['images_per_second'], ',.0f'),
            f'{spread(workers["images_per_second"], ",.0f")}, {workers["workers"]} workers',
            f'**{spread(ours["images_per_second"], ",.0f")}**',
            *(f'**{spread(ratios(ours["images_per_second"], other["images_per_second"]), ".2f")}**'
              for other in (plain, workers))])
        limits.append([
            name, f'{ours["flops_per_image"]:.3g}', *(f'{utilisation(case, way):.1%}' for way in (USUAL, PROJECT)),
            *(f'{seconds:,.1f} s' for seconds in (epoch[USUAL], epoch[PROJECT],
                                                  epoch[PROJECT] * utilisation(case, PROJECT))),
            *('–' if one['peak_memory'] is None else f'{one["peak_memory"] / 1e6:,.0f} MB' for one in (plain, ours))])
        if features := case['features']:
            rate = features['images'] / features['seconds']
            once = (2 * record['epoch_images'] + 11_000) / rate
            notes.append(
                f'- {name}: the project trains on features that are made once, {rate:,.0f} images/s. For the training '
                f'images, their mirror images, 1,000 validation and 10,000 test images that is {duration(once)}; '
                f'30 epochs and the features are {duration(once + 30 * epoch[PROJECT])}, 30 epochs of the usual '
                f'script {duration(30 * epoch[USUAL])}.')
    ceiling = {key: spread([value / 1e9 for case in record['cases'].values() for value in case['ceiling'][key]], ',.0f')
               for key in ('fp32', 'bf16', 'copy')}
    return '\n'.join([
        markdown_table(speeds), '', markdown_table(limits), '',
        f'Median (smallest–largest) of {record["repetitions"]} repetitions of {record["steps"]} steps of '
        f'{record["batch_size"]} images, in turns; ratios within each turn; an epoch is {record["epoch_images"]:,} '
        f'images.', '',
        f'- {record["device"]}; torch {record["torch"]}, torchvision {record["torchvision"]}; {record["source"]}; '
        f'the project in {record["precision"]} ({record["reason"]}).',
        f'- Ceiling: a matrix product does {ceiling["fp32"]} GFLOP/s in {record["fp32"]} and {ceiling["bf16"]} in '
        f'bf16; a copy moves {ceiling["copy"]} GB/s.', *notes])


def plot(record: dict, path: Path) -> Path:
    """Bars of images per second, a panel for each case, since their speeds differ by orders of magnitude."""
    cases = record['cases']
    figure = Figure(figsize=(9, 0.9 + 1.15 * len(cases)), layout='constrained')
    figure.suptitle(f'Images trained on per second · {record["device"]}', fontsize=12)
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for panel, (name, case) in zip(panels, cases.items(), strict=True):
        speeds = [case['ways'][way]['images_per_second'] for way in WAYS]
        middle = [median(values) for values in speeds]
        reach = [[m - min(v) for m, v in zip(middle, speeds, strict=True)],
                 [max(v) - m for m, v in zip(middle, speeds, strict=True)]]
        panel.barh(WAYS, middle, xerr=reach, color=['#b8b8b8', '#8c8c8c', 'tab:blue'], height=0.75, capsize=3)
        for row, (way, speed) in enumerate(zip(WAYS, middle, strict=True)):
            text = f'{speed:,.0f}' + (f'   ({median(ratios(speeds[row], speeds[0])):.1f}x)' if row else '')
            panel.annotate(text, (max(speeds[row]), row), xytext=(6, 0), textcoords='offset points', va='center',
                           fontweight='bold' if way == PROJECT else None)
        panel.set_title(name + (', on features made once' if case['features'] else ''), loc='left', fontsize=11)
        panel.set(xlim=(0, 1.25 * max(map(max, speeds))), xticks=[])
        panel.invert_yaxis()
        panel.spines[['top', 'right', 'bottom']].set_visible(False)
    return save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON and plot; returns the exit status."""
    options = tyro.cli(Options, args=argv, prog='benchmarks/training_speed.py')
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    try:
        if unknown := [name for name in options.cases if name not in CASES]:
            raise ValueError(f'cases must be of {"; ".join(CASES)}; got {unknown[0]!r}')
        device = pick_device(options.device)
        precision, reason = pick_precision(options.precision, device)
        steps = options.steps or STEPS.get(device.type, STEPS['cpu'])
        data = load_data(options, steps)
    except ValueError as error:
        print(f'training_speed: error: {error}', file=sys.stderr)
        return 2
    record = {'device': describe_device(device), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
              'source': data.source, 'precision': precision, 'reason': reason,
              'fp32': 'fp32' if device.type == 'cpu' else 'fp32 (TF32 allowed)', 'batch_size': options.batch_size,
              'steps': steps, 'repetitions': options.repetitions, 'epoch_images': ex3_convnet.Config().num_training,
              'cases': {}}
    path = options.results / f'{slug(record["device"])}.json'
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            start = time.perf_counter()
            record['cases'][name] = measure(name, options, data, device, precision, Path(folder))
            print(f'{name}: measured in {duration(time.perf_counter() - start)}', file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + '\n')
    print(table(record))
    print(f'\n{path}\n{plot(record, path.with_suffix(".png"))}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
