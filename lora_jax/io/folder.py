"""Hugging Face folders: config.json beside model.safetensors, whole or in shards."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with numpy, for safetensors)
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.errors import InputError
from lora_jax.io.checkpoint import Checkpoint

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; InputError, naming the file, when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no file {path}; give a folder with {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise InputError(f"{path} is not JSON ({fault}); fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a mapping")
    return value


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder's configuration and the headers of its safetensors files."""
    config = read_json(folder / "config.json")
    files = _weight_files(folder)
    headers = {file: _header(file) for file in files}
    home = {name: file for file, shapes in headers.items() for name in shapes}
    return Checkpoint(
        where=str(folder),
        config=config,
        shapes={name: shape for shapes in headers.values() for name, shape in shapes.items()},
        read=lambda name: _read(home[name], name),
        fingerprint=lambda: sha256_of(files),
    )


def sha256_of(files: Iterable[Path]) -> str:
    """sha256, in hex, of the files' bytes one after another.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a"
    ...     _ = file.write_bytes(b"abc")
    ...     sha256_of([file])[:16]
    'ba7816bf8f01cfea'
    """
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        shards = sorted(set(read_json(folder / _INDEX).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            raise InputError(
                f"{folder / _INDEX} names {len(shards)} shards; not there: {', '.join(missing)}. "
                "Download the whole checkpoint."
            )
        return [folder / shard for shard in shards]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise InputError(
        f"no weights in {folder}: neither {_SINGLE} nor {_INDEX}. "
        "Weights in another format (pytorch_model.bin) must be converted to safetensors."
    )


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as fault:
        raise InputError(
            f"{file} is not a whole safetensors file ({fault}); fetch it again"
        ) from None


def _read(file: Path, name: str) -> np.ndarray:
    with safe_open(file, framework="np") as tensors:
        return tensors.get_tensor(name)
