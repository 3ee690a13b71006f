"""What hostile batches do to a hybrid, and to its base alone on the same batches.

    python -m benchmarks.hostile      # prints a table, writes benchmarks/results/hostile.json and docs/hostile.md

Three small problems are trained on batches of which some are hostile: dim or bright by a factor, with outlying targets,
without a sample, mostly padding, of one class or one sample only, hostile in one device's shard alone; before the first
refresh, at a refresh, between two, in a row, or at every refresh. The loss is measured on clean samples after every
update. A cell compares the hybrid with its base on the same batches: the worst loss of the run, and the loss at its
end. The goal is a worst loss of at most 10 times and an end of at most 3 times that of the base.

Where a batch throws the base itself away, its own figures differ by orders of magnitude from seed to seed. So cells
beyond half of a goal are measured again with `SEEDS` seeds, and are the medians of those.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import dho2_optax as dho2
from benchmarks import machine
from dho2_optax.poc import data

RESULTS = Path(__file__).parent / "results" / "hostile.json"
PAGE = Path(__file__).parent.parent / "docs" / "hostile.md"
WORST, END = 10.0, 3.0  # the goals
INTERVAL = 20  # updates between refreshes
LAST = 20  # updates that the end is averaged over
SEEDS = 101  # of a cell that is measured again


class Hostility(NamedTuple):
    """What is done to a batch; an array each, one number an update."""

    inputs: Any = 1.0  # factor of the inputs
    targets: Any = 1.0  # factor of the targets
    weights: Any = 1.0  # factor of the samples' losses
    rows: Any = 1.0  # part of the samples that is concerned, the first ones
    narrow: Any = 0.0  # 1: all samples of one class, or one sample over and over


KINDS = {
    "dim 0.1": Hostility(inputs=0.1, targets=0.1),
    "dim 0.01": Hostility(inputs=0.01, targets=0.01),
    "dim 0.001": Hostility(inputs=0.001, targets=0.001),
    "bright 10": Hostility(inputs=10.0, targets=10.0),
    "bright 100": Hostility(inputs=100.0, targets=100.0),
    "bright 1e4": Hostility(inputs=1e4, targets=1e4),
    "inputs 100": Hostility(inputs=100.0),
    "targets 100": Hostility(targets=100.0),
    "targets 1e4": Hostility(targets=1e4),
    "one target 1e4": Hostility(targets=1e4, rows=1 / 256),
    "empty": Hostility(weights=0.0),
    "padding": Hostility(weights=0.0, rows=0.95),
    "narrow": Hostility(narrow=1.0),
    "shard bright 100": Hostility(inputs=100.0, targets=100.0, rows=1 / 8),
    "shard targets 1e4": Hostility(targets=1e4, rows=1 / 8),
    "shard empty": Hostility(weights=0.0, rows=1 / 8),
    "1e30": Hostility(inputs=1e30, targets=1e30),
}

TIMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "first updates": lambda t: t < 3,
    "before": lambda t: (t == INTERVAL - 2) | (t == 2 * INTERVAL - 2),
    "first refresh": lambda t: t == INTERVAL - 1,
    "second refresh": lambda t: t == 2 * INTERVAL - 1,
    "between": lambda t: t == 3 * INTERVAL + INTERVAL // 2,
    "ten in a row": lambda t: (t >= 2 * INTERVAL + 10) & (t < 3 * INTERVAL),
    "every refresh": lambda t: (t % INTERVAL == INTERVAL - 1) & (t < 12 * INTERVAL),
}


def schedule(kind: str, time: str, num_steps: int) -> Hostility:
    """The hostility of every update of a run."""
    hostile = TIMES[time](np.arange(num_steps))
    pairs = zip(KINDS[kind], Hostility(), strict=True)
    return Hostility(*(np.where(hostile, value, normal).astype(np.float32) for value, normal in pairs))


class Problem(NamedTuple):
    """What is trained."""

    params: Any
    draw: Callable[[jax.Array, Hostility], Any]  # a batch
    loss_fn: Callable[[Any, Any], jax.Array]
    clean: Any  # the batch that the loss is measured on


def _network(sizes: tuple[int, ...], seed: int, gain: float) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(seed)
    return [
        {"kernel": jnp.float32(rng.normal(size=(a, b)) * np.sqrt(gain / a)), "bias": jnp.zeros(b)}
        for a, b in itertools.pairwise(sizes)
    ]


def _apply(params: Any, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    for layer in params[:-1]:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def _spoilt(batch: Any, hostility: Hostility) -> Any:
    x, y, weights = batch
    concerned = jnp.arange(len(x)) < hostility.rows * len(x)
    factor = lambda value: jnp.where(concerned, value, 1.0)  # noqa: E731
    x = x * factor(hostility.inputs)[:, None]
    if jnp.issubdtype(y.dtype, jnp.floating):
        y = y * factor(hostility.targets)
    else:  # classes: every one is mistaken for the next
        y = jnp.where(factor(hostility.targets) > 1, (y + 1) % 10, y)
    return x, y, weights * factor(hostility.weights)


def _regression(
    params: Any, model: Callable[[Any, jax.Array], jax.Array], truth: Callable[[jax.Array], jax.Array], scales: Any
) -> Problem:
    def sample(key: jax.Array, size: int, narrow: jax.Array) -> Any:
        first, second = jax.random.split(key)
        x = jax.random.normal(first, (size, len(scales))) * jnp.asarray(scales)
        x = jnp.where(narrow > 0, x[:1], x)
        return x, truth(x) + 0.2 * jax.random.normal(second, (size,)), jnp.ones(size)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y, weights = batch
        return jnp.mean(weights * (model(params, x) - y) ** 2)

    return Problem(
        params,
        lambda key, hostility: _spoilt(sample(key, 256, hostility.narrow), hostility),
        loss_fn,
        sample(jax.random.key(99), 1024, jnp.float32(0)),
    )


def least_squares() -> Problem:
    """Ten weights, of a condition of 100."""
    return _regression(
        {"kernel": jnp.zeros((10, 1))},
        lambda p, x: (x @ p["kernel"])[:, 0],
        lambda x: x.sum(axis=1),
        np.logspace(0, -1, 10, dtype=np.float32),
    )


def network() -> Problem:
    """A tanh network that learns another one."""
    teacher = _network((10, 16, 1), 1, 2.0)
    return _regression(
        _network((10, 32, 1), 0, 1.0),
        lambda p, x: _apply(p, x, jnp.tanh)[:, 0],
        lambda x: _apply(teacher, x, jnp.tanh)[:, 0],
        np.logspace(0, -1, 10, dtype=np.float32) + 0.3,
    )


def digits() -> Problem:
    """A ReLU network that tells handwritten digits apart."""
    found = data.load("digits")
    images = jnp.asarray(found.train_images.reshape(len(found.train_images), -1))
    labels = jnp.asarray(found.train_labels)
    zeros = jnp.flatnonzero(labels == 0)

    def draw(key: jax.Array, hostility: Hostility) -> Any:
        index = jax.random.randint(key, (256,), 0, len(images))
        index = jnp.where(hostility.narrow > 0, zeros[index % len(zeros)], index)
        return _spoilt((images[index], labels[index], jnp.ones(256)), hostility)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y, weights = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(_apply(params, x, jax.nn.relu), y)
        return jnp.mean(weights * losses)

    return Problem(_network((64, 32, 10), 0, 2.0), draw, loss_fn, (images, labels, jnp.ones(len(images))))


PROBLEMS = {"least squares": least_squares, "network": network, "digits": digits}

# The rates are good ones for the bases alone.
BASES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-3),
    "rmsprop": lambda: optax.rmsprop(3e-3),
    "muon": lambda: contrib.muon(1e-2),
    "soap": lambda: dho2.soap(1e-2),
}

Loss = Callable[[Any, Any], jax.Array]
HYBRIDS: dict[str, Callable[[optax.GradientTransformation, Loss], Any]] = {
    "dho2": lambda base, loss_fn: dho2.dho2(base, loss_fn, rank=3, refresh_interval=INTERVAL),
    "mr_dho2": lambda base, loss_fn: dho2.mr_dho2(base, loss_fn, rank=3),
}


def losses(problem: Problem, tx: Any) -> Callable[[Hostility, jax.Array], np.ndarray]:
    """A function from ``cases`` of schedules and seeds to the clean loss after every update; ``(cases, updates)``."""
    tx = optax.with_extra_args_support(tx)

    def run(case: tuple[Hostility, jax.Array]) -> jax.Array:
        hostility, seed = case

        def step(carry: Any, now: Any) -> Any:
            params, state = carry
            key, hostility = now
            batch = problem.draw(key, hostility)
            grads = jax.grad(problem.loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            params = optax.apply_updates(params, updates)
            return (params, state), problem.loss_fn(params, problem.clean)

        keys = jax.random.split(jax.random.key(seed), len(hostility.inputs))
        return jax.lax.scan(step, (problem.params, tx.init(problem.params)), (keys, hostility))[1]

    compiled = jax.jit(lambda cases: jax.lax.map(run, cases))
    return lambda schedules, seeds: np.asarray(compiled((schedules, seeds)), np.float64)


def figures(curve: np.ndarray) -> tuple[float, float]:
    """The worst loss of a run and the loss at its end; infinite where a loss is not finite."""
    clean = np.where(np.isfinite(curve), curve, np.inf)
    return float(clean.max()), float(clean[-LAST:].mean())


def compare(theirs: np.ndarray, ours: np.ndarray) -> dict[str, Any]:
    """A cell, from the curves of a base and of a hybrid with the same seeds; a base that is lost is no measure."""
    base, hybrid = (np.median([figures(curve) for curve in curves], axis=0) for curves in (theirs, ours))
    worst, end = (1.0 if np.isinf(b) else float(h / b) for h, b in zip(hybrid, base, strict=True))
    return {"base": base.tolist(), "hybrid": hybrid.tolist(), "worst": worst, "end": end, "seeds": len(ours)}


def is_beyond(cell: dict[str, Any], part: float = 1.0) -> bool:
    """Whether a cell misses the goals, or this part of them."""
    return cell["worst"] > part * WORST or cell["end"] > part * END


def measure(arguments: argparse.Namespace, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for every problem, base and hybrid."""
    cases = [(kind, time) for kind in arguments.kinds for time in arguments.times]

    def stack(cases: list[tuple[str, str]], seeds: int) -> tuple[Hostility, jax.Array]:
        """Every case with every seed; at least one, so that shapes are no special case."""
        schedules = [schedule(*case, arguments.steps) for case in cases for _ in range(seeds)]
        return Hostility(*(np.stack(x) for x in zip(*schedules, strict=True))), jnp.tile(jnp.arange(seeds), len(cases))

    rows = []
    for name in arguments.problems:
        problem = PROBLEMS[name]()
        for base in arguments.bases:
            base_losses = losses(problem, BASES[base]())
            once = stack(cases, 1)
            alone = base_losses(*once)
            for hybrid in arguments.hybrids:
                hybrid_losses = losses(problem, HYBRIDS[hybrid](BASES[base](), problem.loss_fn))
                found = hybrid_losses(*once)
                cells = {case: compare(alone[[i]], found[[i]]) for i, case in enumerate(cases)}
                again = [case for case in cases if is_beyond(cells[case], 0.5)]
                if again:
                    many = stack(again, SEEDS)
                    pairs = (f(*many).reshape(len(again), SEEDS, -1) for f in (base_losses, hybrid_losses))
                    cells |= {case: compare(*curves) for case, *curves in zip(again, *pairs, strict=True)}
                named = {f"{kind}, {time}": cell for (kind, time), cell in cells.items()}
                rows.append({"problem": name, "base": base, "hybrid": hybrid, "cells": named})
                log(summary(rows[-1]))
    return rows


