"""Time on the device by kernel, read from the trace that JAX's profiler writes."""

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
      run: what to run; it waits for its result.
      steps: equal steps that it makes, by which all figures are divided.
      most: how many kernels to list, those that took longest.

    Returns:
      "microseconds" of all kernels together, gaps between them left out, and "kernels", each with its name,
      "microseconds" and "calls". Nothing and an empty list where no GPU ran.
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
    """Microseconds and number of runs by name of kernel, over all GPUs, of the traces under a folder.

    Only streams count: lines such as "XLA Modules", which some readers of traces add, span the same kernels again.
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
