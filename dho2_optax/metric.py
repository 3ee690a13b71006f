r"""Metrics: the geometry in which the base steps, and so the one in which its curvature should be measured.

A base that steps by :math:`-\eta P m`, with :math:`P` positive definite, descends in the coordinates
:math:`P^{-1/2}\theta`, where the Hessian is :math:`P^{1/2} H P^{1/2}`. What limits :math:`\eta` is the largest
eigenvalue of that matrix and not of :math:`H`; its extreme eigenpairs are the ones to take out. For Adam
:math:`P = \text{diag}(1 / (\sqrt{\hat\nu} + \epsilon))` (Cohen et al., "Adaptive gradient methods at the edge of
stability", arXiv 2207.14484, call the eigenvalues of the product the preconditioned sharpness).

Eigenvectors belong to the :math:`P` of the moment at which they were found, so a copy of what defines it, the
*factors*, is kept beside them: then the Newton step is one with :math:`H` itself, however :math:`P` moves on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_optax import segments, vectors
from dho2_optax.arguments import as_written
from dho2_optax.kronecker import KroneckerState, kronecker_factors, kronecker_half, kronecker_inverse_half
from dho2_optax.masking import is_hidden
from dho2_optax.packing import Layout, Packed
from dho2_optax.vectors import Vector


@as_written
class Metric(NamedTuple):
    r"""How to read the preconditioner :math:`P` of a base from its state, and to apply its half-powers.

    Example:
      A metric for a base that scales the gradient by fixed numbers, ``optax.scale_by_...`` say, held by the user.

      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> scales = {"w": jnp.asarray([4.0, 1.0])}
      >>> fixed = dho2.Metric(
      ...     factors=lambda base_state, like, axis_name: scales,
      ...     half=lambda p, x: jax.tree.map(lambda p, x: jnp.sqrt(p) * x, p, x),
      ...     inverse_half=lambda p, x: jax.tree.map(lambda p, x: x / jnp.sqrt(p), p, x),
      ... )
      >>> tx = dho2.dho2(optax.sgd(0.1), lambda p, b: jnp.sum(p["w"] ** 2), rank=1, metric=fixed)
    """

    # (state of the base, parameters, axis over which both are in segments or None) -> what defines P
    factors: Callable[[Any, Vector, str | None], Any]
    half: Callable[[Any, Vector], Vector]  # (factors, x) -> P^{1/2} x, linear and symmetric in x
    inverse_half: Callable[[Any, Vector], Vector]  # (factors, x) -> P^{-1/2} x
    # Factors are a pytree like the parameters and work on any part of each leaf. The half-powers are then given both,
    # factors and vector, packed in a few buffers.
    elementwise: bool = False


class Diagonal(NamedTuple):
    """Says that factors are those of :data:`DIAGONAL`."""


class Kronecker(NamedTuple):
    """Says that factors are those of :data:`KRONECKER`."""


class Custom(NamedTuple):
    """Says that factors are those of a metric of the user's own, which whoever uses them must have."""


class OnSegments(NamedTuple):
    """Says that the state of the base is in segment form."""


class OnWholeLeaves(NamedTuple):
    """Says that the state of the base is whole on every device."""


class Factors(NamedTuple):
    """The factors of a metric as they were at one moment: what an optimizer's state holds of it.

    Arrays only. What is known of them besides are types: of tuples without fields, which are a part of the structure of
    the state and which all that saves and restores states keeps.
    """

    values: Any  # packed, in segment form, if the metric is element-wise; else whole on every device
    kind: Diagonal | Kronecker | Custom
    base: OnSegments | OnWholeLeaves

    def metric(self, given: Metric | None) -> Metric:
        """The metric of these factors; `given` is the one that the optimizer was made with, if it is the user's own.

        Raises:
          ValueError: if `given` is missing, or another one.
        """
        if isinstance(self.kind, Custom):
            if given is None or _kind(given) is not Custom:
                raise ValueError(
                    f"`metric` must be the dho2_optax.Metric that the optimizer was made with, got {given!r}: a state "
                    "holds the factors of one, not its functions."
                )
            return given
        known = DIAGONAL if isinstance(self.kind, Diagonal) else KRONECKER
        if given is not None and given is not known:
            raise ValueError(f"`metric` must be None, since the optimizer reads that of its base, got {given!r}.")
        return known

    def renewed(
        self, base_state: Any, params: Any, *, axis_name: str | None = None, metric: Metric | None = None
    ) -> Factors:
        """Those of another moment; see :func:`snapshot` and :func:`geometry`."""
        segmented_base = isinstance(self.base, OnSegments)
        return snapshot(self.metric(metric), base_state, params, axis_name, segmented_base=segmented_base)

    def split(self, layout: Layout, metric: Metric | None = None) -> Factors:
        """Whole factors in the form in which they are kept."""
        if not self.metric(metric).elementwise:
            return self
        # The padding must not be divided by. A factor may be zero itself, where the base does not step any more.
        is_number = layout.split(jax.tree.map(jnp.ones_like, self.values))
        values = jax.tree.map(lambda x, at: jnp.where(at == 0, 1, x), layout.split(self.values), is_number)
        return self._replace(values=values)


