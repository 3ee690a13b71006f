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
# # The Hessian's spectrum during training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dho2-optax/dho2_optax/blob/main/notebooks/hessian_spectrum.ipynb)
#
# How the loss of a network curves, seen while it learns: a few large eigenvalues far from a bulk near zero. That gap
# is why a subspace of few directions suffices. The largest eigenvalues come with training by `dho2`, the whole density
# from Lanczos quadrature, which works for networks whose Hessian nobody could write down.

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

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import plots
from dho2_optax.poc.data import load

plt.rcParams.update(plots.STYLE)
plt.rcParams.update({"axes.axisbelow": True, "figure.dpi": 90, "figure.constrained_layout.use": True})
BLUE, _, ORANGE, RED, GREEN, *_ = plots.COLOURS

# %% [markdown]
# ## Your model here
#
# A small network on the digits, so that the Hessian can be written down for comparison. For a model of yours replace
# this cell: `params` is any pytree, `loss_fn(params, batch)` a mean over samples.

# %%
mesh = Mesh(np.array(jax.devices()), ("data",))
digits = load("digits")
count = len(digits.train_labels) // mesh.size * mesh.size
batch = digits.train_images[:count].reshape(count, -1), digits.train_labels[:count]
batch = jax.device_put(batch, NamedSharding(mesh, P("data")))


def init(key, sizes=(64, 12, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(zip(keys, sizes[:-1], sizes[1:], strict=True))
    return [{"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)} for key, n, m in shapes]


def loss_fn(params, batch):
    x, labels = batch
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %% [markdown]
# ## The largest eigenvalues come for free
#
# `dho2` knows them from its refreshes. `metric=None` asks for those of the Hessian itself; by default they are those
# of the Hessian as Adam's preconditioner scales it, which are what limits Adam. `batch_size=None` makes products on
# the whole batch: eigenvalues of a small part are too large on average.

# %%
STEPS, EVERY = 200, 10
split = dho2.Split("data", mesh=mesh)
options = {"rank": 12, "refresh_interval": EVERY, "metric": None, "batch_size": None, "split": split}
tx = dho2.dho2(optax.adam(0.02), loss_fn, **options)


@jax.jit
def step(params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state, loss


# %% [markdown]
# Some of the parameters on the way are kept for later.

# %%
params = jax.device_put(init(jax.random.key(0)), NamedSharding(mesh, P()))
state = jax.jit(tx.init)(params)
losses, refreshes, largest, kept = [], [], [], {0: params}
for number in range(1, STEPS + 1):
    params, state, loss = step(params, state, batch)
    losses.append(float(loss))
    if number % EVERY == 0:
        refreshes.append(number)
        largest.append(dho2.spectrum(state).eigenvalues)
    if number in (20, 60, 200):
        kept[number] = params
largest = np.array(largest)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
left.semilogy(losses, color=BLUE)
left.set(xlabel="update", title="Loss")
for i, values in enumerate(np.sort(np.abs(largest)).T[::-1]):
    right.semilogy(refreshes, values, ".-", color=RED, alpha=1 - 0.07 * i)
right.set(xlabel="update", title="The 12 largest eigenvalues, by magnitude")
plt.show()

# %% [markdown]
# About as many of them stand out as there are classes, as is known of classifiers. They shrink as the network becomes
# sure of itself.
#
# ## The density
#
# Where are all the others? Write $v_i$ for the eigenvectors. A random vector $q$ of unit length has about an equal
# part of each, so $\sum_i \langle q, v_i\rangle^2\, \delta(\lambda - \lambda_i)$ is, on average, the density. A
# Lanczos process that starts at $q$ is a Gauss quadrature for it: nodes are the Ritz values $\theta_j$, weights the
# squares of the first components of the eigenvectors of the small matrix (Golub and Meurant). After $m$ products it is
# right for all polynomials of degree $2m - 1$.


# %%
@functools.partial(jax.jit, static_argnames="num_probes")
def density(params, batch, num_probes=4):
    product = dho2.hessian(loss_fn)
    return dho2.spectral_density(lambda v: product(params, v, batch), params, order=40, num_probes=num_probes)


# %% [markdown]
# The mean over a few start vectors, each node blurred to a bump, is a picture of the density.

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 5.6))
for panel, (number, there) in zip(axes.flat, kept.items(), strict=True):
    plots.density(density(there, batch), panel)
    panel.set_title(f"after {number} updates")
plt.show()

# %% [markdown]
# Each picture has its own axis. Almost all eigenvalues are in the peak at zero. The negative ones, along which the
# loss bends down, go away with training; what stands out on the right is what a subspace of a few directions takes
# care of.

# %% [markdown]
# ## Is it right?
#
# Here the Hessian has less than a thousand rows, so it can be written down, at one product for each. How many
# eigenvalues are larger than a number, by both ways:

# %%
last = kept[STEPS]


@jax.jit
def dense(params, batch):
    flat, unravel = ravel_pytree(params)
    gradient = lambda x: ravel_pytree(jax.grad(loss_fn)(unravel(x), batch))[0]  # noqa: E731
    return jax.lax.map(lambda v: jax.jvp(gradient, (flat,), (v,))[1], jnp.eye(flat.size), batch_size=64)


exact = np.linalg.eigvalsh(np.asarray(dense(last, batch), np.float64))
found = density(last, batch, num_probes=8)
nodes, weights = (np.ravel(x) for x in found)
print(f"{len(exact)} eigenvalues, the largest {exact[-1]:.4f}; the largest node {nodes.max():.4f}")

# %%
order = np.argsort(-nodes)
larger = len(exact) * np.cumsum(weights[order]) / len(found.nodes)
figure, panel = plt.subplots(figsize=(8, 3.6))
panel.step(exact[::-1], np.arange(1, len(exact) + 1), color=RED, label="all eigenvalues", linewidth=3, alpha=0.6)
panel.step(nodes[order], larger, color=BLUE, label="Lanczos quadrature, 8 x 40 products")
panel.set(xscale="log", yscale="log", xlim=(1e-4, 2 * exact[-1]), ylim=(0.5, 2 * len(exact)))
panel.set(xlabel="number", ylabel="eigenvalues that are larger")
panel.legend(loc="lower left")
plt.show()

# %% [markdown]
# The places of the single large eigenvalues on the right are exact. How many there are is less so: a random vector has
# only about an equal part of each. More start vectors help.
#
# How far the eigenvectors of `dho2` are right is in their residuals, $\|H v - \lambda v\|$, at the time of the
# refresh.

# %%
pairs = dho2.spectrum(state)
for value, residual, active in zip(pairs.eigenvalues, pairs.residuals, pairs.mask, strict=True):
    print(f"eigenvalue {value:9.4f}, residual {residual:.1e}, {'in use' if active else 'left to Adam'}")
