"""A network of Flax's nnx with BatchNorm and dropout on handwritten digits. See docs/flax.md."""

import argparse

import numpy as np
import optax
from flax import nnx

import dho2_optax as dho2
from dho2_optax.poc.data import load

BATCH = 256


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.tanh(self.norm(self.first(images.reshape(len(images), -1))))
        return self.last(self.dropout(x))


def loss_fn(model, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    # A copy: what products change of running statistics and counters of masks is thrown away.
    optimizer.update(model, grads, value_fn=lambda p: loss_fn(nnx.merge(graphdef, p, rest, copy=True), batch))
    return loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["dho2", "mr_dho2"], default="dho2")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()

    how_often = {"dho2": {"refresh_interval": 25}, "mr_dho2": {"probe_interval": 2}}[options.optimizer]
    tx = getattr(dho2, options.optimizer)(optax.adam(1e-2), rank=8, **how_often)
    digits = load("digits")
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    rng = np.random.default_rng(0)
    for count in range(1, options.steps + 1):
        rows = rng.choice(len(digits.train_labels), BATCH, replace=False)
        loss = step(model, optimizer, (digits.train_images[rows], digits.train_labels[rows]))
        if count % 50 == 0:
            pairs = dho2.metrics(optimizer.opt_state)["active_pairs"]
            print(f"step {count}, loss {loss:.4f}, eigenpairs in use {pairs}")
    model.eval()
    guesses = model(digits.test_images).argmax(axis=1)
    print(f"accuracy {(guesses == digits.test_labels).mean():.3f}")


if __name__ == "__main__":
    main()
