"""Adapters read back onto their base, and the flags that say which."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

import lora_jax as lj
from experiments import choices
from lora_jax.errors import InputError
from lora_jax.io import native
from lora_jax.io.folder import read_json
from lora_jax.io.native import load_adapter
from lora_jax.io.peft import load_peft
from lora_jax.io.peft.files import CONFIG, NOTES
from lora_jax.models import load
from lora_jax.models.model import Model
from lora_jax.prompts import Prompted


def define_flags() -> None:
    """Define the flags that say which adapter, and where its base lies."""
    flags.DEFINE_string("adapter", None, "The adapter/ folder of a run, or one that peft saved.")
    flags.DEFINE_string("base", None, "Where the base lies, if not where it was trained.")


class Opened(NamedTuple):
    """An adapter on its base."""

    model: Model | Prompted
    frozen: Any
    trained: Any


def open_named() -> Opened:
    """Load the adapter that the flags name."""
    if not flags.FLAGS.adapter:
        raise InputError("give an adapter: --adapter=FOLDER, such as the adapter/ of a run")
    return open_adapter(flags.FLAGS.adapter, flags.FLAGS.base)


def open_adapter(folder: str | Path, base: str | None = None) -> Opened:
    """Load an adapter with its base: the one it was trained on, unless `base` says where it lies.

    InputError when that base has other weights than the adapter was trained on, or when the folder
    does not say what its base is.
    """
    folder = Path(folder)
    source = base or _base_of(folder)
    model = _prompted(load(source), folder)
    sites = lj.find_sites(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    fingerprint = model.source.fingerprint if model.source else None
    read = load_adapter if (folder / native.WEIGHTS).exists() else load_peft
    frozen, trained = read(folder, model.params, sites, base_fingerprint=fingerprint)
    return Opened(model, frozen, trained)


def _prompted(model: Model, folder: Path) -> Model | Prompted:
    """The base with the virtual tokens that an adapter was trained with, if any."""
    notes = read_json(folder / NOTES) if (folder / NOTES).exists() else {}
    prompt = (notes.get("provenance") or {}).get("prompt") or {"name": "none"}
    return choices.make("prompt", prompt)(model, jax.random.key(0))


def _base_of(folder: Path) -> str:
    """Where the base of an adapter lies, by lora_jax.json or else by PEFT's own config."""
    if not folder.is_dir():
        raise InputError(f"no folder '{folder}'; give the adapter/ folder of a run")
    notes = read_json(folder / NOTES) if (folder / NOTES).exists() else {}
    if source := (notes.get("provenance") or {}).get("source"):
        return source
    ours = (folder / native.WEIGHTS).exists()
    name = None if ours else read_json(folder / CONFIG).get("base_model_name_or_path")
    if not name:
        raise InputError(f"'{folder}' does not say what its base is; give it with --base")
    if Path(name).exists():
        return name
    if "/" not in name:
        raise InputError(
            f"'{folder}' calls its base '{name}', which is no folder here; give --base"
        )
    return f"hf://{name}"
