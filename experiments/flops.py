"""Floating-point operations of a traced program's matrix products, loops counted in full.

XLA's own cost analysis counts the body of a loop once, whatever its length.
"""

import math
from typing import Any


def matrix_flops(closed: Any) -> int:
    """Two operations for every multiply-add of every `dot_general`, scans times their length.

    Loops of unknown length count once; of a branch the dearer side counts.

    >>> import jax, jax.numpy as jnp
    >>> program = jax.make_jaxpr(
    ...     lambda w, x: jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=3)[0])
    >>> matrix_flops(program(jnp.ones((5, 5)), jnp.ones((2, 5))))
    300
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        return 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    inner = [matrix_flops(part) for value in eqn.params.values() for part in _programs(value)]
    if eqn.primitive.name == "cond":
        return max(inner, default=0)
    return eqn.params.get("length", 1) * sum(inner)


def _programs(value: Any) -> list[Any]:
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return [value]
    return [part for item in value for part in _programs(item)] if isinstance(value, tuple) else []
