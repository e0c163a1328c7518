"""The GPU suite without a GPU: cases at tiny sizes in interpret mode, watchdog, summary, the sanitizer's log.

The suite itself is no pytest suite: `make gpu-test` runs it on a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bipolar_jax.kernels.sm90.core.execution import interpreted
from bipolar_jax.kernels.sm90.decode_attention import reduce, tiles
from tests.gpu import sanitizer
from tests.gpu.cases import heads
from tests.gpu.group import GROUPS, cases_of, part_of
from tests.gpu.known_reports import KNOWN, KnownReport
from tests.gpu.sanitized import KERNELS, MODULES, PLANTED
from tests.gpu.sanitizer import Verdict
from tests.gpu.summary import Summary, read_group
from tests.gpu.trial import Case, Program, Trial, one_program, run_cases
from tests.gpu.watchdog import Ended, run
from tests.support import sm90_compile

# A kernel that deadlocks waits for ever.
interprets = [pytest.mark.timeout(280), pytest.mark.usefixtures("clean_interpreter")]

# Each kernel's own tests interpret it; these are the suite's checks, one for each way of checking.
# The heads here are not rotated: interpret mode copies tables of cosines as 16-bit floats, which changes NaN's bits.
INTERPRETED = {
    **{
        name: KERNELS[name] for name in ("few tokens, groups", "weight-only", "quantizer, norm", "packing", "expansion")
    },
    "attention, 4 bits": KERNELS["attention, 4 bits"],
    "heads": Case("heads", heads.Prompts(2, 2, 1, 67, 1, 1, 64, 70, rope=False, bias=True, k=40).trial),
}


def around(program: str):
    """Context for a program: layers one after the other are XLA's, all else runs interpreted kernels."""
    layers = program == "layer by layer"
    return contextlib.nullcontext() if layers else interpreted(plgpu.InterpretGPUParams())


@pytest.mark.parametrize("case", INTERPRETED.values(), ids=INTERPRETED)
@pytest.mark.sample(2)
class TestCasesInterpreted:
    pytestmark = interprets

    def test_pass(self, case):
        (outcome,) = run_cases([case], 1, around=around)
        assert outcome.error is None


@pytest.mark.covered("the kernel, by sm90/decode_step/test_decode_step.py; its comparison, by `make gpu-test`")
@pytest.mark.timeout(290)
@pytest.mark.usefixtures("clean_interpreter")
def test_a_decode_step_is_compared_with_its_layers():
    (outcome,) = run_cases([KERNELS["decode step"]], 1, around=around)
    assert outcome.error is None


def test_groups_have_cases_with_names_of_their_own():
    for group in GROUPS:
        names = [case.name for case in cases_of(group)]
        assert names
        assert len(names) == len(set(names)), f"{group}: {sorted(name for name in names if names.count(name) > 1)}"


def test_parts_have_every_case_once():
    cases = [doubled(number) for number in range(8)]
    parts = [part_of(cases, f"{i}/3") for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 3, 2]
    assert sorted((case for part in parts for case in part), key=cases.index) == cases
    for text in ("0/3", "4/3", "2", "a/b"):
        with pytest.raises(ValueError, match="a part is"):
            part_of(cases, text)


def doubled(expected: float) -> Case:
    def check(y):
        np.testing.assert_array_equal(y, expected)

    return Case(f"twice 2 is {expected}", lambda: one_program(lambda x: 2 * x, (np.float32(2),), check))


def test_what_is_wrong_is_an_error_and_the_rest_still_runs():
    started = []
    outcomes = list(
        run_cases([doubled(5), doubled(4)], 1, started.append, around=lambda name: contextlib.nullcontext())
    )
    assert started == ["twice 2 is 5", "twice 2 is 4"]
    assert "AssertionError" in outcomes[0].error
    assert outcomes[1].error is None


def test_a_program_without_our_kernels_is_an_error():
    """Else a backend that refuses would be compared with itself."""
    outcomes = list(run_cases([doubled(4)] * 5, 2))
    assert len(outcomes) == 5
    assert all("the program runs none of our kernels" in outcome.error for outcome in outcomes)


