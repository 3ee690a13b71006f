"""Algebra of pytree vectors and of stacks of them.

A *vector* is a pytree of arrays; a *stack* of ``m`` vectors is the same pytree with one more leading axis
of length ``m`` on every leaf. Nothing is raveled into one flat array: leaves keep their sharding and dtype.

Where a vector is split over the devices of a mesh axis, every device holds a segment of each leaf, and
``axis_name`` names that axis. Only :func:`dots` and what is built on it communicate: one ``psum`` of a
few numbers each.

Stacks may be of a dtype shorter than float32. That is what they are stored in, and nothing is computed in it: each
number is converted on its way into a product, and products and sums are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

Vector = Any  # a pytree of arrays
Stack = Any  # the same pytree, one more leading axis on every leaf


def as_arrays(tree: Any) -> Any:
    """`tree` with arrays in place of numbers of Python and arrays of NumPy, which optax takes too; the rest stays."""

    def as_array(x: Any) -> Any:
        if isinstance(x, int | float):
            return jnp.asarray(x, jnp.result_type(x))
        is_number = isinstance(x, np.ndarray | np.generic) and jnp.issubdtype(x.dtype, np.number)
        return jnp.asarray(x) if is_number else x

    return jax.tree.map(as_array, tree)


def abstract(tree: Any) -> Any:
    """Shape, dtype and sharding of every leaf, as JAX would have them; no device is touched."""

    def described(x: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
        known = isinstance(x, jax.Array | jax.ShapeDtypeStruct)
        dtype = x.dtype if known else jax.dtypes.canonicalize_dtype(jnp.result_type(x))
        return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=sharding)

    return jax.tree.map(described, tree)


def unwrapped(tree: Any) -> Any:
    """`tree` with the values of the variables of ``flax.nnx`` in their place; the rest stays."""
    is_variable = lambda x: hasattr(x, "get_value")  # noqa: E731
    return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable)


def at_least_float32(dtype: Any) -> jnp.dtype:
    """`dtype`, or float32 for the shorter ones; a rule of its own, since strict dtype promotion refuses to mix."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def is_short(dtype: Any) -> bool:
    """Whether `dtype` is shorter than float32, so that nothing is computed in it."""
    return dtype is not None and at_least_float32(dtype) != jnp.dtype(dtype)


def lengthened(tree: Vector) -> Vector:
    """`tree` with its leaves in at least float32."""
    return jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), tree)


