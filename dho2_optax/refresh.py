"""Renewing the spectrum in use: what a refresh needs, how its result is installed, and the synchronous refresh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_optax import eigensolver, krylov
from dho2_optax.eigensolver import Select, Spectrum
from dho2_optax.krylov import LanczosState
from dho2_optax.state import DHO2State
from dho2_optax.subspace import Damping, rotate_state
from dho2_optax.vectors import Vector

ArrayLike = jax.typing.ArrayLike


class Source(NamedTuple):
    """What one update may learn curvature from."""

    params: Any  # whole on every device
    matvec_at: Callable[[Any], Callable[[Vector], Vector]] | None  # from parameters to products in segment form
    product: Callable[[], Vector] | None  # the caller's own with the vector to be probed, in segment form
    allowed: ArrayLike  # shape=(), dtype=bool


class Refresh(NamedTuple):
    """A way of renewing the spectrum."""

    init: Callable[[Any, Vector], Any]  # from parameters, and the same in segment form, to `DHO2State.probing`
    advance: Callable[[DHO2State, Source], DHO2State]  # once per update, before it; `base_state` is left out


class Solver(NamedTuple):
    """How eigenpairs are found and installed."""

    rank: int
    num_smallest: int
    order: int
    select: Select
    tolerance: ArrayLike
    max_residual: ArrayLike
    damping: Damping | None  # to carry over the Newton step rather than the average gradient, see `rotate_state`
    basis_dtype: Any
    axis_name: str | None
    start: Callable[[Spectrum, jax.Array, Vector, str | None], Vector]  # see `warm_start`

    @property
    def num_pairs(self) -> int:
        """How many eigenpairs are wanted."""
        return self.rank + self.num_smallest

    def first_vector(self, old: Spectrum, count: jax.Array, params: Any) -> tuple[Vector, jax.Array]:
        """The start of a Lanczos process at update `count`, and its seed."""
        seed = count.astype(jnp.uint32) * jnp.uint32(self.order + 1)
        return self.start(old, seed, params, self.axis_name), seed

    def run(self, matvec: Callable[[Vector], Vector], old: Spectrum, count: jax.Array, params: Any) -> LanczosState:
        """A whole Lanczos process that starts from an old spectrum, at update `count`."""
        first, seed = self.first_vector(old, count, params)
        return krylov.run(
            matvec,
            krylov.start(first, self.order, seed=seed, axis_name=self.axis_name, dtype=self.basis_dtype),
            params,
            is_done=self.is_done,
            min_matvecs=self.num_pairs + 1,
            axis_name=self.axis_name,
        )

    def is_done(self, pairs: krylov.RitzPairs) -> jax.Array:
        """Whether the pairs suffice, so that a process need not go on."""
        return eigensolver.converged(self.rank, self.num_smallest, self.select, self.tolerance)(pairs)

    def num_sure(self, process: LanczosState) -> jax.Array:
        """How many of the pairs found by a process that will go on may be used already."""
        pairs = krylov.ritz(process)
        mask = eigensolver.usable(
            pairs, self.rank, self.num_smallest, self.select, self.max_residual, drop_null=True, partial=True
        )[1]
        return jnp.sum(mask)

    def publish(self, process: LanczosState, partial: ArrayLike = False) -> Spectrum:
        """The eigenpairs that a process has found; of a `partial` one, that will go on, those that are sure."""
        return eigensolver.publish(
            process,
            self.rank,
            self.num_smallest,
            self.select,
            self.max_residual,
            drop_null=True,
            partial=partial,
        )


def warm_start(old: Spectrum, seed: jax.Array, params: Vector, axis_name: str | None) -> Vector:
    """The start of a Lanczos process: the old eigenvectors and noise, in segment form."""
    return eigensolver.warm_start(old, krylov.random_vector(seed, params, axis_name))


def install(
    state: DHO2State,
    new: Spectrum,
    finite: jax.Array,
    *,
    found_at: jax.Array,
    damping: Damping | None,
    axis_name: str | None,
) -> DHO2State:
    """Puts a spectrum in use and turns the subspace optimizer's state to it, unless a number is not finite.

    Args:
      state: the state of the optimizer.
      new: the spectrum.
      finite: whether the process that found it saw finite numbers only.
      found_at: the ``count`` that the spectrum belongs to.
      damping: see :func:`dho2_optax.subspace.rotate_state`.
      axis_name: the axis the segments are split over.
    """
    rotated = rotate_state(state.subspace_state, state.spectrum, new, axis_name, damping)
    numbers = (finite, new.eigenvalues, new.residuals, rotated)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(numbers[1:])])) & finite
    # Selected element by element, once everything that reads the old eigenvectors is done: then the compiler
    # writes over them, where two branches would cost a copy of them at every update.
    chosen, subspace_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (new, rotated), (state.spectrum, state.subspace_state)
    )
    installed = finite.astype(jnp.int32)
    return state._replace(
        spectrum=chosen,
        subspace_state=subspace_state,
        refreshes=state.refreshes + installed,
        rejected=state.rejected + 1 - installed,
        refreshed_at=jnp.where(finite, found_at, state.refreshed_at),
    )


def synchronous(solver: Solver, refresh_interval: ArrayLike, warmup_steps: ArrayLike) -> Refresh:
    """A whole Lanczos process inside every `refresh_interval`-th update."""

    def refresh(state: DHO2State, source: Source) -> DHO2State:
        if source.matvec_at is None:
            raise ValueError("a refresh needs a curvature operator.")
        process = solver.run(source.matvec_at(source.params), state.spectrum, state.count, source.params)
        state = install(
            state,
            solver.publish(process),
            krylov.is_finite(process),
            found_at=state.count,
            damping=solver.damping,
            axis_name=solver.axis_name,
        )
        return state._replace(matvecs=state.matvecs + process.count)

    def advance(state: DHO2State, source: Source) -> DHO2State:
        # Of lax, since `%` fails in a shard_map for a hyperparameter that lies on the mesh and is closed over.
        since_warmup = state.count + 1 - jnp.asarray(warmup_steps, jnp.int32)
        remainder = jax.lax.rem(since_warmup, jnp.asarray(refresh_interval, jnp.int32))
        due = (since_warmup >= 0) & (remainder == 0) & source.allowed
        return jax.lax.cond(due, lambda s: refresh(s, source), lambda s: s, state)

    return Refresh(init=lambda params, like: None, advance=advance)


def external() -> Refresh:
    """None: somebody else installs spectra."""
    return Refresh(init=lambda params, like: None, advance=lambda state, source: state)
