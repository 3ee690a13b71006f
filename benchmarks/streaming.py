"""Streaming curvature (`mr_dho2`) against the synchronous refresh (`dho2`).

    python -m benchmarks.streaming captured    # how much of the true curvature the published vectors hold
    python -m benchmarks.streaming steps       # the distribution of step times at an equal budget of products
    python -m benchmarks.streaming budgets     # the loss after a fixed number of steps and of seconds
    python -m benchmarks.streaming restarts    # what a cycle should take over from the one before

Each part prints its figures and writes ``benchmarks/results/streaming_<part>.json``. The data is Fashion-MNIST, in
`--data DIR`.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import dho2_optax as dho2
from benchmarks import machine, problems
from benchmarks.options import grouped
from benchmarks.problems import Problem
from dho2_optax import curvature, eigensolver
from dho2_optax.packing import Layout

RANK = 8
ORDER = 16
_EXACT = dho2.Eigensolver(order=ORDER, tolerance=0.0)
_PRETRAINING = 1000  # steps of `captured` before the first probe
_CAPTURED_SETTINGS = (
    ("hybrid training", 512, {"probe_interval": 4}),
    ("hybrid training, a probe every step", 2048, {"probe_interval": 1}),
    ("the base's own steps outside of the subspace", 512, {"probe_interval": 4, "base_scale_limit": 1.0}),
    ("hybrid training, the Hessian itself", 512, {"probe_interval": 4, "metric": None}),
    (
        "the base's own steps outside of the subspace, the Hessian itself",
        512,
        {"probe_interval": 4, "metric": None, "base_scale_limit": 1.0},
    ),
)
RESULTS = Path(__file__).parent / "results"


def make_step(problem: Problem, tx: Any, streaming: bool, **probe_options: Any) -> Callable[..., Any]:
    """A donated training step ``(params, state, batch) -> (params, state, loss)``, not compiled yet."""
    probing = dho2.value_grad_and_hvp(problem.loss_fn, **{"batch_size": None, **probe_options})

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        if streaming:
            loss, grads, hvp = probing(params, state, batch)
            extra = {"hvp": hvp}
        else:
            loss, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
            extra = {"batch": batch}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


# How much curvature the published eigenvectors capture.


def captured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The share of the sum of the true eight largest eigenvalues, at the time of publication."""
    return {
        "problem": "MLP 784-128-64-10 on Fashion-MNIST, Adam 1e-3 as base, trained for 1000 steps before",
        "exact": "scipy eigsh in float64 on the first 10,000 samples, at the parameters of the publication and in the "
        "metric of the published vectors",
        "rank": RANK,
        "order": ORDER,
        "goal": 0.95,
        "settings": [_captured(arguments, *setting) for setting in _CAPTURED_SETTINGS],
    }


