"""The harness of `benchmarks.target`: rules and arithmetic, and a small study from end to end. No timing is checked."""

import dataclasses
import functools
import importlib.util
import json
import math
import socket
import struct
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import dho2_optax as dho2
from benchmarks import accelerator, bounds, compile, hostile, machine, memory, networks, plan, scale, shapes, soak, wire
from benchmarks.target import methods, report, safeguards, tasks, training
from benchmarks.target.equations import EQUATIONS, relative_error
from benchmarks.target.interface import Method, Setting, Trainer
from benchmarks.target.methods import METHODS, select
from benchmarks.target.store import TUNING_SEED, Store, best_rate
from benchmarks.target.study import Study, tune
from dho2_optax import subspace
from dho2_optax.subspace import Bounds

NUM_STEPS = 24
BATCH_SIZE = 256


@pytest.fixture(scope="module")
def digits():
    return tasks.build("digits_mlp", tasks.Sources())


@pytest.fixture(scope="module")
def evaluation(digits):
    return training.Evaluation(digits)


def test_a_best_rate_inside_the_grid_ends_the_search():
    losses = tune(lambda rate: abs(math.log2(rate)), centre=1.0)
    assert sorted(losses) == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert best_rate(losses) == 1.0


def test_a_best_rate_at_the_edge_widens_the_grid_until_it_is_inside():
    assert max(tune(lambda rate: abs(math.log2(rate / 8)), centre=1.0)) == 16.0
    assert min(tune(lambda rate: abs(math.log2(rate * 8)), centre=1.0)) == 0.0625


def test_the_grid_is_widened_four_times_at_most():
    losses = tune(lambda rate: -rate, centre=1.0)
    assert len(losses) == 9
    assert best_rate(losses) == max(losses) == 64.0


def test_where_everything_diverges_smaller_rates_are_tried():
    losses = tune(lambda rate: math.inf if rate > 0.2 else rate, centre=1.0)
    assert min(losses) == 0.25 / 16


def test_the_grid_stays_within_limits():
    assert sorted(tune(lambda value: value, centre=2, limits=(1, 64))) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("target", "steps"), [(3.0, 0.0), (2.0, 0.0), (1.5, 5.0), (1.0, 10.0), (0.75, 25.0), (0.5, 30.0), (0.4, None)]
)
def test_crossing_interpolates_the_first_time_below(target, steps):
    assert report.crossing([0, 10, 20, 30], [2.0, 1.0, 1.0, 0.5], target) == steps


def test_crossing_is_the_first_of_several():
    assert report.crossing([0, 10, 20, 30], [2.0, 1.0, 3.0, 1.0], 1.5) == 5.0


def _row(losses, shortened=(), status="ok"):
    run = {"status": status, "steps": [0, 10, 20], "losses": losses, "final_loss": losses[-1]}
    return report.Row("a", {}, 1.0, {1.0: 0.0}, [run], dict(shortened), 0.5)


def test_a_shortened_schedule_counts_where_it_is_sooner_than_the_curve():
    losses = [4.0, 3.0, 1.0]
    assert _row(losses).steps_to(1.5) == 17.5
    assert _row(losses, {10: 2.0, 15: 1.4}).steps_to(1.5) == 15
    assert _row(losses, {18: 1.4}).steps_to(1.5) == 17.5
    assert _row(losses, {15: math.inf}).steps_to(0.5) is None
    assert _row(losses, status="diverged").steps_to(1.5) is None


def test_the_schedule_warms_up_from_above_zero_to_the_peak_and_ends_at_zero():
    setting = Setting(None, 1, 2.0, 100)
    rates = np.array([float(setting.schedule(count)) for count in range(101)])
    assert 0 < rates[0] < rates[1]
    assert rates.argmax() == 5
    np.testing.assert_allclose([rates[5], rates[100]], [2.0, 0.0], atol=1e-6)


def test_curves_have_twenty_points_and_the_start():
    assert len(training.evaluation_steps(400)) == 21
    assert training.evaluation_steps(12) == list(range(13))


def test_select_takes_names_and_kinds_in_the_order_of_the_registry():
    assert list(select(["dho2_adam", "sgd"])) == ["sgd", "dho2_adam"]
    assert {METHODS[name].kind for name in select(["hybrid"])} == {"hybrid"}
    with pytest.raises(ValueError, match="adm"):
        select(["adm"])


def test_the_command_names_packages_and_modules():
    here = machine.__file__
    for file, name in (
        ("machine.py", "benchmarks.machine"),
        ("target/__main__.py", "benchmarks.target"),
        ("target/report.py", "benchmarks.target.report"),
    ):
        assert f"python -m {name} --x" == machine.describe([here.replace("machine.py", file), "--x"])["command"]