def _kind(metric: Metric) -> type[Diagonal | Kronecker | Custom]:
    return Diagonal if metric is DIAGONAL else Kronecker if metric is KRONECKER else Custom


class Geometry(NamedTuple):
    """The half-powers of one metric at one moment, on packed vectors in segment form."""

    half: Callable[[Packed], Packed]
    inverse_half: Callable[[Packed], Packed]


EUCLIDEAN = Geometry(lambda x: x, lambda x: x)


def geometry(factors: Factors | None, layout: Layout, metric: Metric | None = None) -> Geometry:
    """The geometry that `factors` stand for.

    A metric that is not element-wise works on whole leaves, at the price of an all-gather each time.

    Args:
      factors: what the state holds, None for the Euclidean geometry.
      layout: of the vectors.
      metric: the one that the optimizer was made with, if it is the user's own.
    """
    if factors is None:
        return EUCLIDEAN
    values, chosen = factors.values, factors.metric(metric)

    def on_segments(apply: Callable[[Any, Vector], Vector]) -> Callable[[Packed], Packed]:
        if chosen.elementwise:
            return lambda x: apply(values, x)
        return lambda x: layout.split(apply(values, layout.unpack(layout.gather(x))))

    return Geometry(on_segments(chosen.half), on_segments(chosen.inverse_half))


def snapshot(metric: Metric, base_state: Any, params: Any, axis_name: str | None, *, segmented_base: bool) -> Factors:
    """The factors of this moment; `base_state` is in segment form with `segmented_base`, and `params` are whole.

    Raises:
      ValueError: if the metric needs whole leaves and the base has segments.
    """
    if segmented_base and not metric.elementwise:
        raise ValueError("a `metric` that is not element-wise needs base_on_segments=False.")
    kind = _kind(metric)
    layout = Layout(params, axis_name)
    if segmented_base:
        values = metric.factors(base_state, segments.split(params, axis_name), axis_name)
        return Factors(layout.pack_segments(values), kind(), OnSegments())
    whole = Factors(metric.factors(base_state, params, None), kind(), OnWholeLeaves())
    return whole.split(layout, metric)


MATURE_AFTER = 10  # updates of a base before its preconditioner is a metric: averages of fewer gradients are noise
_EPSILON = 1e-8  # what optax adds to the root of second moments
_SECOND_DECAY = 0.999
_MAX_RATIO = 1e3  # of numbers of P within a leaf


def _unbiased(moments: Any, count: jax.Array) -> Any:
    """Second moments of Adam and its kin, as they divide by them.

    Of their decay, which no state tells, it is assumed that it is 0.999. Another one multiplies the eigenvalues of the
    first updates by a number, and changes no update.
    """
    weight = 1 - jnp.float32(_SECOND_DECAY) ** jnp.maximum(count, 1)
    return jax.tree.map(lambda nu: nu / weight.astype(nu.dtype), moments)


# What of the state of optax's transformations the gradient is divided by the square root of. By name, since not all of
# these types are public.
_SECOND_MOMENTS: dict[str, Callable[[Any], Any]] = {
    "ScaleByAdamState": lambda state: _unbiased(state.nu, state.count),
    "ScaleByAmsgradState": lambda state: state.nu_max,  # a maximum of unbiased ones
    "ScaleByBeliefState": lambda state: _unbiased(state.nu, state.count),
    "ScaleByRmsState": lambda state: state.nu,
    "ScaleByRmsWithCountState": lambda state: state.nu,
    "ScaleByRssState": lambda state: state.sum_of_squares,
    "ScaleByRStdDevState": lambda state: jax.tree.map(lambda nu, mu: nu - mu**2, state.nu, state.mu),
    "ScaleByRStdDevWithCountState": lambda state: jax.tree.map(lambda nu, mu: nu - mu**2, state.nu, state.mu),
}

