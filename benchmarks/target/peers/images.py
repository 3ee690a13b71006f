"""What a library must know of the tasks of the proof of concept: the network's outputs, and the loss on them."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.target.tasks import Target
from dho2_optax.poc import models


def network(task: Target) -> Callable[[Any, Any], jax.Array]:
    """The network of the task: (parameters, images) -> logits."""
    num_classes = 0 if task.name == models.AUTOENCODER else int(task.train["labels"].max()) + 1
    model = models.build(task.name.removeprefix("digits_"), num_classes)
    return lambda params, images: model.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def pixels(batch: Any) -> jax.Array:
    """The images of a batch, each a row."""
    return batch["images"].reshape(len(batch["images"]), -1)


def reconstruction_loss(logits: jax.Array, batch: Any) -> jax.Array:
    """The loss of the autoencoder."""
    return optax.sigmoid_binary_cross_entropy(logits, pixels(batch)).sum(axis=-1).mean()


def classification_loss(logits: jax.Array, batch: Any) -> jax.Array:
    """The loss of the others."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
