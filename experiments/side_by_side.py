"""Runs programs of experiments/ side by side on one machine, each in a process and a folder of its own.

    python -m experiments.side_by_side --config=configs/bench/llama3_groups.py --workdir=DIR

Compiling takes most of a benchmark's time and needs no device, so that several share one; they measure in turn
(experiments/support/device_lock.py). The config names chains: a chain's programs run one after another, such as one
that distills what the one before calibrated, and end with the first that fails. A chain NAME of one program has the
folder DIR/NAME, of several DIR/NAME_1, DIR/NAME_2 and so on, with what the program printed in log.txt. In commands
`{workdir}` stands for DIR, and `{folder}` for the program's folder, which is its --workdir where it is not named.
Writes to DIR result.json: of each program its command, its seconds, how it ended and its own result.json. Run again,
programs that resume go on where they stopped. The exit status is 1 unless all ended well.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from .support import app
from .support.progress import console
from .support.workdir import RESULT_NAME, environment, read_json, write_json

LOG_NAME = "log.txt"
_ENDED, _LATE, _LEFT_OUT = "ended", "killed at the time limit", "not started"
_POLL_SECONDS = 0.05


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    chains = {
        name: [commands] if isinstance(commands, str) else list(commands) for name, commands in config.chains.items()
    }
    names = app.parse_names("only", config.only, chains) or list(chains)
    for name in names:
        if not chains[name]:
            raise ValueError(
                f"config.chains.{name} has no commands: give at least one, such as 'bench.llm --config=...'"
            )
    if config.at_once < 1:
        raise ValueError(f"config.at_once is {config.at_once}: at least one program runs at a time")
    workdir.mkdir(parents=True, exist_ok=True)
    rows = run_chains(
        {name: [_arguments(each) for each in chains[name]] for name in names},
        workdir,
        config.at_once,
        config.seconds or None,
    )
    write_json(workdir / RESULT_NAME, {"environment": environment(), "programs": rows})
    _print_table(rows)
    if any(row["ended"] != _ENDED for row in rows.values()):
        sys.exit(1)


def run_chains(
    chains: dict[str, list[list[str]]], workdir: Path, at_once: int, seconds: float | None
) -> dict[str, dict[str, Any]]:
    """Runs chains of commands side by side.

    Args:
      chains: commands by the chain's name, each a list of arguments with `{workdir}` and `{folder}` in them.
      workdir: where each program's folder is made.
      at_once: most chains that run at a time.
      seconds: after so many all that still run are killed, with the processes they started; None has no limit.

    Returns:
      Of every program "command", "seconds", "ended" and "result", what it wrote to result.json or None.
    """
    last = None if seconds is None else time.monotonic() + seconds
    stopped = threading.Event()
    rows = {program: {} for name, commands in chains.items() for program in _folders(name, len(commands))}

    def run_chain(name: str) -> None:
        goes_on = True
        for command, folder in zip(chains[name], _folders(name, len(chains[name])), strict=True):
            started, ended = time.monotonic(), _LEFT_OUT
            if goes_on and not stopped.is_set():
                places = {"{workdir}": str(workdir), "{folder}": str(workdir / folder)}
                ended = _run([_replace(each, places) for each in command], workdir / folder, last, stopped)
            goes_on = ended == _ENDED
            result = workdir / folder / RESULT_NAME
            rows[folder] |= {
                "command": shlex.join(command[1:]),
                "seconds": round(time.monotonic() - started, 1),
                "ended": ended,
                "result": read_json(result) if result.is_file() else None,
            }
            console.print(f"{folder}: {ended}, {rows[folder]['seconds']} s", markup=False)

    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(run_chain, name) for name in chains]
        try:
            for each in running:
                each.result()
        except BaseException:
            stopped.set()
            raise
    return rows


def _arguments(command: str) -> list[str]:
    """A command of the config as a process's arguments."""
    workdir = [] if "{folder}" in command else ["--workdir={folder}"]
    return [sys.executable, "-m", *shlex.split(f"{__package__}.{command}"), *workdir]


def _replace(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


def _folders(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{index}" for index in range(1, count + 1)]


def _run(command: list[str], folder: Path, last: float | None, stopped: threading.Event) -> str:
    """Runs a program until it ends, or is killed: at the time `last`, or once the event is set."""
    if last is not None and time.monotonic() >= last:
        return _LEFT_OUT
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Memory of a GPU as it is needed: programs share it.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ,
        )
        try:
            while process.poll() is None:
                if stopped.is_set() or (last is not None and time.monotonic() >= last):
                    return _LATE
                time.sleep(_POLL_SECONDS)
        finally:
            # The program, if it still runs, and what it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == 0:
        return _ENDED
    return f"failed with status {process.returncode}: {_last_line(folder / LOG_NAME)}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it printed nothing"


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    table = Table("program", "seconds", "how it ended")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.0f}", row["ended"])
    console.print(table)


if __name__ == "__main__":
    app.run(main)
