"""The first page: its code runs as it stands, its commands are those that CI runs, and it is short."""

import re
from pathlib import Path

from tests.helpers import python_blocks

_ROOT = Path(__file__).parents[1]
_TEXT = (_ROOT / "README.md").read_text()


def test_the_example_trains(capsys):
    [block] = python_blocks(_TEXT)
    exec(block, {})
    loss, largest = map(float, capsys.readouterr().out.split())
    assert loss < 0.05
    assert largest > 0


def test_the_change_is_that_of_the_page_on_loops():
    [change] = re.findall(r"```diff\n(.*?)```", _TEXT, flags=re.DOTALL)
    page = (_ROOT / "docs" / "flax.md").read_text().split("## Plain JAX\n")[1]
    program = re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL)[0].splitlines()
    assert change.splitlines() == [line for line in program if line.startswith(("+", "-"))]
    assert len(change.splitlines()) <= 5


def test_the_two_commands_are_single_lines():
    lines = _TEXT.splitlines()
    assert sum(line.startswith("python3 -m venv") and line.endswith(" poc") for line in lines) == 1
    assert sum(line.startswith("python3 -m venv") and " -m pytest" in line for line in lines) == 1


def test_it_is_short():
    lines = _TEXT.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
