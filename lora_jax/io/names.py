"""The one table between Hugging Face's Llama names and our parameter paths.

Ours stack the layers: `layers/attn/q_proj/kernel` [L, d_in, d_out] is, for every layer, their
`model.layers.N.self_attn.q_proj.weight` [d_out, d_in].
"""

import difflib
import re

from lora_jax.errors import InputError

_OUTER = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
_MODULES = {
    "attn/q_proj": "self_attn.q_proj",
    "attn/k_proj": "self_attn.k_proj",
    "attn/v_proj": "self_attn.v_proj",
    "attn/o_proj": "self_attn.o_proj",
    "mlp/gate_proj": "mlp.gate_proj",
    "mlp/up_proj": "mlp.up_proj",
    "mlp/down_proj": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_INNER = {
    **{f"layers/{ours}/kernel": f"{theirs}.weight" for ours, theirs in _MODULES.items()},
    **{f"layers/{ours}/bias": f"{theirs}.bias" for ours, theirs in _MODULES.items()},
    **{f"layers/{ours}/scale": f"{theirs}.weight" for ours, theirs in _NORMS.items()},
}
_OUTER_BACK = {name: path for path, name in _OUTER.items()}
_INNER_BACK = {name: path for path, name in _INNER.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def to_hf(path: str, layer: int | None) -> str:
    """The tensor name of one layer's slice of a path; `layer` is None outside the stack.

    Raises InputError for a path that no Llama has, or a layer given or left out wrongly.

    >>> to_hf("layers/attn/q_proj/kernel", 3)
    'model.layers.3.self_attn.q_proj.weight'
    >>> to_hf("embed/embedding", None)
    'model.embed_tokens.weight'
    """
    known = _OUTER if layer is None else _INNER
    if path not in known:
        where = "outside the layers" if layer is None else "in a layer"
        raise InputError(f"no parameter {path!r} {where} of a Llama; {_nearest(path, known)}")
    return known[path] if layer is None else f"model.layers.{layer}.{known[path]}"


def from_hf(name: str) -> tuple[str, int | None]:
    """The path and layer of a tensor name; the inverse of `to_hf`.

    >>> from_hf("model.layers.3.mlp.down_proj.weight")
    ('layers/mlp/down_proj/kernel', 3)
    >>> from_hf("lm_head.weight")
    ('lm_head/kernel', None)
    """
    if name in _OUTER_BACK:
        return _OUTER_BACK[name], None
    found = _LAYER.fullmatch(name)
    if found and found[2] in _INNER_BACK:
        return _INNER_BACK[found[2]], int(found[1])
    layer = found[1] if found else 0
    known = {*_OUTER_BACK, *(f"model.layers.{layer}.{tail}" for tail in _INNER_BACK)}
    raise InputError(f"no Llama tensor is called {name!r}; {_nearest(name, known)}")


def module_of(path: str, layer: int | None) -> str:
    """The name of the torch module that holds a parameter: its tensor name without the last part.

    >>> module_of("layers/attn/q_proj/kernel", 3)
    'model.layers.3.self_attn.q_proj'
    """
    return to_hf(path, layer).rpartition(".")[0]


def is_transposed(path: str) -> bool:
    """Whether the tensor under this path is stored [d_out, d_in]: kernels are, tables are not.

    >>> is_transposed("layers/mlp/up_proj/kernel"), is_transposed("embed/embedding")
    (True, False)
    """
    return path.endswith("/kernel")


def is_stacked(path: str) -> bool:
    """Whether the parameter under this path has the leading layer axis.

    >>> is_stacked("layers/attn_norm/scale"), is_stacked("norm/scale")
    (True, False)
    """
    return path.startswith("layers/")


def _nearest(name: str, known: "dict[str, str] | set[str]") -> str:
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.3)
    return f"nearest: {', '.join(near)}" if near else "it has none of that kind"
