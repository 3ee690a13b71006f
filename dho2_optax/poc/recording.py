"""What every update of every run measures, written while it runs: in a file of JSON lines, or for TensorBoard."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dho2_optax.poc import system
from dho2_optax.poc.results import Row
from dho2_optax.writers import JSONLines, TensorBoard

__all__ = ["Record", "RecordError", "Recorder"]

Record = Callable[[int, Mapping[str, float]], None]
"""Takes the number of an update and what it measured."""


class RecordError(OSError):
    """What was measured cannot be written; the message names the file or folder and says why."""


class Recorder:
    """Writes to a file, to a folder for TensorBoard, to both or, in all processes but the first, to neither.

    Args:
      file: of JSON lines, for all runs; each line says of which it is. None: no file.
      folder: for TensorBoard, with a folder in it for each run. None: no folder.
      resume: go on with what is there, of which steps that were not in a checkpoint come a second time. False: replace
        it.

    Raises:
      OSError: the file cannot be written.
    """

    def __init__(self, file: Path | None, folder: Path | None, *, resume: bool = False) -> None:
        """Opens the file."""
        self._file = file
        self._lines = None if file is None else JSONLines(file, append=resume)
        self._folder = folder
        self._resume = resume

    @contextlib.contextmanager
    def of(self, row: Row, name: str, *, tuning: bool) -> Iterator[Record]:
        """What writes the updates of a run, of a name that no other run has; raises a `RecordError` if it cannot."""
        run = {"task": row.task, "optimizer": row.optimizer, "devices": row.devices}
        run |= {"learning_rate": row.learning_rate, "seed": row.seed, "tuning": tuning}
        board: TensorBoard | None = None

        def record(step: int, values: Mapping[str, float]) -> None:
            nonlocal board
            if self._lines is not None:
                with _named(self._file):
                    self._lines.write(step, run | dict(values))
            if self._folder is None:
                return
            with _named(self._folder):
                if board is None:
                    board = self._board(self._folder / name, step)
                board.write(step, values)

        try:
            yield record
        finally:
            if board is not None:
                board.close()

    def _board(self, folder: Path, step: int) -> TensorBoard:
        if self._resume:
            return TensorBoard(folder, from_step=step)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        return TensorBoard(folder)

    def close(self) -> None:
        """Closes the file; raises a `RecordError` if what is left cannot be written."""
        if self._lines is not None:
            with _named(self._file):
                self._lines.close()


@contextlib.contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Turns an error of the system, which does not name what it was writing, into one that does."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {system.reason(error)}") from error
