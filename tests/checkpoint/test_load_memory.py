"""Reading a packed file needs the memory of what is kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import from_codes, save
from tests.support.peak_memory import peak_bytes

N, K = 8192, 8192
PLANE = N * K // 8  # bytes
PREPARE = "import jax, jax.numpy, bipolar_jax as bj; jax.block_until_ready(jax.numpy.ones(3))\nimport safetensors\n"
# Programs and buffers of the call itself.
SMALL = 2 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "w"
    codes = np.random.default_rng(0).integers(0, 16, (N, K), np.uint8)
    save(path, {"w": from_codes(jnp.asarray(codes), 4, -1, np.ones((N, 1), np.float32))})
    return path


@pytest.mark.parametrize(("bits", "planes"), [(None, 4), (2, 2)])
@pytest.mark.sample(1)
def test_load_adds_at_most_a_tenth_to_the_planes(file, bits, planes):
    peak = peak_bytes(PREPARE, f"jax.block_until_ready(bj.load({str(file)!r}, bits={bits}))")
    assert peak < 1.1 * planes * PLANE + SMALL


def test_truncate_adds_at_most_a_tenth_to_the_planes(file):
    prepare = f"{PREPARE}w = jax.block_until_ready(bj.load({str(file)!r})['w'])"
    peak = peak_bytes(prepare, "jax.block_until_ready(w.truncate(2))")
    assert peak < 1.1 * 2 * PLANE + SMALL