def test_a_machine_without_git_is_described(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.describe([machine.__file__])["commit"] == "unknown"


def test_texts_are_cut_in_sequences_that_predict_the_next_character(tmp_path):
    for name, text in (("b_gut.txt", "xy" * 500), ("a_gut.txt", "ab" * 500), ("metadata.txt", "?")):
        (tmp_path / name).write_text(text)
    task = tasks.build("transformer", tasks.Sources(text=str(tmp_path)))
    characters, following = task.train["characters"], task.train["next"]
    assert characters.shape == (28, 64)  # of 90% of 2001 characters
    np.testing.assert_array_equal(characters.ravel()[1:], following.ravel()[:-1])
    assert task.test["characters"].shape == (3, 64)
    with pytest.raises(ValueError, match=r"no \*\.txt files"):
        tasks.build("lstm", tasks.Sources(text=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="--text"):
        tasks.build("lstm", tasks.Sources())


def test_a_run_that_diverges_is_data(digits, evaluation):
    program = training.Program(digits, METHODS["sgd"], BATCH_SIZE)
    found = training.run(program, evaluation, 1e6, NUM_STEPS, seed=0)
    assert (found["status"], found["final_loss"], found["test_accuracy"]) == ("diverged", None, None)
    assert np.all(np.isfinite(found["losses"]))


def test_one_compilation_serves_all_rates_lengths_and_seeds(digits, evaluation):
    """And it gives what the same optimizer gives with plain numbers."""
    traces = []

    def build(setting):
        traces.append(setting.rate)
        return METHODS["sgd"].build(setting)

    once = Method("", "baseline", build, {"default": 0.1})
    program = training.Program(digits, once, BATCH_SIZE)
    training.run(program, evaluation, 0.1, 4, seed=0)
    num_traced = sum(isinstance(rate, jax.core.Tracer) for rate in traces)
    found = training.run(program, evaluation, 0.2, 8, seed=1)
    assert sum(isinstance(rate, jax.core.Tracer) for rate in traces) == num_traced
    again = Method("", "baseline", METHODS["sgd"].build, {"default": 0.1}, compiled="for each rate")
    expected = training.run(training.Program(digits, again, BATCH_SIZE), evaluation, 0.2, 8, seed=1)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)


def test_a_method_may_compile_itself(digits, evaluation):
    """As those of other libraries do: its functions see concrete numbers and are called as they are."""

    def build(setting):
        assert isinstance(setting.rate, float)
        return Trainer(
            init=lambda params, batch: (params, 0),
            step=lambda carry, batch: ((carry[0], carry[1] + 1), setting.task.loss_fn(carry[0], batch)),
            params=lambda carry: carry[0],
            products=lambda carry: carry[1],
        )

    own = Method("", "baseline", build, {"default": 0.1}, compiled="by itself")
    found = training.run(training.Program(digits, own, BATCH_SIZE), evaluation, 0.1, 3, seed=0)
    assert found["products"] == 3
    assert len(set(found["losses"])) == 1


def test_a_study_resumes_and_is_reported(digits, tmp_path):
    folder = tmp_path / "results" / f"digits_mlp_{BATCH_SIZE}"
    log = []
    registry = {"sgd": METHODS["sgd"], "dho2_sgd": methods._dho2("sgd", rank=2, order=4, refresh_interval=10)}

    def study(*names):
        return Study(
            digits,
            {name: registry[name] for name in names},
            BATCH_SIZE,
            NUM_STEPS,
            Store(folder),
            seeds=2,
            log=log.append,
        )

    study("dho2_sgd").final()
    study("sgd").all(chunk=2, repeats=1)
    files = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    assert set(files) == {"sgd.json", "dho2_sgd.json", "_timing.json"}
    assert set(files["_timing.json"]["methods"]) == {"sgd"}
    lengths = [run["num_steps"] for run in files["dho2_sgd.json"]["runs"].values() if run["seed"] == 1]
    assert sorted(lengths) == [8, 12, 16, 24]
    assert all(run["products"] > 0 for run in files["dho2_sgd.json"]["runs"].values() if run["status"] == "ok")

    log.clear()
    study("dho2_sgd").final()
    study("sgd").all(chunk=2, repeats=1)
    assert log == []
    key = next(iter(files["sgd.json"]["runs"]))
    del files["sgd.json"]["runs"][key]
    (folder / "sgd.json").write_text(json.dumps(files["sgd.json"]))
    study("sgd", "dho2_sgd").final()
    assert len(log) == 1

    # The grid of one seed holds both rates, the two other seeds are new.
    before = len(Store(folder).runs("dho2_sgd"))
    rate = report.summarize(Store(folder)).rows[0].rate
    study("dho2_sgd").robust()
    runs = Store(folder).runs("dho2_sgd").values()
    assert len(runs) > before
    for factor in (1, 2):
        assert {0, 1} <= {run["seed"] for run in runs if run["rate"] == factor * rate}
    counted = [run for run in runs if run["rate"] <= 2 * rate and run["num_steps"] == NUM_STEPS]
    failed = sum(run["status"] != "ok" for run in counted)
    assert f"| dho2_sgd | {rate:g} | {len(counted)} | {failed} | " in report.robustness([folder])

    summary = report.summarize(Store(folder))
    assert [row.method for row in summary.rows] == ["sgd", "dho2_sgd"]
    sgd = summary.rows[0]
    assert sgd.steps_to(sgd.loss) <= NUM_STEPS
    docs = tmp_path / "docs"
    docs.mkdir()
    page = report.write(tmp_path / "results", docs).read_text()
    assert f"## digits_mlp, batch {BATCH_SIZE}" in page
    assert "to SGD's loss" in page
    assert "1.00x" in page
    assert (docs / f"benchmarks_digits_mlp_{BATCH_SIZE}.png").stat().st_size > 0


def test_runs_beside_those_of_the_base_are_counted(tmp_path):
    store = Store(tmp_path / "a_64")

    def fill(method, head, losses):
        for (rate, seed), loss in losses.items():
            made = {"status": "diverged" if loss is None else "ok", "final_loss": loss, "losses": [1.0], "steps": [0]}
            store.run(method, head, lambda *_, made=made: made, rate, 10, seed)

    base = {(0.1, TUNING_SEED): 2.0, (0.2, TUNING_SEED): 1.0, (0.4, TUNING_SEED): 3.0, (0.8, TUNING_SEED): None}
    fill("adam", {"kind": "baseline", "options": {}}, base | {(0.2, 0): 1.0, (0.4, 0): None})
    hybrid = {(0.1, TUNING_SEED): 2.1, (0.2, TUNING_SEED): 1.2, (0.4, TUNING_SEED): 9.5, (0.8, TUNING_SEED): None}
    fill("dho2_adam", {"kind": "hybrid", "options": {"base": "adam"}}, hybrid | {(0.2, 0): 0.5, (0.2, 1): 9.0})
    fill("dho2_sgd", {"kind": "hybrid", "options": {"base": "sgd"}}, {(0.1, TUNING_SEED): 1.0})
    lines = report.robustness([store.folder]).splitlines()
    assert lines[2:] == ["| a_64 | 10 | dho2_adam | 0.2 | 5 | 0 | 1 of 5 | 3 | 1 | 4 | 1 |"]


def test_each_length_that_methods_were_tuned_for_has_a_table_of_its_own(tmp_path):
    store = Store(tmp_path / "a_64")
    losses = {(10, TUNING_SEED): 2.0, (10, 0): 2.5, (20, TUNING_SEED): 1.0, (20, 0): 1.5, (30, 0): 1.0}
    for (num_steps, seed), loss in losses.items():
        made = {"status": "ok", "final_loss": loss, "losses": [3.0, loss], "steps": [0, num_steps]}
        store.run("adam", {"kind": "baseline", "options": {}}, lambda *_, made=made: made, 0.1, num_steps, seed)
    assert report.lengths(store) == [20, 10]
    assert report.summarize(store) == report.summarize(store, 20)
    for num_steps, loss, shortened in ((20, 1.5, {10: 2.5}), (10, 2.5, {})):
        (row,) = report.summarize(store, num_steps).rows
        assert (row.loss, row.shortened) == (loss, shortened)


def test_gains_by_batch_size_are_steps_and_seconds_to_the_loss_of_adam():
    def row(method, kind, losses, seconds):
        run = {"status": "ok", "steps": [0, 10, 20], "losses": losses}
        return report.Row(method, {"kind": kind, "batch_size": 64}, 1.0, {1.0: 0.0}, [run], {}, seconds)

    adam = row("adam", "baseline", [2.0, 1.5, 1.0], 0.1)
    fast, slow = row("dho2_adam", "hybrid", [2.0, 1.0, 0.5], 0.16), row("mr_dho2_adam", "hybrid", [2.0, 1.5, 1.2], 0.1)
    summary = report.Summary("a_64", 20, [adam, fast, slow], {"Adam's loss": adam})
    lines = report.by_batch_size([summary, summary._replace(rows=[adam])]).splitlines()
    assert lines[2] == "| 64 | 1 | 0.5 | 2.00x in steps, 1.25x in time | 1.2 | not reached |"
    assert lines[3] == "| 64 | 1 | - | - | - | - |"


def test_results_of_other_options_are_not_mixed(tmp_path):
    store = Store(tmp_path)
    made = {"status": "ok", "final_loss": 1.0}
    store.run("a", {"options": {"rank": 8}}, lambda *_: made, 0.1, 10, 0)
    with pytest.raises(ValueError, match="other options"):
        store.run("a", {"options": {"rank": 4}}, lambda *_: made, 0.1, 10, 0)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.kind != "ablation" and m.compiled != "by itself"])
