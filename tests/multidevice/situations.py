"""The ways to run one optimizer on several devices, behind one signature."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from benchmarks.options import grouped
from tests.multidevice.problems import Problem

OPTIONS = {"rank": 4, "refresh_interval": 8, "order": 12, "alpha": 0.2}


class Optimizer(NamedTuple):
    """One of ours, and where its curvature comes from."""

    make: Callable[..., Any]
    options: dict[str, Any]
    by_product: bool = False  # `value_grad_and_hvp` makes it, outside of the optimizer

    def of(self, problem: Problem, **options: Any) -> Any:
        loss_fn = None if self.by_product else problem.loss_fn
        return self.make(problem.base, loss_fn, **grouped(**{**self.options, **options}))

    def gradient(self, problem: Problem, axis_name: str | None = None) -> Callable[[Any, Any, Any], Any]:
        """A function of parameters, state and batch to the gradient, and what else `update` is to be given."""

        def of_loss(params: Any, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
            del state
            return jax.grad(problem.loss_fn)(jax.tree.map(lambda x: _vary(x, axis_name), params), batch), {}

        def with_product(params: Any, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
            compute = dho2.value_grad_and_hvp(problem.loss_fn, axis_name=axis_name)
            _, grads, hvp = compute(params, state, batch)
            return grads, {"hvp": hvp}

        return with_product if self.by_product else of_loss


SYNCHRONOUS = Optimizer(dho2.dho2, OPTIONS)
STREAMING = Optimizer(
    dho2.mr_dho2, {"rank": 4, "probe_interval": 1, "order": 12, "alpha": 0.2, "tolerance": 1e-3}, by_product=True
)


def train(step: Any, params: Any, state: Any, batch: Any, num_steps: int) -> tuple[Any, Any]:
    for _ in range(num_steps):
        params, state = step(params, state, batch)
    return params, state


def jit_step(problem: Problem, tx: Any, optimizer: Optimizer = SYNCHRONOUS) -> Any:
    gradient = optimizer.gradient(problem)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads, product = gradient(params, state, batch)
        updates, state = tx.update(grads, state, params, batch=batch, **product)
        return optax.apply_updates(params, updates), state

    return step


def one_device(problem: Problem, num_steps: int, optimizer: Optimizer = SYNCHRONOUS, **options: Any) -> tuple[Any, Any]:
    tx = optimizer.of(problem, **options)
    return train(jit_step(problem, tx, optimizer), problem.params, tx.init(problem.params), problem.batch, num_steps)


def data_mesh(num_devices: int, *, explicit: bool = False) -> Mesh:
    devices = jax.devices()[:num_devices]
    if explicit:
        return jax.make_mesh((num_devices,), ("data",), devices=devices)
    return Mesh(np.array(devices), ("data",))


def on_mesh(
    problem: Problem, num_steps: int, mesh: Mesh, optimizer: Optimizer = SYNCHRONOUS, **options: Any
) -> tuple[Any, Any]:
    """`jit` with global arrays and `mesh=`."""
    tx = optimizer.of(problem, mesh=mesh, axis_name="data", **options)
    params = jax.device_put(problem.params, NamedSharding(mesh, P()))
    batch = jax.device_put(problem.batch, NamedSharding(mesh, P("data")))
    return train(jit_step(problem, tx, optimizer), params, tx.init(params), batch, num_steps)


def local_step(problem: Problem, tx: Any, optimizer: Optimizer, average_gradients: bool) -> Any:
    gradient = optimizer.gradient(problem, "data")

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads, product = gradient(params, state, batch)
        if not average_gradients:
            grads, product = jax.lax.pmean((grads, product), "data")
        updates, state = tx.update(grads, state, params, batch=batch, **product)
        return optax.apply_updates(params, updates), state

    return step


def _vary(x: jax.Array, axis_name: str | None) -> jax.Array:
    tracked = axis_name in jax.sharding.get_abstract_mesh().manual_axes
    return jax.lax.pcast(x, axis_name, to="varying") if tracked else x


def in_shard_map(
    problem: Problem,
    num_steps: int,
    num_devices: int,
    optimizer: Optimizer = SYNCHRONOUS,
    *,
    check_vma: bool,
    **options: Any,
) -> tuple[Any, Any]:
    """The user's own `shard_map`, gradients averaged before or, with `average_gradients`, by the optimizer."""
    mesh = data_mesh(num_devices)
    tx = optimizer.of(problem, axis_name="data", **options)
    specs = dho2.state_specs(tx.init, problem.params, "data")
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=check_vma)
    step = jax.shard_map(
        local_step(problem, tx, optimizer, options.get("average_gradients", False)),
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs),
        check_vma=check_vma,
    )
    return train(jax.jit(step), problem.params, jax.jit(init)(problem.params), problem.batch, num_steps)


def in_pmap(
    problem: Problem, num_steps: int, num_devices: int, optimizer: Optimizer = SYNCHRONOUS, **options: Any
) -> tuple[Any, Any]:
    devices = jax.devices()[:num_devices]
    tx = optimizer.of(problem, axis_name="data", **options)
    params = jax.tree.map(lambda x: jnp.stack([x] * num_devices), problem.params)
    batch = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), problem.batch)
    state = jax.pmap(tx.init, axis_name="data", devices=devices)(params)
    local = local_step(problem, tx, optimizer, options.get("average_gradients", False))
    params, state = train(jax.pmap(local, axis_name="data", devices=devices), params, state, batch, num_steps)
    # Every device must hold the same parameters.
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: x[0], params), state
