"""The networks that the proof of concept does not have."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dho2_optax.poc.models import Conv


class BatchNormResNet(nn.Module):
    """The narrow residual network of the proof of concept, normalized over the batch instead of over groups.

    With ``train=True`` by the statistics of the batch, which the collection "batch_stats" then holds, not averaged with
    older ones; otherwise by those in the collection.
    """

    num_outputs: int
    channels: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Map images, shape (batch, height, width, channels), to logits."""

        def norm(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.0)(x)

        x = Conv(self.channels[0], (3, 3), use_bias=False)(images)
        for i, features in enumerate(self.channels):
            stride = 2 if i else 1
            y = nn.relu(norm(x))
            if stride != 1 or x.shape[-1] != features:
                x = Conv(features, (1, 1), strides=stride, use_bias=False)(y)
            y = nn.relu(norm(Conv(features, (3, 3), strides=stride, use_bias=False)(y)))
            x = x + Conv(features, (3, 3), use_bias=False)(y)
        x = nn.relu(norm(x)).mean(axis=(1, 2))
        return nn.Dense(self.num_outputs)(x)


class CharLstm(nn.Module):
    """A character model: one LSTM layer."""

    vocabulary: int
    width: int = 128

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Map characters, shape (batch, length), to logits of the next ones."""
        x = nn.Embed(self.vocabulary, self.width // 2)(characters)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(self.vocabulary)(x)


class CharTransformer(nn.Module):
    """A character model: a pre-norm transformer that sees the past only, without dropout."""

    vocabulary: int
    width: int = 64
    num_heads: int = 4
    num_layers: int = 2

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Map characters, shape (batch, length), to logits of the next ones."""
        batch_size, length = characters.shape
        x = nn.Embed(self.vocabulary, self.width)(characters)
        x = x + self.param("positions", nn.initializers.normal(0.02), (length, self.width))
        for _ in range(self.num_layers):
            y = nn.Dense(3 * self.width, use_bias=False)(nn.LayerNorm()(x))
            y = y.reshape(batch_size, length, 3, self.num_heads, self.width // self.num_heads)
            y = jax.nn.dot_product_attention(*jnp.moveaxis(y, 2, 0), is_causal=True)
            x = x + nn.Dense(self.width, use_bias=False)(y.reshape(x.shape))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class FourierFeatureNetwork(nn.Module):
    """A function of the plane with fine detail: two hidden layers with tanh, on waves at random (Tancik et al., 2020).

    The waves are the same for all parameters and seeds.
    """

    waves: int = 32
    frequency: float = 4.0  # standard deviation, in periods of a unit of length
    hidden: tuple[int, ...] = (64, 64)

    @nn.compact
    def __call__(self, point: jax.Array) -> jax.Array:
        """Map a point, shape (2,), or several in rows, to a number each."""
        vectors = np.random.default_rng(0).normal(scale=self.frequency, size=(2, self.waves))
        phases = 2 * jnp.pi * jnp.matmul(point, jnp.asarray(vectors, point.dtype), precision="highest")
        x = jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)
        for width in self.hidden:
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]
