"""Trees of arrays in one safetensors file, packed arrays as they are in memory.

A file holds one tensor for every array and up to four for every `BipolarArray`:
`PATH.planes`, `.scale`, `.offset` (if there is one) and `.row_sums`, PATH being the keys
that lead to it joined by "/". The safetensors metadata has one entry, "bipolar_jax": eight
hex digits, the crc32 of what follows, and a JSON object:

    format_version  1
    packed          {PATH: {bits, ternary, contracted_size, axis, group_size}}
    checksums       {tensor: crc32, for planes one for each plane, low plane first}
    user            whatever `save` was given

Planes of a matrix lie one after the other, so that a reader that wants fewer bits reads
only the top ones.
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
# What JAX holds by default and safetensors can name; 64-bit numbers would come back narrowed.
_DTYPES = ("float32", "bfloat16", "float16", "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool")
_PLANES, _PER_GROUP = "planes", ("scale", "offset", "row_sums")


def save(path: str | os.PathLike[str], tree: Any, user: dict[str, Any] | None = None) -> None:
    """Writes a pytree of arrays and `BipolarArray`s, packed: n bits a weight.

    The file appears under its name only when it is whole: it is written beside it, synced
    and renamed.

    Args:
      path: file to write; replaced if it exists.
      tree: nested dicts, lists or dataclasses of arrays, or one array. None and empty
        containers leave no trace.
      user: anything JSON can hold, returned by `read_user`.

    Raises:
      ValueError: a leaf that is no array or of a dtype that JAX would narrow or safetensors
        cannot name, or keys that would make names ambiguous, such as those with "/".
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
        raise ValueError(f"{clashes} are names that the fields of packed arrays take in the file: rename these keys")
    body = {"format_version": FORMAT_VERSION, "packed": packed, "checksums": checksums, "user": user or {}}
    text = json.dumps(body)
    with _replacing(Path(path)) as temporary:
        metadata = {"bipolar_jax": f"{zlib.crc32(text.encode()):08x}{text}"}
        safetensors_numpy.save_file(tensors, temporary, metadata=metadata)


def load(path: str | os.PathLike[str], bits: int | None = None) -> Any:
    """Reads what `save` wrote, as nested dicts; one array comes back as itself.

    The file is memory-mapped, and every tensor is compared with its checksum as it is read.

    Args:
      path: file that `save` wrote.
      bits: read only this many top planes of every packed array that has more
        (`BipolarArray.truncate`, without reading the rest) except ternary ones, which do not
        nest; None reads all.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, another format version, truncated or corrupted.
    """
    tree: dict[str, Any] = {}
    if bits is not None:
        BipolarFormat(bits)  # raises if out of range
    with _opened(path) as (file, body):
        packed_fields = {f"{name}.{field}" for name in body["packed"] for field in (_PLANES, *_PER_GROUP)}
        for name in sorted({*body["packed"], *(set(body["checksums"]) - packed_fields)}):
            described = body["packed"].get(name)
            if described is None:
                leaf = jnp.asarray(_read(file, body, name))
            else:
                leaf = _read_packed(file, body, name, described, bits)
            if name == "":
                return leaf
            *parents, last = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf
    return tree


def read_user(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `user` object that `save` was given. Raises as `load`."""
    with _opened(path) as (_, body):
        return body["user"]


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, BipolarArray))
    for keys, leaf in leaves:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        if any("/" in part for part in parts):
            raise ValueError(f"key {parts} has a '/' in it, which separates keys in the file: rename it")
        name = "/".join(parts)
        if keys and ("" in parts or name == "__metadata__"):
            raise ValueError(f"key {parts} has no name that a safetensors file could hold: rename it")
        if not isinstance(leaf, BipolarArray | jax.Array | np.ndarray):
            raise ValueError(f"{name or 'the tree'} is a {type(leaf).__name__}, not an array: convert or leave it out")
        if not isinstance(leaf, BipolarArray) and leaf.dtype.name not in _DTYPES:
            raise ValueError(
                f"{name or 'the tree'} has dtype {leaf.dtype.name}, a packed file holds {', '.join(_DTYPES)}: cast it"
            )
        yield name, leaf


def _describe(array: BipolarArray) -> dict[str, Any]:
    return {
        "bits": array.bits,
        "ternary": array.format.ternary,
        "contracted_size": array.contracted_size,
        "axis": array.axis,
        "group_size": array.group_size,
    }


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A temporary file that takes the place of `path` once the block has written it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # mkstemp made it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its checked metadata; turns what goes wrong with them into one clear error."""
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
                raise _MismatchError("its metadata")
            body = json.loads(text)
            if body["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {body['format_version']}, this bipolar_jax reads {FORMAT_VERSION}: "
                    "write it again, or install the version that wrote it"
                )
            if set(file.keys()) != set(body["checksums"]):
                raise _MismatchError("its list of tensors")
            yield file, body
    except _MismatchError as mismatch:
        raise ValueError(f"{path} is corrupted: {mismatch} does not match its checksum; copy it again") from mismatch
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}): copy or write it again") from error


class _MismatchError(Exception):
    """What did not match."""


def _read(file: Any, body: dict[str, Any], name: str) -> np.ndarray:
    array = file.get_tensor(name)
    if checksum(array) != body["checksums"][name]:
        raise _MismatchError(f"tensor {name}")
    return array


def _read_planes(file: Any, body: dict[str, Any], name: str, dropped: int) -> np.ndarray:
    stored = file.get_slice(name)
    batch_axes = (slice(None),) * (len(stored.get_shape()) - 3)
    planes = stored[(*batch_axes, slice(dropped, None))] if dropped else file.get_tensor(name)
    if plane_checksums(planes) != body["checksums"][name][dropped:]:
        raise _MismatchError(f"tensor {name}")
    return planes


def _read_packed(
    file: Any, body: dict[str, Any], name: str, described: dict[str, Any], bits: int | None
) -> BipolarArray:
    number_format = BipolarFormat(described["bits"], ternary=described["ternary"])
    dropped = 0 if bits is None or number_format.ternary else max(0, number_format.bits - bits)
    per_group = {
        field: jnp.asarray(_read(file, body, f"{name}.{field}"))
        for field in _PER_GROUP
        if f"{name}.{field}" in body["checksums"]
    }
    array = BipolarArray(
        planes=jnp.asarray(_read_planes(file, body, f"{name}.{_PLANES}", dropped)),
        scale=per_group["scale"] * 2.0**dropped,
        offset=per_group.get("offset"),
        row_sums=per_group["row_sums"],
        format=BipolarFormat(number_format.bits - dropped) if dropped else number_format,
        contracted_size=described["contracted_size"],
        axis=described["axis"],
        group_size=described["group_size"],
    )
    array.check()
    if not dropped:
        return array
    return dataclasses.replace(array, row_sums=code_sums(array.codes(), array.group_size))
