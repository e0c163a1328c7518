"""Tests on an NVIDIA Hopper GPU, in minutes: `make gpu-test`, or `python -m tests.gpu.run [--summary PATH]`.

Groups of cases (`group.GROUPS`) run in processes of their own, one a core up to 14, so that one compiles while another
is on the GPU: nearly all time is compilation, about 18 s of one core for a decode step. On 16 cores everything fits
--minutes; with fewer, run it in two parts: `--only "decode step" --no-sanitizer`, then `--without "decode step"`; or
every third case at a time, `--part 1/3`. The groups end first, then each kernel runs at a small size under
compute-sanitizer's racecheck and memcheck. A process that passes its time limit is killed and is a failure with its
name. The exit status is 0 only if everything passed; what the sanitizer could not watch is "not run" in the summary and
does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.gpu import sanitizer
from tests.gpu.group import GROUPS, part_of
from tests.gpu.sanitizer import Verdict
from tests.gpu.summary import Group, Summary, commit, driver, read_group
from tests.gpu.watchdog import Ended, run

# Seconds of one process.
_GROUP_LIMIT = 270
_SANITIZER_LIMIT = 150
_DEVICE_LIMIT = 90
_KEPT = 100_000  # characters of the output of a process that did not pass
# No time for XLA's trials of float products; memory as it is needed, since processes share the GPU.
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip(),
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # XLA's float32 products are not rounded to TF32
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "OPENBLAS_NUM_THREADS": "2",
    "PYTHONUNBUFFERED": "1",
}
_DEVICE_PROGRAM = """
import json, jax
device = jax.devices()[0]
print("device:", json.dumps({
    "platform": device.platform, "kind": device.device_kind,
    "compute_capability": getattr(device, "compute_capability", None),
    "multiprocessors": getattr(device, "core_count", None),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", type=Path, default=Path(os.environ.get("OUT", "runs")) / "gpu_test.json")
    parser.add_argument("--only", default="", help="run groups and sanitizer runs whose name contains this")
    parser.add_argument("--without", help="leave out groups and sanitizer runs whose name contains this")
    parser.add_argument("--minutes", type=float, default=9, help="what still runs then is killed")
    parser.add_argument("--jobs", type=int, default=_jobs(), help="processes at a time")
    parser.add_argument("--part", default="1/1", help="2/3: of each group every third case, from the second on")
    parser.add_argument("--commit", help="for the summary, where the files are no git checkout")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave out compute-sanitizer")
    options = parser.parse_args()
    part_of([], options.part)
    begun, failures = time.monotonic(), options.summary.with_suffix(".log")
    with tempfile.TemporaryDirectory() as folder:
        device = _device(Path(folder))
        print(f"{device['kind']}, driver {device['driver']}", flush=True)
        summary = Summary(options.summary, device, options.commit or commit(), options.part)
        suite = _Suite(summary, Path(folder), failures, begun, options.minutes, options.jobs, options.part)

        def chosen(name: str) -> bool:
            return options.only in name and (options.without is None or options.without not in name)

        suite.run_groups([name for name in GROUPS if chosen(name)])
        if not options.no_sanitizer:
            suite.run_sanitizer(chosen)
        seconds = time.monotonic() - begun
        summary.write(seconds, complete=True)
    print(summary.table())
    print(f"{'passed' if summary.passed else 'FAILED'} in {seconds:.0f} s: {options.summary}, failures in {failures}")
    sys.exit(not summary.passed)


def _device(folder: Path) -> dict:
    """What JAX finds, in a process of its own; exits with one sentence unless it is a Hopper GPU."""
    ended = run([sys.executable, "-c", _DEVICE_PROGRAM], _DEVICE_LIMIT, folder / "device", _ENVIRONMENT)
    lines = [line.removeprefix("device: ") for line in ended.output.splitlines() if line.startswith("device: ")]
    device = json.loads(lines[-1]) if lines else {"kind": f"no device, exit status {ended.returncode}"}
    if device.get("platform") != "gpu" or device.get("compute_capability") != "9.0":
        sys.exit(f"gpu-test needs an NVIDIA Hopper GPU (compute capability 9.0); JAX finds {device['kind']}.")
    return device | {"driver": driver()}


def _jobs() -> int:
    return min(14, len(os.sched_getaffinity(0)))


class _Suite:
    """Runs groups and sanitizer runs until the deadline and adds them to the summary.

    `failures` is a file for the output of every process that did not pass.
    """

    def __init__(
        self, summary: Summary, folder: Path, failures: Path, begun: float, minutes: float, jobs: int, part: str
    ):
        self._summary, self._folder, self._failures, self._jobs, self._part = summary, folder, failures, jobs, part
        self._begun, self._deadline = begun, begun + 60 * minutes
        failures.parent.mkdir(parents=True, exist_ok=True)
        failures.write_text("")

    def run_groups(self, names: list[str]) -> None:
        # The longest first.
        names = sorted(names, key=lambda name: not name.startswith("decode step"))
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = {pool.submit(self._group, name, index): name for index, name in enumerate(names)}
            for future in as_completed(futures):
                name, group = futures[future], future.result()
                self._summary.groups[name] = group
                self._written(f"{group.status}: {name}, {group.passed} of {group.cases}, {group.seconds:.0f} s")

    def _group(self, name: str, index: int) -> Group:
        limit = self._limit(_GROUP_LIMIT)
        log, output = self._folder / f"group{index}.log", self._folder / f"group{index}.txt"
        if limit <= 0:
            return Group("not run", "out of time", 0, 0, {}, [], 0.0)
        log.touch()
        command = [sys.executable, "-m", "tests.gpu.group", name, "--log", str(log), "--part", self._part]
        ended = run(command, limit, output, _ENVIRONMENT)
        group = read_group(name, ended, log.read_text())
        if ended.hung and limit < _GROUP_LIMIT:
            group = dataclasses.replace(group, status="failed", message="out of time: the suite's minutes were up")
        if group.status != "passed":
            self._keep(name, ended, log.read_text())
        return group

    def run_sanitizer(self, chosen: Callable[[str], bool]) -> None:
        program = sanitizer.find()
        if program is None:
            verdict = Verdict("not run", "compute-sanitizer is not on the PATH or in the CUDA toolkit", {}, 0, 0.0)
            self._summary.sanitizer["compute-sanitizer"] = verdict
            return
        from tests.gpu.sanitized import KERNELS, PLANTED  # imports JAX and Pallas; starts no GPU

        runs = [(tool, defect) for defect, tool in PLANTED.items()]
        runs += [(tool, kernel) for kernel in KERNELS for tool in sanitizer.TOOLS]
        runs = [(tool, kernel) for tool, kernel in runs if chosen(f"{tool}, {kernel}")]
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = {
                pool.submit(self._sanitized, program, tool, kernel, index): f"{tool}, {kernel}"
                for index, (tool, kernel) in enumerate(runs)
            }
            for future in as_completed(futures):
                name, verdict = futures[future], future.result()
                self._summary.sanitizer[name] = verdict
                self._written(f"{verdict.status}: {name}, {verdict.seconds:.0f} s {verdict.message}".rstrip())
        self._distrust_blind_tools(PLANTED)

    def _sanitized(self, program: str, tool: str, kernel: str, index: int) -> Verdict:
        limit = self._limit(_SANITIZER_LIMIT)
        if limit <= 0:
            return Verdict("failed", "out of time", {}, 0, 0.0)
        log = self._folder / f"sanitizer{index}.log"
        command = sanitizer.command(program, tool, kernel, log, port=49152 + 10 * index)
        environment = _ENVIRONMENT | {"GPU_TEST_REPEATS": "1"}
        ended = run(command, limit, self._folder / f"sanitizer{index}.txt", environment)
        if ended.hung and limit < _SANITIZER_LIMIT:
            return Verdict("failed", "out of time: the suite's minutes were up", {}, 0, ended.seconds)
        text = log.read_text(errors="replace") if log.exists() else ""
        planted = kernel.startswith("planted")
        verdict = sanitizer.judge_planted(ended, text) if planted else sanitizer.judge(tool, kernel, ended, text)
        if verdict.status != "passed":
            self._keep(f"{tool}, {kernel}", ended, text)
        return verdict

    def _distrust_blind_tools(self, planted: dict[str, str]) -> None:
        """A tool that did not report its planted defect has not watched the kernels that it passed."""
        verdicts = self._summary.sanitizer
        for defect, tool in planted.items():
            seen = verdicts.get(f"{tool}, {defect}")
            if seen is None or seen.status == "passed":
                continue
            for name, verdict in verdicts.items():
                if name.startswith(f"{tool}, ") and verdict.status == "passed":
                    message = f"{tool} did not report the {defect}"
                    verdicts[name] = dataclasses.replace(verdict, status="not run", message=message)

    def _keep(self, name: str, ended: Ended, log: str) -> None:
        with self._failures.open("a") as file:
            file.write(f"##### {name}\n{ended.output[-_KEPT:]}\n##### its log\n{log[-_KEPT:]}\n")

    def _limit(self, seconds: float) -> float:
        return min(seconds, self._deadline - time.monotonic())

    def _written(self, line: str) -> None:
        seconds = time.monotonic() - self._begun
        self._summary.write(seconds)
        print(f"{seconds:5.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
