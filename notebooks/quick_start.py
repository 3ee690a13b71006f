# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quick start
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dho2-optax/dho2_optax/blob/main/notebooks/quick_start.ipynb)
#
# A network learns handwritten digits, once with Adam and once with `dho2` on Adam, on all devices that are there: a
# TPU, a GPU, several of them, or a CPU. Curvature is found by a Lanczos process over Hessian-vector products. Along
# the steepest directions the step is a damped Newton step, everywhere else it is Adam's.

# %% [markdown]
# If the package is not there, it is installed, and with it the plugin for the accelerator that JAX has here.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dho2_optax") is None:
    plugins = {"libtpu": "tpu", "jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13"}
    wanted = [f"jax[{kind}]" for name, kind in plugins.items() if importlib.util.find_spec(name)][:1]
    wanted.append("dho2_optax[poc] @ git+https://github.com/dho2-optax/dho2_optax")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)

# %% [markdown]
# Without an accelerator the CPU is split into eight virtual devices. That must be said before JAX is used, and changes
# nothing where there is a GPU or a TPU. The first line keeps programs on virtual devices from waiting for each other
# for ever.

# %%
import os

os.environ.setdefault("PJRT_NPROC", "32")

import jax

jax.config.update("jax_num_cpu_devices", 8)
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")

# %%
import functools
import time

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import plots
from dho2_optax.poc.data import load

plt.rcParams.update(plots.STYLE)
plt.rcParams.update({"axes.axisbelow": True, "figure.dpi": 90, "figure.constrained_layout.use": True})
BLUE, _, ORANGE, RED, GREEN, *_ = plots.COLOURS

# %% [markdown]
# ## Data
#
# 1797 images of 8 x 8 pixels, which come with the package. All training images are one batch, since curvature helps
# where it, and not the noise of small batches, limits the step. Each device gets the same number of them.

# %%
mesh = Mesh(np.array(jax.devices()), ("data",))
digits = load("digits")
count = len(digits.train_labels) // mesh.size * mesh.size
images = digits.train_images[:count].reshape(count, -1)
batch = jax.device_put((images, digits.train_labels[:count]), NamedSharding(mesh, P("data")))
print(f"{count} images, {count // mesh.size} on each of {mesh.size} devices")

# %% [markdown]
# ## Network
#
# Plain JAX: parameters are a pytree, and the loss is a mean over samples. Any other network does as well.


# %% tags=["program"]
def init(key, sizes=(64, 128, 64, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(zip(keys, sizes[:-1], sizes[1:], strict=True))
    return [{"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)} for key, n, m in shapes]


def network(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, batch):
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(network(params, images), labels).mean()


# %% [markdown]
# ## Optimizers
#
# `dho2` takes any optax optimizer as its base, with the learning rate that is best for the base alone: 0.05 is the
# best of 0.01, 0.02, 0.03, 0.05 and 0.08 for Adam. A refresh every 25 updates finds 8 eigenpairs. `Split("data")` cuts
# eigenvectors, Krylov basis and Adam's moments in segments over the devices.

# %% tags=["program"]
STEPS = 200
adam = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
optimizers = {
    "Adam": optax.with_extra_args_support(adam),
    "dho2 on Adam": dho2.dho2(adam, loss_fn, rank=8, refresh_interval=25, split=dho2.Split("data")),
}


# %% [markdown]
# ## One training step
#
# `shard_map` runs it on every device with its own part of the batch. The loss is averaged over the devices, so JAX
# gives the gradient of the mean. `update` gets the batch too, for the products of a refresh. `state_specs` knows which
# parts of the state lie on which device.


# %% tags=["program"]
def mean_loss(params, batch):
    return jax.lax.pmean(loss_fn(params, batch), "data")


def training(tx, mesh, params):
    on_mesh = functools.partial(jax.shard_map, mesh=mesh)
    specs = dho2.state_specs(tx.init, params, "data")

    @functools.partial(on_mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs, P()))
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(on_mesh(tx.init, in_specs=P(), out_specs=specs)), jax.jit(step)


# %% [markdown]
# ## Train
#
# Programs are compiled first, so that seconds are those of training alone. `float(loss)` waits for the step.


# %%
def train(tx):
    params = jax.device_put(init(jax.random.key(0)), NamedSharding(mesh, P()))
    start, step = training(tx, mesh, params)
    state = start(params)
    step = step.lower(params, state, batch).compile()
    losses, seconds, begin = [], [], time.perf_counter()
    for _ in range(STEPS):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
    return params, state, losses, seconds


runs = {name: train(tx) for name, tx in optimizers.items()}

# %% [markdown]
# ## What came of it
#
# The jumps of the second curve in the right picture are the refreshes. If the devices are virtual, only the first
# picture says something about a real machine: eight virtual devices share the cores of one CPU, so seconds do not fall
# with their number, and a small step is mostly their waiting for each other.

# %%
figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for (name, (_, _, losses, seconds)), colour in zip(runs.items(), (BLUE, RED), strict=True):
    by_step.semilogy(losses, color=colour, label=name)
    by_time.semilogy(seconds, losses, color=colour, label=name)
by_step.set(xlabel="updates", ylabel="training loss")
by_time.set(xlabel="seconds, without compilation")
by_step.legend()
plt.show()

# %%
test_images = digits.test_images.reshape(len(digits.test_labels), -1)
for name, (params, _, losses, _) in runs.items():
    accuracy = np.mean(network(params, test_images).argmax(axis=1) == digits.test_labels)
    print(f"{name:13} final loss {losses[-1]:.1e}, test accuracy {accuracy:.3f}")

# %% [markdown]
# What the optimizer knows of the curvature is in its state: eigenvalues (of the Hessian as Adam's preconditioner
# scales it), how many pairs are in use, and by how much further the base steps now.

# %%
metrics = {name: float(value) for name, value in dho2.metrics(runs["dho2 on Adam"][1]).items()}
print("eigenvalues", " ".join(f"{metrics[f'eigenvalue_{i}']:.2g}" for i in range(8)))
print({name: metrics[name] for name in ("refreshes", "matvecs", "active_pairs", "base_scale")})

# %% [markdown]
# Each device holds its part of the eigenvectors, and no more.

# %%
for buffer in jax.tree.leaves(dho2.spectrum(runs["dho2 on Adam"][1]).eigenvectors):
    print(f"eigenvectors {buffer.shape}, on each device {buffer.sharding.shard_shape(buffer.shape)}")

# %% [markdown]
# Next: `how_it_works` explains the method with pictures, and `your_model` chooses its options for a network of yours.
