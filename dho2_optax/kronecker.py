r"""SOAP and Shampoo: first-order bases whose preconditioner has a Kronecker product of eigenvectors.

For a matrix of parameters with gradient :math:`G` both average :math:`L = E[G G^\top]` and :math:`R = E[G^\top G]`,
keep orthonormal eigenvectors :math:`Q_L, Q_R` of them (columns), and step by :math:`-\text{lr}\, P \hat\mu`, where
:math:`\hat\mu` is the average of gradients and

.. math::
    P X = Q_L \left( S \odot (Q_L^\top X Q_R) \right) Q_R^\top

is diagonal in the rotated coordinates. With :math:`\nu` the average of :math:`(Q_L^\top G Q_R)^2`, element by element,
:math:`l_i, r_j` the diagonals of :math:`Q_L^\top L Q_L` and :math:`Q_R^\top R Q_R`, and :math:`c` from
:func:`_preconditioner`,

.. math::
    S_{ij} = \frac{1}{\sqrt{\nu_{ij}} + \epsilon} \;\text{(SOAP, arXiv 2409.11321, algorithm 3)}, \qquad
    S_{ij} = \frac{1}{(l_i r_j)^{1/4} / c + \epsilon} \;\text{(Shampoo, arXiv 1802.09568, algorithm 1)}.

Rotate, scale, rotate back: :math:`P` is symmetric and positive definite, and so are its powers, of which the hybrid
makes a metric. Arrays of more than two axes count as matrices, all axes but the last merged; vectors and scalars, which
have nothing to rotate, get Adam's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dho2_optax import counters
from dho2_optax.arguments import INJECTION_HINT, check_numbers, is_int, known
from dho2_optax.vectors import Vector, as_arrays, at_least_float32, zeros_like

ArrayLike = jax.typing.ArrayLike
Scaling = Literal["soap", "shampoo"]
_SCALINGS = ("soap", "shampoo")


class Sides(NamedTuple):
    """What belongs to either side of a matrix ``(m, n)``; None for a side that is not rotated."""

    left: Any  # of the rows
    right: Any  # of the columns


class KroneckerState(NamedTuple):
    """The state of `soap` and `shampoo`; leaves are float32, or float64 where the parameters are.

    All averages but `mu` are bias-corrected already.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # shape=(), dtype=int32: updates made
    clock: jax.Array  # shape=(), dtype=int32: `count` as renewals are timed by it, see `counters.tick`
    eps: jax.Array  # shape=(), dtype=float32: epsilon of the last update
    mu: Any  # like the parameters: average of the gradients, in the parameters' own coordinates
    nu: Any  # like the parameters: average of squares in the rotated coordinates; Shampoo's matrices: Sides (m,), (n,)
    factors: Any  # a tree like the parameters, of Sides: L, shape=(m, m), and R, shape=(n, n)
    bases: Any  # a tree like the parameters, of Sides: Q_L, shape=(m, m), and Q_R, shape=(n, n); columns


class KroneckerFactors(NamedTuple):
    """A preconditioner by itself, from :func:`kronecker_factors`."""

    scale: Any  # like the parameters: S, the preconditioner in the rotated coordinates
    bases: Any  # as in KroneckerState
    alive: Any  # like the parameters, dtype=bool: what stands neither in a row nor in a column without any gradient


