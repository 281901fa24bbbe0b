"""Rotary position embedding, with the frequency stretchings that Llama checkpoints use."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """The angle a position step adds to each rotary pair: theta^(-2i/d) [head_dim/2], stretched.

    Source: RoFormer (Su et al. 2021), section 3.2.2; stretching as in `RopeScaling`.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    return _stretch(frequencies, config.rope_scaling).astype(np.float32)


def _stretch(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "default":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: turns within the original context decide. Many turns: kept; few: divided by the
    # factor; between low and high: a straight blend of the two.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotations(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles, float32 [B, T, 1, head_dim/2]."""
    frequencies = jnp.asarray(inverse_frequencies(config))
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + d/2]) of x [B, T, H, d] by their angles; keeps x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