def test_every_method_can_be_traced_with_the_rate_it_is_given(digits, name):
    """Nothing is compiled: shapes and types of the carry must come out as they went in."""
    method = METHODS[name]
    task = tasks.build("reaction", tasks.Sources()) if method.least_squares else digits
    batch_size = task.num_train if method.least_squares else BATCH_SIZE
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.asarray(x[:batch_size]), task.train))
    numbers = (0.01, 100) if method.compiled == "once" else ()

    def step(params, batch, *numbers):
        trainer = method.build(Setting(task, batch_size, *(numbers or (method.centre(task.name), 100))))
        carry = trainer.init(params, batch)
        return carry, trainer.step(carry, batch)

    before, (after, loss) = jax.eval_shape(step, params, batch, *numbers)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("predictions", "batch_size", "wanted", "expected"),
    [
        (1, 1000, None, 256),
        (1, 8192, None, 1024),
        (1, 100, None, 100),
        (64, 256, None, 32),
        (64, 8, None, 4),
        (1, 1000, 128, 128),
        (1, 64, 128, 64),
    ],
)
def test_products_are_made_on_a_part_of_the_batch(digits, predictions, batch_size, wanted, expected):
    task = dataclasses.replace(digits, predictions=predictions)
    assert methods._curvature_batch_size(Setting(task, batch_size, 0.1, 100), wanted) == expected


