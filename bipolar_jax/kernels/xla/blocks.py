"""Products with signed codes, in the form that XLA multiplies fast on the default device.

Accelerators multiply int8 codes in one dot. XLA's CPU backend has no such dot: it converts all codes to int32 and
multiplies those slowly. There codes become float32, which is exact while sums stay below 2^24; and for few rows of x
one block of weights at a time, so that a byte for each comes from memory and its four bytes never leave the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8, Shaped

from bipolar_jax.kernels.device import default_device
from bipolar_jax.packing import BipolarNumbers, UnpackedArray
from bipolar_jax.quantize.groups import split_groups

NT = (((1,), (1,)), ((), ()))  # dimension numbers: both operands have the contracted axis last

# On GPUs the int8 dot of jaxlib 0.11.2 is wrong for other K.
_K_ALIGNMENT = 4
# Float32 holds every integer up to this magnitude.
_EXACT = 2**24
# As float32 a block of so many weights fits a core's cache. XLA would hand larger ones to other threads, which costs
# more than it gains.
_BLOCK_WEIGHTS = 2**16
# From so many rows of x on the product costs more than the conversion of all weights.
_MANY_ROWS = 16


def on_cpu() -> bool:
    """Whether the default device is a CPU."""
    return default_device().platform == "cpu"


def has_many_rows(m: int) -> bool:
    """Whether x has so many rows that all weights may be converted at once; also if they are symbolic."""
    return not isinstance(m, int) or m >= _MANY_ROWS


def signed_groups(w: BipolarNumbers) -> Int8[Array, "groups n size"]:
    """The rows of `w.signed_rows()`, split where the float scale changes; a short last group is padded with 0."""
    if isinstance(w, UnpackedArray):
        return w.signed_codes
    return jnp.moveaxis(split_groups(w.signed_rows(), w.scale_group_size), -2, 0)


def signed_product(
    x: Int8[Array, "m size"],
    w: Int8[Array, "groups n size"],
    group: Int[Array, ""],
    largest: tuple[int, int],
) -> Int[Array, "m n"]:
    """The exact product with one group, int32.

    Args:
      x: signed codes.
      w: signed codes, or integer values.
      group: index of the group.
      largest: the largest magnitudes that x and w can have.
    """
    if on_cpu():
        longest = _EXACT // math.prod(largest)
        return by_rows(w, group, x.shape[0], lambda block: _float_product(x, block, longest))
    aligned = ((0, 0), (0, -x.shape[-1] % _K_ALIGNMENT))
    block = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
    return jax.lax.dot_general(jnp.pad(x, aligned), jnp.pad(block, aligned), NT, preferred_element_type=jnp.int32)


def by_rows(
    w: Int8[Array, "groups n size"],
    group: Int[Array, ""],
    m: int,
    product: Callable[[Int8[Array, "rows size"]], Shaped[Array, "m rows"]],
) -> Shaped[Array, "m n"]:
    """The product with one group; on CPUs, for few rows of x, the products with its rows, block by block.

    Args:
      w: signed codes of all groups.
      group: index of the group.
      m: rows of x.
      product: of x with a block of weights.
    """
    _, n, size = w.shape
    most = max(1, _BLOCK_WEIGHTS // size)
    if not on_cpu() or has_many_rows(m) or most >= n:
        return product(jax.lax.dynamic_index_in_dim(w, group, keepdims=False))
    rows = next((rows for rows in range(most, most // 2, -1) if n % rows == 0), most)

    def block_product(start):
        return product(jax.lax.dynamic_slice(w, (group, start, jnp.zeros_like(start)), (1, rows, size))[0])

    blocks = n // rows
    products = jax.lax.map(block_product, jnp.arange(blocks, dtype=jnp.int32) * rows)
    result = jnp.moveaxis(products, 0, 1).reshape(m, blocks * rows)
    if rest := n - blocks * rows:
        last = block_product(jnp.int32(n - rows))
        result = jnp.concatenate([result, last[:, rows - rest :]], axis=1)
    return result


def _float_product(x: Int8[Array, "m size"], block: Int8[Array, "rows size"], longest: int) -> Int[Array, "m rows"]:
    """The product in float32, of at most `longest` terms at a time."""
    size = x.shape[-1]
    count = -(-size // longest)
    length = -(-size // count)
    total = jnp.int32(0)
    for start in range(0, size, length):
        x_slice, w_slice = (array[:, start : start + length].astype(jnp.float32) for array in (x, block))
        products = jax.lax.dot_general(x_slice, w_slice, NT, precision=jax.lax.Precision.HIGHEST)
        total = total + products.astype(jnp.int32)
    return total
