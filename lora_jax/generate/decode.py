"""Generation: read the prompts once, then one token a row at a time, in one compiled loop."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.generate.sample import GREEDY, Sampling, choose

Decode: TypeAlias = Callable[..., tuple[jax.Array, Any]]
"""decode(params, ids [B, T], cache, mask [B, T]) -> logits [B, V] of what follows, cache."""


def generate(
    decode: Decode,
    params: Any,
    prompts: Sequence[Sequence[int]],
    init_cache: Callable[[int, int], Any],
    *,
    max_new_tokens: int,
    eos: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    width: int | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt, up to an end token (left out) or `max_new_tokens`.

    `decode` is `model.decode`, or that under an adapter transform with `params` bound to match;
    `init_cache(batch, length)` is `model.init_cache`. Keep the one `decode`: a new function is
    compiled anew. Prompts may differ in length; they are padded to the longest, or to `width`
    (one width for many calls compiles once). A row draws with `key` folded with its number, so
    its tokens do not depend on the other rows. Raises InputError for no key where one is needed,
    an empty prompt, and lengths beyond the model's context.
    """
    if not prompts:
        return []
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
    if sampling.temperature > 0 and key is None:
        raise InputError("sampling draws at random: give key=jax.random.key(seed)")
    ids, mask = pad_right(prompts, width)
    cache = init_cache(len(prompts), ids.shape[1] + max_new_tokens)
    keys = None if key is None else _row_keys(key, len(prompts))
    tokens = _run(decode, sampling, max_new_tokens, tuple(eos), params, ids, mask, cache, keys)
    return [_until(row, eos) for row in np.asarray(tokens).tolist()]


def pad_right(
    prompts: Sequence[Sequence[int]], width: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Prompts of any lengths -> ids [B, T] and their mask [B, T], T the longest or `width`.

    >>> ids, mask = pad_right([[5, 6, 7], [8]])
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [8, 0, 0]], [[True, True, True], [True, False, False]])
    """
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise InputError(f"prompt {lengths.index(0)} has no tokens; give each at least one")
    width = max(lengths) if width is None else width
    if max(lengths) > width:
        raise InputError(f"prompt {lengths.index(max(lengths))} is longer than width {width}")
    ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    mask = np.arange(width)[None, :] < np.asarray(lengths)[:, None]
    return jnp.asarray(ids), jnp.asarray(mask)


def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def _until(tokens: list[int], eos: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in eos or token < 0]
    return tokens[: ends[0]] if ends else tokens


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    decode: Decode,
    sampling: Sampling,
    steps: int,
    eos: tuple[int, ...],
    params: Any,
    ids: jax.Array,
    mask: jax.Array,
    cache: Any,
    keys: jax.Array | None,
) -> jax.Array:
    """The generated tokens [B, steps]; -1 where the loop stopped before."""

    def pick(step: jax.Array | int, logits: jax.Array) -> jax.Array:
        drawn = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        return choose(sampling, drawn, logits).astype(jnp.int32)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.asarray(eos, jnp.int32))

    def going(state: tuple) -> jax.Array:
        step, _, _, _, done = state
        return jnp.logical_and(step < steps, jnp.logical_not(done.all()))

    def advance(state: tuple) -> tuple:
        step, last, tokens, cache, done = state
        logits, cache = decode(params, last[:, None], cache)
        token = pick(step, logits)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        return step + 1, token, tokens, cache, jnp.logical_or(done, ended(token))

    logits, cache = decode(params, ids, cache, mask)
    first = pick(0, logits)
    tokens = jnp.full((ids.shape[0], steps), -1, jnp.int32).at[:, 0].set(first)
    state = (jnp.int32(1), first, tokens, cache, ended(first))
    return jax.lax.while_loop(going, advance, state)[2]
