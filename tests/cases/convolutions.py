"""Convolutions of one to three dimensions, every option, channels first and last."""

import jax
import jax.numpy as jnp

from cases.case import CONV, Case, Draw


def convolve(x, w, layout, strides=1, padding="SAME", dilation=1, spread=1, groups=1):
    """`conv_general_dilated` with one number for every spatial axis where that is all it takes."""
    n = x.ndim - 2
    each = lambda v: (v,) * n if isinstance(v, int) else v  # noqa: E731
    return jax.lax.conv_general_dilated(
        x,
        w,
        each(strides),
        padding,
        lhs_dilation=each(spread),
        rhs_dilation=each(dilation),
        dimension_numbers=layout,
        feature_group_count=groups,
    )


def conv_1d(key):
    draw = Draw(key)
    params = {"last": draw.kernel(3, 5, 7), "first": draw.kernel(4, 7, 2)}

    def apply(params, x):
        y = convolve(x, params["last"], ("NWC", "WIO", "NWC"), strides=2, padding="VALID")
        y = jnp.tanh(y).swapaxes(1, 2)
        return convolve(y, params["first"], ("NCW", "OIW", "NCW"), padding=[(1, 0)])

    return apply, params, (draw.array(3, 9, 5),)


def conv_2d(key):
    """Channels last: strides, uneven padding, dilation of the kernel."""
    draw = Draw(key)
    params = {"one": draw.kernel(3, 2, 4, 5), "two": draw.kernel(1, 1, 5, 7)}

    def apply(params, x):
        y = convolve(
            x,
            params["one"],
            ("NHWC", "HWIO", "NHWC"),
            strides=(2, 1),
            padding=[(1, 0), (2, 1)],
            dilation=(1, 2),
        )
        return convolve(jnp.tanh(y), params["two"], ("NHWC", "HWIO", "NHWC"), strides=2)

    return apply, params, (draw.array(2, 8, 6, 4),)


def conv_2d_channels_first(key):
    """Channels first, torch's kernel layout, the operand dilated; another layout comes out."""
    draw = Draw(key)
    params = {"one": draw.kernel(5, 4, 3, 2), "two": draw.kernel(2, 6, 5, 3)}

    def apply(params, x):
        y = convolve(
            x, params["one"], ("NCHW", "OIHW", "NCHW"), padding=[(1, 1), (0, 2)], spread=(1, 2)
        )
        return convolve(jnp.tanh(y), params["two"], ("NCHW", "HOIW", "HWNC"), padding="VALID")

    return apply, params, (draw.array(2, 4, 7, 5),)


def conv_groups(key):
    """Groups in both layouts."""
    draw = Draw(key)
    params = {"last": draw.kernel(2, 3, 2, 9), "first": draw.kernel(6, 3, 2, 1)}

    def apply(params, x):
        y = convolve(x, params["last"], ("NHWC", "HWIO", "NHWC"), groups=3)
        y = jnp.tanh(y).transpose(0, 3, 1, 2)
        return convolve(
            y, params["first"], ("NCHW", "OIHW", "NCHW"), groups=3, padding="VALID", strides=(1, 2)
        )

    return apply, params, (draw.array(2, 5, 4, 6),)


def conv_depthwise(key):
    """One filter a channel, then two, then a pointwise product."""
    draw = Draw(key)
    params = {
        "one": draw.kernel(3, 3, 1, 4),
        "two": draw.kernel(3, 2, 1, 8),
        "point": draw.kernel(1, 1, 8, 5),
    }

    def apply(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        y = convolve(x, params["one"], layout, groups=4, strides=2)
        y = convolve(jnp.tanh(y), params["two"], layout, groups=4, dilation=2)
        return convolve(y, params["point"], layout)

    return apply, params, (draw.array(2, 6, 5, 4),)


def conv_3d(key):
    draw = Draw(key)
    params = {"w": draw.kernel(2, 3, 1, 4, 5)}

    def apply(params, x):
        layout = ("NDHWC", "DHWIO", "NDHWC")
        return convolve(x, params["w"], layout, strides=(1, 2, 1), padding="VALID")

    return apply, params, (draw.array(2, 3, 7, 2, 4),)


def conv_transpose(key):
    """As written, and as the gradient of a convolution (spatially flipped, in and out swapped)."""
    draw = Draw(key)
    params = {"plain": draw.kernel(3, 2, 4, 5), "turned": draw.kernel(2, 3, 6, 5)}

    def apply(params, x):
        y = jax.lax.conv_transpose(x, params["plain"], (2, 1), "SAME")
        y = jnp.tanh(y)
        return jax.lax.conv_transpose(y, params["turned"], (1, 2), "VALID", transpose_kernel=True)

    return apply, params, (draw.array(2, 3, 4, 4),)


def conv_scanned(key):
    """A stack of grouped convolutions under scan, tapped by checkpoint."""
    draw = Draw(key)
    params = {"w": draw.kernel(3, 2, 3, 2, 4), "v": draw.kernel(3, 4, 4)}

    def apply(params, x):
        @jax.checkpoint
        def layer(h, p):
            y = convolve(h, p["w"], ("NHWC", "HWIO", "NHWC"), groups=2)
            return h + jnp.tanh(y) @ p["v"], None

        return jax.lax.scan(layer, x, params)[0]

    return apply, params, (draw.array(2, 5, 3, 4),)


CASES = [
    Case("conv_1d", conv_1d, {"last": (15, 7, (), CONV), "first": (14, 4, (), CONV)}),
    Case("conv_2d", conv_2d, {"one": (24, 5, (), CONV), "two": (5, 7, (), CONV)}),
    Case(
        "conv_2d_channels_first",
        conv_2d_channels_first,
        {"one": (24, 5, (), CONV), "two": (30, 6, (), CONV)},
    ),
    Case(
        "conv_groups",
        conv_groups,
        {"last": (12, 3, (3,), CONV), "first": (6, 2, (3,), CONV)},
        thorough=True,
    ),
    Case(
        "conv_depthwise",
        conv_depthwise,
        {"one": (9, 1, (4,), CONV), "two": (6, 2, (4,), CONV), "point": (8, 5, (), CONV)},
    ),
    Case("conv_3d", conv_3d, {"w": (24, 5, (), CONV)}),
    Case(
        "conv_transpose",
        conv_transpose,
        {"plain": (24, 5, (), CONV), "turned": (30, 6, (), CONV)},
    ),
    Case(
        "conv_scanned",
        conv_scanned,
        {"w": (12, 2, (3, 2), CONV), "v": (4, 4, (3,), ("dense",))},
    ),
]
