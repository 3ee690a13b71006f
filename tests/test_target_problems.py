"""The scientific problems of `benchmarks.target`: their references, how points are drawn, and that training helps.

That exact solutions have no loss is tested for all equations in `test_benchmarks.py`.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.target import spectral, tasks, training
from benchmarks.target.equations import EQUATIONS
from benchmarks.target.methods import METHODS


def _line(count=128, low=0.0, high=1.0):
    return np.linspace(low, high, count)


# A function for each equation, and its loss where that is known in closed form.
_WRONG = {
    # The speed is 39 instead of 40: the residual is cos(x - 39 t), and the function is right at the boundary.
    "convection_40": (lambda p: jnp.sin(p[0] - 39 * p[1]), lambda p: np.mean(np.cos(p[:, 0] - 39 * p[:, 1]) ** 2)),
    # A constant of 1/2 grows by 5/4.
    "reaction": (
        lambda p: 0.0 * p[0] + 0.5,
        lambda p: 1.25**2 + np.mean((0.5 - np.exp(-8 * (_line(high=2 * np.pi) - np.pi) ** 2 / np.pi**2)) ** 2),
    ),
    # x t^2 is not at rest in between, has 2 x as residual, and t^2 at a wall.
    "wave": (
        lambda p: p[0] * p[1] ** 2,
        lambda p: (
            np.mean((2 * p[:, 0]) ** 2)
            + np.mean((np.sin(np.pi * _line()) + np.sin(5 * np.pi * _line()) / 2) ** 2)
            + np.mean(_line() ** 4) / 2
        ),
    ),
    # A motion at the start, t, solves the equation and moves the walls.
    "wave_motion": (
        lambda p: EQUATIONS["wave"].solution(p) + p[1],
        lambda p: 1 + np.mean(_line() ** 2),
    ),
    # 1 solves nothing: the residual is 1, minus the source.
    "helmholtz": (
        lambda p: EQUATIONS["helmholtz"].solution(p) + 1,
        lambda p: 2.0,
    ),
    # Zero: the residual is minus the source, here in a form of its own.
    "klein_gordon": (
        lambda p: 0.0 * p[0],
        lambda p: (
            np.mean(_klein_gordon_source(p) ** 2)
            + np.mean(_line() ** 2)
            + np.mean((np.cos(5 * np.pi * _line()) + _line() ** 3) ** 2) / 2
        ),
    ),
    # x of period 2 has a jump of 2, and 2 x (1 - x^2) as reaction.
    "allen_cahn": (
        lambda p: p[0],
        lambda p: (
            np.mean((5 * (p[:, 0] - p[:, 0] ** 3)) ** 2)
            + np.mean((_line(low=-1) - (np.cos(np.pi * _line(low=-1)) + np.cos(2 * np.pi * _line(low=-1))) / 2) ** 2)
            + 4
        ),
    ),
    # x^2 has slopes of -2 and 2 at the walls.
    "allen_cahn_slopes": (
        lambda p: p[0] ** 2,
        lambda p: (
            np.mean((0.01 + 5 * (p[:, 0] ** 2 - p[:, 0] ** 6)) ** 2)
            + np.mean(
                (_line(low=-1) ** 2 - (np.cos(np.pi * _line(low=-1)) + np.cos(2 * np.pi * _line(low=-1))) / 2) ** 2
            )
            + 16
        ),
    ),
}


def _klein_gordon_source(points):
    x, t = np.asarray(points).T
    wave = x * np.cos(5 * np.pi * t)
    return -((5 * np.pi) ** 2) * wave + 6 * x**3 * t - 6 * x * t**3 + (wave + x**3 * t**3) ** 3


@pytest.mark.parametrize("name", _WRONG)
def test_the_loss_of_an_equation_is_what_is_amiss(name):
    wrong, expected = _WRONG[name]
    equation = EQUATIONS[name if name in EQUATIONS else name.rpartition("_")[0]]
    with jax.enable_x64(True):
        points = jnp.asarray(equation.points(100, seed=0), jnp.float64)
        assert float(equation.loss(wrong, points)) == pytest.approx(float(expected(points)), rel=1e-10)


def _two_waves(x):
    return (np.cos(np.pi * x) + np.cos(2 * np.pi * x)) / 2


def test_the_reference_of_allen_cahn_does_not_change_with_its_resolution():
    coarse = spectral.allen_cahn(_two_waves, 0.005, 5.0, modes=192, times=48)
    fine = spectral.allen_cahn(_two_waves, 0.005, 5.0)
    assert coarse.shape == (48, 192)
    assert fine.shape == (64, 256)
    fine[:48, :192] -= coarse
    assert np.abs(fine).sum() < 1e-6  # which bounds the change of the function anywhere


def test_the_reference_of_allen_cahn_is_right_where_the_solution_is_known():
    """A constant solves Bernoulli's differential equation, and without a reaction waves die out by themselves."""
    t = np.linspace(0, 1, 11)
    constant = spectral.allen_cahn(lambda x: np.full_like(x, 0.1), 0.005, 5.0, modes=8)
    np.testing.assert_allclose(constant[:, 1:], 0, atol=1e-15)
    found = np.polynomial.chebyshev.chebval(2 * t - 1, constant[:, 0])
    np.testing.assert_allclose(found, 1 / np.sqrt(1 + 99 * np.exp(-10 * t)), rtol=1e-10)
    linear = spectral.allen_cahn(_two_waves, 0.1, 0.0, modes=8)
    for mode in (1, 2):
        found = np.polynomial.chebyshev.chebval(2 * t - 1, linear[:, mode])
        np.testing.assert_allclose(found, np.exp(-0.1 * (np.pi * mode) ** 2 * t) / 2, rtol=1e-10)


