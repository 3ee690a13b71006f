"""The optimizers: `dho2`, `mr_dho2`, their published ancestor `fosi`, and `MultiSteps` for gradient accumulation."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dho2_optax import arguments, eigensolver, krylov, parallel, segments, vectors
from dho2_optax import curvature as curvature_lib
from dho2_optax import metric as metric_lib
from dho2_optax import refresh as refresh_lib
from dho2_optax.arguments import STATIC_HINT
from dho2_optax.curvature import LossFn, Operator
from dho2_optax.eigensolver import Select, Spectrum
from dho2_optax.masking import any_hidden, fill, hide, is_hidden
from dho2_optax.metric import Factors, Geometry, Metric, Momentum
from dho2_optax.refresh import Refresh, Solver, Source
from dho2_optax.state import DHO2State, check_state
from dho2_optax.streaming import streaming
from dho2_optax.subspace import Bounds, Damping, base_scale, hybrid_step
from dho2_optax.vectors import Vector

ArrayLike = jax.typing.ArrayLike
_DROPPED = (
    "If it was given: flax's TrainState.apply_gradients and optax.MultiSteps in a chain drop keyword arguments; "
    "override the one, and use dho2_optax.MultiSteps(...).gradient_transformation() for the other."
)


def dho2(
    base: optax.GradientTransformation,
    loss_fn: LossFn | None = None,
    *,
    rank: int = 8,
    num_smallest: int = 0,
    alpha: ArrayLike | optax.Schedule = 0.1,
    subspace: optax.GradientTransformation | None = None,
    refresh_interval: ArrayLike | None = 50,
    warmup_steps: ArrayLike | None = None,
    order: int | None = None,
    tolerance: ArrayLike = 1e-2,
    max_residual: ArrayLike = 0.1,
    select: Select = "magnitude",
    base_scale_limit: ArrayLike = 3.0,
    base_scale_growth: ArrayLike = 1.01,
    sharpness_limit: ArrayLike = 1.0,
    floor: ArrayLike = 1e-3,
    damping: ArrayLike = 0.0,
    has_aux: bool = False,
    curvature: Operator | None = None,
    rayleigh: Operator | None = None,
    metric: Literal["auto", "base"] | Metric | None = "auto",
    basis_dtype: Any = None,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    average_gradients: bool = False,
    base_on_segments: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Hybrid-order optimization: Newton in the steepest directions, `base` everywhere else.

    Every `refresh_interval` updates a Lanczos process finds the `rank` extreme eigenpairs
    :math:`(\lambda_i, v_i)` of the curvature operator, by default the Hessian of `loss_fn`. In their span the update is
    a damped Newton step, in the orthogonal complement it is `base`'s:

    .. math::
        u = \sigma\, d - V^\top (\sigma V d + \alpha\, q / |\lambda|), \qquad
        d = \text{base}(g - V^\top V g), \quad q = \text{subspace}(V g),

    with the base scaled by :math:`\sigma = \text{clip}(|\lambda|_{\max}/\lambda_\text{left}, 1,
    \text{base\_scale\_limit})`, where :math:`\lambda_\text{left}` is what is left of the curvature outside: the larger
    of :math:`|\lambda|_k` and of what a refresh finds that the eigenvectors before it have missed. So the base steps
    further from the second refresh on. Until the first the update is `base`'s.

    No batch does more harm than to `base` alone. A gradient of more than four times its usual length is `base`'s, and
    so is the update, until a momentum has forgotten it. Along an eigenvector the Newton step goes no further than
    `base` would by itself, whatever eigenvalue a batch has led to: with the learning rate :math:`\eta` of `base`, pairs
    with an eigenvalue below :math:`\alpha / \eta` are `base`'s.

    ``update`` takes, besides gradients, state and parameters:

    * ``batch``: passed to `loss_fn` on refreshes. On several devices, the local shard of it inside ``shard_map`` and
      ``pmap``, the global one with `mesh`.
    * ``value_fn`` (or ``obj_fn``): ``params -> loss``, instead of `loss_fn` and ``batch``.
    * ``allow_refresh``: a boolean scalar; a refresh that is due waits until it is true (see `MultiSteps`).
    * ``full_params``: under ``optax.masked`` or ``optax.partition``, where this transformation sees some parameters
      only: all of them, for `loss_fn`. Curvature is then that of the visible parameters.

    Other keyword arguments go to `base`.

    Args:
      base: the first-order optimizer, with its learning rate. Must be element-wise where it runs on segments.
      loss_fn: ``(params, batch) -> loss``, a scalar mean over samples; with `has_aux` ``(loss, aux)``.
      rank: how many eigenpairs. Multiples of 8 fill the tiles of a TPU.
      num_smallest: with ``select="algebraic"``, how many of the smallest eigenvalues besides.
      alpha: step size in the subspace, 1 being a full Newton step; a number or a schedule of the update count. Large
        ones gain only with a learning rate of `base` that is large too, since its step bounds the Newton step.
      subspace: optimizer of the ``rank`` coordinates, linear in the gradient: ``optax.trace(0.9)`` is heavy ball,
        ``optax.ema(0.9, debias=False)`` averages as Adam does. When the subspace changes, its state is carried over
        so that the Newton step it stands for stays the same. Default: ``optax.ema(0.9, debias=False)``.
      refresh_interval: updates between refreshes. None: no refresh but those a :class:`CurvatureGroup` installs. Its
        products, half of what a refresh costs or more, are cheaper where `curvature` makes them on a part of the batch.
      warmup_steps: update ``t`` (from 0) is preceded by a refresh if ``t + 1 >= warmup_steps`` and ``t + 1 -
        warmup_steps`` is a multiple of `refresh_interval`. Default: `refresh_interval`. Short runs gain from a first
        refresh as soon as the learning rate has risen to its peak.
      order: the largest number of curvature products in a refresh. Default: twice the number of eigenpairs.
      tolerance: a refresh ends early once all residuals :math:`\|Hv - \lambda v\|` are below this part of
        :math:`|\lambda|_{\max}`.
      max_residual: pairs with a larger residual, in the same unit, are left to the base.
      select: ``"magnitude"``, or ``"algebraic"`` for the largest eigenvalues by sign.
      base_scale_limit: largest factor of the base's step; 1 leaves it alone.
      base_scale_growth: the factor grows by no more than this, itself a factor, from update to update; it shrinks at
        once. Most runs that a large factor spoils are spoilt by its first jump.
      sharpness_limit: how much of the curvature that is left the scaled base may face, in units of what it tolerates
        before it oscillates, with a decay of 0.9 :math:`38 / \text{learning rate}` for Adam and
        :math:`3.8 / \text{learning rate}` for heavy ball, and :math:`2 / \text{learning rate}` for a base without
        momentum, or one whose momentum is not known. The learning rate is found from the base's update and momentum.
        Infinity: FOSI's rule, which assumes that it always tolerates :math:`|\lambda|_{\max}`, and that eigenvectors
        miss nothing.
      floor: eigenvalues count as at least this part of the largest.
      damping: added to the magnitude of the eigenvalues, in their unit.
      has_aux: whether `loss_fn` returns a pair.
      curvature: an operator ``(params, vector, batch) -> vector`` in place of `loss_fn`'s Hessian, from
        :func:`dho2_optax.gauss_newton` or from :func:`dho2_optax.hessian` with options.
      rayleigh: a second operator, applied to the same batch, with whose products the eigenvalues are taken once the
        eigenvectors are there; ``rank`` more products. The eigenvalues of a small batch are too large on average; those
        of ``rayleigh=dho2_optax.hessian(loss_fn, batch_size=256, batch_start=256)`` besides
        ``curvature=dho2_optax.hessian(loss_fn, batch_size=256)``, with samples of its own, are not.
      metric: ``"base"`` measures curvature in the geometry in which the base steps: with :math:`P` its preconditioner,
        :math:`1 / (\sqrt{\nu} + \epsilon)` for Adam, but within a leaf at most 1000 times its smallest number,
        eigenpairs are those of :math:`P^{1/2} H P^{1/2}`, and one copy of :math:`P` is kept with them. Known are Adam,
        AdamW, NAdam, AMSGrad, AdaBelief, RMSprop, Adagrad, :func:`dho2_optax.soap` and :func:`dho2_optax.shampoo`, in
        chains and with masks. A :class:`dho2_optax.Metric` serves other bases; whoever has only the state, a
        :class:`CurvatureGroup` say, must be given it too. None: those of :math:`H`. ``"auto"``: the base's if it is
        known, else None.
      basis_dtype: dtype of eigenvectors and Krylov basis. Default: that of the parameters, at least float32.
      axis_name: the data-parallel mesh axis over which eigenvectors, Krylov basis and the base's state are split.
      mesh: makes `dho2` run on global arrays under ``jit``; without it, `axis_name` must be bound by the ``shard_map``
        or ``pmap`` that calls ``init`` and ``update``.
      average_gradients: the gradients given to ``update`` are those of the local batch; they are averaged here, by one
        reduce-scatter, instead of before. Inside ``shard_map`` and ``pmap`` only. Under ``shard_map(check_vma=True)``
        the leaves that vary over the axis are averaged, the others are taken as they are: cast the parameters with
        ``jax.lax.pcast(p, axis_name, to="varying")`` before differentiating, since JAX has *summed* the gradient with
        respect to parameters that do not vary. Under ``check_vma=False`` and ``pmap``, where nothing is known of that,
        every leaf is averaged.
      base_on_segments: run `base` on segments, with 1/P of its state on each device. False for a base that needs whole
        leaves (Muon, LAMB, Adafactor, clipping by norm ...): its state is then whole on every device, and an update
        costs one more all-gather.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`DHO2State`.

    Raises:
      ValueError: at construction for options out of range; in ``init`` for parameters that are not real floating-point
        numbers; in ``update`` where parameters, batch or objective are missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> loss_fn = lambda params, batch: jnp.mean(batch * params**2)
      >>> tx = dho2.dho2(optax.sgd(0.1), loss_fn, rank=2, alpha=1.0, refresh_interval=5)
      >>> params, batch = jnp.ones(4), jnp.asarray([4.0, 1.0, 0.1, 0.01])
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss_fn)(params, batch)
      ...     updates, state = tx.update(grads, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> int(dho2.metrics(state)["refreshes"])
      4

    References:
      Gu et al., "Accelerating Deep Neural Network Training via Distributed Hybrid Order Optimization",
      arXiv 2505.00982. Sivan et al., "FOSI: Hybrid First and Second Order Optimization", arXiv 2302.08484.
    """
    _check_schedule(refresh_interval, warmup_steps, optional=True)

    def refresh(solver: Solver) -> Refresh:
        if refresh_interval is None:
            return refresh_lib.external()
        return refresh_lib.synchronous(
            solver, refresh_interval, refresh_interval if warmup_steps is None else warmup_steps
        )

    return _distributed(
        base,
        loss_fn,
        refresh,
        rank=rank,
        num_smallest=num_smallest,
        alpha=alpha,
        subspace=subspace,
        order=order,
        tolerance=tolerance,
        max_residual=max_residual,
        select=select,
        base_scale_limit=base_scale_limit,
        base_scale_growth=base_scale_growth,
        sharpness_limit=sharpness_limit,
        floor=floor,
        damping=damping,
        has_aux=has_aux,
        curvature=curvature,
        rayleigh=rayleigh,
        metric=metric,
        basis_dtype=basis_dtype,
        axis_name=axis_name,
        mesh=mesh,
        average_gradients=average_gradients,
        base_on_segments=base_on_segments,
        needs_curvature=refresh_interval is not None,
    )


