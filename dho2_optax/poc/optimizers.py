"""The optimizers that are compared, by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax import contrib

__all__ = [
    "OPTIMIZERS",
    "Context",
    "Gradients",
    "LossFn",
    "Optimizer",
    "Rate",
    "default_optimizers",
    "learning_rate",
    "schedule",
]

_WARMUP_FRACTION = 0.05
_MOMENTUM = 0.9

LossFn = Callable[[Any, Any], jax.Array]
"""(params, batch) -> loss."""

Rate = float | jax.Array
"""A learning rate, which may be traced: then one program serves every rate."""

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


def _with_batch(context: Context) -> Gradients:
    def compute(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any, dict[str, Any]]:
        del state
        return *jax.value_and_grad(context.loss_fn)(params, batch), {"batch": batch}

    return compute


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer of the comparison.

    Attributes:
      description: one line for the report.
      base: the first-order optimizer that it is, or that it is built on.
      make: maps (base, learning rate, context) to the optax transformation.
      hybrid: it uses curvature, and its state has `base_state`.
      gradients: maps the context to what a training step computes before the update.
      group: makes the object that finds curvature on `Context.curvature_devices` between the steps. None: all
        devices train.
    """

    description: str
    base: str
    make: Callable[[str, Rate, Context], optax.GradientTransformation]
    hybrid: bool = False
    gradients: Callable[[Context], Gradients] = _with_batch
    group: Callable[[Context], Any] | None = None

    @property
    def min_devices(self) -> int:
        """The fewest devices that it runs on."""
        return 1 if self.group is None else 2

    def build(self, learning_rate: Rate, context: Context) -> optax.GradientTransformation:
        """Return the optax transformation."""
        return self.make(self.base, learning_rate, context)


