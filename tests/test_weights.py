"""Weights as people's trainers save them, files of other kinds, and the official file."""
import argparse
import hashlib
import io
import json
import pickle
import socket
import warnings
import zipfile
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models.vgg import make_layers

from models import weights as weights_module
from models.weights import WeightsUnavailable, fingerprint, load_features

OLD = {'_use_new_zipfile_serialization': False}
STATE = {key: torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7)  # of a VGG of few filters
         for key, tensor in make_layers([4, 'M', 5, 5, 'M'], batch_norm=True).state_dict().items()}
STATE['1.running_var'][0] = 0  # of a filter that is always off
HEAD = {'classifier.0.weight': torch.zeros(7, 3), 'classifier.0.bias': torch.zeros(7)}


def under(prefix, state=STATE, **others):
    return {prefix + key: tensor for key, tensor in (state | others).items()}


def torch_bytes(content, **options):
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def load(content, path):
    """What is loaded of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else torch_bytes(content))
    return load_features(path, STATE)


def assert_refused(content, path, words):
    """In one sentence that matches these words; only damaged files are to be downloaded again."""
    with pytest.raises(ValueError, match=words) as error:
        load(content, path)
    message = str(error.value)
    assert str(path) in message and '\n' not in message and len(message) < 500
    assert ('download it again' in message) == ('download it again' in words)


def assert_same(found, expected=STATE):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


TRAINERS = {
    'torchvision': under('features.') | HEAD,
    'body alone': STATE,
    'DataParallel, torch.compile': under('module._orig_mod.features.') | under('module.', HEAD),
    'a name never heard of': under('our_net.left.0.'),
    'Lightning': {'epoch': 3, 'state_dict': under('model.backbone.features.') | HEAD, 'optimizer_states': [
        {'state': {0: {'exp_avg': torch.zeros(4, 3, 3, 3)}}}], 'lr': 0.1},
    'three deep': {'best': {'net': {'model': under('features.')}}, 'epoch': 2},
    'twice the same': {'model': under('features.'), 'ema': under('module.features.', {
        key: tensor.double() if tensor.is_floating_point() else tensor + 1 for key, tensor in STATE.items()})},
}


@pytest.mark.parametrize('options', [{}, OLD], ids=['zip', 'old format'])
@pytest.mark.parametrize('content', TRAINERS.values(), ids=TRAINERS)
def test_state_dicts_as_trainers_save_them_load(tmp_path, content, options):
    assert_same(load(torch_bytes(content, **options), tmp_path / 'w.pt'))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_without_batch_counters_load(tmp_path, dtype):
    floats = {key: tensor.to(dtype) for key, tensor in STATE.items() if not key.endswith('num_batches_tracked')}
    assert_same(load(under('features.', floats), tmp_path / 'w.pt'), {
        key: floats[key].float() if key in floats else torch.tensor(0) for key in STATE})


def torchscript():
    with warnings.catch_warnings(action='ignore'):
        torch.jit.save(torch.jit.script(nn.ReLU()), buffer := io.BytesIO())
    return buffer.getvalue()


def archive():
    with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as file:
        file.writestr('folder/vgg.pt', torch_bytes(STATE))
    return buffer.getvalue()


AGAIN = 'damaged.*download it again'
MISSING = {key: tensor for key, tensor in under('features.').items() if key != 'features.4.weight'}
HEADER = json.dumps({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).encode()
REFUSED = {
    'different ones': ({'a': under('features.'), 'b': STATE, 'c': under('features.', **{'0.bias': torch.ones(4)})},
                       "the convolutional part of vgg11_bn 3 times, .*'a: features.', 'b: ', 'c: features.'"),
    'two prefixes': (under('student.') | under('teacher.', **{'7.bias': torch.ones(5)}), "'student.', 'teacher.'"),
    'missing': ({'best': {'net': MISSING}}, 'only 17 of its 18 .*best: net: features.4.weight is missing'),
    'misshapen': (STATE | {'4.weight': torch.zeros(5, 4, 5, 5)}, 'only 17 .*4.weight'),
    'elsewhere': (MISSING | {'other.4.weight': STATE['4.weight']}, 'features.4.weight'),
    'another network': (nn.Linear(2, 2).state_dict(), 'bn .18 tensors .*2 tensors of another network .weight, bias'),
    'no model': ({'epoch': 3, 0: torch.ones(2), '0.weight': 'text'}, "no tensors, only 'epoch', 0, '0.weight'"),
    'nothing': ({}, '0.weight ... 8.running_var .*an empty dictionary'),
    'list': ([1, 2], 'found a list'),
    'safetensors': (len(HEADER).to_bytes(8, 'little') + HEADER + bytes(4), 'safetensors.torch.load_file'),
    'TorchScript': (torchscript(), 'TorchScript archive.*torch.jit.load'),
    'whole model': (nn.ReLU(), 'whole model.*state dict'),
    'whole model, old': (torch_bytes(nn.ReLU(), **OLD), 'whole model.*state dict'),
    'settings': ({'m': STATE, 'args': argparse.Namespace(a=1)}, 'settings.*state dict'),
    'pickle': (pickle.dumps({key: tensor.numpy() for key, tensor in STATE.items()}), 'more than tensors.*state dict'),
    'web page': (b'\n<!DOCTYPE html><html>', 'web page'),
    'Git LFS': (b'version https://git-lfs.github.com/spec/v1\noid', 'Git LFS pointer'),
    'w.onnx': (b'\x08\x07\x12\x07pytorch', 'ONNX'),
    'w.weights': (b'\x89HDF\r\n\x1a\n' + bytes(99), 'Keras'),
    'zip': (archive(), 'zip archive'),
    'garbage': (b'no torch file at all', 'not written by torch.save'),
    'empty': (b'', AGAIN),
    'one bit': (torch_bytes({'a': torch.zeros(999)}).replace(bytes(999), bytes(998) + b'\1', 1), AGAIN),
    **{f'cut to {end}': (torch_bytes(STATE)[:end], AGAIN) for end in (1000, -30)},
    **{f'old, cut to {end}': (torch_bytes(STATE, **OLD)[:end], AGAIN) for end in (1500, -20)},
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_used_is_named_with_what_to_do(tmp_path, name):
    content, words = REFUSED[name]
    assert_refused(content, tmp_path / (name if name.startswith('w.') else 'w.pt'), words)


@pytest.mark.parametrize('spoil', [
    lambda t: t.to_sparse(), lambda t: t.to('meta'), lambda t: t.int(), lambda t: t.bool(),
    lambda t: t.to(torch.complex64), lambda t: t * torch.nan, lambda t: t.double() * 1e300, lambda t: -t - 1],
    ids=['sparse', 'meta', 'integers', 'booleans', 'complex', 'nan', 'too large', 'negative'])
def test_tensors_that_are_no_weights_are_refused(tmp_path, spoil):
    spoilt = STATE | {'1.running_var': spoil(STATE['1.running_var'])}
    assert_refused(under('features.', spoilt), tmp_path / 'w.pt',
                   'cannot be used: 1 of its 21 tensors, the first 1.running_var, hold NaN')
    assert_refused(under('a.', spoilt) | under('b.', spoilt), tmp_path / 'w.pt', '2 times')


def test_nothing_in_a_file_is_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / 'executed'), 'w')
    for content in (torch_bytes({'model': Malicious()}), torch_bytes({'model': Malicious()}, **OLD),
                    pickle.dumps(Malicious(), protocol=2)):
        assert_refused(content, tmp_path / 'w.pt', 'execute')
    assert not (tmp_path / 'executed').exists()


def test_a_lack_of_memory_is_not_put_down_to_the_file(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(MemoryError):
        load(STATE, tmp_path / 'w.pt')


def test_the_fingerprint_is_the_content_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / 'imagenet').write_bytes(b'abc')  # named to confuse
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    expected = 'SHA256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'  # of FIPS 180
    assert fingerprint(str(tmp_path / 'imagenet')) == fingerprint('~/imagenet') == expected
    assert fingerprint('imagenet') == 'imagenet'
    for path in (tmp_path / 'missing.pt', tmp_path):
        for use in (fingerprint, lambda path: load_features(path, {})):
            with pytest.raises(ValueError, match="'imagenet' or the path of a state dict, but there is no file"):
                use(path)


def test_imagenet_weights_are_downloaded_once_and_used_if_their_hash_is_right(tmp_path, no_network, monkeypatch):
    content = torch_bytes(under('features.'), **OLD)
    url = f'https://example.invalid/vgg11_bn-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    monkeypatch.setattr(weights_module, 'VGG11_BN_Weights', SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url)))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    path = tmp_path / 'cache/checkpoints' / url.rsplit('/', 1)[-1]

    def break_off(*arguments, **options):
        raise IncompleteRead(b'')

    def download(url, target, hash_prefix):
        assert url.endswith(f'-{hash_prefix}.pth') and 0 < socket.getdefaulttimeout() < 60
        Path(target).write_bytes(content)
    for next_time in (break_off, download):
        with pytest.raises(WeightsUnavailable, match='could not be downloaded.*--weights'):
            load_features('imagenet', STATE)
        assert socket.getdefaulttimeout() is None
        monkeypatch.setattr(torch.hub, 'download_url_to_file', next_time)
    for _ in range(2):  # downloaded, and from the cache
        assert_same(load_features('imagenet', STATE))
        monkeypatch.setattr(torch.hub, 'download_url_to_file', break_off)
    path.write_bytes(content + b'?')
    with pytest.raises(ValueError, match='SHA256.*Delete it'):
        load_features('imagenet', STATE)
