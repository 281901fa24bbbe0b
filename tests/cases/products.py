"""Products in every spelling: axis orders, batch axes, einsum, lookups."""

import jax
import jax.numpy as jnp

from cases.case import DENSE, LOOKUP, Case, Draw


def dot_general_orders(key):
    """Contracted axes that stand anywhere, the kernel on either side, none of them last."""
    draw = Draw(key)
    params = {"right": draw.kernel(3, 7, 5), "left": draw.kernel(9, 7)}

    def apply(params, x):
        y = jax.lax.dot_general(x, params["right"], (((0, 2), (2, 0)), ((), ())))  # [4, 7]
        return jax.lax.dot_general(params["left"], jnp.tanh(y), (((1,), (1,)), ((), ())))

    return apply, params, (draw.array(5, 4, 3),)


def dot_general_batches(key):
    """Two batch axes of the kernel in another order than the operand's, and not in front."""
    draw = Draw(key)
    params = {"w": draw.kernel(5, 3, 7, 2), "v": draw.kernel(2, 7, 3, 4)}

    def apply(params, x):
        y = jax.lax.dot_general(x, params["w"], (((3,), (0,)), ((0, 2), (1, 3))))  # [3, 2, 6, 7]
        y = jnp.tanh(y)
        return jax.lax.dot_general(params["v"], y, (((1,), (3,)), ((2, 0), (0, 1))))

    return apply, params, (draw.array(3, 6, 2, 5),)


def einsum_spellings(key):
    """Two and three operands, a kernel in the middle of a product of three, one summed first."""
    draw = Draw(key)
    params = {"a": draw.kernel(5, 7), "b": draw.kernel(4, 3, 7), "c": draw.kernel(3, 6)}

    def apply(params, x, y):
        h = jnp.einsum("df,td,tg->tfg", params["a"], x, y)  # [8, 7, 2]
        return jnp.einsum("tfg,hkf,ko->gtho", jnp.sin(h), params["b"], params["c"])

    return apply, params, (draw.array(8, 5), draw.array(8, 2))


def lookups(key):
    """Rows by index, by `take` along the second axis, by vmap, and a one-hot product."""
    draw = Draw(key)
    params = {
        "words": draw.array(11, 6),
        "places": draw.array(6, 9),
        "kinds": draw.array(4, 6),
        "onehot": draw.array(10, 6),
    }

    def apply(params, ids):
        words = params["words"][ids]
        places = jnp.take(params["places"], jnp.arange(ids.shape[1]), axis=1).T
        kinds = jax.vmap(lambda i: params["kinds"][i % 4])(ids)
        onehot = jax.nn.one_hot(ids % 10, 10, dtype=words.dtype) @ params["onehot"]
        return jnp.tanh(words + places[None] + kinds) * onehot

    return apply, params, (draw.ids(11, 2, 5),)


def two_tables(key):
    """Two embeddings multiplied, as a factorisation model reads users and items."""
    draw = Draw(key)
    params = {"users": draw.array(9, 5), "items": draw.array(11, 5), "bias": draw.array(11)}

    def apply(params, users, items):
        rows = params["users"].at[users].get(mode="clip"), params["items"][items]
        return jnp.sum(rows[0] * rows[1], -1) + params["bias"][items]

    return apply, params, (draw.ids(9, 7), draw.ids(11, 7))


CASES = [
    Case(
        "dot_general_orders",
        dot_general_orders,
        {"right": (15, 7, (), DENSE), "left": (7, 9, (), DENSE)},
        exact=False,  # kernel on the left: jax 0.12's CPU backend swaps the product's sides
        thorough=True,
    ),
    Case(
        "dot_general_batches",
        dot_general_batches,
        {"w": (5, 7, (3, 2), DENSE), "v": (7, 4, (2, 3), DENSE)},
    ),
    Case(
        "einsum_spellings",
        einsum_spellings,
        {"a": (5, 7, (), DENSE), "b": (7, 12, (), DENSE), "c": (3, 6, (), DENSE)},
    ),
    Case(
        "lookups",
        lookups,
        {
            "words": (11, 6, (), LOOKUP),
            "places": (9, 6, (), LOOKUP),
            "kinds": (4, 6, (), LOOKUP),
            "onehot": (10, 6, (), DENSE),
        },
        thorough=True,
    ),
    Case(
        "two_tables",
        two_tables,
        {"users": (9, 5, (), LOOKUP), "items": (11, 5, (), LOOKUP)},
    ),
]