def mr_dho2(
    base: optax.GradientTransformation,
    loss_fn: LossFn | None = None,
    *,
    rank: int = 8,
    num_smallest: int = 0,
    alpha: ArrayLike | optax.Schedule = 0.1,
    subspace: optax.GradientTransformation | None = None,
    probe_interval: ArrayLike = 4,
    max_probe_interval: ArrayLike | None = None,
    probe_at_anchor: bool = False,
    warmup_steps: ArrayLike = 0,
    order: int | None = None,
    tolerance: ArrayLike = 1e-2,
    max_residual: ArrayLike = 0.3,
    select: Select = "magnitude",
    base_scale_limit: ArrayLike = 3.0,
    base_scale_growth: ArrayLike = 1.01,
    sharpness_limit: ArrayLike = 1.0,
    floor: ArrayLike = 1e-3,
    damping: ArrayLike = 0.0,
    has_aux: bool = False,
    curvature: Operator | None = None,
    metric: Literal["auto", "base"] | Metric | None = "auto",
    basis_dtype: Any = None,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    average_gradients: bool = False,
    base_on_segments: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""`dho2` with its refresh spread over the updates: no update waits for a Lanczos process.

    Every `probe_interval` updates one curvature product, a *probe*, advances a Lanczos process that never stops, at the
    parameters and on the batch of the moment. After ``order`` probes, a cycle, or as soon as all residuals are below
    `tolerance`, the eigenpairs are published and the next cycle starts from them. Within a cycle they are published
    whenever more of them are below `max_residual` than are in use: the pairs that have converged are used, the others
    are left to `base` (the paper's partial curvature information). An update makes a probe, or publishes, or neither.

    ``update`` takes what that of :func:`dho2` does, and ``hvp``: the product from :func:`value_grad_and_hvp`, averaged
    over the devices as the gradient is. With neither ``hvp``, nor a batch for `loss_fn` or `curvature`, nor
    ``value_fn``, a probe that is due is skipped, and counted in the metrics.

    Args:
      base: as in :func:`dho2`; so are all arguments that are not listed here.
      loss_fn: as in :func:`dho2`, or None where ``update`` is given ``hvp``.
      rank: as in :func:`dho2`.
      num_smallest: as in :func:`dho2`.
      alpha: as in :func:`dho2`.
      subspace: as in :func:`dho2`.
      probe_interval: updates between two probes.
      max_probe_interval: lets the interval adapt to how fast the spectrum moves: from cycle to cycle it doubles, up
        to this, where the eigenvalues have moved by less than 5% of the largest, and halves, down to `probe_interval`,
        where one has moved by more than 20%. None: it stays.
      probe_at_anchor: take all probes of a cycle at the parameters of the first, of which a copy is then kept.
      warmup_steps: updates before the first probe.
      order: probes in a cycle. Default: twice the number of eigenpairs.
      tolerance: as in :func:`dho2`; ends a cycle early. What the movement of the operator does to a pair counts as
        residual.
      max_residual: as in :func:`dho2`, but larger: with a batch of its own for every probe even the largest pair keeps
        a residual of about a tenth, and left to `base` it would do more harm than used.
      select: as in :func:`dho2`.
      base_scale_limit: as in :func:`dho2`.
      base_scale_growth: as in :func:`dho2`.
      sharpness_limit: as in :func:`dho2`.
      floor: as in :func:`dho2`.
      damping: as in :func:`dho2`.
      has_aux: as in :func:`dho2`.
      curvature: as in :func:`dho2`.
      metric: as in :func:`dho2`; the preconditioner is read once a cycle.
      basis_dtype: as in :func:`dho2`.
      axis_name: as in :func:`dho2`. The Krylov basis, ``order`` vectors, lives in the state, split as the rest.
      mesh: as in :func:`dho2`.
      average_gradients: as in :func:`dho2`; holds for ``hvp`` too.
      base_on_segments: as in :func:`dho2`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`DHO2State`.

    Raises:
      ValueError: as :func:`dho2` does, but not where a batch is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> loss_fn = lambda params, batch: jnp.mean(batch * params**2)
      >>> tx = dho2.mr_dho2(optax.sgd(0.1), loss_fn, rank=2, alpha=1.0, probe_interval=2)
      >>> params, batch = jnp.ones(4), jnp.asarray([4.0, 1.0, 0.1, 0.01])
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss_fn)(params, batch)
      ...     updates, state = tx.update(grads, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> int(dho2.metrics(state)["active_pairs"])
      2

    References:
      Gu et al., "Accelerating Deep Neural Network Training via Distributed Hybrid Order Optimization",
      arXiv 2505.00982, MR-DHO2.
    """
    arguments.check_numbers("positive", whole=True, probe_interval=probe_interval)
    arguments.check_numbers("positive", whole=True, optional=True, max_probe_interval=max_probe_interval)
    arguments.check_numbers("non-negative", whole=True, warmup_steps=warmup_steps)
    shortest, longest = map(arguments.known, (probe_interval, max_probe_interval))
    if shortest is not None and longest is not None and longest < shortest:
        raise ValueError(
            f"`max_probe_interval` must be at least probe_interval = {probe_interval}, got {max_probe_interval}."
        )
    return _distributed(
        base,
        loss_fn,
        lambda solver: streaming(solver, probe_interval, max_probe_interval, warmup_steps, probe_at_anchor),
        rank=rank,
        num_smallest=num_smallest,
        alpha=alpha,
        subspace=subspace,
        order=order,
        tolerance=tolerance,
        max_residual=max_residual,
        select=select,
        base_scale_limit=base_scale_limit,
        base_scale_growth=base_scale_growth,
        sharpness_limit=sharpness_limit,
        floor=floor,
        damping=damping,
        has_aux=has_aux,
        curvature=curvature,
        metric=metric,
        basis_dtype=basis_dtype,
        axis_name=axis_name,
        mesh=mesh,
        average_gradients=average_gradients,
        base_on_segments=base_on_segments,
        needs_curvature=False,
    )


def fosi(
    base: optax.GradientTransformation,
    loss_fn: LossFn | None = None,
    *,
    rank: int = 10,
    num_smallest: int = 0,
    alpha: ArrayLike | optax.Schedule = 0.1,
    subspace: optax.GradientTransformation | None = None,
    refresh_interval: ArrayLike = 800,
    warmup_steps: ArrayLike | None = None,
    base_scale_limit: ArrayLike = 3.0,
    has_aux: bool = False,
    start: Vector | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FOSI as published, on one device: the reference that `dho2` is compared with.

    Takes the `rank` algebraically largest and `num_smallest` smallest eigenvalues from ``4 * (rank + num_smallest)``
    Lanczos steps that start at a random vector, uses them without masks, floor or damping, and follows the
    conventions of the authors' code: a refresh before update ``t`` (from 0) iff ``t + 1 >= warmup_steps`` and ``t + 1 -
    warmup_steps`` is a multiple of `refresh_interval`; the base's factor :math:`\sigma` from the `rank` largest.

    Args:
      base: the first-order optimizer, with its learning rate.
      loss_fn: ``(params, batch) -> loss``; with `has_aux` ``(loss, aux)``. ``update`` takes ``value_fn=`` without it.
      rank: how many of the largest eigenvalues.
      num_smallest: how many of the smallest.
      alpha: step size in the subspace.
      subspace: optimizer of the coordinates that mirrors the base's momentum: ``optax.trace(0.9)`` for heavy ball,
        ``optax.ema(0.9, debias=False)`` for Adam. Default: none, for SGD.
      refresh_interval: updates between refreshes.
      warmup_steps: the update of the first refresh, counted from 1. Default: `refresh_interval`.
      base_scale_limit: largest factor of the base's step; FOSI uses 3 for SGD and heavy ball, 1 for Adam.
      has_aux: whether `loss_fn` returns a pair.
      start: the start vector of every Lanczos run, shaped like the parameters. Default: a random one.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`DHO2State`.

    Raises:
      ValueError: as :func:`dho2` does.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> tx = dho2.fosi(optax.sgd(0.01), lambda p, b: jnp.sum(b * p**2), rank=2, refresh_interval=50)
      >>> state = tx.init(jnp.ones(3))

    References:
      Sivan et al., "FOSI: Hybrid First and Second Order Optimization", ICLR 2024, arXiv 2302.08484, algorithm 2.
    """
    eigensolver.check_selection(rank, num_smallest, None, "algebraic")
    subspace = optax.identity() if subspace is None else subspace
    arguments.check_transformations(base=base, subspace=subspace)
    arguments.check_functions(optional=True, loss_fn=loss_fn)
    _check_schedule(refresh_interval, warmup_steps, optional=False)
    arguments.check_numbers("non-negative", schedule=True, alpha=alpha)
    arguments.check_numbers("non-negative", infinite=True, base_scale_limit=base_scale_limit)

    def start_at(old: Spectrum, seed: jax.Array, params: Vector, axis_name: str | None, carry: Any) -> Vector:
        del old, seed, carry
        random = krylov.random_vector(jnp.uint32(0), params, axis_name)
        return random if start is None else vectors.cast_like(start, random)

    solver = Solver(
        rank=rank,
        num_smallest=num_smallest,
        order=4 * (rank + num_smallest),
        select="algebraic",
        tolerance=0.0,
        max_residual=jnp.inf,
        damping=None,
        basis_dtype=None,
        axis_name=None,
        start=start_at,
        confine=start is None,
    )
    return _hybrid(
        base,
        solver,
        refresh_lib.synchronous(solver, refresh_interval, refresh_interval if warmup_steps is None else warmup_steps),
        loss_fn=loss_fn,
        has_aux=has_aux,
        curvature=None,
        metric=None,
        alpha=alpha,
        subspace_tx=subspace,
        scale_limit=base_scale_limit,
        scale_growth=jnp.inf,
        sharpness_limit=jnp.inf,
        damping=Damping(0.0, 0.0),
        average_gradients=False,
        base_on_segments=True,
        needs_curvature=True,
        bounded=False,
    )


class MultiSteps(optax.MultiSteps):
    """``optax.MultiSteps`` that lets `dho2` and `mr_dho2` make curvature on real updates only.

    ``optax.MultiSteps`` runs the inner update on every mini-step and throws most results away, Lanczos runs included.
    This one tells the inner transformation which mini-step is the last, through ``allow_refresh``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import dho2_optax as dho2
      >>> tx = dho2.MultiSteps(dho2.dho2(optax.sgd(0.1), lambda p, b: jnp.sum(p**2)), every_k_schedule=4)
      >>> state = tx.init(jnp.ones(3))
    """

    def __init__(
        self,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[ArrayLike], ArrayLike],
        **kwargs: Any,
    ) -> None:
        """Takes the arguments of ``optax.MultiSteps``."""
        super().__init__(opt, every_k_schedule, **kwargs)
        self._mini_steps = every_k_schedule

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        """As ``optax.MultiSteps.update``."""
        every_k = self._mini_steps
        num_mini_steps = every_k(state.gradient_step) if callable(every_k) else every_k
        is_last = state.mini_step == num_mini_steps - 1
        return super().update(updates, state, params, allow_refresh=is_last, **extra_args)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """This, as a transformation that ``optax.chain`` hands keyword arguments to; optax's own drops them there."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)


def _check_schedule(refresh_interval: Any, warmup_steps: Any, *, optional: bool) -> None:
    arguments.check_numbers("positive", whole=True, optional=optional, refresh_interval=refresh_interval)
    arguments.check_numbers("positive", whole=True, optional=True, warmup_steps=warmup_steps)


def _check_params(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_array = hasattr(leaf, "dtype")
        if not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`params` must hold real floating-point numbers, got {leaf.dtype if is_array else repr(leaf)} at "
                f"{jax.tree_util.keystr(path)}; leave such leaves out with optax.masked."
            )


def _distributed(
    base: optax.GradientTransformation,
    loss_fn: LossFn | None,
    make_refresh: Callable[[Solver], Refresh],
    *,
    rank: int,
    num_smallest: int,
    alpha: ArrayLike | optax.Schedule,
    subspace: optax.GradientTransformation | None,
    order: int | None,
    tolerance: ArrayLike,
    max_residual: ArrayLike,
    select: Select,
    base_scale_limit: ArrayLike,
    base_scale_growth: ArrayLike,
    sharpness_limit: ArrayLike,
    floor: ArrayLike,
    damping: ArrayLike,
    has_aux: bool,
    curvature: Operator | None,
    metric: Literal["auto", "base"] | Metric | None,
    basis_dtype: Any,
    axis_name: str | None,
    mesh: Mesh | None,
    average_gradients: bool,
    base_on_segments: bool,
    needs_curvature: bool,
    rayleigh: Operator | None = None,
) -> optax.GradientTransformationExtraArgs:
    """What `dho2` and `mr_dho2` share: checks, the solver, and the mesh."""
    eigensolver.check_selection(rank, num_smallest, order, select)
    subspace = optax.ema(0.9, debias=False) if subspace is None else subspace
    arguments.check_transformations(base=base, subspace=subspace)
    arguments.check_functions(optional=True, loss_fn=loss_fn, curvature=curvature, rayleigh=rayleigh)
    arguments.check_numbers("non-negative", schedule=True, alpha=alpha)
    arguments.check_numbers("non-negative", tolerance=tolerance, floor=floor, damping=damping)
    arguments.check_numbers("non-negative", infinite=True, max_residual=max_residual, base_scale_limit=base_scale_limit)
    arguments.check_numbers("positive", infinite=True, sharpness_limit=sharpness_limit)
    arguments.check_numbers("at least 1", infinite=True, base_scale_growth=base_scale_growth)
    if rayleigh is not None and loss_fn is None and curvature is None:
        raise ValueError("`rayleigh` needs `loss_fn` or `curvature`.")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"`mesh` must be a jax.sharding.Mesh, got {mesh!r}. {STATIC_HINT}")
    if mesh is not None and axis_name is None:
        raise ValueError(f"`mesh` needs `axis_name`, one of {mesh.axis_names}, got None.")
    if average_gradients and (axis_name is None or mesh is not None):
        raise ValueError(
            "`average_gradients` needs `axis_name` and no `mesh`: under jit gradients are averaged already."
        )
    if axis_name is not None and not isinstance(axis_name, str):
        raise ValueError(f"`axis_name` must be the name of one mesh axis, got {axis_name!r}.")
    if loss_fn is not None and curvature is not None:
        raise ValueError("give `loss_fn` or `curvature`, not both.")
    if not (metric is None or metric in ("auto", "base") or isinstance(metric, Metric)):
        raise ValueError(f"`metric` must be None, 'auto', 'base' or a dho2_optax.Metric, got {metric!r}. {STATIC_HINT}")

    pairs = rank + num_smallest
    solver = Solver(
        rank=rank,
        num_smallest=num_smallest,
        order=2 * pairs if order is None else order,
        select=select,
        tolerance=tolerance,
        max_residual=max_residual,
        damping=Damping(floor, damping),
        basis_dtype=basis_dtype,
        axis_name=axis_name,
        start=refresh_lib.warm_start,
    )
    tx = _hybrid(
        base,
        solver,
        make_refresh(solver),
        loss_fn=loss_fn,
        has_aux=has_aux,
        curvature=curvature,
        metric=metric,
        alpha=alpha,
        subspace_tx=subspace,
        scale_limit=base_scale_limit,
        scale_growth=base_scale_growth,
        sharpness_limit=sharpness_limit,
        damping=Damping(floor, damping),
        average_gradients=average_gradients,
        base_on_segments=base_on_segments,
        needs_curvature=needs_curvature,
        rayleigh=rayleigh,
    )
    return tx if mesh is None or axis_name is None else parallel.over_mesh(tx, mesh, axis_name)


def _hybrid(
    base: optax.GradientTransformation,
    solver: Solver,
    refresh: Refresh,
    *,
    loss_fn: LossFn | None,
    has_aux: bool,
    curvature: Operator | None,
    metric: Literal["auto", "base"] | Metric | None,
    alpha: ArrayLike | optax.Schedule,
    subspace_tx: optax.GradientTransformation,
    scale_limit: ArrayLike,
    scale_growth: ArrayLike,
    sharpness_limit: ArrayLike,
    damping: Damping,
    average_gradients: bool,
    base_on_segments: bool,
    needs_curvature: bool,
    rayleigh: Operator | None = None,
    bounded: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The transformation behind all optimizers, for one device of the solver's axis.

    `needs_curvature` says that an update without curvature operator is an error, `bounded` that the Newton step is
    bounded by what the base steps.
    """
    axis_name = solver.axis_name
    base = optax.with_extra_args_support(base)
    segmented_base = base_on_segments and axis_name is not None
    own_metric = metric if isinstance(metric, Metric) else None

    def init(params: Any) -> DHO2State:
        params = vectors.as_arrays(params)
        _check_params(params)
        like = segments.split(params, axis_name)
        pairs = eigensolver.zero_spectrum(solver.num_pairs, like, solver.basis_dtype)
        zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
        base_state = base.init(like if segmented_base else params)
        # Copies: they may be arrays of the base's state, and a state with shared buffers could not be donated.
        factors = jax.tree.map(jnp.copy, factors_of(base_state, params))
        return DHO2State(
            count=zero(),
            clock=zero(),
            spectrum=pairs,
            factors=factors,
            subspace_state=subspace_tx.init(pairs.eigenvalues),
            base_state=base_state,
            sigma=jnp.ones_like(pairs.eigenvalues, shape=()),
            bounds=Bounds(*(jnp.zeros_like(pairs.eigenvalues, shape=()) for _ in Bounds._fields)) if bounded else None,
            missed=jnp.zeros_like(pairs.eigenvalues, shape=()),
            refreshes=zero(),
            rejected=zero(),
            matvecs=zero(),
            refreshed_at=zero(),
            probing=refresh.init(params, like, factors),
        )

    def factors_of(base_state: Any, params: Any) -> Factors | None:
        like = segments.split(params, axis_name) if segmented_base else params
        if metric is None or (metric == "auto" and not metric_lib.is_readable(base_state, like)):
            return None
        chosen = metric_lib.of_base(base_state) if own_metric is None else own_metric
        return metric_lib.snapshot(chosen, base_state, params, axis_name, segmented_base=segmented_base)

    def geometry_of(factors: Factors | None, params: Any) -> Geometry:
        return metric_lib.geometry(factors, params, axis_name=axis_name, metric=own_metric)

    def momentum_of(base_state: Any, gradient: Vector, params: Any) -> Momentum:
        """The base's momentum in segment form, or the gradient that it was fed."""
        found = metric_lib.momentum(base_state, gradient if segmented_base else params)
        if found is None:
            return Momentum(gradient, metric_lib.PLAIN_LIMIT)
        return found if segmented_base else found._replace(vector=segments.split(found.vector, axis_name))

    def operator_for(params: Any, batch: Any, value_fn: Any, full_params: Any) -> tuple[Operator, Any] | None:
        """The curvature operator of this update and what it takes for a batch, if it can be had."""

        def merged(visible: Any) -> Any:
            if full_params is not None:
                return fill(visible, full_params)
            if any_hidden(visible):
                raise ValueError(
                    "`params` has leaves hidden by optax.masked or optax.partition; give all parameters to update as "
                    "`full_params=`."
                )
            return visible

        if curvature is not None:
            merged(params)  # hidden parameters that are missing are asked for first
            if any_hidden(params):
                raise ValueError("`curvature` operators do not see parameters hidden by optax.masked.")
            return None if batch is None and not needs_curvature else (curvature, batch)
        if loss_fn is not None:
            if batch is None and needs_curvature:
                raise ValueError(f"`update` needs `batch=`, which `loss_fn` is called with, got None. {_DROPPED}")
            loss = loss_fn
            operator = curvature_lib.hessian(lambda p, b: loss(merged(p), b), has_aux=has_aux)
            return None if batch is None else (operator, batch)
        if value_fn is None:
            if needs_curvature:
                raise ValueError(
                    f"`update` needs `value_fn=` (or `obj_fn=`): no `loss_fn` was given at construction. {_DROPPED}"
                )
            return None
        objective = curvature_lib.checked_loss(value_fn, has_aux=has_aux, name="value_fn")
        return curvature_lib.hessian(lambda p, b: objective(merged(p)), has_aux=has_aux), ()

    def source(params: Any, hvp: Any, found: tuple[Operator, Any] | None, allowed: ArrayLike) -> Source:
        """What this update may learn curvature from; a product that is given comes before one that we would make."""
        nothing = Source(
            params=params,
            matvec_at=None,
            rayleigh=None,
            product=None,
            allowed=allowed,
            factors=lambda base_state: factors_of(base_state, params),
            geometry=lambda factors: geometry_of(factors, params),
        )
        if hvp is not None:
            if jax.tree.structure(hvp) != jax.tree.structure(params):
                hvp = vectors.unwrapped(hvp)  # nnx.Optimizer gives us the values of its variables
            given, wanted = (jax.tree.structure(tree, is_leaf=is_hidden) for tree in (hvp, params))
            if given != wanted:
                raise ValueError(f"`hvp` must be a pytree like `params`, got {given} for {wanted}.")
            given, wanted = ([x.shape for x in jax.tree.leaves(tree)] for tree in (hide(hvp, params), params))
            if given != wanted:
                raise ValueError(f"`hvp` must have the shapes of `params`, got {given} for {wanted}.")
            return nothing._replace(product=lambda: averaged(hide(hvp, params)))
        if found is None:
            return nothing
        operator, operand = found
        matvec_at = lambda at: curvature_lib.segmented_matvec(operator, at, operand, axis_name)  # noqa: E731
        quotients = None
        if rayleigh is not None:
            quotients = curvature_lib.segmented_matvec(rayleigh, params, operand, axis_name)
        return nothing._replace(matvec_at=matvec_at, rayleigh=quotients)

    def averaged(gradient: Any) -> Vector:
        """This device's segment of a gradient, or of a product that came with it."""
        if average_gradients:
            return segments.reduce_scatter_mean(gradient, axis_name)
        return segments.split(gradient, axis_name)

    def base_step(params: Any, state: DHO2State, extra: dict[str, Any]) -> Callable[[Vector], Any]:
        """`base`'s update of a gradient in segment form, on segments or on whole leaves."""

        def on_segments(gradient: Vector) -> tuple[Vector, Any]:
            local = segments.split(params, axis_name)
            return base.update(gradient, state.base_state, local, **extra)

        def on_whole_leaves(gradient: Vector) -> tuple[Vector, Any]:
            whole = segments.gather(gradient, params, axis_name)
            updates, base_state = base.update(whole, state.base_state, params, **extra)
            return segments.split(updates, axis_name), base_state

        return on_segments if segmented_base else on_whole_leaves

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        batch: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        obj_fn: Callable[[Any], Any] | None = None,
        hvp: Any = None,
        allow_refresh: ArrayLike = True,
        full_params: Any = None,
        **extra: Any,
    ) -> tuple[Any, DHO2State]:
        if params is None:
            raise ValueError("`update` needs `params`, got None.")
        if not jax.tree.leaves(params):  # all of them masked, say
            return updates, state._replace(count=optax.safe_increment(state.count))
        segments.check_bound(axis_name)
        updates, params, hvp = vectors.as_arrays((updates, params, hvp))
        check_state(state, jax.eval_shape(init, params))
        value_fn = obj_fn if value_fn is None else value_fn
        hvp = None if needs_curvature else hvp
        found = operator_for(params, batch, value_fn, full_params) if hvp is None else None

        # The big buffers are refreshed before anything reads them: with donation nothing is copied.
        state = refresh.advance(state, source(params, hvp, found, allow_refresh))

        if average_gradients:
            # Two sums over the devices must not be independent: devices that meet in different ones never go on.
            updates = jax.tree.map(lambda g: jnp.where(state.refreshes >= 0, g, 0), updates)
        gradient = averaged(updates)
        if value_fn is not None:
            extra["value_fn"] = value_fn

        def scale(tolerable: jax.Array) -> jax.Array:
            target = base_scale(
                state.spectrum,
                solver.num_smallest,
                scale_limit,
                sharpness_limit * tolerable,
                jnp.where(jnp.isinf(sharpness_limit), 0, state.missed),
                0.0 if state.bounds is None else state.bounds.least,
            )
            return jnp.minimum(target, state.sigma * scale_growth).astype(state.sigma.dtype)

        step = hybrid_step(
            gradient,
            state.spectrum,
            subspace_tx,
            state.subspace_state,
            base_step(params, state, extra),
            alpha=alpha(state.count) if callable(alpha) else alpha,
            scale=scale,
            damping=damping,
            axis_name=axis_name,
            bounds=state.bounds,
            geometry=geometry_of(state.factors, params),
            momentum_of=lambda base_state, fed: momentum_of(base_state, fed, params),
        )
        state = state._replace(
            count=optax.safe_increment(state.count),
            subspace_state=step.subspace_state,
            base_state=step.base_state,
            sigma=step.sigma,
            bounds=step.bounds,
        )
        return segments.gather(step.update, updates, axis_name), state

    return optax.GradientTransformationExtraArgs(init, update)
