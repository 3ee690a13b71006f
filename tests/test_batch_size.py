"""On which part of a batch curvature products are made, by every way to make them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dho2_optax as dho2
from dho2_optax.curvature import part, part_size
from tests.helpers import AXIS, flat, make_mesh

_PARAMS = jnp.ones(1)
# From samples in all to samples of a product, on one device and on each of two.
_AUTO = {1: {100: 100, 128: 128, 129: 128, 2000: 250, 8192: 1024}, 2: {100: 50, 128: 64, 130: 64, 2000: 125, 8192: 512}}
_WHOLE, _SOME = {1: {2000: 2000}, 2: {2000: 1000}}, {1: {2000: 300}, 2: {2000: 300}}


class _Loss:
    """A loss with the Hessian `mean(batch)`, that remembers how many samples it was called with."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        sampled = batch["x"] if isinstance(batch, dict) else jax.tree.leaves(batch)[0]
        self.seen.add(len(sampled))
        return jnp.mean(sampled) * jnp.sum(params**2) / 2


def _traced(update: Any, num_samples: int, num_devices: int) -> None:
    """Traces ``update(batch)`` with the batch of one device, inside the axis where there are several."""
    if num_devices == 1:
        jax.eval_shape(update, jnp.zeros(num_samples))
    else:
        jax.eval_shape(jax.vmap(update, axis_name=AXIS), jnp.zeros((num_devices, num_samples // num_devices)))


def _split(num_devices: int) -> dho2.Split | None:
    return dho2.Split(AXIS) if num_devices > 1 else None


def _by_dho2(loss: Any, num_devices: int, **options: Any) -> Any:
    tx = dho2.dho2(optax.sgd(0.1), loss, rank=1, refresh_interval=1, split=_split(num_devices), **options)
    return lambda batch: tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=batch)


def _by_mr_dho2(loss: Any, num_devices: int, **options: Any) -> Any:
    tx = dho2.mr_dho2(optax.sgd(0.1), loss, rank=1, split=_split(num_devices), **options)
    return lambda batch: tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=batch)


def _by_product(loss: Any, num_devices: int, **options: Any) -> Any:
    tx = dho2.mr_dho2(optax.sgd(0.1), rank=1, split=_split(num_devices))
    compute = dho2.value_grad_and_hvp(loss, axis_name=AXIS if num_devices > 1 else None, **options)
    return lambda batch: compute(_PARAMS, tx.init(_PARAMS), batch)


_WAYS = {"dho2": _by_dho2, "mr_dho2": _by_mr_dho2, "value_grad_and_hvp": _by_product}


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("way", _WAYS)
def test_a_product_is_made_on_an_eighth_of_the_batch_or_on_what_is_asked_for(way, num_devices):
    cases = [({}, _AUTO), ({"batch_size": "auto"}, _AUTO), ({"batch_size": None}, _WHOLE), ({"batch_size": 300}, _SOME)]
    for options, sizes in cases:
        for num_samples, expected in sizes[num_devices].items():
            loss = _Loss()
            _traced(_WAYS[way](loss, num_devices, **options), num_samples, num_devices)
            gradients = {num_samples // num_devices} if way == "value_grad_and_hvp" else set()
            assert loss.seen == {expected} | gradients, (options, num_samples)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, (250, 125)), ({"batch_size": None}, (2000, 1000)), ({"batch_size": 300}, (300, 300))]
)
def test_a_group_makes_its_products_on_a_part_of_what_each_device_has(options, expected):
    for num_devices, size in zip((1, 2), expected, strict=True):
        loss = _Loss()
        group = dho2.CurvatureGroup(loss, devices=jax.devices()[:num_devices], rank=1, **options)
        group.memory(_PARAMS, jnp.zeros(2000))
        assert loss.seen == {size}


def test_on_a_mesh_the_local_batch_is_cut():
    loss = _Loss()
    split = dho2.Split(AXIS, mesh=make_mesh(2))
    tx = dho2.dho2(optax.sgd(0.1), loss, rank=1, refresh_interval=1, split=split)
    state = jax.eval_shape(tx.init, _PARAMS)
    jax.eval_shape(lambda s, b: tx.update(_PARAMS, s, _PARAMS, batch=b), state, jnp.zeros(2000))
    assert loss.seen == {125}


def test_one_sample_is_taken_of_each_piece_of_the_batch():
    for batch_size, size in (("auto", 250), (300, 300), (1999, 1999)):
        rows = np.asarray(part(jnp.arange(2000), batch_size, None))
        edges = np.arange(size + 1) * 2000 // size
        assert len(rows) == size
        assert np.all((edges[:-1] <= rows) & (rows < edges[1:]))
    # No column of a grid is left out, and none has more than twice its share: 8 of 128 here.
    column = np.asarray(part(jnp.arange(1024) % 16, "auto", None))
    assert np.bincount(column, minlength=16).min() > 0
    assert np.bincount(column, minlength=16).max() <= 16
    batch = {"x": np.arange(2000), "scale": 2.0, "y": jnp.arange(2000)[:, None]}
    taken = part(batch, "auto", None)
    np.testing.assert_array_equal(taken["x"], taken["y"][:, 0])
    assert taken["scale"] == 2.0
    for whole in (100, 2000, None):
        np.testing.assert_array_equal(part(jnp.arange(100), whole, None), np.arange(100))


