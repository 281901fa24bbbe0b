"""Delta-LoRA: the telescoped form is the literal one, a product of rank 2r, LoRA in a limit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import LAYERS, OUT, WIDTH, apply, batches, loss, model, run

import lora_jax as lj
from lora_jax import dynamics
from lora_jax.methods import delta_lora

RANK, ALPHA = 2, 6.0
SCALE = ALPHA / RANK
RULES = {".*": delta_lora(rank=RANK, alpha=ALPHA, ratio=0.7)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def literal(start, steps, optimizer, ratio=0.7):
    """The paper's loop: the kernels themselves move, and get no gradient."""
    params, sites = model()
    _, trained = lj.attach(jax.random.key(1), params, RULES, sites)
    state, kernels = optimizer.init(trained), dict(params)

    def forward(trained, kernels, batch):
        both = {p: w + SCALE * trained[p]["a"] @ trained[p]["b"] for p, w in kernels.items()}
        total, weight = loss(both, batch)
        return total / weight

    @jax.jit
    def step(trained, kernels, state, batch, t):
        grads = jax.grad(forward)(trained, kernels, batch)
        updates, state = optimizer.update(grads, state, trained)
        after = optax.apply_updates(trained, updates)
        change = {p: after[p]["a"] @ after[p]["b"] - x["a"] @ x["b"] for p, x in trained.items()}
        rate = jnp.where(t > start, ratio * SCALE, 0)
        return after, {p: w + rate * change[p] for p, w in kernels.items()}, state

    for t in range(steps):
        trained, kernels, state = step(trained, kernels, state, batches(t), t)
    return {p: w + SCALE * trained[p]["a"] @ trained[p]["b"] for p, w in kernels.items()}, trained


def agree(ours, theirs, rtol=1e-8):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), ours, theirs)


@pytest.mark.parametrize("start", [-1, 0, 4, 9])
def test_it_equals_the_literal_update(start):
    optimizer = optax.adamw(0.02, weight_decay=0.3)
    kernels, trained = literal(start, 10, optimizer)
    moving = dynamics.delta_lora(start=start)
    frozen, states = run(RULES, moving, 10, optimizer)
    final = moving.frozen(states[-1].dynamics, frozen)
    agree(states[-1].trained, trained)
    agree(lj.merge(final, states[-1].trained), kernels)


def test_the_gradient_of_the_input_passes_the_moved_kernel():
    frozen, states = run(RULES, dynamics.delta_lora(start=1), 6)
    final = dynamics.delta_lora(start=1).frozen(states[-1].dynamics, frozen)
    bound, x = lj.bind(final, states[-1].trained), batches(0)["x"]
    ours = jax.grad(lambda x: lj.factored(apply)(bound, x).var())(x)
    merged = lj.merge(final, states[-1].trained)
    np.testing.assert_allclose(ours, jax.grad(lambda x: apply(merged, x).var())(x), rtol=1e-7)


def test_the_whole_update_is_a_product_of_rank_2r():
    moving = dynamics.delta_lora(start=3, ratio=1.5)
    frozen, states = run(RULES, moving, 8)
    final = moving.frozen(states[-1].dynamics, frozen)
    node, trained = lj.adapted(final)["out"], states[-1].trained["out"]
    change = lj.merge(final, states[-1].trained)["out"] - node.frozen["w"]
    assert np.linalg.matrix_rank(change, tol=1e-9) == 2 * RANK
    a, b = node.method.factors(node.frozen, trained)
    assert (a.shape, b.shape) == ((WIDTH, 2 * RANK), (2 * RANK, OUT))
    np.testing.assert_allclose(a @ b, change, rtol=1e-9, atol=1e-12)


def safe_adam(rate):
    """Adam with eps = 0, where 0 / 0 is 0."""
    inner = optax.scale_by_adam(eps=0.0)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, state, params)
        return jax.tree.map(lambda u: -rate * jnp.nan_to_num(u), updates), state

    return optax.GradientTransformation(inner.init, update)


