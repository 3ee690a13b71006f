"""`dho2`, `fosi` and `MultiSteps` on one device, against a dense float64 version of the same optimizer."""

import functools
import inspect
import logging
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from benchmarks.options import grouped
from tests import helpers
from tests.helpers import AXIS, flat, flat_rows, named_spectra, symmetric, unflatten

_N = 8
_NUM_STEPS = 9
START = {"a": np.float32([[1.0, -0.5, 0.7], [0.3, -1.2, 0.9]]), "b": np.float32([0.4, -0.8])}
_SPECTRUM = np.array([10.0, -6.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1])
# What `_run` takes as numbers; every one may be traced.
_NUMBERS = {
    "learning_rate": 0.03,
    "decay": 0.8,
    "alpha": 0.1,
    "refresh_interval": 3,
    "warmup_steps": 2,
    "tolerance": 0.0,
    "max_residual": 0.1,
    "limit": 3.0,
    "growth": 100.0,
    "floor": 1e-3,
    "damping": 0.0,
}


class Problem(NamedTuple):
    """A loss that moves: at step `t` its gradient is ``gradient_matrix @ x + offset`` and its Hessian `curvature`."""

    gradient_matrix: Any  # (steps, n, n)
    offset: Any  # (steps, n)
    curvature: Any  # (steps, n, n)

    def steps(self, index: Any) -> "Problem":
        return Problem(*(x[index] for x in self))


class Trace(NamedTuple):
    """What `_scan` saw after every step, and the state at the end."""

    params: Any  # (steps, n)
    updates: Any  # (steps, n)
    metrics: dict[str, Any]
    state: Any


def make_problem(*arrays) -> Problem:
    return Problem(*(np.array(x, np.float32) for x in arrays))


def moving_quadratic(spectrum=_SPECTRUM) -> Problem:
    """An indefinite quadratic whose Hessian drifts, with a gradient that is not exactly its own."""
    drift = symmetric(np.linspace(-0.3, 0.4, _N), seed=1)
    matrices = np.stack([0.95**t * (symmetric(spectrum) + t * drift) for t in range(_NUM_STEPS)])
    offset = 0.3 * np.random.default_rng(2).normal(size=(_NUM_STEPS, _N))
    return make_problem(matrices, offset, matrices)


def _given_gradients(gradients, curvature) -> Problem:
    """Gradients that do not depend on the parameters."""
    return make_problem(np.zeros((len(gradients), _N, _N)), gradients, curvature)


def as_vector(params: Any) -> jax.Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])


def _loss(params: Any, matrix: Any) -> jax.Array:
    x = as_vector(params)
    return 0.5 * x @ jnp.dot(matrix, x, precision="highest")


def _gradient(params: Any, problem: Problem) -> Any:
    x = as_vector(params)
    return unflatten(jnp.dot(problem.gradient_matrix, x, precision="highest") + problem.offset, params)


def _pass_batch(params: Any, problem: Problem) -> dict[str, Any]:
    del params
    return {"batch": problem.curvature}


def _scan(tx: Any, problem: Problem, params: Any = None, extra_args: Any = _pass_batch) -> Trace:
    """Trains with `tx`; numbers of an update that are not finite are left out of the parameters."""
    params = jax.tree.map(jnp.asarray, START) if params is None else params

    def step(carry: Any, now: Problem) -> Any:
        params, state = carry
        updates, state = tx.update(_gradient(params, now), state, params, **extra_args(params, now))
        applied = optax.apply_updates(params, updates)
        params = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(new), new, old), applied, params)
        return (params, state), (as_vector(params), as_vector(updates), dho2.metrics(state))

    (_, state), seen = jax.lax.scan(step, (params, tx.init(params)), problem)
    return Trace(*seen, state)


def _split_numbers(numbers: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The base, the subspace optimizer and the options of `dho2`."""
    options = dict(numbers)
    base = optax.sgd(options.pop("learning_rate"))
    return base, optax.ema(options.pop("decay"), debias=False), options


@jax.jit
def _run_traced(numbers: dict[str, Any], problem: Problem) -> Trace:
    base, subspace, options = _split_numbers(numbers)
    return _scan(dho2.dho2(base, _loss, **grouped(rank=2, order=_N, subspace=subspace, **options)), problem)


def _run(problem: Problem, **numbers: Any) -> Trace:
    """One compiled run of `dho2` for all values of its numbers."""
    merged = {**_NUMBERS, **numbers}
    whole = ("refresh_interval", "warmup_steps")
    return _run_traced(
        {k: jnp.asarray(v, jnp.int32 if k in whole else jnp.float32) for k, v in merged.items()}, problem
    )


def _optimizer(loss_fn: Any = _loss, **options: Any) -> optax.GradientTransformationExtraArgs:
    """What `_run` runs, with Python numbers and options that cannot be traced."""
    base, subspace, merged = _split_numbers({**_NUMBERS, "subspace": None, **options})
    subspace = subspace if merged.pop("subspace") is None else options["subspace"]
    base = merged.pop("base", base)
    return dho2.dho2(base, loss_fn, **grouped(**{"rank": 2, "order": _N, "subspace": subspace, **merged}))


def _compiled(tx: Any, problem: Problem, **options: Any) -> Trace:
    return jax.jit(functools.partial(_scan, tx, **options))(problem)


class DenseOptimizer:
    """`dho2` in float64, on flat vectors, with the Hessian's eigenvectors from LAPACK and SGD as base."""

    def __init__(
        self, *, rank=2, num_smallest=0, select="magnitude", base_momentum=0.0, keep=None, subspace_gain=1, **numbers
    ):
        self.rank, self.num_smallest, self.select = rank, num_smallest, select
        self.base_momentum = base_momentum
        self.keep = keep or (lambda momentum, coordinates, decay: decay * momentum + (1 - decay) * coordinates)
        self.numbers = {**_NUMBERS, **numbers}
        self.values, self.rows = np.zeros(0), np.zeros((0, _N))
        self.momentum = np.zeros(0)
        self.trace = np.zeros(_N)
        self.subspace_gain = subspace_gain  # how far its momentum is taken to carry a gradient that lasts
        self.visible = slice(None)  # what the hybrid sees of the gradient
        self.least = 0.0  # what eigenvalues counted as at least in the last update
        self.published_rule = False  # of FOSI
        self.missed = 0.0
        self.scale = 1.0
        self.usual = self.peak = 0.0  # length of gradients

    def magnitudes(self, least=0.0):
        sizes = np.abs(self.values)
        damped = np.maximum(sizes, self.numbers["floor"] * sizes.max(initial=0)) + self.numbers["damping"]
        return np.maximum(damped, least)

    def refresh(self, matrix):
        values, columns = np.linalg.eigh(np.asarray(matrix, np.float64))
        if self.select == "magnitude":
            index = np.argsort(-np.abs(values))[: self.rank]
        else:
            index = np.r_[np.arange(self.num_smallest), np.arange(_N - self.rank, _N)]
        old_scale = self.magnitudes(self.least) if not self.published_rule else np.ones(len(self.values))
        carried = self.rows.T @ (self.momentum / old_scale)
        outside = np.eye(_N) - self.rows.T @ self.rows
        self.values, self.rows = values[index], columns.T[index]
        known = self.rows.T @ np.diag(np.abs(self.values)) @ self.rows
        self.missed = 0.0 if self.published_rule else np.linalg.norm(outside @ known @ outside, 2)
        new_scale = self.magnitudes(self.least) if not self.published_rule else np.ones(len(self.values))
        self.momentum = new_scale * (self.rows @ carried)

    def sigma(self):
        sizes = np.maximum(np.abs(self.values[self.num_smallest :]), self.least)
        limit = max(self.numbers["limit"], 1)
        if not sizes.size:
            return 1.0
        tolerable = (
            np.inf if self.published_rule else (3.8 if self.base_momentum else 2) / self.numbers["learning_rate"]
        )
        return float(np.clip(min(sizes.max(), tolerable) / max(sizes.min(), self.missed), 1, limit))

    def update(self, gradient, alpha):
        length = np.linalg.norm(gradient[self.visible])
        self.usual *= np.exp(0.1 * np.clip(np.log(length / self.usual), -1, 1)) if self.usual else 0.0
        self.usual, self.peak = self.usual or length, max(length, 0.9 * self.peak)
        # Pairs along which the base goes further than the Newton step would are the base's.
        kept = np.abs(self.values) >= self.least
        coordinates = np.where(kept, self.rows @ gradient, 0)
        self.momentum = self.keep(self.momentum, coordinates, self.numbers["decay"])
        self.trace = gradient - self.rows.T @ coordinates + self.base_momentum * self.trace
        base = -self.numbers["learning_rate"] * self.trace
        outside = base - self.rows.T @ np.where(kept, self.rows @ base, 0)
        # The Newton step goes no further than the base would along a gradient that lasts.
        sigma = self.sigma()
        base_gain = 10 if self.base_momentum else 1
        if not self.published_rule:
            self.least = alpha * self.subspace_gain / (base_gain * self.numbers["learning_rate"])
        newton = self.rows.T @ (kept * self.momentum / self.magnitudes(self.least)) if self.values.size else 0
        self.scale = min(sigma, self.scale * self.numbers["growth"])
        # No gradient of the problems here is an outlier; some are longer than usual.
        uses_pairs = np.any(np.abs(self.values) >= self.least)
        brake = np.ones_like(outside)
        if uses_pairs and not self.published_rule:
            brake[self.visible] = min(1.0, self.usual / self.peak)
        return brake * self.scale * outside - alpha * newton

    def is_due(self, t):
        since = t + 1 - self.numbers["warmup_steps"]
        return since >= 0 and since % self.numbers["refresh_interval"] == 0

    def run(self, problem, before=lambda g: g, after=lambda u, x: u, start=None):
        """Parameters and updates of every step; `before` and `after` stand around the optimizer in a chain."""
        x = flat(START) if start is None else start
        alpha = self.numbers["alpha"]
        params, updates = [], []
        for t, (matrix, offset, curvature) in enumerate(
            zip(*(np.asarray(a, np.float64) for a in problem), strict=True)
        ):
            if self.is_due(t):
                self.refresh(curvature)
            update = self.update(before(matrix @ x + offset), alpha(t) if callable(alpha) else alpha)
            update = after(update, x)
            x = x + update
            params.append(x)
            updates.append(update)
        return np.stack(params), np.stack(updates)


def assert_follows(trace, expected, tolerance=1e-4):
    """Parameters and updates equal those of the dense run, relative to the largest."""
    for got, want in zip((trace.params, trace.updates), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


def _distance(trace, expected):
    return np.abs(np.asarray(trace.params) - expected[0]).max() / np.abs(expected[0]).max()


def _is_due(t, warmup_steps, refresh_interval):
    return t + 1 >= warmup_steps and (t + 1 - warmup_steps) % refresh_interval == 0


# The update rule and its options.


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"learning_rate": 0.05},
        {"alpha": 0.05},
        {"alpha": 0.5},
        {"decay": 0.0},
        {"refresh_interval": 2},
        {"warmup_steps": 5},
        {"limit": 1.0},
        {"limit": 1.3},
        {"growth": 1.2},
        {"floor": 0.9},
        {"damping": 3.0},
    ],
    ids=str,
)
def test_trajectories_are_those_of_the_dense_optimizer(numbers):
    problem = moving_quadratic()
    trace = _run(problem, **numbers)
    assert_follows(trace, DenseOptimizer(**numbers).run(problem))
    if numbers:
        assert _distance(trace, DenseOptimizer().run(problem)) > 5e-3


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({"select": "algebraic"}, {"select": "algebraic"}),
        ({"select": "algebraic", "num_smallest": 1}, {"select": "algebraic", "num_smallest": 1}),
        ({"rank": 3}, {"rank": 3}),
        ({"subspace": optax.identity()}, {"keep": lambda momentum, coordinates, decay: coordinates}),
        (
            {"subspace": optax.trace(0.5)},
            {"keep": lambda momentum, coordinates, decay: 0.5 * momentum + coordinates, "subspace_gain": 10},
        ),
    ],
    ids=["algebraic", "algebraic and smallest", "rank", "identity", "heavy ball"],
)
def test_options_that_are_not_numbers(options, dense):
    problem = moving_quadratic()
    reference = DenseOptimizer(**dense)
    # Without momentum of its own, the dense optimizer starts from as many zeros as there are pairs.
    trace = _compiled(_optimizer(**options), problem)
    assert_follows(trace, reference.run(problem))
    assert _distance(trace, DenseOptimizer().run(problem)) > 5e-3


