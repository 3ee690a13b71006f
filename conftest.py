"""Eight virtual CPU devices for every test."""

import os

# Runs ahead of the CPU backend deadlock multi-device programs unless the pool is larger than the device count.
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count("cpu") == 8
