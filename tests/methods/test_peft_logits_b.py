"""What peft recorded for adapters of these methods on a tiny Llama."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_bases import ADAPTERS, RECORDED, base, distance, logits
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.methods import boft, hra, ia3, ia3_rules, oft

ATTENTION = "layers/attn/{}_proj/kernel"
Q, K, V = (ATTENTION.format(name) for name in "qkv")
DOWN = "layers/mlp/down_proj/kernel"
MODULES = {Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj"}
MODULES[DOWN] = "mlp.down_proj"
CASES = {
    "hra": ({Q: hra(4), V: hra(4)}, {"u": "hra_u"}),
    "oft": ({Q: oft(4), V: oft(4)}, {"q": "oft_R.weight"}),
    "boft": ({Q: boft(4), V: boft(4)}, {"r": "boft_R", "s": "boft_s"}),
    "ia3": ({K: ia3(), V: ia3(), DOWN: ia3(feedforward=True)}, {"l": "ia3_l"}),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_logits(name):
    rules, names = CASES[name]
    model, sites = base()
    saved = load_file(ADAPTERS / name / "adapter_model.safetensors")
    if name == "ia3":
        targets = "|".join((K, V, DOWN))
        assert ia3_rules(sites, model.params, targets, feedforward=DOWN) == rules
    frozen, start = lj.attach(jax.random.key(0), model.params, rules, sites)
    trained = {}
    for path, arrays in start.items():
        layers = [f"base_model.model.model.layers.{i}.{MODULES[path]}" for i in range(2)]
        trained[path] = {
            n: jnp.stack([saved[f"{layer}.{names[n]}"].reshape(x.shape[1:]) for layer in layers])
            for n, x in arrays.items()
        }
    assert sum(x.size for x in jax.tree.leaves(trained)) == sum(x.size for x in saved.values())
    ours = logits(model, frozen, trained)
    assert distance(ours, RECORDED[f"logits/{name}"]) < 1e-5
    assert distance(ours, np.asarray(RECORDED["base/llama"])) > 1e-3
