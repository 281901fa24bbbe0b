"""What each trained array is to its method: the side of the kernel that it stands on."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import jax

from lora_jax.adapter import Adapted, Trained, adapted, start_of
from lora_jax.method import Method
from lora_jax.sites import Site

ROLES = ("a", "b", "b_no_decay", "embedding")


def roles(frozen: Any, trained: Trained, kernels: Container[str] | None = None) -> Any:
    """The role of every trained array, as a tree of strings like `trained`.

    * `"embedding"`: a matrix of a method on a table that is looked up (both factors of a LoRA);
    * `"b"`: a matrix along the output side, as LoRA's `b` is, and any vector of a method (DoRA's
      magnitude);
    * `"b_no_decay"`: a vector that is trained itself: a bias, a norm's scale;
    * `"a"`: every other matrix: along the input side, or a whole parameter.

    A role follows from the axes that the method's own `init` gives the array, not from its name.
    What methods of one pool share is a `"b"` if it is a vector, else an `"a"`. A parameter that is
    trained itself has its own shape, in which a bias of scanned layers `[L, d]` looks like a
    matrix; `kernels` (the Sites, or any container of paths) tells them apart: what is none of them
    is `"b_no_decay"`.

    The groups are those of Hayou et al. 2024, arXiv:2402.12354, as PEFT draws them.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"w": jnp.ones((3, 5)), "bias": jnp.ones(5)}
    >>> sites = lj.find_sites(lambda p, x: x @ p["w"] + p["bias"][None], params, jnp.ones((2, 3)))
    >>> rules = {"w": lj.dora(rank=2), "bias": lj.full()}
    >>> roles(*lj.attach(jax.random.key(0), params, rules, sites))
    {'bias': {'w': 'b_no_decay'}, 'w': {'a': 'a', 'b': 'b', 'magnitude': 'b'}}
    """
    nodes = adapted(frozen)
    return {
        path: _of_node(nodes[path], arrays, kernels) if path in nodes else _of_pool(arrays)
        for path, arrays in sorted(trained.items())
    }


def _of_node(node: Adapted, arrays: dict[str, Any], kernels: Container[str] | None) -> Any:
    """The roles of one parameter's arrays; where layers differ, those of each layer."""
    if node.site is None:
        known = kernels is None or node.path in kernels
        return jax.tree.map(lambda x: "a" if known and x.ndim > 1 else "b_no_decay", arrays)
    if isinstance(node.methods, Method):
        return _on_site(node.methods, node.site, arrays, len(node.site.stack))
    layers = enumerate(node.methods)
    chosen = {str(i): method for i, method in layers if method is not None and str(i) in arrays}
    return {i: _on_site(method, node.site, arrays[i], 0) for i, method in chosen.items()}


def _on_site(method: Method, site: Site, arrays: dict[str, Any], stack: int) -> dict[str, str]:
    matrices = [name for name, array in arrays.items() if array.ndim - stack > 1]
    if site.lookup:
        return {name: "embedding" if name in matrices else "b" for name in arrays}
    grows = _grows_with_outputs(method, site) if matrices else {}
    return {name: "a" if name in matrices and not grows[name] else "b" for name in arrays}


def _grows_with_outputs(method: Method, site: Site) -> dict[str, bool]:
    """Whether a trained array has an axis along the output side and none along the input side.

    Found by asking `init` for a matrix of twice as many outputs, and of twice as many inputs.
    """

    def trained(d_in: int, d_out: int) -> dict[str, Any]:
        w = jax.ShapeDtypeStruct((d_in, d_out), site.dtype)
        return jax.eval_shape(start_of(method, site), jax.random.key(0), w)[1]

    own = trained(site.d_in, site.d_out)
    tall, broad = trained(2 * site.d_in, site.d_out), trained(site.d_in, 2 * site.d_out)
    same = lambda x, y: x.shape == y.shape  # noqa: E731
    return {n: same(x, tall[n]) and not same(x, broad[n]) for n, x in own.items()}


def _of_pool(arrays: dict[str, Any]) -> dict[str, str]:
    return jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", arrays)
