"""The table between Hugging Face's BERT names and our parameter paths.

Ours stack the layers, as for a Llama: `layers/attn/q_proj/kernel` [L, d_in, d_out] is, for every
layer, their `encoder.layer.N.attention.self.query.weight` [d_out, d_in].
"""

import dataclasses
import re

from lora_jax.io.checkpoint import Checkpoint, Names

_OUTER = {
    "embed/word/embedding": "embeddings.word_embeddings.weight",
    "embed/position/embedding": "embeddings.position_embeddings.weight",
    "embed/type/embedding": "embeddings.token_type_embeddings.weight",
    "embed/norm/scale": "embeddings.LayerNorm.weight",
    "embed/norm/bias": "embeddings.LayerNorm.bias",
    "pooler/kernel": "pooler.dense.weight",
    "pooler/bias": "pooler.dense.bias",
}
_INNER = {
    "layers/attn/q_proj": "attention.self.query",
    "layers/attn/k_proj": "attention.self.key",
    "layers/attn/v_proj": "attention.self.value",
    "layers/attn/o_proj": "attention.output.dense",
    "layers/attn_norm": "attention.output.LayerNorm",
    "layers/mlp/up_proj": "intermediate.dense",
    "layers/mlp/down_proj": "output.dense",
    "layers/mlp_norm": "output.LayerNorm",
}
_PREFIX = re.compile(r"(bert|roberta)\.")
# The oldest checkpoints call a norm's scale and bias gamma and beta.
_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def to_hf(path: str, layer: int | None) -> str:
    """The tensor name of one layer's slice of a path; `layer` is None outside the stack.

    >>> to_hf("layers/mlp/up_proj/kernel", 3)
    'encoder.layer.3.intermediate.dense.weight'
    >>> to_hf("embed/norm/bias", None)
    'embeddings.LayerNorm.bias'
    """
    if layer is None:
        return _OUTER[path]
    module, _, leaf = path.rpartition("/")
    return f"encoder.layer.{layer}.{_INNER[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def encoder_of(checkpoint: Checkpoint, pooler: bool) -> Checkpoint:
    """The encoder's tensors of a checkpoint, under the names of a bare BertModel.

    Beside an encoder under `bert.` or `roberta.`, everything else is a task's head and left out;
    so are the pooler, unless asked for, and stored position numbers, which follow from the shapes.
    """
    home = {_bare(name): name for name in _encoder_names(checkpoint)}
    kept = {
        name: stored
        for name, stored in home.items()
        if name != "embeddings.position_ids" and (pooler or not name.startswith("pooler."))
    }
    return dataclasses.replace(
        checkpoint,
        shapes={name: checkpoint.shapes[stored] for name, stored in kept.items()},
        read=lambda name: checkpoint.read(kept[name]),
    )


def _encoder_names(checkpoint: Checkpoint) -> list[str]:
    prefixed = [name for name in checkpoint.shapes if _PREFIX.match(name)]
    return prefixed or list(checkpoint.shapes)


def _bare(name: str) -> str:
    bare = _PREFIX.sub("", name, count=1)
    for old, new in _OLD.items():
        bare = bare.replace(old, new)
    return bare


BERT = Names("BERT", to_hf)
