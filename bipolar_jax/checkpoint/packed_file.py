"""Saves and loads trees of arrays in one safetensors file; packed arrays keep their layout.

A file holds one tensor named PATH for every array and up to four for every `BipolarArray`:
`PATH.planes`, `PATH.scale`, `PATH.offset` (unless it is None) and `PATH.row_sums`. PATH is the
tree's keys joined by "/". The safetensors metadata has one entry, "bipolar_jax": eight hex
digits, the crc32 of the text that follows, and that text, a JSON object:

    format_version  1
    packed          {PATH: {bits, ternary, contracted_size, axis, group_size}}
    checksums       {tensor: crc32, or for planes a list of one crc32 per plane, low plane first}
    user            the object that `save` was given

The planes of a matrix are contiguous, so a reader of fewer bits reads the high planes only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipolar_jax.checkpoint.checksums import checksum, plane_checksums
from bipolar_jax.extras import require
from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray
from bipolar_jax.packing.bipolar_array import code_sums

FORMAT_VERSION = 1
# dtypes of safetensors that JAX loads unchanged; by default JAX narrows 64-bit numbers to 32 bits.
_DTYPES = ("float32", "bfloat16", "float16", "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool")
_PLANES, _PER_GROUP = "planes", ("scale", "offset", "row_sums")


def save(path: str | os.PathLike[str], tree: Any, user: dict[str, Any] | None = None) -> None:
    """Writes a pytree of arrays and `BipolarArray`s; packed weights take n bits each.

    The file is written under a temporary name, synced and renamed, so that an interrupted save
    leaves an existing file unchanged.

    Args:
      path: file to write; replaced if it exists. Missing directories are made.
      tree: nested dicts, lists or dataclasses of arrays, or one array. None and empty
        containers are not stored.
      user: a dict that JSON can encode; `read_user` returns it.

    Raises:
      ValueError: a leaf that is not an array, has a dtype outside float32, bfloat16, float16,
        bool and integers of at most 32 bits, or is an inconsistent `BipolarArray`; a key that
        is empty or contains "/", or two leaves that would take the same tensor name.
      ModuleNotFoundError: safetensors is not installed.
    """
    safetensors_numpy = require("safetensors.numpy", "models")
    tensors, packed, checksums, reserved = {}, {}, {}, set()
    for name, leaf in _named_leaves(tree):
        arrays = {name: leaf}
        if isinstance(leaf, BipolarArray):
            leaf.check()
            packed[name] = _describe(leaf)
            fields = {field: getattr(leaf, field) for field in (_PLANES, *_PER_GROUP)}
            arrays = {f"{name}.{field}": array for field, array in fields.items() if array is not None}
            reserved.update(f"{name}.{field}" for field in fields)
        for tensor_name, device_array in arrays.items():
            array = np.asarray(device_array, order="C")
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            is_planes = name in packed and tensor_name == f"{name}.{_PLANES}"
            tensors[tensor_name] = array
            checksums[tensor_name] = plane_checksums(array) if is_planes else checksum(array)
    clashes = sorted(reserved & {name for name, leaf in _named_leaves(tree) if not isinstance(leaf, BipolarArray)})
    if clashes:
        raise ValueError(f"{clashes} are tensor names of fields of packed arrays: rename these keys")
    body = {"format_version": FORMAT_VERSION, "packed": packed, "checksums": checksums, "user": user or {}}
    text = json.dumps(body)
    with _atomic_write(Path(path)) as temporary:
        metadata = {"bipolar_jax": f"{zlib.crc32(text.encode()):08x}{text}"}
        safetensors_numpy.save_file(tensors, temporary, metadata=metadata)


def load(path: str | os.PathLike[str], bits: int | None = None) -> Any:
    """Reads a file that `save` wrote, and checks the checksum of every tensor that it reads.

    Args:
      path: file that `save` wrote.
      bits: truncates packed arrays with more bits to this many, as `BipolarArray.truncate`
        does, but reads only the planes that are kept. Ternary arrays are read whole. None
        reads all planes.

    Returns:
      Nested dicts of arrays, keyed by the parts of each path; the array itself if `save` was
      given one array.

    Raises:
      FileNotFoundError: no file at `path`.
      ValueError: bits outside 1..8, or a file that is not a packed checkpoint, has another
        format version, or is truncated or corrupted.
      ModuleNotFoundError: safetensors is not installed.
    """
    tree: dict[str, Any] = {}
    if bits is not None:
        BipolarFormat(bits)  # raises if out of range
    with _open_checked(path) as (file, body):
        packed_fields = {f"{name}.{field}" for name in body["packed"] for field in (_PLANES, *_PER_GROUP)}
        for name in sorted({*body["packed"], *(set(body["checksums"]) - packed_fields)}):
            description = body["packed"].get(name)
            if description is None:
                leaf = jnp.asarray(_read_tensor(file, body, name))
            else:
                leaf = _read_packed(file, body, name, description, bits)
            if name == "":
                return leaf
            *parents, last = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf
    return tree


def read_user(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the `user` object that `save` was given. Raises as `load`."""
    with _open_checked(path) as (_, body):
        return body["user"]


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The path and the array of every leaf. Raises ValueError as `save`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, BipolarArray))
    for keys, leaf in leaves:
        key_names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        if any("/" in key_name for key_name in key_names):
            raise ValueError(f"keys {key_names} contain '/', which separates keys in the file: rename the key")
        name = "/".join(key_names)
        if keys and ("" in key_names or name == "__metadata__"):
            raise ValueError(f"keys {key_names} cannot be a tensor name in a safetensors file: rename the key")
        if not isinstance(leaf, BipolarArray | jax.Array | np.ndarray):
            raise ValueError(
                f"{name or 'the tree'} is a {type(leaf).__name__}, not an array: convert it or leave it out"
            )
        if not isinstance(leaf, BipolarArray) and leaf.dtype.name not in _DTYPES:
            raise ValueError(
                f"{name or 'the tree'} has dtype {leaf.dtype.name}, packed files hold {', '.join(_DTYPES)}: cast it"
            )
        yield name, leaf


