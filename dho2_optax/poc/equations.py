"""Differential equations that a network is trained to solve: convection and Burgers'.

The loss of a physics-informed network is the mean square of the equation's residual at the points of a batch, plus the
mean square of what is amiss at each part of the boundary, on points that are always the same. Where the solution is
known, so is the relative error of the network in the L2 norm. Points are pairs, ``(x, t)`` or ``(x, y)``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "SPEED",
    "Equation",
    "Function",
    "burgers",
    "convection",
    "derivative",
    "mean_square",
    "relative_error",
    "side",
]

Function = Callable[[jax.Array], jax.Array]
"""Of a point, shape=(2,), to a number."""

SPEED = 10.0  # of convection, where nothing else is said
_VISCOSITY = 0.1 / np.pi  # of Burgers' equation
_BOUNDARY_POINTS = 128  # on each part of the boundary
_QUADRATURE = 64  # nodes, for the solution of Burgers' equation


class Equation(NamedTuple):
    """A differential equation on a rectangle, what holds at the boundary, and the solution."""

    low: tuple[float, float]
    high: tuple[float, float]
    residual: Callable[[Function], Function]
    conditions: Callable[[Function], list[jax.Array]]  # what is amiss at each part of the boundary, vectors
    solution: Function

    def loss(self, function: Function, points: jax.Array) -> jax.Array:
        """How far a function is from solving the equation; ``points`` of ``shape=(n, 2)``."""
        inside = jax.vmap(self.residual(function))(points)
        return mean_square(inside) + sum(mean_square(part) for part in self.conditions(function))

    def points(self, count: int, seed: int) -> np.ndarray:
        """Points of the rectangle, uniform at random; ``shape=(count, 2)``, float32."""
        return np.random.default_rng(seed).uniform(self.low, self.high, (count, 2)).astype(np.float32)


def relative_error(function: Function, solution: Function, points: jax.Array) -> jax.Array:
    """The L2 norm of the error over that of the solution, on some points."""
    right = jax.vmap(solution)(points)
    return jnp.linalg.norm(jax.vmap(function)(points) - right) / jnp.linalg.norm(right)


def mean_square(values: jax.Array) -> jax.Array:
    """The mean of the squares."""
    return jnp.mean(values**2)


def derivative(function: Function, axis: int) -> Function:
    """The partial derivative of a function along one coordinate, itself a function.

    Example:
      >>> import jax.numpy as jnp
      >>> from dho2_optax.poc.equations import derivative
      >>> float(derivative(lambda point: point[0] * point[1] ** 2, 1)(jnp.array([3.0, 2.0])))
      12.0
    """

    def along(point: jax.Array) -> jax.Array:
        return jax.jvp(function, (point,), (jnp.zeros_like(point).at[axis].set(1),))[1]

    return along


def side(function: Function, axis: int, value: float, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """Coordinates along the side of a rectangle where coordinate `axis` is `value`, and the function there."""
    along = jnp.linspace(low, high, _BOUNDARY_POINTS)
    points = jnp.stack([jnp.full_like(along, value), along], axis=1)
    return along, jax.vmap(function)(points if axis == 0 else points[:, ::-1])


def convection(speed: float = SPEED) -> Equation:
    """u_t + c u_x = 0, periodic in x, u(x, 0) = sin x (Krishnapriyan et al., 2021, with speeds c of up to 40 there)."""
    length, end = 2 * np.pi, 1.0

    def residual(u: Function) -> Function:
        u_x, u_t = derivative(u, 0), derivative(u, 1)
        return lambda point: u_t(point) + speed * u_x(point)

    def conditions(u: Function) -> list[jax.Array]:
        x, start = side(u, 1, 0.0, 0.0, length)
        left, right = (side(u, 0, at, 0.0, end)[1] for at in (0.0, length))
        return [start - jnp.sin(x), left - right]

    return Equation((0.0, 0.0), (length, end), residual, conditions, lambda p: jnp.sin(p[0] - speed * p[1]))


def burgers() -> Equation:
    """u_t + u u_x = nu u_xx with nu = 0.1 / pi, zero at x = -1 and x = 1, u(x, 0) = -sin(pi x).

    The solution is by the transformation of Cole and Hopf (Basdevant et al., 1986), integrated by Gauss and Hermite.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(_QUADRATURE)

    def solution(point: jax.Array) -> jax.Array:
        x, t = point
        there = x - jnp.sqrt(4 * _VISCOSITY * t) * jnp.asarray(nodes, point.dtype)
        density = jnp.asarray(weights, point.dtype) * jnp.exp(-jnp.cos(jnp.pi * there) / (2 * jnp.pi * _VISCOSITY))
        return -jnp.sum(jnp.sin(jnp.pi * there) * density) / jnp.sum(density)

    def residual(u: Function) -> Function:
        u_x, u_t = derivative(u, 0), derivative(u, 1)
        u_xx = derivative(u_x, 0)
        return lambda point: u_t(point) + u(point) * u_x(point) - _VISCOSITY * u_xx(point)

    def conditions(u: Function) -> list[jax.Array]:
        x, start = side(u, 1, 0.0, -1.0, 1.0)
        walls = [side(u, 0, at, 0.0, 1.0)[1] for at in (-1.0, 1.0)]
        return [start + jnp.sin(jnp.pi * x), jnp.concatenate(walls)]

    return Equation((-1.0, 0.0), (1.0, 1.0), residual, conditions, solution)
