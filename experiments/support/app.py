"""What every experiment's command line shares: flags, and errors of one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(); fields can be overridden.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for results; a run that was stopped goes on from there.")


def run(main: Callable[[ConfigDict, Path | None], None], workdir_required: bool = True) -> None:
    """Parses --config and --workdir and calls main(config, workdir).

    What is wrong with the input (a ValueError, a missing file or package, a failed
    download) ends the program with status 1 and its message alone.
    """
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # absl shows its notes on absent backends
    flags.mark_flags_as_required(["config", "workdir"] if workdir_required else ["config"])

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of writing a checkpoint
        try:
            main(_CONFIG.value, Path(_WORKDIR.value) if _WORKDIR.value else None)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            sys.exit(f"error: {error}")
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # JAX's own errors are subclasses: those keep their trace
                raise
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("interrupted")

    app.run(checked)
