import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_optax
from dho2_optax.metric import MATURE_AFTER
from dho2_optax.poc import data, equations, optimizers, tasks, training
from dho2_optax.poc.tasks import Task


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32)
    return Task(
        name="line",
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (3,))},
        loss_fn=lambda params, batch: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2),
        train={"x": x, "y": y},
        test={"x": x[:10], "y": y[:10]},
        accuracy=lambda params, batch: jnp.mean(jnp.abs(batch["x"] @ params["w"]) < 1e3),
    )


def _spec(name="sgd", rate=0.05, devices=4, steps=12):
    return training.Spec(name, rate, devices, 16, steps, rank=2, refresh_interval=4)


def _train(task, spec, seed=0, **kwargs):
    program = training.compile_program(task, spec)
    return program, training.train(task, program, seed, training.Evaluator(task), **kwargs)


def test_a_run_is_what_a_plain_loop_computes(task):
    spec = _spec(devices=1)
    _, run = _train(task, spec, seed=3)
    params = task.init(jax.random.key(3))
    tx = optax.sgd(optimizers.schedule(0.05, 12), momentum=0.9)
    state = tx.init(params)
    rng, losses = np.random.default_rng(3), []
    order = None
    for step in range(12):
        if step % 2 == 0:  # 40 samples are two batches of 16, and a remainder that is dropped
            order = rng.permutation(40)
        rows = order[16 * (step % 2) : 16 * (step % 2 + 1)]
        batch = {key: value[rows] for key, value in task.train.items()}
        loss, grads = jax.value_and_grad(task.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(run.losses, losses, rtol=1e-5)
    assert run.test_loss == pytest.approx(float(task.loss_fn(params, task.test)), rel=1e-4)
    assert run.test_accuracy == 1.0
    assert len(run.seconds) == 12
    assert all(second > 0 for second in run.seconds)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_number_of_devices_changes_nothing_but_rounding(task, devices):
    _, one = _train(task, _spec("adam", devices=1))
    _, many = _train(task, _spec("adam", devices=devices))
    np.testing.assert_allclose(one.losses, many.losses, rtol=1e-5)


def test_the_seed_decides_the_run(task):
    runs = [_train(task, _spec(), seed=seed)[1].losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_every_step_is_reported(task):
    seen = []
    _, run = _train(task, _spec(), on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(run.losses))


def test_a_loss_that_is_not_finite_stops_the_run(task):
    _, run = _train(task, _spec(rate=1e30, steps=50))
    assert run.status == "diverged"
    assert len(run.losses) < 50
    assert not np.isfinite(run.losses[-1])
    assert run.test_loss is None


def test_the_footprint_is_that_of_the_program(task):
    alone = training.compile_program(task, _spec("adam", devices=1)).footprint
    split = training.compile_program(task, _spec("adam", devices=4)).footprint
    assert alone.parameters == split.parameters == 12
    assert alone.base_state == 2 * 12 + 2 * 4  # two moments, two step counts
    assert alone.curvature_state == 0
    assert alone.traffic_per_step == 0
    # The gradient and the loss, averaged over four devices.
    assert split.traffic_per_step == 2 * (12 + 4) * 3 / 4
    assert split.traffic_per_refresh == split.traffic_per_matvec == 0
    parts = split.parameters + split.base_state + split.temporaries
    assert split.total >= parts


@pytest.mark.parametrize("name", ["adam", "dho2"])
def test_a_program_that_will_not_run_has_the_same_plan(task, name):
    to_run = training.compile_program(task, _spec(name))
    only_planned = training.compile_program(task, _spec(name), to_run=False)
    assert to_run.footprint == only_planned.footprint


def test_evaluation_in_parts_is_evaluation_at_once(task, monkeypatch):
    params = task.init(jax.random.key(0))
    whole = training.Evaluator(task)(params)
    monkeypatch.setattr(training, "_MAX_EVALUATION_BATCH", 4)
    parts = training.Evaluator(task)(params)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 300])
def test_the_schedule_warms_up_and_ends_at_zero(num_steps):
    shape = optimizers.schedule(0.5, num_steps)
    rates = np.array([float(shape(step)) for step in range(num_steps + 1)])
    assert (rates[:num_steps] > 0).all()
    assert rates.max() == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_every_optimizer_has_a_rate_for_every_model():
    for optimizer in optimizers.OPTIMIZERS:
        for model in ("mlp", "cnn", "resnet", "autoencoder", "pinn", "users own"):
            assert optimizers.learning_rate(optimizer, model) > 0
    for model in ("mlp", "users own"):
        assert optimizers.learning_rate("dho2", model) == optimizers.learning_rate("adam", model)


@pytest.mark.parametrize("name", ["fosi", "dho2"])
def test_a_hybrid_refreshes_and_says_when(task, name):
    program, run = _train(task, _spec(name, rate=1e-3))
    assert run.status == "ok"
    assert run.refresh_steps
    assert run.counters["refreshes"] == len(run.refresh_steps)
    assert program.footprint.curvature_state > 0
    assert program.footprint.traffic_per_matvec + program.footprint.traffic_per_refresh > 0


