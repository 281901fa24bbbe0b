"""VERA, RANDLORA and VBLORA: methods with arrays that all modules share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.errors import InputError
from lora_jax.io.peft.kind import (
    Field,
    Kind,
    Methods,
    Modules,
    Part,
    Tensors,
    alike,
    turned,
    uniform,
)
from lora_jax.io.peft.match import Config
from lora_jax.io.peft.module import Module, Shape
from lora_jax.io.peft.projections import randlora_bases, vera_projections
from lora_jax.method import Method
from lora_jax.methods import randlora, vblora, vera

_ROOT = "base_model."


def _widest(modules: Modules, methods: Methods) -> tuple[int, int]:
    """The largest sides, in and out, among the adapted kernels."""
    shapes = [modules[name].shapes["weight"] for name in methods]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def _placed(parts: Sequence[Part], arrays: Tensors) -> Tensors:
    """Our arrays as tensors of the file."""
    return {part.end: part.to_theirs(arrays[part.name]) for part in parts}


def _rank(methods: Methods) -> int:
    return next(iter(methods.values())).hyper["rank"]


# --- VERA -----------------------------------------------------------------------------------------


def _vera(module: Module, method: Method) -> Sequence[Part]:
    d_out, rank = module.shapes["weight"][1], method.hyper["rank"]
    return [alike("vera_lambda_b", "b", (d_out,)), alike("vera_lambda_d", "d", (rank,))]


def _vera_shared(modules: Modules, methods: Methods) -> Sequence[Part]:
    (d_in, d_out), rank = _widest(modules, methods), _rank(methods)
    return [
        turned(_ROOT + "vera_A", "shared_a", (d_in, rank)),
        turned(_ROOT + "vera_B", "shared_b", (rank, d_out)),
    ]


def _vera_read(config: Config, tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    """With the projections that a seed stands for, as torch draws them."""
    if config.get("save_projection", True):
        return tensors
    seed, sides = config.get("projection_prng_key") or 0, _widest(modules, methods)
    drawn = vera_projections(seed, _rank(methods), *sides)
    return {**_placed(_vera_shared(modules, methods), drawn), **tensors}


def _write_vera(methods: Methods, config: Config, tensors: Tensors) -> Config:
    return {"save_projection": True, "projection_prng_key": 0}


VERA = Kind(
    peft_type="VERA",
    factories={"vera": vera},
    fields=(
        Field("r", "rank", 256, number="count"),
        Field("d_initial", "d_initial", 0.1, loose=True),
        Field("vera_dropout", "dropout", 0.0, loose=True),
    ),
    parts=_vera,
    shared=_vera_shared,
    free=("projection_prng_key", "save_projection", "init_weights"),
    read=_vera_read,
    write=_write_vera,
    holds=lambda method: method.hyper["projection"] == "stored",
)


# --- RANDLORA -------------------------------------------------------------------------------------


def _randlora_method(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method:
    sparse, very = bool(config.get("sparse")), bool(config.get("very_sparse"))
    return randlora(**hyper, bases="very_sparse" if very else "sparse" if sparse else "uniform")


def _randlora(module: Module, method: Method) -> Sequence[Part]:
    short, rank = min(module.shapes["weight"]), method.hyper["rank"]
    n = -(-short // rank)
    return [
        alike("randlora_lambda", "lambda", (rank, n)),
        alike("randlora_gamma", "gamma", (n, short)),
    ]


def _randlora_shared(modules: Modules, methods: Methods) -> Sequence[Part]:
    (short, long), rank = sorted(_widest(modules, methods)), _rank(methods)
    return [
        alike(_ROOT + "randlora_A", "bases_a", (rank, short), (rank, 1, short)),
        alike(_ROOT + "randlora_B", "bases_b", (long, -(-short // rank), rank)),
    ]


def _repeats(modules: Modules, methods: Methods) -> dict[str, str]:
    """The keys under which PEFT's file repeats the shared bases in each module."""
    ends = ("randlora_A", "randlora_B")
    return {f"{modules[name].stem}.{end}": _ROOT + end for name in methods for end in ends}


def _randlora_drawn(config: Config, modules: Modules, methods: Methods) -> Tensors:
    if config.get("sparse") or config.get("very_sparse"):
        raise InputError(
            "save_projection=False is not supported for sparse RANDLORA: its bases are drawn from "
            "a seed by torch. Load it with peft and save it with save_projection=True"
        )
    seed, sides = config.get("projection_prng_key") or 0, _widest(modules, methods)
    drawn = randlora_bases(seed, _rank(methods), *sides)
    return _placed(_randlora_shared(modules, methods), drawn)


