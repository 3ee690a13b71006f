"""The figures of README and docs/equations.md are those of the results in benchmarks/results/target."""

import functools
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.target import report
from benchmarks.target.store import RESULTS, Store

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text()
_PROSE = " ".join(_README.split())
_EQUATIONS = (_ROOT / "docs" / "equations.md").read_text()


@functools.cache
def _rows(folder):
    return {row.method: row for row in report.summarize(Store(RESULTS / folder)).rows}


def _median(row):
    return statistics.median(run["final_loss"] or float("inf") for run in row.finals)


def _short(number):
    """1.2e-7, and not 1.2e-07; 0.18 as it is."""
    return f"{number:.1e}".replace("e-0", "e-") if number < 0.1 else f"{number:.2g}"


def _table(text, heading):
    """The rows of the first table below a heading of docs/equations.md, by their first cell."""
    lines = text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


_FOLDERS = {
    "convection, speed 10": "convection_1024",
    "convection, speed 40": "convection_40_1024",
    "Poisson": "poisson_1024",
    "Burgers": "burgers_1024",
    "reaction": "reaction_1024",
    "Klein-Gordon": "klein_gordon_1024",
    "Allen-Cahn": "allen_cahn_1024",
    "Helmholtz": "helmholtz_1024",
}


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
    assert row in [line.removesuffix(" |") for line in _README.splitlines()]


def test_every_row_of_what_it_gains_is_tested():
    table = _README.split("## What it gains")[1].split("##")[0]
    [mark] = test_what_it_gains_is_what_the_results_say.pytestmark
    assert len(re.findall(r"^\| .* \|$", table, flags=re.MULTILINE)) == 1 + len(mark.args[1])


def test_the_figures_beside_other_methods_are_those_of_the_results():
    rows, of_mlp = _rows("autoencoder_1000"), _rows("mlp_2000")
    table = _README.split("## Beside other methods")[1].split("##")[0]
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


def _target(row, to):
    """The loss that a figure is about: the mean of the seeds unless it says otherwise."""
    return {"": row.loss, "to the median": _median(row), "to its best seed": min(run["final_loss"] for run in row.ok)}[
        to
    ]


@pytest.mark.parametrize("equation", _FOLDERS)
def test_rank_62_on_equations(equation):
    rows = _rows(_FOLDERS[equation])
    soap, rank30, rank62 = (rows[name] for name in ("soap", "dho2_soap_rank30_interval100", "dho2_soap_rank62"))
    *losses, lower, reached = _table(_EQUATIONS, "Rank 62 on SOAP")[equation]
    for cell, row in zip(losses, (soap, rank30, rank62), strict=True):
        assert cell.split(",")[0] == _short(_median(row))
    assert lower.split(" times")[0] == f"{_median(soap) / _median(rank62):.0f}"
    for cell in reached.split(", "):
        to, number = re.fullmatch(r"(to the median)? ?(\d+|not reached)", cell).groups(default="")
        steps = rank62.steps_to(_target(soap, to))
        assert number == ("not reached" if steps is None else f"{steps:.0f}")


@pytest.mark.parametrize("base", ["adam", "soap"])
@pytest.mark.parametrize("equation", _FOLDERS)
def test_rank_30_on_equations(equation, base):
    rows, method = _rows(_FOLDERS[equation]), f"dho2_{base}_rank30_interval100"
    cells = _table(_EQUATIONS, "Rank 30")[equation]
    alone, hybrid, sooner = cells[:3] if base == "adam" else cells[3:6]
    for cell, name in ((alone, base), (hybrid, method)):
        assert cell == "" or cell.split(",")[0] == _short(_median(rows[name])), name
    for cell in filter(None, sooner.split(", ")):
        number, to = re.fullmatch(r"([\d.]+|not) ?(.*)", cell).groups()
        steps = rows[method].steps_to(_target(rows[base], to))
        if steps is None:
            assert number == "not"
        else:
            seconds = rows[base].seconds_per_step, rows[method].seconds_per_step
            assert number == f"{rows[base].curve[0][-1] * seconds[0] / (steps * seconds[1]):.3g}"
