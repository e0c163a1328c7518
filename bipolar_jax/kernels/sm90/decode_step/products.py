"""What completes the integer sums of a product: the terms of its columns, and the epilogue."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from bipolar_jax.kernels.sm90.core.hardware import WARPGROUP
from bipolar_jax.kernels.sm90.decode_step.bit_sums.bits_kind import BitsKind
from bipolar_jax.kernels.sm90.decode_step.cooperative.config import LayersShape, Product
from bipolar_jax.kernels.sm90.decode_step.cooperative.teams import sum_of_codes
from bipolar_jax.kernels.sm90.decode_step.cooperative.vectors import load_vector, prefetch
from bipolar_jax.kernels.sm90.decode_step.float_sums.float_products import FloatKind
from bipolar_jax.kernels.sm90.decode_step.float_sums.scaled_float_products import ScaledFloatKind
from bipolar_jax.kernels.sm90.decode_step.float_sums.scaled_products import ScaledKind
from bipolar_jax.kernels.sm90.decode_step.plane_products import PlaneKind
from bipolar_jax.kernels.sm90.decode_step.prepared_products import PreparedKind
from bipolar_jax.kernels.sm90.decode_step.quantize_token import TokenGrid
from bipolar_jax.kernels.sm90.decode_step.text_products import TextsKind
from bipolar_jax.kernels.sm90.decode_step.weight_ring import ProductWeights, WeightKind


def weight_kind(shape: LayersShape) -> WeightKind:
    """How the layers' weights are stored and multiplied."""
    if shape.prepared is None:
        return PlaneKind(shape)
    if shape.float_token is not None:
        return ScaledFloatKind(shape) if shape.scaled else FloatKind(shape)
    if shape.texts > 1:
        return TextsKind(shape)
    if shape.multiplies_bits:
        return BitsKind(shape)
    return ScaledKind(shape) if shape.scaled else PreparedKind(shape)


def column_terms(shape: LayersShape, weights: ProductWeights, layer, name: str, block) -> list[list[ProductWeights]]:
    """Terms of this block's rows, by half and chunk: `ProductWeights` of vectors, without the words."""

    product = shape.products[name]

    def load(start, count):
        def of_ref(ref):
            return load_vector(rows_of_layer(product, ref, layer), start, start + count, product.by_parts)

        return jax.tree.map(of_ref, weights.of_columns)

    return [
        [load(*_term_range(product, layer, block, half, chunk)) for chunk in range(product.chunks)]
        for half in range(product.halves)
    ]


def prefetch_terms(shape: LayersShape, weights: ProductWeights, layer, name: str, block) -> None:
    """Prefetches to the L2 cache what `column_terms` will load."""
    product = shape.products[name]
    for half in range(product.halves):
        start, _ = _term_range(product, layer, block, half, 0)
        count = jnp.minimum(product.rows, product.counted_rows - block * product.rows)
        for ref in jax.tree.leaves(weights.of_columns):
            prefetch(rows_of_layer(product, ref, layer), start, count, product.by_parts)


def _term_range(product: Product, layer, block, half: int, chunk: int):
    """Where the terms of a chunk begin in `rows_of_layer`, and how many there are."""
    first, count = chunk_rows(product, block, chunk)
    return first_row(product, layer) + half * product.half_size + first, count


def rows_of_layer(product: Product, ref, layer):
    """The ref of a flat array [layers * n] in which `first_row` is the layer's first.

    Vectors in the order of parts need an array that begins and ends with a tile, or ends with N.
    """
    return ref.at[pl.ds(layer * product.n, product.n)] if product.ragged else ref


def first_row(product: Product, layer):
    """The index of a layer's first row in `rows_of_layer`."""
    return 0 if product.ragged else layer * product.n


def chunk_rows(product: Product, block, chunk: int):
    """First row of a chunk of this block within a half of the output, and how many rows there are; may be negative."""
    first = block * product.rows + chunk * WARPGROUP
    return first, jnp.minimum(product.rows - chunk * WARPGROUP, product.counted_rows - first)


def finish(
    shape: LayersShape,
    kind: WeightKind,
    name: str,
    terms: ProductWeights,
    shared,
    grid: TokenGrid | None,
    half: int,
    chunk: int,
    text: Int[Array, ""] | int = 0,
) -> Float[Array, "128"]:
    """A chunk of a half of this block's output of a text: y = s_x (s_w t + o_w X) + bias, as in `arithmetic.epilogue`.

    Float tokens have no grid: y = s_w t + bias.
    """
    product = shape.products[name]
    start = half * product.rows + chunk * WARPGROUP
    total = kind.take_sums(shared.product_sums, start, product.rows - chunk * WARPGROUP, text)
    if grid is None:
        y = total * terms.scale
        return y if terms.bias is None else y + terms.bias
    recovery = shape.recovery(name)
    if shape.scaled:
        # Sums of signed codes times numbers of weights, as in `arithmetic.scaled_epilogue.finish_scaled_transposed`.
        zero = recovery.column_weight(grid.zero_code).astype(jnp.float32)
        y = (total * float(recovery.product_weight) + zero * terms.number_sums) * terms.scale
        y = y * (grid.scale * recovery.scale_factor)
        return y if terms.bias is None else y + terms.bias
    code_sums = sum_of_codes(shape, shared.code_sums, text)
    total = total * recovery.product_weight + recovery.row_term(code_sums)
    total = total + recovery.column_weight(grid.zero_code) * recovery.column_value_sums(terms.code_sums)
    y = total.astype(jnp.float32) * terms.scale
    if terms.offset is not None:
        y = y + terms.offset * recovery.token_value_sums(code_sums, grid.zero_code).astype(jnp.float32)
    y = y * (grid.scale * recovery.scale_factor)
    return y if terms.bias is None else y + terms.bias
