"""Small networks, one for each kind of loss surface that teams meet: of images, and of a differential equation."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["AUTOENCODER", "MODELS", "PINN", "build"]

AUTOENCODER = "autoencoder"
PINN = "pinn"


def convolve_patches(
    images: jax.Array, kernel: jax.Array, window_strides: tuple[int, int], padding: Any, **unused: Any
) -> jax.Array:
    """A convolution of images, channels last, as a product of their patches with the kernel.

    XLA brings convolutions in the form of its fast CPU routine at the top level of a program only. Inside a conditional
    or a loop, where curvature is refreshed, their derivatives run tens of times slower; products of matrices do not.

    Args:
      images: shape (batch, height, width, channels).
      kernel: shape (height, width, channels, features).
      window_strides: along height and width.
      padding: as in ``jax.lax.conv_general_dilated``.
      **unused: further arguments that `flax.linen.Conv` passes, at their defaults.
    """
    height, width, _, features = kernel.shape
    pads = jax.lax.padtype_to_pads(images.shape[1:3], (height, width), window_strides, padding)
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    rows, columns = (padded.shape[1] - height) // window_strides[0], (padded.shape[2] - width) // window_strides[1]
    patches = [
        padded[
            :,
            i : i + window_strides[0] * rows + 1 : window_strides[0],
            j : j + window_strides[1] * columns + 1 : window_strides[1],
        ]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, features)


def _convolution() -> Callable[..., jax.Array]:
    return convolve_patches if jax.default_backend() == "cpu" else jax.lax.conv_general_dilated


Conv = functools.partial(nn.Conv, conv_general_dilated_cls=_convolution)
"""A convolution of images, without dilation and groups, that is as fast in a curvature product as elsewhere."""


class Mlp(nn.Module):
    """Two hidden layers."""

    num_outputs: int
    hidden: tuple[int, ...] = (256, 128)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images, shape (batch, height, width, channels), to logits."""
        x = images.reshape(len(images), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)


class Cnn(nn.Module):
    """Three convolutions with strides in place of pooling, then one hidden layer."""

    num_outputs: int
    channels: tuple[int, ...] = (16, 32, 32)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images, shape (batch, height, width, channels), to logits."""
        x = images
        for i, features in enumerate(self.channels):
            x = nn.relu(Conv(features, (3, 3), strides=2 if i else 1)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_outputs)(x)


class _ResidualBlock(nn.Module):
    """Two convolutions around a shortcut, with group normalization before each."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.GroupNorm(num_groups=8)(x))
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = Conv(self.features, (1, 1), strides=self.stride, use_bias=False)(y)
        y = Conv(self.features, (3, 3), strides=self.stride, use_bias=False)(y)
        y = nn.relu(nn.GroupNorm(num_groups=8)(y))
        return shortcut + Conv(self.features, (3, 3), use_bias=False)(y)


class ResNet(nn.Module):
    """A narrow pre-activation residual network.

    It normalizes over groups and not over the batch, so that the loss of a batch is the mean of
    the losses of its samples, on any number of devices.
    """

    num_outputs: int
    channels: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images, shape (batch, height, width, channels), to logits."""
        x = Conv(self.channels[0], (3, 3), use_bias=False)(images)
        for i, features in enumerate(self.channels):
            x = _ResidualBlock(features, stride=2 if i else 1)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x)).mean(axis=(1, 2))
        return nn.Dense(self.num_outputs)(x)


class Autoencoder(nn.Module):
    """The deep autoencoder on which curvature methods are usually compared.

    It returns logits of the pixels, flattened.
    """

    hidden: tuple[int, ...] = (256, 64, 16, 64, 256)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images, shape (batch, height, width, channels), to logits of their pixels."""
        x = images.reshape(len(images), -1)
        num_pixels = x.shape[-1]
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width)(x)
            # The code in the middle is linear.
            x = x if i == len(self.hidden) // 2 else nn.tanh(x)
        return nn.Dense(num_pixels)(x)


class TanhNetwork(nn.Module):
    """A smooth function of the plane: three hidden layers with tanh."""

    hidden: tuple[int, ...] = (50, 50, 50)

    @nn.compact
    def __call__(self, point: jax.Array) -> jax.Array:
        """Map a point, shape (2,), or several in rows, to a number each."""
        x = point
        for width in self.hidden:
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda num_classes: Mlp(num_classes),
    "cnn": lambda num_classes: Cnn(num_classes),
    "resnet": lambda num_classes: ResNet(num_classes),
    AUTOENCODER: lambda num_classes: Autoencoder(),
}
"""Builders by name: number of classes to network. The autoencoder has no use for the classes."""


def build(name: str, num_classes: int) -> nn.Module:
    """Build the network of a name in `MODELS`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dho2_optax.poc import models
      >>> mlp = models.build("mlp", num_classes=10)
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> mlp.apply(mlp.init(jax.random.key(0), images), images).shape
      (2, 10)
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    return MODELS[name](num_classes)


def num_parameters(params: object) -> int:
    """Count the parameters of a pytree."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))
