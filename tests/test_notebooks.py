"""The notebooks are in step with their sources, run on eight virtual devices, and show no machine that they ran on."""

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import nbformat
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from notebooks import make

_ROOT = Path(__file__).parents[1]
_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({})"
_MACHINE = re.compile(r"/(?:tmp|home|root|work|usr|opt|mnt|var|Users|content)/|site-packages|\.ipynb_checkpoints")

pytestmark = pytest.mark.filterwarnings("ignore:Jupyter is migrating")


def _committed(name):
    return nbformat.read(make.FOLDER / f"{name}.ipynb", as_version=4)


def _outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def _pictures(notebook):
    return [output.data["image/png"] for output in _outputs(notebook) if "image/png" in output.get("data", {})]


def _check_outputs(name, notebook):
    """Every cell has run, once and in order, and every picture is there."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(_pictures(notebook)) == sum(cell.source.count("plt.show()") for cell in cells) > 0
    assert all(len(picture) > 5000 for picture in _pictures(notebook)), name
    for output in _outputs(notebook):
        assert output.output_type in ("stream", "display_data"), output
        assert output.get("name") != "stderr", output.text


def test_every_notebook_is_known():
    assert {path.stem for path in make.FOLDER.glob("*.ipynb")} == set(make.NAMES)
    assert {path.stem for path in make.FOLDER.glob("*.py")} == {*make.NAMES, "make", "__init__"}
    index = (_ROOT / "docs" / "notebooks.md").read_text()
    assert re.findall(r"\(\.\./notebooks/(\w+)\.ipynb\)", index) == list(make.NAMES)


@pytest.mark.parametrize("name", make.NAMES)
def test_source_and_notebook_are_in_step(name):
    source, notebook = make.read(name), _committed(name)
    for ours, theirs in itertools.zip_longest(source.cells, notebook.cells):
        assert (ours.id, ours.cell_type, ours.source) == (theirs.id, theirs.cell_type, theirs.source)
        assert ours.metadata == theirs.metadata
    assert source.metadata == {key: x for key, x in notebook.metadata.items() if key != "language_info"}
    text = (make.FOLDER / f"{name}.py").read_text()
    cells = text.split("# ---\n", 2)[-1]
    assert jupytext.writes(notebook, "py:percent").split("# ---\n", 2)[-1].split() == cells.split()


@pytest.mark.parametrize("name", make.NAMES)
def test_committed_outputs_are_whole_and_tell_nothing_of_the_machine(name):
    notebook = _committed(name)
    _check_outputs(name, notebook)
    for output in _outputs(notebook):
        shown = {key: x for key, x in output.get("data", {}).items() if key != "image/png"}
        assert not _MACHINE.search(json.dumps([output.get("text", ""), shown]))
    assert not _MACHINE.search(json.dumps(notebook.metadata))


@pytest.mark.parametrize("name", make.NAMES)
def test_a_notebook_opens_and_installs_from_the_repository(name):
    with (_ROOT / "pyproject.toml").open("rb") as file:
        address = tomllib.load(file)["project"]["urls"]["Repository"]
    text = (make.FOLDER / f"{name}.py").read_text()
    there = address.removeprefix("https://github.com/")
    badge = _BADGE.format(f"https://colab.research.google.com/github/{there}/blob/main/notebooks/{name}.ipynb")
    assert text.count(badge) == 1
    assert text.count(f"git+{address}") == 1
    assert len(re.findall(r"https?://[^\s\"')\]]+", text)) == 3


def test_a_notebook_that_is_unknown_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make", "pin"])
    with pytest.raises(SystemExit, match="2"):
        make.main()
    assert "got 'pin'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", make.NAMES)
def test_a_notebook_runs(name, tmp_path):
    """In a kernel of its own, in which warnings are errors."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "notebooks.make", name, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
    _check_outputs(name, notebook)
    first = next(output.text for output in _outputs(notebook) if output.output_type == "stream")
    assert first.startswith("8 x cpu")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the package libtpu is not installed")
def test_the_quick_start_compiles_for_eight_chips(monkeypatch):
    """Its own cells, for a slice of TPU v5e that is not there."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from benchmarks import memory

    names = {"functools": functools, "jax": jax, "jnp": jnp, "optax": optax, "dho2": dho2, "P": P}
    for cell in make.read("quick_start").cells:
        if "program" in cell.metadata.get("tags", ()):
            exec(cell.source, names)
    mesh = memory.mesh_of("v5e", 8)

    def placed(tree, specs):
        place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
        return jax.tree.map(place, tree, specs)

    params = jax.eval_shape(names["init"], jax.random.key(0))
    params = placed(params, jax.tree.map(lambda _: P(), params))
    batch = placed((np.empty((1432, 64), np.float32), np.empty(1432, np.int32)), (P("data"), P("data")))
    for name, tx in names["optimizers"].items():
        start, step = names["training"](tx, mesh, params)
        specs = dho2.state_specs(tx.init, params, "data")
        state = placed(jax.eval_shape(start, params), specs)
        assert start.lower(params).compile().memory_analysis().output_size_in_bytes > 0
        found = memory.plan.collectives(step.lower(params, state, batch).compile())
        assert {one.group_size for one in found} == {8}
        # A refresh is a loop; Adam has none.
        assert any(one.in_loop for one in found) == ("dho2" in name)
        if "dho2" in name:
            [stack] = state.spectrum.eigenvectors
            assert 8 * np.prod(stack.sharding.shard_shape(stack.shape)) == stack.size
