"""The float grid of least squared error of every group: a search over shrunken ranges, then alternating fits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bipolar_jax.compress.rounding.method import Grid
from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.calibration import half_steps_per_unit
from bipolar_jax.quantize.groups import along_last

# By bits: shrunken ranges that are tried beside the whole one, and the smallest of them. Few bits clip more.
_STEPS = {1: 30, 2: 30, 3: 28, 4: 24, 5: 16, 6: 12, 7: 6, 8: 1}
_LEAST = {1: 0.15, 2: 0.25, 3: 0.35, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.9}
_FITS = 8


class Codes(NamedTuple):
    """What a search for a grid depends on of a format: operands of compiled programs, which formats share.

    Attributes:
      largest: the largest code.
      factors: of the shrunken ranges that are tried, the first ones count.
      tried: how many.
    """

    largest: int | Int[Array, ""]
    factors: Float[np.ndarray | Array, "most"]
    tried: int | Int[Array, ""]

    @classmethod
    def of(cls, number_format: BipolarFormat, dropped: int = 0) -> Codes:
        """Those of a format, of which so many planes may be dropped: the fewest bits tell how small ranges become."""
        bits = number_format.bits - dropped
        tried = _STEPS[bits] + 1
        factors = np.ones(max(_STEPS.values()) + 1, np.float32)
        factors[:tried] = np.linspace(1.0, _LEAST[bits], tried, dtype=np.float32)
        return cls(number_format.max_value, factors, tried)


def search_grid(
    x: Float[Array, "n groups size"],
    inside: Bool[np.ndarray, "groups size"],
    codes: Codes,
    kind: Grid,
    weights: Float[Array, "groups size"] | None = None,
    dropped: tuple[int, ...] = (0,),
    decay: float = 1.0,
) -> tuple[Float[Array, "n groups"], Float[Array, "n groups"], Float[Array, "n groups"] | None]:
    """The grid step * u + base of every group.

    The range from the smallest to the largest number, for "zero_point" with zero in it, for "symmetric" centered on
    zero, is shrunk around its middle ("zero_point": around zero) as far as the squared error falls. Then 8 times
    numbers get their nearest codes, and these the step and base of least squares (Lloyd 1982, on a grid of equal
    steps). Unlike `calibrate`'s, the sums are float sums: calibration needs the same bits in the same program only.

    Args:
      x: split into groups; magnitudes whose squares are floats.
      inside: False for padding.
      codes: of the format.
      kind: see `Rounding`; of one bit, which has no zero, not "zero_point".
      weights: of the squared errors, above 0; None for equal ones.
      dropped: planes that are dropped by the precisions that the grid serves, 0 for all planes. The squared errors are
        summed over them; one that drops d planes weighs 2^(-decay d / 2).
      decay: see `Rounding.nested_decay`.

    Returns:
      Steps; bases; the codes of zero, base = -step * zero code, or None for "free".
    """
    largest, factors = codes.largest, jnp.asarray(codes.factors)
    mask = along_last(inside, 3)
    weight = jnp.asarray(mask, jnp.float32)
    if weights is not None:
        weight = weight * weights[None]

    low = jnp.min(jnp.where(mask, x, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(mask, x, -jnp.inf), axis=-1)
    middle, zero = (low + high) / 2, None
    if kind != "free":
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        zero = jnp.full_like(low, largest / 2)
    if kind == "zero_point":
        span = high - low
        zero = jnp.clip(jnp.round(-low * largest / jnp.where(span > 0, span, 1.0)), 0, largest)
        zero = jnp.where(span > 0, zero, (largest + 1) // 2)
    elif kind == "symmetric":
        high = jnp.maximum(high, -low)
        low = -high
    widest = (high - low) / largest

    def base_of(step):
        return middle - step * (largest / 2) if zero is None else -step * zero

    def encode(step, base):
        """Of each precision its weight, and the code nearest to every number: the mean of 2^d codes."""
        exact = (x - base[..., None]) * (2 * half_steps_per_unit(step))[..., None] + 0.5
        for d in dropped:
            high = jnp.clip(jnp.floor(exact / 2**d), 0, (largest + 1) // 2**d - 1)
            yield 2 ** (-decay * d / 2), 2**d * high + (2**d - 1) / 2

    def try_factor(index, best):
        step = widest * factors[index]
        base = base_of(step)
        error = sum(
            share * jnp.sum(weight * (step[..., None] * codes + base[..., None] - x) ** 2, axis=-1)
            for share, codes in encode(step, base)
        )
        smaller = error < best[0]
        return jnp.where(smaller, error, best[0]), jnp.where(smaller, step, best[1])

    def fit(_, grid):
        step, base = grid
        encoded = list(encode(step, base))
        if zero is None:
            total = jnp.sum(weight, axis=-1)
            shares = sum(share for share, _ in encoded)
            mean_code = sum(share / shares * jnp.sum(weight * codes, axis=-1) / total for share, codes in encoded)
            mean = jnp.sum(weight * x, axis=-1) / total
        around = (mean_code if zero is None else zero)[..., None]
        squares = sum(share * jnp.sum(weight * (codes - around) ** 2, axis=-1) for share, codes in encoded)
        products = sum(share * jnp.sum(weight * (codes - around) * x, axis=-1) for share, codes in encoded)
        fitted = products / jnp.where(squares > 0, squares, 1.0)
        step = jnp.where((squares > 0) & (fitted > 0), fitted, step)
        return step, mean - step * mean_code if zero is None else -step * zero

    _, step = jax.lax.fori_loop(0, codes.tried, try_factor, (jnp.full_like(widest, jnp.inf), widest))
    step, base = jax.lax.fori_loop(0, _FITS, fit, (step, base_of(step)))
    return step, base, zero