def test_outputs_that_change_are_an_error():
    outputs = iter(range(10))
    trial = one_program(lambda: 0, (), lambda out: None)
    with pytest.raises(AssertionError, match="1 of 1 numbers change"):
        trial.check({"program": lambda: np.float32(next(outputs))})


def test_after_a_lost_context_nothing_else_is_run():
    def lose(compiled):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    lost = Case("lost", lambda: Trial({}, lose))
    outcomes = list(run_cases([lost, doubled(4)], 1))
    assert outcomes[1].error == "not run: the CUDA context was lost in lost"


def test_a_hang_is_killed_with_all_its_processes(tmp_path):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    ended = run([sys.executable, "-c", program], 1.0, tmp_path / "output")
    assert ended.hung
    assert ended.seconds < 20


def test_a_command_that_ends_leaves_status_and_output(tmp_path):
    program = "import os, sys; print(os.environ['WORD']); sys.exit(3)"
    ended = run([sys.executable, "-c", program], 60.0, tmp_path / "output", {"WORD": "said"})
    assert (ended.returncode, ended.output) == (3, "said\n")


LOG = """{"cases": 2}
{"started": "one"}
{"case": "one", "error": null, "seconds": 1.0, "kernels": ["gemm"]}
{"started": "two"}
"""


@pytest.mark.parametrize(
    ("ended", "rest", "status", "message"),
    [
        (Ended(None, 30.0, ""), "", "hang", "hang: products after 30 s, in two"),
        (
            Ended(-11, 5.0, "Fatal\nSegmentation\n"),
            "",
            "crashed",
            "status -11 in two: Fatal | Segmentation",
        ),
        (Ended(0, 5.0, ""), "", "crashed", "status 0 in two"),
        (
            Ended(0, 5.0, ""),
            '{"case": "two", "error": "AssertionError: 1", "seconds": 1.0, "kernels": []}\n',
            "failed",
            "1 of 2 cases",
        ),
        (Ended(0, 5.0, ""), '{"case": "two", "error": null, "seconds": 1.0, "kernels": []}\n', "passed", ""),
    ],
)
def test_a_group_is_what_its_log_and_its_end_say(ended, rest, status, message):
    group = read_group("products", ended, LOG + rest)
    assert group.status == status
    assert message in group.message
    assert (group.cases, group.passed) == (2, 2 if status == "passed" else 1)
    assert group.kernels == ["gemm"]


def test_a_group_that_does_not_start_is_a_failure():
    group = read_group("products", Ended(1, 2.0, "ImportError: no module"), "")
    assert (group.status, group.passed) == ("crashed", 0)
    assert "ImportError" in group.message


@pytest.mark.parametrize("status", ["passed", "failed", "hang", "crashed", "not run"])
def test_the_summary_passes_if_every_group_does(tmp_path, status):
    path = tmp_path / "folder" / "summary.json"
    summary = Summary(path, {"kind": "NVIDIA H200", "driver": "580"}, "abc")
    ends = {"passed": Ended(0, 1.0, ""), "hang": Ended(None, 1.0, "")}
    last = '{"case": "two", "error": null, "seconds": 1.0, "kernels": []}\n'
    group = read_group("products", ends.get(status, Ended(1, 1.0, "")), LOG + last)
    summary.groups["products"] = group
    summary.sanitizer["racecheck, few tokens"] = Verdict("not run", "Device not supported", {}, 0, 2.0)
    summary.write(9.0)
    assert not json.loads(path.read_text())["passed"], "it is not complete"
    summary.write(10.0, complete=True)
    written = json.loads(path.read_text())
    assert written["passed"] == summary.passed == (status == "passed")
    assert written["sanitizer"]["racecheck, few tokens"]["status"] == "not run"
    assert (written["commit"], written["device"]["kind"], written["cases"]) == ("abc", "NVIDIA H200", 2)
    assert written["versions"]["jax"]
    assert "products" in summary.table()


def test_a_report_of_the_sanitizer_fails_the_run(tmp_path):
    summary = Summary(tmp_path / "summary.json", {}, None)
    assert not summary.passed, "nothing ran"
    summary.sanitizer["racecheck, few tokens"] = Verdict("passed", "", {}, 0, 2.0)
    assert summary.passed
    summary.sanitizer["memcheck, few tokens"] = Verdict("failed", "1 error", {"Invalid write": 1}, 0, 2.0)
    assert not summary.passed


