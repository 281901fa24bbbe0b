"""NF4 by its definition, by recorded numbers of bitsandbytes, and at its edges."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.quant import int8, nf4
from lora_jax.quant.nf4 import CODES, _selects, _table, decode

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "golden.json").read_text())
N = np.arange(1, 128 * 64 + 1, dtype=np.float64)
W = jnp.asarray(np.sin(0.37 * N**2 + 48).reshape(128, 64).astype(np.float32))


def checksum(array):
    flat = np.asarray(array, np.float64).ravel()
    return [flat.sum(), (flat**2).sum(), flat[0], flat[-1]]


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def there_and_back(storage, w):
    return storage.dequantise(storage.quantise(w, {}), w.shape)


def torch_order(w):
    return np.asarray(w, np.float32).T.ravel()


def test_recorded_bytes_and_scales():
    arrays = nf4(double=False).quantise(W, {})
    codes = np.asarray(arrays["codes"], np.int64)
    assert codes.sum() == GOLDEN["nf4"]["bytes_sum"]
    assert (codes * np.arange(1, len(codes) + 1)).sum() == GOLDEN["nf4"]["bytes_weighted"]
    assert codes[:8].tolist() == GOLDEN["nf4"]["bytes_head"]
    np.testing.assert_allclose(checksum(arrays["absmax"]), GOLDEN["nf4"]["absmax"], rtol=1e-12)
    back = torch_order(there_and_back(nf4(double=False), W))
    np.testing.assert_allclose(checksum(back), GOLDEN["nf4"]["dequant"], rtol=1e-12)


def test_recorded_nested_scales():
    wanted = GOLDEN["nf4_double"]
    arrays = nf4().quantise(W, {"offset": jnp.float32(wanted["offset"])})
    absmax = np.asarray(arrays["absmax"], np.int64)
    assert [absmax.sum(), absmax[0], absmax[-1]] == wanted["absmax"]
    np.testing.assert_allclose(arrays["largest"], wanted["absmax2"], rtol=1e-12)
    back = torch_order(nf4().dequantise(arrays, W.shape))
    np.testing.assert_allclose(checksum(back), wanted["dequant"], rtol=1e-6)
    own = nf4().quantise(W, {})
    assert np.abs(np.int64(own["absmax"]) - absmax).max() <= 1
    np.testing.assert_allclose(own["offset"], wanted["offset"], rtol=1e-6)


@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(40, 24), (7, 9), (64, 3), (1, 1), (5, 13)])
def test_every_number_goes_to_the_nearest_code(shape, block):
    w = noise(*shape)
    arrays = nf4(block, double=False).quantise(w, {})
    flat = torch_order(w)
    assert arrays["codes"].shape == (-(-len(flat) // 2),)
    for i, start in enumerate(range(0, len(flat), block)):
        part = flat[start : start + block]
        absmax = np.abs(part).max()
        assert arrays["absmax"][i] == absmax
        back = torch_order(there_and_back(nf4(block, double=False), w))[start : start + block]
        gap = np.abs(CODES[None, :] * absmax - part[:, None])
        np.testing.assert_allclose(np.abs(back - part), gap.min(axis=1), atol=1e-6)
        assert np.abs(back - part).max() <= 0.1519037 * absmax


def test_quantising_again_changes_nothing():
    storage = nf4(double=False)
    once = storage.quantise(noise(40, 24), {})
    again = storage.quantise(storage.dequantise(once, (40, 24)), {})
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_the_middle_between_two_codes_goes_to_the_lower():
    middles = (CODES[1:] + CODES[:-1]) / 2
    w = jnp.asarray(np.append(middles, [1.0]))[:, None]
    codes = nf4(double=False).quantise(w, {})["codes"]
    nibbles = np.stack([np.asarray(codes) >> 4, np.asarray(codes) & 15], 1).ravel()
    assert nibbles.tolist() == [*range(15), 15]


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zero(double):
    w = jnp.zeros((64, 3)).at[:, 1].set(noise(64))
    arrays = nf4(double=False).quantise(w, {})
    assert set(np.asarray(arrays["codes"][:32])) == {0x77}
    back = there_and_back(nf4(double=double), w)
    assert np.isfinite(back).all() and not np.asarray(there_and_back(nf4(), 0 * w)).any()
    if not double:
        assert not np.asarray(back[:, [0, 2]]).any()


@pytest.mark.parametrize("shape", [(64, 2048), (96, 688)])
def test_double_quantisation_has_4_127_bits_and_hardly_more_error(shape):
    w = noise(*shape)
    arrays = nf4().quantise(w, {})
    bits = 8 * sum(x.nbytes for x in arrays.values() if x.ndim) / w.size
    assert bits == pytest.approx(4.126953125, rel=2e-3)
    error = [jnp.sqrt(jnp.mean((there_and_back(nf4(double=d), w) - w) ** 2)) for d in (False, True)]
    assert error[1] < 1.01 * error[0] and 0.08 < error[0] < 0.1


@pytest.mark.parametrize("storage", [nf4(), nf4(32, double=False), int8()], ids=repr)
def test_stacks_are_loops(storage):
    w = noise(3, 40, 24)
    stacked = jax.jit(jax.vmap(lambda w: storage.quantise(w, {})))(w)
    kept = [{name: stacked[name][i] for name in storage.kept} for i in range(3)]
    single = [storage.quantise(w[i], kept[i]) for i in range(3)]
    jax.tree.map(lambda s, *x: np.testing.assert_array_equal(s, jnp.stack(x)), stacked, *single)
    back = jax.vmap(lambda arrays: storage.dequantise(arrays, (40, 24)))(stacked)
    np.testing.assert_array_equal(back[1], storage.dequantise(single[1], (40, 24)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_other_dtypes_are_their_values_in_float32(dtype):
    w = noise(40, 24).astype(dtype)
    arrays = nf4().quantise(w, {}), nf4().quantise(w.astype(jnp.float32), {})
    jax.tree.map(np.testing.assert_array_equal, *arrays)


def test_selects_are_the_table():
    nibbles = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(_selects(nibbles), _table(nibbles))
    np.testing.assert_array_equal(jax.jit(decode)(nibbles), CODES)


def test_int8_rounds_each_column():
    w = noise(40, 24).at[:, 5].set(0)
    back = there_and_back(int8(), w)
    largest = np.abs(np.asarray(w)).max(axis=0)
    assert (np.abs(back - w) <= largest[None, :] / 254 * 1.001).all() and not back[:, 5].any()


@pytest.mark.parametrize("block", [0, 16, 48, 8192, 64.0, True])
def test_a_block_that_cannot_be_is_refused(block):
    with pytest.raises(InputError, match="a power of two from 32 to 4096"):
        nf4(block)
