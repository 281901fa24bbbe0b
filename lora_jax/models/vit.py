"""A vision transformer in Flax NNX: ViT, and DINOv2 where its branches are scaled.

Letters: B batch, D width, L layers, N patches, P patch size, G rows and columns of positions.
Sources: Dosovitskiy et al. 2021 (ViT, eqs. 1-4); Oquab et al. 2024 (DINOv2); Touvron et al. 2021,
eq. 9 (the scales).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.errors import InputError
from lora_jax.models.layers import FeedForward, LayerNorm, SelfAttention, scan, stacked
from lora_jax.models.network import Network
from lora_jax.models.virtual import NONE, Virtual, each_row

if TYPE_CHECKING:
    from lora_jax.io.sources import Source

_normal = nnx.initializers.normal(0.02)

_gelu = functools.partial(jax.nn.gelu, approximate=False)
_EPS = {"vit": 1e-12, "dinov2": 1e-6}
_ONLY = {"hidden_act": "gelu", "num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False}
_SIZES = (
    "image_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


@dataclass(frozen=True)
class ViTConfig:
    """The sizes and switches of a vision transformer, under their Hugging Face names.

    >>> raw = {"model_type": "dinov2", "image_size": 28, "patch_size": 7, "hidden_size": 12,
    ...        "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2}
    >>> ViTConfig.from_hf(raw).intermediate_size
    24
    """

    image_size: int
    """Height and width, in pixels, of the images that the stored positions are for."""
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-6
    layer_scale: bool = False
    """Whether each branch is multiplied by a learned vector, as in DINOv2."""

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "ViTConfig":
        """Reads a config.json's mapping, of a `vit` or a `dinov2` model.

        Raises InputError, naming `where`, for a missing size, another architecture, or an option
        (activation, registers, grey images) that this transformer does not compute.
        """
        kind = _check_options(raw, where)
        if kind == "dinov2" and raw.get("hidden_size"):
            raw = {**raw, "intermediate_size": round(raw["hidden_size"] * raw.get("mlp_ratio", 4))}
        for name in _SIZES:
            if not isinstance(raw.get(name), int) or raw[name] < 1:
                raise InputError(f"{where}: {name} is {raw.get(name)!r}; it must be 1 or more")
        for name, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if raw[name] % raw[part]:
                raise InputError(
                    f"{where}: {name} {raw[name]} is no multiple of {part} {raw[part]}"
                )
        return cls(
            **{name: raw[name] for name in _SIZES},
            layer_norm_eps=float(raw.get("layer_norm_eps", _EPS[kind])),
            layer_scale=kind == "dinov2",
        )


def _check_options(raw: Mapping[str, Any], where: str) -> str:
    kind = raw.get("model_type")
    if kind not in _EPS:
        raise InputError(f"{where}: model_type {kind!r} is no ViT; known are 'vit' and 'dinov2'")
    for name, computed in _ONLY.items():
        if raw.get(name, computed) != computed:
            raise InputError(f"{where}: {name} {raw[name]!r} is not supported, only {computed!r}")
    return kind


class Patches(nnx.Module):
    """Each patch of P x P pixels to a vector: a convolution whose stride is its own size.

    The kernel is [P, P, 3, D]. Windows that do not overlap make it one matrix product, which
    adapters see as a dense kernel of P * P * 3 inputs.
    """

    def __init__(self, size: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(_normal(rngs.params(), (size, size, 3, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, images: jax.Array) -> jax.Array:
        """`images` [B, H, W, 3] -> [B, H/P, W/P, D]."""
        kernel = self.kernel[...].astype(images.dtype)
        size = kernel.shape[0]
        batch, height, width, channels = images.shape
        split = images.reshape(batch, height // size, size, width // size, size, channels)
        y = jnp.einsum("bhpwqc,pqcd->bhwd", split, kernel)
        return y + jax.lax.broadcast(self.bias[...].astype(y.dtype), y.shape[:-1])


class Block(nnx.Module):
    """One layer: x + attn_scale * attn(norm(x)), then x + mlp_scale * mlp(norm(x))."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.attn_norm = LayerNorm(width, config.layer_norm_eps)
        self.attn = SelfAttention(width, config.num_attention_heads, rngs=rngs)
        self.mlp_norm = LayerNorm(width, config.layer_norm_eps)
        self.mlp = FeedForward(width, config.intermediate_size, _gelu, rngs=rngs)
        self.attn_scale = nnx.Param(jnp.ones((width,))) if config.layer_scale else None
        self.mlp_scale = nnx.Param(jnp.ones((width,))) if config.layer_scale else None

    def __call__(self, x: jax.Array, own: Virtual) -> jax.Array:
        """`x` [B, 1 + N, D] -> the next layer's x; virtual tokens of its `own` replace x's."""
        if own.tokens is not None:
            x = inserted(x[:, :1], own.tokens, x[:, 1 + own.length :])
        attended = self.attn(self.attn_norm(x), None, own.keys_values)
        x = x + _scaled(attended, self.attn_scale)
        return x + _scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)


