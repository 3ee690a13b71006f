from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import dho2_optax as dho2
from dho2_optax import kronecker
from dho2_optax.kronecker import (
    KroneckerState,
    Sides,
    kronecker_factors,
    kronecker_half,
    kronecker_inverse_half,
    scale_by_kronecker,
    shampoo,
    soap,
)
from tests.helpers import AXIS, flat, make_mesh, symmetric

_LIKE = {"matrix": np.zeros((2, 2, 3), np.float32), "scalar": np.float32(0), "vector": np.zeros(3, np.float32)}
_SCALINGS = ("soap", "shampoo")
_FACTORIES = {"soap": soap, "shampoo": shampoo}
_TX = {scaling: scale_by_kronecker(scaling, precondition_interval=2) for scaling in _SCALINGS}  # compiled once


def _tree(seed, like=_LIKE, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), like)


def _trees(num, like=_LIKE, dtype=np.float32):
    return [_tree(seed, like, dtype) for seed in range(num)]


def _orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


@cache
def _jit(tx):
    return jax.jit(tx.update)


def _run(tx, gradients, state=None, params=None):
    """The updates of a sequence of gradients, and the last state."""
    state = tx.init(gradients[0]) if state is None else state
    updates = []
    for gradient in gradients:
        direction, state = _jit(tx)(gradient, state, params)
        updates.append(direction)
    return updates, state


def _close(got, want, tolerance=1e-5):
    got, want = flat(got), flat(want)
    np.testing.assert_allclose(got, want, atol=tolerance * np.max(np.abs(want)))


class _Dense:
    """SOAP and Shampoo of one matrix in float64, with averages that are corrected where they are used."""

    def __init__(self, shape, scaling, b1=0.9, b2=0.95, eps=1e-8, precondition_interval=10, max_size=1024):
        self.scaling, self.b1, self.b2, self.eps = scaling, b1, b2, eps
        self.interval = precondition_interval
        self.count, self.mu, self.nu = 0, np.zeros(shape), np.zeros(shape)
        self.factors = [np.zeros((n, n)) for n in shape]
        self.bases = [np.eye(n) for n in shape]
        self.turned = [n <= max_size for n in shape]

    def renew(self):
        old = list(self.bases)
        for side in range(2):
            if not self.turned[side]:
                continue
            if self.count == 1:
                self.bases[side] = np.linalg.eigh(self.factors[side])[1]
            else:
                product = self.factors[side] @ old[side]
                order = np.argsort(-np.sum(old[side] * product, axis=0))
                self.bases[side] = np.linalg.qr(product[:, order])[0]
        left, right = (np.square(before.T @ after) for before, after in zip(old, self.bases, strict=True))
        self.nu = left.T @ self.nu @ right

    def scale(self):
        correction = 1 - self.b2**self.count
        if self.scaling == "soap":
            return 1 / (np.sqrt(self.nu / correction) + self.eps)
        left, right = (
            np.diag(basis.T @ factor @ basis) / correction
            for factor, basis in zip(self.factors, self.bases, strict=True)
        )
        m, n = self.mu.shape
        c = np.sqrt(m * n * np.sum(left) / (np.sum(np.sqrt(left)) * np.sum(np.sqrt(right))))
        return 1 / (np.outer(left, right) ** 0.25 / c + self.eps)

    def __call__(self, gradient):
        g = gradient.astype(np.float64)
        if self.count > 0 and (self.count - 1) % self.interval == 0:
            self.renew()
        self.count += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * g
        left, right = self.bases
        self.nu = self.b2 * self.nu + (1 - self.b2) * np.square(left.T @ g @ right)
        for side, product in enumerate((g @ g.T, g.T @ g)):
            self.factors[side] = self.b2 * self.factors[side] + (1 - self.b2) * product
        rotated = left.T @ self.mu @ right / (1 - self.b1**self.count)
        return left @ (self.scale() * rotated) @ right.T


