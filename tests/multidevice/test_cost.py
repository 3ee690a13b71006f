"""What a compiled step communicates and holds on each device, read off the compiler's output."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dho2_optax as dho2
from dho2_optax import packing, programs
from tests.multidevice import problems, situations

RANK = 8
SIZES = (300, 100, 10)
NUM_PARAMS = (SIZES[0] + 1) * SIZES[1] + (SIZES[1] + 1) * SIZES[2]
SMALL = 1024  # numbers; every leaf that matters is larger, every inner product smaller


def _loss_fn(params, batch):
    inputs, labels = batch
    hidden = jnp.tanh(inputs @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _donated(tx, params, state, batch):
    """The program of a step that donates parameters and state."""

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(_loss_fn)(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()


def _alone(optimizer, num_inputs=SIZES[0], **options):
    """A donated step on one device without a mesh, compiled; and its abstract state."""
    loss_fn = None if "curvature" in options else _loss_fn
    tx = optimizer(optax.adam(1e-3), loss_fn, **{"rank": RANK, **options})
    params = _params(num_inputs)
    state = jax.eval_shape(tx.init, params)
    return _donated(tx, params, state, _batch(num_inputs=num_inputs)), state


def _in_microbatches(optimizer):
    """The same, with products of 16 samples at a time."""
    return _alone(optimizer, curvature=dho2.hessian(_loss_fn, microbatch_size=16))


def _sharded_by_user(optimizer):
    """The same, with the parameters split over eight devices by the user, and no `split=`."""
    mesh, num_inputs = situations.data_mesh(8), SIZES[0] + 4  # which eight devices divide
    specs = {"w1": P("data"), "b1": P(), "w2": P(), "b2": P()}
    params = jax.device_put(_params(num_inputs), {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    batch = jax.device_put(_batch(num_inputs=num_inputs), NamedSharding(mesh, P("data")))
    tx = optimizer(optax.adam(1e-3), _loss_fn, rank=RANK)
    state = tx.init(params)
    return _donated(tx, params, state, batch), state


def _params(num_inputs=SIZES[0]):
    d, h, o = num_inputs, *SIZES[1:]
    zeros = {"w1": (d, h), "b1": (h,), "w2": (h, o), "b2": (o,)}
    return {name: jnp.zeros(shape) for name, shape in zeros.items()}


def _batch(size=64, num_inputs=SIZES[0]):
    return jnp.zeros((size, num_inputs)), jnp.zeros(size, jnp.int32)


@functools.cache
def _on_mesh(num_devices, order=16, base_on_segments=True, num_inputs=SIZES[0], rank=RANK):
    """A donated step with `mesh=`, compiled; and its abstract state."""
    mesh = situations.data_mesh(num_devices)
    tx = dho2.dho2(
        optax.adam(1e-3),
        _loss_fn,
        rank=rank,
        eigensolver=dho2.Eigensolver(order=order),
        split=dho2.Split("data", mesh=mesh, base_on_segments=base_on_segments),
    )

    def step(params, state, batch):
        grads = jax.grad(_loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(_params(num_inputs), NamedSharding(mesh, P()))
    batch = jax.device_put(_batch(num_inputs=num_inputs), NamedSharding(mesh, P("data")))
    state = tx.init(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile(), state


@functools.cache
def _in_shard_map(average_gradients):
    mesh = situations.data_mesh(8)
    tx = dho2.dho2(optax.adam(1e-3), _loss_fn, rank=RANK, split=dho2.Split("data", average_gradients=average_gradients))
    specs = dho2.state_specs(tx.init, _params(), "data")

    def local(params, state, batch):
        grads = jax.grad(_loss_fn)(params, batch)
        if not average_gradients:
            grads = jax.lax.pmean(grads, "data")
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    step = jax.shard_map(local, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs), check_vma=False)
    state = jax.eval_shape(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False), _params())
    return jax.jit(step).lower(_params(), state, _batch()).compile()


def _large(compiled):
    """Collectives on more than `SMALL` numbers, as (operation, in the refresh or not)."""
    operations = programs.collectives(compiled)
    # A refresh is a branch of the step; its matvecs are a loop in that branch.
    return sorted(
        (found.op, "matvec" if found.in_loop else "refresh" if found.in_branch else "step")
        for found in operations
        if sum(np.prod(array.shape) for array in found.arrays) > SMALL
    )


def test_a_step_reduces_and_gathers_once():
    assert _large(_in_shard_map(average_gradients=True)) == [
        ("all-gather", "matvec"),
        ("all-gather", "step"),
        ("reduce-scatter", "matvec"),
        ("reduce-scatter", "step"),
    ]


def test_averaged_gradients_are_sliced():
    """The user's own all-reduce, and nothing more than a slice of it by us."""
    expected = [
        ("all-gather", "matvec"),
        ("all-gather", "step"),
        ("all-reduce", "step"),
        ("reduce-scatter", "matvec"),
    ]
    assert _large(_in_shard_map(average_gradients=False)) == expected
    assert _large(_on_mesh(8)[0]) == expected


