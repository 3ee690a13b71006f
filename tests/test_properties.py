"""What holds for any parameters, options and numbers of devices, on examples that hypothesis draws."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import dho2_optax as dho2
from dho2_optax import segments
from dho2_optax.packing import Layout
from tests.helpers import AXIS, flat, make_mesh, on_devices

# The same examples in every run. An example compiles programs, so they are few, and none is too slow.
few = functools.partial(settings, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])

_DTYPES = ("float32", "bfloat16", "float16")
_SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def _leaves(dtypes: tuple[str, ...], shapes: Any) -> st.SearchStrategy:
    return st.builds(jax.ShapeDtypeStruct, shapes, st.sampled_from(dtypes).map(jnp.dtype))


def _trees(leaves: st.SearchStrategy) -> st.SearchStrategy:
    """Dicts, lists and tuples of leaves, one in the other, with a leaf at least."""

    def grow(inner: st.SearchStrategy) -> st.SearchStrategy:
        named = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
        return named | st.lists(inner, min_size=1, max_size=3) | st.tuples(inner, inner)

    return st.recursive(leaves, grow, max_leaves=5)


def _filled(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def _assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


# Packing.


@few(max_examples=20)
@given(shapes=_trees(_leaves(_DTYPES, _SHAPES)), seed=st.integers(0, 9))
def test_without_an_axis_unpacking_undoes_packing(shapes, seed):
    tree = _filled(shapes, seed)
    layout = Layout(tree, None)
    buffers = layout.pack(tree)
    assert sum(x.size for x in buffers) == layout.size
    _assert_equal(layout.unpack(layout.cast(buffers)), tree)


@few(max_examples=10)
@given(shapes=_trees(_leaves(_DTYPES, _SHAPES)), num_devices=st.integers(1, 8))
def test_over_an_axis_gathering_undoes_splitting_and_the_mean_is_one(shapes, num_devices):
    whole = _filled(shapes, 0)
    local = _filled(jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_devices, *x.shape), x.dtype), shapes), 1)

    def program(whole, local):
        layout = Layout(whole, AXIS)
        mean = layout.unpack(layout.gather(layout.mean(local)))
        again = layout.pack_segments(layout.unpack_segments(layout.split(whole)))
        return layout.unpack(layout.gather(again)), mean, segments.split(whole, AXIS)

    back, mean, parts = on_devices(program, num_devices, "vmap")(whole, local)
    for device in range(num_devices):
        _assert_equal(jax.tree.map(lambda x, p=device: x[p], back), whole)
    for got, want in zip(jax.tree.leaves(mean), jax.tree.leaves(local), strict=True):
        exact = np.asarray(want, np.float64).mean(axis=0)
        unit = float(jnp.finfo(want.dtype).eps) * (1 + np.abs(np.asarray(want, np.float64)).max(initial=0))
        np.testing.assert_allclose(np.asarray(got[0], np.float64), exact, atol=num_devices * unit)
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(got).reshape(-1)[: want.size], np.asarray(want).reshape(-1))


# Optimizers.

_BASES = {"momentum": lambda: optax.sgd(0.05, momentum=0.5), "adam": lambda: optax.adam(0.02)}
_OPTIMIZERS = st.fixed_dictionaries(
    {
        "factory": st.sampled_from(["dho2", "mr_dho2"]),
        "base": st.sampled_from(sorted(_BASES)),
        "rank": st.integers(1, 3),
        "more": st.integers(2, 4),  # products than pairs
        "interval": st.integers(1, 3),
        "alpha": st.sampled_from([0.1, 1.0]),
        "basis_dtype": st.sampled_from([None, "bfloat16"]),
    }
)


def _build(choice: dict[str, Any], loss_fn: Any, **extra: Any) -> Any:
    interval = {"dho2": "refresh_interval", "mr_dho2": "probe_interval"}[choice["factory"]]
    return getattr(dho2, choice["factory"])(
        _BASES[choice["base"]](),
        loss_fn,
        rank=choice["rank"],
        alpha=choice["alpha"],
        eigensolver=dho2.Eigensolver(order=choice["rank"] + choice["more"], basis_dtype=choice["basis_dtype"]),
        batch_size=None,
        **{interval: choice["interval"]},
        **extra,
    )


def _squares(params: Any, batch: Any) -> jax.Array:
    """Least squares whose Hessian has eigenvalues far from each other, in any parameters."""
    vector = jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(params)])
    scales = 2.0 ** -jnp.arange(vector.size)
    outputs = jnp.dot(batch[:, : vector.size] * scales, vector - 1, precision="highest")
    return jnp.mean(outputs**2)


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@few(max_examples=8)
@given(shapes=_trees(_leaves(_DTYPES, _SHAPES)), choice=_OPTIMIZERS)
def test_a_state_keeps_its_shapes_and_they_do_not_depend_on_the_number_of_devices(shapes, choice):
    tx = _build(choice, _squares)
    state = jax.eval_shape(tx.init, shapes)
    update = functools.partial(tx.update, batch=jnp.zeros((8, 2000)))
    updates, after = jax.eval_shape(update, shapes, state, shapes)
    assert _shapes_of(after) == _shapes_of(state)
    assert _shapes_of(updates) == _shapes_of(shapes)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    assert sum(x.size for x in state.spectrum.eigenvectors) == choice["rank"] * size
    assert state.spectrum.eigenvalues.shape == (choice["rank"],)
    split = _build(choice, _squares, split=dho2.Split(AXIS))
    seen = [_global(split, shapes, num_devices) for num_devices in (1, 2, 8)]
    assert seen[0] == seen[1] == seen[2]


def _global(tx: Any, shapes: Any, num_devices: int) -> Any:
    """The shapes of a state as a whole, of all devices of a mesh."""
    mesh, specs = make_mesh(num_devices), dho2.state_specs(tx.init, shapes, AXIS)
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs, check_vma=False)
    return _shapes_of(jax.eval_shape(init, shapes))


@few(max_examples=5)
@given(
    shapes=_trees(_leaves(("float32",), st.lists(st.integers(1, 3), max_size=2).map(tuple))),
    choice=_OPTIMIZERS.filter(lambda choice: choice["basis_dtype"] is None),
    num_devices=st.sampled_from([2, 3, 4, 8]),
)
def test_any_number_of_devices_gives_the_same_parameters(shapes, choice, num_devices):
    start = jax.tree.map(jnp.asarray, _filled(shapes, 0))
    batch = np.float32(np.random.default_rng(1).normal(size=(48, 64)))

    def train(tx: Any, params: Any, batch: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(_squares)(params, batch), state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda carry: jax.lax.scan(step, carry, length=20)[0])((params, tx.init(params)))

    expected, alone = train(_build(choice, _squares), start, batch)
    mesh = make_mesh(num_devices)
    on_mesh = jax.device_put(start, NamedSharding(mesh, PartitionSpec()))
    split = dho2.Split(AXIS, mesh=mesh)
    shards = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))
    params, state = train(_build(choice, _squares, split=split), on_mesh, shards)
    np.testing.assert_allclose(flat(params), flat(expected), atol=1e-4)
    for name in ("refreshes", "matvecs", "active_pairs"):
        assert dho2.metrics(state)[name] == dho2.metrics(alone)[name]
