"""One device and many, under jit, shard_map and pmap: the same parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import packing
from tests.multidevice import problems, situations

NUM_STEPS = 50
PROBLEMS = {"mlp": problems.mlp, "cnn": problems.cnn}

SITUATIONS = {
    "jit with mesh": lambda p, n, *o: situations.on_mesh(p, NUM_STEPS, situations.data_mesh(n), *o),
    "jit with Explicit mesh": lambda p, n, *o: situations.on_mesh(
        p, NUM_STEPS, situations.data_mesh(n, explicit=True), *o
    ),
    "shard_map": lambda p, n, *o: situations.in_shard_map(p, NUM_STEPS, n, *o, check_vma=True),
    "shard_map unchecked": lambda p, n, *o: situations.in_shard_map(p, NUM_STEPS, n, *o, check_vma=False),
    "pmap": lambda p, n, *o: situations.in_pmap(p, NUM_STEPS, n, *o),
}
OPTIMIZERS = {"streaming": situations.STREAMING, "streaming by itself": situations.STREAMING._replace(by_product=False)}


@functools.cache
def reference(problem: str, optimizer: str | None = None):
    return situations.one_device(PROBLEMS[problem](), NUM_STEPS, *([OPTIMIZERS[optimizer]] if optimizer else []))


def assert_same_params(params, expected, tolerance=1e-5):
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_reference_learns_and_refreshes(problem):
    params, state = reference(problem)
    start = PROBLEMS[problem]()
    assert start.loss_fn(params, start.batch) < 0.5 * start.loss_fn(start.params, start.batch)
    metrics = dho2.metrics(state)
    assert metrics["refreshes"] == 6
    assert metrics["rejected_refreshes"] == 0
    assert metrics["active_pairs"] >= 3


# Leaves of any rank are one flat vector: the convolutions need not see every number of devices.
@pytest.mark.parametrize(
    ("problem", "num_devices"), [*(("mlp", count) for count in (1, 2, 3, 4, 8)), ("cnn", 3), ("cnn", 8)]
)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.slow
def test_same_parameters_as_one_device(situation, problem, num_devices):
    params, state = SITUATIONS[situation](PROBLEMS[problem](), num_devices)
    assert_same_params(params, reference(problem)[0])
    assert np.asarray(dho2.spectrum(state).mask).any()


def test_same_parameters_on_eight_devices_of_a_mesh():
    params, _ = SITUATIONS["jit with mesh"](problems.mlp(), 8)
    assert_same_params(params, reference("mlp")[0])


@pytest.mark.parametrize("situation", ["shard_map", "pmap"])
def test_gradients_averaged_by_the_optimizer(situation):
    run = {
        "shard_map": lambda p: situations.in_shard_map(p, NUM_STEPS, 4, check_vma=True, average_gradients=True),
        "pmap": lambda p: situations.in_pmap(p, NUM_STEPS, 4, average_gradients=True),
    }[situation]
    params, _ = run(problems.mlp())
    assert_same_params(params, reference("mlp")[0])


def test_base_that_needs_whole_leaves():
    """Clipping by the norm of each leaf is not element-wise: right on whole leaves, wrong on segments."""
    whole_leaf_base = optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.5))
    problem = problems.mlp()._replace(base=whole_leaf_base)
    expected, _ = situations.one_device(problem, 20)
    run = functools.partial(situations.on_mesh, problem, 20, situations.data_mesh(4))
    params, _ = run(base_on_segments=False)
    assert_same_params(params, expected)
    wrong, _ = run(base_on_segments=True)
    largest = max(
        float(abs(a - b).max(initial=0))
        for a, b in zip(
            map(np.asarray, jax.tree.leaves(wrong)), map(np.asarray, jax.tree.leaves(expected)), strict=True
        )
    )
    assert largest > 1e-4


def test_points_of_an_equation_are_split_and_so_are_64_eigenvectors():
    """In float64, since the smallest of so many pairs are found by rounding alone otherwise."""
    rank, num_steps, num_devices = 64, 12, 8
    optimizer = situations.Optimizer(
        dho2.dho2, {"rank": rank, "order": rank + 2, "refresh_interval": 5, "batch_size": None}
    )
    with jax.enable_x64(True):
        problem = problems.burgers()
        double = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)  # noqa: E731
        problem = problem._replace(params=double(problem.params), batch=double(problem.batch))
        expected, alone = situations.one_device(problem, num_steps, optimizer)
        assert dho2.metrics(alone)["refreshes"] == 2
        assert dho2.metrics(alone)["active_pairs"] >= 16
        mesh = situations.data_mesh(num_devices)
        runs = (
            situations.on_mesh(problem, num_steps, mesh, optimizer),
            situations.in_shard_map(problem, num_steps, num_devices, optimizer, check_vma=True),
        )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(expected))
    for params, state in runs:
        assert_same_params(params, expected, tolerance=1e-8)
        (vectors,) = dho2.spectrum(state).eigenvectors
        assert vectors.shape[0] == rank
        assert vectors.dtype == jnp.float64
        held = vectors.addressable_shards[0].data.nbytes
        assert held == vectors.nbytes / num_devices
        # Leaves are padded to columns of 256 rows, of which a device holds an eighth.
        assert held <= rank * 8 * (num_params / num_devices + 32 * len(jax.tree.leaves(expected)))


@pytest.mark.parametrize("explicit", [False, True])
def test_mesh_with_a_second_axis(explicit):
    devices = jax.devices()
    mesh = (
        jax.make_mesh((4, 2), ("data", "model"))
        if explicit
        else Mesh(np.array(devices).reshape(4, 2), ("data", "model"))
    )
    params, state = situations.on_mesh(problems.mlp(), NUM_STEPS, mesh)
    assert_same_params(params, reference("mlp")[0])
    (rows,) = dho2.spectrum(state).eigenvectors
    assert rows.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data")), rows.ndim)


def test_streaming_learns_in_several_cycles():
    params, state = reference("mlp", "streaming")
    start = problems.mlp()
    assert start.loss_fn(params, start.batch) < 0.5 * start.loss_fn(start.params, start.batch)
    metrics = dho2.metrics(state)
    assert metrics["refreshes"] >= 4
    # Every update makes a probe, publishes, or starts a cycle.
    assert metrics["matvecs"] + 2 * metrics["refreshes"] >= NUM_STEPS - 1
    assert metrics["rejected_refreshes"] == metrics["skipped_probes"] == 0
    assert metrics["active_pairs"] >= 3
    itself, _ = reference("mlp", "streaming by itself")
    assert_same_params(itself, params)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.slow
def test_streaming_gives_the_same_parameters_as_on_one_device(situation, num_devices):
    params, state = SITUATIONS[situation](problems.mlp(), num_devices, situations.STREAMING)
    expected, alone = reference("mlp", "streaming")
    assert_same_params(params, expected)
    for read in (lambda s: s.refreshes, lambda s: s.matvecs, lambda s: s.spectrum.mask):
        # In `pmap` every device has its own.
        np.testing.assert_array_equal(read(state), np.broadcast_to(read(alone), np.shape(read(state))))


@pytest.mark.parametrize("situation", ["jit with mesh", "shard_map"])
@pytest.mark.slow
def test_streaming_on_four_devices_by_itself(situation):
    """The optimizer makes the products itself, from the local shard of the batch."""
    params, _ = SITUATIONS[situation](problems.mlp(), 4, OPTIMIZERS["streaming by itself"])
    assert_same_params(params, reference("mlp", "streaming")[0])


def test_streaming_on_eight_devices_of_a_mesh():
    params, _ = SITUATIONS["jit with mesh"](problems.mlp(), 8, situations.STREAMING)
    assert_same_params(params, reference("mlp", "streaming")[0])


@pytest.mark.parametrize("situation", ["shard_map", "pmap"])
@pytest.mark.slow
def test_gradients_and_products_averaged_by_the_optimizer(situation):
    run = {"shard_map": functools.partial(situations.in_shard_map, check_vma=True), "pmap": situations.in_pmap}
    params, _ = run[situation](problems.mlp(), NUM_STEPS, 4, situations.STREAMING, average_gradients=True)
    assert_same_params(params, reference("mlp", "streaming")[0])


@pytest.mark.parametrize("situation", ["shard_map", "jit with Explicit mesh"])
@pytest.mark.slow
def test_streaming_with_an_anchor(situation):
    optimizer = situations.STREAMING._replace(options={**situations.STREAMING.options, "anchored": True})
    num_steps = 30  # three cycles; products of an old anchor let rounding errors grow faster
    if situation == "shard_map":
        params, _ = situations.in_shard_map(problems.mlp(), num_steps, 4, optimizer, check_vma=True)
    else:
        params, _ = situations.on_mesh(problems.mlp(), num_steps, situations.data_mesh(4, explicit=True), optimizer)
    assert_same_params(params, situations.one_device(problems.mlp(), num_steps, optimizer)[0])


@pytest.mark.parametrize("explicit", [False, True])
def test_a_leaf_as_long_as_its_segments(explicit):
    """Its global view has the shape of the parameter itself, but is split."""
    weights = jnp.linspace(0.1, 1, 256) ** 8
    loss_fn = lambda params, batch: 0.5 * jnp.sum(weights * params**2) + 0 * jnp.sum(batch)  # noqa: E731
    problem = problems.Problem(jnp.ones(256), jnp.zeros(8), loss_fn, optax.sgd(0.1))
    mesh = situations.data_mesh(4, explicit=explicit)
    params, _ = situations.on_mesh(problem, 20, mesh, situations.STREAMING)
    assert_same_params(params, situations.one_device(problem, 20, situations.STREAMING)[0])


@pytest.mark.parametrize("with_mesh_option", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (situations.SYNCHRONOUS, None),
        pytest.param(situations.STREAMING, "streaming", marks=pytest.mark.slow),
    ],
    ids=["synchronous", "streaming"],
)
def test_parameters_sharded_by_the_user(optimizer, name, explicit, with_mesh_option, monkeypatch):
    """Tensor-parallel kernels: eigenvectors keep their sharding, or with `mesh=` go to segments of our axis."""
    monkeypatch.setattr(packing, "_SMALL", 0)  # kernels count as large
    mesh = (
        jax.make_mesh((4, 2), ("data", "model"))
        if explicit
        else Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    )
    plain = problems.mlp()
    shapes = {"in": {"kernel": P("model", None), "bias": P()}, "out": {"kernel": P()}, "scale": P(), "unused": P()}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), shapes)

    def loss_fn(params, batch):
        if explicit:
            params = jax.tree.map(
                lambda x: jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, P())), params
            )
        return plain.loss_fn(params, batch)

    # An Explicit batch axis would need out_sharding annotations throughout the loss.
    batch_spec = P() if explicit else P("data")
    batch = jax.device_put(plain.batch, NamedSharding(mesh, batch_spec))
    params = jax.device_put(plain.params, shardings)
    problem = plain._replace(loss_fn=loss_fn)
    extra = {"mesh": mesh, "axis_name": "data"} if with_mesh_option else {}
    tx = optimizer.of(problem, **extra)
    step = situations.jit_step(problem, tx, optimizer)
    params, state = situations.train(step, params, tx.init(params), batch, NUM_STEPS)
    assert_same_params(params, reference("mlp", name)[0])
    if with_mesh_option:
        (kernel,) = dho2.spectrum(state).eigenvectors
    else:
        kernel = dho2.spectrum(state, params).eigenvectors["in"]["kernel"]
    expected = P(None, "data") if with_mesh_option else P(None, "model")
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, expected), kernel.ndim)