def test_the_newton_step_solves_the_subspace_at_once_and_the_base_does_the_rest():
    matrix = symmetric(np.abs(_SPECTRUM))
    problem = make_problem(matrix[None], np.zeros((1, _N)), matrix[None])
    values, columns = np.linalg.eigh(matrix)
    steep = columns[:, -2:].T
    x = flat(START)
    outside = x - steep.T @ (steep @ x)
    gradient_outside = matrix @ outside
    for limit, sigma in ((1.0, 1.0), (3.0, values[-1] / values[-2])):
        # With this learning rate the base goes further along the steep directions than the Newton step.
        numbers = {"alpha": 1.0, "decay": 0.0, "warmup_steps": 1, "learning_rate": 0.2, "limit": limit}
        trace = _run(problem, sharpness=np.inf, **numbers)
        np.testing.assert_allclose(steep @ trace.params[0], 0, atol=1e-5)
        np.testing.assert_allclose(trace.params[0], outside - 0.2 * sigma * gradient_outside, atol=1e-5)
        np.testing.assert_allclose(trace.metrics["base_scale"][0], sigma, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "tolerated"),
    [
        (lambda rate: optax.sgd(rate, momentum=0.9), 3.8),
        (lambda rate: optax.chain(optax.ema(0.9, debias=False), optax.scale(-rate)), 38),
        (lambda rate: optax.sgd(rate), 2),
    ],
    ids=["heavy ball", "average", "no momentum"],
)
@pytest.mark.parametrize("sharpness", [0.5, 1.0, np.inf])
def test_the_scaled_base_stays_below_the_curvature_it_tolerates(base, tolerated, sharpness):
    """The learning rates are such that the bound of 0.5 is just below the second eigenvalue, which is 5.58 then."""
    rate = tolerated / 11
    options = {"base": base(rate), "warmup_steps": 1, "refresh_interval": 1, "limit": 1.6, "alpha": 0.01}
    trace = _compiled(_optimizer(sharpness=sharpness, **options), moving_quadratic())
    # After the second refresh, which shows that the first has missed little.
    values = np.abs([trace.metrics[f"eigenvalue_{i}"][1] for i in range(2)])
    assert 0 < trace.metrics["missed_curvature"][1] < values[1]
    bound = sharpness * tolerated / rate
    expected = np.clip(min(values[0], bound) / values[1], 1, 1.6)
    np.testing.assert_allclose(trace.metrics["base_scale"][1], expected, rtol=1e-4)
    assert (expected < 1.001) == (bound < 6)


def test_the_scale_waits_for_a_second_refresh_and_for_eigenvectors_that_stay():
    problem = moving_quadratic()
    turned = problem.curvature.copy()
    turned[8:] = symmetric(_SPECTRUM, seed=7)
    trace = _run(problem._replace(curvature=turned), warmup_steps=1, refresh_interval=4)
    published = _run(problem._replace(curvature=turned), warmup_steps=1, refresh_interval=4, sharpness=np.inf)
    scales, missed = trace.metrics["base_scale"], trace.metrics["missed_curvature"]
    largest = np.max(np.abs([trace.metrics[f"eigenvalue_{i}"] for i in range(2)]), axis=0)
    np.testing.assert_allclose(missed[:4], largest[:4], rtol=1e-5)  # there was nothing before
    np.testing.assert_allclose(scales[:4], 1, rtol=1e-6)
    assert scales[7] > 1.2
    assert missed[8] > 0.5 * largest[8]
    assert 1 <= scales[8] < scales[7]
    assert published.metrics["base_scale"][0] > 1.2 < published.metrics["base_scale"][8]


def test_the_base_does_not_outrun_steep_directions_of_which_a_refresh_finds_one():
    """Six eigenvalues are 6, of which the batch of a refresh shows one; the base tolerates 1.2 times that, not 3."""
    matrix = symmetric(np.r_[[6.0] * 6, np.full(_N - 6, 0.5)])
    rows = np.linalg.eigh(matrix)[1].T
    always = 0.5 * np.eye(_N) + 0.5 * np.outer(rows[0], rows[0])
    shown = np.stack([always + 5.5 * np.outer(v, v) for v in np.repeat(rows[-6:], 10, axis=0)])
    problem = make_problem(np.broadcast_to(matrix, shown.shape), np.zeros((60, _N)), shown)
    options = {"base": optax.sgd(3.8 / 7.2, momentum=0.9), "refresh_interval": 10, "warmup_steps": 1}
    trace, published = (_compiled(_optimizer(sharpness=limit, **options), problem) for limit in (1.0, np.inf))
    np.testing.assert_allclose(trace.metrics["missed_curvature"][10:], 6, rtol=1e-4)
    assert np.max(trace.metrics["base_scale"]) < 1.21
    assert np.max(np.abs(trace.params[-1])) < np.max(np.abs(flat(START)))
    assert np.max(np.abs(published.params[-1])) > 10 * np.max(np.abs(flat(START)))


