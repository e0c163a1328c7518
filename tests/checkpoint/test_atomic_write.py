"""Files are written whole or not at all, and killed writers leave nothing for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bipolar_jax.checkpoint.atomic_write import atomic_write
from tests.support.imports import ROOT


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
        raise KeyError
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_writers_at_the_same_time_leave_each_other_alone(tmp_path):
    """safetensors replaces the file that it is given: a lock of the file itself would be gone."""
    with atomic_write(tmp_path / "x") as temporary:
        save_file({"a": np.ones(3)}, temporary)
        with atomic_write(tmp_path / "x") as other:
            other.write_text("other")
        assert (tmp_path / "x").read_text() == "other"
    assert load_file(tmp_path / "x")["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["x"]


def test_the_file_and_then_its_folder_are_flushed(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert calls == ["file", "replace", "folder"]


def test_the_next_write_deletes_the_temporary_of_a_killed_one_only(tmp_path):
    path = tmp_path / "x"
    code = (
        "import sys, time\nfrom bipolar_jax.checkpoint.atomic_write import atomic_write\n"
        f"with atomic_write({str(path)!r}) as temporary:\n"
        "    temporary.with_suffix('.own').write_text('half')\n    print('begun', flush=True)\n    time.sleep(100)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"begun\n"
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        (tmp_path / ".x.notes").write_text("not ours")
        (tmp_path / ".x.abcdefgh.tmp").write_text("of an older version")
        assert len(os.listdir(tmp_path)) == 4
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert len(os.listdir(tmp_path)) == 3, "the file, the note, and the living writer's temporary"
        assert (tmp_path / ".x.notes").exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
