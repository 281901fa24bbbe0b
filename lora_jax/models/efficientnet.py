"""EfficientNet-Lite in Flax NNX: inverted bottlenecks with batch normalisation.

Tan and Le 2019 (EfficientNet, table 1 and eq. 3), in the Lite form for phones: relu6, no
squeeze-and-excitation, and a stem, first and last stage that keep their depth at every size.
Letters: B batch, H height, W width, C channels, D features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.errors import InputError
from lora_jax.models.conv import BatchNorm, Conv2d
from lora_jax.models.layers import Linear
from lora_jax.models.network import Network


class Stage(NamedTuple):
    """A run of blocks: the first has the stride, each widens its input `expand` times."""

    repeats: int
    size: int
    """Of the depthwise kernel: 3 or 5."""
    stride: int
    expand: int
    channels: int


_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class EfficientNetConfig:
    """The sizes of an EfficientNet-Lite; `width` and `depth` scale those of `stages`."""

    width: float = 1.0
    depth: float = 1.0
    image_size: int = 224
    """Height and width, in pixels, of the images of pretraining; others work too."""
    classes: int = 1000
    """0 leaves out the classifier: the network's output is then its features."""
    stem: int = 32
    features: int = 1280
    stages: tuple[Stage, ...] = _STAGES
    eps: float = 1e-3
    rate: float = 0.01
    """By which stored statistics move towards a training batch's."""

    def channels(self, count: int) -> int:
        """`count` times the width, to a multiple of 8 that loses at most a tenth.

        >>> EfficientNetConfig(width=1.1).channels(24), EfficientNetConfig(width=0.3).channels(40)
        (24, 16)
        """
        wanted = count * self.width
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * wanted else rounded + 8

    def blocks(self) -> list[tuple[int, Stage]]:
        """Every block by its input channels, and as a stage of one repeat.

        >>> [c_in for c_in, _ in EfficientNetConfig().blocks()][:5]
        [32, 16, 24, 24, 40]
        """
        found, c_in = [], self.stem
        for number, stage in enumerate(self.stages):
            fixed = number in (0, len(self.stages) - 1)
            repeats = stage.repeats if fixed else math.ceil(stage.repeats * self.depth)
            c_out = self.channels(stage.channels)
            for repeat in range(repeats):
                stride = stage.stride if repeat == 0 else 1
                found.append((c_in, stage._replace(repeats=1, stride=stride, channels=c_out)))
                c_in = c_out
        return found


LITE0 = EfficientNetConfig()
LITE1 = EfficientNetConfig(depth=1.1, image_size=240)
LITE2 = EfficientNetConfig(width=1.1, depth=1.2, image_size=260)