@pytest.mark.parametrize("scaling", _SCALINGS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 5), {"precondition_interval": 1}),
        ((2, 2, 4), {"precondition_interval": 3, "eps": 0.3}),
        ((4, 9), {"max_size": 5, "b1": 0.5}),
        ((9, 4), {"max_size": 5, "b2": 0.6}),
    ],
)
def test_directions_equal_the_dense_formula(scaling, shape, options):
    gradients = _trees(8, np.zeros(shape))
    matrix_shape = (int(np.prod(shape[:-1])), shape[-1])
    dense = _Dense(matrix_shape, scaling, **options)
    others = [_Dense(matrix_shape, scaling, **{k: v for k, v in options.items() if k != name}) for name in options]
    differs = np.zeros(len(others))
    directions, _ = _run(scale_by_kronecker(scaling, **options), gradients)
    for direction, gradient in zip(directions, gradients, strict=True):
        gradient = gradient.reshape(matrix_shape)
        want = dense(gradient)
        _close(direction.reshape(matrix_shape), want, 2e-3)
        differs = np.maximum(differs, [np.max(np.abs(want - other(gradient))) for other in others])
    assert np.all(differs > 0.03)  # no option is without effect


def test_shampoo_steps_by_the_fourth_roots_of_the_averaged_factors():
    # Gradients that share their singular vectors, so that the bases of the last update are those of this one.
    n, b2 = 6, 0.9
    u, v = _orthogonal(n, 0), _orthogonal(n, 1)
    rng = np.random.default_rng(2)
    gradients = [(u * rng.uniform(0.5, 2, n)) @ v.T for _ in range(6)]
    directions, _ = _run(
        scale_by_kronecker("shampoo", b1=0.0, b2=b2, precondition_interval=1),
        [g.astype(np.float32) for g in gradients],
    )

    def root(matrix, power):
        eigenvalues, vectors = np.linalg.eigh(matrix)
        return (vectors * eigenvalues**power) @ vectors.T

    weights = b2 ** np.arange(len(gradients))[::-1]
    weights /= np.sum(weights)
    left = sum(w * g @ g.T for w, g in zip(weights, gradients, strict=True))
    right = sum(w * g.T @ g for w, g in zip(weights, gradients, strict=True))
    c = n * np.sqrt(np.trace(left) / (np.trace(root(left, 0.5)) * np.trace(root(right, 0.5))))
    _close(directions[-1], c * root(left, -0.25) @ gradients[-1] @ root(right, -0.25), 1e-4)


@pytest.mark.parametrize("num_directions", [1, 6])
def test_the_squares_of_shampoos_steps_have_a_mean_of_one(num_directions):
    # As those of Adam's have; for gradients whose covariance is a Kronecker product, of low rank too, at any scale.
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(6, num_directions)), rng.normal(size=(num_directions, 5))
    middle = rng.normal(size=(300, num_directions, num_directions))
    gradients = jnp.asarray(1e3 * rows @ middle @ columns, jnp.float32)
    tx = scale_by_kronecker("shampoo", b1=0.0, b2=0.99)
    _, directions = jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(gradients[0]), gradients)
    np.testing.assert_allclose(np.mean(np.square(directions[100:])), 1, rtol=0.1)


def test_without_rotated_sides_soap_is_adam():
    gradients = _trees(5)
    got, state = _run(soap(0.1, b1=0.8, b2=0.7, eps=1e-2, max_size=0), gradients)
    want, _ = _run(optax.adam(0.1, b1=0.8, b2=0.7, eps=1e-2), gradients)
    assert not jax.tree.leaves(state[0].bases)
    _close(got, want)


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_vectors_and_scalars_get_adams_update(scaling):
    gradients = _trees(5, {name: _LIKE[name] for name in ("scalar", "vector")})
    got, _ = _run(_FACTORIES[scaling](0.1, precondition_interval=1), gradients)
    want, _ = _run(optax.adam(0.1, b2=0.95), gradients)
    _close(got, want)


def test_the_first_update_of_soap_is_adams():
    gradients = _trees(2)
    got, _ = _run(_TX["soap"], gradients)
    want, _ = _run(optax.scale_by_adam(b2=0.95), gradients)
    _close(got[0], want[0])
    assert np.max(np.abs(flat(got[1]) - flat(want[1]))) > 0.1


@pytest.mark.parametrize("scaling", _SCALINGS)
@pytest.mark.parametrize("shape", [(4, 4), (6, 4)])
def test_a_rotated_problem_has_rotated_steps(scaling, shape):
    tx = scale_by_kronecker(scaling, precondition_interval=2, max_size=4)
    m, n = shape
    u, v = (_orthogonal(m, 0) if m == n else np.eye(m)), _orthogonal(n, 1)  # rows beyond max_size are not rotated
    tilt = np.geomspace(1, 0.1, m)[:, None]  # no two eigenvalues of a factor are close
    gradients = [tilt * _tree(seed, np.zeros(shape)) for seed in range(6)]

    def run(gradients, *bases):
        state = tx.init(gradients[0])
        start = [old if old is None else jnp.asarray(q, jnp.float32) for old, q in zip(state.bases, bases, strict=True)]
        return _run(tx, gradients, state._replace(bases=Sides(*start)))[0]

    plain = run([g.astype(np.float32) for g in gradients], np.eye(m), np.eye(n))
    rotated = run([(u @ g @ v.T).astype(np.float32) for g in gradients], u, v)
    _close(rotated, [u @ g @ v.T for g in plain], 1e-2)


