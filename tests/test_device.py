"""The device and its precision, with GPUs played by the tests where there are none."""
import platform
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lab import device as device_module
from lab.device import first_sentence, is_out_of_memory, memory_advice, pick_device, pick_precision

CPU, GPU = torch.device('cpu'), torch.device('cuda')
NO_KERNEL = 'CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ...'


# --- the device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['tpu', 'meta', 'cuda:99', '', 'cpu:x'])
def test_a_device_that_does_not_work_here_is_refused_in_one_short_sentence(name):
    with pytest.raises(ValueError, match='device must be .*--device cpu') as error:
        pick_device(name)
    assert repr(name) in str(error.value) and len(str(error.value)) < 250 and '\n' not in str(error.value)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which `gpu.convolution`, given the device, tells whether the trial works."""
    tried = SimpleNamespace(devices=[], convolution=lambda device: None)

    def convolution(device):
        tried.devices.append(device)
        tried.convolution(device)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(device_module, '_try_convolution', convolution)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    return tried


def test_auto_takes_a_gpu_that_works_and_has_cudnn_search(gpu, capsys):
    assert pick_device('auto') == GPU
    assert gpu.devices == [GPU] and torch.backends.cudnn.benchmark and capsys.readouterr().out == ''


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert pick_device('auto') == CPU and capsys.readouterr().out == ''


@pytest.mark.parametrize('error', [RuntimeError(NO_KERNEL), torch.OutOfMemoryError('CUDA out of memory. Tried ...')])
def test_auto_says_in_one_line_why_it_takes_the_cpu_instead_of_a_gpu(gpu, capsys, error):
    def fail(device):
        raise error
    gpu.convolution = fail
    assert pick_device('auto') == CPU
    output = capsys.readouterr().out
    assert output == f'The GPU cannot be used ({first_sentence(error)}): using the CPU instead.\n'
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize('name', ['cuda', 'cuda:1'])
def test_a_named_gpu_that_does_not_work_is_refused_with_the_remedy(gpu, name):
    def fail(device):
        raise RuntimeError(NO_KERNEL)
    gpu.convolution = fail
    with pytest.raises(ValueError, match=f"'{name}'.*no kernel image.*--device cpu") as error:
        pick_device(name)
    assert '\n' not in str(error.value)


def test_a_device_is_tried_forward_and_backward(monkeypatch):
    passes = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(context, images, weight):
            passes.append('forward')
            context.save_for_backward(weight)
            return images.new_ones(1)

        @staticmethod
        def backward(context, gradient):
            passes.append('backward')
            return None, torch.ones_like(*context.saved_tensors)
    monkeypatch.setattr(F, 'conv2d', lambda images, weight, **_: Probe.apply(images, weight))
    pick_device('cpu')
    assert passes == ['forward', 'backward']


def test_tensors_of_a_numbered_cpu_are_saved_as_of_the_cpu():
    assert pick_device('cpu:1') == CPU


KEPT = """
import ctypes, torch
from lab.device import pick_device

def give_back_freed_memory():  # as glibc does unless told otherwise
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)
    libc.mallopt(-1, 128 * 1024)

