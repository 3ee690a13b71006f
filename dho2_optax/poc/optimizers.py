"""The optimizers that are compared, by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

__all__ = ["OPTIMIZERS", "Context", "Optimizer", "schedule"]

_WARMUP_FRACTION = 0.05
_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Context:
    """What an optimizer may know about the run that it is built for."""

    loss_fn: Callable[[Any, Any], jax.Array]
    mesh: jax.sharding.Mesh
    axis_name: str
    num_steps: int
    rank: int
    refresh_interval: int


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer of the comparison.

    Attributes:
      description: one line for the report.
      build: maps (learning rate, context) to the optax transformation.
      learning_rates: defaults by model, with "default" for every other model.
      hybrid: it uses curvature; its update needs `batch=`, and its state has `base_state`.
    """

    description: str
    build: Callable[[float, Context], optax.GradientTransformation]
    learning_rates: Mapping[str, float]
    hybrid: bool = False

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
        mesh=context.mesh,
        axis_name=context.axis_name,
    )


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
        {"default": 3e-3, "mlp": 0.02, "cnn": 0.02, "autoencoder": 0.01},
        hybrid=True,
    ),
}
"""The optimizers by name, in the order of the report.

The learning rates of mlp, cnn and autoencoder are what `--tune` finds on the digits with the default settings,
each inside its grid.
"""