def test_bases_are_renewed_once_per_interval():
    tx, gradients = scale_by_kronecker(precondition_interval=3), _trees(8, np.zeros((4, 4)))
    state, renewed = tx.init(gradients[0]), []
    for t, gradient in enumerate(gradients):
        _, new = _jit(tx)(gradient, state)
        if np.any(flat(new.bases) != flat(state.bases)):
            renewed.append(t)
        state = new
    assert renewed == [1, 4, 7]


def test_bases_become_the_eigenvectors_of_the_factors_and_follow_them():
    n = 6
    eigenvalues = np.geomspace(1, 0.01, n)
    matrix, other = (symmetric(eigenvalues, seed) for seed in range(2))
    renew = jax.jit(kronecker._renew_basis)

    def defect(factor, basis):
        basis = np.asarray(basis, np.float64)
        np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-5)
        product = basis.T @ factor @ basis
        return np.linalg.norm(product - np.diag(np.diag(product)))

    basis = renew(matrix.astype(np.float32), np.eye(n, dtype=np.float32), True)
    assert defect(matrix, basis) < 1e-5
    defects = [defect(other, basis)]
    for _ in range(20):
        basis = renew(other.astype(np.float32), basis, False)
        defects.append(defect(other, basis))
    assert defects[1] < 0.5 * defects[0]
    assert defects[-1] < 1e-4
    np.testing.assert_allclose(np.diag(basis.T @ other @ basis), eigenvalues, atol=1e-5)  # the largest come first
    # The scale of a factor does not matter.
    for scale in (1e36, 1e-30):
        scaled = renew((scale * other).astype(np.float32), basis, False)
        np.testing.assert_allclose(np.abs(np.sum(scaled * basis, axis=0)), 1, atol=1e-5)
    for is_first in (True, False):
        defect(np.zeros((n, n)), renew(np.zeros((n, n), np.float32), basis, is_first))


def test_second_moments_are_carried_over_to_renewed_bases():
    # Where the coordinates are uncorrelated: their variances in the new basis.
    n = 5
    variances = np.random.default_rng(0).uniform(1, 2, (n, n))
    left, right = _orthogonal(n, 0), _orthogonal(n, 1)
    factors = Sides(*(symmetric(np.geomspace(1, 0.1, n), seed).astype(np.float32) for seed in range(2)))
    leaf = kronecker._Leaf(np.zeros((n, n)), variances.astype(np.float32), factors, Sides(np.eye(n), np.eye(n)))
    leaf = leaf._replace(bases=Sides(left.astype(np.float32), right.astype(np.float32)))
    new = jax.jit(kronecker._renew)(leaf, jnp.bool_(True))
    # The covariance of the gradient's entries in the old basis is diagonal; turn it to the new one.
    a, b = left.T @ np.asarray(new.bases.left), right.T @ np.asarray(new.bases.right)
    turn = np.kron(a, b)
    want = np.diag(turn.T @ np.diag(variances.ravel()) @ turn).reshape(n, n)
    _close(new.nu, want)
    assert np.max(np.abs(want - variances)) > 0.1


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_half_powers_of_the_preconditioner(scaling):
    gradients, vector, other = _trees(5), _tree(9), _tree(10)
    injected = optax.inject_hyperparams(_FACTORIES[scaling], static_args="max_size")
    updates, state = _run(injected(0.1, b1=0.0, eps=0.3, precondition_interval=2), gradients, params=_LIKE)
    factors = kronecker_factors(state, _LIKE)
    half, inverse = (jax.jit(partial(f, factors)) for f in (kronecker_half, kronecker_inverse_half))
    # P g, what the base did with the last gradient, eps included.
    _close(updates[-1], jax.tree.map(lambda x: -0.1 * x, half(half(gradients[-1]))), 1e-4)
    _close(inverse(half(vector)), vector, 1e-4)
    _close(half(inverse(vector)), vector, 1e-4)
    np.testing.assert_allclose(flat(other) @ flat(half(vector)), flat(half(other)) @ flat(vector), rtol=1e-4)
    assert flat(vector) @ flat(half(vector)) > 0
    assert np.max(np.abs(flat(half(vector)) - flat(vector))) > 0.1
    narrow = half(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), vector))
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    _close(narrow, half(vector), 2e-2)


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_half_powers_before_the_first_update_are_the_identity(scaling):
    state, vector = _TX[scaling].init(_LIKE), _tree(0)
    factors = kronecker_factors(state, _LIKE)
    _close(kronecker_half(factors, vector), vector)
    _close(kronecker_inverse_half(factors, vector), vector)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, factors))]
    assert len(set(buffers)) == len(buffers)  # so that a state which holds both can be donated


