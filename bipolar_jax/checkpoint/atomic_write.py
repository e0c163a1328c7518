"""Files that appear whole or not at all, even if the process is killed or the machine stops."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".tmp"
_RANDOM = r"[a-z0-9_]{8}"  # as tempfile makes it


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder, and renames it to `path` at the end of the block.

    The file and its folder are flushed to disk. If the block raises, the temporary is deleted. A killed process
    leaves its temporary behind; the next write of the same path deletes it.

    Args:
      path: file to write; replaced if it exists. Missing folders are made.

    Raises:
      OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(path)
    descriptor, temporary = _locked_temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives access to the owner only
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    _sync_folder(path.parent)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file and its descriptor, whose lock the kernel releases when this process ends."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):  # no other writer deleted it before it was locked
            return descriptor, Path(name)
        os.close(descriptor)


def _delete_abandoned(path: Path) -> None:
    """Deletes temporaries of `path` that no process holds the lock of."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_RANDOM}{re.escape(_SUFFIX)}")
    for candidate in path.parent.iterdir():
        if not pattern.fullmatch(candidate.name):
            continue
        with contextlib.suppress(OSError), open(candidate, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
            candidate.unlink()


def _sync_folder(folder: Path) -> None:
    """Flushes the renaming itself to disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
