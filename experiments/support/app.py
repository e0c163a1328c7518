"""The command line of every program: flags, help, lists of names in configs, errors of one line."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from ..distributed.launcher import REMEDY, is_launched, launch, leave
from ..distributed.processes import Processes, has_lost_peers
from .config_files import ConfigFile, load_config, shipped_names
from .progress import console

_HELP = re.compile(r"-h|--?help(full|short)?")
_INTERRUPTED = 130  # as shells count SIGINT
_HELP_OF_PROCESSES = (
    "  --coordinator=HOST:PORT --processes=COUNT --process=INDEX: one of several processes on one mesh, all started by",
    "      this command but for INDEX. HOST is that of process 0, which alone writes files.",
)


def run(
    main: Callable[[ConfigDict, Path | None], None],
    workdir_required: bool = True,
    example: str | None = None,
    argv: Sequence[str] | None = None,
    several_processes: bool = False,
) -> None:
    """Parses --config and --workdir and calls main(config, workdir).

    Errors in the input (flags, ValueError, a missing file or package, a full disk, a failed download) end the program
    with status 1 and one line without a traceback; Ctrl-C ends it with status 130. Of several processes so does the
    loss of a peer.

    Args:
      main: the program; the docstring of its module is the help.
      workdir_required: whether --workdir must be given; main gets None without it.
      example: config whose fields --help lists if no --config is given.
      argv: the command line; None is that of the process.
      several_processes: whether the program takes --coordinator, --processes and --process.
    """
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # hides notes on absent backends
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs each step of writing a checkpoint
    argv = list(sys.argv if argv is None else argv)
    joined = None
    try:
        if any(_HELP.fullmatch(argument) for argument in argv[1:]):
            print(_help(sys.modules[main.__module__].__doc__ or "", argv, workdir_required, example, several_processes))
            return
        config, workdir, processes = _parse(argv, workdir_required, several_processes)
        if processes is not None:
            if not is_launched():
                sys.exit(launch(processes))
            joined = processes
            joined.join()
            console.quiet = joined.index > 0
        main(config, workdir)
        if joined is not None:
            jax.distributed.shutdown()  # waits for the others
    except (Exception, KeyboardInterrupt) as error:
        message = _message(error)
        status = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        if joined is not None:
            if has_lost_peers(error):
                message = f"error: {joined} lost its peers ({_first_line(error)}); {REMEDY}"
            leave(message or traceback.format_exc(), status)
        if message is None:
            raise
        if status == 1:
            sys.exit(message)
        print(message, file=sys.stderr)
        sys.exit(status)


def _message(error: BaseException) -> str | None:
    """The line that an error ends the program with; None for one that is not of the input."""
    if isinstance(error, KeyboardInterrupt):
        return " ".join(map(str, error.args)) or "interrupted"
    # JAX raises subclasses of RuntimeError: they keep their traceback.
    of_input = isinstance(error, ValueError | OSError | ModuleNotFoundError | flags.Error)
    return _one_line(error) if of_input or type(error) is RuntimeError else None


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


def check_workdir(workdir: Path) -> None:
    """Raises OSError unless the folder exists, or can be made, and can be written to."""
    existing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--workdir={workdir}: {existing} is a file, give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir}: {existing} cannot be written to, give another folder")


def _parse(
    argv: list[str], workdir_required: bool, several_processes: bool
) -> tuple[ConfigDict, Path | None, Processes | None]:
    """Reads the flags, all of which are checked before any work starts."""
    name, rest = _take_config(argv)
    if not name:
        raise ValueError(f"--config is missing: give a Python file with get_config(), or one of {_shipped()}")
    loaded = load_config(name)
    for argument in rest[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            loaded.check_field(match[1])
    values = flags.FlagValues()
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    coordinator = flags.DEFINE_string("coordinator", None, "", flag_values=values)
    count = flags.DEFINE_integer("processes", 1, "", flag_values=values)
    index = flags.DEFINE_integer("process", None, "", flag_values=values)
    try:
        config = config_flags.DEFINE_config_dict("config", loaded.config, flag_values=values, sys_argv=rest)
        unexpected = values(rest)[1:]
    except (LookupError, TypeError, AttributeError) as error:  # a value or an index that the field does not take
        raise ValueError(f"{loaded.path} and the command line do not agree: {error}") from error
    if unexpected:
        raise ValueError(f"unexpected arguments: {' '.join(unexpected)}")
    processes = _processes(coordinator.value, count.value, index.value, several_processes)
    if not workdir.value:
        if workdir_required:
            raise ValueError("--workdir is missing: give a folder for results, from which a stopped run resumes")
        return config.value, None, processes
    check_workdir(Path(workdir.value))
    return config.value, Path(workdir.value), processes


def _processes(coordinator: str | None, count: int, index: int | None, are_served: bool) -> Processes | None:
    """This process among the others; None if it is alone."""
    if coordinator is None and count == 1 and index is None:
        return None
    if not are_served:
        raise ValueError("this program runs in one process: leave out --coordinator, --processes and --process")
    if coordinator is None or index is None:
        raise ValueError(
            "several processes need all of --coordinator=HOST:PORT (of process 0), --processes=COUNT and "
            "--process=INDEX (from 0), each process with an index of its own"
        )
    return Processes(coordinator, count, index)


def _take_config(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --config, and the other arguments."""
    name, rest = "", []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            name = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return name, rest


def _help(about: str, argv: list[str], workdir_required: bool, example: str | None, several_processes: bool) -> str:
    workdir = "--workdir=DIR" if workdir_required else "[--workdir=DIR]"
    lines = [
        about.strip(),
        "",
        f"usage: {Path(argv[0]).name} --config=CONFIG {workdir} [--config.FIELD=VALUE ...]",
        "",
        f"  --config: a Python file with get_config(), or one of {_shipped()}.",
        "  --workdir: folder for results; a stopped run resumes from it.",
        "  --config.FIELD: another value for a field of the config.",
        *(_HELP_OF_PROCESSES if several_processes else []),
        "",
    ]
    name = _take_config(argv)[0] or example
    return "\n".join(
        [*lines, *(_describe(load_config(name)) if name else ["--config=CONFIG --help lists its fields."])]
    )


def _describe(loaded: ConfigFile) -> Iterable[str]:
    yield f"fields of {loaded.path} and their defaults:"
    for field, value in loaded.fields().items():
        yield f"  --config.{field}={value.to_dict() if isinstance(value, ConfigDict) else repr(value)}"
        if field in loaded.comments:
            yield textwrap.fill(loaded.comments[field], 110, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _shipped() -> str:
    return ", ".join(shipped_names())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _one_line(error: Exception) -> str:
    return "error: " + (" ".join(str(error).split()) or type(error).__name__)
