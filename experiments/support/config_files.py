"""Config files of the programs: found by path or by the name of a shipped one, loaded, described."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

# Beside `experiments`, in a checkout as in an installed package.
SHIPPED = Path(__file__).resolve().parents[2] / "configs"
_PACKAGE = "config_files"


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A loaded config file.

    Attributes:
      path: the file.
      config: what its get_config() returned.
      comments: field -> the comment above its assignment, for the fields that have one.
    """

    path: Path
    config: ConfigDict
    comments: dict[str, str]

    def fields(self) -> dict[str, Any]:
        """Dotted names and values of all fields; an empty section is a field as well."""
        return dict(_flatten(self.config))

    def check_field(self, field: str) -> None:
        """Raises ValueError, with the nearest names, unless the config has this field (or section)."""
        names = list(self.fields())
        plain = re.sub(r"\[.*", "", field)  # rules[0] is an item of rules
        if plain in names or any(name.startswith(f"{plain}.") for name in names):
            return
        similar = _similar(plain, names)
        hint = f"did you mean {similar}?" if similar else f"it has {', '.join(names)}"
        raise ValueError(f"{self.path} has no field {plain!r}: {hint}")


def load_config(name: str) -> ConfigFile:
    """Loads a config.

    Args:
      name: path of a Python file with get_config(), or the name of a shipped config ("smollm2"). What follows a
        colon is passed to get_config.

    Raises:
      FileNotFoundError: neither a file nor a shipped config.
      ValueError: the file cannot be executed, or does not return a ConfigDict.
    """
    path, argument = _find(name)
    module = _execute(path)
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"{path} has no get_config(): {_choices()}")
    try:
        config = module.get_config(*argument)
    except Exception as error:
        raise ValueError(f"get_config() of {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of {path} returned {type(config).__name__}, not an ml_collections.ConfigDict")
    return ConfigFile(path, config, _comments(module))


def shipped_names() -> list[str]:
    """Names of the configs that come with the programs."""
    files = (path for path in sorted(SHIPPED.rglob("*.py")) if "\ndef get_config(" in path.read_text())
    return [path.relative_to(SHIPPED).with_suffix("").as_posix() for path in files]


def _find(name: str) -> tuple[Path, list[str]]:
    for text, argument in ((name, []), (name.partition(":")[0], [name.partition(":")[2]])):
        for path in (Path(text), SHIPPED / f"{text}.py"):
            if text and path.is_file():
                return path, argument
    if Path(name).is_dir():
        raise FileNotFoundError(f"the config {name} is a folder: {_choices()}")
    similar = _similar(Path(name).stem, shipped_names())
    raise FileNotFoundError(f"no config at {name}: {f'did you mean {similar}?' if similar else _choices()}")


def _choices() -> str:
    return f"give a Python file with get_config(), or one of {', '.join(shipped_names())}"


def _similar(name: str, known: list[str]) -> str:
    """Up to three known names that are spelt alike, or whose last part is; "" if there are none."""
    ends = {full.rpartition(".")[2]: full for full in known}
    found = difflib.get_close_matches(name, known, 3, 0.6)
    found += [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, 2, 0.6)]
    return " or ".join(list(dict.fromkeys(found))[:3])


def _execute(path: Path) -> types.ModuleType:
    """Runs the file as a module of a package that also holds its neighbours and the shipped configs.

    So that `from .tiny_base import tiny_config` works in a copy of a config, wherever it lies.
    """
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(path.resolve().parent), str(SHIPPED)]
    for stale in [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]:
        del sys.modules[stale]
    sys.modules[_PACKAGE] = package
    spec = importlib.util.spec_from_file_location(f"{_PACKAGE}.config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: {_choices()}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} is not a config: {type(error).__name__}: {error}") from error
    return module


def _flatten(config: ConfigDict, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _comments(module: types.ModuleType) -> dict[str, str]:
    """Comments above `config.NAME = ...`, in the file and in those that its functions come from."""
    files = {value.__code__.co_filename for value in vars(module).values() if isinstance(value, types.FunctionType)}
    comments: dict[str, str] = {}
    for file in sorted(files, key=lambda file: file == module.__file__):  # the file's own comments win
        above: list[str] = []
        for line in Path(file).read_text().splitlines():
            text = line.strip()
            if text.startswith("#"):
                above.append(text.lstrip("# "))
                continue
            if (match := re.match(r"config\.([\w.]+) = ", text)) and above:
                comments[match[1]] = " ".join(above)
            above = []
    return comments
