"""PyTorch's .pth and .pt files without PyTorch, and without running what they say."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.torch_program import Tensor, follow

Storages: TypeAlias = Mapping[str, memoryview]

# Opens a file in the format from before torch 1.6: the number 0x1950A86A20F9469CFC6C, pickled.
_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")

# What a cut or garbled file makes the reading below stumble over.
_BROKEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
_BROKEN += (EOFError, struct.error, zipfile.BadZipFile, zlib.error)


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict that `torch.save` wrote, by name, as read-only arrays.

    Both its formats are read: a stream of pickles and, since torch 1.6, a zip archive (layout:
    `_legacy_save` and `_save` in torch/serialization.py). Tensors that share a storage there share
    memory here. Nothing is run: an instruction or a name that no state_dict needs is an
    InputError, as is a file that is not whole or that holds anything but tensors by name.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise InputError(f"{path} cannot be read ({fault.strerror}); give a .pth file") from None
    try:
        saved, storages = (_zipped if data.startswith(b"PK\3\4") else _streamed)(data)
        return {name: _window(tensor, storages) for name, tensor in _tensors(saved).items()}
    except InputError as fault:
        raise InputError(f"{path}: {fault}") from None
    except _BROKEN as fault:
        raise InputError(f"{path} is not a whole torch file ({fault}); fetch it again") from None


def _tensors(saved: Any) -> dict[str, Tensor]:
    if not isinstance(saved, dict):
        raise InputError(f"holds a {_kind(saved)}, not tensors by name; save model.state_dict()")
    for name, value in saved.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{name!r} is a {_kind(value)}, not a tensor; save model.state_dict() alone"
            )
    return saved


def _window(tensor: Tensor, storages: Storages) -> np.ndarray:
    """A view of the storage's bytes; a tensor that reaches beyond them is a ValueError."""
    storage = tensor.storage
    flat = np.frombuffer(storages[storage.key], storage.dtype)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    end = tensor.offset + (0 if 0 in tensor.shape else last + 1)
    if end > min(flat.size, storage.count):
        raise ValueError(f"storage {storage.key} ends at {flat.size}, a tensor at {end}")
    strides = [step * flat.itemsize for step in tensor.strides]
    view = flat[tensor.offset :]
    return np.lib.stride_tricks.as_strided(view, tensor.shape, strides, writeable=False)


def _kind(value: Any) -> str:
    return type(value).__name__.strip("_").lower()


def _streamed(data: bytes) -> tuple[Any, Storages]:
    """Five pickles (magic, version, system, what was saved, keys), then the keys' storages."""
    if not data.startswith(_MAGIC):
        raise InputError("is not a file that torch.save wrote; give a .pth or .pt file")
    stream = io.BytesIO(data)
    _, _, system, saved, keys = (follow(stream) for _ in range(5))
    if not system.result["little_endian"]:
        raise InputError("was written on a big-endian machine; save it again on another")
    storages, at = {}, stream.tell()
    for key in keys.result:
        (count,) = struct.unpack_from("<Q", data, at)
        start, at = at + 8, at + 8 + count * saved.storages[key].dtype.itemsize
        storages[key] = memoryview(data)[start:at]
    return saved.result, storages


def _zipped(data: bytes) -> tuple[Any, Storages]:
    """An archive with one folder: data.pkl, byteorder, and every storage as data/KEY."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        program = next((name for name in names if name.endswith("/data.pkl")), None)
        if program is None:
            raise InputError("is a zip archive without data.pkl; give a .pth or .pt file")
        folder = program.removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise InputError("was written on a big-endian machine; save it again on another")
        saved = follow(io.BytesIO(archive.read(program)))
        read = {key: memoryview(archive.read(f"{folder}data/{key}")) for key in saved.storages}
    return saved.result, read