def test_products_of_a_task_are_made_on_its_share_of_the_batch(digits):
    task = dataclasses.replace(digits, curvature_share=1.0)
    assert methods._curvature_batch_size(Setting(task, 1024, 0.1, 100), None) == 1024


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_exact_solution_has_no_loss_and_no_error(name):
    equation = EQUATIONS[name]
    with jax.enable_x64(True):
        points = jnp.asarray(equation.points(100, seed=0), jnp.float64)
        assert np.all((points >= np.array(equation.low)) & (points <= np.array(equation.high)))
        assert equation.loss(equation.solution, points) < 1e-15
        assert relative_error(equation.solution, equation.solution, points) == 0
        assert relative_error(lambda p: 1.25 * equation.solution(p), equation.solution, points) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        # Speed 9 instead of 10: the residual is cos(x - 9 t).
        ("convection", lambda p: jnp.sin(p[0] - 9 * p[1]), lambda p: jnp.mean(jnp.cos(p[:, 0] - 9 * p[:, 1]) ** 2)),
        # A solution of the equation, periodic, that starts with 1 too much.
        ("convection", lambda p: jnp.sin(p[0] - 10 * p[1]) + 1, lambda p: 1.0),
        # One that is not periodic, and starts with x too much.
        (
            "convection",
            lambda p: jnp.sin(p[0] - 10 * p[1]) + p[0] - 10 * p[1],
            lambda p: (2 * np.pi) ** 2 + np.mean(np.linspace(0, 2 * np.pi, 128) ** 2),
        ),
        # Harmonic, so amiss at the boundary only: x on two sides, 0 and 1 on the others.
        (
            "poisson",
            lambda p: EQUATIONS["poisson"].solution(p) + p[0],
            lambda p: (1 + 2 * np.mean(np.linspace(0, 1, 128) ** 2)) / 4,
        ),
        ("poisson", lambda p: 0.0 * p[0], lambda p: jnp.mean((5 * np.pi**2 * EQUATIONS["poisson"].solution(p.T)) ** 2)),
        # A wave that solves the equation, with values of its own at the start and at the walls.
        (
            "burgers",
            lambda p: p[0] / (1 + p[1]),
            lambda p: (
                np.mean((np.linspace(-1, 1, 128) + np.sin(np.pi * np.linspace(-1, 1, 128))) ** 2)
                + np.mean(1 / (1 + np.linspace(0, 1, 128)) ** 2)
            ),
        ),
        # Without viscosity: the residual is nu u_xx = 2 nu.
        (
            "burgers",
            lambda p: p[0] ** 2,
            lambda p: (
                jnp.mean((2 * p[:, 0] ** 3 - 0.2 / np.pi) ** 2)
                + np.mean((np.linspace(-1, 1, 128) ** 2 + np.sin(np.pi * np.linspace(-1, 1, 128))) ** 2)
                + 1
            ),
        ),
    ],
)
def test_the_loss_of_an_equation_is_what_is_amiss_inside_and_at_the_boundary(name, wrong, expected):
    with jax.enable_x64(True):
        points = jnp.asarray(EQUATIONS[name].points(100, seed=0), jnp.float64)
        assert float(EQUATIONS[name].loss(wrong, points)) == pytest.approx(float(expected(points)), rel=1e-10)


@pytest.mark.parametrize("name", EQUATIONS)
def test_an_equation_is_trained_on_all_its_points(name):
    task = tasks.build(name, tasks.Sources())
    params = task.init(jax.random.key(0))
    assert [x.shape for x in jax.tree.leaves(params) if x.ndim == 2] == [(2, 50), (50, 50), (50, 50), (50, 1)]
    assert task.train["points"].shape == (1024, 2)
    assert task.num_test <= training._EVALUATION_CHUNK
    small = dataclasses.replace(task, train={"points": task.train["points"][:64]})
    found = training.run(training.Program(small, METHODS["adam"], 64), training.Evaluation(small), 1e-3, 3, seed=0)
    assert found["status"] == "ok"
    assert found["losses"][-1] < found["losses"][0]
    assert 0 < found["test_loss"] < 10


def _guarded_run(guard, losses=None, num_steps=9, **options):
    """States and updates of a guarded optimizer on a quadratic whose curvature doubles at every update."""

    def make(**given):
        options_of_all = {"rank": 1, "order": 8, "tolerance": 1e-6, "refresh_interval": 3, **options}
        return dho2.dho2(
            optax.sgd(0.01),
            lambda p, b: b * jnp.sum(jnp.arange(1.0, 9.0) * p**2),
            **methods.grouped(**options_of_all | given),
        )

    tx = guard(make)
    params = jnp.ones(8)
    state = tx.init(params)
    found = []
    update = jax.jit(tx.update)
    for step in range(num_steps):
        value = 1.0 if losses is None else losses[step]
        updates, state = update(params, state, params, batch=jnp.asarray(2.0**step), value=jnp.asarray(value))
        found.append((updates, state))
    return found


def test_a_bounded_displacement_is_a_part_of_the_parameters():
    lengths = [float(jnp.linalg.norm(u)) for u, _ in _guarded_run(safeguards.bounded_displacement(0.005))]
    assert max(lengths) == pytest.approx(0.005 * 8**0.5)
    free = [float(jnp.linalg.norm(u)) for u, _ in _guarded_run(safeguards.bounded_displacement(100.0))]
    assert max(free) > max(lengths)
    np.testing.assert_allclose(lengths, np.minimum(free, 0.005 * 8**0.5), rtol=1e-5)


def test_smoothed_eigenvalues_are_means_from_the_second_refresh_on():
    found = [float(state.spectrum.eigenvalues[0]) for _, state in _guarded_run(safeguards.smoothed_eigenvalues(0.25))]
    first, second, third = (16 * 2.0**count for count in (2, 5, 8))
    expected = [0, 0, *[first] * 3, *[0.25 * second + 0.75 * first] * 3]
    np.testing.assert_allclose(found, [*expected, 0.25 * third + 0.75 * expected[-1]], rtol=1e-4)


def test_a_loss_that_rises_halves_the_limit_and_it_grows_back():
    losses = [1.0, 1.0, 1.5, 1.0, 9.0, 9.0, 1.0, 1.0, 1.0]
    states = [state for _, state in _guarded_run(safeguards.limited_by_loss(1.1), losses)]
    limits = [float(state.limit) for state in states]
    np.testing.assert_allclose(limits, [3, 3, 1.5, 1.515, 1, 1, 1.01, 1.01**2, 1.01**3], rtol=1e-5)
    growing = {"base_scale_growth": 10.0, "sharpness_limit": float("inf"), "refresh_interval": 1}
    for _, state in _guarded_run(safeguards.limited_by_loss(1.1), losses, **growing):
        assert float(state.inner_state.sigma) <= float(state.limit) * (1 + 1e-6)


@pytest.mark.parametrize("leaves", compile.NETWORKS)
def test_the_networks_that_are_compiled_have_the_leaves_they_are_named_by(leaves):
    assert len(jax.tree.leaves(jax.eval_shape(compile.NETWORKS[leaves]().init, jax.random.key(0)))) == leaves