@pytest.fixture(scope="module")
def digits():
    return tasks.from_dataset("mlp", data.load("digits"))


@pytest.mark.parametrize("devices", [2, 4])
def test_a_streaming_optimizer_probes_in_some_steps_and_refreshes_in_others(digits, devices):
    spec = training.Spec("mr-dho2", 0.01, devices, 64, 22, rank=2, refresh_interval=8)
    program, run = _train(digits, spec)
    assert run.status == "ok"
    assert np.isfinite(run.losses).all()
    # The first cycle starts in step 9, with Adam's metric, which is one after ten gradients. A probe every other step,
    # four in a cycle; the spectrum is put in use in the step after the last of them.
    assert run.counters["matvecs"] == len(run.probe_steps) == 6
    assert run.probe_steps == [10, 12, 14, 16, 19, 21]  # the next cycle starts in step 18
    assert 17 in run.refresh_steps
    assert run.counters["refreshes"] == len(run.refresh_steps)
    footprint = program.footprint
    # Every step averages the gradient and gathers the update, a probe averages a product besides.
    gradient = footprint.parameters * (devices - 1) / devices
    assert footprint.traffic_per_step >= 2 * gradient
    assert footprint.traffic_per_refresh >= 2 * gradient


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_that_do_not_train_find_curvature(digits, devices, monkeypatch):
    steps = MATURE_AFTER + 12
    spec = training.Spec("mr-dho2-roles", 0.01, devices, 64, steps, rank=2, refresh_interval=3)

    groups = []

    class Kept(dho2_optax.CurvatureGroup):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            groups.append(self)

    def wait(step, loss):  # for the process in flight; the first is launched once Adam's preconditioner is a metric
        if groups[-1]._log.flight is not None:
            groups[-1]._log.flight.wait(60)

    monkeypatch.setattr(dho2_optax, "CurvatureGroup", Kept)

    program, run = _train(digits, spec, on_step=wait)
    assert program.context.mesh.size == len(program.context.curvature_devices) == devices // 2
    assert not {*program.context.mesh.devices.flat} & {*program.context.curvature_devices}
    assert run.status == "ok"
    assert np.isfinite(run.losses).all()
    assert 1 <= run.counters["launches"] <= 4  # the rehearsal is not counted
    assert run.counters["installed"] == len(run.refresh_steps) >= 1
    assert run.counters["failures"] == run.counters["stalls"] == run.counters["rejected"] == 0
    assert program.footprint.curvature_device > program.footprint.parameters


def test_the_metrics_of_a_run_are_looked_at_fifty_times_or_more(task, monkeypatch):
    seen = []

    def alarms(metrics, before, *, max_age):
        seen.append((before["updates"], metrics["updates"], max_age))
        return ["one: a"] if metrics["updates"] == 8 else ["two: b; c: d"] if metrics["updates"] > 116 else []

    monkeypatch.setattr(dho2_optax, "alarms", alarms)
    _, run = _train(task, _spec("fosi", rate=1e-3, devices=1, steps=120))
    assert seen == [(count - 2, count, 12) for count in range(2, 121, 2)]  # of the interval of 4, three times
    assert run.looks == 60
    found = {"one": {"count": 1, "last": 8, "text": "a"}, "two": {"count": 2, "last": 120, "text": "b; c: d"}}
    assert run.alarms == found


@pytest.mark.parametrize(
    ("devices", "batch_size", "expected"), [(2, 7, (1, 1)), (3, 255, (1, 1)), (4, 12, (3, 1)), (8, 64, (4, 4))]
)
def test_two_groups_of_devices_share_a_batch_evenly(devices, batch_size, expected):
    assert training.roles(devices, batch_size) == expected


@pytest.mark.parametrize("devices", [1, 2])
def test_a_network_learns_to_solve_an_equation(devices):
    task = tasks.from_equation("burgers", equations.burgers(), 64)
    spec = training.Spec("dho2-soap", 0.01, devices, 64, 40, rank=2, refresh_interval=10)
    _, run = _train(task, spec)
    assert run.status == "ok"
    assert run.losses[-1] < 0.5 * run.losses[0]
    assert run.test_accuracy is None
    assert 0 < run.test_error < 1
    assert run.counters["refreshes"] == len(run.refresh_steps) >= 3


@pytest.mark.parametrize("name", ["muon", "soap", "dho2-muon", "dho2-soap"])
def test_bases_that_read_whole_matrices_run_alike_on_one_device_and_on_two(digits, name):
    one, two = (_train(digits, training.Spec(name, 0.003, devices, 64, 6, 2, 3))[1] for devices in (1, 2))
    assert one.status == two.status == "ok"
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-2)
    assert one.losses[-1] < one.losses[0]


def test_one_program_serves_every_learning_rate(task):
    program = training.compile_program(task, _spec("adam", rate=1.0))
    other = dataclasses.replace(program, spec=_spec("adam", rate=0.05))
    run = training.train(task, other, 0, training.Evaluator(task))
    assert run.losses == _train(task, _spec("adam", rate=0.05))[1].losses
