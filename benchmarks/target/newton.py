"""Two published optimizers for full batches and small networks, written from their papers, as optax transformations.

They are baselines: NysNewton-CG (Rathore et al., "Challenges in Training PINNs: A Loss Landscape Perspective", ICML
2024, arXiv 2402.01868) and self-scaled Broyden (Kiyani et al., "Optimizing the Optimizer for Physics-Informed Neural
Networks and Kolmogorov-Arnold Networks", 2025, arXiv 2501.16371, after Al-Baali and Khalfan).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

Vector = jax.Array  # shape=(n,): all parameters in a row
Product = Callable[[Vector], Vector]

_SUFFICIENT = 0.1  # part of the decrease that the slope promises, which is enough for Armijo's rule
_MOST_HALVINGS = 30


class Sketch(NamedTuple):
    """An approximation U diag(eigenvalues) U' of a positive semidefinite matrix."""

    vectors: jax.Array  # shape=(n, rank): U, orthonormal columns
    eigenvalues: jax.Array  # shape=(rank,): descending, at least 0


def nystrom(product: Product, key: jax.Array, size: int, rank: int) -> Sketch:
    """The randomized Nystrom approximation of a symmetric matrix (Frangella et al., 2023).

    Where the matrix has a negative eigenvalue on the sketch it is shifted by twice that. As much as that, which is
    published, leaves a singular factor, and eigenvalues without bound.

    Args:
      product: multiplies a vector of ``shape=(size,)`` by the matrix.
      key: for the random test matrix.
      size: rows of the matrix.
      rank: columns of the test matrix, and products made.
    """
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (size, rank)))
    image = jax.lax.map(product, basis.T).T
    core = basis.T @ image
    core = (core + core.T) / 2
    least = jnp.sqrt(size) * jnp.finfo(image.dtype).eps * jnp.linalg.norm(image)
    shift = least + 2 * jnp.maximum(0, -jnp.linalg.eigvalsh(core)[0])
    factor = jnp.linalg.cholesky(core + shift * jnp.eye(rank))
    root = jax.scipy.linalg.solve_triangular(factor, (image + shift * basis).T, lower=True).T
    vectors, singular, _ = jnp.linalg.svd(root, full_matrices=False)
    return Sketch(vectors, jnp.maximum(0, singular**2 - shift))


def precondition(sketch: Sketch, damping: Any, vector: Vector) -> Vector:
    """Multiplies by the inverse of the Nystrom preconditioner, which leaves what is outside of the sketch as it is."""
    inside = sketch.vectors.T @ vector
    scale = (sketch.eigenvalues[-1] + damping) / (sketch.eigenvalues + damping) - 1
    return vector + sketch.vectors @ (scale * inside)


class _Solve(NamedTuple):
    solution: Vector
    residual: Vector
    scaled: Vector  # the residual, preconditioned
    direction: Vector
    count: jax.Array  # shape=(), int32: products so far
    indefinite: jax.Array  # shape=(), bool: the matrix has shown that it is not positive definite


def solve(
    product: Product, right: Vector, start: Vector, sketch: Sketch, damping: Any, *, steps: int, tolerance: float
) -> tuple[Vector, jax.Array, jax.Array]:
    """Solves ``(A + damping) x = right`` by conjugate gradients with the Nystrom preconditioner.

    Unlike there it stops at a direction of no positive curvature; that direction is the result if there is no other.

    Returns:
      The solution, how many products were made, and whether a direction had no positive curvature.
    """

    def damped(vector: Vector) -> Vector:
        return product(vector) + damping * vector

    def go_on(at: _Solve) -> jax.Array:
        return (jnp.linalg.norm(at.residual) > tolerance) & (at.count <= steps) & ~at.indefinite

    def step(at: _Solve) -> _Solve:
        image = damped(at.direction)
        curvature = at.direction @ image
        before = at.residual @ at.scaled
        convex = curvature > 0
        length = jnp.where(convex, before / jnp.where(convex, curvature, 1), 0)
        residual = at.residual - length * image
        scaled = precondition(sketch, damping, residual)
        nothing = ~convex & (jnp.linalg.norm(at.solution) == 0)
        return _Solve(
            at.solution + jnp.where(nothing, 1, length) * at.direction,
            residual,
            scaled,
            scaled + (residual @ scaled / before) * at.direction,
            at.count + 1,
            ~convex,
        )

    residual = right - damped(start)
    scaled = precondition(sketch, damping, residual)
    first = _Solve(start, residual, scaled, scaled, jnp.ones((), jnp.int32), jnp.zeros((), bool))
    last = jax.lax.while_loop(go_on, step, first)
    return last.solution, last.count, last.indefinite


