"""Checkpoints of a run, by Orbax: written beside the training, read on the devices that are left.

Of several processes each writes the part that it has, into a folder that all see, and each reads the whole.
"""

import contextlib
import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dho2_optax.poc import processes, system

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints"]


_REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message names it and says why."""


class Checkpoint(NamedTuple):
    """What is left of a run."""

    arrays: Any  # on the host, in plain lists and dicts
    measured: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a folder of their own, of which the newest is kept.

    Orbax writes them in the background, each under another name until it is complete. So a run that is killed, at
    whatever moment, leaves the last one. Several processes call all methods together.
    """

    def __init__(self, folder: Path, every: float) -> None:
        """Checkpoints in `folder`, which need not exist, every so many seconds."""
        self._folder = folder
        self._every = every
        self._manager: Any = None
        self._last = time.monotonic()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, if there is one.

        Raises:
          CheckpointError: it cannot be read.
        """
        if not self._folder.exists():
            return None
        ocp, manager = _orbax(), self._open()
        step = manager.latest_step()
        if step is None:
            return None
        try:
            shapes = manager.item_metadata(step).arrays
            # As arrays of numpy: the devices of which they were need not be there.
            host = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
            restored = manager.restore(
                step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(host), measured=ocp.args.JsonRestore())
            )
        except Exception as error:
            raise CheckpointError(f"{self._folder / str(step)} cannot be read: {system.describe(error)}") from error
        return Checkpoint(restored.arrays, restored.measured)

    def is_due(self) -> bool:
        """Whether it is time for the next, by the clock of this process."""
        return time.monotonic() - self._last >= self._every

    def save(self, step: int, arrays: Any, measured: dict[str, Any]) -> None:
        """Copy what is to be saved, and write it in the background.

        Raises:
          CheckpointError: this one or the one before cannot be written.
        """
        ocp = _orbax()
        arrays = jax.tree.map(lambda x: x if x.size else None, arrays)  # it saves none without numbers
        with self._explained():
            self._open().save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),  # pyright: ignore[reportCallIssue]
                    measured=ocp.args.JsonSave(measured),  # pyright: ignore[reportCallIssue]
                ),
            )
        self._last = time.monotonic()

    def close(self) -> None:
        """Wait until all is written.

        Raises:
          CheckpointError: it cannot be.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._explained():
                try:
                    manager.wait_until_finished()
                finally:
                    manager.close()

    def discard(self) -> None:
        """Delete all of them: the run is over."""
        self.close()
        if processes.is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self) -> Any:
        if self._manager is None:
            ocp = _orbax()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._folder.absolute(),
                # Of a save that was cut off its own folder is left, under another name.
                options=ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True),
                item_handlers={"arrays": ocp.StandardCheckpointHandler(), "measured": ocp.JsonCheckpointHandler()},
            )
        return self._manager

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever Orbax raises into a `CheckpointError` of one line."""
        try:
            yield
        except Exception as error:
            processes.check(error)
            text = str(error)
            reasons = (os.strerror(number) for number in _REASONS)
            why = next((reason for reason in reasons if reason in text), system.describe(error))
            raise CheckpointError(f"a checkpoint in {self._folder} cannot be written: {why}") from error


def _orbax() -> Any:
    """Orbax, imported where it is needed. What is said of a failure besides, its exceptions say."""
    import orbax.checkpoint

    for name in ("absl", "asyncio"):  # asyncio tells of writes that fail beside the one whose exception is raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _WithoutOrphans):
        sys.unraisablehook = _WithoutOrphans(sys.unraisablehook)
    return orbax.checkpoint


class _WithoutOrphans:
    """Shows exceptions that nobody can handle, but those of writes that end after one beside them has failed."""

    def __init__(self, show: Callable[[Any], object]) -> None:
        self._show = show

    def __call__(self, unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            self._show(unraisable)
