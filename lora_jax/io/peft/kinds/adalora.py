"""ADALORA: adalora, whole or pruned."""

from collections.abc import Sequence
from typing import Any

from lora_jax.io.peft.kind import Field, Kind, Methods, Part, Tensors, alike, turned, uniform
from lora_jax.io.peft.match import Config
from lora_jax.io.peft.module import Module, Shape
from lora_jax.method import Method
from lora_jax.methods import adalora


def _make(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method | None:
    """With a rank pattern a module keeps the triplets that it marks; none is no adapter."""
    kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
    rank = hyper["rank"] if kept is None else sum(map(bool, kept))
    if rank == 0:
        return None
    first = hyper["rank"] if rank < hyper["rank"] else 0
    return adalora(rank, hyper["alpha"], dropout=hyper["dropout"], initial_rank=first)


def _parts(module: Module, method: Method) -> Sequence[Part]:
    (d_in, d_out), rank = module.shapes["weight"], method.hyper["rank"]
    return [
        turned("lora_A", "a", (d_in, rank)),
        turned("lora_B", "b", (rank, d_out)),
        alike("lora_E", "e", (rank,), (rank, 1)),
    ]


def _first(method: Method) -> int:
    return method.hyper["initial_rank"] or method.hyper["rank"]


def _write(methods: Methods, config: Config, tensors: Tensors) -> Config:
    first = uniform("ADALORA", "init_r", {name: _first(m) for name, m in methods.items()})
    ranks = {name: method.hyper["rank"] for name, method in methods.items()}
    pattern = {
        f"{name}.lora_E": [True] * rank + [False] * (first - rank)
        for name, rank in sorted(ranks.items())
        if rank < first
    }
    # The schedule has no meaning for a finished adapter, but peft wants a possible one.
    schedule = {"tinit": 0, "tfinal": 0, "total_step": 1, "target_r": max(ranks.values())}
    return {"init_r": first, "rank_pattern": pattern or None, **schedule}


def _meaning(method: Method) -> dict[str, Any]:
    return {"rank": method.hyper["rank"], "alpha": method.hyper["alpha"], "first": _first(method)}


ADALORA = Kind(
    peft_type="ADALORA",
    factories={"adalora": adalora},
    fields=(
        Field("init_r", "rank", 12, number="count"),
        Field("lora_alpha", "alpha", 8.0),
        Field("lora_dropout", "dropout", 0.0, loose=True),
    ),
    free=(
        *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
        *("total_step", "rank_pattern", "qalora_group_size", "runtime_config"),
    ),
    limits={"init_lora_weights": lambda value: value in (True, False, None)},
    make=_make,
    parts=_parts,
    write=_write,
    meaning=_meaning,
)
