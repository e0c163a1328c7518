"""The device that programs run on is the one that JAX chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bipolar_jax.kernels.device import default_device


def test_it_is_where_jax_places_arrays():
    for chosen in (None, "cpu", jax.devices()[-1]):
        with jax.default_device(chosen):
            assert default_device() == jnp.zeros(1).device


def test_it_is_one_of_this_process(monkeypatch):
    """The first device of all belongs to another process."""
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [f"the first {backend} here"])
    monkeypatch.setattr(jax, "devices", lambda backend=None: ["of another process"])
    assert default_device() == "the first None here"
    with jax.default_device("cpu"):
        assert default_device() == "the first cpu here"