def test_the_state_is_found_inside_compositions():
    state = _run(_TX["soap"], _trees(3))[1]
    want = kronecker_factors(state, _LIKE)
    tx = optax.apply_if_finite(optax.chain(optax.identity(), _TX["soap"]), 3)
    inner_state = (optax.EmptyState(), state)
    _close(kronecker_factors(tx.init(_LIKE)._replace(inner_state=inner_state), _LIKE), want)

    hide = lambda tree: {**tree, "vector": optax.MaskedNode()}  # noqa: E731
    state = optax.masked(_TX["soap"], {**dict.fromkeys(_LIKE, True), "vector": False}).init(_LIKE)
    assert jax.tree.structure(kronecker_factors(state, hide(_LIKE)).scale) == jax.tree.structure(hide(_LIKE))


def test_a_state_that_is_missing_or_of_other_parameters_is_an_error():
    state = soap(0.1).init(_LIKE)
    with pytest.raises(ValueError, match=r"`base_state` must hold one soap or shampoo state, got 0"):
        kronecker_factors(optax.adam(0.1).init(_LIKE), _LIKE)
    with pytest.raises(ValueError, match=r"`base_state` must hold one soap or shampoo state, got 2"):
        kronecker_factors((state, state), _LIKE)
    with pytest.raises(ValueError, match=r"`like` must be a pytree like the parameters"):
        kronecker_factors(state, {"vector": _LIKE["vector"]})
    with pytest.raises(ValueError, match=r"`like` must be a pytree like the parameters"):
        kronecker_factors(state, jax.tree.map(np.ravel, _LIKE))


@pytest.mark.parametrize("factory", [soap, shampoo])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"`b1` must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"`b2` must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, "`eps` must be positive, got 0.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be non-negative, got -1.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be non-negative, got nan"),
        ({"precondition_interval": 0}, "`precondition_interval` must be positive, got 0"),
        ({"precondition_interval": 2.5}, r"`precondition_interval` must be a positive integer below 2..31, got 2.5"),
        ({"max_size": -1}, "`max_size` must be a Python int of at least 0, got -1"),
        ({"max_size": jnp.int32(3)}, "`max_size` must be a Python int.*a function of the hyperparameters"),
    ],
)
def test_options_out_of_range_are_errors(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**{"learning_rate": 0.1, **options})


def test_an_unknown_scaling_is_an_error():
    with pytest.raises(ValueError, match=r"`scaling` must be one of \('soap', 'shampoo'\), got 'adam'"):
        scale_by_kronecker("adam")


@pytest.mark.parametrize("factory", [soap, shampoo])
def test_learning_rates_and_weight_decay(factory):
    gradients, params = _trees(3), _tree(9)
    directions, _ = _run(_TX[factory.__name__], gradients)
    tx = factory(lambda count: 0.1 * (count + 1), weight_decay=0.5, precondition_interval=2)
    updates, _ = _run(tx, gradients, params=params)
    for t, (update, direction) in enumerate(zip(updates, directions, strict=True)):
        _close(update, jax.tree.map(lambda d, p, t=t: -0.1 * (t + 1) * (d + 0.5 * p), direction, params))


def test_sides_longer_than_max_size_keep_their_coordinates():
    state = soap(0.1, max_size=5).init({"a": np.zeros((5, 6), np.float32), "b": np.zeros((6, 1), np.float32)})[0]
    shapes = jax.tree.map(jnp.shape, (state.factors, state.bases))
    assert shapes == ({"a": Sides((5, 5), None), "b": Sides(None, None)},) * 2


def test_shampoo_keeps_no_second_moment_of_every_entry():
    state = shampoo(0.1).init(_LIKE)[0]
    assert jax.tree.map(jnp.shape, state.nu["matrix"]) == Sides((4,), (3,))
    assert jax.tree.map(jnp.shape, state.nu["vector"]) == (3,)