def test_moving_from_the_start_is_lora_of_a_larger_alpha():
    """Adam without eps takes no notice of the gradient's scale."""
    moving = dynamics.delta_lora(start=-1)
    frozen, states = run(RULES, moving, 10, safe_adam(0.01))
    rules = {".*": lj.lora(rank=RANK, alpha=ALPHA * 1.7)}
    plain, others = run(rules, None, 10, safe_adam(0.01))
    agree(states[-1].trained, others[-1].trained)
    final = moving.frozen(states[-1].dynamics, frozen)
    agree(lj.merge(final, states[-1].trained), lj.merge(plain, others[-1].trained))


def test_a_ratio_of_zero_or_no_dynamics_is_lora():
    rules = {".*": lj.lora(rank=RANK, alpha=ALPHA)}
    _, wanted = run(rules, None, 6)
    for moving in (dynamics.delta_lora(start=2, ratio=0.0), None):
        agree(run(RULES, moving, 6)[1][-1].trained, wanted[-1].trained)


def test_a_lost_step_moves_nothing_and_delays_the_snapshot():
    _, states = run(RULES, dynamics.delta_lora(start=3), 8, spoil=4)
    assert [bool(state.dynamics["moving"]) for state in states] == [False] * 6 + [True] * 3
    agree(states[-1].dynamics["snapshot"], states[5].trained)


def test_layers_may_differ_in_rank_ratio_and_presence():
    layers = [delta_lora(rank=1, ratio=0.0), None, delta_lora(rank=3, ratio=2.0)]
    moving = dynamics.delta_lora(start=1)
    frozen, states = run({"layers": layers}, moving, 5)
    final = moving.frozen(states[-1].dynamics, frozen)
    merged = lj.merge(final, states[-1].trained)["layers"]
    kernel, trained = model()[0]["layers"], states[-1].trained["layers"]
    held = states[2].trained["layers"]
    for i, ratio, scale in ((0, 0.0, 8.0), (2, 2.0, 8.0 / 3)):
        now, then = (x[str(i)]["a"] @ x[str(i)]["b"] for x in (trained, held))
        wanted = kernel[i] + scale * (now + ratio * (now - then))
        np.testing.assert_allclose(merged[i], wanted, rtol=1e-9)
    np.testing.assert_array_equal(merged[1], kernel[1])
    assert len(merged) == LAYERS


def test_saved_and_loaded_is_the_same(tmp_path):
    from lora_jax.io.native import load_adapter, save_adapter

    moving = dynamics.delta_lora(start=1)
    frozen, states = run(RULES, moving, 4)
    final = moving.frozen(states[-1].dynamics, frozen)
    folder = save_adapter(tmp_path / "adapter", final, states[-1].trained)
    again = load_adapter(folder, *model())
    jax.tree.map(np.testing.assert_array_equal, again, (final, states[-1].trained))


def test_the_count():
    params, sites = model()
    _, trained = lj.attach(jax.random.key(1), params, RULES, sites)
    assert lj.tree.count(trained) == RANK * (LAYERS * 2 * WIDTH + WIDTH + OUT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "both see the same input; use dropout=0"),
        ({"ratio": -0.5}, "a number from 0 on"),
        ({"rank": 0}, "the rank is a positive integer"),
        ({"alpha": 0}, "give alpha > 0"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(lj.InputError, match=re.escape(message)):
        delta_lora(**arguments)


def test_dynamics_without_the_method_are_refused():
    params, sites = model()
    given = lj.attach(jax.random.key(1), params, {".*": lj.lora(rank=2)}, sites)
    with pytest.raises(lj.InputError, match="there is none; attach delta_lora"):
        dynamics.delta_lora().init(*given)
    with pytest.raises(lj.InputError, match="from 0 on"):
        dynamics.delta_lora(ratio=-1.0)
