"""ReLoRA: fold the update into the base every so often, and start anew."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import tree
from lora_jax.adapter import Adapted, Trained, adapted, bind, is_adapted, stacked, start_of, typed
from lora_jax.errors import InputError
from lora_jax.method import Method
from lora_jax.operands import lifted


def restart(key: jax.Array, frozen: Any, trained: Trained) -> tuple[Any, Trained]:
    """The same function with every update folded into its kernel, and fresh factors.

    The sum is taken in float32 and the kernel cast once, so where a fresh adapter changes nothing,
    the function changes by one rounding of the kernel. Parameters trained by themselves (`full`)
    go on as they are. May be compiled; the given trees stay whole.

    Raises InputError for kernels that have no array of their own to fold into, and for layers that
    share factors.
    """
    nodes = {p: node for p, node in adapted(frozen).items() if node.site is not None}
    for path, node in nodes.items():
        _check(path, node)
    weights = {path: node.weight() for path, node in adapted(bind(frozen, trained)).items()}
    made = {p: _fresh(_folded(key, p), node, weights[p]) for p, node in nodes.items()}
    anew = tree.replace(frozen, {path: node for path, (node, _) in made.items()}, is_adapted)
    return anew, {**trained, **{path: own for path, (_, own) in made.items()}}


@dataclass(frozen=True)
class Restart:
    """What `fit` calls between steps: restarts the adapters after every `every` steps."""

    key: jax.Array
    optimizer: optax.GradientTransformation
    every: int
    prune: float
    again: Callable[..., Any]

    def __call__(self, state: Any, frozen: Any) -> tuple[Any, Any]:
        """The state and the frozen tree for the next step."""
        step = int(state.step)
        if step % self.every:
            return state, frozen
        frozen, trained = self.again(jax.random.fold_in(self.key, step), frozen, state.trained)
        kept = trimmed(self.optimizer, state.opt_state, self.prune)
        return state._replace(trained=trained, opt_state=kept), frozen


def relora(
    key: jax.Array, optimizer: optax.GradientTransformation, *, every: int, prune: float = 0.99
) -> Restart:
    """Merge and restart every `every` steps: the hook `between` of `train.fit`.

    A sum of updates of rank r may have any rank. The optimizer's moments lose the share `prune` of
    their entries that is smallest (1: all), since they belong to the old factors; follow every
    restart with a short warm-up (`rewarmed`). What is trained then belongs to the frozen tree that
    `fit` returns, not to the one that it was given.

    Raises InputError for `every` below 1 and a share outside [0, 1].

    Source: Lialin et al. 2023, arXiv:2307.05695.
    """
    if every < 1:
        raise InputError(f"relora(every={every}): restart after how many steps? give 1 or more")
    if not 0 <= prune <= 1:
        raise InputError(f"relora(prune={prune}): the share of moments to drop lies in [0, 1]")
    return Restart(typed(key), optimizer, every, prune, jax.jit(restart))


def trimmed(optimizer: optax.GradientTransformation, opt_state: Any, share: float) -> Any:
    """An optimizer's state without the smallest `share` of every moment; its counts go on.

    >>> adam = optax.adam(0.1)
    >>> state = adam.init(jnp.ones(4))
    >>> _, state = adam.update(jnp.array([1.0, -4.0, 2.0, 3.0]), state)
    >>> [round(x, 1) for x in trimmed(adam, state, 0.5)[0].mu.tolist()]
    [0.0, -0.4, 0.0, 0.3]
    """

    def cut(moment: jax.Array) -> jax.Array:
        size = jnp.abs(moment)
        order = jnp.argsort(jnp.argsort(size.ravel())).reshape(size.shape)
        return jnp.where(order >= round(share * size.size), moment, 0)

    return optax.tree_utils.tree_map_params(optimizer, cut, opt_state)


def rewarmed(optimizer: Any, *, every: int, warmup: int) -> Any:
    """An `Optimizer` whose rate rises anew over `warmup` steps after every `every` steps.

    Steps `s >= every` are scaled by `min(1, (s mod every + 1) / (warmup + 1))`, decay included.

    >>> from lora_jax.train import adamw
    >>> slow = rewarmed(adamw(steps=8, learning_rate=1.0, final=1.0), every=4, warmup=1)
    >>> [float(slow.schedule(step)) for step in (0, 3, 4, 5)]
    [1.0, 1.0, 0.5, 1.0]
    """
    if not 0 <= warmup < every:
        raise InputError(f"rewarmed(every={every}, warmup={warmup}): warm up in fewer steps")

    def share(step: Any) -> Any:
        rising = jnp.minimum(1.0, (step % every + 1) / (warmup + 1))
        return jnp.where(step < every, 1.0, rising)

    transform = optax.chain(optimizer.transform, optax.scale_by_schedule(share))
    schedule = optimizer.schedule
    return optimizer._replace(transform=transform, schedule=lambda s: schedule(s) * share(s))


def _fresh(key: jax.Array, node: Adapted, leaf: jax.Array) -> tuple[Adapted, dict[str, Any]]:
    """A node over another kernel, with factors as at the start."""
    site = node.site
    assert site is not None
    w, keys = site.view.matrix(leaf), jax.random.split(key, site.stack)
    if isinstance(node.methods, Method):
        frozen, trained = lifted(start_of(node.methods, site), site.stack)(keys, w)
    else:
        frozen, trained = _fresh_layers(node, keys, w)
    kernel = leaf if frozen["w"] is w else site.view.leaf(frozen["w"])
    return replace(node, frozen=frozen | {"w": kernel}), trained


def _fresh_layers(node: Adapted, keys: jax.Array, w: jax.Array) -> tuple[Any, Any]:
    """Frozen and trained arrays where every layer has its own method."""
    assert node.site is not None and not isinstance(node.methods, Method)
    each = zip(node.methods, keys.reshape(-1), w.reshape(-1, *w.shape[-2:]), strict=True)
    pairs = [start_of(method or node.method, node.site)(k, x) for method, k, x in each]
    frozen = stacked([frozen for frozen, _ in pairs], node.site.stack)
    parts = {str(i): own for i, (_, own) in enumerate(pairs)}
    idle = {i: own for i, own in parts.items() if i in node.frozen["idle"]}
    return frozen | {"idle": idle}, {i: own for i, own in parts.items() if i not in idle}


def _check(path: str, node: Adapted) -> None:
    if "w" not in node.frozen or node.method.data is not None:
        raise InputError(
            f"'{path}' is under {node.method!r}, whose base cannot take up an update; restart "
            "methods over a plain kernel, such as lora(rank=8)"
        )
    if node.pool:
        raise InputError(
            f"'{path}' shares arrays with other parameters, and a restart draws factors for each "
            "alone; give it a method of its own"
        )


def _folded(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(typed(key), zlib.crc32(path.encode()))
