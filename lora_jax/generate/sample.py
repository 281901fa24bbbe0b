"""How the next token is chosen from its scores."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0 (the default), else a draw from softmax(logits / temperature).

    `top_k` keeps the k likeliest tokens; `top_p` the fewest whose probabilities reach p, after
    top_k (Holtzman et al. 2020). Raises InputError for values out of range.

    >>> Sampling(temperature=0.7, top_p=0.9)
    Sampling(temperature=0.7, top_k=None, top_p=0.9)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature} is not a number >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k {self.top_k} keeps no token; give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not in (0, 1]")


GREEDY = Sampling()
"""The likeliest token, always."""


def choose(sampling: Sampling, keys: jax.Array | None, logits: jax.Array) -> jax.Array:
    """One token a row: logits [B, V], keys [B] (None when greedy) -> ids [B].

    >>> choose(Sampling(), None, jnp.array([[0.0, 2.0, 1.0]])).tolist()
    [1]
    """
    if sampling.temperature == 0 or keys is None:
        return jnp.argmax(logits, axis=-1)
    scaled = _top_p(_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, scaled)


def _top_k(logits: jax.Array, k: int | None) -> jax.Array:
    if k is None or k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def _top_p(logits: jax.Array, p: float | None) -> jax.Array:
    if p is None or p == 1:
        return logits
    ranked = jnp.sort(logits, axis=-1, descending=True)
    chances = jax.nn.softmax(ranked, axis=-1)
    # A token stays while those before it fall short of p, so the likeliest always stays.
    before = jnp.cumsum(chances, axis=-1) - chances
    least = jnp.min(jnp.where(before < p, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