def test_the_scale_grows_slowly_and_shrinks_at_once():
    problem = moving_quadratic()
    # The second of two refreshes finds all eigenvalues alike, and so no reason for a scale.
    curvature = problem.curvature.copy()
    curvature[4:] = np.eye(_N)
    numbers = {"growth": 1.1, "sharpness": np.inf, "warmup_steps": 1, "refresh_interval": 4}
    trace = _run(problem._replace(curvature=curvature), **numbers)
    scales = trace.metrics["base_scale"]
    np.testing.assert_allclose(scales[:4], 1.1 ** np.arange(1, 5), rtol=1e-5)
    np.testing.assert_allclose(scales[4:8], 1, rtol=1e-4)


def test_a_base_that_is_too_fast_for_what_has_turned_out_of_the_subspace_is_braked():
    """SGD at a rate of 0.05 tolerates a curvature of 40; one of 60 turns away from its eigenvector at update 20."""
    axis, other, steps = np.eye(2, dtype=np.float32)[0], np.eye(2, dtype=np.float32)[1], 60

    def run(optimizer: Any) -> Any:
        tx = optimizer(optax.sgd(0.05), lambda x, a: 0.5 * x @ a @ x, rank=1, warmup_steps=1, refresh_interval=1000)

        def step(carry: Any, t: Any) -> Any:
            x, state = carry
            steep = jnp.where(t < 20, axis, other)
            gradient = 59 * steep * (steep @ x) + x
            updates, state = tx.update(gradient, state, x, batch=60 * jnp.outer(axis, axis))
            return (x + updates, state), jnp.linalg.norm(gradient)

        start = jnp.asarray([0.01, 0.01])
        return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))[1])()

    assert run(dho2.fosi)[-1] > 1e9
    lengths = run(functools.partial(dho2.dho2, base_scale=dho2.BaseScale(limit=1.0)))
    assert 60 * 0.01 * 0.1 < np.max(lengths) < 60 * 0.01 * 10


def test_eigenvalues_can_be_taken_anew_with_another_operator():
    problem = moving_quadratic()
    doubled = dho2.hessian(lambda params, matrix: 2 * _loss(params, matrix))
    plain, anew = (
        _compiled(_optimizer(warmup_steps=1, refresh_interval=100, rayleigh=rayleigh), problem)
        for rayleigh in (None, doubled)
    )
    for name in ("eigenvalue_0", "eigenvalue_1"):
        np.testing.assert_allclose(anew.metrics[name][0], 2 * plain.metrics[name][0], rtol=1e-4)
    first, second = (np.linalg.norm(dho2.spectrum(x.state, START).eigenvectors["b"]) for x in (plain, anew))
    np.testing.assert_allclose(first, second, rtol=1e-5)
    # Half the Newton step: the directions are the same, the eigenvalues twice as large.
    rows = flat_rows(plain.state.spectrum.eigenvectors)
    inside = [rows @ np.asarray(x.updates[0], np.float64) for x in (plain, anew)]
    np.testing.assert_allclose(inside[1], inside[0] / 2, rtol=1e-3, atol=1e-6)


def test_an_operator_for_the_eigenvalues_needs_one_for_the_eigenvectors():
    with pytest.raises(ValueError, match=r"`rayleigh` needs `loss_fn` or `curvature`"):
        dho2.dho2(optax.sgd(0.1), eigensolver=dho2.Eigensolver(rayleigh=dho2.hessian(_loss)))


def test_before_the_first_refresh_updates_are_those_of_the_base():
    problem = moving_quadratic()
    trace = _run(problem, warmup_steps=100)
    x = jnp.asarray(as_vector(START))
    alone = jax.jit(lambda x, now: -jnp.float32(_NUMBERS["learning_rate"]) * as_vector(_gradient(x, now)))
    for t in range(_NUM_STEPS):
        wanted = alone(x, problem.steps(t))
        # Another program, which may round differently.
        atol = 4 * np.finfo(np.float32).eps * np.abs(wanted).max()
        np.testing.assert_allclose(trace.updates[t], wanted, rtol=0, atol=atol)
        x = trace.params[t]
    assert trace.metrics["matvecs"][-1] == 0


@pytest.mark.parametrize(("warmup_steps", "refresh_interval"), [(1, 1), (1, 4), (3, 2), (4, 100), (9, 3), (10, 1)])
def test_updates_that_are_preceded_by_a_refresh(warmup_steps, refresh_interval):
    trace = _run(moving_quadratic(), warmup_steps=warmup_steps, refresh_interval=refresh_interval)
    due = np.array([_is_due(t, warmup_steps, refresh_interval) for t in range(_NUM_STEPS)])
    np.testing.assert_array_equal(trace.metrics["refreshes"], np.cumsum(due))
    np.testing.assert_array_equal(trace.metrics["matvecs"], _N * np.cumsum(due))
    # The update that a refresh precedes is the first that is made with it.
    last = [max((s for s in range(t + 1) if due[s]), default=0) for t in range(_NUM_STEPS)]
    np.testing.assert_array_equal(trace.metrics["age"], np.arange(1, _NUM_STEPS + 1) - last)


def test_a_refresh_waits_until_it_is_allowed():
    problem = moving_quadratic()
    allowed = np.ones(_NUM_STEPS, bool)
    allowed[1] = False  # the first refresh is due here

    def extra_args(params, now):
        # The flag travels in the offset's place: a gradient of zeros does not need one.
        return {"batch": now.curvature, "allow_refresh": now.offset[0] > 0}

    flags = np.where(allowed, 1, -1)[:, None] * np.ones((_NUM_STEPS, _N), np.float32)
    trace = _compiled(_optimizer(), problem._replace(offset=np.float32(flags)), extra_args=extra_args)
    due = [_is_due(t - 1, 2, 3) for t in range(_NUM_STEPS)]  # and all that follow are as much later
    np.testing.assert_array_equal(trace.metrics["refreshes"], np.cumsum(due))


def test_whether_a_refresh_is_allowed_may_be_a_number_of_each_device():
    """Of a type that does not say that all have the same, which an all-gather leaves behind."""
    options = {"rank": 2, "refresh_interval": 2, "split": dho2.Split(AXIS), "warmup_steps": 1}
    tx = dho2.dho2(optax.sgd(0.1), lambda params, batch: jnp.mean(batch) * jnp.sum(params**2), **options)

    @functools.partial(jax.shard_map, mesh=helpers.make_mesh(2), in_specs=(P(AXIS), P()), out_specs=P())
    def clocks(batch, allowed):
        params = jnp.ones(6)
        state, found = tx.init(params), []
        for ok in allowed:
            agreed = jax.lax.all_gather(jax.lax.pcast(ok, AXIS, to="varying"), AXIS).all()
            _, state = tx.update(params, state, params, batch=batch, allow_refresh=agreed)
            found.append(state.clock)
        return jnp.stack(found)

    np.testing.assert_array_equal(clocks(jnp.ones(4), jnp.asarray([False, False, True, True])), [0, 0, 1, 2])


def test_a_loose_tolerance_ends_a_refresh_early():
    problem = moving_quadratic()
    tight, loose = (_run(problem, tolerance=tolerance, warmup_steps=9) for tolerance in (0.0, 10.0))
    assert tight.metrics["matvecs"][-1] == _N
    assert loose.metrics["matvecs"][-1] == 4


def test_pairs_with_large_residuals_are_left_to_the_base():
    problem = moving_quadratic()
    inaccurate = {"tolerance": 10.0, "warmup_steps": 1, "refresh_interval": 100}
    lenient = _run(problem, **inaccurate, max_residual=np.inf)
    strict = _run(problem, **inaccurate, max_residual=0.0)
    assert lenient.metrics["active_pairs"][-1] == 2
    assert strict.metrics["active_pairs"][-1] == 0
    assert strict.metrics["residual_max"][-1] == lenient.metrics["residual_max"][-1] > 0
    assert strict.metrics["eigenvalue_0"][-1] != 0
    assert np.isnan(strict.metrics["eigenvalue_max"][-1])
    assert strict.metrics["pairs_with_large_residual"][-1] == 2
    assert_follows(strict, DenseOptimizer(warmup_steps=100).run(problem), tolerance=1e-6)


@pytest.mark.parametrize(("order", "expected"), [(None, 4), (5, 5)])
def test_order_bounds_the_curvature_products(order, expected):
    tx = _optimizer(order=order, warmup_steps=1)
    _, state = _one_update(tx, batch=moving_quadratic().curvature[0])
    assert dho2.metrics(state)["matvecs"] == expected


def _one_update(tx, params=None, gradient=None, **extra_args):
    """A compiled update; `extra_args` that are functions stay outside of the compiled arguments."""
    params = jax.tree.map(jnp.asarray, START) if params is None else params
    gradient = jax.tree.map(jnp.ones_like, params) if gradient is None else gradient
    static = {name: value for name, value in extra_args.items() if callable(value)}
    arrays = {name: value for name, value in extra_args.items() if not callable(value)}

    @jax.jit
    def update(gradient, state, params, arrays):
        return tx.update(gradient, state, params, **arrays, **static)

    return update(gradient, tx.init(params), params, arrays)


