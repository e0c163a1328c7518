"""experiments/bench/coverage.py on tiny shapes and the interpreted Hopper kernels."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax import Precision
from bipolar_jax.kernels.sm90.core.execution import interpreted
from configs.bench import coverage as coverage_config
from experiments.bench import coverage
from experiments.bench.planning import coverage_report, queued
from experiments.bench.planning.cases import Case
from experiments.bench.products.shapes import Shape
from tests.support.tiny_benchmarks import PNG_SIGNATURE, result_of, tiny

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("clean_interpreter")]


def test_draws_repeat_and_spread():
    shapes = coverage.draw(60, 0)
    assert shapes == coverage.draw(60, 0) != coverage.draw(60, 1)
    assert len({shape.name for shape in shapes}) == 60
    assert min(shape.m for shape in shapes) < 8
    assert max(shape.m for shape in shapes) > 4096
    assert {shape.n for shape in shapes} | {shape.k for shape in shapes} == set(coverage.SIZES)
    assert any(shape.m % 8 for shape in shapes if shape.m > 64)


def test_parts_share_the_shapes():
    config = coverage_config.get_config()
    cases = coverage.all_cases(config)
    assert len(cases) == 60 * 9
    parts = [coverage.part_of(cases, f"{i}/7") for i in range(7)]
    assert sorted(case.name for part in parts for case in part) == sorted(case.name for case in cases)
    with pytest.raises(ValueError, match="must be"):
        coverage.part_of(cases, "7/7")


@pytest.mark.parametrize("m", [3, 65])
@pytest.mark.parametrize("precision", ["W2A1", "W4A8g32", "W4A16g32"])
@pytest.mark.covered("products of every plan, by kernels/sm90/backend")
def test_operations_and_other_plans_are_exact(tmp_path, monkeypatch, m, precision):
    monkeypatch.setattr(coverage, "draw", lambda *_: [Shape(f"{m}x72x96", m, 72, 96)])
    monkeypatch.setattr(coverage, "_MOST_CALLS", 1)
    monkeypatch.setattr(coverage, "_PROGRAM_MICROSECONDS", 0.0)
    monkeypatch.setattr(coverage, "copies_of", lambda *_: 1)
    monkeypatch.setattr(queued, "_WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(queued, "_RUN_MICROSECONDS", 0.0)
    monkeypatch.setattr(queued, "_MOST_TURNS", 1)
    config = tiny(coverage_config.get_config(), shapes=1, precisions=precision, implementation="sm90", plans=1)
    with interpreted(InterpretGPUParams()), pytest.raises(RuntimeError, match="failures in 1 cases"):
        config.most_over_best, config.counted, config.least_float, config.least = 0.0, 1, 0.0, 0.0
        coverage.main(config, tmp_path)
    (row,) = result_of(tmp_path)["cases"].values()
    assert row["chosen"]["clock"] == "wall"
    assert len(row["others"]) == 1
    assert all("microseconds" in figures for figures in row["others"].values()), row["others"]
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG_SIGNATURE)


def test_all_trace_before_one_measures_and_kernels_are_profiled_in_the_end(tmp_path, monkeypatch):
    config = tiny(coverage_config.get_config(), shapes=3, precisions="W4A8", batch=2)
    first, second, third = (case.shape.name for case in coverage.all_cases(config))
    log = []

    @contextlib.contextmanager
    def lock(shared=False):
        log.append("shared" if shared else "lock")
        yield

    def compile_case(case, _):
        log.append(f"compile {case.shape.name}")
        if case.shape.name == second:
            raise ValueError("no such plan")
        return coverage._Compiled({}, {}, 1, 1, [])

    def measure(case, _, row, config):
        log.append(f"measure {case.shape.name}")
        row["bf16"] = {"microseconds": 1.0}
        row["chosen"] = {"microseconds": 2.0 if case.shape.name == first else 1.0}
        row["others"] = {}

    def kernels(case, _):
        log.append(f"profile {case.shape.name}")
        return [{"name": "kernel", "microseconds": 1.5}]

    for name, function in (("device_lock", lock), ("_compile", compile_case), ("_measure", measure)):
        monkeypatch.setattr(coverage, name, function)
    monkeypatch.setattr(coverage, "_kernels", kernels)
    config.counted = 1
    with pytest.raises(RuntimeError, match="2 failures in 3 cases"):
        coverage.main(config, tmp_path)
    traced = ["shared", f"compile {first}", "shared", f"compile {second}"]
    measured = ["lock", f"measure {first}", "lock", "shared", f"compile {third}", "lock", f"measure {third}"]
    assert log == [*traced, *measured, "lock", f"profile {first}"]
    rows = result_of(tmp_path)["cases"]
    assert rows[f"{first} W4A8"]["kernels"] == [{"name": "kernel", "microseconds": 1.5}]
    assert rows[f"{second} W4A8"]["chosen"] == {"error": "ValueError: no such plan"}
    log.clear()
    config.seconds = 1e-9
    with pytest.raises(RuntimeError):
        coverage.main(config, tmp_path)
    assert log == []  # no time is left for the case that failed


def test_programs_take_turns_until_they_are_steady(monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(queued.time, "perf_counter", lambda: now[0])
    slow = iter([0.1] + [0.2, 0.1, 0.2, 0.1] + [0.1] * 100)  # warm-up, first turns, further ones

    def program(results, name):
        log.append(name)
        now[0] += 0.05 if name == "bf16" else next(slow)
        return results

    programs = {name: queued.Queued(program, (name,), [np.zeros(1)]) for name in ("bf16", "chosen")}
    timings = queued.take_turns(programs, 4)
    assert (timings["bf16"].median, timings["chosen"].median) == (50_000, 100_000)
    assert timings["chosen"].iterations > 4
    turns = log[-2 * timings["chosen"].iterations :]
    pairs = {tuple(turns[first : first + 2]) for first in range(0, len(turns), 2)}
    assert pairs == {("bf16", "chosen"), ("chosen", "bf16")}


def test_programs_write_their_results_in_place():
    operands = tuple((jnp.full((2, 3), i, jnp.float32), jnp.ones((3, 2))) for i in (1.0, 2.0))
    like = queued.result_shapes(jnp.dot, operands)
    program = queued.Queued.start(queued.several_calls(jnp.dot).lower(like, *operands).compile(), operands, like)
    places = [each.unsafe_buffer_pointer() for each in program.results]
    for _ in range(3):
        first, second = program.launch()
        assert [first.unsafe_buffer_pointer(), second.unsafe_buffer_pointer()] == places
    np.testing.assert_array_equal(first, np.full((2, 2), 3.0))
    np.testing.assert_array_equal(second, np.full((2, 2), 6.0))
    assert program.calls == 2


def test_programs_repeat_their_calls():
    turns = []

    def product(x, w):
        jax.debug.callback(lambda _: turns.append(1), x[0, 0])
        return x @ w

    operands = tuple((jnp.full((2, 3), i, jnp.float32), jnp.ones((3, 2))) for i in (1.0, 2.0))
    like = queued.result_shapes(jnp.dot, operands)
    compiled = queued.several_calls(product, 3).lower(like, *operands).compile()
    program = queued.Queued.start(compiled, operands, like, 3)
    jax.effects_barrier()
    assert program.calls == len(turns) == 6
    np.testing.assert_array_equal(program.results[1], np.full((2, 2), 6.0))


def test_the_body_of_the_loop_holds_the_products():
    operands = ((jnp.ones((4, 64)), jnp.ones((64, 8))),)
    like = queued.result_shapes(jnp.dot, operands)
    text = queued.several_calls(jnp.dot, 50).lower(like, *operands).compile().as_text()
    (around,) = [part for part in text.split("\n\n") if " while(" in part]
    assert "known_trip_count" in around
    assert "jit(dot)" in text
    assert "jit(dot)" not in around


def test_what_fails():
    settings = {"counted": 100, "least": 0.97, "least_float": 0.95, "most_over_best": 1.1}

    def row(chosen, precision="W4A8", m=2, other=100.0):
        sizes = {"m": m, "n": 10, "k": 10, "precision": precision}
        return sizes | {
            "bf16": {"microseconds": 96.0},
            "chosen": {"microseconds": chosen},
            "others": {"a": {"microseconds": other}, "b": {"error": "e"}},
        }

    def failures(*args, **options):
        return len(coverage_report.verdicts("case", row(*args, **options), settings))

    assert failures(98.0) == 0
    assert failures(100.0) == 1
    assert failures(100.0, "W4A16g128") == 0
    assert failures(100.0, m=0) == 0
    assert failures(111.0, other=100.0, m=0) == 1
    assert failures(120.0) == 2
    unsteady = row(100.0) | {"bf16": {"microseconds": 96.0, "quartiles": [90.0, 99.5]}}
    (line,) = coverage_report.verdicts("case", unsteady, settings)
    assert line == "case: 0.96 of bf16's speed (unsteady: bf16 takes 90.0 to 99.5 us)"
    assert coverage_report.verdicts("case", {"chosen": {"error": "wrong"}}, settings) == ["case: wrong"]


def test_each_kind_of_weights_has_other_plans():
    for m in (4, 100, 700):
        for precision in ("W1A1", "W2A2", "W4A8", "W8A8", "W2A8g64", "W4A16g128"):
            case = Case(Shape(f"{m}x4096x3072", m, 4096, 3072), Precision.parse(precision))
            assert len(case.others(2)) == (1 if (m, precision) == (4, "W4A16g128") else 2), case.name
