"""Reference solutions of differential equations by spectral methods, in float64 on the host."""

from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.integrate


def _cosine_coefficients(values: np.ndarray, axis: int) -> np.ndarray:
    """Coefficients of cosines, from values at the midpoints of a grid on half a period."""
    found = scipy.fft.dct(values, axis=axis, norm="forward") * 2
    first = [slice(None)] * values.ndim
    first[axis] = slice(1)
    found[tuple(first)] /= 2
    return found


def _cosine_values(coefficients: np.ndarray) -> np.ndarray:
    """The inverse of `_cosine_coefficients` on the last axis."""
    weighted = coefficients / 2
    weighted[..., :1] *= 2
    return scipy.fft.idct(weighted, norm="forward")


def allen_cahn(
    start: Callable[[np.ndarray], np.ndarray], diffusion: float, rate: float, *, modes: int = 256, times: int = 64
) -> np.ndarray:
    r"""Solves :math:`u_t = d u_{xx} + r (u - u^3)` for even functions of period 2, up to time 1.

    .. math:: u(x, t) = \sum_{j, k} c_{jk} T_j(2 t - 1) \cos(k \pi x)

    with Chebyshev's polynomials :math:`T_j`. In space that is collocation on cosines. In time it is the method of
    Dormand and Prince of order 8, read at Chebyshev's nodes.

    Args:
      start: the values at time 0, of an even function of period 2.
      diffusion: d.
      rate: r.
      modes: how many cosines.
      times: how many polynomials.

    Returns:
      The coefficients c, ``shape=(times, modes)``, float64.

    Raises:
      RuntimeError: if the integration in time fails.
    """
    squares = (np.pi * np.arange(modes)) ** 2
    x = (np.arange(modes) + 0.5) / modes
    nodes = (1 + np.cos(np.pi * (np.arange(times) + 0.5) / times)) / 2  # from late to early

    def slope(t: float, coefficients: np.ndarray) -> np.ndarray:
        del t
        u = _cosine_values(coefficients)
        return rate * _cosine_coefficients(u - u**3, 0) - diffusion * squares * coefficients

    found = scipy.integrate.solve_ivp(
        slope, (0, 1), _cosine_coefficients(start(x), 0), "DOP853", nodes[::-1], rtol=1e-12, atol=1e-14, max_step=1e-3
    )
    if not found.success:
        raise RuntimeError(f"the Allen-Cahn equation was not solved: {found.message}")
    return _cosine_coefficients(found.y.T[::-1], 0)