def _traced_update(tx, params, **extra_args):
    """Shapes and dtypes of an update and of the states around it."""
    state = jax.eval_shape(tx.init, params)

    def update(gradient, state, params):
        return tx.update(gradient, state, params, **extra_args)

    updates, new_state = jax.eval_shape(update, params, state, params)
    return updates, state, new_state


def test_has_aux():
    with_aux = lambda params, matrix: (_loss(params, matrix), {"norm": jnp.sum(params["a"])})  # noqa: E731
    problem = moving_quadratic()
    assert_follows(_compiled(_optimizer(with_aux, has_aux=True), problem), DenseOptimizer().run(problem))
    with pytest.raises(ValueError, match="`loss_fn` must return a scalar, got a tuple; give has_aux=True"):
        _traced_update(_optimizer(with_aux), START, batch=problem.curvature[0])


def test_curvature_takes_the_place_of_the_hessian():
    # For the loss sum(b p**4) / 2 the Gauss-Newton matrix of the squares is 4 b p**2, the Hessian is 6 b p**2.
    weights = np.arange(1.0, 1 + _N, dtype=np.float32)
    operator = dho2.gauss_newton(lambda params, b: as_vector(params) ** 2, lambda z, b: 0.5 * jnp.sum(b * z**2))
    _, state = _one_update(_optimizer(None, curvature=operator, warmup_steps=1), batch=weights)
    expected = np.sort(4 * weights * flat(START) ** 2)[::-1][:2]
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, expected, rtol=1e-5)


def test_value_fn_takes_the_place_of_the_loss_and_reaches_the_base():
    problem = moving_quadratic()
    seen = []

    def base_update(updates, state, params=None, *, value_fn, **extra_args):
        seen.append(value_fn)
        return jax.tree.map(lambda g: -_NUMBERS["learning_rate"] * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), base_update)
    trace = _compiled(
        _optimizer(None, base=base),
        problem,
        extra_args=lambda params, now: {"value_fn": lambda p: _loss(p, now.curvature)},
    )
    assert_follows(trace, DenseOptimizer().run(problem))
    assert callable(seen[0])


def test_obj_fn_is_another_name_of_value_fn():
    matrix = moving_quadratic().curvature[0]
    _, state = _one_update(_optimizer(None, warmup_steps=1), obj_fn=lambda p: _loss(p, matrix))
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, [values[-1], values[0]], rtol=1e-5)


def test_other_arguments_reach_the_base():
    """A base that multiplies its learning rate by ``value`` and does not mind others."""
    scaled = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, *, value, **extra_args: (
            jax.tree.map(lambda g: -0.1 * value * g, updates),
            state,
        ),
    )
    tx = _optimizer(base=scaled, warmup_steps=100)
    arguments = {"batch": moving_quadratic().curvature[0], "value": jnp.float32(3.0), "nobody": jnp.ones(2)}
    updates, _ = _one_update(tx, **arguments)
    np.testing.assert_allclose(flat(updates), -0.3, rtol=1e-6)


def test_arguments_that_nobody_knows_are_ignored():
    updates, _, _ = _traced_update(_optimizer(), START, batch=np.zeros((_N, _N), np.float32), nobody=1, value=2.0)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, START)


# One compiled step of the plain optimizer, with defaults where they matter: order, warm-up and subspace.

_PLAIN = {"rank": 4, "alpha": 0.1, "refresh_interval": 3, "tolerance": 0.0, "growth": 100.0}
_PLAIN_DENSE = {"rank": 4, "alpha": 0.1, "refresh_interval": 3, "warmup_steps": 3, "decay": 0.9}


@functools.cache
def _plain():
    """The optimizer and its step, which donates parameters and state."""
    tx = dho2.dho2(optax.sgd(0.03, momentum=0.5), _loss, **grouped(**_PLAIN))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, now):
        updates, state = tx.update(_gradient(params, now), state, params, batch=now.curvature)
        return optax.apply_updates(params, updates), state

    return tx, step


def _fresh():
    tx, _ = _plain()
    params = jax.tree.map(jnp.array, START)
    return params, tx.init(params)


def test_donated_steps_follow_the_dense_optimizer():
    _, step = _plain()
    problem = moving_quadratic()
    expected, _ = DenseOptimizer(**_PLAIN_DENSE, base_momentum=0.5).run(problem)
    params, state = _fresh()
    for t in range(_NUM_STEPS):
        old = params, state
        params, state = step(params, state, problem.steps(t))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old[0]))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old[1].spectrum, old[1].base_state)))
        np.testing.assert_allclose(flat(params), expected[t], atol=1e-4 * np.abs(expected).max())
    assert state.refreshes == 3


@pytest.mark.parametrize("factory", [dho2.dho2, dho2.mr_dho2])
@pytest.mark.parametrize("metric", [None, "base"])
def test_a_donated_update_without_a_refresh_copies_no_stack_of_vectors(factory, metric):
    """Copies in the entry of the program are made at every update; eigenvectors and Krylov basis are large."""
    tx = factory(optax.adam(0.01), lambda params, batch: jnp.sum(batch * jnp.tanh(params) ** 2), rank=3, metric=metric)
    params = jnp.ones((40, 50))

    def step(params, state, batch):
        grads = jax.grad(lambda p: jnp.sum(batch * jnp.tanh(p) ** 2))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile().as_text()
    entry = compiled[compiled.index("\nENTRY") :]
    stack = r"f32\[[36],40,50\]"
    assert re.search(stack, entry)
    assert not re.findall(stack + r"\S* copy\(", entry)


@pytest.mark.parametrize("factory", [dho2.dho2, dho2.mr_dho2])
def test_a_product_and_each_small_eigenproblem_are_compiled_once(factory):
    """Whatever asks: the first product or a later one, every fourth or the last, a first refresh or another."""

    def loss_fn(params, batch):
        return jnp.mean(batch * jnp.tanh(params) ** 2)

    def product(params, batch, vector):
        return jax.jvp(jax.grad(loss_fn), (params, batch), (vector, jnp.zeros_like(batch)))[1]

    tx = factory(optax.adam(0.01), loss_fn, rank=3)
    params = jax.ShapeDtypeStruct((8, 5), jnp.float32)

    def update(grads, state, params, batch):
        return tx.update(grads, state, params, batch=batch)

    one = jax.jit(product).lower(params, params, params).as_text().count("stablehlo.tanh")
    text = jax.jit(update).lower(params, jax.eval_shape(tx.init, params), params, params).as_text()
    assert text.count("stablehlo.tanh") == one > 0
    # Of the matrix of the Krylov space, and of the curvature that the old eigenvectors had missed.
    assert re.findall(r"syevd.*?> \(tensor<(\d+)x", text) == ["6", "3"]


def test_the_second_call_does_not_compile(caplog):
    def compilations(function, *arguments):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            result = function(*arguments)
        return result, [r for r in caplog.records if "compil" in r.getMessage().lower()]

    tx, step = _plain()
    now = moving_quadratic().steps(0)
    (params, state), _ = compilations(step, *_fresh(), now)
    for _ in range(3):
        (params, state), logs = compilations(step, params, state, now)
        assert not logs
    _, logs = compilations(jax.jit(lambda s: s.count + 1), state)
    assert logs, "a compilation must show in the log"
    abstract = jax.eval_shape(tx.init, START)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(_fresh()[0]))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


def test_without_jit():
    tx, step = _plain()
    problem = moving_quadratic()
    params, state = _fresh()
    for t in range(5):
        params, state = step(params, state, problem.steps(t))
    # The next update is preceded by a refresh.
    now = problem.steps(5)
    updates, new_state = tx.update(_gradient(params, now), state, params, batch=now.curvature)
    eager = optax.apply_updates(params, updates), new_state
    refreshes = int(state.refreshes)
    compiled = step(params, state, now)
    assert compiled[1].refreshes == refreshes + 1
    signs = jnp.sign(
        flat_rows(eager[1].spectrum.eigenvectors)[:, 0] * flat_rows(compiled[1].spectrum.eigenvectors)[:, 0]
    )
    np.testing.assert_array_equal(signs, 1)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_abstract_init():
    tx, _ = _plain()
    abstract = jax.eval_shape(tx.init, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, START)))
    real = _fresh()[1]
    described = jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), real)
    assert [x.shape for x in abstract.spectrum.eigenvectors] == [(4, 8)]
    assert abstract.base_state[0].trace["b"].shape == (2,)


def test_map_params_maps_what_is_shaped_like_parameters():
    tx, _ = _plain()
    _, state = _fresh()
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state, transform_non_params=lambda x: x - 1)
    for leaf in jax.tree.leaves((mapped.spectrum.eigenvectors, mapped.base_state)):
        np.testing.assert_array_equal(leaf, 1)
    for leaf in (mapped.count, mapped.matvecs, mapped.spectrum.eigenvalues):
        np.testing.assert_array_equal(leaf, -1)


# Compositions.


