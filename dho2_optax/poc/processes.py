"""One proof of concept in several processes: joining, what is shared, and the end of one of them.

Every process runs the same lines on the same data. Devices are those of all processes together, so parameters, state
and batch are global arrays, and results are read from what every device holds. The first process alone writes the
report and prints; checkpoints are written by all together.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = [
    "HEARTBEAT_SECONDS",
    "ProcessError",
    "any_of",
    "check",
    "count",
    "devices",
    "end",
    "is_first",
    "join",
    "local_devices",
    "number",
    "put",
]

#: After so long without a sign of life a process counts as gone.
HEARTBEAT_SECONDS = 20
_LOST = "another process has ended or cannot be reached, so this one ends too: see what that one says"
_abort_handler: Any = None  # kept: the system calls it
_said = False  # that another process is lost


class ProcessError(Exception):
    """What is wrong with the processes, in one line."""


def number(coordinator: str | None, num_processes: int | None, process_id: int | None) -> int:
    """Return how many processes there will be, and check the options that say so; nothing is started.

    Args:
      coordinator: ``HOST:PORT`` of the first process, which listens there. None, with the other two: as JAX finds the
        cluster that it runs in, Slurm, Open MPI, Cloud TPU or Kubernetes; one process where it finds none.
      num_processes: how many there are.
      process_id: which this is, from 0.

    Raises:
      ProcessError: for values that do not fit.

    Example:
      >>> from dho2_optax.poc import processes
      >>> processes.number("localhost:8476", 2, 1)
      2
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        _check(str(coordinator), num_processes or 0, process_id or 0)
        return num_processes or 1
    if len(missing) < len(given):
        raise ProcessError(f"{', '.join(given)} belong together: give {' and '.join(missing)} too")
    return _detected()


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Make this process one of several, as :func:`number` understands the options, before anything touches a device.

    Raises:
      ProcessError: if the others cannot be reached.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    _speak_when_aborted()


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ProcessError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise ProcessError(f"--process-id must be from 0 to {num_processes - 1}, got {process_id}")


def _detected() -> int:
    """How many processes the cluster has in which JAX finds itself; 1 where it finds none, or nothing certain."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        # What `jax.distributed.initialize` looks for. It has no public name, and the call itself would start something.
        from jax._src.clusters import ClusterEnv

        for cluster in ClusterEnv._cluster_types:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count()
    return 1


def local_devices(counts: Sequence[int], num_processes: int) -> int:
    """Return how many devices of each process the largest of `counts` takes.

    Raises:
      ProcessError: if a count is not a multiple of the number of processes.

    Example:
      >>> from dho2_optax.poc import processes
      >>> processes.local_devices((2, 8), num_processes=2)
      4
    """
    for wanted in counts:
        if wanted % num_processes:
            raise ProcessError(f"--devices {wanted} does not divide over {num_processes} processes")
    return max(counts) // num_processes


def count() -> int:
    """How many processes there are."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return count() == 1 or jax.process_index() == 0


def devices(wanted: int) -> list[Any]:
    """The first devices, as many of each process: a program runs in all of them."""
    each = wanted // count()
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for index in sorted(by_process) for device in by_process[index][:each]]


def put(tree: Any, sharding: Any) -> Any:
    """Place what every process has whole; each makes its own shards, and nothing is sent."""
    if count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any, where: jax.sharding.Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim):
            return x
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, jax.sharding.Sharding) else sharding
    return jax.tree.map(place, tree, shardings)


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Whether any process says so, of each flag: the same answer in all, each of which must ask.

    No process goes on before all have asked, so without flags it is a barrier.

    Example:
      >>> from dho2_optax.poc import processes
      >>> processes.any_of(True, False)
      (True, False)
    """
    if count() == 1:
        return flags
    try:
        said = multihost_utils.process_allgather(np.array([True, *flags]))
    except jax.errors.JaxRuntimeError as error:
        check(error)
        raise
    return tuple(said.any(axis=0)[1:].tolist())


def check(error: Exception) -> None:
    """End this process if an error of a run says that the processes are not together any more."""
    global _said
    if isinstance(error, jax.errors.JaxRuntimeError) and count() > 1:
        _said = True
        _complain(f"{_LOST} ({str(error).splitlines()[0][:200]})")
        end(1)


def end(code: int) -> NoReturn:
    """End at once, without waiting for processes that may be gone.

    The others find each other at the first, so that one goes last.
    """
    if is_first():
        time.sleep(1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _complain(message: str) -> None:
    print(f"dho2-optax: error: {message}", file=sys.stderr, flush=True)


def _speak_when_aborted() -> None:
    """Where the runtime misses a process in the middle of something it aborts this one, which no exception tells.

    Python's own handlers run too late for that: the system calls this one.
    """
    global _abort_handler

    def handler(number: int) -> None:
        del number
        if not _said:
            os.write(2, f"\ndho2-optax: error: {_LOST}\n".encode())
        os._exit(1)

    if sys.platform != "win32":
        _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
        set_handler = ctypes.CDLL(None).signal
        set_handler.argtypes = (ctypes.c_int, type(_abort_handler))
        set_handler.restype = ctypes.c_void_p
        set_handler(signal.SIGABRT, _abort_handler)
