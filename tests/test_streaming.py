"""`mr_dho2` and `value_grad_and_hvp` on one device, against dense float64 versions of what they compute."""

import functools
import inspect
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import dho2_optax as dho2
from benchmarks.options import grouped
from dho2_optax import krylov, streaming
from dho2_optax.curvature import part
from dho2_optax.state import find_state
from tests.helpers import flat, flat_rows, matrix_operator, symmetric, unflatten

_N = 12
_NUM_STEPS = 60
_LEARNING_RATE = 0.01
START = {"a": np.float32(np.linspace(-1, 1.2, 10)).reshape(2, 5), "b": np.float32([0.4, -0.8])}
# Three eigenvalues stand out of a bulk, so that nine products find them to rounding.
_SPECTRUM = np.concatenate([[10.0, -6.0, 4.0], np.linspace(-0.1, 0.1, _N - 3)])
# The first eigenvalue is found long before the others.
_STAGED = np.concatenate([[100.0, 3.0, 2.5, 2.0], np.linspace(-1, 1, _N - 4)])
# What `_run` takes as numbers; every one is traced.
_NUMBERS = {"alpha": 0.05, "probe_interval": 1, "warmup_steps": 0, "tolerance": 0.0, "max_residual": 0.1}
_WHOLE = ("probe_interval", "warmup_steps")


class Trace(NamedTuple):
    """What `_scan` saw after every step, but for `vector`, and the state at the end."""

    params: Any  # (steps, n)
    updates: Any  # (steps, n)
    vector: Any  # (steps, n): the vector to be probed, before the step
    rows: Any  # (steps, rank, n)
    mask: Any  # (steps, rank)
    over: Any  # (steps,): the cycle is, and the next one has not begun
    metrics: dict[str, Any]
    state: Any

    def probed(self):
        """Whether each step made a probe."""
        return np.diff(self.metrics["matvecs"], prepend=0) > 0

    def published(self):
        """Whether each step published, or threw a spectrum away."""
        return np.diff(self.metrics["refreshes"], prepend=0) > 0

    def completed(self):
        """Whether each step published a whole cycle."""
        return self.published() & self.over


def _as_vector(params):
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])


def _as_rows(stack):
    leaves = jax.tree.leaves(stack)
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)


def _loss(params, matrix):
    x = _as_vector(params)
    return 0.5 * x @ jnp.dot(matrix, x, precision="highest")


# The ways to give curvature to an update: functions of parameters, state and data to gradient and arguments.


def _by_hvp(params, state, matrix):
    _, gradient, hvp = dho2.value_grad_and_hvp(_loss)(params, state, matrix)
    return gradient, {"hvp": hvp}


def _by_batch(params, state, matrix):
    del state
    return jax.grad(_loss)(params, matrix), {"batch": matrix}


def _by_nothing(params, state, matrix):
    del state
    return jax.grad(_loss)(params, matrix), {}


def _by_spoiled_hvp(params, state, now):
    """Data are a matrix, an amount of "bad" and where to add it."""
    matrix, bad, where = now
    gradient, arguments = _by_hvp(params, state, matrix)
    spoil = unflatten(jnp.where(where, bad, 0), params)
    return gradient, {"hvp": jax.tree.map(jnp.add, arguments["hvp"], spoil)}


def _scan(tx, data, feed, params=None):
    params = jax.tree.map(jnp.asarray, START if params is None else params)

    def step(carry, now):
        params, state = carry
        gradient, arguments = feed(params, state, now)
        vector = _as_vector(find_state(state).probing.process.vector)
        updates, state = tx.update(gradient, state, params, **arguments)
        params = optax.apply_updates(params, updates)
        spectrum = dho2.spectrum(state)
        seen = _as_vector(params), _as_vector(updates), vector, _as_rows(spectrum.eigenvectors), spectrum.mask
        return (params, state), (*seen, find_state(state).probing.complete, dho2.metrics(state))

    (_, state), seen = jax.lax.scan(step, (params, tx.init(params)), data)
    return Trace(*seen, state)


@functools.partial(jax.jit, static_argnames=("feed", "rank", "order"))
def _run_traced(numbers, data, params, feed, rank, order):
    tx = dho2.mr_dho2(optax.sgd(_LEARNING_RATE), _loss, **grouped(rank=rank, order=order, **numbers))
    return _scan(tx, data, feed, params)


def _run(data, feed=_by_hvp, *, rank=3, order=9, params=None, **numbers):
    """One compiled run for all values of the numbers."""
    # Of a pair each number is traced.
    numbers = {
        name: jax.tree.map(lambda x, name=name: jnp.asarray(x, jnp.int32 if name in _WHOLE else jnp.float32), given)
        for name, given in {**_NUMBERS, **numbers}.items()
    }
    trace = _run_traced(numbers, data, START if params is None else params, feed, rank, order)
    return jax.tree.map(np.asarray, trace)


def _still(eigenvalues=_SPECTRUM, steps=_NUM_STEPS):
    """The same matrix at every step."""
    return np.float32(np.broadcast_to(symmetric(eigenvalues), (steps, len(eigenvalues), len(eigenvalues))))


def _moving(steps=_NUM_STEPS):
    drift = symmetric(np.linspace(-0.3, 0.4, _N), seed=1)
    return np.float32([symmetric(_SPECTRUM) + 0.2 * t * drift for t in range(steps)])


def _largest(matrix, rank):
    """Eigenvalues of largest magnitude, and their eigenvectors as rows, in float64."""
    values, columns = np.linalg.eigh(np.asarray(matrix, np.float64))
    index = np.argsort(-np.abs(values))[:rank]
    return values[index], columns.T[index]


