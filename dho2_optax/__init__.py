"""Hybrid-order optimization as an optax transformation, with curvature split over devices."""

from dho2_optax._version import __version__
from dho2_optax.alarms import alarms
from dho2_optax.checkpoints import relayout
from dho2_optax.curvature import gauss_newton, hessian
from dho2_optax.density import Density, spectral_density
from dho2_optax.eigensolver import Spectrum, lanczos
from dho2_optax.kronecker import shampoo, soap
from dho2_optax.metric import Metric
from dho2_optax.monitor import get_spectrum as spectrum
from dho2_optax.monitor import metrics, orthogonality_error
from dho2_optax.options import BaseScale, Eigensolver, Newton, Split
from dho2_optax.parallel import state_specs
from dho2_optax.planner import plan
from dho2_optax.roles import CurvatureGroup
from dho2_optax.state import DHO2State
from dho2_optax.streaming import value_grad_and_hvp
from dho2_optax.transform import MultiSteps, dho2, fosi, mr_dho2

__all__ = [
    "BaseScale",
    "CurvatureGroup",
    "DHO2State",
    "Density",
    "Eigensolver",
    "Metric",
    "MultiSteps",
    "Newton",
    "Spectrum",
    "Split",
    "__version__",
    "alarms",
    "dho2",
    "fosi",
    "gauss_newton",
    "hessian",
    "lanczos",
    "metrics",
    "mr_dho2",
    "orthogonality_error",
    "plan",
    "relayout",
    "shampoo",
    "soap",
    "spectral_density",
    "spectrum",
    "state_specs",
    "value_grad_and_hvp",
]
