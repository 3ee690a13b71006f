"""What a measurement was taken on, and the command line of benchmarks that keep a table."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

# XLA asks glibc for the temporaries of a program at every call. Above 32 MiB glibc returns them to the system each
# time, and the page faults of the next call cost milliseconds that have nothing to do with the program. The thresholds
# keep the memory of the first thread; others hold no more than 64 MiB, and there huge pages make the faults fewer.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def keep_memory(module: str) -> None:
    """Starts this program anew with an allocator that keeps the memory it has, unless it runs with it already."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **ALLOCATOR})


def describe(argv: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit and command, for the head of a results file."""
    device = jax.devices()[0]
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": f"{device.platform} {device.device_kind}",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")},
        },
        "environment": {name: os.environ.get(name) for name in ("XLA_FLAGS", *ALLOCATOR)},
        "commit": _commit() or "unknown",
        "command": " ".join(["python", "-m", _module(argv[0]), *map(_shown, argv[1:])]),
    }


def parse(
    parser: argparse.ArgumentParser, results: Path, table: Callable[[dict[str, Any]], str]
) -> argparse.Namespace | None:
    """The arguments, with ``--out`` for the file of the results; None where ``--print`` has printed their table."""
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--print", action="store_true", help="measure nothing, print the table of the results")
    arguments = parser.parse_args()
    if not arguments.print:
        return arguments
    print(table(json.loads(arguments.out.read_text())))
    return None


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:  # no git
        return ""


def _shown(argument: str) -> str:
    """An argument of the command line; of a path of this machine alone, its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _module(program: str) -> str:
    """The dotted name of a module of this package, or of a package in it, from the path of its file."""
    here = Path(__file__).parent
    path = Path(program).resolve().with_suffix("")
    if not path.is_relative_to(here):
        return path.name
    names = path.relative_to(here.parent).parts
    return ".".join(names[:-1] if names[-1] == "__main__" else names)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
