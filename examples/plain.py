"""A network of plain JAX on handwritten digits. See docs/flax.md for what differs from a loop with Adam."""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dho2_optax as dho2
from dho2_optax.poc.data import load

BATCH = 256


def init(key, sizes=(64, 64, 10)):
    def layer(key, n, m):
        return {"w": jax.random.normal(key, (n, m)) / np.sqrt(n), "b": jnp.zeros(m)}

    keys = jax.random.split(key, len(sizes) - 1)
    return [layer(key, *shape) for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)]


def model(params, images):
    x = images.reshape(len(images), -1)
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(params, images), labels).mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["dho2", "mr_dho2"], default="dho2")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()

    how_often = {"dho2": {"refresh_interval": 25}, "mr_dho2": {"probe_interval": 2}}[options.optimizer]
    tx = getattr(dho2, options.optimizer)(optax.adam(1e-2), loss_fn, rank=8, **how_often)
    digits = load("digits")
    params = init(jax.random.key(0))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(0)
    for count in range(1, options.steps + 1):
        rows = rng.choice(len(digits.train_labels), BATCH, replace=False)
        params, state, loss = step(params, state, (digits.train_images[rows], digits.train_labels[rows]))
        if count % 50 == 0:
            print(f"step {count}, loss {loss:.4f}, eigenpairs in use {dho2.metrics(state)['active_pairs']}")
    guesses = model(params, digits.test_images).argmax(axis=1)
    print(f"accuracy {(guesses == digits.test_labels).mean():.3f}")


if __name__ == "__main__":
    main()
