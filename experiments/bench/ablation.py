"""Times the Hopper matmul with each of its four optimizations disabled in turn, on the same operands.

    python -m experiments.bench.ablation --config=configs/bench/ablation.py --workdir=DIR --config.shapes=4096

- "signed planes": two's complement instead of bipolar planes; products of one sign plane are subtracted;
- "packed in the call": both operands are stored as bytes, and every call packs them into planes;
- "recovered in memory": every pair of planes is a separate matmul, whose int32 result goes through memory;
- "fixed tiling": one tile shape for all problems.

Each variant is checked against the exact product before it is timed. Writes result.json and ablation.png to
--workdir. A stopped run resumes and retries failed variants; concurrent runs with different shapes may share a
workdir (see `device_lock`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.table import Table

from experiments.bench.products import ablation_variants as variants
from experiments.bench.products.operands import Operands, check_output
from experiments.bench.products.plots import plot_ablation
from experiments.bench.products.product import Product, check_device, parse_products
from experiments.bench.products.shapes import parse_shapes
from experiments.support import app
from experiments.support.device_lock import device_lock, device_unlocked
from experiments.support.progress import console, progress_bar
from experiments.support.timing import compile_all, measure, one_line, raise_if_error
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

FULL = "full system"
_BF16 = "XLA bf16"
_SETTINGS = ("iterations", "seed")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    fixed = variants.parse_tiling(config.fixed_tiling)
    products = [
        (f"{shape.name} {name}", product)
        for shape in parse_shapes(config.shapes)
        for name, product in parse_products(shape, config.precisions, "sm90").items()
    ]
    for name, product in products:
        if product.has_few_tokens:
            raise ValueError(
                f"{name} runs the few-token kernel, which has no such variants: ask for more than 64 tokens"
            )
        if product.kind != "planes" or product.w_format.ternary or product.group_size is not None:
            raise ValueError(
                f"{name} has no variant with two's complement planes: ask for 1 to 8 pairs of planes, without ternary "
                "weights and groups"
            )
    check_device("sm90")
    with device_lock():
        _measure(products, fixed, config, workdir)


def _measure(products: list[tuple[str, Product]], fixed: variants.Tiling, config: ConfigDict, workdir: Path) -> None:
    settings = {name: config[name] for name in _SETTINGS}
    settings |= {"fixed_tiling": dataclasses.asdict(fixed), "device": jax.devices()[0].device_kind}
    settings["kernels_sha256"] = kernels_fingerprint()
    result = read_result(workdir, settings, {"products": ()}) or {"settings": settings, "products": {}}
    result["environment"] = environment()
    operands: Operands | None = None
    for name, product in products:
        if operands is None or operands.shape != product.shape:
            operands = Operands(product.shape, config.seed)
        row = result["products"].setdefault(name, {"variants": {}})
        _measure_product(name, product, row, operands, fixed, config)
        save_result(workdir, result, products=[name for name, _ in products])
    plot_ablation(result, workdir / "ablation.png", full=FULL)
    _print_table(result)
    console.print(f"results and plot: {workdir}")


def _measure_product(
    name: str, product: Product, row: dict[str, Any], operands: Operands, fixed: variants.Tiling, config: ConfigDict
) -> None:
    """Times the full system, every variant and XLA's bf16 product; skips those that have a time already."""
    calls = {
        FULL: variants.full(product, operands),
        "signed planes": variants.signed_planes(product, operands),
        "packed in the call": variants.packed_in_the_call(product, operands),
        "recovered in memory": variants.recovered_in_memory(product, operands),
        "fixed tiling": variants.fixed_tiling(product, operands, fixed),
        _BF16: (jnp.dot, (operands.x, operands.dense_w)),
    }
    todo = {variant: call for variant, call in calls.items() if "microseconds" not in row["variants"].get(variant, {})}
    bf16 = {variant: call for variant, call in todo.items() if variant == _BF16}
    compiled = compile_all(bf16, threads=1)  # with the device locked: XLA autotunes on it
    with progress_bar(f"{name}: compiling {len(todo)} variants"), device_unlocked():
        compiled |= compile_all(
            {variant: call for variant, call in todo.items() if variant not in bf16}, config.compile_threads
        )
    for variant, (_, args) in todo.items():
        try:
            function = raise_if_error(compiled[variant])
            if variant != _BF16:
                output = function(*args)
                check_output(output, operands.sampled(output), variants.expected_output(variant, product, operands))
            figures = measure(function, *args, iterations=config.iterations).to_json()
            line = f"{figures['microseconds']:.1f} us"
        except Exception as error:
            figures = {"error": one_line(error)}
            line = figures["error"]
        row["variants"][variant] = figures
        console.print(f"{name}, {variant}: {line}")
    row["tiling"] = dataclasses.asdict(product.choice.tiling)
    full = row["variants"][FULL].get("microseconds")
    for figures in row["variants"].values():
        if full is not None and "microseconds" in figures:
            figures["slowdown"] = round(figures["microseconds"] / full, 3)


def _print_table(result: dict[str, Any]) -> None:
    names = list(dict.fromkeys(variant for row in result["products"].values() for variant in row["variants"]))
    table = Table(title=f"one optimization disabled at a time, {result['settings']['device']}: microseconds (slowdown)")
    table.add_column("product")
    for variant in names:
        table.add_column(variant, justify="right")
    for name, row in result["products"].items():
        cells = [row["variants"].get(variant, {}) for variant in names]
        table.add_row(name, *(_cell(figures) for figures in cells))
    console.print(table)


def _cell(figures: dict[str, Any]) -> str:
    if "microseconds" not in figures:
        return "failed"
    slowdown = f" ({figures['slowdown']:.2f}x)" if "slowdown" in figures else ""
    return f"{figures['microseconds']:.1f}{slowdown}"


if __name__ == "__main__":
    app.run(main)
