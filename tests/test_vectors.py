import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dho2_optax import vectors
from tests.helpers import AXIS, flat, flat_rows, make_mesh, on_devices

_SHAPES = {
    "matrix": ((4, 3), jnp.float32),
    "short": ((5,), jnp.bfloat16),
    "half": ((2, 2), jnp.float16),
    "scalar": ((), jnp.float32),
    "empty": ((0,), jnp.float32),
    "empty rows": ((3, 0), jnp.bfloat16),
}


def _vector(seed):
    rng = np.random.default_rng(seed)
    return {k: np.asarray(rng.normal(size=shape), dtype) for k, (shape, dtype) in _SHAPES.items()}


def _stack(size, seed):
    return jax.tree.map(lambda *rows: np.stack(rows), *(_vector(seed + i) for i in range(size)))


def _dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def test_dots_of_mixed_dtypes_equal_float64():
    stack, vector = _stack(3, 0), _vector(10)
    result = jax.jit(vectors.dots)(stack, vector)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, flat_rows(stack) @ flat(vector), rtol=1e-6, atol=1e-5)


def test_gram_of_mixed_dtypes_equals_float64():
    stack, other = _stack(3, 0), _stack(2, 20)
    result = jax.jit(vectors.gram)(stack, other)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, flat_rows(stack) @ flat_rows(other).T, rtol=1e-6, atol=1e-5)


def test_dot_and_norm_of_mixed_dtypes_equal_float64():
    x, y = _vector(0), _vector(1)
    dot, norm = jax.jit(lambda x, y: (vectors.dot(x, y), vectors.norm(x)))(x, y)
    np.testing.assert_allclose(dot, flat(x) @ flat(y), rtol=1e-5)
    np.testing.assert_allclose(norm, np.linalg.norm(flat(x)), rtol=1e-6)
    assert dot.shape == norm.shape == ()


def test_combine_with_a_vector_gives_a_vector_in_float32_whatever_the_dtypes_of_the_stack():
    stack, coefficients = _stack(3, 0), np.asarray([0.5, -2.0, 1.0], np.float32)
    result = jax.jit(vectors.combine)(coefficients, stack)
    assert set(_dtypes(result).values()) == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(jnp.shape, result) == jax.tree.map(jnp.shape, _vector(0))
    np.testing.assert_allclose(flat(result), coefficients @ flat_rows(stack), rtol=1e-6, atol=1e-6)


def test_combine_with_a_matrix_gives_a_stack():
    stack = _stack(3, 0)
    coefficients = np.random.default_rng(3).normal(size=(2, 3)).astype(np.float32)
    result = jax.jit(vectors.combine)(coefficients, stack)
    assert result["empty rows"].shape == (2, 3, 0)
    assert result["scalar"].shape == (2,)
    expected = coefficients @ flat_rows(stack)
    np.testing.assert_allclose(flat_rows(result), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_accumulated_in_float32():
    # In bfloat16 a sum of ones stops at 256, and 1 + 2**-7 squared has no exact representation.
    dots = jax.jit(vectors.dots)
    ones = np.ones((1, 1000), jnp.bfloat16)
    assert dots(ones, ones[0]) == 1000
    near_one = np.full((1, 64), 1 + 2**-7, jnp.bfloat16)
    assert dots(near_one, near_one[0]) == 64 * (1 + 2**-7) ** 2


def test_accumulation_is_in_float64_where_a_leaf_has_it():
    with jax.enable_x64(True):
        tree = {"a": jnp.ones(2, jnp.float64), "b": jnp.full(3, 1e-9, jnp.float64)}
        assert vectors.accumulation_dtype(tree) == jnp.float64
        total = vectors.dot(tree, {"a": jnp.ones(2), "b": jnp.ones(3)})
        assert total.dtype == jnp.float64
        np.testing.assert_allclose(total, 2 + 3e-9, rtol=1e-15)
    assert vectors.accumulation_dtype({"a": jnp.ones(2, jnp.bfloat16)}) == jnp.float32


@pytest.mark.parametrize("function", [vectors.dots, lambda s, x: vectors.combine(x[:3], s)])
def test_products_ask_for_the_highest_precision(function):
    # Invisible on a CPU; on a TPU the default for float32 is bfloat16, on a GPU it may be TF32.
    text = jax.jit(function).lower(jnp.ones((3, 5)), jnp.ones(5)).as_text()
    assert text.count("stablehlo.dot_general") == 1
    assert "precision = [HIGHEST, HIGHEST]" in text


def _replace(stack, index, vector):
    stack = vectors.set_row(stack, index, vector)
    return stack, vectors.row(stack, index)


def test_row_and_set_row_are_inverse_and_leave_other_rows():
    stack, vector = _stack(3, 0), _vector(7)
    changed, row = jax.jit(_replace)(stack, np.int32(1), vector)
    np.testing.assert_array_equal(flat(row), flat(vector))
    np.testing.assert_array_equal(flat_rows(changed)[[0, 2]], flat_rows(stack)[[0, 2]])
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, stack)


