"""Float scales of groups in prepared weights: every term is where its thread looks for it, and comes back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarFormat
from bipolar_jax.packing.float_terms import BLOCK_TERMS, narrowest_terms, part_float_terms, shared_terms
from tests.packing.float_groups import float_groups, numbers_of

KINDS = ("scales", "zeros", "minimums", "offsets")
N, K = 150, 300  # two tiles and three stages, both ragged
A4 = BipolarFormat(4)


@pytest.mark.parametrize(("kind", "bits", "group_size", "gated"), [
    ("scales", 4, 128, False), ("zeros", 4, 32, True), ("offsets", 8, 192, False), ("scales", 1, 16, False),
    ("minimums", 5, 32, False), ("block_scales", 3, 16, True), ("block_minimums", 4, 32, False),
    ("block_nibbles", 2, 16, False),
])  # fmt: skip
def test_numbers_come_back(kind, bits, group_size, gated):
    w = float_groups(BipolarFormat(bits), N, 512 if kind in BLOCK_TERMS else K, group_size, kind)
    prepared = w.prepare(gated=gated)
    prepared.check()
    assert prepared.float_terms == kind
    assert prepared.shape == w.shape
    unpacked = prepared.unpack()
    np.testing.assert_array_equal(unpacked.scale, w.scale)
    np.testing.assert_array_equal(unpacked.offset, 0 * w.scale if w.offset is None else w.offset)
    np.testing.assert_array_equal(unpacked.row_sums, w.row_sums)
    np.testing.assert_array_equal(prepared.codes(), w.stored() if kind in BLOCK_TERMS else w.codes())
    w = w.with_scales()
    np.testing.assert_array_equal(prepared.dequantize(), w.dequantize())
    np.testing.assert_array_equal(prepared.scale.T * prepared.values(), w.dequantize())
    np.testing.assert_allclose((prepared.scale * prepared.number_sums)[:, 0], numbers_of(w).sum(1), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_in_the_order_of_threads(kind):
    """Word 4 r + 2 b + p of a vector belongs to row 64 b + 16 w + 8 p + r of the tile, w the part."""
    w = float_groups(A4, 128, 256, 64, kind)
    prepared = w.prepare()
    terms = np.array(prepared.terms)
    w = dataclasses.replace(
        w, scale=w.scale / prepared.scale, offset=w.offset / prepared.scale if kind != "scales" else None
    )
    assert terms.shape == (1, 4, 2, 2, 64 if kind == "offsets" else 32)
    for part, stage, chunk, r, b, p in np.ndindex(4, 2, 2, 8, 2, 2):
        row, group, index = 64 * b + 16 * part + 8 * p + r, 2 * stage + chunk, 4 * r + 2 * b + p
        words = terms[0, part, stage, chunk]
        if kind == "zeros":
            scale, zero = words[index : index + 1].view(np.float16).astype(np.float32)
            assert scale * (zero + 7.5) == w.offset[row, group]
        elif kind == "minimums":
            scale, minimum = words[index : index + 1].view(np.float16).astype(np.float32)
            assert minimum + scale * np.float32(7.5) == w.offset[row, group]
        else:
            (scale,) = words[index : index + 1].view(np.float32)
        assert scale == 2 * w.scale[row, group]
        if kind == "offsets":
            assert words[32 + index : 33 + index].view(np.float32) == w.offset[row, group]
    scale, zero, offset = jax.jit(part_float_terms, static_argnums=(1, 2))(jnp.asarray(terms[0, 1, 0]), A4, kind)
    row = np.arange(32) // 16 * 64 + 16 + np.arange(32) % 16
    total = scale * (zero + 7.5) + (0 if offset is None else offset)
    np.testing.assert_array_equal(scale, 2 * w.scale[row, :2])
    np.testing.assert_array_equal(total, 0 * scale if w.offset is None else w.offset[row, :2])


def test_the_smallest_exact_form_is_taken():
    for kind in KINDS:
        w = float_groups(A4, 8, 64, 32, kind)
        assert narrowest_terms(w.scale, w.offset, A4) == kind
        traced = jax.eval_shape(lambda w: w.prepare(), w).float_terms
        assert traced == ("scales" if kind == "scales" else "offsets")
        assert w.prepare(float_terms="offsets").float_terms == "offsets"
    w = float_groups(A4, 8, 64, 32, "zeros")
    assert narrowest_terms(w.scale * 1.001, w.offset * 1.001, A4) == "offsets"
    none = dataclasses.replace(w, scale=0 * w.scale, offset=0 * w.offset)
    assert none.prepare().float_terms == "zeros"
    scales, offsets = (float_groups(A4, 8, 64, 32, kind) for kind in ("scales", "offsets"))
    halves = dataclasses.replace(scales, scale=scales.scale.astype(np.float16).astype(np.float32))
    assert shared_terms([scales, scales]) == "scales"
    assert shared_terms([halves, w]) == "zeros"
    assert shared_terms([scales, w]) == shared_terms([offsets, w]) == "offsets"


def test_bytes_of_a_weight():
    """Four bytes a group, eight with float32 offsets, beside those of the codes."""
    for kind, group_size, bits in (
        ("scales", 128, 4.25),
        ("zeros", 32, 5.0),
        ("minimums", 32, 5.0),
        ("offsets", 128, 4.5),
    ):
        prepared = float_groups(A4, 128, 1024, group_size, kind).prepare()
        assert 32 * (prepared.words.size + prepared.terms.size) == bits * 128 * 1024


def test_bytes_of_a_weight_of_k_types():
    """Of the terms at most 0.2 bits more than the file; all else is 12 bytes a column."""
    file_bits = {("block_nibbles", 2): 2.625, ("block_scales", 3): 3.4375, ("block_minimums", 4): 4.5,
                 ("block_minimums", 5): 5.5, ("block_scales", 6): 6.5625}  # fmt: skip
    for (kind, bits), stored in file_bits.items():
        w = float_groups(BipolarFormat(bits), 128, 1024, 32 if kind == "block_minimums" else 16, kind)
        prepared = jax.eval_shape(lambda w: w.prepare(), w)
        assert prepared.float_terms == kind
        words = prepared.words.size + prepared.terms.size
        assert 0 < 32 * words / (128 * 1024) - stored < 0.2
        assert prepared.nbytes == 4 * words + 12 * 128


def test_a_stack_of_layers_is_prepared_layer_by_layer():
    layers = [float_groups(A4, 130, 200, 64, "zeros", seed) for seed in (0, 1)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    prepared = stack.prepare()
    prepared.check()
    for index, layer in enumerate(layers):
        one = layer.prepare()
        for leaf, expected in zip(jax.tree.leaves(prepared), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(leaf[index], expected)
