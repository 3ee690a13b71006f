"""Counters at the end of int32: they stay there, as optax's do, and what they time goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dho2_optax as dho2
from dho2_optax import counters

_LARGEST = 2**31 - 1
_PARAMS = jnp.linspace(1.0, 2.0, 4)
_BATCH = jnp.float32([4.0, 2.0, 1.0, 0.5])


def _loss(params, batch):
    return 0.5 * jnp.sum(batch * params**2)


def _aged(state):
    """A state whose counters are two before their end."""
    names = ("count", "clock", "refreshes", "rejected", "matvecs")
    return state._replace(**{name: jnp.int32(_LARGEST - 2) for name in names})


def _run(tx, state, num_steps, batch=_BATCH):
    step = jax.jit(lambda state: tx.update(_BATCH, state, _PARAMS, batch=batch)[1])
    states = []
    for _ in range(num_steps):
        state = step(state)
        states.append(state)
    return states


@pytest.mark.parametrize(
    "make",
    [
        lambda: dho2.dho2(
            optax.sgd(0.01),
            _loss,
            rank=1,
            eigensolver=dho2.Eigensolver(order=4, tolerance=0.0),
            refresh_interval=3,
            warmup_steps=2,
        ),
        lambda: dho2.fosi(optax.sgd(0.01), _loss, rank=1, refresh_interval=3, warmup_steps=2),
    ],
    ids=["dho2", "fosi"],
)
def test_refreshes_go_on_at_their_interval(make):
    tx = make()
    state = _aged(tx.init(_PARAMS))
    states = _run(tx, state, 12)
    # In Python's integers, which have no end.
    due = [(_LARGEST - 2 + t + 1 - 2) % 3 == 0 for t in range(12)]
    assert sum(due) == 4
    assert int(states[-1].count) == int(states[-1].refreshes) == int(states[-1].matvecs) == _LARGEST
    # Each one is seen by the batch of its own update.
    step = jax.jit(lambda state, factor: tx.update(_BATCH, state, _PARAMS, batch=factor * _BATCH)[1])
    for t in range(12):
        state = step(state, jnp.float32(t + 1))
        last = max((s for s in range(t + 1) if due[s]), default=None)
        if last is not None:
            np.testing.assert_allclose(state.spectrum.eigenvalues, [4.0 * (last + 1)], rtol=1e-4)
    assert dho2.metrics(states[-1])["active_pairs"] == 1


def test_probes_go_on_at_their_interval():
    tx = dho2.mr_dho2(
        optax.sgd(0.01), _loss, rank=1, eigensolver=dho2.Eigensolver(order=3, tolerance=0.0), probe_interval=2
    )
    young, old = tx.init(_PARAMS), _aged(tx.init(_PARAMS))
    skipped = old.probing._replace(skipped=jnp.int32(_LARGEST))
    expected, states = _run(tx, young, 14), _run(tx, old._replace(probing=skipped), 14)
    for want, got in zip(expected, states, strict=True):
        assert got.probing.process.count == want.probing.process.count
        np.testing.assert_array_equal(got.spectrum.mask, want.spectrum.mask)
    assert int(states[-1].matvecs) == int(states[-1].count) == int(states[-1].refreshes) == _LARGEST
    without = jax.jit(lambda state: tx.update(_BATCH, state, _PARAMS)[1])  # a product for no probe
    state = states[-1]
    for _ in range(4):
        state = without(state)
    assert int(state.probing.skipped) == _LARGEST


def test_an_interval_that_doubles_does_not_overflow():
    tx = dho2.mr_dho2(
        optax.sgd(0.01),
        _loss,
        rank=1,
        eigensolver=dho2.Eigensolver(order=3, tolerance=0.0),
        probe_interval=(1, _LARGEST),
    )
    state = tx.init(_PARAMS)
    state = state._replace(probing=state.probing._replace(interval=jnp.int32(2**28)))
    intervals = []
    step = jax.jit(lambda state: tx.update(_BATCH, state, _PARAMS, batch=_BATCH)[1])
    for _ in range(40):
        state = step(state)
        state = state._replace(probing=state.probing._replace(wait=jnp.minimum(state.probing.wait, 1)))
        intervals.append(int(state.probing.interval))
    assert min(intervals) >= 2**27  # the first cycle, which knows of none before it, halves it
    assert intervals[-1] == _LARGEST - 1


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_bases_are_renewed_at_their_interval(interval):
    tx = dho2.soap(0.01, precondition_interval=interval)
    params = jnp.ones((2, 3))
    rng = np.random.default_rng(0)
    step = jax.jit(tx.update)
    _, state = step(jnp.float32(rng.normal(size=(2, 3))), tx.init(params))
    start = _LARGEST - 2
    inner = state[0]._replace(count=jnp.int32(start), clock=jnp.int32(start))
    state, renewed = (inner, *state[1:]), []
    for _ in range(16):
        before = state[0].bases
        _, state = step(jnp.float32(rng.normal(size=(2, 3))), state)
        renewed.append(not np.array_equal(before.left, state[0].bases.left))
    assert renewed == [(start + t - 1) % interval == 0 for t in range(16)]
    assert int(state[0].count) == _LARGEST


def test_a_clock_keeps_its_beat_when_the_interval_changes():
    clock, due = jnp.int32(_LARGEST - 5), []
    for t in range(40):
        interval = 4 if t < 20 else 6
        due.append(bool(counters.is_due(clock, 1, interval)))
        clock = counters.tick(clock, 1, interval)
    assert sum(due[:20]) == 5
    assert np.all(np.diff(np.flatnonzero(due[:20])) == 4)
    assert np.all(np.diff(np.flatnonzero(due[20:])) == 6)


@pytest.mark.parametrize(("given", "used"), [(0.5, 1), (0.0, 1), (-3.0, 1), (float("nan"), 1), (2.5, 2)])
def test_an_interval_that_is_traced_may_be_anything(given, used):
    @jax.jit
    def run(interval):
        clocks = jnp.arange(6)
        probing = dho2.mr_dho2(optax.sgd(0.1), rank=1, probe_interval=interval).init(_PARAMS).probing
        return counters.is_due(clocks, 1, interval), counters.tick(clocks, 1, interval), probing.interval

    due, ticked, interval = run(given)
    assert list(np.flatnonzero(due)) == list(range(1, 6, used))
    assert list(ticked) == list(range(1, 7))
    assert interval == used


def test_sums_stop_at_the_largest():
    cases = [(5, 3, 8), (_LARGEST - 3, 3, _LARGEST), (_LARGEST - 2, 3, _LARGEST), (_LARGEST, 0, _LARGEST)]
    for start, number, total in cases:
        assert int(counters.add(jnp.int32(start), number)) == total
    assert counters.add(jnp.int32(3), jnp.bool_(True)).dtype == jnp.int32
