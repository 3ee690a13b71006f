"""Runs of one method on one task, and the time of its steps.

Step times are not taken from training runs: those may share the machine, two at a time. `time_steps` measures several
methods alone, in one process; the time to a target is the steps to it times the seconds per step.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.target.interface import Method, Setting, Trainer
from benchmarks.target.tasks import Target
from dho2_optax import programs

POINTS = 20  # of a loss curve, besides the start
DIVERGED = 10.0  # times the initial loss
_EVALUATION_CHUNK = 1000
_NUM_TIMING_BATCHES = 8


def batches(task: Target, batch_size: int, seed: int) -> Iterator[Any]:
    """Shuffled batches for ever; the remainder of an epoch is dropped."""
    if batch_size > task.num_train:
        raise ValueError(f"batches of {batch_size} samples, but task {task.name} has {task.num_train}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(task.num_train)
        for start in range(0, task.num_train - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield jax.tree.map(lambda x, rows=rows: jnp.asarray(x[rows]), task.train)


class Program:
    """A method on a task: its `Trainer`, compiled, once for all rates, lengths and seeds if it can be."""

    def __init__(self, task: Target, method: Method, batch_size: int) -> None:
        self.task, self.method, self.batch_size = task, method, batch_size

        @functools.cache
        def own(rate: float, num_steps: int) -> Trainer:
            return method.build(Setting(task, batch_size, rate, num_steps))

        def trainer(rate: Any, num_steps: Any) -> Trainer:
            return method.build(Setting(task, batch_size, rate, num_steps))

        def init(rate: Any, num_steps: Any, params: Any, batch: Any) -> Any:
            return trainer(rate, num_steps).init(params, batch)

        def step(rate: Any, num_steps: Any, carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            return trainer(rate, num_steps).step(carry, batch)

        self._own = own if method.compiled == "by itself" else None
        static = (0, 1) if method.compiled == "for each rate" else ()
        self._init = jax.jit(init, static_argnums=static)
        self._step = jax.jit(step, static_argnums=static, donate_argnums=2)

    def start(self, rate: float, num_steps: int, seed: int, batch: Any) -> tuple[Any, Callable[[Any, Any], Any], Any]:
        """Returns the first carry, a step ``(carry, batch) -> (carry, loss)`` that donates it, and the trainer."""
        params = jax.jit(self.task.init)(jax.random.key(seed))
        if self._own is not None:
            trainer = self._own(rate, num_steps)
            return trainer.init(params, batch), trainer.step, trainer
        trainer = self.method.build(Setting(self.task, self.batch_size, rate, num_steps))
        # Copies, since a buffer that is twice in the carry cannot be donated.
        carry = jax.tree.map(jnp.copy, self._init(rate, num_steps, params, batch))
        return carry, functools.partial(self._step, rate, num_steps), trainer

    def memory(self, rate: float, num_steps: int, carry: Any, batch: Any) -> int | None:
        """Bytes that a compiled step holds at once: its carry and batch, and temporaries; None if it is not ours."""
        if self._own is not None:
            return None
        return programs.memory(self._step.lower(rate, num_steps, carry, batch).compile()).total


class Evaluation:
    """Losses of a task on its fixed samples."""

    def __init__(self, task: Target) -> None:
        self._test = task.test
        self._fixed = jax.tree.map(lambda x: x[: task.num_eval], task.train)
        self._loss = jax.jit(task.loss_fn)
        self._test_loss = jax.jit(task.test_loss_fn or task.loss_fn)
        self._accuracy = None if task.accuracy is None else jax.jit(task.accuracy)

    def train_loss(self, params: Any) -> float:
        """The loss on the fixed training samples."""
        return _mean(self._loss, params, self._fixed)

    def test(self, params: Any) -> tuple[float, float | None]:
        """Loss and accuracy on the test samples."""
        accuracy = None if self._accuracy is None else _mean(self._accuracy, params, self._test)
        return _mean(self._test_loss, params, self._test), accuracy


def _mean(function: Callable[[Any, Any], jax.Array], params: Any, samples: Any) -> float:
    """The mean over samples, in chunks; a loop of Python, since XLA on CPU is slow at convolutions in its own loops."""
    num_samples = len(jax.tree.leaves(samples)[0])
    values, sizes = [], []
    for start in range(0, num_samples, _EVALUATION_CHUNK):
        chunk = jax.tree.map(lambda x, start=start: x[start : start + _EVALUATION_CHUNK], samples)
        sizes.append(len(jax.tree.leaves(chunk)[0]))
        values.append(function(params, chunk))
    return float(np.average([float(value) for value in values], weights=sizes))


def evaluation_steps(num_steps: int) -> list[int]:
    """The numbers of steps after which the training loss is measured: 0, and every twentieth of the run."""
    return sorted({round(i * num_steps / POINTS) for i in range(POINTS + 1)})


def run(program: Program, evaluation: Evaluation, rate: float, num_steps: int, seed: int) -> dict[str, Any]:
    """Trains once.

    Args:
      program: what is trained, how.
      evaluation: of the same task.
      rate: the tuned number of the method.
      num_steps: how many steps.
      seed: for the parameters and the order of the samples.

    Returns:
      "status" ("ok", or "diverged" if a measured loss was not finite or more than ten times the initial one), the
      curve of the training loss as "steps" and "losses", and beside it "errors", the relative errors in the L2 norm, of
      a task whose solution is known, "final_loss", "test_loss", "test_accuracy" (None where the run diverged) and
      "products", the number of curvature products.
    """
    source = batches(program.task, program.batch_size, seed)
    batch = next(source)
    carry, step, trainer = program.start(rate, num_steps, seed, batch)
    points = evaluation_steps(num_steps)
    result: dict[str, Any] = {"status": "ok", "steps": [], "losses": []}
    for count in range(num_steps + 1):
        if count in points:
            loss = evaluation.train_loss(trainer.params(carry))
            if not math.isfinite(loss) or loss > DIVERGED * (result["losses"] or [loss])[0]:
                result["status"] = "diverged"
                break
            result["steps"].append(count)
            result["losses"].append(_rounded(loss))
            if program.task.error is not None:
                result.setdefault("errors", []).append(_rounded(evaluation.test(trainer.params(carry))[0]))
        if count < num_steps:
            carry, _ = step(carry, batch)
            batch = next(source)
    result |= {"final_loss": None, "test_loss": None, "test_accuracy": None}
    if result["status"] == "ok":
        test_loss, accuracy = evaluation.test(trainer.params(carry))
        result["final_loss"] = result["losses"][-1]
        result["test_loss"] = _rounded(test_loss) if math.isfinite(test_loss) else None
        result["test_accuracy"] = None if accuracy is None else _rounded(accuracy)
    result["products"] = int(trainer.products(carry))
    return result


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def time_steps(
    programs: Mapping[str, tuple[Program, float]], *, chunk: int = 100, repeats: int = 5, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Measures the seconds per step of several methods on one task, in turns, so that all see the same machine.

    Each method makes one training run of ``(repeats + 1) * chunk`` steps in chunks. The first is not counted, unless
    the method takes longer in some parts of a run than in others (`Method.steady`). Batches are placed on the device
    before, and go round.

    Args:
      programs: by name, a program and its rate.
      chunk: steps in a chunk; a multiple of every refresh interval, so that all chunks cost the same.
      repeats: chunks that count.
      seed: of parameters and batches.

    Returns:
      By name "seconds_per_step", the median over chunks of a chunk's mean (the mean over all, for a method that is not
      steady), "chunks", those means, "products_per_step",
      "bytes" (`Program.memory`), and "first_step_seconds", which is compilation nearly all.
    """
    first, _ = next(iter(programs.values()))
    source = batches(first.task, first.batch_size, seed)
    fixed = jax.block_until_ready([next(source) for _ in range(_NUM_TIMING_BATCHES)])
    steady = {name: program.method.steady for name, (program, _) in programs.items()}
    runs: dict[str, Any] = {}
    for name, (program, rate) in programs.items():
        begin = time.perf_counter()
        carry, step, trainer = program.start(rate, (repeats + 1) * chunk, seed, fixed[0])
        carry, _ = jax.block_until_ready(step(carry, fixed[0]))
        seconds = time.perf_counter() - begin
        memory = program.memory(rate, (repeats + 1) * chunk, carry, fixed[0])
        runs[name] = [carry, step, trainer, {"first_step_seconds": seconds, "bytes": memory, "chunks": []}]
    for repeat in range(repeats + 1):
        for name, entry in runs.items():
            carry, step, trainer, result = entry
            before = int(trainer.products(carry))
            begin = time.perf_counter()
            for batch in itertools.islice(itertools.cycle(fixed), chunk):
                carry, _ = step(carry, batch)
            jax.block_until_ready(carry)
            seconds = (time.perf_counter() - begin) / chunk
            entry[0] = carry
            if repeat or not steady[name]:
                result["chunks"].append(seconds)
                result["products_per_step"] = (int(trainer.products(carry)) - before) / chunk
    return {
        name: {
            "seconds_per_step": (statistics.median if steady[name] else statistics.fmean)(result["chunks"]),
            **result,
        }
        for name, (_, _, _, result) in runs.items()
    }
