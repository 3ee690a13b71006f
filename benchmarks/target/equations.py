"""Physics-informed problems: a network is trained to solve a partial differential equation.

What an equation is, how its loss is made of it, convection and Burgers' equation are those of the proof of concept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.target import spectral
from dho2_optax.poc.equations import (
    Equation,
    Function,
    burgers,
    convection,
    derivative,
    relative_error,
    side,
)

__all__ = ["EQUATIONS", "Equation", "Function", "relative_error"]

FAST_SPEED = 40.0  # of convection, where it is hard
REACTION_RATE = 5.0
WAVE_SPEED = 2.0
WAVE_MODE = 5  # the faster one of two
HELMHOLTZ_MODES = (1, 4)  # half waves in each unit of x and y
HELMHOLTZ_NUMBER = 1.0
KLEIN_GORDON_MODE = 5  # half waves in a unit of time
ALLEN_CAHN_DIFFUSION = 0.005
ALLEN_CAHN_RATE = 5.0


def _poisson() -> Equation:
    """u_xx + u_yy = -5 pi^2 u* on the unit square, zero at its boundary; u* = sin(2 pi x) sin(pi y)."""

    def solution(point: jax.Array) -> jax.Array:
        return jnp.sin(2 * jnp.pi * point[0]) * jnp.sin(jnp.pi * point[1])

    def residual(u: Function) -> Function:
        u_xx, u_yy = (derivative(derivative(u, axis), axis) for axis in (0, 1))
        return lambda point: u_xx(point) + u_yy(point) + 5 * jnp.pi**2 * solution(point)

    def conditions(u: Function) -> list[jax.Array]:
        sides = [side(u, axis, at, 0.0, 1.0)[1] for axis in (0, 1) for at in (0.0, 1.0)]
        return [jnp.concatenate(sides)]

    return Equation((0.0, 0.0), (1.0, 1.0), residual, conditions, solution)


def _reaction() -> Equation:
    """u_t = 5 u (1 - u), periodic in x, from a Gaussian (Krishnapriyan et al., 2021); solved at each x by itself."""
    length, width = 2 * np.pi, np.pi / 4

    def start(x: jax.Array) -> jax.Array:
        return jnp.exp(-(((x - np.pi) / width) ** 2) / 2)

    def solution(point: jax.Array) -> jax.Array:
        grown = start(point[0]) * jnp.exp(REACTION_RATE * point[1])
        return grown / (grown + 1 - start(point[0]))

    def residual(u: Function) -> Function:
        u_t = derivative(u, 1)
        return lambda point: u_t(point) - REACTION_RATE * u(point) * (1 - u(point))

    def conditions(u: Function) -> list[jax.Array]:
        x, first = side(u, 1, 0.0, 0.0, length)
        left, right = (side(u, 0, at, 0.0, 1.0)[1] for at in (0.0, length))
        return [first - start(x), left - right]

    return Equation((0.0, 0.0), (length, 1.0), residual, conditions, solution)


def _wave() -> Equation:
    """u_tt = 4 u_xx, zero at x = 0 and x = 1, at rest at first; two standing waves (Rathore et al., 2024)."""

    def solution(point: jax.Array) -> jax.Array:
        x, t = jnp.pi * point
        fast = WAVE_MODE
        return jnp.sin(x) * jnp.cos(WAVE_SPEED * t) + jnp.sin(fast * x) * jnp.cos(WAVE_SPEED * fast * t) / 2

    def residual(u: Function) -> Function:
        u_xx, u_tt = (derivative(derivative(u, axis), axis) for axis in (0, 1))
        return lambda point: u_tt(point) - WAVE_SPEED**2 * u_xx(point)

    def conditions(u: Function) -> list[jax.Array]:
        x, start = side(u, 1, 0.0, 0.0, 1.0)
        _, motion = side(derivative(u, 1), 1, 0.0, 0.0, 1.0)
        walls = [side(u, 0, at, 0.0, 1.0)[1] for at in (0.0, 1.0)]
        right = jnp.sin(jnp.pi * x) + jnp.sin(WAVE_MODE * jnp.pi * x) / 2
        return [start - right, motion, jnp.concatenate(walls)]

    return Equation((0.0, 0.0), (1.0, 1.0), residual, conditions, solution)


def _helmholtz() -> Equation:
    """u_xx + u_yy + u = (1 - 17 pi^2) u* on the square from -1 to 1, zero at its boundary.

    The solution is u* = sin(pi x) sin(4 pi y) (Wang et al., 2021).
    """
    across, along = HELMHOLTZ_MODES

    def solution(point: jax.Array) -> jax.Array:
        return jnp.sin(across * jnp.pi * point[0]) * jnp.sin(along * jnp.pi * point[1])

    def residual(u: Function) -> Function:
        u_xx, u_yy = (derivative(derivative(u, axis), axis) for axis in (0, 1))
        square = HELMHOLTZ_NUMBER**2
        source = square - (across**2 + along**2) * jnp.pi**2
        return lambda point: u_xx(point) + u_yy(point) + square * u(point) - source * solution(point)

    def conditions(u: Function) -> list[jax.Array]:
        sides = [side(u, axis, at, -1.0, 1.0)[1] for axis in (0, 1) for at in (-1.0, 1.0)]
        return [jnp.concatenate(sides)]

    return Equation((-1.0, -1.0), (1.0, 1.0), residual, conditions, solution)


def _klein_gordon() -> Equation:
    """u_tt - u_xx + u^3 = f, with values at the start and at both walls, at rest at first.

    The solution is u* = x cos(5 pi t) + (x t)^3, which gives f (Wang et al., 2021).
    """
    frequency = KLEIN_GORDON_MODE * np.pi

    def solution(point: jax.Array) -> jax.Array:
        x, t = point
        return x * jnp.cos(frequency * t) + (x * t) ** 3

    def source(point: jax.Array) -> jax.Array:
        x, t = point
        u_tt = -(frequency**2) * x * jnp.cos(frequency * t) + 6 * x**3 * t
        return u_tt - 6 * x * t**3 + solution(point) ** 3

    def residual(u: Function) -> Function:
        u_xx, u_tt = (derivative(derivative(u, axis), axis) for axis in (0, 1))
        return lambda point: u_tt(point) - u_xx(point) + u(point) ** 3 - source(point)

    def conditions(u: Function) -> list[jax.Array]:
        x, start = side(u, 1, 0.0, 0.0, 1.0)
        _, motion = side(derivative(u, 1), 1, 0.0, 0.0, 1.0)
        t, left = side(u, 0, 0.0, 0.0, 1.0)
        _, right = side(u, 0, 1.0, 0.0, 1.0)
        walls = jnp.concatenate([left, right - jnp.cos(frequency * t) - t**3])
        return [start - x, motion, walls]

    return Equation((0.0, 0.0), (1.0, 1.0), residual, conditions, solution)


def _allen_cahn() -> Equation:
    """u_t = 0.005 u_xx + 5 (u - u^3), of period 2 in x, u(x, 0) = (cos(pi x) + cos(2 pi x)) / 2.

    The solution is that of `spectral.allen_cahn`, computed when it is first asked for.
    """

    def start(x: Any) -> Any:
        array = jnp if isinstance(x, jax.Array) else np
        return (array.cos(np.pi * x) + array.cos(2 * np.pi * x)) / 2

    @functools.cache
    def coefficients() -> np.ndarray:
        return spectral.allen_cahn(start, ALLEN_CAHN_DIFFUSION, ALLEN_CAHN_RATE)

    def solution(point: jax.Array) -> jax.Array:
        known = jnp.asarray(coefficients(), point.dtype)
        cosines = jnp.cos(jnp.arange(known.shape[1]) * jnp.pi * point[0])
        series = jnp.matmul(known, cosines, precision="highest")
        s = 2 * point[1] - 1  # where Clenshaw's recurrence sums the series

        def add(later: tuple[jax.Array, jax.Array], coefficient: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            return (coefficient + 2 * s * later[0] - later[1], later[0]), None

        zero = jnp.zeros_like(s)
        (last, before), _ = jax.lax.scan(add, (zero, zero), series[1:], reverse=True)
        return series[0] + s * last - before

    def residual(u: Function) -> Function:
        u_t, u_xx = derivative(u, 1), derivative(derivative(u, 0), 0)

        def at(point: jax.Array) -> jax.Array:
            value = u(point)
            return u_t(point) - ALLEN_CAHN_DIFFUSION * u_xx(point) - ALLEN_CAHN_RATE * (value - value**3)

        return at

    def conditions(u: Function) -> list[jax.Array]:
        x, first = side(u, 1, 0.0, -1.0, 1.0)
        jumps = []
        for function in (u, derivative(u, 0)):
            left, right = (side(function, 0, at, 0.0, 1.0)[1] for at in (-1.0, 1.0))
            jumps.append(left - right)
        return [*jumps, first - start(x)]

    return Equation((-1.0, 0.0), (1.0, 1.0), residual, conditions, solution)


EQUATIONS: dict[str, Equation] = {
    "convection": convection(),
    "poisson": _poisson(),
    "burgers": burgers(),
    "convection_40": convection(FAST_SPEED),
    "reaction": _reaction(),
    "wave": _wave(),
    "helmholtz": _helmholtz(),
    "klein_gordon": _klein_gordon(),
    "allen_cahn": _allen_cahn(),
}
