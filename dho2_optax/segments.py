"""Splitting pytree vectors in segments over a mesh axis: the only file that knows padding.

In *segment form* every leaf is flattened, zero-padded and cut in ``P`` equal pieces, of which the device at
position ``p`` of the axis holds the ``p``-th (DHO2, arXiv 2505.00982, section 4: each device keeps a segment of
every Lanczos vector and of the model). The pytree keeps the structure of the parameters, so labels and masks by
path still work. Seen from outside ``shard_map``, a leaf of ``n`` numbers in segment form is one array of shape
``(padded,)`` sharded over the axis; inside it has shape ``(padded / P,)``.

Leaves are padded to a multiple of a fixed quantum and not of ``P``, so the global shapes of a checkpoint do not
change when the number of devices does.

All functions take ``axis_name``; with ``None`` a vector is not split and they return what they are given.
Collectives move one buffer per dtype, however many leaves there are.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dho2_optax import vectors
from dho2_optax.vectors import Vector

QUANTUM = 256  # Numbers; divisible by every power of two up to 256 devices.


def bound_axis_size(axis_name: str) -> int | None:
    """The size of `axis_name` inside ``shard_map``, ``pmap`` or ``vmap``; None where it is not bound."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        return None


def bound_axis(axis_name: str | None) -> str | None:
    """`axis_name` where it is bound; None where it is not, since sums over a global view need no communication."""
    return None if axis_name is None or bound_axis_size(axis_name) is None else axis_name


def check_bound(axis_name: str | None) -> None:
    """Raises ValueError where `axis_name` is not bound."""
    if axis_name is not None and bound_axis_size(axis_name) is None:
        raise ValueError(
            f"`axis_name` {axis_name!r} is bound only inside shard_map and pmap over that axis, and this is outside; "
            "under plain jit give the optimizer's Split a `mesh` too."
        )


def padded_size(size: int, num_devices: int) -> int:
    """The length of a leaf of `size` numbers once padded; even an empty leaf has a segment on every device.

    Example:
        >>> padded_size(1000, num_devices=8), padded_size(1000, num_devices=3), padded_size(0, 8)
        (1024, 1536, 256)
    """
    quantum = math.lcm(QUANTUM, num_devices)
    return max(-(-size // quantum), 1) * quantum


def _flatten(x: jax.Array, num_devices: int) -> jax.Array:
    """One leaf as a padded vector, whole along mesh axes that are not ours."""
    if vectors.is_explicitly_sharded(x):
        x = jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, padded_size(flat.size, num_devices) - flat.size))


def split(tree: Vector, axis_name: str | None) -> Vector:
    """This device's segment of a vector that every device holds whole; no communication.

    Outside ``shard_map`` and ``pmap``, where `axis_name` is not bound, returns the global view: the padded
    leaves, to be sharded over the axis.
    """
    if axis_name is None:
        return tree
    num_devices = bound_axis_size(axis_name)
    if num_devices is None:
        return jax.tree.map(lambda x: _flatten(x, 1), tree)

    def segment(x: jax.Array) -> jax.Array:
        padded = vectors.vary(_flatten(x, num_devices), axis_name)
        length = padded.size // num_devices
        return lax.dynamic_slice_in_dim(padded, lax.axis_index(axis_name) * length, length)

    return jax.tree.map(segment, tree)


def positions(like: Vector, axis_name: str | None) -> Vector:
    """The place in its flattened leaf of every number this device holds, as uint32; past the end for padding.

    `like` is a whole vector; the result is in segment form, and where `axis_name` is not bound its global view.
    """
    bound = bound_axis(axis_name)

    def whole(x: jax.Array) -> jax.Array:
        # The zeros carry the sharding of `x` along.
        index = lax.iota(jnp.uint32, x.size).reshape(x.shape)
        return index + vectors.zeros_like(x, jnp.uint32)

    def segment(x: jax.Array) -> jax.Array:
        if bound is None:
            return lax.iota(jnp.uint32, padded_size(x.size, 1))
        num_devices = lax.axis_size(bound)
        length = padded_size(x.size, num_devices) // num_devices
        first = lax.axis_index(bound).astype(jnp.uint32) * jnp.uint32(length)
        return first + lax.iota(jnp.uint32, length)

    return jax.tree.map(whole if axis_name is None else segment, like)


