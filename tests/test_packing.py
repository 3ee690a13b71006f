"""Packed vectors and their segments: `packing` and `segments`."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dho2_optax import programs, segments, vectors
from dho2_optax.packing import Layout, of_buffers
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
    layout = Layout(whole, AXIS)
    buffers = layout.split(whole)
    return {
        "segments": segments.split(whole, AXIS),
        "of buffers": layout.unpack_segments(buffers),
        "packed again": layout.pack_segments(layout.unpack_segments(buffers)),
        "buffers": buffers,
        "gathered": layout.unpack(layout.gather(buffers)),
        "mean": layout.unpack_segments(layout.mean(local)),
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


@pytest.mark.parametrize("form", ["segments", "of buffers"])
def test_segments_are_consecutive_and_padded_with_zeros(case, form):
    for name, values in _laid_out(form, case).items():
        leaf = case.whole[name].reshape(-1)
        assert values.size == segments.padded_size(leaf.size, case.num_devices)
        assert values.dtype == leaf.dtype
        np.testing.assert_array_equal(values[: leaf.size], leaf)
        assert not values[leaf.size :].any()


def test_there_is_one_buffer_for_each_dtype_and_segments_pack_to_it(case):
    buffers = case.output["buffers"]
    assert [x.dtype for x in buffers] == [np.float32, jnp.bfloat16]
    for one, other in zip(buffers, case.output["packed again"], strict=True):
        assert one.ndim == 3
        np.testing.assert_array_equal(one, other)
    sizes = [segments.padded_size(leaf.size, case.num_devices) for leaf in case.whole.values()]
    assert sum(x.size for x in buffers) == sum(sizes)


def test_the_mean_equals_a_loop_over_the_devices(case):
    for name, values in _laid_out("mean", case).items():
        leaves = [tree[name].reshape(-1).astype(np.float64) for tree in case.local]
        assert values.dtype == case.whole[name].dtype
        tolerance = 2e-2 if values.dtype == jnp.bfloat16 else 1e-6
        mean = sum(leaves) / case.num_devices
        np.testing.assert_allclose(values[: mean.size], mean, rtol=tolerance, atol=tolerance)
        assert not values[mean.size :].any()


def test_all_devices_together_have_the_same_buffers_for_all_powers_of_two():
    wholes = []
    for num_devices in (1, 2, 8):
        split = on_devices(lambda whole, _: Layout(whole, AXIS).split(whole), num_devices, "shard_map")
        wholes.append([np.concatenate(x) for x in split(_tree(0), np.zeros(num_devices))])
    wholes.append(Layout(_tree(0), AXIS).split(_tree(0)))  # the view from outside
    for buffers in wholes[1:]:
        for x, y in zip(wholes[0], buffers, strict=True):
            np.testing.assert_array_equal(x, y)


def test_padded_sizes_are_the_same_for_all_powers_of_two():
    for size in (1, 255, 256, 257, 1000):
        sizes = {segments.padded_size(size, p) for p in (1, 2, 4, 8, 16, 256)}
        assert sizes == {-(-size // 256) * 256}
        assert segments.padded_size(size, 3) % 768 == 0


_BIG = {
    "query": (256, 300),
    "bias": (300,),
    "key": (256, 300),
    "norm": (7,),
    "out": (300, 256),
    "scalar": (),
    "value": (256, 300),
}


def _big(seed, sharding=None):
    rng = np.random.default_rng(seed)
    tree = {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in _BIG.items()}
    return tree if sharding is None else jax.device_put(tree, sharding)


def test_without_an_axis_large_leaves_of_one_shape_are_stacked_and_small_ones_are_one_buffer():
    tree = _big(0)
    layout = Layout(tree, None)
    buffers = layout.pack(tree)
    assert sorted(x.shape for x in buffers) == [(3, 256, 300), (300, 256), (308,)]
    assert layout.size == sum(x.size for x in buffers)
    for form in (layout.unpack(buffers), layout.unpack_segments(layout.split(tree)), layout.unpack(layout.mean(tree))):
        for name, leaf in tree.items():
            np.testing.assert_array_equal(form[name], leaf)
    assert layout.gather(buffers) is buffers


def test_a_single_leaf_is_its_own_buffer():
    for leaf in (jnp.ones((2, 3)), jnp.ones((500, 500)), jnp.ones(())):
        (buffer,) = Layout(leaf, None).pack(leaf)
        assert buffer is leaf
        assert Layout(leaf, None).unpack((buffer,)) is leaf


def test_leaves_keep_their_place_whatever_dtype_a_vector_has():
    """Eigenvectors of bfloat16 parameters are float32; their buffers are those of the parameters."""
    tree = _tree(0)
    for axis_name in (None, AXIS):
        layout = Layout(tree, axis_name)
        wide = layout.pack(jax.tree.map(lambda x: x.astype(np.float32), tree))
        assert {x.dtype for x in wide} == {np.dtype(np.float32)}
        narrow = layout.cast(wide)
        for x, y in zip(narrow, layout.pack(tree), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_leaves_of_several_dtypes_in_one_buffer_get_the_widest():
    like = {"a": np.zeros(3, np.float16), "b": np.zeros(2, np.float16)}
    (buffer,) = Layout(like, None).pack({"a": np.ones(3, np.float16), "b": np.full(2, 1e9, np.float32)})
    np.testing.assert_array_equal(buffer, np.float32([1, 1, 1, 1e9, 1e9]))


def test_hidden_leaves_have_no_place():
    tree = {"a": jnp.ones(3), "b": optax.MaskedNode()}
    layout = Layout(tree, None)
    assert layout.size == 3
    assert layout.unpack(layout.pack(tree)) == tree


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_large_leaves_that_the_user_shards_are_not_gathered(axis_type):
    mesh = jax.make_mesh((4,), ("model",), devices=jax.devices("cpu")[:4], axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    shapes = {"query": (256, 300), "key": (256, 300), "out": (304, 256)}
    tree = jax.device_put({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, sharding)

    def program(tree):
        layout = Layout(tree, None)
        return layout.unpack(tuple(2 * x for x in layout.pack(tree)))

    compiled = jax.jit(program).lower(tree).compile()
    assert count_instructions(compiled.as_text(), "all-gather", "all-to-all", "collective-permute", "all-reduce") == 0
    result = compiled(tree)
    for name, leaf in tree.items():
        assert result[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        np.testing.assert_array_equal(result[name], 2 * leaf)


def test_whole_vectors_count_as_replicated():
    mesh, replicated = make_mesh(4), PartitionSpec()

    def program(x):
        layout = Layout(x, AXIS)
        return layout.unpack(layout.gather(layout.split(x)))

    run = jax.shard_map(program, mesh=mesh, in_specs=replicated, out_specs=replicated)
    x = {"a": np.arange(300, dtype=np.float32)}
    np.testing.assert_array_equal(flat(jax.jit(run)(x)), np.arange(300))


@pytest.mark.parametrize("num_leaves", [1, 12])
def test_one_collective_for_each_dtype_however_many_leaves(num_leaves):
    tree = {str(dtype): [np.ones(10 + 30 * i, dtype) for i in range(num_leaves)] for dtype in (np.float32, np.float16)}
    local = jax.tree.map(lambda x: np.stack([x] * 4), tree)

    def program(_, local):
        layout = Layout(local, AXIS)
        return layout.unpack(layout.gather(tuple(2 * x for x in layout.mean(local))))

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
        layout = Layout({**whole, "local": local}, AXIS)
        return layout.unpack_segments(layout.mean({**whole, "local": local}))

    whole = {"same": same, "large": large} if how == "shard_map" else {"same": same}
    run = on_devices(program, num_devices, how)
    found = {name: np.asarray(x).reshape(-1) for name, x in run(whole, local).items()}
    np.testing.assert_allclose(found["same"][:700], same, rtol=0 if how == "shard_map" else 1e-6)
    np.testing.assert_allclose(found["local"][:35], local.mean(axis=0).reshape(-1), atol=1e-6)
    assert not found["same"][700:].any()
    assert not found["local"][35:].any()
    if how == "shard_map":  # only there it is known what varies
        np.testing.assert_array_equal(found["large"][:3], large)
        nothing = on_devices(lambda whole, _: Layout(whole, AXIS).mean(whole), num_devices, how)
        assert not programs.collectives(nothing.lower(whole, local).compile())


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


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("num_devices", [1, 3, 4])
def test_what_all_devices_have_can_be_read_from_outside(explicit, num_devices):
    tree, mesh = _tree(0), make_mesh(num_devices)
    if explicit:
        mesh = jax.make_mesh((num_devices,), (AXIS,), devices=mesh.devices.ravel())
    tree = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    split = lambda x: Layout(x, AXIS).split(x)  # noqa: E731
    run = jax.shard_map(split, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(AXIS))
    buffers = jax.jit(run)(tree)
    assert all(x.sharding.is_fully_replicated == (num_devices == 1) for x in buffers)
    output = jax.jit(lambda buffers: of_buffers(buffers, tree).unpack(buffers))(buffers)
    for name, leaf in tree.items():
        assert output[name].dtype == leaf.dtype
        np.testing.assert_array_equal(output[name], leaf)


def test_buffers_that_are_not_split_are_known_by_their_shapes():
    for tree in (_tree(0), _big(0)):
        layout = Layout(tree, None)
        assert of_buffers(layout.pack(tree), tree) == layout
        assert layout != Layout(tree, AXIS)


def test_splitting_a_replicated_vector_does_not_communicate():
    run = on_devices(lambda whole, _: Layout(whole, AXIS).split(whole), 4, "shard_map")
    hlo = run.lower(_tree(0), np.zeros(4)).compile().as_text()
    assert count_instructions(hlo, "reduce-scatter", "all-gather", "all-reduce") == 0


_MIXED = {
    "big": np.zeros((30, 40), np.float32),
    "same": np.zeros((30, 40), jnp.bfloat16),
    "odd": np.zeros(257, np.float32),
    "scalar": np.float32(0),
    "empty": np.zeros(0, np.float32),
    "large": np.zeros((300, 256), np.float32),
    "as large": np.zeros((300, 256), np.float32),
}


@cache
def _random(seed, num_devices=None):
    seed = np.uint32(seed)
    if num_devices is None:
        layout = Layout(_MIXED, None)
        return jax.jit(lambda seed: layout.unpack(layout.noise(seed)))(seed)

    def program(seed, _):
        layout = Layout(_MIXED, AXIS)
        buffers = layout.noise(seed)
        return layout.unpack(layout.gather(buffers)), layout.unpack_segments(buffers)

    return on_devices(program, num_devices, "shard_map")(seed, np.zeros(num_devices))


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8])
def test_random_vectors_do_not_depend_on_the_number_of_devices(num_devices):
    alone = _random(5)
    whole, segment = _random(5, num_devices)
    for name, leaf in alone.items():
        for p in range(num_devices):
            np.testing.assert_array_equal(whole[name][p], leaf)
        assert not np.asarray(segment[name]).reshape(-1)[leaf.size :].any()


def test_random_vectors_differ_by_seed_and_between_leaves():
    first, second = _random(5), _random(6)
    for x, y in (
        (first["big"], second["big"]),
        (first["odd"], second["odd"]),
        (first["large"], second["large"]),
        (first["big"], first["same"]),
        (first["large"], first["as large"]),
        (first["big"].reshape(-1)[:257], first["odd"]),
    ):
        correlation = np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]
        assert abs(correlation) < 4 / np.sqrt(np.size(x))
    assert first["scalar"] != second["scalar"]


def test_random_vectors_are_uniform_and_of_float32_and_unit_if_they_shall_be():
    vector = _random(5)
    assert {leaf.dtype for leaf in jax.tree.leaves(vector)} == {jnp.dtype("float32")}
    values = flat(vector)
    layout = Layout(_MIXED, None)
    unit = flat(layout.unpack(jax.jit(layout.random)(np.uint32(5))))
    assert np.linalg.norm(unit) == pytest.approx(1, abs=2e-5)
    np.testing.assert_allclose(unit, values / np.linalg.norm(values), rtol=2e-5)
    assert abs(np.mean(values)) < 4 / np.sqrt(3 * values.size)
    assert np.mean(values**4) == pytest.approx(1 / 5, rel=0.1)
    assert np.max(np.abs(values)) <= 1
    assert np.unique(values).size > 0.99 * values.size
    neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(values.size)


def test_the_program_of_a_random_vector_does_not_grow_with_the_leaves():
    def lines(num_leaves):
        layout = Layout([np.zeros(300, np.float32)] * num_leaves, AXIS)
        return len(jax.jit(layout.random).lower(np.uint32(0)).as_text().splitlines())

    assert lines(100) == lines(2)
