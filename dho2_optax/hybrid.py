"""The transformation behind all optimizers, for one device of the axis over which vectors are split.

What curvature may be learnt from is the business of :mod:`dho2_optax.learning`, when and how it is renewed that of a
:class:`dho2_optax.refresh.Refresh`, the rule by which it is used that of :mod:`dho2_optax.subspace`. Here they are put
together, and told of the base: its metric, its momentum and its step.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from dho2_optax import arguments, eigensolver, learning, segments, vectors
from dho2_optax import metric as metric_lib
from dho2_optax.learning import Inputs, Learning, own_segment
from dho2_optax.metric import Factors, Metric, Momentum
from dho2_optax.options import BaseScale, MetricChoice, Split
from dho2_optax.packing import Layout, Packed
from dho2_optax.refresh import Refresh, Solver
from dho2_optax.state import DHO2State, check_state
from dho2_optax.subspace import Bounds, Damping, HybridStep, base_scale, hybrid_step

ArrayLike = jax.typing.ArrayLike


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that was said at construction, checked and complete."""

    base: optax.GradientTransformationExtraArgs
    solver: Solver
    refresh: Refresh
    learning: Learning
    alpha: ArrayLike | optax.Schedule
    subspace: optax.GradientTransformation
    damping: Damping
    base_scale: BaseScale
    metric: MetricChoice
    bounded: bool = True  # the Newton step is bounded by what the base steps

    @property
    def split(self) -> Split | None:
        """How vectors are split over devices."""
        return self.learning.split

    @property
    def axis_name(self) -> str | None:
        """The axis over which vectors are split."""
        return learning.axis_of(self.split)

    @property
    def base_on_segments(self) -> bool:
        """Whether the base sees segments."""
        return self.split is not None and self.split.base_on_segments

    @property
    def own_metric(self) -> Metric | None:
        """The metric, if the user has written it."""
        return self.metric if isinstance(self.metric, Metric) else None

    @functools.cached_property
    def compiled_start(self) -> Callable[[Any, Any], DHO2State]:
        """`_start` as one program: outside of it a dozen operations a leaf are compiled, which takes much longer."""
        return jax.jit(functools.partial(_start, self))


def hybrid(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """The transformation."""
    return optax.GradientTransformationExtraArgs(functools.partial(init, settings), functools.partial(update, settings))


def init(settings: Settings, params: Any) -> DHO2State:
    """The state before the first update."""
    params = vectors.as_arrays(params)
    arguments.check_params(params)
    base_state = settings.base.init(_seen_by_base(settings, params))
    start = functools.partial(_start, settings)
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((params, base_state)))
    if not traced and Layout(params, settings.axis_name).is_free_in_jit:
        start = settings.compiled_start
    return start(params, base_state)._replace(base_state=base_state)


def _start(settings: Settings, params: Any, base_state: Any) -> DHO2State:
    """The state before the first update, but for the base's."""
    layout = Layout(params, settings.axis_name)
    pairs = eigensolver.zero_spectrum(settings.solver.num_pairs, layout.split(params), settings.solver.basis_dtype)
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    number = lambda: jnp.zeros_like(pairs.eigenvalues, shape=())  # noqa: E731
    # Copies: they may be arrays of the base's state, and a state with shared buffers could not be donated.
    factors = jax.tree.map(jnp.copy, factors_of(settings, base_state, params))
    return DHO2State(
        count=zero(),
        clock=zero(),
        spectrum=pairs,
        factors=factors,
        subspace_state=settings.subspace.init(pairs.eigenvalues),
        base_state=(),
        sigma=jnp.ones_like(pairs.eigenvalues, shape=()),
        bounds=Bounds(number(), number(), number(), number(), brake=number() + 1) if settings.bounded else None,
        share=number(),
        missed=number(),
        refreshes=zero(),
        rejected=zero(),
        matvecs=zero(),
        refreshed_at=zero(),
        probing=settings.refresh.init(params, layout, factors),
    )


