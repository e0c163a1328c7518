"""The three kinds of grids, and how each is refitted to codes as they are: the loss never rises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from bipolar_jax.compress.rounding.affine_grid import AffineGrid
from bipolar_jax.compress.rounding.descent import GroupSums, change_grids
from bipolar_jax.compress.rounding.method import RoundedRows
from bipolar_jax.compress.rounding.sweep import HIGHEST
from bipolar_jax.quantize.integer_groups import LARGEST_VALUE, SMALLEST_VALUE, IntegerGroups

# What is added to the integer nearest to the best scale of a group.
_NEIGHBORS = (0, -1, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FreeGrid:
    """step * u + base."""

    step: Float[Array, "groups n"]
    base: Float[Array, "groups n"]
    largest: int | Int[Array, ""]

    def affine(self) -> AffineGrid:
        return AffineGrid(self.step, self.base, self.largest)

    def middle(self, dropped: int) -> Float[Array, "groups n"]:
        """What 2^dropped codes stand for without their low planes, above the number of the lowest: their mean."""
        return self.step * ((2**dropped - 1) / 2)

    def refit(
        self, rows: Float[Array, "k n"], codes: UInt8[Array, "k n"], hessian: Float[Array, "k k"], size: int
    ) -> FreeGrid:
        """One pass over the groups, each with the step and the base of least loss; see `change_grids`.

        A step that would not stay positive stays as it is, and the base is the best one beside it.
        """

        def change(index, group):
            to_step = _to_best_step(self.step[index], group.curvature, group.pull)
            return to_step, group.shift / group.weight - group.mean * to_step

        to_step, to_base = change_grids(rows, codes, hessian, self.affine(), size, change)
        return dataclasses.replace(self, step=self.step + to_step, base=self.base + to_base)

    def with_codes(self, codes: UInt8[Array, "k n"]) -> RoundedRows:
        scale = self.step / 2
        return RoundedRows(codes.T, scale.T, (self.base + self.largest * scale).T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ZeroPointGrid:
    """step * (u - zero), where `zero` is the code of zero; of symmetric grids, largest / 2."""

    step: Float[Array, "groups n"]
    zero: Float[Array, "groups n"]
    largest: int | Int[Array, ""]
    symmetric: bool = dataclasses.field(metadata={"static": True})

    def affine(self) -> AffineGrid:
        return AffineGrid(self.step, -self.step * self.zero, self.largest)

    def middle(self, dropped: int) -> Float[Array, "groups n"]:
        """As `FreeGrid.middle`."""
        return self.step * ((2**dropped - 1) / 2)

    def refit(
        self, rows: Float[Array, "k n"], codes: UInt8[Array, "k n"], hessian: Float[Array, "k k"], size: int
    ) -> ZeroPointGrid:
        """One pass over the groups, each with the step of least loss; the code of zero stays."""

        def change(index, group):
            curvature, pull = _around(self.zero[index], group)
            to_step = _to_best_step(self.step[index], curvature, pull)
            return to_step, -self.zero[index] * to_step

        to_step, _ = change_grids(rows, codes, hessian, self.affine(), size, change)
        return dataclasses.replace(self, step=self.step + to_step)

    def with_codes(self, codes: UInt8[Array, "k n"]) -> RoundedRows:
        scale = self.step / 2
        return RoundedRows(codes.T, scale.T, None if self.symmetric else (scale * (self.largest - 2 * self.zero)).T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class IntegerGrid:
    """row_scale * (s * u + o), with the integers of `IntegerGroups` as floats; `keeps_zero`: o stays -s z."""

    row_scale: Float[Array, "n"]
    s: Float[Array, "groups n"]
    o: Float[Array, "groups n"]
    largest: int | Int[Array, ""]
    keeps_zero: bool = dataclasses.field(metadata={"static": True})

    def affine(self) -> AffineGrid:
        return AffineGrid(self.row_scale[None] * self.s, self.row_scale[None] * self.o, self.largest)

    def middle(self, dropped: int) -> Float[Array, "groups n"]:
        """As `FreeGrid.middle`, but the integer below: see `IntegerGroups.without_planes`."""
        return self.row_scale[None] * jnp.floor(self.s * ((2**dropped - 1) / 2))

    def refit(
        self, rows: Float[Array, "k n"], codes: UInt8[Array, "k n"], hessian: Float[Array, "k k"], size: int
    ) -> IntegerGrid:
        """The row scale of least loss; then one pass over the groups; then the row scale again.

        In the pass a group takes the best of its s and o, and of the three integers around its best step / S, each
        with the integer o that is best beside it.
        """
        grid = self._with_best_row_scale(rows, codes, hessian, size)
        to_step, to_base = change_grids(rows, codes, hessian, grid.affine(), size, grid._best_integers)
        per_scale = _inverse(grid.row_scale)[None]
        s, o = grid.s + jnp.round(to_step * per_scale), grid.o + jnp.round(to_base * per_scale)
        return dataclasses.replace(grid, s=s, o=o)._with_best_row_scale(rows, codes, hessian, size)

    def _with_best_row_scale(self, rows, codes, hessian, size) -> IntegerGrid:
        """S = (v H w) / (v H v) for the values v of codes; as it is where that is not positive."""
        values = AffineGrid(self.s, self.o, self.largest).of(jnp.arange(len(rows)) // size).numbers(codes)
        weighted = jnp.matmul(hessian, values, precision=HIGHEST)
        best = jnp.sum(weighted * rows, axis=0) * _inverse(jnp.sum(weighted * values, axis=0))
        return dataclasses.replace(self, row_scale=jnp.where((self.row_scale > 0) & (best > 0), best, self.row_scale))

    def _best_integers(self, index, group: GroupSums) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
        s, o = self.s[index], self.o[index]
        zero, per_scale = jnp.round(-o / s), _inverse(self.row_scale)
        curvature, pull = _around(zero, group) if self.keeps_zero else (group.curvature, group.pull)
        ideal = jnp.round(s + per_scale * pull * _inverse(curvature))
        best = (jnp.zeros_like(s),) * 3
        for neighbor in _NEIGHBORS:
            new_s = jnp.clip(ideal + neighbor, 1, (LARGEST_VALUE - SMALLEST_VALUE) // self.largest)
            to_step = self.row_scale * (new_s - s)
            if self.keeps_zero:
                new_o = -new_s * zero
            else:
                new_o = jnp.round(o + per_scale * (group.shift / group.weight - group.mean * to_step))
                new_o = jnp.clip(new_o, SMALLEST_VALUE, LARGEST_VALUE - self.largest * new_s)
            fits = (new_o >= SMALLEST_VALUE) & (new_o + self.largest * new_s <= LARGEST_VALUE)
            to_base = self.row_scale * (new_o - o)
            even = to_base + group.mean * to_step
            loss = to_step * (to_step * group.curvature - 2 * group.pull)
            loss = loss + even * (even * group.weight - 2 * group.shift)
            better = fits & (loss < best[0])
            candidate = loss, to_step, to_base
            best = tuple(jnp.where(better, new, old) for new, old in zip(candidate, best, strict=True))
        return best[1:]

    def with_codes(self, codes: UInt8[Array, "k n"]) -> RoundedRows:
        groups = IntegerGroups(self.s.T.astype(jnp.uint8), self.o.T.astype(jnp.int8))
        return RoundedRows(codes.T, self.row_scale[:, None], None, groups)


FittedGrid = FreeGrid | ZeroPointGrid | IntegerGrid


def _around(zero: Float[Array, "n"], group: GroupSums) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """Curvature and pull of a change a (u - zero)."""
    beside = group.mean - zero
    return group.curvature + beside**2 * group.weight, group.pull + beside * group.shift


def _to_best_step(step: Float[Array, "n"], curvature: Float[Array, "n"], pull: Float[Array, "n"]) -> Float[Array, "n"]:
    best = pull * _inverse(curvature)
    return jnp.where((step > 0) & (step + best > 0), best, 0.0)


def _inverse(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / x, and 0 where x is not positive."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)
