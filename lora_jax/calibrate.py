"""What a model computes on some batches, site by site: where data-driven starts begin.

All functions take the model as it is, `apply(params, batch)` or `loss(params, batch)`, any iterable
of batches, and `targets`: rules as `attach` takes them, or patterns and predicates alone. They give
float32 arrays by path, stacked as the parameter is, and change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.adapter import Adapted, bind, is_adapted
from lora_jax.attachment import Choice, attach
from lora_jax.errors import InputError
from lora_jax.inits import eva_rules, named
from lora_jax.method import Arrays, Method
from lora_jax.sites import Site, Sites
from lora_jax.transform import factored
from lora_jax.tree import Rule

Targets = Rule | Iterable[Rule] | Mapping[Rule, Any]


class Inputs(NamedTuple):
    """Sums over the rows `x: [d_in]` that a kernel met, each with the site's stack axes in front.

    `rows` and `calls` [] count rows and products, `total` [d_in] is `sum x` and `square`
    [d_in, d_in] is `sum x x^T`.
    """

    rows: jax.Array
    calls: jax.Array
    total: jax.Array
    square: jax.Array


def kernel_gradients(
    loss: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    targets: Targets,
    sites: Sites,
) -> dict[str, jax.Array]:
    """The mean gradient of the loss by every kernel, `[*stack, d_in, d_out]`: for `inits.lora_ga`.

    `loss(params, batch)` is a mean, or `(sum, weight)` as `lora_jax.train` has it; then sums and
    weights of all batches are divided once.

    >>> from lora_jax import find_sites
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    >>> apply = lambda params, x: x @ params["w"]
    >>> loss = lambda params, x: jnp.sum(apply(params, x)[:, 0])
    >>> kernel_gradients(loss, params, [x], "w", find_sites(apply, params, x))["w"][0]
    Array([4., 0.], dtype=float32)
    """
    paths = _chosen(targets, params, sites)
    owners = [sites.parts[path].leaf if path in sites.parts else path for path in paths]
    leaves = tree.flatten(params)
    kernels = {owner: leaves[owner] for owner in owners}

    def total(kernels: Any, params: Any, batch: Any) -> tuple[jax.Array, Any]:
        value = loss(tree.replace(params, kernels), batch)
        return value if isinstance(value, tuple) else (value, jnp.ones(()))

    @jax.jit
    def step(sums: Any, kernels: Any, params: Any, batch: Any) -> Any:
        return jax.tree.map(jnp.add, sums, jax.grad(total, has_aux=True)(kernels, params, batch))

    sums: Any = (jax.tree.map(_wide_zeros, kernels), jnp.zeros(()))
    for batch in _some(batches):
        sums = step(sums, kernels, params, batch)
    grads, weight = sums
    means = {path: grad / weight for path, grad in grads.items()}
    parts = tree.flatten(sites.taken_apart(tree.replace(params, means)))
    return {path: sites[path].view.matrix(parts[path]) for path in paths}


def input_scatters(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    targets: Targets,
    sites: Sites,
    *,
    mask: Callable[[Any], jax.Array | None] | None = None,
) -> dict[str, jax.Array]:
    """`sum (x - mean) (x - mean)^T` over all inputs of every kernel: for `inits.eva`.

    `[*stack, d_in, d_in]`; arguments and errors as for `input_statistics`.
    """
    found = input_statistics(apply, params, batches, targets, sites, mask=mask)

    def scatter(inputs: Inputs) -> jax.Array:
        mean = inputs.total / jnp.maximum(inputs.rows, 1)[..., None]
        return inputs.square - inputs.total[..., :, None] * mean[..., None, :]

    return {path: scatter(inputs) for path, inputs in found.items()}


def input_moments(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    targets: Targets,
    sites: Sites,
    *,
    mask: Callable[[Any], jax.Array | None] | None = None,
) -> dict[str, jax.Array]:
    """The mean over calls of `x^T x` with `x / |max(x)|` for the rows x of a call: `inits.corda`.

    `[*stack, d_in, d_in]`; arguments and errors as for `input_statistics`.
    """
    found = input_statistics(apply, params, batches, targets, sites, mask=mask, scaled=True)
    return {path: inputs.square / inputs.calls[..., None, None] for path, inputs in found.items()}


def input_statistics(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    targets: Targets,
    sites: Sites,
    *,
    mask: Callable[[Any], jax.Array | None] | None = None,
    scaled: bool = False,
) -> dict[str, Inputs]:
    """Exact sums over every row that meets the chosen kernels, whatever product it is.

    A convolution's rows are its patches, an expert's the tokens that it gets; the same kernel's
    several uses add up. One pass forwards and backwards a batch, in which each kernel's sums ride
    as the gradient of an array that is zero: so they come out of scans and branches as well.

    `mask(batch)` is False (or 0) at the rows that do not count, such as padding; its shape is that
    of a product's rows, `[batch, time]`. `scaled` divides the rows of each call by `|max(x)|` (the
    largest signed number, as PEFT's CorDA; experts of one call share it).

    Raises InputError for an embedding and a transposed use, whose inputs are no features of the
    kernel, for a kernel from which nothing in the output can be differentiated, and for a mask
    whose shape is not that of the rows.

    >>> from lora_jax import find_sites
    >>> params, x = {"w": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> apply = lambda params, x: x @ params["w"]
    >>> found = input_statistics(apply, params, [x, x], "w", find_sites(apply, params, x))
    >>> found["w"].square
    Array([[20., 28.],
           [28., 40.]], dtype=float32)
    """
    paths = _chosen(targets, params, sites)
    _check_inputs(paths, sites, mask is not None)
    rules: dict[Rule, Choice] = {re.escape(path): _probe(scaled) for path in paths}
    frozen, slots = attach(jax.random.key(0), params, rules, sites)

    @jax.jit
    def step(sums: Any, frozen: Any, batch: Any, rows: Any) -> Any:
        def total(slots: Any) -> jax.Array:
            bound = bind(_with_mask(frozen, rows), slots)
            return _sum(factored(apply)(bound, batch))

        with jax.default_matmul_precision("highest"):
            return jax.tree.map(jnp.add, sums, jax.grad(total)(slots))

    sums = slots
    for batch in _some(batches):
        rows = None if mask is None else mask(batch)
        sums = step(sums, frozen, batch, rows)
    return {path: _inputs(path, sums[path]) for path in paths}


def with_data(
    rules: Mapping[Rule, Choice],
    params: Any,
    sites: Sites,
    batches: Iterable[Any],
    *,
    loss: Callable[..., Any] | None = None,
    apply: Callable[..., Any] | None = None,
    mask: Callable[[Any], jax.Array | None] | None = None,
    rho: float = 2.0,
) -> dict[Rule, Choice]:
    """The rules, one for each path, with what data-driven starts want gathered and put in.

    A method such as `lora(init="lora_ga")` (by `loss`), `"corda"` or `"eva"` (by `apply`) gets its
    data; sites under `"eva"` get ranks of their own too, by `inits.eva_rules` with this `rho`. All
    other rules stay, lists among them. Raises InputError where the function that a start needs is
    not given.
    """
    batches = list(batches)
    leaves = tree.flatten(sites.taken_apart(params))
    chosen = tree.first_match(rules, {path: sites.get(path) for path in leaves})
    found: dict[str, Choice] = dict(chosen)
    wanted: dict[str, dict[str, Method]] = {}
    for path, choice in chosen.items():
        if isinstance(choice, Method) and choice.data is not None and not choice.data:
            wanted.setdefault(_start(choice).wants, {})[path] = _here(choice, sites[path])
    for wants, methods in wanted.items():
        given = _gather(wants, loss, apply, mask)(params, batches, map(re.escape, methods), sites)
        if wants == "input_scatters":
            spread = eva_rules(given, methods, rho=rho)
            found |= {path: spread[re.escape(path)] for path in methods}
        else:
            found |= {path: _given(method, given) for path, method in methods.items()}
    return {re.escape(path): choice for path, choice in found.items()}


def _gather(wants: str, loss: Any, apply: Any, mask: Any) -> Callable[..., dict[str, jax.Array]]:
    """The function that makes what a start wants, of the model's parameters and batches."""
    function, word = (loss, "loss") if wants == "kernel_gradients" else (apply, "apply")
    if function is None:
        raise InputError(f"a start needs {wants}: give with_data the function {word}=")
    options = {} if wants == "kernel_gradients" else {"mask": mask}
    gather = {
        "kernel_gradients": kernel_gradients,
        "input_scatters": input_scatters,
        "input_moments": input_moments,
    }[wants]
    return lambda *args: gather(function, *args, **options)


def _start(method: Method) -> Any:
    return named(method.hyper["init"], method.name)


def _here(method: Method, site: Site) -> Method:
    return method.at(site) if method.at else method


def _given(method: Method, data: Mapping[str, jax.Array]) -> Method:
    """The same method with its data."""
    assert method.factory is not None
    return method.factory(**{**method.hyper, "init": replace(_start(method), data=data)})


def _chosen(targets: Targets, params: Any, sites: Sites) -> list[str]:
    """The paths of the sites that some targets choose."""
    if isinstance(targets, str) or callable(targets):
        targets = [targets]
    if not isinstance(targets, Mapping):
        targets = dict.fromkeys(targets, True)
    leaves = tree.flatten(sites.taken_apart(params))
    chosen = tree.first_match(targets, {path: sites.get(path) for path in leaves})
    paths = [path for path, choice in chosen.items() if choice is not None]
    if others := [path for path in paths if path not in sites]:
        raise InputError(
            f"'{others[0]}' is no kernel, so it has no inputs and no matrix; choose sites only"
        )
    return paths


def _some(batches: Iterable[Any]) -> list[Any]:
    found = list(batches)
    if not found:
        raise InputError("there are no batches to gather from; give at least one")
    return found


def _wide_zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))


