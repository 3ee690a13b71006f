"""Eigenvectors and Krylov basis stored in bfloat16: arithmetic in float32, and rounding that is corrected for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import eigensolver, krylov, vectors
from dho2_optax.packing import Layout
from tests.helpers import AXIS, flat_rows, make_mesh, matrix_operator, named_spectra, on_devices, symmetric, unflatten

_N, _ORDER, _RANK = 300, 24, 8
_ROUNDING = 2.0**-8  # of bfloat16, relative to the number
_SPECTRA = {
    **named_spectra(_N),
    "condition 1e4": np.geomspace(1, 1e-4, _N),
    # The wanted pairs alone span three and a half decades.
    "steep": np.concatenate([np.geomspace(1, 3e-4, _RANK), np.random.default_rng(0).uniform(-1e-4, 1e-4, _N - _RANK)]),
}
_LIKE = {"a": np.zeros((20, 13), np.float32), "b": np.zeros(39, np.float32), "c": np.float32(0)}


def _run(matrix, layout, dtype):
    """A whole process, its pairs published, with the residuals that an optimizer sees."""

    def look(process):
        pairs = krylov.ritz(process, left=krylov.rounded_off(process, dtype))
        return eigensolver.wanted(pairs, _RANK, 0, "magnitude"), jnp.zeros((), bool)

    def matvec(segment):
        product = matrix_operator(matrix, _LIKE)(layout.unpack(layout.gather(segment)))
        return layout.split(product)

    first, axis_name = layout.random(jnp.uint32(3)), layout.axis_name
    start = krylov.start(first, _ORDER, seed=jnp.uint32(0), axis_name=axis_name, dtype=dtype)
    process, found = krylov.run(matvec, start, layout, look=look, min_matvecs=0)
    return eigensolver.publish(process, found, found.exists, layout.axis_name)


@functools.partial(jax.jit, static_argnames="dtype")
def _on_one_device(matrix, dtype="bfloat16"):
    return _run(matrix, Layout(_LIKE, None), dtype)


@pytest.mark.parametrize("name", _SPECTRA)
def test_pairs_are_as_good_as_their_residuals_say_and_orthonormal_to_float32(name):
    matrix = symmetric(_SPECTRA[name])
    scale = max(np.linalg.norm(matrix, 2), 1e-30)
    found = _on_one_device(matrix.astype(np.float32))
    assert {x.dtype for x in jax.tree.leaves(found.eigenvectors)} == {jnp.dtype("bfloat16")}
    exists = np.asarray(found.mask)
    rows = (np.asarray(found.orthonormalizer, np.float64) @ flat_rows(found.eigenvectors))[exists]
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=5e-6)
    values = np.asarray(found.eigenvalues)[exists]
    # The last rounding, of the eigenvectors themselves, is in no residual.
    left = np.linalg.norm(rows @ matrix - values[:, None] * rows, axis=1)
    assert np.all(left <= np.asarray(found.residuals)[exists] + 0.6 * _ROUNDING * scale)
    # A quotient errs by the square of the error of its vector; that of each of these by the product with the steepest.
    np.testing.assert_allclose(np.sum((rows @ matrix) * rows, axis=1), values, atol=3e-4 * scale)
    exact = np.linalg.eigvalsh(matrix)
    nearest = np.min(np.abs(exact - values[:, None]), axis=1)
    assert np.all(nearest <= np.asarray(found.residuals)[exists] + 3e-4 * scale)


def test_steep_pairs_are_found_in_their_order():
    values = _SPECTRA["steep"]
    found = _on_one_device(symmetric(values).astype(np.float32))
    np.testing.assert_allclose(found.eigenvalues[:5], np.sort(values)[::-1][:5], rtol=2e-2)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8])
def test_on_any_number_of_devices(num_devices):
    matrix = symmetric(_SPECTRA["condition 1e4"]).astype(np.float32)

    def program(matrix, _):
        found = _run(matrix, Layout(_LIKE, AXIS), "bfloat16")
        return found._replace(eigenvectors=vectors.gram(found.eigenvectors, found.eigenvectors, AXIS))

    found = on_devices(program, num_devices, "shard_map")(matrix, np.zeros(num_devices))
    for x in jax.tree.leaves(found):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    lower = np.asarray(found.orthonormalizer[0], np.float64)
    gram = lower @ np.asarray(found.eigenvectors[0], np.float64) @ lower.T
    np.testing.assert_allclose(gram, np.eye(_RANK), atol=5e-6)
    alone = _on_one_device(matrix)
    np.testing.assert_allclose(found.eigenvalues[0], alone.eigenvalues, atol=2e-3)


def test_products_with_the_eigenvectors_are_those_with_orthonormal_rows():
    matrix = symmetric(_SPECTRA["outliers"]).astype(np.float32)
    found = _on_one_device(matrix)
    rows = flat_rows(found.orthonormal().eigenvectors)
    numbers = np.random.default_rng(0).normal(size=(3, _N)).astype(np.float32)
    vector = Layout(_LIKE, None).pack(unflatten(numbers[0], _LIKE))
    np.testing.assert_allclose(found.dots(vector), rows @ numbers[0].astype(np.float64), atol=1e-5)
    mixed = flat_rows(jax.tree.map(lambda x: x[None], found.combine(numbers[1, :_RANK])))[0]
    np.testing.assert_allclose(mixed, numbers[1, :_RANK] @ rows, atol=1e-5)
    assert {x.dtype for x in jax.tree.leaves(found.combine(numbers[1, :_RANK]))} == {jnp.dtype("float32")}


# Optimizers, on a quadratic of condition 1e4.

_CURVATURE = np.geomspace(1, 1e-4, _N)
_MATRIX = symmetric(_CURVATURE).astype(np.float32)
_START = {"w": jnp.ones((20, 14)), "b": jnp.ones(20)}


def _loss(params, batch):
    vector = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(params)])
    return 0.5 * jnp.mean(batch) * jnp.dot(vector, jnp.dot(_MATRIX, vector, precision="highest"), precision="highest")


def _optimizer(kind, dtype, split=None):
    options = {"rank": _RANK, "eigensolver": dho2.Eigensolver(order=24, basis_dtype=dtype)}
    options |= {"split": split, "warmup_steps": 3}
    if kind == "dho2":
        return dho2.dho2(optax.sgd(0.3), _loss, refresh_interval=10, **options)
    return dho2.mr_dho2(optax.sgd(0.3), _loss, probe_interval=1, **options)


@functools.cache
def _train(kind, dtype, num_devices=None, steps=60):
    params, batch, split = _START, jnp.ones(24), None
    if num_devices is not None:
        mesh = make_mesh(num_devices)
        split = dho2.Split(AXIS, mesh=mesh)
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P(AXIS)))
    tx = _optimizer(kind, dtype, split)

    @jax.jit
    def run(params, batch):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(_loss)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)

    (params, state), values = run(params, batch)
    return params, state, np.asarray(values)


@pytest.mark.parametrize("kind", ["dho2", "mr_dho2"])
def test_an_optimizer_learns_as_with_eigenvectors_in_float32(kind):
    _, state, values = _train(kind, "bfloat16")
    _, exact, expected = _train(kind, None)
    assert exact.spectrum.orthonormalizer is None
    assert np.all(np.isfinite(values))
    np.testing.assert_allclose(values, expected, rtol=0.05, atol=1e-3 * expected[0])
    for name in ("refreshes", "rejected_refreshes"):
        assert dho2.metrics(state)[name] == dho2.metrics(exact)[name]
    rows = flat_rows(dho2.spectrum(state, _START).eigenvectors)
    active = np.asarray(state.spectrum.mask)
    assert active.sum() >= _RANK - 2
    np.testing.assert_allclose(rows @ rows.T, np.diag(active), atol=1e-5)
    assert dho2.orthogonality_error(state) < 1e-5


@pytest.mark.parametrize(
    ("kind", "num_devices"),
    [
        ("dho2", 3),
        ("mr_dho2", 8),
        *(pytest.param(k, n, marks=pytest.mark.slow) for k in ("dho2", "mr_dho2") for n in (2, 4)),
    ],
)
def test_an_optimizer_over_devices_learns_as_on_one(kind, num_devices):
    _, state, values = _train(kind, "bfloat16", num_devices)
    _, _, expected = _train(kind, "bfloat16")
    np.testing.assert_allclose(values, expected, rtol=0.02, atol=1e-3 * expected[0])
    assert state.spectrum.orthonormalizer.sharding.is_fully_replicated


@pytest.mark.parametrize("rank", [_RANK, 5, 11])
def test_a_saved_state_goes_on_with_another_rank_and_other_devices(rank):
    params, saved, _ = _train("dho2", "bfloat16")
    mesh = make_mesh(3)
    tx = dho2.dho2(
        optax.sgd(0.3),
        _loss,
        rank=rank,
        eigensolver=dho2.Eigensolver(basis_dtype="bfloat16"),
        split=dho2.Split(AXIS, mesh=mesh),
    )
    params = jax.device_put(jax.device_get(params), NamedSharding(mesh, P()))
    state = dho2.relayout(saved, tx.init(params), params)
    rows, before = (flat_rows(dho2.spectrum(s, _START).eigenvectors) for s in (state, saved))
    np.testing.assert_allclose(rows @ rows.T, np.diag(np.asarray(state.spectrum.mask)), atol=1e-5)
    kept = min(rank, _RANK)
    np.testing.assert_allclose(
        np.linalg.norm(rows[:kept] @ before.T, axis=1), np.asarray(state.spectrum.mask)[:kept], atol=5e-3
    )


def test_a_group_finds_them_too_and_must_be_of_the_dtype_of_the_optimizer():
    tx = dho2.dho2(
        optax.sgd(0.3), rank=_RANK, refresh_interval=None, eigensolver=dho2.Eigensolver(basis_dtype="bfloat16")
    )
    batch = np.ones(2, np.float32)

    def advanced(basis_dtype):
        group = dho2.CurvatureGroup(
            loss_fn=_loss,
            rank=_RANK,
            interval=1,
            deterministic=True,
            devices=jax.devices()[-2:],
            axis_name="curvature",
            eigensolver=dho2.Eigensolver(order=24, basis_dtype=basis_dtype),
        )
        state = tx.init(_START)
        try:
            for _ in range(3):
                _, state = tx.update(jax.grad(_loss)(_START, batch), state, _START)
                state = group.advance(state, _START, batch)
        finally:
            group.close()
        return state

    state = advanced("bfloat16")
    assert dho2.metrics(state)["refreshes"] >= 1
    rows = flat_rows(dho2.spectrum(state, _START).eigenvectors)
    np.testing.assert_allclose(rows @ rows.T, np.diag(np.asarray(state.spectrum.mask)), atol=1e-5)
    with pytest.raises(ValueError, match="`basis_dtype` must be that of the optimizer, bfloat16, got float32"):
        advanced(None)
