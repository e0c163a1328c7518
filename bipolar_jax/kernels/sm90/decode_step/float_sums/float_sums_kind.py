"""`FloatSumsKind`: what is common to the kinds of prepared weights whose sums are float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from bipolar_jax.kernels.sm90.core.fragments import WARPS
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import WARPGROUPS
from bipolar_jax.kernels.sm90.decode_step.float_sums import row_sums
from bipolar_jax.kernels.sm90.decode_step.float_sums.row_sums import RowSums
from bipolar_jax.kernels.sm90.decode_step.prepared_products import PreparedKind


class FloatSumsKind(PreparedKind):
    """See `weight_ring.WeightKind`; slots are those of `PreparedKind`. A kind of its own adds `add_stages`."""

    @property
    def sums_type(self) -> Any:
        return plgpu.SMEM((WARPGROUPS, WARPS, self.shape.max_rows), jnp.float32)

    def zeros(self) -> RowSums:
        return row_sums.zeros()

    def add_sums(self, sums, total, start, block_stride: int) -> None:
        row_sums.store_sums(sums, total, start, block_stride)

    def clear_sums(self, sums, warpgroup) -> None:
        """Nothing: sums are stored, not added."""

    def take_sums(self, sums, start, count, text=0) -> Float[Array, "128"]:
        return row_sums.take(sums, start, count)
