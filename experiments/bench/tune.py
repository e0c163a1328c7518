"""Times tilings of the Hopper matmul and writes the fastest into the table that the planner reads.

    python -m experiments.bench.tune --config=configs/bench/tune.py --workdir=DIR --config.table=DIR/nvidia_h200.json

Products with equal sizes and equally many pairs of planes (W1A4, W4A1, W2A2) are one problem. For each problem the
tilings with the best estimates are timed, then variations of the fastest in one field at a time; for few tokens every
split of K, on weights that come from memory. Each tiling is checked against the exact product before it is timed.
Writes all timings to result.json in --workdir and the fastest tiling of each problem to the table; its other entries
stay. A stopped run resumes; concurrent runs with different shapes may share a workdir and a table (see `device_lock`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.table import Table

import bipolar_jax.tuning
from bipolar_jax.kernels.sm90.backend.cost import tiles_microseconds
from bipolar_jax.kernels.sm90.backend.planning import CANDIDATES, FEW_TOKENS, mainloop_steps
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.kernels.sm90.gemm_few_tokens.config import DecodeTiling, accumulator_columns, decode_tilings
from bipolar_jax.tuning.parse import parse_table
from bipolar_jax.tuning.table import table_name
from experiments.bench.products.cold_weights import with_cold_weights
from experiments.bench.products.operands import Operands
from experiments.bench.products.product import Ceilings, Product, check_device, parse_products
from experiments.bench.products.shapes import parse_shapes
from experiments.support import app
from experiments.support.device_lock import device_lock, device_unlocked
from experiments.support.progress import console
from experiments.support.timing import compile_all, measure, one_line, raise_if_error
from experiments.support.workdir import RESULT_NAME, environment, read_result, save_result, write_json

_SETTINGS = ("iterations", "seed")
_ROW = ("kind", "m", "n", "steps", "shape", "tilings")  # fields of a problem in the result
_TILES = tuple((m, n) for m in (64, 128) for n in (64, 128, 192, 256))
_SCHEDULES = ("alternate", "split_m", "split_n")
_MOST_SLOTS = 8


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    with device_lock():
        _measure(config, workdir)


def _measure(config: ConfigDict, workdir: Path) -> None:
    check_device("sm90")
    problems: dict[str, list[tuple[str, Product]]] = {}
    for shape in parse_shapes(config.shapes):
        for name, product in parse_products(shape, config.precisions, "sm90").items():
            if product.group_size is not None:
                raise ValueError(f"precision {name} has groups, whose products the table does not cover: leave it out")
            tiling = product.choice.tiling
            if isinstance(tiling, DecodeTiling) and tiling.parts > 1:
                raise ValueError(
                    f"{shape} {name} splits its tokens into {tiling.parts} launches and cannot be tuned: leave it out"
                )
            problems.setdefault(Problem.of(product).name, []).append((f"{shape} {name}", product))
    device = jax.devices()[0].device_kind
    settings = {name: config[name] for name in _SETTINGS} | {"device": device}
    result = read_result(workdir, settings, {"problems": _ROW}) or {"settings": settings, "problems": {}}
    _check_tilings(workdir / RESULT_NAME, result["problems"])
    result["environment"] = environment()
    table = Path(config.table or Path(bipolar_jax.tuning.__file__).parent / table_name(device))
    _read_entries(table)  # a damaged table is named before anything is timed
    operands: Operands | None = None
    for number, (name, members) in enumerate(problems.items(), 1):
        label, product = members[0]
        if operands is None or operands.shape != product.shape:
            operands = Operands(product.shape, config.seed)
        row = result["problems"].setdefault(
            name,
            dataclasses.asdict(Problem.of(product)) | {"shape": label, "tilings": {}},
        )
        console.print(f"problem {number} of {len(problems)}: {name}, measured as {label}")
        _time_tilings_of(product, row, operands, config)
        save_result(workdir, result, problems=list(problems))
        _write_table(table, result)
    _print_table(result, Ceilings.of(config.ceilings), {name: members[0][1] for name, members in problems.items()})
    console.print(f"measurements: {workdir / RESULT_NAME}; table: {table}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The key of a tiling in the table; see `tuning.table.nearest_entry`.

    Attributes:
      kind: "planes", "int8" or `FEW_TOKENS`.
      m: rows of x; for few tokens the accumulator's columns.
      n: columns of w.
      steps: length of the main loop, see `mainloop_steps`.
    """

    kind: str
    m: int
    n: int
    steps: int

    @classmethod
    def of(cls, product: Product) -> Problem:
        """The problem of a product."""
        shape = product.shape
        if product.has_few_tokens:
            columns = accumulator_columns(shape.m, product.a_format.bits)
            return cls(FEW_TOKENS, columns, shape.n, mainloop_steps(shape.k, "planes", product.w_format.bits))
        return cls(product.kind, shape.m, shape.n, product.steps)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.m}x{self.n}, {self.steps} steps"


