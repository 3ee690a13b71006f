"""How long the step of an optimizer takes to compile, and how long its program is, by the number of leaves.

    python -m benchmarks.compile              # prints a table, writes benchmarks/results/compile.json
    python -m benchmarks.compile --print      # prints the table of results that are there

The networks are small, so that what is measured is the program and not its work: an MLP without biases (3 leaves), and
transformers of 2, 9 and 25 layers that are written out one after the other (29, 113 and 305 leaves). Measured are

* the seconds to trace the step, to lower it to StableHLO, and to compile that, each the median of several fresh
  compilations; jax's caches are cleared between them, and its cache on disk is not used;
* the seconds until the first state is there, made outside of ``jit``, as most loops do, with caches as empty;
* the lines of StableHLO, and those of the optimized program; of the latter also the instructions, since its text
  begins with a table of the lines of Python that it comes from.

A hybrid cannot do without the gradient, a curvature product in a loop, and its base. ``floor`` is a program of the
first two, ``floor_adam`` one of all three and Adam for the base. How many lines more than that the step of a hybrid on
Adam has, and by how many that number grows with every leaf, is what the hybrid itself adds.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import dho2_optax as dho2
from benchmarks import machine, networks
from dho2_optax import programs

RESULTS = Path(__file__).parent / "results" / "compile.json"
RANK = 8
PRODUCTS = 16  # in the loop of the floor
PARTS = ("trace", "lower", "compile")

_transformer = functools.partial(
    networks.transformer, width=32, num_heads=2, vocabulary=64, length=16, batch_size=4
)  # (number of layers) -> network
NETWORKS: dict[int, Callable[[], networks.Network]] = {
    3: lambda: networks.mlp((64, 32, 32, 10), batch_size=32),
    29: lambda: _transformer(2),
    113: lambda: _transformer(9),
    305: lambda: _transformer(25),
}
"""By the number of their leaves."""

Loss = Callable[[Any, Any], jax.Array]


class Method(NamedTuple):
    """What is compiled."""

    init: Callable[[Any], Any]  # parameters -> state
    step: Callable[[Any, Any, Any], tuple[Any, Any]]  # (parameters, state, batch) -> (parameters, state)


def optimizer(tx: optax.GradientTransformation, loss_fn: Loss) -> Method:
    """A training step by a transformation that may want the batch."""
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        _, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return Method(tx.init, step)


def streaming(tx: optax.GradientTransformationExtraArgs, loss_fn: Loss, batch_size: int | None = None) -> Method:
    """A training step by an `mr_dho2`, with products on `batch_size` samples."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        _, grads, hvp = dho2.value_grad_and_hvp(loss_fn, batch_size=batch_size)(params, state, batch)
        updates, state = tx.update(grads, state, params, hvp=hvp)
        return optax.apply_updates(params, updates), state

    return Method(tx.init, step)


