"""Reads damaged files, and checks that readers raise a ValueError that names the file, quickly and in little memory.

    python -m tests.fuzz.run --inputs=20000 --readers=packed,gguf --seed=1

Input number i of a reader depends on the seed and i alone: `--first=i --inputs=1` repeats it. Prints a JSON object with
the inputs read, accepted and refused by reader, and the failures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

NAMES = ("packed", "gguf", "safetensors", "config", "tokenizer", "index")
# A missing shard, or a name that is too long for the file system.
EXPECTED = (ValueError, FileNotFoundError)
MOST_SECONDS = 20
MOST_BYTES = 64 << 20  # beside 32 bytes for every byte of the file
_MOST_FAILURES = 20


class Hang(BaseException):
    """Not an Exception, so that no reader catches it."""


def main(arguments: list[str]) -> int:
    """Returns 0 if no input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs for each reader")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most seconds for each reader")
    parser.add_argument("--readers", default=",".join(NAMES), help="names, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    options = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tests.fuzz.readers import make_readers

    logging.disable()
    signal.signal(signal.SIGALRM, _raise_hang)
    summary = {}
    with tempfile.TemporaryDirectory() as folder, _quiet_rust():
        readers = make_readers(Path(folder))
        for name in options.readers.split(","):
            summary[name] = run(name, readers[name], options)
    print(json.dumps(summary, indent=1))
    return int(any(result["failures"] for result in summary.values()))


def run(name, reader, options) -> dict:
    """Counts and failures of one reader."""
    result = {"inputs": 0, "accepted": 0, "refused": 0, "failures": []}
    started = time.monotonic()
    for index in range(options.first, options.first + options.inputs):
        if time.monotonic() - started > options.seconds or len(result["failures"]) >= _MOST_FAILURES:
            break
        data = reader.damage(random.Random(f"{options.seed} {name} {index}"))
        reader.path.write_bytes(data)
        # Kept should the process crash.
        sys.stderr.write(f"{name} {index}\n") if os.environ.get("FUZZ_VERBOSE") else None
        problem = attempt(reader, len(data), result)
        if problem is not None:
            result["failures"].append(f"input {index}: {problem}")
        result["inputs"] += 1
        if index % 200 == 199:
            _forget()
    reader.path.write_bytes(reader.intact)
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def attempt(reader, size: int, result: dict) -> str | None:
    """Reads once; what was wrong, or None."""
    before = _reset_peak()
    signal.alarm(MOST_SECONDS)
    problem = None
    try:
        reader.read()
        result["accepted"] += 1
    except EXPECTED as error:
        result["refused"] += 1
        message = str(error)
        # The directory stands for a file that contradicts another.
        named = str(reader.path) in message or str(reader.path.parent) in message
        if type(error) not in EXPECTED or not named or "\n" in message or len(message) > 2000:
            problem = f"{type(error).__name__} {message[:300]!r}"
    except Hang:
        problem = f"more than {MOST_SECONDS} s"
    except BaseException as error:
        problem = f"{type(error).__name__} {str(error)[:200]!r} {_place(error)}"
    finally:
        signal.alarm(0)
    added = _peak() - before
    if problem is None and added > MOST_BYTES + 32 * size:
        problem = f"{added / 1e6:.0f} MB for a file of {size:,} bytes"
    return problem


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "bipolar_jax" in frame.filename]
    return f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _raise_hang(*_) -> None:
    raise Hang


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _forget() -> None:
    """Drops JAX's caches, which keep a trace of every config that was read."""
    import jax

    jax.clear_caches()


@contextlib.contextmanager
def _quiet_rust():
    """Sends stderr to nowhere: panics of the tokenizers library print a report before they become exceptions."""
    if os.environ.get("FUZZ_VERBOSE"):
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
