"""What loading a model of any kind gives: a pure function and its parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.io.sources import Source
    from lora_jax.io.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Network:
    """A pure function and its parameters: `network.apply(network.params, *inputs)`.

    >>> import jax.numpy as jnp
    >>> network = Network(lambda params, x: x @ params["w"], {"w": jnp.eye(3)}, config=None)
    >>> network.apply(network.params, jnp.ones((2, 3))).shape
    (2, 3)
    """

    apply: Callable[..., Any]
    """Pure, parameters first; an input of a wrong shape is an InputError."""
    params: dict[str, Any]
    """Nested plain dicts of float32 arrays: what may be trained."""
    config: Any
    """The architecture, a frozen dataclass."""
    source: "Source | None" = None
    """Of the weights; None for fresh ones."""
    tokenizer: "Tokenizer | None" = None
    state: dict[str, Any] = field(default_factory=dict)
    """What `apply` reads beside the parameters and nothing trains: BatchNorm's statistics."""
    features: Callable[..., Any] | None = None
    """features(params, *inputs) -> [B, D]: what a head reads (`lora_jax.models.with_head`)."""
    inputs: tuple[Any, ...] = ()
    """Example inputs (jax.ShapeDtypeStruct), for tracing."""
