"""What happens to a kernel between the parameters and its product."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cases.case import DENSE, Case, Draw
from cases.convolutions import convolve


def used_twice(key):
    """One kernel in two products of the same direction, and once more the other way round."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 7)}

    def apply(params, x, y):
        h = jnp.tanh(x @ params["w"]) + jnp.einsum("df,btd->btf", params["w"], y).sum(0)
        return h @ params["w"].T

    return apply, params, (draw.array(4, 5), draw.array(2, 4, 5))


def two_kinds(key):
    """A pointwise convolution's kernel as a dense kernel, and a table looked up and multiplied."""
    draw = Draw(key)
    params = {"w": draw.kernel(1, 1, 5, 7), "table": draw.array(9, 7)}

    def apply(params, x, ids):
        y = convolve(x, params["w"], ("NHWC", "HWIO", "NHWC"))
        y = jnp.tanh(y) + (x @ params["w"].reshape(5, 7)) * params["table"][ids][:, :, None]
        return jax.nn.softmax(y @ params["table"].T) @ params["table"]

    return apply, params, (draw.array(2, 3, 4, 5), draw.ids(9, 2, 3))


def casts(key):
    """A kernel rounded to bfloat16 on its way, used in bfloat16 and again in float32."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 7), "v": draw.kernel(7, 3)}

    def apply(params, x):
        rounded = params["w"].astype(jnp.bfloat16)
        y = x.astype(jnp.bfloat16) @ rounded + (x @ rounded.astype(x.dtype)).astype(jnp.bfloat16)
        return jnp.dot(y, params["v"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    return apply, params, (draw.array(4, 5),)


def reshapes(key):
    """`[d, h * k]` as `[d, h, k]` and back, input heads cut the same way, axes of size one."""
    draw = Draw(key)
    params = {"q": draw.kernel(5, 12), "o": draw.kernel(12, 7), "one": draw.kernel(1, 7, 1, 6)}

    def apply(params, x):
        q = params["q"].reshape(5, 4, 3)
        back = q.transpose(1, 2, 0).reshape(12, 5)
        h = jnp.einsum("td,dhk->thk", x, q) * (x @ back.T).reshape(-1, 4, 3)
        y = jnp.einsum("thk,hko->to", h, params["o"].reshape(4, 3, 7))
        return y @ jnp.squeeze(jnp.expand_dims(params["one"], 2), (0, 2, 3))

    return apply, params, (draw.array(8, 5),)


def broadcast_kernel(key):
    """A kernel copied for every example, then a batched product."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 7), "v": draw.kernel(7, 3)}

    def apply(params, x):
        many = jnp.broadcast_to(params["w"], (4, 5, 7))
        h = jnp.tanh(jnp.einsum("btd,bdf->btf", x, many))
        tiled = jnp.broadcast_to(params["v"][:, None, :], (7, 4, 3))
        return jax.lax.batch_matmul(h, tiled.transpose(1, 0, 2))

    return apply, params, (draw.array(4, 6, 5),)


def concatenated(key):
    """Kernels side by side before one product, and below each other before another."""
    draw = Draw(key)
    params = {name: draw.kernel(5, n) for name, n in (("q", 7), ("k", 3), ("v", 2))}
    params |= {"top": draw.kernel(7, 6), "bottom": draw.kernel(5, 6)}

    def apply(params, x):
        fused = jnp.concatenate([params["q"], params["k"], params["v"]], axis=1)
        q, k, v = jnp.split(x @ fused, [7, 10], axis=-1)
        h = jnp.concatenate([jnp.tanh(q) + k.sum() * v.sum(), x], axis=-1)
        return h @ jnp.concatenate([params["top"], params["bottom"]], axis=0)

    return apply, params, (draw.array(4, 5),)


def stacked_on_the_way(key):
    """Separate kernels of layers, stacked, then scanned."""
    draw = Draw(key)
    params = [{"w": draw.kernel(5, 7), "v": draw.kernel(7, 5)} for _ in range(3)]

    def apply(params, x):
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

        def layer(h, p):
            return h + jnp.tanh(h @ p["w"]) @ p["v"], None

        return jax.lax.scan(layer, x, layers)[0]

    return apply, params, (draw.array(4, 5),)


def split_kernel(key):
    """One fused kernel cut into its parts before the products, as slices and by `split`."""
    draw = Draw(key)
    params = {"qkv": draw.kernel(5, 12), "gate_up": draw.kernel(3, 14), "down": draw.kernel(7, 2)}

    def apply(params, x):
        q, k, v = jnp.split(params["qkv"], [3, 6], axis=1)
        weights = jax.nn.softmax((x @ q) @ (x @ k).T)
        h = jnp.sin(weights @ (x @ v))[:, :3]
        gate, up = params["gate_up"][:, :7], params["gate_up"][:, 7:]
        return (jax.nn.silu(h @ gate) * (h @ up)) @ params["down"]

    return apply, params, (draw.array(4, 5),)


