"""Running a transformation that is written for one device of a mesh axis on global arrays, under ``jit``."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dho2_optax.arguments import check_params, check_updates
from dho2_optax.state import check_state
from dho2_optax.vectors import as_arrays

InitFn = Callable[[Any], Any]


def state_specs(init: InitFn, params: Any, axis_name: str) -> Any:
    """The ``PartitionSpec`` of every leaf of an optimizer state, for ``shard_map``'s `in_specs` and `out_specs`.

    A dimension of which a device holds only a part is sharded over `axis_name`, everything else is replicated. Works
    for any composition that contains a transformation with that `axis_name`, because it compares the shapes of the
    state on one device with those on two.

    Args:
      init: the ``init`` of the whole optimizer.
      params: the parameters, or anything with their shapes and dtypes.
      axis_name: the mesh axis.

    Example:
      >>> import dho2_optax as dho2, jax.numpy as jnp, optax
      >>> tx = dho2.dho2(optax.adam(1e-3), lambda p, b: p.sum(), split=dho2.Split("data"))
      >>> specs = state_specs(tx.init, jnp.zeros(1000), "data")
      >>> [tuple(spec) for spec in specs.spectrum.eigenvectors], tuple(specs.count)
      ([(None, 'data')], ())
    """

    def local_shapes(num_devices: int) -> Any:
        replicas = jax.vmap(init, in_axes=None, axis_name=axis_name, axis_size=num_devices)
        return jax.eval_shape(replicas, params)

    def spec(one: jax.ShapeDtypeStruct, two: jax.ShapeDtypeStruct) -> PartitionSpec:
        # The first dimension counts the replicas.
        pairs = zip(one.shape[1:], two.shape[1:], strict=True)
        dims = [axis_name if a != b else None for a, b in pairs]
        while dims and dims[-1] is None:
            dims.pop()
        return PartitionSpec(*dims)

    return jax.tree.map(spec, local_shapes(1), local_shapes(2))


def batch_specs(batch: Any, mesh: Mesh, axis_name: str) -> Any:
    """Shards the leading axis of every array of a batch; scalars (a random key, say) are replicated."""
    num_devices = mesh.shape[axis_name]

    def spec(x: Any) -> PartitionSpec:
        shape = jax.numpy.shape(x)
        if not shape:
            return PartitionSpec()
        if shape[0] % num_devices:
            raise ValueError(
                f"the leading axis of every array of `batch` must be divisible by the {num_devices} devices of "
                f"mesh axis {axis_name!r}, got an array of shape {shape}."
            )
        return PartitionSpec(axis_name)

    return jax.tree.map(spec, batch)


def specs_of(arrays: Any, axis_name: str) -> Any:
    """How arrays are sharded over one axis of their mesh."""

    def spec(x: jax.Array) -> PartitionSpec:
        dims = getattr(x.sharding, "spec", ())
        return PartitionSpec(*(axis_name if axis_name in (d if isinstance(d, tuple) else (d,)) else None for d in dims))

    return jax.tree.map(spec, arrays)


def over_axis(
    function: Callable[..., Any], mesh: Mesh, axis_name: str, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """``shard_map`` over one axis of a mesh; the others are left as they are."""
    # Varying-axes checks would be applied to the user's loss too, which need not be written for them.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={axis_name}, check_vma=False
    )


def over_mesh(
    local: optax.GradientTransformationExtraArgs, mesh: Mesh, axis_name: str
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation that names `axis_name` so that it takes and returns global arrays.

    Parameters, gradients and updates are whole on every device of the axis; the state lives sharded over it, and the
    batch is sharded over it when it is used. Other axes of the mesh are left as they are.
    """
    replicated = PartitionSpec()

    def check_whole(**trees: Any) -> None:
        for name, tree in trees.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                spec = jax.typeof(leaf).sharding.spec
                if axis_name in jax.tree.leaves(tuple(spec)):
                    raise ValueError(
                        f"`{name}` must be whole along mesh axis {axis_name!r}, got {spec} at "
                        f"{jax.tree_util.keystr(path)}; jax.sharding.reshard it, or make the axis one of AxisType.Auto."
                    )

    def init(params: Any) -> Any:
        params = as_arrays(params)
        check_params(params)
        check_whole(params=params)
        specs = state_specs(local.init, params, axis_name)
        return jax.jit(over_axis(local.init, mesh, axis_name, replicated, specs))(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("`update` needs `params`, got None.")
        updates, params = as_arrays((updates, params))
        check_params(params)
        check_updates(updates, params)
        check_whole(params=params, updates=updates, hvp=extra.get("hvp"))
        specs = state_specs(local.init, params, axis_name)
        check_state(state, jax.eval_shape(over_axis(local.init, mesh, axis_name, replicated, specs), params))
        arrays = {name: extra.pop(name) for name in ("batch", "hvp") if extra.get(name) is not None}

        def local_update(updates: Any, state: Any, params: Any, arrays: Any) -> tuple[Any, Any]:
            return local.update(updates, state, params, **arrays, **extra)

        specs_of = {"batch": lambda batch: batch_specs(batch, mesh, axis_name), "hvp": lambda hvp: replicated}
        array_specs = {name: specs_of[name](value) for name, value in arrays.items()}
        if "batch" in arrays and mesh.axis_types[mesh.axis_names.index(axis_name)] is AxisType.Explicit:
            # Only where axes are explicit it does not get there by itself.
            place = lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec))  # noqa: E731
            arrays["batch"] = jax.tree.map(place, arrays["batch"], array_specs["batch"])
        in_specs = (replicated, specs, replicated, array_specs)
        return over_axis(local_update, mesh, axis_name, in_specs, (replicated, specs))(updates, state, params, arrays)

    return optax.GradientTransformationExtraArgs(init, update)
