"""The training problems of the benchmarks: dense networks on Fashion-MNIST."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dho2_optax.poc import data

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where the Debian package dataset-fashion-mnist puts it


class Problem(NamedTuple):
    """What is trained."""

    init: Callable[[jax.Array], Any]  # random key -> parameters
    loss_fn: Callable[[Any, Any], jax.Array]  # (parameters, batch) -> mean loss
    data: tuple[np.ndarray, ...]  # one leading axis of samples
    batch_size: int
    learning_rates: tuple[float, ...]  # a grid for Adam


def init_layers(key: jax.Array, sizes: Sequence[int], gain: float) -> list[dict[str, jax.Array]]:
    """Normal weights with a variance of ``gain / fan_in``, zero biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": jax.random.normal(k, (a, b)) * np.sqrt(gain / a), "b": jnp.zeros(b)} for k, a, b in pairs]


def apply_layers(params: list[dict[str, jax.Array]], x: jax.Array, activation: Callable[[Any], Any]) -> jax.Array:
    """A dense network whose last layer is linear."""
    for layer in params[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def _cross_entropy(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    logits = apply_layers(params, images, jax.nn.relu)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _reconstruction(params: Any, batch: Any) -> jax.Array:
    (images,) = batch
    logits = apply_layers(params, images, jnp.tanh)
    return optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1).mean()


def load(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Flattened training images and their labels."""
    found = data.load(folder)
    return found.train_images.reshape(len(found.train_images), -1), found.train_labels.astype(np.int32)


def mlp(folder: str, hidden: Sequence[int] = (256, 128), batch_size: int = 2000) -> Problem:
    """A classifier with ReLU, cross entropy."""
    images, labels = load(folder)
    sizes = (images.shape[1], *hidden, 10)
    rates = (0.005, 0.01, 0.02, 0.04)
    return Problem(lambda key: init_layers(key, sizes, 2.0), _cross_entropy, (images, labels), batch_size, rates)


def autoencoder(folder: str, hidden: Sequence[int] = (256, 64, 16, 64, 256), batch_size: int = 1000) -> Problem:
    """A deep autoencoder with tanh; binary cross entropy, summed over pixels."""
    images, _ = load(folder)
    sizes = (images.shape[1], *hidden, images.shape[1])
    rates = (0.0025, 0.005, 0.01, 0.02)
    return Problem(lambda key: init_layers(key, sizes, 1.0), _reconstruction, (images,), batch_size, rates)


def batches(problem: Problem, seed: int) -> Iterator[tuple[jax.Array, ...]]:
    """Shuffled batches for ever; the remainder of an epoch is dropped."""
    rng = np.random.default_rng(seed)
    num_samples = len(problem.data[0])
    while True:
        order = rng.permutation(num_samples)
        for start in range(0, num_samples - problem.batch_size + 1, problem.batch_size):
            rows = order[start : start + problem.batch_size]
            yield tuple(jnp.asarray(x[rows]) for x in problem.data)
