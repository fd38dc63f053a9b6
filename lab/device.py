"""The device that a run trains on, and the precision that is fastest there."""
import ctypes
import platform
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

MEMORY_TO_SEARCH = 20e9  # bytes of a GPU's memory, from which on cuDNN searches: what it tries out takes gigabytes

# --- the device -----------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """'auto' (a GPU with CUDA if it works, else the CPU) or a torch device, tried out with a small convolution.

    A GPU that 'auto' finds but cannot use is printed in one line. Also has cuDNN search for the fastest algorithms,
    where there is memory for it, or, on a CPU, freed memory kept. Raises ValueError for a named device that does not
    work.
    """
    wanted = name
    if name == 'auto':
        wanted = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(wanted)
    except RuntimeError as error:  # whose message is a list of twenty kinds of device
        raise ValueError(f"device must be 'auto' or a torch device available on this machine, got {name!r}: "
                         f'try --device cpu') from error
    try:
        _try_convolution(device)
    except Exception as error:  # every kind of device raises something else where it is missing, too old or full
        if name != 'auto' or device.type == 'cpu':
            raise ValueError(f'device must be one that works on this machine, but {name!r} does not '
                             f'({first_sentence(error)}): try --device cpu') from error
        print(f'The GPU cannot be used ({first_sentence(error)}): using the CPU instead.')
        device = torch.device('cpu')
    if device.type == 'cuda':
        # Every step has the same shapes: worth a search, unless it would take the memory that training needs.
        torch.backends.cudnn.benchmark = torch.cuda.get_device_properties(device).total_memory >= MEMORY_TO_SEARCH
    if device.type == 'cpu':
        keep_freed_memory()
    return torch.device('cpu') if device.type == 'cpu' else device  # tensors saved on cpu:1 could not be loaded


def _try_convolution(device: torch.device) -> None:
    """Forward and backward, raising what torch does: memory can be had even on a GPU that torch has no code for."""
    weight = torch.ones(8, 3, 3, 3, device=device, requires_grad=True)
    F.conv2d(torch.ones(2, 3, 8, 8, device=device), weight, padding=1).sum().backward()
    weight.grad.sum().item()  # waits for the device, so that what fails there is raised here


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
    count = torch.get_num_threads()
    return f'{name}, {count} thread{"" if count == 1 else "s"}' if device.type == 'cpu' else f'{device.type} ({name})'


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


# --- precision ------------------------------------------------------------------------------------------------


def pick_precision(name: str, device: torch.device, why: str = 'as asked') -> tuple[str, str]:
    """'auto', 'fp32' or 'bf16' -> ('fp32' or 'bf16', the reason, for people). why: one that is named is wanted."""
    if device.type == 'cuda':
        with torch.cuda.device(device):
            ampere = torch.cuda.is_bf16_supported(including_emulation=False)  # or newer
        if name == 'auto':
            return ('bf16', 'native on this GPU') if ampere else ('fp32', 'this GPU has no native bf16')
        if name == 'bf16' and not ampere:
            return name, f'{why}, but this GPU is older than Ampere and only emulates it: fp32 is much faster'
        if name == 'fp32' and ampere and torch.backends.cudnn.allow_tf32:
            return name, f'{why}; convolutions round their inputs to TF32'
    if name == 'fp32' or name == 'bf16' and device.type != 'cpu':
        return name, why
    if device.type != 'cpu':
        return 'fp32', f'bf16 is untested on {device.type}'
    is_better, finding = _judge_bf16()
    if name == 'bf16':
        return name, why if is_better else f'{why}, but {finding}'
    return ('bf16' if is_better else 'fp32'), finding


def _judge_bf16() -> tuple[bool, str]:
    """(whether bf16 is right and clearly faster on this CPU, what was found, for people)."""
    try:
        error, faster = _try_bf16()
    except Exception as failure:  # each way of not having bf16 raises something else
        return False, f'bf16 does not work on this CPU: {first_sentence(failure)}'
    if not error <= 0.05:  # NaN is an error, too
        return False, f'bf16 is wrong by {error:.0%} on this CPU'
    return faster > 1.25, f'bf16 runs at {faster:.1f} times the speed of fp32 on this CPU'


def _try_bf16() -> tuple[float, float]:
    """A convolution of the ConvNet forward and backward: (relative error of bf16, its speed over that of fp32).

    Counts the processor time of one thread, which other programs hardly change, and takes about 0.2 s of it; less
    than a second where bf16 is emulated.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 128, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    weight = (torch.randn(512, 128, 3, 3, generator=generator) / 34).to(memory_format=torch.channels_last)
    weight.requires_grad_()
    rounds = []  # (seconds of fp32, seconds of bf16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while sum(map(sum, rounds)) < 0.2:
            # A small one first: to get ready, and because emulated bf16 may be twenty times slower than fp32.
            batch = images if rounds else images[:1]
            gradients, seconds = zip(*(_timed_step(batch, weight, name) for name in ('fp32', 'bf16')), strict=True)
            rounds.append(seconds)
    finally:
        torch.set_num_threads(threads)
    exact, rounded = gradients
    fp32, bf16 = map(sum, zip(*(rounds[1:] or rounds), strict=True))
    return ((rounded - exact).norm() / exact.norm()).item(), fp32 / bf16


def _timed_step(images: Tensor, weight: Tensor, precision: str) -> tuple[Tensor, float]:
    """The gradient of a convolution's weight, and the processor time that it took, in seconds."""
    start = time.thread_time()
    with autocast(images.device, precision):
        loss = F.conv2d(images, weight, padding=1).float().square().mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient, time.thread_time() - start


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes: bf16 autocast, or nothing. No cache of cast weights: each is used once."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16', cache_enabled=False)


# --- errors of devices ----------------------------------------------------------------------------------------

OUT_OF_MEMORY = re.compile(r'allocate memory|out of memory|not enough memory|ALLOC(ATION)?_FAILED')
GPU_FAILED = re.compile(r'CUDA error: (?!device-side assert)')
NO_ENGINE = re.compile(r'unable to find an engine|unable to find a valid cuDNN algorithm', re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was, or may have been, what an error or one behind it was about."""
    return any(_is_about_memory(link) or NO_ENGINE.search(str(link)) for link in _chain(error))


def memory_advice(error: BaseException) -> str:
    """What to do about an error for which `is_out_of_memory` holds: one sentence."""
    if any(_is_about_memory(link) for link in _chain(error)):
        return 'out of memory: lower the constant batch_size (for example to half), or close other programs'
    return ('cuDNN found no way to compute a layer: either memory is short (lower the constant batch_size, for example '
            'to half), or this torch does not fit the GPU (try --precision fp32 or --device cpu)')


def gpu_failure(error: BaseException) -> str:
    """'CUDA error: unspecified launch failure' where that is what an error is or one behind it; '' for any other.

    A failed assertion of a kernel is none: the GPU works, and the program is wrong.
    """
    return next((first_sentence(link) for link in _chain(error) if GPU_FAILED.match(str(link))), '')


def _is_about_memory(error: BaseException) -> bool:
    """In the words of the CPU, of CUDA, cuBLAS and cuDNN."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those behind it: leaving a CUDA graph hides the real one behind its own."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def first_sentence(error: BaseException) -> str:
    """The first sentence of its message (torch's run to pages), or its kind where it has none."""
    return re.split(r'\. |\n', str(error).strip())[0] or type(error).__name__
