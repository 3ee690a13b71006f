"""What `dho2` adds to a training step: update and refresh time, curvature products, bytes.

    python -m benchmarks.overhead            # prints a table, writes benchmarks/results/overhead.json

One process, one device, an MLP 784-1024-256-10 (1.07 M parameters), batch 256, eight eigenpairs. Every time is the
median of several calls after warm-up; the variants of a comparison are called in turn, so that a change of the
machine's speed meets all of them alike. Compared are

* the update with `optax.adam` alone and with Adam as the base of `dho2`, against the time to read the stack of
  eigenvectors four times, which no implementation of the rule can avoid;
* a refresh against its curvature products alone, once as a loop in one program (the compiler then shares the forward
  pass between them, as it does in the refresh) and once as separate calls;
* the optimizer's state and the temporaries of the compiled step against the formulas.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dho2_optax as dho2
from benchmarks import machine
from dho2_optax import curvature, programs, vectors
from dho2_optax.packing import Layout

SIZES = (784, 1024, 256, 10)
BATCH_SIZE = 256
RANK = 8
ORDER = 16


def init_params(key: jax.Array, sizes: Sequence[int] = SIZES) -> list[dict[str, jax.Array]]:
    """He-initialised weights."""
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": jax.random.normal(k, (a, b)) * np.sqrt(2 / a), "b": jnp.zeros(b)} for k, a, b in pairs]


def loss_fn(params: list[dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Cross entropy of a ReLU MLP."""
    hidden, labels = batch
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"])
    logits = hidden @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each function: in turn, four calls in a row of which the first is not counted.

    The uncounted call brings every function's own data into the caches, so that none pays for what its predecessor
    left there.
    """
    for function in functions.values():
        for _ in range(3):
            jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            jax.block_until_ready(function())
            for _ in range(3):
                start = time.perf_counter()
                jax.block_until_ready(function())
                times[name].append(time.perf_counter() - start)
    return times


class Updater:
    """Calls a compiled, donated update over and over on its own state."""

    def __init__(self, tx: optax.GradientTransformationExtraArgs, params: Any, grads: Any, batch: Any) -> None:
        """Compiles ``tx.update`` for these arguments."""

        def update(grads: Any, state: Any, params: Any, batch: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params, batch=batch)
            return state, updates  # donated arrays serve the first results that look like them: the state itself

        self.state = jax.tree.map(jnp.copy, tx.init(params))
        self.arguments = (params, grads, batch)
        self.compiled = jax.jit(update, donate_argnums=1).lower(grads, self.state, params, batch).compile()

    def __call__(self) -> Any:
        """One update."""
        params, grads, batch = self.arguments
        self.state, updates = self.compiled(grads, self.state, params, batch)
        return updates


def measure(repeats: int) -> dict[str, Any]:
    """All figures of the benchmark, in seconds and bytes."""
    params = init_params(jax.random.key(0))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    batch = (jax.random.normal(jax.random.key(1), (BATCH_SIZE, SIZES[0])), jnp.arange(BATCH_SIZE) % SIZES[-1])
    grads = jax.jit(jax.grad(loss_fn))(params, batch)
    hybrid = functools.partial(
        dho2.dho2,
        optax.adam(1e-3),
        loss_fn,
        rank=RANK,
        batch_size=None,
        metric=None,
        eigensolver=dho2.Eigensolver(order=ORDER, tolerance=0.0, max_residual=jnp.inf),
    )
    never = Updater(hybrid(refresh_interval=10**8, warmup_steps=10**8), params, grads, batch)
    always = Updater(hybrid(refresh_interval=1), params, grads, batch)
    adam = Updater(optax.with_extra_args_support(optax.adam(1e-3)), params, grads, batch)
    always()
    never.state = never.state._replace(spectrum=jax.tree.map(jnp.copy, always.state.spectrum))

    # Reading the stack once, by the fastest of three ways.
    stack = jax.tree.map(jnp.copy, always.state.spectrum.eigenvectors)
    packed = jax.jit(Layout(params, None).pack)(grads)
    coefficients = jnp.ones(RANK)
    add_up = jax.jit(lambda s: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(s)))
    dots = jax.jit(lambda s, g: vectors.dots(s, g))
    combine = jax.jit(lambda s, c: vectors.combine(c, s))

    operator = curvature.hessian(loss_fn)
    product = jax.jit(operator)

    @jax.jit
    def loop_of_products(params: Any, vector: Any, batch: Any) -> Any:
        return jax.lax.fori_loop(0, ORDER, lambda _, v: operator(params, v, batch), vector)

    times = seconds(
        {
            "adam": adam,
            "dho2 update": never,
            "read stack: sum": lambda: add_up(stack),
            "read stack: dots": lambda: dots(stack, packed),
            "read stack: combine": lambda: combine(stack, coefficients),
            "gradient": functools.partial(jax.jit(jax.grad(loss_fn)), params, batch),
            "product": lambda: product(params, grads, batch),
            "products in a loop": lambda: loop_of_products(params, grads, batch),
            "dho2 update with refresh": always,
        },
        repeats,
    )
    median = {name: statistics.median(values) for name, values in times.items()}
    one_pass = min(value for name, value in median.items() if name.startswith("read stack"))
    refresh = median["dho2 update with refresh"] - median["dho2 update"]
    metrics = dho2.metrics(always.state)
    memory = programs.memory(always.compiled)
    return {
        "num_params": num_params,
        "batch_size": BATCH_SIZE,
        "rank": RANK,
        "order": ORDER,
        "seconds": {name: _spread(values) for name, values in times.items()},
        "update": {
            "adam": median["adam"],
            "dho2": median["dho2 update"],
            "floor": 4 * one_pass,
            "ratio_to_floor_plus_adam": (median["dho2 update"] - median["adam"]) / (4 * one_pass),
            "goal": 1.3,
        },
        "refresh": {
            "seconds": refresh,
            "products": int(metrics["matvecs"]) // int(metrics["refreshes"]),
            "ratio_to_products_in_a_loop": refresh / median["products in a loop"],
            "ratio_to_separate_products": refresh / (ORDER * median["product"]),
            "goal": 1.2,
        },
        "bytes": {
            "state": programs.tree_bytes_per_device(always.state),
            "state_formula": 4 * num_params * (RANK + 2),
            "temporaries": memory.temp,
            "temporaries_formula": 4 * num_params * (ORDER + 5),  # the basis, and what a product takes
            "aliased": memory.alias,
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(results: dict[str, Any]) -> str:
    """The figures as text."""
    update, refresh, size = results["update"], results["refresh"], results["bytes"]
    ms = 1e3
    mib = 2**20
    return "\n".join(
        [
            f"{results['num_params']} parameters, batch {results['batch_size']}, rank {results['rank']}",
            f"update: adam {update['adam'] * ms:.2f} ms, dho2 on adam {update['dho2'] * ms:.2f} ms, "
            f"four passes {update['floor'] * ms:.2f} ms",
            f"  (dho2 - adam) / four passes = {update['ratio_to_floor_plus_adam']:.2f} (goal {update['goal']})",
            f"refresh: {refresh['seconds'] * ms:.1f} ms for {refresh['products']} products",
            f"  / products in one loop  = {refresh['ratio_to_products_in_a_loop']:.2f} (goal {refresh['goal']})",
            f"  / products called apart = {refresh['ratio_to_separate_products']:.2f}",
            f"state {size['state'] / mib:.1f} MiB (formula {size['state_formula'] / mib:.1f}), "
            f"temporaries {size['temporaries'] / mib:.1f} MiB (formula {size['temporaries_formula'] / mib:.1f})",
        ]
    )


def main() -> None:
    """Runs the benchmark and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    arguments = parser.parse_args()
    machine.keep_memory("benchmarks.overhead")
    results = {**machine.describe(sys.argv), **measure(arguments.repeats)}
    print(report(results))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
