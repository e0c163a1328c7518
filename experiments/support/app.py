"""The command line of every experiment: flags, lists of names in configs, errors of one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(); override fields with --config.NAME=VALUE."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results; a stopped run resumes from it.")


def run(main: Callable[[ConfigDict, Path | None], None], workdir_required: bool = True) -> None:
    """Parses --config and --workdir and calls main(config, workdir).

    Errors in the input (ValueError, a missing file or package, a failed download) end the
    program with status 1 and print their message without a traceback.

    Args:
      main: the experiment.
      workdir_required: whether --workdir must be given; main gets None without it.
    """
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # hides notes on absent backends
    flags.mark_flags_as_required(["config", "workdir"] if workdir_required else ["config"])

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs each step of writing a checkpoint
        try:
            main(_CONFIG.value, Path(_WORKDIR.value) if _WORKDIR.value else None)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            sys.exit(f"error: {error}")
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # JAX raises subclasses: keep their traceback
                raise
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("interrupted")

    app.run(checked)


def split_names(text: str) -> list[str]:
    """The names of a comma-separated list; "" has none."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_names(field: str, text: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated config field.

    Args:
      field: the field's name, for the error message.
      text: its value.
      known: allowed names.

    Raises:
      ValueError: a name that is not allowed.
    """
    names, known = split_names(text), list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"config.{field} names {', '.join(unknown)}: choose from {', '.join(known)}")
    return names
