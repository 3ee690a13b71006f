"""Networks written out leaf by leaf, on random data: what is measured of them is time, memory and programs."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Network(NamedTuple):
    """What is trained."""

    init: Callable[[jax.Array], Any]  # random key -> parameters
    loss_fn: Callable[[Any, Any], jax.Array]  # (parameters, batch) -> mean loss
    batch: Callable[[jax.Array], Any]  # random key -> a batch


def mlp(sizes: Sequence[int], batch_size: int) -> Network:
    """A ReLU classifier without biases, a leaf for each layer."""

    def init(key: jax.Array) -> Any:
        make = _Initializer(key, jnp.float32)
        return [make.kernel(*pair) for pair in itertools.pairwise(sizes)]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        for kernel in params[:-1]:
            x = jax.nn.relu(x @ kernel)
        return _cross_entropy(x @ params[-1], labels)

    def batch(key: jax.Array) -> Any:
        return jax.random.normal(key, (batch_size, sizes[0])), jnp.arange(batch_size) % sizes[-1]

    return Network(init, loss_fn, batch)


def transformer(
    num_layers: int,
    width: int,
    num_heads: int,
    vocabulary: int,
    length: int,
    batch_size: int,
    dtype: Any = jnp.float32,
    scanned: bool = False,
) -> Network:
    """GPT-2 without dropout: 12 leaves a layer and 5 besides; input and output have embeddings of their own.

    With `scanned` the layers are stacked: 12 leaves for all of them, with a leading axis, and one loop over it.
    """

    def init(key: jax.Array) -> Any:
        make = _Initializer(key, dtype)
        return {
            "tokens": make.kernel(vocabulary, width),
            "positions": make.kernel(length, width),
            "layers": stacked([layer(make) for _ in range(num_layers)]),
            "norm": make.norm(width),
            "logits": make.kernel(width, vocabulary),
        }

    def layer(make: _Initializer) -> Any:
        return {
            "norm 1": make.norm(width),
            "attention": make.dense(width, 3 * width),
            "projection": make.dense(width, width),
            "norm 2": make.norm(width),
            "up": make.dense(width, 4 * width),
            "down": make.dense(4 * width, width),
        }

    def stacked(layers: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if scanned else layers

    def attend(x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(x.reshape(*x.shape[:2], 3, num_heads, width // num_heads), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * (width // num_heads) ** -0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v).reshape(*x.shape[:2], width)

    def loss_fn(params: Any, characters: Any) -> jax.Array:
        x = params["tokens"][characters] + params["positions"]
        if scanned:
            x, _ = jax.lax.scan(lambda x, layer: (through(layer, x), None), x, params["layers"])
        else:
            for layer in params["layers"]:
                x = through(layer, x)
        logits = _normalize(params["norm"], x, (-1,)) @ params["logits"]
        return _cross_entropy(logits, jnp.roll(characters, -1, axis=1))

    def through(layer: Any, x: jax.Array) -> jax.Array:
        y = _apply(layer["attention"], _normalize(layer["norm 1"], x, (-1,)))
        x = x + _apply(layer["projection"], attend(y))
        y = jax.nn.gelu(_apply(layer["up"], _normalize(layer["norm 2"], x, (-1,))))
        return x + _apply(layer["down"], y)

    return Network(init, loss_fn, lambda key: jax.random.randint(key, (batch_size, length), 0, vocabulary))


def resnet(
    blocks: Sequence[int],
    width: int,
    image_size: int,
    batch_size: int,
    num_classes: int = 1000,
    dtype: Any = jnp.float32,
) -> Network:
    """A residual network with bottlenecks, normalized by the batch, with average pooling throughout.

    With blocks (3, 4, 6, 3) and a width of 64 its leaves are those of ResNet-50. The size of the images must be a
    multiple of four.
    """
    widths = [width * 2**stage for stage in range(len(blocks))]

    def init(key: jax.Array) -> Any:
        make = _Initializer(key, dtype)

        def convolution(size: int, inputs: int, outputs: int) -> Any:
            return {"kernel": make.kernel(size, size, inputs, outputs), "norm": make.norm(outputs)}

        stages, inputs = [], width
        for features, count in zip(widths, blocks, strict=True):
            stage = []
            for i in range(count):
                block = {
                    "a": convolution(1, inputs, features),
                    "b": convolution(3, features, features),
                    "c": convolution(1, features, 4 * features),
                }
                if i == 0:
                    block["shortcut"] = convolution(1, inputs, 4 * features)
                stage.append(block)
                inputs = 4 * features
            stages.append(stage)
        return {"stem": convolution(7, 3, width), "stages": stages, "head": make.dense(inputs, num_classes)}

    def convolve(layer: Any, x: jax.Array, stride: int = 1) -> jax.Array:
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=dimensions)
        return _normalize(layer["norm"], x, (0, 1, 2))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        images, labels = batch
        x = jax.nn.relu(convolve(params["stem"], images, 2))
        count, size, _, channels = x.shape
        x = x.reshape(count, size // 2, 2, size // 2, 2, channels).mean(axis=(2, 4))
        for i, stage in enumerate(params["stages"]):
            for j, block in enumerate(stage):
                stride = 2 if i and not j else 1
                y = jax.nn.relu(convolve(block["a"], x))
                y = jax.nn.relu(convolve(block["b"], y, stride))
                y = convolve(block["c"], y)
                x = jax.nn.relu(y + (convolve(block["shortcut"], x, stride) if j == 0 else x))
        return _cross_entropy(_apply(params["head"], x.mean(axis=(1, 2))), labels)

    def batch(key: jax.Array) -> Any:
        images = jax.random.normal(key, (batch_size, image_size, image_size, 3), dtype)
        return images, jnp.arange(batch_size) % num_classes

    return Network(init, loss_fn, batch)


class _Initializer:
    """Makes leaves, each with a random key of its own."""

    def __init__(self, key: jax.Array, dtype: Any) -> None:
        self._key, self._dtype = key, dtype
        self._count = itertools.count()

    def kernel(self, *shape: int) -> jax.Array:
        """Normal weights with a variance of one over the number of inputs."""
        key = jax.random.fold_in(self._key, next(self._count))
        return (jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))).astype(self._dtype)

    def dense(self, inputs: int, outputs: int) -> dict[str, jax.Array]:
        return {"kernel": self.kernel(inputs, outputs), "bias": jnp.zeros(outputs, self._dtype)}

    def norm(self, width: int) -> dict[str, jax.Array]:
        return {"scale": jnp.ones(width, self._dtype), "bias": jnp.zeros(width, self._dtype)}


def _apply(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _normalize(layer: Any, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axes, keepdims=True)
    wide = wide * jax.lax.rsqrt((wide**2).mean(axes, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * layer["scale"] + layer["bias"]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
