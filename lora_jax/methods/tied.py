"""One pair of factors for several layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method, Shapes

_PAIR = ("a", "b")


def tied(method: Method, group: str = "") -> Method:
    """`method` with one pair `a, b` for all parameters (and layers) of a group in one `attach`.

    The definition is the method's own. Its `a` and `b` are stored and counted once, and their
    gradient is the sum over the layers that share them; what else it trains (a magnitude, say) each
    layer keeps for itself. A list of one method a layer may mix `tied(method)` and `method`. The
    kernels of a group have one shape.

    Raises InputError for methods that do not train both factors, or that start from the kernel's
    values or from data, and, in `attach`, for a group with kernels of unequal shape.

    >>> from lora_jax import attach, find_sites, lora
    >>> params = {"q": jnp.ones((3, 5)), "k": jnp.ones((3, 5))}
    >>> sites = find_sites(lambda p, x: (x @ p["q"], x @ p["k"]), params, jnp.ones((2, 3)))
    >>> _, trained = attach(jax.random.key(0), params, {"[qk]": tied(lora(rank=2))}, sites)
    >>> jax.tree.map(jnp.shape, trained)
    {'k': {}, 'q': {}, 'shared/tied': {'a': (3, 2), 'b': (2, 5)}}
    """
    _check(method)

    def own(arrays: Arrays) -> Arrays:
        return {name: x for name, x in arrays.items() if name not in _PAIR}

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        frozen, trained = method.init(key, w)
        return frozen, own(trained)

    def start_lookup(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        assert method.lookup_init is not None
        frozen, trained = method.lookup_init(key, w)
        return frozen, own(trained)

    def common(key: jax.Array, shapes: Shapes) -> tuple[Arrays, Arrays]:
        first = next(iter(shapes.values()))
        if other := next((p for p, s in shapes.items() if s.shape != first.shape), None):
            raise InputError(
                f"tied({method!r}, group={group!r}): '{other}' is {shapes[other].shape} and "
                f"'{next(iter(shapes))}' {first.shape}; give each shape a group of its own"
            )
        _, trained = method.init(key, jnp.zeros(first.shape, first.dtype))
        return {}, {name: trained[name] for name in _PAIR}

    at = method.at
    return Method(
        "tied",
        init,
        method.weight,
        method.apply,
        {"method": method, "group": group},
        lookup_init=start_lookup if method.lookup_init else None,
        at=(lambda site: tied(at(site), group)) if at else None,
        common=common,
        factors=method.factors,
        splits=method.splits,
        factory=tied,
    )


def _check(method: Method) -> None:
    """Raise InputError for a method whose factors are not two arrays drawn at random."""
    if not isinstance(method, Method):
        raise InputError(f"tied({method!r}): give a method, such as tied(lora(rank=8))")
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    bound = method.data is not None or method.rebuild or method.common or method.shared
    if bound or not {*_PAIR} <= set(jax.eval_shape(method.init, jax.random.key(0), w)[1]):
        raise InputError(
            f"tied({method!r}): its layers cannot share a and b; take a method that trains both "
            "and draws them at random, such as lora(rank=8)"
        )