# States of transformations that scale all numbers of a leaf alike, if at all, or that only hold other states.
_NEUTRAL = {
    "AddDecayedWeightsState",
    "ApplyIfFiniteState",
    "EmaState",
    "EmptyState",
    "InjectHyperparamsState",
    "InjectStatefulHyperparamsState",
    "MaskedNode",
    "MaskedState",
    "PartitionState",
    "MultiTransformState",
    "ScaleByScheduleState",
    "ScaleState",
    "TraceState",
    "WrappedScheduleState",
}


def _walk(state: Any) -> Iterator[tuple[str, Any]]:
    """The named tuples in a base's state, by type name, without those inside a second moment."""
    name = type(state).__name__
    if name in _SECOND_MOMENTS:
        yield name, state
        return
    if hasattr(state, "_fields"):
        yield name, state
    if isinstance(state, tuple | list):
        for part in state:
            yield from _walk(part)
    elif isinstance(state, dict):
        for part in state.values():
            yield from _walk(part)


def _second_moments(base_state: Any, like: Vector) -> list[jax.Array | None]:
    """What the base divides every leaf of `like` by the square root of; None for a leaf that it does not scale.

    Raises:
      ValueError: if that cannot be told.
    """
    found = list(_walk(base_state))
    moments = [_SECOND_MOMENTS[name](state) for name, state in found if name in _SECOND_MOMENTS]
    chosen = _leafwise(moments, like)
    missing = [x is None for x in chosen]
    unknown = sorted({name for name, _ in found} - set(_SECOND_MOMENTS) - _NEUTRAL)
    if not moments or (any(missing) and (all(missing) or unknown)):
        raise ValueError(
            "`metric` 'base' needs a base whose preconditioner can be read from its state (Adam, AdamW, NAdam, "
            "AMSGrad, AdaBelief, RMSprop, Adagrad, soap, shampoo), got one without for some of the parameters"
            + (f", but {', '.join(unknown)}" if unknown else "")
            + ". Give metric=None or a dho2_optax.Metric."
        )
    return chosen


def _leafwise(trees: list[Any], like: Vector) -> list[jax.Array | None]:
    """For every leaf of `like` the array of its shape from the tree that has one, None if none has."""
    places = jax.tree.leaves(like, is_leaf=is_hidden)  # what is hidden from the optimizer is hidden in its base too
    chosen: list[jax.Array | None] = [None] * len(places)
    for tree in trees:
        leaves = jax.tree.leaves(tree, is_leaf=is_hidden)
        if len(leaves) == len(places):
            pairs = zip(leaves, places, strict=True)
            shown = [None if is_hidden(x) or is_hidden(at) or x.shape != at.shape else x for x, at in pairs]
            chosen = [old if new is None else new for old, new in zip(chosen, shown, strict=True)]
    return [x for x, at in zip(chosen, places, strict=True) if not is_hidden(at)]


def _diagonal_factors(base_state: Any, like: Vector, axis_name: str | None) -> Vector:
    r""":math:`P^{1/2} = (\sqrt{\nu} + \epsilon)^{-1/2}`, number by number; 1 where the base does not scale.

    Zero where :math:`\nu` has overflowed: there the base does not step any more.

    Within a leaf :math:`P` is at most 1000 times its smallest number. Weights that have hardly had a gradient yet, of a
    unit that no sample activates, say, would otherwise fill the subspace with directions of their own as soon as one
    sample does; the base steps there no further than anywhere else, but a Newton step would. A leaf without any
    gradient so far has 1.
    """
    leaves, treedef = jax.tree.flatten(like)

    def half(moment: jax.Array | None, leaf: jax.Array) -> jax.Array:
        dtype = vectors.at_least_float32(leaf.dtype)
        if moment is None:
            return 1 + vectors.zeros_like(leaf, dtype)
        root = jax.lax.rsqrt(jnp.sqrt(jnp.maximum(moment.astype(dtype), 0)) + jnp.asarray(_EPSILON, dtype))
        return jnp.where(moment <= 0, jnp.inf, root)

    halves = [half(*pair) for pair in zip(_second_moments(base_state, like), leaves, strict=True)]
    # Padding, with second moments of zero, is never the smallest.
    smallest = [jnp.min(x, initial=jnp.inf, where=x > 0) for x in halves]
    if axis_name is not None and segments.bound_axis_size(axis_name) is not None:
        smallest = list(jax.lax.pmin(jnp.stack(smallest), axis_name))
    # Leaf by leaf: where an operation is the same for many leaves, it is compiled once.
    limits = [jnp.where(jnp.isinf(x), 1, math.sqrt(_MAX_RATIO) * x) for x in smallest]
    return treedef.unflatten([jnp.minimum(x, limit.astype(x.dtype)) for x, limit in zip(halves, limits, strict=True)])


