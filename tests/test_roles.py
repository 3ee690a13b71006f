"""Curvature on devices of its own: results, timing, the end, and what happens when the group misbehaves."""

import functools
import gc
import math
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from benchmarks import hostile
from benchmarks.options import grouped
from dho2_optax import metric
from tests.helpers import flat, flat_rows, matrix_operator, symmetric
from tests.multidevice import problems

_LIKE = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
_EIGENVALUES = np.asarray([9.0, -5.0, 4.0, 3.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
_MATRIX = symmetric(_EIGENVALUES)
_RANK = 3


def _product(params, vector, batch):
    del params
    return matrix_operator(batch[0] * _MATRIX, _LIKE)(vector)


def _group(axis_name="curvature", **options):
    return dho2.CurvatureGroup(axis_name=axis_name, **grouped(**options))


class _Quadratic:
    """Training steps of a `dho2` on one device, with a group on others."""

    def __init__(self, curvature=_product, group_size=1, chain=False, **options):
        tx = dho2.dho2(optax.sgd(0.01), rank=_RANK, refresh_interval=None)
        self.tx = optax.chain(optax.clip(10.0), tx) if chain else tx
        self.params = jax.tree.map(jnp.ones_like, _LIKE)
        self.state = self.tx.init(self.params)
        options = {"rank": _RANK, "order": 10, "tolerance": 1e-5, "interval": 4, **options}
        self.group = _group(curvature=curvature, devices=jax.devices()[-group_size:], **options)
        self._step = jax.jit(self._one_step, donate_argnums=(0, 1))

    def _one_step(self, params, state, brightness):
        grads = jax.tree.map(lambda g: brightness * g, matrix_operator(_MATRIX, _LIKE)(params))
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(self, factor=1.0, brightness=1.0):
        """One update and one call of `advance`; scales the operator of the group, and the gradient, by a factor."""
        self.params, self.state = self._step(self.params, self.state, brightness)
        batch = np.full(len(self.group.devices), factor, np.float32)
        self.state = self.group.advance(self.state, self.params, batch)
        return self.metrics

    @property
    def metrics(self):
        return {**self.group.metrics(), **{name: float(x) for name, x in dho2.metrics(self.state).items()}}

    def step_until(self, name, value, factor=1.0, seconds=60.0):
        """Steps until a metric has a value."""
        end = time.monotonic() + seconds
        while self.metrics[name] < value:
            assert time.monotonic() < end, (name, self.metrics)
            self.step(factor)
            time.sleep(0.002)
        return self.metrics


def _assert_true_pairs(spectrum):
    values, vectors = np.linalg.eigh(_MATRIX)
    best = np.argsort(-np.abs(values))[:_RANK]
    np.testing.assert_allclose(spectrum.eigenvalues, values[best], atol=1e-4 * 9)
    found = flat_rows(jax.tree.map(lambda x: np.asarray(x), spectrum.eigenvectors))
    overlaps = np.abs(np.sum(found * vectors[:, best].T, axis=1))
    np.testing.assert_allclose(overlaps, 1, atol=1e-4)


@pytest.mark.parametrize("group_size", [1, 3])
def test_the_eigenpairs_are_those_of_the_operator(group_size):
    run = _Quadratic(group_size=group_size)
    seen = run.step_until("installed", 2)
    _assert_true_pairs(dho2.spectrum(run.state))
    assert seen["active_pairs"] == _RANK
    assert seen["refreshes"] == seen["installed"]
    assert seen["matvecs"] >= 2 * (_RANK + 1)
    assert seen["rejected"] == seen["failures"] == seen["stalls"] == seen["wait_seconds"] == 0
    assert seen["busy_seconds"] > 0
    run.group.close()


def test_a_spectrum_is_used_an_interval_after_its_launch_in_deterministic_mode():
    run = _Quadratic(interval=5, deterministic=True)
    refreshes = [run.step()["refreshes"] for _ in range(16)]
    # Launched after update 1; the calls after updates 6, 11 and 16 install, and launch the next.
    assert refreshes == [0] * 5 + [1] * 5 + [2] * 5 + [3]
    seen = run.metrics
    assert seen["launches"] == 4
    assert seen["staleness"] == 5
    assert seen["age"] == 5
    run.step()
    assert run.metrics["age"] == 6


def test_an_interval_is_the_least_number_of_updates_between_launches():
    run = _Quadratic(interval=50)
    seen = run.step_until("installed", 1)
    updates = seen["staleness"]
    assert seen["launches"] == 1 + (updates >= 50)
    while updates < 49:
        assert run.step()["launches"] == 1
        updates += 1
    assert run.step_until("installed", 2)["launches"] <= 3
    run.group.close()


def test_inside_a_chain():
    run = _Quadratic(chain=True, deterministic=True)
    for _ in range(6):
        run.step()
    assert run.metrics["refreshes"] == 1
    _assert_true_pairs(dho2.spectrum(run.state))


def _train(num_training, num_curvature, *, segments, num_steps=30):
    """Deterministic training of an MLP on a mesh, with curvature of other devices; the parameters."""
    problem = problems.mlp()
    devices = jax.devices()
    mesh = Mesh(np.array(devices[:num_training]), ("data",))
    options = {"mesh": mesh, "axis_name": "data"} if segments else {}
    tx = dho2.dho2(problem.base, **grouped(refresh_interval=None, rank=4, alpha=0.5, **options))
    params, batch = jax.device_put((problem.params, problem.batch), NamedSharding(mesh, P()))
    state = jax.jit(tx.init)(params)
    group = dho2.CurvatureGroup(
        problem.loss_fn,
        devices=devices[-num_curvature:],
        rank=4,
        interval=5,
        deterministic=True,
        eigensolver=dho2.Eigensolver(tolerance=1e-5),
    )

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(problem.loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = step(params, state, batch)
        state = group.advance(state, params, batch)
        jax.block_until_ready(params)
    assert group.metrics()["installed"] == (num_steps - 1) // 5
    assert dho2.metrics(state)["active_pairs"] >= 2
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize(("num_training", "num_curvature", "segments"), [(7, 1, True), (4, 4, True), (4, 3, False)])
def test_the_number_of_devices_changes_nothing(num_training, num_curvature, segments):
    params = _train(num_training, num_curvature, segments=segments)
    expected = _train(1, 1, segments=False)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


# Small training beside one device of curvature, with bases whose preconditioner is read in different ways.

_SMALL = {"a": np.ones((12, 25), np.float32), "b": np.ones(3, np.float32)}
_SAMPLES = np.random.default_rng(0).normal(size=(42, 25)).astype(np.float32) * np.logspace(0, -1, 25, dtype=np.float32)


def _small_loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["a"].T) @ jnp.linspace(1, 2, 12) - params["b"].sum() ** 2) ** 2)


