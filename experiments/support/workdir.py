"""Results on disk: atomic writes, resuming a stopped run, merging concurrent runs, and what figures depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

import bipolar_jax
from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.checkpoint.json_text import parse_json

from ..distributed.processes import from_first, is_first

RESULT_NAME = "result.json"
# Fields of rows that are numbers.
_NUMBERS = {"step", "loss", "cross_entropy"}
_MOST_SHOWN = 1000  # characters of settings in a message


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; of several processes the first does.

    Raises:
      ValueError: NaN or Inf, which JSON does not have.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if not is_first():
        return
    with atomic_write(path) as partial:
        partial.write_text(text)


def read_result(
    workdir: Path, settings: dict[str, Any], rows: dict[str, Sequence[str]] | None = None
) -> dict[str, Any] | None:
    """The result.json of an earlier run with the same settings, which the first process reads; None if there is none.

    Args:
      workdir: folder of the result.
      settings: this run's settings.
      rows: section -> fields that each of its rows must have. A section is an object of rows, or a list of them if
        the fields are a list. Absent sections are added, empty.

    Raises:
      ValueError: the file is no result of this experiment, or has other settings.
    """
    path = workdir / RESULT_NAME
    result = from_first(lambda: read_json(path) if path.is_file() else None)
    if result is None:
        return None
    if not isinstance(result.get("settings"), dict):
        raise ValueError(f"{path} is not a result of an experiment: delete it, or choose another --workdir")
    if other := differences(result["settings"], settings):
        raise ValueError(f"{path} was measured with other settings ({other}): choose another --workdir, or delete it")
    for section, fields in (rows or {}).items():
        check_rows(path, section, result.setdefault(section, [] if isinstance(fields, list) else {}), fields)
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for another content."""
    try:
        value = parse_json(path.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error!s:.200}): delete it, or choose another --workdir") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a result of an experiment: delete it, or choose another --workdir")
    return value


def check_rows(path: Path, section: str, found: Any, fields: Sequence[str]) -> None:
    """Raises ValueError unless `found` has rows with these fields: an object of rows, or a list if `fields` is one."""
    is_form = isinstance(found, list if isinstance(fields, list) else dict)
    rows = found.values() if isinstance(found, dict) else found
    if not is_form or not all(_is_row(row, fields) for row in rows):
        raise ValueError(
            f"{path} is not a result of this experiment: its {section} are not rows with {', '.join(fields)}; "
            "delete it, or choose another --workdir"
        )


def _is_row(row: Any, fields: Sequence[str]) -> bool:
    if not isinstance(row, dict) or not set(fields) <= set(row):
        return False
    return all(isinstance(row[name], int | float) for name in _NUMBERS.intersection(fields))


def differences(stored: dict[str, Any], current: dict[str, Any]) -> str:
    """The settings that differ, such as "seed: stored 0, now 1", cut short; empty if all are equal."""
    differing = "; ".join(
        f"{name!s:.100}: stored {stored.get(name)!r:.300}, now {current.get(name)!r:.300}"
        for name in sorted(stored | current)
        if stored.get(name) != current.get(name)
    )
    return differing[:_MOST_SHOWN]


def save_result(
    workdir: Path,
    result: dict[str, Any],
    complete: Callable[[dict[str, Any]], None] = lambda _: None,
    **own: Iterable[str],
) -> None:
    """Merges this run's result into result.json, which concurrent runs share; `result` becomes the merged one.

    Args:
      workdir: folder of the result.
      result: this run's result.
      complete: adds derived values, such as speed-ups, to the merged result before it is written.
      **own: section -> names in it that this run measures; all other names are kept as stored.

    Raises:
      ValueError: see `read_result`.
    """
    stored = read_result(workdir, result["settings"]) or {}
    for section, names in own.items():
        mine = {name: result[section][name] for name in names if name in result[section]}
        result[section] = stored.get(section, {}) | mine
    for name, value in stored.items():
        result.setdefault(name, value)
    complete(result)
    write_json(workdir / RESULT_NAME, result)


@functools.cache
def kernels_fingerprint(*folders: str) -> str:
    """SHA-256 of the sources and tuning tables of the kernels, so that a workdir never mixes two versions.

    Cached, because a process keeps the versions that it has imported.

    Args:
      *folders: further folders of the package that the figures depend on.
    """
    package = Path(bipolar_jax.__file__).parent
    files = [file for folder in ("kernels", *folders) for file in sorted((package / folder).rglob("*.py"))]
    files += sorted((package / "tuning").glob("*.json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def environment() -> dict[str, str]:
    """Device, library versions and command line of this run."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "command": _command(),
    }


def _command() -> str:
    """The command line, with the module's name where Python was started with -m."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec else [Path(sys.argv[0]).name]
    return " ".join([*program, *sys.argv[1:]])
