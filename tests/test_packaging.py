"""The package as a user has it, a wheel or editable: what importing it takes, and what a type checker sees of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dho2_optax

_PROGRAM = """\
import jax
import jax.numpy as jnp
import optax

import dho2_optax as dho2


def loss_fn(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    return jnp.mean((batch @ params["w"] - 1) ** 2)


def program(params: dict[str, jax.Array]) -> None:
    tx = dho2.dho2(optax.adam(1e-2), loss_fn, rank=2, eigensolver=dho2.Eigensolver(order=4))
    state = tx.init(params)
    reveal_type(tx)  # is "GradientTransformationExtraArgs"
    reveal_type(dho2.mr_dho2(optax.adam(1e-2), loss_fn, probe_interval=2))  # is "GradientTransformationExtraArgs"
    reveal_type(dho2.fosi(optax.sgd(0.1), loss_fn))  # is "GradientTransformationExtraArgs"
    reveal_type(dho2.soap(1e-3))  # is "GradientTransformation"
    reveal_type(dho2.metrics(state))  # is "dict[str, Array]"
    reveal_type(dho2.spectrum(state))  # is "Spectrum"
    reveal_type(dho2.spectrum(state).mask)  # is "Array"
    reveal_type(dho2.Newton(floor=1e-3))  # is "Newton"
    dho2.dho2(optax.adam(1e-2), loss_fn, rank="2")  # parameter "rank" of type "int"
    dho2.Newton(flor=1e-3)  # error: No parameter named "flor"
    dho2.no_such_name  # error: "no_such_name" is not a known attribute
"""


_IMPORT = """
import json, sys, time
start = time.process_time()
import jax, optax
between, before = time.process_time(), set(sys.modules)
import dho2_optax
print(json.dumps([between - start, time.process_time() - between, sorted(set(sys.modules) - before)]))
"""


def _import(folder: Path) -> tuple[float, float, list[str]]:
    """Processor seconds to import jax and optax, and then the package, and the modules of the latter."""
    command = [sys.executable, "-X", f"pycache_prefix={folder}", "-c", _IMPORT]
    path = str(Path(dho2_optax.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def test_importing_it_takes_little_beside_jax_and_optax(tmp_path):
    """A quarter of their seconds at most, where an eighth is usual, and no modules but its own.

    The first import is not timed: Python compiles the modules then.
    """
    theirs, ours, modules = zip(*(_import(tmp_path) for _ in range(4)), strict=True)
    assert min(ours[1:]) < min(theirs[1:]) / 4
    assert {name.split(".")[0] for name in modules[0]} == {"dho2_optax"}


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed: it is in `dev`")
def test_a_strict_type_checker_knows_the_types_of_what_a_program_uses(tmp_path):
    """Of the installed package: neither from the folder of the tests, nor by the path of this process."""
    (tmp_path / "program.py").write_text(_PROGRAM)
    strict = {"typeCheckingMode": "strict", "reportMissingTypeStubs": False}  # optax has none
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(strict))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "program.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
    said: dict[int, list[str]] = {}
    for x in json.loads(found.stdout)["generalDiagnostics"]:
        said.setdefault(x["range"]["start"]["line"], []).append(f"{x['severity']}: {x['message']}")
    lines = enumerate(_PROGRAM.splitlines())
    expected = {number: line.split("  # ")[1] for number, line in lines if "  # " in line}
    assert said.keys() == expected.keys(), found.stdout
    for number, words in expected.items():
        assert any(words in message for message in said[number]), (words, said[number])