class ConvNorm(nnx.Module):
    """norm(conv(x)), then relu6 unless `linear`."""

    def __init__(
        self,
        config: EfficientNetConfig,
        c_in: int,
        c_out: int,
        size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv2d(c_in, c_out, size, stride=stride, groups=groups, rngs=rngs)
        self.norm = BatchNorm(c_out, config.eps, config.rate)
        self.linear = linear

    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        """`x` [B, H, W, c_in] -> [B, H / stride, W / stride, c_out], rounded up."""
        x = self.norm(self.conv(x), training)
        return x if self.linear else jax.nn.relu6(x)


class Block(nnx.Module):
    """An inverted bottleneck (Sandler et al. 2018): widen, filter each channel, project.

    Its input is added where the shape allows it: at stride 1 and equal channels.
    """

    def __init__(
        self, config: EfficientNetConfig, c_in: int, stage: Stage, *, rngs: nnx.Rngs
    ) -> None:
        inner, c_out = c_in * stage.expand, stage.channels
        self.expand = ConvNorm(config, c_in, inner, rngs=rngs) if stage.expand > 1 else None
        self.depthwise = ConvNorm(
            config, inner, inner, stage.size, stride=stage.stride, groups=inner, rngs=rngs
        )
        self.project = ConvNorm(config, inner, c_out, linear=True, rngs=rngs)
        self.adds = stage.stride == 1 and c_in == c_out

    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        """`x` [B, H, W, c_in] -> [B, H / stride, W / stride, c_out], rounded up."""
        y = x if self.expand is None else self.expand(x, training)
        y = self.project(self.depthwise(y, training), training)
        return x + y if self.adds else y


class EfficientNet(nnx.Module):
    """Stem, blocks, a last widening, the mean over places, and a classifier if there is one."""

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs) -> None:
        blocks = config.blocks()
        self.stem = ConvNorm(config, 3, config.stem, 3, stride=2, rngs=rngs)
        self.blocks = nnx.List([Block(config, *block, rngs=rngs) for block in blocks])
        self.last = ConvNorm(config, blocks[-1][1].channels, config.features, rngs=rngs)
        sizes = (config.features, config.classes)
        self.classifier = Linear(*sizes, bias=True, rngs=rngs) if config.classes else None

    def features(self, images: jax.Array, training: bool = False) -> jax.Array:
        """`images` [B, H, W, 3] of values 0 to 255 -> float32 [B, D]."""
        x = (images.astype(jnp.float32) - 127) / 128
        x = self.stem(x, training)
        for block in self.blocks:
            x = block(x, training)
        return jnp.mean(self.last(x, training), axis=(1, 2))

    def __call__(self, images: jax.Array, training: bool = False) -> jax.Array:
        """`images` as in `features` -> logits [B, classes], or the features."""
        x = self.features(images, training)
        return x if self.classifier is None else self.classifier(x)


def network(config: EfficientNetConfig, params: dict[str, Any], state: dict[str, Any]) -> Network:
    """An EfficientNet-Lite with these parameters, at inference with this BatchNorm state.

    `apply(params, images)` gives logits [B, classes], or the features [B, D] if there are no
    classes. Images are uint8 or floats [B, H, W, 3], RGB from 0 to 255, of any height and width.
    """
    graph = nnx.graphdef(_abstract(config))

    def apply(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, state)(_checked(images))

    def features(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, state).features(_checked(images))

    side = config.image_size
    example = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    return Network(apply, params, config, state=state, features=features, inputs=(example,))


def apply_training(
    config: EfficientNetConfig, params: Mapping[str, Any], state: Mapping[str, Any], images: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Logits [B, classes] normalised by the batch's own statistics, and the state moved by them.

    >>> stages = (Stage(1, 3, 1, 1, 8),)
    >>> tiny = EfficientNetConfig(classes=5, stem=4, features=12, stages=stages)
    >>> net = initialise(tiny, jax.random.key(0))
    >>> images = jnp.zeros((2, 34, 30, 3), jnp.uint8)
    >>> logits, state = apply_training(tiny, net.params, net.state, images)
    >>> logits.shape, state["stem"]["norm"]["mean"].shape
    ((2, 5), (4,))
    """
    module = nnx.merge(nnx.graphdef(_abstract(config)), params, state)
    logits = module(_checked(images), training=True)
    return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def initialise(config: EfficientNetConfig, key: jax.Array) -> Network:
    """Fresh weights: kernels normal of variance 2 / fan out, norms one, biases zero."""

    def fresh(key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        return _parts(EfficientNet(config, rngs=nnx.Rngs(key)))

    return network(config, *jax.jit(fresh)(key))


def shapes(config: EfficientNetConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and the state that `config` asks for, with ShapeDtypeStructs as leaves."""
    return _parts(_abstract(config))


def _parts(module: EfficientNet) -> tuple[dict[str, Any], dict[str, Any]]:
    params, state = nnx.state(module, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def _abstract(config: EfficientNetConfig) -> EfficientNet:
    return nnx.eval_shape(lambda: EfficientNet(config, rngs=nnx.Rngs(0)))


def _checked(images: Any) -> jax.Array:
    images = jnp.asarray(images)
    pixels = images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or not pixels:
        raise InputError(
            f"images are [B, H, W, 3], uint8 or floats from 0 to 255; got {images.dtype} "
            f"{list(images.shape)}. Repeat a grey channel three times, put colours last"
        )
    return images
