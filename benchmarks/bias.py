"""How much too large the eigenvalues of a small batch are, and what an independent batch does about it.

    python -m benchmarks.bias        # prints a table, writes benchmarks/results/bias.json

A network is trained; then, at each batch size, eigenpairs are found

* by a Lanczos process on one batch (`dho2`),
* the same, with the eigenvalues taken anew on another batch of that size (`rayleigh=`),
* by a Lanczos process with a batch of its own for every product (`mr_dho2`, at parameters that stand still).

The truth about an eigenvalue is the Rayleigh quotient of its own vector on all samples; given is the ratio of the sums,
over the pairs and over several draws. Beside it stands what the vectors are worth: the sum of their true quotients,
relative to that of the vectors found on all samples.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dho2_optax as dho2
from benchmarks import machine, problems
from dho2_optax import eigensolver, krylov, vectors
from dho2_optax.packing import Layout

RANK = 8
ORDER = 16
RESULTS = Path(__file__).parent / "results" / "bias.json"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The ratios at every batch size."""
    problem = problems.mlp(arguments.data, hidden=(128, 64), batch_size=512)
    params = _trained(problem, arguments.steps)
    operator = dho2.hessian(problem.loss_fn)
    everything = tuple(jnp.asarray(x[: arguments.samples]) for x in problem.data)
    whole = jax.jit(lambda v: operator(params, v, everything))
    rng = np.random.default_rng(0)

    @jax.jit
    def one_batch(batch: Any, other: Any) -> tuple[dho2.Spectrum, dho2.Spectrum]:
        found = _solve(lambda v, _: operator(params, v, batch), params)
        again = eigensolver.with_rayleigh_quotients(found, lambda v: operator(params, v, other), None)
        return found, again

    @jax.jit
    def many_batches(stacked: Any) -> dho2.Spectrum:
        return _solve(lambda v, i: operator(params, v, jax.tree.map(lambda x: x[i], stacked)), params)

    def true_values(spectrum: dho2.Spectrum) -> np.ndarray:
        rows = [jax.tree.map(lambda x, i=i: x[i], spectrum.eigenvectors) for i in range(RANK)]
        return np.array([float(vectors.dot(row, whole(row))) for row in rows])

    best = float(np.abs(true_values(_solve(lambda v, _: whole(v), params))).sum())
    rows = []
    for batch_size in arguments.batch_sizes:
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.draws):

            def draw(size: int = batch_size) -> Any:
                index = rng.choice(arguments.samples, size, replace=False)
                return tuple(x[index] for x in everything)

            first, again = one_batch(draw(), draw())
            batches = [draw() for _ in range(ORDER)]
            streamed = many_batches(jax.tree.map(lambda *x: jnp.stack(x), *batches))
            for name, spectrum in (("one batch", first), ("independent batch", again), ("streaming", streamed)):
                estimate = float(jnp.sum(jnp.abs(spectrum.eigenvalues)))
                found.setdefault(name, []).append((estimate, float(np.abs(true_values(spectrum)).sum())))
        row = {"batch_size": batch_size}
        for name, pairs in found.items():
            estimate, true = (sum(column) for column in zip(*pairs, strict=True))
            row[name] = {
                "estimate / true": estimate / true,
                "spread": statistics.stdev(a / b for a, b in pairs),
                "captured": true / len(pairs) / best,
            }
        rows.append(row)
        print(row, flush=True)
    return {
        "problem": "MLP 784-128-64-10 on Fashion-MNIST, Adam 1e-3, batch 512",
        "trained_for": arguments.steps,
        "samples": arguments.samples,
        "draws": arguments.draws,
        "rank": RANK,
        "order": ORDER,
        "batch_sizes": rows,
    }


def _trained(problem: problems.Problem, num_steps: int) -> Any:
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(problem.loss_fn)(params, batch), state)
        return optax.apply_updates(params, updates), state

    params = problem.init(jax.random.key(0))
    state = tx.init(params)
    source = problems.batches(problem, 0)
    for _ in range(num_steps):
        params, state = step(params, state, next(source))
    return params


def _solve(product: Callable[[Any, Any], Any], like: Any) -> dho2.Spectrum:
    """Eigenpairs after `ORDER` products ``(vector, number of the product) -> vector``."""
    seed = jnp.uint32(0)
    layout = Layout(like, None)
    process = krylov.start(layout.random(seed), ORDER, seed=seed)
    for i in range(ORDER):
        process = krylov.extend(process, layout.pack(product(layout.unpack(process.vector), i)), layout)
    found = eigensolver.wanted(krylov.ritz(process), RANK, 0, "magnitude")
    spectrum = eigensolver.publish(process, found, found.exists)
    return spectrum._replace(eigenvectors=jax.vmap(layout.unpack)(spectrum.eigenvectors))


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=problems.FASHION_MNIST, help="folder of the four IDX files")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--samples", type=int, default=10_000, help="what counts as all samples")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000, help="of training before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    machine.keep_memory("benchmarks.bias")
    results = {**machine.describe(sys.argv), **measure(arguments)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
