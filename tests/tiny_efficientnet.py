"""An EfficientNet-Lite of three stages, and images for it."""

import numpy as np
from flax.traverse_util import flatten_dict

from lora_jax.models.efficientnet import EfficientNetConfig, Stage, shapes
from lora_jax.models.load_efficientnet import shape_in_torch, to_torch

CONFIG = EfficientNetConfig(
    image_size=20,
    classes=5,
    stem=6,
    features=12,
    stages=(Stage(1, 3, 1, 1, 8), Stage(2, 5, 2, 2, 16), Stage(1, 3, 2, 3, 24)),
)


def torch_shapes():
    """Shapes of a torch state_dict of CONFIG, by name."""
    params, state = shapes(CONFIG)
    leaves = flatten_dict(params) | flatten_dict(state)
    return {to_torch(path): shape_in_torch(leaf.shape) for path, leaf in leaves.items()}


def images(dtype=np.uint8):
    """Three random images of 19 x 23 pixels."""
    return np.random.default_rng(2).integers(0, 256, (3, 19, 23, 3)).astype(dtype)