def _assert_eigenpairs(spectrum, matrix, tolerance=1e-4):
    """All pairs are in use and right to `tolerance`, relative to the largest eigenvalue."""
    rank = spectrum.eigenvalues.size
    values, rows = _largest(matrix, rank)
    assert np.all(spectrum.mask)
    np.testing.assert_allclose(spectrum.eigenvalues, values, atol=tolerance * np.abs(values[0]))
    found = flat_rows(spectrum.eigenvectors)
    signs = np.sign(np.sum(found * rows, axis=1, keepdims=True))
    np.testing.assert_allclose(signs * found, rows, atol=tolerance)


# Eigenpairs.


@pytest.mark.parametrize("feed", [_by_hvp, _by_batch])
def test_on_a_fixed_quadratic_the_pairs_are_those_of_eigh_and_of_lanczos(feed):
    data = _still()
    trace = _run(data, feed)
    _assert_eigenpairs(dho2.spectrum(trace.state), data[0])
    whole = jax.jit(lambda matrix: dho2.lanczos(matrix_operator(matrix, START), START, rank=3))(data[0])
    _assert_eigenpairs(whole, data[0])
    np.testing.assert_allclose(dho2.spectrum(trace.state).eigenvalues, whole.eigenvalues, atol=1e-4)
    assert trace.metrics["rejected_refreshes"][-1] == 0
    assert trace.metrics["skipped_probes"][-1] == 0


def _dense_publications(trace, matrices, rank):
    """For every publication: step, Ritz values, residuals, and the part of the residuals outside of the basis.

    From the vectors that were probed and the matrices of those steps, in float64.
    """
    result, basis, products = [], [], []
    for t, (probed, published, completed) in enumerate(
        zip(trace.probed(), trace.published(), trace.completed(), strict=True)
    ):
        if probed:
            basis.append(trace.vector[t].astype(np.float64))
            products.append(matrices[t].astype(np.float64) @ basis[-1])
        if published:
            q, w = np.stack(basis), np.stack(products)
            projected = q @ w.T
            values, coefficients = np.linalg.eigh((projected + projected.T) / 2)
            index = np.argsort(-np.abs(values))[:rank]
            values, coefficients = values[index], coefficients.T[index]
            remainder = coefficients @ w - values[:, None] * (coefficients @ q)
            outside = remainder - remainder @ q.T @ q
            result.append((t, values, np.linalg.norm(remainder, axis=1), np.linalg.norm(outside, axis=1)))
        if completed:
            basis, products = [], []
    return result


def test_published_pairs_are_the_ritz_pairs_of_the_probes_of_their_cycle():
    """The operator moves while it is probed, and the residuals say so."""
    matrices = _moving()
    trace = _run(matrices)
    publications = _dense_publications(trace, matrices, rank=3)
    assert sum(trace.completed()) >= 5
    for t, values, residuals, outside in publications:
        for i in range(3):
            np.testing.assert_allclose(trace.metrics[f"eigenvalue_{i}"][t], values[i], atol=1e-4)
            np.testing.assert_allclose(trace.metrics[f"residual_{i}"][t], residuals[i], atol=1e-4)
        if trace.completed()[t]:
            # What the basis leaves out is small next to what the movement does.
            assert np.all(residuals > 0.03)
            assert np.all(residuals > 5 * outside)


def test_where_the_operator_moves_too_much_the_pairs_are_left_to_the_base():
    matrices = _moving()
    strict = _run(matrices, max_residual=1e-3)
    assert sum(strict.completed()) >= 5
    assert not strict.mask[strict.completed()].any()
    assert _run(matrices).mask[-1].all()


# What happens when.


def _expected_schedule(steps, *, probe_interval, order, warmup_steps):
    """Steps that probe and steps that publish, one cycle after the other."""
    probes, publications, due, count, begins = [], [], warmup_steps, 0, False
    for t in range(steps):
        if begins:
            count, begins = 0, False
        elif count == order:
            publications.append(t)
            begins = True
        elif t >= due:
            probes.append(t)
            count, due = count + 1, t + probe_interval
    return probes, publications


@pytest.mark.parametrize(
    ("probe_interval", "warmup_steps", "order"), [(1, 0, 9), (2, 0, 9), (5, 0, 9), (3, 7, 9), (1, 100, 9), (3, 0, 12)]
)
def test_probes_and_publications_follow_the_interval(probe_interval, warmup_steps, order):
    numbers = {"probe_interval": probe_interval, "warmup_steps": warmup_steps}
    # Nothing is sure enough to be published within a cycle.
    trace = _run(_still(), rank=4 if order == _N else 3, order=order, max_residual=0.0, **numbers)
    probes, publications = _expected_schedule(_NUM_STEPS, order=order, **numbers)
    np.testing.assert_array_equal(np.flatnonzero(trace.probed()), probes)
    np.testing.assert_array_equal(np.flatnonzero(trace.published()), publications)
    if probe_interval > 2 and probes:
        # Neither a publication nor the start of a cycle delays a probe.
        assert set(np.diff(probes)) == {probe_interval}
    assert not np.any(trace.probed() & trace.published())
    assert np.max(trace.metrics["cycle_probes"]) == min(order, len(probes))
    last = [max((s for s in publications if s <= t), default=0) for t in range(_NUM_STEPS)]
    np.testing.assert_array_equal(trace.metrics["age"], np.arange(1, _NUM_STEPS + 1) - last)


