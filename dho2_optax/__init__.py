"""Hybrid-order optimization as an optax transformation, with curvature split over devices."""

from dho2_optax._version import __version__
from dho2_optax.curvature import gauss_newton, hessian
from dho2_optax.eigensolver import Spectrum, lanczos
from dho2_optax.parallel import state_specs
from dho2_optax.transform import DHO2State, MultiSteps, dho2, fosi, metrics
from dho2_optax.transform import get_spectrum as spectrum

__all__ = [
    "DHO2State",
    "MultiSteps",
    "Spectrum",
    "__version__",
    "dho2",
    "fosi",
    "gauss_newton",
    "hessian",
    "lanczos",
    "metrics",
    "spectrum",
    "state_specs",
]
