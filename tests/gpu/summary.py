"""The summary of a run in JSON: device, versions, groups of cases, runs under the sanitizer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.gpu.sanitizer import Verdict
from tests.gpu.watchdog import Ended

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy")
_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Group:
    """One group of cases.

    Attributes:
      status: "passed", "failed" (cases are wrong), "hang" (killed at its limit), "crashed" (the process ended before
        its cases did) or "not run".
      message: why it is not "passed".
      cases: how many there are.
      passed: how many passed.
      failures: error by case.
      kernels: names of the Mosaic kernels that ran.
      seconds: wall time of its process, start and compilation included.
    """

    status: str
    message: str
    cases: int
    passed: int
    failures: dict[str, str]
    kernels: list[str]
    seconds: float

    @property
    def failed(self) -> int:
        return self.cases - self.passed


def read_group(name: str, ended: Ended, log: str) -> Group:
    """What the log of `tests.gpu.group`, and the end of its process, say about a group."""
    records = [json.loads(line) for line in log.splitlines() if line.endswith("}")]
    cases = next((record["cases"] for record in records if "cases" in record), 0)
    outcomes = [record for record in records if "case" in record]
    started = [record["started"] for record in records if "started" in record]
    failures = {record["case"]: record["error"] for record in outcomes if record["error"] is not None}
    kernels = sorted({kernel for record in outcomes for kernel in record["kernels"]})
    at = started[-1] if len(started) > len(outcomes) else None
    if ended.hung:
        status, message = "hang", f"hang: {name} after {ended.seconds:.0f} s, in {at or 'its start'}"
    elif ended.returncode != 0 or not outcomes or len(outcomes) < cases:
        last = " | ".join([line for line in ended.output.splitlines() if line.strip()][-3:])[-600:]
        status, message = "crashed", f"exit status {ended.returncode} in {at or 'its start'}: {last}"
    elif failures:
        status, message = "failed", f"{len(failures)} of {cases} cases"
    else:
        status, message = "passed", ""
    passed = len(outcomes) - len(failures)
    return Group(status, message, cases, passed, failures, kernels, round(ended.seconds, 1))


class Summary:
    """What is known so far; every change is written to the file, so that a killed run leaves what it had."""

    def __init__(self, path: Path, device: dict[str, Any], commit: str | None, part: str = "1/1"):
        self._path = path
        self.groups: dict[str, Group] = {}
        self.sanitizer: dict[str, Verdict] = {}
        self._facts = {"device": device, "versions": versions(), "commit": commit, "part": part}
        self._seconds = 0.0
        self._complete = False

    @property
    def passed(self) -> bool:
        """Whether every group passed and the sanitizer reported nothing; what it could not run does not count."""
        ran = bool(self.groups or self.sanitizer)
        return (
            ran
            and all(group.status == "passed" for group in self.groups.values())
            and all(verdict.status in ("passed", "not run") for verdict in self.sanitizer.values())
        )

    def write(self, seconds: float, *, complete: bool = False) -> None:
        self._seconds, self._complete = seconds, complete
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        temporary.replace(self._path)

    def as_json(self) -> dict[str, Any]:
        groups = {
            name: dataclasses.asdict(group) | {"failed": group.failed} for name, group in sorted(self.groups.items())
        }
        return {
            **self._facts,
            "complete": self._complete,
            "passed": self._complete and self.passed,
            "seconds": round(self._seconds, 1),
            "cases": sum(group.cases for group in self.groups.values()),
            "groups": groups,
            "sanitizer": {name: _rounded(verdict) for name, verdict in sorted(self.sanitizer.items())},
        }

    def table(self) -> str:
        """One line for each group and each run under the sanitizer, failures below their line."""
        lines = []
        for name, group in sorted(self.groups.items()):
            lines.append(f"{group.status:8} {name}: {group.passed} of {group.cases} in {group.seconds:.0f} s")
            lines += [f"         {group.message}"] * bool(group.message)
            lines += [f"         {case}: {error}" for case, error in list(group.failures.items())[:5]]
        for name, verdict in sorted(self.sanitizer.items()):
            lines.append(f"{verdict.status:8} {name} in {verdict.seconds:.0f} s {verdict.message}".rstrip())
            lines += [f"         {count} x {' / '.join(text.splitlines())}" for text, count in verdict.reports.items()]
        return "\n".join(lines)


def _rounded(verdict: Verdict) -> dict[str, Any]:
    return dataclasses.asdict(verdict) | {"seconds": round(verdict.seconds, 1)}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit that is checked out, with "-dirty" if files differ from it; None outside a git checkout."""
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _output(program: str, *arguments: str) -> str | None:
    if shutil.which(program) is None:
        return None
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return (result.stdout.strip() or None) if result.returncode == 0 else None
