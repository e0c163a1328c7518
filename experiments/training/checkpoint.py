"""Checkpoints of a training run: written atomically; damaged ones and those of another run are rejected."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from bipolar_jax.checkpoint.checksums import checksum
from bipolar_jax.packing.host_memory import on_host

from ..distributed.processes import array_from_first, from_first, is_first
from ..support.workdir import differences
from .checkpoint_files import ChecksummedPath, check_files
from .step import TrainState

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint.

    Attributes:
      step: number of updates made.
      state: parameters, optimizer state and PRNG key.
      data: state of the batch iterator.
    """

    step: int
    state: TrainState
    data: dict[str, Any]


class TrainingCheckpoints:
    """The latest checkpoints of a run, in a folder of its workdir.

    Orbax writes each into a temporary folder and renames it when complete, so a killed process
    leaves the previous one intact. Checksums of the arrays and of all files are added, which detect flipped bits.
    Arrays are stored whole, so that a run resumes on any mesh; of several processes, which all call these methods, the
    first reads and writes.
    """

    def __init__(self, workdir: Path, settings: dict[str, Any], keep: int, asynchronous: bool):
        """Opens the folder, and deletes temporaries of killed runs.

        Args:
          workdir: folder of the run.
          settings: settings that the losses depend on; checkpoints with other settings are rejected.
          keep: number of checkpoints to keep.
          asynchronous: write in the background while training continues.
        """
        logging.set_verbosity(logging.FATAL)  # what Orbax logs with a traceback is raised as well
        _ignore_abandoned_operations()
        self._folder = (workdir / FOLDER).absolute()
        self._settings = settings
        self._manager = None
        if not is_first():
            return
        # The others take no part: what a peer does must not decide whether a checkpoint is complete.
        alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="first")
        self._folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
            enable_async_checkpointing=asynchronous,
            cleanup_tmp_directories=True,
            temporary_path_class=ChecksummedPath,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Writes a checkpoint after `step` updates.

        Raises:
          OSError: it cannot be written, or the one that was being written in the background could not.
        """
        # Copies, because the next step donates the buffers while these are still being written.
        arrays = {name: np.array(on_host(array)) for name, array in _named(state).items()}
        if self._manager is None:
            return
        about = {
            "settings": self._settings,
            "data": data,
            "checksums": {name: checksum(array) for name, array in arrays.items()},
        }
        contents = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        with self._writing():
            self._manager.save(step, args=contents)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; none in processes other than the first."""
        return [] if self._manager is None else sorted(self._manager.all_steps())

    def last(self) -> int | None:
        """The step of the last complete checkpoint, the same in all processes."""
        return from_first(lambda: (self.steps() or [None])[-1])

    def restore(self, like: TrainState, step: int) -> Restored:
        """Reads the checkpoint of a step: arrays of the host, the same in all processes.

        Args:
          like: a state with the expected shapes and dtypes.
          step: one of `steps`.

        Raises:
          ValueError: it is damaged, or belongs to other settings or another model. Nothing is deleted.
        """
        expected = _named(like)
        arrays, data = (_zeros(expected), None) if self._manager is None else self._read(step, expected)
        data = from_first(lambda: data)
        leaves = [array_from_first(np.asarray(arrays[name])) for name in expected]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), data)

    def close(self) -> None:
        """Waits for pending writes. Raises OSError if one fails."""
        if self._manager is None:
            return
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises what goes wrong in Orbax, such as a full disk, as OSError with the system's message."""
        try:
            yield
        except Exception as error:  # TensorStore raises ValueError, the file system OSError
            lines = str(error).strip().splitlines() or [type(error).__name__]
            system = re.search(r": ([^:]+) \[os_error_code", str(error))
            complete = [step for step in self.steps() if (self._folder / str(step)).is_dir()]
            resumes = f"step {complete[-1]}" if complete else "the beginning"
            raise OSError(
                f"cannot write a checkpoint to {self._folder} ({system[1] if system else lines[0][:200]}): make room "
                f"and run the same command, which resumes from {resumes}"
            ) from error

    def _read(self, step: int, expected: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by name, and the state of the batch iterator. Raises ValueError as `restore`."""
        try:
            check_files(self._folder / str(step))
        except ValueError as error:
            raise self._damaged(step, error) from error
        about = self._about(step)
        if other := differences(about["settings"], self._settings):
            raise ValueError(
                f"{self._folder / str(step)} belongs to a run with other settings ({other}): choose another --workdir, "
                "or use the stored settings"
            )
        if set(about["checksums"]) != set(expected):
            different = sorted(set(about["checksums"]) ^ set(expected))
            raise ValueError(
                f"{self._folder / str(step)} belongs to another model or optimizer (they differ in {different[0]}): "
                "choose another --workdir"
            )
        template = _zeros(expected)
        try:
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))[
                "state"
            ]
        except Exception as error:  # damaged files raise many types
            raise self._damaged(step, error) from error
        for name, array in arrays.items():
            if array.shape != template[name].shape or array.dtype != template[name].dtype:
                raise ValueError(
                    f"{self._folder / str(step)} has {name} {array.dtype}{list(array.shape)}, this run's model "
                    f"needs {template[name].dtype}{list(template[name].shape)}: choose another --workdir"
                )
            if checksum(np.asarray(array)) != about["checksums"][name]:
                raise self._damaged(step, f"the checksum of {name} is wrong")
        return arrays, about["data"]

    def _about(self, step: int) -> dict[str, Any]:
        try:
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            if not all(isinstance(about[name], dict) for name in ("settings", "data", "checksums")):
                raise TypeError("its metadata has an unexpected form")
        except Exception as error:
            raise self._damaged(step, error) from error
        return about

    def _damaged(self, step: int, problem: object) -> ValueError:
        earlier = [other for other in self.steps() if other < step]
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        return ValueError(
            f"checkpoint {self._folder / str(step)} is damaged or not a checkpoint of this program ({reason[:200]}): "
            f"move it away to resume from {f'step {earlier[-1]}' if earlier else 'the beginning'}"
        )


def _named(state: TrainState) -> dict[str, Any]:
    """Leaves by their path in the tree, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _zeros(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.zeros(array.shape, array.dtype) for name, array in arrays.items()}


def _ignore_abandoned_operations() -> None:
    """Keeps errors to one line: after one failed read or write Orbax abandons the others, and each prints that its
    event loop is closed."""
    previous = sys.unraisablehook
    if getattr(previous, "ignores_closed_loops", False):
        return

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    hook.ignores_closed_loops = True
    sys.unraisablehook = hook
