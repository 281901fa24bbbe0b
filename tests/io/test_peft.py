"""Adapter folders that peft saved, and files that do not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from peft_bases import (
    ADAPTERS,
    IDS,
    RECORDED,
    adapter,
    base,
    base_of,
    distance,
    logits,
    params_and_sites,
    same,
)
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.io.peft import load_peft, save_peft
from lora_jax.models.config import LlamaConfig
from lora_jax.models.model import param_shapes

# What peft saved and we save again bit for bit.
EXACT = ["lora_qv", "lora_all_linear", "lora_regex", "rslora", "dora", "rank_alpha_pattern"]
EXACT += ["init_gaussian", "init_mica", "init_orthogonal", "layers_to_transform", "dora_embed"]
EXACT += ["embed_no_base", "embed_tied", "modules_to_save", "bias_all", "bias_lora_only"]
EXACT += ["pissa_converted/final", "multi_adapter", "multi_adapter/second", "adalora", "vera"]
EXACT += ["loha", "lokr", "ia3", "vblora", "randlora", "miss", "fourierft", "hra", "oft", "boft"]
EXACT += ["ln_tuning"]
# What we save in another way: without base weights, converted, with projections, rounded.
FURTHER = ["embed_and_lm_head", "init_pissa", "init_olora", "vera_no_projection"]
FURTHER += ["vblora_topk_only"]
REFUSED = {
    "alora": "alora_invocation_tokens",
    "bdlora": "use_bdlora",
    "c3a": "peft_type 'C3A'",
    "init_pissa_niter_4": "path_initial_model_for_weight_conversion",
    "kasa": "kasa_config",
    "lora_bias": "lora_bias=True",
    "monteclora": "monteclora_config",
    "trainable_tokens": "trainable_token_indices",
    "trainable_tokens_standalone": "peft_type 'TRAINABLE_TOKENS'",
    "trainable_tokens_tied": "trainable_token_indices",
    "velora": "velora_config",
}
Q, V, DOWN = (f"layers/{n}/kernel" for n in ("attn/q_proj", "attn/v_proj", "mlp/down_proj"))
WEIGHTS = "adapter_model.safetensors"
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def read(name, **options):
    model, sites = base()
    return load_peft(ADAPTERS / name, model.params, sites, **options)


def changed(tmp_path, name, change=None, option=None):
    """A copy of a golden adapter with other tensors or options."""
    folder = tmp_path / "changed"
    shutil.copytree(ADAPTERS / name, folder)
    file = folder / "adapter_model.safetensors"
    if change:
        save_file(change(load_file(file)), file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | (option or {})))
    return folder


# --- what peft saved ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EXACT, *FURTHER])
def test_what_peft_saved_gives_its_logits(name, tmp_path):
    model, sites = base(base_of(name))
    frozen, trained = load_peft(ADAPTERS / name, model.params, sites)
    ours = logits(model, frozen, trained)
    assert distance(ours, RECORDED[f"logits/{name}"]) < 1e-5
    fresh = name.startswith("multi_adapter")
    assert (distance(ours, RECORDED[f"base/{base_of(name)}"]) > 1e-4) is not fresh
    save_peft(tmp_path / "again", frozen, trained, base_name="org/tiny")
    again = load_peft(tmp_path / "again", model.params, sites)
    assert distance(logits(model, *again), ours) < 1e-6
    tensors, theirs = (load_file(f / WEIGHTS) for f in (tmp_path / "again", ADAPTERS / name))
    if name in EXACT:
        assert same((frozen, trained), again)
        assert tensors.keys() == theirs.keys()
        assert all(np.array_equal(tensors[key], theirs[key]) for key in theirs)
    (tmp_path / "again" / "lora_jax.json").unlink()
    plain = load_peft(tmp_path / "again", model.params, sites)
    assert distance(logits(model, *plain), ours) < 1e-6


def test_ranks_and_alphas_by_pattern():
    frozen, trained = read("rank_alpha_pattern")
    assert lj.adapted(frozen)[Q].methods == lj.lora(rank=2, alpha=16)
    assert [m.hyper["rank"] for m in lj.adapted(frozen)[V].methods] == [4, 6]
    assert trained[V]["1"]["b"].shape == (6, 8)


def test_layers_to_transform_leaves_the_others_alone():
    frozen, trained = read("layers_to_transform")
    assert set(trained[Q]) == {"1"} and lj.adapted(frozen)[Q].methods[0] is None


@pytest.mark.parametrize(("name", "message"), REFUSED.items(), ids=REFUSED)
def test_what_would_load_wrongly_is_refused(name, message):
    with pytest.raises(InputError, match="not supported") as error:
        read(name)
    assert message in str(error.value)


# --- a file that does not fit --------------------------------------------------------------------


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lora_qv", ".weight", ".default.weight"),
        ("dora", ".weight", ".my adapter.weight"),
        ("dora", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
        ("dora", "lora_magnitude_vector", "lora_magnitude_vector.default"),
        ("dora", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
        ("dora_embed", "lora_embedding_A", "lora_embedding_A.default"),
        ("modules_to_save", "lm_head.", "lm_head.modules_to_save.default."),
        ("hra", "hra_u", "hra_u.default"),
        ("adalora", "lora_E", "lora_E.default"),
        ("adalora", "lora_A", "lora_A.default"),
        ("oft", "oft_R.", "oft_R.default."),
        ("vera", "vera_A", "vera_A.default"),
    ],
)
def test_other_spellings_of_the_keys(tmp_path, name, old, new):
    model, sites = base()
    folder = changed(tmp_path, name, renamed(old, new))
    assert same(load_peft(folder, model.params, sites)[1], read(name)[1])


def test_two_adapters_in_one_file(tmp_path):
    double = lambda t: t | renamed("_A.", "_A.other.")(t)  # noqa: E731
    with pytest.raises(InputError, match="two adapters"):
        load_peft(changed(tmp_path, "lora_qv", double), *params_and_sites())


def without(*keys):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


MISFITS = {
    "missing": (without(A0, B1), ["missing (2)", "layers.0.self_attn.q_proj.lora_A.weight"]),
    "surplus": (lambda t: t | {"x.lora_A.weight": t[A0]}, ["surplus (1): x.lora_A.weight"]),
    "shape": (lambda t: t | {A0: t[A0][:, :-1].copy()}, ["is [4, 15], expected [4, 16]"]),
    "rank": (lambda t: t | {A0: t[A0][:-1].copy()}, ["is [3, 16], expected [4, 16]"]),
    "all": (
        lambda t: without(B1)(t) | {"x": t[A0], A0: t[A0].T.copy()},
        ["missing (1)", "surplus (1)", "of another shape (1)"],
    ),
}


@pytest.mark.parametrize(("change", "messages"), MISFITS.values(), ids=MISFITS)
def test_a_file_that_does_not_fit_lists_the_difference(tmp_path, change, messages):
    with pytest.raises(InputError) as error:
        load_peft(changed(tmp_path, "lora_qv", change), *params_and_sites())
    for message in messages:
        assert message in str(error.value)


def test_ranks_must_be_those_of_the_pattern(tmp_path):
    folder = changed(tmp_path, "rank_alpha_pattern", option={"rank_pattern": {"q_proj": 2}})
    with pytest.raises(
        InputError, match=r"1\.self_attn\.v_proj.* is \[6, 16\], expected \[4, 16\]"
    ):
        load_peft(folder, *params_and_sites())


def test_a_base_with_fewer_layers():
    with pytest.raises(InputError, match=r"surplus \(4\): model\.layers\.1\.self_attn"):
        load_peft(ADAPTERS / "lora_qv", *params_and_sites(layers=1))


def test_a_base_of_other_dimensions():
    config = LlamaConfig(48, 20, 24, 3, 2, 1, 10, max_position_embeddings=64)
    params, (_, sites) = param_shapes(config), base()
    with pytest.raises(InputError, match=r"missing \(4\).*shape \(8\).*expected \[4, 20\]"):
        load_peft(ADAPTERS / "lora_qv", params, sites)


def test_targets_that_the_base_does_not_have(tmp_path):
    folder = changed(tmp_path, "lora_qv", option={"target_modules": ["c_attn"]})
    with pytest.raises(InputError, match=r"\['c_attn'\] finds no module.*model\.layers\.0"):
        load_peft(folder, *params_and_sites())


def test_a_tied_embedding_is_refused():
    for name in ("embed_no_base", "modules_to_save"):
        with pytest.raises(InputError, match="tied"):
            load_peft(ADAPTERS / name, *params_and_sites("llama_tied"))
    made = adapter({Q: lj.lora(), "embed/embedding": lj.full()}, "llama_tied")
    with pytest.raises(InputError, match="tied"):
        save_peft("unwritten", *made, base_name="org/tiny")


def test_a_norm_has_no_matrix(tmp_path):
    folder = changed(tmp_path, "lora_qv", option={"target_modules": ["q_proj", "norm"]})
    with pytest.raises(InputError, match=r"'model\.norm', which is a norm"):
        load_peft(folder, *params_and_sites())


def test_base_weights_of_its_own(tmp_path):
    key = "base_model.model.lm_head.base_layer.weight"
    folder = changed(tmp_path, "embed_and_lm_head", lambda t: t | {key: t[key] + 1})
    with pytest.raises(InputError, match="brings its own base weights"):
        load_peft(folder, *params_and_sites())


def test_a_bfloat16_file_is_read_in_float32(tmp_path):
    short = lambda t: {k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}  # noqa: E731
    _, trained = load_peft(changed(tmp_path, "lora_qv", short), *params_and_sites())
    leaves = jax.tree.leaves(trained)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    whole = jax.tree.leaves(read("lora_qv")[1])
    assert all(np.allclose(x, y, rtol=1e-2) for x, y in zip(leaves, whole, strict=True))


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        load_peft(tmp_path / "nowhere", *params_and_sites())
    folder = changed(tmp_path, "lora_qv")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_peft(folder, *params_and_sites())
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is a pickle and is not read"):
        load_peft(folder, *params_and_sites())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_peft(folder, *params_and_sites())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load_peft(folder, *params_and_sites())


# --- further kinds of adapters and bases ---------------------------------------------------------


def test_several_adapters_in_one_folder(tmp_path):
    by_name = load_peft(ADAPTERS / "multi_adapter", *params_and_sites(), adapter="second")
    assert same(by_name, read("multi_adapter/second"))
    with pytest.raises(InputError, match=r"no adapter 'third'; it has 'default', 'second'"):
        load_peft(ADAPTERS / "multi_adapter", *params_and_sites(), adapter="third")
    with pytest.raises(InputError, match="give adapter= one of 'final', 'init'"):
        read("pissa_converted")


def test_pissa_is_rebuilt_and_saved_at_twice_the_rank(tmp_path):
    frozen, trained = read("init_pissa")
    assert lj.adapted(frozen)[Q].method == lj.lora(rank=4, alpha=8, init="pissa")
    save_peft(tmp_path / "x", frozen, trained, base_name="org/tiny")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_a_start_that_no_file_holds(init, tmp_path):
    folder = changed(tmp_path, "lora_qv", option={"init_lora_weights": init})
    with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
        load_peft(folder, *params_and_sites())


def test_a_pruned_adalora(tmp_path):
    kept = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.v_proj": 0}
    pattern = {f"{name}.lora_E": [True] * n + [False] * (6 - n) for name, n in kept.items()}

    def pruned(tensors):
        found = {}
        for key, value in tensors.items():
            module, _, part = key.removeprefix("base_model.model.").rpartition(".")
            n = kept.get(module, 6)
            found[key] = np.ascontiguousarray(value[:, :n] if part == "lora_B" else value[:n])
        return {key: value for key, value in found.items() if value.size}

    folder = changed(tmp_path, "adalora", pruned, {"rank_pattern": pattern})
    frozen, trained = load_peft(folder, *params_and_sites())
    first = lj.adapted(frozen)[Q].methods[0]
    assert (first.hyper["rank"], first.hyper["initial_rank"]) == (2, 6)
    assert lj.adapted(frozen)[V].methods[1] is None
    save_peft(tmp_path / "x", frozen, trained, base_name="org/tiny")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {next(iter(pattern)): [True] * 2 + [False] * 4}
    assert same(load_peft(tmp_path / "x", *params_and_sites())[1], trained)


def test_replicated_layers_need_a_base_of_as_many():
    with pytest.raises(InputError, match="makes a base of 4 layers"):
        read("layer_replication")
    model, _ = base()
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), model.params["layers"])
    params = {**model.params, "layers": twice}
    sites = lj.find_sites(model.apply, params, IDS)
    frozen, trained = load_peft(ADAPTERS / "layer_replication", params, sites)
    ours = logits(model, frozen, trained)
    assert distance(ours, RECORDED["logits/layer_replication"]) < 1e-5


def test_a_tied_head_has_the_embeddings_factors(tmp_path):
    key = "base_model.model.lm_head.lora_A.weight"
    folder = changed(tmp_path, "embed_tied", lambda t: t | {key: t[key] + 1})
    with pytest.raises(InputError, match=r"is not .*lora_embedding_B transposed"):
        load_peft(folder, *params_and_sites("llama_tied"))


@pytest.mark.parametrize("name", ["fourierft", "hra", "miss", "dora"])
def test_layers_without_an_adapter_stay_as_they_are(name, tmp_path):
    upper = lambda t: {key: value for key, value in t.items() if ".layers.1." in key}  # noqa: E731
    folder = changed(tmp_path, name, upper, {"layers_to_transform": [1]})
    merged = lj.merge(*load_peft(folder, *params_and_sites()))
    plain = base()[0].params
    first, second = (
        distance(m, w)
        for m, w in zip(lj.tree.flatten(merged)[Q], lj.tree.flatten(plain)[Q], strict=True)
    )
    assert first < 1e-6 and second > 1e-3


def test_a_tied_head_has_the_embeddings_scale(tmp_path):
    folder = changed(tmp_path, "embed_tied", option={"alpha_pattern": {"lm_head": 2}})
    with pytest.raises(InputError, match="another scale than the tied 'lm_head'"):
        load_peft(folder, *params_and_sites("llama_tied"))


def test_ia3_feedforward_modules_are_targets(tmp_path):
    folder = changed(tmp_path, "ia3", option={"feedforward_modules": ["up_proj"]})
    with pytest.raises(InputError, match="names 'up_proj', which target_modules does not"):
        load_peft(folder, *params_and_sites())


def test_an_adapter_of_an_oft_before_its_format(tmp_path):
    folder = changed(tmp_path, "oft")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["oft_block_size"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"older than PEFT 0\.14"):
        load_peft(folder, *params_and_sites())