def test_the_solution_of_allen_cahn_in_float32_is_that_in_float64():
    equation = EQUATIONS["allen_cahn"]
    points = equation.points(200, seed=3)
    single = np.asarray(jax.vmap(equation.solution)(jnp.asarray(points)))
    with jax.enable_x64(True):
        double = np.asarray(jax.vmap(equation.solution)(jnp.asarray(points, jnp.float64)))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=2e-5)
    assert double.min() < -0.99 < 0.99 < double.max()


@pytest.mark.parametrize("name", ["poisson_drawn", "burgers_drawn"])
def test_points_are_drawn_anew_at_each_update(name):
    task = tasks.build(name, tasks.Sources())
    assert task.name == name
    drawn = [np.asarray(batch["points"]) for batch in itertools.islice(training.batches(task, 1024, seed=0), 20)]
    points = np.concatenate(drawn)
    assert len(np.unique(points, axis=0)) >= len(points) - 2  # two may fall together in float32
    assert task.num_train // 1024 == 1024
    equation = EQUATIONS[name.removesuffix("_drawn")]
    low, high = np.array(equation.low), np.array(equation.high)
    np.testing.assert_allclose(points.mean(axis=0), (low + high) / 2, atol=0.02 * (high - low).max())


@functools.cache
def _small(name):
    """The task on few points, so that a step is short."""
    task = tasks.build(name, tasks.Sources())
    count = 1024 if name == "image_field" else 128
    stride = len(jax.tree.leaves(task.train)[0]) // count
    return dataclasses.replace(task, train=jax.tree.map(lambda x: x[::stride], task.train), num_eval=count)


@pytest.mark.parametrize("name", ["reaction", "allen_cahn", "burgers_drawn", "image_field"])
def test_a_short_training_lowers_loss_and_error(name):
    task = _small(name)
    evaluation = training.Evaluation(task)
    start, _ = evaluation.test(task.init(jax.random.key(0)))
    found = training.run(training.Program(task, METHODS["adam"], 128), evaluation, 0.01, 100, seed=0)
    assert found["status"] == "ok"
    assert found["final_loss"] < 0.5 * found["losses"][0]
    assert found["test_loss"] < 0.95 * start


def test_the_image_has_pixels_of_a_formula_and_is_tested_between_them():
    task = tasks.build("image_field", tasks.Sources())
    assert task.train["points"].shape == (4096, 2)
    assert task.num_test <= training._EVALUATION_CHUNK
    x, y = task.train["points"][1]
    assert (x, y) == (0.5 / 64, 1.5 / 64)
    values = task.train["values"]
    expected = (
        0.5
        + 0.2 * np.cos(8 * np.pi * (x**2 + y**2))
        + 0.3 * np.tanh(20 * (0.25 - np.sqrt((x - 0.6) ** 2 + (y - 0.4) ** 2 + 1e-4)))
    )
    assert values[1] == pytest.approx(expected, rel=1e-5)
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.std() > 0.2