def _captured(arguments: argparse.Namespace, name: str, batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    problem = problems.mlp(arguments.data, hidden=(128, 64), batch_size=batch_size)
    exact_batch = tuple(x[:10_000] for x in problem.data)
    rows = []
    for seed in range(arguments.seeds):
        rows += list(_captured_run(problem, exact_batch, seed, arguments.cycles, options))
        print(name, *rows[-arguments.cycles :], sep="\n", flush=True)
    names = ("streaming", "synchronous_one_cycle_old", "synchronous_fresh")
    by_seed = {
        name: [statistics.mean(row[name] for row in rows if row["seed"] == seed) for seed in range(arguments.seeds)]
        for name in names
    }
    return {
        "name": name,
        "batch_size": batch_size,
        "options": options,
        "mean": {name: statistics.mean(values) for name, values in by_seed.items()},
        "by_seed": by_seed,
        "publications": rows,
    }


def _captured_run(problem: Problem, exact_batch: Any, seed: int, num_cycles: int, options: dict[str, Any]) -> Any:
    options = grouped(rank=RANK, warmup_steps=_PRETRAINING, **options)
    tx = dho2.mr_dho2(optax.adam(1e-3), eigensolver=_EXACT, **options)
    step = make_step(problem, tx, streaming=True)
    params = problem.init(jax.random.key(seed))
    state = tx.init(params)
    operator = curvature.hessian(problem.loss_fn)

    @jax.jit
    def solve(params: Any, half: Any, batch: Any, start: Any) -> dho2.Spectrum:
        return dho2.lanczos(
            lambda v: _times(half, operator(params, _times(half, v), batch)),
            params,
            rank=RANK,
            order=ORDER,
            tolerance=0.3,
            start=start,
        )

    warm = jax.jit(lambda spectrum, noise: eigensolver.warm_start(spectrum, noise))
    noises = (
        jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(1000 + i), x.shape) / 300, params)
        for i in itertools.count()
    )

    def metric_of(state: Any) -> Any:
        """P^1/2, ones without a metric; a copy, since the step donates the state."""
        if state.factors is None:
            return jax.tree.map(jnp.ones_like, params)
        return Layout(params, None).unpack(jax.tree.map(jnp.copy, state.factors.values))

    half = metric_of(state)
    synchronous = solve(params, half, next(problems.batches(problem, seed)), next(noises))
    published = 0
    # Every fourth cycle is looked at: the reference takes minutes.
    for count, batch in enumerate(problems.batches(problem, seed)):
        params, state, _ = step(params, state, batch)
        metrics = dho2.metrics(state)
        if int(metrics["cycle_probes"]) < ORDER or int(metrics["age"]) != 1:
            continue
        published += 1
        used = metric_of(state)
        if published % 4 == 0:
            true = _exact_eigenvalues(problem, params, used, exact_batch)
            fresh = solve(params, used, batch, warm(synchronous, next(noises)))
            # The old vectors are those of a metric one cycle old: what they are worth is seen in today's.
            old = _in_another_metric(synchronous, half, used)
            yield {
                "seed": seed,
                "updates": count + 1,
                "true_eigenvalues": true.tolist(),
                "streaming": _share(problem, params, used, exact_batch, dho2.spectrum(state, params), true),
                "synchronous_one_cycle_old": _share(problem, params, used, exact_batch, old, true),
                "synchronous_fresh": _share(problem, params, used, exact_batch, fresh, true),
            }
        # The snapshot of a synchronous refresh, to be looked at when the cycle that begins here ends.
        half = used
        synchronous = solve(params, half, batch, warm(synchronous, next(noises)))
        if published == 4 * num_cycles:
            return


def _times(half: Any, vector: Any) -> Any:
    """P^1/2 x for a diagonal preconditioner."""
    return jax.tree.map(lambda s, x: s * x, half, vector)


def _in_another_metric(spectrum: dho2.Spectrum, old: Any, new: Any) -> dho2.Spectrum:
    """The directions of a spectrum in the coordinates of another diagonal metric, made orthonormal again."""
    stack = jax.tree.map(lambda v, a, b: v * (a / b), spectrum.eigenvectors, old, new)
    rows = np.concatenate([np.asarray(x, np.float64).reshape(RANK, -1) for x in jax.tree.leaves(stack)], axis=1)
    rows = np.linalg.qr(rows.T)[0].T.astype(np.float32)
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], stack))
    return spectrum._replace(eigenvectors=jax.vmap(unravel)(jnp.asarray(rows)))