def accumulation_dtype(tree: Vector) -> jnp.dtype:
    """The dtype inner products of `tree` are accumulated in: float32, or float64 if a leaf has it."""
    dtypes = [at_least_float32(leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def vary(tree: Any, axis_name: str | None) -> Any:
    """Marks every leaf as varying over `axis_name`, which ``shard_map(check_vma=True)`` asks for.

    Changes nothing where nothing is tracked: under ``pmap``, ``vmap`` and ``check_vma=False``.
    """
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree

    def cast(x: jax.Array) -> jax.Array:
        if axis_name in jax.typeof(x).manual_axis_type.varying:
            return x
        return lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def may_vary(x: jax.Array, axis_name: str) -> bool:
    """Whether `x` may differ from device to device of a bound axis: where nothing is tracked, every array may."""
    tracked = axis_name in jax.typeof(lax.axis_index(axis_name)).manual_axis_type.varying
    return not tracked or axis_name in jax.typeof(x).manual_axis_type.varying


def zeros_like(x: jax.Array, dtype: Any = None) -> jax.Array:
    """Zeros of the shape and the sharding of `x`, an Explicit one too, which jax 0.12 forgets inside ``jit``."""
    zeros = jnp.zeros_like(x, dtype=dtype)
    sharding = jax.typeof(x).sharding
    forgotten = sharding.mesh.explicit_axes and jax.typeof(zeros).sharding != sharding
    return jax.sharding.reshard(zeros, sharding) if forgotten else zeros


def zero_stack(size: int, like: Vector, dtype: Any = None) -> Stack:
    """A stack of `size` zero vectors; `dtype=None` keeps each leaf's, raised to at least float32."""

    def zeros(x: jax.Array) -> jax.Array:
        leaf_dtype = at_least_float32(x.dtype) if dtype is None else dtype
        # The broadcast carries the sharding along.
        return jnp.broadcast_to(zeros_like(x, leaf_dtype), (size, *x.shape))

    return jax.tree.map(zeros, like)


def is_explicitly_sharded(x: jax.Array) -> bool:
    """Whether the type of `x` names a mesh axis it is sharded over (meshes with ``AxisType.Explicit``)."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _contract(stack: jax.Array, other: jax.Array, dtype: Any) -> jax.Array:
    """Inner products of the rows of one leaf with another leaf."""
    axes = tuple(range(1, stack.ndim))
    if is_short(stack.dtype):
        # A product would be one with a copy of the stack in `dtype`; this is one pass over it as it is.
        return jnp.sum(stack.astype(dtype) * other.astype(dtype), axis=axes)
    dimension_numbers = ((axes, tuple(a - 1 for a in axes)), ((), ()))
    # Explicitly sharded leaves have to be told where the sum over shards goes: to every device.
    sharded = is_explicitly_sharded(stack) or is_explicitly_sharded(other)
    return lax.dot_general(
        stack.astype(dtype),
        other.astype(dtype),
        dimension_numbers,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=NamedSharding(jax.typeof(stack).sharding.mesh, PartitionSpec(None)) if sharded else None,
    )


def _local_dots(stack: Stack, vector: Vector) -> jax.Array:
    dtype = accumulation_dtype(stack)
    pairs = zip(jax.tree.leaves(stack), jax.tree.leaves(vector), strict=True)
    parts = [_contract(s, x, dtype) for s, x in pairs]
    return sum(parts[1:], start=parts[0])


def dots(stack: Stack, vector: Vector, axis_name: str | None = None) -> jax.Array:
    r"""``(m,)`` inner products :math:`\langle s_i, x \rangle`; one pass over the stack."""
    products = _local_dots(stack, vector)
    return products if axis_name is None else lax.psum(products, axis_name)


def gram(stack: Stack, other: Stack, axis_name: str | None = None) -> jax.Array:
    r"""``(m, n)`` inner products :math:`\langle s_i, t_j \rangle` of the rows of two stacks.

    Row by row: for a product of two stacks of matrices XLA on CPU transposes one of them, which costs twice as much as
    all the passes.
    """
    products = lax.map(lambda row: _local_dots(stack, row), other).T
    return products if axis_name is None else lax.psum(products, axis_name)


def dot(x: Vector, y: Vector, axis_name: str | None = None) -> jax.Array:
    """The inner product of two vectors, a scalar; zero for vectors without leaves."""
    if not jax.tree.leaves(x):
        return jnp.zeros(())
    return dots(jax.tree.map(lambda leaf: leaf[None], x), y, axis_name)[0]


def norm(x: Vector, axis_name: str | None = None) -> jax.Array:
    """The Euclidean norm of a vector, a scalar."""
    return jnp.sqrt(dot(x, x, axis_name))


def combine(coefficients: jax.Array, stack: Stack) -> Vector:
    r""":math:`\sum_i a_i s_i`, one pass over the stack; a matrix of coefficients gives a stack.

    In at least float32, also of a stack in a shorter dtype.
    """

    def of_short(a: jax.Array, s: jax.Array) -> jax.Array:
        if a.ndim > 1:
            return lax.map(lambda row: of_short(row, s), a)
        # Term by term: the compiler makes one pass of it, without a copy of the stack in another dtype.
        dtype = at_least_float32(s.dtype)
        terms = [a[i].astype(dtype) * s[i].astype(dtype) for i in range(s.shape[0])]
        return sum(terms[1:], start=terms[0])

    def leaf(s: jax.Array) -> jax.Array:
        if is_short(s.dtype):
            return of_short(coefficients, s)
        return lax.dot_general(
            coefficients.astype(s.dtype),
            s,
            (((coefficients.ndim - 1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )

    return jax.tree.map(leaf, stack)


_ROW = 2**16  # numbers of a vector from which on `overwrite` goes row by row


def overwrite(old: jax.Array, stack: jax.Array, matrix: jax.Array, accept: jax.Array) -> jax.Array:
    r"""One leaf of a stack, :math:`M S` in the place of another where `accept`; large ones without a second copy.

    Those row by row, in a pass over `stack` for each. No other axis is cut, since the user may have sharded it.
    """
    if old.size < _ROW * len(old):
        return jnp.where(accept, combine(matrix, stack).astype(old.dtype), old)

    def put(i: jax.Array, into: jax.Array) -> jax.Array:
        new = combine(lax.dynamic_index_in_dim(matrix, i, keepdims=False), stack).astype(old.dtype)
        before = lax.dynamic_index_in_dim(into, i, keepdims=False)
        return lax.dynamic_update_index_in_dim(into, jnp.where(accept, new, before), i, 0)

    return lax.fori_loop(0, len(old), put, old)


def once(known: jax.Array, tree: Any) -> Any:
    """`tree`, but not before `known` is: a condition that always holds, though the compiler cannot tell.

    A collective of the result then waits for those that `known` comes from. Devices that meet in different ones never
    go on, and a barrier does not help, since XLA on CPU drops it.
    """
    return jax.tree.map(lambda x: jnp.where(known, x, jnp.zeros_like(x)), tree)


def subtract(x: Vector, y: Vector) -> Vector:
    """``x - y`` leaf by leaf, in the dtype of `x`."""
    return jax.tree.map(lambda a, b: a - b.astype(a.dtype), x, y)


def scale(factor: jax.Array, x: Vector) -> Vector:
    """``factor * x``, each leaf in its own dtype."""
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, x)


def cast_like(x: Vector, like: Vector) -> Vector:
    """`x` with the dtypes of `like`."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), x, like)


def row(stack: Stack, index: jax.Array | int) -> Vector:
    """The vector at `index`."""
    return jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, index, keepdims=False), stack)


def set_row(stack: Stack, index: jax.Array | int, vector: Vector) -> Stack:
    """The stack with the vector at `index` replaced."""
    return jax.tree.map(lambda s, x: lax.dynamic_update_index_in_dim(s, x.astype(s.dtype), index, 0), stack, vector)
