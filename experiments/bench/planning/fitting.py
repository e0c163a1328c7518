"""Coefficients of the planner's cost model from measured times: sources of measurements, and the fit.

Four kinds of results are read: tilings of `bench.tune` and those of `products.expanded`, device times of kernels; those
of `products.float_products`; and of `bench.coverage` those of profiled kernels, and wall times of whole operations,
which also contain the quantizer, gaps, and what is expanded in memory. These have counts of their own, so that one fit
takes all. Wall times whose quartiles lie apart are left out: neighbours slowed the launches.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from bipolar_jax import Precision
from bipolar_jax.format import as_format
from bipolar_jax.kernels.sm90.backend.cost import Kernel, expanded_counts, tile_counts
from bipolar_jax.kernels.sm90.backend.planning import mainloop_steps, row_bytes
from bipolar_jax.kernels.sm90.gemm.config import Tiling
from bipolar_jax.packing.fields import STAGE

_EXPANDED_NAME = re.compile(r"(?P<tile_m>\d+) (?P<schedule>\w+), (?P<slots>\d+) slots(, clusters of 1x1.*lag 0)?")
_FLOAT_NAME = re.compile(r"(?P<tile_m>\d+) (?P<schedule>\w+), (?P<slots>\d+) slots, (?P<splits>\d+) splits")
_PRODUCTS = ("packed_matmul", "expanded_matmul")  # what names of their kernels begin with
_STEADY = 1.05  # times the lower quartile, up to which the upper one may be
# Weight of the coefficients that were, beside that of all measurements: it decides what these leave open.
_OF_PRIOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One time.

    Attributes:
      kernel: of the product.
      problem: measurements with equal ones differ in their tilings alone.
      counts: of the kernel, and of what else the operation does.
      microseconds: the median.
    """

    kernel: Kernel
    problem: str
    counts: dict[str, float]
    microseconds: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """Coefficients of one kernel, and how far the model is off.

    Attributes:
      coefficients: microseconds a count, by name.
      measurements: their number.
      median_error, high_error: half of the measurements, and 19 of 20, are off by at most such a part of their time.
      mean_loss, largest_loss: time of the tiling that the model chooses over the fastest measured one, of problems
        with several, each left out of the fit that chooses its tiling.
    """

    coefficients: dict[str, float]
    measurements: int
    median_error: float
    high_error: float
    mean_loss: float
    largest_loss: float


def read(path: Path) -> list[Measurement]:
    """The measurements of a result. Raises ValueError for a file that is none of these kinds."""
    result = json.loads(path.read_text())
    if "problems" in result:
        return list(_of_tune(result["problems"]))
    if "cases" in result:
        return list(_of_coverage(result["cases"]))
    if "shapes" in result and "settings" not in result:
        return list(_of_expanded(result["shapes"]))
    raise ValueError(f"{path} is no result of bench.tune, bench.coverage or bench.products")


def _of_tune(problems: dict[str, Any]) -> Iterable[Measurement]:
    for name, row in problems.items():
        if row["kind"] not in ("planes", "int8"):
            continue
        passes = 1
        if row["kind"] == "planes":
            precision = Precision.parse(row["shape"].split()[-1])
            passes = as_format(precision.w_bits).bits * precision.a_bits
        for figures in row["tilings"].values():
            fields = dict(figures["tiling"])
            if "microseconds" not in figures or fields.pop("consumers", 2) != 2:  # an older kernel had one, too
                continue
            sizes = row["m"], row["n"], row["steps"], passes, row_bytes(_k_of(row["shape"]), row["kind"])
            counts = tile_counts(Tiling(**fields), *sizes)
            yield Measurement("tiles", name, counts, figures["microseconds"])


def _k_of(label: str) -> int:
    """K of a shape's label, such as "llama2-7b/o@2048 (2048x4096x4096) W2A2"."""
    return int(re.search(r"\d+x\d+x(\d+)", label)[1])