def _read_with_a_sum(base_state, like, axis_name):
    """A preconditioner that only a sum over the devices can tell."""
    moments = base_state[0].nu
    total = sum(jnp.sum(x) for x in jax.tree.leaves(moments))
    total = total if axis_name is None else jax.lax.psum(total, axis_name)
    return jax.tree.map(lambda x: 1 + x / (1 + total), moments)


_OWN_METRIC = dho2.Metric(
    factors=_read_with_a_sum,
    half=lambda factors, x: jax.tree.map(jnp.multiply, factors, x),
    inverse_half=lambda factors, x: jax.tree.map(jnp.divide, x, factors),
    elementwise=True,
)
_BASES = {
    "adam": lambda: (optax.adam(1e-2), {}),
    "adam on whole leaves": lambda: (optax.adam(1e-2), {"base_on_segments": False}),
    "sgd": lambda: (optax.sgd(1e-3, momentum=0.9), {}),
    "soap": lambda: (dho2.soap(1e-2), {"base_on_segments": False, "metric": "base"}),
    "a metric of one's own": lambda: (optax.adam(1e-2), {"metric": _OWN_METRIC}),
}


def _train_small(base, mesh=None, group_size=1, in_shard_map=False):
    """Ten updates, three of them right after an installation; parameters and the last spectrum."""
    tx, options = _BASES[base]()
    on_segments = options.pop("base_on_segments", True)
    if mesh is not None:
        split = dho2.Split("data", mesh=None if in_shard_map else mesh, base_on_segments=on_segments)
        options = {"split": split, **options}
    tx = dho2.dho2(tx, refresh_interval=None, rank=2, alpha=0.5, **options)

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(_small_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, batch, init = jax.tree.map(jnp.asarray, _SMALL), jnp.asarray(_SAMPLES), tx.init
    if mesh is not None:
        params, batch = jax.device_put((params, batch), NamedSharding(mesh, P()))
    if in_shard_map:
        specs = dho2.state_specs(tx.init, params, "data")
        init = jax.shard_map(init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), specs, P()), out_specs=(P(), specs), check_vma=False)
    state, step = jax.jit(init)(params), jax.jit(step)
    own = options.get("metric")  # what the state does not tell
    options = {"rank": 2, "order": 6, "interval": 3, "deterministic": True, "metric": None if own == "base" else own}
    with dho2.CurvatureGroup(_small_loss, **grouped(devices=jax.devices()[-group_size:], **options)) as group:
        state = state._replace(count=state.count + metric.MATURE_AFTER)  # the group is not to wait for the metric
        for _ in range(10):
            params, state = step(params, state, batch)
            state = group.advance(state, params, batch)
            jax.block_until_ready(params)
    assert group.metrics()["installed"] == 3
    return jax.tree.map(np.asarray, (params, dho2.spectrum(state).eigenvalues))


