"""What a compiled program will communicate and hold in memory, read before it runs.

Both facts come from the compiler and not from a model of it: the collectives from the optimized
HLO, the bytes from its buffer assignment. The proof of concept, the tests and the benchmarks all
read them here.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Array", "Collective", "Memory", "collectives", "memory", "tree_bytes_per_device"]

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# Bytes that one device sends with a ring algorithm, as a multiple of the bytes of its result,
# when `p` devices take part. An all-reduce is a reduce-scatter and an all-gather.
_RING_TRAFFIC = {
    "all-gather": lambda p: (p - 1) / p,
    "all-reduce": lambda p: 2 * (p - 1) / p,
    "all-to-all": lambda p: (p - 1) / p,
    "reduce-scatter": lambda p: p - 1,
}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')


class Array(NamedTuple):
    """Shape and dtype of one array in a compiled program, as one device sees it."""

    shape: tuple[int, ...]
    dtype: str  # HLO's name, for instance "f32" or "bf16"

    @property
    def bytes(self) -> int:
        """Size in bytes, without the padding of tiled layouts."""
        return math.prod(self.shape) * _dtype_bits(self.dtype) // 8


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    op: str  # "all-gather", "all-reduce", "reduce-scatter", "all-to-all", ...
    arrays: tuple[Array, ...]  # the results on one device; several if operations were combined
    group_size: int  # number of devices that exchange data with each other
    computation: str  # name of the HLO computation that it is in
    in_loop: bool  # inside the body or condition of a `while`
    in_branch: bool  # inside a branch of a conditional, so not run on every call
    trips: int | None  # runs per call of the program if its branch is taken; None if unknown

    @property
    def bytes(self) -> int:
        """Bytes of the result on one device."""
        return sum(array.bytes for array in self.arrays)

    @property
    def traffic(self) -> float:
        """Bytes that one device sends with a ring algorithm, each time the operation runs."""
        if self.group_size <= 1:
            return 0.0
        factor = _RING_TRAFFIC.get(self.op)
        return self.bytes * (factor(self.group_size) if factor else 1.0)


class Memory(NamedTuple):
    """Bytes that a compiled program needs on one device."""

    argument: int
    output: int
    temp: int
    alias: int  # outputs that reuse the buffer of a donated argument

    @property
    def total(self) -> int:
        """Bytes live at once: arguments, outputs and temporaries, shared buffers once."""
        return self.argument + self.output + self.temp - self.alias


class _Call(NamedTuple):
    """An edge of the call graph of a program."""

    caller: str
    loop: bool
    branch: bool
    trips: int | None


def collectives(compiled: Any) -> list[Collective]:
    """List the collective operations of a compiled program, in the order of its text.

    An asynchronous operation (`all-gather-start` and `all-gather-done`) is listed once. An
    operation in a loop is listed once with `in_loop`, because the number of iterations is in
    general known only at run time; where the compiler knows it, `trips` has it.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or the text of an HLO module.

    Returns:
      The operations; empty for a program that runs on one device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dho2_optax import programs
      >>> programs.collectives(jax.jit(jnp.sum).lower(jnp.ones(8)).compile())
      []
      >>> text = '''HloModule jit_f, num_partitions=4
      ...
      ... ENTRY %main (p: f32[2]) -> f32[8] {
      ...   %p = f32[2]{0} parameter(0)
      ...   ROOT %gathered = f32[8]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
      ... }'''
      >>> [operation] = programs.collectives(text)
      >>> operation.op, operation.bytes, operation.traffic, operation.in_loop
      ('all-gather', 32, 24.0, False)
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    everyone = _number(text, "num_partitions") * _number(text, "replica_count")
    found: list[tuple[str, tuple[Array, ...], int, str]] = []
    calls: dict[str, list[_Call]] = {}
    groups: dict[str, int] = {}  # of each `-start`, since `-done` does not repeat it
    for computation, name, shape, opcode, rest in _instructions(text):
        for callee, call in _calls(computation, opcode, rest):
            calls.setdefault(callee, []).append(call)
        base = opcode.removesuffix("-start").removesuffix("-done")
        if base not in _COLLECTIVES:
            continue
        if opcode.endswith("-start"):
            groups[name] = _group_size(rest, everyone)
            continue
        if opcode.endswith("-done"):
            operand = re.search(r"%?([\w.\-]+)\s*[,)]", rest.rsplit("(", 1)[-1] + ")")
            size = groups.get(operand.group(1) if operand else "", everyone)
        else:
            size = _group_size(rest, everyone)
        found.append((base, _arrays(shape), size, computation))
    result = []
    for op, arrays, size, computation in found:
        loop, branch, trips = _context(computation, calls)
        result.append(Collective(op, arrays, size, computation, loop, branch, trips))
    return result