def test_a_cycle_ends_early_once_the_tolerance_is_met():
    tight, loose = (_run(_still(), tolerance=tolerance, max_residual=0.0) for tolerance in (0.0, 10.0))
    lengths = [np.flatnonzero(trace.completed())[0] for trace in (tight, loose)]
    assert lengths == [9, krylov.CHECK_EVERY]


def test_cycles_wait_for_one_probe_more_than_there_are_pairs():
    """Else the copies of a multiple eigenvalue would not be found."""
    trace = _run(_still(), rank=4, order=_N, tolerance=10.0, max_residual=0.0)
    assert np.flatnonzero(trace.completed())[0] == 2 * krylov.CHECK_EVERY


def test_pairs_are_used_before_the_cycle_ends():
    trace = _run(_still(_STAGED), rank=4, order=_N)
    first = np.flatnonzero(trace.published())[0]
    assert first == krylov.CHECK_EVERY
    assert trace.metrics["cycle_probes"][first] == krylov.CHECK_EVERY
    assert trace.metrics["active_pairs"][first] == 1
    (value,), (row,) = _largest(symmetric(_STAGED), 1)
    np.testing.assert_allclose(trace.metrics["eigenvalue_0"][first], value, rtol=1e-3)
    assert abs(trace.rows[first, 0] @ row) > 0.999
    assert trace.metrics["active_pairs"][-1] == 4


