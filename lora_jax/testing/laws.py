"""Laws that hold for every method on every model; each raises AssertionError where one breaks."""

from __future__ import annotations

import functools
import operator
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import tree
from lora_jax.adapter import adapted, bind
from lora_jax.attachment import attach
from lora_jax.io.native import load_adapter, save_adapter
from lora_jax.sites import find_sites
from lora_jax.testing.case import quick
from lora_jax.testing.row import Row, plain, total
from lora_jax.transform import factored, materialised


def a_fresh_adapter_changes_nothing(row: Row) -> None:
    """`apply` of a fresh adapter is the model's own, where the method claims so."""
    if row.claim.neutral:
        close(row.results[0][0], plain(row.case), row.rounding())


def factored_is_its_definition(row: Row) -> None:
    """`apply(frozen, trained, x) == x @ weight(frozen, trained)`, and training changes it."""
    fresh, *trained = row.results
    for ours, definition, *_ in trained:
        close(ours, definition, row.rounding())
        assert furthest(ours, fresh[0]) > 1e-3, "trained arrays that moved change no output"


def merged_is_its_definition(row: Row) -> None:
    """The model on merged parameters gives what the adapted one gives."""
    if not row.linear:
        return
    for _, definition, _, _, merged in row.results[1:]:
        shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
        assert shapes(merged) == shapes(row.params), "merging changes shapes or dtypes"
        close(jax.jit(row.apply)(merged, *row.inputs), definition, row.rounding())


def gradients_are_those_of_the_definition(row: Row) -> None:
    """Differentiating `apply` gives what differentiating the formed kernel gives."""
    for _, _, grads, wanted, _ in row.results[1:]:
        close(grads, wanted, row.rounding(5e-5))


def many_adapters_at_once_are_a_loop_over_them(row: Row) -> None:
    """`vmap` over trained arrays is one adapter after the other."""
    if row.claim.make().anywhere and not row.case.mapped:
        return  # then the model itself runs over many parameters
    frozen = row.attached[0]
    both = jax.tree.map(lambda *x: np.stack(x), *row.states[1:])

    @quick
    def side_by_side(frozen: Any, both: Any, inputs: Any) -> Any:
        one = lambda trained: factored(row.apply)(bind(frozen, trained), *inputs)  # noqa: E731
        return jax.vmap(one)(both)

    together = side_by_side(frozen, both, row.inputs)
    for i, (ours, *_) in enumerate(row.results[1:]):
        close(jax.tree.map(operator.itemgetter(i), together), ours, row.rounding())


def a_bfloat16_base_has_float32_adapters(row: Row) -> None:
    """Trained arrays stay float32 over a bfloat16 base, and both forms agree there."""
    params, inputs = jax.tree.map(_narrowed, row.params), [_narrowed(x) for x in row.inputs]
    sites = find_sites(row.apply, params, *inputs)
    rules = {row.case.targets: row.claim.make()}
    frozen, trained = attach(jax.random.key(2), params, rules, sites)
    dtypes = {x.dtype for x in jax.tree.leaves(trained)}
    assert dtypes <= {jnp.dtype("float32")}, f"trained arrays of {dtypes} over a bfloat16 base"

    @quick
    def both(frozen: Any, trained: Any, inputs: Any) -> Any:
        bound = bind(frozen, trained)
        forms = (factored, materialised) if row.linear else (factored, factored)
        return [form(row.apply)(bound, *inputs) for form in forms]

    close(*both(frozen, row.moved(3), inputs), rounding=5e-2)


def shapes_are_enough(row: Row) -> None:
    """Attaching and running can be traced without numbers."""

    def run(key: jax.Array, params: Any, *inputs: Any) -> Any:
        rules = {row.case.targets: row.claim.make()}
        frozen, trained = attach(key, params, rules, row.sites)
        return factored(row.apply)(bind(frozen, trained), *inputs)

    shapes = jax.eval_shape(run, jax.random.key(2), row.params, *row.inputs)
    wanted = jax.eval_shape(row.apply, row.params, *row.inputs)
    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert described(shapes) == described(wanted)


def jit_equals_eager(row: Row) -> None:
    """Outside `jit` the same comes out."""
    eager = factored(row.apply)(bind(row.attached[0], row.states[1]), *row.inputs)
    close(eager, row.results[1][0], row.rounding())


