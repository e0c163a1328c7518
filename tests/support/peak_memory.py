"""Peak memory of a call, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.imports import ROOT

_MEASURE = """
import re
def _status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
    return _status("VmRSS")
"""


def peak_bytes(prepare: str, call: str) -> int:
    """Bytes that `call` adds to the resident memory at its peak, after the statements `prepare`. Linux only."""
    code = f"{_MEASURE}\n{prepare}\n_before = reset()\n_result = {call}\nprint(_status('VmHWM') - _before)"
    # Without optimizations XLA keeps every intermediate array.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return int(ended.stdout.split()[-1])
