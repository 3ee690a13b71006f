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
from tests.multidevice.situations import train
from tests.multidevice.test_equivalence import assert_same_params

_WIDTH, _HIDDEN, _BATCH, _RANK = 48, 96, 200, 3
_SPECS = {
    "fsdp": {"up": P("data", None), "down": P("data", None), "out": P("data", None), "bias": P()},
    "tensor parallel": {"up": P(None, "model"), "down": P("model", None), "out": P(), "bias": P("model")},
    "both": {"up": P("data", "model"), "down": P("model", "data"), "out": P("data", None), "bias": P("model")},
}


def _params():
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape) / np.sqrt(shape[0]))  # noqa: E731
    shapes = {"up": (_WIDTH, _HIDDEN), "down": (_HIDDEN, _WIDTH)}
    first, second = ({name: normal(*shape) for name, shape in shapes.items()} for _ in range(2))
    bias = np.zeros(_HIDDEN, np.float32)
    return {"first": {**first, "bias": bias}, "second": {**second, "bias": bias}, "out": normal(_WIDTH, 10)}


def _batch():
    rng = np.random.default_rng(1)
    return np.float32(rng.normal(size=(_BATCH, _WIDTH))), np.float32(rng.normal(size=(_BATCH, 10)))


def _loss_fn(params, batch):
    x, y = batch
    for block in (params["first"], params["second"]):
        x = x + jnp.tanh(x @ block["up"] + block["bias"]) @ block["down"]
    return jnp.mean((x @ params["out"] - y) ** 2)


def _gathering_loss_fn(params, batch):
    """Under Explicit axes the model says where it gathers its weights."""
    return _loss_fn(jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params), batch)


def _shardings(mesh, kind):
    specs, shared = _SPECS[kind], {"first", "second"}
    block = {name: NamedSharding(mesh, specs[name]) for name in ("up", "bias", "down")}
    return {**dict.fromkeys(shared, block), "out": NamedSharding(mesh, specs["out"])}


def _mesh(explicit):
    if explicit:
        return jax.make_mesh((4, 2), ("data", "model"))
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def _optimizer(name, loss_fn):
    base = optax.sgd(0.02, momentum=0.9)
    if name == "base":
        return optax.with_extra_args_support(base)
    solver = dho2.Eigensolver(order=6)
    if name == "dho2":
        return dho2.dho2(base, loss_fn, rank=_RANK, refresh_interval=4, eigensolver=solver, batch_size=None)
    return dho2.mr_dho2(base, rank=_RANK, probe_interval=1, eigensolver=solver)


def _step(name, tx, loss_fn):
    @jax.jit
    def step(params, state, batch):
        extra = {}
        if name == "mr_dho2":
            _, grads, extra["hvp"] = dho2.value_grad_and_hvp(loss_fn, batch_size=None)(params, state, batch)
        else:
            grads, extra["batch"] = jax.grad(loss_fn)(params, batch), batch
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def _one_device(name, num_steps):
    tx = _optimizer(name, _loss_fn)
    params = jax.tree.map(jnp.asarray, _params())
    return train(_step(name, tx, _loss_fn), params, tx.init(params), _batch(), num_steps)


def _weights_gathered(compiled, where):
    """How often arrays of which shape are gathered, activations and small ones left out."""
    return Counter(
        tuple(sorted(array.shape))
        for found in programs.collectives(compiled)
        for array in found.arrays
        if found.op == "all-gather"
        and where(found)
        and np.prod(array.shape) >= _WIDTH * _HIDDEN // 4  # beyond what shares a flat buffer
        # Of the batch, or of a device's share of it.
        if not {_BATCH, _BATCH // 4, _BATCH // 2, _BATCH // 8} & set(array.shape)
    )


def _matching(rows, spec):
    """Whether a stack, or a stack of stacks of equal leaves, has the sharding of its leaves."""
    names = (None,) * (rows.ndim - len(spec)) + tuple(spec)
    return rows.sharding.is_equivalent_to(NamedSharding(rows.sharding.mesh, P(*names)), rows.ndim)


def _check_placed(stacks, kind):
    """The kernels of both blocks lie in one stack each, as the kernels do themselves."""
    for rows in stacks:
        for name, shape in (("up", (_WIDTH, _HIDDEN)), ("down", (_HIDDEN, _WIDTH))):
            if rows.shape[-2:] == shape:
                assert _matching(rows, _SPECS[kind][name]), (name, rows.sharding)
    assert sum(rows.shape[-2:] in ((_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH)) for rows in stacks) == 2


@pytest.fixture(autouse=True)
def _kernels_are_large(monkeypatch):
    monkeypatch.setattr(packing, "_SMALL", 512)


@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("kind", _SPECS)
@pytest.mark.parametrize("name", ["dho2", "mr_dho2"])
@pytest.mark.slow
def test_vectors_follow_the_parameters_and_nothing_else_is_gathered(name, kind, explicit):
    mesh = _mesh(explicit)
    loss_fn = _gathering_loss_fn if explicit else _loss_fn
    params = jax.device_put(_params(), _shardings(mesh, kind))
    batch = jax.device_put(_batch(), NamedSharding(mesh, P("data")))
    num_steps = 12
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        tx, base = _optimizer(name, loss_fn), _optimizer("base", loss_fn)
        state = tx.init(params)
        step = _step(name, tx, loss_fn)
        compiled = step.lower(params, state, batch).compile()
        alone = _step("base", base, loss_fn).lower(params, base.init(params), batch).compile()
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
    state = factory(optax.sgd(0.1), rank=_RANK).init(jax.device_put(dict.fromkeys(specs, square), shardings))
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
