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
# # How it works
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dho2-optax/dho2_optax/blob/main/notebooks/how_it_works.ipynb)
#
# Pictures of what DHO2 and MR-DHO2 do: the subspace in which the step is Newton's, the Lanczos process that finds it,
# the segments in which devices hold it, and three ways to keep it fresh.

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
# ## The subspace
#
# A valley: the loss curves 40 times as much across it as along it. Along the floor a learning rate of 0.5 would be
# right. Across, gradient descent is stable below 2/20 = 0.1 only. So the steep direction sets the rate for all.

# %%
angle = np.pi / 6
across, along = np.array([np.sin(angle), -np.cos(angle)]), np.array([np.cos(angle), np.sin(angle)])
hessian = jnp.asarray(20.0 * np.outer(across, across) + 0.5 * np.outer(along, along), jnp.float32)


def valley(params):
    return 0.5 * params @ hessian @ params


# %% [markdown]
# `dho2` with one eigenpair: the gradient is cut in its part along the eigenvector, where the step is a Newton step
# (the coefficient over the eigenvalue, times `alpha`), and the rest, which is all that the base sees. `metric=None` is
# for eigenpairs of the Hessian itself.

# %%
newton = dho2.Newton(subspace=optax.identity())
options = {"rank": 1, "warmup_steps": 1, "newton": newton, "metric": None}
optimizers = {
    "gradient descent, rate 0.095": optax.sgd(0.095),
    "gradient descent, rate 0.5": optax.sgd(0.5),
    "dho2, rate 0.5, alpha 0.4": dho2.dho2(optax.sgd(0.5), alpha=0.4, **options),
    "dho2, rate 0.5, alpha 1": dho2.dho2(optax.sgd(0.5), alpha=1.0, **options),
}

# %%
START = jnp.asarray(-2.4 * along + 0.5 * across, jnp.float32)


def path(tx, steps=12):
    tx = optax.with_extra_args_support(tx)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(valley)(params), state, params, value_fn=valley)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, found = jax.lax.scan(step, (START, tx.init(START)), None, length=steps)
    return jnp.vstack([START, found])


paths = {name: np.asarray(jax.jit(path, static_argnums=0)(tx)) for name, tx in optimizers.items()}

# %% [markdown]
# Twelve updates of each. At the small rate gradient descent swings across and creeps along. At the large one it leaves
# the picture. With the steep direction taken out, the large rate is just right, and the base walks down the floor. A
# smaller `alpha` approaches the floor more slowly, and is what one wants where curvature is known only roughly.

# %%
x, y = np.meshgrid(np.linspace(-2.8, 1.2, 200), np.linspace(-2.1, 1.0, 200))
heights = 0.5 * np.einsum("...i,ij,...j", np.stack([x, y], -1), np.asarray(hessian), np.stack([x, y], -1))
figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True)
for at, (name, found), colour in zip(axes.flat, paths.items(), (BLUE, RED, ORANGE, GREEN), strict=True):
    at.contour(x, y, heights, levels=np.geomspace(0.02, 40, 12), colors="#bbbbbb", linewidths=0.7)
    at.plot(*found.T, "o-", color=colour, markersize=4, linewidth=1.3)
    at.plot(0, 0, "k+", markersize=10)
    at.set(title=name, xlim=(-2.8, 1.2), ylim=(-2.1, 1.0), aspect="equal")
    at.grid(False)
plt.show()

# %% [markdown]
# ## The Lanczos process
#
# A network has too many parameters for its Hessian $H$ to be written down. A Hessian-vector product costs about two
# gradients, though, and a few products are enough for the largest eigenvalues. From a start vector $q_1$ the process
# builds an orthonormal basis: each new vector is $H q_j$, less its parts along those before. The eigenvalues of the
# small matrix $Q H Q^\top$, the Ritz values, go to those of $H$, the outermost first. Here it is in NumPy, on a matrix
# of 300 rows with five large eigenvalues.

# %%
rng = np.random.default_rng(0)
eigenvalues = np.concatenate([[20, 13, 9, 6, -4], rng.uniform(-0.5, 1.5, 295)])
rotation, _ = np.linalg.qr(rng.normal(size=(300, 300)))
matrix = (rotation * eigenvalues) @ rotation.T


