"""What an optimizer's state tells about the curvature in use; what to make of it is the business of `alarms`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp

from dho2_optax import vectors
from dho2_optax.eigensolver import Spectrum, is_null
from dho2_optax.packing import of_stack
from dho2_optax.state import DHO2State, find_state
from dho2_optax.vectors import unwrapped


def metrics(state: Any) -> dict[str, jax.Array]:
    r"""Scalars about the curvature in use, for logging.

    Numbers that are not there yet, or not any more, are NaN, so that a plot shows nothing where there is nothing:
    eigenvalues and residuals before the first refresh, and the extremes of the active pairs while none is active.
    :func:`alarms` says what to do about them.

    Args:
      state: the state of an optimizer that contains one `dho2`, `mr_dho2` or `fosi`, or anything that holds one: a
        linen ``TrainState``, an ``nnx.Optimizer`` or its ``opt_state``.

    Returns:
      A dict of scalars; of a state of ``vmap`` or ``pmap``, of arrays with its leading axes.

      * ``updates``, ``refreshes``, ``rejected_refreshes`` (and probes: with a number that is not finite, or on a batch
        whose gradient is more than four times as long as usual), ``matvecs`` (all so far), ``age`` (updates since the
        parameters that the eigenpairs belong to).
      * ``active_pairs``, and why the others are left to the base: ``pairs_in_null_space`` have an eigenvalue that is
        zero to rounding, or stand for a pair that the space is too small to have; ``pairs_with_large_residual`` have
        not converged. Where no pair is active: raise `max_residual` or `order` if residuals are large; look at the loss
        if all is null space (is it linear in the parameters, or are they masked?); and if refreshes are rejected and
        none was made, for numbers in it that are not finite.
      * ``eigenvalue_max``, ``eigenvalue_min``: extremes of the active pairs. ``residual_max``: the largest of all.
        ``condition_number``: :math:`|\lambda|_{\max} / |\lambda|_{\min}` of the active pairs.
      * ``gradient_share``: which part of the last gradient's squared length lay in the span of the active pairs, from 0
        to 1: :math:`\|V P^{1/2} g\|^2 / \|P^{1/2} g\|^2`, with :math:`P` the metric.
      * ``eigenvalue_<i>``, ``residual_<i>`` of every pair. Pairs that are not active keep their Ritz value, which is an
        estimate too, and their residual says how good it is.
      * ``base_scale``, by which the base steps further, and ``base_brake``, by which it steps less far while gradients
        are longer than usual (from 1/4 to 1; less on an outlier, where the base could not face what it was kept out
        of); ``missed_curvature`` (the largest that the eigenpairs before these had left to the base when these were
        found).
      * For `mr_dho2` also ``skipped_probes`` (due, but ``update`` was given no product), ``probe_interval`` and
        ``cycle_probes`` (taken in the running cycle).

    Raises:
      ValueError: if `state` does not hold exactly one such optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> state = optax.chain(optax.clip(1.0), dho2.dho2(optax.sgd(0.1), rank=2)).init(jnp.ones(3))
      >>> int(metrics(state)["refreshes"]), "eigenvalue_1" in metrics(state)
      (0, True)
    """
    found = find_state(state)
    spectrum = found.spectrum._replace(eigenvectors=())
    numbers = found._replace(spectrum=spectrum, factors=(), base_state=(), subspace_state=(), probing=None)
    result = dict(_metrics(numbers))
    if found.probing is not None:
        result["skipped_probes"] = found.probing.skipped
        result["probe_interval"] = found.probing.interval
        result["cycle_probes"] = found.probing.process.count
    return result


@jax.jit  # one program: outside of `jit` each operation would be compiled by itself
def _metrics(found: DHO2State) -> OrderedDict[str, jax.Array]:
    """Of a state without its vectors, in this order, which a dict from `jit` would not keep."""
    pairs = found.spectrum
    made = (found.refreshes > 0)[..., None]
    eigenvalues, residuals = (jnp.where(made, x, jnp.nan) for x in (pairs.eigenvalues, pairs.residuals))
    left = made & ~pairs.mask
    null = is_null(jnp.abs(pairs.eigenvalues))
    active = jnp.where(pairs.mask, eigenvalues, jnp.nan)
    magnitude = jnp.abs(active)
    result = {
        "updates": found.count,
        "refreshes": found.refreshes,
        "rejected_refreshes": found.rejected,
        "matvecs": found.matvecs,
        "age": found.count - found.refreshed_at,
        "active_pairs": jnp.sum(pairs.mask, axis=-1),
        "pairs_in_null_space": jnp.sum(left & null, axis=-1),
        "pairs_with_large_residual": jnp.sum(left & ~null, axis=-1),
        "base_scale": found.sigma,
        "base_brake": jnp.ones_like(found.sigma) if found.bounds is None else found.bounds.brake,
        "missed_curvature": found.missed,
        "gradient_share": jnp.where(found.refreshes > 0, found.share, jnp.nan),
        "condition_number": jnp.nanmax(magnitude, axis=-1) / jnp.nanmin(magnitude, axis=-1),
        "eigenvalue_max": jnp.nanmax(active, axis=-1),
        "eigenvalue_min": jnp.nanmin(active, axis=-1),
        "residual_max": jnp.max(residuals, axis=-1),
    }
    for i in range(pairs.eigenvalues.shape[-1]):
        result[f"eigenvalue_{i}"] = eigenvalues[..., i]
        result[f"residual_{i}"] = residuals[..., i]
    return OrderedDict(result)


def get_spectrum(state: Any, params: Any = None) -> Spectrum:
    """The :class:`Spectrum` in use: eigenvalues, eigenvectors, residuals, mask.

    Args:
      state: the state of an optimizer that contains one `dho2`, `mr_dho2` or `fosi`, as it is outside of ``shard_map``
        and ``pmap``.
      params: the parameters, or anything with their shapes and dtypes; under ``optax.masked``, with the leaves hidden
        that are hidden from the optimizer.

    Returns:
      The spectrum, eigenvectors stacked in a pytree like `params`, in at least float32. Without `params` as the state
      holds it, eigenvectors packed in a few buffers; of a short `basis_dtype` those are rows that are orthonormal once
      multiplied by the `orthonormalizer`.

    Raises:
      ValueError: if `state` does not hold exactly one such optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> state = dho2.dho2(optax.sgd(0.1), rank=2).init(params)
      >>> get_spectrum(state, params).eigenvectors["w"].shape
      (2, 2, 3)
    """
    spectrum = find_state(state).spectrum
    if params is None:
        return spectrum
    layout = of_stack(spectrum.eigenvectors, unwrapped(params))
    spectrum = spectrum.orthonormal()
    return spectrum._replace(eigenvectors=jax.vmap(layout.unpack)(spectrum.eigenvectors))


def orthogonality_error(state: Any, axis_name: str | None = None) -> jax.Array:
    r"""How far the eigenvectors in use are from orthonormal, :math:`\max_{ij} |V V^\top - I|_{ij}`.

    In float32 it is about 1e-6. Newton steps along vectors that overlap are counted twice, so beyond 1e-3 something is
    wrong: an operator that is not symmetric, or a basis of too few bits. It takes as many passes over the eigenvectors
    as there are, so look at it now and then, and not at every update.

    Args:
      state: as in :func:`metrics`; of ``pmap`` and ``vmap`` inside of them.
      axis_name: inside ``shard_map`` and ``pmap``, the axis over which the eigenvectors are split. None: they are
        whole, or seen from outside of ``shard_map``.

    Returns:
      A scalar; 0 where no pair is active.

    Raises:
      ValueError: if `state` does not hold exactly one such optimizer, or is one of ``pmap`` or ``vmap``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> tx = dho2.dho2(optax.sgd(0.1), lambda x, b: jnp.sum(b * x**2), rank=2, refresh_interval=1, warmup_steps=1)
      >>> params, batch = jnp.ones(3), jnp.asarray([3.0, 2.0, 1.0])
      >>> _, state = tx.update(params, tx.init(params), params, batch=batch)
      >>> bool(orthogonality_error(state) < 1e-5)
      True
    """
    found = find_state(state).spectrum
    if found.mask.ndim != 1:
        raise ValueError(
            f"`state` must be one state, got one of shape {found.mask.shape[:-1]}; call this inside of vmap or pmap."
        )
    products = vectors.gram(found.eigenvectors, found.eigenvectors, axis_name)
    products = found.of_rows(found.of_rows(products).T)
    return jnp.max(jnp.abs(products - jnp.diag(found.mask.astype(products.dtype))), initial=0)
