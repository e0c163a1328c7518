"""Checksums of the files of a checkpoint, which cover what the checksums of its arrays do not: settings, state of the
batch iterator, and Orbax's own metadata."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import orbax.checkpoint as ocp

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.checkpoint.json_text import parse_json

NAME = "checksums.json"
_CHUNK_BYTES = 1 << 20


class ChecksummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The temporary folder that Orbax renames when a checkpoint is complete; then its checksums are added.

    A process that is killed between the two leaves a complete checkpoint without the file `NAME`, which is accepted.
    """

    async def finalize(self) -> None:
        """Renames the folder and writes the checksums, in Orbax's thread. Raises OSError."""
        await super().finalize()
        final = Path(self.get_final())
        if final.name.isdigit():  # a step, not one of its parts
            write_checksums(final)


def write_checksums(folder: Path) -> None:
    """Writes the file `NAME`: eight hex digits, the crc32 of the text that follows, and that text, a JSON object
    {path in the folder: [bytes, crc32]}.

    Raises:
      OSError: it cannot be written.
    """
    text = json.dumps({str(path.relative_to(folder)): _facts(path) for path in _files(folder)})
    with atomic_write(folder / NAME) as temporary:
        temporary.write_text(f"{zlib.crc32(text.encode()):08x}{text}")


def check_files(folder: Path) -> None:
    """Compares the files with their checksums, if the folder has any.

    Raises:
      ValueError: a file is missing or was changed; the message names it, but not the folder.
    """
    if not (folder / NAME).is_file():
        return
    raw = (folder / NAME).read_bytes()
    if raw[:8] != f"{zlib.crc32(raw[8:]):08x}".encode():
        raise ValueError(f"file {NAME} does not match its own checksum")
    for name, facts in parse_json(raw[8:].decode()).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"file {name} is missing")
        if _facts(path) != facts:
            raise ValueError(f"file {name} does not match its checksum")


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / NAME]


def _facts(path: Path) -> list[int]:
    """Bytes and crc32."""
    size, value = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return [size, value]
