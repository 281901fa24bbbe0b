"""Silero VAD against onnxruntime, chunk by chunk with the state carried on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.load_silero import load_silero

pytestmark = [pytest.mark.parity, pytest.mark.network]
onnxruntime = pytest.importorskip("onnxruntime")


def audio(count):
    """Two vowels sung in syllables over faint noise [2, count, 512]: harmonics under formants."""
    time = np.arange(count * 512) / 16_000
    waver = 2 * np.pi * np.cumsum(1 + 0.05 * np.sin(2 * np.pi * 2.1 * time)) / 16_000
    syllables = np.sin(2 * np.pi * 2.7 * time).clip(0)
    voices = []
    for pitch, formants in ((120.0, (700, 1200, 2600)), (210.0, (300, 2300, 3000))):
        tones = pitch * np.arange(1, int(7000 / pitch))
        loud = sum(1 / (1 + ((tones - peak) / 90) ** 2) for peak in formants)
        loud = loud / np.sqrt(tones / pitch)
        voices.append((loud[:, None] * np.sin(tones[:, None] * waver)).sum(axis=0) * syllables)
    noise = np.random.default_rng(0).normal(0, 0.003, (2, len(time)))
    return (0.15 * np.stack(voices) + noise).astype(np.float32).reshape(2, count, 512)


def theirs(path, chunks):
    """onnxruntime's probabilities of one recording [N, 512], and its last state [2, 1, 128]."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32)
    found = []
    for chunk in chunks:
        heard = np.concatenate([context, chunk[None]], axis=1)
        probability, state = session.run(None, {"input": heard, "state": state})
        context = heard[:, -64:]
        found.append(probability[0, 0])
    return np.array(found), state


def test_probabilities_and_state_are_onnxruntimes_to_a_millionth():
    network, chunks = load_silero(), audio(40)
    assert network.source is not None
    apply = jax.jit(network.apply)
    first, stream = apply(network.params, jnp.asarray(chunks[:, :13]))
    second, stream = apply(network.params, jnp.asarray(chunks[:, 13:]), stream)
    ours = np.concatenate([first, second], axis=1)
    for row in range(2):
        wanted, state = theirs(str(network.source.path), chunks[row])
        np.testing.assert_allclose(ours[row], wanted, atol=1e-6, rtol=0)
        memory = [stream.memory.hidden[row], stream.memory.cell[row]]
        np.testing.assert_allclose(memory, state[:, 0], atol=1e-5, rtol=1e-5)
    assert ours.min() < 0.1 and ours.max() > 0.9  # speech is heard, and silence too
