"""NF4: four bits a weight, on the quantiles of a normal distribution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.method import Arrays
from lora_jax.quant.dynamic import dequantise_scales, quantise_scales
from lora_jax.quant.storage import Storage

CODES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_HALVES = np.array([[[4, 0]]], np.uint8)  # the first number of a byte is in its high half
_BOUNDS = (CODES[1:] + CODES[:-1]) / 2
_TINY = np.finfo(np.float32).tiny


def nf4(block: int = 64, double: bool = True) -> Storage:
    """Four bits a weight: `w = code * absmax`, one `absmax` for `block` weights.

    `code` is the nearest of the sixteen `CODES` to `w / absmax`; on a bound between two the lower.
    Blocks run along the inputs of one output, then on to the next output (the order of a torch
    weight), and two codes share a byte, the first in its high half. With `double` the scales
    become 8-bit codes themselves: `absmax = offset + largest * map[code]`, with `offset` their mean
    and one `largest` for 256 of them. Then 4.127 bits a weight with blocks of 64, else 4.5.

    The error is at most `0.152 absmax`; a block of zeros stays zero. The same bytes as those of
    bitsandbytes. Raises InputError for a block that is no power of two from 32 to 4096.

    Source: Dettmers et al. 2023, arXiv:2305.14314.

    >>> arrays = nf4(double=False).quantise(jnp.eye(8), {})
    >>> {name: x.shape for name, x in arrays.items()}
    {'codes': (32,), 'absmax': (1,)}
    >>> bool((nf4().dequantise(nf4().quantise(jnp.eye(8), {}), (8, 8)) == jnp.eye(8)).all())
    True
    """
    if isinstance(block, bool) or not isinstance(block, int) or not _is_block(block):
        raise InputError(f"nf4(block={block!r}): give a power of two from 32 to 4096, such as 64")

    def quantise(w: jax.Array, kept: Arrays) -> Arrays:
        codes, absmax = pack(w.T.astype(jnp.float32).reshape(-1), block)
        if not double:
            return {"codes": codes, "absmax": absmax}
        offset = kept["offset"] if "offset" in kept else _mean(absmax)
        nested, largest = quantise_scales(absmax - offset)
        return {"codes": codes, "absmax": nested, "largest": largest, "offset": offset}

    def dequantise(arrays: Arrays, shape: tuple[int, int]) -> jax.Array:
        absmax = arrays["absmax"]
        if double:
            absmax = dequantise_scales(absmax, arrays["largest"]) + arrays["offset"]
        d_in, d_out = shape
        return unpack(arrays["codes"], absmax, block, d_in * d_out).reshape(d_out, d_in).T

    hyper = {"block": block, "double": double}
    kept = ("offset",) if double else ()
    return Storage("nf4", quantise, dequantise, hyper, kept, factory=nf4)


@functools.partial(jax.jit, static_argnames="block")
def pack(flat: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 `[ceil(n / 2)]`, two a byte, and `absmax` float32 of every block, of `flat: [n]`.

    The last block may be short; an odd count is filled up with a zero.
    """
    (n,) = flat.shape
    blocks = jnp.pad(flat, (0, -n % block)).reshape(-1, block)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scale = jnp.maximum(absmax, _TINY)[:, None]
    unit = blocks * (1 / scale)
    if n % block:  # bitsandbytes divides a short block, and multiplies a whole one
        unit = unit.at[-1].set(blocks[-1] / scale[-1])
    unit = jnp.clip(unit.reshape(-1)[: n + n % 2], -1, 1)
    code = functools.reduce(jnp.add, [(unit > bound).astype(jnp.uint8) for bound in _BOUNDS])
    high, low = code.reshape(-1, 2).T
    return (high << 4) | low, absmax


@functools.partial(jax.jit, static_argnames=("block", "count"))
def unpack(codes: jax.Array, absmax: jax.Array, block: int, count: int) -> jax.Array:
    """The numbers `[count]` that packed codes stand for, in float32, by the scale of each block."""
    codes = jnp.pad(codes, (0, len(absmax) * block // 2 - len(codes)))
    nibbles = (codes.reshape(-1, block // 2, 1) >> _HALVES) & 15
    values = decode(nibbles) * absmax[:, None, None]
    return values.reshape(-1)[:count]


def _mean(absmax: jax.Array) -> jax.Array:
    """The mean of numbers none of which is negative.

    A compiler that fused its last product into a difference `absmax - mean` would take the
    unrounded mean there, not the one that is held; the maximum keeps them apart.
    """
    return jnp.maximum(jnp.mean(absmax), 0)


def decode(nibbles: jax.Array) -> jax.Array:
    """The number of each code: from a table on CPUs, by selects elsewhere.

    A million codes take 0.3 ms from the table on two CPU cores, 1 ms by selects; TPUs have no quick
    gather, and take long to compile one.
    """
    return jax.lax.platform_dependent(nibbles, cpu=_table, default=_selects)


def _table(nibbles: jax.Array) -> jax.Array:
    return jnp.asarray(CODES)[nibbles]


def _selects(nibbles: jax.Array) -> jax.Array:
    values: list[jax.Array] = [jnp.asarray(code) for code in CODES]
    for bit in (1, 2, 4, 8):
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(nibbles & bit != 0, odd, even) for even, odd in pairs]
    return values[0]


def _is_block(block: int) -> bool:
    return 32 <= block <= 4096 and block & (block - 1) == 0
