"""The examples on handwritten digits are programs that train."""

import re
import runpy
import sys
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parents[1] / "examples"
_NEEDS = {"with_equinox": "equinox"}


@pytest.mark.parametrize("optimizer", ["dho2", "mr_dho2"])
@pytest.mark.parametrize("name", ["plain", "linen", "nnx", "with_equinox"])
def test_an_example_trains(name, optimizer, monkeypatch, capsys):
    if name in _NEEDS:
        pytest.importorskip(_NEEDS[name])
    path = _EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 80
    monkeypatch.setattr(sys, "argv", [str(path), "--optimizer", optimizer, "--steps", "100"])
    runpy.run_path(str(path), run_name="__main__")
    first, second, last = capsys.readouterr().out.splitlines()
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in (first, second)]
    assert losses[1] < losses[0] < 0.6
    assert int(second.split()[-1]) >= 4  # eigenpairs in use
    assert float(last.split()[-1]) > 0.94
