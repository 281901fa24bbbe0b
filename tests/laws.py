"""Laws that hold for every method on every model: one table of both.

Compiling is what costs time here. So the laws of one row share one compiled program, built with
few optimisations; only a fresh LoRA's bit equality is held between two programs compiled as users
compile them.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from cases.compiling import quick

import lora_jax as lj

METHODS = {
    "lora": lj.lora(rank=2, alpha=3.0),
    "dora": lj.dora(rank=2, alpha=3.0),
    "rslora": lj.lora(rank=3, rslora=True, init="gaussian"),
    "lora_fa": lj.lora(rank=2, freeze_a=True),
    "dora_through_norm": lj.dora(rank=2, detach_norm=False),
}
MAIN = ("lora", "dora")  # these meet every case, the others the thorough ones
THOROUGH = [case for case in CASES if case.thorough]
ROWS = [(case, name) for name in METHODS for case in CASES if name in MAIN or case.thorough]
NARROW = [(case, name) for case, name in ROWS if name == "lora" or case.thorough]


def rows(pairs):
    """The table as parameters of a test; the methods besides the main two are slow."""
    slow = {True: (), False: pytest.mark.slow}
    return pytest.mark.parametrize(
        "case, name", [pytest.param(*pair, marks=slow[pair[1] in MAIN]) for pair in pairs], ids=str
    )


every_row = rows(ROWS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@functools.cache
def built(case):
    apply, params, inputs = case.build(jax.random.key(1))
    return apply, params, inputs, lj.find_sites(apply, params, *inputs)


@functools.cache
def plain(case):
    return jax.jit(built(case)[0])


@functools.cache
def attached(case, name):
    _, params, _, sites = built(case)
    rules = {case.targets: METHODS[name]}
    return lj.attach(jax.random.key(2), params, rules, sites)


def moved(trained, seed):
    """The trained arrays after some training, by numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    drift = lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, x.dtype)  # noqa: E731
    return jax.tree.map(drift, trained)


def total(outputs):
    floats = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32) / 4)) for y in floats)


def program(case, name):
    """Outputs, gradients (for a while loop: the outputs' derivative along ones), the merged."""
    apply = built(case)[0]

    def outcome(transform, frozen, trained, inputs):
        def forward(trained):
            return transform(apply)(lj.bind(frozen, trained), *inputs)

        def loss(trained):
            y = forward(trained)
            return total(y), y

        if case.differentiable:
            return jax.grad(loss, has_aux=True)(trained)
        along = jax.tree.map(jnp.ones_like, trained)
        return jax.jvp(forward, (trained,), (along,))[::-1]

    @quick
    def laws(frozen, trained, inputs):
        grads, factored = outcome(lj.factored, frozen, trained, inputs)
        wanted, materialised = outcome(lj.materialised, frozen, trained, inputs)
        return factored, materialised, grads, wanted, lj.merge(frozen, trained)

    return laws


@functools.cache
def results(case, name):
    """What the program gives for a fresh adapter and for two trained ones."""
    frozen, trained = attached(case, name)
    laws, inputs = program(case, name), built(case)[2]
    return [
        laws(frozen, state, inputs) for state in (trained, moved(trained, 3), moved(trained, 4))
    ]


def close(actual, expected, rounding=2e-6):
    """Equal up to rounding, leaf by leaf; leaves that are nearly zero are held less strictly."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max(np.abs(np.float64(x)).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        functools.partial(_close, rounding=rounding, floor=1e-2 * largest), actual, expected
    )


def _close(actual, expected, rounding, floor):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    rounding = 5e-2 if expected.dtype == jnp.bfloat16 else rounding
    actual, expected = np.float64(actual), np.float64(expected)
    scale = max(np.abs(expected).max(), floor)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rounding * scale)


def rounding(case, ours=2e-6):
    """What the case's own precision allows."""
    return 5e-2 if case.narrow else ours


