"""Eight virtual CPU devices for every test, and one store of compiled programs for all."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

# Runs ahead of the CPU backend deadlock multi-device programs unless the pool is larger than the device count.
os.environ.setdefault("PJRT_NPROC", "32")

# Most of the time of the tests is compilation. What one test has compiled serves the others, the processes that they
# start, the other worker, and the next run. By machine: a program for another processor may not run here.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / f"programs-{platform.node()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count("cpu") == 8


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For modules whose time goes to compiling small programs that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def _release_compiled_programs() -> Iterator[None]:
    """Every compiled program maps memory, and Linux allows a process 65530 mappings: beyond them XLA crashes."""
    yield
    jax.clear_caches()
