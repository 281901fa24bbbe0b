"""Silero VAD, which says how likely a stretch of sound holds speech: convolutions and an LSTM.

Letters: B recordings, N chunks, S samples, F frames, C channels, H hidden width. The layout is that
of the published 16 kHz model (github.com/snakers4/silero-vad, version 6).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.errors import InputError
from lora_jax.models.layers import Linear
from lora_jax.models.lstm import LSTM, Memory
from lora_jax.models.network import Network


@dataclass(frozen=True)
class SileroConfig:
    """Sizes, in samples at 16 kHz and in channels."""

    chunk: int = 512
    """Samples to a probability: 32 ms."""
    context: int = 64
    """Samples of the chunk before that are heard again."""
    window: int = 256
    """Samples to a Fourier window; half of it is the hop."""
    channels: tuple[int, int, int, int] = (128, 64, 64, 128)
    width: int = 128


class Stream(NamedTuple):
    """Where a recording stands between two calls: the LSTM's memory and the last samples heard."""

    memory: Memory
    context: jax.Array
    """[B, context]"""


class Conv1d(nnx.Module):
    """A convolution over frames, one zero frame either side; kernel [taps, c_in, c_out]."""

    def __init__(self, c_in: int, c_out: int, *, stride: int, rngs: nnx.Rngs) -> None:
        self.stride = stride
        fresh = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(fresh(rngs.params(), (3, c_in, c_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [B, F, c_in] -> [B, ceil(F / stride), c_out]."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride,),
            padding=((1, 1),),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + jax.lax.broadcast(self.bias[...], y.shape[:-1])


class Silero(nnx.Module):
    """Spectrum, four convolutions with ReLU (strides 1, 2, 2, 1), LSTM, one probability a chunk."""

    def __init__(self, config: SileroConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        one, two, three, four = config.channels
        self.conv1 = Conv1d(config.window // 2 + 1, one, stride=1, rngs=rngs)
        self.conv2 = Conv1d(one, two, stride=2, rngs=rngs)
        self.conv3 = Conv1d(two, three, stride=2, rngs=rngs)
        self.conv4 = Conv1d(three, four, stride=1, rngs=rngs)
        self.lstm = LSTM(four, config.width, rngs=rngs)
        self.head = Linear(config.width, 1, bias=True, rngs=rngs)

    def start(self, batch: int) -> Stream:
        """The state of `batch` recordings of which nothing was heard: zeros."""
        context = jnp.zeros((batch, self.config.context), jnp.float32)
        return Stream(self.lstm.start(batch), context)

    def encode(self, heard: jax.Array) -> jax.Array:
        """`heard` [B, context + chunk] samples -> what the LSTM reads [B, C]."""
        x = magnitudes(heard, self.config.window)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = jax.nn.relu(conv(x))
        return x[:, 0]

    def hidden(self, chunks: jax.Array, stream: Stream | None = None) -> tuple[jax.Array, Stream]:
        """`chunks` [B, N, chunk] -> what the head reads [B, N, H], and the state at the end.

        The chunks of all recordings are encoded as one batch: only the LSTM goes one by one.
        """
        batch, count, _ = chunks.shape
        stream = self.start(batch) if stream is None else stream
        tails = chunks[:, :, -self.config.context :]
        contexts = jnp.concatenate([stream.context[:, None], tails[:, :-1]], axis=1)
        heard = jnp.concatenate([contexts, chunks], axis=2)
        encoded = self.encode(heard.reshape(batch * count, -1)).reshape(batch, count, -1)
        hidden, memory = self.lstm(encoded, stream.memory)
        return jax.nn.relu(hidden), Stream(memory, tails[:, -1])

    def __call__(self, chunks: jax.Array, stream: Stream | None = None) -> tuple[jax.Array, Stream]:
        """`chunks` [B, N, chunk] -> the probability of speech in each [B, N], and the state."""
        hidden, stream = self.hidden(chunks, stream)
        return jax.nn.sigmoid(self.head(hidden))[..., 0], stream


def magnitudes(heard: jax.Array, window: int) -> jax.Array:
    """|Fourier transform| of Hann windows that overlap by half, [B, S] -> [B, F, window / 2 + 1].

    The end is first mirrored by a quarter of a window, and nothing is scaled:
    `|sum_n hann(n) x(n) exp(-2 pi i k n / window)|`.
    """
    hop, quarter = window // 2, window // 4
    mirrored = jnp.pad(heard, ((0, 0), (0, quarter)), mode="reflect")
    starts = np.arange(0, mirrored.shape[1] - window + 1, hop)
    frames = mirrored[:, starts[:, None] + np.arange(window)]
    real, imaginary = jnp.split(frames @ jnp.asarray(_fourier(window)), 2, axis=-1)
    return jnp.sqrt(jnp.square(real) + jnp.square(imaginary))


def _fourier(window: int) -> np.ndarray:
    """Hann-windowed cosines and sines, float32 [window, 2 * (window / 2 + 1)].

    Transform and window are rounded before they are multiplied: so were the published ones.
    """
    transform = np.fft.rfft(np.eye(window))
    waves = np.concatenate([transform.real, transform.imag], axis=1).astype(np.float32)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return waves * hann.astype(np.float32)[:, None]


def fresh_silero(config: SileroConfig, key: jax.Array) -> Network:
    """A voice detector that has learnt nothing, of any size.

    >>> config = SileroConfig(chunk=96, context=16, window=32, channels=(7, 6, 5, 4), width=3)
    >>> network = fresh_silero(config, jax.random.key(0))
    >>> probabilities, stream = network.apply(network.params, jnp.zeros((2, 5, 96)))
    >>> probabilities.shape, stream.memory.hidden.shape, stream.context.shape
    ((2, 5), (2, 3), (2, 16))
    """

    @jax.jit
    def fresh(key: jax.Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(Silero(config, rngs=nnx.Rngs(key)), nnx.Param))

    return silero_network(config, fresh(key))


def silero_network(config: SileroConfig, params: dict[str, Any]) -> Network:
    """The pure functions of a detector of these sizes, around its parameters."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Silero(config, rngs=nnx.Rngs(0))))

    def module(params: Any, chunks: jax.Array, stream: Stream | None) -> Silero:
        _check(config, chunks, stream)
        return nnx.merge(graph, params)

    def apply(
        params: Any, chunks: jax.Array, stream: Stream | None = None
    ) -> tuple[jax.Array, Stream]:
        return module(params, chunks, stream)(chunks, stream)

    def features(params: Any, chunks: jax.Array, stream: Stream | None = None) -> jax.Array:
        return module(params, chunks, stream).hidden(chunks, stream)[0].mean(axis=1)

    inputs = (jax.ShapeDtypeStruct((1, 2, config.chunk), jnp.float32),)
    return Network(apply, params, config, features=features, inputs=inputs)


def _check(config: SileroConfig, chunks: jax.Array, stream: Stream | None) -> None:
    if len(chunks.shape) != 3 or chunks.shape[2] != config.chunk or not chunks.shape[1]:
        raise InputError(
            f"chunks have shape {tuple(chunks.shape)}; give [recordings, chunks, {config.chunk}]: "
            f"16 kHz samples cut into pieces of {config.chunk}, the last filled up with zeros"
        )
    if not jnp.issubdtype(chunks.dtype, jnp.floating):
        raise InputError(f"chunks are {chunks.dtype}; divide them by 32768 to lie in [-1, 1]")
    if stream is None:
        return
    rows = len(chunks)
    wanted = [(rows, config.width), (rows, config.width), (rows, config.context)]
    found = [tuple(part.shape) for part in jax.tree.leaves(stream)]
    if found != wanted:
        raise InputError(
            f"the stream has shapes {found}, not {wanted}; give the one that the call before on "
            "the same recordings returned, or None to begin"
        )