# As compute-sanitizer 2025.3 and its manual print them.
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at packed_matmul_mosaic_gpu_kernel+0x1a40
=========     and Read access at packed_matmul_mosaic_gpu_kernel+0x2230 [508 hazards]
=========
========= Warning: Race reported between Read access at packed_matmul_mosaic_gpu_kernel+0x10
=========     and Write access at packed_matmul_mosaic_gpu_kernel+0x20 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
WRITES = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at planted_write_mosaic_gpu_kernel+0x160
=========     by thread (32,0,0) in block (0,0,0)
=========     Access at 0x7f2a40000000 is out of bounds
=========     and is 1073741824 bytes after the nearest allocation at 0x7f2a00000000 of size 512 bytes
=========
========= Invalid __global__ write of size 4 bytes
=========     at planted_write_mosaic_gpu_kernel+0x160
=========     by thread (33,0,0) in block (0,0,0)
=========     Access at 0x7f2a40000004 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
UNSUPPORTED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
========= ERROR SUMMARY: 0 errors
"""
# Seen where the program ended without a CUDA call.
NO_CUDA = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Error: couldn't find exit code.
"""
CHECKED = Ended(0, 3.0, "checked: few tokens\n")


def test_reports_of_the_sanitizer_are_read():
    count, reports = sanitizer.read(RACES)
    assert count == 2
    assert [len(report.splitlines()) for report in reports] == [2, 2]
    count, reports = sanitizer.read(WRITES)
    assert count == 2
    assert [len(report.splitlines()) for report in reports] == [5, 4]
    assert "Access at 0x? is out of bounds" in sanitizer.normalized(reports[1])
    assert "by thread (?) in block (?)" in sanitizer.normalized(reports[1])
    assert sanitizer.read(CLEAN) == (0, [])


@pytest.mark.parametrize(
    ("ended", "log", "status", "message"),
    [
        (CHECKED, CLEAN, "passed", ""),
        (CHECKED, RACES, "failed", "2 errors or hazards, 0 of them known"),
        (CHECKED, UNSUPPORTED, "not run", "Device not supported"),
        (CHECKED, NO_CUDA, "not run", "terminated before first instrumented API call"),
        (CHECKED, "", "not run", "checked: few tokens"),
        (
            Ended(127, 0.1, "error while loading shared libraries\n"),
            "",
            "not run",
            "shared libraries",
        ),
        (Ended(1, 3.0, "wrong: few tokens: 3 numbers\n"), CLEAN, "failed", "3 numbers"),
        (Ended(None, 60.0, ""), "", "hang", "killed after 60 s"),
    ],
)
def test_only_a_watched_and_checked_kernel_passes(ended, log, status, message):
    verdict = sanitizer.judge("racecheck", "few tokens", ended, log)
    assert verdict.status == status
    assert message in verdict.message


def test_known_reports_match_one_kernel_and_one_kind_of_report():
    text = (
        r"Error: Race reported between Write access at packed_matmul_mosaic_gpu_kernel\+0x\?\n"
        r"and Read access at packed_matmul_mosaic_gpu_kernel\+0x\? \[\? hazards\]"
    )
    known = [KnownReport("racecheck", "few tokens", text, "an mbarrier orders them")]
    verdict = sanitizer.judge("racecheck", "few tokens", CHECKED, RACES, known)
    assert (verdict.status, verdict.known, len(verdict.reports)) == ("failed", 1, 1)
    known.append(KnownReport("racecheck", "few tokens", "Warning: Race(.|\n)*", "an mbarrier orders them"))
    assert sanitizer.judge("racecheck", "few tokens", CHECKED, RACES, known).status == "passed"
    assert sanitizer.judge("racecheck", "gemm", CHECKED, RACES, known).known == 0
    assert sanitizer.judge("memcheck", "few tokens", CHECKED, RACES, known).known == 0


def test_kernels_of_the_sanitizer_have_names_of_their_own():
    assert len(KERNELS) == sum(len(module.small()) for module in MODULES)


