"""The first page: its code runs, its commands are those that CI runs, its figures are those of the results."""

import re
import statistics
from pathlib import Path

import pytest

from benchmarks.target import report
from benchmarks.target.store import RESULTS, Store
from tests.helpers import python_blocks

_ROOT = Path(__file__).parents[1]
_TEXT = (_ROOT / "README.md").read_text()
_PROSE = " ".join(_TEXT.split())


def _rows(folder):
    return {row.method: row for row in report.summarize(Store(RESULTS / folder)).rows}


def _median(row):
    return statistics.median(run["final_loss"] for run in row.finals)


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


@pytest.mark.parametrize(
    ("task", "base", "folder", "method"),
    [
        ("Poisson's equation, full batch", "SOAP", "poisson_1024", "dho2_soap_rank30_interval100"),
        ("Klein-Gordon equation, full batch", "SOAP", "klein_gordon_1024", "dho2_soap_rank30_interval100"),
        ("Poisson's equation, full batch", "Adam", "poisson_1024", "dho2_adam_rank30_interval100"),
        ("convection at speed 40, full batch", "SOAP", "convection_40_1024", "dho2_soap_rank30_interval100"),
        ("autoencoder, batch 1000", "Adam", "autoencoder_1000", "dho2_adam_often"),
        ("MLP, batch 8192", "Adam", "mlp_8192", "dho2_adam"),
        ("CNN, batch 1000", "Adam", "cnn_1000", "dho2_adam_interval50"),
        ("MLP, batch 128", "Adam", "mlp_128", "dho2_adam"),
    ],
)
def test_what_it_gains_is_what_the_results_say(task, base, folder, method):
    rows = _rows(folder)
    hybrid, alone = rows[method], rows[base.lower()]
    steps, own = hybrid.steps_to(alone.loss), alone.steps_to(alone.loss)
    if steps is None:
        cells = ["not reached", ""]
    else:
        less = own * alone.seconds_per_step / (steps * hybrid.seconds_per_step)
        time = f"{less:.2f} times less" if less > 1 else f"{1 / less:.1f} times more"
        cells = [f"{steps:.0f} instead of {own:.0f}", time]
    row = " | ".join(["", task, base, *cells]).strip()
    assert row in [line.removesuffix(" |") for line in _TEXT.splitlines()]


def test_every_row_of_what_it_gains_is_tested():
    table = _TEXT.split("## What it gains")[1].split("##")[0]
    [mark] = test_what_it_gains_is_what_the_results_say.pytestmark
    assert len(re.findall(r"^\| .* \|$", table, flags=re.MULTILINE)) == 1 + len(mark.args[1])


def test_the_figures_beside_other_methods_are_those_of_the_results():
    rows, of_mlp = _rows("autoencoder_1000"), _rows("mlp_2000")
    table = _TEXT.split("## Beside other methods")[1].split("##")[0]
    names = {"`dho2`": "dho2_adam_often", "[FOSI][1]": "fosi_sgd", "[kfac-jax][2]": "kfac"}
    names |= {"SOAP (`dho2.soap`)": "soap", "Muon (`optax.contrib`)": "muon"}
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[4] for line in table.splitlines() if line.startswith("| ")}
    for name, method in names.items():
        assert cells[name].split(" (")[0] == f"{1e3 * rows[method].seconds_per_step:.0f} ms"
    assert f"where Adam takes {1e3 * rows['adam'].seconds_per_step:.0f} ms" in _PROSE

    steps = {name: of_mlp[name].steps_to(of_mlp["adam"].loss) for name in ("fosi_adam", "dho2_adam")}
    seconds = {name: steps[name] * of_mlp[name].seconds_per_step for name in steps}
    assert f"to Adam's loss: {steps['fosi_adam']:.0f}, `dho2` {steps['dho2_adam']:.0f};" in _PROSE
    assert f"but in {seconds['fosi_adam']:.2f} s, `dho2` in {seconds['dho2_adam']:.2f}." in _PROSE
    assert f"At batch 2000: {of_mlp['kfac'].loss:.3f}, `dho2` on Adam {of_mlp['dho2_adam'].loss:.3f}." in _PROSE
    losses = rows["soap"].loss, rows["dho2_adam_often"].loss
    assert "loss: {:.1f}, `dho2` on Adam {:.1f}.".format(*losses) in _PROSE
    methods = (rows["muon"], rows["dho2_adam_often"])
    reached = (row.steps_to(rows["adam"].loss) * row.seconds_per_step for row in methods)
    assert "autoencoder after {:.1f} s, `dho2` on Adam after {:.1f}.".format(*reached) in _PROSE


def test_what_the_first_picture_shows_is_what_the_results_say():
    rows = _rows("poisson_1024")
    soap, rank30, rank62 = (rows[name] for name in ("soap", "dho2_soap_rank30_interval100", "dho2_soap_rank62"))
    steps = rank30.steps_to(soap.loss)
    less = soap.steps_to(soap.loss) * soap.seconds_per_step / (steps * rank30.seconds_per_step)
    assert f"in {less:.1f} times less time, and ends {_median(soap) / _median(rank30):.0f} times lower" in _PROSE
    assert f"it ends {_median(soap) / _median(rank62):.0f} times lower" in _PROSE
