"""Tiny Llamas with all sizes distinct, and the files they may come from."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from lora_jax.io.export import save_hf
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import LlamaConfig, Model
from lora_jax.models.model import param_shapes

GOLDEN = Path(__file__).parent / "golden"
CONFIG = LlamaConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=40,
    eos_token_ids=(2,),
)
# What the Llama architecture is called in GGUF files.
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def config(**changes):
    return dataclasses.replace(CONFIG, **changes)


def model(seed=0, **changes):
    """A model whose every weight is noise; no norm of one or bias of zero hides a mistake."""
    noise, shape = np.random.default_rng(seed), config(**changes)

    def draw(path, leaf):
        one = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(one + 0.1 * noise.standard_normal(leaf.shape, np.float32))

    return Model(shape, jax.tree_util.tree_map_with_path(draw, param_shapes(shape)))


def folder(path, made):
    return save_hf(path, made.params, made.config, made.tokenizer)


def edit_weights(path, change):
    """Rewrites a folder's model.safetensors after `change` has had its way with the tensors."""
    file = path / "model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path, **changes):
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def shard(path):
    """Splits a folder's weights into two files and an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in halves.items():
        save_file({name: tensors[name] for name in inside}, path / file)
    where = {name: file for file, inside in halves.items() for name in inside}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "model.safetensors").unlink()


def golden_folder(path, name):
    """A Hugging Face folder of one of the recorded bases."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "peft" / "base" / f"{name}.config.json", path / "config.json")
    shutil.copy(GOLDEN / "peft" / "base" / f"{name}.safetensors", path / "model.safetensors")
    return path


def write_gguf(file, weights, shape, *, kind="F32", extra=None, tokenizer=True):
    """A GGUF file of a folder's tensors, as llama.cpp would write it: q and k permuted."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    if tokenizer:
        _add_tokenizer(writer)
    for name, values in {**load_file(weights / "model.safetensors"), **(extra or {})}.items():
        _add_tensor(writer, name, _permuted(name, values, shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_name(name):
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, module = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_BLOCK[module]}.{kind}"
    return f"{outer.get(stem, stem)}.{kind}"


def _permuted(name, values, shape):
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    module = name.split(".")[-2]
    if module not in heads:
        return values
    split = values.reshape(heads[module], 2, -1, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _add_tensor(writer, name, values, kind):
    quantised = gguf.GGMLQuantizationType[kind]
    if values.ndim < 2 or kind == "F32":
        writer.add_tensor(_gguf_name(name), values.astype(np.float32))
    else:
        packed = gguf.quants.quantize(values.astype(np.float32), quantised)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=quantised)


def _vocabulary():
    letters = ["Ġ", *"abcdefghij0123456789"]
    return ["<unk>", "<s>", "</s>", *letters, "ab", "12", "Ġab", "cd", "Ġ1"]


_MERGES = ["a b", "1 2", "Ġ ab", "c d", "Ġ 1"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def _add_tokenizer(writer, pre="smollm"):
    tokens = _vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token[0] == "<" else 1 for token in tokens])
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def tokenizer():
    vocabulary = {token: index for index, token in enumerate(_vocabulary())}
    backend = Backend(models.BPE(vocabulary, [tuple(pair.split()) for pair in _MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, bos_id=1, eos_id=2, unk_id=0, chat_template=TEMPLATE)
