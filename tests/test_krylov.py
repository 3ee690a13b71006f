import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dho2_optax import krylov, vectors
from dho2_optax.packing import Layout
from tests.helpers import (
    AXIS,
    Leaves,
    count_instructions,
    flat,
    flat_rows,
    matrix_operator,
    named_spectra,
    on_devices,
    symmetric,
    unflatten,
)

_N, _ORDER = 60, 24
_SPECTRA = named_spectra(_N)
_LIKE = {"a": np.zeros((5, 6), np.float32), "b": np.zeros(29, np.float32), "c": np.float32(0)}
_LEAVES = Leaves(_LIKE, None)
_TOLERANCE = 3e-6  # float32, relative to the norm of the matrix


def _never(state):
    return krylov.ritz(state), jnp.zeros((), bool)


@partial(jax.jit, static_argnames="order")
def _compiled_run(matrix, first, seed, bound, min_matvecs, poison, bad, order):
    """A Lanczos run until the last Ritz pair has a residual below `bound`.

    The product of `matrix` and a vector that begins like `poison` has the entry `bad`.
    """

    def matvec(vector):
        product = matrix_operator(matrix, _LIKE)(vector)
        is_poison = jnp.abs(vector["b"][0] - poison["b"][0]) < 1e-6
        return {**product, "b": jnp.where(is_poison, bad, product["b"])}

    def look(state):
        pairs = krylov.ritz(state)
        return pairs, pairs.residuals[pairs.num_valid - 1] < bound

    state = krylov.start(first, order, seed=seed)
    return krylov.run(matvec, state, _LEAVES, look=look, min_matvecs=min_matvecs)


@jax.jit
def _begin(first):
    return krylov.start(first, _ORDER, seed=jnp.uint32(0))


@jax.jit
def _extend(matrix, state):
    return krylov.extend(state, matrix_operator(matrix, _LIKE)(state.vector), _LEAVES)


def _random(seed):
    return unflatten(np.random.default_rng(seed).normal(size=_N).astype(np.float32), _LIKE)


def _run(matrix, first=None, *, seed=0, bound=-1, min_matvecs=0, poison=None, bad=0, order=_ORDER):
    first = _random(1) if first is None else first
    poison = jax.tree.map(lambda x: np.full_like(x, np.nan), _LIKE) if poison is None else poison
    numbers = np.float32(bound), np.int32(min_matvecs)
    matrix = matrix.astype(np.float32)
    return _compiled_run(matrix, first, np.uint32(seed), *numbers, poison, np.float32(bad), order)


def _assert_decomposition(matrix, state, tolerance=_TOLERANCE):
    """The identities of a Lanczos process: ``QQ' = I`` and ``A Q' = Q' T + beta q e'``."""
    count, scale = int(state.count), np.linalg.norm(matrix, 2)
    basis = flat_rows(state.basis)
    projected = np.asarray(state.projected, np.float64)
    assert not basis[count + 1 :].any()
    assert not projected[:, count:].any()
    basis, projected = basis[:count], projected[:count, :count]
    np.testing.assert_allclose(basis @ basis.T, np.eye(count), atol=_TOLERANCE)
    remainder = matrix @ basis.T - basis.T @ projected
    if count < state.projected.shape[0]:
        remainder[:, -1] -= float(state.beta) * flat(state.vector)
        assert np.max(np.abs(basis @ flat(state.vector))) <= _TOLERANCE
    else:  # The basis has no row for the next vector: what is left has the norm beta and is orthogonal to the basis.
        assert np.linalg.norm(remainder[:, -1]) == pytest.approx(float(state.beta), abs=tolerance * scale)
        assert np.max(np.abs(basis @ remainder[:, -1])) <= tolerance * scale
        remainder = remainder[:, :-1]
    assert np.max(np.linalg.norm(remainder, axis=0)) <= tolerance * scale
    return basis, projected


