"""Renewing the spectrum in use: what a refresh needs, how its result is installed, and the synchronous refresh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_optax import counters, eigensolver, krylov, vectors
from dho2_optax.eigensolver import Select, Spectrum, Wanted
from dho2_optax.krylov import LanczosState
from dho2_optax.metric import Factors, Geometry
from dho2_optax.options import Eigensolver, Newton
from dho2_optax.packing import Layout, Packed
from dho2_optax.state import DHO2State
from dho2_optax.subspace import Damping, missed_curvature, rotate_state
from dho2_optax.vectors import Vector

ArrayLike = jax.typing.ArrayLike
Carry = Callable[[Vector], Vector]


class Source(NamedTuple):
    """What one update may learn curvature from."""

    params: Any  # whole on every device
    layout: Layout  # of packed vectors
    matvec_at: Callable[[Any], Callable[[Vector], Vector]] | None  # from parameters to products in segment form
    rayleigh: Callable[[Vector], Vector] | None  # products with other samples, for the eigenvalues
    product: Callable[[], Vector] | None  # the caller's own with the vector to be probed, in segment form
    allowed: ArrayLike  # shape=(), dtype=bool
    trusted: Callable[[], jax.Array]  # whether the batch is no outlier: from one that is, nothing is learnt
    factors: Callable[[Any], Factors | None]  # from the state of the base, which a branch must take from its operand
    geometry: Callable[[Factors | None], Geometry]


class Refresh(NamedTuple):
    """A way of renewing the spectrum."""

    # From parameters, the layout of vectors, and the factors of the metric, to `DHO2State.probing`.
    init: Callable[[Any, Layout, Factors | None], Any]
    advance: Callable[[DHO2State, Source], DHO2State]  # once per update, before it


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
    start: Callable[[Spectrum, jax.Array, Layout, Carry], Vector]  # see `warm_start`
    confine: bool = True  # the start has random parts everywhere, see `krylov.extend`

    @property
    def num_pairs(self) -> int:
        """How many eigenpairs are wanted."""
        return self.rank + self.num_smallest

    def first_vector(self, old: Spectrum, count: jax.Array, layout: Layout, carry: Carry) -> tuple[Packed, jax.Array]:
        """The start of a Lanczos process at update `count`, and its seed."""
        seed = count.astype(jnp.uint32) * jnp.uint32(self.order + 1)
        return self.start(old, seed, layout, carry), seed

    def run(
        self,
        matvec: Callable[[Packed], Packed],
        old: Spectrum,
        count: jax.Array,
        layout: Layout,
        carry: Carry = lambda x: x,
    ) -> tuple[LanczosState, Wanted]:
        """A whole Lanczos process that starts from an old spectrum, taken over by `carry`, at update `count`."""
        first, seed = self.first_vector(old, count, layout, carry)
        return krylov.run(
            matvec,
            krylov.start(first, self.order, seed=seed, axis_name=self.axis_name, dtype=self.basis_dtype),
            layout,
            look=self.look,
            min_matvecs=self.num_pairs + 1,
            confine=self.confine,
        )

    def look(self, process: LanczosState) -> tuple[Wanted, jax.Array]:
        """The wanted pairs that a process has found, and whether they suffice, so that it need not go on."""
        pairs = krylov.ritz(process, left=krylov.rounded_off(process, self.basis_dtype))
        found = eigensolver.wanted(pairs, self.rank, self.num_smallest, self.select)
        return found, jnp.all(eigensolver.usable(found, self.tolerance))

    def sure(self, found: Wanted, partial: ArrayLike = False) -> jax.Array:
        """Which pairs may be used; of those of a `partial` process, which will go on, those that are sure already."""
        return eigensolver.usable(found, self.max_residual, drop_null=True, partial=partial)

    def publish(self, process: LanczosState, found: Wanted) -> Spectrum:
        """The eigenpairs that a whole process has found."""
        return eigensolver.publish(process, found, self.sure(found), self.axis_name)

    def unwritten(self, process: LanczosState, found: Wanted, partial: ArrayLike = False) -> Spectrum:
        """The same as combinations of its basis, to be written where the old ones are."""
        return eigensolver.unwritten(process, found, self.sure(found, partial))


def make_solver(
    rank: int, options: Eigensolver, newton: Newton, axis_name: str | None, *, max_residual: ArrayLike
) -> Solver:
    """The solver that the user's options describe; `max_residual` is the default."""
    eigensolver.check_selection(rank, options.num_smallest, options.order, options.select)
    return Solver(
        rank=rank,
        num_smallest=options.num_smallest,
        order=2 * (rank + options.num_smallest) if options.order is None else options.order,
        select=options.select,
        tolerance=options.tolerance,
        max_residual=max_residual if options.max_residual is None else options.max_residual,
        damping=Damping(newton.floor, newton.damping),
        basis_dtype=options.basis_dtype,
        axis_name=axis_name,
        start=warm_start,
    )


def warm_start(old: Spectrum, seed: jax.Array, layout: Layout, carry: Carry) -> Packed:
    """The start of a Lanczos process: the old eigenvectors, in the metric of today, and noise; in segment form."""
    return eigensolver.warm_start(old, layout.random(seed), carry)


def carrier(old: Geometry, new: Geometry) -> Carry:
    """From the coordinates of one metric to those of another."""
    return lambda x: new.inverse_half(old.half(x))


