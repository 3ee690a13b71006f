"""The state: arrays only, so that whatever carries pytrees carries it, and a print of a few lines."""

import copy
import logging
import pickle
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import dho2_optax as dho2
from dho2_optax import metric as metric_lib
from dho2_optax.state import find_state

_PARAMS = {"w": jnp.linspace(0.1, 0.9, 12).reshape(3, 4), "b": jnp.linspace(-0.5, 0.5, 4)}
_SCALES = {"w": jnp.linspace(1.0, 3.0, 12).reshape(3, 4), "b": jnp.linspace(1.0, 8.0, 4)}
_METRIC = dho2.Metric(
    factors=lambda base_state, like, axis_name: jax.tree.map(jnp.ones_like, like),
    half=lambda factors, x: jax.tree.map(jnp.multiply, factors, x),
    inverse_half=lambda factors, x: jax.tree.map(jnp.divide, x, factors),
    elementwise=True,
)
_OPTIONS: dict[str, Any] = {"rank": 2, "eigensolver": dho2.Eigensolver(order=4)}


def _loss(params, batch):
    squares = jax.tree.map(lambda scale, x: jnp.sum(scale * x**2 + 0.1 * x**4), _SCALES, params)
    return jnp.mean(batch) * sum(jax.tree.leaves(squares))


_BATCH = jnp.ones(2)
_OPTIMIZERS = {
    "adam": lambda: dho2.dho2(optax.adam(0.01), _loss, refresh_interval=2, **_OPTIONS),
    "adamw": lambda: dho2.dho2(optax.adamw(0.01), _loss, refresh_interval=2, **_OPTIONS),
    "rmsprop": lambda: dho2.dho2(optax.rmsprop(0.01), _loss, refresh_interval=2, **_OPTIONS),
    "momentum": lambda: dho2.dho2(optax.sgd(0.01, momentum=0.9), _loss, refresh_interval=2, **_OPTIONS),
    "soap": lambda: dho2.dho2(dho2.soap(0.01), _loss, refresh_interval=2, metric="base", **_OPTIONS),
    "soap without its metric": lambda: dho2.dho2(dho2.soap(0.01), _loss, refresh_interval=2, **_OPTIONS),
    "shampoo": lambda: dho2.dho2(dho2.shampoo(0.01), _loss, refresh_interval=2, metric="base", **_OPTIONS),
    "muon": lambda: dho2.dho2(optax.contrib.muon(0.01), _loss, refresh_interval=2, **_OPTIONS),
    "a metric of one's own": lambda: dho2.dho2(optax.adam(0.01), _loss, refresh_interval=2, metric=_METRIC, **_OPTIONS),
    "mr_dho2": lambda: dho2.mr_dho2(optax.adam(0.01), _loss, probe_interval=1, **_OPTIONS),
    "mr_dho2 at an anchor": lambda: dho2.mr_dho2(
        dho2.soap(0.01),
        _loss,
        rank=2,
        probe_interval=1,
        metric="base",
        eigensolver=dho2.Eigensolver(order=4, anchored=True),
    ),
    "fosi": lambda: dho2.fosi(optax.adam(0.01), _loss, refresh_interval=2, rank=2),
    "in a chain": lambda: optax.chain(
        optax.clip_by_global_norm(9.0), dho2.dho2(optax.adam(0.01), _loss, refresh_interval=2, **_OPTIONS)
    ),
}


def _through_flax_bytes(state, fresh, tmp_path):
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))


def _through_flax_dict(state, fresh, tmp_path):
    return flax.serialization.from_state_dict(fresh, flax.serialization.to_state_dict(state))


def _through_orbax(state, fresh, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: fresh))


