"""A run that goes on with other devices: the same parameters as without a stop."""

import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import packing
from tests.multidevice import problems, situations

_LEG = 17  # updates between two moves: not a multiple of any interval, so that moves fall into cycles
# Products of an old anchor let rounding errors grow faster, which depend on the number of devices.
_LEGS = {"anchored": 6}
_TOLERANCE = 1e-4

_OPTIMIZERS = {
    "synchronous": (situations.SYNCHRONOUS, problems.mlp().base),
    "streaming": (situations.STREAMING, optax.adam(3e-3)),
    "streaming by itself": (situations.STREAMING._replace(by_product=False), problems.mlp().base),
    "anchored": (
        situations.STREAMING._replace(options={**situations.STREAMING.options, "anchored": True}),
        optax.adam(3e-3),
    ),
    "whole leaves": (situations.SYNCHRONOUS, problems.mlp().base),
    "soap": (situations.SYNCHRONOUS, dho2.soap(3e-3)),
}


def _problem(name, size=48):
    """With a batch of 48 samples, which 3, 4, 6, 8 and 12 devices share, or of 420 for 5 and 7."""
    return problems.mlp()._replace(base=_OPTIMIZERS[name][1], batch=problems.images(size=size))


def _orbax(path: Path, state: Any) -> Any:
    """What Orbax restores of a state by itself, to the host, whatever the devices are."""
    state = jax.tree.map(lambda x: x if x.size else None, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        shapes = checkpointer.metadata(path).item_metadata
        return checkpointer.restore(
            path, jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
        )


def _leg(name, num_devices, params, saved, num_steps, *, size=48, **options):
    """Some updates on a number of devices, or on one without a mesh for None, from a saved state or none."""
    optimizer, _ = _OPTIMIZERS[name]
    problem = _problem(name, size)
    batch = problem.batch
    tx = _optimizer(name, num_devices, problem, **options)
    if num_devices is not None:
        mesh = situations.data_mesh(num_devices)
        params = jax.device_put(jax.device_get(params), NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    state = tx.init(params)
    if saved is not None:
        state = dho2.relayout(saved, state, params)
    return situations.train(situations.jit_step(problem, tx, optimizer), params, state, batch, num_steps)


def _optimizer(name, num_devices, problem, **options):
    if num_devices is None:
        return _OPTIMIZERS[name][0].of(problem)
    whole = {"base_on_segments": False} if name in ("whole leaves", "soap") else {}
    mesh = situations.data_mesh(num_devices)
    return _OPTIMIZERS[name][0].of(problem, mesh=mesh, axis_name="data", **whole, **options)


@functools.cache
def _never_stopped(name, num_steps, size=48):
    return _leg(name, None, _problem(name).params, None, num_steps, size=size)


def _distance(params, expected):
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (params, expected)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def _journey(name, stops, tmp_path=None):
    """A run that is saved and moved after every leg; its last parameters and state."""
    params, saved, state = _problem(name).params, None, None
    for i, num_devices in enumerate(stops):
        params, state = _leg(name, num_devices, params, saved, _LEGS.get(name, _LEG))
        saved = jax.device_get(state) if tmp_path is None else _orbax(tmp_path / str(i), state)
    return params, state


# SOAP by itself, never stopped, ends elsewhere on another number of devices: its state is compared below.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "streaming")) for name in _OPTIMIZERS if name != "soap"],
)
def test_from_eight_devices_to_six_four_three_and_back(name, tmp_path):
    stops = [8, 6, 4, 3, 8]
    params, state = _journey(name, stops, tmp_path)
    expected, alone = _never_stopped(name, _LEGS.get(name, _LEG) * len(stops))
    assert _distance(params, expected) < _TOLERANCE
    assert alone.refreshes >= 2
    for read in (lambda s: s.count, lambda s: s.refreshes, lambda s: s.matvecs, lambda s: s.spectrum.mask):
        np.testing.assert_array_equal(read(state), read(alone))
    (rows,) = dho2.spectrum(state).eigenvectors
    assert rows.sharding.is_equivalent_to(NamedSharding(situations.data_mesh(8), P(None, "data")), rows.ndim)


def test_the_moves_fall_into_cycles():
    _, state = _never_stopped("streaming", _LEG)
    assert 0 < state.probing.process.count < 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["streaming", "whole leaves"])
