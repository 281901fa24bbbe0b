"""AdaLoRA between steps: importance of every triplet, a shrinking budget, masks, orthogonality."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.adapter import Trained
from lora_jax.dynamics.dynamics import Dynamics, under
from lora_jax.errors import InputError

Triplets = dict[str, jax.Array]  # a [*stack, d_in, r], e [*stack, r], b [*stack, r, d_out]


def adalora(
    *,
    steps: int | None = None,
    target_rank: int = 8,
    start: int | None = None,
    end: int | None = None,
    every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    gamma: float = 0.5,
    penalty: Literal["peft", "paper"] = "peft",
    sensitivity: Literal["reference", "pre_step"] = "reference",
) -> Dynamics:
    """The budget of all parameters under the method `adalora` falls to `target_rank` a matrix.

    A number `w` with gradient `g` has sensitivity `|w g|`, its moving average `m` (`beta1`) and the
    moving average `u` of `|sensitivity - m|` (`beta2`). A triplet's score is `m u` of its entry of
    `e`, plus the means of `m u` over its column of `a` and its row of `b`. Every `every` steps
    after `start`, the lowest scores over all matrices lose their entry of `e`, as many as the
    `budget` asks for; until the last `end` steps, in which that choice stays, they may come back.
    With `end = 0` the last choice is made after the last step. Every layer of a stack counts as a
    matrix. `start` and `end` are a tenth and a fifth of `steps` unless given.

    `gamma` weighs the orthogonality of the factors: with `penalty="peft"` (and the authors' code)
    the mean of `|a^T a - 1|_F` and `|b b^T - 1|_F` over all factors, with "paper" the sum of their
    squares. `sensitivity="reference"` takes `w` after the optimizer's update, as those do;
    "pre_step" where `g` was taken. Where all scores are equal, the first triplets stay; where all
    are zero, nothing is masked until the last choice. The state holds two numbers for each one
    that is trained.

    Raises InputError for a schedule without room to shrink, and, from the parameters, for a
    target above the rank that they start with and where nothing is under `adalora`.

    Source: Zhang et al. 2023, arXiv:2303.10512.

    >>> adalora(steps=100, target_rank=2).steps
    100
    """
    total, start, end = _schedule(steps, start, end, every)
    _check(target_rank, beta1, beta2, gamma, penalty, sensitivity)
    last = min(total - end, total - 1)  # after this step the choice stays

    def init(frozen: Any, trained: Trained) -> Any:
        owned = {path: trained[path] for path in under("adalora", frozen)}
        most, least = _sizes(owned, target_rank)
        if not owned or least > most:
            raise InputError(_misfit(most, least, target_rank, bool(owned)))
        zeros = [jax.tree.map(jnp.zeros_like, owned) for _ in range(2)]
        kept = {name: jnp.ones(t["e"].shape, bool) for name, t in _triplets(owned).items()}
        chosen = jnp.zeros((), bool)
        return {"mean": zeros[0], "spread": zeros[1], "kept": kept, "chosen": chosen}

    def orthogonality(state: Any, trained: Trained) -> jax.Array:
        held = _triplets({path: trained[path] for path in state["mean"]}).values()
        gaps = [_gaps(x) for t in held for x in (t["a"].mT, t["b"])]
        squares = jnp.concatenate([jnp.ravel(gap) for gap in gaps])
        if penalty == "paper":
            return gamma * jnp.sum(squares)
        return gamma * jnp.mean(_safe_sqrt(squares))

    def after(
        state: Any, step: jax.Array, grads: Trained, before: Trained, after: Trained
    ) -> tuple[Any, Trained]:
        weights = after if sensitivity == "reference" else before
        moved = _averaged(state, weights, grads, beta1, beta2)
        fresh = ~state["chosen"] & (step < total - end)
        mean, spread = (_where(fresh, moved[n], state[n]) for n in ("mean", "spread"))
        final = ~state["chosen"] & (step >= last)
        most, least = _sizes(mean, target_rank)
        table = jnp.asarray(budget(most, least, total, start, end))
        size = jnp.where(final, least, table[jnp.minimum(step, total)])
        keep = _chosen(_scores(mean, spread), most - size, final)
        due = final | ((step > start) & (step < last) & (step % every == 0))
        kept = _where(final, keep, state["kept"])
        held = state["chosen"] | final
        mask = jax.tree.map(lambda new, old: jnp.where(due, new, old | ~held), keep, kept)
        state = {"mean": mean, "spread": spread, "kept": kept, "chosen": held}
        return state, _masked(after, mask)

    return Dynamics("adalora", init, after, orthogonality, steps=total)


def budget(most: int, least: int, steps: int, start: int, end: int) -> np.ndarray:
    """How many triplets all matrices keep together after step t, for `t = 0 .. steps`.

    `most` up to `start`, `least` in the last `end` steps, and between them
    `least + (most - least) (1 - (t - start) / (steps - end - start))^3`, rounded down.

    >>> budget(144, 96, steps=1000, start=100, end=200)[[100, 101, 150, 275, 450, 625]].tolist()
    [144, 143, 134, 116, 102, 96]
    """
    left = [1 - (t - start) / (steps - end - start) for t in range(steps - end + 1)]
    falling = [int((most - least) * c**3 + least) for c in left]
    return np.array([most] * (start + 1) + falling[start + 1 :] + [least] * end, np.int32)


def _triplets(trained: Trained) -> dict[str, Triplets]:
    """The arrays of each matrix or stack, by path, and by layer where ranks differ."""
    found: dict[str, Triplets] = {}
    for path, arrays in trained.items():
        layers = {path: arrays} if "e" in arrays else {f"{path}/{i}": arrays[i] for i in arrays}
        found |= layers
    return found


def _averaged(state: Any, weights: Trained, grads: Trained, beta1: float, beta2: float) -> Any:
    """Both moving averages after one more sensitivity."""
    paths = state["mean"]
    own, slope = ({path: values[path] for path in paths} for values in (weights, grads))
    now = jax.tree.map(lambda w, g: jnp.abs(w * g), own, slope)
    mean = jax.tree.map(lambda m, i: beta1 * m + (1 - beta1) * i, state["mean"], now)
    off = jax.tree.map(lambda i, m: jnp.abs(i - m), now, mean)
    spread = jax.tree.map(lambda u, d: beta2 * u + (1 - beta2) * d, state["spread"], off)
    return {"mean": mean, "spread": spread}


def _scores(mean: Trained, spread: Trained) -> dict[str, jax.Array]:
    """The score of every triplet, `[*stack, r]`."""
    both = _triplets(jax.tree.map(jnp.multiply, mean, spread))
    return {
        name: t["e"] + jnp.mean(t["a"], axis=-2) + jnp.mean(t["b"], axis=-1)
        for name, t in both.items()
    }


def _chosen(scores: dict[str, jax.Array], drop: jax.Array, final: jax.Array) -> Any:
    """Which triplets stay when the `drop` lowest scores go, with all that tie with them."""
    pooled, restore = jax.flatten_util.ravel_pytree(scores)
    threshold = jnp.where(drop > 0, jnp.sort(pooled)[jnp.maximum(drop - 1, 0)], -jnp.inf)
    level, first = jnp.all(pooled == pooled[0]), jnp.arange(pooled.size) < pooled.size - drop
    idle = level & (pooled[0] == 0) & ~final
    keep = jnp.where(level, first, pooled > threshold) | idle
    return jax.tree.map(lambda x: x > 0, restore(keep.astype(pooled.dtype)))


def _masked(trained: Trained, mask: dict[str, jax.Array]) -> Trained:
    """`trained` without the entries of `e` that the mask leaves out."""

    def cut(name: str, t: Triplets) -> Triplets:
        return {**t, "e": jnp.where(mask[name], t["e"], 0)} if name in mask else t

    return {
        path: cut(path, arrays)
        if path in mask
        else {i: cut(f"{path}/{i}", x) if isinstance(x, dict) else x for i, x in arrays.items()}
        for path, arrays in trained.items()
    }


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _sizes(trained: Trained, target_rank: int) -> tuple[int, int]:
    """The sum of ranks at the start, and of the target's."""
    singles = [t["e"].shape for t in _triplets(trained).values()]
    matrices = sum(tree.count(np.empty(shape[:-1])) for shape in singles)
    return sum(tree.count(np.empty(shape)) for shape in singles), target_rank * matrices


def _gaps(rows: jax.Array) -> jax.Array:
    """`|x x^T - 1|_F^2` of every matrix `x: [*stack, r, d]`."""
    gram = rows @ rows.mT
    unit = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.sum(jnp.square(gram - unit), axis=(-2, -1))


def _safe_sqrt(square: jax.Array) -> jax.Array:
    """The root, with gradient zero at zero."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _schedule(
    steps: int | None, start: int | None, end: int | None, every: int
) -> tuple[int, int, int]:
    """The steps in all, before the budget falls, and after."""
    if steps is None or steps < 1:
        raise InputError(
            f"adalora(steps={steps!r}): the budget falls along a schedule; give the run's length"
        )
    start = steps // 10 if start is None else start
    end = steps // 5 if end is None else end
    if min(start, end) < 0 or every < 1:
        raise InputError(f"adalora(start={start}, end={end}, every={every}): counts of steps")
    if start >= steps - end:
        raise InputError(
            f"adalora(start={start}, end={end}): no step of {steps} is left between them to shrink "
            "the budget in; lower one, or train longer"
        )
    return steps, start, end


def _check(
    target_rank: int, beta1: float, beta2: float, gamma: float, penalty: str, sensitivity: str
) -> None:
    if target_rank < 1:
        raise InputError(f"adalora(target_rank={target_rank}): give the mean rank to end with")
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise InputError(f"adalora(beta1={beta1}, beta2={beta2}): averages need them within (0, 1)")
    if not gamma >= 0:
        raise InputError(f"adalora(gamma={gamma}): a weight of orthogonality; give 0 or more")
    for name, value, known in (
        ("penalty", penalty, ("peft", "paper")),
        ("sensitivity", sensitivity, ("reference", "pre_step")),
    ):
        if value not in known:
            raise InputError(f"adalora({name}={value!r}): unknown; give one of {known}")


def _misfit(most: int, least: int, target_rank: int, any_there: bool) -> str:
    if not any_there:
        return (
            "dynamics.adalora shrinks parameters under the method adalora, and there is none; "
            "attach adalora(rank=12), or leave the dynamics out"
        )
    return (
        f"adalora(target_rank={target_rank}): the ranks add up to {most} at the start and to "
        f"{least} at the end; give a target below the method's rank"
    )
