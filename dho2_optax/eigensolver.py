"""The extreme eigenpairs of a symmetric operator: selection, masks, and the eigensolver that finds them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dho2_optax import arguments, krylov, segments, vectors
from dho2_optax.arguments import STATIC_HINT, is_int
from dho2_optax.krylov import LanczosState, RitzPairs
from dho2_optax.vectors import Stack, Vector

Select = Literal["magnitude", "algebraic"]
_SELECTIONS = ("magnitude", "algebraic")
_START_NOISE = 0.1  # share of noise in a warm start, relative to the old Ritz vectors


class Spectrum(NamedTuple):
    r"""Extreme eigenpairs :math:`A v_i \approx \lambda_i v_i`.

    Ordered by decreasing magnitude, or for algebraic selection the smallest and then the largest, each ascending.
    """

    eigenvalues: jax.Array  # shape=(k,): Ritz values, masked ones included
    eigenvectors: Stack  # k rows, orthonormal; rows masked out are zero
    residuals: jax.Array  # shape=(k,): |A v - lambda v|
    mask: jax.Array  # shape=(k,), dtype=bool: pairs that may be used


def check_selection(rank: Any, num_smallest: Any, order: Any, select: Any) -> None:
    """Raises ValueError unless the arguments describe a selection of eigenpairs."""
    for name, value, least in (("rank", rank, 0), ("num_smallest", num_smallest, 0)):
        if not is_int(value) or value < least:
            raise ValueError(f"`{name}` must be a Python int of at least {least}, got {value!r}. {STATIC_HINT}")
    if rank + num_smallest == 0:
        raise ValueError("`rank` must be positive, got 0.")
    if select not in _SELECTIONS:
        raise ValueError(f"`select` must be one of {_SELECTIONS}, got {select!r}.")
    if num_smallest and select == "magnitude":
        raise ValueError(
            f"`num_smallest` needs select='algebraic', got {num_smallest} with select='magnitude', which "
            "already takes the most negative eigenvalues where they are large."
        )
    if order is not None and (not is_int(order) or order < rank + num_smallest):
        raise ValueError(
            f"`order` must be an int of at least rank + num_smallest = {rank + num_smallest}, got {order!r}."
        )


def zero_spectrum(num_pairs: int, like: Vector, dtype: Any = None) -> Spectrum:
    """A spectrum that leaves everything to the base: all pairs are masked out."""
    eigenvectors = vectors.zero_stack(num_pairs, like, dtype)
    dtype = vectors.accumulation_dtype(eigenvectors)
    # No array stands for two fields: a state with shared buffers could not be donated.
    return Spectrum(jnp.zeros(num_pairs, dtype), eigenvectors, jnp.zeros(num_pairs, dtype), jnp.zeros(num_pairs, bool))


def selected(pairs: RitzPairs, rank: int, num_smallest: int, select: Select) -> tuple[jax.Array, jax.Array]:
    """Indices of the wanted pairs and whether each exists, both of shape ``(rank + num_smallest,)``."""
    order = pairs.values.size
    valid = jnp.arange(order) < pairs.num_valid
    if select == "magnitude":
        by_magnitude = jnp.argsort(jnp.where(valid, -jnp.abs(pairs.values), jnp.inf))
        index = by_magnitude[:rank]
        return index, valid[index]
    smallest = jnp.arange(num_smallest)
    largest = pairs.num_valid - rank + jnp.arange(rank)
    # A short basis gives every pair once: the largest first, then the smallest.
    exists = jnp.concatenate([smallest < pairs.num_valid - rank, largest >= 0])
    return jnp.clip(jnp.concatenate([smallest, largest]), 0, order - 1), exists


def is_null(magnitude: jax.Array) -> jax.Array:
    """Which of some eigenvalues, given by magnitude, are zero to rounding."""
    largest = jnp.max(magnitude, axis=-1, keepdims=True)
    return ~(magnitude > 4 * jnp.finfo(magnitude.dtype).eps * largest)


def usable(
    pairs: RitzPairs,
    rank: int,
    num_smallest: int,
    select: Select,
    max_residual: jax.typing.ArrayLike,
    *,
    drop_null: bool = False,
    partial: jax.typing.ArrayLike = False,
) -> tuple[jax.Array, jax.Array]:
    r"""Indices of the wanted pairs, and whether each exists and has converged.

    That is, has a residual of at most ``max_residual * |lambda|_max``. Of a `partial` process, one that will go on, it
    is asked to be small against the pair's own eigenvalue: what else is steep is not known yet. With `drop_null` an
    eigenvalue that is zero to rounding, along which a Newton step has no meaning, is not usable.
    """
    index, exists = selected(pairs, rank, num_smallest, select)
    magnitude = jnp.where(exists, jnp.abs(pairs.values[index]), 0)
    largest = jnp.max(magnitude)
    mask = exists & (pairs.residuals[index] <= max_residual * jnp.where(partial, magnitude, largest))
    if drop_null:
        mask = mask & ~is_null(magnitude)
    return index, mask


def converged(
    rank: int, num_smallest: int, select: Select, tolerance: jax.typing.ArrayLike
) -> Callable[[RitzPairs], jax.Array]:
    r"""The stopping rule: every wanted pair has a residual of at most ``tolerance * |lambda|_max``."""

    def is_done(pairs: RitzPairs) -> jax.Array:
        return jnp.all(usable(pairs, rank, num_smallest, select, tolerance)[1])

    return is_done


def publish(
    state: LanczosState,
    rank: int,
    num_smallest: int,
    select: Select,
    max_residual: jax.typing.ArrayLike,
    *,
    drop_null: bool = False,
    partial: jax.typing.ArrayLike = False,
) -> Spectrum:
    r"""The wanted Ritz pairs of a Lanczos process; one pass over its basis.

    Pairs that are not :func:`usable` are masked out.
    """
    pairs = krylov.ritz(state)
    index, exists = selected(pairs, rank, num_smallest, select)
    eigenvalues = jnp.where(exists, pairs.values[index], 0)
    residuals = jnp.where(exists, pairs.residuals[index], 0)
    mask = usable(pairs, rank, num_smallest, select, max_residual, drop_null=drop_null, partial=partial)[1]
    coefficients = pairs.coefficients[:, index].T
    # Of the two signs the one that points along the start vector: a warm start adds the vectors up, and must not
    # depend on how rounding turned them.
    coefficients = jnp.where(coefficients[:, :1] < 0, -coefficients, coefficients)
    rotation = jnp.where(mask[:, None], coefficients, 0)
    return Spectrum(eigenvalues, vectors.combine(rotation, state.basis), residuals, mask)


def with_rayleigh_quotients(spectrum: Spectrum, matvec: Callable[[Vector], Vector], axis_name: str | None) -> Spectrum:
    r"""`spectrum` with eigenvalues :math:`\langle v_i, B v_i \rangle` of an operator of other samples, :math:`B`.

    A Lanczos process on few samples turns the vectors towards what is steep for just these, so its Ritz values are too
    large on average. A quotient with samples that the vectors have not seen is not. Masked pairs keep theirs.
    """

    def quotient(vector: Vector) -> jax.Array:
        return vectors.dot(vector, matvec(vector), axis_name)

    quotients = jax.lax.map(quotient, spectrum.eigenvectors).astype(spectrum.eigenvalues.dtype)
    return spectrum._replace(eigenvalues=jnp.where(spectrum.mask, quotients, spectrum.eigenvalues))


def warm_start(spectrum: Spectrum, noise: Vector, carry: Callable[[Vector], Vector] = lambda x: x) -> Vector:
    """A start vector mixed from all eigenvectors of an old spectrum and noise, or noise alone if there is none.

    The old vectors make the process converge at once where the operator has changed little; the noise lets it find
    directions that they miss. `carry` takes a vector to another metric.
    """
    weights = spectrum.mask.astype(spectrum.eigenvalues.dtype)
    weights = weights / jnp.sqrt(jnp.maximum(jnp.sum(weights), 1))
    old = carry(vectors.combine(weights, spectrum.eigenvectors))
    return jax.tree.map(lambda o, x: o.astype(x.dtype) + _START_NOISE * x, old, noise)


def lanczos(
    matvec: Callable[[Vector], Vector],
    like: Vector,
    *,
    rank: int,
    order: int | None = None,
    tolerance: jax.typing.ArrayLike = 5e-6,
    select: Select = "magnitude",
    num_smallest: int = 0,
    key: jax.Array | None = None,
    start: Vector | None = None,
    axis_name: str | None = None,
) -> Spectrum:
    r"""Extreme eigenpairs of a symmetric operator on pytrees, by Lanczos with full reorthogonalisation.

    Builds an orthonormal basis :math:`Q` of the Krylov space of the operator :math:`A` and returns the
    Rayleigh-Ritz pairs of :math:`Q A Q^\top` of largest magnitude (or algebraically largest). Stops as soon as all
    wanted pairs satisfy :math:`\|A v_i - \lambda_i v_i\| \le` ``tolerance`` :math:`\cdot |\lambda|_{\max}`.
    Runs in float32 unless a leaf is float64, under ``jit`` or not.

    Args:
      matvec: the operator, linear and symmetric, from a pytree shaped like `like` to another.
      like: a pytree of arrays that gives the shapes and dtypes of a vector; its values are not used.
      rank: how many eigenpairs.
      order: the largest number of matvecs, and of basis vectors kept. Default: ``4 * (rank + num_smallest)``.
        A spectrum with small gaps needs more.
      tolerance: largest relative residual; pairs above it are masked out, with their Ritz value and residual kept.
      select: ``"magnitude"`` or ``"algebraic"`` (the largest, preceded by `num_smallest` smallest).
      num_smallest: with ``select="algebraic"``, how many of the smallest eigenvalues.
      key: a random key for the start vector. Default: a fixed one.
      start: a start vector, instead of a random one.
      axis_name: a mesh axis over which the basis is split, inside ``shard_map`` or ``pmap``. Then `matvec` takes and
        returns whole vectors that are the same on every device, and the eigenvectors come in segment form.

    Returns:
      A :class:`Spectrum`, with eigenvectors of float32 or float64 stacked on a leading axis.

    Raises:
      ValueError: if `rank`, `order`, `select` or `num_smallest` is out of range, or `like` has no numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> diagonal = jnp.asarray([5.0, -9.0, 1.0, 0.5])
      >>> found = lanczos(lambda x: diagonal * x, jnp.zeros(4), rank=2)
      >>> [round(float(value), 4) for value in found.eigenvalues]
      [-9.0, 5.0]

    References:
      Golub and Van Loan, *Matrix Computations*, chapter 10; FOSI, arXiv 2302.08484, algorithm 1.
    """
    check_selection(rank, num_smallest, order, select)
    arguments.check_numbers("non-negative", tolerance=tolerance)
    segments.check_bound(axis_name)
    like = vectors.as_arrays(like)
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    if size == 0:
        raise ValueError("`like` must hold at least one number, got an empty pytree.")
    num_pairs = rank + num_smallest
    order = 4 * num_pairs if order is None else order
    seed = jnp.uint32(0) if key is None else jax.random.bits(key)
    first = krylov.random_vector(seed, like, axis_name) if start is None else segments.split(start, axis_name)

    def segment_matvec(segment: Vector) -> Vector:
        vector = segments.gather(vectors.cast_like(segment, like), like, axis_name)
        return segments.split(matvec(vector), axis_name)

    state = krylov.run(
        segment_matvec,
        krylov.start(first, order, seed=seed, axis_name=axis_name),
        like,
        is_done=converged(rank, num_smallest, select, tolerance),
        min_matvecs=num_pairs + 1,
        axis_name=axis_name,
    )
    return publish(state, rank, num_smallest, select, tolerance)
