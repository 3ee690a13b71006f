"""Eight virtual CPU devices for every test, and one store of compiled programs for all."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Runs ahead of the CPU backend deadlock multi-device programs unless the pool is larger than the device count.
os.environ.setdefault("PJRT_NPROC", "32")

# What one test has compiled serves the others, the processes that they start, the other worker, and the next run, but
# for small programs, which are made sooner than kept. By machine: a program for another processor may not run here.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / f"programs-{platform.node()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# These make a step compile in a sixth of the time (7.6 to 1.5 s where it was measured, 1.3 with the last of them), and
# change nothing but how fast it runs and how numbers are rounded. `.ci/run` runs some tests without them. Newer
# releases of jaxlib have no such flags, and stop at them; so does the compiler for TPU, which reads the same variable.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10.") and find_spec("libtpu") is None:
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count("cpu") == 8


@pytest.fixture(scope="module", autouse=True)
def _release_compiled_programs() -> Iterator[None]:
    """Every compiled program maps memory, and Linux allows a process 65530 mappings: beyond them XLA crashes."""
    yield
    jax.clear_caches()