def ritz_values(order):
    """The Ritz values after each of `order` products."""
    basis, found = [rng.normal(size=300)], []
    basis[0] /= np.linalg.norm(basis[0])
    for _ in range(order):
        w = matrix @ basis[-1]
        for _ in range(2):  # twice, for the sake of rounding
            w -= np.array(basis).T @ (np.array(basis) @ w)
        found.append(np.linalg.eigvalsh(np.array(basis) @ matrix @ np.array(basis).T))
        basis.append(w / np.linalg.norm(w))
    return found


# %%
figure, at = plt.subplots(figsize=(9, 3.6))
for order, values in enumerate(ritz_values(16), start=1):
    at.plot(np.full(order, order), values, "o", color=BLUE, markersize=4)
at.hlines(eigenvalues[:5], 0.5, 16.5, color=RED, linewidth=0.8, label="the five largest eigenvalues")
at.axhspan(-0.5, 1.5, color="#dddddd", label="the other 295")
at.set(xlabel="products", ylabel="Ritz values", title="The outermost eigenvalues come first", xlim=(0.5, 16.5))
at.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# `dho2.lanczos` does this on pytrees of JAX arrays, under `jit`, and says how far to trust it.

# %%
small = jnp.asarray(matrix, jnp.float32)
found = dho2.lanczos(lambda v: small @ v, jnp.zeros(300), rank=5, order=40)
print("eigenvalues", found.eigenvalues, "\nresiduals  ", found.residuals, "\ncertain    ", found.mask)

# %% [markdown]
# ## The segments
#
# What is large is cut: the `rank` eigenvectors, the Krylov basis while there is one, and the moments of Adam. With
# `Split("data", mesh=mesh)` each device holds one segment of every vector. A sum of `rank` numbers over the devices
# gives the coefficients of the Newton step, and one all-gather the whole update.

# %%
digits = load("digits")
images, labels = digits.train_images[:1424].reshape(1424, -1), digits.train_labels[:1424]


def init(key, sizes=(64, 128, 10)):
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
# A state is made on a mesh of 1, 2, 4, ... devices, and asked what one device holds of it.


# %%
def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def state_on(mesh):
    tx = dho2.dho2(optax.adam(0.01), loss_fn, rank=8, split=dho2.Split("data", mesh=mesh))
    return jax.jit(tx.init)(jax.device_put(init(jax.random.key(0)), NamedSharding(mesh, P())))


counts = [2**i for i in range(jax.device_count().bit_length())]
states = {count: state_on(mesh_of(count)) for count in counts}

# %% [markdown]
# Which device holds what, as the sharding of the arrays says. The eigenvectors are a stack of `rank` matrices, in
# which the leaves of the parameters lie side by side; a device has some rows of each. The parameters themselves are
# whole on every device.

# %%
[stack] = jax.tree.leaves(states[counts[-1]].spectrum.eigenvectors)
owner = np.zeros(stack.shape[1:])
for number, (_, index) in enumerate(stack.sharding.devices_indices_map(stack.shape).items()):
    owner[index[1:]] = number
figure, at = plt.subplots(figsize=(7, 3.6))
shown = at.imshow(owner, aspect="auto", cmap=plt.get_cmap("Paired", counts[-1]), vmin=-0.5, vmax=counts[-1] - 0.5)
at.set(title=f"One of {len(stack)} eigenvectors", xlabel="columns: the leaves, side by side", ylabel="rows")
at.grid(False)
figure.colorbar(shown, ax=at, label="device", ticks=range(counts[-1]))
plt.show()

# %%


def bytes_on_a_device(tree):
    return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


parts = {
    "eigenvectors": [bytes_on_a_device(states[count].spectrum) / 2**20 for count in counts],
    "all of the state": [bytes_on_a_device(states[count]) / 2**20 for count in counts],
}
figure, at = plt.subplots(figsize=(6, 3.4))
for (name, sizes), colour in zip(parts.items(), (BLUE, RED), strict=True):
    at.loglog(counts, sizes, "o-", base=2, color=colour, label=name)
at.set(xlabel="devices", ylabel="MiB on each", title="What a device holds falls with the number of devices")
at.set_xticks(counts, counts)
at.set_yticks(ticks := [2.0**i for i in range(-4, 1)], [f"1/{1 / tick:.0f}" if tick < 1 else "1" for tick in ticks])
at.legend()
plt.show()

