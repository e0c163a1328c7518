"""Sums over the blocks of a cluster: the threads of all blocks, simulated. Interpret mode runs the twins elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from bipolar_jax.kernels.sm90.core import cluster_sums
from bipolar_jax.kernels.sm90.core.cluster_sums import add_up, buffer_shape, store_shares
from tests.support import warpgroup_simulator
from tests.support.warpgroup_simulator import THREADS, bank_conflicts, cluster_memory, int32


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_threads_send_each_block_its_share_and_add_up_what_comes(blocks, monkeypatch):
    """Every share of 64 x 128 sums of a block has its own numbers; memory begins with others."""
    warpgroup_simulator.install(monkeypatch)
    monkeypatch.setattr(cluster_sums, "thread_index", lambda: np.arange(THREADS, dtype=np.int32))
    words = 64 * 128 // (blocks * THREADS)
    shape = buffer_shape(blocks, (64, 128 // blocks))
    assert np.prod(shape) == blocks * words * THREADS
    cluster_memory[:] = [np.full(shape, 7, np.int32) for _ in range(blocks)]
    # By sender, receiver, word and thread. Sums wrap around, as the product's may on their way.
    sums = np.random.default_rng(blocks).integers(-(2**31), 2**31, (blocks, blocks, words, THREADS)).astype(np.int32)
    for rank in range(blocks):
        shares = [list(share) for share in sums[rank]]
        store_shares(cluster_memory[rank], shares, int32(rank) + np.zeros(THREADS, np.int32))
    bank_conflicts[0] = 0
    with np.errstate(over="ignore"):
        found = [np.stack(add_up(memory, blocks, words)) for memory in cluster_memory]
        np.testing.assert_array_equal(found, sums.sum(0, dtype=np.int32))
    assert bank_conflicts[0] == 0
