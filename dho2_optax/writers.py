"""Metrics written while training goes on: lines of JSON in a file, or scalars for TensorBoard.

A writer takes a step and a dict of numbers, those of :func:`dho2_optax.metrics` and any of your own. That for
TensorBoard needs the extra ``monitor``.
"""

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from dho2_optax.arguments import is_int

__all__ = ["JSONLines", "TensorBoard", "read"]


class JSONLines:
    """Writes one line of JSON for each step: ``{"step": 3, "loss": 0.5, ...}``.

    Every line is in the file once :meth:`write` has returned. What JSON has no number for, NaN and infinity, is
    ``null``; arrays, as those of a state of ``vmap``, are lists. Where several processes train, let one of them write.

    Args:
      path: the file; its folder is made if it is not there.
      append: go on at the end of a file that is there, behind its last whole line: one that was cut off, by a full disk
        say, is removed. False: what it held is lost.

    Raises:
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, pathlib
      >>> import jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> from dho2_optax.writers import JSONLines, read
      >>> state = dho2.dho2(optax.sgd(0.1), rank=2).init(jnp.ones(3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "metrics.jsonl"
      ...     with JSONLines(path) as writer:
      ...         writer.write(0, {"loss": 0.5, **dho2.metrics(state)})
      ...     [record] = read(path)
      >>> record["step"], record["loss"], record["refreshes"], record["eigenvalue_0"]
      (0, 0.5, 0, nan)
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        """Opens the file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers of a step.

        Args:
          step: which; of updates, say.
          values: numbers and arrays by name, of JAX, NumPy or Python; and texts, to tell runs apart.

        Raises:
          ValueError: for a step that is no whole number, a value that is none of these, or one named "step".
          OSError: the file cannot be written.
        """
        record = {"step": _checked(step, values)} | {name: _plain(x) for name, x in _on_host(values).items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file. A second time it does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()


class TensorBoard:
    """Writes scalars for TensorBoard, by tensorboardX, which needs neither TensorFlow nor PyTorch.

    NaN and infinity are left out, so that a curve has a gap there. Give every run a folder of its own under one folder,
    and show them with ``tensorboard --logdir`` of that one. Where several processes train, let one of them write.

    Args:
      folder: made if it is not there.
      from_step: where a run goes on after a restart; what an earlier one wrote of this step and later ones is not shown
        any more.

    Raises:
      ImportError: tensorboardX is not installed.

    Example:
      >>> import tempfile
      >>> from dho2_optax.writers import TensorBoard
      >>> with tempfile.TemporaryDirectory() as folder, TensorBoard(folder) as writer:
      ...     writer.write(0, {"loss": 0.5})
    """

    def __init__(self, folder: str | Path, *, from_step: int | None = None) -> None:
        """Opens a file in the folder."""
        if importlib.util.find_spec("tensorboardX") is None:
            raise ImportError('tensorboardX is missing: pip install "dho2_optax[monitor]"')
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=from_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers of a step.

        Args:
          step: which; of updates, say.
          values: numbers by name, of JAX, NumPy or Python. Arrays get a curve for each number, ``name/0``, ``name/1``.

        Raises:
          ValueError: for a step that is no whole number, a value that is no number, or one named "step".
        """
        step = _checked(step, values)
        for name, value in _on_host(values).items():
            numbers = _numbers(value)
            if numbers is None:
                raise ValueError(f"`values` must hold numbers for TensorBoard, got {value!r} for {name!r}.")
            for place, number in enumerate(numbers.ravel()):
                if math.isfinite(number):
                    self._writer.add_scalar(f"{name}/{place}" if numbers.shape else name, float(number), step)

    def close(self) -> None:
        """Writes what is left and closes the file. A second time it does nothing."""
        self._writer.close()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines that :class:`JSONLines` has written, as :mod:`dho2_optax.plots` takes them; NaN for ``null``.

    A last line without an end, of a run that was killed while it wrote, is left out.

    Args:
      path: the file.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is no JSON; it says which.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"`path` must be a file of JSON lines, got in line {number}: {error}") from None
        records.append({name: _with_nan(value) for name, value in record.items()})
    return records


def _checked(step: Any, values: Mapping[str, Any]) -> int:
    number = step.item() if isinstance(step, jax.Array | np.ndarray) and step.shape == () else step
    if not is_int(number):
        raise ValueError(f"`step` must be a whole number, got {step!r}.")
    if "step" in values:
        raise ValueError(f"`values` must not have the name 'step', got {values['step']!r} for it.")
    return int(number)


def _on_host(values: Mapping[str, Any]) -> dict[str, Any]:
    """All arrays of the devices at once: one wait in place of one for each."""
    fetched = jax.device_get(dict(values))
    return {name: fetched[name] for name in values}  # in their order, which JAX forgets


def _numbers(value: Any) -> np.ndarray | None:
    """An array of real numbers, or None."""
    numbers = np.asarray(value)
    if numbers.dtype.name == "bfloat16":  # of a kind that NumPy does not know
        numbers = numbers.astype(np.float32)
    return numbers if numbers.dtype.kind in "fiub" else None


def _plain(value: Any) -> Any:
    """Python's numbers, for JSON."""
    if isinstance(value, str):
        return value
    numbers = _numbers(value)
    if numbers is None:
        raise ValueError(f"`values` must hold numbers, arrays of them and texts, got {value!r}.")
    if numbers.dtype.kind in "iub":
        return numbers.tolist()
    finite = np.where(np.isfinite(numbers), numbers, np.nan).astype(np.float64)
    return _without_nan(finite.tolist())


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(x) for x in value]
    return None if math.isnan(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(x) for x in value]
    return math.nan if value is None else value
