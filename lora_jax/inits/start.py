"""Where an adapter's two factors start: a small record of one pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, identity

Factors = tuple[jax.Array, jax.Array]
Draw = Callable[..., Factors]


@dataclass(frozen=True, eq=False)
class Start:
    """How `a: [d_in, rank]` and `b: [rank, d_out]` start on a kernel `w: [d_in, d_out]`.

    ```
    draw: key, w, rank, scale[, datum] -> a, b
    ```

    * `residual`: the base becomes `w - scale a b`, so that a start which is not zero changes
      nothing.
    * `freezes` names the factors ("a" or "b") that are not trained.
    * `wants` names the function of `lora_jax.calibrate` that makes what `draw` takes as `datum`;
      `data` holds that by path, stacked as the parameter is ({}: not gathered yet).
    * `lookup` replaces `draw` for embeddings.
    * `noise`: `a` is random and `b` zero, neither follows from the kernel or from data.

    Two starts are equal when their functions and data are.

    >>> def ones(key, w, rank, scale):
    ...     return jnp.ones((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
    >>> from lora_jax import lora
    >>> lora(rank=2, init=Start("ones", ones))
    lora(rank=2, alpha=8.0, init='ones')
    """

    name: str
    draw: Draw
    residual: bool = False
    freezes: tuple[str, ...] = ()
    wants: str = ""
    data: Mapping[str, jax.Array] | None = None
    lookup: Draw | None = None
    noise: bool = False

    def factors(
        self, key: jax.Array, w: jax.Array, rank: int, scale: float, *datum: Any, lookup: bool
    ) -> Factors:
        """The start on one kernel, in float32 at least; zeros where the datum is not given."""
        if self.data is not None and not datum:
            return zeros(w, rank)
        draw = self.lookup if lookup and self.lookup else self.draw
        return draw(key, w, rank, scale, *datum)

    def _identity(self) -> Any:
        functions = identity(self.draw), identity(self.lookup)
        flags = self.name, self.residual, self.freezes, self.wants, self.noise
        return functions, flags, identity(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Start) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def wide(x: jax.Array) -> jax.Array:
    """The array in float32 at least: what factors, and decompositions for them, are held in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zeros(w: jax.Array, rank: int) -> Factors:
    """Two factors of a kernel that are zero."""
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    return jnp.zeros((w.shape[0], rank), dtype), jnp.zeros((rank, w.shape[1]), dtype)


def remainder(w: jax.Array, frozen: Arrays) -> Arrays:
    """The base of a residual start: `{"w": w - scale a_0 b_0}`, cast once to the kernel's dtype."""
    a = frozen["scale"] * frozen["a_0"]
    product = jnp.matmul(a, frozen["b_0"], precision=jax.lax.Precision.HIGHEST)
    return {"w": (wide(w) - product).astype(w.dtype)}


def check_rank(name: str, rank: int, w: jax.Array, needed: int | None = None) -> None:
    """Raise InputError where a decomposition of the kernel has too few components."""
    needed, found = needed or rank, min(w.shape)
    if needed > found:
        wants = "" if needed == rank else f" ({needed} components)"
        raise InputError(
            f"init={name!r} with rank={rank}{wants} on a kernel of shape {list(w.shape)}: it "
            f"decomposes into {found} components; give a lower rank there, or init='kaiming'"
        )


def check_datum(name: str, datum: Any, shape: tuple[int, ...], what: str) -> None:
    """Raise InputError where a datum does not belong to the kernel."""
    if tuple(datum.shape) != shape:
        raise InputError(
            f"init={name!r} takes {what} of shape {list(shape)} for each kernel, not "
            f"{list(datum.shape)}; gather it with lora_jax.calibrate on these parameters"
        )
