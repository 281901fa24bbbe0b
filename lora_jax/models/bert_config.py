"""What the config.json of a BERT, RoBERTa or MiniLM says, checked and made immutable."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.errors import InputError

GELUS = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
"""Whether an activation is the tanh approximation (Hendrycks and Gimpel 2016, section 2)."""
_ROBERTA = ("roberta", "xlm-roberta")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)


@dataclass(frozen=True)
class BertConfig:
    """The sizes and switches of a BERT-like encoder, under their Hugging Face names.

    >>> raw = {"model_type": "bert", "vocab_size": 48, "hidden_size": 12, "intermediate_size": 20,
    ...        "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 32,
    ...        "type_vocab_size": 2}
    >>> BertConfig.from_hf(raw).context
    32
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int = 0
    counts_from_pad: bool = False
    """RoBERTa: positions count the tokens that are no padding, from pad_token_id + 1 on."""

    @property
    def context(self) -> int:
        """The longest sequence: RoBERTa's table starts with rows that no token uses."""
        unused = self.pad_token_id + 1 if self.counts_from_pad else 0
        return self.max_position_embeddings - unused

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "BertConfig":
        """Reads a config.json's mapping.

        Raises InputError, naming `where`, for a missing size, another architecture, or an option
        (activation, relative positions, decoder) that this encoder does not compute.
        """
        _check_options(raw, where)
        roberta = raw["model_type"] in _ROBERTA
        pad = raw.get("pad_token_id")
        config = cls(
            **{name: int(raw[name]) for name in _SIZES},
            layer_norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
            hidden_act=raw.get("hidden_act", "gelu"),
            pad_token_id=int(roberta) if pad is None else int(pad),
            counts_from_pad=roberta,
        )
        _check_sizes(config, where)
        return config


def _check_options(raw: Mapping[str, Any], where: str) -> None:
    kind = raw.get("model_type")
    if kind not in ("bert", *_ROBERTA):
        raise InputError(
            f"{where}: model_type {kind!r} is no BERT; known are 'bert', 'roberta', 'xlm-roberta'"
        )
    missing = [name for name in _SIZES if raw.get(name) is None]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}; the file is not a whole config")
    options = {
        "hidden_act": ("gelu", tuple(GELUS)),
        "position_embedding_type": ("absolute", ("absolute",)),
        "is_decoder": (False, (False,)),
    }
    for name, (default, known) in options.items():
        if raw.get(name, default) not in known:
            listed = ", ".join(repr(value) for value in known)
            raise InputError(f"{where}: {name} {raw[name]!r} is not supported, only {listed}")


def _check_sizes(config: BertConfig, where: str) -> None:
    for name in _SIZES:
        if getattr(config, name) <= 0:
            raise InputError(f"{where}: {name} is {getattr(config, name)}, it must be positive")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{where}: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
