"""Curvature operators: matrix-free products with the Hessian or the Gauss-Newton matrix of a loss.

An *operator* is a function ``(params, vector, batch) -> vector``. :func:`hessian` and :func:`gauss_newton` build
them from a loss; anything with that signature may take their place. An operator knows nothing of devices:
:func:`segmented_matvec` applies it to the local shard of a batch and averages.
"""

# With it, `help` shows signatures as they are written here.
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dho2_optax import segments, vectors
from dho2_optax.arguments import check_functions, check_sizes, is_int
from dho2_optax.packing import Layout, Packed
from dho2_optax.vectors import Vector

Batch = Any
LossFn = Callable[..., Any]  # (params, batch) -> loss, or (loss, aux)
Operator = Callable[[Vector, Vector, Batch], Vector]
BatchSize = Literal["auto"] | int | None
Mode = Literal["forward-over-reverse", "reverse-over-reverse"]

_MODES = ("forward-over-reverse", "reverse-over-reverse")


def hessian(
    loss_fn: LossFn,
    *,
    has_aux: bool = False,
    mode: Mode = "forward-over-reverse",
    batch_size: int | None = None,
    batch_start: int = 0,
    microbatch_size: int | None = None,
) -> Operator:
    r"""The operator :math:`(\theta, v, b) \mapsto \nabla^2_\theta \mathcal{L}(\theta; b)\, v`.

    Args:
      loss_fn: ``(params, batch) -> loss``, a scalar mean over the samples of the batch; with `has_aux` a pair
        ``(loss, aux)`` of which the second is ignored.
      has_aux: whether `loss_fn` returns a pair.
      mode: ``"forward-over-reverse"`` (about twice the cost of a gradient) or ``"reverse-over-reverse"``, which
        costs more but works where a function has only a ``custom_vjp``.
      batch_size: use only this many samples, the leading ones (a cheaper, noisier operator). None: all.
      batch_start: leave out this many samples, and take the ones that follow.
      microbatch_size: split the samples in chunks of this size and accumulate their products in a scan, so that
        the activations of one chunk only are alive. Must divide the number of samples.

    Returns:
      An operator ``(params, vector, batch) -> vector``.

    Raises:
      ValueError: if `mode` is unknown, a size is not positive or `batch_start` negative; when called, if the batch has
        no sample left, or arrays of different lengths, of which a part cannot be taken.

    Example:
      >>> import jax.numpy as jnp
      >>> operator = hessian(lambda x, batch: jnp.sum(batch * x**2))
      >>> operator(jnp.ones(2), jnp.asarray([1.0, 0.0]), jnp.asarray([1.0, 3.0]))
      Array([2., 0.], dtype=float32)

    References:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    """
    check_functions(loss_fn=loss_fn)
    if mode not in _MODES:
        raise ValueError(f"`mode` must be one of {_MODES}, got {mode!r}.")

    checked = checked_loss(loss_fn, has_aux=has_aux)

    def product(params: Vector, vector: Vector, batch: Batch) -> Vector:
        def scalar_loss(p: Vector) -> jax.Array:
            return checked(p, batch)[0] if has_aux else checked(p, batch)

        if mode == "forward-over-reverse":
            remedy = "give `curvature=dho2_optax.hessian(loss_fn, mode='reverse-over-reverse')`"
            return forward_mode(lambda: jax.jvp(jax.grad(scalar_loss), (params,), (vector,))[1], remedy)
        _, pullback = jax.vjp(jax.grad(scalar_loss), params)
        return pullback(vector)[0]

    return _batched(product, batch_size, batch_start, microbatch_size)


