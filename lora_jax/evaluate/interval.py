"""How sure an accuracy is."""

import math


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a proportion, 95 % by default.

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 % and 100 %
    (E. B. Wilson, 1927).

    >>> [round(bound, 3) for bound in wilson(89, 100)]
    [0.814, 0.937]
    """
    if total <= 0:
        raise ValueError(f"an interval needs at least one trial, got {total}")
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    # At 0 and at 100 % one bound is the share itself, up to rounding.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
