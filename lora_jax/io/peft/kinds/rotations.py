"""OFT, BOFT and HRA: kernels turned on their input side."""

from collections.abc import Sequence
from typing import Any

from lora_jax.errors import InputError
from lora_jax.io.peft.kind import Field, Kind, Methods, Part, Tensors, alike, uniform
from lora_jax.io.peft.match import Config
from lora_jax.io.peft.module import Module, Shape
from lora_jax.method import Method
from lora_jax.methods import boft, hra, oft


def _oft_method(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method:
    """PEFT takes the block's size, or their number r; either falls back on the nearest divisor."""
    d_in = shape[0] if shape else 0
    count, wanted = config.get("r") or 0, config.get("oft_block_size", 32)
    size = _divisor(d_in, wanted) if wanted else d_in // _divisor(d_in, count)
    cayley = "neumann" if config.get("use_cayley_neumann", True) else "exact"
    return oft(block_size=size, cayley=cayley, **hyper)


def _divisor(whole: int, wanted: int) -> int:
    """The divisor of `whole` that is nearest to the number wanted, the smaller of two.

    >>> _divisor(16, 5), _divisor(12, 5), _divisor(8, 32)
    (4, 4, 8)

    Without a kernel (0) it is the number itself.
    """
    divisors = (n for n in range(1, whole + 1) if whole % n == 0)
    return min(divisors, key=lambda n: abs(n - wanted), default=wanted)


def _oft(module: Module, method: Method) -> Sequence[Part]:
    b = method.hyper["block_size"]
    blocks = 1 if method.hyper["block_share"] else module.shapes["weight"][0] // b
    return [alike("oft_R.weight", "q", (blocks, b * (b - 1) // 2))]


def _write_oft(methods: Methods, config: Config, tensors: Tensors) -> Config:
    sizes = {name: method.hyper["block_size"] for name, method in methods.items()}
    maps = {name: method.hyper["cayley"] for name, method in methods.items()}
    return {
        "oft_block_size": uniform("OFT", "oft_block_size", sizes),
        "r": 0,
        "use_cayley_neumann": uniform("OFT", "use_cayley_neumann", maps) == "neumann",
        "num_cayley_neumann_terms": 5,
    }


def _check_oft(config: Config, place: str) -> None:
    if "oft_block_size" not in config:
        raise InputError(
            f"{place}: no oft_block_size; this adapter is older than PEFT 0.14 and means another "
            "method. Load it with that version and save the merged model"
        )


def _boft_method(config: Config, module: str, shape: Shape, hyper: dict[str, Any]) -> Method:
    size = config.get("boft_block_size", 4) or shape[0] // config["boft_block_num"]
    return boft(block_size=size, **hyper)


def _boft(module: Module, method: Method) -> Sequence[Part]:
    (d_in, d_out), b = module.shapes["weight"], method.hyper["block_size"]
    factors = (method.hyper["factors"], d_in // b, b, b)
    return [alike("boft_R", "r", factors), alike("boft_s", "s", (d_out,), (d_out, 1))]


def _write_boft(methods: Methods, config: Config, tensors: Tensors) -> Config:
    sizes = {name: method.hyper["block_size"] for name, method in methods.items()}
    return {
        "boft_block_size": uniform("BOFT", "boft_block_size", sizes),
        "boft_block_num": 0,
    }


def _hra(module: Module, method: Method) -> Sequence[Part]:
    return [alike("hra_u", "u", (module.shapes["weight"][0], method.hyper["rank"]))]


OFT = Kind(
    peft_type="OFT",
    factories={"oft": oft},
    fields=(
        Field("block_share", "block_share", False),
        Field("coft", "coft", False),
        Field("eps", "eps", 6e-5),
    ),
    free=("r", "oft_block_size", "use_cayley_neumann", "init_weights"),
    limits={"num_cayley_neumann_terms": lambda value: value in (None, 5)},
    check=_check_oft,
    make=_oft_method,
    parts=_oft,
    write=_write_oft,
)
BOFT = Kind(
    peft_type="BOFT",
    factories={"boft": boft},
    fields=(Field("boft_n_butterfly_factor", "factors", 1, number="count"),),
    free=("boft_block_size", "boft_block_num", "init_weights"),
    make=_boft_method,
    parts=_boft,
    write=_write_boft,
)
HRA = Kind(
    peft_type="HRA",
    factories={"hra": hra},
    fields=(Field("r", "rank", 8, number="count"), Field("apply_GS", "apply_gs", False)),
    parts=_hra,
    free=("init_weights",),
)
