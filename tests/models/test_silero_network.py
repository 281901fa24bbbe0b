import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.io.onnx import Graph
from lora_jax.models.load_silero import assemble_silero
from lora_jax.models.lstm import Memory
from lora_jax.models.silero import SileroConfig, Stream, fresh_silero, magnitudes

CONFIG = SileroConfig(chunk=96, context=16, window=32, channels=(7, 6, 5, 4), width=3)
B, N = 2, 5


@pytest.fixture(scope="module")
def network():
    return fresh_silero(CONFIG, jax.random.key(0))


def sound(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(0, 1, shape), jnp.float32)


def test_a_recording_in_two_parts_is_the_whole(network):
    chunks = sound(B, N, 96)
    apply = jax.jit(network.apply)
    whole, end = apply(network.params, chunks)
    first, stream = apply(network.params, chunks[:, :2])
    second, last = apply(network.params, chunks[:, 2:], stream)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-6)
    np.testing.assert_allclose(last.memory.cell, end.memory.cell, atol=1e-6)
    np.testing.assert_array_equal(last.context, chunks[:, -1, -16:])
    forgotten, _ = apply(network.params, chunks[:, 2:])
    assert not np.allclose(forgotten, second, atol=1e-6)


def test_magnitudes_are_those_of_numpys_transform():
    heard = np.asarray(sound(B, 72))
    mirrored = np.pad(heard, ((0, 0), (0, 8)), mode="reflect")
    hann = np.hanning(33)[:32]
    wanted = [np.abs(np.fft.rfft(mirrored[:, at : at + 32] * hann)) for at in (0, 16, 32, 48)]
    np.testing.assert_allclose(magnitudes(jnp.asarray(heard), 32), np.stack(wanted, 1), atol=1e-5)


def test_features_are_what_the_head_reads(network):
    assert network.features is not None
    assert network.features(network.params, sound(B, N, 96)).shape == (B, 3)


def test_convolutions_and_cell_take_adapters(network, key):
    chunks = sound(B, N, 96)
    sites = lj.find_sites(network.apply, network.params, *network.inputs)
    assert {path: (site.d_in, site.d_out) for path, site in sites.items()} == {
        "conv1/kernel": (3 * 17, 7),
        "conv2/kernel": (3 * 7, 6),
        "conv3/kernel": (3 * 6, 5),
        "conv4/kernel": (3 * 5, 4),
        "lstm/input/kernel": (4, 12),
        "lstm/recurrent/kernel": (3, 12),
        "head/kernel": (3, 1),
    }
    frozen, trained = lj.attach(key, network.params, {".*/kernel": lj.lora(rank=2)}, sites)
    apply = jax.jit(network.apply)
    factored = jax.jit(lambda trained: lj.factored(network.apply)(lj.bind(frozen, trained), chunks))
    plain, _ = apply(network.params, chunks)
    fresh, _ = factored(trained)
    np.testing.assert_array_equal(fresh, plain)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)
    moved, _ = factored(trained)
    merged, _ = apply(lj.merge(frozen, trained), chunks)
    np.testing.assert_allclose(moved, merged, atol=1e-5)
    assert not np.allclose(moved, plain, atol=1e-3)


@pytest.mark.parametrize(
    "chunks, message",
    [
        (jnp.zeros((B, N, 95)), "pieces of 96"),
        (jnp.zeros((B, 96)), "recordings, chunks, 96"),
        (jnp.zeros((B, 0, 96)), "recordings, chunks, 96"),
        (jnp.zeros((B, N, 96), jnp.int16), "divide them by 32768"),
    ],
)
def test_sound_of_another_shape_is_refused(network, chunks, message):
    with pytest.raises(InputError, match=message):
        jax.jit(network.apply)(network.params, chunks)


def test_a_stream_of_other_recordings_is_refused(network):
    stream = Stream(Memory(*jnp.zeros((2, B + 1, 3))), jnp.zeros((B + 1, 16)))
    with pytest.raises(InputError, match="or None to begin"):
        network.apply(network.params, sound(B, N, 96), stream)


def tensors():
    """The tensors of a model of CONFIG's sizes, under the exporter's names."""
    sizes = {"rnn.weight_ih": (12, 4), "rnn.weight_hh": (12, 3), "decoder.2.weight": (1, 3, 1)}
    sizes |= {"rnn.bias_ih": (12,), "rnn.bias_hh": (12,), "decoder.2.bias": (1,)}
    for index, (c_in, c_out) in enumerate([(17, 7), (7, 6), (6, 5), (5, 4)]):
        sizes[f"encoder.{index}.reparam_conv.weight"] = (c_out, c_in, 3)
        sizes[f"encoder.{index}.reparam_conv.bias"] = (c_out,)
    return {f"branch__{name}": np.asarray(sound(*shape)) for name, shape in sizes.items()}


def test_tensors_become_parameters_of_the_modules_shapes(network):
    params = assemble_silero(Graph("here.onnx", tensors(), {}, {}, ""), CONFIG)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, network.params)


@pytest.mark.parametrize("change", [lambda w: w[:-1], lambda w: None])
def test_a_file_of_another_model_is_refused(change):
    weights = tensors()
    kernel = change(weights.pop("branch__rnn.weight_hh"))
    weights |= {} if kernel is None else {"branch__rnn.weight_hh": kernel}
    with pytest.raises(InputError, match=r"here.onnx should have .*weight_hh.*silero-vad 6"):
        assemble_silero(Graph("here.onnx", weights, {}, {}, ""), CONFIG)