def memory(compiled: Any) -> Memory:
    """Read the bytes that a compiled program needs on each device.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.

    Returns:
      The bytes per device.

    Raises:
      ValueError: if the backend does not analyse memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dho2_optax import programs
      >>> needed = programs.memory(jax.jit(jnp.sin).lower(jnp.ones(256)).compile())
      >>> needed.argument, needed.output, needed.alias
      (1024, 1024, 0)
      >>> needed.total == 2048 + needed.temp
      True
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend does not report the memory of a compiled program")
    return Memory(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        temp=stats.temp_size_in_bytes,
        alias=stats.alias_size_in_bytes,
    )


def tree_bytes_per_device(tree: Any) -> int:
    """Count the bytes that the arrays of a pytree occupy on each device.

    Args:
      tree: arrays, or `jax.ShapeDtypeStruct`s with or without a sharding. A leaf without a
        sharding counts in full.

    Returns:
      The bytes of one device's shards (of the largest where the shards differ).

    Example:
      >>> import jax.numpy as jnp
      >>> from dho2_optax import programs
      >>> programs.tree_bytes_per_device({"w": jnp.ones((4, 8)), "b": jnp.ones(8, jnp.bfloat16)})
      144
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape, dtype = np.shape(leaf), getattr(leaf, "dtype", None)
        if dtype is None:
            dtype = np.result_type(leaf)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
            shape, dtype = leaf.shape, leaf.dtype
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None:
            shape = sharding.shard_shape(shape)
        total += math.prod(shape) * np.dtype(dtype).itemsize
    return total


def _instructions(text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (computation, name, shape, opcode, operands and attributes) of every instruction."""
    computation = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            computation = header.group(1)
            continue
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        shape, rest = _split_shape(match.group(2))
        opcode, _, rest = rest.partition("(")
        yield computation, match.group(1), shape, opcode.strip(), rest


def _split_shape(text: str) -> tuple[str, str]:
    """Split the right-hand side of an instruction after its shape, which may be a tuple."""
    depth = 0
    for i, char in enumerate(text):
        if char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif char == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), dtype)
        for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape))
    )


def _dtype_bits(dtype: str) -> int:
    """Bits of an HLO element type such as f32, bf16, pred, s4, c64 or f8e4m3fn."""
    if dtype == "pred":
        return 8
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match.group(1)) if match else 0


def _number(text: str, attribute: str) -> int:
    match = re.search(rf"\b{attribute}=(\d+)", text[: text.find("\n")] if "\n" in text else text)
    return int(match.group(1)) if match else 1


def _group_size(attributes: str, everyone: int) -> int:
    """Number of devices in a replica group, in any of the forms in which HLO writes it."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh.group(1)))
        # 'axis' in full, or 'axis':(k)n for a part of it.
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota.group(2))
    explicit = re.search(r"replica_groups=\{\{([\d,\s]*)\}", attributes)
    if explicit:
        return len([n for n in explicit.group(1).split(",") if n.strip()])
    return everyone


def _calls(computation: str, opcode: str, attributes: str) -> Iterator[tuple[str, _Call]]:
    """Yield the computations that an instruction runs."""
    loop, branch = opcode == "while", opcode == "conditional"
    trips: int | None = 1
    if loop:
        known = _TRIPS.search(attributes)
        trips = int(known.group(1)) if known else None
    single = r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    several = r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
    names = re.findall(single, attributes)
    for group in re.findall(several, attributes):
        names.extend(name.strip().lstrip("%") for name in group.split(","))
    for name in names:
        yield name, _Call(computation, loop, branch, trips)


def _context(computation: str, calls: dict[str, list[_Call]]) -> tuple[bool, bool, int | None]:
    """Whether a computation runs in a loop, in a branch, and how often."""
    contexts = []
    for call in calls.get(computation, []):
        loop, branch, trips = _context(call.caller, calls)
        trips = trips * call.trips if trips is not None and call.trips is not None else None
        contexts.append((loop or call.loop, branch or call.branch, trips))
    if not contexts:
        return False, False, 1
    trips = [trip for _, _, trip in contexts]
    known = all(trip is not None for trip in trips)
    return (
        any(loop for loop, _, _ in contexts),
        # A computation called from several places runs always if one of them always runs.
        all(branch for _, branch, _ in contexts),
        sum(trip or 0 for trip in trips) if known else None,
    )
