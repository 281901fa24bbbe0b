"""Virtual tokens in PEFT's format: prompt tuning, P-tuning and prefix tuning."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from lora_jax.errors import InputError
from lora_jax.io.card import Card, model_card, versions
from lora_jax.io.folder import read_json
from lora_jax.io.swap import swap_folder
from lora_jax.models import LlamaConfig, Model, Network
from lora_jax.models.bert_config import BertConfig
from lora_jax.prompts import Prompted, PromptedNetwork, prefix_tuning, prompt_tuning

_CONFIG, _WEIGHTS, _README = "adapter_config.json", "adapter_model.safetensors", "README.md"
_KEY = "prompt_embeddings"
_HEAD = {"kernel": "base_model.classifier.weight", "bias": "base_model.classifier.bias"}
_HEADS = {"classifier", "score"}  # what PEFT trains beside the tokens of any SEQ_CLS
# A P-tuning file holds what its encoder made: embeddings, as prompt tuning has them.
_FACTORIES = {
    "PROMPT_TUNING": prompt_tuning,
    "P_TUNING": prompt_tuning,
    "PREFIX_TUNING": prefix_tuning,
}
_READ = {
    *("peft_type", "task_type", "num_virtual_tokens", "num_transformer_submodules"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("num_layers", "num_attention_heads", "token_dim", "prefix_projection", "init_weights"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    "encoder_reparameterization_type",
}


def load_prompt(folder: str | Path, model: Model | Network) -> Prompted | PromptedNetwork:
    """Read virtual tokens that peft or `save_prompt` wrote, before the text of a Llama or a BERT.

    P-tuning comes back as the embeddings that its encoder made. A classifier that stands in the
    folder (SEQ_CLS) goes into the head of `with_head(load_bert(source, "pooler"), classes, key)`.
    Raises InputError for other types, for options that would be ignored and for tokens that do not
    fit the model.
    """
    folder = Path(folder)
    config = read_json(folder / _CONFIG)
    _check(config, str(folder / _CONFIG))
    if not (folder / _WEIGHTS).is_file():
        raise InputError(
            f"no {_WEIGHTS} in '{folder}'; load the adapter with peft and save it again"
        )
    tensors = load_file(folder / _WEIGHTS)
    length = config["num_virtual_tokens"]
    factory = _FACTORIES[config["peft_type"]]
    head = _head(tensors, model, str(folder))
    wanted = jax.eval_shape(lambda: factory(model, length, jax.random.key(0)).params["prompt"])
    shape = wanted["embedding"].shape
    if set(tensors) != {_KEY, *head} or tensors[_KEY].shape != shape:
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(
            f"'{folder}' holds {found}, but {length} virtual tokens of this model are "
            f"{_KEY} of {list(shape)}; load them onto the model that they were trained on"
        )
    values = jnp.asarray(tensors[_KEY], jnp.float32)
    prompted = factory(model, length, jax.random.key(0), init=values)
    if not head:
        return prompted
    read = {name: jnp.asarray(tensors[key].T, jnp.float32) for name, key in _HEAD.items()}
    return dataclasses.replace(prompted, params={**prompted.params, "head": read})


def save_prompt(
    folder: str | Path,
    prompted: Prompted | PromptedNetwork,
    params: Mapping[str, Any],
    *,
    base_name: str,
    card: Card | None = None,
    task_type: str | None = "auto",
) -> Path:
    """Write virtual tokens so that peft (0.21) and `load_prompt` read them; returns the folder.

    `params` are the model's after training, merged: what an encoder makes of them is written, as
    peft does, and of a BERT with a head the head as its classifier. `card` holds further facts for
    README.md. `task_type` is CAUSAL_LM of a Llama, SEQ_CLS of a BERT with a head and else
    FEATURE_EXTRACTION, unless given.

    The folder appears whole or not at all. Raises InputError for what PEFT's format cannot hold: a
    ViT's tokens, and a head that does not read BERT's pooler.
    """
    classifier = _classifier(prompted, params)
    if task_type == "auto":
        encoder = "SEQ_CLS" if classifier else "FEATURE_EXTRACTION"
        task_type = "CAUSAL_LM" if isinstance(prompted, Prompted) else encoder
    config = _config(prompted, base_name, task_type)
    if classifier:
        config["modules_to_save"] = sorted(_HEADS)
    made = np.asarray(prompted.encode(params["prompt"]), np.float32)
    tensors = {_KEY: np.ascontiguousarray(made), **classifier}
    row = (config["peft_type"].lower(), f"{prompted.length} virtual tokens")
    facts = _facts(config["peft_type"], made.size + sum(x.size for x in classifier.values()), card)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    readme = model_card(base_name, [row], facts, task_type=task_type, virtual=True)
    files = {
        _CONFIG: text.encode(),
        _WEIGHTS: save(tensors, metadata={"format": "pt"}),
        _README: readme.encode(),
    }
    return swap_folder(folder, files)


def _config(
    prompted: Prompted | PromptedNetwork, base_name: str, task_type: str | None
) -> dict[str, Any]:
    """The adapter_config.json of virtual tokens."""
    sizes = prompted.model.config if isinstance(prompted, Prompted) else prompted.config
    heads, width = sizes.num_attention_heads, sizes.hidden_size
    if prompted.keys_values and isinstance(sizes, LlamaConfig):
        heads, width = sizes.num_key_value_heads, sizes.num_key_value_heads * sizes.head_dim
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": sizes.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompted.length,
        "peft_type": "PREFIX_TUNING" if prompted.keys_values else "PROMPT_TUNING",
        "revision": None,
        "task_type": task_type,
        "token_dim": width,
    }


def _facts(peft_type: str, trainable: int, card: Card | None) -> Card:
    """The card with what is known here; what the caller gave wins."""
    known: dict[str, Any] = {"trainable": trainable, "versions": versions(), **(card or {})}
    known["tags"] = [*known.get("tags", ()), peft_type.lower()]
    return cast(Card, known)


def _classifier(
    prompted: Prompted | PromptedNetwork, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The head of a BERT under PEFT's names; InputError where PEFT has no such model."""
    if isinstance(prompted, Prompted):
        return {}
    if not isinstance(prompted.config, BertConfig):
        raise InputError(
            "PEFT puts virtual tokens before text alone; save those of an image model with "
            "lora_jax.io.native.save_adapter"
        )
    if "head" not in params:
        return {}
    if "pooler" not in params or prompted.config.counts_from_pad:
        raise InputError(
            "transformers' classifier reads BERT's pooler, and this head does not; load the base "
            "by load_bert(..., pooling='pooler'), or save with lora_jax.io.native.save_adapter"
        )
    head = {key: np.asarray(params["head"][name], np.float32) for name, key in _HEAD.items()}
    return {key: np.ascontiguousarray(array.T) for key, array in head.items()}


