"""Saves and loads trees of arrays in one safetensors file; packed arrays keep their layout.

A file holds one tensor named PATH for every array. For every `BipolarArray` it holds

    PATH.planes                              uint32
    PATH.scale                               float32, float16 or bfloat16
    PATH.offset, unless it is None           the same, or int8 or int16: whole multiples of the scale
    PATH.row_sums, unless they are counted   int32; see `packed_arrays.stored_fields`
    PATH.groups.scale, PATH.groups.offset    uint8, int8; only integer groups have them

PATH is the tree's keys joined by "/". The safetensors metadata has one entry, "bipolar_jax":
eight hex digits, the crc32 of the text that follows, and that text, a JSON object:

    format_version  2
    packed          {PATH: {bits, ternary, contracted_size, axis, group_size}}
    checksums       {tensor: crc32, or for planes [for each matrix [for each plane [for each 1,024 rows crc32]]]}
    user            the object that `save` was given

Version 1 has no integer groups, float32 scales and offsets, all row_sums, and one crc32 for each plane.

The planes of a matrix are contiguous, so a reader of fewer bits reads the high planes only.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.checkpoint.checksums import ChecksumError, block_checksums, checksum
from bipolar_jax.checkpoint.packed_arrays import (
    FIELDS,
    PLANES,
    check_finite,
    read_packed,
    read_tensor,
    stored_fields,
)
from bipolar_jax.checkpoint.packed_body import FORMAT_VERSION, Body, read_body
from bipolar_jax.checkpoint.safetensors_reader import (
    MOST_NAME_CHARACTERS,
    SafetensorsError,
    SafetensorsReader,
)
from bipolar_jax.checkpoint.shards import in_shards
from bipolar_jax.extras import require
from bipolar_jax.format import BipolarFormat
from bipolar_jax.packing import BipolarArray, BipolarNumbers, BlockScaledArray, UnpackedArray
from bipolar_jax.packing.host_memory import is_shared, on_host

# dtypes of safetensors that JAX loads unchanged; by default JAX narrows 64-bit numbers to 32 bits.
_DTYPES = ("float32", "bfloat16", "float16", "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool")


def save(path: str | os.PathLike[str], tree: Any, user: dict[str, Any] | None = None) -> None:
    """Writes a pytree of arrays and `BipolarArray`s; packed weights take n bits each.

    The file is written in a temporary folder, synced and moved, so that an interrupted save
    leaves an existing file unchanged.

    If processes share an array, all of them call this with the same arguments, and return or raise together: arrays are
    gathered one by one, and the first process, which needs host memory for all of them, writes the file. Arrays that
    every process has whole, as data-parallel models are, each process writes that calls this.

    Args:
      path: file to write; replaced if it exists. Missing directories are made.
      tree: nested dicts, lists or dataclasses of arrays, or one array. None and empty
        containers are not stored.
      user: a dict that JSON can encode and keeps as it is, with texts as keys; `read_user` returns it.

    Raises:
      ValueError: a leaf that is not an array, has a dtype outside float32, bfloat16, float16,
        bool and integers of at most 32 bits, or is a `BipolarArray` that is inconsistent or has
        NaN or Inf scales; a key that is empty or contains "/", a path of more than 1,000
        characters, or two leaves that would take the same tensor name; a `user` that is no such dict.
      OSError: the file cannot be written, for example because the disk is full.
      ModuleNotFoundError: safetensors is not installed.
    """
    require("safetensors.numpy", "models")
    named = dict(_named_leaves(tree))
    user = _checked_user(user)
    are_shared = any(map(is_shared, jax.tree.leaves(named)))
    writes = not are_shared or jax.process_index() == 0
    tensors, packed, checksums, reserved = {}, {}, {}, set()
    for name, shared_leaf in named.items():
        if isinstance(shared_leaf, BipolarArray):
            shared_leaf.check()
        # Every process gathers and checks every array, so that what is wrong with one raises in all of them.
        leaf = jax.tree.map(on_host, shared_leaf)
        if isinstance(leaf, BipolarArray):
            check_finite(name, leaf.scale, leaf.offset)
            packed[name] = _describe(leaf)
            reserved.update(f"{name}.{field}" for field in FIELDS)
        if not writes:
            continue
        fields = stored_fields(leaf) if name in packed else {}
        arrays = {f"{name}.{field}": array for field, array in fields.items()} or {name: leaf}
        for tensor_name, array in arrays.items():
            array = np.asarray(array, order="C")
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            is_planes = name in packed and tensor_name == f"{name}.{PLANES}"
            tensors[tensor_name] = array
            checksums[tensor_name] = block_checksums(array) if is_planes else checksum(array)
    if clashes := sorted(reserved & (set(named) - set(packed))):
        raise ValueError(f"{clashes} are tensor names of fields of packed arrays: rename these keys")
    body = {"format_version": FORMAT_VERSION, "packed": packed, "checksums": checksums, "user": user}
    text = json.dumps(body)
    metadata = {"bipolar_jax": f"{zlib.crc32(text.encode()):08x}{text}"}
    with _together(path, writes) if are_shared else contextlib.nullcontext():
        if writes:
            _write(path, tensors, metadata)


def _write(path: str | os.PathLike[str], tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Raises OSError if the file cannot be written."""
    safetensors_numpy = require("safetensors.numpy", "models")
    with atomic_write(path) as temporary:
        try:
            safetensors_numpy.save_file(tensors, temporary, metadata=metadata)
        except require("safetensors", "models").SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