def test_set_row_casts_to_the_dtype_of_the_stack():
    stack = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _stack(2, 0))
    vector = jax.tree.map(lambda x: x.astype(jnp.float32), _vector(1))
    changed, row = jax.jit(_replace)(stack, 0, vector)
    assert _dtypes(changed) == _dtypes(stack)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vector)
    np.testing.assert_array_equal(flat(row), flat(expected))


def test_zero_stack_raises_dtypes_to_float32_or_takes_the_one_asked_for():
    like = _vector(0)
    stack, short = jax.jit(lambda x: (vectors.zero_stack(4, x), vectors.zero_stack(4, x, jnp.bfloat16)))(like)
    assert set(jax.tree.leaves(_dtypes(stack))) == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, stack) == {k: (4, *s) for k, (s, _) in _SHAPES.items()}
    assert not flat(stack).any()
    assert set(jax.tree.leaves(_dtypes(short))) == {jnp.dtype("bfloat16")}


def test_zero_stack_of_abstract_values():
    stack = jax.eval_shape(lambda x: vectors.zero_stack(2, x), jax.ShapeDtypeStruct((3,), jnp.float16))
    assert (stack.shape, stack.dtype) == ((2, 3), jnp.float32)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_vectors_keep_their_sharding(axis_type):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,), devices=jax.devices("cpu")[:4])
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    x = jax.device_put(np.arange(24, dtype=np.float32).reshape(3, 8), sharding)
    assert vectors.zero_stack(5, x).sharding.spec == PartitionSpec(None, None, "model")
    with jax.set_mesh(mesh):
        stack = vectors.zero_stack(5, x)
        assert stack.sharding.spec == PartitionSpec(None, None, "model")
        changed = vectors.set_row(stack, 2, x)
        sums = vectors.dots(changed, x)
        mixed = vectors.combine(jnp.arange(5.0), changed)
    np.testing.assert_allclose(sums, [0, 0, np.sum(np.arange(24.0) ** 2), 0, 0])
    np.testing.assert_allclose(mixed, 2 * np.asarray(x))
    assert mixed.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "model")])
def test_zeros_have_an_explicit_sharding_inside_jit_too(spec):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu")[:4])
    x = jax.device_put(np.full((3, 8), np.nan, np.float32), NamedSharding(mesh, spec))

    @jax.jit
    def zeros(x):
        zeros, stack = vectors.zeros_like(x, jnp.uint32), vectors.zero_stack(5, x)
        assert jax.typeof(zeros).sharding == jax.typeof(x).sharding
        assert jax.typeof(stack).sharding == jax.typeof(jnp.stack([x] * 5)).sharding
        return zeros, stack, x + 1  # a program must read something that has devices

    alone, stack, _ = zeros(x)
    assert alone.dtype == jnp.uint32
    assert (alone.shape, stack.shape) == ((3, 8), (5, 3, 8))
    assert not alone.any()
    assert not stack.any()