def test_the_leaves_of_a_residual_network_are_those_of_resnet_50():
    network = accelerator.SCALES["full"].networks["resnet"](dtype=jnp.bfloat16)
    found = jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0)))
    assert (len(found), sum(x.size for x in found)) == (161, 25_557_032)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["transformer", "resnet"])
def test_every_step_on_an_accelerator_can_be_traced_and_gives_what_it_takes(name, dtype):
    """Nothing is compiled. Products are made on less than the batch."""
    network = accelerator.SCALES["small"].networks[name](dtype=jnp.dtype(dtype))
    params, batch = jax.eval_shape(network.init, jax.random.key(0)), jax.eval_shape(network.batch, jax.random.key(1))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert jax.eval_shape(network.loss_fn, params, batch).dtype == jnp.float32
    for method_name in accelerator.METHODS:
        method = accelerator._method(method_name, network.loss_fn, 2, 5)
        state = jax.eval_shape(method.init, params)
        after = jax.eval_shape(method.step, params, state, batch)
        same = lambda x: (x.shape, x.dtype)  # noqa: E731
        assert jax.tree.map(same, after) == jax.tree.map(same, (params, state))


@pytest.mark.parametrize(("name", "classes"), [("transformer", 32), ("resnet", 8)])
def test_a_network_that_knows_nothing_has_the_loss_of_guessing(name, classes):
    network = accelerator.SCALES["small"].networks[name](dtype=jnp.float32)
    params = jax.jit(network.init)(jax.random.key(0))
    flat = {**params, **{key: jax.tree.map(jnp.zeros_like, params[key]) for key in ("logits", "head") if key in params}}
    loss_fn, batch = jax.jit(network.loss_fn), network.batch(jax.random.key(1))
    assert float(loss_fn(flat, batch)) == pytest.approx(math.log(classes))
    assert float(loss_fn(params, batch)) != pytest.approx(math.log(classes))


def test_a_compilation_is_measured_and_what_precedes_it():
    row = compile.measure(3, "adam", 1)
    assert row["median"].keys() == {"init", *compile.PARTS}
    assert all(x > 0 for x in row["median"].values())
    shown = compile.table({"rows": [row], "lines_per_leaf": compile.lines_per_leaf([row])})
    assert f"| first state of adam | {row['median']['init']:.2f} s |" in shown


@pytest.mark.parametrize("name", compile.METHODS)
def test_every_step_that_is_compiled_gives_what_it_takes(name):
    network = compile.NETWORKS[3]()
    method = compile.METHODS[name](network.loss_fn)
    params, batch = jax.eval_shape(network.init, jax.random.key(0)), jax.eval_shape(network.batch, jax.random.key(1))
    state = jax.eval_shape(method.init, params)
    after = jax.eval_shape(method.step, params, state, batch)
    same = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert jax.tree.map(same, after) == jax.tree.map(same, (params, state))


def test_a_compilation_is_measured_part_by_part():
    row = compile.measure(3, "adam", repeats=2)
    assert row["num_params"] == 64 * 32 + 32 * 32 + 32 * 10
    assert set(row["median"]) == {"init", "trace", "lower", "compile"}
    assert all(len(row["seconds"][part]) == 2 and min(row["seconds"][part]) > 0 for part in row["median"])
    assert row["stablehlo_lines"] > 50
    assert 50 < row["hlo_instructions"] < row["hlo_lines"]


