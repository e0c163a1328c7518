"""A folder with the packed layers of the blocks that are finished, from which a stopped calibration resumes.

    FOLDER/block_00000.safetensors   packed arrays by their paths within the block, see `bipolar_jax.save`

Each file appears whole or not at all, and says what it was calibrated with.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bipolar_jax.checkpoint import load, read_user, save
from bipolar_jax.packing import BipolarArray

_FINGERPRINT = "calibration"


class LayerStore:
    """Packed layers of finished blocks in a folder.

    Attributes:
      folder: where they are; made if there is none.
      fingerprint: what the layers depend on, by name; JSON.

    Raises:
      ValueError: the folder is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the store {self.folder} is a file: give a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = dict(fingerprint)

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.folder / f"block_{block:05d}.safetensors"

    def read(self, block: int) -> dict[str, BipolarArray] | None:
        """The packed layers of a block by their paths; None if it is not finished.

        Raises:
          ValueError: the file is damaged, or the block was calibrated with something else.
        """
        path = self.path(block)
        if not path.is_file():
            return None
        found = read_user(path).get(_FINGERPRINT)
        if found != self.fingerprint:
            found = found if isinstance(found, dict) else {}
            names = [name for name, value in self.fingerprint.items() if found.get(name) != value]
            raise ValueError(
                f"{path} was calibrated with other values of {', '.join(names) or 'unknown origin'}: "
                "give another folder, or delete it"
            )
        return _flat(load(path))

    def write(self, block: int, layers: Mapping[str, BipolarArray]) -> None:
        """Writes the packed layers of a block."""
        tree: dict[str, Any] = {}
        for path, array in layers.items():
            *parents, name = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = array
        save(self.path(block), tree, {_FINGERPRINT: self.fingerprint})


def digest_of_model(model: nnx.Module) -> str:
    """SHA-256 of the paths, dtypes, shapes and bytes of all arrays of a model, its `config` and its layers' precisions.

    The state of random streams is left out, and so are addresses of functions and objects, which no other process has.
    """
    digest = hashlib.sha256(_without_addresses(repr(getattr(model, "config", None))).encode())
    for path, module in nnx.iter_modules(model):
        described = repr((path, type(module).__name__, str(getattr(module, "precision", None))))
        digest.update(_without_addresses(described).encode())
    for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        for leaf in jax.tree.leaves(variable.get_value()):
            digest.update(repr(keys).encode())
            digest.update(digest_of_arrays(leaf).encode())
    return digest.hexdigest()


def _without_addresses(text: str) -> str:
    """The text of a repr without addresses, as in "<function gelu at 0x7f24ccca9580>"."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def digest_of_arrays(arrays: Any) -> str:
    """SHA-256 of the dtypes, shapes and bytes of an array or a pytree of arrays."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        array = np.asarray(array, order="C")
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, BipolarArray]:
    flat = {}
    for name, node in tree.items():
        flat |= _flat(node, f"{prefix}{name}/") if isinstance(node, dict) else {f"{prefix}{name}": node}
    return flat