@contextlib.contextmanager
def _together(path: str | os.PathLike[str], writes: bool) -> Iterator[None]:
    """Ends in all processes after the block of the one that writes; raises OSError in the others if that fails."""
    is_written = False
    try:
        yield
        is_written = writes
    finally:
        is_written = bool(multihost_utils.broadcast_one_to_all(np.bool_(is_written), is_source=writes))
    if not is_written:
        raise OSError(f"the first process cannot write {path}: its error says why")


def load(path: str | os.PathLike[str], bits: int | None = None, shardings: Mapping[str, Any] | None = None) -> Any:
    """Reads a file that `save` wrote, and checks the checksum of every tensor that it reads.

    Args:
      path: file that `save` wrote.
      bits: truncates packed arrays with more bits to this many, as `BipolarArray.truncate`
        does, but reads only the planes that are kept. Ternary arrays are read whole. None
        reads all planes.
      shardings: of arrays by path, a pytree like the array (`packing.cuts.shardings`); arrays that it does not name go
        to the default device. Of planes a process reads and checks the rows of which its devices have a part, and keeps
        their parts; other tensors it reads whole.

    Returns:
      Nested dicts of arrays, keyed by the parts of each path, which are texts, also of lists; the array itself if
      `save` was given one array. So `nnx.to_pure_dict(nnx.state(model))`, saved, is read into a model with lists of
      layers by `nnx.update(model, nnx.restore_int_paths(load(path)))`.

    Raises:
      FileNotFoundError: no file at `path`.
      PermissionError: the file is not readable.
      ValueError: bits outside 1..8, or a file that is not a packed checkpoint, has another
        format version, is truncated or corrupted, or has NaN or Inf scales.
      ModuleNotFoundError: safetensors is not installed.
    """
    tree: dict[str, Any] = {}
    shardings = shardings or {}
    if bits is not None:
        BipolarFormat(bits)  # raises if out of range
    with _open_checked(path) as (file, body):
        packed_fields = {f"{name}.{field}" for name in body.packed for field in FIELDS}
        for name in sorted({*body.packed, *(set(body.checksums) - packed_fields)}):
            description = body.packed.get(name)
            if description is None:
                array = read_tensor(file, body.checksums, name, _DTYPES)
                leaf = in_shards(array, shardings[name]) if name in shardings else jax.device_put(array)
            else:
                leaf = read_packed(file, body.checksums, name, description, bits, shardings.get(name))
            if name == "":
                return leaf
            *parents, last = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
                if not isinstance(node, dict):
                    raise SafetensorsError(f"tensor {name!r:.100} lies inside another one")
            node[last] = leaf
    return tree


def read_user(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the `user` object that `save` was given. Raises as `load`."""
    with _open_checked(path) as (_, body):
        return body.user


def _checked_user(user: Any) -> dict[str, Any]:
    """The object as a file keeps it. Raises ValueError as `save`, for one that would not be read back."""
    user = {} if user is None else user
    try:
        if isinstance(user, dict) and _has_text_keys(user):
            json.dumps(user)
            return user
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"user cannot be written as JSON: {error}; convert it, or leave it out") from error
    raise ValueError(f"user must be a dict with texts as keys, as JSON has them, got {user!r:.100}")


def _has_text_keys(value: Any) -> bool:
    """Whether all keys of dicts within a value are texts; JSON would make texts of others, and some of them one key."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_has_text_keys, value.values()))
    return all(map(_has_text_keys, value)) if isinstance(value, list | tuple) else True


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The path and the array of every leaf. Raises ValueError as `save`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, BipolarNumbers))
    for keys, leaf in leaves:
        key_names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        if any("/" in key_name for key_name in key_names):
            raise ValueError(f"keys {key_names} contain '/', which separates keys in the file: rename the key")
        name = "/".join(key_names)
        if keys and ("" in key_names or name == "__metadata__"):
            raise ValueError(f"keys {key_names} cannot be a tensor name in a safetensors file: rename the key")
        if len(name) > MOST_NAME_CHARACTERS - max(len(f".{field}") for field in FIELDS):
            raise ValueError(f"keys {key_names!r:.100} make a path of {len(name):,} characters: rename them")
        if isinstance(leaf, BlockScaledArray):
            leaf = leaf.with_scales()
        if isinstance(leaf, BipolarNumbers) and not isinstance(leaf, BipolarArray):
            layout = "unpacked" if isinstance(leaf, UnpackedArray) else "laid out"
            raise ValueError(f"{name} is {layout} for inference: save the model as it was before it was prepared")
        if not isinstance(leaf, BipolarArray | jax.Array | np.ndarray):
            raise ValueError(
                f"{name or 'the tree'} is a {type(leaf).__name__}, not an array: convert it or leave it out"
            )
        if not isinstance(leaf, BipolarArray) and leaf.dtype.name not in _DTYPES:
            is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            remedy = "leave it out, or store its jax.random.key_data" if is_key else "cast it"
            raise ValueError(
                f"{name or 'the tree'} has dtype {leaf.dtype.name}, packed files hold {', '.join(_DTYPES)}: {remedy}"
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
def _open_checked(path: str | os.PathLike[str]) -> Iterator[tuple[SafetensorsReader, Body]]:
    """Yields the open file and its checked metadata; the errors that damage raises in the block name the file."""
    require("safetensors", "models")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no packed checkpoint at {path}")
    try:
        with SafetensorsReader(path) as file:
            yield file, read_body(path, file.metadata, set(file.tensors))
    except ChecksumError as error:
        raise ValueError(f"{path} is corrupted: {error} does not match its checksum; copy it again") from error
    except (SafetensorsError, KeyError) as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}): copy or write it again") from error
