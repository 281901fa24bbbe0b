import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.tracing import axes


@st.composite
def layouts(draw):
    """A shape, and a chain of reshapes and transposes, some of which mix axes."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    changes = []
    current = shape
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(current))))
            changes.append(("transpose", tuple(order)))
            current = tuple(current[i] for i in order)
        else:
            current = draw(factorisations(math.prod(current)))
            changes.append(("reshape", current))
    return shape, changes


@st.composite
def factorisations(draw, size):
    shape = []
    while size > 1 and len(shape) < 4:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    return (*shape, size)


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_atoms_tell_where_every_element_went(layout):
    shape, changes = layout
    leaf = np.arange(math.prod(shape)).reshape(shape)
    array, dims = leaf, axes.whole(shape)
    for kind, argument in changes:
        if kind == "transpose":
            array, dims = array.transpose(argument), tuple(dims[i] for i in argument)
        else:
            dims = axes.reshaped(dims, argument)
            if dims is None:
                return  # the reshape mixes parts of two axes
            array = array.reshape(argument)
    assert tuple(axes.size_of(axis) for axis in dims) == array.shape
    back = axes.regroup(jnp.asarray(array), dims, axes.whole(shape))
    np.testing.assert_array_equal(back, leaf)
    np.testing.assert_array_equal(axes.regroup(jnp.asarray(leaf), axes.whole(shape), dims), array)


def test_a_reshape_that_mixes_axes_has_no_dims():
    assert axes.reshaped(axes.whole((4, 6)), (3, 8)) is None
    assert axes.reshaped(axes.whole((4, 6)), (2, 12)) is not None


def test_a_view_is_its_own_inverse():
    view = axes.View(
        (3, 5, 4, 2), stack=(axes.Atom(0, 1, 3),), ins=(axes.Atom(2, 1, 4), axes.Atom(3, 1, 2)),
        outs=(axes.Atom(1, 1, 5),),
    )  # fmt: skip
    leaf = jnp.arange(120.0).reshape(view.shape)
    assert view.matrix(leaf).shape == (3, 8, 5)
    np.testing.assert_array_equal(view.matrix(leaf), jnp.moveaxis(leaf, 1, 3).reshape(3, 8, 5))
    np.testing.assert_array_equal(view.leaf(view.matrix(leaf)), leaf)