def update(
    settings: Settings,
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
    """Renews the spectrum if it is time to, and then takes the hybrid step."""
    if params is None:
        raise ValueError("`update` needs `params`, got None.")
    if not jax.tree.leaves(params):  # all of them masked, say
        return updates, state._replace(count=optax.safe_increment(state.count))
    segments.check_bound(settings.axis_name)
    updates, params, hvp = vectors.as_arrays((updates, params, hvp))
    arguments.check_params(params)
    arguments.check_updates(updates, params)
    check_state(state, jax.eval_shape(functools.partial(init, settings), params))
    value_fn = obj_fn if value_fn is None else value_fn
    if value_fn is not None:
        extra["value_fn"] = value_fn

    layout = Layout(params, settings.axis_name)
    gradient = own_segment(updates, layout, settings.split)
    # The big buffers are refreshed before anything reads them: with donation nothing is copied.
    source = learning.source(
        settings.learning,
        params,
        layout,
        Inputs(batch, value_fn, hvp, full_params, allow_refresh),
        trusted=functools.partial(is_trusted, settings, state.bounds, gradient),
        factors=lambda base_state: factors_of(settings, base_state, params),
        geometry=lambda factors: metric_lib.geometry(factors, layout, settings.own_metric),
    )
    state = settings.refresh.advance(state, source)
    stepped = step(settings, gradient, state, params, layout, extra)
    state = state._replace(
        count=optax.safe_increment(state.count),
        subspace_state=stepped.subspace_state,
        base_state=stepped.base_state,
        sigma=stepped.sigma,
        share=stepped.share,
        bounds=stepped.bounds,
    )
    return layout.unpack(layout.gather(stepped.update)), state


def is_trusted(settings: Settings, bounds: Bounds | None, gradient: Packed) -> jax.Array:
    """Whether the batch of a gradient is no outlier, so that curvature may be learnt from it.

    Asked where a refresh is due, and answered before it begins: its sums over the devices wait for that of the
    gradient, since devices that meet in different ones never go on.
    """
    length = vectors.norm(gradient, settings.axis_name)
    return jnp.isfinite(length) if bounds is None else bounds.after(length).is_usual()


def step(
    settings: Settings, gradient: Packed, state: DHO2State, params: Any, layout: Layout, extra: dict[str, Any]
) -> HybridStep:
    """The hybrid step of a gradient, packed in segment form, with the eigenpairs of `state`."""
    alpha, factors = settings.alpha, state.factors
    if settings.axis_name and factors is not None and not factors.metric(settings.own_metric).elementwise:
        # It gathers the gradient, once the refresh is over.
        gradient = vectors.once((state.matvecs >= 0) & (state.refreshes >= 0), gradient)
    return hybrid_step(
        gradient,
        state.spectrum,
        settings.subspace,
        state.subspace_state,
        functools.partial(base_step, settings, params, layout, state.base_state, extra),
        alpha=alpha(state.count) if callable(alpha) else alpha,
        scale=functools.partial(scale, settings, state),
        damping=settings.damping,
        axis_name=settings.axis_name,
        bounds=state.bounds,
        geometry=metric_lib.geometry(factors, layout, settings.own_metric),
        momentum_of=lambda base_state, fed: momentum_of(settings, base_state, fed, params, layout),
    )


def base_step(
    settings: Settings, params: Any, layout: Layout, base_state: Any, extra: dict[str, Any], gradient: Packed
) -> tuple[Packed, Any]:
    """`base`'s update of a gradient, on segments or on whole leaves, and its new state."""
    seen = layout.unpack_segments(gradient) if settings.base_on_segments else layout.unpack(layout.gather(gradient))
    updates, base_state = settings.base.update(seen, base_state, _seen_by_base(settings, params), **extra)
    return layout.pack_segments(updates) if settings.base_on_segments else layout.split(updates), base_state


def _seen_by_base(settings: Settings, params: Any) -> Any:
    """The parameters, or this device's segments of them."""
    return segments.split(params, settings.axis_name) if settings.base_on_segments else params


def scale(settings: Settings, state: DHO2State, tolerable: jax.Array) -> jax.Array:
    """The factor of the base's step, where the base tolerates a curvature of `tolerable`."""
    sharpness = settings.base_scale.sharpness
    target = base_scale(
        state.spectrum,
        settings.solver.num_smallest,
        settings.base_scale.limit,
        sharpness * tolerable,
        jnp.where(jnp.isinf(sharpness), 0, state.missed),
        0.0 if state.bounds is None else state.bounds.least,
    )
    return jnp.minimum(target, state.sigma * settings.base_scale.growth).astype(state.sigma.dtype)


def factors_of(settings: Settings, base_state: Any, params: Any) -> Factors | None:
    """The factors of the metric as the base's state has them; None without a metric."""
    on_segments, metric = settings.base_on_segments, settings.metric
    if metric is None:
        return None
    if metric == "auto" and not metric_lib.is_default(base_state, _seen_by_base(settings, params)):
        return None
    chosen = metric_lib.of_base(base_state) if settings.own_metric is None else settings.own_metric
    return metric_lib.snapshot(chosen, base_state, params, settings.axis_name, segmented_base=on_segments)


def momentum_of(settings: Settings, base_state: Any, gradient: Packed, params: Any, layout: Layout) -> Momentum:
    """The base's momentum, packed in segment form, or the gradient that it was fed."""
    found = metric_lib.momentum(base_state, _seen_by_base(settings, params))
    if found is None:
        return Momentum(gradient, metric_lib.PLAIN_LIMIT)
    pack = layout.pack_segments if settings.base_on_segments else layout.split
    return found._replace(vector=pack(found.vector))
