"""The density of all eigenvalues of a symmetric operator, from products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dho2_optax import arguments, eigensolver, krylov, vectors
from dho2_optax.packing import Layout, Packed
from dho2_optax.vectors import Vector


@arguments.as_written
class Density(NamedTuple):
    r"""Where the eigenvalues of an operator are: :math:`\phi = \frac1m \sum_{p,i} w_{pi}\, \delta_{\theta_{pi}}`.

    Attributes:
      nodes: shape=(m, order): Ritz values of each of `m` probes.
      weights: shape=(m, order): which part of all eigenvalues each stands for; those of one probe add up to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> found = Density(jnp.asarray([[1.0, 3.0]]), jnp.asarray([[0.75, 0.25]]))
      >>> float(found.below(2.0)), float(found.moment(1))
      (0.75, 1.5)
    """

    nodes: jax.Array
    weights: jax.Array

    def at(self, points: jax.typing.ArrayLike, width: jax.typing.ArrayLike) -> jax.Array:
        r"""The density at some points, each node a normal distribution: its integral over all of them is 1.

        Args:
          points: shape=(n,).
          width: standard deviation, in the unit of the eigenvalues.

        Returns:
          Shape=(n,), in the inverse of that unit.

        Raises:
          ValueError: if `width` is not positive.
        """
        arguments.check_numbers("positive", width=width)
        points = jnp.asarray(points, self.nodes.dtype)
        bells = jax.scipy.stats.norm.pdf(points[:, None, None], self.nodes, width)
        return jnp.sum(bells * self.weights, axis=(1, 2)) / len(self.weights)

    def below(self, value: jax.typing.ArrayLike) -> jax.Array:
        """Which part of the eigenvalues is smaller than `value`, a scalar."""
        return jnp.sum(jnp.where(self.nodes < value, self.weights, 0)) / len(self.weights)

    def moment(self, power: int) -> jax.Array:
        r"""The mean of :math:`\lambda^\text{power}` over all eigenvalues: of 1, the trace divided by the dimension."""
        return jnp.sum(self.weights * self.nodes**power) / len(self.weights)


def spectral_density(
    matvec: Callable[[Vector], Vector],
    like: Vector,
    *,
    order: int = 64,
    num_probes: int = 8,
    key: jax.Array | None = None,
) -> Density:
    r"""The density of the eigenvalues of a symmetric operator on pytrees, by stochastic Lanczos quadrature.

    For a random vector :math:`v` of unit length, :math:`\mathbb{E}\, v^\top f(A) v = \frac1n \operatorname{tr} f(A)`.
    After `order` products of a Lanczos process that begins at :math:`v`, with Ritz values :math:`\theta_i` and
    :math:`w_i` the square of the first coordinate of the eigenvector of the projected matrix,
    :math:`\sum_i w_i f(\theta_i)` is :math:`v^\top f(A) v` for every polynomial of a degree below twice `order`. The
    mean over probes has an error of the order of :math:`1 / \sqrt{m n}` where the density is smooth, so that few
    probes do for a large model; eigenvalues that stand alone are found by each of them.

    It takes ``order * num_probes`` products, and the memory of ``order`` vectors.

    Args:
      matvec: the operator, from a pytree like `like` to another, linear and symmetric.
      like: the parameters, or any pytree with their shapes and dtypes.
      order: products for each probe; at most the dimension is used.
      num_probes: random vectors.
      key: a random key. Default: a fixed one.

    Returns:
      A :class:`Density`, in float32, or float64 where a leaf is. It is NaN if a product is not finite.

    Raises:
      ValueError: if `order` or `num_probes` is not positive, or `like` has no numbers or leaves that are not real
        floating-point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> diagonal = jnp.asarray([1.0] * 900 + [10.0] * 100)
      >>> found = spectral_density(lambda x: diagonal * x, jnp.zeros(1000), order=2)
      >>> round(float(found.below(5.0)), 1)
      0.9

    References:
      Golub and Meurant, *Matrices, Moments and Quadrature with Applications* (2010); Ghorbani, Krishnan, Xiao, "An
      investigation into neural net optimization via Hessian eigenvalue density", ICML 2019, arXiv 1901.10159.
    """
    arguments.check_functions(matvec=matvec)
    for name, value in {"order": order, "num_probes": num_probes}.items():
        if not arguments.is_int(value) or value < 1:
            raise ValueError(f"`{name}` must be a Python int of at least 1, got {value!r}.")
    like = eigensolver.checked_like(like)
    layout = Layout(like, None)
    order = min(int(order), layout.size)
    first_seed = jnp.uint32(0) if key is None else jax.random.bits(key)

    def packed_matvec(vector: Packed) -> Packed:
        return vectors.cast_like(layout.pack(matvec(layout.unpack(layout.cast(vector)))), vector)

    def look(process: krylov.LanczosState) -> tuple[Any, jax.Array]:
        return (), jnp.zeros((), bool)

    def probe(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        process = krylov.start(layout.random(seed), order, seed=seed)
        # Where the operator does nothing it has eigenvalues too.
        process, _ = krylov.run(packed_matvec, process, layout, look=look, min_matvecs=order, confine=False)
        pairs = krylov.ritz(process)
        valid = jnp.arange(order) < pairs.num_valid
        sound = jnp.where(krylov.is_finite(process), 1, jnp.nan)
        return sound * jnp.where(valid, pairs.values, 0), sound * jnp.where(valid, pairs.coefficients[0] ** 2, 0)

    # Seeds further apart than those of the random vectors of one process.
    seeds = first_seed + jnp.arange(num_probes, dtype=jnp.uint32) * jnp.uint32(order + 1)
    return Density(*jax.lax.map(probe, seeds))
