"""The model card of an adapter: README.md with the front matter that the Hugging Face hub reads.

What is not known is left out, never a placeholder; the same facts give the same bytes.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, TypedDict

from lora_jax.errors import InputError


class Metric(TypedDict, total=False):
    """One measured number, before and after training; `interval` is the 95 % one of `after`."""

    name: str
    before: float
    after: float
    interval: tuple[float, float]
    examples: int


class Card(TypedDict, total=False):
    """What a run knows about its adapter. Every field may be missing."""

    title: str
    summary: str
    license: str
    language: str
    tags: Sequence[str]
    base: str  # where the base was read from, as given
    base_sha256: str
    base_license: str
    seed: int
    data: str
    data_sha256: str
    data_license: str
    examples: Mapping[str, int]  # split -> number of examples
    hyper: Mapping[str, Any]  # optimiser and schedule, name -> value
    metrics: Sequence[Metric]
    merge_error: float  # largest |merged - factored| logit over the largest |logit|
    trainable: int
    total: int
    limits: str
    versions: Mapping[str, str]
    date: str


Rows = Sequence[tuple[str, Any]]


def model_card(
    base_name: str,
    sites: Rows,
    card: Card,
    *,
    task_type: str | None = "CAUSAL_LM",
    virtual: bool = False,
) -> str:
    """The text of README.md: front matter, then one section for each thing that is known.

    `base_name` is what PEFT calls the base (base_model_name_or_path); `sites` are rows of target
    and method, already in words. `task_type` is PEFT's word for what the base does, and `virtual`
    says that virtual tokens are saved and no adapter: both tell how to load it. Raises InputError
    for a field that no card has.

    >>> print(model_card("org/base", [("q_proj", "lora, rank 4")], {"seed": 0}).splitlines()[1])
    base_model: "org/base"
    """
    _check_fields(card)
    sections = [
        _front_matter(base_name, card, _TASKS.get(task_type or "", ("", "AutoModel"))[0]),
        f"# {card.get('title') or 'Adapter for ' + base_name}",
        card.get("summary", ""),
        _section("Base", _table(_base_rows(base_name, card))),
        _section("Adapted", _table([("modules", "method"), *sites], header=True), _count(card)),
        _section("Data", _table(_data_rows(card))),
        _section("Training", _table(_training_rows(card))),
        _section("Results", _results(card), _merge_error(card)),
        _section("Limits", card.get("limits", "")),
        _section("How to use", _how_to_use(base_name, card, task_type or "", virtual)),
        _section("Versions", _table(sorted(card.get("versions", {}).items()))),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def versions() -> dict[str, str]:
    """The versions of this library and of JAX, where they are installed as distributions."""
    found = {}
    for name, distribution in (("lora_jax", "lora-jax"), ("jax", "jax")):
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:  # run from a checkout
            continue
    return found


def _check_fields(card: Card) -> None:
    known = list(Card.__annotations__)
    for field in card:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"; nearest: {near[0]!r}" if near else f"; known: {', '.join(known)}"
            raise InputError(f"a model card has no field {field!r}{hint}")


def _front_matter(base_name: str, card: Card, pipeline: str) -> str:
    """YAML; every value is written as JSON, which is YAML too, so nothing needs escaping."""
    tags = sorted({"peft", "lora_jax", *card.get("tags", ())})
    fields: dict[str, Any] = {
        # the hub refuses a base_model that is no repository's name
        "base_model": base_name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_name) else None,
        "library_name": "peft",
        "pipeline_tag": pipeline or None,
        "license": card.get("license"),
        "language": card.get("language"),
        "tags": tags,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _section(title: str, *parts: str) -> str:
    body = "\n\n".join(part for part in parts if part)
    return f"## {title}\n\n{body}" if body else ""


def _table(rows: Rows, header: bool = False) -> str:
    known = [(name, value) for name, value in rows if value is not None]
    if len(known) <= header:
        return ""
    (first, second), body = (known[0], known[1:]) if header else (("", ""), known)
    lines = [f"| {first} | {second} |", "|---|---|"]
    return "\n".join(lines + [f"| {_cell(name)} | {_cell(value)} |" for name, value in body])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _base_rows(base_name: str, card: Card) -> Rows:
    return [
        ("name", base_name),
        ("read from", card.get("base")),
        ("sha256 of the weights", card.get("base_sha256")),
        ("license", card.get("base_license")),
    ]


def _data_rows(card: Card) -> Rows:
    splits = [f"{split} {count}" for split, count in card.get("examples", {}).items()]
    return [
        ("data", card.get("data")),
        ("sha256", card.get("data_sha256")),
        ("license", card.get("data_license")),
        ("examples", ", ".join(splits) or None),
    ]


def _training_rows(card: Card) -> Rows:
    rows = [("seed", card.get("seed")), ("date", card.get("date"))]
    return rows + list(card.get("hyper", {}).items())


def _count(card: Card) -> str:
    if "trainable" not in card:
        return ""
    trained, total = card["trainable"], card.get("total")
    share = f" of {total:,} ({100 * trained / total:.4g} %)" if total else ""
    return f"{trained:,} trained parameters{share}."


def _results(card: Card) -> str:
    metrics = card.get("metrics", ())
    if not metrics:
        return ""
    lines = ["| metric | before | after | 95 % interval | examples |", "|---|---|---|---|---|"]
    return "\n".join(lines + [_result(metric) for metric in metrics])


def _result(metric: Metric) -> str:
    interval = " to ".join(f"{bound:.4g}" for bound in metric.get("interval", ()))
    cells = [metric.get("name", ""), metric.get("before", ""), metric.get("after", ""), interval]
    return "| " + " | ".join(_cell(cell) for cell in [*cells, metric.get("examples", "")]) + " |"


def _merge_error(card: Card) -> str:
    if "merge_error" not in card:
        return ""
    error = card["merge_error"]
    return f"Largest difference of the merged model's logits, relative to the largest: {error:.3g}."


def _how_to_use(base_name: str, card: Card, task_type: str, virtual: bool) -> str:
    source = card.get("base") or base_name
    note = "" if source == base_name else _OTHER_BASE
    auto = _TASKS.get(task_type, ("", "AutoModel"))[1]
    ours = _VIRTUAL[task_type if task_type in _VIRTUAL else "CAUSAL_LM"] if virtual else _ADAPTER
    names = {"base": json.dumps(base_name), "source": json.dumps(source), "auto": auto}
    return (_PEFT + ours).format(**names) + note


# PEFT's task types -> the hub's word for them, and the class that loads such a base.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
}


_OTHER_BASE = """

