"""Weighted sums of adapters on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapter import Adapted, Trained
from lora_jax.compose.recipes import check, recipe_of
from lora_jax.compose.spectrum import nearest, shortened
from lora_jax.compose.tasks import Tasks, combine, fold
from lora_jax.compose.tensors import Recipe
from lora_jax.compose.update import (
    Factors,
    Pair,
    bases,
    change,
    factors,
    kernels,
    known,
    plain_lora,
    tree_with,
    whole_node,
    wholes,
)
from lora_jax.errors import InputError


def weighted_sum(
    adapters: Sequence[Pair],
    weights: Sequence[float],
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    scope: str = "tensor",
    clamp: float | None = None,
    key: jax.Array | None = None,
    params: Any = None,
) -> tuple[Any, Trained]:
    """`sum_i w_i (s_i a_i b_i)` of adapters `(frozen, trained)`, as a plain LoRA of scale one.

    With `c_i = w_i s_i` for each kernel, and an adapter that leaves a kernel alone left out there:

    * `"cat"`: `a = [c_i a_i]`, `b = [b_i]`, exact, of rank `sum r_i`;
    * `"svd"`: the best product of `rank` (by default the largest of theirs), `b` holds the
      singular values; `clamp` cuts both factors at that quantile of their entries;
    * `"linear"`: `a = sum sign(c_i) sqrt|c_i| a_i`, `b = sum sqrt|c_i| b_i`, of equal ranks: the
      products of one adapter's `a` with another's `b` come along;
    * `"magnitude_prune"`, `"dare_linear"`, `"ties"`, `"dare_ties"`: the same with every factor
      pruned to `density` first, by size or (`dare`, drawn from `key`) at random and rescaled; ties
      adds only entries of the sign that `sign`, "total" or "frequency", elects;
    * these with `_svd`: on the updates `s_i a_i b_i` with weights `w_i`, then as `"svd"`.

    PEFT prunes and elects tensor by tensor; `scope="global"` takes all tensors as one vector, as
    the papers do, with the majority's sign where the votes cancel. Weights may be negative. One
    adapter alone is always `"linear"`, which is exact then. A method without factors (DoRA) has
    forms with svd only; a parameter that is trained in its own shape stays so, its difference from
    the base combined in the same way. `params` is needed where no adapter's frozen tree holds the
    base of such a parameter. A `density` of one or more prunes nothing, and warns.

    Raises InputError for an unknown method, sign or scope, unequal lengths, unequal ranks where
    they must be equal, a missing or negative density, and a missing key.

    Sources: Ilharco et al. 2023, arXiv:2212.04089; Yadav et al. 2023, arXiv:2306.01708 (TIES); Yu
    et al. 2023, arXiv:2311.03099 (DARE); the forms are those of PEFT's `add_weighted_adapter`.

    >>> import lora_jax as lj
    >>> model, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
    >>> sites = lj.find_sites(model, params, x)
    >>> rules = {"w": lj.lora(rank=2)}
    >>> pairs = [lj.attach(jax.random.key(i), params, rules, sites) for i in (0, 1)]
    >>> frozen, trained = weighted_sum(pairs, [0.7, -0.4])
    >>> frozen["w"].method, frozen["w"].frozen["w"] is params["w"]
    (lora(rank=4, alpha=4.0), True)
    """
    recipe = recipe_of(method, density, sign, scope, key)
    check(adapters, weights, rank)
    if len(adapters) == 1:
        method, recipe = "linear", Recipe()
    given = bases([frozen for frozen, _ in adapters], params)
    nodes = [kernels(*adapter) for adapter in adapters]
    present = {path: _present(path, nodes) for path in dict.fromkeys(p for n in nodes for p in n)}
    mix = _Mix(weights, recipe, scope, key)
    if method == "cat":
        pairs = {path: _joined(path, who, weights) for path, who in present.items()}
    elif method.endswith("svd"):
        ranks = {path: _rank(who, rank) for path, who in present.items()}
        pairs = _by_spectrum(method, present, mix, ranks, clamp, given)
    else:
        pairs = _by_factor(present, mix)
    likes = {path: next(iter(who.values())) for path, who in present.items()}
    made = {path: plain_lora(likes[path], given.get(path), *pair) for path, pair in pairs.items()}
    return tree_with(adapters[0][0], made | _whole(adapters, mix, given))


class _Mix(NamedTuple):
    """How tensors are combined."""

    weights: Sequence[float]
    recipe: Recipe
    scope: str
    key: jax.Array | None

    def of(self, tasks: Mapping[str, Tasks], name: str) -> dict[str, jax.Array]:
        """The combination of every tensor, with draws of its own."""
        return combine(tasks, self.recipe, self.scope, fold(self.key, name))


def _by_spectrum(
    method: str,
    present: Mapping[str, Mapping[int, Adapted]],
    mix: _Mix,
    ranks: Mapping[str, int],
    clamp: float | None,
    given: Mapping[str, jax.Array],
) -> dict[str, Any]:
    """The best factors of combined updates; those of a plain sum of products are not formed."""
    nodes = [node for who in present.values() for node in who.values()]
    if method == "svd" and all(node.method.factors for node in nodes):
        joined = {path: _joined(path, who, mix.weights) for path, who in present.items()}
        return {p: shortened(a, b, ranks[p], clamp) for p, (a, b) in joined.items()}
    tasks = {path: _updates(who, mix.weights, given.get(path)) for path, who in present.items()}
    return {path: nearest(x, ranks[path], clamp) for path, x in mix.of(tasks, "update").items()}


def _by_factor(present: Mapping[str, Mapping[int, Adapted]], mix: _Mix) -> dict[str, Any]:
    """Both factors combined apart."""
    tasks = {path: _factor_tasks(path, who, mix.weights) for path, who in present.items()}
    a = mix.of({path: pair[0] for path, pair in tasks.items()}, "a")
    b = mix.of({path: pair[1] for path, pair in tasks.items()}, "b")
    return {path: (a[path], b[path]) for path in tasks}


def _present(path: str, nodes: Sequence[Mapping[str, Adapted]]) -> dict[int, Adapted]:
    """The adapters that have a kernel, by their place in the list."""
    return {i: own[path] for i, own in enumerate(nodes) if path in own}


def _product(path: str, node: Adapted) -> Factors:
    product = factors(node)
    if product is None:
        raise InputError(
            f"'{path}' is adapted by {node.method!r}, whose update is no product; use method='svd' "
            "(or another with _svd), or as_lora first"
        )
    return product


def _joined(path: str, who: Mapping[int, Adapted], weights: Sequence[float]) -> Any:
    """`[c_i a_i]` and `[b_i]` side by side."""
    products = {i: _product(path, node) for i, node in who.items()}
    a = [weights[i] * f.scale[..., None, None] * f.a for i, f in products.items()]
    b = [f.b for f in products.values()]
    return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2)


def _factor_tasks(
    path: str, who: Mapping[int, Adapted], weights: Sequence[float]
) -> tuple[Tasks, Tasks]:
    """Both factors of the adapters, weighted by the root of `|c_i|`, the sign with `a`."""
    products = [_product(path, node) for node in who.values()]
    ranks = [f.rank for f in products]
    if len(set(ranks)) > 1:
        raise InputError(
            f"the adapters of '{path}' have ranks {ranks}, and this method adds factors of equal "
            "rank; use method='cat' or 'svd'"
        )
    c = jnp.stack([weights[i] * f.scale for i, f in zip(who, products, strict=True)])
    root, owners = jnp.sqrt(jnp.abs(c)), tuple(who)
    a, b = (jnp.stack([getattr(f, name) for f in products]) for name in ("a", "b"))
    return Tasks(a, jnp.where(c < 0, -root, root), owners), Tasks(b, root, owners)


def _updates(who: Mapping[int, Adapted], weights: Sequence[float], base: Any) -> Tasks:
    tensors = jnp.stack([change(node, base) for node in who.values()])
    own = jnp.asarray([weights[i] for i in who], tensors.dtype)
    stack = tensors.shape[1:-2]
    spread = jnp.broadcast_to(own.reshape(-1, *(1 for _ in stack)), (len(own), *stack))
    return Tasks(tensors, spread, tuple(who))


def _rank(who: Mapping[int, Adapted], rank: int | None) -> int:
    """The rank asked for, or the largest that an adapter has there."""
    node = next(iter(who.values()))
    site = node.site
    assert site is not None
    width = rank or 0
    if rank is None:
        products = {i: factors(node) for i, node in who.items()}
        own = [f.rank if f else who[i].method.hyper.get("rank", 0) for i, f in products.items()]
        if 0 in own:
            raise InputError(
                f"weighted_sum: '{node.path}' is adapted by a method without a rank; give rank="
            )
        width = max(own)
    return min(width, site.d_in, site.d_out)


def _whole(
    adapters: Sequence[Pair], mix: _Mix, given: Mapping[str, jax.Array]
) -> dict[str, tuple[Adapted, Any]]:
    """Parameters that are trained in their own shape: the base plus their differences from it."""
    values = [wholes(*adapter) for adapter in adapters]
    likes, tasks = {}, {}
    for path in dict.fromkeys(path for own in values for path in own):
        base = known(path, given.get(path))
        wide = jnp.promote_types(base.dtype, jnp.float32)
        who = {i: own[path] for i, own in enumerate(values) if path in own}
        moves = jnp.stack([now.astype(wide) - base.astype(wide) for _, now in who.values()])
        own = jnp.asarray([mix.weights[i] for i in who], wide)
        tasks[path] = Tasks(moves, own, tuple(who))
        likes[path] = next(iter(who.values()))[0]
    sums = mix.of(tasks, "whole")
    values = {path: (given[path] + x).astype(given[path].dtype) for path, x in sums.items()}
    return {path: whole_node(likes[path], value) for path, value in values.items()}
