"""Optax's own contract suite, from the installed wheel, on our optimizers.

The suite names the optimizers it tests, and hands an objective to one of them only, ``optax.contrib.sophia``. Ours take
its place, in a process of their own: ``python -m tests.test_optax_contract FACTORY`` runs the suite.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import optax
import pytest

import dho2_optax as dho2


def dho2_adam(learning_rate: optax.ScalarOrSchedule, rank: int = 2, alpha: float = 0.1) -> optax.GradientTransformation:
    base = optax.adam(learning_rate)
    return dho2.dho2(base, rank=rank, alpha=alpha, refresh_interval=100, warmup_steps=1)


def mr_dho2_adam(
    learning_rate: optax.ScalarOrSchedule, rank: int = 2, alpha: float = 0.1
) -> optax.GradientTransformation:
    return dho2.mr_dho2(optax.adam(learning_rate), rank=rank, alpha=alpha, probe_interval=1)


def fosi_sgd(learning_rate: optax.ScalarOrSchedule, rank: int = 2, alpha: float = 0.1) -> optax.GradientTransformation:
    base = optax.sgd(learning_rate)
    return dho2.fosi(base, rank=rank, alpha=alpha, refresh_interval=100, warmup_steps=1)


_FACTORIES = {factory.__name__: factory for factory in (dho2_adam, mr_dho2_adam, fosi_sgd)}
_ONLY_SOPHIA = """
_MAIN_OPTIMIZERS_UNDER_TEST = [
    o for o in _MAIN_OPTIMIZERS_UNDER_TEST if o["opt_name"] == "sophia"
]
_OTHER_OPTIMIZERS_UNDER_TEST = []
"""


def _suite() -> tuple[str, str]:
    """Path and text of the suite, restricted to the optimizer whose place we take."""
    spec = importlib.util.find_spec("optax.contrib._common_test")
    source = Path(spec.origin).read_text()
    lists_end = "_ALL_OPTIMIZERS_UNDER_TEST = tuple("
    assert source.count(lists_end) == 1
    return spec.origin, source.replace(lists_end, _ONLY_SOPHIA + lists_end)


def main(factory: str) -> None:
    """Runs the suite in this process, which it ends."""
    from absl.testing import absltest

    optax.contrib.sophia = _FACTORIES[factory]
    path, source = _suite()
    suite = sys.modules["optax_contract"] = ModuleType("optax_contract")
    exec(compile(source, path, "exec"), suite.__dict__)
    absltest.main(module=suite, argv=sys.argv[:1])


@pytest.mark.slow
@pytest.mark.parametrize("factory", _FACTORIES)
def test_the_contract_suite_of_optax_passes_in_full(factory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_optax_contract", factory],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # One optimizer: extra arguments (2 ways), convergence (4 targets), hyperparameters, dtypes (2), accumulation (2),
    # stable states (4 dtypes), schedules.
    num_tests = re.search(r"^Ran (\d+) tests in ", done.stderr, re.MULTILINE)
    assert int(num_tests[1]) >= 16
    assert re.search(r"^OK$", done.stderr, re.MULTILINE), "some tests were skipped"


if __name__ == "__main__":
    main(sys.argv[1])
