"""Packed files are read straight into shards: each process reads and checks the rows that its devices have."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bipolar_jax as bj
from bipolar_jax.checkpoint.checksums import BLOCK_ROWS, ChecksumError
from bipolar_jax.checkpoint.packed_body import read_body
from bipolar_jax.checkpoint.safetensors_reader import SafetensorsReader
from bipolar_jax.checkpoint.shards import read_parts
from bipolar_jax.packing.cuts import shardings
from tests.support.integer_products import normal

K, N = 128, BLOCK_ROWS + 8
MESH = jax.make_mesh((2,), ("model",))
KINDS = {
    "column": {"bits": 3},
    "integer groups": {"bits": 3, "group_size": 32},
    "float groups": {"bits": 3, "group_size": 64, "scales": "float"},  # row sums are counted as they are read
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    w = bj.quantize(np.stack([normal(K, N), normal(K, N, seed=1)]), axis=-2, **KINDS[request.param])
    path = tmp_path_factory.mktemp("files") / "w.safetensors"
    bj.save(path, {"w": w, "x": np.arange(4.0, dtype=np.float32)})
    return path, w


@pytest.mark.parametrize("spec", [P(None, "model"), P(None, None, "model")], ids=["k", "n"])
@pytest.mark.parametrize("bits", [None, 2])
@pytest.mark.sample(2)
def test_shards_hold_what_the_file_holds(saved, spec, bits):
    path, w = saved
    expected = bj.load(path, bits)["w"]
    wanted = shardings(w if bits is None else w.truncate(bits), MESH, spec)
    found = bj.load(path, bits, {"w": wanted})
    assert jax.tree.structure(found["w"]) == jax.tree.structure(expected)
    for one, other, sharding in zip(*map(jax.tree.leaves, (found["w"], expected, wanted)), strict=True):
        assert one.sharding == sharding
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found["x"], [0, 1, 2, 3])


def test_shards_are_saved_as_one_array(saved, tmp_path):
    path, w = saved
    cut = bj.load(path, None, {"w": shardings(w, MESH, P(None, None, "model"))})
    bj.save(tmp_path / "again", cut)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_part_reads_and_checks_its_own_blocks(saved, tmp_path):
    path, w = saved
    with SafetensorsReader(path) as file:
        stored = file.tensors["w.planes"]
    data = bytearray(path.read_bytes())
    data[stored.start] ^= 1  # the first row of the first matrix's lowest plane
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    words = K // 32
    last_rows = ((0, 2), (0, 3), (BLOCK_ROWS, N), (0, words // 2))
    with SafetensorsReader(damaged) as file:
        expected = read_body(damaged, file.metadata, set(file.tensors)).checksums["w.planes"]
        (found,) = read_parts(file, "w.planes", expected, 0, [last_rows]).values()
        np.testing.assert_array_equal(found, np.asarray(w.planes)[:, :, BLOCK_ROWS:, : words // 2])
        without_lowest = ((0, 2), (0, 2), (0, 8), (0, words))
        assert len(read_parts(file, "w.planes", expected, 1, [without_lowest])) == 1
        with pytest.raises(ChecksumError, match=r"tensor w\.planes"):
            read_parts(file, "w.planes", expected, 0, [((0, 1), (0, 1), (4, 8), (0, words))])
    with pytest.raises(ValueError, match=r"is corrupted: tensor w\.planes does not match its checksum"):
        bj.load(damaged, None, {"w": shardings(w, MESH, P(None, None, "model"))})


def test_shardings_of_another_array_are_refused(saved):
    path, _ = saved
    other = bj.quantize(np.stack([normal(K, N)] * 2), 1, axis=-2)
    with pytest.raises(ValueError, match="packed array 'w' has other fields than its config asks for"):
        bj.load(path, None, {"w": shardings(other, MESH, P())})
