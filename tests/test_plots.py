"""What pictures show: their lines, scales and labels."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from dho2_optax import plots
from dho2_optax.density import Density

_RECORDS = [
    {"step": 10, "eigenvalue_0": 5.0, "eigenvalue_1": 0.5, "eigenvalue_max": 5.0, "missed_curvature": 5.0},
    {"step": 20, "eigenvalue_0": jnp.float32(6.0), "eigenvalue_1": 0.25, "missed_curvature": 0.0},
    {"step": 30, "eigenvalue_0": 7.0, "eigenvalue_1": None},
]
_FOUND = Density(jnp.asarray([[0.0, 1.0, 50.0]]), jnp.asarray([[0.6, 0.399, 0.001]]))
_DRAW = {
    "spectrum": lambda axes: plots.spectrum(_RECORDS, axes),
    "density": lambda axes: plots.density(_FOUND, axes),
    "loss": lambda axes: plots.loss([3.0, 2.0], axes),
    "memory": lambda axes: plots.memory({"a": {1: 8.0, 2: 4.0}}, axes),
}


@pytest.mark.parametrize("name", _DRAW)
def test_axes_are_those_that_are_given_or_new_ones_and_can_be_saved(name, tmp_path):
    axes = Figure().subplots()
    assert _DRAW[name](axes) is axes
    new = _DRAW[name](None)
    assert new is not axes
    assert len(new.lines) == len(axes.lines) > 0
    new.figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_eigenvalues_over_time():
    axes = plots.spectrum(_RECORDS)
    first, second, missed = axes.lines
    for line, y in ((first, [5, 6, 7]), (second, [0.5, 0.25, np.nan]), (missed, [5, np.nan, np.nan])):
        np.testing.assert_array_equal(line.get_xdata(), [10, 20, 30])
        np.testing.assert_array_equal(line.get_ydata(), y)
    assert axes.get_yscale() == "log"
    negative = plots.spectrum([{"eigenvalue_0": -5.0}, {"eigenvalue_0": 2.0}])
    assert negative.get_yscale() == "symlog"
    np.testing.assert_array_equal(negative.lines[0].get_xdata(), [0, 1])
    # Ten come after nine.
    many = plots.spectrum([{f"eigenvalue_{i}": float(i + 1) for i in (10, 9, 2)}])
    assert [float(line.get_ydata()[0]) for line in many.lines] == [3, 10, 11]
    with pytest.raises(ValueError, match="`records` must have eigenvalues"):
        plots.spectrum([{"step": 1, "loss": 2.0}])


def test_a_density_has_its_mass_where_the_eigenvalues_are_and_hides_no_peak():
    [line] = plots.density(_FOUND, width=0.01, num_points=20).lines
    x, y = line.get_xdata(), line.get_ydata()
    np.testing.assert_allclose(np.trapezoid(y, x), 1, rtol=0.01)
    for low, high, mass in ((-0.5, 0.5, 0.6), (0.5, 1.5, 0.399), (49, 51, 0.001)):
        part = (x > low) & (x < high)
        np.testing.assert_allclose(np.trapezoid(y[part], x[part]), mass, rtol=0.02)
    axes = plots.density(_FOUND)
    peak = 0.001 / (0.5 * np.sqrt(2 * np.pi))  # of an outlier, at the default width
    assert axes.get_ylim()[0] == pytest.approx(peak / 100, rel=1e-3)
    # One eigenvalue has no range.
    [line] = plots.density(Density(jnp.asarray([[2.0]]), jnp.asarray([[1.0]]))).lines
    np.testing.assert_allclose(np.trapezoid(line.get_ydata(), line.get_xdata()), 1, rtol=0.01)


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        (_FOUND, {"num_points": 1}, "`num_points` must be a Python int of at least 2, got 1"),
        (_FOUND, {"width": 0.0}, r"`width` must be positive, got 0\.0"),
        (Density(jnp.asarray([[jnp.nan]]), jnp.ones((1, 1))), {}, "`found` must be finite, got NaN"),
    ],
)
def test_a_density_that_cannot_be_drawn(found, options, message):
    with pytest.raises(ValueError, match=message):
        plots.density(found, **options)


def test_losses_against_updates_and_seconds():
    losses = [4.0] * 20 + [2.0] * 20
    axes = plots.loss(losses, label="dho2")
    mean, each = axes.lines
    np.testing.assert_array_equal(each.get_ydata(), losses)
    np.testing.assert_array_equal(mean.get_ydata()[[0, 20, 39]], [np.inf, 3, 2])
    np.testing.assert_array_equal(mean.get_xdata(), np.arange(1, 41))
    assert (axes.get_xlabel(), axes.get_yscale(), mean.get_label()) == ("updates", "log", "dho2")
    timed = plots.loss([1.0, -1.0], seconds=[0.5, 0.25])
    np.testing.assert_array_equal(timed.lines[0].get_xdata(), [0.5, 0.75])
    assert (timed.get_xlabel(), timed.get_yscale()) == ("seconds", "linear")
    with pytest.raises(ValueError, match="`losses` must have at least one number, got none"):
        plots.loss([])
    with pytest.raises(ValueError, match="`seconds` must be as many as `losses`, 2, got 1"):
        plots.loss([1.0, 2.0], seconds=[1.0])


@pytest.mark.parametrize("seconds", [[1.0, 9.0], [9.0, 1.0], [0.0, 0.0]])
def test_curves_on_the_same_axes_are_shown_to_the_end_of_the_longest(seconds):
    axes = None
    for each in seconds:
        axes = plots.loss([math.nan, 3.0, 2.0], axes, seconds=[each] * 3)
    axes.figure.canvas.draw()
    left, right = axes.get_xlim()
    assert left == 0
    assert right == (pytest.approx(1.05 * 27) if any(seconds) else 1)


def test_memory_against_devices():
    sizes = {"flat": {1: 10.0, 4: 10.0}, "falls": {1: 100.0, 2: 55.0, 4: 30.0}, "nothing": {}}
    axes = plots.memory(sizes, looks={"flat": {"linestyle": "--"}})
    flat, falls, ideal = axes.lines
    np.testing.assert_array_equal(falls.get_xdata(), [1, 2, 4])
    np.testing.assert_array_equal(falls.get_ydata(), [100, 55, 30])
    np.testing.assert_array_equal(ideal.get_ydata(), [100, 50, 25])
    assert [line.get_label() for line in axes.lines] == ["flat", "falls", "ideal 1/P"]
    assert flat.get_linestyle() == "--"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert len(plots.memory(sizes, ideal=False).lines) == 2
    with pytest.raises(ValueError, match=r"`sizes` must have at least one number of bytes, got \{\}"):
        plots.memory({})