def _compiled(leaves, method, lines):
    median = {"trace": 0.25, "lower": 0.25, "compile": 1.0}
    counts = {"stablehlo_lines": 2 * lines, "hlo_lines": lines, "hlo_instructions": lines // 2}
    return {"leaves": leaves, "method": method, "median": median, **counts}


def test_lines_per_leaf_are_those_beyond_the_floor():
    rows = [
        _compiled(29, "floor_adam", 1000),
        _compiled(113, "floor_adam", 1000 + 84 * 30),
        _compiled(29, "dho2_adam", 3000),
        _compiled(113, "dho2_adam", 3000 + 84 * 50),
        _compiled(29, "mr_dho2_adam", 3000),
    ]
    assert compile.lines_per_leaf(rows) == {
        "dho2_adam": {"stablehlo_lines": 40.0, "hlo_lines": 20.0, "hlo_instructions": 10.0}
    }
    lines = compile.table({"rows": rows, "lines_per_leaf": compile.lines_per_leaf(rows)}).splitlines()
    assert lines[0] == "| step | 29 leaves | 113 leaves |"
    assert lines[3] == "| dho2_adam | 1.5 s (0.5), 3000 lines | 1.5 s (0.5), 7200 lines |"
    assert lines[4] == "| mr_dho2_adam | 1.5 s (0.5), 3000 lines | - |"
    assert lines[6] == "dho2_adam adds 20 lines a leaf to those of floor_adam (10 instructions), and 40 of StableHLO."


_PROGRAM = """HloModule jit_f

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p)
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %d = f32[8]{0} dot(%f, %f), lhs_contracting_dims={0}
  ROOT %r = (s32[], f32[8]{0}) tuple(%i, %d)
}

%taken (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%x)
}

ENTRY %main (a: f32[8], b: pred[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = pred[] parameter(1)
  %zero = s32[] constant(0)
  %s = (s32[], f32[8]{0}) tuple(%zero, %a)
  %w = (s32[], f32[8]{0}) while(%s), condition=%body, body=%body
  %y = f32[8]{0} get-tuple-element(%w), index=1
  %z = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused
  ROOT %o = f32[8]{0} conditional(%b, %z, %z), branch_computations={%taken, %taken}
}
"""


def test_kernels_are_counted_by_where_they_are_started():
    assert accelerator.kernels(_PROGRAM) == {
        "always": {"total": 3, "while": 1, "fusion": 1, "conditional": 1},
        "loops": {"total": 2, "fusion": 1, "dot": 1},
        "branches": {"total": 1, "copy": 1},
    }


def test_items_without_time_are_left_out_and_failures_are_written(tmp_path):
    def fail():
        raise ValueError("one\ntwo")

    wanted = [
        accelerator.Item("long", 1000, lambda: {"x": 0}),
        accelerator.Item("failing", 1, fail),
        accelerator.Item("short", 1, lambda: {"x": 1}),
    ]
    states = accelerator.measure(wanted, tmp_path / "out", {"commit": "c"}, time.monotonic() + 100)
    assert states == {"long": "left out", "failing": "failed", "short": "ok"}
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert {name: found["status"] for name, found in files.items()} == states
    assert files["failing"]["error"] == "ValueError: one two"
    assert files["short"]["result"] == {"x": 1}
    assert all(found["commit"] == "c" for found in files.values())


def test_the_items_on_an_accelerator_are_in_the_order_of_importance(tmp_path):
    names = [item.name for item in accelerator.items(accelerator.SCALES["full"], tmp_path, 0.0)]
    assert len(names) == len(set(names)) == 2 * 2 * 3 + 2 + 1 + 1 + 1 + 2 * 3
    assert names[:5] == [
        "steps_transformer_float32_adam",
        "steps_transformer_float32_dho2_adam",
        "steps_transformer_float32_mr_dho2_adam",
        "floors_transformer_float32",
        "autoencoder",
    ]
    assert names[-1] == "compile_113_mr_dho2_adam"
    assert "overlap" in names  # there are eight devices


@pytest.mark.slow
def test_an_accelerator_is_measured(tmp_path, monkeypatch):
    """Without the data set, and on a network of three leaves: hybrids take long to compile."""
    monkeypatch.setattr(accelerator, "FASHION_MNIST", str(tmp_path / "missing"))
    monkeypatch.setattr(methods, "select", lambda names: {"adam": METHODS["adam"]})
    small = accelerator.SCALES["small"]._replace(
        networks={"mlp": lambda dtype: networks.mlp((12, 8, 8, 4), batch_size=16)}, dtypes=("float32",), leaves=()
    )
    deadline = time.monotonic() + 10_000
    wanted = [item for item in accelerator.items(small, tmp_path, deadline) if item.name != "overlap"]
    states = accelerator.measure(wanted, tmp_path, {}, deadline)
    assert set(states.values()) == {"ok"}
    results = {name: json.loads((tmp_path / f"{name}.json").read_text())["result"] for name in states}
    products = {name: results[f"steps_mlp_float32_{name}"]["products_per_step"] for name in accelerator.METHODS}
    assert products["adam"] == 0
    assert min(products["dho2_adam"], products["mr_dho2_adam"]) > 0
    assert all(results[f"steps_mlp_float32_{name}"]["num_params"] == 192 for name in accelerator.METHODS)
    found = results["floors_mlp_float32"]
    assert found["update"]["bytes"] == 4 * 192 * (4 * accelerator.RANK + 6)
    assert found["update"]["floor"] == pytest.approx(found["update"]["bytes"] / found["bandwidth"])
    assert 8 < found["refresh"]["products"] <= 16
    found = results["autoencoder"]
    assert found["complete"]
    assert found["data"] == "200 random images"
    assert len(found["methods"]["adam"]["final_losses"]) == 3
    assert 0 < found["methods"]["adam"]["steps to Adam's loss"] <= 4


_CHANGED = {
    "as it is": (1 / 1.6, False, 2.0),
    "no brake": (1.0, False, 2.0),
    "brake from 1.25 times the usual length on": (1.25 / 1.6, False, 2.0),
    "brake from 1.5 times on": (1.5 / 1.6, False, 2.0),
    "outliers as other gradients": (1 / 1.6, True, 2.0),
    "no least eigenvalue": (1 / 1.6, False, 0.0),
    "none of the three": (1.0, True, 0.0),
    "eigenvalues fall by half at most, in place of the three": (1.0, True, 0.0),
}


@pytest.mark.parametrize("name", bounds.RULES)
def test_a_rule_that_is_left_out_is_in_force_again_afterwards(name):
    def observed():
        numbers = map(jnp.float32, (1.0, 1.0, 1.6 / 0.9, 0.0, 1.0))  # one before was longer, and is remembered as 1.6
        after = Bounds(*numbers).after(jnp.float32(1))
        outlier = after._replace(last=jnp.float32(100), peak=jnp.float32(100))
        assert bool(outlier.is_usual()) == bool(outlier.trust())
        return float(after.brake), bool(outlier.trust()), float(subspace.least_eigenvalue(jnp.float32(1), 0.5, 1.0))

    with bounds.rule(name):
        assert observed() == pytest.approx(_CHANGED[name])
    assert observed() == pytest.approx(_CHANGED["as it is"])


@pytest.mark.slow
def test_the_rules_are_compared(tmp_path, monkeypatch, capsys):
    # The digits of the package, since Fashion-MNIST is not on every machine.
    monkeypatch.setattr(bounds.tasks, "Sources", functools.partial(tasks.Sources, data="digits"))
    monkeypatch.setattr(bounds, "HEALTHY", {"logistic": bounds.Healthy("logistic", "dho2_adam", 1000, 0.01, 40)})
    monkeypatch.setattr(bounds, "HOSTILE", {"problems": ["least squares"], "bases": ["adam"], "hybrids": ["dho2"]})
    rules = ["as it is", "eigenvalues fall by half at most, in place of the three"]
    out = tmp_path / "bounds.json"
    options = ["--healthy", "logistic", "--kinds", "dim 0.01", "--seeds", "2", "--steps", "60", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bounds", "--rules", *rules, *options])
    bounds.main()
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == rules
    assert all(row["cells"] == len(hostile.TIMES) for row in rows.values())
    assert rows[rules[0]]["beyond"] == 0
    losses = [row["final_losses"]["logistic"] for row in rows.values()]
    assert all(0 < loss < math.log(10) for pair in losses for loss in pair)
    assert losses[0][0] != losses[0][1]
    assert losses[0] != losses[1]
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bounds", "--print", "--out", str(out)])
    bounds.main()
    assert printed.endswith(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet50", 25_557_032), ("resnet152", 60_192_808), ("vgg16", 138_357_544), ("gpt2", 124_439_808)],
)
def test_published_networks_have_their_number_of_parameters(name, size):
    assert shapes.num_params(shapes.MODELS[name]()) == size


def test_scanned_layers_compute_what_layers_one_by_one_do():
    build = functools.partial(networks.transformer, 2, 16, num_heads=2, vocabulary=32, length=8, batch_size=4)
    one_by_one, scanned = build(), build(scanned=True)
    params, tokens = one_by_one.init(jax.random.key(0)), one_by_one.batch(jax.random.key(1))
    stacked = {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}
    assert jax.tree.structure(stacked) == jax.tree.structure(scanned.init(jax.random.key(0)))
    expected, found = one_by_one.loss_fn(params, tokens), scanned.loss_fn(stacked, tokens)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


TINY = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32), "bias": jax.ShapeDtypeStruct((512,), jnp.float32)}