def test_known_reports_have_reasons():
    for entry in KNOWN:
        assert entry.tool in sanitizer.TOOLS
        assert entry.kernel in KERNELS
        assert len(entry.reason.split()) > 5


# As racecheck prints single hazards, of a kernel under the decode step.
HAZARDS = """========= COMPUTE-SANITIZER
========= Warning: (Warp Level Programming) Potential WAR hazard detected at __shared__ 0x489 in block (0,0,0) :
=========     Read Thread (35,0,0) at quantize_rows_mosaic_gpu_kernel+0xb0 in launch.py:253
=========     Write Thread (34,0,0) at quantize_rows_mosaic_gpu_kernel+0xc0 in launch.py:253
=========     Current Value : 0, Incoming Value : 17
=========
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""


def test_single_hazards_are_known_whatever_their_values():
    ended = Ended(0, 3.0, "checked: decode step\n")
    verdict = sanitizer.judge("racecheck", "decode step", ended, HAZARDS)
    assert (verdict.status, verdict.known) == ("passed", 1)
    error = HAZARDS.replace("Warning", "Error")
    verdict = sanitizer.judge("racecheck", "decode step", ended, error)
    assert verdict.status == "failed"
    assert "in block (0,0,0) :\nRead Thread (35,0,0)" in verdict.message


def test_hazards_across_the_barrier_of_a_block_are_known_of_two_functions():
    of_write, of_read = (
        inspect.getsourcelines(function)[1] + 2 for function in (tiles.store_tile_sums, reduce.store_totals)
    )
    hazard = f"""========= Error: Potential RAW hazard detected at __shared__ 0x1a57f in block (7,1,0) :
=========     Write Thread (67,0,0) at decode_attention_mosaic_gpu_kernel+0x3a20 in tiles.py:{of_write}
=========     Read Thread (223,0,0) at decode_attention_mosaic_gpu_kernel+0x3af0 in reduce.py:{of_read}
=========     Current Value : 63
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 errors, 0 warnings)
"""

    def status(kernel, log):
        return sanitizer.judge("racecheck", kernel, Ended(0, 3.0, f"checked: {kernel}\n"), log).status

    assert status("attention, tiles", hazard) == "passed"
    assert status("attention, 4 bits", hazard) == "failed"
    others = ("RAW", "WAR"), (f"tiles.py:{of_write}", "tiles.py:1"), (f"reduce.py:{of_read}", f"reduce.py:{of_read}0")
    for found, other in others:
        assert status("attention, tiles", hazard.replace(found, other)) == "failed"


def test_a_planted_defect_has_to_be_reported():
    assert sanitizer.judge_planted(Ended(1, 3.0, ""), WRITES).status == "passed"
    verdict = sanitizer.judge_planted(CHECKED, CLEAN)
    assert verdict.status == "not run"
    assert "sees no kernel" in verdict.message
    assert "Device not supported" in sanitizer.judge_planted(CHECKED, UNSUPPORTED).message


def test_the_sanitizer_watches_mosaic_kernels_alone():
    command = sanitizer.command("compute-sanitizer", "memcheck", "few tokens", Path("log"), 50000)
    assert command[command.index("--kernel-name") + 1] == "kns=_mosaic_gpu_kernel"
    assert command[-3:] == ["-m", "tests.gpu.sanitized", "few tokens"]


@pytest.mark.skipif(sm90_compile.missing() is not None, reason=str(sm90_compile.missing()))
@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_compile_to_kernels_with_that_name(name):
    from tests.gpu import sanitized

    program: Program = sanitized.planted(name).programs["program"]
    _, report = sm90_compile.compile_for_h200(program.function, *map(jax.typeof, program.operands), ptx=True)
    assert f"{name.replace(' ', '_')}_mosaic_gpu_kernel" in report.text


def test_it_says_that_it_needs_a_hopper_gpu(tmp_path):
    command = [sys.executable, "-m", "tests.gpu.run", "--summary", str(tmp_path / "summary.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "gpu-test needs an NVIDIA Hopper GPU (compute capability 9.0); JAX finds cpu." in ended.stderr
    assert not (tmp_path / "summary.json").exists()
