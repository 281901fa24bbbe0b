"""LoRA-drop: layers whose update matters keep factors of their own, the others share one pair."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, adapted, bind, is_adapted
from lora_jax.attachment import Choice, attach
from lora_jax.calibrate import recorded
from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.methods.tied import tied
from lora_jax.operands import lifted
from lora_jax.sites import Sites
from lora_jax.train import adapter_loss, init_state, make_step
from lora_jax.train.step import Batch
from lora_jax.transform import factored
from lora_jax.tree import Rule

Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
Mask = Callable[[Batch], jax.Array | None] | None


class Dropped(NamedTuple):
    """What `lora_drop` found: rules for `attach`, and every layer's share of its group's score."""

    rules: dict[Rule, Choice]
    importance: dict[str, np.ndarray]


def lora_drop(
    key: jax.Array,
    loss: Loss,
    params: Any,
    rules: Mapping[Rule, Choice],
    sites: Sites,
    batches: Sequence[Batch],
    *,
    threshold: float = 0.9,
    scope: str = "kind",
    epochs: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    mask: Mask = None,
) -> Dropped:
    """Train on a few batches, score every layer's update there, and choose who shares.

    `rules` adapt all candidates, as for `attach`; `loss(params, batch) -> (sum, weight)` is that of
    the plain model; `batches` are a stratified tenth of the data, say. After `epochs` over them
    (`optimizer`, AdamW at 1e-3 unless given) the layers of each kind (paths that differ in numbers
    alone, of equal shape and method) are ranked by `importance`, and the fewest of them whose
    shares add up to `threshold` keep factors of their own; the others of the kind share one pair.
    `scope="layer"` ranks all kinds together, layer by layer. With k of L layers kept a kind trains
    `(k + [k < L]) rank (d_in + d_out)` numbers. Attach the rules to train from fresh factors.

    Raises InputError for a list of methods, for experts, for scores that are all zero, and for a
    threshold outside (0, 1].

    Source: Zhou et al. 2024, arXiv:2402.07721.
    """
    if scope not in ("kind", "layer"):
        raise InputError(f"lora_drop(scope={scope!r}): give 'kind' or 'layer'")
    frozen, trained = attach(key, params, rules, sites)
    trained = _probed(loss, frozen, trained, batches, epochs, optimizer or optax.adamw(1e-3))
    scores = importance(loss, frozen, trained, batches, mask=mask)
    nodes = adapted(frozen)
    groups = _groups({path: nodes[path] for path in scores})
    totals = {kind: np.concatenate([scores[p].ravel() for p in ps]) for kind, ps in groups.items()}
    if scope == "layer":
        totals = dict.fromkeys(totals, _summed(totals))
    kept = {kind: set(selection(total, threshold)) for kind, total in totals.items()}
    chosen: dict[Rule, Choice] = {re.escape(path): node.methods for path, node in nodes.items()}
    shares: dict[str, np.ndarray] = {}
    for kind, paths in groups.items():
        first = 0
        for path in paths:
            own = range(first, first := first + scores[path].size)
            chosen[re.escape(path)] = _choice(nodes[path], [i in kept[kind] for i in own], kind[0])
            shares[path] = (totals[kind] / totals[kind].sum())[own].reshape(scores[path].shape)
    return Dropped(chosen, shares)


def importance(
    loss: Loss, frozen: Any, trained: Trained, batches: Sequence[Batch], *, mask: Mask = None
) -> dict[str, np.ndarray]:
    """The score of each adapted matrix, by path: the sum over tokens of `|s x a b|^2`, `[*stack]`.

    `x` is the matrix's input in the adapted model, without dropout. `mask(batch)`, `[B, T]`, is
    False (or 0) at padding, whose rows do not count; products after pooling have rows `[B]`.

    Raises InputError for parameters with one method a layer, for experts, and for a mask that fits
    a product's rows in neither way.
    """
    nodes = {path: node for path, node in adapted(frozen).items() if node.method.factors}
    for path, node in nodes.items():
        _check(path, node)
    energies = {p: jnp.zeros(n.site.stack if n.site else ()) for p, n in nodes.items()}

    @jax.jit
    def squares(frozen: Any, trained: Trained, batch: Batch) -> Any:
        seen = mask(batch) if mask else None
        known = {path: _probing(node, seen) for path, node in nodes.items()}
        watched = tree.replace(frozen, known, is_adapted)

        def total(energies: dict[str, jax.Array]) -> jax.Array:
            own = {path: {**trained[path], "energy": e} for path, e in energies.items()}
            return factored(loss)(bind(watched, {**trained, **own}), batch)[0]

        return jax.grad(total)(energies)

    found = [jax.device_get(squares(frozen, trained, batch)) for batch in batches]
    return {path: np.sum([np.float64(one[path]) for one in found], axis=0) for path in nodes}


def importance_from(
    covariance: Mapping[str, jax.Array], frozen: Any, trained: Trained
) -> dict[str, np.ndarray]:
    """The same scores from `c = sum x x^T` of each input, `[*stack, d_in, d_in]`, by path.

    `|x a b|^2` adds up to `trace(b^T a^T c a b)`, with `s` in `a`.
    """
    nodes = adapted(bind(frozen, trained))
    scores = {}
    for path, c in covariance.items():
        method = nodes[path].method
        assert method.factors is not None
        a, b = lifted(method.factors, c.shape[:-2])(*nodes[path].matrices())
        scores[path] = np.float64(jnp.sum((a.mT @ c @ a) * (b @ b.mT), axis=(-2, -1)))
    return scores


def selection(scores: Sequence[float] | np.ndarray, threshold: float = 0.9) -> tuple[int, ...]:
    """The fewest positions whose shares of the whole add up to `threshold`, in their order.

    Equal scores count from the first position on.

    >>> selection([1.0, 6.0, 0.5, 2.5], threshold=0.8)
    (1, 3)
    """
    if not 0 < threshold <= 1:
        raise InputError(f"lora_drop(threshold={threshold}): a share of the score, in (0, 1]")
    values = np.asarray(scores, np.float64)
    if not np.isfinite(values).all() or not values.sum() > 0:
        raise InputError(
            "lora_drop: no layer's update has a score, as with fresh adapters; train the probe "
            "first (more batches or epochs, or a higher learning rate)"
        )
    order = np.argsort(-values, kind="stable")
    reached = np.cumsum(values[order]) / values.sum() >= threshold - 1e-9
    return tuple(sorted(order[: int(np.argmax(reached)) + 1].tolist()))


def untied(frozen: Any, trained: Trained) -> tuple[Any, Trained]:
    """The same function with a copy of shared factors in every layer, as other formats want it."""
    leaves: dict[str, Any] = {}
    left = dict(trained)
    for path, node in adapted(frozen).items():
        each = [node.methods] if isinstance(node.methods, Method) else node.methods
        if not any(_is_tied(method) for method in each):
            continue
        pair = trained[node.pool]
        left.pop(node.pool, None)
        if isinstance(node.methods, Method):
            stack = node.site.stack if node.site else ()
            copies = {n: jnp.broadcast_to(x, (*stack, *x.shape)) for n, x in pair.items()}
            left[path] = trained[path] | copies
        else:
            shared = {str(i): pair for i, method in enumerate(each) if _is_tied(method)}
            left[path] = {i: own | shared.get(i, {}) for i, own in trained[path].items()}
        plain = tuple(_inside(method) for method in each)
        methods = plain[0] if isinstance(node.methods, Method) else plain
        leaves[path] = replace(node, methods=methods, pool="")
    return tree.replace(frozen, leaves, is_adapted), left


def _probed(
    loss: Loss,
    frozen: Any,
    trained: Trained,
    batches: Sequence[Batch],
    epochs: int,
    optimizer: optax.GradientTransformation,
) -> Trained:
    """What is trained after some passes over the batches."""
    step = make_step(adapter_loss(loss), optimizer)
    state = init_state(trained, optimizer)
    for batch in [batch for _ in range(epochs) for batch in batches]:
        state, _ = step(state, frozen, batch)
    return state.trained


def _probing(node: Adapted, mask: jax.Array | None) -> Adapted:
    """A node whose products note the squares of their update as the gradient of `energy`."""
    assert isinstance(node.methods, Method)
    if mask is None:
        return replace(node, methods=_noting(node.methods))
    stack = node.site.stack if node.site else ()
    seen = jnp.reshape(mask, (*(1 for _ in stack), *mask.shape))
    return replace(node, methods=_noting(node.methods), frozen=node.frozen | {"seen": seen})


def _noting(method: Method) -> Method:
    weight, factors = method.weight, method.factors
    assert weight is not None and factors is not None
    forward = method.apply or (lambda frozen, trained, x: x @ weight(frozen, trained))

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        a, b = factors(frozen, trained)
        rows = (x @ a) @ b.astype(x.dtype)
        squares = jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=-1)
        if "seen" in frozen:
            squares = squares * _weights(frozen["seen"], x.places)
        energy = {"energy": trained["energy"]}
        return recorded(forward(frozen, trained, x), energy, {"energy": jnp.sum(squares)})

    return replace(method, apply=apply)


def _weights(mask: jax.Array, places: tuple[int, ...]) -> jax.Array:
    """1 for rows that count, 0 for padding, `[T]`."""
    if places in (mask.shape, (mask.size,)):
        return (mask != 0).reshape(-1).astype(jnp.float32)
    if places == mask.shape[:1]:
        return jnp.ones(places)
    raise InputError(
        f"the mask has shape {list(mask.shape)}, but a product's rows are {list(places)}; give "
        "batches without padding and no mask"
    )


def _groups(nodes: Mapping[str, Adapted]) -> dict[tuple[Any, ...], list[str]]:
    """The paths of each kind: equal but for numbers, of one shape, under one method."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, node in nodes.items():
        assert node.site is not None
        name = f"{re.sub(r'[0-9]+', '*', path)} {node.site.d_in}x{node.site.d_out}"
        groups.setdefault((name, node.methods), []).append(path)
    return groups