def _divide(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x / factor``, and zero where that is."""
    factor = factor.astype(x.dtype)
    return jnp.where(factor == 0, 0, x / jnp.where(factor == 0, 1, factor))


DIAGONAL = Metric(
    factors=_diagonal_factors,
    half=lambda factors, vector: jax.tree.map(lambda s, x: s.astype(x.dtype) * x, factors, vector),
    inverse_half=lambda factors, vector: jax.tree.map(_divide, vector, factors),
    elementwise=True,
)
"""That of Adam, AdamW, NAdam, AMSGrad, AdaBelief, RMSprop and Adagrad, wherever they stand in the base."""

KRONECKER = Metric(kronecker_factors, kronecker_half, kronecker_inverse_half)
"""That of `soap` and `shampoo`."""


def of_base(base_state: Any) -> Metric:
    """The metric of a base, by its state; that it can be read is seen when it is."""
    return KRONECKER if any(name == KroneckerState.__name__ for name, _ in _walk(base_state)) else DIAGONAL


def is_default(base_state: Any, like: Vector) -> bool:
    """Whether a base's own metric is used if nothing is said: where it can be read, and costs little.

    The half-powers of a Kronecker-factored one cost more than the rest of an update, and gain on few equations
    (docs/equations.md).
    """
    if of_base(base_state) is KRONECKER:
        return False
    try:
        jax.eval_shape(lambda state: of_base(base_state).factors(state, like, None), base_state)
    except ValueError:
        return False
    return True


class Momentum(NamedTuple):
    r"""What a base has made of past gradients, and how far it may step along that.

    With :math:`m \leftarrow \beta m + \kappa g` and steps of :math:`-\eta P m` a direction of curvature
    :math:`\lambda` is stable while :math:`\eta \kappa \lambda < 2 (1 + \beta)` (Cohen et al., arXiv 2207.14484,
    equation 3). Of :math:`\beta`, which no state tells, it is assumed that it is 0.9.
    """

    vector: Vector  # m, in the form of the base's state
    limit: float  # of eta lambda


BETA = 0.9
PLAIN_LIMIT = 2.0  # no momentum
_SUM_LIMIT = 2 * (1 + BETA)  # kappa = 1: heavy ball
_MEAN_LIMIT = _SUM_LIMIT / (1 - BETA)  # kappa = 1 - beta: Adam

_MOMENTA: dict[str, Callable[[Any], tuple[Any, float]]] = {
    "ScaleByAdamState": lambda state: (state.mu, _MEAN_LIMIT),
    "ScaleByAmsgradState": lambda state: (state.mu, _MEAN_LIMIT),
    "ScaleByBeliefState": lambda state: (state.mu, _MEAN_LIMIT),
    "MuonState": lambda state: (state.mu, _MEAN_LIMIT),
    "KroneckerState": lambda state: (state.mu, _MEAN_LIMIT),
    "EmaState": lambda state: (state.ema, _MEAN_LIMIT),
    "TraceState": lambda state: (state.trace, _SUM_LIMIT),
}


def momentum(base_state: Any, like: Vector) -> Momentum | None:
    """The momentum of a base that has one kind for all its leaves, else None; `like` has their shapes."""
    found = [_MOMENTA[name](state) for name, state in _walk(base_state) if name in _MOMENTA]
    limits = {limit for _, limit in found}
    leaves = _leafwise([tree for tree, _ in found], like)
    if len(limits) != 1 or any(x is None for x in leaves):
        return None
    return Momentum(jax.tree.structure(like).unflatten(leaves), limits.pop())


def gain(limit: float) -> float:
    r"""How far a momentum of this `limit` carries a gradient that lasts, :math:`\kappa / (1 - \beta)`."""
    return 1 / (1 - BETA) if limit == _SUM_LIMIT else 1.0


def limit_of(state: Any) -> float:
    """The `limit` of :class:`Momentum` of an optimizer of any kind, by its state."""
    limits = [_MOMENTA[name](state)[1] for name, state in _walk(state) if name in _MOMENTA]
    return min(limits, default=PLAIN_LIMIT)
