"""What a case is, and numbers for its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj

DENSE, LOOKUP, CONV, RAGGED = ("dense",), ("lookup",), ("conv",), ("ragged",)


@dataclass(frozen=True, eq=False)
class Case:
    """`build(key) -> apply, params, inputs`, the sites that a reader sees, and the rules' targets.

    `sites` gives every site's (d_in, d_out, stack, uses). `exact` says that a fresh LoRA leaves the
    output equal bit for bit (elsewhere XLA orders a sum otherwise, once the product is not the last
    thing done to it), `thorough` that it meets every method and also runs outside jit,
    `narrow` that it computes in bfloat16. A while loop is not `differentiable` backwards.
    """

    name: str
    build: Callable[[jax.Array], tuple[Callable, Any, tuple]]
    sites: Mapping[str, tuple]
    targets: Any = lj.kernels
    exact: bool = True
    thorough: bool = False
    narrow: bool = False
    differentiable: bool = True

    def __str__(self) -> str:
        return self.name


class Draw:
    """Arrays drawn by numpy, which compiles nothing, from a JAX key."""

    def __init__(self, key):
        self.rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def array(self, *shape):
        """Standard normal numbers."""
        return jnp.asarray(self.rng.standard_normal(shape, np.float32))

    def kernel(self, *shape):
        """Normal numbers scaled by the last axis but one, `[..., d_in, d_out]`."""
        return jnp.asarray(self.rng.standard_normal(shape, np.float32) / shape[-2] ** 0.5)

    def ids(self, high, *shape):
        """Integers below `high`."""
        return jnp.asarray(self.rng.integers(0, high, shape, np.int32))

    def fill(self, shapes):
        """A tree of arrays in place of a tree of shapes; vectors are positive (scales, biases)."""

        def one(leaf):
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            if len(leaf.shape) > 1:
                return self.kernel(*leaf.shape)
            return jnp.asarray(self.rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

        return jax.tree.map(one, shapes)


def prefixed(prefix, sites):
    """The sites of a part of a model, with the part's path in front."""
    return {f"{prefix}/{path}": seen for path, seen in sites.items()}
