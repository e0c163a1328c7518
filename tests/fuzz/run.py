"""Reads damaged files, and checks that readers raise a ValueError that names the file, quickly and in little memory.

    python -m tests.fuzz.run --inputs=20000 --readers=packed,gguf --seed=1

Input number i of a reader depends on the seed and i alone: `--first=i --inputs=1` repeats it. Prints a JSON object with
the figures of every reader (`Figures`), and writes it to `--output` when it has all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
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
import warnings
from pathlib import Path

NAMES = (
    *("packed", "gguf", "gguf_integers", "sentencepiece", "safetensors"),
    *("config", "quantization", "tokenizer", "index", "chat", "tuning", "result"),
    *("gptq", "awq", "pack_quantized", "int_quantized", "bitnet", "bitsandbytes", "quantization_methods"),
    *("experts", "experts_together", "experts_config", "experts_gptq", "experts_gguf", "experts_gguf_integers"),
)
# A missing shard, or a name that is too long for the file system.
EXPECTED = (ValueError, FileNotFoundError)
MOST_SECONDS = 20  # of the processor, because the machine may be busy
MOST_BYTES = 64 << 20  # beside 32 bytes for every byte of the file
_MOST_FAILURES = 20
_STATUS = {key: re.compile(rf"{key}:\s+(\d+) kB") for key in ("VmRSS", "VmHWM")}


class Hang(BaseException):
    """Not an Exception, so that no reader catches it."""


@dataclasses.dataclass
class Figures:
    """The outcomes of one reader.

    Attributes:
      inputs: damaged files read.
      accepted: those that were read without an error, because the damage hit what is not used or leaves it valid.
      refused: those with a ValueError that names the file.
      missing: those with a FileNotFoundError, such as an index that names another shard.
      seconds: all of them took, damaging included.
      slowest_seconds: the longest reading took of the processor.
      largest_bytes: the most that one reading added to the resident memory.
      largest_share: the largest share of the allowed bytes that one reading added.
      failures: what else happened, with the number of the input.
    """

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    missing: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    largest_bytes: int = 0
    largest_share: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Returns 0 if no input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs for each reader")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most seconds for each reader")
    parser.add_argument("--readers", default=",".join(NAMES), help="names, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from experiments.support.workdir import environment
    from tests.fuzz.readers import make_readers

    logging.disable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _raise_hang)
    summary = {}
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder, _quiet_rust():
        readers = make_readers(Path(folder))
        for name in options.readers.split(","):
            summary[name] = dataclasses.asdict(run(name, readers[name], options))
            if options.output:  # in case that a later reader hangs
                options.output.with_suffix(".part").write_text(json.dumps(summary))
    text = json.dumps({"seed": options.seed, "readers": summary, "environment": environment()}, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    return int(any(figures["failures"] for figures in summary.values()))


def run(name, reader, options) -> Figures:
    """Reads the intact file, which has to be accepted, then `options.inputs` damaged ones."""
    figures = Figures()
    reader.path.write_bytes(reader.intact)
    reader.read()
    started = time.monotonic()
    for index in range(options.first, options.first + options.inputs):
        if time.monotonic() - started > options.seconds or len(figures.failures) >= _MOST_FAILURES:
            break
        data = reader.damage(random.Random(f"{options.seed} {name} {index}"))
        reader.path.write_bytes(data)
        # Kept should the process crash.
        sys.stderr.write(f"{name} {index}\n") if os.environ.get("FUZZ_VERBOSE") else None
        problem = attempt(reader, len(data), figures)
        if problem is not None:
            figures.failures.append(f"input {index}: {problem}")
        figures.inputs += 1
        if index % 1000 == 999:
            _forget()
    reader.path.write_bytes(reader.intact)
    figures.seconds = round(time.monotonic() - started, 1)
    return figures


def attempt(reader, size: int, figures: Figures) -> str | None:
    """Reads once, and counts the outcome; returns what was wrong, or None."""
    before = _reset_peak()
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    problem, started = None, time.process_time()
    try:
        reader.read()
        figures.accepted += 1
    except EXPECTED as error:
        figures.refused += isinstance(error, ValueError)
        figures.missing += isinstance(error, FileNotFoundError)
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
        signal.setitimer(signal.ITIMER_PROF, 0)
    figures.slowest_seconds = max(figures.slowest_seconds, round(time.process_time() - started, 3))
    added, allowed = _peak() - before, MOST_BYTES + 32 * size
    figures.largest_bytes = max(figures.largest_bytes, added)
    figures.largest_share = max(figures.largest_share, round(added / allowed, 3))
    if problem is None and added > allowed:
        problem = f"{added / 1e6:.0f} MB for a file of {size:,} bytes"
    return problem


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "bipolar_jax" in frame.filename]
    return f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _raise_hang(*_) -> None:
    raise Hang


def _status(key: str) -> int:
    return int(_STATUS[key].search(Path("/proc/self/status").read_text())[1]) * 1024


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _forget() -> None:
    """Drops JAX's caches, which keep a trace of every config that was read, and cycles of errors and their frames."""
    import jax

    jax.clear_caches()
    gc.collect()


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
