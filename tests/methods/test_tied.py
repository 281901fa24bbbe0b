"""One pair of factors for several layers: counts, gradients, mixed stacks, files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import slow_but

import lora_jax as lj
from lora_jax.io.native import load_adapter, save_adapter
from lora_jax.lora_drop import untied
from lora_jax.method import sides
from lora_jax.methods import dora, tied

L, D_IN, D_OUT, RANK = 4, 6, 5, 2
OWN = lj.lora(rank=RANK, alpha=3.0)
SHARED = tied(OWN, group="up")
MIXED = {"up": [OWN, SHARED, SHARED, OWN], "down": tied(OWN, group="down")}
RULES = {
    "whole stacks": {"up": SHARED, "down": tied(OWN, group="down")},
    "mixed": MIXED,
    "shared first": {"up": [SHARED, OWN, OWN, SHARED]},
    "loose too": {"up": [OWN, SHARED, OWN, OWN], "head": tied(OWN, "up"), "down": OWN},
    "with ranks": {"up": [lj.lora(rank=3), SHARED, lj.lora(rank=1), SHARED]},
    "dora": {"up": [tied(dora(rank=2)), dora(rank=2), tied(dora(rank=2)), dora(rank=1)]},
}


def apply(params, x):
    def body(h, layer):
        return h + jnp.tanh(h @ layer[0]) @ layer[1], None

    return jax.lax.scan(body, x, (params["up"], params["down"]))[0] @ params["head"]


X = np.random.default_rng(9).standard_normal((3, D_IN))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def model():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (L, D_IN, D_OUT)),
        "down": jax.random.normal(keys[1], (L, D_OUT, D_IN)),
        "head": jax.random.normal(keys[2], (D_IN, D_OUT)),
    }
    return params, lj.find_sites(apply, params, X)


def moved(rules, seed=1):
    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(1), params, rules, sites)
    rng = np.random.default_rng(seed)
    drift = lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return frozen, jax.tree.map(drift, trained)


def close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), ours, theirs)


@pytest.mark.parametrize("name", RULES)
def test_fresh_merged_and_factored_agree(name):
    params, sites = model()
    fresh = lj.attach(jax.random.key(1), params, RULES[name], sites)
    close(lj.factored(apply)(lj.bind(*fresh), X), apply(params, X))
    frozen, trained = moved(RULES[name])
    y = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), X)
    close(y, apply(lj.merge(frozen, trained), X))
    assert np.abs(y - apply(params, X)).max() > 0.1


@pytest.mark.parametrize("name", slow_but(RULES, ("mixed",)))
def test_the_gradient_of_a_shared_pair_is_the_sum_over_its_layers(name):
    frozen, trained = moved(RULES[name])
    plain, copies = untied(frozen, trained)

    def loss(trained, frozen, transform=lj.factored):
        return jnp.sum(jnp.sin(transform(apply)(lj.bind(frozen, trained), X)))

    grads, wanted = jax.grad(loss)(trained, frozen), jax.grad(loss)(copies, plain)
    close(grads, jax.grad(loss)(trained, frozen, lj.materialised))
    for pool in [name for name in trained if name.startswith("shared/")]:
        summed = {n: np.zeros_like(x) for n, x in grads[pool].items()}
        for path, node in lj.adapted(frozen).items():
            for layer, method in layers(node):
                if node.pool == pool and method.factory is tied:
                    for part in summed:
                        summed[part] += wanted[path][layer][part] if layer else total(wanted, path, part)  # noqa: E501  # fmt: skip
        close(grads[pool], summed)
    for path, node in lj.adapted(frozen).items():
        for layer, method in layers(node):
            if method.factory is not tied:
                ours = grads[path][layer] if layer else grads[path]
                close(ours, wanted[path][layer] if layer else wanted[path])


def layers(node):
    """The method of each layer with its name in the trained dict, "" where all have one."""
    if isinstance(node.methods, lj.Method):
        return [("", node.methods)]
    return [(str(i), method) for i, method in enumerate(node.methods)]


def total(grads, path, part):
    array = grads[path][part]
    return array.reshape(-1, *array.shape[-2:]).sum(0)


def test_the_count():
    """(k + [k < L]) r (d_in + d_out) for k layers with factors of their own."""
    _, trained = moved({"up": [OWN, SHARED, SHARED, OWN]})
    assert lj.tree.count(trained) == (2 + 1) * RANK * (D_IN + D_OUT)
    _, trained = moved({"up": SHARED, "down": tied(OWN, "down")})
    assert lj.tree.count(trained) == 2 * RANK * (D_IN + D_OUT)


@pytest.mark.parametrize("name", RULES)
def test_files_hold_the_pair_once(name, tmp_path):
    frozen, trained = moved(RULES[name])
    folder = save_adapter(tmp_path / "adapter", frozen, trained)
    again = load_adapter(folder, *model())
    jax.tree.map(np.testing.assert_array_equal, again, (frozen, trained))


@pytest.mark.parametrize("name", RULES)
def test_untied_is_the_same_function_without_pools(name):
    frozen, trained = moved(RULES[name])
    plain, copies = untied(frozen, trained)
    assert not [path for path in copies if path.startswith("shared/")]
    close(lj.merge(plain, copies), lj.merge(frozen, trained))


def test_equal_methods_of_one_group_are_one_program():
    assert tied(lj.lora(rank=2), "q") == tied(lj.lora(rank=2), "q") != tied(lj.lora(rank=2), "k")
    assert SHARED.forward == OWN.forward
    assert sides(SHARED, lookup=False)[1] == sides(OWN, lookup=False)[1]


def test_what_is_refused():
    for method in (lj.full(), lj.lora(freeze_a=True), tied(OWN), lj.lora(init="pissa")):
        with pytest.raises(lj.InputError, match="cannot share a and b"):
            tied(method)
    with pytest.raises(lj.InputError, match="give a method"):
        tied("lora")
    with pytest.raises(lj.InputError, match="give each shape a group of its own"):
        moved({"up": SHARED, "down": SHARED})
