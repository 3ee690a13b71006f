"""Shapes of the parameters of published networks, leaf by leaf: nothing is allocated."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import networks

Shapes = Any  # a pytree of jax.ShapeDtypeStruct


def resnet(blocks: tuple[int, ...]) -> Shapes:
    """A residual network with bottlenecks for 1000 classes (He et al., CVPR 2016, table 1)."""
    return _initialized(networks.resnet(blocks, width=64, image_size=224, batch_size=1))


def vgg16() -> Shapes:
    """Thirteen convolutions and three dense layers (Simonyan and Zisserman, ICLR 2015, configuration D)."""
    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    dense = (7 * 7 * 512, 4096, 4096, 1000)
    convolutions = [_layer(3, 3, *pair) for pair in itertools.pairwise(channels)]
    return {"convolutions": convolutions, "dense": [_layer(*pair) for pair in itertools.pairwise(dense)]}


def gpt2() -> Shapes:
    """The small GPT-2, with one embedding for input and output (Radford et al., 2019, table 2); layers are stacked."""
    shapes = _initialized(networks.transformer(12, 768, 12, 50257, length=1024, batch_size=1, scanned=True))
    del shapes["logits"]
    return shapes


def pythia_1b() -> Shapes:
    """The Pythia of 1 billion parameters (Biderman et al., ICML 2023, table 1); layers are stacked."""
    shapes = _initialized(networks.transformer(16, 2048, 8, 50304, length=2048, batch_size=1, scanned=True))
    del shapes["positions"]  # they are rotary there
    return shapes


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet50": lambda: resnet((3, 4, 6, 3)),
    "resnet152": lambda: resnet((3, 8, 36, 3)),
    "vgg16": vgg16,
    "gpt2": gpt2,
    "pythia_1b": pythia_1b,
}


def num_params(shapes: Shapes) -> int:
    """How many numbers they hold.

    >>> {name: num_params(make()) for name, make in MODELS.items()}["vgg16"]
    138357544
    """
    return sum(x.size for x in jax.tree.leaves(shapes))


def _initialized(network: networks.Network) -> Shapes:
    return jax.eval_shape(network.init, jax.random.key(0))


def _layer(*shape: int) -> Shapes:
    sizes = {"kernel": shape, "bias": shape[-1:]}
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
