"""Prompt tuning, P-tuning and prefix tuning of a Llama, a BERT or a ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.models import Model, Network
from lora_jax.prompts import encoders
from lora_jax.prompts.network import PromptedNetwork, prompted_network
from lora_jax.prompts.prompted import Prompted
from lora_jax.prompts.sizes import Sizes, embed, sizes_of


def prompt_tuning(
    model: Model | Network,
    length: int,
    key: jax.Array,
    *,
    init: str | Sequence[int] | jax.Array | None = None,
    deep: bool = False,
) -> Prompted | PromptedNetwork:
    """Trained embeddings [n, D] before those of the text, or between class token and patches.

    They start at rows of the embedding drawn at random ("vocabulary", the default for text), at
    U(-1/2, 1/2) ("random"), at the rows of given token ids, repeated or cut to n, or at an array
    [n, D]. Started at the ids of a text, the model does exactly what it does after that text. In a
    ViT, where they have no positions, "random" (the default there) is U(-r, r) with
    `r = sqrt(6 / (3 P^2 + D))`, P the patch size. Trains `n D` numbers.

    `deep`, for a ViT: [L, n, D], every layer has its own in the place of what the layer before made
    of its virtual tokens; `L n D` numbers.

    Raises InputError for a negative length, for an unknown init, and for what a model has not.

    Source: Lester et al. 2021, arXiv:2104.08691; Jia et al. 2022, arXiv:2203.12119 (ViT, deep).

    >>> from lora_jax.models import LlamaConfig, initialise
    >>> config = LlamaConfig(48, 16, 24, 2, 2, 1, 8, max_position_embeddings=32)
    >>> prompted = prompt_tuning(initialise(config, jax.random.key(0)), 3, jax.random.key(1))
    >>> prompted.params["prompt"]["embedding"].shape
    (3, 16)
    """
    sizes = _sizes(model, length)
    if deep and sizes.vocabulary is not None:
        raise InputError(
            "prompt_tuning(deep=True) is for images; prefix_tuning reaches all layers of any model"
        )
    shape = (sizes.layers,) * deep + (length, sizes.width)
    rows = _start(key, init, sizes, shape) if init is None or isinstance(init, str) else init
    return _prompted(model, {"embedding": _embedded(model, rows, shape)}, length)


def p_tuning(
    model: Model | Network,
    length: int,
    key: jax.Array,
    *,
    hidden: int | None = None,
    encoder: str = "mlp",
    layers: int = 2,
) -> Prompted | PromptedNetwork:
    """Embeddings where prompt tuning's stand, made by a small network from trained ones, [n, D].

    `encoder="mlp"` has three linear layers, D -> hidden -> hidden -> D, with relu between;
    `"lstm"` a bidirectional LSTM of `layers` layers and width `hidden`, then 2 hidden -> 2 hidden
    -> D with relu between. `hidden` is D by default. After training `exported` keeps the outputs
    alone. Trained embeddings start at N(0, 1), the rest at U(+-1 / sqrt(inputs)) as in torch.

    Raises InputError for a negative length, an unknown encoder and sizes below one.

    Source: Liu et al. 2021, arXiv:2103.10385.
    """
    width = _sizes(model, length).width
    hidden = width if hidden is None else hidden
    if encoder not in ("mlp", "lstm") or min(hidden, layers) < 1:
        raise InputError(
            f"p_tuning(hidden={hidden}, encoder={encoder!r}, layers={layers}): the encoder is "
            "'mlp' or 'lstm', its sizes at least 1"
        )
    first, second, third = jax.random.split(key, 3)
    prompt: dict[str, Any] = {"embedding": jax.random.normal(first, (length, width))}
    sizes = [width, hidden, hidden, width]
    if encoder == "lstm":
        prompt["lstm"] = encoders.lstm_layers(third, width, hidden, layers)
        sizes = [2 * hidden, 2 * hidden, width]
    prompt["mlp"] = encoders.mlp_layers(second, sizes)
    return _prompted(model, prompt, length)


def prefix_tuning(
    model: Model | Network,
    length: int,
    key: jax.Array,
    *,
    hidden: int | None = None,
    init: str | jax.Array = "normal",
) -> Prompted | PromptedNetwork:
    """Trained keys and values of n virtual tokens before those of the input, in every layer.

    They are one array [n, 2 L K d], from N(0, 1), "zero", or as given. Not rotated by their
    positions, as in PEFT. With `hidden` they are made by a network, for training only: trained
    embeddings [n, K d] -> hidden, tanh -> 2 L K d; `exported` keeps its outputs. Zeros are not
    neutral (a zero key takes its share of attention); only n = 0 is. Trains `2 n L K d` numbers, or
    `n e + (e hidden + hidden) + (hidden 2 L e + 2 L e)` with `e = K d`. A text's positions go on
    from n.

    Raises InputError for a negative length, a width below one, and an unknown init.

    Source: Li and Liang 2021, arXiv:2101.00190.
    """
    sizes = _sizes(model, length)
    width = sizes.heads * sizes.head_dim
    shape = (length, 2 * sizes.layers * width)
    if isinstance(init, str) and init not in ("normal", "zero"):
        raise InputError(
            f"prefix_tuning(init={init!r}): unknown; give 'normal', 'zero' or an array {shape}"
        )
    if hidden is None:
        drawn = jax.random.normal(key, shape) * (not isinstance(init, str) or init == "normal")
        start = drawn if isinstance(init, str) else _given(init, shape)
        return _prompted(model, {"embedding": start}, length, keys_values=True)
    if hidden < 1 or not isinstance(init, str):
        raise InputError(
            f"prefix_tuning(hidden={hidden}): at least 1, with init 'normal' or 'zero'; arrays "
            "start a prefix without hidden"
        )
    first, second = jax.random.split(key)
    layers = encoders.mlp_layers(second, [width, hidden, shape[1]])
    if init == "zero":
        layers["1"] = jax.tree.map(jnp.zeros_like, layers["1"])
    prompt = {"embedding": jax.random.normal(first, (length, width)), "mlp": layers}
    return _prompted(model, prompt, length, keys_values=True)


def _prompted(
    model: Model | Network, prompt: dict[str, Any], length: int, keys_values: bool = False
) -> Prompted | PromptedNetwork:
    if isinstance(model, Network):
        return prompted_network(model, prompt, length, keys_values)
    return Prompted(model, {**model.params, "prompt": prompt}, length, keys_values)


def _start(key: jax.Array, init: str | None, sizes: Sizes, shape: tuple[int, ...]) -> jax.Array:
    """Token ids [n] or embeddings of this shape, drawn as `init` says."""
    known = ("random",) if sizes.vocabulary is None else ("vocabulary", "random")
    if init is not None and init not in known:
        listed = ", ".join(map(repr, known))
        text = "" if sizes.vocabulary is None else ", the token ids of a text"
        raise InputError(
            f"prompt_tuning(init={init!r}): unknown here; give {listed}{text} or an array "
            f"{list(shape)} of embeddings"
        )
    if sizes.vocabulary is not None and init != "random":
        return jax.random.randint(key, shape[-2:-1], 0, sizes.vocabulary)
    return jax.random.uniform(key, shape, minval=-sizes.spread, maxval=sizes.spread)


def _embedded(model: Model | Network, rows: Any, shape: tuple[int, ...]) -> jax.Array:
    """Embeddings [n, D]: given, or those of token ids, repeated or cut to n."""
    rows = jnp.asarray(rows)
    if rows.ndim > 1 or not hasattr(model.config, "vocab_size"):
        return _given(rows, shape)
    if (
        rows.ndim != 1
        or not jnp.issubdtype(rows.dtype, jnp.integer)
        or (not rows.size and shape[0])
    ):
        raise InputError(f"init of shape {rows.shape}: give token ids, at least one, or {shape}")
    ids = jnp.resize(rows, shape[:1])
    return embed(model, ids).astype(jnp.float32)


def _given(array: Any, shape: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(array, jnp.float32)
    if array.shape != shape:
        raise InputError(f"init has shape {array.shape}; virtual tokens of this model are {shape}")
    return array


def _sizes(model: Model | Network, length: int) -> Sizes:
    """The model's sizes, once `length` virtual tokens can stand in it."""
    if "prompt" in model.params:
        raise InputError("the model has virtual tokens already; give the one before it")
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise InputError(f"length={length!r}: how many virtual tokens; give 0 or more")
    return sizes_of(model)