def first_tilings(product: Product, candidates: str, count: int) -> list[Tiling]:
    """The planner's choice, without splits of K, followed by the legal tilings with the best estimates.

    Args:
      product: the problem.
      candidates: "planner" for the planner's list, "all" to add every tile shape and schedule.
      count: number of tilings.

    Raises:
      ValueError: unknown `candidates`.
    """
    if candidates not in ("planner", "all"):
        raise ValueError(f'candidates must be "planner" or "all", got {candidates!r}')
    tilings, planned = list(CANDIDATES), dataclasses.replace(product.choice.tiling, splits=1)
    if candidates == "all":
        tilings += [_with_deepest_ring(Tiling(m, n, schedule)) for m, n in _TILES for schedule in _SCHEDULES]
    m, n = product.shape.m, product.shape.n
    by_estimate = sorted(_legal(tilings), key=lambda tiling: tiles_microseconds(tiling, m, n, product.steps))
    return list(dict.fromkeys([planned, *by_estimate]))[:count]


def variations(tiling: Tiling) -> list[Tiling]:
    """Legal tilings that differ in one field: ring buffer slots, order of tiles, or cluster shape."""
    others = [dataclasses.replace(tiling, slots=tiling.slots + change) for change in (-1, 1)]
    others += [
        dataclasses.replace(tiling, band=band, band_axis=axis)
        for band in (4, 8, 16)
        for axis in ("m", "n")
        if (band, axis) != (tiling.band, tiling.band_axis)
    ]
    others += [dataclasses.replace(tiling, cluster_m=m, cluster_n=n) for m, n in ((1, 1), (2, 1), (1, 2))]
    return [other for other in _legal(others) if other != tiling]


def _legal(tilings: Iterable[Tiling]) -> list[Tiling]:
    legal = []
    for tiling in dict.fromkeys(tilings):
        with contextlib.suppress(ValueError):
            tiling.check()
            legal.append(tiling)
    return legal


def _with_deepest_ring(tiling: Tiling) -> Tiling:
    """The tiling with as many ring buffer slots as fit; unchanged if none is legal."""
    deeper = [dataclasses.replace(tiling, slots=slots) for slots in range(2, _MOST_SLOTS + 1)]
    return _legal(deeper)[-1] if _legal(deeper) else tiling


def _time_tilings_of(product: Product, row: dict[str, Any], operands: Operands, config: ConfigDict) -> None:
    """Times the first tilings, then variations of the fastest; for few tokens all tilings."""
    if product.has_few_tokens:
        shape = product.shape
        tilings = decode_tilings(shape.m, shape.k, product.a_format.bits, product.w_format.bits)
        _time_tilings(list(tilings), product, row, operands, config)
        return
    first = first_tilings(product, config.candidates, config.per_problem)
    _time_tilings(first, product, row, operands, config)
    best = _best({_name(tiling): row["tilings"][_name(tiling)] for tiling in first})
    if best is not None:
        _time_tilings(variations(Tiling(**best["tiling"]))[: config.variations], product, row, operands, config)