def _floor(tx: optax.GradientTransformation, loss_fn: Loss) -> Method:
    """A gradient, a Hessian product in a loop, and the update of a transformation."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        _, grads = jax.value_and_grad(loss_fn)(params, batch)
        gradient = jax.grad(lambda params: loss_fn(params, batch))
        product = jax.lax.fori_loop(0, PRODUCTS, lambda _, v: jax.jvp(gradient, (params,), (v,))[1], grads)
        updates, inner = tx.update(grads, state[0], params)
        return optax.apply_updates(params, updates), (inner, product)

    return Method(lambda params: (tx.init(params), params), step)


METHODS: dict[str, Callable[[Loss], Method]] = {
    "adam": lambda loss_fn: optimizer(optax.adam(1e-3), loss_fn),
    "floor": lambda loss_fn: _floor(optax.identity(), loss_fn),
    "floor_adam": lambda loss_fn: _floor(optax.adam(1e-3), loss_fn),
    "dho2_adam": lambda loss_fn: optimizer(dho2.dho2(optax.adam(1e-3), loss_fn, rank=RANK), loss_fn),
    "mr_dho2_adam": lambda loss_fn: streaming(dho2.mr_dho2(optax.adam(1e-3), rank=RANK), loss_fn),
    "dho2_soap": lambda loss_fn: optimizer(dho2.dho2(dho2.soap(1e-3), loss_fn, rank=RANK), loss_fn),
}
ON_ADAM = ("dho2_adam", "mr_dho2_adam")


def measure(leaves: int, name: str, repeats: int) -> dict[str, Any]:
    """A row of the results: seconds and lines of a method on a network. Of it only the first state is made."""
    network = NETWORKS[leaves]()
    method = METHODS[name](network.loss_fn)
    key = jax.random.key(0)
    params, batch = jax.eval_shape(network.init, key), jax.eval_shape(network.batch, key)
    state = jax.eval_shape(method.init, params)
    arrays = jax.block_until_ready(jax.jit(network.init)(key))
    seconds: dict[str, list[float]] = {part: [] for part in ("init", *PARTS)}
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        jax.block_until_ready(method.init(arrays))
        seconds["init"].append(time.perf_counter() - start)
        jax.clear_caches()
        start = time.perf_counter()
        traced = jax.jit(method.step, donate_argnums=(0, 1)).trace(params, state, batch)
        seconds["trace"].append(time.perf_counter() - start)
        start = time.perf_counter()
        lowered = traced.lower()
        seconds["lower"].append(time.perf_counter() - start)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds["compile"].append(time.perf_counter() - start)
    optimized = compiled.as_text()
    return {
        "leaves": leaves,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "method": name,
        "median": {part: statistics.median(values) for part, values in seconds.items()},
        "seconds": seconds,
        "stablehlo_lines": len(lowered.as_text().splitlines()),
        "hlo_lines": len(optimized.splitlines()),
        "hlo_instructions": sum(1 for _ in programs._instructions(optimized)),
    }


def lines_per_leaf(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What a hybrid on Adam adds to the floor, in lines for each leaf that the larger transformer has more."""
    small, large = 29, 113
    found = {(row["leaves"], row["method"]): row for row in rows}
    slopes: dict[str, dict[str, float]] = {}
    for name in ON_ADAM:
        if all((leaves, method) in found for leaves in (small, large) for method in (name, "floor_adam")):
            slopes[name] = {}
            for kind in ("stablehlo_lines", "hlo_lines", "hlo_instructions"):
                added = [found[leaves, name][kind] - found[leaves, "floor_adam"][kind] for leaves in (small, large)]
                slopes[name][kind] = (added[1] - added[0]) / (large - small)
    return slopes


def table(results: dict[str, Any]) -> str:
    """The medians as Markdown: seconds in all (of which before the compiler), and lines of the optimized program."""
    rows = {(row["leaves"], row["method"]): row for row in results["rows"]}
    leaves = sorted({leaves for leaves, _ in rows})
    lines = [["step", *(f"{count} leaves" for count in leaves)], ["---"] * (len(leaves) + 1)]
    for name in dict.fromkeys(method for _, method in rows):
        cells = [_cell(rows[count, name]) if (count, name) in rows else "-" for count in leaves]
        lines.append([name, *cells])
    for name in dict.fromkeys(method for (_, method), row in rows.items() if "init" in row["median"]):
        found = [rows.get((count, name), {"median": {}})["median"].get("init") for count in leaves]
        lines.append([f"first state of {name}", *("-" if x is None else f"{x:.2f} s" for x in found)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    for name, slope in results["lines_per_leaf"].items():
        text += (
            f"\n{name} adds {slope['hlo_lines']:.0f} lines a leaf to those of floor_adam"
            f" ({slope['hlo_instructions']:.0f} instructions), and {slope['stablehlo_lines']:.0f} of StableHLO.\n"
        )
    return text


def _cell(row: dict[str, Any]) -> str:
    before = row["median"]["trace"] + row["median"]["lower"]
    return f"{before + row['median']['compile']:.1f} s ({before:.1f}), {row['hlo_lines']} lines"


def main() -> None:
    """Measures, and writes the results after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = machine.parse(parser, RESULTS, table)
    if arguments is None:
        return
    machine.keep_memory("benchmarks.compile")
    jax.config.update("jax_enable_compilation_cache", False)
    head = {**machine.describe(sys.argv), "repeats": arguments.repeats, "rank": RANK}
    rows: list[dict[str, Any]] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for leaves in arguments.leaves:
        for name in arguments.methods:
            rows.append(measure(leaves, name, arguments.repeats))
            print(f"{leaves} leaves, {name}: {_cell(rows[-1])}", flush=True)
            results = {**head, "lines_per_leaf": lines_per_leaf(rows), "rows": rows}
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