def furthest(actual, expected):
    gaps = jax.tree.map(lambda a, b: np.abs(np.float32(a) - np.float32(b)).max(), actual, expected)
    return max(jax.tree.leaves(gaps))


@every_case
def test_a_fresh_lora_changes_no_bit(case):
    apply, params, inputs, _ = built(case)
    frozen, trained = attached(case, "lora")
    fresh = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), *inputs)
    expected = plain(case)(params, *inputs)
    close(fresh, expected)
    if not case.exact:
        return
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), fresh, expected
    )


@every_row
def test_a_fresh_adapter_changes_nothing(case, name):
    _, params, inputs, _ = built(case)
    close(results(case, name)[0][0], plain(case)(params, *inputs), rounding(case))


@every_row
def test_factored_is_materialised(case, name):
    fresh, *trained = results(case, name)
    for factored, materialised, *_ in trained:
        close(factored, materialised, rounding(case))
        assert furthest(factored, fresh[0]) > 1e-2


@every_row
def test_merged_is_materialised(case, name):
    _, params, inputs, _ = built(case)
    for _, materialised, _, _, merged in results(case, name)[1:]:
        shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
        assert shapes(merged) == shapes(params)
        close(plain(case)(merged, *inputs), materialised, rounding(case))


@every_row
def test_gradients_are_those_of_the_materialised_model(case, name):
    for _, _, grads, wanted, _ in results(case, name)[1:]:
        close(grads, wanted, rounding(case, 5e-5))


@every_row
def test_many_adapters_at_once_are_a_loop_over_them(case, name):
    apply, _, inputs, _ = built(case)
    frozen, trained = attached(case, name)
    both = jax.tree.map(lambda *x: np.stack(x), moved(trained, 3), moved(trained, 4))

    @quick
    def side_by_side(frozen, both, inputs):
        one = lambda trained: lj.factored(apply)(lj.bind(frozen, trained), *inputs)  # noqa: E731
        return jax.vmap(one)(both)

    together = side_by_side(frozen, both, inputs)
    for i, (factored, *_) in enumerate(results(case, name)[1:]):
        close(jax.tree.map(operator.itemgetter(i), together), factored, rounding(case))


def narrowed(x):
    floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.bfloat16) if floating else x  # batch statistics stay as they are


@rows(NARROW)
def test_a_bfloat16_base_has_float32_adapters(case, name):
    apply, params, inputs, _ = built(case)
    params, inputs = jax.tree.map(narrowed, params), [narrowed(x) for x in inputs]
    sites = lj.find_sites(apply, params, *inputs)
    frozen, trained = lj.attach(jax.random.key(2), params, {case.targets: METHODS[name]}, sites)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}

    @quick
    def both(frozen, trained, inputs):
        bound = lj.bind(frozen, trained)
        return lj.factored(apply)(bound, *inputs), lj.materialised(apply)(bound, *inputs)

    factored, materialised = both(frozen, moved(trained, 3), inputs)
    close(factored, materialised, rounding=5e-2)


@pytest.mark.parametrize("case", THOROUGH, ids=str)
def test_jit_equals_eager(case):
    apply, _, inputs, _ = built(case)
    frozen, trained = attached(case, "lora")
    eager = lj.factored(apply)(lj.bind(frozen, moved(trained, 3)), *inputs)
    close(eager, results(case, "lora")[1][0], rounding(case))


@every_case
def test_shapes_are_enough(case):
    apply, params, inputs, sites = built(case)
    rules = {case.targets: METHODS["dora"]}

    def run(key, params, *inputs):
        frozen, trained = lj.attach(key, params, rules, sites)
        return lj.factored(apply)(lj.bind(frozen, trained), *inputs)

    shapes = jax.eval_shape(run, jax.random.key(2), params, *inputs)
    wanted = jax.eval_shape(apply, params, *inputs)
    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert described(shapes) == described(wanted)
