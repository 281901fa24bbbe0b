"""What a case is, numbers for its parameters, and quick compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.select import kernels

Build = Callable[[jax.Array], tuple[Callable[..., Any], Any, tuple[Any, ...]]]

_OPTIONS: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False


@dataclass(frozen=True, eq=False)
class Case:
    """A small model: `build(key) -> apply, params, inputs`, and the rules' targets.

    `sites` gives every site's (d_in, d_out, stack, uses), as a reader sees them. `exact` says that
    a fresh LoRA leaves the output equal bit for bit (elsewhere XLA orders a sum otherwise, once the
    product is not the last thing done to it), `thorough` that it meets every method and also runs
    outside jit, `narrow` that it computes in bfloat16. A while loop is not `differentiable`
    backwards. `transposed` says that a kernel is also used as its transpose, `mapped` that JAX can
    map its own operations over their parameters.
    """

    name: str
    build: Build
    sites: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    targets: Any = kernels
    exact: bool = True
    thorough: bool = False
    narrow: bool = False
    differentiable: bool = True
    transposed: bool = False
    mapped: bool = True

    def __str__(self) -> str:
        return self.name


class Draw:
    """Arrays drawn by numpy, which compiles nothing, from a JAX key."""

    def __init__(self, key: jax.Array) -> None:
        self.rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def array(self, *shape: int) -> jax.Array:
        """Standard normal numbers."""
        return jnp.asarray(self.rng.standard_normal(shape, np.float32))

    def kernel(self, *shape: int) -> jax.Array:
        """Normal numbers scaled by the last axis but one, `[..., d_in, d_out]`."""
        return jnp.asarray(self.rng.standard_normal(shape, np.float32) / shape[-2] ** 0.5)

    def ids(self, high: int, *shape: int) -> jax.Array:
        """Integers below `high`."""
        return jnp.asarray(self.rng.integers(0, high, shape, np.int32))

    def fill(self, shapes: Any) -> Any:
        """A tree of arrays in place of a tree of shapes; vectors are positive (scales, biases)."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            if len(leaf.shape) > 1:
                return self.kernel(*leaf.shape)
            return jnp.asarray(self.rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

        return jax.tree.map(one, shapes)


def compiled_as_users_do(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with all optimisations, also where XLA_FLAGS leaves some out: for equal bits."""
    options = {"xla_backend_optimization_level": 3}
    if jax.__version_info__ < (0, 12):
        options["xla_cpu_use_fusion_emitters"] = True
    return jax.jit(function, compiler_options=options)


def quick(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for programs that run a few times on tiny arrays: a third of the time to compile.

    The arithmetic is the same, with few optimisations.
    """
    return jax.jit(function, compiler_options=_OPTIONS)