def test_samples_of_a_product_are_spread_and_those_of_an_operator_are_the_ones_it_says():
    """The Hessian of samples 0, 1, 2 ... is their mean."""
    loss, batch = _Loss(), jnp.arange(2000.0)

    def eigenvalue(of: Any = loss, **options: Any) -> float:
        tx = dho2.dho2(optax.sgd(0.1), of, rank=1, refresh_interval=1, metric=None, **options)
        _, state = jax.jit(tx.update)(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=batch)
        return float(dho2.spectrum(state).eigenvalues[0])

    assert eigenvalue() == pytest.approx(np.mean(part(np.arange(2000), "auto", None)))
    assert eigenvalue() == pytest.approx(np.mean(np.arange(2000)), rel=1e-3)
    assert eigenvalue(batch_size=300) == pytest.approx(np.mean(part(np.arange(2000), 300, None)))
    assert eigenvalue(None, curvature=dho2.hessian(loss, batch_size=300)) == pytest.approx(np.mean(np.arange(300)))
    rayleigh = dho2.hessian(loss, batch_size=100, batch_start=250)
    quotients = dho2.Eigensolver(rayleigh=rayleigh)
    assert eigenvalue(eigensolver=quotients) == pytest.approx(np.mean(np.arange(250, 350)))


def test_a_product_apart_equals_that_of_the_part_and_a_joint_one_that_of_the_batch():
    loss, batch = _Loss(), jnp.arange(2000.0)
    state = dho2.mr_dho2(optax.sgd(0.1), rank=1).init(_PARAMS)
    vector = flat(state.probing.process.vector).item()
    for options in ({}, {"batch_size": None}):
        samples = part(np.arange(2000), options.get("batch_size", "auto"), None)
        value, grads, hvp = dho2.value_grad_and_hvp(loss, **options)(_PARAMS, state, batch)
        np.testing.assert_allclose(value, np.mean(np.arange(2000)) / 2, rtol=1e-6)
        np.testing.assert_allclose(grads, [np.mean(np.arange(2000))], rtol=1e-6)
        np.testing.assert_allclose(hvp, [vector * np.mean(samples)], rtol=1e-6)


def test_scalars_are_passed_as_they_are_and_without_a_common_axis_the_batch_is_whole():
    for batch, expected in (((jnp.zeros(2000), jnp.zeros(())), 250), ((jnp.zeros(2000), jnp.zeros(3)), 2000)):
        loss = _Loss()
        jax.eval_shape(_by_dho2(loss, 1), batch)
        assert loss.seen == {expected}
    with_others = {"x": np.zeros(2000, np.float32), "scale": 2.0, "mode": "train"}
    assert part_size(with_others, "auto", None) == 250
    loss = _Loss()
    product = dho2.hessian(loss, batch_size=250)(_PARAMS, _PARAMS, with_others | {"x": np.ones(2000, np.float32)})
    np.testing.assert_allclose(product, [1.0])
    assert loss.seen == {250}
    with pytest.raises(ValueError, match="must have samples along the leading axis of every array"):
        jax.eval_shape(_by_dho2(_Loss(), 1, batch_size=300), (jnp.zeros(2000), jnp.zeros(3)))


def test_an_operator_of_the_users_and_a_value_fn_see_the_whole_batch():
    seen = []

    def operator(params: Any, vector: Any, batch: Any) -> Any:
        seen.append(len(batch))
        return vector

    for make in (dho2.dho2, dho2.mr_dho2):
        tx = make(optax.sgd(0.1), curvature=operator, rank=1)
        jax.eval_shape(lambda b, tx=tx: tx.update(_PARAMS, tx.init(_PARAMS), _PARAMS, batch=b), jnp.zeros(2000))
    assert set(seen) == {2000}

    loss, tx = _Loss(), dho2.dho2(optax.sgd(0.1), rank=1)
    value_fn = lambda params: loss(params, jnp.zeros(2000))  # noqa: E731
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value_fn=value_fn), _PARAMS)
    assert loss.seen == {2000}


def test_a_size_without_a_loss_is_refused():
    operator = dho2.hessian(_Loss())
    said = "`batch_size` is for the products of `loss_fn`, which is not given, got 64; give it to dho2_optax.hessian"
    for make in (
        lambda: dho2.dho2(optax.sgd(0.1), curvature=operator, batch_size=64),
        lambda: dho2.dho2(optax.sgd(0.1), batch_size=64),
        lambda: dho2.mr_dho2(optax.sgd(0.1), curvature=operator, batch_size=64),
        lambda: dho2.mr_dho2(optax.sgd(0.1), batch_size=64),
        lambda: dho2.CurvatureGroup(curvature=operator, devices=jax.devices()[:1], batch_size=64),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    with pytest.raises(ValueError, match="`batch_size` must be a Python int, 'auto' or None, got 'all'"):
        dho2.value_grad_and_hvp(_Loss(), batch_size="all")


def test_of_an_explicitly_sharded_batch_equal_parts_are_taken():
    """JAX refuses to cut 250 of 2000 samples out of eight shards."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Explicit,))
    batch = jax.device_put(jnp.zeros(2000), NamedSharding(mesh, PartitionSpec(AXIS)))
    assert part_size(batch, "auto", None) == 256
    assert part_size(jnp.zeros(2000), "auto", None) == 250
    of_each = [np.asarray(part(jnp.arange(250), 32, None)) + 250 * shard for shard in range(8)]
    places = jax.device_put(np.stack([np.arange(2000)] * 2, 1), NamedSharding(mesh, PartitionSpec(AXIS)))
    for batch_size in ("auto", 250):
        taken = jax.jit(lambda b, size=batch_size: part(b, size, None))(places)
        np.testing.assert_array_equal(taken, np.stack([np.concatenate(of_each)] * 2, 1))
        assert jax.typeof(taken).sharding.spec[0] == AXIS
    state = dho2.mr_dho2(optax.sgd(0.1), rank=1).init(_PARAMS)
    loss = _Loss()
    jax.eval_shape(lambda b: dho2.value_grad_and_hvp(loss)(_PARAMS, state, b), batch)
    assert loss.seen == {2000, 256}