HEAD = """| problem | base | hybrid | largest ratio of worst losses | largest ratio of ends | cells beyond the goals |
|---|---|---|---|---|---|"""


def summary(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = row["cells"]

    def largest(name: str) -> str:
        which = max(cells, key=lambda cell: cells[cell][name])
        place = ("worst", "end").index(name)
        ours, base = (cells[which][who][place] for who in ("hybrid", "base"))
        return f"{cells[which][name]:.3g}: {ours:.3g}, base {base:.3g} ({which})"

    beyond = sum(map(is_beyond, cells.values()))
    names = f"| {row['problem']} | {row['base']} | {row['hybrid']} "
    return f"{names}| {largest('worst')} | {largest('end')} | {beyond} of {len(cells)} |"


def write(result: dict[str, Any], results: Path, page: Path) -> None:
    """Writes the results, a line a cell, and the page about them."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(part) for name, part in value.items()}
        if isinstance(value, list):
            return [rounded(part) for part in value]
        if not isinstance(value, float):
            return value
        return float(f"{value:.4g}") if np.isfinite(value) else None  # JSON has no infinity

    head = json.dumps({**result, "rows": []}, indent=1).removesuffix("[]\n}")
    rows = []
    for row in result["rows"]:
        cells = ",\n".join(f"   {json.dumps(name)}: {json.dumps(rounded(cell))}" for name, cell in row["cells"].items())
        names = json.dumps({name: value for name, value in row.items() if name != "cells"}).removesuffix("}")
        rows.append(f'  {names}, "cells": {{\n{cells}\n  }}}}')
    results.write_text(head + "[\n" + ",\n".join(rows) + "\n ]\n}\n")
    cells = [cell for row in result["rows"] for cell in row["cells"].values()]
    page.write_text(
        f"""# Hostile batches

Written by `python -m benchmarks.hostile`; do not edit. All {len(cells)} cells, with the figures of the base beside
those of the hybrid, are in [`benchmarks/results/hostile.json`](../benchmarks/results/hostile.json).

Three small problems are trained for 400 updates on batches of which some are hostile: dim or bright by a factor, with
outlying targets, without a sample, mostly padding, of one class or one sample only, hostile in one device's shard
alone, or of numbers near the end of float32; in the first updates, before a refresh, at the first, the second or at
every refresh, between two, and ten in a row. The loss is measured on clean samples. The goals are a worst loss of at
most {WORST:g} times, and an end of at most {END:g} times, that of the base alone on the same batches.
{sum(map(is_beyond, cells))} of {len(cells)} cells are beyond them.

Where a batch throws the base itself away, its own figures differ by orders of magnitude from seed to seed. So cells
that are beyond half of a goal with one seed are measured again with {SEEDS}, base and hybrid, and are the medians of
those: {sum(cell["seeds"] > 1 for cell in cells)} cells. A base that is lost (infinite) counts as no worse and no
better.

{HEAD}
"""
        + "\n".join(map(summary, result["rows"]))
        + "\n"
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="What hostile batches do to hybrids and their bases.")
    choose = functools.partial(parser.add_argument, nargs="+")
    choose("--problems", choices=PROBLEMS, default=list(PROBLEMS))
    choose("--bases", choices=BASES, default=list(BASES))
    choose("--hybrids", choices=HYBRIDS, default=list(HYBRIDS))
    choose("--kinds", choices=KINDS, default=list(KINDS))
    choose("--times", choices=TIMES, default=list(TIMES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    print(HEAD)
    rows = measure(arguments, lambda line: print(line, flush=True))
    result = {**machine.describe(sys.argv), "goals": {"worst": WORST, "end": END}, "rows": rows}
    write(result, arguments.out, arguments.page)


if __name__ == "__main__":
    main()