def _randlora_read(config: Config, tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    if not config.get("save_projection", True):
        tensors = {**_randlora_drawn(config, modules, methods), **tensors}
    repeats = _repeats(modules, methods)
    for key, whole in repeats.items():
        if key in tensors and whole in tensors and not np.array_equal(tensors[key], tensors[whole]):
            raise InputError(f"{key} differs from {whole}, but all modules share one; train again")
    return {key: value for key, value in tensors.items() if key not in repeats}


def _randlora_held(tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    repeats = _repeats(modules, methods)
    return {**tensors, **{key: tensors[whole] for key, whole in repeats.items()}}


def _write_randlora(methods: Methods, config: Config, tensors: Tensors) -> Config:
    bases = uniform("RANDLORA", "sparse", {n: m.hyper["bases"] for n, m in methods.items()})
    return {
        "save_projection": True,
        "projection_prng_key": 0,
        "sparse": bases == "sparse",
        "very_sparse": bases == "very_sparse",
    }


RANDLORA = Kind(
    peft_type="RANDLORA",
    factories={"randlora": randlora},
    fields=(
        Field("r", "rank", 32, number="count"),
        Field("randlora_alpha", "alpha", 640.0, number="positive"),
        Field("randlora_dropout", "dropout", 0.0, loose=True),
    ),
    parts=_randlora,
    shared=_randlora_shared,
    free=("projection_prng_key", "save_projection", "init_weights", "sparse", "very_sparse"),
    make=_randlora_method,
    read=_randlora_read,
    held=_randlora_held,
    write=_write_randlora,
    holds=lambda method: method.hyper["variant"] == "peft",
)


# --- VBLORA ---------------------------------------------------------------------------------------

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def _vblora(module: Module, method: Method) -> Sequence[Part]:
    (d_in, d_out), hyper = module.shapes["weight"], method.hyper
    rank, length, vectors = hyper["rank"], hyper["length"], hyper["vectors"]
    return [
        alike("vblora_logits_A", "logits_a", (rank, d_in // length, vectors)),
        alike("vblora_logits_B", "logits_b", (d_out // length, rank, vectors)),
    ]


def _vblora_shared(modules: Modules, methods: Methods) -> Sequence[Part]:
    hyper = next(iter(methods.values())).hyper
    return [alike(_ROOT + "vblora_vector_bank", "bank", (hyper["vectors"], hyper["length"]))]


def _vblora_read(config: Config, tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    """With whole logits where the file has the chosen rows and their weights: the rest at -inf."""
    if not config.get("save_only_topk_weights"):
        return tensors
    vectors = config.get("num_vectors", 256)
    found = {}
    for key, value in tensors.items():
        if key.endswith(_INDICES):
            stem = key.removesuffix(_INDICES)
            found[stem] = _whole_logits(value, tensors[stem + _WEIGHTS], vectors)
        elif not key.endswith(_WEIGHTS):
            found[key] = value
    return found


def _whole_logits(indices: np.ndarray, weights: np.ndarray, vectors: int) -> np.ndarray:
    last = 1 - weights.sum(axis=-1, keepdims=True, dtype=np.float32)
    logits = np.full((*indices.shape[:-1], vectors), -np.inf, np.float32)
    chosen = np.log(np.concatenate([weights, last], axis=-1, dtype=np.float32))
    np.put_along_axis(logits, indices.astype(np.int64), chosen, axis=-1)
    return logits


def _vblora_held(tensors: Tensors, modules: Modules, methods: Methods) -> Tensors:
    """Logits of which only some are left, as the chosen rows and their weights."""
    if not _is_thinned(tensors):
        return tensors
    top_k = next(iter(methods.values())).hyper["top_k"]
    found = {}
    for key, value in tensors.items():
        if "vblora_logits" not in key:
            found[key] = value
            continue
        rows = np.argsort(-value, axis=-1, kind="stable")[..., :top_k]
        chosen = np.take_along_axis(value, rows, axis=-1)
        weights = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        found[key + _INDICES] = rows.astype(_index_type(value.shape[-1]))
        found[key + _WEIGHTS] = np.ascontiguousarray(weights[..., :-1])
    return found


def _write_vblora(methods: Methods, config: Config, tensors: Tensors) -> Config:
    return {"save_only_topk_weights": any(key.endswith(_INDICES) for key in tensors)}


def _is_thinned(tensors: Tensors) -> bool:
    return any(np.isneginf(v).any() for key, v in tensors.items() if "vblora_logits" in key)


def _index_type(vectors: int) -> Any:
    return next(
        t for t in (np.uint8, np.int16, np.int32, np.int64) if vectors < np.iinfo(t).max + 1
    )


VBLORA = Kind(
    peft_type="VBLORA",
    factories={"vblora": vblora},
    fields=(
        Field("r", "rank", 4, number="count"),
        Field("num_vectors", "vectors", 256, number="count"),
        Field("vector_length", "length", 256, number="count"),
        Field("topk", "top_k", 2, number="count"),
        Field("init_vector_bank_bound", "bank_bound", 0.02, loose=True),
        Field("init_logits_std", "logits_std", 0.1, loose=True),
        Field("vblora_dropout", "dropout", 0.0, loose=True),
    ),
    parts=_vblora,
    shared=_vblora_shared,
    free=("save_only_topk_weights",),
    read=_vblora_read,
    held=_vblora_held,
    write=_write_vblora,
)
