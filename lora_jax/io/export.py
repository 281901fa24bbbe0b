"""Writing a whole model as a Hugging Face folder that transformers opens."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lora_jax.errors import InputError
from lora_jax.io.names import is_stacked, is_transposed, to_hf
from lora_jax.io.swap import whole_folder

_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


class HasHf(Protocol):
    """A configuration that knows its config.json."""

    def to_hf(self) -> dict[str, Any]:
        """The mapping to write."""
        ...


class HasFiles(Protocol):
    """A tokenizer that knows its files."""

    def files(self) -> dict[str, str]:
        """File names and their texts."""
        ...


def save_hf(
    folder: str | Path,
    params: Mapping[str, Any],
    config: HasHf,
    tokenizer: HasFiles | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files; returns the folder.

    `params` are plain parameters (merge adapters first), written in `dtype` or in their own. The
    folder appears whole or not at all, and replaces one of these files alone; the same model
    always gives the same bytes. Raises InputError for a folder with other things in it, and for
    parameters that are not those of a Llama.
    """
    folder = Path(folder).resolve()
    tensors = dict(_tensors(params, None if dtype is None else np.dtype(dtype)))
    stored = tensors["model.embed_tokens.weight"].dtype.name
    about = {**config.to_hf(), "dtype": stored, "torch_dtype": stored}
    with whole_folder(folder, _FILES) as part:
        text = json.dumps(about, indent=2, sort_keys=True)
        (part / "config.json").write_text(text + "\n", encoding="utf-8")
        for name, content in (tokenizer.files() if tokenizer else {}).items():
            (part / name).write_text(content, encoding="utf-8")
        # transformers refuses a file that does not say which framework's layout it has.
        _save(tensors, part / "model.safetensors")
        # It writes for its owner's eyes only; the folder's files should all be alike.
        (part / "model.safetensors").chmod((part / "config.json").stat().st_mode)
    return folder


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as fault:  # its own name for an error of the disk
        raise OSError(
            f"cannot write the weights ({fault}); free space or give another folder"
        ) from None


def _tensors(
    params: Mapping[str, Any], dtype: np.dtype | None, at: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in params.items():
        path = f"{at}/{name}" if at else name
        if isinstance(value, Mapping):
            yield from _tensors(value, dtype, path)
        elif not isinstance(value, np.ndarray | jax.Array):
            kind = type(value).__name__
            raise InputError(f"{path} is a {kind}, not an array; merge the adapters first")
        else:
            yield from _slices(path, np.asarray(value), dtype)


def _slices(
    path: str, array: np.ndarray, dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    layers = enumerate(array) if is_stacked(path) else [(None, array)]
    for layer, single in layers:
        stored = single.T if is_transposed(path) else single
        yield to_hf(path, layer), np.ascontiguousarray(stored, dtype or array.dtype)