def test_chain():
    problem = moving_quadratic()
    tx = optax.chain(optax.clip(0.5), _optimizer(), optax.add_decayed_weights(-0.05))
    before, after = lambda g: np.clip(g, -0.5, 0.5), lambda u, x: u - 0.05 * x
    expected = DenseOptimizer().run(problem, before, after)
    assert_follows(_compiled(tx, problem), expected)
    for part in ({"before": before}, {"after": after}):
        assert np.abs(DenseOptimizer().run(problem, **part)[0] - expected[0]).max() > 0.01


def _alpha_schedule(count):
    return 0.5 * 0.7**count


def test_alpha_as_a_schedule():
    problem = moving_quadratic()
    expected = DenseOptimizer(alpha=_alpha_schedule).run(problem)
    assert_follows(_compiled(_optimizer(alpha=_alpha_schedule), problem), expected)


def test_inject_hyperparams():
    """Numbers live in the state, so that they can be changed; the schedule of alpha is followed."""
    problem = moving_quadratic()

    def make(alpha, refresh_interval, damping):
        return _optimizer(alpha=alpha, refresh_interval=refresh_interval, damping=damping)

    numbers = {"refresh_interval": _NUMBERS["refresh_interval"], "damping": _NUMBERS["damping"]}
    tx = optax.inject_hyperparams(make)(_alpha_schedule, **numbers)

    @jax.jit
    def run(hyperparams, problem):
        def init(params):
            state = tx.init(params)
            return state._replace(hyperparams={**state.hyperparams, **hyperparams})

        return _scan(tx._replace(init=init), problem)

    for changed in (numbers, {"refresh_interval": 2, "damping": 3.0}):
        trace = run({name: jnp.asarray(number) for name, number in changed.items()}, problem)
        assert_follows(trace, DenseOptimizer(alpha=_alpha_schedule, **changed).run(problem))
        np.testing.assert_allclose(trace.state.hyperparams["alpha"], _alpha_schedule(_NUM_STEPS - 1), rtol=1e-5)


def test_masked_leaves_an_integer_leaf_alone():
    problem = moving_quadratic()
    everything = {"net": jax.tree.map(jnp.asarray, START), "steps": jnp.int32(3)}
    # The objective depends on the leaf that the optimizer does not see.
    loss = lambda params, matrix: params["steps"] / 3 * _loss(params["net"], matrix)  # noqa: E731
    tx = optax.masked(_optimizer(loss), {"net": True, "steps": False})

    @jax.jit
    def run(problem):
        def step(carry, now):
            params, state = carry
            gradient = {"net": _gradient(params["net"], now), "steps": jnp.int32(0)}
            updates, state = tx.update(gradient, state, params, batch=now.curvature, full_params=params)
            params = optax.apply_updates(params, updates)
            return (params, state), (as_vector(params["net"]), as_vector(updates["net"]), params["steps"])

        return jax.lax.scan(step, (everything, tx.init(everything)), problem)[1]

    *trace, steps = run(problem)
    assert_follows(Trace(*trace, {}, None), DenseOptimizer().run(problem))
    assert steps.dtype == jnp.int32
    np.testing.assert_array_equal(steps, 3)


def test_partition_takes_the_curvature_of_the_visible_parameters():
    problem = moving_quadratic()
    tx = optax.partition(
        {"hybrid": _optimizer(limit=1.0), "plain": optax.sgd(_NUMBERS["learning_rate"])},
        {"a": "hybrid", "b": "plain"},
    )
    trace = _compiled(tx, problem, extra_args=lambda params, now: {"batch": now.curvature, "full_params": params})
    block = np.zeros((_N, _N), np.float32)
    block[:6, :6] = 1
    dense = DenseOptimizer(limit=1.0)
    dense.visible = slice(6)
    assert_follows(trace, dense.run(problem._replace(curvature=problem.curvature * block)))
    assert _distance(trace, DenseOptimizer(limit=1.0).run(problem)) > 5e-3


@functools.cache
def _accumulated(multi_steps):
    """A run of nine mini-steps, three to an update, and how many curvature products it made."""
    products = []

    def operator(params, vector, matrix):
        jax.debug.callback(lambda: products.append(1))
        return unflatten(jnp.dot(matrix, as_vector(vector), precision="highest"), vector)

    inner = _optimizer(None, curvature=operator, warmup_steps=1, refresh_interval=2)
    trace = _compiled(multi_steps(inner, every_k_schedule=3), moving_quadratic())
    jax.block_until_ready(trace)
    jax.effects_barrier()
    return trace, len(products)


def _mean_gradients(problem, every):
    """The problem of one update for every so many mini-steps, which sees the curvature of the last."""
    mean = lambda x: x.reshape(-1, every, *x.shape[1:]).mean(axis=1)  # noqa: E731
    return Problem(mean(problem.gradient_matrix), mean(problem.offset), problem.curvature[every - 1 :: every])


def test_multi_steps_equals_the_run_with_mean_gradients():
    trace, _ = _accumulated(dho2.MultiSteps)
    params, updates = DenseOptimizer(warmup_steps=1, refresh_interval=2).run(_mean_gradients(moving_quadratic(), 3))
    assert_follows(Trace(trace.params[2::3], trace.updates[2::3], {}, None), (params, updates))
    np.testing.assert_array_equal(np.asarray(trace.updates).reshape(3, 3, _N)[:, :2], 0)
    assert trace.metrics["refreshes"][-1] == 2


def test_multi_steps_makes_curvature_products_on_real_updates_only():
    trace, products = _accumulated(dho2.MultiSteps)
    assert products == trace.metrics["matvecs"][-1] == 2 * _N
    theirs, their_products = _accumulated(optax.MultiSteps)
    assert their_products == 3 * products
    np.testing.assert_allclose(theirs.params, trace.params, atol=1e-5)


def test_multi_steps_in_a_chain_hands_arguments_on():
    inner = dho2.MultiSteps(_optimizer(), every_k_schedule=3).gradient_transformation()
    tx = optax.chain(optax.clip(1.0), inner)
    updates, _, _ = _traced_update(tx, START, batch=np.zeros((_N, _N), np.float32))
    assert _dtypes(updates) == _dtypes(START)


def test_multi_steps_may_be_told_to_wait_with_a_refresh():
    tx = dho2.MultiSteps(_optimizer(warmup_steps=1, refresh_interval=100), every_k_schedule=2)
    problem = moving_quadratic().steps(0)
    update, state = jax.jit(tx.update), tx.init(START)
    refreshes = []
    for allowed in (True, False, False, True, True, True):
        _, state = update(START, state, START, batch=problem.curvature, allow_refresh=allowed)
        refreshes.append(int(dho2.metrics(state)["refreshes"]))
    assert refreshes == [0, 0, 0, 1, 1, 1]


def test_multi_steps_with_a_schedule_and_skipped_mini_steps():
    """One mini-step to the first update and two to every other; a gradient that is not finite does not count."""
    problem = moving_quadratic().steps(slice(0, 6))
    problem.offset[2] = np.nan
    tx = dho2.MultiSteps(
        _optimizer(warmup_steps=1, refresh_interval=1),
        every_k_schedule=lambda step: jnp.where(step == 0, 1, 2),
        should_skip_update_fn=optax.skip_not_finite,
    )
    trace = _compiled(tx, problem)
    np.testing.assert_array_equal(trace.metrics["refreshes"], [1, 1, 1, 2, 2, 3])
    merged = _mean_gradients(problem.steps([1, 3, 4, 5]), 2)
    merged = Problem(*(np.concatenate([x[:1], y]) for x, y in zip(problem, merged, strict=True)))
    expected = DenseOptimizer(warmup_steps=1, refresh_interval=1).run(merged)
    assert_follows(Trace(trace.params[np.r_[0, 3, 5]], trace.updates[np.r_[0, 3, 5]], {}, None), expected)


def test_apply_if_finite():
    problem = moving_quadratic()
    bad = 4
    broken = problem._replace(offset=problem.offset.copy())
    broken.offset[bad, 1] = np.nan
    trace = _compiled(optax.apply_if_finite(_optimizer(), max_consecutive_errors=3), broken)
    np.testing.assert_array_equal(trace.updates[bad], 0)
    kept = np.delete(np.arange(_NUM_STEPS), bad)
    assert_follows(Trace(trace.params[kept], trace.updates[kept], {}, None), DenseOptimizer().run(problem.steps(kept)))


# What is carried over when the spectrum changes, and `fosi`.


@jax.jit
def _run_fosi_traced(numbers, problem):
    base, subspace, options = _split_numbers(numbers)
    limit = options.pop("limit")
    tx = dho2.fosi(base, _loss, rank=2, num_smallest=1, subspace=subspace, base_scale_limit=limit, **options)
    return _scan(tx, problem)


_FOSI_NUMBERS = ("learning_rate", "decay", "alpha", "refresh_interval", "warmup_steps", "limit")


def _run_fosi(problem, **numbers):
    merged = {**{name: _NUMBERS[name] for name in _FOSI_NUMBERS}, **numbers}
    return _run_fosi_traced(jax.tree.map(jnp.asarray, merged), problem)


