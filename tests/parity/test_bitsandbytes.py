"""The bytes of bitsandbytes, on shapes, blocks and dtypes that nothing recorded."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.quant import int8, nf4
from lora_jax.quant.dynamic import dynamic_map
from lora_jax.quant.nf4 import CODES

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as functional

    return functional


def kernel(seed):
    """A torch weight [d_out, d_in] of a random shape, size, dtype and distribution; a block."""
    rng = np.random.default_rng(seed)
    d_out, d_in = (int(n) for n in rng.integers(1, 300, 2))
    draw = rng.choice([rng.standard_normal, lambda s: rng.laplace(size=s), rng.random])
    weight = draw((d_out, d_in)) * 10.0 ** rng.integers(-4, 4)
    if rng.random() < 0.3:
        weight[: d_out // 2] = 0
    dtype = [torch.float32, torch.bfloat16, torch.float16][seed % 3]
    return torch.tensor(weight).to(dtype), int(2 ** rng.integers(5, 13))


def ours(weight):
    return jnp.asarray(weight.float().numpy().T)


@pytest.mark.parametrize("seed", range(24))
def test_codes_and_scales_are_the_same_bytes(bnb, seed):
    weight, block = kernel(seed)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=False
    )
    arrays = nf4(block, double=False).quantise(ours(weight), {})
    np.testing.assert_array_equal(arrays["codes"], codes.numpy().ravel())
    mine, theirs = np.asarray(arrays["absmax"]), state.absmax.numpy()
    # They lift a short last block of zeros to 1e-38, which float32 holds as a subnormal only.
    np.testing.assert_array_equal(mine, np.where(theirs < 1e-37, 0, theirs))


@pytest.mark.parametrize("seed", range(24))
def test_nested_scales_are_the_same_bytes_for_the_same_mean(bnb, seed):
    weight, block = kernel(seed)
    _, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=True
    )
    offset = jnp.asarray(state.offset.numpy())
    arrays = nf4(block).quantise(ours(weight), {"offset": offset})
    np.testing.assert_array_equal(arrays["absmax"], state.absmax.numpy())
    np.testing.assert_array_equal(arrays["largest"], state.state2.absmax.numpy())
    own = nf4(block).quantise(ours(weight), {})
    np.testing.assert_allclose(own["offset"], offset, rtol=1e-5)  # the order of a sum differs


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_they_read_what_we_pack(bnb, seed, double):
    """Of widths that are whole blocks: their AVX-512 kernel takes the scales per row."""
    weight = torch.randn(seed + 3, 64 * (seed + 1), generator=torch.Generator().manual_seed(seed))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    theirs = bnb.dequantize_4bit(packed, state).numpy().T
    kept = {"offset": jnp.asarray(state.offset.numpy())} if double else {}
    storage = nf4(double=double)
    back = storage.dequantise(storage.quantise(ours(weight), kept), theirs.shape)
    np.testing.assert_allclose(back, theirs, rtol=1e-6)


def test_the_code_books(bnb):
    np.testing.assert_array_equal(CODES, bnb.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("seed", range(4))
def test_rows_in_eight_bits(bnb, seed):
    weight = torch.randn(17, 40, generator=torch.Generator().manual_seed(seed))
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    arrays = int8().quantise(ours(weight.half()), {})
    np.testing.assert_allclose(arrays["scale"] * 127, scale.numpy(), rtol=1e-6)
    assert np.abs(np.int32(arrays["codes"].T) - codes.numpy()).max() <= 1
