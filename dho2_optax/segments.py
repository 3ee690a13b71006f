"""Splitting vectors in segments over a mesh axis, leaf by leaf.

In *segment form* every leaf is flattened, zero-padded and cut in ``P`` equal pieces, of which the device at
position ``p`` of the axis holds the ``p``-th. The pytree keeps the structure of the parameters, so labels and masks by
path still work: it is what a base sees that runs on segments. Seen from outside ``shard_map``, a leaf of ``n`` numbers
in segment form is one array of shape ``(padded,)`` sharded over the axis; inside it has shape ``(padded / P,)``.

Leaves are padded to a multiple of a fixed quantum and not of ``P``, so the global shapes of a checkpoint do not
change when the number of devices does.
"""

import math

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


def replicated(x: jax.Array) -> jax.Array:
    """An array whole along all mesh axes that its type names."""
    if not vectors.is_explicitly_sharded(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))


def split(tree: Vector, axis_name: str | None) -> Vector:
    """This device's segment of a vector that every device holds whole; no communication.

    Outside ``shard_map`` and ``pmap``, where `axis_name` is not bound, returns the global view: the padded
    leaves, to be sharded over the axis. With None the vector itself.
    """
    if axis_name is None:
        return tree
    num_devices = bound_axis_size(axis_name)

    def segment(x: jax.Array) -> jax.Array:
        flat = replicated(x).reshape(-1)
        padded = jnp.pad(flat, (0, padded_size(flat.size, num_devices or 1) - flat.size))
        if num_devices is None:
            return padded
        length = padded.size // num_devices
        return lax.dynamic_slice_in_dim(vectors.vary(padded, axis_name), lax.axis_index(axis_name) * length, length)

    return jax.tree.map(segment, tree)