@pytest.mark.parametrize("numbers", [{}, {"alpha": 0.05}, {"limit": 1.0}, {"warmup_steps": 4}], ids=str)
def test_fosi_is_the_algebraic_optimizer_without_damping(numbers):
    problem = moving_quadratic()
    dense = DenseOptimizer(select="algebraic", num_smallest=1, floor=0.0, **numbers)
    dense.published_rule = True
    assert_follows(_run_fosi(problem, **numbers), dense.run(problem))


def test_fosi_starts_every_lanczos_run_at_the_given_vector():
    """Started at an eigenvector of a matrix with multiple eigenvalues, the process breaks down at once."""
    start = jax.tree.map(jnp.zeros_like, START)
    start["a"] = start["a"].at[0, 0].set(1.0)
    weights = np.float32([4, 1, 1, 1, 1, 1, 1, 9])
    options = {"rank": 1, "refresh_interval": 1}
    diagonal = lambda params, b: 0.5 * jnp.sum(b * as_vector(params) ** 2)  # noqa: E731
    tx = dho2.fosi(optax.sgd(0.1), diagonal, start=start, **options)
    _, state = _one_update(tx, batch=weights)
    first_row = flat_rows(dho2.spectrum(state).eigenvectors)[0]
    # Four products: the start, and three in the random direction that follows the breakdown.
    assert abs(first_row[7]) > 0.99
    assert abs(first_row[0]) < 1e-3


def test_the_newton_step_is_continuous_at_a_refresh_and_in_fosi_the_gradient_average_is():
    """The Hessian shrinks to a hundredth, and the gradient vanishes at the refresh that finds out."""
    matrix = symmetric(np.abs(_SPECTRUM))
    gradient = np.random.default_rng(4).normal(size=_N)
    problem = _given_gradients(
        np.stack([gradient, gradient, gradient, 0 * gradient]), np.stack([matrix] * 3 + [0.01 * matrix])
    )
    numbers = {"learning_rate": 0.0, "decay": 0.9, "warmup_steps": 1, "refresh_interval": 3}
    for run, factor in ((_run, 0.9), (_run_fosi, 90.0)):
        trace = run(problem, **numbers)
        assert trace.metrics["refreshes"][-1] == 2
        assert np.abs(trace.updates[2]).max() > 1e-3
        np.testing.assert_allclose(trace.updates[3], factor * trace.updates[2], rtol=1e-3, atol=1e-6 * factor)


def test_a_separable_problem_is_solved_without_blowing_up():
    """Near the minimum the Hessian falls to zero together with the gradient, and old gradients are large."""
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 3
    inputs = np.float32(2 * np.eye(3)[labels] + 0.3 * rng.normal(size=(12, 3)))
    params = {"in": jnp.float32(rng.normal(size=(3, 6))), "out": jnp.float32(0.5 * rng.normal(size=(6, 3)))}

    def loss(params, batch):
        logits = jnp.tanh(batch @ params["in"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = dho2.dho2(
        optax.sgd(0.2, momentum=0.9),
        loss,
        rank=4,
        eigensolver=dho2.Eigensolver(order=12),
        alpha=0.3,
        refresh_interval=8,
    )

    @jax.jit
    def run(params, batch):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=300)

    (_, state), losses = run(params, inputs)
    assert losses[0] > 0.5
    assert losses[-1] < 1e-3
    assert np.max(losses[50:]) < 0.05
    # Near the end the curvature underflows, and a spectrum of it is rejected.
    assert state.refreshes + state.rejected == 37


# Dtypes and shapes of leaves.

_MIXED = {
    "half": np.ones((2, 3), np.float16),
    "brain": jnp.ones(5, jnp.bfloat16),
    "single": np.linspace(0.5, 1, 4, dtype=np.float32),
    "scalar": np.float32(2.0),
    "empty": np.zeros((0, 3), np.float32),
}


def _square_loss(params, batch):
    return batch * sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


def _dtypes(tree):
    return jax.tree.map(lambda x: jnp.dtype(x.dtype), tree)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("basis_dtype", [None, jnp.bfloat16])
def test_updates_keep_the_dtypes_of_the_parameters(dtype, basis_dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), START)
    tx = _optimizer(_square_loss, basis_dtype=basis_dtype, base=optax.adam(1e-3))
    updates, state, new_state = _traced_update(tx, params, batch=jnp.float32(1))
    assert _dtypes(updates) == _dtypes(params)
    assert _dtypes(new_state) == _dtypes(state)
    expected = jnp.dtype(jnp.float32 if basis_dtype is None else basis_dtype)
    assert set(jax.tree.leaves(_dtypes(state.spectrum.eigenvectors))) == {expected}
    assert state.spectrum.eigenvalues.dtype == jnp.float32


def test_one_tree_of_many_dtypes_with_scalar_and_empty_leaves():
    params = jax.tree.map(jnp.asarray, _MIXED)
    tx = _optimizer(_square_loss, warmup_steps=1, order=None)
    updates, state = _one_update(tx, params, batch=jnp.float32(1))
    assert _dtypes(updates) == _dtypes(params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    # H = 2 I.
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, 2, rtol=1e-2)
    assert np.all(np.isfinite(flat(updates)))
    assert state.refreshes == 1


_OUTLYING = np.abs(named_spectra(40)["outliers"])
_OUTLYING_MATRIX = np.float32(symmetric(_OUTLYING))


def _outlying_loss(params, batch):
    x = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(params)])
    return 0.5 * jnp.mean(batch) * x @ jnp.dot(_OUTLYING_MATRIX, x, precision="highest")


def _follow(tx, params, batch, num_updates):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(_outlying_loss)(params, batch), state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=num_updates)[0]


@pytest.mark.parametrize("timing", [{"refresh_interval": 10}, {"probe_interval": 1}], ids=["dho2", "mr_dho2"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")], ids=str)
def test_all_pairs_are_found_with_parameters_of_short_dtypes(dtypes, timing):
    params = {"a": jnp.ones((4, 6), dtypes[0]), "b": jnp.linspace(-1, -0.5, 16, dtype=dtypes[1])}
    make = dho2.dho2 if "refresh_interval" in timing else dho2.mr_dho2
    tx = make(optax.sgd(0.05), _outlying_loss, rank=4, **timing)
    params, state = jax.jit(lambda params: _follow(tx, params, jnp.ones(8), 42))(params)
    assert dho2.metrics(state)["active_pairs"] == 4
    precision = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    np.testing.assert_allclose(dho2.spectrum(state).eigenvalues, [10, 8, 6, 5], rtol=precision)
    assert np.isfinite(flat(params)).all()


def test_the_scale_of_the_objective_changes_nothing_until_squares_of_gradients_overflow():
    """With the learning rate scaled accordingly; then no curvature is learnt, and the base is by itself."""
    start = {"a": jnp.ones((4, 6)), "b": jnp.linspace(-1, -0.5, 16)}

    def run(scale):
        tx = dho2.dho2(optax.sgd(0.05 / scale), _outlying_loss, rank=4, refresh_interval=10)
        params, state = _follow(tx, start, scale * jnp.ones(8), 42)
        return params, dho2.metrics(state), dho2.spectrum(state).eigenvalues / scale

    scales = jnp.asarray([1, 1e-30, 1e15, 1e30], jnp.float32)
    params, metrics, eigenvalues = jax.jit(lambda scales: jax.lax.map(run, scales))(scales)
    np.testing.assert_array_equal(metrics["active_pairs"], [4, 4, 4, 0])
    np.testing.assert_array_equal(metrics["rejected_refreshes"], [0, 0, 0, 4])
    np.testing.assert_allclose(eigenvalues[:3], 3 * [[10, 8, 6, 5]], rtol=1e-3)
    usual, *scaled, base = flat_rows(params)
    for found in scaled:
        np.testing.assert_allclose(found, usual, atol=1e-4)
    alone = np.linalg.matrix_power(np.eye(40) - 0.05 * np.float64(_OUTLYING_MATRIX), 42) @ flat(start)
    np.testing.assert_allclose(base, alone, atol=1e-4)
    assert np.abs(usual - alone).max() > 1e-2


def test_a_short_basis_finds_eigenvalues_to_its_precision():
    matrix = moving_quadratic().curvature[0]
    _, state = _one_update(_optimizer(basis_dtype=jnp.bfloat16, warmup_steps=1), batch=matrix)
    found = dho2.spectrum(state)
    values = np.linalg.eigvalsh(matrix)
    assert [x.dtype for x in found.eigenvectors] == [jnp.bfloat16]
    np.testing.assert_allclose(found.eigenvalues, [values[-1], values[0]], rtol=3e-2)


def test_float64_throughout():
    with jax.enable_x64(True):
        problem = Problem(*(np.asarray(x, np.float64) for x in moving_quadratic()))
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), START)
        trace = jax.jit(lambda problem, params: _scan(_optimizer(), problem, params))(problem, params)
        assert [x.dtype for x in trace.state.spectrum.eigenvectors] == [jnp.float64]
        assert_follows(trace, DenseOptimizer().run(problem), tolerance=1e-11)
    assert jnp.ones(()).dtype == jnp.float32


