"""A network of Equinox (`pip install equinox`) on handwritten digits. See docs/flax.md."""

import argparse

import equinox as eqx
import jax
import numpy as np
import optax

import dho2_optax as dho2
from dho2_optax.poc.data import load

BATCH = 256


def loss_fn(model, batch):
    images, labels = batch
    logits = jax.vmap(model)(images.reshape(len(images), -1))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["dho2", "mr_dho2"], default="dho2")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()

    digits = load("digits")
    model = eqx.nn.MLP(64, 10, 64, 1, activation=jax.nn.tanh, key=jax.random.key(0))
    # Parameters are the arrays of floats; functions, and integers, are what is left.
    params, static = eqx.partition(model, eqx.is_inexact_array)
    how_often = {"dho2": {"refresh_interval": 25}, "mr_dho2": {"probe_interval": 2}}[options.optimizer]
    tx = getattr(dho2, options.optimizer)(
        optax.adam(1e-2), lambda params, batch: loss_fn(eqx.combine(params, static), batch), rank=8, **how_often
    )
    state = tx.init(params)

    @eqx.filter_jit
    def step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array), batch=batch)
        return eqx.apply_updates(model, updates), state, loss

    rng = np.random.default_rng(0)
    for count in range(1, options.steps + 1):
        rows = rng.choice(len(digits.train_labels), BATCH, replace=False)
        model, state, loss = step(model, state, (digits.train_images[rows], digits.train_labels[rows]))
        if count % 50 == 0:
            print(f"step {count}, loss {loss:.4f}, eigenpairs in use {dho2.metrics(state)['active_pairs']}")
    guesses = jax.vmap(model)(digits.test_images.reshape(-1, 64)).argmax(axis=1)
    print(f"accuracy {(guesses == digits.test_labels).mean():.3f}")


if __name__ == "__main__":
    main()
