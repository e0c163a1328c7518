"""Operations give the same numbers with unpacked weights as with packed ones; backends that need planes refuse them."""

from __future__ import annotations

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.kernels.sm90.core import execution
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops import Activation, RMSNorm, lookup
from tests.support.integer_products import normal

X = normal(4, 32)
PACKED = bj.quantize(normal(32, 16, seed=1), 4, axis=0)
GROUPED = bj.quantize(normal(32, 16, seed=1), 8, axis=0, group_size=12, calibration="minmax")
STACK = bj.quantize(normal(4, 32, 16), 4, axis=1)
FUSED = {"prologue": RMSNorm(jnp.ones(32, jnp.float32), 1e-5), "activation": Activation("silu", gated=True)}


@pytest.mark.parametrize(
    ("w", "options"),
    [(PACKED, {}), (STACK, {}), (GROUPED, FUSED | {"bias": jnp.ones(16)})],
    ids=["channels", "stack", "groups"],
)
def test_products_have_the_same_bits(w, options):
    expected = bj.matmul(X, w, 8, **options)
    np.testing.assert_array_equal(bj.matmul(X, w.unpack(), 8, **options), expected)


def test_weight_only_products_are_the_same():
    np.testing.assert_array_equal(bj.matmul(X, GROUPED.unpack(), None), bj.matmul(X, GROUPED, None))


def test_gradients_are_the_same():
    def loss(x, scale, w):
        return bj.matmul(x, dataclasses.replace(w, scale=scale), 8).sum()

    expected, found = (jax.grad(loss, (0, 1))(X, GROUPED.scale, w) for w in (GROUPED, GROUPED.unpack()))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("table", [PACKED.T, GROUPED.T], ids=["channels", "groups"])
def test_rows_are_the_same(table):
    ids = jnp.asarray([[3, 0], [-1, 99]])
    np.testing.assert_array_equal(lookup(table.unpack(), ids), lookup(table, ids))


def test_programs_with_unpacked_arguments_are_exported():
    unpacked = GROUPED.unpack()
    exported = jax.export.export(jax.jit(lambda x, w: bj.matmul(x, w, 8)))(X, unpacked)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(loaded.call(X, unpacked), bj.matmul(X, unpacked, 8))


def test_explain_says_whether_weights_are_unpacked_in_every_call():
    assert "unpacks the bit planes in every call" in str(bj.explain(X, PACKED, 8))
    assert "the weights are unpacked, one byte each" in str(bj.explain(X, PACKED.unpack(), 8))


def test_backends_that_read_planes_refuse(monkeypatch):
    with pytest.raises(Unsupported, match="reference: it multiplies bit planes"):
        bj.matmul(X, PACKED.unpack(), 8, implementation="reference")
    monkeypatch.setattr(execution, "is_hopper", lambda device: True)
    with pytest.raises(Unsupported, match="sm90: its kernels do not take unpacked weights.*layout="):
        bj.explain(X, PACKED.unpack(), 8, implementation="sm90")
    assert bj.explain(X, PACKED.unpack(), 8).implementation == "xla"


def test_files_hold_packed_weights_only(tmp_path):
    with pytest.raises(ValueError, match="w is unpacked for inference: save the model as it was before"):
        bj.save(tmp_path / "w.safetensors", {"w": PACKED.unpack()})
