"""Times matrix products at many precisions against XLA's bf16 and int8 products in the same run.

    python -m experiments.bench.matmul --config=configs/bench/matmul.py --workdir=DIR \\
        --config.shapes=4096,llama2-7b@2048 --config.precisions=W1A1,W2A4

Times for every shape and precision:

- "kernel": the matmul kernel, from prepared operands to bf16;
- "product", for int8 kernels only: the same from packed weights, which are expanded to bytes first, or with integer
  groups ("W4A8g128") in registers;
- "operation": `bj.matmul`, which also quantizes the bf16 activations.

Each is checked against the exact product first. Products of few tokens rotate through enough copies of the weights
that these come from memory, not from the L2 cache. Writes result.json, speedup.png and roofline.png to --workdir. A
stopped run resumes and retries failed precisions; concurrent runs with different shapes may share a workdir (see
`device_lock`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bipolar_jax.models.inference.xla_flags import enable_command_buffers
from bipolar_jax.ops.dispatch import check_implementation
from experiments.bench.peers.products import PEERS, measure_peers, parse_peer_precisions
from experiments.bench.products.cold_weights import few_tokens, with_cold_weights
from experiments.bench.products.exactness import measure_exactness
from experiments.bench.products.operands import Operands, int8_product
from experiments.bench.products.plots import plot_roofline, plot_speedup
from experiments.bench.products.product import Call, Ceilings, Product, check_device, parse_products
from experiments.bench.products.quantize_bandwidth import measure_quantizers
from experiments.bench.products.report import line, print_tables
from experiments.bench.products.shapes import Shape, parse_shapes
from experiments.support import app
from experiments.support.device_lock import device_lock, device_unlocked
from experiments.support.progress import console, progress_bar
from experiments.support.timing import compile_all, measure, one_line, raise_if_error
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

# Settings that the figures depend on; all results in a workdir share them.
_SETTINGS = ("implementation", "iterations", "seed")


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    with device_lock():
        _measure(config, workdir)


def _measure(config: ConfigDict, workdir: Path) -> None:
    shapes = parse_shapes(config.shapes)
    products_of = {shape.name: parse_products(shape, config.precisions, config.implementation) for shape in shapes}
    check_implementation(config.implementation)
    check_device(config.implementation)
    peers = app.parse_names("peers", config.peers, PEERS)
    peer_precisions = parse_peer_precisions(config.peer_precisions)
    ceilings = Ceilings.of(config.ceilings)
    settings = {name: config[name] for name in _SETTINGS}
    settings |= {"ceilings": dataclasses.asdict(ceilings), "device": jax.devices()[0].device_kind}
    settings["kernels_sha256"] = kernels_fingerprint()
    result = read_result(workdir, settings, {"shapes": (), "quantizers": ()}) or {
        "settings": settings,
        "shapes": {},
        "quantizers": {},
    }
    result["environment"] = environment()

    names = [shape.name for shape in shapes]
    activation_sizes = [f"{shape.m}x{shape.k}" for shape in shapes]

    def save() -> None:
        save_result(workdir, result, shapes=names, quantizers=activation_sizes)

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
    for shape in shapes:  # last, because other libraries may disturb the profiler
        measure_peers(peers, peer_precisions, shape, result["shapes"][shape.name], config)
    save()
    plot_speedup(result, workdir / "speedup.png")
    plot_roofline(result, workdir / "roofline.png")
    print_tables(result)
    console.print(f"results and plots: {workdir}")


def _measure_references(
    shape: Shape, row: dict[str, Any], operands: Operands, ceilings: Ceilings, config: ConfigDict
) -> None:
    """Times XLA's bf16 product, x [m, k] times w [k, n], and its int8 product with int32 output, k last in both."""
    calls = {"bf16": (jnp.dot, (operands.x, operands.dense_w)), "int8": (int8_product, operands.int8)}
    count = dict.fromkeys(calls, 1)
    if few_tokens(shape):
        for name, call in calls.items():
            calls[name], count[name] = with_cold_weights(call, 1)
    todo = {name: call for name, call in calls.items() if "microseconds" not in row[name]}
    compiled = compile_all(todo, threads=1)  # with the device locked: XLA autotunes on it
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


