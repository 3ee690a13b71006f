"""Trains on one process or on several: the same parameters, and checkpoints that fit both. See docs/several_hosts.md.

Run again it goes on from the newest checkpoint, which must lie in a folder that every process sees.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dho2_optax as dho2

BATCH = 256


def init(key):
    first, second = jax.random.split(key)
    return {"w1": 0.3 * jax.random.normal(first, (10, 32)), "w2": 0.2 * jax.random.normal(second, (32,))}


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch[0] @ params["w1"]) @ params["w2"] - batch[1]) ** 2)


def local_rows(step):
    """The rows of a batch that this process reads: its share of the whole, in the order of the processes."""
    size = BATCH // jax.process_count()
    rows = np.random.default_rng(step).normal(size=(BATCH, 10)) * np.logspace(0, -1, 10)
    x = rows[jax.process_index() * size :][:size].astype(np.float32)
    return x, np.sin(x.sum(axis=1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--optimizer", choices=["dho2", "mr_dho2"], default="dho2")
    parser.add_argument("--detect", action="store_true", help="JAX finds the three options below by itself")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    options = parser.parse_args()
    if options.detect or options.coordinator:  # before anything touches a device
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)

    mesh = Mesh(np.array(jax.devices()), ("data",))  # of all processes
    whole, by_sample = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    how_often = {"dho2": {"refresh_interval": 20}, "mr_dho2": {"probe_interval": 1}}[options.optimizer]
    curvature = {"rank": 4, "split": dho2.Split("data", mesh=mesh), **how_often}
    tx = getattr(dho2, options.optimizer)(optax.adam(1e-2), loss_fn, **curvature)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(init, out_shardings=whole)(jax.random.key(0))
    now = {"params": params, "state": tx.init(params)}
    with ocp.CheckpointManager(options.checkpoints.absolute()) as manager:
        done = manager.latest_step() or 0
        if done:  # shapes and shardings are those of `now`, on however many devices it was saved
            now = manager.restore(done, args=ocp.args.StandardRestore(now))
        for count in range(done + 1, options.steps + 1):
            batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(by_sample, x), local_rows(count))
            now["params"], now["state"], loss = step(now["params"], now["state"], batch)
            if count % 20 == 0:  # all processes save together, each what it has
                manager.save(count, args=ocp.args.StandardSave(now))
                if jax.process_index() == 0:
                    print(f"step {count}, loss {float(loss):.6f}", flush=True)


if __name__ == "__main__":
    main()
