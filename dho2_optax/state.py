"""The state of the optimizers, and how to find it inside the state of a composition."""

from typing import Any, NamedTuple

import jax
import optax

from dho2_optax.eigensolver import Spectrum


class DHO2State(NamedTuple):
    """The state of `dho2`, `mr_dho2` and `fosi`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # shape=(), dtype=int32: updates made
    spectrum: Spectrum  # the eigenpairs in use
    factors: Any  # of the metric that they belong to, a copy; None without a metric
    subspace_state: optax.OptState  # of the optimizer of the k coordinates
    base_state: optax.OptState  # of the base; on segments where the base runs on them
    sigma: jax.Array  # shape=(): factor of the base's step at the last update
    missed: jax.Array  # shape=(): see `subspace.missed_curvature`, of the last change of eigenpairs
    refreshes: jax.Array  # shape=(), dtype=int32: spectra installed
    rejected: jax.Array  # shape=(), dtype=int32: spectra and probes thrown away because a number was not finite
    matvecs: jax.Array  # shape=(), dtype=int32: curvature products made so far
    refreshed_at: jax.Array  # shape=(), dtype=int32: the `count` that the eigenpairs in use belong to
    probing: Any  # a `streaming.Probing` of `mr_dho2`, else None


# What an optimizer of another making differs in, and by which of its arguments.
_MADE_BY = {
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

    for field, argument in _MADE_BY.items():
        got, wanted = (describe(getattr(x, field)) for x in (state, expected))
        if got != wanted:
            shown = zip(got, wanted, strict=True)
            first = next(f"got {a}, wanted {b}" for a, b in shown if a != b)
            raise ValueError(
                f"`state` must be one of this optimizer, but its `{field}` is that of another {argument}: {first}."
            )


def find_state(state: Any) -> DHO2State:
    """The one :class:`DHO2State` in the state of an optimizer.

    Raises:
      ValueError: if there is none, or more than one.
    """
    is_ours = lambda x: isinstance(x, DHO2State)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(f"`state` must hold one dho2, mr_dho2 or fosi state, got {len(found)}.")
    return found[0]


def replace_state(state: Any, new: DHO2State) -> Any:
    """`state` with its one :class:`DHO2State` replaced."""
    is_ours = lambda x: isinstance(x, DHO2State)  # noqa: E731
    return jax.tree.map(lambda x: new if is_ours(x) else x, state, is_leaf=is_ours)
