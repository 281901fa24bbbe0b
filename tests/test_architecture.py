"""Who may import whom, read from the source itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module or package of ours, and the ones it may import. `errors` is free to all.
MAY = {
    "errors": set(),
    "tree": set(),
    "fused": set(),
    "method": set(),
    "frameworks": set(),
    "tracing": set(),
    "operands": {"tracing"},
    "recorder": {"tracing"},
    "table": {"tree", "sites"},  # sites as a type only
    "sites": {"tree", "fused", "tracing", "recorder", "table"},
    "select": {"sites"},
    "adapter": {"tree", "fused", "method", "operands", "sites"},
    "attachment": {"tree", "method", "operands", "sites", "adapter"},
    "factoring": {"fused", "method", "tracing", "operands", "recorder", "sites", "adapter"},
    "transform": {"tree", "fused", "tracing", "adapter", "factoring"},
    "inits": {"method"},
    "methods": {"method", "tree", "torch_random", "inits"},
    "quant": {"method", "operands"},
    "torch_random": set(),
    "models": {"io"},
    "prompts": {"models"},
    "data": {"io"},
    "generate": set(),
    "evaluate": {"data"},
    "io": {
        *("tree", "method", "methods", "torch_random", "operands", "sites", "adapter"),
        *("attachment", "models", "prompts", "quant"),
    },
    "dynamics": {"tree", "method", "operands", "adapter"},
    "optim": {"tree", "method", "sites", "adapter"},
    "calibrate": {"tree", "method", "inits", "sites", "adapter", "attachment", "transform"},
    "compose": {"tree", "fused", "method", "methods", "operands", "sites", "adapter"},
    "analysis": set(),
    "testing": {
        *("tree", "method", "sites", "select", "frameworks", "adapter", "attachment", "transform"),
        "io",
    },
    "train": {"tree", "method", "sites", "adapter", "transform", "evaluate", "dynamics"},
    "lora_drop": {
        *("tree", "method", "methods", "sites", "adapter", "attachment", "transform", "train"),
        *("calibrate", "operands"),
    },
}  # fmt: skip


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(file):
    return file.relative_to(ROOT / "lora_jax").parts[0].removesuffix(".py")


PARTS = sorted({part_of(file) for file in (ROOT / "lora_jax").rglob("*.py")} - {"__init__"})


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part):
    allowed = MAY[part] | {"errors", part}
    for file in (ROOT / "lora_jax").rglob("*.py"):
        if part_of(file) != part:
            continue
        for name in imports(file):
            if name.startswith("lora_jax.") and (target := name.split(".")[1]) in PARTS:
                assert target in allowed, f"{file.name} of {part} imports {target}"


def test_only_the_tests_know_torch_and_only_public_jax_is_used():
    for folder in ("lora_jax", "experiments", "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in imports(file):
                top = name.split(".")[0]
                allowed = file.name == "bench_workers.py"  # times our peer beside us
                assert allowed or top not in {"torch", "transformers", "peft"}, f"{file}: {name}"
                assert "jax._src" not in name, f"{file}: {name}"
                assert top != "pickle", f"{file}: {name}"  # pickletools reads, and runs nothing


def test_configs_import_ml_collections_only():
    for file in (ROOT / "configs").rglob("*.py"):
        assert {name.split(".")[0] for name in imports(file)} <= {"ml_collections", "__future__"}


def test_no_module_is_long():
    for folder in ("lora_jax", "experiments", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 400, file


def test_every_public_name_is_documented():
    for file in (ROOT / "lora_jax").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            assert not public or ast.get_docstring(node), f"{file}: {node.name}"
