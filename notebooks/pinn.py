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
# # A physics-informed network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dho2-optax/dho2_optax/blob/main/notebooks/pinn.ipynb)
#
# A network learns to solve a differential equation: its loss is how far it is from solving it. All points are in every
# batch, so the gradient has no noise, and curvature alone limits the step. Here a hybrid gains most. SOAP is the base.

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
from dho2_optax.poc import equations

plt.rcParams.update(plots.STYLE)
plt.rcParams.update({"axes.axisbelow": True, "figure.dpi": 90, "figure.constrained_layout.use": True})
BLUE, _, ORANGE, RED, GREEN, *_ = plots.COLOURS

# %% [markdown]
# ## The equation
#
# A sine wave travels to the right: $u_t + 10\, u_x = 0$ for $0 \le x \le 2\pi$ and $0 \le t \le 1$, periodic in $x$,
# with $u(x, 0) = \sin x$. The solution is $\sin(x - 10 t)$. With the package comes its loss: the mean square of $u_t +
# 10\, u_x$ at some points, plus that of what is amiss at the boundary.

# %%
equation = equations.convection(speed=10.0)
mesh = Mesh(np.array(jax.devices()), ("data",))
points = jax.device_put(equation.points(1024, seed=0), NamedSharding(mesh, P("data")))

# %% [markdown]
# ## The network
#
# From a point $(x, t)$ to a number, by three layers of 50 units: 5301 parameters.


# %%
def init(key, sizes=(2, 50, 50, 50, 1)):
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(zip(keys, sizes[:-1], sizes[1:], strict=True))
    return [{"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)} for key, n, m in shapes]


def network(params, point):
    x = point
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[0]


def loss_fn(params, points):
    return equation.loss(lambda point: network(params, point), points)


# %% [markdown]
# ## The optimizers
#
# SOAP needs whole matrices, so the base does not run on segments; the eigenvectors are split all the same. Rank 30
# with 32 products in a refresh: on a problem without noise rank is what counts, and two products more than pairs will
# do. Both rates are the best of a grid, each for its own optimizer.

# %%
STEPS = 1000


def schedule(rate):
    return optax.warmup_cosine_decay_schedule(rate / 50, rate, 50, STEPS)


split = dho2.Split("data", mesh=mesh, base_on_segments=False)
options = {"rank": 30, "eigensolver": dho2.Eigensolver(order=32), "refresh_interval": 100, "split": split}
optimizers = {
    "SOAP": dho2.soap(schedule(0.06)),
    "dho2 on SOAP": dho2.dho2(dho2.soap(schedule(0.048)), loss_fn, **options),
}

# %% [markdown]
# ## Training
#
# Under `jit`, with points that are sharded over the devices, `dho2` needs the mesh and nothing else. Programs are
# compiled before the clock starts, and the loss is read after every step.


# %%
def train(tx):
    tx = optax.with_extra_args_support(tx)
    params = jax.device_put(init(jax.random.key(0)), NamedSharding(mesh, P()))
    state = jax.jit(tx.init)(params)

    def step(params, state, points):
        loss, grads = jax.value_and_grad(loss_fn)(params, points)
        updates, state = tx.update(grads, state, params, batch=points)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, points).compile()
    losses, seconds, begin = [], [], time.perf_counter()
    for _ in range(STEPS):
        params, state, loss = step(params, state, points)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
    return params, losses, seconds


runs = {name: train(tx) for name, tx in optimizers.items()}

# %% [markdown]
# ## The loss
#
# On virtual devices only the left picture means something for another machine.

# %%
figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for (name, (_, losses, seconds)), colour in zip(runs.items(), (BLUE, RED), strict=True):
    by_step.semilogy(losses, color=colour, label=name, linewidth=1)
    by_time.semilogy(seconds, losses, color=colour, label=name, linewidth=1)
by_step.set(xlabel="updates", ylabel="loss")
by_time.set(xlabel="seconds, without compilation")
by_step.legend()
plt.show()

# %% [markdown]
# ## The solution
#
# As the last network has it, and its error. The boundary and 1024 points are all it has seen.

# %%
x, t = np.meshgrid(np.linspace(0, 2 * np.pi, 151), np.linspace(0, 1, 151), indexing="ij")
grid = np.stack([x, t], axis=-1).reshape(-1, 2).astype(np.float32)
solution = jax.vmap(equation.solution)(grid)


def predict(params):
    return jax.jit(jax.vmap(network, in_axes=(None, 0)))(params, grid)


predictions = {name: predict(run[0]) for name, run in runs.items()}
for name, found in predictions.items():
    error = jnp.linalg.norm(found - solution) / jnp.linalg.norm(solution)
    print(f"{name:13} final loss {runs[name][1][-1]:.1e}, relative error {error:.1e}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
pictures = {"the network (dho2 on SOAP)": predictions["dho2 on SOAP"]}
pictures |= {f"error of {name}": found - solution for name, found in predictions.items()}
worst = max(float(jnp.abs(found - solution).max()) for found in predictions.values())
for at, (title, values), largest in zip(axes, pictures.items(), (1.0, worst, worst), strict=True):
    shown = at.pcolormesh(t, x, values.reshape(x.shape), cmap="RdBu_r", vmin=-largest, vmax=largest, rasterized=True)
    at.set(title=title, xlabel="t")
    at.grid(False)
    figure.colorbar(shown, ax=at)
axes[0].set_ylabel("x")
plt.show()

# %% [markdown]
# One seed proves nothing. docs/equations.md and docs/benchmarks.md have nine equations with three seeds each,
# where this wins and where it does not.
