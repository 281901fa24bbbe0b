"""A form in which a frozen kernel is kept, smaller than its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from lora_jax.method import Arrays, identity


@dataclass(frozen=True, eq=False, repr=False)
class Storage:
    """How `quantized` keeps a kernel: pure functions on one matrix, as a `Method`'s are.

    ```
    quantise:   w, kept       -> arrays     every number of w rounded to one of a few
    dequantise: arrays, shape -> w          [d_in, d_out] in float32
    ```

    `kept` names arrays that `quantise` takes as given when they are in its second argument: sums,
    whose last bit depends on how a program orders them. Files hold those, so that everything else
    follows from the base bit by bit. `splits` are the sides over which the arrays may be split, as
    for a `Method`; the arrays' axes then follow the matrix's own.

    Two storages are equal when their functions are.

    >>> from lora_jax.quant.nf4 import nf4
    >>> nf4(), nf4() == nf4(block=64), nf4() == nf4(double=False)
    (nf4(block=64, double=True), True, False)
    """

    name: str
    quantise: Callable[[jax.Array, Arrays], Arrays]
    dequantise: Callable[[Arrays, tuple[int, int]], jax.Array]
    hyper: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    factory: Callable[..., Storage] | None = None

    def _key(self) -> Any:
        functions = identity(self.quantise), identity(self.dequantise)
        return self.name, functions, self.kept, self.splits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        """The factory's call."""
        return (
            f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.hyper.items())})"
        )
