"""Times a model's first text in fresh processes: with empty caches, and with what the first of them left in JAX's.

    python -m experiments.bench.first_call --config=configs/bench/first_call.py --workdir=DIR

Each process imports the package, makes a model of random weights, prepares it and generates a text, twice
(`language_models/first_text.py`). The package's bytecode is written before, as installers do. "to the text" is all of
that but the second text and the weights, which users load from a file. JAX's persistent compilation cache is kept in a
folder of its own. Whether it holds our kernels is counted in two ways: entries with machine code of Mosaic's, and
kernels that Mosaic GPU compiles in each process, which it reports. Stages may overlap: compilation runs on threads, and
what it covers counts as compilation. Writes result.json to --workdir.
"""

from __future__ import annotations

import compileall
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax as bj
from bipolar_jax.models.presets import preset
from experiments.bench.language_models.first_text import EVENTS, Settings
from experiments.support import app
from experiments.support.progress import console, progress_bar
from experiments.support.workdir import RESULT_NAME, environment, write_json

PROCESSES = ("empty caches", "kept cache")
_RECORD = "record: "
# Stages that users do not wait for: they load weights, and their second text is another matter.
_NOT_COUNTED = ("random weights", "second text")
# The state of Mosaic's custom calls, as XLA serializes programs: their compiled kernels. XLA compresses it, by snappy,
# which keeps the end of the name.
_COMPILED_KERNELS = b"CallResources"
_PTXAS = re.compile(r"Used \d+ registers")
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    models, precisions = (app.split_names(names) for names in (config.models, config.precisions))
    layers = {name: {"num_layers": config.layers} if config.layers else {} for name in models}
    for name in models:
        preset(name)
    for precision in precisions:
        bj.Precision.parse(precision)
    workdir.mkdir(parents=True, exist_ok=True)
    compileall.compile_dir(Path(bj.__file__).parent, quiet=2)
    result = {"settings": config.to_dict(), "environment": environment(), "models": {}}
    for name in models:
        for precision in precisions:
            settings = Settings(name, layers[name], precision, config.prompt_tokens, config.new_tokens, None)
            result["models"][f"{name} {precision}"] = first_calls(settings, config.limit)
            write_json(workdir / RESULT_NAME, result)
    _print_tables(result)


def first_calls(settings: Settings, limit: float) -> dict[str, Any]:
    """Records of PROCESSES by name, and "cache": what the first left there."""
    with tempfile.TemporaryDirectory() as folder:
        settings = dataclasses.replace(settings, cache_folder=folder)
        rows = {}
        for name in PROCESSES:
            with progress_bar(f"{settings.model} {settings.precision}: {name}"):
                rows[name] = _fresh_process(settings, limit)
            if name == PROCESSES[0]:
                rows["cache"] = cache_contents(Path(folder))
    return rows


def _fresh_process(settings: Settings, limit: float) -> dict[str, Any]:
    """The process's record, with its wall time and how often Mosaic GPU ran ptxas.

    Raises:
      RuntimeError: the process failed, or took longer than `limit` seconds.
    """
    command = [sys.executable, "-m", "experiments.bench.language_models.first_text"]
    variables = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    started = time.perf_counter()
    try:
        ended = subprocess.run(
            [*command, json.dumps(dataclasses.asdict(settings))],
            env=variables,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the first text of {settings.model} took longer than {limit:.0f} s") from error
    records = [line.removeprefix(_RECORD) for line in ended.stdout.splitlines() if line.startswith(_RECORD)]
    if ended.returncode != 0 or not records:
        last = " | ".join(ended.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"the process of {settings.model} ended with status {ended.returncode}: {last}")
    record = json.loads(records[-1])
    counted = sum(row["seconds"] for stage, row in record["stages"].items() if stage not in _NOT_COUNTED)
    return {
        **record,
        "to_the_text_s": round(counted, 2),
        "process_s": round(time.perf_counter() - started, 2),
        "ptxas_kernels": len(_PTXAS.findall(ended.stdout)),
    }


def cache_contents(folder: Path) -> dict[str, Any]:
    """What entries of JAX's persistent compilation cache hold.

    Returns:
      "entries"; "bytes" on disk; "with_kernels", entries that have machine code of Mosaic's kernels; and "largest",
      bytes by entry.
    """
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.endswith("-atime")]
    with_kernels = sum(_COMPILED_KERNELS in _decompressed(file.read_bytes()) for file in files)
    sizes = sorted(((file.stat().st_size, file.name) for file in files), reverse=True)
    return {
        "entries": len(files),
        "bytes": sum(size for size, _ in sizes),
        "with_kernels": with_kernels,
        "largest": {name[:60]: size for size, name in sizes[:5]},
    }


def _decompressed(contents: bytes) -> bytes:
    """JAX compresses entries by zstandard if that package is installed, else by zlib; other files are returned."""
    if contents.startswith(_ZSTANDARD):
        import zstandard

        return zstandard.ZstdDecompressor().decompress(contents)
    try:
        return zlib.decompress(contents)
    except zlib.error:
        return contents


def _print_tables(result: dict[str, Any]) -> None:
    for name, rows in result["models"].items():
        table = Table(title=f"{name}: seconds to the first text")
        for heading in ("process", "stage", "seconds", *EVENTS, "rest", "programs", "cache hits"):
            table.add_column(heading, justify="left" if heading in ("process", "stage") else "right")
        for process in PROCESSES:
            row = rows[process]
            for stage, found in row["stages"].items():
                figures = [f"{found[kind]:.2f}" for kind in ("seconds", *EVENTS, "rest")]
                table.add_row(process, stage, *figures, str(found["programs"]), str(found["cache_hits"]))
            table.add_row(process, "to the text", f"{row['to_the_text_s']:.2f}", end_section=True)
        console.print(table)
        cache = rows["cache"]
        ptxas = ", ".join(f"{rows[process]['ptxas_kernels']} with {process}" for process in PROCESSES)
        console.print(f"kernels that Mosaic GPU compiled: {ptxas}")
        console.print(
            f"the cache has {cache['entries']} entries of {cache['bytes'] / 1e6:.1f} MB, {cache['with_kernels']} of "
            "them with compiled kernels"
        )


if __name__ == "__main__":
    app.run(main)
