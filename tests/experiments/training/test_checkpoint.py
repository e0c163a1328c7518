"""Checkpoints that cannot be written."""

from __future__ import annotations

import resource

import jax.numpy as jnp
import pytest

from experiments.training.checkpoint import TrainingCheckpoints
from experiments.training.step import TrainState


@pytest.fixture
def small_files():
    """No file may exceed 64 KiB: writing fails as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(size):
    return TrainState({"kernel": jnp.arange(size, dtype=jnp.float32) ** 1.5}, (), jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_error_and_keeps_the_last_checkpoint(tmp_path, small_files, asynchronous, capfd):
    checkpoints = TrainingCheckpoints(tmp_path, {"seed": 0}, 2, asynchronous)
    checkpoints.save(1, state(100), {})
    message = r"checkpoints \(File too large\): make room and run the same command, which resumes from step 1$"
    with pytest.raises(OSError, match=message):
        try:
            checkpoints.save(2, state(100_000), {})
        finally:
            checkpoints.close()
    again = TrainingCheckpoints(tmp_path, {"seed": 0}, 2, asynchronous)
    assert again.steps() == [1]
    assert again.restore(state(100), 1).step == 1
    again.close()
    assert "Traceback" not in capfd.readouterr().err
