"""Bandwidth of the kernel that quantizes and packs activations, beside that of a device copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.semantics.activations import quantize_tokens
from experiments.bench.products.cold_weights import L2_BYTES
from experiments.bench.products.operands import OperandKind, Operands, PackedTokens, quantizer
from experiments.bench.products.product import Product
from experiments.support.device_lock import device_unlocked
from experiments.support.progress import console
from experiments.support.timing import compile_all, measure, one_line, raise_if_error

_CHECKED_ROWS = 64
_COLD_BYTES, _MOST_COPIES = 4 * L2_BYTES, 8  # small activations stay in the cache
# Share of a row's codes that may differ by one: activations halfway between two codes round either way.
_HALFWAY_SHARE = 1e-3


def measure_quantizers(
    operands: Operands, products: Iterable[Product], results: dict[str, Any], config: ConfigDict
) -> None:
    """Sets results["8192x8192"]["2 bits, planes"] and so on, for all operand kinds of the products, and ["copy"]."""
    m, k = operands.x.shape
    rows = results.setdefault(f"{m}x{k}", {})
    wanted = sorted({(product.kind, product.a_format.bits) for product in products})
    # Several copies, so that activations are read from memory and not from the L2 cache.
    copies = min(_MOST_COPIES, -(-_COLD_BYTES // operands.x.nbytes))
    xs = tuple(jnp.roll(operands.x, shift, axis=0) for shift in range(copies))
    calls = {"copy": (_each(jnp.negative), xs)}  # negation, because XLA would remove a plain copy
    formats = {f"{bits} bits, {kind}": (BipolarFormat(bits), kind) for kind, bits in wanted}
    for name, (a_format, kind) in formats.items():
        calls[name] = _each(quantizer(a_format, kind)), xs
    todo = {name: call for name, call in calls.items() if "microseconds" not in rows.get(name, {})}
    with device_unlocked():
        compiled = compile_all(todo, config.compile_threads)
    for name, (_, args) in todo.items():
        try:
            function = raise_if_error(compiled[name])
            output = function(*args)
            if name in formats:
                _check(operands.x, output[0], *formats[name])
            timing = measure(function, *args, iterations=config.iterations)
            nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((args, output)))
            timing = timing.divided(len(xs))
            nbytes //= len(xs)
            rows[name] = timing.to_json() | {
                "bytes": nbytes,
                "terabytes_per_second": nbytes / timing.median / 1e6,
            }
            line = f"{timing.median:.1f} us, {rows[name]['terabytes_per_second']:.2f} TB/s"
        except Exception as error:
            rows[name] = {"error": one_line(error)}
            line = rows[name]["error"]
        console.print(f"quantize and pack {m}x{k}, {name}: {line}")


def _each(function):
    return lambda *xs: [function(x) for x in xs]


def _check(x: jax.Array, packed: PackedTokens, a_format: BipolarFormat, kind: OperandKind) -> None:
    """Compares scales and sums of codes of the first rows with `quantize_tokens`.

    Raises:
      ValueError: a scale differs, or a sum by more than ties in rounding explain.
    """
    tokens = jax.jit(quantize_tokens, static_argnums=1)(x[:_CHECKED_ROWS], a_format)
    if not np.array_equal(packed.scale[:_CHECKED_ROWS], tokens.scale):
        raise ValueError(f"wrong scales from the quantizer to {a_format.bits} bits ({kind})")
    sums = np.sum(np.asarray(tokens.codes, np.int64), axis=1)
    differing = np.abs(np.asarray(packed.code_sums[:_CHECKED_ROWS]) - sums).max()
    if differing > max(1, _HALFWAY_SHARE * x.shape[1]):
        raise ValueError(
            f"wrong codes from the quantizer to {a_format.bits} bits ({kind}): a sum of codes is off by {differing}"
        )
