"""The optimizers: `dho2`, `mr_dho2`, their published ancestor `fosi`, and `MultiSteps` for gradient accumulation."""

# With it, `help` shows signatures as they are written here.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dho2_optax import arguments, parallel, vectors
from dho2_optax import refresh as refresh_lib
from dho2_optax.arguments import INJECTION_HINT
from dho2_optax.curvature import BatchSize, LossFn, Operator
from dho2_optax.eigensolver import Spectrum, check_selection
from dho2_optax.hybrid import Settings, hybrid
from dho2_optax.learning import Learning, axis_of, check_objective
from dho2_optax.metric import Metric
from dho2_optax.options import BaseScale, Eigensolver, MetricChoice, Newton, Split, check_options
from dho2_optax.packing import Layout, Packed
from dho2_optax.refresh import Refresh, Solver
from dho2_optax.streaming import streaming
from dho2_optax.subspace import Damping
from dho2_optax.vectors import Vector

ArrayLike = jax.typing.ArrayLike
Base = optax.GradientTransformation
Transformation = optax.GradientTransformationExtraArgs
Number = ArrayLike | optax.Schedule
Interval = ArrayLike | tuple[ArrayLike, ArrayLike]


def dho2(
    base: Base,
    loss_fn: LossFn | None = None,
    *,
    rank: int = 8,
    alpha: Number = 0.1,
    refresh_interval: ArrayLike | None = 50,
    warmup_steps: ArrayLike | None = None,
    batch_size: BatchSize = "auto",
    has_aux: bool = False,
    curvature: Operator | None = None,
    metric: MetricChoice = "auto",
    eigensolver: Eigensolver = Eigensolver(),
    newton: Newton = Newton(),
    base_scale: BaseScale = BaseScale(),
    split: Split | None = None,
) -> Transformation:
    r"""Hybrid-order optimization: Newton in the steepest directions, `base` everywhere else.

    Every `refresh_interval` updates a Lanczos process finds the `rank` extreme eigenpairs
    :math:`(\lambda_i, v_i)` of the curvature operator, by default the Hessian of `loss_fn`. In their span the update is
    a damped Newton step, in the orthogonal complement it is `base`'s:

    .. math::
        u = \sigma\, d - V^\top (\sigma V d + \alpha\, q / |\lambda|), \qquad
        d = \text{base}(g - V^\top V g), \quad q = \text{subspace}(V g),

    with the base scaled by :math:`\sigma = \text{clip}(|\lambda|_{\max}/\lambda_\text{left}, 1,
    \text{limit})`, where :math:`\lambda_\text{left}` is what is left of the curvature outside: the larger
    of :math:`|\lambda|_k` and of what a refresh finds that the eigenvectors before it have missed. So the base steps
    further from the second refresh on. Until the first the update is `base`'s. While gradients are longer than usual,
    the base's step is shorter by as much, down to a quarter: that is how a base shows that it is too fast for what has
    turned out of the subspace.

    No batch does more harm than to `base` alone. A gradient of more than four times its usual length is `base`'s, and
    so is the update, until a momentum has forgotten it; it is shortened to what `base` tolerates at
    :math:`|\lambda|_{\max}`. Along an eigenvector the Newton step goes no further than `base` would by itself, whatever
    eigenvalue a batch has led to: with the learning rate :math:`\eta` of `base`, pairs with an eigenvalue below
    :math:`\alpha / \eta` are `base`'s.

    ``update`` takes, besides gradients, state and parameters:

    * ``batch``: passed to `loss_fn` on refreshes. On several devices, the local shard of it inside ``shard_map`` and
      ``pmap``, the global one with a mesh.
    * ``value_fn`` (or ``obj_fn``): ``params -> loss``, instead of `loss_fn` and ``batch``.
    * ``allow_refresh``: a boolean scalar; a refresh that is due waits until it is true (see `MultiSteps`).
    * ``full_params``: under ``optax.masked`` or ``optax.partition``, where this transformation sees some parameters
      only: all of them, for `loss_fn`. Curvature is then that of the visible parameters.

    Other keyword arguments go to `base`.

    Args:
      base: the first-order optimizer, with its learning rate. Must be element-wise where it runs on segments.
      loss_fn: ``(params, batch) -> loss``, a scalar mean over samples; with `has_aux` ``(loss, aux)``.
      rank: how many eigenpairs. Multiples of 8 fill the tiles of a TPU.
      alpha: step size in the subspace, 1 being a full Newton step; a number or a schedule of the update count. Large
        ones gain only with a learning rate of `base` that is large too, since its step bounds the Newton step.
      refresh_interval: updates between refreshes. None: no refresh but those a :class:`CurvatureGroup` installs.
      warmup_steps: update ``t`` (from 0) is preceded by a refresh if ``t + 1 >= warmup_steps`` and ``t + 1 -
        warmup_steps`` is a multiple of `refresh_interval`. Default: `refresh_interval`. Short runs gain from a first
        refresh as soon as the learning rate has risen to its peak.
      batch_size: on how many samples, spread over the batch, `loss_fn`'s products are made; on several devices, of
        every device's shard. ``"auto"``: on an eighth of the batch, but on at least 128 samples over all devices; on
        the whole batch where that is not larger, where its arrays have no common leading axis (scalars apart), and with
        ``value_fn``. `curvature` has a size of its own. None, the whole batch, is for a loss that is no mean over
        samples (a contrastive one), for a batch whose leading axis is not that of samples, and for fitting one and the
        same batch to the end.
      has_aux: whether `loss_fn` returns a pair.
      curvature: an operator ``(params, vector, batch) -> vector`` in place of `loss_fn`'s Hessian, from
        :func:`dho2_optax.gauss_newton` or from :func:`dho2_optax.hessian` with options.
      metric: ``"base"`` measures curvature in the geometry in which the base steps: with :math:`P` its preconditioner,
        :math:`1 / (\sqrt{\nu} + \epsilon)` for Adam, but within a leaf at most 1000 times its smallest number,
        eigenpairs are those of :math:`P^{1/2} H P^{1/2}`, and one copy of :math:`P` is kept with them. Known are Adam,
        AdamW, NAdam, AMSGrad, AdaBelief, RMSprop, Adagrad, :func:`dho2_optax.soap` and :func:`dho2_optax.shampoo`, in
        chains and with masks. A :class:`dho2_optax.Metric` serves other bases; whoever has only the state, a
        :class:`CurvatureGroup` say, must be given it too. None: those of :math:`H`. ``"auto"``: the base's if it is
        known and diagonal, else None: the half-powers of `soap`'s and `shampoo`'s cost more than they gain. AdaMax and
        ADOPT keep other numbers in a state of Adam's type and are taken for it: give AdaMax ``metric=None``; ADOPT,
        whose momentum is not of gradients, is no base for this.
      eigensolver: how eigenpairs are found, and which are used; an :class:`Eigensolver`.
      newton: the step in the subspace; a :class:`Newton`.
      base_scale: by how much further the base steps; a :class:`BaseScale`.
      split: over which devices vectors are split, and how; a :class:`Split`. None: not at all.

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
        first = refresh_interval if warmup_steps is None else warmup_steps
        return refresh_lib.synchronous(solver, refresh_interval, first)

    return _assemble(
        base,
        loss_fn,
        refresh,
        rank=rank,
        alpha=alpha,
        batch_size=batch_size,
        has_aux=has_aux,
        curvature=curvature,
        metric=metric,
        eigensolver=eigensolver,
        newton=newton,
        base_scale=base_scale,
        split=split,
        max_residual=0.1,
        required=refresh_interval is not None,
    )


def mr_dho2(
    base: Base,
    loss_fn: LossFn | None = None,
    *,
    rank: int = 8,
    alpha: Number = 0.1,
    probe_interval: Interval = 4,
    warmup_steps: ArrayLike = 0,
    batch_size: BatchSize = "auto",
    has_aux: bool = False,
    curvature: Operator | None = None,
    metric: MetricChoice = "auto",
    eigensolver: Eigensolver = Eigensolver(),
    newton: Newton = Newton(),
    base_scale: BaseScale = BaseScale(),
    split: Split | None = None,
) -> Transformation:
    r"""`dho2` with its refresh spread over the updates: no update waits for a Lanczos process.

    Every `probe_interval` updates, the first time after `warmup_steps`, one curvature product, a *probe*, advances a
    Lanczos process that never stops, at the parameters and on the batch of the moment. After ``order`` probes, a cycle,
    or as soon as all residuals are below ``tolerance``, the eigenpairs are published and the next cycle starts from
    them; the preconditioner of the base, where it is the metric, is read once a cycle. Within a cycle they are
    published whenever more of them are below ``max_residual`` than are in use: the pairs that have converged are used,
    the others are left to `base` (the paper's partial curvature information). An update makes a probe, or publishes, or
    neither.

    ``update`` takes what that of :func:`dho2` does, and ``hvp``: the product from :func:`value_grad_and_hvp`, averaged
    over the devices as the gradient is. `loss_fn` is not needed then. With neither ``hvp``, nor a batch for `loss_fn`
    or `curvature`, nor ``value_fn``, a probe that is due is skipped, and counted in the metrics: so the batch may be
    left out of some updates. Where something on the way drops it from all, as flax's ``apply_gradients`` and
    ``optax.MultiSteps`` in a chain do, `base` trains alone and there is no error: see ``skipped_probes`` of
    :func:`metrics`, or :func:`alarms`.

    The state holds the Krylov basis, ``order`` vectors, split as the rest.

    Args:
      probe_interval: updates between two probes. A pair ``(shortest, longest)`` lets the interval adapt to how fast the
        spectrum moves: from cycle to cycle it doubles, up to the longest, where the eigenvalues have moved by less than
        5% of the largest, and halves, down to the shortest, where one has moved by more than 20%.

    All other arguments are those of :func:`dho2`.

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
    shortest, longest = _interval(probe_interval)
    arguments.check_numbers("non-negative", whole=True, warmup_steps=warmup_steps)
    check_options(eigensolver=eigensolver)
    if eigensolver.rayleigh is not None:
        raise ValueError("`rayleigh` is for the refreshes of dho2; mr_dho2 makes no products for it, give None.")
    return _assemble(
        base,
        loss_fn,
        lambda solver: streaming(solver, shortest, longest, warmup_steps, eigensolver.anchored),
        rank=rank,
        alpha=alpha,
        batch_size=batch_size,
        has_aux=has_aux,
        curvature=curvature,
        metric=metric,
        eigensolver=eigensolver,
        newton=newton,
        base_scale=base_scale,
        split=split,
        max_residual=0.3,
        required=False,
    )


def fosi(
    base: Base,
    loss_fn: LossFn | None = None,
    *,
    rank: int = 10,
    num_smallest: int = 0,
    alpha: Number = 0.1,
    subspace: optax.GradientTransformation | None = None,
    refresh_interval: ArrayLike = 800,
    warmup_steps: ArrayLike | None = None,
    base_scale_limit: ArrayLike = 3.0,
    has_aux: bool = False,
    start: Vector | None = None,
) -> Transformation:
    r"""FOSI as published, on one device: the reference that `dho2` is compared with.

    Takes the `rank` algebraically largest and `num_smallest` smallest eigenvalues from ``4 * (rank + num_smallest)``
    Lanczos steps that start at a random vector, uses them without masks, floor or damping, and follows the
    conventions of the authors' code: a refresh before update ``t`` (from 0) iff ``t + 1 >= warmup_steps`` and ``t + 1 -
    warmup_steps`` is a multiple of `refresh_interval`; the base's factor :math:`\sigma` from the `rank` largest.
    Products are made on the whole batch. ``update`` takes ``value_fn=`` where no `loss_fn` is given.

    By default no optimizer of the coordinates, `subspace`, mirrors the base's momentum, as is right for SGD; give
    ``optax.trace(0.9)`` for heavy ball, ``optax.ema(0.9, debias=False)`` for Adam.

    Args:
      base_scale_limit: largest factor of the base's step; FOSI uses 3 for SGD and heavy ball, 1 for Adam.
      start: the start vector of every Lanczos run, shaped like the parameters. Default: a random one.
      num_smallest: as in :class:`Eigensolver`.
      subspace: as in :class:`Newton`.

    All other arguments are those of :func:`dho2`.

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
    check_selection(rank, num_smallest, None, "algebraic")
    subspace = optax.identity() if subspace is None else subspace
    arguments.check_transformations(base=base, subspace=subspace)
    arguments.check_functions(optional=True, loss_fn=loss_fn)
    _check_loss(loss_fn)
    _check_schedule(refresh_interval, warmup_steps, optional=False)
    arguments.check_numbers("non-negative", schedule=True, alpha=alpha)
    arguments.check_numbers("non-negative", infinite=True, base_scale_limit=base_scale_limit)

    def start_at(old: Spectrum, seed: jax.Array, layout: Layout, carry: Any) -> Packed:
        del old, carry
        random = layout.random(jnp.zeros_like(seed))
        return random if start is None else vectors.cast_like(layout.pack(start), random)

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
    first = refresh_interval if warmup_steps is None else warmup_steps
    return hybrid(
        Settings(
            base=optax.with_extra_args_support(base),
            solver=solver,
            refresh=refresh_lib.synchronous(solver, refresh_interval, first),
            learning=Learning(loss_fn=loss_fn, has_aux=has_aux, batch_size=None),
            alpha=alpha,
            subspace=subspace,
            damping=Damping(0.0, 0.0),
            base_scale=BaseScale(limit=base_scale_limit, growth=jnp.inf, sharpness=jnp.inf),
            metric=None,
            bounded=False,
        )
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

    def update(
        self, updates: Any, state: Any, params: Any = None, *, allow_refresh: ArrayLike = True, **extra_args: Any
    ) -> tuple[Any, Any]:
        """As ``optax.MultiSteps.update``; `allow_refresh` as :func:`dho2` takes it."""
        every_k = self._mini_steps
        num_mini_steps = every_k(state.gradient_step) if callable(every_k) else every_k
        is_last = state.mini_step == num_mini_steps - 1
        return super().update(updates, state, params, allow_refresh=is_last & allow_refresh, **extra_args)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """This, as a transformation that ``optax.chain`` hands keyword arguments to; optax's own drops them there."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)


def _check_loss(loss_fn: LossFn | None) -> None:
    remedy = "give a loss of the parameters alone to `update`, as `value_fn=`, and no `loss_fn`"
    arguments.check_calls("loss_fn", loss_fn, "params", "batch", remedy=remedy)


def _check_schedule(refresh_interval: Any, warmup_steps: Any, *, optional: bool) -> None:
    arguments.check_numbers("positive", whole=True, optional=optional, refresh_interval=refresh_interval)
    arguments.check_numbers("positive", whole=True, optional=True, warmup_steps=warmup_steps)


def _interval(probe_interval: Interval) -> tuple[ArrayLike, ArrayLike | None]:
    """The shortest interval between probes and the longest; None where it does not change."""
    if not isinstance(probe_interval, tuple | list):
        arguments.check_numbers("positive", whole=True, probe_interval=probe_interval)
        return probe_interval, None
    if len(probe_interval) != 2:
        raise ValueError(f"`probe_interval` must be a number or a pair (shortest, longest), got {probe_interval!r}.")
    for number in probe_interval:
        arguments.check_numbers("positive", whole=True, probe_interval=number)
    shortest, longest = (arguments.known(arguments.on_host(number)) for number in probe_interval)
    if shortest is not None and longest is not None and longest < shortest:
        raise ValueError(f"`probe_interval` must be a pair (shortest, longest), got {probe_interval!r}.")
    return probe_interval[0], probe_interval[1]


def _assemble(
    base: Base,
    loss_fn: LossFn | None,
    make_refresh: Callable[[Solver], Refresh],
    *,
    rank: int,
    alpha: Number,
    batch_size: BatchSize,
    has_aux: bool,
    curvature: Operator | None,
    metric: MetricChoice,
    eigensolver: Eigensolver,
    newton: Newton,
    base_scale: BaseScale,
    split: Split | None,
    max_residual: ArrayLike,
    required: bool,
) -> Transformation:
    """What `dho2` and `mr_dho2` share: checks, the solver, and the mesh."""
    check_options(eigensolver=eigensolver, newton=newton, base_scale=base_scale, split=split)
    arguments.check_transformations(base=base)
    arguments.check_numbers("non-negative", schedule=True, alpha=alpha)
    check_objective(loss_fn, curvature, batch_size)
    _check_loss(loss_fn)
    if eigensolver.rayleigh is not None and loss_fn is None and curvature is None:
        raise ValueError("`rayleigh` needs `loss_fn` or `curvature`.")
    if not (metric is None or metric in ("auto", "base") or isinstance(metric, Metric)):
        raise ValueError(
            f"`metric` must be None, 'auto', 'base' or a dho2_optax.Metric, got {metric!r}. {INJECTION_HINT}"
        )
    solver = refresh_lib.make_solver(rank, eigensolver, newton, axis_of(split), max_residual=max_residual)
    tx = hybrid(
        Settings(
            base=optax.with_extra_args_support(base),
            solver=solver,
            refresh=make_refresh(solver),
            learning=Learning(
                loss_fn=loss_fn,
                has_aux=has_aux,
                batch_size=batch_size,
                curvature=curvature,
                rayleigh=eigensolver.rayleigh,
                split=split,
                required=required,
            ),
            alpha=alpha,
            subspace=optax.ema(0.9, debias=False) if newton.subspace is None else newton.subspace,
            damping=Damping(newton.floor, newton.damping),
            base_scale=base_scale,
            metric=metric,
        )
    )
    return tx if split is None or split.mesh is None else parallel.over_mesh(tx, split.mesh, split.axis_name)
