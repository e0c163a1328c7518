"""The folder of finished blocks."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.compress.layer_store import LayerStore, digest_of_arrays, digest_of_model
from tests.support.tiny_transformers import ARCHITECTURES, random_transformer


def arrays(seed=0):
    weights = np.random.default_rng(seed).standard_normal((40, 24)).astype(np.float32)
    return {"attention/q_proj": bj.quantize(weights, 4, -2, 16), "ffn/down_proj": bj.quantize(weights, 3, -2)}


def test_a_block_comes_back_bit_by_bit(tmp_path):
    store = LayerStore(tmp_path / "store", {"model": "m", "tokens": "t"})
    assert store.read(3) is None
    store.write(3, arrays())
    found = store.read(3)
    assert list(found) == list(arrays())
    assert jax.tree.structure(found) == jax.tree.structure(arrays())
    for one, other in zip(*map(jax.tree.leaves, (found, arrays())), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert store.read(2) is None


def test_blocks_of_another_calibration_are_refused_by_name(tmp_path):
    LayerStore(tmp_path, {"model": "m", "tokens": "t"}).write(0, arrays())
    with pytest.raises(ValueError, match="block_00000.safetensors was calibrated with other values of tokens: "):
        LayerStore(tmp_path, {"model": "m", "tokens": "u"}).read(0)
    bj.save(LayerStore(tmp_path, {}).path(1), {"q_proj": arrays()["attention/q_proj"]})
    with pytest.raises(ValueError, match="with other values of model: "):
        LayerStore(tmp_path, {"model": "m"}).read(1)


def test_digests_see_numbers_dtypes_and_config():
    model = random_transformer(ARCHITECTURES["llama"])
    assert digest_of_model(model) == digest_of_model(random_transformer(ARCHITECTURES["llama"]))
    assert digest_of_model(model) != digest_of_model(random_transformer(ARCHITECTURES["llama"], seed=1))
    model.config = object()  # at another address than the next, as in another process
    digest = digest_of_model(model)
    model.config = object()
    assert digest_of_model(model) == digest
    assert digest_of_arrays(np.zeros(4, np.int32)) != digest_of_arrays(np.zeros(4, np.float32))
    assert digest_of_arrays(np.zeros((2, 2), np.int32)) != digest_of_arrays(np.zeros(4, np.int32))
