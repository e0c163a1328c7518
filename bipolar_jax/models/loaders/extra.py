"""The optional libraries that read checkpoints."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(name: str) -> ModuleType:
    """Imports a module of the "models" extra.

    Raises:
      ImportError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"reading checkpoints needs {name.partition('.')[0]!r} ({error}): pip install 'bipolar_jax[models]'"
        ) from error
