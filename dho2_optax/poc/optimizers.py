"""The optimizers that are compared, by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

__all__ = ["DEFAULT_OPTIMIZERS", "OPTIMIZERS", "Context", "Gradients", "LossFn", "Optimizer", "schedule"]

_WARMUP_FRACTION = 0.05
_MOMENTUM = 0.9

LossFn = Callable[[Any, Any], jax.Array]
"""(params, batch) -> loss."""

Gradients = Callable[[Any, Any, Any], tuple[jax.Array, Any, dict[str, Any]]]
"""(params, state, batch) -> (loss, gradients, what the update is given besides)."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What an optimizer may know about the run that it is built for."""

    loss_fn: LossFn
    mesh: jax.sharding.Mesh  # of the devices that train
    axis_name: str
    num_steps: int
    rank: int
    refresh_interval: int
    curvature_devices: tuple[Any, ...] = ()  # those that find curvature and do not train


def _with_batch(loss_fn: LossFn) -> Gradients:
    def compute(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any, dict[str, Any]]:
        del state
        return *jax.value_and_grad(loss_fn)(params, batch), {"batch": batch}

    return compute


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer of the comparison.

    Attributes:
      description: one line for the report.
      build: maps (learning rate, context) to the optax transformation.
      learning_rates: defaults by model, with "default" for every other model.
      hybrid: it uses curvature, and its state has `base_state`.
      gradients: maps the loss function to what a training step computes before the update.
      group: makes the object that finds curvature on `Context.curvature_devices` between the steps. None: all
        devices train.
    """

    description: str
    build: Callable[[float, Context], optax.GradientTransformation]
    learning_rates: Mapping[str, float]
    hybrid: bool = False
    gradients: Callable[[LossFn], Gradients] = _with_batch
    group: Callable[[Context], Any] | None = None

    @property
    def min_devices(self) -> int:
        """The fewest devices that it runs on."""
        return 1 if self.group is None else 2

    def learning_rate(self, model: str) -> float:
        """Return the default learning rate for a model."""
        return self.learning_rates.get(model, self.learning_rates["default"])


def schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to zero: the same shape for every optimizer.

    Example:
      >>> from dho2_optax.poc import optimizers
      >>> shape = optimizers.schedule(0.1, num_steps=100)
      >>> [round(float(shape(step)), 3) for step in (0, 5, 100)]
      [0.017, 0.1, 0.0]
    """
    warmup = round(_WARMUP_FRACTION * num_steps)
    # Start above zero, so that no step is wasted.
    return optax.warmup_cosine_decay_schedule(
        learning_rate / (warmup + 1) if warmup else learning_rate,
        learning_rate,
        warmup,
        max(num_steps, warmup + 1),
    )


def _sgd(learning_rate: float, context: Context) -> optax.GradientTransformation:
    return optax.sgd(schedule(learning_rate, context.num_steps), momentum=_MOMENTUM)


def _adam(learning_rate: float, context: Context) -> optax.GradientTransformation:
    return optax.adam(schedule(learning_rate, context.num_steps))


# The core is imported when a hybrid is built, so that a table of names costs nothing.
def _fosi(learning_rate: float, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.fosi(
        _sgd(learning_rate, context),
        context.loss_fn,
        rank=context.rank,
        refresh_interval=context.refresh_interval,
        warmup_steps=context.refresh_interval,
        subspace=optax.trace(_MOMENTUM),
    )


def _dho2(learning_rate: float, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.dho2(
        _adam(learning_rate, context),
        context.loss_fn,
        rank=context.rank,
        refresh_interval=context.refresh_interval,
        split=dho2_optax.Split(context.axis_name, mesh=context.mesh),
    )


def _mr_dho2(learning_rate: float, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.mr_dho2(
        _adam(learning_rate, context),
        rank=context.rank,
        # As many products as dho2 makes at most: 2 * rank in each refresh interval.
        probe_interval=max(1, context.refresh_interval // (2 * context.rank)),
        split=dho2_optax.Split(context.axis_name, mesh=context.mesh),
    )


def _with_product(loss_fn: LossFn) -> Gradients:
    import dho2_optax

    value_grad_and_hvp = dho2_optax.value_grad_and_hvp(loss_fn)

    def compute(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any, dict[str, Any]]:
        loss, grads, product = value_grad_and_hvp(params, state, batch)
        return loss, grads, {"hvp": product}

    return compute


def _mr_dho2_roles(learning_rate: float, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.dho2(
        _adam(learning_rate, context),
        rank=context.rank,
        refresh_interval=None,
        split=dho2_optax.Split(context.axis_name, mesh=context.mesh),
    )


def _curvature_group(context: Context) -> Any:
    import dho2_optax

    return dho2_optax.CurvatureGroup(
        context.loss_fn,
        devices=list(context.curvature_devices),
        rank=context.rank,
        interval=context.refresh_interval,
    )


_DHO2_RATES = {"default": 3e-3, "mlp": 0.06, "cnn": 0.06, "autoencoder": 0.01}

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(
        "SGD with momentum 0.9, first order",
        _sgd,
        {"default": 0.1, "mlp": 0.2, "cnn": 0.1, "autoencoder": 0.03},
    ),
    "adam": Optimizer(
        "Adam, first order",
        _adam,
        {"default": 3e-3, "mlp": 0.06, "cnn": 0.06, "autoencoder": 0.01},
    ),
    "fosi": Optimizer(
        "FOSI on SGD with momentum 0.9, its curvature state on every device",
        _fosi,
        {"default": 0.1, "mlp": 0.2, "cnn": 0.06, "autoencoder": 0.03},
        hybrid=True,
    ),
    "dho2": Optimizer(
        "DHO2 on Adam, its state split over the devices",
        _dho2,
        _DHO2_RATES,
        hybrid=True,
    ),
    "mr-dho2": Optimizer(
        "DHO2 on Adam, its refresh spread over the steps: one curvature product every few of them",
        _mr_dho2,
        _DHO2_RATES,
        hybrid=True,
        gradients=_with_product,
    ),
    "mr-dho2-roles": Optimizer(
        "DHO2 on Adam, its curvature found on devices that do not train",
        _mr_dho2_roles,
        _DHO2_RATES,
        hybrid=True,
        group=_curvature_group,
    ),
}
"""The optimizers by name, in the order of the report.

The learning rates of mlp, cnn and autoencoder are what `--tune` finds on the digits with the default settings,
each inside its grid; the two MR-DHO2 have those of DHO2.
"""

DEFAULT_OPTIMIZERS = ("sgd", "adam", "fosi", "dho2")
"""What is compared if nothing else is asked for: as many as two cores get through in two minutes."""
