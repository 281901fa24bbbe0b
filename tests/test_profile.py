"""What a profiler, a compiler and an optimizer see of a rewritten model."""

import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj

D, F, LAYERS = 8, 12, 30


def layer(p, x):
    with jax.named_scope("mlp"):
        return x + jnp.tanh(x @ p["up"]) @ p["down"]  # THE LINE OF THE PRODUCT


def model(params, x):
    for i, p in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            x = layer(p, x)
    return x


def params(layers):
    keys = jax.random.split(jax.random.key(0), 2 * layers)
    return [
        {
            "up": jax.random.normal(keys[2 * i], (D, F)) / 4,
            "down": jax.random.normal(keys[2 * i + 1], (F, D)) / 4,
        }
        for i in range(layers)
    ]


X = jnp.ones((3, D))


def bound(layers, method):
    weights = params(layers)
    sites = lj.find_sites(model, weights, X)
    frozen, trained = lj.attach(jax.random.key(1), weights, {lj.all_linear: method}, sites)
    return lj.bind(frozen, trained)


@pytest.mark.parametrize("method", [lj.lora(2), lj.dora(2)], ids=str)
def test_scopes_and_source_lines_stay(method):
    compiled = jax.jit(lj.factored(model)).lower(bound(2, method), X).compile()
    names = set(re.findall(r'op_name="([^"]*)"', compiled.as_text()))
    for i in range(2):
        for product in (f"layer_{i}/mlp/dot_general", f"layer_{i}/mlp/{method.name}/dot_general"):
            assert any(name.endswith(product) for name in names), names
    text = jax.jit(lj.factored(model)).lower(bound(2, method), X).as_text(debug_info=True)
    source = Path(__file__).read_text().splitlines()
    number = 1 + next(
        n for n, line in enumerate(source) if line.endswith("THE LINE OF THE PRODUCT")
    )
    # The innermost frame of every product, the adapter's own too, is the model's line.
    dots = re.findall(r'loc\("jit\(model\)[^"]*/dot_general"\(#loc(\d+)\)\)', text)
    places = dict(re.findall(r"#loc(\d+) = loc\((.*)\)", text))
    assert dots

    def innermost(place):
        while inner := re.match(r'callsite\(#loc(\d+) at|"[^"]*"\(#loc(\d+)', places[place]):
            place = inner[1] or inner[2]
        return places[place]

    assert all(f'test_profile.py":{number}:' in innermost(dot) for dot in dots)


def test_no_kernel_is_ever_formed():
    compiled = jax.jit(lj.factored(model)).lower(bound(2, lj.lora(2)), X).compile()
    rows, rank = len(X), 2
    base = 2 * 2 * rows * D * F * 2
    ours = 2 * 2 * rows * rank * (D + F) * 2
    dots = sum(
        2 * np.prod(shape) * inner
        for shape, inner in _products(jax.make_jaxpr(lj.factored(model))(bound(2, lj.lora(2)), X))
    )
    assert dots == base + ours
    assert compiled.cost_analysis()["flops"] < 1.35 * (base + ours)


def _products(closed):
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            yield eqn.outvars[0].aval.shape, np.prod([lhs[i] for i in contract])
        for inner in jaxprs_in_params(eqn.params):
            yield from _products(ClosedJaxpr(inner, ()))


def test_equal_configurations_share_one_compilation():
    traces = 0

    def counted(params, x):
        nonlocal traces
        traces += 1
        return model(params, x)

    forward = jax.jit(lj.factored(counted))
    for _ in range(3):
        forward(bound(2, lj.lora(rank=2, alpha=4.0)), X)  # a new method, attach and bind each time
    assert traces == 1
    forward(bound(2, lj.lora(rank=3)), X)
    assert traces == 2
    forward(bound(2, lj.lora(rank=3, alpha=1.0)), X)  # alpha is a number of the run
    assert traces == 2


def test_rewriting_thirty_unrolled_layers_takes_under_a_second():
    adapted = bound(LAYERS, lj.lora(2))

    def seconds(function, *args):
        started = time.process_time()
        jax.jit(function).trace(*args)
        return time.process_time() - started

    plain = min(seconds(lambda p, x: model(p, x), params(LAYERS), X) for _ in range(2))
    ours = min(seconds(lambda p, x: lj.factored(model)(p, x), adapted, X) for _ in range(2))
    assert ours - plain < 1.0


def test_donated_buffers_are_used_again():
    weights = params(2)
    sites = lj.find_sites(model, weights, X)
    frozen, trained = lj.attach(jax.random.key(1), weights, {lj.all_linear: lj.lora(2)}, sites)

    def step(trained, frozen, x):
        def loss(trained):
            return jnp.sum(lj.factored(model)(lj.bind(frozen, trained), x) ** 2)

        return jax.tree.map(lambda w, g: w - 0.1 * g, trained, jax.grad(loss)(trained))

    compiled = jax.jit(step, donate_argnums=0).lower(trained, frozen, X).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == lj.tree.nbytes(trained)


def test_sharding_annotations_stay():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def apply(params, x):
        w = jax.lax.with_sharding_constraint(params["w"], NamedSharding(mesh, P(None, "model")))
        y = x @ w
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("data", "model")))

    weights, x = {"w": jnp.ones((D, F))}, jnp.ones((4, D))
    sites = lj.find_sites(apply, weights, x)
    frozen, trained = lj.attach(jax.random.key(1), weights, {"w": lj.lora(2)}, sites)
    y = jax.jit(lj.factored(apply))(lj.bind(frozen, trained), x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)
