"""Kernels inside loops, branches, nested jits, checkpoints and maps."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cases.case import DENSE, Case, Draw


def loops(key):
    """A kernel constant in a while loop, one in a branch, one in a scan's carry."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 5), "c": draw.kernel(5, 7), "d": draw.kernel(7, 5)}

    def apply(params, x):
        def both(x):
            return jnp.tanh(x @ params["c"]) @ params["d"]

        x = jax.lax.cond(x.sum() > 0, both, lambda x: both(x) + x, x)

        def step(carry, _):
            h, w = carry
            return (jnp.tanh(h @ w), w), None

        (x, _), _ = jax.lax.scan(step, (x, params["w"]), None, length=2)
        last = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"]), x[:1])
        return x + last

    return apply, params, (draw.array(3, 5),)


def scan_of_everything(key):
    """One scan with kernels as xs, as a constant and in the carry, backwards, unrolled."""
    draw = Draw(key)
    params = {"xs": draw.kernel(4, 5, 7), "const": draw.kernel(7, 6), "carry": draw.kernel(6, 5)}

    def apply(params, x):
        def step(carry, slices):
            (h, w), (kernel, x) = carry, slices
            h = jnp.tanh((h + x) @ kernel) @ params["const"] @ w
            return (h, w), h

        xs = params["xs"], x
        return jax.lax.scan(step, (x[0], params["carry"]), xs, reverse=True, unroll=2)[1]

    return apply, params, (draw.array(4, 2, 5),)


def nested_scans(key):
    """Layers within blocks, two stack axes, and inputs as the outer loop's."""
    draw = Draw(key)
    params = {"inner": draw.kernel(2, 3, 5, 7), "outer": draw.kernel(2, 7, 5)}

    def apply(params, x):
        def block(h, p):
            def layer(h, w):
                return jnp.tanh(h @ w @ p["outer"]), h.sum()

            return jax.lax.scan(layer, h, p["inner"])

        x, sums = jax.lax.scan(block, x, params)
        return x, sums

    return apply, params, (draw.array(4, 5),)


def while_loop(key):
    """A kernel in the condition, one in the body, one in the carry; no reverse derivative."""
    draw = Draw(key)
    params = {"test": draw.kernel(5, 1), "body": draw.kernel(5, 7), "back": draw.kernel(7, 5)}

    def apply(params, x):
        def again(carry):
            i, h, _ = carry
            return (i < 3) & (jnp.sum(h @ params["test"]) < 1e3)

        def step(carry):
            i, h, back = carry
            return i + 1, jnp.tanh(h @ params["body"]) @ back, back

        return jax.lax.while_loop(again, step, (0, x, params["back"]))[1]

    return apply, params, (draw.array(3, 5),)


def branches(key):
    """Branches that take kernels as arguments, share one, and keep one to themselves."""
    draw = Draw(key)
    params = {"a": draw.kernel(5, 7), "b": draw.kernel(5, 7), "out": draw.kernel(7, 3)}

    def apply(params, x, which):
        choices = [
            lambda x, w: x @ w,
            lambda x, w: jnp.tanh(x @ params["b"]),
            lambda x, w: (x @ w) * (x @ params["b"]),
        ]
        h = jax.lax.switch(which, choices, x, params["a"])
        h = jax.lax.cond(which > 1, lambda h, p: h @ p["out"], lambda h, p: h[:, :3], h, params)
        each = jnp.arange(x.shape[0]) % 2
        return h + jax.vmap(lambda i, x: jax.lax.switch(i, choices, x, params["a"]))(each, x)[:, :3]

    return apply, params, (draw.array(4, 5), jnp.int32(2))