@pytest.mark.parametrize("name", _SPECTRA)
def test_a_run_satisfies_the_lanczos_identities(name):
    matrix = symmetric(_SPECTRA[name])
    state, _ = _run(matrix)
    assert state.count == _ORDER
    assert not state.exhausted
    _, projected = _assert_decomposition(matrix, state)
    scale = np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(projected, projected.T, atol=_TOLERANCE * scale)
    assert np.max(np.abs(np.triu(projected, 2)), initial=0) <= _TOLERANCE * scale
    assert np.linalg.norm(flat(state.vector)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", _SPECTRA)
def test_residuals_of_ritz_pairs_are_the_true_ones(name):
    matrix = symmetric(_SPECTRA[name])
    state, pairs = _run(matrix)
    values, coefficients = np.asarray(pairs.values, np.float64), np.asarray(pairs.coefficients)
    assert pairs.num_valid == _ORDER
    assert np.all(np.diff(values) >= 0)
    vectors = coefficients.T @ flat_rows(state.basis)
    residuals = np.linalg.norm(vectors @ matrix - values[:, None] * vectors, axis=1)
    scale = np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(pairs.residuals, residuals, atol=2 * _TOLERANCE * scale)


def test_ritz_pairs_of_a_run_that_has_only_begun_come_first():
    matrix = symmetric(_SPECTRA["indefinite"]).astype(np.float32)
    state = _begin(_random(1))
    for _ in range(3):
        state = _extend(matrix, state)
    pairs = jax.jit(krylov.ritz)(state)
    projected = np.asarray(state.projected, np.float64)[:3, :3]
    assert pairs.num_valid == 3
    expected = np.linalg.eigvalsh((projected + projected.T) / 2)
    np.testing.assert_allclose(pairs.values[:3], expected, atol=1e-6)
    assert np.all(pairs.values[3:] > 1.1 * np.linalg.norm(projected, 2))
    assert not np.asarray(pairs.coefficients)[3:, :3].any()


def test_extend_once_at_a_time_equals_run():
    matrix = symmetric(_SPECTRA["outliers"]).astype(np.float32)
    whole, _ = _run(matrix)
    state = _begin(_random(1))
    for step in range(_ORDER):
        assert state.count == step
        state = _extend(matrix, state)
    np.testing.assert_allclose(flat_rows(state.basis), flat_rows(whole.basis), atol=1e-4)
    np.testing.assert_allclose(state.projected, whole.projected, atol=1e-4)


def test_the_norm_of_the_start_vector_does_not_matter():
    matrix = symmetric(_SPECTRA["outliers"])
    first = _random(1)
    state, _ = _run(matrix, jax.tree.map(lambda x: np.float32(1e4) * x, first))
    unit = flat(first) / np.linalg.norm(flat(first))
    np.testing.assert_allclose(flat_rows(state.basis)[0], unit, atol=1e-6)
    _assert_decomposition(matrix, state)


@pytest.mark.parametrize(("name", "rank"), [("low rank", 5), ("multiple of the identity", 1), ("zero", 0)])
def test_a_breakdown_is_followed_by_a_random_vector(name, rank):
    matrix = symmetric(_SPECTRA[name])
    state, pairs = _run(matrix)
    assert state.restart == _ORDER  # the last of many breakdowns
    assert state.beta == 0
    true = np.sort(_SPECTRA[name])
    values = np.asarray(pairs.values)
    scale = np.linalg.norm(matrix, 2)
    for value in values:
        assert np.min(np.abs(value - true)) <= _TOLERANCE * scale
    assert np.sum(np.abs(values) > 1e-3 * scale) == {5: 5, 1: _ORDER, 0: 0}[rank]


def test_the_seed_decides_what_follows_a_breakdown():
    matrix = symmetric(_SPECTRA["low rank"])
    bases = [flat_rows(_run(matrix, seed=seed)[0].basis) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(bases[0], bases[1])
    np.testing.assert_allclose(bases[0][:5], bases[2][:5], atol=1e-4)
    assert np.abs(np.sum(bases[0][-1] * bases[2][-1])) < 0.6


def test_an_eigenvector_as_start_is_a_breakdown_at_once():
    matrix = symmetric(_SPECTRA["outliers"])
    values, eigenvectors = np.linalg.eigh(matrix)
    state, pairs = _run(matrix, unflatten(eigenvectors[:, 3].astype(np.float32), _LIKE))
    basis, projected = _assert_decomposition(matrix, state)
    assert projected[0, 0] == pytest.approx(values[3], abs=1e-5)
    assert abs(projected[1, 0]) < 1e-5
    np.testing.assert_allclose(np.abs(basis[0] @ eigenvectors[:, 3]), 1, atol=1e-5)
    # The restart still finds the rest.
    np.testing.assert_allclose(pairs.values[-3:], values[-3:], atol=1e-4)


def test_an_order_above_the_dimension_ends_with_the_space():
    like = {"a": np.zeros((2, 2), np.float32), "b": np.float32(0)}
    values = np.array([-3.0, 1.0, 1.0, 2.0, 5.0])
    matrix = symmetric(values)

    @jax.jit
    def run(matrix, first):
        state = krylov.start(first, 9, seed=jnp.uint32(0))
        matvec = matrix_operator(matrix, like)
        return krylov.run(matvec, state, Leaves(like, None), look=_never, min_matvecs=0)

    first = unflatten(np.arange(1, 6, dtype=np.float32), like)
    state, pairs = run(matrix.astype(np.float32), first)
    assert state.exhausted
    assert state.count == 5
    assert not flat(state.vector).any()
    _assert_decomposition(matrix, state)
    np.testing.assert_allclose(pairs.values[:5], values, atol=1e-5)
    np.testing.assert_allclose(pairs.residuals[:5], 0, atol=1e-5)


@pytest.mark.parametrize("name", _SPECTRA)
def test_a_basis_of_the_whole_space_is_orthonormal(name):
    matrix = symmetric(_SPECTRA[name])
    state, pairs = _run(matrix, order=_N)
    count = int(state.count)
    basis = flat_rows(state.basis)[:count]
    np.testing.assert_allclose(basis @ basis.T, np.eye(count), atol=1e-5)
    assert count == _N
    scale = np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(pairs.values, np.sort(_SPECTRA[name]), atol=2 * _TOLERANCE * scale)


def test_run_changes_nothing_once_the_basis_is_full():
    matrix = symmetric(_SPECTRA["outliers"]).astype(np.float32)
    full, _ = _run(matrix)
    run = partial(krylov.run, layout=_LEAVES, look=_never, min_matvecs=0)
    after = jax.jit(lambda state: run(matrix_operator(matrix, _LIKE), state)[0])(full)
    for name, before in full._asdict().items():
        np.testing.assert_array_equal(flat(getattr(after, name)), flat(before), err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_product_that_is_not_finite_ends_the_run_and_shows(bad):
    matrix = symmetric(_SPECTRA["outliers"])
    whole, _ = _run(matrix)
    third = jax.tree.map(lambda x: np.asarray(x)[2], whole.basis)
    state, _ = _run(matrix, poison=third, bad=bad)
    assert state.count == 3
    assert not np.isfinite(state.beta)
    projected = np.asarray(state.projected)
    assert np.all(np.isfinite(projected[:, :2]))
    assert not np.all(np.isfinite(projected[:, 2]))


def test_run_asks_every_few_matvecs_and_not_before_the_least_number():
    matrix, every = symmetric(_SPECTRA["outliers"]), krylov.CHECK_EVERY
    least = (0, every, every + 1)
    counts = [int(_run(matrix, bound=np.inf, min_matvecs=m)[0].count) for m in least]
    assert counts == [every, every, 2 * every]


def test_run_counts_the_least_number_of_matvecs_from_the_last_breakdown():
    # The second product breaks down, so that four more end at the sixth, and the next look is at the eighth.
    matrix = symmetric(np.concatenate([[4.0, 4.0], np.linspace(-1, 1, _N - 2)]))
    _, eigenvectors = np.linalg.eigh(matrix)
    first = unflatten((eigenvectors[:, -1] + eigenvectors[:, 0]).astype(np.float32), _LIKE)
    state, pairs = _run(matrix, first, bound=np.inf, min_matvecs=4)
    assert (state.restart, state.count) == (2, 8)
    state, pairs = _run(matrix, first, bound=1e-2, min_matvecs=4)
    np.testing.assert_allclose(pairs.values[state.count - 2 : state.count], 4, atol=1e-3)


def test_run_stops_when_it_is_told_the_pairs_suffice():
    matrix = symmetric(_SPECTRA["outliers"])
    loose, tight, never = (int(_run(matrix, bound=bound)[0].count) for bound in (1, 1e-4, 0))
    assert loose < tight < never == _ORDER


def test_a_moving_operator_keeps_the_basis_orthonormal():
    start, drift = symmetric(_SPECTRA["outliers"]), symmetric(_SPECTRA["indefinite"], seed=9)

    @jax.jit
    def run(first):
        def step(state, j):
            moving = start.astype(np.float32) + 0.1 * j * drift.astype(np.float32)
            product = matrix_operator(moving, _LIKE)(state.vector)
            return krylov.extend(state, product, _LEAVES), None

        state = krylov.start(first, _ORDER, seed=jnp.uint32(0))
        state, _ = jax.lax.scan(step, state, jnp.arange(_ORDER, dtype=jnp.float32))
        return state, krylov.ritz(state)

    state, pairs = run(_random(1))
    basis, projected = flat_rows(state.basis), np.asarray(state.projected, np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(_ORDER), atol=_TOLERANCE)
    # Column j holds <q_i, A_j q_j>, on and above the diagonal in full.
    for j in (0, 7, _ORDER - 1):
        column = basis @ ((start + 0.1 * j * drift) @ basis[j])
        np.testing.assert_allclose(projected[: j + 1, j], column[: j + 1], atol=1e-4)
    assert np.max(np.abs(projected - projected.T)) > 1e-2
    symmetrised = np.linalg.eigvalsh((projected + projected.T) / 2)
    np.testing.assert_allclose(pairs.values, symmetrised, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7, _ORDER])
def test_residuals_tell_of_the_movement_of_the_operator(count):
    start, drift = symmetric(_SPECTRA["outliers"]), symmetric(_SPECTRA["indefinite"], seed=9)
    matrices = np.float32([start + 0.5 * j * drift for j in range(count)])
    state = _begin(_random(1))
    for matrix in matrices:
        state = _extend(matrix, state)
    pairs = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(krylov.ritz)(state))
    basis = flat_rows(state.basis)[:count]
    products = np.stack([matrix.astype(np.float64) @ q for matrix, q in zip(matrices, basis, strict=True)])
    coefficients = pairs.coefficients.T[:count, :count]
    dense = coefficients @ products - pairs.values[:count, None] * (coefficients @ basis)
    np.testing.assert_allclose(pairs.residuals[:count], np.linalg.norm(dense, axis=1), atol=2e-4)
    # What the last product adds to the space does not explain them.
    outside = np.abs(float(state.beta) * coefficients[:, -1])
    if count > 1:
        assert np.max(pairs.residuals[:count] / outside) > 2
        assert np.all(pairs.residuals[:count] >= outside - 1e-5)


_restart = jax.jit(lambda state, first: krylov.restart(state, first, seed=jnp.uint32(0)))


@pytest.mark.parametrize("name", ["outliers", "low rank"])
def test_a_process_restarted_in_old_buffers_is_that_of_a_fresh_start(name):
    """Rows of the old process stay in the basis beyond the new one's, and mean nothing."""
    matrix = symmetric(_SPECTRA[name]).astype(np.float32)
    old, _ = _run(symmetric(_SPECTRA["indefinite"]))
    first = jax.tree.map(lambda x: 3 * x, _random(2))
    restarted, fresh = _restart(old, first), _begin(first)
    assert np.any(flat_rows(restarted.basis)[1:])
    for count in range(_ORDER):
        for field in set(fresh._fields) - {"basis"}:
            np.testing.assert_array_equal(getattr(restarted, field), getattr(fresh, field), err_msg=field)
        np.testing.assert_array_equal(flat_rows(restarted.basis)[: count + 1], flat_rows(fresh.basis)[: count + 1])
        restarted, fresh = (_extend(matrix, state) for state in (restarted, fresh))
    assert restarted.count == _ORDER
    _assert_decomposition(matrix.astype(np.float64), restarted)


def test_a_restart_forgets_a_product_that_was_not_finite():
    state = _extend(np.full((_N, _N), np.nan, np.float32), _begin(_random(1)))
    assert not krylov.is_finite(state)
    state = _restart(state, _random(2))
    assert krylov.is_finite(state)
    matrix = symmetric(_SPECTRA["outliers"]).astype(np.float32)
    for _ in range(5):
        state = _extend(matrix, state)
    assert krylov.is_finite(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e30])
