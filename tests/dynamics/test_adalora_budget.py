"""AdaLoRA between steps: schedule, scores, masks, ties, penalty, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import LAYERS, OUT, WIDTH, model, run

import lora_jax as lj
from lora_jax import dynamics
from lora_jax.methods import adalora

RULES = {".*": adalora(rank=4)}
STEPS, START, END, EVERY, TARGET = 30, 3, 8, 4, 2
MOST, LEAST = 4 * (LAYERS + 1), TARGET * (LAYERS + 1)


def shrinking(**options):
    given = {"steps": STEPS, "start": START, "end": END, "every": EVERY, "target_rank": TARGET}
    return dynamics.adalora(**given | options)


def kept(state):
    return sum(np.count_nonzero(arrays["e"]) for arrays in state.trained.values())


def test_the_schedule():
    table = dynamics.budget(144, 96, steps=1000, start=100, end=200)
    wanted = {100: 144, 101: 143, 150: 134, 275: 116, 450: 102, 625: 96, 999: 96}
    assert {t: table[t] for t in wanted} == wanted
    assert len(table) == 1001


@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_every_mask_the_budget_is_kept(accumulate):
    _, states = run(RULES, shrinking(), STEPS, accumulate=accumulate)
    table = dynamics.budget(MOST, LEAST, STEPS, START, END)
    for step, state in enumerate(states[1:]):
        masked = step > START and step % EVERY == 0
        if step >= STEPS - END:
            assert kept(state) == LEAST
        elif masked:
            assert kept(state) == table[step]
    assert kept(states[STEPS - END]) == MOST  # between masks a triplet comes back


def test_without_last_steps_the_choice_is_made_after_the_last():
    _, states = run(RULES, shrinking(end=0), STEPS)
    assert (kept(states[-3]), kept(states[-1])) == (MOST, LEAST)


def test_a_lost_step_does_not_lose_the_last_choice():
    _, states = run(RULES, shrinking(), STEPS, spoil=STEPS - END)
    jax.tree.map(
        np.testing.assert_array_equal,
        states[STEPS - END + 1][1:],
        states[STEPS - END][1:],
    )
    assert [kept(state) for state in states[STEPS - END + 2 :]] == [LEAST] * (END - 1)


@pytest.mark.parametrize("sensitivity", ["reference", "pre_step"])
def test_the_averages_are_those_of_a_loop(sensitivity):
    moving = shrinking(sensitivity=sensitivity, beta1=0.7, beta2=0.6)
    rng = np.random.default_rng(0)
    draw = lambda: {"w": {"a": rng.normal(size=(5, 2)), "e": rng.normal(size=2), "b": rng.normal(size=(2, 3))}}  # noqa: E731, E501  # fmt: skip
    zeros = jax.tree.map(np.zeros_like, draw())
    state = {
        "mean": zeros,
        "spread": zeros,
        "kept": {"w": np.ones(2, bool)},
        "chosen": jnp.zeros((), bool),
    }
    mean, spread = zeros["w"]["a"], zeros["w"]["a"]
    for step in range(3):
        grads, before, after = draw(), draw(), draw()
        state, _ = moving.after(state, jnp.int32(step), grads, before, after)
        weights = after if sensitivity == "reference" else before
        now = np.abs(weights["w"]["a"] * grads["w"]["a"])
        mean = 0.7 * mean + 0.3 * now
        spread = 0.6 * spread + 0.4 * np.abs(now - mean)
        np.testing.assert_allclose(state["mean"]["w"]["a"], mean, rtol=1e-6)
        np.testing.assert_allclose(state["spread"]["w"]["a"], spread, rtol=1e-6)


def ask(scores, step):
    """Which entries of e stay, for triplets of given scores: those of e alone."""
    e = np.asarray(scores, np.float32)
    arrays = {"a": np.zeros((5, e.size)), "e": e, "b": np.zeros((e.size, 3))}
    state = {
        "mean": {"w": arrays},
        "spread": {"w": jax.tree.map(np.ones_like, arrays)},
        "kept": {"w": np.ones(e.size, bool)},
        "chosen": jnp.zeros((), bool),
    }
    moving = shrinking(beta1=1 - 1e-7, beta2=1 - 1e-7)
    idle = {"w": jax.tree.map(np.zeros_like, arrays)}
    ones = {"w": jax.tree.map(np.ones_like, arrays)}
    state, after = moving.after(state, jnp.int32(step), idle, ones, ones)
    return np.flatnonzero(after["w"]["e"]).tolist()


LAST = STEPS - END


def test_the_lowest_scores_go_with_all_their_ties():
    assert ask([3, 1, 4, 2], LAST) == [0, 2]
    assert ask([3, 3, 4, 2], LAST) == [2]


def test_equal_scores_leave_the_first():
    assert ask([5, 5, 5, 5], LAST) == [0, 1]
    assert ask([0, 0, 0, 0], LAST) == [0, 1]
    assert ask([0, 0, 0, 0], 20) == [0, 1, 2, 3]  # nothing known yet: wait


def test_a_budget_that_equals_the_ranks_masks_nothing():
    assert ask([4, 1], LAST) == [0, 1]


def test_layers_may_differ_in_rank_and_presence():
    rules = {"layers": [adalora(rank=3), None, adalora(rank=5)], "out": lj.lora(rank=2)}
    _, states = run(rules, shrinking(), STEPS)
    ends = states[-1].trained["layers"]
    assert sum(np.count_nonzero(arrays["e"]) for arrays in ends.values()) == 2 * TARGET
    assert set(states[-1].dynamics["kept"]) == {"layers/0", "layers/2"}


def by_hand(trained, form):
    terms = []
    for arrays in trained.values():
        for x in (np.swapaxes(arrays["a"], -1, -2), arrays["b"]):
            gaps = x @ np.swapaxes(x, -1, -2) - np.eye(x.shape[-2])
            terms += list(np.linalg.norm(gaps, axis=(-2, -1)).ravel())
    return np.mean(terms) if form == "peft" else np.sum(np.square(terms))


@pytest.mark.parametrize("form", ["peft", "paper"])
def test_the_penalty(form):
    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(1), params, RULES, sites)
    moving = shrinking(penalty=form, gamma=0.3)
    state = moving.init(frozen, trained)
    trained = jax.tree.map(lambda x: 20 * x, trained)
    value = moving.penalty(state, trained)
    assert value == pytest.approx(0.3 * by_hand(jax.device_get(trained), form), rel=1e-5)


def test_the_penalty_of_orthogonal_factors_has_a_gradient():
    trained = {"w": {"a": jnp.eye(5, 2), "e": jnp.zeros(2), "b": jnp.eye(2, 3)}}
    pull = jax.grad(shrinking().penalty, argnums=1)({"mean": trained}, trained)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), pull)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "give the run's length"),
        ({"start": 22}, "no step of 30 is left"),
        ({"end": -1}, "counts of steps"),
        ({"every": 0}, "counts of steps"),
        ({"target_rank": 0}, "mean rank to end with"),
        ({"beta1": 1.0}, "within (0, 1)"),
        ({"gamma": -1}, "give 0 or more"),
        ({"penalty": "both"}, "unknown; give one of ('peft', 'paper')"),
        ({"sensitivity": "post"}, "unknown; give one of"),
    ],
)
def test_what_is_refused_at_once(options, message):
    with pytest.raises(lj.InputError, match=re.escape(message)):
        shrinking(**options)


def test_what_is_refused_with_the_parameters():
    params, sites = model()
    given = lj.attach(jax.random.key(1), params, RULES, sites)
    with pytest.raises(lj.InputError, match="add up to 16 at the start and to 20"):
        shrinking(target_rank=5).init(*given)
    plain = lj.attach(jax.random.key(1), params, {".*": lj.lora(rank=2)}, sites)
    with pytest.raises(lj.InputError, match="there is none; attach adalora"):
        shrinking().init(*plain)


def test_pruned_is_the_same_function_with_what_is_left():
    frozen, states = run(RULES, shrinking(), STEPS)
    trained = states[-1].trained
    less, left = dynamics.pruned(frozen, trained)
    one = LEAST // (LAYERS + 1)
    assert lj.tree.count(left) <= LEAST * (2 * WIDTH + 1) < lj.tree.count(trained)
    assert one * (LAYERS + 1) == LEAST
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        lj.merge(less, left),
        lj.merge(frozen, trained),
    )
    scales = [np.unique(node.frozen["scale"]) for node in lj.adapted(less).values()]
    np.testing.assert_allclose(np.concatenate(scales), 8 / 4.00001, rtol=1e-6)


def test_pruned_to_nothing_is_the_base():
    params, sites = model()
    given = lj.attach(jax.random.key(1), params, RULES, sites)
    less, left = dynamics.pruned(*given)
    assert left == {} and less["out"] is params["out"]
    assert less["out"].shape[1] == OUT


def test_pruned_leaves_go_to_a_file_and_back(tmp_path):
    from lora_jax.io.native import load_adapter, save_adapter

    params, sites = model()
    frozen, trained = lj.attach(jax.random.key(1), params, RULES, sites)
    e = np.array([[1, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0]], np.float32)
    trained["layers"]["e"] = jnp.asarray(e)
    trained["out"]["e"] = jnp.asarray([0.0, 0.0, 1.0, 1.0])
    less, left = dynamics.pruned(frozen, trained)
    assert {i: x["e"].shape for i, x in left["layers"].items()} == {"0": (2,), "2": (1,)}
    folder = save_adapter(tmp_path / "adapter", less, left)
    again = load_adapter(folder, params, sites)
    jax.tree.map(np.testing.assert_array_equal, (less, left), again)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        lj.merge(*again),
        lj.merge(frozen, trained),
    )
