"""LoRA-GA: the first update follows the gradient of full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.inits.spectral import leading
from lora_jax.inits.start import Factors, Start, check_datum, check_rank

Sides = tuple[jax.Array, jax.Array]
_DIRECTIONS: dict[str, Callable[[int], Sides]] = {
    "ArBr": lambda r: (jnp.arange(1, 2 * r, 2), jnp.arange(0, 2 * r, 2)),
    "A2rBr": lambda r: (jnp.arange(r, 2 * r), jnp.arange(r)),
    "ArB2r": lambda r: (jnp.arange(r), jnp.arange(r, 2 * r)),
}


def lora_ga(
    gradients: Mapping[str, jax.Array] | None = None,
    direction: str = "ArB2r",
    gamma: float = 16.0,
    variant: str = "paper",
) -> Start:
    """`a = z v_i`, `b = z u_j^T` of the kernel's gradient `g = v diag(s) u^T`.

    `z = d_out^(1/4) / sqrt(gamma)`; `i` and `j` are `rank` components each of the first
    `2 rank`, as `direction` says: "ArB2r" (`i` the first half, `j` the second), "A2rBr" (the other
    way round), "ArBr" (by turns) or "random". So `a^T a = b b^T = z^2`, and the base keeps
    `w - scale a b`. `gradients` come from `calibrate.kernel_gradients`. The decomposition takes 4
    rounds of subspace iteration with `4 rank` vectors. `variant="peft"` is PEFT's: `a = v_i`,
    `b = z s_j u_j^T`, and "random" one set for both sides. The paper has `rslora=True`.

    Raises InputError for an unknown direction or variant, a gamma that is not positive, and a rank
    above `min(d_in, d_out) / 2`.

    Source: Wang et al. 2024, arXiv:2407.05000.
    """
    _check(direction, gamma, variant)

    def draw(key: jax.Array, w: jax.Array, rank: int, scale: float, grad: jax.Array) -> Factors:
        check_rank("lora_ga", rank, w, needed=2 * rank)
        check_datum("lora_ga", grad, w.shape, "the gradient")
        drawn, chosen = jax.random.split(key)
        v, s, ut = leading(drawn, grad, min(4 * rank, *w.shape), rounds=4)
        i, j = _sides(chosen, direction, rank, variant)
        z = w.shape[1] ** 0.25 / gamma**0.5
        if variant == "peft":
            return v[:, i], z * s[j, None] * ut[j]
        return z * v[:, i], z * ut[j]

    return Start(
        "lora_ga", draw, residual=True, wants="kernel_gradients", data=dict(gradients or {})
    )


def _sides(key: jax.Array, direction: str, rank: int, variant: str) -> Sides:
    """Which components go to `a` and which to `b`."""
    if direction != "random":
        return _DIRECTIONS[direction](rank)
    order = jax.random.permutation(key, 2 * rank)
    return order[:rank], order[:rank] if variant == "peft" else order[rank:]


def _check(direction: str, gamma: float, variant: str) -> None:
    if direction not in (*_DIRECTIONS, "random"):
        known = ", ".join(map(repr, (*_DIRECTIONS, "random")))
        raise InputError(f"lora_ga(direction={direction!r}): unknown; give one of {known}")
    if not gamma > 0:
        raise InputError(f"lora_ga(gamma={gamma!r}): it divides the scale; give gamma > 0")
    if variant not in ("paper", "peft"):
        raise InputError(f"lora_ga(variant={variant!r}): unknown; give 'paper' or 'peft'")