def _exact_eigenvalues(problem: Problem, params: Any, half: Any, batch: Any) -> np.ndarray:
    """The eight eigenvalues of largest magnitude, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        data = tuple(jnp.asarray(x.astype(np.float64) if x.dtype == np.float32 else x) for x in batch)
        flat, unravel = ravel_pytree(wide)
        operator = curvature.hessian(problem.loss_fn, microbatch_size=1000)
        scale = jnp.asarray(ravel_pytree(half)[0], jnp.float64)
        product = jax.jit(lambda v: scale * ravel_pytree(operator(wide, unravel(scale * v), data))[0])
        matrix = scipy.sparse.linalg.LinearOperator(
            (flat.size, flat.size), lambda v: np.asarray(product(jnp.asarray(v.ravel()))), dtype=np.float64
        )
        start = np.random.default_rng(0).normal(size=flat.size)
        values = scipy.sparse.linalg.eigsh(matrix, k=RANK, which="LM", tol=1e-4, v0=start, return_eigenvectors=False)
    return np.sort(np.abs(values))[::-1]


def _share(problem: Problem, params: Any, half: Any, batch: Any, spectrum: dho2.Spectrum, true: np.ndarray) -> float:
    """The sum of the Rayleigh quotients of the vectors in use, relative to the sum of the true eigenvalues."""
    operator = curvature.hessian(problem.loss_fn, microbatch_size=1000)
    data = tuple(jnp.asarray(x) for x in batch)

    @jax.jit
    def quotient(params: Any, vector: Any) -> jax.Array:
        product = _times(half, operator(params, _times(half, vector), data))
        return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(vector), jax.tree.leaves(product), strict=True))

    rows = [jax.tree.map(lambda x, i=i: x[i], spectrum.eigenvectors) for i in range(RANK) if spectrum.mask[i]]
    return float(sum(abs(quotient(params, row)) for row in rows) / true.sum())


# What a cycle takes over from the one before.


def restarts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Captured curvature of ways to begin a cycle, on one training trajectory for all, in float64."""
    problem = problems.mlp(arguments.data, hidden=(128, 64), batch_size=512)
    exact_batch = tuple(x[:10_000] for x in problem.data)
    variants = {
        "warm start (ours)": _Cycle(keep=0, decay=0.0),
        "random start": _Cycle(keep=0, decay=0.0, warm=False),
        "thick restart": _Cycle(keep=RANK, decay=1.0),
        "thick restart, products of the past scaled by 0.8": _Cycle(keep=RANK, decay=0.8),
    }
    rows = [row for seed in range(arguments.seeds) for row in _restart_run(problem, exact_batch, seed, variants)]
    return {
        "problem": "MLP 784-128-64-10 on Fashion-MNIST, plain Adam 1e-3, batch 512, trained for 1000 steps before",
        "probe_interval": 4,
        "order": ORDER,
        "publication": "after every 16 probes; eight cycles, the last four are looked at",
        "mean": {name: statistics.mean(row[name] for row in rows) for name in variants},
        "publications": rows,
    }


class _Cycle:
    """A Lanczos process on dense rows, whose products come one by one from a moving operator."""

    def __init__(self, keep: int, decay: float, warm: bool = True) -> None:
        self._keep, self._decay, self._warm = keep, decay, warm

    def reset(self, size: int) -> None:
        """Begins at a random vector."""
        self._rng = np.random.default_rng(0)
        self._basis, self._products = np.zeros((0, size)), np.zeros((0, size))
        self._found = np.zeros((0, size))
        self.vector = self._normal(self._rng.normal(size=size))

    def _normal(self, vector: np.ndarray) -> np.ndarray:
        for _ in range(2):
            vector = vector - self._basis.T @ (self._basis @ vector)
        return vector / np.linalg.norm(vector)

    def take(self, product: np.ndarray) -> np.ndarray | None:
        """Takes a product in; the eigenvectors once the basis is full."""
        self._basis = np.vstack([self._basis, self.vector])
        self._products = np.vstack([self._products, product])
        if len(self._basis) < ORDER:
            self.vector = self._normal(product)
            return None
        projected = self._basis @ self._products.T
        values, coefficients = np.linalg.eigh((projected + projected.T) / 2)
        best = coefficients[:, np.argsort(-np.abs(values))[:RANK]].T
        self._found, products = best @ self._basis, best @ self._products
        self._basis, self._products = np.zeros((0, product.size)), np.zeros((0, product.size))
        if self._keep:
            self._basis, self._products = self._found, self._decay * products
            self.vector = self._normal(product)
        else:
            noise = self._rng.normal(size=product.size)
            start = 0.1 * noise / np.linalg.norm(noise)
            if self._warm:
                start = start + self._found.sum(axis=0) / np.sqrt(RANK)
            self.vector = self._normal(start)
        return self._found


