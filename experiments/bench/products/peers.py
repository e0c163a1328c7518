"""Times products of other libraries on the same shapes, if they are installed.

- torch: `torch.matmul` in bf16 and fp16;
- humming: weights of 8, 4, 2 and 1 bits with fp16 activations, which its layer quantizes to int8 for "A8";
- gemlite: weights of 4, 2 and 1 bits with fp16 activations, 8-bit weights with int8 activations.

The clock is CUDA events around many queued calls after a warm-up. Unlike the sums of kernel times of this project's
figures, these include gaps between launches that the queue does not hide.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from experiments.bench.products.shapes import Shape
from experiments.support.progress import console
from experiments.support.timing import Timing, one_line

_RUNS = 5  # of many calls each

Calls = Iterator[tuple[str, Callable[[], Any]]]


def measure_peers(peers: list[str], shape: Shape, row: dict[str, Any], config: ConfigDict) -> None:
    """Sets row["peers"]["torch bf16"] and so on to figures, or to {"error": reason}; skips peers that have figures."""
    for peer in peers:
        measured = [name for name in row["peers"] if name.partition(" ")[0] == peer]
        if measured and all("microseconds" in row["peers"][name] for name in measured):
            continue
        row["peers"].pop(peer, None)
        missing = [name for name in ("torch", peer) if importlib.util.find_spec(name) is None]
        if missing:
            _record(row, shape, peer, {"error": f"{missing[0]} is not installed"})
            continue
        try:
            for name, call in PEERS[peer](shape):
                try:
                    figures = _cuda_microseconds(call, config.iterations).to_json()
                except Exception as error:
                    figures = {"error": one_line(error)}
                _record(row, shape, f"{peer} {name}", figures)
        except Exception as error:
            _record(row, shape, peer, {"error": one_line(error)})


def _record(row: dict[str, Any], shape: Shape, name: str, figures: dict[str, Any]) -> None:
    row["peers"][name] = figures
    line = f"{figures['microseconds']:.1f} us" if "microseconds" in figures else figures["error"]
    console.print(f"{shape} {name}: {line}")


def _cuda_microseconds(call: Callable[[], Any], iterations: int) -> Timing:
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    microseconds = []
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(iterations):
            call()
        end.record()
        torch.cuda.synchronize()
        microseconds.append(1e3 * start.elapsed_time(end) / iterations)
    return Timing.of(microseconds, f"cuda events around {iterations} calls")


def _torch(shape: Shape) -> Calls:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        x = torch.randn(shape.m, shape.k, device="cuda", dtype=dtype)
        w = torch.randn(shape.k, shape.n, device="cuda", dtype=dtype)
        yield name, lambda x=x, w=w: torch.matmul(x, w)


def _humming(shape: Shape) -> Calls:
    import torch
    from humming.layer import HummingLayer

    x = torch.randn(shape.m, shape.k, device="cuda", dtype=torch.float16)
    weight = torch.randn(shape.n, shape.k, device="cuda", dtype=torch.float16)
    for activations, bits in (("int8", 8), ("int8", 4), ("int8", 2), ("int8", 1), ("fp16", 4), ("fp16", 1)):
        options = {"input_config": {"dtype": "int8"}} if activations == "int8" else {}
        layer = HummingLayer(
            shape_n=shape.n,
            shape_k=shape.k,
            weight_config={"dtype": f"int{bits}"},
            torch_dtype=torch.float16,
            **options,
        ).cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        layer.prepare_default_kernel_configs()
        yield f"W{bits}A{8 if activations == 'int8' else 16}", lambda layer=layer: layer(x)


def _gemlite(shape: Shape) -> Calls:
    import torch
    from gemlite.helper import A8W8_int8_dynamic, A16Wn

    x = torch.randn(shape.m, shape.k, device="cuda", dtype=torch.float16)
    weight = torch.randn(shape.n, shape.k, device="cuda", dtype=torch.float16)
    layer = A8W8_int8_dynamic(device="cuda:0").from_weights(weight)
    yield "W8A8", lambda: layer(x)
    for bits in (4, 2, 1):
        codes = torch.randint(0, 1 << bits, (shape.n, shape.k), device="cuda", dtype=torch.uint8)
        ones = torch.ones(shape.n, 1, device="cuda", dtype=torch.float16)
        packed = A16Wn(device="cuda:0").from_weights(codes, ones, ones, bits, shape.k)
        yield f"W{bits}A16", lambda packed=packed: packed(x)


PEERS: dict[str, Callable[[Shape], Calls]] = {"torch": _torch, "gemlite": _gemlite, "humming": _humming}