def _sum(outputs: Any) -> jax.Array:
    """A number that depends on every output, to differentiate."""
    floats = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum((jnp.sum(y.astype(jnp.float32)) for y in floats), jnp.zeros(()))


def _with_mask(frozen: Any, rows: jax.Array | None) -> Any:
    """The frozen tree with a mask beside every probe, the same for all matrices of its stack."""
    if rows is None:
        return frozen

    def held(node: Any) -> Any:
        if not isinstance(node, Adapted) or node.site is None:
            return node
        array = jnp.asarray(rows, jnp.float32)
        array = array.reshape(*(1 for _ in node.site.stack), *array.shape)
        return replace(node, frozen=node.frozen | {"mask": array})

    return jax.tree.map(held, frozen, is_leaf=is_adapted)


def _inputs(path: str, sums: Mapping[str, jax.Array]) -> Inputs:
    if not bool(jnp.all(sums["calls"] > 0)):
        raise InputError(
            f"'{path}' met no input that counts: the outputs of apply on these batches have no "
            "gradient by it (it is unused, or behind an argmax or a stop_gradient); leave it out"
        )
    return Inputs(sums["rows"][..., 0], sums["calls"], sums["total"][..., 0], sums["square"])


def _check_inputs(paths: Sequence[str], sites: Sites, masked: bool) -> None:
    for path in paths:
        uses = sites[path].uses
        if sites[path].lookup or any("transposed" in use for use in uses):
            raise InputError(
                f"'{path}' is used as {', '.join(uses)}: its inputs are indices or run the other "
                "way, so they have no features to gather; leave it out or give init='kaiming'"
            )
        if masked and "ragged" in uses:
            raise InputError(
                f"'{path}' gets its rows sorted by expert, which a mask over tokens does not fit; "
                "give batches without padding and no mask"
            )


