"""Some seconds of the fuzz program. `python -m tests.fuzz.run` reads 20,000 damaged inputs with each reader."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from tests.fuzz import mutations, run
from tests.support.imports import ROOT

INPUTS = 30  # for each reader


def test_damaged_files():
    command = [sys.executable, "-m", "tests.fuzz.run", f"--inputs={INPUTS}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 1), f"the process crashed: status {ended.returncode}, {ended.stderr[-1000:]}"
    readers = json.loads(ended.stdout)["readers"]
    assert set(readers) == set(run.NAMES)
    for name, figures in readers.items():
        assert figures["failures"] == [], name
        assert figures["inputs"] == figures["accepted"] + figures["refused"] + figures["missing"] == INPUTS, name
        assert figures["refused"] > INPUTS // 4, name


@pytest.mark.parametrize("damage", [mutations.damaged_bytes, mutations.damaged_gguf])
def test_inputs_are_repeatable_and_damaged(damage):
    raw = bytes(range(256)) * 8
    inputs = [damage(raw, random.Random(seed)) for seed in range(50)]
    assert inputs == [damage(raw, random.Random(seed)) for seed in range(50)]
    assert sum(data != raw for data in inputs) > 45


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (None, None),
        (ValueError("/x/file is damaged"), None),
        (ValueError("is damaged"), "ValueError"),
        (ValueError("/x/file is\ndamaged"), "ValueError"),
        (KeyError("/x/file"), "KeyError"),
        (RecursionError("/x/file"), "RecursionError"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "/x/file"), "UnicodeDecodeError"),
    ],
)
def test_other_errors_and_messages_are_failures(error, problem):
    class Reader:
        path = run.Path("/x/file")

        def read(self):
            if error is not None:
                raise error

    found = run.attempt(Reader(), 0, run.Figures())
    assert found is problem is None or found.startswith(problem)


def test_outsized_memory_is_a_failure():
    class Reader:
        path = run.Path("/x/file")

        def read(self):
            bytearray(b"x" * (200 << 20))

    figures = run.Figures()
    assert "MB for a file of 10 bytes" in run.attempt(Reader(), 10, figures)
    assert figures.largest_bytes > 190 << 20
    assert figures.largest_share > 2.5
