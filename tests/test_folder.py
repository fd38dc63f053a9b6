"""Image folders: every kind of image with its right colours, nothing left out unsaid, what does not fit explained."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, resize

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
    return write(root, {f'{part}/{name}/{i:04}.png': plain(100 * label, i, 0)
                        for part, count in (('train', train), ('test', test))
                        for label, name in enumerate(classes) for i in range(count)})


def decode(root: Path, name: str, image: Image.Image, **options) -> torch.Tensor:
    """-> (3, 32, 32): how an image is read that is saved under this name."""
    make_folder(root, train=1, test=1)
    (root / 'test/ant/0000.png').unlink()
    image.save(root / 'test/ant' / name, **options)
    return load_folder(root)[2].images[0]


L, PALETTE, RGB = (Image.fromarray(GREY).convert(mode) for mode in ('L', 'P', 'RGB'))
LA = L.copy()
LA.putalpha(Image.fromarray((GREY != 7) * np.uint8(255)))
RGBA = LA.convert('RGBA')
FLOAT = GREY.astype(np.float32)
ANIMATION = dict(save_all=True, append_images=[plain()])


@pytest.mark.parametrize('suffix, image, options', [
    *((suffix, L, {}) for suffix in ('png', 'PNG', 'jpg', 'JPeG', 'jpe', 'jfif', 'mpo', 'ppm', 'webp', 'bmp', 'tif',
                                     'TIFF', 'gif', 'tga', 'jp2')),
    ('gif', L, ANIMATION), ('tif', RGB, ANIMATION), ('png', PALETTE, {}), ('png', RGB, {}),
    ('tif', RGB.convert('CMYK'), {}), ('png', RGB.convert('RGBA'), {}), ('png', L.convert('LA'), {}),
    ('png', Image.fromarray(SIXTEEN), {}), ('pgm', Image.fromarray(SIXTEEN), {}),  # 16 bits
    ('tif', Image.frombytes('I;16B', (32, 32), SIXTEEN.astype('>u2').tobytes()), {}),  # big-endian
    ('tif', Image.fromarray(SIXTEEN.astype(np.int32)), {}),
    ('tif', Image.fromarray(FLOAT), {}), ('tif', Image.fromarray(FLOAT / 255), {}),  # floating point to 255 and to 1
    # what is transparent, where GREY is 7, is white
    ('png', RGBA, {}), ('webp', RGBA, dict(lossless=True, exact=True)), ('png', LA, {}), ('tif', LA, {}),
    ('png', L, dict(transparency=7)), ('png', RGB, dict(transparency=(7, 7, 7))),
    ('png', Image.fromarray(SIXTEEN), dict(transparency=7 * 257)), ('gif', PALETTE, dict(transparency=7)),
    ('png', PALETTE, dict(transparency=7)), ('png', PALETTE, dict(transparency=bytes([255] * 7 + [0])))],
    ids=lambda value: value if isinstance(value, str) else ' '.join(value) if isinstance(value, dict) else value.mode)
def test_every_kind_of_image_keeps_its_colours(tmp_path, suffix, image, options):
    transparent = 'transparency' in options or image in (LA, RGBA)
    expected = torch.from_numpy(np.where(GREY == 7, 255, GREY) if transparent else GREY).int()
    tolerance = 4 if suffix[0] in 'jJmw' and not transparent else 0  # JPEG and WebP are not exact
    assert (decode(tmp_path, f'a.{suffix}', image, **options).int() - expected).abs().max() <= tolerance


def test_what_is_half_transparent_is_mixed_with_white(tmp_path):
    pixels = decode(tmp_path, 'a.png', Image.new('RGBA', (32, 32), (255, 0, 100, 51)))
    assert pixels[:, 0, 0].tolist() == [255, 204, 224]


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.webp', 'a.tif'])
@pytest.mark.parametrize('orientation, store', list(enumerate([
    lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1], lambda a: a.T,
    lambda a: np.rot90(a), lambda a: a[::-1, ::-1].T, lambda a: np.rot90(a, -1)], start=1)))
def test_photographs_are_turned_upright(tmp_path, name, orientation, store):
    upright = np.kron([[30, 90], [150, 210]], np.ones((16, 16))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(tmp_path, name, Image.fromarray(store(upright).copy()), exif=exif)
    assert (pixels.int() - torch.from_numpy(upright).int()).abs().max() <= 4  # JPEG and WebP are not exact


@pytest.mark.parametrize('size', [(31, 32), (40, 50), (300, 20), (8, 8)])
def test_resizing_equals_torchvisions_and_it_is_said(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = decode(tmp_path, 'a.png', Image.fromarray(noise))
    expected = resize(torch.from_numpy(noise).permute(2, 0, 1).double(), [32, 32], antialias=True)
    assert (pixels - expected).abs().max() <= 1.01  # Pillow rounds twice, after each direction
    assert torch.equal(pixels, pil_to_tensor(resize(Image.fromarray(noise), [32, 32])))
    write(tmp_path, {'train/bee/big.png': plain(size=(40, 40))})
    assert load_folder(tmp_path)[3] == ['2 of 5 images resized to 32x32']


def test_images_keep_their_labels_and_are_in_one_fixed_order_whatever_the_file_system_lists(tmp_path, monkeypatch):
    classes, pool, test, notes = load_folder(make_folder(tmp_path, train=101))
    assert classes == ('ant', 'bee') and notes == []
    expected = torch.tensor([[100 * label, i, 0] for label in (0, 1) for i in range(101)], dtype=torch.uint8)
    order = torch.randperm(202, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool.images, expected[order].view(-1, 3, 1, 1).expand(-1, -1, 32, 32))
    assert torch.equal(pool.images[:, 0, 0, 0].long(), 100 * pool.labels)
    assert test.images[:, 1, 0, 0].tolist() == [0, 1, 2] * 2 and test.labels.tolist() == [0] * 3 + [1] * 3
    walk, iterdir = os.walk, Path.iterdir
    monkeypatch.setattr(os, 'walk', lambda *a, **k: ((top, d[::-1], sorted(f)[::-1]) for top, d, f in walk(*a, **k)))
    monkeypatch.setattr(Path, 'iterdir', lambda self: iter(sorted(iterdir(self))[::-1]))
    again = load_folder(tmp_path)
    assert again[0] == classes
    assert torch.equal(again[1].images, pool.images) and torch.equal(again[2].images, test.images)


def test_names_are_the_same_and_in_the_same_order_however_they_are_encoded(tmp_path):
    composed, decomposed = 'é', 'e\u0301'  # of which Linux and macOS prefer different ones
    for e, also in ((composed, decomposed), (decomposed, composed)):
        classes, pool, test, _ = load_folder(write(tmp_path / f'{len(e)}', {
            f'{part}/{name}.png': plain(label, number, 0) for part in ('train', 'test') for name, label, number in (
                ('a/f', 0, 1), (f'a/{e}', 0, 2), ('z/f', 1, 1), (f'{e}/1', 2, 1), (f'{also}/2', 2, 2))}))
        assert classes == ('a', 'z', composed) and test.labels.tolist() == [0, 0, 1, 2, 2]
        assert torch.equal(pool.images[:, 0, 0, 0].long(), pool.labels) and len(pool) == 5
        assert test.images[:, 1, 0, 0].tolist() == [1, 2, 1, 1, 2]


def test_subfolders_and_links_are_searched_each_once(tmp_path, monkeypatch):
    root = write(make_folder(tmp_path / 'images', test=1), {
        'test/ant/0000.jpg/1.png': plain(1), 'test/ant/b/c/2.png': plain(2), '../elsewhere/3.png': plain(3)})
    (root / 'test/ant/empty.png').mkdir()
    (root / 'test/ant/a').symlink_to(root / 'test/ant/b')  # beside what it leads to
    (root / 'test/ant/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere/back').symlink_to(root / 'test/ant')  # in a circle
    assert load_folder(root)[2].images[:, 0, 0, 0].tolist() == [1, 0, 2, 3, 100]
    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: scandir(tmp_path / 'gone' if path.endswith('b/c') else path))
    with pytest.raises(ValueError, match='gone cannot be read .*--data'):  # a subfolder that cannot be read
        load_folder(root)


def test_too_little_memory_for_an_image_is_not_the_images_fault(tmp_path, monkeypatch):
    def too_large(*_):
        raise MemoryError
    monkeypatch.setattr(Image, 'open', too_large)
    with pytest.raises(MemoryError):
        load_folder(make_folder(tmp_path))


def test_only_what_pillow_cannot_decode_is_left_out_and_it_is_said(tmp_path):
    root = write(make_folder(tmp_path), dict.fromkeys(
        ['train/notes.txt', 'train/.hidden/a.png', 'train/bee/.DS_Store', 'train/bee/.a/b.png',
         'test/bee/clip.mpeg', 'test/bee/a/weights.h5', 'README'], b'x'))
    classes, pool, test, notes = load_folder(root)
    assert (len(pool), len(test), len(notes)) == (12, 6, 1) and notes[0].startswith('3 files skipped')
    assert notes[0].endswith(': train/notes.txt, test/bee/a/weights.h5, test/bee/clip.mpeg')


@pytest.mark.parametrize('spoil, message', [
    (lambda root: [path.unlink() for path in (root / 'train/bee').iterdir()], 'no images.*train/bee: add'),
    (lambda root: [(root / 'test' / name).mkdir() for name in ('cow', 'dog')], 'no images.*test/cow, .*test/dog: add'),
    (lambda root: (root / 'train/bee').rename(root / 'train/wasp'), 'same classes, but bee, wasp are in one'),
    (lambda root: [(root / part / 'bee').rename(root / part / 'ant/b') for part in ('train', 'test')],
     'at least two classes are needed, but there is only ant'),
    (lambda root: (root / 'test').rename(root / 'tests'), 'no folder .*test$'),
    (lambda root: (root / 'test').rename(root / 'train/ant/x') and (root / 'test').mkdir(), 'no class folders'),
    (lambda root: (root / 'train/ant/a.png').symlink_to('nowhere'), 'a.png .*cannot be read: replace or delete it'),
], ids=['empty class', 'empty extra classes', 'other classes', 'one class', 'no test', 'empty test', 'broken link'])
def test_a_folder_that_does_not_fit_is_explained(tmp_path, spoil, message):
    spoil(make_folder(tmp_path / 'images'))
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path / 'images')


def test_all_unreadable_images_are_named_at_once_and_why(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1024)  # twice as many are refused
    root = write(make_folder(tmp_path), {
        'train/ant/bomb.png': plain(size=(64, 64)), 'train/ant/empty.png': b'', 'train/bee/web.jpg': b'<html></html>',
        'train/bee/nan.tif': Image.fromarray(FLOAT * np.nan), 'test/bee/short.jpg': plain(),
        'test/ant/minus.tif': Image.fromarray(np.full((32, 32), -1, 'i4'))})
    write(root, {'test/bee/short.jpg': (root / 'test/bee/short.jpg').read_bytes()[:-20]})
    with pytest.raises(ValueError, match=r'bomb.png \(Image size.*empty.png \(not an image.*nan.tif \(its pixels.*'
                       r'web.jpg \(not an image.*minus.tif \(its pixels.*short.jpg \(.* cannot be read: .* them$'):
        load_folder(root)
    write(root, {f'test/bee/{i}.jpg': b'\xff\xd8' for i in range(7)})
    with pytest.raises(ValueError, match=r'\) and 3 more cannot be read: replace or delete them'):
        load_folder(root)
