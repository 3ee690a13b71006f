"""The scientific problems of `benchmarks.target`, and the methods that are there for full batches only.

Of the problems: their references, how points are drawn, and that training helps.

That exact solutions have no loss is tested for all equations in `test_benchmarks.py`.
"""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

from benchmarks import machine
from benchmarks.target import __main__ as command
from benchmarks.target import methods, report, spectral, tasks, training
from benchmarks.target.equations import EQUATIONS
from benchmarks.target.interface import Method, Setting
from benchmarks.target.methods import METHODS
from benchmarks.target.store import Store
from benchmarks.target.study import Study


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
    count = 512 if name == "image_field" else 128
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
    assert len(found["errors"]) == len(found["losses"])
    assert found["errors"][0] == pytest.approx(start, rel=1e-4)
    assert found["errors"][-1] == found["test_loss"]


def test_the_image_has_pixels_of_a_formula_and_is_tested_between_them():
    task = tasks.build("image_field", tasks.Sources())
    assert task.train["points"].shape == (4096, 2)
    assert task.num_test <= training._EVALUATION_CHUNK
    x, y = task.train["points"][1]
    assert (x, y) == (0.5 / 64, 1.5 / 64)
    values = task.train["values"]
    expected = (
        0.5
        + 0.2 * np.cos(16 * np.pi * (x**2 + y**2))
        + 0.3 * np.tanh(20 * (0.25 - np.sqrt((x - 0.6) ** 2 + (y - 0.4) ** 2 + 1e-4)))
    )
    assert values[1] == pytest.approx(expected, rel=1e-5)
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.std() > 0.2


@pytest.fixture(scope="module")
def line():
    """Least squares with a spread of curvatures, 16 samples."""
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32) * np.logspace(0, -1.5, 6, dtype=np.float32)
    samples = {"x": x, "y": x.sum(axis=1)}
    return tasks.Target(
        "line",
        lambda key: {"kernel": jnp.zeros(6)},
        lambda params, batch: jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2),
        samples,
        samples,
    )


def _train(trainer, task, params, steps):
    batch = jax.tree.map(jnp.asarray, task.train)
    carry = trainer.init(params, batch)
    step = jax.jit(trainer.step)
    for _ in range(steps):
        carry, _ = step(carry, batch)
    return trainer.params(carry)


def test_adam_has_half_of_the_updates_and_then_it_is_the_turn_of_lbfgs(line):
    start = line.init(jax.random.key(0))
    together = METHODS["adam_lbfgs"].build(Setting(line, 16, 0.05, 20))
    of_adam = _train(METHODS["adam"].build(Setting(line, 16, 0.05, 10)), line, start, 10)
    np.testing.assert_allclose(_train(together, line, start, 10)["kernel"], of_adam["kernel"], rtol=1e-6)
    after = _train(METHODS["lbfgs"].build(Setting(line, 16, 10, 10)), line, of_adam, 10)
    found = _train(together, line, start, 20)
    np.testing.assert_allclose(found["kernel"], after["kernel"], rtol=1e-3)
    assert line.loss_fn(found, line.train) < 1e-3 * line.loss_fn(of_adam, line.train)


@pytest.mark.parametrize("name", ["adam_broyden", "nys_newton_cg"])
def test_the_methods_for_full_batches_solve_least_squares(line, name):
    start = line.init(jax.random.key(0))
    if name == "adam_broyden":
        trainer, steps = METHODS[name].build(Setting(line, 16, 0.05, 60)), 60
    else:  # with a smaller sketch than of 60 vectors
        trainer, steps = methods._newton(Setting(line, 16, 1e-4, 20), rank=3, steps=10), 20
    found = _train(trainer, line, start, steps)
    assert line.loss_fn(found, line.train) < 1e-6 * line.loss_fn(start, line.train)
    assert int(trainer.products(trainer.init(start, line.train))) == 0


