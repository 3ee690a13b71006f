"""The README's code runs as it stands."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jax

import dho2_optax as dho2
from dho2_optax.poc import tasks
from tests.helpers import python_blocks

README = Path(__file__).parents[1] / "README.md"


def _blocks() -> list[str]:
    return python_blocks(README.read_text())


def test_python_blocks_run_in_order(capsys):
    names: dict[str, object] = {}
    blocks = [block for block in _blocks() if not block.startswith("# line.py")]
    assert len(blocks) == 5
    for block in blocks[:3]:
        exec(block, names)
    loss, _ = capsys.readouterr().out.splitlines()[0].split()
    assert float(loss) < 0.05
    (stack,) = names["state"].spectrum.eigenvectors
    assert stack.sharding.shard_shape(stack.shape)[1] == stack.shape[1] // jax.device_count()

    exec(blocks[3], names)
    arguments = (names["params"], names["state"], names["batch"])
    for _ in range(28):  # the first ten of them without a probe: until then Adam's metric is noise
        arguments = (*names["step"](*arguments[:2], names["batch"]), names["batch"])
    assert dho2.metrics(arguments[1])["matvecs"] == 5
    exec(blocks[4], names)
    assert names["group"].metrics()["installed"] == 4
    assert float(names["loss_fn"](names["params"], names["batch"])) < 0.05


def test_the_example_of_a_group_ends_well_as_a_program_of_its_own():
    blocks = [block for block in _blocks() if not block.startswith("# line.py")]
    program = [sys.executable, "-c", blocks[0] + blocks[4]]
    # Without the store of compiled programs that tests share, of whose programs jax 0.10.0 speaks on stderr.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        program, cwd=README.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    metrics = ast.literal_eval(done.stdout.splitlines()[-1])
    assert metrics["launches"] == 5
    assert metrics["installed"] == 4


def test_task_example_is_a_task(tmp_path, monkeypatch):
    [block] = [block for block in _blocks() if block.startswith("# line.py")]
    (tmp_path / "line.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "line", raising=False)
    task = tasks.from_function("line:make")
    params = task.init(jax.random.key(0))
    assert float(task.loss_fn(params, task.test)) > 0


def test_the_two_commands_are_single_lines():
    lines = README.read_text().splitlines()
    assert sum(line.startswith("python3 -m venv") and line.endswith(" poc") for line in lines) == 1
    assert sum(line.startswith("python3 -m venv") and " -m pytest" in line for line in lines) == 1