def test_strict_dtype_promotion():
    params = jax.tree.map(jnp.asarray, _MIXED)
    with jax.numpy_dtype_promotion("strict"):
        updates, _, _ = _traced_update(_optimizer(_square_loss), params, batch=jnp.float32(1))
    assert _dtypes(updates) == _dtypes(params)


# Errors.


def _abstract_update(options, **arguments):
    """Traces an update of a valid problem, of which `options` and `arguments` break something."""
    params = arguments.pop("params", START)
    tx = dho2.dho2(optax.sgd(0.1), **grouped(**options))
    state = tx.init(START)
    jax.eval_shape(lambda g, s: tx.update(g, s, params, **arguments), START, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be positive, got 0"),
        ({"rank": -1}, "`rank` must be .* got -1"),
        ({"rank": 2.5}, "`rank` must be a Python int .* got 2.5"),
        ({"num_smallest": -2}, "`num_smallest` must be .* got -2"),
        ({"rank": 4, "order": 3}, "`order` must be .* 4, got 3"),
        ({"order": 20.0}, "`order` must be .* got 20.0"),
        ({"select": "largest"}, "`select` must be one of .*'algebraic'.* got 'largest'"),
        ({"num_smallest": 2}, "`num_smallest` .* got 2 with select='magnitude'"),
        ({"alpha": -0.1}, "`alpha` must be non-negative, got -0.1"),
        ({"alpha": float("nan")}, "`alpha` must be non-negative, got nan"),
        ({"floor": -1e-3}, "`floor` must be non-negative, got -0.001"),
        ({"damping": -1}, "`damping` must be non-negative, got -1"),
        ({"tolerance": -1e-2}, "`tolerance` must be non-negative, got -0.01"),
        ({"max_residual": -1.0}, "`max_residual` must be non-negative, got -1.0"),
        ({"limit": -3.0}, "`limit` must be non-negative, got -3.0"),
        ({"sharpness": 0.0}, "`sharpness` must be positive, got 0.0"),
        ({"growth": 0.9}, "`growth` must be at least 1, got 0.9"),
        ({"refresh_interval": 0}, "`refresh_interval` must be positive, got 0"),
        ({"warmup_steps": 0}, "`warmup_steps` must be positive, got 0"),
        ({"base": 0.1}, "`base` must be an optax.GradientTransformation, got 0.1"),
        ({"subspace": "momentum"}, "`subspace` must be an optax.GradientTransformation, got 'momentum'"),
        ({"loss_fn": 3.0}, "`loss_fn` must be callable, got 3.0"),
        ({"curvature": 3.0}, "`curvature` must be callable, got 3.0"),
        ({"loss_fn": _loss, "curvature": dho2.hessian(_loss)}, "`loss_fn` or `curvature`, not both"),
    ],
    ids=lambda x: (
        ", ".join(x) if isinstance(x, dict) else ""
    ),  # names only: what a function shows is not the same twice
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dho2.dho2(**grouped(**{"base": optax.sgd(0.1), **options}))
    if set(options) <= set(inspect.signature(dho2.fosi).parameters) and options != {"num_smallest": 2}:
        with pytest.raises(ValueError, match=message):
            dho2.fosi(**{"base": optax.sgd(0.1), **options})


@pytest.mark.parametrize(
    ("argument", "value"), [("rank", 2), ("num_smallest", 0), ("order", 4)], ids=["rank", "num_smallest", "order"]
)
def test_options_that_cannot_be_traced_say_so(argument, value):
    def build(value):
        dho2.dho2(optax.sgd(0.1), _loss, **grouped(**{"rank": 2, argument: value}))
        return value

    with pytest.raises(ValueError, match=f"`{argument}` must be .*int.* got .*"):
        jax.eval_shape(build, value)


def test_without_a_function_of_the_hyperparameters_the_remedy_is_named():
    """What optax injects as it stands are numbers of no known value, `rank` among them."""
    tx = optax.inject_hyperparams(dho2.dho2)(optax.sgd(0.1), rank=2)
    with pytest.raises(ValueError, match=r"`rank` must be .*int.* got .* a function of the hyperparameters"):
        tx.init(START)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_leaves_that_are_not_real_floating_point_are_named(dtype):
    params = {"net": {"a": np.ones(3, np.float32), "odd": jnp.ones(2, dtype)}}
    for tx in (_optimizer(), dho2.fosi(optax.sgd(0.1), _loss)):
        with pytest.raises(ValueError, match=rf"`params` .*{jnp.dtype(dtype).name} at \['net'\]\['odd'\].*masked"):
            tx.init(params)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"loss_fn": _loss}, {"params": None, "batch": 1.0}, "`update` needs `params`, got None"),
        ({"loss_fn": _loss}, {}, "`update` needs `batch=`"),
        ({}, {"batch": 1.0}, r"`update` needs `value_fn=` \(or `obj_fn=`\)"),
    ],
    ids=["params", "batch", "value_fn"],
)
def test_missing_arguments_of_update_are_named(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        _abstract_update(options, **arguments)


@pytest.mark.parametrize("options", [{"loss_fn": _loss}, {"curvature": dho2.hessian(_loss)}], ids=["loss", "operator"])
def test_hidden_parameters_have_to_be_given(options):
    tx = optax.masked(dho2.dho2(optax.sgd(0.1), **grouped(**options)), {"a": True, "b": False})
    state = tx.init(START)
    with pytest.raises(ValueError, match=r"hidden by optax\.masked .* `full_params=`"):
        tx.update(START, state, START, batch=np.eye(_N))
    if "curvature" in options:
        with pytest.raises(ValueError, match="`curvature` operators do not see"):
            tx.update(START, state, START, batch=np.eye(_N), full_params=START)


# Numbers that are not finite, and curvature that is none.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_gradient_that_is_not_finite_does_no_more_than_with_the_base_alone(bad, everywhere):
    problem = moving_quadratic()
    problem.offset[4, slice(None) if everywhere else 0] = bad  # step 4 is preceded by a refresh, step 5 is not
    trace = _run(problem)
    # From such a batch nothing is learnt, but from those after it.
    np.testing.assert_array_equal(trace.metrics["rejected_refreshes"], [0] * 4 + [1] * 5)
    assert trace.metrics["refreshes"][-1] == 2
    finite = np.isfinite(trace.updates)
    assert finite[np.arange(_NUM_STEPS) != 4].all()
    np.testing.assert_array_equal(finite[4], np.isfinite(problem.offset[4]))
    assert np.isfinite(flat(trace.state.subspace_state)).all()
    # Where the gradient was finite, the base made its step with it.
    if not everywhere:
        x = np.asarray(trace.params[3], np.float64)
        gradient = problem.gradient_matrix[4] @ x + problem.offset[4]
        factor = trace.metrics["base_scale"][4] * trace.metrics["base_brake"][4]
        step = -_NUMBERS["learning_rate"] * factor * gradient[1:]
        np.testing.assert_allclose(trace.updates[4, 1:], step, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("entry", [(slice(None), slice(None)), (0, 0), (3, 5)], ids=["all", "diagonal", "one"])
def test_curvature_that_is_not_finite_is_rejected_and_the_old_spectrum_kept(bad, entry):
    problem = moving_quadratic()
    problem.curvature[(4, *entry)] = bad  # refreshes are due at steps 1, 4 and 7
    trace = _run(problem)
    np.testing.assert_array_equal(trace.metrics["rejected_refreshes"], [0] * 4 + [1] * 5)
    np.testing.assert_array_equal(trace.metrics["refreshes"], [0, 1, 1, 1, 1, 1, 1, 2, 2])
    for name in ("eigenvalue_0", "eigenvalue_1", "residual_0", "active_pairs", "base_scale"):
        np.testing.assert_array_equal(trace.metrics[name][4:7], trace.metrics[name][3])
    np.testing.assert_array_equal(trace.metrics["age"], [1, 1, 2, 3, 4, 5, 6, 1, 2])
    # As if that refresh had not been due.
    dense = DenseOptimizer()
    dense.is_due = lambda t: t in (1, 7)
    assert_follows(trace, dense.run(moving_quadratic()))


def test_a_first_refresh_that_is_rejected_leaves_everything_to_the_base():
    problem = moving_quadratic()
    trace = _run(problem._replace(curvature=np.full_like(problem.curvature, np.nan)))
    assert trace.metrics["rejected_refreshes"][-1] == 3
    assert trace.metrics["refreshes"][-1] == 0
    assert_follows(trace, DenseOptimizer(warmup_steps=100).run(problem), tolerance=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12])
def test_curvature_of_extreme_size_gives_finite_updates(size):
    gradients = np.random.default_rng(5).normal(size=(_NUM_STEPS, _N))
    problem = _given_gradients(gradients, [size * symmetric(np.abs(_SPECTRUM))] * _NUM_STEPS)
    trace = _run(problem, warmup_steps=1)
    assert np.isfinite(trace.updates).all()
    assert np.isfinite(flat(trace.state)).all()
    assert trace.metrics["rejected_refreshes"][-1] == 0
    if size == 0:
        assert trace.metrics["active_pairs"][-1] == 0
        assert_follows(trace, DenseOptimizer(warmup_steps=100).run(problem))
    else:
        assert_follows(trace, DenseOptimizer(warmup_steps=1).run(problem))


@pytest.mark.parametrize("make", [dho2.dho2, dho2.mr_dho2, dho2.fosi])
def test_parameters_without_gradient_do_not_move(make):
    """A frozen leaf, and rows that no sample touches: to the last bit, with warm starts and after breakdowns."""
    scales = np.float32([9, 7, 5, 3, 1, 0.5])

    def loss(params, batch):
        rows = params["table"][jnp.array([0, 2])].ravel()
        return 0.5 * jnp.sum(scales * jnp.concatenate([rows, params["w"]]) ** 2 * batch)

    start = {"frozen": np.ones(9, np.float32), "table": np.ones((5, 2), np.float32), "w": np.ones(2, np.float32)}
    when = {"probe_interval": 1} if make is dho2.mr_dho2 else {"refresh_interval": 2}
    tx = make(optax.sgd(0.01), loss, rank=2, warmup_steps=1, **when)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, 1.0), state, params, batch=1.0)
        return optax.apply_updates(params, updates), state

    params, state = start, tx.init(start)
    for _ in range(12):
        params, state = step(params, state)
    assert dho2.metrics(state)["active_pairs"] == 2
    np.testing.assert_array_equal(params["frozen"], start["frozen"])
    np.testing.assert_array_equal(params["table"][np.array([1, 3, 4])], start["table"][np.array([1, 3, 4])])
    assert np.all(np.asarray(params["w"]) != start["w"])
    assert np.all(np.asarray(params["table"])[::2][:2] != 1)


