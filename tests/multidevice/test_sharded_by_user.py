"""Parameters that the user shards: over the data axis (FSDP), over another (tensor parallel), or over both.

There is no split. Vectors follow the parameters, nothing is gathered that the model does not gather, and the result
is that of one device.
"""

import contextlib
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import packing, programs
from tests.multidevice import sharded
from tests.multidevice.sharded import BATCH, HIDDEN, RANK, SPECS, WIDTH
from tests.multidevice.situations import train
from tests.multidevice.test_equivalence import assert_same_params


def _mesh(explicit):
    if explicit:
        return jax.make_mesh((4, 2), ("data", "model"))
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


@functools.cache
def _one_device(name, num_steps):
    tx = sharded.make(name, sharded.mean_square)
    params = jax.tree.map(jnp.asarray, sharded.initial_params())
    step = sharded.step_of(name, tx, sharded.mean_square)
    return train(step, params, tx.init(params), sharded.whole_batch(), num_steps)


def _weights_gathered(compiled, where):
    """How often arrays of which shape are gathered, activations and small ones left out."""
    return Counter(
        tuple(sorted(array.shape))
        for found in programs.collectives(compiled)
        for array in found.arrays
        if found.op == "all-gather"
        and where(found)
        and np.prod(array.shape) >= WIDTH * HIDDEN // 4  # beyond what shares a flat buffer
        # Of the batch, or of a device's share of it.
        if not {BATCH, BATCH // 4, BATCH // 2, BATCH // 8} & set(array.shape)
    )


def _matching(rows, spec):
    """Whether a stack, or a stack of stacks of equal leaves, has the sharding of its leaves."""
    names = (None,) * (rows.ndim - len(spec)) + tuple(spec)
    return rows.sharding.is_equivalent_to(NamedSharding(rows.sharding.mesh, P(*names)), rows.ndim)


def _check_placed(stacks, kind):
    """The kernels of both blocks lie in one stack each, as the kernels do themselves."""
    for rows in stacks:
        for name, shape in (("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            if rows.shape[-2:] == shape:
                assert _matching(rows, SPECS[kind][name]), (name, rows.sharding)
    assert sum(rows.shape[-2:] in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)) for rows in stacks) == 2


@pytest.fixture(autouse=True)
def _kernels_are_large(monkeypatch):
    monkeypatch.setattr(packing, "_SMALL", 512)


@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", ["dho2", "mr_dho2"])
@pytest.mark.slow
def test_vectors_follow_the_parameters_and_nothing_else_is_gathered(name, kind, explicit):
    mesh = _mesh(explicit)
    loss_fn = sharded.gathering_mean_square if explicit else sharded.mean_square
    params = jax.device_put(sharded.initial_params(), sharded.shardings_of(mesh, kind))
    batch = jax.device_put(sharded.whole_batch(), NamedSharding(mesh, P("data")))
    num_steps = 12
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        tx, base = sharded.make(name, loss_fn), sharded.make("base", loss_fn)
        state = tx.init(params)
        step = sharded.step_of(name, tx, loss_fn)
        compiled = step.lower(params, state, batch).compile()
        alone = sharded.step_of("base", base, loss_fn).lower(params, base.init(params), batch).compile()
        product = jax.jit(lambda p, v, b: jax.jvp(lambda p: jax.grad(loss_fn)(p, b), (p,), (v,))[1])
        product = product.lower(params, params, batch).compile()
        stacks = [state.spectrum.eigenvectors]
        if name == "mr_dho2":
            stacks.append(state.probing.process.basis)
        for stack in stacks:
            _check_placed(stack, kind)
        params, state = train(step, params, state, batch, num_steps)
    _check_placed(state.spectrum.eigenvectors, kind)
    expected, expected_state = _one_device(name, num_steps)
    assert_same_params(params, expected)
    assert dho2.metrics(state)["active_pairs"] == dho2.metrics(expected_state)["active_pairs"] > 0
    # A refresh and a probe are branches.
    of_base, of_product = (_weights_gathered(x, lambda found: True) for x in (alone, product))
    in_step = _weights_gathered(compiled, lambda found: not found.in_branch)
    in_branches = _weights_gathered(compiled, lambda found: found.in_branch)
    if name == "dho2":
        assert in_step <= of_base
        assert in_branches <= of_product
    else:  # one branch has the gradient, the other the gradient in one with the product
        assert not in_step
        assert in_branches <= of_base + of_product


@pytest.mark.parametrize("factory", [dho2.dho2, dho2.mr_dho2])
def test_leaves_of_one_shape_may_be_sharded_differently(factory):
    """Without Explicit axes they share a stack, which lies as the first of them, and is whole on no device."""
    mesh, square = _mesh(explicit=False), np.ones((64, 64), np.float32)
    specs = {"query": P("data", "model"), "value": P("data", "model"), "out": P("model", "data")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    state = factory(optax.sgd(0.1), rank=RANK).init(jax.device_put(dict.fromkeys(specs, square), shardings))
    large = [x for x in jax.tree.leaves(state) if x.size >= 3 * square.size]
    assert len(large) == (2 if factory is dho2.mr_dho2 else 1)
    for x in large:
        assert np.prod(x.sharding.shard_shape(x.shape)) * 8 == x.size


def test_a_state_is_read_with_explicitly_sharded_parameters_inside_jit():
    """A small leaf that is alone in being whole has a buffer of its own."""
    mesh = _mesh(explicit=True)
    params = {"split": np.ones((8, 4), np.float32), "whole": np.ones(5, np.float32)}
    params = jax.device_put(params, {"split": NamedSharding(mesh, P("data")), "whole": NamedSharding(mesh, P())})
    state = dho2.dho2(optax.sgd(0.1), rank=2).init(params)
    found = jax.jit(dho2.spectrum)(state, params).eigenvectors
    assert {name: x.shape for name, x in found.items()} == {"split": (2, 8, 4), "whole": (2, 5)}
    assert found["split"].sharding.spec == P(None, "data", None)