@functools.cache
def _alone(base):
    params, eigenvalues = _train_small(base)
    assert np.abs(eigenvalues).min() > 0
    assert np.linalg.norm(flat(params) - flat(_SMALL)) > 0.01 * np.linalg.norm(flat(_SMALL))
    return params, eigenvalues


def _assert_as_alone(base, found):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(_alone(base)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("base", "num_training"),
    [
        *[("adam", num) for num in range(1, 8)],
        ("adam on whole leaves", 3),
        ("sgd", 5),
        ("soap", 3),
        ("soap", 6),
        ("a metric of one's own", 5),
    ],
)
def test_any_number_of_training_devices_changes_nothing(base, num_training):
    mesh = Mesh(np.array(jax.devices()[:num_training]), ("data",))
    _assert_as_alone(base, _train_small(base, mesh, group_size=min(3, 8 - num_training)))


def test_beside_a_shard_map_of_the_users():
    _assert_as_alone("adam", _train_small("adam", Mesh(np.array(jax.devices()[:3]), ("data",)), in_shard_map=True))


@pytest.mark.parametrize("explicit", [False, True])
def test_beside_a_mesh_with_a_second_axis(explicit):
    devices = np.array(jax.devices()[:6])
    axes = ((3, 2), ("data", "model"))
    mesh = jax.make_mesh(*axes, devices=devices) if explicit else Mesh(devices.reshape(axes[0]), axes[1])
    _assert_as_alone("adam", _train_small("adam", mesh))


