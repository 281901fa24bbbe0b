"""The one exception for a user's mistake."""


class InputError(ValueError):
    """A mistake in what the user gave: a config, a pattern, a file, a shape.

    The message names the rule, the value, the place and the remedy. Command lines print it and
    exit with status 2; everything else is a fault of ours and keeps its traceback.

    >>> raise InputError("rank 0 is not positive; give rank >= 1")
    Traceback (most recent call last):
    lora_jax.errors.InputError: rank 0 is not positive; give rank >= 1
    """
