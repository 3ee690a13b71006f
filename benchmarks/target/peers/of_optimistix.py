"""BFGS and Levenberg-Marquardt of `optimistix`, on full batches of tasks with few parameters.

An update ends with the first trial that the search of the solver accepts, or after 30 that it rejects; all are in the
time of a step. Both solvers keep dense matrices.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree

from benchmarks.target.interface import Method, Setting, Trainer

_VERSION = {"version": f"optimistix {importlib.metadata.version('optimistix')}"}
_MOST_TRIALS = 30
_MOST_PARAMETERS = 10_000


class _Dual(eqx.Module):
    jacobian: jax.Array  # shape=(m, n): J
    gram: jax.Array  # shape=(m, m): J J'
    residual: jax.Array  # shape=(m,): r


class DualDampedDescent(optx.AbstractDescent):
    """The step of Levenberg and Marquardt, ``-J' (J J' + damping)^-1 r``, which is ``-(J' J + damping)^-1 J' r``.

    The matrix has a row for each residual and not for each parameter, of which there are more here. The damping is that
    part of the trace of ``J J'``, which is the sum of its eigenvalues, that the inverse of the step size says.
    """

    linearize: Callable[[Any], tuple[jax.Array, jax.Array]]  # parameters -> residuals, shape=(m,), and J, shape=(m, n)

    def init(self, y: Any, f_info_struct: Any) -> _Dual:
        """Zeros of the shapes of a state."""
        size = f_info_struct.residual.size
        return _Dual(jnp.zeros((size, y.size), y.dtype), jnp.zeros((size, size), y.dtype), jnp.zeros(size, y.dtype))

    def query(self, y: Any, f_info: Any, state: _Dual) -> _Dual:
        """The matrices of a point."""
        del f_info, state  # its Jacobian is a function, of which a matrix would be made column by column
        residual, jacobian = self.linearize(y)
        return _Dual(jacobian, jnp.matmul(jacobian, jacobian.T, precision="highest"), residual)

    def step(self, step_size: Any, state: _Dual) -> tuple[Any, Any]:
        """The step, and that it was found."""
        damping = jnp.trace(state.gram) / step_size
        factor = jax.scipy.linalg.cho_factor(state.gram + damping * jnp.eye(len(state.gram), dtype=state.gram.dtype))
        solution = jax.scipy.linalg.cho_solve(factor, state.residual)
        return -jnp.matmul(solution, state.jacobian, precision="highest"), optx.RESULTS.successful


class TrustRegion(optx.ClassicalTrustRegion):
    """The trust region of `optimistix.LevenbergMarquardt`, from another first step size on and with a largest one."""

    first: Any = 1.0
    largest: float = float("inf")

    def init(self, y: Any, f_info_struct: Any) -> Any:
        """The first state."""
        state = super().init(y, f_info_struct)
        return eqx.tree_at(lambda at: at.step_size, state, jnp.asarray(self.first, y.dtype))

    def step(self, *arguments: Any) -> Any:
        """The next step size, whether the trial is accepted, and the state."""
        step_size, accept, result, state = super().step(*arguments)
        bounded = jnp.minimum(step_size, self.largest)
        return bounded, accept, result, eqx.tree_at(lambda at: at.step_size, state, bounded)


class _Solver(NamedTuple):
    """A solver of optimistix, on parameters in a row."""

    solver: Any
    function: Any  # (parameters, batch) -> (what is minimized, None)

    def _leaves(self, state: Any) -> list[jax.Array]:
        return jax.tree.leaves(eqx.filter(state, eqx.is_array))

    def _state(self, leaves: list[jax.Array], flat: jax.Array, batch: Any) -> Any:
        """A state of its arrays; the rest of it, programs among others, is made anew wherever it is traced."""
        like = eqx.filter_eval_shape(self._start, flat, batch)
        arrays, rest = eqx.partition(like, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), rest)

    def _start(self, flat: jax.Array, batch: Any) -> Any:
        structure, _ = jax.eval_shape(self.function, flat, batch)
        return self.solver.init(self.function, flat, batch, {}, structure, None, frozenset())

    def _try(self, flat: jax.Array, batch: Any, state: Any) -> tuple[jax.Array, Any]:
        flat, state, _ = self.solver.step(self.function, flat, batch, {}, state, frozenset())
        return flat, state

    def init(self, flat: jax.Array, batch: Any) -> tuple[jax.Array, list[jax.Array]]:
        """Parameters and state after the start was evaluated."""
        flat, state = self._try(flat, batch, self._start(flat, batch))
        return flat, self._leaves(state)

    def update(self, carry: tuple[jax.Array, list[jax.Array]], batch: Any) -> tuple[Any, Any]:
        """One accepted trial; returns the carry, and what the solver knew of the function before."""
        before = self._state(carry[1], carry[0], batch)

        def go_on(at: Any) -> jax.Array:
            (flat, leaves), trials = at
            accepted = self._state(leaves, flat, batch).num_accepted_steps
            return (accepted == before.num_accepted_steps) & (trials < _MOST_TRIALS)

        def again(at: Any) -> Any:
            (flat, leaves), trials = at
            flat, state = self._try(flat, batch, self._state(leaves, flat, batch))
            return (flat, self._leaves(state)), trials + 1

        after, _ = jax.lax.while_loop(go_on, again, (carry, jnp.zeros((), jnp.int32)))
        return after, before.f_info


def _unravel(setting: Setting) -> Callable[[jax.Array], Any]:
    """Restores parameters from a row."""
    structure = jax.eval_shape(setting.task.init, jax.random.key(0))
    return ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure))[1]


def _trainer(unravel: Callable[[jax.Array], Any], solver: _Solver, loss: Callable[[Any], jax.Array]) -> Trainer:
    """A trainer; `loss` reads the loss from what the solver knows of a point."""

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        carry, known = solver.update(carry, batch)
        return carry, loss(known)

    return Trainer(lambda params, batch: solver.init(ravel_pytree(params)[0], batch), step, lambda at: unravel(at[0]))


def _bfgs(setting: Setting) -> Trainer:
    unravel, scale = _unravel(setting), setting.rate
    solver = _Solver(
        optx.BFGS(rtol=0, atol=0), lambda flat, batch: (scale * setting.task.loss_fn(unravel(flat), batch), None)
    )
    return _trainer(unravel, solver, lambda known: known.f / scale)


def _levenberg_marquardt(setting: Setting) -> Trainer:
    unravel, residuals = _unravel(setting), setting.task.residuals
    assert residuals is not None  # as `Method.least_squares` says
    samples = jax.tree.map(jnp.asarray, setting.task.train)  # the batch, but in an order that is always the same

    def linearize(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = unravel(flat)
        return residuals.vector(params, samples), residuals.jacobian(params, samples)

    largest = 1 / float(jnp.finfo(jnp.float32).eps)  # less damping than this would leave no Cholesky factor
    search = TrustRegion(first=1 / setting.rate, largest=largest)
    plain = optx.LevenbergMarquardt(rtol=0, atol=0)
    solver = eqx.tree_at(lambda at: (at.descent, at.search), plain, (DualDampedDescent(linearize), search))
    function = lambda flat, batch: (residuals.vector(unravel(flat), batch), None)  # noqa: E731
    return _trainer(unravel, _Solver(solver, function), lambda known: jnp.sum(known.residual**2))


METHODS: dict[str, Method] = {
    "bfgs": Method(
        "BFGS (optimistix), backtracking line search",
        "baseline",
        _bfgs,
        {"default": 1000.0},
        _VERSION,
        rate_name="scale of the loss",  # which is the first step of the line search too, along the gradient
        only_full_batch=True,
        most_parameters=_MOST_PARAMETERS,
    ),
    "levenberg_marquardt": Method(
        "Levenberg-Marquardt (optimistix, steps in the space of the residuals)",
        "baseline",
        _levenberg_marquardt,
        {"default": 1e-3},
        _VERSION,
        rate_name="initial damping",
        only_full_batch=True,
        most_parameters=_MOST_PARAMETERS,
        least_squares=True,
    ),
}
"""By name."""
