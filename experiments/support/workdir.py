"""Results on disk: written whole or not at all, and taken up again where a run stopped."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jaxlib

import bipolar_jax

RESULT_NAME = "result.json"


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by the JSON of `value`, atomically. NaN and Inf are not JSON and raise ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_result(workdir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run, or None if there was none.

    Raises:
      ValueError: the workdir's result is of other settings, or not a result.
    """
    path = workdir / RESULT_NAME
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it, or choose another --workdir") from error
    if not isinstance(result, dict) or not isinstance(result.get("settings"), dict):
        raise ValueError(f"{path} is no result of this experiment: delete it, or choose another --workdir")
    if other := differences(result["settings"], settings):
        raise ValueError(f"{path} was measured with other settings ({other}): choose another --workdir, or delete it")
    return result


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Settings that differ, in words; empty if none does."""
    return "; ".join(
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    )


def save_result(
    workdir: Path,
    result: dict[str, Any],
    complete: Callable[[dict[str, Any]], None] = lambda _: None,
    **own: Iterable[str],
) -> None:
    """Writes result.json; what runs beside this one put there meanwhile stays, and appears in `result`.

    Args:
      workdir: folder of the result.
      result: what this run has.
      complete: adds what follows from the whole result, before it is written.
      own: of each section of the result, the names that this run measures.

    Raises:
      ValueError: see `read_result`.
    """
    there = read_result(workdir, result["settings"]) or {}
    for section, names in own.items():
        mine = {name: result[section][name] for name in names if name in result[section]}
        result[section] = there.get(section, {}) | mine
    for name, value in there.items():
        result.setdefault(name, value)
    complete(result)
    write_json(workdir / RESULT_NAME, result)


def kernels_fingerprint(*beside: str) -> str:
    """SHA-256 over the Hopper kernels' source and tables: figures of other ones must not be mixed with these.

    Args:
      *beside: other folders of the package that the figures depend on.
    """
    package = Path(bipolar_jax.__file__).parent
    files = [*sorted((package / "kernels" / "sm90").rglob("*.py")), *sorted((package / "tuning").glob("*.json"))]
    files += [file for folder in beside for file in sorted((package / folder).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def environment() -> dict[str, str]:
    """What the figures depend on besides the settings."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "command": " ".join(["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }
