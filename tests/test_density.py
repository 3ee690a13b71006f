"""The density of eigenvalues against spectra that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dho2_optax as dho2
from dho2_optax.density import Density
from tests.helpers import symmetric

_SIZE = 1000


def _diagonal(eigenvalues, **options):
    diagonal = jnp.asarray(eigenvalues, jnp.float32)
    like = {"a": diagonal[:700], "b": diagonal[700:].reshape(3, 100)}
    matvec = lambda x: jax.tree.map(lambda d, x: d * x, like, x)  # noqa: E731
    return jax.jit(lambda: dho2.spectral_density(matvec, like, **options))()


def _semicircle(n):
    """Eigenvalues with the density 2/pi sqrt(1 - x^2) on [-1, 1], by its quantiles."""
    x = np.linspace(-1, 1, 100_001)
    cumulative = 0.5 + (x * np.sqrt(1 - x**2) + np.arcsin(x)) / np.pi
    return np.interp((np.arange(n) + 0.5) / n, cumulative, x)


def test_the_density_of_a_smooth_spectrum():
    found = _diagonal(_semicircle(_SIZE), order=40, num_probes=8)
    assert found.nodes.shape == found.weights.shape == (8, 40)
    np.testing.assert_allclose(np.sum(found.weights, axis=1), 1, rtol=1e-5)
    points = np.linspace(-1.5, 1.5, 601)
    width = 0.05
    values = np.asarray(found.at(points, width))
    np.testing.assert_allclose(np.trapezoid(values, points), 1, rtol=1e-4)
    fine = np.linspace(-1, 1, 4001)
    bells = np.exp(-(((points[:, None] - fine) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    expected = np.trapezoid(bells * 2 / np.pi * np.sqrt(1 - fine**2), fine, axis=1)
    np.testing.assert_allclose(values, expected, atol=0.06)
    # Moments of the semicircle: 0, 1/4, 0, 1/8.
    for power, moment in ((1, 0.0), (2, 0.25), (3, 0.0), (4, 0.125)):
        assert float(found.moment(power)) == pytest.approx(moment, abs=0.02)
    assert float(found.below(0.0)) == pytest.approx(0.5, abs=0.03)


def test_outliers_and_null_space_have_the_mass_that_is_theirs():
    eigenvalues = np.concatenate([[-20.0], np.zeros(699), np.linspace(0.5, 1.0, 299), [100.0]])
    found = _diagonal(eigenvalues, order=30, num_probes=16)
    mass = lambda low, high: float(found.below(high) - found.below(low))  # noqa: E731
    assert mass(-21, -19) == pytest.approx(1e-3, rel=0.7)
    assert mass(99, 101) == pytest.approx(1e-3, rel=0.7)
    assert mass(-0.1, 0.1) == pytest.approx(0.699, abs=0.03)  # where the operator does nothing
    assert mass(0.4, 1.1) == pytest.approx(0.299, abs=0.03)
    assert mass(-18, -0.2) == pytest.approx(0, abs=1e-6)
    assert float(found.moment(1)) == pytest.approx(np.mean(eigenvalues), abs=0.1)


def test_a_space_that_is_used_up_gives_the_quadratic_form_exactly():
    eigenvalues = np.array([3.0, 1.0, 1.0, -2.0, 0.0])
    matrix = jnp.asarray(symmetric(eigenvalues), jnp.float32)
    found = dho2.spectral_density(lambda x: matrix @ x, jnp.zeros(5), order=64, num_probes=4000)
    assert found.nodes.shape == (4000, 5)
    np.testing.assert_allclose(np.sum(found.weights, axis=1), 1, rtol=1e-4)
    for low, high, share in ((2.9, 3.1, 0.2), (0.9, 1.1, 0.4), (-2.1, -1.9, 0.2), (-0.1, 0.1, 0.2)):
        assert float(found.below(high) - found.below(low)) == pytest.approx(share, abs=0.02)


def test_probes_are_different_and_the_key_decides():
    same, again, other = (
        _diagonal(_semicircle(_SIZE), order=4, num_probes=2, **options)
        for options in ({}, {}, {"key": jax.random.key(1)})
    )
    np.testing.assert_array_equal(same.nodes, again.nodes)
    assert not np.allclose(same.nodes, other.nodes)
    assert not np.allclose(same.nodes[0], same.nodes[1])


def test_a_product_that_is_not_finite_is_nan():
    found = dho2.spectral_density(lambda x: x * jnp.nan, jnp.ones(8), order=4, num_probes=1)
    assert np.all(np.isnan(found.nodes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "`order` must be a Python int of at least 1, got 0"),
        ({"order": 2.0}, r"`order` must be a Python int of at least 1, got 2\.0"),
        ({"num_probes": 0}, "`num_probes` must be a Python int of at least 1, got 0"),
        ({"like": {}}, "`like` must hold at least one number"),
        ({"like": jnp.arange(3)}, "`like` must hold floating-point leaves only, got one of dtype int32"),
        ({"matvec": 3}, "`matvec` must be callable, got 3"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dho2.spectral_density(**{"matvec": lambda x: x, "like": jnp.ones(3), **options})


@pytest.mark.parametrize("width", [0.0, -1.0, np.nan])
def test_a_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match="`width` must be positive"):
        Density(jnp.ones((1, 1)), jnp.ones((1, 1))).at([0.0], width)