def nested_jit(key):
    """A jit inside a jit that takes kernels by position and by name, called twice."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 7), "v": draw.kernel(7, 5)}

    @functools.partial(jax.jit, static_argnames="power")
    def inner(x, *, kernel, power):
        return jnp.sin(x @ kernel) ** power

    @jax.jit
    def outer(params, x):
        h = inner(x, kernel=params["w"], power=2)
        h = inner(h, kernel=params["v"], power=1)
        return inner(h, kernel=params["w"], power=2)

    def apply(params, x):
        return outer(params, x)

    return apply, params, (draw.array(3, 5),)


def checkpoints(key, policy):
    """Checkpointed layers, one inside another, over a scan."""
    draw = Draw(key)
    params = {"up": draw.kernel(2, 5, 7), "down": draw.kernel(2, 7, 5), "out": draw.kernel(5, 3)}

    def apply(params, x):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(h, p):
            inner = jax.checkpoint(lambda h, w: jnp.tanh(h @ w))
            h = checkpoint_name(inner(h, p["up"]) @ p["down"], "layer")
            return jnp.sin(h), None

        layers = {name: params[name] for name in ("up", "down")}
        x = jax.lax.scan(layer, x, layers)[0]
        return jax.checkpoint(lambda x, w: x @ w, policy=policy)(x, params["out"])

    return apply, params, (draw.array(4, 5),)


def maps_around(key):
    """The whole model under a vmap over inputs, and a map over rows in a loop."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 7), "v": draw.kernel(7, 3)}

    def apply(params, x):
        single = lambda params, x: jnp.tanh(params["w"].T @ x) @ params["v"]  # noqa: E731
        once = jax.vmap(jax.vmap(single, (None, 0)), (None, 1), 1)(params, x)
        return once + jax.lax.map(lambda row: jax.vmap(single, (None, 0))(params, row), x)

    return apply, params, (draw.array(2, 4, 5),)


def ensemble(key):
    """Members of an ensemble by vmap over kernels, one axis in front and one behind.

    The first kernel meets one input for all members: to JAX that is one product of 21 outputs.
    """
    draw = Draw(key)
    params = {"w": draw.kernel(3, 5, 7), "v": draw.array(7, 4, 3)}

    def apply(params, x):
        member = jax.vmap(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], ({"w": 0, "v": 2}, None), 1)
        return member(params, x)

    return apply, params, (draw.array(2, 5),)


def map_over_a_stack(key):
    """Heads by vmap over an axis in the middle of a kernel that scan has already sliced."""
    draw = Draw(key)
    params = {"w": draw.kernel(3, 5, 2, 7), "v": draw.kernel(3, 2, 7, 5)}

    def apply(params, x):
        def layer(h, p):
            heads = jax.vmap(lambda w, v: jnp.tanh(h @ w) @ v, (1, 0))(p["w"], p["v"])
            return h + heads.sum(0), None

        return jax.lax.scan(layer, x, params)[0]

    return apply, params, (draw.array(4, 5),)


def checkpointed(policy):
    return lambda key: checkpoints(key, policy)


SCANNED = {
    "up": (5, 7, (2,), DENSE),
    "down": (7, 5, (2,), DENSE),
    "out": (5, 3, (), DENSE),
}
POLICIES = jax.checkpoint_policies

CASES = [
    Case(
        "loops",
        loops,
        {"w": (5, 5, (), DENSE), "c": (5, 7, (), DENSE), "d": (7, 5, (), DENSE)},
        thorough=True,
    ),
    Case(
        "scan_of_everything",
        scan_of_everything,
        {"xs": (5, 7, (4,), DENSE), "const": (7, 6, (), DENSE), "carry": (6, 5, (), DENSE)},
    ),
    Case(
        "nested_scans",
        nested_scans,
        {"inner": (5, 7, (2, 3), DENSE), "outer": (7, 5, (2,), DENSE)},
    ),
    Case(
        "while_loop",
        while_loop,
        {"test": (5, 1, (), DENSE), "body": (5, 7, (), DENSE), "back": (7, 5, (), DENSE)},
        differentiable=False,
    ),
    Case(
        "branches",
        branches,
        {"a": (5, 7, (), DENSE), "b": (5, 7, (), DENSE), "out": (7, 3, (), DENSE)},
    ),
    Case("nested_jit", nested_jit, {"w": (5, 7, (), DENSE), "v": (7, 5, (), DENSE)}),
    Case("checkpoint_nothing", checkpointed(POLICIES.nothing_saveable), SCANNED),
    Case("checkpoint_dots", checkpointed(POLICIES.dots_with_no_batch_dims_saveable), SCANNED),
    Case("checkpoint_names", checkpointed(POLICIES.save_only_these_names("layer")), SCANNED),
    Case("maps_around", maps_around, {"w": (5, 7, (), DENSE), "v": (7, 3, (), DENSE)}),
    Case("ensemble", ensemble, {"w": (5, 21, (), DENSE), "v": (7, 4, (3,), DENSE)}),
    Case(
        "map_over_a_stack",
        map_over_a_stack,
        {"w": (5, 14, (3,), DENSE), "v": (7, 5, (3, 2), DENSE)},
    ),
]
