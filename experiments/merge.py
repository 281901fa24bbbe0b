"""Add an adapter to its base for good: a Hugging Face folder that transformers loads.

python -m experiments.merge --adapter=runs/quickstart/adapter --out=runs/quickstart/merged
"""

from pathlib import Path

import jax
from absl import flags

import lora_jax as lj
from experiments import cli, opening
from experiments.measure import merge_error
from experiments.opening import Opened
from lora_jax.errors import InputError
from lora_jax.io.export import save_hf
from lora_jax.prompts import Prompted


def define_flags() -> None:
    """Define the flags of this command."""
    opening.define_flags()
    flags.DEFINE_string("out", None, "Folder to write; it must be new, or empty.")
    types = ["float32", "bfloat16", "float16"]
    flags.DEFINE_enum("dtype", "float32", types, "Type of the written weights.")


def merge(opened: Opened, out: str | Path, dtype: str = "float32") -> float:
    """Write the merged model to `out`; return its largest relative difference in logits.

    The difference is that of the weights as written, `dtype` and all, against the adapter in
    factored form, over one text of 32 fixed tokens. InputError when `out` has anything in it.
    """
    check_free(Path(out))
    model, frozen, trained = opened
    if isinstance(model, Prompted):
        raise InputError(
            "this adapter has virtual tokens, which no weights of the base can take up; "
            "generate with it, or use lora_jax.prompts"
        )
    merged = jax.tree.map(lambda w: w.astype(dtype), lj.merge(frozen, trained))
    length = min(32, model.config.max_position_embeddings)
    ids = jax.random.randint(jax.random.key(0), (1, length), 0, model.config.vocab_size)
    error = merge_error(model.apply, frozen, trained, merged, (ids,))
    save_hf(out, merged, model.config, model.tokenizer)
    return error


def check_free(out: Path) -> None:
    """Raise InputError for a folder that has anything in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"'{out}' exists; give a new folder for the merged model")


def main() -> None:
    """Merge what the command line names."""
    options = flags.FLAGS
    if not options.out:
        raise InputError("give a new folder for the merged model: --out=FOLDER")
    check_free(Path(options.out))
    error = merge(opening.open_named(), options.out, options.dtype)
    print(f"written to {options.out}; largest difference of its logits, relative: {error:.2e}")


if __name__ == "__main__":
    cli.run(main, define_flags)