def test_to_one_device_without_a_mesh_and_back(name):
    stops = [6, None, 3, None]
    params, _ = _journey(name, stops)
    assert _distance(params, _never_stopped(name, _LEGS.get(name, _LEG) * len(stops))[0]) < _TOLERANCE


@pytest.mark.parametrize("stops", [(6, 3), (None, 3)])
def test_from_a_base_on_segments_to_one_on_whole_leaves_and_back(stops):
    params, state = _leg("streaming", stops[0], problems.mlp().params, None, _LEG)
    params, state = _leg("streaming", stops[1], params, state, _LEG, base_on_segments=False)
    assert state.base_state[0].mu["in"]["kernel"].shape == (36, 19)
    params, state = _leg("streaming", stops[1], params, state, _LEG)
    assert state.base_state[0].mu["in"]["kernel"].shape == (768,)
    assert _distance(params, _never_stopped("streaming", 3 * _LEG)[0]) < _TOLERANCE


def test_from_leaves_that_the_user_shards(monkeypatch):
    """There leaves of one shape are stacked, not laid side by side."""
    monkeypatch.setattr(packing, "_SMALL", 0)
    params, state = _leg("streaming", None, problems.mlp().params, None, _LEG)
    assert len(state.spectrum.eigenvectors) > 1
    params, state = _leg("streaming", 3, params, state, _LEG)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Explicit,))
    params = jax.device_get(params)
    sharded = jax.device_put(params, NamedSharding(mesh, P()))
    sharded["in"]["kernel"] = jax.device_put(params["in"]["kernel"], NamedSharding(mesh, P("model")))
    tx = situations.STREAMING.of(_problem("streaming"))
    with jax.set_mesh(mesh):
        fresh = jax.jit(tx.init)(sharded)
    moved = dho2.relayout(state, fresh, sharded)
    kernels = dho2.spectrum(moved, sharded).eigenvectors["in"]["kernel"]
    assert kernels.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), kernels.ndim)
    alone = jax.eval_shape(tx.init, params)
    before, after = (dho2.relayout(x, alone, params) for x in (state, moved))
    for got, want in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(got, want)


_ON_TWELVE = """
import jax
jax.config.update("jax_num_cpu_devices", 12)
import pickle, sys
from pathlib import Path
from tests.multidevice import test_checkpoints as t
params, saved = pickle.loads(Path(sys.argv[1]).read_bytes())
params, state = t._leg("streaming", 12, params, saved, t._LEG, size=420)
assert len(jax.tree.leaves(state.spectrum.eigenvectors)[0].sharding.device_set) == 12
Path(sys.argv[2]).write_bytes(pickle.dumps(jax.device_get((params, state))))
"""


@pytest.mark.slow
def test_from_five_devices_to_twelve_in_another_process_and_to_seven(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    params, state = _leg("streaming", 5, problems.mlp().params, None, _LEG, size=420)
    before.write_bytes(pickle.dumps(jax.device_get((params, state))))
    command = [sys.executable, "-c", _ON_TWELVE, str(before), str(after)]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[2])
    params, saved = pickle.loads(after.read_bytes())
    assert saved.spectrum.eigenvectors[0].shape[1] == 768
    params, _ = _leg("streaming", 7, params, saved, _LEG, size=420)
    assert _distance(params, _never_stopped("streaming", 3 * _LEG, size=420)[0]) < _TOLERANCE


@pytest.mark.parametrize("name", ["streaming", "soap"])
def test_between_any_numbers_of_devices_every_number_is_kept(name):
    problem = _problem(name)
    _, state = _never_stopped(name, _LEG)
    original, before = jax.device_get(state), dho2.spectrum(state, problem.params)
    for num_devices in (1, 2, 3, 5, 6, 7, 8, 3, 5, 1):
        mesh = situations.data_mesh(num_devices)
        tx = _optimizer(name, num_devices, problem)
        params = jax.device_put(problem.params, NamedSharding(mesh, P()))
        state = dho2.relayout(jax.device_get(state), tx.init(params), params)
        found = dho2.spectrum(state, params)
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(got, want)
    alone = _optimizer(name, None, problem).init(problem.params)
    back = dho2.relayout(state, alone, problem.params)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(original), strict=True):
        np.testing.assert_array_equal(got, want)
        assert jnp.asarray(got).dtype == want.dtype
