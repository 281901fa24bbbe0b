"""LOHA, LOKR, MISS and FOURIERFT: updates of other forms, each module's own."""

import math
from collections.abc import Sequence
from typing import Any

from lora_jax.errors import InputError
from lora_jax.io.peft.kind import (
    LINEAR,
    Field,
    Kind,
    Methods,
    Part,
    Tensors,
    alike,
    turned,
    uniform,
)
from lora_jax.io.peft.match import Config
from lora_jax.io.peft.module import Module, Shape
from lora_jax.method import Method
from lora_jax.methods import fourierft, loha, lokr, miss
from lora_jax.methods.lokr import divided, is_low

_RANK = Field("r", "rank", 8, "rank_pattern", "count")
_ALPHA = Field("alpha", "alpha", 8.0, "alpha_pattern", "positive")
_LYCORIS = (
    _RANK,
    _ALPHA,
    Field("use_effective_conv2d", "effective_conv", False),
    Field("rank_dropout", "rank_dropout", 0.0, loose=True),
    Field("module_dropout", "module_dropout", 0.0, loose=True),
)


def _loha(module: Module, method: Method) -> Sequence[Part]:
    """PEFT's `w_a w_b` is the transpose of our `a b`: its first factor is our second."""
    (*window, d_in, d_out), rank = module.shapes["weight"], method.hyper["rank"]
    if method.hyper["effective_conv"] and math.prod(window) > 1:
        return [part for i in "12" for part in _cp("hada", i, window, d_in, d_out, rank)]
    rows = (math.prod(window) * d_in, rank)
    axes = (len(window) + 1, len(window), *range(len(window)))
    return [
        part
        for i in "12"
        for part in (
            turned(f"hada_w{i}_a", f"b{i}", (rank, d_out)),
            Part(f"hada_w{i}_b", f"a{i}", rows, (*window, d_in, rank), axes, rows[::-1]),
        )
    ]


def _cp(
    kind: str, i: str, window: Sequence[int], d_in: int, d_out: int, rank: int
) -> tuple[Part, ...]:
    """Two factors and their core, which has two axes for the window in PEFT."""
    core = (rank, rank, *window)
    return (
        alike(f"{kind}_w{i}_a", f"b{i}", (rank, d_out)),
        turned(f"{kind}_w{i}_b", f"a{i}", (d_in, rank)),
        alike(f"{kind}_t{i}", f"t{i}", core, (*core, 1) if len(window) == 1 else core),
    )


def _lokr(module: Module, method: Method) -> Sequence[Part]:
    *window, c_in, c_out = module.shapes["weight"]
    rank, factor = method.hyper["rank"], method.hyper["factor"]
    (c, d), (a, b) = divided(c_in, factor), divided(c_out, factor)
    low1, low2 = method.hyper["decompose_both"] and is_low(rank, c, a), is_low(rank, d, b)
    first = _side("1", c, a, rank if low1 else 0)
    if low2 and method.hyper["effective_conv"] and math.prod(window) > 1:
        return [*first, *_cp("lokr", "2", window, d, b, rank)]
    if low2:
        return [*first, *_side("2", d * math.prod(window), b, rank)]
    if len(window) == 1:
        raise InputError(
            f"lokr(rank={rank}) on {module.name!r}: PEFT's whole second factor of a convolution in "
            f"one dimension mixes channels and window up; give rank < {max(d, b) / 2:g}"
        )
    rows, theirs = (d * math.prod(window), b), (b, d, *window)
    return [*first, Part("lokr_w2", "w2", rows, rows, (1, 0), theirs)]


def _side(i: str, d_in: int, d_out: int, rank: int) -> list[Part]:
    """One side of the product: two factors, or whole where the rank is 0."""
    if rank == 0:
        return [turned(f"lokr_w{i}", f"w{i}", (d_in, d_out))]
    return [
        turned(f"lokr_w{i}_a", f"b{i}", (rank, d_out)),
        turned(f"lokr_w{i}_b", f"a{i}", (d_in, rank)),
    ]


def _miss_method(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method:
    form = config.get("init_weights", True)
    mini = config.get("mini_r", 1) if form == "mini" else None
    return miss(**hyper, mini_rank=mini, bat=form == "bat")


def _miss(module: Module, method: Method) -> Sequence[Part]:
    d_out, rank = module.shapes["weight"][1], method.hyper["rank"]
    if method.hyper["bat"]:  # each block acts on the kernel's inputs, so it lies as that does
        shape = (d_out // rank, rank, rank)
        return [Part("miss_block", "m", shape, shape, (0, 2, 1), shape)]
    return [alike("miss_block", "m", (rank, method.hyper["mini_rank"] or d_out))]


def _write_miss(methods: Methods, config: Config, tensors: Tensors) -> Config:
    forms = {name: (m.hyper["bat"], m.hyper["mini_rank"]) for name, m in methods.items()}
    bat, mini = uniform("MISS", "init_weights", forms)
    return {"init_weights": "bat" if bat else "mini" if mini else True, "mini_r": mini or 1}


def _fourierft_method(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method:
    return fourierft(**hyper, init="zeros" if config.get("init_weights") else "normal")


def _fourierft(module: Module, method: Method) -> Sequence[Part]:
    return [alike("fourierft_spectrum", "c", (method.hyper["n"],))]


def _write_fourierft(methods: Methods, config: Config, tensors: Tensors) -> Config:
    return {"init_weights": next(iter(methods.values())).hyper["init"] == "zeros"}


LOHA = Kind(
    peft_type="LOHA",
    factories={"loha": loha},
    fields=_LYCORIS,
    parts=_loha,
    lacks=("bias",),
    free=("init_weights",),
    kinds=(*LINEAR, "conv"),
)
LOKR = Kind(
    peft_type="LOKR",
    factories={"lokr": lokr},
    fields=(
        *_LYCORIS,
        Field("decompose_factor", "factor", -1),
        Field("decompose_both", "decompose_both", False),
        Field("rank_dropout_scale", "rank_dropout_scale", False, loose=True),
    ),
    parts=_lokr,
    lacks=("bias",),
    free=("init_weights",),
    kinds=(*LINEAR, "conv"),
)
MISS = Kind(
    peft_type="MISS",
    factories={"miss": miss},
    fields=(
        Field("r", "rank", 64, number="count"),
        Field("miss_dropout", "dropout", 0.0, loose=True),
    ),
    free=("mini_r",),
    limits={"init_weights": lambda value: value in (True, False, None, "bat", "mini")},
    make=_miss_method,
    parts=_miss,
    write=_write_miss,
)
FOURIERFT = Kind(
    peft_type="FOURIERFT",
    factories={"fourierft": fourierft},
    fields=(
        Field("n_frequency", "n", 1000, "n_frequency_pattern", "count"),
        Field("scaling", "alpha", 150.0, number="positive"),
        Field("random_loc_seed", "seed", 777),
    ),
    free=("init_weights",),
    make=_fourierft_method,
    parts=_fourierft,
    write=_write_fourierft,
    # the seed says where the coefficients stand
    meaning=lambda method: {n: v for n, v in method.hyper.items() if n != "init"},
)