_CARRIERS = {
    "pickle": lambda state, fresh, tmp_path: pickle.loads(pickle.dumps(state)),
    "deepcopy": lambda state, fresh, tmp_path: copy.deepcopy(state),
    "flax bytes": _through_flax_bytes,
    "flax dict": _through_flax_dict,
    "orbax": _through_orbax,
}


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_a_state_comes_back_equal_and_the_run_goes_on(name, tmp_path):
    tx = _OPTIMIZERS[name]()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(_loss)(params, _BATCH), state, params, batch=_BATCH)
        return optax.apply_updates(params, updates), state

    params, state = _PARAMS, tx.init(_PARAMS)
    for _ in range(20):
        params, state = step(params, state)
    assert dho2.metrics(state)["refreshes"] >= 1
    expected = step(params, state)
    for carrier, carry in _CARRIERS.items():
        back = carry(state, tx.init(_PARAMS), tmp_path)
        assert jax.tree.structure(back) == jax.tree.structure(state), carrier
        for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), carrier
            np.testing.assert_array_equal(got, want)
        for got, want in zip(jax.tree.leaves(step(params, back)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_all_leaves_are_arrays_and_types_tell_the_metric(name):
    state = _OPTIMIZERS[name]().init(_PARAMS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    kinds = {
        "momentum": None,
        "muon": None,
        "fosi": None,
        "soap without its metric": None,
        "soap": metric_lib.KRONECKER,
        "shampoo": metric_lib.KRONECKER,
        "mr_dho2 at an anchor": metric_lib.KRONECKER,
        "a metric of one's own": _METRIC,
    }
    factors = find_state(state).factors
    expected = kinds.get(name, metric_lib.DIAGONAL)
    assert (factors and factors.metric(_METRIC if expected is _METRIC else None)) is expected


@pytest.mark.parametrize("optimizer", ["dho2", "mr_dho2"])
def test_a_start_and_metrics_are_one_program_each_whatever_the_leaves(optimizer, caplog):
    """A user calls both outside of `jit`, where each operation on each shape would be compiled by itself."""
    tx = getattr(dho2, optimizer)(optax.adam(0.01), _loss, rank=3)
    leaves = [jnp.ones((2, size)) for size in range(41, 53)]

    def compiled(call, *arguments):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            result = call(*arguments)
        return result, sum(record.message.startswith("Compiling ") for record in caplog.records)

    optax.adam(0.01).init(leaves)
    state, count = compiled(tx.init, leaves)
    assert count == 1
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(jax.jit(tx.init)(leaves)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
        assert got.weak_type == want.weak_type
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers)  # so that the state can be donated
    assert compiled(tx.init, leaves)[1] == 0
    found, count = compiled(dho2.metrics, state)
    assert count <= 1
    names = [f"{name}_{i}" for i in range(3) for name in ("eigenvalue", "residual")]
    assert [name for name in found if name.split("_")[-1].isdigit()] == names


# A print.


def test_a_state_prints_as_a_few_lines():
    tx = _OPTIMIZERS["adam"]()
    state = tx.init(_PARAMS)
    assert repr(state) == str(state)
    before = repr(state).splitlines()
    assert before[0] == "DHO2State("
    assert len(before) == 6
    assert "0 updates, 0 refreshes (0 rejected, 0 matvecs)" in before[1]
    assert before[2].strip() == "0 of 2 pairs active"
    step = jax.jit(lambda state: tx.update(_PARAMS, state, _PARAMS, batch=_BATCH)[1])
    for _ in range(3):
        state = step(state)
    after = repr(state)
    values = sorted(float(x) for x in state.spectrum.eigenvalues)
    assert "3 updates, 1 refreshes (0 rejected, 4 matvecs), eigenpairs of update 1" in after
    assert f"2 of 2 pairs active, eigenvalues from {values[0]:.4g} to {values[1]:.4g}" in after
    assert f"base scale {float(state.sigma):.4g}" in after
    leaves = jax.tree.leaves(state)
    assert f"{sum(x.nbytes for x in leaves):,} bytes in {len(leaves)} leaves" in after


def test_a_state_without_numbers_prints_too():
    tx = _OPTIMIZERS["mr_dho2"]()
    abstract = jax.eval_shape(tx.init, _PARAMS)
    seen = [repr(abstract)]
    jax.eval_shape(lambda state: seen.append(repr(state)), abstract)
    donated = tx.init(_PARAMS)
    jax.jit(lambda state: jax.tree.map(lambda x: x, state), donate_argnums=0)(donated)
    assert donated.count.is_deleted()
    seen.append(repr(donated))
    for text in seen:
        assert "? updates" in text
        assert "? of 2 pairs active" in text
        assert "bytes in" in text
    assert "a of 2" not in repr(jax.tree.map(lambda x: "a", abstract))
    assert "? of" in repr(optax.tree.map_params(tx, lambda x: x, abstract))
    assert "DHO2State(" in repr(jax.tree.map(jnp.shape, donated)).replace("\n", " ")
