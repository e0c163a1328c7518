"""qwix's `QArray` to a `BipolarArray` and back, integer by integer (checked against qwix 0.1.8).

A QArray's number is d (q - z): q and z are integers of a type, d is a float, and any axis may be cut into tiles that
share d and z. With u = q - min, where min is the smallest integer of the type, and W = 2^bits - 1, it is the bipolar
number scale * (2 u - W) + offset of scale = d / 2 and offset = (d / 2) (W + 2 min - 2 z). The factor of the offset is
odd. The offset alone may be rounded, to float32: it is exact where d has at most 15 significant bits, as bfloat16 and
float16 have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer, Shaped

from bipolar_jax.extras import require
from bipolar_jax.packing import BipolarArray, from_codes
from bipolar_jax.packing.bipolar_numbers import BipolarNumbers

if TYPE_CHECKING:
    import qwix

_FLOAT_TYPES = "its integers are those of floats or of a codebook, no integer grid: quantize the float array"


def qwix_bits(qtype: Any) -> int:
    """Bits of one of qwix's types: jnp.int8, jnp.int4, "int3" and the like.

    Raises:
      ValueError: a type of floats or of a codebook, such as "nf4" or jnp.float8_e4m3fn.
    """
    return _range(qtype)[0]


def from_qwix(array: qwix.QArray, axis: int = -2) -> BipolarArray:
    """The numbers of a `qwix.QArray` as a `BipolarArray`: the same integers, scales and zeros.

    `dequantize` gives float32: the numbers themselves where scales have 15 significant bits (bfloat16, float16), which
    qwix rounds to the scale's dtype; of float32 scales, numbers that may differ from qwix's by roundings of float32.

    Args:
      array: integers of 1 to 8 bits and at least two axes, (..., k, n) or (..., n, k); or a parameter of a model that
        qwix quantized, which holds one, such as `layer.kernel`.
      axis: the axis that a matmul will contract; one of the last two. Scales of tiles along it become float scales of
        groups; all other tiles get one scale for each index.

    Returns:
      An array of the same shape, a `kernel` of `nn.Linear`. `to_qwix` gives the integers, scales and zeros back.

    Raises:
      ModuleNotFoundError: qwix is not installed.
      ValueError: not a QArray; floats or codebooks (nf4, fp8, mxfp4 ...); another axis; integers outside their type.
    """
    qwix = require("qwix", "peers")
    array = getattr(array, "array", array)
    if not isinstance(array, qwix.QArray):
        raise ValueError(
            f"from_qwix takes a qwix.QArray, got {type(array).__name__}: use bipolar_jax.quantize for floats"
        )
    array = jax.tree.map(lambda leaf: leaf.get_value() if _is_variable(leaf) else leaf, array, is_leaf=_is_variable)
    bits, smallest = _range(array.qtype)
    ndim = array.qvalue.ndim
    if ndim < 2 or axis not in (-1, -2, ndim - 1, ndim - 2):
        raise ValueError(
            f"axis {axis} of a QArray of shape {array.shape} is not one of its last two: transpose it, so that "
            "the contracted axis is one of them and all others are batch axes"
        )
    from_end = axis - ndim if axis >= 0 else axis
    k = array.shape[from_end]
    arrays = [array.scale] if array.zero_point is None else [array.scale, array.zero_point]
    groups = int(np.lcm.reduce([each.shape[from_end] for each in arrays]))
    per_group = tuple(groups if i - ndim == from_end else size for i, size in enumerate(array.shape))
    scale, *zero = (_last(_repeated(each, per_group), from_end) for each in arrays)
    scale = scale.astype(jnp.float32) / 2
    zero = zero[0].astype(jnp.int32) if zero else 0
    offset = scale * (jnp.asarray(2**bits - 1 + 2 * smallest - 2 * zero, jnp.int32)).astype(jnp.float32)
    codes = array.qvalue.astype(jnp.int32) - smallest
    return from_codes(codes, bits, from_end, scale, offset, None if groups == 1 else k // groups)


def to_qwix(array: BipolarNumbers, dtype: Any = jnp.float32) -> qwix.QArray:
    """The numbers of a packed array as a `qwix.QArray`, none of them rounded.

    Which integers hold them follows from the array:

    - with integer groups, the values, as int8 with one scale for each row;
    - without offsets, the odd values of an n-bit array, as n + 1 bits; of a ternary array -1, 0 and 1 as "int2";
    - else n bits with zeros, if each offset is an odd multiple of its scale: what "minmax" and `from_qwix` make.
      `zero_point` is None if all zeros are 0.

    Args:
      array: concrete, of 1 to 8 bits.
      dtype: of scales, to which qwix rounds what it dequantizes; bfloat16 and float16 only if they hold the scales.

    Returns:
      A QArray of the same shape, with one scale for each index of all axes but the contracted one.

    Raises:
      ModuleNotFoundError: qwix is not installed.
      ValueError: a traced array; 8 bits without offsets, whose values are no int8; offsets that are no odd multiples of
        the scales; groups that do not divide the axis; scales that `dtype` does not hold.
    """
    qwix = require("qwix", "peers")
    if not isinstance(array, BipolarNumbers):
        raise ValueError(f"to_qwix takes a packed array, got {type(array).__name__}: qwix.quantize rounds floats")
    array = array.with_scales()
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(array)):
        raise ValueError("to_qwix looks at the numbers of an array, so it cannot be traced: call it outside of jit")
    k, size = array.contracted_size, array.scale_group_size
    if size is not None and k % size:
        raise ValueError(
            f"groups of {size} do not divide {k}, as the tiles of a QArray must: quantize with other groups"
        )
    if array.has_integer_groups:
        integers, zero, bits, step = array.values(), None, 8, array.scale
    elif array.offset is None:
        integers, bits, step = _values(array)
        zero = None
    else:
        zero = _zeros(array)
        bits, step = array.bits, 2 * array.scale
        half = 1 << (bits - 1)
        integers = array._as_shape(array.codes().astype(jnp.int32) - half)
        bits = max(bits, 2)  # JAX has no integers of one bit that qwix takes
        if zero is not None and (zero.min() < -(1 << (bits - 1)) or zero.max() >= 1 << (bits - 1)):
            raise ValueError(
                f"zeros from {zero.min()} to {zero.max()} are no integers of {bits} bits: they lie outside of the grid"
            )
    stored = jnp.dtype(dtype)
    if not np.array_equal(np.asarray(step.astype(stored).astype(jnp.float32)), np.asarray(step), equal_nan=True):
        raise ValueError(f"{stored.name} does not hold the scales of {array}: use float32")
    integer = jnp.int4 if bits <= 4 else jnp.int8
    zero = None if zero is None else array._as_shape(jnp.asarray(zero)).astype(integer)
    qtype = integer if bits in (4, 8) else f"int{bits}"
    return qwix.QArray(integers.astype(integer), array._as_shape(step).astype(stored), zero, qtype)


def _range(qtype: Any) -> tuple[int, int]:
    """Bits and the smallest integer of a type; see `qwix_bits`."""
    if isinstance(qtype, str) and qtype in ("int2", "int3", "int5", "int6", "int7"):  # qwix's own
        bits = int(qtype[3:])
        return bits, -(1 << (bits - 1))
    try:
        dtype = jnp.dtype(qtype)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{getattr(dtype, 'name', qtype)} is no type of integers: {_FLOAT_TYPES}")
    info = jnp.iinfo(dtype)
    if info.bits > 8:
        raise ValueError(f"{dtype.name} has more than 8 bits: quantize the float array")
    return info.bits, int(info.min)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _repeated(array: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """An array whose axes are cut into tiles, with one number for each index of a shape."""
    for i, (size, wanted) in enumerate(zip(array.shape, shape, strict=True)):
        if size != wanted:
            array = jnp.repeat(array, wanted // size, axis=i)
    return array


def _last(array: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    return array if axis == -1 else jnp.swapaxes(array, -1, -2)


def _values(array: BipolarNumbers) -> tuple[Integer[Array, "..."], int, Float[Array, "..."]]:
    """Integers, their bits and their step, of numbers without offsets."""
    if array.format.ternary:
        return array.values() // 2, 2, 2 * array.scale
    if array.bits == 8:
        raise ValueError(
            "8 bits without offsets have the values -255 to 255, which are no int8: quantize with calibration "
            '"minmax", or at most 7 bits'
        )
    return array.values(), array.bits + 1, array.scale


def _zeros(array: BipolarNumbers) -> Integer[np.ndarray, "*batch n groups"] | None:
    """z of every row and group; None if all are 0. Raises ValueError if numbers are not d (q - z)."""
    if array.format.ternary:
        raise ValueError("ternary numbers with offsets are no QArray: quantize them without")
    scale, offset = np.asarray(array.scale), np.asarray(array.offset)
    whole = np.where(scale != 0, scale, 1)
    zero = np.rint((-offset / whole - 1) / 2)
    wrong = scale * -(2 * zero.astype(np.float32) + 1) != offset
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"the offset {offset[index]:.6g} of row and group {index} is no odd multiple of the scale "
            f"{scale[index]:.6g}, so no integer stands for 0: {wrong.sum()} of {wrong.size} are so; quantize with "
            'calibration "minmax"'
        )
    zero = np.where(scale != 0, zero, 0).astype(np.int32)
    return zero if zero.any() else None
