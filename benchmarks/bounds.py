"""What each rule that bounds a hybrid by its base is worth: in healthy training, and on hostile batches.

    python -m benchmarks.bounds              # prints a table, writes benchmarks/results/bounds.json
    python -m benchmarks.bounds --print      # prints the table of results that are there

`dho2` is trained as it is, and with one of the rules of :class:`dho2_optax.subspace.Bounds` changed or left out, on
tasks of `benchmarks.target` at the learning rate that is best for Adam alone there, and on two of the problems of
`benchmarks.hostile`. Of the former the final losses count, of the latter how many cells are beyond the goals.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import hostile, machine
from benchmarks.target import tasks, training
from benchmarks.target.methods import METHODS
from dho2_optax import refresh, subspace
from dho2_optax.subspace import Bounds

RESULTS = Path(__file__).parent / "results" / "bounds.json"


class Healthy(NamedTuple):
    """A training run that no batch disturbs."""

    task: str
    method: str  # of `benchmarks.target`
    batch_size: int
    rate: float  # the best one of Adam alone, from benchmarks/results/target
    num_steps: int


HEALTHY = {
    "convection": Healthy("convection", "dho2_adam_interval50", 1024, 0.04, 1000),
    "Poisson": Healthy("poisson", "dho2_adam_interval50", 1024, 0.04, 1000),
    "Burgers": Healthy("burgers", "dho2_adam_interval50", 1024, 0.08, 1000),
    "autoencoder": Healthy("autoencoder", "dho2_adam", 1000, 0.016, 400),
    "MLP": Healthy("mlp", "dho2_adam", 2000, 0.02, 400),
}
HOSTILE = {"problems": ["least squares", "network"], "bases": ["momentum", "adam"], "hybrids": ["dho2"]}

_after, _install = Bounds.after, refresh.install


def _braked(factor: float) -> Callable[[Bounds, jax.Array], Bounds]:
    """A brake that begins where gradients are `factor` times longer than usual."""

    def after(bounds: Bounds, length: jax.Array) -> Bounds:
        new = _after(bounds, length)
        return new._replace(brake=jnp.minimum(1, factor * new.brake))

    return after


def _slowly_falling(state: Any, new: Any, *arguments: Any, **options: Any) -> Any:
    """Eigenvalues fall by half at most from one refresh to the next, by their order."""
    old, found = state.spectrum.eigenvalues, new.eigenvalues
    least = jnp.where(state.spectrum.mask, jnp.abs(old) / 2, 0)
    eigenvalues = jnp.where(jnp.abs(found) < least, jnp.copysign(least, found), found)
    return _install(state, new._replace(eigenvalues=eigenvalues), *arguments, **options)


def _always(bounds: Bounds) -> jax.Array:
    return jnp.full_like(bounds.usual, True, dtype=bool)


def _no_least(tolerable: jax.Array, *_: Any) -> jax.Array:
    return jnp.zeros_like(tolerable)


Patch = tuple[Any, str, Any]  # of an object, the attribute, and what it is for the time being
_NO_OUTLIERS: list[Patch] = [(Bounds, "trust", _always), (Bounds, "is_usual", _always)]
_NO_BRAKE: list[Patch] = [(Bounds, "after", _braked(math.inf))]
_NO_LEAST: list[Patch] = [(subspace, "least_eigenvalue", _no_least)]
_NONE = _NO_BRAKE + _NO_OUTLIERS + _NO_LEAST
RULES: dict[str, list[Patch]] = {
    "as it is": [],
    "no brake": _NO_BRAKE,
    "brake from 1.25 times the usual length on": [(Bounds, "after", _braked(1.25))],
    "brake from 1.5 times on": [(Bounds, "after", _braked(1.5))],
    "outliers as other gradients": _NO_OUTLIERS,
    "no least eigenvalue": _NO_LEAST,
    "none of the three": _NONE,
    "eigenvalues fall by half at most, in place of the three": [*_NONE, (refresh, "install", _slowly_falling)],
}


@contextlib.contextmanager
def rule(name: str) -> Iterator[None]:
    """A rule of `RULES` in force, for what is traced meanwhile."""
    with contextlib.ExitStack() as stack:
        for patch in RULES[name]:
            stack.enter_context(mock.patch.object(*patch))
        jax.clear_caches()
        yield
    jax.clear_caches()


def final_losses(run: Healthy, seeds: int) -> list[float | None]:
    """The final loss of every seed; None where training diverged."""
    task = tasks.build(run.task, tasks.Sources())
    program = training.Program(task, METHODS[run.method], run.batch_size)
    evaluation = training.Evaluation(task)
    runs = (training.run(program, evaluation, run.rate, run.num_steps, seed) for seed in range(seeds))
    return [result["final_loss"] for result in runs]


def cells_beyond(kinds: list[str], num_steps: int) -> tuple[int, int]:
    """How many hostile cells are beyond the goals, and of how many."""
    options = argparse.Namespace(**HOSTILE, kinds=kinds, times=list(hostile.TIMES), steps=num_steps)
    cells = [cell for row in hostile.measure(options, lambda line: None) for cell in row["cells"].values()]
    return sum(map(hostile.is_beyond, cells)), len(cells)


def table(results: dict[str, Any]) -> str:
    """Median and worst final losses, and hostile cells, as Markdown."""
    head = ["rule", *results["healthy"], "hostile cells beyond"]
    lines = [head, ["---"] * len(head)]
    for name, row in results["rows"].items():
        losses = [_cell(row["final_losses"][task]) for task in results["healthy"]]
        lines.append([name, *losses, f"{row['beyond']} of {row['cells']}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(losses: list[float | None]) -> str:
    values = [math.inf if loss is None else loss for loss in losses]
    return f"{statistics.median(values):.3g} ({max(values):.3g})"


def main() -> None:
    """Measures, and writes the results after every rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--healthy", nargs="+", choices=HEALTHY, default=list(HEALTHY))
    parser.add_argument("--kinds", nargs="+", choices=hostile.KINDS, default=list(hostile.KINDS), metavar="KIND")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="of the hostile runs")
    arguments = machine.parse(parser, RESULTS, table)
    if arguments is None:
        return
    results: dict[str, Any] = {
        **machine.describe(sys.argv),
        "healthy": {name: HEALTHY[name]._asdict() for name in arguments.healthy},
        "hostile": HOSTILE,
        "rows": {},
    }
    for name in arguments.rules:
        with rule(name):
            losses = {task: final_losses(HEALTHY[task], arguments.seeds) for task in arguments.healthy}
            beyond, cells = cells_beyond(arguments.kinds, arguments.steps)
        results["rows"][name] = {"final_losses": losses, "beyond": beyond, "cells": cells}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results["rows"][name], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
