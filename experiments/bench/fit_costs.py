"""Fits the cost model that chooses tilings to measured times, and writes it where the planner reads it.

    cd experiments/results/nvidia_h200
    python -m experiments.bench.fit_costs tune_matmul.json bench_expanded{,_chosen,_widths}.json \\
        bench_float_products{,_widths}.json bench_coverage{,_plans,_seed_1}.json

Takes results of `bench.tune`, `bench.products.expanded`, `bench.products.float_products` with --tilings, and
`bench.coverage`, prints the model as a table with its errors, and writes bipolar_jax/tuning/nvidia_h200_costs.json, or
--out. Coefficients that nothing measures are those of "prior" in that file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from rich.table import Table

import bipolar_jax.tuning
from bipolar_jax.tuning.costs import FILE, load_costs
from experiments.bench.planning.fitting import Fit, fit, read
from experiments.support.progress import console
from experiments.support.workdir import write_json


def main(argv: list[str] | None = None) -> None:
    """Runs the program; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files")
    parser.add_argument("--out", type=Path, default=Path(bipolar_jax.tuning.__file__).parent / FILE)
    options = parser.parse_args(argv)
    try:
        measurements = [each for path in options.results for each in read(path)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    costs = load_costs()
    kernels = dict(costs["kernels"])
    for kernel, before in costs["kernels"].items():
        own = [each for each in measurements if each.kernel == kernel]
        if own:
            fitted = fit(own, before["prior"])
            of_fit = {"results": [path.name for path in options.results], "prior": before["prior"]}
            kernels[kernel] = dataclasses.asdict(fitted) | of_fit
            console.print(table(kernel, fitted, before["coefficients"]))
        else:
            console.print(f"{kernel}: nothing measured, stays as it is")
    write_json(options.out, costs | {"kernels": kernels})
    console.print(f"costs: {options.out}")


def table(kernel: str, fitted: Fit, before: dict[str, float]) -> Table:
    """The model of one kernel."""
    title = (
        f"{kernel}: {fitted.measurements} times; half are off by at most {fitted.median_error:.1%}, 19 of 20 by "
        f"{fitted.high_error:.1%}; the chosen tiling takes {fitted.mean_loss:.3f} times as long as the fastest, "
        f"at most {fitted.largest_loss:.3f}"
    )
    result = Table(title=title)
    for heading in ("count", "us each", "before"):
        result.add_column(heading, justify="left" if heading == "count" else "right")
    for name, value in fitted.coefficients.items():
        result.add_row(name, f"{value:.4g}", f"{before[name]:.4g}" if name in before else "-")
    return result


if __name__ == "__main__":
    main()
