"""What changes between steps besides the optimizer's update: pure functions for inside the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.adapter import Adapted, Trained, adapted
from lora_jax.method import Method


def _unchanged(state: Any, frozen: Any) -> Any:
    return frozen


@dataclass(frozen=True)
class Dynamics:
    """What happens around every optimizer step, as functions that `make_step` compiles into it.

    ```
    init:    frozen, trained                      -> state          arrays; asked once
    penalty: state, trained                       -> scalar         added to the mean loss
    after:   state, step, grads, before, after    -> state, trained
    frozen:  state, frozen                        -> frozen         what the forward pass needs
    ```

    `penalty` counts once an optimizer step, however many micro-batches it has. `after` sees the
    trained values before and after the optimizer's update, and the gradient of that step: of the
    mean loss and the penalty, as the optimizer gets it. `step` counts from 0. A step that is not
    finite calls neither the optimizer nor `after`. `frozen` puts arrays of the state among the
    frozen ones. `steps` is how long a run the schedule needs, where it has one.
    """

    name: str
    init: Callable[[Any, Trained], Any]
    after: Callable[[Any, jax.Array, Trained, Trained, Trained], tuple[Any, Trained]]
    penalty: Callable[[Any, Trained], jax.Array] | None = None
    frozen: Callable[[Any, Any], Any] = _unchanged
    steps: int | None = None


def under(name: str, frozen: Any) -> dict[str, Adapted]:
    """The parameters under a method of this name, or under one that wraps it, by path."""
    return {p: node for p, node in adapted(frozen).items() if node.method.innermost.name == name}


def changed(method: Method, **hyper: Any) -> Method:
    """The method, or the one inside, with some hyper-parameters of other values."""
    assert method.factory is not None
    inside = method.hyper.get("method")
    changes = {"method": changed(inside, **hyper)} if isinstance(inside, Method) else hyper
    return method.factory(**{**method.hyper, **changes})