@pytest.mark.parametrize(
    "diagonal",
    [
        _STAGED,
        0.7 ** np.arange(_N),
        (-0.8) ** np.arange(_N),
        np.repeat([5.0, 3.0, 1.0], _N // 3),
        np.repeat([5.0, 0.0], [3, _N - 3]),  # breaks down twice, with a null vector each time
    ],
    ids=["staged", "graded", "alternating", "multiple", "multiple and null"],
)
def test_pairs_published_within_a_cycle_are_more_than_were_in_use(diagonal):
    # Diagonal, so that zeros are exact. With rank 4, the last case has fewer pairs than are wanted.
    matrices = np.float32(np.broadcast_to(np.diag(diagonal), (_NUM_STEPS, _N, _N)))
    trace = _run(matrices, rank=4, order=_N)
    before = np.append(0, trace.metrics["active_pairs"][:-1])
    partial = trace.published() & ~trace.completed()
    assert np.all(trace.metrics["active_pairs"][partial] > before[partial])


def test_a_cycle_starts_from_the_published_vectors():
    matrices = _still(0.6 ** np.arange(_N))
    trace = _run(matrices, tolerance=0.05, max_residual=0.05)
    ends = np.flatnonzero(trace.completed())
    start, rows = trace.vector[ends[0] + 2], trace.rows[ends[0]]
    # The mean of three, and a tenth of noise.
    overlaps = rows @ start
    np.testing.assert_allclose(overlaps, 1 / np.sqrt(3), atol=0.1)
    assert 0.9 < np.linalg.norm(overlaps) < 0.9999
    lengths = np.diff(ends, prepend=-2) - 2
    assert lengths[0] == 2 * krylov.CHECK_EVERY
    assert np.all(lengths[1:] == krylov.CHECK_EVERY)


def test_each_cycle_has_noise_of_its_own():
    trace = _run(_still())
    starts = trace.vector[np.flatnonzero(trace.completed())[:-1] + 2]
    noise = starts - (starts @ trace.rows[-1].T) @ trace.rows[-1]
    noise = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    assert np.max(np.abs(noise @ noise.T - np.eye(len(noise)))) < 0.95


# The interval that adapts.


def _jumping(at, factor=3.0, steps=_NUM_STEPS):
    """Four products find both pairs of a matrix of rank 2, which grows at one step."""
    matrices = _still(np.concatenate([[10.0, 6.0], np.zeros(_N - 2)]), steps)
    matrices[at:] *= factor
    return matrices


_ADAPTING = {"rank": 2, "order": 4, "probe_interval": (1, 8), "alpha": 0.02}


def _intervals(trace):
    """The interval after every cycle."""
    return list(trace.metrics["probe_interval"][trace.completed()])


def test_on_a_fixed_quadratic_the_interval_doubles_up_to_its_bound():
    trace = _run(_jumping(70, steps=70), **_ADAPTING)
    # The first cycle has nothing to compare with.
    assert _intervals(trace) == [1, 2, 4, 8, 8]
    assert _intervals(_run(_jumping(_NUM_STEPS), **{**_ADAPTING, "probe_interval": (1, 3)}))[:4] == [1, 2, 3, 3]


def test_where_the_spectrum_jumps_the_interval_halves():
    still = _run(_jumping(_NUM_STEPS), **_ADAPTING)
    third = np.flatnonzero(still.completed())[2]
    trace = _run(_jumping(third + 1), **_ADAPTING)
    assert _intervals(trace)[:5] == [1, 2, 4, 2, 4]


def test_a_jump_within_a_cycle_makes_probes_no_rarer():
    """The pairs of that cycle are spoiled and masked out, which is not agreement."""
    still = _run(_jumping(_NUM_STEPS), **_ADAPTING)
    probes, third = np.flatnonzero(still.probed()), np.flatnonzero(still.completed())[2]
    trace = _run(_jumping(probes[probes > third][2]), **_ADAPTING)
    assert _intervals(trace)[:3] == [1, 2, 4]
    assert _intervals(trace)[3] <= 4


def test_the_interval_never_falls_below_the_probe_interval():
    matrices = _jumping(_NUM_STEPS)
    matrices *= np.float32(3.0 ** (np.arange(_NUM_STEPS) // 6 % 2))[:, None, None]  # a cycle takes six steps
    trace = _run(matrices, **_ADAPTING)
    assert set(_intervals(trace)) == {1}
    trace = _run(_jumping(_NUM_STEPS), **{**_ADAPTING, "probe_interval": (3, 8)})
    assert _intervals(trace)[:3] == [3, 6, 8]


def test_without_the_option_the_interval_stays():
    trace = _run(_jumping(30), probe_interval=2)
    assert set(trace.metrics["probe_interval"]) == {2}


# Probes that cannot be had, and products that are not finite.


def test_without_curvature_probes_are_skipped_and_the_base_works_alone():
    data = _still(np.abs(_SPECTRUM))
    trace = _run(data, _by_nothing, probe_interval=7)
    assert trace.metrics["matvecs"][-1] == 0
    due = np.arange(_NUM_STEPS) % 7 == 0
    np.testing.assert_array_equal(trace.metrics["skipped_probes"], np.cumsum(due))
    alone = jax.jit(lambda x, matrix: -jnp.float32(_LEARNING_RATE) * jnp.dot(matrix, x, precision="highest"))
    x = flat(START)
    for t in range(_NUM_STEPS):
        update = alone(np.float32(x), data[t])
        np.testing.assert_allclose(trace.updates[t], update, rtol=1e-4, atol=1e-7)
        x = trace.params[t]


def _step(tx, feed):
    """A training step."""

    def step(params, state, data):
        gradient, arguments = feed(params, state, data)
        updates, state = tx.update(gradient, state, params, **arguments)
        return optax.apply_updates(params, updates), state

    return step


def _optimizer(loss_fn=_loss, **options):
    defaults = {"rank": 3, "order": 9, "probe_interval": 2, "alpha": 0.05, "tolerance": 0.0}
    base = options.pop("base", optax.sgd(_LEARNING_RATE))
    return dho2.mr_dho2(base, loss_fn, **grouped(**{**defaults, **options}))


def test_a_skipped_probe_is_tried_again_an_interval_later():
    matrix, tx = _still()[0], _optimizer(probe_interval=3)
    without, with_batch = jax.jit(_step(tx, _by_nothing)), jax.jit(_step(tx, _by_batch))
    params, state = jax.tree.map(jnp.asarray, START), tx.init(START)
    counts = []
    for t in range(10):
        params, state = (without if t < 4 else with_batch)(params, state, matrix)
        metrics = dho2.metrics(state)
        counts.append((int(metrics["skipped_probes"]), int(metrics["matvecs"])))
    assert counts == [(1, 0)] * 3 + [(2, 0)] * 3 + [(2, 1)] * 3 + [(2, 2)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("where", [slice(None), 3], ids=["all", "one"])
def test_products_that_are_not_finite_are_rejected_and_the_process_goes_on(bad, where):
    entries = np.zeros((_NUM_STEPS, _N), bool)
    # The first probe, two in a row, one on the way, the ninth, which would end the cycle, and one of the next cycle.
    spoiled = np.array([0, 4, 5, 10, 13, 30])
    entries[spoiled, where] = True
    data = _still(), np.full(_NUM_STEPS, bad, np.float32), entries
    # Strict, so that no pairs are published after the fourth probe.
    numbers = {"max_residual": 1e-5}
    trace = _run(data, _by_spoiled_hvp, **numbers)
    clean = _run((_still(), np.zeros(_NUM_STEPS, np.float32), entries), _by_spoiled_hvp, **numbers)
    assert np.isfinite(trace.params).all()
    assert np.isfinite(flat(trace.state)).all()
    assert trace.probed()[spoiled].all()
    np.testing.assert_array_equal(
        trace.metrics["rejected_refreshes"], np.cumsum(np.isin(np.arange(_NUM_STEPS), spoiled))
    )
    # The same vector is probed again, and the cycle is as many steps longer.
    for t in spoiled:
        np.testing.assert_array_equal(trace.vector[t + 1], trace.vector[t])
    np.testing.assert_array_equal(trace.vector[6], clean.vector[3])
    first, clean_first = (np.flatnonzero(run.completed())[0] for run in (trace, clean))
    assert first == clean_first + 5
    _assert_eigenpairs(dho2.spectrum(trace.state), data[0][0])


def test_products_that_are_never_finite_leave_everything_to_the_base():
    data = _still(), np.full(_NUM_STEPS, np.nan, np.float32), np.ones((_NUM_STEPS, _N), bool)
    trace, base = _run(data, _by_spoiled_hvp), _run(_still(), _by_nothing)
    # Two programs: the compiler may round them differently, by the size of the parameters and not of their differences.
    np.testing.assert_allclose(trace.params, base.params, rtol=1e-6, atol=1e-6)
    assert trace.metrics["rejected_refreshes"][-1] == trace.metrics["matvecs"][-1] == _NUM_STEPS
    assert trace.metrics["refreshes"][-1] == 0


# Degenerate operators.


@pytest.mark.parametrize(
    "eigenvalues",
    [np.zeros(_N), np.full(_N, 2.5), np.append(np.zeros(_N - 2), [4.0, -1.0]), np.repeat([3.0, 1.0], _N // 2)],
    ids=["zero", "multiple of the identity", "rank two", "two values"],
)
@pytest.mark.parametrize("exact", [False, True], ids=["turned", "diagonal"])
def test_pairs_of_degenerate_operators_are_right_or_masked(eigenvalues, exact):
    matrix = np.diag(eigenvalues) if exact else symmetric(eigenvalues)
    trace = _run(np.float32(np.broadcast_to(matrix, (_NUM_STEPS, _N, _N))))
    _assert_right_or_masked(trace, matrix, min(3, np.count_nonzero(eigenvalues)))


@pytest.mark.parametrize("n", [3, 5])
def test_spaces_smaller_than_the_order_are_exhausted_and_restarted(n):
    eigenvalues = np.array([4.0, -3.0, 1.0, 0.5, 0.1])[:n]
    trace = _run(_still(eigenvalues), params={"a": np.linspace(0.5, 1, n, dtype=np.float32)})
    _assert_right_or_masked(trace, symmetric(eigenvalues), min(n, 3))
    assert np.max(trace.metrics["cycle_probes"]) == n
    assert sum(trace.completed()) >= 5


def _assert_right_or_masked(trace, matrix, num_right):
    assert np.isfinite(flat(trace.params)).all()
    assert np.isfinite(flat(trace.state)).all()
    assert trace.metrics["rejected_refreshes"][-1] == 0
    assert trace.metrics["active_pairs"][-1] == num_right
    scale = max(np.linalg.norm(matrix, 2), 1)
    for t in np.flatnonzero(trace.completed()):
        mask, rows = trace.mask[t], trace.rows[t].astype(np.float64)
        values = np.array([trace.metrics[f"eigenvalue_{i}"][t] for i in range(3)], np.float64)
        residuals = np.linalg.norm(rows @ matrix - values[:, None] * rows, axis=1)
        reported = np.array([trace.metrics[f"residual_{i}"][t] for i in range(3)])
        np.testing.assert_allclose(reported[mask], residuals[mask], atol=1e-5 * scale)
        assert np.all(residuals[mask] < 3e-4 * scale)
        distances = np.abs(np.linalg.eigvalsh(matrix) - values[mask, None])
        assert np.all(np.min(distances, axis=1) < 1e-5 * scale)
        np.testing.assert_allclose(rows @ rows.T, np.diag(mask.astype(float)), atol=1e-5)


# `value_grad_and_hvp`, on a loss whose Hessian depends on the parameters and on the samples.

_INPUTS = np.float32(np.random.default_rng(7).normal(size=(16, _N)) * np.linspace(2, 0.1, _N))


def _soft_loss(params, inputs):
    z = jnp.dot(inputs, _as_vector(params), precision="highest")
    return jnp.mean(jnp.log(jnp.cosh(z)))


def _soft_loss_with_aux(params, inputs):
    return _soft_loss(params, inputs), {"first": params["a"][0, 0]}


def _dense_gradient(params, inputs=_INPUTS):
    inputs = np.asarray(inputs, np.float64)
    return inputs.T @ np.tanh(inputs @ flat(params)) / len(inputs)


def _dense_hessian(params, inputs=_INPUTS):
    inputs = np.asarray(inputs, np.float64)
    return inputs.T @ (inputs / np.cosh(inputs @ flat(params))[:, None] ** 2) / len(inputs)


_value_and_grad = jax.jit(jax.value_and_grad(_soft_loss))


def _by_soft_hvp(params, state, inputs):
    _, gradient, hvp = dho2.value_grad_and_hvp(_soft_loss)(params, state, inputs)
    return gradient, {"hvp": hvp}


@functools.cache
def _soft():
    """An optimizer of cycles of five probes, its compiled step, which donates, and the states before each step."""
    tx = _optimizer(None, order=5, max_residual=1e-6)
    step = jax.jit(_step(tx, _by_soft_hvp), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.array, START), tx.init(START)
    before = [jax.device_get((params, state))]
    for _ in range(9):
        params, state = step(params, state, _INPUTS)
        before.append(jax.device_get((params, state)))
    return tx, step, before


@functools.cache
def _computing(loss_fn, **options):
    return jax.jit(dho2.value_grad_and_hvp(loss_fn, **options))


def _compute(params, state, *, allow_probe=True, loss_fn=_soft_loss, **options):
    return _computing(loss_fn, **options)(params, state, _INPUTS, allow_probe)


def _assert_close(tree, expected, tolerance=1e-6):
    np.testing.assert_allclose(flat(tree), expected, atol=tolerance * np.abs(expected).max())


def test_the_product_comes_with_loss_and_gradient_where_a_probe_is_due():
    _, _, before = _soft()
    for t, (params, state) in enumerate(before):
        value, gradient, hvp = _compute(params, state)
        expected = _value_and_grad(params, _INPUTS)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        _assert_close(gradient, flat(expected[1]))
        _assert_close(gradient, _dense_gradient(params), 1e-5)
        assert jax.tree.map(jnp.shape, hvp) == jax.tree.map(jnp.shape, params)
        # Probes are due at every other step, and five make a cycle.
        assert bool(streaming.is_due(state)) == (t % 2 == 0)
        if t % 2 == 0:
            product = _dense_hessian(params) @ flat(state.probing.process.vector)
            _assert_close(hvp, product, 1e-5)
        else:
            assert not flat(hvp).any()


def test_no_probe_is_due_while_pairs_wait_to_be_published():
    tx = _optimizer(None)
    state = tx.init(START)
    assert streaming.is_due(state)
    waiting = state.probing._replace(pending=jnp.ones((), bool))
    assert not streaming.is_due(state._replace(probing=waiting))


def test_allow_probe_turns_the_product_off():
    _, _, before = _soft()
    params, state = before[0]
    _, gradient, hvp = _compute(params, state, allow_probe=False)
    assert not flat(hvp).any()
    _assert_close(gradient, _dense_gradient(params), 1e-5)


def test_aux_is_returned_with_the_loss():
    _, _, before = _soft()
    for params, state in before[:2]:
        (value, aux), gradient, hvp = _compute(params, state, loss_fn=_soft_loss_with_aux, has_aux=True)
        np.testing.assert_allclose(value, _soft_loss(params, _INPUTS), rtol=1e-6)
        assert aux["first"] == params["a"][0, 0]
        _assert_close(gradient, _dense_gradient(params), 1e-5)
        due = bool(streaming.is_due(state))
        product = _dense_hessian(params) @ flat(state.probing.process.vector)
        np.testing.assert_allclose(flat(hvp), product if due else 0, atol=1e-5)


def test_a_product_on_a_part_of_the_batch():
    _, _, before = _soft()
    params, state = before[0]
    _, gradient, hvp = _compute(params, state, batch_size=4)
    vector = flat(state.probing.process.vector)
    _assert_close(gradient, _dense_gradient(params), 1e-5)
    _assert_close(hvp, _dense_hessian(params, part(_INPUTS, 4, None)) @ vector, 1e-5)
    assert np.abs(flat(hvp) - _dense_hessian(params) @ vector).max() > 1e-2
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        dho2.value_grad_and_hvp(_soft_loss, batch_size=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dho2.dho2(optax.sgd(0.1), _soft_loss, rank=2), "`state` must be that of an mr_dho2"),
        (lambda: optax.sgd(0.1), "`state` must hold one dho2, mr_dho2 or fosi state, got 0"),
        (lambda: optax.chain(_optimizer(), _optimizer()), "`state` must hold one .* got 2"),
    ],
    ids=["dho2", "none", "two"],
)
def test_states_without_one_process_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        dho2.value_grad_and_hvp(_soft_loss)(START, make().init(START), _INPUTS)


# Probes at the parameters of the first of the cycle.


def test_probes_at_the_anchor_see_the_parameters_of_the_first_of_the_cycle():
    tx = _optimizer(_soft_loss, order=5, anchored=True, alpha=1.0, max_residual=1.0)
    step = jax.jit(_step(tx, lambda params, state, b: (jax.grad(_soft_loss)(params, b), {"batch": b})))
    params, state = jax.tree.map(jnp.asarray, START), tx.init(START)
    anchor, anchors, differences = flat(START), 0, []
    for _ in range(24):
        np.testing.assert_array_equal(flat(state.probing.anchor), anchor)
        column, vector = int(state.probing.process.count), flat(state.probing.process.vector)
        probes = bool(streaming.is_due(state))
        (params, state), old = step(params, state, _INPUTS), params
        if probes:
            if column == 0:
                anchor, anchors = flat(old), anchors + 1
            projected = state.probing.process.projected[column, column]
            np.testing.assert_allclose(projected, vector @ _dense_hessian(anchor) @ vector, rtol=1e-4)
            # At the moving parameters it is another.
            differences.append(abs(vector @ _dense_hessian(old) @ vector / projected - 1))
    assert anchors >= 3
    assert max(differences) > 1e-2


def test_the_product_is_taken_at_the_anchor_and_the_gradient_at_the_parameters():
    tx = _optimizer(None, anchored=True)
    state = jax.jit(_step(tx, _by_soft_hvp))(START, tx.init(START), _INPUTS)[1]
    state = state._replace(probing=state.probing._replace(wait=jnp.zeros_like(state.probing.wait)))
    assert state.probing.process.count == 1
    elsewhere = jax.tree.map(lambda x: jnp.asarray(x + 0.5), START)
    for options, inputs in (({}, _INPUTS), ({"batch_size": 4}, part(_INPUTS, 4, None))):
        _, gradient, hvp = _compute(elsewhere, state, **options)
        vector = flat(state.probing.process.vector)
        _assert_close(gradient, _dense_gradient(elsewhere), 1e-5)
        _assert_close(hvp, _dense_hessian(START, inputs) @ vector, 1e-5)


def test_after_a_warm_up_the_anchor_is_where_the_first_cycle_starts():
    tx = _optimizer(_soft_loss, anchored=True, warmup_steps=6)
    step = jax.jit(_step(tx, _by_soft_hvp))
    params, state = jax.tree.map(jnp.asarray, START), tx.init(START)
    for _ in range(7):
        (params, state), old = step(params, state, _INPUTS), params
    assert dho2.metrics(state)["matvecs"] == 1
    vector = flat_rows(state.probing.process.basis)[0]
    expected = vector @ _dense_hessian(old) @ vector
    np.testing.assert_allclose(state.probing.process.projected[0, 0], expected, rtol=1e-4)


# Compositions.


def _final_state(tx, feed, data):
    return jax.jit(functools.partial(_scan, tx, feed=feed))(data)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _final_traced(tx, feed, data):
    return _scan(tx, data, feed)


def _final(tx, feed, data):
    return jax.tree.map(np.asarray, _final_traced(tx, feed, data))


def test_in_a_chain_and_with_a_loss_that_the_product_comes_before():
    data = _still(np.abs(_SPECTRUM))

    def of_twice_the_loss(params, state, matrix):
        gradient, arguments = _by_hvp(params, state, 2 * matrix)
        return gradient, {**arguments, "batch": matrix}

    tx = optax.chain(optax.clip(0.5), _optimizer(_loss, probe_interval=1), optax.scale(0.5))
    _assert_eigenpairs(dho2.spectrum(_final(tx, of_twice_the_loss, data).state), 2 * data[0])


def _by_batch_of_everything(params, state, matrix):
    gradient, arguments = _by_batch(params, state, matrix)
    return gradient, {**arguments, "full_params": params}


@pytest.mark.parametrize("feed", [_by_hvp, _by_batch_of_everything])
def test_under_a_mask_the_curvature_is_that_of_the_visible_parameters(feed):
    data = _still(np.abs(_SPECTRUM))
    inner = _optimizer(_loss, probe_interval=1, anchored=feed is _by_hvp)
    labels = {"a": "hybrid", "b": "plain"}
    trace = _final(optax.partition({"hybrid": inner, "plain": optax.sgd(0.01)}, labels), feed, data)
    _assert_eigenpairs(dho2.spectrum(trace.state), data[0][:10, :10])
    assert np.all(np.abs(trace.updates[:, 10:]) > 0)


def _every_third(params, state, matrix):
    compute = dho2.value_grad_and_hvp(_loss)
    _, gradient, hvp = compute(params, state, matrix, allow_probe=state.mini_step == 2)
    return gradient, {"hvp": hvp}


@pytest.mark.parametrize("feed", [_every_third, _by_batch])
def test_multi_steps_probes_and_publishes_on_real_updates_only(feed):
    data = _still(np.abs(_SPECTRUM))
    tx = dho2.MultiSteps(_optimizer(max_residual=1e-3), every_k_schedule=3)
    trace = _final(tx, feed, data)
    probes, publications = (np.flatnonzero(x) for x in (trace.probed(), trace.published()))
    # Nine probes, at every other update; then a publication, and the start of the next cycle, which delays a probe.
    np.testing.assert_array_equal(probes, 3 * np.array([*range(0, 18, 2), 19]) + 2)
    assert set(publications % 3) == {2}
    assert np.flatnonzero(trace.completed()) == 3 * 17 + 2
    _assert_eigenpairs(dho2.spectrum(trace.state), data[0])


def test_hyperparameters_in_the_state():
    """Intervals can be changed on the way, and the state be donated."""
    solver = dho2.Eigensolver(order=4, max_residual=0.0)

    def make(probe_interval):
        return dho2.mr_dho2(optax.sgd(_LEARNING_RATE), rank=3, probe_interval=probe_interval, eigensolver=solver)

    tx = optax.inject_hyperparams(make)(probe_interval=jnp.int32(2))
    step = jax.jit(_step(tx, _by_hvp), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.array, START), tx.init(START)
    matvecs = []
    for t in range(24):
        if t == 9:  # the publication that follows takes it over
            state = state._replace(hyperparams={**state.hyperparams, "probe_interval": jnp.int32(4)})
        params, state = step(params, state, _still()[0])
        matvecs.append(int(dho2.metrics(state)["matvecs"]))
    probes = np.flatnonzero(np.diff(matvecs, prepend=0))
    np.testing.assert_array_equal(probes, [0, 2, 4, 6, 9, 11, 13, 15, 18, 22])


# Loops, donation, checkpoints.


def test_a_scan_equals_a_loop_that_donates_and_compiles_once(caplog):
    data = np.float32(np.broadcast_to(_INPUTS, (24, *_INPUTS.shape)))
    tx, step, _ = _soft()
    trace = _final(tx, _by_soft_hvp, data)
    params, state = jax.tree.map(jnp.array, START), tx.init(START)
    described = jax.tree.map(jax.typeof, state)
    compiled = []
    for t in range(24):
        old = state
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            params, state = step(params, state, _INPUTS)
        compiled += [r for r in caplog.records if "compil" in r.getMessage().lower()]
        donated = old.probing.process, old.spectrum, old.base_state
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
        np.testing.assert_allclose(flat(params), trace.params[t], atol=1e-6)
    assert state.refreshes == trace.metrics["refreshes"][-1] > 1
    assert state.matvecs == trace.metrics["matvecs"][-1]
    assert not compiled
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda s: s.count + 1)(state)
    assert [r for r in caplog.records if "compil" in r.getMessage().lower()], "a compilation must show in the log"
    assert jax.tree.map(jax.typeof, state) == described


def _through_the_host(state, tmp_path):
    del tmp_path
    return jax.device_put(jax.device_get(state))


def _through_orbax(state, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: state)
        return checkpointer.restore(tmp_path / "state", abstract)


@pytest.mark.parametrize("carry", [_through_the_host, _through_orbax])
def test_a_run_resumed_in_the_middle_of_a_cycle_is_the_same_to_the_bit(carry, tmp_path):
    _, step, before = _soft()
    params, state = before[5]
    assert 0 < state.probing.process.count < 5
    whole = jax.tree.map(jnp.array, (params, state))
    stopped = carry(jax.tree.map(jnp.array, (params, state)), tmp_path)
    for _ in range(12):
        whole, stopped = (step(*run, _INPUTS) for run in (whole, stopped))
    assert whole[1].refreshes > state.refreshes
    for got, want in zip(jax.tree.leaves(stopped), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)


# Compilation and initial states.


@pytest.mark.parametrize("anchored", [False, True])
def test_abstract_init(anchored):
    tx = _optimizer(None, anchored=anchored)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, START)))
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (abstract, tx.init(START))]
    assert described[0] == described[1]
    assert [x.shape for x in abstract.probing.process.basis] == [(9, sum(x.size for x in jax.tree.leaves(START)))]
    assert (abstract.probing.anchor is None) is not anchored


