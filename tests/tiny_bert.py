"""Tiny BERT and RoBERTa folders as transformers writes them, with weights by formula."""

import json

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

from lora_jax.io.bert import to_hf
from lora_jax.models.bert import param_shapes
from lora_jax.models.bert_config import BertConfig

SIZES = {
    "vocab_size": 29,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-5,
}
CONFIGS = {
    "bert": {
        **SIZES,
        "architectures": ["BertModel"],
        "model_type": "bert",
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    },
    "roberta": {
        **SIZES,
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "type_vocab_size": 1,
        "hidden_act": "gelu_new",
        "pad_token_id": 1,
    },
}
LENGTHS = np.array([[9], [5]])
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s", "a", ".")


def tensors(kind):
    """Every tensor of the folder: the same numbers on every machine and with every library."""
    shapes = param_shapes(BertConfig.from_hf(CONFIGS[kind]), "pooler")
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = "/".join(key.key for key in keys)
        stacked = path.startswith("layers/")
        shape = leaf.shape[stacked:][:: -1 if path.endswith("/kernel") else 1]
        for layer in range(leaf.shape[0]) if stacked else [None]:
            wave = np.sin(1.3 * np.arange(np.prod(shape)) + len(found)).reshape(shape)
            base = 1.0 if path.endswith("scale") else 0.0
            found[to_hf(path, layer)] = (base + 0.4 * wave).astype(np.float32)
    return found


def write(folder, kind, weights=None, **changes):
    """Write config.json and model.safetensors; `changes` go into the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], **changes}))
    save_file(tensors(kind) if weights is None else weights, folder / "model.safetensors")
    return folder


def batch(kind):
    """`ids` [2, 9], the second row padded from its fifth token on, and their mask."""
    mask = np.arange(9) < LENGTHS
    ids = 2 + 5 * np.arange(18).reshape(2, 9) % 27
    return np.where(mask, ids, CONFIGS[kind]["pad_token_id"]).astype(np.int32), mask


def tokenizer():
    """A WordPiece tokenizer whose file asks for padding and truncation, as MiniLM's does."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=16)
    return made
