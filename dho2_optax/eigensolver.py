"""The extreme eigenpairs of a symmetric operator: selection, masks, and the eigensolver that finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dho2_optax import arguments, krylov, segments, vectors
from dho2_optax.arguments import INJECTION_HINT, is_int
from dho2_optax.krylov import LanczosState, RitzPairs
from dho2_optax.packing import Layout, Packed
from dho2_optax.vectors import Stack, Vector

Select = Literal["magnitude", "algebraic"]
_SELECTIONS = ("magnitude", "algebraic")
_MISSED = 0.01  # an eigenvector is missed with no more than about this probability
_PENDING = 6  # products that a direction left out is followed for before the next
_START_NOISE = 0.1  # share of noise in a warm start, relative to the old Ritz vectors


@arguments.as_written
class Spectrum(NamedTuple):
    r"""Extreme eigenpairs :math:`A v_i \approx \lambda_i v_i`.

    Ordered by decreasing magnitude, or for algebraic selection the smallest and then the largest, each ascending.

    Eigenvectors may be stored in a dtype shorter than float32, bfloat16 say. Then rows :math:`\tilde V` are stored that
    are orthonormal to its rounding only, and the eigenvectors are :math:`V = L \tilde V`, with a matrix :math:`L` in
    float32 for which :math:`V V^\top = I` to the rounding of float32. So are those of a Lanczos process that have not
    been written yet: :math:`\tilde V` is its basis then, and :math:`L` their coefficients, see :func:`unwritten`.
    """

    eigenvalues: jax.Array  # shape=(k,): Ritz values, masked ones included
    eigenvectors: Stack  # rows, orthonormal once multiplied by the orthonormalizer; those masked out are zero then
    residuals: jax.Array  # shape=(k,): |A v - lambda v|
    mask: jax.Array  # shape=(k,), dtype=bool: pairs that may be used
    orthonormalizer: Any = None  # L, shape=(k, rows); None, for the identity, where k rows are stored and none is short

    def combine(self, coefficients: jax.Array) -> Vector:
        r""":math:`\sum_i c_i v_i`; of a matrix of coefficients, a stack."""
        return vectors.combine(_times(coefficients, self.orthonormalizer), self.eigenvectors)

    def dots(self, vector: Vector, axis_name: str | None = None) -> jax.Array:
        r"""``(k,)`` inner products :math:`\langle v_i, x \rangle`."""
        return self.of_rows(vectors.dots(self.eigenvectors, vector, axis_name))

    def of_rows(self, products: jax.Array) -> jax.Array:
        """Products with the eigenvectors, along the leading axis, of those with the rows that are stored."""
        if self.orthonormalizer is None:
            return products
        return jnp.matmul(self.orthonormalizer, products, precision=jax.lax.Precision.HIGHEST)

    def orthonormal(self) -> Spectrum:
        """The same with the eigenvectors themselves as rows."""
        if self.orthonormalizer is None:
            return self
        return self._replace(eigenvectors=self.combine(jnp.eye(self.mask.size)), orthonormalizer=None)


def _times(coefficients: jax.Array, matrix: jax.Array | None) -> jax.Array:
    if matrix is None:
        return coefficients
    return jnp.matmul(coefficients.astype(matrix.dtype), matrix, precision=jax.lax.Precision.HIGHEST)


def orthonormalizer(gram: jax.Array) -> jax.Array:
    r"""The inverse of the Cholesky factor of the inner products of some rows, some of which may be zero.

    Example:
      >>> orthonormalizer(jnp.diag(jnp.asarray([4.0, 0.0]))).tolist()
      [[0.5, 0.0], [0.0, 1.0]]
    """
    lower = jnp.linalg.cholesky(gram + jnp.diag(jnp.where(jnp.diagonal(gram) == 0, 1, 0).astype(gram.dtype)))
    return jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(gram), dtype=gram.dtype), lower=True)


def check_search(num_smallest: Any, order: Any, select: Any) -> None:
    """Raises ValueError unless the arguments describe a selection of eigenpairs for some `rank`."""
    _check_count(num_smallest=num_smallest)
    if select not in _SELECTIONS:
        raise ValueError(f"`select` must be one of {_SELECTIONS}, got {select!r}.")
    if num_smallest and select == "magnitude":
        raise ValueError(
            f"`num_smallest` needs select='algebraic', got {num_smallest} with select='magnitude', which "
            "already takes the most negative eigenvalues where they are large."
        )
    if order is not None and (not is_int(order) or order < 1):
        raise ValueError(f"`order` must be an int of at least 1 or None, got {order!r}. {INJECTION_HINT}")


def check_selection(rank: Any, num_smallest: Any, order: Any, select: Any) -> None:
    """Raises ValueError unless the arguments describe a selection of eigenpairs."""
    _check_count(rank=rank)
    check_search(num_smallest, order, select)
    pairs = rank + num_smallest
    if pairs == 0:
        raise ValueError("`rank` must be positive, got 0.")
    if order is not None and order < pairs:
        raise ValueError(f"`order` must be an int of at least rank + num_smallest = {pairs}, got {order!r}.")


def _check_count(**values: Any) -> None:
    for name, value in values.items():
        if not is_int(value) or value < 0:
            raise ValueError(f"`{name}` must be a Python int of at least 0, got {value!r}. {INJECTION_HINT}")


def checked_like(like: Any) -> Vector:
    """`like` with arrays in place of Python numbers; raises ValueError unless it holds real floating-point numbers."""
    like = vectors.as_arrays(like)
    leaves = jax.tree.leaves(like)
    if sum(leaf.size for leaf in leaves) == 0:
        raise ValueError("`like` must hold at least one number, got an empty pytree.")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"`like` must hold floating-point leaves only, got one of dtype {leaf.dtype}.")
    return like


def zero_spectrum(num_pairs: int, like: Vector, dtype: Any = None) -> Spectrum:
    """A spectrum that leaves everything to the base: all pairs are masked out."""
    eigenvectors = vectors.zero_stack(num_pairs, like, dtype)
    dtype = vectors.accumulation_dtype(eigenvectors)
    # No array stands for two fields: a state with shared buffers could not be donated.
    return Spectrum(
        jnp.zeros(num_pairs, dtype),
        eigenvectors,
        jnp.zeros(num_pairs, dtype),
        jnp.zeros(num_pairs, bool),
        jnp.eye(num_pairs, dtype=dtype) if _is_short(eigenvectors) else None,
    )


def _is_short(stack: Stack) -> bool:
    return any(vectors.is_short(x.dtype) for x in jax.tree.leaves(stack))


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


class Wanted(NamedTuple):
    """The wanted Ritz pairs of a Lanczos process, in the order of :class:`Spectrum`."""

    values: jax.Array  # shape=(k,): zero for pairs that do not exist; so are the others
    residuals: jax.Array  # shape=(k,)
    coefficients: jax.Array  # shape=(k, order): the vectors, in the basis
    exists: jax.Array  # shape=(k,), dtype=bool


def wanted(pairs: RitzPairs, rank: int, num_smallest: int, select: Select) -> Wanted:
    """Those of all pairs that are wanted."""
    index, exists = selected(pairs, rank, num_smallest, select)
    coefficients = pairs.coefficients[:, index].T
    # Of the two signs the one that points along the start vector: a warm start adds the vectors up, and must not
    # depend on how rounding turned them.
    coefficients = jnp.where(coefficients[:, :1] < 0, -coefficients, coefficients)
    values, residuals = (jnp.where(exists, x[index], 0) for x in (pairs.values, pairs.residuals))
    return Wanted(values, residuals, coefficients, exists)


def usable(
    found: Wanted,
    max_residual: jax.typing.ArrayLike,
    *,
    drop_null: bool = False,
    partial: jax.typing.ArrayLike = False,
) -> jax.Array:
    r"""Whether each of the wanted pairs exists and has converged.

    That is, has a residual of at most ``max_residual * |lambda|_max``. Of a `partial` process, one that will go on, it
    is asked to be small against the pair's own eigenvalue: what else is steep is not known yet. With `drop_null` an
    eigenvalue that is zero to rounding, along which a Newton step has no meaning, is not usable.
    """
    magnitude = jnp.abs(found.values)
    mask = found.exists & (found.residuals <= max_residual * jnp.where(partial, magnitude, jnp.max(magnitude)))
    return mask & ~is_null(magnitude) if drop_null else mask


def unwritten(process: LanczosState, found: Wanted, mask: jax.Array) -> Spectrum:
    """The wanted pairs of a Lanczos process, with the vectors of those in `mask`, as combinations of its basis."""
    rotation = jnp.where(mask[:, None], found.coefficients, 0)
    return Spectrum(found.values, process.basis, found.residuals, mask, rotation)


def written_over(old: Spectrum, new: Spectrum, accept: jax.Array, axis_name: str | None) -> Spectrum:
    """A spectrum that is :func:`unwritten`, in the place of an old one; where not to `accept`, the old one.

    The compiler writes over the old eigenvectors where nothing else reads them after `accept` is known, so that there
    is no second copy of them: see :func:`dho2_optax.vectors.overwrite`.
    """
    overwrite = lambda x, y: vectors.overwrite(x, y, new.orthonormalizer, accept)  # noqa: E731
    rows = jax.tree.map(overwrite, old.eigenvectors, new.eigenvectors)
    lower = old.orthonormalizer
    if lower is not None:
        lower = jnp.where(accept, orthonormalizer(vectors.gram(rows, rows, axis_name)), lower)
    return Spectrum(
        eigenvalues=jnp.where(accept, new.eigenvalues, old.eigenvalues),
        eigenvectors=rows,
        residuals=jnp.where(accept, new.residuals, old.residuals),
        mask=jnp.where(accept, new.mask, old.mask),
        orthonormalizer=lower,
    )


def publish(process: LanczosState, found: Wanted, mask: jax.Array, axis_name: str | None = None) -> Spectrum:
    """The wanted pairs of a Lanczos process, with the vectors of those in `mask`; one pass over its basis.

    Of a basis that is stored in a short dtype one pass for each, and then their inner products, summed over the axis.
    """
    new = unwritten(process, found, mask)
    if not _is_short(process.basis):
        return new.orthonormal()

    def stored(coefficients: jax.Array) -> Vector:
        return vectors.cast_like(vectors.combine(coefficients, process.basis), process.basis)

    rows = jax.lax.map(stored, new.orthonormalizer)
    lower = orthonormalizer(vectors.gram(rows, rows, axis_name))
    return new._replace(eigenvectors=rows, orthonormalizer=lower)


def with_rayleigh_quotients(spectrum: Spectrum, matvec: Callable[[Vector], Vector], axis_name: str | None) -> Spectrum:
    r"""`spectrum` with eigenvalues :math:`\langle v_i, B v_i \rangle` of an operator of other samples, :math:`B`.

    A Lanczos process on few samples turns the vectors towards what is steep for just these, so its Ritz values are too
    large on average. A quotient with samples that the vectors have not seen is not. Masked pairs keep theirs.
    """

    def quotient(vector: Vector) -> jax.Array:
        return vectors.dot(vector, matvec(vector), axis_name)

    if spectrum.orthonormalizer is None:
        quotients = jax.lax.map(quotient, spectrum.eigenvectors)
    else:
        units = jnp.eye(spectrum.mask.size)
        quotients = jax.lax.map(lambda unit: quotient(spectrum.combine(unit)), units)
    quotients = quotients.astype(spectrum.eigenvalues.dtype)
    return spectrum._replace(eigenvalues=jnp.where(spectrum.mask, quotients, spectrum.eigenvalues))


def warm_start(spectrum: Spectrum, noise: Vector, carry: Callable[[Vector], Vector] = lambda x: x) -> Vector:
    """A start vector mixed from all eigenvectors of an old spectrum and noise, or noise alone if there is none.

    The old vectors make the process converge at once where the operator has changed little; the noise lets it find
    directions that they miss. `carry` takes a vector to another metric.
    """
    weights = spectrum.mask.astype(spectrum.eigenvalues.dtype)
    weights = weights / jnp.sqrt(jnp.maximum(jnp.sum(weights), 1))
    old = carry(spectrum.combine(weights))
    return jax.tree.map(lambda o, x: o.astype(x.dtype) + _START_NOISE * x, old, noise)


class _Search(NamedTuple):
    """A Lanczos process in sweeps, each from a vector orthogonal to all rows of those before.

    Sweeps begin at random vectors. One that ends before its space is invariant leaves a direction out, which may be all
    that a pair lacks; then another sweep begins there.
    """

    process: LanczosState
    sweep: jax.Array  # shape=(), dtype=int32: the first row of the sweep that took the last product
    is_random: jax.Array  # shape=(), dtype=bool: that sweep began at a random vector
    left: jax.Array  # shape=(order,): norm of what the product of a row adds to the space and no later row holds
    pending: Vector  # the direction that the last sweep left out
    owner: jax.Array  # shape=(), dtype=int32: the row whose product has it
    renew: jax.Array  # shape=(), dtype=int32: what a new sweep begins with next, one of the numbers below
    done: jax.Array  # shape=(), dtype=bool


_GO_ON, _AT_RANDOM, _AT_PENDING = 0, 1, 2


class _Findings(NamedTuple):
    """What a search knows of the wanted pairs."""

    wanted: Wanted
    certain: jax.Array  # shape=(k,), dtype=bool: converged, and nothing is missing before them
    renew: jax.Array  # shape=(), dtype=int32: see `_Search`


def _findings(
    search: _Search,
    rank: int,
    num_smallest: int,
    select: Select,
    tolerance: jax.typing.ArrayLike,
    size: int,
) -> _Findings:
    r"""Which of the wanted pairs have converged, and are certain of their place.

    What may be missing are eigenvectors orthogonal to the whole basis, as copies of a multiple eigenvalue are. The last
    sweep was a Lanczos process of :math:`m` products on that complement, from a random vector :math:`r`. Let its
    largest Ritz value be :math:`\mu` and all lie above :math:`\alpha`. An eigenvector :math:`v` of the complement with
    an eigenvalue of at least :math:`\tau > \mu` would have made :math:`\mu` larger, unless

    .. math::
        |\langle r, v \rangle| \le \sqrt{\frac{\mu - \alpha}{\tau - \mu}} \Big/ T_{m-1}(\gamma),
        \qquad \gamma = 1 + 2 \frac{\tau - \mu}{\mu - \alpha}

    with :math:`T` the Chebyshev polynomial (the Rayleigh quotient of :math:`T_{m-1}(A) r`, scaled to
    :math:`[\alpha, \mu]`, is no larger than :math:`\mu`). For a random :math:`r` in :math:`n` dimensions that has a
    probability of about :math:`0.8 \sqrt{n}` times the right hand side. A vector that is not
    random proves nothing.
    """
    process = search.process
    pairs = krylov.ritz(process, left=search.left)
    those = wanted(pairs, rank, num_smallest, select)
    values = those.values
    largest = jnp.max(jnp.abs(values))
    converged = usable(those, tolerance)
    # Eigenvalues that differ by less are equal.
    slack = (2 * tolerance + 16 * jnp.finfo(values.dtype).eps) * largest
    unsettled = (jnp.arange(pairs.values.size) < pairs.num_valid) & (pairs.residuals > tolerance * largest)

    last = krylov.ritz(process, search.sweep)
    in_sweep = jnp.arange(last.values.size) < last.num_valid
    whole = (process.restart == process.count) & (process.beta == 0)  # the sweep has run into a breakdown

    def beyond(sign: int, places: jax.Array) -> tuple[jax.Array, ...]:
        """Of `places`: whether nothing is hidden beyond them, and whether all that reaches there has converged.

        Of the last sweep: whether its extreme pair belongs among them, and whether it has converged.
        """
        edge = places + slack
        top = jnp.max(jnp.where(in_sweep, sign * last.values, -jnp.inf))
        width = top - jnp.min(jnp.where(in_sweep, sign * last.values - last.residuals, jnp.inf))
        gap = jnp.maximum(edge - top, 0)
        ratio = width / jnp.where(gap > 0, gap, 1)
        growth = jnp.arccosh(1 + 2 / jnp.where(ratio > 0, ratio, 1))
        chance = jnp.sqrt(float(size) * ratio) * 2 * jnp.exp(-(last.num_valid - 1) * growth)
        none_hidden = jnp.where(whole, top <= edge, (gap > 0) & (chance <= _MISSED))
        reach = jnp.max(jnp.where(unsettled, sign * pairs.values + pairs.residuals, -jnp.inf))
        certain = none_hidden & search.is_random | process.exhausted
        extreme = jnp.max(jnp.where(in_sweep & (sign * last.values >= top), last.residuals, 0))
        return certain, reach <= edge, top >= places - slack, jnp.atleast_1d(extreme <= tolerance * largest)

    if select == "magnitude":
        sides = [beyond(sign, jnp.abs(values)) for sign in (1, -1)]
        none_hidden, reached = (sides[0][i] & sides[1][i] for i in (0, 1))
    else:
        sides = [beyond(-1, -values[:num_smallest]), beyond(1, values[num_smallest:])]
        none_hidden, reached = (jnp.concatenate([side[i] for side in sides]) for i in (0, 1))
    found, settled = (jnp.any(jnp.concatenate([side[i] for side in sides])) for i in (2, 3))
    sound = jnp.all(converged & reached)
    stuck = ~sound & jnp.where(search.is_random, settled, last.num_valid >= _PENDING) & (search.owner >= 0)
    renew = jnp.where(sound & (found | ~search.is_random), _AT_RANDOM, jnp.where(stuck, _AT_PENDING, _GO_ON))
    renew = jnp.where(process.restart < process.count, renew, _GO_ON)
    return _Findings(those, converged & reached & none_hidden, renew)


def _advance(
    search: _Search,
    matvec: Callable[[Packed], Packed],
    layout: Layout,
    findings: Callable[[_Search], _Findings],
    confine: bool,
) -> _Search:
    """One product more, or the first vector of a new sweep."""
    old = search.process
    row, begins, order = old.count, search.renew > 0, old.projected.shape[0]

    def start_vector(vector: Vector, pending: Vector) -> Vector:
        # Zero is a breakdown, which a random vector follows.
        factor = jnp.where(search.renew == _AT_PENDING, old.scale, 0)
        return vectors.cast_like(vectors.scale(factor, pending), vector)

    product = jax.lax.cond(begins, start_vector, lambda v, _: matvec(v), old.vector, search.pending)
    # A sweep that ended before its space was invariant is coupled to the next ones. The coefficients are part of
    # the projected matrix; without them a sweep is a Lanczos process by itself.
    earlier = (jnp.arange(order) < old.restart) & ~begins
    coupling = jnp.where(earlier, vectors.dots(old.basis, product, layout.axis_name), 0)
    product = vectors.subtract(product, vectors.combine(coupling, old.basis))
    before = old._replace(count=row - begins.astype(jnp.int32))
    process = krylov.extend(before, product, layout, confine=confine)
    coupled = process.projected.at[:, row].add(coupling).at[row].add(coupling)
    process = process._replace(
        projected=jnp.where(begins, old.projected.at[row, row - 1].set(0), coupled),
        beta=jnp.where(begins, 0, process.beta),
        restart=jnp.where(begins, row, process.restart),
    )
    held = jnp.where(search.left > 0, coupling / jnp.where(search.left > 0, search.left, 1), 0)
    left = search.left * jnp.sqrt(jnp.maximum(1 - held**2, 0))
    left = jnp.where((search.renew == _AT_PENDING) & (jnp.arange(order) == search.owner), 0, left)
    left = jnp.where(begins & (jnp.arange(order) == row - 1), old.beta, left)
    now = search._replace(
        process=process,
        sweep=jnp.where(begins, row, old.restart),
        is_random=jnp.where(
            begins, search.renew == _AT_RANDOM, search.is_random | ((old.restart == row) & (search.sweep < row))
        ),
        left=jnp.where(process.exhausted, 0, left),
        pending=jax.tree.map(lambda new, kept: jnp.where(begins, new, kept), old.vector, search.pending),
        owner=jnp.where(begins, row - 1, search.owner),
    )

    def look(small: _Search) -> tuple[jax.Array, jax.Array]:
        found = findings(small)
        return found.renew.astype(jnp.int32), jnp.all(found.certain)

    due = ~begins & ((process.count % krylov.CHECK_EVERY == 0) | (process.restart > 0))
    small = now._replace(process=process._replace(basis=()), pending=())
    renew, done = jax.lax.cond(due, look, lambda _: (jnp.zeros((), jnp.int32), jnp.zeros((), bool)), small)
    return now._replace(renew=renew, done=done)


def lanczos(
    matvec: Callable[[Vector], Vector],
    like: Vector,
    *,
    rank: int,
    order: int | None = None,
    tolerance: jax.typing.ArrayLike | None = None,
    select: Select = "magnitude",
    num_smallest: int = 0,
    key: jax.Array | None = None,
    start: Vector | None = None,
    axis_name: str | None = None,
) -> Spectrum:
    r"""Extreme eigenpairs of a symmetric operator on pytrees, by Lanczos with full reorthogonalisation.

    Builds an orthonormal basis :math:`Q` of Krylov spaces of the operator :math:`A` and returns the
    Rayleigh-Ritz pairs of :math:`Q A Q^\top` of largest magnitude (or algebraically largest). Stops as soon as all
    wanted pairs satisfy :math:`\|A v_i - \lambda_i v_i\| \le` ``tolerance`` :math:`\cdot |\lambda|_{\max}` and are
    certain of their place. Runs in float32 unless a leaf is float64, under ``jit`` or not.

    A Krylov space holds one eigenvector of a multiple eigenvalue and no other copy. So once the wanted pairs have
    converged, another sweep starts from a random vector orthogonal to the whole basis, and so on until a sweep finds
    nothing that belongs among them. A pair is usable if it has converged and nothing can be missing before it. That is
    proven where the basis spans the whole space, and else probable: an eigenvector stays hidden if the random vector of
    the last sweep has next to no part along it, which happens about once in a hundred times at most. The last sweep
    takes some five products where the spectrum falls off behind the wanted pairs, and more where it hardly does.
    Eigenvalues that differ by less than about twice the tolerance count as equal.

    Args:
      matvec: the operator, linear and symmetric, from a pytree shaped like `like` to another.
      like: a pytree of arrays that gives the shapes and dtypes of a vector; its values are not used.
      rank: how many eigenpairs.
      order: the largest number of matvecs, and of basis vectors kept. Default: ``4 * (rank + num_smallest) + 8``.
        A spectrum with small gaps needs more, and so does one with multiple eigenvalues. Where it does not suffice to
        be certain, pairs are masked out.
      tolerance: largest relative residual; pairs above it are masked out, with their Ritz value and residual kept.
        Default: 5e-6, or four rounding errors of the shortest dtype in `like` if that is more (0.004 for float16, 0.03
        for bfloat16).
      select: ``"magnitude"`` or ``"algebraic"`` (the largest, preceded by `num_smallest` smallest).
      num_smallest: with ``select="algebraic"``, how many of the smallest eigenvalues.
      key: a random key for the start vector. Default: a fixed one.
      start: a start vector, instead of a random one. With a random one and ``select="magnitude"`` eigenvectors are
        exactly zero at coordinates whose row of the operator is zero; the zero eigenvalues that belong to these alone
        are not among the pairs.
      axis_name: a mesh axis over which the basis is split, inside ``shard_map`` or ``pmap``. Then `matvec` takes and
        returns whole vectors that are the same on every device, and the eigenvectors come in segment form.

    Returns:
      A :class:`Spectrum`, with eigenvectors of float32 or float64 stacked on a leading axis.

    Raises:
      ValueError: if `rank`, `order`, `select` or `num_smallest` is out of range, or `like` has no numbers or
        leaves that are not real floating-point numbers.

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
    if tolerance is not None:
        arguments.check_numbers("non-negative", tolerance=tolerance)
    segments.check_bound(axis_name)
    like = checked_like(like)
    leaves = jax.tree.leaves(like)
    size = sum(leaf.size for leaf in leaves)
    num_pairs = rank + num_smallest
    order = 4 * num_pairs + 8 if order is None else order
    if tolerance is None:
        tolerance = max(5e-6, *(4 * float(jnp.finfo(leaf.dtype).eps) for leaf in leaves))
    seed = jnp.uint32(0) if key is None else jax.random.bits(key)
    layout = Layout(like, axis_name)
    if start is None:
        first = layout.random(seed)
    else:
        start = jax.tree.map(lambda x: x.astype(vectors.at_least_float32(x.dtype)), start)
        peak = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(start)]))
        first = layout.split(vectors.scale(1 / peak, start))

    def segment_matvec(segment: Packed) -> Packed:
        vector = layout.unpack(layout.gather(layout.cast(segment)))
        return vectors.cast_like(layout.split(matvec(vector)), segment)

    def findings(search: _Search) -> _Findings:
        return _findings(search, rank, num_smallest, select, tolerance, size)

    def unfinished(search: _Search) -> jax.Array:
        process = search.process
        return (process.count < order) & ~search.done & ~process.exhausted & jnp.isfinite(process.beta)

    # A vector that is given may have zeros of its own, and an eigenvalue of zero may be one of the largest.
    confine = start is None and select == "magnitude"
    process = krylov.start(first, order, seed=seed, axis_name=axis_name)
    search = _Search(
        process=process,
        sweep=jnp.zeros((), jnp.int32),
        is_random=jnp.asarray(start is None),
        left=jnp.zeros(order, process.beta.dtype),
        pending=process.vector,
        owner=jnp.full((), -1, jnp.int32),
        renew=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
    )
    search = jax.lax.while_loop(
        unfinished, lambda search: _advance(search, segment_matvec, layout, findings, confine), search
    )
    found = findings(search)
    spectrum = publish(search.process, found.wanted, found.certain)
    unpack = layout.unpack if axis_name is None else layout.unpack_segments
    return spectrum._replace(eigenvectors=jax.vmap(unpack)(spectrum.eigenvectors))