def split_result(key):
    """One fused kernel, its product cut into parts."""
    draw = Draw(key)
    params = {"gate_up": draw.kernel(5, 14), "down": draw.kernel(7, 3)}

    def apply(params, x):
        gate, up = jnp.split(x @ params["gate_up"], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ params["down"]

    return apply, params, (draw.array(4, 5),)


def wrapped(key):
    """Operations that say something about a kernel and change nothing in it."""
    draw = Draw(key)
    shapes = {"stop": (5, 7), "barrier": (7, 6), "put": (6, 4), "copy": (4, 3), "name": (3, 8)}
    params = {name: draw.kernel(*shape) for name, shape in shapes.items()}

    def apply(params, x):
        x = jnp.tanh(x @ jax.lax.stop_gradient(params["stop"]))
        barrier, x = jax.lax.optimization_barrier((params["barrier"], x))
        x = jnp.tanh(x @ barrier)
        x = jnp.tanh(x @ jax.device_put(params["put"], jax.devices()[0]))
        x = jnp.tanh(x @ jnp.copy(params["copy"]))
        return x @ checkpoint_name(params["name"], "kernel")

    return apply, params, (draw.array(2, 5),)


def indexed_layers(key):
    """One stack, its layers taken by a Python index, by a traced index, and emitted by a scan."""
    draw = Draw(key)
    params = {"a": draw.kernel(3, 5, 7), "b": draw.kernel(3, 7, 5)}

    def apply(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["a"][i]) @ params["b"][i]

        def again(i, x):
            a = jax.lax.dynamic_index_in_dim(params["a"], i, keepdims=False)
            return x + jnp.tanh(x @ a) @ params["b"][2]

        x = jax.lax.fori_loop(0, 3, again, x)
        layer = lambda x, a: (jnp.tanh(x @ a)[:, :5], a.T)  # noqa: E731
        x, turned = jax.lax.scan(layer, x, params["a"])
        return jax.lax.scan(lambda x, t: (x + jnp.tanh(x @ t.T) @ t, None), x, turned)[0]

    return apply, params, (draw.array(2, 5),)


def part_of_a_stack(key):
    """The first layers of a stack by a slice, then the others, each part in its own loop."""
    draw = Draw(key)
    params = {"w": draw.kernel(4, 5, 7), "v": draw.kernel(4, 7, 5)}

    def apply(params, x):
        def layer(h, p):
            return h + jnp.tanh(h @ p["w"]) @ p["v"], None

        first = jax.tree.map(lambda w: w[:1], params)
        rest = jax.tree.map(lambda w: w[1:], params)
        x, _ = jax.lax.scan(layer, x, first)
        return jax.lax.scan(layer, x, rest, reverse=True)[0]

    return apply, params, (draw.array(3, 5),)


BOTH = ("dense", "dense, transposed")

CASES = [
    Case("used_twice", used_twice, {"w": (5, 7, (), BOTH)}, thorough=True),
    Case(
        "two_kinds",
        two_kinds,
        {
            "w": (5, 7, (), ("conv", "dense")),
            "table": (9, 7, (), ("lookup", "dense, transposed", "dense")),
        },
    ),
    Case("casts", casts, {"w": (5, 7, (), DENSE), "v": (7, 3, (), DENSE)}, narrow=True),
    Case(
        "reshapes",
        reshapes,
        {"q": (5, 12, (), DENSE), "o": (12, 7, (), DENSE), "one": (7, 6, (), DENSE)},
    ),
    Case("broadcast_kernel", broadcast_kernel, {"w": (5, 7, (), DENSE), "v": (7, 3, (), DENSE)}),
    Case(
        "concatenated",
        concatenated,
        {
            "q": (5, 7, (), DENSE),
            "k": (5, 3, (), DENSE),
            "v": (5, 2, (), DENSE),
            "top": (7, 6, (), DENSE),
            "bottom": (5, 6, (), DENSE),
        },
        exact=False,  # the parts are multiplied one by one
        thorough=True,
    ),
    Case(
        "stacked_on_the_way",
        stacked_on_the_way,
        {
            f"{i}/{name}": (*shape, (), DENSE)
            for i in range(3)
            for name, shape in (("w", (5, 7)), ("v", (7, 5)))
        },
    ),
    Case(
        "split_kernel",
        split_kernel,
        {
            "qkv/0:3": (5, 3, (), DENSE),
            "qkv/3:6": (5, 3, (), DENSE),
            "qkv/6:12": (5, 6, (), DENSE),
            "gate_up/0:7": (3, 7, (), DENSE),
            "gate_up/7:14": (3, 7, (), DENSE),
            "down": (7, 2, (), DENSE),
        },
    ),
    Case("split_result", split_result, {"gate_up": (5, 14, (), DENSE), "down": (7, 3, (), DENSE)}),
    Case(
        "wrapped",
        wrapped,
        {
            "stop": (5, 7, (), DENSE),
            "barrier": (7, 6, (), DENSE),
            "put": (6, 4, (), DENSE),
            "copy": (4, 3, (), DENSE),
            "name": (3, 8, (), DENSE),
        },
    ),
    Case("indexed_layers", indexed_layers, {"a": (5, 7, (3,), BOTH), "b": (7, 5, (3,), DENSE)}),
    Case(
        "part_of_a_stack",
        part_of_a_stack,
        {"w": (5, 7, (4,), DENSE), "v": (7, 5, (4,), DENSE)},
    ),
]
