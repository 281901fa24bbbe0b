"""What a Llama-family config.json says, checked and made immutable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.errors import InputError

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: kind is "default", "linear" or "llama3".

    linear divides every frequency by `factor`; llama3 divides only the slow ones and blends in
    between (Llama 3.1 report, long context).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and switches of a Llama-family decoder, under their Hugging Face names.

    >>> config = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=24,
    ...                      num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ...                      head_dim=8)
    >>> LlamaConfig.from_hf(config.to_hf()) == config
    True
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "LlamaConfig":
        """Reads a config.json's mapping, in the older or the newer transformers spelling.

        Raises InputError, naming `where`, for a missing key, an architecture that is not Llama's,
        or an option (activation, rope kind) that this decoder does not compute.
        """
        _check_architecture(raw, where)
        heads = int(raw["num_attention_heads"])
        theta, scaling = _rope(raw, where)
        config = cls(
            **{name: int(raw[name]) for name in _REQUIRED},
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_ids(raw.get("eos_token_id")),
            pad_token_id=raw.get("pad_token_id"),
        )
        _check_sizes(config, where)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The mapping to write as config.json; rope in both spellings, for old and new readers."""
        rope = _rope_to_hf(self.rope_scaling)
        eos = list(self.eos_token_ids)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{name: getattr(self, name) for name in _REQUIRED},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope,
            "rope_parameters": {
                "rope_type": "default",
                **(rope or {}),
                "rope_theta": self.rope_theta,
            },
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
            "pad_token_id": self.pad_token_id,
        }


def _check_architecture(raw: Mapping[str, Any], where: str) -> None:
    kind = raw.get("model_type")
    if kind != "llama":
        raise InputError(
            f"{where}: model_type {kind!r} is not supported; only 'llama' decoders are read here "
            "(bring other models as your own apply function)"
        )
    built = raw.get("architectures")
    if built and "LlamaForCausalLM" not in built:
        raise InputError(
            f"{where}: architecture {built[0]!r} is not supported; only LlamaForCausalLM is"
        )
    missing = [name for name in _REQUIRED if raw.get(name) is None]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}; the file is not a whole config")
    for name, expected in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if raw.get(name, expected) != expected:
            raise InputError(f"{where}: {name} {raw[name]!r} is not supported, only {expected!r}")


def _check_sizes(config: LlamaConfig, where: str) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {
        name: getattr(config, name) for name in (*_REQUIRED, "num_key_value_heads", "head_dim")
    }
    for name, size in sizes.items():
        if size <= 0:
            raise InputError(f"{where}: {name} is {size}, it must be positive")
    if heads % kv_heads:
        raise InputError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if config.head_dim % 2:
        raise InputError(f"{where}: head_dim {config.head_dim} is odd; rotary pairs need it even")


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
    # transformers >= 5 writes rope_parameters (theta inside), earlier ones rope_theta beside
    # rope_scaling, whose key was "type" before it was "rope_type".
    given = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", float(_rope_value(given, "factor", where)))
    if kind != "llama3":
        raise InputError(
            f"{where}: rope type {kind!r} is not supported, only 'default', 'linear' and 'llama3'"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (_rope_value(given, name, where) for name in names)
    return theta, RopeScaling("llama3", float(factor), float(low), float(high), int(original))


def _rope_value(given: Mapping[str, Any], name: str, where: str) -> float:
    value = given.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{where}: rope {name} is {value!r}; it must be a positive number")
    return value


def _rope_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "default":
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
