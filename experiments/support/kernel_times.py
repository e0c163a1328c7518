"""Device time per kernel, from the trace that JAX's profiler writes."""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def profile_kernels(run: Callable[[], Any], steps: int, most: int) -> dict[str, Any]:
    """Runs a function under the profiler.

    Args:
      run: the function; it must block until its result is ready.
      steps: equal steps in one run; all figures are per step.
      most: number of kernels to list, slowest first.

    Returns:
      "microseconds": sum over all kernels, without the gaps between them; "kernels": a list of dicts with "name",
      "microseconds" and "calls". 0 and an empty list if no GPU ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        times, calls = read_kernel_times(Path(folder))
    longest = sorted(times, key=times.get, reverse=True)[:most]
    return {
        "microseconds": round(sum(times.values()) / steps, 3),
        "kernels": [
            {"name": name, "microseconds": round(times[name] / steps, 3), "calls": round(calls[name] / steps, 3)}
            for name in longest
        ],
    }


def read_kernel_times(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Sums the traces under a folder over all GPUs.

    Only events of streams are counted: other lines of a trace, such as "XLA Modules", span the same kernels again.

    Returns:
      Microseconds and number of launches, each by kernel name.
    """
    times, calls = collections.defaultdict(float), collections.Counter()
    for file in folder.rglob("*.trace.json.gz"):
        with gzip.open(file) as stream:
            events = json.load(stream)["traceEvents"]
        names = {
            (event["pid"], event.get("tid"), event["name"]): event["args"]["name"]
            for event in events
            if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
        }
        for event in events:
            if event.get("ph") != "X":
                continue
            process = names.get((event["pid"], None, "process_name"), "")
            thread = names.get((event["pid"], event["tid"], "thread_name"), "")
            if process.startswith("/device:GPU") and thread.startswith("Stream"):
                times[event["name"]] += event["dur"]
                calls[event["name"]] += 1
    return dict(times), dict(calls)
