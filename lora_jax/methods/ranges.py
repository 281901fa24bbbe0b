"""What the hyper-parameters of many methods must satisfy."""

from __future__ import annotations

from typing import Any

from lora_jax.errors import InputError


def check_positive_integers(name: str, **values: Any) -> None:
    """Raise InputError for a value that is no positive integer.

    >>> check_positive_integers("lora", rank=0)
    Traceback (most recent call last):
    lora_jax.errors.InputError: lora(rank=0): a positive integer is needed; give rank >= 1
    """
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(
                f"{name}({key}={value!r}): a positive integer is needed; give {key} >= 1"
            )


def check_positive(name: str, **values: float) -> None:
    """Raise InputError for a value that is not above zero."""
    for key, value in values.items():
        if not value > 0:
            raise InputError(f"{name}({key}={value!r}): it must be positive; give {key} > 0")


def check_dropout(name: str, dropout: float) -> None:
    """Raise InputError for a rate outside [0, 1)."""
    check_rates(name, dropout=dropout)


def check_rates(name: str, **rates: float) -> None:
    """Raise InputError for a rate of dropout outside [0, 1)."""
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise InputError(f"{name}({key}={rate!r}): a dropout rate lies in [0, 1)")


def check_choice(name: str, key: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise InputError for a value that is none of those known."""
    if value not in known:
        listed = ", ".join(map(repr, known))
        raise InputError(f"{name}({key}={value!r}): unknown {key}; give one of {listed}")
