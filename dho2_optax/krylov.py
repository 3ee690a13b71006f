r"""The Lanczos recurrence as a small state machine: ``start -> extend(w) -> ritz``, or ``run`` for all of it.

Lanczos tridiagonalisation in its Rayleigh-Ritz form: with :math:`q_j` the rows of the basis and
:math:`w_j = A q_j`, the whole projected matrix :math:`T_{ij} = \langle q_i, w_j \rangle` is kept and
symmetrised, because in streaming use the operator moves while it is probed. One matvec is one
:func:`extend`, which never calls the operator itself.

Orthogonality. Every new vector is orthogonalised twice: against its two predecessors, with the coefficients of the
three-term recurrence, and against the whole basis. In float32 that keeps :math:`\|QQ^\top - I\|` near 1e-6, and no
float64 is needed. Where the basis fills a good part of the space a further pass follows ("twice is enough": Daniel,
Gragg, Kaufman, Stewart, Math. Comp. 30 (1976)).

A basis may be stored in a dtype shorter than float32, bfloat16 say. Rounding is then a part of the basis and not of the
arithmetic: what is multiplied by the operator, and what all else is orthogonalised against, are the rows as they are
stored, and the projected matrix is theirs. They are orthonormal to the rounding :math:`\epsilon` of that dtype. So a
pass leaves a part :math:`\epsilon` of what it takes out, and there is one more against the whole basis. It comes before
the question whether the space is invariant, since the first pass leaves :math:`\epsilon` of a product even where it is.
What rounding takes off a new row is missing from the space; it counts as residual, see :func:`rounded_off`.

Vectors are packed (:mod:`dho2_optax.packing`), possibly in segment form over a mesh axis. A matvec then adds four
``psum``s of at most ``order`` numbers, and one more where the basis is short.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from dho2_optax import segments, vectors
from dho2_optax.packing import Layout
from dho2_optax.vectors import Stack, Vector

Found = TypeVar("Found")

CHECK_EVERY = 4  # matvecs between two looks at the Ritz residuals
_FILLS = 8  # a basis of more than 1/8 of the space's dimension is orthogonalised once more
_BREAKDOWN = 4  # a product that adds less than this many rounding errors to the space adds nothing


class LanczosState(NamedTuple):
    """A Lanczos process between two matvecs."""

    basis: Stack  # `order` rows, orthonormal up to and with row `count`; what lies beyond means nothing
    projected: jax.Array  # shape=(order, order): column j holds <q_i, A q_j>
    beta: jax.Array  # shape=(): norm of what the last product adds to the space
    scale: jax.Array  # shape=(): largest norm of a product so far, an estimate of |A|
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # shape=(), dtype=int32: products taken so far
    restart: jax.Array  # shape=(), dtype=int32: `count` at the last breakdown, 0 if there was none
    exhausted: jax.Array  # shape=(), dtype=bool: the basis spans the whole space
    seed: jax.Array  # shape=(), dtype=uint32: for the random vectors that follow a breakdown

    @property
    def vector(self) -> Vector:
        """The next vector to be multiplied, row `count`: of unit norm, or zero once the space is exhausted.

        As it is stored, in at least float32.
        """
        order = self.projected.shape[0]
        return vectors.lengthened(vectors.row(self.basis, jnp.minimum(self.count, order - 1)))


class RitzPairs(NamedTuple):
    r"""Eigenpairs of the projected matrix in ascending order, `num_valid` of them meaningful."""

    values: jax.Array  # shape=(order,)
    residuals: jax.Array  # shape=(order,): |A y - theta y| of each pair
    coefficients: jax.Array  # shape=(order, order): column i holds y_i in the basis
    num_valid: jax.Array  # shape=(), dtype=int32


def start(
    vector: Vector, order: int, *, seed: jax.Array, axis_name: str | None = None, dtype: Any = None
) -> LanczosState:
    """A process of at most `order` products that starts at `vector`, of any non-zero norm."""
    return _begin(vectors.zero_stack(order, vector, dtype), order, vector, seed, axis_name)


def restart(state: LanczosState, vector: Vector, *, seed: jax.Array, axis_name: str | None = None) -> LanczosState:
    """A new process that starts at `vector` in the buffers of `state`."""
    return _begin(state.basis, state.projected.shape[0], vector, seed, axis_name)


def _begin(basis: Stack, order: int, vector: Vector, seed: jax.Array, axis_name: str | None) -> LanczosState:
    number = vectors.accumulation_dtype(basis)
    unit = vectors.scale(1 / vectors.norm(vector, segments.bound_axis(axis_name)), vector)
    # No array stands for two fields: a state with shared buffers could not be donated.
    return LanczosState(
        basis=vectors.set_row(basis, 0, unit),
        projected=jnp.zeros((order, order), number),
        beta=jnp.zeros((), number),
        scale=jnp.zeros((), number),
        count=jnp.zeros((), jnp.int32),
        restart=jnp.zeros((), jnp.int32),
        exhausted=jnp.zeros((), bool),
        seed=seed.astype(jnp.uint32),
    )


def is_finite(state: LanczosState) -> jax.Array:
    """Whether all products taken so far were finite."""
    return jnp.all(jnp.isfinite(state.projected)) & jnp.isfinite(state.beta)


def _project_out(
    basis: Stack, j: jax.Array, vector: Vector, w: Vector, axis_name: str | None
) -> tuple[Vector, jax.Array, jax.Array]:
    """One classical Gram-Schmidt pass: ``w - Q'Qw``, the coefficients ``Qw``, and the norm that is left.

    With :math:`Q` the rows of the basis before `j`, and `vector` as row `j`.
    """
    local = jnp.append(vectors.dots(basis, w), vectors.dot(vector, w))
    sums = local if axis_name is None else lax.psum(local, axis_name)
    row = jnp.arange(sums.size - 1)
    before = jnp.where(row < j, sums[:-1], 0)
    seen = vectors.combine(before, basis)
    w = jax.tree.map(
        lambda x, s, q: x - s.astype(x.dtype) - sums[-1].astype(x.dtype) * q.astype(x.dtype), w, seen, vector
    )
    return w, jnp.where(row == j, sums[-1], before), vectors.norm(w, axis_name)


def extend(state: LanczosState, product: Vector, layout: Layout, *, confine: bool = True) -> LanczosState:
    """Takes ``product = A state.vector`` in and finds the next vector.

    The basis is written at the end, with values that depend on everything that reads it, and no conditional reads it:
    else the compiler would copy it, at the cost of several passes.

    Args:
      state: the process, neither exhausted nor at its last row.
      product: the operator applied to ``state.vector``, packed, in segment form.
      layout: of the vectors.
      confine: take the coordinates in which the first product is exactly zero out of the start vector and of all random
        vectors. The operator does nothing there, if the start vector has random parts everywhere: the rows of its
        matrix, and so its columns, are zero, and so are its eigenvectors there, unless their eigenvalue is zero.
    """
    j, axis_name, vector = state.count, layout.axis_name, state.vector
    order, number = state.projected.shape[0], state.beta.dtype
    limits = jnp.finfo(number)

    # The sum of magnitudes is the unit of the product: unlike a square it neither over- nor underflows.
    live = jax.tree.map(lambda x, q: jnp.where(x != 0, q, 0), product, vector)
    size = sum(jnp.sum(jnp.abs(x.astype(number))) for x in jax.tree.leaves(product))
    local = jnp.stack([vectors.dot(vector, product), jnp.asarray(size, number), vectors.dot(live, live)])
    alpha, size, square = local if axis_name is None else lax.psum(local, axis_name)
    # Numbers near the ends of the dtype's range, and a jump that no operator makes between two products, which is an
    # overflow on its way, count as not finite.
    ends = limits.tiny / limits.eps, limits.max * jnp.sqrt(limits.eps)
    lost = ~jnp.isfinite(alpha) | ~(size < ends[1]) | (size > 0) & (jnp.maximum(size, state.scale) < ends[0])
    lost = lost | (state.scale > 0) & (limits.eps**2 * size > state.scale)
    # A M q = A q with M the projection on the coordinates that are not dead: M q / |M q| takes the place of q.
    shrinks = confine & (j == 0) & ~lost & (square > 0)
    shrink = jnp.where(shrinks, lax.rsqrt(jnp.where(shrinks, square, 1)), 1)
    alpha, unit = alpha * shrink**2, size * shrink
    vector = jax.tree.map(lambda x, q: jnp.where(shrinks, shrink.astype(q.dtype) * x, q), live, vector)
    basis, previous = state.basis, vectors.lengthened(vectors.row(state.basis, jnp.maximum(j - 1, 0)))

    # The first pass, by the three-term recurrence, in that unit: w - alpha_j q_j - beta_{j-1} q_{j-1}.
    inverse_size, inverse_unit = (jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0) for x in (size, unit))
    a, b = alpha * inverse_unit, state.beta * inverse_unit

    def subtract(x: jax.Array, q: jax.Array, p: jax.Array) -> jax.Array:
        w = inverse_size * x.astype(number) - a * q.astype(number) - b * p.astype(number)
        return w.astype(q.dtype)

    w = jax.tree.map(subtract, product, vector, previous)
    shortest = [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(basis) if vectors.is_short(x.dtype)]
    if shortest:
        least, rounding = max(shortest) ** 2, max(shortest)
        w, early, added = _project_out(basis, j, vector, w, axis_name)
    else:
        least, rounding, early, added = _BREAKDOWN * limits.eps, limits.eps, None, vectors.norm(w, axis_name)
    scale = jnp.maximum(state.scale, jnp.where(lost, jnp.nan, unit * jnp.sqrt(added**2 + a**2 + b**2)))

    # Breakdown: the basis spans an invariant subspace. Go on from a random vector.
    breakdown = unit * added <= least * scale

    def fresh(w: Vector) -> tuple[Vector, jax.Array]:
        random = vectors.cast_like(layout.noise(state.seed + j.astype(jnp.uint32) + 1), w)
        if confine:  # where this vector is zero, the first one was
            random = jax.tree.map(lambda x, q: jnp.where(q != 0, x, 0), random, vector)
        return random, vectors.norm(random, axis_name)

    w, norm_before = lax.cond(breakdown, fresh, lambda w: (w, added), w)

    # The second pass, against the whole basis.
    w, column, norm = _project_out(basis, j, vector, w, axis_name)
    if _FILLS * order > layout.size:
        # In a small space little of a vector is left; what is must be orthogonalised again.
        w, more, norm = _project_out(basis, j, vector, w, axis_name)
        column = column + more
    exhausted = norm <= jnp.sqrt(rounding) * norm_before
    beta = jnp.where(lost, jnp.nan, jnp.where(breakdown | exhausted, 0, unit * norm))
    usable = ~exhausted & ~lost & jnp.isfinite(norm)
    inverse = jnp.where(usable, 1 / jnp.where(usable, norm, 1), 0)
    new = jax.tree.map(lambda x: jnp.where(usable, inverse.astype(x.dtype) * x, 0), w)
    # After the last product there is no row for the new vector: it is overwritten at once. In this order, since the
    # vector depends on row j as it was.
    basis = vectors.set_row(vectors.set_row(basis, jnp.minimum(j + 1, order - 1), new), j, vector)

    row = jnp.arange(order)
    column = jnp.where(breakdown, 0, unit * column)
    column = column if early is None else column + unit * early
    for at, value in ((j, alpha), (j - 1, state.beta), (j + 1, beta)):
        column = column + jnp.where(row == at, value, 0)
    return LanczosState(
        basis=basis,
        projected=state.projected + jnp.where(row == j, column[:, None], 0),
        beta=beta,
        scale=scale,
        count=j + 1,
        restart=jnp.where(breakdown, j + 1, state.restart),
        exhausted=exhausted,
        seed=state.seed,
    )


def rounded_off(state: LanczosState, dtype: Any) -> jax.typing.ArrayLike:
    r"""``(order,)`` norms of what is missing of the products of rows, where rows are stored in a short `dtype`.

    Of :math:`\beta_j q_{j+1}`, the part of a product that is new, rounding takes off a vector of the norm
    :math:`\epsilon \beta_j` at most, with :math:`\epsilon` half of the distance of 1 to the next number. Zero for other
    dtypes.
    """
    if not vectors.is_short(dtype):
        return 0.0
    new = jnp.diagonal(state.projected, -1)
    return jnp.append(float(jnp.finfo(dtype).eps) / 2 * jnp.abs(new), jnp.zeros((), new.dtype))


def ritz(state: LanczosState, first: jax.typing.ArrayLike = 0, left: jax.typing.ArrayLike = 0.0) -> RitzPairs:
    r"""The Rayleigh-Ritz pairs of the space built so far, or of what the rows of the basis from `first` on span.

    With :math:`W = Q^\top T + \beta\, q_{j+1} e_j^\top` the products of all rows of the basis, the residual of the pair
    :math:`(\theta_i, y_i)`, :math:`y_i = Q^\top s_i`, is
    :math:`\|W s_i - \theta_i y_i\|^2 = \|(T - T^\top) s_i / 2\|^2 + (\beta s_{ji})^2`. The first part is rounding
    where the operator stands still; where it moves while it is probed, it tells by how much. What products of rows
    before the last one have outside of the basis, of the norms `left`, counts as :math:`\beta` does.
    """
    order = state.projected.shape[0]
    index = jnp.arange(order)
    valid = (index >= first) & (index < state.count)
    projected = jnp.where(valid[:, None] & valid[None, :], state.projected, 0)
    # In a unit of its own, for the squares below.
    peak = jnp.max(jnp.abs(projected))
    unit = jnp.where(peak > 0, peak, 1)
    projected = projected / unit
    matrix = (projected + projected.T) / 2
    asymmetry = (projected - projected.T) / 2
    # Rows not yet filled get eigenvalues above all others, so that the valid pairs come first.
    beyond = 2 * jnp.sqrt(jnp.sum(matrix**2)) + 1
    matrix = matrix + jnp.diag(jnp.where(valid, jnp.zeros_like(beyond), beyond))
    values, coefficients = jnp.linalg.eigh(matrix, symmetrize_input=False)
    coefficients = jnp.where(valid[:, None], coefficients, 0)
    last = index == state.count - 1
    outside = jnp.linalg.norm(jnp.where(last, state.beta, left)[:, None] / unit * coefficients, axis=0)
    inside = jnp.linalg.norm(jnp.dot(asymmetry, coefficients, precision=lax.Precision.HIGHEST), axis=0)
    return RitzPairs(unit * values, unit * jnp.hypot(outside, inside), coefficients, jnp.sum(valid))


def run(
    matvec: Callable[[Vector], Vector],
    state: LanczosState,
    layout: Layout,
    *,
    look: Callable[[LanczosState], tuple[Found, jax.Array]],
    min_matvecs: int,
    confine: bool = True,
) -> tuple[LanczosState, Found]:
    """Extends the process until the pairs suffice, the end of the basis, or a product that is not finite.

    Args:
      matvec: the operator, on packed vectors in segment form.
      state: a process as :func:`start` gives it.
      layout: of the vectors.
      look: what has been found, of a process without its basis, and whether it suffices. Asked every `CHECK_EVERY`
        matvecs, and at the end.
      min_matvecs: matvecs since the start or the last breakdown before which nothing suffices (the copies of a multiple
        eigenvalue are found one by one).
      confine: see :func:`extend`.

    Returns:
      The process, and what has been found.
    """

    def ends(state: LanczosState) -> jax.Array:
        return (state.count >= state.projected.shape[0]) | state.exhausted | ~jnp.isfinite(state.beta)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(look, state._replace(basis=()))[0])

    def advance(carry: tuple[LanczosState, Any, jax.Array]) -> tuple[LanczosState, Any, jax.Array]:
        state, found, _ = carry
        state = extend(state, matvec(state.vector), layout, confine=confine)
        small, is_over = state._replace(basis=()), ends(state)
        found, enough = lax.cond(
            is_over | (state.count % CHECK_EVERY == 0), lambda: look(small), lambda: (found, jnp.zeros((), bool))
        )
        return state, found, is_over | (enough & (state.count - state.restart >= min_matvecs))

    state, found, _ = lax.while_loop(lambda carry: ~carry[2], advance, (state, nothing, ends(state)))
    return state, found
