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
# # Your model: choose by measuring
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dho2-optax/dho2_optax/blob/main/notebooks/your_model.ipynb)
#
# Does it pay for your network, and with which rank, interval and number of devices? Measuring on the machine where you
# train answers that. This notebook does it for a small autoencoder; replace one cell to do it for a model of yours.

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
# ## The cell to replace
#
# `init(key)` gives parameters, `loss_fn(params, batch)` a mean over samples, `batch` is one of the size that you train
# with, `RATE` the learning rate that is best for your optimizer now. Measure with a large batch: where the noise of
# small batches limits the step, curvature gains little.

# %%
digits = load("digits")
batch = digits.train_images[:1424].reshape(1424, -1)
RATE, STEPS = 0.01, 150


def init(key, sizes=(64, 64, 16, 64)):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(zip(keys, sizes[:-1], sizes[1:], strict=True))
    return [{"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)} for key, n, m in shapes]


def loss_fn(params, images):
    x = images
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=1).mean()


def base():
    return optax.adam(optax.cosine_decay_schedule(RATE, STEPS))


# %% [markdown]
# ## A training step on some devices
#
# Under `jit`, with the batch sharded and the parameters on every device. The optimizer is made from the mesh, since
# `dho2` wants to know it. The step is compiled, not run: what it will need in memory is known by then.


# %%
def adam(mesh):
    return optax.with_extra_args_support(base())


def hybrid(mesh, **options):
    return dho2.dho2(base(), loss_fn, split=dho2.Split("data", mesh=mesh), **options)


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",))


# %%
def compiled(make, mesh):
    tx = make(mesh)
    params = jax.device_put(init(jax.random.key(0)), NamedSharding(mesh, P()))
    here = jax.device_put(batch, NamedSharding(mesh, P("data")))
    state = jax.jit(tx.init)(params)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step).lower(params, state, here).compile(), (params, state, here)


# %% [markdown]
# ## Which rank? Look at the spectrum
#
# Train a little with Adam, then ask for many eigenpairs of what limits it, the Hessian scaled by its preconditioner:
# one refresh of `dho2` with a large rank does that. Where the eigenvalues fall off, more rank gains little. Multiples
# of 8 fill the tiles of a TPU.

# %%
WARM, MANY = 30, 32
mesh = mesh_of(jax.device_count())
many = functools.partial(hybrid, rank=MANY, warmup_steps=WARM, eigensolver=dho2.Eigensolver(order=48))
step, (params, state, here) = compiled(many, mesh)
for _ in range(WARM):
    params, state, loss = jax.block_until_ready(step(params, state, here))
eigenvalues = np.sort(np.abs(dho2.spectrum(state).eigenvalues))[::-1]

# %%
RANKS = (4, 16)
figure, at = plt.subplots(figsize=(7, 3.2))
at.semilogy(range(1, MANY + 1), eigenvalues, "o-", color=BLUE, markersize=4)
for rank in RANKS:
    at.axvline(rank, color="#999999", linewidth=1, linestyle="--")
    ratio = eigenvalues[0] / eigenvalues[rank - 1]
    at.annotate(f"rank {rank}: {ratio:.1f} to 1", (rank + 0.4, eigenvalues[0] * 0.85))
at.set(xlabel="eigenvalue", ylabel="magnitude", title="What a rank takes out of the base's way")
plt.show()

# %% [markdown]
# ## Does it pay? Train
#
# Same start, same batch, same rate of the base. Each step is timed by itself.


