"""The chunked cross-entropy against the plain one, and what it holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.train import answer_loss, cross_entropy

N, D, V, CHUNK = 37, 5, 53, 8


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (N, D)),
        jax.random.normal(keys[1], (D, V)),
        jax.random.randint(keys[2], (N,), 0, V),
        (jax.random.uniform(keys[3], (N,)) > 0.4).astype(jnp.float32),
    )


def plain(hidden, table, targets, weights):
    scores = jax.nn.log_softmax(hidden @ table)
    return -jnp.sum(scores[jnp.arange(len(targets)), targets] * weights)


def chunked(hidden, table, targets, weights, chunk=CHUNK):
    return cross_entropy(lambda h: h @ table, hidden, targets, weights, chunk=chunk)[0]


@pytest.mark.parametrize("chunk", [1, 8, 37, 256])
def test_equals_the_plain_cross_entropy(case, chunk):
    np.testing.assert_allclose(chunked(*case, chunk=chunk), plain(*case), rtol=1e-5)


def test_its_gradients_equal_the_plain_ones(case):
    found = jax.grad(chunked, argnums=(0, 1))(*case)
    wanted = jax.grad(plain, argnums=(0, 1))(*case)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_returns_the_sum_of_weights(case):
    hidden, table, targets, weights = case
    _, weight = cross_entropy(lambda h: h @ table, hidden, targets, weights, chunk=CHUNK)
    assert weight == weights.sum()


def test_loss_is_float32_for_a_bfloat16_body(case):
    hidden, table, targets, weights = case
    total = chunked(hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16), targets, weights)
    assert total.dtype == jnp.float32


def shapes(jaxpr):
    """Every shape in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for parameter in equation.params.values():
            for inner in jax.tree.leaves(parameter, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)


def elements(found):
    return max(int(np.prod(shape)) for shape in found if V in shape)


def test_no_array_of_tokens_by_vocabulary_exists(case):
    step = jax.value_and_grad(chunked, argnums=(0, 1))
    assert elements(shapes(jax.make_jaxpr(step)(*case).jaxpr)) == CHUNK * V
    whole = jax.value_and_grad(plain, argnums=(0, 1))
    assert elements(shapes(jax.make_jaxpr(whole)(*case).jaxpr)) == N * V
    text = jax.jit(step).lower(*case).compile().as_text()
    for padded in (N, -(-N // CHUNK) * CHUNK):
        assert f"[{padded},{V}]" not in text
    assert f"[{-(-N // CHUNK)},{CHUNK},{V}]" not in text


def test_answer_loss_scores_the_answer_positions_only():
    keys = jax.random.split(jax.random.key(1), 2)
    params = {
        "embed": jax.random.normal(keys[0], (V, D)),
        "head": jax.random.normal(keys[1], (D, V)),
    }
    batch = {
        "ids": jnp.array([[3, 4, 5, 0], [6, 7, 8, 9]]),
        "mask": jnp.array([[True, True, True, False], [True] * 4]),
        "at": jnp.array([[2, 0], [2, 3]]),
        "targets": jnp.array([[11, 0], [12, 13]]),
        "weights": jnp.array([[1.0, 0.0], [1.0, 1.0]]),
    }
    heads = []

    def hidden(params, ids, mask):
        return jnp.cumsum(params["embed"][ids] * mask[..., None], axis=1)

    def logits(params, body):
        heads.append(body.shape)
        return body @ params["head"]

    total, weight = answer_loss(hidden, logits)(params, batch)
    scores = jax.nn.log_softmax(hidden(params, batch["ids"], batch["mask"]) @ params["head"])
    wanted = -(scores[0, 2, 11] + scores[1, 2, 12] + scores[1, 3, 13])
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert weight == 3
    assert set(heads) == {(4, D)}
