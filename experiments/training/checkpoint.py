"""Checkpoints of a run in training: written whole or not at all, and refused where they are damaged or another's."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bipolar_jax.checkpoint.checksums import checksum
from experiments.support.workdir import differences
from experiments.training.step import TrainState

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Restored:
    """Where a run goes on.

    Attributes:
      step: updates made so far.
      state: parameters, optimizer and key.
      data: state of the iterator over batches.
    """

    step: int
    state: TrainState
    data: dict[str, Any]


class TrainingCheckpoints:
    """The last checkpoints of a run, in a folder of its workdir.

    Orbax writes each into a temporary folder and renames it when it is complete, so that
    a process that is killed leaves the one before. Their checksums are our own: a flipped
    bit in an array would otherwise be trained on.
    """

    def __init__(self, workdir: Path, settings: dict[str, Any], keep: int, asynchronous: bool):
        """Opens the folder; nothing in it is changed.

        Args:
          workdir: folder of the run.
          settings: what the run depends on; checkpoints of other settings are refused.
          keep: how many to keep.
          asynchronous: go on training while one is written.
        """
        self._folder = (workdir / FOLDER).absolute()
        self._settings = settings
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=asynchronous)
        handlers = {"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Writes what a run needs to go on after `step` updates."""
        # Copies: the next step takes the buffers over while these are written.
        arrays = {name: np.array(array) for name, array in _named(state).items()}
        about = {
            "settings": self._settings,
            "data": data,
            "checksums": {name: checksum(array) for name, array in arrays.items()},
        }
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        )

    def steps(self) -> list[int]:
        """Those there are, complete ones only."""
        return sorted(self._manager.all_steps())

    def restore(self, like: TrainState, step: int) -> Restored:
        """Reads the checkpoint of a step.

        Args:
          like: a state of the shapes and dtypes to expect.
          step: one of `steps`.

        Raises:
          ValueError: it is damaged, of other settings or of another model. Nothing is deleted.
        """
        about = self._about(step)
        expected = _named(like)
        if other := differences(about["settings"], self._settings):
            raise ValueError(
                f"{self._folder / str(step)} is of a run with other settings ({other}): choose another --workdir, or "
                "the settings it was begun with"
            )
        if set(about["checksums"]) != set(expected):
            different = sorted(set(about["checksums"]) ^ set(expected))
            raise ValueError(
                f"{self._folder / str(step)} is of another model or optimizer (they differ in {different[0]}): "
                "choose another --workdir"
            )
        template = {name: np.zeros(array.shape, array.dtype) for name, array in expected.items()}
        try:
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))[
                "state"
            ]
        except Exception as error:  # whatever its files hold
            _hush_unfinished_reads()
            raise self._damaged(step, error) from error
        for name, array in arrays.items():
            if array.shape != template[name].shape or array.dtype != template[name].dtype:
                raise ValueError(
                    f"{self._folder / str(step)} has {name} of {array.dtype}{list(array.shape)}, this run's model "
                    f"needs {template[name].dtype}{list(template[name].shape)}: choose another --workdir"
                )
            if checksum(np.asarray(array)) != about["checksums"][name]:
                raise self._damaged(step, f"the checksum of {name} is wrong")
        leaves = [jnp.asarray(arrays[name]) for name in expected]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), about["data"])

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _about(self, step: int) -> dict[str, Any]:
        try:
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            if not all(isinstance(about[name], dict) for name in ("settings", "data", "checksums")):
                raise TypeError("its facts are of another form")
        except Exception as error:
            raise self._damaged(step, error) from error
        return about

    def _damaged(self, step: int, problem: object) -> ValueError:
        before = [found for found in self.steps() if found < step]
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        return ValueError(
            f"checkpoint {self._folder / str(step)} is damaged or no checkpoint of this program ({reason[:200]}): move "
            f"it away to go on from {f'step {before[-1]}' if before else 'the beginning'}"
        )


def _named(state: TrainState) -> dict[str, Any]:
    """Leaves by the way to them, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _hush_unfinished_reads() -> None:
    """Keeps one error one line: where one array cannot be read, Orbax leaves the reads of the others, and each of
    them tells the terminal that nobody waits for it any more."""
    hook = sys.unraisablehook

    def quiet(found):
        if str(found.exc_value) != "Event loop is closed":
            hook(found)

    sys.unraisablehook = quiet