def _of_expanded(shapes: dict[str, Any]) -> Iterable[Measurement]:
    for shape, row in shapes.items():
        m, n, k = map(int, shape.split("x"))
        for weights, tilings in row.items():
            if "microseconds" in tilings:  # of bf16 and of bytes
                continue
            bits, _, group_size = weights.partition("g")
            is_float = any(map(_FLOAT_NAME.fullmatch, tilings))
            # The pass that brought floats into the order of bytes, before weights took that of floats.
            rest = {"numbers in order": m * k / 1000} if "tokens" in tilings else {}
            problem = f"{shape} {weights}" + (", floats" if is_float else "")
            for name, figures in tilings.items():
                match = (_FLOAT_NAME if is_float else _EXPANDED_NAME).fullmatch(name)
                if match and "microseconds" in figures:
                    splits = int(match["splits"]) if is_float else 1
                    tiling = Tiling(int(match["tile_m"]), 128, match["schedule"], int(match["slots"]), splits=splits)
                    counts = expanded_counts(tiling, m, n, k, int(bits), _chunks(group_size), is_float=is_float)
                    yield Measurement("expanded", problem, counts | rest, figures["microseconds"])


def _of_coverage(cases: dict[str, Any]) -> Iterable[Measurement]:
    for name, row in cases.items():
        chosen = row.get("plan", {}) | row.get("chosen", {})
        for figures in (chosen, *row.get("others", {}).values()):
            if "microseconds" not in figures or "tile_m" not in figures.get("tiling", {}):
                continue
            kernel, of_product, of_rest = _counts_of_operation(row, figures)
            low, high = figures["quartiles"]
            if high <= _STEADY * low:
                yield Measurement(kernel, name, of_product | of_rest, figures["microseconds"])
            times = [each["microseconds"] for each in row.get("kernels", ()) if each["name"].startswith(_PRODUCTS)]
            if figures is chosen and len(times) == 1 and figures["tiling"]["splits"] == 1:
                yield Measurement(kernel, f"{name}, kernel", of_product, times[0])


def _counts_of_operation(
    row: dict[str, Any], figures: dict[str, Any]
) -> tuple[Kernel, dict[str, float], dict[str, float]]:
    """The kernel of the product, its counts, and those of the rest of the operation."""
    (m, n, k), precision = (row["m"], row["n"], row["k"]), Precision.parse(row["precision"])
    tiling, w_bits = Tiling(**figures["tiling"]), as_format(precision.w_bits).bits
    rest = {"operation": 1.0}
    is_float = precision.a_bits is None
    if not is_float:
        rest["quantized numbers"] = m * k / 1000
    if is_float or figures.get("layout") == "tensor_cores":
        chunks = _chunks("" if precision.group_size is None else str(precision.group_size))
        return "expanded", expanded_counts(tiling, m, n, k, w_bits, chunks, is_float=is_float), rest
    pairs = w_bits * precision.a_bits
    if figures["kind"] == "int8":
        rest["bytes of weights"] = n * k / 1000
    passes = pairs if figures["kind"] == "planes" else 1
    sizes = m, n, mainloop_steps(k, figures["kind"], pairs), passes, row_bytes(k, figures["kind"])
    return "tiles", tile_counts(tiling, *sizes), rest


def _chunks(group_size: str) -> int:
    return STAGE // math.gcd(int(group_size), STAGE) if group_size else 0


def fit(measurements: list[Measurement], prior: dict[str, float]) -> Fit:
    """Coefficients of at least 0 with the least squares of relative errors; of what was not measured the prior ones."""
    names = list(dict.fromkeys([*prior, *(name for each in measurements for name in each.counts)]))
    counts = np.array([[each.counts.get(name, 0.0) for name in names] for each in measurements])
    times = np.array([each.microseconds for each in measurements])
    before = np.array([prior.get(name, 0.0) for name in names])
    found = _coefficients(counts, times, before)
    errors = np.abs(counts @ found / times - 1)
    problems = np.array([each.problem for each in measurements])
    losses = [1.0]
    for problem in dict.fromkeys(problems):
        own = problems == problem
        if own.sum() > 1 and not own.all():
            modelled = counts[own] @ _coefficients(counts[~own], times[~own], before)
            losses.append(times[own][np.argmin(modelled)] / times[own].min())
    losses = losses[1:] or losses
    return Fit(
        {name: float(f"{value:.4g}") for name, value in zip(names, found, strict=True)},
        len(times),
        *(round(float(np.quantile(errors, share)), 4) for share in (0.5, 0.95)),
        round(float(np.mean(losses)), 4),
        round(float(np.max(losses)), 4),
    )


def _coefficients(counts: np.ndarray, times: np.ndarray, before: np.ndarray) -> np.ndarray:
    near = np.flatnonzero(before)
    weight = math.sqrt(_OF_PRIOR * len(times))
    rows = np.concatenate([counts / times[:, None], weight * np.eye(len(before))[near] / before[near, None]])
    return nnls(rows, np.concatenate([np.ones(len(times)), np.full(len(near), weight)]))[0]
