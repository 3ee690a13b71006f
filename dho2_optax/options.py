"""What the optimizers' options are called, what they mean, and which values they may have.

Each is a frozen value without behaviour, given to :func:`dho2_optax.dho2`, :func:`dho2_optax.mr_dho2` or
:class:`dho2_optax.CurvatureGroup`.
"""

# With it, `help` shows signatures as they are written here.
from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from dho2_optax import arguments, eigensolver
from dho2_optax.arguments import INJECTION_HINT
from dho2_optax.curvature import Operator
from dho2_optax.eigensolver import Select
from dho2_optax.metric import Metric

ArrayLike = jax.typing.ArrayLike
MetricChoice = Metric | Literal["auto", "base"] | None


class _Options:
    """Shows only what is not the default, so that the signatures which have it for a default stay short."""

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # pyright: ignore[reportArgumentType]
        defaults = {f.name: f.default for f in fields(self)}  # pyright: ignore[reportArgumentType]
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not defaults[name])
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Eigensolver(_Options):
    r"""How eigenpairs are found, and which of them are used.

    Args:
      num_smallest: with ``select="algebraic"``, how many of the smallest eigenvalues besides the `rank` largest.
      select: ``"magnitude"``, or ``"algebraic"`` for the largest eigenvalues by sign.
      order: the largest number of curvature products in a Lanczos process: in a refresh of :func:`dho2`, in a cycle of
        :func:`mr_dho2`. Default: twice the number of eigenpairs.
      tolerance: a process ends early once all residuals :math:`\|Hv - \lambda v\|` are below this part of
        :math:`|\lambda|_{\max}`. In :func:`mr_dho2`, what the movement of the operator does to a pair counts too.
      max_residual: pairs with a larger residual, in the same unit, are left to the base. Default: 0.1, and 0.3 in
        :func:`mr_dho2`: with a batch of its own for every probe even the largest pair keeps a residual of about a
        tenth, and left to the base it would do more harm than used.
      basis_dtype: dtype in which eigenvectors and Krylov basis are stored. Default: that of the parameters, at least
        float32. With ``jax.numpy.bfloat16`` they take half of the memory; arithmetic stays in float32, the eigenvectors
        are orthonormal to float32, and residuals have a part of about 0.002 more in their unit.
      rayleigh: a second operator, applied to the same batch, with whose products the eigenvalues are taken once the
        eigenvectors are there; ``rank`` more products. The eigenvalues of a small batch are too large on average;
        those of ``rayleigh=dho2_optax.hessian(loss_fn, batch_size=256, batch_start=256)`` besides
        ``curvature=dho2_optax.hessian(loss_fn, batch_size=256)``, with samples of its own, are not. For refreshes of
        :func:`dho2` only.
      anchored: all products of a process are made at the parameters of its first. A process inside one update,
        :func:`dho2`'s, always is, and so is one on a snapshot, that of a :class:`CurvatureGroup`; in :func:`mr_dho2`
        it costs a copy of the parameters.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> Eigensolver(order=32, tolerance=0.0)
      Eigensolver(order=32, tolerance=0.0)
    """

    num_smallest: int = 0
    select: Select = "magnitude"
    order: int | None = None
    tolerance: ArrayLike = 1e-2
    max_residual: ArrayLike | None = None
    basis_dtype: Any = None
    rayleigh: Operator | None = None
    anchored: bool = False

    def __post_init__(self) -> None:
        eigensolver.check_search(self.num_smallest, self.order, self.select)
        arguments.check_numbers("non-negative", tolerance=self.tolerance)
        arguments.check_numbers("non-negative", infinite=True, optional=True, max_residual=self.max_residual)
        arguments.check_floating(basis_dtype=self.basis_dtype)
        arguments.check_functions(optional=True, rayleigh=self.rayleigh)
        arguments.check_flags(anchored=self.anchored)


@dataclass(frozen=True, kw_only=True, repr=False)
class Newton(_Options):
    r"""The step in the subspace.

    Args:
      subspace: optimizer of the ``rank`` coordinates, linear in the gradient: ``optax.trace(0.9)`` is heavy ball,
        ``optax.ema(0.9, debias=False)`` averages as Adam does. When the subspace changes, its state is carried over
        so that the Newton step it stands for stays the same. Default: ``optax.ema(0.9, debias=False)``.
      floor: eigenvalues count as at least this part of the largest.
      damping: added to the magnitude of the eigenvalues, in their unit.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> Newton(damping=0.1)
      Newton(damping=0.1)
    """

    subspace: optax.GradientTransformation | None = None
    floor: ArrayLike = 1e-3
    damping: ArrayLike = 0.0

    def __post_init__(self) -> None:
        if self.subspace is not None:
            arguments.check_transformations(subspace=self.subspace)
        arguments.check_numbers("non-negative", floor=self.floor, damping=self.damping)