def gauss_newton(
    model_fn: Callable[[Vector, Batch], Any],
    output_loss_fn: Callable[[Any, Batch], jax.Array],
    *,
    batch_size: int | None = None,
    batch_start: int = 0,
    microbatch_size: int | None = None,
) -> Operator:
    r"""The operator :math:`(\theta, v, b) \mapsto J^\top H_{\mathcal{L}} J v` of a model/loss split.

    With :math:`\mathcal{L}(\theta; b) = \ell(f(\theta, b), b)`, :math:`J` is the Jacobian of the model
    :math:`f` and :math:`H_{\mathcal{L}}` the Hessian of :math:`\ell` in the model's outputs. For a convex
    :math:`\ell` the matrix is positive semi-definite.

    Args:
      model_fn: ``(params, batch) -> outputs``, any pytree.
      output_loss_fn: ``(outputs, batch) -> loss``, a scalar mean over samples.
      batch_size: as in :func:`hessian`.
      batch_start: as in :func:`hessian`.
      microbatch_size: as in :func:`hessian`.

    Returns:
      An operator ``(params, vector, batch) -> vector``.

    Raises:
      ValueError: as :func:`hessian` does.

    Example:
      >>> import jax.numpy as jnp
      >>> operator = gauss_newton(lambda x, b: b * x, lambda z, b: 0.5 * jnp.sum(z**2))
      >>> operator(jnp.ones(2), jnp.asarray([1.0, 1.0]), jnp.asarray([1.0, 3.0]))
      Array([1., 9.], dtype=float32)

    References:
      Schraudolph, "Fast curvature matrix-vector products", Neural Computation 14 (2002).
    """
    check_functions(model_fn=model_fn, output_loss_fn=output_loss_fn)
    checked = checked_loss(output_loss_fn, has_aux=False, name="output_loss_fn")

    def product(params: Vector, vector: Vector, batch: Batch) -> Vector:
        outputs, pushforward = jax.linearize(lambda p: model_fn(p, batch), params)
        output_gradient = jax.grad(lambda z: checked(z, batch))
        _, curved = jax.jvp(output_gradient, (outputs,), (pushforward(vector),))
        return jax.linear_transpose(pushforward, params)(curved)[0]

    def checked_product(params: Vector, vector: Vector, batch: Batch) -> Vector:
        remedy = "give `model_fn` and `output_loss_fn` a custom_jvp in its place, or use dho2_optax.hessian"
        return forward_mode(lambda: product(params, vector, batch), remedy)

    return _batched(checked_product, batch_size, batch_start, microbatch_size)


def checked_loss(loss_fn: LossFn, *, has_aux: bool, name: str = "loss_fn") -> LossFn:
    """`loss_fn`, with an error that says what to do where it does not return what `has_aux` promises."""

    def loss(*args: Any) -> Any:
        try:
            result = loss_fn(*args)
        except Exception as error:
            remedy = _remedy(error, args[0])
            if remedy is None:
                raise
            raise ValueError(f"`{name}` {remedy}.") from error
        is_pair = isinstance(result, tuple | list) and len(result) == 2
        if has_aux and not is_pair:
            raise ValueError(
                f"`{name}` must return a pair (loss, aux) with has_aux=True, got {_kind_of(result)}; "
                "give has_aux=False where it returns the loss alone."
            )
        value = result[0] if has_aux else result
        if isinstance(value, tuple | list):
            raise ValueError(
                f"`{name}` must return a scalar, got {_kind_of(value)}; give has_aux=True where it returns (loss, aux)."
            )
        if not hasattr(value, "shape") and not isinstance(value, int | float):
            raise ValueError(f"`{name}` must return a scalar, got {_kind_of(value)}.")
        if jnp.shape(value):
            raise ValueError(f"`{name}` must return a scalar, got {_kind_of(value)}; take the mean over the samples.")
        return result

    return loss


def _remedy(error: Exception, params: Any) -> str | None:
    """What to do about an error of the user's function that comes of a model being no pytree of its parameters."""
    said = str(error)
    if "NoneType" in said and any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None)):
        return (
            "was called with the parameters, where None stands for what is none; of an Equinox module have it call "
            "eqx.combine(params, static), with params, static = eqx.partition(model, eqx.is_inexact_array)"
        )
    if "'State' object" in said and type(params).__name__ == "State":
        return (
            "was called with the parameters, an nnx.State, and not with the model; have it call nnx.merge(graphdef, "
            "params, rest, copy=True), with graphdef, params, rest = nnx.split(model, nnx.Param, ...)"
        )
    if type(error).__name__ == "TraceContextError":
        return (
            "changes variables of nnx from outside of it; have it make its own, by nnx.merge(graphdef, params, rest, "
            "copy=True)"
        )
    return None


def _kind_of(value: Any) -> str:
    return f"an array of shape {value.shape}" if hasattr(value, "shape") else f"a {type(value).__name__}"


def forward_mode(function: Callable[[], Any], remedy: str) -> Any:
    """What `function` returns, with an error that says what to do if a ``custom_vjp`` bars its derivative.

    Of such a function JAX would say so too, but not before it is compiled.
    """
    if _has_primitive(jax.make_jaxpr(function)().jaxpr, "custom_lin"):
        raise ValueError(f"forward-mode derivatives do not pass a function with a custom_vjp only; {remedy}.")
    return function()


def _has_primitive(jaxpr: Any, name: str) -> bool:
    for equation in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(equation.params.values()))]
        if equation.primitive.name == name or any(_has_primitive(x, name) for x in inner if hasattr(x, "eqns")):
            return True
    return False


