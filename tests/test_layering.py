"""Imports point down: between the parts of the package, between the rooms of a part, and to JAX's public names."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.support.imports import PACKAGE, code_files, imported_names, imports_of, is_within, module_of, package_files

# What each part of the package may import of the package, besides itself.
BELOW = {
    "commands": set(),
    "extras": set(),
    "format": set(),
    "quantize": {"format"},
    "packing": {"format", "quantize"},
    "tuning": set(),
    "kernels": {"format", "quantize", "packing", "tuning"},
    "ops": {"format", "quantize", "packing", "kernels"},
    "nn": {"format", "quantize", "packing", "ops"},
    "interop": {"format", "quantize", "packing", "nn", "extras"},
    "checkpoint": {"format", "quantize", "packing", "extras"},
    "compress": {"format", "quantize", "packing", "kernels", "ops", "nn", "checkpoint"},
    "models": {"format", "quantize", "packing", "kernels", "ops", "nn", "compress", "checkpoint", "extras"},
}
# Packages whose modules and rooms stand on floors, the top one first: each imports only what stands below it.
FLOORS = {
    "bipolar_jax.kernels.sm90": (
        "entry",
        "projections",
        "backend",
        "decode_step",
        "decode_attention",
        "gemm_few_tokens",
        "weight_only",
        "prepared_few_tokens",
        "gemm_expanded",
        "gemm",
        "weight_prep",
        "quantize_rows",
        "prepared_weights",
        "arithmetic",
        "core",
    ),
    "bipolar_jax.nn": ("convert", "layers", "training", "compressible"),
    "bipolar_jax.compress": (
        "distillation",
        "allocation",
        "calibrate",
        "activation_spans",
        "whole_model",
        "block_programs",
        "reconstruction",
        "packed_sites",
        "rounded_layers",
        "layer_store",
        "smoothing",
        "expert_moments",
        "site_inputs",
        "hessians",
        "rounding",
        "rotations",
        "programs",
    ),
    "bipolar_jax.models": (
        "sharding",
        "exporters",
        "loaders",
        "inference",
        "random_weights",
        "checkpoint",
        "assemble",
        "packed_kernels",
        "pretrained",
        "chat",
        "presets",
        "transformer",
        "compressible_blocks",
        "blocks",
        "kv_cache",
        "tokenizer_json",
        "tokenizer_limits",
        "chat",
        "config",
        "expert_config",
    ),
}
BACKENDS = ("reference", "sm90", "xla")
OUTSIDE = ("experiments", "configs", "tests")
# The kernels of a backend are reached through `ops`, which chooses the backend.
BEHIND_OPS = [f"bipolar_jax.kernels.{backend}" for backend in BACKENDS]
# Changes without notice from one version of JAX to the next.
PRIVATE_JAX = ("jax._src", "jaxlib.mlir", "jaxlib.mosaic", "jax.experimental.mosaic", "jax.lib", "jax.interpreters")
USES_PRIVATE_JAX = (
    "bipolar_jax.kernels.sm90.core",
    "experiments.support.timing",  # JAX times single kernels nowhere else
    "tests.support.interpreter",
)


def violations(module: str, names: Iterable[str]) -> list[str]:
    """Those of the names that a module of the package may not import."""
    return [name for name in names if not _may_import(module, name)]


def _may_import(module: str, name: str) -> bool:
    if name.split(".")[0] in OUTSIDE:
        return False
    if not is_within(name, "bipolar_jax") or module == "bipolar_jax":
        return True
    part, imported_part = _child("bipolar_jax", module), _child("bipolar_jax", name)
    if part != imported_part and imported_part not in BELOW[part]:
        return False
    if part in ("nn", "compress", "models") and any(is_within(name, backend) for backend in BEHIND_OPS):
        return False
    backends = {_child("bipolar_jax.kernels", each) for each in (module, name)}
    if len(backends) == 2 and backends <= set(BACKENDS):
        return False
    return all(_points_down(module, name, package, floors) for package, floors in FLOORS.items())


def _points_down(module: str, name: str, package: str, floors: tuple[str, ...]) -> bool:
    upper, lower = _child(package, module), _child(package, name)
    if not upper or upper == lower or not is_within(name, package):
        return True  # the package's own __init__ may import all of it
    return lower in floors and floors.index(upper) < floors.index(lower)


def _child(package: str, name: str) -> str:
    """The part of a package that a name is in; "" for the package itself, and for what is not in it."""
    return name.removeprefix(f"{package}.").split(".")[0] if name.startswith(f"{package}.") else ""


@pytest.mark.parametrize("path", package_files(), ids=module_of)
def test_imports_point_down(path):
    assert violations(module_of(path), imports_of(path)) == []


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package):
    names = {_child(package, module_of(path)) for path in package_files()} - {""}
    assert names == set(FLOORS[package])


def test_the_walk_sees_every_part_and_its_imports():
    modules = {module_of(path) for path in package_files()}
    assert {_child("bipolar_jax", module) for module in modules} == {"", *BELOW}
    assert {f"bipolar_jax.kernels.{backend}.matmul" for backend in ("reference", "xla")} <= modules
    assert "bipolar_jax.ops.matmul" in imports_of(PACKAGE / "nn" / "layers" / "linear.py")


def private_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if any(is_within(name, private) for private in PRIVATE_JAX)]


def test_private_jax_is_used_in_few_places():
    users = {module_of(path): private_names(imports_of(path)) for path in code_files()}
    users = {module: names for module, names in users.items() if names}
    assert {m: n for m, n in users.items() if not any(is_within(m, allowed) for allowed in USES_PRIVATE_JAX)} == {}
    assert all(any(is_within(module, allowed) for module in users) for allowed in USES_PRIVATE_JAX)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bipolar_jax.format.bipolar_format", "import bipolar_jax.quantize"),
        ("bipolar_jax.quantize.rounding", "from bipolar_jax import packing"),
        ("bipolar_jax.quantize.rounding", "from bipolar_jax import quantize_model"),
        ("bipolar_jax.packing.pack", "from bipolar_jax.kernels.xla import integer_matmul"),
        ("bipolar_jax.kernels.xla.matmul", "from bipolar_jax.kernels.reference import matmul"),
        ("bipolar_jax.kernels.xla.matmul", "from ..reference import matmul"),
        ("bipolar_jax.kernels.reference.matmul", "from bipolar_jax.kernels import xla"),
        ("bipolar_jax.kernels.sm90.core.ptx", "from bipolar_jax.kernels.sm90.arithmetic import recovery"),
        ("bipolar_jax.kernels.sm90.gemm.launch", "from bipolar_jax.kernels.sm90.projections import signs"),
        ("bipolar_jax.kernels.sm90.gemm.launch", "from bipolar_jax.kernels.sm90 import backend"),
        ("bipolar_jax.kernels.sm90.gemm.launch", "from bipolar_jax.kernels.sm90 import integer_matmul"),
        ("bipolar_jax.ops.matmul", "def f():\n    from bipolar_jax.nn import Linear"),
        ("bipolar_jax.nn.layers.linear", "from bipolar_jax.checkpoint import save"),
        ("bipolar_jax.nn.layers.linear", "from bipolar_jax.nn.convert import quantize_model"),
        ("bipolar_jax.nn.layers.linear", "from bipolar_jax.kernels import semantics"),
        ("bipolar_jax.models.blocks.attention", "from bipolar_jax.kernels.sm90.decode_attention import launch"),
        ("bipolar_jax.models.blocks.attention", "from bipolar_jax.models.inference import generate"),
        ("bipolar_jax.checkpoint.packed_file", "if True:\n    from bipolar_jax import ops"),
        ("bipolar_jax.models.config", "import experiments.support.fetch"),
        ("bipolar_jax.models.config", "from configs import tiny"),
        ("bipolar_jax.models.config", "from tests import conftest"),
        ("bipolar_jax.extras", "from bipolar_jax import format"),
        ("bipolar_jax", "import experiments"),
    ],
)
def test_a_planted_violation_is_caught(module, source):
    assert violations(module, imported_names(source, module)) != []


@pytest.mark.parametrize(
    "source", ["import jax._src.core", "from jaxlib.mlir import ir", "from jax.lib import xla_bridge"]
)
def test_planted_private_jax_is_caught(source):
    assert private_names(imported_names(source, "bipolar_jax.ops")) != []


def test_relative_imports_of_a_package_are_resolved():
    source = "from . import matmul\nfrom ..ops import dispatch"
    assert list(imported_names(source, "bipolar_jax.nn", is_package=True)) == [
        "bipolar_jax.nn.matmul",
        "bipolar_jax.ops.dispatch",
    ]
    assert violations("bipolar_jax.quantize", imported_names("from ..ops import dispatch", "bipolar_jax.quantize.x"))
