"""The program that reads hardware counters: what it reads of ncu, and what it refuses."""

from __future__ import annotations

import sys

import pytest

from experiments.bench.prepared import counters

OUTPUT = """==PROF== Connected to process 1
a message of the program, "ID"
"ID","Process ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed.sum","launch__registers_per_thread"
"","","","ns","inst","register/thread"
"0","1","quantize_rows","8,960","2,183,480","63"
"1","1","expanded_matmul","154,208","n/a","168"
==PROF== Disconnected from process 1
"""


def test_counters_are_read_behind_the_messages():
    assert counters.parse_counters(OUTPUT) == [
        {"name": "quantize_rows", "us": 8.96, "instructions": 2183480.0, "registers": 63.0},
        {"name": "expanded_matmul", "us": 154.208, "registers": 168.0},
    ]
    assert counters.parse_counters("==ERROR== no permission\n") == []


def test_cases_are_shapes_and_precisions():
    first, second = counters.parse_cases("64x256x128 W4A8g128; 1x128x128 W2A16")
    assert (first.name, str(second.precision), second.shape.m) == ("64x256x128 W4A8g128", "W2A16", 1)
    assert counters.parse_cases(counters.CASES)[0].name == "2048x14336x4096 W4A8"
    with pytest.raises(ValueError, match="a case is a shape and a precision, .* got '64x256x128'"):
        counters.parse_cases("64x256x128")


def test_failures_of_ncu_are_one_sentence(monkeypatch, tmp_path):
    (case,) = counters.parse_cases("1x128x128 W4A8")
    with pytest.raises(RuntimeError, match="'no-ncu' is no program here"):
        counters.counters(case, "no-ncu")
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\n")
    ncu.chmod(0o755)
    with pytest.raises(RuntimeError, match="read no counters of 1x128x128 W4A8, status 0: ==ERROR== ERR_NVGPUCTRPERM"):
        counters.counters(case, str(ncu))
    monkeypatch.setattr(sys, "argv", ["counters", "--cases=1x128x128 W4A8", "--ncu=no-ncu"])
    with pytest.raises(SystemExit, match="'no-ncu' is no program here"):
        counters.main()
