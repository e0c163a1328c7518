"""Times large models on one device and on two of one host, and says what two gain: minutes on two H200s.

    python -m experiments.distributed.two_devices --config=configs/distributed/two_devices.py --workdir=DIR

Each case is `experiments.bench.llm` with a mesh and without, in a folder of its own with its result.json; a stopped run
resumes. Writes two_devices.md to --workdir: times, ratios beside those asked for, and what devices exchange.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bipolar_jax.models.inference.xla_flags import enable_command_buffers
from configs.bench import llm as llm_config

from ..bench import llm
from ..support import app
from ..support.progress import console
from ..support.workdir import RESULT_NAME

PAGE = "two_devices.md"
_HEADS = "| case | precision | phase | one device, us | two devices, us | tokens a second, two over one | at least |"


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program; see the module docstring."""
    lines, exchanged = [_HEADS, "| --- | --- | --- | ---: | ---: | ---: | ---: |"], []
    for name, case in config.cases.items():
        one = _timed(config, case, {"data": 1, "model": 1}, case.workload, workdir / f"{name}_one")
        two = _timed(config, case, case.mesh.to_dict(), case.get("workload_of_two", case.workload), workdir / name)
        for precision, measured in two.items():
            for phase in ("prefill", "decode"):
                pair = [each[phase] for each in (one[precision], measured)]
                ratio = pair[1]["tokens_per_second"] / pair[0]["tokens_per_second"]
                asked = case.at_least.get(f"{precision} {phase}", "")
                times = " | ".join(f"{each['microseconds']:,.0f}" for each in pair)
                lines.append(f"| {name} | {precision} | {phase} | {times} | {ratio:.2f} | {asked} |")
                found = ", ".join(measured["collectives"][phase]) or "nothing"
                exchanged.append(f"- {name}, {precision}, {phase}: {found}")
    page = "\n".join([*lines, "", "What devices exchange, an operation in a loop once:", "", *exchanged]) + "\n"
    (workdir / PAGE).write_text(page)
    console.print(page, markup=False)


def _timed(config: ConfigDict, case: ConfigDict, mesh: dict, workload: str, workdir: Path) -> dict[str, dict[str, Any]]:
    """The figures of each precision. Raises ValueError for one that failed."""
    settings = llm_config.get_config()
    settings.model, settings.precisions, settings.workloads = case.model, case.precisions, workload
    settings.calibration, settings.baselines, settings.profile = "", "", ""
    settings.iterations = config.iterations
    settings.mesh.update(mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    llm.main(settings, workdir)
    found = {}
    for precision, rows in json.loads((workdir / RESULT_NAME).read_text())["models"].items():
        (figures,) = rows["workloads"].values()
        if "error" in figures:
            raise ValueError(f"{case.model} {precision} on a mesh of {mesh}: {figures['error']}")
        found[precision] = figures
    return found


def command() -> None:
    """The command line."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast: before NCCL starts
    enable_command_buffers()
    app.run(main)


if __name__ == "__main__":
    command()