def test_on_the_full_batch_lbfgs_starts_with_the_gradient_at_which_its_search_has_ended(line):
    """The steps are those of fresh gradients, though the loss is the one in the state."""
    batch = jax.tree.map(jnp.asarray, line.train)
    twice = dataclasses.replace(line, train=jax.tree.map(lambda x: np.concatenate([x, x]), line.train))
    reused, fresh = (METHODS["lbfgs"].build(Setting(task, 16, 4, 10)) for task in (line, twice))
    one_of, other_of = jax.jit(reused.step), jax.jit(fresh.step)
    one = other = reused.init(line.init(jax.random.key(0)), batch)
    for _ in range(4):
        (one, loss), (other, right) = one_of(one, batch), other_of(other, batch)
        np.testing.assert_allclose(one[0]["kernel"], other[0]["kernel"], rtol=1e-4)
        np.testing.assert_allclose(loss, right, rtol=1e-4)
    marked = optax.tree.set(one[1], value=jnp.float32(7.0))
    assert one_of((one[0], marked), batch)[1] == 7
    assert other_of((one[0], marked), batch)[1] < 1


def test_a_study_leaves_out_what_is_not_made_for_it(line, tmp_path):
    log = []
    few = dataclasses.replace(METHODS["sgd"], most_parameters=5)
    names = {"sgd": METHODS["sgd"], "few": few, "adam_lbfgs": METHODS["adam_lbfgs"]}
    study = Study(line, names, 8, 4, Store(tmp_path), seeds=1, log=log.append)
    assert log == [
        "few is left out: for up to 5 parameters, here are 6",
        "adam_lbfgs is left out: for batches of all 16 samples only",
    ]
    with pytest.raises(ValueError, match="no method is left for line at batch size 8"):
        Study(line, {"few": few}, 8, 4, Store(tmp_path), log=log.append)
    study.time(chunk=1, repeats=1)
    assert set(Store(tmp_path).times()) == {"sgd"}
    assert METHODS["adam_lbfgs"].unfit(line, 16) is None
    assert METHODS["adam_broyden"].unfit(tasks.build("digits_mlp", tasks.Sources()), 1437) is not None
    assert all(METHODS["adam_broyden"].unfit(_small(name), 128) is None for name in ("wave", "burgers_drawn"))


@pytest.mark.parametrize(("steady", "counted"), [(True, 2), (False, 3)])
def test_the_time_of_a_step_is_the_mean_over_all_of_a_run_that_is_not_steady(line, steady, counted):
    method = Method("", "baseline", METHODS["sgd"].build, {"default": 0.1}, steady=steady)
    found = training.time_steps({"sgd": (training.Program(line, method, 16), 0.1)}, chunk=2, repeats=2)["sgd"]
    assert len(found["chunks"]) == counted
    middle = np.mean if not steady else np.median
    assert found["seconds_per_step"] == pytest.approx(middle(found["chunks"]))


def test_the_memory_of_a_step_counts_what_the_optimizer_keeps(line):
    programs = {name: (training.Program(line, METHODS[name], 16), 0.1) for name in ("sgd", "adam")}
    found = training.time_steps(programs, chunk=1, repeats=1)
    batch = sum(leaf.nbytes for leaf in line.train.values())
    assert found["sgd"]["bytes"] >= batch + 2 * 6 * 4  # parameters and momentum
    assert found["adam"]["bytes"] >= batch + 3 * 6 * 4
    assert found["adam"]["bytes"] > found["sgd"]["bytes"]


def test_errors_are_plotted_beside_the_losses(tmp_path):
    run = {"status": "ok", "steps": [0, 10, 20], "losses": [2.0, 1.0, 0.5], "errors": [1.0, 0.5, 0.1]}
    row = report.Row("adam", {"kind": "baseline"}, 1.0, {1.0: 0.0}, [run], {}, 0.1, 2**21)
    sizes = []
    for rows in ([row], [dataclasses.replace(row, finals=[{k: v for k, v in run.items() if k != "errors"}])]):
        report.plot(report.Summary("a_64", 20, rows, {}), tmp_path / "plot.png")
        sizes.append(matplotlib.image.imread(tmp_path / "plot.png").shape[:2])
    assert sizes == [(1000, 1600), (500, 800)]


@pytest.mark.parametrize(
    ("task", "method", "message"),
    [
        ("burgers_drawn", "adam_lbfgs", "error: no method is left for burgers_drawn at batch size 1024"),
        ("wave", "newton", "error: unknown methods ['newton']: choose from"),
    ],
)
def test_the_command_says_in_one_line_what_cannot_be_run(task, method, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "keep_memory", lambda module: None)  # which would start the program again
    monkeypatch.setattr(
        sys, "argv", ["target", task, "--batch-size", "1024", "--methods", method, "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
