"""The decoder against itself: masks, cache, remat, dtypes; and against recorded logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.models.llama import attend, attend_causally

MODEL = tiny_llama.model(attention_bias=True, mlp_bias=True)
IDS = jax.random.randint(jax.random.key(7), (2, 7), 0, MODEL.config.vocab_size)
APPLY = jax.jit(MODEL.apply)
LOGITS = APPLY(MODEL.params, IDS)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_bias"])
def test_recorded_logits(tmp_path, name):
    recorded = np.load(tiny_llama.GOLDEN / "llama_base.npz")
    model = models.load(tiny_llama.golden_folder(tmp_path, name))
    found = model.apply(model.params, jnp.asarray(recorded["input_ids"]))
    close(found, recorded[name], 1e-6)


def test_parameters_are_a_plain_tree_with_readable_paths():
    flat = jax.tree_util.tree_leaves_with_path(MODEL.params)
    paths = {"/".join(str(step.key) for step in path): leaf.shape for path, leaf in flat}
    assert paths["embed/embedding"] == (29, 16)
    assert paths["layers/attn/q_proj/kernel"] == (3, 16, 24)
    assert paths["layers/attn/k_proj/bias"] == (3, 12)
    assert paths["layers/mlp/down_proj/kernel"] == (3, 20, 16)
    assert paths["layers/mlp_norm/scale"] == (3, 16)
    assert paths["norm/scale"] == (16,)
    assert paths["lm_head/kernel"] == (16, 29)
    assert "lm_head" not in tiny_llama.model(tie_word_embeddings=True).params


def test_logits_do_not_see_the_future_or_padding():
    changed = IDS.at[:, 5:].set(0)
    mask = jnp.broadcast_to(jnp.arange(7) < 5, (2, 7))
    close(APPLY(MODEL.params, changed)[:, :5], LOGITS[:, :5])
    close(APPLY(MODEL.params, changed, mask=mask)[:, :5], LOGITS[:, :5])
    left = jnp.roll(mask, 2, axis=1)
    positions = jnp.maximum(jnp.arange(7) - 2, 0)[None]
    close(
        MODEL.apply(MODEL.params, jnp.roll(changed, 2, axis=1), positions, left)[:, 2:],
        LOGITS[:, :5],
    )


def test_apply_is_logits_after_hidden():
    hidden = jax.jit(MODEL.hidden)(MODEL.params, IDS)
    assert hidden.shape == (2, 7, 16)
    close(MODEL.logits(MODEL.params, hidden), LOGITS)


@pytest.mark.parametrize("remat", ["layers", "projections"])
def test_remat_changes_neither_values_nor_gradients(remat):
    def loss(params, model):
        return jnp.square(model.apply(params, IDS)).mean()

    graded = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = graded(MODEL.params, MODEL)
    again = graded(MODEL.params, MODEL.with_options(remat=remat))
    jax.tree.map(lambda x, y: close(x, y, 1e-5), plain, again)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = MODEL.with_options(dtype=jnp.bfloat16)
    hidden, logits = (jax.eval_shape(f, model.params, IDS) for f in (model.hidden, model.apply))
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.params))
    found = jax.jit(model.apply)(model.params, IDS)
    worst = jnp.abs(found - LOGITS).max() / jnp.abs(LOGITS).max()
    assert 0 < worst < 0.05


@pytest.mark.parametrize("time", [5, 150])
def test_blocked_attention_is_plain_causal_attention(time):
    draw = np.random.default_rng(0).standard_normal
    q, k, v = (jnp.asarray(draw((2, time, heads, 6), np.float32)) for heads in (4, 2, 2))
    valid = jnp.arange(time)[None] < jnp.array([time, time - 3])[:, None]
    mask = jnp.tril(jnp.ones((time, time), bool))[None] & valid[:, None, :]
    close(jax.jit(attend_causally)(q, k, v, mask), attend(q, k, v, mask), 3e-6)


def test_decoding_piece_by_piece_gives_the_logits_of_the_whole():
    decode = jax.jit(MODEL.decode)
    cache = MODEL.init_cache(2, 9)
    for start, end in [(0, 3), (3, 4), (4, 7)]:
        logits, cache = decode(MODEL.params, IDS[:, start:end], cache)
        close(logits, LOGITS[:, end - 1])
    assert cache.lengths.tolist() == [7, 7]


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_rows_of_different_lengths(side):
    lengths = np.array([5, 2])
    ids, mask = np.zeros((2, 6), np.int32), np.zeros((2, 6), bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(6 - length, 6)
        ids[row, place], mask[row, place] = IDS[row, :length], True
    decode = jax.jit(MODEL.decode)
    logits, cache = decode(MODEL.params, jnp.asarray(ids), MODEL.init_cache(2, 9), mask)
    close(logits, LOGITS[np.arange(2), lengths - 1])
    following = IDS[np.arange(2), lengths][:, None]
    logits, cache = decode(MODEL.params, following, cache)
    close(logits, LOGITS[np.arange(2), lengths])
    assert cache.lengths.tolist() == [6, 3]


def test_functions_of_one_model_trace_once():
    traces = []

    def counted(params, ids):
        traces.append(1)
        return MODEL.apply(params, ids)

    jitted = jax.jit(counted)
    jitted(MODEL.params, IDS)
    jitted(jax.tree.map(jnp.copy, MODEL.params), IDS + 0)
    assert len(traces) == 1


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(InputError, match="41 tokens are longer than the model's context of 40"):
        MODEL.apply(MODEL.params, jnp.zeros((1, 41), jnp.int32))
    with pytest.raises(InputError, match="context of 40"):
        MODEL.init_cache(1, 41)