class ViT(nnx.Module):
    """Patches and one class token through pre-norm layers; computes in the images' dtype."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patches = Patches(config.patch_size, config.hidden_size, rngs=rngs)
        self.cls = nnx.Param(_normal(rngs.params(), (config.hidden_size,), jnp.float32))
        places = 1 + (config.image_size // config.patch_size) ** 2
        shape = (places, config.hidden_size)
        self.positions = nnx.Param(_normal(rngs.params(), shape, jnp.float32))
        self.layers = stacked(functools.partial(Block, config), config.num_hidden_layers, rngs)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, images: jax.Array, virtual: Virtual = NONE) -> jax.Array:
        """`images` [B, H, W, 3] -> [B, 1 + N, D] after the final norm, the class token first.

        Virtual tokens stand between the class token and the patches, without positions, and leave
        no outputs.
        """
        patches = self.patches(images)
        batch, rows, columns, width = patches.shape
        cls = jax.lax.broadcast(self.cls[...].astype(patches.dtype), (batch, 1))
        x = jnp.concatenate([cls, patches.reshape(batch, -1, width)], axis=1)
        x = x + resample(self.positions[...], rows, columns).astype(x.dtype)[None]
        tokens = virtual.tokens
        if tokens is None:
            return self.norm(scan(self.layers, x, own=virtual))
        deep = tokens.ndim == 3
        x = inserted(x[:, :1], tokens[0] if deep else tokens, x[:, 1:])
        x = self.norm(scan(self.layers, x, own=virtual if deep else NONE))
        return jnp.concatenate([x[:, :1], x[:, 1 + virtual.length :]], axis=1)


def inserted(first: jax.Array, tokens: jax.Array, rest: jax.Array) -> jax.Array:
    """Tokens [n, D], the same for every row, between `first` [B, 1, D] and `rest` [B, N, D]."""
    tokens = each_row(tokens.astype(first.dtype), len(first))
    return jnp.concatenate([first, tokens, rest], axis=1)


def resample(positions: jax.Array, rows: int, columns: int) -> jax.Array:
    """Positions [1 + G * G, D] for a grid of another size [1 + rows * columns, D], bicubic.

    The class token's, which comes first, stays. This is torch's interpolation, not antialiased.
    """
    grid = round((positions.shape[0] - 1) ** 0.5)
    if (rows, columns) == (grid, grid):
        return positions
    down, across = cubic(grid, rows), cubic(grid, columns)
    places = positions[1:].reshape(grid, grid, -1)
    # Sums of products rather than dots: a position is added to its patch, it is no kernel.
    places = jnp.sum(down[:, :, None, None] * places[None], axis=1)
    places = jnp.sum(across[None, :, :, None] * places[:, None], axis=2)
    return jnp.concatenate([positions[:1], places.reshape(rows * columns, -1)])


def cubic(size: int, wanted: int) -> np.ndarray:
    """The matrix [wanted, size] that resamples `size` values to `wanted` by cubic convolution.

    Keys 1981, eq. 15 with a = -3/4; samples lie at pixels' centres, edges repeat.

    >>> cubic(2, 4)[1].tolist()
    [0.7734375, 0.2265625]
    """
    at = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    weights = np.zeros((wanted, size), np.float32)
    for tap in range(-1, 3):
        source = np.floor(at) + tap
        index = np.clip(source, 0, size - 1).astype(int)
        weights[np.arange(wanted), index] += _keys(np.abs(at - source))
    return weights


def _keys(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


def as_network(
    config: ViTConfig, params: dict[str, Any], source: "Source | None" = None
) -> Network:
    """Pure functions over a ViT's parameters: `apply(params, images)` -> hidden [B, 1 + N, D].

    Images are floats [B, H, W, 3] as `lora_jax.data.images.normalised` makes them, H and W any
    multiples of the patch size. `features` are the class token beside the mean patch [B, 2 * D].
    Both take `virtual` tokens (`lora_jax.prompts`) between class token and patches.

    >>> config = ViTConfig(12, 4, 6, 2, 3, 10)
    >>> vit = as_network(config, param_shapes(config))
    >>> jax.eval_shape(vit.apply, vit.params, jnp.zeros((2, 8, 12, 3))).shape
    (2, 7, 6)
    """
    graph = nnx.graphdef(_abstract(config))

    def apply(params: Mapping[str, Any], images: jax.Array, virtual: Virtual = NONE) -> jax.Array:
        _check_images(images, config.patch_size)
        return nnx.merge(graph, params)(images, virtual)

    def features(
        params: Mapping[str, Any], images: jax.Array, virtual: Virtual = NONE
    ) -> jax.Array:
        hidden = apply(params, images, virtual)
        return jnp.concatenate([hidden[:, 0], jnp.mean(hidden[:, 1:], axis=1)], axis=-1)

    shape = (2, config.image_size, config.image_size, 3)
    inputs = (jax.ShapeDtypeStruct(shape, jnp.float32),)
    return Network(apply, params, config, source, features=features, inputs=inputs)


def initialise_vit(config: ViTConfig, key: jax.Array) -> Network:
    """A ViT with fresh weights: normal of deviation 0.02, norms and scales one, biases zero."""

    def fresh(key: jax.Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(ViT(config, rngs=nnx.Rngs(key)), nnx.Param))

    return as_network(config, jax.jit(fresh)(key))


def param_shapes(config: ViTConfig) -> dict[str, Any]:
    """The parameter tree that `config` asks for, with ShapeDtypeStructs (float32) as leaves."""
    return nnx.to_pure_dict(nnx.state(_abstract(config), nnx.Param))


def _abstract(config: ViTConfig) -> ViT:
    return nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))


def _scaled(x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    if scale is None:
        return x
    return x * jax.lax.broadcast(scale[...].astype(x.dtype), x.shape[:-1])


def _check_images(images: jax.Array, patch: int) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[3] != 3:
        raise InputError(
            f"images have the shape {shape}; this model takes [batch, height, width, 3] "
            "(repeat a grey image's one channel)"
        )
    if shape[1] % patch or shape[2] % patch or not shape[1] * shape[2]:
        raise InputError(
            f"images are {shape[1]} x {shape[2]} pixels, no multiple of the patch size {patch}; "
            "resize them"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"images are {images.dtype}; this model takes floats, normalised as it was trained "
            "(lora_jax.data.images.normalised)"
        )