The adapter was trained, and the results measured, on the weights named under "read from". Weights
of the same name from elsewhere may differ from them (a quantised file is not its original), and
the results with them."""

_PEFT = """With peft and transformers:

```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained({base}), "THIS_FOLDER")
```

With lora_jax:

"""

_ADAPTER = """```python
import jax
import jax.numpy as jnp
import lora_jax as lj
from lora_jax.io.peft import load_peft
from lora_jax.models import load

model = load({source})
ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
sites = lj.find_sites(model.apply, model.params, ids)
frozen, trained = load_peft("THIS_FOLDER", model.params, sites)
logits = lj.factored(model.apply)(lj.bind(frozen, trained), jnp.array([[1, 2, 3]]))
```"""

_VIRTUAL = {
    "CAUSAL_LM": """```python
import jax.numpy as jnp
from lora_jax.io.peft import load_prompt
from lora_jax.models import load

model = load_prompt("THIS_FOLDER", load({source}))
logits = model.apply(model.params, jnp.array([[1, 2, 3]]))
```""",
    "FEATURE_EXTRACTION": """```python
import jax.numpy as jnp
from lora_jax.io.peft import load_prompt
from lora_jax.models import load_bert

network = load_prompt("THIS_FOLDER", load_bert({source}))
features = network.features(network.params, jnp.array([[1, 2, 3]]))
```""",
    "SEQ_CLS": """```python
import jax
import jax.numpy as jnp
from lora_jax.io.peft import load_prompt
from lora_jax.models import load_bert, with_head

CLASSES = 2  # as many as the classifier in this folder has
network = with_head(load_bert({source}, "pooler"), CLASSES, jax.random.key(0))
network = load_prompt("THIS_FOLDER", network)
logits = network.apply(network.params, jnp.array([[1, 2, 3]]))
```""",
}
