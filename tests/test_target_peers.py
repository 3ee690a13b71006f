"""Losses as sums of squares, and the solvers of `optimistix`: the parts by identities, the whole on small problems."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.target import tasks
from benchmarks.target.equations import EQUATIONS
from benchmarks.target.interface import Method, Setting
from benchmarks.target.least_squares import Residuals

SAMPLES, SIZE = 16, 6


def _line(with_residuals=True):
    """Least squares with a spread of curvatures, and a second part that no sample has a share in."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, SIZE)).astype(np.float32) * np.logspace(0, -1.5, SIZE, dtype=np.float32)
    samples = {"x": x, "y": x.sum(axis=1)}
    residuals = Residuals(
        lambda params, sample: sample["x"] @ params["kernel"] - sample["y"],
        lambda params: [params["kernel"][:2] - 1, params["kernel"][2:3] - params["kernel"][3:4]],
    )

    def loss(params, batch):
        first, second, *_ = parts = (batch["x"] @ params["kernel"] - batch["y"], *residuals.shared(params))
        assert first.shape != second.shape
        return sum(jnp.mean(part**2) for part in parts)

    init = lambda key: {"kernel": jnp.zeros(SIZE)}  # noqa: E731
    return tasks.Target("line", init, loss, samples, samples, residuals=residuals if with_residuals else None)


def test_the_squares_of_the_residuals_add_up_to_the_loss():
    names = [*EQUATIONS, "image_field"]
    built = [tasks.build(name, tasks.Sources()) for name in names]

    @jax.jit
    def both(params, batches):
        return [
            (jnp.sum(task.residuals.vector(p, batch) ** 2), task.loss_fn(p, batch))
            for task, p, batch in zip(built, params, batches, strict=True)
        ]

    with jax.enable_x64(True):
        params = [jax.tree.map(lambda x: x.astype(float), task.init(jax.random.key(0))) for task in built]
        batches = [jax.tree.map(lambda x: jnp.asarray(x[:8], float), task.train) for task in built]
        for name, (found, loss) in zip(names, both(params, batches), strict=True):
            assert float(found) == pytest.approx(float(loss), rel=1e-12), name
            assert loss > 1e-3


def test_the_jacobian_is_the_derivative_of_the_residuals():
    task = _line()
    batch = jax.tree.map(lambda x: x[:5], task.train)
    params = {"kernel": jnp.arange(1.0, SIZE + 1)}
    found = task.residuals.jacobian(params, batch)
    assert found.shape == (5 + 2 + 1, SIZE)
    derivative = jax.jacrev(lambda kernel: task.residuals.vector({"kernel": kernel}, batch))
    np.testing.assert_allclose(found, derivative(params["kernel"]), rtol=1e-5, atol=1e-6)
    slope = jax.grad(task.loss_fn)(params, batch)["kernel"]
    np.testing.assert_allclose(2 * found.T @ task.residuals.vector(params, batch), slope, rtol=1e-4, atol=1e-5)


def test_a_method_for_sums_of_squares_is_left_out_elsewhere():
    method = Method("", "baseline", lambda setting: None, {"default": 1.0}, least_squares=True)
    assert method.unfit(_line(), SAMPLES) is None
    assert method.unfit(_line(with_residuals=False), SAMPLES) == "for losses that are sums of squares only"


def test_without_its_library_a_peer_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    monkeypatch.delitem(sys.modules, "benchmarks.target.peers.of_optimistix", raising=False)
    peers = importlib.import_module("benchmarks.target.peers")
    try:
        assert "bfgs" not in importlib.reload(peers).METHODS
    finally:
        monkeypatch.undo()
        importlib.reload(peers)


@pytest.fixture(scope="module")
def of_optimistix():
    pytest.importorskip("optimistix")
    return importlib.import_module("benchmarks.target.peers.of_optimistix")


def _losses(method, task, rate, steps):
    """The loss before each update, and after the last."""
    batch = jax.tree.map(jnp.asarray, task.train)
    trainer = method.build(Setting(task, SAMPLES, rate, steps))
    carry = trainer.init(task.init(jax.random.key(0)), batch)
    step = jax.jit(trainer.step)
    losses = []
    for _ in range(steps):
        carry, loss = step(carry, batch)
        losses.append(float(loss))
    return [*losses, float(task.loss_fn(trainer.params(carry), batch))]


@pytest.mark.parametrize(("name", "rate", "steps"), [("bfgs", 10.0, 40), ("levenberg_marquardt", 1e-3, 12)])
def test_the_solvers_of_optimistix_solve_least_squares(of_optimistix, name, rate, steps):
    task = _line()
    losses = _losses(of_optimistix.METHODS[name], task, rate, steps)
    start = float(task.loss_fn(task.init(jax.random.key(0)), task.train))
    assert losses[0] == pytest.approx(start, rel=1e-5)
    assert losses[-1] < 1e-6 * start
    assert max(np.diff(losses)) < 1e-6 * start


def test_an_update_ends_with_a_trial_that_is_accepted(of_optimistix):
    """The first step along a gradient that is a thousand times too long is rejected ten times."""
    start, after = _losses(of_optimistix.METHODS["bfgs"], _line(), 1000.0, 1)
    assert after < start


def test_the_step_in_the_space_of_the_residuals_is_that_of_optimistix(of_optimistix):
    optx = pytest.importorskip("optimistix")
    lineax = pytest.importorskip("lineax")
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        jacobian, residual = jnp.asarray(rng.normal(size=(4, SIZE))), jnp.asarray(rng.normal(size=4))
        info = optx.FunctionInfo.ResidualJac(residual, lineax.MatrixLinearOperator(jacobian))
        y = jnp.zeros(SIZE)
        theirs = optx.DampedNewtonDescent(linear_solver=lineax.QR())
        right, _ = theirs.step(jnp.asarray(0.5), theirs.query(y, info, theirs.init(y, info)))
        ours = of_optimistix.DualDampedDescent(lambda at: (residual, jacobian))
        relative = 0.5 * jnp.trace(jacobian @ jacobian.T)
        found, _ = ours.step(relative, ours.query(y, info, ours.init(y, info)))
        np.testing.assert_allclose(found, right, rtol=1e-10)


def test_the_trust_region_starts_and_ends_where_it_is_told_to(of_optimistix):
    task = _line()
    search = of_optimistix.TrustRegion(first=0.5, largest=2.0)
    optx, lineax = pytest.importorskip("optimistix"), pytest.importorskip("lineax")
    y = jnp.zeros(SIZE)
    vector = lambda kernel: task.residuals.vector({"kernel": kernel}, task.train)  # noqa: E731

    def known(at):
        return optx.FunctionInfo.ResidualJac(vector(at), lineax.JacobianLinearOperator(lambda x, _: vector(x), at))

    newton = jnp.ones(SIZE)  # where the loss is zero, as is said by the linear model
    state = search.init(y, None)
    for expected in (1.75, 2.0):
        size, accept, _, state = search.step(jnp.asarray(False), y, newton, known(y), known(newton), state)
        assert accept
        assert float(size) == float(state.step_size) == expected
