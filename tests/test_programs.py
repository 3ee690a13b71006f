import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dho2_optax import programs


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("data",))


def _compile(function, mesh, *shapes):
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(PartitionSpec("data") if shape else PartitionSpec() for shape in shapes),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile()


def _gather_and_scatter(x):
    whole = jax.lax.all_gather(x, "data", tiled=True)
    return jax.lax.psum_scatter(2 * whole, "data", tiled=True)


def test_each_collective_has_its_bytes_and_its_ring_traffic(mesh):
    found = programs.collectives(_compile(_gather_and_scatter, mesh, (64,)))
    assert [(c.op, c.bytes, c.traffic, c.group_size) for c in found] == [
        ("all-gather", 256, 192.0, 4),
        ("reduce-scatter", 64, 192.0, 4),
    ]
    assert found[0].arrays == (programs.Array((64,), "f32"),)
    assert not any(c.in_loop or c.in_branch for c in found)
    assert [c.trips for c in found] == [1, 1]


def test_an_all_reduce_sends_twice_what_an_all_gather_does(mesh):
    compiled = _compile(lambda x: jax.lax.psum(x, "data"), mesh, (64,))
    [found] = programs.collectives(compiled)
    assert (found.op, found.bytes, found.traffic) == ("all-reduce", 64, 96.0)


def test_a_collective_in_a_loop_of_known_length_is_counted(mesh):
    def body(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: _gather_and_scatter(y), x)

    found = programs.collectives(_compile(body, mesh, (64,)))
    assert {c.op for c in found} == {"all-gather", "reduce-scatter"}
    for c in found:
        assert c.in_loop
        assert not c.in_branch
        assert c.trips == 5


def test_a_collective_in_a_branch_and_a_loop_of_unknown_length(mesh):
    def body(x, n):
        def refresh(y):
            return jax.lax.while_loop(
                lambda carry: carry[0] < n,
                lambda carry: (carry[0] + 1, _gather_and_scatter(carry[1])),
                (0.0, y),
            )[1]

        return jax.lax.cond(n > 3, refresh, lambda y: y, jax.lax.psum(x, "data"))

    found = programs.collectives(_compile(body, mesh, (64,), ()))
    always = [c for c in found if not c.in_branch]
    assert [c.op for c in always] == ["all-reduce"]
    refresh = [c for c in found if c.in_branch]
    assert {c.op for c in refresh} == {"all-gather", "reduce-scatter"}
    assert all(c.in_loop and c.trips is None for c in refresh)
    assert all(c.computation for c in refresh)


def test_asynchronous_forms_and_tuples_are_counted_once():
    text = """HloModule jit_f, replica_count=1, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %a)
}

ENTRY %main (p: bf16[4,2], q: f32[3]) -> f32[] {
  %p = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(0)
  %q = f32[3]{0} parameter(1)
  %ags = (bf16[4,2]{1,0}, bf16[16,2]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8]
  %agd = bf16[16,2]{1,0:T(8,128)(2,1)} all-gather-done(%ags)
  %ar = (f32[], /*index=1*/f32[3]{0}) all-reduce(%c, %q), replica_groups={}, to_apply=%add
  %cps = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={}
  %cpd = f32[3]{0} collective-permute-done(%cps)
  %a2a = f32[8,2]{1,0} all-to-all(%x), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  ROOT %r = f32[] get-tuple-element(%ar), index=0
}
"""
    found = programs.collectives(text)
    assert [(c.op, c.bytes, c.group_size) for c in found] == [
        ("all-gather", 64, 4),
        ("all-reduce", 16, 8),
        ("collective-permute", 12, 8),
        ("all-to-all", 64, 2),
    ]
    assert found[1].arrays == (programs.Array((), "f32"), programs.Array((3,), "f32"))
    assert {c.computation for c in found} == {"main"}


def test_memory_counts_donated_buffers_once():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    kept = programs.memory(jax.jit(lambda x: x + 1).lower(x).compile())
    donated = programs.memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert (kept.argument, kept.output, kept.alias) == (4096, 4096, 0)
    assert donated.alias == 4096
    assert kept.total - donated.total == 4096


def test_memory_of_a_backend_that_does_not_tell():
    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="does not report"):
        programs.memory(Silent())


def test_tree_bytes_follow_the_sharding(mesh):
    split = NamedSharding(mesh, PartitionSpec("data"))
    tree = {
        "split": jax.device_put(jnp.ones((8, 3)), split),
        "abstract": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=split),
        "whole": jax.device_put(jnp.ones(5, jnp.int8), NamedSharding(mesh, PartitionSpec())),
        "key": jax.random.key(0),
        "host": np.ones(2, np.float64),
        "number": 1.0,
    }
    assert programs.tree_bytes_per_device(tree) == 24 + 4 + 5 + 8 + 16 + 8
