"""Weights as people's trainers save them, files of other kinds, and the official file."""
import argparse
import hashlib
import io
import json
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.vgg import make_layers

from models import weights as weights_module
from models.weights import WeightsUnavailable, fingerprint, load_features

BODY = [4, 'M', 5, 5, 'M']  # VGG with few filters


@pytest.fixture(scope='module')
def state():
    """A state dict of the body's own names."""
    generator = torch.Generator().manual_seed(1)
    return {key: torch.rand(tensor.shape, generator=generator) + 0.01 if tensor.is_floating_point() else
            torch.tensor(7) for key, tensor in make_layers(BODY, batch_norm=True).state_dict().items()}


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def under(prefix, state):
    return OrderedDict((prefix + key, tensor) for key, tensor in state.items())


def assert_same(loaded, state):
    assert list(loaded) == list(state)
    for key, tensor in state.items():
        torch.testing.assert_close(loaded[key], tensor)


def refused(path, like):
    """The one sentence with which it is refused."""
    with pytest.raises(ValueError) as error:
        load_features(path, like)
    assert str(path) in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


# --- trainers -----------------------------------------------------------------------------------------------


HEAD = {'classifier.0.weight': torch.zeros(7, 3), 'classifier.0.bias': torch.zeros(7)}
TRAINERS = {
    'torchvision': lambda s: under('features.', s) | HEAD,
    'body alone': lambda s: s,
    'DataParallel': lambda s: under('module.features.', s) | under('module.', HEAD),
    'torch.compile': lambda s: under('_orig_mod.features.', s),
    'a name never heard of': lambda s: under('our_net.left.0.', s),
    'Lightning': lambda s: {'epoch': 3, 'state_dict': under('model.backbone.features.', s) | HEAD, 'optimizer_states': [
        {'state': {0: {'exp_avg': torch.zeros(4, 3, 3, 3)}}}], 'lr': 0.1},
    'two deep': lambda s: {'best': {'model': under('features.', s)}, 'epoch': 2},
    'optimiser beside': lambda s: {'model': under('features.', s), 'optimizer': torch.optim.Adam(
        make_layers(BODY, batch_norm=True).parameters()).state_dict(), 'loss': 0.5, 'args': ['a']},
    'twice the same': lambda s: {'model': under('features.', s), 'ema': under('module.features.', s)},
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'old format'])
@pytest.mark.parametrize('wrap', TRAINERS.values(), ids=TRAINERS)
def test_state_dicts_as_trainers_save_them_load(tmp_path, state, wrap, zipped):
    path = saved(wrap(state), tmp_path / 'w.pt', _use_new_zipfile_serialization=zipped)
    assert_same(load_features(path, state), state)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_without_batch_counters_load(tmp_path, state, dtype):
    floats = {key: tensor.to(dtype) for key, tensor in state.items() if not key.endswith('num_batches_tracked')}
    loaded = load_features(saved(under('features.', floats), tmp_path / 'w.pt'), state)
    assert loaded['0.weight'].dtype == torch.float32 and loaded['1.num_batches_tracked'] == 0
    torch.testing.assert_close(loaded['0.weight'], floats['0.weight'].float())


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize('wrap, words', [
    (lambda s: {'model': under('features.', s), 'ema': under('features.', s) | {'features.0.bias': torch.ones(4)}},
     ['2 times', 'model: features.', 'ema: features.']),
    (lambda s: under('student.', s) | under('teacher.', {k: t + t for k, t in s.items()}), ['student', 'teacher']),
    (lambda s: {'net': under('features.', without(s, '4.weight'))},
     ['only 17 of its 18', 'net: features.4.weight is missing']),
    (lambda s: s | {'4.weight': torch.zeros(5, 4, 5, 5)}, ['only 17', '4.weight']),
    (lambda s: under('features.', without(s, '0.bias')) | {'other.0.bias': s['0.bias']}, ['features.0.bias']),
    (lambda s: nn.Linear(2, 2).state_dict(), ['2 tensors of another network', 'weight, bias']),
    (lambda s: {'epoch': 3, 'loss': 0.5}, ['no tensors', "'epoch', 'loss'"]),
    (lambda s: {}, ['an empty dictionary']),
    (lambda s: [1, 2], ['found a list']),
    (lambda s: {'features.0.weight': 'text'}, ['no tensors']),
    (lambda s: torch.zeros(3), ['found a Tensor']),
], ids=['two different', 'two prefixes', 'missing', 'misshapen', 'elsewhere', 'another network', 'no model', 'empty',
        'list', 'text', 'tensor'])
def test_what_is_ambiguous_or_absent_is_refused_with_what_was_found_and_expected(tmp_path, state, wrap, words):
    message = refused(saved(wrap(state), tmp_path / 'w.pt'), state)
    assert 'convolutional part of vgg11_bn' in message and 'download it again' not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize('spoil', [
    lambda t: t.to_sparse(), lambda t: t.to('meta'), lambda t: t.int(), lambda t: t.bool(),
    lambda t: t.to(torch.complex64), lambda t: t * torch.nan, lambda t: t.double() * 1e300, lambda t: -t.abs() - 1],
    ids=['sparse', 'meta', 'integers', 'booleans', 'complex', 'nan', 'too large', 'negative'])
@pytest.mark.parametrize('places', [['features.'], ['a.', 'b.']], ids=['once', 'twice'])
def test_tensors_that_are_no_weights_are_refused(tmp_path, state, spoil, places):
    spoilt = state | {'1.running_var': spoil(state['1.running_var'])}
    message = refused(saved({k: t for place in places for k, t in under(place, spoilt).items()}, tmp_path / 'w.pt'),
                      state)
    assert 'cannot be used: 1.running_var' in message or '2 times' in message


