"""Checkpoints of a training run: written atomically; damaged ones and those of another run are rejected."""

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

from ..support.workdir import differences
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
    leaves the previous one intact. Checksums of the arrays are added, which detect flipped bits.
    """

    def __init__(self, workdir: Path, settings: dict[str, Any], keep: int, asynchronous: bool):
        """Opens the folder and changes nothing in it.

        Args:
          workdir: folder of the run.
          settings: settings that the losses depend on; checkpoints with other settings are rejected.
          keep: number of checkpoints to keep.
          asynchronous: write in the background while training continues.
        """
        self._folder = (workdir / FOLDER).absolute()
        self._settings = settings
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=asynchronous)
        handlers = {"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Writes a checkpoint after `step` updates."""
        # Copies, because the next step donates the buffers while these are still being written.
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
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, like: TrainState, step: int) -> Restored:
        """Reads the checkpoint of a step.

        Args:
          like: a state with the expected shapes and dtypes.
          step: one of `steps`.

        Raises:
          ValueError: it is damaged, or belongs to other settings or another model. Nothing is deleted.
        """
        about = self._about(step)
        expected = _named(like)
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
        template = {name: np.zeros(array.shape, array.dtype) for name, array in expected.items()}
        try:
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))[
                "state"
            ]
        except Exception as error:  # damaged files raise many types
            _silence_unfinished_reads()
            raise self._damaged(step, error) from error
        for name, array in arrays.items():
            if array.shape != template[name].shape or array.dtype != template[name].dtype:
                raise ValueError(
                    f"{self._folder / str(step)} has {name} {array.dtype}{list(array.shape)}, this run's model "
                    f"needs {template[name].dtype}{list(template[name].shape)}: choose another --workdir"
                )
            if checksum(np.asarray(array)) != about["checksums"][name]:
                raise self._damaged(step, f"the checksum of {name} is wrong")
        leaves = [jnp.asarray(arrays[name]) for name in expected]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), about["data"])

    def close(self) -> None:
        """Waits for pending writes."""
        self._manager.wait_until_finished()
        self._manager.close()

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


def _silence_unfinished_reads() -> None:
    """Keeps the error to one line: after one failed read Orbax abandons the others, and each prints that its event
    loop is closed."""
    previous = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
