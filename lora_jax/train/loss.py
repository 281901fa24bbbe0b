"""Cross-entropy summed over the scored tokens, without ever holding [tokens, vocabulary] logits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 128
"""Tokens whose logits exist at once: 128 x 49152 in float32 are 25 MB. Halving it from 256 costs no
time on CPUs and saves a tenth of a small model's memory."""


def cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of -log softmax(logits(hidden))[targets], and the sum of weights.

    hidden [N, D], targets [N] int, weights [N]; `logits` maps [n, D] to [n, V]. The tokens go
    through in chunks under a scan whose body is rematerialised, so the forward and the backward
    pass hold [chunk, V] at a time. Sums, not means, so that micro-batches add up.

    >>> table = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> total, weight = cross_entropy(
    ...     lambda h: h @ table, jnp.ones((2, 1)), jnp.array([0, 1]), jnp.ones(2))
    >>> bool(jnp.allclose(total, jnp.log(8.0))), float(weight)
    (True, 2.0)
    """
    chunk = min(chunk, len(targets))
    chunks = [_chunked(x, chunk) for x in (hidden, targets, weights)]

    @jax.checkpoint
    def body(total: jax.Array, tokens: list[jax.Array]) -> tuple[jax.Array, None]:
        h, target, weight = tokens
        scores = logits(h).astype(jnp.float32)
        chosen = jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(scores, axis=-1) - chosen
        return total + jnp.sum(nll * weight), None

    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), chunks)
    return total, jnp.sum(weights.astype(jnp.float32))


def answer_loss(
    hidden: Callable[..., jax.Array],
    logits: Callable[[Any, jax.Array], jax.Array],
    *,
    chunk: int = CHUNK,
) -> Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """Make `loss(params, batch) -> (sum, weight)` for a model with a head apart from its body.

    `hidden(params, ids, mask=mask)` gives [B, T, D], `logits(params, hidden)` its scores; the batch
    is one of `lora_jax.data`. Only the positions in `batch["at"]` meet the head: with one answer
    token in forty-eight that is two per cent of the product with the vocabulary, and exact. Without
    "at" every position is scored, without "mask" none is padding.
    """

    def loss(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scored = hidden(params, batch["ids"], mask=batch.get("mask"))
        if "at" in batch:
            scored = jnp.take_along_axis(scored, batch["at"][..., None], axis=1)
        return cross_entropy(
            lambda h: logits(params, h),
            scored.reshape(-1, scored.shape[-1]),
            batch["targets"].reshape(-1),
            batch["weights"].reshape(-1),
            chunk=chunk,
        )

    return loss


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """Reshape [N, ...] to [chunks, chunk, ...], filling up with zeros (of weight 0)."""
    missing = -len(x) % chunk
    padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, chunk, *x.shape[1:])