def resident():
    return next(1024 * int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS'))

for choose in (give_back_freed_memory, lambda: pick_device('cpu'), give_back_freed_memory):
    choose()
    before = resident()
    torch.ones(2**26)  # 256 MB, used and freed
    print((resident() - before) >> 20)
"""


def test_freed_memory_is_kept_on_a_cpu():
    if 'glibc' not in platform.libc_ver() or not Path('/proc/self/status').exists():
        pytest.skip('only glibc can be told to keep freed memory')
    done = subprocess.run([sys.executable, '-c', KEPT], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parent.parent)  # a process of its own, with a heap of its own
    assert done.returncode == 0, done.stderr
    first, kept, last = map(int, done.stdout.split())
    assert kept > 200 and max(first, last) < 50


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error, faster, expected', [
    (0.003, 3.0, 'bf16'), (0.003, 1.1, 'fp32'), (0.5, 3.0, 'fp32'), (float('nan'), 3.0, 'fp32')],
    ids=['right and faster', 'hardly faster', 'wrong', 'not a number'])
def test_on_a_cpu_bf16_is_chosen_only_where_it_is_right_and_faster(monkeypatch, error, faster, expected):
    monkeypatch.setattr(device_module, '_try_bf16', lambda: (error, faster))
    precision, reason = pick_precision('auto', CPU)
    assert precision == expected and ('3.0' in reason or '1.1' in reason or 'wrong' in reason)
    assert pick_precision('bf16', CPU) == ('bf16', 'as asked')


def test_a_cpu_on_which_bf16_convolutions_fail_trains_in_fp32(monkeypatch):
    convolution = F.conv2d

    def fail(images, weight, **options):
        if torch.is_autocast_enabled('cpu'):
            raise RuntimeError('could not create a primitive descriptor. And more.')
        return convolution(images, weight, **options)
    monkeypatch.setattr(F, 'conv2d', fail)
    threads = torch.get_num_threads()
    precision, reason = pick_precision('auto', CPU)
    assert precision == 'fp32' and 'could not create a primitive descriptor' in reason and 'more' not in reason
    assert torch.get_num_threads() == threads


def test_the_trial_of_bf16_measures_a_small_error_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    error, faster = device_module._try_bf16()
    assert 1e-4 < error < 0.05 and faster > 0  # bf16 has 8 bits: not exact, not wrong
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize('native, expected', [(True, 2.5), (False, 0.05)])
def test_the_trial_gives_the_ratio_of_both_speeds_and_stops_early_where_bf16_crawls(monkeypatch, native, expected):
    spent = []

    def step(images, weight, precision):
        seconds = 0.05 * len(images) / 4 / (expected if precision == 'bf16' else 1)
        seconds += 0 if len(spent) >= 2 or not native else 0.02  # getting ready, which must not count
        spent.append(seconds)
        return torch.ones(3), seconds
    monkeypatch.setattr(device_module, '_timed_step', step)
    assert device_module._try_bf16() == (0, pytest.approx(expected))
    assert 0.2 < sum(spent) < 0.5


def test_the_trial_counts_the_processors_time_and_not_that_of_other_programs(monkeypatch):
    convolution = F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda *args, **options: time.sleep(0.3) or convolution(*args, **options))
    _, seconds = device_module._timed_step(torch.ones(1, 3, 8, 8), torch.ones(8, 3, 3, 3, requires_grad=True), 'fp32')
    assert seconds < 0.2


@pytest.mark.parametrize('name, ampere, tf32, expected, words', [
    ('auto', True, True, 'bf16', 'native'), ('auto', False, True, 'fp32', 'no native bf16'),
    ('bf16', True, True, 'bf16', 'as asked'), ('bf16', False, True, 'bf16', 'older than Ampere.*fp32 is much faster'),
    ('fp32', True, True, 'fp32', 'TF32'), ('fp32', True, False, 'fp32', '^as asked$'),
    ('fp32', False, True, 'fp32', '^as asked$')])
def test_on_a_gpu_the_reason_names_what_a_precision_means_there(monkeypatch, name, ampere, tf32, expected, words):
    monkeypatch.setattr(torch.cuda, 'device', lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: ampere or including_emulation)
    monkeypatch.setattr(torch.backends, 'cudnn', SimpleNamespace(allow_tf32=tf32))
    precision, reason = pick_precision(name, GPU)
    assert precision == expected
    assert re.search(words, reason)


def test_other_devices_train_in_fp32():
    assert pick_precision('auto', torch.device('mps'))[0] == 'fp32'


# --- errors of devices --------------------------------------------------------------------------------------


def linked(error, cause=None, context=None, hidden=False):
    error.__cause__, error.__context__, error.__suppress_context__ = cause, context, hidden or cause is not None
    return error


MEMORY = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.')


@pytest.mark.parametrize('error', [
    MEMORY, MemoryError(), RuntimeError('[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can\'t allocate memory'),
    RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)'),
    RuntimeError('cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'),
    linked(RuntimeError('CUDA error: operation failed due to a previous error during capture'), context=MEMORY),
    linked(RuntimeError('training failed'), cause=linked(RuntimeError('capture'), context=MEMORY))],
    ids=lambda error: str(error)[:30])
def test_errors_about_memory_are_recognised_also_behind_others(error):
    assert is_out_of_memory(error)
    assert memory_advice(error) == ('out of memory: lower the constant batch_size (for example to half), or close '
                                    'other programs')


@pytest.mark.parametrize('error', [
    RuntimeError(NO_KERNEL), ValueError('memory'), linked(RuntimeError('a bug'), context=MEMORY, hidden=True),
    linked(RuntimeError('a bug'), context=KeyError('other'))], ids=str)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error):
    assert not is_out_of_memory(error)


def test_a_chain_of_errors_that_bites_its_tail_ends():
    error = RuntimeError('a bug')
    assert not is_out_of_memory(linked(error, cause=linked(RuntimeError('another'), cause=error)))


def test_an_engine_that_was_not_found_is_put_down_to_both_of_its_causes():
    error = RuntimeError('GET was unable to find an engine to execute this computation')
    assert is_out_of_memory(error)
    assert all(words in memory_advice(error) for words in ('batch_size', '--device cpu', 'does not fit the GPU'))
    assert memory_advice(linked(error, context=MEMORY)).startswith('out of memory')


@pytest.mark.parametrize('error, sentence', [
    (RuntimeError('One. Two.'), 'One'), (RuntimeError('\nOne\nTwo'), 'One'), (RuntimeError('in 1.5 s'), 'in 1.5 s'),
    (TimeoutError(), 'TimeoutError')])
def test_the_first_sentence_of_an_error_is_never_empty(error, sentence):
    assert first_sentence(error) == sentence
