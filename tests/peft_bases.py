"""The tiny Llama bases and adapters that peft 0.21.2 saved, for the tests of PEFT's format."""

import functools
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.models import load

GOLDEN = Path(__file__).parent / "golden" / "peft"
ADAPTERS = GOLDEN / "adapters"
RECORDED = np.load(GOLDEN / "golden.npz")
IDS = jnp.asarray(RECORDED["input_ids"], jnp.int32)


def base_folder(folder, name="llama"):
    """A Hugging Face folder of one of the bases."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "base" / f"{name}.config.json", folder / "config.json")
    shutil.copy(GOLDEN / "base" / f"{name}.safetensors", folder / "model.safetensors")
    return folder


@functools.cache
def base(name="llama", layers=None):
    """(model, its sites), loaded once."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(base_folder(Path(folder), name), layers=layers)
    return model, lj.find_sites(model.apply, model.params, IDS)


def logits(model, frozen, trained):
    return lj.factored(model.apply)(lj.bind(frozen, trained), IDS)


def base_of(adapter):
    """The base that a golden adapter was made on."""
    if adapter.endswith("_tied"):
        return "llama_tied"
    return "llama_bias" if adapter.startswith("bias_") or adapter == "lora_bias" else "llama"


def distance(x, y):
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(np.asarray(y)).max())


def params_and_sites(name="llama", layers=None):
    """What `load_peft` wants of a base."""
    model, sites = base(name, layers)
    return model.params, sites


def adapter(rules, name="llama", seed=0, size=0.1):
    """An adapter with every trained array moved away from its start."""
    model, sites = base(name)
    frozen, trained = lj.attach(jax.random.key(seed), model.params, rules, sites)
    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [x + size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return frozen, jax.tree.unflatten(structure, moved)


def same(x, y):
    """Whether two trees are alike, bit for bit."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    return all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y)))
