"""Parameters and states that flax's nnx keeps in variables, taken as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dho2_optax as dho2
from benchmarks.options import grouped

_INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


class _Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.second(jnp.tanh(self.first(inputs)))


def _tx(loss_fn=None, **options):
    return dho2.mr_dho2(optax.adam(0.01), loss_fn, **grouped(rank=2, order=4, probe_interval=1, **options))


def _setup():
    model = _Model(nnx.Rngs(0))
    graphdef, _ = nnx.split(model, nnx.Param)

    def loss_fn(params, batch):
        # A State of Params, as it was given.
        assert isinstance(params["first"]["kernel"], nnx.Param)
        return jnp.mean(nnx.merge(graphdef, params)(batch) ** 2)

    return model, loss_fn


def _plain_run(num_steps):
    """The same training on arrays."""
    model, _ = _setup()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss_fn(params, batch):
        first, second = params["first"], params["second"]
        hidden = jnp.tanh(batch @ first["kernel"] + first["bias"])
        return jnp.mean((hidden @ second["kernel"] + second["bias"]) ** 2)

    tx = _tx()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        _, grads, hvp = dho2.value_grad_and_hvp(loss_fn)(params, state, _INPUTS)
        updates, state = tx.update(grads, state, params, hvp=hvp)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("jit", [False, True])
def test_an_optimizer_of_nnx_trains_by_products(jit):
    model, loss_fn = _setup()
    optimizer = nnx.Optimizer(model, _tx(), wrt=nnx.Param)
    product = dho2.value_grad_and_hvp(loss_fn)

    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        loss, grads, hvp = product(params, optimizer.opt_state, _INPUTS)
        assert jax.tree.structure(grads) == jax.tree.structure(hvp) == jax.tree.structure(params)
        optimizer.update(model, grads, hvp=hvp)
        return loss

    num_steps = 22 if jit else 1  # in the metric of Adam the first cycle begins after ten
    run = nnx.jit(step) if jit else step
    for _ in range(num_steps):
        run(model, optimizer)
    expected, state = _plain_run(num_steps)
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    ours, theirs = dho2.metrics(optimizer.opt_state), dho2.metrics(state)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert isinstance(value, jax.Array)
        np.testing.assert_allclose(value, theirs[name], rtol=1e-2, atol=1e-4)
    assert ours["active_pairs"] == (2 if jit else 0)
    spectrum = dho2.spectrum(optimizer.opt_state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(spectrum, is_leaf=lambda x: hasattr(x, "get_value")))


def test_a_model_with_its_optimizer_trains_as_the_optimizer_does():
    """What `nnx.Optimizer` was before it took the model at every update; Flax keeps it for older programs."""
    loss = lambda model: jnp.mean(model(_INPUTS) ** 2)  # noqa: E731
    kept = []
    for together in (False, True):
        model, _ = _setup()
        kind = nnx.ModelAndOptimizer if together else nnx.Optimizer
        optimizer = kind(model, dho2.dho2(optax.adam(0.01), rank=2, refresh_interval=1), wrt=nnx.Param)
        graphdef, _ = nnx.split(model, nnx.Param)
        value_fn = lambda params, graphdef=graphdef: loss(nnx.merge(graphdef, params, copy=True))  # noqa: E731
        for _ in range(2):
            gradient = nnx.grad(loss)(model)
            optimizer.update(*(() if together else (model,)), gradient, value_fn=value_fn)
        assert dho2.metrics(optimizer.opt_state)["refreshes"] > 0
        kept.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, *kept)


def test_in_a_chain_and_under_a_mask():
    model, loss_fn = _setup()
    mask = lambda params: jax.tree.map(lambda x: x.ndim == 2, params)  # noqa: E731
    tx = optax.chain(optax.clip(1.0), optax.masked(_tx(metric=None), mask))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    _, grads, hvp = dho2.value_grad_and_hvp(loss_fn)(params, optimizer.opt_state, _INPUTS)
    assert float(optax.tree.norm(nnx.to_pure_dict(hvp))) > 0
    optimizer.update(model, grads, hvp=hvp)
    metrics = dho2.metrics(optimizer.opt_state)
    assert (metrics["matvecs"], metrics["skipped_probes"]) == (1, 0)


def test_variables_are_parameters_of_the_transformation_itself():
    model, loss_fn = _setup()
    params, tx = nnx.state(model, nnx.Param), _tx()
    state = tx.init(params)
    _, grads, hvp = dho2.value_grad_and_hvp(loss_fn)(params, state, _INPUTS)
    updates, state = jax.jit(tx.update)(grads, state, params, hvp=hvp)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert dho2.metrics(state)["matvecs"] + dho2.metrics(state)["skipped_probes"] <= 1
