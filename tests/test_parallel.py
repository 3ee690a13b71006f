"""`mesh=` and `axis_name=`: specs of the state, global arrays under `jit`, the user's own `shard_map`, compositions."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from benchmarks.options import grouped
from dho2_optax import parallel
from tests.helpers import AXIS, SPLITTING, flat, make_mesh, on_devices, symmetric
from tests.test_transform import START, DenseOptimizer, Problem, as_vector, make_problem

_NUM_DEVICES = 4
_NUM_STEPS = 6
_N = 8
_SPECTRUM = np.array([10.0, 6.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1])
_OPTIONS = {
    "rank": 2,
    "order": _N,
    "alpha": 0.1,
    "refresh_interval": 2,
    "tolerance": 0.0,
    "growth": 100.0,
}
_DENSE = {"alpha": 0.1, "refresh_interval": 2, "warmup_steps": 2, "decay": 0.9}
_SCALE = 0.5  # of the loss; a scalar of the batch


def _loss(params: Any, batch: Any) -> jax.Array:
    """A mean over samples, of which every device sees too few to find the steep directions."""
    outputs = jnp.dot(batch["rows"], as_vector(params), precision="highest")
    return batch["scale"] * jnp.mean(outputs**2) + jnp.mean(batch["rows"], axis=0) @ as_vector(params)


def _batches() -> tuple[list[Any], Problem]:
    """Batches whose Hessians drift, and the same problem with dense matrices."""
    drift = symmetric(np.linspace(0.02, 0.3, _N), seed=1)
    matrices = np.stack([0.95**t * (symmetric(_SPECTRUM) + t * drift) for t in range(_NUM_STEPS)])
    rows = np.sqrt(_N) * np.linalg.cholesky(matrices).transpose(0, 2, 1)
    batches = [{"rows": np.float32(x), "scale": np.float32(_SCALE)} for x in rows]
    return batches, make_problem(matrices, rows.mean(axis=1), matrices)


def _on_mesh(tree: Any, spec: P) -> Any:
    return jax.device_put(tree, NamedSharding(make_mesh(_NUM_DEVICES), spec))


def _global_batch(batch: Any) -> Any:
    return {"rows": _on_mesh(batch["rows"], P(AXIS)), "scale": _on_mesh(batch["scale"], P())}


def _params() -> Any:
    return _on_mesh(jax.tree.map(jnp.array, START), P())


def _dho2(loss_fn: Any = _loss, base: Any = None, **options: Any) -> optax.GradientTransformationExtraArgs:
    base = optax.sgd(0.03, momentum=0.5) if base is None else base
    return dho2.dho2(base, loss_fn, **grouped(**{**_OPTIONS, "axis_name": AXIS, **options}))


def _assert_close(params: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(flat(params), expected, atol=1e-4 * np.abs(expected).max())


# Specs.


def _specs(tx: Any, params: Any = START) -> Any:
    return dho2.state_specs(tx.init, params, AXIS)


def test_specs_of_a_state():
    specs = _specs(_dho2())
    assert jax.tree.structure(specs) == jax.tree.structure(jax.eval_shape(_dho2().init, START))
    assert specs.spectrum.eigenvectors == (P(None, AXIS),)
    assert specs.base_state[0].trace == {"a": P(AXIS), "b": P(AXIS)}
    whole = specs._replace(spectrum=specs.spectrum._replace(eigenvectors=P()), base_state=P())
    assert set(jax.tree.leaves(whole)) == {P()}


def test_a_whole_leaf_base_has_its_state_on_every_device():
    tx = _dho2(base_on_segments=False)
    specs = _specs(tx)
    assert specs.base_state[0].trace == {"a": P(), "b": P()}
    assert specs.spectrum.eigenvectors == (P(None, AXIS),)
    assert jax.eval_shape(tx.init, START).base_state[0].trace["a"].shape == (2, 3)


def test_specs_of_compositions():
    nested = dho2.MultiSteps(optax.chain(optax.clip(1.0), optax.masked(_dho2(), {"a": True, "b": False})), 2)
    specs = _specs(nested)
    assert specs.acc_grads == {"a": P(), "b": P()}
    state = specs.inner_opt_state[1].inner_state
    assert state.spectrum.eigenvectors == (P(None, AXIS),)
    assert state.base_state[0].trace["a"] == P(AXIS)


def test_specs_come_from_shapes_alone():
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), START)
    assert _specs(_dho2(), abstract) == _specs(_dho2())


def test_specs_of_batches():
    batch = {"x": np.zeros((8, 3)), "y": np.zeros(4, np.int32), "key": jax.random.key(0), "scale": 2.0}
    specs = parallel.batch_specs(batch, make_mesh(_NUM_DEVICES), AXIS)
    assert specs == {"x": P(AXIS), "y": P(AXIS), "key": P(), "scale": P()}


def test_a_batch_that_does_not_divide_is_refused():
    tx = _dho2(mesh=make_mesh(_NUM_DEVICES))
    params = _params()
    batch = {"rows": np.zeros((6, _N), np.float32), "scale": np.float32(1)}
    with pytest.raises(ValueError, match=rf"`batch` must be divisible by the 4 devices .*'{AXIS}'.* shape \(6, 8\)"):
        tx.update(params, tx.init(params), params, batch=batch)


# Global arrays under jit.


@functools.cache
def _mesh_step():
    """An optimizer with `mesh=` and its compiled step, which donates parameters and state."""
    tx = _dho2(mesh=make_mesh(_NUM_DEVICES))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(_loss)(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return tx, step


def test_a_donated_state_stays_sharded_and_follows_the_dense_optimizer():
    tx, step = _mesh_step()
    batches, problem = _batches()
    expected, _ = DenseOptimizer(**_DENSE, base_momentum=0.5).run(problem)
    params = _params()
    state = tx.init(params)
    specs = _specs(_dho2())
    assert jax.tree.structure(state) == jax.tree.structure(specs)
    for t, batch in enumerate(batches):
        old = params, state
        params, state = step(params, state, _global_batch(batch))
        _assert_close(params, expected[t])
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old[0], old[1].spectrum, old[1].base_state)))
        for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
            assert leaf.sharding.is_equivalent_to(NamedSharding(make_mesh(_NUM_DEVICES), spec), leaf.ndim)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert state.refreshes == 3
    (rows,) = state.spectrum.eigenvectors
    assert [x.data.shape for x in rows.addressable_shards] == [(2, 256 // _NUM_DEVICES, 2)] * _NUM_DEVICES


def test_on_a_mesh_the_second_call_does_not_compile(caplog):
    tx, step = _mesh_step()
    batch = _global_batch(_batches()[0][0])
    params = _params()
    params, state = step(params, tx.init(params), batch)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            params, state = step(params, state, batch)
        assert not [r for r in caplog.records if "compil" in r.getMessage().lower()]
        jax.jit(lambda x: x + 1)(state.count)
        assert [r for r in caplog.records if "compil" in r.getMessage().lower()]


def test_abstract_init_on_a_mesh_and_with_an_axis():
    tx, _ = _mesh_step()
    real = tx.init(_params())
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    abstract_params = jax.eval_shape(_params)
    assert describe(jax.eval_shape(tx.init, abstract_params)) == describe(real)
    # Outside of `shard_map` the state is described as a whole.
    assert describe(jax.eval_shape(_dho2().init, abstract_params)) == describe(real)
    assert real.spectrum.eigenvectors[0].shape == (2, 256, 2)


@pytest.mark.parametrize("factory", [dho2.dho2, dho2.mr_dho2])
def test_init_outside_of_shard_map_is_the_global_view_of_the_state(factory):
    tx = factory(optax.adam(0.1), rank=2, split=dho2.Split(AXIS))
    specs = dho2.state_specs(tx.init, START, AXIS)
    inside = jax.shard_map(tx.init, mesh=make_mesh(_NUM_DEVICES), in_specs=P(), out_specs=specs)(_params())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), tx.init(START), inside)


def test_map_params_on_a_mesh():
    tx, _ = _mesh_step()
    state = tx.init(_params())
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    for leaf in jax.tree.leaves((mapped.spectrum.eigenvectors, mapped.base_state)):
        np.testing.assert_array_equal(leaf, 1)
    assert mapped.count == 0


def test_other_axes_of_the_mesh_are_left_alone():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), (AXIS, "model"))
    state = _dho2(mesh=mesh).init(jax.device_put(START, NamedSharding(mesh, P())))
    (rows,) = state.spectrum.eigenvectors
    assert rows.sharding.is_equivalent_to(NamedSharding(mesh, P(None, AXIS)), 2)


# Compositions on a mesh.


def _train(step: Any, params: Any, state: Any, batches: list[Any]) -> tuple[Any, Any, list[Any]]:
    seen = []
    for batch in batches:
        params, state = step(params, state, _global_batch(batch))
        seen.append(jax.device_get(params))
    return params, state, seen


def _jitted_step(tx: Any) -> Any:
    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(_loss)(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def _halving(count):
    return 0.3 * 0.5**count


def test_multi_steps_of_a_chain():
    batches, problem = _batches()
    inner = _dho2(mesh=make_mesh(_NUM_DEVICES), base=optax.sgd(0.03), alpha=_halving, refresh_interval=1)
    tx = dho2.MultiSteps(optax.chain(optax.clip(1.0), inner), every_k_schedule=2)
    params = _params()
    _, state, seen = _train(_jitted_step(tx), params, tx.init(params), batches)
    mean = lambda x: x.reshape(-1, 2, *x.shape[1:]).mean(axis=1)  # noqa: E731
    merged = Problem(mean(problem.gradient_matrix), mean(problem.offset), problem.curvature[1::2])
    dense = DenseOptimizer(**{**_DENSE, "alpha": _halving, "refresh_interval": 1, "warmup_steps": 1})
    expected, _ = dense.run(merged, before=lambda g: np.clip(g, -1, 1))
    for got, want in zip(seen[1::2], expected, strict=True):
        _assert_close(got, want)
    assert dho2.metrics(state)["refreshes"] == 3
    assert dho2.metrics(state)["matvecs"] == 3 * _N
    (rows,) = dho2.spectrum(state).eigenvectors
    assert rows.sharding.is_equivalent_to(NamedSharding(make_mesh(_NUM_DEVICES), P(None, AXIS)), rows.ndim)


def _injected(alpha: Any = 0.1) -> optax.GradientTransformationExtraArgs:
    def make(alpha: Any, refresh_interval: Any) -> optax.GradientTransformationExtraArgs:
        numbers = {"alpha": alpha, "refresh_interval": refresh_interval}
        return _dho2(base=optax.sgd(0.03), mesh=make_mesh(_NUM_DEVICES), **numbers)

    return optax.inject_hyperparams(make)(alpha, refresh_interval=2)


def test_injected_hyperparameters():
    batches, problem = _batches()
    tx = _injected(alpha=_halving)
    params = _params()
    _, state, seen = _train(_jitted_step(tx), params, tx.init(params), batches)
    expected, _ = DenseOptimizer(**{**_DENSE, "alpha": _halving}).run(problem)
    for got, want in zip(seen, expected, strict=True):
        _assert_close(got, want)
    np.testing.assert_allclose(state.hyperparams["alpha"], _halving(_NUM_STEPS - 1), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [False, True])
def test_injected_hyperparameters_that_lie_on_the_mesh(accumulate):
    """There `MultiSteps` puts them, as arrays with a dtype of their own, and so may a user who changes one."""
    tx = dho2.MultiSteps(_injected(), every_k_schedule=2) if accumulate else _injected()
    params = _params()
    state = tx.init(params)
    injected = state.inner_opt_state if accumulate else state
    injected.hyperparams["refresh_interval"] = _on_mesh(jnp.int32(4), P())
    traced = _jitted_step(tx).trace(params, state, _global_batch(_batches()[0][0]))
    assert jax.tree.structure(traced.out_info) == jax.tree.structure((params, state))


def test_masked_leaves_and_an_objective_given_to_update():
    """`value_fn` closes over the global batch and over an integer leaf that the optimizer does not see."""
    batches, problem = _batches()
    params = {"net": _params(), "steps": _on_mesh(jnp.int32(3), P())}
    tx = optax.masked(_dho2(None, mesh=make_mesh(_NUM_DEVICES)), {"net": True, "steps": False})

    @jax.jit
    def step(params, state, batch):
        loss = lambda p: p["steps"] / 3 * _loss(p["net"], batch)  # noqa: E731
        gradient = jax.grad(lambda net: loss({**params, "net": net}))(params["net"])
        gradients = {"net": gradient, "steps": jnp.int32(0)}
        updates, state = tx.update(gradients, state, params, value_fn=loss, full_params=params)
        return optax.apply_updates(params, updates), state

    params, _, seen = _train(step, params, tx.init(params), batches)
    expected, _ = DenseOptimizer(**_DENSE, base_momentum=0.5).run(problem)
    for got, want in zip(seen, expected, strict=True):
        _assert_close(got["net"], want)
    assert params["steps"].dtype == jnp.int32
    assert params["steps"] == 3


# The user's own shard_map.


@pytest.mark.parametrize("average_gradients", [True, False])
def test_local_gradients_in_the_users_shard_map(average_gradients):
    """Averaged by the optimizer, or by the user."""
    batches, problem = _batches()
    tx = _dho2(average_gradients=average_gradients, base_on_segments=average_gradients)
    specs = _specs(tx)
    batch_spec = {"rows": P(AXIS), "scale": P()}

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=make_mesh(_NUM_DEVICES), in_specs=(P(), specs, batch_spec), out_specs=(P(), specs)
    )
    def step(params, state, batch):
        varying = jax.tree.map(lambda x: jax.lax.pcast(x, AXIS, to="varying"), params)
        gradients = jax.grad(_loss)(varying, batch)
        if not average_gradients:
            gradients = jax.lax.pmean(gradients, AXIS)
        updates, state = tx.update(gradients, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    params = _params()
    init = jax.shard_map(tx.init, mesh=make_mesh(_NUM_DEVICES), in_specs=P(), out_specs=specs)
    _, state, seen = _train(step, params, jax.jit(init)(params), batches)
    expected, _ = DenseOptimizer(**_DENSE, base_momentum=0.5).run(problem)
    for got, want in zip(seen, expected, strict=True):
        _assert_close(got, want)
    split = state.base_state[0].trace["a"].sharding.spec == P(AXIS)
    assert split == average_gradients


@pytest.mark.parametrize("how", SPLITTING)
@pytest.mark.parametrize("num_devices", [2, 3])
def test_gradients_and_products_of_which_some_leaves_are_averaged_already(num_devices, how):
    """The leaf `a` is that of every device, `b` is the same on all."""
    tx = dho2.mr_dho2(
        optax.sgd(0.1),
        rank=1,
        eigensolver=dho2.Eigensolver(order=3),
        probe_interval=1,
        split=dho2.Split(AXIS, average_gradients=True),
    )
    params = {"a": np.asarray([1.0, -2.0, 3.0], np.float32), "b": np.ones(2, np.float32)}
    curvature = np.random.default_rng(0).uniform(0.1, 1, (num_devices, 5)).astype(np.float32)
    curvature[:, 4] += 5

    def loss_fn(params, curvature):
        return 0.5 * jnp.sum(curvature * as_vector(params) ** 2)

    def program(params, curvature):
        def step(state, _):
            _, *found = dho2.value_grad_and_hvp(loss_fn, axis_name=AXIS)(params, state, curvature)
            grads, hvp = ({"a": x["a"], "b": jax.lax.pmean(x["b"], AXIS)} for x in found)
            updates, state = tx.update(grads, state, params, hvp=hvp)
            return state, updates

        state, updates = jax.lax.scan(step, tx.init(params), length=8)
        return jax.tree.map(lambda x: x[0], updates), state.spectrum.eigenvalues

    updates, eigenvalues = on_devices(program, num_devices, how)(params, curvature)
    mean = curvature.mean(axis=0, dtype=np.float64)
    for p in range(num_devices):
        _assert_close(jax.tree.map(lambda x, p=p: x[p], updates), -0.1 * mean * flat(params))
        np.testing.assert_allclose(eigenvalues[p], [mean.max()], rtol=1e-4)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": None, "mesh": True}, "`axis_name` must be the name of one mesh axis, got None"),
        ({"axis_name": "model", "mesh": True}, r"`axis_name` must be one of \('data',\) of the mesh, got 'model'"),
        ({"axis_name": ("data", "model")}, r"`axis_name` must be the name of one mesh axis, got \('data', 'model'\)"),
        ({"axis_name": 0}, "`axis_name` must be the name of one mesh axis, got 0"),
        ({"mesh": "eight devices"}, "`mesh` must be a jax.sharding.Mesh, got 'eight devices'"),
        ({"mesh": True, "average_gradients": True}, "`average_gradients` must be False with `mesh`, got True"),
        ({"average_gradients": 1}, "`average_gradients` must be True or False, got 1"),
        ({"base_on_segments": None}, "`base_on_segments` must be True or False, got None"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    mesh = options.get("mesh")
    options = {**options, "mesh": make_mesh(_NUM_DEVICES)} if mesh is True else options
    with pytest.raises(ValueError, match=message):
        _dho2(**options)


@pytest.mark.parametrize(
    ("loss_fn", "arguments", "message"),
    [
        (
            _loss,
            {"params": None, "batch": {"rows": np.zeros((4, _N)), "scale": 1.0}},
            "`update` needs `params`, got None",
        ),
        (_loss, {}, "`update` needs `batch=`"),
        (None, {}, "`update` needs `value_fn=`"),
    ],
    ids=["params", "batch", "value_fn"],
)
def test_missing_arguments_of_update_are_named(loss_fn, arguments, message):
    tx = _dho2(loss_fn, mesh=make_mesh(_NUM_DEVICES))
    params = _params()
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), **{"params": params, **arguments})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_leaves_that_are_not_real_floating_point_are_named(dtype):
    params = {"a": np.ones(3, np.float32), "odd": jnp.ones(2, dtype)}
    with pytest.raises(ValueError, match=rf"`params` .*{jnp.dtype(dtype).name} at \['odd'\]"):
        _dho2(mesh=make_mesh(_NUM_DEVICES)).init(params)
