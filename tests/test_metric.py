"""The metric: reading a base's preconditioner, and the hybrid rule in its geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from benchmarks.options import grouped
from dho2_optax import metric as metric_lib
from dho2_optax import segments
from dho2_optax.packing import Layout, of_buffers
from tests import helpers
from tests.helpers import AXIS

_PARAMS = {"w": jnp.linspace(0.1, 0.9, 21).reshape(3, 7), "b": jnp.linspace(-0.5, 0.5, 5)}
_SIZE = 26
_RNG = np.random.default_rng(3)
_HESSIAN = helpers.symmetric(np.concatenate([np.geomspace(30, 1, 6), np.geomspace(0.5, 0.01, _SIZE - 6)]), seed=1)
_SCALES = np.exp(_RNG.uniform(-3, 3, _SIZE))  # what a diagonal preconditioner is there for
_MATRIX = np.sqrt(_SCALES)[:, None] * _HESSIAN * np.sqrt(_SCALES)


def _loss(params, batch):
    x = jnp.concatenate([params["b"].reshape(-1), params["w"].reshape(-1)])
    matrix = jnp.asarray(_MATRIX, x.dtype)
    return 0.5 * jnp.mean(batch) * x @ jnp.dot(matrix, x, precision=jax.lax.Precision.HIGHEST)


_BATCH = jnp.ones(8)


def _train(tx, num_steps=12, *, hvp=False, metric=None):
    probing = dho2.value_grad_and_hvp(_loss, metric=metric)

    @jax.jit
    def step(params, state):
        if hvp:
            _, grads, product = probing(params, state, _BATCH)
            updates, state = tx.update(grads, state, params, hvp=product)
        else:
            updates, state = tx.update(jax.grad(_loss)(params, _BATCH), state, params, batch=_BATCH)
        return optax.apply_updates(params, updates), state

    params, state = _PARAMS, tx.init(_PARAMS)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


def _values(base_state):
    """The factors of Adam and its kin, leaf by leaf."""
    factors = metric_lib.snapshot(metric_lib.DIAGONAL, base_state, _PARAMS, None, segmented_base=False)
    return Layout(_PARAMS, None).unpack(factors.values)


def _preconditioned(state):
    """P^{1/2} H P^{1/2} for the factors in use, in float64."""
    half = helpers.flat(state.factors.values)
    return half[:, None] * _MATRIX * half


_BASES = {
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01),
    "nadam": lambda: optax.nadam(0.01),
    "amsgrad": lambda: optax.amsgrad(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01),
    "rmsprop, centred": lambda: optax.rmsprop(0.01, centered=True, initial_scale=1.0),
    "rmsprop, unbiased": lambda: optax.rmsprop(0.01, bias_correction=True),
    "adagrad": lambda: optax.adagrad(0.01),
    "adabelief": lambda: optax.adabelief(0.01),
    "adam in a chain": lambda: optax.chain(optax.clip(1.0), optax.chain(optax.scale_by_adam(), optax.scale(-0.01))),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
}


def _half(nu):
    """P^{1/2} of a leaf, P at most 1000 times its smallest number."""
    half = (np.sqrt(nu) + 1e-8) ** -0.5
    return np.minimum(half, np.sqrt(1000) * half.min())


@pytest.mark.parametrize("name", _BASES)
def test_the_second_moment_of_every_known_base_is_read(name):
    base = _BASES[name]()
    state = base.init(_PARAMS)
    grads = jax.tree.map(lambda x: 3 * x + 0.2, _PARAMS)
    for _ in range(3):
        _, state = base.update(grads, state, _PARAMS)
    values = _values(state)
    found = {
        "adagrad": ("sum_of_squares", lambda nu, mu: nu),
        "amsgrad": ("nu_max", lambda nu, mu: nu),
        "rmsprop, centred": ("nu", lambda nu, mu: nu - mu**2),
    }.get(name, ("nu", lambda nu, mu: nu))
    second = optax.tree.get(state, found[0])
    first = optax.tree.get(state, "mu") if name == "rmsprop, centred" else second
    # Adam and most of its kin divide by moments without bias; the maximum of AMSGrad is of such.
    weight = 1 - 0.999**3 if name in ("adam", "adamw", "nadam", "adabelief", "adam in a chain", "injected") else 1
    expected = jax.tree.map(lambda nu, mu: _half(found[1](nu, mu) / weight), second, first)
    for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_leaves_that_the_base_does_not_scale_have_the_identity():
    labels = {"w": "adam", "b": "sgd"}
    base = optax.partition({"adam": optax.adam(0.01), "sgd": optax.sgd(0.01, momentum=0.9)}, labels)
    _, state = base.update(_PARAMS, base.init(_PARAMS), _PARAMS)
    values = _values(state)
    np.testing.assert_array_equal(values["b"], np.ones(5))
    np.testing.assert_allclose(values["w"], _half(_PARAMS["w"] ** 2), rtol=1e-4)


def test_under_a_mask_the_base_is_read_as_without():
    tx = optax.masked(dho2.dho2(optax.adam(0.01), rank=2), {"w": True, "b": False})
    ours = tx.init(_PARAMS).inner_state
    assert [x.shape for x in jax.tree.leaves(ours.factors)] == [_PARAMS["w"].shape]
    hidden = {"w": _PARAMS["w"], "b": optax.MaskedNode()}
    found = metric_lib.momentum(ours.base_state, hidden)
    assert found is not None
    np.testing.assert_allclose(found.limit, 38, rtol=1e-6)


def test_two_adams_on_different_leaves_are_both_read():
    labels = {"w": "slow", "b": "fast"}
    base = optax.partition({"slow": optax.adam(0.01), "fast": optax.adam(0.1)}, labels)
    _, state = base.update(_PARAMS, base.init(_PARAMS), _PARAMS)
    values = _values(state)
    expected = jax.tree.map(lambda g: _half(g**2), _PARAMS)
    for name in ("w", "b"):
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-4)


def test_map_params_finds_the_factors_of_the_metric():
    tx = dho2.dho2(optax.adam(0.01), rank=2)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, tx.init(_PARAMS))
    for x in jax.tree.leaves(mapped.base_state[0].nu):
        np.testing.assert_array_equal(x, np.ones(x.shape))
    before = jax.tree.leaves(tx.init(_PARAMS).factors)
    for old, new in zip(before, jax.tree.leaves(mapped.factors), strict=True):
        np.testing.assert_array_equal(new, old + 1)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_the_factors_of_weights_without_gradients_are_limited_by_the_others_of_their_leaf(num_devices):
    nu = jnp.ones(600).at[7].set(0.0).at[599].set(4.0)

    def factors(nu):
        state = (optax.ScaleByAdamState(jnp.int32(10**6), {"w": nu, "b": nu[:3]}, {"w": nu, "b": nu[:3]}),)
        return metric_lib.DIAGONAL.factors(state, {"w": nu, "b": nu[:3]}, AXIS)

    mesh = helpers.make_mesh(num_devices)
    run = jax.shard_map(lambda nu: factors(segments.split(nu, AXIS)), mesh=mesh, in_specs=P(), out_specs=P(AXIS))
    found = jax.jit(run)(nu)["w"][:600]
    np.testing.assert_allclose(found, _half(np.asarray(nu)), rtol=1e-5)
    assert float(found[7]) == pytest.approx((1000 / 2) ** 0.5, rel=1e-5)
    assert float(factors(nu)["b"][0]) == pytest.approx(1, rel=1e-5)


def test_a_leaf_without_any_gradient_so_far_has_the_identity_and_what_has_overflowed_has_zero():
    """P is zero where the base does not step any more, and so is its inverse, in place of an infinity."""
    nu = {"w": jnp.asarray([4.0, jnp.inf]), "b": jnp.zeros(2)}
    state = (optax.ScaleByAdamState(jnp.int32(10**6), nu, nu),)
    values = metric_lib.DIAGONAL.factors(state, nu, None)
    np.testing.assert_allclose(values["w"], [0.5**0.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(values["b"], [1, 1])
    back = metric_lib.DIAGONAL.inverse_half(values, {"w": jnp.ones(2), "b": jnp.ones(2)})
    np.testing.assert_allclose(back["w"], [2**0.5, 0], rtol=1e-6)


def test_the_parts_of_whole_factors_are_zero_where_these_are_and_one_in_the_padding():
    values = {"w": jnp.asarray([0.5, 0.0, 2.0])}
    factors = metric_lib.Factors(values, metric_lib.Diagonal(), metric_lib.OnWholeLeaves())
    mesh = helpers.make_mesh(2)
    run = jax.shard_map(
        lambda factors: factors.split(Layout(values, AXIS)).values[0].reshape(-1),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(AXIS),
    )
    parts = np.asarray(run(factors))
    assert sorted(parts)[:3] == [0, 0.5, 1]
    assert sorted(parts)[-1] == 2
    assert parts.size > 3
    assert set(parts) == {0, 0.5, 1, 2}


def test_a_weight_that_has_had_no_gradient_does_not_fill_the_subspace():
    """Curvature sees a unit on a sample that no gradient was taken of: P is 1e8 there."""
    scales = jnp.asarray([5.0, 4.0, 3.0, 2.0, 1.0, 1e-4])
    tx = dho2.dho2(
        optax.adam(1e-3),
        curvature=lambda params, vector, batch: scales * vector,
        rank=2,
        eigensolver=dho2.Eigensolver(order=6),
        refresh_interval=5,
    )
    params, update = jnp.ones(6), jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(5):
        _, state = update((scales * params).at[5].set(0.0), state, params, batch=jnp.ones(1))
    assert np.all(np.asarray(state.spectrum.mask))
    assert float(jnp.max(jnp.abs(state.spectrum.eigenvectors[0][:, 5]))) < 0.5


@pytest.mark.parametrize(
    ("base", "named"),
    [(optax.sgd(0.1), ""), (optax.lion(0.1), "ScaleByLionState"), (optax.contrib.muon(0.1), "MuonState")],
    ids=["sgd", "lion", "muon"],
)
@pytest.mark.parametrize("factory", [dho2.dho2, dho2.mr_dho2])
def test_a_base_without_a_preconditioner_is_refused(factory, base, named):
    tx = factory(base, _loss, rank=2, metric="base")
    with pytest.raises(ValueError, match=r"`metric` 'base' needs a base whose preconditioner.*" + named):
        tx.init(_PARAMS)


@pytest.mark.parametrize(
    ("base", "name", "limit"),
    [
        (optax.adam(0.1), "mu", 38),
        (optax.chain(optax.clip(1.0), optax.nadam(0.1)), "mu", 38),
        (optax.sgd(0.1, momentum=0.9), "trace", 3.8),
        (dho2.soap(0.1), "mu", 38),
        (optax.sgd(0.1), None, None),
        (optax.partition({"w": optax.adam(0.1), "b": optax.sgd(0.1)}, {"w": "w", "b": "b"}), None, None),
        (optax.partition({"w": optax.adam(0.1), "b": optax.nadam(0.1)}, {"w": "w", "b": "b"}), "both", 38),
    ],
    ids=["adam", "chain", "heavy ball", "soap", "sgd", "adam and sgd", "adam and nadam"],
)
def test_the_momentum_of_a_base_is_read(base, name, limit):
    _, state = base.update(_PARAMS, base.init(_PARAMS), _PARAMS)
    found = metric_lib.momentum(state, _PARAMS)
    if name is None:
        assert found is None
        return
    np.testing.assert_allclose(found.limit, limit, rtol=1e-6)
    gain = 1.0 if name == "trace" else 0.1
    for a, b in zip(jax.tree.leaves(found.vector), jax.tree.leaves(_PARAMS), strict=True):
        np.testing.assert_allclose(a, gain * b, rtol=1e-6)


def test_the_learning_rate_is_found_whatever_schedules_and_bias_corrections_are_in_it():
    """One in which Adam has a momentum: eta is lr sqrt(1 - b2^t) / (1 - b1^t)."""
    tx = dho2.dho2(
        optax.adam(optax.linear_schedule(0.0, 1.0, 100)),
        _loss,
        rank=3,
        refresh_interval=1,
        metric="base",
        eigensolver=dho2.Eigensolver(order=16, tolerance=0.0),
        base_scale=dho2.BaseScale(sharpness=1.0, limit=1e6, growth=1e9),
    )
    _, state = _train(tx, 3)
    eta = 0.02 * np.sqrt(1 - 0.999**3) / (1 - 0.9**3)
    largest, smallest = np.max(state.spectrum.eigenvalues), np.min(state.spectrum.eigenvalues)
    expected = max(min(largest, 38 / eta) / max(smallest, state.missed), 1)
    assert expected > 1.5
    np.testing.assert_allclose(state.sigma, expected, rtol=2e-2)


@pytest.mark.parametrize("factory", [dho2.dho2, dho2.mr_dho2])
def test_an_unknown_metric_is_refused(factory):
    with pytest.raises(ValueError, match=r"`metric` must be None, 'auto', 'base' or a dho2_optax.Metric, got 'adam'"):
        factory(optax.adam(0.1), _loss, metric="adam")


_FACTORIES = {
    "dho2": lambda base, **options: dho2.dho2(base, _loss, **grouped(refresh_interval=5, **options)),
    "mr_dho2": lambda base, **options: dho2.mr_dho2(base, **grouped(probe_interval=1, **options)),
}


@pytest.mark.parametrize("name", _FACTORIES)
def test_eigenpairs_are_those_of_the_preconditioned_hessian(name):
    tx = _FACTORIES[name](optax.adam(1e-4), rank=3, order=16, tolerance=0.0, metric="base")
    _, state = _train(tx, 45, hvp=name == "mr_dho2")
    values, eigenvectors = np.linalg.eigh(_preconditioned(state))
    np.testing.assert_allclose(state.spectrum.eigenvalues, values[::-1][:3], rtol=2e-3)
    found = helpers.flat_rows(state.spectrum.eigenvectors)
    np.testing.assert_allclose(np.abs(np.sum(found * eigenvectors.T[::-1][:3], axis=1)), 1, atol=2e-3)
    raw = np.linalg.eigvalsh(_MATRIX)[::-1][:3]
    assert np.all(np.abs(np.asarray(state.spectrum.eigenvalues) / raw - 1) > 0.05)


@pytest.mark.parametrize("base", [optax.adam, optax.rmsprop])
def test_the_first_eigenvalues_of_a_stream_are_those_in_the_metric_at_its_start_and_nearly_in_that_of_today(base):
    """Of a second moment of few gradients; that of RMSprop has moved by a fifth when they are published."""
    tx = dho2.mr_dho2(base(1e-2), _loss, rank=3, probe_interval=1)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(_loss)(params, _BATCH), state, params, batch=_BATCH)
        values = jnp.where(state.spectrum.mask, state.spectrum.eigenvalues, 0)
        return (optax.apply_updates(params, updates), state), (values, state.factors, _values(state.base_state))

    start = _PARAMS, tx.init(_PARAMS)
    published, used, read = jax.jit(lambda start: jax.lax.scan(step, start, length=20)[1])(start)
    first = int(np.argmax(published[:, 0] > 0))
    used, *read = (
        helpers.flat(jax.tree.map(lambda x, at=at: x[at], tree))
        for tree, at in [(used.values, first), *((read, i) for i in range(first))]
    )
    began = np.argmin([np.abs(x - used).max() for x in read])
    assert 8 <= began < first - 3
    np.testing.assert_allclose(used, read[began], rtol=1e-6)
    then, today = (np.linalg.eigvalsh(x[:, None] * _MATRIX * x)[:-4:-1] for x in (used, read[-1]))
    found = np.asarray(published[first])
    usable = found > 0
    np.testing.assert_allclose(found[usable], then[usable], rtol=0.05)
    assert np.all(found < 2 * today)


@pytest.mark.parametrize("base", [optax.adam, optax.rmsprop])
def test_a_group_waits_for_the_metric_and_its_first_eigenvalues_are_nearly_those_in_that_of_today(base):
    tx = dho2.dho2(base(1e-2), rank=3, refresh_interval=None)
    params, state = _PARAMS, tx.init(_PARAMS)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(_loss)(params, _BATCH), state, params)
        return optax.apply_updates(params, updates), state

    options = {"rank": 3, "interval": 10, "deterministic": True}
    with dho2.CurvatureGroup(_loss, devices=jax.devices()[-1:], **options) as group:
        for i in range(1, 21):
            params, state = step(params, state)
            state = group.advance(state, params, _BATCH)
            assert (group.metrics()["launches"] > 0) == (i >= 10)
    half = helpers.flat(_values(state.base_state))
    today = np.linalg.eigvalsh(half[:, None] * _MATRIX * half)[:-4:-1]
    assert np.all(state.spectrum.mask)
    assert np.all(state.spectrum.eigenvalues < 2 * today)
    assert np.all(state.spectrum.eigenvalues > today / 2)


def test_one_update_is_the_dense_rule():
    """u = sigma d - P^{1/2} V'(sigma e + alpha q / lambda), all of it in float64 with dense matrices."""
    alpha, rate = 0.7, 0.01
    tx = dho2.dho2(
        optax.adam(rate),
        _loss,
        rank=3,
        eigensolver=dho2.Eigensolver(order=_SIZE, tolerance=0.0),
        refresh_interval=4,
        alpha=alpha,
        newton=dho2.Newton(subspace=optax.identity(), floor=0.0),
        metric="base",
    )
    state = tx.init(_PARAMS)
    params = _PARAMS
    update = jax.jit(tx.update)
    for _ in range(5):  # a refresh before the fourth; the factors are one update old in the fifth
        before, grads = state, jax.grad(_loss)(params, _BATCH)
        updates, state = update(grads, state, params, batch=_BATCH)
        params = optax.apply_updates(params, updates)
    half = helpers.flat(state.factors.values)
    rows = helpers.flat_rows(state.spectrum.eigenvectors)
    g = helpers.flat(grads)
    c = rows @ (half * g)
    complement = helpers.unflatten(jnp.asarray(g - rows.T @ c / half, jnp.float32), _PARAMS)
    base_update, _ = optax.adam(rate).update(complement, before.base_state, params)
    d = helpers.flat(base_update)
    e = rows @ (d / half)
    sigma = float(state.sigma)
    expected = sigma * d - half * (rows.T @ (sigma * e + alpha * c / np.asarray(state.spectrum.eigenvalues)))
    np.testing.assert_allclose(helpers.flat(updates), expected, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(state.share, c @ c / np.sum((half * g) ** 2), rtol=1e-4)
    assert int(dho2.metrics(state)["age"]) == 2


@pytest.mark.parametrize("scales", [None, np.linspace(0.5, 2, _SIZE, dtype=np.float32)], ids=["none", "fixed"])
def test_a_full_newton_step_solves_the_problem_in_the_subspace_whatever_the_metric(scales):
    """With every direction in the subspace and alpha 1 one update finds the minimum, if the base would go as far."""
    roots = None if scales is None else helpers.unflatten(jnp.sqrt(scales), _PARAMS)
    metric = None if scales is None else dho2.Metric(
        lambda state, like, axis_name: roots,
        lambda factors, x: jax.tree.map(jnp.multiply, x, factors),
        lambda factors, x: jax.tree.map(jnp.divide, x, factors),
    )  # fmt: skip
    tx = dho2.dho2(
        optax.sgd(lambda count: jnp.where(count < 4, 1e-3, 100.0)),
        _loss,
        rank=_SIZE,
        eigensolver=dho2.Eigensolver(order=_SIZE, tolerance=0.0, max_residual=1.0),
        refresh_interval=5,
        alpha=1.0,
        newton=dho2.Newton(subspace=optax.identity(), floor=0.0),
        metric=metric,
    )
    before, state = _train(tx, 4)
    # With the learning rate so far all pairs were the base's; with the one from now on none is.
    state = state._replace(bounds=state.bounds._replace(least=jnp.zeros_like(state.bounds.least)))
    updates, _ = jax.jit(tx.update)(jax.grad(_loss)(before, _BATCH), state, before, batch=_BATCH)
    params = optax.apply_updates(before, updates)
    assert float(_loss(params, _BATCH)) < 1e-3 * float(_loss(before, _BATCH))


def test_a_metric_that_is_the_identity_changes_nothing():
    identity = dho2.Metric(lambda state, like, axis_name: {}, lambda factors, x: x, lambda factors, x: x)
    plain, _ = _train(_FACTORIES["dho2"](optax.adam(0.01), rank=3, metric=None))
    given, _ = _train(_FACTORIES["dho2"](optax.adam(0.01), rank=3, metric=identity))
    np.testing.assert_allclose(helpers.flat(given), helpers.flat(plain), rtol=1e-6)
    by_base, _ = _train(_FACTORIES["dho2"](optax.adam(0.01), rank=3, metric="base"))
    assert np.max(np.abs(helpers.flat(by_base) - helpers.flat(plain))) > 1e-3


@pytest.mark.parametrize("name", _FACTORIES)
def test_by_default_the_metric_is_that_of_a_base_which_has_one(name):
    default, of_base = (
        _FACTORIES[name](optax.adam(0.01), **options).init(_PARAMS) for options in ({}, {"metric": "base"})
    )
    assert jax.tree.structure(default) == jax.tree.structure(of_base)
    without = _FACTORIES[name](optax.sgd(0.01)).init(_PARAMS)
    assert without.factors is None
    assert _FACTORIES[name](optax.adam(0.01), metric=None).init(_PARAMS).factors is None
    assert _FACTORIES[name](optax.contrib.muon(0.01)).init(_PARAMS).factors is None
    for costly in (dho2.soap(0.01), optax.chain(dho2.shampoo(0.01))):
        assert _FACTORIES[name](costly).init(_PARAMS).factors is None
        assert _FACTORIES[name](costly, metric="base").init(_PARAMS).factors is not None


@pytest.mark.parametrize("base", [dho2.soap, dho2.shampoo], ids=["soap", "shampoo"])
def test_eigenpairs_in_the_metric_of_a_kronecker_base(base):
    tx = dho2.dho2(
        base(1e-4),
        _loss,
        rank=3,
        eigensolver=dho2.Eigensolver(order=16, tolerance=0.0),
        refresh_interval=5,
        metric="base",
    )
    _, state = _train(tx, 10)
    metric = metric_lib.KRONECKER
    half = np.stack(
        [
            helpers.flat(metric.half(state.factors.values, helpers.unflatten(row, _PARAMS)))
            for row in jnp.eye(_SIZE, dtype=jnp.float32)
        ]
    )
    values = np.linalg.eigvalsh(half @ _MATRIX @ half)[::-1][:3]
    np.testing.assert_allclose(state.spectrum.eigenvalues, values, rtol=2e-3)
    assert np.abs(half - np.diag(np.diag(half))).max() > 1e-2 * np.abs(half).max()


def _whole_leaf_adam():
    """Adam's metric, told to need whole leaves."""
    return metric_lib.DIAGONAL._replace(elementwise=False)


def _own_adam():
    """Adam's metric as a user would write it."""
    return metric_lib.DIAGONAL._replace(half=lambda factors, x: jax.tree.map(lambda s, x: s * x, factors, x))


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("name", _FACTORIES)
@pytest.mark.parametrize("options", [{}, {"base_on_segments": False}, {"whole": True}], ids=str)
def test_segments_give_what_one_device_gives(name, num_devices, options):
    if (num_devices, name) not in ((8, "dho2"), (2, "mr_dho2")) and options:
        num_devices = 2  # the other forms once for each optimizer are enough
    whole = options.get("whole", False)
    placed = {"mesh": helpers.make_mesh(num_devices), "axis_name": AXIS, "base_on_segments": not (whole or options)}
    metric = _whole_leaf_adam() if whole else "base"
    common = {"rank": 3, "order": 8, "tolerance": 0.0}
    num_steps = {"dho2": 14, "mr_dho2": 24}[name]  # streaming begins after ten updates
    one, _ = _train(_FACTORIES[name](optax.adam(0.01), metric="base", **common), num_steps, hvp=name == "mr_dho2")
    tx = _FACTORIES[name](optax.adam(0.01), metric=metric, **placed, **common)
    many, state = _train(tx, num_steps, hvp=name == "mr_dho2", metric=metric if whole else None)
    np.testing.assert_allclose(helpers.flat(many), helpers.flat(one), rtol=1e-3, atol=1e-4)
    assert int(dho2.metrics(state)["active_pairs"]) == 3


@pytest.mark.parametrize("name", _FACTORIES)
@pytest.mark.parametrize("options", [{}, {"base_on_segments": False}, {"whole": True}], ids=str)
def test_devices_meet_in_the_same_collective(name, options):
    metric = _whole_leaf_adam() if "whole" in options else None
    placed = {"mesh": helpers.make_mesh(2), "axis_name": AXIS, "base_on_segments": not options}
    tx = _FACTORIES[name](optax.adam(0.01), metric=metric or "base", rank=3, order=8, **placed)
    probing = dho2.value_grad_and_hvp(_loss, metric=metric)

    def step(params, state):
        if name == "dho2":
            return tx.update(jax.grad(_loss)(params, _BATCH), state, params, batch=_BATCH)
        _, grads, product = probing(params, state, _BATCH)
        return tx.update(grads, state, params, hvp=product)

    program = jax.jit(step).lower(_PARAMS, tx.init(_PARAMS)).compile().as_text()
    assert helpers.count_instructions(program, "all-gather", "all-reduce") > 4
    assert helpers.collectives_beside_a_branch(program) == []


def test_a_metric_of_whole_leaves_needs_the_base_on_whole_leaves():
    tx = dho2.dho2(
        optax.adam(0.01), _loss, rank=2, metric=_whole_leaf_adam(), split=dho2.Split(AXIS, mesh=helpers.make_mesh(2))
    )
    with pytest.raises(ValueError, match="base_on_segments=False"):
        tx.init(_PARAMS)


@pytest.mark.parametrize(
    ("num_training", "metric", "base_on_segments"),
    [(1, "base", True), (2, "base", True), (2, "base", False), (2, _own_adam(), True), (2, _whole_leaf_adam(), False)],
    ids=["one device", "segments", "whole base", "own metric", "own metric of whole leaves"],
)
def test_a_curvature_group_works_in_the_metric_of_the_optimizer(num_training, metric, base_on_segments):
    devices = jax.devices("cpu")
    mesh = helpers.make_mesh(num_training)
    split = dho2.Split(AXIS, mesh=mesh, base_on_segments=base_on_segments) if num_training > 1 else None
    tx = dho2.dho2(optax.adam(1e-3), rank=3, refresh_interval=None, metric=metric, split=split)
    group = dho2.CurvatureGroup(
        _loss,
        devices=devices[-2:],
        rank=3,
        interval=4,
        deterministic=True,
        metric=None if metric == "base" else metric,
        eigensolver=dho2.Eigensolver(order=12, tolerance=0.0),
    )
    group.memory(_PARAMS, _BATCH)  # of a program without a metric, which must not be taken for that of the optimizer
    params, state = _PARAMS, tx.init(_PARAMS)
    if num_training > 1:
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.device_put(params, replicated)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(_loss)(params, _BATCH), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(18):
        params, state = step(params, state)
        state = group.advance(state, params, _BATCH)
    assert group.metrics()["installed"] >= 2
    factors = state.factors.values
    packed = isinstance(factors, tuple)  # those of a metric of whole leaves are a pytree like the parameters
    half = helpers.flat(of_buffers(factors, _PARAMS).unpack(factors) if packed else factors)
    assert np.std(half) > 0.1
    values = np.linalg.eigvalsh(half[:, None] * _MATRIX * half)[::-1][:3]
    np.testing.assert_allclose(state.spectrum.eigenvalues, values, rtol=2e-3)


@pytest.mark.parametrize("use", ["group", "product"])
def test_whoever_has_only_the_state_needs_the_users_metric(use):
    tx = _FACTORIES["mr_dho2"](optax.adam(1e-3), rank=3, metric=_own_adam())
    state = tx.init(_PARAMS)

    def go(metric):
        if use == "product":
            jax.eval_shape(dho2.value_grad_and_hvp(_loss, metric=metric), _PARAMS, state, _BATCH)
        else:
            group = dho2.CurvatureGroup(_loss, devices=jax.devices()[-1:], rank=3, metric=metric)
            group.advance(state, _PARAMS, _BATCH)

    with pytest.raises(ValueError, match=r"`metric` must be the dho2_optax\.Metric that the optimizer was made with"):
        go(None)
    state = _FACTORIES["mr_dho2"](optax.adam(1e-3), rank=3).init(_PARAMS)
    with pytest.raises(ValueError, match=r"`metric` must be None, since the optimizer reads that of its base"):
        go(_own_adam())


def test_a_second_moment_that_is_not_finite_rejects_the_refresh():
    tx = _FACTORIES["dho2"](optax.adam(0.01), rank=2, metric="base")
    state = tx.init(_PARAMS)
    spoiled = jax.tree.map(lambda x: x.at[0].set(jnp.nan), optax.tree.get(state, "nu"))
    state = optax.tree.set(state, nu=spoiled)
    for _ in range(5):
        _, state = jax.jit(tx.update)(jax.grad(_loss)(_PARAMS, _BATCH), state, _PARAMS, batch=_BATCH)
    metrics = dho2.metrics(state)
    assert (int(metrics["refreshes"]), int(metrics["rejected_refreshes"])) == (0, 1)


def test_a_state_with_a_metric_can_be_donated_scanned_and_restored(tmp_path):
    import orbax.checkpoint as ocp

    tx = _FACTORIES["mr_dho2"](optax.adam(0.01), rank=2, order=5, metric="base")
    probing = dho2.value_grad_and_hvp(_loss)

    def step(carry, _):
        params, state = carry
        _, grads, product = probing(params, state, _BATCH)
        updates, state = tx.update(grads, state, params, hvp=product)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=9)[0], donate_argnums=0)
    start = lambda: jax.tree.map(jnp.copy, (_PARAMS, tx.init(_PARAMS)))  # noqa: E731
    half_way = run(start())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", half_way)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(start))
    expected, found = run(half_way), run(restored)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
