"""Vectors packed in a few buffers: what the optimizers compute with in place of the user's pytrees.

Every operation on a vector is one operation for each of its leaves, in the program, in its compile time and on the
device. So an optimizer packs the gradient once, computes with a few buffers, and unpacks the update once. A packed
vector is a tuple of buffers, itself a pytree, and a stack of packed vectors has a leading axis on each of them: nothing
but the :class:`Layout` needs to know what is where.

Over a mesh axis there is one buffer per dtype, a matrix. Every leaf, flattened and padded, fills some of its columns,
row by row, and a device holds some of its rows (DHO2, arXiv 2505.00982, section 4: each device keeps a segment of every
Lanczos vector and of the model). Seen leaf by leaf that is the device's segment of every leaf, see
:mod:`dho2_optax.segments`, found by static slices. Collectives move one buffer per dtype.

Without an axis leaves may be sharded by the user, which only the compiler knows, and must not be gathered. There
leaves of equal shape and dtype are stacked, and only small ones share a flat buffer.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from dho2_optax import segments, vectors
from dho2_optax.vectors import Vector

Packed = tuple[jax.Array, ...]

_SMALL = 2**16  # numbers; to gather a leaf of fewer, where the user shards it, costs next to nothing


class _Group(NamedTuple):
    """The leaves that one buffer holds."""

    leaves: list[int]
    dtype: np.dtype
    widths: list[int] | None  # of the columns of a matrix, or of the parts of a flat buffer; None: stacked, or one leaf


class Layout:
    """Where the leaves of a vector are in its buffers: static, and made anew wherever it is needed.

    Example:
      >>> layout = Layout({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, None)
      >>> [buffer.shape for buffer in layout.pack({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})]
      [(9,)]
    """

    def __init__(self, like: Vector, axis_name: str | None, num_rows: int | None = None) -> None:
        """The layout of vectors shaped like `like`, over the devices of `axis_name`.

        Outside of ``shard_map`` and ``pmap``, where the axis is not bound, buffers are what the devices have together:
        with `num_rows`, or as many as every power of two of devices has.
        """
        leaves, self._treedef = jax.tree.flatten(like)
        self.axis_name = segments.bound_axis(axis_name)
        self._num_parts = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        if axis_name is not None and num_rows is None:
            num_rows = math.lcm(segments.QUANTUM, self._num_parts)
        #: Of the buffers over an axis; None without one.
        self.num_rows = num_rows
        self._shapes = [x.shape for x in leaves]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._shardings = [jax.typeof(x).sharding if vectors.is_explicitly_sharded(x) else None for x in leaves]
        self._sharded = {i: x for i, x in enumerate(leaves) if vectors.is_explicitly_sharded(x) or _is_split(x)}

        groups: dict[tuple[np.dtype, Hashable], list[int]] = {}
        for i, x in enumerate(leaves):
            alike = num_rows is None and (self._sizes[i] >= _SMALL or self._shardings[i] is not None)
            kind = (x.shape, self._shardings[i]) if alike else None
            groups.setdefault((jnp.dtype(x.dtype), kind), []).append(i)
        self._groups = [
            _Group(group, dtype, None if kind or (num_rows is None and len(group) == 1) else self._widths(group))
            for (dtype, kind), group in groups.items()
        ]
        #: How many numbers a vector has.
        self.size = sum(self._sizes)

    @property
    def is_free_in_jit(self) -> bool:
        """Whether vectors made in a ``jit`` of their own are where they would be without: no device has parts alone."""
        return self.axis_name is None and not self._sharded

    def _widths(self, group: list[int]) -> list[int]:
        if self.num_rows is None:
            return [self._sizes[i] for i in group]
        return [segments.padded_size(self._sizes[i], self.num_rows) // self.num_rows for i in group]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of whole buffers."""
        return [self._shape(group) for group in self._groups]

    def _shape(self, group: _Group) -> tuple[int, ...]:
        if group.widths is not None:
            return (*([] if self.num_rows is None else [self.num_rows]), sum(group.widths))
        stacked = [len(group.leaves)] if len(group.leaves) > 1 else []
        return (*stacked, *self._shapes[group.leaves[0]])

    def __eq__(self, other: object) -> bool:
        """Whether vectors are laid out alike."""
        described = lambda layout: {name: x for name, x in vars(layout).items() if name != "_sharded"}  # noqa: E731
        return isinstance(other, Layout) and described(self) == described(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def pack(self, tree: Vector) -> Packed:
        """The buffers of a whole vector."""
        return self._pack(tree, self.num_rows or 1)

    def pack_segments(self, tree: Vector) -> Packed:
        """This device's part of the buffers, of a vector in segment form; `pack` without an axis."""
        return self._pack(tree, (self.num_rows or 1) // self._num_parts)

    def split(self, tree: Vector) -> Packed:
        """This device's part of the buffers, of a vector that every device holds whole; no communication."""
        return self.pack_segments(segments.split(tree, self.axis_name))

    def mean(self, tree: Vector) -> Packed:
        """This device's part of the mean of a vector over the devices; one reduce-scatter per dtype.

        A leaf that does not vary over the axis is its own mean.
        """
        axis_name = self.axis_name
        if axis_name is None:
            return self.pack(tree)
        varies = jax.tree.map(lambda x: vectors.may_vary(x, axis_name), tree)
        where = lambda which: jax.tree.map(lambda x, v: x if v is which else vectors.zeros_like(x), tree, varies)  # noqa: E731
        if not any(jax.tree.leaves(varies)):
            return self.split(tree)
        buffers = vectors.vary(self.pack(where(True)), axis_name)
        means = tuple(_psum_scatter(x, axis_name) / self._num_parts for x in buffers)
        if all(jax.tree.leaves(varies)):
            return means
        return jax.tree.map(jnp.add, means, self.split(where(False)))

    def gather(self, buffers: Packed) -> Packed:
        """Whole buffers on every device, of this device's part of them; one all-gather per dtype."""
        axis_name = self.axis_name
        if axis_name is None:
            return buffers
        # `vmap` knows of no values that are the same along its axis.
        to = "invarying" if axis_name in jax.sharding.get_abstract_mesh().manual_axes else "varying"
        return tuple(lax.all_gather(vectors.vary(x, axis_name), axis_name, tiled=True, to=to) for x in buffers)

    def cast(self, buffers: Packed) -> Packed:
        """Buffers in the dtypes of their leaves."""
        return tuple(x.astype(group.dtype) for x, group in zip(buffers, self._groups, strict=True))

    def unpack(self, buffers: Packed) -> Vector:
        """The vector that whole buffers hold."""

        def shaped(x: jax.Array, leaf: int) -> jax.Array:
            whole = x[: self._sizes[leaf]].reshape(self._shapes[leaf])
            sharding = self._shardings[leaf]
            return whole if sharding is None else jax.sharding.reshard(whole, sharding)

        return self._unpack(buffers, shaped)

    def unpack_segments(self, buffers: Packed) -> Vector:
        """In segment form, the vector that this device's part of the buffers holds; `unpack` without an axis."""
        return self.unpack(buffers) if self.num_rows is None else self._unpack(buffers, lambda x, leaf: x)

    def leaves_of_rows(self, stack: Sequence[np.ndarray], *, zeros: bool = True) -> list[np.ndarray]:
        """On the host, of a stack of whole buffers the leaves, each one flat, of shape ``(rows, numbers)``.

        Raises:
          ValueError: if the padding is not `zeros`, as that of a vector is: then another layout has packed them.
        """
        leaves: list[Any] = [None] * len(self._shapes)
        for buffer, group in zip(stack, self._groups, strict=True):
            rows = len(buffer)
            if group.widths is None:
                parts = np.split(buffer.reshape(rows, math.prod(buffer.shape[1:])), len(group.leaves), axis=1)
            else:
                columns = np.split(buffer, np.cumsum(group.widths)[:-1], axis=-1)
                parts = [x.reshape(rows, math.prod(x.shape[1:])) for x in columns]
            for leaf, part in zip(group.leaves, parts, strict=True):
                size = self._sizes[leaf]
                if zeros and np.any(part[:, size:]):
                    raise ValueError(f"of a leaf of shape {self._shapes[leaf]} there are more than {size} numbers")
                leaves[leaf] = part[:, :size]
        return leaves

    def rows_of_leaves(self, leaves: Sequence[np.ndarray], padding: float = 0) -> Packed:
        """The inverse of :meth:`leaves_of_rows`, with `padding` in the padding."""

        def pack(group: _Group) -> Any:
            parts = [leaves[i] for i in group.leaves]
            if group.widths is not None:
                height = self.num_rows or 1
                padded = [
                    np.pad(x, ((0, 0), (0, height * width - x.shape[1])), constant_values=padding)
                    for x, width in zip(parts, group.widths, strict=True)
                ]
                parts = [x.reshape(len(x), height, width) for x, width in zip(padded, group.widths, strict=True)]
            return np.concatenate(parts, axis=-1).reshape(len(parts[0]), *self._shape(group))

        return tuple(map(pack, self._groups))

    def random(self, seed: jax.Array) -> Packed:
        """This device's part of a random vector of unit length; see :meth:`noise`."""
        noise = self.noise(seed)
        return vectors.scale(1 / vectors.norm(noise, self.axis_name), noise)

    def noise(self, seed: jax.Array) -> Packed:
        """This device's part of a random vector, the same for every number of devices.

        Numbers are uniform between -1 and 1, of float32, or of float64 where a leaf is. Each is a hash of the seed, of
        its leaf and of its place in the leaf, so a device makes its part alone, and the program does not grow with the
        leaves. A start vector needs no better randomness.

        Args:
          seed: shape=(), dtype=uint32.
        """
        numbers = jnp.arange(1, len(self._shapes) + 1, dtype=jnp.uint32)
        starts = _hash(seed.astype(jnp.uint32) + _hash(numbers))

        def draw(group: _Group) -> jax.Array:
            leaf, place = self._places(group)
            dtype = vectors.at_least_float32(group.dtype)
            bits = lax.bitcast_convert_type(_hash(place + starts[leaf]), jnp.int32)
            return jnp.where(place < jnp.array(self._sizes, jnp.uint32)[leaf], bits.astype(dtype) * 2.0**-31, 0)

        return tuple(map(draw, self._groups)) if self._groups else self._treedef.unflatten([])

    def _places(self, group: _Group) -> tuple[jax.Array, jax.Array]:
        """Of every number in this device's part of a buffer, its leaf and its place in it, as uint32.

        The place is past the end in the padding.
        """
        first = group.leaves[0]
        if group.widths is None:
            place = jnp.arange(self._sizes[first], dtype=jnp.uint32).reshape(self._shapes[first])
            if first in self._sharded:
                place = place + vectors.zeros_like(self._sharded[first], jnp.uint32)
            if len(group.leaves) == 1:
                return jnp.int32(first), place
            return jnp.array(group.leaves).reshape(-1, *(1 for _ in place.shape)), place
        widths = jnp.array(group.widths, jnp.uint32)
        column = jnp.arange(sum(group.widths), dtype=jnp.uint32)
        before = column[:, None] >= jnp.array(np.cumsum(group.widths), jnp.uint32)  # the leaves before that of a column
        number = jnp.sum(before, axis=1, dtype=jnp.int32)
        leaf, place = (
            jnp.array(group.leaves)[number],
            column - jnp.sum(jnp.where(before, widths, 0), axis=1, dtype=jnp.uint32),
        )
        if self.num_rows is None:
            return leaf, place
        num_rows = self.num_rows // self._num_parts
        part = 0 if self.axis_name is None else lax.axis_index(self.axis_name).astype(jnp.uint32)
        row = part * jnp.uint32(num_rows) + jnp.arange(num_rows, dtype=jnp.uint32)
        return leaf, row[:, None] * widths[number] + place

    def _pack(self, tree: Vector, num_rows: int) -> Packed:
        leaves = jax.tree.leaves(tree)
        if not leaves:  # as it is: `optax.tree.map_params` looks for what it has put in the place of parameters
            return tree

        def pack(group: _Group) -> jax.Array:
            members = [leaves[i] for i in group.leaves]
            dtype = max((jnp.dtype(x.dtype) for x in members), key=lambda dtype: dtype.itemsize)
            members = [x.astype(dtype) for x in members]
            if group.widths is not None:
                buffer = _side_by_side(members, group.widths, num_rows)
                return buffer[0] if self.num_rows is None else buffer
            return members[0] if len(members) == 1 else _concatenated([x[None] for x in _alike(members)], axis=0)

        return tuple(map(pack, self._groups))

    def _unpack(self, buffers: Packed, shaped: Callable[[jax.Array, int], jax.Array]) -> Vector:
        leaves: list[Any] = [None] * len(self._shapes)
        for buffer, group in zip(buffers, self._groups, strict=True):
            if group.widths is not None:
                buffer = segments.replicated(buffer)
                ends = np.cumsum(group.widths)
                for leaf, width, end in zip(group.leaves, group.widths, ends, strict=True):
                    columns = lax.slice_in_dim(buffer, int(end) - width, int(end), axis=-1)
                    leaves[leaf] = shaped(columns.reshape(-1), leaf)
            elif len(group.leaves) == 1:
                leaves[group.leaves[0]] = buffer
            else:
                for row, leaf in enumerate(group.leaves):
                    leaves[leaf] = lax.index_in_dim(buffer, row, keepdims=False)
        return self._treedef.unflatten(leaves)


def of_buffers(buffers: Packed, like: Vector) -> Layout:
    """The layout of whole buffers, or of what all devices have of them, seen from outside of ``shard_map``."""
    like = vectors.abstract(like)
    without_axis = Layout(like, None)
    shapes = [x.shape for x in jax.eval_shape(without_axis.pack, like)]
    if [x.shape for x in buffers] == shapes or not (buffers and buffers[0].shape):
        return without_axis
    return Layout(like, None, num_rows=buffers[0].shape[0])


def of_stack(rows: Packed, like: Vector) -> Layout:
    """:func:`of_buffers` of the vectors in a stack."""
    return of_buffers(jax.eval_shape(lambda rows: vectors.row(rows, 0), rows), like)


def _is_split(x: Any) -> bool:
    """Whether `x` is an array of which some devices hold a part only; inside ``jit`` nobody can tell."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and not x.is_fully_replicated


def _alike(leaves: list[jax.Array]) -> list[jax.Array]:
    """Leaves of one shape, all sharded as the first; inside ``jit`` that is the compiler's business.

    A stack of leaves that are sharded differently would be whole on every device.
    """
    if not all(map(_is_split, leaves)):
        return leaves
    return [jax.device_put(x, leaves[0].sharding) for x in leaves]


def _psum_scatter(x: jax.Array, axis_name: str) -> jax.Array:
    scatter: Any = partial(lax.psum_scatter, axis_name=axis_name, tiled=True)
    others = jax.typeof(x).sharding.mesh.explicit_axes
    if others:  # jax 0.12 fails on their types here
        scatter = jax.sharding.auto_axes(scatter, axes=others, out_sharding=PartitionSpec())
    return scatter(x)


def _side_by_side(leaves: list[jax.Array], widths: list[int], num_rows: int) -> jax.Array:
    """Leaves as columns of one matrix."""

    def columns(leaf: jax.Array, width: int) -> jax.Array:
        flat = segments.replicated(leaf).reshape(-1)
        return jnp.pad(flat, (0, num_rows * width - flat.size)).reshape(num_rows, width)

    return _concatenated([columns(*pair) for pair in zip(leaves, widths, strict=True)], axis=1)


def _concatenated(parts: list[jax.Array], axis: int) -> jax.Array:
    """The parts one after the other, as copies of what has been computed before.

    The compiler would compute them inside of the concatenation, number by number, which XLA on CPU takes ten times as
    long for. Written one by one into one buffer they take as little time, but ten times as long to compile.
    """
    return lax.concatenate(lax.optimization_barrier(parts), axis)


def _hash(x: jax.Array) -> jax.Array:
    """Mixes the bits of 32-bit words (the "lowbias32" function of C. Wellons, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
