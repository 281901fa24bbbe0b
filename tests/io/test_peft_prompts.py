"""Virtual tokens in PEFT's files."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_bert
from peft_bases import ADAPTERS, IDS, RECORDED, base, distance, params_and_sites
from safetensors.numpy import load_file

from lora_jax.errors import InputError
from lora_jax.io.peft import load_peft, load_prompt, save_prompt
from lora_jax.models import with_head
from lora_jax.models.bert import initialise_bert
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.vit import ViTConfig, initialise_vit
from lora_jax.prompts import p_tuning, prefix_tuning, prompt_tuning

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


KEY = jax.random.key(0)


def bert(kind="bert", pooling="pooler"):
    return initialise_bert(BertConfig.from_hf(tiny_bert.CONFIGS[kind]), KEY, pooling)


@pytest.mark.parametrize("make", [prompt_tuning, prefix_tuning])
def test_a_bert_and_its_classifier_come_back(make, tmp_path):
    prompted = with_head(make(bert(), 2, KEY), 3, jax.random.key(1))
    save_prompt(tmp_path / "x", prompted, prompted.params, base_name="org/tiny")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["token_dim"] == 12
    again = load_prompt(tmp_path / "x", with_head(bert(), 3, KEY))
    inputs = tiny_bert.batch("bert")
    ours, theirs = (p.apply(p.params, *inputs) for p in (prompted, again))
    assert distance(ours, theirs) < 1e-6
    for wrong in (bert(), with_head(bert(), 4, KEY), with_head(bert(pooling="cls"), 3, KEY)):
        with pytest.raises(InputError, match=r"classifier of 3 classes .* 'pooler'\), 3, key"):
            load_prompt(tmp_path / "x", wrong)


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path):
    plain = prefix_tuning(bert(pooling="mean"), 2, KEY)
    headed = with_head(prefix_tuning(bert(), 2, KEY), 3, KEY)
    for name, prompted, words in (
        ("a", prefix_tuning(base()[0], 2, KEY), ("AutoModelForCausalLM", "text-generation")),
        ("b", plain, ("AutoModel.from", "feature-extraction", "load_bert(")),
        ("c", headed, ("text-classification", "with_head")),
    ):
        card = {"title": "Reviews", "tags": ["films"]}
        save_prompt(tmp_path / name, prompted, prompted.params, base_name="org/tiny", card=card)
        text = (tmp_path / name / "README.md").read_text()
        assert 'tags: ["films", "lora_jax", "peft", "prefix_tuning"]' in text
        for fact in ("# Reviews", "| prefix_tuning | 2 virtual tokens |", "load_prompt(", *words):
            assert fact in text
        code = text.split("```python\n")[2].split("```")[0]
        compile(code, "README.md", "exec")


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: initialise_vit(ViTConfig(8, 4, 12, 2, 3, 20), KEY), "text alone"),
        (lambda: with_head(bert(pooling="mean"), 3, KEY), "reads BERT's pooler"),
        (lambda: with_head(bert("roberta"), 3, KEY), "reads BERT's pooler"),
    ],
)
def test_what_peft_cannot_hold_is_not_written(network, words, tmp_path):
    prompted = prompt_tuning(network(), 2, KEY)
    with pytest.raises(InputError, match=words):
        save_prompt(tmp_path / "x", prompted, prompted.params, base_name="org/tiny")
    assert not (tmp_path / "x").exists()


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
