"""Files that appear whole or not at all, even if the process is killed or the machine stops."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".tmp"
_RANDOM = r"[a-z0-9_]{8}"  # as tempfile makes it


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of a file to create, and moves the file to `path` at the end of the block.

    The file and its folder are flushed to disk. Until then it is in a hidden folder beside `path`, with whatever
    temporaries the library that writes it makes of its own. If the block raises, the folder is deleted. A killed
    process leaves its folder behind; the next write of the same path deletes it.

    Args:
      path: file to write; replaced if it exists. Missing folders are made.

    Raises:
      OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(path)
    folder, lock = _locked_folder(path)
    try:
        temporary = folder / path.name
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # libraries that write a temporary of their own may give access to the owner only
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
    _sync_folder(path.parent)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and its descriptor, whose lock the kernel releases when this process ends."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
        descriptor = None
        with contextlib.suppress(FileNotFoundError):  # another writer deleted it before it was locked
            descriptor = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
        if descriptor is not None:
            os.close(descriptor)


def _delete_abandoned(path: Path) -> None:
    """Deletes temporaries of `path` that no process holds the lock of."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_RANDOM}{re.escape(_SUFFIX)}")
    for candidate in path.parent.iterdir():
        if not pattern.fullmatch(candidate.name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(candidate, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
                shutil.rmtree(candidate) if candidate.is_dir() else candidate.unlink()
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flushes the renaming itself to disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
