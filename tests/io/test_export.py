"""A saved model: whole or not at all, the same bytes every time, never over something else."""

import hashlib
import json

import jax.numpy as jnp
import pytest
import tiny_llama

from lora_jax.errors import InputError
from lora_jax.io import export
from lora_jax.io.export import save_hf


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_the_same_model_gives_the_same_bytes(tmp_path):
    made, tokenizer = tiny_llama.model(), tiny_llama.tokenizer()
    first = save_hf(tmp_path / "a", made.params, made.config, tokenizer)
    second = save_hf(tmp_path / "new" / "b", made.params, made.config, tokenizer)
    assert digests(first) == digests(second)
    assert set(digests(first)) == export._FILES
    modes = {file.stat().st_mode for file in first.iterdir()}
    assert len(modes) == 1


def test_saving_again_replaces_what_was_saved(tmp_path):
    made = tiny_llama.model()
    folder = save_hf(tmp_path / "a", made.params, made.config, tiny_llama.tokenizer())
    save_hf(folder, made.params, made.config, dtype=jnp.bfloat16)
    assert set(digests(folder)) == {"config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_other_files_are_never_overwritten(tmp_path):
    made = tiny_llama.model()
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match=r"holds other files.*thesis.tex"):
        save_hf(tmp_path, made.params, made.config)
    with pytest.raises(InputError, match="is a file"):
        save_hf(tmp_path / "thesis.tex", made.params, made.config)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_previous_model(tmp_path, monkeypatch, fault):
    made = tiny_llama.model()
    folder = save_hf(tmp_path / "a", made.params, made.config)
    before = digests(folder)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(type(fault)):
        save_hf(folder, tiny_llama.model(seed=5).params, made.config)
    assert digests(folder) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_is_not_plain_parameters_is_refused(tmp_path):
    made = tiny_llama.model()
    with pytest.raises(InputError, match="norm/scale is a object, not an array; merge"):
        save_hf(tmp_path / "a", {**made.params, "norm": {"scale": object()}}, made.config)
    with pytest.raises(InputError, match="no parameter 'norm/bias'"):
        save_hf(tmp_path / "a", {**made.params, "norm": {"bias": jnp.ones(3)}}, made.config)
    assert not (tmp_path / "a").exists()
