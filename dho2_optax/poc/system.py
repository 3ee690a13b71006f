"""Dealings with the system: files replaced at once, a folder of one's own, SIGTERM, packages, text that fits a line."""

import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = [
    "describe",
    "locked",
    "missing",
    "no_device",
    "on_sigterm",
    "one_line",
    "postponed_signals",
    "reason",
    "replace",
]


def missing(extra: str, *packages: str) -> str | None:
    """What to say of the first of some packages that is not installed, with the extra that brings it.

    Example:
      >>> from dho2_optax.poc.system import missing
      >>> missing("poc", "jax", "no_such_package")
      'no_such_package is missing: pip install "dho2_optax[poc]"'
    """
    lacking = (name for name in packages if importlib.util.find_spec(name) is None)
    return next((f'{name} is missing: pip install "dho2_optax[{extra}]"' for name in lacking), None)


def one_line(text: str, most: int = 300) -> str:
    r"""Make a text fit one line: white space becomes a blank, what cannot be printed is escaped, the middle is cut.

    Example:
      >>> from dho2_optax.poc.system import one_line
      >>> one_line("two\nlines, one \0"), one_line("a very long text", most=10)
      ('two lines, one \\x00', 'a ... xt')
    """
    words = " ".join(text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    half = (most - 5) // 2
    return line if len(line) <= most else f"{line[:half]} ... {line[-half:]}"


def describe(error: BaseException) -> str:
    """Write the type of an exception and the first line of its message, whoever raised it.

    Example:
      >>> from dho2_optax.poc.system import describe
      >>> describe(ValueError("too large: try 3 and see")), describe(SystemExit())
      ('ValueError: too large: try 3 and see', 'SystemExit')
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # its class writes a message of its own, and fails
        lines = []
    name = type(error).__name__
    return one_line(f"{name}: {lines[0]}" if lines else name)


def no_device(error: Exception) -> str:
    """Say that jax has no device, and why: its message, or else the platform that was asked for."""
    asked = f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}"
    return f"no device can be used: {one_line(str(error).strip()) or asked}"


def reason(error: Exception) -> str:
    """Say why a path is refused, without repeating the path. The system raises `OSError`, Python `ValueError`."""
    return getattr(error, "strerror", None) or str(error)


def replace(path: Path, content: bytes) -> None:
    """Write a file at once: a reader never sees half of it, and the old one stays if the new one cannot be written.

    Raises:
      OSError: naming the path and the reason.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(f"{path} cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process. The system unlocks it when the process ends, however it ends.

    Raises:
      BlockingIOError: another process has it.
      OSError: the folder cannot be written or locked.
    """
    with open(folder / ".lock", "ab") as file:
        if sys.platform != "win32":  # which has no such lock
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextlib.contextmanager
def on_sigterm(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Handle SIGTERM, and put the handler that was there before back; outside the main thread do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        # None: what was there is not from Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def postponed_signals() -> Iterator[Callable[[], bool]]:
    """Hold back SIGINT and SIGTERM until the end, but the second of them; outside the main thread do nothing.

    Yields:
      A function that says whether one has come.
    """
    came: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):  # else it is ignored, or ends the process
                before[number] = handler
                signal.signal(number, hold)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            before[came[0]](came[0], None)
