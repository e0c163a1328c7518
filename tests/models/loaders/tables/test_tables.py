"""The tables of formats and models beside the loaders are complete, and name tests that exist."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path

from bipolar_jax.models.loaders.gguf import architectures as gguf_architectures
from bipolar_jax.models.loaders.gguf.blocks import BLOCK_TYPES
from bipolar_jax.models.loaders.huggingface.config import ARCHITECTURES
from bipolar_jax.models.loaders.huggingface.quantized.method import SERVED
from tests.support.imports import PACKAGE, ROOT

LOADERS = PACKAGE / "models" / "loaders"


def tables(document: Path) -> dict[str, list[dict[str, str]]]:
    """Rows by column, by the name of the table's first column."""
    found = {}
    for lines in re.findall(r"(?:^\|.*\n)+", document.read_text(), re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines())
        found[header[0]] = [dict(zip(header, row, strict=True)) for row in rows]
    return found


def quoted(rows: list[dict[str, str]], column: str) -> set[str]:
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[column])}


def cases_of(function) -> set[str]:
    """The ids that pytest gives the cases of a test whose parameters are texts."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    values = [mark.kwargs.get("ids") or [str(value) for value in mark.args[1]] for mark in marks]
    return {"-".join(case) for case in itertools.product(*values)}


def test_tables_have_every_format_and_model():
    top, gguf = tables(LOADERS / "README.md"), tables(LOADERS / "gguf" / "README.md")
    assert {row["format"].strip("`") for row in top["format"]} == {*SERVED.split(", "), "GGUF"}
    assert quoted(top["architecture"], "Hugging Face") == set(ARCHITECTURES)
    assert quoted(top["architecture"], "GGUF") == set(gguf_architectures.ARCHITECTURES)
    *served, refused = (row["type"] for row in gguf["type"])
    assert set(", ".join(served).split(", ")) == {*BLOCK_TYPES, "F32", "F16", "BF16"}
    assert refused.startswith("IQ types, MXFP4, NVFP4")


def test_every_row_names_tests_that_exist():
    functions = {}
    for path in (ROOT / "tests" / "models" / "loaders").rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            functions.setdefault(name, []).append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for document in (LOADERS / "README.md", LOADERS / "gguf" / "README.md"):
        for row in itertools.chain(*tables(document).values()):
            named = quoted([row], "tests")
            assert named, row
            for name, _, case in (each.removesuffix("]").partition("[") for each in named):
                modules = [importlib.import_module(module) for module in functions.get(name, ())]
                assert modules, name
                assert not case or any(case in cases_of(getattr(module, name)) for module in modules), f"{name}[{case}]"