def _batched(product: Operator, batch_size: int | None, batch_start: int, microbatch_size: int | None) -> Operator:
    """Restricts an operator to a sub-batch and accumulates it over microbatches."""
    check_sizes(batch_size=batch_size, microbatch_size=microbatch_size)
    if not is_int(batch_start):
        raise ValueError(f"`batch_start` must be a Python int, got {batch_start!r}.")
    if batch_start < 0:
        raise ValueError(f"`batch_start` must be non-negative, got {batch_start}.")
    samples = slice(batch_start, None if batch_size is None else batch_start + batch_size)

    def cut(batch: Batch) -> Batch:
        sampled = [x for x in jax.tree.leaves(batch) if _has_samples(x)]
        length = _common_length(sampled, "`batch_size` or `batch_start` take") if sampled else None
        if length is not None and length <= batch_start:
            raise ValueError(
                f"`batch_start` must leave some of the samples of the batch, got {batch_start} for {length}."
            )
        return jax.tree.map(lambda x: x[samples] if _has_samples(x) else x, batch)

    def operator(params: Vector, vector: Vector, batch: Batch) -> Vector:
        if samples != slice(0, None):
            batch = cut(batch)
        if microbatch_size is None:
            return product(params, vector, batch)
        return _accumulate(product, params, vector, batch, microbatch_size)

    return operator


def _accumulate(product: Operator, params: Vector, vector: Vector, batch: Batch, microbatch_size: int) -> Vector:
    """The mean of `product` over chunks of `microbatch_size` samples, one chunk in memory at a time."""
    leaves, treedef = jax.tree.flatten(batch)
    sampled = [x for x in leaves if _has_samples(x)]
    num_samples = {x.shape[0] for x in sampled}
    if len(num_samples) != 1 or min(num_samples) % microbatch_size:
        raise ValueError(
            f"`microbatch_size` must divide the number of samples, got {microbatch_size} for a batch whose "
            f"leading axes have lengths {sorted(num_samples)}."
        )
    num_chunks = num_samples.pop() // microbatch_size

    def add_chunk(total: Vector, chunk: list[jax.Array]) -> tuple[Vector, None]:
        rows = iter(chunk)
        microbatch = treedef.unflatten([next(rows) if _has_samples(x) else x for x in leaves])
        part = product(params, vector, microbatch)
        return jax.tree.map(lambda t, p: t + p.astype(t.dtype), total, part), None

    zero = jax.tree.map(lambda x: vectors.zeros_like(x, vectors.at_least_float32(x.dtype)), vector)
    chunks = [x.reshape(num_chunks, microbatch_size, *x.shape[1:]) for x in sampled]
    total, _ = lax.scan(add_chunk, zero, chunks)
    return jax.tree.map(lambda t, v: (t / num_chunks).astype(v.dtype), total, vector)


_AUTO_PART = 8  # products are made on one of so many parts of the batch
_AUTO_LEAST = 128  # and on no fewer samples, over all devices


