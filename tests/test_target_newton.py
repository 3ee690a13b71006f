"""The optimizers of `benchmarks.target.newton`: their parts by identities, the whole on quadratics and a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.target import newton

SIZE = 30


def _matrix(eigenvalues, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return jnp.asarray(basis * np.asarray(eigenvalues) @ basis.T)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _spd(seed=0):
    return _matrix(np.logspace(2, -2, SIZE), seed)


def test_a_sketch_of_a_matrix_of_low_rank_is_the_matrix():
    matrix = _matrix([5.0, 3.0, 2.0, *[0.0] * (SIZE - 3)])
    found = newton.nystrom(lambda v: matrix @ v, jax.random.key(0), SIZE, 6)
    np.testing.assert_allclose(found.eigenvalues, [5, 3, 2, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(6), atol=1e-12)
    np.testing.assert_allclose((found.vectors * found.eigenvalues) @ found.vectors.T, matrix, atol=1e-6)


def test_a_sketch_of_an_indefinite_matrix_is_finite_and_has_its_steep_directions():
    matrix = _matrix([50.0, 20.0, *np.linspace(0.1, -0.1, SIZE - 2)])
    found = newton.nystrom(lambda v: matrix @ v, jax.random.key(0), SIZE, 8)
    assert np.all(found.eigenvalues >= 0)
    assert np.all(found.eigenvalues[2:] < 1)
    np.testing.assert_allclose(found.eigenvalues[:2], [50, 20], rtol=0.02)


def test_the_preconditioner_is_the_inverse_of_its_definition():
    sketch = newton.nystrom(lambda v: _spd() @ v, jax.random.key(0), SIZE, 8)
    inside = sketch.vectors @ sketch.vectors.T
    scaled = (sketch.vectors * (sketch.eigenvalues + 0.1)) @ sketch.vectors.T / (sketch.eigenvalues[-1] + 0.1)
    vector = jnp.arange(1.0, SIZE + 1)
    found = newton.precondition(sketch, 0.1, (scaled + jnp.eye(SIZE) - inside) @ vector)
    np.testing.assert_allclose(found, vector, rtol=1e-9)


def _solve(matrix, right, rank, **options):
    sketch = newton.nystrom(lambda v: matrix @ v, jax.random.key(0), SIZE, rank)
    start = options.pop("start", jnp.zeros(SIZE))
    options = {"steps": 200, "tolerance": 1e-10, **options}
    return newton.solve(lambda v: matrix @ v, right, start, sketch, 0.01, **options)


def test_systems_are_solved_in_fewer_products_with_a_larger_sketch():
    right = jnp.ones(SIZE)
    exact = jnp.linalg.solve(_spd() + 0.01 * jnp.eye(SIZE), right)
    counts = []
    for rank in (2, 20):
        solution, count, indefinite = _solve(_spd(), right, rank)
        assert not indefinite
        np.testing.assert_allclose(solution, exact, rtol=1e-8)
        counts.append(int(count))
    assert counts[1] < counts[0] / 2
    assert int(_solve(_spd(), right, 2, start=exact)[1]) == 1
    assert int(_solve(_spd(), right, 2, steps=5)[1]) == 6


def test_a_direction_of_negative_curvature_ends_the_solution_downhill():
    matrix = _matrix(np.linspace(1, -5, SIZE))
    right = jnp.ones(SIZE)
    solution, count, indefinite = _solve(matrix, right, 4)
    assert indefinite
    assert int(count) <= 3
    assert np.all(np.isfinite(solution))
    assert right @ solution > 0


def test_steps_are_halved_until_the_loss_falls_enough():
    assert newton.armijo(lambda t: (t - 1) ** 2, 1.0, jnp.asarray(-2.0)) == 1
    assert newton.armijo(lambda t: (8 * t - 1) ** 2, 1.0, jnp.asarray(-16.0)) == 0.125
    assert newton.armijo(lambda t: jnp.where(t > 0.3, jnp.nan, -t), 0.0, jnp.asarray(-1.0)) == 0.25
    assert newton.armijo(lambda t: t, 0.0, jnp.asarray(-1.0)) == 0


def _quadratic(params, batch):
    vector = jnp.concatenate([params["a"], params["b"].ravel()])
    return (vector - 1) @ batch @ (vector - 1) / 2


_START = {"a": np.zeros(10), "b": np.zeros((4, 5))}


def test_nys_newton_solves_a_quadratic_in_one_update_but_for_its_damping():
    tx = newton.nys_newton_cg(_quadratic, 1e-3, rank=10, interval=2, tolerance=1e-12)
    params = jax.tree.map(jnp.asarray, _START)
    state = tx.init(params)
    batch = _spd()
    error = jnp.ones(SIZE)
    for count in range(3):
        value, grads = jax.value_and_grad(_quadratic)(params, batch)
        before = int(state.products)
        updates, state = tx.update(grads, state, params, value=value, batch=batch)
        params = optax.apply_updates(params, updates)
        error = error - jnp.linalg.solve(batch + 1e-3 * jnp.eye(SIZE), batch @ error)
        found = 1 - np.concatenate([params["a"], params["b"].ravel()])
        np.testing.assert_allclose(found, error, atol=1e-9)
        assert int(state.products) - before >= (11 if count % 2 == 0 else 1)


def test_nys_newton_descends_from_where_the_loss_is_concave():
    """Directions of negative curvature do not add up from update to update."""
    loss_fn = lambda params, batch: jnp.sum(jnp.cos(params * batch))  # noqa: E731
    tx = newton.nys_newton_cg(loss_fn, 1e-2, rank=3, interval=5)
    params, batch = jnp.linspace(0.05, 0.2, 6), jnp.arange(1.0, 7.0)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=value, batch=batch)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert np.all(np.diff(values) <= 1e-12)
    assert values[0] > 3
    assert values[-1] == pytest.approx(-6, abs=1e-6)


def test_the_broyden_inverse_meets_the_secant_condition_and_stays_positive_definite():
    rng = np.random.default_rng(0)
    hessian = _spd(1)
    inverse = jnp.eye(SIZE)
    for _ in range(50):
        s = jnp.asarray(rng.normal(size=SIZE))
        y = hessian @ s
        inverse = newton.broyden_inverse(inverse, s, y, s @ jnp.linalg.solve(inverse, s))
        np.testing.assert_allclose(inverse @ y, s, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(inverse, inverse.T, atol=1e-8 * jnp.abs(inverse).max())
        assert jnp.linalg.eigvalsh(inverse)[0] > 0


def test_the_broyden_inverse_is_left_where_it_is_right():
    """H y = s already, so b = h = 1: nothing is to be learnt, and nothing scaled."""
    hessian = _spd(1)
    inverse = jnp.linalg.inv(hessian)
    s = jnp.arange(1.0, SIZE + 1)
    found = newton.broyden_inverse(inverse, s, hessian @ s, s @ hessian @ s)
    np.testing.assert_allclose(found, inverse, atol=1e-6 * jnp.abs(inverse).max())


def test_self_scaled_broyden_needs_fewer_updates_than_steepest_descent_with_the_same_search():
    def run(tx, steps):
        params = jax.tree.map(jnp.asarray, _START)
        state = tx.init(params)
        batch = _spd()
        value_fn = lambda params: _quadratic(params, batch)  # noqa: E731

        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
        return float(value_fn(params)), state

    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=20)
    loss, state = run(newton.self_scaled_broyden(), 60)
    assert loss < 1e-9
    assert run(optax.chain(optax.scale(-1.0), search), 60)[0] > 1e-4
    inverse = state[0].inverse
    assert jnp.linalg.eigvalsh((inverse + inverse.T) / 2)[0] > 0


def test_broyden_learns_nothing_from_a_step_along_which_the_gradient_fell():
    tx = newton.scale_by_self_scaled_broyden()
    params = jnp.zeros(3)
    state = tx.init(params)
    updates, state = tx.update(jnp.ones(3), state, params)
    np.testing.assert_array_equal(updates, -np.ones(3))
    _, after = tx.update(2 * jnp.ones(3), state, params + updates)  # concave along the step
    np.testing.assert_array_equal(after.inverse, np.eye(3))
    _, after = tx.update(0.5 * jnp.ones(3), state, params + updates)
    assert np.abs(after.inverse - np.eye(3)).max() > 0.1
