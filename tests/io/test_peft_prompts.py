"""Virtual tokens in PEFT's files."""

import json
import shutil

import jax
import numpy as np
import pytest
from peft_bases import ADAPTERS, IDS, RECORDED, base, distance, params_and_sites
from safetensors.numpy import load_file

from lora_jax.errors import InputError
from lora_jax.io.peft import load_peft, load_prompt, save_prompt
from lora_jax.prompts import p_tuning

NAMES = ["prompt_tuning", "p_tuning", "prefix_tuning"]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_saved_gives_its_logits(name, tmp_path):
    prompted = load_prompt(ADAPTERS / name, base()[0])
    ours = prompted.apply(prompted.params, IDS)
    assert distance(ours, RECORDED[f"logits/{name}"]) < 1e-5
    assert distance(ours, RECORDED["base/llama"]) > 1e-3
    save_prompt(tmp_path / "x", prompted, prompted.params, base_name="org/tiny")
    tensors, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "x", ADAPTERS / name))
    assert tensors.keys() == theirs.keys()
    assert all(np.array_equal(tensors[key], theirs[key]) for key in theirs)


def test_an_encoders_outputs_are_written(tmp_path):
    prompted = p_tuning(base()[0], 2, jax.random.key(0), hidden=5)
    save_prompt(tmp_path / "x", prompted, prompted.params, base_name="org/tiny")
    again = load_prompt(tmp_path / "x", base()[0])
    ours, theirs = (p.apply(p.params, IDS) for p in (prompted, again))
    assert distance(ours, theirs) < 1e-6


def changed(tmp_path, **options):
    folder = tmp_path / "changed"
    shutil.copytree(ADAPTERS / "prefix_tuning", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return folder


def test_what_does_not_fit(tmp_path):
    with pytest.raises(InputError, match="use load_prompt"):
        load_peft(ADAPTERS / "prompt_tuning", *params_and_sites())
    with pytest.raises(InputError, match="has no virtual tokens; load_peft"):
        load_prompt(ADAPTERS / "lora_qv", base()[0])
    with pytest.raises(InputError, match=r"modules_to_save=\['norm'\]"):
        load_prompt(changed(tmp_path / "a", modules_to_save=["norm"]), base()[0])
    with pytest.raises(InputError, match=r"4 virtual tokens .* of \[4, 32\]"):
        load_prompt(changed(tmp_path / "b", num_virtual_tokens=4), base()[0])
    with pytest.raises(InputError, match="num_transformer_submodules=2"):
        load_prompt(changed(tmp_path / "c", num_transformer_submodules=2), base()[0])
    folder = changed(tmp_path / "d")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="save it again"):
        load_prompt(folder, base()[0])
