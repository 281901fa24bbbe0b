"""A method on a model: what the laws are about, each program compiled once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter import bind, merge
from lora_jax.attachment import attach
from lora_jax.method import Method
from lora_jax.sites import find_sites
from lora_jax.testing.case import Case, compiled_as_users_do, quick
from lora_jax.transform import factored, materialised

Count = Callable[[Sequence[tuple[int, int]]], int]


@dataclass(frozen=True)
class Claim:
    """What is said of a method beside the laws that hold for all.

    `make` makes it, anew at every call. `neutral` says that a fresh adapter changes nothing.
    `count` gives the number of trained values for matrices `[(d_in, d_out), ...]`, every layer of a
    stack one of them. `rounding` is how far its two forms may differ, of the largest output.
    """

    make: Callable[[], Method]
    neutral: bool = True
    count: Count | None = None
    rounding: float = 2e-6


@functools.cache
def _built(case: Case) -> tuple[Any, ...]:
    apply, params, inputs = case.build(jax.random.key(1))
    return apply, params, inputs, find_sites(apply, params, *inputs)


@functools.cache
def plain(case: Case) -> Any:
    """The outputs of a case's model as it is."""
    apply, params, inputs, _ = _built(case)
    return compiled_as_users_do(apply)(params, *inputs)


class Row:
    """A case, a claim about a method, and what the method does there."""

    def __init__(self, case: Case, claim: Claim) -> None:
        self.case, self.claim = case, claim
        self.apply, self.params, self.inputs, self.sites = _built(case)

    def __str__(self) -> str:
        return f"{self.claim.make()!r} on {self.case}"

    @functools.cached_property
    def linear(self) -> bool:
        """Whether the method has a matrix."""
        return self.claim.make().weight is not None

    @functools.cached_property
    def attached(self) -> tuple[Any, Any]:
        """The frozen and the trained part of a fresh adapter."""
        rules = {self.case.targets: self.claim.make()}
        return attach(jax.random.key(2), self.params, rules, self.sites)

    @functools.cached_property
    def states(self) -> list[Any]:
        """The trained arrays fresh and after some training, twice."""
        return [self.attached[1], self.moved(3), self.moved(4)]

    def moved(self, seed: int) -> Any:
        """The trained arrays after some training, by numpy, which compiles nothing."""
        rng = np.random.default_rng(seed)

        def drift(x: Any) -> Any:
            return np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)

        return jax.tree.map(drift, self.attached[1])

    @functools.cached_property
    def results(self) -> list[tuple[Any, ...]]:
        """What the program gives for a fresh adapter and for two trained ones.

        Outputs factored and materialised, gradients of both, the merged parameters.
        """
        frozen, program = self.attached[0], self._program()
        return [program(frozen, state, self.inputs) for state in self.states]

    def rounding(self, least: float = 0.0) -> float:
        """How far two forms may differ, given the case's own precision."""
        return 5e-2 if self.case.narrow else max(self.claim.rounding, least)

    def _program(self) -> Callable[..., Any]:
        @quick
        def laws(frozen: Any, trained: Any, inputs: Any) -> tuple[Any, ...]:
            grads, ours = self._outcome(factored, frozen, trained, inputs)
            if not self.linear:
                return ours, ours, grads, grads, None
            wanted, definition = self._outcome(materialised, frozen, trained, inputs)
            return ours, definition, grads, wanted, merge(frozen, trained)

        return laws

    def _outcome(self, transform: Any, frozen: Any, trained: Any, inputs: Any) -> tuple[Any, Any]:
        """Gradients and outputs; for a while loop the outputs' derivative along ones."""

        def forward(trained: Any) -> Any:
            return transform(self.apply)(bind(frozen, trained), *inputs)

        def loss(trained: Any) -> tuple[Any, Any]:
            y = forward(trained)
            return total(y), y

        if self.case.differentiable:
            return jax.grad(loss, has_aux=True)(trained)
        along = jax.tree.map(jnp.ones_like, trained)
        y, tangent = jax.jvp(forward, (trained,), (along,))
        return tangent, y


def total(outputs: Any) -> Any:
    """One number that depends on every output."""
    floats = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32) / 4)) for y in floats)
