"""An MLP and a CNN on synthetic images, and a physics-informed network: small enough to train in every situation."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dho2_optax.poc import equations


class Problem(NamedTuple):
    params: Any
    batch: Any
    loss_fn: Callable[[Any, Any], jax.Array]
    base: optax.GradientTransformation


def images(seed: int = 0, size: int = 48) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, size)
    centers = rng.normal(size=(5, 6, 6, 1))
    images = centers[labels] + 0.5 * rng.normal(size=(size, 6, 6, 1))
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # Of integer labels it takes one logit a row, whose gradient jax from 0.12 refuses on Explicit meshes.
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])).mean()


def _mlp_loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    hidden = images.reshape(images.shape[0], -1)
    hidden = jnp.tanh(hidden @ params["in"]["kernel"] + params["in"]["bias"])
    return _cross_entropy(params["scale"] * (hidden @ params["out"]["kernel"]), labels)


def _cnn_loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    convolve = functools.partial(
        jax.lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    hidden = jnp.tanh(convolve(images, params["conv1"], window_strides=(1, 1)) + params["bias1"])
    hidden = jnp.tanh(convolve(hidden, params["conv2"], window_strides=(2, 2)))
    return _cross_entropy(hidden.reshape(images.shape[0], -1) @ params["out"], labels)


def _normal(seed: int, *shape: int) -> jax.Array:
    scale = 1 / np.sqrt(max(np.prod(shape[:-1]), 1))
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def mlp() -> Problem:
    """Leaves of sizes that divide nothing, a scalar and an empty one among them."""
    params = {
        "in": {"kernel": _normal(1, 36, 19), "bias": jnp.zeros(19)},
        "out": {"kernel": _normal(2, 19, 5)},
        "scale": jnp.ones(()),
        "unused": jnp.zeros((0, 3)),
    }
    return Problem(params, images(), _mlp_loss, optax.sgd(0.02, momentum=0.9))


def cnn() -> Problem:
    params = {
        "conv1": _normal(3, 3, 3, 1, 7),
        "bias1": jnp.zeros(7),
        "conv2": _normal(4, 3, 3, 7, 5),
        "out": _normal(5, 45, 5),
    }
    return Problem(params, images(), _cnn_loss, optax.adam(1e-3))


def burgers(num_points: int = 96, width: int = 12) -> Problem:
    """Burgers' equation by a network with two hidden layers of `width` units, with all its points in the batch."""
    equation = equations.burgers()
    sizes = (2, width, width, 1)
    params = [
        {"kernel": _normal(seed, *shape), "bias": jnp.zeros(shape[1])}
        for seed, shape in enumerate(itertools.pairwise(sizes))
    ]

    def network(params: Any, point: jax.Array) -> jax.Array:
        hidden = point
        for layer in params[:-1]:
            hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
        return (hidden @ params[-1]["kernel"] + params[-1]["bias"])[0]

    return Problem(
        params,
        jnp.asarray(equation.points(num_points, seed=0)),
        lambda params, points: equation.loss(functools.partial(network, params), points),
        optax.adam(1e-2),
    )