def gather(segments: Vector, like: Vector, axis_name: str | None) -> Vector:
    """The whole vector on every device, with the shapes of `like` and the dtypes of `segments`; one all-gather."""
    if axis_name is None:
        return segments
    num_devices = lax.axis_size(axis_name)
    # `vmap` knows of no values that are the same along its axis.
    to = "invarying" if axis_name in jax.sharding.get_abstract_mesh().manual_axes else "varying"

    def gather_group(leaves: list[jax.Array], shapes: list[tuple[int, ...]]) -> list[jax.Array]:
        buffer = vectors.vary(jnp.concatenate(leaves), axis_name)
        rows = lax.all_gather(buffer, axis_name, to=to).reshape(num_devices, -1)
        whole, start = [], 0
        for leaf, shape in zip(leaves, shapes, strict=True):
            flat = rows[:, start : start + leaf.size].reshape(-1)
            whole.append(flat[: math.prod(shape)].reshape(shape))
            start += leaf.size
        return whole

    def shard_as(x: jax.Array, other: jax.Array) -> jax.Array:
        sharded = vectors.is_explicitly_sharded(other)
        return jax.sharding.reshard(x, jax.typeof(other).sharding) if sharded else x

    return jax.tree.map(shard_as, _by_dtype(gather_group, segments, like), like)


def whole(tree: Vector, like: Vector, axis_name: str | None) -> Vector:
    """The whole vector, from segments where `axis_name` is bound, or from the global view of them where it is not.

    Where nothing is split the vector itself.
    """
    if axis_name is not None and bound_axis_size(axis_name) is not None:
        return gather(tree, like, axis_name)

    def unflatten(x: jax.Array, shaped: jax.Array) -> jax.Array:
        if x.shape != shaped.shape:
            if vectors.is_explicitly_sharded(x):
                x = jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))
            x = x[: shaped.size].reshape(shaped.shape)
        explicit = vectors.is_explicitly_sharded(x) or vectors.is_explicitly_sharded(shaped)
        return jax.sharding.reshard(x, jax.typeof(shaped).sharding) if explicit else x

    return jax.tree.map(unflatten, tree, like)


def reduce_scatter_mean(tree: Vector, axis_name: str | None) -> Vector:
    """This device's segment of the mean of `tree` over the devices; one reduce-scatter of the leaves that vary.

    A leaf that does not vary over the axis is its own mean.
    """
    if axis_name is None:
        return tree
    num_devices = lax.axis_size(axis_name)

    def scatter_group(leaves: list[jax.Array], _: list[tuple[int, ...]]) -> list[jax.Array]:
        pieces = [_flatten(leaf, num_devices).reshape(num_devices, -1) for leaf in leaves]
        buffer = vectors.vary(jnp.concatenate(pieces, axis=1), axis_name)
        scatter: Any = functools.partial(lax.psum_scatter, axis_name=axis_name, scatter_dimension=0, tiled=True)
        others = jax.typeof(buffer).sharding.mesh.explicit_axes
        if others:  # jax 0.12 fails on their types here
            scatter = jax.sharding.auto_axes(scatter, axes=others, out_sharding=PartitionSpec())
        mean = scatter(buffer).reshape(-1) / num_devices
        starts = [sum(p.shape[1] for p in pieces[:i]) for i in range(1, len(pieces))]
        return jnp.split(mean, starts)

    leaves, treedef = jax.tree.flatten(tree)
    varies = [vectors.may_vary(leaf, axis_name) for leaf in leaves]
    varying = [leaf for leaf, v in zip(leaves, varies, strict=True) if v]
    means = iter(_by_dtype(scatter_group, varying, varying))
    return treedef.unflatten(
        [next(means) if v else split(leaf, axis_name) for leaf, v in zip(leaves, varies, strict=True)]
    )


def _by_dtype(function: Any, tree: Vector, like: Vector) -> Vector:
    """Applies `function(leaves, shapes of like)` to all leaves of one dtype at a time."""
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    result: list[Any] = [None] * len(leaves)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        group = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        outputs = function([leaves[i] for i in group], [shapes[i] for i in group])
        for i, output in zip(group, outputs, strict=True):
            result[i] = output
    return treedef.unflatten(result)
