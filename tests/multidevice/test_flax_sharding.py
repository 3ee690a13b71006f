"""Models of flax whose parameters say how they are sharded: linen with boxes, nnx with variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import packing
from tests.multidevice.test_equivalence import assert_same_params

_WIDTH, _NUM_STEPS = 32, 12
_NAMES = {"first": ("data", "model"), "second": ("model", "data")}
_OPTIONS = {"rank": 2, "eigensolver": dho2.Eigensolver(order=5, max_residual=0.3)}


def _mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def _batch():
    return np.float32(np.random.default_rng(1).normal(size=(64, _WIDTH)))


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, width in (("first", 2 * _WIDTH), ("second", _WIDTH)):
            kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), _NAMES[name])
            x = jnp.tanh(nn.Dense(width, kernel_init=kernel_init, name=name)(x))
        return x


class _Nnx(nnx.Module):
    def __init__(self, rngs):
        for name, shape in (("first", (_WIDTH, 2 * _WIDTH)), ("second", (2 * _WIDTH, _WIDTH))):
            kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), _NAMES[name])
            setattr(self, name, nnx.Linear(*shape, kernel_init=kernel_init, rngs=rngs))

    def __call__(self, x):
        return jnp.tanh(self.second(jnp.tanh(self.first(x))))


@pytest.fixture(autouse=True)
def _kernels_are_large(monkeypatch):
    monkeypatch.setattr(packing, "_SMALL", 512)


def _check_placed(stacks, mesh):
    """Kernels have buffers of their own, which lie as the kernels do."""
    shapes = {(_WIDTH, 2 * _WIDTH): "first", (2 * _WIDTH, _WIDTH): "second"}
    kernels = [x for x in stacks if x.shape[1:] in shapes]
    assert len(kernels) == 2
    for x in kernels:
        expected = NamedSharding(mesh, P(None, *_NAMES[shapes[x.shape[1:]]]))
        assert x.sharding.is_equivalent_to(expected, x.ndim)


def test_parameters_of_linen_in_their_boxes():
    mesh, model = _mesh(), _Linen()
    loss_fn = lambda params, batch: jnp.mean((model.apply({"params": params}, batch) - 0.5 * batch) ** 2)  # noqa: E731
    boxed = model.init(jax.random.key(0), jnp.zeros((1, _WIDTH)))["params"]
    tx = dho2.dho2(optax.sgd(0.1, momentum=0.9), loss_fn, refresh_interval=4, **_OPTIONS)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    def train(params, batch):
        state = tx.init(params)
        for _ in range(_NUM_STEPS):
            params, state = step(params, state, batch)
        return params, state

    expected, alone = train(boxed, _batch())
    placed = jax.device_put(boxed, nn.get_sharding(boxed, mesh))
    state = tx.init(placed)
    _check_placed(state.spectrum.eigenvectors, mesh)
    # The boxes of the state do not know of eigenvectors; the state itself does, for `out_shardings`.
    lies = lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else NamedSharding(mesh, P())  # noqa: E731
    shardings = jax.tree.map(lies, state)
    _check_placed(jax.jit(tx.init, out_shardings=shardings)(placed).spectrum.eigenvectors, mesh)
    params, state = train(placed, jax.device_put(_batch(), NamedSharding(mesh, P("data"))))
    _check_placed(state.spectrum.eigenvectors, mesh)
    assert isinstance(params["first"]["kernel"], nn.Partitioned)
    assert_same_params(params, expected)
    assert dho2.metrics(state)["active_pairs"] == dho2.metrics(alone)["active_pairs"] > 0


def test_variables_of_nnx_that_are_sharded():
    mesh = _mesh()
    with jax.set_mesh(mesh):
        _train_nnx(mesh)


def _train_nnx(mesh):
    model = _Nnx(nnx.Rngs(0))  # flax places the variables, since there is a mesh
    graphdef, _ = nnx.split(model, nnx.Param)
    loss_fn = lambda params, batch: jnp.mean((nnx.merge(graphdef, params)(batch) - 0.5 * batch) ** 2)  # noqa: E731
    tx = dho2.mr_dho2(optax.sgd(0.1, momentum=0.9), probe_interval=1, **_OPTIONS)
    compute = dho2.value_grad_and_hvp(loss_fn)
    start = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer, batch):
        _, grads, hvp = compute(nnx.state(model, nnx.Param), optimizer.opt_state, batch)
        optimizer.update(model, grads, hvp=hvp)

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    _check_placed(dho2.spectrum(optimizer.opt_state).eigenvectors, mesh)
    batch = jax.device_put(_batch(), NamedSharding(mesh, P("data")))
    for _ in range(_NUM_STEPS):
        step(model, optimizer, batch)
    _check_placed(dho2.spectrum(optimizer.opt_state).eigenvectors, mesh)
    assert_same_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)), _on_one_device(tx, start))
    assert dho2.metrics(optimizer.opt_state)["active_pairs"] > 0


def _on_one_device(tx, params):
    def loss_fn(params, batch):
        hidden = jnp.tanh(batch @ params["first"]["kernel"] + params["first"]["bias"])
        outputs = jnp.tanh(hidden @ params["second"]["kernel"] + params["second"]["bias"])
        return jnp.mean((outputs - 0.5 * batch) ** 2)

    @jax.jit
    def step(params, state):
        _, grads, hvp = dho2.value_grad_and_hvp(loss_fn)(params, state, _batch())
        updates, state = tx.update(grads, state, params, hvp=hvp)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(_NUM_STEPS):
        params, state = step(params, state)
    return params
