"""Predicates on sites, for the rules that `attach` takes.

What a kernel does is known from the trace; which block it belongs to only from its name. The
names are those of the common Flax, Haiku, Equinox and PyTorch code bases; for others write a
pattern, or a predicate of your own: any function from Site to bool.
"""

from __future__ import annotations

import re

from lora_jax.sites import Site

_ATTENTION = re.compile(
    r"(.*[/_.])?(self_?|cross_?|multi_?head_?)?(att(entio)?n|attend|mha|mhsa|attention_?\d*)([/_.].*)?"
    r"|.*[/_.]?(q|k|v|o|qkv|query|key|value|kv)(_?(proj|einsum|proj_?\d+))(/.*)?"
)
_MLP = re.compile(
    r"(.*[/_.])?(mlp|ffn?|feed_?forward|ffw|intermediate|swiglu|geglu|experts?|moe)([/_.\d].*)?"
    r"|(.*/)?((gate|up|down|gate_up)_proj|fc_?\d|w[i123o](_\d)?|gating_einsum|c_fc)(/.*)?"
    r"|(?!.*head)(.*/)?lin(ear)?_?[12](/.*)?"
)


def kernels(site: Site) -> bool:
    """Every site: matrix products, embeddings, convolutions, experts, but no router."""
    return not site.router


def all_linear(site: Site) -> bool:
    """Every kernel that matrix products alone use, experts and an untied output head among them.

    Embeddings are left out, tied ones too, and convolutions, and the router of a mixture of
    experts. PEFT's `all-linear` also leaves out the output head; for that put
    `{"lm_head/kernel": None}` before this rule.
    """
    products = {use.split(",")[0] for use in site.uses}
    return products <= {"dense", "ragged"} and not site.router


def attention(site: Site) -> bool:
    """The linear kernels of attention, by the names of the blocks around them.

    >>> from lora_jax.select import _ATTENTION
    >>> bool(_ATTENTION.fullmatch("layers/attn/q_proj/kernel"))
    True
    """
    return all_linear(site) and _ATTENTION.fullmatch(site.path.lower()) is not None


def mlp(site: Site) -> bool:
    """The linear kernels of feed-forward blocks and experts, by the names around them.

    >>> from lora_jax.select import _MLP
    >>> bool(_MLP.fullmatch("layers/mlp/up_proj/kernel"))
    True
    """
    return (
        all_linear(site) and not attention(site) and _MLP.fullmatch(site.path.lower()) is not None
    )


def convolutions(site: Site) -> bool:
    """Every kernel of a convolution."""
    return any(use.startswith("conv") for use in site.uses)


def embeddings(site: Site) -> bool:
    """Every table whose rows are looked up by index, tied to an output head or not."""
    return site.lookup


def recurrent(site: Site) -> bool:
    """Kernels that a loop applies to its own state at every step: `h @ w` of an RNN."""
    return site.role == "recurrent"


def recurrent_input(site: Site) -> bool:
    """Kernels that bring an input into a recurrent cell: `x @ w` beside `h @ w` in one loop."""
    return site.role == "input"


def biases(*owners: str) -> str:
    """A pattern for the biases of all modules, or of those with these names: BitFit's targets.

    `{biases(): full()}` trains every bias, those of norms among them. The authors' smaller variant
    takes the query's and one of the feed-forward's: `biases("q_proj", "down_proj")` for the second
    kernel's. (Their own count of "MLP layers" begins with the attention's output kernel, by which
    the second one is `up_proj`.) Biases are no kernels, so they are known by the name `bias`.

    Source: Ben Zaken et al. 2021, arXiv:2106.10199.

    >>> bool(re.fullmatch(biases("q_proj"), "layers/attn/q_proj/bias"))
    True
    """
    return f"(.*/)?({'|'.join(owners)})/bias" if owners else "(.*/)?bias"
