"""Checkpoints that cannot be written, were not completed, or were changed after they were."""

from __future__ import annotations

import random
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.checkpoint import FOLDER, TrainingCheckpoints
from experiments.training.checkpoint_files import NAME, ChecksummedPath
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


@pytest.fixture(scope="module", params=[False, True], ids=["written at once", "written in the background"])
def finished(request, tmp_path_factory):
    """Checkpoints of steps 1 and 2, and the folder of the second."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = TrainingCheckpoints(workdir, {"seed": 0}, 2, request.param)
    checkpoints.save(1, state(100), {"next": 1})
    checkpoints.save(2, state(100), {"next": 2})
    checkpoints.close()
    checkpoints = TrainingCheckpoints(workdir, {"seed": 0}, 2, request.param)
    yield checkpoints, workdir / FOLDER / "2"
    checkpoints.close()


def test_a_flipped_bit_in_any_file_is_noticed_and_the_file_named(finished):
    checkpoints, folder = finished
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {"metadata", "_METADATA", "_CHECKPOINT_METADATA", NAME} < {path.name for path in files}
    rng = random.Random(0)
    for path in files:
        intact = path.read_bytes()
        changed = bytearray(intact)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError) as caught:
            checkpoints.restore(state(100), 2)
        message = str(caught.value)
        assert message.startswith(f"checkpoint {folder} is damaged or not a checkpoint of this program (file ")
        assert f"{path.relative_to(folder)} does not match its" in message
        assert message.endswith("move it away to resume from step 1")
        path.write_bytes(intact)
    restored = checkpoints.restore(state(100), 2)
    assert restored.data == {"next": 2}
    np.testing.assert_array_equal(restored.state.params["kernel"], state(100).params["kernel"])


def test_a_missing_file_is_named(finished):
    checkpoints, folder = finished
    path = folder / "about" / "metadata"
    path.rename(folder.parent / "elsewhere")
    try:
        with pytest.raises(ValueError, match=r"2 is damaged .*\(file about/metadata is missing\): move it away"):
            checkpoints.restore(state(100), 2)
    finally:
        (folder.parent / "elsewhere").rename(path)


def test_a_checkpoint_killed_before_its_checksums_is_complete(finished):
    checkpoints, folder = finished
    content = (folder / NAME).read_bytes()
    (folder / NAME).unlink()
    try:
        assert checkpoints.restore(state(100), 2).data == {"next": 2}
    finally:
        (folder / NAME).write_bytes(content)


def test_an_interrupted_write_is_no_checkpoint_and_the_next_run_deletes_it(tmp_path, monkeypatch):
    async def killed(self):
        raise OSError("killed")

    checkpoints = TrainingCheckpoints(tmp_path, {"seed": 0}, 2, False)
    checkpoints.save(1, state(100), {})
    with monkeypatch.context() as patched:
        patched.setattr(ChecksummedPath, "finalize", killed)
        with pytest.raises(OSError, match="killed.*resumes from step 1"):
            checkpoints.save(2, state(100), {})
    (temporary,) = (tmp_path / FOLDER).glob("2.*")
    again = TrainingCheckpoints(tmp_path, {"seed": 0}, 2, False)
    assert again.steps() == [1]
    assert again.restore(state(100), 1).step == 1
    again.save(2, state(100), {})
    assert again.steps() == [1, 2]
    assert not temporary.exists()
    again.close()
