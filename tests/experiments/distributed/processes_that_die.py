"""Real processes that train over loopback, of which one is killed: how its peers end, and what is lost.

    python -m tests.experiments.distributed.processes_that_die --processes=2 --folder=DIR

It trains a tiny model in so many processes, one device each, without a break; then in another folder it kills a worker
in the middle of the run, starts all again, kills process 0, starts all again, stops a worker that then sends nothing,
and starts all again. For each run it prints a line of JSON: the status of each process, the seconds to the end of the
last one, and what they said. It raises AssertionError unless every survivor ends with an error within `LIMIT_SECONDS`,
and the losses of the broken run are those of the whole one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support.tiny_training import losses, write_text

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 60
_CONFIG = "tests/experiments/distributed/tiny_mesh.py"


class Run:
    """The processes of one training run.

    Attributes:
      launchers: of the processes; each has the program as its child.
    """

    def __init__(self, count: int, workdir: Path, text: Path, data: int = 1):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "experiments.train", f"--config={_CONFIG}", f"--workdir={workdir}"]
        command += [f"--config.mesh.data={data}", f"--config.mesh.model={count // data}"]
        command += [f"--coordinator={address}", f"--processes={count}"]
        options = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"TINY_TEXT": str(text)} | _one_device(workdir.parent)
        self.launchers = [
            subprocess.Popen([*command, f"--process={index}"], env=environment, **options) for index in range(count)
        ]
        self._workdir = workdir

    def signal_at(self, step: int, index: int, number: signal.Signals, seconds: float = 600) -> None:
        """Sends a signal to the program of process `index` once the metrics of `step` are written."""
        path = self._workdir / "metrics.jsonl"
        deadline = time.monotonic() + seconds
        while not path.is_file() or path.read_text().count("\n") < step:
            if time.monotonic() > deadline or any(each.poll() is not None for each in self.launchers):
                self.end()
                raise AssertionError(f"step {step} was not reached: {[each.stderr.read() for each in self.launchers]}")
            time.sleep(0.005)
        launcher = self.launchers[index].pid
        (child,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        os.kill(int(child), number)

    def ended(self, seconds: float, stopped: int | None = None) -> dict[str, object]:
        """Statuses and last lines of all processes, which have so long to end, but for one that is stopped."""
        started = time.monotonic()
        said = []
        try:
            for index, launcher in enumerate(self.launchers):
                if index == stopped:
                    said.append("")
                    continue
                _, error = launcher.communicate(timeout=max(0.1, started + seconds - time.monotonic()))
                said.append(next(reversed(error.strip().splitlines()), ""))
        finally:
            self.end()
        return {
            "seconds": round(time.monotonic() - started, 1),
            "statuses": [launcher.returncode for launcher in self.launchers],
            "said": said,
        }

    def end(self) -> None:
        """Ends what still runs, programs with their launchers."""
        for launcher in self.launchers:
            launcher.kill()


def _one_device(folder: Path) -> dict[str, str]:
    """Environment of a process with one CPU device, which compiles a program that another run compiled only once."""
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    return {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def check_survivors(found: dict, lost: int) -> None:
    """Every other process ended with an error of one line that says what to do."""
    survivors = [index for index in range(len(found["said"])) if index != lost]
    assert all(found["statuses"][index] for index in survivors), found
    assert found["seconds"] < LIMIT_SECONDS, found
    for index in survivors:
        line = found["said"][index]
        assert line.startswith(f"error: process {index} of {len(found['said'])} "), line
        assert line.endswith("training resumes from its last checkpoint"), line


def main(count: int, folder: Path, data: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder)
    whole = Run(count, folder / "whole", text, data).ended(600)
    print(json.dumps({"run": "whole"} | whole), flush=True)
    assert not any(whole["statuses"]), whole
    breaks = [("a worker is killed", count - 1, 12, signal.SIGKILL), ("process 0 is killed", 0, 22, signal.SIGKILL)]
    breaks += [("a worker hangs", count - 1, 32, signal.SIGSTOP)]  # no exchange fails: heartbeats end the others
    for name, index, step, number in breaks:
        run = Run(count, folder / "broken", text, data)
        run.signal_at(step, index, number)
        found = run.ended(2 * LIMIT_SECONDS, index if number == signal.SIGSTOP else None)
        print(json.dumps({"run": name} | found), flush=True)
        check_survivors(found, index)
    found = Run(count, folder / "broken", text, data).ended(600)
    print(json.dumps({"run": "resumed"} | found), flush=True)
    assert not any(found["statuses"]), found
    assert losses(folder / "broken") == losses(folder / "whole")
    assert (folder / "broken" / "model.safetensors").read_bytes() == (
        folder / "whole" / "model.safetensors"
    ).read_bytes()
    print("the losses and the packed model are those of the run without a break")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--data", type=int, default=1, help="devices that windows are divided over; the others: weights"
    )
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    main(arguments.processes, arguments.folder, arguments.data)
