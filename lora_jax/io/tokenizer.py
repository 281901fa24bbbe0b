"""Text to ids and back: from a tokenizer.json, or rebuilt from a GGUF file's metadata."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from lora_jax.errors import InputError
from lora_jax.io.chat import render
from lora_jax.io.folder import read_json

_CONTROL, _USER_DEFINED = 3, 4
"""GGUF's token types that never come out of merging."""

# Llama 3 splits words, numbers of up to three digits and punctuation before it merges bytes.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with its special ids and its chat template."""

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    chat_template: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else its tokenizer_config.json said, to be written back."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with what the tokenizer itself puts around it, such as a first <s>."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def rows(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, T] int32, padded on the right, and a mask [B, T] that is True at tokens.

        T is the longest text's, at most `length`: a longer text is cut before its closing token.
        """
        room = length - self.backend.num_special_tokens_to_add(False)
        if room < 1:
            raise InputError(f"length={length} leaves no room beside the special tokens; raise it")
        if not texts or isinstance(texts, str):
            raise InputError(f"rows of {texts!r}; give a list of one text or more")
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for encoding in encodings:
            encoding.truncate(room)
        found = [self.backend.post_process(encoding).ids for encoding in encodings]
        mask = np.arange(max(map(len, found))) < np.array([[len(row)] for row in found])
        ids = np.full(mask.shape, self.pad_id or 0, np.int32)
        ids[mask] = np.concatenate(found)
        return ids, mask

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text, by the model's own template.

        `messages` are {"role": ..., "content": ...}. Encode the result with
        `add_special_tokens=False`: the template writes the special tokens itself.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template; give plain text as the prompt")
        return render(self.chat_template, messages, add_generation_prompt, self._special_text())

    def token(self, index: int | None) -> str | None:
        """The token with this id, or None for None."""
        return None if index is None else self.backend.id_to_token(index)

    def files(self) -> dict[str, str]:
        """The texts of tokenizer.json and tokenizer_config.json, as transformers reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.extra,
            **self._special_text(),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        return {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": text + "\n",
        }

    def _special_text(self) -> dict[str, str]:
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        texts = {f"{name}_token": self.token(index) for name, index in ids.items()}
        return {name: text for name, text in texts.items() if text is not None}


def tokenizer_from_folder(folder: Path) -> Tokenizer | None:
    """Reads tokenizer.json and what stands beside it; None for a folder without one."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    # The package raises bare Exception for any fault in the file.
    except Exception as fault:
        raise InputError(f"{file} is not a tokenizer ({fault}); fetch it again") from None
    # Rows are cut and filled up by who asks for them; a file may hold another's choice.
    backend.no_truncation()
    backend.no_padding()
    beside = folder / "tokenizer_config.json"
    config = read_json(beside) if beside.is_file() else {}
    named = {
        name: _text(config.pop(f"{name}_token", None)) for name in ("bos", "eos", "pad", "unk")
    }
    template = _template(config.pop("chat_template", None), folder)
    ids = {
        f"{name}_id": backend.token_to_id(text) if text else None for name, text in named.items()
    }
    return Tokenizer(backend, chat_template=template, extra=config, **ids)


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _template(given: Any, folder: Path) -> str | None:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    if isinstance(given, list):
        named = {entry["name"]: entry["template"] for entry in given}
        return named.get("default")
    return given


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer | None:
    """Rebuilds the byte-level BPE tokenizer that a GGUF file describes; None when it has none.

    Raises InputError for a tokenizer of another kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind != "gpt2":
        raise InputError(
            f"{where}: its tokenizer is of kind {kind!r}; only byte-level BPE ('gpt2') is rebuilt "
            "from GGUF. Load the model from its Hugging Face folder"
        )
    backend = _bpe(metadata, where)
    return Tokenizer(
        backend,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        unk_id=metadata.get("tokenizer.ggml.unknown_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _bpe(metadata: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(pre, where)
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return backend


def _pre_tokenizer(pre: str, where: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("default", "gpt-2"):
        return plain
    if pre == "smollm":
        # Digits first: the file's merges assume it, and transformers' own GGUF reader forgets it.
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if pre == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_only])
    raise InputError(
        f"{where}: its tokenizer splits text by the rules of {pre!r}, which are not known here. "
        "Load the model from its Hugging Face folder"
    )