def _restart_run(problem: Problem, exact_batch: Any, seed: int, variants: dict[str, _Cycle]) -> Any:
    tx = optax.with_extra_args_support(optax.adam(1e-3))
    step = make_step(problem, tx, streaming=False)
    params = problem.init(jax.random.key(seed))
    flat, unravel = ravel_pytree(params)
    state = tx.init(params)
    operator = curvature.hessian(problem.loss_fn)
    product = jax.jit(lambda params, v, batch: ravel_pytree(operator(params, unravel(v), batch))[0])
    for cycle in variants.values():
        cycle.reset(flat.size)
    latest: dict[str, np.ndarray] = {}
    probes = 0
    for count, batch in enumerate(problems.batches(problem, seed)):
        if count >= _PRETRAINING and count % 4 == 0:
            for name, cycle in variants.items():
                found = cycle.take(np.asarray(product(params, jnp.asarray(cycle.vector, jnp.float32), batch)))
                if found is not None:
                    latest[name] = found
            probes += 1
            if probes % ORDER == 0 and probes // ORDER > 4:
                euclidean = jax.tree.map(jnp.ones_like, params)
                true = _exact_eigenvalues(problem, params, euclidean, exact_batch)
                row: dict[str, Any] = {"seed": seed, "updates": count}
                for name, vectors in latest.items():
                    spectrum = dho2.Spectrum(
                        jnp.zeros(RANK),
                        jax.tree.map(lambda *x: jnp.stack(x), *(unravel(jnp.asarray(v, jnp.float32)) for v in vectors)),
                        jnp.zeros(RANK),
                        jnp.ones(RANK, bool),
                    )
                    row[name] = _share(problem, params, euclidean, exact_batch, spectrum, true)
                print(row, flush=True)
                yield row
            if probes // ORDER == 8:
                return
        params, state, _ = step(params, state, batch)


# Step times.


