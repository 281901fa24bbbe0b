"""Products with axes, windows and stacks drawn at random: factored is materialised."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.testing import quick

METHODS = (lj.lora(rank=2, alpha=3.0), lj.dora(rank=2, alpha=3.0))
drawn = settings(max_examples=12, deadline=None, derandomize=True, database=None)


class Site(NamedTuple):
    d_in: int
    d_out: int
    stack: tuple[int, ...]


def random_arrays(shapes, seed):
    rng = np.random.default_rng(seed)
    one = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(one, shapes)


def holds(apply, kernel, operand, expected):
    """The site is the expected one, and both methods compute it as they do materialised."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (kernel, operand)]
    w, x = random_arrays(shapes, 0)
    sites = lj.find_sites(apply, {"w": w}, x)
    site = sites["w"]
    assert (site.d_in, site.d_out) == (expected.d_in, expected.d_out)
    assert sorted(site.stack) == sorted(expected.stack)

    def attach(w):
        return [lj.attach(jax.random.key(0), {"w": w}, {"w": rule}, sites) for rule in METHODS]

    @quick
    def both(w, trained, x):
        bound = [lj.bind(frozen, t) for (frozen, _), t in zip(attach(w), trained, strict=True)]
        return [[run(apply)(b, x) for b in bound] for run in (lj.factored, lj.materialised)]

    trained = random_arrays([trained for _, trained in jax.eval_shape(attach, w)], 1)
    for factored, materialised in zip(*both(w, trained, x), strict=True):
        scale = max(np.abs(materialised).max(), 1e-3)
        np.testing.assert_allclose(factored, materialised, rtol=0, atol=1e-5 * scale)


@st.composite
def products(draw):
    """The axes of both operands by name, in any order: batch, contracted, free."""
    sizes = iter(draw(st.permutations([2, 3, 4, 5, 6, 7, 8])))
    counts = [draw(st.integers(*limits)) for limits in ((0, 2), (1, 2), (1, 2), (0, 1))]
    batch, contract, free, other = (
        [(f"{role}{i}", next(sizes)) for i in range(count)]
        for role, count in zip("bcfo", counts, strict=True)
    )
    kernel = draw(st.permutations(batch + contract + free))
    operand = draw(st.permutations(batch + contract + other))
    return kernel, operand, [batch, contract, free], draw(st.booleans())


@drawn
@given(products())
def test_dot_general_of_any_axis_order(product):
    kernel, operand, (batch, contract, free), kernel_first = product

    def axes(side, names):
        return tuple(side.index(name) for name in names)

    def apply(params, x):
        pair = [(params["w"], kernel), (x, operand)]
        (a, left), (b, right) = pair if kernel_first else pair[::-1]
        numbers = tuple((axes(left, names), axes(right, names)) for names in (contract, batch))
        return jax.lax.dot_general(a, b, numbers)

    size = lambda names: math.prod(n for _, n in names)  # noqa: E731
    shapes = [tuple(n for _, n in side) for side in (kernel, operand)]
    holds(apply, *shapes, Site(size(contract), size(free), tuple(n for _, n in batch)))


@drawn
@given(products(), st.integers(2, 4))
def test_einsum_under_a_scan_over_a_stack(product, layers):
    kernel, operand, (batch, contract, free), _ = product
    letters = {axis: chr(ord("a") + i) for i, axis in enumerate(dict.fromkeys(kernel + operand))}
    spell = lambda axes: "".join(letters[axis] for axis in axes)  # noqa: E731
    out = [axis for axis in operand if axis not in contract] + free
    spec = f"{spell(operand)},{spell(kernel)}->{spell(out[::-1])}"

    def apply(params, x):
        layer = lambda total, w: (total + jnp.einsum(spec, x, w), None)  # noqa: E731
        start = jnp.zeros([n for _, n in out[::-1]])
        return jax.lax.scan(layer, start, params["w"])[0]

    size = lambda names: math.prod(n for _, n in names)  # noqa: E731
    shapes = [tuple(n for _, n in side) for side in (kernel, operand)]
    stack = (layers, *(n for _, n in batch))
    holds(apply, (layers, *shapes[0]), shapes[1], Site(size(contract), size(free), stack))


class Window(NamedTuple):
    size: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    spread: int
    space: int  # of the operand


window = st.builds(
    Window,
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(6, 8),
)


@drawn
@given(
    windows=st.lists(window, min_size=1, max_size=3),
    groups=st.integers(1, 3),
    channels=st.permutations([1, 2, 3, 4]),
    orders=st.tuples(st.integers(0, 119), st.integers(0, 119), st.integers(0, 119)),
)
def test_convolutions_of_any_shape(windows, groups, channels, orders):
    c_in, c_out = channels[:2]
    space = "DHW"[: len(windows)]

    def laid_out(names, at):
        every = list(itertools.permutations(names))
        return "".join(every[at % len(every)])

    layout = [
        laid_out(ends + space, at) for ends, at in zip(("NC", "IO", "NC"), orders, strict=True)
    ]
    sizes = dict(zip(space, windows, strict=True)) | {"N": 2, "C": groups * c_in}
    sizes |= {"I": c_in, "O": groups * c_out}

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            [w.stride for w in windows],
            [w.padding for w in windows],
            lhs_dilation=[w.spread for w in windows],
            rhs_dilation=[w.dilation for w in windows],
            dimension_numbers=tuple(layout),
            feature_group_count=groups,
        )

    operand = [w.space if isinstance(w := sizes[name], Window) else w for name in layout[0]]
    kernel = [w.size if isinstance(w := sizes[name], Window) else w for name in layout[1]]
    d_in = c_in * math.prod(w.size for w in windows)
    stack = (groups,) if groups > 1 else ()
    holds(apply, tuple(kernel), tuple(operand), Site(d_in, c_out, stack))


@drawn
@given(
    sizes=st.lists(st.integers(0, 4), min_size=2, max_size=4),
    extra=st.integers(0, 2),
    turned=st.booleans(),
)
def test_ragged_products_of_any_groups(sizes, extra, turned):
    def apply(params, x):
        w = params["w"].swapaxes(1, 2) if turned else params["w"]
        return jax.lax.ragged_dot(x, w, jnp.asarray(sizes, jnp.int32))

    kernel = (len(sizes), 7, 5) if turned else (len(sizes), 5, 7)
    rows = max(sum(sizes) + extra, 1)
    holds(apply, kernel, (rows, 5), Site(5, 7, (len(sizes),)))