@dataclass(frozen=True, kw_only=True, repr=False)
class BaseScale(_Options):
    r"""By how much further the base steps once the steep directions are taken out.

    Args:
      limit: largest factor of the base's step; 1 leaves it alone.
      growth: the factor grows by no more than this, itself a factor, from update to update; it shrinks at once. Most
        runs that a large factor spoils are spoilt by its first jump.
      sharpness: how much of the curvature that is left the scaled base may face, in units of what it tolerates before
        it oscillates, with a decay of 0.9 :math:`38 / \text{learning rate}` for Adam and
        :math:`3.8 / \text{learning rate}` for heavy ball, and :math:`2 / \text{learning rate}` for a base without
        momentum, or one whose momentum is not known. The learning rate is found from the base's update and momentum.
        Infinity: FOSI's rule, which assumes that it always tolerates :math:`|\lambda|_{\max}`, and that eigenvectors
        miss nothing.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> BaseScale(limit=1.0)
      BaseScale(limit=1.0)
    """

    limit: ArrayLike = 3.0
    growth: ArrayLike = 1.01
    sharpness: ArrayLike = 1.0

    def __post_init__(self) -> None:
        arguments.check_numbers("non-negative", infinite=True, limit=self.limit)
        arguments.check_numbers("at least 1", infinite=True, growth=self.growth)
        arguments.check_numbers("positive", infinite=True, sharpness=self.sharpness)


@dataclass(frozen=True, repr=False)
class Split(_Options):
    """How eigenvectors, Krylov basis and the base's state are split over devices.

    Args:
      axis_name: the data-parallel mesh axis over which they are split.
      mesh: makes the optimizer run on global arrays under ``jit``; without it, `axis_name` must be bound by the
        ``shard_map`` or ``pmap`` that calls ``init`` and ``update``.
      average_gradients: the gradients given to ``update``, and ``hvp``, are those of the local batch; they are averaged
        here, by one reduce-scatter, instead of before. Inside ``shard_map`` and ``pmap`` only. Under
        ``shard_map(check_vma=True)`` the leaves that vary over the axis are averaged, the others are taken as they are:
        cast the parameters with ``jax.lax.pcast(p, axis_name, to="varying")`` before differentiating, since JAX has
        *summed* the gradient with respect to parameters that do not vary. Under ``check_vma=False`` and ``pmap``, where
        nothing is known of that, every leaf is averaged.
      base_on_segments: run the base on segments, with 1/P of its state on each device. False for a base that needs
        whole leaves (Muon, LAMB, Adafactor, clipping by norm ...): its state is then whole on every device, and an
        update costs one more all-gather.

    Raises:
      ValueError: for values that do not go together.

    Example:
      >>> Split("data", average_gradients=True)
      Split(axis_name='data', average_gradients=True)
    """

    axis_name: str
    _: KW_ONLY
    mesh: Mesh | None = None
    average_gradients: bool = False
    base_on_segments: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.axis_name, str):
            raise ValueError(f"`axis_name` must be the name of one mesh axis, got {self.axis_name!r}.")
        arguments.check_flags(average_gradients=self.average_gradients, base_on_segments=self.base_on_segments)
        if self.mesh is None:
            return
        if not isinstance(self.mesh, Mesh):
            raise ValueError(f"`mesh` must be a jax.sharding.Mesh, got {self.mesh!r}. {INJECTION_HINT}")
        if self.axis_name not in self.mesh.axis_names:
            raise ValueError(f"`axis_name` must be one of {self.mesh.axis_names} of the mesh, got {self.axis_name!r}.")
        if self.average_gradients:
            raise ValueError("`average_gradients` must be False with `mesh`, got True: there they are averages.")


def check_options(**values: Any) -> None:
    """Raises ValueError for what is no value of the class that an argument is named after; `split` may be None."""
    classes = {"eigensolver": Eigensolver, "newton": Newton, "base_scale": BaseScale, "split": Split}
    for name, value in values.items():
        if not isinstance(value, classes[name]) and not (name == "split" and value is None):
            raise ValueError(f"`{name}` must be a dho2_optax.{classes[name].__name__}, got {value!r}.")
