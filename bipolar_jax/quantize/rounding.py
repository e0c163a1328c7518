"""Checks of quantization's arguments; rounding of rows to codes, scales and offsets, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.format import BipolarFormat, as_format
from bipolar_jax.quantize.calibration import (
    LARGEST_SCALE,
    Calibration,
    calibrate,
    check_calibration,
    half_steps_per_unit,
)
from bipolar_jax.quantize.groups import check_group_size, join_groups, split_groups, spread_groups, valid_mask

SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")


def check_float(x: Array, name: str) -> None:
    """Raises ValueError unless x is float32, bfloat16 or float16."""
    if jnp.dtype(x.dtype).name not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{name} must be {', '.join(SUPPORTED_DTYPES)}, got {jnp.dtype(x.dtype).name}: cast it first, "
            "for example with .astype(jnp.float32)"
        )


def check_finite(x: Array, name: str) -> None:
    """Raises ValueError if x has NaN, Inf or magnitudes above 2^125.

    The values of a traced x cannot be checked. There the scale of the group becomes NaN or Inf,
    and so does everything computed from the group.
    """
    if isinstance(x, jax.core.Tracer):
        return
    with jax.core.eval_context():  # the values are known, even if the caller is traced or in a shard_map
        finite, largest = map(float, _finite_and_largest(x))
    bad = x.size - int(finite)
    if bad:
        raise ValueError(
            f"{name} has {bad} NaN or Inf among its {x.size} elements: the grid cannot represent them; "
            "find where they come from, or replace them with jnp.nan_to_num"
        )
    if largest > LARGEST_SCALE:
        raise ValueError(f"{name} reaches {largest:.3g}, scales reach {LARGEST_SCALE:.3g}: scale it down first")


@jax.jit
def _finite_and_largest(x: Float[Array, "*shape"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The number of finite elements, and the largest magnitude."""
    return jnp.count_nonzero(jnp.isfinite(x)), jnp.max(jnp.abs(x))


def round_to_grid(
    x: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int | None, calibration: Calibration
) -> tuple[UInt8[Array, "*rows k"], Float[Array, "*rows groups"], Float[Array, "*rows groups"] | None]:
    """Calibrates every group of the last axis and rounds to the nearest value.

    Returns:
      uint8 codes; float32 scales; float32 offsets, or None for a symmetric calibration.
    """
    scale, offset = calibrate_rows(x, number_format, group_size, calibration)
    return encode_rows(x, number_format, half_steps_per_unit(scale), offset, group_size), scale, offset


def calibrate_rows(
    x: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int | None, calibration: Calibration
) -> tuple[Float[Array, "*rows groups"], Float[Array, "*rows groups"] | None]:
    """The scales and the offsets that `round_to_grid` returns."""
    grouped = split_groups(x.astype(jnp.float32), group_size)
    return calibrate(grouped, valid_mask(x.shape[-1], group_size), number_format, calibration)


def encode_rows(
    x: Float[Array, "*rows k"],
    number_format: BipolarFormat,
    half_steps: Float[Array, "*rows groups"],
    offset: Float[Array, "*rows groups"] | None,
    group_size: int | None,
) -> UInt8[Array, "*rows k"]:
    """Codes of x less the offsets, for scales given as `half_steps_per_unit`."""
    grouped = split_groups(x.astype(jnp.float32), group_size)
    centered = grouped if offset is None else grouped - offset[..., None]
    return join_groups(number_format.encode(centered, half_steps[..., None]), x.shape[-1])


def from_grid(
    codes: UInt8[Array, "*rows k"],
    number_format: BipolarFormat,
    scale: Float[Array, "*rows groups"],
    offset: Float[Array, "*rows groups"] | None,
    group_size: int | None,
) -> Float[Array, "*rows k"]:
    """Decodes: scale * value + offset, float32."""
    k = codes.shape[-1]
    numbers = number_format.values(codes).astype(jnp.float32) * spread_groups(scale, k, group_size)
    return numbers if offset is None else numbers + spread_groups(offset, k, group_size)


def checked_rows(
    x: Float[Array, "*shape"],
    bits: int | BipolarFormat,
    axis: int,
    group_size: int | None,
    calibration: str,
    name: str,
) -> tuple[Float[Array, "*batch n k"], BipolarFormat, int]:
    """Checks the arguments of `quantize`, and moves the contracted axis last.

    Args:
      name: what the messages of errors call x.

    Returns:
      x with the contracted axis last; the format; `axis` counted from the end, -1 or -2.

    Raises:
      ValueError: as `bipolar_jax.quantize`.
    """
    x = jnp.asarray(x)
    number_format = as_format(bits)
    check_calibration(calibration, number_format)
    check_float(x, name)
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: every axis must have at least one element")
    check_finite(x, name)
    rows, from_end = contracted_last(x, axis)
    check_group_size(rows.shape[-1], group_size)
    return rows, number_format, from_end


def contracted_last(x: Array, axis: int) -> tuple[Array, int]:
    """Moves the contracted axis, one of the last two, to the end.

    Returns:
      x with that axis last; `axis` counted from the end, -1 or -2.

    Raises:
      ValueError: x has fewer than two axes, or `axis` is not one of the last two.
    """
    if x.ndim < 2:
        raise ValueError(f"quantization needs two axes, contracted and output, got shape {tuple(x.shape)}: add an axis")
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis={axis!r} is not an axis of shape {tuple(x.shape)}")
    from_end = int(axis) - x.ndim if axis >= 0 else int(axis)
    if from_end not in (-1, -2):
        raise ValueError(
            f"axis={axis} of shape {tuple(x.shape)} is a batch axis: the contracted axis must be one of the last two; "
            "move it there or reshape"
        )
    return (x if from_end == -1 else jnp.swapaxes(x, -1, -2)), from_end
