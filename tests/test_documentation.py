"""The pages of docs/: their code runs as it stands, links lead somewhere, and the site is built without a warning."""

import ast
import functools
import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jax
import pytest

import dho2_optax as dho2
from dho2_optax.poc import tasks
from tests.helpers import python_blocks

_ROOT = Path(__file__).parents[1]
_PAGES = {path.name: path.read_text() for path in sorted((_ROOT / "docs").glob("*.md"))}
# Pages whose code other modules run: most of them check what the page says of it, too.
_ELSEWHERE = {
    "recipes.md": "test_recipes.py",
    "flax.md": "test_flax.py",
    "checkpoints.md": "test_checkpoints.py",
    "monitoring.md": "test_monitor.py",
}
_HERE = ("tutorial.md", "devices.md", "streaming.md", "proof_of_concept.md")


@functools.cache
def _example() -> dict[str, Any]:
    """The names that the example of the README leaves behind, with which pages begin."""
    names: dict[str, Any] = {}
    [block] = python_blocks((_ROOT / "README.md").read_text())
    exec(block, names)
    return names


def _run(blocks: list[str]) -> dict[str, Any]:
    names = dict(_example())
    for block in blocks:
        exec(block, names)
    return names


def test_every_block_says_what_it_is():
    for name, text in {**_PAGES, "README.md": (_ROOT / "README.md").read_text()}.items():
        fences = re.findall(r"^ *```(.*)$", text, flags=re.MULTILINE)
        assert set(fences[::2]) <= {"python", "diff", "sh", "math"}, name
        assert set(fences[1::2]) <= {""}, name


def test_other_modules_run_the_pages_that_are_left_to_them():
    for page, module in _ELSEWHERE.items():
        assert f'"{page}"' in (Path(__file__).parent / module).read_text()


def test_all_other_code_runs():
    for page, text in _PAGES.items():
        if page not in (*_ELSEWHERE, *_HERE):
            _run(python_blocks(text))


def test_tutorial(capsys):
    names = _run(python_blocks(_PAGES["tutorial.md"]))
    assert names["loss_of_dho2"] < 0.9 * names["loss_of_adam"]
    shown = ast.literal_eval(capsys.readouterr().out.splitlines()[-2])
    assert shown["refreshes"] == 6
    assert shown["active_pairs"] == 8
    assert shown["base_scale"] > 1


def test_several_devices():
    names = _run(python_blocks(_PAGES["devices.md"]))
    (stack,) = names["state"].spectrum.eigenvectors
    assert stack.sharding.shard_shape(stack.shape)[1] == stack.shape[1] // jax.device_count()


def test_without_slow_steps():
    probes, group = python_blocks(_PAGES["streaming.md"])
    names = _run([probes])
    params, state = names["params"], names["state"]
    for _ in range(28):  # the first ten of them without a probe: until then Adam's metric is noise
        params, state = names["step"](params, state, names["batch"])
    assert dho2.metrics(state)["matvecs"] == 5
    exec(group, names)
    assert names["group"].metrics()["installed"] == 4
    assert float(names["loss_fn"](names["params"], names["batch"])) < 0.05


def test_the_example_of_a_group_ends_well_as_a_program_of_its_own():
    example = python_blocks((_ROOT / "README.md").read_text()) + python_blocks(_PAGES["streaming.md"])[1:]
    # Without the store of compiled programs that tests share, of whose programs jax 0.10.0 speaks on stderr.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    program = [sys.executable, "-c", "".join(example)]
    done = subprocess.run(program, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    metrics = ast.literal_eval(done.stdout.splitlines()[-1])
    assert metrics["launches"] == 5
    assert metrics["installed"] == 4


def test_task_example_is_a_task(tmp_path, monkeypatch):
    [block] = python_blocks(_PAGES["proof_of_concept.md"])
    assert block.startswith("# line.py\n")
    (tmp_path / "line.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "line", raising=False)
    task = tasks.from_function("line:make")
    params = task.init(jax.random.key(0))
    assert float(task.loss_fn(params, task.test)) > 0


def test_links_lead_to_files_of_the_repository():
    pages = {_ROOT / "docs" / name: text for name, text in _PAGES.items()}
    pages |= {path: path.read_text() for path in _ROOT.glob("*.md")}
    for path, text in pages.items():
        without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", without_code):
            assert (path.parent / target).exists(), (path.name, target)


def test_the_api_has_every_public_name():
    listed = re.findall(r"^::: dho2_optax\.(.*)$", _PAGES["api.md"], flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {*dho2.__all__, "flax.TrainState"} - {"__version__"}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")

    api = (tmp_path / "api" / "index.html").read_text()
    for name in set(dho2.__all__) - {"__version__"}:
        assert f'id="dho2_optax.{name}"' in api, name
    assert "<math" in api
    assert not re.search(r":(math|class|func|meth|mod):|\.\. math::", api)
    for page in tmp_path.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            folder = tmp_path if target.startswith("/") else page.parent
            assert (folder / unquote(html.unescape(target)).lstrip("/")).exists(), (page, target)
