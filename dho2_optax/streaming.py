r"""Streaming refresh: one curvature product every few updates, and no update that waits for a whole spectrum.

The Lanczos process of MR-DHO2 (Gu et al., arXiv 2505.00982) laid out in time: a *probe* is one product
:math:`w_j = H_t q_j` with the Hessian at the parameters and on the batch of the moment, and advances the recurrence of
:mod:`dho2_optax.krylov` by one vector. A *cycle* is ``order`` probes. Since the operator moves while it is probed, the
projected matrix is symmetrised, and what symmetrising changes counts as residual. Pairs are published when the cycle
ends, and before whenever more of them have converged than are in use. The next cycle starts from the published vectors.

One update does one thing at most: a probe; in the update after the last probe a publication; in the update after that
the start of the next cycle. So no update is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_optax import counters, curvature, krylov, segments, vectors
from dho2_optax.arguments import check_calls, check_functions, check_sizes
from dho2_optax.curvature import BatchSize, LossFn
from dho2_optax.eigensolver import Wanted
from dho2_optax.krylov import LanczosState
from dho2_optax.masking import Shown, fill, hide
from dho2_optax.metric import MATURE_AFTER, Factors, Metric, geometry
from dho2_optax.packing import Layout, of_buffers
from dho2_optax.refresh import Refresh, Solver, Source, carrier, in_metric, install, is_sound, keep_if, reject
from dho2_optax.state import DHO2State, find_state

ArrayLike = jax.typing.ArrayLike

_AGREE = 0.05  # eigenvalues that moved by at most this part of the largest let the probes become rarer
_DISAGREE = 0.2  # and by at least this part, more frequent
_WITHOUT_FORWARD_MODE = (
    "give mr_dho2 `curvature=dho2_optax.hessian(loss_fn, mode='reverse-over-reverse')`, `update` the batch, and take "
    "the gradient by itself"
)


class Probing(NamedTuple):
    """A Lanczos process spread over updates."""

    process: LanczosState
    found: Wanted  # what the last look at it has found
    wait: jax.Array  # shape=(), dtype=int32: updates before the one that takes the next probe
    interval: jax.Array  # shape=(), dtype=int32: updates between two probes
    pending: jax.Array  # shape=(), dtype=bool: the next update publishes the pairs found
    complete: jax.Array  # shape=(), dtype=bool: the cycle is over; once published, the next update starts another
    skipped: jax.Array  # shape=(), dtype=int32: probes that were due when `update` was given no product
    last: jax.Array  # shape=(k,): eigenvalues in use at the end of the last cycle, zero where masked out
    anchor: Any  # parameters at the first probe of the cycle; None where probes are taken at the current ones
    factors: Factors | None  # of the metric, the same for all probes of the cycle; None without a metric
    shown: Any  # like the parameters, without arrays: which of them are hidden from the optimizer, and which are not


def is_due(state: DHO2State) -> jax.Array:
    """Whether the next update takes a probe."""
    return (state.probing.wait <= 0) & ~state.probing.pending & ~state.probing.complete


def probe_params(probing: Probing, params: Any) -> Any:
    """The parameters at which the next probe is taken."""
    if probing.anchor is None:
        return params
    is_first = probing.process.count == 0
    return jax.tree.map(lambda now, anchor: jnp.where(is_first, now, anchor), params, probing.anchor)


@dataclass(frozen=True)
class _Streaming:
    """One probe every `interval` updates."""

    solver: Solver
    interval: ArrayLike
    longest_interval: ArrayLike | None
    warmup_steps: ArrayLike
    anchored: bool  # all probes of a cycle at the parameters of its first

    def init(self, params: Any, layout: Layout, factors: Factors | None) -> Probing:
        """The state before the first update."""
        solver, seed = self.solver, jnp.zeros((), jnp.uint32)
        process = krylov.start(
            layout.random(seed), solver.order, seed=seed, axis_name=solver.axis_name, dtype=solver.basis_dtype
        )
        zeros = lambda *shape: jnp.zeros(shape, process.beta.dtype)  # noqa: E731
        pairs = solver.num_pairs
        return Probing(
            process=process,
            found=Wanted(zeros(pairs), zeros(pairs), zeros(pairs, solver.order), jnp.zeros(pairs, bool)),
            # Copies: a state that shares a buffer with a hyperparameter could not be donated.
            # With a metric not before the base's state says something.
            wait=jnp.maximum(jnp.array(self.warmup_steps, jnp.int32), 0 if factors is None else MATURE_AFTER),
            interval=counters.interval_of(self.interval),
            pending=jnp.zeros((), bool),
            # With a metric the first cycle begins as all others do.
            complete=jnp.asarray(factors is not None),
            skipped=jnp.zeros((), jnp.int32),
            last=zeros(pairs),
            shown=jax.tree.map(lambda _: Shown(), params),
            anchor=jax.tree.map(jnp.copy, params) if self.anchored else None,
            factors=jax.tree.map(jnp.copy, factors),
        )

    def advance(self, state: DHO2State, source: Source) -> DHO2State:
        """What one update does: a probe, the start of a cycle, a publication, or nothing of it."""
        pending, complete = state.probing.pending, state.probing.complete
        due = is_due(state) & source.allowed
        begins = complete & ~pending & (state.probing.wait <= 1) & source.allowed
        # Three conditionals, not a switch: the compiler then copies no big buffer on its way through.
        state = jax.lax.cond(due, lambda s: self.attempt(s, source), lambda s: s, state)
        # The publication last, though it comes first in a cycle: the eigenvectors then depend on all that the other two
        # communicate, and no device can come to the sums of the update before another is done with those.
        state = jax.lax.cond(begins, lambda s: self.begin(s, source), lambda s: s, state)
        state = jax.lax.cond(pending & source.allowed, lambda s: self.publish(s, source), lambda s: s, state)
        return state._replace(probing=state.probing._replace(wait=jnp.maximum(state.probing.wait - 1, 0)))

    def attempt(self, state: DHO2State, source: Source) -> DHO2State:
        """A probe, if the batch is to be trusted."""

        def wait(state: DHO2State) -> DHO2State:
            return reject(state)._replace(probing=state.probing._replace(wait=state.probing.interval))

        return jax.lax.cond(source.trusted(), lambda s: self.probe(s, source), wait, state)

    def probe(self, state: DHO2State, source: Source) -> DHO2State:
        """Takes one product in."""
        solver, probing = self.solver, state.probing
        old = probing.process
        geometry = source.geometry(probing.factors)
        if source.product is not None:
            product = geometry.half(source.product())
        elif source.matvec_at is not None:
            product = in_metric(source.matvec_at(probe_params(probing, source.params)), geometry)(old.vector)
        else:
            return state._replace(
                probing=probing._replace(skipped=counters.add(probing.skipped, 1), wait=probing.interval)
            )
        new = krylov.extend(old, product, source.layout)
        finite = krylov.is_finite(new)
        # A product that is not finite leaves the process where it was; it has written nothing to the basis.
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new._replace(basis=()), old._replace(basis=()))
        process = kept._replace(basis=new.basis)
        last = (process.count >= solver.order) | process.exhausted
        look = finite & ((process.count % krylov.CHECK_EVERY == 0) | last)
        small = process._replace(basis=())
        found, enough = jax.lax.cond(look, lambda: solver.look(small), lambda: (probing.found, jnp.zeros((), bool)))
        complete = last | (enough & (process.count - process.restart > solver.num_pairs))
        more = look & (jnp.sum(solver.sure(found, partial=True)) > jnp.sum(state.spectrum.mask))
        return state._replace(
            probing=probing._replace(
                process=process,
                found=found,
                wait=probing.interval,
                pending=more | complete,
                complete=complete,
                anchor=probe_params(probing, source.params) if self.anchored else None,
            ),
            matvecs=counters.add(state.matvecs, 1),
            rejected=counters.add(state.rejected, ~finite),
        )

    def publish(self, state: DHO2State, source: Source) -> DHO2State:
        """Puts the pairs found in use."""
        probing: Probing = state.probing
        process, complete = probing.process, probing.complete
        spectrum = self.solver.unwritten(process, probing.found, partial=~complete)
        installed = install(
            state,
            spectrum,
            probing.factors,
            carry=carrier(source.geometry(state.factors), source.geometry(probing.factors)),
            found_at=state.count,
            damping=self.solver.damping,
            axis_name=self.solver.axis_name,
        )
        state = keep_if(is_sound(process, spectrum), installed, state, self.solver.axis_name)
        found = jnp.where(state.spectrum.mask, state.spectrum.eigenvalues, 0)
        return state._replace(
            probing=probing._replace(
                interval=self._interval_after(probing, found),
                pending=jnp.zeros_like(probing.pending),
                last=jnp.where(complete, found, probing.last),
            )
        )

    def _interval_after(self, probing: Probing, found: jax.Array) -> jax.Array:
        """The interval of the next probes, by how far the eigenvalues have moved from cycle to cycle."""
        interval = counters.interval_of(self.interval)
        if self.longest_interval is None:
            return interval
        movement, before = _movement(probing.last, found), probing.interval
        adapted = jnp.where(movement <= _AGREE, 2 * jnp.minimum(before, counters.LARGEST // 2), before)
        adapted = jnp.where(movement >= _DISAGREE, before // 2, adapted)
        adapted = jnp.clip(adapted, interval, counters.interval_of(self.longest_interval))
        return jnp.where(probing.complete, adapted, before)

    def begin(self, state: DHO2State, source: Source) -> DHO2State:
        """Starts a cycle from the vectors in use."""
        probing: Probing = state.probing
        factors = source.factors(state.base_state)
        carry = carrier(source.geometry(state.factors), source.geometry(factors))
        first, seed = self.solver.first_vector(state.spectrum, state.count, source.layout, carry)
        process = krylov.restart(probing.process, first, seed=seed, axis_name=self.solver.axis_name)
        complete = jnp.zeros_like(probing.complete)
        return state._replace(probing=probing._replace(process=process, complete=complete, factors=factors))


def streaming(
    solver: Solver,
    interval: ArrayLike,
    longest_interval: ArrayLike | None,
    warmup_steps: ArrayLike,
    anchored: bool,
) -> Refresh:
    """One probe every `interval` updates, or up to `longest_interval` where eigenvalues stand still."""
    way = _Streaming(solver, interval, longest_interval, warmup_steps, anchored)
    return Refresh(init=way.init, advance=way.advance)


def _movement(before: jax.Array, after: jax.Array) -> jax.Array:
    """The largest change of an eigenvalue, relative to the largest of them; masked ones count as zero."""
    # In ascending order: two of equal magnitude change places in a spectrum without moving.
    change = jnp.max(jnp.abs(jnp.sort(after) - jnp.sort(before)))
    largest = jnp.maximum(jnp.max(jnp.abs(before)), jnp.max(jnp.abs(after)))
    return change / jnp.where(largest > 0, largest, 1)


def value_grad_and_hvp(
    loss_fn: LossFn,
    *,
    has_aux: bool = False,
    axis_name: str | None = None,
    batch_size: BatchSize = "auto",
    metric: Metric | None = None,
) -> Callable[..., tuple[Any, Any, Any]]:
    r"""Loss, gradient and, where `mr_dho2` is due for a probe, the Hessian-vector product it wants.

    The product is the derivative of the gradient along the vector to be probed. Made on a part of the batch it is
    computed apart; on the whole batch together with the gradient, by one forward-mode derivative of
    ``jax.value_and_grad``, and then a probe costs little more than one further gradient. On all other updates nothing
    but loss and gradient is computed.

    Args:
      loss_fn: ``(params, batch) -> loss``, a scalar mean over samples; with `has_aux` ``(loss, aux)``.
      has_aux: whether `loss_fn` returns a pair.
      axis_name: the optimizer's `axis_name`, inside ``shard_map`` or ``pmap``: gradient and product are then those of
        the local batch, to be averaged alike. With a mesh and without an axis: None.
      batch_size: on how many samples of the batch the product is made, as in :func:`dho2`.
      metric: the optimizer's `metric`, if that is a :class:`dho2_optax.Metric`.

    Returns:
      A function ``(params, state, batch, allow_probe=True) -> (value, grads, hvp)``, with `value` what `loss_fn`
      returns, and `hvp` a pytree like `grads` for ``update(..., hvp=hvp)``; zero where no probe is due. `state` is
      that of an optimizer that contains one `mr_dho2`, or the ``opt_state`` of an ``nnx.Optimizer`` of one, and
      `params` may be an ``nnx.State``. `allow_probe` is a boolean scalar: give the condition that it is the last
      mini-step when accumulating gradients.

    Raises:
      ValueError: if `batch_size` is not positive or `loss_fn` does not take two arguments; when called, if `state`
        holds no `mr_dho2` state, or `params` is no pytree like the parameters that it was made for.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> loss_fn = lambda params, batch: jnp.mean(batch * params**2)
      >>> tx = dho2.mr_dho2(optax.sgd(0.1), rank=2, probe_interval=2)
      >>> params, batch = jnp.ones(4), jnp.asarray([4.0, 1.0, 0.1, 0.01])
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     value, grads, hvp = value_grad_and_hvp(loss_fn)(params, state, batch)
      ...     updates, state = tx.update(grads, state, params, hvp=hvp)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> int(dho2.metrics(state)["active_pairs"])
      2

    References:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    """
    check_functions(loss_fn=loss_fn)
    check_calls("loss_fn", loss_fn, "params", "batch", remedy="have it take the batch, if only to ignore it")
    check_sizes(auto=True, batch_size=batch_size)

    def compute(params: Any, state: Any, batch: Any, allow_probe: ArrayLike = True) -> tuple[Any, Any, Any]:
        found = find_state(state)
        if found.probing is None:
            raise ValueError("`state` must be that of an mr_dho2: others take no probes.")
        # Parameters may be variables of flax's nnx; vectors of the state, and what is computed here, are arrays.
        treedef = jax.tree.structure(params)
        wrapped = lambda tree: treedef.unflatten(jax.tree.leaves(tree))  # noqa: E731
        params = vectors.vary(vectors.as_arrays(vectors.unwrapped(params)), axis_name)
        visible = _visible(params, found.probing.shown)
        loss = curvature.checked_loss(lambda p, b: loss_fn(wrapped(p), b), has_aux=has_aux)
        value_and_grad = jax.value_and_grad(loss, has_aux=has_aux)
        is_whole = curvature.part_size(batch, batch_size, axis_name) is None
        product = curvature.hessian_on_part(loss, has_aux=has_aux, batch_size=batch_size, axis_name=axis_name)

        def plain() -> tuple[Any, Any, Any]:
            value, grads = value_and_grad(params, batch)
            return value, grads, vectors.vary(jax.tree.map(vectors.zeros_like, params), axis_name)

        def probe() -> tuple[Any, Any, Any]:
            segment = found.probing.process.vector
            # With `mesh=` and outside of its shard_map, what all devices have is seen as one.
            layout = Layout(visible, axis_name) if segments.bound_axis(axis_name) else of_buffers(segment, visible)
            half = geometry(found.probing.factors, layout, metric).half
            vector = layout.unpack(layout.gather(half(segment)))
            vector = fill(vector, jax.tree.map(vectors.zeros_like, params))
            vector = vectors.vary(vectors.cast_like(vector, params), axis_name)
            if found.probing.anchor is None and is_whole:
                (value, grads), (_, hvp) = curvature.forward_mode(
                    lambda: jax.jvp(lambda p: value_and_grad(p, batch), (params,), (vector,)), _WITHOUT_FORWARD_MODE
                )
                return value, grads, hvp
            at = fill(probe_params(found.probing, visible), params)
            return *value_and_grad(params, batch), product(vectors.vary(at, axis_name), vector, batch)

        value, grads, hvp = jax.lax.cond(is_due(found) & allow_probe, probe, plain)
        return value, wrapped(grads), wrapped(hvp)

    return compute


def _visible(params: Any, shown: Any) -> Any:
    """The parameters that the optimizer sees."""
    try:
        return hide(params, shown)
    except ValueError:
        raise ValueError(
            f"`params` must be a pytree like the parameters that `state` was made for, got a {type(params).__name__}; "
            "of a model take them out: in Equinox by eqx.filter(model, eqx.is_inexact_array), in flax's nnx by "
            "nnx.state(model, nnx.Param)."
        ) from None
