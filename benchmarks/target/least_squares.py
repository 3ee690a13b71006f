"""Losses that are sums of squares: their residuals, and the Jacobian without the zeros of a batch.

The residual of a sample depends on no other sample. So its row of the Jacobian is a gradient of its own, and all rows
cost one batched gradient, where reverse mode through the vector makes a pass over the whole batch for each row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


class Residuals(NamedTuple):
    """What a loss is the sum of squares of.

    The loss is the mean square of `each` over a batch, plus the mean square of each vector in `shared`.
    """

    each: Callable[[Any, Any], jax.Array]  # (parameters, sample) -> shape=()
    shared: Callable[[Any], list[jax.Array]] = lambda params: []  # parameters -> vectors that no sample has part in

    def vector(self, params: Any, batch: Any) -> jax.Array:
        """All residuals, ``shape=(m,)``, scaled so that the sum of their squares is the loss."""
        inside = jax.vmap(self.each, (None, 0))(params, batch)
        return jnp.concatenate([_scaled(part) for part in (inside, *self.shared(params))])

    def jacobian(self, params: Any, batch: Any) -> jax.Array:
        """The derivatives of `vector` by the parameters in a row, ``shape=(m, n)``."""
        flat, unravel = ravel_pytree(params)
        of_each = jax.vmap(jax.grad(lambda at, sample: self.each(unravel(at), sample)), (None, 0))(flat, batch)
        of_shared = jax.jacrev(lambda at: self.shared(unravel(at)))(flat)
        return jnp.concatenate([_scaled(part) for part in (of_each, *of_shared)])


def _scaled(rows: jax.Array) -> jax.Array:
    return rows / len(rows) ** 0.5
