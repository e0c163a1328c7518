"""What the files of the repository import, read from their source: nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bipolar_jax"
CODE = tuple(ROOT / name for name in ("bipolar_jax", "experiments", "configs", "tests"))


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def code_files() -> list[Path]:
    return sorted(path for folder in CODE for path in folder.rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name of a file; a package's is that of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Dotted names of everything that a file imports anywhere, relative imports made absolute.

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


def imports_of(path: Path) -> list[str]:
    return list(imported_names(path.read_text(), module_of(path), is_package=path.name == "__init__.py"))


def is_within(name: str, package: str) -> bool:
    """Whether a dotted name is a package, or something in it."""
    return name == package or name.startswith(f"{package}.")


def closure(path: Path) -> set[Path]:
    """The file, and all files of the package that it imports, transitively."""
    files = {module_of(file): file for file in package_files()}
    found, remaining = set(), [path]
    while remaining:
        file = remaining.pop()
        if file in found:
            continue
        found.add(file)
        for name in imports_of(file):
            module = name if name in files else name.rpartition(".")[0]
            if module in files:
                remaining.append(files[module])
    return found
