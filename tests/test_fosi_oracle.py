"""`fosi` against trajectories measured with the published implementation (see data/README.md)."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_optax as dho2

_NUM_STEPS, _INTERVAL, _RANK = 300, 50, 5
_BASES = {
    "sgd": optax.sgd(0.01),
    "hb": optax.sgd(0.005, momentum=0.9),
    "adam": optax.adam(0.05),
}
_SUBSPACES = {"sgd": None, "hb": optax.trace(0.9), "adam": optax.ema(0.9, debias=False)}
_SCALE_LIMITS = {"sgd": 3.0, "hb": 3.0, "adam": 1.0}


class _Run(NamedTuple):
    base: str
    warmup_steps: int
    num_smallest: int
    alpha: float

    @property
    def name(self):
        return f"{self.base}_W{self.warmup_steps}_l{self.num_smallest}_a{self.alpha}"

    @property
    def tolerance(self):
        """How far float32 carries the published code from an exact replay, with some room."""
        return 3e-4 if self.num_smallest else 1e-5


_RUNS = (
    _Run("sgd", 50, 0, 0.1),
    _Run("hb", 50, 0, 0.1),
    _Run("adam", 50, 0, 0.1),
    _Run("hb", 1, 0, 1.0),
    _Run("adam", 1, 0, 0.1),
    _Run("hb", 50, 2, 0.1),
)


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).parent / "data" / "fosi_quadratic.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=_RUNS, ids=lambda run: run.name)
def trajectory(request, oracle):
    """A run of ours: parameters and loss before every step, and the metrics after it."""
    run = request.param
    hessian = jnp.asarray(oracle["H"])

    def loss_fn(x, batch):
        del batch
        return 0.5 * x @ jnp.dot(hessian, x, precision=jax.lax.Precision.HIGHEST)

    tx = dho2.fosi(
        _BASES[run.base],
        loss_fn,
        rank=_RANK,
        num_smallest=run.num_smallest,
        alpha=run.alpha,
        subspace=_SUBSPACES[run.base],
        refresh_interval=_INTERVAL,
        warmup_steps=run.warmup_steps,
        base_scale_limit=_SCALE_LIMITS[run.base],
        start=jnp.asarray(oracle["lanczos_start_vector"], jnp.float32),
    )

    def step(carry, _):
        x, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(x, ())
        updates, state = tx.update(grads, state, x, batch=())
        spectrum = dho2.spectrum(state)
        seen = {**dho2.metrics(state), "eigenvalues": spectrum.eigenvalues, "params": x, "loss": loss}
        return (optax.apply_updates(x, updates), state), seen

    @jax.jit
    def train(x):
        (x, _), seen = jax.lax.scan(step, (x, tx.init(x)), length=_NUM_STEPS)
        return {**seen, "params": jnp.append(seen["params"], x[None], axis=0)}

    return run, jax.tree.map(np.asarray, train(jnp.asarray(oracle["x0"])))


def _refresh_steps(ours):
    return np.flatnonzero(np.diff(ours["refreshes"], prepend=0))


def test_parameters_follow_the_published_trajectory(trajectory, oracle):
    run, ours = trajectory
    theirs = oracle[f"{run.name}/params"].astype(np.float64)
    distance = np.linalg.norm(ours["params"] - theirs, axis=1)
    assert np.max(distance) <= run.tolerance * np.linalg.norm(oracle["x0"])


def test_losses_follow_the_published_trajectory(trajectory, oracle):
    run, ours = trajectory
    theirs = oracle[f"{run.name}/loss"]
    np.testing.assert_allclose(ours["loss"], theirs, rtol=0, atol=2 * run.tolerance * theirs[0])


def test_refreshes_happen_at_the_published_steps(trajectory, oracle):
    run, ours = trajectory
    steps = _refresh_steps(ours)
    assert steps[0] == oracle[f"{run.name}/refresh_update_index"].item()
    np.testing.assert_array_equal(steps, np.arange(run.warmup_steps - 1, _NUM_STEPS, _INTERVAL))
    assert len(steps) == len(oracle[f"{run.name}/eigs"])
    assert ours["rejected_refreshes"][-1] == 0
    assert ours["matvecs"][-1] == len(steps) * 4 * (_RANK + run.num_smallest)


def test_eigenvalues_at_refreshes_are_the_published_ones(trajectory, oracle):
    run, ours = trajectory
    eigenvalues = ours["eigenvalues"][_refresh_steps(ours)]
    np.testing.assert_allclose(eigenvalues, oracle[f"{run.name}/eigs"], rtol=0, atol=1e-4)
    largest = oracle["eigenvalues_of_H"][-_RANK:]
    np.testing.assert_allclose(eigenvalues[:, run.num_smallest :], largest * np.ones((len(eigenvalues), 1)), rtol=1e-5)


def test_the_base_is_scaled_by_the_published_factor_from_the_first_refresh_on(trajectory, oracle):
    run, ours = trajectory
    first = _refresh_steps(ours)[0]
    assert np.all(ours["base_scale"][:first] == 1)
    scaling = oracle[f"{run.name}/scaling"].item()
    np.testing.assert_allclose(ours["base_scale"][first:], scaling, rtol=1e-5)
    assert scaling == _SCALE_LIMITS[run.base]


def test_the_runs_are_those_of_the_file(oracle):
    names = {key.split("/")[0] for key in oracle if "/" in key}
    assert names == {run.name for run in _RUNS}
