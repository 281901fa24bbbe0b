"""Functions with their own derivative that take a kernel as an argument."""

import functools

import jax
import jax.numpy as jnp

from cases.case import DENSE, Case, Draw


@jax.custom_jvp
def smooth(x, w):
    return jnp.tanh(x @ w)


@smooth.defjvp
def _smooth_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = smooth(x, w)
    return y, (1 - y**2) * (dx @ w + x @ dw)


@jax.custom_vjp
def dense(x, w):
    return x @ w


dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def halved(x, w, scale):
    """The backward rule is deliberately not the derivative."""
    return jnp.sin(x @ w)


def _halved_bwd(scale, kept, g):
    x, w = kept
    g = scale * g * jnp.cos(x @ w)
    return g @ w.T, x.T @ g


halved.defvjp(lambda x, w, scale: (jnp.sin(x @ w), (x, w)), _halved_bwd)


@jax.custom_vjp
def straight(x, scale):
    """A bound with a straight-through derivative; takes no kernel."""
    return jnp.clip(x, -scale, scale)


straight.defvjp(lambda x, scale: (straight(x, scale), None), lambda kept, g: (g, None))


def custom_jvp(key):
    draw = Draw(key)
    params = {"w": draw.kernel(5, 7), "v": draw.kernel(7, 3)}

    def apply(params, x):
        return jax.nn.relu(smooth(x, params["w"])) @ params["v"]

    return apply, params, (draw.array(4, 5),)


def custom_vjp(key):
    draw = Draw(key)
    params = {"w": draw.kernel(5, 7), "v": draw.kernel(7, 3)}

    def apply(params, x):
        return dense(jnp.tanh(dense(x, params["w"])), params["v"])

    return apply, params, (draw.array(4, 5),)


def scaled_gradients(key):
    """Gradients of kernels and of what lies below them are halved on purpose."""
    draw = Draw(key)
    params = {"below": draw.kernel(5, 7), "w": draw.kernel(7, 6), "above": draw.kernel(6, 3)}

    def apply(params, x):
        h = straight(x @ params["below"], 1.0)
        return halved(h, params["w"], 0.5) @ params["above"]

    return apply, params, (draw.array(4, 5),)


def scanned_rules(key):
    """The same inside a checkpointed scan over a stack."""
    draw = Draw(key)
    params = {"w": draw.kernel(3, 5, 7), "v": draw.kernel(3, 7, 5)}

    def apply(params, x):
        @jax.checkpoint
        def layer(h, p):
            return h + halved(smooth(h, p["w"]), p["v"], 0.5), None

        return jax.lax.scan(layer, x, params)[0]

    return apply, params, (draw.array(4, 5),)


CASES = [
    Case("custom_jvp", custom_jvp, {"w": (5, 7, (), DENSE), "v": (7, 3, (), DENSE)}),
    Case("custom_vjp", custom_vjp, {"w": (5, 7, (), DENSE), "v": (7, 3, (), DENSE)}, thorough=True),
    Case(
        "scaled_gradients",
        scaled_gradients,
        {"below": (5, 7, (), DENSE), "w": (7, 6, (), DENSE), "above": (6, 3, (), DENSE)},
    ),
    Case("scanned_rules", scanned_rules, {"w": (5, 7, (3,), DENSE), "v": (7, 5, (3,), DENSE)}),
]