def test_until_the_first_publication_updates_are_those_of_the_base():
    data = _still()
    trace = _run(data, _by_batch, max_residual=0.0, warmup_steps=5)
    first = np.flatnonzero(trace.published())[0]
    assert first == 5 + 9
    alone = jax.jit(lambda x, matrix: jax.tree.map(lambda g: -jnp.float32(_LEARNING_RATE) * g, _gradient(x, matrix)))
    x = _as_vector(START)
    for t in range(first):
        wanted = alone(x, data[t])
        # Another program, which may round differently.
        atol = 4 * np.finfo(np.float32).eps * np.abs(wanted).max()
        np.testing.assert_allclose(trace.updates[t], wanted, rtol=0, atol=atol)
        x = trace.params[t]


def _gradient(x, matrix):
    return _as_vector(jax.grad(_loss)(unflatten(x, START), matrix))


# Options.


def test_the_default_order_is_twice_the_number_of_pairs():
    assert _optimizer(order=None, rank=4).init(START).probing.process.projected.shape == (8, 8)


def test_curvature_takes_the_place_of_the_hessian_and_algebraic_selection_that_of_magnitude():
    def three_times(params, vector, matrix):
        return jax.tree.map(lambda x: 3 * x, matrix_operator(matrix, params)(vector))

    options = {"curvature": three_times, "select": "algebraic", "rank": 2, "num_smallest": 1}
    trace = _final(_optimizer(None, probe_interval=1, alpha=0.01, **options), _by_batch, _still())
    values = 3 * np.linalg.eigvalsh(symmetric(_SPECTRUM))
    found = dho2.spectrum(trace.state)
    assert found.mask.all()
    np.testing.assert_allclose(found.eigenvalues, values[[0, -2, -1]], atol=1e-4 * np.abs(values).max())


