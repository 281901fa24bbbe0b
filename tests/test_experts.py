"""Mixtures of experts: stacked kernels, routers, fewer ranks, shared factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

EXPERTS, ACTIVE, D, F = 4, 2, 6, 10


def mixture(params, x):
    """Sort tokens by expert, two ragged products, scatter back (with the router's weights)."""
    chances = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, chosen = jax.lax.top_k(chances, ACTIVE)
    expert, token = chosen.ravel(), jnp.repeat(jnp.arange(len(x)), ACTIVE)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=EXPERTS)
    rows = x[token[order]]
    h = jax.nn.gelu(jax.lax.ragged_dot(rows, params["up"], sizes))
    y = jax.lax.ragged_dot(h, params["down"], sizes)
    return jnp.zeros_like(x).at[token[order]].add(y * weights.ravel()[order][:, None])


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "router": {"kernel": jax.random.normal(keys[0], (D, EXPERTS))},
        "up": jax.random.normal(keys[1], (EXPERTS, D, F)),
        "down": jax.random.normal(keys[2], (EXPERTS, F, D)),
    }


X = jax.random.normal(jax.random.key(1), (5, D))
SITES = lj.find_sites(mixture, params(), X)


def attached(rules):
    frozen, trained = lj.attach(jax.random.key(2), params(), rules, SITES)
    return frozen, jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), trained
    )


def test_the_router_stays_frozen_unless_it_is_named():
    assert SITES["router/kernel"].router
    frozen, trained = attached({lj.all_linear: lj.lora(2)})
    assert sorted(trained) == ["down", "up"]
    assert list(attached({"router/kernel": lj.lora(2)})[1]) == ["router/kernel"]


def test_experts_share_the_rank_that_a_token_meets():
    _, trained = attached({lj.all_linear: lj.lora(rank=8, alpha=16, active_experts=ACTIVE)})
    assert trained["up"]["a"].shape == (EXPERTS, D, 4)
    frozen, _ = attached({"up": lj.lora(rank=1, active_experts=ACTIVE)})
    assert lj.adapted(frozen)["up"].method.hyper["rank"] == 1


@pytest.mark.parametrize("method", [lj.lora, lj.dora])
def test_the_outer_factor_can_be_one_for_all_experts(method):
    frozen, trained = attached({"up": method(2, share="a"), "down": method(2, share="b")})
    assert trained["up"]["a"].shape == (1, D, 2)
    assert trained["down"]["b"].shape == (1, 2, D)
    bound = lj.bind(frozen, trained)
    np.testing.assert_allclose(
        jax.jit(lj.factored(mixture))(bound, X),
        jax.jit(mixture)(lj.merge(frozen, trained), X),
        rtol=2e-4,
        atol=2e-5,
    )
    # Qwen3-30B-A3B's count per unit of rank, at this model's sizes: outer once, inner each.
    if method is lj.lora:
        assert lj.tree.count(trained) == 2 * (2 * D + 2 * EXPERTS * F)


def test_sharing_without_experts_is_refused():
    with pytest.raises(lj.InputError, match="has none"):
        attached({"router/kernel": lj.lora(2, share="a")})
    with pytest.raises(lj.InputError, match="only a trained factor"):
        lj.lora(2, share="a", freeze_a=True)


def test_only_routed_tokens_give_an_expert_a_gradient():
    frozen, trained = attached({lj.all_linear: lj.lora(2)})
    one = X[:1]

    def loss(trained):
        return jnp.sum(lj.factored(mixture)(lj.bind(frozen, trained), one) ** 2)

    grads = jax.jit(jax.grad(loss))(trained)
    routed = jax.lax.top_k(one @ params()["router"]["kernel"], ACTIVE)[1][0]
    idle = [e for e in range(EXPERTS) if e not in routed]
    for kernel in grads.values():
        for factor in kernel.values():
            assert not np.any(factor[jnp.array(idle)])
            assert np.any(factor[routed])


@pytest.mark.parametrize("method", [lj.lora(2), lj.dora(2)], ids=str)
def test_many_adapters_at_once_where_jax_cannot_map_the_operation(method):
    with pytest.raises(NotImplementedError):  # the reason for a rule of our own
        jax.vmap(lambda w: jax.lax.ragged_dot(X, w, jnp.array([2, 3])))(jnp.ones((3, 2, D, F)))
    frozen, trained = attached({lj.all_linear: method})
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), trained)

    def loss(trained):
        return jnp.sum(lj.factored(mixture)(lj.bind(frozen, trained), X) ** 2)

    together = jax.jit(jax.vmap(jax.value_and_grad(loss)))(many)
    single = jax.jit(jax.value_and_grad(loss))
    for i in range(3):
        alone = single(jax.tree.map(lambda x, i=i: x[i], many))
        ours = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, alone
        )


def test_one_expert_is_a_dense_layer():
    def apply(params, x):
        return jax.lax.ragged_dot(x, params["w"], jnp.array([len(x)]))

    def dense(params, x):
        return x @ params["w"][0]

    w = {"w": params()["up"][:1]}
    frozen, trained = lj.attach(jax.random.key(2), w, {"w": lj.dora(2)}, lj.find_sites(apply, w, X))
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    bound = lj.bind(frozen, trained)
    np.testing.assert_allclose(
        lj.factored(apply)(bound, X), lj.factored(dense)(bound, X), rtol=1e-5
    )


def test_the_router_of_experts_taken_one_by_one_is_known():
    def apply(params, x):
        scores = jax.nn.softmax(x @ params["moe"]["router"])
        return sum(scores[:, i : i + 1] * (x @ params["moe"]["up"][i]) for i in range(EXPERTS))

    weights = {"moe": {"router": jnp.ones((D, EXPERTS)), "up": params()["up"]}}
    sites = lj.find_sites(apply, weights, X)
    assert [path for path, site in sites.items() if lj.all_linear(site)] == ["moe/up"]