def test_deterministic_runs_agree_bit_for_bit():
    first, second = (_train(7, 1, segments=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("split", [False, True], ids=["one device", "mesh"])
def test_eigenvectors_are_put_in_use_without_a_second_copy_of_them(split):
    """The program of the installation reads them and returns none."""
    params, rank = {"w": jnp.ones((64, 50))}, 8
    options = {}
    if split:
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        options = {"split": dho2.Split("data", mesh=mesh)}
    tx = dho2.dho2(optax.adam(0.1), rank=rank, refresh_interval=None, **options)
    state, batch = tx.init(params), np.ones((8, 50), np.float32)
    loss_fn = lambda params, batch: jnp.mean(jnp.tanh(batch @ params["w"].T) ** 2)  # noqa: E731
    with dho2.CurvatureGroup(loss_fn, devices=jax.devices()[-1:], rank=rank, interval=4) as group:
        group.warm_up(state, params, batch)
        deliver, seen = group._deliver, []
        group._deliver = lambda *arguments: seen.append(arguments) or deliver(*arguments)
        group.warm_up(state, params, batch)
    program = deliver.lower(*seen[0]).compile()
    text = program.as_text()
    held = rank * 64 * 50 // (4 if split else 1)
    stacks = [shape for shape in re.findall(r"f32\[([\d,]+)\]\S* copy\(", text) if _size(shape) >= held]
    assert any(_size(shape) >= held for shape in re.findall(r"f32\[([\d,]+)\]\S* parameter\(", text))
    assert stacks == []
    assert program.memory_analysis().output_size_in_bytes < 4 * held


def _size(shape):
    return math.prod(map(int, shape.split(",")))


def test_what_a_group_has_found_survives_the_donation_of_the_state_on_its_own_device():
    problem = _Quadratic(interval=2, deterministic=True)
    problem.group.close()
    problem.group = _group(
        curvature=_product, devices=jax.devices()[:1], rank=_RANK, order=10, interval=2, deterministic=True
    )
    with problem.group as group:
        for _ in range(9):
            problem.step()
        assert group.metrics()["installed"] >= 2
        problem.step()  # donates the state into which the last one went
        assert not any(x.is_deleted() for x in jax.tree.leaves(group._spectrum))


def test_a_snapshot_survives_the_donation_of_the_parameters():
    """The operator is the batch times the square of the parameters at launch, which later steps overwrite."""
    tx = dho2.dho2(optax.sgd(0.5), rank=1, refresh_interval=None)
    params = jnp.asarray([2.0, 1.0])
    state = tx.init(params)
    operator = lambda params, vector, batch: jnp.mean(batch) * params**2 * vector  # noqa: E731
    group = dho2.CurvatureGroup(curvature=operator, devices=jax.devices()[:1], rank=1, interval=3, deterministic=True)
    step = jax.jit(lambda params, state: (0.1 * params, state), donate_argnums=(0, 1))
    for _ in range(4):
        params, state = step(params, state)
        state = group.advance(state, params, np.ones(1, np.float32))
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, [0.04], rtol=1e-5)


class _Device:
    """A part of the group's program that a test can hold up or break."""

    def __init__(self):
        self.free = threading.Event()
        self.free.set()
        self.held_up = threading.Event()
        self.broken = False

    def __call__(self, x):
        if not self.free.is_set():
            self.held_up.set()
            self.free.wait(60)
        if self.broken:
            raise RuntimeError("the device fell off the bus")
        return x

    def product(self, params, vector, batch):
        one = jax.pure_callback(self, jax.ShapeDtypeStruct((), jnp.float32), jnp.float32(1))
        return jax.tree.map(lambda x: one * x, _product(params, vector, batch))


def test_advance_does_not_wait():
    device = _Device()
    run = _Quadratic(device.product)
    run.step_until("installed", 1)
    device.free.clear()
    while not device.held_up.is_set():
        run.step()
    before = run.metrics
    for _ in range(40):
        run.step()
    during = run.metrics
    assert during["installed"] == before["installed"]
    assert during["age"] >= before["age"] + 40
    assert during["wait_seconds"] == 0
    device.free.set()
    after = run.step_until("installed", before["installed"] + 1)
    assert after["staleness"] >= 40
    run.group.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_stalled_group_leaves_training_on_the_last_spectrum(deterministic):
    device = _Device()
    run = _Quadratic(device.product, deterministic=deterministic, timeout=2.0)
    run.step_until("installed", 1)
    good = np.array(dho2.spectrum(run.state).eigenvalues)
    device.free.clear()
    seen = run.step_until("stalls", 1)
    launches, installed = seen["launches"], seen["installed"]
    for _ in range(10):
        run.step()
    # Nothing more is asked of it while it hangs.
    assert run.metrics["launches"] == launches
    assert run.metrics["installed"] == installed
    np.testing.assert_allclose(dho2.spectrum(run.state).eigenvalues, good, atol=1e-4)
    assert np.isfinite(flat(run.params)).all()
    device.free.set()
    seen = run.step_until("installed", installed + 1)
    assert seen["stalls"] == 1
    run.group.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_group_that_fails_leaves_training_on_the_last_spectrum(deterministic):
    device = _Device()
    run = _Quadratic(device.product, deterministic=deterministic)
    run.step_until("installed", 1)
    device.broken = True
    seen = run.step_until("failures", 2)
    assert "fell off the bus" in run.group.last_error
    assert seen["refreshes"] == seen["installed"]
    assert seen["active_pairs"] == _RANK
    assert np.isfinite(flat(run.params)).all()
    device.broken = False
    run.step_until("installed", seen["installed"] + 1)
    _assert_true_pairs(dho2.spectrum(run.state))
    run.group.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_numbers_that_are_not_finite_are_rejected(bad):
    run = _Quadratic(deterministic=True)
    run.step_until("installed", 1)
    seen = run.step_until("rejected", 2, factor=bad)
    assert seen["refreshes"] == seen["installed"]
    assert np.isfinite(flat(run.params)).all()
    run.step_until("installed", seen["installed"] + 2)
    _assert_true_pairs(dho2.spectrum(run.state))


def test_nothing_is_learnt_from_an_outlier():
    run = _Quadratic(deterministic=True)
    installed = run.step_until("installed", 1)["installed"]
    run.step(brightness=1e3)
    # What was launched on the batch before may still come; then nothing, until gradients are of the usual length again.
    seen = run.step_until("rejected", 3)
    assert seen["installed"] <= installed + 1
    run.step_until("installed", seen["installed"] + 1)


def test_a_batch_is_judged_by_its_own_gradient_whatever_came_before():
    run = _Quadratic(deterministic=True)
    before = run.step_until("installed", 1)
    bounds = run.state.bounds
    run.state = run.state._replace(bounds=bounds._replace(peak=1e20 * bounds.usual))
    for _ in range(10):
        run.step()
    assert not run.state.bounds.trust()
    assert run.metrics["installed"] > before["installed"]
    assert run.metrics["rejected"] == before["rejected"]


@pytest.mark.parametrize("base", [pytest.param("sgd", marks=pytest.mark.slow), "adam"])
def test_curvature_of_a_dim_a_padded_and_an_empty_batch_harms_no_more_than_the_base_alone(base):
    """Their gradients are no outliers: what is found on them is used."""
    problem, interval = hostile.least_squares(), 20
    first = 0 if base == "sgd" else metric.MATURE_AFTER - 1  # launch
    kinds = {first + interval * (i + 1): hostile.KINDS[kind] for i, kind in enumerate(("dim 0.01", "padding", "empty"))}

    def train(tx, group=None):
        @jax.jit
        def step(params, state, key, hostility):
            batch = problem.draw(key, hostility)
            updates, state = tx.update(jax.grad(problem.loss_fn)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
            return params, state, batch, problem.loss_fn(params, problem.clean)

        params, state, losses, pairs = problem.params, tx.init(problem.params), [], []
        for i, key in enumerate(jax.random.split(jax.random.key(0), first + 5 * interval)):
            hostility = jax.tree.map(np.float32, kinds.get(i, hostile.Hostility()))
            params, state, batch, loss = step(params, state, key, hostility)
            losses.append(float(loss))
            if group is not None:
                state = group.advance(state, params, batch)
                pairs.append(dho2.spectrum(state).eigenvalues.max())
        return np.array(losses), np.array(pairs)

    options = {"rank": _RANK, "interval": interval, "deterministic": True}
    alone, _ = train(hostile.BASES[base]())
    tx = dho2.dho2(hostile.BASES[base](), rank=_RANK, refresh_interval=None)
    with dho2.CurvatureGroup(problem.loss_fn, devices=jax.devices()[-2:], **options) as group:
        found, largest = train(tx, group)
        assert (group.metrics()["installed"], group.metrics()["rejected"]) == (4, 0)
    healthy, dim, padded, empty = largest[first + interval :: interval]
    assert dim < 1e-3 * healthy
    assert 0 < padded < 0.3 * healthy
    assert empty == 0
    assert found.max() <= hostile.WORST * alone.max()
    # While each of the spectra is in use, the last one at the end.
    ours, base_alone = (x[first:].reshape(5, interval).mean(axis=1) for x in (found, alone))
    assert np.all(ours <= hostile.END * base_alone)


def test_options_reach_the_solver():
    few = _Quadratic(deterministic=True, order=3, max_residual=0.0)
    for _ in range(6):
        few.step()
    assert few.metrics["matvecs"] == 3
    assert few.metrics["active_pairs"] == 0
    signed = _Quadratic(deterministic=True, select="algebraic")
    for _ in range(6):
        signed.step()
    np.testing.assert_allclose(dho2.spectrum(signed.state).eigenvalues, [3, 4, 9], atol=1e-3)


def test_a_product_may_average_over_the_named_axis():
    def product(params, vector, batch):
        return _product(params, vector, jax.lax.psum(batch / 2, "group"))

    run = _Quadratic(product, group_size=2, deterministic=True, axis_name="group")
    for _ in range(6):
        run.step()
    assert run.metrics["installed"] == 1
    _assert_true_pairs(dho2.spectrum(run.state))


def test_a_warm_up_compiles_and_changes_nothing():
    traced = []

    def product(params, vector, batch):
        traced.append(1)
        return _product(params, vector, batch)

    run = _Quadratic(product, deterministic=True)
    run.group.warm_up(run.state, run.params, np.ones(1, np.float32))
    assert len(traced) > 0
    assert not any(run.group.metrics().values())
    assert dho2.metrics(run.state)["refreshes"] == 0
    traced.clear()
    for _ in range(6):
        run.step()
    assert run.metrics["installed"] == 1
    assert traced == []
    _assert_true_pairs(dho2.spectrum(run.state))


def test_memory_of_the_group_falls_with_its_size():
    params = jnp.zeros(100_000)
    operator = lambda params, vector, batch: jnp.mean(batch) * vector  # noqa: E731

    def temporaries(size):
        group = dho2.CurvatureGroup(
            curvature=operator, devices=jax.devices()[:size], rank=8, eigensolver=dho2.Eigensolver(order=64)
        )
        return group.memory(params, np.ones(8, np.float32)).temp

    assert temporaries(1) >= 64 * 4e5
    assert temporaries(8) <= temporaries(1) / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": []}, "`devices`.*non-empty"),
        ({"devices": [0]}, "`devices`"),
        ({"metric": "base"}, r"`metric` must be None or a dho2_optax\.Metric, got 'base'"),
        ({"interval": 0}, "`interval`.*positive.*0"),
        ({"timeout": 0.0}, "`timeout`.*positive"),
        ({"axis_name": None}, "`axis_name`.*string.*None"),
        ({"rank": 0}, "`rank`"),
        ({"tolerance": -1.0}, "`tolerance`.*non-negative.*-1"),
        ({"curvature": None}, "`loss_fn` or `curvature`"),
        ({"curvature": 3}, "`curvature`.*callable.*3"),
        ({"select": "largest"}, "`select`.*largest"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _group(**{"curvature": _product, "devices": jax.devices()[:1], **options})


def test_the_same_device_twice():
    with pytest.raises(ValueError, match=r"`devices` must all be different"):
        dho2.CurvatureGroup(curvature=_product, devices=[jax.devices()[0]] * 2)


def test_another_rank_than_the_optimizer():
    run = _Quadratic(deterministic=True, rank=2)
    for _ in range(4):
        run.step()
    with pytest.raises(ValueError, match=r"`rank` \+ `num_smallest` must be those of the optimizer, 3, got 2"):
        run.step()


def test_an_error_in_the_users_function_is_raised():
    def product(params, vector, batch):
        raise TypeError("no such argument")

    run = _Quadratic(product)
    with pytest.raises(TypeError, match="no such argument"):
        run.step()
    run.group.close()  # nothing is left to be said


def test_a_batch_of_another_shape_is_another_program():
    def product(params, vector, batch):
        return jax.tree.map(lambda v: jnp.mean(batch) * v, vector)

    run = _Quadratic(product, deterministic=True)
    for step in range(9):
        run.state = run.group.advance(run.state, run.params, np.ones((1 if step < 4 else 2, 3), np.float32))
    assert run.metrics["installed"] == 2
    assert run.metrics["failures"] == 0
    sizes = [run.group.memory(run.params, np.ones((rows, 1000), np.float32)).argument for rows in (1, 100)]
    assert sizes[1] - sizes[0] == 4 * 99_000
    run.group.close()


def test_another_training_may_have_parameters_of_other_shapes():
    """Padded, the buffers of both have one shape."""

    def product(params, vector, batch):
        scale = lambda x: x.size * 0.5 ** jnp.arange(x.size, dtype=x.dtype)  # noqa: E731
        return jax.tree.map(lambda x: batch[0] * scale(x) * x, vector)

    tx = dho2.dho2(optax.sgd(0.01), rank=2, refresh_interval=None)
    options = {"rank": 2, "interval": 2, "deterministic": True}
    group = dho2.CurvatureGroup(curvature=product, devices=jax.devices()[-2:], **options)
    for sizes in ({"a": 3, "b": 5}, {"a": 5, "b": 3}, {"a": 300, "b": 3}):
        params = {name: jnp.ones(size) for name, size in sizes.items()}
        state = tx.init(params)
        with group:
            for _ in range(3):
                state = group.advance(state, params, np.ones(2, np.float32))
        assert dho2.metrics(state)["eigenvalue_max"] == pytest.approx(max(sizes.values()), rel=0.01)
        found = dho2.spectrum(state, params)
        largest = found.eigenvectors[max(sizes, key=sizes.get)][jnp.argmax(found.eigenvalues)]
        assert abs(largest[0]) > 0.9


def test_a_batch_may_hold_a_random_key_and_a_number():
    def product(params, vector, batch):
        noise = jax.random.normal(batch["key"], ())
        return jax.tree.map(lambda v: batch["scale"] * jnp.mean(batch["x"]) * v + 0 * noise, vector)

    run = _Quadratic(product, deterministic=True)
    batch = {"x": np.ones(1, np.float32), "key": jax.random.key(0), "scale": 0.5}
    assert run.group.memory(run.params, batch).total > 0
    run.group.warm_up(run.state, run.params, batch)
    for _ in range(5):
        run.state = run.group.advance(run.state, run.params, batch)
    assert float(dho2.metrics(run.state)["eigenvalue_max"]) == pytest.approx(0.5)
    run.group.close()


def test_a_batch_is_copied_before_the_next_is_written_in_its_place():
    run = _Quadratic()
    memory = np.zeros(64 + 256, np.uint8)
    start = -memory.ctypes.data % 64  # so aligned, a device of the CPU would read it where it is
    batch = memory[start : start + 256].view(np.float32)
    batch[:] = 1
    placed = run.group._place(batch)
    batch[:] = 7
    np.testing.assert_array_equal(placed, np.ones(64, np.float32))


def test_products_are_traced_as_the_caller_says():
    seen = []

    def product(params, vector, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return vector

    run = _Quadratic(product, deterministic=True)
    with jax.default_matmul_precision("highest"):
        run.step_until("installed", 1)
    assert set(seen) == {"highest"}
    run.group.close()


def test_parameters_of_which_the_optimizer_sees_a_part_are_refused():
    tx = optax.masked(dho2.dho2(optax.sgd(0.1), rank=1, refresh_interval=None), {"a": True, "b": False})
    group = dho2.CurvatureGroup(curvature=_product, devices=jax.devices()[:1], rank=1)
    for seen in (jnp.ones(3), jnp.float32(1)):
        params = {"a": seen, "b": jnp.ones(4)}
        with pytest.raises(ValueError, match=r"`params` must be those that the optimizer sees.*optax\.masked"):
            group.advance(tx.init(params), params, np.ones(1, np.float32))


# The end of a group.


def _breaks_in_its_thread(run, monkeypatch):
    def compile_program(kind):
        raise TypeError("no such argument")

    monkeypatch.setattr(run.group, "_compiled", compile_program)


def test_a_group_joins_its_thread_at_the_end_of_a_with_statement():
    run = _Quadratic()
    before = threading.active_count()
    with run.group as group:
        assert group is run.group
        run.step_until("installed", 1)
        while run.step()["launches"] < 2:
            pass
    assert threading.active_count() <= before
    # Nothing is left to be said or waited for.
    run.group.close()


def test_a_group_that_has_installed_nothing_says_so_once():
    run = _Quadratic()
    run.step()
    with pytest.warns(UserWarning, match=r"installed no spectrum \(launches 1, .*`warm_up`.*deterministic=True"):
        run.group.close()
    run.group.close()
    _Quadratic().group.close()


def test_a_group_that_only_failed_says_why():
    device = _Device()
    device.broken = True
    run = _Quadratic(device.product, deterministic=True)
    run.step_until("failures", 1)
    with pytest.warns(UserWarning, match=r"(?s)failures \d,.*fell off the bus"):
        run.group.close()


def test_a_forgotten_group_says_that_it_has_installed_nothing():
    runs = [_Quadratic()]
    runs[0].step()
    runs[0].group._log.flight._thread.join()  # which keeps the group

    def forget():
        runs.clear()
        gc.collect()

    with pytest.warns(UserWarning, match="installed no spectrum"):
        forget()


def test_a_group_can_be_used_after_its_end():
    run = _Quadratic(deterministic=True)
    for _ in range(6):
        run.step()
    run.group.close()
    run.step_until("installed", 2)
    run.group.close()
    # Another training: counts from its own first update, and begins with no spectrum of before.
    run.params = jax.tree.map(jnp.ones_like, _LIKE)
    run.state = run.tx.init(run.params)
    run.step_until("installed", run.metrics["installed"] + 1)
    assert run.metrics["age"] == run.metrics["staleness"] == 4


def test_the_end_raises_an_error_of_the_thread(monkeypatch):
    run = _Quadratic()
    _breaks_in_its_thread(run, monkeypatch)
    run.step()
    with pytest.raises(TypeError, match="no such argument"), run.group:
        pass
    run.group.close()


def test_an_error_in_a_with_statement_is_not_hidden(monkeypatch):
    run = _Quadratic()
    _breaks_in_its_thread(run, monkeypatch)

    def train():
        with run.group:
            run.step()
            raise KeyError("of the training")

    with pytest.raises(KeyError, match="of the training"):
        train()
    run.group.close()


def test_the_end_waits_no_longer_than_the_timeout():
    device = _Device()
    run = _Quadratic(device.product, deterministic=True, timeout=0.5)
    run.step_until("installed", 1)
    device.free.clear()
    while not device.held_up.is_set():
        run.step()
    begin = time.monotonic()
    run.group.close()
    assert 0.4 < time.monotonic() - begin < 20
    device.free.set()
    assert run.metrics["stalls"] == 1


_PROGRAM = """
import jax, jax.numpy as jnp, optax, time
import dho2_optax as dho2
from dho2_optax.roles import _Flight

def quick(params, vector, batch):
    return jnp.mean(batch) * params**2 * vector

def slow(params, vector, batch):
    square = jax.lax.fori_loop(0, 300, lambda _, x: x @ x, params[0] * jnp.full((700, 700), 1e-3))
    return quick(params, vector, batch) + square[0, 0]

def broken(params, vector, batch):
    raise TypeError("no such argument")

def main(operator, timeout):
    tx = dho2.dho2(optax.sgd(0.1), rank=1, refresh_interval=None)
    params = jnp.ones(3)
    state = tx.init(params)
    group = dho2.CurvatureGroup(curvature=operator, devices=jax.devices(), rank=1, timeout=timeout)
    if operator is slow:
        group.warm_up(state, params, jnp.ones(1))
    group.advance(state, params, jnp.ones(1))
    time.sleep(0.1)

def late():  # the thread begins to compile when the program is ending
    run = _Flight._run
    _Flight._run = lambda *args: (time.sleep(2.0), run(*args))
    main(quick, 60.0)

"""


@pytest.mark.parametrize(
    ("call", "message", "code"),
    [
        ("main(quick, 60.0)", "installed no spectrum.*stalls 0", 0),
        ("main(slow, 0.1)", "installed no spectrum.*stalls 1", 0),
        ("main(broken, 60.0)", "TypeError: no such argument", 1),
        ("late()", "installed no spectrum.*stalls 0", 0),
    ],
)
def test_a_program_with_a_group_that_nobody_closes_ends_well(call, message, code):
    program = [sys.executable, "-c", _PROGRAM + call]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("Warning") + done.stderr.count("Error") == 1, done.stderr
    assert "FATAL" not in done.stderr


def test_devices_of_another_process(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match=r"`devices` must be of this process, 1, got .* of process 0.*local_devices"):
        dho2.CurvatureGroup(curvature=_product, devices=jax.devices()[:1])


def test_a_batch_that_the_group_cannot_share():
    group = dho2.CurvatureGroup(curvature=_product, devices=jax.devices()[:3], rank=_RANK)
    tx = dho2.dho2(optax.sgd(0.01), rank=_RANK, refresh_interval=None)
    params = jax.tree.map(jnp.ones_like, _LIKE)
    with pytest.raises(ValueError, match="divisible by the 3 devices"):
        group.advance(tx.init(params), params, np.ones(4, np.float32))