def _head(tensors: Mapping[str, Any], model: Model | Network, place: str) -> list[str]:
    """The names of a file's classifier; InputError where the model has no head for it."""
    if not set(_HEAD.values()) <= set(tensors):
        return []
    classes, width = tensors[_HEAD["kernel"]].shape
    kernel = model.params.get("head", {}).get("kernel")
    fits = kernel is not None and kernel.shape == (width, classes)
    if not fits or "pooler" not in model.params:
        raise InputError(
            f"'{place}' holds a classifier of {classes} classes over BERT's pooler, and the model "
            f"has none; give with_head(load_bert(source, 'pooler'), {classes}, key)"
        )
    return list(_HEAD.values())


def _check(config: Mapping[str, Any], place: str) -> None:
    if config.get("peft_type") not in _FACTORIES:
        raise InputError(
            f"{place}: peft_type {config.get('peft_type')!r} has no virtual tokens; load_peft "
            f"reads adapters, and these are {', '.join(_FACTORIES)}"
        )
    whole = set(config.get("modules_to_save") or ())
    own = {"modules_to_save"} if config.get("task_type") == "SEQ_CLS" and whole <= _HEADS else set()
    wrong = [f"{k}={v!r}" for k, v in sorted(config.items()) if k not in _READ | own and v]
    if config.get("num_transformer_submodules") not in (None, 1):
        wrong.append(f"num_transformer_submodules={config['num_transformer_submodules']!r}")
    if wrong:
        raise InputError(f"{place}: not supported: {', '.join(wrong)}; train without them")
