#!/usr/bin/env python3
"""Images trained on per second: this project beside the script that one would otherwise write.

    python benchmarks/training_speed.py                       # random images: the speed does not depend on them
    python benchmarks/training_speed.py --data cifar10
    python benchmarks/training_speed.py --table benchmarks/results/X.json    # print the table of an earlier run

Everything is measured in one process and in turns, so that whatever else the machine does touches all alike.
benchmarks/README.md says what is compared, and what was tried.
"""
import io
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules

import torch
import torchvision
import tyro

import ex3_convnet
import ex3_pretrained
from benchmarks.tables import PROJECT, USUAL, WAYS, WITH_WORKERS, plot, table
from benchmarks.usual_script import Way, training_flops, usual
from datasets import cifar10
from datasets.batches import Split
from lab.constants import slug
from lab.device import describe_device, pick_device, pick_precision
from lab.errors import ends_in_a_sentence
from lab.files import write_atomically
from lab.progress import duration
from optimizers import make_optimizer
from training import decay, fit, seed_everything

STEPS = {'cpu': 3, 'cuda': 245}  # of one repetition; 245 are an epoch of 49,000 images
REPETITIONS = 7
WORKERS = (2, 4, 8)  # of which the fastest is shown
MATRIX_SIDE = {'cpu': 2048, 'cuda': 8192}
COPY_LENGTH = 2 ** 26  # floats, more than any cache holds
STATUS = Path('/proc/self/status')


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


# --- this project -------------------------------------------------------------------------------------------


def project(script: ModuleType, config: Any, data: cifar10.Data, device: torch.device) -> Way:
    """`fit` itself, timed by its own clock: what history.csv says of an epoch, without its validation."""
    data, features = data.to(device), None
    model = script.make_model(config, device)
    if getattr(config, 'mode', '') == 'frozen':
        batches, evaluation, seconds = script.make_feature_batches(config, data)
        features = {'images': 2 * len(data.train), 'seconds': seconds}
    else:
        batches, evaluation = script.make_batches(config, data)
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, config.reg, precision=config.precision)

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            history = fit(model, batches, evaluation['val'], optimizer,
                          decay(config.learning_rate, config.learning_rate_decay), Path(folder), seed=0,
                          num_epochs=2 if device.type == 'cuda' else 1,  # the first one captures the graph
                          precision=config.precision)
        return history['images_per_second'][-1]

    inputs = batches.inputs(batches.split.images[:2])
    return Way(run, training_flops(model.train(), inputs), features)


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


def measure_ceiling(device: torch.device, precision: str) -> dict[str, float]:
    """What the machine does at best: a large matrix product, FLOP/s in 'fp32' and `precision`; a large 'copy', bytes/s.

    No other precision: emulated bf16 would take longer than all the rest. On CUDA the fp32 product may round its inputs
    to TF32, as PyTorch's convolutions do by default.
    """
    side = MATRIX_SIDE.get(device.type, MATRIX_SIDE['cpu'])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    ceiling = {}
    for name in dict.fromkeys(['fp32', precision]):
        dtype = torch.bfloat16 if name == 'bf16' else torch.float32
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        ceiling[name] = 2 * side ** 3 / seconds_per_call(lambda m=matrix: m @ m, device)
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
        parts = {part: Split(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator),
                                     torch.randint(10, (n,), generator=generator))
                 for part, n in (('train', count), ('val', others), ('test', others))}
        return cifar10.Data('random images', tuple('0123456789'), **parts, content='random')
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
        before = torch.cuda.memory_reserved(device) if device.type == 'cuda' else 0
        seed_everything(0)
        ways[way] = make(case.script, config, data, device)
        ways[way].run()  # warm-up; cuDNN's search takes memory that training does not need
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
            ways[way].run()
            memory[way] = torch.cuda.max_memory_reserved(device) - before  # the graph's pool included
    workers, ways[WITH_WORKERS] = fastest_workers(lambda count: usual(case.script, config, data, device, count))
    speeds, ceilings = {way: [] for way in WAYS}, []
    for _ in range(options.repetitions):
        ceilings.append(measure_ceiling(device, precision))
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


@ends_in_a_sentence
def main(argv: Sequence[str] = ()) -> int:
    """Measure, print the table, write JSON and plot; returns the exit status."""
    options = tyro.cli(Options, args=list(argv), prog='benchmarks/training_speed.py')
    if options.table:
        try:
            print(table(json.loads(options.table.read_text())))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{options.table} is not a JSON file that this script wrote') from error
        return 0
    if not options.cases or not {*options.cases} <= {*CASES}:
        raise ValueError(f'cases must be of {"; ".join(CASES)}; got {"; ".join(options.cases) or "none"}')
    if min(options.repetitions, 1 if options.steps is None else options.steps, options.batch_size - 1) < 1:
        raise ValueError(f'repetitions and steps must be at least 1 and batch_size at least 2, got '
                         f'{options.repetitions}, {options.steps} and {options.batch_size}')
    device = pick_device(options.device)
    precision, reason = pick_precision(options.precision, device)
    data = load_data(options, options.steps or STEPS.get(device.type, STEPS['cpu']))
    batch_size = min(options.batch_size, len(data.train))  # of data with fewer images than were asked for
    record = {'device': describe_device(device), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
              'source': data.source, 'precision': precision, 'reason': reason,
              'fp32': 'fp32' if device.type == 'cpu' else 'fp32 (TF32 allowed)', 'batch_size': batch_size,
              'steps': len(data.train) // batch_size, 'repetitions': options.repetitions,
              'epoch_images': ex3_convnet.Config().num_training, 'cases': {}}
    path = options.results / f'{slug(record["device"])}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            start = time.perf_counter()
            record['cases'][name] = measure(name, options, data, device, precision, Path(folder))
            write_atomically(path, json.dumps(record, indent=1) + '\n')  # an interruption loses one case
            print(f'{name}: measured in {duration(time.perf_counter() - start)}', file=sys.stderr)
    print(table(record))
    print(f'\n{path}\n{plot(record, path.with_suffix(".png"))}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