def in_metric(matvec: Callable[[Vector], Vector], geometry: Geometry) -> Callable[[Vector], Vector]:
    r"""The operator :math:`P^{1/2} H P^{1/2}`."""
    return lambda vector: geometry.half(matvec(geometry.half(vector)))


def is_sound(process: LanczosState, spectrum: Spectrum) -> jax.Array:
    """Whether a process, and the spectrum it has found, have finite numbers only."""
    numbers = (spectrum.eigenvalues, spectrum.residuals)
    return jnp.all(jnp.isfinite(jnp.stack(numbers))) & krylov.is_finite(process)


def install(
    state: DHO2State,
    new: Spectrum,
    factors: Factors | None,
    *,
    carry: Carry,
    found_at: jax.Array,
    damping: Damping | None,
    axis_name: str | None,
) -> DHO2State:
    """Puts a spectrum in use and turns the subspace optimizer's state to it.

    Args:
      state: the state of the optimizer.
      new: the spectrum.
      factors: those of its metric.
      carry: from the old metric to that one.
      found_at: the ``count`` that the spectrum belongs to.
      damping: see :func:`dho2_optax.subspace.rotate_state`.
      axis_name: the axis the segments are split over.
    """
    missed = missed_curvature(state.spectrum, new, axis_name).astype(state.missed.dtype)
    rotating = vectors.once(missed >= 0, state.subspace_state)  # one sum over the devices after the other
    least = 0.0 if state.bounds is None else state.bounds.least
    return state._replace(
        spectrum=new,
        factors=factors,
        subspace_state=rotate_state(rotating, state.spectrum, new, axis_name, damping, carry, least),
        missed=missed,
        refreshes=counters.add(state.refreshes, 1),
        refreshed_at=jnp.asarray(found_at, jnp.int32),
    )


def keep_if(sound: jax.Array, new: DHO2State, old: DHO2State, axis_name: str | None) -> DHO2State:
    """`new`, whose spectrum is not written yet, or `old` with one more rejected refresh.

    Selected element by element, once everything that reads the old eigenvectors is done: then the compiler writes over
    them, where two branches would cost a copy of them at every update. Their last reader is the subspace optimizer's
    new state, so the choice is made to wait for that.
    """
    numbers = [x for x in jax.tree.leaves(new.subspace_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    numbers.append(new.missed)
    rotated = [jnp.all(jnp.isfinite(x)) for x in numbers]
    sound = jnp.all(jnp.stack([sound, *rotated]))
    factors, subspace_state, missed, refreshed_at = jax.tree.map(
        lambda x, y: jnp.where(sound, x, y),
        (new.factors, new.subspace_state, new.missed, new.refreshed_at),
        (old.factors, old.subspace_state, old.missed, old.refreshed_at),
    )
    kept = sound.astype(jnp.int32)
    return new._replace(
        spectrum=eigensolver.written_over(old.spectrum, new.spectrum, sound, axis_name),
        factors=factors,
        subspace_state=subspace_state,
        missed=missed,
        refreshed_at=refreshed_at,
        refreshes=counters.add(old.refreshes, kept),
        rejected=counters.add(old.rejected, 1 - kept),
    )


def reject(state: DHO2State) -> DHO2State:
    """`state` with one more rejected refresh or probe."""
    return state._replace(rejected=counters.add(state.rejected, 1))


def synchronous(solver: Solver, refresh_interval: ArrayLike, warmup_steps: ArrayLike) -> Refresh:
    """A whole Lanczos process inside every `refresh_interval`-th update."""

    def refresh(state: DHO2State, source: Source) -> DHO2State:
        if source.matvec_at is None:
            raise ValueError("a refresh needs a curvature operator.")
        factors = source.factors(state.base_state)
        geometry = source.geometry(factors)
        carry = carrier(source.geometry(state.factors), geometry)
        matvec = in_metric(source.matvec_at(source.params), geometry)
        process, found = solver.run(matvec, state.spectrum, state.count, source.layout, carry)
        spectrum = solver.unwritten(process, found)
        if source.rayleigh is not None:
            spectrum = eigensolver.with_rayleigh_quotients(
                spectrum, in_metric(source.rayleigh, geometry), solver.axis_name
            )
        installed = install(
            state,
            spectrum,
            factors,
            carry=carry,
            found_at=state.count,
            damping=solver.damping,
            axis_name=solver.axis_name,
        )
        state = keep_if(is_sound(process, spectrum), installed, state, solver.axis_name)
        return state._replace(matvecs=counters.add(state.matvecs, process.count))

    def attempt(state: DHO2State, source: Source) -> DHO2State:
        return jax.lax.cond(source.trusted(), lambda s: refresh(s, source), reject, state)

    def advance(state: DHO2State, source: Source) -> DHO2State:
        start = jnp.asarray(warmup_steps, jnp.int32) - 1
        due = counters.is_due(state.clock, start, refresh_interval)
        state = jax.lax.cond(due & source.allowed, lambda s: attempt(s, source), lambda s: s, state)
        waits = due & ~jnp.asarray(source.allowed, bool)
        # By a conditional, which knows that all devices agree where the type of `allowed` does not.
        ticked = counters.tick(state.clock, start, refresh_interval)
        return state._replace(
            clock=jax.lax.cond(waits, lambda old, new: old, lambda old, new: new, state.clock, ticked)
        )

    return Refresh(init=lambda params, layout, factors: None, advance=advance)


def external() -> Refresh:
    """None: somebody else installs spectra."""
    return Refresh(init=lambda params, layout, factors: None, advance=lambda state, source: state)
