"""Sums of adapters: what each method promises, over stacks, tables and convolutions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from many_kernels import IDS, KERNELS, PARAMS, SITES, adapter, apply, change, close, total
from tables import slow_but

import lora_jax as lj
from lora_jax.compose import METHODS, weighted_sum

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text())
EVERY = {".*": None} | dict.fromkeys(KERNELS, lj.lora(rank=2, alpha=3.0))
EVERY = {path: rule for path, rule in EVERY.items() if rule}
KEY = jax.random.key(7)


def closed_form(shape, k):
    n = np.arange(1, np.prod(shape) + 1, dtype=np.float64)
    return np.sin(0.37 * n**2 + k).reshape(shape)


def golden_pair(a, b, scale):
    params = {"w": jnp.asarray(closed_form((12, 8), 2) / 2)}
    sites = lj.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((3, 12)))
    rules = {"w": lj.lora(rank=2, alpha=2 * scale)}
    frozen, _ = lj.attach(jax.random.key(0), params, rules, sites)
    return frozen, {"w": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}


GOLDEN_METHODS = {
    "linear": {},
    "cat": {},
    "svd": {"rank": 2},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "ties_svd": {"density": 0.5, "rank": 2},
    "magnitude_prune_svd": {"density": 0.5, "rank": 2},
}


@pytest.mark.parametrize("method", GOLDEN_METHODS)
def test_golden(method):
    with jax.enable_x64(True):
        first = golden_pair(closed_form((12, 2), 4), closed_form((2, 8), 5), 3.0)
        second = golden_pair(closed_form((12, 2), 46), closed_form((2, 8), 47), 1.0)
        pairs = [first, second]
        frozen, trained = weighted_sum(pairs, [0.7, -0.4], method, **GOLDEN_METHODS[method])
        assert frozen["w"].frozen["scale"] == 1
        delta = np.asarray(trained["w"]["a"] @ trained["w"]["b"])
        flat = delta.ravel()
        found = [flat.sum(), (flat**2).sum(), flat[0], flat[-1]]
        np.testing.assert_allclose(found, GOLDEN[f"merge_{method}"]["delta"], rtol=1e-9)


WEIGHTS = (0.7, -0.4, 1.3)


def three():
    """Adapters of unequal rank and alpha on unequal sets of kernels; one is DoRA in no kernel."""
    first = adapter(EVERY, 1)
    second = adapter({"blocks/(up|down)": lj.lora(rank=3), "conv": lj.lora(rank=1, alpha=2.0)}, 2)
    third = adapter({"blocks/down": [lj.lora(rank=1), lj.lora(rank=2, alpha=5.0)]}, 3)
    return [first, second, third]


@pytest.mark.parametrize("method", slow_but(["cat", "svd"], ["cat"]))
def test_sums_that_are_exact(method):
    pairs = three()
    made = weighted_sum(pairs, WEIGHTS, method, rank=99 if method == "svd" else None)
    close(change(*made), total(pairs, WEIGHTS))
    for path, node in lj.adapted(made[0]).items():
        rank = made[1][path]["a"].shape[-1]
        assert node.method == lj.lora(rank=rank, alpha=float(rank))
        np.testing.assert_array_equal(node.frozen["scale"], jnp.ones(node.site.stack))
    outputs = lj.factored(apply)(lj.bind(*made), IDS)
    close(outputs, apply(lj.merge(*made), IDS))


def test_the_base_is_shared_and_not_copied():
    frozen, _ = weighted_sum(three(), WEIGHTS)
    assert frozen["table"].frozen["w"] is PARAMS["table"]
    assert frozen["blocks"]["up"].frozen["w"] is PARAMS["blocks"]["up"]
    assert frozen["blocks"]["bias"] is PARAMS["blocks"]["bias"]


def test_svd_is_the_best_of_its_rank():
    pairs = [adapter(EVERY, 1), adapter(EVERY, 2)]
    wanted = total(pairs, (0.5, 0.5))
    made = change(*weighted_sum(pairs, (0.5, 0.5), "svd", rank=2))
    for layer in range(2):
        delta, ours = wanted["blocks"]["up"][layer], made["blocks"]["up"][layer]
        tail = np.linalg.svd(delta)[1][2:]
        np.testing.assert_allclose(np.linalg.norm(delta - ours), np.linalg.norm(tail), rtol=1e-4)
    trained = weighted_sum(pairs, (0.5, 0.5), "svd")[1]["conv"]
    assert trained["a"].shape == (18, 2)  # the largest rank of theirs
    np.testing.assert_allclose(trained["a"].T @ trained["a"], np.eye(2), atol=1e-5)


def test_a_formed_update_and_a_product_give_the_same_svd():
    pairs = [adapter(EVERY, 1), adapter(EVERY, 2)]
    plain = weighted_sum(pairs, (1.0, -0.5), "svd", rank=3)
    with pytest.warns(UserWarning, match="nothing is pruned"):
        formed = weighted_sum(pairs, (1.0, -0.5), "magnitude_prune_svd", rank=3, density=1.0)
    close(change(*formed), change(*plain))


def test_linear_has_cross_terms_and_one_adapter_has_none():
    pairs = [adapter(EVERY, 1), adapter(EVERY, 2)]
    a = [pair[1]["head"]["a"] for pair in pairs]
    b = [pair[1]["head"]["b"] for pair in pairs]
    root = np.sqrt(np.array([0.7, 0.4]) * 1.5)
    _, trained = weighted_sum(pairs, (0.7, -0.4), "linear")
    close(trained["head"]["a"], root[0] * a[0] - root[1] * a[1])
    close(trained["head"]["b"], root[0] * b[0] + root[1] * b[1])
    for method in METHODS:
        prune = {"density": 0.2, "key": KEY} if method not in ("cat", "svd", "linear") else {}
        one = weighted_sum(pairs[:1], [-0.7], method, **prune)
        close(change(*one), total(pairs[:1], [-0.7]))


def test_dare_of_everything_is_linear_and_its_mean_too():
    pairs = [adapter({"head": EVERY["head"]}, seed) for seed in (1, 2)]
    with pytest.warns(UserWarning):
        whole = weighted_sum(pairs, (0.5, 0.5), "dare_linear", density=1.0)
    exact = weighted_sum(pairs, (0.5, 0.5), "linear")
    close(whole[1], exact[1])

    def draw(key):
        return weighted_sum(pairs, (0.5, 0.5), "dare_linear", density=0.4, key=key)[1]["head"]

    draws = jax.vmap(draw)(jax.random.split(KEY, 4000))
    for name, array in exact[1]["head"].items():
        error = np.abs(np.mean(draws[name], axis=0) - array)
        assert (error < 4 * np.std(draws[name], axis=0) / np.sqrt(4000) + 1e-6).all()


@pytest.mark.parametrize("method", [m for m in METHODS if "dare" in m or "ties" in m])
def test_density_zero_is_zero(method):
    pairs = [adapter({"head": EVERY["head"]}, seed) for seed in (1, 2)]
    made = weighted_sum(pairs, (0.5, 0.5), method, density=0.0, key=KEY)
    close(change(*made), jax.tree.map(jnp.zeros_like, PARAMS), 1e-7)


def test_layers_are_tensors_of_their_own():
    """A stack combines as its layers do one by one."""
    pairs = [adapter({"blocks/up": EVERY["head"]}, seed) for seed in (1, 2)]
    whole = weighted_sum(pairs, (0.7, 0.4), "ties", density=0.5)[1]["blocks/up"]
    sites = lj.find_sites(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 7))}, jnp.ones((2, 6)))
    for layer in range(2):
        single = []
        for _, trained in pairs:
            params = {"w": PARAMS["blocks"]["up"][layer]}
            frozen, _ = lj.attach(KEY, params, {"w": EVERY["head"]}, sites)
            own = {name: x[layer] for name, x in trained["blocks/up"].items()}
            single.append((frozen, {"w": own}))
        one = weighted_sum(single, (0.7, 0.4), "ties", density=0.5)[1]["w"]
        close({name: x[layer] for name, x in whole.items()}, one, 1e-6)


def test_global_scope_prunes_and_votes_over_all_tensors():
    pairs = [adapter({"blocks/(up|down)": EVERY["head"]}, seed) for seed in (1, 2)]
    small = jax.tree.map(lambda x: 1e-3 * x, pairs[0][1]["blocks/up"])
    pairs[0][1]["blocks/up"] = small
    pairs[1][1]["blocks/up"] = small
    options = {"density": 0.3, "scope": "global"}
    trained = weighted_sum(pairs, (0.5, 0.5), "magnitude_prune", **options)[1]
    assert not trained["blocks/up"]["a"].any()  # the largest entries are all elsewhere
    kept = sum(
        int((weighted_sum([p, p], (1, 0), "magnitude_prune", **options)[1][n]["a"] != 0).sum())
        for p in pairs[:1]
        for n in ("blocks/up", "blocks/down")
    )
    assert kept == int(0.3 * 2 * 2 * (6 + 7))
    by_tensor = weighted_sum(pairs, (0.5, 0.5), "magnitude_prune", density=0.3)[1]
    assert by_tensor["blocks/up"]["a"].any()
    weighted_sum(three()[:1] + three()[:1], (1.0, 1.0), "ties_svd", rank=2, **options)


def test_methods_without_factors_have_svd_forms():
    pairs = [adapter({"head": lj.dora(rank=2)}, 1), adapter({"head": lj.lora(rank=3)}, 2)]
    made = weighted_sum(pairs, (0.5, 2.0), "svd", rank=5)
    close(change(*made), total(pairs, (0.5, 2.0)))
    assert weighted_sum(pairs, (0.5, 2.0), "svd")[1]["head"]["a"].shape == (6, 3)
    with pytest.raises(lj.InputError, match=r"'head' is adapted by dora.*method='svd'"):
        weighted_sum(pairs, (0.5, 2.0), "cat")


def test_whole_parameters_are_combined_whole():
    rules = {"blocks/bias": lj.full(), "head": lj.full()}
    pairs = [adapter({**EVERY, **rules}, 1), adapter({"blocks/bias": lj.full()}, 2)]
    weights = (0.7, -0.4)
    made = weighted_sum(pairs, weights, params=PARAMS)
    close(change(*made), total(pairs, weights))
    assert made[0]["blocks"]["bias"].method == lj.full()
    with pytest.raises(lj.InputError, match=r"'blocks/bias' is in none.*give params"):
        weighted_sum(pairs, weights)


def test_a_residual_base_is_not_mistaken_for_the_base():
    pairs = [adapter({"head": lj.lora(rank=2, init="pissa")}, 1)] * 2
    with pytest.raises(lj.InputError, match=r"'head' is in none.*give params"):
        weighted_sum(pairs, (0.5, 1.0))
    made = weighted_sum(pairs, (0.5, 1.0), params=PARAMS)
    close(change(*made), total(pairs, (0.5, 1.0)))
    assert made[0]["head"].frozen["w"] is PARAMS["head"]


def test_what_one_adapter_keeps_another_may_lack():
    """A kernel that the first one rewrites is found in the second, which leaves it alone."""
    pairs = [
        adapter({"head": lj.lora(rank=2, init="pissa")}, 1),
        adapter({"conv": EVERY["conv"]}, 2),
    ]
    close(change(*weighted_sum(pairs, (0.5, 1.0))), total(pairs, (0.5, 1.0)))


def test_shared_experts():
    def experts(params, x, sizes):
        return jax.lax.ragged_dot(x, params["w"], sizes)

    params = {"w": jax.random.normal(KEY, (3, 4, 5))}
    inputs = jax.random.normal(KEY, (6, 4)), jnp.array([2, 1, 3])
    sites = lj.find_sites(experts, params, *inputs)
    rules = {"w": lj.lora(rank=2, share="a")}
    pairs = []
    for seed in (1, 2):
        frozen, trained = lj.attach(jax.random.key(seed), params, rules, sites)
        pairs.append((frozen, jax.tree.map(lambda x, s=seed: x + 0.1 * s, trained)))
    made = weighted_sum(pairs, (0.5, -2.0))
    moves = [lj.merge(*pair)["w"] - params["w"] for pair in pairs]
    close(lj.merge(*made)["w"] - params["w"], 0.5 * moves[0] - 2 * moves[1])


BAD = [
    ({"method": "sum"}, "method='sum'.*cat, svd, linear"),
    ({"method": "ties"}, "density=None.*0 .. 1"),
    ({"method": "ties", "density": -0.1}, "density=-0.1"),
    ({"method": "dare_linear", "density": 0.5}, "give key="),
    ({"method": "ties", "density": 0.5, "sign": "most"}, "sign='most'"),
    ({"scope": "all"}, "scope='all'"),
    ({"method": "svd", "rank": 0}, "rank=0"),
    ({"weights": (1.0,)}, "2 adapters and 1 weights"),
    ({"weights": (1.0, float("nan"))}, "finite"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments(change, message):
    pairs = [adapter({"head": EVERY["head"]}, seed) for seed in (1, 2)]
    arguments = {"adapters": pairs, "weights": (1.0, 1.0)} | change
    with pytest.raises(lj.InputError, match=message):
        weighted_sum(**arguments)


def test_unequal_ranks_and_bases():
    pairs = [adapter({"head": lj.lora(rank=r)}, r) for r in (2, 3)]
    with pytest.raises(lj.InputError, match=r"'head' have ranks \[2, 3\].*'cat' or 'svd'"):
        weighted_sum(pairs, (1.0, 1.0), "linear")
    other = {**PARAMS, "head": jnp.ones((6, 9))}
    with pytest.raises(lj.InputError, match=r"shape \(6, 9\).*\(6, 5\).*one base"):
        weighted_sum(pairs, (1.0, 1.0), params=other)
    assert set(SITES) == set(KERNELS)
