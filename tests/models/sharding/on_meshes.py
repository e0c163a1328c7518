"""Tiny Transformers on meshes of eight devices, in one process or several, beside the same model on one device.

    python -m tests.models.sharding.on_meshes 2x4:W4A8g32 8x1:W2A2
    python -m tests.models.sharding.on_meshes --processes=4 --generates --trains tested

Pairs are data x model and a precision; "tested" is every mesh of eight devices at five precisions from W1A1 to W8A8, on
two cores 11 minutes in two processes and 15 in four; "all" at W1A1 to W8A8 and with more groups. All takes twice as
long with JAX_DISABLE_MOST_OPTIMIZATIONS=0. Processes exchange numbers by gloo over loopback; they also write weights
from their shards, and read them back. For each pair it prints a line of JSON: how far logits and a training step are
from those of one device, the tokens of both, and what devices exchange. It raises AssertionError unless `check` holds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.quick_compilation import quick_compilation

ROOT = Path(__file__).resolve().parents[3]
DEVICES = 8
MESHES = ("1x8", "2x4", "4x2", "8x1")
PRECISIONS = (*(f"W{bits}A{bits}" for bits in range(1, 9)), "W4A8", "W4A8g32", "W2A8g64", "W4A8g32f")
# What tests run on virtual devices and `make processes` in real processes: one precision after the other, whose
# programs of one device are shared.
TESTED = tuple(f"{mesh}:{name}" for name in ("W1A1", "W2A2", "W4A8", "W4A8g32", "W8A8") for mesh in MESHES)
BATCH, LENGTH, LAYERS, HIDDEN = 8, 8, 2, 64
_MOST_SECONDS = 300  # for the others to end after the first


def found_on_meshes(*pairs: str, processes: int = 1, options: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """What `mesh_process` finds for each pair, as soon as it does.

    Raises:
      AssertionError: a process ends with an error, or does not end.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={DEVICES // processes}")
    command = [sys.executable, "-m", "tests.models.sharding.mesh_process", *options, *pairs]
    command += [f"--port={port}", f"--processes={processes}"]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    environment |= quick_compilation(environment)
    started = []
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        for index, error in enumerate(said):
            out = subprocess.PIPE if index == 0 else subprocess.DEVNULL
            options_of = {"cwd": ROOT, "env": environment, "stdout": out, "stderr": error, "text": True}
            started.append(subprocess.Popen([*command, f"--process={index}"], **options_of))
            stack.callback(_ended, started[-1])
        for line in started[0].stdout:
            if line.startswith("{"):
                yield json.loads(line)
        statuses = [process.wait(timeout=_MOST_SECONDS) for process in started]
        for error in said:
            error.seek(0)
        assert not any(statuses), [(status, error.read()[-4000:]) for status, error in zip(statuses, said, strict=True)]


def _ended(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def check(found: dict[str, Any]) -> None:
    """Equal results; two reductions of sums a layer, and of two numbers a token before each, if weights are cut."""
    data, parts = map(int, found["mesh"].split("x"))
    precision = found["precision"]
    # Attention in float32 rounds as XLA vectorizes its shapes, and a number between two steps may then take the other.
    assert found["texts that differ"] <= 1, found
    for name, tokens in (("prefill", BATCH // data * LENGTH), ("decode", BATCH // data)):
        per_token = f"s32[{tokens}] " if found["has offsets"] else ""
        per_column = "" if precision == "W1A1" else f" s32[{HIDDEN}]"  # tokens of one bit have no zero
        sums = ["all-reduce", f"{per_token}s32[{tokens},{HIDDEN}]{per_column}"]
        if precision.endswith("f"):
            sums = ["all-reduce", f"f32[{tokens},{HIDDEN}]"]
        expected = sorted([["all-reduce", f"f32[{tokens},2]"]] * 2 + [sums] * 2) if parts > 1 else []
        assert found[name] == expected, found
    whole, local = found["cache"]
    assert whole == [LAYERS, BATCH, max(2, parts), 16, 32], found
    assert local == [LAYERS, BATCH // data, max(2, parts) // parts, 16, 32], found
    for name in ("tokens", "quantized cache"):
        one, sharded = found.get(name, (None, None))
        assert one == sharded, found
    if "training" in found:
        step = found["training"]
        assert step["loss"] < 1e-5, found
        assert step["gathered weights"] == [], found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", help='such as 2x4:W4A8g32, or "tested", or "all"')
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2, 4, 8))
    parser.add_argument("--generates", action="store_true", help="texts, too, with a float and an 8-bit cache")
    parser.add_argument("--trains", action="store_true", help="a training step, too")
    arguments = parser.parse_args()
    pairs = list(TESTED) if arguments.pairs == ["tested"] else arguments.pairs
    if pairs == ["all"]:  # one precision after the other, whose programs of one device are shared
        pairs = [f"{mesh}:{precision}" for precision, mesh in itertools.product(PRECISIONS, MESHES)]
    options = tuple(f"--{name}" for name in ("generates", "trains") if getattr(arguments, name))
    for found in found_on_meshes(*pairs, processes=arguments.processes, options=options):
        print(json.dumps(found), flush=True)
        check(found)
    print(f"{len(pairs)} meshes and precisions in {arguments.processes} processes: equal to one device")


if __name__ == "__main__":
    main()