def test_value_fn_takes_the_place_of_the_loss_with_aux():
    data = _still(np.abs(_SPECTRUM))

    def by_value_fn(params, state, matrix):
        return _by_nothing(params, state, matrix)[0], {"value_fn": lambda p: (_loss(p, matrix), "aux")}

    trace = _final(_optimizer(None, probe_interval=1, has_aux=True), by_value_fn, data)
    _assert_eigenpairs(dho2.spectrum(trace.state), data[0])


def test_metrics_of_a_process():
    trace = _run(_still())
    names = {"skipped_probes", "probe_interval", "cycle_probes"}
    assert names <= set(trace.metrics)
    assert not names & set(dho2.metrics(dho2.dho2(optax.sgd(0.1), rank=2).init(START)))


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_interval": 0}, "`probe_interval` must be positive, got 0"),
        ({"probe_interval": -4}, "`probe_interval` must be positive, got -4"),
        ({"probe_interval": (4, 0)}, "`probe_interval` must be positive, got 0"),
        ({"probe_interval": (4, 3)}, r"`probe_interval` must be a pair \(shortest, longest\), got \(4, 3\)"),
        ({"probe_interval": (jnp.int32(4), jnp.float32(3))}, r"`probe_interval` must be a pair .*, got \(Array\(4, "),
        ({"probe_interval": (4,)}, r"`probe_interval` must be a number or a pair .*, got \(4,\)"),
        ({"warmup_steps": -1}, "`warmup_steps` must be non-negative, got -1"),
        ({"rank": 0}, "`rank` must be positive, got 0"),
        ({"rank": 4, "order": 3}, "`order` must be .* 4, got 3"),
        ({"select": "largest"}, "`select` must be one of .* got 'largest'"),
        ({"tolerance": -1.0}, "`tolerance` must be non-negative, got -1.0"),
        ({"base": 0.1}, "`base` must be an optax.GradientTransformation, got 0.1"),
        ({"loss_fn": _loss, "curvature": dho2.hessian(_loss)}, "`loss_fn` or `curvature`, not both"),
        (
            {"rayleigh": dho2.hessian(_loss)},
            "`rayleigh` is for the refreshes of dho2; mr_dho2 makes no products for it",
        ),
    ],
    ids=lambda x: (
        ", ".join(x) if isinstance(x, dict) else ""
    ),  # names only: what a function shows is not the same twice
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dho2.mr_dho2(**grouped(**{"base": optax.sgd(0.1), **options}))


