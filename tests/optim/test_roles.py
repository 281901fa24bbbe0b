"""The role of every trained array follows from what it is, not from its name."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.optim import roles

L, D, F, V = 2, 6, 7, 11


def apply(params, ids):
    def block(h, p):
        return jnp.tanh(h @ p["up"] + p["bias"][None]) @ p["down"] * p["scale"][None], None

    h, _ = jax.lax.scan(block, params["table"][ids], params["blocks"])
    return h @ params["head"] + params["bias"][None]


def shapes():
    blocks = {"up": (L, D, F), "down": (L, F, D), "bias": (L, F), "scale": (L, D)}
    params = {"table": (V, D), "blocks": blocks, "head": (D, 3), "bias": (3,)}
    return jax.tree.map(jnp.ones, params, is_leaf=lambda x: isinstance(x, tuple))


def attached(rules):
    params = shapes()
    sites = lj.find_sites(apply, params, jnp.arange(4))
    return *lj.attach(jax.random.key(0), params, rules, sites), sites


RULES = {
    "table": lj.dora(rank=2),
    "blocks/up": lj.dora(rank=3),
    "blocks/down": [lj.lora(rank=1), None],
    "head": lj.lora(rank=2, freeze_a=True),
    "bias": lj.full(),
}


def test_roles_of_a_mixed_tree():
    frozen, trained, _ = attached(RULES)
    found = roles(frozen, trained)
    assert jax.tree.structure(found) == jax.tree.structure(trained)
    assert found == {
        "table": {"a": "embedding", "b": "embedding", "magnitude": "b"},
        "blocks/up": {"a": "a", "b": "b", "magnitude": "b"},
        "blocks/down": {"0": {"a": "a", "b": "b"}},
        "head": {"b": "b"},
        "bias": {"w": "b_no_decay"},
    }


def test_the_sites_tell_stacked_biases_from_kernels():
    whole = {"blocks/bias": lj.full(), "blocks/scale": lj.full(), "head": lj.full()}
    frozen, trained, sites = attached(whole | {"table": lj.full()})
    assert jax.tree.leaves(roles(frozen, trained)) == ["a"] * 4
    assert roles(frozen, trained, sites) == {
        "blocks/bias": {"w": "b_no_decay"},
        "blocks/scale": {"w": "b_no_decay"},
        "head": {"w": "a"},
        "table": {"w": "a"},
    }


def test_names_play_no_part():
    def turned():
        """A LoRA whose arrays have each other's names."""

        def init(key, w):
            first, second = np.zeros((w.shape[0], 2)), np.zeros((2, w.shape[1]))
            return {"w": w}, {"b": jnp.asarray(first), "a": jnp.asarray(second)}

        def weight(frozen, trained):
            return frozen["w"] + trained["b"] @ trained["a"]

        return lj.Method("turned", init, weight)

    frozen, trained, _ = attached({"head": turned()})
    assert roles(frozen, trained) == {"head": {"a": "b", "b": "a"}}


def test_arrays_of_a_pool():
    def pooled():
        def init(key, w):
            return {"w": w}, {"c": jnp.zeros(w.shape[1])}

        def common(key, shapes):
            return {}, {"bank": jnp.ones((4, 3)), "theta": jnp.ones(5)}

        def weight(frozen, trained):
            return frozen["w"] * (1 + trained["c"] * trained["theta"].sum())

        return lj.Method("pooled", init, weight, common=common)

    frozen, trained, _ = attached({"head": pooled()})
    expected = {"head": {"c": "b"}, "shared/pooled": {"bank": "a", "theta": "b"}}
    assert roles(frozen, trained) == expected
