"""The ways to run one optimizer on several devices, behind one signature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from tests.multidevice.problems import Problem

OPTIONS = {"rank": 4, "refresh_interval": 8, "order": 12, "alpha": 0.2}


def train(step: Any, params: Any, state: Any, batch: Any, num_steps: int) -> tuple[Any, Any]:
    for _ in range(num_steps):
        params, state = step(params, state, batch)
    return params, state


def jit_step(problem: Problem, tx: Any) -> Any:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(problem.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def one_device(problem: Problem, num_steps: int, **options: Any) -> tuple[Any, Any]:
    tx = dho2.dho2(problem.base, problem.loss_fn, **{**OPTIONS, **options})
    return train(jit_step(problem, tx), problem.params, tx.init(problem.params), problem.batch, num_steps)


def data_mesh(num_devices: int, *, explicit: bool = False) -> Mesh:
    devices = jax.devices()[:num_devices]
    if explicit:
        return jax.make_mesh((num_devices,), ("data",), devices=devices)
    return Mesh(np.array(devices), ("data",))


def on_mesh(problem: Problem, num_steps: int, mesh: Mesh, **options: Any) -> tuple[Any, Any]:
    """`jit` with global arrays and `mesh=`."""
    tx = dho2.dho2(problem.base, problem.loss_fn, mesh=mesh, axis_name="data", **{**OPTIONS, **options})
    params = jax.device_put(problem.params, NamedSharding(mesh, P()))
    batch = jax.device_put(problem.batch, NamedSharding(mesh, P("data")))
    return train(jit_step(problem, tx), params, tx.init(params), batch, num_steps)


def _local_step(problem: Problem, tx: Any, average_gradients: bool) -> Any:
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        varying = jax.tree.map(lambda x: _vary(x), params)
        grads = jax.grad(problem.loss_fn)(varying, batch)
        if not average_gradients:
            grads = jax.lax.pmean(grads, "data")
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def _vary(x: jax.Array) -> jax.Array:
    tracked = "data" in jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.pcast(x, "data", to="varying") if tracked else x


def in_shard_map(
    problem: Problem, num_steps: int, num_devices: int, *, check_vma: bool, **options: Any
) -> tuple[Any, Any]:
    """The user's own `shard_map`, gradients averaged before or, with `average_gradients`, by the optimizer."""
    mesh = data_mesh(num_devices)
    tx = dho2.dho2(problem.base, problem.loss_fn, axis_name="data", **{**OPTIONS, **options})
    specs = dho2.state_specs(tx.init, problem.params, "data")
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=check_vma)
    step = jax.shard_map(
        _local_step(problem, tx, options.get("average_gradients", False)),
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs),
        check_vma=check_vma,
    )
    return train(jax.jit(step), problem.params, jax.jit(init)(problem.params), problem.batch, num_steps)


def in_pmap(problem: Problem, num_steps: int, num_devices: int, **options: Any) -> tuple[Any, Any]:
    devices = jax.devices()[:num_devices]
    tx = dho2.dho2(problem.base, problem.loss_fn, axis_name="data", **{**OPTIONS, **options})
    params = jax.tree.map(lambda x: jnp.stack([x] * num_devices), problem.params)
    batch = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), problem.batch)
    state = jax.pmap(tx.init, axis_name="data", devices=devices)(params)
    local = _local_step(problem, tx, options.get("average_gradients", False))
    params, state = train(jax.pmap(local, axis_name="data", devices=devices), params, state, batch, num_steps)
    # Every device must hold the same parameters.
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: x[0], params), state
