"""Tunes methods on a task, trains with what was best, and times the steps. Stops anywhere and goes on from there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.target import training
from benchmarks.target.interface import Method
from benchmarks.target.store import TUNING_SEED, Store, best_rate, loss_of, tuning_runs
from benchmarks.target.tasks import Target

GRID_POINTS = 5
MAX_WIDENINGS = 4
FRACTIONS = (1 / 3, 1 / 2, 2 / 3)  # of the full length, for shortened schedules


def tune(
    loss_at: Callable[[float], float], centre: float, limits: tuple[float, float] = (0.0, float("inf"))
) -> dict[float, float]:
    """Tries a grid of five values, each twice the one before, around a centre.

    While the best is at an edge, the grid gets one more value beyond it, up to four times.

    Args:
      loss_at: value -> loss, infinite where training diverged.
      centre: of the grid.
      limits: smallest and largest value to try.

    Returns:
      The losses of all values tried.
    """
    exponents = range(-(GRID_POINTS // 2), GRID_POINTS // 2 + 1)
    grid = [centre * 2.0**i for i in exponents if limits[0] <= centre * 2.0**i <= limits[1]]
    losses = {value: loss_at(value) for value in grid}
    for _ in range(MAX_WIDENINGS):
        best = best_rate(losses)
        beyond = {min(losses): best / 2, max(losses): best * 2}.get(best)
        if beyond is None or not limits[0] <= beyond <= limits[1]:
            break
        losses[beyond] = loss_at(beyond)
    return losses


class Study:
    """One task and batch size.

    Methods that are not made for the task or the batch size (`Method.unfit`) are left out, which is logged.

    Args:
      task: what is trained.
      methods: by which methods.
      batch_size: samples in a batch.
      num_steps: full length of a run.
      store: keeps the results.
      seeds: how many runs at the best rate, with seeds from 0.
      shortened: the kinds of methods that are also trained with shortened schedules.
      log: takes lines about what happens.

    Raises:
      ValueError: if all methods are left out.
    """

    def __init__(
        self,
        task: Target,
        methods: Mapping[str, Method],
        batch_size: int,
        num_steps: int,
        store: Store,
        *,
        seeds: int = 3,
        shortened: Sequence[str] = ("hybrid",),
        log: Callable[[str], Any] = print,
    ) -> None:
        self._task, self._batch_size, self._num_steps = task, batch_size, num_steps
        self._store, self._seeds, self._shortened, self._log = store, seeds, shortened, log
        self._evaluation = training.Evaluation(task)
        reasons = {name: method.unfit(task, batch_size) for name, method in methods.items()}
        self._methods = {name: method for name, method in methods.items() if reasons[name] is None}
        for name, reason in reasons.items():
            if reason is not None:
                log(f"{name} is left out: {reason}")
        if not self._methods:
            raise ValueError(f"no method is left for {task.name} at batch size {batch_size}")

    def tune(self, names: Sequence[str] | None = None) -> None:
        """Tries the grid of each method, with a seed that is used for nothing else."""
        for name in names or self._methods:
            program = self._program(name)
            self._tune(name, program)

    def final(self, names: Sequence[str] | None = None) -> None:
        """Trains each method at its best rate, which is tuned if it is not yet."""
        for name in names or self._methods:
            program = self._program(name)
            rate = self._tune(name, program)
            lengths = [self._num_steps]
            if self._methods[name].kind in self._shortened:
                lengths += [round(fraction * self._num_steps) for fraction in FRACTIONS]
            for num_steps in lengths:
                for seed in range(self._seeds):
                    self._run(name, program, rate, num_steps, seed)

    def robust(self) -> None:
        """Trains each method at the best rate of its base, or of its own, and at twice that, with all seeds.

        Only methods whose base has been tuned.
        """
        for name, method in self._methods.items():
            tuned = tuning_runs(self._store.runs(method.options.get("base", name)), self._num_steps)
            if tuned:
                program = self._program(name)
                for rate in (best_rate(tuned), 2 * best_rate(tuned)):
                    for seed in range(self._seeds):
                        self._run(name, program, rate, self._num_steps, seed)

    def time(self, **options: Any) -> None:
        """Measures the step times of all methods, together, at the best rates known so far."""
        programs = {}
        for name, method in self._methods.items():
            known = tuning_runs(self._store.runs(name), self._num_steps)
            rate = best_rate(known) if known else method.centre(self._task.name)
            programs[name] = (self._program(name), rate)
        times = training.time_steps(programs, **options)
        for name, found in times.items():
            self._log(f"{name}: {1e3 * found['seconds_per_step']:.3g} ms per step")
            found["options"] = dict(self._methods[name].options)
        self._store.add_times(times)

    def all(self, **options: Any) -> None:
        """Tunes and trains, method by method, and times the steps unless all methods have been timed."""
        for name in self._methods:
            self.final([name])
        known = self._store.times()
        if any(known.get(name, {}).get("options") != method.options for name, method in self._methods.items()):
            self.time(**options)

    def _program(self, name: str) -> training.Program:
        return training.Program(self._task, self._methods[name], self._batch_size)

    def _tune(self, name: str, program: training.Program) -> float:
        method = self._methods[name]
        losses = tune(
            lambda rate: loss_of(self._run(name, program, rate, self._num_steps, TUNING_SEED)),
            method.centre(self._task.name),
            method.limits,
        )
        return best_rate(losses)

    def _run(self, name: str, program: training.Program, rate: float, num_steps: int, seed: int) -> dict[str, Any]:
        method = self._methods[name]
        head = {
            "task": self._task.name,
            "batch_size": self._batch_size,
            "method": name,
            "description": method.description,
            "kind": method.kind,
            "options": method.options,
            "tuned": method.rate_name,
        }

        def make(rate: float, num_steps: int, seed: int) -> dict[str, Any]:
            made = training.run(program, self._evaluation, rate, num_steps, seed)
            self._log(f"{name} {method.rate_name} {rate:g} seed {seed} steps {num_steps}: {made['final_loss']}")
            return made

        return self._store.run(name, head, make, rate, num_steps, seed)
