"""Other ways to keep a scaled base safe, as wrappers of `dho2`: what its own rule of scale is compared with.

A wrapper maps `make`, which makes `dho2` with options changed, to a transformation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Transformation = optax.GradientTransformationExtraArgs
Make = Callable[..., Transformation]
Safeguard = Callable[[Make], Transformation]

_LIMIT = 3.0  # the default of `dho2`
_GROWTH = 1.01  # the same
_MEMORY = 0.9  # of the running mean of the loss


def bounded_displacement(largest: float) -> Safeguard:
    r"""No update is longer than a part of the parameters: :math:`\|u\| \le` ``largest`` :math:`\|\theta\|`."""

    def guard(make: Make) -> Transformation:
        tx = make()

        def update(grads: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params, **extra)
            length = jnp.maximum(optax.tree.norm(updates), jnp.finfo(jnp.float32).tiny)
            factor = jnp.minimum(1, largest * optax.tree.norm(params) / length)
            return jax.tree.map(lambda u: factor * u, updates), state

        return Transformation(tx.init, update)

    return guard


def smoothed_eigenvalues(share: float) -> Safeguard:
    """Eigenvalues are running means over refreshes, by their order: `share` of the new one and the rest of the old."""

    def guard(make: Make) -> Transformation:
        tx = make()

        def update(grads: Any, old: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
            updates, new = tx.update(grads, old, params, **extra)
            mixed = share * new.spectrum.eigenvalues + (1 - share) * old.spectrum.eigenvalues
            chosen = (new.refreshes > old.refreshes) & old.spectrum.mask
            eigenvalues = jnp.where(chosen, mixed, new.spectrum.eigenvalues)
            return updates, new._replace(spectrum=new.spectrum._replace(eigenvalues=eigenvalues))

        return Transformation(tx.init, update)

    return guard


class LossLimitState(NamedTuple):
    """State of :func:`limited_by_loss`."""

    inner_state: Any
    limit: jax.Array  # shape=(): largest scale of the base
    mean_loss: jax.Array  # shape=(): running mean, infinite before the first update


def limited_by_loss(rise: float) -> Safeguard:
    """The largest scale halves while the loss is above `rise` times its running mean, and grows back by 1% an update.

    ``update`` takes the loss as ``value``.
    """

    def guard(make: Make) -> Transformation:
        def init(params: Any) -> LossLimitState:
            return LossLimitState(make().init(params), jnp.asarray(_LIMIT), jnp.asarray(jnp.inf))

        def update(grads: Any, state: LossLimitState, params: Any, *, value: Any, **extra: Any) -> tuple[Any, Any]:
            limit = jnp.where(value > rise * state.mean_loss, state.limit / 2, _GROWTH * state.limit)
            limit = jnp.clip(limit, 1, _LIMIT)
            mean = _MEMORY * state.mean_loss + (1 - _MEMORY) * value
            mean = jnp.where(jnp.isinf(state.mean_loss), value, mean)
            tx = make(base_scale_limit=limit)
            updates, inner_state = tx.update(grads, state.inner_state, params, **extra)
            return updates, LossLimitState(inner_state, limit, mean)

        return Transformation(init, update)

    return guard


SAFEGUARDS: dict[str, tuple[str, Safeguard]] = {
    "displacement": ("no update longer than 5% of the parameters", bounded_displacement(0.05)),
    "smoothed": ("eigenvalues averaged over refreshes", smoothed_eigenvalues(0.5)),
    "by_loss": ("the scale halved where the loss rises by 10%", limited_by_loss(1.1)),
}
"""By name: what each does, in words, and the wrapper."""
