"""compute-sanitizer: the command that watches one kernel, and what its log says.

Only Mosaic's kernels are instrumented: their names end in "_mosaic_gpu_kernel", XLA's do not.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tests.gpu.known_reports import KNOWN, KnownReport
from tests.gpu.watchdog import Ended

TOOLS = ("racecheck", "memcheck")
_KERNELS = "kns=_mosaic_gpu_kernel"
_PREFIX = "========="
_SUMMARY = re.compile(r"(?:RACECHECK|ERROR) SUMMARY: (\d+) (?:hazard|error)")
# The tool itself failed; no kernel was watched, or not to its end.
_TOOL_FAILED = re.compile(
    r"device not supported|not supported on the current system|unable to (?:find injection|initialize)|"
    r"failed to (?:initialize|connect)|terminated before first instrumented|internal sanitizer error|"
    r"error while loading shared libraries|no attachable process|timeout",
    re.IGNORECASE,
)
# The process crashed; where the result was checked before, it was the tool's doing.
_CRASHED = re.compile(r"process didn't terminate successfully")
_HEADERS = re.compile(r"COMPUTE-SANITIZER$|SUMMARY: |Target application returned an error|couldn't find exit code")
# A plain frame of the host's stack, and where the tool found the program.
_FRAMES = re.compile(r"\s*(?:Saved host backtrace|Host Frame:|\.\.\.|Device Frame:)")
_MOST_REPORTS = 20

Status = Literal["passed", "failed", "not run", "hang"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a run under the sanitizer showed.

    Attributes:
      status: "not run" where the tool did not watch the kernel to its end: never a pass.
      message: why it is not "passed".
      reports: those that are not known to be false, normalized, with how often each came.
      known: how many reports were known to be false.
      seconds: wall time.
    """

    status: Status
    message: str
    reports: dict[str, int]
    known: int
    seconds: float


def find() -> str | None:
    """Path of compute-sanitizer, on the PATH or in the CUDA toolkit; None if there is none."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")


def command(program: str, tool: str, kernel: str, log: Path, port: int) -> list[str]:
    """Runs `sanitized` for one kernel under a tool; reports go to `log`.

    Args:
      program: path of compute-sanitizer.
      tool: one of TOOLS.
      kernel: name in `sanitized.KERNELS`, or a planted defect.
      log: file for the tool's own output.
      port: base of the ports that the tool tries; runs at the same time need bases 10 apart.
    """
    options = ["--tool", tool, "--target-processes", "application-only", "--kernel-name", _KERNELS]
    options += ["--launch-timeout", "120", "--port", str(port), "--check-exit-code", "no"]
    options += ["--print-limit", "100000", "--show-backtrace", "no", "--log-file", str(log)]
    # By default racecheck prints analyses only, and makes none of kernels that Mosaic compiles.
    options += {"memcheck": ["--report-api-errors", "no"], "racecheck": ["--racecheck-report", "all"]}[tool]
    return [program, *options, sys.executable, "-m", "tests.gpu.sanitized", kernel]


def read(log: str) -> tuple[int | None, list[str]]:
    """The number of errors or hazards in the log's summary, None without one; and the reports."""
    lines = [line.removeprefix(_PREFIX).rstrip() for line in log.splitlines() if line.startswith(_PREFIX)]
    reports, report = [], []
    for line in [*lines, ""]:
        if _HEADERS.search(line) or _FRAMES.match(line):
            continue
        # A report begins at the margin (one space after the prefix); its details are indented further.
        if report and (not line or not line.startswith("  ")):
            reports.append("\n".join(report))
            report = []
        if line:
            report.append(line.strip())
    summary = _SUMMARY.search(log)
    return (None if summary is None else int(summary[1])), reports


def normalized(report: str) -> str:
    """Without addresses, offsets, thread indices, values and counts, which change from run to run."""
    report = re.sub(r"0x[0-9a-fA-F]+", "0x?", report)
    report = re.sub(r"\(\d+,\s*\d+,\s*\d+\)", "(?)", report)
    report = re.sub(r"Value : \d+", "Value : ?", report)
    return re.sub(r"\[\d+ hazards?\]", "[? hazards]", report)


def judge(tool: str, kernel: str, ended: Ended, log: str, known: Sequence[KnownReport] = KNOWN) -> Verdict:
    """The verdict on one run of a kernel without planted defects."""
    if ended.hung:
        return Verdict("hang", f"killed after {ended.seconds:.0f} s", {}, 0, ended.seconds)
    count, reports = read(log)
    texts = [normalized(report) for report in reports]
    is_unknown = [not any(entry.matches(tool, kernel, text) for entry in known) for text in texts]
    unknown = list(itertools.compress(texts, is_unknown))
    counts = {text: unknown.count(text) for text in dict.fromkeys(unknown)}
    counts = dict(list(counts.items())[:_MOST_REPORTS])

    def verdict(status: Status, message: str) -> Verdict:
        return Verdict(status, message, counts, len(texts) - len(unknown), ended.seconds)

    crashed = _CRASHED.search(log) if f"checked: {kernel}" in ended.output else None
    failure = crashed or _TOOL_FAILED.search(log) or (_TOOL_FAILED.search(ended.output) if count is None else None)
    if failure is not None or count is None:
        message = _last_lines(log) or _last_lines(ended.output) or "the tool printed nothing"
        return Verdict("not run", message, {}, 0, ended.seconds)
    if unknown or count > len(texts):
        message = f"{count} errors or hazards, {len(texts) - len(unknown)} of them known to be false"
        # Blocks, threads and values of two of them, which `reports` leaves out.
        examples = list(itertools.compress(reports, is_unknown))
        return verdict("failed", "; ".join([message, *examples[:1], *examples[1:][-1:]]))
    if f"checked: {kernel}" not in ended.output:
        return verdict("failed", f"no checked result: {_last_lines(ended.output)}")
    return verdict("passed", "")


def judge_planted(ended: Ended, log: str) -> Verdict:
    """The verdict on a planted defect: "passed" if the tool reports it, "not run" if it sees nothing."""
    if ended.hung:
        return Verdict("hang", f"killed after {ended.seconds:.0f} s", {}, 0, ended.seconds)
    count, _ = read(log)
    if count is None or _TOOL_FAILED.search(log):
        return Verdict("not run", _last_lines(log) or _last_lines(ended.output), {}, 0, ended.seconds)
    if count == 0 and _CRASHED.search(log):
        return Verdict("not run", _last_lines(log), {}, 0, ended.seconds)
    if count == 0:
        return Verdict("not run", "the planted defect was not reported: the tool sees no kernel", {}, 0, ended.seconds)
    return Verdict("passed", "", {}, 0, ended.seconds)


def _last_lines(text: str) -> str:
    lines = [line.removeprefix(_PREFIX).strip() for line in text.splitlines()]
    return " | ".join([line for line in lines if line and line != "COMPUTE-SANITIZER"][-3:])[:500]
