"""PEFT's files for other models than Llamas: convolutions, experts, fused kernels, heads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_bases import ADAPTERS, IDS, base
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.io import names
from lora_jax.io.peft import load_peft, save_peft

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def random(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def tensors(folder):
    return {k.removeprefix(PREFIX): v for k, v in load_file(folder / WEIGHTS).items()}


def exact(folder, name):
    ours, theirs = tensors(folder), tensors(ADAPTERS / name)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def convolve(x, w, window):
    letters = "HW"[: len(window)]
    dims = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return jax.lax.conv_general_dilated(x, w, window, "SAME", dimension_numbers=dims)


def conv_net(params, image, line, x):
    one = convolve(image, params["conv"]["kernel"], (2, 2))
    return one, convolve(line, params["conv1"]["kernel"], (1,)), x @ params["fc"]["kernel"]


CONV_NAMES = {f"{name}/kernel": f"{name}.weight" for name in ("conv", "conv1", "fc")}


def conv_base():
    conv, conv1, fc, image, line, x = random(
        (3, 3, 3, 8), (3, 8, 4), (8, 5), (1, 5, 6, 3), (1, 7, 8), (2, 8)
    )
    params = {n: {"kernel": w} for n, w in (("conv", conv), ("conv1", conv1), ("fc", fc))}
    return params, lj.find_sites(conv_net, params, image, line, x)


def test_convolutions(tmp_path):
    params, sites = conv_base()
    frozen, trained = load_peft(ADAPTERS / "conv", params, sites, names=CONV_NAMES)
    merged, file = lj.merge(frozen, trained), tensors(ADAPTERS / "conv")
    for name, sizes in (("conv", "hw"), ("conv1", "h")):
        a, b = file[f"{name}.lora_A.weight"], file[f"{name}.lora_B.weight"]
        b = b.reshape(b.shape[:2])
        update = 4 * np.einsum(f"kc{sizes},ok->{sizes}co", a, b)  # alpha 8, rank 2
        change = merged[name]["kernel"] - params[name]["kernel"]
        assert np.allclose(change, update, atol=1e-5)
    save_peft(tmp_path / "x", frozen, trained, base_name="x", names=CONV_NAMES, task_type=None)
    exact(tmp_path / "x", "conv")


def test_a_convolution_under_dora(tmp_path):
    params, sites = conv_base()
    frozen, trained = load_peft(ADAPTERS / "conv_dora", params, sites, names=CONV_NAMES)
    merged, file = lj.merge(frozen, trained), tensors(ADAPTERS / "conv_dora")
    norms = np.linalg.norm(np.asarray(merged["conv"]["kernel"]).reshape(-1, 8), axis=0)
    assert np.allclose(norms, np.abs(file["conv.lora_magnitude_vector"].ravel()), rtol=1e-5)
    save_peft(tmp_path / "x", frozen, trained, base_name="x", names=CONV_NAMES)
    exact(tmp_path / "x", "conv_dora")


def test_methods_for_linear_kernels_alone_are_refused_on_convolutions(tmp_path):
    params, sites = conv_base()
    frozen, trained = lj.attach(jax.random.key(0), params, {"conv/kernel": lj.hra(rank=2)}, sites)
    with pytest.raises(InputError, match=r"PEFT's HRA has no hra on 'conv', which is conv"):
        save_peft(tmp_path / "x", frozen, trained, base_name="x", names=CONV_NAMES)


DROPOUT = {"rank_dropout": 0.25, "module_dropout": 0.125}
ON_WINDOWS = {
    "loha": lj.loha(2, 3, **DROPOUT),
    "loha with cores": lj.loha(2, 3, effective_conv=True),
    "lokr": lj.lokr(1, 3, factor=2, **DROPOUT, rank_dropout_scale=True),
    "lokr with cores": lj.lokr(1, 3, effective_conv=True, decompose_both=True),
}


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("name", ON_WINDOWS)
def test_updates_of_other_forms_on_convolutions(name, noted, tmp_path):
    (params, sites), method = conv_base(), ON_WINDOWS[name]
    frozen, trained = lj.attach(jax.random.key(0), params, {".*": method}, sites)
    trained = jax.tree.map(lambda x: x + 0.3, trained)
    save_peft(tmp_path / "x", frozen, trained, base_name="x", names=CONV_NAMES, task_type=None)
    assert ("hada_t1" in str(tensors(tmp_path / "x").keys())) == (name == "loha with cores")
    assert ("lokr_t2" in str(tensors(tmp_path / "x").keys())) == (name == "lokr with cores")
    if not noted:
        (tmp_path / "x" / "lora_jax.json").unlink()
    again = load_peft(tmp_path / "x", params, sites, names=CONV_NAMES)
    assert jax.tree.structure(again) == jax.tree.structure((frozen, trained))
    assert jax.tree.all(jax.tree.map(np.array_equal, again[1], trained))
    methods = {node.method for node in lj.adapter.adapted(again[0]).values()}
    assert {m.hyper == method.hyper for m in methods} == {True}


def test_a_convolution_in_groups_is_refused(tmp_path):
    params, x = {"conv": {"kernel": jnp.ones((3, 2, 8))}}, jnp.ones((1, 7, 4))

    def apply(params, x):
        w, letters = params["conv"]["kernel"], ("NHC", "HIO", "NHC")
        groups = {"dimension_numbers": letters, "feature_group_count": 2}
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", **groups)

    sites = lj.find_sites(apply, params, x)
    adapter = lj.attach(jax.random.key(0), params, {".*": lj.lora(rank=2)}, sites)
    with pytest.raises(InputError, match=r"'conv/kernel', a convolution in groups"):
        save_peft(tmp_path / "x", *adapter, base_name="x", names=CONV_NAMES)


def test_a_kernel_that_the_base_stores_the_other_way_round(tmp_path):
    weight, x = random((16, 48), (3, 16))
    params = {"h": {"c_attn": {"kernel": weight[None]}}}
    table = {"h/c_attn/kernel": "transformer.h.{}.attn.c_attn.weight"}
    sites = lj.find_sites(
        lambda p, x: jax.vmap(jnp.dot, (None, 0))(x, p["h"]["c_attn"]["kernel"]), params, x
    )
    frozen, trained = load_peft(ADAPTERS / "gpt2_conv1d", params, sites, names=table)
    stem, file = "transformer.h.0.attn.c_attn", tensors(ADAPTERS / "gpt2_conv1d")
    update = 2 * (file[f"{stem}.lora_B.weight"] @ file[f"{stem}.lora_A.weight"]).T
    change = lj.merge(frozen, trained)["h"]["c_attn"]["kernel"][0] - weight
    assert np.allclose(change, update, atol=1e-6)
    save_peft(tmp_path / "x", frozen, trained, base_name="x", names=table)
    exact(tmp_path / "x", "gpt2_conv1d")


EXPERT_NAMES = {
    "q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "up": "model.layers.{}.mlp.experts.gate_up_proj",
    "down": "model.layers.{}.mlp.experts.down_proj",
}


def experts(layers):
    up, down, q, x, y = random(
        (layers, 4, 16, 64), (layers, 4, 32, 16), (layers, 16, 16), (5, 16), (5, 32)
    )
    sizes = jnp.array([2, 0, 1, 2])

    def apply(params, x, y):
        def layer(carry, w):
            up, down, q = w
            y_up, y_down = (jax.lax.ragged_dot(i, m, sizes) for i, m in ((x, up), (y, down)))
            return carry, (y_up, y_down, x @ q)

        return jax.lax.scan(layer, 0, (params["up"], params["down"], params["q"]["kernel"]))[1]

    params = {"up": up, "down": down, "q": {"kernel": q}}
    return params, lj.find_sites(apply, params, x, y)


def test_experts(tmp_path):
    file = tensors(ADAPTERS / "moe_target_parameters")
    layers = 1 + max(int(key.split(".")[2]) for key in file)
    params, sites = experts(layers)
    frozen, trained = load_peft(
        ADAPTERS / "moe_target_parameters", params, sites, names=EXPERT_NAMES
    )
    merged = lj.merge(frozen, trained)
    for path, inner in (("up", ".base_layer"), ("down", "")):
        for layer in range(layers):
            stem = f"model.layers.{layer}.mlp.experts{inner}"
            a = file[f"{stem}.lora_A.weight"].reshape(4, 2, -1)  # expert, rank, in
            b = file[f"{stem}.lora_B.weight"].reshape(-1, 2, 4)  # out, rank, expert
            update = 4 * np.einsum("ore,eri->eio", b, a)
            change = merged[path][layer] - params[path][layer]
            assert np.allclose(change, update, atol=1e-5)
    save_peft(tmp_path / "x", frozen, trained, base_name="x", names=EXPERT_NAMES)
    exact(tmp_path / "x", "moe_target_parameters")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]


def test_experts_that_share_a_factor_are_written_one_by_one(tmp_path):
    params, sites = experts(2)
    rules = {"up": lj.lora(rank=2, share="a")}
    frozen, trained = lj.attach(jax.random.key(0), params, rules, sites)
    trained = jax.tree.map(lambda x: x + 0.3, trained)
    save_peft(tmp_path / "x", frozen, trained, base_name="x", names=EXPERT_NAMES)
    again = load_peft(tmp_path / "x", params, sites, names=EXPERT_NAMES)
    assert np.allclose(lj.merge(*again)["up"], lj.merge(frozen, trained)["up"], atol=1e-5)


def test_a_classifier_over_a_llama(tmp_path):
    model, _ = base()
    params = {**model.params, "score": {"kernel": jnp.ones((16, 3))}}

    def apply(params, ids):
        trunk = {name: value for name, value in params.items() if name != "score"}
        return model.hidden(trunk, ids)[:, -1] @ params["score"]["kernel"]

    def named(path, layer):
        return "score.weight" if path == "score/kernel" else names.to_hf(path, layer)

    sites = lj.find_sites(apply, params, IDS)
    frozen, trained = load_peft(ADAPTERS / "seq_cls", params, sites, names=named)
    file = tensors(ADAPTERS / "seq_cls")
    assert np.array_equal(trained["score/kernel"]["w"].T, file["score.weight"])
    save_peft(tmp_path / "x", frozen, trained, base_name="x", names=named, task_type="SEQ_CLS")
    exact(tmp_path / "x", "seq_cls")


def test_what_has_no_name(tmp_path):
    params, sites = conv_base()
    frozen, trained = lj.attach(jax.random.key(0), params, {"fc/kernel": lj.lora(rank=2)}, sites)
    table = {"conv/kernel": "conv.weight"}
    with pytest.raises(InputError, match="'fc/kernel' is adapted, but names= has no torch name"):
        save_peft(tmp_path / "x", frozen, trained, base_name="x", names=table)
