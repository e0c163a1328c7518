"""Terminal output of the matmul benchmark."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from experiments.support.progress import console


def line(measured: dict[str, Any]) -> str:
    """The figures of one precision in one line."""
    if "operation" not in measured:
        return measured["error"]
    texts = []
    for name in ("kernel", "product", "operation"):
        figures = measured[name]
        if figures is not None:
            speedup = "" if figures["speedup"] is None else f" ({figures['speedup']:.2f}x bf16)"
            texts.append(f"{name} {figures['microseconds']:.1f} us{speedup}")
    if measured["kernel"] is not None:
        texts.append(f"{measured['kind']}, {measured['kernel']['ceiling_share']:.0%} of the ceiling")
    return ", ".join(texts)


def print_tables(result: dict[str, Any]) -> None:
    """Prints all products, and the quantizers beside a device copy."""
    table = Table(title=f"matrix products on {result['settings']['device']}, median microseconds")
    for heading in (
        "shape",
        "precision",
        "kernel",
        "x bf16",
        "ceiling",
        "roofline",
        "product",
        "x int8",
        "operation",
        "x bf16",
    ):
        table.add_column(heading, justify="left" if heading in ("shape", "precision") else "right")
    for name, row in result["shapes"].items():
        reference = {key: row[key].get("microseconds") for key in ("bf16", "int8")}
        for key, microseconds in reference.items():
            table.add_row(name, f"XLA {key}", "", "", "", "", "", "", _number(microseconds), "")
        for peer, figures in row["peers"].items():
            table.add_row(name, peer, "", "", "", "", "", "", _number(figures.get("microseconds")), "")
        for precision, measured in row["precisions"].items():
            if "operation" not in measured:
                table.add_row(name, precision, measured["error"][:40])
                continue
            kernel, operation = measured["kernel"] or {}, measured["operation"]
            product = measured["product"] or kernel
            versus_int8 = _ratio(reference["int8"], product.get("microseconds"))
            table.add_row(
                name,
                precision,
                _number(kernel.get("microseconds")),
                _number(kernel.get("speedup"), 2),
                _percent(kernel.get("ceiling_share")),
                _percent(kernel.get("roofline_share")),
                _number(product.get("microseconds")),
                _number(versus_int8, 2),
                _number(operation["microseconds"]),
                _number(operation["speedup"], 2),
            )
    console.print(table)
    if result["quantizers"]:
        table = Table(title="quantize and pack, and a device copy of the same activations")
        for heading in ("size", "operand", "microseconds", "TB/s", "of copy"):
            table.add_column(heading, justify="left" if heading in ("size", "operand") else "right")
        for size, rows in result["quantizers"].items():
            for operand, figures in rows.items():
                bandwidth = figures.get("terabytes_per_second")
                share = _ratio(bandwidth, rows["copy"].get("terabytes_per_second"))
                table.add_row(
                    size, operand, _number(figures.get("microseconds")), _number(bandwidth, 2), _percent(share)
                )
        console.print(table)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
