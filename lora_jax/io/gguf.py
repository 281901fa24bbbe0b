"""GGUF files: weights dequantised, under Hugging Face's names and layout."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from lora_jax.errors import InputError
from lora_jax.io.checkpoint import Checkpoint
from lora_jax.io.folder import sha256_of

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(file: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Opens a GGUF file of Llama architecture -> its checkpoint and its metadata.

    Raises InputError when the file is cut short, of another architecture, or quantised in a way
    that the gguf package does not read.
    """
    reader = _reader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors, file)
    home = {_to_hf(name): tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS}
    return (
        Checkpoint(
            where=str(file),
            config=config,
            shapes={name: _shape(tensor) for name, tensor in home.items()},
            read=lambda name: _read(home[name], name, config, file),
            fingerprint=partial(sha256_of, [file]),
        ),
        metadata,
    )


def _reader(file: Path) -> GGUFReader:
    try:
        return GGUFReader(file)
    except OSError:
        raise
    # The reader trusts the header, so a cut or foreign file fails wherever numpy first notices.
    except Exception as fault:
        raise InputError(
            f"{file} ({file.stat().st_size:,} bytes) is not a whole GGUF file ({fault}); "
            "fetch it again"
        ) from None


def _to_hf(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    found = _BLOCK.fullmatch(name)
    if found and found[2] in _INNER:
        return f"model.layers.{found[1]}.{_INNER[found[2]]}.{found[3]}"
    return name


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _read(tensor: ReaderTensor, name: str, config: dict[str, Any], file: Path) -> np.ndarray:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise InputError(
            f"{file}: {tensor.name} is stored as {tensor.tensor_type.name}, which is not supported"
        ) from None
    values = values.reshape(_shape(tensor))
    if ".q_proj." in name:
        return unpermute(values, config["num_attention_heads"])
    if ".k_proj." in name:
        return unpermute(values, config["num_key_value_heads"])
    return values


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q and k rows [H * d, ...], where rotary pairs are neighbours.

    There rows 2i and 2i+1 of a head turn together, here rows i and i + d/2.

    >>> unpermute(np.array([0, 2, 1, 3]), heads=1)
    array([0, 1, 2, 3])
    """
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _config(
    metadata: dict[str, Any], tensors: dict[str, ReaderTensor], file: Path
) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{file}: architecture {architecture!r} is not supported, only 'llama' is")
    heads = _value(metadata, "attention.head_count", file)
    width = _value(metadata, "embedding_length", file)
    return {
        "model_type": "llama",
        "vocab_size": _shape(_tensor(tensors, "token_embd.weight", file))[0],
        "hidden_size": width,
        "intermediate_size": _value(metadata, "feed_forward_length", file),
        "num_hidden_layers": _value(metadata, "block_count", file),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", width // heads),
        # Stored as float32; the shortest decimal is what its author wrote.
        "rms_norm_eps": _decimal(_value(metadata, "attention.layer_norm_rms_epsilon", file)),
        "max_position_embeddings": _value(metadata, "context_length", file),
        "rope_theta": float(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata, tensors, file),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _decimal(value: float) -> float:
    return float(str(np.float32(value)))


def _value(metadata: dict[str, Any], name: str, file: Path) -> Any:
    if f"llama.{name}" not in metadata:
        raise InputError(f"{file}: the metadata lack llama.{name}; fetch the file again")
    return metadata[f"llama.{name}"]


def _tensor(tensors: dict[str, ReaderTensor], name: str, file: Path) -> ReaderTensor:
    if name not in tensors:
        raise InputError(f"{file}: no tensor {name}; the file is not a whole model")
    return tensors[name]


def _rope_scaling(
    metadata: dict[str, Any], tensors: dict[str, ReaderTensor], file: Path
) -> dict[str, Any] | None:
    if _ROPE_FACTORS in tensors:
        return _llama3_scaling(metadata, tensors[_ROPE_FACTORS], file)
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": metadata.get("llama.rope.scaling.factor")}


def _llama3_scaling(metadata: dict[str, Any], tensor: ReaderTensor, file: Path) -> dict[str, Any]:
    # GGUF keeps what Llama 3.1's stretching divides each frequency by, not its four numbers. Of
    # those only the factor ever varied, and it is the largest divisor; the others are checked.
    divisors = np.asarray(tensor.data, np.float64).reshape(-1)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    turns = 8192 * theta ** -(np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
    kept = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    if not np.allclose(divisors, 1 / (kept + (1 - kept) / scaling["factor"]), rtol=1e-3):
        raise InputError(
            f"{file}: {_ROPE_FACTORS} is not Llama 3's stretching of rotary frequencies; "
            "load the model from its Hugging Face folder"
        )
    return scaling
