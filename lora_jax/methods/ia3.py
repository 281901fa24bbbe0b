"""(IA)^3: one learned factor for each feature that leaves, or enters, a kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.errors import InputError
from lora_jax.method import Arrays, Method
from lora_jax.tree import Rule


def ia3(*, feedforward: bool = False) -> Method:
    """Infused adapter: `y = (x w) l` with `l: [d_out]`, or `y = (x l) w` with `l: [d_in]`.

    The second form is that of `feedforward` targets, the kernel after an activation; the first is
    for keys and values. `l` starts at one: a fresh adapter changes nothing. Trains `d_out` (or
    `d_in`) numbers. A bias after the kernel is another parameter and stays unscaled here; the
    paper and PEFT scale the output with it, `(x w + c) l`, which `ia3_rules` gives. On a
    convolution `feedforward` has a factor for every entry of the kernel's window.

    Source: Liu et al. 2022, arXiv:2205.05638.

    >>> ia3(), ia3(feedforward=True)
    (ia3(), ia3(feedforward=True))
    """

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        return {"w": w}, {"l": jnp.ones(w.shape[0 if feedforward else 1], dtype)}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        w, l = frozen["w"], trained["l"]
        return w * (l[:, None] if feedforward else l[None, :])

    def apply(frozen: Arrays, trained: Arrays, x: Any) -> jax.Array:
        y = x @ frozen["w"]
        return x.rows(trained["l"].astype(y.dtype)) * y

    return Method(
        "ia3",
        init,
        weight,
        None if feedforward else apply,  # x is no array to be scaled: its factors go to the rows
        hyper={"feedforward": feedforward},
        splits=("in", "out"),
        factory=ia3,
    )


def ia3_bias(of: str) -> Method:
    """The bias of a kernel under `ia3`, scaled by that kernel's own `l`: `c' = c l`.

    `of` is the kernel's path; its `l` (of all layers, for a stack) is shared, so nothing more is
    trained. `ia3_rules` writes these rules.

    Raises InputError (in `attach`) where the kernel has no one method for all its layers, and for a
    bias that has not a number for each of its factors.

    >>> ia3_bias("attn/k_proj/kernel")
    ia3_bias(of='attn/k_proj/kernel')
    """

    def init(key: jax.Array, w: jax.Array) -> tuple[Arrays, Arrays]:
        return {"w": w}, {}

    def weight(frozen: Arrays, trained: Arrays) -> jax.Array:
        w, l = frozen["w"], trained["l"]
        return (w.astype(l.dtype) * l.reshape(w.shape)).astype(w.dtype)

    return Method(
        "ia3_bias",
        init,
        weight,
        hyper={"of": of},
        anywhere=True,
        follows=of,
        factory=ia3_bias,
    )


def ia3_rules(
    sites: Mapping[str, Any], params: Any, targets: Rule, *, feedforward: Rule | None = None
) -> dict[Rule, Method | None]:
    """Rules for `attach` that scale the outputs of kernels with their biases, as the paper does.

    `targets` is a pattern or a predicate on kernels, `feedforward` another one that says which of
    them are scaled on their input side. A bias is the parameter `bias` (or `b`) beside the kernel,
    not used as a kernel itself, with a number for each output; one under another name is not
    found: give it `ia3_bias(of=...)`. In a block this trains `d_k + d_v + d_ff` numbers.

    Raises InputError for rules that match no kernel, and for `feedforward` kernels that are no
    targets.

    >>> from lora_jax import find_sites
    >>> params = {"k": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    >>> dense = lambda p, x: x @ p["k"]["kernel"] + p["k"]["bias"][None, :]
    >>> sites = find_sites(dense, params, jnp.ones((2, 3)))
    >>> ia3_rules(sites, params, "k/kernel")
    {'k/kernel': ia3(), 'k/bias': ia3_bias(of='k/kernel')}
    """
    chosen = set(tree.first_match({targets: True}, sites))
    turned = set() if feedforward is None else set(tree.first_match({feedforward: True}, sites))
    if stray := sorted(turned - chosen):
        raise InputError(
            f"ia3_rules(feedforward={feedforward!r}) matches '{stray[0]}', which targets="
            f"{targets!r} does not; feedforward kernels are some of the targets: widen targets"
        )
    leaves = tree.flatten(params)
    rules: dict[Rule, Method | None] = {}
    for path in (path for path in sites if path in chosen):
        rules[re.escape(path)] = ia3(feedforward=path in turned)
        bias = None if path in turned else _bias_of(path, sites, leaves)
        if bias is not None:
            rules[re.escape(bias)] = ia3_bias(path)
    return rules


def _bias_of(path: str, sites: Mapping[str, Any], leaves: Mapping[str, Any]) -> str | None:
    """The path of the bias that stands beside a kernel, if there is one."""
    site, stem = sites[path], path.rpartition("/")[0]
    outputs = math.prod(site.stack) * site.d_out
    for name in ("bias", "b"):
        beside = f"{stem}/{name}" if stem else name
        leaf = leaves.get(beside)
        if leaf is not None and beside not in sites and math.prod(leaf.shape) == outputs:
            return beside
    return None
