"""A network of Flax's linen with BatchNorm and dropout on handwritten digits. See docs/flax.md."""

import argparse
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import dho2_optax as dho2
from dho2_optax.flax import TrainState
from dho2_optax.poc.data import load

BATCH = 256


class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(64)(images.reshape(len(images), -1))
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x)


class State(TrainState):
    batch_stats: Any


@jax.jit
def step(state, batch, key):
    images, labels = batch

    def loss_fn(params):  # with this update's running statistics and masks
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, value_fn=loss_fn, batch_stats=batch_stats), loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["dho2", "mr_dho2"], default="dho2")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()

    how_often = {"dho2": {"refresh_interval": 25}, "mr_dho2": {"probe_interval": 2}}[options.optimizer]
    # has_aux: `loss_fn` returns the running statistics too.
    tx = getattr(dho2, options.optimizer)(optax.adam(1e-2), rank=8, has_aux=True, **how_often)
    digits = load("digits")
    net = Net()
    variables = net.init(jax.random.key(0), digits.train_images[:1], train=False)
    state = State.create(apply_fn=net.apply, tx=tx, **variables)

    rng = np.random.default_rng(0)
    for count in range(1, options.steps + 1):
        rows = rng.choice(len(digits.train_labels), BATCH, replace=False)
        key = jax.random.fold_in(jax.random.key(1), count)
        state, loss = step(state, (digits.train_images[rows], digits.train_labels[rows]), key)
        if count % 50 == 0:
            print(f"step {count}, loss {loss:.4f}, eigenpairs in use {dho2.metrics(state.opt_state)['active_pairs']}")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    guesses = net.apply(variables, digits.test_images, train=False).argmax(axis=1)
    print(f"accuracy {(guesses == digits.test_labels).mean():.3f}")


if __name__ == "__main__":
    main()
