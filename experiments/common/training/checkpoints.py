"""Checkpoints of a training run: written aside, verified when read, never half.

Orbax writes each into a temporary folder, while training goes on, and renames it when
it is whole; one that was cut off is cleared away at the next start. The SHA-256 of what
was saved is stored with it, so that no damaged one is taken for whole.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class CheckpointError(Exception):
    """Checkpoints cannot be written, or not be read; the message says what to do."""


class Checkpoints:
    """The checkpoints in one folder, which belongs to one run.

    Every process makes all calls. The folder is on a file system that they share.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        digest: Callable[[Any], str],
        keep: int,
    ):
        """
        Args:
            folder: made if need be.
            settings: what must not change from one start of a run to the next.
            digest: of a state; equal for equal states.
            keep: how many of the newest remain.
        """
        self._folder = folder
        self._settings = settings
        self._digest = digest
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, examples: int) -> None:
        """Begins to save; waits first, if the last one is not on disk yet.

        Args:
            step: how many steps have been trained.
            state: a pytree of arrays; free to be donated once this returns.
            examples: how many have been consumed.
        """
        about = {
            "settings": self._settings,
            "examples": examples,
            "sha256": self._digest(state),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
        )
        self._manager.save(step, args=args, force=True)

    def begin(self, state: Any, *, resume: bool) -> tuple[Any, int]:
        """The state to begin with, and how many examples have been consumed by then.

        Args:
            state: the initial one.
            resume: whether to go on from the newest checkpoint, if there is one.

        Raises:
            CheckpointError: see `restore`; or there is one, but it is not wanted.
        """
        if self.newest() is None:
            return state, 0
        if not resume:
            raise CheckpointError(
                f"{self._folder} holds checkpoints up to step {self.newest()}: "
                "expected none. Write --resume to go on with that run, or name another "
                "folder by --out."
            )
        return self.restore(state)

    def restore(self, like: Any) -> tuple[Any, int]:
        """The newest state and the number of examples consumed.

        Args:
            like: a state of the same structure, shapes and shardings.

        Raises:
            CheckpointError: it is damaged, or of a run with other settings.
        """
        step = self.newest()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            about = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
            self._check(about["settings"])
            args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            state = self._manager.restore(step, args=args)["state"]
            received, expected = self._digest(state), about["sha256"]
            if received != expected:
                raise ValueError(f"the state has SHA-256 {received}, not {expected}")
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged file can lead to
            raise self._damaged(step, error) from error
        return state, about["examples"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()

    def _check(self, stored: dict[str, Any]) -> None:
        """Compares settings with those of the checkpoint."""
        if different := [
            f"{name}: received {self._settings.get(name)!r}, expected {value!r}"
            for name, value in stored.items()
            if self._settings.get(name) != value
        ]:
            raise CheckpointError(
                f"{self._folder} holds a run with other settings: "
                f"{'; '.join(different)}. Give the same to go on with it, or name "
                "another folder by --out."
            )

    def _damaged(self, step: int | None, error: Exception) -> CheckpointError:
        """Which checkpoint cannot be read, and how to do without it."""
        before = [s for s in self._manager.all_steps() if s != step]
        then = f"that of step {max(before)}" if before else "the beginning"
        reason = str(error).splitlines()[0][:300] if str(error) else repr(error)
        return CheckpointError(
            f"the checkpoint {self._folder / str(step)} cannot be read ({reason}): "
            "expected it as it was written; it is damaged, or comes from another "
            f"version of the code. Remove that folder, and the same command goes on "
            f"from {then}."
        )
