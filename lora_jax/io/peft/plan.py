"""One method per module of the base -> the simplest adapter_config.json that PEFT reads as that."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.errors import InputError
from lora_jax.io.peft.config import methods_of
from lora_jax.io.peft.match import Config, is_suffix, targeted
from lora_jax.method import Method
from lora_jax.methods.lora import scale_of


def config_of(
    methods: Mapping[str, Method], modules: Collection[str], base_name: str
) -> dict[str, Any]:
    """The simplest adapter_config.json with which PEFT finds exactly `methods`.

    `methods` maps the adapted modules to theirs, `modules` are all modules of the base. Short names
    (`q_proj`) where every module so named is adapted alike, layers_to_transform where whole layers
    are left out, full names where nothing shorter is exact. Raises InputError for a method that has
    no place in PEFT's LoRA format.
    """
    factored = {name: method for name, method in methods.items() if method.name != "full"}
    _check_expressible(factored)
    whole = sorted(set(methods) - set(factored))
    rslora = all(method.hyper["rslora"] for method in factored.values())
    ranks = {name: method.hyper["rank"] for name, method in factored.items()}
    alphas = {name: _alpha(method, rslora) for name, method in factored.items()}
    first = next(iter(factored.values()))
    rank, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern(alphas)
    config: dict[str, Any] = {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if first.hyper.get("init") == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": max(method.hyper["dropout"] for method in factored.values()),
        "modules_to_save": whole or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": sorted(factored),
        "task_type": "CAUSAL_LM",
        "use_dora": first.name == "dora",
        "use_rslora": rslora,
    }
    config |= _shortest_targets(config, set(factored), modules)
    return _checked(config, methods, modules)


def _check_expressible(factored: Mapping[str, Method]) -> None:
    if not factored:
        raise InputError(
            "PEFT's LoRA format needs at least one lora or dora site and this adapter has none; "
            "save the trained tree as a checkpoint instead"
        )
    for module, method in factored.items():
        if method.name not in ("lora", "dora"):
            raise InputError(
                f"method {method.name!r} on {module!r} has no place in PEFT's LoRA format; "
                "merge it, or save the trained tree as a checkpoint"
            )
    if len({method.name for method in factored.values()}) > 1:
        example = {method.name: module for module, method in factored.items()}
        raise InputError(
            f"PEFT has one use_dora for all modules; here {example['lora']!r} has lora and "
            f"{example['dora']!r} has dora; use one of them everywhere"
        )


def _alpha(method: Method, rslora: bool) -> int | float:
    """Alpha under the adapter's one use_rslora, as an integer where it is one."""
    alpha = float(method.hyper["alpha"])
    if method.hyper["rslora"] and not rslora:  # alpha / sqrt(r) written as alpha' / r
        alpha *= method.hyper["rank"] ** 0.5
    return int(alpha) if alpha.is_integer() else alpha


def _default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value and a pattern for the rest, by short name where all of it agree."""
    counts = Counter(values.values())
    default = min(counts, key=lambda value: (-counts[value], value))
    pattern = {}
    for module, value in sorted(values.items()):
        short = module.rsplit(".", 1)[-1]
        alike = {v for name, v in values.items() if is_suffix([short], name)}
        if value != default:
            pattern[short if len(alike) == 1 else module] = value
    return default, dict(sorted(pattern.items()))


def _shortest_targets(
    config: Config, adapted: set[str], modules: Collection[str]
) -> dict[str, Any]:
    short = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    layers = sorted({int(n) for name in adapted for n in re.findall(r"\.(\d+)\.", name)[:1]})
    choices: list[dict[str, Any]] = [
        {"target_modules": short},
        {"target_modules": short, "layers_to_transform": layers or None},
        {"target_modules": sorted(adapted)},
    ]
    return next((c for c in choices if _finds({**config, **c}, modules) == adapted), choices[-1])


def _finds(config: Config, modules: Iterable[str]) -> set[str]:
    return {module for module in modules if targeted(config, module)}


def _checked(
    config: dict[str, Any], methods: Mapping[str, Method], modules: Collection[str]
) -> dict[str, Any]:
    """The config, once it is seen to mean `methods` and nothing else."""
    found = methods_of(config, modules, [])
    wrong = sorted(set(found) ^ set(methods)) or [
        name for name in methods if not same_function(found[name], methods[name])
    ]
    if wrong:
        raise InputError(
            f"no adapter_config.json of PEFT means this adapter: its name matching cannot tell "
            f"{wrong[0]!r} from the others; adapt modules whose names do not contain each other's"
        )
    return config


def same_function(x: Method, y: Method) -> bool:
    """Whether two methods make the same weight of the same a and b: name, rank and scale agree.

    >>> from lora_jax.methods import lora
    >>> same_function(lora(rank=4, alpha=8.0), lora(rank=4, alpha=4.0, rslora=True))
    True
    """
    if x.name != y.name or x.hyper.get("rank") != y.hyper.get("rank"):
        return False
    return x.name == "full" or math.isclose(scale(x), scale(y), rel_tol=1e-6)


def scale(method: Method) -> float:
    """The factor s before a @ b: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return scale_of(method.hyper["rank"], method.hyper["alpha"], method.hyper["rslora"])
