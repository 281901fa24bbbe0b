"""Virtual tokens as an encoder takes them: what `lora_jax.prompts` hands to its `apply`."""

from typing import NamedTuple

import jax


class Virtual(NamedTuple):
    """Virtual tokens beside an input, the same for every row: as embeddings, or in the layers.

    n virtual tokens, D width, L layers, H heads, d head size.

    >>> import jax.numpy as jnp
    >>> Virtual(keys_values=(jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 5, 3, 4)))).length
    5
    """

    tokens: jax.Array | None = None
    """[n, D] among the embedded inputs; [L, n, D] where every layer reads its own."""
    keys_values: tuple[jax.Array, jax.Array] | None = None
    """[L, n, H, d] each: what every layer attends to before its own keys and values."""

    @property
    def length(self) -> int:
        """How many there are."""
        if self.keys_values is not None:
            return self.keys_values[0].shape[1]
        return 0 if self.tokens is None else self.tokens.shape[-2]


NONE = Virtual()


def each_row(tokens: jax.Array, batch: int) -> jax.Array:
    """The same tokens [n, ...] for every row: [B, n, ...].

    >>> import jax.numpy as jnp
    >>> each_row(jnp.zeros((3, 4)), 2).shape
    (2, 3, 4)
    """
    return jax.lax.broadcast(tokens, (batch,))