# %%
def train(make):
    program, (params, state, here) = compiled(make, mesh)
    losses, seconds = [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        params, state, loss = program(params, state, here)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
    return program, np.array(losses), np.array(seconds)


INTERVAL = 30
runs = {"Adam": train(adam)}
for rank in RANKS:
    runs[f"rank {rank}"] = train(functools.partial(hybrid, rank=rank, refresh_interval=INTERVAL))

# %% [markdown]
# The dashed line is where Adam ends. Count updates and seconds to it.

# %%
COLOURS = dict(zip(runs, (BLUE, ORANGE, RED), strict=True))
target = runs["Adam"][1][-1]
figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for name, (_, losses, seconds) in runs.items():
    by_step.plot(losses, color=COLOURS[name], label=name)
    by_time.plot(np.cumsum(seconds), losses, color=COLOURS[name], label=name)
for at, label in ((by_step, "updates"), (by_time, "seconds, without compilation")):
    at.axhline(target, color="#999999", linewidth=1, linestyle="--")
    at.set(xlabel=label, ylim=(0.97 * min(losses[-1] for _, losses, _ in runs.values()), 1.3 * target))
by_step.set(ylabel="training loss")
by_step.legend()
plt.show()

# %%
for name, (_, losses, seconds) in runs.items():
    reached = np.flatnonzero(losses <= target)
    when = f"after {reached[0] + 1} updates, {seconds[: reached[0] + 1].sum():.2f} s" if len(reached) else "not"
    print(f"{name:8} final loss {losses[-1]:.3f}, at Adam's {when}")

# %% [markdown]
# ## Which interval? Share out the refresh
#
# A refresh makes up to `2 * rank` Hessian products, in one update; update $t$, from zero, has one before it where $t +
# 1$ is a multiple of the interval. Its cost, shared out over the updates between two, is what the steps saved must pay
# for.


# %%
def cost(seconds):
    """Medians: an update without a refresh, and what a refresh takes besides."""
    refreshing = np.arange(1, STEPS + 1) % INTERVAL == 0
    plain = np.median(seconds[~refreshing])
    return plain, np.median(seconds[refreshing]) - plain


costs = {name: cost(seconds) for name, (_, _, seconds) in runs.items() if name != "Adam"}
adams = np.median(runs["Adam"][2])
print(f"Adam     update {1e3 * adams:6.1f} ms")
for name, (update, refresh) in costs.items():
    print(f"{name:8} update {1e3 * update:6.1f} ms, a refresh {1e3 * refresh:6.1f} ms more")

# %% [markdown]
# From these, the mean time of an update for every interval. A longer one costs less, but the eigenpairs grow old.

# %%
intervals = np.array([10, 20, 50, 100, 200, 500])
figure, at = plt.subplots(figsize=(7, 3.2))
for name, (update, refresh) in costs.items():
    at.plot(intervals, (update + refresh / intervals) / adams, "o-", color=COLOURS[name], label=name)
at.axhline(1, color=BLUE, linewidth=1, label="Adam")
at.set(xscale="log", xlabel="refresh_interval", ylabel="update, in Adam's", title="What curvature costs")
at.set_xticks(intervals, intervals)
at.minorticks_off()
at.set_ylim(bottom=0)
at.legend()
plt.show()

# %% [markdown]
# On virtual devices these times are not those of your machine: eight of them share the cores of one CPU, and most of a
# small step is waiting. On a GPU or TPU they are real. Measure with nothing else running.
#
# ## How many devices? Read the memory
#
# The compiler knows what a step needs on each device, without running it, on virtual devices as well as on real ones.


# %%
def mebibytes(program):
    needed = program.memory_analysis()
    arrays = needed.argument_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
    return (arrays + needed.temp_size_in_bytes) / 2**20


makers = {"Adam": adam, "rank 16": functools.partial(hybrid, rank=16, refresh_interval=INTERVAL)}
counts = sorted({1, 2, jax.device_count()} & set(range(1, jax.device_count() + 1)))
memory = {
    name: [mebibytes(compiled(make, mesh_of(count))[0]) for count in counts[:-1]] + [mebibytes(runs[name][0])]
    for name, make in makers.items()
}

# %%
figure, at = plt.subplots(figsize=(6, 3.2))
for name, sizes in memory.items():
    at.plot(counts, sizes, "o-", color=COLOURS[name], label=name)
at.set(xlabel="devices", ylabel="MiB on each", title="A step's memory", xticks=counts, ylim=(0, None))
at.legend()
plt.show()

# %% [markdown]
# Activations fall with the devices for any optimizer. What the hybrid adds falls too, which it would not if every
# device held all eigenvectors.
#
# ## Decide
#
# - Fewer updates, but more seconds: raise the interval, or lower the rank. A larger model or batch helps too, since
#   the update's own cost does not grow with the batch.
# - As many updates as Adam: something else limits the step, noise for instance. Try a larger rank if the spectrum
#   falls off slowly, else stay with your base.
# - Slow updates disturb: `dho2.mr_dho2` spreads the refresh, a `dho2.CurvatureGroup` makes it on devices of its own.
# - Before you believe it, tune the rate of every optimizer by itself, and take three seeds.
#
# The command `dho2-optax poc --task module:function` does all that for a function that returns a
# `dho2_optax.poc.tasks.Task`, with a report at the end.
