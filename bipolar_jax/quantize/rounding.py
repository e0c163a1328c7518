"""From floats to codes, scales and offsets, group by group, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

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


def check_float(x: Array, what: str) -> None:
    """Raises ValueError unless x is float32, bfloat16 or float16, with no zero-size axis."""
    if jnp.dtype(x.dtype).name not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{what} must be {', '.join(SUPPORTED_DTYPES)}, got {jnp.dtype(x.dtype).name}: cast it first, "
            "for example with .astype(jnp.float32)"
        )
    if 0 in x.shape:
        raise ValueError(f"{what} has shape {tuple(x.shape)}: every axis must have at least one element")


def check_finite(x: Array, what: str) -> None:
    """Raises ValueError if x holds NaN, Inf or magnitudes above 2^125; a traced x passes unseen.

    Under a trace they are still not silent: the scale of their group becomes NaN or Inf,
    and with it everything that is computed from the group.
    """
    if isinstance(x, jax.core.Tracer):
        return
    bad = x.size - int(jnp.count_nonzero(jnp.isfinite(x)))
    if bad:
        raise ValueError(
            f"{what} has {bad} NaN or Inf among its {x.size} elements: they have no place on the grid; "
            "find where they come from, or clear them with jnp.nan_to_num"
        )
    largest = float(jnp.max(jnp.abs(x)))
    if largest > LARGEST_SCALE:
        raise ValueError(f"{what} reaches {largest:.3g}, scales reach {LARGEST_SCALE:.3g}: scale it down first")


def round_to_grid(
    x: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int | None, calibration: Calibration
) -> tuple[UInt8[Array, "*rows k"], Float[Array, "*rows groups"], Float[Array, "*rows groups"] | None]:
    """Calibrates every group of the last axis and rounds to nearest.

    Returns:
      Codes; float32 scales; float32 offsets, or None where the calibration is symmetric.
    """
    scale, offset = calibrate_rows(x, number_format, group_size, calibration)
    return encode_rows(x, number_format, half_steps_per_unit(scale), offset, group_size), scale, offset


def calibrate_rows(
    x: Float[Array, "*rows k"], number_format: BipolarFormat, group_size: int | None, calibration: Calibration
) -> tuple[Float[Array, "*rows groups"], Float[Array, "*rows groups"] | None]:
    """Scales and offsets of `round_to_grid`."""
    grouped = split_groups(x.astype(jnp.float32), group_size)
    return calibrate(grouped, valid_mask(x.shape[-1], group_size), number_format, calibration)


def encode_rows(
    x: Float[Array, "*rows k"],
    number_format: BipolarFormat,
    half_steps: Float[Array, "*rows groups"],
    offset: Float[Array, "*rows groups"] | None,
    group_size: int | None,
) -> UInt8[Array, "*rows k"]:
    """Codes of every group, less its offset if it has one, by its `half_steps_per_unit`."""
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
    """scale * value + offset, float32: what the codes stand for."""
    k = codes.shape[-1]
    numbers = number_format.values(codes).astype(jnp.float32) * spread_groups(scale, k, group_size)
    return numbers if offset is None else numbers + spread_groups(offset, k, group_size)


def rows_to_round(
    x: Float[Array, "*shape"],
    bits: int | BipolarFormat,
    axis: int,
    group_size: int | None,
    calibration: str,
    what: str,
) -> tuple[Float[Array, "*batch n k"], BipolarFormat, int]:
    """Checks everything that quantization is given.

    Returns:
      x with the contracted axis last; the format; that axis counted from the end, -1 or -2.

    Raises:
      ValueError: as `bipolar_jax.quantize`.
    """
    x = jnp.asarray(x)
    number_format = as_format(bits)
    check_calibration(calibration, number_format)
    check_float(x, what)
    check_finite(x, what)
    rows, from_end = contracted_last(x, axis)
    check_group_size(rows.shape[-1], group_size)
    return rows, number_format, from_end


def contracted_last(x: Array, axis: int) -> tuple[Array, int]:
    """Moves the contracted axis, one of the last two, to the end.

    Returns:
      x with that axis last, and the axis counted from the end: -1 or -2.

    Raises:
      ValueError: x has fewer than two axes, or `axis` is not one of the last two.
    """
    if x.ndim < 2:
        raise ValueError(f"needs at least two axes, contracted and output, got shape {tuple(x.shape)}: add one")
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis={axis!r} is not an axis of shape {tuple(x.shape)}")
    from_end = int(axis) - x.ndim if axis >= 0 else int(axis)
    if from_end not in (-1, -2):
        raise ValueError(
            f"axis={axis} of shape {tuple(x.shape)} is a batch axis: the contracted one must be among the last two; "
            "move it there or reshape"
        )
    return (x if from_end == -1 else jnp.swapaxes(x, -1, -2)), from_end
