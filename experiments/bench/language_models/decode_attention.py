"""Times attention of new tokens to a cache, by how its blocks divide the work, on one GPU.

    python -m experiments.bench.language_models.decode_attention --out=DIR/decode_attention.json

Of texts of Llama-3-8B: "16x480" are 16 texts of 480 positions. The kernel's time alone, with caches from memory: a call
goes through those of 8 layers. "GB/s" counts keys and values of the texts. The first line of a shape is what is chosen;
all agree with it up to the order of sums.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax.kernels.sm90.core.execution import check_runnable, interpret_params
from bipolar_jax.kernels.sm90.decode_attention.config import plan_attention
from bipolar_jax.kernels.sm90.decode_attention.launch import decode_attention
from experiments.support.kernel_times import profile_kernels
from experiments.support.progress import console

SHAPES = "4x1024,16x480,64x256"
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 8, 128, 8
_TOLERANCE = 2.0**-6  # roundings of bf16
Division = tuple[int, int, int]  # blocks that divide a text, texts of a block, its warpgroups


def operands(texts: int, positions: int, layers: int = LAYERS, heads: int = HEADS, kv_heads: int = KV_HEADS) -> tuple:
    """Joined heads of the new tokens, keys, values, and lengths."""
    keys = jax.random.split(jax.random.key(0), 3)
    capacity = -(-(positions + 1) // 64) * 64
    projected = jax.random.normal(keys[0], (texts, heads + 2 * kv_heads, HEAD_DIM), jnp.bfloat16)
    shape = (layers, texts, kv_heads, capacity, HEAD_DIM)
    cache = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:]]
    return projected, *cache, jnp.full(texts, positions, jnp.int32)


def divisions(texts: int, capacity: int) -> list[Division]:
    """The one that is chosen, and others."""
    plan = plan_attention(texts, HEADS, KV_HEADS, capacity, HEAD_DIM, jnp.dtype(jnp.bfloat16), None)
    others = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 4, 2)]
    own = plan.splits, plan.sequences, plan.warpgroups
    return [own, *(other for other in others if other != own and texts % other[1] == 0)]


def attend(projected, keys, values, lengths, *, division: Division):
    """Contexts of all layers, [layers, texts, heads, HEAD_DIM]."""
    options: dict[str, Any] = dict(zip(("splits", "sequences", "warpgroups"), division, strict=True))
    options["interpret"] = interpret_params()
    contexts, keys, values = [], (keys,), (values,)
    for layer in range(keys[0].shape[0]):
        context, keys, values = decode_attention((projected,), keys, values, jnp.int32(layer), lengths, **options)
        contexts.append(context)
    return jnp.stack(contexts)


def measure_shape(texts: int, positions: int, iterations: int) -> dict[str, float]:
    """Microseconds of one layer, by division."""
    args, figures, expected = operands(texts, positions), {}, None
    nbytes = 2 * texts * positions * KV_HEADS * HEAD_DIM * args[1].dtype.itemsize
    for division in divisions(texts, args[1].shape[3]):
        run = jax.jit(attend, static_argnames="division")
        context = np.asarray(run(*args, division=division), np.float32)
        expected = context if expected is None else expected
        check(context, expected, division)
        profile = profile_kernels(
            lambda run=run, division=division: jax.block_until_ready(
                [run(*args, division=division) for _ in range(iterations)]
            ),
            steps=iterations * LAYERS,
            most=1000,
        )
        microseconds = sum(k["microseconds"] for k in profile["kernels"] if k["name"].startswith("decode_attention"))
        name = "{} blocks a text and key head, {} texts a block, {} warpgroups".format(*division)
        figures[name] = microseconds
        console.print(f"{texts}x{positions}: {microseconds:.1f} us, {nbytes / microseconds / 1e3:.0f} GB/s, {name}")
    return figures


def check(context: np.ndarray, expected: np.ndarray, division: Division) -> None:
    """Raises ValueError unless contexts agree."""
    difference = float(np.abs(context - expected).max() / np.abs(expected).max())
    if not difference < _TOLERANCE:
        raise ValueError(f"division {division} differs by {difference:.2g} of the largest number, limit {_TOLERANCE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", default=SHAPES, help="texts x positions")
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args()
    check_runnable()
    shapes = {shape: tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")}
    figures = {shape: measure_shape(*sizes, options.iterations) for shape, sizes in shapes.items()}
    options.out.write_text(json.dumps({"device": jax.devices()[0].device_kind, "shapes": figures}, indent=1))


if __name__ == "__main__":
    main()
