"""The frozen random arrays that PEFT's files may leave out, from the seed in their config."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from lora_jax.torch_random import TorchGenerator


def vera_projections(seed: int, rank: int, d_in: int, d_out: int) -> dict[str, np.ndarray]:
    """VeRA's `shared_a: [d_in, rank]` and `shared_b: [rank, d_out]` of a `projection_prng_key`.

    `d_in` and `d_out` are the largest sides among the adapted kernels. PEFT draws `vera_A` and then
    `vera_B`, our arrays transposed, uniform within `sqrt(6 / second side)`.

    >>> {name: a.shape for name, a in vera_projections(0, 2, 5, 3).items()}
    {'shared_a': (5, 2), 'shared_b': (2, 3)}
    """
    generator = TorchGenerator(seed)

    def drawn(rows: int, columns: int) -> np.ndarray:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))  # rounded as PEFT rounds
        return generator.uniform((rows, columns), -bound, bound)

    a, b = drawn(rank, d_in), drawn(d_out, rank)
    return {"shared_a": a.T, "shared_b": b.T}


def randlora_bases(seed: int, rank: int, d_in: int, d_out: int) -> dict[str, np.ndarray]:
    """RandLoRA's `bases_a: [rank, short]` and `bases_b: [long, n, rank]` of its seed, not sparse.

    `d_in` and `d_out` are the largest sides among the adapted kernels, `n = ceil(short / rank)`.
    PEFT draws in bfloat16, `A` whole and then `B` basis by basis, uniform within
    `1 / sqrt(last side)`, and divides both by their standard deviations, still in bfloat16.

    >>> {name: a.shape for name, a in randlora_bases(0, 2, 5, 3).items()}
    {'bases_a': (2, 3), 'bases_b': (5, 2, 2)}
    """
    generator = TorchGenerator(seed)
    short, long = sorted((d_in, d_out))
    a = _half_drawn(generator, (rank, short), short)
    b = [_half_drawn(generator, (long, rank), rank) for _ in range(-(-short // rank))]
    return {"bases_a": _unit(a), "bases_b": _unit(np.stack(b, axis=1))}


def _half_drawn(generator: TorchGenerator, shape: tuple[int, int], fan_in: int) -> np.ndarray:
    """`kaiming_uniform_(a=sqrt(5))` in bfloat16, where the upper bound wraps to the lower."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(fan_in))
    drawn = generator.uniform(shape, -bound, bound).astype(ml_dtypes.bfloat16)
    return np.where(drawn == ml_dtypes.bfloat16(bound), ml_dtypes.bfloat16(-bound), drawn)


def _unit(drawn: np.ndarray) -> np.ndarray:
    deviation = ml_dtypes.bfloat16(np.std(drawn.astype(np.float64), ddof=1))
    return (drawn / deviation).astype(np.float32)
