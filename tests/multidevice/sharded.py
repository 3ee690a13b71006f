"""A model whose parameters the user shards, and a program that trains it in one process or in several.

The program trains with both optimizers, parameters and all that follows them split over all devices (FSDP). The first
process writes the parameters that they end with.
"""

import argparse
import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import packing
from tests.multidevice.situations import train

CASES = (("dho2", False), ("mr_dho2", False), ("dho2", True))  # the last under Explicit axes
NUM_STEPS = 30
WIDTH, HIDDEN, BATCH, RANK = 48, 96, 200, 3
SPECS = {
    "fsdp": {"up": P("data", None), "down": P("data", None), "out": P("data", None), "bias": P()},
    "tensor parallel": {"up": P(None, "model"), "down": P("model", None), "out": P(), "bias": P("model")},
    "both": {"up": P("data", "model"), "down": P("model", "data"), "out": P("data", None), "bias": P("model")},
}


def initial_params():
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape) / np.sqrt(shape[0]))  # noqa: E731
    shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    first, second = ({name: normal(*shape) for name, shape in shapes.items()} for _ in range(2))
    bias = np.zeros(HIDDEN, np.float32)
    return {"first": {**first, "bias": bias}, "second": {**second, "bias": bias}, "out": normal(WIDTH, 10)}


def whole_batch():
    rng = np.random.default_rng(1)
    return np.float32(rng.normal(size=(BATCH, WIDTH))), np.float32(rng.normal(size=(BATCH, 10)))


def mean_square(params, batch):
    x, y = batch
    for block in (params["first"], params["second"]):
        x = x + jnp.tanh(x @ block["up"] + block["bias"]) @ block["down"]
    return jnp.mean((x @ params["out"] - y) ** 2)


def gathering_mean_square(params, batch):
    """Under Explicit axes the model says where it gathers its weights."""
    return mean_square(jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params), batch)


def shardings_of(mesh, kind):
    specs, shared = SPECS[kind], {"first", "second"}
    block = {name: NamedSharding(mesh, specs[name]) for name in ("up", "bias", "down")}
    return {**dict.fromkeys(shared, block), "out": NamedSharding(mesh, specs["out"])}


def make(name, loss_fn):
    base = optax.sgd(0.02, momentum=0.9)
    if name == "base":
        return optax.with_extra_args_support(base)
    solver = dho2.Eigensolver(order=6)
    if name == "dho2":
        return dho2.dho2(base, loss_fn, rank=RANK, refresh_interval=4, eigensolver=solver, batch_size=None)
    return dho2.mr_dho2(base, rank=RANK, probe_interval=1, eigensolver=solver)


def step_of(name, tx, loss_fn):
    @jax.jit
    def step(params, state, batch):
        extra = {}
        if name == "mr_dho2":
            _, grads, extra["hvp"] = dho2.value_grad_and_hvp(loss_fn, batch_size=None)(params, state, batch)
        else:
            grads, extra["batch"] = jax.grad(loss_fn)(params, batch), batch
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def _global(tree, shardings):
    """Arrays over all processes, of what each has whole."""
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), tree, shardings)


def _trained(name, explicit):
    """The parameters, whole, how often the eigenvectors were renewed, and in how many parts they lie."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",)) if explicit else Mesh(np.array(jax.devices()), ("data",))
    loss_fn = gathering_mean_square if explicit else mean_square
    params = _global(initial_params(), shardings_of(mesh, "fsdp"))
    batch = _global(whole_batch(), (NamedSharding(mesh, P("data")),) * 2)
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        tx = make(name, loss_fn)
        state = tx.init(params)
        params, state = train(step_of(name, tx, loss_fn), params, state, batch, NUM_STEPS)
        whole = multihost_utils.process_allgather(params, tiled=True)
    large = max(state.spectrum.eigenvectors, key=lambda x: x.size)
    parts = large.size // large.addressable_shards[0].data.size
    return {"params": whole, "refreshes": np.array(state.refreshes), "parts": np.array(parts)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    options = parser.parse_args()
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    packing._SMALL = 512  # so that kernels are large
    found = {f"{name}, {'Explicit' if explicit else 'Auto'}": _trained(name, explicit) for name, explicit in CASES}
    if jax.process_index() == 0:
        leaves = jax.tree_util.tree_leaves_with_path(found)
        np.savez(options.out, **{jax.tree_util.keystr(key, simple=True, separator="/"): x for key, x in leaves})


if __name__ == "__main__":
    main()
