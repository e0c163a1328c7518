"""Imports of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
      module: the module's dotted name.
      extra: the extra of bipolar_jax that installs it.

    Raises:
      ModuleNotFoundError: the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'bipolar_jax[{extra}]'", name=error.name
        ) from error
