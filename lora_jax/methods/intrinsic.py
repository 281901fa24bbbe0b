"""Intrinsic dimension: all parameters move together in one random subspace."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method, Shapes
from lora_jax.methods.fastfood import columns, fastfood, next_power

PROJECTIONS = ("fastfood", "dense", "sparse")


def intrinsic(
    dimension: int,
    *,
    said: bool = False,
    projection: str = "fastfood",
    global_: bool = False,
    layers: int | None = None,
    reference_gradient: bool = False,
) -> Method:
    """`theta_i = theta_0i + P_i theta_d` (DID), or `theta_0i + lambda_i P_i theta_d` (SAID).

    For every parameter of whatever shape, as in `{".*": intrinsic(200)}`. `theta_d` is one vector
    for all of them, found in `trained["shared/intrinsic"]`, and starts at zero, so nothing changes
    at first. `P_i` is drawn from the parameter's own key and never stored nor formed; its columns
    have unit length: nearly with `"fastfood"` (exactly where the parameter's size is a power of
    two), exactly with `"dense"` (Gaussian) and `"sparse"` (signs at a density of `1 / sqrt(D)`),
    which take O(D d) time in place of O(D log D). With `global_` the columns of all `P_i` together
    have unit length (in the mean over draws), as in one projection of the flattened model.

    `dimension` counts all that is trained: with `said`, one `lambda_i` (starting at one) for each
    of the m tensors, and `dimension - m` coordinates. A parameter is one tensor; `layers` says how
    many layers a model of scanned layers stacks, and parameters whose first axis has that size
    are that many tensors, each with its own draw and `lambda`.

    `reference_gradient` divides the gradient of `theta_d` through Fastfood by L, the padded size,
    as the authors' code does. Raises InputError for a dimension that leaves no coordinate, for an
    unknown projection, and, without `global_`, for a tensor too small to see every coordinate.

    Sources: Li et al. 2018, arXiv:1804.08838; Aghajanyan et al. 2020, arXiv:2012.13255.

    >>> intrinsic(200, said=True)
    intrinsic(dimension=200, said=True)
    """
    _check(dimension, projection, layers)

    def tensors(shape: tuple[int, ...]) -> int:
        return layers if layers and len(shape) > 1 and shape[0] == layers else 1

    def common(key: jax.Array, shapes: Shapes) -> tuple[Arrays, Arrays]:
        count = sum(tensors(x.shape) for x in shapes.values())
        free = dimension - count if said else dimension
        if free < 0 or (said and free == 0):
            raise InputError(
                f"intrinsic(dimension={dimension}, said=True): {count} tensors take a number each, "
                "so none is left to move in; give a larger dimension, or said=False"
            )
        sizes = {path: math.prod(x.shape) for path, x in shapes.items()}
        if not global_:
            parts = {path: size // tensors(shapes[path].shape) for path, size in sizes.items()}
            _check_sizes(parts, free, dimension)
        dtype = jnp.result_type(jnp.float32, *(x.dtype for x in shapes.values()))
        whole = {"whole": jnp.asarray(sum(sizes.values()), dtype)} if global_ else {}
        return whole, {"theta": jnp.zeros(free, dtype)}

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        count = tensors(w.shape)
        lead = (count,) if count > 1 else ()
        keys = jax.random.key_data(jax.random.split(key, lead) if lead else key)
        scale = jnp.ones(lead, jnp.promote_types(w.dtype, jnp.float32))
        return {"w": w, "key": keys}, {"scale": scale} if said else {}

    def step(theta: jax.Array, key: jax.Array, size: int, whole: Any) -> jax.Array:
        key = jax.random.wrap_key_data(key)
        if projection == "fastfood":
            part = _slower(theta, 1 / next_power(max(size, theta.size))) if slow else theta
            return fastfood(part, key, size) / jnp.sqrt(size if whole is None else whole)
        column = {"dense": _gaussian, "sparse": _signs}[projection]
        return columns(theta, key, size, lambda key, size: column(key, size, whole))

    slow = reference_gradient

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        w, keys = frozen["w"], frozen["key"]
        theta, whole = trained["theta"], frozen.get("whole")
        count = tensors(w.shape)
        size = math.prod(w.shape) // count
        update = jax.vmap(lambda key: step(theta, key, size, whole))(keys.reshape(count, -1))
        if said:
            update = trained["scale"].reshape(count, 1) * update
        return (w.astype(update.dtype) + update.reshape(w.shape)).astype(w.dtype)

    hyper = {
        "dimension": dimension,
        "said": said,
        "projection": projection,
        "global_": global_,
        "layers": layers,
        "reference_gradient": reference_gradient,
    }
    return Method(
        "intrinsic", init, weight, None, hyper, anywhere=True, common=common, factory=intrinsic
    )


def _gaussian(key: jax.Array, size: int, whole: Any) -> jax.Array:
    """A Gaussian column of unit length, or its rows of a column of `whole` numbers."""
    column = jax.random.normal(key, (size,))
    square = jnp.sum(column * column) if whole is None else whole
    return column * jax.lax.rsqrt(square)


def _signs(key: jax.Array, size: int, whole: Any) -> jax.Array:
    """A column of signs at a density of `1 / sqrt(D)`, scaled likewise."""
    where, which = jax.random.split(key)
    density = 1 / jnp.sqrt(jnp.asarray(size if whole is None else whole, jnp.float32))
    column = jax.random.rademacher(which, (size,), jnp.float32)
    column = jnp.where(jax.random.bernoulli(where, density, (size,)), column, 0)
    square = jnp.sum(jnp.abs(column)) if whole is None else jnp.sqrt(whole)
    return column * jax.lax.rsqrt(jnp.maximum(square, 1))


@jax.custom_jvp
def _slower(theta: jax.Array, factor: float) -> jax.Array:
    """`theta` itself, its derivative times a factor."""
    return theta


@_slower.defjvp
def _slower_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], primals[1] * tangents[0]


def _check(dimension: int, projection: str, layers: int | None) -> None:
    if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 0:
        raise InputError(
            f"intrinsic(dimension={dimension!r}): how many numbers are trained; give 0 or more"
        )
    if projection not in PROJECTIONS:
        raise InputError(
            f"intrinsic(projection={projection!r}): unknown; give one of {', '.join(PROJECTIONS)}"
        )
    if layers is not None and (isinstance(layers, bool) or layers < 1):
        raise InputError(f"intrinsic(layers={layers!r}): the layers of a stack; give 1 or more")


def _check_sizes(sizes: dict[str, int], free: int, dimension: int) -> None:
    """Raise InputError for a tensor whose projection would see the first coordinates alone."""
    for path, size in sizes.items():
        if free > next_power(size):
            raise InputError(
                f"intrinsic(dimension={dimension}): '{path}' has tensors of {size} numbers, whose "
                f"projection has room for {next_power(size)} coordinates, not {free}; leave it out "
                "of the rules, lower the dimension, or give global_=True"
            )