def _summed(totals: Mapping[Any, np.ndarray]) -> np.ndarray:
    """The scores of all kinds, layer by layer."""
    if len({total.size for total in totals.values()}) > 1:
        counts = ", ".join(f"{kind[0]}: {total.size}" for kind, total in totals.items())
        raise InputError(
            f"lora_drop(scope='layer'): not every kind is in every layer ({counts}); "
            "give scope='kind'"
        )
    return np.sum(list(totals.values()), axis=0)


def _choice(node: Adapted, kept: list[bool], group: str) -> Choice:
    """The method of one parameter, or one for each of its layers."""
    method = node.method
    if len(set(kept)) == 1:
        return method if kept[0] else tied(method, group)
    return [method if own else tied(method, group) for own in kept]


def _check(path: str, node: Adapted) -> None:
    if not isinstance(node.methods, Method):
        raise InputError(
            f"'{path}' has a list of methods, and lora_drop compares layers under one; give it one"
        )
    if node.site is None or node.site.experts:
        raise InputError(
            f"'{path}' belongs to experts, which are no layers to compare; leave it out of the "
            "rules and adapt it afterwards"
        )


def _is_tied(method: Method | None) -> bool:
    return method is not None and method.factory is tied


def _inside(method: Method | None) -> Method | None:
    """The method that a tied one repeats; any other is itself."""
    return method.hyper["method"] if method is not None and _is_tied(method) else method