def auto_size(length: int, num_devices: int) -> int:
    """On how many of a device's `length` samples products are made by default; it may be more than there are.

    Example:
      >>> auto_size(2000, 1), auto_size(250, 8)
      (250, 31)
    """
    return max(length // _AUTO_PART, -(-_AUTO_LEAST // num_devices))


def part_size(batch: Batch, batch_size: BatchSize, axis_name: str | None) -> int | None:
    """On how many samples of a batch products are made; None: on all of them.

    ``"auto"`` is an eighth of the batch, at least 128 samples over all devices, and the whole batch where that is not
    larger, or where its arrays have no common leading axis. A number is taken as it is.

    Args:
      batch: the local shard of the batch.
      batch_size: what the user said.
      axis_name: the mesh axis that the batch is split over, or None.

    Example:
      >>> [part_size(jnp.zeros(n), "auto", None) for n in (128, 129, 2000)]
      [None, 128, 250]
    """
    if batch_size != "auto":
        return batch_size
    sampled = [x for x in jax.tree.leaves(batch) if _has_samples(x)]
    lengths = {x.shape[0] for x in sampled}
    if len(lengths) != 1:
        return None
    num_devices = 1 if axis_name is None else segments.bound_axis_size(axis_name) or 1
    (length,) = lengths
    size = auto_size(length, num_devices)
    shards = _leading_shards(sampled)
    size = -(-size // shards) * shards
    return size if size < length else None


def part(batch: Batch, batch_size: BatchSize, axis_name: str | None) -> Batch:
    """The samples of a batch that products are made on: :func:`part_size` of them, spread over the whole of it.

    The batch is cut in as many pieces, and one sample is taken of each: which, is drawn once and for all when a program
    is traced. So samples that come in an order, as the points of a grid do, are all represented; the leading ones would
    be a corner of it, and every so-manieth one a few of its columns.

    Args:
      batch: the local shard of the batch.
      batch_size: what the user said.
      axis_name: the mesh axis that the batch is split over, or None.

    Raises:
      ValueError: if the batch has arrays of different lengths, of which a part cannot be taken.

    Example:
      >>> part(jnp.arange(2000), "auto", None)[:4], part(jnp.arange(3), 4, None)
      (Array([ 5, 10, 16, 24], dtype=int32), Array([0, 1, 2], dtype=int32))
    """
    size = part_size(batch, batch_size, axis_name)
    sampled = [x for x in jax.tree.leaves(batch) if _has_samples(x)]
    if size is None or not sampled:
        return batch
    length = _common_length(sampled, "`batch_size` takes")
    if size >= length:
        return batch
    shards = _leading_shards(sampled)
    rows = _one_of_each(length // shards, -(-size // shards))
    return jax.tree.map(lambda x: _rows(x, rows, shards) if _has_samples(x) else x, batch)


def hessian_on_part(loss_fn: LossFn, *, has_aux: bool, batch_size: BatchSize, axis_name: str | None) -> Operator:
    """:func:`hessian` on the :func:`part` of the batch that it is called with."""
    product = hessian(loss_fn, has_aux=has_aux)
    return lambda params, vector, batch: product(params, vector, part(batch, batch_size, axis_name))


def _one_of_each(length: int, size: int) -> np.ndarray:
    """The places of one sample of each of `size` pieces of `length` samples, drawn with a seed of our own."""
    edges = np.arange(size + 1) * length // size
    return edges[:-1] + (np.random.default_rng(0).random(size) * np.diff(edges)).astype(int)


def _rows(x: Any, rows: np.ndarray, shards: int) -> Any:
    """The same rows of each explicit shard of an array."""
    if shards == 1:
        return x[rows]
    sharding = jax.typeof(x).sharding
    spec = (sharding.spec[0], None, *sharding.spec[1:])
    pieces = x.reshape(shards, -1, *x.shape[1:], out_sharding=sharding.update(spec=spec))
    taken = pieces.at[:, rows].get(out_sharding=sharding.update(spec=spec))
    return taken.reshape(-1, *x.shape[1:], out_sharding=sharding)


def _common_length(sampled: Sequence[Any], who: str) -> int:
    lengths = {x.shape[0] for x in sampled}
    if len(lengths) > 1:
        raise ValueError(
            f"a batch of which {who} a part must have samples along the leading axis of every array, got lengths "
            f"{sorted(lengths)}; close over arrays that are not samples."
        )
    return lengths.pop()


def _has_samples(x: Any) -> bool:
    """Whether something in a batch is an array with a leading axis; all else is passed to the loss as it is."""
    return bool(getattr(x, "shape", ()))


def _leading_shards(sampled: Sequence[Any]) -> int:
    """In how many parts the leading axes of arrays are explicitly sharded; JAX cuts such in equal parts only."""

    def of_one(x: Any) -> int:
        if not vectors.is_explicitly_sharded(x):
            return 1
        sharding = jax.typeof(x).sharding
        leading = sharding.spec[0]
        names = leading if isinstance(leading, tuple) else () if leading is None else (leading,)
        return math.prod(sharding.mesh.shape[name] for name in names)

    return math.lcm(*map(of_one, sampled))


def segmented_matvec(
    operator: Operator, params: Vector, batch: Batch, axis_name: str | None
) -> Callable[[Packed], Packed]:
    r"""The matrix-vector product of a whole data-parallel group, on packed vectors in segment form.

    With :math:`H_p` the operator on the batch of device `p`, returns :math:`v \mapsto \frac1P \sum_p H_p v`:
    one all-gather of ``v``, the local product, one reduce-scatter (DHO2, arXiv 2505.00982, distributed Lanczos).
    The one place where curvature is averaged over devices.

    Args:
      operator: the curvature operator.
      params: the parameters, whole on every device.
      batch: the local shard of the batch.
      axis_name: the mesh axis, or None on one device.
    """
    # Autodiff inserts sums over the axis for values that do not vary over it; after the cast, local products
    # are local under either setting of `check_vma`.
    params = vectors.vary(params, axis_name)
    layout = Layout(params, axis_name)

    def matvec(segment: Packed) -> Packed:
        vector = layout.unpack(layout.gather(layout.cast(segment)))
        product = operator(params, vectors.vary(vector, axis_name), batch)
        return layout.mean(product)

    return matvec