# %% [markdown]
# Virtual devices are right about these bytes, and about results. They share one memory and a few cores, so they say
# nothing about parallel speed.
#
# ## Three ways to keep it fresh
#
# `dho2` refreshes within one update, and that update is slow. `mr_dho2` spreads the products: one every few updates
# advances a Lanczos process that never stops, and eigenpairs are used as soon as they have converged. Both train here
# on one device, so that the times are those of the work and not of virtual devices that wait for each other.

# %%
device = jax.devices()[0]
params, batch = jax.device_put((init(jax.random.key(0)), (images, labels)), device)


def plain(tx):
    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, dho2.metrics(state)["matvecs"]

    return step


# %% [markdown]
# The step of `mr_dho2` is the same: without a product of the caller's, the optimizer makes the probe itself.


# %%
def timed(tx, steps=120, warm=20):
    step, state, at = plain(tx), tx.init(params), params
    seconds, products = [], []
    for _ in range(warm + steps):
        begin = time.perf_counter()
        at, state, matvecs = jax.block_until_ready(step(at, state))
        seconds.append(time.perf_counter() - begin)
        products.append(int(matvecs))
    return np.array(seconds[warm:]), np.diff(products)[warm - 1 :]


rank = {"rank": 8, "batch_size": 512}
synchronous = timed(dho2.dho2(optax.adam(0.01), loss_fn, refresh_interval=40, **rank))
streaming = timed(dho2.mr_dho2(optax.adam(0.01), loss_fn, probe_interval=2, **rank))

# %%
figure, axes = plt.subplots(2, 1, figsize=(10, 4.6), sharex=True, sharey=True)
for at, (seconds, products), title in zip(
    axes,
    (synchronous, streaming),
    ("dho2: all products in one update out of 40", "mr_dho2: one product in every second update"),
    strict=True,
):
    at.bar(range(len(seconds)), 1e3 * seconds, color=np.where(products > 0, RED, BLUE), width=0.8)
    at.set(title=title, ylabel="ms", yscale="log")
axes[0].bar(0, 0, color=RED, label="with products")
axes[0].bar(0, 0, color=BLUE, label="without")
axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
axes[1].set(xlabel="update", xlim=(-1, len(streaming[0])))
plt.show()

# %% [markdown]
# The third way is a `CurvatureGroup`: some devices do nothing but curvature, on a copy of the parameters, while the
# others go on. `advance` looks after each update whether eigenpairs are there, and waits for nothing. We note when a
# process is launched and when its result is put in use.


# %%
def overlapped(group_devices, steps=150):
    tx = dho2.dho2(optax.adam(0.01), rank=8, refresh_interval=None)
    step, state, at = plain(tx), tx.init(params), params
    updates, launched, installed = [], [], []
    with dho2.CurvatureGroup(loss_fn, devices=group_devices, rank=8, interval=40) as group:
        for _ in range(2):  # compiles the step
            at, state, _ = jax.block_until_ready(step(at, state))
        group.warm_up(state, at, batch)
        for _ in range(steps):
            before, begin = group.metrics(), time.perf_counter()
            at, state, _ = jax.block_until_ready(step(at, state))
            updates.append((begin, time.perf_counter() - begin))
            state = group.advance(state, at, batch)
            for name, times in (("installed", installed), ("launches", launched)):
                times.extend([time.perf_counter()] * int(group.metrics()[name] - before[name]))
        return updates, launched, installed, group.metrics()


updates, launched, installed, counted = overlapped(jax.devices()[-1:])
print({name: counted[name] for name in ("launches", "installed", "rejected", "staleness")})

# %%
figure, at = plt.subplots(figsize=(10, 2.2))
zero = updates[0][0]
ends = [*installed, *[updates[-1][0]] * (len(launched) - len(installed))]
curvature = [(1e3 * (start - zero), 1e3 * (end - start)) for start, end in zip(launched, ends, strict=True)]
training = [(1e3 * (start - zero), 1e3 * length) for start, length in updates]
at.broken_barh(training, (0.1, 0.8), color=BLUE, edgecolor="white", linewidth=0.4)
at.broken_barh(curvature, (1.1, 0.8), color=RED)
at.set_yticks([0.5, 1.5], ["training", "curvature"])
at.set(xlabel="ms", title="A process begins, updates go on, eigenpairs are put in use")
at.grid(False)
plt.show()

# %% [markdown]
# On a CPU both groups live on the same cores, so updates take longer while a process runs, and two programs of several
# virtual devices each would take turns. On accelerators the groups have nothing in common but the copy of the
# parameters.
