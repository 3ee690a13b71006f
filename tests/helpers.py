"""What several test modules share: named spectra, trees of vectors, and programs on several devices."""

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dho2_optax import programs
from dho2_optax.packing import Layout

AXIS = "data"
How = Literal["shard_map", "shard_map without vma", "pmap", "vmap"]
SPLITTING = ("shard_map", "shard_map without vma", "pmap")  # ways to run a program on several devices


def named_spectra(n: int) -> dict[str, np.ndarray]:
    """Eigenvalues of symmetric matrices that a Lanczos process finds easy, hard or degenerate."""
    rng = np.random.default_rng(0)
    bulk = rng.uniform(-0.1, 0.1, n)
    clustered = np.concatenate([1 + 1e-3 * np.arange(5), rng.uniform(0, 0.1, n - 5)])
    low_rank = np.concatenate([[5.0, -3.0, 2.0, 1.0, -0.5], np.zeros(n - 5)])
    wide_gap = np.concatenate([[1e6], rng.uniform(0.5, 1, n - 1)])
    outliers = np.concatenate([[10.0, -8.0, 6.0, -5.0, 4.0, 3.0, -2.5, 2.0], bulk[8:]])
    wilkinson = np.diag(np.abs(np.arange(-10.0, 11))) + np.eye(21, k=1) + np.eye(21, k=-1)
    return {
        "outliers": outliers,
        "graded": np.geomspace(1, 1e-6, n),
        "clustered": clustered,
        "indefinite": np.linspace(-1, 1.1, n) ** 3,
        "low rank": low_rank,
        "two values": np.repeat([5.0, 1.0], [10, n - 10]),
        "multiple of the identity": np.full(n, -2.5),
        "zero": np.zeros(n),
        "wide gap": wide_gap,
        "Wilkinson": np.concatenate([np.linalg.eigvalsh(wilkinson), rng.uniform(-0.1, 0.1, n - 21)]),  # W21+
        "periodic Laplacian": 2 - 2 * np.cos(2 * np.pi * np.arange(n) / n),
        "threes and twos": np.concatenate([np.repeat([3.0, 2.0], 3), rng.uniform(0, 1, n - 6)]),
        "twice the largest": np.concatenate([[10.0, 10.0, 5.0], rng.uniform(0, 4, n - 3)]),
    }


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    """A float64 matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    matrix = (rotation * eigenvalues) @ rotation.T
    return (matrix + matrix.T) / 2


class Leaves(Layout):
    """Vectors as they are, not packed: for what computes with any pytrees."""

    def noise(self, seed: Any) -> Any:
        return self.unpack_segments(super().noise(seed))


def flat(tree: Any) -> np.ndarray:
    """A vector as one float64 array."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def flat_rows(stack: Any) -> np.ndarray:
    """A stack of vectors as one float64 matrix."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(stack)]
    return np.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)


def unflatten(vector: Any, like: Any) -> Any:
    """The inverse of :func:`flat`, traceable, with the dtypes of `vector`."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])
    parts = [vector[end - x.size : end].reshape(x.shape) for x, end in zip(leaves, ends, strict=True)]
    return treedef.unflatten(parts)


def matrix_operator(matrix: jax.Array, like: Any) -> Callable[[Any], Any]:
    """The product with a dense matrix as a function of pytrees shaped like `like`."""

    def matvec(x: Any) -> Any:
        vector = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(x)])
        product = jnp.dot(matrix.astype(vector.dtype), vector, precision=jax.lax.Precision.HIGHEST)
        return unflatten(product, like)

    return matvec


def make_mesh(num_devices: int) -> Mesh:
    """A mesh of the first virtual CPU devices with one axis, `AXIS`."""
    return Mesh(np.array(jax.devices("cpu")[:num_devices]), (AXIS,))


def on_devices(function: Callable[..., Any], num_devices: int, how: How) -> Callable[..., Any]:
    """Runs ``function(whole, local)`` on every device of `AXIS` in one of the ways a user may choose.

    The result takes `whole`, which every device sees as it is, and `local`, whose leaves have one more leading axis of
    length `num_devices`, of which each device sees its row. It returns the outputs of all devices, stacked.
    """
    if how == "vmap":
        return jax.jit(jax.vmap(function, in_axes=(None, 0), axis_name=AXIS, axis_size=num_devices))
    if how == "pmap":
        devices = jax.devices("cpu")[:num_devices]
        return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=devices)

    def one_device(whole: Any, local: Any) -> Any:
        output = function(whole, jax.tree.map(lambda x: x[0], local))
        return jax.tree.map(lambda x: x[None], output)

    split, replicated = PartitionSpec(AXIS), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            one_device,
            mesh=make_mesh(num_devices),
            in_specs=(replicated, split),
            out_specs=split,
            check_vma=how == "shard_map",
        )
    )


def count_instructions(hlo: str, *opcodes: str) -> int:
    """How many instructions of a compiled program have one of these opcodes."""
    names = "|".join(re.escape(opcode) for opcode in opcodes)
    return len(re.findall(rf"\s(?:{names})(?:-start)?\(", hlo))


def collectives_beside_a_branch(hlo: str) -> list[tuple[str, str]]:
    """Neighbouring instructions that communicate, one of them a branch or a loop, of which neither waits for the other.

    A device may then be in the one while another is in the other, and they wait for each other for ever.
    """
    computations: dict[str, list[tuple[str, str, list[str], list[str]]]] = {}
    for computation, name, _, opcode, rest in programs._instructions(hlo):
        called = [callee for callee, _ in programs._calls(computation, opcode, rest)]
        line = (name, opcode, re.findall(r"%([\w.\-]+)", rest), called)
        computations.setdefault(computation, []).append(line)

    def communicates(opcode: str, called: list[str]) -> bool:
        inside = (communicates(line[1], line[3]) for callee in called for line in computations.get(callee, []))
        return opcode.removesuffix("-start").removesuffix("-done") in programs._COLLECTIVES or any(inside)

    found = []
    for lines in computations.values():
        earlier: dict[str, set[str]] = {}  # what each instruction waits for
        last = None
        for name, opcode, operands, called in lines:
            known = [operand for operand in operands if operand in earlier]
            earlier[name] = set(known).union(*(earlier[operand] for operand in known))
            if communicates(opcode, called):
                if last is not None and last[0] not in earlier[name] and {last[1], opcode} & {"conditional", "while"}:
                    found.append((last[0], name))
                last = name, opcode
    return found


def python_blocks(text: str) -> list[str]:
    """The Python code of a Markdown text."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
