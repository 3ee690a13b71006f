"""What is trained: parameters, a loss and data, built here or by the user."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dho2_optax.poc import equations, models, system
from dho2_optax.poc.data import Dataset

__all__ = ["Task", "TaskError", "check_model", "from_dataset", "from_equation", "from_function", "of_points", "pinn"]

_DIGITS_TARGET: dict[str, Any] = {
    "target": 0.05,
    "target_reason": "below it the accuracy on the test digits changes by less than they can show",
}
_TEST_POINTS = 1000  # of an equation
_MOST_CHARACTERS = 100  # of a name, which is part of the names of files


class TaskError(ValueError):
    """A user's task cannot be imported, or is no task."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its loss and its data.

    Attributes:
      name: shown in the report, of 1 to 100 printable characters.
      init: maps a PRNG key to the parameters.
      loss_fn: maps (parameters, batch) to the mean loss of the batch, a scalar. A batch has the
        structure of `train` with fewer samples.
      train: the training data, a pytree of arrays whose leading axis counts the samples.
      test: the test data, of the same structure.
      accuracy: maps (parameters, batch) to the share of samples that are right, or None where
        there is no such thing.
      error: maps (parameters, batch) to the error relative to a known solution, or None where there is no such thing.
      batch_size: what it is meant to be trained with, over all devices.
      num_steps: how many updates it is meant to be trained for.
      rank: how many eigenpairs a hybrid is meant to use.
      refresh_interval: how many updates are meant to be between two refreshes of the curvature.
      target: the training loss that counts as done, or None: what the best first-order optimizer ends at.
      target_reason: why it does, a clause for the report.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from dho2_optax.poc.tasks import Task
      >>> x = np.ones((64, 3), np.float32)
      >>> task = Task(
      ...     name="line",
      ...     init=lambda key: {"w": jnp.zeros(3)},
      ...     loss_fn=lambda params, batch: jnp.mean((batch["x"] @ params["w"] - 1) ** 2),
      ...     train={"x": x},
      ...     test={"x": x},
      ... )
      >>> task.num_train
      64
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss_fn: Callable[[Any, Any], jax.Array]
    train: Any
    test: Any
    accuracy: Callable[[Any, Any], jax.Array] | None = None
    error: Callable[[Any, Any], jax.Array] | None = None
    batch_size: int = 256
    num_steps: int = 300
    rank: int = 8
    refresh_interval: int = 50
    target: float | None = None
    target_reason: str = "given by the task"

    def __post_init__(self) -> None:
        name = self.name
        if not (isinstance(name, str) and 0 < len(name) <= _MOST_CHARACTERS and name.isprintable()):
            raise TaskError(
                f"the name of a task must have 1 to {_MOST_CHARACTERS} printable characters, "
                f"got {system.one_line(repr(name), 100)}"
            )
        for field in ("batch_size", "num_steps", "rank", "refresh_interval"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise TaskError(f"task {name!r}: `{field}` must be a positive Python int, got {value!r}")
        for part in ("train", "test"):
            sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(getattr(self, part))}
            if len(sizes) != 1 or () in sizes or (0,) in sizes:
                raise TaskError(
                    f"task {self.name!r}: the arrays of `{part}` must share a leading axis "
                    f"of at least one sample, got {sorted(sizes)}"
                )

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(jax.tree.leaves(self.train)[0])

    @property
    def num_test(self) -> int:
        """Number of test samples."""
        return len(jax.tree.leaves(self.test)[0])


def from_dataset(model_name: str, data: Dataset) -> Task:
    """Build the task of training a model of `models.MODELS` on labelled images.

    The autoencoder reconstructs the images (binary cross entropy, summed over the pixels); the
    others classify them (cross entropy).
    """
    model = models.build(model_name, data.num_classes)
    example = jnp.zeros((1, *data.image_shape))

    def init(key: jax.Array) -> Any:
        return model.init(key, example)["params"]

    def logits(params: Any, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, images)  # pyright: ignore[reportReturnType]

    def reconstruction_loss(params: Any, batch: Any) -> jax.Array:
        pixels = batch["images"].reshape(len(batch["images"]), -1)
        losses = optax.sigmoid_binary_cross_entropy(logits(params, batch["images"]), pixels)
        return losses.sum(axis=-1).mean()

    def classification_loss(params: Any, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["images"]), batch["labels"]).mean()

    def accuracy(params: Any, batch: Any) -> jax.Array:
        return (logits(params, batch["images"]).argmax(axis=-1) == batch["labels"]).mean()

    if model_name == models.AUTOENCODER:
        train, test = {"images": data.train_images}, {"images": data.test_images}
        return Task(model_name, init, reconstruction_loss, train, test)
    train = {"images": data.train_images, "labels": data.train_labels}
    test = {"images": data.test_images, "labels": data.test_labels}
    target = _DIGITS_TARGET if data.is_digits else {}
    return Task(model_name, init, classification_loss, train, test, accuracy, **target)