def _tiny_rows(platform, cases):
    problem = memory.problem("resnet50")._replace(params=TINY)
    return [memory.measure(memory.Case("resnet50", platform, *case, rank=8), problem) for case in cases]


def test_what_curvature_holds_falls_with_the_devices():
    rows = _tiny_rows(
        "cpu", [(devices, method) for devices in (1, 8) for method in ("product", "dho2", "probe", "mr_dho2")]
    )
    vector = 4 * (512 * 512 + 512)
    assert rows[5]["state"]["eigenvectors"] == rows[1]["state"]["eigenvectors"] / 8 == vector
    assert rows[7]["state"]["basis"] == rows[3]["state"]["basis"] / 8 == 2 * vector
    for method in ("dho2", "mr_dho2"):
        one, eight = (memory.curvature_share(rows, memory.Case("resnet50", "cpu", n, method, 8)) for n in (1, 8))
        assert one == pytest.approx(memory.vectors_held(method, 8) * vector, rel=0.1)
        assert eight <= one / 7.5
    lines = memory.table({"rows": rows}).splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 1", "| 8"]
    assert "1/1.0" in lines[-2]


def test_the_picture_of_memory_is_in_the_unit_of_the_tables(tmp_path, monkeypatch):
    rows = json.loads(memory.RESULTS.read_text())["rows"]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    memory.plot(rows, tmp_path / "memory.png")
    [figure] = drawn
    assert figure.axes[0].get_ylabel() == "MiB on each device"
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    row = "| 8 | 1,602 | 4,213 | 2,611 | 1,721 |"  # devices, Adam, dho2, less Adam, curvature
    assert row in memory.table({"rows": rows}).partition("gpt2,")[2]
    for name, shown in (("update with dho2", 4213), ("curvature in dho2", 1721)):
        [size] = [y for x, y in lines[name] if x == 8]
        assert size == pytest.approx(shown, abs=0.5)
    assert figure.axes[0].yaxis.get_major_formatter()(1000.0) == "1,000"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the package libtpu is not installed")
