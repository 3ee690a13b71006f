"""Eight virtual CPU devices for every test."""

import os
from collections.abc import Iterator

# Runs ahead of the CPU backend deadlock multi-device programs unless the pool is larger than the device count.
os.environ.setdefault("PJRT_NPROC", "32")

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
