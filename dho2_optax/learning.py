"""What an update may learn curvature from: an operator and the batch for it, or a product that it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from dho2_optax import arguments, vectors
from dho2_optax import curvature as curvature_lib
from dho2_optax.curvature import BatchSize, LossFn, Operator
from dho2_optax.masking import any_hidden, fill, hide, is_hidden
from dho2_optax.metric import Factors, Geometry
from dho2_optax.options import Split
from dho2_optax.packing import Layout, Packed
from dho2_optax.refresh import Source

ArrayLike = jax.typing.ArrayLike
_DROPPED = (
    "If it was given: flax's TrainState.apply_gradients and optax.MultiSteps in a chain drop keyword arguments; "
    "use dho2_optax.flax.TrainState for the one, dho2_optax.MultiSteps(...).gradient_transformation() for the other."
)

_WITH_BATCH = "give `lambda params: loss_fn(params, batch)`, or `loss_fn` at construction and `update` the `batch=`"


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Where curvature comes from, as far as it is known at construction."""

    loss_fn: LossFn | None
    has_aux: bool = False
    batch_size: BatchSize = "auto"  # of `loss_fn`'s products
    curvature: Operator | None = None  # in place of `loss_fn`'s
    rayleigh: Operator | None = None
    split: Split | None = None
    required: bool = (
        True  # an update from which nothing can be learnt is an error; products that are given are not used
    )


class Inputs(NamedTuple):
    """What ``update`` is given besides gradients, state and parameters."""

    batch: Any = None
    value_fn: Callable[[Any], Any] | None = None
    hvp: Any = None
    full_params: Any = None
    allow_refresh: ArrayLike = True


def check_objective(loss_fn: Any, curvature: Any, batch_size: Any) -> None:
    """Raises ValueError for arguments of a constructor that do not say what curvature is to be made from."""
    arguments.check_functions(optional=True, loss_fn=loss_fn, curvature=curvature)
    arguments.check_sizes(auto=True, batch_size=batch_size)
    if loss_fn is not None and curvature is not None:
        raise ValueError("give `loss_fn` or `curvature`, not both.")
    if loss_fn is None and arguments.is_int(batch_size):
        raise ValueError(
            f"`batch_size` is for the products of `loss_fn`, which is not given, got {batch_size}; give it to "
            "dho2_optax.hessian for `curvature`, or to dho2_optax.value_grad_and_hvp for `hvp`."
        )


def axis_of(split: Split | None) -> str | None:
    """The axis over which vectors are split."""
    return None if split is None else split.axis_name


def own_segment(gradient: Any, layout: Layout, split: Split | None) -> Packed:
    """This device's segment of a gradient, or of a product that came with it."""
    return layout.mean(gradient) if split is not None and split.average_gradients else layout.split(gradient)


def source(
    learning: Learning,
    params: Any,
    layout: Layout,
    inputs: Inputs,
    *,
    trusted: Callable[[], jax.Array],
    factors: Callable[[Any], Factors | None],
    geometry: Callable[[Factors | None], Geometry],
) -> Source:
    """What one update may learn curvature from; a product that is given comes before one that we would make.

    Args:
      learning: what was given at construction.
      params: the visible parameters.
      layout: of vectors like them.
      inputs: what was given to this update.
      trusted: says whether its batch is no outlier.
      factors: from the state of the base to the factors of the metric.
      geometry: from those to the metric.
    """
    nothing = Source(
        params=params,
        layout=layout,
        matvec_at=None,
        rayleigh=None,
        product=None,
        allowed=inputs.allow_refresh,
        trusted=trusted,
        factors=factors,
        geometry=geometry,
    )
    if inputs.hvp is not None and not learning.required:
        given = _product(inputs.hvp, params)
        return nothing._replace(product=lambda: own_segment(given, layout, learning.split))
    found = operator_for(learning, params, inputs)
    if found is None:
        return nothing
    operator, operand = found
    axis_name = axis_of(learning.split)
    quotients = None
    if learning.rayleigh is not None:
        quotients = curvature_lib.segmented_matvec(learning.rayleigh, params, operand, axis_name)
    return nothing._replace(
        matvec_at=lambda at: curvature_lib.segmented_matvec(operator, at, operand, axis_name), rayleigh=quotients
    )


def operator_for(learning: Learning, params: Any, inputs: Inputs) -> tuple[Operator, Any] | None:
    """The curvature operator of this update and what it takes for a batch, if it can be had."""

    def merged(visible: Any) -> Any:
        if inputs.full_params is not None:
            return fill(visible, inputs.full_params)
        if any_hidden(visible):
            raise ValueError(
                "`params` has leaves hidden by optax.masked or optax.partition; give all parameters to update as "
                "`full_params=`."
            )
        return visible

    batch, value_fn, has_aux = inputs.batch, inputs.value_fn, learning.has_aux
    if learning.curvature is not None:
        merged(params)  # hidden parameters that are missing are asked for first
        if any_hidden(params):
            raise ValueError("`curvature` operators do not see parameters hidden by optax.masked.")
        return None if batch is None and not learning.required else (learning.curvature, batch)
    if learning.loss_fn is not None:
        if batch is None and learning.required:
            raise ValueError(f"`update` needs `batch=`, which `loss_fn` is called with, got None. {_DROPPED}")
        if batch is None:
            return None
        loss, axis_name = learning.loss_fn, axis_of(learning.split)
        operator = curvature_lib.hessian_on_part(
            lambda p, b: loss(merged(p), b), has_aux=has_aux, batch_size=learning.batch_size, axis_name=axis_name
        )
        return operator, batch
    if value_fn is None:
        if learning.required:
            raise ValueError(
                f"`update` needs `value_fn=` (or `obj_fn=`): no `loss_fn` was given at construction. {_DROPPED}"
            )
        return None
    arguments.check_calls("value_fn", value_fn, "params", remedy=_WITH_BATCH)
    objective = curvature_lib.checked_loss(value_fn, has_aux=has_aux, name="value_fn")
    return curvature_lib.hessian(lambda p, b: objective(merged(p)), has_aux=has_aux), ()


def _product(hvp: Any, params: Any) -> Any:
    """The visible part of a product that `update` was given."""
    if jax.tree.structure(hvp) != jax.tree.structure(params):
        hvp = vectors.unwrapped(hvp)  # nnx.Optimizer gives us the values of its variables
    given, wanted = (jax.tree.structure(tree, is_leaf=is_hidden) for tree in (hvp, params))
    if given != wanted:
        raise ValueError(f"`hvp` must be a pytree like `params`, got {given} for {wanted}.")
    visible = hide(hvp, params)
    given, wanted = ([x.shape for x in jax.tree.leaves(tree)] for tree in (visible, params))
    if given != wanted:
        raise ValueError(f"`hvp` must have the shapes of `params`, got {given} for {wanted}.")
    return visible
