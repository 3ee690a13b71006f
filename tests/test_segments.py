from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dho2_optax import plan, segments, vectors
from tests.helpers import AXIS, SPLITTING, count_instructions, flat, make_mesh, on_devices

_SHAPES = {
    "one": (1,),
    "ten": (2, 5),
    "below the quantum": (255,),
    "the quantum": (256,),
    "above the quantum": (257,),
    "thousand": (10, 100),
    "scalar": (),
    "empty": (0,),
    "empty rows": (3, 0),
}


def _tree(seed):
    """A vector with leaves of many sizes, the odd ones in bfloat16."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(size=shape), jnp.bfloat16 if i % 2 else np.float32)
        for i, (name, shape) in enumerate(_SHAPES.items())
    }


class _Case(NamedTuple):
    num_devices: int
    whole: Any  # a vector that every device holds
    local: list[Any]  # a different one for each device
    output: dict[str, Any]  # what the devices made of them, stacked


def _program(whole, local):
    segment = segments.split(whole, AXIS)
    return {
        "segment": segment,
        "gathered": segments.gather(segment, whole, AXIS),
        "mean": segments.reduce_scatter_mean(local, AXIS),
        "positions": segments.positions(whole, AXIS),
    }


@pytest.fixture(
    scope="module",
    params=[(p, how) for p in (1, 2, 3, 4, 8) for how in SPLITTING],
    ids=lambda case: f"{case[0]} devices, {case[1]}",
)
def case(request):
    num_devices, how = request.param
    whole, local = _tree(0), [_tree(1 + p) for p in range(num_devices)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *local)
    output = on_devices(_program, num_devices, how)(whole, stacked)
    return _Case(num_devices, whole, local, jax.tree.map(np.asarray, output))


def _laid_out(name, case):
    """A leaf of the output in segment form as the devices hold it, one after the other."""
    return {key: value.reshape(-1) for key, value in case.output[name].items()}


def test_gather_undoes_split_on_every_device(case):
    for name, leaf in case.whole.items():
        gathered = case.output["gathered"][name]
        assert gathered.dtype == leaf.dtype
        for p in range(case.num_devices):
            np.testing.assert_array_equal(gathered[p], leaf)


def test_segments_are_consecutive_and_padded_with_zeros(case):
    for name, values in _laid_out("segment", case).items():
        leaf = case.whole[name].reshape(-1)
        assert values.size == segments.padded_size(leaf.size, case.num_devices)
        assert values.dtype == leaf.dtype
        np.testing.assert_array_equal(values[: leaf.size], leaf)
        assert not values[leaf.size :].any()


def test_reduce_scatter_mean_equals_a_loop_over_the_devices(case):
    for name, values in _laid_out("mean", case).items():
        leaves = [tree[name].reshape(-1).astype(np.float64) for tree in case.local]
        assert values.dtype == case.whole[name].dtype
        tolerance = 2e-2 if values.dtype == jnp.bfloat16 else 1e-6
        mean = sum(leaves) / case.num_devices
        np.testing.assert_allclose(values[: mean.size], mean, rtol=tolerance, atol=tolerance)
        assert not values[mean.size :].any()


def test_positions_count_through_a_leaf_and_pass_its_end_in_the_padding(case):
    for name, values in _laid_out("positions", case).items():
        assert values.dtype == np.uint32
        np.testing.assert_array_equal(values, np.arange(segments.padded_size(case.whole[name].size, case.num_devices)))


def test_padded_sizes_are_the_same_for_all_powers_of_two():
    for size in (1, 255, 256, 257, 1000):
        sizes = {segments.padded_size(size, p) for p in (1, 2, 4, 8, 16, 256)}
        assert sizes == {-(-size // 256) * 256}
        assert segments.padded_size(size, 3) % 768 == 0


def test_without_an_axis_nothing_is_split():
    tree = _tree(0)
    assert segments.split(tree, None) is tree
    assert segments.gather(tree, tree, None) is tree
    assert segments.reduce_scatter_mean(tree, None) is tree
    places = segments.positions({"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}, None)
    np.testing.assert_array_equal(places["a"], [[0, 1, 2], [3, 4, 5]])
    assert places["b"] == 0


def test_where_the_axis_is_not_bound_split_gives_the_global_view():
    tree = _tree(0)
    whole = jax.jit(lambda x: segments.split(x, AXIS))(tree)
    for name, leaf in tree.items():
        assert whole[name].shape == (segments.padded_size(leaf.size, 1),)
        np.testing.assert_array_equal(whole[name][: leaf.size], leaf.reshape(-1))
    assert segments.bound_axis_size(AXIS) is None


def test_gathered_vectors_count_as_replicated():
    mesh, replicated = make_mesh(4), PartitionSpec()

    def program(x):
        return segments.gather(segments.split(x, AXIS), x, AXIS)

    run = jax.shard_map(program, mesh=mesh, in_specs=replicated, out_specs=replicated)
    x = {"a": np.arange(300, dtype=np.float32)}
    np.testing.assert_array_equal(flat(jax.jit(run)(x)), np.arange(300))


@pytest.mark.parametrize("num_leaves", [1, 12])
def test_one_collective_for_each_dtype_however_many_leaves(num_leaves):
    tree = {str(dtype): [np.ones(10 + 30 * i, dtype) for i in range(num_leaves)] for dtype in (np.float32, np.float16)}
    local = jax.tree.map(lambda x: np.stack([x] * 4), tree)

    def program(_, local):
        segment = segments.reduce_scatter_mean(local, AXIS)
        segment = jax.tree.map(lambda x: 2 * x, segment)
        return segments.gather(segment, local, AXIS)

    hlo = on_devices(program, 4, "shard_map").lower((), local).compile().as_text()
    assert count_instructions(hlo, "reduce-scatter") == 2
    assert count_instructions(hlo, "all-gather") == 2
    assert count_instructions(hlo, "all-reduce", "all-to-all", "collective-permute") == 0


@pytest.mark.parametrize("how", SPLITTING)
@pytest.mark.parametrize("num_devices", [2, 3])
def test_a_leaf_that_does_not_vary_is_its_own_mean(num_devices, how):
    """And is not summed: of the large numbers here, that would be more than float16 can hold."""
    rng = np.random.default_rng(0)
    same = np.asarray(rng.normal(size=700), np.float32)
    large = np.full(3, 3e4, np.float16)
    local = np.asarray(rng.normal(size=(num_devices, 5, 7)), np.float32)

    def program(whole, local):
        return segments.reduce_scatter_mean({**whole, "local": local}, AXIS)

    whole = {"same": same, "large": large} if how == "shard_map" else {"same": same}
    run = on_devices(program, num_devices, how)
    found = {name: np.asarray(x).reshape(-1) for name, x in run(whole, local).items()}
    np.testing.assert_allclose(found["same"][:700], same, rtol=0 if how == "shard_map" else 1e-6)
    np.testing.assert_allclose(found["local"][:35], local.mean(axis=0).reshape(-1), atol=1e-6)
    assert not found["same"][700:].any()
    assert not found["local"][35:].any()
    # Only where it is known what varies; one for each dtype that does.
    operations = plan.collectives(run.lower(whole, local).compile())
    reduced = [array.shape for found in operations for array in found.arrays if found.op == "reduce-scatter"]
    lengths = [segments.padded_size(size, num_devices) // num_devices for size in (700, 35)]
    assert [np.prod(shape) for shape in reduced] == ([lengths[1]] if how == "shard_map" else [sum(lengths)])
    if how == "shard_map":
        np.testing.assert_array_equal(found["large"][:3], large)


def test_what_varies_is_known_where_it_is_tracked():
    seen = {}
    for how in (*SPLITTING, "vmap"):

        def program(whole, local, how=how):
            seen[how] = [vectors.may_vary(x, AXIS) for x in (whole, local, jax.lax.pmean(local, AXIS))]
            return local

        on_devices(program, 2, how)(np.zeros(3), np.zeros((2, 3)))
    assert seen.pop("shard_map") == [False, True, False]
    assert all(all(values) for values in seen.values())
    assert len(seen) == 3


@pytest.mark.parametrize("how", SPLITTING)
def test_whole_gathers_segments_where_the_axis_is_bound(how):
    tree = _tree(0)

    def program(tree, _):
        return segments.whole(segments.split(tree, AXIS), tree, AXIS)

    output = on_devices(program, 3, how)(tree, np.zeros(3))
    for name, leaf in tree.items():
        assert output[name].dtype == leaf.dtype
        for p in range(3):
            np.testing.assert_array_equal(output[name][p], leaf)


def _global_view(tree, mesh):
    """Segments as they look from outside of `shard_map`."""
    split = lambda x: segments.split(x, AXIS)  # noqa: E731
    run = jax.shard_map(split, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(AXIS))
    return jax.jit(run)(tree)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("num_devices", [3, 4])
def test_whole_of_the_global_view_of_segments(explicit, num_devices):
    tree = _tree(0)
    mesh = make_mesh(num_devices)
    if explicit:
        mesh = jax.make_mesh((num_devices,), (AXIS,), devices=mesh.devices.ravel())
    tree = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    view = _global_view(tree, mesh)
    assert all(not x.sharding.is_fully_replicated for x in jax.tree.leaves(view))
    assert {x.ndim for x in jax.tree.leaves(view)} == {1}
    output = jax.jit(lambda view: segments.whole(view, tree, AXIS))(view)
    for name, leaf in tree.items():
        assert output[name].dtype == leaf.dtype
        np.testing.assert_array_equal(output[name], leaf)
        if explicit:
            # Also a leaf that is as long as its segments.
            assert jax.typeof(output[name]).sharding.spec == jax.typeof(leaf).sharding.spec


def test_whole_of_what_is_not_split_is_the_vector_itself():
    tree = jax.tree.map(jnp.asarray, _tree(0))
    for axis_name in (None, AXIS):
        same = segments.whole(tree, tree, axis_name)
        assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(tree), strict=True))


def test_splitting_a_replicated_vector_does_not_communicate():
    run = on_devices(lambda whole, _: segments.split(whole, AXIS), 4, "shard_map")
    hlo = run.lower(_tree(0), np.zeros(4)).compile().as_text()
    assert count_instructions(hlo, "reduce-scatter", "all-gather", "all-reduce") == 0
