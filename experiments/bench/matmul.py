"""Times matrix products at many precisions against XLA's bf16 and int8 products in the same run.

    python -m experiments.bench.matmul --config=configs/bench/matmul.py --workdir=DIR \\
        --config.shapes=4096,llama2-7b@2048 --config.precisions=W1A1,W2A4

For every shape and precision three things are timed: the kernel alone, from operands as it takes them
to bf16 (of up to 64 tokens with the weights in turn from as many places that they are not in the L2
cache); where that is bytes the product, which expands weights from their packed planes first; and the
whole operation, which quantizes bf16 activations besides. Each is compared with the exact product first.
Under --workdir come result.json, speedup.png and roofline.png. A run that was stopped goes on where it
was, and tries again what failed; several runs at once may share a workdir, each with shapes of its own
(see `turns`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bipolar_jax.ops.dispatch import check_implementation
from experiments.bench.products.candidates import Call, Ceilings, Product, check_device, parse_products, raise_if_error
from experiments.bench.products.cold_weights import few_tokens, with_cold_weights
from experiments.bench.products.exactness import measure_exactness
from experiments.bench.products.operands import Operands, int8_product
from experiments.bench.products.peers import PEERS, measure_peers, parse_peers
from experiments.bench.products.plots import plot_roofline, plot_speedup
from experiments.bench.products.quantize_bandwidth import measure_quantizers
from experiments.bench.products.report import line, print_tables
from experiments.bench.products.shapes import Shape, parse_shapes
from experiments.support import app
from experiments.support.progress import console, progress_bar
from experiments.support.timing import compile_all, measure, one_line
from experiments.support.turns import device_turn, others_turn
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

# What a figure depends on; a workdir holds results of one choice of these.
_SETTINGS = ("implementation", "iterations", "seed")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the whole experiment; see the module's docstring."""
    with device_turn():
        _measure(config, workdir)


def _measure(config: ConfigDict, workdir: Path) -> None:
    shapes = parse_shapes(config.shapes)
    products_of = {shape.name: parse_products(shape, config.precisions, config.implementation) for shape in shapes}
    check_implementation(config.implementation)
    check_device(config.implementation)
    peers = parse_peers(config.peers, PEERS)
    ceilings = Ceilings.of(config.ceilings)
    settings = {name: config[name] for name in _SETTINGS}
    settings |= {"ceilings": dataclasses.asdict(ceilings), "device": jax.devices()[0].device_kind}
    settings["kernels_sha256"] = kernels_fingerprint()
    result = read_result(workdir, settings) or {"settings": settings, "shapes": {}, "quantizers": {}}
    result["environment"] = environment()

    names = [shape.name for shape in shapes]
    activations = [f"{shape.m}x{shape.k}" for shape in shapes]

    def save() -> None:
        save_result(workdir, result, shapes=names, quantizers=activations)

    for shape in shapes:
        products = products_of[shape.name]
        empty = {"m": shape.m, "n": shape.n, "k": shape.k, "bf16": {}, "int8": {}, "peers": {}, "precisions": {}}
        row = result["shapes"].setdefault(shape.name, empty)
        operands = Operands(shape, config.seed)
        _measure_references(shape, row, operands, ceilings, config)
        save()
        _measure_precisions(products, row, operands, ceilings, config, save)
        if shape.m * shape.k >= config.quantizer_elements and config.implementation == "sm90":
            measure_quantizers(operands, products.values(), result["quantizers"], config)
            save()
    measure_exactness(config, result, save)
    for shape in shapes:  # last, since other libraries may disturb the profiler
        measure_peers(peers, shape, result["shapes"][shape.name], config)
    save()
    plot_speedup(result, workdir / "speedup.png")
    plot_roofline(result, workdir / "roofline.png")
    print_tables(result)
    console.print(f"results and plots: {workdir}")


def _measure_references(
    shape: Shape, row: dict[str, Any], operands: Operands, ceilings: Ceilings, config: ConfigDict
) -> None:
    """XLA's bf16 product, x [m, k] times w [k, n], and its int8 product with int32 output, k last in both."""
    calls = {"bf16": (jnp.dot, (operands.x, operands.dense_w)), "int8": (int8_product, operands.int8)}
    count = dict.fromkeys(calls, 1)
    if few_tokens(shape):
        for name, call in calls.items():
            calls[name], count[name] = with_cold_weights(call, 1)
    todo = {name: call for name, call in calls.items() if "microseconds" not in row[name]}
    compiled = compile_all(todo, threads=1)  # XLA tries its variants on the device while it compiles
    for name, (_, args) in todo.items():
        try:
            timing = measure(raise_if_error(compiled[name]), *args, iterations=config.iterations).divided(count[name])
        except Exception as error:
            row[name] = {"error": one_line(error)}
            console.print(f"{shape} XLA {name}: {row[name]['error']}")
            continue
        share = 1e6 * shape.operations / getattr(ceilings, name) / timing.median
        row[name] = timing.to_json() | {"ceiling_share": round(share, 4)}
        console.print(f"{shape} XLA {name}: {timing.median:.1f} us, {share:.0%} of the ceiling")


