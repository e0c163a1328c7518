"""Files, folders and documents stay small, and so does what has to be read to follow the product's kernel.

Commands in documents run what exists.
"""

from __future__ import annotations

import itertools
import re

import pytest

from tests.support.imports import CODE, PACKAGE, ROOT, closure, code_files, module_of

MAX_LINES = 400
MAX_FILES = 14
MAX_DOCUMENT_LINES = 150
SM90 = PACKAGE / "kernels" / "sm90"


def lines_of(path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", code_files(), ids=module_of)
def test_files_are_small(path):
    assert lines_of(path) <= MAX_LINES


def test_folders_are_small():
    by_folder = itertools.groupby(code_files(), key=lambda path: path.parent)
    counts = {str(folder.relative_to(ROOT)): len(list(files)) for folder, files in by_folder}
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}
    assert {folder.name for folder in CODE} <= {folder.split("/")[0] for folder in counts}


@pytest.mark.parametrize("name", ["README.md", "WORKSPACE.md"])
def test_documents_are_short(name):
    assert lines_of(ROOT / name) <= MAX_DOCUMENT_LINES


def test_commands_in_documents_run_what_exists():
    """Files of `pytest`, words after -k, programs and configs."""
    absent = []
    for document in (path for code in CODE for path in (ROOT / code).rglob("*.md")):
        for command in re.findall(r"`([^`]+)`", " ".join(document.read_text().split())):
            files = [ROOT / name for name in re.findall(r"\b(?:tests|configs)/[\w/]+\.py", command)]
            module = re.search(r"python -m ((?:experiments|tests)[\w.]+)", command)
            files += [ROOT / f"{module[1].replace('.', '/')}.py"] if module else []
            words = re.findall(r"[a-z]\w+", " ".join(re.findall(r"-k (\w+|\"[^\"]+\")", command)))
            texts = "".join(path.read_text() for path in files if path.exists())
            wrong = [path for path in files if not path.exists()]
            wrong += [word for word in words if word not in {"or", "and", "not"} and word not in texts and texts]
            absent += [f"{document.relative_to(ROOT)}: {each}" for each in wrong]
    assert absent == []


def test_the_product_can_be_read_without_its_outputs():
    """What the kernel of the product imports, directly or not, of the Hopper kernels."""
    files = {path for path in closure(SM90 / "gemm" / "launch.py") if path.is_relative_to(SM90)}
    assert len(files) <= 14
    assert sum(map(lines_of, files)) <= 2000
    outputs = {path.name for path in files if path.parent.name == "outputs"}
    assert outputs == {"protocol.py"}


def test_the_gemm_is_read_in_one_sitting():
    """At most 14 files and 2,000 lines of this backend lead from its launch to the instructions."""
    files = [path for path in closure(SM90 / "gemm" / "launch.py") if SM90 in path.parents]
    assert SM90 / "core" / "wgmma.py" in files
    assert len(files) <= 14
    assert sum(map(lines_of, files)) <= 2000