def of_points(model: nn.Module) -> tuple[Callable[[jax.Array], Any], Callable[[Any], equations.Function]]:
    """A network that maps a point to a number: how it is initialized, and the function of some parameters."""

    def network(params: Any) -> equations.Function:
        return lambda point: model.apply({"params": params}, point)  # pyright: ignore[reportReturnType]

    return lambda key: model.init(key, jnp.zeros(2))["params"], network


def from_equation(name: str, equation: equations.Equation, num_points: int) -> Task:
    """Build the task of solving a differential equation with a network, which needs no data.

    The loss is the mean square of the equation's residual at some points and of what is amiss at the boundary. The
    solution is known, so the test gives the network's error.

    Args:
      name: of the task.
      equation: what is solved.
      num_points: in the rectangle, at random; the training samples, meant to be all in every batch.
    """
    init, network = of_points(models.TanhNetwork())
    return Task(
        name=name,
        init=init,
        loss_fn=lambda params, batch: equation.loss(network(params), batch["points"]),
        train={"points": equation.points(num_points, seed=0)},
        test={"points": equation.points(_TEST_POINTS, seed=1)},
        batch_size=num_points,
        error=lambda params, batch: equations.relative_error(network(params), equation.solution, batch["points"]),
    )


def pinn(num_points: int = 1024) -> Task:
    """Build the task of solving the convection equation at speed 10, see :func:`from_equation`.

    The gradient has no noise, so what limits a hybrid is how many eigenpairs it has; they turn slowly.

    Args:
      num_points: training samples, all of them in every batch.

    Example:
      >>> from dho2_optax.poc import tasks
      >>> tasks.pinn().train["points"].shape
      (1024, 2)
    """
    task = from_equation(models.PINN, equations.convection(), num_points)
    return dataclasses.replace(task, num_steps=1000, rank=30, refresh_interval=100)


def check_model(name: str) -> None:
    """Refuse a name that is none of the built-in models.

    Raises:
      TaskError: says what there is.
    """
    known = (models.PINN, *models.MODELS)
    if name not in known:
        raise TaskError(f"unknown model {name!r}: choose from {', '.join(known)}")


def from_function(reference: str) -> Task:
    """Call a user's function that returns a `Task`.

    Args:
      reference: "module:function"; the module is imported with the current directory on the path.

    Returns:
      What the function returns.

    Raises:
      TaskError: if the reference is malformed, the import or the call fails, or the result is not
        a task that can be differentiated.
    """
    module_name, colon, function_name = reference.partition(":")
    shown = system.one_line(reference)
    if not (module_name and colon and function_name) or ":" in function_name:
        raise TaskError(f"--task must look like module:function, got {shown!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _explained(f"--task {shown}"):
        function = getattr(importlib.import_module(module_name), function_name)
    if not callable(function):
        raise TaskError(f"--task {shown}: {system.one_line(function_name)} is not a function")
    with _explained(f"--task {shown} failed"):
        task = function()
    if not isinstance(task, Task):
        raise TaskError(f"--task {shown} returned {type(task).__name__}, not a Task")
    _check(task, f"--task {shown}")
    return task


def _check(task: Task, where: str) -> None:
    """Trace what is computed of one sample, so that a mistake shows before anything is compiled."""

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree)

    with _explained(f"{where}: init failed"):
        params = jax.eval_shape(task.init, jax.random.key(0))
    traced = [("loss_fn", task.loss_fn, "train"), ("loss_fn", task.loss_fn, "test")]
    traced += [(name, f, "test") for name in ("accuracy", "error") if (f := getattr(task, name)) is not None]
    for name, function, part in traced:
        with _explained(f"{where}: {name} failed on a sample of `{part}`"):
            value = jax.eval_shape(function, params, first(getattr(task, part)))
        if getattr(value, "shape", None) != ():
            raise TaskError(f"{where}: {name} must return a scalar, got {system.one_line(str(value))}")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what a user's code raises into a `TaskError`: any exception, even one that asks to exit."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise TaskError(f"{what}: {system.describe(error)}") from error
