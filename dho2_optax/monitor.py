"""What an optimizer's state tells about the curvature in use."""

from typing import Any

import jax
import jax.numpy as jnp

from dho2_optax.eigensolver import Spectrum
from dho2_optax.state import find_state


def metrics(state: Any) -> dict[str, jax.Array]:
    """Scalars about the curvature in use, for logging.

    Args:
      state: the state of an optimizer that contains one `dho2`, `mr_dho2` or `fosi`.

    Returns:
      A dict of scalars: ``refreshes``, ``rejected_refreshes`` (and probes: those that were not finite), ``matvecs``
      (all so far), ``age`` (updates since the parameters that the eigenpairs belong to), ``active_pairs``,
      ``base_scale``, ``missed_curvature`` (the largest that the eigenpairs before these had left to the base when these
      were found), ``eigenvalue_max``, ``eigenvalue_min`` (extremes of the active pairs), ``residual_max`` (largest
      of all pairs), and ``eigenvalue_<i>``, ``residual_<i>`` of every pair. For `mr_dho2` also ``skipped_probes`` (due,
      but ``update`` was given no product), ``probe_interval`` and ``cycle_probes`` (taken in the running cycle).

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
    pairs = found.spectrum
    active = jnp.where(pairs.mask, pairs.eigenvalues, 0)
    result = {
        "refreshes": found.refreshes,
        "rejected_refreshes": found.rejected,
        "matvecs": found.matvecs,
        "age": found.count - found.refreshed_at,
        "active_pairs": jnp.sum(pairs.mask),
        "base_scale": found.sigma,
        "missed_curvature": found.missed,
        "eigenvalue_max": jnp.max(active),
        "eigenvalue_min": jnp.min(active),
        "residual_max": jnp.max(pairs.residuals),
    }
    for i in range(pairs.eigenvalues.shape[-1]):
        result[f"eigenvalue_{i}"] = pairs.eigenvalues[..., i]
        result[f"residual_{i}"] = pairs.residuals[..., i]
    if found.probing is not None:
        result["skipped_probes"] = found.probing.skipped
        result["probe_interval"] = found.probing.interval
        result["cycle_probes"] = found.probing.process.count
    return result


def get_spectrum(state: Any) -> Spectrum:
    """The :class:`Spectrum` in use: eigenvalues, eigenvectors, residuals, mask.

    Args:
      state: the state of an optimizer that contains one `dho2`, `mr_dho2` or `fosi`.

    Returns:
      The spectrum. Eigenvectors are in segment form if the optimizer names a mesh axis.

    Raises:
      ValueError: if `state` does not hold exactly one such optimizer.
    """
    return find_state(state).spectrum
