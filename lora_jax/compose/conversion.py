"""Any adapter as a plain LoRA."""

from __future__ import annotations

from typing import Any, NamedTuple

from lora_jax.adapter import Adapted, Trained
from lora_jax.compose.spectrum import distance, nearest, shortened
from lora_jax.compose.update import (
    bases,
    change,
    factors,
    kernels,
    plain_lora,
    tree_with,
    whole_node,
    wholes,
)
from lora_jax.errors import InputError


class Fit(NamedTuple):
    """The rank that stands for a kernel's update (None: the parameter itself), and `|error|`.

    The error is relative to the update, in the Frobenius norm; zero where the form is exact.
    """

    rank: int | None
    error: float


def as_lora(
    params: Any, frozen: Any, trained: Trained, rank: int | None = None
) -> tuple[Any, Trained, dict[str, Fit]]:
    """An adapter by whatever methods as a plain LoRA of scale one on `params`, and how near it is.

    Returns `frozen, trained, report`. Where the method's update is a product (LoRA from any start,
    LoHa, VeRA, ...) the factors are exact, of the rank that the product has; `rank` cuts them.
    Any other update (DoRA's magnitude included) is `w' - w`, of which the best `rank` is taken, by
    default the method's own; `report` has the relative error of every kernel. Parameters that are
    trained in their own shape (biases, whole matrices) stay so, under `full()`.

    Raises InputError for a method without a matrix, and for one without a rank where none is given.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> model, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}, jnp.ones((2, 4))
    >>> sites = lj.find_sites(model, params, x)
    >>> pair = lj.attach(jax.random.key(0), params, {"w": lj.dora(rank=2)}, sites)
    >>> as_lora(params, *pair)[2]["w"]
    Fit(rank=2, error=0.0)
    """
    given, made, report = bases([frozen], params), {}, {}
    for path, node in kernels(frozen, trained).items():
        a, b, report[path] = _fitted(node, given.get(path), rank)
        made[path] = plain_lora(node, given.get(path), a, b)
    for path, (node, value) in wholes(frozen, trained).items():
        made[path], report[path] = whole_node(node, value), Fit(None, 0.0)
    return *tree_with(frozen, made), report


def _fitted(node: Adapted, base: Any, rank: int | None) -> tuple[Any, Any, Fit]:
    """Factors of one kernel's update, and how near they are."""
    product = factors(node)
    if product is not None:
        a, b = product.scale[..., None, None] * product.a, product.b
        if rank is None or rank >= product.rank:
            return a, b, Fit(product.rank, 0.0)
        short = shortened(a, b, rank)
        return *short, Fit(rank, distance(a @ b, *short))
    site = node.site
    assert site is not None
    rank = node.method.hyper.get("rank") if rank is None else rank
    if rank is None:
        raise InputError(
            f"as_lora: {node.method!r} of '{node.path}' has no rank of its own; give rank="
        )
    update = change(node, base)
    a, b = nearest(update, min(rank, site.d_in, site.d_out))
    return a, b, Fit(a.shape[-1], distance(update, a, b))