class _Part(NamedTuple):
    """One function of a product as it is checked, and as it is timed, where it may be called several times."""

    checked: Call
    timed: Call
    calls: int


def _parts_of(product: Product, operands: Operands) -> dict[str, _Part]:
    calls = {"operation": product.operation(operands)}
    if product.implementation == "sm90":
        if product.kind == "int8":  # else the kernel takes the weights as they are
            calls["product"] = product.product(operands)
        if product.group_size is None:
            calls["kernel"] = product.kernel(operands)
    if few_tokens(operands.shape):
        parts = {name: _Part(call, *with_cold_weights(call, 1)) for name, call in calls.items()}
    else:
        parts = {name: _Part(call, call, 1) for name, call in calls.items()}
    if product.group_size is None:
        integers = product.integers(operands)
        parts["integers"] = _Part(integers, integers, 1)
    return parts


def _measure_precisions(
    products: dict[str, Product],
    row: dict[str, Any],
    operands: Operands,
    ceilings: Ceilings,
    config: ConfigDict,
    save,
) -> None:
    """Every precision of one shape: compiled together, then checked and timed one by one."""
    todo = {name: product for name, product in products.items() if "operation" not in row["precisions"].get(name, {})}
    parts = {name: _parts_of(product, operands) for name, product in todo.items()}
    calls = {}
    for name, some in parts.items():
        for part, (checked, timed, _) in some.items():
            calls[name, part, "checked"] = checked
            if timed is not checked:
                calls[name, part, "timed"] = timed
    with progress_bar(f"compiling {len(calls)} functions"), others_turn():
        compiled = compile_all(calls, config.compile_threads)
    for name, product in todo.items():
        functions = {
            part: [compiled.get((name, part, use), compiled[name, part, "checked"]) for use in ("checked", "timed")]
            for part in parts[name]
        }
        try:
            measured = _measure_product(product, parts[name], functions, operands, ceilings, row, config)
        except Exception as error:
            measured = {"error": one_line(error)}
        row["precisions"][name] = measured
        console.print(f"{product.shape} {name}: {line(measured)}")
        save()


def _measure_product(product, parts, functions, operands, ceilings, row, config) -> dict[str, Any]:
    """Checks, then timings, of one precision of one shape.

    Raises:
      Exception: whatever compiling, checking or running raises.
    """
    measured: dict[str, Any] = {"compared": 0, "kind": None, "kernel": None, "product": None}
    if "integers" in parts:
        measured["compared"] = product.check_integers(operands, raise_if_error(functions["integers"][0]))
    bf16 = row["bf16"].get("microseconds")
    for part in ("kernel", "product", "operation"):
        if part not in parts:
            continue
        (_, args), (_, timed_args), calls = parts[part]
        checked, timed = map(raise_if_error, functions[part])
        check = product.check_kernel if part == "kernel" else product.check_operation
        error = check(operands, checked(*args))
        timing = measure(timed, *timed_args, iterations=config.iterations).divided(calls)
        measured[part] = timing.to_json() | {
            "error": float(f"{error:.3g}"),
            "speedup": None if bf16 is None else round(bf16 / timing.median, 3),
        }
    if product.implementation == "sm90":
        choice = product.choice
        measured |= {"kind": choice.kind, "tiling": dataclasses.asdict(choice.tiling), "reason": choice.reason}
    if measured["kernel"] is not None:
        median = measured["kernel"]["microseconds"]
        measured["kernel"] |= {
            "ceiling_share": round(ceilings.compute_microseconds(product) / median, 4),
            "roofline_share": round(ceilings.roofline_microseconds(product) / median, 4),
            "operations_per_second": product.shape.operations * _passes(product) / median * 1e6,
            "operations_per_byte": product.shape.operations * _passes(product) / product.kernel_bytes,
        }
    return measured


def _passes(product: Product) -> int:
    """How often the tensor cores go over K."""
    return product.pairs if product.kind == "planes" else 1


if __name__ == "__main__":
    app.run(main)