def _probe(scaled: bool) -> Method:
    """The kernel itself, with arrays whose "gradients" are the sums over its inputs.

    Rows `x: [T, d_in]` come as `x @ 1`. Where all rows meet one matrix the sums are made here;
    where each row has its own (experts), a product `x @ slot` is recorded whose cotangent is x,
    and the product's own backward pass adds up `x^T x` for each expert.
    """

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        d_in, dtype = w.shape[0], jnp.promote_types(w.dtype, jnp.float32)
        shapes = {"rows": (1,), "calls": (), "total": (d_in, 1), "square": (d_in, d_in)}
        return {"w": w}, {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        return frozen["w"]

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        slots = trained | {"rows": x.rows(trained["rows"])}
        rows = x @ jnp.eye(len(trained["square"]))
        rows = jax.lax.stop_gradient(rows).astype(trained["square"].dtype)
        kept = _kept(frozen.get("mask"), rows, x.places)
        if scaled:
            rows = rows / jnp.abs(jnp.max(jnp.where(kept > 0, rows, -jnp.inf)))
        if slots["rows"].ndim == 2:
            slots |= {name: x @ trained[name] for name in ("total", "square")}
            sums = {"rows": kept, "total": kept, "square": rows}
        else:
            rows = jnp.where(kept > 0, rows, 0)
            sums = {"rows": kept.sum(0), "total": rows.sum(0)[:, None], "square": rows.T @ rows}
        sums["calls"] = jnp.ones(())
        return recorded(x @ frozen["w"], slots, sums)

    return Method("inputs", init, weight, apply, hyper={"scaled": scaled})


@jax.custom_vjp
def recorded(y: jax.Array, slots: Arrays, sums: Arrays) -> jax.Array:
    """`y`; the gradient by `slots` is `sums`, whatever becomes of `y`."""
    return y


def _forward(y: jax.Array, slots: Arrays, sums: Arrays) -> tuple[jax.Array, Arrays]:
    return y, {name: sums[name].astype(slot.dtype) for name, slot in slots.items()}


def _backward(sums: Arrays, cotangent: jax.Array) -> tuple[Any, ...]:
    return cotangent, sums, None


recorded.defvjp(_forward, _backward)


def _kept(mask: jax.Array | None, rows: jax.Array, places: tuple[int, ...]) -> jax.Array:
    """`[T, 1]`: 1 for the rows that count."""
    if mask is None:
        return jnp.ones((len(rows), 1), rows.dtype)
    if mask.shape != places and places != (mask.size,):
        raise InputError(
            f"the mask has shape {list(mask.shape)}, but this product's rows are "
            f"{list(places)}; gather the kernels that see every token with a mask, and the others "
            "without"
        )
    return (mask != 0).reshape(-1, 1).astype(rows.dtype)