@pytest.mark.parametrize("scaling", _SCALINGS)
@pytest.mark.parametrize("when", [0, 2])  # not updates that renew the bases
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_spoils_no_averages(scaling, when, bad):
    tx, gradients = _TX[scaling], _trees(6)
    before = _run(tx, gradients[:when])[1] if when else tx.init(_LIKE)
    spoiled = {**gradients[when], "matrix": gradients[when]["matrix"].copy()}
    spoiled["matrix"][0, 1, 2] = bad
    (direction,), after = _run(tx, [spoiled], before)
    is_bad = np.zeros((2, 2, 3), bool)
    is_bad[0, 1, 2] = not np.isfinite(bad)
    np.testing.assert_array_equal(np.isfinite(direction["matrix"]), ~is_bad)
    for name in ("mu", "nu", "factors", "bases"):
        np.testing.assert_array_equal(*(flat(getattr(state, name)["matrix"]) for state in (after, before)))
    # Other leaves take no notice, and training goes on.
    (clean,), _ = _run(tx, [gradients[when]], before)
    np.testing.assert_array_equal(direction["vector"], clean["vector"])
    directions, state = _run(tx, gradients[when:], after)
    assert np.all(np.isfinite(flat(directions)))
    assert np.all(np.isfinite(flat(state)))


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_gradients_of_zero_and_leaves_without_numbers(scaling):
    like, tx = {**_LIKE, "empty": np.zeros((0, 3), np.float32)}, _TX[scaling]
    directions, state = _run(tx, [like] * 3)
    assert np.all(flat(directions) == 0)
    assert np.all(np.isfinite(flat(kronecker_half(kronecker_factors(state, like), _tree(0, like)))))
    directions, _ = _run(tx, _trees(3, like), state)
    assert np.all(np.isfinite(flat(directions)))


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_statistics_are_float32_and_updates_have_the_dtype_of_the_gradients(scaling):
    dtype = jnp.bfloat16
    like = jax.tree.map(lambda x: jnp.asarray(x, dtype), _LIKE)
    tx = _FACTORIES[scaling](0.1, weight_decay=0.1, precondition_interval=2)
    with jax.numpy_dtype_promotion("strict"):
        gradients = [jax.tree.map(lambda x: jnp.asarray(x, dtype), g) for g in _trees(3)]
        (updates, *_), (state, *_) = _run(tx, gradients, params=like)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state._replace(count=(), clock=()))} == {jnp.dtype(jnp.float32)}
    assert state.count.dtype == state.clock.dtype == jnp.int32


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_float64_parameters_have_float64_statistics(scaling):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        options = {"precondition_interval": 2, "b2": 0.7}
        gradients = _trees(6, np.zeros((5, 5)), np.float64)
        directions, state = _run(scale_by_kronecker(scaling, **options), gradients)
        dense = _Dense((5, 5), scaling, **options)
        _close(directions, [dense(g) for g in gradients], 1e-9)
        assert {x.dtype for x in jax.tree.leaves(state.bases)} == {jnp.dtype(jnp.float64)}
        factors = kronecker_factors(state, gradients[0])
        _close(kronecker_inverse_half(factors, kronecker_half(factors, gradients[0])), gradients[0], 1e-12)


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_scan_donation_and_restored_states_give_the_same_updates(scaling):
    tx, gradients = _TX[scaling], _trees(6)
    want, last = _run(tx, gradients)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    state, scanned = jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(_LIKE), stacked)
    _close([jax.tree.map(lambda x, t=t: x[t], scanned) for t in range(6)], want, 1e-4)
    _close(kronecker_factors(state, _LIKE).scale, kronecker_factors(last, _LIKE).scale, 1e-3)

    donated = jax.jit(lambda g, state: tx.update(g, state), donate_argnums=1)
    state, updates = tx.init(_LIKE), []
    for t, gradient in enumerate(gradients):
        update, state = donated(gradient, state)
        updates.append(update)
        if t == 2:  # as a checkpoint would
            leaves, treedef = jax.tree.flatten(state)
            state = treedef.unflatten([jnp.array(np.asarray(x)) for x in leaves])
    _close(updates, want, 1e-4)


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_states_keep_their_shapes_and_can_be_described(scaling):
    tx = _FACTORIES[scaling](0.1)
    state = tx.init(_LIKE)
    assert isinstance(state[0], KroneckerState)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)  # noqa: E731
    assert describe(jax.eval_shape(tx.init, _LIKE)) == describe(state)
    assert describe(jax.eval_shape(tx.update, _LIKE, state)[1]) == describe(state)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_hidden_and_missing_leaves():
    tx, gradients = _TX["soap"], _trees(3)
    updates, _ = _run(tx, [{}] * 2)
    assert updates[-1] == {}
    want, _ = _run(tx, gradients)
    hidden = [{**g, "vector": optax.MaskedNode()} for g in gradients]
    got, state = _run(tx, hidden)
    _close(got[-1], {**want[-1], "vector": optax.MaskedNode()})
    half = kronecker_half(kronecker_factors(state, hidden[0]), hidden[0])
    assert half["vector"] == got[-1]["vector"] == optax.MaskedNode()

    labels = {"matrix": "kronecker", "scalar": "adam", "vector": "adam"}
    got, _ = _run(optax.partition({"kronecker": tx, "adam": optax.scale_by_adam(b2=0.95)}, labels), gradients)
    _close(got[-1], want[-1])