def step_times(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall-clock seconds of every step, after warm-up.

    All variants go through the same steps again and again, in turns; the time of a step is its median over the
    repetitions, so that what else the machine does stays out of the distribution.
    """
    problem = problems.mlp(arguments.data, hidden=(1024, 256), batch_size=256)
    base = functools.partial(optax.adam, 1e-3)
    common: dict[str, Any] = {"rank": RANK, "eigensolver": _EXACT}
    whole: dict[str, Any] = {"batch_size": None, **common}
    variants = {
        "plain Adam": (optax.with_extra_args_support(base()), False, {}),
        "synchronous, a product every 4 steps": (
            dho2.dho2(base(), problem.loss_fn, refresh_interval=64, warmup_steps=1, **whole),
            False,
            {},
        ),
        "streaming, probe_interval=4": (dho2.mr_dho2(base(), probe_interval=4, **common), True, {}),
        "synchronous, a product every step": (
            dho2.dho2(base(), problem.loss_fn, refresh_interval=17, warmup_steps=1, **whole),
            False,
            {},
        ),
        "streaming, probe_interval=1": (dho2.mr_dho2(base(), probe_interval=1, **common), True, {}),
        "streaming, probe_interval=1, a quarter of the batch": (
            dho2.mr_dho2(base(), probe_interval=1, **common),
            True,
            {"batch_size": problem.batch_size // 4},
        ),
    }
    runs = {name: _Run(problem, *variant) for name, variant in variants.items()}
    num_steps = 256
    for _ in range(arguments.repeats):
        for run in runs.values():
            run.repeat(num_steps)
    rows = {name: run.summary() for name, run in runs.items()}
    return {
        "problem": "MLP 784-1024-256-10 on Fashion-MNIST, batch 256, base Adam",
        "rank": RANK,
        "order": ORDER,
        "steps": num_steps,
        "repetitions": arguments.repeats,
        "goals": {"probe_interval=4 p99/median": 2.6, "probe_interval=1 p99/median": 1.3, "max/median": 3.0},
        "variants": rows,
        "probe": _probe_cost(problem, arguments.repeats),
    }


class _Run:
    """A training run that is repeated, after its first steps."""

    _WARM_UP = 128

    def __init__(self, problem: Problem, tx: Any, streaming: bool, probe_options: dict[str, Any]) -> None:
        self._params = problem.init(jax.random.key(0))
        self._state = jax.tree.map(jnp.copy, tx.init(self._params))
        self._batches = problems.batches(problem, 0)
        step = make_step(problem, tx, streaming, **probe_options)
        self._step = step.lower(self._params, self._state, next(self._batches)).compile()
        self._hybrid = isinstance(self._state, dho2.DHO2State)
        self._repetitions: list[list[float]] = []
        for _ in range(self._WARM_UP):
            self._params, self._state, _ = self._step(self._params, self._state, next(self._batches))
        self._data = [next(self._batches) for _ in range(64)]

    def repeat(self, num_steps: int) -> None:
        """Makes the steps after the first ones, waiting for every step; each time the same."""
        params, state = jax.block_until_ready(jax.tree.map(jnp.copy, (self._params, self._state)))
        before = self._products(state)
        seconds = []
        for batch in itertools.islice(itertools.cycle(self._data), num_steps):
            start = time.perf_counter()
            params, state, _ = jax.block_until_ready(self._step(params, state, batch))
            seconds.append(time.perf_counter() - start)
        self._repetitions.append(seconds)
        self._products_per_step = (self._products(state) - before) / num_steps

    def _products(self, state: Any) -> int:
        return int(dho2.metrics(state)["matvecs"]) if self._hybrid else 0

    def summary(self) -> dict[str, float]:
        """Figures in seconds and their ratios."""
        seconds = np.median(np.asarray(self._repetitions), axis=0)
        median = float(np.median(seconds))
        return {
            "mean": float(seconds.mean()),
            "median": median,
            "p90": float(np.quantile(seconds, 0.9)),
            "p99": float(np.quantile(seconds, 0.99)),
            "max": float(seconds.max()),
            "p99/median": float(np.quantile(seconds, 0.99)) / median,
            "max/median": float(seconds.max()) / median,
            "products_per_step": self._products_per_step,
        }


def _probe_cost(problem: Problem, repeats: int) -> dict[str, float]:
    """Loss, gradient and probe in one linearisation, against loss and gradient alone."""
    # Without a metric the first update takes a probe.
    tx = dho2.mr_dho2(optax.adam(1e-3), rank=RANK, probe_interval=1, metric=None)
    params = problem.init(jax.random.key(0))
    state = tx.init(params)
    batch = next(problems.batches(problem, 0))
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    probe = jax.jit(dho2.value_grad_and_hvp(problem.loss_fn, batch_size=None))
    functions = {"gradient": lambda: gradient(params, batch), "probe": lambda: probe(params, state, batch)}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(10 * repeats):
        for name, function in functions.items():
            jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {**median, "ratio": median["probe"] / median["gradient"], "goal": 2.5}


# Loss after a fixed budget.


def budgets(arguments: argparse.Namespace) -> dict[str, Any]:
    """The training loss after a number of steps, and after the seconds in which the faster of two has made them."""
    return {
        "num_steps": arguments.steps,
        "seeds": arguments.seeds,
        "schedule": "5% linear warm-up, cosine to zero",
        "tasks": {
            name: _budget(make(arguments.data), arguments)
            for name, make in {"autoencoder": problems.autoencoder, "mlp": problems.mlp}.items()
        },
    }


def _budget(problem: Problem, arguments: argparse.Namespace) -> dict[str, Any]:
    def optimizer(name: str, rate: float) -> tuple[Any, bool]:
        warmup = max(arguments.steps // 20, 1)
        schedule = optax.warmup_cosine_decay_schedule(rate / warmup, rate, warmup, arguments.steps)
        base = optax.adam(schedule)
        if name == "synchronous":
            return dho2.dho2(
                base, problem.loss_fn, rank=RANK, refresh_interval=64, batch_size=None, eigensolver=_EXACT
            ), False
        return dho2.mr_dho2(base, rank=RANK, probe_interval=4, eigensolver=_EXACT), True

    grid: dict[str, dict[float, float]] = {"synchronous": {}, "streaming": {}}
    for name, losses in grid.items():
        for rate in problem.learning_rates:
            losses[rate] = _train(problem, *optimizer(name, rate), arguments.steps, seed=100)["loss"]
        print(name, losses, flush=True)
    best = {name: min(losses, key=lambda rate: losses[rate]) for name, losses in grid.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in grid}
    for seed in range(arguments.seeds):
        for name, rate in best.items():
            runs[name].append(_train(problem, *optimizer(name, rate), arguments.steps, seed))
            print(name, seed, runs[name][-1]["loss"], runs[name][-1]["seconds"], flush=True)
    pairs = list(zip(runs["streaming"], runs["synchronous"], strict=True))
    return {
        "grid_of_learning_rates": {name: {str(r): v for r, v in losses.items()} for name, losses in grid.items()},
        "learning_rate": best,
        "loss": {name: [run["loss"] for run in found] for name, found in runs.items()},
        "seconds": {name: [run["seconds"] for run in found] for name, found in runs.items()},
        "streaming_over_synchronous_at_equal_steps": statistics.mean(a["loss"] / b["loss"] for a, b in pairs),
        "streaming_over_synchronous_at_equal_seconds": statistics.mean(_at_equal_seconds(a, b) for a, b in pairs),
        "goal": 1.01,
    }


def _train(problem: Problem, tx: Any, streaming: bool, num_steps: int, seed: int) -> dict[str, Any]:
    """The loss on fixed 10,000 samples every 20 steps, and the seconds of the steps up to then."""
    params = problem.init(jax.random.key(seed))
    state = jax.tree.map(jnp.copy, tx.init(params))
    source = problems.batches(problem, seed)
    step = make_step(problem, tx, streaming).lower(params, state, next(source)).compile()
    evaluate = jax.jit(problem.loss_fn)
    fixed = tuple(jnp.asarray(x[:10_000]) for x in problem.data)
    seconds, curve = 0.0, []
    for count in range(1, num_steps + 1):
        batch = jax.block_until_ready(next(source))
        start = time.perf_counter()
        params, state, _ = jax.block_until_ready(step(params, state, batch))
        seconds += time.perf_counter() - start
        if count % 20 == 0 or count == num_steps:
            curve.append((seconds, float(evaluate(params, fixed))))
    return {"loss": curve[-1][1], "seconds": seconds, "curve": curve}


def _at_equal_seconds(streaming: dict[str, Any], synchronous: dict[str, Any]) -> float:
    """The ratio of the losses when the faster of the two runs ends."""
    end = min(streaming["seconds"], synchronous["seconds"])
    losses = [np.interp(end, *zip(*run["curve"], strict=True)) for run in (streaming, synchronous)]
    return float(losses[0] / losses[1])


def main() -> None:
    """Runs one part and writes its results."""
    parts = {"captured": captured, "steps": step_times, "budgets": budgets, "restarts": restarts}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--data", default=problems.FASHION_MNIST, help="folder of the four IDX files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=2, help="publications looked at in a run (captured)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of 256 steps (steps)")
    parser.add_argument("--steps", type=int, default=400, help="length of a run (budgets)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    machine.keep_memory("benchmarks.streaming")
    results = {**machine.describe(sys.argv), **parts[arguments.part](arguments)}
    out = arguments.out or RESULTS / f"streaming_{arguments.part}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(
        json.dumps({key: value for key, value in results.items() if key not in ("publications", "settings")}, indent=2)
    )


if __name__ == "__main__":
    main()
