"""An LSTM cell in Flax NNX, run over time by a scan, and a language model made of one.

Letters: B batch, T time, D input width, H hidden width, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.errors import InputError
from lora_jax.models.network import Network

GATES = ("i", "f", "g", "o")
"""The quarters of a kernel's output axis, in order: input, forget, candidate, output gate."""


class Memory(NamedTuple):
    """What a cell carries from one step to the next, both [B, H]."""

    hidden: jax.Array
    cell: jax.Array


class LSTM(nnx.Module):
    """One cell with two kernels, `input/kernel` [D, 4H] (and bias) and `recurrent/kernel` [H, 4H].

    i, f, g, o = split(x @ input + h @ recurrent + bias)
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g),  h' = sigmoid(o) * tanh(c')

    (Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; `GATES` is torch's
    order. One bias is enough: torch's two only ever act as their sum.)
    """

    def __init__(self, d_in: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.width = width
        outer, orthogonal = len(GATES) * width, nnx.initializers.orthogonal()
        self.input = nnx.Linear(d_in, outer, bias_init=_remembering, rngs=rngs)
        self.recurrent = nnx.Linear(width, outer, use_bias=False, kernel_init=orthogonal, rngs=rngs)

    def start(self, batch: int) -> Memory:
        """The memory of `batch` rows that have seen nothing: zeros."""
        return Memory(*jnp.zeros((2, batch, self.width), jnp.float32))

    def step(self, memory: Memory, driven: jax.Array) -> Memory:
        """One step; `driven` [B, 4H] is what the input kernel made of this step's input."""
        gates = driven + self.recurrent(memory.hidden)
        i, f, g, o = jnp.split(gates, len(GATES), axis=-1)
        cell = jax.nn.sigmoid(f) * memory.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return Memory(jax.nn.sigmoid(o) * jnp.tanh(cell), cell)

    def __call__(self, x: jax.Array, memory: Memory | None = None) -> tuple[jax.Array, Memory]:
        """`x` [B, T, D] -> the hidden state after each step [B, T, H], and the memory at the end.

        `memory` continues an earlier sequence; by default each row starts from nothing.
        """
        memory = self.start(len(x)) if memory is None else memory

        def body(memory: Memory, driven: jax.Array) -> tuple[Memory, jax.Array]:
            memory = self.step(memory, driven)
            return memory, memory.hidden

        # The input kernel meets all steps in one product; only the recurrent one must wait.
        driven = jnp.swapaxes(self.input(x), 0, 1)
        memory, hidden = jax.lax.scan(body, memory, driven)
        return jnp.swapaxes(hidden, 0, 1), memory


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes of a language model: symbols, width of their vectors, width of the LSTM."""

    vocab: int
    d_in: int
    width: int

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size < 1:
                raise InputError(f"a recurrent language model with {name}={size}; give >= 1")


class RecurrentLM(nnx.Module):
    """A language model: embedding [V, D], one LSTM, and a head [H, V] on its hidden state."""

    def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs) -> None:
        # Rows of length sqrt(D): from the usual small ones it learns several times more slowly.
        unit = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(config.vocab, config.d_in, embedding_init=unit, rngs=rngs)
        self.lstm = LSTM(config.d_in, config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocab, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`ids` [B, T] -> scores of each next symbol [B, T, V]; every row starts from nothing."""
        return self.head(self.lstm(self.embed(ids))[0])


def initialise_recurrent(config: RecurrentConfig, key: jax.Array) -> Network:
    """A fresh language model: `apply(params, ids) -> logits [B, T, V]`.

    `ids` [B, T] are integers below `vocab`; another shape or type is an InputError.

    >>> network = initialise_recurrent(RecurrentConfig(11, 3, 4), jax.random.key(0))
    >>> network.apply(network.params, jnp.array([[0, 10, 5]])).shape
    (1, 3, 11)
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: RecurrentLM(config, rngs=nnx.Rngs(0))))

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        if len(ids.shape) != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputError(f"ids {tuple(ids.shape)} {ids.dtype}; give integers [rows, symbols]")
        return nnx.merge(graph, params)(ids)

    @jax.jit
    def fresh(key: jax.Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(RecurrentLM(config, rngs=nnx.Rngs(key)), nnx.Param))

    inputs = (jax.ShapeDtypeStruct((1, 3), jnp.int32),)
    return Network(apply, fresh(key), config, inputs=inputs)


def _remembering(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros but for the forget gates' ones, which keep a fresh cell's memory alive.

    Jozefowicz et al. 2015, section 2.2.
    """
    del key
    gates = jnp.zeros((len(GATES), shape[0] // len(GATES)), dtype)
    return gates.at[GATES.index("f")].set(1.0).reshape(shape)