def training_moves_trained_arrays_only(row: Row) -> None:
    """Steps of AdamW with weight decay leave every frozen bit, and hold moments of no other."""
    frozen, trained = row.attached
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    before = [np.array(x) for x in jax.tree.leaves(frozen)]
    state = optimizer.init(trained)
    moments = sum(x.size for x in jax.tree.leaves(state))
    assert moments <= 2 * tree.count(trained) + 2, "the optimizer holds more than the trained"

    @quick
    def step(trained: Any, state: Any, frozen: Any, inputs: Any) -> tuple[Any, Any]:
        loss = lambda t: total(factored(row.apply)(bind(frozen, t), *inputs))  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(2):
        trained, state = step(trained, state, frozen, row.inputs)
    assert furthest(trained, row.attached[1]) > 1e-4, "two steps of AdamW move nothing"
    for x, y in zip(jax.tree.leaves(frozen), before, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


def the_count_is_the_closed_form(row: Row) -> None:
    """As many trained numbers as the claim says."""
    if row.claim.count is None:
        return
    sites = [row.sites[path] for path in adapted(row.attached[0])]
    matrices = [(s.d_in, s.d_out) for s in sites for _ in range(int(np.prod(s.stack)))]
    assert tree.count(row.attached[1]) == row.claim.count(matrices)


def saved_and_loaded_is_the_same(row: Row) -> None:
    """A file gives back every bit, on the base that it was made for."""
    frozen, trained = row.attached[0], row.states[1]
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(f"{folder}/adapter", frozen, trained)
        again = load_adapter(f"{folder}/adapter", row.params, row.sites, factories=_factories(row))
    assert jax.tree.structure(again) == jax.tree.structure((frozen, trained))
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves((frozen, trained)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def sharded_is_unsharded(row: Row) -> None:
    """Kernels split over two devices, along either of their last axes, give the same outputs.

    Needs two devices; on CPU `--xla_force_host_platform_device_count=2` in XLA_FLAGS makes them.
    """
    if len(jax.devices()) < 2 or row.case.narrow:
        return
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("model",), kinds, devices=jax.devices()[:2])
    run = jax.jit(factored(row.apply))
    for axis in (-1, -2):
        with_axis = functools.partial(_split, mesh=mesh, axis=axis)
        bound = jax.tree.map(with_axis, bind(row.attached[0], row.states[1]))
        inputs = jax.device_put(row.inputs, NamedSharding(mesh, PartitionSpec()))
        close(run(bound, *inputs), row.results[1][0], row.rounding(1e-5))


def equal_configurations_share_a_trace(row: Row) -> None:
    """A method made again with the same arguments is equal, and compiles nothing anew."""
    make, traces = row.claim.make, []
    assert make() == make() and hash(make()) == hash(make()), "made twice, it is not equal"

    @jax.jit
    def run(bound: Any, inputs: Any) -> Any:
        traces.append(1)
        return factored(row.apply)(bound, *inputs)

    for seed in (2, 3):
        rules = {row.case.targets: make()}
        parts = attach(jax.random.key(seed), row.params, rules, row.sites)
        jax.eval_shape(run, bind(*parts), row.inputs)
        run.lower(bind(*parts), row.inputs)
    assert len(traces) == 1, f"{len(traces)} traces of equal configurations"


LAWS: tuple[Callable[[Row], None], ...] = (
    a_fresh_adapter_changes_nothing,
    factored_is_its_definition,
    merged_is_its_definition,
    gradients_are_those_of_the_definition,
    many_adapters_at_once_are_a_loop_over_them,
    a_bfloat16_base_has_float32_adapters,
    shapes_are_enough,
    training_moves_trained_arrays_only,
    the_count_is_the_closed_form,
    saved_and_loaded_is_the_same,
    sharded_is_unsharded,
    equal_configurations_share_a_trace,
)


def close(actual: Any, expected: Any, rounding: float = 2e-6) -> None:
    """Equal up to rounding, leaf by leaf; leaves that are nearly zero are held less strictly."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max(np.abs(np.float64(x)).max(initial=0) for x in jax.tree.leaves(expected))
    jax.tree.map(
        functools.partial(_close, rounding=rounding, floor=1e-2 * largest), actual, expected
    )


def furthest(actual: Any, expected: Any) -> float:
    """The largest difference of two trees."""
    gaps = jax.tree.map(lambda a, b: np.abs(np.float32(a) - np.float32(b)).max(), actual, expected)
    return max(jax.tree.leaves(gaps))


def _close(actual: Any, expected: Any, rounding: float, floor: float) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    rounding = 5e-2 if expected.dtype == jnp.bfloat16 else rounding
    actual, expected = np.float64(actual), np.float64(expected)
    scale = max(np.abs(expected).max(initial=0), floor)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rounding * scale)


def _narrowed(x: Any) -> Any:
    floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.bfloat16) if floating else x  # batch statistics stay as they are


def _split(x: Any, mesh: Any, axis: int) -> Any:
    """An array over the mesh, split along an axis where it has one that two devices can share."""
    fits = x.ndim >= -axis and x.shape[axis] % 2 == 0
    spec: list[str | None] = [None] * x.ndim
    if fits:
        spec[axis] = "model"
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _factories(row: Row) -> dict[str, Any]:
    method = row.claim.make()
    return {method.name: method.factory or (lambda **_: row.claim.make())}