def test_linear_and_constant_losses_and_unused_leaves():
    """No second derivatives, in autodiff's own terms: products that are zeros by construction."""
    loss = lambda params, b: b * jnp.sum(params["a"]) + 1.0  # noqa: E731
    tx = _optimizer(loss, warmup_steps=1)
    updates, state = _one_update(tx, batch=jnp.float32(2))
    np.testing.assert_allclose(flat(updates), -_NUMBERS["learning_rate"], rtol=1e-6)
    np.testing.assert_array_equal(dho2.spectrum(state).eigenvalues, 0)
    assert state.rejected == 0
    constant, _, _ = _traced_update(_optimizer(lambda params, b: b), START, batch=jnp.float32(1))
    assert _dtypes(constant) == _dtypes(START)


# Reading the state, and importing.


def test_metrics_and_spectrum_find_the_state_inside_others():
    nested = dho2.MultiSteps(
        optax.chain(
            optax.clip(1.0),
            optax.partition({"h": _optimizer(None), "s": optax.sgd(0.1)}, {"a": "h", "b": "s"}),
        ),
        every_k_schedule=2,
    )
    state = nested.init(START)
    names = {
        "updates",
        "gradient_share",
        "condition_number",
        "refreshes",
        "rejected_refreshes",
        "matvecs",
        "age",
        "active_pairs",
        "base_scale",
        "base_brake",
    }
    names |= {
        "eigenvalue_max",
        "eigenvalue_min",
        "residual_max",
        "missed_curvature",
        "pairs_in_null_space",
        "pairs_with_large_residual",
    }
    names |= {f"{x}_{i}" for x in ("eigenvalue", "residual") for i in range(2)}
    found = dho2.metrics(state)
    assert set(found) == names
    assert all(jnp.shape(x) == () for x in found.values())
    spectrum = dho2.spectrum(state)
    assert isinstance(spectrum, dho2.Spectrum)
    assert [x.shape for x in spectrum.eigenvectors] == [(2, 2, 3)]
    shown = {"a": START["a"], "b": optax.MaskedNode()}
    assert dho2.spectrum(state, shown).eigenvectors["a"].shape == (2, 2, 3)
    assert not spectrum.mask.any()


def test_metrics_describe_the_spectrum_in_use():
    problem = moving_quadratic()
    trace = _run(problem)
    values = np.linalg.eigvalsh(problem.curvature[7].astype(np.float64))
    last = {name: float(x[-1]) for name, x in trace.metrics.items()}
    assert last["eigenvalue_max"] == last["eigenvalue_0"] == pytest.approx(values[-1], rel=1e-5)
    assert last["eigenvalue_min"] == last["eigenvalue_1"] == pytest.approx(values[0], rel=1e-5)
    assert last["base_scale"] == pytest.approx(values[-1] / -values[0], rel=1e-5)
    assert last["residual_max"] == max(last["residual_0"], last["residual_1"])
    assert last["active_pairs"] == 2
    assert last["age"] == 2
    rows = flat_rows(dho2.spectrum(trace.state).eigenvectors)
    np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-5)


def _metrics_on(diagonal, **options):
    """Metrics before and after the first refresh on a diagonal quadratic."""
    diagonal = jnp.float32(diagonal)
    tx = dho2.dho2(optax.sgd(1e-3), lambda x, b: 0.5 * jnp.sum(b * x**2), **grouped(refresh_interval=1, **options))
    start = jnp.ones_like(diagonal)
    state = tx.init(start)
    after = jax.jit(tx.update)(diagonal, state, start, batch=diagonal)[1]
    return [{name: float(x) for name, x in jax.jit(dho2.metrics)(s).items()} for s in (state, after)]


def test_extremes_are_those_of_the_active_pairs_and_nan_before_there_are_any():
    before, after = _metrics_on([9.0, 7.0, 0.5, 0.4, 0.3], rank=3, order=5, tolerance=0.0)
    shown = [name for name in before if name.startswith(("eigenvalue", "residual"))]
    assert len(shown) == 3 + 2 * 3
    assert all(np.isnan(before[name]) for name in shown)
    assert (before["pairs_in_null_space"], before["pairs_with_large_residual"]) == (0, 0)
    assert not any(np.isnan(after[name]) for name in shown)
    assert after["eigenvalue_max"] == pytest.approx(9.0, rel=1e-4)
    assert after["eigenvalue_min"] == after["eigenvalue_2"] == pytest.approx(0.5, rel=1e-3)
    # Of a negative spectrum neither is zero.
    _, after = _metrics_on([-9.0, -7.0, -0.5], rank=2, order=3)
    assert (after["eigenvalue_max"], after["eigenvalue_min"]) == pytest.approx((-7.0, -9.0), rel=1e-4)


@pytest.mark.parametrize(
    ("diagonal", "options", "counts"),
    [
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], {"rank": 2, "order": 2, "max_residual": 0.0}, (0, 2)),
        ([0.0] * 6, {"rank": 2, "order": 4}, (2, 0)),
        ([5.0, 0.0, 0.0, 0.0, 0.0, 0.0], {"rank": 3, "order": 6}, (2, 0)),
        ([5.0, 3.0], {"rank": 3, "order": 6}, (1, 0)),
    ],
    ids=["large residuals", "no curvature", "one direction", "a small space"],
)
def test_metrics_say_why_pairs_are_not_active(diagonal, options, counts):
    _, after = _metrics_on(diagonal, **options)
    assert (after["pairs_in_null_space"], after["pairs_with_large_residual"]) == counts
    assert after["active_pairs"] == options["rank"] - sum(counts)
    assert np.isnan(after["eigenvalue_max"]) == np.isnan(after["eigenvalue_min"]) == (after["active_pairs"] == 0)
    # The Ritz values of the others stay, as estimates.
    assert not np.isnan(after[f"eigenvalue_{options['rank'] - 1}"])


def test_rejected_refreshes_leave_no_eigenvalues_to_be_plotted():
    _, after = _metrics_on([9.0, np.nan, 1.0], rank=1, order=2)
    assert (after["refreshes"], after["rejected_refreshes"], after["pairs_with_large_residual"]) == (0, 1, 0)
    assert np.isnan(after["eigenvalue_0"])


@pytest.mark.parametrize(
    ("make", "count"),
    [(lambda: optax.adam(0.1), 0), (lambda: optax.chain(_optimizer(), _optimizer()), 2)],
    ids=["none", "two"],
)
@pytest.mark.parametrize("read", [dho2.metrics, dho2.spectrum])
def test_a_state_without_one_optimizer_of_ours_is_refused(make, count, read):
    with pytest.raises(ValueError, match=f"`state` must hold one dho2, mr_dho2 or fosi state, got {count}"):
        read(make().init(START))


def test_importing_has_no_side_effects():
    script = """
import jax, optax
before = dict(jax.config.values)
import dho2_optax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert before == dict(jax.config.values)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