def test_is_finite_until_a_product_is_not_or_its_norm_cannot_be_had(bad):
    matrix = symmetric(_SPECTRA["outliers"]).astype(np.float32)
    state = _begin(_random(1))
    assert krylov.is_finite(state)
    for _ in range(2):
        state = _extend(matrix, state)
        assert krylov.is_finite(state)
    after = _extend(np.full((_N, _N), bad, np.float32), state)
    assert not krylov.is_finite(after)
    # Nothing is written to the rows in use.
    np.testing.assert_array_equal(flat_rows(after.basis)[:3], flat_rows(state.basis)[:3])
    assert np.isfinite(flat_rows(after.basis)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_a_run_satisfies_the_lanczos_identities_at_every_scale(scale):
    matrix = symmetric(_SPECTRA["outliers"])
    state, pairs = _run(scale * matrix)
    assert krylov.is_finite(state)
    assert state.restart == 0
    numbers = (scale, *(np.asarray(x, np.float64) for x in (state.projected, state.beta, pairs.values)))
    projected, beta, values = (x / scale for x in numbers[1:])
    _assert_decomposition(matrix, state._replace(projected=projected, beta=beta))
    plain, plain_pairs = _run(matrix)
    np.testing.assert_allclose(values[-3:], plain_pairs.values[-3:], atol=1e-5)
    np.testing.assert_allclose(pairs.residuals[-1] / scale, plain_pairs.residuals[-1], atol=1e-5)
    assert plain.count == state.count


def test_a_product_that_is_nothing_beside_those_before_is_a_breakdown():
    state = _extend(symmetric(_SPECTRA["outliers"]).astype(np.float32), _begin(_random(1)))
    after = _extend(np.full((_N, _N), 1e-36, np.float32), state)
    assert krylov.is_finite(after)
    assert (after.restart, after.beta) == (2, 0)


@pytest.mark.parametrize("scale", [1e-35, 1e36])
def test_a_first_product_at_the_end_of_the_range_of_float32_is_not_finite(scale):
    state = _extend(np.eye(_N, dtype=np.float32) * np.float32(scale), _begin(_random(1)))
    assert not krylov.is_finite(state)


_DEAD = np.arange(_N) % 4 == 1  # coordinates that the operator does not touch


def _with_dead_rows(name):
    """A matrix with zero rows and columns, of 45 other ones."""
    matrix = np.zeros((_N, _N))
    matrix[np.ix_(~_DEAD, ~_DEAD)] = symmetric(named_spectra(45)[name])
    return matrix


@pytest.mark.parametrize("name", ["outliers", "low rank", "multiple of the identity"])
def test_the_basis_is_exactly_zero_where_the_operator_is(name):
    matrix = _with_dead_rows(name)
    state, _ = _run(matrix)
    basis = flat_rows(state.basis)
    assert not basis[:, _DEAD].any()
    assert np.all(basis[0, ~_DEAD])
    assert (state.restart > 0) == (name != "outliers")
    _assert_decomposition(matrix, state)


def test_a_process_ends_with_the_space_on_which_the_operator_acts():
    matrix = _with_dead_rows("outliers")
    state, pairs = _run(matrix, order=_N)
    assert state.exhausted
    assert (state.count, pairs.num_valid) == (45, 45)
    np.testing.assert_allclose(pairs.values[:45], np.sort(named_spectra(45)["outliers"]), atol=1e-4)


def test_an_operator_that_is_zero_keeps_its_basis():
    state, _ = _run(np.zeros((_N, _N)))
    first = flat(_random(1))
    np.testing.assert_allclose(flat_rows(state.basis)[0], first / np.linalg.norm(first), atol=1e-7)


def test_coordinates_that_wake_up_later_are_found():
    state = _extend(_with_dead_rows("outliers").astype(np.float32), _begin(_random(1)))
    state = _extend(symmetric(_SPECTRA["outliers"]).astype(np.float32), state)
    basis = flat_rows(state.basis)
    assert not basis[:2, _DEAD].any()
    assert np.all(basis[2])


def test_a_first_product_that_is_not_finite_leaves_the_start_as_it_was():
    matrix = _with_dead_rows("outliers").astype(np.float32)
    matrix[0] = np.nan
    before = _begin(_random(1))
    after = _extend(matrix, before)
    assert not krylov.is_finite(after)
    np.testing.assert_array_equal(flat_rows(after.basis)[0], flat_rows(before.basis)[0])


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("name", ["outliers", "low rank"])
def test_on_several_devices_the_basis_is_exactly_zero_where_the_operator_is(name, num_devices):
    def program(matrix, _):
        layout = Layout(_LIKE, AXIS)

        def whole(segment):
            return layout.unpack(layout.gather(segment))

        def matvec(segment):
            return layout.split(matrix_operator(matrix, _LIKE)(whole(segment)))

        state = krylov.start(layout.split(_random(1)), _ORDER, seed=jnp.uint32(0), axis_name=AXIS)
        state, _ = krylov.run(matvec, state, layout, look=_never, min_matvecs=0)
        rows = [whole(vectors.row(state.basis, i)) for i in range(_ORDER)]
        return jax.tree.map(lambda *x: jnp.stack(x), *rows), state.restart

    matrix = _with_dead_rows(name).astype(np.float32)
    basis, restart = on_devices(program, num_devices, "shard_map")(matrix, np.zeros(num_devices))
    basis = flat_rows(jax.tree.map(lambda x: x[0], basis))
    assert (restart[0] > 0) == (name == "low rank")
    assert not basis[:, _DEAD].any()
    np.testing.assert_allclose(basis @ basis.T, np.eye(_ORDER), atol=_TOLERANCE)


def test_extend_copies_no_basis_and_sums_four_times_over_the_devices():
    like = {"a": np.zeros((50, 40), np.float32)}

    def extend(state, product):
        return krylov.extend(state, product, Leaves(like, None))

    state = krylov.start(jax.tree.map(jnp.ones_like, like), 16, seed=jnp.uint32(0))
    hlo = jax.jit(extend, donate_argnums=0).lower(state, like).compile().as_text()
    assert "f32[16,50,40]" in hlo
    assert not re.findall(r"f32\[16,50,40\]\S* copy\(", hlo)

    def program(product, _):
        layout = Layout(like, AXIS)
        state = krylov.start(layout.random(jnp.uint32(0)), 16, seed=jnp.uint32(0), axis_name=AXIS)
        return krylov.extend(state, layout.split(product), layout)

    hlo = on_devices(program, 2, "shard_map").lower(like, np.zeros(2)).compile().as_text()
    # Two for the norms of the start, and one in the branch that draws a random vector.
    assert count_instructions(hlo, "all-reduce") == 2 + 4 + 1


def test_the_program_of_a_product_is_short_and_does_not_grow_with_the_leaves():
    """632 lines for three leaves before vectors were packed."""

    def lines(num_leaves):
        layout = Layout([np.zeros((100 + i, 30), np.float32) for i in range(num_leaves)], None)
        state = jax.eval_shape(lambda: krylov.start(layout.random(jnp.uint32(0)), 16, seed=jnp.uint32(1)))
        product = jax.eval_shape(lambda state: state.vector, state)
        program = jax.jit(lambda state, product: krylov.extend(state, product, layout)).lower(state, product)
        return len(program.as_text().splitlines())

    assert lines(29) == lines(3) < 500


def test_zero_products_are_finite():
    state = _extend(np.zeros((_N, _N), np.float32), _begin(_random(1)))
    assert krylov.is_finite(state)
    assert state.beta == 0


def test_a_basis_in_bfloat16_is_stored_in_bfloat16_and_close_to_orthonormal():
    matrix = symmetric(_SPECTRA["outliers"]).astype(np.float32)

    @jax.jit
    def run(first):
        state = krylov.start(first, 8, seed=jnp.uint32(0), dtype=jnp.bfloat16)
        matvec = matrix_operator(matrix, _LIKE)
        return krylov.run(matvec, state, _LEAVES, look=_never, min_matvecs=0)[0]

    state = run(_random(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.basis)} == {jnp.dtype("bfloat16")}
    assert state.projected.dtype == jnp.float32
    basis = flat_rows(state.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=3e-2)