# --- files of other kinds -----------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def torch_bytes(state, **options):
    torch.save(state, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def safetensors(state):
    header = json.dumps({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).encode()
    return len(header).to_bytes(8, 'little') + header + bytes(4)


def torchscript(state):
    torch.jit.save(torch.jit.script(nn.ReLU()), buffer := io.BytesIO())
    return buffer.getvalue()


def archive(state):
    with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as file:
        file.writestr('folder/vgg.pt', torch_bytes(state))
    return buffer.getvalue()


def flipped(content):
    return content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1:]


OLD = {'_use_new_zipfile_serialization': False}
OTHER = {
    'safetensors': ('w.safetensors', safetensors, 'safetensors file.*load_file'),
    'TorchScript': ('w.pt', torchscript, 'TorchScript archive.*torch.jit.load'),
    'whole model': ('w.pt', lambda s: torch_bytes(nn.ReLU()), 'whole model.*state dict'),
    'whole model, old': ('w.pt', lambda s: torch_bytes(nn.ReLU(), **OLD), 'whole model.*state dict'),
    'settings': ('w.pt', lambda s: torch_bytes({'m': s, 'args': argparse.Namespace(a=1)}), 'settings.*state dict'),
    'pickle': ('w.pkl', lambda s: pickle.dumps({k: t.numpy() for k, t in s.items()}), 'more than tensors.*state dict'),
    'web page': ('w.pt', lambda s: b'\n<!DOCTYPE html><html>', 'web page'),
    'Git LFS': ('w.pt', lambda s: b'version https://git-lfs.github.com/spec/v1\noid', 'Git LFS pointer'),
    'ONNX': ('w.onnx', lambda s: b'\x08\x07\x12\x07pytorch', 'ONNX'),
    'Keras': ('w.weights', lambda s: b'\x89HDF\r\n\x1a\n' + bytes(99), 'Keras'),
    'zip': ('w.zip', archive, 'zip archive'),
    'garbage': ('w.pt', lambda s: b'no torch file at all', 'no file that torch.save wrote'),
}
DAMAGED = {
    'empty': lambda s: b'',
    'start': lambda s: torch_bytes(s)[:1000],
    'without its end': lambda s: torch_bytes(s)[:-30],
    'one bit': lambda s: flipped(torch_bytes({'features.0.weight': torch.rand(9999)})),
    'old, start': lambda s: torch_bytes(s, **OLD)[:1500],
    'old, without its end': lambda s: torch_bytes(s, **OLD)[:-20],
}


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('name, make, words', OTHER.values(), ids=OTHER)
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, state, name, make, words):
    (tmp_path / name).write_bytes(make(state))
    with pytest.raises(ValueError, match=words):
        load_features(tmp_path / name, state)
    assert 'download it again' not in refused(tmp_path / name, state)


@pytest.mark.parametrize('make', DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_to_be_downloaded_again(tmp_path, state, make):
    (tmp_path / 'w.pt').write_bytes(make(state))
    assert 'damaged' in (message := refused(tmp_path / 'w.pt', state)) and 'download it again' in message


@pytest.mark.parametrize('write', [
    lambda bad, path: saved({'model': bad}, path), lambda bad, path: saved({'model': bad}, path, **OLD),
    lambda bad, path: path.write_bytes(pickle.dumps(bad, protocol=2))], ids=['zip', 'old format', 'pickle'])
def test_nothing_in_a_file_is_executed(tmp_path, state, write):
    write(Malicious(tmp_path / 'executed'), tmp_path / 'w.pt')
    refused(tmp_path / 'w.pt', state)
    assert not (tmp_path / 'executed').exists()


# --- files --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_content_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / 'w.pt').write_bytes(b'abc')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    expected = 'SHA256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'  # of FIPS 180
    assert fingerprint(str(tmp_path / 'w.pt')) == fingerprint('~/w.pt') == expected
    assert fingerprint('imagenet') == 'imagenet'


@pytest.mark.parametrize('name', ['missing.pt', '.'])
def test_a_path_without_a_file_is_refused(tmp_path, name):
    for use in (fingerprint, lambda path: load_features(path, {})):
        with pytest.raises(ValueError, match="'imagenet' or the path of a state dict, but there is no file"):
            use(str(tmp_path / name))


@pytest.fixture
def official(tmp_path, monkeypatch, state):
    """The path in torch's cache of an official file with the content of `state`, and that content."""
    content = torch_bytes(under('features.', state), **OLD)
    url = f'https://example.invalid/vgg11_bn-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    entry = type('Entry', (), {'url': url})
    monkeypatch.setattr(weights_module, 'VGG11_BN_Weights', type('Weights', (), {'IMAGENET1K_V1': entry}))
    (tmp_path / 'checkpoints').mkdir()
    return tmp_path / 'checkpoints' / url.rsplit('/', 1)[-1], content


def test_imagenet_weights_in_torchs_cache_are_used_if_their_hash_is_right(official, state):
    path, content = official
    path.write_bytes(content)
    assert_same(load_features('imagenet', state), state)
    path.write_bytes(content + b'?')
    with pytest.raises(ValueError, match='SHA256.*Delete it'):
        load_features('imagenet', state)


def test_imagenet_weights_that_cannot_be_downloaded_are_unavailable(official, state, no_network):
    with pytest.raises(WeightsUnavailable, match='could not be downloaded.*--weights'):
        load_features('imagenet', state)
