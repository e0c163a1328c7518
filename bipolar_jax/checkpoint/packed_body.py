"""The JSON object in the metadata of a packed file: how it is read and checked."""

from __future__ import annotations

import dataclasses
import os
import zlib
from typing import Any

from bipolar_jax.checkpoint.json_text import parse_json
from bipolar_jax.checkpoint.safetensors_reader import SafetensorsError
from bipolar_jax.format import BipolarFormat
from bipolar_jax.quantize.groups import check_group_size

FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)
_KEY = "bipolar_jax"
_MOST_SIZE = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Description:
    """The static attributes of a packed array, as in `BipolarArray`."""

    format: BipolarFormat
    contracted_size: int
    axis: int
    group_size: int | None


@dataclasses.dataclass(frozen=True)
class Body:
    """The checked object.

    Attributes:
      packed: the packed arrays by path.
      checksums: crc32 of every tensor by name; nested lists for planes, see `packed_file`.
      user: the object that `save` was given.
    """

    packed: dict[str, Description]
    checksums: dict[str, int | list]
    user: dict[str, Any]


def read_body(path: str | os.PathLike[str], metadata: dict[str, str], tensors: set[str]) -> Body:
    """Checks the metadata of a packed file.

    Args:
      path: the file, for messages.
      metadata: the texts of the safetensors header.
      tensors: the names of the file's tensors.

    Raises:
      SafetensorsError: a checksum does not match, or the object contradicts itself or the tensors.
      ValueError: not a packed file, or another format version.
    """
    if _KEY not in metadata:
        raise ValueError(f"{path} is not a packed checkpoint: no bipolar_jax entry in its metadata")
    digits, text = metadata[_KEY][:8], metadata[_KEY][8:]
    if digits != f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}":
        raise SafetensorsError("its metadata does not match its checksum")
    try:
        body = parse_json(text)
    except ValueError as error:
        raise SafetensorsError(f"its metadata is not JSON: {error!s:.200}") from error
    version = body.get("format_version") if isinstance(body, dict) else None
    if type(version) is not int:
        raise SafetensorsError("its metadata has no format version")
    if version not in _READ_VERSIONS:
        newer = ", which is newer" if version > FORMAT_VERSION else ""
        raise ValueError(
            f"{path} has format version {version}, this bipolar_jax reads {_READ_VERSIONS[0]} to {FORMAT_VERSION}: "
            f"write it again, or install the version of bipolar_jax that wrote it{newer}"
        )
    packed, checksums, user = (body.get(name) for name in ("packed", "checksums", "user"))
    if not all(isinstance(part, dict) for part in (packed, checksums, user)):
        raise SafetensorsError("its metadata lacks packed, checksums or user")
    if tensors != set(checksums):
        raise SafetensorsError("its list of tensors does not match its checksums")
    return Body({name: _description(name, fields) for name, fields in packed.items()}, checksums, user)


def _description(name: str, fields: Any) -> Description:
    fields = fields if isinstance(fields, dict) else {}
    try:
        ternary, size, axis = fields["ternary"], fields["contracted_size"], fields["axis"]
        group_size = fields["group_size"]
        if type(ternary) is not bool or type(size) is not int or not 1 <= size <= _MOST_SIZE:
            raise ValueError(f"{ternary=} and contracted_size={size!r:.40}")
        if type(axis) is not int or axis not in (-1, -2):
            raise ValueError(f"{axis=!r:.40}, expected -1 or -2")
        check_group_size(size, group_size)
        return Description(BipolarFormat(fields["bits"], ternary=ternary), size, axis, group_size)
    except KeyError as error:
        raise SafetensorsError(f"packed array {name!r:.100} lacks {error}") from error
    except ValueError as error:
        raise SafetensorsError(f"packed array {name!r:.100} has {error!s:.300}") from error
