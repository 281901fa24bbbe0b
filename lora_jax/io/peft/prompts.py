"""Virtual tokens in PEFT's format: prompt tuning, P-tuning and prefix tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from lora_jax.errors import InputError
from lora_jax.io.folder import read_json
from lora_jax.io.swap import swap_folder
from lora_jax.models import Model
from lora_jax.prompts import Prompted, prefix_tuning, prompt_tuning

_CONFIG, _WEIGHTS, _KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
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


def load_prompt(folder: str | Path, model: Model) -> Prompted:
    """Read virtual tokens that peft or `save_prompt` wrote, before a model's text.

    P-tuning comes back as the embeddings that its encoder made. Raises InputError for other types,
    for options that would be ignored and for tokens that do not fit the model.
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
    wanted = jax.eval_shape(lambda: factory(model, length, jax.random.key(0)).params["prompt"])
    shape = wanted["embedding"].shape
    if set(tensors) != {_KEY} or tensors[_KEY].shape != shape:
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(
            f"'{folder}' holds {found}, but {length} virtual tokens of this model are "
            f"{_KEY} of {list(shape)}; load them onto the model that they were trained on"
        )
    values = jnp.asarray(tensors[_KEY], jnp.float32)
    return factory(model, length, jax.random.key(0), init=values)


def save_prompt(
    folder: str | Path,
    prompted: Prompted,
    params: Mapping[str, Any],
    *,
    base_name: str,
    task_type: str | None = "CAUSAL_LM",
) -> Path:
    """Write virtual tokens so that peft (0.21) and `load_prompt` read them; returns the folder.

    `params` are the model's after training, merged: what an encoder makes of them is written, as
    peft does. The folder appears whole or not at all.
    """
    sizes = prompted.model.config
    heads = sizes.num_key_value_heads if prompted.keys_values else sizes.num_attention_heads
    width = heads * sizes.head_dim if prompted.keys_values else sizes.hidden_size
    config = {
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
    made = np.asarray(prompted.encode(params["prompt"]), np.float32)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    weights = save({_KEY: np.ascontiguousarray(made)}, metadata={"format": "pt"})
    return swap_folder(folder, {_CONFIG: text.encode(), _WEIGHTS: weights})


def _check(config: Mapping[str, Any], place: str) -> None:
    if config.get("peft_type") not in _FACTORIES:
        raise InputError(
            f"{place}: peft_type {config.get('peft_type')!r} has no virtual tokens; load_peft "
            f"reads adapters, and these are {', '.join(_FACTORIES)}"
        )
    wrong = [f"{k}={v!r}" for k, v in sorted(config.items()) if k not in _READ and v]
    if config.get("num_transformer_submodules") not in (None, 1):
        wrong.append(f"num_transformer_submodules={config['num_transformer_submodules']!r}")
    if wrong:
        raise InputError(f"{place}: not supported: {', '.join(wrong)}; train without them")
