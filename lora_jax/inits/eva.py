"""EVA: the directions in which a kernel's inputs vary most, and ranks where they vary most."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.inits.start import Factors, Start, check_datum, wide, zeros
from lora_jax.method import Method

Rules = dict[str, Method | list[Method | None] | None]


def eva(scatters: Mapping[str, jax.Array] | None = None, whiten: bool = False) -> Start:
    """`a` = the first `rank` principal components of the kernel's inputs, `b = 0`.

    `scatters` are `sum (x - mean) (x - mean)^T` by path, `[*stack, d_in, d_in]`, from
    `calibrate.input_scatters`; so `a^T a = 1`, and a fresh adapter changes nothing. `whiten`
    divides each component by the square root of its singular value. This start leaves the rank
    as it is; `eva_rules` moves ranks between sites.

    Raises InputError for a rank above `d_in`.

    Source: Paischer et al. 2024, arXiv:2410.07170, with PEFT's centring; the components are those
    of all inputs together, which its incremental ones approach.
    """

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float, scatter: jax.Array) -> Factors:
        check_datum("eva", scatter, (w.shape[0],) * 2, "the scatter matrix of the inputs")
        a, b = zeros(w, rank)
        if rank > w.shape[0]:
            raise InputError(
                f"init='eva' with rank={rank} on a kernel of shape {list(w.shape)}: its inputs "
                f"have {w.shape[0]} components; give a lower rank there"
            )
        values, vectors = jnp.linalg.eigh(wide(scatter).astype(a.dtype))
        components = vectors[:, ::-1][:, :rank]
        if whiten:  # a singular value is the root of the scatter's eigenvalue
            components = components / jnp.sqrt(jnp.sqrt(values[::-1][:rank]))
        return components, b

    return Start("eva", draw, wants="input_scatters", data=dict(scatters or {}))


def eva_rules(
    scatters: Mapping[str, jax.Array],
    method: Method | Mapping[str, Method],
    *,
    rho: float = 2.0,
    whiten: bool = False,
) -> Rules:
    """Rules for `attach` that give ranks to the sites and layers whose inputs explain most.

    `method` is what every site (or each, by path) would have, such as `lora(rank=8)`. The explained
    variance ratios of the first `round(rho rank)` components of every matrix are pooled and the
    largest taken, as many as all ranks together; a matrix gets as many ranks as it has components
    among them and `alpha_l = alpha rank_l / rank`, which keeps the scale (without rsLoRA). Layers
    without any have None. Ties go to the earlier path and layer; `rho = 1` moves nothing.

    >>> from lora_jax import lora
    >>> few, many = jnp.diag(jnp.array([9.0, 0.1, 0.1])), jnp.diag(jnp.array([3.0, 3.0, 3.0]))
    >>> rules = eva_rules({"q": jnp.stack([few, many])}, lora(rank=2, alpha=4))
    >>> rules["q"]
    [lora(rank=1, alpha=2.0, init='eva'), lora(rank=3, alpha=6.0, init='eva')]
    """
    if not rho >= 1:
        raise InputError(f"eva_rules(rho={rho!r}): no site may lose its own rank; give rho >= 1")
    owners = {path: method if isinstance(method, Method) else method[path] for path in scatters}
    _check_owners(owners)
    start = eva(scatters, whiten)
    given = _ranks(scatters, {path: own.hyper["rank"] for path, own in owners.items()}, rho)
    return {
        re.escape(path): _choice(owners[path], start, given[path], np.ndim(scatters[path]) > 2)
        for path in scatters
    }


def _ranks(
    scatters: Mapping[str, jax.Array], ranks: Mapping[str, int], rho: float
) -> dict[str, list[int]]:
    """The rank of every matrix: its picks among the largest explained variance ratios of all."""
    ratios = {path: _ratios(scatters[path], round(ranks[path] * rho)) for path in scatters}
    owner = [(p, i) for p, rows in ratios.items() for i, row in enumerate(rows) for _ in row]
    pool = np.concatenate([rows.ravel() for rows in ratios.values()])
    budget = sum(ranks[path] * len(rows) for path, rows in ratios.items())
    if budget > len(pool):
        raise InputError(
            f"eva_rules: the ranks add up to {budget}, but the inputs have {len(pool)} components "
            "in all; give a lower rank"
        )
    given = {path: [0] * len(rows) for path, rows in ratios.items()}
    for pick in np.argsort(-pool, kind="stable")[:budget]:
        path, matrix = owner[pick]
        given[path][matrix] += 1
    return given


def _ratios(scatter: jax.Array, count: int) -> np.ndarray:
    """The explained variance ratios of the first components, `[matrices, count]`."""
    size = scatter.shape[-1]
    values = jnp.linalg.eigvalsh(wide(scatter).reshape(-1, size, size))[:, ::-1]
    values = jnp.maximum(values, 0)
    total = jnp.sum(values, axis=-1, keepdims=True)
    return np.asarray((values / jnp.where(total > 0, total, 1))[:, :count])


def _choice(
    method: Method, start: Start, ranks: list[int], stacked: bool
) -> Method | list[Method | None] | None:
    """One method a layer, with its own rank and the scale kept."""
    assert method.factory is not None
    hyper, whole = dict(method.hyper), method.hyper["rank"]

    def made(rank: int) -> Method | None:
        alpha = hyper["alpha"] * rank / whole
        own = {**hyper, "rank": rank, "alpha": alpha, "init": start}
        return method.factory(**own) if rank and method.factory else None

    if not any(ranks):
        return None
    return [made(rank) for rank in ranks] if stacked else made(ranks[0])


def _check_owners(owners: Mapping[str, Method]) -> None:
    for path, method in owners.items():
        if method.factory is None or not {"rank", "alpha", "init"} <= set(method.hyper):
            raise InputError(
                f"eva_rules: {method!r} for '{path}' has no rank, alpha and init; give a method "
                "such as lora(rank=8)"
            )
        if method.at is not None:
            raise InputError(
                f"eva_rules: {method!r} for '{path}' has a rank that depends on the site; give "
                "each path its own method, method.at(site)"
            )