class NysNewtonState(NamedTuple):
    """State of :func:`nys_newton_cg`."""

    count: jax.Array  # shape=(), int32: updates
    direction: Vector  # shape=(n,): where the next solution starts
    sketch: Sketch
    products: jax.Array  # shape=(), int32: products with the Hessian


def nys_newton_cg(
    loss_fn: Callable[[Any, Any], jax.Array],
    damping: Any,
    *,
    rank: int = 60,
    interval: int = 20,
    steps: int = 1000,
    tolerance: float = 1e-16,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """NysNewton-CG: damped Newton steps by conjugate gradients, preconditioned by a sketch of the Hessian.

    The defaults are the published ones. Each system is solved from the solution of the last. Unlike there it is solved
    from zero where the last was indefinite or led to no step: solutions would grow without bound. The step is halved,
    from 1 on, until it meets Armijo's rule. Where 30 halvings do not help there is no step.

    Args:
      loss_fn: maps (parameters, batch) to the loss.
      damping: added to the Hessian; may be traced. Published are the best of 1e-5, 1e-4, .., 0.1.
      rank: of the sketch.
      interval: updates between two sketches.
      steps: of conjugate gradients in an update, at most.
      tolerance: the norm of the residual at which they end.
      seed: for the sketches.

    Returns:
      A transformation whose ``update`` also takes the loss, ``value``, and the ``batch``.
    """

    def init(params: Any) -> NysNewtonState:
        vector, _ = ravel_pytree(params)
        zero = jnp.zeros((), jnp.int32)
        sketch = Sketch(jnp.zeros((vector.size, rank), vector.dtype), jnp.zeros(rank, vector.dtype))
        return NysNewtonState(zero, jnp.zeros_like(vector), sketch, zero)

    def update(
        grads: Any, state: NysNewtonState, params: Any, *, value: Any, batch: Any, **extra: Any
    ) -> tuple[Any, NysNewtonState]:
        del extra
        at, unravel = ravel_pytree(params)
        gradient, _ = ravel_pytree(grads)

        def loss(vector: Vector) -> jax.Array:
            return loss_fn(unravel(vector), batch)

        def product(vector: Vector) -> Vector:
            return jax.jvp(jax.grad(loss), (at,), (vector,))[1]

        key = jax.random.fold_in(jax.random.key(seed), state.count)
        renew = state.count % interval == 0
        sketch = jax.lax.cond(renew, lambda: nystrom(product, key, at.size, rank), lambda: state.sketch)
        direction, made, indefinite = solve(
            product, gradient, state.direction, sketch, damping, steps=steps, tolerance=tolerance
        )
        length = armijo(lambda t: loss(at - t * direction), value, -(gradient @ direction))
        kept = jnp.where(indefinite | (length == 0), 0, direction)
        products = state.products + made + jnp.where(renew, rank, 0)
        return unravel(-length * direction), NysNewtonState(state.count + 1, kept, sketch, products)

    return optax.GradientTransformationExtraArgs(init, update)


def armijo(loss: Callable[[jax.Array], jax.Array], start: Any, slope: jax.Array) -> jax.Array:
    """The first of 1, 1/2, 1/4, .. along which the loss falls by a tenth of what the slope promises; 0 if none does.

    Args:
      loss: of the length of a step.
      start: the loss at length 0.
      slope: its derivative there.
    """

    def fails(length: jax.Array) -> jax.Array:
        return ~(loss(length) <= start + _SUFFICIENT * length * slope)  # also where the loss is not a number

    def search(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        shorter = at[0] / 2
        return shorter, fails(shorter)

    one = jnp.ones_like(slope)
    length, failed = jax.lax.while_loop(lambda at: at[1] & (at[0] > 0.5**_MOST_HALVINGS), search, (one, fails(one)))
    return jnp.where(failed, 0, length)


class SelfScaledBroydenState(NamedTuple):
    """State of :func:`scale_by_self_scaled_broyden`."""

    count: jax.Array  # shape=(), int32: updates
    inverse: jax.Array  # shape=(n, n): H, the approximation of the inverse Hessian
    params: Vector  # shape=(n,): of the last update, as below
    gradient: Vector
    direction: Vector  # - H gradient, before the line search


def broyden_inverse(inverse: jax.Array, s: Vector, y: Vector, curvature: jax.Array) -> jax.Array:
    """H of the next update, by the self-scaled Broyden formula (Al-Baali and Khalfan).

    Args:
      inverse: H, ``shape=(n, n)``, positive definite.
      s: the step, ``shape=(n,)``.
      y: the change of the gradient, ``shape=(n,)``, with ``y @ s > 0``.
      curvature: ``s @ B @ s`` with B the inverse of H.
    """
    size, tiny = len(s), jnp.finfo(s.dtype).eps
    along = y @ s
    image = inverse @ y
    length = y @ image
    b, h = curvature / along, length / along
    a = jnp.maximum(b * h - 1, tiny)  # at least 0 but for rounding
    lowest = jnp.minimum(1, h * (1 - jnp.sqrt(a / (1 + a))))
    theta = jnp.maximum((lowest - 1) / a, jnp.minimum(1 / lowest, (1 - b) / b))
    sigma = 1 + a * theta
    phi = (1 - theta) / sigma
    by_size = jnp.minimum(1, 1 / b) * sigma ** (1 / (1 - size))
    positive = jnp.minimum(by_size, jnp.minimum(1, 1 / b) / jnp.where(theta > 0, theta, 1))
    tau = jnp.where(theta > 0, positive, jnp.minimum(by_size, sigma))
    v = s / along - image / length
    kept = inverse - jnp.outer(image, image / length) + jnp.outer(phi * length * v, v)
    return kept / tau + jnp.outer(s, s / along)


def scale_by_self_scaled_broyden() -> optax.GradientTransformation:
    """Multiplies the gradient by minus an inverse Hessian, dense, that self-scaled Broyden updates make of the unit.

    A step along which the gradient has not grown teaches nothing.
    """

    def init(params: Any) -> SelfScaledBroydenState:
        vector, _ = ravel_pytree(params)
        zero = jnp.zeros_like(vector)
        return SelfScaledBroydenState(
            jnp.zeros((), jnp.int32), jnp.eye(vector.size, dtype=vector.dtype), zero, zero, zero
        )

    def update(grads: Any, state: SelfScaledBroydenState, params: Any) -> tuple[Any, SelfScaledBroydenState]:
        at, unravel = ravel_pytree(params)
        gradient, _ = ravel_pytree(grads)
        s, y = at - state.params, gradient - state.gradient
        # The step was s = length * direction, and B @ direction = - gradient: so s @ B @ s is known without B.
        length = s @ state.direction / jnp.maximum(state.direction @ state.direction, jnp.finfo(s.dtype).tiny)
        curvature = -length * (s @ state.gradient)
        learn = (state.count > 0) & (y @ s > 0) & (curvature > 0)
        inverse = jax.lax.cond(learn, broyden_inverse, lambda h, *_: h, state.inverse, s, y, curvature)
        direction = -(inverse @ gradient)
        return unravel(direction), SelfScaledBroydenState(state.count + 1, inverse, at, gradient, direction)

    return optax.GradientTransformation(init, update)


def self_scaled_broyden() -> optax.GradientTransformationExtraArgs:
    """Self-scaled Broyden with a line search that meets the strong conditions of Wolfe.

    Returns:
      A transformation whose ``update`` also takes ``value``, ``grad`` and ``value_fn``, as that of `optax.lbfgs`.
    """
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=20, initial_guess_strategy="one")
    return optax.with_extra_args_support(optax.chain(scale_by_self_scaled_broyden(), search))
