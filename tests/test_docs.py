"""What the documents say is run: the README's Python, its commands' form, the notebooks."""

import doctest
import re
from pathlib import Path

import pytest
from readme import README, blocks

import lora_jax as lj

ROOT = README.parent


def test_the_readmes_python_runs_from_top_to_bottom():
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


def test_the_quickstart_is_two_lines():
    text = README.read_text()
    assert "## Quickstart" in text
    run, check = blocks("bash")[:2]
    for block in (run, check):
        assert len(block.strip().splitlines()) == 1 and "venv" in block and "pip install" in block
    assert "experiments.finetune" in run and "pytest" in check


def test_every_public_name_in_the_documents_exists():
    texts = [README.read_text(), *(p.read_text() for p in (ROOT / "notebooks").glob("*.ipynb"))]
    for name in re.findall(r"\blj\.([a-z_]+)\b", "\n".join(texts)):
        assert hasattr(lj, name), name


def test_docstrings_of_the_public_names_have_examples():
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("attach", "factored", "find_sites", "lora", "dora", "full", "Method"):
        assert any(test.examples for test in finder.find(getattr(lj, name))), name


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore")
def test_notebooks_run(path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    failures = [output for output in outputs if output.output_type == "error"]
    assert not failures


def test_notebooks_are_saved_with_their_outputs():
    for path in Path(ROOT / "notebooks").glob("*.ipynb"):
        assert '"image/png"' in path.read_text(), path
