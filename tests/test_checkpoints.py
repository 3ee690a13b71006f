"""`relayout`: states of another rank or order, compositions, and states that do not fit."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dho2_optax as dho2
from dho2_optax.packing import Layout
from dho2_optax.state import find_state, replace_state
from tests.helpers import AXIS, make_mesh, python_blocks

_PARAMS = {"w": jnp.linspace(0.1, 0.9, 300).reshape(100, 3), "b": jnp.linspace(-0.5, 0.5, 4)}
_CURVATURES = {"w": jnp.linspace(-3.0, 1.0, 300).reshape(100, 3), "b": jnp.asarray([9.0, -8.0, 7.0, -6.0])}
_INTERVAL = 50


def _loss(params, batch):
    squares = jax.tree.map(lambda c, x: jnp.sum(c * x**2 / 2), _CURVATURES, params)
    return jnp.mean(batch) * sum(jax.tree.leaves(squares))


_BATCH = jnp.ones(12)


def _synchronous(rank=3, base=None, **options):
    base = optax.sgd(1e-3, momentum=0.9) if base is None else base
    options = {"eigensolver": dho2.Eigensolver(order=24, tolerance=1e-5), **options}
    return dho2.dho2(base, _loss, rank=rank, refresh_interval=_INTERVAL, warmup_steps=1, metric=None, **options)


def _streaming(rank=2, order=6, base=None, **options):
    base = optax.adam(1e-3) if base is None else base
    solver = dho2.Eigensolver(order=order, max_residual=1.0)
    return dho2.mr_dho2(base, _loss, rank=rank, probe_interval=1, eigensolver=solver, **options)


def _split(num_devices):
    return dho2.Split(AXIS, mesh=make_mesh(num_devices))


def _train(tx, state, num_steps, params=_PARAMS):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(_loss)(params, _BATCH), state, params, batch=_BATCH)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


@functools.cache
def _trained(kind="synchronous", num_steps=20):
    tx = {"synchronous": _synchronous, "streaming": _streaming}[kind]()
    return _train(tx, tx.init(_PARAMS), num_steps)


def _assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        is_key = jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key)
        np.testing.assert_array_equal(*(map(jax.random.key_data, (a, b)) if is_key else (a, b)))


# Another rank.


@pytest.mark.parametrize("num_devices", [None, 3])
def test_pairs_that_are_added_change_no_update_until_they_are_found(num_devices):
    params, state = _trained()
    split = {} if num_devices is None else {"split": _split(num_devices)}
    tx = _synchronous(rank=5, **split)
    grown = dho2.relayout(state, tx.init(_PARAMS), _PARAMS)
    np.testing.assert_array_equal(grown.spectrum.mask, [True] * 3 + [False] * 2)
    np.testing.assert_array_equal(grown.subspace_state.ema[:3], state.subspace_state.ema)
    before, _ = _train(_synchronous(), state, 20, params)
    after, grown = _train(tx, grown, 20, params)
    for got, want in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    _, grown = _train(tx, grown, _INTERVAL - 39, params)  # up to the next refresh
    assert grown.refreshes == state.refreshes + 1
    assert grown.spectrum.mask.all()


def test_of_fewer_pairs_the_leading_ones_are_kept():
    _, state = _trained()
    np.testing.assert_allclose(state.spectrum.eigenvalues, [9, -8, 7], rtol=1e-3)
    tx = _synchronous(rank=2)
    shrunk = dho2.relayout(state, tx.init(_PARAMS), _PARAMS)
    _assert_equal(shrunk.spectrum, jax.tree.map(lambda x: x[:2], state.spectrum))
    np.testing.assert_array_equal(shrunk.subspace_state.ema, state.subspace_state.ema[:2])
    _, shrunk = _train(tx, shrunk, _INTERVAL)
    assert shrunk.refreshes == 2
    assert shrunk.spectrum.mask.all()


def test_the_leading_pairs_of_an_algebraic_selection_keep_their_order():
    solver = dho2.Eigensolver(select="algebraic", num_smallest=2, order=24, tolerance=1e-5)
    tx = _synchronous(rank=2, eigensolver=solver)
    _, state = _train(tx, tx.init(_PARAMS), 1)
    np.testing.assert_allclose(state.spectrum.eigenvalues, [-8, -6, 7, 9], rtol=1e-3)
    solver = dho2.Eigensolver(select="algebraic", num_smallest=1, order=24, tolerance=1e-5)
    fewer = _synchronous(rank=2, eigensolver=solver)
    shrunk = dho2.relayout(state, fewer.init(_PARAMS), _PARAMS)
    _assert_equal(shrunk.spectrum, jax.tree.map(lambda x: x[np.array([0, 2, 3])], state.spectrum))


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 1}, {"order": 9}, {"rank": 3, "order": 4}], ids=str)
def test_with_another_rank_or_order_streaming_begins_a_new_cycle(options):
    params, state = _trained("streaming", 21)
    assert state.refreshes >= 1
    assert 0 < state.probing.process.count < 6
    tx = _streaming(**options, split=_split(3))
    moved = dho2.relayout(state, tx.init(_PARAMS), _PARAMS)
    rank = options.get("rank", 2)
    num_kept = min(2, rank)
    pairs = jax.tree.map(lambda x: x[:num_kept], dho2.spectrum(moved, _PARAMS))
    _assert_equal(pairs, jax.tree.map(lambda x: np.asarray(x[:num_kept]), dho2.spectrum(state, _PARAMS)))
    assert (moved.probing.complete, moved.probing.pending, moved.probing.process.count) == (True, False, 0)
    _, begun = _train(tx, moved, 1, params)
    assert (begun.probing.complete, begun.matvecs) == (False, state.matvecs)
    _, after = _train(tx, moved, 2 + options.get("order", 6), params)
    assert after.refreshes > state.refreshes
    assert after.matvecs == state.matvecs + options.get("order", 6)
    assert after.rejected == after.probing.skipped == 0


# What else holds a state, and where arrays are.


def test_the_state_inside_a_composition_and_all_that_is_beside_it():
    def make(learning_rate, split):
        return _streaming(base=optax.adam(learning_rate), split=split)

    def composed(num_devices):
        inner = optax.inject_hyperparams(make, static_args=("split",))(learning_rate=0.01, split=_split(num_devices))
        labels = {"w": "hybrid", "b": "plain"}
        parted = optax.partition({"hybrid": inner, "plain": optax.adam(0.01)}, labels)
        return optax.chain(optax.clip(1.0), parted, optax.add_noise(0.1, 0.1, jax.random.key(1)))

    hidden = {"w": _PARAMS["w"], "b": optax.MaskedNode()}
    rng = np.random.default_rng(0)

    def filled(x):
        return jnp.asarray(rng.normal(size=x.shape), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    full = {"state": composed(4).init(_PARAMS), "key": jax.random.key(3), "step": 7}
    ours = find_state(full)
    basis = (filled(ours.probing.process.basis[0]).at[:, 150:].set(0),)  # of 300 numbers, in two columns
    process = ours.probing.process._replace(basis=basis)
    full = replace_state(full, ours._replace(probing=ours.probing._replace(process=process, wait=jnp.int32(5))))
    fresh = {"state": composed(3).init(_PARAMS), "key": jax.random.key(0), "step": 0}
    moved = dho2.relayout(full, fresh, hidden)
    assert jax.tree.structure(moved) == jax.tree.structure(fresh)
    assert (moved["step"], type(moved["step"])) == (7, int)
    assert moved["key"] == jax.random.key(3)
    assert find_state(moved).probing.wait == 5
    _assert_equal(dho2.relayout(moved, full, hidden), full)
    layout = Layout({"w": _PARAMS["w"]}, None, num_rows=768)
    rows = jax.vmap(layout.unpack)(find_state(moved).probing.process.basis)["w"]
    before = Layout({"w": _PARAMS["w"]}, None, num_rows=256)
    np.testing.assert_array_equal(rows, jax.vmap(before.unpack)(basis)["w"])


def test_a_state_without_curvature_is_taken_as_it_is():
    state = optax.adam(0.1).init(_PARAMS)
    _assert_equal(dho2.relayout(jax.tree.map(lambda x: x + 1, state), state, _PARAMS)[0].mu["w"], jnp.ones((100, 3)))
    with pytest.raises(ValueError, match=r"does not fit `like`: at `0.mu.w` it has float32\[100, 3\]"):
        dho2.relayout(state, optax.adam(0.1).init({"w": jnp.ones((3, 100)), "b": jnp.ones(4)}), _PARAMS)


def test_arrays_are_placed_as_those_of_a_fresh_start_and_may_be_donated():
    _, state = _trained()
    saved = jax.device_get(state)
    mesh = make_mesh(3)
    params = jax.device_put(_PARAMS, NamedSharding(mesh, PartitionSpec()))
    tx = _synchronous(split=_split(3))
    fresh = tx.init(params)
    moved = dho2.relayout(saved, fresh, params)
    for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(fresh), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1 if x.dtype != bool else x, s), donate_argnums=0)
    step(moved)
    assert jax.tree.leaves(moved)[0].is_deleted()
    _assert_equal(jax.device_get(state), saved)
    shapes = jax.eval_shape(tx.init, params)
    on_host = dho2.relayout(saved, shapes, jax.eval_shape(lambda: _PARAMS))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(on_host))
    _assert_equal(on_host, jax.device_get(dho2.relayout(saved, fresh, params)))


# What does not fit.


def _without(state, field):
    inside = state._asdict()
    del inside[field]
    return inside


def _pmapped(state):
    return jax.tree.map(lambda x: np.stack([x, x]), jax.device_get(state))


_FEWER = {"w": jnp.ones((100, 2)), "b": jnp.ones(4)}
_WRONG: dict[str, tuple[Any, str]] = {
    "another model": (
        lambda: _synchronous().init(_FEWER),
        r"`state` must be the state of an optimizer of `params`, but .* shapes \[\(204,\)\], .* \[\(304,\)\]",
    ),
    "another model of as many numbers": (
        lambda: _synchronous().init({"w": jnp.ones((3, 100)), "b": jnp.ones(4)}),
        r"at `base_state.0.trace.w` it has float32\[3, 100\], where float32\[100, 3\] is wanted. .* another `base`",
    ),
    "another base": (
        lambda: _synchronous(base=optax.adam(0.1)).init(_PARAMS),
        r"lacks `base_state.0.trace.b` and 1 more, and it has `base_state.0.count` and 4 more. It is of another `base`",
    ),
    "another subspace": (
        lambda: _synchronous(newton=dho2.Newton(subspace=optax.adam(0.1))).init(_PARAMS),
        "lacks `subspace_state.count` .* It is of another `subspace`",
    ),
    "a metric": (
        lambda: dho2.dho2(optax.adam(0.1), rank=3).init(_PARAMS),
        "lacks",
    ),
    "another kind": (
        lambda: _streaming(rank=3, base=optax.sgd(0.1, momentum=0.9), metric=None).init(_PARAMS),
        r"has `probing.\w+.* It is of another kind \(dho2, mr_dho2\) or `order`",
    ),
    "another dtype": (
        lambda: _synchronous(eigensolver=dho2.Eigensolver(basis_dtype=jnp.bfloat16)).init(_PARAMS),
        r"it has `spectrum.orthonormalizer`.* another `rank`, `num_smallest`, `basis_dtype` or parameters",
    ),
    "not complete": (
        lambda: _without(_trained()[1], "bounds"),
        "lacks `bounds.usual` and 4 more. It is of another model or optimizer, or not complete",
    ),
    "without eigenvectors": (
        lambda: _without(_trained()[1], "spectrum"),
        r"`state` must be the state of an optimizer of `params`, but its eigenvectors are buffers of shapes \[\]",
    ),
    "a newer version": (
        lambda: {**_trained()[1]._asdict(), "trust": np.zeros(())},
        "has `trust`. It is of another version of dho2_optax",
    ),
    "a newer version of a part": (
        lambda: {**_trained()[1]._asdict(), "bounds": {**_trained()[1].bounds._asdict(), "ceiling": np.zeros(())}},
        "has `bounds.ceiling`. It is of another version of dho2_optax",
    ),
    "of pmap": (lambda: _pmapped(_trained()[1]), "Is it of another model, or of pmap"),
}


@pytest.mark.parametrize("case", _WRONG)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(case):
    make, message = _WRONG[case]
    state, like = make(), _trained()[1]
    copies = jax.device_get((state, like))
    with pytest.raises(ValueError, match=message):
        dho2.relayout(state, like, _PARAMS)
    _assert_equal(jax.device_get((state, like)), copies)


def test_a_larger_model_in_buffers_of_the_same_shape_is_refused():
    """Leaves of 300 and of 305 numbers are both padded to 512."""
    larger = {"w": jnp.ones((61, 5)), "b": jnp.ones(4)}
    state = dho2.dho2(optax.sgd(0.1), rank=1, metric=None, split=_split(1)).init(larger)
    vector = (jnp.ones((1, 256, 3)) * (jnp.arange(3) < 2) * (jnp.arange(512).reshape(256, 2) < 305).any(1)[:, None],)
    state = state._replace(spectrum=state.spectrum._replace(eigenvectors=vector))
    like = dho2.dho2(optax.sgd(0.1), rank=1, metric=None, split=_split(3)).init(_PARAMS)
    with pytest.raises(ValueError, match=r"at `spectrum.eigenvectors` of a leaf of shape .* more than"):
        dho2.relayout(state, like, _PARAMS)


# The program of docs/checkpoints.md.


@pytest.mark.slow
def test_the_program_of_the_page_goes_on_with_other_devices(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    [program] = python_blocks(page.read_text())
    (tmp_path / "train.py").write_text(program)

    def run(folder, num_steps, num_devices):
        command = [sys.executable, "train.py", str(tmp_path / folder), str(num_steps)]
        variables = {**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONPATH": str(page.parents[1])}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert run("moved", 30, 8) == ["8 devices"]
    said = run("moved", 50, 6)
    assert said[:2] == ["6 devices", "goes on after step 20"]
    # The last five digits of the loss are rounding.
    assert said[2][:-1] == run("never stopped", 50, 8)[1][:-1]


def test_parameters_of_numpy_go_to_no_device():
    params = {"w": np.ones((3, 4), np.float32), "b": np.ones(3), "c": 2.0}
    tx = dho2.dho2(optax.sgd(0.1), rank=2)
    state = tx.init(params)
    like = dho2.dho2(optax.sgd(0.1), rank=1).init(params)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        moved = dho2.relayout(jax.device_get(state), jax.device_get(like), params)
    assert [x.shape for x in moved.spectrum.eigenvectors] == [(1, 16)]
    assert dho2.spectrum(state, params).eigenvectors["w"].shape == (2, 3, 4)
