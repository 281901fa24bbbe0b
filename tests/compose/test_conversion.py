"""Any adapter as a LoRA, and several adapters that take turns on one base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from many_kernels import IDS, KERNELS, PARAMS, adapter, apply, change, close

import lora_jax as lj
from lora_jax.compose import as_lora

RULES = {
    "table": lj.lora(rank=2, alpha=3.0),
    "conv": lj.lora(rank=2, init="pissa"),
    "blocks/up": lj.dora(rank=3),
    "blocks/down": [lj.lora(rank=1), lj.lora(rank=2, alpha=5.0)],
    "head": lj.lora(rank=1, freeze_a=True),
    "blocks/bias": lj.full(),
}


def test_products_are_exact_and_the_rest_is_reported():
    pair = adapter(RULES, 1)
    frozen, trained, report = as_lora(PARAMS, *pair)
    wanted, found = change(*pair), change(frozen, trained)
    assert {path: fit.rank for path, fit in report.items()} == {
        "table": 2, "conv": 4, "blocks/up": 3, "blocks/down": 2, "head": 1, "blocks/bias": None
    }  # fmt: skip
    assert {path for path, fit in report.items() if fit.error} == {"blocks/up"}
    up = wanted["blocks"].pop("up"), found["blocks"].pop("up")
    close(found, wanted)
    error = np.linalg.norm(up[0] - up[1]) / np.linalg.norm(up[0])
    assert report["blocks/up"].error == pytest.approx(error, rel=1e-3) and error > 0.1
    tails = [np.linalg.svd(x)[1][3:] for x in up[0]]
    assert error == pytest.approx(np.linalg.norm(tails) / np.linalg.norm(up[0]), rel=1e-3)
    for path in KERNELS:
        assert lj.adapted(frozen)[path].method.name == "lora"


def test_the_magnitude_of_dora_is_not_dropped():
    pair = adapter({"head": lj.dora(rank=2)}, 1)
    pair[1]["head"]["b"] *= 0  # nothing but the magnitude has moved
    frozen, trained, report = as_lora(PARAMS, *pair, rank=5)
    close(change(frozen, trained), change(*pair))
    assert report["head"].rank == 5 and report["head"].error < 1e-5
    assert np.abs(change(*pair)["head"]).max() > 1e-2


def test_a_smaller_rank_is_the_best_of_that_rank():
    pair = adapter({"blocks/up": lj.lora(rank=4)}, 1)
    frozen, trained, report = as_lora(PARAMS, *pair, rank=2)
    wanted, found = change(*pair)["blocks"]["up"], change(frozen, trained)["blocks"]["up"]
    tails = [np.linalg.svd(x)[1][2:] for x in wanted]
    assert np.linalg.norm(wanted - found) == pytest.approx(np.linalg.norm(tails), rel=1e-4)
    assert report["blocks/up"].rank == 2
    assert report["blocks/up"].error == pytest.approx(
        np.linalg.norm(tails) / np.linalg.norm(wanted), rel=1e-3
    )


def test_a_method_without_a_rank_needs_one():
    def scaled():
        def init(key, w):
            return {"w": w}, {"c": jnp.ones(w.shape[1])}

        return lj.Method("scaled", init, lambda f, t: f["w"] * t["c"])

    pair = adapter({"head": scaled()}, 1)
    with pytest.raises(lj.InputError, match=r"scaled\(\) of 'head' has no rank.*rank="):
        as_lora(PARAMS, *pair)
    frozen, trained, report = as_lora(PARAMS, *pair, rank=5)
    close(change(frozen, trained), change(*pair))


def test_adapters_take_turns_on_the_same_arrays():
    pairs = [
        adapter({".*(up|down)": lj.lora(rank=2, alpha=s), "head": lj.dora(rank=2)}, s)
        for s in (1, 9)
    ]
    for path in ("blocks/up", "blocks/down", "head"):
        held = [lj.adapted(frozen)[path].frozen["w"] for frozen, _ in pairs]
        assert held[0] is held[1] is lj.tree.flatten(PARAMS)[path]
    forward = jax.jit(lj.factored(apply))
    outputs = [forward(lj.bind(*pair), IDS) for pair in (*pairs, pairs[0])]
    assert forward._cache_size() <= 1
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2


def test_without_an_adapter_the_model_is_the_base_itself():
    frozen, trained = adapter({".*(up|down)": lj.lora(rank=2)}, 1)
    forward = jax.jit(lj.factored(apply))
    before = forward(PARAMS, IDS)
    forward(lj.bind(frozen, trained), IDS)
    np.testing.assert_array_equal(forward(PARAMS, IDS), before)
    np.testing.assert_array_equal(before, jax.jit(apply)(PARAMS, IDS))
