"""LoRA-FA: the corrected gradient is a projection, A is still, and x is not saved for later."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.optim import lora_fa
from lora_jax.train.step import init_state, make_step

L, T, D, F, R = 3, 5, 24, 30, 2
FA = lj.lora(rank=R, alpha=3.0, freeze_a=True)


def apply(params, x):
    return x @ params["w"]


def one(size=1.0, alpha=3.0):
    """A kernel under LoRA-FA, with `a` scaled."""
    params = {"w": jax.random.normal(jax.random.key(0), (D, F))}
    x = jax.random.normal(jax.random.key(1), (T, D))
    sites = lj.find_sites(apply, params, x)
    method = lj.lora(rank=R, alpha=alpha, freeze_a=True)
    frozen, trained = lj.attach(jax.random.key(2), params, {"w": method}, sites)
    frozen["w"].frozen["a"] *= size
    return frozen, trained, x


def corrected(frozen, grads, trained, delta=1e-8):
    """The gradient that the moments see: with b1 = 0 it is the first moment."""
    optimizer = lora_fa(1e-3, frozen, b1=0.0, delta=delta)
    return optimizer.update(grads, optimizer.init(trained), trained)[1].mu


@pytest.mark.parametrize(("size", "alpha"), [(1.0, 3.0), (100.0, 3.0), (0.1, 0.5)])
def test_the_update_is_the_projection_of_the_gradient(size, alpha):
    with jax.enable_x64(True):
        frozen, trained, _ = one(size, alpha)
        a = np.asarray(frozen["w"].frozen["a"], np.float64)
        frozen["w"].frozen["a"] = jnp.asarray(a)
        s = alpha / R
        g = np.random.default_rng(0).standard_normal((D, F))
        grads = {"w": {"b": jnp.asarray(s * a.T @ g)}}
        step = corrected(frozen, grads, trained, delta=0.0)["w"]["b"]
        projection = a @ np.linalg.inv(a.T @ a) @ a.T
        np.testing.assert_allclose(s * a @ step, projection @ g, rtol=1e-5, atol=1e-6)


def test_orthonormal_a_at_scale_one_needs_no_correction():
    frozen, trained, _ = one(alpha=float(R))
    frozen["w"].frozen["a"] = jnp.linalg.qr(frozen["w"].frozen["a"])[0]
    grads = {"w": {"b": jax.random.normal(jax.random.key(3), (R, F))}}
    step = corrected(frozen, grads, trained)
    np.testing.assert_allclose(step["w"]["b"], grads["w"]["b"], rtol=1e-5, atol=1e-6)


def test_rank_deficient_a_projects_onto_its_span():
    frozen, trained, _ = one(alpha=float(R))
    a = frozen["w"].frozen["a"]
    a = frozen["w"].frozen["a"] = a.at[:, 1].set(a[:, 0])
    g = jax.random.normal(jax.random.key(3), (D, F))
    step = corrected(frozen, {"w": {"b": a.T @ g}}, trained)["w"]["b"]
    u = a[:, :1] / jnp.linalg.norm(a[:, :1])
    np.testing.assert_allclose(a @ step, u @ (u.T @ g), rtol=1e-4, atol=1e-5)


def test_in_a_training_step_a_stays():
    frozen, trained, x = one()
    optimizer = lora_fa(optax.linear_schedule(1e-2, 0.0, 9), frozen, weight_decay=0.1)

    def loss(trained, frozen, batch, key):
        y = lj.factored(apply)(lj.bind(frozen, trained), batch["x"])
        return jnp.sum(jnp.square(y)), jnp.float32(T)

    step, state = make_step(loss, optimizer), init_state(trained, optimizer)
    before = np.array(frozen["w"].frozen["a"])
    losses = []
    for _ in range(3):
        state, info = step(state, frozen, {"x": x})
        losses.append(float(info.loss))
    assert info.applied and losses[2] < losses[1] < losses[0]
    np.testing.assert_array_equal(frozen["w"].frozen["a"], before)
    assert step._cache_size() <= 1


def test_every_layer_has_its_own_scale_and_rank():
    def deep(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0]

    params = {"w": jax.random.normal(jax.random.key(0), (L, D, D))}
    x = jnp.ones((T, D))
    layers = [lj.lora(rank=1, freeze_a=True), None, lj.lora(rank=2, alpha=5.0, freeze_a=True)]
    sites = lj.find_sites(deep, params, x)
    frozen, trained = lj.attach(jax.random.key(1), params, {"w": layers}, sites)
    grads = jax.tree.map(jnp.ones_like, trained)
    step = corrected(frozen, grads, trained)["w"]
    assert set(step) == {"0", "2"}
    for i, rank, scale in ((0, 1, 8.0), (2, 2, 2.5)):
        a = frozen["w"].frozen["a"][i, :, :rank]
        wanted = jnp.linalg.solve(a.T @ a, jnp.ones((rank, D))) / scale**2
        np.testing.assert_allclose(step[str(i)]["b"], wanted, rtol=1e-4)


def test_other_weights_take_the_same_adam_uncorrected():
    params = {"w": jnp.ones((D, F))}
    sites = lj.find_sites(apply, params, jnp.ones((T, D)))
    frozen, trained = lj.attach(jax.random.key(1), params, {"w": lj.dora(rank=2)}, sites)
    grads = jax.tree.map(jnp.ones_like, trained)
    jax.tree.map(np.testing.assert_array_equal, corrected(frozen, grads, trained), grads)
    frozen, trained, _ = one()
    plain = lora_fa(1e-3, frozen, corrected=False).init(trained)
    assert plain.inverse == {}


def test_adam_in_its_older_form():
    frozen, trained, _ = one()
    optimizer = lora_fa(
        optax.constant_schedule(0.1), frozen, corrected=False, eps=0.5, weight_decay=0.2
    )
    b = jnp.full((R, F), 2.0)
    g = jnp.full((R, F), 3.0)
    updates, _ = optimizer.update({"w": {"b": g}}, optimizer.init(trained), {"w": {"b": b}})
    m, v = 0.1 * 3, 0.001 * 9
    moved = 2 - 0.1 * np.sqrt(0.001) / 0.1 * m / (np.sqrt(v) + 0.5)
    np.testing.assert_allclose(b + updates["w"]["b"], moved * (1 - 0.1 * 0.2), rtol=1e-6)


def chain(params, x):
    return (x @ params["up"]) @ params["down"] * 2


def looped(params, x):
    return jax.lax.scan(lambda h, p: (chain(p, h), None), x, params)[0]


def residuals(model, method, dtype, lead=()):
    """Shapes of what the forward pass keeps for the backward pass."""
    shapes = {"up": (*lead, D, F), "down": (*lead, F, D)}
    params = {name: jnp.full(shape, 0.1, dtype) for name, shape in shapes.items()}
    x = jnp.ones((T, D), dtype)
    sites = lj.find_sites(model, params, x)
    frozen, trained = lj.attach(jax.random.key(1), params, {".*": method}, sites)
    forward = lambda trained: lj.factored(model)(lj.bind(frozen, trained), x)  # noqa: E731
    pull = jax.vjp(jax.jit(forward), trained)[1]
    return [leaf.shape for leaf in jax.tree.leaves(pull)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("model", "lead"), [(chain, ()), (looped, (L,))])
def test_the_backward_pass_keeps_xa_and_not_x(model, lead, dtype):
    kept = residuals(model, FA, dtype, lead)
    inputs = {(*lead, T, D), (*lead, T, F)}
    assert (*lead, T, R) in kept
    assert not inputs & set(kept)
    assert inputs & set(residuals(model, lj.lora(rank=R), dtype, lead))  # A's gradient needs x


def test_bad_arguments():
    frozen, trained, _ = one()
    with pytest.raises(lj.InputError, match="below zero"):
        lora_fa(-1.0, frozen)
    optimizer = lora_fa(1.0, frozen)
    with pytest.raises(lj.InputError, match="grads, state, trained"):
        optimizer.update(trained, optimizer.init(trained))
