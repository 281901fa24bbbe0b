"""Every method of the library, and what is claimed of it beside the laws."""

import lora_jax as lj
from lora_jax.testing import Claim


def low_rank(rank):
    """The count of two factors."""
    return lambda matrices: sum(rank * (d_in + d_out) for d_in, d_out in matrices)


CLAIMS = {
    "lora": Claim(lambda: lj.lora(rank=2, alpha=3.0), count=low_rank(2)),
    "lora_fa": Claim(
        lambda: lj.lora(rank=2, freeze_a=True),
        count=lambda matrices: sum(2 * d_out for _, d_out in matrices),
    ),
    "dora": Claim(
        lambda: lj.dora(rank=2, alpha=3.0),
        count=lambda matrices: low_rank(2)(matrices) + sum(d_out for _, d_out in matrices),
    ),
    "full": Claim(lj.full, count=lambda matrices: sum(d_in * d_out for d_in, d_out in matrices)),
}
