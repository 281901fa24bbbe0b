"""What torch's CPU generator draws from a seed, bit for bit and without torch.

PEFT's files leave out random arrays that follow from a seed: FourierFT's positions always, VeRA's
projections by choice. torch draws them from MT19937, whose 32-bit words numpy gives too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from lora_jax.errors import InputError

_OTHER_ALGORITHM = (2**32 - 1) // 20  # from this size on torch.randperm shuffles in another way


class TorchGenerator:
    """`torch.Generator().manual_seed(seed)`: every draw continues where the last one ended.

    >>> TorchGenerator(0).uniform((2,), 0.0, 1.0)
    array([0.4962566, 0.7682218], dtype=float32)
    """

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed % 2**32)  # MT19937 as torch seeds it

    def words(self, count: int) -> np.ndarray:
        """The next 32-bit words of the generator, `[count]`."""
        return self._state.randint(0, 2**32, count, dtype=np.uint32)

    def uniform(self, shape: Sequence[int], low: float, high: float) -> np.ndarray:
        """`torch.empty(shape).uniform_(low, high)` in float32, filled in row-major order.

        A word's low 24 bits are the fraction `u`; `u (high - low) + low` is rounded once.
        """
        least, width = np.float32(low), np.float32(high) - np.float32(low)
        fraction = (self.words(math.prod(shape)) & (2**24 - 1)) * 2.0**-24
        return (fraction * float(width) + float(least)).astype(np.float32).reshape(shape)


@functools.lru_cache(maxsize=128)
def randperm(size: int, count: int, seed: int) -> tuple[int, ...]:
    """The first `count` entries of `torch.randperm(size)`, in time that grows with `count` alone.

    The shuffle swaps entry `i` with entry `i + word[i] % (size - i)`, `i` rising, so the first
    entries are settled by the first swaps. Raises InputError for more entries than there are, and
    for sizes (2^32 / 20 and above) that torch shuffles from the other end.

    >>> randperm(10, 4, seed=0)
    (4, 1, 7, 5)
    """
    if count > size or size >= _OTHER_ALGORITHM:
        raise InputError(
            f"randperm(size={size}, count={count}): count must not exceed size, nor size "
            f"{_OTHER_ALGORITHM - 1}; take fewer positions, or a smaller kernel"
        )
    words = TorchGenerator(seed).words(count)
    moved: dict[int, int] = {}
    for i, word in enumerate(words.tolist()):
        j = i + int(word % (size - i))
        here, there = moved.get(i, i), moved.get(j, j)
        moved[i], moved[j] = there, here
    return tuple(moved[i] for i in range(count))
