"""All laws on small models of every kind, for a method of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_jax.errors import InputError
from lora_jax.method import Method
from lora_jax.testing.case import Case
from lora_jax.testing.laws import LAWS
from lora_jax.testing.models import MODELS
from lora_jax.testing.row import Claim, Count, Row


def check_method(
    make: Callable[[], Method],
    *,
    neutral: bool = True,
    count: Count | None = None,
    rounding: float = 2e-6,
    models: Sequence[Case] = MODELS,
) -> None:
    """Hold a method to the laws that ours are held to, on a small model of every kind.

    `make()` makes the method, anew at every call (`lambda: my_method(rank=2)`). `neutral=False`
    is for one that changes the model from the start. `count(matrices)` gives its number of trained
    values for matrices `[(d_in, d_out), ...]`. Takes well under a minute on two CPU cores; as a
    test, put it in a function of pytest's. Widths of the models are multiples of four.

    Raises AssertionError that names the law, the method and the model.

    >>> import lora_jax as lj
    >>> from lora_jax.testing.models import MODELS
    >>> check_method(lambda: lj.lora(rank=2), models=MODELS[:1])
    """
    if isinstance(make, Method):
        raise InputError(f"give a function that makes it: check_method(lambda: {make!r})")
    claim = Claim(make, neutral, count, rounding)
    for case in models:
        row = Row(case, claim)
        if case.transposed and not row.linear:
            continue  # a method without a matrix has no transpose
        for law in LAWS:
            try:
                law(row)
            except AssertionError as broken:
                name = law.__name__.replace("_", " ")
                raise AssertionError(f"{row}: the law '{name}' is broken\n{broken}") from broken