def schedule(learning_rate: Rate, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to zero: the same shape for every optimizer.

    Example:
      >>> from dho2_optax.poc import optimizers
      >>> shape = optimizers.schedule(0.1, num_steps=100)
      >>> [round(float(shape(step)), 3) for step in (0, 5, 100)]
      [0.017, 0.1, 0.0]
    """
    warmup = round(_WARMUP_FRACTION * num_steps)
    # Start above zero, so that no step is wasted.
    shape = optax.warmup_cosine_decay_schedule(
        1 / (warmup + 1) if warmup else 1.0, 1.0, warmup, max(num_steps, warmup + 1)
    )
    return lambda count: learning_rate * shape(count)


def _sgd(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=_MOMENTUM)


def _muon(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Muon for every matrix, and for kernels of convolutions as matrices; Adam for biases and scales."""

    def dimensions(leaf: Any) -> Any:
        last = leaf.ndim - 1
        return contrib.MuonDimensionNumbers(tuple(range(last)), last) if last > 0 else None

    return contrib.muon(rate, muon_weight_dimension_numbers=lambda params: jax.tree.map(dimensions, params))


# The core is imported when it is used, so that a table of names costs nothing.
def _soap(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.soap(rate)


_BASES: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adam": optax.adam,
    "muon": _muon,
    "soap": _soap,
}
_WHOLE_LEAVES = ("muon", "soap")  # bases that read a matrix as a whole, so they cannot run on segments


def _base(name: str, learning_rate: Rate, context: Context) -> optax.GradientTransformation:
    return _BASES[name](schedule(learning_rate, context.num_steps))


def _fosi(base: str, learning_rate: Rate, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.fosi(
        _base(base, learning_rate, context),
        context.loss_fn,
        rank=context.rank,
        refresh_interval=context.refresh_interval,
        warmup_steps=context.refresh_interval,
        subspace=optax.trace(_MOMENTUM),
    )


def _dho2(base: str, learning_rate: Rate, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.dho2(
        _base(base, learning_rate, context),
        context.loss_fn,
        rank=context.rank,
        refresh_interval=context.refresh_interval,
        split=dho2_optax.Split(context.axis_name, mesh=context.mesh, base_on_segments=base not in _WHOLE_LEAVES),
    )


def _mr_dho2(base: str, learning_rate: Rate, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.mr_dho2(
        _base(base, learning_rate, context),
        rank=context.rank,
        # As many products as dho2 makes at most: 2 * rank in each refresh interval.
        probe_interval=max(1, context.refresh_interval // (2 * context.rank)),
        split=dho2_optax.Split(context.axis_name, mesh=context.mesh),
    )


def _with_product(context: Context) -> Gradients:
    import dho2_optax

    value_grad_and_hvp = dho2_optax.value_grad_and_hvp(context.loss_fn)

    def compute(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any, dict[str, Any]]:
        loss, grads, product = value_grad_and_hvp(params, state, batch)
        return loss, grads, {"hvp": product}

    return compute


def _mr_dho2_roles(base: str, learning_rate: Rate, context: Context) -> optax.GradientTransformation:
    import dho2_optax

    return dho2_optax.dho2(
        _base(base, learning_rate, context),
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


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer("SGD with momentum 0.9, first order", "sgd", _base),
    "adam": Optimizer("Adam, first order", "adam", _base),
    "muon": Optimizer("Muon (optax.contrib) on matrices and Adam elsewhere, first order", "muon", _base),
    "soap": Optimizer("SOAP (dho2_optax.soap), Adam in the eigenbasis of Shampoo's preconditioner", "soap", _base),
    "fosi": Optimizer("FOSI on SGD with momentum 0.9, its curvature state on every device", "sgd", _fosi, hybrid=True),
    "dho2": Optimizer("DHO2 on Adam, its state split over the devices", "adam", _dho2, hybrid=True),
    "dho2-muon": Optimizer(
        "DHO2 on Muon, its curvature state split over the devices, Muon's own on each", "muon", _dho2, hybrid=True
    ),
    "dho2-soap": Optimizer(
        "DHO2 on SOAP, its curvature state split over the devices, SOAP's own on each", "soap", _dho2, hybrid=True
    ),
    "mr-dho2": Optimizer(
        "DHO2 on Adam, its refresh spread over the steps: one curvature product every few of them",
        "adam",
        _mr_dho2,
        hybrid=True,
        gradients=_with_product,
    ),
    "mr-dho2-roles": Optimizer(
        "DHO2 on Adam, its curvature found on devices that do not train",
        "adam",
        _mr_dho2_roles,
        hybrid=True,
        group=_curvature_group,
    ),
}
"""The optimizers by name, in the order of the report."""

_LEARNING_RATES: dict[str, Mapping[str, float]] = {
    "sgd": {"default": 0.1, "mlp": 0.2, "cnn": 0.1, "autoencoder": 0.03, "pinn": 0.03},
    "adam": {"default": 3e-3, "mlp": 0.018, "cnn": 0.06, "autoencoder": 0.01, "pinn": 0.04},
    "muon": {"default": 0.02, "mlp": 0.06, "cnn": 0.02, "autoencoder": 0.06, "pinn": 0.02},
    "soap": {"default": 3e-3, "mlp": 0.03, "cnn": 0.03, "autoencoder": 0.03, "pinn": 0.06},
    "dho2": {"pinn": 0.16},
    "dho2-soap": {"pinn": 0.048},
}
"""By optimizer, or else by base, and model, with "default" for every other model.

Those of the models by name are what `--tune` finds with the default settings, each inside its grid: for the base alone,
and for a hybrid by itself where its own best is far from that.
"""


def learning_rate(optimizer: str, model: str) -> float:
    """Return the default learning rate of an optimizer for a model.

    Example:
      >>> from dho2_optax.poc.optimizers import learning_rate
      >>> learning_rate("dho2", "pinn"), learning_rate("dho2", "cnn"), learning_rate("adam", "cnn")
      (0.16, 0.06, 0.06)
    """
    rates = _LEARNING_RATES[OPTIMIZERS[optimizer].base]
    return _LEARNING_RATES.get(optimizer, {}).get(model, rates.get(model, rates["default"]))


_DEFAULT_OPTIMIZERS = {
    "default": ("adam", "dho2", "muon", "dho2-muon"),
    "pinn": ("adam", "dho2", "soap", "dho2-soap"),
}


def default_optimizers(model: str) -> tuple[str, ...]:
    """What is compared on a model if nothing else is asked for: two bases, and the hybrid on each.

    SOAP is best on small networks, but the eigenvectors that it keeps cost most of a step on matrices of a few hundred
    rows; there it is Muon.

    Example:
      >>> from dho2_optax.poc.optimizers import default_optimizers
      >>> default_optimizers("cnn")
      ('adam', 'dho2', 'muon', 'dho2-muon')
    """
    return _DEFAULT_OPTIMIZERS.get(model, _DEFAULT_OPTIMIZERS["default"])