def _describe(array: BipolarArray) -> dict[str, Any]:
    """The static attributes of a packed array, as JSON."""
    return {
        "bits": array.bits,
        "ternary": array.format.ternary,
        "contracted_size": array.contracted_size,
        "axis": array.axis,
        "group_size": array.group_size,
    }


@contextlib.contextmanager
def _atomic_write(path: Path) -> Iterator[str]:
    """Yields the name of a temporary file, renamed to `path` at the end of the block, or deleted if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives access to the owner only
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _open_checked(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the open file and its checked metadata; raises the errors of `load` for damage found in the block."""
    safetensors = require("safetensors", "models")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no packed checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "bipolar_jax" not in metadata:
                raise ValueError(f"{path} is not a packed checkpoint: no bipolar_jax entry in its metadata")
            digits, text = metadata["bipolar_jax"][:8], metadata["bipolar_jax"][8:]
            if digits != f"{zlib.crc32(text.encode()):08x}":
                raise _ChecksumError("its metadata")
            body = json.loads(text)
            if body["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {body['format_version']}, this bipolar_jax reads {FORMAT_VERSION}: "
                    "write it again, or install the version of bipolar_jax that wrote it"
                )
            if set(file.keys()) != set(body["checksums"]):
                raise _ChecksumError("its list of tensors")
            yield file, body
    except _ChecksumError as error:
        raise ValueError(f"{path} is corrupted: {error} does not match its checksum; copy it again") from error
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}): copy or write it again") from error


class _ChecksumError(Exception):
    """The message names the part of the file that does not match its checksum."""


def _read_tensor(file: Any, body: dict[str, Any], name: str) -> np.ndarray:
    array = file.get_tensor(name)
    if checksum(array) != body["checksums"][name]:
        raise _ChecksumError(f"tensor {name}")
    return array


def _read_planes(file: Any, body: dict[str, Any], name: str, dropped: int) -> np.ndarray:
    """The planes of a packed array without the `dropped` lowest ones, which are not read."""
    stored = file.get_slice(name)
    batch_axes = (slice(None),) * (len(stored.get_shape()) - 3)
    planes = stored[(*batch_axes, slice(dropped, None))] if dropped else file.get_tensor(name)
    if plane_checksums(planes) != body["checksums"][name][dropped:]:
        raise _ChecksumError(f"tensor {name}")
    return planes


def _read_packed(
    file: Any, body: dict[str, Any], name: str, description: dict[str, Any], bits: int | None
) -> BipolarArray:
    number_format = BipolarFormat(description["bits"], ternary=description["ternary"])
    dropped = 0 if bits is None or number_format.ternary else max(0, number_format.bits - bits)
    per_group = {
        field: jnp.asarray(_read_tensor(file, body, f"{name}.{field}"))
        for field in _PER_GROUP
        if f"{name}.{field}" in body["checksums"]
    }
    array = BipolarArray(
        planes=jnp.asarray(_read_planes(file, body, f"{name}.{_PLANES}", dropped)),
        scale=per_group["scale"] * 2.0**dropped,
        offset=per_group.get("offset"),
        row_sums=per_group["row_sums"],
        format=BipolarFormat(number_format.bits - dropped) if dropped else number_format,
        contracted_size=description["contracted_size"],
        axis=description["axis"],
        group_size=description["group_size"],
    )
    array.check()
    if not dropped:
        return array
    return dataclasses.replace(array, row_sums=code_sums(array.codes(), array.group_size))