def _time_tilings(
    tilings: list[Tiling] | list[DecodeTiling],
    product: Product,
    row: dict[str, Any],
    operands: Operands,
    config: ConfigDict,
) -> None:
    todo = [tiling for tiling in tilings if "microseconds" not in row["tilings"].get(_name(tiling), {})]
    calls, count = {tiling: product.kernel(operands, tiling) for tiling in todo}, 1
    if product.has_few_tokens:
        for tiling, call in calls.items():
            calls[tiling], count = with_cold_weights(call, 1)
    with device_unlocked():
        compiled = compile_all(calls, config.compile_threads)
    for tiling, (_, args) in calls.items():
        try:
            function = raise_if_error(compiled[tiling])
            outputs = function(*args)
            for output in outputs if isinstance(outputs, list) else [outputs]:
                product.check_kernel(operands, output)
            timing = measure(function, *args, iterations=config.iterations).divided(count)
            figures = timing.to_json()
            line = f"{timing.median:.1f} us"
        except Exception as error:
            figures = {"error": one_line(error)}
            line = figures["error"]
        row["tilings"][_name(tiling)] = figures | {"tiling": dataclasses.asdict(tiling)}
        console.print(f"  {_name(tiling)}: {line}")


def _name(tiling: Tiling | DecodeTiling) -> str:
    if isinstance(tiling, DecodeTiling):
        return f"{tiling.warpgroups} warpgroups, slots {tiling.w_slots} and {tiling.x_slots}"
    return (
        f"{tiling.tile_m}x{tiling.tile_n} {tiling.schedule} slots {tiling.slots} "
        f"band {tiling.band}{tiling.band_axis} cluster {tiling.cluster_m}x{tiling.cluster_n}"
    )


def _best(tilings: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest tiling that ran, or None."""
    measured = [figures for figures in tilings.values() if "microseconds" in figures]
    return min(measured, key=lambda figures: figures["microseconds"], default=None)


def _check_tilings(path: Path, problems: dict[str, Any]) -> None:
    """Raises ValueError unless every tiling of a result has a time or an error, and its fields."""
    for name, row in problems.items():
        tilings = row["tilings"] if isinstance(row["tilings"], dict) else {"": None}
        for tiling, figures in tilings.items():
            known = isinstance(figures, dict) and isinstance(figures.get("tiling"), dict)
            if not known or not ("error" in figures or isinstance(figures.get("microseconds"), int | float)):
                raise ValueError(
                    f"{path} is damaged: problems[{name!r}].tilings[{tiling!r:.60}] has no tiling with microseconds or "
                    "error; delete it, or choose another --workdir"
                )


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a table, if it exists. Raises ValueError if it is damaged, or has an illegal tiling."""
    if not path.is_file():
        return []
    entries = parse_table(path.read_bytes().decode(errors="replace"), path)["entries"]
    for index, entry in enumerate(entries):
        if entry["kind"] != FEW_TOKENS:
            try:
                Tiling(**entry["tiling"]).check()
            except ValueError as error:
                raise ValueError(f"tuning table {path} is damaged: entries[{index}].tiling: {error}") from error
    return entries


def _write_table(path: Path, result: dict[str, Any]) -> None:
    """Replaces the entries of the measured problems and keeps the others."""
    entries = _read_entries(path)
    by_problem = {tuple(entry[key] for key in ("kind", "m", "n", "steps")): entry for entry in entries}
    for row in result["problems"].values():
        best = _best(row["tilings"])
        if best is not None:
            entry = {key: row[key] for key in ("kind", "m", "n", "steps", "shape")}
            entry |= {"microseconds": best["microseconds"], "tiling": best["tiling"]}
            by_problem[tuple(entry[key] for key in ("kind", "m", "n", "steps"))] = entry
    ordered = [by_problem[key] for key in sorted(by_problem)]
    write_json(path, {"device": result["settings"]["device"], "entries": ordered})


def _print_table(result: dict[str, Any], ceilings: Ceilings, products: dict[str, Product]) -> None:
    table = Table(title=f"fastest tilings on {result['settings']['device']}")
    for heading in ("problem", "measured as", "tiling", "us", "ceiling", "first choice, us"):
        table.add_column(heading, justify="right" if heading in ("us", "ceiling", "first choice, us") else "left")
    for name, product in products.items():
        row = result["problems"][name]
        best = _best(row["tilings"])
        if best is None:
            table.add_row(name, row["shape"], "none ran")
            continue
        first = next(iter(row["tilings"].values())).get("microseconds")
        table.add_row(
            name,
            row["shape"],
            next(name for name, figures in row["tilings"].items() if figures is best),
            f"{best['microseconds']:.1f}",
            f"{ceilings.roofline_microseconds(product) / best['microseconds']:.0%}",
            "-" if first is None else f"{first:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    app.run(main)
