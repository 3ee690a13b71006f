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
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dho2_optax import vectors
from dho2_optax.eigensolver import Spectrum
from dho2_optax.vectors import Vector

ArrayLike = jax.typing.ArrayLike


class Damping(NamedTuple):
    r""":math:`|\lambda|_\text{damped} = \max(|\lambda|, \text{floor} \cdot |\lambda|_{\max}) + \text{damping}`."""

    floor: ArrayLike
    damping: ArrayLike


def inverse_eigenvalues(spectrum: Spectrum, damping: Damping) -> jax.Array:
    r"""``(k,)`` factors :math:`1 / |\lambda_i|_\text{damped}`, zero for pairs that are masked out."""
    magnitude = jnp.where(spectrum.mask, jnp.abs(spectrum.eigenvalues), 0)
    damped = jnp.maximum(magnitude, damping.floor * jnp.max(magnitude)) + damping.damping
    usable = spectrum.mask & (damped > 0)
    return jnp.where(usable, 1 / jnp.where(usable, damped, 1), 0)


def base_scale(spectrum: Spectrum, num_smallest: int, limit: ArrayLike) -> jax.Array:
    r"""The factor :math:`\sigma = \text{clip}(|\lambda|_{\max} / |\lambda|_k, 1, \text{limit})` of the base's step.

    Once the steep directions are taken out, the steepest that is left has a curvature of at most
    :math:`|\lambda|_k`, the smallest of the largest pairs, and the base may step further (FOSI, section 4.2). Where a
    pair is masked out, and so left to the base, the largest eigenvalue that it may stand for counts too, its Ritz value
    plus its residual.
    """
    magnitude = jnp.abs(spectrum.eigenvalues[num_smallest:])
    residuals = spectrum.residuals[num_smallest:]
    mask = spectrum.mask[num_smallest:] & (magnitude > 0)
    largest = jnp.max(jnp.where(mask, magnitude, 0), initial=0)
    smallest = jnp.min(jnp.where(mask, magnitude, jnp.inf), initial=jnp.inf)
    left = jnp.maximum(smallest, jnp.max(jnp.where(mask, 0, magnitude + residuals), initial=0))
    ratio = jnp.where(jnp.any(mask), largest / left, 1)
    return jnp.clip(ratio, 1, jnp.maximum(limit, 1)).astype(magnitude.dtype)


def rotate_state(
    state: Any, old: Spectrum, new: Spectrum, axis_name: str | None, damping: Damping | None = None
) -> Any:
    r"""Carries the subspace optimizer's state to the coordinates of a new spectrum.

    :math:`q \leftarrow R q` with :math:`R = V_\text{new} V_\text{old}^\top`, or with `damping`
    :math:`q \leftarrow |\lambda_\text{new}| R |\lambda_\text{old}|^{-1} q`: then it is the Newton step
    :math:`q / |\lambda|` that is carried over, and a momentum of old, larger gradients is not divided by a new, smaller
    eigenvalue. Applies to every floating-point leaf of length ``k``; counters and the like stay.
    """
    num_pairs = new.eigenvalues.shape[0]
    before = after = 1.0
    if damping is not None:
        before = inverse_eigenvalues(old, damping)
        scale = inverse_eigenvalues(new, damping)
        after = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)

    def rotate(leaf: jax.Array) -> jax.Array:
        if leaf.shape != (num_pairs,) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # By way of the whole space: two passes over the eigenvectors, where R itself would take k of them.
        direction = vectors.combine(before * leaf.astype(old.eigenvalues.dtype), old.eigenvectors)
        return (after * vectors.dots(new.eigenvectors, direction, axis_name)).astype(leaf.dtype)

    return jax.tree.map(rotate, state)


def hybrid_step(
    gradient: Vector,
    spectrum: Spectrum,
    subspace: optax.GradientTransformation,
    subspace_state: Any,
    base_step: Callable[[Vector], tuple[Vector, Any]],
    *,
    alpha: ArrayLike,
    sigma: jax.Array,
    damping: Damping,
    axis_name: str | None,
) -> tuple[Vector, Any, Any]:
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
      sigma: factor of the base's step, from :func:`base_scale`.
      damping: damping of the eigenvalues.
      axis_name: the axis the segments are split over.

    Returns:
      The update, the subspace optimizer's state, the base's state.
    """
    eigenvectors = spectrum.eigenvectors
    coordinates = vectors.dots(eigenvectors, gradient, axis_name)
    finite = jnp.all(jnp.isfinite(coordinates))
    coordinates = jnp.where(finite, coordinates, 0)
    newton, new_state = subspace.update(coordinates, subspace_state)
    newton = jnp.where(finite, jnp.asarray(newton), 0) * inverse_eigenvalues(spectrum, damping)
    subspace_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, subspace_state)

    complement = vectors.subtract(gradient, vectors.combine(coordinates, eigenvectors))
    base_update, base_state = base_step(complement)

    inside = vectors.dots(eigenvectors, base_update, axis_name)
    inside = jnp.where(jnp.isfinite(inside), inside, 0)
    correction = vectors.combine(sigma * inside + alpha * newton, eigenvectors)

    def assemble(d: jax.Array, v: jax.Array) -> jax.Array:
        return (sigma.astype(v.dtype) * d.astype(v.dtype) - v).astype(d.dtype)

    return jax.tree.map(assemble, base_update, correction), subspace_state, base_state