@pytest.mark.parametrize(("scaling", "dtype"), [("soap", jnp.float32), ("shampoo", jnp.bfloat16)])
def test_hyperparameters_can_be_injected(scaling, dtype):
    gradients = [jax.tree.map(lambda x: jnp.asarray(x, dtype), g) for g in _trees(4)]
    options = {"b1": 0.5, "b2": 0.75, "eps": 0.25, "weight_decay": 0.5, "precondition_interval": 2}
    factory = _FACTORIES[scaling]
    injected = optax.inject_hyperparams(factory, static_args="max_size")(optax.constant_schedule(0.125), **options)
    params = gradients[0]
    with jax.numpy_dtype_promotion("strict"):
        got, _ = _run(injected, gradients, params=params)
        want, _ = _run(factory(0.125, **options), gradients, params=params)
    _close(got, want, 1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("scaling", _SCALINGS)
def test_gradients_that_vary_over_a_mesh_axis(scaling):
    # Inside shard_map with its checks on, every device by itself.
    tx = _TX[scaling]
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 3)), jnp.float32)

    @partial(jax.shard_map, mesh=make_mesh(2), in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(AXIS))
    def run(local):
        state, directions = tx.init(local[0, 0]), []
        for gradient in local[0]:
            direction, state = tx.update(gradient, state)
            directions.append(direction)
        return jnp.stack(directions)[None]

    got = jax.jit(run)(gradients)
    for device in range(2):
        _close(got[device], _run(tx, list(gradients[device]))[0], 1e-3)


@pytest.mark.parametrize("factory", [soap, shampoo])
def test_an_ill_conditioned_matrix_problem_goes_faster_than_with_adam(factory):
    n, num_steps = 10, 150
    a, b = (jnp.asarray(symmetric(np.geomspace(1, 0.05, n), seed), jnp.float32) for seed in range(2))
    target = jnp.asarray(_tree(0, np.zeros((n, n))))

    def loss_fn(w):
        return jnp.sum((a @ w @ b - target_image) ** 2)

    target_image = a @ target @ b

    @partial(jax.jit, static_argnums=0)
    def final_loss(factory, learning_rate):
        tx = factory(lambda count: learning_rate * (1 - count / num_steps))

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.zeros((n, n))
        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=num_steps)
        return loss_fn(w)

    rates = (0.01, 0.03, 0.1, 0.3)
    ours, adam = (min(float(final_loss(f, rate)) for rate in rates) for f in (factory, optax.adam))
    assert ours < adam / 10


def test_the_hybrid_takes_it_for_a_base():
    n = 6
    matrix = jnp.asarray(symmetric(np.geomspace(1, 0.01, n)), jnp.float32)
    loss_fn = lambda w, batch: jnp.sum((batch @ w) ** 2)  # noqa: E731
    tx = dho2.dho2(soap(0.05), loss_fn, rank=2, refresh_interval=5)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(w, state):
        updates, state = tx.update(jax.grad(loss_fn)(w, matrix), state, w, batch=matrix)
        return optax.apply_updates(w, updates), state

    w = jnp.ones((n, 3))
    start, state = loss_fn(w, matrix), tx.init(w)
    for _ in range(20):
        w, state = step(w, state)
    assert loss_fn(w, matrix) < 0.5 * start
    assert int(dho2.metrics(state)["refreshes"]) == 4
