"""Every method of the library, and what is claimed of it beside the laws."""

import math

import lora_jax as lj
from lora_jax import methods as m
from lora_jax.quant import int8, loftq, nf4, quantized
from lora_jax.testing import Claim


def each(count):
    """The sum over matrices of what one trains."""
    return lambda matrices: sum(count(d_in, d_out) for d_in, d_out in matrices)


def low_rank(rank):
    """Two factors."""
    return each(lambda d_in, d_out: rank * (d_in + d_out))


def bank(rank, vectors, length):
    """A bank for all, and logits for each chunk of each rank's vectors."""
    logits = each(lambda d_in, d_out: rank * (d_in + d_out) // length * vectors)
    return lambda matrices: vectors * length + logits(matrices)


def bases(rank):
    """A weight for every rank and one for every row of each random base."""

    def count(d_in, d_out):
        least = min(d_in, d_out)
        return math.ceil(least / rank) * (rank + least)

    return each(count)


def over(method, storage):
    """A method on a quantised base, which differs from the base as it was."""
    return lambda: quantized(method(), storage())


CLAIMS = {
    "lora": Claim(lambda: lj.lora(rank=2, alpha=3.0), count=low_rank(2)),
    "lora_fa": Claim(lambda: lj.lora(rank=2, freeze_a=True), count=each(lambda i, o: 2 * o)),
    "lora orthogonal": Claim(lambda: lj.lora(rank=2, init="orthogonal"), count=low_rank(2)),
    "pissa": Claim(lambda: lj.lora(rank=2, init="pissa"), count=low_rank(2)),
    "pissa randomised": Claim(lambda: lj.lora(rank=2, init="pissa_niter_4"), count=low_rank(2)),
    "olora": Claim(lambda: lj.lora(rank=2, init="olora"), count=low_rank(2)),
    "mica": Claim(lambda: lj.lora(rank=2, init="mica"), count=each(lambda i, o: 2 * i)),
    "dora": Claim(lambda: lj.dora(rank=2, alpha=3.0), count=each(lambda i, o: 2 * (i + o) + o)),
    "full": Claim(lj.full, count=each(lambda i, o: i * o)),
    "adalora": Claim(lambda: m.adalora(rank=3), count=each(lambda i, o: 3 * (i + o + 1))),
    "delta_lora": Claim(lambda: m.delta_lora(rank=2), count=low_rank(2)),
    "vera": Claim(lambda: m.vera(rank=3), count=each(lambda i, o: 3 + o)),
    "vera by seed": Claim(
        lambda: m.vera(rank=3, projection="seed"), count=each(lambda i, o: 3 + o)
    ),
    "loha": Claim(lambda: m.loha(rank=2), count=each(lambda i, o: 4 * (i + o))),
    "loha with cores": Claim(lambda: m.loha(rank=2, effective_conv=True)),
    "loha with dropout": Claim(lambda: m.loha(rank=2, rank_dropout=0.5, module_dropout=0.5)),
    "lokr": Claim(lambda: m.lokr(rank=1)),  # its count is a convolution's window too
    "lokr with cores": Claim(lambda: m.lokr(rank=1, effective_conv=True)),
    "ia3": Claim(m.ia3, count=each(lambda i, o: o)),
    "ia3 feedforward": Claim(lambda: m.ia3(feedforward=True), count=each(lambda i, o: i)),
    "vblora": Claim(
        lambda: m.vblora(rank=2, vectors=5, length=4), neutral=False, count=bank(2, 5, 4)
    ),
    "randlora": Claim(lambda: m.randlora(rank=3, alpha=3.0), count=bases(3)),
    "randlora paper": Claim(lambda: m.randlora(rank=3, alpha=3.0, variant="paper"), count=bases(3)),
    "miss": Claim(lambda: m.miss(rank=4), count=each(lambda i, o: 4 * o)),
    "miss mini": Claim(lambda: m.miss(rank=4, mini_rank=2), count=each(lambda i, o: 8)),
    "miss bat": Claim(lambda: m.miss(rank=4, bat=True), count=each(lambda i, o: 4 * o)),
    "fourierft": Claim(
        lambda: m.fourierft(n=6, alpha=15.0), neutral=False, count=each(lambda i, o: 6)
    ),
    "fourierft zeros": Claim(lambda: m.fourierft(n=30, init="zeros"), count=each(lambda i, o: 30)),
    "hra": Claim(lambda: m.hra(rank=2), count=each(lambda i, o: 2 * i)),
    "oft": Claim(lambda: m.oft(block_size=4), count=each(lambda i, o: i * 3 // 2)),
    "oft exact": Claim(
        lambda: m.oft(block_size=4, cayley="exact"), count=each(lambda i, o: i * 3 // 2)
    ),
    "boft": Claim(lambda: m.boft(block_size=4), count=each(lambda i, o: 4 * i + o)),
    "houlsby": Claim(lambda: m.houlsby(size=3), count=each(lambda i, o: 6 * o + 3 + o)),
    "intrinsic": Claim(lambda: m.intrinsic(dimension=7), count=lambda matrices: 7),
    "qlora": Claim(over(lj.lora, nf4), neutral=False, count=low_rank(8)),
    "qdora": Claim(over(lj.dora, lambda: nf4(double=False)), neutral=False),
    "qvera": Claim(over(lambda: m.vera(rank=3), int8), neutral=False),
    "qpissa": Claim(over(lambda: lj.lora(rank=2, init="pissa"), nf4), neutral=False),
    "loftq": Claim(
        lambda: loftq(lj.lora(rank=2), nf4(), steps=2), neutral=False, count=low_rank(2)
    ),
}
