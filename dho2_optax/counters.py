"""Counters of int32 that go on making sense at their end, where they stay as those of optax do."""

import jax
import jax.numpy as jnp

ArrayLike = jax.typing.ArrayLike
LARGEST = 2**31 - 1


def add(counter: jax.Array, number: ArrayLike) -> jax.Array:
    """`counter` plus a non-negative number, or the largest int32; for one, as ``optax.safe_increment`` does."""
    number = jnp.asarray(number, jnp.int32)
    return jnp.where(counter > LARGEST - number, LARGEST, counter + number)


def interval_of(number: ArrayLike) -> jax.Array:
    """A number of updates as int32, at least 1: a traced one may be anything."""
    return jax.lax.max(jnp.asarray(number, jnp.int32), jnp.int32(1))


def is_due(clock: jax.Array, start: ArrayLike, interval: ArrayLike) -> jax.Array:
    """Whether a clock is at `start`, or whole intervals after it."""
    # Of lax, since `%` fails in a shard_map for a hyperparameter that lies on the mesh and is closed over.
    since = clock - jnp.asarray(start, jnp.int32)
    return (since >= 0) & (jax.lax.rem(since, interval_of(interval)) == 0)


def tick(clock: jax.Array, start: ArrayLike, interval: ArrayLike) -> jax.Array:
    """The clock one update later; at the end of int32 it is set back by whole intervals, so that the beat stays."""
    start = jnp.asarray(start, jnp.int32)
    phase = jax.lax.rem(clock - start, interval_of(interval))
    return jnp.where(clock < LARGEST, clock, start + phase) + 1