class _Leaf(NamedTuple):
    """The state of one array of parameters."""

    mu: jax.Array
    nu: Any
    factors: Sides
    bases: Sides


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    precondition_interval: ArrayLike = 10,
    max_size: int = 1024,
) -> optax.GradientTransformation:
    r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

    .. math::
        W \leftarrow W - \text{lr} \left( Q_L \frac{Q_L^\top \hat\mu\, Q_R}{\sqrt{\hat\nu} + \epsilon} Q_R^\top
        + \text{weight\_decay}\, W \right), \qquad \hat\nu = E\left[ (Q_L^\top G Q_R)^2 \right],

    with :math:`Q_L, Q_R` the eigenvectors of :math:`E[G G^\top]` and :math:`E[G^\top G]`. Good learning rates are from
    Adam's to several times that: what all entries of a gradient have in common is one rotated coordinate, not all of
    them. Vectors and scalars get Adam's update, and so does everything in the first update.

    Two choices differ from the authors' code. The first update is Adam's, not zero. And when the bases change, the
    second moments are carried over, :math:`\hat\nu \leftarrow (A \odot A)^\top \hat\nu\, (B \odot B)` with :math:`A`
    and :math:`B` the products of old and new bases: the variances of uncorrelated coordinates.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the average of gradients, in [0, 1). The paper has 0.95.
      b2: decay of the second moments and of the factors, in [0, 1).
      eps: added to the root of the second moments, in the gradient's unit.
      weight_decay: decoupled weight decay; needs ``params`` in ``update`` unless it is 0.
      precondition_interval: updates between two renewals of the bases, the first after one update.
      max_size: longest side of a matrix that is rotated, a Python int; longer ones keep their coordinates. The state
        has two square matrices for each rotated side.

    Returns:
      An ``optax.GradientTransformation``; its state holds one :class:`KroneckerState`.

    Raises:
      ValueError: at construction for options out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from dho2_optax.kronecker import soap
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2)
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
      >>> tx = soap(0.1)
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(jax.grad(loss_fn)(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> round(float(loss_fn(params)), 2)
      6.48

    References:
      Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321, algorithm 3.
    """
    return _descent("soap", learning_rate, b1, b2, eps, weight_decay, precondition_interval, max_size)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    precondition_interval: ArrayLike = 10,
    max_size: int = 1024,
) -> optax.GradientTransformation:
    r"""Shampoo, with averaged factors and steps as long as Adam's.

    .. math::
        W \leftarrow W - \text{lr} \left( c\, L^{-1/4} \hat\mu\, R^{-1/4} + \text{weight\_decay}\, W \right), \qquad
        L = E[G G^\top], \quad R = E[G^\top G],

    where the number :math:`c` takes the place of grafting: it is such that the entries of :math:`P G` have a mean
    square of one, as those of Adam's step have, so that learning rates are those of Adam. The roots are taken in the
    bases that were renewed last, at every update, of the diagonals of :math:`Q_L^\top L Q_L` and
    :math:`Q_R^\top R Q_R`. Vectors and scalars get Adam's update.

    Args:
      learning_rate: a number or a schedule.
      b1: as in :func:`soap`.
      b2: as in :func:`soap`.
      eps: added to :math:`(l_i r_j)^{1/4} / c`, in the gradient's unit.
      weight_decay: as in :func:`soap`.
      precondition_interval: as in :func:`soap`.
      max_size: as in :func:`soap`; of longer sides the diagonal of the factor is used.

    Returns:
      An ``optax.GradientTransformation``; its state holds one :class:`KroneckerState`.

    Raises:
      ValueError: at construction for options out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dho2_optax.kronecker import shampoo
      >>> tx = shampoo(0.1)
      >>> state = tx.init(jnp.ones((3, 2)))
      >>> updates, state = jax.jit(tx.update)(jnp.full((3, 2), 5.0), state)
      >>> bool(jnp.allclose(updates, -0.1))
      True

    References:
      Gupta et al., "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv 1802.09568, algorithm 1.
    """
    return _descent("shampoo", learning_rate, b1, b2, eps, weight_decay, precondition_interval, max_size)


def _descent(
    scaling: Scaling,
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    weight_decay: ArrayLike,
    precondition_interval: ArrayLike,
    max_size: int,
) -> optax.GradientTransformation:
    """What `soap` and `shampoo` share: the preconditioner, weight decay, and the learning rate."""
    check_numbers("non-negative", schedule=True, learning_rate=learning_rate, weight_decay=weight_decay)
    no_decay = known(weight_decay) == 0
    return optax.chain(
        scale_by_kronecker(
            scaling, b1=b1, b2=b2, eps=eps, precondition_interval=precondition_interval, max_size=max_size
        ),
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay),  # pyright: ignore
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_kronecker(
    scaling: Scaling = "soap",
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    precondition_interval: ArrayLike = 10,
    max_size: int = 1024,
) -> optax.GradientTransformation:
    r"""The direction :math:`P \hat\mu` of :func:`soap` or :func:`shampoo`, without learning rate and sign.

    A leaf whose gradient is not finite, or so large that its squares overflow, leaves the leaf's averages as they are.
    Its entries that are not finite are passed on, as they are with Adam; the others step by the old averages.

    Args:
      scaling: ``"soap"`` or ``"shampoo"``.
      b1: as in :func:`soap`; so are all arguments that are not listed here.
      b2: as in :func:`soap`.
      eps: as in :func:`soap` or :func:`shampoo`.
      precondition_interval: as in :func:`soap`.
      max_size: as in :func:`soap`.

    Returns:
      An ``optax.GradientTransformation`` with a :class:`KroneckerState`.

    Raises:
      ValueError: at construction for options out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from dho2_optax.kronecker import scale_by_kronecker
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), scale_by_kronecker("soap"), optax.scale(-0.1))
      >>> state = tx.init(jnp.ones((3, 2)))

    References:
      As of :func:`soap` and :func:`shampoo`.
    """
    if scaling not in _SCALINGS:
        raise ValueError(f"`scaling` must be one of {_SCALINGS}, got {scaling!r}. {INJECTION_HINT}")
    check_numbers("in [0, 1)", b1=b1, b2=b2)
    check_numbers("positive", eps=eps)
    check_numbers("positive", whole=True, precondition_interval=precondition_interval)
    if not is_int(max_size) or max_size < 0:
        raise ValueError(f"`max_size` must be a Python int of at least 0, got {max_size!r}. {INJECTION_HINT}")

    def init(params: Any) -> KroneckerState:
        leaves = [_start(x, scaling, max_size) for x in jax.tree.leaves(as_arrays(params))]
        count, clock = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return _to_state(jax.tree.structure(params), leaves, count, clock, jnp.asarray(eps, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, KroneckerState]:
        del params
        updates = as_arrays(updates)
        treedef = jax.tree.structure(updates)
        leaves = _from_state(treedef, state)

        # The bases are renewed before anything reads them: a donated state is not copied where they are kept.
        due = counters.is_due(state.clock, 1, precondition_interval)
        is_first = state.count == 1
        leaves = lax.cond(due, lambda old: [_renew(leaf, is_first) for leaf in old], lambda old: old, leaves)

        count = jnp.asarray(optax.safe_increment(state.count))
        steps = [
            _step(gradient, leaf, count, b1, b2, eps)
            for gradient, leaf in zip(jax.tree.leaves(updates), leaves, strict=True)
        ]
        clock = counters.tick(state.clock, 1, precondition_interval)
        directions = treedef.unflatten([direction for direction, _ in steps])
        return directions, _to_state(treedef, [leaf for _, leaf in steps], count, clock, jnp.asarray(eps, jnp.float32))

    return optax.GradientTransformation(init, update)


def _to_state(treedef: Any, leaves: list[_Leaf], count: jax.Array, clock: jax.Array, eps: jax.Array) -> KroneckerState:
    trees = {name: treedef.unflatten([getattr(leaf, name) for leaf in leaves]) for name in _Leaf._fields}
    return KroneckerState(count=count, clock=clock, eps=eps, **trees)


def _from_state(treedef: Any, state: KroneckerState) -> list[_Leaf]:
    columns = [treedef.flatten_up_to(getattr(state, name)) for name in _Leaf._fields]
    return [_Leaf(*row) for row in zip(*columns, strict=True)]


def _start(param: jax.Array, scaling: Scaling, max_size: int) -> _Leaf:
    """The state of one array of parameters before the first update."""
    dtype = at_least_float32(param.dtype)
    is_matrix = _is_matrix(param)
    rows, columns = (param.size // param.shape[-1], param.shape[-1]) if is_matrix else (1, 1)

    def square(make: Callable[..., jax.Array], size: int) -> jax.Array | None:
        return make((size, size)) if 1 < size <= max_size else None

    zeros = lambda shape: jnp.zeros(shape, dtype)  # noqa: E731
    identity = lambda shape: jnp.eye(shape[0], dtype=dtype)  # noqa: E731
    nu = zeros_like(param, dtype)
    return _Leaf(
        mu=zeros_like(param, dtype),
        nu=Sides(zeros((rows,)), zeros((columns,))) if is_matrix and scaling == "shampoo" else nu,
        factors=Sides(square(zeros, rows), square(zeros, columns)),
        bases=Sides(square(identity, rows), square(identity, columns)),
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of matrices in full precision: what TF32 would leave in the small directions is not small there."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _is_matrix(x: jax.Array) -> bool:
    return x.ndim >= 2 and x.size > 0


def _as_matrix(x: jax.Array) -> jax.Array:
    """All axes but the last merged; vectors, scalars and what is empty stay as they are."""
    return x.reshape(-1, x.shape[-1]) if _is_matrix(x) else x


def _rotate(x: jax.Array, bases: Sides) -> jax.Array:
    r""":math:`Q_L^\top X Q_R`, in the shape of `x`."""
    left, right = bases
    matrix = _as_matrix(x)
    matrix = matrix if left is None else _dot(left.T, matrix)
    return (matrix if right is None else _dot(matrix, right)).reshape(x.shape)


def _rotate_back(x: jax.Array, bases: Sides) -> jax.Array:
    r""":math:`Q_L X Q_R^\top`, in the shape of `x`."""
    return _rotate(x, _map_sides(jnp.transpose, bases))


def _map_sides(function: Callable[..., Any], *sides: Sides) -> Sides:
    """`function` of what belongs to each side, None for a side where any of it is None."""
    left, right = ((None if any(x is None for x in parts) else function(*parts)) for parts in zip(*sides, strict=True))
    return Sides(left, right)


def _preconditioner(nu: Any, eps: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    r"""The preconditioner :math:`S` in the rotated coordinates, of this shape.

    Of Shampoo, with :math:`l, r` the sides of `nu`, both of sum :math:`t = E \|G\|^2`: the rank-one estimate
    :math:`l_i r_j / t` of the square of a gradient's entry (arXiv 2409.11321, claim 1) makes the squares of
    :math:`(l_i r_j)^{-1/4} \hat G_{ij}` sum to :math:`\sum_i \sqrt{l_i} \sum_j \sqrt{r_j} / t`, so that
    :math:`c^2 = m n t / (\sum_i \sqrt{l_i} \sum_j \sqrt{r_j})` brings their mean to one.
    """
    if not isinstance(nu, Sides):
        return 1 / (jnp.sqrt(nu) + jnp.asarray(eps, nu.dtype))
    total = jnp.sum(nu.left)
    total = jnp.where(total > 0, total, 1)
    # An eigenvalue below the rounding error of the largest is no better known than that.
    left, right = (jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).eps * jnp.max(x))) for x in nu)
    per_c = jnp.sqrt(jnp.mean(left) * jnp.mean(right) / total)
    roots = per_c * jnp.outer(jnp.sqrt(left), jnp.sqrt(right))
    return (1 / (roots + jnp.asarray(eps, roots.dtype))).reshape(shape)


def _step(
    gradient: jax.Array, leaf: _Leaf, count: jax.Array, b1: ArrayLike, b2: ArrayLike, eps: ArrayLike
) -> tuple[jax.Array, _Leaf]:
    """The direction of one leaf, in the dtype of its gradient, and the leaf's averages with the gradient in them."""
    dtype = leaf.mu.dtype
    b1, b2, updates = (jnp.asarray(x).astype(dtype) for x in (b1, b2, count))
    g = gradient.astype(dtype)
    usable = jnp.sum(jnp.square(g)) < 0.01 * jnp.finfo(dtype).max  # bounds what is made of L and R; false for NaN
    clean = jnp.where(usable, g, 0)

    def average(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
        return old + jnp.where(usable, weight, 0) * (new - old)

    # As much as the average decayed by b2 weighs its last term, once it is bias-corrected.
    weight = (1 - b2) / (1 - b2**updates)
    mu = average(leaf.mu, clean, 1 - b1)
    squares = jnp.square(_rotate(clean, leaf.bases))
    if isinstance(leaf.nu, Sides):  # in rotated coordinates, sums of squares are the diagonals of Q'LQ and Q'RQ
        squares = _as_matrix(squares)
        sums = Sides(jnp.sum(squares, axis=1), jnp.sum(squares, axis=0))
        nu = _map_sides(lambda old, new: average(old, new, weight), leaf.nu, sums)
    else:
        nu = average(leaf.nu, squares, weight)
    matrix = _as_matrix(clean)
    factors = _map_sides(
        lambda old, matrix: average(old, _dot(matrix, matrix.T), weight), leaf.factors, Sides(matrix, matrix.T)
    )

    scale = _preconditioner(nu, eps, g.shape)
    direction = _rotate_back(scale * _rotate(mu / (1 - b1**updates), leaf.bases), leaf.bases)
    direction = jnp.where(_alive(factors, g.shape), direction, 0)
    direction = jnp.where(jnp.isfinite(g), direction, g)
    bases = _map_sides(_vary_like, leaf.bases, factors)
    return direction.astype(gradient.dtype), _Leaf(mu, nu, factors, bases)


def _alive(factors: Sides, shape: tuple[int, ...]) -> jax.Array:
    """What stands neither in a row nor in a column that has never had a gradient; of what is not rotated, everything.

    The eigenvectors of such rows are arbitrary, and rounding would move them through these.
    """
    left, right = (jnp.ones(1, bool) if factor is None else jnp.diagonal(factor) > 0 for factor in factors)
    if factors.left is None and factors.right is None:
        return jnp.ones(shape, bool)
    size = math.prod(shape[:-1]), shape[-1]
    return jnp.broadcast_to(left[:, None] & right[None, :], size).reshape(shape)


def _vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, marked as varying over the mesh axes that `like` does: the next renewal makes it of `like`."""
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def _renew(leaf: _Leaf, is_first: jax.Array) -> _Leaf:
    """A leaf in renewed bases, its second moments included."""
    bases = _map_sides(lambda factor, basis: _renew_basis(factor, basis, is_first), leaf.factors, leaf.bases)
    if isinstance(leaf.nu, Sides):

        def rayleigh(factor: jax.Array, basis: jax.Array) -> jax.Array:
            return jnp.maximum(jnp.sum(basis * _dot(factor, basis), axis=0), 0)

        renewed = _map_sides(rayleigh, leaf.factors, bases)
        nu = Sides(*(old if new is None else new for old, new in zip(leaf.nu, renewed, strict=True)))
    else:
        turn = _map_sides(lambda old, new: jnp.square(_dot(old.T, new)), leaf.bases, bases)
        nu = _rotate(leaf.nu, turn)
    return leaf._replace(nu=nu, bases=bases)


def _renew_basis(factor: jax.Array, basis: jax.Array, is_first: jax.Array) -> jax.Array:
    """Eigenvectors of `factor`: all of them the first time, later one step of a power iteration from `basis`.

    Arxiv 2409.11321, algorithm 4. A step costs half of what the eigenvectors do and follows factors that change slowly.
    """
    factor = factor / jnp.maximum(jnp.trace(factor), jnp.finfo(factor.dtype).tiny)

    def eigenvectors() -> jax.Array:
        return jnp.linalg.eigh(factor)[1]

    def power_step() -> jax.Array:
        product = _dot(factor, basis)
        largest_first = jnp.argsort(-jnp.sum(basis * product, axis=0))
        return jnp.linalg.qr(product[:, largest_first])[0]

    return lax.cond(is_first, eigenvectors, power_step)


def kronecker_factors(base_state: Any, like: Vector, axis_name: str | None = None) -> KroneckerFactors:
    """The preconditioner in the state of `soap` or `shampoo`: that of the last update, the identity before the first.

    Args:
      base_state: the state of the optimizer, or of a composition it is part of.
      like: a pytree like the parameters.
      axis_name: None; whole leaves are needed.

    Returns:
      What :func:`kronecker_half` and :func:`kronecker_inverse_half` take, float32 or better.

    Raises:
      ValueError: if `base_state` does not hold one :class:`KroneckerState`, of parameters like `like`.
    """
    del axis_name
    is_ours = lambda x: isinstance(x, KroneckerState)  # noqa: E731
    found = [x for x in jax.tree.leaves(base_state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(f"`base_state` must hold one soap or shampoo state, got {len(found)}.")
    state = found[0]
    wanted, given = ((jax.tree.structure(x), [leaf.shape for leaf in jax.tree.leaves(x)]) for x in (state.mu, like))
    if wanted != given:
        raise ValueError(f"`like` must be a pytree like the parameters of `base_state`, {wanted}, got {given}.")

    def scale(mu: jax.Array, nu: Any) -> jax.Array:
        return jnp.where(state.count > 0, _preconditioner(nu, state.eps, mu.shape), 1)

    def alive(mu: jax.Array, factors: Sides) -> jax.Array:
        return (state.count == 0) | _alive(factors, mu.shape)

    # Bases of their own: the same buffer twice in a state could not be donated.
    return KroneckerFactors(
        jax.tree.map(scale, state.mu, state.nu),
        jax.tree.map(jnp.copy, state.bases),
        jax.tree.map(alive, state.mu, state.factors),
    )


def kronecker_half(factors: KroneckerFactors, vector: Vector) -> Vector:
    r""":math:`P^{1/2} x`, in the dtypes of `vector`, a pytree like the parameters."""
    return _apply(jnp.sqrt, factors, vector)


def kronecker_inverse_half(factors: KroneckerFactors, vector: Vector) -> Vector:
    r""":math:`P^{-1/2} x`, in the dtypes of `vector`, a pytree like the parameters."""
    return _apply(lambda scale: 1 / jnp.sqrt(scale), factors, vector)


def _apply(function: Callable[[jax.Array], jax.Array], factors: KroneckerFactors, vector: Vector) -> Vector:
    """A function of the preconditioner, applied to a vector."""

    def leaf(x: jax.Array, scale: jax.Array, bases: Sides, alive: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, scale.dtype)
        bases = _map_sides(lambda basis: basis.astype(dtype), bases)
        scaled = function(scale.astype(dtype)) * _rotate(jnp.where(alive, x, 0).astype(dtype), bases)
        return jnp.where(alive, _rotate_back(scaled, bases), 0).astype(x.dtype)

    return jax.tree.map(leaf, vector, factors.scale, factors.bases, factors.alive)
