r"""The hybrid update rule: Newton inside the subspace of the extreme eigenvectors, the base outside of it.

With :math:`V` the eigenvectors (rows), :math:`\lambda` their eigenvalues and :math:`g` the gradient (FOSI,
arXiv 2302.08484, algorithm 2; DHO2, arXiv 2505.00982, section 4.2, for the split over devices):

.. math::
    c &= V g                                        && \text{coordinates in the subspace} \\
    q &= \text{subspace optimizer}(c)               && \text{momentum on } k \text{ numbers} \\
    d &= \text{base}(g - V^\top c)                  && \text{the base's update, already negative} \\
    e &= V d                                        && \text{what of it lies in the subspace} \\
    u &= \sigma d - V^\top (\sigma e + \alpha\, q / |\lambda|)

Four passes over :math:`V`. Pairs that are masked out have zero rows in :math:`V`, so the base keeps their directions.
What a batch that is unlike all others may do is bounded by what the base does, see :class:`Bounds`.

With a metric (see :mod:`dho2_optax.metric`) :math:`V` are eigenvectors of :math:`P^{1/2} H P^{1/2}`, and gradient and
update change coordinates on the way in and out:

.. math::
    c &= V P^{1/2} g, \qquad d = \text{base}(g - P^{-1/2} V^\top c), \qquad e = V P^{-1/2} d \\
    u &= \sigma d - P^{1/2} V^\top (\sigma e + \alpha\, q / |\lambda|)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dho2_optax import vectors
from dho2_optax.eigensolver import Spectrum
from dho2_optax.metric import BETA, EUCLIDEAN, PLAIN_LIMIT, Geometry, Momentum, gain, limit_of
from dho2_optax.vectors import Vector

ArrayLike = jax.typing.ArrayLike


class Damping(NamedTuple):
    r""":math:`|\lambda|_\text{damped} = \max(|\lambda|, \text{floor} \cdot |\lambda|_{\max}) + \text{damping}`."""

    floor: ArrayLike
    damping: ArrayLike


def inverse_eigenvalues(spectrum: Spectrum, damping: Damping, least: ArrayLike = 0.0) -> jax.Array:
    r"""``(k,)`` factors :math:`1 / |\lambda_i|_\text{damped}`, zero for pairs that are masked out.

    All eigenvalues count as at least `least`.
    """
    magnitude = jnp.where(spectrum.mask, jnp.abs(spectrum.eigenvalues), 0)
    damped = jnp.maximum(magnitude, damping.floor * jnp.max(magnitude)) + damping.damping
    damped = jnp.maximum(damped, jnp.asarray(least, damped.dtype))
    usable = spectrum.mask & (damped > 0)
    return jnp.where(usable, 1 / jnp.where(usable, damped, 1), 0)


def base_scale(
    spectrum: Spectrum,
    num_smallest: int,
    limit: ArrayLike,
    tolerable: ArrayLike = jnp.inf,
    missed: ArrayLike = 0,
    least: ArrayLike = 0,
) -> jax.Array:
    r"""The factor of the base's step.

    .. math::
        \sigma = \text{clip}\left(\frac{\min(|\lambda|_{\max}, \lambda_\text{tolerable})}
            {\max(|\lambda|_k, \lambda_\text{missed})}, 1, \text{limit}\right)

    Once the steep directions are taken out, the steepest that is left has a curvature of at most
    :math:`|\lambda|_k`, the smallest of the largest pairs, and the base may step further (FOSI, section 4.2). Where a
    pair is masked out, and so left to the base, the largest eigenvalue that it may stand for counts too, its Ritz value
    plus its residual.

    FOSI's rule takes for granted that the base by itself tolerates :math:`|\lambda|_{\max}`. But the Newton step takes
    care of the steepest direction, which may then grow steeper than that, and the rule would let the base outrun the
    curvature that is left. `tolerable` is what the base does tolerate. And it takes for granted that eigenvectors stay
    what they are until the next refresh, and that all of large eigenvalue have been found: `missed`, from
    :func:`missed_curvature`, is what came of that the last time. Eigenvalues count as at least `least`.
    """
    magnitude = jnp.abs(spectrum.eigenvalues[num_smallest:])
    magnitude = jnp.where(magnitude > 0, jnp.maximum(magnitude, jnp.asarray(least, magnitude.dtype)), 0)
    residuals = spectrum.residuals[num_smallest:]
    mask = spectrum.mask[num_smallest:] & (magnitude > 0)
    largest = jnp.max(jnp.where(mask, magnitude, 0), initial=0)
    smallest = jnp.min(jnp.where(mask, magnitude, jnp.inf), initial=jnp.inf)
    left = jnp.maximum(smallest, jnp.max(jnp.where(mask, 0, magnitude + residuals), initial=0))
    left = jnp.maximum(left, missed)
    ratio = jnp.where(jnp.any(mask), jnp.minimum(largest, tolerable) / left, 1)
    return jnp.clip(ratio, 1, jnp.maximum(limit, 1)).astype(magnitude.dtype)


def missed_curvature(old: Spectrum, new: Spectrum, axis_name: str | None) -> jax.Array:
    r"""The largest curvature that the base was left with when a new spectrum took the place of an old one.

    Of the operator as the new spectrum knows it, :math:`A = \sum_i |\lambda_i| v_i v_i^\top`, the largest eigenvalue
    outside the span of the old eigenvectors, :math:`\| \Pi A \Pi \|` with :math:`\Pi = I - V_\text{old}^\top
    V_\text{old}`. It is large where eigenvectors turn faster than they are renewed, and where an eigenvalue is
    multiple: of its eigenvectors a Lanczos process finds some, and another time others. All of
    :math:`|\lambda|_{\max}` if there was no old spectrum. Both are taken to be in the same coordinates, though a metric
    may have changed between them.
    """
    overlap = vectors.gram(old.eigenvectors, new.eigenvectors, axis_name)
    overlap = new.of_rows(old.of_rows(overlap).T).T
    root = jnp.sqrt(jnp.where(new.mask, jnp.abs(new.eigenvalues), 0))
    inside = jnp.matmul(overlap.T, overlap, precision=jax.lax.Precision.HIGHEST)
    outside = root[:, None] * (jnp.eye(root.size, dtype=root.dtype) - inside) * root
    return jnp.maximum(jnp.linalg.eigvalsh(outside)[-1], 0)


def tolerable_curvature(square_update: jax.Array, square_momentum: jax.Array, limit: ArrayLike) -> jax.Array:
    r"""The largest curvature at which a base is stable, :math:`\text{limit} / \eta`.

    Its learning rate is what it makes of its momentum, :math:`\eta = \|P^{-1/2} d\| / \|P^{1/2} m\|`, whatever
    schedules and bias corrections are in it. See :class:`dho2_optax.metric.Momentum`.
    """
    known = (square_update > 0) & (square_momentum > 0) & jnp.isfinite(square_update) & jnp.isfinite(square_momentum)
    ratio = jnp.where(known, square_momentum, 1) / jnp.where(known, square_update, 1)
    return jnp.where(known, limit * jnp.sqrt(ratio), jnp.inf)


def least_eigenvalue(
    tolerable: jax.Array, limit: float, alpha: ArrayLike, newton_limit: float = PLAIN_LIMIT
) -> jax.Array:
    r"""The eigenvalue at which the Newton step goes as far as the base by itself, along a gradient that lasts.

    :math:`\alpha / \eta`, where both have a momentum of one kind. Infinite where `tolerable` is.

    Args:
      tolerable: as :func:`tolerable_curvature` gives it.
      limit: of the base's momentum.
      alpha: step size in the subspace.
      newton_limit: of the momentum of the coordinates.
    """
    learning_rate = limit / tolerable
    return jnp.asarray(alpha * gain(newton_limit)) / (learning_rate * gain(limit))


def rotate_state(
    state: Any,
    old: Spectrum,
    new: Spectrum,
    axis_name: str | None,
    damping: Damping | None = None,
    carry: Callable[[Vector], Vector] = lambda x: x,
    least: ArrayLike = 0.0,
) -> Any:
    r"""Carries the subspace optimizer's state to the coordinates of a new spectrum.

    :math:`q \leftarrow R q` with :math:`R = V_\text{new} V_\text{old}^\top`, or with `damping`
    :math:`q \leftarrow |\lambda_\text{new}| R |\lambda_\text{old}|^{-1} q`: then it is the Newton step
    :math:`q / |\lambda|` that is carried over, and a momentum of old, larger gradients is not divided by a new, smaller
    eigenvalue. Applies to every floating-point leaf of length ``k``; counters and the like stay, and a number that is
    not finite counts as zero.

    `least` is what eigenvalues count as at least. With `carry`, a change of metric,
    :math:`R = V_\text{new}\, \text{carry}\, V_\text{old}^\top`.
    """
    num_pairs = new.eigenvalues.shape[0]
    before = after = 1.0
    if damping is not None:
        before = inverse_eigenvalues(old, damping, least)
        scale = inverse_eigenvalues(new, damping, least)
        after = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)

    def rotate(leaf: jax.Array) -> jax.Array:
        if leaf.shape != (num_pairs,) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # By way of the whole space: two passes over the eigenvectors, where R itself would take k of them.
        direction = carry(old.combine(before * leaf.astype(old.eigenvalues.dtype)))
        rotated = after * new.dots(direction, axis_name)
        return jnp.where(jnp.isfinite(rotated), rotated, 0).astype(leaf.dtype)

    return jax.tree.map(rotate, state)


_OUTLIER = 4.0  # how many times its usual length a gradient may have
_PACE = 0.1  # by how much the logarithm of the usual length follows


class Bounds(NamedTuple):
    r"""What bounds a hybrid by its base, so that no batch does more harm than to the base alone.

    A base such as Adam bounds its own step whatever the gradient, and the Newton step is linear in it. So a gradient of
    more than four times the usual length is the base's: so is the update, until a momentum has forgotten it, and no
    curvature is learnt from its batch. But a base that has been kept out of the steep directions may not be able to
    face them, so its step is shortened to what it tolerates at the steepest eigenvalue.

    Eigenpairs are as old as the last refresh, and of a part of the batch. Where curvature has turned out of the
    subspace, or grown, the base is too fast for it, and gradients grow from update to update: nothing else tells it in
    time. So the base's step is shorter by as much as gradients are longer than usual, see :meth:`after`.

    And whatever eigenvalue a batch has led to, the Newton step goes no further along its vector than the base would go
    by itself along a gradient that lasts: eigenvalues count as at least `least`, :math:`\alpha / \eta`, with
    :math:`\eta` the learning rate of the base in its metric, see :func:`tolerable_curvature`. Pairs below that, along
    which the base goes further than the Newton step would, are the base's.
    """

    usual: jax.Array  # shape=(): length that gradients have of late, whatever single batches say; 0 before the first
    last: jax.Array  # shape=(): length of the last gradient, a very large number if it was not finite
    peak: jax.Array  # shape=(): length of the longest gradient, less what the base's momentum has forgotten of it
    least: jax.Array  # shape=(): what every eigenvalue counted as at least in the last update
    brake: jax.Array  # shape=(): by what factor of at most 1 the last update of the base was shortened

    def after(self, length: jax.Array) -> "Bounds":
        r"""With one more gradient of this length.

        The logarithm of the usual length moves towards that of the new one by a tenth at most. So it is within a factor
        of three of what it was ten batches before, whatever they say, and from any start it is right after some ten
        updates for every factor of e. A length that is zero or not finite is no length.

        The brake is the usual length over the peak: gradients turn around as they grow, so the last one alone may be
        short. While an outlier is remembered there is none: the update is the base's, which finds its way back as fast
        as it would by itself.
        """
        length = length.astype(self.usual.dtype)
        known = (length > 0) & jnp.isfinite(length)
        now = jnp.where(known, length, 1)
        start = jnp.where(self.usual > 0, self.usual, now)
        moved = start * jnp.exp(_PACE * jnp.clip(jnp.log(now / start), -1, 1))
        largest = jnp.sqrt(jnp.finfo(length.dtype).max)  # beyond it the square overflows
        last = jnp.nan_to_num(length, nan=largest, posinf=largest)
        peak = jnp.maximum(jnp.where(jnp.isnan(length), 0, last), BETA * self.peak)
        new = self._replace(usual=jnp.where(known, moved, self.usual), last=last, peak=peak)
        long = new.trust() & (peak > new.usual)
        return new._replace(brake=jnp.where(long, new.usual / jnp.where(long, peak, 1), 1))

    def is_usual(self) -> jax.Array:
        """Whether the last gradient was of the usual length, whatever those before it were."""
        return self.last <= _OUTLIER * self.usual

    def trust(self) -> jax.Array:
        """Whether it was, and what a momentum remembers of those before it."""
        return self.peak <= _OUTLIER * self.usual


class HybridStep(NamedTuple):
    """What :func:`hybrid_step` returns."""

    update: Vector  # in segment form where the axis is given
    subspace_state: Any
    base_state: Any
    sigma: jax.Array  # shape=(): the factor of the base's step, before the brake
    share: jax.Array  # shape=(): |c|^2 / |P^(1/2) g|^2, of the gradient in the subspace; 0 where that is no number
    bounds: Bounds | None


def hybrid_step(
    gradient: Vector,
    spectrum: Spectrum,
    subspace: optax.GradientTransformation,
    subspace_state: Any,
    base_step: Callable[[Vector], tuple[Vector, Any]],
    *,
    alpha: ArrayLike,
    scale: Callable[[jax.Array], jax.Array],
    damping: Damping,
    axis_name: str | None,
    bounds: Bounds | None = None,
    geometry: Geometry = EUCLIDEAN,
    momentum_of: Callable[[Any, Vector], Momentum] = lambda base_state, gradient: Momentum(gradient, PLAIN_LIMIT),
) -> HybridStep:
    """One update by the rule above.

    A gradient that is not finite stays out of the subspace, so that it can spoil no more than it would with the base
    alone: its coordinates count as zero and the subspace optimizer's state is kept.

    Args:
      gradient: in segment form where `axis_name` is given.
      spectrum: the current eigenpairs.
      subspace: an optax transformation of vectors of length ``k``.
      subspace_state: its state.
      base_step: from the gradient in the complement to the base's update and its new state.
      alpha: step size in the subspace; 1 is a full Newton step.
      scale: from the curvature that the base tolerates, infinite where that is not known, to the factor of its step.
      damping: damping of the eigenvalues.
      axis_name: the axis the segments are split over.
      bounds: those of the last update; None: as published, without bounds.
      geometry: the metric that the eigenpairs belong to.
      momentum_of: reads the base's momentum, in segment form, from its state and the gradient that it was fed.
    """
    flat_gradient = geometry.half(gradient)
    lengths = [gradient, flat_gradient]
    coordinates, square = _dots_and_squares(spectrum, flat_gradient, lengths, axis_name)
    share = _share(coordinates, square[1])
    kept = trusted = jnp.all(jnp.isfinite(coordinates))
    if bounds is not None:
        bounds = bounds.after(jnp.sqrt(square[0]))
        trusted = trusted & bounds.trust()
        kept = trusted & (jnp.abs(spectrum.eigenvalues) >= bounds.least)
    coordinates = jnp.where(kept, coordinates, 0)
    newton, new_state = subspace.update(coordinates, subspace_state)
    subspace_state = jax.tree.map(lambda new, old: jnp.where(trusted, new, old), new_state, subspace_state)

    steep = geometry.inverse_half(spectrum.combine(coordinates))
    complement = vectors.subtract(gradient, steep)
    base_update, base_state = base_step(complement)

    flat_update = geometry.inverse_half(base_update)
    momentum = momentum_of(base_state, complement)
    lengths = [flat_update, geometry.half(momentum.vector)]
    inside, squares = _dots_and_squares(spectrum, flat_update, lengths, axis_name)
    inside = jnp.where(kept & jnp.isfinite(inside), inside, 0)
    tolerable = tolerable_curvature(squares[0], squares[1], momentum.limit)
    sigma = factor = scale(tolerable)

    least: ArrayLike = 0.0
    if bounds is not None:
        least = least_eigenvalue(tolerable, momentum.limit, alpha, limit_of(subspace_state))
        least = jnp.where(jnp.isfinite(tolerable), least, bounds.least).astype(bounds.least.dtype)
        used = jnp.any(spectrum.mask & (jnp.abs(spectrum.eigenvalues) >= least))  # else the update is the base's own
        # On an outlier it is, too; but can the base face what it has been kept out of?
        steepest = jnp.max(jnp.where(spectrum.mask, jnp.abs(spectrum.eigenvalues), 0), initial=0)
        faced = jnp.where(trusted, 1, jnp.minimum(1, tolerable / steepest))
        bounds = bounds._replace(least=least, brake=faced * jnp.where(used, bounds.brake, 1))
        sigma = jnp.where(trusted, sigma, 1)
        factor = sigma * bounds.brake
    newton = jnp.where(kept, jnp.asarray(newton), 0) * inverse_eigenvalues(spectrum, damping, least)
    correction = geometry.half(spectrum.combine(factor * inside + alpha * newton))

    def assemble(d: jax.Array, v: jax.Array) -> jax.Array:
        return (factor.astype(v.dtype) * d.astype(v.dtype) - v).astype(d.dtype)

    update = jax.tree.map(assemble, base_update, correction)
    return HybridStep(update, subspace_state, base_state, sigma, share, bounds)


def _share(coordinates: jax.Array, square: jax.Array) -> jax.Array:
    """Which part of a squared length coordinates hold, between 0 and 1."""
    inside = jnp.sum(coordinates**2)
    known = (square > 0) & jnp.isfinite(square) & jnp.isfinite(inside)
    share = jnp.minimum(jnp.where(known, inside, 0) / jnp.where(known, square, 1), 1)
    return share.astype(coordinates.dtype)


def _dots_and_squares(
    spectrum: Spectrum, vector: Vector, others: list[Vector], axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Inner products of the eigenvectors with a vector, and the squared norms of others, in one sum over the axis."""
    inside = vectors.dots(spectrum.eigenvectors, vector)
    squares = jnp.stack([vectors.dot(x, x).astype(inside.dtype) for x in others])
    sums = jnp.concatenate([inside, squares])
    sums = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return spectrum.of_rows(sums[: inside.size]), sums[inside.size :]
