"""Times products of other libraries on the same shapes, if they are installed.

- torch: `torch.matmul` in bf16 and fp16;
- humming: humming-kernels 0.1.20, bf16 activations that its layer quantizes to int8 for "A8". Each of its products is
  compared with the exact one, and so is this project's of the same weights (`shared_weights.py`), timed beside it;
- gemlite: weights of 4, 2 and 1 bits with fp16 activations, 8-bit weights with int8 activations.

The clock is CUDA events around queued CUDA graphs of twelve calls or more after a warm-up; for this project's product
beside them it is the wall around queued programs of twelve calls, which XLA makes CUDA graphs of. Calls rotate through
copies of activations and weights, so that these come from memory. Unlike the sums of kernel times of this project's
figures, these include gaps between kernels.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from bipolar_jax import Precision
from experiments.bench.peers.shared_weights import SharedProduct, check_shareable
from experiments.bench.products.cold_weights import copies_of
from experiments.bench.products.shapes import Shape
from experiments.support.progress import console
from experiments.support.timing import Timing, one_line

_RUNS = 5  # of many calls each
_CALLS = 12  # of a graph, at least


class PeerProduct(NamedTuple):
    """A product of another library.

    Attributes:
      calls: functions that each compute it once, with copies of the weights of their own.
      figures: what is stored beside the time.
    """

    calls: list[Callable[[], Any]]
    figures: dict[str, Any]


# The products of a shape by name; each is made when its turn comes.
Products = Iterator[tuple[str, Callable[[], PeerProduct]]]


def parse_peer_precisions(text: str) -> list[Precision]:
    """Reads a comma-separated list such as "W4A8,W4A16g128". Raises ValueError for what Humming does not have."""
    precisions = [Precision.parse(item) for item in text.split(",") if item]
    for precision in precisions:
        check_shareable(precision)
    return precisions


def measure_peers(
    peers: list[str], precisions: list[Precision], shape: Shape, row: dict[str, Any], config: ConfigDict
) -> None:
    """Sets row["peers"]["torch bf16"] and so on to figures, or to {"error": reason}; skips products with figures."""
    for peer in peers:
        row["peers"].pop(peer, None)
        missing = [name for name in ("torch", peer) if importlib.util.find_spec(name) is None]
        if missing:
            _record(row, shape, peer, {"error": f"{missing[0]} is not installed"})
            continue
        try:
            _check_gpu()
            for name, make in PEERS[peer](shape, precisions, config):
                if "microseconds" in row["peers"].get(f"{peer} {name}", {}):
                    continue
                try:
                    product = make()
                    figures = _cuda_microseconds(product.calls, config.iterations).to_json() | product.figures
                except Exception as error:
                    figures = {"error": one_line(error)}
                _record(row, shape, f"{peer} {name}", figures)
        except Exception as error:
            _record(row, shape, peer, {"error": one_line(error)})


def _record(row: dict[str, Any], shape: Shape, name: str, figures: dict[str, Any]) -> None:
    row["peers"][name] = figures
    line = f"{figures['microseconds']:.1f} us" if "microseconds" in figures else figures["error"]
    if "ours" in figures:
        ours = figures["ours"]
        line += f", error {figures['error_norm']:.2%}; ours "
        if "microseconds" in ours:
            line += (
                f"{ours['microseconds']:.1f} us, {ours['error_norm']:.2%}, {ours['implementation']}: {ours['kernel']}"
            )
        else:
            line += ours["error"]
    console.print(f"{shape} {name}: {line}")


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")


def _cuda_microseconds(calls: list[Callable[[], Any]], iterations: int) -> Timing:
    import torch

    stream = torch.cuda.Stream()  # a graph is captured on a stream that has been used before
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    stream.synchronize()
    rounds = -(-_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # JAX has threads, too
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    microseconds, count = [], rounds * len(calls)
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(iterations):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        microseconds.append(1e3 * start.elapsed_time(end) / (iterations * count))
    return Timing.of(microseconds, f"cuda events around {iterations} graphs of {count} calls")


def _copies(nbytes: int) -> int:
    """Number of copies of the operands that calls rotate through, whose weights have so many bytes."""
    return copies_of(np.empty(nbytes, np.uint8))


def _with_copies(layers: list[Callable[[Any], Any]], x: Any) -> list[Callable[[], Any]]:
    """Calls of the layers, each with a copy of x."""
    return [functools.partial(layer, x.clone()) for layer in layers]


def _torch(shape: Shape, precisions: list[Precision], config: ConfigDict) -> Products:
    import torch

    def product(dtype: torch.dtype) -> PeerProduct:
        def drawn(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device="cuda", dtype=dtype)

        count = _copies(2 * shape.k * shape.n)
        x, weights = drawn(shape.m, shape.k), [drawn(shape.k, shape.n) for _ in range(count)]
        return PeerProduct(_with_copies([lambda x, w=w: torch.matmul(x, w) for w in weights], x), {})

    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        yield name, lambda dtype=dtype: product(dtype)


def _humming(shape: Shape, precisions: list[Precision], config: ConfigDict) -> Products:
    import torch
    from humming import ops
    from humming.layer import HummingLayer

    def layer_of(shared: SharedProduct) -> HummingLayer:
        bits, group_size = shared.precision.w_bits, shared.precision.group_size
        layer = HummingLayer(
            shape_n=shape.n,
            shape_k=shape.k,
            weight_config={"dtype": f"int{bits}"} | ({} if group_size is None else {"group_size": group_size}),
            input_config=None if shared.precision.a_bits is None else {"dtype": "int8"},
            torch_dtype=torch.bfloat16,
        ).cuda()
        scale = torch.from_numpy(shared.group_scales).to("cuda", torch.bfloat16)
        codes = torch.from_numpy(shared.codes).to("cuda", torch.int32)
        layer.load_from_tensors({"weight": ops.pack_weight(codes, bits), "weight_scale": scale})
        layer.transform()
        return layer

    def product(precision: Precision) -> PeerProduct:
        shared = SharedProduct.random(shape, precision, config.seed)
        x = torch.from_numpy(np.array(shared.x, np.float32)).to("cuda", torch.bfloat16)
        layers = [layer_of(shared) for _ in range(_copies(shape.n * shape.k * precision.w_bits // 8))]
        error = shared.check(layers[0](x).float().cpu().numpy())
        try:
            ours = shared.measure_ours(config.iterations)
        except Exception as failure:  # which must not hide the peer's time
            ours = {"error": one_line(failure)}
        return PeerProduct(_with_copies(layers, x), {"error_norm": error, "ours": ours})

    for precision in precisions:
        yield str(precision), lambda precision=precision: product(precision)


def _gemlite(shape: Shape, precisions: list[Precision], config: ConfigDict) -> Products:
    import torch
    from gemlite.helper import A8W8_int8_dynamic, A16Wn

    x = torch.randn(shape.m, shape.k, device="cuda", dtype=torch.float16)

    def layer_of(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if bits == 8:
            weight = torch.randn(shape.n, shape.k, device="cuda", dtype=torch.float16)
            return A8W8_int8_dynamic(device="cuda:0").from_weights(weight)
        codes = torch.randint(0, 1 << bits, (shape.n, shape.k), device="cuda", dtype=torch.uint8)
        ones = torch.ones(shape.n, 1, device="cuda", dtype=torch.float16)
        return A16Wn(device="cuda:0").from_weights(codes, ones, ones, bits, shape.k)

    def product(bits: int) -> PeerProduct:
        layers = [layer_of(bits) for _ in range(_copies(shape.n * shape.k * bits // 8))]
        return PeerProduct(_with_copies(layers, x), {})

    for name, bits in (("W8A8", 8), ("W4A16", 4), ("W2A16", 2), ("W1A16", 1)):
        yield name, lambda bits=bits: product(bits)


PEERS: dict[str, Callable[[Shape, list[Precision], ConfigDict], Products]] = {
    "torch": _torch,
    "gemlite": _gemlite,
    "humming": _humming,
}