class _TimedCall(NamedTuple):
    """A function of a product in the form that is checked and in the form that is timed.

    Attributes:
      checked: the function with its arguments.
      timed: the same, or a function that calls it `calls` times on copies of the arguments.
      calls: number of calls in one timed run.
    """

    checked: Call
    timed: Call
    calls: int


def _timed_calls(product: Product, operands: Operands) -> dict[str, _TimedCall]:
    """The functions to check ("integers" too) and to time (all others), by name."""
    calls = {"operation": product.operation(operands)}
    if product.implementation == "sm90":
        if product.kind == "int8":  # kernels on planes take the packed weights directly
            calls["product"] = product.product(operands)
        if product.group_size is None:
            calls["kernel"] = product.kernel(operands)
    if few_tokens(operands.shape):
        timed_calls = {name: _TimedCall(call, *with_cold_weights(call, 1)) for name, call in calls.items()}
    else:
        timed_calls = {name: _TimedCall(call, call, 1) for name, call in calls.items()}
    if product.has_integers:
        integers = product.integers(operands)
        timed_calls["integers"] = _TimedCall(integers, integers, 1)
    return timed_calls


def _measure_precisions(
    products: dict[str, Product],
    row: dict[str, Any],
    operands: Operands,
    ceilings: Ceilings,
    config: ConfigDict,
    save,
) -> None:
    """Compiles all precisions of one shape together, then checks and times them one by one."""
    todo = {name: product for name, product in products.items() if "operation" not in row["precisions"].get(name, {})}
    timed_calls = {name: _timed_calls(product, operands) for name, product in todo.items()}
    calls = {}
    for name, functions in timed_calls.items():
        for function_name, (checked, timed, _) in functions.items():
            calls[name, function_name, "checked"] = checked
            if timed is not checked:
                calls[name, function_name, "timed"] = timed
    with progress_bar(f"compiling {len(calls)} functions"), device_unlocked():
        compiled = compile_all(calls, config.compile_threads)
    for name, product in todo.items():
        compiled_calls = {
            function: [
                compiled.get((name, function, use), compiled[name, function, "checked"]) for use in ("checked", "timed")
            ]
            for function in timed_calls[name]
        }
        try:
            measured = _measure_product(product, timed_calls[name], compiled_calls, operands, ceilings, row, config)
        except Exception as error:
            measured = {"error": one_line(error)}
        row["precisions"][name] = measured
        console.print(f"{product.shape} {name}: {line(measured)}")
        save()


def _measure_product(product, timed_calls, compiled_calls, operands, ceilings, row, config) -> dict[str, Any]:
    """Checks and times one precision of one shape.

    Raises:
      Exception: an error of compiling, checking or running.
    """
    measured: dict[str, Any] = {"compared": 0, "kind": None, "kernel": None, "product": None}
    if "integers" in timed_calls:
        measured["compared"] = product.check_integers(operands, raise_if_error(compiled_calls["integers"][0]))
    bf16 = row["bf16"].get("microseconds")
    for name in ("kernel", "product", "operation"):
        if name not in timed_calls:
            continue
        (_, args), (_, timed_args), calls = timed_calls[name]
        checked, timed = map(raise_if_error, compiled_calls[name])
        check = product.check_kernel if name == "kernel" else product.check_operation
        error = check(operands, checked(*args))
        timing = measure(timed, *timed_args, iterations=config.iterations).divided(calls)
        measured[name] = timing.to_json() | {
            "error": float(f"{error:.3g}"),
            "speedup": None if bf16 is None else round(bf16 / timing.median, 3),
        }
    if product.implementation == "sm90":
        choice = product.choice
        measured |= {"kind": choice.kind, "tiling": dataclasses.asdict(choice.tiling), "reason": choice.reason}
    if measured["kernel"] is not None:
        median = measured["kernel"]["microseconds"]
        # A kernel on planes multiplies every pair of planes.
        operations = product.shape.operations * (product.pairs if product.kind == "planes" else 1)
        measured["kernel"] |= {
            "ceiling_share": round(ceilings.compute_microseconds(product) / median, 4),
            "roofline_share": round(ceilings.roofline_microseconds(product) / median, 4),
            "operations_per_second": operations / median * 1e6,
            "operations_per_byte": operations / product.kernel_bytes,
        }
    return measured


if __name__ == "__main__":
    enable_command_buffers()  # the twelve calls beside a peer's are one CUDA graph, as the peer's are
    app.run(main)