@pytest.mark.parametrize(
    "hvp",
    [{"a": START["a"]}, {**START, "c": START["b"]}, {**START, "b": {"x": START["b"]}}, START["a"]],
    ids=["less", "more", "deeper", "an array"],
)
def test_a_product_of_another_structure_is_refused(hvp):
    tx = _optimizer(None)
    state = tx.init(START)
    with pytest.raises(ValueError, match="`hvp` must be a pytree like `params`, got "):
        tx.update(START, state, START, hvp=hvp)


def test_parameters_have_to_be_given():
    tx = _optimizer(None)
    with pytest.raises(ValueError, match="`update` needs `params`, got None"):
        tx.update(START, tx.init(START), hvp=START)


def test_hidden_parameters_have_to_be_given_for_a_loss_but_not_for_a_product():
    tx = optax.masked(_optimizer(_loss), {"a": True, "b": False})
    state = tx.init(START)
    with pytest.raises(ValueError, match=r"hidden by optax\.masked .* `full_params=`"):
        tx.update(START, state, START, batch=_still()[0])
    updates = jax.eval_shape(lambda: tx.update(START, state, START, hvp=START)[0])
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, START)


def test_where_nothing_is_given_hidden_parameters_are_not_asked_for():
    tx = optax.masked(_optimizer(None), {"a": True, "b": False})
    _, state = jax.jit(tx.update)(START, tx.init(START), START)
    assert dho2.metrics(state)["skipped_probes"] == 1


def test_options_are_those_of_dho2_but_for_the_schedule():
    ours, theirs = (set(inspect.signature(f).parameters) for f in (dho2.mr_dho2, dho2.dho2))
    assert ours - theirs == {"probe_interval"}
    assert theirs - ours == {"refresh_interval"}


def test_a_state_of_parameters_without_leaves():
    """Optax looks at the structure of a state through one."""
    state = _optimizer(None).init({})
    assert jax.tree.structure(state) == jax.tree.structure(_optimizer(None).init({}))
    assert state.probing.process.projected.shape == (9, 9)
    assert state.probing.process.count == 0
