"""Physics-informed problems: a network is trained to solve a partial differential equation.

What an equation is, how its loss is made of it, and Burgers' equation are those of the proof of concept.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dho2_optax.poc.equations import Equation, Function, burgers, derivative, mean_square, relative_error, side

__all__ = ["EQUATIONS", "Equation", "Function", "relative_error"]

SPEED = 10.0  # of convection


def _convection() -> Equation:
    """u_t + 10 u_x = 0, periodic in x, u(x, 0) = sin x (Krishnapriyan et al., 2021, with a speed of 30 there)."""
    length, end = 2 * np.pi, 1.0

    def residual(u: Function) -> Function:
        u_x, u_t = derivative(u, 0), derivative(u, 1)
        return lambda point: u_t(point) + SPEED * u_x(point)

    def conditions(u: Function) -> jax.Array:
        x, start = side(u, 1, 0.0, 0.0, length)
        left, right = (side(u, 0, at, 0.0, end)[1] for at in (0.0, length))
        return mean_square(start - jnp.sin(x)) + mean_square(left - right)

    return Equation((0.0, 0.0), (length, end), residual, conditions, lambda p: jnp.sin(p[0] - SPEED * p[1]))


def _poisson() -> Equation:
    """u_xx + u_yy = -5 pi^2 u* on the unit square, zero at its boundary; u* = sin(2 pi x) sin(pi y)."""

    def solution(point: jax.Array) -> jax.Array:
        return jnp.sin(2 * jnp.pi * point[0]) * jnp.sin(jnp.pi * point[1])

    def residual(u: Function) -> Function:
        u_xx, u_yy = (derivative(derivative(u, axis), axis) for axis in (0, 1))
        return lambda point: u_xx(point) + u_yy(point) + 5 * jnp.pi**2 * solution(point)

    def conditions(u: Function) -> jax.Array:
        sides = [side(u, axis, at, 0.0, 1.0)[1] for axis in (0, 1) for at in (0.0, 1.0)]
        return mean_square(jnp.concatenate(sides))

    return Equation((0.0, 0.0), (1.0, 1.0), residual, conditions, solution)


EQUATIONS: dict[str, Equation] = {"convection": _convection(), "poisson": _poisson(), "burgers": burgers()}
"""By name of the task."""
