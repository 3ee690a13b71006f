"""Starting the processes of one program, as a cluster would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(num_processes: int, num_devices: int, *arguments: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Starts ``python ARGUMENTS`` once, or several times with the options that make it one program.

    Args:
      num_processes: how many; one is told nothing of it.
      num_devices: virtual CPU devices of each.
      arguments: of every process.
      environment: further variables of every process.
    """
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(num_devices), **environment}
    several = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(num_processes), "--process-id"]
    return [
        subprocess.Popen(
            [*command, *([*several, str(process)] if num_processes > 1 else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for process in range(num_processes)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 200) -> list[tuple[int, str, str]]:
    """Waits for all, and returns exit code, standard output and standard error of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
