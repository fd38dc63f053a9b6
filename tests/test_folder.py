"""Image folders: every kind of image with its right colours, nothing left out unsaid, what does not fit explained."""
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import resize

from datasets.folder import load_folder

GREY = (np.arange(1024).reshape(32, 32) // 4).astype(np.uint8)
SIXTEEN = GREY.astype(np.uint16) * 257


def write(root: Path, files: dict[str, Image.Image | bytes]) -> Path:
    """Save images, or bytes as they are, below `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    return root


def plain(*colour: int, size=(32, 32)) -> Image.Image:
    return Image.new('RGB', size, colour or (77, 77, 77))


def make_folder(root: Path, classes=('ant', 'bee'), train=6, test=3) -> Path:
    """Every image one colour: red its class, green its number."""
    return write(root, {f'{part}/{name}/{i:04}.png': plain(100 * label, 10 * i, 0)
                        for part, count in (('train', train), ('test', test))
                        for label, name in enumerate(classes) for i in range(count)})


def decode(root: Path, name: str, save) -> torch.Tensor:
    """-> (3, 32, 32): how an image is read; save(path) writes it."""
    make_folder(root, train=1, test=1)
    (root / 'test/ant/0000.png').unlink()
    save(root / 'test/ant' / name)
    return load_folder(root)[2].images[0]


# --- every kind of image ------------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', [
    'png', 'PNG', 'jpg', 'JPeG', 'jpe', 'jfif', 'mpo', 'ppm', 'pgm', 'webp', 'bmp', 'tif', 'TIFF', 'gif', 'tga', 'jp2'])
def test_whatever_pillow_reads_is_read(tmp_path, suffix):
    grey = plain().convert('L') if suffix == 'pgm' else plain()
    assert (decode(tmp_path, f'a.{suffix}', grey.save) == 77).all()


def test_only_what_pillow_cannot_decode_is_left_out_and_it_is_said(tmp_path):
    root = write(make_folder(tmp_path), dict.fromkeys(
        ['train/ant/notes.txt', 'train/.hidden/a.png', 'train/bee/.DS_Store', 'train/bee/.a/b.png', 'train/a.png',
         'test/bee/clip.mpeg', 'test/bee/weights.h5', 'README'], b'x'))
    classes, pool, test, notes = load_folder(root)
    assert (len(pool), len(test)) == (12, 6)
    assert len(notes) == 1 and notes[0].startswith('4 files left out')
    assert notes[0].endswith('train/a.png, train/ant/notes.txt, test/bee/clip.mpeg and 1 more')


def fraction(grey, scale):
    return Image.fromarray((grey / np.float32(scale)).astype(np.float32))


@pytest.mark.parametrize('name, image', {
    'RGB': ('a.png', Image.fromarray(GREY).convert('RGB')),
    'RGBA': ('a.png', Image.fromarray(GREY).convert('RGBA')),
    'grey': ('a.png', Image.fromarray(GREY)),
    'grey with alpha': ('a.png', Image.fromarray(GREY).convert('LA')),
    'palette': ('a.png', Image.fromarray(GREY).convert('P')),
    'CMYK': ('a.tif', Image.fromarray(GREY).convert('RGB').convert('CMYK')),
    '16 bits': ('a.png', Image.fromarray(SIXTEEN)),
    '16 bits, big-endian': ('a.tif', Image.frombytes('I;16B', (32, 32), SIXTEEN.astype('>u2').tobytes())),
    '16 bits in 32': ('a.tif', Image.fromarray(SIXTEEN.astype(np.int32))),
    '16 bits, netpbm': ('a.pgm', Image.fromarray(SIXTEEN)),
    'floating point to 1': ('a.tif', fraction(GREY, 255)),
    'floating point to 255': ('a.tif', fraction(GREY, 1)),
}.values(), ids=lambda value: value if isinstance(value, str) else value.mode)
def test_every_mode_keeps_its_colours(tmp_path, name, image):
    assert (decode(tmp_path, name, image.save) == torch.from_numpy(GREY)).all()


def test_black_and_white_and_animations_are_read(tmp_path):
    black = torch.from_numpy(GREY > 127)
    assert torch.equal(decode(tmp_path / '1', 'a.png', Image.fromarray(GREY > 127).save)[0], black.byte() * 255)
    image = decode(tmp_path / '2', 'a.gif', lambda path: plain().save(path, save_all=True, append_images=[plain(9)]))
    assert (image == 77).all()  # of an animation the first image


RIGHT = np.arange(32) > 15  # the right half is opaque, the left transparent


@pytest.mark.parametrize('name, mode, options', [
    ('a.png', 'RGBA', {}), ('a.png', 'LA', {}), ('a.webp', 'RGBA', dict(lossless=True, exact=True)),
    ('a.tif', 'LA', {}), ('a.png', 'P', dict(transparency=7)), ('a.gif', 'P', dict(transparency=7)),
    ('a.png', 'P', dict(transparency=bytes([255] * 7 + [0]))), ('a.png', 'L', dict(transparency=7)),
    ('a.png', 'RGB', dict(transparency=(7, 7, 7))), ('a.png', 'I;16', dict(transparency=7))])
def test_what_is_transparent_is_white(tmp_path, name, mode, options):
    values = np.broadcast_to(np.where(RIGHT, 77 if mode != 'P' else 3, 7), (32, 32)).astype(np.uint8)
    image = Image.fromarray(values)
    if mode == 'P':
        image.putpalette([grey for i in range(256) for grey in [77 if i == 3 else i] * 3])
    elif mode == 'I;16':
        image = Image.fromarray(np.where(values == 77, 77 * 257, 7).astype(np.uint16))
    elif mode in ('LA', 'RGBA'):
        image.putalpha(Image.fromarray(np.broadcast_to(RIGHT * np.uint8(255), (32, 32)).copy()))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    pixels = decode(tmp_path, name, lambda path: image.save(path, **options))
    assert (pixels[:, :, 16:] == 77).all() and (pixels[:, :, :16] == 255).all()


def test_what_is_half_transparent_is_mixed_with_white(tmp_path):
    pixels = decode(tmp_path, 'a.png', Image.new('RGBA', (32, 32), (255, 0, 100, 51)).save)
    assert pixels[:, 0, 0].tolist() == [255, 204, 224]


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.webp', 'a.tif'])
@pytest.mark.parametrize('orientation, store', list(enumerate([
    lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1], lambda a: a.T,
    lambda a: np.rot90(a), lambda a: a[::-1, ::-1].T, lambda a: np.rot90(a, -1)], start=1)))
def test_photographs_are_turned_upright(tmp_path, name, orientation, store):
    upright = np.kron([[30, 90], [150, 210]], np.ones((16, 16))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(tmp_path, name, lambda path: Image.fromarray(store(upright).copy()).save(path, exif=exif))
    assert (pixels.int() - torch.from_numpy(upright).int()).abs().max() <= 4  # JPEG and WebP are not exact


@pytest.mark.parametrize('size', [(31, 32), (40, 50), (300, 20), (8, 8)])
def test_resizing_equals_torchvisions_and_it_is_said(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = decode(tmp_path, 'a.png', Image.fromarray(noise).save)
    expected = resize(torch.from_numpy(noise).permute(2, 0, 1), [32, 32], antialias=True)
    assert (pixels.int() - expected.int()).abs().max() <= 1
    assert load_folder(tmp_path)[3] == ['1 of 4 images resized to 32x32']


# --- every folder -------------------------------------------------------------------------------------------


def test_images_keep_their_labels_and_are_in_one_fixed_order_whatever_the_file_system_lists(tmp_path, monkeypatch):
    classes, pool, test, notes = load_folder(make_folder(tmp_path, train=20))
    assert classes == ('ant', 'bee') and notes == []
    expected = torch.tensor([[100 * label, 10 * i] for label in (0, 1) for i in range(20)])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool.images[:, :2, 0, 0].long(), expected[order])
    assert torch.equal(pool.images[:, 0, 0, 0].long(), 100 * pool.labels)
    assert test.images[:, 1, 0, 0].tolist() == [0, 10, 20] * 2 and test.labels.tolist() == [0] * 3 + [1] * 3
    walk, iterdir = os.walk, Path.iterdir
    monkeypatch.setattr(os, 'walk', lambda *a, **k: ((top, d[::-1], sorted(f)[::-1]) for top, d, f in walk(*a, **k)))
    monkeypatch.setattr(Path, 'iterdir', lambda self: iter(sorted(iterdir(self))[::-1]))
    again = load_folder(tmp_path)
    assert again[0] == classes
    assert torch.equal(again[1].images, pool.images) and torch.equal(again[2].images, test.images)


def test_subfolders_and_links_are_searched_each_once(tmp_path):
    root = write(make_folder(tmp_path / 'images', test=1), {
        'test/ant/0000.jpg/1.png': plain(1), 'test/ant/b/c/2.png': plain(2), '../elsewhere/3.png': plain(3)})
    (root / 'test/ant/empty.png').mkdir()
    (root / 'test/ant/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere/back').symlink_to(root / 'test/ant')  # in a circle
    assert load_folder(root)[2].images[:, 0, 0, 0].tolist() == [1, 0, 2, 3, 100]


def test_a_class_is_the_same_however_its_name_is_encoded(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, 'é') for form in ('NFC', 'NFD'))
    classes, pool, test, _ = load_folder(write(tmp_path, {
        'train/a/1.png': plain(0), f'train/{composed}/1.png': plain(1), f'train/{decomposed}/2.png': plain(1),
        'test/a/1.png': plain(0), f'test/{decomposed}/1.png': plain(1)}))
    assert classes == ('a', composed) and test.labels.tolist() == [0, 1]
    assert torch.equal(pool.images[:, 0, 0, 0].long(), pool.labels) and len(pool) == 3


@pytest.mark.parametrize('spoil, message', [
    (lambda root: [path.unlink() for path in (root / 'train/bee').iterdir()], 'no images.*train/bee: add'),
    (lambda root: [(root / 'test' / name).mkdir() for name in ('cow', 'dog')], 'no images.*test/cow, .*test/dog: add'),
    (lambda root: (root / 'train/bee').rename(root / 'train/wasp'), 'same classes, but bee, wasp are in one'),
    (lambda root: (root / 'test').rename(root / 'tests'), 'no folder .*test$'),
    (lambda root: (root / 'test').rename(root / 'train/ant/x') and (root / 'test').mkdir(), 'no class folders'),
    (lambda root: (root / 'train/ant/a.png').symlink_to('nowhere'), 'a.png .*cannot be read: replace or delete it'),
], ids=['empty class', 'empty extra classes', 'other classes', 'no test', 'empty test', 'broken link'])
def test_a_folder_that_does_not_fit_is_explained(tmp_path, spoil, message):
    spoil(make_folder(tmp_path / 'images'))
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path / 'images')


def test_one_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match='at least two classes are needed, but there is only ant'):
        load_folder(make_folder(tmp_path, classes=('ant',)))


def test_all_unreadable_images_are_named_at_once_and_why(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1024)  # twice as many are refused
    root = write(make_folder(tmp_path), {
        'train/ant/bomb.png': plain(size=(64, 64)), 'train/ant/empty.png': b'', 'train/bee/web.jpg': b'<html></html>',
        'train/bee/nan.tif': fraction(GREY, np.nan), 'test/ant/minus.tif': Image.fromarray(np.full((32, 32), -1, 'i4')),
        'test/bee/short.jpg': plain()})
    whole = (root / 'test/bee/short.jpg').read_bytes()
    (root / 'test/bee/short.jpg').write_bytes(whole[:-20])
    with pytest.raises(ValueError) as error:
        load_folder(root)
    reasons = ['bomb.png (Image size', 'empty.png (not an image', 'nan.tif (its pixels', 'web.jpg (not an image',
               'minus.tif (its pixels', 'short.jpg (']
    places = [str(error.value).index(reason) for reason in reasons]
    assert places == sorted(places) and str(error.value).endswith('cannot be read: replace or delete them')
    write(root, {f'test/bee/{i}.jpg': b'\xff\xd8' for i in range(7)})
    with pytest.raises(ValueError, match=r'\) and 3 more cannot be read: replace or delete them'):
        load_folder(root)
