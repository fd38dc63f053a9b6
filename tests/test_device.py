"""The device and its precision, with GPUs played by the tests where there are none."""
import ctypes
import re
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lab import device as device_module
from lab.device import first_sentence, gpu_failure, is_out_of_memory, memory_advice, pick_device, pick_precision

CPU, GPU = torch.device('cpu'), torch.device('cuda')
NO_KERNEL = RuntimeError('CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ...')
MEMORY = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.')
convolution = F.conv2d


@pytest.mark.parametrize('name', ['tpu', 'meta', 'cuda:99', '', 'cpu:x'])
def test_a_device_that_does_not_work_here_is_refused_in_one_short_sentence(name):
    with pytest.raises(ValueError, match='device must be .*--device cpu') as error:
        pick_device(name)
    assert repr(name) in str(error.value) and len(str(error.value)) < 250 and '\n' not in str(error.value)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of `gpu.memory` bytes on which the trial convolution raises `gpu.error`."""
    gpu = SimpleNamespace(error=None, memory=8e10)

    def trial(device):
        if device.type == 'cuda' and gpu.error:
            raise gpu.error
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(device_module, '_try_convolution', trial)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=gpu.memory))
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    return gpu


def test_auto_takes_a_gpu_if_it_works_and_a_named_one_is_refused_if_it_does_not(gpu, capsys, monkeypatch):
    for gpu.error in (MEMORY, NO_KERNEL):
        assert pick_device('auto') == CPU and not torch.backends.cudnn.benchmark
        assert capsys.readouterr().out == (f'The GPU cannot be used ({first_sentence(gpu.error)}): '
                                           'using the CPU instead.\n')
    for name in ('cuda', 'cuda:1'):
        with pytest.raises(ValueError, match=rf"'{name}'.*\(CUDA error: no kernel image[^\n]*--device cpu$"):
            pick_device(name)
    gpu.error = None
    for gpu.memory, searches in ((15.8e9, False), (25.3e9, True)):
        assert pick_device('auto') == GPU and torch.backends.cudnn.benchmark == searches
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert pick_device('auto') == pick_device('cpu:1') == CPU  # tensors saved on cpu:1 could not be loaded
    assert capsys.readouterr().out == ''


def test_a_device_is_tried_backward_too(monkeypatch):
    def trial(images, weight, **options):
        weight.register_hook(lambda gradient: gradient[1000])
        return convolution(images, weight, **options)
    monkeypatch.setattr(F, 'conv2d', trial)
    with pytest.raises(ValueError, match='out of bounds'):
        pick_device('cpu')


@pytest.mark.parametrize('name', ['cpu', 'auto'])
def test_freed_memory_is_kept_on_a_cpu_where_the_c_library_can(monkeypatch, name):
    told = {}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(ctypes, 'CDLL', lambda _: SimpleNamespace(mallopt=told.__setitem__))
    assert pick_device(name) == CPU
    assert told == {-4: 0, -1: 2**31 - 1}  # glibc's M_MMAP_MAX: none; M_TRIM_THRESHOLD: the largest int
    monkeypatch.setattr(ctypes, 'CDLL', lambda _: SimpleNamespace())  # macOS and musl
    assert pick_device(name) == CPU


@pytest.mark.parametrize('error, faster, expected', [
    (0.003, 3.0, 'bf16'), (0.003, 1.1, 'fp32'), (0.5, 3.0, 'fp32'), (float('nan'), 3.0, 'fp32')],
    ids=['right and faster', 'hardly faster', 'wrong', 'not a number'])
def test_on_a_cpu_bf16_is_chosen_only_where_it_is_right_and_faster(monkeypatch, error, faster, expected):
    monkeypatch.setattr(device_module, '_try_bf16', lambda: (error, faster))
    precision, reason = pick_precision('auto', CPU)
    assert precision == expected and (f'{faster} times' in reason or 'wrong' in reason)
    assert pick_precision('bf16', CPU) == ('bf16', 'as asked' if expected == 'bf16' else f'as asked, but {reason}')
    assert pick_precision('fp32', CPU) == ('fp32', 'as asked')
    assert pick_precision('auto', torch.device('mps'))[0] == 'fp32'


def test_the_trial_of_bf16_measures_a_small_error_on_one_thread_and_may_fail(monkeypatch):
    def trial(images, weight, **options):
        assert torch.get_num_threads() == 1
        if fails and torch.is_autocast_enabled('cpu'):
            raise RuntimeError('could not create a primitive descriptor. And more.')
        result = convolution(images, weight, **options)
        assert result.dtype == (torch.bfloat16 if torch.is_autocast_enabled('cpu') else torch.float32)
        return result
    monkeypatch.setattr(F, 'conv2d', trial)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fails = False
        error, faster = device_module._try_bf16()
        assert 1e-3 < error < 0.05 and faster > 0  # bf16 has 8 bits: not exact, not wrong
        fails = True
        assert pick_precision('auto', CPU) == (
            'fp32', 'bf16 does not work on this CPU: could not create a primitive descriptor')
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('native, expected', [(True, 2.5), (False, 0.05)])
def test_the_trial_gives_the_ratio_of_both_speeds_and_stops_early_where_bf16_crawls(monkeypatch, native, expected):
    spent = []

    def step(images, weight, precision):
        seconds = 0.05 * len(images) / 4 / (expected if precision == 'bf16' else 1)
        seconds += 0 if len(spent) >= 2 or not native else 0.02  # getting ready, which must not count
        spent.append(seconds)
        return torch.tensor([3.0, 4.0]) if precision == 'fp32' else torch.tensor([3.0, 4.5]), seconds
    monkeypatch.setattr(device_module, '_timed_step', step)
    assert device_module._try_bf16() == (pytest.approx(0.1), pytest.approx(expected))
    assert 0.2 < sum(spent) < 0.5


def test_the_trial_counts_the_processors_time_and_not_that_of_other_programs(monkeypatch):
    monkeypatch.setattr(F, 'conv2d', lambda *args, **options: time.sleep(0.2) or convolution(*args, **options))
    _, seconds = device_module._timed_step(torch.ones(1, 3, 8, 8), torch.ones(8, 3, 3, 3, requires_grad=True), 'fp32')
    assert 0 < seconds < 0.15


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
    assert precision == expected and re.search(words, reason)


def linked(error, cause=None, context=None, hidden=False):
    error.__cause__, error.__context__, error.__suppress_context__ = cause, context, hidden or cause is not None
    return error


@pytest.mark.parametrize('error', [
    MEMORY, MemoryError(), RuntimeError('[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can\'t allocate memory'),
    RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes'),
    RuntimeError('CUDA error: out of memory'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)'),
    RuntimeError('cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'),
    linked(RuntimeError('CUDA error: operation failed due to a previous error during capture'), context=MEMORY),
    linked(RuntimeError('training failed'), cause=linked(RuntimeError('capture'), context=MEMORY)),
    linked(RuntimeError('unable to find an engine'), cause=MEMORY)], ids=lambda error: str(error)[:30])
def test_errors_about_memory_are_recognised_also_behind_others(error):
    assert is_out_of_memory(error)
    assert re.fullmatch('out of memory: lower the constant batch_size .*', memory_advice(error))


@pytest.mark.parametrize('words', ['GET was unable to find an engine to execute this computation',
                                   'Unable to find a valid cuDNN algorithm to run convolution'])
def test_an_engine_that_was_not_found_is_put_down_to_both_of_its_causes(words):
    error = RuntimeError(words)
    assert is_out_of_memory(error)
    assert all(words in memory_advice(error) for words in ('batch_size', '--device cpu', 'does not fit the GPU'))


def test_a_gpu_that_fails_is_told_from_a_bug_also_where_what_is_saved_then_fails_too():
    broken = RuntimeError('CUDA error: unspecified launch failure\nSearch for ...')
    assert gpu_failure(broken) == gpu_failure(linked(RuntimeError('cannot save'), context=broken)) == (
        'CUDA error: unspecified launch failure')
    for bug in (RuntimeError('shapes do not match'), RuntimeError('CUDA error: device-side assert triggered')):
        assert not gpu_failure(bug)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    bug = RuntimeError('a bug')
    circle = linked(RuntimeError('a bug'), cause=linked(RuntimeError('another'), cause=bug))
    bug.__cause__ = circle
    hidden = linked(RuntimeError('a bug'), context=MEMORY, hidden=True)
    for error in (NO_KERNEL, ValueError('memory'), hidden, linked(RuntimeError(), context=KeyError('other')), circle):
        assert not is_out_of_memory(error)


@pytest.mark.parametrize('error, sentence', [
    (RuntimeError('One. Two.'), 'One'), (RuntimeError('\nOne\nTwo'), 'One'), (RuntimeError('in 1.5 s'), 'in 1.5 s'),
    (TimeoutError(), 'TimeoutError')])
def test_the_first_sentence_of_an_error_is_never_empty(error, sentence):
    assert first_sentence(error) == sentence
