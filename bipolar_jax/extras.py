"""Packages that the core does without."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional dependency.

    Raises:
      ModuleNotFoundError: it is not installed; says which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'bipolar_jax[{extra}]'", name=error.name
        ) from error