def _first_decides(x, wide):
    return vectors.subtract(x, wide), vectors.scale(jnp.float32(3), x), vectors.cast_like(wide, x)


def test_subtract_scale_and_cast_like_keep_the_dtypes_of_their_first_vector():
    x = _vector(0)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _vector(1))
    difference, scaled, cast = jax.jit(_first_decides)(x, wide)
    assert _dtypes(difference) == _dtypes(scaled) == _dtypes(x)
    np.testing.assert_allclose(flat(difference), flat(x) - flat(wide), rtol=8e-3, atol=2e-2)
    np.testing.assert_allclose(flat(scaled), 3 * flat(x), rtol=8e-3)
    assert _dtypes(cast) == _dtypes(x)


@pytest.mark.parametrize("how", ["vmap", "shard_map", "shard_map without vma"])
def test_inner_products_are_summed_over_the_named_axis(how):
    stacks, xs = (
        jax.tree.map(lambda *x: np.stack(x), *(_stack(size, seed + 10 * p) for p in range(2)))
        for size, seed in ((3, 0), (1, 80))
    )

    def program(_, local):
        stack, x = local
        x = vectors.row(x, 0)
        return {
            "dots": vectors.dots(stack, x, AXIS),
            "dot": vectors.dot(x, x, AXIS),
            "norm": vectors.norm(x, AXIS),
        }

    result = on_devices(program, 2, how)((), (stacks, xs))
    device = lambda tree, p: flat_rows(jax.tree.map(lambda leaf: leaf[p], tree))  # noqa: E731
    whole = lambda tree: np.concatenate([device(tree, p) for p in range(2)], axis=1)  # noqa: E731
    s, x = whole(stacks), whole(xs)[0]
    expected = {"dots": s @ x, "dot": x @ x, "norm": np.linalg.norm(x)}
    for name, value in expected.items():
        for p in range(2):
            np.testing.assert_allclose(result[name][p], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_inner_products_without_an_axis_stay_local():
    xs = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = on_devices(lambda _, x: vectors.dot(x, x), 2, "vmap")((), xs)
    np.testing.assert_allclose(result, [5, 50])


def test_vary_marks_values_under_shard_map_and_changes_nothing_elsewhere():
    def is_varying(x):
        return AXIS in jax.typeof(x).manual_axis_type.varying

    seen = []

    def program(x):
        once = vectors.vary(x, AXIS)
        twice = vectors.vary(once, AXIS)
        seen.extend([is_varying(x), is_varying(once), is_varying(twice)])
        return jax.lax.psum(twice, AXIS)

    replicated = PartitionSpec()
    function = jax.shard_map(program, mesh=make_mesh(2), in_specs=replicated, out_specs=replicated)
    assert jax.jit(function)(jnp.float32(3)) == 6
    assert seen == [False, True, True]
    x = jnp.ones(2)
    assert vectors.vary(x, AXIS) is x
    assert vectors.vary(x, None) is x


def test_what_waits_is_what_it_was():
    vector = _vector(0)
    waited = jax.jit(vectors.once)(jnp.asarray(0) >= 0, vector)
    assert _dtypes(waited) == _dtypes(vector)
    for name, leaf in vector.items():
        np.testing.assert_array_equal(np.asarray(waited[name]), leaf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(300, 300), (3, 2, 5), (0,), ()])
def test_a_stack_is_overwritten_by_combinations_of_another(shape, dtype):
    """Row by row where it is large."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        old, stack = (jnp.asarray(rng.normal(size=(n, *shape)), dtype) for n in (2, 5))
        matrix = jnp.asarray(rng.normal(size=(2, 5)), vectors.at_least_float32(dtype))
        overwrite = jax.jit(vectors.overwrite)
        kept, new = (overwrite(old, stack, matrix, jnp.asarray(accept)) for accept in (False, True))
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(kept, old)
        expected = np.tensordot(np.float64(matrix), np.float64(stack), 1)
        tolerance = {"float32": 1e-6, "bfloat16": 1e-2, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(np.float64(new), expected, rtol=tolerance, atol=tolerance)
