"""compressed-tensors' transform_config: rotations of weights, and at run time (checked against its version 0.20.1).

Its groups apply a matrix at locations of layers. By the names of SpinQuant (arXiv 2405.16406), as llm-compressor writes
them:

- weight_input and weight_output (R1, R2, and the weights' part of R4): the stored weights are rotated already, so that
  nothing is left to do, whatever the matrix;
- input (R4): x becomes x H at run time. Served of the last layers of all feed-forward blocks, where H is Sylvester's
  matrix (type "hadamard") divided by the root of its size, in blocks of `head_dim` numbers or one of all;
- q_attn and k_cache (R3): the same matrix rotates queries and keys, which changes no score. Where it is Sylvester's,
  keys that are cached in 4 bits are rotated by it.

Files may hold the matrices of rotations at run time, as LAYER.GROUP_input.weight; these are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.loaders.huggingface.architecture import IN_LAYERS, Architecture
from bipolar_jax.models.loaders.huggingface.json_fields import Fields
from bipolar_jax.models.loaders.huggingface.quantized.targets import Targets
from bipolar_jax.models.loaders.huggingface.safetensors_files import SafetensorsFiles
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops import hadamard

_IN_WEIGHTS = ("weight_input", "weight_output")
_KEYS = ("q_attn", "k_cache")
_LOCATIONS = (*_IN_WEIGHTS, *_KEYS, "input", "output")
# Of the format, which knows no others.
_CONFIG_FIELDS = {"config_groups"}
_GROUP_FIELDS = {"type", "apply", "randomize", "requires_grad", "head_dim", "precision"}
_ENTRY_FIELDS = {"targets", "location", "inverse", "ignore"}
_DOWN = f"{IN_LAYERS}ffn/down_proj/kernel"
_LAYERS = (".weight", ".weight_packed")


@dataclasses.dataclass(frozen=True)
class InputRotation:
    """A rotation of layers' inputs at run time.

    Attributes:
      group: its name.
      targets, ignored: the layers.
      block: numbers of a block; None is one of all.
    """

    group: str
    targets: Targets
    ignored: Targets
    block: int | None


@dataclasses.dataclass(frozen=True)
class Transforms:
    """What a transform_config leaves to run time.

    Attributes:
      source: the file that states it.
      inputs: rotations of inputs.
      rotates_keys: whether queries and keys are rotated by Sylvester's matrix.
    """

    source: object
    inputs: tuple[InputRotation, ...] = ()
    rotates_keys: bool = False

    @classmethod
    def of(cls, fields: Fields) -> Transforms:
        """The transforms of a quantization_config.

        Raises:
          ValueError: one that is not served at run time, by its name; or a damaged one.
        """
        config = fields.nested("transform_config")
        _check_names(config, _CONFIG_FIELDS)
        groups = config.nested("config_groups")
        inputs: list[InputRotation] = []
        rotates_keys = False
        for name in groups.values:
            group = groups.nested(name)
            applied = group.get("apply", [])
            if not isinstance(applied, list) or not all(isinstance(each, dict) for each in applied):
                raise group.wrong("apply", applied, "a list of objects")
            entries = [Fields(each, fields.source) for each in applied]
            _check_names(group, _GROUP_FIELDS)
            for entry in entries:
                _check_names(entry, _ENTRY_FIELDS)
                if entry.get("location") not in _LOCATIONS:
                    raise entry.wrong("location", entry.get("location"), ", ".join(_LOCATIONS))
            sylvester = group.get("type") == "hadamard" and not group.flag("randomize", False)
            found = [entry for entry in entries if entry.get("location") == "input"]
            inputs += [_input_rotation(name, group, entry, sylvester=sylvester) for entry in found]
            if any(entry.get("location") == "output" for entry in entries):
                raise ValueError(f"{fields.source}: the transform {name!r:.60} rotates outputs of layers at run time")
            rotates_keys |= _rotates_keys(name, entries, fields) and sylvester
        if len(inputs) > 1:
            raise ValueError(f"{fields.source}: {len(inputs)} transforms rotate inputs of layers, expected one at most")
        return cls(fields.source, tuple(inputs), rotates_keys)

    def stores(self, name: str) -> bool:
        """Whether a tensor is a matrix of one of them."""
        return name.endswith(tuple(f".{each.group}_input.weight" for each in self.inputs))

    def applied(
        self, config: TransformerConfig, architecture: Architecture, files: SafetensorsFiles
    ) -> TransformerConfig:
        """The config with the rotations at run time.

        Raises:
          ValueError: rotations of other layers than the last ones of all feed-forward blocks, of sizes that do not
            divide or are no powers of two; another matrix in the files than Sylvester's.
        """
        if not self.inputs and not self.rotates_keys:
            return config
        ffn = keys = None
        for each in self.inputs:
            self._check_layers(each, config, architecture, files)
            block = config.ffn_size if each.block is None else each.block
            self._check_size(each.group, block, config.ffn_size)
            for name in filter(self.stores, files):
                _check_matrix(name, block, files)
            ffn = hadamard(config.ffn_size, block=block)
        if self.rotates_keys:
            self._check_size("of keys", config.head_dim, config.head_dim)
            keys = hadamard(config.head_dim)
        return dataclasses.replace(config, rotation=Rotation(ffn=ffn, keys=keys))

    def _check_size(self, group: str, block: int, size: int) -> None:
        if block & (block - 1) or size % block:
            raise ValueError(
                f"{self.source}: the transform {group!r:.60} rotates {size} numbers in blocks of {block}, which are no "
                "powers of two that divide them"
            )

    def _check_layers(
        self, each: InputRotation, config: TransformerConfig, architecture: Architecture, files: SafetensorsFiles
    ) -> None:
        found: dict[tuple[str, int], str] = {}
        for module in self._modules(files):
            if each.targets.match(module) and not each.ignored.match(module):
                for target in architecture.targets(f"{module}.weight", config.tie_embeddings):
                    found |= {(target.path, target.layer): module} if target.path.endswith("/kernel") else {}
        wanted = {(_DOWN, layer) for layer in range(config.num_layers)}
        if found.keys() != wanted:
            others = [module for key, module in found.items() if key not in wanted]
            which = f"of {others[0]!r:.200}" if others else f"of {len(found)} of {len(wanted)} blocks"
            raise ValueError(
                f"{self.source}: the transform {each.group!r:.60} rotates inputs {which} at run time: only those of "
                "the last layers of all feed-forward blocks (R4) are served"
            )

    def _modules(self, files: Iterable[str]) -> list[str]:
        names = (name for name in files if name.endswith(_LAYERS) and not self.stores(name))
        return [name.rpartition(".")[0] for name in names]


def _check_names(fields: Fields, known: set[str]) -> None:
    """Raises ValueError for a field of another name, which may say what is not computed."""
    if others := sorted(fields.values.keys() - known):
        raise ValueError(
            f"{fields.source} has a transform_config with a field {others[0]!r:.60}: its fields are {sorted(known)}"
        )


def _input_rotation(name: str, group: Fields, entry: Fields, *, sylvester: bool) -> InputRotation:
    if not sylvester:
        kind = group.get("type")
        raise ValueError(
            f"{group.source}: the transform {name!r:.60} of type {kind!r:.40} rotates inputs at run time by a matrix "
            'that is random or learned: only the type "hadamard" is served there, without randomize'
        )
    block = None if group.get("head_dim") is None else group.size("head_dim")
    return InputRotation(name, Targets.of(entry, "targets"), Targets.of(entry, "ignore", empty=True), block)


def _rotates_keys(name: str, entries: list[Fields], fields: Fields) -> bool:
    """Whether queries and keys are rotated, both alike. Raises ValueError if only one of them is, or in other ways."""
    of_query, of_keys = (
        [
            (entry.get("targets"), entry.get("ignore", []), entry.flag("inverse", False))
            for entry in entries
            if at(entry)
        ]
        for at in (lambda entry: entry.get("location") == "q_attn", lambda entry: entry.get("location") == "k_cache")
    )
    if of_query != of_keys:
        raise ValueError(
            f"{fields.source}: the transform {name!r:.60} rotates queries and keys in different ways, which changes "
            "their scores: only the same rotation of both (R3) is served"
        )
    return bool(of_query)


def _check_matrix(name: str, size: int, files: SafetensorsFiles) -> None:
    """Raises ValueError unless a stored matrix is Sylvester's of 1 and -1."""
    shape = files.shape(name)
    if shape != (size, size):
        raise ValueError(f"tensor {name!r:.200} has shape {list(shape)}, the config states blocks of {size}")
    columns = np.arange(size, dtype=np.uint32)
    for start, rows in files.rows(name, 0, size):
        index = np.arange(start, start + len(rows), dtype=np.uint32)[:, None]
        if not np.array_equal(rows, 1 - 2 * (np.bitwise_count(index & columns) & 1).astype(np.int32)):
            raise ValueError(f"tensor {name!r:.200} is another matrix than Sylvester's, which the config states")
