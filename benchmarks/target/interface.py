"""What a method of the comparison is. Knows nothing of optax transformations, so that any library fits."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.target.tasks import Target

WARMUP_FRACTION = 0.05


class Setting(NamedTuple):
    """What a method is built for."""

    task: Target
    batch_size: int
    rate: Any  # the tuned number, for most methods the peak learning rate; traced where `Method.compiled` is "once"
    num_steps: Any  # length of the schedule; traced where `rate` is

    @property
    def warmup_steps(self) -> jax.Array:
        """Updates until the learning rate is at its peak, ``shape=()`` and float."""
        return jnp.round(WARMUP_FRACTION * self.num_steps)

    def shape(self, count: Any) -> jax.Array:
        """The schedule of all methods, with a peak of 1: 5% linear warm-up from above zero, then a cosine to zero."""
        warmup = self.warmup_steps
        progress = jnp.clip((count - warmup) / jnp.maximum(self.num_steps - warmup, 1), 0, 1)
        return jnp.where(count < warmup, (count + 1) / (warmup + 1), 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    def schedule(self, count: Any) -> jax.Array:
        """The learning rate of update `count`, from 0."""
        return self.rate * self.shape(count)


class Trainer(NamedTuple):
    """Trains by one method."""

    init: Callable[[Any, Any], Any]  # (parameters, first batch) -> carry
    step: Callable[[Any, Any], tuple[Any, jax.Array]]  # (carry, batch) -> (carry, loss before the update)
    params: Callable[[Any], Any]  # carry -> parameters
    products: Callable[[Any], Any] = lambda carry: 0  # carry -> curvature products made so far


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
      description: one line for the report.
      kind: "baseline", "hybrid" or "ablation".
      build: makes the trainer.
      centres: centre of the grid of the tuned number by task, with "default" for every other task.
      options: what the method was given besides, as JSON; stored with its results, which are not mixed with those of
        other options.
      rate_name: what is tuned.
      limits: smallest and largest value that tuning may try.
      compiled: "once": `init` and `step` are pure, and may be traced with a traced rate and length. "for each rate":
        they are pure, but rate and length must be numbers. "by itself": the trainer compiles what it needs.
      steady: all parts of a run take the same time. If not, the time of a step is the mean over a whole run.
      only_full_batch: it is left out where a batch is not all of the training data.
      most_parameters: it is left out where a task has more.
      least_squares: it is left out where the loss of a task is no sum of squares, `Target.residuals`.
    """

    description: str
    kind: Literal["baseline", "hybrid", "ablation"]
    build: Callable[[Setting], Trainer]
    centres: Mapping[str, float]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate_name: str = "learning rate"
    limits: tuple[float, float] = (0.0, float("inf"))
    compiled: Literal["once", "for each rate", "by itself"] = "once"
    steady: bool = True
    only_full_batch: bool = False
    most_parameters: float = float("inf")
    least_squares: bool = False

    def centre(self, task: str) -> float:
        """The centre of the grid for a task."""
        return self.centres.get(task, self.centres["default"])

    def unfit(self, task: Target, batch_size: int) -> str | None:
        """Why the method is left out on a task, or None if it is not."""
        if self.only_full_batch and batch_size < task.num_train:
            return f"for batches of all {task.num_train} samples only"
        if self.least_squares and task.residuals is None:
            return "for losses that are sums of squares only"
        count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
        if count > self.most_parameters:
            return f"for up to {self.most_parameters:g} parameters, here are {count}"
        return None
