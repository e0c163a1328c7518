"""Imports point down only, files are small, and the core needs no extra."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bipolar_jax"
MAX_LINES = 400

# What each part of the package may import of the package, besides itself.
BELOW = {
    "extras": set(),
    "format": set(),
    "quantize": {"format"},
    "packing": {"format", "quantize"},
    "tuning": set(),
    "kernels": {"format", "quantize", "packing", "tuning"},
    "ops": {"format", "quantize", "packing", "kernels"},
    "nn": {"format", "quantize", "packing", "kernels", "ops"},
    "checkpoint": {"format", "quantize", "packing", "extras"},
    "models": {"format", "quantize", "packing", "kernels", "ops", "nn", "checkpoint", "extras"},
}
OUTSIDE = {"experiments", "configs", "tests"}
OPTIONAL = (
    "safetensors",
    "gguf",
    "tokenizers",
    "ml_collections",
    "matplotlib",
    "grain",
    "tensorboardX",
)  # flax itself imports rich


def imported_modules(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names of everything a file imports anywhere, relative imports made absolute.

    `from a import b` gives a.b, since b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".") if is_package else module.split(".")[:-1]
                above = above[: len(above) - (node.level - 1)]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports of `module` that the order forbids."""
    _, part, *_ = *module.split("."), ""
    wrong = []
    for name in imported_modules(source, module, is_package=is_package):
        top, below, *_ = *name.split("."), ""
        backends = [n.split(".")[2] if n.startswith("bipolar_jax.kernels.") else "" for n in (module, name)]
        if (
            top in OUTSIDE
            or (part == "extras" and top == "bipolar_jax")
            or (part and top == "bipolar_jax" and below != part and below not in BELOW[part])
            or (backends[0] != backends[1] and set(backends) <= {"reference", "sm90", "xla"})
        ):
            wrong.append(name)
    return wrong


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


@pytest.mark.parametrize("path", package_files(), ids=lambda path: module_of(path))
def test_imports_point_down(path):
    assert violations(path.read_text(), module_of(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", package_files(), ids=lambda path: module_of(path))
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_the_walk_sees_every_part_and_its_imports():
    modules = {module_of(path) for path in package_files()}
    assert {module.split(".")[1] for module in modules if "." in module} == set(BELOW)
    assert {"bipolar_jax.kernels.reference.matmul", "bipolar_jax.kernels.xla.matmul"} <= modules
    linear = (PACKAGE / "nn" / "layers" / "linear.py").read_text()
    assert "bipolar_jax.ops.matmul" in set(imported_modules(linear, "bipolar_jax.nn.layers.linear", is_package=False))


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
        ("bipolar_jax.ops.matmul", "def f():\n    from bipolar_jax.nn import Linear"),
        ("bipolar_jax.nn.layers.linear", "from bipolar_jax.checkpoint import save"),
        ("bipolar_jax.checkpoint.packed_file", "if True:\n    from bipolar_jax import ops"),
        ("bipolar_jax.models.config", "import experiments.support.fetch"),
        ("bipolar_jax.models.config", "from configs import tiny"),
        ("bipolar_jax.models.config", "from tests import conftest"),
        ("bipolar_jax.extras", "from bipolar_jax import format"),
        ("bipolar_jax", "import experiments"),
    ],
)
def test_a_planted_violation_is_caught(module, source):
    assert violations(source, module) != []


def test_relative_imports_of_a_package_are_resolved():
    source = "from . import matmul\nfrom ..ops import dispatch"
    assert list(imported_modules(source, "bipolar_jax.nn", is_package=True)) == [
        "bipolar_jax.nn.matmul",
        "bipolar_jax.ops.dispatch",
    ]
    assert violations("from ..ops import dispatch", "bipolar_jax.quantize", is_package=True) != []


def test_importing_the_package_imports_no_optional_one():
    code = f"import sys, bipolar_jax; print([name for name in {OPTIONAL} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_missing_optional_package_names_the_extra_that_brings_it():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import bipolar_jax\n"
        "try:\n    bipolar_jax.load('nowhere')\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'bipolar_jax[models]'" in result.stdout