def test_a_whole_leaf_base_costs_one_more_all_gather():
    compiled, _ = _on_mesh(8, base_on_segments=False)
    extra = [("all-gather", "step")]
    assert _large(compiled) == sorted(_large(_on_mesh(8)[0]) + extra)


def test_inner_products_are_a_few_numbers():
    small = [
        found
        for found in programs.collectives(_in_shard_map(average_gradients=True))
        if sum(np.prod(array.shape) for array in found.arrays) <= SMALL
    ]
    assert {found.op for found in small} == {"all-reduce"}
    in_step = [found for found in small if not found.in_branch and not found.in_loop]
    # The first with the squares of the gradient, whose length tells outliers, and of the gradient in the metric, of
    # which a share is in the subspace. The second with those of the base's update
    # and momentum, which its learning rate is found from.
    assert [array.shape for found in in_step for array in found.arrays] == [(RANK + 2,), (RANK + 2,)]
    # The largest when eigenvectors change: those of an old spectrum, and a vector, times the Krylov basis of a new one.
    assert max(found.bytes for found in small) == 4 * (RANK + 1) * 16


def _shard_shape(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def test_eigenvectors_and_base_state_fall_with_the_number_of_devices():
    bytes_of = {}
    for num_devices in (1, 8):
        compiled, state = _on_mesh(num_devices)
        # The shardings are those of the compiled program's outputs.
        shapes = jax.tree.map(_shard_shape, state, compiled.output_shardings[1])
        bytes_of[num_devices] = [
            programs.tree_bytes_per_device(part) for part in (shapes.spectrum.eigenvectors, shapes.base_state)
        ]
    for one, eight in zip(bytes_of[1], bytes_of[8], strict=True):
        assert one >= 4 * NUM_PARAMS
        assert eight <= one / 7.5


def test_krylov_basis_falls_with_the_number_of_devices():
    """Temporaries of one more basis vector, from the difference of two orders.

    The model is larger here: projected matrices, of order squared numbers, are whole on every device.
    """
    rows, num_inputs = 64, 1200

    def bytes_per_row(num_devices):
        compiled = [_on_mesh(num_devices, order, num_inputs=num_inputs)[0] for order in (64, 64 + rows)]
        small, large = (programs.memory(program).temp for program in compiled)
        return (large - small) / rows

    one, eight = bytes_per_row(1), bytes_per_row(8)
    assert one >= 4 * num_inputs * SIZES[1]
    assert eight <= one / 7.5


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_donated_state_is_updated_in_place(num_devices):
    compiled, _ = _on_mesh(num_devices)
    needed = programs.memory(compiled)
    stack = 4 * RANK * NUM_PARAMS / num_devices
    assert needed.alias >= stack
    # Krylov basis of 16 rows, Ritz vectors of 8, and some vectors; a copy of the state would be 8 rows more.
    vectors_kept = 12 * 4 * NUM_PARAMS
    assert needed.temp <= (16 + RANK) * 4 * NUM_PARAMS / num_devices * 1.1 + vectors_kept


@pytest.mark.parametrize("how", ["alone", "mesh"])
def test_new_eigenvectors_are_written_over_the_old_ones(how):
    """Temporaries do not grow with the rank: there is no second copy of the eigenvectors, in a refresh either."""

    def temporaries(rank):
        num_inputs, order = 6000, 16
        if how == "mesh":
            compiled, _ = _on_mesh(1, order, num_inputs=num_inputs, rank=rank)
        else:
            compiled, _ = _alone(dho2.dho2, num_inputs, rank=rank, eigensolver=dho2.Eigensolver(order=order))
        return programs.memory(compiled).temp / (4 * num_inputs * SIZES[1])

    four, twelve = temporaries(4), temporaries(12)
    assert twelve > 16  # the Krylov basis is one of them
    assert twelve - four <= 1


_ALIAS = re.compile(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)")


@pytest.mark.parametrize(
    "program",
    {
        "dho2": lambda: _alone(dho2.dho2),
        "dho2, mesh": lambda: _on_mesh(8),
        "mr_dho2": lambda: _alone(dho2.mr_dho2),
        "mr_dho2, mesh": lambda: _streaming("mesh"),
        "dho2, microbatches": lambda: _in_microbatches(dho2.dho2),
        "mr_dho2, microbatches": lambda: _in_microbatches(dho2.mr_dho2),
        "dho2, mesh, sharded by the user": lambda: _sharded_by_user(dho2.dho2),
        "mr_dho2, mesh, sharded by the user": lambda: _sharded_by_user(dho2.mr_dho2),
    }.items(),
    ids=lambda item: item[0],
)
def test_every_leaf_of_a_donated_state_is_written_over(program, monkeypatch):
    """Each array takes the place of an argument of its own, and no eigenvectors or basis are copied on the way.

    Of single numbers an argument may be missing: one that nothing reads is none of the program's.
    """
    monkeypatch.setattr(packing, "_SMALL", SMALL)  # a matrix is a large leaf, with a stack of its own
    compiled, state = program[1]()
    text = compiled.as_text()
    aliases = [tuple(map(int, pair)) for pair in _ALIAS.findall(text[: text.index("\n")])]
    leaves = jax.tree.leaves((_params(), state))
    assert {i for i, x in enumerate(leaves) if x.size > 1} <= {output for output, _ in aliases}
    unread = 3  # the share, the brake, and the length of the last gradient: an update writes them, for those who look
    assert len({argument for _, argument in aliases}) == len(aliases) >= len(leaves) - unread
    # Stacks of the rank or of the order, as one device holds them.
    least = RANK * NUM_PARAMS // (8 if "mesh" in program[0] else 1) // 2
    copies = re.findall(r"(?:f32|bf16)\[((?:8|16),[\d,]+)\]\S* copy\(", text)
    assert [shape for shape in copies if math.prod(map(int, shape.split(","))) >= least] == []


# Streaming. In `_large` its probe is "refresh": a branch of the step.


@functools.cache
def _streaming(how, num_devices=8, order=16, by_product=True):
    """A donated step of `mr_dho2`, compiled; and its abstract state, with the shardings of the program's output."""
    optimizer = situations.Optimizer(dho2.mr_dho2, {"rank": RANK, "order": order, "axis_name": "data"}, by_product)
    problem = problems.Problem(_params(), _batch(), _loss_fn, optax.adam(1e-3))
    mesh = situations.data_mesh(num_devices)
    if how == "mesh":
        tx = optimizer.of(problem, mesh=mesh)
        step = situations.jit_step(problem, tx, optimizer)
        params = jax.device_put(_params(), NamedSharding(mesh, P()))
        batch = jax.device_put(_batch(), NamedSharding(mesh, P("data")))
        state = tx.init(params)
    else:
        averages = how == "averaged by the optimizer"
        tx = optimizer.of(problem, average_gradients=averages)
        specs = dho2.state_specs(tx.init, _params(), "data")
        shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        local = situations.local_step(problem, tx, optimizer, averages)
        step = shard_map(local, in_specs=(P(), specs, P("data")), out_specs=(P(), specs))
        params, batch = _params(), _batch()
        state = jax.eval_shape(shard_map(tx.init, in_specs=P(), out_specs=specs), params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    return compiled, jax.tree.map(_shard_shape, state, compiled.output_shardings[1])


def test_a_probe_costs_one_all_gather_and_the_averaging_of_the_product():
    assert _large(_streaming("averaged by the optimizer")[0]) == [
        ("all-gather", "refresh"),
        ("all-gather", "step"),
        ("reduce-scatter", "refresh"),
        ("reduce-scatter", "step"),
    ]


def test_an_averaged_product_is_sliced():
    """The user's own all-reduce, of gradient and product in one."""
    assert _large(_streaming("averaged by the user")[0]) == [
        ("all-gather", "refresh"),
        ("all-gather", "step"),
        ("all-reduce", "step"),
    ]


def test_a_probe_that_the_optimizer_makes_itself_costs_what_a_matvec_does():
    assert _large(_streaming("averaged by the user", by_product=False)[0]) == [
        ("all-gather", "refresh"),
        ("all-gather", "step"),
        ("all-reduce", "step"),
        ("reduce-scatter", "refresh"),
    ]


def test_on_a_mesh_only_a_probe_gathers_the_vector_and_averages_the_product():
    """The compiler averages the gradient in both branches of `value_grad_and_hvp`, with the product in one of them."""
    compiled, _ = _streaming("mesh")
    found = _large(compiled)
    assert [x for x in found if x[1] == "step"] == [("all-gather", "step")]
    assert [x for x in found if x[0] != "all-gather"] == [("all-reduce", "refresh")] * 2
    in_branches = [x for x in programs.collectives(compiled) if x.in_branch]
    gathered = sum(x.bytes for x in in_branches if x.op == "all-gather")
    reduced = sorted(x.bytes for x in in_branches if x.op == "all-reduce")[-2:]
    # The compiler gathers a leaf in two stages: among neighbours, and among groups of them.
    assert 4 * 30000 <= gathered <= 1.3 * 4 * NUM_PARAMS
    np.testing.assert_allclose(reduced, [4 * NUM_PARAMS, 8 * NUM_PARAMS], rtol=0.05)


def test_the_krylov_basis_in_the_state_falls_with_the_number_of_devices():
    one, eight = (
        programs.tree_bytes_per_device(_streaming("mesh", num_devices)[1].probing.process.basis)
        for num_devices in (1, 8)
    )
    assert one >= 16 * 4 * NUM_PARAMS
    assert eight <= one / 7.5


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_the_krylov_basis_is_extended_in_place(num_devices):
    """Temporaries do not grow with it."""
    small, large = (programs.memory(_streaming("mesh", num_devices, order)[0]) for order in (16, 80))
    row = 4 * NUM_PARAMS / num_devices
    assert large.alias - small.alias >= 64 * row
    assert large.temp - small.temp <= 2 * row
