"""The state of the optimizers, and how to find it inside the state of a composition."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dho2_optax.arguments import as_written
from dho2_optax.eigensolver import Spectrum
from dho2_optax.vectors import unwrapped


@as_written
class DHO2State(NamedTuple):
    """The state of `dho2`, `mr_dho2` and `fosi`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # shape=(), dtype=int32: updates made
    clock: jax.Array  # shape=(), dtype=int32: `count` as refreshes are timed by it, see `counters.tick`
    spectrum: Spectrum  # the eigenpairs in use
    factors: Any  # of the metric that they belong to, a copy; None without a metric
    subspace_state: optax.OptState  # of the optimizer of the k coordinates
    base_state: optax.OptState  # of the base; on segments where the base runs on them
    sigma: jax.Array  # shape=(): factor of the base's step at the last update, before the brake of `Bounds`
    bounds: Any  # a `subspace.Bounds`; None for `fosi`
    share: jax.Array  # shape=(): of the last gradient in the span of the eigenvectors, see `subspace.HybridStep`
    missed: jax.Array  # shape=(): see `subspace.missed_curvature`, of the last change of eigenpairs
    refreshes: jax.Array  # shape=(), dtype=int32: spectra installed
    rejected: jax.Array  # shape=(), dtype=int32: refreshes and probes that were not finite, or on an outlier
    matvecs: jax.Array  # shape=(), dtype=int32: curvature products made so far
    refreshed_at: jax.Array  # shape=(), dtype=int32: the `count` that the eigenpairs in use belong to
    probing: Any  # a `streaming.Probing` of `mr_dho2`, else None

    def __repr__(self) -> str:
        """A few lines; numbers that are not there, of a traced or abstract state, show as ``?``."""
        numbers = (self.count, self.refreshes, self.rejected, self.matvecs, self.refreshed_at, self.sigma)
        count, refreshes, rejected, matvecs, refreshed_at, sigma = map(_number, numbers)
        mask, eigenvalues = map(_values, (self.spectrum.mask, self.spectrum.eigenvalues))
        rank = getattr(self.spectrum.mask, "shape", ("?",))[-1]
        active, extent = "?", ""
        if mask is not None and eigenvalues is not None and mask.shape == eigenvalues.shape:
            active = str(np.sum(mask))
            if np.any(mask):
                used = eigenvalues[mask]
                extent = f", eigenvalues from {used.min():.4g} to {used.max():.4g}"
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(self) if hasattr(x, "size") and hasattr(x, "dtype")]
        lines = [
            f"{count} updates, {refreshes} refreshes ({rejected} rejected, {matvecs} matvecs), eigenpairs of update "
            f"{refreshed_at}",
            f"{active} of {rank} pairs active{extent}",
            f"base scale {sigma}",
            f"{sum(sizes):,} bytes in {len(jax.tree.leaves(self))} leaves",
        ]
        return f"{type(self).__name__}(\n  " + "\n  ".join(lines) + "\n)"


def _values(x: Any) -> np.ndarray | None:
    """What is in an array, if that can be looked at."""
    try:
        return np.asarray(x) if isinstance(x, jax.Array | np.ndarray) else None
    except (jax.errors.TracerArrayConversionError, RuntimeError):  # of the latter: deleted, or on other hosts too
        return None


def _number(x: Any) -> str:
    values = np.asarray(x) if isinstance(x, int | float | np.generic) else _values(x)
    return "?" if values is None or values.ndim else f"{values.item():.4g}" if values.dtype.kind == "f" else str(values)


# What an optimizer of another making differs in, and by which of its arguments.
MADE_BY = {
    "spectrum": "`rank`, `num_smallest`, `basis_dtype` or parameters",
    "base_state": "`base`",
    "factors": "`metric`",
    "subspace_state": "`subspace`",
    "probing": "kind (dho2, mr_dho2) or `order`",
}


def check_state(state: Any, expected: DHO2State) -> None:
    """Raises ValueError unless `state` has the structure and the shapes of `expected`."""
    if not isinstance(state, DHO2State):
        raise ValueError(f"`state` must be a DHO2State, as `init` returns it, got a {type(state).__name__}.")

    def describe(tree: Any) -> tuple[Any, list[Any]]:
        return jax.tree.structure(tree), [jax.numpy.shape(x) for x in jax.tree.leaves(tree)]

    for field, argument in MADE_BY.items():
        got, wanted = (describe(getattr(x, field)) for x in (state, expected))
        if got != wanted:
            shown = zip(got, wanted, strict=True)
            first = next(f"got {a}, wanted {b}" for a, b in shown if a != b)
            raise ValueError(
                f"`state` must be one of this optimizer, but its `{field}` is that of another {argument}: {first}."
            )


def find_state(state: Any) -> DHO2State:
    """The one :class:`DHO2State` in the state of an optimizer, that of an ``nnx.Optimizer`` included.

    Raises:
      ValueError: if there is none, or more than one.
    """
    is_ours = lambda x: isinstance(x, DHO2State)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(f"`state` must hold one dho2, mr_dho2 or fosi state, got {len(found)}.")
    return unwrapped(found[0])


def replace_state(state: Any, new: DHO2State) -> Any:
    """`state` with its one :class:`DHO2State` replaced."""
    is_ours = lambda x: isinstance(x, DHO2State)  # noqa: E731
    return jax.tree.map(lambda x: new if is_ours(x) else x, state, is_leaf=is_ours)