def test_tpu_programs_are_read_without_a_tpu(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    [row] = _tiny_rows("v5e", [(64, "dho2")])
    vector = 4 * (512 * 512 + 512)
    assert row["state"]["eigenvectors"] == 8 * vector / 64
    # Of small vectors the compiler makes an all-gather an all-reduce.
    whole = [
        (found["where"], found["group"], found["count"]) for found in row["collectives"] if found["bytes"] >= vector
    ]
    assert whole == [("loop", 64, 2), ("step", 64, 1)]
    assert row["stacks"]
    assert max(stack["padded"] for stack in row["stacks"]) < 1.3


def _tpu_rows(num_params):
    vector = 4 * num_params
    gather = {"op": "all-gather", "bytes": vector, "count": 1}
    rows = []
    for method, touched in (("adam", 10), ("product", 16), ("dho2", 40)):
        case = memory.Case("resnet50", "v5e", 64, method, 8)
        found = [{**gather, "where": "step"}, {**gather, "where": "loop"}]
        found.append({"op": "reduce-scatter", "where": "loop", "bytes": vector / 64, "count": 1})
        cost = {"bytes accessed": touched * vector}
        rows.append({**case._asdict(), "num_params": num_params, "cost": cost, "collectives": found})
    return rows


def test_predicted_times_are_work_and_memory_and_communication():
    rows = _tpu_rows(1_000_000)
    assert scale.programs(rows[:2], "resnet50") is None
    found = scale.programs(rows, "resnet50")
    assert found == scale.Programs(4e6, 40e6, 24e6, 4e6, 8e6)
    chip = dataclasses.replace(scale.CHIPS["v5e"], links=math.inf, bandwidth=math.inf)
    work = scale.predict(found, 64 * chip.flops, chip, 64)
    assert work == pytest.approx((1, 1, 4))  # 16 products, on an eighth of the batch, of twice the work
    assert work.mean == pytest.approx(1.08)
    idle = scale.predict(found, 0.0, dataclasses.replace(scale.CHIPS["v5e"], links=math.inf), 64)
    assert idle == pytest.approx(tuple(x / 819e9 for x in (28e6, 40e6 + 2e6, 16 * (24e6 + 2e6))))
    assert scale.table(rows).count("| v5e |") == len(scale.DEVICES)


def test_without_programs_nothing_is_predicted(tmp_path, monkeypatch, capsys):
    for results in (tmp_path / "missing.json", tmp_path / "empty.json"):
        (tmp_path / "empty.json").write_text('{"rows": []}')
        monkeypatch.setattr(sys, "argv", ["scale", "--results", str(results)])
        with pytest.raises(SystemExit) as stopped:
            scale.main()
        assert stopped.value.code == 2
        assert "python -m benchmarks.memory" in capsys.readouterr().err


def test_predictions_stand_beside_what_was_measured():
    results = json.loads(plan.RESULTS.read_text())
    assert len(results["memory"]) >= 18
    for row in results["memory"]:
        ratio = plan.predicted_memory(row) / row["measured"]
        # A miss: there the compiler does with a whole vector less, and the plan says too much (docs/plan.md).
        missed = row["platform"] == "v5e" and row["devices"] == 256
        assert 0.95 < ratio < (1.3 if missed else 1.05), row
    for row in [*results["times"], *plan.earlier()]:
        said = plan.predicted(row)
        assert all(0 < said[name] < math.inf for name in ("update", "refresh"))
    assert plan.table(results).count("\n| ") == len(results["memory"]) + len(results["times"]) + 6


@pytest.mark.slow
def test_an_update_and_a_refresh_are_timed():
    row = plan.timed(plan.Case((16, 24, 8), 64, 2, 4, 2), 1, time.process_time)
    assert row["measured"]["update"] > 0
    assert plan.predicted(json.loads(json.dumps(row)))["update"] > 0


# The long run.


@pytest.mark.slow
def test_a_short_soak_shows_nothing_wrong():
    found = soak.run(500, warmup=250, every=50)
    assert soak.problems(found) == []
    assert [look["step"] for look in found["looks"]] == list(range(250, 501, 50))
    assert sum(x["counted"] for x in found["events"].values()) >= 3
    assert found["loss_last"] < 0.5 * found["loss_first"]


def test_a_soak_names_what_is_wrong():
    result = json.loads(soak.RESULTS.read_text())
    assert result["steps"] == 10_000
    assert soak.problems(result) == []
    assert "largest |VV' - I|" in soak.table(result)
    *_, last = result["looks"]
    last |= {"defect": 1e-4, "compilations": 99, "live_arrays": 999, "resident_mib": 1e6}
    result["events"]["nan"]["counted"] = 0
    result["events"]["dim"]["counted"] = 1
    result["parameters_finite"] = False
    assert len(soak.problems(result)) == 7


# Bytes on the wire.


def test_the_count_of_a_connection_is_read_where_linux_writes_it():
    def info(state):
        return struct.pack("=B135xI60xQQ40x", state, 7, 2**40 + 9, 9)

    assert wire.sent_by(info(1)) == (2**40, 7)
    assert wire.sent_by(info(6)) is None  # closed, and waiting


def test_the_bytes_of_open_connections_are_counted_but_for_those_of_the_coordinator():
    size = 10**6
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        port = server.getsockname()[1]
        with other:
            all_before, rest_before = wire.sent(0), wire.sent(port)
            thread = threading.Thread(target=one.sendall, args=(bytes(size),))
            thread.start()
            received = 0
            while received < size:
                received += len(other.recv(2**16))
            thread.join()
            assert wire.sent(0).since(all_before).bytes == size
            assert wire.sent(0).since(all_before).segments >= size / 2**16
            assert wire.sent(port).since(rest_before).bytes == 0


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_formula_is_that_of_the_plan(processes):
    size, products = 4 * 10**6, 6
    planned = dho2.plan(10**6, batch_size=256, devices=processes, hardware="h100", rank=3, order=products, interval=50)
    [form] = [x for x in planned.forms if x.name == "synchronous"]
    assert wire.formula("update", size, processes) == pytest.approx(form.step_bytes)
    assert wire.formula("refresh", size, processes, products) == pytest.approx(form.refresh_bytes)
    made_of = [wire.formula(x, size, processes) for x in ("all-gather", "reduce-scatter", "all-reduce")]
    assert wire.formula("adam", size, processes) == made_of[2] == made_of[0] + made_of[1]
    assert made_of[0] == size * (processes - 1) / processes


def test_rows_are_means_over_the_processes_and_are_shown():
    found = [
        {"parameters": 1000, "products": 8, "rows": {"refresh": [bytes_sent, 10], "all-reduce": [3072, 2]}}
        for bytes_sent in (31000, 35000)
    ]
    refresh, reduced = wire.summed(found)
    assert (refresh["bytes"], refresh["least"], refresh["most"]) == (33000, 31000, 35000)
    assert refresh["formula"] == 2 * 8 * 4000 / 2
    assert refresh["headers"] == 520
    assert reduced["formula"] == 4 * 768  # numbers that every number of processes divides
    shown = wire.table({"rows": [refresh, reduced]}).splitlines()
    assert shown[2] == "| 2 | 1,000 | refresh | 0.033 | 0.032 | 1.0312 | 0.969, 1.094 | 1.58% |"
    assert len(shown) == 4


@pytest.mark.slow
def test_two_processes_send_what_the_formula_says():
    """And some hundred bytes for every collective."""
    rows = wire.run(2, (128, 256, 128), calls=2)
    assert [row["what"] for row in rows] == ["adam", "update", "refresh", "all-gather", "reduce-scatter", "all-reduce"]
    for row in rows:
        assert 1 <= row["bytes"] / row["formula"] < 1.05, row
